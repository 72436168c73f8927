"""Traits over HTTP: what Python measures, number by number, as a whole and as events; vectors given and stored."""

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from server_tools import MESSAGES, load_tiny, paced, running_server, until

from api_server import ModelWorker, ServerConfig, create_app
from api_server.__main__ import CannotStart, _config, _parser
from api_server.schemas import analysis
from api_server.schemas.fields import MAX_VECTORS, MAX_WIDTH
from mlx_hooks import HookedModel, TraitVector, watch_traits
from mlx_hooks.analysis.identity import ModelIdentity
from mlx_hooks.analysis.traits.dynamics import trait_dynamics
from mlx_hooks.analysis.traits.prompts import Chat
from mlx_hooks.analysis.traits.vectors import GIVEN, METHODS
from neuroscope_bridge import LMStudioNeuroScopeClient, NeuroScopeAPIError, PayloadError
from neuroscope_bridge.payload import encode_activation, encode_vector

ROUTE = "/v1/analysis/traits"
PROMPT = [3, 7, 8, 9, 10, 4]
WIDTH = 32
RNG = np.random.default_rng(7)
FIRST, SECOND, THIRD = RNG.normal(size=(3, WIDTH)).astype(np.float32) * 3
VECTORS: list[dict[str, Any]] = [
    {"name": "first", "layer": 2, "vector": FIRST.tolist(), "threshold": 0.5},
    {"name": "second", "hook_point": "blocks.0.hook_resid_post", "vector": SECOND.tolist()},
    {"name": "third", "layer": 2, "vector": THIRD.tolist()},
]
TRAITS = [
    TraitVector("first", 2, GIVEN, FIRST, threshold=0.5),
    TraitVector("second", 0, GIVEN, SECOND),
    TraitVector("third", 2, GIVEN, THIRD),
]
BODY: dict[str, Any] = {"prompt": PROMPT, "vectors": VECTORS, "max_tokens": 5, "temperature": 0}


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One experiment of the llama with two traits, one trait without vectors and one whose vector is damaged."""
    root = tmp_path_factory.mktemp("lab") / "experiments"
    identity = ModelIdentity.of(load_tiny("llama"))
    for layer, method, numbers in ((1, "probe", FIRST), (2, "probe", SECOND), (1, "ica", THIRD)):
        metadata = {"held_out_accuracy": 0.5 + 0.1 * layer}
        vector = TraitVector("x", layer, method, numbers, threshold=1.5, metadata=metadata, identity=identity)
        vector.save(root / "moods" / "angry" / "extraction" / "vectors")
    TraitVector("x", 0, "mean_diff", SECOND, identity=identity).save(root / "moods/calm/extraction/vectors")
    (root / "broken" / "empty" / "extraction").mkdir(parents=True)
    folder = root / "broken" / "damaged" / "extraction" / "vectors"
    folder.mkdir(parents=True)
    (folder / "probe_layer1.safetensors").write_bytes(b"rubbish, and enough of it")
    (root / "nothing").mkdir()
    return root


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama", "tiny")
        yield worker


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load_tiny("llama")


@pytest.fixture(scope="module")
def web(worker: ModelWorker, experiments: Path) -> FlaskClient:
    return create_app(worker, ServerConfig(experiments=experiments)).test_client()


@pytest.fixture(scope="module")
def client(worker: ModelWorker, experiments: Path) -> Iterator[LMStudioNeuroScopeClient]:
    with (
        running_server(worker, ServerConfig(port=0, experiments=experiments)) as url,
        LMStudioNeuroScopeClient(url) as client,
    ):
        yield client


def ask(web: FlaskClient, status: int = 200, **fields: Any) -> Any:
    """The reply to BODY with other fields; None leaves one out."""
    body = {name: value for name, value in (BODY | fields).items() if value is not None}
    reply = web.post(ROUTE, json=body)
    assert reply.status_code == status, reply.get_data(as_text=True)[:500]
    return reply.get_json()


def events_of(web: FlaskClient, **fields: Any) -> list[dict[str, Any]]:
    reply = web.post(ROUTE, json=BODY | fields | {"stream": True})
    assert reply.mimetype == "text/event-stream"
    *events, end, rest = reply.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def refused(web: FlaskClient, param: str | None, code: str = "invalid_value", status: int = 400, **fields: Any) -> str:
    """The sentence with which a request is refused."""
    error = ask(web, status, **fields)["error"]
    assert (error["param"], error["code"]) == (param, code), error
    return str(error["message"])


def table(reply: dict[str, Any], *names: str) -> np.ndarray:
    """Its scores, [token, trait]."""
    return np.array([[row["scores"][name] for name in names] for row in reply["scores"]])


NAMES = ("first", "second", "third")


# What is answered


@pytest.mark.parametrize("normalize", [True, False])
def test_scores_are_those_of_python_and_of_a_full_pass(web: FlaskClient, model: HookedModel, normalize: bool) -> None:
    reply = ask(web, normalize=normalize)
    steps = list(watch_traits(model, PROMPT, TRAITS, max_tokens=5, normalize=normalize))
    found = table(reply, *NAMES)
    np.testing.assert_array_equal(found.astype(np.float32), np.concatenate([step.scores for step in steps]))
    ids = [row["token_id"] for row in reply["scores"]]
    assert ids == [*PROMPT, *model.generate(PROMPT, max_tokens=5).tokens]
    # All tokens at once, in float64.
    _, cache = model.run_with_cache(ids, "blocks.*.hook_resid_post")
    for column, vector in zip(found.T, TRAITS, strict=True):
        stream, v = cache.numpy(vector.hook_point)[0].astype(np.float64), vector.vector.astype(np.float64)
        expected = stream @ v / (np.sqrt(v @ v) if normalize else 1)
        np.testing.assert_allclose(column, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_every_token_has_a_row_and_the_reply_its_accounts(web: FlaskClient, model: HookedModel) -> None:
    reply = ask(web)
    made = model.generate(PROMPT, max_tokens=5)
    assert [row["position"] for row in reply["scores"]] == list(range(11))
    assert [row["phase"] for row in reply["scores"]] == ["prompt"] * 6 + ["response"] * 5
    assert [row["token"] for row in reply["scores"]] == reply["tokens"]["strings"]
    assert reply["tokens"]["ids"] == [*PROMPT, *made.tokens]
    assert (reply["text"], reply["finish_reason"], reply["model"]) == (made.text, "length", "tiny")
    assert reply["usage"] == {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11}
    assert reply["interventions"] == []
    for told, vector in zip(reply["traits"], TRAITS, strict=True):
        assert told == {
            "name": vector.trait,
            "layer": vector.layer,
            "hook_point": f"blocks.{vector.layer}.hook_resid_post",
            "method": "given",
            "norm": pytest.approx(np.linalg.norm(vector.vector.astype(np.float64))),
            "threshold": vector.threshold,
            "chat": None,
        }


@pytest.mark.parametrize(
    "settings", [{}, {"stays_below": True}, {"threshold": 0.3, "relative": True}, {"threshold": 4, "stays_below": True}]
)
def test_dynamics_are_of_the_response(web: FlaskClient, settings: dict[str, Any]) -> None:
    reply = ask(web, dynamics=settings or None)
    response = table(reply, *NAMES)[6:].astype(np.float32)
    for name, scores in zip(NAMES, response.T, strict=True):
        assert reply["dynamics"][name] == trait_dynamics(scores, **settings).to_dict()


def test_a_prompt_alone_is_read_and_its_dynamics_told(web: FlaskClient) -> None:
    whole, prompt = ask(web), ask(web, max_tokens=0)
    assert prompt["scores"] == whole["scores"][:6]
    assert (prompt["text"], prompt["finish_reason"]) == ("", "length")
    scores = table(prompt, "first").astype(np.float32)[:, 0]
    assert prompt["dynamics"]["first"] == trait_dynamics(scores).to_dict()
    opening, closing = events_of(web, max_tokens=0)
    assert opening["scores"] == prompt["scores"]
    assert closing["dynamics"] == prompt["dynamics"]


def test_events_are_the_whole_reply_piece_by_piece(web: FlaskClient) -> None:
    whole, events = ask(web, temperature=1, seed=3), events_of(web, temperature=1, seed=3)
    assert [len(event["scores"]) for event in events] == [6, 1, 1, 1, 1, 1, 0]
    assert [row for event in events for row in event["scores"]] == whole["scores"]
    assert "".join(event["text"] for event in events) == whole["text"]
    assert events[0]["text"] == ""
    assert {name: events[0][name] for name in ("model", "traits")} == {
        name: whole[name] for name in ("model", "traits")
    }
    assert all(set(event) == {"scores", "text"} for event in events[1:-1])
    # Each token's own text comes with its own scores.
    assert [event["text"].strip() for event in events[1:-1]] == [row["token"].strip() for row in whole["scores"][6:]]
    accounts = {"dynamics", "finish_reason", "usage", "tokens", "interventions"}
    assert set(events[-1]) == accounts | {"scores", "text"}
    assert {name: events[-1][name] for name in accounts} == {name: whole[name] for name in accounts}


def test_messages_go_through_the_chat_template_and_texts_do_not(web: FlaskClient) -> None:
    # The template writes PROMPT of these messages.
    chat = ask(web, prompt=None, messages=MESSAGES)
    text = ask(web, prompt="w1 w2 w3 w4")
    assert [row["token"] for row in chat["scores"][:6]] == ["<user>", "w1", "w2", "w3", "w4", "<assistant>"]
    assert [row["token"] for row in text["scores"][:4]] == ["w1", "w2", "w3", "w4"]
    assert text["usage"]["prompt_tokens"] == 4


def test_a_stop_text_ends_the_text_and_its_token_is_scored(web: FlaskClient) -> None:
    plain = ask(web)
    third = plain["scores"][8]["token"].strip()
    reply = ask(web, stop=third)
    assert reply["finish_reason"] == "stop"
    assert reply["scores"] == plain["scores"][:9]
    assert reply["text"] == plain["text"].split(third)[0]
    events = events_of(web, stop=third)
    assert "".join(event["text"] for event in events) == reply["text"]


def test_an_end_token_is_scored(tiny: HookedModel) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    direction = {"name": "a", "layer": 3, "vector": [1.0] * 128}
    with ModelWorker() as worker:
        worker.load("neuroscope-tiny")
        reply = create_app(worker).test_client().post(ROUTE, json=body | {"vectors": [direction]}).get_json()
    assert (reply["text"].split(), reply["finish_reason"]) == (["Paris", "."], "stop")
    assert [row["token"] for row in reply["scores"][6:]] == ["Paris", ".", "<eos>"]
    _, cache = tiny.run_with_cache(reply["tokens"]["ids"], "blocks.3.hook_resid_post")
    last = cache.numpy(("resid_post", 3))[0, -1].astype(np.float64)
    assert reply["scores"][-1]["scores"]["a"] == pytest.approx(last.sum() / np.sqrt(128), rel=1e-4)


def test_steering_moves_the_score_by_coefficient_times_length(web: FlaskClient) -> None:
    steer = {"hook_point": "blocks.2.hook_resid_post", "type": "add", "vector": FIRST.tolist(), "coefficient": 2.0}
    plain, steered = ask(web, max_tokens=0), ask(web, max_tokens=0, interventions=[steer])
    moved = table(steered, "first", "second") - table(plain, "first", "second")
    norm = np.linalg.norm(FIRST.astype(np.float64))
    np.testing.assert_allclose(moved[:, 0], 2 * norm, rtol=1e-4)
    np.testing.assert_array_equal(moved[:, 1], 0)
    assert steered["interventions"][0]["positions"] == list(range(6))
    # The last token is read too, so it is steered as well.
    assert ask(web, interventions=[steer])["interventions"][0]["positions"] == list(range(11))


def test_numbers_that_leave_float32_are_null(web: FlaskClient) -> None:
    large = {"name": "large", "layer": 1, "vector": [3e38] * WIDTH}
    reply = ask(web, vectors=[large, VECTORS[0]], normalize=False)
    assert None in [row["scores"]["large"] for row in reply["scores"]]
    assert reply["dynamics"]["large"] is None
    assert reply["dynamics"]["first"]["n"] == 5
    np.testing.assert_array_equal(table(ask(web, vectors=[large]), "large").shape, (11, 1))


# How a vector is given


def test_a_vector_comes_as_numbers_or_as_a_record(web: FlaskClient) -> None:
    expected = ask(web, vectors=VECTORS[:1])
    place = {"hook_id": "r", "layer_name": "2", "component": "residual", "hook_point": "blocks.2.hook_resid_post",
             "layer_index": 2, "axes": ["batch", "pos", "d_model"], "phase": "prefill", "step": 0, "positions": (3, 4),
             "is_input": False}  # fmt: skip
    record = encode_activation(FIRST.reshape(1, 1, WIDTH), **place, encoding="base64")
    listed = encode_activation(FIRST.reshape(1, 1, WIDTH), **place)
    for vector in (encode_vector(FIRST), record, listed | {"data": listed["data"].tolist()}):
        assert ask(web, vectors=[VECTORS[0] | {"vector": vector}]) == expected


def test_the_client_takes_arrays_and_yields_events(client: LMStudioNeuroScopeClient, web: FlaskClient) -> None:
    arrays = [one | {"vector": np.array(one["vector"])} for one in VECTORS]
    arrays[1]["vector"] = arrays[1]["vector"].tolist()
    reply = client.traits(PROMPT, vectors=arrays, max_tokens=5, temperature=0)
    assert reply == ask(web)
    with client.traits(PROMPT, vectors=arrays, max_tokens=5, temperature=0, stream=True) as events:
        assert list(events) == events_of(web)
    chat = client.traits(messages=MESSAGES, vectors=arrays, max_tokens=0, normalize=False)
    assert chat["scores"] == ask(web, prompt=None, messages=MESSAGES, max_tokens=0, normalize=False)["scores"]
    stored = client.traits(PROMPT, experiment="moods", traits=["calm"], max_tokens=0)
    assert stored["scores"] == ask(web, vectors=None, experiment="moods", traits=["calm"], max_tokens=0)["scores"]
    steer = {"hook_point": "blocks.1.hook_resid_post", "type": "add", "vector": FIRST, "coefficient": 1}
    assert client.traits(PROMPT, vectors=arrays, interventions=[steer])["interventions"][0]["fired"] > 1
    with pytest.raises(NeuroScopeAPIError, match="5 wide") as error:
        client.traits(PROMPT, vectors=[VECTORS[0], {"name": "b", "layer": 0, "vector": np.ones(5)}])
    assert error.value.param == "vectors[1].vector"
    with pytest.raises(ValueError, match="exactly one"):
        client.traits(vectors=arrays)


@pytest.mark.parametrize("vector", [np.array([1, np.nan]), np.ones((2, 2)), np.array([]), np.array(["a"]), [np.inf]])
def test_the_client_refuses_what_is_no_vector(client: LMStudioNeuroScopeClient, vector: Any) -> None:
    with pytest.raises(PayloadError):
        client.traits(PROMPT, vectors=[{"name": "a", "layer": 0, "vector": vector}])


@pytest.mark.parametrize(
    ("vectors", "got"),
    [
        ([TRAITS[0]], "a list of TraitVector"),
        (VECTORS[0], "dict"),
        ([VECTORS[0], "x"], "a list of str"),
        ("x", "str"),
        ([], "list"),
        (3, "int"),
    ],
)
def test_the_client_says_what_vectors_are(client: LMStudioNeuroScopeClient, vectors: Any, got: str) -> None:
    with pytest.raises(PayloadError, match=f"'name', 'layer', 'vector'}}, got {got}"):
        client.traits(PROMPT, vectors=vectors)


def test_the_client_takes_a_record_of_one_row(client: LMStudioNeuroScopeClient, web: FlaskClient) -> None:
    for shape in ((1, WIDTH), (1, 1, WIDTH)):
        vectors = [VECTORS[0] | {"vector": FIRST.reshape(shape)}]
        reply = client.traits(PROMPT, vectors=vectors, max_tokens=0)
        assert reply["scores"] == ask(web, vectors=VECTORS[:1], max_tokens=0)["scores"]


@pytest.mark.parametrize("numbers", ["NaN", "Infinity", "1e39", "null", "true", '"1"', "[1]", "9" * 400])
def test_what_is_no_number_is_refused_with_its_index(web: FlaskClient, numbers: str) -> None:
    text = json.dumps(BODY | {"vectors": [VECTORS[0], VECTORS[1] | {"vector": ["here"]}]}).replace('"here"', numbers)
    error = web.post(ROUTE, data=text, content_type="application/json").get_json()["error"]
    assert (error["param"], error["code"]) == ("vectors[1].vector", "invalid_value")
    assert "finite numbers" in error["message"]


UNFIT: list[tuple[dict[str, Any], str, str]] = [
    ({"vector": [0.0] * WIDTH}, "vector", "0 everywhere"),
    ({"vector": [1.0] * 31}, "vector", "31 wide"),
    ({"vector": encode_vector(np.zeros(WIDTH))}, "vector", "0 everywhere"),
    ({"vector": encode_vector(FIRST) | {"data": "AAAA"}}, "vector", "The vector of other: data is not float32"),
    ({"vector": encode_vector(FIRST) | {"shape": [31]}}, "vector", "needs 31 numbers"),
    ({"vector": encode_vector(FIRST) | {"shape": [4, 8]}}, "vector", "one row of numbers"),
    ({"vector": {"shape": [1], "dtype": "float32", "encoding": "json", "data": [None]}}, "vector", "finite"),
    ({"layer": 3}, "layer", "layers 0 to 2"),
    ({"layer": None, "hook_point": "blocks.3.hook_resid_post"}, "hook_point", "layers 0 to 2"),
    ({"layer": None, "hook_point": "blocks.1.hook_mlp_out"}, "hook_point", "pattern"),
    ({"layer": -1}, "layer", "greater than or equal to 0"),
    ({"name": ""}, "name", "at least 1 character"),
    ({"threshold": "1"}, "threshold", "number"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "field", "message"), UNFIT)
def test_a_vector_that_does_not_fit_is_named(
    web: FlaskClient, change: dict[str, Any], field: str, message: str
) -> None:
    wrong = VECTORS[0] | {"name": "other"} | change
    assert message in refused(web, f"vectors[1].{field}", vectors=[VECTORS[0], wrong])


def test_what_else_is_refused(web: FlaskClient) -> None:
    assert "At least one" in refused(web, None, vectors=None)
    assert "'first' twice" in refused(web, "vectors", vectors=[VECTORS[0], VECTORS[0]])
    assert "at most 256 items" in refused(web, "vectors", vectors=VECTORS[:1] * (MAX_VECTORS + 1))
    assert "Exactly one" in refused(web, None, messages=MESSAGES)
    for name, value in (("traits", ["angry"]), ("method", "probe"), ("layer", 1)):
        assert "experiment" in refused(web, name, **{name: value})
    assert "is not supported" in refused(web, "n", n=2)
    assert "at most 1" in refused(web, "dynamics", dynamics={"threshold": 1.5, "relative": True})
    assert "greater than 0" in refused(web, "dynamics.threshold", dynamics={"threshold": 0})
    assert "no_such" in refused(
        web, "interventions[0]", "unknown_hook", interventions=[{"hook_point": "no_such", "type": "zero"}]
    )
    assert "beyond the vocabulary" in refused(web, "prompt", prompt=[10**6])
    assert "model" in refused(web, "model", "model_not_found", 404, model="other")


def test_a_reply_that_would_be_too_long_is_refused(
    web: FlaskClient, worker: ModelWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api_server.traits.MAX_SCORES", 32)
    assert "33 scores, 11 tokens of 3 traits; at most 32" in refused(web, "max_tokens", "limit_exceeded")
    assert len(ask(web, max_tokens=4)["scores"]) == 10
    small = create_app(worker, ServerConfig(max_tokens=3)).test_client()
    assert "at most 3" in refused(small, "max_tokens", "limit_exceeded")
    assert ask(small, max_tokens=None)["usage"]["completion_tokens"] == 3
    # What the context has no room for does not count.
    architecture = worker.get().model.architecture
    monkeypatch.setattr(architecture, "cfg", replace(architecture.cfg, max_positions=7))
    assert len(ask(web, max_tokens=32768)["scores"]) == 7


def test_given_and_stored_vectors_count_together(web: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_server.trait_vectors.MAX_VECTORS", 4)
    told = refused(web, "traits", "limit_exceeded", experiment="moods")
    assert told == "The request watches 5 traits; at most 4 are allowed: name those of interest."
    assert len(ask(web, experiment="moods", traits=["calm"], max_tokens=0)["traits"]) == 4


def test_a_vector_longer_than_any_model_is_wide_is_not_looked_at(web: FlaskClient) -> None:
    long = VECTORS[0] | {"vector": [1.0] * (MAX_WIDTH + 1)}
    assert f"at most {MAX_WIDTH} finite" in refused(web, "vectors[0].vector", vectors=[long])
    vector = analysis.TraitVectorRequest.model_json_schema()["properties"]["vector"]
    assert vector["anyOf"][0]["maxItems"] == MAX_WIDTH


# Stored vectors


def test_stored_vectors_are_those_that_the_experiment_would_choose(web: FlaskClient, model: HookedModel) -> None:
    reply = ask(web, vectors=None, experiment="moods")
    told = [(one["name"], one["method"], one["layer"], one["threshold"]) for one in reply["traits"]]
    assert told == [("angry", "probe", 2, 1.5), ("calm", "mean_diff", 0, None)]
    same = [TraitVector("angry", 2, "probe", SECOND), TraitVector("calm", 0, "mean_diff", SECOND)]
    expected = np.concatenate([step.scores for step in watch_traits(model, PROMPT, same, max_tokens=5)])
    np.testing.assert_array_equal(table(reply, "angry", "calm").astype(np.float32), expected)


def test_stored_vectors_by_trait_method_and_layer(web: FlaskClient) -> None:
    def chosen(**fields: Any) -> list[tuple[str, str, int]]:
        reply = ask(web, vectors=None, experiment="moods", max_tokens=0, **fields)
        return [(one["name"], one["method"], one["layer"]) for one in reply["traits"]]

    assert chosen(traits=["calm", "angry"]) == [("calm", "mean_diff", 0), ("angry", "probe", 2)]
    assert chosen(traits=["angry"], layer=1) == [("angry", "probe", 1)]
    assert chosen(traits=["angry"], method="ica") == [("angry", "ica", 1)]
    both = ask(web, experiment="moods", traits=["calm"], max_tokens=0)
    assert [one["name"] for one in both["traits"]] == [*NAMES, "calm"]
    assert "both" in refused(web, "vectors", experiment="moods", vectors=[VECTORS[0] | {"name": "calm"}])


MISSING: list[tuple[dict[str, Any], str, str, str]] = [
    ({"experiment": "other"}, "experiment", "experiment_not_found", "broken, moods, nothing"),
    ({"experiment": "nothing"}, "experiment", "trait_not_found", "no traits"),
    ({"experiment": "moods", "traits": ["calm", "sad"]}, "traits[1]", "trait_not_found", "angry, calm"),
    ({"experiment": "moods", "traits": ["calm"], "method": "ica"}, "traits[0]", "vector_not_found", "mean_diff_layer0"),
    ({"experiment": "moods", "layer": 7}, "experiment", "vector_not_found", "layer 7"),
    ({"experiment": "broken", "traits": ["empty"]}, "traits[0]", "vector_not_found", "no vectors"),
]


@pytest.mark.parametrize(("fields", "param", "code", "message"), MISSING)
def test_what_is_not_stored_is_said_with_what_is(
    web: FlaskClient, experiments: Path, fields: dict[str, Any], param: str, code: str, message: str
) -> None:
    told = refused(web, param, code, 404, vectors=None, **fields)
    assert message in told


@pytest.fixture(params=["absolute", "relative"])
def private(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with experiments whose place nobody is told, as the server was given it; "e x p" has "my trait"."""
    root = tmp_path / "a lab" / "private" / "experiments"
    TraitVector("x", 1, "probe", FIRST).save(root / "e x p" / "my trait" / "extraction" / "vectors")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return root if request.param == "absolute" else Path("../a lab/private/experiments")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("extraction/vectors/probe_layer1.safetensors", b"rubbish, and enough of it", "is no trait vector"),
        ("trait.json", b"{no JSON", "is no JSON"),
        ("chat_template.jinja", b"\xff", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named_and_not_where_it_lies(
    worker: ModelWorker, private: Path, name: str, content: bytes, message: str
) -> None:
    (private / "e x p" / "my trait" / name).write_bytes(content)
    web = create_app(worker, ServerConfig(experiments=private)).test_client()
    told = refused(web, "experiment", "vector_unreadable", vectors=None, experiment="e x p")
    assert told.startswith(f"e x p/my trait/{name} {message}")
    assert "private" not in told


def test_a_broken_vector_beside_a_whole_one_is_passed_over(worker: ModelWorker, private: Path) -> None:
    (private / "e x p/my trait/extraction/vectors/probe_layer2.safetensors").write_bytes(b"rubbish, and enough of it")
    web = create_app(worker, ServerConfig(experiments=private)).test_client()
    (told,) = ask(web, vectors=None, experiment="e x p", max_tokens=0)["traits"]
    assert (told["method"], told["layer"]) == ("probe", 1)
    asked = refused(web, "experiment", "vector_unreadable", vectors=None, experiment="e x p", layer=2)
    assert "probe_layer2.safetensors is no trait vector" in asked


def test_traits_without_such_a_vector_are_left_out_where_none_is_named(worker: ModelWorker, private: Path) -> None:
    (private / "e x p" / "another" / "extraction").mkdir(parents=True)
    web = create_app(worker, ServerConfig(experiments=private)).test_client()
    (told,) = ask(web, vectors=None, experiment="e x p", max_tokens=0)["traits"]
    assert told["name"] == "my trait"
    refused(web, "traits[1]", "vector_not_found", 404, vectors=None, experiment="e x p", traits=["my trait", "another"])


def test_what_is_missing_is_named_and_not_where_it_would_lie(worker: ModelWorker, private: Path) -> None:
    web = create_app(worker, ServerConfig(experiments=private)).test_client()
    stored = {"vectors": None, "experiment": "e x p"}
    told = refused(web, "experiment", "experiment_not_found", 404, vectors=None, experiment="nope")
    assert told == "There is no experiment 'nope' in the folder with experiments. There are: e x p."
    told = refused(web, "experiment", "vector_not_found", 404, layer=2, **stored)
    assert told == "The trait my trait has no vector of layer 2 (as asked). There are: probe_layer1."
    trait = private / "e x p" / "my trait"
    (trait / "extraction/vectors/probe_layer1.safetensors").unlink()
    told = refused(web, "experiment", "vector_not_found", 404, **stored)
    assert told == "The trait my trait has no vectors in e x p/my trait/extraction/vectors: extract them first."
    private.rename(private.parent / "gone")
    told = refused(web, "experiment", "experiment_not_found", 404, **stored)
    assert told == "The server has the folder with experiments no more."


def test_a_server_without_experiments_says_how_to_have_some(worker: ModelWorker) -> None:
    plain = create_app(worker).test_client()
    assert "--experiments" in refused(plain, "experiment", "no_experiments", vectors=None, experiment="moods")


def test_the_option_is_a_folder(tmp_path: Path) -> None:
    def folder(*arguments: str) -> Path | None:
        return _config(_parser("x").parse_args(arguments), None).experiments

    assert folder("--experiments", str(tmp_path)) == tmp_path
    assert folder() is None
    (tmp_path / "file").touch()
    for name in ("file", "nowhere"):
        with pytest.raises(CannotStart, match=f"There is no folder .*{name}: --experiments"):
            folder("--experiments", str(tmp_path / name))


@pytest.mark.parametrize("name", ["../lab", "..", ".", "/etc", "a/b", "a\\b", "", ".hidden", "moods\n", "moods\0"])
def test_a_path_is_no_name(web: FlaskClient, name: str) -> None:
    assert "without '/'" in refused(web, "experiment", vectors=None, experiment=name)
    assert "without '/'" in refused(web, "traits[0]", vectors=None, experiment="moods", traits=[name])


LINKS = [
    *("", "calm", "calm/extraction", "calm/extraction/vectors", "calm/trait.json", "calm/chat_template.jinja"),
    "calm/extraction/vectors/mean_diff_layer0.safetensors",
]


@pytest.mark.parametrize("link", LINKS)
def test_a_link_that_leads_out_is_not_followed(worker: ModelWorker, tmp_path: Path, link: str) -> None:
    root, outside = tmp_path / "experiments", tmp_path / "outside"
    for folder in (root, outside):
        TraitVector("x", 0, "mean_diff", SECOND).save(folder / "moods" / "calm" / "extraction" / "vectors")
        (folder / "moods" / "calm" / "trait.json").write_text("{}")
        (folder / "moods" / "calm" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    web = create_app(worker, ServerConfig(experiments=root)).test_client()
    stored = {"vectors": None, "experiment": "moods", "max_tokens": 0}
    assert [one["name"] for one in ask(web, **stored)["traits"]] == ["calm"]
    at = root / "moods" / link
    at.rename(tmp_path / "away")
    at.symlink_to(tmp_path / "away")
    assert "leads out" in refused(web, "experiment", "path_not_allowed", 403, **stored)
    listed = web.get(ROUTE).get_json()["experiments"]
    assert listed == ([{"name": "moods", "traits": []}] if link else [])
    if not link:
        refused_list = web.get(f"{ROUTE}?experiment=moods")
        assert (refused_list.status_code, refused_list.get_json()["error"]["code"]) == (403, "path_not_allowed")
        assert "calm" not in refused(web, "experiment", "path_not_allowed", 403, traits=["sad"], **stored)
    at.unlink()
    # A link inside the folder is as good as what it means.
    (tmp_path / "away").rename(root / "elsewhere")
    at.symlink_to(root / "elsewhere")
    assert [one["name"] for one in ask(web, **stored)["traits"]] == ["calm"]


def test_links_to_what_is_not_read_do_no_harm(worker: ModelWorker, tmp_path: Path) -> None:
    trait = tmp_path / "experiments" / "moods" / "calm"
    TraitVector("x", 0, "mean_diff", SECOND).save(trait / "extraction" / "vectors")
    (tmp_path / "disk").mkdir()
    for name in ("inference", "extraction/positive.txt", "extraction/vectors/notes.txt"):
        (trait / name).symlink_to(tmp_path / "disk")
    (trait / "loop").symlink_to(trait / "loop")
    web = create_app(worker, ServerConfig(experiments=tmp_path / "experiments")).test_client()
    assert len(ask(web, vectors=None, experiment="moods", max_tokens=0)["traits"]) == 1
    (trait / "trait.json").symlink_to(trait / "trait.json")
    assert "leads out" in refused(web, "experiment", "path_not_allowed", 403, vectors=None, experiment="moods")


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (TraitVector("x", 0, "mean_diff", np.ones(77)), "mean_diff_layer0 is 77 wide; the stream of tiny is 32."),
        (TraitVector("x", 9, "probe", FIRST), "probe_layer9 is of layer 9; tiny has layers 0 to 2."),
        (TraitVector("x", 9, GIVEN, FIRST), "given_layer9 is of layer 9; tiny has layers 0 to 2."),
    ],
)
def test_stored_vectors_that_nobody_signed_are_measured_too(
    worker: ModelWorker, tmp_path: Path, vector: TraitVector, message: str
) -> None:
    vector.save(tmp_path / "e" / "t" / "extraction" / "vectors")
    web = create_app(worker, ServerConfig(experiments=tmp_path)).test_client()
    told = refused(web, "experiment", "other_model", vectors=None, experiment="e")
    assert told == f"The vector t/{message}"


def test_stored_vectors_of_another_model_are_refused(experiments: Path) -> None:
    stored = {"vectors": None, "experiment": "moods", "traits": ["calm"]}

    def load(path: str) -> HookedModel:
        model = load_tiny(path)
        model.model.model.norm.weight = model.model.model.norm.weight * 1.01
        return model

    with ModelWorker(load=load) as worker:
        web = create_app(worker, ServerConfig(experiments=experiments)).test_client()
        worker.load("llama", "tuned")
        worker.load("neuroscope-tiny", "wider")
        told = refused(web, "experiment", "other_model", model="tuned", **stored)
        assert told == "The vector calm/mean_diff_layer0 is of another model: its weights differ."
        assert "32 wide; the stream" in refused(web, "experiment", "other_model", model="wider", **stored, prompt="The")


def test_a_model_is_told_from_others_once(experiments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, of = [], ModelIdentity.of
    monkeypatch.setattr(ModelIdentity, "of", lambda model: made.append(model) or of(model))
    with ModelWorker(load=load_tiny) as worker:
        web = create_app(worker, ServerConfig(experiments=experiments)).test_client()
        worker.load("llama")
        for _ in range(2):
            assert len(ask(web, experiment="moods", max_tokens=0)["traits"]) == 5
    assert len(made) == 1


def test_the_methods_are_those_of_stored_vectors() -> None:
    schema = analysis.TraitsRequest.model_json_schema()["properties"]["method"]
    assert next(one["enum"] for one in schema["anyOf"] if "enum" in one) == [*METHODS, GIVEN]


# What is stored


def test_what_is_stored_is_listed(web: FlaskClient, client: LMStudioNeuroScopeClient) -> None:
    def vectors(*names: tuple[str, int]) -> list[dict[str, Any]]:
        return [{"method": method, "layer": layer} for method, layer in names]

    moods = {
        "name": "moods",
        "traits": [
            {"name": "angry", "display_name": "Angry", "vectors": vectors(("probe", 1), ("probe", 2), ("ica", 1))},
            {"name": "calm", "display_name": "Calm", "vectors": vectors(("mean_diff", 0))},
        ],
    }
    broken = {
        "name": "broken",
        "traits": [
            {"name": "damaged", "display_name": "Damaged", "vectors": vectors(("probe", 1))},
            {"name": "empty", "display_name": "Empty", "vectors": []},
        ],
    }
    assert client.stored_traits() == [broken, moods, {"name": "nothing", "traits": []}]
    assert client.stored_traits("moods") == [moods]
    for query, status, code in (
        ("experiment=none", 404, "experiment_not_found"),
        ("experiment=..", 400, "invalid_value"),
        ("model=tiny", 400, "invalid_value"),
    ):
        reply = web.get(f"{ROUTE}?{query}")
        assert (reply.status_code, reply.get_json()["error"]["code"]) == (status, code)


def test_a_listing_tells_titles_and_survives_broken_settings(worker: ModelWorker, tmp_path: Path) -> None:
    for name, text in (("a", '{"display_name": "Ah!"}'), ("b", "{no JSON")):
        (tmp_path / "e" / name / "extraction").mkdir(parents=True)
        (tmp_path / "e" / name / "trait.json").write_text(text)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file").touch()
    (listed,) = create_app(worker, ServerConfig(experiments=tmp_path)).test_client().get(ROUTE).json["experiments"]
    assert [one["display_name"] for one in listed["traits"]] == ["Ah!", "b"]


def test_a_listing_survives_what_cannot_be_read(
    worker: ModelWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("moods/calm", "moods/odd", "sealed/calm"):
        TraitVector("x", 0, "mean_diff", SECOND).save(tmp_path / name / "extraction" / "vectors")
    odd = tmp_path / "moods" / "odd" / "extraction" / "vectors"
    odd.rename(tmp_path / "away")
    odd.touch()
    # Not even the system can say whether that is a folder.
    for folder in (tmp_path, tmp_path / "moods"):
        (folder / "nowhere").symlink_to("x" * 300)
    read = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "sealed":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    web = create_app(worker, ServerConfig(experiments=tmp_path)).test_client()
    calm = {"name": "calm", "display_name": "Calm", "vectors": [{"method": "mean_diff", "layer": 0}]}
    moods = {"name": "moods", "traits": [calm, {"name": "odd", "display_name": "Odd", "vectors": []}]}
    listed = web.get(ROUTE)
    assert listed.get_json() == {
        "experiments": [{"name": "away", "traits": []}, moods, {"name": "sealed", "traits": []}]
    }
    assert web.get(f"{ROUTE}?experiment=moods").get_json() == {"experiments": [moods]}
    # Who asks for it is told.
    told = web.get(f"{ROUTE}?experiment=sealed")
    assert told.status_code == 404
    assert told.get_json()["error"]["message"] == "sealed cannot be read: Permission denied."
    stored = {"vectors": None, "experiment": "moods", "max_tokens": 0}
    told = refused(web, "traits[0]", "vector_unreadable", traits=["odd"], **stored)
    assert told == "moods/odd/extraction/vectors cannot be read: Not a directory."
    assert [one["name"] for one in ask(web, traits=["calm"], **stored)["traits"]] == ["calm"]


def test_a_server_without_experiments_lists_none(worker: ModelWorker) -> None:
    reply = create_app(worker).test_client().get(ROUTE)
    assert (reply.status_code, reply.json["error"]["code"]) == (400, "no_experiments")


# How prompts are put


@pytest.fixture(scope="module")
def chats(worker: ModelWorker, tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    """Two traits that were made of prompts after a system message, one of plain text, one that does not say."""
    root = tmp_path_factory.mktemp("chats")
    for name, chat in (
        ("first", Chat(system="w9")),
        ("second", Chat(True, "w9")),
        ("plain", Chat(False)),
        ("unsaid", None),
    ):
        TraitVector("x", 1, "probe", FIRST, chat=chat).save(root / "e" / name / "extraction" / "vectors")
    (root / "e" / "unsaid" / "chat_template.jinja").write_text("<user> {{ messages[0].content }} <assistant>")
    return create_app(worker, ServerConfig(experiments=root)).test_client()


def words(reply: dict[str, Any]) -> str:
    return " ".join(reply["tokens"]["strings"])


def test_a_prompt_is_put_as_the_stored_vectors_were_made(chats: FlaskClient, model: HookedModel) -> None:
    stored = {"vectors": None, "experiment": "e", "max_tokens": 0, "prompt": "w1 w2"}
    reply = ask(chats, **stored, traits=["first", "second"], stored_chat=True)
    assert words(reply) == "<system> w9 <user> w1 w2 <assistant>"
    system = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1 w2"}]
    same = ask(chats, **stored | {"prompt": None}, messages=system, traits=["first", "second"])
    assert reply["scores"] == same["scores"]
    vector = TraitVector("first", 1, "probe", FIRST)
    (step,) = watch_traits(model, "w1 w2", [vector], chat=Chat(system="w9"), max_tokens=0)
    np.testing.assert_array_equal(table(reply, "first").astype(np.float32), step.scores)
    assert words(ask(chats, **stored, traits=["plain"], stored_chat=True)) == "w1 w2"
    # What a vector does not say, its trait does.
    assert words(ask(chats, **stored, traits=["unsaid"], stored_chat=True)) == "<user> w1 w2 <assistant>"
    assert words(ask(chats, **stored, traits=["first"])) == words(ask(chats, **stored)) == "w1 w2"
    # Those that came with the request have nothing to say.
    both = ask(chats, **stored | {"vectors": [VECTORS[0] | {"name": "mine"}]}, traits=["first"], stored_chat=True)
    assert words(both) == words(reply)


def test_how_stored_vectors_were_made_is_told(chats: FlaskClient) -> None:
    reply = ask(chats, experiment="e", vectors=[VECTORS[0] | {"name": "mine"}], max_tokens=0)
    template = "<user> {{ messages[0].content }} <assistant>"
    assert {one["name"]: one["chat"] for one in reply["traits"]} == {
        "mine": None,
        "first": {"use": None, "system": "w9", "template": None},
        "plain": {"use": False, "system": None, "template": None},
        "second": {"use": True, "system": "w9", "template": None},
        "unsaid": {"use": None, "system": None, "template": template},
    }


def test_where_stored_chats_cannot_be_used(chats: FlaskClient) -> None:
    stored = {"vectors": None, "experiment": "e", "stored_chat": True}
    told = refused(chats, "stored_chat", **stored, prompt="w1")
    assert told == (
        "first and plain were made of prompts that were put differently: name traits of one way in 'traits'."
    )
    text = "needs 'experiment' and a 'prompt' that is a text"
    assert text in refused(chats, "stored_chat", **stored)
    assert text in refused(chats, "stored_chat", **stored, prompt=None, messages=MESSAGES)
    assert text in refused(chats, "stored_chat", prompt="w1", stored_chat=True)


def test_too_long_a_prompt_is_refused_alike_however_it_is_put(
    worker: ModelWorker, chats: FlaskClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = worker.get("tiny").model
    most = model.cfg.max_positions
    assert most is not None
    monkeypatch.setattr(model.hf_tokenizer, "model_max_length", most)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    stored = {"vectors": None, "experiment": "e", "traits": ["first"], "max_tokens": 0}
    text = " ".join(["w1"] * (most + 1))
    system = [{"role": "system", "content": "w9"}, {"role": "user", "content": text}]
    for fields, added in (
        ({"prompt": text}, 0),
        ({"prompt": None, "messages": system}, 4),
        ({"prompt": text, "stored_chat": True}, 4),
        ({"prompt": text, "stored_chat": True, "traits": ["plain"]}, 0),
    ):
        told = refused(chats, None, "context_length_exceeded", **stored | fields)
        assert told == f"The prompt has {most + 1 + added} tokens; the model reads at most {most}."
    # The tokenizer would warn, once, of errors that nobody gets.
    assert not caplog.records
    assert not model.hf_tokenizer.deprecation_warnings
    model.tokenizer.encode(text)
    assert "indexing errors" in caplog.text


# Many callers


def test_many_at_once_get_what_each_alone_gets(client: LMStudioNeuroScopeClient) -> None:
    def one(number: int) -> dict[str, Any]:
        with LMStudioNeuroScopeClient(client.base_url) as own:
            vectors = [VECTORS[number % 3], VECTORS[(number + 1) % 3]]
            prompt = [3 + number, *PROMPT][: 3 + number % 4]
            return own.traits(prompt, vectors=vectors, max_tokens=6, temperature=1.5, seed=number)

    alone = [one(number) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(one, range(6))) == alone


def test_each_event_arrives_before_the_next_token_is_read() -> None:
    read = threading.Semaphore(0)
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama")
        done = paced(worker, lambda: read.acquire(timeout=5))
        with (
            running_server(worker) as url,
            LMStudioNeuroScopeClient(url) as client,
            client.traits(PROMPT, vectors=VECTORS, max_tokens=4, stream=True) as events,
        ):
            done_at = []
            for _ in events:
                done_at.append(len(done))
                read.release()
    # The prompt, four tokens, the accounts.
    assert done_at == [1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_who_hangs_up_stops_the_job(stream: bool) -> None:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama")
        done = paced(worker, lambda: time.sleep(0.02))
        body = json.dumps(BODY | {"max_tokens": 400, "stream": stream}).encode()
        head = f"POST {ROUTE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with running_server(worker) as url:
            with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
                connection.sendall(head.encode() + body)
                until(lambda: len(done) >= 2)
            (job,) = (job for job in worker.jobs() if job["kind"] == "traits")
            until(lambda: worker.job(job["id"]).is_finished)
        assert worker.job(job["id"]).status == "cancelled"
        assert len(done) < 100


def test_the_job_says_how_far_it_is(web: FlaskClient, worker: ModelWorker) -> None:
    ask(web)
    job = worker.jobs()[0]
    assert (job["kind"], job["model"], job["status"], job["fraction"]) == ("traits", "tiny", "completed", 1.0)
