"""The code in documents, for the tests that run it."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEFAULT = "http://127.0.0.1:8080"


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a document in the repository that name ``language``; "" for those that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]
