"""The guides: every block runs, in order, and shows what the page says that it shows."""

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoints
import pytest
from documents import ROOT, fenced, run_document

GUIDES = {
    "docs/inference_hooks.md": 13,
    "docs/interpretability.md": 15,
    "docs/circuits.md": 20,
    "docs/traits.md": 21,
    "docs/training.md": 45,
}
"""Each guide and how many blocks it runs at least."""


def what_a_reader_has(folder: Path) -> dict[str, Any]:
    """What blocks use and do not make: a PyTorch model with its tokenizer, and the script that converts it."""
    (folder / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "convert_checkpoint.py", folder / "examples")
    (folder / "examples" / "torch.py").write_text(checkpoints.TORCH)
    return {
        "your_model": SimpleNamespace(state_dict=checkpoints.random_state),
        "config": SimpleNamespace(**checkpoints.CONFIG),
        "your_tokenizer": SimpleNamespace(get_vocab=lambda: checkpoints.VOCABULARY),
        "__name__": "__main__",
    }


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guide_shows_what_its_blocks_show(guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", checkpoints.torch())
    assert run_document(guide, tmp_path, what_a_reader_has(tmp_path)) >= GUIDES[guide]


@pytest.mark.parametrize("guide", GUIDES)
def test_what_a_guide_points_to_is_there(guide: str) -> None:
    text = (ROOT / guide).read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = [
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", prose, re.M)
    ]
    assert len(set(headings)) == len(headings)
    links = re.findall(r"\]\(#([^)]*)\)", prose)
    assert links
    assert set(links) <= set(headings)
    paths = re.findall(r"`((?:docs|examples|tests|benchmarks)/[\w./]+)`", prose)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_a_block_that_shows_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("documents.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n\n```sh\necho 2\n```\n\n```text\n2\n```\n"
    )
    assert run_document("page.md", tmp_path, {}) == 2
    assert fenced("page.md")[0] == ("python", "print(1 + 1)\n", 4)
    for wrong, message in [("text\n3", "page.md:4 shows:\n2"), ("ruby\n2", "page.md:8 is ruby, and is not run")]:
        page.write_text(f"# Page\n\n```python\nprint(1 + 1)\n```\n\n```{wrong}\n```\n")
        with pytest.raises(AssertionError, match=message):
            run_document("page.md", tmp_path, {})
    page.write_text("```sh\necho 2\nfalse\n```\n")
    with pytest.raises(AssertionError):
        run_document("page.md", tmp_path, {})
