"""``neuroscope lens``: what a model would predict after each layer, at every position of a prompt."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import HookError
from .output import check_targets, model_files, write_whole


def add(commands: Any) -> None:
    parser = commands.add_parser("lens", help="show what a model would predict after each layer")
    parser.add_argument("model", help="name or folder, or neuroscope-tiny")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the model reads")
    parser.add_argument("--component", default="resid_post", metavar="NAME", help="what is read (default: resid_post)")
    parser.add_argument(
        "--norm", choices=("own", "final"), default="own", help="the last norm's statistics (default: own)"
    )
    parser.add_argument("--top-k", type=int, default=5, metavar="N", help="tokens per cell in files (default: 5)")
    parser.add_argument("--tuned", type=Path, metavar="FILE", help="a tuned lens that was trained for this model")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a heatmap")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a picture of it (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="show the table as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from .. import HookedModel, LogitLens, TunedLens
    from ..analysis.lens_table import LensTable, check_picture
    from ..analysis.traits.prompts import Chat, render

    if not options.prompt:
        raise HookError("--prompt is a text that is not empty.")
    read = [*model_files(options.model), *filter(None, [options.tuned])]
    check_targets({"--html": options.html, "--png": options.png}, read)
    model = HookedModel.from_pretrained(options.model)
    tokens = render(model, options.prompt, Chat(use=False))
    if options.png is not None:
        check_picture(len(tokens))
    tuned = None if options.tuned is None else TunedLens.load(options.tuned, model)
    asked = {"component": options.component, "norm": options.norm, "top_k": options.top_k}
    table = LensTable.of(LogitLens(model), tokens, tuned=tuned, **asked)
    if options.json:
        print(json.dumps(table.to_dict(), indent=2, ensure_ascii=False))
    else:
        print(table.text(shutil.get_terminal_size().columns))
    if options.html is not None:
        write_whole(options.html, table.html())
    if options.png is not None:
        write_whole(options.png, table.png())
    return 0
