"""Tensors in Smalltalk: decoded bit for bit, and computed as NumPy computes them."""

import re

import numpy as np
import pytest
from smalltalk_image import SmalltalkError, bits, record, serve_records, tensors

SPECIAL = [0.0, -0.0, 1.0, -1.5, 0.1, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_kind_of_float_decodes_exactly(image, server, dtype):
    kind = np.finfo(dtype)
    rng = np.random.default_rng(0)
    random_bits = rng.integers(0, 2**kind.bits, 2000, dtype=np.uint64).astype(f"uint{kind.bits}").view(dtype)
    edges = [kind.smallest_subnormal, -kind.smallest_subnormal, kind.tiny, kind.max, -kind.max, kind.eps]
    values = np.concatenate([np.array(SPECIAL, dtype), np.array(edges, dtype), random_bits])[None, None]
    serve_records(server, record(values, dtype=dtype))
    decoded = image.evaluate(f"(({tensors(server)}) at: 'layer_0_residual') first data")
    with np.errstate(invalid="ignore"):  # signalling nans are among the random bits
        np.testing.assert_array_equal(np.array(decoded, np.float64), values[0, 0].astype(np.float64))
    finite = np.isfinite(values[0, 0])
    assert bits(np.array(decoded)[finite], dtype) == bits(values[0, 0][finite], dtype)  # -0 too


def test_nested_lists_decode_like_base64(image, server):
    values = np.random.default_rng(1).normal(size=(1, 3, 4)).astype(np.float32) * 1e-6
    serve_records(server, record(values, encoding="json", hook_id="lists"), record(values, hook_id="base64"))
    lists, base64 = image.evaluate(
        f"t := {tensors(server)}. {{ (t at: 'lists') first data. (t at: 'base64') first data }}"
    )
    assert bits(lists) == bits(base64) == bits(values)


@pytest.mark.parametrize("encoding", ["json", "base64"])
def test_integers_stay_integers(image, server, encoding):
    values = np.array([[[0, -1, 2**31 - 1, -(2**31), 50256]]], np.int32)
    serve_records(server, record(values, encoding=encoding))
    tensor = f"(({tensors(server)}) at: 'layer_0_residual') first"
    assert image.evaluate(f"{{ {tensor} data. {tensor} dtype. {tensor} data class name }}") == [
        values[0, 0].tolist(),
        "int32",
        "Array",
    ]


def test_null_is_a_masked_key_in_scores_and_nan_elsewhere(image, server):
    masked = np.array([[[[0.5, -np.inf]]]], np.float32)
    broken = np.array([[[0.5, np.nan]]], np.float32)
    serve_records(server, record(masked, "attention_scores", encoding="json"), record(broken, encoding="json"))
    found = image.evaluate(
        f"t := {tensors(server)}. "
        "{ (t at: 'layer_0_attention_scores') first data. (t at: 'layer_0_residual') first data }"
    )
    np.testing.assert_array_equal(found, [[0.5, -np.inf], [0.5, np.nan]])


def test_tensors_know_where_and_when_they_were_taken(image, server):
    fields = {"positions": (3, 5), "phase": "decode", "step": 2, "is_input": True}
    expected = record(np.ones((1, 2, 3), np.float32), layer=7, **fields)
    serve_records(server, expected)
    names = ["hookId", "layerName", "component", "hookPoint", "layerIndex", "shape", "dtype", "axes", "positions"]
    names += ["isInput", "phase", "step"]
    found = image.evaluate(
        f"t := (({tensors(server)}) at: 'layer_7_residual') first. {{ {'. '.join('t ' + name for name in names)} }}"
    )
    snake = [re.sub("[A-Z]", lambda match: "_" + match[0].lower(), name) for name in names]
    assert dict(zip(snake, found, strict=True)) == {name: expected[name] for name in snake}


def test_a_record_without_data_makes_a_tensor_that_says_so(image, server):
    serve_records(server, record(np.ones((1, 2, 3), np.float32), encoding="none"))
    tensor = f"(({tensors(server)}) at: 'layer_0_residual') first"
    assert image.evaluate(f"{{ {tensor} hasData. {tensor} shape }}") == [False, [1, 2, 3]]
    with pytest.raises(SmalltalkError, match="layer_0_residual was captured without data"):
        image.evaluate(f"{tensor} norm")


def test_tensor_numbers_equal_numpys(image, server):
    a, b = np.random.default_rng(2).normal(size=(2, 2, 3, 4)).astype(np.float32)
    serve_records(server, record(a, hook_id="a"), record(b, hook_id="b"))
    one, two = a.astype(np.float64), b.astype(np.float64)
    expected = {
        "a norm": np.linalg.norm(one),
        "a mean": one.mean(),
        "a std": one.std(),
        "a min": one.min(),
        "a max": one.max(),
        "a sum": one.sum(),
        "a size": one.size,
        "a dot: b": (one * two).sum(),
        "(a normOfRow: 5)": np.linalg.norm(one.reshape(-1, 4)[4]),
        "(a + b) data": a + b,
        "(a - b) data": a - b,
        "(a * b) data": a * b,
        "(a * 0.1) data": a * np.float64(0.1),
        "(a + 2) data": a + 2,
        "a at: #(2 3 1)": one[1, 2, 0],
        "a at: 6": one.ravel()[5],
        "(a slice: 2 axis: 1) data": one[1],
        "(a slice: 3 axis: 2) data": one[:, 2],
        "(a slice: 1 axis: 3) data": one[:, :, 0],
        "(a slice: 3 axis: 2) shape": (2, 4),
        "(a reshape: #(4 -1)) shape": (4, 6),
        "(a reshape: #(4 6)) at: #(3 2)": one.reshape(4, 6)[2, 1],
        "a copy data": one,
    }
    head = f"t := {tensors(server)}. a := (t at: 'a') first. b := (t at: 'b') first. "
    found = image.evaluate(head + "{" + ". ".join(expected) + "}")
    for (expression, value), answer in zip(expected.items(), found, strict=True):
        np.testing.assert_allclose(answer, np.ravel(value) if np.ndim(value) else value, rtol=1e-6, err_msg=expression)


def test_tensors_describe_themselves_and_copies_are_independent(image, server):
    serve_records(server, record(np.zeros((1, 2, 3), np.float32)))
    tensor = f"t := (({tensors(server)}) at: 'layer_0_residual') first. "
    assert image.evaluate(tensor + "t printString") == "an ActivationTensor(layer_0_residual float32 [1, 2, 3])"
    assert image.evaluate(tensor + "c := t copy. c data at: 1 put: 5. { t at: 1. c at: 1. c hookId }") == [
        0,
        5,
        "layer_0_residual",
    ]
    assert image.evaluate(tensor + "{ (t slice: 1 axis: 1) axes. t axes. (t + 1) axes }") == [
        ["pos", "d_model"],
        ["batch", "pos", "d_model"],
        ["batch", "pos", "d_model"],
    ]


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("ActivationTensor data: #(1 2 3) shape: #(2 2)", r"Expected 4 numbers for shape \[2, 2\], got 3"),
        ("t at: #(1 3)", "Expected an index from 1 to 2, got 3"),
        ("t at: 0", "Expected an index from 1 to 4, got 0"),
        ("t at: #(1)", r"Expected 2 indices for shape \[2, 2\], got 1"),
        ("t + (t reshape: #(4))", r"Expected a shape that broadcasts with \[2, 2\], got \[4\]"),
        ("t dot: (t reshape: #(4))", r"Expected shape \[2, 2\], got \[4\]"),
        ("t reshape: #(3 -1)", r"Expected a shape for 4 elements, got \[3, -1\]"),
        ("t slice: 1 axis: 3", "Expected an axis from 1 to 2, or from -1 to -2 counted from the end, got 3"),
        ("WebGLTensor fromArray: #(#(1 2) #(3))", "Expected 2 elements in each array, got 1"),
        ("WebGLTensor fromArray: #(#(1 2) 3)", "Expected 2 elements in each array, got a number"),
    ],
)
def test_shape_errors_say_what_was_expected_and_what_came(image, expression, complaint):
    with pytest.raises(SmalltalkError, match=complaint) as caught:
        image.evaluate(f"t := ActivationTensor data: #(1 2 3 4) shape: #(2 2). {expression}")
    assert caught.value.details["class"] == "ShapeMismatchError"


def test_webgl_tensor_is_a_cpu_tensor_that_takes_its_shape_from_the_nesting(image):
    tensor = "t := WebGLTensor fromArray: #(#(1 2 3) #(4 5 6)). "
    assert image.evaluate(tensor + "{ t shape. t data. t isOnGPU. t asCPUTensor == t. t at: #(2 3) }") == [
        [2, 3],
        [1, 2, 3, 4, 5, 6],
        False,
        True,
        6,
    ]
    assert image.evaluate("(WebGLTensor fromArray: #()) shape") == [0]
