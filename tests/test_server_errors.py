"""Bad input: the right status, one clear sentence in the one error shape, and a server that goes on."""

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import requests
from flask.testing import FlaskClient
from pydantic import ValidationError
from server_tools import HOOKS, MESSAGES, load_tiny, running_server, save_tiny

from api_server import ModelWorker, ServerConfig, create_app
from api_server.__main__ import main
from api_server.errors import ApiError, describe, invalid_request
from api_server.inference import Step
from api_server.schemas import analysis
from api_server.schemas import requests as schemas
from api_server.schemas.fields import Request
from api_server.schemas.requests import ChatCaptureRequest, CompletionRequest
from mlx_hooks import HookError
from mlx_hooks.sampling import Sampling
from neuroscope_bridge.payload import PayloadError

CHAT = "/v1/chat/completions"
CAPTURE = "/v1/chat/completions/with_activations"
HOOK = {"layer_name": "transformer.h.0", "component": "residual"}
LIMIT = 64 * 1024


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama", "tiny")
        yield worker


@pytest.fixture
def client(worker: ModelWorker) -> Iterator[FlaskClient]:
    """A client that, when its test is over, checks that the server still works."""
    client = create_app(worker, ServerConfig(max_body_bytes=LIMIT)).test_client()
    yield client
    assert client.get("/health").get_json()["status"] == "healthy"
    reply = client.post(CAPTURE, json={"messages": MESSAGES, "activation_hooks": HOOKS, "max_tokens": 1})
    assert reply.status_code == 200
    assert reply.get_json()["hooks"]["resid"]["fired"] == 1


def refused(reply: Any, status: int) -> dict[str, Any]:
    """The error of a reply, after a look at its shape."""
    assert reply.status_code == status, reply.get_data(as_text=True)
    assert reply.headers["Content-Type"] == "application/json"
    body = reply.get_json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "code", "param", "request_id"}
    assert error["request_id"] == reply.headers["X-Request-Id"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert error["code"]
    assert error["message"]
    assert "\n" not in error["message"]
    return error


TEXT = {"type": "text", "text": "w1"}
CHAT_FAULTS: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "at least 1 item."),
    ({"messages": "hello"}, "messages", "array"),
    ({"messages": [{"role": "tool", "content": "w1"}]}, "messages[0].role", "'developer', 'user' or 'assistant'"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "string"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "a string or a list of text parts"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "at least 1"),
    ({"messages": [{"role": "user", "content": ["w1"]}]}, "messages[0].content[0]", "object"),
    (
        {"messages": [{"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[1].type",
        "must be 'text', not \"image_url\"",
    ),
    ({"messages": [{"role": "user", "content": [TEXT | {"x": 1}]}]}, "messages[0].content[0].x", "type, text"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "required"),
    ({"messages": [{"role": "assistant", "content": "w1", "tool_calls": [{}]}]}, "messages[0].tool_calls", "only []"),
    ({"messages": [{"role": "user", "content": "w1", "name": "x"}]}, "messages[0].name", "role, content"),
    ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
    ({"max_tokens": "5"}, "max_tokens", 'integer, not "5"'),
    ({"max_tokens": True}, "max_tokens", "integer, not true"),
    ({"max_tokens": 1.5}, "max_tokens", "integer, not 1.5"),
    ({"max_tokens": 10**9}, "max_tokens", "less than or equal to 32768"),
    ({"max_tokens": 2**64}, "max_tokens", "less than or equal to 32768, not 18446744073709551616"),
    ({"max_tokens": 10**400}, "max_tokens", "less than or equal to 32768."),
    ({"max_completion_tokens": -1}, "max_completion_tokens", "greater than or equal to 0"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "two names of one limit"),
    ({"max_tokens": 100, "max_completion_tokens": 6}, "max_tokens", "two names of one limit"),
    ({"temperature": 1e-7}, "temperature", "must be 0 or at least 1e-06, not 1e-07"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
    ({"temperature": 10**400}, "temperature", "number"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"temperature": True}, "temperature", "number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"seed": 10**30}, "seed", f"less than or equal to 9223372036854775807, not 1{'0' * 30}."),
    ({"stop": 5}, "stop", "a string"),
    ({"stop": ""}, "stop", "1 to 1000 characters"),
    ({"stop": ["w1"] * 17}, "stop", "at most 16"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"best_of": 2}, "best_of", "not supported here. Supported: model, max_tokens"),
    ({"n": 2}, "n", "only 1 is supported, not 2"),
    ({"n": True}, "n", "only 1 is supported, not true"),
    ({"logprobs": 0}, "logprobs", "boolean, not 0"),
    ({"top_logprobs": 3}, "top_logprobs", "with 'logprobs': true only"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "greater than or equal to 0"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "less than or equal to 2"),
    ({"presence_penalty": -2.1}, "presence_penalty", "greater than or equal to -2"),
    ({"logit_bias": {"7": 101}}, "logit_bias", "number from -100 to 100"),
    ({"logit_bias": {"7": "1"}}, "logit_bias", "number from -100 to 100"),
    ({"logit_bias": {"w1": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"07": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"\u0661": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"60": 1}}, "logit_bias", "0 to 59"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "at most 1024"),
    ({"logit_bias": [1]}, "logit_bias", "an object"),
    ({"response_format": {"type": "json_object"}}, "response_format", 'only {"type": "text"} or null is supported'),
    ({"tools": [{"type": "function"}]}, "tools", "only [] or null is supported"),
    ({"tool_choice": "auto"}, "tool_choice", 'only "none" or null is supported, not "auto"'),
    ({"store": True}, "store", "only false or null is supported"),
    ({"echo": True}, "echo", "only false or null is supported"),
    ({"user": 5}, "user", "string"),
    ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", "boolean"),
    ({"stream_options": {"more": True}}, "stream_options.more", "Supported: include_usage."),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation", "only false or null"),
    ({"model": 5}, "model", "string"),
    ({"activation_hooks": HOOK}, "activation_hooks", "array"),
    ({"activation_hooks": ["transformer.h.0"]}, "activation_hooks[0]", "object"),
    ({"activation_hooks": [{"component": "residual"}]}, "activation_hooks[0]", "or else 'hook_point'"),
    ({"activation_hooks": [HOOK | {"hook_point": "hook_embed"}]}, "activation_hooks[0]", "or else 'hook_point'"),
    ({"activation_hooks": [{"hook_point": "a", "capture_input": True}]}, "activation_hooks[0]", "is one place"),
    ({"activation_hooks": [HOOK | {"layer": 0}]}, "activation_hooks[0].layer", "layer_name, component, hook_point"),
    ({"activation_hooks": [HOOK | {"positions": [-1]}]}, "activation_hooks[0].positions", "'last', an index from 0"),
    ({"activation_hooks": [HOOK | {"positions": "first"}]}, "activation_hooks[0].positions", "'last', an index from 0"),
    ({"activation_hooks": [HOOK | {"positions": [2, 2]}]}, "activation_hooks[0].positions", "a list of different ones"),
    ({"activation_hooks": [HOOK | {"heads": [1, 1]}]}, "activation_hooks[0].heads", "a list of different ones"),
    ({"activation_hooks": [HOOK | {"positions": {"start": 3, "stop": 2}}]}, "activation_hooks[0].positions", "whole"),
    (
        {"activation_hooks": [HOOK | {"heads": {"start": 1}}]},
        "activation_hooks[0].heads",
        "an index from 0 up or a list",
    ),
    ({"activation_hooks": [HOOK | {"heads": True}]}, "activation_hooks[0].heads", "an index from 0 up or a list"),
    ({"activation_hooks": [HOOK | {"reduce": "sum"}]}, "activation_hooks[0].reduce", "'mean', 'max', 'last' or 'norm'"),
    ({"activation_hooks": [HOOK | {"capture_input": 1}]}, "activation_hooks[0].capture_input", "boolean"),
    ({"activation_hooks": [HOOK | {"capture_output": False}]}, "activation_hooks[0]", "must be true"),
    ({"activation_hooks": [HOOK | {"hook_id": ".."}]}, "activation_hooks[0].hook_id", "printable characters"),
    ({"activation_hooks": [HOOK | {"hook_id": "a\x07"}]}, "activation_hooks[0].hook_id", "printable characters"),
    ({"activation_hooks": [HOOK] * 3000}, "activation_hooks", "at most 2048"),
    ({"activation_hooks": [HOOK | {"layer_name": "transformer.h.3"}]}, "activation_hooks[0].layer_name", "h.0 to"),
    ({"activation_hooks": [HOOK | {"layer_name": "attic"}]}, "activation_hooks[0].layer_name", "transformer.wte"),
    ({"activation_hooks": [HOOK, HOOK | {"component": "soul"}]}, "activation_hooks[1].component", "residual, attent"),
    ({"activation_hooks": [HOOK, {"hook_point": "hook_soul"}]}, "activation_hooks[1].hook_point", "Unknown hook point"),
    ({"activation_hooks": [HOOK, HOOK]}, "activation_hooks[1].hook_id", "share the hook_id"),
    ({"activation_hooks": []}, "activation_hooks", "POST /v1/activations/hooks"),
    ({"activation_hooks": None}, "activation_hooks", "POST /v1/activations/hooks"),
    ({"activation_encoding": "pickle"}, "activation_encoding", "'json', 'base64' or 'none'"),
    ({"activation_dtype": "int8"}, "activation_dtype", "'float32' or 'float16'"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fault", "param", "said"), CHAT_FAULTS, ids=[json.dumps(f[0])[:60] for f in CHAT_FAULTS])
def test_wrong_field_is_named_with_what_is_allowed(
    worker: ModelWorker, fault: dict[str, Any], param: str | None, said: str, stream: bool
) -> None:
    client = create_app(worker).test_client()
    body = {"messages": MESSAGES, "activation_hooks": HOOKS, "max_tokens": 1, "stream": stream} | fault
    error = refused(client.post(CAPTURE, json=body), 400)
    assert error["param"] == param
    assert said in error["message"]


def test_service_is_unharmed_by_every_wrong_field(client: FlaskClient) -> None:
    for fault, _, _ in CHAT_FAULTS:
        client.post(CAPTURE, json={"messages": MESSAGES, "activation_hooks": HOOKS, "max_tokens": 1} | fault)


def test_plain_generation_needs_at_least_one_token(client: FlaskClient) -> None:
    for path, prompt in ((CHAT, {"messages": MESSAGES}), ("/v1/completions", {"prompt": "w1"})):
        assert refused(client.post(path, json=prompt | {"max_tokens": 0}), 400)["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "not empty"),
        ([], "not empty"),
        (5, "a string or a list of token ids"),
        ([1, "w1"], "a string or a list of token ids"),
        ([1, True], "a string or a list of token ids"),
        ([1, -1], "a string or a list of token ids"),
        ([1, 60], "Allowed: 0 to 59"),
        ([1, 10**30], "a string or a list of token ids"),
        ("   ", "no tokens"),
        ([7] * 513, "at most 512"),
    ],
)
def test_prompt_that_cannot_be_read_is_refused(client: FlaskClient, prompt: Any, said: str) -> None:
    for stream in (False, True):
        error = refused(client.post("/v1/completions", json={"prompt": prompt, "stream": stream}), 400)
        assert said in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b'{"messages": ', b"not json", b"\xff\xfe{}", b'"\\ud800"', b"[" * 50_000],
)
def test_malformed_json_is_refused(client: FlaskClient, body: bytes) -> None:
    for path in (CHAT, CAPTURE, "/v1/models/load", "/v1/activations/hooks", "/v1/tokenize"):
        error = refused(client.post(path, data=body, content_type="application/json"), 400)
        assert "JSON" in error["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_has_not_are_refused(client: FlaskClient, number: str) -> None:
    body = json.dumps({"messages": MESSAGES})[:-1] + f', "temperature": {number}}}'
    error = refused(client.post(CHAT, data=body, content_type="application/json"), 400)
    assert error["param"] == "temperature"
    assert "finite" in error["message"]
    assert "null" not in error["message"]


@pytest.mark.parametrize("body", ["[]", "5", "null", '"text"'])
def test_body_must_be_an_object(client: FlaskClient, body: str) -> None:
    error = refused(client.post(CHAT, data=body, content_type="application/json"), 400)
    assert error["message"] == "The body must be a JSON object."


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", None])
def test_other_content_types_are_refused(client: FlaskClient, content_type: str | None) -> None:
    error = refused(client.post(CHAT, data=json.dumps({"messages": MESSAGES}), content_type=content_type), 415)
    assert "application/json" in error["message"]


def test_unknown_model_names_the_loaded_ones(client: FlaskClient) -> None:
    replies = [
        client.post(CHAT, json={"messages": MESSAGES, "model": "other"}),
        client.post("/v1/tokenize", json={"text": "w1", "model": "other"}),
        client.post("/v1/activations/hooks", json={"hooks": [HOOK], "model": "other"}),
        client.post("/v1/analysis/logit_lens", json={"prompt": "w1", "model": "other"}),
        client.get("/v1/models/other"),
        client.delete("/v1/models/other"),
        client.get("/v1/models/other/hook_points"),
        client.get("/v1/activations/hooks?model=other"),
        client.delete("/v1/activations/hooks?model=other"),
        client.delete("/v1/activations/hooks/resid?model=other"),
    ]
    for reply in replies:
        error = refused(reply, 404)
        assert error["code"] == "model_not_found"
        assert "Loaded: tiny." in error["message"]


def test_an_empty_model_is_an_unknown_one_and_not_every_one(client: FlaskClient) -> None:
    client.post("/v1/activations/hooks", json={"hooks": HOOKS})
    path = "/v1/activations/hooks"
    for reply in (client.get(f"{path}?model="), client.delete(f"{path}?model="), client.delete(f"{path}/ids?model=")):
        assert refused(reply, 404)["code"] == "model_not_found"
    assert len(client.get(path).get_json()["hooks"]) == len(HOOKS)
    client.delete(path)
    with ModelWorker(load=load_tiny) as worker:
        empty = create_app(worker).test_client()
        for reply in (empty.get(f"{path}?model="), empty.delete(f"{path}?model=")):
            assert "None is loaded" in refused(reply, 404)["message"]


def test_without_a_model_every_request_that_needs_one_is_a_conflict() -> None:
    with ModelWorker(load=load_tiny) as worker:
        client = create_app(worker).test_client()
        requests_ = [
            (CHAT, {"messages": MESSAGES}),
            (CHAT, {"messages": MESSAGES, "stream": True}),
            (CAPTURE, {"messages": MESSAGES, "activation_hooks": HOOKS}),
            ("/v1/completions", {"prompt": "w1"}),
            ("/v1/tokenize", {"text": "w1"}),
            ("/v1/detokenize", {"tokens": [7]}),
            ("/v1/activations/hooks", {"hooks": HOOKS}),
            ("/v1/analysis/logit_lens", {"prompt": "w1"}),
        ]
        for path, body in requests_:
            error = refused(client.post(path, json=body), 409)
            assert error["code"] == "no_model_loaded"
            assert "POST /v1/models/load" in error["message"]
        assert client.get("/v1/models").get_json()["data"] == []
        assert client.get("/v1/activations/hooks").get_json()["hooks"] == []
        assert client.delete("/v1/activations/hooks").status_code == 200


def test_model_that_cannot_be_loaded_leaves_the_others(client: FlaskClient, tmp_path: Any) -> None:
    nothing = refused(client.post("/v1/models/load", json={"model_path": str(tmp_path / "nothing")}), 404)
    assert "nothing" in nothing["message"]
    assert nothing["param"] == "model_path"
    empty = refused(client.post("/v1/models/load", json={"model_path": str(tmp_path)}), 400)
    assert "config.json" in empty["message"]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "nonesuch"}')
    refused(client.post("/v1/models/load", json={"model_path": str(broken)}), 400)
    for path in ("~nouser/x", "x" * 4096, "a\0b"):
        nowhere = refused(client.post("/v1/models/load", json={"model_path": path}), 404)
        assert nowhere["param"] == "model_path"
        assert path[:9].encode("unicode_escape").decode() in nowhere["message"]
    refused(client.post("/v1/models/load", json={}), 400)
    refused(client.post("/v1/models/load", json={"model_path": ""}), 400)
    assert client.get("/health").get_json()["models"] == ["tiny"]


@pytest.mark.parametrize(
    "model_id", ["load", ".", "..", "", "a/../b", "a//b", "/a", "a/", "a\nb", "\x7f", "a/hook_points", "x" * 201]
)
def test_a_model_id_that_no_address_can_hold_is_refused(client: FlaskClient, model_id: str) -> None:
    error = refused(client.post("/v1/models/load", json={"model_path": "llama", "model_id": model_id}), 400)
    assert error["param"] == "model_id"
    assert "character" in error["message"]
    assert client.get("/health").get_json()["models"] == ["tiny"]


@pytest.mark.parametrize("name", ["load", "a\nb"])
def test_a_folder_whose_name_no_address_can_hold_needs_an_id(client: FlaskClient, name: str, tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / name))
    error = refused(client.post("/v1/models/load", json={"model_path": folder}), 400)
    assert error["param"] == "model_id"
    assert "give a model_id" in error["message"]
    assert client.get("/health").get_json()["models"] == ["tiny"]


def test_hooks_of_another_model_are_named_when_there_is_nothing_to_capture() -> None:
    with ModelWorker(load=load_tiny) as worker:
        client = create_app(worker).test_client()
        for model_id in ("first", "second", "third"):
            worker.load("llama", model_id)
        client.post("/v1/activations/hooks", json={"hooks": HOOKS, "model": "first"})
        error = refused(client.post(CAPTURE, json={"messages": MESSAGES}), 400)
        assert error["code"] == "no_hooks"
        assert "Hooks are registered for first, not for third." in error["message"]


def test_registering_a_wrong_hook_registers_nothing(client: FlaskClient) -> None:
    faults = {"layer_name": HOOK | {"layer_name": "7"}, "component": HOOK | {"component": "soul"}, "hook_id": HOOK}
    for field, wrong in faults.items():
        error = refused(client.post("/v1/activations/hooks", json={"hooks": [HOOK, wrong]}), 400)
        assert error["param"] == f"hooks[1].{field}"
    refused(client.post("/v1/activations/hooks", json={"hooks": []}), 400)
    assert client.get("/v1/activations/hooks").get_json()["hooks"] == []


def test_unknown_hook_id_names_the_registered_ones(client: FlaskClient) -> None:
    client.post("/v1/activations/hooks", json={"hooks": HOOKS})
    error = refused(client.delete("/v1/activations/hooks/none-such"), 404)
    assert error["code"] == "hook_not_found"
    assert "ids, pattern, resid" in error["message"]
    client.delete("/v1/activations/hooks")


def test_unknown_address_is_not_found(client: FlaskClient) -> None:
    for path in ("/", "/v1", "/v1/chat", "/v1/models/", "/v1//models", "/health/"):
        refused(client.get(path), 404)
    refused(client.post("/v1/nothing", data="{"), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, {"POST"}),
        ("PUT", CAPTURE, {"POST"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("DELETE", "/v1/models", {"GET", "HEAD"}),
        ("GET", "/v1/models/load", {"POST"}),
        ("POST", "/v1/models/tiny", {"GET", "HEAD", "DELETE"}),
        ("PATCH", "/v1/activations/hooks", {"GET", "HEAD", "POST", "DELETE"}),
        ("BREW", "/v1/tokenize", {"POST"}),
    ],
)
def test_wrong_method_names_the_right_ones(client: FlaskClient, method: str, path: str, allowed: set[str]) -> None:
    reply = client.open(path, method=method)
    error = refused(reply, 405)
    assert set(reply.headers["Allow"].split(", ")) - {"OPTIONS"} == allowed
    assert all(name in error["message"] for name in allowed)


def test_body_over_the_limit_is_refused(client: FlaskClient) -> None:
    body = {"messages": [{"role": "user", "content": "w1 " * LIMIT}]}
    error = refused(client.post(CHAT, json=body), 413)
    assert error["code"] == "request_too_large"
    assert f" {LIMIT} bytes" in error["message"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "Roles must alternate."),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ messages[7].content }}", "no element 7"),
    ],
)
def test_a_chat_template_that_fails_is_about_the_messages(template: str, said: str) -> None:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama").model.tokenizer.chat_template = template
        client = create_app(worker).test_client()
        for path in (CHAT, "/v1/tokenize"):
            error = refused(client.post(path, json={"messages": MESSAGES}), 400)
            assert error["param"] == "messages"
            assert "chat template refuses" in error["message"]
            assert said in error["message"]


def test_number_too_large_for_float16_is_an_error_that_says_what_to_do(
    client: FlaskClient, worker: ModelWorker
) -> None:
    with ModelWorker(load=load_tiny) as worker:
        model = worker.load("llama").model
        worker.call(
            lambda: model.model.model.embed_tokens.update({"weight": model.model.model.embed_tokens.weight * 1e6})
        )
        client = create_app(worker).test_client()
        hooks = [{"layer_name": "transformer.wte", "component": "embedding"}]
        body = {"messages": MESSAGES, "activation_hooks": hooks, "max_tokens": 0, "activation_dtype": "float16"}
        for stream in (False, True):
            error = refused(client.post(CAPTURE, json=body | {"stream": stream}), 400)
            assert "float32" in error["message"]
            assert error["param"] == "activation_dtype"


def test_an_array_that_does_not_fit_its_axes_is_the_server_s_fault(worker: ModelWorker) -> None:
    about = {"layer_name": "0", "component": "mlp", "hook_point": "x", "layer_index": 0, "phase": "prefill", "step": 0}
    about |= {"hook_id": "h", "axes": ("one",), "positions": (0, 1), "is_input": False}
    step = Step(None, None, "", None, {"h": [(about, np.zeros((1, 1), np.float32))]})
    with pytest.raises(PayloadError) as caught:
        step.records("json", "float16")
    assert describe(caught.value, "req-1").status == 500


def test_unexpected_error_is_logged_with_the_id_that_the_reply_repeats(caplog: pytest.LogCaptureFixture) -> None:
    def load(path: str) -> Any:
        raise RuntimeError(f"a secret about {path}")

    with ModelWorker(load=load) as worker, caplog.at_level(logging.ERROR):
        client = create_app(worker).test_client()
        reply = client.post("/v1/models/load", json={"model_path": "x"})
        error = refused(reply, 500)
        assert "secret" not in error["message"]
        request_id = reply.headers["X-Request-Id"]
        assert request_id in error["message"]
        assert request_id in caplog.text
        assert "a secret about x" in caplog.text
        assert client.get("/health").status_code == 200


def test_a_hook_that_did_not_fire_is_an_error_and_not_silence() -> None:
    with ModelWorker(load=load_tiny) as worker:
        model = worker.load("llama").model
        plain = model.generate_steps

        def deaf(*args: Any, capture: Any, **options: Any) -> Any:
            return plain(*args, capture=[], **options)

        model.generate_steps = deaf  # type: ignore[method-assign]
        client = create_app(worker).test_client()
        body = {"messages": MESSAGES, "activation_hooks": HOOKS, "max_tokens": 1}
        error = refused(client.post(CAPTURE, json=body), 500)
        assert error["code"] == "hook_not_fired"
        assert "resid, pattern, ids" in error["message"]


# Who may ask


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "LOCALHOST"])
def test_loopback_hosts_are_answered(worker: ModelWorker, host: str) -> None:
    assert create_app(worker).test_client().get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8080", "192.168.0.1", "[", "", "127.0.0.1.nip.io"]
)
def test_other_hosts_are_refused_against_dns_rebinding(worker: ModelWorker, host: str) -> None:
    client = create_app(worker).test_client()
    for path in ("/health", "/v1/models", "/nothing"):
        assert refused(client.get(path, headers={"Host": host}), 403)["code"] == "host_not_allowed"


def test_with_a_key_any_host_may_ask_but_must_show_it(worker: ModelWorker) -> None:
    client = create_app(worker, ServerConfig(host="0.0.0.0", api_key="k3y")).test_client()
    assert client.get("/health", headers={"Host": "lab.example"}).status_code == 200
    assert client.get("/v1/models", headers={"Host": "lab.example", "Authorization": "Bearer k3y"}).status_code == 200
    for wrong in (None, "", "k3y", "Basic k3y", "Bearer", "Bearer k3", "Bearer k3y2", "Bearer ké"):
        reply = client.get("/v1/models", headers={"Authorization": wrong} if wrong is not None else {})
        assert refused(reply, 401)["code"] == "invalid_api_key"
        assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert "k3y" not in reply.get_data(as_text=True)


def test_no_page_of_another_origin_is_let_in(client: FlaskClient) -> None:
    origin = {"Origin": "https://evil.example"}
    for reply in (
        client.get("/v1/models", headers=origin),
        client.options(CHAT, headers=origin | {"Access-Control-Request-Method": "POST"}),
    ):
        assert not [name for name, _ in reply.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize("arguments", [["--port", "65536"], ["--port", "x"], ["--max-body-mb", "0"], ["--bogus"]])
def test_wrong_arguments_end_with_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


# The wire: what waitress refuses before the app sees it


@pytest.fixture(scope="module")
def url(worker: ModelWorker) -> Iterator[str]:
    with running_server(worker, ServerConfig(port=0, max_body_bytes=LIMIT)) as url:
        yield url


def send(url: str, data: bytes) -> tuple[int, dict[str, Any]]:
    """Status and JSON body of the answer to raw bytes."""
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=10) as connection:
        connection.sendall(data)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, body = answer.split(b"\r\n\r\n", 1)
    assert b"content-type: application/json" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nbroken header\r\n\r\n", 400),
        (b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n", 400),
        (b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: odd\r\n\r\n", 501),
        (b"GET /health HTTP/1.1\r\nX: ".ljust(2**18, b"x"), 431),
        (b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n", 413),
    ],
)
def test_broken_http_gets_the_same_error_shape(url: str, data: bytes, status: int) -> None:
    got, error = send(url, data)
    assert got == status
    assert set(error) == {"message", "type", "code", "param", "request_id"}
    assert status != 413 or f" {LIMIT} bytes" in error["message"]
    assert requests.get(f"{url}/health", timeout=10).status_code == 200


def test_body_over_the_limit_is_refused_over_the_wire(url: str) -> None:
    for data in (b"x" * (2 * LIMIT), (b"x" * LIMIT for _ in range(2))):
        reply = requests.post(url + CHAT, data=data, headers={"Content-Type": "application/json"}, timeout=10)
        assert reply.status_code == 413
        assert reply.json()["error"]["code"] == "request_too_large"
        assert f" {LIMIT} bytes" in reply.json()["error"]["message"]
    assert requests.get(f"{url}/health", timeout=10).status_code == 200


def test_half_a_body_holds_up_nobody(url: str) -> None:
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert requests.get(f"{url}/health", timeout=10).status_code == 200


# The contract without a server


def test_unknown_field_deep_inside_lists_the_fields_of_its_own_object() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatCaptureRequest.model_validate({"messages": MESSAGES, "activation_hooks": [HOOK | {"rows": [0]}]})
    error = invalid_request(caught.value, ChatCaptureRequest)
    assert isinstance(error, ApiError)
    assert error.param == "activation_hooks[0].rows"
    assert error.message.endswith("capture_input, capture_output, positions, heads, reduce.")


def test_unknown_field_is_not_answered_with_fields_that_do_nothing() -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate({"prompt": "w1", "beams": 2})
    message = invalid_request(caught.value, CompletionRequest).message
    assert "max_completion_tokens" in message
    assert "tools" not in message


def test_defaults_are_the_documented_ones() -> None:
    asked = ChatCaptureRequest.model_validate_json(json.dumps({"messages": MESSAGES}))
    assert (asked.token_limit, asked.temperature, asked.top_p, asked.seed) == (100, 0.7, 1.0, None)
    assert (asked.activation_encoding, asked.activation_dtype) == ("json", "float32")
    hooked = ChatCaptureRequest.model_validate_json(json.dumps({"messages": MESSAGES, "activation_hooks": [HOOK]}))
    assert hooked.activation_hooks is not None
    assert (hooked.activation_hooks[0].capture_input, hooked.activation_hooks[0].capture_output) == (False, True)


VECTOR = {"name": "v", "layer": 0, "vector": [1]}
# The least that each request may hold.
LEAST: dict[type[Request], dict[str, Any]] = {
    schemas.TextPart: {"type": "text", "text": "w1"},
    schemas.ChatMessage: MESSAGES[0],
    schemas.HookRequest: HOOK,
    schemas.InterventionRequest: {"type": "zero", "hook_point": "a"},
    schemas.StreamOptions: {},
    schemas.GenerationRequest: {},
    schemas.CaptureRequest: {},
    schemas.ChatRequest: {"messages": MESSAGES},
    schemas.CompletionRequest: {"prompt": "w1"},
    schemas.ChatCaptureRequest: {"messages": MESSAGES},
    schemas.CompletionCaptureRequest: {"prompt": "w1"},
    schemas.LoadRequest: {"model_path": "llama"},
    schemas.SelfTestRequest: {},
    schemas.RegisterHooksRequest: {"hooks": [HOOK]},
    schemas.TokenizeRequest: {"text": "w1"},
    schemas.DetokenizeRequest: {"tokens": []},
    schemas.SamplingRequest: {},
    analysis.PromptRequest: {"prompt": "w1"},
    analysis.LogitLensRequest: {"prompt": "w1"},
    analysis.AttributionRequest: {"prompt": "w1", "token_directions": [1]},
    analysis.TraitVectorRequest: VECTOR,
    analysis.DynamicsRequest: {},
    analysis.TraitsRequest: {"prompt": "w1", "experiment": "e"},
}
OPTIONAL = [(model, name) for model in LEAST for name in model.model_fields if name not in LEAST[model]]


def test_no_request_is_left_out() -> None:
    found = [*vars(schemas).values(), *vars(analysis).values()]
    models = {model for model in found if isinstance(model, type) and issubclass(model, Request)}
    assert models - {Request} == set(LEAST)


@pytest.mark.parametrize(("model", "name"), OPTIONAL, ids=[f"{model.__name__}-{name}" for model, name in OPTIONAL])
def test_null_is_the_default(model: type[Request], name: str) -> None:
    absent = model.model_validate_json(json.dumps(LEAST[model]))
    assert model.model_validate_json(json.dumps(LEAST[model] | {name: None})) == absent
    schema = model.model_json_schema()
    jsonschema_rs.validate(schema, LEAST[model] | {name: None})


TOKENS_ASKED = [[1], ["a"], [1, "a"], [1] * 65]
DIRECTIONS = [*TOKENS_ASKED, [[1, "a"]], [], [[1]], [[1, 2, 3]], [1, [2, 3]], [-1], [""], 1, "a", [None]]
POINTS = ["blocks.0.hook_resid_post", "blocks.00.hook_resid_post", "blocks.*.hook_resid_post", "hook_embed", None]
RECORD = {"shape": [1], "dtype": "float32", "encoding": "json", "data": [1.5]}
VECTORS = {"prompt": "a", "vectors": [VECTOR]}
EITHER = [
    (schemas.HookRequest, [{}, HOOK, {"hook_point": "a"}, HOOK | {"hook_point": "a"}, {"layer_name": "1"}]),
    (schemas.HookRequest, [HOOK | {"capture_output": out, "capture_input": in_} for out in (0, 1) for in_ in (0, 1)]),
    (schemas.HookRequest, [{"hook_point": "a", "capture_input": True}, {"hook_point": "a", "layer_name": None}]),
    (schemas.TokenizeRequest, [{}, {"text": "a"}, {"messages": MESSAGES}, {"messages": MESSAGES, "text": "a"}]),
    (analysis.LogitLensRequest, [{"prompt": "a", "messages": None}, {"messages": MESSAGES, "prompt": [1]}, {}]),
    (analysis.LogitLensRequest, [{"prompt": "a", "token_directions": d} for d in DIRECTIONS]),
    (analysis.AttributionRequest, [{"prompt": "a", "token_directions": d} for d in DIRECTIONS]),
    (
        analysis.LogitLensRequest,
        [{"prompt": "a", "positions": p} for p in ("all", "last", 1, -1, [1, 1], {"start": 1})],
    ),
    (analysis.LogitLensRequest, [{"prompt": "a", "components": c} for c in (["x"], [], "x", ["x"] * 17, [1])]),
    (analysis.TraitVectorRequest, [VECTOR | {"layer": layer, "hook_point": p} for layer in (0, None) for p in POINTS]),
    (analysis.TraitVectorRequest, [VECTOR | {"vector": v} for v in ([1, 0.5], [], 1, "a", [True], [None], {}, RECORD)]),
    (
        analysis.TraitsRequest,
        [VECTORS | {"experiment": e} for e in ("a", "a b", None, "", ".", "..", "a/b", "a\\b", 1)],
    ),
    (analysis.TraitsRequest, [{"prompt": "a", "experiment": e, "vectors": None} for e in ("a", None)]),
    (analysis.TraitsRequest, [{"messages": MESSAGES, "prompt": p, "experiment": "e"} for p in ("a", None)]),
    (schemas.CompletionRequest, [{"prompt": "a", "temperature": t} for t in (0, 0.0, 1e-7, 1e-6, 2, 2.1, -1, None)]),
    (schemas.HookRequest, [HOOK | {name: [1, again]} for name in ("heads", "positions") for again in (1, 2)]),
]


@pytest.mark.parametrize(("model", "bodies"), EITHER)
def test_the_schema_refuses_what_the_validator_refuses(model: type[Request], bodies: list[dict[str, Any]]) -> None:
    schema = jsonschema_rs.validator_for(model.model_json_schema())
    for body in bodies:
        body = {k: bool(v) if k.startswith("capture_") else v for k, v in body.items()}
        try:
            model.model_validate_json(json.dumps(body))
            fits = True
        except ValidationError:
            fits = False
        assert schema.is_valid(body) is fits, body


def test_an_intervention_has_one_place_in_the_schema() -> None:
    schema = jsonschema_rs.validator_for(schemas.InterventionRequest.model_json_schema())
    place, point = {"layer_name": "1", "component": "mlp"}, {"hook_point": "a"}
    edits = [{"type": "zero"} | given for given in (place, point, place | point, {}, {"component": "mlp"})]
    assert [schema.is_valid(edit) for edit in edits] == [True, True, False, False, False]


def test_a_number_that_the_engine_refuses_is_named() -> None:
    with pytest.raises(HookError) as caught:
        Sampling(top_p=2).check()
    assert describe(caught.value, "req-1").param == "top_p"


NEUTRAL: list[dict[str, Any]] = [
    {"n": 1},
    {"stream_options": None},
    {"logprobs": False},
    {"top_logprobs": 0},
    {"user": "me"},
    {"frequency_penalty": 0},
    {"frequency_penalty": 0.0},
    {"presence_penalty": 0},
    {"store": False},
    {"echo": False},
    {"response_format": {"type": "text"}},
    {"tools": []},
    {"tool_choice": "none"},
    {"logit_bias": {}},
]
NEUTRAL += [dict.fromkeys(field) for field in NEUTRAL]


@pytest.mark.parametrize("field", NEUTRAL, ids=json.dumps)
def test_a_field_that_asks_for_nothing_changes_nothing(worker: ModelWorker, field: dict[str, Any]) -> None:
    client = create_app(worker).test_client()
    for path, prompt in ((CHAT, {"messages": MESSAGES}), ("/v1/completions", {"prompt": "w1 w2"})):
        body = prompt | {"max_tokens": 2, "seed": 1}
        reply = client.post(path, json=body | field)
        assert reply.status_code == 200, reply.get_data(as_text=True)
        assert reply.get_json()["choices"] == client.post(path, json=body).get_json()["choices"]


def test_max_completion_tokens_is_another_name_of_max_tokens(client: FlaskClient) -> None:
    for both in ({}, {"max_tokens": None}, {"max_tokens": 3}):
        reply = client.post(CHAT, json={"messages": MESSAGES, "max_completion_tokens": 3} | both)
        assert reply.get_json()["usage"]["completion_tokens"] == 3
    reply = client.post(CAPTURE, json={"messages": MESSAGES, "activation_hooks": HOOKS, "max_completion_tokens": 0})
    assert reply.get_json()["usage"]["completion_tokens"] == 0
    refused(client.post(CHAT, json={"messages": MESSAGES, "max_completion_tokens": 0}), 400)


def test_one_stop_text_is_a_list_of_one() -> None:
    def texts(stop: Any) -> list[str]:
        return CompletionRequest.model_validate({"prompt": "w1", "stop": stop}).stop_texts

    assert (texts("w1"), texts(["w1", "w2"]), texts(None), texts([])) == (["w1"], ["w1", "w2"], [], [])
