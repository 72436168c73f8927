"""The numbers that an intervention puts in: given ones, captured ones and means."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..activations import ActivationCache, CapturedActivation, join, scalar
from ..architectures import ModelConfig
from ..errors import HookError
from ..hook_points import POSITION_AXES, HookPoint
from .reading import Chosen, numbers_of
from .spec import Intervention


@dataclass(frozen=True)
class Given:
    """Numbers to put in: ``array`` is aligned at the last axis of the value and float32.

    ``whole`` numbers have the sizes of the whole value, others those of the selection. ``positions`` are the absolute
    ones of the rows, None where one row serves all or the selection lists them.
    """

    array: mx.array
    whole: bool = False
    positions: Chosen | None = None


def given_at(asked: Intervention, point: HookPoint) -> Given | None:
    """The numbers of an intervention at a point, as an MLX array."""
    numbers = asked.values if asked.values is not None else asked.vector
    if numbers is not None:
        return Given(mx.array(np.asarray(numbers)))
    return None if asked.source is None else _from_source(asked.source, point)


def _from_source(source: Any, point: HookPoint) -> Given:
    """A capture, at the position axis of the point that is edited."""
    axes = point.axes
    if isinstance(source, ActivationCache):
        if point.name not in source.records:
            raise HookError(f"the source holds no {point.name}.")
        source = source.records[point.name]
    if isinstance(source, mx.array | np.ndarray):
        axes = axes or ("batch", "pos", "feature")
        array = mx.array(numbers_of("source", source, masks=True))
        at = next((i for i, name in enumerate(axes) if name in POSITION_AXES), None)
        if at is None or array.ndim not in (len(axes), len(axes) - (axes[0] == "batch")):
            raise HookError(f"source is an array of shape {array.shape}, expected the axes {', '.join(axes)}.")
        return _whole(array, range(array.shape[at - len(axes)]), point)
    records = [_record(one) for one in (source if isinstance(source, Sequence) else [source])]
    if len({record.hook_point.name for record in records}) > 1:
        raise HookError("the records of a source are of one hook point.")
    record = join(records)
    if record.hook_point.axes != axes and (axes or record.hook_point.axes != ("batch", "pos", "feature")):
        theirs, ours = ", ".join(record.hook_point.axes) or "none", ", ".join(axes) or "none"
        raise HookError(f"the source has axes {theirs} ({record.hook_point.name}), the hook point {ours}.")
    positions = record.position_ids
    return _whole(record.value, positions if isinstance(positions, range) else tuple(positions), point)


def _whole(array: mx.array, positions: Chosen, point: HookPoint) -> Given:
    array = array.astype(mx.float32)
    finite = mx.isfinite(array)
    if is_scores(point):
        finite = finite | (array == -mx.inf)
    if not scalar(finite.all()):
        raise HookError("the source holds numbers that are not finite.")
    return Given(array, whole=True, positions=positions)


def _record(given: Any) -> CapturedActivation:
    """A captured activation, or a record ``{"hook_point", "axes", "positions": [start, stop], "data"}`` as one."""
    if isinstance(given, CapturedActivation):
        if not given.hook_point.axes and given.value.ndim != 3:
            raise HookError(f"the source's {given.hook_point.name} has no named axes.")
        return given
    if not isinstance(given, Mapping):
        raise HookError(f"a record of a source is a mapping, got {type(given).__name__}.")
    missing = [key for key in ("hook_point", "axes", "positions", "data") if key not in given]
    if missing:
        raise HookError(f"a record of a source lacks {missing[0]!r}.")
    if isinstance(given["data"], str):
        raise HookError("the data of a record is encoded: decode it with neuroscope_bridge.decode_activation.")
    data = numbers_of("data", given["data"], masks=True)
    axes, span = given["axes"], given["positions"]
    if not isinstance(axes, Sequence) or len(axes) != data.ndim or not all(isinstance(name, str) for name in axes):
        raise HookError(f"a record of a source has {data.ndim} axes of data, its axes are {axes!r}.")
    at = next((i for i, name in enumerate(axes) if name in POSITION_AXES), None)
    fits = isinstance(span, Sequence) and len(span) == 2 and all(type(p) is int and p >= 0 for p in span)
    if at is None or not fits or span[1] - span[0] != data.shape[at]:
        raise HookError(f"positions of a record are [start, stop], one per row of its data, got {span!r}.")
    component = "attn_scores" if "attn_scores" in str(given["hook_point"]) else ""
    point = HookPoint(str(given["hook_point"]), None, component, tuple(axes))
    return CapturedActivation(point, mx.array(data), range(*span), "prefill", 0)


def means_over(caches: Iterable[ActivationCache], points: Sequence[HookPoint]) -> dict[str, Given]:
    """The mean at each point over all positions of all runs; by position where the last axis runs over keys."""
    sums: dict[str, mx.array] = {}
    counts: dict[str, int] = {}
    for cache in caches:
        for point in points:
            record = join(cache.records[point.name])
            axes = record.hook_point.axes
            if "pos" not in axes and "query" not in axes:
                raise HookError(f"{point.name} has no axis over positions to take a mean over.")
            value = record.value.astype(mx.float32)
            over = [i for i, name in enumerate(axes) if name == "batch" or (name == "pos" and axes[-1] != "key")]
            total = value.sum(axis=over, keepdims=True)
            if point.name in sums and sums[point.name].shape != total.shape:
                raise HookError(f"prompts of different lengths have no common mean at {point.name}: give one length.")
            sums[point.name] = total + sums[point.name] if point.name in sums else total
            counts[point.name] = counts.get(point.name, 0) + math.prod(value.shape[i] for i in over)
        mx.eval(*sums.values())
    given = {}
    for point in points:
        mean = sums[point.name] / counts[point.name]
        by_key = bool(point.axes) and point.axes[-1] == "key"
        given[point.name] = Given(mean, whole=True, positions=range(mean.shape[-2]) if by_key else None)
    return given


def holds_tokens(point: HookPoint) -> bool:
    """Whether the values are token ids."""
    return point.component == "embed_in"


def is_scores(point: HookPoint) -> bool:
    """Whether -inf, a masked key, may be among the values."""
    return point.component == "attn_scores"


def are_tokens(numbers: np.ndarray, cfg: ModelConfig) -> bool:
    """Whether all numbers are ids of the vocabulary."""
    return bool(((numbers == np.floor(numbers)) & (numbers >= 0) & (numbers < cfg.d_vocab)).all())
