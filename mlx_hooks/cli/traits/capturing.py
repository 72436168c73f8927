"""What ``capture-layers`` and ``capture-layer`` have in common: their options, and a batch run and told of."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...analysis.traits.batch import CaptureBatch


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of both commands."""
    from ...analysis.traits.records import ALIGNMENTS
    from ...analysis.traits.vectors import METHODS

    parser.add_argument("--experiment", required=True, metavar="NAME", help="the experiment's folder")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--trait", metavar="NAME", help="one of its traits")
    which.add_argument("--all-traits", action="store_true", help="all of its traits")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="texts to capture")
    prompts.add_argument(
        "--prompts-file",
        "--prompts_file",
        type=Path,
        metavar="FILE",
        help="a .txt file with one per line, or a .json list (default: the experiment's inference_prompts.txt)",
    )
    parser.add_argument("--model", help="name or folder, or neuroscope-tiny (default: the one the vectors name)")
    parser.add_argument("--method", choices=METHODS, help=f"default: the first there is of {', '.join(METHODS)}")
    parser.add_argument("--max-tokens", type=int, default=50, metavar="N", help="most tokens to generate (default: 50)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    parser.add_argument("--top-p", type=float, default=0.9, help="draw among the likeliest (default: 0.9)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")
    parser.add_argument(
        "--alignment",
        choices=ALIGNMENTS,
        default="at",
        help="rows of the response are of the state at a token, or of the one that predicts it (default: at)",
    )
    parser.add_argument("--save-json", action="store_true", help="write JSON beside each file too")
    parser.add_argument("--skip-existing", action="store_true", help="skip files that hold what is asked for")
    parser.add_argument("--overwrite", action="store_true", help="replace files that hold something else")
    parser.add_argument(
        "--root", type=Path, default=Path("experiments"), help="where experiments lie (default: %(default)s)"
    )


def run_batch(options: argparse.Namespace, **chosen: Any) -> int:
    """Capture what the options say, show what became of it, and answer the exit status."""
    from ... import Experiment, HookedModel
    from ...analysis.traits.batch import CaptureBatch
    from ...analysis.traits.prompts import read_prompts

    experiment = Experiment(options.root, options.experiment)
    traits = experiment.traits() if options.all_traits else [experiment.trait(options.trait)]
    if options.prompts is not None:
        prompts = options.prompts
    elif options.prompts_file is not None:
        prompts = read_prompts(options.prompts_file)
    else:
        prompts = experiment.inference_prompts()
    batch = CaptureBatch(
        traits,
        prompts,
        method=options.method,
        save_json=options.save_json,
        skip_existing=options.skip_existing,
        overwrite=options.overwrite,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        alignment=options.alignment,
        **chosen,
    )
    try:
        if batch.is_ready:
            batch.run(HookedModel.from_pretrained(options.model or batch.model_name()))
    except KeyboardInterrupt:
        _tell(batch)
        sys.stderr.write("neuroscope: interrupted; the files that were written are whole\n")
        return 130
    _tell(batch)
    return 1 if batch.has_failed else 0


def _tell(batch: "CaptureBatch") -> None:
    print(batch.summary())
