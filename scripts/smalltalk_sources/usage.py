"""What our Smalltalk packages ask of the image that they are loaded into: its classes, and what these understand.

Where the class of a receiver is plain from the source (self, super, a class, a literal, a variable that holds a new
instance), the class that has to understand is told; of any other receiver only the selector.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from .syntax import Assignment, Block, Brace, Cascade, Literal, Node, ParsedMethod, Send, Variable, parse_method
from .tonel import ClassDefinition, Extension, Method, read_package

CORE_PACKAGES = ("NeuroScope-Core", "NeuroScope-Core-Tests", "NeuroScope-Examples")
"""The packages that run outside Pharo too, with Amber."""

PSEUDO_VARIABLES = ("self", "super", "nil", "true", "false", "thisContext")
GLOBAL_VARIABLES = {"Transcript": "ThreadSafeTranscript", "Smalltalk": "SmalltalkImage"}
"""Capitalised names of the image that are no classes, and of which class each is an instance."""
_CONSTANTS = {"nil": "UndefinedObject", "true": "True", "false": "False"}
_LITERALS = {"string": "ByteString", "symbol": "ByteSymbol", "character": "Character", "array": "Array"}
_CONSTRUCTORS = ("new", "new:")


@dataclass(frozen=True, order=True)
class Behavior:
    """One side of a class: `Behavior("ZnClient", class_side=True)` is what `ZnClient` itself understands."""

    name: str
    class_side: bool = False

    def __str__(self) -> str:
        return f"{self.name} class" if self.class_side else self.name


@dataclass(frozen=True)
class Use:
    """A message sent in one of our methods; `receiver` is None where nothing tells its class."""

    where: str
    line: int
    selector: str
    receiver: Behavior | None
    is_super: bool = False


@dataclass
class Sources:
    """Our packages, parsed: classes and extensions by the package that holds them."""

    classes: dict[str, ClassDefinition] = field(default_factory=dict)
    extensions: list[Extension] = field(default_factory=list)

    @classmethod
    def of(cls, *packages: str) -> "Sources":
        sources = cls()
        for package in packages:
            for definition in read_package(package):
                sources.add(definition)
        return sources

    def add(self, definition: ClassDefinition | Extension) -> None:
        if isinstance(definition, ClassDefinition):
            self.classes[definition.name] = definition
        else:
            self.extensions.append(definition)

    def methods(self) -> Iterator[tuple[Behavior, Method]]:
        for definition in [*self.classes.values(), *self.extensions]:
            for method in definition.methods:
                yield Behavior(definition.name, method.class_side), method

    def selectors(self) -> dict[Behavior, set[str]]:
        """What each side of each class implements, extensions included."""
        found: dict[Behavior, set[str]] = {}
        for behavior, method in self.methods():
            found.setdefault(behavior, set()).add(parse_method(method.source).selector)
        return found

    def superclass_outside(self, name: str) -> str:
        """The first class above that is not ours, or the class itself if it is not."""
        while name in self.classes:
            name = self.classes[name].superclass
        return name

    def instance_variables(self, name: str) -> list[str]:
        """With those of the superclasses that are ours."""
        return [variable for each in self.ours_above(name) for variable in self.classes[each].instance_variables]

    def ours_above(self, name: str) -> list[str]:
        """The class and those above it, as far as they are ours, upwards."""
        found = []
        while name in self.classes:
            found.append(name)
            name = self.classes[name].superclass
        return found

    def uses(self) -> list[Use]:
        """Every message sent in our methods."""
        found = []
        for behavior, method in self.methods():
            parsed = parse_method(method.source)
            where = f"{behavior}>>{parsed.selector}"
            known = _instances(parsed)
            for send in parsed.sends():
                receiver = _behavior_of(send.receiver, behavior, known)
                is_super = isinstance(send.receiver, Variable) and send.receiver.name == "super"
                found.append(Use(where, send.line, send.selector, receiver, is_super))
        return found

    def asked_of_image(self) -> tuple[set[tuple[Behavior, str]], set[str]]:
        """What classes of the image must understand, and selectors that some class of it must have."""
        ours = self.selectors()
        anywhere = {selector for selectors in ours.values() for selector in selectors}
        precise, loose = set(), set()
        for use in self.uses():
            if use.receiver is None:
                loose.add(use.selector)
            elif not self.implements(ours, use):
                outside = self.superclass_outside(use.receiver.name)
                precise.add((Behavior(outside, use.receiver.class_side), use.selector))
        return precise, loose - anywhere

    def implements(self, ours: dict[Behavior, set[str]], use: Use) -> bool:
        """Whether the receiver's class has a method for it that is ours; `ours` is what selectors() answers."""
        assert use.receiver is not None
        name = use.receiver.name
        if use.is_super and name in self.classes:
            name = self.classes[name].superclass
        while True:
            if use.selector in ours.get(Behavior(name, use.receiver.class_side), ()):
                return True
            if name not in self.classes:
                return False
            name = self.classes[name].superclass

    def extension_methods(self) -> list[str]:
        """What we add to classes that are not ours, as `Number>>foo`."""
        return sorted(
            f"{Behavior(extension.name, method.class_side)}>>{parse_method(method.source).selector}"
            for extension in self.extensions
            if extension.name not in self.classes
            for method in extension.methods
        )

    def globals(self) -> dict[str, list[str]]:
        """The classes that methods name or reach by a global variable, superclasses, extended ones; and who does."""
        found: dict[str, list[str]] = {}
        for behavior, method in self.methods():
            for node in parse_method(method.source).walk():
                if isinstance(node, Variable) and node.name[0].isupper():
                    name = GLOBAL_VARIABLES.get(node.name, node.name)
                    found.setdefault(name, []).append(f"{behavior}>>{method.source.splitlines()[0]}")
        for definition in self.classes.values():
            found.setdefault(definition.superclass, []).append(definition.name)
        for extension in self.extensions:
            found.setdefault(extension.name, []).append(f"{extension.name}.extension.st")
        return found


def _instances(method: ParsedMethod) -> dict[str, Behavior]:
    """Temporaries that only ever hold a new instance of one class."""
    found: dict[str, set[Behavior | None]] = {}
    for node in method.walk():
        if isinstance(node, Assignment):
            found.setdefault(node.name, set()).add(_instance_of(node.value))
    temporaries = {name for node in method.walk() if isinstance(node, Block) for name in node.temporaries}
    return {
        name: behavior
        for name, behaviors in found.items()
        if name in temporaries and len(behaviors) == 1 and (behavior := next(iter(behaviors))) is not None
    }


def _instance_of(value: Node) -> Behavior | None:
    if isinstance(value, Cascade) and value.sends[-1].selector == "yourself":
        value = value.sends[0].receiver
    if isinstance(value, Send) and value.selector in _CONSTRUCTORS and isinstance(value.receiver, Variable):
        name = value.receiver.name
        return Behavior(name) if name[0].isupper() else None
    return None


def _behavior_of(receiver: Node, here: Behavior, known: dict[str, Behavior]) -> Behavior | None:
    if isinstance(receiver, Literal):
        return _literal_behavior(receiver)
    if isinstance(receiver, Brace):
        return Behavior("Array")
    if isinstance(receiver, Block):
        return Behavior("FullBlockClosure")
    if not isinstance(receiver, Variable):
        return _instance_of(receiver)
    if receiver.name in ("self", "super"):
        return here
    if receiver.name in _CONSTANTS:
        return Behavior(_CONSTANTS[receiver.name])
    if receiver.name in GLOBAL_VARIABLES:
        return Behavior(GLOBAL_VARIABLES[receiver.name])
    if receiver.name[0].isupper():
        return Behavior(receiver.name, class_side=True)
    return known.get(receiver.name)


def _literal_behavior(literal: Literal) -> Behavior | None:
    if literal.kind == "number":
        return Behavior("SmallFloat64" if "." in literal.text or "e-" in literal.text else "SmallInteger")
    return Behavior(_LITERALS[literal.kind]) if literal.kind in _LITERALS else None
