"""LMStudioRESTClient under Amber: what it sends, what it makes of answers, and that it works with a live server."""

import socket
import time
from types import SimpleNamespace

import pytest
from smalltalk_image import SmalltalkError, client, literal

from neuroscope_bridge.hook_specs import NeuroScopeActivationBridge

bridge = NeuroScopeActivationBridge()


# -- hooks ---------------------------------------------------------------------------------------


def test_hooks_are_those_of_the_python_bridge(image):
    smalltalk = "LMStudioRESTClient default create"
    assert image.evaluate(f"{smalltalk}CircuitAnalysisHooks: 12") == bridge.create_hook_specs_for_circuit_analysis(12)
    assert image.evaluate(
        f"{smalltalk}AttentionAnalysisHooks: 12 targetLayers: #(10 0 5)"
    ) == bridge.create_attention_analysis_hooks(12, [10, 0, 5])
    assert image.evaluate(
        f"{smalltalk}AttentionAnalysisHooks: 3 targetLayers: nil"
    ) == bridge.create_attention_analysis_hooks(3)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("4 targetLayers: #(4)", "There is no layer 4. Layers: 0 to 3"),
        ("0 targetLayers: nil", "1 layer or more, got 0"),
    ],
)
def test_hooks_for_layers_that_do_not_exist_are_refused(image, arguments, complaint):
    with pytest.raises(SmalltalkError, match=complaint):
        image.evaluate(f"LMStudioRESTClient default createAttentionAnalysisHooks: {arguments}")


# -- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("send", "route", "body"),
    [
        ("health", "GET /health", None),
        ("listModels", "GET /v1/models", None),
        ("loadModel: 'tiny'", "POST /v1/models/load", {"model_path": "tiny"}),
        ("loadModel: 'tiny' id: 'a'", "POST /v1/models/load", {"model_path": "tiny", "model_id": "a"}),
        ("chat: 'Hi'", "POST /v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("complete: 'Hi'", "POST /v1/completions", {"prompt": "Hi"}),
        ("tokenize: 'Hi'", "POST /v1/tokenize", {"text": "Hi"}),
        ("detokenize: #(1 2)", "POST /v1/detokenize", {"tokens": [1, 2]}),
        ("logitLens: 'Hi'", "POST /v1/analysis/logit_lens", {"prompt": "Hi"}),
        ("clearHooks", "DELETE /v1/activations/hooks", None),
        (
            "registerHooks: (OrderedCollection new add: (Dictionary new at: #component put: #mlp; yourself); yourself)",
            "POST /v1/activations/hooks",
            {"hooks": [{"component": "mlp"}]},
        ),
        (
            "generateWithActivations: 'Hi' hooks: nil",
            "POST /v1/chat/completions/with_activations",
            {"messages": [{"role": "user", "content": "Hi"}], "activation_encoding": "base64"},
        ),
        (
            "generateWithActivations: #() hooks: #() maxTokens: 0 temperature: 0.5",
            "POST /v1/chat/completions/with_activations",
            {
                "messages": [],
                "activation_hooks": [],
                "activation_encoding": "base64",
                "max_tokens": 0,
                "temperature": 0.5,
            },
        ),
        (
            "generateWithActivations: #() hooks: #()"
            " options: (Dictionary new at: #stop put: #('.'); at: 'activation_encoding' put: 'json'; yourself)",
            "POST /v1/chat/completions/with_activations",
            {"messages": [], "activation_hooks": [], "activation_encoding": "json", "stop": ["."]},
        ),
    ],
)
def test_each_selector_sends_its_request(image, server, send, route, body):
    reply = {"data": [], "model_id": "a", "registered_hooks": [], "text": ""}
    server.replies[route] = reply
    image.evaluate(f"{client(server)} {send}")
    (request,) = server.requests
    assert (f"{request.method} {request.path}", request.json) == (route, body)
    assert request.headers["accept"] == "application/json"
    assert body is None or request.headers["content-type"].startswith("application/json")
    assert "authorization" not in request.headers


def test_a_client_asks_for_the_model_that_it_loaded(image, server):
    server.replies |= {
        "POST /v1/models/load": {"model_id": "org/tiny"},
        "GET /v1/models/org%2Ftiny": {"num_layers": 4},
        "GET /v1/models/org%2Ftiny/hook_points": {"hook_points": [{"name": "hook_embed"}]},
        "POST /v1/completions": {"choices": [{"text": "yes"}]},
    }
    script = (
        f"c := {client(server)}. c loadModel: 'tiny'; apiKey: 'secret'. r := c complete: 'Is it?'."
        "{ c modelInfo at: 'num_layers'. c hookPoints first at: 'name'. c textFrom: r }"
    )
    assert image.evaluate(script) == [4, "hook_embed", "yes"]
    completion = server.requests[1]
    assert completion.json == {"prompt": "Is it?", "model": "org/tiny"}
    assert completion.headers["authorization"] == "Bearer secret"


def test_a_client_that_loaded_nothing_describes_the_model_loaded_last(image, server):
    server.replies |= {"GET /v1/models": {"data": [{"id": "one"}, {"id": "two"}]}, "GET /v1/models/two": {"id": "two"}}
    assert image.evaluate(f"{client(server)} modelInfo") == {"id": "two"}
    server.replies["GET /v1/models"] = {"data": []}
    with pytest.raises(SmalltalkError, match="has no model loaded"):
        image.evaluate(f"{client(server)} modelInfo")


def test_text_of_a_chat_reply_and_non_ascii_text_survive(image, server):
    server.replies["POST /v1/chat/completions"] = {
        "choices": [{"message": {"role": "assistant", "content": "größer ✓"}}]
    }
    assert image.evaluate(f"c := {client(server)}. c textFrom: (c chat: 'größer als ✓?')") == "größer ✓"
    assert server.requests[0].json["messages"][0]["content"] == "größer als ✓?"


# -- errors --------------------------------------------------------------------------------------


def failure(image, server, timeout=30):
    """What a handler of LMStudioRESTError sees."""
    return image.evaluate(
        f"[ {client(server)} timeout: {timeout}; health ] on: LMStudioRESTError do: [ :error |"
        " { error class name. error status. error code. error messageText. error isConnectionError } ]"
    )


def test_errors_of_the_server_arrive_with_status_code_and_message(image, server):
    details = {"message": "No model is loaded.", "type": "invalid_request_error", "code": "no_model_loaded"}
    server.replies["GET /health"] = (409, {"error": details | {"param": None}})
    assert failure(image, server) == ["LMStudioRESTError", 409, "no_model_loaded", "No model is loaded.", False]


@pytest.mark.parametrize(
    ("status", "body"),
    [(502, "<html>Bad gateway</html>"), (500, ""), (200, "<html>Welcome</html>"), (404, '{"detail": "gone"}')],
)
def test_answers_that_are_not_the_servers_are_errors_that_show_them(image, server, status, body):
    server.replies["GET /health"] = (status, body)
    name, got, code, message, is_connection = failure(image, server)
    assert (name, got, code, is_connection) == ("LMStudioRESTError", status, None, False)
    assert str(status) in message
    assert (body or "nothing at all") in message


def test_connection_refused_is_told_apart_from_answers(image):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = SimpleNamespace(base_url=f"http://127.0.0.1:{unused.getsockname()[1]}")
        name, status, code, message, is_connection = failure(image, nobody)
    assert (name, status, code, is_connection) == ("LMStudioConnectionError", None, "no_connection", True)
    assert nobody.base_url in message
    assert "neuroscope serve" in message


def test_a_silent_server_is_a_connection_error_after_the_timeout(image, server):
    server.replies["GET /health"] = lambda handler: time.sleep(0.8)
    name, status, _, message, _ = failure(image, server, timeout=0.2)
    assert (name, status) == ("LMStudioConnectionError", None)
    assert "timed out" in message


def test_replies_may_be_larger_than_zincs_own_limit(image, server):
    server.replies["GET /health"] = {"filler": "x" * (17 * 2**20)}
    assert image.evaluate(f"({client(server)} health at: 'filler') size") == 17 * 2**20
    with pytest.raises(SmalltalkError, match="Entity too large"):
        image.evaluate(f"ZnClient new url: {literal(server.base_url)}; addPath: #('health'); get")


# -- a live server -------------------------------------------------------------------------------


def test_every_selector_works_against_the_live_server(live_image):
    found = live_image.evaluate(
        """c := LMStudioRESTClient default. c loadModel: 'neuroscope-tiny'.
        layers := c modelInfo at: 'num_layers'.
        hooks := c createAttentionAnalysisHooks: layers targetLayers: nil.
        zero := Dictionary new at: 'max_tokens' put: 0; yourself.
        tokens := c tokenize: 'The cat sat on the mat'.
        captured := c generateWithActivations: 'The cat sat on the mat' hooks: hooks options: zero.
        registered := c registerHooks: hooks.
        again := c generateWithActivations: 'The cat sat on the mat' hooks: nil options: zero.
        c clearHooks.
        pattern := (c convertActivationsForNeuroScope: (captured at: #activations)) at: 'layer_0_attention_pattern'.
        Dictionary new
            at: 'health' put: (c health at: 'status');
            at: 'models' put: c listModels;
            at: 'points' put: c hookPoints;
            at: 'tokens' put: tokens;
            at: 'text' put: (c detokenize: (tokens at: 'tokens'));
            at: 'registered' put: registered;
            at: 'same' put: (again at: 'activations') = (captured at: 'activations');
            at: 'row' put: (((pattern first slice: 1 axis: 1) slice: 1 axis: 1) slice: 3 axis: 1) sum;
            at: 'chat' put: (c textFrom: (c chat: 'Hello'));
            at: 'complete' put: (c textFrom: (c complete: 'The cat'));
            at: 'lens' put: ((c logitLens: 'The cat') at: 'layers') size;
            at: 'layers' put: layers;
            yourself"""
    )
    assert found["health"] == "healthy"
    assert found["models"][0]["id"] == "neuroscope-tiny"
    assert "hook_embed" in [point["name"] for point in found["points"]]
    assert len(found["tokens"]["tokens"]) == found["tokens"]["count"] > 0
    assert found["text"].split() == [each.strip() for each in found["tokens"]["token_strings"]]
    assert len(found["registered"]) == 4 * found["layers"]
    assert found["same"] is True
    assert found["row"] == pytest.approx(1, abs=1e-5)
    assert isinstance(found["chat"], str)
    assert isinstance(found["complete"], str)
    assert found["lens"] >= found["layers"]


def test_the_live_servers_refusal_arrives_as_an_error(live_image):
    hooks = (
        "(Array with: (Dictionary new at: 'layer_name' put: 'transformer.h.99'; at: 'component' put: 'mlp'; yourself))"
    )
    with pytest.raises(SmalltalkError) as caught:
        live_image.evaluate(f"LMStudioRESTClient default generateWithActivations: 'Hi' hooks: {hooks}")
    assert (caught.value.details["class"], caught.value.details["status"]) == ("LMStudioRESTError", 400)
    assert "99" in caught.value.details["message"]
