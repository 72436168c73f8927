"""``neuroscope traits``: directions of the residual stream, made, captured and followed token by token.

One module per command, as in the package above.
"""

import argparse
from typing import Any

from . import capture_layer, capture_layers, dynamics, extract, list_vectors, plot, steer, verify_format

COMMANDS: tuple[Any, ...] = (extract, list_vectors, capture_layers, capture_layer, verify_format, dynamics, steer, plot)


def add(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("traits", help="make trait vectors and follow traits")
    group = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(group)
