"""The server: its contract through Flask's client; streams, threads and signals through a real one."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from flask import Flask
from flask.testing import FlaskClient
from server_tools import (
    HOOKS,
    MESSAGES,
    PROMPT_LENGTH,
    load_tiny,
    paced,
    running_server,
    save_tiny,
    server_process,
    until,
    url_of,
)

from api_server import ModelWorker, Server, ServerConfig, create_app
from api_server.__main__ import main
from api_server.errors import Busy, Stopping
from mlx_hooks import HookedModel, LogitLens
from mlx_hooks.hook_points import COMPONENTS
from neuroscope_bridge.payload import decode_activation

CHAT = "/v1/chat/completions"
CAPTURE = "/v1/chat/completions/with_activations"
SPELLED = ["<user>", "w1", "w2", "w3", "w4", "<assistant>"]


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama", "tiny")
        yield worker


@pytest.fixture
def client(worker: ModelWorker) -> Iterator[FlaskClient]:
    yield create_app(worker).test_client()
    worker.loaded.clear_hooks()


@pytest.fixture(scope="module")
def url(worker: ModelWorker) -> Iterator[str]:
    with running_server(worker) as url:
        yield url


def post(client: FlaskClient, path: str, status: int = 200, **body: Any) -> Any:
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.get_data(as_text=True)
    return reply.get_json()


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a whole stream, which must end as OpenAI's do."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


# Models


def test_health_names_the_loaded_models(client: FlaskClient) -> None:
    reply = client.get("/health").get_json()
    assert reply["status"] == "healthy"
    assert reply["service"] == "neuroscope-mlx"
    assert reply["models"] == ["tiny"]


def test_model_list_has_openai_s_shape_and_the_other_key(client: FlaskClient) -> None:
    reply = client.get("/v1/models").get_json()
    assert reply["object"] == "list"
    assert reply["data"] == reply["models"]
    assert {"id": "tiny", "model_id": "tiny", "object": "model", "owned_by": "local"}.items() <= reply["data"][
        0
    ].items()
    assert isinstance(reply["data"][0]["created"], int)


def test_loading_describes_the_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "my-model")
    with ModelWorker() as worker:
        client = create_app(worker).test_client()
        reply = post(client, "/v1/models/load", model_path=str(folder))
        expected = {
            "model_id": "my-model",
            "status": "loaded",
            "supports_activations": True,
            "num_layers": 3,
            "model_type": "llama",
            "d_model": 32,
            "num_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 60,
        }
        assert expected.items() <= reply.items()
        said = post(client, CHAT, messages=MESSAGES, max_tokens=3, temperature=0)
    assert len(said["choices"][0]["message"]["content"].split()) == 3


def test_last_loaded_model_is_the_default_until_unloaded() -> None:
    with ModelWorker(load=load_tiny) as worker:
        client = create_app(worker).test_client()
        for path in ("llama", "gpt2"):
            post(client, "/v1/models/load", model_path=path)
        assert post(client, CHAT, messages=MESSAGES, max_tokens=1)["model"] == "gpt2"
        assert post(client, CHAT, messages=MESSAGES, max_tokens=1, model="llama")["model"] == "llama"
        assert client.delete("/v1/models/gpt2").get_json()["status"] == "unloaded"
        assert post(client, CHAT, messages=MESSAGES, max_tokens=1)["model"] == "llama"
        post(client, CHAT, 404, messages=MESSAGES, max_tokens=1, model="gpt2")


def test_loading_an_id_again_replaces_the_model_and_its_hooks(client: FlaskClient) -> None:
    with ModelWorker(load=load_tiny) as worker:
        client = create_app(worker).test_client()
        post(client, "/v1/models/load", model_path="llama", model_id="it")
        post(client, "/v1/activations/hooks", hooks=HOOKS)
        post(client, "/v1/models/load", model_path="gpt2", model_id="it")
        assert client.get("/v1/models/it").get_json()["model_type"] == "gpt2"
        assert len(client.get("/v1/models").get_json()["data"]) == 1
        assert client.get("/v1/activations/hooks").get_json()["hooks"] == []


def test_loading_an_id_again_makes_it_the_default_again() -> None:
    with ModelWorker(load=load_tiny) as worker:
        client = create_app(worker).test_client()
        for path in ("llama", "gpt2", "llama"):
            post(client, "/v1/models/load", model_path=path)
        assert client.get("/health").get_json()["models"] == ["gpt2", "llama"]
        assert post(client, CHAT, messages=MESSAGES, max_tokens=1)["model"] == "llama"


def test_a_relative_folder_s_id_is_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "my-model")
    (folder / "inside").mkdir()
    with ModelWorker() as worker:
        client = create_app(worker).test_client()
        for place, path in ((folder, "."), (folder, "./"), (folder / "inside", ".."), (tmp_path, "./my-model/")):
            monkeypatch.chdir(place)
            assert post(client, "/v1/models/load", model_path=path)["model_id"] == "my-model"


def test_model_ids_may_hold_slashes() -> None:
    with ModelWorker(load=load_tiny) as worker:
        client = create_app(worker).test_client()
        post(client, "/v1/models/load", model_path="llama", model_id="owner/name")
        assert client.get("/v1/models/owner/name").get_json()["id"] == "owner/name"
        assert client.get("/v1/models/owner/name/hook_points").get_json()["model"] == "owner/name"


def test_hook_points_are_listed_with_their_axes(client: FlaskClient) -> None:
    points = {p["name"]: p for p in client.get("/v1/models/tiny/hook_points").get_json()["hook_points"]}
    assert points["blocks.2.attn.hook_pattern"] == {
        "name": "blocks.2.attn.hook_pattern",
        "layer": 2,
        "component": "pattern",
        "axes": ["batch", "head", "query", "key"],
        "sizes": [None, 4, None, None],
    }


def test_the_selftest_reports_each_identity(client: FlaskClient) -> None:
    report = post(client, "/v1/models/tiny/selftest")
    assert (report["model"], report["passed"], report["untrusted"]) == ("tiny", True, [])
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["logits with every hook attached = logits of the plain model"]["deviation"] == 0
    assert checks["z = pattern @ v"]["deviation"] <= checks["z = pattern @ v"]["tolerance"] == 1e-5
    assert checks["z = pattern @ v"]["compared"] == 3
    assert client.get("/v1/models/tiny").get_json()["untrusted_hook_points"] == []
    assert client.post("/v1/models/tiny/selftest", json={"length": 5}).status_code == 400
    assert client.post("/v1/models/other/selftest", json={}).status_code == 404


def test_text_becomes_tokens_and_text_again(client: FlaskClient) -> None:
    reply = post(client, "/v1/tokenize", text="w1 w2")
    assert reply == {"tokens": [7, 8], "token_strings": ["w1", "w2"], "count": 2}
    assert post(client, "/v1/detokenize", tokens=reply["tokens"]) == {"text": "w1 w2"}
    assert post(client, "/v1/tokenize", messages=MESSAGES)["token_strings"] == SPELLED


def test_tokens_of_a_text_that_no_context_holds_can_be_counted(client: FlaskClient) -> None:
    assert post(client, "/v1/tokenize", text="w1 " * 600)["count"] == 600
    for path in ("/v1/completions", "/v1/analysis/logit_lens"):
        assert post(client, path, 400, prompt="w1 " * 600)["error"]["code"] == "context_length_exceeded"


# Generation


def test_chat_completion_has_openai_s_shape(client: FlaskClient) -> None:
    reply = post(client, CHAT, messages=MESSAGES, max_tokens=4)
    assert reply["id"].startswith("chatcmpl-")
    assert (reply["object"], reply["model"]) == ("chat.completion", "tiny")
    (choice,) = reply["choices"]
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"].split()) == 4
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "length", None)
    assert reply["usage"] == {"prompt_tokens": PROMPT_LENGTH, "completion_tokens": 4, "total_tokens": PROMPT_LENGTH + 4}
    assert "activations" not in reply


def test_text_completion_has_openai_s_shape(client: FlaskClient) -> None:
    reply = post(client, "/v1/completions", prompt="w1 w2", max_tokens=3)
    assert reply["id"].startswith("cmpl-")
    assert reply["object"] == "text_completion"
    assert len(reply["choices"][0]["text"].split()) == 3
    assert reply["usage"]["prompt_tokens"] == 2


def test_a_prompt_of_token_ids_is_the_same_as_its_text(client: FlaskClient) -> None:
    options = {"max_tokens": 5, "temperature": 0}
    by_text = post(client, "/v1/completions", prompt="w1 w2", **options)
    by_ids = post(client, "/v1/completions", prompt=[7, 8], **options)
    assert by_text["choices"] == by_ids["choices"]


def test_same_seed_same_text_and_temperature_zero_needs_none(client: FlaskClient) -> None:
    def said(**options: Any) -> str:
        return post(client, CHAT, messages=MESSAGES, max_tokens=12, **options)["choices"][0]["message"]["content"]

    assert said(seed=1, temperature=2) == said(seed=1, temperature=2)
    assert said(seed=1, temperature=2) != said(seed=2, temperature=2)
    assert said(temperature=0) == said(temperature=0)
    assert said(temperature=0) == said(temperature=2, top_k=1)
    assert said(temperature=0) == said(temperature=2, top_p=0.001)
    assert said(temperature=0) == said(temperature=2, min_p=1)
    assert said(temperature=0) != said(temperature=0, repetition_penalty=10)


def test_a_filter_as_large_as_the_vocabulary_leaves_nothing_out(client: FlaskClient) -> None:
    options = {"messages": MESSAGES, "max_tokens": 12, "temperature": 1, "seed": 4}
    unfiltered = post(client, CHAT, **options)["choices"]
    for top_k in (60, 61, 1_000_000):
        assert post(client, CHAT, **options, top_k=top_k)["choices"] == unfiltered
    assert post(client, CHAT, **options, top_k=2)["choices"] != unfiltered


def test_one_request_s_seed_is_not_the_next_one_s(client: FlaskClient) -> None:
    def said_after_a_seeded_request() -> str:
        post(client, CHAT, messages=MESSAGES, max_tokens=1, seed=1)
        reply = post(client, CHAT, messages=MESSAGES, max_tokens=40, temperature=2)
        return reply["choices"][0]["message"]["content"]

    assert said_after_a_seeded_request() != said_after_a_seeded_request()


def test_stop_text_ends_the_answer_before_it(client: FlaskClient) -> None:
    options = {"messages": MESSAGES, "max_tokens": 10, "temperature": 2, "seed": 5}
    words = post(client, CHAT, **options)["choices"][0]["message"]["content"].split()
    for stop in (words[3], ["no such text", words[3]]):
        choice = post(client, CHAT, **options, stop=stop)["choices"][0]
        assert choice["message"]["content"].split() == words[: words.index(words[3])]
        assert choice["finish_reason"] == "stop"


def test_generation_ends_where_the_model_s_context_ends(client: FlaskClient) -> None:
    reply = post(client, "/v1/completions", prompt=[7] * 510, max_tokens=50)
    # 512 positions: the tokens at 510 and 511 can be read, and the one after them predicted.
    assert reply["usage"]["completion_tokens"] == 3
    assert reply["choices"][0]["finish_reason"] == "length"


def test_stream_says_the_same_as_the_whole_reply(client: FlaskClient) -> None:
    options = {"messages": MESSAGES, "max_tokens": 6, "seed": 3}
    whole = post(client, CHAT, **options)
    reply = client.post(CHAT, json=options | {"stream": True})
    assert reply.headers["Content-Type"] == "text/event-stream"
    assert reply.headers["Cache-Control"] == "no-cache"
    assert reply.headers["X-Accel-Buffering"] == "no"
    events = events_of(reply.get_data(as_text=True))
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None] * 6 + ["length"]
    assert events[-1]["usage"] == whole["usage"]


def test_text_stream_says_the_same_as_the_whole_reply(client: FlaskClient) -> None:
    options = {"prompt": "w1 w2 w3", "max_tokens": 6, "seed": 3}
    whole = post(client, "/v1/completions", **options)
    reply = client.post("/v1/completions", json=options | {"stream": True})
    events = events_of(reply.get_data(as_text=True))
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert {event["object"] for event in events} == {"text_completion"}


# Activations


def test_activations_come_with_the_answer(client: FlaskClient) -> None:
    reply = post(client, CAPTURE, messages=MESSAGES, activation_hooks=HOOKS, max_tokens=3, seed=1)
    assert list(reply["activations"]) == ["resid", "pattern", "ids"]
    prefill, *decodes = reply["activations"]["resid"]
    expected = {
        "hook_id": "resid",
        "layer_name": "transformer.h.0",
        "component": "residual",
        "shape": [1, PROMPT_LENGTH, 32],
        "dtype": "float32",
        "is_input": False,
        "hook_point": "blocks.0.hook_resid_post",
        "layer_index": 0,
        "axes": ["batch", "pos", "d_model"],
        "phase": "prefill",
        "step": 0,
        "pass_index": 0,
        "positions": [0, PROMPT_LENGTH],
        "position_ids": None,
        "heads": None,
        "reduce": None,
        "encoding": "json",
    }
    assert {k: v for k, v in prefill.items() if k != "data"} == expected
    assert np.array(prefill["data"]).shape == (1, PROMPT_LENGTH, 32)
    assert [(r["phase"], r["step"], r["positions"]) for r in decodes] == [
        ("decode", 1, [PROMPT_LENGTH, PROMPT_LENGTH + 1]),
        ("decode", 2, [PROMPT_LENGTH + 1, PROMPT_LENGTH + 2]),
    ]
    assert reply["hooks"]["resid"] == {"fired": 3, "positions": [0, 8], "bytes": 8 * 32 * 4}
    assert reply["usage"]["completion_tokens"] == 3


def test_token_list_is_indexed_by_position(client: FlaskClient) -> None:
    reply = post(client, CAPTURE, messages=MESSAGES, activation_hooks=HOOKS, max_tokens=3, seed=1)
    tokens = reply["tokens"]
    assert tokens["prompt_length"] == PROMPT_LENGTH
    assert tokens["strings"][:PROMPT_LENGTH] == SPELLED
    assert " ".join(tokens["strings"][PROMPT_LENGTH:]) == reply["choices"][0]["message"]["content"]
    seen = [record for record in reply["activations"]["ids"] if record["is_input"]]
    assert [record["phase"] for record in seen] == ["prefill", "decode", "decode"]
    for record in seen:
        start, stop = record["positions"]
        assert record["data"] == [tokens["ids"][start:stop]]


def every_component() -> list[dict[str, Any]]:
    """A hook per component, with its input where it has one."""
    return [
        {
            "layer_name": "transformer.wte" if name == "embedding" else "transformer.h.1",
            "component": name,
            "hook_id": name,
            "capture_input": row.input is not None,
        }
        for name, row in COMPONENTS.items()
    ]


@pytest.mark.parametrize("encoding", ["base64", "json"])
@pytest.mark.parametrize("stream", [False, True])
def test_every_record_of_prompt_and_generated_tokens_is_the_engine_s(
    client: FlaskClient, worker: ModelWorker, stream: bool, encoding: str
) -> None:
    prompt, hooks = [7, 8, 9, 10], every_component()
    model = worker.get("tiny").model
    expected = worker.call(
        lambda: {
            hook_id: [
                {
                    "layer_name": one.layer_name,
                    "component": one.component,
                    "is_input": one.is_input,
                    "hook_point": one.hook_point.name,
                    "layer_index": one.hook_point.layer,
                    "axes": list(one.hook_point.axes),
                    "phase": one.phase,
                    "step": one.step,
                    "pass_index": one.pass_index,
                    "positions": list(one.positions),
                    "position_ids": None,
                    "heads": None,
                    "reduce": None,
                    "array": one.numpy(),
                }
                for one in records
            ]
            for hook_id, records in model.generate(prompt, max_tokens=6, capture=hooks).activations.items()
        }
    )
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "activation_hooks": hooks}
    body |= {"stream": stream, "activation_encoding": encoding}
    reply = client.post("/v1/completions/with_activations", json=body)
    parts = events_of(reply.get_data(as_text=True)) if stream else [reply.get_json()]
    got = {
        hook["hook_id"]: [record for part in parts for record in part.get("activations", {}).get(hook["hook_id"], [])]
        for hook in hooks
    }
    assert {row["phase"] for rows in expected.values() for row in rows} == {"prefill", "decode"}
    assert {row["is_input"] for rows in expected.values() for row in rows} == {True, False}
    assert {hook_id: len(rows) for hook_id, rows in got.items()} == {k: len(rows) for k, rows in expected.items()}
    for hook_id, rows in expected.items():
        for record, row in zip(got[hook_id], rows, strict=True):
            array = row.pop("array")
            about = row | {"hook_id": hook_id, "shape": list(array.shape), "dtype": array.dtype.name}
            assert {k: v for k, v in record.items() if k != "data"} == about | {"encoding": encoding}
            decoded = decode_activation(record)
            assert (decoded.dtype, decoded.shape) == (array.dtype, array.shape)
            assert decoded.tobytes() == array.tobytes(), (hook_id, record["hook_point"], record["step"])


def test_encodings_carry_the_same_numbers(client: FlaskClient) -> None:
    def records(**options: Any) -> list[dict[str, Any]]:
        reply = post(client, CAPTURE, messages=MESSAGES, activation_hooks=HOOKS, max_tokens=0, **options)
        return [record for found in reply["activations"].values() for record in found]

    plain, exact = records(), records(activation_encoding="base64")
    half, none = records(activation_encoding="base64", activation_dtype="float16"), records(activation_encoding="none")
    for a, b, c, d in zip(plain, exact, half, none, strict=True):
        assert np.array_equal(decode_activation(a), decode_activation(b))
        assert c["dtype"] == ("int32" if b["dtype"] == "int32" else "float16")
        np.testing.assert_allclose(decode_activation(c), decode_activation(b), rtol=1e-3, atol=1e-3)
        assert "data" not in d
        assert d["shape"] == b["shape"]


def test_masked_scores_are_null_in_lists_and_infinite_in_bytes(client: FlaskClient) -> None:
    hooks = [{"layer_name": "0", "component": "attention_scores", "hook_id": "s"}]
    reply = client.post(CAPTURE, json={"messages": MESSAGES, "activation_hooks": hooks, "max_tokens": 0})
    assert not re.search(r"NaN|Infinity", reply.get_data(as_text=True))
    assert reply.get_json()["activations"]["s"][0]["data"][0][0][0][1] is None
    exact = post(client, CAPTURE, messages=MESSAGES, activation_hooks=hooks, max_tokens=0, activation_encoding="base64")
    assert decode_activation(exact["activations"]["s"][0])[0, 0, 0, 1] == -np.inf


def test_zero_max_tokens_only_reads_the_prompt(client: FlaskClient) -> None:
    reply = post(client, CAPTURE, messages=MESSAGES, activation_hooks=HOOKS, max_tokens=0)
    assert reply["choices"][0]["message"]["content"] == ""
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 0
    assert [record["phase"] for record in reply["activations"]["resid"]] == ["prefill"]


def test_capturing_changes_nothing_in_the_answer(client: FlaskClient) -> None:
    options = {"messages": MESSAGES, "max_tokens": 8, "temperature": 1.5, "seed": 11}
    plain = post(client, CHAT, **options)
    assert post(client, CAPTURE, **options, activation_hooks=HOOKS)["choices"] == plain["choices"]


def test_text_completion_captures_as_well(client: FlaskClient) -> None:
    reply = post(client, "/v1/completions/with_activations", prompt=[7, 8, 9], activation_hooks=HOOKS, max_tokens=1)
    assert reply["object"] == "text_completion"
    assert reply["tokens"]["ids"][:3] == [7, 8, 9]
    assert reply["hooks"]["pattern"]["positions"] == [0, 3]


def test_stream_carries_each_step_s_activations_with_its_text(client: FlaskClient) -> None:
    options = {"messages": MESSAGES, "activation_hooks": HOOKS, "max_tokens": 4, "seed": 2}
    whole = post(client, CAPTURE, **options)
    reply = client.post(CAPTURE, json=options | {"stream": True})
    *steps, last = events_of(reply.get_data(as_text=True))
    assert [event["activations"]["resid"][0]["step"] for event in steps] == [0, 1, 2, 3]
    for hook_id, records in whole["activations"].items():
        assert [record for event in steps for record in event["activations"][hook_id]] == records
    assert last["choices"][0]["finish_reason"] == "length"
    assert {key: last[key] for key in ("usage", "hooks", "tokens")} == {
        key: whole[key] for key in ("usage", "hooks", "tokens")
    }


def test_registered_hooks_serve_requests_that_name_none(client: FlaskClient) -> None:
    reply = post(client, "/v1/activations/hooks", hooks=HOOKS)
    assert reply == {"status": "hooks_registered", "registered_hooks": ["resid", "pattern", "ids"]}
    assert [hook["hook_id"] for hook in client.get("/v1/activations/hooks").get_json()["hooks"]] == [
        "resid",
        "pattern",
        "ids",
    ]
    assert list(post(client, CAPTURE, messages=MESSAGES, max_tokens=0)["activations"]) == ["resid", "pattern", "ids"]
    more = post(client, "/v1/activations/hooks", hooks=[HOOKS[0] | {"hook_id": "more"}])
    assert more["registered_hooks"] == ["more"]
    assert len(post(client, CAPTURE, messages=MESSAGES, max_tokens=0)["activations"]) == 4
    client.delete("/v1/activations/hooks/more")
    own = post(client, CAPTURE, messages=MESSAGES, max_tokens=0, activation_hooks=HOOKS[:1])
    assert list(own["activations"]) == ["resid"]
    assert client.delete("/v1/activations/hooks/pattern").get_json()["status"] == "hook_removed"
    assert list(post(client, CAPTURE, messages=MESSAGES, max_tokens=0)["activations"]) == ["resid", "ids"]
    assert client.delete("/v1/activations/hooks").get_json() == {"status": "hooks_cleared"}
    post(client, CAPTURE, 400, messages=MESSAGES, max_tokens=0)


def test_a_hook_is_removed_from_one_model_or_from_all() -> None:
    with ModelWorker(load=load_tiny) as worker:
        client = create_app(worker).test_client()

        def registered() -> dict[str, list[str]]:
            return {
                name: [hook["hook_id"] for hook in client.get(f"{path}?model={name}").get_json()["hooks"]]
                for name in ("a", "b", "c")
            }

        path = "/v1/activations/hooks"
        for name in ("a", "b", "c"):
            post(client, "/v1/models/load", model_path="llama", model_id=name)
            post(client, path, hooks=HOOKS, model=name)
        assert client.delete(f"{path}/resid?model=b").status_code == 200
        assert registered() == {
            "a": ["resid", "pattern", "ids"],
            "b": ["pattern", "ids"],
            "c": ["resid", "pattern", "ids"],
        }
        assert client.delete(f"{path}/resid?model=b").status_code == 404
        assert client.delete(f"{path}/resid").status_code == 200
        assert registered() == {name: ["pattern", "ids"] for name in ("a", "b", "c")}
        assert client.delete(f"{path}?model=c").status_code == 200
        assert registered() == {"a": ["pattern", "ids"], "b": ["pattern", "ids"], "c": []}
        assert client.delete(path).status_code == 200
        assert registered() == {"a": [], "b": [], "c": []}


def test_a_hook_without_an_id_gets_one(client: FlaskClient) -> None:
    hooks = [{"layer_name": "transformer.h.1", "component": "mlp"}]
    reply = post(client, CAPTURE, messages=MESSAGES, activation_hooks=hooks, max_tokens=0)
    assert list(reply["activations"]) == ["transformer.h.1_mlp"]


def test_logit_lens_ends_in_the_model_s_own_prediction(client: FlaskClient) -> None:
    reply = post(client, "/v1/analysis/logit_lens", prompt="w1 w2 w3", top_k=3)
    assert (reply["model"], reply["position"], reply["token"]) == ("tiny", 2, "w3")
    assert [row["hook_point"] for row in reply["layers"]] == [f"blocks.{i}.hook_resid_post" for i in range(3)]
    assert all(len(row["predictions"]) == 3 for row in reply["layers"])
    said = post(client, "/v1/completions", prompt="w1 w2 w3", max_tokens=1, temperature=0)
    assert reply["layers"][-1]["predictions"][0]["token"] == said["choices"][0]["text"]


def test_the_lens_reads_components_heads_and_directions_at_several_positions(client: FlaskClient) -> None:
    asked = {"prompt": "w1 w2 w3", "top_k": 2, "norm": "final", "token_directions": [["w4", 5], ["w6", "w7"]]}
    path = "/v1/analysis/logit_lens"
    reply = post(client, path, **asked, positions="all", components=["attn_out", "heads"])
    assert (reply["position"], reply["token"], reply["positions"]) == (None, None, [0, 1, 2])
    assert reply["token_strings"] == ["w1", "w2", "w3"]
    rows = reply["layers"]
    assert [(r["layer"], r["head"], r["position"]) for r in rows] == [
        (layer, head, position) for layer in range(3) for head in (0, 1, 2, 3, None) for position in range(3)
    ]
    model = load_tiny("llama")
    expected = list(LogitLens(model).readings("w1 w2 w3", components=["attn_out"], positions=[1], **LENS))
    found = [row for row in rows if row["head"] is None and row["position"] == 1]
    for row, own in zip(found, expected, strict=True):
        assert row["values"] == pytest.approx(own.values, abs=1e-5)
        assert [p["token_id"] for p in row["predictions"]] == [p.token_id for p in own.predictions]
    one = post(client, path, **asked, position=-2)
    assert (one["position"], one["token"], len(one["layers"])) == (1, "w2", 3)
    soft = post(client, path, **asked, apply_softmax=True)
    assert all(abs(value) < 1 for row in soft["layers"] for value in row["values"])
    bare = post(client, path, prompt="w1 w2 w3", apply_norm=False)
    assert bare["layers"] != post(client, path, prompt="w1 w2 w3")["layers"]


LENS: dict[str, Any] = {"norm": "final", "token_directions": [("w4", 5), ("w6", "w7")], "top_k": 2}


def test_direct_logit_attribution_adds_up(client: FlaskClient) -> None:
    asked = {"prompt": "w1 w2 w3", "token_directions": [["w4", "w5"]]}
    reply = post(client, "/v1/analysis/direct_logit_attribution", **asked, positions="all")
    model = load_tiny("llama")
    a, b = reply["tokens"]
    assert (reply["positions"], [a, b]) == ([0, 1, 2], [model.to_tokens(text)[0, -1].item() for text in ("w4", "w5")])
    total = np.sum([part["values"] for part in reply["contributions"]], axis=0)
    np.testing.assert_allclose(total, reply["logits"], atol=1e-4)
    logits = np.array(model("w1 w2 w3"))[0]
    np.testing.assert_allclose(reply["logits"], logits[:, a] - logits[:, b], atol=1e-4)
    last = post(client, "/v1/analysis/direct_logit_attribution", **asked)
    assert last["positions"] == [2]
    names = [part["name"] for part in last["contributions"]]
    assert names[:6] == ["embed", "L0H0", "L0H1", "L0H2", "L0H3", "L0 mlp"]


def test_attribution_captures_the_positions_that_are_asked_for(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []
    run = HookedModel.run_with_cache

    def watched(model: HookedModel, *arguments: Any, **options: Any) -> Any:
        logits, cache = run(model, *arguments, **options)
        captured.append(list(cache.positions("ln_final.hook_in")))
        return logits, cache

    monkeypatch.setattr(HookedModel, "run_with_cache", watched)
    asked = {"prompt": "w1 w2 w3", "token_directions": ["w4"]}
    one = post(client, "/v1/analysis/direct_logit_attribution", **asked)
    some = post(client, "/v1/analysis/direct_logit_attribution", **asked, positions=[2, 0])
    assert captured == [[2], [0, 2]]
    assert some["positions"] == [0, 2]
    assert [part["values"][1] for part in some["contributions"]] == pytest.approx(
        [part["values"][0] for part in one["contributions"]], abs=1e-5
    )


def test_the_lens_takes_easyroutine_s_names(client: FlaskClient) -> None:
    path, asked = "/v1/analysis/logit_lens", {"prompt": "w1 w2 w3", "positions": [1]}
    for name, own in (("resid_out", "resid_post"), ("resid_in", "resid_pre"), ("head_out", "heads")):
        replies = [post(client, path, **asked, components=[one])["layers"] for one in (name, own)]
        assert replies[0] == replies[1]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("logit_lens", {"positions": [0, 3]}, "positions", "There is no position 3: the prompt has 3 tokens"),
        ("logit_lens", {"position": -4}, "position", "There is no position -4"),
        ("logit_lens", {"positions": {"start": 5}}, "positions", "There is no such position"),
        ("logit_lens", {"components": ["pattern"]}, "components", "A lens on llama reads resid_pre"),
        ("logit_lens", {"norm": "mean"}, "norm", "'own' or 'final'"),
        ("logit_lens", {"token_directions": ["w1 w2"]}, "token_directions", "'w1 w2' is 2 tokens"),
        ("logit_lens", {"token_directions": [99999]}, "token_directions", "A token is an id from 0 to"),
        ("logit_lens", {"prompt": [8] * 300, "positions": "all", "top_k": 1000}, "positions", "The reply would list"),
        ("direct_logit_attribution", {"token_directions": [1, 2]}, "token_directions", "one pair of tokens, [[a, b]]"),
        ("direct_logit_attribution", {"token_directions": []}, "token_directions", "a list of one token"),
        ("direct_logit_attribution", {}, "token_directions", "is required"),
        ("direct_logit_attribution", {"token_directions": [1], "positions": 3}, "positions", "There is no position 3"),
    ],
)
def test_what_an_analysis_refuses_is_named(
    client: FlaskClient, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    reply = client.post(f"/v1/analysis/{path}", json={"prompt": "w1 w2 w3"} | body)
    assert reply.status_code == 400
    error = reply.get_json()["error"]
    assert error["param"] == param
    assert message in error["message"]


# Many callers


def test_simultaneous_requests_get_what_each_alone_would_get(url: str) -> None:
    def ask(number: int) -> dict[str, Any]:
        body = {
            "messages": [{"role": "user", "content": " ".join(f"w{(number * 7 + i) % 50}" for i in range(3 + number))}],
            "activation_hooks": [
                {"layer_name": str(number % 3), "component": c, "hook_id": c} for c in components(number)
            ],
            "max_tokens": 6,
            "temperature": 1.5,
            "seed": number,
        }
        reply = requests.post(url + CAPTURE, json=body, timeout=60).json()
        return {key: reply[key] for key in ("choices", "activations", "hooks", "tokens", "usage")}

    def components(number: int) -> list[str]:
        return ["residual", "attention_pattern", "mlp", "query"][: 1 + number % 4]

    alone = [ask(number) for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, [*range(8), *range(8)]))
    assert together == alone + alone


def test_health_answers_and_the_queue_refuses_while_the_worker_is_busy() -> None:
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        assert release.wait(30)

    with ModelWorker(load=load_tiny, max_queued=2) as worker, ThreadPoolExecutor(3) as pool:
        worker.load("llama")
        with running_server(worker) as url:
            running = pool.submit(worker.call, hold)
            assert held.wait(10)
            try:
                waiting = [pool.submit(worker.call, lambda: "done") for _ in range(2)]
                until(lambda: len(worker._schedule._brief) == 2)
                assert requests.get(f"{url}/health", timeout=5).json()["status"] == "healthy"
                assert requests.get(f"{url}/v1/models", timeout=5).status_code == 200
                reply = requests.post(url + CHAT, json={"messages": MESSAGES}, timeout=5)
            finally:
                release.set()
            assert reply.status_code == 503
            assert int(reply.headers["Retry-After"]) >= 1
            assert reply.json()["error"]["code"] == "busy"
            assert [job.result(10) for job in (running, *waiting)] == [None, "done", "done"]


def test_each_event_arrives_before_the_next_step_is_taken() -> None:
    read = threading.Semaphore(0)
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama")
        done = paced(worker, lambda: read.acquire(timeout=5))
        body = {"messages": MESSAGES, "max_tokens": 6, "stream": True}
        with running_server(worker) as url, requests.post(url + CHAT, json=body, stream=True, timeout=20) as reply:
            done_at = []
            for line in reply.iter_lines(chunk_size=1):
                if line.startswith(b"data: {"):
                    done_at.append(len(done))
                    read.release()
    assert done_at == [1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("stream", [True, False])
def test_closing_the_connection_stops_the_generation(stream: bool) -> None:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama")
        done = paced(worker, lambda: time.sleep(0.05))
        with running_server(worker) as url:
            hang_up_early(url, stream, done)
            reply = requests.post(url + CHAT, json={"messages": MESSAGES, "max_tokens": 1}, timeout=20)
    assert reply.status_code == 200
    assert len(done) < 100


def hang_up_early(url: str, stream: bool, done: list[int]) -> None:
    """Ask for 400 tokens and close the connection after two."""
    body = json.dumps({"messages": MESSAGES, "max_tokens": 400, "stream": stream}).encode()
    headers = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\n{headers}"
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head.encode() + body)
        until(lambda: len(done) >= 2)


def test_a_slow_reader_holds_up_nobody(url: str) -> None:
    hooks = [{"layer_name": str(i), "component": "attention_scores", "hook_id": str(i)} for i in range(3)]
    body = {"prompt": [7] * 200, "max_tokens": 150, "activation_hooks": hooks, "stream": True}
    with requests.post(f"{url}/v1/completions/with_activations", json=body, stream=True, timeout=30) as unread:
        assert unread.status_code == 200
        answered = [
            requests.post(url + CHAT, json={"messages": MESSAGES, "max_tokens": 2}, timeout=30) for _ in range(3)
        ]
        assert [reply.status_code for reply in answered] == [200] * 3
        assert unread.raw.read(6) == b"data: "


def test_a_slow_reader_holds_no_thread() -> None:
    app, written = Flask("large"), threading.Event()

    @app.get("/")
    def large() -> Iterator[bytes]:
        for _ in range(64):
            yield bytes(2**20)
        written.set()

    server = Server(app, ServerConfig(port=0))
    thread = server.start()
    try:
        # Far more than the system's own buffers take.
        with requests.get(server.url, stream=True, timeout=20) as unread:
            assert written.wait(10)
            assert len(unread.content) == 64 * 2**20
    finally:
        server.stop()
        thread.join(10)


def test_an_error_after_the_first_event_is_the_last_event(client: FlaskClient) -> None:
    with ModelWorker(load=load_tiny) as worker:
        model = worker.load("llama").model
        plain = model.generate_steps

        def broken(*args: Any, **options: Any) -> Iterator[Any]:
            for step in plain(*args, **options):
                yield step
                raise RuntimeError("a secret of /this/machine")

        model.generate_steps = broken  # type: ignore[method-assign]
        client = create_app(worker).test_client()
        reply = client.post(CHAT, json={"messages": MESSAGES, "stream": True})
        text = reply.get_data(as_text=True)
        assert reply.status_code == 200
        first, last = [json.loads(line.removeprefix("data: ")) for line in text.strip().split("\n\n")]
        assert "choices" in first
        assert last["error"]["type"] == "server_error"
        assert reply.headers["X-Request-Id"] in last["error"]["message"]
        assert "secret" not in text
        assert client.get("/health").status_code == 200


# The worker


def test_worker_outlives_whatever_a_job_raises() -> None:
    with ModelWorker(load=load_tiny) as worker:
        for error in (ValueError("no"), SystemExit(3), MemoryError()):

            def work(error: BaseException = error) -> None:
                raise error

            with pytest.raises(type(error)):
                worker.call(work)
        assert worker.call(lambda: "still here") == "still here"


def test_stopping_cancels_the_running_job_and_refuses_the_others() -> None:
    worker = ModelWorker(load=load_tiny).start()
    began = threading.Event()

    def endless() -> Any:
        while True:
            began.set()
            time.sleep(0.01)
            yield 1

    running, waiting = worker.submit(endless), worker.submit(endless)
    assert began.wait(10)
    assert worker.stop()
    for job in (running, waiting):
        with pytest.raises(Stopping):
            list(job.results())
    with pytest.raises(Stopping):
        worker.submit(endless)


def test_worker_thread_cleans_up_after_mlx_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[str] = []
    monkeypatch.setattr("mlx.core.clear_streams", lambda: cleaned.append(threading.current_thread().name))
    worker = ModelWorker(load=load_tiny).start()
    worker.call(lambda: None)
    assert worker.stop()
    assert cleaned == ["model-worker"]


def test_a_cancelled_job_leaves_the_queue_to_others() -> None:
    with ModelWorker(load=load_tiny, max_queued=1) as worker:
        held = threading.Event()
        running = worker.submit(lambda: (held.wait(10) for _ in range(1)))
        until(lambda: not worker._schedule._waiting)
        gone = worker.submit(lambda: iter([1]))  # type: ignore[arg-type, return-value]
        with pytest.raises(Busy):
            worker.submit(lambda: iter([1]))  # type: ignore[arg-type, return-value]
        gone.cancel()
        last = worker.submit(lambda: (i for i in [1]))
        held.set()
        assert list(running.results()) == [True]
        assert list(last.results()) == [1]


# The process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_process_serves_and_ends_cleanly_in_the_middle_of_a_stream(folder: Path, signum: signal.Signals) -> None:
    with server_process("--port", "0", "--model", str(folder), "--model-id", "mine") as process:
        url = url_of(process)
        assert requests.get(f"{url}/health", timeout=10).json()["models"] == ["mine"]
        body = {"messages": MESSAGES, "max_tokens": 500, "stream": True}
        with requests.post(url + CHAT, json=body, stream=True, timeout=30) as reply:
            assert next(reply.iter_lines()).startswith(b"data: ")
            process.send_signal(signum)
            out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(("place", "signum"), [("ModelWorker", signal.SIGTERM), ("Server", signal.SIGINT)])
def test_process_that_is_stopped_before_it_serves_ends_cleanly(place: str, signum: signal.Signals) -> None:
    program = (
        "import os, sys, api_server.__main__ as it\n"
        f"it.{place} = lambda *_, **__: os.kill(os.getpid(), {int(signum)})\n"
        "sys.exit(it.main(['--port', '0']))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_process_keeps_to_its_key_its_limit_and_its_model_s_id(folder: Path) -> None:
    arguments = ["--port", "0", "--model", str(folder), "--model-id", "mine", "--max-body-mb", "0.25"]
    with server_process(*arguments, NEUROSCOPE_API_KEY="k3y") as process:
        url, key = url_of(process), {"Authorization": "Bearer k3y"}
        assert requests.get(f"{url}/health", timeout=10).json()["models"] == ["mine"]
        assert requests.get(f"{url}/v1/models", timeout=10).status_code == 401
        assert requests.get(f"{url}/v1/models", headers={"Authorization": "Bearer no"}, timeout=10).status_code == 401
        assert requests.get(f"{url}/v1/models", headers=key, timeout=10).json()["data"][0]["id"] == "mine"
        for size, status in ((2**18, 200), (2**18 + 1, 413), (2**20 + 1, 413)):
            body = b'{"text": "w1"}'.ljust(size)
            headers = key | {"Content-Type": "application/json"}
            reply = requests.post(f"{url}/v1/tokenize", data=body, headers=headers, timeout=10)
            assert reply.status_code == status
            assert status == 200 or "262144 bytes (0.25 MiB)" in reply.json()["error"]["message"]


def test_key_of_the_arguments_goes_before_that_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ServerConfig] = []
    monkeypatch.setattr("api_server.__main__._serve", lambda config, *_: asked.append(config) or 0)
    for given, expected in (("", None), ("theirs", "theirs")):
        monkeypatch.setenv("NEUROSCOPE_API_KEY", given)
        assert main([]) == main(["--api-key", "mine"]) == 0
        assert [config.api_key for config in asked[-2:]] == [expected, "mine"]


def test_process_that_cannot_load_its_model_says_so_and_ends(tmp_path: Path) -> None:
    with server_process("--port", "0", "--model", str(tmp_path / "nothing")) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "There is no model at" in err
    assert "Traceback" not in err


def test_taken_port_and_open_host_without_key_are_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["--port", str(taken.getsockname()[1])]) == 1
    assert re.fullmatch(r"neuroscope: cannot listen on .* in use\. .*\n", capsys.readouterr().err)
    assert main(["--host", "0.0.0.0", "--port", "0"]) == 1
    assert re.fullmatch(r"neuroscope: .*--api-key.*\n", capsys.readouterr().err)
