"""Attribution patching: activation patching of all places at once, to first order.

The metric with a place patched is about the metric as it is, plus what is put in less what is there, times the
metric's gradient there. Four forward passes and one backward pass tell every place of a sweep. It is exact where the
model and the metric are linear in what is patched; a softmax or a norm that is saturated, and large changes, it gets
wrong. Source: Nanda, "Attribution Patching: Activation Patching at Industrial Scale" (2023); Kramár et al., "AtP*"
(2024).
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ...activations import to_numpy
from ...errors import HookError
from ...hook_points import POSITION_AXES, HookPoint
from ...model import HookedModel
from ..components import captured
from ..eval_data import BACKWARD, EvalBatch
from ..patched_runs import Cell
from ..progress import Passes, Progress
from .gradients import gradients
from .patching import Pairs, PatchingOptions, PatchingResult, grid_of


def attribution_patching(
    model: HookedModel, eval_data: Any, sweep: Any = "layer x position", *, progress: Progress = None, **options: Any
) -> PatchingResult:
    """:func:`activation_patching`, estimated: the same arguments, and a result of the same shape.

        estimated = attribution_patching(model, pairs, "layer x head x position")
        exact = activation_patching(model, pairs, "layer x head x position")
        numpy.corrcoef(estimated.effects.ravel(), exact.effects.ravel())

    Args:
        progress: called with the passes that are done, and how many there are.
        options: see :class:`PatchingOptions`; ``rows`` has no meaning here.

    Raises:
        HookError: as :func:`activation_patching`, for hook points without a gradient, and for the metric "kl" where
            the clean prompts run.
    """
    chosen = PatchingOptions(sweep=sweep, **options)
    pairs = Pairs(model, eval_data, chosen.metric, chosen.direction, chosen.max_examples, chosen.batch_size, BACKWARD)
    if pairs.needs_plain and not pairs.is_denoising:
        raise HookError(
            f"The gradient of {pairs.metric.name} at the clean run is 0: take the direction denoising, another metric, "
            "or activation_patching.",
            field="metric",
        )
    grid = grid_of(model, pairs.data, chosen)
    several = [cell for cell in grid.cells.values() if len(cell.hook_points) > 1]
    if several:
        raise HookError(
            f"A place is estimated at one hook point, got {several[0]}: what one does by way of the other is in both "
            "gradients.",
            field="sweep",
        )
    patched = np.full((len(pairs.data), *grid.shape), np.nan)
    # Of each batch one pass is captured, and one goes forward and back.
    passes = Passes(progress, pairs.n_passes + (pairs.needs_plain + 2) * len(pairs.batches))
    pairs.measure(passes)
    for batch in pairs.batches:
        for place, change in zip(grid.cells, _changes(pairs, batch, list(grid.cells.values()), passes), strict=True):
            # The examples' axis last: an index of several axes takes a view.
            np.moveaxis(patched, 0, -1)[place][batch.indices] = pairs.base[batch.indices] + change
        passes.passed()
    return pairs.result(chosen.sweep, grid.axes, patched, component=grid.component, is_estimate=True)


def _changes(pairs: Pairs, batch: EvalBatch, cells: Sequence[Cell], passes: Passes) -> list[np.ndarray]:
    """How much patching each cell changes the metric, to first order, [example] each."""
    model, metric, (tokens, source) = pairs.model, pairs.metric, pairs.sides(batch)
    names = [name for name in model.hook_points if any(name in cell.hook_points for cell in cells)]
    given = captured(model, source, names)
    passes.passed()
    plain = pairs.plain(batch, passes)
    whole = [name for name in names if not mx.issubdtype(given[name][0].dtype, mx.floating)]
    if whole:
        raise HookError(
            f"{whole[0]} holds {given[whole[0]][0].dtype}: there is no gradient with respect to it.", field="sweep"
        )
    found = gradients(model, tokens, names, lambda logits: metric(logits, batch, plain))
    products = {}
    for name in names:
        own, other = found.values[name], given[name][0]
        # Where the two are the same, as scores of -inf that are masked in both, nothing is put in.
        change = mx.where(other == own, 0.0, other.astype(mx.float32) - own.astype(mx.float32))
        axes = model.hook_points[name].axes
        rest = [i for i, axis in enumerate(axes) if axis not in ("batch", "head", *POSITION_AXES)]
        products[name] = (change * found.gradients[name]).sum(axis=rest, keepdims=True)
    mx.eval(products)
    read = {name: to_numpy(value).astype(np.float64) for name, value in products.items()}
    if not all(np.isfinite(each).all() for each in read.values()):
        raise HookError(
            f"The gradients of {metric.name} are not finite on the eval data: nothing can be estimated.", field="metric"
        )
    return [_of_cell(cell, model.hook_points[cell.hook_points[0]], read[cell.hook_points[0]]) for cell in cells]


def _of_cell(cell: Cell, point: HookPoint, products: np.ndarray) -> np.ndarray:
    """The sum of what a cell has of a hook point's products, [example]."""
    kept = products * cell.mask(point, products.shape)
    return np.asarray(kept.reshape(len(kept), -1).sum(axis=1))
