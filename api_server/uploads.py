"""Activations that a request brings as a file, safetensors or npz: numbers and nothing else, whatever the file says.

with open("activations.npz", "rb") as file:
    layers = read_upload(file, max_bytes=2**28)
layers["layer1"]                                    # ArrayRows, float32 [row, ...]

Nothing is unpickled, no name in the file becomes a path, and what it would unpack to is known before it is unpacked.
"""

import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from mlx_hooks import HookError
from mlx_hooks.hook_points import POSITION_AXES, axes_of
from mlx_hooks.storage.rows import ArrayRows
from mlx_hooks.storage.tensors import TensorFile
from neuroscope_bridge import payload

from .errors import ApiError
from .schemas.fields import MAX_ID_LENGTH

MAX_ARRAYS = 256
MAX_HEADER_BYTES = 2**20
"""Of what a file tells of its arrays before they come."""

COLUMNS = ("tokens", "sequence", "position")
"""Arrays [row] that say what the rows are, as shards have them."""

MAX_WIDTH = 2**19
"""Numbers in a row, of all layers together: results have entries for each, many times as long as the number."""

_ALLOWED = "a safetensors file, or an npz file (numpy.savez), of arrays [row, ...]"
_ZIP, _NPY, _PICKLE = b"PK", b"\x93NUMPY", b"\x80"
_END_OF_ZIP, _END_OF_ZIP64 = b"PK\x05\x06", b"PK\x06\x07"
_END_BYTES = 22

Read = Callable[[], np.ndarray]


def read_upload(file: IO[bytes], max_bytes: int) -> dict[str, ArrayRows]:
    """The layers of a file, by the names that it gives them.

    Arrays [row] called tokens, sequence and position say of which tokens the rows are.

    Args:
        file: to read from its start; it can be sought in.
        max_bytes: what all its arrays may take as float32.

    Raises:
        ApiError: 415 for another kind of file, 413 for too many numbers, 400 for a file that is damaged or holds
            something else than finite numbers by rows.
    """
    start = file.read(len(_NPY))
    file.seek(0)
    if start.startswith(_ZIP):
        arrays = _in_npz(file, max_bytes)
    elif start.startswith(_NPY):
        raise _other_kind("an npy file: its array has no name. Write it by numpy.savez")
    # A safetensors file begins with the length of its header, which is even and far shorter than this would mean.
    elif start.startswith(_PICKLE) and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise _other_kind("a pickle, as torch.save writes it, which could run code")
    else:
        arrays = _in_safetensors(file, max_bytes)
    return _layers(arrays)


def _layers(arrays: Mapping[str, Read]) -> dict[str, ArrayRows]:
    columns = {name: read() for name, read in arrays.items() if name in COLUMNS}
    for name, column in columns.items():
        if column.ndim != 1 or column.dtype.kind not in "iu":
            raise _damaged(f"Array {name!r} is one whole number per row, got {column.dtype} {list(column.shape)}")
        if column.size and not 0 <= column.min() <= column.max() < 2**31:
            raise _damaged(f"Array {name!r} has numbers from 0 to 2147483647, got {column.min()} to {column.max()}")
    found = {name: _rows(name, read(), columns) for name, read in arrays.items() if name not in COLUMNS}
    if not found:
        raise _damaged(f"The file has no activations; it is to be {_ALLOWED}")
    if (width := sum(rows.width for rows in found.values())) > MAX_WIDTH:
        raise _too_large(f"A row of all layers has {width} numbers; at most {MAX_WIDTH} are read. Send fewer layers")
    return found


def _rows(name: str, values: np.ndarray, columns: Mapping[str, np.ndarray]) -> ArrayRows:
    labels = dict(columns)
    if "sequence" in labels:
        # Of one capture, so that rows of one sequence can be told from those of another.
        labels |= {label: np.zeros(len(labels["sequence"]), np.int32) for label in ("step", "rank", "session")}
    try:
        return ArrayRows(_finite(name, values), name, _row_axes(name, values), **labels)
    except HookError as error:
        raise _damaged(f"Array {name!r}: {str(error).rstrip('.')}") from error


def _row_axes(name: str, values: np.ndarray) -> list[str] | None:
    """What the name tells of a row's axes, where it is a hook point's."""
    axes = [axis for axis in axes_of(name) or () if axis != "batch" and axis not in POSITION_AXES]
    return axes if len(axes) == values.ndim - 1 else None


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind not in "fiub":
        raise _damaged(f"Array {name!r} holds {values.dtype}, which are no real numbers")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32, copy=False)
    flat = values.reshape(-1)
    for start in range(0, flat.size, 2**20):
        if not np.isfinite(flat[start : start + 2**20]).all():
            raise _damaged(f"Array {name!r} holds numbers that are not finite in float32")
    return values


# -- safetensors ------------------------------------------------------------------------------------------------------


def _in_safetensors(file: IO[bytes], max_bytes: int) -> dict[str, Read]:
    if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
        raise _other_kind("no safetensors file, or one whose header is longer than 1 MiB")
    file.seek(0)
    with tempfile.TemporaryDirectory(prefix="neuroscope-upload-") as folder:
        path = Path(folder) / "upload"
        with path.open("wb") as copy:
            shutil.copyfileobj(file, copy, 2**20)
        try:
            opened = TensorFile(path)
        except ValueError as error:
            raise _damaged(f"It is no whole safetensors file: {error}") from error
        # The mapping outlives the file.
    names = [_checked_name(name) for name in opened]
    _check_size([math.prod(opened.shape(name)) for name in names], max_bytes)
    return {name: lambda name=name: _as_numbers(opened, name) for name in names}  # type: ignore[misc]


def _as_numbers(file: TensorFile, name: str) -> np.ndarray:
    values = file.numpy(name)
    return (values.astype(np.uint32) << 16).view(np.float32) if file.is_bfloat16(name) else values


# -- npz --------------------------------------------------------------------------------------------------------------


def _in_npz(file: IO[bytes], max_bytes: int) -> dict[str, Read]:
    _check_directory(file)
    arrays: dict[str, np.ndarray] = {}
    try:
        # Before Python 3.11 a spooled file lacks a method that zipfile calls, and the file behind it has it.
        with zipfile.ZipFile(getattr(file, "_file", file) if not hasattr(file, "seekable") else file) as archive:
            members = archive.infolist()
            if any(member.filename.endswith(".pkl") for member in members):
                raise _other_kind("a pickle, as torch.save writes it, which could run code")
            if odd := next((one.filename for one in members if not one.filename.endswith(".npy")), None):
                raise _other_kind(f"a zip file that holds {odd[:100]!r}")
            names = [_checked_name(member.filename.removesuffix(".npy")) for member in members]
            if len(set(names)) < len(names):
                raise _damaged("The file names an array twice")
            # Nothing is unpacked before all are known to fit; zipfile reads no more than a member says.
            _check_size([member.file_size // 4 for member in members], max_bytes)
            for name, member in zip(names, members, strict=True):
                with archive.open(member) as opened:
                    arrays[name] = payload.read_npy(opened.read(member.file_size))
    except ApiError:
        raise
    except Exception as error:
        # zipfile, zlib and NumPy's reader of headers have many words for damage, and all of these bytes are a caller's.
        raise _damaged("It is no whole npz file of numbers") from error
    _check_size([array.size for array in arrays.values()], max_bytes)
    return {name: lambda array=array: array for name, array in arrays.items()}  # type: ignore[misc]


def _check_directory(file: IO[bytes]) -> None:
    """A zip's list of members is read as a whole when it is opened: so it has to be short."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _END_BYTES - 20))
    tail = file.read()
    file.seek(0)
    end = tail[-_END_BYTES:]
    if len(end) < _END_BYTES or not end.startswith(_END_OF_ZIP) or _END_OF_ZIP64 in tail[:-_END_BYTES]:
        raise _damaged("It is no whole npz file as NumPy writes it")
    if int.from_bytes(end[12:16], "little") > MAX_HEADER_BYTES:
        raise _damaged("The file has too many arrays")


# -- both -------------------------------------------------------------------------------------------------------------


def _checked_name(name: str) -> str:
    if not 0 < len(name) <= MAX_ID_LENGTH or not name.isprintable():
        raise _damaged(f"An array is called by 1 to {MAX_ID_LENGTH} printable characters, not {name[:50]!r}")
    return name


def _check_size(counts: list[int], max_bytes: int) -> None:
    if len(counts) > MAX_ARRAYS:
        raise _damaged(f"The file has {len(counts)} arrays; at most {MAX_ARRAYS} are read")
    if 4 * sum(counts) > max_bytes:
        raise _too_large(
            f"The arrays take {4 * sum(counts)} bytes as float32; this server reads at most {max_bytes} "
            f"({max_bytes / 2**20:.4g} MiB). Send fewer rows or layers"
        )


def _too_large(message: str) -> ApiError:
    return ApiError(413, f"{message}.", code="upload_too_large", param="file")


def _damaged(message: str) -> ApiError:
    return ApiError(400, f"{message}.", code="invalid_file", param="file")


def _other_kind(kind: str) -> ApiError:
    return ApiError(415, f"The file is {kind}. What is read: {_ALLOWED}.", code="unsupported_media_type", param="file")
