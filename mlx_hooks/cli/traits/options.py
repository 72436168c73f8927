"""What commands of traits have in common: where the experiment is, which model, which prompts, how tokens are drawn."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import HookError

if TYPE_CHECKING:
    from ...analysis.traits.experiment import Experiment
    from ...analysis.traits.vectors import TraitVector
    from ...model import HookedModel

Failures = list[tuple[str, str]]
"""What failed, and why."""


def report(failed: Failures) -> int:
    """Say what failed, a line each; answers the exit status."""
    for what, error in failed:
        sys.stderr.write(f"neuroscope: {what}: {error}\n")
    return 1 if failed else 0


def interrupted() -> int:
    """Say that a run was broken off before anything was written; answers the exit status."""
    sys.stderr.write("neuroscope: interrupted; nothing was written\n")
    return 130


def add_experiment(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experiment", required=True, metavar="NAME", help="folder of traits below --root")
    parser.add_argument(
        "--root", type=Path, default=Path("experiments"), metavar="FOLDER",
        help="where experiments are (default: experiments)",
    )  # fmt: skip


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="name or folder (default: the one that vectors were made of)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, default=50, metavar="N", help="most tokens to generate (default: 50)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (default: 0.7)")
    parser.add_argument("--top-p", type=float, default=0.9, help="draw among the likeliest of this sum (default: 0.9)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: 0)")


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_p", "seed")}


def add_prompts(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompts", nargs="+", metavar="TEXT", help="texts, each in quotes")
    prompts.add_argument(
        "--prompts-file", "--prompts_file", type=Path, metavar="FILE",
        help="one text per line, or a JSON list (default: inference_prompts.txt of the experiment)",
    )  # fmt: skip


def prompts_of(options: argparse.Namespace, experiment: "Experiment") -> list[str]:
    """The prompts that were asked for, else those that the experiment's traits share.

    Raises:
        HookError: there are none, or they cannot be read.
    """
    from ...analysis.traits.experiment import INFERENCE_PROMPTS
    from ...analysis.traits.prompts import read_prompts

    if options.prompts is not None:
        return list(options.prompts)
    if options.prompts_file is not None:
        return read_prompts(options.prompts_file)
    shared = experiment.folder / INFERENCE_PROMPTS
    if not shared.exists():
        raise HookError(
            f"There is no file {shared}, which is read where neither --prompts nor --prompts-file is given."
        )
    return experiment.inference_prompts()


def listed(text: str) -> list[str]:
    """The parts of a list with commas.

    >>> listed("probe, ica")
    ['probe', 'ica']
    """
    return [part.strip() for part in text.split(",") if part.strip()]


def load_model(options: argparse.Namespace, vectors: Sequence["TraitVector"]) -> "HookedModel":
    """The model that was asked for, else the one that the vectors were made of."""
    from ...analysis.traits.batch import model_named_by
    from ...model import HookedModel

    if options.model is not None:
        return HookedModel.from_pretrained(options.model)
    name = model_named_by(vectors)
    try:
        return HookedModel.from_pretrained(name)
    except HookError as error:
        raise HookError(f"The vectors name {name}, and --model may name another: {error}") from error


def add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--png", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that needs nothing else")


def inputs_of(options: argparse.Namespace, experiment: "Experiment", vectors: Sequence["TraitVector"]) -> list[Path]:
    """The files that a command reads of an experiment and its model, with all that the experiment's vectors come of."""
    from ...analysis.traits.experiment import INFERENCE_PROMPTS
    from ..output import model_files

    models = [options.model] if options.model else [vector.metadata.get("model") for vector in vectors]
    patterns = ("*/trait.json", "*/chat_template.jinja", "*/extraction/*", "*/extraction/vectors/*")
    return [
        experiment.folder / INFERENCE_PROMPTS,
        *(path for pattern in patterns for path in experiment.folder.glob(pattern)),
        *(path for name in {str(name) for name in models if name} for path in model_files(name)),
    ]


def captures_of(experiment: "Experiment") -> list[Path]:
    """The files of an experiment's captures, and the places of their JSON."""
    from ...analysis.traits.batch import LAYER_FOLDER, LAYERS_FOLDER

    folders = [path for name in (LAYERS_FOLDER, LAYER_FOLDER) for path in experiment.folder.glob(f"*/{name}")]
    # JSON may have outlived its capture, and be all that is left of it.
    left = [path for folder in folders for path in folder.glob("*.json")]
    return left + [path for folder in folders for path in captures_in(folder)]


def captures_in(folder: Path) -> list[Path]:
    """The files in a folder that may be captures, and the places of their JSON."""
    from ...analysis.traits.records import json_path

    return [place for path in folder.glob("*.safetensors") for place in (path, json_path(path))]


def check_outputs(
    options: argparse.Namespace, inputs: Sequence[Path], captures: Sequence[Path], **others: Path | None
) -> None:
    """Say before the run what could not be drawn or written, and what would destroy a capture or another file of the
    command.

    Args:
        captures: files of captures, and the places of their JSON.
        others: files that it writes besides the pictures, by option.
    """
    from ...analysis.pictures import check_picture
    from ..output import check_targets

    asked = {**others, "html": options.html, "png": options.png}
    check_targets({f"--{name}": path for name, path in asked.items()}, inputs, captures)
    if options.png is not None:
        check_picture(0, 1)
        for path in filter(None, (*inputs, *others.values(), options.html)):
            if _is_numbered(path, options.png):
                raise HookError(f"--png {options.png} may come to {path}, which is another file of this command.")
        for path in captures:
            if _is_numbered(path, options.png):
                raise HookError(f"--png {options.png} may come to {path}, which is a capture's.")


def write_pictures(options: argparse.Namespace, title: str, charts: Sequence[Any], about: str = "") -> Failures:
    """Write the page, and a picture for each chart: of several, the n-th is ``name-n.png``. Answers what failed."""
    from ...analysis.traits.plots import page_of
    from ..output import write_whole

    failed: Failures = []

    def attempt(target: Path, make: Callable[[], str | bytes]) -> None:
        try:
            write_whole(target, make())
        except HookError as error:
            failed.append(("drawing", str(error)))
        else:
            print(f"Written: {target}")

    if options.html is not None:
        attempt(options.html, lambda: page_of(title, charts, about))
    if options.png is not None:
        png = options.png
        for i, chart in enumerate(charts):
            attempt(png if len(charts) == 1 else png.with_name(f"{png.stem}-{i}{png.suffix}"), chart.png)
    return failed


def _is_numbered(path: Path, png: Path) -> bool:
    """Whether a path is what one of several pictures may be called."""
    pattern = rf"{re.escape(png.stem)}-\d+{re.escape(png.suffix)}"
    return re.fullmatch(pattern, path.name) is not None and path.resolve().parent == png.resolve().parent
