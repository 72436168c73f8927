"""The hook function of an intervention, and its arithmetic: float32, rounded once to the model's type."""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import HookError
from ..hook_points import POSITION_AXES, HookPoint
from ..hooks import Hook, Run
from .fitting import check_selection, check_sizes, chosen_on
from .reach import Reach
from .reading import as_chosen, first, places_of, span
from .session import Firing, InterventionSession
from .sources import Given, Supply, holds_tokens, is_scores, is_state
from .spec import Intervention, blame


@dataclass(frozen=True)
class EditingFunction:
    """A function that was in force in a run. What it did nobody can tell, nor that it did nothing.

    Args:
        name: of the function.
        hook_points: where it was called, in the order of its hooks.
    """

    name: str
    hook_points: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The function as plain JSON values, beside interventions."""
        return {"type": "function", "name": self.name, "hook_points": list(self.hook_points)}


def edits_of(hooks: Iterable[Hook]) -> list[Intervention | EditingFunction]:
    """What edits by some hooks: each intervention and each function once, in order."""
    found: dict[Any, Intervention | EditingFunction] = {}
    for hook in hooks:
        if isinstance(hook.fn, Edit):
            found[id(hook.fn.session), hook.fn.index] = hook.fn.asked
        else:
            before = found.get(id(hook.fn))
            points = before.hook_points if isinstance(before, EditingFunction) else ()
            name = getattr(hook.fn, "__name__", type(hook.fn).__name__)
            found[id(hook.fn)] = EditingFunction(name, (*points, hook.point.name))
    return list(found.values())


class Edit:
    """The hook function of one intervention at one point.

    Everything is computed for the whole value and kept where the selection is, so that no entry is gathered or
    scattered and what a call computes for a position does not depend on the call's other positions.
    """

    def __init__(self, session: InterventionSession, i: int, intervention: Intervention, supply: Supply | None) -> None:
        self.session = session
        self.index = i
        self.asked = intervention
        self.supply = supply
        self.given: Given | None = None
        """What is put in: of the pass that is met, since each may have its own."""

    def __call__(self, value: mx.array, point: HookPoint) -> mx.array | None:
        session, run = self.session, self.session.run
        session.met = True
        with blame(self.index, self.asked):
            axes = _axes(value, point, run)
            edited = self._positions(run)
            if not edited:
                return None
            if self.supply is not None:
                self.given = self.supply.at(run.pass_index, as_chosen(self.asked.passes))
            self._check_value(value, point, axes, edited)
            mask = self._mask(value, axes, edited)
            old = value.astype(mx.float32)
            new = mx.where(mask, self._change(old, mask, axes, point).astype(value.dtype), value)
        before, after = (_squares(x, mask, is_scores(point)) for x in (old, new.astype(mx.float32)))
        if is_state(point):
            # What a call leaves is of its end.
            edited = [run.start + run.length - 1]
        session.add(Firing(self.index, point.name, run.pass_index, edited, run.phase, before, after))
        return new

    def _positions(self, run: Run) -> list[int]:
        """The absolute positions of the call that are to be edited."""
        reach = self.session.reach
        stop = run.start + run.length
        passes = as_chosen(self.asked.passes)
        if self.asked.phase not in (None, run.phase) or (passes is not None and run.pass_index not in passes):
            return []
        if self.asked.positions == "last":
            last = stop if reach is None or run.phase == "decode" else reach.prompt_stop
            return [last - 1] if run.start < last <= stop else []
        chosen, keys = as_chosen(self.asked.positions), as_chosen(self.asked.keys)
        # A position whose keys come after it has nothing to edit.
        here = range(max(run.start, 0 if keys is None else first(keys)), stop)
        if chosen is None:
            return list(here)
        return [p for p, place in zip(here, places_of(chosen, here.start, len(here)), strict=True) if place >= 0]

    def _check_value(self, value: mx.array, point: HookPoint, axes: tuple[str, ...], edited: list[int]) -> None:
        """What only the value itself can tell: its kind of numbers and its sizes."""
        if not mx.issubdtype(value.dtype, mx.floating) and not holds_tokens(point):
            raise HookError(f"{point.name} holds {value.dtype}: only numbers with a fraction are edited.")
        if not axes and (self.asked.positions is not None or self.asked.neurons is not None or self.asked.over):
            raise HookError(f"{point.name} has shape {value.shape}, which names no positions: leave the selection out.")
        by_position = self.given is not None and self.given.whole and not is_state(point)
        if not axes and (self.asked.type == "noise" or by_position):
            raise HookError(f"{point.name} has shape {value.shape}, which names no positions.")
        at = next((i for i, name in enumerate(axes) if name in POSITION_AXES), None)
        if at is not None and value.shape[at] != self.session.run.length:
            raise HookError(f"{point.name} has {value.shape[at]} rows for {self.session.run.length} positions.")
        sizes = dict(enumerate(value.shape))
        check_selection(self.asked, axes, sizes)
        if self.given is None:
            return
        check_sizes(self.asked, self.given, axes, sizes, self.given.array.shape)
        self._check_rows(edited, axes)
        if is_scores(point) and self.asked.values is not None and np.isneginf(self.asked.values).any():
            self._check_rows_stay(value, axes, edited)

    def _check_rows(self, edited: Sequence[int], axes: tuple[str, ...]) -> None:
        given = self.given
        assert given is not None
        if given.positions is not None:
            missing = sorted(set(edited) - set(given.positions))
            if missing:
                raise HookError(
                    f"the source has positions {span(given.positions)}, not {missing[0]}: give positions that it has."
                )
        by_key = axes and axes[-1] == "key" and (given.whole or self.asked.keys is None)
        n_keys = given.array.shape[-1] if given.array.ndim else 1
        if by_key and n_keys > 1 and n_keys <= max(edited):
            raise HookError(f"position {max(edited)} has {max(edited) + 1} keys, {n_keys} are given.")

    def _check_rows_stay(self, value: mx.array, axes: tuple[str, ...], edited: list[int]) -> None:
        # In NumPy, from what is given alone: asking MLX for a number would make every step wait.
        run, shape = self.session.run, value.shape
        masks = np.isneginf(self._spread(np.asarray(self.asked.values), axes, shape, self._places(axes, shape)))
        for keep in self._kept(axes, shape, edited):
            masks = masks & keep
        seen = np.arange(shape[-1])[None] <= np.arange(run.start, run.start + run.length)[:, None]
        if not (seen & ~masks).any(-1).all():
            raise HookError("a query would be left without any key: the softmax of a row of -inf is no pattern.")

    def _places(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> dict[int, np.ndarray]:
        """Per limited axis, for each of its indices the place in the selection, -1 for none."""
        start = self.session.run.start
        places = {}
        for axis, name in enumerate(axes):
            chosen = chosen_on(self.asked, axes, axis)
            if chosen is not None:
                places[axis] = places_of(chosen, start if name in POSITION_AXES else 0, shape[axis])
        return places

    def _kept(self, axes: tuple[str, ...], shape: tuple[int, ...], edited: list[int]) -> Iterator[np.ndarray]:
        """Per limited axis, which of its indices are edited: shaped to broadcast to the value."""
        run = self.session.run
        places = self._places(axes, shape)
        for axis, name in enumerate(axes):
            if name in POSITION_AXES:
                keep = np.isin(np.arange(run.start, run.start + run.length), edited)
            elif axis in places:
                keep = places[axis] >= 0
            else:
                continue
            yield keep.reshape([-1 if a == axis else 1 for a in range(len(axes))])

    def _mask(self, value: mx.array, axes: tuple[str, ...], edited: list[int]) -> mx.array:
        """Which entries are edited, broadcastable to the value.

        In scores and patterns only what attention sees is edited: a later token does not come to speak to an earlier
        one, however the sequence is cut into calls.
        """
        mask = mx.array(True)
        for keep in self._kept(axes, value.shape, edited):
            mask = mask & mx.array(keep)
        return mask & self._seen(value) if axes and axes[-1] == "key" else mask

    def _seen(self, value: mx.array) -> mx.array:
        """Which keys of scores or a pattern an edit reaches, broadcastable to the value.

        A few models attend to later keys. There an edit reaches these too, unless it chooses ``keys``, which are those
        up to the query's own position, or what is put in ends before them.
        """
        run, n_keys = self.session.run, value.shape[-1]
        # A pattern does not say which of its zeros are keys that attention does not see.
        seen = value != -mx.inf if run.hidden is None else ~run.hidden
        n_given = self.given.array.shape[-1] if self.given is not None and self.given.array.ndim else 1
        if self.asked.keys is None and (n_given == 1 or n_given >= n_keys):
            return seen
        queries = mx.arange(run.start, run.start + run.length)[:, None]
        return seen & (mx.arange(n_keys)[None] <= queries)

    def _change(self, old: mx.array, mask: mx.array, axes: tuple[str, ...], point: HookPoint) -> mx.array:
        asked: Any = self.asked
        kind = self.asked.type
        if kind == "zero":
            return mx.zeros_like(old)
        if kind == "scale":
            return old * asked.factor
        if kind == "clamp":
            return mx.clip(old, asked.min, asked.max)
        if kind == "noise":
            return old + asked.std * _noise(asked.seed, point, axes, old.shape, self.session.run.start)
        assert self.given is not None
        spread = self._spread(self.given.array, axes, old.shape, self._places(axes, old.shape))
        given = mx.broadcast_to(spread, old.shape)
        if kind != "add":
            return given
        if asked.norm_match:
            # Activation Oracles (arXiv:2512.15674), as vllm-lens has it: v gets the length of what it is added to.
            given = given / _norm(given, mask) * _norm(old, mask)
        return old + asked.coefficient * given

    def _spread(self, array: Any, axes: tuple[str, ...], shape: tuple[int, ...], places: dict[int, np.ndarray]) -> Any:
        """The given numbers (MLX's or NumPy's) where the value has them; what is not selected is arbitrary."""
        given = self.given
        assert given is not None
        array = array.reshape([1] * (len(shape) - array.ndim) + list(array.shape))
        for axis, name in enumerate(axes):
            if array.shape[axis] == 1:
                continue
            if name in POSITION_AXES and given.positions is not None:
                place = places_of(given.positions, self.session.run.start, shape[axis])
            elif name == "key" and (given.whole or axis not in places):
                place = np.arange(shape[axis])
                place[place >= array.shape[axis]] = 0
            elif not given.whole and axis in places:
                place = places[axis]
            else:
                continue
            place = np.maximum(place, 0)
            on_host = isinstance(array, np.ndarray)
            array = array.take(place, axis) if on_host else mx.take(array, mx.array(place), axis=axis)
        return array

    def check_reach(self, point: HookPoint, due: Sequence[int], reach: Reach, sizes: dict[int, int]) -> None:
        """Check what is put in against the positions that the run comes to, its batch and the sizes known before it.

        Raises:
            HookError: says what is missing.
        """
        batch = {i: reach.batch for i, name in enumerate(point.axes) if name == "batch"}
        passes = as_chosen(self.asked.passes)
        for given in () if self.supply is None else self.supply.due(passes):
            self.given = given
            self._check_rows(due, point.axes)
            if point.axes:
                check_sizes(self.asked, given, point.axes, sizes | batch, given.array.shape)


def _axes(value: mx.array, point: HookPoint, run: Run) -> tuple[str, ...]:
    """Names of the value's axes; a raw module's value that has the shape of a stream is one."""
    if point.axes:
        return point.axes
    is_state = point.component == "mixer_state"
    is_stream = value.ndim == 3 and value.shape[:2] == (run.batch, run.length) and not is_state
    return ("batch", "pos", "feature") if is_stream else ()


def _squares(value: mx.array, mask: mx.array, scores: bool) -> mx.array:
    """Of the selected entries the largest size, and the sum of squares in units of it; masked scores count nothing."""
    if scores:
        mask = mask & (value != -mx.inf)
    return mx.stack([part.sum() for part in _in_units(value, mask, None)])


def _norm(value: mx.array, mask: mx.array) -> mx.array:
    """Euclidean norm over the selected entries of the last axis, which stays with size 1."""
    unit, squares = _in_units(value, mask, -1)
    return unit * mx.sqrt(squares)


def _in_units(value: mx.array, mask: mx.array, axis: int | None) -> tuple[mx.array, mx.array]:
    """The largest size among the selected entries, and the sum of their squares in units of it.

    A square overflows float32 from about 1.8e19 on; in these units none is above 1, and what is not finite stays so.
    """
    chosen = mx.where(mask, value, 0.0)
    unit = mx.abs(chosen).max(axis=axis, keepdims=True)
    scaled = chosen / mx.where(unit == 0, 1.0, unit)
    return unit, (scaled * scaled).sum(axis=axis, keepdims=True)


def _noise(seed: int, point: HookPoint, axes: tuple[str, ...], shape: tuple[int, ...], start: int) -> mx.array:
    """Standard normal numbers: each row's come from a key of its own, made of seed, hook point, batch row and position.

    A row of numbers is what has one position: [d_model], [head, d_head]; in scores and patterns one key's [head].
    """
    inner = [i for i, name in enumerate(axes) if name not in ("batch", "key", *POSITION_AXES)]
    outer = [i for i in range(len(shape)) if i not in inner]
    name = zlib.crc32(point.name.encode())
    keys = _mixed(_mixed(np.full([1] * len(outer), seed, np.uint64)) ^ np.uint64(name))
    for place, axis in enumerate(outer):
        ids = np.arange(shape[axis], dtype=np.uint64) + np.uint64(start if axes[axis] in POSITION_AXES else 0)
        keys = _mixed(keys ^ ids.reshape([-1 if i == place else 1 for i in range(len(outer))]))
    halves = np.stack([keys >> np.uint64(32), keys & np.uint64(2**32 - 1)], axis=-1).astype(np.uint32)
    rows = mx.vmap(lambda key: mx.random.normal([shape[i] for i in inner], key=key))(mx.array(halves.reshape(-1, 2)))
    rows = rows.reshape([shape[i] for i in [*outer, *inner]])
    order = [*outer, *inner]
    return rows.transpose([order.index(i) for i in range(len(shape))])


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's step (Steele, Lea and Flood 2014), on each number: [0] -> [0xE220A8397B1DCDAF]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
