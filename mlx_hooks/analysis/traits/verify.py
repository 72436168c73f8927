"""Whether a file holds a trait's capture as ``records.py`` has it; if not, what is wrong, point by point."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from ...errors import HookError
from ..identity import ModelIdentity
from .prompts import Chat
from .records import (
    ALIGNMENTS,
    OLD_NAMES,
    PROJECTIONS,
    SUBLAYERS,
    Record,
    arrays_of,
    json_parts,
    json_path,
    read_record,
    refuse_constant,
)
from .vectors import GIVEN, METHODS

_Kinds = dict[str, tuple[type, ...]]
METADATA: _Kinds = {
    "trait": (str,), "trait_display_name": (str,), "vector_path": (str, list, NoneType), "model": (str,),
    "capture_date": (str,), "temperature": (int, float), "layer": (int, NoneType), "method": (str,),
    "vector_norm": (int, float, list), "projection": (str,), "alignment": (str,), "sublayers": (list,), "seed": (int,),
    "top_p": (int, float), "max_tokens": (int,), "finish_reason": (str,), "n_layers": (int,), "d_model": (int,),
    "n_heads": (int,), "vector_layer": (int, NoneType), "each_layer": (bool,), "vector_sha256": (str,),
    "model_identity": (dict,), "chat": (dict, NoneType), "n_passes": (int,),
}  # fmt: skip
"""What every record's metadata has."""
SUM_TOLERANCE = 0.01
"""How far a row of attention may be from 1: models in half precision round each of its entries."""

_CHOICES: dict[str, list[Any]] = {
    "alignment": list(ALIGNMENTS),
    "projection": list(PROJECTIONS.values()),
    "sublayers": [list(SUBLAYERS)],
    "finish_reason": ["stop", "length"],
    "method": [*METHODS, GIVEN],
}
_TEXTS: _Kinds = {"text": (str,), "tokens": (list,), "token_ids": (list,), "n_tokens": (int,)}
_OPTIONAL: _Kinds = {
    "attention": (str,), "attention_sinks": (list,), "looks_ahead": (list,), "layers_without_attention": (dict,),
    "absent": (dict,), "widths": (dict,), "attends_repeatedly": (dict,), "after_attn": (list,), "hook_points": (dict,),
    "n_key_value_heads": (int, NoneType),
}  # fmt: skip
_SHOWN = 20
_MOST = {"n_layers": 10_000, "d_model": 1_000_000, "n_heads": 10_000}
"""What no model's sizes come near: lists are made of them."""
_LARGEST = sys.float_info.max
"""What no number in JSON is above that can be read as one with decimals."""
_PARTS = ("prompt", "response")
_RESIDUAL = ("input", "after_attn", "output")


def verify_format(path: str | Path) -> list[str]:
    """What is wrong with a file that ``capture-layers`` or ``capture-layer`` wrote, a sentence each; empty if nothing.

        for problem in verify_format("experiments/e/polite/inference/residual_stream_activations/prompt_0.safetensors"):
            print(problem)

    A JSON file beside it is compared with it.
    """
    path = Path(path)
    if path.suffix == ".json":
        whole = path.with_suffix(".safetensors")
        if whole.exists():
            return [f"{path} is checked with {whole.name} beside it: give that one."]
        return [f"{path} is no capture: that is a .safetensors file, and there is none of this name beside it."]
    try:
        record = read_record(path)
    except HookError as error:
        return [str(error)]
    found = list(_problems(record))
    if isinstance(record, dict) and json_path(path).exists():
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
    wrong += [f"{key} is not expected" for key in record if key not in kinds]
    for part in ("prompt", "response"):
        if isinstance(record.get(part), dict):
            wrong += _text_problems(record[part], part)
    if isinstance(record.get("metadata"), dict):
        wrong += _metadata_problems(record["metadata"], {"widths": (dict,), "absent": (dict,)} if single else {})
    if not wrong:
        wrong += _texts_against_metadata(record)
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
        elif not isinstance(node[key], allowed) or (isinstance(node[key], bool) and bool not in allowed):
            yield f"{place}{key} is {' or '.join(map(_NAMES.__getitem__, allowed))}, got {_name(node[key])}"


_NAMES: dict[type, str] = {
    dict: "a mapping", list: "a list", str: "a text", int: "a whole number", float: "a number",
    bool: "true or false", NoneType: "nothing",
}  # fmt: skip


def _name(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def _told(value: Any) -> str:
    """A value as sentences have it, however long it is."""
    return f"{value!r:.60}"


def _text_problems(text: Mapping[str, Any], part: str) -> list[str]:
    found = list(_wrong_kinds(text, _TEXTS, f"{part}/"))
    if found:
        return found
    if not all(isinstance(token, str) for token in text["tokens"]):
        found.append(f"{part}/tokens is a list of texts")
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in text["token_ids"]):
        found.append(f"{part}/token_ids is a list of whole numbers")
    elif not all(0 <= token < 2**32 for token in text["token_ids"]):
        found.append(f"{part}/token_ids are from 0 to {2**32 - 1}")
    for key in ("tokens", "token_ids"):
        if len(text[key]) != text["n_tokens"]:
            found.append(f"{part}/{key} has {len(text[key])} entries, n_tokens is {_told(text['n_tokens'])}")
    return found


def _metadata_problems(metadata: Mapping[str, Any], more: _Kinds) -> list[str]:
    kinds = METADATA | {key: allowed for key, allowed in _OPTIONAL.items() if key in metadata} | more
    found = list(_wrong_kinds(metadata, kinds, "metadata/"))
    if found:
        return found
    for key, choices in _CHOICES.items():
        if metadata[key] not in choices:
            found.append(f"metadata/{key} is one of {', '.join(map(str, choices))}, got {metadata[key]!r:.80}")
    for key, most in _MOST.items():
        if not 0 <= metadata[key] <= most:
            found.append(f"metadata/{key} is a whole number from 0 to {most}, got {_told(metadata[key])}")
    for key, least in (("seed", 0), ("max_tokens", 0), ("n_passes", 1)):
        if metadata[key] < least:
            found.append(f"metadata/{key} is a whole number from {least} up, got {_told(metadata[key])}")
    if not 0 <= metadata["temperature"] <= _LARGEST:
        found.append(f"metadata/temperature is a number from 0 up, got {_told(metadata['temperature'])}")
    if not 0 <= metadata["top_p"] <= 1:
        found.append(f"metadata/top_p is a number from 0 to 1, got {_told(metadata['top_p'])}")
    if found:
        # What follows goes by n_layers.
        return found
    return [
        *_vector_problems(metadata), *_model_problems(metadata), *_layer_problems(metadata), *_reason_problems(metadata)
    ]  # fmt: skip


def _vector_problems(metadata: Mapping[str, Any]) -> list[str]:
    """What is wrong with what is said of the vector, and of when it was laid along the stream."""
    found, n_layers = [], metadata["n_layers"]
    norms = metadata["vector_norm"]
    if isinstance(norms, list) != metadata["each_layer"] or (isinstance(norms, list) and len(norms) != n_layers):
        found.append("metadata/vector_norm is a number, or with each_layer a list with one for each layer")
    if not all(_is_length(norm) for norm in (norms if isinstance(norms, list) else [norms])):
        found.append("metadata/vector_norm is above 0 and finite")
    paths = metadata["vector_path"]
    several = isinstance(paths, list)
    if several != metadata["each_layer"] or (several and len(paths) != n_layers):
        found.append("metadata/vector_path is a text or nothing, or with each_layer a list with one for each layer")
    elif several and not all(isinstance(path, str | None) for path in paths):
        found.append("metadata/vector_path is a list of texts, or of nothing")
    for key in ("layer", "vector_layer"):
        layer = metadata[key]
        if layer is not None and not 0 <= layer < n_layers:
            found.append(f"metadata/{key} is {_told(layer)}, n_layers is {n_layers}")
    try:
        datetime.fromisoformat(metadata["capture_date"])
    except ValueError:
        found.append(f"metadata/capture_date is an ISO date, got {metadata['capture_date']!r:.60}")
    if not metadata["trait"]:
        found.append("metadata/trait is empty")
    if len(metadata["vector_sha256"]) != 64 or not set(metadata["vector_sha256"]) <= set("0123456789abcdef"):
        found.append("metadata/vector_sha256 is 64 hexadecimal digits")
    return found


def _is_length(norm: Any) -> bool:
    return isinstance(norm, int | float) and not isinstance(norm, bool) and 0 < norm <= _LARGEST


def _model_problems(metadata: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with what is said of the model, and of how the prompt was put to it."""
    try:
        identity = ModelIdentity.from_dict(metadata["model_identity"])
    except (KeyError, ValueError, TypeError, OverflowError):
        yield "metadata/model_identity has model_type, n_layers, d_model, d_vocab and model"
    else:
        for key in ("n_layers", "d_model"):
            if getattr(identity, key) != metadata[key]:
                told = _told(getattr(identity, key))
                yield f"metadata/model_identity/{key} is {told}, metadata/{key} {metadata[key]}"
    chat = metadata["chat"]
    if chat is None:
        return
    try:
        known = Chat.from_dict({key: value for key, value in chat.items() if key != "used"}).to_dict()
        right = {*known, "used"} == set(chat) and isinstance(chat["used"], bool)
    except HookError:
        right = False
    if not right:
        yield f"metadata/chat is nothing, or has use, system, template and used, got {_told(chat)}"


def _layer_problems(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Things that are said of layers which there are not, or not of all."""
    n_layers = metadata["n_layers"]
    for key in ("attention_sinks", "looks_ahead"):
        for layer in metadata.get(key, []):
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < n_layers:
                yield f"metadata/{key} is a list of layers, got {_told(layer)}; n_layers is {n_layers}"
    names = {str(layer) for layer in range(n_layers)}
    for key in ("layers_without_attention", "attends_repeatedly"):
        for name in set(metadata.get(key) or {}) - names:
            yield f"metadata/{key} is a mapping of layers, got {_told(name)}; n_layers is {n_layers}"
    points = metadata.get("after_attn", [])
    n_points = n_layers if "widths" not in metadata else 1
    if "after_attn" in metadata and (len(points) != n_points or not all(isinstance(name, str) for name in points)):
        yield f"metadata/after_attn is a list of {n_points} texts, got {_told(points)}"
    for name, width in (metadata.get("widths") or {}).items():
        if width is not None and (isinstance(width, bool) or not isinstance(width, int) or width < 0):
            yield f"metadata/widths/{name} is a whole number from 0 up, got {_told(width)}"


def _reason_problems(metadata: Mapping[str, Any]) -> list[str]:
    """Things that are said to be absent without a reason."""
    return [
        f"metadata/{key}/{name} is a reason, a text that is not empty"
        for key in ("absent", "layers_without_attention", "attends_repeatedly")
        for name, why in (metadata.get(key) or {}).items()
        if not isinstance(why, str) or not why
    ]


def _texts_against_metadata(record: Record) -> Iterator[str]:
    """Where texts and metadata, each right in itself, cannot be of one run."""
    metadata, n_response = record["metadata"], record["response"]["n_tokens"]
    if not record["prompt"]["n_tokens"]:
        yield "prompt/n_tokens is 0: a prompt has at least one token"
    if n_response > metadata["max_tokens"]:
        yield f"response/n_tokens is {n_response}, metadata/max_tokens {_told(metadata['max_tokens'])}"
    if "internals" in record and metadata["layer"] != record["layer"]:
        yield f"layer is {_told(record['layer'])}, metadata/layer {_told(metadata['layer'])}"


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
        return layer in self.metadata.get("attention_sinks", [])

    def looks_ahead(self, layer: int) -> bool:
        return layer in self.metadata.get("looks_ahead", [])


def _shape(node: Any, place: str, shape: Sequence[int | None], why: str) -> Iterator[str]:
    """A problem if what is in place is no array of a shape; None stands for any size."""
    whole = place.endswith("expert_indices")
    if not isinstance(node, np.ndarray):
        yield f"{place} is an array, got {_name(node)}"
    elif node.dtype.kind not in "iu" if whole else node.dtype != np.float32:
        yield f"{place} holds numbers of the type {node.dtype}, not {'whole ones' if whole else 'float32'}"
    elif len(node.shape) != len(shape) or any(b not in (None, a) for a, b in zip(node.shape, shape, strict=True)):
        told = ", ".join("any" if size is None else _told(size) for size in shape)
        yield f"{place} has the shape {_tuple(node.shape)}; by {why} it has ({told})"


def _tuple(shape: Sequence[int]) -> str:
    return f"({', '.join(map(str, shape))})"


def _layers(sizes: _Sizes) -> Iterator[str]:
    """Problems of a record of all layers."""
    projections, attention = sizes.record["projections"], sizes.record["attention_weights"]
    wrong = [f"projections/{part} is not expected" for part in projections if part not in ("prompt", "response")]
    for part in ("prompt", "response"):
        shape = (sizes.rows(part), sizes.n_layers, 3)
        wrong += _shape(projections.get(part), f"projections/{part}", shape, "n_tokens and n_layers")
    yield from wrong
    if wrong:
        # Then n_tokens or n_layers may be any number, and what is missing by them says nothing.
        return
    without = sizes.metadata.get("layers_without_attention") or {}
    captured = sizes.metadata.get("attention") != "not captured"
    layers = [layer for layer in range(sizes.n_layers) if captured and str(layer) not in without]
    wrong = list(_wrong_kinds(attention, {"prompt": (dict,), "response": (list,)}, "attention_weights/"))
    if wrong:
        yield from wrong
        return
    if attention["prompt"] and not sizes.metadata["n_heads"]:
        yield "metadata/n_heads is 0, and there are attention weights"
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
    if "response" not in place and not sizes.looks_ahead(layer) and np.triu(array, k=1).any():
        yield f"{place} looks ahead: a token attends to later ones"


def _single(sizes: _Sizes) -> Iterator[str]:
    """Problems of a record of a single layer."""
    record, metadata = sizes.record, sizes.metadata
    if not 0 <= record["layer"] < sizes.n_layers:
        yield f"layer is {record['layer']}, n_layers is {sizes.n_layers}"
    absent, widths = metadata["absent"], metadata["widths"]
    for name in _RESIDUAL:
        if widths.get(f"residual/{name}") != sizes.d_model:
            told = _told(widths.get(f"residual/{name}"))
            yield f"metadata/widths/residual/{name} is {told}, d_model is {sizes.d_model}"
    for key, allowed in (("internals", _PARTS), ("projections", (*_PARTS, "neurons"))):
        yield from (f"{key}/{name} is not expected" for name in record[key] if name not in allowed)
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
            if not isinstance(arrays, dict) or group not in (*REQUIRED, "mixer"):
                yield f"internals/{part}/{group} is not expected"
                continue
            for name, array in arrays.items():
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
    "residual": _RESIDUAL,
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
    yield from (f"{place}/{name} is not expected" for name in node if name not in shapes)
    for name, shape in shapes.items():
        if name in node:
            yield from _shape(node[name], f"{place}/{name}", shape, "n_tokens and n_heads")
        elif f"projections/{name}" not in absent:
            yield f"{place}/{name} is missing, and metadata/absent gives no reason"


def _json_problems(path: Path, record: Record) -> list[str]:
    """Where the JSON beside a record says something else."""
    try:
        if _is_as_written(path, record):
            return []
        beside = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror or error}"]
    except (ValueError, RecursionError) as error:
        return [f"{path} is no JSON: {error}"]
    return [f"{path.name} disagrees: {difference}" for difference in _differences(record, beside, "")]


def _is_as_written(path: Path, record: Record) -> bool:
    """Whether a file has, byte for byte, the JSON that is written of a record: of long prompts it is large, and need
    then not be read into lists."""
    with path.open("rb") as file, suppress(ValueError):
        return all(file.read(len(part)) == part for part in json_parts(record)) and not file.read(1)
    return False


def _differences(expected: Any, got: Any, place: str) -> Iterator[str]:
    if isinstance(expected, np.ndarray):
        yield from _other_numbers(expected, got, place)
    elif isinstance(expected, dict) and isinstance(got, dict):
        for key in sorted(set(expected) | set(got)):
            at = f"{place}/{key}" if place else key
            if key not in got or key not in expected:
                yield f"{at} is {'missing' if key not in got else 'not expected'}"
            else:
                yield from _differences(expected[key], got[key], at)
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for i, pair in enumerate(zip(expected, got, strict=True)):
            yield from _differences(*pair, f"{place}/{i}")
    elif isinstance(expected, list) and isinstance(got, list):
        yield f"{place} has {len(got)} entries, expected {len(expected)}"
    elif expected != got or isinstance(expected, bool) != isinstance(got, bool):
        yield f"{place} is {got!r:.60}, expected {expected!r:.60}"


def _other_numbers(expected: np.ndarray, got: Any, place: str) -> Iterator[str]:
    """The first number that lists hold in another way than an array, in the array's own precision."""
    try:
        numbers = np.array(got)
    except ValueError:
        yield f"{place} is no array: its lists differ in length"
        return
    if expected.size == 0:
        if got != expected.tolist():
            yield f"{place} has {numbers.size} numbers, expected none"
    elif numbers.shape != expected.shape:
        yield f"{place} has the shape {_tuple(numbers.shape)}, expected {_tuple(expected.shape)}"
    elif numbers.dtype.kind not in "iuf":
        yield f"{place} holds something else than numbers"
    else:
        with np.errstate(over="ignore"):
            kept = numbers.astype(np.float32) if expected.dtype == np.float32 else numbers
        if not np.array_equal(kept, expected):
            at = np.argwhere(kept != expected)[0]
            where = "/".join(map(str, (place, *at)))
            yield f"{where} is {numbers[tuple(at)]}, expected {expected[tuple(at)]}"
