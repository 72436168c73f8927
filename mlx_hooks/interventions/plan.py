"""Interventions checked against a model, and ready for its runs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..activations import ActivationCache
from ..architectures import ModelConfig
from ..errors import HookError
from ..hook_points import HookPoint
from ..hooks import Hook, Run
from .edits import Edit
from .fitting import check_point, known_sizes
from .reach import Reach, due_positions
from .session import InterventionSession
from .sources import Supply, are_tokens, holds_tokens, means_over, supply_at
from .spec import Intervention, blame

Capture = Callable[[Any, list[HookPoint]], ActivationCache]
"""Runs the plain model on a prompt and answers what is at some hook points."""


class InterventionPlan:
    """Interventions checked against a model; ``HookedModel.resolve_interventions`` makes it.

    Args:
        asked: each intervention with the hook points that it means.
        cfg: the model's sizes.

    Raises:
        HookError: ``error.intervention`` is the index of the one at fault.
    """

    def __init__(self, asked: Sequence[tuple[Intervention, list[HookPoint]]], cfg: ModelConfig) -> None:
        self.asked = list(asked)
        self.cfg = cfg
        self._means: dict[tuple[int, str], Supply] = {}
        for i, (intervention, points) in enumerate(self.asked):
            with blame(i, intervention):
                for point in points:
                    check_point(intervention, point)

    def __len__(self) -> int:
        return len(self.asked)

    def prepare(self, capture: Capture) -> None:
        """Compute the means over prompts, once.

        Raises:
            HookError: a prompt that cannot be run.
        """
        for i, (intervention, points) in enumerate(self.asked):
            if intervention.over is None or (i, points[0].name) in self._means:
                continue
            with blame(i, intervention):
                caches = (capture(prompt, points) for prompt in intervention.over)
                means = means_over(caches, points)
            self._means.update({(i, name): supply for name, supply in means.items()})

    def session(self, run: Run, reach: Reach | None) -> "InterventionSession":
        """The hooks of one run.

        Args:
            run: where the current forward pass stands.
            reach: the positions that it may come to; None where nobody knows.

        Raises:
            HookError: positions that the run never comes to or that a source lacks.
        """
        session = InterventionSession(self.asked, run, reach)
        for i, (intervention, points) in enumerate(self.asked):
            with blame(i, intervention):
                due = None if reach is None else due_positions(intervention, reach)
                for point in points:
                    supply = self._means.get((i, point.name)) or supply_at(intervention, point)
                    if supply is not None and holds_tokens(point):
                        self._check_tokens(supply, point)
                    edit = Edit(session, i, intervention, supply)
                    if reach is not None and due is not None:
                        edit.check_reach(point, due, reach, known_sizes(point))
                    session.hooks.append(Hook(point, edit))
        return session

    def _check_tokens(self, supply: Supply, point: HookPoint) -> None:
        if not all(are_tokens(np.array(given.array), self.cfg) for given in supply.by_pass.values()):
            raise HookError(f"{point.name} holds token ids: whole numbers from 0 to {self.cfg.d_vocab - 1}.")
