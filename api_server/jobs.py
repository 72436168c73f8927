"""Jobs: pieces of work that the worker steps, what they have yielded so far, and the book that remembers them."""

import secrets
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import orjson

from neuroscope_bridge import payload

from .errors import Cancelled, describe, shown
from .models import LoadedModel

T = TypeVar("T")

LOOK_FOR_READER_SECONDS = 0.25
READER_GONE = "The request was cancelled because its connection was closed."
STATUSES = ("queued", "running", "completed", "failed", "cancelled")


@dataclass(frozen=True)
class Progress:
    """How far a job has come. A job that yields one has had its turn; a reader of its results does not see it.

    Args:
        fraction: 0 to 1; None where nobody knows.
        message: for a person: ``"12 of 100 tokens"``.
        idle: the job waits for something else than the worker.
    """

    fraction: float | None
    message: str
    idle: bool = False


Work = Callable[[], Generator[T | Progress, None, None]]


class Job(Generic[T]):
    """One piece of work: a generator that the worker steps, and the results it has yielded so far.

    What a generation can put here is bounded by its ``max_tokens``, so the queue needs no bound of its own.

    Args:
        work: makes the generator; called on the worker thread.
        kind: what it is, for those who look at the list: ``chat.completion``, ``load``.
        model: the model that it needs, which is not unloaded while the job lives.
        caller: who asked: an address, and a user there; the queue is fair among them.
        request_id: of the request that began it.
        brief: it takes one turn, in which it runs to its end.
        render: what ``to_dict`` shows as its result when nobody reads it: a job in the background.
    """

    def __init__(
        self,
        work: Work[T],
        *,
        kind: str = "call",
        model: LoadedModel | None = None,
        caller: tuple[str, str] = ("", ""),
        request_id: str | None = None,
        brief: bool = False,
        render: Callable[[T], dict[str, Any]] | None = None,
    ) -> None:
        self.id = f"job-{secrets.token_hex(12)}"
        self.kind, self.caller, self.brief, self.request_id = kind, caller, brief, request_id
        self.model = model
        self.model_id = model.model_id if model else None
        self.progress = Progress(None, "waiting")
        self.created = time.time()
        self.started: float | None = None
        self.finished: float | None = None
        self.status = "queued"
        self._work: Work[T] | None = work
        self._steps: Generator[T | Progress, None, None] | None = None
        self._is_background = render is not None
        self._render = render
        # As JSON: the same as objects takes many times the memory.
        self._result: bytes | None = None
        self._error: dict[str, Any] | None = None
        self._outcomes: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        # Why it is cancelled; not the exception, whose traceback would keep what its frames hold.
        self._cancelled: str | None = None
        self._is_read = True
        self._ended = threading.Lock()

    # -- for those who asked ------------------------------------------------------------------------------------------

    def cancel(self, why: str = READER_GONE) -> None:
        """Stop at the next step; safe from any thread, at any time, more than once."""
        self._cancelled = self._cancelled or why

    @property
    def cancelled(self) -> bool:
        return self._cancelled is not None

    @property
    def is_finished(self) -> bool:
        return self.finished is not None

    def results(self, reader_gone: Callable[[], bool] = lambda: False) -> Iterator[T]:
        """What the work yields, as it comes; what it raises is raised here.

        Args:
            reader_gone: asked now and then while waiting; once true, the job is cancelled.

        Raises:
            Cancelled: the reader has gone, or somebody cancelled the job.
            Stopping: the worker was stopped first.
        """
        try:
            while True:
                if reader_gone():
                    raise Cancelled(READER_GONE)
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
            self._is_read = False
            if not self.is_finished:
                self.cancel()
            self._drop()

    def result(self, reader_gone: Callable[[], bool] = lambda: False) -> T:
        """The last of its results, once the job has ended; raises what ``results`` does."""
        *_, last = self.results(reader_gone)
        return last

    @property
    def nbytes(self) -> int:
        """What is kept of its result."""
        return len(self._result or b"")

    def to_dict(self, ahead: int | None = None, *, with_result: bool = True) -> dict[str, Any]:
        """The job as plain JSON values; times are seconds since 1970.

        Args:
            ahead: how many jobs wait before it.
            with_result: whether its result is shown; else it is None.
        """
        message = self.progress.message if ahead is None else f"{ahead} before it" if ahead else "next"
        return {
            "id": self.id,
            "object": "job",
            "kind": self.kind,
            "model": self.model_id,
            "status": self.status,
            "fraction": 1.0 if self.status == "completed" else self.progress.fraction,
            "message": message if not self.is_finished else self.status,
            "cancelling": self.cancelled and not self.is_finished,
            "created": self.created,
            "started": self.started,
            "finished": self.finished,
            "request_id": self.request_id,
            "result": orjson.loads(self._result) if with_result and self._result is not None else None,
            "error": self._error,
        }

    # -- for the worker -----------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One turn, on the worker thread. Answers whether there is more to do.

        What the work raises goes to the reader.
        """
        if self._cancelled is not None:
            self.finish(Cancelled(self._cancelled))
            return False
        try:
            if self._steps is None:
                assert self._work is not None
                self.status, self.started = "running", time.time()
                self.progress = Progress(None, "running")
                self._steps = self._work()
            self._take(next(self._steps))
            while self.brief:
                self._take(next(self._steps))
        except StopIteration:
            self.finish()
            return False
        except BaseException as error:
            self.finish(error)
            return False
        return True

    def _take(self, result: T | Progress) -> None:
        if isinstance(result, Progress):
            self.progress = result
        elif self._render is not None:
            self._result = payload.dumps(self._render(result))
        elif self._cancelled is None:
            self._outcomes.put(("result", result))

    def finish(self, error: BaseException | None = None) -> None:
        """Close the work and tell the reader that there is no more, or why."""
        with self._ended:
            if self.is_finished:
                return
            try:
                if self._steps is not None:
                    self._steps.close()
            except BaseException as closing:
                error = error or closing
            self.status = "completed" if error is None else "cancelled" if isinstance(error, Cancelled) else "failed"
            if error is not None:
                # Whoever reads the results describes the error to its caller; in the background nobody does.
                tell = describe if self._is_background else shown
                self._error = tell(error, self.request_id or "-").body(self.request_id)["error"]
            # Neither a large capture nor a model stays alive for the book's sake.
            self._work = self._steps = self._render = self.model = None
            if self._cancelled is not None:
                self._drop()
            self.finished = time.time()
            if not self._is_background and self._is_read:
                self._outcomes.put(("end", error))

    def _drop(self) -> None:
        """Forget what nobody will read."""
        while True:
            try:
                self._outcomes.get_nowait()
            except Empty:
                return
