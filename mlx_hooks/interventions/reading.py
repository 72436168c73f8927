"""Indices and numbers in the spellings that an intervention may give them."""

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

import mlx.core as mx
import numpy as np

from ..activations import to_numpy
from ..errors import HookError

Indices = None | int | Sequence[int] | slice | Mapping[str, int | None]


Chosen = range | tuple[int, ...]


OPEN = 2**62
"""Where an interval without an end ends."""


def chosen_of(name: str, given: Any, more: str = "") -> Chosen | None:
    """Indices in one of their spellings: a list in its order, or an interval."""
    problem = HookError(
        f"{name} are a whole number from 0 up, a list of different ones, {{'start': a, 'stop': b}}{more}; "
        f"got {given!r}.",
        field=name,
    )
    if given is None:
        return None
    if isinstance(given, Mapping):
        if not given or set(given) - {"start", "stop"}:
            raise problem
        given = slice(given.get("start"), given.get("stop"))
    if isinstance(given, slice):
        start, stop = 0 if given.start is None else given.start, OPEN if given.stop is None else given.stop
        if given.step not in (None, 1) or not all(type(end) is int for end in (start, stop)) or not 0 <= start < stop:
            raise problem
        return range(start, min(stop, OPEN))
    if isinstance(given, str):
        raise problem
    if isinstance(given, range) and given.step == 1 and 0 <= given.start < given.stop:
        return given
    try:
        listed = tuple(index(i) for i in (given if isinstance(given, Iterable) else [given]) if not _refuse_bool(i))
    except TypeError:
        raise problem from None
    if not listed or min(listed) < 0 or len(set(listed)) < len(listed):
        raise problem
    return listed


def _refuse_bool(i: Any) -> bool:
    if isinstance(i, bool | np.bool_):
        raise TypeError("true and false are no indices")
    return False


def as_chosen(indices: Any) -> Chosen | None:
    # __post_init__ left nothing else.
    assert indices is None or isinstance(indices, range | tuple)
    return indices


def places_of(chosen: Chosen, start: int, size: int) -> np.ndarray:
    """For each of ``size`` indices from ``start`` its place in the selection, -1 for none: (5, 3), 3, 3 -> 1, -1, 0."""
    ids = np.arange(start, start + size)
    if isinstance(chosen, range):
        return np.where((ids >= chosen.start) & (ids < chosen.stop), ids - chosen.start, -1)
    place = {i: at for at, i in enumerate(chosen)}
    return np.array([place.get(i, -1) for i in ids.tolist()], dtype=np.int64)


def count(chosen: Chosen, size: int | None) -> int:
    """How many indices of an axis are selected; an interval may run beyond the axis."""
    if isinstance(chosen, tuple):
        return len(chosen)
    return max(0, (chosen.stop if size is None else min(chosen.stop, size)) - chosen.start)


def first(chosen: Chosen) -> int:
    """The lowest index. An interval is not walked through: it may be open."""
    return chosen.start if isinstance(chosen, range) else min(chosen)


def spell(chosen: Chosen | None) -> str:
    if isinstance(chosen, range):
        return f"{{'start': {chosen.start}" + (f", 'stop': {chosen.stop}}}" if chosen.stop < OPEN else "}")
    return str(list(chosen or ())[:10])


def span(positions: Sequence[int]) -> str:
    ends = (positions[0], positions[-1]) if isinstance(positions, range) else (min(positions), max(positions))
    return f"{ends[0]} to {ends[1]}" if len(positions) > 1 else str(ends[0])


def numbers_of(name: str, given: Any, masks: bool) -> np.ndarray:
    """Numbers as float32, null as -inf. With ``masks`` -inf may be among them; nan and inf never."""
    what = f"{name} are a number, or lists of numbers of one length per axis"
    if isinstance(given, mx.array):
        given = to_numpy(given)
    array = given if isinstance(given, np.ndarray) else _from_lists(given, what)
    if array.dtype.kind not in "iuf":
        raise HookError(f"{what}, got {array.dtype}.")
    if not array.size:
        raise HookError(f"{what}, got none.")
    with np.errstate(over="ignore"):
        # A copy: who gave the numbers may change them.
        narrow = np.array(array, dtype=np.float32)
    refused = np.isnan(narrow) | np.isposinf(narrow) | (np.isneginf(narrow) & ~(np.isneginf(array) & masks))
    if refused.any():
        raise HookError(f"{name} must be finite in float32, got {array[refused].flat[0]!r}.")
    return narrow


def _from_lists(given: Any, what: str) -> np.ndarray:
    try:
        objects = np.array(given, dtype=object)
    except ValueError:
        raise HookError(f"{what}, got lists of different lengths.") from None
    flat = objects.ravel()
    wrong = next((x for x in flat if isinstance(x, bool | np.bool_) or not _is_number(x)), None)
    if isinstance(wrong, list | tuple):
        raise HookError(f"{what}, got lists of different lengths.")
    if wrong is not None:
        raise HookError(f"{what}, got {wrong!r}.")
    try:
        return np.array([-np.inf if x is None else float(x) for x in flat], dtype=np.float64).reshape(objects.shape)
    except OverflowError:
        raise HookError(f"{what}, got one beyond float64.") from None


def _is_number(x: Any) -> bool:
    return x is None or isinstance(x, int | float | np.integer | np.floating)
