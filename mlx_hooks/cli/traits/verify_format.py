"""``neuroscope traits verify-format``: whether files of captures are whole and right."""

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("verify-format", help="check files of captures, and say what is wrong with them")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a .safetensors file that a capture wrote")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ...analysis.traits.verify import verify_format

    failed = False
    for path in options.files:
        problems = verify_format(path)
        failed = failed or bool(problems)
        print(f"{path}: {f'{len(problems)} wrong' if problems else 'right'}")
        for problem in problems:
            print(f"  {problem}")
    return 1 if failed else 0
