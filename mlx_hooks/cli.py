"""The ``neuroscope`` command. It stands above all packages: it starts the server and writes the Smalltalk client."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; answers the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:
        # The server owns its options; --help included.
        from api_server.__main__ import main as serve

        return serve(arguments[1:], prog="neuroscope serve")
    options = _parser().parse_args(arguments)
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="neuroscope", description="Look inside language models on MLX.")
    parser.add_argument("--version", action="version", version=f"neuroscope-mlx {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("serve", help="serve models over REST (see neuroscope serve --help)")

    info = commands.add_parser("info", help="show a model's sizes and hook points")
    info.add_argument("model", nargs="?", default="neuroscope-tiny", help="name or folder (default: neuroscope-tiny)")
    info.set_defaults(run=_info)

    smalltalk = commands.add_parser("smalltalk", help="write the Smalltalk client LMStudioRESTClient.st for Pharo")
    smalltalk.add_argument("-o", "--output", type=Path, default=Path("LMStudioRESTClient.st"), metavar="FILE")
    smalltalk.add_argument("--url", default="http://127.0.0.1:8080", help="the server that `default` talks to")
    smalltalk.set_defaults(run=_smalltalk)
    return parser


def _info(options: argparse.Namespace) -> int:
    from . import HookedModel, HookError

    try:
        print(HookedModel.from_pretrained(options.model))
    except HookError as error:
        return _fail(str(error))
    return 0


def _smalltalk(options: argparse.Namespace) -> int:
    from neuroscope_bridge import LMStudioNeuroScopeClient, generate_neuroscope_smalltalk_interface

    try:
        with LMStudioNeuroScopeClient(options.url) as client:
            text = generate_neuroscope_smalltalk_interface(client)
        if options.output.is_dir():
            raise IsADirectoryError("it is a folder; name a file in it")
        _write_whole(options.output, text)
    except (OSError, ValueError) as error:
        return _fail(f"cannot write {options.output}: {error}")
    print(options.output)
    return 0


def _write_whole(path: Path, text: str) -> None:
    """Replace a file whole or not at all: the text is complete before it gets the name."""
    draft = path.with_name(path.name + ".part")
    try:
        draft.write_text(text, encoding="ascii")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _fail(message: str) -> int:
    sys.stderr.write(f"neuroscope: {message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
