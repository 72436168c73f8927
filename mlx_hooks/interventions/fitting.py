"""Whether an intervention fits the axes and sizes of a hook point."""

from collections.abc import Mapping

import numpy as np

from ..errors import HookError
from ..hook_points import POSITION_AXES, HookPoint
from .reading import OPEN, Chosen, as_chosen, count, spell
from .sources import Given, holds_tokens, is_scores
from .spec import Intervention


def check_point(asked: Intervention, point: HookPoint) -> None:
    """What the names and sizes of the axes already tell."""
    axes = point.axes
    sizes = known_sizes(point)
    if not axes and (asked.heads is not None or asked.keys is not None):
        raise HookError(f"{point.name} is a raw module, whose axes have no names: it can be limited by neurons only.")
    if axes:
        if asked.positions is not None and point.position_axis is None:
            raise HookError(f"{point.name} has no axis over positions ({', '.join(axes)}).")
        check_selection(asked, axes, sizes)
    if holds_tokens(point) and asked.type not in ("set", "patch"):
        raise HookError(f"{point.name} holds token ids, which can only be set or patched.")
    if asked.norm_match and axes and axes[-1] == "key":
        raise HookError(f"norm_match needs an axis of features: the last one of {point.name} runs over keys.")
    for name in ("values", "vector"):
        numbers = getattr(asked, name)
        if numbers is None:
            continue
        if np.isneginf(numbers).any() and not is_scores(point):
            raise HookError(f"{name} holds -inf (or null), which masks keys in attention scores only.")
        if is_scores(point) and numbers.ndim == 0 and np.isneginf(numbers) and asked.keys is None:
            raise HookError("a query would be left without any key: limit -inf to some keys.")
        if axes:
            check_sizes(asked, Given(numbers), axes, sizes, numbers.shape)


def known_sizes(point: HookPoint) -> dict[int, int]:
    """Sizes of the axes that do not depend on the run."""
    return {axis: size for axis, size in enumerate(point.sizes) if size is not None}


def check_selection(asked: Intervention, axes: tuple[str, ...], sizes: Mapping[int, int]) -> None:
    """Whether heads, neurons and keys name axes that are there, and indices that these have."""
    named = ", ".join(axes) or "none"
    if asked.heads is not None and "head" not in axes:
        raise HookError(f"heads need a head axis; the axes here are {named}.")
    if asked.keys is not None and "key" not in axes:
        raise HookError(f"keys need a key axis; the axes here are {named}.")
    if asked.neurons is not None and (not axes or axes[-1] in ("key", *POSITION_AXES)):
        raise HookError(f"neurons are indices of a last axis of features; the axes here are {named}.")
    for axis, size in sizes.items():
        if axis >= len(axes) or axes[axis] in ("batch", "key", *POSITION_AXES):
            continue
        chosen = chosen_on(asked, axes, axis)
        what = "heads" if axes[axis] == "head" else "neurons"
        outside = chosen is not None and (chosen.start >= size if isinstance(chosen, range) else max(chosen) >= size)
        if outside:
            raise HookError(f"{what} are 0 to {size - 1}, got {spell(chosen)}.")


def check_sizes(
    asked: Intervention, given: Given, axes: tuple[str, ...], sizes: Mapping[int, int], shape: tuple[int, ...]
) -> None:
    """Whether given numbers broadcast to the selection, as far as sizes are known."""
    what = next((name for name in ("values", "vector", "source") if getattr(asked, name) is not None), "mean")
    wanted: list[str] = []
    n_axes = len(axes) or len(sizes)
    fits = len(shape) <= n_axes
    for axis in range(n_axes):
        name = axes[axis] if axes else ""
        chosen = None if given.whole else chosen_on(asked, axes, axis)
        size = sizes.get(axis)
        if chosen is not None:
            listed = isinstance(chosen, tuple) or chosen.stop < OPEN
            whole = size if name not in POSITION_AXES and name != "key" else None
            size = count(chosen, whole) if listed or whole is not None else 1
        elif name in POSITION_AXES and not given.whole:
            size = 1
        elif name == "key" or name in POSITION_AXES:
            size = None
        wanted.append(f"{name or 'axis'} {'any' if size is None else size}")
        at = axis - (n_axes - len(shape))
        if at >= 0 and size is not None and shape[at] not in (1, size):
            fits = False
    if not fits:
        raise HookError(
            f"{what} of shape {tuple(shape)} does not fit: an axis has size 1 or that of the selection "
            f"({', '.join(wanted)}), and axes are matched from the last."
        )


def chosen_on(asked: Intervention, axes: tuple[str, ...], axis: int) -> Chosen | None:
    """What an intervention selects along an axis; "last" and None select no list."""
    name = axes[axis] if axes else ""
    if name in POSITION_AXES:
        return None if isinstance(asked.positions, str) else as_chosen(asked.positions)
    if name == "head":
        return as_chosen(asked.heads)
    if name == "key":
        return as_chosen(asked.keys)
    is_last = axis == len(axes) - 1 and name != "batch"
    return as_chosen(asked.neurons) if is_last else None
