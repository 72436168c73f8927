"""Hook specs for common questions, activations in NeuroScope's shape, and the circuits that replies show."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .errors import PayloadError
from .payload import decode_activation, row_positions

LAYER_COMPONENTS = (
    "residual",
    "attention",
    "mlp",
    "layernorm",
    "query",
    "key",
    "value",
    "attention_scores",
    "attention_pattern",
)
"""The components that every block has; `embedding` is asked of `transformer.wte`, not of a block."""

CIRCUIT_COMPONENTS = ("residual", "attention", "mlp")
ATTENTION_COMPONENTS = ("attention_pattern", "query", "key", "value")
SELECTION = ("positions", "heads", "reduce")
HEAD_THRESHOLD = 0.3  # mean attention from which a head is listed as a circuit
FIRST_SCORED_QUERY = 2  # at position 1 the previous token is the first token: it cannot tell the two apart

_NEUROSCOPE_NAMES = {
    "hook_id": "hookId",
    "layer_name": "layerName",
    "component": "component",
    "hook_point": "hookPoint",
    "layer_index": "layerIndex",
    "shape": "shape",
    "dtype": "dtype",
    "axes": "axes",
    "positions": "positions",
    "position_ids": "positionIds",
    "heads": "heads",
    "reduce": "reduce",
    "is_input": "isInput",
    "phase": "phase",
    "step": "step",
}
_SEED_FIELDS = ("hook_id", "layer_name", "component", "shape", "dtype", "is_input")

Activations = Mapping[str, Sequence[Mapping[str, Any]]]


class NeuroScopeActivationBridge:
    """From a model's size to hook specs, and from captured activations to NeuroScope's tensors and circuits.

        bridge = NeuroScopeActivationBridge()
        hooks = bridge.create_hook_specs_for_circuit_analysis(model_layers=4)
        result = client.generate_with_activations(messages, hooks, max_tokens=1)
        for circuit in bridge.find_circuits(result["activations"]):
            print(circuit["name"], circuit["confidence"])

    It holds no state and talks to no server.
    """

    @staticmethod
    def create_hook_specs_for_circuit_analysis(
        model_layers: int,
        components: Sequence[str] | None = CIRCUIT_COMPONENTS,
        target_layers: Sequence[int] | None = None,
        **selection: Any,
    ) -> list[dict[str, Any]]:
        """One spec per layer and component, ordered by layer, then as `components` are.

            create_hook_specs_for_circuit_analysis(24)[1]
            # {'layer_name': 'transformer.h.0', 'component': 'attention', 'hook_id': 'layer_0_attention',
            #  'capture_input': False, 'capture_output': True}

        Args:
            model_layers: Number of layers of the model, `num_layers` in the reply to `load_model`.
            components: Any of `LAYER_COMPONENTS`; None for residual, attention and mlp.
            target_layers: Layers to hook, counted from 0; None for all.
            selection: `positions`, `heads` and `reduce` of each spec, which limit what is computed and sent:
                `positions="last"`, `positions=[0, 7]`, `heads=[2]`, `reduce="norm"`. The server checks them.

        Raises:
            ValueError: an unknown component or a layer that the model lacks; the message lists what there is.
            TypeError: a selection of another name.
        """
        chosen = CIRCUIT_COMPONENTS if components is None else components
        layers = _layers(model_layers, target_layers)
        limits = _limits(selection)
        return [_spec(layer, component) | limits for layer in layers for component in _components(chosen)]

    @staticmethod
    def create_attention_analysis_hooks(
        model_layers: int, target_layers: Sequence[int] | None = None, **selection: Any
    ) -> list[dict[str, Any]]:
        """Pattern, query, key and value of each target layer.

            [spec["hook_id"] for spec in create_attention_analysis_hooks(24, target_layers=[5])]
            # ['layer_5_attention_pattern', 'layer_5_query', 'layer_5_key', 'layer_5_value']

        Args:
            model_layers: Number of layers of the model.
            target_layers: Layers to hook, counted from 0; None for all.
            selection: `positions`, `heads` and `reduce` of each spec.

        Raises:
            ValueError: a layer that the model lacks.
            TypeError: a selection of another name.
        """
        layers, limits = _layers(model_layers, target_layers), _limits(selection)
        return [_spec(layer, component) | limits for layer in layers for component in ATTENTION_COMPONENTS]

    @staticmethod
    def convert_activations_for_neuroscope(activations: Activations) -> dict[str, list[dict[str, Any]]]:
        """The `activations` of a reply with the names that NeuroScope's ActivationTensor has.

            tensors = convert_activations_for_neuroscope(result["activations"])
            tensors["layer_5_residual"][0]["layerName"]      # 'transformer.h.5'
            tensors["layer_5_residual"][0]["data"].shape     # (1, 10, 768)

        Returns:
            Hook id -> tensors with hookId, layerName, component, hookPoint, layerIndex, shape, dtype, axes,
            positions, positionIds, heads, reduce, isInput, phase, step and data. `data` is a numpy array, or None
            where the capture was asked for with encoding `none`; fields that a record lacks are None.

        Raises:
            PayloadError: a record without the fields that every record has, or with damaged data.
        """
        return {hook_id: [_tensor(record) for record in records] for hook_id, records in activations.items()}

    @staticmethod
    def find_circuits(activations: Activations) -> list[dict[str, Any]]:
        """What one capture shows: heads that attend to a fixed place, and how much each component writes.

            for circuit in find_circuits(result["activations"]):
                print(circuit["name"], circuit["confidence"])      # previous_token_head L0H1 0.97, ...

        From prefill records that are not reduced, first batch row, over the positions and heads captured:

        1. Heads, where `attention_pattern` was captured on three tokens or more: the mean of pattern[q, q-1]
           (`previous_token_head`) and of pattern[q, 0] (`first_token_head`) over the positions q >= 2; listed
           from 0.3.
        2. Writes, where the output of `attention` or `mlp` was captured: the mean over positions of its L2
           norm, divided by the same mean of the layer's `residual` output. Where that was not captured it is
           divided by the largest write captured. Clipped to 0..1.

        Both are correlations within one text: neither says what the component causes.

        Args:
            activations: The `activations` of a reply, or what `convert_activations_for_neuroscope` made of it.

        Returns:
            Circuits with name, confidence, components [{layer, componentType, index}], pathway
            [{source, target, strength}] and description, by falling confidence, then by name.

        Raises:
            PayloadError: a record of use that lacks its data, or holds nan or inf.
        """
        tensors = [
            record if "hookId" in record else _tensor(record) for records in activations.values() for record in records
        ]
        circuits = [*_head_circuits(tensors), *_write_circuits(tensors)]
        return sorted(circuits, key=lambda circuit: (-circuit["confidence"], circuit["name"]))

    @staticmethod
    def find_causal_circuits(reply: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What the server found by changing something in the model, in the shape of `find_circuits`.

            found = client.find_circuit(pairs)
            find_causal_circuits(found)[0]["pathway"][0]      # {'source': 'L3H0', 'target': 'logits', 'strength': 6.4}
            found = client.ablation(prompts, components=["heads"], ablations=["zero"])
            [(one["name"], one["confidence"]) for one in find_causal_circuits(found)]

        Args:
            reply: That of `find_circuit` with the format `neuroscope-circuit`, which is one circuit; or that of
                `ablation`, where each component, or group of them, by each ablation is one: its confidence is the size
                of the effect on the logit difference, or on the loss where there is none (of groups on their metric),
                relative to the model's own, at most 1. A loss or a divergence has no upper end, and may be 0: there the
                largest effect of the reply is 1 if it is more than the model's own.

        Returns:
            Circuits by falling confidence, then by name.

        Raises:
            PayloadError: a reply to something else, without that format, or that lacks what these have.
        """
        circuits = _causal_circuits(reply)
        return sorted(circuits, key=lambda circuit: (-circuit["confidence"], circuit["name"]))


def _spec(layer: int, component: str) -> dict[str, Any]:
    return {
        "layer_name": f"transformer.h.{layer}",
        "component": component,
        "hook_id": f"layer_{layer}_{component}",
        "capture_input": False,
        "capture_output": True,
    }


def _limits(selection: Mapping[str, Any]) -> dict[str, Any]:
    """What a spec has besides its place, if anything."""
    unknown = [name for name in selection if name not in SELECTION]
    if unknown:
        raise TypeError(f"There is no selection {unknown[0]!r}: there are {', '.join(SELECTION)}.")
    return {name: value for name, value in selection.items() if value is not None}


def _layers(model_layers: int, target_layers: Sequence[int] | None) -> list[int]:
    if type(model_layers) is not int or model_layers < 1:
        raise ValueError(f"model_layers must be a whole number from 1, got {model_layers!r}.")
    if target_layers is None:
        return list(range(model_layers))
    chosen = list(target_layers)
    for layer in chosen:
        if isinstance(layer, (bool, float, str)) or not 0 <= layer < model_layers:
            raise ValueError(f"There is no layer {layer!r}. Layers: 0 to {model_layers - 1}.")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"target_layers must name each layer once, got {chosen}. Layers: 0 to {model_layers - 1}.")
    return sorted(int(layer) for layer in chosen)


def _components(components: Sequence[str]) -> list[str]:
    allowed = f"Components of a layer: {', '.join(LAYER_COMPONENTS)}."
    if isinstance(components, str):
        raise ValueError(f"components must be a list, got the string {components!r}. {allowed}")
    chosen = list(components)
    for component in chosen:
        if component not in LAYER_COMPONENTS:
            raise ValueError(f"Unknown component {component!r}. {allowed}")
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"components must name each component once, got {chosen}. {allowed}")
    return chosen


def _tensor(record: Mapping[str, Any]) -> dict[str, Any]:
    missing = [field for field in _SEED_FIELDS if field not in record]
    if missing:
        raise PayloadError(f"An activation record lacks {', '.join(missing)}; it has {', '.join(record) or 'nothing'}.")
    tensor = {theirs: record.get(ours) for ours, theirs in _NEUROSCOPE_NAMES.items()}
    tensor["data"] = None if record.get("encoding") == "none" else decode_activation(record)
    return tensor


def _rows(tensor: Mapping[str, Any]) -> tuple[np.ndarray, Sequence[int]]:
    """The first batch row of a tensor in float64, and the absolute positions of its rows."""
    if tensor["data"] is None:
        raise PayloadError(f"Hook {tensor['hookId']!r} was captured without data: ask for encoding 'base64' or 'json'.")
    values = np.asarray(tensor["data"], dtype=np.float64)[0]
    positions = row_positions({"positions": tensor["positions"], "position_ids": tensor.get("positionIds")})
    if values.shape[-2] != len(positions):
        shown = tensor.get("positionIds") or tensor["positions"]
        raise PayloadError(f"Hook {tensor['hookId']!r}: {values.shape[-2]} rows for positions {list(shown)}.")
    if not np.isfinite(values).all():
        raise PayloadError(f"Hook {tensor['hookId']!r} holds nan or inf: no score can be computed from it.")
    return values, positions


Heads = tuple[int, ...] | None


def _prefill(tensors: Sequence[Mapping[str, Any]], component: str) -> Iterator[tuple[int, Heads, np.ndarray, int]]:
    """Layer, heads (None: all), values and absolute position of every captured row of a component's output, each once.

    Reduced tensors have no such rows.
    """
    seen = set()
    for tensor in tensors:
        if tensor["component"] != component or tensor["isInput"] or tensor["phase"] == "decode":
            continue
        if tensor.get("reduce") is not None:
            continue
        heads = None if tensor.get("heads") is None else tuple(tensor["heads"])
        if None in (tensor["layerIndex"], tensor["phase"], tensor["positions"]):
            raise PayloadError(f"Hook {tensor['hookId']!r}: its record lacks layer_index, phase or positions.")
        values, positions = _rows(tensor)
        for row, position in enumerate(positions):
            if (tensor["layerIndex"], heads, position) not in seen:
                seen.add((tensor["layerIndex"], heads, position))
                yield tensor["layerIndex"], heads, values[..., row, :], position


def _head_circuits(tensors: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    count: dict[tuple[int, Heads], int] = {}
    scored: dict[tuple[int, Heads], list[tuple[np.ndarray, np.ndarray]]] = {}
    listed = set()
    patterns = [t for t in tensors if t["component"] == "attention_pattern" and not _lacks_keys(t)]
    for layer, heads, pattern, query in _prefill(patterns, "attention_pattern"):  # pattern: [head, key]
        count[layer, heads] = count.get((layer, heads), 0) + 1
        if query >= FIRST_SCORED_QUERY:
            scored.setdefault((layer, heads), []).append((pattern[:, query - 1], pattern[:, 0]))
    for (layer, heads), rows in scored.items():
        if count[layer, heads] <= FIRST_SCORED_QUERY:
            continue
        previous, first = (np.mean(column, axis=0) for column in zip(*rows, strict=True))
        for place, head in enumerate(heads if heads is not None else range(len(previous))):
            if (layer, head) in listed:
                # Two hooks may hold the same head.
                continue
            listed.add((layer, head))
            yield from _head(layer, head, "previous_token_head", float(previous[place]), "the token before")
            yield from _head(layer, head, "first_token_head", float(first[place]), "the first token")


def _lacks_keys(tensor: Mapping[str, Any]) -> bool:
    """Whether a sliding window has dropped early keys: then the columns of a pattern are no positions."""
    return tensor["positions"] is not None and tensor["shape"][-1] < tensor["positions"][1]


def _head(layer: int, head: int, kind: str, score: float, place: str) -> Iterator[dict[str, Any]]:
    if score < HEAD_THRESHOLD:
        return
    name = f"L{layer}H{head}"
    is_previous = kind == "previous_token_head"
    yield {
        "name": f"{kind} {name}",
        "confidence": score,
        "components": [{"layer": layer, "componentType": "attention_head", "index": head}],
        "pathway": [{"source": "position q-1", "target": "position q", "strength": score}] if is_previous else [],
        "description": f"Mean attention of head {head} in layer {layer} to {place}, over positions from "
        f"{FIRST_SCORED_QUERY}. Correlational: it shows where the head looks, not what that causes.",
    }


def _write_circuits(tensors: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    residual = _mean_norms(tensors, "residual")
    writes = {
        (component, layer): norm
        for component in ("attention", "mlp")
        for layer, norm in _mean_norms(tensors, component).items()
    }
    largest = max(writes.values(), default=0.0)
    for (component, layer), norm in writes.items():
        whole, against = (
            (residual[layer], "the residual stream after the layer")
            if layer in residual
            else (largest, "the largest such output captured")
        )
        yield {
            "name": f"{component}_write L{layer}",
            "confidence": min(norm / whole, 1.0) if whole > 0 else 0.0,
            "components": [{"layer": layer, "componentType": component, "index": None}],
            "pathway": [],
            "description": f"Mean L2 norm of the {component} output of layer {layer}, relative to {against}. "
            "Correlational: it shows how much is written, not what that causes.",
        }


_PART_TYPES = {"heads": "attention_head", "attn_out": "attention", "mlp_out": "mlp"}
_PART_NAMES = {"mixer_out": "mixer", "side_out": "side", "blocks": "block"}
_COMPONENT = re.compile(r"L(\d+)(?:H(\d+)| (\w+))?")
_WRITTEN = {"attn": "attention", "resid": "residual", None: "block"}
"""How the words of a name are called here, where otherwise; a layer alone is all that its block adds."""


def _causal_circuits(reply: Any) -> list[dict[str, Any]]:
    """As they come; raises PayloadError where the reply has none."""
    given = reply if isinstance(reply, Mapping) else {}
    try:
        if given.get("neuroscope_circuit") is not None:
            return [dict(given["neuroscope_circuit"])]
        if isinstance(given.get("components"), list) and isinstance(given.get("plain"), Mapping):
            return list(_ablated_circuits(given))
        if isinstance(given.get("groups"), Mapping) and given.get("ablations") is not None:
            return list(_ablated_groups(given))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"is of another shape ({error})"
        raise PayloadError(f"Causal circuits cannot be read: the reply {what}.") from error
    has = ", ".join(map(str, given)) if isinstance(reply, Mapping) else type(reply).__name__
    raise PayloadError(
        "Causal circuits are in the reply of find_circuit with the format neuroscope-circuit, or of ablation; this one "
        f"has {has or 'nothing'}."
    )


def _ablated_groups(reply: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A circuit of a group's components for each group and ablation."""
    largest = max(
        (
            abs(group["mean"] - float(np.mean(effects["plain"])))
            for effects in reply["groups"].values()
            for group in effects["groups"]
        ),
        default=0.0,
    )
    for ablation, effects in reply["groups"].items():
        before, words = float(np.mean(effects["plain"])), effects["metric"].replace("_", " ")
        for group in effects["groups"]:
            names = " + ".join(group["components"])
            yield {
                "name": f"{names} ({ablation} ablation)",
                "confidence": _share(group["mean"] - before, before, effects["metric"], largest),
                "components": [_component_of(name) for name in group["components"]],
                "pathway": [],
                "description": f"Causal: {ablation} ablation of {names} changes the {words} from {before:.3f} to "
                f"{group['mean']:.3f} (mean over {len(group['values'])} prompts).",
            }


def _component_of(name: str) -> dict[str, Any]:
    """Of the server's name for it: `L2H1`, `L0 attn`, `L0`."""
    found = _COMPONENT.fullmatch(name)
    if found is None:
        raise ValueError(f"no component is called {name!r}")
    layer, head, part = found.groups()
    kind = "attention_head" if head else _WRITTEN.get(part, part)
    return {"layer": int(layer), "componentType": kind, "index": int(head) if head else None}


_WITHOUT_END = ("loss", "kl")
"""Measures that may be about 0 in the model as it is, and rise to anything."""


def _share(change: float, before: float, measure: str, largest: float) -> float:
    """The size of a change relative to what was there, or to the largest change where that tells nothing; at most 1."""
    whole = max(abs(before), largest) if measure in _WITHOUT_END else abs(before) or largest
    return min(abs(change) / whole, 1.0) if whole else 0.0


def _ablated_circuits(reply: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A circuit of one component for each component and ablation."""
    measure = "logit_difference" if "logit_difference" in reply["plain"] else "loss"
    before = reply["plain"][measure]["mean"]
    words, unit = measure.replace("_", " "), "logits" if measure == "logit_difference" else "nats"
    found = [
        changes[f"{measure}_change"]["mean"]
        for component in reply["components"]
        for changes in component["ablations"].values()
    ]
    largest = max((abs(change) for change in found if change is not None), default=0.0)
    for component in reply["components"]:
        kind = _PART_TYPES.get(component["part"], _PART_NAMES.get(component["part"], component["part"]))
        place = f"L{component['layer']}" + ("" if component["head"] is None else f"H{component['head']}")
        for ablation, changes in component["ablations"].items():
            change = changes[f"{measure}_change"]["mean"]
            if change is None:
                continue
            yield {
                "name": f"{kind} {place} ({ablation} ablation)",
                "confidence": _share(change, before, measure, largest),
                "components": [{"layer": component["layer"], "componentType": kind, "index": component["head"]}],
                "pathway": [],
                "description": f"Causal: {ablation} ablation of {kind} {place} changes the {words} from {before:.3f} "
                f"to {before + change:.3f} {unit} (mean over {changes[f'{measure}_change']['n']} prompts).",
            }


def _mean_norms(tensors: Sequence[Mapping[str, Any]], component: str) -> dict[int, float]:
    norms: dict[int, list[float]] = {}
    for layer, _, row, _ in _prefill(tensors, component):
        norms.setdefault(layer, []).append(float(np.linalg.norm(row)))
    return {layer: float(np.mean(values)) for layer, values in norms.items()}
