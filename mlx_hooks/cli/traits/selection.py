"""Which traits of an experiment a command is about: ``--trait``, as often as there are, or ``--all-traits``."""

import argparse
from typing import TYPE_CHECKING

from ...errors import HookError

if TYPE_CHECKING:
    from ...analysis.traits.experiment import Experiment, Trait


def add_which_traits(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--trait", action="append", metavar="NAME", help="one of its traits; may be given several times")
    which.add_argument("--all-traits", action="store_true", help="all of its traits")


def which_traits(options: argparse.Namespace, experiment: "Experiment") -> list["Trait"]:
    """The traits that the options name, each once.

    Raises:
        HookError: for a name that no trait has, and where there are none.
    """
    if not options.all_traits:
        return [experiment.trait(name) for name in dict.fromkeys(options.trait)]
    traits = experiment.traits()
    if not traits:
        raise HookError(
            f"The experiment {experiment.name} has no traits: a trait is a folder with an extraction folder."
        )
    return traits
