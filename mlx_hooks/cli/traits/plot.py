"""``neuroscope traits plot``: draw what the other commands wrote."""

import argparse
from pathlib import Path
from typing import Any

from ...errors import HookError
from .options import add_pictures, captures_in, check_outputs, report, write_pictures


def add(commands: Any) -> None:
    from ...analysis.traits.capture import SUBLAYERS

    parser = commands.add_parser(
        "plot",
        help="draw dynamics, steering or a capture of all layers",
        description="Draw what the other commands wrote: dynamics and steering (JSON), captures of all layers "
        "(safetensors, or their JSON). What a file holds is seen from its content.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the file to draw")
    parser.add_argument(
        "--sublayer", choices=SUBLAYERS, default="residual_out", help="of a capture: where (default: residual_out)"
    )
    parser.add_argument("--per-layer", action="store_true", help="of a capture: each layer's colours on its own scale")
    add_pictures(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ...analysis.traits.plots.files import charts_of

    if options.png is None and options.html is None:
        raise HookError("Say what to write: --png FILE, --html FILE or both.")
    check_outputs(options, [options.file], captures_in(options.file.parent))
    charts = charts_of(options.file, sublayer=options.sublayer, per_layer=options.per_layer)
    return report(write_pictures(options, options.file.stem, charts))
