"""What is wrong with the Tonel packages, as far as reading them can tell: form, names, grammar, variables, messages.

Every function answers sentences, one for each thing found; an empty list is good.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from smalltalk_blocks import block_problems
from smalltalk_sources.syntax import (
    Assignment,
    Block,
    Literal,
    Node,
    ParsedMethod,
    Pragma,
    SmalltalkSyntaxError,
    Variable,
    parse_method,
)
from smalltalk_sources.tonel import ClassDefinition, Extension, Method, TonelError, parse_file, to_tonel
from smalltalk_sources.usage import PSEUDO_VARIABLES, Behavior, Sources, Use

PHARO = Path(__file__).parent / "smalltalk" / "pharo_selectors.json"
EXTEND = (
    "is not in tests/smalltalk/pharo_selectors.json. If Pharo 11, 12 and 13 all have it, run"
    " scripts/pharo_selectors.py with checkouts of their sources; if not, send something that they have"
)
PRAGMAS = ("baseline", "inspectorPresentationOrder:title:", "script", "script:")
"""Those that mean something to Pharo and that we use."""


# -- form ----------------------------------------------------------------------------------------


def file_problems(file: Path) -> list[str]:
    """Name, package and layout of one Tonel file, exactly as Pharo writes it."""
    package, name = file.parent.name, file.name.split(".")[0]
    try:
        definition = parse_file(file)
    except TonelError as error:
        return [str(error)]
    found = []
    if definition.name != name:
        found.append(f"{file.name} holds {definition.name}")
    if isinstance(definition, ClassDefinition) and definition.category != package:
        found.append(f"{file.name} is in package {package}, its category is {definition.category}")
    text = file.read_text(encoding="utf-8")
    if text != to_tonel(definition):
        where = _first_difference(text, to_tonel(definition))
        found.append(f"{file.name} is not written as Pharo writes it, which scripts/format_smalltalk.py does: {where}")
    if not text.isascii():
        found.append(f"{file.name} is not ASCII")
    return [*found, *_doubles(definition), *_protocol_problems(definition, package)]


def _doubles(definition: ClassDefinition | Extension) -> list[str]:
    """Methods that are there twice: Pharo keeps the last of them."""
    names = [
        f"{Behavior(definition.name, method.class_side)}>>{parse_method(method.source).selector}"
        for method in definition.methods
    ]
    return [f"{name} is there {count} times" for name in dict.fromkeys(names) if (count := names.count(name)) > 1]


def _protocol_problems(definition: ClassDefinition | Extension, package: str) -> list[str]:
    """A protocol with a star gives the method to the package that it names; all others to the package of the class."""
    if isinstance(definition, Extension):
        wrong = [each for each in definition.methods if each.category != f"*{package}"]
        return [f"{_first_line(each)}: its protocol is {each.category}, expected *{package}" for each in wrong]
    starred = [each for each in definition.methods if each.category.startswith("*")]
    return [f"{_first_line(each)}: its protocol {each.category} is one of extensions" for each in starred]


def _first_line(method: Method) -> str:
    return method.source.splitlines()[0].strip()


def _first_difference(text: str, expected: str) -> str:
    pairs = zip([*text.splitlines(), "the end"], [*expected.splitlines(), "the end"], strict=False)
    return next((f"{got!r}, expected {want!r}" for got, want in pairs if got != want), "its last line does not end")


def package_problems(folder: Path) -> list[str]:
    """The file that names the package, and nothing but Tonel beside it."""
    expected = f"Package {{ #name : '{folder.name}' }}\n"
    found = [] if (folder / "package.st").read_text() == expected else [f"{folder.name}/package.st is not {expected!r}"]
    strange = [
        each.name for each in folder.iterdir() if not re.fullmatch(r"package\.st|\w+\.(class|extension)\.st", each.name)
    ]
    return found + [f"{folder.name} holds {each}" for each in strange]


def class_problems(cls: ClassDefinition) -> list[str]:
    """Its name, its comment and the snippets in it."""
    found = [] if re.fullmatch(r"[A-Z][A-Za-z0-9]*", cls.name) else [f"{cls.name} is no name of a class"]
    if not re.match(r"(I|My) ", cls.comment):
        found.append(f"the comment of {cls.name} does not speak in the first person: {cls.comment[:30]!r}")
    for snippet in snippets(cls.comment):
        try:
            parse_method(f"snippet\n{snippet}")
        except SmalltalkSyntaxError as error:
            found.append(f"a snippet in the comment of {cls.name} is no Smalltalk: {error}: {snippet[:60]!r}")
    doubles = {each for each in cls.instance_variables if cls.instance_variables.count(each) > 1}
    return found + [f"{cls.name} has two variables {each}" for each in doubles]


def snippets(comment: str) -> list[str]:
    """The indented parts of a comment, which are there to be evaluated."""
    return [each.strip("\n") for each in re.findall(r"(?:^(?:\t.*)?\n?)+", comment, re.MULTILINE) if each.strip()]


# -- methods -------------------------------------------------------------------------------------


def method_problems(behavior: Behavior, method: Method, variables: list[str], portable: bool = True) -> list[str]:
    """Grammar, protocol and variables of a method of a class with these instance variables.

    What is portable keeps to what Amber reads too.
    """
    where = f"{behavior}>>{_first_line(method)}"
    found = []
    if not method.category.strip() or method.category == "as yet unclassified":
        found.append("has no protocol")
    try:
        parsed = parse_method(method.source)
    except SmalltalkSyntaxError as error:
        return [f"{where}: {each}" for each in [*found, str(error)]]
    scope = _Scope(PSEUDO_VARIABLES if method.class_side else (*PSEUDO_VARIABLES, *variables))
    found += [*scope.problems_of(parsed), *block_problems(parsed), *_fractions(parsed)]
    found += [f"<{each.selector}> is no pragma of {', '.join(PRAGMAS)}" for each in _strange_pragmas(parsed)]
    if portable:
        found += [f"line {node.line}: byte arrays are not portable" for node in _literals(parsed, "bytes")]
        found += ["underscores are not portable"] if re.search(r"\b\w*_\w*\b", _code(parsed)) else []
    return [f"{where}: {each}" for each in found]


def _strange_pragmas(method: ParsedMethod) -> list[Pragma]:
    return [each for each in method.pragmas if each.selector not in PRAGMAS]


def _fractions(method: ParsedMethod) -> list[str]:
    """Integers with a negative exponent, which are Fractions in Pharo and Floats elsewhere."""
    literals = [*_literals(method, "number"), *_literals(method, "array")]
    return [
        f"line {node.line}: {number} is a Fraction in Pharo, a Float is written with a point"
        for node in literals
        for number in re.findall(r"(?<![\w.$#])-?\d+e-\d+", re.sub(r"'(?:[^']|'')*'", "''", node.text))
    ]


def variable_problems(sources: Sources) -> list[str]:
    """Instance variables that no method of the class or of one below it reads."""
    read: dict[str, set[str]] = {}
    for behavior, method in sources.methods():
        names = {node.name for node in parse_method(method.source).walk() if isinstance(node, Variable)}
        for name in sources.ours_above(behavior.name):
            read.setdefault(name, set()).update(names)
    return [
        f"{cls.name} has a variable {variable} that is never read"
        for cls in sources.classes.values()
        for variable in cls.instance_variables
        if variable not in read.get(cls.name, ())
    ]


def _literals(method: ParsedMethod, kind: str) -> Iterator[Literal]:
    return (node for node in method.walk() if isinstance(node, Literal) and node.kind == kind)


def _code(method: ParsedMethod) -> str:
    """Every name in it: variables and selectors."""
    names = [node.name for node in method.walk() if isinstance(node, (Variable, Assignment))]
    return " ".join([method.selector, *names, *(send.selector for send in method.sends())])


class _Scope:
    """Follows variables from where they are declared to where they are read."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.fields = set(names)
        self.constants: set[str] = set(PSEUDO_VARIABLES)
        self.found: list[str] = []

    def problems_of(self, method: ParsedMethod) -> list[str]:
        self._block(method, frozenset())
        return self.found

    def _block(self, block: Block, outer: frozenset[str]) -> None:
        declared = [*block.arguments, *block.temporaries]
        for name in declared:
            if name in outer or name in self.fields or declared.count(name) > 1:
                self.found.append(f"line {block.line}: {name} is declared twice")
        inner = outer | set(declared)
        reads, writes = set(), set()
        for node in block.walk():
            if isinstance(node, Variable):
                reads.add(node.name)
            elif isinstance(node, Assignment):
                writes.add(node.name)
        for name in block.temporaries:
            if name not in reads:
                self.found.append(f"line {block.line}: {name} is never read")
            elif name not in writes:
                self.found.append(f"line {block.line}: {name} is never assigned")
        for name in writes & set(block.arguments):
            self.found.append(f"line {block.line}: {name} is an argument and is assigned")
        for statement in block.statements:
            self._visit(statement, inner)

    def _visit(self, node: Node, names: frozenset[str]) -> None:
        if isinstance(node, Block):
            self._block(node, names)
            return
        if isinstance(node, (Variable, Assignment)):
            self._check(node, names)
        for child in node.children():
            self._visit(child, names)

    def _check(self, node: Variable | Assignment, names: frozenset[str]) -> None:
        if isinstance(node, Assignment) and (node.name in self.constants or node.name[0].isupper()):
            self.found.append(f"line {node.line}: {node.name} cannot be assigned")
        elif not (node.name in names or node.name in self.fields or node.name[0].isupper()):
            self.found.append(f"line {node.line}: {node.name} is not declared")


# -- messages and names --------------------------------------------------------------------------


def listed() -> dict[str, Any]:
    """What is known of Pharo."""
    return json.loads(PHARO.read_text(encoding="utf-8"))


def message_problems(sources: Sources, pharo: dict[str, Any]) -> list[str]:
    """Messages that neither our classes nor Pharo's understand."""
    ours = sources.selectors()
    anywhere = {selector for selectors in ours.values() for selector in selectors} | set(pharo["selectors"])
    understands = _understanding(sources, ours, pharo)
    found = []
    for use in sources.uses():
        if use.receiver is None and use.selector not in anywhere:
            found.append(f"{use.where}, line {use.line}: {use.selector} {EXTEND}")
        elif use.receiver is not None and not understands(use):
            found.append(f"{use.where}, line {use.line}: {use.selector} to {use.receiver} {EXTEND}")
    return found


def _understanding(sources: Sources, ours: dict[Behavior, set[str]], pharo: dict[str, Any]) -> Callable[[Use], bool]:
    def understands(use: Use) -> bool:
        assert use.receiver is not None
        if sources.implements(ours, use):
            return True
        outside = Behavior(sources.superclass_outside(use.receiver.name), use.receiver.class_side)
        return f"{outside}>>{use.selector}" in pharo["understood"]

    return understands


def name_problems(sources: Sources, pharo: dict[str, Any]) -> list[str]:
    """Classes that do not exist, and names of ours that Pharo may have given already."""
    known = {*sources.classes, *pharo["classes"]}
    found = [f"{places[0]}: {name} {EXTEND}" for name, places in sources.globals().items() if name not in known]
    found += [f"class {each} {EXTEND}" for each in sources.classes if each not in pharo["free_class_names"]]
    found += [f"{each} {EXTEND}" for each in sources.extension_methods() if each not in pharo["free_method_names"]]
    return found
