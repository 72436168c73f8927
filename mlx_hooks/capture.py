"""One capture: what it keeps, how many bytes that takes, and the forward passes that fill it.

    1. A selection says which hook points, positions and heads are kept. Nothing else stays alive.
    2. The tokens run at once or in chunks with a KV cache, to the end or up to a block.
    3. Each pass's records are evaluated with it, so that no graph piles up.

MLX builds a graph before it computes anything, so the same passes, not evaluated, say the size of every record.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from .activations import ActivationCache, CapturedActivation
from .errors import HookError
from .hook_points import HookPoint, block_point, outer_point
from .hooks import HeadIndices, HeadSelection, Hook, Positions, Recorder, select_positions
from .instrument import Instrument, kv_offset, remember_offset
from .interventions import InterventionSession, Reach
from .manager import CapturePlan
from .reductions import finished, is_begun
from .storage.spill import StoredActivation

LOGITS = ("all", "last", "none")


@dataclass(frozen=True)
class CaptureEstimate:
    """The bytes that a capture will hold, by hook point: exactly ``cache.nbytes`` of the run.

    >>> print(model.estimate_capture((1, 1024), ["blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern"]))
    69.2 MB at 8 hook points
      blocks.{i}.hook_resid_post    4 x 524.3 kB
      blocks.{i}.attn.hook_pattern  4 x 16.8 MB
    """

    by_point: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of all hook points."""
        return sum(self.by_point.values())

    def __str__(self) -> str:
        rows: dict[tuple[str, int], int] = {}
        for name, nbytes in self.by_point.items():
            key = (re.sub(r"^blocks\.\d+", "blocks.{i}", name), nbytes)
            rows[key] = rows.get(key, 0) + 1
        width = max(len(name) for name, _ in rows)
        lines = [f"  {name:{width}}  {count} x {readable(nbytes)}" for (name, nbytes), count in rows.items()]
        points = f"{len(self.by_point)} hook point{'s' if len(self.by_point) != 1 else ''}"
        return "\n".join([f"{readable(self.nbytes)} at {points}", *lines])


def readable(nbytes: int) -> str:
    """Bytes for a reader: 1234567 -> "1.2 MB"."""
    size, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 999.95:
            break
        size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "B" else f"{nbytes} B"


class _Stopped(Exception):
    """Leaves the forward pass of ``capture`` with the residual stream that enters the block where it stops."""

    def __init__(self, capture: "CaptureRun", residual: mx.array) -> None:
        self.capture = capture
        self.residual = residual


class CaptureRun:
    """Tokens that run through a model while a selection of its activations is kept.

    Args:
        instrument: the model's.
        inputs: token ids [batch, pos].
        points: the hook points to keep, in forward order.
        positions: absolute positions to keep.
        heads: query heads to keep at points with a head axis.
        kv_cache: mlx-lm's prompt cache, which the run continues.
        chunk: tokens per forward pass; None for all at once.
        stop_at_layer: leave each pass before this block; ``n_layers`` leaves before the last norm.

    Raises:
        HookError: when the selection cannot be kept as asked.
    """

    def __init__(
        self,
        instrument: Instrument,
        inputs: mx.array,
        points: Sequence[HookPoint],
        *,
        positions: Positions = None,
        heads: HeadIndices = None,
        kv_cache: list | None = None,
        chunk: int | None = None,
        stop_at_layer: int | None = None,
    ) -> None:
        self.instrument = instrument
        self.inputs = inputs
        self.points = list(points)
        self.positions = positions
        self.kv_cache = kv_cache
        self.stop_at_layer = stop_at_layer
        self.chunk = chunk
        self.heads: dict[HookPoint, HeadSelection] = {}
        if heads is not None:
            for point in self.points:
                if "head" in point.axes:
                    n_heads = instrument.architecture.n_query_heads(point.layer)
                    self.heads[point] = HeadSelection.of(heads, n_heads)
            if not any("head" in point.axes for point in self.points):
                raise HookError(f"heads selects nothing: {_some(self.points)} have no head axis.")
        if stop_at_layer is not None and kv_cache is not None:
            raise HookError("stop_at_layer would leave the tokens out of later layers' KV caches: leave kv_cache out.")
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
            raise HookError(f"chunk is None or a whole number of tokens from 1 up, got {chunk!r}.")
        if chunk is not None and stop_at_layer == 0:
            raise HookError("stop_at_layer=0 runs the embedding only, which knows no KV cache: leave chunk out.")

    @property
    def reach(self) -> Reach:
        """The positions that the run comes to."""
        start, (batch, length) = kv_offset(self.kv_cache), self.inputs.shape
        return Reach(start, start + length, start + length, batch=batch)

    def estimate(self) -> CaptureEstimate:
        """What ``run`` will hold. Builds the passes without computing them, and leaves the KV cache alone."""
        sizes = {point.name: 0 for point in self.points}

        def count(record: CapturedActivation) -> None:
            sizes[record.hook_point.name] += record.nbytes

        for _ in self._passes(count, copy.deepcopy(self.kv_cache), alone=True):
            continue
        return CaptureEstimate(sizes)

    def run(
        self,
        store: Callable[[CapturedActivation], CapturedActivation] | None = None,
        session: InterventionSession | None = None,
        *,
        also: tuple[CapturePlan, Callable[[CapturedActivation], None]] | None = None,
        logits: str = "all",
        alone: bool = False,
    ) -> tuple[mx.array, ActivationCache]:
        """Run the model.

        Args:
            store: answers the record to hold in place of each record.
            session: the interventions of the run; the activation cache gets their receipts.
            also: other captures of the run, and where their records go.
            logits: the positions to answer: "all", "last" or "none".
            alone: leave the hooks of outer blocks out.

        Returns:
            the model's output, or the residual stream where the run stops, [batch, positions, features]; and the
            activation cache. Both are evaluated.
        """
        cache = ActivationCache()
        fresh: list[mx.array] = []

        def keep(record: CapturedActivation) -> None:
            record = store(record) if store else record
            cache.add(record)
            if not isinstance(record, StoredActivation):
                fresh.append(record.value)

        begun: list[CapturedActivation] = []

        def keep_other(record: CapturedActivation) -> None:
            assert also is not None
            fresh.append(record.value)
            if is_begun(record):
                begun.append(record)
            else:
                also[1](record)

        hooks = list(session.hooks) if session is not None else []
        if also is not None:
            whole = self.kv_cache is None
            hooks = [*hooks, *also[0].hooks(self.instrument.run, keep_other, self.reach, whole)]
        outputs: list[mx.array] = []
        for output, kv_cache, is_last in self._passes(keep, self.kv_cache, hooks, alone=alone):
            if logits == "all" or (logits == "last" and is_last):
                outputs.append(output if logits == "all" else mx.contiguous(output[:, -1:]))
            elif is_last:
                outputs.append(mx.zeros((output.shape[0], 0, *output.shape[2:]), output.dtype))
            if is_last and also is not None:
                # What chunks keep for a reduction is one record: that of the whole run.
                for record in finished(begun):
                    also[1](record)
                    fresh.append(record.value)
            mx.eval(outputs, fresh, session.arrays() if session else [], _states(kv_cache))
            fresh.clear()
            if session is not None:
                session.keep(session.take())
            if self.chunk is not None:
                # As mlx-lm does between chunks: buffers of this one's sizes will not be asked for again.
                mx.clear_cache()
        if session is not None:
            cache.interventions = session.close()
        silent = [point for point in self.points if point.name not in cache.records]
        if silent:
            raise HookError(f"Hooks on {_some(silent)} did not fire: the model did not call their modules.")
        # Hooks fire in the order of computation: names in forward order read better.
        cache.records = {point.name: cache.records[point.name] for point in self.points}
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1), cache

    def _passes(
        self,
        keep: Callable[[CapturedActivation], None],
        kv_cache: list | None,
        hooks: Sequence[Hook] = (),
        *,
        alone: bool = False,
    ) -> Iterator[tuple[mx.array, list | None, bool]]:
        """Each forward pass's output, the KV cache, and whether the pass is the last; nothing is evaluated."""
        length = self.inputs.shape[1]
        size = length if self.chunk is None else self.chunk
        if self.chunk is not None and kv_cache is None:
            kv_cache = make_prompt_cache(self.instrument.architecture.model)
        start = kv_offset(kv_cache)
        wanted = self._wanted(start, length)
        for begin in range(0, length, size):
            positions = wanted
            if self.chunk is not None and isinstance(wanted, list):
                positions = [p for p in wanted if start + begin <= p < start + begin + size]
            recorders: list[Hook] = []
            if positions is None or self.chunk is None or positions:
                run = self.instrument.run
                recorders = [Recorder(run, keep, positions, self.heads.get(p)).hook(p) for p in self.points]
            due = [hook for hook in hooks if hook.is_due(start + begin, min(size, length - begin))]
            tokens = self.inputs[:, begin : begin + size]
            output = self._forward(tokens, [*due, *recorders], kv_cache, alone, begins=start + begin)
            remember_offset(kv_cache, start + begin + tokens.shape[1])
            yield output, kv_cache, begin + size >= length

    def _wanted(self, start: int, length: int) -> Positions:
        """The positions asked for; in chunks, as absolute numbers in ascending order."""
        if self.positions is None or self.chunk is None:
            return self.positions
        return sorted(start + row for row in select_positions(self.positions, start, length))

    def _forward(
        self, tokens: mx.array, hooks: list[Hook], kv_cache: list | None, alone: bool, begins: int
    ) -> mx.array:
        model = self.instrument.architecture.model
        if self.stop_at_layer == len(self.instrument.architecture.blocks):
            return self._forward_to_the_end(tokens, hooks, kv_cache, alone, begins)
        if self.stop_at_layer is not None:
            hooks = [*hooks, *self._stop(self.stop_at_layer)]
        try:
            with self.instrument.attached(self.instrument.plan(hooks), alone=alone, begins=begins):
                output = model(tokens) if kv_cache is None else model(tokens, cache=kv_cache)
                output = output[0] if isinstance(output, tuple) else output
        except _Stopped as stopped:
            if stopped.capture is not self:
                raise
            return stopped.residual
        if self.stop_at_layer is not None:
            raise HookError(f"The run did not stop at layer {self.stop_at_layer}: a hook broke off a pass of its own.")
        return output

    def _forward_to_the_end(
        self, tokens: mx.array, hooks: list[Hook], kv_cache: list | None, alone: bool, begins: int
    ) -> mx.array:
        """The stream that leaves the last block, in its last pass; nobody asks for the logits, so MLX computes none."""
        last: list[mx.array] = []
        point = self.instrument.architecture.points[
            block_point("resid_post", len(self.instrument.architecture.blocks) - 1).name
        ]
        hooks = [*hooks, Hook(point, lambda value, _: last.append(value), reads=True)]
        model = self.instrument.architecture.model
        with self.instrument.attached(self.instrument.plan(hooks), alone=alone, begins=begins):
            model(tokens) if kv_cache is None else model(tokens, cache=kv_cache)
        return last[-1]

    def _stop(self, layer: int) -> list[Hook]:
        """The hook that leaves the pass, and one that tells it from passes that other hooks run in between.

        It reads, so it comes after every edit, and it is the last to read.
        """
        passes = 0

        def enter(tokens: mx.array, point: HookPoint) -> None:
            nonlocal passes
            passes += 1

        def leave(residual: mx.array, point: HookPoint) -> None:
            nonlocal passes
            if passes == 1:
                raise _Stopped(self, residual)
            passes -= 1

        point = self.instrument.architecture.points[block_point("resid_pre", layer).name]
        return [Hook(outer_point("embed_in"), enter, reads=True), Hook(point, leave, reads=True)]


def _states(kv_cache: list | None) -> list:
    """What the KV caches hold; a cache that no layer has used yet holds nothing."""
    return [entry.state for entry in kv_cache or [] if getattr(entry, "keys", entry) is not None]


def resolve_stop(stop_at_layer: int, n_layers: int) -> int:
    """The block before which to stop, from 0 to ``n_layers``; negative numbers count from the end: -1 -> the last.

    Raises:
        HookError: for another number.
    """
    if isinstance(stop_at_layer, bool) or not isinstance(stop_at_layer, int):
        raise HookError(f"stop_at_layer is None or a whole number, got {stop_at_layer!r}.")
    if not -n_layers <= stop_at_layer <= n_layers:
        raise HookError(f"stop_at_layer is {-n_layers} to {n_layers}, the number of layers, got {stop_at_layer}.")
    return stop_at_layer + n_layers if stop_at_layer < 0 else stop_at_layer


def before_stop(points: dict[str, HookPoint], stop_at_layer: int) -> dict[str, HookPoint]:
    """Of a model's hook points, in forward order, those before a block; the number of layers means after the last."""
    found: dict[str, HookPoint] = {}
    in_blocks = False
    for name, point in points.items():
        if in_blocks if point.layer is None else point.layer >= stop_at_layer:
            break
        in_blocks = point.layer is not None
        found[name] = point
    return found


def check_logits(logits: str | None, chunk: int | None) -> str:
    """Which positions to answer; by default all, in chunks the last.

    Raises:
        HookError: for another word.
    """
    if logits is None:
        return "all" if chunk is None else "last"
    if logits not in LOGITS:
        raise HookError(f"logits is None, 'all', 'last' or 'none', got {logits!r}.")
    return logits


def check_budget(max_bytes: int | None) -> None:
    """Raises HookError for a budget that is no number of bytes."""
    if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0):
        raise HookError(f"max_bytes is None or a whole number of bytes from 0 up, got {max_bytes!r}.")


def _some(points: Sequence[HookPoint]) -> str:
    return ", ".join(point.name for point in points[:3]) + (", ..." if len(points) > 3 else "")
