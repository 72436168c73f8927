"""``neuroscope circuits``: the circuit of a task, found and written; and how well known circuits are found."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import HookError
from .output import check_targets, model_files, write_whole

METHODS = ("eap-ig", "eap", "exact", "acdc")
SHOWN = 20


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "circuits",
        help="find the edges of a model that a task needs, or show how well known circuits are found",
        description="Find the edges of a model that a task needs, judge them, and write them.",
    )
    parser.add_argument("model", nargs="?", help="name or folder, or neuroscope-tiny")
    parser.add_argument(
        "prompts", nargs="?", type=Path, metavar="PROMPTS.json",
        help='a list of {"clean", "corrupted", "answer", "wrong"}; the last three as far as there are any',
    )  # fmt: skip
    parser.add_argument("--method", choices=METHODS, help=f"what scores the edges (default: {METHODS[0]})")
    parser.add_argument("--metric", metavar="NAME", help="such as logit_difference (default: by what the prompts have)")
    parser.add_argument(
        "--ablation", metavar="NAME", help="what an ablated edge carries: corrupted, resample, mean, zero"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="gradients of eap-ig (default: 5)")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--faithfulness", type=float, metavar="SHARE", help="the fewest edges that reach it (default: 0.9)"
    )
    size.add_argument("--edges", type=int, metavar="N", help="the strongest so many")
    size.add_argument("--threshold", type=float, metavar="SCORE", help="those that score so much; needed by acdc")
    parser.add_argument(
        "--judge", type=Path, metavar="FILE", help="prompts that it is judged by (default: the same ones)"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the circuit, as JSON")
    parser.add_argument("--graphml", type=Path, metavar="FILE", help="write it as GraphML")
    parser.add_argument(
        "--neuronpedia", type=Path, metavar="FILE", help="write it, on the first prompt, as its graph JSON"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw it: .png (needs matplotlib), or .dot for graphviz"
    )
    parser.add_argument("--json", action="store_true", help="show the result as JSON")
    parser.add_argument("--known", action="store_true", help="find the circuits of models whose circuit is known")
    parser.add_argument(
        "--write", type=Path, metavar="FILE",
        help="with --known: write the table to this page, all else of which stays (default: show it)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    try:
        return _known(options) if options.known else _find(options)
    except KeyboardInterrupt:
        sys.stderr.write("neuroscope: interrupted; nothing was written\n")
        return 130


def _known(options: argparse.Namespace) -> int:
    from ..analysis.circuits import known_table

    asked = {name: getattr(options, name) for name in ("model", "prompts", *_OF_FINDING)}
    given = [name for name, value in asked.items() if value is not None and value is not False]
    if given:
        name = given[0] if given[0] in ("model", "prompts") else f"--{given[0]}"
        raise HookError(f"--known measures models and prompts of its own in one way: leave out {name}.")
    check_targets({"--write": options.write})
    # Before the measuring: a page that cannot be read is told at once.
    _page(options.write)
    found: list[Any] = []
    planned = known_table.planned()
    with _shown("Measuring") as progress:
        for survey in known_table.surveys():
            found.append(survey)
            progress(len(found), len(planned))
            if options.write is not None:
                print(f"{survey.name}, {survey.ablation}: {_aucs(survey)}", flush=True)
    text = known_table.document(found)
    if options.write is None:
        print(text, end="")
    else:
        # Once more: it may have been edited meanwhile.
        write_whole(options.write, known_table.placed(text, _page(options.write)))
    return 0


def _page(path: Path | None) -> str:
    """What a page says, with the ends of lines that it has; nothing where there is none."""
    from ..storage.files import reading

    if path is None or not path.exists():
        return ""
    with reading(path, "page in UTF-8"):
        return path.read_bytes().decode("utf-8")


def _aucs(survey: Any) -> str:
    return ", ".join(f"{row.method} {row.auc:.3f}" for row in survey.rows)


_FILES = ("save", "graphml", "neuronpedia", "picture")
_OF_FINDING = (
    "method", "metric", "ablation", "steps", "faithfulness", "edges", "threshold", "judge", "json", *_FILES
)  # fmt: skip


def _find(options: argparse.Namespace) -> int:
    from .. import HookedModel
    from ..analysis.circuits.edge_runs import EdgeRuns
    from ..analysis.circuits.finding import FindOptions, find_circuit
    from ..analysis.circuits.validation import validate_circuit
    from ..analysis.eval_data import eval_data_of

    _check(options)
    asked = FindOptions(**_limits(options))
    read = [options.prompts, *([] if options.judge is None else [options.judge])]
    prompts, judging = _prompts(read[0]), _prompts(read[-1])
    if options.neuronpedia is not None and not (isinstance(prompts[0], dict) and "answer" in prompts[0]):
        raise HookError("--neuronpedia draws the first prompt's answer: give prompts with answers.")
    check_targets({f"--{name}": getattr(options, name) for name in _FILES}, [*model_files(options.model), *read])
    model = HookedModel.from_pretrained(options.model)
    given = {name: getattr(options, name) for name in ("metric", "ablation")}
    with _about(read[0]):
        data = eval_data_of(model, prompts)
    judge = runs = EdgeRuns(model, data, **given)
    if options.judge is not None:
        # Before the search, which may take hours.
        with _about(options.judge):
            other = eval_data_of(model, judging)
            judge = EdgeRuns(model, other, ablation=runs.ablation, metric=runs.metric)
    with _shown("Searching") as progress:
        circuit = find_circuit(runs, options=asked, progress=progress)
    with _shown("Judging") as progress:
        found = validate_circuit(judge, circuit, progress=progress)
    if options.json:
        print(json.dumps({"circuit": circuit.to_dict(), "validation": found.to_dict()}, indent=2, ensure_ascii=False))
    else:
        _show(circuit, found)
    _write(options, circuit, model, prompts)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Say before the model is loaded what would fail after it."""
    if options.model is None or options.prompts is None:
        raise HookError("Give a model and a file of prompts, or --known for models whose circuit is known.")
    if options.write is not None:
        raise HookError("--write is where --known writes its table; a circuit is written by --save.")
    if options.steps is not None and options.method not in (None, "eap-ig"):
        raise HookError(f"--steps is of eap-ig; {options.method} takes none.")
    if options.edges is not None and options.edges < 1:
        raise HookError(f"--edges is a whole number from 1 on, got {options.edges}.")
    if options.picture is not None:
        from ..analysis.circuits.drawing import check_drawable

        check_drawable(options.picture)


@contextmanager
def _about(path: Path) -> Iterator[None]:
    """Errors say which file they are about."""
    try:
        yield
    except HookError as error:
        raise HookError(f"{path}: {error}", field=error.field) from error


def _prompts(path: Path) -> list[Mapping[str, Any]]:
    from ..storage.files import reading

    with reading(path, "list of prompts"):
        given = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(given, list) or not given or not all(isinstance(each, dict | str) for each in given):
        raise HookError(
            f'{path} is no list of prompts: [{{"clean": ..., "corrupted": ..., "answer": ..., "wrong": ...}}].'
        )
    return given


def _limits(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked of the search, by the names of its options."""
    named = {name: getattr(options, name) for name in ("method", "steps", "threshold", "faithfulness")}
    return {name: value for name, value in (named | {"n": options.edges}).items() if value is not None}


@contextmanager
def _shown(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, for as long as the block takes."""
    from tqdm import tqdm

    with tqdm(desc=what, leave=False, disable=not sys.stderr.isatty()) as bar:

        def advance(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        yield advance


def _show(circuit: Any, found: Any) -> None:
    judged = {"faithfulness": found.faithfulness, "completeness": found.completeness}
    print(f"{found.n_edges} of {found.edges_of_model} edges, {len(circuit.nodes)} nodes: {', '.join(circuit.nodes)}")
    for name, estimate in judged.items():
        ends = "" if estimate.low is None else f"  ({estimate.low:.3f} to {estimate.high:.3f})"
        print(f"{name}  {'undefined' if estimate.mean is None else f'{estimate.mean:.3f}'}{ends}")
    if found.random_mean is not None:
        print(f"random circuits of as many edges  {found.random_mean:.3f}")
    print(f"\nThe strongest edges, by {circuit.metadata['method']}")
    for name in circuit.ranked()[:SHOWN]:
        print(f"  {name:24} {circuit.edges[name]:9.4g}")
    if len(circuit) > SHOWN:
        print(f"  and {len(circuit) - SHOWN} more")
    for note in found.notes:
        print(note)


def _write(options: argparse.Namespace, circuit: Any, model: Any, prompts: Any) -> None:
    from ..analysis.circuits.drawing import save_picture
    from ..analysis.circuits.graphml import save_graphml
    from ..analysis.circuits.neuronpedia import save_neuronpedia, slug_of, to_neuronpedia

    writers = {
        "save": circuit.save,
        "graphml": lambda path: save_graphml(circuit, path),
        "neuronpedia": lambda path: save_neuronpedia(
            to_neuronpedia(circuit, model, prompts[0], slug=slug_of(path.stem)), path
        ),
        "picture": lambda path: save_picture(circuit, path),
    }
    for name, write in writers.items():
        path = getattr(options, name)
        if path is not None:
            write(path)
            # In JSON there is nothing but the result.
            if not options.json:
                print(f"Written: {path}")
