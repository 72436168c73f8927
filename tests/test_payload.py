"""What goes over the wire comes back bit for bit, or is refused; it never changes on the way."""

import base64
import json
import sys

import numpy as np
import orjson
import pytest

from neuroscope_bridge.payload import (
    DTYPES,
    ENCODINGS,
    PayloadError,
    decode_activation,
    dumps,
    encode_activation,
    encode_vector,
    receipt,
    row_positions,
    stack_records,
)

SEED_FIELDS = ["hook_id", "layer_name", "component", "shape", "dtype", "is_input", "data"]


def encoded(array, **changes):
    array = np.asarray(array)
    fields = {
        "hook_id": "layer_5_residual",
        "layer_name": "transformer.h.5",
        "component": "residual",
        "hook_point": "blocks.5.hook_resid_post",
        "layer_index": 5,
        "axes": ("batch", "pos", "d_model", "extra")[: array.ndim],
        "phase": "prefill",
        "step": 0,
        "positions": (0, 3),
        "is_input": False,
    }
    return encode_activation(array, **(fields | changes))


def over_the_wire(array, **changes):
    return decode_activation(orjson.loads(dumps(encoded(array, **changes))))


def bits(array):
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def random_floats(dtype, count=20_000):
    """Every kind of bit pattern: subnormal, tiny, huge, negative zero. No nan and no inf."""
    size = np.dtype(dtype).itemsize
    raw = np.random.default_rng(7).integers(0, 2 ** (8 * size), count, dtype=np.uint64)
    floats = raw.astype(f"u{size}").view(dtype)
    return np.concatenate([floats[np.isfinite(floats)], np.array([0.0, -0.0], dtype)])


@pytest.mark.parametrize("encoding", ["json", "base64"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_floats_come_back_bit_for_bit(encoding, dtype):
    sent = random_floats(dtype)
    came = over_the_wire(sent, encoding=encoding, dtype=dtype)
    assert came.dtype == dtype
    assert bits(came) == bits(sent)


def test_json_digits_that_float64_would_misread_come_back():
    # The float32 whose shortest digits, read as float64, lie midway to its neighbour.
    sent = np.array([0x15AE43FD, 0x95AE43FD], np.uint32).view(np.float32)
    assert b"7.038531e-26" in dumps(encoded(sent))
    assert np.float32(np.float64("7.038531e-26")) != sent[0]
    assert bits(over_the_wire(sent)) == bits(sent)


@pytest.mark.parametrize("encoding", ["json", "base64"])
@pytest.mark.parametrize("shape", [(), (0,), (1, 0, 4), (0, 3), (2, 3), (1, 2, 3, 4)])
def test_shapes_come_back(encoding, shape):
    sent = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    came = over_the_wire(sent, encoding=encoding)
    assert came.shape == shape
    assert bits(came) == bits(sent)


@pytest.mark.parametrize("encoding", ["json", "base64"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda a: a.T,
        lambda a: a[::-1, ::2],
        lambda a: np.asfortranarray(a),
        lambda a: a.astype(">f4"),
        lambda a: np.broadcast_to(a[:1], (4, 6)),
        lambda a: a.astype(np.float64),
    ],
    ids=["transposed", "strided", "fortran", "big-endian", "broadcast", "float64"],
)
def test_memory_layout_does_not_matter(encoding, layout):
    sent = layout(np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32))
    came = over_the_wire(sent, encoding=encoding)
    assert came.dtype == np.float32
    np.testing.assert_array_equal(came, sent)


@pytest.mark.parametrize("encoding", ["json", "base64"])
@pytest.mark.parametrize("source", ["int8", "uint8", "int32", "uint32", "int64", ">i4", "bool"])
def test_integers_travel_as_int32_whatever_dtype_was_asked(encoding, source):
    sent = np.array([[0, 1, 100]]).astype(source)
    came = over_the_wire(sent, encoding=encoding, dtype="float16")
    assert came.dtype == np.int32
    np.testing.assert_array_equal(came, [[0, 1, int(sent[0, 2])]])


@pytest.mark.parametrize("encoding", ["json", "base64"])
def test_extreme_integers_come_back(encoding):
    sent = np.array([-(2**31), 2**31 - 1], np.int64)
    np.testing.assert_array_equal(over_the_wire(sent, encoding=encoding), sent)


def test_base64_is_little_endian_c_order_and_keeps_what_is_not_finite():
    sent = np.array([[1.0, -np.inf], [np.inf, np.nan]], np.float32)
    record = encoded(sent.T, encoding="base64")
    assert base64.b64decode(record["data"]) == np.array([1.0, np.inf, -np.inf, np.nan], "<f4").tobytes()
    np.testing.assert_array_equal(decode_activation(record), sent.T)


def test_json_has_null_for_what_is_not_finite():
    record = json.loads(dumps(encoded(np.array([1.5, np.nan, np.inf, -np.inf], np.float32))))
    assert record["data"] == [1.5, None, None, None]
    np.testing.assert_array_equal(decode_activation(record), np.array([1.5, np.nan, np.nan, np.nan], np.float32))


def test_null_in_attention_scores_is_a_masked_key():
    scores = np.array([[[[0.5, -np.inf], [0.25, 0.75]]]], np.float32)
    named = {"component": "attention_scores", "hook_point": "blocks.5.attn.hook_attn_scores"}
    np.testing.assert_array_equal(over_the_wire(scores, **named), scores)
    # the hook point decides, whatever the request called it
    np.testing.assert_array_equal(over_the_wire(scores, hook_point="blocks.5.attn.hook_attn_scores"), scores)
    seed_record = {"component": "attention_scores", "shape": [1], "dtype": "float32", "data": [None]}
    assert decode_activation(seed_record)[0] == -np.inf


def test_record_has_the_documented_fields():
    record = encoded(np.zeros((1, 3, 4), np.float32))
    assert [name for name in record if name in SEED_FIELDS] == SEED_FIELDS
    assert {name: value for name, value in record.items() if name != "data"} == {
        "hook_id": "layer_5_residual",
        "layer_name": "transformer.h.5",
        "component": "residual",
        "shape": [1, 3, 4],
        "dtype": "float32",
        "is_input": False,
        "hook_point": "blocks.5.hook_resid_post",
        "layer_index": 5,
        "axes": ["batch", "pos", "d_model"],
        "phase": "prefill",
        "step": 0,
        "pass_index": 0,
        "positions": [0, 3],
        "position_ids": None,
        "heads": None,
        "reduce": None,
        "encoding": "json",
    }


def test_encoding_none_describes_without_data():
    record = encoded(np.zeros((1, 3, 4), np.float32), encoding="none", dtype="float16")
    assert "data" not in record
    assert (record["shape"], record["dtype"]) == ([1, 3, 4], "float16")
    with pytest.raises(PayloadError, match="has no data"):
        decode_activation(record)


def test_decoded_arrays_are_writable_and_native():
    for encoding in ("json", "base64"):
        came = over_the_wire(np.ones((2, 2), np.float32), encoding=encoding)
        came[0, 0] = 5
        assert came.dtype.byteorder in ("=", "<" if sys.byteorder == "little" else ">")


def test_float16_never_makes_a_finite_number_infinite():
    with pytest.raises(PayloadError, match=r"70000 is beyond the largest float16, 65504. .*'float32'"):
        encoded(np.array([1.0, -70000.0], np.float32), dtype="float16")
    kept = over_the_wire(np.array([65504.0, -np.inf], np.float32), dtype="float16", encoding="base64")
    np.testing.assert_array_equal(kept, [65504.0, -np.inf])


@pytest.mark.parametrize(
    "value", [np.array([1e300]), np.array([2**31]), np.array([-(2**31) - 1]), np.array([2**32 - 1])]
)
def test_numbers_beyond_the_wire_dtype_are_refused(value):
    with pytest.raises(PayloadError, match="beyond"):
        encoded(value)


@pytest.mark.parametrize(
    ("array", "changes", "message"),
    [
        (np.zeros(2), {"encoding": "npy"}, "Choose from: json, base64, none"),
        (np.zeros(2), {"dtype": "bfloat16"}, "Choose from: float32, float16"),
        (np.zeros(2, complex), {}, "complex128 have no wire format"),
        (np.array(["a"]), {}, "have no wire format"),
        (np.zeros((2, 2)), {"axes": ("batch",)}, r"shape \[2, 2\] has 2 axes, 1 are named: \['batch'\]"),
    ],
)
def test_what_cannot_be_encoded_is_refused_with_what_can(array, changes, message):
    with pytest.raises(PayloadError, match=message):
        encoded(array, **changes)


def test_unknown_axes_may_be_left_empty():
    assert encoded(np.zeros((2, 2), np.float32), axes=())["axes"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [1.0, 2.0]}, r"needs 3 numbers, data has 2"),
        ({"data": [[1.0], [2.0, 3.0]]}, "data is not float32"),
        ({"data": {"a": 1}}, "data is not float32"),
        ({"data": [1e39, 0, 0]}, "beyond the largest float32"),
        ({"data": None}, "has no data"),
        ({"encoding": "gzip"}, "unknown encoding 'gzip'"),
        ({"dtype": "mlx.core.float32"}, "unknown dtype"),
        ({"shape": [-3]}, "list of sizes"),
        ({"shape": "3"}, "list of sizes"),
        ({"dtype": "int32", "data": [1, 2, 3.5]}, "integers expected"),
        ({"dtype": "int32", "data": [1, 2, None]}, "integers expected"),
        ({"dtype": "int32", "data": [1, 2, 2**31]}, "beyond int32"),
        ({"encoding": "base64", "data": "AAA!"}, "not base64"),
        ({"encoding": "base64", "data": "AAAA"}, "data is not float32 in base64"),
        ({"encoding": "base64", "data": "AAAAAA=="}, "needs 3 numbers, data has 1"),
        ({"encoding": "base64", "data": [1.0]}, "expected a base64 string"),
    ],
)
def test_damaged_records_are_refused(changes, message):
    record = {"hook_id": "h", "shape": [3], "dtype": "float32", "encoding": "json", "data": [1.0, 2.0, 3.0]}
    np.testing.assert_array_equal(decode_activation(record), [1, 2, 3])
    with pytest.raises(PayloadError, match=message):
        decode_activation(record | changes)


def test_base64_with_foreign_characters_is_refused():
    record = {"hook_id": "h", "shape": [1], "dtype": "float32", "encoding": "base64", "data": "AAAAAA=="}
    assert decode_activation(record) == [0]
    with pytest.raises(PayloadError, match="not base64"):
        decode_activation(record | {"data": "AA!AAAA=="})


def test_dumps_is_strict_json():
    text = dumps({"a": float("nan"), "b": [float("inf")], "c": np.float32(0.1), "d": np.array(2.5), "e": "Zürich"})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None], "c": 0.1, "d": 2.5, "e": "Zürich"}


@pytest.mark.parametrize("thing", [{"a": object()}, {1: 2}, np.array(["text"]), "\ud800"])
def test_dumps_refuses_what_has_no_json_form(thing):
    with pytest.raises(PayloadError, match="Cannot be written as JSON"):
        dumps(thing)


def test_receipt_counts_records_positions_and_bytes():
    prefill = np.zeros((1, 10, 8), np.float32)
    decode = np.zeros((1, 1, 8), np.float32)
    for encoding in ENCODINGS:
        records = [
            encoded(prefill, positions=(0, 10), encoding=encoding),
            encoded(decode, positions=(10, 11), encoding=encoding),
        ]
        assert receipt(records) == {"fired": 2, "positions": [0, 11], "bytes": 11 * 8 * 4}
    half = encoded(prefill, positions=(0, 10), dtype="float16", encoding="base64")
    assert receipt([half])["bytes"] == len(base64.b64decode(half["data"])) == 160
    assert receipt([]) == {"fired": 0, "positions": None, "bytes": 0}


def test_stack_joins_records_by_position_not_by_arrival():
    whole = np.random.default_rng(0).standard_normal((1, 6, 4)).astype(np.float32)
    records = [encoded(whole[:, a:b], positions=(a, b), encoding="base64") for a, b in ((0, 4), (4, 5), (5, 6))]
    np.testing.assert_array_equal(stack_records(records[::-1]), whole)


def test_stack_joins_selected_positions():
    whole = np.random.default_rng(0).standard_normal((1, 9, 4)).astype(np.float32)
    records = [
        encoded(whole[:, [8]], positions=(8, 9)),
        encoded(whole[:, [0, 3, 4]], positions=(0, 5), position_ids=[0, 3, 4]),
        encoded(whole[:, [6]], positions=(6, 7)),
    ]
    records = orjson.loads(dumps(records))
    np.testing.assert_array_equal(stack_records(records), whole[:, [0, 3, 4, 6, 8]])
    assert [list(row_positions(record)) for record in records] == [[8], [0, 3, 4], [6]]


def test_stack_pads_the_keys_of_selected_queries():
    rows = np.random.default_rng(0).standard_normal((1, 2, 6, 6)).astype(np.float32)
    whole = np.where(np.tri(6, dtype=bool), rows, np.float32(0))
    about = {"component": "attention_pattern", "hook_point": "blocks.0.attn.hook_pattern"}
    about["axes"] = ("batch", "head", "query", "key")
    records = [
        encoded(whole[:, :, [1, 2], :4], positions=(1, 3), **about),
        encoded(whole[:, :, [5]], positions=(5, 6), **about),
    ]
    np.testing.assert_array_equal(stack_records(records), whole[:, :, [1, 2, 5]])


@pytest.mark.parametrize(
    ("component", "hook_point", "fill"),
    [
        ("attention_pattern", "blocks.0.attn.hook_pattern", 0.0),
        ("attention_scores", "blocks.0.attn.hook_attn_scores", -np.inf),
    ],
)
def test_stack_pads_the_keys_of_earlier_queries(component, hook_point, fill):
    rows = np.random.default_rng(0).standard_normal((1, 2, 5, 5)).astype(np.float32)
    whole = np.where(np.tri(5, dtype=bool), rows, np.float32(fill))
    records = [
        encoded(
            whole[:, :, a:b, :b],
            component=component,
            hook_point=hook_point,
            axes=("batch", "head", "query", "key"),
            positions=(a, b),
        )
        for a, b in ((0, 3), (3, 4), (4, 5))
    ]
    np.testing.assert_array_equal(stack_records(orjson.loads(dumps(records))), whole)


def test_stack_refuses_what_does_not_join():
    def record(start, stop, **changes):
        return encoded(np.zeros((1, stop - start, 2), np.float32), positions=(start, stop), **changes)

    with pytest.raises(PayloadError, match="No records"):
        stack_records([])
    with pytest.raises(PayloadError, match=r"\[0, 3\] are followed by \[2, 4\]"):
        stack_records([record(0, 3), record(2, 4)])
    with pytest.raises(PayloadError, match="one hook_point"):
        stack_records([record(0, 3), record(3, 4, hook_point="blocks.5.ln1.hook_normalized")])
    with pytest.raises(PayloadError, match="one is_input"):
        stack_records([record(0, 3), record(3, 4, is_input=True)])
    with pytest.raises(PayloadError, match="no position axis"):
        stack_records([record(0, 3, axes=("batch", "head", "d_head"))])
    with pytest.raises(PayloadError, match=r"3 rows for positions \[0, 9\]"):
        stack_records([record(0, 3) | {"positions": [0, 9]}])
    with pytest.raises(PayloadError, match=r"3 rows for positions \[0, 2\]"):
        stack_records([record(0, 3) | {"position_ids": [0, 2]}])
    with pytest.raises(PayloadError, match="one heads"):
        stack_records([record(0, 3), record(3, 4, heads=[1])])
    with pytest.raises(PayloadError, match="one reduce"):
        stack_records([record(0, 3), record(3, 4, reduce="norm")])
    means = [
        record(0, 3, axes=("batch", "a", "b"), reduce="mean"),
        record(3, 4, axes=("batch", "a", "b"), reduce="mean"),
    ]
    with pytest.raises(PayloadError, match="each record is the 'mean' over its own positions"):
        stack_records(means)
    windowed = encoded(np.zeros((1, 1, 1, 4), np.float32), axes=("batch", "head", "query", "key"), positions=(9, 10))
    with pytest.raises(PayloadError, match="do not start at position 0"):
        stack_records([windowed])


def test_records_of_several_passes_are_not_stacked():
    first, second = (encoded(np.zeros((1, 3, 4), np.float32)) | {"pass_index": index} for index in (0, 1))
    with pytest.raises(PayloadError, match=r"these are of the passes \[0, 1\]: pick by pass_index"):
        stack_records([first, second])
    assert stack_records([second]).shape == (1, 3, 4)


@pytest.mark.parametrize("numbers", [[0.5, -1.0], np.arange(5), np.array([1e-45, 3e38]), np.float16([1.5])])
def test_a_vector_is_a_record_of_32_bit_floats(numbers):
    record = json.loads(dumps(encode_vector(numbers)))
    np.testing.assert_array_equal(decode_activation(record), np.asarray(numbers, np.float32))
    assert (record["shape"], record["dtype"]) == ([len(numbers)], "float32")


def test_a_vector_may_be_a_record_of_one_row():
    assert encode_vector([[[1, 2]]]) == encode_vector([1, 2])


NO_VECTORS = [[], 1, [[]], [[1, 2], [3, 4]], ["a"], [True], [np.nan], [np.inf], [1e39], [1, None], [[1], [2, 3]]]


@pytest.mark.parametrize("numbers", NO_VECTORS)
def test_what_is_no_vector_is_refused(numbers):
    with pytest.raises(PayloadError):
        encode_vector(numbers)
