"""Numbers that come a few at a time, kept as arrays: no Python object per row."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np


class Columns:
    """A table of equally long columns that grows at its end.

        edges = Columns(source=np.int32, weight=np.float32)
        edges.append(source=[3, 4], weight=[0.5, 0.25])
        edges["weight"]                                       # all of them so far, [2]

    Args:
        types: the type of each column by its name; ``(type, shape)`` for rows of several numbers.
    """

    def __init__(self, **types: Any) -> None:
        self._types = {name: kind if isinstance(kind, tuple) else (kind, ()) for name, kind in types.items()}
        self._arrays = {name: self._empty(name, 0) for name in types}
        self._length = 0

    def _empty(self, name: str, size: int) -> np.ndarray:
        kind, shape = self._types[name]
        return np.empty((size, *shape), kind)

    def append(self, **columns: Any) -> None:
        """Add rows; each column is a sequence of equal length."""
        added = len(next(iter(columns.values())))
        end = self._length + added
        for name, values in columns.items():
            array = self._arrays[name]
            if end > len(array):
                self._arrays[name] = self._empty(name, max(end, 2 * len(array), 16))
                self._arrays[name][: self._length] = array[: self._length]
            self._arrays[name][self._length : end] = values
        self._length = end

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name][: self._length]

    def __len__(self) -> int:
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that there are; up to as much again is reserved for more."""
        return sum(self[name].nbytes for name in self._arrays)


class LazyRecords(Sequence[dict[str, Any]]):
    """Records that are made when they are read, so that a long run keeps arrays only; a list where one is asked for.

    Args:
        count: how many there are now.
        make: the record at an index from 0.
    """

    def __init__(self, count: Callable[[], int], make: Callable[[int], dict[str, Any]]) -> None:
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count()

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        places = range(len(self))[index]
        return [self._make(i) for i in places] if isinstance(places, range) else self._make(places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self._make(i) for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LazyRecords | list):
            return NotImplemented
        return len(self) == len(other) and all(map(_same, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*self, *other]

    def __radd__(self, other: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        return [*other, *self]

    def __repr__(self) -> str:
        return f"<{len(self)} records>"


def _same(one: Any, other: Any) -> bool:
    """Whether two records are equal, arrays in them number by number."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
