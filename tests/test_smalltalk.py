"""The Smalltalk client, compiled and run by Amber: from the Tonel sources to the numbers of a live server."""

import dataclasses
from types import SimpleNamespace

import build_smalltalk
import numpy as np
import pytest
from smalltalk_image import AS_DICTIONARIES, HARNESS, Image, SmalltalkError, compile_classes, same_circuits
from smalltalk_sources.chunks import in_dependency_order, to_chunks
from smalltalk_sources.tonel import ClassDefinition, Method, TonelError, parse_class

from neuroscope_bridge.hook_specs import NeuroScopeActivationBridge
from neuroscope_bridge.smalltalk import generate_neuroscope_smalltalk_interface

bridge = NeuroScopeActivationBridge()


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


@pytest.mark.parametrize(
    "script",
    [
        "Array new: -1",
        "Float32Array new: -1",
        "ByteArray new: -2",
        "Float infinity printShowingDecimalPlaces: 2",
        "Float nan printShowingDecimalPlaces: 2",
    ],
)
def test_what_fails_in_pharo_is_an_error_that_smalltalk_can_handle(image, script):
    assert image.evaluate(f"[ {script} ] on: Error do: [ :error | 'handled' ]") == "handled"
