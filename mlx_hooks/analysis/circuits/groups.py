"""Several components replaced together, group by group: what a model loses without a group, or what one brings back.

    found = replace_groups(model, prompts, [["L2H1"], ["L2H1", "L3 mlp"]], "zero")
    found.plain          # [example]: the metric of the model as it is
    found.replaced       # [group, example]: with each group's components replaced

One run per group and batch, at all positions. Where the effects of components one by one are asked, with intervals,
:func:`mlx_hooks.analysis.ablation.analyse_causal` tells them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np

from ...errors import HookError
from ...hook_points import block_point
from ...model import HookedModel
from ..ablation import Bench, MeanOver
from ..components import Component, Numbers, Part, components_of
from ..eval_data import FIELD, EvalBatch, eval_data_of
from ..progress import Passes, Progress
from .metrics import Metric, MetricFunction, metric_of

Putting = Literal["zero", "mean", "resample", "clean"]

DENOISING = "what the component is on the clean prompt, in the run of the corrupted one"
PARTS: tuple[Part, ...] = ("mixer_out", "heads", "attn_out", "mlp_out", "side_out", "blocks")
"""Kinds of components that a group may have."""


@dataclass(frozen=True, eq=False)
class GroupEffects:
    """What replacing groups does; :func:`replace_groups` makes it.

    Args:
        groups: the names of each group's components.
        putting: what is put in.
        description: the same in words.
        metric: what it is measured by.
        plain: the metric [example] of the run with nothing replaced: of the corrupted prompts for "clean", else of the
            clean ones.
        other: of the other prompts [example]; None where there are no corrupted ones.
        replaced: the metric [group, example] with a group replaced.
    """

    groups: tuple[tuple[str, ...], ...]
    putting: Putting
    description: str
    metric: Metric
    plain: np.ndarray
    other: np.ndarray | None
    replaced: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "metric": self.metric.name,
            "ablation": self.description,
            "plain": self.plain.tolist(),
            "other": None if self.other is None else self.other.tolist(),
            "groups": [
                {"components": list(names), "values": values.tolist(), "mean": float(values.mean())}
                for names, values in zip(self.groups, self.replaced, strict=True)
            ],
        }


def replace_groups(
    model: HookedModel,
    eval_data: Any,
    groups: Sequence[Sequence[str]],
    putting: Putting = "zero",
    *,
    metric: str | MetricFunction | Metric | None = None,
    mean_over: MeanOver = "all",
    batch_size: int = 8,
    progress: Progress = None,
) -> GroupEffects:
    """Replace each group's components together, and measure every example.

    Args:
        eval_data: see :func:`eval_data_of`.
        groups: names of components: "L2H1" (a head), "L2 attn", "L2 mlp", "L2 mixer", "L2 side", "L2" (all that the
            block adds), "L2 resid" (the stream after the block).
        putting: "zero", "mean" or "resample" (what the components are on the corrupted prompts) in the runs of the
            clean prompts; "clean" in those of the corrupted ones: denoising.
        metric: see :func:`metric_of`.
        mean_over: "all" positions, or "position" by position.
        batch_size: examples of one length that run together, fewer of long ones: see :meth:`EvalData.batches`.
        progress: called with the passes that are done, and how many there are.

    Raises:
        HookError: for no groups, an empty one, a component that the model does not have, another ``putting``, and
            corrupted prompts that are needed and not given.
    """
    if putting not in get_args(Putting):
        raise HookError(f"putting is one of {', '.join(get_args(Putting))}, got {putting!r}.", field="putting")
    data = eval_data_of(model, eval_data)
    if putting in ("resample", "clean") and not data.has_corrupted:
        raise HookError(f"{putting} needs corrupted prompts: give every example one.", field=FIELD)
    if not isinstance(groups, list | tuple):
        raise HookError(f"groups is a list of lists of components, got {groups!r:.100}.", field="groups")
    chosen = [_members(model, group, i) for i, group in enumerate(groups)]
    if not chosen:
        raise HookError("groups names at least one group of components.", field="groups")
    judge = metric_of(metric, data)
    members = list({component.name: component for group in chosen for component in group}.values())
    bench = Bench(model, data, members, batch_size=batch_size, mean_over=mean_over)
    plain, other = np.zeros(len(data)), np.zeros(len(data)) if data.has_corrupted else None
    replaced = np.zeros((len(chosen), len(data)))
    of_batch = judge.needs_plain + 1 + (other is not None) + (putting == "clean") + len(chosen)
    of_ablation = 0 if putting == "clean" else bench.n_passes(putting)
    passes = Passes(progress, len(bench.batches) * of_batch + of_ablation)
    for batch in bench.batches:
        runs, rest = _sides(batch, putting)
        clean = None
        if judge.needs_plain:
            clean = judge.plain_run(bench.run(batch.tokens), batch)
            passes.passed()
        plain[batch.indices] = judge.numbers(bench.run(runs), batch, clean)
        passes.passed()
        if other is not None and rest is not None:
            other[batch.indices] = judge.numbers(bench.run(rest), batch, clean)
            passes.passed()
        if putting == "clean":
            numbers: Numbers | None = bench.values(batch.tokens)
            passes.passed()
        else:
            numbers = bench.replacements(putting, batch, passes)
        for i, group in enumerate(chosen):
            logits: mx.array = bench.run(runs, group, numbers)
            replaced[i, batch.indices] = judge.numbers(logits, batch, clean)
            passes.passed()
    names = tuple(tuple(component.name for component in group) for group in chosen)
    description = DENOISING if putting == "clean" else bench.describe(putting)
    return GroupEffects(names, putting, description, judge, plain, other, replaced)


def _sides(batch: EvalBatch, putting: Putting) -> tuple[np.ndarray, np.ndarray | None]:
    """The tokens that are run with replacements, and those that are only measured."""
    if putting == "clean":
        assert batch.corrupted is not None
        return batch.corrupted, batch.tokens
    return batch.tokens, batch.corrupted


def _members(model: HookedModel, group: Sequence[str], i: int) -> list[Component]:
    field = f"groups[{i}]"
    if not isinstance(group, list | tuple) or not all(isinstance(name, str) for name in group):
        raise HookError(f"A group is a list of names of components, got {group!r:.100}.", field=field)
    if not group or len(set(group)) < len(group):
        raise HookError(f"A group names at least one component, each once; got {list(group)}.", field=field)
    known = {c.name: c for part in PARTS for c in _of_part(model, part)} | _streams(model)
    unknown = next((name for name in group if name not in known), None)
    if unknown is not None:
        shown = ", ".join(list(known)[:8])
        more = f" and {len(known) - 8} more" if len(known) > 8 else ""
        raise HookError(f"There is no component {unknown!r}. There are {shown}{more}.", field=field)
    return [known[name] for name in group]


def _streams(model: HookedModel) -> dict[str, Component]:
    """The stream after each block: no component that adds to it, and replaced like one."""
    names = {layer: block_point("resid_post", layer).name for layer in range(model.cfg.n_layers)}
    return {
        f"L{layer} resid": Component(f"L{layer} resid", layer, "blocks", (name,))
        for layer, name in names.items()
        if name in model.hook_points
    }


def _of_part(model: HookedModel, part: Part) -> list[Component]:
    try:
        return components_of(model, [part])
    except HookError:
        # The model has none.
        return []
