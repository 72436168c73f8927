"""From ``sample_layers`` to hook points: which activations of a model are captured."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import HookError, UnknownHookError
from ..hook_points import ATTENTION, HookPoint, LayerName, block_point, is_layer_glob, outer_point, parse_layer_name
from ..model import HookedModel
from ..selftest import quick_selftest

DETECTED = 4
"""How many blocks are captured where none are named."""


@dataclass(frozen=True)
class SampledLayer:
    """A hook point that is captured, and the name by which it was asked for, where that name means it alone."""

    point: HookPoint
    asked: str | int | None = None


def sampled_layers(model: HookedModel, asked: Sequence[str | int] | None) -> list[SampledLayer]:
    """The hook points that ``sample_layers`` names, each once, in the order of a forward pass.

        sampled_layers(model, ["model.layers.1", 2, "blocks.*.hook_mlp_out", "model.layers.0.mlp.up_proj"])

    Args:
        asked: blocks, by number or in any spelling ("model.layers.3", "transformer.h.3", "blocks.3", "3"; negative
            numbers count from the last; "blocks.*"), which means the residual stream that leaves them; the embedding
            or the last norm ("transformer.wte", "transformer.ln_f"); hook-point names, aliases, globs and raw module
            paths. None: the stream that leaves up to four blocks, evenly spaced, the last one among them.

    Raises:
        UnknownHookError: for a name that the model does not have; lists what there is.
        HookError: for a hook point that has no value of its own for each token, or that is not to be trusted on this
            model, with the reason.
    """
    found: dict[str, SampledLayer] = {}
    for name in detected_layers(model) if asked is None else asked:
        points = _points(model, name)
        for point in points:
            check_axes(point.name, point.axes)
            alone = asked is not None and len(points) == 1
            found.setdefault(point.name, SampledLayer(point, name if alone else None))
    check_trusted(model, list(found))
    order = {name: i for i, name in enumerate(model.hook_points)}
    return sorted(found.values(), key=lambda layer: order.get(layer.point.name, len(order)))


def detected_layers(model: HookedModel) -> list[str]:
    """The names of the stream that leaves up to four blocks: all of them, or evenly spaced ones that end with the last.

    Raises:
        HookError: the stream that leaves a block cannot be shown on this model, or is not one row per token; names
            what can be captured instead.
    """
    names = [block_point("resid_post", layer).name for layer in range(model.cfg.n_layers)]
    points = [model.hook_points[name] for name in names if name in model.hook_points]
    names = [point.name for point in points if _is_per_token(point.axes)]
    if not names:
        kind = model.cfg.model_type
        why = f"{kind} has no hook_resid_post"
        if points:
            why = f"hook_resid_post of {kind} is [{', '.join(points[0].axes)}]"
        raise HookError(
            f"No layers can be detected: {why}. Name some in sample_layers{_instead(model)}.", field="sample_layers"
        )
    count = min(DETECTED, len(names))
    return [names[(i + 1) * len(names) // count - 1] for i in range(count)]


def check_axes(name: str, axes: Sequence[str]) -> None:
    """Raise HookError for values that are not one per token; a raw module's axes are known when it has run."""
    if not axes or tuple(axes) == ATTENTION or _is_per_token(axes):
        return
    why = "one number per token" if tuple(axes) == ("batch", "pos") else f"[{', '.join(axes)}]"
    raise HookError(
        f"{name} cannot be captured as rows of tokens: its value is {why}. What can be has the axes batch, pos and "
        f"more, or {', '.join(ATTENTION)}.",
        field="sample_layers",
    )


def check_trusted(model: HookedModel, names: Sequence[str]) -> None:
    """Raise HookError for hook points at which an identity does not hold on this model; says which."""
    wrong = [name for name in names if name in model.untrusted]
    if not wrong:
        return
    report, _ = quick_selftest(model)
    why = next((f"{check.name} does not hold on {report.model_type}" for check in report.checks
                if wrong[0] in check.hook_points), f"an identity does not hold on {report.model_type}")  # fmt: skip
    others = f", nor can {len(wrong) - 1} more of what is asked for" if len(wrong) > 1 else ""
    raise HookError(f"{wrong[0]} cannot be captured{others}: {why}.", field="sample_layers")


def _is_per_token(axes: Sequence[str]) -> bool:
    return tuple(axes[:2]) == ("batch", "pos") and len(axes) > 2


def _instead(model: HookedModel) -> str:
    """What can be captured where the stream cannot: what is added to it."""
    for component in ("mlp_out", "attn_out"):
        point = block_point(component, 0)
        if point.name in model.hook_points and _is_per_token(model.hook_points[point.name].axes):
            return f", such as {point.name.replace('.0.', '.*.')}"
    return ""


def _points(model: HookedModel, name: str | int) -> list[HookPoint]:
    """The hook points of one name."""
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise HookError(f"A layer is a number or a name, got {name!r}.", field="sample_layers")
    n_layers = model.cfg.n_layers
    if isinstance(name, int):
        _check_block(name, n_layers, name)
        name = str(name % n_layers)
    if is_layer_glob(name) and name.endswith("*"):
        name = block_point("resid_post", 0).name.replace(".0.", ".*.")
    elif (place := _place(name)) is not None:
        _check_block(place.layer or 0, n_layers, name)
        component = {"embedding": "embed", "final_norm": "ln_final"}.get(place.place)
        point = block_point("resid_post", place.layer or 0) if component is None else outer_point(component)
        # An architecture may have no such point where it has a module of that name.
        if component is None or point.name in model.hook_points:
            name = point.name
    try:
        return [capture.point for capture in model.resolve_hooks([name]).captures]
    except UnknownHookError as error:
        raise UnknownHookError(
            f"{error} Blocks are named 0 to {n_layers - 1} or model.layers.0 to model.layers.{n_layers - 1}.",
            field="sample_layers",
        ) from error


def _check_block(layer: int, n_layers: int, asked: str | int) -> None:
    if not -n_layers <= layer < n_layers:
        raise UnknownHookError(f"Blocks are 0 to {n_layers - 1}, got {asked!r}.", field="sample_layers")


def _place(name: str) -> LayerName | None:
    """The block, embedding or last norm of a name, whether or not there is such a block; None where it means something
    else."""
    try:
        place = parse_layer_name(name, n_layers=sys.maxsize)
    except UnknownHookError:
        return None
    return place if place.norm is None else None
