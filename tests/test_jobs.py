"""Many callers and one worker: turns, fairness, progress, cancelling, several models, and how it all ends."""

import gc
import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import requests
from flask.testing import FlaskClient
from mlx.utils import tree_flatten
from server_tools import MESSAGES, load_tiny, running_server, save_tiny, server_process, until, url_of

from api_server import ModelWorker, create_app
from api_server.errors import Busy, Cancelled, NoRoomForModel
from api_server.jobs import Job, Progress
from mlx_hooks import HookedModel, ModelLoadError, loading

CHAT = "/v1/chat/completions"


@pytest.fixture
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load=load_tiny, max_active=2) as worker:
        worker.load("llama", "tiny")
        yield worker


@pytest.fixture
def client(worker: ModelWorker) -> FlaskClient:
    return create_app(worker).test_client()


class Held:
    """Work that goes on, a step each time it is let."""

    def __init__(self, log: list[str] | None = None, name: str = "", steps: int = 1000) -> None:
        self.let, self.begun, self.closed = threading.Semaphore(0), threading.Event(), threading.Event()
        self.log = log if log is not None else []
        self.name, self.steps = name, steps

    def __call__(self) -> Iterator[Any]:
        try:
            for i in range(self.steps):
                self.begun.set()
                while not self.let.acquire(timeout=0.002):
                    yield Progress(i / self.steps, f"{i} of {self.steps}")
                self.log.append(self.name)
                yield i
        finally:
            self.closed.set()


def steps_of(log: list[str], name: str, steps: int) -> Callable[[], Iterator[Any]]:
    def work() -> Iterator[Any]:
        for i in range(steps):
            log.append(name)
            yield i

    return work


# Turns


def test_jobs_run_in_turn_a_step_each() -> None:
    log: list[str] = []
    worker = ModelWorker(load=load_tiny)
    jobs = [worker.submit(steps_of(log, name, 4), caller=(name, "")) for name in "ab"]
    with worker:
        for job in jobs:
            list(job.results())
    assert log == list("abababab")


def test_a_short_request_does_not_wait_for_a_long_one(worker: ModelWorker) -> None:
    long = [Held() for _ in range(worker.max_active)]
    jobs = [worker.submit(work) for work in long]
    assert all(work.begun.wait(10) for work in long)
    assert worker.call(lambda: "now") == "now"
    for job in jobs:
        job.cancel()
    assert all(work.closed.wait(10) for work in long)


def test_a_request_among_long_generations_ends_first_and_says_what_it_would_say_alone(client: FlaskClient) -> None:
    short = {"messages": MESSAGES, "max_tokens": 3, "temperature": 1.3, "seed": 5}
    long = {"messages": MESSAGES, "max_tokens": 300, "temperature": 1.3, "seed": 6, "stream": True}
    alone = client.post(CHAT, json=short).get_json()["choices"]
    reading = client.post(CHAT, json=long)
    assert client.post(CHAT, json=short).get_json()["choices"] == alone
    job = client.get(f"/v1/jobs/{reading.headers['X-Job-Id']}").get_json()
    assert job["status"] == "running"
    assert 0 < job["fraction"] < 1
    reading.close()


def test_callers_are_served_by_turns_however_much_one_of_them_asks() -> None:
    log: list[str] = []
    worker = ModelWorker(load=load_tiny, max_active=1)
    jobs = [worker.submit(steps_of(log, f"greedy{i}", 2), caller=("greedy", "")) for i in range(4)]
    jobs += [worker.submit(steps_of(log, f"modest{i}", 2), caller=("modest", "")) for i in range(2)]
    with worker:
        for job in jobs:
            list(job.results())
    assert log[::2] == log[1::2] == ["greedy0", "modest0", "greedy1", "modest1", "greedy2", "greedy3"]


def test_a_caller_who_changes_his_name_gains_nothing() -> None:
    log: list[str] = []
    worker = ModelWorker(load=load_tiny, max_active=1)
    jobs = [worker.submit(steps_of(log, f"many{i}", 1), caller=("here", f"name{i}")) for i in range(3)]
    jobs += [worker.submit(steps_of(log, f"one{i}", 1), caller=("here", "")) for i in range(2)]
    jobs += [worker.submit(steps_of(log, f"there{i}", 1), caller=("there", "")) for i in range(2)]
    jobs += [worker.submit(steps_of(log, f"many{i}", 1), caller=("here", f"name{i}")) for i in range(3, 9)]
    with worker:
        for job in jobs:
            list(job.results())
    # The other address has every second turn; at this one, nobody has a second turn before all had one, and no later.
    assert log[:4] == ["many0", "there0", "many1", "there1"]
    assert log[4:] == ["many2", "one0", *(f"many{i}" for i in range(3, 9)), "one1"]


def test_who_comes_later_under_a_new_name_is_behind() -> None:
    log: list[str] = []
    worker = ModelWorker(load=load_tiny, max_active=1)

    def and_another(name: str, following: int) -> Callable[[], Iterator[Any]]:
        def work() -> Iterator[Any]:
            log.append(name)
            if following:
                jobs.append(worker.submit(and_another(f"new{following}", following - 1), caller=("here", name)))
            yield None

        return work

    jobs = [worker.submit(and_another("first", 5), caller=("here", "first"))]
    jobs += [worker.submit(steps_of(log, f"one{i}", 1), caller=("here", "")) for i in range(3)]
    with worker:
        for job in jobs:
            list(job.results())
    assert log == ["first", "one0", "new5", "one1", "new4", "one2", "new3", "new2", "new1"]


def test_generations_and_what_takes_one_turn_do_not_hold_each_other_up() -> None:
    log: list[str] = []
    worker = ModelWorker(load=load_tiny)
    jobs = [worker.submit(steps_of(log, "step", 5))]
    jobs += [worker.submit(steps_of(log, f"brief{i}", 1), brief=True) for i in range(5)]
    with worker:
        for job in jobs:
            list(job.results())
    # Alternately, and in the order in which they came.
    assert log[1:10:2] == ["step"] * 5 or log[0:10:2] == ["step"] * 5
    assert [name for name in log if name != "step"] == [f"brief{i}" for i in range(5)]


def test_what_takes_one_turn_is_bounded_too() -> None:
    worker = ModelWorker(load=load_tiny, max_queued=3)
    for _ in range(3):
        worker.submit(steps_of([], "", 1), brief=True)
    with pytest.raises(Busy):
        worker.submit(steps_of([], "", 1), brief=True)


def test_what_was_answered_is_completed_whatever_else_runs(client: FlaskClient, worker: ModelWorker) -> None:
    held = worker.submit(Held())
    for path, body in (
        ("/v1/tokenize", {"text": "w1"}),
        ("/v1/analysis/logit_lens", {"prompt": "w1 w2"}),
        ("/v1/models/tiny/selftest", {}),
        ("/v1/models/load", {"model_path": "gpt2"}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 1, "model": "tiny"}),
    ):
        reply = client.post(path, json=body)
        assert reply.status_code == 200, path
        assert worker.job(reply.headers["X-Job-Id"]).status == "completed", path
    held.cancel()


def test_the_queue_is_bounded_and_says_when_to_come_back(client: FlaskClient) -> None:
    with ModelWorker(load=load_tiny, max_queued=3, max_active=1) as worker:
        worker.load("llama")
        gate = Held()
        held = worker.submit(gate)
        assert gate.begun.wait(10)
        waiting = [worker.submit(Held()) for _ in range(3)]
        reply = create_app(worker).test_client().post(CHAT, json={"messages": MESSAGES})
        assert reply.status_code == 503
        assert int(reply.headers["Retry-After"]) >= 1
        waiting[0].cancel()
        last = worker.submit(Held())
        with pytest.raises(Busy):
            worker.submit(Held())
        for job in (held, *waiting, last):
            job.cancel()


def test_what_nobody_reads_is_not_kept(worker: ModelWorker) -> None:
    log: list[str] = []
    gate = Held(log, steps=50)
    job = worker.submit(gate)
    results = job.results()
    gate.let.release()
    assert next(results) == 0
    results.close()
    gate.let.release(40)
    assert gate.closed.wait(10)
    until(lambda: job.is_finished)
    assert len(log) < 50
    assert job.status == "cancelled"
    assert job._work is job._steps is job.model is None
    assert job._outcomes.qsize() <= 1


# Jobs over REST


def test_every_generation_is_a_job_that_can_be_looked_up(client: FlaskClient) -> None:
    reply = client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 2})
    job = client.get(f"/v1/jobs/{reply.headers['X-Job-Id']}").get_json()
    assert {
        "id": reply.headers["X-Job-Id"],
        "object": "job",
        "kind": "chat.completion",
        "model": "tiny",
        "status": "completed",
        "fraction": 1.0,
        "cancelling": False,
        "request_id": reply.headers["X-Request-Id"],
        "error": None,
        "result": None,
    }.items() <= job.items()
    assert job["created"] <= job["started"] <= job["finished"] <= time.time()
    listed = client.get("/v1/jobs").get_json()
    assert listed["object"] == "list"
    assert listed["data"][0] == job


def test_a_failed_job_says_why(client: FlaskClient) -> None:
    reply = client.post("/v1/completions", json={"prompt": [3, 999]})
    assert reply.status_code == 400
    job = client.get(f"/v1/jobs/{reply.headers['X-Job-Id']}").get_json()
    assert job["status"] == "failed"
    assert job["error"]["message"] == reply.get_json()["error"]["message"]


def test_delete_cancels_a_running_generation_and_its_reader_learns_it(worker: ModelWorker) -> None:
    paced(worker)
    body = {"messages": MESSAGES, "max_tokens": 400, "stream": True}
    with running_server(worker) as url, requests.post(url + CHAT, json=body, stream=True, timeout=20) as reply:
        lines = reply.iter_lines(chunk_size=1)
        assert next(lines).startswith(b"data: ")
        job = f"{url}/v1/jobs/{reply.headers['X-Job-Id']}"
        answer = requests.delete(job, timeout=10).json()
        assert answer["status"] in ("running", "cancelled")
        assert answer["cancelling"] is (answer["status"] == "running")
        last = [json.loads(line[6:]) for line in lines if line.startswith(b"data: ")][-1]
        assert last["error"]["code"] == "cancelled"
        assert requests.get(job, timeout=10).json()["status"] == "cancelled"
        # Cancelling what has ended changes nothing.
        assert requests.delete(job, timeout=10).json()["status"] == "cancelled"


def paced(worker: ModelWorker, seconds: float = 0.01) -> None:
    """Make generations of the worker's model slow."""
    model = worker.get().model
    plain = type(model).generate_steps

    def generate_steps(*args: Any, **options: Any) -> Iterator[Any]:
        for step in plain(model, *args, **options):
            time.sleep(seconds)
            yield step

    model.generate_steps = generate_steps  # type: ignore[method-assign]


def test_delete_takes_a_waiting_job_out_of_the_queue(worker: ModelWorker, client: FlaskClient) -> None:
    held = [worker.submit(Held()) for _ in range(worker.max_active)]
    begun = threading.Event()
    waiting = worker.submit(lambda: iter([begun.set()]))  # type: ignore[arg-type, return-value, func-returns-value]
    until(lambda: worker.shown(waiting)["message"] == "next" and all(job.started for job in held))
    assert client.delete(f"/v1/jobs/{waiting.id}").get_json()["status"] == "cancelled"
    with pytest.raises(Cancelled, match="before it began"):
        list(waiting.results())
    assert not begun.is_set()
    for job in held:
        job.cancel()


def test_an_unknown_job_is_told(client: FlaskClient) -> None:
    for method in (client.get, client.delete):
        reply = method("/v1/jobs/job-0")
        assert reply.status_code == 404
        assert reply.get_json()["error"]["code"] == "job_not_found"


@pytest.mark.parametrize("brief", [True, False])
def test_the_book_forgets_the_oldest_that_ended(
    brief: bool, worker: ModelWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api_server.worker.REMEMBERED_BRIEF_JOBS" if brief else "api_server.worker.REMEMBERED_JOBS", 5)
    running, other = worker.submit(Held()), worker.submit(steps_of([], "", 1), brief=not brief)
    list(other.results())
    for _ in range(10):
        list(worker.submit(steps_of([], "", 1), brief=brief).results())
    last = worker.submit(steps_of([], "", 1), brief=brief)
    assert worker.job(running.id) is running
    # What is asked for often does not push the other kind out.
    assert worker.job(other.id) is other
    assert len([job for job in worker._book.values() if job.brief is brief]) <= 5 + 3
    list(last.results())
    running.cancel()


def test_the_selftest_in_the_background_is_a_job_with_progress(client: FlaskClient) -> None:
    whole = client.post("/v1/models/tiny/selftest", json={}).get_json()
    reply = client.post("/v1/models/tiny/selftest", json={"background": True})
    assert reply.status_code == 202
    assert reply.headers["Location"] == f"/v1/jobs/{reply.get_json()['id']}"
    seen = follow(client, reply.headers["Location"])
    assert seen[-1]["result"] == whole
    assert any(one["message"].startswith("checked: ") for one in seen)


def follow(client: FlaskClient, address: str) -> list[dict[str, Any]]:
    """A job as it was seen until it ended."""
    seen = [client.get(address).get_json()]
    deadline = time.monotonic() + 60
    while seen[-1]["finished"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        seen.append(client.get(address).get_json())
    return seen


def test_what_fails_in_the_background_is_logged_and_told(
    worker: ModelWorker, client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> Iterator[Any]:
        yield Progress(0.5, "half")
        raise RuntimeError("a secret")

    job = worker.submit(broken, render=lambda result: {}, request_id="req-1")
    until(lambda: job.is_finished)
    told = client.get(f"/v1/jobs/{job.id}").get_json()
    assert told["status"] == "failed"
    assert told["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(told)
    assert "req-1" in caplog.text


def test_a_job_that_ended_keeps_nothing_alive(client: FlaskClient, worker: ModelWorker) -> None:
    class Large:
        pass

    made: list[weakref.ref[Large]] = []

    def work() -> Iterator[Any]:
        while True:
            large = Large()
            made.append(weakref.ref(large))
            yield large

    def failing() -> Iterator[Any]:
        kept = Large()
        made.append(weakref.ref(kept))
        yield kept
        raise RuntimeError(f"with {kept}")

    def read(job: Job[Any]) -> None:
        collected = []
        try:
            for one in job.results():
                collected.append(one)
                if len(collected) == 3:
                    worker.cancel(job.id)
        except (Cancelled, RuntimeError):
            pass

    for make in (work, failing):
        read(worker.submit(make))
    abandoned = worker.submit(failing).results()
    next(abandoned)
    abandoned.close()
    model = weakref.ref(worker.get().model)
    selftest = client.post("/v1/models/tiny/selftest", json={"background": True}).get_json()
    follow(client, f"/v1/jobs/{selftest['id']}")
    client.delete("/v1/models/tiny")
    until(lambda: all(job["finished"] for job in worker.jobs()))
    worker.call(lambda: None)
    gc.collect()
    assert len(made) >= 4
    assert all(ref() is None for ref in made)
    assert model() is None
    assert len(worker.jobs()) >= 4


# Several models


def sized(worker: ModelWorker, n: float) -> int:
    return int(n * worker.get().nbytes)


def test_a_model_knows_its_bytes(worker: ModelWorker, client: FlaskClient) -> None:
    loaded = worker.get()
    expected = sum(array.nbytes for _, array in tree_flatten(loaded.model.model.parameters()))
    assert client.get("/v1/models/tiny").get_json()["weight_bytes"] == loaded.nbytes == expected > 0


def test_the_model_used_longest_ago_makes_room(worker: ModelWorker) -> None:
    worker.loaded.max_bytes = sized(worker, 3.5)
    for name in ("b", "c"):
        worker.load("llama", name)
    worker.get("tiny")
    worker.load("llama", "d")
    assert [loaded.model_id for loaded in worker.models()] == ["tiny", "c", "d"]
    worker.load("llama", "e")
    assert [loaded.model_id for loaded in worker.models()] == ["tiny", "d", "e"]


def test_a_model_in_use_is_not_unloaded(worker: ModelWorker, client: FlaskClient) -> None:
    worker.loaded.max_bytes = sized(worker, 1.5)
    work = Held()
    job = worker.submit(work, model=worker.get("tiny"))
    assert work.begun.wait(10)
    reply = client.post("/v1/models/load", json={"model_path": "llama", "model_id": "b"})
    assert reply.status_code == 503
    assert int(reply.headers["Retry-After"]) >= 1
    assert reply.get_json()["error"]["code"] == "no_room_for_model"
    # Unloaded by name it takes memory until the job ends.
    client.delete("/v1/models/tiny")
    assert client.post("/v1/models/load", json={"model_path": "llama", "model_id": "b"}).status_code == 503
    job.cancel()
    until(lambda: job.is_finished)
    assert client.post("/v1/models/load", json={"model_path": "llama", "model_id": "b"}).status_code == 200


def test_a_model_that_can_never_fit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    with ModelWorker(max_model_bytes=1000) as worker:
        reply = create_app(worker).test_client().post("/v1/models/load", json={"model_path": str(folder)})
        assert reply.status_code == 400
        assert "1000" in reply.get_json()["error"]["message"]
        with pytest.raises(NoRoomForModel):
            worker.load("neuroscope-tiny")
        assert worker.models() == []


def test_loads_at_the_same_time_keep_to_the_limit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (loading.fetch("neuroscope-tiny") / "model.safetensors").stat().st_size
    with ModelWorker(max_model_bytes=int(1.5 * whole)) as worker:
        client = create_app(worker).test_client()
        address = "/v1/models/load"
        jobs = [
            client.post(address, json={"model_path": "neuroscope-tiny", "model_id": str(i), "background": True})
            for i in range(3)
        ]
        ended = [follow(client, job.headers["Location"])[-1] for job in jobs]
        refused = [job for job in ended if job["status"] == "failed"]
        assert {job["error"]["code"] for job in refused} == {"no_room_for_model"}
        assert len(worker.models()) == 1
        assert len(refused) >= 1
        assert worker.loaded._promised == 0
        worker.load("neuroscope-tiny", "later")
        assert [loaded.model_id for loaded in worker.models()] == ["later"]


@pytest.mark.parametrize("damage", ["cut", "not there", "no weights", "another shape"])
def test_a_load_that_fails_leaves_what_was_loaded(damage: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "broken")
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-5000])
    elif damage == "not there":
        weights.unlink()
        weights.symlink_to(tmp_path / "nowhere")
    elif damage == "no weights":
        weights.unlink()
    else:
        (folder / "config.json").write_text(
            json.dumps(json.loads((folder / "config.json").read_text()) | {"hidden_size": 64})
        )
    with ModelWorker() as worker:
        worker.load("neuroscope-tiny")
        worker.loaded.max_bytes = int(1.01 * worker.get().nbytes)
        client = create_app(worker).test_client()
        reply = client.post("/v1/models/load", json={"model_path": str(folder)})
        assert reply.status_code == 400, reply.get_json()
        assert reply.get_json()["error"]["code"] == "model_not_loadable"
        assert [loaded.model_id for loaded in worker.models()] == ["neuroscope-tiny"]
        assert worker.loaded._promised == 0


def test_memory_returns_when_a_model_is_unloaded() -> None:
    with ModelWorker() as worker:
        worker.load("neuroscope-tiny", "first")
        worker.call(mx.clear_cache)
        before = worker.call(mx.get_active_memory)
        worker.load("neuroscope-tiny", "second")
        assert worker.call(mx.get_active_memory) > before + 1_000_000
        worker.unload("second")
        assert worker.call(mx.get_active_memory) <= before + 100_000


# Loading


def test_loading_shows_its_progress_and_others_run_meanwhile() -> None:
    with ModelWorker() as worker:
        client = create_app(worker).test_client()
        reply = client.post("/v1/models/load", json={"model_path": "neuroscope-tiny", "background": True})
        assert reply.status_code == 202
        seen = follow(client, reply.headers["Location"])
        assert seen[-1]["status"] == "completed"
        assert seen[-1]["result"]["status"] == "loaded"
        assert seen[-1]["result"]["num_layers"] == 4
        assert client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1}).status_code == 200
    steps = list(loading.load_steps(loading.fetch("neuroscope-tiny")))
    fractions = [step.fraction for step in steps]
    assert len(fractions) >= 5
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert 0.8 < fractions[-1] <= 1
    # The file has a header besides.
    assert 0 < (loading.fetch("neuroscope-tiny") / "model.safetensors").stat().st_size - steps[0].nbytes < 10_000
    assert "MB of weights" in steps[0].message


def test_loaded_step_by_step_is_loaded_whole(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    saved = mx.load(str(folder / "model.safetensors"))
    model, _ = loading.load(str(folder))
    found = dict(tree_flatten(model.parameters()))
    assert found.keys() == saved.keys()
    assert all(mx.array_equal(found[name], saved[name]) for name in saved)


def test_a_load_can_be_cancelled_between_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, read = loading.load_steps, []

    def slow(*args: Any) -> Iterator[Any]:
        steps = plain(*args)
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return end.value
            read.append(step)
            time.sleep(0.05)
            yield step

    monkeypatch.setattr("mlx_hooks.loading.load_steps", slow)
    with ModelWorker() as worker:
        client = create_app(worker).test_client()
        address = client.post("/v1/models/load", json={"model_path": "neuroscope-tiny", "background": True}).headers[
            "Location"
        ]
        until(lambda: len(read) >= 2)
        client.delete(address)
        assert follow(client, address)[-1]["status"] == "cancelled"
        assert worker.models() == []
        assert len(read) < 10


def test_a_download_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def fetch(name: str) -> Path:
        assert release.wait(20)
        raise ModelLoadError("not there")

    with ModelWorker() as worker:
        worker.load("neuroscope-tiny")
        monkeypatch.setattr("mlx_hooks.loading.fetch", fetch)
        client = create_app(worker).test_client()
        address = client.post("/v1/models/load", json={"model_path": "owner/name", "background": True}).headers[
            "Location"
        ]
        assert client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 2}).status_code == 200
        until(lambda: client.get(address).get_json()["message"] == "downloading")
        release.set()
        assert follow(client, address)[-1]["error"]["message"] == "not there"


def test_downloads_take_no_turns_are_shared_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    release, fetched = threading.Event(), []

    def fetch(name: str) -> Path:
        fetched.append(name)
        assert release.wait(30)
        raise ModelLoadError("not there")

    with ModelWorker() as worker:
        worker.load("neuroscope-tiny")
        monkeypatch.setattr("mlx_hooks.loading.fetch", fetch)
        client = create_app(worker).test_client()

        def load(name: str) -> str:
            reply = client.post("/v1/models/load", json={"model_path": name, "background": True})
            return str(reply.headers["Location"])

        jobs = [load(f"owner/model{i}") for i in range(4)]
        again = [load("owner/model0") for _ in range(20)]
        # More downloads than jobs may run at a time: a generation goes on all the same.
        assert client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 2}).status_code == 200
        until(lambda: len(fetched) == 4)
        assert follow(client, load("owner/one-too-many"))[-1]["error"]["code"] == "busy"
        for address in again:
            client.delete(address)
            assert follow(client, address)[-1]["status"] == "cancelled"
        assert len(fetched) == 4
        release.set()
        assert [follow(client, address)[-1]["error"]["message"] for address in jobs] == ["not there"] * 4


def test_a_model_that_brings_code_is_refused_and_the_code_is_not_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m")
    marker = tmp_path / "ran"
    (folder / "model.py").write_text(f"open({str(marker)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text()) | {"model_file": "model.py"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=r"its own code .*never run"):
        HookedModel.from_pretrained(folder)
    assert not marker.exists()


# The end


def test_a_running_request_may_end_within_the_grace() -> None:
    worker = ModelWorker(load=load_tiny, max_active=1).start()
    gate = Held(steps=2)
    running = worker.submit(gate)
    assert gate.begun.wait(10)
    waiting = [worker.submit(Held()) for _ in range(2)]
    worker.request_stop(grace=10)
    gate.let.release(2)
    assert worker.stop(grace=10)
    assert list(running.results()) == [0, 1]
    assert [job.status for job in waiting] == ["failed", "failed"]


def test_after_the_grace_a_running_request_is_cancelled(worker: ModelWorker) -> None:
    work = Held()
    job = worker.submit(work)
    assert work.begun.wait(10)
    began = time.monotonic()
    assert worker.stop(grace=0.3)
    assert 0.2 < time.monotonic() - began < 5
    assert work.closed.is_set()
    assert job.to_dict()["error"]["code"] == "stopping"


@pytest.mark.parametrize(("grace", "tokens"), [("20", 100), ("0.2", 1)])
def test_a_process_that_is_asked_to_stop_finishes_or_cancels(tmp_path: Path, grace: str, tokens: int) -> None:
    folder = save_tiny(tmp_path / "m")
    with server_process("--port", "0", "--model", str(folder), "--grace", grace) as process:
        url = url_of(process)
        count = 100 if tokens == 100 else 500
        body = {"messages": MESSAGES, "max_tokens": count, "temperature": 0, "stream": True}
        with requests.post(url + CHAT, json=body, stream=True, timeout=60) as reply:
            lines = reply.iter_lines(chunk_size=1)
            assert next(lines).startswith(b"data: ")
            os.kill(process.pid, signal.SIGTERM)
            rest = [line for line in lines if line]
        if tokens == 100:
            assert rest[-1] == b"data: [DONE]"
            assert json.loads(rest[-2][6:])["usage"]["completion_tokens"] == 100
        err = process.communicate(timeout=30)[1]
    assert process.returncode == 0, err


def test_jobs_are_shown_as_plain_json() -> None:
    job: Job[Any] = Job(lambda: iter([]), kind="call")  # type: ignore[arg-type, return-value]
    assert json.loads(json.dumps(job.to_dict(3)))["message"] == "3 before it"


def test_users_of_one_address_take_turns(client: FlaskClient, worker: ModelWorker) -> None:
    for user in ("first", "second", None):
        client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 1, "user": user})
    callers = [job.caller for job in worker._book.values() if job.kind == "chat.completion"]
    assert callers == [("127.0.0.1", "first"), ("127.0.0.1", "second"), ("127.0.0.1", "")]
