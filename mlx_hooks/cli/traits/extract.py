"""``neuroscope traits extract``: vectors of a trait from its two files of prompts."""

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ...analysis.traits.experiment import Experiment, Trait, VectorFile
from ...analysis.traits.extraction import MAX_NEW_TOKENS, SPANS, Examples, layers_of, methods_of, without_direction
from ...analysis.traits.methods import NoDirection
from ...analysis.traits.prompts import Chat
from ...analysis.traits.vectors import METHODS, TraitVector, save_vectors
from ...errors import HookError
from .list_vectors import table
from .options import Failures, add_experiment, listed, report
from .selection import add_which_traits, which_traits

if TYPE_CHECKING:
    from ...analysis.identity import ModelIdentity
    from ...model import HookedModel


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "extract",
        help="make trait vectors of prompts with and without the trait",
        description="Make trait vectors of EXPERIMENT/TRAIT/extraction/positive.txt and negative.txt (or .json).",
    )
    add_experiment(parser)
    add_which_traits(parser)
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
    parser.add_argument("--skip-existing", action="store_true", help="skip vectors that are made of what is asked for")
    parser.add_argument("--overwrite", action="store_true", help="replace vectors that are made of something else")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ...analysis.identity import ModelIdentity
    from ...model import HookedModel

    experiment = Experiment(options.root, options.experiment)
    traits = which_traits(options, experiment)
    methods = methods_of(listed(options.methods))
    layers = _layers(options.layers)
    failed: Failures = []
    done: list[str] = []
    try:
        model = HookedModel.from_pretrained(options.model)
        wanted = [(layer, method) for layer in layers_of(model, layers) for method in methods]
        identity = ModelIdentity.of(model)
        for trait in traits:
            try:
                done += [trait.name] * _extract(trait, model, identity, wanted, options)
            except HookError as error:
                failed.append((trait.name, str(error)))
            except Exception as error:
                # Models are others' code, and what they raise is theirs too.
                failed.append((trait.name, f"{type(error).__name__}: {error}"))
    except KeyboardInterrupt:
        sys.stderr.write(f"neuroscope: interrupted; vectors were written of {', '.join(done) or 'no trait'}\n")
        return 130
    print(f"{len(done)} done, {len(traits) - len(done) - len(failed)} skipped, {len(failed)} failed")
    return report(failed)


def _layers(text: str) -> list[int] | None:
    if text.strip() == "all":
        return None
    try:
        return [int(layer) for layer in listed(text)]
    except ValueError:
        raise HookError(f"--layers is all, or numbers with commas between them, got {text!r}.") from None


def _extract(
    trait: Trait,
    model: "HookedModel",
    identity: "ModelIdentity",
    wanted: list[tuple[int, str]],
    options: argparse.Namespace,
) -> bool:
    """Write a trait's vectors; answers whether there was anything to do."""
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
    there = {(file.layer, file.method): file for file in trait.vectors()}
    due = [each for each in wanted if each not in there or _is_due(there[each], examples, identity, options)]
    if not due:
        print(f"{trait.name}: all vectors are there")
        return False
    try:
        vectors = examples.vectors(model, trait.name, due, identity=identity, progress=sys.stderr.isatty())
    except NoDirection:
        if len(due) == len(wanted):
            raise
        # The others are there already.
        print(f"{trait.name}: {without_direction(due, [])}")
        return False
    save_vectors(vectors, trait.vectors_folder)
    told = vectors[0].metadata
    print(
        f"{trait.name}: {told['n_positive']} positive and {told['n_negative']} negative prompts, "
        f"{told['n_held_out_positive']} and {told['n_held_out_negative']} held out; span {told['span']}"
    )
    print(table(vectors))
    if missing := without_direction(due, vectors):
        print(f"  {missing}")
    return True


def _chat(trait: Trait, asked: bool | None) -> Chat:
    if asked is False:
        return Chat(use=False)
    return trait.chat if asked is None else replace(trait.chat, use=True)


def _is_due(file: VectorFile, examples: Examples, identity: "ModelIdentity", options: argparse.Namespace) -> bool:
    """Whether a vector that is there is made again.

    Raises:
        HookError: it is made of something else, and nobody said that it may be replaced.
    """
    try:
        other = _other(TraitVector.load(file.path), examples, identity)
    except HookError as error:
        other = f"cannot be used ({str(error).rstrip('.')})"
    if other is not None and not options.overwrite:
        raise HookError(f"{file.path} {other}. It is replaced only with --overwrite.")
    return other is not None or not options.skip_existing


def _other(vector: TraitVector, examples: Examples, identity: "ModelIdentity") -> str | None:
    """How a vector was made of something else, as the end of a sentence."""
    difference = None if vector.identity is None else vector.identity.difference(identity)
    if difference is not None:
        return f"is of another model: {difference}"
    if vector.metadata.get("prompts") != examples.digest:
        return f"is made of other prompts, or otherwise (its span is {vector.metadata.get('span')})"
    return None
