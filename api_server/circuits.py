"""Causal analyses on the worker: from a checked request to plain data. Each takes the model, the request and a function
that is told how far it has come, and that leaves it when its job was cancelled.
"""

import re
from typing import Any

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.ablation import analyse_causal
from mlx_hooks.analysis.circuits.attribution_patching import attribution_patching
from mlx_hooks.analysis.circuits.circuit import Circuit
from mlx_hooks.analysis.circuits.edge_attribution import attribute_edges
from mlx_hooks.analysis.circuits.edge_runs import EdgeRuns
from mlx_hooks.analysis.circuits.finding import find_circuit
from mlx_hooks.analysis.circuits.graph import graph_of
from mlx_hooks.analysis.circuits.graphml import graphml
from mlx_hooks.analysis.circuits.groups import GroupEffects, Putting, replace_groups
from mlx_hooks.analysis.circuits.neuronpedia import slug_of, to_neuronpedia
from mlx_hooks.analysis.circuits.patching import activation_patching
from mlx_hooks.analysis.circuits.path_patching import path_patching as patch_paths
from mlx_hooks.analysis.circuits.pharo import to_neuroscope
from mlx_hooks.analysis.circuits.validation import CircuitValidation, validate_circuit
from mlx_hooks.analysis.eval_data import FIELD, EvalData, eval_data_of
from mlx_hooks.analysis.progress import Part

from .aside import Report
from .errors import ApiError
from .schemas.circuits import (
    MAX_RUNS,
    AblationRequest,
    CircuitRequest,
    EdgesRequest,
    EvalPrompt,
    PatchingRequest,
    PathPatchingRequest,
)


def ablation(model: HookedModel, asked: AblationRequest, report: Report) -> dict[str, Any]:
    """What the model loses without each component, or without groups of them."""
    data = _data(model, asked.eval_data)
    if asked.groups is None:
        options = {
            "ablations": asked.chosen,
            **asked.model_dump(include={"components", "mean_over", "batch_size"}),
            **asked.model_dump(include={"confidence", "resamples", "seed"}),
        }
        return analyse_causal(model, data, options, report)
    found = {}
    for i, name in enumerate(asked.chosen):
        part = Part(report, i, len(asked.chosen))
        found[name] = _of_groups(model, data, asked, asked.groups, name, part, asked.mean_over).to_dict()
    return {
        "eval_data": data.to_dict(),
        "ablations": {name: effects["ablation"] for name, effects in found.items()},
        "groups": found,
    }


def patching(model: HookedModel, asked: PatchingRequest, report: Report) -> dict[str, Any]:
    """What places of one run bring back in the other, or take away."""
    data = _data(model, asked.eval_data)
    if asked.groups is not None:
        putting: Putting = "clean" if asked.direction == "denoising" else "resample"
        effects = _of_groups(model, data, asked, asked.groups, putting, report)
        about = {"eval_data": data.to_dict(), "direction": asked.direction, "metric": effects.metric.name}
        return about | {"groups": effects.to_dict()}
    is_estimate = asked.method == "attribution"
    count = _n_cells(model, data, asked) * len(data)
    _check_runs(count, "cells" if asked.cells is not None else "sweep", "places" if is_estimate else "runs")
    sweep: Any = asked.sweep or "layer x position"
    if asked.cells is not None:
        sweep = [cell.plain() for cell in asked.cells]
    options = asked.model_dump(include={"component", "components", "direction", "align", "batch_size"})
    patch = attribution_patching if is_estimate else activation_patching
    try:
        found = patch(model, data, sweep, metric=asked.metric, progress=report, **options)
    except HookError as error:
        raise _of_sweep(error, asked) from error
    return found.to_dict()


def path_patching(model: HookedModel, asked: PathPatchingRequest, report: Report) -> dict[str, Any]:
    """What receivers lose, or regain, when they alone read what a sender wrote in the other run."""
    data = _data(model, asked.eval_data)
    n_senders = len(asked.senders or graph_of(model).nodes)
    _check_runs(n_senders * len(asked.receivers) * len(data), "receivers")
    options = asked.model_dump(include={"senders", "direction", "batch_size"})
    try:
        found = patch_paths(model, data, asked.receivers, metric=asked.metric, progress=report, **options)
    except HookError as error:
        # The graph's words for what a request calls by what it does.
        param = {"inputs": "receivers", "nodes": "senders"}.get(error.field or "")
        raise (error if param is None else _invalid(error, param)) from error
    return found.to_dict()


def edges(model: HookedModel, asked: EdgesRequest, report: Report) -> dict[str, Any]:
    """A score for every edge of the model's graph."""
    runs = _runs(model, asked, asked.eval_data)
    if asked.method == "exact":
        _check_runs(len(runs.graph.edges) * len(runs.data), "method")
    options = asked.model_dump(include={"method", "steps", "rule", "seed"})
    scores = attribute_edges(runs, options=options, progress=report)
    found = scores.to_dict()
    # The data tells how many there are.
    del found["examples"]
    ranked = scores.ranked
    return found | {
        "eval_data": runs.data.to_dict(),
        "n_edges": len(ranked),
        "edges": [{"edge": name, "score": score} for name, score in ranked[: asked.top]],
    }


def circuit(model: HookedModel, asked: CircuitRequest, report: Report) -> dict[str, Any]:
    """Find a circuit, prune it, and judge it."""
    runs = _runs(model, asked, asked.eval_data)
    judging = runs if asked.judge_by is None else _judging(runs, asked, asked.judge_by)
    found = _found(runs, asked, Part(report, 0, 2))
    validation = _judged(judging, found, asked, Part(report, 1, 2))
    written: dict[str, Any] = {}
    if "neuroscope-circuit" in asked.formats:
        written["neuroscope_circuit"] = to_neuroscope(found, asked.name, validation.faithfulness.mean)
    if "neuronpedia" in asked.formats:
        written["neuronpedia"] = to_neuronpedia(found, model, runs.data.examples[0], slug=slug_of(asked.name))
    if "graphml" in asked.formats:
        written["graphml"] = graphml(found)
    return {
        "eval_data": runs.data.to_dict(),
        "circuit": found.to_dict(),
        "nodes": list(found.nodes),
        "edges_of_model": len(runs.graph.edges),
        "validation": validation.to_dict(),
        **written,
    }


_JUDGES = "judge_by"
_EXAMPLE = re.compile(r"\bexample (\d+)")


def _data(model: HookedModel, prompts: list[EvalPrompt], name: str = FIELD) -> EvalData:
    """As the engine takes them; what is wrong with one is told with its place."""
    given = [one.model_dump(exclude_none=True) for one in prompts]
    try:
        return eval_data_of(model, given)
    except HookError as error:
        at = _EXAMPLE.search(str(error))
        param = name if at is None else f"{name}[{at[1]}]"
        raise _invalid(error, param) from error


def _of_sweep(error: HookError, asked: PatchingRequest) -> Exception:
    """The same error with the name that a request has for what is at fault."""
    if asked.cells is not None and error.field in ("sweep", "hook_point", None):
        return _invalid(error, "cells")
    if asked.component is not None and error.field is None:
        return _invalid(error, "component")
    return error


def _of_groups(
    model: HookedModel,
    data: EvalData,
    asked: "AblationRequest | PatchingRequest",
    groups: list[list[str]],
    putting: Putting,
    report: Report,
    mean_over: Any = "all",
) -> GroupEffects:
    _check_runs(len(groups) * len(data), "groups")
    return replace_groups(
        model,
        data,
        groups,
        putting,
        metric=asked.metric,
        mean_over=mean_over,
        batch_size=asked.batch_size,
        progress=report,
    )


def _runs(model: HookedModel, asked: "EdgesRequest | CircuitRequest", prompts: list[EvalPrompt]) -> EdgeRuns:
    return _edge_runs(model, _data(model, prompts), asked, asked.ablation, asked.metric)


def _edge_runs(
    model: HookedModel, data: EvalData, asked: "EdgesRequest | CircuitRequest", ablation: Any, metric: Any
) -> EdgeRuns:
    return EdgeRuns(
        model, data, ablation=ablation, metric=metric, **asked.model_dump(include={"batch_size", "mean_over", "seed"})
    )


def _judging(runs: EdgeRuns, asked: CircuitRequest, prompts: list[EvalPrompt]) -> EdgeRuns:
    """Runs of other prompts, with the ablation and the metric that the circuit is found by."""
    data = _data(runs.model, prompts, _JUDGES)
    try:
        return _edge_runs(runs.model, data, asked, runs.ablation, runs.metric)
    except HookError as error:
        raise _invalid(error, _JUDGES) from error


def _judged(runs: EdgeRuns, found: Circuit, asked: CircuitRequest, report: Report) -> CircuitValidation:
    options = {"random_circuits": asked.random_circuits, "seed": asked.seed}
    try:
        return validate_circuit(runs, found, options=options, progress=report)
    except HookError as error:
        raise _invalid(error, FIELD if asked.judge_by is None else _JUDGES) from error


def _found(runs: EdgeRuns, asked: CircuitRequest, report: Report) -> Circuit:
    if asked.method in ("acdc", "exact"):
        _check_runs(len(runs.graph.edges) * len(runs.data), "method")
    options = asked.model_dump(include={"method", "steps", "rule", "seed", "threshold", "faithfulness"})
    try:
        return find_circuit(runs, options=options | {"n": asked.size}, progress=report)
    except HookError as error:
        # An empty circuit is the fault of what cut it.
        limit = next((name for name in ("size", "threshold", "faithfulness") if getattr(asked, name)), FIELD)
        param = {"n": "size", "circuit": limit}.get(error.field or "")
        raise (error if param is None else _invalid(error, param)) from error


def _invalid(error: HookError, param: str) -> ApiError:
    """The same sentence about a field of the request."""
    return ApiError(400, str(error), code="invalid_value", param=param)


def _n_cells(model: HookedModel, data: EvalData, asked: PatchingRequest) -> int:
    """How many cells a sweep has at most."""
    if asked.cells is not None:
        return len(asked.cells)
    kind = asked.sweep or "layer x position"
    count = model.cfg.n_layers
    if "position" in kind:
        count *= max(len(example.tokens) for example in data.examples)
    if "head" in kind or kind == "component":
        count *= model.cfg.n_heads + 2
    return count


def _check_runs(count: int, param: str, what: str = "runs") -> None:
    """Raises ApiError for a sweep that would keep everybody else waiting for long: by what it has of each prompt."""
    if count > MAX_RUNS:
        raise ApiError(
            400,
            f"The sweep would take {count} {what} of a prompt; at most {MAX_RUNS} are allowed: ask for less at a time.",
            code="limit_exceeded",
            param=param,
        )
