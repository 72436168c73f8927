"""Ablation studies: what a model loses without one of its components, or without some edges of its graph.

    study = ablation_study(model, prompts, {"components": ["heads"], "ablations": ["mean"]})
    study.strongest(3)                              # [("L2H1", Estimate(mean=-4.1, low=-4.6, high=-3.5, n=24)), ...]
    ablate_edges(model, ["L2H1", "L0H1->L2H1<k>"], prompts).changes

A component is ablated everywhere at once, and all that follows is computed anew. An edge is what one input reads of one
node, and no other input notices; a node's name stands for all edges that lead away from it. Zero, mean and resample
ablation answer different questions: see ``ablation.py``; so results say what was put in.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import HookError
from ...model import HookedModel
from ...options import options_of
from ..ablation import CausalOptions, analyse_causal, draw_causal
from ..intervals import Estimate, few, means, ratios
from ..progress import Passes, Progress
from .circuit import ARROW, Circuit, nodes_of
from .edge_runs import EdgeAblation, EdgeRuns, replaced_by
from .model_graph import Edge
from .validation import RunOptions, runs_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = ("loss_change", "kl", "logit_difference_change")
"""What is measured of a component: changes are ablated less plain, ``kl`` is KL(plain || ablated), in nats."""


@dataclass(frozen=True, eq=False)
class AblationStudy:
    """What :func:`ablation_study` found.

    Args:
        components: their names, in forward order.
        ablations: what each of them put in the place of a component, in words.
        measures: those of MEASURES that were taken.
        mean, low, high: of each effect over examples, and its confidence interval, [component, ablation, measure];
            nan where there is none.
        result: all of it as plain JSON values, as ``analyse_causal`` gives it.
    """

    components: tuple[str, ...]
    ablations: Mapping[str, str]
    measures: tuple[str, ...]
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    result: Mapping[str, Any]

    @property
    def measure(self) -> str:
        """The one by which components are ranked: the logit difference where there are wrong answers, else the loss."""
        return MEASURES[2] if MEASURES[2] in self.measures else MEASURES[0]

    @property
    def notes(self) -> list[str]:
        """What is to be known when reading it."""
        return list(self.result["notes"])

    def effect(self, component: str, ablation: str | None = None, measure: str | None = None) -> Estimate:
        """The effect of ablating one component.

        Args:
            ablation: None for the first.
            measure: None for ``measure``.

        Raises:
            HookError: for one that was not studied.
        """
        ablation, measure = self._checked("ablation", ablation), self._checked("measure", measure)
        if component not in self.components:
            raise HookError(
                f"{component!r} was not ablated. There are: {', '.join(self.components)}.", field="component"
            )
        found = self.result["components"][self.components.index(component)]
        return Estimate(**found["ablations"][ablation][measure])

    def strongest(
        self, n: int | None = None, ablation: str | None = None, measure: str | None = None
    ) -> list[tuple[str, Estimate]]:
        """Components with their effects, the greatest first, whatever their signs; arguments as of ``effect``.

        Args:
            n: so many at most; None for all.

        Raises:
            HookError: as ``effect``, and for an n below 0.
        """
        if n is not None and (type(n) is not int or n < 0):
            raise HookError(f"n is a whole number from 0 on, or None, got {n!r}.", field="n")
        found = [(name, self.effect(name, ablation, measure)) for name in self.components]
        return sorted(found, key=lambda each: -abs(each[1].mean or 0.0))[:n]

    def _checked(self, what: str, given: str | None) -> str:
        known = list(self.ablations) if what == "ablation" else [self.measure, *self.measures]
        if given is not None and given not in known:
            raise HookError(f"{what} is one of {', '.join(dict.fromkeys(known))}, got {given!r}.", field=what)
        return known[0] if given is None else given

    def draw(self) -> "list[tuple[str, Figure]]":
        """Pictures: all components by each ablation, and the strongest with their intervals."""
        return draw_causal(dict(self.result))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(self.result)


def ablation_study(
    model: HookedModel, eval_data: Any, options: CausalOptions | dict | None = None, progress: Progress = None
) -> AblationStudy:
    """Ablate every component on its own, by zeros, by its mean and by resampling, and tell what that costs.

    Args:
        eval_data: see :func:`eval_data_of`. Of prompts with ``corrupted`` partners resampling takes these.
        progress: called with the passes that are done, and how many there are.

    Raises:
        HookError: for no eval data, and for components that the model does not have.
    """
    found = analyse_causal(model, eval_data, options, progress)
    measures = tuple(name for name in MEASURES if name != MEASURES[2] or found["eval_data"]["wrong_answers"])

    def numbers(end: str) -> np.ndarray:
        return np.array(
            [
                [[own["ablations"][ablation][name][end] for name in measures] for ablation in found["ablations"]]
                for own in found["components"]
            ],
            dtype=np.float64,
        )

    names = tuple(own["component"] for own in found["components"])
    return AblationStudy(names, found["ablations"], measures, numbers("mean"), numbers("low"), numbers("high"), found)


@dataclass(frozen=True, eq=False)
class EdgeAblations:
    """What :func:`ablate_edges` found.

    Args:
        sets: the edges of each set, by its name.
        changes: the metric with a set replaced less the plain one, by its name.
        shares: of what replacing all edges costs, by its name: 1 is everything; no mean where that is nothing.
        values: the metric with each set replaced [set, example].
        plain: the metric of the model as it is.
        metric: its name.
        ablation: a key of ``edge_runs.ABLATIONS``; ``replaced_by`` is the same in words.
        confidence: of the intervals.
        notes: what is to be known when reading it.
    """

    sets: Mapping[str, tuple[str, ...]]
    changes: Mapping[str, Estimate]
    shares: Mapping[str, Estimate]
    values: np.ndarray
    plain: Estimate
    metric: str
    ablation: EdgeAblation
    replaced_by: str
    confidence: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "sets": [
                {
                    "set": name,
                    "edges": list(edges),
                    "change": self.changes[name].to_dict(),
                    "share": self.shares[name].to_dict(),
                }
                for name, edges in self.sets.items()
            ],
            "plain": self.plain.to_dict(),
            "metric": self.metric,
            "ablation": self.ablation,
            "replaced_by": self.replaced_by,
            "confidence": self.confidence,
            "notes": list(self.notes),
        }


def ablate_edges(
    model: HookedModel | EdgeRuns,
    sets: Iterable[str] | Mapping[str, Collection[str] | Circuit],
    eval_data: Any = None,
    options: RunOptions | dict | None = None,
    progress: Progress = None,
) -> EdgeAblations:
    """Replace sets of edges, each on its own, and tell what that does to the metric; exact.

        ablate_edges(model, {"name movers": ["L3H0->logits", "L3H2->logits"], "found": circuit}, prompts)

    Args:
        model: a model, or its edge runs, which bring their own data, ablation and metric.
        sets: lists of edges, or circuits, by names of your own; or a list of edges, each of them a set. A node's name
            stands for all edges that lead away from it, "L1 attn" for those of all heads, "L1" for those of the layer.
        eval_data: see :func:`eval_data_of`.
        progress: called with the passes that are done, and how many there are.

    Raises:
        HookError: for no sets, an empty one, nodes or edges that the model does not have, and options that are not
            those of the edge runs.
    """
    chosen = options_of(RunOptions, options)
    runs = runs_of(model, eval_data, chosen)
    named = sets if isinstance(sets, Mapping) else {_name(each): (each,) for each in _names(sets)}
    if not named:
        raise HookError("Name at least one edge or node to ablate.", field="sets")
    edges = {str(name): _edges(runs, name, given) for name, given in named.items()}
    passes = Passes(progress, runs.n_passes(len(edges), levels=("plain", "ablated")))
    values = runs.without(list(edges.values()), passes)
    plain, nothing = runs.level("plain", passes), runs.level("ablated", passes)
    off = (values - plain).T
    shares = ratios(off, nothing - plain, **chosen.of_intervals)
    return EdgeAblations(
        sets=edges,
        changes=dict(zip(edges, means(off, **chosen.of_intervals), strict=True)),
        shares=dict(zip(edges, shares, strict=True)),
        values=values,
        plain=means(plain[:, None], **chosen.of_intervals)[0],
        metric=runs.metric.name,
        ablation=runs.ablation,
        replaced_by=replaced_by(runs.ablation, runs.mean_over),
        confidence=chosen.confidence,
        notes=tuple(few(len(plain))),
    )


def _names(sets: Any) -> list[str | Edge]:
    is_list = isinstance(sets, Iterable) and not isinstance(sets, str | Circuit)
    found: list[Any] = list(sets) if is_list else []
    wrong = [f"{type(each).__name__} in a list" for each in found if not isinstance(each, str | Edge)]
    if wrong or not is_list:
        raise HookError(
            "sets is a list of edges and nodes, or a mapping from names to such lists or circuits; got "
            f"{wrong[0] if wrong else type(sets).__name__}.",
            field="sets",
        )
    return found


def _name(edge: str | Edge) -> str:
    return edge.name if isinstance(edge, Edge) else edge


def _edges(runs: EdgeRuns, name: str, given: Any) -> tuple[str, ...]:
    """The names of a set's edges, in forward order."""
    asked = list(given.edges) if isinstance(given, Circuit) else _names(given)
    if not asked:
        raise HookError(f"The set {name!r} has no edges.", field="sets")
    found: list[str | Edge] = []
    for each in asked:
        if isinstance(each, str) and ARROW not in each:
            nodes = nodes_of(runs.graph, each, "sets")
            found += [edge.name for edge in runs.graph.edges if edge.source in nodes]
        else:
            found.append(each)
    return tuple(edge.name for edge in runs.graph.edges_of(found))
