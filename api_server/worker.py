"""The worker: one thread that owns every model and runs all MLX work, a step of one job after a step of another.

A job is a generator. The worker steps it and puts what it yields into the job's own queue, so it never waits for a
reader; the reader takes the results in another thread. A job whose reader has gone is closed at its next step.

    worker = ModelWorker()
    worker.start()
    worker.load("neuroscope-tiny")
    for step in worker.submit(lambda: generation(worker.get(), request)).results(): ...

Several jobs run at a time, each a token in turn, so a short request does not wait for the end of a long one; each
computes what it would compute alone. The others wait, and the one that is taken next is of the caller who has least
running, then of the one who was served longest ago.
"""

import gc
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_hooks import HookedModel, loading

from .errors import ApiError, Busy, Cancelled, Stopping, UnknownJob
from .jobs import Job, Progress, Work
from .models import LoadedModel, LoadedModels
from .schemas.fields import MODEL_ID_RULE, is_model_id

log = logging.getLogger("api_server.worker")

T = TypeVar("T")

REMEMBERED_JOBS = 500
REMEMBERED_SECONDS = 3600.0
IDLE_SECONDS = 0.05


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
        self._waiting: deque[Job[Any]] = deque()
        self._active: deque[Job[Any]] = deque()
        self._book: dict[str, Job[Any]] = {}
        self._served: dict[str, int] = {}
        self._idle_turns = 0
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
            waiting = [other for other in self._waiting if not other.cancelled]
            if len(waiting) >= self.max_queued:
                raise Busy(len(waiting))
            self._waiting.append(job)
            self._remember(job)
            self._changed.notify()
        return job

    def call(self, function: Callable[[], T], reader_gone: Callable[[], bool] = lambda: False, **about: Any) -> T:
        """Run one short function on the worker thread and return what it returns."""

        def work() -> Generator[T | Progress, None, None]:
            yield function()

        return next(self.submit(work, brief=True, **about).results(reader_gone))

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
        """All jobs that are remembered, the newest first, as plain data."""
        with self._changed:
            return [self._shown(job) for job in reversed(self._book.values())]

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
        job.cancel(Cancelled(f"The job {job_id} was cancelled."))
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.finish(Cancelled(f"The job {job_id} was cancelled before it began."))
            return self._shown(job)

    def _shown(self, job: Job[Any]) -> dict[str, Any]:
        return job.to_dict(self._waiting.index(job) if job in self._waiting else None)

    def _remember(self, job: Job[Any]) -> None:
        self._book[job.id] = job
        finished = [one for one in self._book.values() if one.finished is not None]
        horizon = time.time() - REMEMBERED_SECONDS
        for i, old in enumerate(finished):
            if len(finished) - i > REMEMBERED_JOBS or (old.finished or 0) < horizon:
                del self._book[old.id]

    def _run(self) -> None:
        while (job := self._next()) is not None:
            more = job.step()
            self._idle_turns = self._idle_turns + 1 if more and job.progress.idle else 0
            if more:
                self._active.append(job)
            # A finished job must not keep a large capture alive while nothing is asked.
            del job
        with self._changed:
            for job in (*self._active, *self._waiting):
                job.finish(Stopping())
            self._active.clear()
            self._waiting.clear()
        # MLX keeps streams per thread; left to the thread's own end, their cleanup can abort the interpreter's exit.
        mx.clear_streams()

    def _next(self) -> Job[Any] | None:
        """The job whose turn it is; None when the thread is to end."""
        with self._changed:
            while True:
                if self._stopping.is_set():
                    for job in self._waiting:
                        job.finish(Stopping())
                    self._waiting.clear()
                    if not self._active or time.monotonic() >= self._stop_at:
                        return None
                self._begin_waiting()
                if self._active and self._idle_turns < len(self._active):
                    return self._active.popleft()
                # The timeout lets request_stop get by without taking this lock.
                self._changed.wait(timeout=IDLE_SECONDS if self._active else 0.2)
                self._idle_turns = 0

    def _begin_waiting(self) -> None:
        """Let waiting jobs into the round: brief ones at once, the others as far as there is room, by caller."""
        for job in [job for job in self._waiting if job.cancelled or job.brief]:
            self._waiting.remove(job)
            # A cancelled one has its turn too: that ends it.
            self._active.appendleft(job)
        while self._waiting and sum(not job.brief for job in self._active) < self.max_active:
            running = [job.caller for job in self._active]
            job = min(self._waiting, key=lambda job: (running.count(job.caller), self._served.get(job.caller, 0)))
            self._waiting.remove(job)
            self._served[job.caller] = max(self._served.values(), default=0) + 1
            if len(self._served) > 10 * REMEMBERED_JOBS:
                del self._served[min(self._served, key=self._served.__getitem__)]
            self._active.append(job)

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
        return next(self.submit(lambda: self.loading(path, model_id), kind="load").results())

    def loading(self, path: str, model_id: str | None = None) -> Generator["LoadedModel | Progress", None, None]:
        """The work of ``load``: yields progress, then the model."""
        name = _own_name(path) if model_id is None else model_id
        folder = model = None
        if self._load is None:
            folder = yield from _fetched(path)
        else:
            model = self._load(path)
        if not is_model_id(name):
            raise ApiError(
                400,
                f"The model cannot be called {name!r}: give a model_id of {MODEL_ID_RULE}.",
                code="invalid_value",
                param="model_id",
            )
        if folder is not None:
            self._make_room(loading.weight_bytes(folder))
            steps = _Result(loading.load_steps(folder, path))
            for progress in steps:
                yield Progress(progress.fraction, progress.message)
            model = HookedModel(*steps.result)
        assert model is not None
        nbytes = sum(array.nbytes for _, array in tree_flatten(model.model.parameters()))
        # Again, since weights in memory may be larger than their files; and others may have been loaded meanwhile.
        self._make_room(nbytes)
        loaded = LoadedModel(name, path, model, int(time.time()), nbytes)
        self.loaded.put(loaded)
        _release()
        yield loaded

    def _make_room(self, nbytes: int) -> None:
        with self._changed:
            in_use = [job.model for job in (*self._active, *self._waiting) if job.model is not None]
        gone = self.loaded.make_room(nbytes, in_use)
        if gone:
            log.info("unloaded %s to make room", ", ".join(gone))
            _release()

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


class _Result:
    """The steps of a generator, and what it returned once they are through."""

    def __init__(self, steps: Generator[Any, None, Any]) -> None:
        self._steps = steps

    def __iter__(self) -> Generator[Any, None, None]:
        self.result = yield from self._steps


def _fetched(name: str) -> Generator[Progress, None, Path]:
    """The folder of a model, downloaded if need be: in a thread of its own, since that takes no MLX and long."""
    if not loading.is_remote(name):
        return loading.fetch(name)
    outcome: Future[Path] = Future()

    def fetch() -> None:
        try:
            outcome.set_result(loading.fetch(name))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=fetch, name="model-download", daemon=True).start()
    while not outcome.done():
        yield Progress(None, "downloading", idle=True)
    return outcome.result()


def _own_name(path: str) -> str:
    """The last component: ``owner/tiny/`` -> ``tiny``; ``.`` is what the current folder is called."""
    return Path(os.path.normpath(Path.cwd() / path)).name
