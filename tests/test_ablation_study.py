"""Ablation studies: of components through interventions, of edges through edge runs; where both can, they agree."""

from typing import Any

import numpy as np
import pytest

from mlx_hooks import HookedModel
from mlx_hooks.analysis.circuits.ablation_study import MEASURES, AblationStudy, ablate_edges, ablation_study
from mlx_hooks.analysis.circuits.circuit import Circuit
from mlx_hooks.analysis.circuits.edge_runs import EdgeRuns
from mlx_hooks.analysis.circuits.groups import replace_groups
from mlx_hooks.analysis.known_models import KNOWN_MODELS, KnownModel
from mlx_hooks.errors import HookError


@pytest.fixture(scope="module")
def known() -> KnownModel:
    return KNOWN_MODELS["ioi"]()


@pytest.fixture(scope="module")
def model(known: KnownModel) -> HookedModel:
    return known.hooked()


@pytest.fixture(scope="module")
def study(known: KnownModel, model: HookedModel) -> AblationStudy:
    return ablation_study(model, known.pairs(12), {"components": ["heads"], "mean_over": "position"})


def test_a_study_says_what_it_put_in_and_how_far_off_it_may_be(study: AblationStudy) -> None:
    assert study.ablations == {
        "zero": "zeros",
        "mean": "the component's mean over all examples, position by position",
        "resample": "what the component is on the example's corrupted partner",
    }
    assert study.measures == MEASURES
    assert study.measure == "logit_difference_change"
    assert study.mean.shape == study.low.shape == study.high.shape == (len(study.components), 3, 3)
    assert (study.low <= study.mean).all()
    assert (study.mean <= study.high).all()
    effect = study.effect("L2H2", "resample", "kl")
    at = study.components.index("L2H2"), list(study.ablations).index("resample"), study.measures.index("kl")
    assert (effect.mean, effect.low, effect.high) == (study.mean[at], study.low[at], study.high[at])
    assert effect.n == 12
    assert study.to_dict()["components"][0]["component"] == study.components[0]


def test_only_the_heads_of_the_circuit_cost_anything(study: AblationStudy, known: KnownModel) -> None:
    heads = {f"L{layer}H{head}" for layer, head in known.circuit_heads}  # type: ignore[attr-defined]
    for ablation in study.ablations:
        ranked = study.strongest(ablation=ablation)
        assert {name for name, _ in ranked[:3]} == heads
        assert [effect.mean for _, effect in ranked[3:]] == pytest.approx([0] * (len(ranked) - 3), abs=1e-4)
        sizes = [abs(effect.mean or 0) for _, effect in ranked]
        assert sizes == sorted(sizes, reverse=True)
        assert study.strongest(2, ablation) == ranked[:2]
    for wrong in (-1, "x", 1.0, True):
        with pytest.raises(HookError, match="n is a whole number from 0 on, or None, got "):
            study.strongest(wrong)  # type: ignore[arg-type]
    assert [title for title, _ in study.draw()] == ["One component at a time", "The strongest effects"]


def test_what_was_not_studied_is_refused(study: AblationStudy) -> None:
    for arguments, message in [
        (("L7H0",), "'L7H0' was not ablated. There are: L0H0, L0H1"),
        (("L0H0", "noise"), "ablation is one of zero, mean, resample, got 'noise'"),
        (("L0H0", "zero", "loss"), "measure is one of logit_difference_change, loss_change, kl, got 'loss'"),
    ]:
        with pytest.raises(HookError, match=message):
            study.effect(*arguments)


@pytest.mark.parametrize(("ablation", "carried"), [("resample", "corrupted"), ("mean", "mean"), ("zero", "zero")])
def test_a_node_is_all_edges_that_lead_away_from_it(
    ablation: str, carried: Any, study: AblationStudy, known: KnownModel, model: HookedModel
) -> None:
    found = ablate_edges(model, study.components, known.pairs(12), {"ablation": carried})
    assert found.metric == "logit_difference"
    for name in study.components:
        by_hand = study.effect(name, ablation)
        for end in ("mean", "low", "high"):
            assert getattr(found.changes[name], end) == pytest.approx(getattr(by_hand, end), abs=1e-4)


def test_sets_of_edges_are_replaced_together(known: KnownModel, model: HookedModel) -> None:
    runs = EdgeRuns(model, known.pairs(6), ablation="corrupted")
    true = sorted(known.edges())
    circuit = Circuit.of_edges(runs, true, connected=False)
    every = [edge.name for edge in runs.graph.edges]
    found = ablate_edges(runs, {"one": [true[0]], "circuit": circuit, "all": every, "rest": set(every) - set(true)})
    np.testing.assert_allclose(found.values, runs.without([[true[0]], true, every, list(set(every) - set(true))]))
    assert found.sets["circuit"] == tuple(circuit.edges)
    assert found.shares["all"].mean == pytest.approx(1)
    assert found.shares["circuit"].mean == pytest.approx(1, abs=1e-4)
    assert found.shares["rest"].mean == pytest.approx(0, abs=1e-4)
    assert found.changes["all"].mean == pytest.approx((runs.ablated - runs.plain).mean())
    assert found.plain.mean == pytest.approx(runs.plain.mean())
    plain = found.to_dict()
    assert plain["sets"][0]["edges"] == [true[0]]
    assert plain["replaced_by"] == "what the source writes on the example's corrupted partner"
    assert plain["notes"] == ["Confidence intervals of fewer than 20 examples, here 6, are too narrow."]


def test_names_of_layers_and_of_the_eap_library_are_read(known: KnownModel, model: HookedModel) -> None:
    runs = EdgeRuns(model, known.pairs(3), ablation="corrupted")
    found = ablate_edges(runs, ["L1 attn", "L1", "a0.h1", "a0.h1->a1.h0<k>"]).sets
    heads = tuple(edge.name for edge in runs.graph.edges if edge.source in ("L1H0", "L1H1", "L1H2"))
    assert found["L1 attn"] == found["L1"] == heads
    assert found["a0.h1"] == tuple(edge.name for edge in runs.graph.edges if edge.source == "L0H1")
    assert found["a0.h1->a1.h0<k>"] == ("L0H1->L1H0<k>",)


def test_options_that_are_not_those_of_the_edge_runs_are_refused(known: KnownModel, model: HookedModel) -> None:
    runs = EdgeRuns(model, known.pairs(3), ablation="corrupted")
    with pytest.raises(HookError, match="Edge runs have their own ablation, here 'corrupted': give it to them"):
        ablate_edges(runs, ["L1H0"], None, {"ablation": "zero"})


def test_what_is_put_in_groups_is_one_of_four(known: KnownModel, model: HookedModel) -> None:
    with pytest.raises(HookError, match="putting is one of zero, mean, resample, clean, got 'bogus'"):
        replace_groups(model, known.pairs(2), [["L1H0"]], "bogus")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("groups", "message", "field"),
    [
        (None, "groups is a list of lists of components, got None", "groups"),
        ("L1H0", "groups is a list of lists of components, got 'L1H0'", "groups"),
        ([5], "A group is a list of names of components, got 5", "groups[0]"),
        (["L1H0"], "A group is a list of names of components, got 'L1H0'", "groups[0]"),
        ([["L1H0"], [None]], r"A group is a list of names of components, got \[None\]", "groups[1]"),
    ],
)
def test_groups_are_lists_of_names(
    groups: Any, message: str, field: str, known: KnownModel, model: HookedModel
) -> None:
    with pytest.raises(HookError, match=message) as caught:
        replace_groups(model, known.pairs(2), groups)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([], "Name at least one edge or node to ablate"),
        ({"none": []}, "The set 'none' has no edges"),
        (["L9H0"], "There is no node 'L9H0'. There are: embed, L0H0"),
        (["L9H0->logits"], "has no node 'L9H0'"),
        ("L0H0", "sets is a list of edges and nodes, or a mapping from names .* got str"),
        (3, "got int"),
        ([[]], "got list in a list"),
        ({"one": ["embed->logits", 3]}, "got int in a list"),
        (np.array([["L0H0"]]), "got ndarray in a list"),
    ],
)
def test_bad_sets_are_one_sentence(sets: Any, message: str, known: KnownModel, model: HookedModel) -> None:
    with pytest.raises(HookError, match=message):
        ablate_edges(model, sets, known.pairs(3))
