"""Whether a file holds a trait's capture as ``records.py`` has it; if not, what is wrong, point by point."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from ...errors import HookError
from .records import ALIGNMENTS, OLD_NAMES, PROJECTIONS, SUBLAYERS, Record, arrays_of, json_path, read_record, to_plain

_Kinds = dict[str, tuple[type, ...]]
METADATA: _Kinds = {
    "trait": (str,), "trait_display_name": (str,), "vector_path": (str, list, NoneType), "model": (str,),
    "capture_date": (str,), "temperature": (int, float), "layer": (int, NoneType), "method": (str,),
    "vector_norm": (int, float, list), "projection": (str,), "alignment": (str,), "sublayers": (list,), "seed": (int,),
    "top_p": (int, float), "max_tokens": (int,), "finish_reason": (str,), "n_layers": (int,), "d_model": (int,),
    "n_heads": (int,),
}  # fmt: skip
"""What every record's metadata has."""
SUM_TOLERANCE = 0.01
"""How far a row of attention may be from 1: models in half precision round each of its entries."""

_CHOICES: dict[str, list[Any]] = {
    "alignment": list(ALIGNMENTS),
    "projection": list(PROJECTIONS.values()),
    "sublayers": [list(SUBLAYERS)],
    "finish_reason": ["stop", "length"],
}
_TEXTS: _Kinds = {"text": (str,), "tokens": (list,), "token_ids": (list,), "n_tokens": (int,)}
_OPTIONAL: _Kinds = {
    "attention": (str,), "attention_sinks": (list,), "layers_without_attention": (dict,), "absent": (dict,),
    "widths": (dict,),
}  # fmt: skip
_SHOWN = 20
_MOST = 1_000_000
"""What no model's sizes come near: lists are made of them."""


def verify_format(path: str | Path) -> list[str]:
    """What is wrong with a file that ``capture-layers`` or ``capture-layer`` wrote, a sentence each; empty if nothing.

        for problem in verify_format("experiments/e/polite/inference/residual_stream_activations/prompt_0.safetensors"):
            print(problem)

    A JSON file beside it is compared with it.
    """
    path = Path(path)
    if path.suffix == ".json":
        return [f"{path} is checked with the .safetensors file beside it: give that one."]
    try:
        record = read_record(path)
    except HookError as error:
        return [str(error)]
    found = list(_problems(record))
    if json_path(path).exists():
        found += _json_problems(json_path(path), record)
    if len(found) > _SHOWN:
        found = [*found[:_SHOWN], f"and {len(found) - _SHOWN} more"]
    return found


def _problems(record: Any) -> Iterator[str]:
    if not isinstance(record, dict):
        yield f"the record is a mapping, got {_name(record)}"
        return
    single = "internals" in record
    mappings = ("prompt", "response", "metadata", "projections", "internals" if single else "attention_weights")
    kinds: _Kinds = dict.fromkeys(mappings, (dict,)) | ({"layer": (int,)} if single else {})
    wrong = list(_wrong_kinds(record, kinds, ""))
    for part in ("prompt", "response"):
        if isinstance(record.get(part), dict):
            wrong += _text_problems(record[part], part)
    if isinstance(record.get("metadata"), dict):
        wrong += _metadata_problems(record["metadata"])
    yield from wrong
    for name, array in arrays_of(record):
        if not np.isfinite(array).all():
            yield f"{name} holds numbers that are not finite"
    if not wrong:
        # Shapes are told by what was checked.
        yield from (_single if single else _layers)(_Sizes(record))


def _wrong_kinds(node: Mapping[str, Any], kinds: _Kinds, place: str) -> Iterator[str]:
    for key, allowed in kinds.items():
        if key not in node:
            yield f"{place}{key} is missing"
        elif not isinstance(node[key], allowed) or isinstance(node[key], bool):
            yield f"{place}{key} is {' or '.join(map(_NAMES.__getitem__, allowed))}, got {_name(node[key])}"


_NAMES: dict[type, str] = {
    dict: "a mapping", list: "a list", str: "a text", int: "a whole number", float: "a number", NoneType: "nothing"
}  # fmt: skip


def _name(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def _text_problems(text: Mapping[str, Any], part: str) -> list[str]:
    found = list(_wrong_kinds(text, _TEXTS, f"{part}/"))
    if found:
        return found
    if not all(isinstance(token, str) for token in text["tokens"]):
        found.append(f"{part}/tokens is a list of texts")
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in text["token_ids"]):
        found.append(f"{part}/token_ids is a list of whole numbers")
    for key in ("tokens", "token_ids"):
        if len(text[key]) != text["n_tokens"]:
            found.append(f"{part}/{key} has {len(text[key])} entries, n_tokens is {text['n_tokens']}")
    return found


def _metadata_problems(metadata: Mapping[str, Any]) -> list[str]:
    kinds = METADATA | {key: allowed for key, allowed in _OPTIONAL.items() if key in metadata}
    found = list(_wrong_kinds(metadata, kinds, "metadata/"))
    if found:
        return found
    for key, choices in _CHOICES.items():
        if metadata[key] not in choices:
            found.append(f"metadata/{key} is one of {', '.join(map(str, choices))}, got {metadata[key]!r:.80}")
    for key in ("n_layers", "d_model", "n_heads"):
        if not 0 <= metadata[key] <= _MOST:
            found.append(f"metadata/{key} is a whole number from 0 to {_MOST}, got {metadata[key]}")
    return found


class _Sizes:
    """What a record whose texts and metadata are right says of the shapes of its arrays."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.metadata = record["metadata"]
        self.n_prompt, self.n_response = record["prompt"]["n_tokens"], record["response"]["n_tokens"]
        self.n_layers, self.d_model = self.metadata["n_layers"], self.metadata["d_model"]

    def rows(self, part: str) -> int:
        return self.n_prompt if part == "prompt" else self.n_response

    def n_keys(self, row: int) -> int:
        """Keys that a row of the response's attention has."""
        return self.n_prompt + row + (self.metadata["alignment"] == "at")

    def sinks(self, layer: int) -> bool:
        return layer in (self.metadata.get("attention_sinks") or [])


def _shape(node: Any, place: str, shape: Sequence[int | None], why: str) -> Iterator[str]:
    """A problem if what is in place is no array of a shape; None stands for any size."""
    kinds = "iu" if place.endswith("expert_indices") else "f"
    if not isinstance(node, np.ndarray):
        yield f"{place} is an array, got {_name(node)}"
    elif node.dtype.kind not in kinds:
        yield f"{place} holds numbers of the type {node.dtype}"
    elif len(node.shape) != len(shape) or any(b not in (None, a) for a, b in zip(node.shape, shape, strict=True)):
        told = ", ".join("any" if size is None else str(size) for size in shape)
        yield f"{place} has the shape {_tuple(node.shape)}; by {why} it has ({told})"


def _tuple(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def _layers(sizes: _Sizes) -> Iterator[str]:
    """Problems of a record of all layers."""
    projections, attention = sizes.record["projections"], sizes.record["attention_weights"]
    for part in ("prompt", "response"):
        shape = (sizes.rows(part), sizes.n_layers, 3)
        yield from _shape(projections.get(part), f"projections/{part}", shape, "n_tokens and n_layers")
    without = sizes.metadata.get("layers_without_attention") or {}
    captured = sizes.metadata.get("attention") != "not captured"
    layers = [layer for layer in range(sizes.n_layers) if captured and str(layer) not in without]
    wrong = list(_wrong_kinds(attention, {"prompt": (dict,), "response": (list,)}, "attention_weights/"))
    if wrong:
        yield from wrong
        return
    place = "attention_weights/prompt"
    yield from _layer_keys(attention["prompt"], layers, place)
    for layer, array in _by_layer(attention["prompt"]):
        yield from _pattern(array, f"{place}/layer_{layer}", (sizes.n_prompt, sizes.n_prompt), sizes, layer)
    rows = attention["response"]
    if len(rows) != sizes.n_response:
        yield f"attention_weights/response has {len(rows)} entries, n_tokens of the response is {sizes.n_response}"
    for row, by_layer in enumerate(rows):
        place = f"attention_weights/response/{row}"
        if not isinstance(by_layer, dict):
            yield f"{place} is a mapping, got {_name(by_layer)}"
            continue
        yield from _layer_keys(by_layer, layers, place)
        for layer, array in _by_layer(by_layer):
            yield from _pattern(array, f"{place}/layer_{layer}", (sizes.n_keys(row),), sizes, layer)


def _layer_keys(by_layer: Mapping[str, Any], layers: Sequence[int], place: str) -> Iterator[str]:
    expected = {f"layer_{layer}" for layer in layers}
    for key in sorted(expected - set(by_layer)):
        yield f"{place}/{key} is missing"
    for key in sorted(set(by_layer) - expected):
        yield f"{place}/{key} is not expected: the model has no attention there, or metadata says that there is none"


def _by_layer(by_layer: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    for key, array in by_layer.items():
        number = key.removeprefix("layer_")
        if number.isdecimal():
            yield int(number), array


def _pattern(array: Any, place: str, shape: tuple[int, ...], sizes: _Sizes, layer: int) -> Iterator[str]:
    """Problems of attention weights, whose last axis is the keys and, with more than one query, the one before it."""
    alignment = sizes.metadata["alignment"]
    why = "n_tokens" if "response" not in place else f"n_tokens and the alignment {alignment!r}"
    wrong = list(_shape(array, place, shape, why))
    if wrong:
        yield from wrong
        return
    if not array.size or not np.isfinite(array).all():
        return
    sums = array.astype(np.float64).sum(axis=-1)
    low, high = float(sums.min()), float(sums.max())
    if array.min() < 0 or high > 1 + SUM_TOLERANCE or (low < 1 - SUM_TOLERANCE and not sizes.sinks(layer)):
        most = "at most 1, the rest is the sink's" if sizes.sinks(layer) else "1"
        yield f"{place} has rows of attention that do not sum to {most}: {low:.4g} to {high:.4g}"
    if "response" not in place and np.triu(array, k=1).any():
        yield f"{place} looks ahead: a token attends to later ones"


def _single(sizes: _Sizes) -> Iterator[str]:
    """Problems of a record of a single layer."""
    record, metadata = sizes.record, sizes.metadata
    if not 0 <= record["layer"] < sizes.n_layers:
        yield f"layer is {record['layer']}, n_layers is {sizes.n_layers}"
    absent = metadata.get("absent") or {}
    widths = metadata.get("widths") or {}
    for part in ("prompt", "response"):
        internals = record["internals"].get(part)
        if not isinstance(internals, dict):
            yield f"internals/{part} is a mapping, got {_name(internals)}"
            continue
        for group, names in REQUIRED.items():
            for name in names:
                present = isinstance(internals.get(group), dict) and name in internals[group]
                if not present and f"{group}/{name}" not in absent:
                    yield f"internals/{part}/{group}/{name} is missing, and metadata/absent gives no reason"
        for group, arrays in internals.items():
            for name, array in arrays.items() if isinstance(arrays, dict) else []:
                place = f"internals/{part}/{group}/{name}"
                if name == "attn_weights":
                    yield from _weights(array, place, part, sizes)
                elif name not in OLD_NAMES:
                    shape = (sizes.rows(part), widths.get(f"{group}/{name}"))
                    yield from _shape(array, place, shape, "n_tokens and metadata/widths")
        yield from _projections(record["projections"].get(part), part, sizes, absent)
    neurons = record["projections"].get("neurons")
    if isinstance(neurons, dict) and "projections/neurons" not in absent:
        for name, width in (("alignment", (widths.get("mlp/activated"),)), ("bias", ())):
            yield from _shape(neurons.get(name), f"projections/neurons/{name}", width, "metadata/widths")
    elif "projections/neurons" not in absent:
        yield "projections/neurons is missing, and metadata/absent gives no reason"


REQUIRED = {
    "attention": ("q_proj", "k_proj", "v_proj", "attn_weights"),
    "mlp": ("gate_proj", "up_proj", "activated", "down_proj"),
    "residual": ("input", "after_attn", "output"),
}
"""What a layer's internals hold, unless metadata says why not."""


def _weights(node: Any, place: str, part: str, sizes: _Sizes) -> Iterator[str]:
    """Problems of the attention weights per head."""
    layer, n_heads = sizes.record["layer"], sizes.metadata["n_heads"]
    if part == "prompt":
        yield from _pattern(node, place, (n_heads, sizes.n_prompt, sizes.n_prompt), sizes, layer)
        return
    if not isinstance(node, list) or len(node) != sizes.n_response:
        yield f"{place} is a list of {sizes.n_response} arrays, one for each token of the response"
        return
    for row, array in enumerate(node):
        yield from _pattern(array, f"{place}/{row}", (n_heads, sizes.n_keys(row)), sizes, layer)


def _projections(node: Any, part: str, sizes: _Sizes, absent: Mapping[str, str]) -> Iterator[str]:
    place = f"projections/{part}"
    if not isinstance(node, dict):
        yield f"{place} is a mapping, got {_name(node)}"
        return
    rows = sizes.rows(part)
    shapes = {
        "residual": (rows, 3),
        "attn_out": (rows,),
        "mlp_out": (rows,),
        "heads": (rows, sizes.metadata["n_heads"]),
    }
    shapes |= {name: (rows,) for name in ("mixer_out", "heads_bias") if name in node}
    for name, shape in shapes.items():
        if name in node:
            yield from _shape(node[name], f"{place}/{name}", shape, "n_tokens and n_heads")
        elif f"projections/{name}" not in absent:
            yield f"{place}/{name} is missing, and metadata/absent gives no reason"


def _json_problems(path: Path, record: Record) -> list[str]:
    """Where the JSON beside a record says something else."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} has no place in JSON")

    try:
        beside = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror or error}"]
    except (ValueError, RecursionError) as error:
        return [f"{path} is no JSON: {error}"]
    try:
        return [f"{path.name} disagrees: {difference}" for difference in _differences(to_plain(record), beside, "")]
    except ValueError as error:
        return [f"{path.name} cannot be compared: {error}"]


def _differences(expected: Any, got: Any, place: str) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in sorted(set(expected) | set(got)):
            at = f"{place}/{key}" if place else key
            if key not in got or key not in expected:
                yield f"{at} is {'missing' if key not in got else 'not expected'}"
            else:
                yield from _differences(expected[key], got[key], at)
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        if expected and not isinstance(expected[0], list | dict):
            at_odds = next((i for i, pair in enumerate(zip(expected, got, strict=True)) if pair[0] != pair[1]), None)
            if at_odds is not None:
                yield f"{place}/{at_odds} is {got[at_odds]!r}, expected {expected[at_odds]!r}"
            return
        for i, pair in enumerate(zip(expected, got, strict=True)):
            yield from _differences(*pair, f"{place}/{i}")
    elif isinstance(expected, list) and isinstance(got, list):
        yield f"{place} has {len(got)} entries, expected {len(expected)}"
    elif expected != got or isinstance(expected, bool) != isinstance(got, bool):
        yield f"{place} is {got!r:.60}, expected {expected!r:.60}"
