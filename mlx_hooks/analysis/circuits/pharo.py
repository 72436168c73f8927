"""A circuit as NeuroScope in Pharo has one: components, and a pathway of what leads where."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...errors import HookError
from .circuit import is_finite
from .places import EMBED, LOGITS, SIGNED, SIZED, places_of, steps_of

if TYPE_CHECKING:
    from .circuit import Circuit

_TYPES = {"head": "attention_head", "attn": "attention"}
"""Pharo's words for parts of a layer; other parts are called what they are here."""


def to_neuroscope(circuit: "Circuit", name: str = "circuit", faithfulness: float | None = None) -> dict[str, Any]:
    """A circuit in the shape of ``NeuroScopeActivationBridge.find_circuits``, which Pharo's ``Circuit`` reads.

    Args:
        name: what it is to be called.
        faithfulness: of the circuit, 1 being the whole model; None where it was not validated.

    Returns:
        plain JSON values: ``name``, ``confidence`` (the faithfulness, from 0 to 1; 0 where it was not validated),
        ``components`` [{layer, componentType, index}] in forward order, ``pathway`` [{source, target, strength}], an
        edge each, the strongest first, with what the edge adds to the metric, or the size of a score that has no sign
        (0 where it has no score), and ``description``. That begins with "Causal" where edges were ablated to find or to
        validate the circuit, "Estimated" where gradients alone speak for it, and "Untested" where nothing does.

    Raises:
        HookError: for a faithfulness that is no finite number.
    """
    if faithfulness is not None and not is_finite(faithfulness):
        raise HookError(f"faithfulness is a finite number or None, got {faithfulness!r}.", field="faithfulness")
    components = [
        {"layer": place.layer, "componentType": _TYPES.get(place.part, place.part), "index": place.head}
        for place in places_of(circuit).values()
        if place.name not in (EMBED, LOGITS)
    ]
    strengths = {step.edge: step.strength for step in steps_of(circuit)}
    pathway = [
        dict(zip(("source", "target"), edge.split("->"), strict=True), strength=strength or 0.0)
        for edge, strength in strengths.items()
    ]
    return {
        "name": name,
        "confidence": 0.0 if faithfulness is None else float(min(max(faithfulness, 0.0), 1.0)),
        "components": components,
        "pathway": sorted(pathway, key=lambda step: -abs(step["strength"])),
        "description": _description(circuit, faithfulness),
    }


def _description(circuit: "Circuit", faithfulness: float | None) -> str:
    said = circuit.metadata
    how = f" found by {said['method']}" if said.get("method") else ""
    measured = _measured(said) if any(score is not None for score in circuit.edges.values()) else ""
    judged = (
        "It was not validated."
        if faithfulness is None
        else f"With all other edges ablated{_by(said)} it keeps {faithfulness:.1%} of what the model does."
    )
    return f"{_standing(said, faithfulness)}: {len(circuit.edges)} edges{how}.{measured} {judged}"


def _standing(said: Mapping[str, Any], faithfulness: float | None) -> str:
    method = said.get("method")
    if faithfulness is not None or method == "exact" or method in SIZED:
        return "Causal"
    return "Estimated" if method in SIGNED else "Untested"


def _measured(said: Mapping[str, Any]) -> str:
    """What the strengths are."""
    method, metric = said.get("method"), _words(said.get("metric", "metric"))
    if method in SIZED:
        return f" Strengths are how far the {metric} moves without each edge, up or down."
    if method not in SIGNED:
        return " Strengths are sizes of scores, which say nothing of the metric."
    return f" Strengths are {'' if method == 'exact' else 'estimates of '}what each edge adds to the {metric}."


def _words(name: Any) -> str:
    return str(name).replace("_", " ")


def _by(said: Any) -> str:
    return f" ({said['ablation']})" if said.get("ablation") else ""
