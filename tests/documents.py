"""The code in documents, for the tests that run it."""

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DEFAULT = "http://127.0.0.1:8080"


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a document in the repository that name ``language``; "" for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def fenced(document: str) -> list[tuple[str, str, int]]:
    """Every fenced block of a document in order: its language, its text, and the line that the text begins in."""
    text = (ROOT / document).read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in found]


def run_document(document: str, folder: Path, names: dict[str, Any]) -> int:
    """Run the Python and shell blocks of a document in order, in ``folder``; answers how many there were.

    Python blocks share ``names``. What a block prints is the ``text`` block behind it, if there is one; "..." stands
    for anything.
    """
    blocks = [*fenced(document), ("", "", 0)]
    count = 0
    for (language, text, line), (following, wanted, _) in pairwise(blocks):
        where = f"{document}:{line}"
        assert language in ("python", "sh", "text"), f"{where} is {language or 'of no language'}, and is not run"
        if language == "text":
            continue
        shown = _run_python(text, line, document, names) if language == "python" else _run_shell(text, folder)
        count += 1
        if following == "text":
            same = doctest.OutputChecker().check_output(wanted, shown, doctest.ELLIPSIS)
            assert same, f"{where} shows:\n{shown}\ninstead of:\n{wanted}"
    return count


def _run_python(text: str, line: int, document: str, names: dict[str, Any]) -> str:
    out = io.StringIO()
    # Empty lines in front: an error names the document's own line.
    code = compile("\n" * (line - 1) + text, document, "exec")
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return out.getvalue()


def _run_shell(text: str, folder: Path) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "80",
    }
    done = subprocess.run(["sh", "-ec", text], cwd=folder, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout
