"""Long computations beside the worker: they end, wait, take turns and can be left."""

import itertools
import threading
import time
from collections.abc import Iterator

import pytest
from server_tools import load_tiny, until

from api_server import ModelWorker
from api_server.aside import Aside, Report
from api_server.errors import Stopping


@pytest.fixture
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load_tiny) as worker:
        yield worker


def count(progress: Report) -> int:
    for i in range(5):
        progress(i, 5)
    return threading.get_ident()


def endless(progress: Report) -> None:
    while True:
        time.sleep(0.005)
        progress(1, 4)


@pytest.mark.parametrize("way", ["beside", "in_turns"])
def test_a_function_answers_from_a_thread_of_its_own(worker: ModelWorker, way: str) -> None:
    aside = Aside()
    thread = worker.submit(lambda: getattr(aside, way)(count)).result()
    assert thread not in (threading.get_ident(), worker.call(threading.get_ident))


@pytest.mark.parametrize("way", ["beside", "in_turns"])
def test_its_error_is_the_jobs(worker: ModelWorker, way: str) -> None:
    def fail(progress: Report) -> None:
        progress(0, 1)
        raise ValueError("seven")

    with pytest.raises(ValueError, match="seven"):
        worker.submit(lambda: getattr(Aside(), way)(fail)).result()


@pytest.mark.parametrize("way", ["beside", "in_turns"])
def test_a_job_that_is_cancelled_ends_its_thread(worker: ModelWorker, way: str) -> None:
    aside, ended, handled = Aside(), threading.Event(), []

    def function(progress: Report) -> None:
        try:
            endless(progress)
        except Exception as error:
            # What an analysis does with errors of its own must not keep it going.
            handled.append(error)
        finally:
            ended.set()

    job = worker.submit(lambda: getattr(aside, way)(function))
    until(lambda: worker.shown(job)["fraction"] == 0.25)
    assert worker.shown(job)["message"] == "1 of 4"
    worker.cancel(job.id)
    assert ended.wait(5)
    assert not handled
    until(lambda: job.status == "cancelled")
    assert aside.close(5)


def test_the_worker_serves_others_meanwhile(worker: ModelWorker) -> None:
    go, aside = threading.Event(), Aside()

    def function(progress: Report) -> str:
        go.wait(10)
        return "late"

    job = worker.submit(lambda: aside.beside(function))
    until(lambda: job.status == "running")
    assert worker.call(lambda: "at once") == "at once"
    assert not job.is_finished
    go.set()
    assert job.result() == "late"


def test_only_so_many_compute_at_a_time(worker: ModelWorker) -> None:
    aside, lock, running, most, go = Aside(most=2), threading.Lock(), [0], [0], threading.Event()

    def function(progress: Report) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        go.wait(10)
        with lock:
            running[0] -= 1

    jobs = [worker.submit(lambda: aside.beside(function)) for _ in range(6)]
    until(lambda: sum(worker.shown(job)["message"] == "waiting for another analysis" for job in jobs) == 4)
    go.set()
    for job in jobs:
        job.result()
    assert most == [2]


def test_one_that_waits_and_is_cancelled_takes_no_place(worker: ModelWorker) -> None:
    aside, go = Aside(most=1), threading.Event()
    first = worker.submit(lambda: aside.beside(lambda progress: go.wait(10)))
    until(lambda: first.status == "running")
    waiting = worker.submit(lambda: aside.beside(count))
    until(lambda: worker.shown(waiting)["message"] == "waiting for another analysis")
    worker.cancel(waiting.id)
    until(lambda: waiting.status == "cancelled")
    go.set()
    first.result()
    assert worker.submit(lambda: aside.beside(count)).result()


def test_in_turns_it_computes_only_while_the_worker_waits(worker: ModelWorker) -> None:
    aside, log = Aside(), []

    def function(progress: Report) -> None:
        for i in range(20):
            log.append("in")
            time.sleep(0.002)
            log.append("out")
            progress(i, 20)

    def other() -> Iterator[str]:
        for _ in range(20):
            log.append("other")
            time.sleep(0.002)
            yield "step"

    jobs = [worker.submit(lambda: aside.in_turns(function)), worker.submit(other)]
    for job in jobs:
        job.result()
    assert log.count("other") == log.count("in") == 20
    pairs = list(itertools.pairwise(log))
    assert ("in", "other") not in pairs
    assert ("out", "other") in pairs


def test_what_holds_a_lock_keeps_its_turn(worker: ModelWorker) -> None:
    aside, lock, holds = Aside(), threading.Lock(), []

    def function(progress: Report) -> None:
        with lock:
            holds.append(True)
            progress(1, 2)
            time.sleep(0.01)
            holds.clear()
        progress(2, 2)

    def other() -> Iterator[None]:
        for _ in range(10):
            assert lock.acquire(timeout=1)
            lock.release()
            yield None

    jobs = [worker.submit(lambda: aside.in_turns(function, lambda: bool(holds))), worker.submit(other)]
    for job in jobs:
        job.result()


def test_a_model_computes_the_same_there(worker: ModelWorker) -> None:
    model = worker.load("llama").model

    def function(progress: Report) -> list[float]:
        found = []
        for i in range(3):
            progress(i, 3)
            logits, _ = model.run_with_cache([1, 2, 3], "blocks.0.hook_resid_post")
            found.append(logits.sum().item())
        return found

    plain = worker.call(lambda: function(lambda done, total: None))
    turned = worker.submit(lambda: Aside().in_turns(function, lambda: model.instrument.is_attached)).result()
    assert turned == plain


def test_a_thread_that_attaches_hooks_holds_the_model(worker: ModelWorker) -> None:
    model = worker.load("llama").model
    seen = []
    assert not model.instrument.is_attached
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda value, point: None)]):
        assert model.instrument.is_attached
        other = threading.Thread(target=lambda: seen.append(model.instrument.is_attached))
        other.start()
        other.join()
    assert seen == [False]
    assert not model.instrument.is_attached


def test_closing_leaves_what_computes(worker: ModelWorker) -> None:
    aside = Aside()
    worker.submit(lambda: aside.beside(endless))
    until(lambda: len(aside._threads) == 1)
    assert aside.close(5)
    assert not aside._threads


@pytest.mark.parametrize("way", ["beside", "in_turns"])
def test_what_is_left_without_being_cancelled_is_stopping(worker: ModelWorker, way: str) -> None:
    aside = Aside()
    job = worker.submit(lambda: getattr(aside, way)(endless))
    until(lambda: worker.shown(job)["fraction"] == 0.25)
    assert aside.close(5)
    with pytest.raises(Stopping):
        job.result()


def test_the_worker_goes_on_while_another_thread_holds_what_a_turn_waits_for(worker: ModelWorker) -> None:
    aside, lock, holder = Aside(), threading.Lock(), [0]

    def function(progress: Report) -> str:
        progress(0, 2)
        with lock:
            return "done"

    with lock:
        # As it would be if it were taken between the look and the turn.
        job = worker.submit(lambda: aside.in_turns(function, holder=lambda: holder[0] or None))
        until(lambda: len(aside._threads) == 1)
        time.sleep(0.05)
        holder[0] = threading.get_ident()
        assert worker.call(lambda: "at once") == "at once"
        until(lambda: "another thread" in worker.shown(job)["message"])
    holder[0] = 0
    assert job.result() == "done"
