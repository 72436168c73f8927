"""The client against canned answers on a loopback port: what it sends, what it makes of what comes back."""

import json
import re
import socket
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import orjson
import pytest

from neuroscope_bridge.client import LMStudioNeuroScopeClient
from neuroscope_bridge.errors import (
    NeuroScopeAPIError,
    NeuroScopeError,
    ResponseFormatError,
    ServerTimeoutError,
    ServerUnreachableError,
)
from neuroscope_bridge.events import EventStream, parse_event_stream
from neuroscope_bridge.payload import dumps, encode_activation, stack_records

MESSAGES = [{"role": "user", "content": "Grüezi 🌍"}]
HOOKS = [{"layer_name": "transformer.h.5", "component": "residual", "hook_id": "r5"}]
CHAT = "/v1/chat/completions"
CHAT_WITH = "/v1/chat/completions/with_activations"
COMPLETE = "/v1/completions"
COMPLETE_WITH = "/v1/completions/with_activations"


class CannedServer:
    """Answers each route with what `answers[route]` says and keeps what was asked.

    An answer is a status and a JSON-able body or bytes, or a function of the handler that writes its own.
    """

    def __init__(self):
        self.answers = {}
        self.requests = []
        self.closed_by_client = threading.Event()
        canned = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 0

            def answer(self):
                raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                route, _, query = self.path.partition("?")
                canned.requests.append(
                    SimpleNamespace(
                        line=f"{self.command} {route}",
                        query=query,
                        headers=self.headers,
                        body=json.loads(raw) if raw else None,
                        peer=self.client_address,
                    )
                )
                answer = canned.answers[f"{self.command} {route}"]
                if callable(answer):
                    answer(self)
                    return
                status, body = answer
                content = body if isinstance(body, bytes) else dumps(body)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    @property
    def last(self):
        return self.requests[-1]


@pytest.fixture
def server():
    canned = CannedServer()
    yield canned
    canned.stop()


@pytest.fixture
def client(server):
    with LMStudioNeuroScopeClient(server.url, timeout=5) as connected:
        yield connected


def record(array, start=0, phase="prefill", encoding="base64", **changes):
    fields = {
        "hook_id": "r5",
        "layer_name": "transformer.h.5",
        "component": "residual",
        "hook_point": "blocks.5.hook_resid_post",
        "layer_index": 5,
        "axes": ("batch", "pos", "d_model"),
        "step": 0,
        "is_input": False,
    }
    positions = (start, start + array.shape[1])
    return encode_activation(array, phase=phase, positions=positions, encoding=encoding, **fields | changes)


def reply(**more):
    message = {"role": "assistant", "content": "Hoi"}
    return {"id": "x", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], **more}


def sse(*pieces, finish="chunked", pause=0.0):
    """An answer that streams `pieces` of bytes, one write (and one HTTP chunk) each."""

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        if finish == "chunked":
            handler.send_header("Transfer-Encoding", "chunked")
        else:
            handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        with suppress(ConnectionError):  # the client may have left
            for piece in pieces:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if finish == "chunked" else piece)
                time.sleep(pause)
            if finish == "chunked":
                handler.wfile.write(b"0\r\n\r\n")

    return answer


def event(**body):
    return b"data: " + dumps(body) + b"\n\n"


DONE = b"data: [DONE]\n\n"


@contextmanager
def raises_api_error(status, **attributes):
    with pytest.raises(NeuroScopeAPIError) as caught:
        yield caught
    assert caught.value.status == status
    for name, value in attributes.items():
        assert getattr(caught.value, name) == value


# -- what is sent ---------------------------------------------------------------------------------


def test_every_method_asks_its_route(server, client):
    empty = (200, {})
    info = (200, {"num_layers": 4})
    server.answers = {
        "GET /health": (200, {"status": "healthy"}),
        "GET /v1/models": (200, {"object": "list", "data": [{"id": "first"}, {"id": "org/tiny"}], "models": []}),
        "POST /v1/models/load": (200, {"model_id": "tiny", "status": "loaded", "num_layers": 4}),
        "GET /v1/models/org%2Ftiny": info,
        "GET /v1/models/first": info,
        "DELETE /v1/models/first": empty,
        "GET /v1/models/first/hook_points": (200, {"model": "first", "hook_points": [{"name": "hook_embed"}]}),
        "POST /v1/models/first/selftest": (200, {"passed": True}),
        "POST /v1/tokenize": (200, {"tokens": [1], "token_strings": ["a"], "count": 1}),
        "POST /v1/detokenize": (200, {"text": "a b"}),
        "POST /v1/activations/hooks": (200, {"status": "hooks_registered", "registered_hooks": ["r5"]}),
        "GET /v1/activations/hooks": (200, {"hooks": HOOKS}),
        "DELETE /v1/activations/hooks": (200, {"status": "hooks_cleared"}),
        "DELETE /v1/activations/hooks/a%2Fb%20c": (200, {"status": "hook_deleted"}),
        "POST /v1/analysis/logit_lens": (200, {"layers": []}),
        "POST /v1/analysis/direct_logit_attribution": (200, {"contributions": []}),
        "GET /v1/jobs": (200, {"object": "list", "data": [{"id": "job-1"}]}),
        "GET /v1/jobs/job-1": (200, {"id": "job-1", "status": "running"}),
        "DELETE /v1/jobs/job-1": (200, {"id": "job-1", "status": "cancelled"}),
    }

    def asks(result, line, body=None, query=""):
        assert (server.last.line, server.last.body, server.last.query) == (line, body, query)
        return result

    assert asks(client.health(), "GET /health") == {"status": "healthy"}
    assert asks(client.list_models(), "GET /v1/models") == [{"id": "first"}, {"id": "org/tiny"}]
    load = "POST /v1/models/load"
    assert asks(client.load_model("/m/tiny"), load, {"model_path": "/m/tiny"})["num_layers"] == 4
    asks(client.load_model(Path("tiny"), "t"), load, {"model_path": "tiny", "model_id": "t"})
    asks(client.load_model("tiny", max_kv_size=4096), load, {"model_path": "tiny", "max_kv_size": 4096})
    assert asks(client.model_info(), "GET /v1/models/org%2Ftiny") == {"num_layers": 4}
    asks(client.model_info("first"), "GET /v1/models/first")
    asks(client.unload_model("first"), "DELETE /v1/models/first")
    assert asks(client.hook_points("first"), "GET /v1/models/first/hook_points") == [{"name": "hook_embed"}]
    assert asks(client.selftest("first"), "POST /v1/models/first/selftest", {}) == {"passed": True}
    asks(client.selftest("first", background=True), "POST /v1/models/first/selftest", {"background": True})
    assert asks(client.list_jobs(), "GET /v1/jobs") == [{"id": "job-1"}]
    assert asks(client.job("job-1"), "GET /v1/jobs/job-1")["status"] == "running"
    assert asks(client.cancel_job("job-1"), "DELETE /v1/jobs/job-1")["status"] == "cancelled"
    assert asks(client.tokenize("a"), "POST /v1/tokenize", {"text": "a"})["count"] == 1
    asks(client.tokenize(messages=MESSAGES, model="m"), "POST /v1/tokenize", {"messages": MESSAGES, "model": "m"})
    assert asks(client.detokenize(np.array([1, 2])), "POST /v1/detokenize", {"tokens": [1, 2]}) == "a b"
    hooks = "/v1/activations/hooks"
    assert asks(client.register_hooks(HOOKS), f"POST {hooks}", {"hooks": HOOKS}) == ["r5"]
    asks(client.register_activation_hooks(HOOKS, "m"), f"POST {hooks}", {"hooks": HOOKS, "model": "m"})
    assert asks(client.list_hooks(), f"GET {hooks}") == HOOKS
    assert asks(client.clear_hooks(), f"DELETE {hooks}") == {"status": "hooks_cleared"}
    asks(client.clear_activation_hooks("m n"), f"DELETE {hooks}", query="model=m+n")
    asks(client.delete_hook("a/b c"), f"DELETE {hooks}/a%2Fb%20c")
    asks(client.logit_lens("hi"), "POST /v1/analysis/logit_lens", {"prompt": "hi", "top_k": 5, "position": -1})
    asks(
        client.logit_lens(messages=MESSAGES, top_k=2, position=0),
        "POST /v1/analysis/logit_lens",
        {"messages": MESSAGES, "top_k": 2, "position": 0},
    )
    whole = {"prompt": "hi", "top_k": 5, "position": -1}
    for positions, sent in (("all", "all"), (slice(1, None), {"start": 1}), (slice(None), "all"), ((2, 3), [2, 3])):
        asks(client.logit_lens("hi", positions=positions), "POST /v1/analysis/logit_lens", whole | {"positions": sent})
    more = {"components": ["heads"], "norm": "final", "apply_norm": False, "apply_softmax": True}
    asks(
        client.logit_lens("hi", token_directions=[(np.int64(1), "b")], **more),
        "POST /v1/analysis/logit_lens",
        whole | more | {"token_directions": [[1, "b"]]},
    )
    asks(
        client.logit_lens("hi", components="attn_out", token_directions="Paris"),
        "POST /v1/analysis/logit_lens",
        whole | {"components": ["attn_out"], "token_directions": ["Paris"]},
    )
    attribution = "POST /v1/analysis/direct_logit_attribution"
    asks(client.direct_logit_attribution("hi", "a"), attribution, {"prompt": "hi", "token_directions": ["a"]})
    asks(
        client.direct_logit_attribution(tokens=("a", 2), messages=MESSAGES, positions=1, model="m"),
        attribution,
        {"messages": MESSAGES, "token_directions": [["a", 2]], "positions": 1, "model": "m"},
    )


def test_a_job_is_awaited_and_its_progress_told(live_server):
    with LMStudioNeuroScopeClient(live_server.base_url) as client:
        seen = []
        job = client.selftest("neuroscope-tiny", background=True)
        result = client.wait_for_job(job["id"], 0.01, seen.append)
        assert result == client.selftest("neuroscope-tiny")
        assert seen[-1]["status"] == "completed"
        assert any(one["message"].startswith("checked: ") for one in seen)
        failing = client.load_model("no-such-model", background=True)
        with raises_api_error(None, code="model_not_found"):
            client.wait_for_job(failing["id"], 0.01)


def test_generation_sends_the_documented_defaults_and_every_option(server, client):
    server.answers = {f"POST {route}": (200, reply()) for route in (CHAT, CHAT_WITH, COMPLETE, COMPLETE_WITH)}
    # The limit's default is the server's, so that another name of it can be given.
    defaults = {"temperature": 0.7, "stream": False}
    client.chat(MESSAGES)
    assert server.last.body == {"messages": MESSAGES, **defaults}
    client.chat(MESSAGES, max_completion_tokens=4)
    assert server.last.body == {"messages": MESSAGES, "max_completion_tokens": 4, **defaults}
    client.chat(MESSAGES, max_tokens=100)
    assert server.last.body == {"messages": MESSAGES, "max_tokens": 100, **defaults}
    client.complete("hi", 3, 0, seed=1, stop=["."], top_p=None)
    expected = {"prompt": "hi", "max_tokens": 3, "temperature": 0, "stream": False, "seed": 1, "stop": ["."]}
    assert server.last.body == expected
    client.generate_with_activations(messages=MESSAGES, activation_hooks=HOOKS, activation_dtype="float16")
    capture = {"activation_encoding": "base64", "activation_dtype": "float16"}
    assert server.last.body == {"messages": MESSAGES, "activation_hooks": HOOKS, **capture, **defaults}
    client.complete_with_activations([3, 4], max_tokens=0, activation_encoding="none")
    assert server.last.body == {
        "prompt": [3, 4],
        "activation_encoding": "none",
        "max_tokens": 0,
        "temperature": 0.7,
        "stream": False,
    }


def test_exactly_one_source_of_text(client):
    for ask in (client.tokenize, client.logit_lens):
        with pytest.raises(ValueError, match="exactly one"):
            ask()
        with pytest.raises(ValueError, match="exactly one"):
            ask("a", messages=MESSAGES)
    with pytest.raises(ValueError, match="tokens is a token or a pair of tokens"):
        client.direct_logit_attribution("a")
    with pytest.raises(ValueError, match="a slice without step"):
        client.logit_lens("a", positions=slice(0, 4, 2))


def test_the_key_goes_to_the_server_and_nowhere_else(server, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    server.answers["GET /health"] = (200, {"status": "healthy"})
    with LMStudioNeuroScopeClient(server.url, api_key="sk-s3cret") as client:
        client.health()
        assert server.last.headers["Authorization"] == "Bearer sk-s3cret"
        assert "s3cret" not in repr(client) + str(vars(client))
    with LMStudioNeuroScopeClient(server.url) as client:
        client.health()
        assert server.last.headers["Authorization"] is None
    for bad in ("", "sk-s3cret\nX: y", "sk-s3crét", " sk-s3cret"):
        with pytest.raises(ValueError, match="printable ASCII") as caught:
            LMStudioNeuroScopeClient(server.url, api_key=bad)
        assert "s3cr" not in str(caught.value)


def test_proxies_of_the_environment_are_not_asked_for_loopback(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server.answers["GET /health"] = (200, {"status": "healthy"})
    for host in ("127.0.0.1", "localhost"):
        with LMStudioNeuroScopeClient(server.url.replace("127.0.0.1", host)) as client:
            assert client.health_check()


def test_a_redirect_is_not_followed(server, client):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", "http://127.0.0.1:9/steal")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    server.answers["GET /health"] = redirect
    with raises_api_error(302):
        client.health()


def test_calls_share_one_connection(server, client):
    server.answers["GET /health"] = (200, {"status": "healthy"})
    client.health()
    client.health()
    assert server.requests[0].peer == server.requests[1].peer


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8080",
        "ftp://127.0.0.1",
        "http://",
        "",
        "http://127.0.0.1:99999",
        "http://127.0.0.1:0",
        "http://127.0.0.1:port",
        "http://[::1",
        "http://me:pw@127.0.0.1",
        "http://me:pw@127.0.0.1:99999",
        "ftp://me:pw@127.0.0.1",
        "http://a/?x=1",
    ],
)
def test_a_base_url_that_cannot_work_is_refused_at_once(url):
    with pytest.raises(ValueError, match=r"^base_url must ") as caught:
        LMStudioNeuroScopeClient(url)
    assert "pw" not in str(caught.value)


def test_defaults_and_trailing_slash():
    assert LMStudioNeuroScopeClient().base_url == "http://127.0.0.1:8080"
    assert LMStudioNeuroScopeClient("http://localhost:1/").base_url == "http://localhost:1"


@pytest.mark.parametrize("timeout", [0, -1, None, float("inf"), float("nan"), 1e300, True, "5", [5], np.float32(5)])
def test_a_timeout_that_cannot_work_is_refused_at_once(timeout):
    with pytest.raises(ValueError, match=r"timeout must be seconds above 0 and at most 1000000, got "):
        LMStudioNeuroScopeClient(timeout=timeout)


def test_the_longest_timeout_works(server):
    server.answers["GET /health"] = (200, {"status": "healthy"})
    for timeout in (1_000_000, np.float64(5)):
        with LMStudioNeuroScopeClient(server.url, timeout=timeout) as client:
            assert client.health_check()


@pytest.mark.parametrize("token", [1.5, 1.0, "1", True, None, np.float32(1)])
def test_a_token_that_is_no_whole_number_is_refused_and_not_rounded(server, client, token):
    with pytest.raises(ValueError, match=r"tokens must be whole numbers, got "):
        client.detokenize([1, token])
    assert server.requests == []


# -- activations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["base64", "json"])
@pytest.mark.parametrize("ask", ["generate_with_activations", "complete_with_activations"])
def test_activations_are_arrays_out_of_either_encoding(server, client, encoding, ask):
    whole = np.random.default_rng(0).standard_normal((1, 4, 8)).astype(np.float32)
    records = [record(whole[:, :3], encoding=encoding), record(whole[:, 3:], 3, "decode", encoding)]
    body = reply(activations={"r5": records}, hooks={"r5": {"fired": 2, "positions": [0, 4], "bytes": 128}})
    server.answers = {f"POST {CHAT_WITH}": (200, body), f"POST {COMPLETE_WITH}": (200, body)}
    result = getattr(client, ask)(MESSAGES, HOOKS)
    got = result["activations"]["r5"]
    assert [type(item["data"]) for item in got] == [np.ndarray, np.ndarray]
    assert [item["positions"] for item in got] == [[0, 3], [3, 4]]
    np.testing.assert_array_equal(stack_records(got), whole)
    assert result["hooks"]["r5"]["bytes"] == 128


def test_records_without_data_stay_without(server, client):
    bare = record(np.zeros((1, 3, 8), np.float32), encoding="none")
    server.answers[f"POST {CHAT_WITH}"] = (200, reply(activations={"r5": [bare]}))
    assert client.generate_with_activations(MESSAGES, HOOKS)["activations"]["r5"] == [bare]


@pytest.mark.parametrize(
    "activations",
    [
        {"r5": [{"hook_id": "r5", "shape": [5], "dtype": "float32", "encoding": "base64", "data": "AAAAAA=="}]},
        {"r5": [{"hook_id": "r5", "shape": [1], "dtype": "float32", "encoding": "json", "data": ["x"]}]},
        {"r5": ["record"]},
        {"r5": None},
        ["r5"],
    ],
)
def test_damaged_activations_are_reported(server, client, activations):
    server.answers[f"POST {CHAT_WITH}"] = (200, reply(activations=activations))
    with pytest.raises(ResponseFormatError, match="damaged activations"):
        client.generate_with_activations(MESSAGES, HOOKS)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 405, 409, 413, 500, 503])
def test_a_refusal_says_what_the_server_said(server, client, status):
    error = {
        "message": "No model is loaded.",
        "type": "invalid_request_error",
        "code": "no_model_loaded",
        "param": "model",
    }
    server.answers[f"POST {CHAT}"] = (status, {"error": error})
    with raises_api_error(status, **error, body={"error": error}) as caught:
        client.chat(MESSAGES)
    assert str(caught.value) == f"No model is loaded. (HTTP {status})"
    with raises_api_error(status, **error):
        client.chat(MESSAGES, stream=True)  # before the first event is asked for


def test_a_refusal_in_a_foreign_shape_still_tells_its_status(server, client):
    server.answers["GET /health"] = (502, b"<html>Bad Gateway</html>")
    with raises_api_error(502, type=None, body="<html>Bad Gateway</html>") as caught:
        client.health()
    assert "Bad Gateway" in str(caught.value)
    server.answers["GET /health"] = (500, {"error": "it broke"})
    with raises_api_error(500, message="GET /health: it broke"):
        client.health()


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"", b"[1]", b'{"a": NaN}', b'{"a": "\xff"}'])
def test_an_answer_that_is_no_json_object_is_reported(server, client, body):
    server.answers["GET /health"] = (200, body)
    with pytest.raises(ResponseFormatError, match=r"GET /health: expected a JSON object"):
        client.health()


def test_damaged_compression_is_a_fault_of_the_answer_and_not_an_absent_server(server, client):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream" if "chat" in handler.path else "application/json")
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", "8")
        handler.end_headers()
        handler.wfile.write(b"not gzip")

    server.answers = {"GET /health": answer, f"POST {CHAT}": answer}
    with pytest.raises(ResponseFormatError, match="GET /health: the answer is not in the compression"):
        client.health()
    with pytest.raises(ResponseFormatError, match=f"POST {CHAT}: the answer is not in the compression"):
        next(client.chat(MESSAGES, stream=True))


@pytest.mark.parametrize("models", [{}, {"data": "tiny"}, {"data": None}])
def test_an_answer_without_the_field_is_reported(server, client, models):
    server.answers["GET /v1/models"] = (200, models)
    with pytest.raises(ResponseFormatError, match="expected 'data' to be a list"):
        client.list_models()


def test_a_reply_without_choices_is_reported(server, client):
    server.answers[f"POST {CHAT}"] = (200, {"id": "x"})
    with pytest.raises(ResponseFormatError, match="expected 'choices' to be a list, got nothing"):
        client.chat(MESSAGES)


def test_no_model_loaded_is_told_by_the_methods_that_pick_one(server, client):
    server.answers["GET /v1/models"] = (200, {"data": []})
    for ask in (client.model_info, client.hook_points, client.selftest, client.unload_model):
        with pytest.raises(NeuroScopeError, match="call load_model first"):
            ask()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as unused:
        return unused.getsockname()[1]


def test_no_server_names_the_url_and_the_way_to_start_one():
    url = f"http://127.0.0.1:{free_port()}"
    with LMStudioNeuroScopeClient(url) as client:
        with pytest.raises(ServerUnreachableError, match="Connection refused") as caught:
            client.health()
        assert url in str(caught.value)
        assert "neuroscope serve" in str(caught.value)
        assert client.health_check() is False


def test_health_check_is_false_for_a_server_that_is_not_well(server, client):
    server.answers["GET /health"] = (503, {"error": {"message": "stopping"}})
    assert client.health_check() is False
    server.answers["GET /health"] = (200, {"status": "starting"})
    assert client.health_check() is False


def test_a_silent_server_is_a_timeout(server):
    def silent(handler):
        time.sleep(0.5)
        handler.close_connection = True

    def stalls(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b'{"a"')
        silent(handler)

    with LMStudioNeuroScopeClient(server.url, timeout=0.1) as client:
        for answer in (silent, stalls):
            server.answers["GET /health"] = answer
            with pytest.raises(ServerTimeoutError, match=r"GET /health: nothing came for 0.1 s"):
                client.health()


def test_a_server_that_hangs_up_is_told_apart_from_none(server, client):
    def hang_up(handler):
        handler.close_connection = True

    def cut(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100")
        handler.end_headers()
        handler.wfile.write(b'{"a"')
        handler.close_connection = True

    for answer in (hang_up, cut):
        server.answers["GET /health"] = answer
        with pytest.raises(ServerUnreachableError, match="closed the connection before it answered GET /health"):
            client.health()


# -- streams --------------------------------------------------------------------------------------


def parsed(*chunks):
    return list(parse_event_stream(chunks))


STREAM = (
    'data: {"text": "Grüezi 🌍"}\n\n: keep-alive\r\n\r\ndata: one\r\ndata: two\r\n\r\nid: 7\ndata:three\r\rdata\n\n'
)


def test_event_stream_is_parsed_however_it_is_cut():
    expected = ['{"text": "Grüezi 🌍"}', "one\ntwo", "three", ""]
    raw = STREAM.encode()
    assert parsed(raw) == expected
    assert parsed(*(raw[i : i + 1] for i in range(len(raw)))) == expected
    for cut in range(len(raw)):
        assert parsed(raw[:cut], raw[cut:]) == expected
        assert parsed(raw[:cut], b"", raw[cut:]) == expected


def test_event_stream_line_ends():
    mark = b"\xef\xbb\xbf"  # of the byte order; part of the text anywhere but at the start
    for end in (b"\n", b"\r\n", b"\r"):
        raw = end.join([mark + b"data: a", b"", mark + b"data: x", b"data: b", b"", b""])
        assert parsed(raw) == ["a", "b"]
        assert parsed(*(raw[i : i + 1] for i in range(len(raw)))) == ["a", "b"]


def test_event_stream_keeps_other_line_separators_in_the_data():
    assert parsed("data: a\u2028b\x0bc\n\n".encode()) == ["a\u2028b\x0bc"]
    assert parsed(b"data:  a\n\n") == [" a"]


def test_event_stream_drops_an_unfinished_event():
    assert parsed(b"data: a\n\ndata: b\n") == ["a"]
    assert parsed() == []
    assert parsed(b"") == []


def test_event_stream_refuses_what_is_not_utf8():
    with pytest.raises(ResponseFormatError, match="not UTF-8"):
        parsed(b"data: \xff\n\n")


def chunk(text, **more):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more}


@pytest.mark.parametrize("finish", ["chunked", "close"])
@pytest.mark.parametrize("encoding", ["base64", "json"])
def test_a_stream_brings_text_and_arrays_step_by_step(server, client, finish, encoding):
    whole = np.random.default_rng(0).standard_normal((1, 4, 8)).astype(np.float32)
    stream = (
        event(**chunk("Grü", activations={"r5": [record(whole[:, :3], encoding=encoding)]}))
        + event(**chunk("ezi 🌍", activations={"r5": [record(whole[:, 3:], 3, "decode", encoding)]}))
        + event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}], usage={"total_tokens": 5})
        + DONE
    )
    middle = stream.index("🌍".encode()) + 2 if encoding == "base64" else len(stream) // 2
    server.answers[f"POST {CHAT_WITH}"] = sse(stream[:middle], stream[middle:], finish=finish)
    events = client.generate_with_activations(MESSAGES, HOOKS, stream=True)
    assert isinstance(events, EventStream)
    got = list(events)
    assert server.last.body["stream"] is True
    assert server.last.headers["Accept"] == "text/event-stream"
    assert "".join(item["choices"][0]["delta"].get("content", "") for item in got) == "Grüezi 🌍"
    records = [item for step in got for item in step.get("activations", {}).get("r5", [])]
    np.testing.assert_array_equal(stack_records(records), whole)
    assert got[-1]["usage"] == {"total_tokens": 5}
    assert list(events) == []


@pytest.mark.parametrize("finish", ["chunked", "close"])
def test_an_event_is_there_before_the_next_is_sent(server, client, finish):
    go_on = threading.Event()

    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        if finish == "chunked":
            handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for piece in (event(**chunk("a")), event(**chunk("b")) + DONE):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if finish == "chunked" else piece)
            go_on.wait(4)
        handler.close_connection = True

    server.answers[f"POST {CHAT}"] = answer
    with client.chat(MESSAGES, stream=True) as events:
        first = next(events)
        assert not go_on.is_set()
        go_on.set()
        assert [first, *events] == [chunk("a"), chunk("b")]


def endless(server, first=b""):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        piece = event(**chunk("a"))
        try:
            if first:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(first), first))
            while not server.closed_by_client.wait(0.01):
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        except OSError:
            server.closed_by_client.set()
        handler.close_connection = True

    return answer


def test_closing_the_iterator_closes_the_connection(server, client):
    server.answers[f"POST {COMPLETE}"] = endless(server)
    server.answers["GET /health"] = (200, {"status": "healthy"})
    events = client.complete("a", stream=True)
    assert next(events) == chunk("a")
    assert client.health_check()  # other calls go on meanwhile
    assert not server.closed_by_client.is_set()
    events.close()
    assert server.closed_by_client.wait(4)
    assert list(events) == []
    events.close()


def test_leaving_the_block_before_the_first_event_closes_the_connection(server, client):
    server.answers[f"POST {COMPLETE}"] = endless(server)
    events = client.complete("a", stream=True)
    with events:
        pass
    assert server.closed_by_client.wait(4)


def test_a_dropped_iterator_closes_the_connection(server, client):
    server.answers[f"POST {COMPLETE}"] = endless(server)
    for _ in client.complete("a", stream=True):
        break
    assert server.closed_by_client.wait(4)
    server.closed_by_client.clear()
    client.complete("a", stream=True)
    assert server.closed_by_client.wait(4)


@pytest.mark.parametrize("finish", ["chunked", "close"])
def test_a_stream_that_just_ends_is_an_error_not_a_short_answer(server, client, finish):
    server.answers[f"POST {CHAT}"] = sse(event(**chunk("a")), finish=finish)
    events = client.chat(MESSAGES, stream=True)
    assert next(events) == chunk("a")
    with pytest.raises(ServerUnreachableError, match=r"ended before its \[DONE\]"):
        next(events)


def test_a_stream_that_breaks_off_in_a_chunk_is_an_error(server, client):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s\r\nff\r\ndata: " % (len(event(**chunk("a"))), event(**chunk("a"))))
        handler.close_connection = True

    server.answers[f"POST {CHAT}"] = answer
    events = client.chat(MESSAGES, stream=True)
    assert next(events) == chunk("a")
    with pytest.raises(ServerUnreachableError, match="in the middle of the answer"):
        next(events)


def test_a_stream_that_falls_silent_is_a_timeout(server):
    server.answers[f"POST {CHAT}"] = sse(event(**chunk("a")), DONE, pause=0.5)
    with LMStudioNeuroScopeClient(server.url, timeout=0.1) as client:
        events = client.chat(MESSAGES, stream=True)
        assert next(events) == chunk("a")
        with pytest.raises(ServerTimeoutError, match=r"nothing came for 0\.1 s"):
            next(events)


def test_an_error_inside_a_stream_is_raised(server, client):
    error = {"message": "Hook r5 did not fire.", "type": "server_error", "code": "hook_silent", "param": None}
    server.answers[f"POST {CHAT}"] = sse(event(**chunk("a")), event(error=error), DONE)
    events = client.chat(MESSAGES, stream=True)
    next(events)
    with raises_api_error(None, code="hook_silent", type="server_error") as caught:
        next(events)
    assert str(caught.value) == "Hook r5 did not fire."


def test_an_error_inside_a_stream_closes_the_connection(server, client):
    server.answers[f"POST {COMPLETE}"] = endless(server, first=event(error={"message": "broken"}))
    events = client.complete("a", stream=True)
    with pytest.raises(NeuroScopeAPIError):
        next(events)
    assert server.closed_by_client.wait(4)
    assert list(events) == []


@pytest.mark.parametrize("text", [b"data: {broken\n\n", b"data: [1]\n\n", b'data: {"activations": {"r5": [1]}}\n\n'])
def test_an_event_that_cannot_be_read_is_an_error(server, client, text):
    server.answers[f"POST {CHAT}"] = sse(text, DONE)
    with pytest.raises(ResponseFormatError, match=re.escape(f"POST {CHAT}: ")):
        next(client.chat(MESSAGES, stream=True))


def test_a_plain_reply_to_a_stream_request_is_an_error(server, client):
    server.answers[f"POST {CHAT}"] = (200, reply())
    with pytest.raises(ResponseFormatError, match=r"expected an event stream, got 'application/json'\."):
        client.chat(MESSAGES, stream=True)


def test_a_large_event_is_read_in_one_piece(server, client):
    array = np.random.default_rng(0).standard_normal((1, 300, 1000)).astype(np.float32)
    body = event(**chunk("a", activations={"r5": [record(array)]})) + DONE
    pieces = [body[i : i + 5000] for i in range(0, len(body), 5000)]
    server.answers[f"POST {CHAT_WITH}"] = sse(*pieces)
    (got,) = client.generate_with_activations(MESSAGES, HOOKS, stream=True)
    np.testing.assert_array_equal(got["activations"]["r5"][0]["data"], array)
    assert orjson.loads(dumps(got["choices"]))[0]["delta"]["content"] == "a"
