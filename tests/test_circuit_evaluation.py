"""How edge scores are held against a known circuit, and that the controls fail."""

import re
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.circuits.circuit import Circuit
from mlx_hooks.analysis.circuits.edge_attribution import attribute_edges
from mlx_hooks.analysis.circuits.evaluation import chance_auc, edge_auc, permuted_answers, permuted_auc, share_kept
from mlx_hooks.analysis.circuits.model_graph import Edge
from mlx_hooks.analysis.eval_data import NOTHING, EvalData, EvalExample

EDGES = [f"embed->L0H{head}<{kind}>" for head in range(20) for kind in "qkv"]
TRUE = EDGES[:12]


def scored(values: np.ndarray) -> dict[str, float]:
    return dict(zip(EDGES, values.tolist(), strict=True))


def chance_of_being_greater(scores: dict[str, float], true: list[str]) -> float:
    """What an AUC is, counted pair by pair."""
    pairs = [(abs(scores[a]), abs(scores[b])) for a in true for b in scores if b not in true]
    return float(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]))


def test_the_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    # Few different numbers: many ties; half of them negative.
    scores = scored(rng.integers(-3, 4, len(EDGES)).astype(float))
    assert edge_auc(scores, TRUE) == pytest.approx(chance_of_being_greater(scores, TRUE))
    assert 0.3 < edge_auc(scores, TRUE) < 0.7
    sizes, labels = np.abs(list(scores.values())), [edge in TRUE for edge in EDGES]
    assert edge_auc(scores, TRUE) == pytest.approx(roc_auc_score(labels, sizes))


def test_perfect_scores_have_1_and_the_sign_does_not_matter() -> None:
    values = np.array([-2.0 if edge in TRUE else 1.0 for edge in EDGES])
    assert edge_auc(scored(values), TRUE) == 1
    assert edge_auc(scored(1 / values), TRUE) == 0
    assert edge_auc(scored(np.zeros(len(EDGES))), TRUE) == 0.5


def test_forced_edges_are_left_out() -> None:
    values = np.array([2.0 if edge in TRUE else 1.0 for edge in EDGES])
    values[0], values[-1] = 0.0, 5.0
    assert edge_auc(scored(values), TRUE) < 1
    assert edge_auc(scored(values), TRUE, forced=[EDGES[0], EDGES[-1]]) == 1


def test_edges_stand_for_their_names() -> None:
    scores, true = scored(np.arange(len(EDGES), dtype=float)), [Edge(*name.split("->")) for name in TRUE]
    assert edge_auc(scores, true, forced=true[:3]) == edge_auc(scores, TRUE, forced=TRUE[:3])
    assert chance_auc(scores, true) == chance_auc(scores, TRUE)
    assert permuted_auc(scores, true) == permuted_auc(scores, TRUE)


def test_scores_by_edges_and_by_the_eap_librarys_names_are_the_same() -> None:
    scores = scored(np.arange(len(EDGES), dtype=float)[::-1] % 7)
    theirs = {name.replace("embed", "input").replace("L0H", "a0.h"): score for name, score in scores.items()}
    by_edge = {Edge(*name.split("->")): score for name, score in scores.items()}
    true = list(theirs)[:12]
    for given in (scores, theirs, by_edge):
        assert edge_auc(given, true, forced=list(theirs)[:2]) == edge_auc(scores, TRUE, forced=TRUE[:2])
    with pytest.raises(HookError, match=re.escape("Every edge has one score; embed->L0H0<q> has two.")):
        edge_auc(scores | theirs, TRUE)


def test_scores_that_know_their_graph_read_the_key_value_heads_of_query_heads(llama: HookedModel) -> None:
    found = attribute_edges(llama, [[1, 2, 3]], {"method": "random", "ablation": "zero"})
    true = ["L0H1->L1KV1<k>", "L1 mlp->logits"]
    assert edge_auc(found, ["a0.h1->a1.h3<k>", "m1->logits"]) == edge_auc(found, true)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (5, "scores are edge scores, an ACDC result or a circuit, got int."),
        ([("a", 1.0)], "scores are edge scores, an ACDC result or a circuit, got list."),
        ({5: 1.0}, "scores are by edges or their names, got 5."),
        ({"a": "x"}, "Every edge needs a finite score; a has none."),
    ],
)
def test_what_is_no_scores_is_refused(scores: Any, message: str) -> None:
    with pytest.raises(HookError, match=re.escape(message)) as caught:
        edge_auc(scores, ["a"])
    assert caught.value.field == "scores"


@pytest.mark.parametrize("seeds", [0, -1, 2.0, True])
def test_controls_take_at_least_one_seed(seeds: Any) -> None:
    for control in (chance_auc, permuted_auc):
        with pytest.raises(HookError, match="seeds is a whole number from 1 on, got "):
            control(scored(np.arange(len(EDGES), dtype=float)), TRUE, seeds=seeds)


def test_scores_are_read_from_a_circuit() -> None:
    circuit = Circuit({"embed->logits": 1.0, "embed->L0H0<v>": -2.0}, {"L0H0<v>": ("L0H0",)})
    assert edge_auc(circuit, {"embed->L0H0<v>"}) == 1


def test_the_controls_are_about_one_half() -> None:
    perfect = scored(np.array([2.0 if edge in TRUE else 1.0 for edge in EDGES]) + np.linspace(0, 0.1, len(EDGES)))
    for control in (chance_auc(perfect, TRUE, seeds=50), permuted_auc(perfect, TRUE, seeds=50)):
        assert control.mean == pytest.approx(0.5, abs=0.04)
        assert 0.2 < control.low < control.mean < control.high < 0.8
    assert chance_auc(perfect, TRUE) == chance_auc(perfect, TRUE)


@pytest.mark.parametrize(
    ("true", "forced", "message"),
    [
        ([], [], "An AUC needs edges of the circuit and others: of 60, none are true."),
        (EDGES, [], "An AUC needs edges of the circuit and others: of 60, all are true."),
        (TRUE, TRUE, "of 48, none are true"),
        (None, [], "true is a collection of edges or their names, got None."),
        ([1], [], "true is a collection of edges or their names, got [1]."),
        (TRUE, 5, "forced is a collection of edges or their names, got 5."),
        (EDGES[0], [], "true is a collection of edges or their names, got 'embed->L0H0<q>'."),
        (["L9H9->logits"], [], "There is no score of the edge 'L9H9->logits'."),
        (TRUE, ["L9H9->logits"], "There is no score of the edge 'L9H9->logits'."),
    ],
)
def test_what_has_no_auc_is_refused(true: list[str], forced: list[str], message: str) -> None:
    with pytest.raises(HookError, match=re.escape(message)):
        edge_auc(scored(np.ones(len(EDGES))), true, forced)


@pytest.mark.parametrize("score", [None, float("nan")])
def test_edges_without_a_score_are_refused(score: float | None) -> None:
    with pytest.raises(HookError, match="Every edge needs a finite score; embed->L0H0<q> has none."):
        edge_auc({**scored(np.ones(len(EDGES))), EDGES[0]: score}, TRUE)


def test_everyone_is_asked_for_somebody_elses_answer() -> None:
    asked = [EvalExample((1, 2), (NOTHING, 10 + i), (1, 3), 20 + i) for i in range(5)]
    made = permuted_answers(EvalData(tuple(asked), "answers"), seed=3)
    pairs = [(example.targets[-1] - 10, example.wrong - 20) for example in made.examples]
    assert all(answer == wrong != i for i, (answer, wrong) in enumerate(pairs))
    assert sorted(answer for answer, _ in pairs) == [0, 1, 2, 3, 4]
    assert [example.tokens for example in made.examples] == [example.tokens for example in asked]
    assert all(example.targets[0] == NOTHING for example in made.examples)
    for data in (EvalData((asked[0],), "answers"), EvalData((asked[0], asked[1]), "texts")):
        with pytest.raises(HookError, match="Answers are permuted among at least two prompts with answers."):
            permuted_answers(data)


def test_it_is_told_how_many_keep_their_answer_by_chance() -> None:
    answers = [5] * 12 + [6] * 12
    data = EvalData(tuple(EvalExample((1, 2), (NOTHING, each), (1, 3), 11 - each) for each in answers), "answers")
    made = [permuted_answers(data, seed) for seed in range(40)]
    for each in made:
        same = [a.targets == b.targets for a, b in zip(data.examples, each.examples, strict=True)]
        assert share_kept(data, each) == sum(same) / 24
    # Of the 23 others 11 have the same answer.
    assert np.mean([share_kept(data, each) for each in made]) == pytest.approx(11 / 23, abs=0.05)
    # The seed draws.
    assert len({each.examples for each in made}) > 30
    assert permuted_answers(data, 3) == made[3]
