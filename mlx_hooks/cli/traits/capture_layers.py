"""``neuroscope traits capture-layers``: how far each token lies along a trait at every layer, and who attends whom."""

import argparse
from typing import Any

from .capturing import add_options, run_batch


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "capture-layers",
        help="capture traits at every layer, token by token",
        description="Capture how far each token of prompts and responses lies along traits, at every layer.",
    )
    add_options(parser)
    parser.add_argument(
        "--layer", type=int, metavar="N", help="the layer whose vector is taken (default: the best one)"
    )
    parser.add_argument(
        "--each-layer", action="store_true", help="measure each layer along the vector that was made there"
    )
    parser.add_argument("--no-attention", action="store_true", help="leave attention weights out")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    return run_batch(
        options, vector_layer=options.layer, each_layer=options.each_layer, attention=not options.no_attention
    )
