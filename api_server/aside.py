"""Long computations in threads of their own, each of which is a job of the worker: it shows how far they have come, and
can be cancelled.

    analyses = Aside(most=2)
    worker.submit(lambda: analyses.beside(count_rows), kind="interpret")       # while the worker does other things
    worker.submit(lambda: analyses.in_turns(ablate), kind="interpret")         # only when the worker gives it a turn

The function calls ``progress(done, total)``, its one argument, now and then. There it waits for its turn, and is left
by an exception when its job was cancelled.
"""

import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Generic, TypeVar

import mlx.core as mx

from .errors import Stopping
from .jobs import Progress

T = TypeVar("T")

LOOK_SECONDS = 0.1
"""After which a turn that lasts is asked what it waits for."""

Report = Callable[[int, int], None]
Function = Callable[[Report], T]


class _Left(BaseException):
    """Ends a function whose job has ended; no error of the function's own, so that it handles it as none."""


class Aside:
    """Threads for long computations.

    Args:
        most: how many compute at a time; further ones wait.
    """

    def __init__(self, most: int = 2) -> None:
        self._places = threading.BoundedSemaphore(most)
        self._threads: set[_Thread] = set()

    def beside(self, function: Function[T]) -> Generator[T | Progress, None, None]:
        """The steps of a job for what needs nothing of the worker's: it computes while the job waits."""
        while not self._places.acquire(blocking=False):
            yield Progress(None, "waiting for another analysis", idle=True)
        thread = self._started(_Thread(function, self._left))
        try:
            while thread.is_alive():
                yield Progress(*thread.progress, idle=True)
            yield thread.result()
        finally:
            thread.leave()

    def in_turns(
        self,
        function: Function[T],
        keeps_turn: Callable[[], bool] = lambda: False,
        holder: Callable[[], int | None] = lambda: None,
    ) -> Generator[T | Progress, None, None]:
        """The steps of a job for what computes with a model of the worker's: the worker waits meanwhile.

        Args:
            function: has the worker's time from one call of ``progress`` to the next.
            keeps_turn: asked there, in its thread, whether it holds what others would wait for.
            holder: the id of the thread that holds what it would wait for, None where none does. While it is another
                thread than the function's, the worker goes on without it.
        """
        thread = _Turns(function, self._left, keeps_turn, holder)
        try:
            while thread.turn(self._started):
                if thread.waits:
                    yield Progress(None, "waiting for the model, which another thread uses", idle=True)
                else:
                    yield Progress(*thread.progress)
            yield thread.result()
        finally:
            thread.leave()

    def close(self, timeout: float) -> bool:
        """Leave all functions at their next call of ``progress``; answers whether they ended within ``timeout`` s."""
        threads = list(self._threads)
        for thread in threads:
            thread.leave()
        for thread in threads:
            thread.join(timeout)
        return not any(thread.is_alive() for thread in threads)

    def _started(self, thread: "_Thread[T]") -> "_Thread[T]":
        self._threads.add(thread)
        thread.start()
        return thread

    def _left(self, thread: "_Thread[T]") -> None:
        self._threads.discard(thread)
        if not isinstance(thread, _Turns):
            self._places.release()


class _Thread(threading.Thread, Generic[T]):
    """A function that computes, and what came of it."""

    def __init__(self, function: Function[T], ended: Callable[["_Thread[T]"], None]) -> None:
        super().__init__(name="analysis", daemon=True)
        self.outcome: Future[T] = Future()
        self.progress: tuple[float | None, str] = (None, "running")
        self._function, self._ended = function, ended
        self._is_left = threading.Event()

    def run(self) -> None:
        try:
            self.outcome.set_result(self._function(self.report))
        except BaseException as error:
            # What it was called with may be large, and the frames of an error would keep it.
            self.outcome.set_exception(error)
        finally:
            # Left to the thread's own end, the cleanup of MLX's streams can abort the interpreter's exit.
            mx.clear_streams()
            self._ended(self)

    def result(self) -> T:
        """What the function answered.

        Raises:
            Stopping: it was left, and its job was not cancelled.
        """
        try:
            return self.outcome.result()
        except _Left:
            raise Stopping from None

    def report(self, done: int, total: int) -> None:
        """How far the function has come.

        Raises:
            _Left: it is to end.
        """
        if self._is_left.is_set():
            raise _Left
        self.progress = (min(1.0, done / total) if total else None, f"{done} of {total}")

    def leave(self) -> None:
        """Let the function end at its next report."""
        self._is_left.set()


class _Turns(_Thread[T]):
    """One that goes on only when it is told to."""

    def __init__(
        self,
        function: Function[T],
        ended: Callable[[_Thread[T]], None],
        keeps_turn: Callable[[], bool],
        holder: Callable[[], int | None],
    ) -> None:
        super().__init__(function, ended)
        self._keeps_turn, self._holder = keeps_turn, holder
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._is_out = False

    @property
    def waits(self) -> bool:
        """Whether another thread holds what it would wait for."""
        return self._holder() not in (None, self.ident)

    def turn(self, start: Callable[[_Thread[T]], object]) -> bool:
        """Let it go on until it reports, ends or waits for another thread; answers whether there is more to do."""
        if not self._is_out:
            if self.waits:
                return True
            self._is_out = True
            if self.ident is None:
                start(self)
            else:
                self._go.release()
        while not self._back.acquire(timeout=LOOK_SECONDS):
            if self.waits:
                return True
        self._is_out = False
        return not self.outcome.done()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._back.release()

    def report(self, done: int, total: int) -> None:
        super().report(done, total)
        if not self._keeps_turn():
            self._back.release()
            self._go.acquire()
            super().report(done, total)

    def leave(self) -> None:
        super().leave()
        self._go.release()
