"""The Tonel packages as files: written as Pharo writes them, and asking of Pharo only what its sources have."""

import pytest
from smalltalk_check import (
    class_problems,
    file_problems,
    listed,
    message_problems,
    method_problems,
    name_problems,
    package_problems,
    variable_problems,
)
from smalltalk_sources.syntax import SmalltalkSyntaxError, parse_method
from smalltalk_sources.tonel import PACKAGES, SMALLTALK, ClassDefinition, Method
from smalltalk_sources.usage import CORE_PACKAGES, Behavior, Sources

FILES = sorted(SMALLTALK.glob("*/*.*.st"))


@pytest.fixture(scope="module")
def sources():
    return Sources.of(*PACKAGES)


# -- our packages --------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_hold_tonel_and_nothing_else(package):
    assert package_problems(SMALLTALK / package) == []


def test_the_repository_says_that_it_is_tonel():
    assert (SMALLTALK / ".properties").read_text() == "{\n\t#format : #tonel,\n\t#version: #'3.0'\n}\n"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_are_written_as_pharo_writes_them(file):
    assert file_problems(file) == []


def test_classes_have_names_and_comments_that_speak_for_themselves(sources):
    assert [problem for cls in sources.classes.values() for problem in class_problems(cls)] == []


def test_methods_have_protocols_grammar_and_declared_variables(sources):
    portable = Sources.of(*(package for package in PACKAGES if package in CORE_PACKAGES))
    found = []
    for behavior, method in sources.methods():
        variables = sources.instance_variables(behavior.name)
        found += method_problems(behavior, method, variables, portable=behavior.name in portable.classes)
    assert found == []


def test_every_instance_variable_is_read(sources):
    assert variable_problems(sources) == []


def test_every_message_is_understood_in_pharo(sources):
    assert message_problems(sources, listed()) == []


def test_every_name_is_one_of_pharos_and_ours_are_new_to_it(sources):
    assert name_problems(sources, listed()) == []


# -- the check itself ----------------------------------------------------------------------------


def check(source, variables=("count",), category="testing", class_side=False):
    behavior = Behavior("Odd", class_side)
    return method_problems(behavior, Method(class_side, category, source), list(variables))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("go\n\t^ self foo: [ :x | x", "expected the end of a block, got 'the end'"),
        ("go\n\t^ (1 + 2", "expected a closing parenthesis, got 'the end'"),
        ("go: x with\n\t^ x", "expected the end of the method, got '^'"),
        ("go\n\t^ 'open", 'nothing begins with "\'open"'),
        ("go\n\t3; foo", "a cascade follows a message"),
        ("go\n\tself foo; ; bar", "expected a message after ;"),
        ("go\n\t^ 3.\n\t4", "nothing is reached after ^"),
        ("go\n\t^ #( 1 2", "expected a literal, got 'the end'"),
        ("go\n\t| a\n\t^ a", "temporaries are not closed"),
        ("go\n\t<script: foo bar>\n\t^ 1", "expected a pragma"),
        ("go\n\t^ 3s2", "expected an expression, got '3s2'"),
        ("go\n\t^ self foo:", "expected an expression, got 'the end'"),
        ("go\n\t^ nothing", "line 2: nothing is not declared"),
        ("go\n\t| a |\n\t^ 1", "a is never read"),
        ("go\n\t| a |\n\t^ a", "a is never assigned"),
        ("go\n\t| a |\n\ta := 1", "a is never read"),
        ("go: a\n\ta := 1.\n\t^ a", "a is an argument and is assigned"),
        ("go\n\t^ [ :a | a := 1. a ]", "a is an argument and is assigned"),
        ("go: count\n\t^ count", "count is declared twice"),
        ("go\n\t| a |\n\ta := 1.\n\t^ [ :a | a ] value: a", "a is declared twice"),
        ("go\n\tself := 1", "self cannot be assigned"),
        ("go\n\t^ #[ 1 2 ]", "byte arrays are not portable"),
        ("go_on\n\t^ 1", "underscores are not portable"),
        ("go\n\t<primitiv: 3>\n\t^ 1", "<primitiv:> is no pragma of baseline, "),
        ("go\n\t^ count collect: [ 3 ]", "line 2: collect: takes a block of arity 1, got one of arity 0"),
        ("go\n\t^ count inject: 0 into: [ :a | a ]", "inject:into: takes a block of arity 2, got one of arity 1"),
        ("go\n\t^ count with: #( 1 ) do: [ :a | a ]", "with:do: takes a block of arity 2, got one of arity 1"),
        ("go\n\t^ count ifNotNil: [ :a :b | a ]", "ifNotNil: takes a block of arity 0 or 1, got one of arity 2"),
        ("go\n\t^ count\n\t\tdo: [ :a | a ]\n\t\tseparatedBy: [ :b | b ]", "do:separatedBy: takes a block of arity 0"),
        ("go\n\tcount ifTrue: 3", "ifTrue: takes a block, got a literal"),
        ("go\n\tcount isNil or: { 3 }", "or: takes a block, got a literal"),
        ("go\n\t^ 1e-5", "line 2: 1e-5 is a Fraction in Pharo"),
        ("go\n\t^ #( 'a' 0.5 #( -2e-3 ) )", "line 2: -2e-3 is a Fraction in Pharo"),
    ],
)
def test_the_check_finds_what_is_wrong_in_a_method(source, complaint):
    assert complaint in " ".join(check(source))


@pytest.mark.parametrize(
    "source",
    [
        "go\n\t^ #( 'at 1e-5' 1.5e-3 16rE 1e5 a1e-5 )",
        "go\n\t^ count ifNotNil: [ :a | a ]",
        "go\n\t^ count ifNotNil: [ 3 ]",
        "go\n\t^ count collect: #size",
        "go: aBlock\n\t^ count do: aBlock",
        "go\n\t^ self do: [ :a :b | a + b ]",
        "go\n\t<script: 'self'>\n\t^ count",
    ],
)
def test_the_check_finds_nothing_wrong_in_what_is_right(source):
    assert check(f"{source}\n") == []


@pytest.mark.parametrize("category", ["", "as yet unclassified"])
def test_the_check_finds_methods_without_protocol(category):
    assert check("go\n\n\t^ 1", category=category) == ["Odd>>go: has no protocol"]


def test_instance_variables_are_unknown_on_the_class_side():
    assert check("go\n\n\t^ count") == []
    assert check("go\n\n\t^ count", class_side=True) == ["Odd class>>go: line 3: count is not declared"]


ALL_OF_THE_GRAMMAR = """\
at: index put: value
\t"A comment with | and [ and 'quotes'."
\t<script: 'x'>
\t<one two>

\t| a b |
\ta := b := #( 1 $a 'it''s' #sym sym at:put: + #( nil true ) -3 1.5e-3 16rFF #[ 1 2 ] ( 1 2 ) ).
\tself at: 1 put: 2; + 3; size; yourself.
\t[ :x :y || t | t := x - y. t -1 ] value: -1 value: 2-1.
\t[ :z ] value: [].
\t{ a. b. #at:put:. #'odd symbol'. #++ }.
\t^ (a foo: b bar) > index not | value.
"""


def test_the_parser_reads_all_of_the_grammar():
    with pytest.raises(SmalltalkSyntaxError, match="line 4: expected a pragma"):
        parse_method(ALL_OF_THE_GRAMMAR)
    parsed = parse_method(ALL_OF_THE_GRAMMAR.replace("<one two>", "<one>"))
    assert (parsed.selector, parsed.arguments, parsed.temporaries) == ("at:put:", ["index", "value"], ["a", "b"])
    assert [(each.selector, each.arguments) for each in parsed.pragmas] == [("script:", ["'x'"]), ("one", [])]
    assert [each.selector for each in parsed.sends()] == (
        ["at:put:", "+", "size", "yourself", "value:value:", "-", "-", "-", "value:", "|", ">", "foo:", "bar", "not"]
    )


# -- what it finds in classes --------------------------------------------------------------------


def source_of(*methods, name="Odd", superclass="Object", variables=()):
    sources = Sources()
    cls = ClassDefinition(name, superclass, "Odd", "I am odd.", list(variables))
    for source in methods:
        cls.methods.append(Method(source.startswith("class "), "testing", source.removeprefix("class ")))
    sources.add(cls)
    return sources


PHARO = {
    "classes": ["Object", "ZnClient"],
    "understood": {"ZnClient class>>new": "", "ZnClient>>url:": "", "Object>>printOn:": "", "Object class>>new": ""},
    "selectors": {"size": []},
    "free_class_names": ["Odd"],
    "free_method_names": [],
}


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        ("go: x\n\t^ x size", None),
        ("go: x\n\t^ x go: x", None),
        ("go: x\n\t^ x frobnicate", "Odd>>go:, line 2: frobnicate is not in"),
        ("go\n\t^ self go", None),
        ("go\n\t^ self size", "size to Odd is not in"),
        ("go\n\t^ super go", "go to Odd is not in"),
        ("printOn: s\n\t^ super printOn: s", None),
        ("go\n\t^ Odd new go", None),
        ("go\n\t^ Odd go", "go to Odd class is not in"),
        ("class make\n\t^ self new go", None),
        ("class make\n\t^ self go", "go to Odd class is not in"),
        ("go\n\t^ ZnClient new url: 'x'", None),
        ("go\n\t^ ZnClient new size", "size to ZnClient is not in"),
        ("go\n\t| http |\n\thttp := ZnClient new.\n\thttp size", "size to ZnClient is not in"),
        ("go\n\t^ 'text' size", "size to ByteString is not in"),
        ("go\n\t^ [ 3 ] size", "size to FullBlockClosure is not in"),
    ],
)
def test_the_check_finds_messages_that_are_not_understood(method, complaint):
    found = message_problems(source_of(method, *(() if method.startswith("go\n") else ("go\n\t^ 1",))), PHARO)
    assert (complaint in " ".join(found)) if complaint else found == []


def test_the_check_finds_names_that_do_not_exist_or_are_taken():
    assert name_problems(source_of("go\n\t^ ZnClient"), PHARO) == []
    assert "Odd>>go: Nonesuch is not in" in name_problems(source_of("go\n\t^ Nonesuch"), PHARO)[0]
    assert "class Taken is not in" in name_problems(source_of(name="Taken"), PHARO)[0]


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        ("go\n\t^ 1", ["Odd has a variable x that is never read"]),
        ("go\n\tx := 1", ["Odd has a variable x that is never read"]),
        ("go\n\t^ x", []),
    ],
)
def test_the_check_finds_variables_that_nobody_reads(method, complaint):
    assert variable_problems(source_of(method, variables=["x"])) == complaint


def test_a_variable_may_be_read_in_a_class_below():
    sources = source_of("go\n\tx := 1", variables=["x"])
    below = source_of("go\n\t^ x", name="Below", superclass="Odd")
    sources.add(below.classes["Below"])
    assert variable_problems(sources) == []


GOOD_FILE = """\
"
I am odd.

	Odd new
"
Class {
	#name : 'Odd',
	#superclass : 'Object',
	#instVars : [
		'x'
	],
	#category : 'Package',
	#package : 'Package'
}

{ #category : 'accessing' }
Odd >> x [

	^ x
]
"""


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("", "", None),
        ("'Odd',", "'Other',", "expected a method of Other"),
        ("#category : 'Package'", "#category : 'Else'", "is in package Package, its category is Else"),
        ("#package : 'Package'", "#package : 'Else'", "expected \"\\t#package : 'Package'\""),
        ("\t#superclass : 'Object',\n", "", "no #superclass"),
        ("Odd >> x [\n\n", "Odd >> x [ \n\n", "expected a method of Odd"),
        ("}\n\n{", "}\n{", "not written as Pharo writes it"),
        ("\t^ x\n]\n", "\t^ x\n]\n\n", "'', expected 'the end'"),
        ("\t^ x\n]\n", "\t^ x\n]", "its last line does not end"),
        (
            "\t^ x\n]\n",
            "\t^ x\n]\n\n{ #category : 'accessing' }\nOdd >> a [\n\n\t^ 1\n]\n",
            "'Odd >> x [', expected 'Odd >> a ['",
        ),
        ("^ x", "^ 'ö'", "not ASCII"),
        (
            "\t^ x\n]\n",
            "\t^ x\n]\n\n{ #category : 'accessing' }\nOdd >> x [\n\n\t^ 1\n]\n",
            "Odd>>x is there 2 times",
        ),
        ("{ #category : 'accessing'", "{ #category : '*Else'", "x: its protocol *Else is one of extensions"),
    ],
)
def test_the_check_finds_files_that_pharo_would_write_differently(tmp_path, old, new, complaint):
    folder = tmp_path / "Package"
    folder.mkdir()
    file = folder / "Odd.class.st"
    file.write_text(GOOD_FILE.replace(old, new), encoding="utf-8")
    found = file_problems(file)
    assert (complaint in " ".join(found)) if complaint else found == []


@pytest.mark.parametrize(
    ("category", "complaints"),
    [
        ("*Package", []),
        ("*Pakage", ["x: its protocol is *Pakage, expected *Package"]),
        ("accessing", ["x: its protocol is accessing, expected *Package"]),
    ],
)
def test_the_check_finds_extensions_that_belong_to_other_packages(tmp_path, category, complaints):
    folder = tmp_path / "Package"
    folder.mkdir()
    file = folder / "Odd.extension.st"
    file.write_text(f"Extension {{ #name : 'Odd' }}\n\n{{ #category : '{category}' }}\nOdd >> x [\n\n\t^ 3\n]\n")
    assert file_problems(file) == complaints


@pytest.mark.parametrize(
    ("comment", "complaint"),
    [
        ("I am odd.\n\n\tOdd new foo.\n\tOdd bar", None),
        ("Odd is odd.", "first person"),
        ("I am odd.\n\n\tOdd new foo: [", "is no Smalltalk"),
    ],
)
def test_the_check_reads_comments_and_their_snippets(comment, complaint):
    found = class_problems(ClassDefinition("Odd", "Object", "Package", comment, []))
    assert (complaint in " ".join(found)) if complaint else found == []
