"""The Smalltalk client, compiled and run by Amber: from the Tonel sources to the numbers of a live server."""

import dataclasses
import re
from types import SimpleNamespace

import build_smalltalk
import numpy as np
import pytest
from smalltalk_image import (
    HARNESS,
    Image,
    SmalltalkError,
    bits,
    compile_classes,
    record,
    serve_records,
    tensors,
)
from smalltalk_sources.chunks import in_dependency_order, to_chunks
from smalltalk_sources.tonel import ClassDefinition, Method, TonelError, parse_class

from neuroscope_bridge.hook_specs import NeuroScopeActivationBridge
from neuroscope_bridge.smalltalk import generate_neuroscope_smalltalk_interface

bridge = NeuroScopeActivationBridge()
SPECIAL = [0.0, -0.0, 1.0, -1.5, 0.1, np.inf, -np.inf, np.nan]


# -- sources -------------------------------------------------------------------------------------


def test_chunk_file_is_what_the_tonel_package_converts_to():
    assert build_smalltalk.CHUNK_FILE.read_text() == build_smalltalk.build(), "run python scripts/build_smalltalk.py"


def test_every_method_of_the_package_compiles_and_sends_only_known_selectors():
    compiled = compile_classes(build_smalltalk.CHUNK_FILE)
    assert compiled["problems"] == []
    for file in build_smalltalk.PACKAGE.glob("*.class.st"):
        source = parse_class(file.read_text())
        found = compiled["classes"][source.name]
        assert (found["superclass"], found["comment"]) == (source.superclass, source.comment)
        assert len(found["selectors"]) == len(source.methods) == file.read_text().count("{ #category : '") > 0


@pytest.mark.parametrize(
    ("body", "complaint"),
    [("^ self frobnicate", "Broken>>go sends frobnicate"), ("^ Frobnicator new", "Frobnicator")],
)
def test_the_compile_check_notices_unknown_selectors_and_names(tmp_path, body, complaint):
    file = tmp_path / "Broken.st"
    cls = ClassDefinition("Broken", "Object", "Test", "I am broken.", [])
    cls.methods.append(Method(False, "testing", f"go\n\n\t{body}"))
    file.write_text(to_chunks([cls]))
    assert complaint in str(compile_classes(file)["problems"])


def test_a_syntax_error_stops_the_file_in(tmp_path):
    file = tmp_path / "Broken.st"
    file.write_text("Object subclass: #Broken\n\tinstanceVariableNames: (''!\n")
    with pytest.raises(SmalltalkError, match="Parse error"):
        compile_classes(file)


ODD_CLASS = """\
"
I say ""hello"".
"
Class {
	#name : 'A',
	#superclass : 'B',
	#instVars : [
		'x',
		'y'
	],
	#category : 'C',
	#package : 'C'
}

{ #category : 'odd' }
A class >> < other [

	"an ] in a comment"
	^ { $]. ']''' }
]
"""


def test_tonel_parser_keeps_brackets_in_strings_comments_and_characters():
    parsed = parse_class(ODD_CLASS)
    method = Method(True, "odd", "< other\n\n\t\"an ] in a comment\"\n\t^ { $]. ']''' }")
    expected = ClassDefinition("A", "B", "C", 'I say "hello".', ["x", "y"], [method])
    assert dataclasses.asdict(parsed) == dataclasses.asdict(expected)
    with pytest.raises(TonelError, match="expected a method of A at 'stray'"):
        parse_class(ODD_CLASS + "stray\n")
    with pytest.raises(TonelError, match="not closed"):
        parse_class(ODD_CLASS.rstrip()[:-1])


def test_superclasses_come_before_their_subclasses():
    def cls(name, superclass):
        return ClassDefinition(name, superclass, "", "", [])

    ordered = in_dependency_order([cls("A", "Z"), cls("Z", "M"), cls("M", "Object")])
    assert [each.name for each in ordered] == ["M", "Z", "A"]
    with pytest.raises(TonelError, match="circle: A, Z"):
        in_dependency_order([cls("A", "Z"), cls("Z", "A")])


def test_exclamation_marks_survive_the_chunk_format(tmp_path):
    cls = ClassDefinition("Loud", "Object", "Test", "Hey! It's me.", [])
    cls.methods.append(Method(False, "testing", "shout\n\n\t^ 'Hey! You!!'"))
    file = tmp_path / "Loud.st"
    file.write_text(to_chunks([cls]))
    with Image(file) as image:
        assert image.evaluate("Loud new shout") == "Hey! You!!"
        assert image.evaluate("Loud comment") == "Hey! It's me."


# -- the generated interface ---------------------------------------------------------------------


def test_generated_interface_talks_to_the_clients_server(tmp_path):
    url = "http://127.0.0.1:9/it's!odd"
    text = generate_neuroscope_smalltalk_interface(SimpleNamespace(base_url=url))
    file = tmp_path / "LMStudioRESTClient.st"
    file.write_text(text, encoding="ascii")
    with Image(file) as image:
        assert image.evaluate("LMStudioRESTClient default baseUrl") == url
        assert image.evaluate("LMStudioRESTClient new baseUrl") == url
    assert "fileIn" in text.split("!\n")[0]


@pytest.mark.parametrize("url", ["http://host/\nx", "http://höst", "http://a b"])
def test_generated_interface_refuses_what_is_no_url(url):
    with pytest.raises(ValueError, match="Not a URL"):
        generate_neuroscope_smalltalk_interface(SimpleNamespace(base_url=url))


# -- tensors -------------------------------------------------------------------------------------


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
        ("t + (t reshape: #(4))", r"Expected shape \[2, 2\], got \[4\]"),
        ("t dot: (t reshape: #(4))", r"Expected shape \[2, 2\], got \[4\]"),
        ("t reshape: #(3 -1)", r"Expected a shape for 4 elements, got \[3, -1\]"),
        ("t slice: 1 axis: 3", "Expected an index from 1 to 2, got 3"),
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


# -- circuits ------------------------------------------------------------------------------------


def causal_pattern(rng, heads, n, keys=None):
    weights = np.tril(rng.random((1, heads, n, n)) ** 3)
    weights[:, 0, 1:, :] = 0.05
    weights[:, 0, np.arange(1, n), np.arange(n - 1)] = 0.9
    weights[:, 1, :, 0] = 5
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def same_circuits(smalltalk, python):
    assert [each["name"] for each in smalltalk] == [each["name"] for each in python]
    for ours, theirs in zip(smalltalk, python, strict=True):
        assert ours["confidence"] == pytest.approx(theirs["confidence"], rel=1e-5, abs=1e-9)
        assert ours["components"] == theirs["components"]
        assert len(ours["pathway"]) == len(theirs["pathway"])
        assert "orrelational" in ours["description"]


AS_DICTIONARIES = (
    "circuits collect: [ :each | Dictionary new at: 'name' put: each name; at: 'confidence' put: each confidence;"
    " at: 'components' put: each components; at: 'pathway' put: each pathway;"
    " at: 'description' put: each description; yourself ]"
)


def find_circuits(image, server):
    return image.evaluate(f"circuits := CircuitFinder findCircuits: {tensors(server)}. {AS_DICTIONARIES}")


def test_circuits_are_those_of_the_python_bridge(image, server):
    rng = np.random.default_rng(3)
    pattern = causal_pattern(rng, 4, 9)
    activations = serve_records(
        server,
        record(pattern[:, :, :5, :5], "attention_pattern", 2),
        record(pattern[:, :, 5:], "attention_pattern", 2, positions=(5, 9)),
        record(pattern[:, :, 8:], "attention_pattern", 2, positions=(9, 10), phase="decode", step=1),
        record(causal_pattern(rng, 2, 2), "attention_pattern", 1),
        record(pattern[:, :, :, 4:], "attention_pattern", 3),
        *(
            record(rng.normal(size=(2, 9, 8)).astype(np.float32) * scale, component, layer)
            for layer in (0, 1, 2)
            for component, scale in [("residual", 2), ("attention", 1), ("mlp", 5)]
            if (layer, component) != (1, "residual")
        ),
        record(rng.normal(size=(1, 9, 8)) * 9, "attention", 2, is_input=True, hook_id="ignored"),
        record(rng.normal(size=(1, 1, 8)) * 9, "attention", 2, phase="decode", positions=(9, 10), hook_id="ignored"),
    )
    found = find_circuits(image, server)
    same_circuits(found, bridge.find_circuits(activations))
    names = [each["name"] for each in found]
    assert {"previous_token_head L2H0", "first_token_head L2H1", "mlp_write L0", "attention_write L1"} <= set(names)
    assert not [name for name in names if re.search("head L[13]", name)]


def test_a_previous_token_head_is_scored_by_hand(image, server):
    pattern = np.zeros((1, 1, 4, 4), np.float32)
    pattern[0, 0] = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.5, 0.25, 0], [0.125, 0, 0.75, 0.125]]
    serve_records(server, record(pattern, "attention_pattern", 5))
    (circuit,) = find_circuits(image, server)
    assert circuit["name"] == "previous_token_head L5H0"
    assert circuit["confidence"] == (0.5 + 0.75) / 2
    assert circuit["components"] == [{"layer": 5, "componentType": "attention_head", "index": 0}]
    assert circuit["pathway"] == [{"source": "position q-1", "target": "position q", "strength": 0.625}]


def test_writes_without_a_residual_are_relative_to_the_largest(image, server):
    serve_records(server, record(np.full((1, 2, 4), 1.0), "mlp", 0), record(np.full((1, 2, 4), 0.25), "attention", 1))
    found = {each["name"]: each["confidence"] for each in find_circuits(image, server)}
    assert found == {"mlp_write L0": 1.0, "attention_write L1": 0.25}


def test_nothing_captured_is_no_circuit(image):
    assert image.evaluate("(CircuitFinder findCircuits: Dictionary new) size") == 0


# -- a live server -------------------------------------------------------------------------------


def seed_snippet(layers):
    text = (HARNESS / "seed_snippet.st").read_text()
    return text.replace("/path/to/your/model", "neuroscope-tiny").replace(" 24.", f" {layers}.")


def test_the_seeds_snippet_runs_and_its_numbers_are_pythons(live_server, live_image):
    layers = live_image.evaluate("LMStudioRESTClient default loadModel: 'neuroscope-tiny'")["num_layers"]
    found = live_image.evaluate(
        seed_snippet(layers)
        + "tensors := Dictionary new. neuroScopeActivations keysAndValuesDo: [ :id :each | tensors at: id put: (each"
        " collect: [ :tensor | { tensor shape. tensor norm. tensor mean. tensor std. tensor positions } ]) ]."
        f"Dictionary new at: 'reply' put: result; at: 'tensors' put: tensors; at: 'circuits' put: ({AS_DICTIONARIES});"
        " yourself"
    )
    activations = found["reply"]["activations"]
    hooks = bridge.create_hook_specs_for_circuit_analysis(layers)
    assert set(activations) == {hook["hook_id"] for hook in hooks}
    for hook_id, converted in bridge.convert_activations_for_neuroscope(activations).items():
        assert len(found["tensors"][hook_id]) == len(converted) > 0
        for ours, theirs in zip(found["tensors"][hook_id], converted, strict=True):
            data = theirs["data"].astype(np.float64)
            assert (ours[0], ours[4]) == (list(data.shape), list(theirs["positions"]))
            np.testing.assert_allclose(ours[1:4], [np.linalg.norm(data), data.mean(), data.std()], rtol=1e-5, atol=1e-9)
    same_circuits(found["circuits"], bridge.find_circuits(activations))
    assert len(found["circuits"]) == 2 * layers
