"""``neuroscope selftest``: the exactness report of a model."""

import argparse
import json
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser("selftest", help="prove on a model that what is captured is what was computed")
    parser.add_argument("model", help="name or folder, or neuroscope-tiny")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from .. import HookedModel

    report = HookedModel.from_pretrained(options.model).selftest()
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0 if report.passed else 1
