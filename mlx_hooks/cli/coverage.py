"""``neuroscope coverage``: the table of mlx-lm's architectures."""

import argparse
from pathlib import Path
from typing import Any

from ..errors import HookError
from .output import write_whole


def add(commands: Any) -> None:
    parser = commands.add_parser("coverage", help="what can be hooked in each mlx-lm architecture, on tiny models")
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="such as gemma2 (default: all)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the table here (default: show it)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..coverage import models, table

    names = options.architectures or models.architectures()
    unknown = sorted(set(names) - set(models.architectures()))
    if unknown:
        raise HookError(f"mlx-lm has no architecture {unknown[0]!r}. There are: {', '.join(models.architectures())}.")
    surveys = []
    for found in table.rows(names):
        surveys.append(found)
        if options.output is not None:
            print(f"{found.name}: {'ok' if found.passed else 'NOT EXACT'}", flush=True)
    text = table.document(surveys)
    if options.output is None:
        print(text, end="")
    else:
        write_whole(options.output, text)
    return 0 if all(found.passed for found in surveys) else 1
