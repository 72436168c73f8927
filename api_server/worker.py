"""The worker: one thread that owns every model and runs all MLX work, one job after the other.

A job is a generator. The worker steps it and puts what it yields into the job's own queue, so it never waits for a
reader; the reader takes the results in another thread. A job whose reader has gone is closed at its next step.

    worker = ModelWorker()
    worker.start()
    worker.load("neuroscope-tiny")
    for step in worker.submit(lambda: generation(worker.get(), request)).results(): ...
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import mlx.core as mx

from mlx_hooks import HookedModel, HookSpec

from .errors import ApiError, Busy, Cancelled, NoModelLoaded, Stopping, UnknownHook, UnknownModel
from .schemas.requests import MODEL_ID_RULE, is_model_id

log = logging.getLogger("api_server.worker")

T = TypeVar("T")
Work = Callable[[], Generator[T, None, None]]

LOOK_FOR_READER_SECONDS = 0.25


class Job(Generic[T]):
    """One piece of work: a generator that the worker steps, and the results it has yielded so far.

    What a generation can put here is bounded by its ``max_tokens``, so the queue needs no bound of its own.
    """

    def __init__(self, work: Work[T]) -> None:
        self.work = work
        self._outcomes: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop at the next step; safe from any thread, at any time, more than once."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def put(self, result: T) -> None:
        self._outcomes.put(("result", result))

    def finish(self, error: BaseException | None = None) -> None:
        self._outcomes.put(("end", error))

    def results(self, reader_gone: Callable[[], bool] = lambda: False) -> Iterator[T]:
        """What the work yields, as it comes; what it raises is raised here.

        Args:
            reader_gone: asked now and then while waiting; once true, the job is cancelled.

        Raises:
            Cancelled: the reader has gone.
            Stopping: the worker was stopped first.
        """
        try:
            while True:
                if reader_gone():
                    raise Cancelled
                try:
                    kind, value = self._outcomes.get(timeout=LOOK_FOR_READER_SECONDS)
                except Empty:
                    continue
                if kind == "result":
                    yield value
                elif value is not None:
                    raise value
                else:
                    return
        finally:
            self.cancel()


@dataclass
class LoadedModel:
    """A model under the id that requests use, with the hooks that were registered for it.

    Only code that runs on the worker thread may compute with ``model``; its configuration, its hook points and the
    check of hook specs against them are plain data that any thread may use.
    """

    model_id: str
    path: str
    model: HookedModel
    created: int
    hooks: dict[str, HookSpec] = field(default_factory=dict)


class ModelWorker:
    """The only place that runs a forward pass.

    >>> worker = ModelWorker()
    >>> worker.start()
    >>> worker.load("neuroscope-tiny").model_id
    'neuroscope-tiny'
    >>> worker.call(lambda: worker.get().model.generate("the cat").text)

    Args:
        load: makes a model from a path or name; runs on the worker thread.
        max_queued: how many jobs may wait; one more raises ``Busy``.
    """

    def __init__(self, load: Callable[[str], HookedModel] = HookedModel.from_pretrained, max_queued: int = 64) -> None:
        self.max_queued = max_queued
        self._load = load
        self._models: dict[str, LoadedModel] = {}
        self._waiting: deque[Job[Any]] = deque()
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model-worker", daemon=True)

    # -- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> "ModelWorker":
        self._thread.start()
        return self

    def request_stop(self) -> None:
        """Begin to stop without waiting; takes no lock, so a signal handler may call it."""
        self._stopping.set()

    def stop(self, timeout: float = 10.0) -> bool:
        """Cancel the running job at its next step, refuse the waiting ones, end the thread.

        Returns:
            False if the thread is still busy after ``timeout`` seconds.
        """
        self.request_stop()
        with self._changed:
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def __enter__(self) -> "ModelWorker":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- work ---------------------------------------------------------------------------------------------------------

    def submit(self, work: Work[T]) -> Job[T]:
        """Queue a generator function; its results are read from the job.

        Raises:
            Busy: ``max_queued`` jobs are waiting already.
            Stopping: the worker no longer takes work.
        """
        job = Job(work)
        with self._changed:
            if self._stopping.is_set():
                raise Stopping
            waiting = [other for other in self._waiting if not other.cancelled]
            if len(waiting) >= self.max_queued:
                raise Busy(len(waiting))
            self._waiting = deque([*waiting, job])
            self._changed.notify()
        return job

    def call(self, function: Callable[[], T], reader_gone: Callable[[], bool] = lambda: False) -> T:
        """Run one function on the worker thread and return what it returns."""

        def work() -> Generator[T, None, None]:
            yield function()

        return next(self.submit(work).results(reader_gone))

    def _run(self) -> None:
        while (job := self._next()) is not None:
            error = self._step_through(job)
            job.finish(error)
            # The last frame must not keep a large capture alive while nothing is asked.
            del job, error
        with self._changed:
            for job in self._waiting:
                job.finish(Stopping())
            self._waiting.clear()
        # MLX keeps streams per thread; left to the thread's own end, their cleanup can abort the interpreter's exit.
        mx.clear_streams()

    def _next(self) -> Job[Any] | None:
        with self._changed:
            # The timeout lets request_stop get by without taking this lock.
            while not self._waiting and not self._stopping.is_set():
                self._changed.wait(timeout=0.2)
            return None if self._stopping.is_set() else self._waiting.popleft()

    def _step_through(self, job: Job[Any]) -> BaseException | None:
        """Run a job to its end; whatever it raises belongs to its reader, never to this thread."""
        if job.cancelled:
            return Cancelled()
        try:
            steps = job.work()
            try:
                for result in steps:
                    if self._stopping.is_set():
                        return Stopping()
                    if job.cancelled:
                        return Cancelled()
                    job.put(result)
            finally:
                steps.close()
        except BaseException as error:
            return error
        return None

    # -- models -------------------------------------------------------------------------------------------------------

    def load(self, path: str, model_id: str | None = None) -> LoadedModel:
        """Load a model and make it the default; a model of the same id is replaced, with its hooks.

        Args:
            path: a directory, or a name that the loader knows.
            model_id: the id for requests; the path's last component if None.

        Raises:
            ModelLoadError: there is no such model or it cannot be read; what was loaded before stays.
            ApiError: its id cannot stand in an address.
        """
        name = _own_name(path) if model_id is None else model_id

        def work() -> LoadedModel:
            loaded = LoadedModel(name, path, self._load(path), int(time.time()))
            if not is_model_id(name):
                raise ApiError(
                    400,
                    f"The model cannot be called {name!r}: give a model_id of {MODEL_ID_RULE}.",
                    code="invalid_value",
                    param="model_id",
                )
            with self._changed:
                self._models.pop(name, None)
                self._models[name] = loaded
            return loaded

        return self.call(work)

    def unload(self, model_id: str) -> None:
        """Forget a model; a job that already has it runs to its end.

        Raises:
            UnknownModel: lists the loaded ones.
        """

        def work() -> None:
            with self._changed:
                if self._models.pop(model_id, None) is None:
                    raise UnknownModel(model_id, list(self._models))

        self.call(work)

    def get(self, model_id: str | None = None) -> LoadedModel:
        """A loaded model; the one loaded last if no id is given.

        Raises:
            UnknownModel: lists the loaded ones.
            NoModelLoaded: there is none at all.
        """
        models = self.models()
        if model_id is None:
            if not models:
                raise NoModelLoaded
            return models[-1]
        for loaded in models:
            if loaded.model_id == model_id:
                return loaded
        raise UnknownModel(model_id, [loaded.model_id for loaded in models])

    def models(self) -> list[LoadedModel]:
        """All loaded models, the one loaded last at the end."""
        with self._changed:
            return list(self._models.values())

    # -- registered hooks ---------------------------------------------------------------------------------------------

    def register_hooks(self, specs: list[HookSpec], model_id: str | None = None) -> list[str]:
        """Keep hooks for a model, after a check against it; one with a known id takes that one's place.

        Raises:
            HookError: an unknown layer or component, or two specs of one id; nothing was registered.
        """
        loaded = self.get(model_id)
        ids = loaded.model.resolve_hooks(specs).hook_ids
        with self._changed:
            # A new dict: a request that is reading the old one must not see half of this.
            loaded.hooks = loaded.hooks | {spec.hook_id: spec for spec in specs}
        return ids

    def clear_hooks(self, model_id: str | None = None) -> None:
        """Forget the hooks of one model, or of all."""
        for loaded in self.models() if model_id is None else [self.get(model_id)]:
            loaded.hooks = {}

    def remove_hook(self, hook_id: str, model_id: str | None = None) -> None:
        """Forget one hook, in one model or wherever it is registered.

        Raises:
            UnknownHook: lists those that are registered.
        """
        models = self.models() if model_id is None else [self.get(model_id)]
        with self._changed:
            having = [loaded for loaded in models if hook_id in loaded.hooks]
            if not having:
                raise UnknownHook(hook_id, sorted({known for loaded in models for known in loaded.hooks}))
            for loaded in having:
                loaded.hooks = {known: spec for known, spec in loaded.hooks.items() if known != hook_id}


def _own_name(path: str) -> str:
    """The last component: ``owner/tiny/`` -> ``tiny``; ``.`` is what the current folder is called."""
    return Path(os.path.normpath(Path.cwd() / path)).name
