"""The server under load, in a short form; ``benchmarks/many_callers.py`` is the long one."""

import gc
import http.client
import json
import random
import threading
import time
import tracemalloc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import many_callers
import mlx.core as mx
import psutil
import pytest
import requests
from server_tools import HOOKS, load_tiny, running_server, server_process, url_of

from api_server import ModelWorker, ServerConfig, create_app

CAPTURE = many_callers.CAPTURE
N_MALFORMED = 10_000


def test_thirty_two_callers_get_what_each_alone_would_get_and_memory_stays() -> None:
    with server_process("--port", "0", "--model", "neuroscope-tiny", "--max-queued", "16") as process:
        outcome = many_callers.run(url_of(process), process.pid, callers=32, seconds=12, variety=24)
    assert outcome.faults == []
    assert outcome.left == []
    assert outcome.counts["right"] > 32
    # More callers than may run and wait: some are refused, and none waits for ever.
    assert outcome.counts["refused"] > 0
    assert all(outcome.counts[one.__name__] > 0 for one in many_callers.MISCHIEF)
    assert outcome.growth < 1.25


def test_a_wrong_answer_under_load_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    request = {"prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0.9, "activation_hooks": HOOKS[:1]}
    # Without a seed of its own a request is another one each time.
    monkeypatch.setattr(many_callers, "make_request", lambda number: request)
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama", "tiny")
        with running_server(worker) as url:
            outcome = many_callers.run(url, psutil.Process().pid, 2, seconds=1, variety=1, vandals=False)
    assert "not what it was alone" in outcome.faults


def test_ten_thousand_malformed_bodies_harm_nothing() -> None:
    chance = random.Random(0)
    requests_made = [many_callers.make_request(number) | {"max_tokens": 1, "stream": False} for number in range(40)]
    bodies = [many_callers.damaged(chance.choice(requests_made), chance) for _ in range(N_MALFORMED)]
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama", "tiny")
        with running_server(worker) as url, ThreadPoolExecutor(4) as pool:
            address = urlsplit(url)
            process = psutil.Process()
            send_all(address, bodies[:500])
            threads, memory = threading.active_count(), process.memory_info().rss
            parts = [bodies[500 + i :: 4] for i in range(4)]
            statuses = sum(pool.map(lambda part: send_all(address, part), parts), Counter())
            assert statuses.total() == N_MALFORMED - 500
            # What damage leaves whole is answered.
            assert set(statuses) <= {200, 400}, statuses
            assert statuses[400] > 0.5 * N_MALFORMED
            assert threading.active_count() <= threads + 4
            assert process.memory_info().rss < memory + 64 * 2**20
            reply = requests.post(url + CAPTURE, json={"prompt": [1, 2], "activation_hooks": HOOKS[:1]}, timeout=20)
            assert reply.status_code == 200
            assert all(job["finished"] for job in requests.get(f"{url}/v1/jobs", timeout=20).json()["data"])


def test_requests_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process holds, in Python, NumPy and MLX, is the same after 40 requests and after 100."""
    monkeypatch.setattr("api_server.worker.REMEMBERED_JOBS", 20)
    made = [many_callers.make_request(number) | {"activation_encoding": "base64"} for number in range(10)]
    made += [request | {"keep_capture": True} for request in made[:3]]
    with ModelWorker() as worker:
        worker.load("neuroscope-tiny", "tiny")
        app = create_app(worker, ServerConfig(captures_max_bytes=2**20))
        client = app.test_client()

        def ask(count: int) -> None:
            for number in range(count):
                with client.post(CAPTURE, json=made[number % len(made)]) as reply:
                    assert reply.status_code == 200
                    # Half of the streams are left before they end.
                    if not reply.is_streamed or number % 2:
                        reply.get_data()

        def held() -> tuple[int, int]:
            worker.call(mx.clear_cache)
            gc.collect()
            return tracemalloc.get_traced_memory()[0], int(worker.call(mx.get_active_memory))

        tracemalloc.start()
        try:
            ask(40)
            before = held()
            ask(60)
            after = held()
        finally:
            tracemalloc.stop()
    # Small things differ: how full tables are, how long names are.
    assert after[0] - before[0] < 60 * 1000
    assert after[1] - before[1] < 60 * 100


def send_all(address: Any, bodies: list[bytes]) -> Counter[int]:
    """The statuses that the bodies are answered with, over one connection; each error in the one shape."""
    statuses: Counter[int] = Counter()
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
    for body in bodies:
        connection.request("POST", CAPTURE, body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        told = reply.read()
        statuses[reply.status] += 1
        assert reply.status == 200 or json.loads(told)["error"]["message"]
    connection.close()
    return statuses


def test_callers_that_leave_at_random_leave_nothing_behind() -> None:
    def leave(number: int) -> None:
        chance = random.Random(number)
        body = {"prompt": [1, 2, 3], "max_tokens": 300, "stream": chance.random() < 0.5, "activation_hooks": HOOKS[:1]}
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=30)
        connection.request("POST", CAPTURE, json.dumps(body), {"Content-Type": "application/json"})
        time.sleep(chance.random() / 10)
        connection.close()

    with ModelWorker(load=load_tiny, max_queued=64) as worker:
        worker.load("llama", "tiny")
        with running_server(worker) as url, ThreadPoolExecutor(8) as pool:
            address = urlsplit(url)
            list(pool.map(leave, range(64)))
            deadline = time.monotonic() + 30
            while any(job["finished"] is None for job in worker.jobs()):
                assert time.monotonic() < deadline, "a job runs on without its reader"
                time.sleep(0.05)
            assert Counter(job["status"] for job in worker.jobs())["cancelled"] > 32
            assert all(job._outcomes.qsize() <= 1 for job in worker._book.values())
