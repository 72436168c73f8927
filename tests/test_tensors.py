"""npy, safetensors and base64 against NumPy's own, the safetensors library and Python's own."""

import base64
import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from neuroscope_bridge import base64_text
from neuroscope_bridge.errors import PayloadError
from neuroscope_bridge.payload import (
    array_bytes,
    decode_activation,
    dumps,
    encode_activation,
    npy_header,
    read_npy,
    read_safetensors,
    safetensors_buffers,
    safetensors_header,
)

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "r0/blocks.0.hook_resid_post": RANDOM.standard_normal((1, 3, 5)).astype(np.float32),
    "halves": RANDOM.standard_normal((2, 7)).astype(np.float16),
    "ids \u00e9\u4e16\"\\": np.array([[1, -2, 2**31 - 1]], np.int32),
    "special": np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32),
    "none": np.empty((1, 0, 4), np.float32),
    "one": np.array(2.5, np.float32),
    "transposed": RANDOM.standard_normal((4, 3)).astype(np.float32).T,
    "big-endian": np.arange(4, dtype=">f4"),
}  # fmt: skip


def same(one: np.ndarray, other: np.ndarray) -> bool:
    little = other.astype(other.dtype.newbyteorder("<"))
    return one.dtype == little.dtype and one.shape == little.shape and one.tobytes() == little.tobytes()


def written(arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> bytes:
    return b"".join(safetensors_buffers(arrays, metadata or {}))


def test_the_safetensors_library_reads_what_is_written() -> None:
    found = load(written(ARRAYS, {"model": "tiny"}))
    assert set(found) == set(ARRAYS)
    assert all(same(found[name], array) for name, array in ARRAYS.items())


def test_what_the_safetensors_library_writes_is_read() -> None:
    plain = {name: np.array(array, array.dtype.newbyteorder("="), order="C") for name, array in ARRAYS.items()}
    found, metadata = read_safetensors(save(plain, {"model": "tiny", "axes": '["batch"]'}))
    assert metadata == {"model": "tiny", "axes": '["batch"]'}
    assert set(found) == set(ARRAYS)
    assert all(same(found[name], array) for name, array in plain.items())


def test_arrays_lie_aligned_and_are_views_of_what_was_read() -> None:
    content = written(ARRAYS)
    assert int.from_bytes(content[:8], "little") % 8 == 0
    buffer = np.frombuffer(content, np.uint8).copy()
    found, _ = read_safetensors(buffer.data)
    assert all(np.shares_memory(array, buffer) for array in found.values() if array.size)
    buffer[:] = 0
    assert not found["halves"].any()


def test_nothing_is_copied_on_the_way_out() -> None:
    array = ARRAYS["halves"]
    assert np.shares_memory(np.frombuffer(safetensors_buffers({"a": array}, {})[1], np.uint8), array)
    assert np.shares_memory(np.frombuffer(array_bytes(array), np.uint8), array)


@pytest.mark.parametrize("array", [np.zeros(2, np.float64), np.zeros(2, bool), np.array([None])])
def test_other_types_are_refused(array: np.ndarray) -> None:
    with pytest.raises(PayloadError, match="float32, float16, int32"):
        safetensors_header({"a": (array.dtype, array.shape)}, {})


def header(**tensors: Any) -> bytes:
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 8


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": b"",
    "short": b"\x01\x00",
    "a header beyond the end": b"\xff" * 16,
    "no JSON": b"\x02" + b"\0" * 7 + b"{x",
    "a list": b"\x02" + b"\0" * 7 + b"[]",
    "an unknown type": header(a=F32 | {"dtype": "F64"}),
    "another size": header(a=F32 | {"shape": [3]}),
    "beyond the end": header(a=F32 | {"shape": [4], "data_offsets": [0, 16]}),
    "backwards": header(a=F32 | {"data_offsets": [8, 0]}),
    "before the start": header(a=F32 | {"data_offsets": [-8, 0]}),
    "no offsets": header(a={"dtype": "F32", "shape": [2]}),
    "shape of text": header(a=F32 | {"shape": "2"}),
    "a negative shape": header(a=F32 | {"shape": [-1, -2]}),
    "not an object": header(a=7),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_safetensors_file_is_one_error(what: str) -> None:
    with pytest.raises(PayloadError):
        read_safetensors(DAMAGED[what])


@pytest.mark.parametrize("name", ARRAYS)
def test_numpy_reads_what_is_written_as_npy(name: str) -> None:
    array = ARRAYS[name]
    content = npy_header(array.dtype, array.shape) + bytes(array_bytes(array))
    assert same(np.load(io.BytesIO(content), allow_pickle=False), array)
    assert same(read_npy(content), array)


def test_what_numpy_writes_as_npy_is_read() -> None:
    for array in ARRAYS.values():
        file = io.BytesIO()
        np.save(file, array)
        found = read_npy(file.getvalue())
        assert found.dtype == array.dtype
        assert np.array_equal(found, array, equal_nan=True)


def test_an_npy_file_of_objects_or_a_cut_one_is_refused() -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(PayloadError, match="objects"):
        read_npy(file.getvalue())
    whole = npy_header(np.dtype("<f4"), (2,)) + b"\0" * 8
    for damaged in (b"", b"\x93NUMPY", whole[:-1], whole + b"\0", pickle.dumps([1]), whole[:60]):
        with pytest.raises(PayloadError):
            read_npy(damaged)


@pytest.mark.parametrize("size", [*range(12), 3 * (1 << 15) - 1, 3 * (1 << 15), 3 * (1 << 15) + 1, 300_001])
def test_base64_is_pythons(size: int) -> None:
    content = RANDOM.integers(0, 256, size, np.uint8).tobytes()
    found = base64_text.decode(base64.b64encode(content).decode())
    assert found.tobytes() == content
    assert found.flags.writeable


LONG = base64.b64encode(bytes(200_000)).decode()


@pytest.mark.parametrize(
    "text",
    ["A", "AA", "AAA", "AAAAA", "====", "A===", "AA=A", "AAAA====", "AA==AAAA", "A-AA", "AA A", "AAA\n", "\u00e9AAA",
     "AAAA\u4e16AAA", "!AAAAAAA", "AAAA\nAAA", LONG + "A", LONG[:-1], LONG[:-4] + "A\0AA", "*" + LONG[1:],
     LONG[:150_000] + "=" + LONG[150_001:]],
)  # fmt: skip
def test_what_is_not_base64_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not base64"):
        base64_text.decode(text)


def test_every_character_has_its_value() -> None:
    content = bytes(range(256)) * 3
    assert base64_text.decode(base64.b64encode(content).decode()).tobytes() == content


def test_numbers_of_half_the_range_survive_both_roundings() -> None:
    about = dict.fromkeys(("hook_id", "layer_name", "component", "hook_point", "phase"), "x") | {
        "layer_index": 0,
        "axes": ("pos",),
        "step": 0,
        "positions": (0, 1),
        "is_input": False,
    }
    bits = RANDOM.integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    tiny = np.arange(0, 2**23, 997, dtype=np.uint32).view(np.float32)
    for array in (bits[np.isfinite(bits)], tiny, -tiny):
        record = json.loads(dumps(encode_activation(array, **about)))
        assert decode_activation(record).tobytes() == array.tobytes()
