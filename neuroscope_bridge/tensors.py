"""Arrays as files: npy, which holds one array, and safetensors, which holds several by name.

    buffers = safetensors_buffers({"a/b": np.zeros((1, 3), np.float32)}, {"model": "tiny"})
    arrays, metadata = read_safetensors(b"".join(buffers))
    arrays["a/b"].shape                                 # (1, 3)

A writer hands out the arrays' own memory and a reader gives views of the buffer it read: nothing is copied, and
nothing is pickled. npy is NumPy's format version 1.0 (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).
A safetensors file (https://github.com/huggingface/safetensors) is the length of its header in 8 little-endian bytes;
the header, a JSON object with `dtype`, `shape` and `data_offsets` per name and texts under `__metadata__`, padded
with spaces to a multiple of 8; and the arrays' bytes, little-endian, C order, one after the other.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from .errors import PayloadError

_SAFETENSORS_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I32": np.dtype("<i4")}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()} | {np.dtype("<u2"): "BF16"}
"""Those that are written; NumPy has no bfloat16, so uint16 is its bits."""
_METADATA = "__metadata__"
MAX_HEADER_BYTES = 100_000_000  # what safetensors' own reader accepts

Shape = Sequence[int]
Buffer = bytes | bytearray | memoryview


def array_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array, little-endian, C order: its own memory where that is how it lies there."""
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return plain.reshape(-1).view(np.uint8).data


def npy_header(dtype: np.dtype[Any], shape: Shape) -> bytes:
    """What stands before the bytes of an array in an npy file."""
    file = io.BytesIO()
    described = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def read_npy(buffer: Buffer) -> np.ndarray:
    """The array of an npy file, as a view of ``buffer``.

    Raises:
        PayloadError: no npy file, one of objects, or one that is cut off.
    """
    view = memoryview(buffer).cast("B")
    head = io.BytesIO(view[:65536])
    try:
        version = np.lib.format.read_magic(head)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = read[version](head)
    except (ValueError, KeyError) as error:
        raise PayloadError(f"Not an npy file: {error}.") from error
    if dtype.hasobject:
        raise PayloadError("An npy file of Python objects is never read.")
    data = view[head.tell() :]
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise PayloadError(
            f"An npy file of shape {list(shape)} and {dtype} has {math.prod(shape) * dtype.itemsize} bytes "
            f"of numbers, this one {len(data)}."
        )
    array = np.frombuffer(data, dtype)
    return array.reshape(shape, order="F" if fortran_order else "C")


def safetensors_header(tensors: Mapping[str, tuple[np.dtype[Any], Shape]], metadata: Mapping[str, str]) -> bytes:
    """What stands before the bytes of the arrays in a safetensors file, from their types and shapes, in order.

        safetensors_header({"a": (np.dtype("float32"), (1, 3))}, {})      # b'P\\x00...{"__metadata__":{},"a":...}'

    Raises:
        PayloadError: a type that this wire does not carry.
    """
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        known = _SAFETENSORS_NAMES.get(dtype.newbyteorder("<"))
        if known is None or name == _METADATA:
            kinds = "float32, float16, int32, and bfloat16 as bits in uint16"
            raise PayloadError(f"Array {name!r} of {dtype} has no place here. Types: {kinds}.")
        stop = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": known, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def safetensors_buffers(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """A safetensors file in pieces: the header, then each array's memory.

    Raises:
        PayloadError: an array of another type than float32, float16, int32, and uint16, the bits of bfloat16.
    """
    header = safetensors_header({name: (a.dtype, a.shape) for name, a in tensors.items()}, metadata)
    return [header, *(array_bytes(array) for array in tensors.values())]


def read_safetensors(buffer: Buffer) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays of a safetensors file, as views of ``buffer``, and its metadata.

    Raises:
        PayloadError: no safetensors file, one that is cut off, or a type that this wire does not carry.
    """
    view = memoryview(buffer).cast("B")
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or length > min(len(view) - 8, MAX_HEADER_BYTES):
        raise PayloadError(f"Not a safetensors file: {len(view)} bytes, of which the header would be {length}.")
    try:
        header = orjson.loads(view[8 : 8 + length])
        metadata = dict(header.pop(_METADATA, {}))
        data = view[8 + length :]
        return {name: _tensor(data, name, **described) for name, described in header.items()}, metadata
    except (orjson.JSONDecodeError, TypeError, AttributeError, ValueError) as error:
        raise PayloadError(f"Not a safetensors file: {error}.") from error


def _tensor(data: memoryview, name: str, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    if dtype not in _SAFETENSORS_DTYPES:
        raise PayloadError(f"Tensor {name!r} is {dtype}. Known: {', '.join(_SAFETENSORS_DTYPES)}.")
    kind = _SAFETENSORS_DTYPES[dtype]
    start, stop = data_offsets
    if not 0 <= start <= stop <= len(data) or stop - start != math.prod(shape) * kind.itemsize:
        raise PayloadError(f"Tensor {name!r} of shape {shape} does not lie at bytes {data_offsets} of {len(data)}.")
    return np.frombuffer(data[start:stop], kind).reshape(shape)
