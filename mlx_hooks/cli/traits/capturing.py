"""What ``capture-layers`` and ``capture-layer`` have in common: their options, and a batch that is run and told of."""

import argparse
import sys
from typing import Any

from .options import add_experiment, add_model, add_prompts, add_sampling, prompts_of, sampling_of
from .selection import add_which_traits, which_traits

MUCH = 1_000_000_000
"""Bytes of attention weights that are told of."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of both commands."""
    from ...analysis.traits.records import ALIGNMENTS, PREFIX
    from ...analysis.traits.vectors import GIVEN, METHODS

    add_experiment(parser)
    add_which_traits(parser)
    add_prompts(parser)
    add_model(parser)
    parser.add_argument(
        "--method", choices=(*METHODS, GIVEN), help=f"default: the first there is of {', '.join(METHODS)}"
    )
    add_sampling(parser)
    parser.add_argument(
        "--alignment",
        choices=ALIGNMENTS,
        default="at",
        help="rows of the response are of the state at a token, or of the one that predicts it (default: at)",
    )
    parser.add_argument(
        "--prefix", default=PREFIX, metavar="NAME", help=f"files are NAME_0.safetensors and so on (default: {PREFIX})"
    )
    parser.add_argument("--save-json", action="store_true", help="write JSON beside each file too")
    parser.add_argument("--skip-existing", action="store_true", help="skip files that hold what is asked for")
    parser.add_argument("--overwrite", action="store_true", help="replace files that hold something else")


def run_batch(options: argparse.Namespace, **chosen: Any) -> int:
    """Capture what the options say, show what became of it, and answer the exit status."""
    from ... import Experiment, HookedModel
    from ...analysis.traits.batch import CaptureBatch

    experiment = Experiment(options.root, options.experiment)
    traits = which_traits(options, experiment)
    batch = CaptureBatch(
        traits,
        prompts_of(options, experiment),
        prefix=options.prefix,
        method=options.method,
        save_json=options.save_json,
        skip_existing=options.skip_existing,
        overwrite=options.overwrite,
        alignment=options.alignment,
        **sampling_of(options),
        **chosen,
    )
    interrupted = False
    try:
        if batch.is_ready:
            model = HookedModel.from_pretrained(options.model or batch.model_name())
            _tell_size(batch.attention_bytes(model), of_all_layers=batch.captured_layer is None)
            batch.run(model, progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        interrupted = True
    print(batch.summary())
    if interrupted:
        sys.stderr.write("neuroscope: interrupted; the files that were written are whole\n")
        return 130
    return 1 if batch.has_failed else 0


def _tell_size(size: int, *, of_all_layers: bool) -> None:
    """Say before the run that attention weights will take much of the disk."""
    if size > MUCH:
        hint = "; --no-attention leaves them out" if of_all_layers else ""
        sys.stderr.write(f"neuroscope: attention weights will take up to {size / 1e9:.1f} GB{hint}\n")
