"""Whose turn it is: jobs that run, a step each in turn; jobs that wait, fairly; and those that take one turn only.

    schedule = Schedule(max_queued=64, max_active=4)
    schedule.add(job)
    while (job := schedule.next()) is not None:
        if job.step():
            schedule.again(job)

A job of one turn goes between two steps of the others, so neither keeps the other from coming forward. The worker's
lock guards all of it.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

from .errors import Busy
from .jobs import Job


class FairQueue:
    """Jobs that wait: the addresses they came from in turn, and the users of an address in turn.

    Who comes, or comes back, is behind those who wait, so changing one's name gains nothing.
    """

    def __init__(self) -> None:
        # The first address, and the first user of it, has the next turn.
        self._turns: dict[str, dict[str, deque[Job[Any]]]] = {}

    def put(self, job: Job[Any]) -> None:
        """Let a job wait behind those of its user."""
        address, user = job.caller
        self._turns.setdefault(address, {}).setdefault(user, deque()).append(job)

    def take(self) -> Job[Any]:
        """The job whose turn it is; there must be one."""
        address = next(iter(self._turns))
        users = self._turns.pop(address)
        user = next(iter(users))
        jobs = users.pop(user)
        job = jobs.popleft()
        if jobs:
            users[user] = jobs
        if users:
            self._turns[address] = users
        return job

    def remove(self, job: Job[Any]) -> None:
        """Take out a job that waits here."""
        address, user = job.caller
        self._turns[address][user].remove(job)
        if not self._turns[address][user]:
            del self._turns[address][user]
        if not self._turns[address]:
            del self._turns[address]

    def __iter__(self) -> Iterator[Job[Any]]:
        """The jobs in the order in which they will be taken."""
        rest = FairQueue()
        rest._turns = {a: {u: deque(jobs) for u, jobs in users.items()} for a, users in self._turns.items()}
        while rest:
            yield rest.take()

    def __bool__(self) -> bool:
        return bool(self._turns)


class Schedule:
    """The jobs of a worker in their order.

    Args:
        max_queued: how many jobs may wait.
        max_active: how many run at a time; those that only wait for something else (a download) do not count.
    """

    def __init__(self, max_queued: int, max_active: int) -> None:
        self.max_queued = max_queued
        self.max_active = max_active
        self._waiting = FairQueue()
        self._brief: deque[Job[Any]] = deque()
        self._active: deque[Job[Any]] = deque()
        self._brief_is_next = True
        self._idle_turns = 0

    def add(self, job: Job[Any]) -> None:
        """Let a job wait.

        Raises:
            Busy: as many wait as may.
        """
        # A cancelled one waits for its end only.
        waiting = sum(not other.cancelled for other in (*self._waiting, *self._brief))
        if waiting >= self.max_queued:
            raise Busy(waiting)
        if job.brief:
            self._brief.append(job)
        else:
            self._waiting.put(job)

    def next(self) -> Job[Any] | None:
        """The job that has its turn now; None when there is none, or all wait for something else."""
        self._begin()
        if self._brief and (self._brief_is_next or not self._active):
            self._brief_is_next = False
            return self._brief.popleft()
        self._brief_is_next = True
        if not self._active or self._idle_turns >= len(self._active):
            self._idle_turns = 0
            return None
        return self._active.popleft()

    def again(self, job: Job[Any]) -> None:
        """A job that had its turn has more to do."""
        self._idle_turns = self._idle_turns + 1 if job.progress.idle else 0
        self._active.append(job)

    def ahead_of(self, job: Job[Any]) -> int | None:
        """How many jobs wait before this one; None if it does not wait."""
        return next((list(queue).index(job) for queue in (self._waiting, self._brief) if job in queue), None)

    def take_out(self, job: Job[Any]) -> bool:
        """Remove a job that waits; answers whether it did."""
        for queue in (self._waiting, self._brief):
            if job in queue:
                queue.remove(job)
                return True
        return False

    def take_all_waiting(self) -> list[Job[Any]]:
        """Remove those that wait, and answer them."""
        waiting = [*self._waiting, *self._brief]
        self._waiting = FairQueue()
        self._brief.clear()
        return waiting

    @property
    def is_running(self) -> bool:
        """Whether a job has begun and not ended."""
        return bool(self._active)

    @property
    def jobs(self) -> list[Job[Any]]:
        """Those that run, then those that wait."""
        return [*self._active, *self._waiting, *self._brief]

    def _begin(self) -> None:
        """Let waiting jobs into the round as far as there is room."""
        for job in [job for job in self._waiting if job.cancelled]:
            # It has its turn too: that ends it.
            self._waiting.remove(job)
            self._active.append(job)
        while self._waiting and sum(not job.progress.idle for job in self._active) < self.max_active:
            self._active.append(self._waiting.take())
