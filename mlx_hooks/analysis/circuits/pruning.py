"""ACDC: a circuit by leaving out one edge after the other, each by an exact run.

    1. All edges are there. The distance of what is left from the model is how far the metric is off.
    2. From logits backwards, each edge into an input is replaced; if the distance grows by less than the threshold, it
       stays replaced, and the next is tried without it.
    3. A node that no edge leads away from any more changes nothing: all edges into it go without a run.

That is one run per edge, each after the other. Here many run in one pass: those that will follow if every guess of what
stays is right. Up to the first wrong guess they are what one at a time would give; from there it goes on anew. Source:
Conmy et al., "Towards Automated Circuit Discovery for Mechanistic Interpretability" (2023).
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ...errors import HookError
from ...options import options, options_of
from ..ablation import Count
from ..progress import Passes, Progress
from .circuit import Circuit, is_finite, scores_in, with_more
from .edge_runs import EdgeAblation, EdgeRuns
from .model_graph import LOGITS, ModelGraph
from .validation import among, check_runs, replaced

Order = Literal["latest", "earliest", "weakest"]
Distance = Literal["examples", "mean"]


@options
class AcdcOptions:
    """Options of :func:`acdc` and :func:`acdc_sweep`.

    Args:
        distance: how far a metric is from the model's: "examples" for the mean over examples of the size of the
            difference, which two examples that change in opposite ways do not hide; "mean" for the size of the
            difference of means. The same for ``kl``, which is never below 0.
        order: of the edges into one input: from the latest source on, from the earliest, or from the one with the
            smallest score.
        at_once: edges that are tried in one pass at most.
        max_runs: after so many runs of an edge no more is tried: what is undecided stays. None for no limit. The run of
            what is left at the start is none of an edge.
    """

    distance: Distance = "examples"
    order: Order = "latest"
    at_once: Count = 8
    max_runs: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, eq=False)
class AcdcResult:
    """What :func:`acdc` found; it can be held against edge scores.

    Args:
        edges: all edges of the model, in forward order.
        values: [edge]. Of one threshold: by how much the distance grew when the edge was replaced, 0 where it did not
            grow or the edge was not tried. Of several: the greatest threshold at which the edge was kept, 0 where none.
        kept: the edges that stay, in forward order; of several thresholds those of the smallest.
        threshold: the smallest.
        growth: by how much the distance of the kept edges from the model is more than at the start.
        undecided: kept edges that were not tried, since there were ``max_runs``.
        n_runs: sets of edges that were run, wrong guesses and all.
        graph: the model's.
        metric, ablation, model, settings: as edge scores have them; of the settings ``distance``, ``order`` and what
            the ablation has.
    """

    edges: list[str]
    values: np.ndarray
    kept: tuple[str, ...]
    threshold: float
    growth: float
    undecided: tuple[str, ...]
    n_runs: int
    graph: ModelGraph
    metric: str
    ablation: EdgeAblation
    model: str
    settings: dict[str, Any]
    method: str = field(default="acdc", init=False)

    def circuit(self, metadata: dict[str, Any] | None = None, *, connected: bool = True) -> Circuit:
        """The kept edges with their values; see :meth:`Circuit.of_edges`.

        Args:
            metadata: more of it, other than what the result says.

        Raises:
            HookError: where none is kept, or none of them lies on a path.
        """
        if not self.kept:
            most = self.values.max()
            how = (
                f"the strongest changes the metric by {most:.3g}. Give a smaller one."
                if most
                else ("none of those that were tried changes the metric.")
            )
            raise HookError(f"ACDC keeps no edge at threshold {self.threshold:g}: {how}", field="threshold")
        values = dict(zip(self.edges, self.values.tolist(), strict=True))
        told = {name: getattr(self, name) for name in ("method", "metric", "ablation", "settings", "threshold")}
        chosen = {name: values[name] for name in self.kept}
        return Circuit.of_edges(self.graph, chosen, connected=connected, metadata=with_more(told, metadata))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "method": self.method,
            "metric": self.metric,
            "ablation": self.ablation,
            "settings": self.settings,
            "threshold": self.threshold,
            "edges": [
                {"edge": name, "value": value} for name, value in zip(self.edges, self.values.tolist(), strict=True)
            ],
            "kept": list(self.kept),
            "growth": self.growth,
            "undecided": list(self.undecided),
            "runs": self.n_runs,
        }


def acdc(
    runs: EdgeRuns,
    threshold: float,
    options: AcdcOptions | dict | None = None,
    *,
    scores: Any = None,
    start: Circuit | Collection[str] | None = None,
    progress: Progress = None,
) -> AcdcResult:
    """Leave out every edge that can go without the metric moving away from the model's by ``threshold`` or more.

        found = acdc(EdgeRuns(model, prompts, metric="kl"), threshold=0.01)
        found.circuit().nodes

    Args:
        threshold: above 0, in the unit of the metric, for one edge.
        scores: of edges, with ``edges`` and ``values``: edges that score less than the threshold are guessed to go.
            They make it faster and change nothing else, unless ``order`` is by them.
        start: edges to begin with; all others are replaced from the start. None for all.
        progress: called with the edges that are decided, and how many there are.

    Raises:
        HookError: for a threshold that is not above 0, an empty start, an edge that the model does not have, and an
            order by scores without any.
    """
    return _Search(runs, options_of(AcdcOptions, options), scores, start).at(_checked(threshold), progress)


def acdc_sweep(
    runs: EdgeRuns,
    thresholds: Sequence[float],
    options: AcdcOptions | dict | None = None,
    *,
    scores: Any = None,
    progress: Progress = None,
) -> AcdcResult:
    """ACDC at several thresholds: the value of an edge is the greatest at which it is kept.

    It ranks edges as the paper does, to draw an ROC curve. What is kept at a greater threshold is what is guessed at
    the next smaller one.

    Args:
        thresholds: at least one, each above 0.
        scores: as in :func:`acdc`.
        progress: called with the edges that are decided, of all thresholds, and how many there are.

    Raises:
        HookError: as :func:`acdc`.
    """
    if isinstance(thresholds, str | bytes) or not isinstance(thresholds, Sequence | np.ndarray) or not len(thresholds):
        raise HookError("thresholds is a list of at least one number above 0.", field="thresholds")
    search = _Search(runs, options_of(AcdcOptions, options), scores, None)
    ordered = sorted({_checked(each) for each in thresholds}, reverse=True)
    n_edges = len(search.names)
    values = np.zeros(n_edges)
    for i, threshold in enumerate(ordered):
        own = None if progress is None else _Shifted(progress, i * n_edges, len(ordered) * n_edges)
        found = search.at(threshold, own)
        is_kept = np.isin(search.names, found.kept)
        values = np.where((values == 0) & is_kept, threshold, values)
        search.guesses = dict(zip(search.names, is_kept.tolist(), strict=True))
    return replace(found, values=values, n_runs=search.n_runs)


class _Shifted:
    """Progress of one search among several."""

    def __init__(self, progress: Any, before: int, total: int) -> None:
        self.progress, self.before, self.total = progress, before, total

    def __call__(self, done: int, _: int) -> None:
        self.progress(self.before + done, self.total)


def _checked(threshold: Any) -> float:
    if not is_finite(threshold) or threshold <= 0:
        raise HookError(f"threshold is a finite number above 0, got {threshold!r:.50}.", field="threshold")
    return float(threshold)


@dataclass
class _State:
    """How far a search has come.

    Args:
        at: how many edges of the search's order are behind it.
        removed: which edges are replaced [edge].
        live: nodes that a kept edge leads away from, and logits.
        distance: of what is left from the model.
    """

    at: int
    removed: np.ndarray
    live: set[str]
    distance: float

    def copy(self) -> "_State":
        return _State(self.at, self.removed.copy(), set(self.live), self.distance)


class _Search:
    """The edges of a model in the order in which they are tried, and what is known of their runs."""

    def __init__(self, runs: EdgeRuns, chosen: AcdcOptions, scores: Any, start: Any) -> None:
        self.runs, self.options = check_runs(runs), chosen
        self.names = [edge.name for edge in runs.graph.edges]
        self.index = {name: i for i, name in enumerate(self.names)}
        sizes = _sizes(scores, self.index)
        if chosen.order == "weakest" and sizes is None:
            raise HookError("order 'weakest' is by scores: give scores.", field="order")
        self.sizes = sizes
        self.order = _order(runs.graph, self.names, chosen.order, sizes)
        self.served = {read.name: read.feeds or (LOGITS,) for read in runs.graph.inputs}
        self.outside = np.zeros(len(self.names), dtype=bool)
        if start is not None:
            inside = {edge.name for edge in runs.graph.edges_of(start.edges if isinstance(start, Circuit) else start)}
            if not inside:
                raise HookError("start names at least one edge to begin with; None begins with all.", field="start")
            self.outside = ~among(runs.graph, inside)
        self.guesses: dict[str, bool] = {}
        """Whether an edge is thought to stay; of those that are not here it is thought that they go."""
        if start is not None and sizes is None:
            self.guesses = dict.fromkeys(inside, True)
        self.n_runs = 0
        self._known: dict[bytes, float] = {_key(np.zeros(len(self.names), dtype=bool)): 0.0}
        """How far the metric is from the model's with a set of edges replaced: with none it is the model's."""

    def at(self, threshold: float, progress: Progress = None) -> AcdcResult:
        """The search at one threshold."""
        if self.sizes is not None and not self.guesses:
            self.guesses = {name: bool(size >= threshold) for name, size in zip(self.names, self.sizes, strict=True)}
        n_before = self.n_runs
        state = _State(0, self.outside.copy(), {LOGITS}, 0.0)

        def tell(*passes: int) -> None:
            # How many runs there will be is not known: told is how many edges are decided.
            if progress is not None:
                progress(state.at, len(self.order))

        passes = Passes(tell)
        state.distance = self._distances([self.outside], passes)[0]
        n_start, first = self.n_runs, state.distance
        values = np.zeros(len(self.names))
        most = n_ahead = self.options.at_once
        while True:
            self._skip(state)
            left = n_ahead if self.options.max_runs is None else self.options.max_runs - (self.n_runs - n_start)
            tests = list(self._ahead(state.copy(), min(n_ahead, left)))
            if not tests:
                break
            distances = self._distances([removed for _, removed, _ in tests], passes)
            before = state.distance
            is_right = True
            for (edge, _, stays), distance in zip(tests, distances, strict=True):
                grew = distance - before
                keep = grew >= threshold
                if is_right:
                    self._skip(state)
                    values[edge] = max(grew, 0.0)
                    self._decide(state, edge, keep)
                    if not keep:
                        state.distance = distance
                    is_right = keep == stays
                # What runs behind a wrong guess showed is worth a guess.
                self.guesses[self.names[edge]] = keep
                before = before if stays else distance
            # Where guesses are wrong, looking far ahead is in vain.
            n_ahead = min(most, 2 * n_ahead) if is_right else max(1, n_ahead // 2)
            tell()
        kept = [name for name, gone in zip(self.names, state.removed, strict=True) if not gone]
        undecided = [self.names[i] for i in sorted(self.order[state.at :]) if not state.removed[i]]
        if progress is not None:
            progress(len(self.order), len(self.order))
        return AcdcResult(
            edges=self.names,
            values=values,
            kept=tuple(kept),
            threshold=threshold,
            growth=state.distance - first,
            undecided=tuple(undecided),
            n_runs=self.n_runs - n_before,
            graph=self.runs.graph,
            metric=self.runs.metric.name,
            ablation=self.runs.ablation,
            model=getattr(self.runs.model, "model_name", ""),
            settings=self._settings(),
        )

    def _settings(self) -> dict[str, Any]:
        of_ablation: dict[str, dict[str, Any]] = {
            "mean": {"mean_over": self.runs.mean_over},
            "resample": {"seed": self.runs.seed},
        }
        told = {"distance": self.options.distance, "order": self.options.order}
        return told | of_ablation.get(self.runs.ablation, {})

    def _ahead(self, state: _State, n: int) -> Iterator[tuple[int, np.ndarray, bool]]:
        """The next ``n`` edges to try if all guesses are right: edge, what is replaced in its run, whether it stays."""
        for _ in range(n):
            self._skip(state)
            if state.at == len(self.order):
                return
            edge = self.order[state.at]
            removed = state.removed.copy()
            removed[edge] = True
            stays = self.guesses.get(self.names[edge], False)
            yield edge, removed, stays
            self._decide(state, edge, stays)

    def _skip(self, state: _State) -> None:
        """Go on to the next edge that makes a difference; those on the way that lead nowhere are removed."""
        while state.at < len(self.order):
            edge = self.order[state.at]
            if not state.removed[edge]:
                if state.live.intersection(self.served[self.runs.graph.edges[edge].input]):
                    return
                state.removed[edge] = True
            state.at += 1

    def _decide(self, state: _State, edge: int, keep: bool) -> None:
        if keep:
            state.live.add(self.runs.graph.edges[edge].source)
        state.removed[edge] = not keep
        state.at += 1

    def _distances(self, removed: Sequence[np.ndarray], passes: Passes) -> list[float]:
        """How far the metric is from the model's with these edges [edge] replaced; each set runs once."""
        keys = [_key(each) for each in removed]
        new = {key: each for key, each in zip(keys, removed, strict=True) if key not in self._known}
        if new:
            off = replaced(self.runs, list(new.values()), passes) - self.runs.level("plain", passes)
            found = np.abs(off).mean(axis=1) if self.options.distance == "examples" else np.abs(off.mean(axis=1))
            self._known |= dict(zip(new, found.tolist(), strict=True))
            self.n_runs += len(new)
        return [self._known[key] for key in keys]


def _key(removed: np.ndarray) -> bytes:
    return np.packbits(removed).tobytes()


def _sizes(scores: Any, index: dict[str, int]) -> np.ndarray | None:
    """The sizes of scores [edge], 0 where there is none."""
    if scores is None:
        return None
    found = np.zeros(len(index))
    for name, score in scores_in(scores).items():
        if name not in index:
            raise HookError(f"The scores are of another model: this one has no edge {name}.", field="scores")
        found[index[name]] = abs(score or 0.0)
    return found


def _order(graph: ModelGraph, names: list[str], order: Order, sizes: np.ndarray | None) -> list[int]:
    """The edges' indices in the order in which they are tried: from logits backwards."""
    into: dict[str, list[int]] = {read.name: [] for read in graph.inputs}
    for i, edge in enumerate(graph.edges):
        into[edge.input].append(i)
    found: list[int] = []
    for read in reversed(graph.inputs):
        own = into[read.name]
        if order == "latest":
            own = own[::-1]
        elif order == "weakest" and sizes is not None:
            own = sorted(own, key=lambda i: (sizes[i], names[i]))
        found += own
    return found
