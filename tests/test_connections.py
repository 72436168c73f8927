"""Connections that are opened and not used, used slowly or never read take no place from others for long."""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from flask import Flask, Response
from server_tools import load_tiny, running_server, until

from api_server import ModelWorker, Server, ServerConfig
from api_server.connections import Patience

HEAD = "Host: localhost\r\nContent-Type: application/json\r\n"
PATIENT = 1000.0


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama", "tiny")
        yield worker


@contextmanager
def connection(url: str, sent: str = "", seconds: float = 10) -> Iterator[socket.socket]:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port or 0), timeout=seconds) as one:
        one.sendall(sent.encode())
        yield one


def is_closed(one: socket.socket) -> bool:
    """Whether the server closed a connection on which it had nothing to say."""
    one.setblocking(False)
    try:
        return one.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def more(one: socket.socket, length: int) -> bytes:
    data = one.recv(length)
    assert data, "the connection was closed before the whole reply came"
    return data


def answer(one: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and the JSON of the next reply."""
    head = body = b""
    while not head.endswith(b"\r\n\r\n"):
        head += more(one, 1)  # what follows may be the next reply's
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += more(one, length - len(body))
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize(
    "sent", ["", "GET /health HTTP/1.1\r\nX: ", f"POST /v1/tokenize HTTP/1.1\r\n{HEAD}Content-Length: 99\r\n\r\n"]
)
def test_connections_that_are_not_used_make_room_for_others(worker: ModelWorker, sent: str) -> None:
    patience = Patience(PATIENT, PATIENT, PATIENT, crowded=0.3)
    config = ServerConfig(port=0, max_connections=8)
    with running_server(worker, config, patience=patience) as url, ExitStack() as stack:
        idle = [stack.enter_context(connection(url, sent)) for _ in range(20)]
        began = time.monotonic()
        assert requests.get(f"{url}/health", timeout=10).json()["status"] == "healthy"
        assert time.monotonic() - began < 5
        assert is_closed(idle[0])
        assert not is_closed(idle[-1])


@pytest.mark.parametrize(
    "sent", ["GET /health HTTP/1.1\r\nX", f"POST /v1/tokenize HTTP/1.1\r\n{HEAD}Content-Length: 99\r\n\r\n"]
)
def test_a_request_that_trickles_in_is_given_up(worker: ModelWorker, sent: str) -> None:
    with running_server(worker, patience=Patience(request=1, idle=PATIENT)) as url, connection(url, sent) as slow:

        def ended() -> bool:
            try:
                slow.sendall(b"x")
            except OSError:
                return True
            time.sleep(0.1)
            return False

        until(ended)
        assert requests.get(f"{url}/health", timeout=10).ok


def test_a_body_that_comes_at_a_fair_pace_is_read_to_its_end(worker: ModelWorker) -> None:
    body = json.dumps({"text": "w1", "model": "tiny"}) + " " * 300
    patience = Patience(request=0.5, idle=PATIENT, bytes_per_second=40)
    sent = f"POST /v1/tokenize HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}\r\n\r\n"
    with running_server(worker, patience=patience) as url, connection(url, sent) as slow:
        for at in range(0, len(body), 10):
            slow.sendall(body[at : at + 10].encode())
            time.sleep(0.1)
        assert answer(slow)[0] == 200


def test_an_idle_connection_is_closed_after_a_while_and_a_busy_one_kept(worker: ModelWorker) -> None:
    request = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running_server(worker, patience=Patience(idle=1.5)) as url, connection(url) as idle, connection(url) as busy:
        until(lambda: busy.sendall(request.encode()) or answer(busy)[0] != 200 or time.sleep(0.2) or is_closed(idle))
        busy.settimeout(10)
        busy.sendall(request.encode())
        assert answer(busy)[0] == 200


def test_a_long_wait_for_an_answer_closes_nothing(worker: ModelWorker) -> None:
    def slow(environ: dict[str, Any], start: Any) -> Any:
        time.sleep(3)
        return Response("{}")(environ, start)

    server = Server(slow, ServerConfig(port=0), patience=Patience(0.1, 0.1, 0.1))  # type: ignore[arg-type]
    thread = server.start()
    try:
        assert requests.get(server.url, timeout=10).text == "{}"
    finally:
        server.stop()
        thread.join(10)


def test_a_server_may_be_stopped_that_has_ended_meanwhile() -> None:
    server = Server(Flask("ends"), ServerConfig(port=0))
    thread = server.start()
    server.stop()
    thread.join(10)
    assert not thread.is_alive()
    # Its pipe is closed.
    server.stop()


@pytest.mark.parametrize("reads", [False, True])
def test_a_reader_that_takes_nothing_is_not_waited_for(reads: bool) -> None:
    app, gone = Flask("large"), []

    @app.get("/")
    def large() -> Response:
        response = Response(b"x" * 65536 for _ in range(500))
        response.call_on_close(lambda: gone.append(time.monotonic()))
        return response

    server = Server(app, ServerConfig(port=0), patience=Patience(reply=2))
    thread = server.start()
    try:
        with connection(server.url, "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") as reader:
            taken = len(reader.recv(1000))
            for _ in range(30 if reads else 0):
                time.sleep(0.1)  # slowly, but it takes
                taken += len(reader.recv(500_000))
            until(lambda: reads or not server._channels())
            while data := reader.recv(2**20):
                taken += len(data)
    except ConnectionError:
        assert not reads
    finally:
        server.stop()
        thread.join(10)
    assert (taken > 500 * 65536) == reads
    assert gone


@pytest.mark.parametrize("pipelined", ["", "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (f"POST /v1/tokenize HTTP/1.1\r\n{HEAD}Content-Length: 2000000\r\n", 413),
        (f"POST /v1/tokenize HTTP/1.1\r\n{HEAD}Content-Length: 99999999999\r\n", 413),
        ("GET /health HTTP/1.1\r\nHost: localhost\r\n", 200),
    ],
)
def test_who_asks_before_sending_a_body_is_answered(
    worker: ModelWorker, sent: str, status: int, pipelined: str
) -> None:
    config, asked = ServerConfig(port=0, max_body_bytes=2**20), f"{pipelined}{sent}Expect: 100-continue\r\n\r\n"
    with running_server(worker, config) as url, connection(url, asked) as one:
        if pipelined:
            assert answer(one)[0] == 200
        got, body = answer(one)
    assert got == status
    if status == 413:
        assert body["error"]["code"] == "request_too_large"
        assert "1048576" in body["error"]["message"]


def test_who_may_send_a_body_is_told_so(worker: ModelWorker) -> None:
    body = b'{"text": "w1"}'
    head = f"POST /v1/tokenize HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    with running_server(worker) as url, connection(url, head) as one:
        assert one.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        one.sendall(body)
        assert answer(one)[0] == 200
