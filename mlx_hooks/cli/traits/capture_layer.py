"""``neuroscope traits capture-layer``: everything inside one layer, and what of it lies along a trait."""

import argparse
from typing import Any

from .capturing import add_options, run_batch


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "capture-layer",
        help="capture everything inside one layer, token by token",
        description="Capture queries, keys, values, attention per head, hidden neurons and residual stream of a layer.",
    )
    add_options(parser)
    parser.add_argument("--layer", type=int, required=True, metavar="N", help="the layer to capture, from 0")
    parser.add_argument(
        "--vector-layer", type=int, metavar="N", help="the layer whose vector is taken (default: the best one)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    return run_batch(options, captured_layer=options.layer, vector_layer=options.vector_layer)
