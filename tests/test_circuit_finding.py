"""A circuit in one call."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_hooks import HookedModel
from mlx_hooks.analysis.circuits.edge_runs import EdgeRuns
from mlx_hooks.analysis.circuits.finding import find_circuit
from mlx_hooks.analysis.circuits.pruning import acdc
from mlx_hooks.analysis.eval_data import EvalBatch
from mlx_hooks.analysis.known_models import KNOWN_MODELS, KnownModel
from mlx_hooks.errors import HookError


@pytest.fixture(scope="module")
def known() -> KnownModel:
    return KNOWN_MODELS["induction"]()


@pytest.fixture(scope="module")
def model(known: KnownModel) -> HookedModel:
    return known.hooked()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "eap-ig", "threshold": 0.1},
        {"method": "exact", "n": 5},
        {"method": "eap-ig", "faithfulness": 0.99, "steps": 3},
        {"method": "acdc", "threshold": 0.1},
    ],
    ids=lambda options: " ".join(map(str, options.values())) or "usual",
)
def test_every_method_finds_the_known_circuit(options: dict[str, Any], known: KnownModel, model: HookedModel) -> None:
    told: list[tuple[int, int]] = []
    about = {"metadata": {"task": "induction"}, "ablation": "corrupted", "batch_size": 2}
    circuit = find_circuit(model, known.pairs(5), options | about, lambda *at: told.append(at))
    assert set(circuit.edges) == known.edges()
    assert circuit.metadata["task"] == "induction"
    assert circuit.metadata["method"] == options.get("method", "eap-ig")
    assert circuit.metadata["ablation"] == "corrupted"
    assert told == sorted(told)
    assert told[-1] == (1000, 1000)
    assert len(told) > 2


def test_edge_runs_bring_data_and_metric(known: KnownModel, model: HookedModel) -> None:
    runs = EdgeRuns(model, known.pairs(5), metric="probability")
    assert find_circuit(runs).metadata["metric"] == "probability"
    with pytest.raises(HookError, match="Edge runs have their own eval data"):
        find_circuit(runs, known.pairs(5))
    with pytest.raises(HookError, match="Edge runs have their own metric, here 'probability': give it to them"):
        find_circuit(runs, options={"metric": "loss"})


def test_how_edges_were_scored_is_told_and_taken_when_it_is_judged(known: KnownModel, model: HookedModel) -> None:
    options = {"ablation": "mean", "mean_over": "all", "steps": 3, "n": 20}
    circuit = find_circuit(model, known.pairs(5), options)
    assert circuit.metadata["settings"].items() >= {"mean_over": "all", "steps": 3, "rule": "gauss"}.items()
    judged = circuit.validate(model, known.pairs(5), {"random_circuits": 0})
    runs = EdgeRuns(model, known.pairs(5), ablation="mean", mean_over="all")
    np.testing.assert_allclose(judged.kept, circuit.validate(runs, options={"random_circuits": 0}).kept)
    drawn = find_circuit(EdgeRuns(model, known.pairs(5), ablation="resample", seed=3), options={"n": 20})
    assert drawn.metadata["settings"]["seed"] == 3


def test_the_rule_is_as_asked(known: KnownModel, model: HookedModel) -> None:
    circuit = find_circuit(model, known.pairs(3), {"steps": 2, "rule": "left", "n": 20})
    assert circuit.metadata["settings"].items() >= {"steps": 2, "rule": "left"}.items()


def test_acdc_needs_no_gradient(known: KnownModel, model: HookedModel) -> None:
    pairs = known.pairs(2)
    answer = pairs[0]["answer"]

    def rank(logits: mx.array, batch: EvalBatch) -> mx.array:
        return (logits[:, -1] > logits[:, -1, answer : answer + 1]).sum(axis=-1)

    runs = EdgeRuns(model, pairs, metric=rank)
    told: list[tuple[int, int]] = []
    circuit = find_circuit(runs, options={"method": "acdc", "threshold": 0.4}, progress=lambda *at: told.append(at))
    assert circuit.edges == acdc(runs, 0.4).circuit().edges
    assert told == sorted(told)
    with pytest.raises(HookError, match="The gradient of rank is 0 everywhere"):
        find_circuit(runs, options={"n": 5})
    broken = EdgeRuns(model, pairs, metric=lambda logits, batch: logits[:, -1, 0] * float("nan"))
    with pytest.raises(HookError, match="not finite"):
        find_circuit(broken, options={"method": "acdc", "threshold": 0.4})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"n": 3, "faithfulness": 0.9},
            "A circuit is cut by one of n, threshold, faithfulness, got n and faithfulness",
        ),
        ({"method": "acdc"}, "acdc cuts by threshold: by how much an edge has to move the metric to stay"),
        ({"method": "acdc", "n": 3}, "acdc cuts by threshold"),
        ({"n": 0}, "n must be greater than or equal to 1, got 0"),
        ({"method": "guess"}, "method must be 'eap-ig', 'eap', 'exact' or 'acdc', got 'guess'"),
        ({"threshold": 1000.0}, "No edge has a score of 1000 or more"),
        ({"metadata": {"metric": "zzz"}}, "metadata cannot say metric, which the search tells itself"),
        ({"size": 3}, "FindOptions has no field 'size'"),
    ],
)
def test_bad_options_are_one_sentence(
    options: dict[str, Any], message: str, known: KnownModel, model: HookedModel
) -> None:
    with pytest.raises(HookError, match=message):
        find_circuit(model, known.pairs(2), options)


def test_prompts_that_do_not_fit_are_one_sentence(known: KnownModel, model: HookedModel) -> None:
    pair = known.pairs(1)[0]
    for change, message in [
        ({"corrupted": pair["clean"]}, "clean and corrupted of example 0 are the same"),
        ({"corrupted": [*pair["clean"], 1]}, "clean and corrupted have as many tokens; example 0 has"),
        ({"answer": 10_000}, "answer of example 0: "),
    ]:
        with pytest.raises(HookError, match=message):
            find_circuit(model, [pair | change])
