"""Tonel files, as this project writes them: one class or one extension of a class per file."""

import re
from dataclasses import dataclass, field
from pathlib import Path

SMALLTALK = Path(__file__).resolve().parents[2] / "smalltalk"
"""The Tonel repository: one folder per package."""
PACKAGES = tuple(sorted(file.parent.name for file in SMALLTALK.glob("*/package.st")))
"""Their names."""


class TonelError(ValueError):
    """A file is not Tonel as this project writes it; the message says where."""


@dataclass(frozen=True)
class Method:
    """One method: its source starts with the selector, as in a browser.

    >>> Method(class_side=False, category="accessing", source="shape\\n\\n\\t^ shape").source.split()[0]
    'shape'
    """

    class_side: bool
    category: str
    source: str


@dataclass(frozen=True)
class ClassDefinition:
    """A class as its Tonel file describes it."""

    name: str
    superclass: str
    category: str
    comment: str
    instance_variables: list[str]
    methods: list[Method] = field(default_factory=list)


@dataclass(frozen=True)
class Extension:
    """Methods that a package adds to a class of another package."""

    name: str
    methods: list[Method] = field(default_factory=list)


def read_package(name: str) -> list[ClassDefinition | Extension]:
    """The classes and extensions of a package in `smalltalk/`, by file name."""
    return [parse_file(file) for file in sorted((SMALLTALK / name).glob("*.*.st"))]


def parse_file(file: Path) -> ClassDefinition | Extension:
    """What stands in `Name.class.st` or `Name.extension.st`."""
    parse = parse_extension if file.name.endswith(".extension.st") else parse_class
    return parse(file.read_text(encoding="utf-8"), file.name)


def parse_class(text: str, where: str = "<text>") -> ClassDefinition:
    """The class in a Tonel file `Name.class.st`.

        parse_class(Path("smalltalk/NeuroScope-Core/Circuit.class.st").read_text()).superclass      # 'Object'

    Raises:
        TonelError: something before, in or between the methods is not understood.
    """
    head = re.match(r'\s*"((?:[^"]|"")*)"\s*Class\s*\{(.*?)\n\}\n', text, re.DOTALL)
    if not head:
        raise TonelError(f"{where}: expected a class comment and a class definition")
    comment, definition = head[1].strip().replace('""', '"'), head[2]
    variables = re.search(r"#instVars : \[(.*?)\]", definition, re.DOTALL)
    name = _property(definition, "name", where)
    return ClassDefinition(
        name=name,
        superclass=_property(definition, "superclass", where),
        category=_property(definition, "category", where),
        comment=comment,
        instance_variables=re.findall(r"'(\w+)'", variables[1]) if variables else [],
        methods=_parse_methods(text, head.end(), name, where),
    )


def parse_extension(text: str, where: str = "<text>") -> Extension:
    """The methods in a Tonel file `Name.extension.st`.

    Raises:
        TonelError: something before, in or between the methods is not understood.
    """
    head = re.match(r"Extension \{ #name : '(\w+)' \}\n", text)
    if not head:
        raise TonelError(f"{where}: expected Extension {{ #name : '...' }}")
    return Extension(head[1], _parse_methods(text, head.end(), head[1], where))


def to_tonel(definition: ClassDefinition | Extension) -> str:
    """The file as Pharo writes it, but for the order of its methods, which stays."""
    methods = "".join(_method_as_tonel(definition.name, each) for each in definition.methods)
    if isinstance(definition, Extension):
        return f"Extension {{ #name : '{definition.name}' }}\n" + methods
    variables = ",\n".join(f"\t\t'{each}'" for each in definition.instance_variables)
    properties = [f"\t#name : '{definition.name}'", f"\t#superclass : '{definition.superclass}'"]
    properties += [f"\t#instVars : [\n{variables}\n\t]"] if variables else []
    properties += [f"\t#category : '{definition.category}'", f"\t#package : '{definition.category}'"]
    comment = definition.comment.replace('"', '""')
    return f'"\n{comment}\n"\nClass {{\n' + ",\n".join(properties) + "\n}\n" + methods


def _method_as_tonel(class_name: str, method: Method) -> str:
    header, _, body = method.source.partition("\n")
    side = " class" if method.class_side else ""
    return f"\n{{ #category : '{method.category}' }}\n{class_name}{side} >> {header} [\n{body}\n]\n"


def _property(definition: str, name: str, where: str) -> str:
    found = re.search(rf"#{name} : '([^']*)'", definition)
    if not found:
        raise TonelError(f"{where}: the class definition has no #{name}")
    return found[1]


def _parse_methods(text: str, start: int, class_name: str, where: str) -> list[Method]:
    methods = []
    while text[start:].strip():
        method, start = _parse_method(text, start, class_name, where)
        methods.append(method)
    return methods


def _parse_method(text: str, start: int, class_name: str, where: str) -> tuple[Method, int]:
    header = re.compile(
        rf"\s*\{{ #category : '([^']*)' \}}\n{class_name}( class)? >> ([^\n]*?) \[\n",
    ).match(text, start)
    if not header:
        raise TonelError(f"{where}: expected a method of {class_name} at {text[start:].strip()[:60]!r}")
    end = _closing_bracket(text, header.end(), where)
    body = text[header.end() : end].rstrip()
    return Method(bool(header[2]), header[1], f"{header[3]}\n{body}"), end + 1


def _closing_bracket(text: str, start: int, where: str) -> int:
    """Where the method that starts here ends: brackets in strings, comments and characters do not count."""
    depth = 1
    for token in re.compile(r"'[^']*'|\"[^\"]*\"|\$.|[\[\]]", re.DOTALL).finditer(text, start):
        depth += {"[": 1, "]": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    raise TonelError(f"{where}: a method is not closed: {text[start:].strip()[:60]!r}")
