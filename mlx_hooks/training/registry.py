"""The analyses that there are: what each is made with, and which of its numbers are tabulated and followed."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ..analysis.ablation import CausalOptions, analyse_causal, draw_causal
from ..analysis.captured_heads import HeadOptions, analyse_heads, draw_heads
from ..analysis.circuit_search import CircuitOptions, analyse_circuit, draw_circuit
from ..analysis.features import FeatureOptions, analyse_features, draw_features
from ..analysis.neurons import NeuronOptions, analyse_neurons, draw_neurons
from ..analysis.probes import ProbeOptions, analyse_probe, draw_probe
from ..analysis.sae.analysis import SAEOptions, analyse_sae
from ..analysis.sae.pictures import draw_sae
from ..errors import HookError
from .context import Analysis, EvalContext, Metric, Progress

# What each is made with


def _sae(context: EvalContext, rows: Any, chosen: Any, progress: Progress | None) -> dict[str, Any]:
    changes: dict[str, Any] = {"steering": True} if context.steer else {}
    keeps = context.sae_folder is not None and chosen.save_to is None
    if context.sae_folder is not None and keeps:
        changes["save_to"] = str(context.sae_folder / folder_name(rows.name))
    result = analyse_sae(rows, replace(chosen, **changes), progress, context.model, context.spell, context.eval_data)
    if keeps:
        # Where it lies until it is exported is nobody's business.
        del result["saved_to"]
        result["options"]["save_to"] = None
    return result


def _neuron(context: EvalContext, rows: Any, chosen: Any, progress: Progress | None) -> dict[str, Any]:
    return analyse_neurons(rows, chosen, context.spell, progress)


def _feature(context: EvalContext, rows: Any, chosen: Any, progress: Progress | None) -> dict[str, Any]:
    return analyse_features(rows, chosen, progress, context.spell)


def _probe(context: EvalContext, rows: Any, chosen: Any, progress: Progress | None) -> dict[str, Any]:
    if context.labels is None:
        raise HookError("A probe needs labels: one per row in stored order, or labels by token.", field="labels")
    return analyse_probe(rows, context.labels_of_rows, chosen, progress, context.spell)


def _heads(context: EvalContext, rows: Any, chosen: Any, progress: Progress | None) -> dict[str, Any]:
    return analyse_heads(rows, chosen, progress)


def _causal(context: EvalContext, rows: Any, chosen: Any, progress: Progress | None) -> dict[str, Any]:
    return analyse_causal(context.running, context.eval_data, chosen, progress)


def _circuit(context: EvalContext, rows: Any, chosen: Any, progress: Progress | None) -> dict[str, Any]:
    return analyse_circuit(context.running, context.eval_data, chosen, progress)


def folder_name(layer: str) -> str:
    """A layer's name as that of a folder."""
    return re.sub(r"[^\w.-]", "_", layer).lstrip(".") or "layer"


# Numbers of a result


def _mean_of(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda result: float(np.mean(result[key]))


def _variance_of(count: int) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda result: sum(result["explained_variance"][:count]) if result["explained_variance"] else None


def _components_for(share: float) -> Callable[[Mapping[str, Any]], float | None]:
    """How many components hold a share of the variance; None where all that were found do not."""

    def of(result: Mapping[str, Any]) -> float | None:
        return next((i for i, sum_ in enumerate(result["cumulative"], 1) if sum_ >= share), None)

    return of


def _largest(measure: str) -> Callable[[Mapping[str, Any]], float | None]:
    """Of a measure of all components and ablations, the largest mean."""

    def of(result: Mapping[str, Any]) -> float | None:
        found = [
            ablated[measure]["mean"]
            for component in result["components"]
            for ablated in component["ablations"].values()
            if ablated.get(measure) is not None
        ]
        return max((mean for mean in found if mean is not None), default=None)

    return of


def _best(key: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda result: max(result[key]) if result[key] else None


def _within(*keys: str) -> Callable[[Mapping[str, Any]], float | None]:
    """A number inside a result, None where any part of the way to it is not there."""

    def of(result: Mapping[str, Any]) -> float | None:
        found: Any = result
        for key in keys:
            found = (found or {}).get(key)
        return found

    return of


ANALYSES_BY_NAME: dict[str, Analysis] = {
    analysis.name: analysis
    for analysis in (
        Analysis(
            "sae",
            "Sparse autoencoders",
            "A dictionary of directions, of which few are active on any token. All numbers are measured on rows that "
            "were held out while it was trained. L0 is how many features are active on a token, the unexplained "
            "variance (FVU) what is left when a row is read back, 0 being nothing.",
            "rows",
            SAEOptions,
            _sae,
            (
                Metric("fvu", "variance unexplained (share)", _within("fvu"), "share"),
                Metric("l0", "active features per token (L0)", _within("l0")),
                Metric("final_l0", "L0 as a share of all features", _within("final_l0")),
                Metric("dead_fraction", "features that never fire (share)", _within("dead_fraction"), "share"),
                Metric("final_loss", "loss", _within("final_loss")),
                Metric(
                    "loss_recovered",
                    "loss recovered in the model (share)",
                    _within("loss_recovered", "loss_recovered"),
                    "share",
                ),
            ),
            draw_sae,
        ),
        Analysis(
            "neuron",
            "Neurons",
            "Each number of a row on its own. Its firing rate is the share of tokens on which it is above the "
            "threshold, 0 unless told otherwise.",
            "rows",
            NeuronOptions,
            _neuron,
            (
                Metric("mean_activation", "mean activation", _mean_of("mean_activation")),
                Metric("max_activation", "highest activation", lambda result: max(result["max_activation"])),
                Metric("firing_rate", "firing rate, mean (share of tokens)", _mean_of("firing_rate"), "share"),
                Metric("n_dead", "neurons that never fire", _within("n_dead"), "count"),
                Metric("n_rare", "neurons that fire rarely", _within("n_rare"), "count"),
            ),
            draw_neurons,
        ),
        Analysis(
            "feature",
            "Directions and clusters",
            "The principal components of the rows, which are the directions in which they vary most, and the clusters "
            "that the rows fall into.",
            "rows",
            FeatureOptions,
            _feature,
            (
                Metric("first_component", "first component (share of variance)", _variance_of(1), "share"),
                Metric("first_10_components", "first 10 components (share)", _variance_of(10), "share"),
                Metric("components_for_90", "components for 90% of the variance", _components_for(0.9), "count"),
                Metric("n_clusters", "clusters", _within("clusters", "n_clusters"), "count"),
                Metric("silhouette", "silhouette", _within("clusters", "silhouette")),
            ),
            draw_features,
        ),
        Analysis(
            "circuit",
            "A circuit",
            "Components that do what the model does while all others are ablated, and of which no single one can go. "
            "Faithfulness is the share of the model's performance that they keep, completeness the share that is lost "
            "when they alone are ablated.",
            "model",
            CircuitOptions,
            _circuit,
            (
                Metric("size", "components in the circuit", _within("size"), "count"),
                Metric("faithfulness", "faithfulness (share)", _within("faithfulness", "mean"), "share"),
                Metric("completeness", "completeness (share)", _within("completeness", "mean"), "share"),
                Metric(
                    "random",
                    "faithfulness of random sets of this size",
                    _within("random", "mean"),
                    "share",
                ),
                Metric("clean", "performance of the model", _within("levels", "clean", "mean")),
            ),
            draw_circuit,
        ),
        Analysis(
            "causal",
            "Ablations",
            "What the model loses when the output of one component is replaced: the change of its loss in nats per "
            "token, how far its predictions move (KL in nats), and the change of the logit difference between right "
            "and wrong answers where these are given.",
            "model",
            CausalOptions,
            _causal,
            (
                Metric("loss", "loss as it is (nats)", _within("plain", "loss", "mean")),
                Metric("loss_change", "largest change of the loss (nats)", _largest("loss_change")),
                Metric("kl", "largest KL (nats)", _largest("kl")),
            ),
            draw_causal,
        ),
        Analysis(
            "probe",
            "Linear probes",
            "How well a label can be read off a row by a linear function, on texts that were not trained on; "
            "beside it the share of the commonest label, and probes on shuffled labels, which show what any data of "
            "this shape would give. For labels that are numbers it is R².",
            "rows",
            ProbeOptions,
            _probe,
            (
                Metric("accuracy", "accuracy on held-out rows (share)", _within("accuracy", "mean"), "share"),
                Metric("balanced_accuracy", "balanced accuracy (share)", _within("balanced_accuracy"), "share"),
                Metric("majority_baseline", "commonest label (share)", _within("majority_baseline"), "share"),
                Metric("control", "shuffled labels (share)", _within("control", "accuracy"), "share"),
                Metric("r2", "R²", _within("r2", "mean")),
                Metric("control_r2", "R² of shuffled labels", _within("control", "r2")),
            ),
            draw_probe,
            draws_together=True,
        ),
        Analysis(
            "heads",
            "Attention heads",
            "What each head attends to, as shares of its attention: the token before (previous token); what followed "
            "when the same token came before (induction); the first token. Entropy is a share of the largest possible "
            "one: 0 is all attention on one token. The numbers are those of the last captured step.",
            "patterns",
            HeadOptions,
            _heads,
            (
                Metric("induction", "best induction score (share)", _best("induction"), "share"),
                Metric("previous_token", "best previous-token score (share)", _best("previous_token"), "share"),
                Metric("first_token", "best first-token score (share)", _best("first_token"), "share"),
                Metric("entropy", "entropy, mean (share)", _mean_of("entropy"), "share"),
            ),
            draw_heads,
        ),
    )
}
"""All analyses; the names are those of ``config.ANALYSES``."""
