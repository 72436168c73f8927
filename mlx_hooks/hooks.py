"""What a hook is, where in the sequence it fires, and the hook that records.

A hook is called as ``fn(value, hook_point)``: what it returns replaces the value, None leaves it alone.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any

import mlx.core as mx

from .activations import CapturedActivation
from .errors import HookError
from .hook_points import HookPoint
from .reductions import Reduction, begin, name_of

HookFunction = Callable[[mx.array, HookPoint], mx.array | None]
Positions = None | str | int | Sequence[int] | slice
HeadIndices = None | int | Sequence[int]


@dataclass(frozen=True)
class Hook:
    """A function at a hook point. A reading hook promises to return None; it runs after all editing ones.

    ``rows`` lets a reading hook ask for some rows of scores and pattern only: it maps the run to rows of the call,
    counted from 0, and only these are computed. ``heads`` says which heads the hook keeps: scores and pattern may come
    with these alone; every other value comes with all of its heads. ``due`` are the absolute positions that it keeps,
    ascending (None: all); it is left out of a call that has none of them. A reading hook ``in_parts`` may be shown a
    long pattern some rows after the others, each once: ``run.rows`` says which. Where the mask is plainly causal, keys
    after the last of them, which it hides from all of them, are missing.
    """

    point: HookPoint
    fn: HookFunction
    reads: bool = False
    rows: "Callable[[Run], list[int]] | None" = None
    heads: "HeadSelection | None" = None
    due: Sequence[int] | None = None
    in_parts: bool = False

    def is_due(self, start: int, length: int) -> bool:
        """Whether a call of ``length`` tokens that begins at absolute position ``start`` is to meet it."""
        return self.due is None or bool(rows_due(self.due, start, length))


def rows_due(due: Sequence[int], start: int, length: int) -> Sequence[int]:
    """Rows of a call, from 0, of the absolute positions ``due``, which ascend.

    >>> rows_due((2, 5, 9), start=4, length=4)
    [1]
    """
    if isinstance(due, range):
        return range(max(due.start - start, 0), max(min(due.stop - start, length), 0))
    return [p - start for p in due[bisect_left(due, start) : bisect_left(due, start + length)]]


def head_indices(heads: HeadIndices) -> tuple[int, ...]:
    """One head index or several as a tuple.

    Raises:
        HookError: for no heads, and for what is no whole number.
    """
    try:
        asked = tuple(index(h) for h in (heads if isinstance(heads, Iterable) else [heads]))  # type: ignore[arg-type]
    except TypeError:
        asked = ()
    if isinstance(heads, bool | str) or not asked:
        raise HookError(f"heads is None, a whole number or a list of them, got {heads!r}.")
    return asked


@dataclass(frozen=True)
class HeadSelection:
    """Which heads are kept of a model with ``n_heads`` query heads: ``heads``, ascending, each once."""

    heads: tuple[int, ...]
    n_heads: int

    @classmethod
    def of(cls, heads: HeadIndices, n_heads: int) -> "HeadSelection":
        """Check a head index or several; negative ones count from the last head.

        Raises:
            HookError: for no heads, and for one that the model does not have.
        """
        asked = head_indices(heads)
        outside = [h for h in asked if not -n_heads <= h < n_heads]
        if outside:
            raise HookError(f"Heads are 0 to {n_heads - 1}, got {', '.join(map(str, outside))}.", field="heads")
        return cls(tuple(sorted({h % n_heads for h in asked})), n_heads)

    def at(self, n_heads: int) -> tuple[int, ...]:
        """The heads kept of a value with ``n_heads``; of key-value heads, those that serve the selected query heads.

        >>> HeadSelection((1, 4, 5), n_heads=8).at(4)
        (0, 2)
        """
        return tuple(sorted({h * n_heads // self.n_heads for h in self.heads}))


@dataclass
class Run:
    """Where in the sequence the current forward pass stands: hooks ask it for positions.

    ``start`` is the absolute position of the first token of the call, ``length`` the number of its tokens, ``batch``
    that of its rows.
    """

    start: int = 0
    length: int = 0
    batch: int = 1
    phase: str = "prefill"
    step: int = 0
    pass_index: int = 0
    """The pass through a layer that runs several times in one forward pass; 0 for nearly all models."""
    begins: int | None = None
    """The absolute position at which the next forward pass begins, if who runs it knows; else its KV cache says."""
    forward: int = -1
    """A number that each forward pass has for itself."""
    caches: Sequence[Any] = ()
    """The KV caches of the call, one by one."""
    hidden: mx.array | None = None
    """While a pattern is shown to edits: the keys that attention does not see, as its scores have them."""
    rows: range | None = None
    """While a pattern is shown in parts: the rows of the call, from 0, that this part holds."""
    thread: int = 0
    """The thread that attached the hooks: calls from other threads pass by unseen."""


class Recorder:
    """A reading hook that hands each value on as a :class:`CapturedActivation` with its place in the sequence.

    Args:
        run: where the current forward pass stands.
        keep: called with each record.
        positions: absolute positions to keep: None (all), "last", an int, a list of ints or a slice; negative ones
            count from the end of the call. Scores and pattern are computed for these rows only.
        heads: heads to keep where the value has a head axis; None for all.
        due: in place of ``positions`` the absolute positions to keep, ascending, of all calls of the run.
        reduce: keep what a reduction needs of the value; see ``reductions.py``.
        labels: fields of the record that the asker fills (hook_id, layer_name, component, is_input).
    """

    def __init__(
        self,
        run: Run,
        keep: Callable[[CapturedActivation], None],
        positions: Positions = None,
        heads: HeadSelection | None = None,
        due: Sequence[int] | None = None,
        reduce: Reduction | None = None,
        **labels: Any,
    ) -> None:
        self.run = run
        self.keep = keep
        self.positions = positions
        self.heads = heads
        self.due = due
        self.reduce = reduce
        self.labels = labels

    def hook(self, point: HookPoint) -> Hook:
        """The hook that records at ``point``.

        Raises:
            HookError: when positions are to be selected where no axis runs over positions.
        """
        if self._selects and point.position_axis is None:
            raise HookError(f"{point.name} has no named position axis: capture it without positions.")
        rows = self.rows if self._selects else None
        heads = self.heads if "head" in point.axes else None
        return Hook(point, self, reads=True, rows=rows, heads=heads, due=self.due)

    @property
    def _selects(self) -> bool:
        """Whether some positions are kept only."""
        return self.positions is not None or self.due is not None

    def rows(self, run: Run) -> list[int]:
        """Rows of the call, from 0, at the positions asked for."""
        if self.due is not None:
            return list(rows_due(self.due, run.start, run.length))
        return select_positions(self.positions, run.start, run.length)

    def __call__(self, value: mx.array, point: HookPoint) -> None:
        if point.component == "mixer_state":
            # States are often views into an array of every token's: gathered, they have memory of their own.
            value = mx.take(value, mx.arange(value.shape[0]), axis=0)
            point = replace(point, axes=("batch", *(f"state_{i}" for i in range(1, value.ndim))))
        elif not point.axes and value.ndim == 3 and value.shape[:2] == (self.run.batch, self.run.length):
            # A raw module's value has the shape of a stream: its records join like one.
            point = replace(point, axes=("batch", "pos", "feature"))
        ids: Sequence[int] = range(self.run.start, self.run.start + self.run.length)
        if self._selects:
            rows = self.rows(self.run)
            if not rows:
                return
            ids = [self.run.start + row for row in rows]
            axis = point.position_axis
            if axis is not None and point.axes[axis] == "pos":
                value = mx.take(value, mx.array(rows), axis=axis)
        held: tuple[int, ...] | None = None
        if "head" in point.axes:
            value, held = self._select_heads(value, point)
        if self.reduce is None:
            # A view into a fused projection would keep all of it alive for one part.
            value = mx.contiguous(value)
        else:
            value, point = begin(self.reduce, value, point)
        run = self.run
        place: dict[str, Any] = {"phase": run.phase, "step": run.step, "pass_index": run.pass_index}
        self.keep(
            CapturedActivation(point, value, ids, heads=held, reduce=name_of(self.reduce), **place, **self.labels)
        )

    def _select_heads(self, value: mx.array, point: HookPoint) -> tuple[mx.array, tuple[int, ...] | None]:
        """The value's heads that are kept, in memory of their own, and their indices (None: all)."""
        if self.heads is None:
            return value, None
        axis = point.axes.index("head")
        if "query" in point.axes and value.shape[axis] != self.heads.n_heads:
            return value, self.heads.heads
        held = self.heads.at(value.shape[axis])
        return mx.take(value, mx.array(held), axis=axis), held


def select_positions(positions: Positions, start: int, length: int) -> list[int]:
    """Rows of a call of ``length`` tokens that begins at absolute position ``start``.

    >>> select_positions("last", start=0, length=5)
    [4]

    Raises:
        HookError: for a position that the call does not cover.
    """
    stop = start + length
    allowed = "'last', a whole number, a list of them or a slice"
    if isinstance(positions, slice):
        asked = sorted(p for p in range(*positions.indices(stop)) if p >= start)
    elif isinstance(positions, str) and positions == "last":
        asked = [stop - 1]
    elif isinstance(positions, bool | str) or positions is None:
        raise HookError(f"Positions are {allowed}, got {positions!r}.")
    else:
        try:
            asked = [index(p) for p in (positions if isinstance(positions, Iterable) else [positions])]
        except TypeError:
            raise HookError(f"Positions are {allowed}, got {positions!r}.") from None
    rows = [(p + stop if p < 0 else p) - start for p in asked]
    outside = [p for p, row in zip(asked, rows, strict=True) if not 0 <= row < length]
    if outside or not rows:
        raise HookError(
            f"Positions {outside or positions} are outside the {length} tokens of this call ({start} to {stop - 1})."
        )
    return rows
