"""The Tonel packages as an Amber image files them in, and what their SUnit tests are."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

from smalltalk_sources.chunks import to_chunks
from smalltalk_sources.syntax import parse_method
from smalltalk_sources.tonel import ClassDefinition, Extension, Method, read_package

from neuroscope_bridge.smalltalk import generate_neuroscope_smalltalk_interface

CORE = "NeuroScope-Core"
CORE_TESTS = "NeuroScope-Core-Tests"
EXAMPLES = "NeuroScope-Examples"
INSPECTOR = "NeuroScope-Inspector"


def write_client(folder: Path, url: str) -> Path:
    """Write what is generated for the server at the URL, which is then that of the image's default client."""
    file = folder / "LMStudioRESTClient.st"
    file.write_text(generate_neuroscope_smalltalk_interface(SimpleNamespace(base_url=url)), encoding="ascii")
    return file


def write_chunks(file: Path, *packages: str) -> Path:
    """Write the packages to a chunk file that Amber reads; their superclasses are among them or in the image."""
    definitions = [_for_amber(each) for package in packages for each in read_package(package)]
    file.write_text(to_chunks(definitions), encoding="ascii")
    return file


def sunit_tests(package: str) -> list[str]:
    """The tests of a package as `Class>>testSelector`, in the order of its files."""
    classes = [each for each in read_package(package) if isinstance(each, ClassDefinition)]
    return [
        f"{cls.name}>>{selector}"
        for cls in classes
        for selector in (method.source.split("\n")[0] for method in cls.methods if not method.class_side)
        if re.fullmatch(r"test\w*", selector)
    ]


def example_scripts(package: str) -> list[str]:
    """What a click on an example evaluates: `Class selector` of every class-side method with a script pragma."""
    return [
        f"{definition.name} {method.source.splitlines()[0]}"
        for definition in read_package(package)
        for method in definition.methods
        if method.class_side
        and any(each.selector in ("script", "script:") for each in parse_method(method.source).pragmas)
    ]


def _for_amber(definition: ClassDefinition | Extension) -> ClassDefinition | Extension:
    """Amber takes what Pharo reads as a pragma for JavaScript."""
    return dataclasses.replace(definition, methods=[_without_pragmas(each) for each in definition.methods])


def _without_pragmas(method: Method) -> Method:
    source = method.source
    for pragma in reversed(parse_method(source).pragmas):
        source = source[: pragma.start].rstrip() + source[pragma.end :]
    return dataclasses.replace(method, source=source)
