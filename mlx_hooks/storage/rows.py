"""Captured tokens as rows: values that lie in files or in memory, read part by part."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..errors import HookError

LABELS = {
    "tokens": "int32",
    "sequence": "int32",
    "position": "int32",
    "step": "int64",
    "rank": "int32",
    "session": "int32",
}
"""What is known of a row besides its values, with the type of its numbers."""
_AHEAD_ROWS = 8192
_AHEAD_BYTES = 128 * 2**20
"""What is read at a time in random order."""


@dataclass(frozen=True, eq=False)
class RowPart:
    """Some rows.

    Args:
        values: [row, width] in float32; of rows with several axes, these side by side.
        tokens: the id of the token that the model read at each row, [row]; None, as all that follow, where rows came
            without.
        sequence: the row of its batch.
        position: its place in the sequence, from 0.
        step: the training step at which it was captured.
        rank: the process that captured it, in distributed training.
        session: which start of capturing it belongs to.
    """

    values: np.ndarray
    tokens: np.ndarray | None = None
    sequence: np.ndarray | None = None
    position: np.ndarray | None = None
    step: np.ndarray | None = None
    rank: np.ndarray | None = None
    session: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def sequences(self) -> np.ndarray | None:
        """A number for each row that is the same for the rows of one sequence and no others, [row]."""
        keys = [key for key in (self.session, self.rank, self.step, self.sequence) if key is not None]
        if len(keys) < 4:
            return None
        return np.asarray(np.unique(np.stack(keys), axis=1, return_inverse=True)[1]).reshape(-1)

    @property
    def texts(self) -> np.ndarray | None:
        """A number for each row that is the same for all sequences that read the same tokens, [row].

        A text is captured again in another epoch, and as another sequence: what is held out must not have been seen
        under that name. The part has to hold whole sequences, or the same positions of each.
        """
        sequences = self.sequences
        if sequences is None or self.tokens is None or self.position is None or not len(self):
            return None
        order = np.lexsort((self.position, sequences))
        starts = np.flatnonzero(np.diff(sequences[order], prepend=-1))
        known: dict[bytes, int] = {}
        found = np.empty(len(self), np.int64)
        for rows in np.split(order, starts[1:]):
            read = np.stack([self.position[rows], self.tokens[rows]]).tobytes()
            found[rows] = known.setdefault(read, len(known))
        return found

    @property
    def prefixes(self) -> np.ndarray | None:
        """A number for each row that is the same for all rows that read the same tokens from position 0 on, [row].

        What a causal model computes at a token depends on no others, so these rows are equal, also where texts that
        begin alike go on differently. Where a sequence does not begin at 0 or has gaps, a row is that of its text.
        """
        texts = self.texts
        if texts is None or self.tokens is None or self.position is None or self.sequences is None:
            return None
        order = np.lexsort((self.position, self.sequences))
        sequences = self.sequences[order]
        first = np.searchsorted(sequences, sequences)
        place = np.arange(len(self)) - first
        whole = self.position[order] == place
        found = np.empty(len(self), np.uint64)
        running = np.zeros(len(self), np.uint64)
        by_place = np.argsort(place, kind="stable")
        for rows in np.split(by_place, np.flatnonzero(np.diff(place[by_place])) + 1):
            tokens = self.tokens[order[rows]].astype(np.uint64) + np.uint64(1)
            running[first[rows]] = _mixed(running[first[rows]] ^ tokens)
            found[rows] = running[first[rows]]
        numbers = np.empty(len(self), np.int64)
        numbers[order] = np.unique(found, return_inverse=True)[1].reshape(-1)
        gaps = order[~whole]
        if len(gaps):
            places = np.stack([texts[gaps], self.position[gaps]])
            numbers[gaps] = len(self) + np.unique(places, axis=1, return_inverse=True)[1].reshape(-1)
        return np.asarray(np.unique(numbers, return_inverse=True)[1]).reshape(-1)

    def at(self, chosen: Any) -> "RowPart":
        """The rows at indices, or where a mask is true."""
        kept = {f.name: value[chosen] for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return RowPart(**kept)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """A hash of whole numbers of 64 bits (splitmix64)."""
    with np.errstate(over="ignore"):
        numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


class Rows(ABC):
    """The rows of one layer, which need not fit in memory.

        rows = ShardReader("mechint_cache").rows("blocks.2.hook_resid_post")
        for part in rows.parts():
            part.values                         # float32 [row, width]

    ``len(rows)`` is their number.
    """

    name: str
    """The hook point's canonical name, or what the layer was called."""
    shape: tuple[int, ...]
    """Of one row: ``(d_model,)``, ``(head, d_head)``; of a pattern ``(head, key)``, with the most keys of any row."""
    axes: tuple[str, ...]
    """What the axes of a row are."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, indices: Any) -> RowPart:
        """The rows at indices [n] in stored order, in the order asked.

        Raises:
            HookError: they cannot be read.
        """

    def values(self, indices: Any) -> np.ndarray:
        """The values at indices [n], [n, width]: what ``take`` answers, without the labels."""
        return self.take(indices).values

    @property
    def width(self) -> int:
        """Numbers in one row."""
        return int(np.prod(self.shape))

    def parts(self, size: int = 4096) -> Iterator[RowPart]:
        """All rows in stored order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self))))

    def sample(self, limit: int, seed: int = 0) -> RowPart:
        """At most ``limit`` rows drawn without replacement, in stored order; all of them where there are no more."""
        if len(self) <= limit:
            return self.take(np.arange(len(self)))
        return self.take(np.sort(np.random.default_rng(seed).choice(len(self), limit, replace=False)))

    def shuffled(self, size: int, *, seed: int = 0, epochs: int = 1) -> Iterator[np.ndarray]:
        """Values [row, width] in random order, ``size`` at a time, each row once per epoch; the last part may be
        smaller. Rows are read when they are due, some thousand at a time."""
        generator = np.random.default_rng(seed)
        # Rows next to each other in random order lie in as many files as there are: each is opened once for many.
        n_ahead = size * max(1, min(_AHEAD_ROWS, _AHEAD_BYTES // (4 * self.width)) // size)
        for _ in range(epochs):
            order = generator.permutation(len(self))
            for start in range(0, len(order), n_ahead):
                values = self.values(order[start : start + n_ahead])
                for inside in range(0, len(values), size):
                    yield values[inside : inside + size]


class ArrayRows(Rows):
    """Rows in memory.

    Args:
        values: [row, ...] of numbers.
        name: what the layer is called.
        axes: what the axes of a row are; by default one, "feature".
        labels: ``tokens``, ``sequence``, ... of :class:`RowPart`, [row] each.

    Raises:
        HookError: for values that are no numbers or have no rows, and labels that do not fit.
    """

    def __init__(self, values: Any, name: str = "", axes: Sequence[str] | None = None, **labels: Any) -> None:
        values = np.asarray(values)
        if values.ndim < 2 or not values.size or not (np.issubdtype(values.dtype, np.number) or values.dtype == bool):
            raise HookError(f"Rows are an array of numbers [row, feature], got {values.dtype} of shape {values.shape}.")
        if np.iscomplexobj(values):
            raise HookError("Rows are real numbers, got complex ones.")
        self.name, self.shape = name, values.shape[1:]
        self.axes = tuple(axes) if axes is not None else ("feature",) * len(self.shape)
        known = {}
        for label, given in labels.items():
            if label not in LABELS:
                raise HookError(f"Rows have no {label!r}. There are: {', '.join(LABELS)}.")
            if given is None:
                continue
            known[label] = np.asarray(given).astype(LABELS[label])
            if known[label].shape != values.shape[:1]:
                raise HookError(f"{label} has one number per row, {len(values)}; got shape {known[label].shape}.")
        self._part = RowPart(values.reshape(len(values), -1), **known)

    def __len__(self) -> int:
        return len(self._part)

    def take(self, indices: Any) -> RowPart:
        """The rows at indices [n]."""
        part = self._part.at(np.asarray(indices))
        return replace(part, values=part.values.astype(np.float32, copy=False))
