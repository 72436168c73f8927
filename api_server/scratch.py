"""Bytes that are too many for memory: they lie in a temporary file that goes with whoever holds them."""

import math
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from .errors import CapturesUnwritable

IN_MEMORY_BYTES = 64 * 2**20
"""Numbers that must be put together lie in memory up to this size, else in a temporary file."""
_CHUNK = 2**20


def room(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array to fill.

    Raises:
        CapturesUnwritable: it is too large for memory, and the disk has no room for it.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes <= IN_MEMORY_BYTES:
        return np.empty(shape, dtype)
    chunks = (bytes(min(_CHUNK, nbytes - at)) for at in range(0, nbytes, _CHUNK))
    try:
        return mapped(chunks, nbytes).view(dtype).reshape(shape)
    except OSError as error:
        raise CapturesUnwritable(error.strerror or "the disk refuses") from error


def mapped(chunks: Iterable[bytes], nbytes: int) -> np.ndarray:
    """Chunks of ``nbytes`` in all (more than 0) as one array of bytes in a temporary file.

    Every byte is written before the file is mapped: a mapped file that finds the disk full only when it is filled ends
    the process.

    Raises:
        OSError: the disk has no room.
    """
    with tempfile.TemporaryFile() as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        return np.memmap(file, np.uint8, "r+", shape=nbytes)
