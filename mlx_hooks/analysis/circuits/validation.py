"""How far a circuit is the model: run with all else replaced, and with the circuit alone replaced.

    faithfulness = (metric with all others replaced - metric with all replaced) / (plain - metric with all replaced)
    completeness = 1 - the same of the complement: of the model in which only the circuit's edges are replaced

A faithful circuit does what the model does; a complete one leaves nothing behind that does it too. Both are ratios of
means over examples, 1 at best; a faithfulness above 1 is a circuit that lacks what holds the model back. Sources: Wang
et al., "Interpretability in the Wild" (2022); Hanna et al., "Have Faith in Faithfulness" (2024); for the areas under
the curve Mueller et al., "MIB: A Mechanistic Interpretability Benchmark" (2025).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, cast, get_args

import numpy as np
from pydantic import Field

from ...errors import HookError
from ...model import HookedModel
from ...options import options, options_of
from ..ablation import Count, MeanOver
from ..faithfulness import check_differ, is_near, less_than_one
from ..identity import ModelIdentity
from ..intervals import FEWEST, Estimate, IntervalOptions, few, means, ratios
from ..progress import Passes, Progress
from .circuit import Circuit, grown, is_finite, is_whole, on_paths, with_more
from .edge_runs import ABLATIONS, LEVELS, EdgeAblation, EdgeRuns, IndexedSets, replaced_by
from .metrics import METRICS, metric_of
from .model_graph import ModelGraph

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Of all edges: the sizes at which MIB draws a curve."""
_STEP = 1.25
"""From one size to the next in the first sweep for the smallest circuit."""
_CLOSER = 32
"""Sizes that are tried between two of them."""


@options
class RunOptions(IntervalOptions):
    """What runs with edges replaced have in common, besides :class:`IntervalOptions`.

    Edge runs that are given have their own ablation, metric, mean_over and batch_size.

    Args:
        ablation: what replaced edges carry, a key of ``ABLATIONS``; None for what the circuit was found with, or else
            what the edge runs take.
        metric: as in :func:`metric_of`; None in the same way, where that was one of ``METRICS``.
        mean_over: of the mean, "position" or "all"; None in the same way.
        batch_size: examples of one length that run together, fewer of long ones, which changes no result.
        seed: of random circuits, of the bootstrap, and of who is whose partner in resampling, which edge runs that are
            given have drawn already.
    """

    ablation: EdgeAblation | None = None
    metric: Any = None
    mean_over: MeanOver | None = None
    batch_size: Count = 16


@options
class ValidationOptions(RunOptions):
    """Options of :func:`validate_circuit`, besides those of :class:`RunOptions`.

    Args:
        random_circuits: as many of the circuit's size are drawn to compare.
    """

    random_circuits: Annotated[int, Field(ge=0)] = 10


@dataclass(frozen=True, eq=False)
class CircuitValidation:
    """What :func:`validate_circuit` found.

    Args:
        faithfulness: of the circuit.
        completeness: 1 less the faithfulness of all but the circuit, which is ``complement``.
        random: the faithfulness of each random circuit of as many edges, every one of which leads to logits; None
            where it is undefined.
        plain, ablated, corrupted: the metric of the model as it is, with all edges replaced, and of the corrupted
            prompts (None without them), means over examples.
        kept, removed: the metric with all but the circuit replaced, and with only the circuit replaced, [example].
        n_edges, edges_of_model: how many there are in the circuit and in the model.
        metric: its name.
        ablation: a key of ``ABLATIONS``; ``replaced_by`` is the same in words.
        confidence: of the intervals.
        notes: what is to be known when reading it.
    """

    faithfulness: Estimate
    completeness: Estimate
    complement: Estimate
    random: tuple[float | None, ...]
    plain: Estimate
    ablated: Estimate
    corrupted: Estimate | None
    kept: np.ndarray
    removed: np.ndarray
    n_edges: int
    edges_of_model: int
    metric: str
    ablation: EdgeAblation
    replaced_by: str
    confidence: float
    notes: tuple[str, ...]

    @property
    def random_mean(self) -> float | None:
        """The mean faithfulness of the random circuits; None without any."""
        drawn = [each for each in self.random if each is not None]
        return float(np.mean(drawn)) if drawn else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "faithfulness": self.faithfulness.to_dict(),
            "completeness": self.completeness.to_dict(),
            "complement": self.complement.to_dict(),
            "random": {"circuits": len(self.random), "faithfulness": list(self.random), "mean": self.random_mean},
            "levels": {
                "plain": self.plain.to_dict(),
                "ablated": self.ablated.to_dict(),
                "corrupted": None if self.corrupted is None else self.corrupted.to_dict(),
            },
            "kept": self.kept.tolist(),
            "removed": self.removed.tolist(),
            "edges": self.n_edges,
            "edges_of_model": self.edges_of_model,
            "metric": self.metric,
            "ablation": self.ablation,
            "replaced_by": self.replaced_by,
            "confidence": self.confidence,
            "notes": list(self.notes),
        }


def validate_circuit(
    model: HookedModel | EdgeRuns,
    circuit: Circuit,
    eval_data: Any = None,
    options: ValidationOptions | dict | None = None,
    progress: Progress = None,
) -> CircuitValidation:
    """Run a model with everything outside a circuit replaced, and with only the circuit replaced.

        found = validate_circuit(model, Circuit.load("circuit.json"), prompts)
        found.faithfulness                          # Estimate(mean, low, high, n)

    Args:
        model: a model, or its edge runs, which bring their own data, ablation and metric.
        eval_data: see :func:`eval_data_of`. Better other examples than those the circuit was found with, which flatter
            it.
        progress: called with the passes that are done, and how many there are.

    Raises:
        HookError: for a model that lacks an edge of the circuit, for data, ablation or metric that do not fit, for
            options that are not those of the edge runs, and where the metric is the same with all edges replaced.
    """
    chosen = options_of(ValidationOptions, options)
    if not isinstance(circuit, Circuit):
        raise HookError(
            f"circuit is a Circuit, as Circuit.load(path) gives it, got {type(circuit).__name__}.", field="circuit"
        )
    if isinstance(model, HookedModel):
        _check_sizes(model, circuit)
    runs = runs_of(model, eval_data, chosen, circuit.metadata)
    circuit.check(runs.graph)
    passes = Passes(progress, runs.n_passes(2 + chosen.random_circuits, levels=LEVELS))
    plain, nothing = _levels(runs, passes)
    own = among(runs.graph, circuit.edges)
    drawn = _random_circuits(runs, own, chosen.random_circuits, chosen.seed, passes)
    # Fewer may be drawn than were asked for.
    passes.expect(runs.n_passes(2 + len(drawn)) - runs.n_passes(2 + chosen.random_circuits))
    removed, *scores = replaced(runs, [own, ~own, *(~each for each in drawn)], passes)
    settings = chosen.of_intervals
    columns = np.stack([removed, *scores], axis=1) - nothing[:, None]
    complement, found, *others = ratios(columns, plain - nothing, **settings)
    has_corrupted = runs.data.has_corrupted
    levels = [plain, nothing, *([runs.level("corrupted", passes)] if has_corrupted else [])]
    level = means(np.stack(levels, axis=1), **settings)
    return CircuitValidation(
        faithfulness=found,
        completeness=less_than_one(complement),
        complement=complement,
        random=tuple(each.mean for each in others),
        plain=level[0],
        ablated=level[1],
        corrupted=level[2] if has_corrupted else None,
        kept=scores[0],
        removed=removed,
        n_edges=len(circuit),
        edges_of_model=len(own),
        metric=runs.metric.name,
        ablation=runs.ablation,
        replaced_by=replaced_by(runs.ablation, runs.mean_over),
        confidence=chosen.confidence,
        notes=tuple(_notes(runs, circuit, found)),
    )


def runs_of(model: Any, eval_data: Any, chosen: RunOptions, found_with: Mapping[str, Any] | None = None) -> EdgeRuns:
    """Edge runs of a model, or those that are given in its place.

    Args:
        found_with: a circuit's metadata, whose metric, ablation and means are taken where none are chosen.

    Raises:
        HookError: for what is neither, eval data that lack, or that are given beside edge runs, and options that are
            not those of the edge runs.
    """
    if not isinstance(model, HookedModel):
        runs = check_runs(model, "Edges are replaced in a HookedModel or its edge runs")
        if eval_data is not None:
            raise HookError("Edge runs have their own eval data: give them alone.", field="eval_data")
        _check_same(runs, chosen)
        return runs
    if eval_data is None:
        raise HookError("Give the eval data on which the metric is measured.", field="eval_data")
    told = found_with or {}
    over = chosen.mean_over or _known(_settings(told).get("mean_over"), get_args(MeanOver))
    return EdgeRuns(
        model,
        eval_data,
        ablation=_known(told.get("ablation"), ABLATIONS) if chosen.ablation is None else chosen.ablation,
        metric=_known(told.get("metric"), METRICS) if chosen.metric is None else chosen.metric,
        mean_over=over or "position",
        batch_size=chosen.batch_size,
        seed=chosen.seed,
    )


def check_runs(given: Any, what: str = "This takes edge runs, EdgeRuns(model, prompts)") -> EdgeRuns:
    """Edge runs as they are.

    Raises:
        HookError: for anything else; ``what`` begins the sentence.
    """
    if not (hasattr(given, "masked") and hasattr(given, "graph")):
        raise HookError(f"{what}, got {type(given).__name__}.", field="runs")
    return cast(EdgeRuns, given)


def _check_same(runs: EdgeRuns, chosen: RunOptions) -> None:
    """Raises HookError for an option that says something else than edge runs do."""
    metric = None if chosen.metric is None else metric_of(chosen.metric, runs.data)
    for name, asked, own, shown in (
        ("ablation", chosen.ablation, runs.ablation, runs.ablation),
        ("metric", metric, runs.metric, runs.metric.name),
        ("mean_over", chosen.mean_over, runs.mean_over, runs.mean_over),
    ):
        if asked is not None and asked != own:
            raise HookError(f"Edge runs have their own {name}, here {shown!r}: give it to them.", field=name)


def _settings(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    told = metadata.get("settings")
    return told if isinstance(told, Mapping) else {}


def _known(told: Any, names: Collection[str]) -> Any:
    """What a circuit's metadata tell, where it is one of these names."""
    return told if isinstance(told, str) and told in names else None


def replaced(runs: EdgeRuns, sets: Sequence[np.ndarray], progress: Progress | Passes = None) -> np.ndarray:
    """The metric with sets of edges [edge] of bool replaced, [set, example] in float64."""
    return runs.masked(IndexedSets(runs.graph, [np.flatnonzero(each) for each in sets]), progress)


def among(graph: ModelGraph, names: Collection[str]) -> np.ndarray:
    """Which of a model's edges have one of these names, [edge] of bool."""
    chosen = set(names)
    return np.array([edge.name in chosen for edge in graph.edges], dtype=bool)


def _identity(circuit: Circuit) -> ModelIdentity | None:
    """Of the model that the circuit was found in, where it says."""
    told = circuit.metadata.get("identity")
    try:
        return ModelIdentity.from_dict(told) if isinstance(told, dict) else None
    except (KeyError, ValueError, TypeError):
        return None


def _check_sizes(model: HookedModel, circuit: Circuit) -> None:
    known, here = _identity(circuit), ModelIdentity.of(model)
    if known is not None and known.sizes != here.sizes:
        raise HookError(f"The circuit is of another model: {known.sizes}; this is {here.sizes}.", field="circuit")


def _levels(runs: EdgeRuns, passes: Passes) -> tuple[np.ndarray, np.ndarray]:
    """The metric of the model as it is and with all edges replaced, [example], which differ."""
    plain, ablated = runs.level("plain", passes), runs.level("ablated", passes)
    check_differ(plain, ablated, f"with all edges replaced the metric {runs.metric.name} is what it is without")
    return plain, ablated


def _notes(runs: EdgeRuns, circuit: Circuit, found: Estimate) -> list[str]:
    notes = few(found.n)
    known = _identity(circuit)
    if known is not None and isinstance(runs.model, HookedModel) and known != ModelIdentity.of(runs.model):
        notes.append("The circuit was found in a model of the same sizes with other weights.")
    notes += _otherwise(runs, circuit)
    if found.low is None and found.n >= FEWEST:
        notes.append(
            "By these examples the metric may be the same with all edges replaced: shares of that difference have no "
            "intervals. Give more examples, or such as the model can do."
        )
    if runs.plain.mean() < runs.ablated.mean() and runs.metric.name not in ("loss", "kl"):
        notes.append("The model does worse than with all edges replaced: the circuit is one of doing worse.")
    return notes


def _otherwise(runs: EdgeRuns, circuit: Circuit) -> list[str]:
    """How a circuit is judged otherwise than it was found."""
    told = [(name, circuit.metadata.get(name)) for name in ("ablation", "metric")]
    if runs.ablation == "mean":
        told.append(("mean_over", _settings(circuit.metadata).get("mean_over")))
    own = {"ablation": runs.ablation, "metric": runs.metric.name, "mean_over": runs.mean_over}
    return [
        f"The circuit was found with {name} {value!r}, and is judged by {own[name]!r}."
        for name, value in told
        if isinstance(value, str) and value != own[name]
    ]


def _random_circuits(runs: EdgeRuns, circuit: np.ndarray, count: int, seed: int, passes: Passes) -> list[np.ndarray]:
    """Sets of the circuit's size [edge] of bool, each once and not the circuit: grown from logits, in an order drawn at
    random."""
    generator = np.random.default_rng(seed)
    names = [edge.name for edge in runs.graph.edges]
    inputs = {read.name: read.feeds for read in runs.graph.inputs}
    found: dict[bytes, np.ndarray] = {}
    # Of few edges there may be fewer sets than asked.
    for _ in range(10 * count):
        if len(found) == count:
            break
        order = grown(dict(zip(names, generator.random(len(names)).tolist(), strict=True)), inputs)
        drawn = among(runs.graph, order[: int(circuit.sum())])
        if (drawn != circuit).any():
            found[drawn.tobytes()] = drawn
        passes.tell()
    return list(found.values())


# The strongest edges, more and more of them


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """Faithfulness of the strongest edges, by how many they are; :func:`faithfulness_curve` makes it.

    Args:
        sizes: how many were taken, ascending, from 0 to all of them [size].
        edges: how many of them lie on a path from embed to logits, which are the circuit [size].
        faithfulness: of these circuits [size]: that of none is 0, that of all is 1.
        values: the metric with all else replaced, [size, example].
    """

    sizes: np.ndarray
    edges: np.ndarray
    faithfulness: np.ndarray
    values: np.ndarray

    @property
    def cpr(self) -> float:
        """The area under the curve over the share of all edges: MIB's circuit performance ratio. High is good."""
        return self._area(self.faithfulness)

    @property
    def cmd(self) -> float:
        """The area between the curve and 1 over the share of all edges: MIB's circuit-model distance. 0 is best."""
        return self._area(np.abs(1 - self.faithfulness))

    def _area(self, heights: np.ndarray) -> float:
        return float(((heights[1:] + heights[:-1]) / 2 * np.diff(self.edges / self.sizes[-1])).sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without those of each example."""
        return {
            "sizes": self.sizes.tolist(),
            "edges": self.edges.tolist(),
            "faithfulness": self.faithfulness.tolist(),
            "cpr": self.cpr,
            "cmd": self.cmd,
        }


def faithfulness_curve(
    runs: EdgeRuns, scores: Any, sizes: Sequence[int] | None = None, *, grow: bool = False, progress: Progress = None
) -> FaithfulnessCurve:
    """How faithful the n strongest edges are, for several n at once.

    Args:
        scores: has ``edges`` and ``values``, or is a circuit of all edges with scores.
        sizes: numbers of edges; None for MIB's shares of all, ``FRACTIONS``. None and all are always there.
        grow: as in :meth:`Circuit.pruned`.
        progress: called with the passes that are done, and how many there are.

    Raises:
        HookError: for sizes that there are not, edges of another model, and where the metric is the same with all
            edges replaced.
    """
    return _Ranking(runs, scores, grow, progress).curve(sizes)


class _Ranking:
    """A model's edges by their scores, and the faithfulness of the first n, each n run once."""

    def __init__(self, runs: EdgeRuns, scores: Any, grow: bool, progress: Progress) -> None:
        check_runs(runs)
        self.passes = Passes(progress)
        whole = scores if isinstance(scores, Circuit) else Circuit.of_scores(scores, runs.graph, connected=False)
        whole.check(runs.graph)
        self.names = [edge.name for edge in runs.graph.edges]
        if len(whole) < len(self.names):
            lacking = next(name for name in self.names if name not in whole.edges)
            raise HookError(f"Every edge of the model has a score, and {lacking} has none.", field="scores")
        self.runs, self.whole = runs, whole
        self.ranked = whole.ranked(grow=grow)
        self.values: dict[int, np.ndarray] = {}
        self.edges: dict[int, int] = {}

    def run(self, sizes: Sequence[int]) -> None:
        new = [size for size in sorted(set(sizes)) if size not in self.values]
        circuits = [among(self.runs.graph, on_paths(self.ranked[:size], self.whole.inputs)) for size in new]
        # A set that is all edges, or none, is known.
        to_run = [i for i, each in enumerate(circuits) if each.any() and not each.all()]
        # How many further sweeps there will be is not known.
        self.passes.expect(self.runs.n_passes(len(to_run), levels=("plain", "ablated")))
        self.plain, self.nothing = _levels(self.runs, self.passes)
        found = dict(zip(to_run, replaced(self.runs, [~circuits[i] for i in to_run], self.passes), strict=True))
        for i, size in enumerate(new):
            self.edges[size] = int(circuits[i].sum())
            self.values[size] = found.get(i, self.plain if circuits[i].any() else self.nothing)

    def share(self, size: int) -> float:
        return float((self.values[size] - self.nothing).mean() / (self.plain - self.nothing).mean())

    def curve(self, sizes: Sequence[int] | None) -> FaithfulnessCurve:
        n = len(self.names)
        if sizes is None:
            sizes = [max(1, round(fraction * n)) for fraction in FRACTIONS]
        listed: list[Any] = list(sizes) if isinstance(sizes, Iterable) else []
        wrong = [size for size in listed if not is_whole(size) or not 0 <= size <= n]
        if wrong or not isinstance(sizes, Iterable):
            got = wrong[0] if wrong else sizes
            raise HookError(
                f"sizes are whole numbers from 0 to {n}, the edges of the model, got {got!r}.", field="sizes"
            )
        self.run([0, *(int(size) for size in listed), n])
        return self.told()

    def told(self) -> FaithfulnessCurve:
        """Of all sizes that were run."""
        at = sorted(self.values)
        return FaithfulnessCurve(
            np.array(at),
            np.array([self.edges[size] for size in at]),
            np.array([self.share(size) for size in at]),
            np.stack([self.values[size] for size in at]),
        )


@dataclass(frozen=True, eq=False)
class SmallestCircuit:
    """What :func:`smallest_circuit` found.

    Args:
        circuit: the edges; those of its ``n`` strongest that lie on a path.
        n: how many edges were taken by their scores.
        faithfulness: of the circuit, by the examples that it was chosen with.
        asked: the faithfulness that was to be reached.
        edges_of_model: how many there are.
        curve: all sizes that were tried.
    """

    circuit: Circuit
    n: int
    faithfulness: float
    asked: float
    edges_of_model: int
    curve: FaithfulnessCurve

    @property
    def share(self) -> float:
        """The circuit's share of the model's edges."""
        return len(self.circuit) / self.edges_of_model

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "circuit": self.circuit.to_dict(),
            "n": self.n,
            "faithfulness": self.faithfulness,
            "asked_faithfulness": self.asked,
            "edges": len(self.circuit),
            "edges_of_model": self.edges_of_model,
            "share": self.share,
            "curve": self.curve.to_dict(),
        }


def smallest_circuit(
    runs: EdgeRuns,
    scores: Any,
    faithfulness: float = 0.9,
    *,
    two_sided: bool = True,
    grow: bool = False,
    metadata: dict[str, Any] | None = None,
    progress: Progress = None,
) -> SmallestCircuit:
    """The fewest of the strongest edges that are faithful, and stay so as more are added.

    Faithfulness need not rise with the number of edges: one that is reached by chance and lost again is not taken. Of
    the sizes that are tried, each 1.25 times the one before, the smallest is found from which on all are faithful; then
    it is sought between that one and the next smaller one in the same way, by steps of 1 where they are few.

    Args:
        scores, grow: see :func:`faithfulness_curve`.
        faithfulness: what is to be reached; no circuit without edges does.
        two_sided: a circuit that does as much better than the model is no more faithful than one that does worse.
        metadata: more of it for the circuit, other than what is told of it.
        progress: called with the passes that are done, and how many are known to come.

    Raises:
        HookError: as :func:`faithfulness_curve`.
    """
    if not is_finite(faithfulness) or not 0 < faithfulness <= 1:
        raise HookError(f"faithfulness is above 0 and at most 1, got {faithfulness!r}.", field="faithfulness")
    ranking, asked = _Ranking(runs, scores, grow, progress), float(faithfulness)

    def is_faithful(size: int) -> bool:
        share = ranking.share(size)
        return ranking.edges[size] > 0 and (is_near(share, faithfulness) or (not two_sided and share > 1))

    def settled() -> tuple[int, int]:
        """The size from which on all that were tried are faithful, and the one before."""
        tried = sorted(ranking.values)
        unfaithful = [size for size in tried if not is_faithful(size)]
        before = unfaithful[-1]
        return tried[tried.index(before) + 1], before

    n_edges = len(ranking.names)
    ranking.run([0, *_sizes(n_edges)])
    found, before = settled()
    while found - before > 1:
        ranking.run(np.unique(np.linspace(before, found, _CLOSER + 2).round().astype(int)).tolist())
        found, before = settled()
    chosen = ranking.whole.top(found, grow=grow)
    own = {"metric": runs.metric.name, "ablation": runs.ablation}
    about = with_more(own | dict(chosen.metadata) | {"asked_faithfulness": asked}, metadata)
    circuit = Circuit(chosen.edges, chosen.inputs, about, chosen.dropped)
    return SmallestCircuit(circuit, found, ranking.share(found), asked, n_edges, ranking.told())


def _sizes(n: int) -> list[int]:
    """1 to n, each about 1.25 times the one before."""
    found = [1]
    while found[-1] < n:
        found.append(min(n, max(found[-1] + 1, round(found[-1] * _STEP))))
    return found
