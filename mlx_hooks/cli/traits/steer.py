"""``neuroscope traits steer``: add a trait's vector with several coefficients, and see text and scores move."""

import argparse
import json
from pathlib import Path
from typing import Any

from ...analysis.spelling import in_columns, one_line
from ...errors import HookError
from ..output import write_whole
from .options import (
    add_experiment,
    add_model,
    add_pictures,
    add_sampling,
    captures_of,
    check_outputs,
    inputs_of,
    interrupted,
    listed,
    load_model,
    report,
    sampling_of,
    write_pictures,
)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "steer",
        help="add a trait's vector to the stream, and see its score move",
        description="Answer a prompt several times, each time with a multiple of a trait's vector added to the "
        "residual stream; show the scores of the words that come, and of the same words under each coefficient.",
    )
    add_experiment(parser)
    parser.add_argument("--trait", required=True, action="append", metavar="NAME", help="whose vector is added")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what the model answers")
    parser.add_argument(
        "--coefficients", required=True, metavar="A,B", help="such as --coefficients=-4,0,4; 0 is run in any case"
    )
    parser.add_argument("--method", metavar="NAME", help="which vector (default: as in the other commands)")
    parser.add_argument("--layer", type=int, metavar="N", help="the vector of this layer (default: the trait's best)")
    parser.add_argument("--at-layer", type=int, metavar="N", help="where it is added (default: its own layer)")
    parser.add_argument("--measure", metavar="A,B", help="traits that are measured (default: the one that is added)")
    parser.add_argument("--phase", choices=("prefill", "decode"), help="add it to the prompt, or to what is generated")
    add_model(parser)
    add_sampling(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    add_pictures(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ...analysis.traits.experiment import Experiment
    from ...analysis.traits.plots import SteeringChart
    from ...analysis.traits.steering import steer

    coefficients = _numbers(options.coefficients)
    if len(options.trait) > 1:
        raise HookError("One trait's vector is added: give --trait once, and --measure A,B for what is measured.")
    (trait,) = options.trait
    experiment = Experiment(options.root, options.experiment)
    vector = experiment.trait(trait).find(method=options.method, layer=options.layer)
    names = None if options.measure is None else listed(options.measure)
    measured = None if names is None else [experiment.trait(name).find() for name in names]
    vectors = [vector, *(measured or [])]
    check_outputs(options, inputs_of(options, experiment, vectors), captures_of(experiment), json=options.json)
    model = load_model(options, vectors)
    place = {"layer": options.at_layer, "measured": measured, "phase": options.phase}
    try:
        found = steer(model, options.prompt, vector, coefficients, **place, **sampling_of(options))
    except KeyboardInterrupt:
        return interrupted()
    plain = found.to_dict()
    print(_shown(plain))
    if options.json is not None:
        write_whole(options.json, json.dumps(plain, indent=1, allow_nan=False, ensure_ascii=False))
        print(f"Written: {options.json}")
    charts = [SteeringChart.of(plain, i) for i in range(len(found.baseline.measured))]
    return report(write_pictures(options, f"Steering by {trait}", charts))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in listed(text)]
    except ValueError:
        raise HookError(f"--coefficients are numbers with commas between them, got {text!r}.") from None


def _shown(plain: dict[str, Any]) -> str:
    """A table of scores for each measured trait, and the texts, by growing coefficient."""
    about, runs = plain["metadata"], sorted(plain["runs"], key=lambda run: float(run["coefficient"]))
    where = f"{about['trait']} ({about['method']}, layer {about['vector_layer']}), |v| {about['norm']:.4g}"
    lines = [f"> {one_line(plain['prompt']['text'])}", f"  adding {where} at layer {about['layer']}"]
    for i, one in enumerate(runs[0]["measured"]):
        rows = [["coefficient", "mean score", "shift", "on the same words"]]
        for run in runs:
            found = run["measured"][i]
            figures = (run["coefficient"], found["mean_score"], found["shift"], found["forced_shift"])
            rows.append([f"{figure:.4g}" for figure in figures])
        lines += ["", f"  {one['trait']} ({one['method']}, layer {one['layer']})"]
        lines += [f"    {line}" for line in in_columns(rows)]
    lines.append("")
    lines += [f"  {run['coefficient']:g}: {one_line(run['text'], 300)}" for run in runs]
    return "\n".join(lines)
