"""``neuroscope info``: a model's sizes and hook points."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("info", help="show a model's sizes and hook points")
    parser.add_argument("model", nargs="?", default="neuroscope-tiny", help="name or folder (default: neuroscope-tiny)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from .. import HookedModel

    print(HookedModel.from_pretrained(options.model))
    return 0
