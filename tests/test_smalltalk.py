"""The Smalltalk client, compiled and run by Amber: from the Tonel sources to the numbers of a live server."""

import dataclasses
import re
import socket
import time
from types import SimpleNamespace

import build_smalltalk
import numpy as np
import pytest
from smalltalk_image import (
    HARNESS,
    Image,
    SmalltalkError,
    client,
    compile_classes,
    literal,
    record,
    serve_records,
    tensors,
)
from smalltalk_sources.chunks import in_dependency_order, to_chunks
from smalltalk_sources.tonel import ClassDefinition, Method, TonelError, parse_class

from neuroscope_bridge.hook_specs import NeuroScopeActivationBridge
from neuroscope_bridge.smalltalk import generate_neuroscope_smalltalk_interface

bridge = NeuroScopeActivationBridge()


# -- sources -------------------------------------------------------------------------------------


def test_chunk_file_is_what_the_tonel_package_converts_to():
    assert build_smalltalk.CHUNK_FILE.read_text() == build_smalltalk.build(), "run python scripts/build_smalltalk.py"


def test_every_method_of_the_package_compiles_and_sends_only_known_selectors():
    compiled = compile_classes(build_smalltalk.CHUNK_FILE)
    assert compiled["problems"] == []
    for file in build_smalltalk.PACKAGE.glob("*.class.st"):
        source = parse_class(file.read_text())
        found = compiled["classes"][source.name]
        assert (found["superclass"], found["comment"]) == (source.superclass, source.comment)
        assert len(found["selectors"]) == len(source.methods) == file.read_text().count("{ #category : '") > 0


@pytest.mark.parametrize(
    ("body", "complaint"),
    [("^ self frobnicate", "Broken>>go sends frobnicate"), ("^ Frobnicator new", "Frobnicator")],
)
def test_the_compile_check_notices_unknown_selectors_and_names(tmp_path, body, complaint):
    file = tmp_path / "Broken.st"
    cls = ClassDefinition("Broken", "Object", "Test", "I am broken.", [])
    cls.methods.append(Method(False, "testing", f"go\n\n\t{body}"))
    file.write_text(to_chunks([cls]))
    assert complaint in str(compile_classes(file)["problems"])


def test_a_syntax_error_stops_the_file_in(tmp_path):
    file = tmp_path / "Broken.st"
    file.write_text("Object subclass: #Broken\n\tinstanceVariableNames: (''!\n")
    with pytest.raises(SmalltalkError, match="Parse error"):
        compile_classes(file)


ODD_CLASS = """\
"
I say ""hello"".
"
Class {
	#name : 'A',
	#superclass : 'B',
	#instVars : [
		'x',
		'y'
	],
	#category : 'C',
	#package : 'C'
}

{ #category : 'odd' }
A class >> < other [

	"an ] in a comment"
	^ { $]. ']''' }
]
"""


def test_tonel_parser_keeps_brackets_in_strings_comments_and_characters():
    parsed = parse_class(ODD_CLASS)
    method = Method(True, "odd", "< other\n\n\t\"an ] in a comment\"\n\t^ { $]. ']''' }")
    expected = ClassDefinition("A", "B", "C", 'I say "hello".', ["x", "y"], [method])
    assert dataclasses.asdict(parsed) == dataclasses.asdict(expected)
    with pytest.raises(TonelError, match="expected a method of A at 'stray'"):
        parse_class(ODD_CLASS + "stray\n")
    with pytest.raises(TonelError, match="not closed"):
        parse_class(ODD_CLASS.rstrip()[:-1])


def test_superclasses_come_before_their_subclasses():
    def cls(name, superclass):
        return ClassDefinition(name, superclass, "", "", [])

    ordered = in_dependency_order([cls("A", "Z"), cls("Z", "M"), cls("M", "Object")])
    assert [each.name for each in ordered] == ["M", "Z", "A"]
    with pytest.raises(TonelError, match="circle: A, Z"):
        in_dependency_order([cls("A", "Z"), cls("Z", "A")])


def test_exclamation_marks_survive_the_chunk_format(tmp_path):
    cls = ClassDefinition("Loud", "Object", "Test", "Hey! It's me.", [])
    cls.methods.append(Method(False, "testing", "shout\n\n\t^ 'Hey! You!!'"))
    file = tmp_path / "Loud.st"
    file.write_text(to_chunks([cls]))
    with Image(file) as image:
        assert image.evaluate("Loud new shout") == "Hey! You!!"
        assert image.evaluate("Loud comment") == "Hey! It's me."


# -- the generated interface ---------------------------------------------------------------------


def test_generated_interface_talks_to_the_clients_server(tmp_path):
    url = "http://127.0.0.1:9/it's!odd"
    text = generate_neuroscope_smalltalk_interface(SimpleNamespace(base_url=url))
    file = tmp_path / "LMStudioRESTClient.st"
    file.write_text(text, encoding="ascii")
    with Image(file) as image:
        assert image.evaluate("LMStudioRESTClient default baseUrl") == url
        assert image.evaluate("LMStudioRESTClient new baseUrl") == url
    assert "fileIn" in text.split("!\n")[0]


@pytest.mark.parametrize("url", ["http://host/\nx", "http://höst", "http://a b"])
def test_generated_interface_refuses_what_is_no_url(url):
    with pytest.raises(ValueError, match="Not a URL"):
        generate_neuroscope_smalltalk_interface(SimpleNamespace(base_url=url))


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


def test_a_client_that_loaded_nothing_describes_the_first_model_of_the_server(image, server):
    server.replies |= {"GET /v1/models": {"data": [{"id": "one"}, {"id": "two"}]}, "GET /v1/models/one": {"id": "one"}}
    assert image.evaluate(f"{client(server)} modelInfo") == {"id": "one"}
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


# -- circuits ------------------------------------------------------------------------------------


def causal_pattern(rng, heads, n, keys=None):
    weights = np.tril(rng.random((1, heads, n, n)) ** 3)
    weights[:, 0, 1:, :] = 0.05
    weights[:, 0, np.arange(1, n), np.arange(n - 1)] = 0.9
    weights[:, 1, :, 0] = 5
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def same_circuits(smalltalk, python):
    assert [each["name"] for each in smalltalk] == [each["name"] for each in python]
    for ours, theirs in zip(smalltalk, python, strict=True):
        assert ours["confidence"] == pytest.approx(theirs["confidence"], rel=1e-5, abs=1e-9)
        assert ours["components"] == theirs["components"]
        assert len(ours["pathway"]) == len(theirs["pathway"])
        assert "orrelational" in ours["description"]


AS_DICTIONARIES = (
    "circuits collect: [ :each | Dictionary new at: 'name' put: each name; at: 'confidence' put: each confidence;"
    " at: 'components' put: each components; at: 'pathway' put: each pathway;"
    " at: 'description' put: each description; yourself ]"
)


def find_circuits(image, server):
    return image.evaluate(f"circuits := CircuitFinder findCircuits: {tensors(server)}. {AS_DICTIONARIES}")


def test_circuits_are_those_of_the_python_bridge(image, server):
    rng = np.random.default_rng(3)
    pattern = causal_pattern(rng, 4, 9)
    activations = serve_records(
        server,
        record(pattern[:, :, :5, :5], "attention_pattern", 2),
        record(pattern[:, :, 5:], "attention_pattern", 2, positions=(5, 9)),
        record(pattern[:, :, 8:], "attention_pattern", 2, positions=(9, 10), phase="decode", step=1),
        record(causal_pattern(rng, 2, 2), "attention_pattern", 1),
        record(pattern[:, :, :, 4:], "attention_pattern", 3),
        *(
            record(rng.normal(size=(2, 9, 8)).astype(np.float32) * scale, component, layer)
            for layer in (0, 1, 2)
            for component, scale in [("residual", 2), ("attention", 1), ("mlp", 5)]
            if (layer, component) != (1, "residual")
        ),
        record(rng.normal(size=(1, 9, 8)) * 9, "attention", 2, is_input=True, hook_id="ignored"),
        record(rng.normal(size=(1, 1, 8)) * 9, "attention", 2, phase="decode", positions=(9, 10), hook_id="ignored"),
    )
    found = find_circuits(image, server)
    same_circuits(found, bridge.find_circuits(activations))
    names = [each["name"] for each in found]
    assert {"previous_token_head L2H0", "first_token_head L2H1", "mlp_write L0", "attention_write L1"} <= set(names)
    assert not [name for name in names if re.search("head L[13]", name)]


def test_a_previous_token_head_is_scored_by_hand(image, server):
    pattern = np.zeros((1, 1, 4, 4), np.float32)
    pattern[0, 0] = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.5, 0.25, 0], [0.125, 0, 0.75, 0.125]]
    serve_records(server, record(pattern, "attention_pattern", 5))
    (circuit,) = find_circuits(image, server)
    assert circuit["name"] == "previous_token_head L5H0"
    assert circuit["confidence"] == (0.5 + 0.75) / 2
    assert circuit["components"] == [{"layer": 5, "componentType": "attention_head", "index": 0}]
    assert circuit["pathway"] == [{"source": "position q-1", "target": "position q", "strength": 0.625}]


def test_writes_without_a_residual_are_relative_to_the_largest(image, server):
    serve_records(server, record(np.full((1, 2, 4), 1.0), "mlp", 0), record(np.full((1, 2, 4), 0.25), "attention", 1))
    found = {each["name"]: each["confidence"] for each in find_circuits(image, server)}
    assert found == {"mlp_write L0": 1.0, "attention_write L1": 0.25}


def test_nothing_captured_is_no_circuit(image):
    assert image.evaluate("(CircuitFinder findCircuits: Dictionary new) size") == 0


# -- a live server -------------------------------------------------------------------------------


def seed_snippet(layers):
    text = (HARNESS / "seed_snippet.st").read_text()
    return text.replace("/path/to/your/model", "neuroscope-tiny").replace(" 24.", f" {layers}.")


def test_the_seeds_snippet_runs_and_its_numbers_are_pythons(live_server, live_image):
    layers = live_image.evaluate("LMStudioRESTClient default loadModel: 'neuroscope-tiny'")["num_layers"]
    found = live_image.evaluate(
        seed_snippet(layers)
        + "tensors := Dictionary new. neuroScopeActivations keysAndValuesDo: [ :id :each | tensors at: id put: (each"
        " collect: [ :tensor | { tensor shape. tensor norm. tensor mean. tensor std. tensor positions } ]) ]."
        f"Dictionary new at: 'reply' put: result; at: 'tensors' put: tensors; at: 'circuits' put: ({AS_DICTIONARIES});"
        " yourself"
    )
    activations = found["reply"]["activations"]
    hooks = bridge.create_hook_specs_for_circuit_analysis(layers)
    assert set(activations) == {hook["hook_id"] for hook in hooks}
    for hook_id, converted in bridge.convert_activations_for_neuroscope(activations).items():
        assert len(found["tensors"][hook_id]) == len(converted) > 0
        for ours, theirs in zip(found["tensors"][hook_id], converted, strict=True):
            data = theirs["data"].astype(np.float64)
            assert (ours[0], ours[4]) == (list(data.shape), list(theirs["positions"]))
            np.testing.assert_allclose(ours[1:4], [np.linalg.norm(data), data.mean(), data.std()], rtol=1e-5, atol=1e-9)
    same_circuits(found["circuits"], bridge.find_circuits(activations))
    assert len(found["circuits"]) == 2 * layers


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
