"""Captures of a trait: their structure, and the files that hold them.

A record is a nested dictionary with arrays at its ends:

    {"prompt": {"text", "tokens", "token_ids", "n_tokens"}, "response": {the same},
     "projections": {"prompt": [n_tokens, n_layers, 3], "response": [n_tokens, n_layers, 3]},
     "attention_weights": {"prompt": {"layer_0": [n, n], ...}, "response": [{"layer_0": [n_context], ...}, ...]},
     "metadata": {...}}

One of a single layer has ``internals``, ``layer`` and other ``projections`` in place of these two; ``internals.py``
tells of them. On disk a record is one safetensors file that needs no other: its arrays, each named by its place
(``attention_weights/response/3/layer_0``), and all that is no array as JSON in the header, with a hash of the arrays.
"""

import json
from collections.abc import Iterator, Mapping, MutableMapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ...errors import HookError
from ...storage.files import whole_file, writing
from ...storage.tensors import TensorFile, write_arrays
from .vectors import KEY as VECTOR

FORMAT = "neuroscope.trait_capture/1"
ALIGNMENTS = ("at", "predicts")
"""What row k of a response shows: the state at its token k, or at the token before, which predicted it."""
SUBLAYERS = ("residual_in", "after_attn", "residual_out")
"""Where the stream of a layer is measured: the last axis of projections of all layers."""
PROJECTIONS = {True: "h.v/|v|", False: "h.v"}
"""What a projection is: normalised, or not."""
PREFIX = "prompt"
"""What the names of files begin with, unless something else is asked for."""
OLD_NAMES = {"gelu": "activated"}
"""A second name of an array, for those who read a record by it: it is there when read, and in files but once."""

Record = dict[str, Any]
Encoded = MutableMapping[str, bytes]
"""JSON of what several records have in common, by its key in them."""

_SHARED = ("attention_weights", "internals")
_WITH_ARRAYS = ("projections", "attention_weights", "internals")
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin")


def write_record(record: Record, path: Path, *, json_beside: bool = False, encoded: Encoded | None = None) -> None:
    """Write a record to a safetensors file, which is there whole or not at all.

    Args:
        path: folders above it are made.
        json_beside: write the same as JSON too, with lists for arrays. A JSON file of an earlier record goes in any
            case, before that record does.
        encoded: see ``write_json``.

    Raises:
        HookError: it cannot be written, or holds numbers that are not finite.
    """
    arrays = dict(arrays_of(record))
    _check_finite(arrays, path)
    with writing(path):
        notes = {"format": FORMAT, "record": json.dumps(_without_arrays(record), allow_nan=False)}
        notes["arrays"] = fingerprint(arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as draft:
            write_arrays(draft, {name: partial(arrays.__getitem__, name) for name in arrays}, notes)
            json_path(path).unlink(missing_ok=True)
    if json_beside:
        write_json(record, path, encoded=encoded)


def write_json(record: Record, path: Path, *, encoded: Encoded | None = None) -> Path:
    """Write a record as strict JSON beside its file at ``path``; answers where.

    Args:
        encoded: what is kept of records that share a run, whose attention weights or internals are the same: the text
            of these is made for the first of them, and put here for the others.

    Raises:
        HookError: it cannot be written, or holds numbers that are not finite.
    """
    target = json_path(path)
    _check_finite(dict(arrays_of(record)), target)
    with writing(target), whole_file(target) as draft, draft.open("xb") as file:
        file.writelines(json_parts(record, encoded))
    return target


def json_parts(record: Record, encoded: Encoded | None = None) -> Iterator[bytes]:
    """A record as JSON, piece by piece; each number is the shortest that is the same in float32.

    Raises:
        ValueError: it holds what JSON cannot.
    """
    begins = b"{"
    for key, node in with_old_names(record).items():
        yield begins + _encode(key) + b":"
        if encoded is None or key not in _SHARED:
            yield _encode(node)
        else:
            if key not in encoded:
                encoded[key] = _encode(node)
            yield encoded[key]
        begins = b","
    yield b"}"


def _encode(node: Any) -> bytes:
    try:
        return orjson.dumps(node, default=_plain_array, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        raise ValueError(f"it cannot be told in JSON: {error}") from error


def _plain_array(node: Any) -> Any:
    """An array whose rows do not lie one after the other, so that they do."""
    if not isinstance(node, np.ndarray):
        raise TypeError(f"there is no JSON of a {type(node).__name__}")
    return np.ascontiguousarray(node) if node.ndim else node[()]


def _check_finite(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise HookError(f"{name} holds numbers that are not finite: {path} is not written.")


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """A hash of arrays' names and numbers, in whatever order they come."""
    found = sha256()
    for name in sorted(arrays):
        found.update(name.encode())
        found.update(np.ascontiguousarray(arrays[name]).data)
    return found.hexdigest()


def json_path(path: Path) -> Path:
    """Where the JSON of a record's file lies."""
    return path.with_suffix(".json")


def read_record(path: str | Path, *, arrays: bool = True) -> Record:
    """The record in a file, with NumPy arrays.

    Args:
        arrays: False reads texts and metadata alone; None is in the place of arrays.

    Raises:
        HookError: there is no such file, it is no whole safetensors file, or holds no record of this version; says why.
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise HookError(_pickle(path))
    try:
        file = TensorFile(path)
        if VECTOR in file.notes:
            raise HookError(f"{path} is a trait vector, no capture.")
        form, skeleton = file.notes.get("format"), file.notes.get("record")
        if form != FORMAT or skeleton is None:
            raise HookError(f"{path} is of the format {form!r}: this version reads {FORMAT!r}.")
        record = json.loads(skeleton, parse_constant=refuse_constant)
        found = {name: np.array(file.numpy(name)) for name in file} if arrays else {}
        for name, array in found.items():
            _put(record, name, array)
        if arrays and file.notes.get("arrays") not in (None, fingerprint(found)):
            raise ValueError("its numbers are not those that were written: the file is damaged")
    except FileNotFoundError as error:
        raise HookError(f"There is no file {path}.") from error
    except OSError as error:
        raise HookError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        if _begins_as_pickle(path):
            raise HookError(_pickle(path)) from error
        raise HookError(f"{path} is no trait capture that can be read: {error}.") from error
    return with_old_names(record)


def refuse_constant(constant: str) -> None:
    """Raises ValueError for NaN and infinities, which strict JSON does not have."""
    raise ValueError(f"{constant} has no place in JSON")


def _pickle(path: Path) -> str:
    return f"{path} is a pickle, which can run code when it is opened: it is not read; captures are .safetensors files."


def _begins_as_pickle(path: Path) -> bool:
    """Whether a file that is no safetensors file begins as pickles do, or as the archives in which torch keeps them."""
    with path.open("rb") as file:
        return file.read(4)[:2] in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


def arrays_of(node: Any, place: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of a record by place: ``projections/prompt``. One that has two names comes under the newer."""
    if isinstance(node, np.ndarray):
        yield place, node
        return
    if not isinstance(node, Mapping | list):
        return
    items = node.items() if isinstance(node, Mapping) else enumerate(node)
    for key, value in items:
        if key not in OLD_NAMES:
            yield from arrays_of(value, f"{place}/{key}" if place else str(key))


def _without_arrays(node: Any) -> Any:
    """A record with null in the place of each array."""
    if isinstance(node, np.ndarray):
        return None
    if isinstance(node, Mapping):
        return {key: _without_arrays(value) for key, value in node.items() if key not in OLD_NAMES}
    return [_without_arrays(value) for value in node] if isinstance(node, list | tuple) else node


def _put(record: Any, place: str, array: np.ndarray) -> None:
    """Put an array in its place.

    Raises:
        ValueError: the record has no such place.
    """
    node, keys = record, place.split("/")
    if keys[0] not in _WITH_ARRAYS:
        raise ValueError(f"its record has no place for the array {place!r}")
    for i, key in enumerate(keys):
        at: Any = int(key) if isinstance(node, list) and key.isdecimal() else key
        known = at < len(node) if isinstance(node, list) and isinstance(at, int) else isinstance(node, dict)
        if not known or (isinstance(node, dict) and i < len(keys) - 1 and at not in node):
            raise ValueError(f"its record has no place for the array {place!r}")
        if i == len(keys) - 1:
            node[at] = array
        else:
            node = node[at]


def with_old_names(record: Record) -> Record:
    """The record, its arrays under their old names too."""
    internals = record.get("internals") if isinstance(record, dict) else None
    for part in internals.values() if isinstance(internals, dict) else []:
        mlp = part.get("mlp") if isinstance(part, dict) else None
        for old, new in OLD_NAMES.items():
            if isinstance(mlp, dict) and new in mlp:
                mlp[old] = mlp[new]
    return record
