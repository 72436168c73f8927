"""``/v1/analysis``: causal analyses over HTTP are the engine's, and rubbish is refused in a sentence."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from pydantic import BaseModel
from server_tools import until

from api_server import ModelWorker, ServerConfig, circuits, create_app
from api_server.schemas.circuits import (
    AblationReply,
    AblationRequest,
    CircuitReply,
    CircuitRequest,
    EdgesReply,
    PatchingReply,
)
from api_server.schemas.heads import AttentionReply, CompositionReply, HeadsReply
from mlx_hooks import HookedModel
from mlx_hooks.analysis.ablation import MeanOver, analyse_causal
from mlx_hooks.analysis.attention_analysis import analyse_attention
from mlx_hooks.analysis.circuits.attribution_patching import attribution_patching
from mlx_hooks.analysis.circuits.circuit import Circuit
from mlx_hooks.analysis.circuits.edge_attribution import attribute_edges
from mlx_hooks.analysis.circuits.groups import replace_groups
from mlx_hooks.analysis.circuits.patching import activation_patching
from mlx_hooks.analysis.circuits.path_patching import path_patching
from mlx_hooks.analysis.circuits.validation import validate_circuit
from mlx_hooks.analysis.composition import composition_scores
from mlx_hooks.analysis.head_detection import detect_heads

TEXT = "When {} and {} went to the store , {} gave a drink to"
PAIRS = [
    {"clean": TEXT.format(a, b, b), "corrupted": TEXT.format(a, b, a), "answer": a, "wrong": b}
    for a, b in (("Mary", "John"), ("John", "Mary"), ("Tom", "Mary"))
]


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    with ModelWorker() as worker:
        worker.load("neuroscope-tiny")
        yield worker


@pytest.fixture(scope="module")
def tiny(worker: ModelWorker) -> HookedModel:
    return worker.get().model


@pytest.fixture
def client(worker: ModelWorker) -> FlaskClient:
    return create_app(worker, ServerConfig()).test_client()


def asked(client: FlaskClient, what: str, body: dict[str, Any]) -> Any:
    reply = client.post(f"/v1/analysis/{what}", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json


def differences(model: HookedModel, key: str, edits: list[dict[str, Any]]) -> np.ndarray:
    """The logit difference of each pair's prompt, one run each."""
    found = []
    for pair in PAIRS:
        answer, wrong = (model.tokenizer.encode(pair[name])[-1] for name in ("answer", "wrong"))
        if edits:
            with model.intervening(edits):
                logits = model(pair[key])
        else:
            logits = model(pair[key])
        last = np.array(logits[0, -1])
        found.append(float(last[answer]) - float(last[wrong]))
    return np.array(found)


HEAD = {"hook_point": "blocks.2.attn.hook_z", "heads": 1}
MLP = {"hook_point": "blocks.3.hook_mlp_out"}


# -- ablation -----------------------------------------------------------------------------------------------------


def test_groups_are_ablated_together(client: FlaskClient, tiny: HookedModel) -> None:
    body = {"eval_data": PAIRS, "groups": [["L2H1"], ["L2H1", "L3 mlp"]], "metric": "logit_difference"}
    found = asked(client, "ablation", body)
    effects = found["groups"]["zero"]
    assert found["model"] == "neuroscope-tiny"
    assert found["ablations"] == {"zero": "zeros"}
    np.testing.assert_allclose(effects["plain"], differences(tiny, "clean", []), atol=1e-5)
    np.testing.assert_allclose(effects["other"], differences(tiny, "corrupted", []), atol=1e-5)
    for group, edits in zip(effects["groups"], ([HEAD], [HEAD, MLP]), strict=True):
        expected = differences(tiny, "clean", [edit | {"type": "zero"} for edit in edits])
        np.testing.assert_allclose(group["values"], expected, atol=1e-5)
        assert group["mean"] == pytest.approx(expected.mean(), abs=1e-5)
    assert effects["groups"][1]["components"] == ["L2H1", "L3 mlp"]


def test_a_mean_and_a_corrupted_prompt_may_stand_in_the_place_of_a_group(
    client: FlaskClient, tiny: HookedModel
) -> None:
    found = asked(client, "ablation", {"eval_data": PAIRS, "groups": [["L3 mlp"]], "ablations": ["mean", "resample"]})
    mean = {**MLP, "type": "mean", "over": [pair["clean"] for pair in PAIRS]}
    np.testing.assert_allclose(
        found["groups"]["mean"]["groups"][0]["values"], differences(tiny, "clean", [mean]), atol=1e-4
    )
    assert found["ablations"]["resample"] == "what the component is on the example's corrupted partner"


def test_the_logit_of_the_answer_is_a_metric(client: FlaskClient, tiny: HookedModel) -> None:
    found = asked(client, "ablation", {"eval_data": PAIRS[:1], "groups": [["L0 attn"]], "metric": "logit"})
    mary = tiny.tokenizer.encode("Mary")[-1]
    expected = float(tiny(PAIRS[0]["clean"])[0, -1, mary])
    assert found["groups"]["zero"]["plain"] == pytest.approx([expected], abs=1e-5)


def test_components_one_by_one_are_the_engines(client: FlaskClient, tiny: HookedModel) -> None:
    found = asked(client, "ablation", {"eval_data": PAIRS, "components": ["mlp_out"], "ablations": ["zero"]})
    expected = analyse_causal(tiny, PAIRS, {"components": ["mlp_out"], "ablations": ["zero"]})
    assert {name: found[name] for name in expected} == expected
    assert "groups" not in found


# -- patching ---------------------------------------------------------------------------------------------------------


def test_a_sweep_is_the_engines(client: FlaskClient, tiny: HookedModel) -> None:
    found = asked(client, "patching", {"eval_data": PAIRS, "sweep": "layer x head"})
    expected = activation_patching(tiny, PAIRS, "layer x head").to_dict()
    assert {name: found[name] for name in expected} == expected
    assert found["axes"]["layer"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(("direction", "key"), [("denoising", "corrupted"), ("noising", "clean")])
def test_cells_and_groups_are_patched(client: FlaskClient, tiny: HookedModel, direction: str, key: str) -> None:
    """One pair, so that a mean is the number itself; the other prompt's activations by hand."""
    (pair,), other = PAIRS[:1], {"clean": "corrupted", "corrupted": "clean"}[key]
    _, cache = tiny.run_with_cache(pair[other], [HEAD["hook_point"], MLP["hook_point"]])
    head, mlp = ({**one, "type": "patch", "source": np.array(cache[one["hook_point"]])} for one in (HEAD, MLP))
    body = {"eval_data": [pair], "direction": direction, "metric": "logit_difference"}
    cells = [{"hook_point": HEAD["hook_point"], "heads": 1}, {"hook_point": MLP["hook_point"], "positions": [3]}]
    found = asked(client, "patching", body | {"cells": cells})
    expected = [differences(tiny, key, edits)[0] for edits in ([head], [mlp | {"positions": 3}])]
    np.testing.assert_allclose(found["patched"], expected, atol=1e-4)
    assert found["sweep"] == "cells"
    found = asked(client, "patching", body | {"groups": [["L2H1", "L3 mlp"], ["L3 resid"]]})
    assert found["groups"]["groups"][0]["values"] == pytest.approx([differences(tiny, key, [head, mlp])[0]], abs=1e-4)
    # With the whole stream of the last layer the other prompt's answer comes back.
    assert found["groups"]["groups"][1]["values"] == pytest.approx(found["groups"]["other"], abs=1e-4)


def test_attribution_estimates_and_paths_are_the_engines(client: FlaskClient, tiny: HookedModel) -> None:
    found = asked(client, "patching", {"eval_data": PAIRS, "sweep": "layer x head", "method": "attribution"})
    expected = attribution_patching(tiny, PAIRS, "layer x head").to_dict()
    assert {name: found[name] for name in expected} == expected
    receivers = ["L3H0<q>", ["L3H1<q>", "L3H1<k>"], "logits"]
    found = asked(client, "path_patching", {"eval_data": PAIRS, "receivers": receivers, "senders": ["L2H1", "L3 mlp"]})
    expected = path_patching(tiny, PAIRS, receivers, senders=["L2H1", "L3 mlp"]).to_dict()
    assert {name: found[name] for name in expected} == expected
    assert found["axes"]["receiver"][1] == "L3H1<q> + L3H1<k>"
    # A block's MLP is after its own heads.
    assert found["effects"][1][:2] == [None, None]


# -- edges and circuits -----------------------------------------------------------------------------------------------


def test_edges_are_the_engines_strongest_first(client: FlaskClient, tiny: HookedModel) -> None:
    found = asked(client, "edges", {"eval_data": PAIRS, "method": "eap", "top": 7})
    scores = attribute_edges(tiny, PAIRS, {"method": "eap"})
    assert found["n_edges"] == len(scores.edges)
    assert [edge["edge"] for edge in found["edges"]] == [name for name, _ in scores.ranked[:7]]
    np.testing.assert_allclose([edge["score"] for edge in found["edges"]], [v for _, v in scores.ranked[:7]], rtol=1e-4)
    assert (found["method"], found["metric"], found["ablation"]) == ("eap", "logit_difference", "corrupted")


PLAIN = [{name: pair[name] for name in ("clean", "answer", "wrong")} for pair in PAIRS]
MORE = [*PLAIN, PLAIN[0] | {"clean": TEXT.format("Tom", "John", "John")}]


@pytest.mark.parametrize(
    "given",
    [
        *({"rule": rule, "steps": 2} for rule in ("gauss", "left", "right")),
        *({"ablation": "mean", "mean_over": over, "method": "eap"} for over in ("position", "all")),
        *({"ablation": "resample", "seed": seed, "method": "eap"} for seed in (0, 1)),
    ],
    ids=str,
)
def test_options_of_edges_reach_the_engine(client: FlaskClient, tiny: HookedModel, given: dict[str, Any]) -> None:
    found = asked(client, "edges", {"eval_data": MORE, "ablation": "zero", "top": 100_000} | given)
    scores = attribute_edges(tiny, MORE, {"ablation": "zero"} | given)
    told = {edge["edge"]: edge["score"] for edge in found["edges"]}
    np.testing.assert_allclose([told[name] for name in scores.edges], scores.values, atol=1e-4)
    name = next(iter({"rule", "mean_over", "seed"} & set(given)))
    other: dict[str, Any] = {
        "rule": "right" if given.get("rule") == "left" else "left",
        "seed": 1 - given.get("seed", 0),
    }
    other["mean_over"] = "all" if given.get("mean_over") == "position" else "position"
    apart = attribute_edges(tiny, MORE, {"ablation": "zero"} | given | {name: other[name]})
    assert np.abs(apart.values - scores.values).max() > 1e-2


@pytest.mark.parametrize("over", ["all", "position"])
def test_a_mean_of_groups_is_over_what_is_asked(client: FlaskClient, tiny: HookedModel, over: MeanOver) -> None:
    body = {"eval_data": MORE, "groups": [["L0 mlp"]], "ablations": ["mean"], "mean_over": over}
    found = asked(client, "ablation", body)["groups"]["mean"]["groups"][0]["values"]
    wanted, other = (
        replace_groups(tiny, MORE, [["L0 mlp"]], "mean", mean_over=each).to_dict()["groups"][0]["values"]
        for each in (over, {"all": "position", "position": "all"}[over])
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(np.array(other) - wanted).max() > 1e-2


@pytest.mark.parametrize(
    ("sweep", "cells"),
    [("layer x position", 15), ("layer x head", 6), ("component", 6), ("layer x head x position", 90)],
)
def test_sweeps_are_limited_by_their_cells(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, sweep: str, cells: int
) -> None:
    """Of 4 layers, as many cells in each; heads and two more."""
    monkeypatch.setattr(circuits, "MAX_RUNS", 4 * cells - 1)
    reply = client.post("/v1/analysis/patching", json={"eval_data": PAIRS[:1], "sweep": sweep})
    assert (reply.status_code, reply.json["error"]["param"]) == (400, "sweep")
    assert f"would take {4 * cells} runs" in reply.json["error"]["message"]
    reply = client.post("/v1/analysis/patching", json={"eval_data": PAIRS[:1], "sweep": sweep, "method": "attribution"})
    assert f"would take {4 * cells} places" in reply.json["error"]["message"]
    monkeypatch.setattr(circuits, "MAX_RUNS", 4 * cells)
    asked(client, "patching", {"eval_data": PAIRS[:1], "sweep": sweep})


def test_a_graph_for_neuronpedia_is_of_the_first_prompt(client: FlaskClient, tiny: HookedModel) -> None:
    body = {"eval_data": PAIRS, "size": 60, "random_circuits": 0, "formats": ["neuronpedia"], "name": "Who? To whom?"}
    found = asked(client, "circuit", body)
    assert found["neuronpedia"]["metadata"]["slug"] == "Who-To-whom"
    tokens = tiny.tokenizer.encode(PAIRS[0]["clean"])
    assert found["neuronpedia"]["metadata"]["prompt_tokens"] == [tiny.tokenizer.decode([one]) for one in tokens]


def test_a_circuit_is_found_judged_and_written(client: FlaskClient, tiny: HookedModel) -> None:
    body = {
        "eval_data": PAIRS,
        "size": 60,
        "random_circuits": 1,
        "name": "names",
        "formats": ["neuroscope-circuit", "neuronpedia", "graphml"],
    }
    found = asked(client, "circuit", body)
    circuit = Circuit.from_dict(found["circuit"])
    assert list(circuit.nodes) == found["nodes"]
    assert len(circuit) + len(circuit.dropped) == 60
    judged = validate_circuit(tiny, circuit, PAIRS)
    assert found["validation"]["faithfulness"]["mean"] == pytest.approx(judged.faithfulness.mean, abs=1e-3)
    assert found["neuroscope_circuit"]["name"] == "names"
    assert {step["target"] for step in found["neuroscope_circuit"]["pathway"]} >= {"logits"}
    assert set(found["neuronpedia"]) == {"metadata", "qParams", "nodes", "links"}
    assert found["graphml"].startswith("<?xml")


def test_the_fewest_edges_that_are_faithful_are_found(client: FlaskClient) -> None:
    found = asked(client, "circuit", {"eval_data": PAIRS, "faithfulness": 0.5, "random_circuits": 0, "formats": []})
    assert "neuroscope_circuit" not in found
    assert found["circuit"]["metadata"]["asked_faithfulness"] == 0.5
    assert abs(found["validation"]["faithfulness"]["mean"] - 1) <= 0.5 + 1e-6
    assert len(found["circuit"]["edges"]) < found["edges_of_model"]


@pytest.mark.parametrize(("faithfulness", "is_taken"), [(1e-9, True), (1, True), (0, False), (1.1, False)])
def test_any_share_above_nothing_is_a_faithfulness(faithfulness: float, is_taken: bool) -> None:
    body = {"eval_data": [{"clean": "a", "answer": "b"}], "faithfulness": faithfulness}
    if is_taken:
        assert CircuitRequest.model_validate(body).faithfulness == faithfulness
    else:
        with pytest.raises(ValueError, match="faithfulness"):
            CircuitRequest.model_validate(body)


def test_acdc_finds_a_circuit_and_other_prompts_judge_it(client: FlaskClient) -> None:
    body = {"eval_data": PAIRS[:1], "judge_by": PAIRS[1:], "method": "acdc", "threshold": 0.5, "random_circuits": 0}
    found = asked(client, "circuit", body)
    assert found["circuit"]["metadata"]["method"] == "acdc"
    assert found["eval_data"]["examples"] == 1
    assert len(found["validation"]["kept"]) == 2


def test_other_prompts_judge_by_what_the_circuit_was_found_by(client: FlaskClient) -> None:
    body = {"eval_data": PAIRS[:2], "size": 60, "random_circuits": 0, "formats": [], "ablation": "mean"}
    plain = [
        {name: PAIRS[2][name] for name in ("clean", "answer", "wrong")} | {"clean": pair["clean"]} for pair in PAIRS
    ]
    found = asked(client, "circuit", body | {"judge_by": plain})
    for name in ("metric", "ablation"):
        assert found["validation"][name] == found["circuit"]["metadata"][name]
    assert found["validation"]["ablation"] == "mean"
    body = {"eval_data": PAIRS[:2], "size": 60, "random_circuits": 0}
    for lacking, complaint in (("corrupted", "corrupted prompts"), ("wrong", "needs wrong answers")):
        given = [{name: value for name, value in pair.items() if name != lacking} for pair in PAIRS]
        reply = client.post("/v1/analysis/circuit", json=body | {"judge_by": given})
        assert (reply.status_code, reply.json["error"]["param"]) == (400, "judge_by"), reply.text
        assert complaint in reply.json["error"]["message"]


@pytest.mark.parametrize("method", [{}, {"method": "acdc", "threshold": 0.5}], ids=["scores", "acdc"])
def test_the_progress_of_a_circuit_never_falls(tiny: HookedModel, method: dict[str, Any]) -> None:
    told: list[float] = []
    body = {"eval_data": PAIRS[:1], "random_circuits": 3, "formats": []} | method
    circuits.circuit(tiny, CircuitRequest(**body), lambda done, total: told.append(done / total))
    assert told == sorted(told)
    assert told[-1] == 1
    assert len([at for at in told if at < 0.5]) > 2
    # The other half is the judging.
    assert 0.5 in told


def test_judging_is_the_second_half(tiny: HookedModel) -> None:
    """A batch for each prompt, so that judging takes several passes."""
    told: list[float] = []
    body = {"eval_data": PAIRS, "size": 60, "random_circuits": 0, "formats": [], "batch_size": 1, "method": "eap"}
    circuits.circuit(tiny, CircuitRequest(**body), lambda done, total: told.append(done / total))
    assert told == sorted(told)
    # Of three batches: as it is; replaced and all replaced; corrupted; replaced and both sets.
    judged = [at for at in told if at > 0.5]
    assert judged == pytest.approx([0.5 + i / 36 for i in range(1, 19)], abs=1e-3)


def test_the_progress_of_groups_never_falls(tiny: HookedModel) -> None:
    told: list[float] = []
    body = {"eval_data": PAIRS, "groups": [["L2H1"], ["L0 mlp"]], "ablations": ["zero", "resample"]}
    circuits.ablation(tiny, AblationRequest(**body), lambda done, total: told.append(done / total))
    # Two baselines and two groups; to resample the corrupted prompts too.
    assert told == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


# -- heads ------------------------------------------------------------------------------------------------------------


def test_attention_heads_and_weights_are_the_engines(client: FlaskClient, tiny: HookedModel) -> None:
    prompt = PAIRS[0]["clean"]
    found = asked(client, "attention", {"prompt": prompt, "layers": [1], "top_k": 2, "dependencies": 0})
    expected = analyse_attention(tiny, prompt, [1], {"top_k": 2, "dependencies": 0, "max_tokens": 1024}).to_dict()
    assert found == expected | {"model": "neuroscope-tiny"}
    settings = {"sequences": 2, "length": 5, "copying": False, "layers": [0, -1]}
    assert asked(client, "heads", settings) == detect_heads(tiny, None, settings).to_dict()
    assert asked(client, "heads", {"prompts": [prompt]})["tokens_from"] == "prompts"
    found = asked(client, "composition", {"top": 3})
    assert found == composition_scores(tiny).to_dict(3)
    assert len(found["strongest"]) == 3


def test_one_layer_composes_with_none(client: FlaskClient) -> None:
    found = asked(client, "composition", {"layers": [0]})
    assert (found["scored"], found["not_told"]) == (0, {"scores": "they are between two layers"})


def test_random_tokens_that_the_model_has_no_room_for_are_told(client: FlaskClient) -> None:
    found = asked(client, "heads", {"length": 512, "sequences": 5, "copying": False, "layers": [0]})
    assert found["length"] == 63
    assert found["warnings"] == ["The model has room for 63 tokens said twice, not for 512."]


# -- replies ----------------------------------------------------------------------------------------------------------

REPLIES: list[tuple[type[BaseModel], str, dict[str, Any]]] = [
    (AblationReply, "ablation", {"eval_data": PAIRS, "components": ["mlp_out"], "ablations": ["zero"]}),
    (AblationReply, "ablation", {"eval_data": PAIRS, "groups": [["L2H1"]]}),
    (PatchingReply, "patching", {"eval_data": PAIRS, "sweep": "layer x head"}),
    (PatchingReply, "patching", {"eval_data": PAIRS, "sweep": "layer x head", "method": "attribution"}),
    (PatchingReply, "patching", {"eval_data": PAIRS, "groups": [["L2H1"]]}),
    (PatchingReply, "path_patching", {"eval_data": PAIRS, "receivers": ["logits"], "senders": ["L2H1"]}),
    (EdgesReply, "edges", {"eval_data": PAIRS, "method": "eap", "top": 3}),
    (CircuitReply, "circuit", {"eval_data": PAIRS, "size": 60, "formats": ["graphml", "neuronpedia"]}),
    (AttentionReply, "attention", {"prompt": "Mary and John", "layers": [1]}),
    (HeadsReply, "heads", {"sequences": 2, "copying": False}),
    (CompositionReply, "composition", {"top": 3}),
]


@pytest.mark.parametrize(("schema", "what", "body"), REPLIES, ids=[f"{i}-{one[1]}" for i, one in enumerate(REPLIES)])
def test_replies_have_what_their_schema_says_and_no_more(
    client: FlaskClient, schema: type[BaseModel], what: str, body: dict[str, Any]
) -> None:
    found = asked(client, what, body)
    assert schema.model_validate(found).model_dump(exclude_unset=True) == found


def test_an_estimate_is_told_from_exact_runs(client: FlaskClient) -> None:
    body = {"eval_data": PAIRS[:1], "sweep": "layer x head"}
    assert asked(client, "patching", body)["estimate"] is False
    assert asked(client, "patching", body | {"method": "attribution"})["estimate"] is True
    assert "logit of the answer" in asked(client, "patching", body | {"metric": "logit"})["metric_description"]


# -- jobs -------------------------------------------------------------------------------------------------------------


def test_in_the_background_the_result_is_the_reply(client: FlaskClient) -> None:
    body = {"eval_data": PAIRS[:1], "groups": [["L0H1"]]}
    reply = client.post("/v1/analysis/ablation", json=body | {"background": True})
    assert reply.status_code == 202
    until(lambda: client.get(reply.headers["Location"]).json["status"] == "completed")
    shown = client.get(reply.headers["Location"]).json
    assert shown["result"] == asked(client, "ablation", body)
    assert shown["kind"] == "ablation"
    assert shown["message"] == "completed"


def test_a_sweep_is_cancelled_between_runs(client: FlaskClient, worker: ModelWorker) -> None:
    groups = [[f"L{layer}H{head}"] for layer in range(4) for head in range(4)] * 200
    body = {"eval_data": PAIRS, "groups": groups, "background": True}
    job = client.post("/v1/analysis/ablation", json=body).json["id"]
    until(lambda: (client.get(f"/v1/jobs/{job}").json["fraction"] or 0) > 0)
    # Others get their turns meanwhile.
    assert client.post("/v1/tokenize", json={"text": "the cat"}).status_code == 200
    assert "of 9600" not in client.get(f"/v1/jobs/{job}").json["message"]
    client.delete(f"/v1/jobs/{job}")
    until(lambda: client.get(f"/v1/jobs/{job}").json["status"] == "cancelled")


def test_an_error_of_a_job_in_the_background_is_told_by_it(client: FlaskClient) -> None:
    body = {"eval_data": PAIRS, "groups": [["L9H1"]], "background": True}
    job = client.post("/v1/analysis/ablation", json=body).json["id"]
    until(lambda: client.get(f"/v1/jobs/{job}").json["status"] == "failed")
    assert client.get(f"/v1/jobs/{job}").json["error"]["param"] == "groups[0]"


# -- rubbish ----------------------------------------------------------------------------------------------------------

FIRST = PAIRS[0]
SHORT = {"clean": "Mary gave", "corrupted": "John gave", "answer": "Mary", "wrong": "John"}
RUBBISH: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("ablation", {}, "eval_data", "is required"),
    ("ablation", {"eval_data": []}, "eval_data", "at least 1 item"),
    ("ablation", {"eval_data": [FIRST] * 257}, "eval_data", "at most 256 items"),
    ("ablation", {"eval_data": ["a text"]}, "eval_data[0]", "object"),
    ("ablation", {"eval_data": [{"clean": "Mary"}]}, "eval_data[0].answer", "is required"),
    ("ablation", {"eval_data": [FIRST | {"clean": ""}]}, "eval_data[0].clean", "a string or a list of token ids"),
    ("ablation", {"eval_data": [FIRST | {"answer": []}]}, "eval_data[0].answer", "a token: an id, or a text"),
    ("ablation", {"eval_data": [FIRST | {"answer": "Mary gave"}]}, "eval_data[0]", "answer of example 0:"),
    ("ablation", {"eval_data": [FIRST | {"answer": 10**6}]}, "eval_data[0]", "answer of example 0:"),
    ("ablation", {"eval_data": [FIRST | {"wrong": FIRST["answer"]}]}, "eval_data[0]", "are the same token"),
    ("ablation", {"eval_data": [FIRST | {"corrupted": FIRST["clean"]}]}, "eval_data[0]", "example 0 are the same."),
    ("ablation", {"eval_data": [FIRST, FIRST | {"corrupted": "Mary"}]}, "eval_data[1]", "example 1 has 15 and 2."),
    ("ablation", {"eval_data": [FIRST, {"clean": "Mary", "answer": "to"}]}, "eval_data[1]", "are of one kind"),
    ("ablation", {"eval_data": PAIRS, "groups": []}, "groups", "at least 1 item"),
    ("ablation", {"eval_data": PAIRS, "groups": [[]]}, "groups[0]", "at least 1 item"),
    ("ablation", {"eval_data": PAIRS, "groups": [["L2H1"], ["L2H9"]]}, "groups[1]", "There is no component 'L2H9'."),
    ("ablation", {"eval_data": PAIRS, "groups": [["L2H1", "L2H1"]]}, "groups[0]", "each once"),
    ("ablation", {"eval_data": PAIRS, "groups": [["L2H1"]], "components": ["heads"]}, "components", "is left out"),
    ("ablation", {"eval_data": PAIRS, "metric": "kl"}, "metric", "is of 'groups'"),
    ("ablation", {"eval_data": PAIRS, "groups": [["L2H1"]], "metric": "bleu"}, "metric", "logit_difference"),
    ("ablation", {"eval_data": PAIRS, "ablations": ["zero", "zero"]}, "ablations", "has each name once"),
    ("ablation", {"eval_data": PAIRS, "ablations": ["swap"]}, "ablations[0]", "'zero', 'mean' or 'resample'"),
    ("ablation", {"eval_data": PAIRS, "components": ["side_out"]}, "components", "has no side_out to ablate"),
    ("ablation", {"eval_data": PAIRS * 85, "groups": [["L2H1"]] * 4096}, "groups", "at most 100000 are allowed"),
    (
        "ablation",
        {"eval_data": [{"clean": "Mary gave", "answer": "to"}], "groups": [["L2H1"]], "metric": "logit_difference"},
        "metric",
        "needs wrong answers",
    ),
    (
        "ablation",
        {"eval_data": [{"clean": "Mary gave", "answer": "to"}], "groups": [["L2H1"]], "ablations": ["resample"]},
        "eval_data",
        "needs corrupted prompts",
    ),
    ("patching", {"eval_data": PAIRS, "sweep": "layer"}, "sweep", "'layer x position'"),
    ("patching", {"eval_data": PAIRS, "sweep": "component", "cells": []}, "cells", "at least 1 item"),
    (
        "patching",
        {"eval_data": PAIRS, "sweep": "component", "groups": [["L0H1"]]},
        "groups",
        "is left out where 'sweep'",
    ),
    ("patching", {"eval_data": PAIRS, "cells": [{"hook_point": "blocks.9.hook_mlp_out"}]}, "cells", "blocks.9"),
    (
        "patching",
        {"eval_data": PAIRS, "cells": [{"hook_point": "blocks.0.hook_mlp_out", "positions": 99}]},
        "cells",
        "99",
    ),
    ("patching", {"eval_data": PAIRS, "cells": [{"heads": [1]}]}, "cells[0].hook_point", "is required"),
    ("patching", {"eval_data": PAIRS, "component": "nothing"}, "component", "nothing"),
    ("patching", {"eval_data": PAIRS, "components": ["heads"]}, "components", "is of the sweep 'component'"),
    ("patching", {"eval_data": [{"clean": "Mary gave", "answer": "to"}]}, "eval_data", "needs corrupted prompts"),
    ("patching", {"eval_data": [*PAIRS, SHORT]}, "align", "15 "),
    (
        "patching",
        {"eval_data": PAIRS * 85, "cells": [{"hook_point": "blocks.0.hook_mlp_out"}] * 400},
        "cells",
        "at most 100000 are allowed",
    ),
    ("patching", {"eval_data": PAIRS, "groups": [["L0H1"]], "method": "attribution"}, "groups", "is patched exactly"),
    ("path_patching", {"eval_data": PAIRS}, "receivers", "is required"),
    ("path_patching", {"eval_data": PAIRS, "receivers": [[]]}, "receivers[0]", "an input's or a node's name"),
    ("path_patching", {"eval_data": PAIRS, "receivers": ["L9H1<q>"]}, "receivers", "L9H1<q>"),
    ("path_patching", {"eval_data": PAIRS, "receivers": ["logits"], "senders": ["L9H1"]}, "senders", "L9H1"),
    ("path_patching", {"eval_data": PAIRS, "receivers": ["L0H1"], "senders": ["L2H1"]}, "senders", "is before any of"),
    (
        "path_patching",
        {"eval_data": PAIRS * 85, "receivers": ["logits"] * 20},
        "receivers",
        "at most 100000 are allowed",
    ),
    ("edges", {"eval_data": PAIRS, "method": "guess"}, "method", "'eap-ig'"),
    ("edges", {"eval_data": PAIRS, "method": "eap", "metric": "kl"}, "metric", "its gradient is 0"),
    ("edges", {"eval_data": PAIRS, "steps": 0}, "steps", "greater than or equal to 1"),
    ("edges", {"eval_data": [{"clean": "Mary", "answer": "to"}], "ablation": "corrupted"}, "ablation", "corrupted"),
    ("edges", {"eval_data": PAIRS * 85, "method": "exact"}, "method", "at most 100000 are allowed"),
    ("circuit", {"eval_data": PAIRS, "size": 3, "threshold": 1}, "threshold", "is left out where 'size'"),
    ("circuit", {"eval_data": PAIRS, "method": "acdc"}, "threshold", "is required for acdc"),
    ("circuit", {"eval_data": PAIRS, "method": "acdc", "threshold": 1, "size": 3}, "size", "is not taken by acdc"),
    ("circuit", {"eval_data": PAIRS, "method": "acdc", "faithfulness": 0.5}, "faithfulness", "is not taken by acdc"),
    ("circuit", {"eval_data": PAIRS, "method": "acdc", "threshold": 1e6}, "threshold", "keeps no edge"),
    ("circuit", {"eval_data": PAIRS, "threshold": 1e6}, "threshold", "No edge"),
    ("circuit", {"eval_data": PAIRS, "size": 1}, "size", "the circuit would be empty"),
    ("circuit", {"eval_data": PAIRS[:1], "method": "eap", "threshold": 5}, "threshold", "the circuit would be empty"),
    ("circuit", {"eval_data": PAIRS, "formats": ["pdf"]}, "formats[0]", "'neuronpedia'"),
    ("circuit", {"eval_data": PAIRS, "judge_by": [{"clean": "Mary"}]}, "judge_by[0].answer", "is required"),
    ("circuit", {"eval_data": PAIRS, "judge_by": [FIRST | {"corrupted": "Mary"}]}, "judge_by[0]", "has 15 and 2."),
    ("attention", {}, None, "Exactly one of 'prompt' and 'messages'"),
    ("attention", {"prompt": "Mary", "layers": [4]}, "layers", "4"),
    ("attention", {"prompt": "Mary", "layers": [1, 1]}, "layers", "has each layer once"),
    ("attention", {"prompt": [600]}, "prompt", "beyond the vocabulary"),
    ("attention", {"prompt": [1] * 200}, None, "reads at most"),
    ("heads", {"prompts": [[]]}, "prompts[0]", "a string or a list of token ids"),
    ("heads", {"prompts": ["Mary", [600]]}, "prompts[1]", "600"),
    ("heads", {"prompts": ["Mary", "Mary " * 200]}, "prompts[1]", "at most 128 are read"),
    ("heads", {"layers": [0, -4]}, "layers", "has each layer once"),
    ("composition", {"layers": [3, -1]}, "layers", "has each layer once"),
    ("attention", {"prompt": "Mary", "layers": [1, -3]}, "layers", "has each layer once"),
    ("heads", {"layers": [9]}, "layers", "9"),
    ("heads", {"sequences": 0}, "sequences", "greater than or equal to 1"),
    ("composition", {"top": 0}, "top", "greater than or equal to 1"),
]


@pytest.mark.parametrize(
    ("what", "body", "param", "complaint"), RUBBISH, ids=[f"{i}-{what}" for i, (what, *_) in enumerate(RUBBISH)]
)
def test_rubbish_is_refused(client: FlaskClient, what: str, body: Any, param: str | None, complaint: str) -> None:
    reply = client.post(f"/v1/analysis/{what}", json=body)
    error = reply.json["error"]
    assert (reply.status_code, error["param"]) == (400, param), error["message"]
    assert complaint in error["message"]
    assert error["message"].count("\n") == 0


def test_without_a_model_nothing_is_run() -> None:
    with ModelWorker() as empty:
        reply = create_app(empty, ServerConfig()).test_client().post("/v1/analysis/ablation", json={"eval_data": PAIRS})
    assert (reply.status_code, reply.json["error"]["code"]) == (409, "no_model_loaded")
