"""``neuroscope smalltalk``: the client for Pharo."""

import argparse
from pathlib import Path
from typing import Any

from ..errors import HookError
from .output import write_whole


def add(commands: Any) -> None:
    parser = commands.add_parser("smalltalk", help="write the Smalltalk client LMStudioRESTClient.st for Pharo")
    parser.add_argument("-o", "--output", type=Path, default=Path("LMStudioRESTClient.st"), metavar="FILE")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the server that `default` talks to")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from neuroscope_bridge import LMStudioNeuroScopeClient, generate_neuroscope_smalltalk_interface

    try:
        with LMStudioNeuroScopeClient(options.url) as client:
            text = generate_neuroscope_smalltalk_interface(client)
    except ValueError as error:
        raise HookError(f"cannot write {options.output}: {error}") from error
    write_whole(options.output, text)
    print(options.output)
    return 0
