"""``neuroscope traits dynamics``: how traits move, token by token, while a model answers."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...analysis.spelling import course, in_columns, one_line, shortened
from ...errors import HookError
from ...storage.files import try_file, writing
from ..output import write_whole
from .options import (
    Failures,
    add_experiment,
    add_model,
    add_pictures,
    add_prompts,
    add_sampling,
    captures_of,
    check_outputs,
    inputs_of,
    interrupted,
    listed,
    load_model,
    prompts_of,
    report,
    sampling_of,
    write_pictures,
)

if TYPE_CHECKING:
    from ...analysis.traits.experiment import Experiment
    from ...analysis.traits.vectors import TraitVector


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "dynamics",
        help="follow traits while the model answers: commitment point, velocity, persistence",
        description="Follow traits while the model answers, each at its own layer: scores, commitment point, velocity, "
        "acceleration, peak and persistence.",
    )
    add_experiment(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--traits", metavar="A,B", help="only these (default: all of the experiment)")
    which.add_argument("--all-traits", action="store_true", help="all of the experiment, which is the default")
    parser.add_argument(
        "--methods", metavar="A,B", help="all of these (default: the trait's own, else the first that there is)"
    )
    parser.add_argument("--layer", type=int, metavar="N", help="the vectors of this layer (default: the trait's best)")
    add_prompts(parser)
    add_model(parser)
    add_sampling(parser)
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="an acceleration below it is a commitment (default: 0.1)"
    )
    parser.add_argument("--relative", action="store_true", help="--threshold is a share of the largest acceleration")
    parser.add_argument("--stays-below", action="store_true", help="a commitment lasts until the end")
    parser.add_argument(
        "--tokens", choices=("response", "all"), default="response", help="follow the response, or prompt and response"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE",
        help="the JSON file (default: a new one in inference/dynamics of the experiment)",
    )  # fmt: skip
    add_pictures(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ...analysis.traits.experiment import Experiment
    from ...analysis.traits.monitoring import Monitoring, monitor_dynamics
    from ...analysis.traits.plots import ScoreChart

    names = ("tokens", "threshold", "relative", "stays_below")
    settings = {**sampling_of(options), **{name: getattr(options, name) for name in names}}
    Monitoring(**settings)
    experiment = Experiment(options.root, options.experiment)
    prompts = prompts_of(options, experiment)
    vectors, failed = _vectors(options, experiment)
    read = inputs_of(options, experiment, vectors)
    if options.prompts_file is not None:
        read.append(options.prompts_file)
    check_outputs(options, read, captures_of(experiment), output=options.output)
    target = _new_file(experiment.folder) if options.output is None else options.output
    results: Sequence[Mapping[str, Any]] = []
    if vectors:
        model = load_model(options, vectors)
        try:
            found = monitor_dynamics(
                model, prompts, vectors, errors="collect", progress=sys.stderr.isatty(), **settings
            )
        except KeyboardInterrupt:
            return interrupted()
        found["metadata"]["experiment"] = experiment.name
        failed += [(_who(one), one["error"]) for one in found["failed"]]
        found["failed"] = [{"what": what, "error": error} for what, error in failed]
        results = found["results"]
        for entry in results:
            print(f"{_shown(entry)}\n")
        if results:
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False))
            print(f"Written: {target}")
            charts = [ScoreChart.of(entry) for entry in results]
            about = f"{model.model_name}, temperature {options.temperature:g}, seed {options.seed}"
            failed += write_pictures(options, f"{experiment.name}: traits", charts, about)
        print(_summary(results, len(prompts)))
    n_done = sum(len(by_method) for entry in results for by_method in entry["traits"].values())
    print(f"{n_done} done, {len(failed)} failed")
    return report(failed)


def _vectors(options: argparse.Namespace, experiment: "Experiment") -> tuple[list["TraitVector"], Failures]:
    """The vectors that were asked for, and which of them there are not."""
    names = [trait.name for trait in experiment.traits()] if options.traits is None else listed(options.traits)
    if not names:
        raise HookError(f"There are no traits in {experiment.folder}.")
    methods: Sequence[str | None] = [None] if options.methods is None else listed(options.methods)
    found, failed = [], []
    for name in dict.fromkeys(names):
        for method in dict.fromkeys(methods):
            try:
                found.append(experiment.trait(name).find(method=method, layer=options.layer))
            except HookError as error:
                failed.append((name, str(error)))
    return found, failed


def _new_file(folder: Path) -> Path:
    """A file that nobody has: its name is the time, with digits of its own. It can be written; its folder may not be
    there yet.

    Raises:
        HookError: nothing can be written there.
    """
    from ...storage.metadata import run_id

    target = folder / "inference" / "dynamics" / f"{run_id(datetime.now(timezone.utc))}.json"
    there = next(parent for parent in target.parents if parent.exists())
    with writing(target):
        try_file(there / target.name)
    return target


def _summary(results: Sequence[Mapping[str, Any]], n_prompts: int) -> str:
    """What was done: prompts that got an answer, however many ways of putting them there were, and traits."""
    prompts = {entry["prompt_index"] for entry in results}
    traits = sorted({name for entry in results for name in entry["traits"]})
    return f"Done: {len(prompts)} of {n_prompts} prompts, traits {', '.join(traits) or 'none'}"


def _who(failed: Mapping[str, Any]) -> str:
    prompt = failed["prompt_index"]
    return f"{failed['trait']} ({failed['method']})" + ("" if prompt is None else f", prompt {prompt}")


_HEADS = ("trait", "vector", "committed at", "peak", "persistence", "in all", "fastest step", "mean step")


def _shown(entry: Mapping[str, Any]) -> str:
    """What happened on one prompt, as a table: a line per trait, and below it the course of its score."""
    prompt, response = entry["prompt"], entry["response"]
    rows, courses = [list(_HEADS)], [""]
    for name, by_method in entry["traits"].items():
        for method, found in by_method.items():
            all_tokens = found["dynamics"]["tokens"] == "all"
            parts = [prompt, response] if all_tokens else [response]
            scores = found["scores"]
            rows.append([name, *_figures(method, found, [token for part in parts for token in part["tokens"]])])
            courses.append(course([*(scores["prompt"] if all_tokens else []), *scores["response"]]))
    lines = [f"> {one_line(prompt['text'])}", f"  {one_line(response['text'])}"]
    for line, drawn in zip(in_columns(rows), courses, strict=True):
        lines += [f"  {line}"] + ([f"    {drawn}"] if drawn else [])
    return "\n".join(lines)


def _figures(method: str, found: Mapping[str, Any], tokens: Sequence[str]) -> list[str]:
    """The cells of one trait after its name."""
    dynamics = found["dynamics"]
    commitment, peak = dynamics["commitment_point"], dynamics["peak"]
    return [
        f"{method}, layer {found['layer']}",
        "never" if commitment is None else f"{commitment} {shortened(tokens[commitment], 12)}",
        "none" if peak is None else f"{peak['score']:.3g} at {peak['index']} {shortened(tokens[peak['index']], 12)}",
        *(str(dynamics[key]) for key in ("persistence", "persistence_total")),
        *("-" if dynamics[key] is None else f"{dynamics[key]:.3g}" for key in ("peak_velocity", "avg_velocity")),
    ]
