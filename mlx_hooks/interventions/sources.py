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
from ..hooks import head_indices
from .reading import Chosen, chosen_of, count, numbers_of, span
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


@dataclass(frozen=True)
class Supply:
    """The numbers to put in at a hook point, by pass through the layer (0 alone where it runs once).

    With ``for_all`` there is one entry, which serves every pass.
    """

    by_pass: Mapping[int, Given]
    for_all: bool = False

    def at(self, index: int, passes: Chosen | None) -> Given:
        """The numbers for one pass, of which ``passes`` are edited (None: all).

        Raises:
            HookError: when there are numbers of other passes only.
        """
        if len(self.by_pass) == 1:
            if self.for_all or index == 0 or _is_one(passes):
                return next(iter(self.by_pass.values()))
            raise HookError(
                "the source is of one pass, and this layer runs several times in a forward pass: limit passes to one, "
                "or give a source with all of them."
            )
        if index not in self.by_pass:
            raise HookError(f"the source has passes {span(sorted(self.by_pass))}, not {index}: limit passes to those.")
        return self.by_pass[index]

    def due(self, passes: Chosen | None) -> list[Given]:
        """The numbers that a run may come to put in, when ``passes`` are edited (None: all)."""
        alone = len(self.by_pass) == 1
        return [given for index, given in self.by_pass.items() if alone or passes is None or index in passes]


def _is_one(passes: Chosen | None) -> bool:
    return passes is not None and count(passes, None) == 1


def supply_at(asked: Intervention, point: HookPoint) -> Supply | None:
    """The numbers of an intervention at a point, as MLX arrays."""
    numbers = asked.values if asked.values is not None else asked.vector
    if numbers is not None:
        return Supply({0: Given(mx.array(np.asarray(numbers)))}, for_all=True)
    return None if asked.source is None else _from_source(asked.source, point)


def _from_source(source: Any, point: HookPoint) -> Supply:
    """A capture, at the position axis of the point that is edited."""
    axes = point.axes
    if isinstance(source, ActivationCache):
        if point.name not in source.records:
            raise HookError(f"the source holds no {point.name}.")
        source = source.records[point.name]
    if isinstance(source, mx.array | np.ndarray):
        axes = axes or ("batch", "pos", "feature")
        array = mx.array(numbers_of("source", source, masks=True))
        if is_state(point):
            return Supply({0: _whole(array, None, point)})
        at = next((i for i, name in enumerate(axes) if name in POSITION_AXES), None)
        if at is None or array.ndim not in (len(axes), len(axes) - (axes[0] == "batch")):
            raise HookError(f"source is an array of shape {array.shape}, expected the axes {', '.join(axes)}.")
        return Supply({0: _whole(array, range(array.shape[at - len(axes)]), point)})
    records = [_record(one) for one in (source if isinstance(source, Sequence) else [source])]
    if len({record.hook_point.name for record in records}) > 1:
        raise HookError("the records of a source are of one hook point.")
    return Supply({index: _from_records(own, point) for index, own in _by_pass(records).items()})


def _by_pass(records: Iterable[CapturedActivation]) -> dict[int, list[CapturedActivation]]:
    """The records of each pass through a layer."""
    passes: dict[int, list[CapturedActivation]] = {}
    for record in records:
        passes.setdefault(record.pass_index, []).append(record)
    return passes


def _from_records(records: Sequence[CapturedActivation], point: HookPoint) -> Given:
    """Records of one pass, at the point that is edited."""
    for one in records:
        if one.reduce is not None:
            raise HookError(
                f"the source was reduced to its {one.reduce}: capture {one.hook_point.name} without reduce."
            )
        if one.heads is not None:
            held = ", ".join(map(str, one.heads))
            raise HookError(f"the source holds heads {held} only: capture {one.hook_point.name} without heads.")
    axes, record = point.axes, join(records)
    if is_state(point) and is_state(record.hook_point):
        return _whole(record.value, None, point)
    if record.hook_point.axes != axes and (axes or record.hook_point.axes != ("batch", "pos", "feature")):
        theirs, ours = ", ".join(record.hook_point.axes) or "none", ", ".join(axes) or "none"
        raise HookError(f"the source has axes {theirs} ({record.hook_point.name}), the hook point {ours}.")
    positions = record.position_ids
    return _whole(record.value, positions if isinstance(positions, range) else tuple(positions), point)


def _whole(array: mx.array, positions: Chosen | None, point: HookPoint) -> Given:
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
    reduce, heads = given.get("reduce"), given.get("heads")
    if reduce is not None:
        raise HookError(f"the source was reduced to its {reduce}: capture {given['hook_point']} without reduce.")
    listed = chosen_of("position_ids of a record", given.get("position_ids"))
    positions = listed if listed is not None else range(*span) if fits else ()
    if at is None or not fits or len(positions) != data.shape[at]:
        shown = f"{span!r}" if listed is None else f"{span!r} and position_ids {given['position_ids']!r}"
        raise HookError(f"positions of a record are [start, stop], one per row of its data, got {shown}.")
    component = "attn_scores" if "attn_scores" in str(given["hook_point"]) else ""
    point = HookPoint(str(given["hook_point"]), None, component, tuple(axes))
    index = given.get("pass_index", 0)
    if type(index) is not int or index < 0:
        raise HookError(f"pass_index of a record is a whole number from 0 up, got {index!r}.")
    held = None if heads is None else head_indices(heads)
    return CapturedActivation(point, mx.array(data), positions, "prefill", 0, pass_index=index, heads=held)


def means_over(caches: Iterable[ActivationCache], points: Sequence[HookPoint]) -> dict[str, Supply]:
    """The mean at each point over all positions of all runs; by position where the last axis runs over keys.

    Each pass through a layer has a mean of its own.
    """
    sums: dict[tuple[str, int], mx.array] = {}
    counts: dict[tuple[str, int], int] = {}
    for cache in caches:
        passes = [(point, own) for point in points for own in _by_pass(cache.records[point.name]).items()]
        for point, (index, records) in passes:
            place, record = (point.name, index), join(records)
            axes = record.hook_point.axes
            if "pos" not in axes and "query" not in axes:
                raise HookError(f"{point.name} has no axis over positions to take a mean over.")
            value = record.value.astype(mx.float32)
            over = [i for i, name in enumerate(axes) if name == "batch" or (name == "pos" and axes[-1] != "key")]
            total = value.sum(axis=over, keepdims=True)
            if place in sums and sums[place].shape != total.shape:
                raise HookError(f"prompts of different lengths have no common mean at {point.name}: give one length.")
            sums[place] = total + sums[place] if place in sums else total
            counts[place] = counts.get(place, 0) + math.prod(value.shape[i] for i in over)
        mx.eval(*sums.values())
    by_key = {point.name: bool(point.axes) and point.axes[-1] == "key" for point in points}
    means: dict[str, dict[int, Given]] = {point.name: {} for point in points}
    for (name, index), total in sums.items():
        mean = total / counts[name, index]
        means[name][index] = Given(mean, whole=True, positions=range(mean.shape[-2]) if by_key[name] else None)
    return {name: Supply(by_pass) for name, by_pass in means.items()}


def holds_tokens(point: HookPoint) -> bool:
    """Whether the values are token ids."""
    return point.component == "embed_in"


def is_state(point: HookPoint) -> bool:
    """Whether the value is what a call leaves for the next one, with no axis over positions."""
    return point.component == "mixer_state"


def is_scores(point: HookPoint) -> bool:
    """Whether -inf, a masked key, may be among the values."""
    return point.component == "attn_scores"


def are_tokens(numbers: np.ndarray, cfg: ModelConfig) -> bool:
    """Whether all numbers are ids of the vocabulary."""
    return bool(((numbers == np.floor(numbers)) & (numbers >= 0) & (numbers < cfg.d_vocab)).all())
