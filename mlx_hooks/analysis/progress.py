"""How far an analysis has come: its passes, counted."""

from collections.abc import Callable

Progress = Callable[[int, int], None] | None
"""Called with what is done and how much there is; None where nobody asks."""


class Passes:
    """The passes of an analysis. Each is told when it is made: others may have a turn there, and it may be left there.

        passes = Passes(progress, 12)
        passes.passed()                         # progress(1, 12)

    Who makes one says how many passes there are; who is handed one counts those that it makes.

    Args:
        progress: who is told. What is done never falls, and is never more than there is.
        total: how many passes there are.
    """

    def __init__(self, progress: Progress = None, total: int = 0) -> None:
        self.done, self.total = 0, total
        self._progress = progress

    def expect(self, n: int) -> None:
        """There are so many more; a number below 0 for those that turn out not to be needed."""
        self.total += n

    def passed(self, n: int = 1) -> None:
        """So many more are made."""
        self.done += n
        self.tell()

    def tell(self) -> None:
        """Tell again how far it has come: for work between two passes that lasts."""
        if self._progress is not None:
            self._progress(self.done, max(self.total, self.done))


_WHOLE = 1000


class Part:
    """The progress of one of several parts, as that of the whole in thousandths; several sweeps in it do not go back.

    Args:
        progress: who is told of the whole.
        i: which part it is, from 0.
        parts: how many there are.
    """

    def __init__(self, progress: Progress, i: int, parts: int) -> None:
        self._progress, self._i, self._parts = progress, i, parts
        self._most = 0

    def __call__(self, done: int, total: int) -> None:
        self._most = max(self._most, (_WHOLE * self._i + _WHOLE * done // max(1, total)) // self._parts)
        # Told each time: who is told may stop it, or let others have a turn.
        if self._progress is not None:
            self._progress(self._most, _WHOLE)
