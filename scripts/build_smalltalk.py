"""Writes the chunk file that `neuroscope_bridge.generate_neuroscope_smalltalk_interface` fills in.

    python scripts/build_smalltalk.py            # smalltalk/NeuroScope-Core -> neuroscope_bridge/templates/
    python scripts/build_smalltalk.py --check    # exit 1 if the chunk file is out of date

The Tonel package is the source; the chunk file holds the same classes for images that load no repository.
Each method has a preamble of its own, and classes are defined by the message that every Pharo's file-in knows.
"""

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "smalltalk" / "NeuroScope-Core"
CHUNK_FILE = ROOT / "neuroscope_bridge" / "templates" / "LMStudioRESTClient.st"


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
    cls = ClassDefinition(
        name=_property(definition, "name", where),
        superclass=_property(definition, "superclass", where),
        category=_property(definition, "category", where),
        comment=comment,
        instance_variables=re.findall(r"'(\w+)'", variables[1]) if variables else [],
    )
    rest = head.end()
    while text[rest:].strip():
        method, rest = _parse_method(text, rest, cls.name, where)
        cls.methods.append(method)
    return cls


def to_chunks(classes: list[ClassDefinition]) -> str:
    """The classes in the format that `fileIn` reads, superclasses first."""
    ordered = in_dependency_order(classes)
    parts = [_definition(cls) for cls in ordered]
    parts += [_method(cls, method) for cls in ordered for method in cls.methods]
    return "\n\n".join(parts) + "\n"


def in_dependency_order(classes: list[ClassDefinition]) -> list[ClassDefinition]:
    """By name, but every class after its superclass."""
    pending = sorted(classes, key=lambda cls: cls.name)
    ordered: list[ClassDefinition] = []
    while pending:
        names = {cls.name for cls in pending}
        ready = next((cls for cls in pending if cls.superclass not in names), None)
        if ready is None:
            raise TonelError(f"These classes inherit from each other in a circle: {', '.join(sorted(names))}")
        pending.remove(ready)
        ordered.append(ready)
    return ordered


def build() -> str:
    """The text that the chunk file should have."""
    files = sorted(PACKAGE.glob("*.class.st"))
    text = to_chunks([parse_class(file.read_text(encoding="utf-8"), file.name) for file in files])
    if not text.isascii():
        raise TonelError("Smalltalk sources must be ASCII: images differ in how they decode a filed-in text")
    return text


def _property(definition: str, name: str, where: str) -> str:
    found = re.search(rf"#{name} : '([^']*)'", definition)
    if not found:
        raise TonelError(f"{where}: the class definition has no #{name}")
    return found[1]


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


def _definition(cls: ClassDefinition) -> str:
    definition = (
        f"{cls.superclass} subclass: #{cls.name}\n"
        f"\tinstanceVariableNames: {_literal(' '.join(cls.instance_variables))}\n"
        "\tclassVariableNames: ''\n"
        "\tpoolDictionaries: ''\n"
        f"\tcategory: {_literal(cls.category)}"
    )
    return _chunk(definition) + "\n\n" + _chunk(f"{cls.name} comment: {_literal(cls.comment)}")


def _method(cls: ClassDefinition, method: Method) -> str:
    side = " class" if method.class_side else ""
    return f"!{cls.name}{side} methodsFor: {_literal(method.category)}!\n{_chunk(method.source)} !"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _chunk(text: str) -> str:
    return text.replace("!", "!!") + "!"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the file is out of date")
    text = build()
    if parser.parse_args().check:
        if CHUNK_FILE.exists() and CHUNK_FILE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{CHUNK_FILE.relative_to(ROOT)} is out of date: run python scripts/build_smalltalk.py")
        return 1
    CHUNK_FILE.write_text(text, encoding="utf-8")
    print(f"Wrote {CHUNK_FILE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
