"""Interventions over HTTP: what Python does, bit for bit, and errors that name the one at fault."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from flask.testing import FlaskClient
from server_tools import PROMPT_LENGTH, load_tiny, running_server

from api_server import ModelWorker, create_app
from mlx_hooks import HookedModel, Intervention
from neuroscope_bridge import LMStudioNeuroScopeClient, NeuroScopeAPIError, PayloadError
from neuroscope_bridge.payload import encode_intervention, stack_records

ROUTE = "/v1/completions/with_activations"
PROMPT = [3, 7, 8, 9, 10, 4]
HOOKS = [{"layer_name": "transformer.h.2", "component": "residual", "hook_id": "r"}]
RNG = np.random.default_rng(0)
ZERO = {"hook_point": "blocks.1.attn.hook_z", "type": "zero", "heads": [1]}
STEER = {"layer_name": "transformer.h.1", "component": "residual", "type": "add",
         "vector": RNG.normal(size=32).astype(np.float32).tolist(), "coefficient": 1.5, "norm_match": True,
         "positions": "last"}  # fmt: skip
KEYS = ["type", *(field.name for field in fields(Intervention) if field.name != "type")]
"""What the server takes: what Python takes."""
RECORD = {"hook_point": "blocks.1.attn.hook_z", "axes": ["pos"], "positions": [0, 1], "shape": [1], "dtype": "float32"}
SPECS: list[list[dict[str, Any]]] = [
    [ZERO],
    [STEER, ZERO],
    [{"hook_point": "blocks.1.attn.hook_pattern", "type": "scale", "factor": 0.5, "phase": "decode"}],
    [{"hook_point": "blocks.1.attn.hook_attn_scores", "type": "set", "values": [None], "keys": [0],
      "positions": {"start": 2}}],
    [{"hook_point": "blocks.*.mlp.hook_post", "type": "clamp", "min": -0.2, "max": 0.3, "neurons": [0, 5]}],
    [{"hook_point": "hook_embed", "type": "noise", "std": 0.5, "seed": 3, "positions": [0, 4, 7]}],
    [{"hook_point": "blocks.0.hook_mlp_out", "type": "mean", "over": [[1, 2, 3], "w1 w2"]}],
    [{"hook_point": "blocks.1.hook_resid_post", "type": "patch", "positions": 2, "values": 0.25}],
    [{"hook_point": "blocks.1.hook_resid_post", "type": "scale", "factor": 0.5, "passes": [0]}],
]  # fmt: skip


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama", "tiny")
        yield worker


@pytest.fixture(scope="module")
def model(worker: ModelWorker) -> HookedModel:
    return load_tiny("llama")


@pytest.fixture(scope="module")
def web(worker: ModelWorker) -> FlaskClient:
    return create_app(worker).test_client()


@pytest.fixture(scope="module")
def client(worker: ModelWorker) -> Iterator[LMStudioNeuroScopeClient]:
    with running_server(worker) as url, LMStudioNeuroScopeClient(url) as client:
        yield client


def ask(web: FlaskClient, interventions: Any, status: int = 200, **more: Any) -> Any:
    body = {"prompt": PROMPT, "activation_hooks": HOOKS, "max_tokens": 4, "temperature": 0} | more
    reply = web.post(ROUTE, json=body | {"interventions": interventions})
    assert reply.status_code == status, reply.get_data(as_text=True)
    return reply.get_json()


@pytest.mark.parametrize("specs", SPECS)
def test_rest_equals_python_bit_for_bit(web: FlaskClient, model: HookedModel, specs: list[dict[str, Any]]) -> None:
    reply = ask(web, specs)
    result = model.generate(PROMPT, max_tokens=4, capture=HOOKS, interventions=specs)
    assert reply["tokens"]["ids"][PROMPT_LENGTH:] == result.tokens
    np.testing.assert_array_equal(stack_records(reply["activations"]["r"]), result.cache.numpy(("resid_post", 2)))
    assert reply["interventions"] == [receipt.to_dict() for receipt in result.interventions]
    plain = ask(web, None)
    assert "interventions" not in plain
    assert not np.array_equal(stack_records(plain["activations"]["r"]), stack_records(reply["activations"]["r"]))


def test_the_last_event_has_the_receipts(client: LMStudioNeuroScopeClient, web: FlaskClient) -> None:
    with client.complete_with_activations(
        PROMPT, HOOKS, max_tokens=4, temperature=0, interventions=[STEER, ZERO], stream=True
    ) as stream:
        events = list(stream)
    assert [("interventions" in event) for event in events] == [False] * 4 + [True]
    assert events[-1]["interventions"] == ask(web, [STEER, ZERO])["interventions"]


@pytest.mark.parametrize("encoding", ["json", "base64"])
@pytest.mark.parametrize("name", ["residual", "attention_pattern", "attention_scores", "value"])
def test_a_record_of_a_reply_is_a_source(
    client: LMStudioNeuroScopeClient, web: FlaskClient, model: HookedModel, name: str, encoding: str
) -> None:
    hooks = [{"layer_name": "transformer.h.1", "component": name, "hook_id": "s"}]
    other = [5, 6, 7, 8, 9, 10]
    raw = web.post(ROUTE, json={"prompt": other, "activation_hooks": hooks, "max_tokens": 3, "temperature": 0,
                                "activation_encoding": encoding}).get_json()  # fmt: skip
    point = raw["activations"]["s"][0]["hook_point"]
    spec = {"hook_point": point, "type": "patch", "positions": [2, 5, 7]}
    theirs = model.generate(other, max_tokens=3, capture=[point])
    expected = model.generate(
        PROMPT, max_tokens=4, capture=HOOKS, interventions=[spec | {"source": theirs.activations[point]}]
    ).cache.numpy(("resid_post", 2))
    reply = ask(web, [spec | {"source": raw["activations"]["s"]}])
    np.testing.assert_array_equal(stack_records(reply["activations"]["r"]), expected)
    decoded = client.complete_with_activations(other, hooks, max_tokens=3, temperature=0, activation_encoding=encoding)
    reply = client.complete_with_activations(
        PROMPT, HOOKS, max_tokens=4, temperature=0, interventions=[spec | {"source": decoded["activations"]["s"]}]
    )
    np.testing.assert_array_equal(stack_records(reply["activations"]["r"]), expected)
    one = spec | {"source": decoded["activations"]["s"][0], "positions": 2}
    assert client.complete_with_activations(PROMPT, HOOKS, interventions=[one])["interventions"][0]["fired"] == 1


def test_the_client_takes_arrays(client: LMStudioNeuroScopeClient, model: HookedModel) -> None:
    vector = RNG.normal(size=32)
    spec = {"hook_point": "blocks.1.hook_resid_post", "type": "add", "vector": vector, "coefficient": 2.0}
    reply = client.generate_with_activations(
        [{"role": "user", "content": "w1 w2 w3 w4"}], HOOKS, max_tokens=0, interventions=[spec]
    )
    ids = reply["tokens"]["ids"]
    result = model.generate(ids, max_tokens=0, capture=HOOKS, interventions=[spec])
    np.testing.assert_array_equal(reply["activations"]["r"][0]["data"], result.cache.numpy(("resid_post", 2)))
    assert reply["interventions"][0]["norm_after"] == result.interventions[0].norm_after
    mask = {"hook_point": "blocks.1.attn.hook_attn_scores", "type": "set", "values": np.float32(-np.inf), "keys": [0]}
    masked = client.complete_with_activations(
        PROMPT, HOOKS, max_tokens=0, interventions=[mask | {"positions": {"start": 1}}]
    )
    assert masked["interventions"][0]["norm_after"] == 0


def test_the_client_refuses_what_json_cannot_say() -> None:
    spec = {"hook_point": "hook_embed", "type": "set"}
    for values in (np.array([1, np.nan]), np.array([np.inf])):
        with pytest.raises(PayloadError, match="values of an intervention must be finite"):
            encode_intervention(spec | {"values": values})
    with pytest.raises(PayloadError, match="vector of an intervention must be finite"):
        encode_intervention({"type": "add", "vector": np.array([-np.inf])})
    with pytest.raises(PayloadError, match="must be numbers, got complex128"):
        encode_intervention(spec | {"values": np.ones(2, complex)})


def test_interventions_need_no_hooks(web: FlaskClient) -> None:
    reply = ask(web, [ZERO], activation_hooks=None)
    assert reply["activations"] == {}
    assert reply["interventions"][0]["fired"] == 5


@pytest.mark.parametrize(
    ("bad", "param", "code", "said"),
    [
        ({"type": "erase"}, "interventions[1].type", "invalid_value", "must be 'zero', 'mean'"),
        ({"hook_point": "hook_embed"}, "interventions[1].type", "invalid_value", "required"),
        ({"head": 1}, "interventions[1].head", "invalid_value", f"not supported here. Supported: {', '.join(KEYS)}."),
        ({"heads": "1"}, "interventions[1].heads", "invalid_value", "an index from 0 up"),
        ({"passes": [-1]}, "interventions[1].passes", "invalid_value", "an index from 0 up"),
        ({"heads": True}, "interventions[1].heads", "invalid_value", "an index from 0 up"),
        ({"positions": [-1]}, "interventions[1].positions", "invalid_value", "'last', an index"),
        ({"positions": "first"}, "interventions[1].positions", "invalid_value", "'last', an index"),
        ({"positions": {"begin": 1}}, "interventions[1].positions", "invalid_value", "'last', an index"),
        ({"phase": "training"}, "interventions[1].phase", "invalid_value", "'prefill' or 'decode'"),
        ({"type": "scale", "factor": "2"}, "interventions[1].factor", "invalid_value", "valid number"),
        ({"type": "scale", "factor": True}, "interventions[1].factor", "invalid_value", "valid number"),
        ({"type": "add", "vector": [1, "a"]}, "interventions[1].vector", "invalid_value", "lists of numbers"),
        ({"type": "add", "vector": [[1], [1, 2]]}, "interventions[1]", "invalid_intervention", "different lengths"),
        ({"type": "set", "source": [1]}, "interventions[1].source", "invalid_value", "an activation record"),
        ({"type": "set", "source": {}}, "interventions[1].source", "invalid_intervention", "lacks 'hook_point'"),
        ({"type": "set", "source": {"data": [1]}}, "interventions[1].source", "invalid_intervention",
         "it needs hook_point, axes, positions, shape, dtype and data"),
        ({"type": "set", "source": RECORD}, "interventions[1].source", "invalid_intervention", "has no data"),
        ({"type": "set", "source": RECORD | {"dtype": "int3", "data": [1]}}, "interventions[1].source",
         "invalid_intervention", "unknown dtype 'int3'"),
        ({"type": "mean", "over": []}, "interventions[1].over", "invalid_value", "at least 1"),
        ({"type": "mean", "over": [[99]]}, "interventions[1]", "invalid_intervention", "Token ids are 0 to 59"),
        ({"type": "mean", "over": [[1] * 600]}, "interventions[1]", "invalid_intervention", "reads at most 512"),
        ({"type": "noise", "std": -1}, "interventions[1].std", "invalid_value", "greater than or equal to 0"),
        ({"hook_point": None}, "interventions[1]", "invalid_intervention", "has a hook_point, or else layer_name"),
        ({"hook_point": "blocks.9.hook_mlp_out"}, "interventions[1]", "unknown_hook", "Unknown hook point"),
        ({"heads": [4]}, "interventions[1]", "invalid_intervention", "heads are 0 to 3, got [4]"),
        ({"factor": 1.0}, "interventions[1]", "invalid_intervention", "factor does not belong"),
        ({"type": "set", "values": [1, 2, 3]}, "interventions[1]", "invalid_intervention", "does not fit"),
        ({"positions": [99]}, "interventions[1]", "invalid_intervention", "position 99 is out of reach"),
        ({"type": "set", "values": [None]}, "interventions[1]", "invalid_intervention", "attention scores only"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_errors_name_the_intervention(
    web: FlaskClient, bad: dict[str, Any], param: str, code: str, said: str, stream: bool
) -> None:
    base = {} if "hook_point" in bad and "type" not in bad and bad["hook_point"] == "hook_embed" else ZERO
    if bad.get("type"):
        base = {"hook_point": ZERO["hook_point"], "type": "zero"}
    error = ask(web, [ZERO, base | bad], 400, stream=stream)["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert said in error["message"]
    assert "intervening" not in error["message"]  # who reads this may know no Python


def test_what_never_fires_is_an_error(client: LMStudioNeuroScopeClient, web: FlaskClient) -> None:
    late = ZERO | {"positions": [8]}
    stop = ask(web, None)["choices"][0]["text"].split()[1]
    assert "in passes [1]" in ask(web, [ZERO | {"passes": 1}], 400)["error"]["message"]
    error = ask(web, [late], 400, stop=stop)["error"]
    assert error["param"] == "interventions[0]"
    assert "never fired" in error["message"]
    with pytest.raises(NeuroScopeAPIError, match="never fired"):
        list(client.complete_with_activations(
            PROMPT, HOOKS, max_tokens=4, temperature=0, stop=stop, interventions=[late], stream=True))  # fmt: skip


def test_only_with_activations_takes_interventions(web: FlaskClient) -> None:
    reply = web.post("/v1/completions", json={"prompt": PROMPT, "interventions": [ZERO]})
    assert reply.status_code == 400
    assert reply.get_json()["error"]["param"] == "interventions"


def test_nothing_of_one_request_reaches_the_next(web: FlaskClient, model: HookedModel) -> None:
    ask(web, [STEER])
    after = stack_records(ask(web, None)["activations"]["r"])
    plain = model.generate(PROMPT, max_tokens=4, capture=HOOKS).cache[("resid_post", 2)]
    assert mx.array_equal(mx.array(after), plain)
