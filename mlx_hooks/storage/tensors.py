"""Arrays in one safetensors file, written one by one and read one by one from mapped memory.

Values keep their type and their bits: bfloat16 among MLX's, float64 among NumPy's.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Array = mx.array | np.ndarray

_CODES = {
    "bool": "BOOL", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "int8": "I8", "int16": "I16", "int32": "I32", "int64": "I64",
    "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "complex64": "C64",
}  # fmt: skip
_NUMPY = {code: "uint16" if name == "bfloat16" else name for name, code in _CODES.items()}
_LONGEST_HEADER = 100_000_000


def check_storable(name: str, array: Array) -> None:
    """Raises TypeError for a type of numbers that safetensors does not have."""
    if type_name(array) not in _CODES:
        raise TypeError(f"{name} holds {type_name(array)}; what can be saved is {', '.join(_CODES)}")


def write_arrays(path: Path, arrays: Mapping[str, Callable[[], Array]], notes: dict[str, str]) -> None:
    """Write a safetensors file.

    Args:
        arrays: by name, what answers the array; it is called twice, for the shape and for the bytes, so that one array
            at a time is in memory.
        notes: texts for the file's header.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": notes}
    at = 0
    for name, get in arrays.items():
        array = get()
        header[name] = {
            "dtype": _CODES[type_name(array)],
            "shape": list(array.shape),
            "data_offsets": [at, at := at + array.nbytes],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for get in arrays.values():
            file.write(np.ascontiguousarray(_as_numpy(get())).data)


class TensorFile:
    """A safetensors file, mapped: an array's bytes are read when that array is asked for.

    The mapping outlives the file's name, so what was opened can be read after the file was moved or removed.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no whole safetensors file; one clause says why.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        if size < 8:
            raise ValueError("it is too short to be a safetensors file")
        self._bytes = np.memmap(path, np.uint8, "r")
        length = int.from_bytes(self._bytes[:8].tobytes(), "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError("its header is longer than the file")
        try:
            header = json.loads(self._bytes[8 : 8 + length].tobytes())
            self.notes: dict[str, str] = dict(header.pop("__metadata__", None) or {})
            self._entries: dict[str, dict[str, Any]] = header
            self._data = 8 + length
            ends = [self._end(entry) for entry in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError("its header is damaged") from error
        if max(ends, default=0) + self._data != size:
            raise ValueError(f"it has {size} bytes where its header tells of {max(ends, default=0) + self._data}")

    def _end(self, entry: dict[str, Any]) -> int:
        start, end = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (start, end, *entry["shape"])):
            raise ValueError(entry)
        # Not NumPy's product, which wraps around.
        if end - start != math.prod(entry["shape"]) * np.dtype(_NUMPY[entry["dtype"]]).itemsize:
            raise ValueError(entry)
        return int(end)

    def __iter__(self) -> Any:
        return iter(self._entries)

    @property
    def is_whole(self) -> bool:
        """Whether the file is as long as it was when it was mapped: reading beyond its end would end the process."""
        mapping: Any = self._bytes.base
        return bool(mapping.size() == len(self._bytes))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array."""
        return tuple(self._entries[name]["shape"])

    def nbytes(self, name: str) -> int:
        """Bytes of an array."""
        start, end = self._entries[name]["data_offsets"]
        return end - start

    def is_bfloat16(self, name: str) -> bool:
        """Whether ``numpy`` shows bits where numbers are meant."""
        return str(self._entries[name]["dtype"]) == "BF16"

    def numpy(self, name: str) -> np.ndarray:
        """An array of the mapped file, which cannot be written to; bfloat16 shows its bits as uint16."""
        entry = self._entries[name]
        start, end = entry["data_offsets"]
        mapped = self._bytes[self._data + start : self._data + end]
        return mapped.view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])

    def read(self, name: str) -> mx.array:
        """A copy of an array, bit for bit."""
        mapped = self.numpy(name)
        code = self._entries[name]["dtype"]
        if code == "F64":
            return mx.array(mapped, mx.float64)
        value = mx.array(mapped)
        return value.view(mx.bfloat16) if code == "BF16" else value


def type_name(array: Array) -> str:
    """The type of numbers as NumPy calls it, in whichever byte order."""
    return array.dtype.name if isinstance(array, np.ndarray) else str(array.dtype).removeprefix("mlx.core.").rstrip("_")


def _as_numpy(array: Array) -> np.ndarray:
    if isinstance(array, mx.array):
        return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    # safetensors is little-endian.
    return array.astype(array.dtype.newbyteorder("<"), copy=False)
