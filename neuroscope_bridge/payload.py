"""The wire format of activations: one record is one array and where in the model and the text it was taken.

    record = encode_activation(array, hook_id="layer_5_residual", layer_name="transformer.h.5", ...)
    body = dumps({"activations": {"layer_5_residual": [record]}})
    decode_activation(orjson.loads(body)["activations"]["layer_5_residual"][0])      # the array again

The server writes records and the clients read them; nothing else knows how an array becomes JSON.

| encoding | `data` | non-finite numbers |
| --- | --- | --- |
| `json` | nested lists | null. Decoded as -inf in attention scores (a masked key), elsewhere as nan |
| `base64` | the array's bytes, little-endian, C order | kept |
| `none` | no such key | |

`json` writes the shortest digits that name a float32, so both encodings give back the array bit for bit;
`base64` is about half the size and several times faster.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import orjson

from . import base64_text
from .errors import NumberTooLargeError, PayloadError
from .tensors import array_bytes, npy_header, read_npy, read_safetensors, safetensors_buffers, safetensors_header

__all__ = [
    "DTYPES",
    "ENCODINGS",
    "NumberTooLargeError",
    "PayloadError",
    "array_bytes",
    "as_wire_dtype",
    "decode_activation",
    "dumps",
    "encode_activation",
    "encode_intervention",
    "encode_vector",
    "encoded",
    "key_padding",
    "npy_header",
    "read_npy",
    "read_safetensors",
    "receipt",
    "row_positions",
    "safetensors_buffers",
    "safetensors_header",
    "stack_records",
]

ENCODINGS = ("json", "base64", "none")
DTYPES = ("float32", "float16")  # what a request may ask for; integers are int32 whatever was asked

_WIRE_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "int32": np.dtype("<i4"),
}


def encode_activation(
    array: np.ndarray,
    *,
    hook_id: str,
    layer_name: str,
    component: str,
    hook_point: str,
    layer_index: int | None,
    axes: Sequence[str],
    phase: str,
    step: int,
    positions: Sequence[int],
    is_input: bool,
    pass_index: int = 0,
    position_ids: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    reduce: str | None = None,
    encoding: str = "json",
    dtype: str = "float32",
) -> dict[str, Any]:
    """The record of one captured array.

        record = encode_activation(
            np.zeros((1, 10, 768), np.float32), hook_id="layer_5_residual", layer_name="transformer.h.5",
            component="residual", hook_point="blocks.5.hook_resid_post", layer_index=5,
            axes=("batch", "pos", "d_model"), phase="prefill", step=0, positions=(0, 10), is_input=False,
        )
        record["shape"], record["dtype"]      # [1, 10, 768], 'float32'

    With encoding `json`, `data` stays a numpy array that `dumps` writes as nested lists.

    Args:
        array: Numbers of any real dtype. Integers and booleans travel as int32, everything else as `dtype`.
        axes: One name per dimension of `array`; empty where they are not known (a raw module's output).
        positions: Absolute token positions `(start, stop)` that the array covers.
        pass_index: Which pass, for a layer that runs several times in one forward pass.
        position_ids: The absolute position of each row, where they are not all of start..stop-1; None where they are.
        heads: The heads along the head axis, where they are not all; None where they are.
        reduce: How the array was made of what was captured (`mean`, `max`, `last`, `norm`); None where it is that.
        encoding: One of `ENCODINGS`.
        dtype: One of `DTYPES`. float16 rounds, but never turns a finite number into infinity.

    Raises:
        PayloadError: unknown encoding or dtype, axes that do not match the shape.
        NumberTooLargeError: a `PayloadError`; a finite number that the dtype cannot hold.
    """
    if encoding not in ENCODINGS:
        raise PayloadError(f"Unknown activation encoding {encoding!r}. Choose from: {', '.join(ENCODINGS)}.")
    array = np.asarray(array)
    if axes and len(axes) != array.ndim:
        raise PayloadError(
            f"Hook {hook_id!r}: shape {list(array.shape)} has {array.ndim} axes, {len(axes)} are named: {list(axes)}."
        )
    array = as_wire_dtype(array, dtype, hook_id)
    record: dict[str, Any] = {
        "hook_id": hook_id,
        "layer_name": layer_name,
        "component": component,
        "shape": list(array.shape),
        "dtype": array.dtype.name,
        "is_input": is_input,
        "hook_point": hook_point,
        "layer_index": layer_index,
        "axes": list(axes),
        "phase": phase,
        "step": step,
        "pass_index": pass_index,
        "positions": [int(position) for position in positions],
        "position_ids": _integers(position_ids),
        "heads": _integers(heads),
        "reduce": reduce,
        "encoding": encoding,
    }
    if encoding != "none":
        record["data"] = encoded(array, encoding)
    return record


def encoded(array: np.ndarray, encoding: str) -> np.ndarray | str:
    """What `data` of a record is: for `json` the array, which `dumps` writes as nested lists, for `base64` a text."""
    return array if encoding == "json" else base64.b64encode(array_bytes(array)).decode("ascii")


def decode_activation(record: Mapping[str, Any]) -> np.ndarray:
    """The array of a record, whichever encoding it came in.

        decode_activation({"shape": [2], "dtype": "float32", "encoding": "json", "data": [0.5, None]})
        # array([0.5, nan], dtype=float32)

    A null is a number that JSON cannot hold. In attention scores the only such number is the -inf of a masked
    key, so there it becomes -inf; anywhere else it becomes nan. Ask for base64 to keep -inf, inf and nan apart.

    Returns:
        A writable array of the record's shape and dtype, in this machine's byte order.

    Raises:
        PayloadError: no data (encoding `none`), or data that does not fit the record's shape and dtype.
    """
    hook_id, shape, dtype = record.get("hook_id"), record.get("shape"), record.get("dtype")
    encoding, data = record.get("encoding", "json"), record.get("data")
    if isinstance(data, np.ndarray):
        return data
    if encoding == "none":
        raise PayloadError(f"Hook {hook_id!r} was captured with encoding 'none': its record has no data.")
    if encoding not in ENCODINGS:
        raise PayloadError(f"Hook {hook_id!r}: unknown encoding {encoding!r}. Known: {', '.join(ENCODINGS)}.")
    if dtype not in _WIRE_DTYPES:
        raise PayloadError(f"Hook {hook_id!r}: unknown dtype {dtype!r}. Known: {', '.join(_WIRE_DTYPES)}.")
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int and size >= 0 for size in shape):
        raise PayloadError(f"Hook {hook_id!r}: shape must be a list of sizes, got {shape!r}.")
    if data is None and shape:
        raise PayloadError(f"Hook {hook_id!r}: the record has no data.")
    read = _from_base64 if encoding == "base64" else _from_lists
    try:
        array = read(data, dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise PayloadError(f"Hook {hook_id!r}: data is not {dtype} in {encoding}: {error}") from error
    if array.size != math.prod(shape):
        raise PayloadError(
            f"Hook {hook_id!r}: shape {list(shape)} needs {math.prod(shape)} numbers, data has {array.size}."
        )
    if encoding == "json" and array.dtype.kind == "f" and _is_scores(record):
        array[np.isnan(array)] = -np.inf
    return array.reshape(shape)


def encode_intervention(intervention: Mapping[str, Any]) -> dict[str, Any]:
    """An intervention as the server reads it, from one with arrays in `values` or `vector`, or decoded in `source`.

        encode_intervention({"hook_point": "blocks.1.hook_resid_post", "type": "add", "vector": np.ones(768)})

    Raises:
        PayloadError: nan or inf, or -inf anywhere but in ``values``, where it masks a key of attention scores.
    """
    wire = dict(intervention)
    for name in ("values", "vector"):
        array = wire.get(name)
        if not isinstance(array, (np.ndarray, np.generic)):
            continue
        numbers = np.asarray(array)
        if numbers.dtype.kind not in "iuf":
            raise PayloadError(f"{name} of an intervention must be numbers, got {numbers.dtype}.")
        fine = np.isfinite(numbers) | (np.isneginf(numbers) if name == "values" else False)
        if not fine.all():
            raise PayloadError(f"{name} of an intervention must be finite, got {numbers[~fine].flat[0]}.")
        # A number alone is null as a field, which means that it is not given; a list of one is the same number.
        wire[name] = np.atleast_1d(numbers)
    source = wire.get("source")
    if isinstance(source, (list, tuple)):
        wire["source"] = [_encoded(record) for record in source]
    elif source is not None:
        wire["source"] = _encoded(source)
    return wire


def encode_vector(numbers: Any) -> dict[str, Any]:
    """A list of numbers as the server reads it, as 32-bit floats in base64: of a trait's direction, for one.

        encode_vector([0.5, -1.0])      # {'shape': [2], 'dtype': 'float32', 'encoding': 'base64', 'data': 'AAA...'}

    Axes of one entry are left out: a record of one position is a list of numbers.

    Raises:
        PayloadError: something that is no list of numbers which float32 can hold, and at least one.
    """
    try:
        array = np.asarray(numbers)
    except ValueError as error:
        raise PayloadError("A vector is a list of numbers, got lists of several lengths.") from error
    if array.dtype.kind not in "iuf" or not array.size or array.size != max(array.shape, default=0):
        raise PayloadError(f"A vector is a list of numbers, got shape {list(array.shape)} of {array.dtype}.")
    array = array.reshape(-1)
    with np.errstate(over="ignore"):
        narrow = array.astype(_WIRE_DTYPES["float32"])
    lost = array[~np.isfinite(narrow)]
    if lost.size:
        raise PayloadError(f"A vector's numbers must be finite in float32, got {lost[0]}.")
    encoding = "base64"
    return {"shape": list(array.shape), "dtype": "float32", "encoding": encoding, "data": encoded(narrow, encoding)}


def _encoded(record: Any) -> Any:
    """A record whose data was decoded, in base64 again, which keeps every number."""
    if not isinstance(record, Mapping) or not isinstance(record.get("data"), np.ndarray):
        return record
    data = record["data"]
    little_endian = data.astype(data.dtype.newbyteorder("<"), copy=False)
    return {**record, "encoding": "base64", "data": base64.b64encode(little_endian.tobytes()).decode("ascii")}


def dumps(obj: Any) -> bytes:
    """Strict JSON, UTF-8: numpy arrays become nested lists; nan, inf and -inf become null.

        dumps({"data": np.array([1.5, np.nan], np.float32)})      # b'{"data":[1.5,null]}'

    Raises:
        PayloadError: something in `obj` has no JSON form.
    """
    try:
        return orjson.dumps(obj, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError as error:
        raise PayloadError(f"Cannot be written as JSON: {error}") from error


def receipt(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a hook delivered in a whole request, from its records in any encoding.

        receipt(records)      # {'fired': 3, 'positions': [0, 12], 'bytes': 36864}

    `fired` counts the records, `positions` spans them all, `bytes` is their size before encoding.
    A hook without records has `{'fired': 0, 'positions': None, 'bytes': 0}`.
    """
    spans = [record["positions"] for record in records]
    return {
        "fired": len(records),
        "positions": [min(s[0] for s in spans), max(s[1] for s in spans)] if spans else None,
        "bytes": sum(math.prod(r["shape"]) * _WIRE_DTYPES[r["dtype"]].itemsize for r in records),
    }


def stack_records(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """One array for all tokens, from the records of one hook: prefill first, then each decoded token.

        records = result["activations"]["r5"]      # shapes [1, 10, 768], [1, 1, 768], [1, 1, 768]
        stack_records(records).shape               # (1, 12, 768)

    Rows ascend by position: where every position was captured, row i stands for position
    `records[0]["positions"][0] + i`; otherwise `[p for record in records for p in row_positions(record)]`, sorted,
    has the position of each. Attention patterns and scores are joined along the query axis; their keys are padded
    to the longest row, patterns with 0 and scores with -inf, which is what a query gives to keys that come after it.

    Raises:
        PayloadError: no records, records of different hook points or heads, no position axis, records that were
            reduced over their positions, positions doubled, or keys that do not start at position 0 (a sliding
            window has dropped the first ones).
    """
    if not records:
        raise PayloadError("No records to stack.")
    records = sorted(records, key=lambda record: record["positions"][0])
    first = records[0]
    for field in ("hook_point", "is_input", "axes", "heads", "reduce"):
        found = {repr(record.get(field)) for record in records}
        if len(found) > 1:
            raise PayloadError(
                f"Records of one {field} can be stacked, these have {len(found)}: {', '.join(sorted(found))}."
            )
    passes = sorted({record.get("pass_index", 0) for record in records})
    if len(passes) > 1:
        raise PayloadError(f"Records of one pass can be stacked, these are of the passes {passes}: pick by pass_index.")
    for before, after in pairwise(records):
        if before["positions"][1] > after["positions"][0]:
            raise PayloadError(
                f"Hook point {first['hook_point']!r}: positions {before['positions']} are followed by "
                f"{after['positions']}; records must join without overlap."
            )
    axes = list(first["axes"])
    along = next((axes.index(name) for name in ("pos", "query") if name in axes), None)
    if along is None and first.get("reduce") is not None:
        raise PayloadError(
            f"Hook point {first['hook_point']!r}: each record is the {first['reduce']!r} over its own positions; "
            "these have no rows to stack."
        )
    if along is None:
        raise PayloadError(f"Hook point {first['hook_point']!r} has no position axis: {axes}.")
    arrays = [decode_activation(record) for record in records]
    for array, record in zip(arrays, records, strict=True):
        positions = row_positions(record)
        if array.shape[along] != len(positions):
            shown = record["positions"] if isinstance(positions, range) else positions
            raise PayloadError(f"Hook point {first['hook_point']!r}: {array.shape[along]} rows for positions {shown}.")
    if "key" in axes:
        arrays = _pad_keys(arrays, records, axes.index("key"))
    return np.concatenate(arrays, axis=along)


def row_positions(record: Mapping[str, Any]) -> Sequence[int]:
    """The absolute position of each row of a record.

    row_positions({"positions": [3, 6]})                              # range(3, 6)
    row_positions({"positions": [3, 9], "position_ids": [3, 8]})      # [3, 8]
    """
    listed = record.get("position_ids")
    return range(*record["positions"]) if listed is None else list(listed)


def _integers(given: Sequence[int] | None) -> list[int] | None:
    return None if given is None else [int(one) for one in given]


def _pad_keys(arrays: list[np.ndarray], records: Sequence[Mapping[str, Any]], axis: int) -> list[np.ndarray]:
    for array, record in zip(arrays, records, strict=True):
        if array.shape[axis] < record["positions"][1]:
            raise PayloadError(
                f"Hook point {record['hook_point']!r}: {array.shape[axis]} keys at positions "
                f"{record['positions']} do not start at position 0 and cannot be stacked."
            )
    longest = max(array.shape[axis] for array in arrays)
    fill = key_padding(records[0].get("hook_point"), records[0].get("component"))
    padded = []
    for array in arrays:
        width = [(0, 0)] * array.ndim
        width[axis] = (0, longest - array.shape[axis])
        padded.append(np.pad(array, width, constant_values=fill))
    return padded


def key_padding(hook_point: str | None, component: str | None) -> float:
    """What a query has at keys that come after it: 0 in a pattern, -inf in scores."""
    return -math.inf if _is_scores({"hook_point": hook_point, "component": component}) else 0.0


def _is_scores(record: Mapping[str, Any]) -> bool:
    hook_point = record.get("hook_point")
    if hook_point is None:
        return record.get("component") == "attention_scores"
    return str(hook_point).endswith("hook_attn_scores")


def as_wire_dtype(array: np.ndarray, dtype: str, hook_id: str) -> np.ndarray:
    """The array as it travels: floats as ``dtype``, one of `DTYPES`, integers and booleans as int32.

    Raises:
        PayloadError: no such dtype, or an array that has no wire format.
        NumberTooLargeError: a finite number that the dtype cannot hold.
    """
    if dtype not in DTYPES:
        raise PayloadError(f"Unknown activation dtype {dtype!r}. Choose from: {', '.join(DTYPES)}.")
    if array.dtype.kind not in "biuf":
        raise PayloadError(f"Hook {hook_id!r}: arrays of {array.dtype} have no wire format.")
    target = np.dtype(dtype if array.dtype.kind == "f" else np.int32)
    if target.kind == "i" and not np.can_cast(array.dtype, target, casting="safe"):
        low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
        if array.size and (array.min() < low or array.max() > high):
            raise PayloadError(f"Hook {hook_id!r}: integers beyond {low}..{high} do not fit int32.")
    with np.errstate(over="ignore"):
        converted = np.asarray(array, dtype=target)
    if not np.can_cast(array.dtype, target, casting="safe"):
        _refuse_overflow(array, converted, hook_id)
    return converted


def _refuse_overflow(array: np.ndarray, converted: np.ndarray, hook_id: str) -> None:
    lost, target = np.isinf(converted), converted.dtype
    # One pass where nothing is infinite, which is nearly always.
    if lost.any() and (lost := lost & np.isfinite(array)).any():
        advice = " Ask for activation_dtype 'float32'." if target.name == "float16" else ""
        raise NumberTooLargeError(
            f"Hook {hook_id!r}: {np.abs(array[lost]).max():g} is beyond the largest {target.name}, "
            f"{float(np.finfo(target).max):g}.{advice}"
        )


def _from_base64(data: Any, dtype: str) -> np.ndarray:
    if not isinstance(data, str):
        raise TypeError(f"expected a base64 string, got {type(data).__name__}")
    wire = _WIRE_DTYPES[dtype]
    raw = base64_text.decode(data)
    if raw.size % wire.itemsize:
        raise ValueError(f"{raw.size} bytes are no whole number of {dtype}")
    return raw.view(wire).astype(wire.newbyteorder("="), copy=False)


def _from_lists(data: Any, dtype: str) -> np.ndarray:
    if dtype == "int32":
        integers = np.array(data)
        if integers.size and integers.dtype.kind not in "iu":
            raise TypeError("integers expected")
        if integers.size and (integers.min() < -(2**31) or integers.max() >= 2**31):
            raise OverflowError("integers beyond int32")
        return integers.astype(np.int32)
    numbers = np.array(data, dtype=np.float64)  # numpy reads None as nan
    return _narrow(numbers, _WIRE_DTYPES[dtype].newbyteorder("="))


def _narrow(numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Numbers read as float64 from the shortest digits of a narrower float, as that float.

    Rounding twice can err where the first rounding lands midway between two narrow floats: 7.038531e-26 names
    the float32 0x15AE43FD, yet float32(float64("7.038531e-26")) is its neighbour. The digits decide there.
    """
    with np.errstate(over="ignore"):
        narrow = numbers.astype(dtype)
    infinite = np.isinf(narrow)
    if infinite.any() and (infinite & np.isfinite(numbers)).any():
        raise OverflowError(f"numbers beyond the largest {dtype.name}")
    flat, target = numbers.reshape(-1), narrow.reshape(-1)
    for index in _perhaps_midway(flat, dtype):
        value, near = float(flat[index]), float(target[index])
        with np.errstate(all="ignore"):
            other = float(np.nextafter(target[index], dtype.type(math.inf if value > near else -math.inf)))
        is_midway = near != value and value - near == other - value
        digits, exact = Decimal(repr(value)), Decimal(value)
        if is_midway and digits != exact:
            target[index] = min(near, other) if digits < exact else max(near, other)
    return narrow


def _perhaps_midway(numbers: np.ndarray, dtype: np.dtype, block: int = 1 << 14) -> Iterator[int]:
    """Where the bits that rounding drops are a one and zeros; below the normal range, more may be dropped."""
    dropped, tiny = np.finfo(np.float64).nmant - np.finfo(dtype).nmant, np.finfo(dtype).tiny
    mask, half = np.uint64((1 << dropped) - 1), np.uint64(1 << (dropped - 1))
    # In blocks that stay in the processor's cache.
    for start in range(0, numbers.size, block):
        part = numbers[start : start + block]
        small = (np.abs(part) < tiny) & (part != 0)
        found = np.nonzero((part.view(np.uint64) & mask == half) | small)[0]
        yield from (start + int(index) for index in found)


def _plain(obj: Any) -> Any:
    """What orjson refuses of numpy: 0-d arrays, foreign byte order, arrays that are not C-contiguous."""
    if isinstance(obj, np.ndarray) and obj.dtype.kind in "biuf":
        if obj.ndim == 0:
            return obj.item()
        native = np.ascontiguousarray(obj, dtype=obj.dtype.newbyteorder("="))
        if native is not obj:
            return native
    raise TypeError(f"Type is not JSON serializable: {type(obj).__name__}")
