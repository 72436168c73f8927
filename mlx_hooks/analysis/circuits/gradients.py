"""Gradients with respect to activations: what a small change of each of them would change in a number of the output.

Weights are never differentiated, so quantised ones are no different, and a backward pass costs about a forward pass.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ...errors import HookError
from ...hook_points import HookPoint, select
from ...hooks import Hook, HookFunction
from ...model import HookedModel, check_hooked
from ..components import logits_of

Score = Callable[[mx.array], mx.array]
"""A number per row [batch] from logits [batch, pos, d_vocab]."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """What one backward pass gives.

    Args:
        scores: of each row, [batch].
        values: what the hook points held, by canonical name, as the model computed them.
        gradients: of each row's own score with respect to its values, of the same shapes, float32.
    """

    scores: mx.array
    values: dict[str, mx.array]
    gradients: dict[str, mx.array]


def gradients(
    model: HookedModel,
    tokens: np.ndarray | mx.array,
    points: Sequence[HookPoint | str],
    score: Score,
    edits: Sequence[tuple[HookPoint, HookFunction]] = (),
) -> Gradients:
    """One forward and one backward pass.

        found = gradients(model, tokens, ["blocks.2.attn.hook_z"], lambda logits: logits[:, -1, answer])
        found.gradients["blocks.2.attn.hook_z"]                 # (batch, pos, head, d_head)

    Args:
        tokens: ids [batch, pos].
        points: hook points that can be replaced, their names, or globs.
        score: must be differentiable. Rows are independent, so each row's gradient is that of its own score.
        edits: hooks that replace values before; what they put in is what the gradient is taken at.

    Returns:
        everything unevaluated.

    Raises:
        HookError: for what are no tokens of the model, no hook point, an unknown one, one that can be read but not
            replaced, or that is met several times in a pass.
    """
    check_hooked(model)
    if isinstance(points, str) or not isinstance(points, Iterable):
        raise HookError(f"points is a list of hook points or their names, got {points!r:.100}.", field="points")
    named = [[each] if isinstance(each, HookPoint) else select(model.hook_points, each) for each in points]
    # Names may overlap: "blocks.0.*" and "*.hook_z".
    chosen = list(dict.fromkeys(point for each in named for point in each))
    if not chosen:
        raise HookError("Gradients are taken with respect to at least one hook point: name one.", field="points")
    for point in chosen:
        model.architecture.check_editable(point)
    rows = np.array(model.to_tokens(tokens))
    shapes = _shapes(model, rows, chosen)

    def run(changes: list[mx.array]) -> tuple[mx.array, mx.array, list[mx.array]]:
        values: dict[str, mx.array] = {}

        def added(value: mx.array, point: HookPoint) -> mx.array:
            if point.name in values:
                raise HookError(f"{point.name} is met several times in a pass: it has no single gradient.")
            values[point.name] = value
            change = changes[chosen.index(point)]
            return (value.astype(mx.float32) + change).astype(value.dtype)

        hooks = [Hook(point, fn) for point, fn in edits] + [Hook(point, added) for point in chosen]
        with model.instrument.attached(model.instrument.plan(hooks)):
            scores = score(logits_of(model, rows))
        return scores.sum(), scores, [values[point.name] for point in chosen]

    (_, scores, values), found = mx.value_and_grad(run)([mx.zeros(shape) for shape in shapes])
    names = [point.name for point in chosen]
    return Gradients(scores, dict(zip(names, values, strict=True)), dict(zip(names, found, strict=True)))


def _shapes(model: HookedModel, tokens: np.ndarray, points: Sequence[HookPoint]) -> list[tuple[int, ...]]:
    """The shapes of the hook points' values: from a pass that is built and not computed."""
    found: dict[str, tuple[int, ...]] = {}

    def note(value: mx.array, point: HookPoint) -> None:
        found[point.name] = value.shape

    plan = model.instrument.plan([Hook(point, note, reads=True) for point in points])
    with model.instrument.attached(plan, alone=True):
        logits_of(model, tokens)
    return [found[point.name] for point in points]
