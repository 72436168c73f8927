"""The ``neuroscope`` command. It stands above all packages: it starts the server and writes the Smalltalk client."""

import argparse
import json
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

    selftest = commands.add_parser("selftest", help="prove on a model that what is captured is what was computed")
    selftest.add_argument("model", help="name or folder, or neuroscope-tiny")
    selftest.add_argument("--json", action="store_true", help="the report as JSON")
    selftest.set_defaults(run=_selftest)

    coverage = commands.add_parser("coverage", help="what can be hooked in each mlx-lm architecture, on tiny models")
    coverage.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help="such as gemma2 (default: all)")
    coverage.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the table here (default: show it)")
    coverage.set_defaults(run=_coverage)

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


def _selftest(options: argparse.Namespace) -> int:
    from . import HookedModel, HookError

    try:
        report = HookedModel.from_pretrained(options.model).selftest()
    except HookError as error:
        return _fail(str(error))
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0 if report.passed else 1


def _coverage(options: argparse.Namespace) -> int:
    from .coverage import models, table

    names = options.architectures or models.architectures()
    unknown = sorted(set(names) - set(models.architectures()))
    if unknown:
        return _fail(f"mlx-lm has no architecture {unknown[0]!r}. There are: {', '.join(models.architectures())}.")
    surveys = []
    for found in table.rows(names):
        surveys.append(found)
        if options.output is not None:
            print(f"{found.name}: {'ok' if found.passed else 'NOT EXACT'}", flush=True)
    text = table.document(surveys)
    if options.output is None:
        print(text, end="")
    else:
        try:
            _write_whole(options.output, text)
        except OSError as error:
            return _fail(f"cannot write {options.output}: {error}")
    return 0 if all(found.passed for found in surveys) else 1


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
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _fail(message: str) -> int:
    sys.stderr.write(f"neuroscope: {message}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
