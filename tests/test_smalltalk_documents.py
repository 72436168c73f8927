"""What is shown in Smalltalk, in documents and class comments, runs as it stands: Amber, against a live server."""

import re
from pathlib import Path

import pytest
from documents import DEFAULT, blocks
from smalltalk_image import Image
from smalltalk_packages import write_client
from smalltalk_sources import tonel
from smalltalk_sources.syntax import Assignment, Block, parse_method

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "docs/pharo.md"]
# Amber loads no code in Pharo's ways: where these words stand, only the syntax is looked at.
LOADING = ("Metacello", "fileIn")


def snippets(comment: str) -> list[str]:
    """The indented parts of a class comment: its runnable ones."""
    return [
        re.sub(r"^\t", "", part, flags=re.MULTILINE)
        for part in re.findall(r"(?:^\t.*\n?|^\n(?=\t))+", comment, re.MULTILINE)
    ]


def session(blocks: list[str]) -> str:
    """A script that runs the blocks one after the other, as a playground does: what one assigns, the next ones know."""
    parts = [
        f"[\n{block}\n] on: Error do: [ :problem | Error signal: 'block {number}: ' , problem messageText ]."
        for number, block in enumerate(blocks, 1)
        if not any(word in block for word in LOADING)
    ]
    return "\n".join([*parts, "nil"])


@pytest.fixture(scope="module")
def image(live_server, tmp_path_factory):
    """An image whose working directory is empty: what snippets save lands there."""
    folder = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with Image(write_client(folder, live_server.base_url)) as image:
            yield image


COMMENTS = [
    pytest.param(snippet, id=f"{file.stem.split('.')[0]}-{number}")
    for file in sorted((ROOT / "smalltalk").glob("NeuroScope-Core/*.class.st"))
    for number, snippet in enumerate(snippets(tonel.parse_class(file.read_text()).comment))
]


@pytest.mark.parametrize("snippet", COMMENTS)
def test_a_class_comments_snippet_runs(image, live_server, snippet):
    image.evaluate(snippet.replace(DEFAULT, live_server.base_url))


@pytest.mark.parametrize("snippet", COMMENTS)
def test_a_class_comments_snippet_declares_its_variables(snippet):
    nodes = list(parse_method(f"snippet\n{snippet}").walk())
    declared = {name for node in nodes if isinstance(node, Block) for name in node.temporaries}
    assert {node.name for node in nodes if isinstance(node, Assignment)} <= declared


@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_documents_blocks_run_one_after_the_other(image, live_server, document):
    found = [block.replace(DEFAULT, live_server.base_url) for block in blocks(document, "smalltalk")]
    for block in found:
        parse_method(f"block\n{block}")
    image.evaluate(session(found))


def test_class_comments_are_in_the_first_person_and_show_something():
    for file in (ROOT / "smalltalk").glob("NeuroScope-*/*.class.st"):
        comment = tonel.parse_class(file.read_text()).comment
        assert re.search(r"\b(I|me|my|mine)\b", comment, re.IGNORECASE), file.name
