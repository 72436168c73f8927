"""Analyses of what was captured, run by name."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from ..errors import HookError, UnknownHookError
from .config import AnalysisName
from .context import MODEL, Analysis, EvalContext, Progress
from .registry import ANALYSES_BY_NAME

__all__ = [
    "ANALYSES_BY_NAME",
    "MODEL",
    "Analysis",
    "EvalContext",
    "analysis_of",
    "check_options",
    "layers_for",
    "run_analysis",
]


def analysis_of(name: str) -> Analysis:
    """An analysis by name.

    Raises:
        HookError: there is none; lists them.
    """
    try:
        return ANALYSES_BY_NAME[name]
    except (KeyError, TypeError):
        raise HookError(
            f"There is no analysis {name!r}. There are: {', '.join(ANALYSES_BY_NAME)}.", field="analysis"
        ) from None


def check_options(given: Mapping[AnalysisName, Mapping[str, Any]]) -> None:
    """Refuse wrong options of analyses, by name as ``MechIntConfig.analysis_options`` has them.

    Raises:
        HookError: the first that is wrong.
    """
    for name, options in given.items():
        try:
            analysis_of(name).options(options)
        except HookError as error:
            raise HookError(f"analysis_options of {name}: {error}", field="analysis_options") from error


def layers_for(name: str, context: EvalContext, asked: Sequence[str | int] | None = None) -> list[str]:
    """The layers that an analysis is made of.

    Args:
        asked: names, aliases, block numbers or globs, of which those that were captured and suit the analysis are
            taken; None for all such.

    Raises:
        HookError: nothing suitable was captured; an asked layer was not captured.
    """
    analysis = analysis_of(name)
    if analysis.needs == MODEL:
        if context.model is None:
            raise HookError(f"The analysis {name!r} runs the model: give one.", field="model")
        if context.eval_data is None:
            raise HookError(f"The analysis {name!r} runs the model on data: give eval_data.", field="eval_data")
        return [MODEL]
    if not context.has_captured:
        raise HookError(f"The analysis {name!r} needs captured activations: give their folder, hidden_shards_path.")
    suitable = context.layers(analysis.needs)
    if asked is not None:
        wanted = {found for one in asked for found in _captured(context, one)}
        suitable = [layer for layer in suitable if layer in wanted]
    if not suitable:
        what = "attention patterns (hook_pattern)" if analysis.needs == "patterns" else "activations of tokens"
        among = "among sample_layers" if asked is not None else "captured"
        raise HookError(f"The analysis {name!r} needs {what}; none are {among}.")
    return suitable


def run_analysis(
    name: str,
    context: EvalContext,
    layer: str | int | None = None,
    options: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run one analysis.

        run_analysis("neuron", EvalContext(ShardReader("mechint_cache")), "model.layers.2")

    Args:
        layer: one captured layer; None for all that suit the analysis. An analysis of the model takes none.
        options: as a mapping or the analysis's own; None for the defaults.

    Returns:
        the result, as plain JSON values; for layer None results by layer, but that of the model as it is.

    Raises:
        HookError: for an unknown analysis, layer or option, and for what cannot be analysed.
    """
    analysis = analysis_of(name)
    chosen = analysis.options(options, context.seed)
    if analysis.needs == MODEL:
        if layer not in (None, MODEL):
            raise HookError(f"The analysis {name!r} is of the whole model: name no layer.", field="layer_name")
        layers_for(name, context)
        return analysis.apply(context, None, chosen, progress)
    if layer is not None:
        rows = context.rows_of(layer)
        if ("key" in rows.axes) != (analysis.needs == "patterns"):
            raise HookError(
                f"The analysis {name!r} cannot be made of {rows.name}, whose rows are {', '.join(rows.axes)}: "
                f"{_suitable(name, context)}.",
                field="layer_name",
            )
        return analysis.apply(context, rows, chosen, progress)
    return {
        found: analysis.apply(context, context.rows_of(found), chosen, progress) for found in layers_for(name, context)
    }


def _suitable(name: str, context: EvalContext) -> str:
    layers = context.layers(analysis_of(name).needs)
    return f"it can be made of {', '.join(layers)}" if layers else "nothing that was captured suits it"


def _captured(context: EvalContext, asked: str | int) -> list[str]:
    """The captured layers that a name or glob means."""
    every = [*context.layers("rows"), *context.layers("patterns")]
    if isinstance(asked, str) and any(char in asked for char in "*?["):
        found = [layer for layer in every if fnmatchcase(layer, asked)]
        if not found:
            raise UnknownHookError(f"{asked!r} matches nothing that was captured. There are: {', '.join(every)}.")
        return found
    return [context.rows_of(asked).name]
