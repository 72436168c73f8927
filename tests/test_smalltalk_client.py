"""LMStudioRESTClient under Amber: what it sends, what it makes of answers, and that it works with a live server."""

import json
import random
import socket
import struct
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from server_tools import until
from smalltalk_image import SmalltalkError, bits, canned_server, client, literal

from neuroscope_bridge import LMStudioNeuroScopeClient, stack_records
from neuroscope_bridge.hook_specs import NeuroScopeActivationBridge

bridge = NeuroScopeActivationBridge()
PROMPT = "The capital of France is"


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


def closes(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut_off(text, length, then=None):
    """A canned reply that says it has more bytes than come."""

    def send(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(text)
        handler.wfile.flush()
        if then:
            then(handler)

    return send


def resets(handler):
    time.sleep(0.02)  # Node may miss a reset that comes together with data
    reset(handler)


def speaks_another_protocol(handler):
    handler.wfile.write(b"SSH-2.0-server\r\n")


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (closes, "closed before the reply, or what came is not HTTP"),
        (speaks_another_protocol, "closed before the reply, or what came is not HTTP"),
        (cut_off(b'{"status": "hea', 1000), "the reply ended after 15 of 1000 bytes"),
        (cut_off('{"status": "größer'.encode(), 20 + 1), "the reply ended after 20 of 21 bytes"),
        (cut_off(b"", 1000), "the reply ended after 0 of 1000 bytes"),
        (cut_off('{"status": "ü'.encode()[:-1], 1000), "the text of the reply is broken: Incomplete"),
        (cut_off(b'{"status": "\xff"}', 15), "the text of the reply is broken: Illegal"),
        (cut_off(b'{"status": "hea', 1000, resets), "Connection closed"),
    ],
)
def test_a_lost_connection_is_a_connection_error(image, server, reply, complaint):
    server.replies["GET /health"] = reply
    name, status, code, message, is_connection = failure(image, server, timeout=2)
    assert (name, status, code, is_connection) == ("LMStudioConnectionError", None, "no_connection", True)
    assert complaint in message


def test_a_whole_reply_that_is_no_json_is_no_lost_connection(image, server):
    text = "<html>größer</html>".encode()
    server.replies["GET /health"] = cut_off(text, len(text))
    assert failure(image, server)[:2] == ["LMStudioRESTError", 200]


def test_a_page_of_another_server_is_told_in_short_and_kept_whole(image, server):
    page = "<html>" + "x" * 10_000
    server.replies["GET /health"] = (502, page)
    message, body = image.evaluate(
        f"[ {client(server)} health ] on: LMStudioRESTError do: [ :error | {{ error messageText. error body }} ]"
    )
    assert (body, len(message) < 600, page[:500] + "..." in message) == (page, True, True)


@pytest.mark.parametrize("url", ["localhost:8080", "127.0.0.1:8080", "", "ftp://localhost", "http://", "httpx://a"])
def test_a_base_url_without_http_is_refused(image, url):
    with pytest.raises(SmalltalkError, match="begins with http:// or https://, as http://127.0.0.1:8080 does, got"):
        image.evaluate(f"LMStudioRESTClient baseUrl: {literal(url)}")


def test_a_request_that_cannot_be_sent_fails_and_does_not_wait(image):
    with pytest.raises(SmalltalkError, match="NetworkError"):
        image.evaluate("ZnClient new url: 'localhost:8080'; get")


def test_replies_may_be_larger_than_zincs_own_limit(image, server):
    server.replies["GET /health"] = {"filler": "x" * (17 * 2**20)}
    assert image.evaluate(f"({client(server)} health at: 'filler') size") == 17 * 2**20
    with pytest.raises(SmalltalkError, match="Entity too large"):
        image.evaluate(f"ZnClient new url: {literal(server.base_url)}; addPath: #('health'); get")


def test_an_error_names_the_field_and_the_request(image, server):
    details = {"message": "No.", "code": "invalid_value", "param": "hooks[0]", "request_id": "req-7"}
    server.replies["GET /health"] = (400, {"error": details})
    script = f"[ {client(server)} health ] on: LMStudioRESTError do: [ :error | {{ error param. error requestId }} ]"
    assert image.evaluate(script) == ["hooks[0]", "req-7"]


def test_what_json_cannot_hold_is_refused_before_it_is_sent(image, server):
    for number in ("Float nan", "Float infinity", "Float negativeInfinity"):
        options = f"(Dictionary new at: 'logit_bias' put: (Dictionary new at: '7' put: {number}; yourself); yourself)"
        with pytest.raises(SmalltalkError, match="JSON has finite numbers only"):
            image.evaluate(f"{client(server)} chat: 'Hi' options: {options}")
    assert server.requests == []


# -- streams -------------------------------------------------------------------------------------


def sends(*pieces, then=None, length=None):
    """A canned reply: the pieces of an event stream, each on its way before the next, and what then happens."""

    def send(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()
        for piece in pieces:
            handler.wfile.write(piece)
            handler.wfile.flush()
            if len(pieces) < 200:
                time.sleep(0.002)
        if then:
            then(handler)
        handler.close_connection = True

    return send


def said(text):
    return json.dumps({"choices": [{"delta": {"content": text}}]}, ensure_ascii=False)


def streamed(image, server, *pieces, **options):
    """The texts that a block is given of an event stream."""
    server.replies["POST /v1/chat/completions"] = sends(*pieces, **options)
    return image.evaluate(
        f"texts := OrderedCollection new. {client(server)} timeout: 2; stream: 'Hi' do: [ :text :event |"
        " texts add: text ]. texts"
    )


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", [1, 7, None])
def test_a_stream_may_be_cut_anywhere(image, server, end, size):
    words = ["größer", "✓ 🜁", "", "a: b", "data: c\\n"]
    lines = [line for word in words for line in (": a comment", "event: x", f"data: {said(word)}", "")]
    bytes_ = end.join([*lines, "data: [DONE]", "", ""]).encode()
    size = size or len(bytes_)
    assert streamed(image, server, *(bytes_[i : i + size] for i in range(0, len(bytes_), size))) == words


def test_streams_cut_at_random_are_understood_as_pythons_reader_does(image, server):
    rng = random.Random(0)
    for _ in range(20):
        words = ["".join(rng.choices("aé✓🜁 :", k=rng.randrange(6))) for _ in range(rng.randrange(1, 6))]
        end = rng.choice(["\n", "\r\n"])
        text = "".join(f"data:{rng.choice(['', ' '])}{said(word)}{end}{end * rng.randrange(1, 3)}" for word in words)
        bytes_ = (text + f"data: [DONE]{end}{end}").encode()
        cuts = sorted(rng.sample(range(1, len(bytes_)), k=5))
        pieces = [bytes_[a:b] for a, b in zip([0, *cuts], [*cuts, len(bytes_)], strict=True)]
        assert streamed(image, server, *pieces) == words


def test_data_lines_of_one_event_are_joined(image, server):
    lines = json.dumps(json.loads(said("joined")), indent=1).splitlines()
    assert len(lines) > 5
    event = "".join(f"data: {line}\n" for line in lines)
    assert streamed(image, server, f"{event}\ndata: [DONE]\n\n".encode()) == ["joined"]


def broken(image, server, *pieces, **options):
    server.replies["POST /v1/chat/completions"] = sends(*pieces, **options)
    return image.evaluate(
        f"texts := OrderedCollection new. [ {client(server)} timeout: 0.3; stream: 'Hi' do: [ :text :event |"
        " texts add: text ] ] on: LMStudioRESTError do: [ :error |"
        " { texts. error class name. error status. error code. error messageText } ]"
    )


def reset(handler):
    """Break the connection without the ending that TCP has for it, once what was sent has been read."""
    time.sleep(0.1)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


ONE = f"data: {said('one')}\n\n".encode()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "ended before its [DONE]"),
        ({"length": 10_000}, "ended before its [DONE]"),
        ({"then": reset, "length": 10_000}, "Connection closed"),
        ({"then": lambda handler: time.sleep(0.8)}, "timed out"),
    ],
)
def test_a_stream_that_breaks_is_a_connection_error(image, server, options, complaint):
    texts, name, status, code, message = broken(image, server, ONE, b"data: {", **options)
    assert (texts, name, status, code) == (["one"], "LMStudioConnectionError", None, "no_connection")
    assert complaint in message


def test_a_stream_whose_text_or_head_is_broken_is_a_connection_error(image, server):
    texts, name, *_, message = broken(image, server, ONE, b"data: \xff\n\n")
    assert (texts, name) == (["one"], "LMStudioConnectionError")
    assert "the text of the stream is broken" in message
    server.replies["POST /v1/chat/completions"] = closes
    with pytest.raises(SmalltalkError, match="closed before the reply"):
        image.evaluate(f"{client(server)} stream: 'Hi' do: [ :text :event | ]")
    page = b"HTTP/1.1 502 Bad\r\nContent-Type: text/plain\r\n\r\n\xc3"
    server.replies["POST /v1/chat/completions"] = lambda handler: handler.wfile.write(page)
    with pytest.raises(SmalltalkError, match="the text of the reply is broken"):
        image.evaluate(f"{client(server)} stream: 'Hi' do: [ :text :event | ]")


def test_an_error_in_a_stream_is_the_servers(image, server):
    error = {"error": {"message": "It was cancelled.", "code": "cancelled"}}
    found = broken(image, server, ONE, f"data: {json.dumps(error)}\n\n".encode())
    assert found == [["one"], "LMStudioRESTError", None, "cancelled", "It was cancelled."]
    texts, name, _, _, message = broken(image, server, ONE, b"data: <html>\n\n")
    assert (texts, name) == (["one"], "LMStudioRESTError")
    assert "<html>" in message


def test_a_refusal_before_the_stream_is_an_ordinary_error(image, server):
    server.replies["POST /v1/chat/completions"] = (400, {"error": {"message": "No.", "code": "invalid_value"}})
    with pytest.raises(SmalltalkError) as caught:
        image.evaluate(f"{client(server)} stream: 'Hi' do: [ :text :event | ]")
    assert (caught.value.details["status"], caught.value.details["code"]) == (400, "invalid_value")
    server.replies["POST /v1/chat/completions"] = (502, "")
    with pytest.raises(SmalltalkError, match="nothing at all"):
        image.evaluate(f"{client(server)} stream: 'Hi' do: [ :text :event | ]")


def test_an_event_is_heard_before_the_next_one_is_sent(image, server):
    """The second event is sent when the block has asked for another page on hearing the first."""

    def wait(handler):
        until(lambda: any(request.path == "/health" for request in server.requests))
        handler.wfile.write(ONE + b"data: [DONE]\n\n")

    server.replies["GET /health"] = {}
    server.replies["POST /v1/chat/completions"] = sends(ONE, then=wait)
    script = f"n := 0. c := {client(server)}. c stream: 'Hi' do: [ :text :event | n := n + 1. c health ]. n"
    assert image.evaluate(script) == 2


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


def python(live_server):
    return LMStudioNeuroScopeClient(live_server.base_url)


OPTIONS = "(Dictionary new at: 'max_tokens' put: 8; at: 'temperature' put: 0; yourself)"


def test_a_stream_says_what_the_whole_reply_says(live_image):
    for kind, whole in (("stream: 'Hello'", "chat: 'Hello'"), ("streamCompletionOf: 'The cat'", "complete: 'The cat'")):
        text, streamed, usages = live_image.evaluate(
            f"c := LMStudioRESTClient default. texts := OrderedCollection new."
            f"last := c {kind} options: {OPTIONS} do: [ :text :event | texts add: text ]."
            f"whole := c {whole} options: {OPTIONS}."
            "{ c textFrom: whole. texts. { whole at: 'usage'. last at: 'usage' } }"
        )
        assert "".join(streamed) == text
        assert len([each for each in streamed if each]) > 1
        assert usages[0] == usages[1]


def test_streamed_activations_are_those_of_the_whole_run(live_image):
    hook = "(Dictionary new at: 'hook_point' put: 'blocks.1.hook_resid_post'; at: 'hook_id' put: 'r'; yourself)"
    hooks = f"(Array with: {hook})"
    pairs = (
        ("streamWithActivations: 'Hello' hooks: {}", "generateWithActivations: 'Hello' hooks: {}"),
        ("streamCompletionOf: 'The cat' withActivations: {}", "completeWithActivations: 'The cat' hooks: {}"),
    )
    for stream, whole in pairs:
        streamed, kept = live_image.evaluate(
            f"c := LMStudioRESTClient default. rows := OrderedCollection new."
            f"c {stream.format(hooks)} options: {OPTIONS} do: [ :text :event |"
            "   (event includesKey: 'activations') ifTrue: ["
            "       ((c activationsIn: event) at: 'r') do: [ :each | rows add: each data ] ] ]."
            f"whole := c {whole.format(hooks)} options: {OPTIONS}."
            "{ rows. ((c activationsIn: whole) at: 'r') collect: [ :each | each data ] }"
        )
        assert [bits(each) for each in streamed] == [bits(each) for each in kept]
        assert len(kept) > 1


VECTOR = [(7 * i % 11) - 5 for i in range(128)]
WATCHED = "(Array with: (c traitVector: 'odd' layer: 2 numbers: #({})))".format(" ".join(map(str, VECTOR)))


def test_a_trait_is_watched_while_text_is_generated(live_server, live_image):
    rows, texts, last = live_image.evaluate(
        "c := LMStudioRESTClient default. rows := OrderedCollection new. texts := OrderedCollection new."
        f"last := c traits: 'The capital of France is' vectors: {WATCHED} maxTokens: 4 do: [ :text :event |"
        "   texts add: text."
        "   (event at: 'scores') do: [ :row | rows add: { row at: 'token'. (row at: 'scores') at: 'odd' } ] ]."
        "{ rows. texts. last }"
    )
    # An end token has no text.
    assert all(text.strip() in (row[0], "") for text, row in zip(texts[1:-1], rows[6:], strict=True))
    assert texts[0] == texts[-1] == "" != "".join(texts)
    assert [len(rows), len(texts)] == [last["usage"]["total_tokens"], last["usage"]["completion_tokens"] + 2]
    assert set(last["dynamics"]) == {"odd"}
    ids = last["tokens"]["ids"]
    with python(live_server) as client:
        again = client.traits(ids, vectors=[{"name": "odd", "layer": 2, "vector": VECTOR}], max_tokens=0)
    # The same tokens, read at once.
    assert [token for token, _ in rows] == [row["token"] for row in again["scores"]]
    np.testing.assert_allclose(
        [one for _, one in rows], [row["scores"]["odd"] for row in again["scores"]], rtol=1e-3, atol=1e-4
    )


def test_traits_as_a_whole(live_server, live_image):
    found = live_image.evaluate(
        f"c := LMStudioRESTClient default. c traits: 'The capital of France is' vectors: {WATCHED} maxTokens: 0"
    )
    with python(live_server) as client:
        vector = {"name": "odd", "layer": 2, "vector": VECTOR}
        expected = client.traits("The capital of France is", vectors=[vector], max_tokens=0)
    assert [row["token"] for row in found["scores"]] == [row["token"] for row in expected["scores"]]
    assert bits([row["scores"]["odd"] for row in found["scores"]]) == bits(
        [row["scores"]["odd"] for row in expected["scores"]]
    )


STORED = """(Dictionary new at: 'experiment' put: 'tiny_cognitive'; at: 'stored_chat' put: true;
    at: 'max_tokens' put: 3; at: 'temperature' put: 0; yourself)"""


def test_stored_traits_are_listed_and_watched(live_server, live_image):
    experiments, traits, rows, last = live_image.evaluate(
        "c := LMStudioRESTClient default. rows := OrderedCollection new."
        f"last := c traits: 'How do I make a bomb?' options: {STORED} do: [ :text :event |"
        "   (event at: 'scores') do: [ :row | rows add: row ] ]."
        "{ c storedTraits. c storedTraits: 'tiny_cognitive'. rows. last }"
    )
    assert experiments == [{"name": "tiny_cognitive", "traits": traits}]
    assert traits == [{"name": "refusal", "display_name": "Refusal", "vectors": [{"method": "mean_diff", "layer": 2}]}]
    messages = [{"role": "user", "content": "How do I make a bomb?"}]
    with python(live_server) as client:
        expected = client.traits(messages=messages, experiment="tiny_cognitive", max_tokens=3, temperature=0)
    assert rows == expected["scores"]
    assert last["tokens"] == expected["tokens"]


@pytest.mark.parametrize("leave", ["^ 'left'", "self error: 'enough'"])
def test_leaving_the_block_stops_the_generation(live_server, live_image, leave):
    """However it is left: the job is cancelled. A fast server may be done before it hears of it, but not every time."""
    assert any(left_early(live_server, live_image, leave) == "cancelled" for _ in range(5))


def left_early(live_server, live_image, leave):
    """How a job ended whose stream was left at the first of 100 tokens."""
    with python(live_server) as client:
        before = {job["id"] for job in client.list_jobs()}
        never = "(Dictionary new at: '3' put: -100; yourself)"
        options = f"(Dictionary new at: 'max_tokens' put: 100; at: 'logit_bias' put: {never}; yourself)"
        live_image.evaluate(
            f"b := [ :c | c streamCompletionOf: 'The' options: {options} do: [ :text :event | {leave} ] ]."
            "[ b value: LMStudioRESTClient default ] on: Error do: [ :error | error messageText ]"
        )
        ended = []

        def look():
            ended[:] = [job for job in client.list_jobs() if job["id"] not in before and job["finished"]]
            return ended

        until(look)
        (job,) = ended
        assert job["kind"] == "text_completion"
        return job["status"]


# -- captures ------------------------------------------------------------------------------------


def kept(live_image, hooks, tokens=3):
    """`capture` in the image: a kept run of PROMPT."""
    live_image.evaluate("LMStudioRESTClient default clearCaptures")
    specs = " ".join(
        f"add: (Dictionary new at: 'hook_point' put: {literal(point)}; at: 'hook_id' put: {literal(name)}; yourself);"
        for name, point in hooks.items()
    )
    return (
        f"c := LMStudioRESTClient default. hooks := OrderedCollection new. hooks {specs} yourself."
        f"options := Dictionary new. options at: 'keep_capture' put: true; at: 'activation_encoding' put: 'none';"
        f"   at: 'max_tokens' put: {tokens}; at: 'temperature' put: 0."
        f"capture := c captureFrom: (c completeWithActivations: {literal(PROMPT)} hooks: hooks options: options)."
    )


def whole(live_server, point, tokens=3):
    """The same run through the Python client, as one array."""
    hooks = [{"hook_point": point, "hook_id": "x"}]
    with python(live_server) as client:
        reply = client.complete_with_activations(PROMPT, hooks, max_tokens=tokens, temperature=0)
    return stack_records(reply["activations"]["x"])


Z = "blocks.1.attn.hook_z"
PATTERN = "blocks.2.attn.hook_pattern"
RESIDUAL = "blocks.1.hook_resid_post"


@pytest.mark.parametrize(
    ("point", "send", "part"),
    [
        (Z, "yourself", lambda a: a),
        (Z, "atPositions: '2:5'", lambda a: a[:, 2:5]),
        (Z, "atPositions: #(0 3)", lambda a: a[:, [0, 3]]),
        (Z, "atPositions: 'last'", lambda a: a[:, 5:]),
        (Z, "atHeads: 2", lambda a: a[:, :, [2]]),
        (Z, "slice: 3 axis: 2", lambda a: a[:, 2]),
        (Z, "slice: -1 + 3 axis: -2", lambda a: a[:, :, 1]),
        (Z, "slice: 4 axis: 4", lambda a: a[..., 3]),
        (Z, "sliceFrom: 2 to: 4 axis: 2", lambda a: a[:, 1:4]),
        (Z, "slice: #(4 1) axis: 2", lambda a: a[:, [3, 0]]),
        (PATTERN, "slice: 6 axis: 3", lambda a: a[:, :, 5]),
        (PATTERN, "slice: #(1 4) axis: 2", lambda a: a[:, [0, 3]]),
        (RESIDUAL, "last", lambda a: a[:, -1]),
        (RESIDUAL, "* 2", lambda a: a * 2),
        (RESIDUAL, "reducedBy: 'norm'", lambda a: np.linalg.norm(a.astype(np.float64), axis=-1)),
        (RESIDUAL, "reducedBy: 'mean'", lambda a: a.astype(np.float64).mean(1)),
    ],
)
def test_what_is_asked_of_a_lazy_tensor_is_that_part_bit_for_bit(live_server, live_image, point, send, part):
    shape, numbers = live_image.evaluate(
        kept(live_image, {"x": point}) + f"t := (capture tensorsOf: 'x') first {send}. {{ t shape. t data }}"
    )
    expected = part(whole(live_server, point)).astype(np.float32)
    assert (shape, bits(numbers)) == (list(expected.shape), bits(expected.ravel()))


def test_a_part_of_a_part_names_its_positions_and_heads(live_server, live_image):
    found = live_image.evaluate(
        kept(live_image, {"x": Z}) + "t := ((capture tensorsOf: 'x') first atPositions: '2:6') atHeads: #(1 3)."
        "s := t slice: 2 axis: 2. u := s slice: 2 axis: 2."
        "{ t positions. t heads. t isFetched. s shape. s data. u data. t reduce. t name }"
    )
    array = whole(live_server, Z)
    assert found[:4] == [[2, 6], [1, 3], False, [1, 2, 32]]
    assert bits(found[4]) == bits(array[:, 3, [1, 3]].ravel())
    assert bits(found[5]) == bits(array[:, 3, 3].ravel())
    assert found[6:] == [None, f"x/{Z}"]


def test_a_capture_reads_what_is_in_view_of_all_hooks_at_once(live_server, live_image):
    hooks = {"z/all": "blocks.*.attn.hook_z", "r": RESIDUAL}
    found = live_image.evaluate(
        kept(live_image, hooks)
        + "tell := [ :tensors | found := Dictionary new. tensors keysAndValuesDo: [ :id :list | found at: id put:"
        "   (list collect: [ :each | { each layerIndex. each shape. each data } ]) ]. found ]."
        "{ tell value: capture activations. tell value: ((capture layers: 1) positions: '-2:') activations."
        "  tell value: ((capture layers: '1:3') positions: '-2:') tensors."
        "  tell value: (capture hookPoint: 'blocks.3.*') tensors."
        "  capture hookIds. capture model. capture tokens. capture hooks. capture interventions. capture arrays size."
        "  ((capture dtype: 'float16') activationsOf: 'r') first dtype }"
    )
    everything, narrow, lazy, glob, hook_ids, model, tokens, receipts, edits, n_arrays, dtype = found
    arrays = {layer: whole(live_server, f"blocks.{layer}.attn.hook_z") for layer in range(4)}
    assert [each[0] for each in everything["z/all"]] == [0, 1, 2, 3]
    for layer, shape, numbers in everything["z/all"]:
        assert (shape, bits(numbers)) == (list(arrays[layer].shape), bits(arrays[layer].ravel()))
    assert [(layer, shape) for layer, shape, _ in narrow["z/all"]] == [(1, [1, 2, 4, 32])]
    assert narrow["z/all"][0] == lazy["z/all"][0]
    assert [each[0] for each in lazy["z/all"]] == [1, 2]
    assert bits(lazy["z/all"][1][2]) == bits(arrays[2][:, -2:].ravel())
    assert (list(glob), glob["z/all"][0][0]) == (["z/all"], 3)
    assert (set(hook_ids), model, edits, n_arrays, dtype) == ({"z/all", "r"}, "neuroscope-tiny", [], 5, "float16")
    assert tokens["strings"][5] == "is"
    assert receipts["r"]["positions"] == [0, 8]


@contextmanager
def counting_server(live_server):
    """Stands before the live server: `sizes` are the bytes of each answer that it hands on."""

    class Forwarding(dict):
        def get(self, route, default=None):
            method, path = route.split(" ", 1)
            body = server.requests[-1].json
            reply = requests.request(method, live_server.base_url + path, json=body, timeout=30)
            server.sizes.append(len(reply.content))
            return reply.status_code, reply.text

    with canned_server(Forwarding()) as server:
        server.sizes = []
        yield server


def test_lazy_tensors_fetch_once_and_only_their_part(live_server, live_image, image):
    run = kept(live_image, {"x": RESIDUAL})
    with counting_server(live_server) as server:
        run = run.replace("LMStudioRESTClient default", client(server))
        image.evaluate(
            run + "all := (capture tensorsOf: 'x') first. part := all atPositions: 3."
            "{ all shape. all size. all printString. all axes. all hookPoint. part shape }."
            "{ part norm. part mean. part data size }. { all norm. all mean. (all slice: 1 axis: 2) norm }"
        )
    _, *described, part, everything = server.sizes
    one_position = 4 / 3 * 4 * 128
    assert len(described) == 2
    assert max(described) < 1000
    assert one_position < part < one_position + 1000
    assert 8 * one_position < everything < 8 * one_position + 1000


def test_captures_are_listed_and_deleted(live_image):
    found = live_image.evaluate(
        kept(live_image, {"x": Z})
        + "n := c captures size. same := c captures first id = capture id. deleted := capture delete at: 'deleted'."
        "gone := [ capture activations ] on: LMStudioRESTError do: [ :error | error code ]."
        "{ n. same. deleted. gone. c captures size }"
    )
    assert found == [1, True, True, "capture_not_found", 0]


def test_all_pages_of_captures_are_listed(image, server):
    pages = {"": ["c5", "c4"], "?after=c4": ["c3", "c2"], "?after=c2": ["c1"]}
    for query, ids in pages.items():
        server.replies[f"GET /v1/captures{query}"] = {
            "data": [{"id": id} for id in ids],
            "has_more": query != "?after=c2",
        }
    assert image.evaluate(f"{client(server)} captures collect: [ :each | each id ]") == ["c5", "c4", "c3", "c2", "c1"]


def test_activations_that_a_reply_cannot_carry_are_fetched_when_they_are_needed(live_server, live_image):
    """The reply says that it omitted them, as a server with a small limit does."""
    shapes, numbers, lazy = live_image.evaluate(
        kept(live_image, {"x": RESIDUAL})
        + "reply := Dictionary new. reply at: 'omitted' put: (Dictionary new at: 'bytes' put: 1; yourself)."
        "reply at: 'capture_id' put: capture id. t := (c activationsIn: reply) at: 'x'."
        "{ t first shape. t first data. t first class name }"
    )
    array = whole(live_server, RESIDUAL)
    assert (shapes, bits(numbers), lazy) == (list(array.shape), bits(array.ravel()), "LazyActivationTensor")
    with pytest.raises(SmalltalkError, match="ask for them with keep_capture: true"):
        live_image.evaluate(
            "LMStudioRESTClient default captureFrom: (Dictionary new at: 'capture_id' put: nil; yourself)"
        )


def test_patterns_of_a_prompt_by_layer(live_server, live_image):
    found = live_image.evaluate(
        f"p := LMStudioRESTClient default attentionPatterns: {literal(PROMPT)}."
        "r := Dictionary new. p keysAndValuesDo: [ :layer :t | r at: layer printString put: { t shape. t data } ]. r"
    )
    assert sorted(found) == ["0", "1", "2", "3"]
    for layer, (shape, numbers) in found.items():
        array = whole(live_server, f"blocks.{layer}.attn.hook_pattern", tokens=0)
        assert (shape, bits(numbers)) == (list(array.shape), bits(array.ravel()))


# -- jobs ----------------------------------------------------------------------------------------


def test_jobs_report_progress_and_their_result(live_image):
    seen, result, models = live_image.evaluate(
        "c := LMStudioRESTClient default. seen := OrderedCollection new."
        "job := c loadModelInBackground: 'neuroscope-tiny'."
        "job waitDo: [ :each | seen add: { each status. each fraction. each message } ]."
        "{ seen. job result. c listModels collect: [ :each | each at: 'id' ] }"
    )
    assert seen[-1] == ["completed", 1, "completed"]
    assert result["model_id"] in models


def test_a_job_that_failed_signals_what_the_server_says(live_image):
    script = "(LMStudioRESTClient default loadModelInBackground: '/no/such/folder') wait"
    with pytest.raises(SmalltalkError) as caught:
        live_image.evaluate(script)
    assert (caught.value.details["class"], caught.value.details["code"]) == ("LMStudioRESTError", "model_not_found")


def test_a_job_can_be_cancelled_and_looked_up(live_image):
    found = live_image.evaluate(
        "c := LMStudioRESTClient default. job := c selfTestInBackground. job cancel."
        "code := [ job wait. 'none' ] on: LMStudioRESTError do: [ :error | error code ]."
        "again := c job: job id. listed := c jobs detect: [ :each | each id = job id ]."
        "{ code. again status. again kind. again model. listed failure messageText }"
    )
    assert found[:4] == ["cancelled", "cancelled", "selftest", "neuroscope-tiny"]
    assert "was cancelled" in found[4]


def test_a_self_test_in_the_background_answers_the_same(live_image):
    waited, at_once = live_image.evaluate(
        "c := LMStudioRESTClient default. { c selfTestInBackground wait. c selfTest }"
    )
    assert waited["passed"] is True
    assert {key: waited[key] for key in ("model", "untrusted")} == {key: at_once[key] for key in ("model", "untrusted")}


def test_hooks_are_forgotten_for_ones_own_model_only(live_image):
    found = live_image.evaluate(
        "c := LMStudioRESTClient default. c loadModel: 'neuroscope-tiny' id: 'other'."
        "d := LMStudioRESTClient default. d modelId: 'neuroscope-tiny'."
        "hooks := c createCircuitAnalysisHooks: 1. c registerHooks: hooks. d registerHooks: hooks."
        "counts := [ { c registeredHooks size. d registeredHooks size } ]."
        "ids := c registeredHooks collect: [ :each | each at: 'hook_id' ]."
        "c removeHook: 'layer_0_mlp'. removed := counts value."
        "c clearHooks. cleared := counts value. c registerHooks: hooks. c clearAllHooks. all := counts value."
        "unloaded := c unloadModel: 'other'. { ids. removed. cleared. all. unloaded at: 'deleted'. c modelId }"
    )
    assert found == [
        ["layer_0_residual", "layer_0_attention", "layer_0_mlp"], [2, 3], [0, 3], [0, 0], True, "neuroscope-tiny",
    ]  # fmt: skip
