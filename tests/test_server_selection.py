"""Hooks that keep a selection, over HTTP and through the client: what Python captures, bit for bit."""

import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from flask.testing import FlaskClient
from pydantic import ValidationError
from server_tools import HOOKS, load_tiny, running_server
from test_server import events_of

from api_server import ModelWorker, create_app
from api_server.schemas.requests import ChatCaptureRequest, CompletionRequest, HookRequest, InterventionRequest
from mlx_hooks import HookedModel, HookSpec
from neuroscope_bridge import (
    LMStudioNeuroScopeClient,
    NeuroScopeAPIError,
    decode_activation,
    row_positions,
    stack_records,
)

ROUTE = "/v1/completions/with_activations"
PROMPT = [3, 7, 8, 9, 10, 4, 12, 13]
MAX_TOKENS = 5
LAST = len(PROMPT) + MAX_TOKENS - 2
SELECTED: list[dict[str, Any]] = [
    {"layer_name": "*", "component": "residual", "positions": "last", "hook_id": "a"},
    {"hook_point": "blocks.*.attn.hook_z", "positions": [1, 4, 10], "heads": [2], "hook_id": "b"},
    {"layer_name": "blocks.*", "component": "key", "positions": {"start": 3, "stop": 9}, "heads": [3], "hook_id": "c"},
    {"hook_point": "blocks.1.attn.hook_pattern", "positions": [2, 5], "heads": [0, 3], "hook_id": "d"},
    {"hook_point": "blocks.2.hook_resid_post", "reduce": "mean", "hook_id": "e"},
    {"hook_point": "blocks.2.hook_resid_post", "reduce": "norm", "positions": {"start": 4}, "hook_id": "f"},
    {"layer_name": "transformer.h.*", "component": "mlp", "reduce": "max", "positions": {"stop": 7}, "hook_id": "g"},
    {"hook_point": "blocks.0.attn.hook_attn_scores", "reduce": "last", "hook_id": "h"},
    {"hook_point": "model.layers.1.mlp.up_proj", "reduce": "norm", "hook_id": "i"},
    {"layer_name": "*", "component": "layernorm", "capture_input": True, "positions": 0},
]


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama", "tiny")
        yield worker


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return load_tiny("llama")


@pytest.fixture(scope="module")
def web(worker: ModelWorker) -> FlaskClient:
    return create_app(worker).test_client()


@pytest.fixture(scope="module")
def client(worker: ModelWorker) -> Iterator[LMStudioNeuroScopeClient]:
    with running_server(worker) as url, LMStudioNeuroScopeClient(url) as client:
        yield client


def ask(web: FlaskClient, hooks: Any, status: int = 200, **more: Any) -> Any:
    body = {"prompt": PROMPT, "activation_hooks": hooks, "max_tokens": MAX_TOKENS, "temperature": 0} | more
    reply = web.post(ROUTE, json=body)
    assert reply.status_code == status, reply.get_data(as_text=True)
    return events_of(reply.get_data(as_text=True)) if more.get("stream") else reply.get_json()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("encoding", ["base64", "json"])
def test_selected_records_are_the_engine_s(web: FlaskClient, model: HookedModel, encoding: str, stream: bool) -> None:
    reply = ask(web, SELECTED, activation_encoding=encoding, stream=stream)
    parts = reply if stream else [reply]
    captured = model.generate(PROMPT, max_tokens=MAX_TOKENS, capture=SELECTED).activations
    ids = [hook.get("hook_id", "*_layernorm") for hook in SELECTED]
    assert list(captured) == ids
    hooks = parts[-1]["hooks"]
    for hook_id in ids:
        got = [record for part in parts for record in part.get("activations", {}).get(hook_id, [])]
        assert len(got) == len(captured[hook_id]) > 0
        assert hooks[hook_id]["fired"] == len(got)
        assert hooks[hook_id]["bytes"] == sum(one.numpy().nbytes for one in captured[hook_id])
        for record, one in zip(got, captured[hook_id], strict=True):
            assert (record["layer_name"], record["component"]) == (one.layer_name, one.component)
            assert (record["hook_point"], record["is_input"]) == (one.hook_point.name, one.is_input)
            assert record["heads"] == (None if one.heads is None else list(one.heads))
            assert record["reduce"] == one.reduce
            assert record["shape"] == list(one.value.shape)
            assert record["axes"] == list(one.hook_point.axes)
            assert list(row_positions(record)) == list(one.position_ids)
            np.testing.assert_array_equal(decode_activation(record), one.numpy(), err_msg=hook_id)


def test_records_say_what_they_hold(web: FlaskClient) -> None:
    def about(hook_id: str, *names: str) -> list[tuple[Any, ...]]:
        return [tuple(record[name] for name in names) for record in reply[hook_id]]

    reply = ask(web, SELECTED, activation_encoding="none")["activations"]
    assert about("b", "hook_point", "positions", "position_ids", "heads")[::3] == [
        ("blocks.0.attn.hook_z", [1, 5], [1, 4], [2]),
        ("blocks.0.attn.hook_z", [10, 11], None, [2]),
    ]
    assert about("c", "layer_name", "shape", "heads")[:2] == [
        ("blocks.0", [1, 5, 1, 8], [1]),
        ("blocks.1", [1, 5, 1, 8], [1]),
    ]
    assert about("d", "shape", "positions", "position_ids") == [([1, 2, 2, len(PROMPT)], [2, 6], [2, 5])]
    assert about("e", "axes", "shape", "positions", "reduce")[:2] == [
        (["batch", "d_model"], [1, 32], [0, 8], "mean"),
        (["batch", "d_model"], [1, 32], [8, 9], "mean"),
    ]
    assert about("i", "axes", "component", "hook_point")[0] == (
        ["batch", "pos"],
        "module",
        "model.layers.1.mlp.up_proj.output",
    )


def test_the_client_stacks_selected_records(client: LMStudioNeuroScopeClient, model: HookedModel) -> None:
    result = client.complete_with_activations(PROMPT, SELECTED, max_tokens=MAX_TOKENS, temperature=0)
    whole = model.generate(
        PROMPT,
        max_tokens=MAX_TOKENS,
        capture=["blocks.*.attn.hook_z", "blocks.*.hook_resid_post", "blocks.*.attn.hook_rot_k"],
    ).cache
    for layer in range(3):

        def of_layer(hook_id: str, layer: int = layer) -> np.ndarray:
            return stack_records([r for r in result["activations"][hook_id] if r["layer_index"] == layer])

        np.testing.assert_array_equal(of_layer("a"), whole.numpy(("resid_post", layer))[:, len(PROMPT) - 1 :])
        np.testing.assert_array_equal(of_layer("b"), whole.numpy(("z", layer))[:, [1, 4, 10], 2:3])
        np.testing.assert_array_equal(of_layer("c"), whole.numpy(("rot_k", layer))[:, 3:9, 1:])
    mean = result["activations"]["e"][0]["data"]
    prompt = whole.numpy(("resid_post", 2))[:, : len(PROMPT)].astype(np.float64)
    np.testing.assert_allclose(mean, prompt.mean(axis=1), rtol=1e-6, atol=1e-6)


def test_registered_hooks_show_and_keep_their_selection(client: LMStudioNeuroScopeClient) -> None:
    try:
        assert client.register_hooks(SELECTED[:2]) == ["a", "b"]
        shown = client.list_hooks()
        assert shown[1] == {
            "layer_name": None, "component": None, "hook_id": "b", "capture_input": False, "capture_output": True,
            "hook_point": "blocks.*.attn.hook_z", "positions": [1, 4, 10], "heads": [2], "reduce": None,
        }  # fmt: skip
        assert client.register_hooks(shown) == ["a", "b"], "what is shown can be sent back"
        result = client.complete_with_activations(PROMPT, None, max_tokens=MAX_TOKENS)
        assert {tuple(record["heads"] or ()) for record in result["activations"]["b"]} == {(2,)}
    finally:
        client.clear_hooks()


def test_a_text_that_ends_early_leaves_a_hook_silent(web: FlaskClient, model: HookedModel) -> None:
    text = model.generate(PROMPT, max_tokens=MAX_TOKENS).text.split()
    hooks = [{"hook_point": "hook_embed", "positions": [LAST], "hook_id": "late"}, {"hook_point": "hook_embed"}]
    reply = ask(web, hooks, stop=text[1])
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["hooks"]["late"] == {"fired": 0, "positions": None, "bytes": 0}
    assert reply["activations"]["late"] == []
    assert reply["hooks"]["hook_embed"]["fired"] == reply["usage"]["completion_tokens"] < MAX_TOKENS
    assert ask(web, hooks)["hooks"]["late"]["fired"] == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("hook", "field", "code", "message"),
    [
        (
            {"positions": [LAST + 1]},
            "positions",
            "invalid_hook",
            f"Hook 'h': position {LAST + 1} is out of reach: .* 0 to {LAST}",
        ),
        (
            {"positions": {"start": 99}},
            "positions",
            "invalid_hook",
            f"Hook 'h': there is nothing to capture: .* 0 to {LAST}",
        ),
        ({"heads": [4]}, "heads", "invalid_hook", "Hook 'h': Heads are 0 to 3, got 4"),
        ({"hook_point": "hook_embed", "heads": [0]}, "heads", "invalid_hook", "heads need a head axis"),
        ({"hook_point": "blocks.9.attn.hook_z"}, "hook_point", "unknown_hook", "Unknown hook point"),
        ({"hook_point": "blocks.*.hook_y"}, "hook_point", "unknown_hook", "Unknown hook point"),
        ({"hook_point": "embed.hook_in", "reduce": "mean"}, "reduce", "invalid_hook", "holds ids"),
    ],
)
def test_what_cannot_be_kept_is_named(
    web: FlaskClient, hook: Any, field: str, code: str, message: str, stream: bool
) -> None:
    asked = {"hook_point": "blocks.0.attn.hook_z", "hook_id": "h"} | hook
    hooks = [{"hook_point": "hook_embed", "hook_id": "fine"}, asked]
    reply = web.post(
        ROUTE, json={"prompt": PROMPT, "activation_hooks": hooks, "max_tokens": MAX_TOKENS, "stream": stream}
    )
    error = reply.get_json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (400, code, f"activation_hooks[1].{field}")
    assert re.search(message, error["message"]), error["message"]


def test_the_client_raises_what_the_server_says(client: LMStudioNeuroScopeClient) -> None:
    with pytest.raises(NeuroScopeAPIError, match="position 50 is out of reach"):
        client.complete_with_activations(PROMPT, [HOOKS[0] | {"positions": [50]}], max_tokens=1)


# The contract without a server


def test_a_request_takes_what_a_spec_takes() -> None:
    assert set(HookRequest.model_fields) == set(HookSpec.__dataclass_fields__)


@pytest.mark.parametrize("model", [HookRequest, InterventionRequest, ChatCaptureRequest])
def test_no_field_is_described_as_anything(model: Any) -> None:
    schema = model.model_json_schema()
    for name, field in schema["properties"].items():
        if name in ("n", "logprobs", "top_logprobs", "frequency_penalty", "presence_penalty", "logit_bias",
                    "response_format", "tools", "tool_choice", "store", "echo"):  # fmt: skip
            continue
        assert {"type", "anyOf", "$ref", "const", "enum"} & set(field), name


NUMBERS = [0, 1.5, None, [1, None], [[1, 2], [3, 4]], [[[[0.5]]]]]
NO_NUMBERS = ["1", True, [], [[]], [True], [["1"]], {}, {"data": 1}]
INDICES = [None, 0, 3, [0], [1, 2], {"start": 1}, {"stop": 2}, {"start": 1, "stop": 2}]
NO_INDICES = ["first", -1, 1.5, True, [], [True], [-1], ["1"], {}, {"begin": 1}, {"start": -1}, {"start": None}, [[1]]]


@pytest.mark.parametrize(
    ("model", "field", "place", "fine", "wrong"),
    [
        (HookRequest, "positions", {"hook_point": "a"}, [*INDICES, "last"], NO_INDICES),
        (HookRequest, "heads", {"hook_point": "a"}, INDICES[:-3], [*NO_INDICES, "last", {"start": 1}]),
        (HookRequest, "reduce", {"hook_point": "a"}, [None, "mean", "norm"], ["sum", 1, ["mean"]]),
        (InterventionRequest, "positions", {"type": "zero"}, [*INDICES, "last"], NO_INDICES),
        (InterventionRequest, "keys", {"type": "zero"}, INDICES, [*NO_INDICES, "last"]),
        (InterventionRequest, "values", {"type": "set"}, NUMBERS, NO_NUMBERS),
        (InterventionRequest, "vector", {"type": "add"}, NUMBERS, NO_NUMBERS),
        (CompletionRequest, "prompt", {}, ["a", [0, 5]], ["", [], [-1], [1.5], 5, None]),
        (CompletionRequest, "stop", {"prompt": "a"}, [None, "a", ["a", "b"]], ["", [""], [1], 1]),
    ],
)
def test_descriptions_agree_with_checks(model: Any, field: str, place: Any, fine: list[Any], wrong: list[Any]) -> None:
    schema = model.model_json_schema()
    described = jsonschema_rs.validator_for(schema["properties"][field] | {"$defs": schema.get("$defs", {})})
    for value in fine + wrong:
        fits = any(value is one for one in fine)
        assert described.is_valid(value) == fits, value
        if fits:
            model(**place | {field: value})
        else:
            with pytest.raises(ValidationError):
                model(**place | {field: value})


def test_a_source_is_described_as_a_record() -> None:
    described = jsonschema_rs.validator_for(InterventionRequest.model_json_schema()["properties"]["source"])
    record = {
        "hook_point": "hook_embed",
        "axes": [],
        "positions": [0, 1],
        "shape": [1],
        "dtype": "float32",
        "data": [1],
    }
    assert all(described.is_valid(value) for value in (record, [record], None))
    assert not any(described.is_valid(value) for value in ([], "record", {"data": [1]}, [[record]]))
