"""Runs in which any edges of the graph carry something else than their source wrote: exact, many sets in one pass.

An input reads the stream of its own run, plus, for each edge that is replaced, what its source would have written
instead less what it wrote: no other input notices. So everything that follows from the replaced edges is computed anew,
and what does not follow from them is as it was. The replacement is what the source writes on the corrupted prompt, on
another example, its mean, or nothing. Source: Conmy et al., "Towards Automated Circuit Discovery for Mechanistic
Interpretability" (2023); Goldowsky-Dill et al., "Localizing Model Behavior with Path Patching" (2023).
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any, Literal, get_args

import mlx.core as mx
import numpy as np
from pydantic import Field

from ...capture import CaptureRun
from ...errors import HookError
from ...hook_points import HookPoint
from ...hooks import Hook, HookFunction
from ...model import HookedModel
from ...options import options
from ..ablation import Count, MeanOver, check_means, partners_of
from ..components import logits_of
from ..eval_data import BACKWARD, EvalBatch, EvalData, eval_data_of, rows_at_once
from ..eval_data import FIELD as DATA_FIELD
from ..progress import Passes, Progress
from .graph import Edge, Entry, ModelGraph, Reading, graph_of
from .metrics import Metric, MetricFunction, PlainRun, metric_of

EdgeAblation = Literal["corrupted", "resample", "mean", "zero"]
ABLATIONS: dict[str, str] = {
    "corrupted": "what the source writes on the example's corrupted partner",
    "resample": "what the source writes at the same positions of another example, drawn once for each",
    "mean": "the mean of what the source writes over all examples",
    "zero": "zeros",
}
"""What an edge carries that is ablated; of the mean see :func:`replaced_by`."""
_BYTES_AT_ONCE = 2**29
"""Of what the nodes write, in one pass."""

Level = Literal["plain", "ablated", "corrupted"]
"""What the metric is compared with: of the model as it is, with all edges replaced, of the corrupted prompts."""
LEVELS: tuple[Level, ...] = get_args(Level)

Written = list[mx.array] | None
"""What the nodes write, by writer, [node, batch, pos, d_model]; None for zeros."""


def replaced_by(ablation: str, mean_over: MeanOver | None = None) -> str:
    """What an ablated edge carries, in words."""
    over = {"position": ", position by position", "all": " and positions", None: ""}
    return ABLATIONS[ablation] + (over[mean_over] if ablation == "mean" else "")


class IndexedSets:
    """Sets of edges by their indices: masks are made when they are asked for.

        IndexedSets(graph, np.arange(len(graph.edges))[:, None])[:8]        # of one edge each: [8, input, node]

    Args:
        graph: of the model.
        sets: where the edges of each set stand among the graph's.
    """

    def __init__(self, graph: ModelGraph, sets: Sequence[np.ndarray] | np.ndarray) -> None:
        self.graph, self.sets = graph, sets

    def __len__(self) -> int:
        return len(self.sets)

    def __getitem__(self, at: slice) -> np.ndarray:
        """Masks [set, input, node] of bool."""
        some = self.sets[at]
        found = np.zeros((len(some), len(self.graph.inputs), len(self.graph.nodes)), dtype=bool)
        for mask, edges in zip(found, some, strict=True):
            mask[self.graph.edge_rows[edges], self.graph.edge_columns[edges]] = True
        return found


Masks = np.ndarray | IndexedSets | Iterable[np.ndarray]
"""Sets of edges; see :meth:`EdgeRuns.masked`."""


def _stacked(masks: Iterable[np.ndarray]) -> np.ndarray:
    """Raises HookError for what is no iterable of arrays of one shape."""
    is_list = isinstance(masks, Iterable) and getattr(masks, "ndim", 1) > 0
    found = [np.asarray(mask) for mask in masks] if is_list else []
    if not is_list or any(mask.ndim != 2 or mask.shape != found[0].shape for mask in found):
        raise HookError(
            f"Masks are an array [set, input, node] or a list of arrays [input, node], got {type(masks).__name__}"
            f"{f' of {list(found[0].shape)}' if found else ''}.",
            field="masks",
        )
    return np.stack(found) if found else np.zeros((0, 0, 0), dtype=bool)


def _replace_something(masks: np.ndarray | IndexedSets) -> bool:
    return bool(masks.any()) if isinstance(masks, np.ndarray) else any(len(each) for each in masks.sets)


@options
class _Keywords:
    """Those of EdgeRuns that are checked by their types alone."""

    batch_size: Count
    mean_over: MeanOver
    seed: Annotated[int, Field(ge=0)]
    max_bytes: Count


class EdgeRuns:
    """A model, data and a metric: runs with any sets of edges replaced.

        runs = EdgeRuns(model, [{"clean": ..., "corrupted": ..., "answer": " Mary", "wrong": " John"}, ...])
        runs.plain                                          # [example], the metric of the model as it is
        runs.without([["L1H0->L3H2<q>"], ["embed->logits"]])   # [set, example]

    Args:
        model: what is run.
        eval_data: see :func:`eval_data_of`.
        ablation: what a replaced edge carries, a key of ABLATIONS; None for the corrupted prompts' where there are
            some, else the mean.
        metric: see :func:`metric_of`.
        batch_size: examples of one length that run together, fewer of long ones and where ``max_bytes`` says so.
        mean_over: "position" takes a mean at each position, over the examples that have it; "all" one over all.
        seed: of who is whose partner in resampling.
        max_bytes: how much is held at once, about: it says how many sets, and how many points of EAP-IG's way, run
            together. One set of a batch always runs, and one backward pass, which holds more: a smaller ``batch_size``
            makes them smaller.

    Raises:
        HookError: for data, a metric, an ablation or a number that do not fit, and a model whose edges cannot be told.
    """

    def __init__(
        self,
        model: HookedModel,
        eval_data: Any,
        *,
        ablation: EdgeAblation | None = None,
        metric: str | MetricFunction | Metric | None = None,
        batch_size: int = 16,
        mean_over: MeanOver = "position",
        seed: int = 0,
        max_bytes: int = _BYTES_AT_ONCE,
    ) -> None:
        chosen = _Keywords(batch_size=batch_size, mean_over=mean_over, seed=seed, max_bytes=max_bytes)
        self.model = model
        self.data: EvalData = eval_data_of(model, eval_data)
        self.metric = metric_of(metric, self.data)
        self.ablation: EdgeAblation = _ablation_of(ablation, self.data)
        self.batch_size, self.max_bytes = chosen.batch_size, chosen.max_bytes
        self.mean_over, self.seed = chosen.mean_over, chosen.seed
        self.graph: ModelGraph = graph_of(model)
        # Gradients are taken of the same batches.
        self.batches = list(self.data.batches(max(1, min(batch_size, self._examples_at_once())), BACKWARD))
        self._partners = partners_of(self.data, seed) if self.ablation == "resample" else []
        if any(partner is None for partner in self._partners):
            raise HookError(
                "Resampling takes activations from another example that is as long: give several of each length, or "
                "another ablation.",
                field=DATA_FIELD,
            )
        if self.ablation == "mean" and self.mean_over == "position":
            check_means(self.data)
        self._plain_runs: dict[int, PlainRun | None] = {}
        self._levels: dict[Level, np.ndarray] = {}
        self._means: list[mx.array] | None = None

    def _examples_at_once(self) -> int:
        """How many examples' nodes may be held."""
        longest = max(len(example.tokens) for example in self.data.examples)
        return self.max_bytes // (4 * len(self.graph.nodes) * longest * self.model.cfg.d_model)

    # What the model does as it is, and with all edges replaced.

    @property
    def plain(self) -> np.ndarray:
        """The metric of the model as it is, [example] in float64."""
        return self.level("plain")

    @property
    def ablated(self) -> np.ndarray:
        """The metric with all edges replaced, [example] in float64."""
        return self.level("ablated")

    @property
    def corrupted(self) -> np.ndarray | None:
        """The metric of the corrupted prompts, [example] in float64; None without them."""
        return self.level("corrupted") if self.data.has_corrupted else None

    def level(self, name: Level, passes: Passes | None = None) -> np.ndarray:
        """One of these, found once.

        Args:
            name: "corrupted" only where there are such prompts.
            passes: counts those that it takes; see ``n_passes``.
        """
        if name not in self._levels:
            passes = passes or Passes()
            if name == "corrupted":
                self._levels[name] = self._of_corrupted(passes)
            else:
                self._levels[name] = self.without([[] if name == "plain" else self.graph.edges], passes)[0]
        return self._levels[name]

    def _of_corrupted(self, passes: Passes) -> np.ndarray:
        found = np.zeros(len(self.data))
        for i, batch in enumerate(self.batches):
            assert batch.corrupted is not None
            plain = self.plain_run(i, passes)
            found[batch.indices] = self.metric.numbers(logits_of(self.model, batch.corrupted), batch, plain)
            passes.passed()
        return found

    def plain_run(self, i: int, passes: Passes | None = None) -> PlainRun | None:
        """What is kept of batch i as it is, for a metric that needs it; else None."""
        if self.metric.needs_plain and i not in self._plain_runs:
            batch = self.batches[i]
            self._plain_runs[i] = self.metric.plain_run(logits_of(self.model, batch.tokens), batch)
            if passes is not None:
                passes.passed()
        return self._plain_runs.get(i)

    def n_passes(self, *sweeps: int, levels: Iterable[Level] = ()) -> int:
        """How many passes are to be made: of levels that are not known yet, and of sweeps.

        Args:
            sweeps: of how many sets each, some of which replace something.
            levels: "corrupted" counts where there are such prompts.
        """
        due = [each for each in levels if each not in self._levels]
        if not self.data.has_corrupted:
            due = [each for each in due if each != "corrupted"]
        n_sets = [n for n in sweeps if n]
        return self._n_passes([*n_sets, *(1 for _ in due)], len(n_sets) + ("ablated" in due))

    def _n_passes(self, sweeps: Sequence[int], n_replacing: int) -> int:
        """The same of sweeps of so many sets, of which so many sweeps take replacements."""
        n_batches = len(self.batches)
        found = sum(-(-n // self.sets_at_once(batch)) for batch in self.batches for n in sweeps)
        if sweeps and self.metric.needs_plain:
            found += n_batches - len(self._plain_runs)
        return found + self.n_replacing(n_replacing)

    def n_replacing(self, times: int = 1) -> int:
        """How many passes ``replacements`` takes for all batches, so many times."""
        if self.ablation == "mean":
            return len(self.batches) if times and self._means is None else 0
        return 0 if self.ablation == "zero" else times * len(self.batches)

    # Runs with edges replaced.

    def without(self, sets: Sequence[Collection[str | Edge]], progress: Progress | Passes = None) -> np.ndarray:
        """The metric with the edges of each set replaced.

        Args:
            sets: edges, or their names; an empty set is the model as it is.
            progress: called with the passes that are done, and how many there are; or what counts them.

        Returns:
            [set, example] in float64.

        Raises:
            HookError: for an unknown edge, and a metric that is not finite.
        """
        if isinstance(sets, str) or not isinstance(sets, Iterable):
            raise HookError(f"sets is a list of lists of edges, got {sets!r:.100}.", field="sets")
        return self.masked(IndexedSets(self.graph, [self.graph.indices_of(each) for each in sets]), progress)

    def mask(self, edges: Collection[str | Edge]) -> np.ndarray:
        """Which edges are in a set, [input, node] of bool."""
        return IndexedSets(self.graph, [self.graph.indices_of(edges)])[:1][0]

    def masked(self, masks: "Masks", progress: Progress | Passes = None) -> np.ndarray:
        """The same for sets as ``mask`` gives them.

        Args:
            masks: which edges are replaced, [set, input, node] of bool; an iterable of [input, node]; or
                :class:`IndexedSets`, of which only those masks are made that run together.
            progress: as in ``without``.

        Raises:
            HookError: for masks of another shape or type, and a metric that is not finite.
        """
        if not isinstance(masks, IndexedSets) and not (isinstance(masks, np.ndarray) and masks.ndim == 3):
            masks = _stacked(masks)
        found = np.zeros((len(masks), len(self.data)))
        at_once = [self.sets_at_once(batch) for batch in self.batches]
        passes = progress if isinstance(progress, Passes) else Passes(progress)
        if passes is not progress:
            passes.expect(self._n_passes([len(masks)], int(_replace_something(masks))))
        for i, batch in enumerate(self.batches):
            others: Written = None
            for start in range(0, len(masks), at_once[i]):
                some = self._checked(masks[start : start + at_once[i]])
                if others is None and some.any():
                    others = self.replacements(batch, passes)
                plain = self.plain_run(i, passes)
                numbers = self.metric.numbers(self.logits(batch, others, some), batch, plain)
                found[start : start + len(some), batch.indices] = numbers.reshape(len(some), -1)
                passes.passed()
        return found

    def _checked(self, masks: np.ndarray) -> np.ndarray:
        shape = (len(self.graph.inputs), len(self.graph.nodes))
        if masks.shape[1:] != shape or masks.dtype != bool:
            raise HookError(
                f"Masks are bool of [set, {shape[0]} inputs, {shape[1]} nodes], got {masks.dtype} of "
                f"{list(masks.shape)}.",
                field="masks",
            )
        return masks

    def sets_at_once(self, batch: EvalBatch) -> int:
        """How many copies of a batch run in one pass."""
        cfg, graph = self.model.cfg, self.graph
        widest = max(len(reading.entries[0].inputs) for reading in graph.readings)
        numbers = batch.tokens.size * ((len(graph.nodes) + 2 * widest) * cfg.d_model + cfg.d_vocab)
        return max(1, min(self.max_bytes // (4 * numbers), rows_at_once(batch.tokens.size)))

    def logits(self, batch: EvalBatch, others: Written, masks: np.ndarray) -> mx.array:
        """Logits [set * batch, pos, d_vocab], not evaluated; one set's rows after the other's.

        Args:
            others: what the nodes write instead, as ``replacements`` gives it.
            masks: which edges are replaced, [set, input, node].
        """
        run = _Pass(self.graph, others, masks)
        instrument = self.model.instrument
        with instrument.attached(instrument.plan(run.hooks())):
            return logits_of(self.model, np.concatenate([batch.tokens] * len(masks)))

    # What replaced edges carry.

    def written(self, tokens: np.ndarray) -> list[mx.array]:
        """What the nodes write for tokens [batch, pos]: by writer, [node, batch, pos, d_model] in float32."""
        points = [writer.point for writer in self.graph.writers]
        run = CaptureRun(self.model.instrument, mx.array(tokens), points)
        records = run.run(logits="none")[1].records
        found = [writer.split(records[writer.point.name][0].value) for writer in self.graph.writers]
        mx.eval(found)
        return found

    def replacements(self, batch: EvalBatch, passes: Passes | None = None) -> Written:
        """What the nodes write instead for a batch, by writer, [node, batch, pos, d_model]; None for zeros.

        Args:
            passes: counts those that it takes: for the first mean all batches run.
        """
        passes = passes or Passes()
        if self.ablation == "zero":
            return None
        n_examples, length = batch.tokens.shape
        if self.ablation == "mean":
            if self._means is None:
                self._means = self._find_means(passes)
            return [mx.repeat(mean[:, None, :length], n_examples, axis=1) for mean in self._means]
        tokens = batch.corrupted
        if self.ablation == "resample":
            # Attention looks back only: what stands behind changes nothing at the positions before.
            tokens = np.array([self.data.examples[int(self._partners[i] or 0)].tokens[:length] for i in batch.indices])
        assert tokens is not None
        found = self.written(tokens)
        passes.passed()
        return found

    def _find_means(self, passes: Passes) -> list[mx.array]:
        """The mean of what nodes write, by writer, [node, pos, d_model]."""
        longest = max(batch.tokens.shape[1] for batch in self.batches)
        sums = [mx.zeros((len(writer.nodes), longest, self.model.cfg.d_model)) for writer in self.graph.writers]
        counts = np.zeros(longest)
        for batch in self.batches:
            n_examples, length = batch.tokens.shape
            counts[:length] += n_examples
            for total, value in zip(sums, self.written(batch.tokens), strict=True):
                total[:, :length] += value.sum(axis=1)
            mx.eval(sums)
            passes.passed()
        if self.mean_over == "all":
            means = [total.sum(axis=1, keepdims=True) / counts.sum() for total in sums]
            return [mx.repeat(mean, longest, axis=1) for mean in means]
        return [total / mx.array(counts.astype(np.float32))[None, :, None] for total in sums]


def _ablation_of(given: str | None, data: EvalData) -> EdgeAblation:
    if given is None:
        return "corrupted" if data.has_corrupted else "mean"
    if not isinstance(given, str) or given not in ABLATIONS:
        raise HookError(f"ablation is one of {', '.join(ABLATIONS)}, got {given!r}.", field="ablation")
    if given == "corrupted" and not data.has_corrupted:
        raise HookError(
            "There are no corrupted prompts to take activations from: give every prompt a corrupted, or another "
            "ablation.",
            field="ablation",
        )
    return given  # type: ignore[return-value]


class _Pass:
    """The hooks of one forward pass whose rows are [set, example].

    Args:
        graph: of the model.
        others: what the nodes write instead [node, batch, pos, d_model], by writer; None for zeros.
        masks: which edges are replaced, [set, input, node].
    """

    def __init__(self, graph: ModelGraph, others: Written, masks: np.ndarray) -> None:
        self.graph = graph
        self.others = others
        self.masks = masks
        self._streams: dict[str, mx.array] = {}
        self._changes: dict[int, mx.array] = {}

    def hooks(self) -> list[Hook]:
        """They read what the nodes write, and replace what the inputs read."""
        found: list[Hook] = []
        node = 0
        for i, writer in enumerate(self.graph.writers):
            stop = node + len(writer.nodes)
            if self.masks[:, :, node:stop].any():
                found.append(Hook(writer.point, self._write(i), reads=True))
            node = stop
        first = 0
        for reading in self.graph.readings:
            for entry in reading.entries:
                own = self.masks[:, first : first + len(entry.inputs)]
                first += len(entry.inputs)
                if not own.any():
                    continue
                if entry.is_stream:
                    found.append(Hook(entry.point, self._replace(own)))
                    continue
                if not any(hook.point == reading.place for hook in found):
                    found.append(Hook(reading.place, self._read, reads=True))
                found.append(Hook(entry.point, self._replace_made(reading, entry, own)))
        return found

    def _write(self, i: int) -> HookFunction:
        def keep(value: mx.array, point: HookPoint) -> None:
            written = self.graph.writers[i].split(value)
            n_sets = len(self.masks)
            by_set = written.reshape(len(written), n_sets, -1, *written.shape[2:])
            change = -by_set if self.others is None else self.others[i][:, None] - by_set
            self._changes[i] = mx.moveaxis(change, 0, 1)

        return keep

    def _read(self, value: mx.array, point: HookPoint) -> None:
        self._streams[point.name] = value

    def _change(self, own: np.ndarray) -> mx.array:
        """What the stream is to be changed by for each input, [set, input, batch, pos, d_model].

        Args:
            own: the replaced edges of these inputs, [set, input, node].
        """
        parts: list[mx.array] = []
        columns: list[np.ndarray] = []
        node = 0
        for i, writer in enumerate(self.graph.writers):
            of_writer = own[:, :, node : node + len(writer.nodes)]
            node += len(writer.nodes)
            if of_writer.any():
                parts.append(self._changes[i])
                columns.append(of_writer)
        changes = mx.concatenate(parts, axis=1)
        weights = mx.array(np.concatenate(columns, axis=2).astype(np.float32))
        flat = weights @ changes.reshape(*changes.shape[:2], -1)
        return flat.reshape(*own.shape[:2], *changes.shape[2:])

    def _replace(self, own: np.ndarray) -> HookFunction:
        """For an input whose hook point holds the stream itself."""

        def replace(value: mx.array, point: HookPoint) -> mx.array:
            return value.astype(mx.float32) + self._change(own).reshape(value.shape)

        return replace

    def _replace_made(self, reading: Reading, entry: Entry, own: np.ndarray) -> HookFunction:
        """For inputs whose hook point holds what is made of the stream, by head or as a whole."""
        used = np.flatnonzero(own.any(axis=(0, 2)))

        def replace(value: mx.array, point: HookPoint) -> mx.array:
            stream = self._streams[reading.place.name]
            n_sets = len(own)
            by_set = stream.astype(mx.float32).reshape(n_sets, 1, -1, *stream.shape[1:])
            read = (by_set + self._change(own[:, used])).astype(stream.dtype)
            normed = entry.normed(mx.moveaxis(read, 1, 0).reshape(-1, *stream.shape[1:]))
            normed = normed.reshape(len(used), -1, *normed.shape[1:])
            if entry.project is None:
                return normed[0].reshape(value.shape)
            heads = []
            for head in range(len(entry.inputs)):
                kept = value[:, :, head]
                at = np.flatnonzero(used == head)
                if len(at):
                    made = entry.head_of(normed[int(at[0])], head).astype(value.dtype)
                    # Of a set that replaces nothing here the very numbers stay.
                    touched = np.repeat(own[:, head].any(axis=1), len(value) // n_sets)
                    kept = mx.where(mx.array(touched)[:, None, None], made, kept)
                heads.append(kept)
            return mx.stack(heads, axis=2)

        return replace
