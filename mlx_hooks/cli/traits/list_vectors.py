"""``neuroscope traits list``: an experiment's traits and vectors, and which of them is taken."""

import argparse
from collections.abc import Sequence
from typing import Any

from ...analysis.traits.experiment import Experiment, Trait
from ...analysis.traits.vectors import TraitVector
from ...errors import HookError
from .options import Failures, add_experiment, report


def add(commands: Any) -> None:
    parser = commands.add_parser("list", help="show an experiment's traits and vectors, and which of them is taken")
    add_experiment(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    experiment = Experiment(options.root, options.experiment)
    traits = experiment.traits()
    print(f"{experiment.folder}: {len(traits)} trait{'' if len(traits) == 1 else 's'}")
    failed: Failures = []
    for trait in traits:
        try:
            failed += _show(trait)
        except HookError as error:
            failed.append((trait.name, str(error)))
    return report(failed)


def table(vectors: Sequence[TraitVector]) -> str:
    """A row per vector: how it separates the prompts that it was made of, and those that were held out."""
    rows = ["  layer  method     accuracy  held-out  effect size        norm"]
    for vector in vectors:
        told = vector.metadata
        fitted, held_out = (_percent(told.get(name)) for name in ("accuracy", "held_out_accuracy"))
        effect = told.get("effect_size")
        effect = f"{effect:.2f}" if isinstance(effect, int | float) else "-"
        row = f"  {vector.layer:5}  {vector.method:9}  {fitted:>8}  {held_out:>8}  {effect:>11}  {vector.norm:10.4g}"
        rows.append(row + ("  not converged" if told.get("converged") is False else ""))
    return "\n".join(rows)


def _percent(share: Any) -> str:
    return f"{share:.1%}" if isinstance(share, int | float) else "-"


def _show(trait: Trait) -> Failures:
    """Print what a trait has; answers which of it cannot be read."""
    print(f"\n{trait.name} ({trait.display_name})")
    files = trait.vectors()
    if not files:
        print("  no vectors")
        return []
    vectors: list[TraitVector] = []
    failed: Failures = []
    for file in files:
        try:
            vectors.append(trait.read(file))
        except HookError as error:
            failed.append((trait.name, str(error)))
    print(table(vectors) if vectors else "  no vectors that can be read")
    if vectors:
        try:
            choice = trait.choose()
            print(f"  {choice.vector.name} is taken: {choice.why}")
        except HookError as error:
            print(f"  none is taken: {error}")
    return failed
