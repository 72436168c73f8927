"""``neuroscope traits extract``: vectors of a trait from its two files of prompts."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...analysis.traits.experiment import ROOT, Experiment, Trait
from ...analysis.traits.extraction import MAX_NEW_TOKENS, SPANS, Examples, layers_of, methods_of
from ...analysis.traits.prompts import Chat
from ...analysis.traits.vectors import METHODS, TraitVector
from ...errors import HookError
from .list_vectors import table

if TYPE_CHECKING:
    from ...analysis.identity import ModelIdentity
    from ...model import HookedModel


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "extract",
        help="make trait vectors of prompts with and without the trait",
        description="Make trait vectors of EXPERIMENT/TRAIT/extraction/positive.txt and negative.txt (or .json).",
    )
    parser.add_argument("--experiment", required=True, metavar="NAME", help="the folder of traits")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--trait", metavar="NAME", help="one trait of it")
    which.add_argument("--all-traits", action="store_true", help="every trait of it")
    parser.add_argument("--model", required=True, help="name or folder, or neuroscope-tiny")
    parser.add_argument("--layers", default="all", metavar="0,3", help="whose output is taken (default: all)")
    parser.add_argument("--methods", default=",".join(METHODS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--span", help=f"{SPANS} (default: that of trait.json, else last)")
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="of the prompts, to judge by, unless the trait has held_out_positive and _negative (default: %(default)s)",
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put prompts through the chat template (default: as trait.json says, else if there is one)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help="of a response, for the span response (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and of methods that draw (default: 0)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--skip-existing", action="store_true", help="keep vectors that are there")
    existing.add_argument("--overwrite", action="store_true", help="replace vectors of other prompts or models")
    parser.add_argument(
        "--root", type=Path, default=ROOT, metavar="FOLDER", help="of experiments (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ...analysis.identity import ModelIdentity
    from ...model import HookedModel

    experiment = Experiment(options.root, options.experiment)
    traits = experiment.traits() if options.all_traits else [experiment.trait(options.trait)]
    if not traits:
        raise HookError(
            f"The experiment {experiment.name} has no traits: a trait is a folder with an extraction folder."
        )
    methods = methods_of([method.strip() for method in options.methods.split(",")])
    layers = _layers(options.layers)
    model = HookedModel.from_pretrained(options.model)
    wanted = [(layer, method) for layer in layers_of(model, layers) for method in methods]
    identity = ModelIdentity.of(model)
    counts = dict.fromkeys(("done", "skipped", "failed"), 0)
    for trait in traits:
        try:
            counts[_extract(trait, model, identity, wanted, options)] += 1
        except HookError as error:
            counts["failed"] += 1
            sys.stderr.write(f"neuroscope: {trait.name}: {error}\n")
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    return 1 if counts["failed"] else 0


def _layers(text: str) -> list[int] | None:
    if text.strip() == "all":
        return None
    try:
        return [int(layer) for layer in text.split(",")]
    except ValueError:
        raise HookError(f"--layers is all, or numbers with commas between them, got {text!r}.") from None


def _extract(
    trait: Trait,
    model: "HookedModel",
    identity: "ModelIdentity",
    wanted: list[tuple[int, str]],
    options: argparse.Namespace,
) -> str:
    """Write a trait's vectors; answers whether that was "done" or "skipped"."""
    there = {(file.layer, file.method): file.path for file in trait.vectors()}
    if options.skip_existing:
        wanted = [each for each in wanted if each not in there]
        if not wanted:
            print(f"{trait.name}: all vectors are there")
            return "skipped"
    examples = Examples.of(
        model,
        trait.prompts("positive"),
        trait.prompts("negative"),
        span=options.span or trait.settings.span or "last",
        held_out=trait.held_out() or options.held_out,
        chat=_chat(trait, options.chat),
        max_new_tokens=options.max_tokens,
        seed=options.seed,
    )
    if not options.overwrite:
        for path in filter(None, map(there.get, wanted)):
            _check_same(TraitVector.load(path), examples, identity)
    vectors = examples.vectors(model, trait.name, wanted, identity=identity, progress=True)
    for vector in vectors:
        vector.save(trait.vectors_folder)
    told = vectors[0].metadata
    print(
        f"{trait.name}: {told['n_positive']} positive and {told['n_negative']} negative prompts, "
        f"{told['n_held_out_positive']} and {told['n_held_out_negative']} held out; span {told['span']}"
    )
    print(table(vectors))
    return "done"


def _chat(trait: Trait, asked: bool | None) -> Chat:
    if asked is False:
        return Chat(use=False)
    return trait.chat if asked is None else replace(trait.chat, use=True)


def _check_same(vector: TraitVector, examples: Examples, identity: "ModelIdentity") -> None:
    """Raise HookError for a vector that was made otherwise, which nobody said is to be replaced."""
    why = None if vector.identity is None else vector.identity.difference(identity)
    if why is not None:
        why = f"of another model: {why}"
    elif vector.metadata.get("prompts") != examples.digest:
        why = f"made of other prompts, or otherwise (its span is {vector.metadata.get('span')})"
    if why is not None:
        raise HookError(f"{vector.path} is {why}. --overwrite replaces it, --skip-existing keeps it.")
