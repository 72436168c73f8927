"""What a saved run says of itself: its names, and plain JSON of what it was made with."""

import hashlib
import json
import math
import re
import secrets
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from importlib import metadata as packages
from typing import Any

import mlx.core as mx
import numpy as np

from ..activations import ActivationCache, CapturedActivation, to_numpy
from ..errors import HookError
from ..extraction import ExtractionConfig, listed
from ..hook_points import canonical_name, component_points, is_layer_glob
from ..interventions import EditingFunction, Intervention

EVERY_EXPERIMENT = "*"
MADE_WITH = (
    "model_name",
    "target_token_positions",
    "pivot_positions",
    "interventions",
    "extraction_config",
    "model",
)
"""The keys of metadata.json that say how a run was made."""
RESERVED = ("format", "run_id", "tag", "save_time", "experiment_name", *MADE_WITH, "versions", "keys")
"""The keys of metadata.json that are ours; all others are the caller's custom keys."""
_SHOWN_NUMBERS = 64
"""An intervention's array of up to as many numbers is written out; of a larger one a hash is kept."""
_LONGEST_NAME = 100
_LONGEST_NAME_IN_BYTES = 200
"""Folders' names have up to 255 bytes, and what is being written has a longer one."""
_PARTS_OF_A_TIME = (
    r"(\d{4})",
    r"-(\d\d)",
    r"-(\d\d)",
    r"[ T_](\d\d)",
    r"[:_-](\d\d)",
    r"[:_-](\d\d)",
    r"[.-](\d{1,6})",
)
# What follows it: a zone, or what tells a run from others of its time.
_TIME = re.compile(
    "(?:".join(_PARTS_OF_A_TIME) + r"(?:Z|[+-]\d\d:\d\d|-[0-9a-f]{8})?" + ")?" * (len(_PARTS_OF_A_TIME) - 1)
)


def check_name(what: str, name: Any) -> str:
    """A name that may be one folder's.

    Raises:
        HookError: says what is allowed.
    """
    is_name = isinstance(name, str) and re.fullmatch(r"[^\W_][\w .,+=@()-]*", name)
    if not is_name or len(name) > _LONGEST_NAME or len(name.encode()) > _LONGEST_NAME_IN_BYTES:
        raise HookError(
            f"{what} is a text of up to {_LONGEST_NAME} letters ({_LONGEST_NAME_IN_BYTES} bytes in UTF-8), digits, "
            f"spaces and any of _ . , + = @ ( ) -, which begins with a letter or digit; got {name!r}."
        )
    if name != name.strip() or name.endswith("."):
        raise HookError(f"{what} ends with no space or full stop, got {name!r}.")
    return name


def check_tag(tag: Any) -> str:
    """A run's tag.

    Raises:
        HookError: says what is allowed.
    """
    if not isinstance(tag, str) or not tag.strip() or re.search(r"[/\\\x00-\x1f\x7f]", tag) or tag in (".", ".."):
        raise HookError(f"A tag is a text without / and \\ and control characters, or None, got {tag!r}.")
    return check_text("A tag", tag)


def check_text(what: str, text: str) -> str:
    """A text that can be written.

    Raises:
        HookError: there is half a character in it.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise HookError(
            f"{what} is a text in Unicode, got {text!r:.80}, which has half a character (a surrogate)."
        ) from None
    return text


def model_folder(model_name: str) -> str:
    """The name of a model's folder: ``mistralai/Mistral-7B-v0.1`` -> ``mistralai_Mistral-7B-v0.1``."""
    safe = re.sub(r"[^\w.+=-]", "_", model_name).strip("._")
    if len(safe.encode()) > _LONGEST_NAME:
        end = safe.encode()[-_LONGEST_NAME + 9 :].decode(errors="ignore").lstrip("._")
        safe = f"{end}_{hashlib.sha256(model_name.encode()).hexdigest()[:8]}"
    return safe or "model"


_latest = datetime.fromtimestamp(0).astimezone()
_clock = threading.Lock()


def now() -> datetime:
    """The time, with its zone; later at each call of this process, though the clock stands still or goes back."""
    global _latest
    with _clock:
        time = datetime.now().astimezone()
        # A clock that was set back for good is not followed for ever: a second is more than its ticks need.
        if timedelta() <= _latest - time < timedelta(seconds=1):
            time = _latest + timedelta(microseconds=1)
        _latest = time
        return time


def run_id(time: datetime) -> str:
    """The name of a run's folder: its time, which nobody else shares by the digits that follow it."""
    return f"{time:%Y-%m-%d_%H-%M-%S}-{time.microsecond:06d}-{secrets.token_hex(4)}"


def digits(time: str) -> str:
    """The digits of a time however it is written, to compare by their beginning: ``2023-04-15 14:30`` -> 202304151430.

    Raises:
        HookError: for what is no time, or the beginning of one.
    """
    match = _TIME.fullmatch(time) if isinstance(time, str) else None
    if match is None:
        raise HookError(f"A time is written '2023-04-15_14-30-25', or as its beginning ('2023-04-15'), got {time!r}.")
    return "".join(filter(None, match.groups()))


def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    found = {}
    for name in ("mlx", "mlx-lm", "neuroscope-mlx"):
        try:
            found[name] = packages.version(name)
        except packages.PackageNotFoundError:
            # Run from a checkout that was never installed.
            found[name] = "unknown"
    return found


def plain_positions(positions: Any) -> list[Any] | None:
    """Target positions as JSON; None where nobody knows them.

    Raises:
        HookError: for what is no position.
    """
    return None if positions is None else [_plain_position(wish) for wish in listed(positions)]


def _plain_position(wish: Any) -> Any:
    if isinstance(wish, slice):
        return {"start": wish.start, "stop": wish.stop, "step": wish.step}
    if isinstance(wish, tuple):
        return [plain(end, "target_token_positions") for end in wish]
    return plain(wish, "target_token_positions")


def plain_pivots(pivots: Any) -> Any:
    """Pivots as JSON, of a list or an array; None where there are none.

    Raises:
        HookError: for a value that JSON does not have.
    """
    return plain(pivots.tolist() if hasattr(pivots, "tolist") else pivots, "pivot_positions")


def plain_config(config: ExtractionConfig | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """An extraction configuration as JSON."""
    return None if config is None else plain(ExtractionConfig.of(config).to_dict(), "extraction_config")


def plain_interventions(interventions: Any) -> list[dict[str, Any]]:
    """Interventions as JSON, in their order. Of large arrays and of captures a hash is kept, not the numbers.

    A place has one name, whichever of its names it was given.

    Raises:
        HookError: for what is no intervention.
    """
    if interventions is None:
        return []
    if hasattr(interventions, "asked"):
        interventions = [intervention for intervention, _ in interventions.asked]
    if isinstance(interventions, str | Mapping | Intervention) or not isinstance(interventions, Sequence):
        raise HookError(f"interventions is a list of interventions or mappings, got {interventions!r}.")
    return [_plain_intervention(spec) for spec in interventions]


def _plain_intervention(spec: Any) -> dict[str, Any]:
    if isinstance(spec, EditingFunction):
        return spec.to_dict()
    if isinstance(spec, Mapping):
        has_hash = any(isinstance(part, Mapping) and "sha256" in part for part in spec.values())
        if has_hash or spec.get("type") == "function":
            # As it was saved once: the numbers, or the function, are gone.
            return plain(spec, "interventions")
    intervention = Intervention.of(spec)
    given = {f.name: getattr(intervention, f.name) for f in fields(intervention)} | _place(intervention)
    changed = {f.name: given[f.name] for f in fields(intervention) if given[f.name] is not f.default}
    return {name: _plain_part(name, value) for name, value in changed.items()}


def _place(intervention: Intervention) -> dict[str, str]:
    """The fields that say where: the hook point, where its name does not depend on the model."""
    layer, component = intervention.layer_name, intervention.component
    if intervention.hook_point:
        return {"hook_point": canonical_name(intervention.hook_point)}
    if is_layer_glob(layer) or component == "layernorm":
        return {}
    # Which layers there are is for the model to say.
    (point,) = component_points(layer, component, is_input=False, n_layers=sys.maxsize)
    return {"hook_point": point.name, "layer_name": "", "component": ""}


def _plain_part(name: str, value: Any) -> Any:
    if isinstance(value, range):
        return {"start": value.start, "stop": value.stop}
    if isinstance(value, mx.array):
        value = to_numpy(value)
    if isinstance(value, np.ndarray):
        return _plain_array(value)
    if isinstance(value, ActivationCache):
        records = [record for of_point in value.records.values() for record in of_point]
        return {"activations": list(value), "sha256": _hash([to_numpy(record.value) for record in records])}
    if isinstance(value, CapturedActivation):
        return {"activations": [value.hook_point.name], "sha256": _hash([value.numpy()])}
    if isinstance(value, Mapping):
        return {str(key): _plain_part(name, part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_part(name, part) for part in value]
    return plain(value, name)


def _plain_array(array: np.ndarray) -> Any:
    if array.size > _SHOWN_NUMBERS:
        return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": _hash([array])}
    # JSON has no -inf; null masks a key in an intervention's own words.
    flat = [number if math.isfinite(number) else None for number in array.ravel().tolist()]
    return np.array(flat, dtype=object).reshape(array.shape).tolist()


def _hash(arrays: list[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def plain_custom(given: Mapping[str, Any] | None, where: str = "other_metadata") -> dict[str, Any]:
    """The caller's own metadata as JSON.

    Args:
        where: the argument's name.

    Raises:
        HookError: for a reserved key, and for a value that JSON does not have.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise HookError(f"{where} is a mapping, got {type(given).__name__}.")
    taken = [key for key in given if key in RESERVED]
    if taken:
        raise HookError(f"{where} has the reserved key {taken[0]!r}. Reserved are {', '.join(RESERVED)}.")
    return plain(given, where)


def plain(value: Any, where: str) -> Any:
    """A value as JSON has it: tuples become lists, NumPy's numbers Python's.

    Raises:
        HookError: says where the value is that JSON does not have.
    """
    try:
        return _plain(value, where)
    except RecursionError as error:
        raise HookError(f"{where} is nested too deeply, or holds itself.") from error


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, str):
        return check_text(where, value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise HookError(f"{where} has the key {key!r}; keys are texts.")
            check_text(f"A key of {where}", key)
        return {key: _plain(part, f"{where}[{key!r}]") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, f"{where}[{i}]") for i, part in enumerate(value)]
    raise HookError(
        f"{where} is {type(value).__name__} {value!r:.80}, which JSON does not have: give texts, finite numbers, true, "
        "false, null, lists or mappings."
    )


def canonical(value: Any) -> str:
    """JSON text, without line breaks, that is equal where the values are: 2 and 2.0 are, true and 1 are not."""
    return json.dumps(_whole(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def canonical_items(values: Mapping[str, Any]) -> list[str]:
    """The items of a mapping, each as the line that only a mapping with an equal item has in ``canonical_lines``."""
    return [f"\n{canonical({key: value})[1:-1]}\n" for key, value in sorted(values.items())]


def canonical_lines(values: Mapping[str, Any]) -> str:
    """JSON text of a mapping with each item on a line of its own, so that one is found without reading the others."""
    return "{" + ",".join(canonical_items(values)) + "}"


def _whole(value: Any) -> Any:
    """A plain value with whole numbers as ints, however they are written."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: _whole(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(part) for part in value]
    return value
