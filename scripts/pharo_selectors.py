"""Writes tests/smalltalk/pharo_selectors.json: what our packages ask of Pharo, looked up in Pharo's own sources.

    python scripts/pharo_selectors.py --pharo 11 DIR... --pharo 12 DIR... --pharo 13 DIR...

The folders hold Tonel packages: `src` of a checkout of pharo-project/pharo, and, for the inspector package, those of
pharo-spec/Spec, pharo-spec/NewTools and pharo-graphics/Roassal at the versions that this Pharo's BaselineOfPharo names.

Only what our packages send is listed, each with the classes that implement it, and only if every version has it; what
one lacks, has deprecated, or already defines where we do, is reported, and the exit status is 1.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from smalltalk_sources.syntax import SmalltalkSyntaxError
from smalltalk_sources.tonel import PACKAGES
from smalltalk_sources.usage import Behavior, Sources

LIST = Path(__file__).resolve().parent.parent / "tests" / "smalltalk" / "pharo_selectors.json"

# What a fresh image does not have, or has for its own tests only, is no answer to "does Pharo have this".
_LEFT_OUT = re.compile(r"-(Tests?|Examples?|Mocks?|MockObjects|Gtk|Bloc|Obsolete|Experimental|Tutorials?)(-|$)")
_DEFINITION = re.compile(r"^(Class|Trait|Extension) \{(.*?)\n?\}$", re.MULTILINE | re.DOTALL)
_PROPERTY = re.compile(r"#(name|superclass|traits|classTraits)\s*:\s*#?(?:'([^']*)'|(\w+))")
_METHOD = re.compile(
    r"^\{[^{}]*#category\s*:[^{}]*\}\r?\n(\w+)((?: class| classTrait)?) >> ([^\[]+?)\s*\[", re.MULTILINE
)
_WELL_KNOWN = ("Object", "Number", "Float", "Integer", "Boolean", "Collection", "SequenceableCollection", "Array")
_WELL_KNOWN += ("OrderedCollection", "Dictionary", "String", "WriteStream", "BlockClosure", "Exception", "ZnClient")


@dataclass
class PharoClass:
    """A class or trait of one Pharo, with the methods of all packages."""

    name: str
    superclass: str = "nil"
    traits: list[str] = field(default_factory=list)
    class_traits: list[str] = field(default_factory=list)
    methods: dict[bool, dict[str, str]] = field(default_factory=lambda: {False: {}, True: {}})
    """By side, then selector: the package, or `deprecated`."""
    package: str = ""
    is_in_image: bool = False


class Pharo:
    """One version's classes."""

    def __init__(self, version: str, folders: list[Path]) -> None:
        self.version = version
        self.classes: dict[str, PharoClass] = {}
        for folder in folders:
            for file in sorted(folder.rglob("*.st")):
                self._read(file)

    def _read(self, file: Path) -> None:
        package, text = file.parent.name, file.read_text(encoding="utf-8", errors="replace")
        definition = _DEFINITION.search(text)
        if not definition:
            return
        properties = {name: quoted or bare for name, quoted, bare in _PROPERTY.findall(definition[2])}
        cls = self.classes.setdefault(properties["name"], PharoClass(properties["name"]))
        left_out = bool(_LEFT_OUT.search(package))
        if definition[1] != "Extension":
            cls.superclass = properties.get("superclass", "nil")
            cls.traits = re.findall(r"\b[A-Z]\w+", properties.get("traits", ""))
            cls.class_traits = re.findall(r"\b[A-Z]\w+", properties.get("classTraits", ""))
            cls.package = package
            cls.is_in_image = not left_out
        if left_out:
            return
        headers = list(_METHOD.finditer(text))
        ends = [each.start() for each in headers[1:]]
        for header, end in zip(headers, [*ends, len(text)], strict=False):
            is_deprecated = re.search(r"\bself\s+deprecated:", text[header.end() : end])
            selector = _selector(header[3])
            cls.methods[bool(header[2])][selector] = "deprecated" if is_deprecated else package

    def implementor(self, behavior: Behavior, selector: str) -> str | None:
        """The class or trait whose method answers, None if there is none; `deprecated` counts as none."""
        for owner, class_side in self._lookup(behavior):
            package = owner.methods[class_side].get(selector)
            if package == "deprecated":
                return None
            if package:
                return str(Behavior(owner.name, class_side))
        return None

    def _lookup(self, behavior: Behavior) -> Iterator[tuple[PharoClass, bool]]:
        name = behavior.name
        while name in self.classes:
            cls = self.classes[name]
            yield cls, behavior.class_side
            yield from self._traits(cls, behavior.class_side)
            name = cls.superclass
        if behavior.class_side:
            yield from self._lookup(Behavior("Class"))

    def _traits(self, cls: PharoClass, class_side: bool) -> Iterator[tuple[PharoClass, bool]]:
        for name in cls.traits:
            if trait := self.classes.get(name):
                yield trait, class_side
                yield from self._traits(trait, class_side)
        for name in cls.class_traits if class_side else ():
            if trait := self.classes.get(name):
                yield trait, False
                yield from self._traits(trait, False)

    @cached_property
    def implementors(self) -> dict[str, list[str]]:
        """For each selector, who implements it, the classes that everybody knows first."""
        found: dict[str, list[tuple[int, str]]] = {}
        for cls in self.classes.values():
            for class_side, methods in cls.methods.items():
                behavior = Behavior(cls.name, class_side)
                rank = _WELL_KNOWN.index(cls.name) if str(behavior) in _WELL_KNOWN else len(_WELL_KNOWN)
                for selector, package in methods.items():
                    if package != "deprecated":
                        found.setdefault(selector, []).append((rank, str(behavior)))
        return {selector: [name for _, name in sorted(names)] for selector, names in found.items()}


def _selector(pattern: str) -> str:
    keywords = re.findall(r"\w+:", pattern)
    return "".join(keywords) or pattern.split()[0]


def look_up(sources: Sources, pharos: list[Pharo]) -> tuple[dict[str, Any], list[str]]:
    """The list, and what does not hold in every version."""
    problems: list[str] = []
    precise, loose = sources.asked_of_image()
    understood: dict[str, str] = {}
    for behavior, selector in sorted(precise):
        answers = [pharo.implementor(behavior, selector) for pharo in pharos]
        if None in answers:
            problems += _missing(f"{behavior} does not understand {selector}", answers, pharos)
        else:
            understood[f"{behavior}>>{selector}"] = str(answers[-1])
    selectors: dict[str, list[str]] = {}
    for selector in sorted(loose):
        answers = [pharo.implementors.get(selector) for pharo in pharos]
        if None in answers:
            problems += _missing(f"nothing understands {selector}", answers, pharos)
            continue
        everywhere = set.intersection(*(set(each or ()) for each in answers))
        selectors[selector] = [each for each in answers[-1] or () if each in everywhere][:3] or [
            (answers[-1] or [""])[0]
        ]
    names = sorted(name for name in sources.globals() if name not in sources.classes)
    for name in names:
        answers = [name if name in pharo.classes and pharo.classes[name].is_in_image else None for pharo in pharos]
        problems += _missing(f"there is no class {name}", answers, pharos)
    taken, overridden = collisions(sources, pharos)
    listed = {
        "pharo": [pharo.version for pharo in pharos],
        "classes": [name for name in names if all(name in pharo.classes for pharo in pharos)],
        "understood": understood,
        "selectors": selectors,
        "free_class_names": sorted(set(sources.classes) - set(taken)),
        "free_method_names": [each for each in sources.extension_methods() if each not in overridden],
    }
    problems += [f"{name} is a class of Pharo's already" for name in taken]
    problems += [f"{method} is a method of Pharo's already" for method in overridden]
    return listed, problems


def collisions(sources: Sources, pharos: list[Pharo]) -> tuple[list[str], list[str]]:
    """Our class names that some Pharo has, and the methods of its classes that we would replace."""
    taken = [name for name in sources.classes if any(name in pharo.classes for pharo in pharos)]
    overridden = []
    for each in sources.extension_methods():
        owner, selector = each.split(">>")
        behavior = Behavior(owner.removesuffix(" class"), owner.endswith(" class"))
        if any(pharo.implementor(behavior, selector) for pharo in pharos):
            overridden.append(each)
    return sorted(taken), overridden


def as_json(listed: dict[str, Any]) -> str:
    """One line for each entry, so that two branches that add some can be merged."""
    parts = []
    for name, entries in listed.items():
        brackets = "{}" if isinstance(entries, dict) else "[]"
        pairs = entries.items() if isinstance(entries, dict) else ((None, each) for each in entries)
        lines = [(f"{json.dumps(key)}: " if key else "") + json.dumps(value) for key, value in pairs]
        parts.append(f"{json.dumps(name)}: {brackets[0]}\n" + ",\n".join(lines) + f"\n{brackets[1]}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _missing(problem: str, answers: list[Any], pharos: list[Pharo]) -> list[str]:
    lacking = [pharo.version for pharo, answer in zip(pharos, answers, strict=True) if answer is None]
    return [f"{problem} in Pharo {', '.join(lacking)}"] if lacking else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pharo", action="append", nargs="+", required=True, metavar=("VERSION", "DIR"))
    pharos = [Pharo(version, [Path(each) for each in folders]) for version, *folders in parser.parse_args().pharo]
    try:
        sources = Sources.of(*PACKAGES)
    except SmalltalkSyntaxError as error:
        parser.error(str(error))
    listed, problems = look_up(sources, pharos)
    LIST.write_text(as_json(listed), encoding="utf-8")
    print(*problems, sep="\n")
    print(f"Wrote {LIST.relative_to(LIST.parents[2])}: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
