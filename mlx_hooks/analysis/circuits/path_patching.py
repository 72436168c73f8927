"""Path patching: what one part of a model tells another one directly.

A sender writes to the stream, a receiver reads it: a head's queries, keys or values, an MLP, or the logits. The
receiver alone reads what the sender wrote in the run of the other prompt. All other parts read what they would have
read, so everything else that the sender does, by way of third parts too, stays as it is; what follows from the receiver
is computed anew. Effects are those of :mod:`patching`, in both directions. Source: Wang et al., "Interpretability in
the Wild" (2022); Goldowsky-Dill et al., "Localizing Model Behavior with Path Patching" (2023).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import HookError
from ...model import HookedModel
from ...options import options
from ..eval_data import EvalBatch, EvalData
from ..progress import Passes, Progress
from .edge_runs import EdgeRuns
from .metrics import Metric
from .model_graph import Input, ModelGraph
from .patching import Count, Direction, Pairs, PatchingResult


@options
class PathOptions:
    """Options of :func:`path_patching`.

    Args:
        senders: nodes ("embed", "L0H1", "L0 mlp"); None for all that are before some receiver.
        direction: "noising" or "denoising"; see :class:`PatchingOptions`.
        metric: see :func:`metric_of`.
        max_examples: the first so many examples are run; None for all, see :func:`eval_data_of`.
        batch_size: examples of one length that run together, fewer of long ones: see :meth:`EvalData.batches`.
    """

    senders: Sequence[str] | None = None
    direction: Direction = "noising"
    metric: str | Callable[..., Any] | Metric | None = None
    max_examples: Count | None = None
    batch_size: Count = 8


def path_patching(
    model: HookedModel,
    eval_data: Any,
    receivers: str | Sequence[str | Sequence[str]],
    *,
    progress: Progress = None,
    **options: Any,
) -> PatchingResult:
    """What receivers lose, or regain, when they read a sender's part of the other run.

        path_patching(model, pairs, ["L3H0<q>", "L3H0<k>", "L3H0<v>", "logits"]).effects        # [sender, receiver]
        path_patching(model, pairs, [["L3H0<q>", "L3H1<q>"]], senders=["L2H1"], direction="denoising")

    Args:
        eval_data: prompts with corrupted partners; see :func:`eval_data_of`.
        receivers: inputs ("L1H0<q>", "L1KV0<k>", "L1 mlp", "logits"), or a head or another node for all that it reads.
            A list of them in the list is one receiver: these read it together.
        progress: called with the passes that are done, and how many there are.
        options: see :class:`PathOptions`.

    Returns:
        a result whose axes are ``sender`` and ``receiver``; nan where the sender is before none of what receives.

    Raises:
        HookError: for eval data without corrupted prompts, unknown nodes and inputs, receivers that no sender is
            before, and a metric that does not tell clean from corrupted prompts.
    """
    chosen = PathOptions(**options)
    pairs = Pairs(model, eval_data, chosen.metric, chosen.direction, chosen.max_examples, chosen.batch_size)
    data = _swapped(pairs.data) if pairs.is_denoising else pairs.data
    runs = EdgeRuns(model, data, ablation="corrupted", metric=pairs.metric, batch_size=chosen.batch_size)
    names, sets = _receivers(runs.graph, receivers)
    senders = _senders(runs.graph, chosen.senders, sets)
    masks = {
        (i, j): mask
        for i, sender in enumerate(senders)
        for j, inputs in enumerate(sets)
        if (mask := runs.mask(_paths(runs.graph, sender, inputs))).any()
    }
    if not masks:
        raise HookError(f"None of {', '.join(senders)} is before any of {', '.join(names)}.", field="senders")
    patched = np.full((len(data), len(senders), len(names)), np.nan)
    stacked, places = np.stack(list(masks.values())), list(masks)
    passes = Passes(progress, pairs.n_passes + runs.n_passes(len(stacked)))
    pairs.measure(passes)
    for batch in runs.batches:
        others, at_once = runs.replacements(batch, passes), runs.sets_at_once(batch)
        plain = pairs.plain(_swapped_batch(batch) if pairs.is_denoising else batch, passes)
        for start in range(0, len(stacked), at_once):
            some = stacked[start : start + at_once]
            found = pairs.metric.numbers(runs.logits(batch, others, some), batch, plain)
            for (i, j), values in zip(places[start : start + at_once], found.reshape(len(some), -1), strict=True):
                patched[batch.indices, i, j] = values
            passes.passed()
    return pairs.result("path", {"sender": tuple(senders), "receiver": tuple(names)}, patched)


def _swapped(data: EvalData) -> EvalData:
    """The corrupted prompts, with the clean ones as their partners."""
    swapped = [replace(each, tokens=each.corrupted or (), corrupted=each.tokens) for each in data.examples]
    return replace(data, examples=tuple(swapped))


def _swapped_batch(batch: EvalBatch) -> EvalBatch:
    assert batch.corrupted is not None
    return replace(batch, tokens=batch.corrupted, corrupted=batch.tokens)


def _receivers(graph: ModelGraph, given: Any) -> tuple[list[str], list[list[Input]]]:
    """The receivers' names, and the inputs that each stands for."""
    listed = [given] if isinstance(given, str) else given
    if not isinstance(listed, list | tuple) or not all(isinstance(one, str | list | tuple) for one in listed):
        raise HookError(f"receivers are inputs and lists of them, by name, got {given!r:.100}.", field="receivers")
    if not listed or not all(listed):
        raise HookError("receivers is empty: give at least one input, as L1H0<q>, L1 mlp or logits.", field="receivers")
    sets = []
    for one in listed:
        names = [one] if isinstance(one, str) else list(one)
        sets.append([found for name in names for found in _inputs(graph, name)])
    return [one if isinstance(one, str) else " + ".join(one) for one in listed], sets


def _inputs(graph: ModelGraph, name: str) -> list[Input]:
    """The input of a name, or all inputs of a node."""
    try:
        serving = graph.inputs_of(name)
    except HookError:
        # No node, so it is to be an input.
        serving = []
    return serving or [graph.input(name)]


def _senders(graph: ModelGraph, given: Sequence[str] | None, sets: Sequence[Sequence[Input]]) -> list[str]:
    if given is not None:
        return list(dict.fromkeys(graph.node(name).name for name in given))
    read = {found.name for inputs in sets for found in inputs}
    before = {edge.source for edge in graph.edges if edge.input in read}
    return [node.name for node in graph.nodes if node.name in before]


def _paths(graph: ModelGraph, sender: str, inputs: Sequence[Input]) -> list[str]:
    """The edges from a sender to those inputs that it is before."""
    read = {found.name for found in inputs}
    return [edge.name for edge in graph.edges if edge.source == sender and edge.input in read]
