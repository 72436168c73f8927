"""What is shown in Smalltalk, in documents and class comments, runs as it stands: under Amber, against a live server."""

import re
from pathlib import Path

import pytest
from smalltalk_image import Image
from smalltalk_sources import tonel

from neuroscope_bridge.smalltalk import generate_neuroscope_smalltalk_interface

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "docs/pharo.md"]


def snippets(comment: str) -> list[str]:
    """The indented parts of a class comment: its runnable ones."""
    return [
        re.sub(r"^\t", "", part, flags=re.MULTILINE)
        for part in re.findall(r"(?:^\t.*\n?|^\n(?=\t))+", comment, re.MULTILINE)
    ]


@pytest.fixture
def image(live_server, tmp_path, monkeypatch):
    """An image whose working directory is empty: what snippets save lands there."""
    file = tmp_path / "LMStudioRESTClient.st"
    file.write_text(generate_neuroscope_smalltalk_interface(live_server), encoding="ascii")
    monkeypatch.chdir(tmp_path)
    with Image(file) as image:
        image.evaluate("LMStudioRESTClient default loadModel: 'neuroscope-tiny'")
        yield image


COMMENTS = [
    pytest.param(snippet, id=f"{file.stem.split('.')[0]}-{number}")
    for file in sorted((ROOT / "smalltalk").glob("NeuroScope-Core/*.class.st"))
    for number, snippet in enumerate(snippets(tonel.parse_class(file.read_text()).comment))
]


@pytest.mark.parametrize("snippet", COMMENTS)
def test_a_class_comments_snippet_runs(image, snippet):
    image.evaluate(snippet)


def test_class_comments_are_in_the_first_person_and_show_something():
    for file in (ROOT / "smalltalk").glob("NeuroScope-*/*.class.st"):
        comment = tonel.parse_class(file.read_text()).comment
        assert re.search(r"\b(I|me|my|mine)\b", comment, re.IGNORECASE), file.name
