"""Traits over HTTP: what Python measures, number by number, as a whole and as events; vectors given and stored."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from server_tools import MESSAGES, load_tiny, paced, running_server, until

from api_server import ModelWorker, ServerConfig, create_app
from api_server.__main__ import _config, _parser
from api_server.schemas import analysis
from api_server.schemas.fields import MAX_VECTORS
from mlx_hooks import HookedModel, TraitVector, watch_traits
from mlx_hooks.analysis.identity import ModelIdentity
from mlx_hooks.analysis.traits.dynamics import trait_dynamics
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
        }


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.3, "relative": True}, {"threshold": 4, "stays_below": True}])
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
    ({"experiment": "broken", "traits": ["damaged"]}, "traits[0]", "vector_not_found", "no trait vector"),
]


@pytest.mark.parametrize(("fields", "param", "code", "message"), MISSING)
def test_what_is_not_stored_is_said_with_what_is(
    web: FlaskClient, experiments: Path, fields: dict[str, Any], param: str, code: str, message: str
) -> None:
    told = refused(web, param, code, 404, vectors=None, **fields)
    assert message in told
    # Where the folder lies is not told.
    assert str(experiments.parent) not in told


def test_a_server_without_experiments_says_how_to_have_some(worker: ModelWorker) -> None:
    plain = create_app(worker).test_client()
    assert "--experiments" in refused(plain, "experiment", "no_experiments", vectors=None, experiment="moods")


def test_the_option_is_the_folder() -> None:
    assert _config(_parser("x").parse_args(["--experiments", "lab/runs"]), None).experiments == Path("lab/runs")
    assert _config(_parser("x").parse_args([]), None).experiments is None


@pytest.mark.parametrize("name", ["../lab", "..", ".", "/etc", "a/b", "a\\b", "", ".hidden", "moods\n", "moods\0"])
def test_a_path_is_no_name(web: FlaskClient, name: str) -> None:
    assert "without '/'" in refused(web, "experiment", vectors=None, experiment=name)
    assert "without '/'" in refused(web, "traits[0]", vectors=None, experiment="moods", traits=[name])


@pytest.mark.parametrize("link", ["", "calm", "calm/extraction", "calm/extraction/vectors", "calm/trait.json",
                                  "calm/extraction/vectors/mean_diff_layer0.safetensors"])  # fmt: skip
def test_a_link_that_leads_out_is_not_followed(worker: ModelWorker, tmp_path: Path, link: str) -> None:
    root, outside = tmp_path / "experiments", tmp_path / "outside"
    for folder in (root, outside):
        TraitVector("x", 0, "mean_diff", SECOND).save(folder / "moods" / "calm" / "extraction" / "vectors")
        (folder / "moods" / "calm" / "trait.json").write_text("{}")
    web = create_app(worker, ServerConfig(experiments=root)).test_client()
    stored = {"vectors": None, "experiment": "moods", "max_tokens": 0}
    assert [one["name"] for one in ask(web, **stored)["traits"]] == ["calm"]
    at = root / "moods" / link
    at.rename(tmp_path / "away")
    at.symlink_to(tmp_path / "away")
    assert "leads out" in refused(web, "experiment", "path_not_allowed", 403, **stored)
    if not link:
        assert "calm" not in refused(web, "experiment", "path_not_allowed", 403, traits=["sad"], **stored)
    at.unlink()
    # A link inside the folder is as good as what it means.
    (tmp_path / "away").rename(root / "elsewhere")
    at.symlink_to(root / "elsewhere")
    assert [one["name"] for one in ask(web, **stored)["traits"]] == ["calm"]


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
