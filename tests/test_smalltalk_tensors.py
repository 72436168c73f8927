"""Tensors in Smalltalk: decoded bit for bit, and computed as NumPy computes them."""

import base64
import re

import numpy as np
import pytest
from smalltalk_image import SmalltalkError, bits, literal, record, serve_records, tensors

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
    with pytest.raises(SmalltalkError, match="layer_0_residual has no data here"):
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


# -- against NumPy, over many shapes ---------------------------------------------------------------


MAKE = (
    "make := [ :dtype :shape :data | ActivationTensor fromRecord: (Dictionary new at: 'dtype' put: dtype;"
    " at: 'shape' put: shape; at: 'encoding' put: 'base64'; at: 'data' put: data; yourself) ]. "
)


def tensor(array, dtype="float32"):
    """The expression of an array as a tensor, its bits as they are; needs MAKE before it."""
    array = np.asarray(array, dtype)
    data = base64.b64encode(array.tobytes()).decode()
    return f"(make value: '{dtype}' value: {smalltalk(list(array.shape))} value: '{data}')"


TENSOR = re.compile(r"\(make value: '\w+' value: #\([\d ]*\) value: '[^']*'\)")


def smalltalk(value):
    """A literal of numbers, strings and lists of them."""
    if isinstance(value, list):
        return f"#({' '.join(smalltalk(each).removeprefix('#') for each in value)})"
    return literal(value) if isinstance(value, str) else repr(value)


def numbers(rng, shape, special=False):
    array = rng.normal(size=shape).astype(np.float32)
    if special and array.size:
        where = rng.integers(0, array.size, max(1, array.size // 4))
        array.reshape(-1)[where] = rng.choice(np.array(SPECIAL, np.float32), where.size)
    return array


def random_shape(rng, rank=None, least=1):
    return tuple(int(each) for each in rng.integers(least, 5, rng.integers(0, 5) if rank is None else rank))


def meeting_shape(rng, shape):
    """A shape that broadcasts with this one: axes gone from the left, extents of 1 here and there."""
    kept = shape[int(rng.integers(0, len(shape) + 1)) :]
    return tuple(1 if rng.random() < 0.4 else each for each in kept)


def check(image, cases, exact=False, rtol=1e-6):
    """Evaluate expressions of tensors; each must have the shape and the numbers of its array."""
    made = {}  # each tensor is made once, which is much faster; none of what is sent to it may change it
    shown = [
        TENSOR.sub(lambda found: made.setdefault(found[0], f"t{len(made)}"), f"show value: ({expression})")
        for expression, _ in cases
    ]
    making = "".join(f"{name} := {expression}. " for expression, name in made.items())
    script = f"{MAKE}{making}show := [ :t | {{ t shape. t data }} ]. {{{'. '.join(shown)}}}"
    for (expression, expected), (shape, data) in zip(cases, image.evaluate(script), strict=True):
        expected = np.asarray(expected)
        assert tuple(shape) == expected.shape, expression
        found = np.array(data, np.float64).reshape(expected.shape)
        if exact:
            np.testing.assert_array_equal(found, expected.astype(np.float64), err_msg=expression)
            assert np.array_equal(np.signbit(found[found == 0]), np.signbit(expected[found == 0])), expression
        else:
            np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-6, err_msg=expression)


@pytest.mark.parametrize("seed", range(8))
def test_arithmetic_broadcasts_as_numpys_does_over_200_shapes(image, seed):
    rng = np.random.default_rng(seed)
    cases = []
    for _ in range(25):
        shape = random_shape(rng, least=int(rng.random() > 0.1))
        shapes = [shape, meeting_shape(rng, shape)]
        one, other = (numbers(rng, each, special=True) for each in (shapes if rng.random() < 0.5 else shapes[::-1]))
        divisor = np.where(other == 0, np.float32(2), other)
        with np.errstate(all="ignore"):
            cases += [
                (f"{tensor(one)} + {tensor(other)}", one + other),
                (f"{tensor(one)} - {tensor(other)}", one - other),
                (f"{tensor(one)} * {tensor(other)}", one * other),
                (f"{tensor(one)} / {tensor(divisor)}", one / divisor),
                (f"{tensor(one)} > {tensor(other)}", (one > other).astype(np.float32)),
                (f"{tensor(one)} <= {tensor(other)}", (one <= other).astype(np.float32)),
            ]
    check(image, cases, exact=True)


def test_numbers_meet_tensors_from_both_sides_in_double_precision(image):
    array = numbers(np.random.default_rng(9), (2, 3))
    wide = array.astype(np.float64)
    cases = [
        (f"{tensor(array)} + 0.1", wide + 0.1),
        (f"0.1 + {tensor(array)}", 0.1 + wide),
        (f"1 - {tensor(array)}", 1 - wide),
        (f"0.3 * {tensor(array)}", 0.3 * wide),
        (f"2 / {tensor(array)}", 2 / wide),
        (f"{tensor(array)} / 3", wide / 3),
        (f"{tensor(array)} >= 0", wide >= 0),
        (f"{tensor(array)} < 0.5", wide < 0.5),
        (f"{tensor(array)} * 1.0e30 * 1.0e30", np.sign(wide) * np.inf),
    ]
    check(image, [(each, np.asarray(expected, np.float32)) for each, expected in cases], exact=True)


@pytest.mark.parametrize("seed", range(4))
def test_statistics_along_every_axis_are_numpys(image, seed):
    rng = np.random.default_rng(seed + 100)
    cases = []
    for _ in range(6):
        array = numbers(rng, random_shape(rng, rank=int(rng.integers(1, 5))))
        wide, it = array.astype(np.float64), tensor(array)
        for axis in [*range(array.ndim), -1, -array.ndim]:
            place = axis + 1 if axis >= 0 else axis
            shifted = np.exp(wide - wide.max(axis, keepdims=True))
            cases += [
                (f"{it} sum: {place}", wide.sum(axis)),
                (f"{it} mean: {place}", wide.mean(axis)),
                (f"{it} std: {place}", wide.std(axis)),
                (f"{it} norm: {place}", np.linalg.norm(wide, axis=axis)),
                (f"{it} max: {place}", wide.max(axis)),
                (f"{it} min: {place}", wide.min(axis)),
                (f"{it} argMax: {place}", wide.argmax(axis) + 1),
                (f"{it} softmax: {place}", shifted / shifted.sum(axis, keepdims=True)),
            ]
    check(image, cases)


@pytest.mark.parametrize("seed", range(4))
def test_slices_transposes_and_reshapes_are_numpys(image, seed):
    rng = np.random.default_rng(seed + 200)
    cases = []
    for _ in range(10):
        array = numbers(rng, random_shape(rng, rank=int(rng.integers(1, 5))), special=True)
        it, axis = tensor(array), int(rng.integers(0, array.ndim))
        order, size = [int(each) for each in rng.permutation(array.ndim)], array.shape[axis]
        some = [int(each) for each in rng.integers(0, size, 3)]
        start, stop = sorted(int(each) for each in rng.integers(0, size, 2))
        cases += [
            (f"{it} transpose: {smalltalk([each + 1 for each in order])}", array.transpose(order)),
            (f"{it} transpose: {smalltalk([each - array.ndim for each in order])}", array.transpose(order)),
            (f"{it} transpose", array.swapaxes(-1, -2) if array.ndim > 1 else array),
            (f"{it} slice: {some[0] + 1} axis: {axis + 1}", array.take(some[0], axis)),
            (f"{it} slice: {some[0] + 1} axis: {axis - array.ndim}", array.take(some[0], axis)),
            (f"{it} slice: {smalltalk([each + 1 for each in some])} axis: {axis + 1}", array.take(some, axis)),
            (
                f"{it} sliceFrom: {start + 1} to: {stop + 1} axis: {axis + 1}",
                array.take(range(start, stop + 1), axis),
            ),
            (f"{it} reshape: #(-1 1)", array.reshape(-1, 1)),
            (f"{it} first", array[0]),
            (f"{it} last", array[-1]),
        ]
    check(image, cases, exact=True)


@pytest.mark.parametrize("seed", range(4))
def test_matrix_products_are_numpys(image, seed):
    rng = np.random.default_rng(seed + 300)
    cases = []
    for _ in range(10):
        m, k, n = random_shape(rng, rank=3)
        batch = random_shape(rng, rank=int(rng.integers(0, 3)))
        lefts = [(k,), (*batch, m, k), (*meeting_shape(rng, batch), m, k)]
        rights = [(k,), (*meeting_shape(rng, batch), k, n), (*batch, k, n)]
        left, right = (numbers(rng, each[int(rng.integers(0, 3))]) for each in (lefts, rights))
        cases.append((f"{tensor(left)} matmul: {tensor(right)}", left.astype(np.float64) @ right.astype(np.float64)))
    cases.append((f"{tensor(np.zeros((2, 0)))} matmul: {tensor(np.zeros((0, 3)))}", np.zeros((2, 3))))
    check(image, cases)


def top_k(array, k, axis):
    """By sorting: the largest first, the first of equal ones first."""
    indices = np.argsort(-array, axis=axis, kind="stable").take(range(k), axis)
    return np.take_along_axis(array, indices, axis), indices + 1


@pytest.mark.parametrize("seed", range(3))
def test_the_largest_along_every_axis_are_those_of_a_sort(image, seed):
    rng = np.random.default_rng(seed + 400)
    cases = []
    for _ in range(8):
        array = rng.choice(np.array([-np.inf, -1.5, 0.0, 0.25, 3.0, np.inf], np.float32), random_shape(rng, rank=3))
        axis = int(rng.integers(-3, 3))
        k = int(rng.integers(0, array.shape[axis] + 1))
        values, indices = top_k(array, k, axis)
        top = f"{tensor(array)} topK: {k} axis: {axis if axis < 0 else axis + 1}"
        cases += [(f"({top}) at: 'values'", values), (f"({top}) at: 'indices'", indices)]
    check(image, cases, exact=True)


def test_many_of_the_largest_of_a_vocabulary(image):
    logits = np.random.default_rng(5).normal(size=(1, 5000)).astype(np.float32)
    values, indices = top_k(logits, 7, -1)
    check(
        image,
        [(f"({tensor(logits)} topK: 7) at: 'values'", values), (f"({tensor(logits)} topK: 7) at: 'indices'", indices)],
        exact=True,
    )


def test_softmax_of_masked_scores(image):
    scores = np.array([[1, -np.inf, 3], [-np.inf, -np.inf, -np.inf], [1000, 1001, -1000], [np.nan, 1, 2]], np.float32)
    weights = np.exp(scores[:3] - np.array([[3], [0], [1001]]))
    expected = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    check(image, [(f"{tensor(scores)} softmax", [*expected, [np.nan] * 3])])


def test_elementwise_functions_are_numpys(image):
    array = np.abs(numbers(np.random.default_rng(6), (3, 4))) + np.float32(0.1)
    wide = array.astype(np.float64)
    special = np.array(SPECIAL, np.float32)
    cases = [
        (f"{tensor(array)} sqrt", np.sqrt(array)),
        (f"{tensor(array)} negated", -array),
        (f"{tensor(special)} abs", np.abs(special)),
        (f"{tensor(special)} negated", -special),
        (f"{tensor([np.inf, np.nan, 0.0, -0.0])} sqrt", [np.inf, np.nan, 0.0, -0.0]),
        (f"{tensor([-np.inf, np.inf, np.nan])} exp", [0, np.inf, np.nan]),
        (f"{tensor([1, np.inf, np.nan])} ln", [0, np.inf, np.nan]),
        (f"{tensor(array)} collect: [ :each | each * each ]", array * array),
    ]
    check(image, cases, exact=True)
    check(image, [(f"{tensor(array)} exp", np.exp(wide)), (f"{tensor(array)} ln", np.log(wide))])


def test_nan_and_infinities_in_statistics(image):
    special = tensor(np.array([1, np.nan, 3, -np.inf], np.float32))
    assert np.isnan(image.evaluate(f"{MAKE}t := {special}. {{ t max. t min. t sum. t mean. t std. t norm }}")).all()
    masked = tensor(np.array([1, -np.inf], np.float32))
    found = image.evaluate(f"{MAKE}t := {masked}. {{ t max. t min. t sum. t mean. t norm. t argMax }}")
    assert found == [1, -np.inf, -np.inf, -np.inf, np.inf, 1]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_written_numbers_are_rounded_to_32_bits(image, dtype):
    written = [0.1, -0.0, 1e-45, 3.5e38, -np.inf, 16777217.0]
    exotic = "{ 0.1. 0.0 * -1.0. 1.0e-45. 3.5e38. Float negativeInfinity. 16777217 }"
    script = (
        f"{MAKE}t := {tensor(np.zeros((2, 3)), dtype=dtype)}. {exotic} withIndexDo: [ :each :i | t at: i put: each ]. "
    )
    with np.errstate(over="ignore"):
        expected = np.array(written, np.float32)
    assert bits(image.evaluate(script + "t data")) == bits(expected)
    assert image.evaluate(script + "t at: #(2 3) put: 7. t at: 6") == 7


def test_integer_tensors_hold_integers_and_compute_in_double_precision(image):
    array = np.array([[2**31 - 1, -7], [3, 2**30 + 1]], np.int32)
    it = f"{MAKE}t := {tensor(array, dtype='int32')}. "
    assert image.evaluate(it + "{ t sum. t max. t argMax. t transpose data. t transpose dtype }") == [
        int(array.sum(dtype=np.int64)),
        2**31 - 1,
        1,
        array.T.ravel().tolist(),
        "int32",
    ]
    assert image.evaluate(it + "{ (t + 1) dtype. (t + 1) data class name. (t mean: 1) dtype }") == [
        "float32",
        "Float32Array",
        "float32",
    ]
    assert bits(image.evaluate(it + "(t * 1) data")) == bits(array)
    assert image.evaluate(it + "t at: #(1 2) put: 9. ((t slice: 1 axis: 1) data) , (t zeroHeads: #()) shape") == [
        2**31 - 1,
        9,
        2,
        2,
    ]
    with pytest.raises(SmalltalkError, match="An int32 tensor holds integers from -2147483648 to 2147483647, got 0.5"):
        image.evaluate(it + "t at: 1 put: 0.5")


def test_heads_are_numpys(image):
    rng = np.random.default_rng(7)
    pattern, wide = numbers(rng, (1, 3, 2, 4), special=True), numbers(rng, (2, 3, 8), special=True)
    zeroed = pattern.copy()
    zeroed[:, [0, 2]] = 0
    named = f"({tensor(pattern)} axes: #('batch' 'head' 'query' 'key'); yourself)"
    cases = [
        (f"{named} zeroHeads: #(0 2)", zeroed),
        *((f"{named} splitByHeads at: {head + 1}", pattern[:, head]) for head in range(3)),
        (f"{tensor(wide)} splitByHeads: 4", wide.reshape(2, 3, 4, 2).swapaxes(1, 2)),
        (f"{tensor(wide[0, 0])} splitByHeads: 4", wide[0, 0].reshape(4, 2)),
        (f"{named} last", pattern[:, :, -1]),
        (f"{named} first", pattern[:, :, 0]),
    ]
    check(image, cases, exact=True)


def test_random_tensors_are_box_and_mullers(image):
    uniform = np.random.default_rng(8).random(12)
    stream = f"{{ {'. '.join(repr(float(each)) for each in uniform)} }} readStream"
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[::2])), 2 * np.pi * uniform[1::2]
    check(image, [(f"ActivationTensor random: #(2 3) using: {stream}", (radius * np.cos(angle)).reshape(2, 3))])
    mean, std = image.evaluate("t := ActivationTensor random: #(100 50) mean: 3 std: 0.5. { t mean. t std }")
    assert (mean, std) == (pytest.approx(3, abs=0.05), pytest.approx(0.5, abs=0.03))
