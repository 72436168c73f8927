"""Files with activations: what is read of them, and what is refused before it does harm."""

import io
import json
import pickle
import struct
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from api_server.errors import ApiError
from api_server.uploads import MAX_ARRAYS, read_upload
from mlx_hooks.storage.shards import ShardWriter

LIMIT = 2**20
VALUES = np.arange(12, dtype=np.float32).reshape(4, 3) / 7


def npz(compress: bool = False, **arrays: Any) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(file, **arrays)
    return file.getvalue()


def safetensors(arrays: dict[str, mx.array]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        mx.save_safetensors(str(path), arrays)
        return path.read_bytes()


def by_hand(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file that says what its header says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def read(content: bytes, limit: int = LIMIT) -> Any:
    return read_upload(io.BytesIO(content), limit)


def refused(content: bytes, limit: int = LIMIT) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(content, limit)
    return caught.value


@pytest.mark.parametrize("compress", [False, True])
def test_arrays_of_an_npz_file_are_layers(compress: bool) -> None:
    layers = read(npz(compress, layer1=VALUES, **{"blocks.2.attn.hook_z": np.ones((4, 2, 3), np.float64)}))
    assert list(layers) == ["layer1", "blocks.2.attn.hook_z"]
    np.testing.assert_array_equal(layers["layer1"].take(np.arange(4)).values, VALUES)
    assert layers["layer1"].shape == (3,)
    assert layers["blocks.2.attn.hook_z"].axes == ("head", "d_head")


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int32])
def test_numbers_of_every_type_arrive_as_float32(dtype: mx.Dtype) -> None:
    values = (mx.array(VALUES) * 10).astype(dtype)
    found = read(safetensors({"layer1": values}))["layer1"].take(np.arange(4)).values
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array(values.astype(mx.float32)))


def test_a_shard_is_read_with_its_tokens(tmp_path: Path) -> None:
    layers = {
        "blocks.0.hook_resid_post": {"axes": ["d_model"], "shape": [3]},
        "blocks.0.attn.hook_pattern": {"axes": ["head", "key"], "shape": [2, 4]},
    }
    arrays = {"blocks.0.hook_resid_post": mx.array(VALUES), "blocks.0.attn.hook_pattern": mx.ones((4, 2, 4))}
    (path,) = ShardWriter(tmp_path, layers=layers).write(
        arrays, tokens=[7, 8, 9, 7], sequence=[0, 0, 1, 1], position=[0, 1, 0, 1], step=200
    )
    found = read(path.read_bytes())
    assert list(found) == list(layers)
    part = found["blocks.0.hook_resid_post"].take([3, 1])
    np.testing.assert_array_equal(part.values, VALUES[[3, 1]])
    assert part.tokens is not None
    assert part.tokens.tolist() == [7, 8]
    whole = found["blocks.0.attn.hook_pattern"].take(np.arange(4))
    assert found["blocks.0.attn.hook_pattern"].axes == ("head", "key")
    assert whole.sequences is not None
    assert whole.sequences.tolist() == [0, 0, 1, 1]


class Evil:
    """Whoever unpickles it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    bomb = pickle.dumps(Evil(trap))
    of_objects = io.BytesIO()
    np.save(of_objects, np.array([[Evil(trap)]], dtype=object))
    files = {
        bomb: 415,
        pickle.dumps(Evil(trap), protocol=2): 415,
        zipped({"archive/data.pkl": bomb, "archive/version": b"3"}): 415,
        zipped({"a.npy": bomb}): 400,
        zipped({"a.npy": of_objects.getvalue()}): 400,
    }
    for content, status in files.items():
        error = refused(content)
        assert error.status == status
        assert error.param == "file"
    assert "pickle" in refused(bomb).message
    assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"PK", b"PK\x03\x04", b"\x80", b"hello", b"{}" * 100, b"\xff" * 64, npy(VALUES), zipped({"a.txt": b"x"})],
    ids=["empty", "PK", "zip", "x80", "text", "json", "ff", "npy", "other zip"],
)
def test_other_files_are_refused(content: bytes) -> None:
    assert refused(content).status in (400, 415)


def test_a_file_that_is_cut_off_is_refused() -> None:
    for content in (npz(layer1=VALUES), npz(True, layer1=VALUES), safetensors({"layer1": mx.array(VALUES)})):
        read(content)
        for size in range(len(content)):
            assert refused(content[:size]).status in (400, 415)


@pytest.mark.parametrize("compress", [False, True])
def test_a_flipped_byte_is_read_or_refused(compress: bool) -> None:
    content = bytearray(npz(compress, layer1=VALUES, tokens=np.arange(4)))
    for at in range(len(content)):
        content[at] ^= 0xFF
        # Any other exception fails the test.
        with suppress(ApiError):
            read(bytes(content))
        content[at] ^= 0xFF


def test_what_would_unpack_to_too_much_is_not_unpacked() -> None:
    bomb = npz(True, layer1=np.zeros((2**14, 2**10), np.float32))
    assert len(bomb) < 2**17
    tracemalloc.start()
    try:
        error = refused(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (error.status, error.code) == (413, "upload_too_large")
    assert peak < 2**22


def test_a_member_that_lies_about_its_size_is_no_bomb() -> None:
    content = zipped({"a.npy": npy(np.zeros((2**12, 2**8), np.float32))})
    size = struct.pack("<I", 2**22 + 128)
    assert content.count(size) == 2
    error = refused(content.replace(size, struct.pack("<I", 1024)))
    assert error.status == 400


def test_half_precision_counts_as_what_it_becomes() -> None:
    packed = np.zeros((2**10, 2**8), np.float16)
    assert packed.nbytes < LIMIT
    read(npz(a=packed))
    assert refused(npz(a=packed, b=packed[:1])).status == 413
    assert refused(safetensors({"a": mx.array(packed), "b": mx.array(packed[:1])})).status == 413


OF_HEADERS: dict[str, Callable[[], bytes]] = {
    "no object": lambda: by_hand([1]),
    "deep": lambda: by_hand(b"[" * 100_000),
    "long": lambda: struct.pack("<Q", 2**40) + b"{}",
    "no offsets": lambda: by_hand({"a": {"dtype": "F32", "shape": [1, 1]}}),
    "odd type": lambda: by_hand({"a": {"dtype": "OBJ", "shape": [1, 1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "below zero": lambda: by_hand({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "outside": lambda: by_hand({"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}}, b"\0" * 4),
    "before": lambda: by_hand({"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [-8, 0]}}, b"\0" * 8),
    "wraps": lambda: by_hand({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
    "fractions": lambda: by_hand({"a": {"dtype": "F32", "shape": [1.0, 1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "texts": lambda: by_hand({"a": {"dtype": "F32", "shape": ["1", 1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "list as type": lambda: by_hand({"a": {"dtype": [], "shape": [1, 1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "no rows": lambda: by_hand({"a": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]}}),
    "complex": lambda: by_hand({"a": {"dtype": "C64", "shape": [1, 1], "data_offsets": [0, 8]}}, b"\0" * 8),
    "npy of records": lambda: zipped({"a.npy": npy(np.zeros(3, [("x", "f4")]))}),
    "npy of texts": lambda: zipped({"a.npy": npy(np.array([["a"]]))}),
    "npy header": lambda: zipped({"a.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 20000) + b"(" * 20000}),
    "npy sizes": lambda: zipped({"a.npy": npy(VALUES).replace(b"(4, 3)", b"(9, 9)")}),
    "npy below zero": lambda: zipped({"a.npy": npy(VALUES).replace(b"(4, 3), ", b"(-4, -3)")}),
    "not compressed by deflate": lambda: zipped({"a.npy": npy(VALUES)}, zipfile.ZIP_LZMA)[:60],
}


@pytest.mark.parametrize("name", OF_HEADERS)
def test_a_header_that_lies_is_refused(name: str) -> None:
    assert refused(OF_HEADERS[name]()).status in (400, 415)


def test_a_header_longer_than_any_file_needs_is_not_read() -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}}).encode()
    read(by_hand(header.ljust(2**20), b"\0" * 4))
    assert refused(by_hand(header.ljust(2**20 + 8), b"\0" * 4)).status == 415


def test_many_names_for_the_same_bytes_count_each() -> None:
    entry = {"dtype": "F32", "shape": [256, 256], "data_offsets": [0, 2**18]}
    content = by_hand({f"a{i}": entry for i in range(5)}, b"\0" * 2**18)
    assert refused(content).status == 413
    assert refused(by_hand({f"a{i}": entry for i in range(MAX_ARRAYS + 1)}, b"\0" * 2**18)).status == 400


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    values = VALUES.copy()
    values[3, 2] = value
    for content in (npz(layer1=values), safetensors({"layer1": mx.array(values)})):
        assert "not finite" in refused(content).message
    assert "not finite" in refused(npz(layer1=np.full((2, 2), 1e300))).message


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"tokens": np.arange(4)}, "no activations"),
        ({"a": VALUES, "tokens": np.arange(3)}, "one number per row, 4"),
        ({"a": VALUES, "tokens": VALUES}, "one whole number per row"),
        ({"a": VALUES, "tokens": np.array([0.5] * 4)}, "one whole number per row"),
        ({"a": VALUES, "tokens": np.array([0, 1, 2, 2**31])}, "2147483647"),
        ({"a": VALUES, "tokens": np.array([0, 1, 2, -1])}, "from 0"),
        ({"a": VALUES, "position": np.array([0, 1, 2, 2**63], np.uint64)}, "2147483647"),
        ({"a": np.arange(4.0)}, "[row, feature]"),
        ({"a\n": VALUES}, "printable"),
        ({"a" * 201: VALUES}, "printable"),
    ],
)
def test_what_holds_no_rows_is_refused(arrays: dict[str, Any], says: str) -> None:
    error = refused(npz(**arrays))
    assert (error.status, error.code) == (400, "invalid_file")
    assert says in error.message


def test_rows_are_not_wider_than_results_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_server.uploads.MAX_WIDTH", 6)
    read(npz(a=VALUES, b=VALUES))
    error = refused(npz(a=VALUES, b=VALUES, c=VALUES[:, :1]))
    assert (error.status, error.code) == (413, "upload_too_large")
    assert "7 numbers; at most 6" in error.message


def test_a_zip_of_the_other_kind_is_not_read() -> None:
    content = bytearray(zipped({"a.npy": npy(VALUES)}))
    # The locator of a zip64 list of members, which would be read in the place of the one that was looked at.
    locator = b"PK\x06\x07" + bytes(16)
    assert "as NumPy writes it" in refused(bytes(content[:-22] + locator + content[-22:])).message


def test_names_never_become_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = ["../../evil", "/etc/evil", "..\\evil", "C:evil"]
    content = zipped({f"{name}.npy": npy(VALUES) for name in names})
    assert set(read(content)) >= {"../../evil", "/etc/evil"}
    assert set(read(safetensors({name: mx.array(VALUES) for name in names}))) == set(names)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_comes_twice_is_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", npy(VALUES))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.npy", npy(VALUES))
    assert "twice" in refused(file.getvalue()).message


def test_a_list_of_members_that_is_too_long_is_not_read() -> None:
    content = bytearray(zipped({"a.npy": npy(VALUES)}))
    content[-10:-6] = struct.pack("<I", 2**31)
    assert "too many arrays" in refused(bytes(content)).message


def test_a_member_whose_bytes_are_damaged_is_refused() -> None:
    content = zipped({"a.npy": npy(VALUES)}, zipfile.ZIP_STORED)
    damaged = content.replace(VALUES.tobytes(), (VALUES + 1).tobytes())
    assert zlib.crc32(damaged) != zlib.crc32(content)
    assert refused(damaged).code == "invalid_file"
