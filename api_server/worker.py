"""The worker: one thread that owns every model and runs all MLX work, a step of one job after a step of another.

A job is a generator. The worker steps it and puts what it yields into the job's own queue, so it never waits for a
reader; the reader takes the results in another thread. A job whose reader has gone is closed at its next step.

    worker = ModelWorker()
    worker.start()
    worker.load("neuroscope-tiny")
    for step in worker.submit(lambda: generation(worker.get(), request)).results(): ...

Several jobs run at a time, each a token in turn, so a short request does not wait for the end of a long one; each
computes what it would compute alone. ``schedule.py`` says whose turn it is.
"""

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_hooks import HookedModel, loading

from .errors import ApiError, Busy, Cancelled, Stopping, UnknownJob
from .jobs import Job, Progress, Work
from .models import LoadedModel, LoadedModels
from .schedule import Schedule
from .schemas.fields import MODEL_ID_RULE, is_model_id

log = logging.getLogger("api_server.worker")

T = TypeVar("T")

REMEMBERED_JOBS = 500
REMEMBERED_BRIEF_JOBS = 50
REMEMBERED_SECONDS = 3600.0
REMEMBERED_BYTES = 256 * 2**20
"""Of results, as JSON; the oldest make room."""
IDLE_SECONDS = 0.05
MAX_DOWNLOADS = 4


class ModelWorker:
    """The only place that runs a forward pass.

    >>> worker = ModelWorker()
    >>> worker.start()
    >>> worker.load("neuroscope-tiny").model_id
    'neuroscope-tiny'
    >>> worker.call(lambda: worker.get().model.generate("the cat").text)

    Args:
        load: makes a model from a path or name; runs on the worker thread. By default mlx-lm's loader, step by step.
        max_queued: how many jobs may wait; one more raises ``Busy``.
        max_active: how many jobs run at a time, token by token in turn.
        max_model_bytes: how many bytes of weights may be loaded; the models used longest ago make room.
    """

    def __init__(
        self,
        load: Callable[[str], HookedModel] | None = None,
        max_queued: int = 64,
        max_active: int = 4,
        max_model_bytes: int | None = None,
    ) -> None:
        self.max_queued = max_queued
        self.max_active = max_active
        self.loaded = LoadedModels(max_model_bytes)
        self._load = load
        self._downloads = _Downloads()
        self._schedule = Schedule(max_queued, max_active)
        self._book: dict[str, Job[Any]] = {}
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._stop_at = 0.0
        self._thread = threading.Thread(target=self._run, name="model-worker", daemon=True)

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> "ModelWorker":
        self._thread.start()
        return self

    def request_stop(self, grace: float = 0.0) -> None:
        """Begin to stop without waiting; takes no lock, so a signal handler may call it.

        Args:
            grace: seconds that running jobs have to end by themselves. Called again, the shorter time counts.
        """
        until = time.monotonic() + grace
        self._stop_at = min(self._stop_at, until) if self._stopping.is_set() else until
        self._stopping.set()

    def wait_for_stop(self, timeout: float) -> None:
        """Wait until somebody asks the worker to stop, then until its thread has ended.

        Args:
            timeout: how long to wait for it after the grace.
        """
        self._stopping.wait()
        while self._thread.is_alive() and time.monotonic() < self._stop_at + timeout:
            self._thread.join(0.05)

    def stop(self, timeout: float = 10.0, grace: float = 0.0) -> bool:
        """Refuse the waiting jobs, let the running ones end for a while, cancel them, end the thread.

        Returns:
            False if the thread is still busy ``timeout`` seconds after the grace.
        """
        self.request_stop(grace)
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout + grace)
        return not self._thread.is_alive()

    def __enter__(self) -> "ModelWorker":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- work ---------------------------------------------------------------------------------------------------------

    def submit(self, work: Work[T], **about: Any) -> Job[T]:
        """Queue a generator function; its results are read from the job.

        Args:
            about: what else a ``Job`` takes: kind, model, caller, request_id, brief, render.

        Raises:
            Busy: ``max_queued`` jobs are waiting already.
            Stopping: the worker no longer takes work.
        """
        job: Job[T] = Job(work, **about)
        with self._changed:
            if self._stopping.is_set():
                raise Stopping
            self._schedule.add(job)
            self._remember(job)
            self._changed.notify()
        return job

    def call(self, function: Callable[[], T], reader_gone: Callable[[], bool] = lambda: False, **about: Any) -> T:
        """Run one short function on the worker thread and return what it returns."""

        def work() -> Generator[T | Progress, None, None]:
            yield function()

        return self.submit(work, brief=True, **about).result(reader_gone)

    def job(self, job_id: str) -> Job[Any]:
        """A job that runs, waits or ended a while ago.

        Raises:
            UnknownJob: it was never there or has been forgotten.
        """
        with self._changed:
            if job_id not in self._book:
                raise UnknownJob(job_id)
            return self._book[job_id]

    def jobs(self) -> list[dict[str, Any]]:
        """All jobs that are remembered, the newest first, as plain data without their results."""
        with self._changed:
            return [self._shown(job, with_result=False) for job in reversed(self._book.values())]

    def shown(self, job: Job[Any]) -> dict[str, Any]:
        """One job as plain data, with its place in the queue."""
        with self._changed:
            return self._shown(job)

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Cancel a job at its next step, and answer it as it stands then; one that has ended stays as it is.

        Raises:
            UnknownJob: it was never there or has been forgotten.
        """
        job = self.job(job_id)
        job.cancel(f"The job {job_id} was cancelled.")
        with self._changed:
            if self._schedule.take_out(job):
                job.finish(Cancelled(f"The job {job_id} was cancelled before it began."))
            return self._shown(job)

    def _shown(self, job: Job[Any], **how: bool) -> dict[str, Any]:
        return job.to_dict(self._schedule.ahead_of(job), **how)

    def _remember(self, job: Job[Any]) -> None:
        self._book[job.id] = job
        horizon = time.time() - REMEMBERED_SECONDS
        # What takes one turn is asked for often, and seldom asked about.
        for brief, most in ((False, REMEMBERED_JOBS), (True, REMEMBERED_BRIEF_JOBS)):
            ended = [one for one in self._book.values() if one.brief is brief and one.finished is not None]
            for i, old in enumerate(ended):
                if len(ended) - i > most or (old.finished or 0) < horizon:
                    del self._book[old.id]
        kept = sum(one.nbytes for one in self._book.values())
        for old in [one for one in self._book.values() if one.nbytes and one.is_finished]:
            if kept <= REMEMBERED_BYTES:
                break
            kept -= old.nbytes
            del self._book[old.id]

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if job.step():
                with self._changed:
                    self._schedule.again(job)
            # A finished job must not keep a large capture alive while nothing is asked.
            del job
        with self._changed:
            for job in self._schedule.jobs:
                job.finish(Stopping())
        # MLX keeps streams per thread; left to the thread's own end, their cleanup can abort the interpreter's exit.
        mx.clear_streams()

    def _next(self) -> Job[Any] | None:
        """The job whose turn it is; None when the thread is to end."""
        with self._changed:
            while True:
                if self._stopping.is_set():
                    for waiting in self._schedule.take_all_waiting():
                        waiting.finish(Stopping())
                    if not self._schedule.is_running or time.monotonic() >= self._stop_at:
                        return None
                if (job := self._schedule.next()) is not None:
                    return job
                # The timeout lets request_stop get by without taking this lock.
                self._changed.wait(timeout=IDLE_SECONDS if self._schedule.is_running else 0.2)

    # -- models -------------------------------------------------------------------------------------------------------

    def load(self, path: str, model_id: str | None = None) -> LoadedModel:
        """Load a model, wait for it, and make it the default; a model of the same id is replaced, with its hooks.

        Args:
            path: a directory, or a name that the loader knows.
            model_id: the id for requests; the path's last component if None.

        Raises:
            ModelLoadError: there is no such model or it cannot be read; what was loaded before stays.
            NoRoomForModel: it needs more memory than models may take.
            ApiError: its id cannot stand in an address.
        """
        return self.submit(lambda: self.loading(path, model_id), kind="load").result()

    def loading(self, path: str, model_id: str | None = None) -> Generator["LoadedModel | Progress", None, None]:
        """The work of ``load``: yields progress, then the model."""
        name = _own_name(path) if model_id is None else model_id
        folder = model = None
        if self._load is None:
            folder = yield from self._downloads.fetched(path)
        else:
            model = self._load(path)
        if not is_model_id(name):
            raise ApiError(
                400,
                f"The model cannot be called {name!r}: give a model_id of {MODEL_ID_RULE}.",
                code="invalid_value",
                param="model_id",
            )
        steps = _Result(loading.load_steps(folder, path)) if folder is not None else None
        # Nothing is read yet when the first step says how much there is.
        first = next(iter(steps)) if steps is not None else None
        nbytes = first.nbytes if first is not None else _weight_bytes(model)
        with self._changed:
            in_use = [job.model for job in self._schedule.jobs if job.model is not None]
        with self.loaded.room(nbytes, in_use) as gone:
            if gone:
                log.info("unloaded %s to make room", ", ".join(gone))
                _release()
            if steps is not None:
                for progress in steps:
                    yield Progress(progress.fraction, progress.message)
                model = HookedModel(*steps.result)
            assert model is not None
            # What errors call it.
            model.model_name = name
            loaded = LoadedModel(name, path, model, int(time.time()), _weight_bytes(model))
            self.loaded.put(loaded)
        _release()
        yield loaded

    def unload(self, model_id: str) -> None:
        """Forget a model; a job that already has it runs to its end.

        Raises:
            UnknownModel: lists the loaded ones.
        """

        def work() -> None:
            self.loaded.remove(model_id)
            _release()

        self.call(work)

    def get(self, model_id: str | None = None) -> LoadedModel:
        """A loaded model; the one loaded last if no id is given. See ``LoadedModels.get``."""
        return self.loaded.get(model_id)

    def models(self) -> list[LoadedModel]:
        """All loaded models, the one loaded last at the end."""
        return self.loaded.all()


def _release() -> None:
    """Give back the memory of what nobody refers to: modules refer to each other in circles."""
    gc.collect()
    mx.clear_cache()


def _weight_bytes(model: HookedModel | None) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.model.parameters())) if model is not None else 0


class _Result(Iterator[Any]):
    """The steps of a generator, and what it returned once they are through."""

    def __init__(self, steps: Generator[Any, None, Any]) -> None:
        self._steps = steps
        self.result: Any = None

    def __next__(self) -> Any:
        try:
            return next(self._steps)
        except StopIteration as end:
            self.result = end.value
            raise


class _Downloads:
    """Models on their way from a hub, each once, in threads of their own: that takes no MLX, and long.

    One that nobody waits for any more goes on: what it fetches stays in the hub's cache.
    """

    def __init__(self) -> None:
        self._running: dict[str, Future[Path]] = {}

    def fetched(self, name: str) -> Generator[Progress, None, Path]:
        """The folder of a model, downloaded if need be. On the worker thread only.

        Raises:
            Busy: as many are on their way as may be.
        """
        if not loading.is_remote(name):
            return loading.fetch(name)
        self._running = {other: future for other, future in self._running.items() if not future.done()}
        if name not in self._running:
            if len(self._running) >= MAX_DOWNLOADS:
                raise Busy(len(self._running), "downloads are under way")
            future: Future[Path] = Future()
            threading.Thread(target=_fetch, args=(name, future), name="model-download", daemon=True).start()
            self._running[name] = future
        future = self._running[name]
        while not future.done():
            yield Progress(None, "downloading", idle=True)
        return future.result()


def _fetch(name: str, outcome: Future[Path]) -> None:
    try:
        outcome.set_result(loading.fetch(name))
    except BaseException as error:
        outcome.set_exception(error)


def _own_name(path: str) -> str:
    """The last component: ``owner/tiny/`` -> ``tiny``; ``.`` is what the current folder is called."""
    return Path(os.path.normpath(Path.cwd() / path)).name
