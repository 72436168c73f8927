"""How well edge scores tell the edges of a known circuit from the others, and the controls that have to fail.

The area under the ROC curve (AUC) is the chance that an edge of the circuit has a greater score, whatever its sign,
than another edge; a tie counts half. 1 is all right, 0.5 is guessing. Edges to which there is no alternative say
nothing about a method and are left out.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import HookError
from ..eval_data import NOTHING, EvalData, EvalExample
from .circuit import is_finite, scores_in
from .model_graph import Edge, ModelGraph, edge_name

SEEDS = 100
"""Over which random controls are averaged."""

Names = Collection[str | Edge]
"""Edges, or their names, here or in the EAP library."""


@dataclass(frozen=True)
class Chance:
    """A control's number over several seeds.

    Args:
        mean: of an AUC without knowledge, about 0.5.
        low, high: the least and the greatest.
    """

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Plain JSON values."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


def edge_auc(scores: Any, true: Names, forced: Names = ()) -> float:
    """The area under the ROC curve of edge scores.

        edge_auc({"embed->L0H0<q>": 0.1, "L0H0->L1H0<k>": -2.0, ...}, true={"L0H0->L1H0<k>"})

    Args:
        scores: by edges or their names; or what has ``edges`` and ``values`` (edge scores), or a circuit with scores.
        true: the edges of the known circuit, or their names. Names may be those of the EAP library.
        forced: edges to which there is no alternative; they are left out.

    Raises:
        HookError: for what is no scores, true or forced edges that have none, and where all edges that are left are
            true, or none.
    """
    sizes, labels = _labelled(scores, true, forced)
    return _auc(sizes, labels)


def chance_auc(scores: Any, true: Names, forced: Names = (), seeds: int = SEEDS) -> Chance:
    """The control: the AUC with random numbers in the place of the scores. Arguments as of :func:`edge_auc`."""
    sizes, labels = _labelled(scores, true, forced)
    rngs = _generators(seeds)
    return _chance([_auc(rng.random(len(sizes)), labels) for rng in rngs])


def permuted_auc(scores: Any, true: Names, forced: Names = (), seeds: int = SEEDS) -> Chance:
    """The control: the AUC with as many edges drawn at random called true. Arguments as of :func:`edge_auc`."""
    sizes, labels = _labelled(scores, true, forced)
    rngs = _generators(seeds)
    return _chance([_auc(sizes, rng.permutation(labels)) for rng in rngs])


def permuted_answers(data: EvalData, seed: int = 0) -> EvalData:
    """The control: each prompt asked for another's answer, and compared with that one's wrong answer.

    A circuit for the task then has nothing to answer: the metric is about what it is with all edges replaced. Where
    answers repeat, another's may be the same as the own one, as often as chance has it; :func:`share_kept` says how
    often. To rule these out would be no control: of few answers, the others are the opposite of the own one.

    Raises:
        HookError: for texts, and for fewer than two prompts.
    """
    if data.kind != "answers" or len(data) < 2:
        raise HookError("Answers are permuted among at least two prompts with answers.", field="eval_data")
    order = np.random.default_rng(seed).permutation(len(data))
    # Each is asked for the answer of the next in a random circle: nobody for that of the own prompt.
    donor = dict(zip(order.tolist(), np.roll(order, -1).tolist(), strict=True))
    examples = tuple(_asked_as(example, data.examples[donor[i]]) for i, example in enumerate(data.examples))
    return replace(data, examples=examples)


def share_kept(data: EvalData, permuted: EvalData) -> float:
    """Of how many prompts the answer is the same in both, as a share."""
    pairs = zip(data.examples, permuted.examples, strict=True)
    return float(np.mean([_answer(one) == _answer(other) for one, other in pairs]))


def _answer(example: EvalExample) -> int:
    return next(target for target in reversed(example.targets) if target != NOTHING)


def _asked_as(example: EvalExample, other: EvalExample) -> EvalExample:
    answer = _answer(other)
    targets = tuple(NOTHING if target == NOTHING else answer for target in example.targets)
    return replace(example, targets=targets, wrong=other.wrong)


def scores_by_name(scores: Any) -> dict[str, float]:
    """Scores by the edges' names, from what :func:`edge_auc` takes.

    Raises:
        HookError: for edges without a score, and scores that are not finite.
    """
    given: Mapping[Any, Any] = scores if isinstance(scores, Mapping) else scores_in(scores)
    found: dict[str, float] = {}
    for edge, score in given.items():
        if not isinstance(edge, str | Edge):
            raise HookError(f"scores are by edges or their names, got {edge!r:.100}.", field="scores")
        name = _named(edge, scores)
        if not is_finite(score):
            raise HookError(f"Every edge needs a finite score; {name} has none.", field="scores")
        if name in found:
            raise HookError(f"Every edge has one score; {name} has two.", field="scores")
        found[name] = float(score)
    return found


def _labelled(scores: Any, true: Names, forced: Names) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of scores, and whether the edges are true, [edge] of those that are not forced."""
    found = scores_by_name(scores)
    of_circuit, without = _names("true", true, scores), _names("forced", forced, scores)
    unknown = sorted((of_circuit | without) - set(found))
    if unknown:
        raise HookError(f"There is no score of the edge {unknown[0]!r}.", field="scores")
    free = [name for name in found if name not in without]
    labels = np.array([name in of_circuit for name in free])
    if labels.all() or not labels.any():
        which = "all" if len(labels) and labels.all() else "none"
        raise HookError(
            f"An AUC needs edges of the circuit and others: of {len(free)}, {which} are true.", field="true"
        )
    return np.abs([found[name] for name in free]), labels


def _named(edge: str | Edge, scores: Any) -> str:
    """An edge's name; k and v of a query head are those of its key-value head where the scores know their graph."""
    graph, name = getattr(scores, "graph", None), edge_name(edge)
    return graph.edge(name).name if isinstance(graph, ModelGraph) else name


def _names(field: str, given: Names, scores: Any) -> set[str]:
    if isinstance(given, str) or not isinstance(given, Collection) or not all(isinstance(e, str | Edge) for e in given):
        raise HookError(f"{field} is a collection of edges or their names, got {given!r:.100}.", field=field)
    return {_named(each, scores) for each in given}


def _auc(sizes: np.ndarray, labels: np.ndarray) -> float:
    """By ranks, which is the same (Mann and Whitney's U): quick enough for many controls."""
    from scipy.stats import rankdata

    n_true = int(labels.sum())
    above = rankdata(sizes)[labels].sum() - n_true * (n_true + 1) / 2
    return float(above / (n_true * (len(labels) - n_true)))


def _generators(seeds: int) -> list[np.random.Generator]:
    if type(seeds) is not int or seeds < 1:
        raise HookError(f"seeds is a whole number from 1 on, got {seeds!r}.", field="seeds")
    return [np.random.default_rng(seed) for seed in range(seeds)]


def _chance(found: list[float]) -> Chance:
    return Chance(float(np.mean(found)), float(min(found)), float(max(found)))
