"""How far a circuit is the model: faithfulness, completeness, curves, and the smallest that will do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from circuit_graphs import Graph, Runs

from mlx_hooks import HookedModel
from mlx_hooks.analysis.circuits import circuit as circuit_module
from mlx_hooks.analysis.circuits.ablation_study import ablate_edges
from mlx_hooks.analysis.circuits.circuit import Circuit
from mlx_hooks.analysis.circuits.edge_attribution import attribute_edges
from mlx_hooks.analysis.circuits.edge_runs import EdgeRuns
from mlx_hooks.analysis.circuits.evaluation import edge_auc
from mlx_hooks.analysis.circuits.finding import find_circuit
from mlx_hooks.analysis.circuits.metrics import Metric
from mlx_hooks.analysis.circuits.pruning import acdc, acdc_sweep
from mlx_hooks.analysis.circuits.validation import (
    FRACTIONS,
    ValidationOptions,
    faithfulness_curve,
    runs_of,
    smallest_circuit,
    validate_circuit,
)
from mlx_hooks.analysis.eval_data import EvalBatch
from mlx_hooks.analysis.known_models import KNOWN_MODELS
from mlx_hooks.errors import HookError

GRAPH = Graph(2, 2)
COSTS = {"embed->L0H1<v>": 1.0, "L0H1->L1H0<k>": 2.0, "embed->L1H0<v>": 0.5, "L1H0->logits": 3.0, "embed->logits": 3.5}


def losing(graph: Graph = GRAPH, n_examples: int = 6) -> Runs:
    """Each replaced edge costs the metric something, of the last example most."""
    return Runs(
        graph, lambda gone: [20 - e * sum(COSTS.get(name, 0) for name in gone) for e in range(1, n_examples + 1)]
    )


def scores_of(values: dict[str, float], graph: Graph = GRAPH) -> SimpleNamespace:
    edges = [edge.name for edge in graph.edges]
    return SimpleNamespace(edges=edges, values=np.array([values.get(name, 0.0) for name in edges]), method="made up")


def test_faithfulness_and_completeness_are_shares_of_what_replacing_all_edges_costs() -> None:
    runs = losing()
    circuit = Circuit.of_edges(GRAPH, ["embed->L0H1<v>", "L0H1->L1H0<k>", "L1H0->logits"])
    found = validate_circuit(runs, circuit)  # type: ignore[arg-type]
    # 6 of 10 in all.
    assert found.faithfulness.mean == pytest.approx(0.6)
    assert found.completeness.mean == pytest.approx(0.6)
    assert found.complement.mean == pytest.approx(0.4)
    assert found.plain.mean == 20
    assert found.ablated.mean == pytest.approx(20 - 35)
    np.testing.assert_allclose(found.kept, [20 - 4 * e for e in range(1, 7)])
    np.testing.assert_allclose(found.removed, [20 - 6 * e for e in range(1, 7)])
    assert found.faithfulness.low == pytest.approx(0.6)
    assert (found.n_edges, found.edges_of_model) == (3, len(GRAPH.edges))
    assert found.notes == ("Confidence intervals of fewer than 20 examples, here 6, are too narrow.",)
    plain = found.to_dict()
    assert plain["replaced_by"] == "what the source writes on the example's corrupted partner"
    assert plain["random"]["circuits"] == 10
    assert circuit.validate(runs).to_dict() == plain  # type: ignore[arg-type]


def test_random_circuits_are_as_large_and_lead_to_logits() -> None:
    sets: list[frozenset[str]] = []

    class Watched(Runs):
        def without(self, some: Any, progress: Any = None) -> np.ndarray:
            sets.extend(map(frozenset, some))
            return super().without(some, progress)

    runs = Watched(GRAPH, losing().score)
    circuit = Circuit.of_edges(GRAPH, ["embed->L0H1<v>", "L0H1->L1H0<k>", "L1H0->logits"])
    sets.clear()
    found = validate_circuit(runs, circuit, options={"random_circuits": 7})  # type: ignore[arg-type]
    every = frozenset(edge.name for edge in GRAPH.edges)
    own, complement, *others = sets
    assert own == frozenset(circuit.edges) == every - complement
    drawn = [every - outside for outside in others]
    assert len(set(drawn)) == 7
    assert own not in drawn
    for some in drawn:
        assert len(some) == 3
        whole = Circuit.of_edges(GRAPH, some, connected=False)
        leads = {"logits"} | {source for source, to, _ in whole.steps}
        assert {to for _, to, _ in whole.steps} <= leads
        assert any(name.endswith("->logits") for name in some)
    expected = [sum(COSTS.get(name, 0) for name in some) / 10 for some in drawn]
    assert list(found.random) == pytest.approx(expected)
    assert found.random_mean == pytest.approx(np.mean(expected))
    assert validate_circuit(runs, circuit, options={"random_circuits": 0}).random_mean is None  # type: ignore[arg-type]


def test_no_random_circuit_is_the_circuit_or_another_one_again() -> None:
    graph = Graph(1, 1, mlp=False)
    runs = Runs(graph, lambda gone: [-float("embed->logits" in gone) - 3 * float("L0H0->logits" in gone)])
    circuit = Circuit.of_edges(graph, ["embed->logits"])
    # Of one edge that leads to logits there is only one other.
    assert validate_circuit(runs, circuit).random == (0.75,)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(5))
def test_the_circuit_itself_is_not_drawn(seed: int) -> None:
    graph = Graph(1, 1, mlp=False)
    # Of two edges that lead to logits there are four sets, the circuit among them.
    circuit = Circuit.of_edges(graph, ["embed->logits", "L0H0->logits"], connected=False)
    runs = Runs(graph, lambda gone: [-float(len(gone & set(circuit.edges)))])
    found = validate_circuit(runs, circuit, options={"seed": seed})  # type: ignore[arg-type]
    assert found.faithfulness.mean == 1
    assert found.random == (0.5, 0.5, 0.5)


def test_a_metric_that_nothing_changes_judges_no_circuit() -> None:
    runs = Runs(GRAPH, lambda gone: [1.0, 2.0])
    circuit = Circuit.of_edges(GRAPH, ["embed->logits"])
    with pytest.raises(HookError, match="with all edges replaced the metric made up is what it is without"):
        validate_circuit(runs, circuit)  # type: ignore[arg-type]
    with pytest.raises(HookError, match="what it is without"):
        smallest_circuit(runs, scores_of({}))  # type: ignore[arg-type]


def test_what_may_be_of_either_sign_has_no_interval_and_says_so() -> None:
    runs = Runs(GRAPH, lambda gone: [each * float("embed->logits" in gone) for each in (-3, 1, 2, -1, 2)])
    found = validate_circuit(runs, Circuit.of_edges(GRAPH, ["embed->logits"]))  # type: ignore[arg-type]
    assert found.faithfulness.mean == 1
    assert found.faithfulness.low is None
    assert found.notes[1].startswith("By these examples the metric may be the same with all edges replaced")
    assert found.notes[2] == "The model does worse than with all edges replaced: the circuit is one of doing worse."


def test_a_curve_rises_with_the_strongest_edges() -> None:
    runs = losing()
    curve = faithfulness_curve(runs, scores_of(COSTS), range(8))  # type: ignore[arg-type]
    n = len(GRAPH.edges)
    # embed->logits, then L1H0->logits, which nothing leads to before the third: L0H1->L1H0<k> needs the fourth.
    assert curve.sizes.tolist() == [*range(8), n]
    assert curve.edges.tolist()[:6] == [0, 1, 1, 1, 4, 5]
    assert curve.faithfulness.tolist()[:6] == pytest.approx([0, 0.35, 0.35, 0.35, 0.95, 1.0])
    assert curve.values.shape == (9, 6)
    heights, at = curve.faithfulness, curve.edges / n
    assert curve.cpr == pytest.approx(np.trapezoid(heights, at) if hasattr(np, "trapezoid") else np.trapz(heights, at))
    assert curve.cmd == pytest.approx(1 - curve.cpr)
    assert faithfulness_curve(runs, scores_of(COSTS)).sizes.tolist() == sorted(  # type: ignore[arg-type]
        {0, n, *(max(1, round(share * n)) for share in FRACTIONS)}
    )
    for wrong in ([-1], [n + 1], [True], [1.5], 5, "all"):
        with pytest.raises(HookError, match=f"sizes are whole numbers from 0 to {n}, the edges of the model"):
            faithfulness_curve(runs, scores_of(COSTS), wrong)  # type: ignore[arg-type]


def test_the_smallest_circuit_is_the_fewest_that_stay_faithful() -> None:
    found = smallest_circuit(losing(), scores_of(COSTS), 0.9, metadata={"task": "made up"})  # type: ignore[arg-type]
    assert found.n == 4
    assert set(found.circuit.edges) == set(COSTS) - {"embed->L1H0<v>"}
    assert found.faithfulness == pytest.approx(0.95)
    assert found.share == 4 / len(GRAPH.edges)
    assert found.circuit.metadata["method"] == "made up"
    assert found.circuit.metadata["task"] == "made up"
    assert found.to_dict()["circuit"] == found.circuit.to_dict()
    assert smallest_circuit(losing(), scores_of(COSTS), 1).n == 5  # type: ignore[arg-type]
    asked = smallest_circuit(losing(), scores_of(COSTS), np.float32(0.9)).asked  # type: ignore[arg-type]
    assert type(asked) is float
    for wrong in (0, 1.5, True, "0.9"):
        with pytest.raises(HookError, match="faithfulness is above 0 and at most 1"):
            smallest_circuit(losing(), scores_of(COSTS), wrong)  # type: ignore[arg-type]
    with pytest.raises(HookError, match="metadata cannot say asked_faithfulness anew: it is 0.9"):
        smallest_circuit(losing(), scores_of(COSTS), metadata={"asked_faithfulness": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", [1e-9, 1e-6, 0.01])
def test_however_little_faithfulness_is_asked_a_circuit_has_edges(asked: float) -> None:
    found = smallest_circuit(losing(), scores_of(COSTS), asked)  # type: ignore[arg-type]
    assert found.n == 1
    assert list(found.circuit.edges) == ["embed->logits"]
    # Of the strongest edge alone nothing is on a path: a share of 0 is near enough, and no circuit.
    loose = scores_of(COSTS | {"L1H0->logits": 9.0})
    assert smallest_circuit(losing(), loose, asked).n == 2  # type: ignore[arg-type]


def test_a_faithfulness_that_is_lost_again_is_not_taken() -> None:
    graph = Graph(1, 20, mlp=False)
    order = [edge.name for edge in graph.edges if edge.source == "embed"]
    values = {name: float(100 - i) for i, name in enumerate(order)}

    # By their number: as the model with 8, worse with 9 to 29, too good from 30 to 37, and right from 38 on.
    def share(n: int) -> float:
        return 0.0 if n < 8 else 1.0 if n == 8 else 0.3 if n < 30 else 1.3 if n < 38 else 1.0

    direct = {edge.name: 1000.0 for edge in graph.edges if edge.input == "logits"}
    first = len(direct)

    def metric(gone: frozenset[str]) -> list[float]:
        return [share(sum(name not in gone for name in values))]

    runs = Runs(graph, metric)
    scores = scores_of(direct | values, graph)
    assert smallest_circuit(runs, scores).n == first + 38 - 1  # type: ignore[arg-type]
    curve = faithfulness_curve(runs, scores, range(len(graph.edges)))  # type: ignore[arg-type]
    off = np.abs(1 - curve.faithfulness)
    assert curve.faithfulness.max() == pytest.approx(1.3)
    assert curve.cmd == pytest.approx(((off[1:] + off[:-1]) / 2 * np.diff(curve.edges)).sum() / len(graph.edges))
    assert smallest_circuit(runs, scores, two_sided=False).n == first + 30 - 1  # type: ignore[arg-type]


def test_scores_of_another_model_or_of_some_edges_are_refused() -> None:
    with pytest.raises(HookError, match=r"Every edge of the model has a score, and embed->\S+ has none"):
        faithfulness_curve(losing(), Circuit.of_edges(GRAPH, {"embed->logits": 1.0}))  # type: ignore[arg-type]
    other = Circuit.of_scores(scores_of({}, Graph(3, 2)), Graph(3, 2), connected=False)
    with pytest.raises(HookError, match="The model does not match the circuit: it has no edge"):
        faithfulness_curve(losing(), other)  # type: ignore[arg-type]


# On models whose circuit is known


CASES = [(name, ablation) for name, made in KNOWN_MODELS.items() for ablation in made().true_edges]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def known(request: pytest.FixtureRequest) -> tuple[frozenset[str], EdgeRuns]:
    """The true edges of a known model under an ablation, and its edge runs."""
    name, ablation = request.param
    made = KNOWN_MODELS[name]()
    return made.edges(ablation), EdgeRuns(made.hooked(), made.pairs(8), ablation=ablation)


def test_acdc_keeps_exactly_the_true_edges(known: tuple[frozenset[str], EdgeRuns]) -> None:
    true, runs = known
    # By zeros, a head whose queries are gone attends evenly, which costs the answer little.
    found = acdc(runs, 0.001 * np.abs(runs.plain - runs.ablated).mean())
    assert set(found.kept) == true
    assert edge_auc(found, true) == 1


def test_the_known_circuit_is_faithful_and_complete(known: tuple[frozenset[str], EdgeRuns]) -> None:
    true, runs = known
    found = Circuit.of_edges(runs, true, connected=False).validate(runs)
    assert found.faithfulness.mean == pytest.approx(1, abs=1e-4)
    assert found.completeness.mean == pytest.approx(1, abs=1e-4)
    assert found.random_mean is not None
    assert found.random_mean < 0.5


def test_a_sweep_tells_true_edges_from_the_others() -> None:
    made = KNOWN_MODELS["induction"]()
    runs = EdgeRuns(made.hooked(), made.pairs(6), ablation="corrupted")
    found = acdc_sweep(runs, [0.1, 1.0])
    is_true = np.isin(found.edges, list(made.edges()))
    assert found.values[is_true].min() > found.values[~is_true].max() == 0
    assert edge_auc(found, made.edges()) == 1


def test_a_circuit_of_another_model_is_refused_and_one_of_other_weights_is_said() -> None:
    made = KNOWN_MODELS["induction"]()
    model, pairs = made.hooked(), made.pairs(5)
    circuit = Circuit.of_edges(model, made.edges(), connected=False, metadata={"ablation": "zero", "metric": "loss"})
    found = validate_circuit(model, circuit, pairs, {"random_circuits": 0})
    assert (found.ablation, found.metric) == ("zero", "loss")
    assert not found.notes[1:]
    again = validate_circuit(model, circuit, pairs, {"random_circuits": 0, "ablation": "corrupted"})
    assert again.notes[1:] == ("The circuit was found with ablation 'zero', and is judged by 'corrupted'.",)
    with pytest.raises(HookError, match="The circuit is of another model: .* this is "):
        validate_circuit(KNOWN_MODELS["ioi"]().hooked(), circuit, pairs)
    model.model.lm_head.weight = model.model.lm_head.weight * 2
    found = validate_circuit(model, circuit, pairs, {"random_circuits": 0})
    assert found.notes[1:] == ("The circuit was found in a model of the same sizes with other weights.",)
    runs = EdgeRuns(model, pairs)
    for given, message in [
        ((runs, "c.json"), r"circuit is a Circuit, as Circuit.load\(path\) gives it, got str"),
        ((model, circuit), "Give the eval data on which the metric is measured"),
        ((runs, circuit, pairs), "Edge runs have their own eval data: give them alone"),
        ((1, circuit), "Edges are replaced in a HookedModel or its edge runs, got int"),
    ]:
        with pytest.raises(HookError, match=message):
            validate_circuit(*given)


HALVES = {"random_circuits": 0, "resamples": 100}


def half(logits: mx.array, batch: EvalBatch) -> mx.array:
    """A metric that is none of METRICS."""
    return Metric("logit")(logits, batch) / 2


@pytest.fixture(scope="module")
def induction() -> tuple[HookedModel, list[dict[str, Any]], Circuit]:
    made = KNOWN_MODELS["induction"]()
    model = made.hooked()
    return model, made.pairs(5), Circuit.of_edges(model, made.edges(), connected=False)


def told(circuit: Circuit, **more: Any) -> Circuit:
    return Circuit(circuit.edges, circuit.inputs, {**circuit.metadata, **more})


def test_means_and_seed_are_as_they_are_asked_or_as_the_circuit_was_found(
    induction: tuple[HookedModel, list[dict[str, Any]], Circuit],
) -> None:
    model, pairs, circuit = induction
    found_with = {"ablation": "mean", "settings": {"mean_over": "all"}}
    over_all = runs_of(model, pairs, ValidationOptions(), found_with)
    assert (over_all.ablation, over_all.mean_over, over_all.seed) == ("mean", "all", 0)
    assert runs_of(model, pairs, ValidationOptions(mean_over="position"), found_with).mean_over == "position"
    assert runs_of(model, pairs, ValidationOptions(seed=3)).seed == 3
    assert runs_of(model, pairs, ValidationOptions(mean_over="all")).mean_over == "all"
    assert runs_of(model, pairs, ValidationOptions()).mean_over == "position"
    again = validate_circuit(model, told(circuit, **found_with), pairs, HALVES | {"mean_over": "position"})
    assert again.notes[1:] == ("The circuit was found with mean_over 'all', and is judged by 'position'.",)
    assert not validate_circuit(model, told(circuit, **found_with), pairs, HALVES).notes[1:]


def test_another_metric_than_the_circuit_was_found_by_is_said(
    induction: tuple[HookedModel, list[dict[str, Any]], Circuit],
) -> None:
    model, pairs, circuit = induction
    for metric, by in [("half", None), ("kl", "loss")]:
        found = validate_circuit(model, told(circuit, metric=metric), pairs, HALVES | {"metric": by})
        judged = by or "logit_difference"
        assert found.notes[1] == f"The circuit was found with metric {metric!r}, and is judged by {judged!r}."
    assert not validate_circuit(model, told(circuit, metric="half"), pairs, HALVES | {"metric": half}).notes[1:]


def test_a_function_called_as_a_metric_is_told_from_it(
    induction: tuple[HookedModel, list[dict[str, Any]], Circuit],
) -> None:
    model, pairs, _ = induction

    def loss(logits: mx.array, batch: EvalBatch) -> mx.array:
        return half(logits, batch)

    found = Circuit.of_scores(attribute_edges(model, pairs, metric=loss), n=20)
    assert found.metadata["metric"] == "function loss"
    judged = validate_circuit(model, found, pairs, HALVES)
    assert judged.metric == "logit_difference"
    assert judged.notes[1] == (
        "The circuit was found with metric 'function loss', and is judged by 'logit_difference'."
    )
    assert not validate_circuit(model, found, pairs, HALVES | {"metric": loss}).notes[1:]


def test_the_lines_of_the_module_run(
    induction: tuple[HookedModel, list[dict[str, Any]], Circuit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts, _ = induction
    monkeypatch.chdir(tmp_path)
    lines = [line[4:] for line in (circuit_module.__doc__ or "").splitlines() if line.startswith("    ")]
    assert len(lines) == 4
    named: dict[str, Any] = {
        "Circuit": Circuit, "attribute_edges": attribute_edges, "model": model, "prompts": prompts
    }  # fmt: skip
    exec("\n".join(lines), named)
    assert Circuit.load("circuit.json") == named["circuit"]


def test_metadata_of_any_kind_are_passed_over(
    induction: tuple[HookedModel, list[dict[str, Any]], Circuit],
) -> None:
    model, pairs, circuit = induction
    odd = told(circuit, ablation=["x"], metric={"x": 1}, settings=[1])
    assert validate_circuit(model, odd, pairs, HALVES).ablation == "corrupted"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ablation": "zero"}, "Edge runs have their own ablation, here 'corrupted': give it to them."),
        ({"metric": "kl"}, "Edge runs have their own metric, here 'logit_difference': give it to them."),
        ({"metric": half}, "Edge runs have their own metric, here 'logit_difference'"),
        ({"mean_over": "all"}, "Edge runs have their own mean_over, here 'position'"),
    ],
)
def test_options_that_are_not_those_of_the_edge_runs_are_refused(
    options: dict[str, Any], message: str, induction: tuple[HookedModel, list[dict[str, Any]], Circuit]
) -> None:
    model, pairs, circuit = induction
    runs = EdgeRuns(model, pairs)
    for given in (options, ValidationOptions(**options)):
        with pytest.raises(HookError, match=message):
            validate_circuit(runs, circuit, None, given)
    same = {"ablation": "corrupted", "metric": "logit_difference", "mean_over": "position"}
    assert validate_circuit(runs, circuit, None, HALVES | same).metric == "logit_difference"


@pytest.mark.parametrize("metric", ["", [], 0, "blue", np.ones(2)])
def test_what_is_no_metric_is_no_other_one(
    metric: Any, induction: tuple[HookedModel, list[dict[str, Any]], Circuit]
) -> None:
    model, pairs, circuit = induction
    for given in ((model, pairs), (EdgeRuns(model, pairs), None)):
        for call in (
            lambda given=given: validate_circuit(given[0], circuit, given[1], {"metric": metric}),
            lambda given=given: find_circuit(*given, {"metric": metric}),
            lambda given=given: ablate_edges(given[0], ["L0H0"], given[1], {"metric": metric}),
            lambda given=given: attribute_edges(*given, metric=metric),
        ):
            with pytest.raises(HookError, match="metric is a function or one of logit_difference, ") as caught:
                call()
            assert caught.value.field == "metric"


def test_scores_and_a_model_in_the_place_of_edge_runs_are_refused(
    induction: tuple[HookedModel, list[dict[str, Any]], Circuit],
) -> None:
    model, scores = induction[0], scores_of(COSTS)
    for call in (
        lambda: faithfulness_curve(model, scores),
        lambda: smallest_circuit(model, scores),
        lambda: acdc(model, 0.1),
        lambda: acdc_sweep(model, [0.1]),
    ):
        with pytest.raises(HookError, match=r"This takes edge runs, EdgeRuns\(model, prompts\), got HookedModel"):
            call()  # type: ignore[no-untyped-call]
    for call in (lambda: faithfulness_curve(losing(), {}), lambda: smallest_circuit(losing(), {})):  # type: ignore[arg-type]
        with pytest.raises(HookError, match="scores are edge scores, an ACDC result or a circuit, got dict"):
            call()
