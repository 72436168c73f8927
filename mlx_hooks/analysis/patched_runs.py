"""Runs with something put in from other runs, many at once.

1. The other run (the source) is captured at every hook point that some cell names.
2. The rows of one forward pass are cells x examples: at a hook point each row keeps its own value, except where its
   cell puts in the source's. A row is what a run of its own would be.
3. Cells are sorted by layer. Below the first layer that a pass puts something in, all rows are what the plain run
   is: the pass begins with the plain stream there, and MLX computes nothing of what lies before.
4. A cell that would put in what is there already is not run.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..errors import HookError
from ..hook_points import POSITION_AXES, HookPoint, block_point
from ..hooks import Hook, Run
from ..model import HookedModel
from .components import Component, captured, logits_of
from .progress import Passes

_ENOUGH = 1024
"""Tokens of one forward pass: with more it is not faster."""
_MOST_NUMBERS = 2**26
"""Numbers in the largest array of one forward pass, as far as that can be foreseen."""
_CLOSE, _ROUNDINGS = 1e-4, 8
"""How far a run that continues may be off, of the largest logit: this, or so many units of rounding."""


@dataclass(frozen=True)
class Cell:
    """What one run gets from another.

    Args:
        hook_points: canonical names.
        positions: absolute; negative ones count from the end. None for all.
        heads: entries of the head axis, for keys and values of grouped queries key-value heads. None for all.
    """

    hook_points: tuple[str, ...]
    positions: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    @classmethod
    def of(cls, component: Component) -> "Cell":
        """A component at all positions."""
        return cls(component.points, heads=None if component.head is None else (component.head,))

    def __str__(self) -> str:
        parts = [" and ".join(self.hook_points)]
        if self.heads is not None:
            parts.append(f"heads {', '.join(map(str, self.heads))}" if len(self.heads) > 1 else f"head {self.heads[0]}")
        if self.positions is not None:
            listed = ", ".join(map(str, self.positions))
            parts.append(f"positions {listed}" if len(self.positions) > 1 else f"position {listed}")
        return ", ".join(parts)

    def check(self, model: HookedModel, length: int) -> None:
        """Check it against a model and the length of the shortest prompt.

        Raises:
            HookError: for hook points that cannot be replaced or have no such axis, and heads and positions outside.
        """
        for name in self.hook_points:
            point = model.hook_points[name]
            model.architecture.check_editable(point)
            if point.axes[:1] != ("batch",):
                raise HookError(f"{name} has no named batch axis: it cannot be patched prompt by prompt.")
            if self.positions is not None and point.position_axis is None:
                raise HookError(f"{name} has no position axis: patch all of it, without positions.")
            if self.heads is not None and "head" not in point.axes:
                raise HookError(f"{name} has no head axis: patch all of it, without heads.")
            n_heads = point.size("head")
            outside = [h for h in self.heads or () if n_heads is not None and not 0 <= h < n_heads]
            if outside:
                raise HookError(f"Heads of {name} are 0 to {(n_heads or 0) - 1}, got {outside[0]}.")
        beyond = [p for p in self.positions or () if not -length <= p < length]
        if beyond:
            raise HookError(f"Position {beyond[0]} is outside the shortest prompt, which has {length} tokens.")

    def first(self, length: int) -> int:
        """The first position that is put in, from 0."""
        return 0 if self.positions is None else min(p % length for p in self.positions)

    def mask(self, point: HookPoint, shape: Sequence[int]) -> np.ndarray:
        """Which entries of a value are put in, of bool, with its axes; 1 entry where an axis has no limit."""
        mask = np.ones([1] * len(shape), dtype=bool)
        for axis, name in enumerate(point.axes):
            chosen = self.heads if name == "head" else self.positions if name in POSITION_AXES else None
            if chosen is not None:
                here = np.zeros(shape[axis], dtype=bool)
                here[list(chosen)] = True
                mask = mask & here.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        return mask


class PatchedRuns:
    """One batch of prompts, run with cells put in from the runs of other prompts.

    Args:
        model: what is run.
        tokens: [batch, pos].
        source: [batch, pos], what is put in is from their runs.
        cells: all that will be put in, checked.
        rows: rows of one forward pass at most; None for as many as are fast and small.
        passes: counts those that come before the cells', PASSES at most; what is not needed it takes back.
    """

    PASSES = 4
    """Both runs are captured; whether a run can continue from its middle takes it in halves, and as a whole."""

    def __init__(
        self,
        model: HookedModel,
        tokens: np.ndarray,
        source: np.ndarray,
        cells: Sequence[Cell],
        rows: int | None = None,
        passes: Passes | None = None,
    ) -> None:
        passes = passes or Passes()
        self.model = model
        self.tokens = tokens
        self.cells = list(cells)
        self.rows = rows
        points = [name for name in model.hook_points if any(name in cell.hook_points for cell in self.cells)]
        self._given = captured(model, source, points)
        passes.passed()
        starts = self._starts()
        self._own = captured(model, tokens, [*dict.fromkeys([*points, *starts.values()])])
        passes.passed()
        # A layer that runs several times comes back to what lies before it.
        self._starts_at = {layer: name for layer, name in starts.items() if set(self._own[name]) == {0}}
        is_later = any(cell.first(tokens.shape[1]) for cell in self.cells)
        kv_cache = make_prompt_cache(model.model) if is_later else []
        self._before = None
        if len(kv_cache) == model.cfg.n_layers and all(type(each) is KVCache for each in kv_cache):
            self._before = self._plain_run(kv_cache, passes)
        else:
            passes.expect(-2)

    @property
    def can_continue(self) -> bool:
        """Whether runs begin at the first position that they change; else all begin at the first of all."""
        return self._before is not None

    def _plain_run(self, kv_cache: "list[KVCache]", passes: Passes) -> "tuple[list[KVCache], mx.array] | None":
        """The KV caches and the logits of the plain run; None where a run cannot continue from its middle."""
        # Some models of mlx-lm attend otherwise with a KV cache than without, or to tokens that come later.
        middle = self.tokens.shape[1] // 2
        halves = [
            logits_of(self.model, part, kv_cache=kv_cache)
            for part in (self.tokens[:, :middle], self.tokens[:, middle:])
        ]
        mx.eval(halves, [[each.keys, each.values] for each in kv_cache])
        passes.passed()
        logits = logits_of(self.model, self.tokens)
        is_same = _are_close(mx.concatenate(halves, axis=1), logits)
        mx.eval(is_same, logits)
        passes.passed()
        return (kv_cache, logits) if is_same.item() else None

    def _starts(self) -> dict[int, str]:
        """Where the stream enters the layers in which cells lie, by layer, if it can be replaced there."""
        found: dict[int, str] = {}
        for layer in sorted({self.model.hook_points[name].layer or 0 for name in self._given}):
            point = self.model.hook_points.get(block_point("resid_pre", layer).name) if layer else None
            if point is None or point.axes[:1] != ("batch",):
                continue
            try:
                self.model.architecture.check_editable(point)
            except HookError:
                # Then the pass begins at the beginning.
                continue
            found[layer] = point.name
        return found

    def _begins(self, cell: Cell) -> str:
        """The first of a cell's hook points in forward order."""
        return next(name for name in self._given if name in cell.hook_points)

    def logits(self) -> Iterator[tuple[list[int], mx.array | None]]:
        """Indices of cells and their logits [cells * batch, pos, d_vocab], cell after cell.

        None stands for cells that leave the run as it is. Every cell comes once, in no order that is told.
        """
        changes = self._changes()
        unchanged = [i for i, change in enumerate(changes) if not change]
        if unchanged:
            yield unchanged, None
        for chosen, first in self._passes([i for i, change in enumerate(changes) if change]):
            yield chosen, self._run([self.cells[i] for i in chosen], first)

    def _passes(self, indices: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """Cells that run together, which begin at one hook point, and the first position that they change."""
        n, length = self.tokens.shape
        firsts = [cell.first(length) if self.can_continue else 0 for cell in self.cells]
        begins = [self._begins(cell) for cell in self.cells]
        order = list(self._given)
        waiting = sorted(indices, key=lambda i: (order.index(begins[i]), firsts[i], i))
        while waiting:
            first = firsts[waiting[0]]
            same = [i for i in waiting if begins[i] == begins[waiting[0]]]
            chosen = same[: max(1, self._most_rows(length - first) // n)]
            waiting = waiting[len(chosen) :]
            yield chosen, first

    def _most_rows(self, length: int) -> int:
        """How many rows of so many tokens run at once."""
        cfg, n_keys = self.model.cfg, self.tokens.shape[1]
        widest = max(cfg.d_vocab, cfg.d_mlp or 0, cfg.d_model, n_keys * (cfg.n_heads or 0))
        return min(self.rows or -(-_ENOUGH // length), max(1, _MOST_NUMBERS // (n_keys * widest)))

    def _run(self, cells: Sequence[Cell], first: int) -> mx.array:
        """Logits [cells * batch, pos, d_vocab] of one pass, which begins at a position."""
        n, hooks = len(cells), self._hooks(cells, first)
        tokens = np.tile(self.tokens[:, first:], (n, 1))
        if self._before is None or first == 0:
            return logits_of(self.model, tokens, hooks=hooks)
        kv_cache, logits = self._before
        own = [_copies(each, first, n) for each in kv_cache]
        return mx.concatenate(
            [mx.tile(logits[:, :first], (n, 1, 1)), logits_of(self.model, tokens, hooks=hooks, kv_cache=own)], axis=1
        )

    def _changes(self) -> list[bool]:
        """Of each cell whether it puts in anything else than what is there."""
        points = self.model.hook_points
        differ: dict[str, np.ndarray] = {}
        for name, passes in self._given.items():
            where = mx.array(False)
            for i, value in passes.items():
                where = where | (
                    value != self._own[name][i] if i in self._own[name] else mx.ones(value.shape, mx.bool_)
                )
            # Of other axes a cell has all.
            rest = [i for i, axis in enumerate(points[name].axes) if axis not in ("head", *POSITION_AXES)]
            differ[name] = np.array(where.any(axis=rest, keepdims=True))
        return [
            any(bool((differ[name] & cell.mask(points[name], differ[name].shape)).any()) for name in cell.hook_points)
            for cell in self.cells
        ]

    def _hooks(self, cells: Sequence[Cell], first: int) -> list[Hook]:
        """What puts cells in, each in its own rows, from a position on."""
        run, points = self.model.instrument.run, self.model.hook_points
        made = []
        begins = self._begins(cells[0])
        start = self._starts_at.get(points[begins].layer or 0)
        if start is not None:
            plain = self._rows(start, len(cells), first)
            made.append(Hook(points[start], lambda value, _: plain))
        for name, passes in self._given.items():
            if any(name in cell.hook_points for cell in cells):
                given = {i: _from(value, points[name], first) for i, value in passes.items()}
                masks = self._masks(cells, name)
                # Behind the axis of cells stand the value's own.
                at = points[name].position_axis
                if at is not None and masks.shape[at + 1] > 1:
                    masks = mx.take(masks, mx.arange(first, masks.shape[at + 1]), axis=at + 1)
                is_first = name == begins and set(self._own[name]) == {0}
                own = self._rows(name, len(cells), first) if is_first else None
                made.append(Hook(points[name], _Put(run, given, masks, own)))
        return made

    def _rows(self, name: str, n: int, first: int) -> mx.array:
        """What the plain run has at a hook point from a position on, n times in the batch."""
        plain = _from(self._own[name][0], self.model.hook_points[name], first)
        return mx.tile(plain, (n, *[1] * (plain.ndim - 1)))

    def _masks(self, cells: Sequence[Cell], name: str) -> mx.array:
        """Which entries are put in, [cell, 1, ...]; 1 entry where an axis has no limit."""
        value = next(iter(self._given[name].values()))
        nothing = np.zeros([1] * value.ndim, dtype=bool)
        masks = [
            cell.mask(self.model.hook_points[name], value.shape) if name in cell.hook_points else nothing
            for cell in cells
        ]
        return mx.array(np.stack(np.broadcast_arrays(*masks)))


def _are_close(found: mx.array, logits: mx.array) -> mx.array:
    """Whether logits are the same but for rounding; tokens that a model never says have -inf in both."""
    allowed = max(_CLOSE, _ROUNDINGS * float(mx.finfo(logits.dtype).eps))
    largest = mx.where(mx.isfinite(logits), mx.abs(logits), 0.0).max()
    return mx.where(found == logits, 0.0, mx.abs(found - logits)).max() <= allowed * largest


def _from(value: mx.array, point: HookPoint, first: int) -> mx.array:
    """A value from a position on."""
    axis = point.position_axis
    return value if axis is None or first == 0 else mx.take(value, mx.arange(first, value.shape[axis]), axis=axis)


def _copies(kv_cache: KVCache, length: int, n: int) -> KVCache:
    """A KV cache with the first positions of another one, n times in the batch."""
    made = KVCache()
    made.keys, made.values = (mx.tile(part[..., :length, :], (n, 1, 1, 1)) for part in (kv_cache.keys, kv_cache.values))
    # Room for what comes, and no more.
    made.offset, made.step = length, 1
    return made


class _Put:
    """The hook function that puts each cell's part of the source in the rows of that cell.

    ``own`` is what the rows have there otherwise, where that is known: then nothing before it is computed.
    """

    def __init__(self, run: Run, given: Mapping[int, mx.array], masks: mx.array, own: mx.array | None) -> None:
        self.run = run
        self.given = given
        self.masks = masks
        self.own = own

    def __call__(self, value: mx.array, point: HookPoint) -> mx.array | None:
        given = self.given.get(self.run.pass_index)
        if given is None:
            return None
        own = value if self.own is None else self.own
        rows = own.reshape(self.masks.shape[0], -1, *value.shape[1:])
        return mx.where(self.masks, given[None], rows).reshape(value.shape)
