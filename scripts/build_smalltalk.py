"""Writes the chunk file that `neuroscope_bridge.generate_neuroscope_smalltalk_interface` fills in.

    python scripts/build_smalltalk.py            # smalltalk/NeuroScope-Core -> neuroscope_bridge/templates/
    python scripts/build_smalltalk.py --check    # exit 1 if the chunk file is out of date

The Tonel package is the source; the chunk file holds the same classes for images that load no repository.
"""

import argparse
import sys
from pathlib import Path

from smalltalk_sources.chunks import to_chunks
from smalltalk_sources.tonel import SMALLTALK, TonelError, read_package

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = SMALLTALK / "NeuroScope-Core"
CHUNK_FILE = ROOT / "neuroscope_bridge" / "templates" / "LMStudioRESTClient.st"


def build() -> str:
    """The text that the chunk file should have."""
    text = to_chunks(read_package(PACKAGE.name))
    if not text.isascii():
        raise TonelError("Smalltalk sources must be ASCII: images differ in how they decode a filed-in text")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the file is out of date")
    text = build()
    if parser.parse_args().check:
        if CHUNK_FILE.exists() and CHUNK_FILE.read_text(encoding="utf-8") == text:
            return 0
        print(f"{CHUNK_FILE.relative_to(ROOT)} is out of date: run python scripts/build_smalltalk.py")
        return 1
    CHUNK_FILE.write_text(text, encoding="utf-8")
    print(f"Wrote {CHUNK_FILE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
