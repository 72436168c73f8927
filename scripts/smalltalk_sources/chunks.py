"""The chunk format that `fileIn` reads.

Each method has a preamble of its own, and classes are defined by the message that every Pharo's file-in knows.
"""

from collections.abc import Sequence

from .tonel import ClassDefinition, Extension, Method, TonelError


def to_chunks(definitions: Sequence[ClassDefinition | Extension]) -> str:
    """The classes, superclasses first, then all methods."""
    classes = in_dependency_order([each for each in definitions if isinstance(each, ClassDefinition)])
    extensions = [each for each in definitions if isinstance(each, Extension)]
    parts = [_definition(cls) for cls in classes]
    parts += [_method(each.name, method) for each in [*classes, *extensions] for method in each.methods]
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


def _definition(cls: ClassDefinition) -> str:
    definition = (
        f"{cls.superclass} subclass: #{cls.name}\n"
        f"\tinstanceVariableNames: {_literal(' '.join(cls.instance_variables))}\n"
        "\tclassVariableNames: ''\n"
        "\tpoolDictionaries: ''\n"
        f"\tcategory: {_literal(cls.category)}"
    )
    return _chunk(definition) + "\n\n" + _chunk(f"{cls.name} comment: {_literal(cls.comment)}")


def _method(class_name: str, method: Method) -> str:
    side = " class" if method.class_side else ""
    return f"!{class_name}{side} methodsFor: {_literal(method.category)}!\n{_chunk(method.source)} !"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _chunk(text: str) -> str:
    return text.replace("!", "!!") + "!"
