"""Writes the Tonel files as Pharo would, methods in its order: what saving the packages from an image does.

python scripts/format_smalltalk.py
"""

import sys

from smalltalk_sources.tonel import SMALLTALK, parse_file, to_tonel


def main() -> int:
    for file in sorted(SMALLTALK.glob("*/*.*.st")):
        text = to_tonel(parse_file(file))
        if text != file.read_text(encoding="utf-8"):
            file.write_text(text, encoding="utf-8")
            print(f"Wrote {file.relative_to(SMALLTALK)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
