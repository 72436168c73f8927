"""The ``neuroscope`` command. It stands above all packages: it starts the server and writes the Smalltalk client.

One module per command: ``add`` describes it to the parser, ``run`` does it and answers the exit status. What a command
cannot do it raises as a HookError, which is shown as one line.
"""

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import HookError
from . import circuits, coverage, generate, info, lens, selftest, smalltalk, train, traits

COMMANDS = (info, generate, lens, traits, circuits, train, selftest, coverage, smalltalk)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; answers the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:
        # The server owns its options; --help included.
        from api_server.__main__ import main as serve

        return serve(arguments[1:], prog="neuroscope serve")
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        hint = getattr(options, "hint", "")
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint and f': {hint}'}")
    try:
        return int(options.run(options))
    except HookError as error:
        sys.stderr.write(f"neuroscope: {error}\n")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neuroscope", description="Look inside language models on MLX.")
    parser.add_argument("--version", action="version", version=f"neuroscope-mlx {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("serve", help="serve models over REST (see neuroscope serve --help)")
    for command in COMMANDS:
        command.add(commands)
    return parser
