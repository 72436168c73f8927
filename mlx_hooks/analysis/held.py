"""What an activation cache, or a mapping of arrays, holds for an analysis: values of stream width, by key."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from .. import hook_points
from ..activations import ActivationCache
from ..contributions import HeadParts
from ..errors import HookError
from ..hook_points import CacheKey, HookPoint
from ..model import HookedModel

_RAW = ("batch", "pos", "feature")
"""The axes of a raw module's value that has the shape of a stream."""

Activations = ActivationCache | Mapping[str, mx.array | np.ndarray]


@dataclass(frozen=True)
class StreamValue:
    """A value that has the width of the stream.

    Args:
        key: what it was asked by, with numbers in the place of placeholders.
        point: its canonical name.
        layer: the block's index, None outside the blocks.
        head: the query head, where it is one head's part.
        array: [batch, pos, d_model], or as the architecture has its streams.
        positions: the absolute positions along its position axis; None where they are not known.
    """

    key: str
    point: str
    layer: int | None
    head: int | None
    array: mx.array
    positions: Sequence[int] | None

    def chunks(self, length: int) -> "Iterator[StreamValue]":
        """The value in parts of at most so many positions; whole, where it has an axis of streams."""
        if self.positions is None or self.array.ndim != 3 or len(self.positions) <= length:
            yield self
            return
        for start in range(0, len(self.positions), length):
            stop = start + length
            yield replace(self, array=self.array[:, start:stop], positions=self.positions[start:stop])


class Held:
    """The activations of a run, as an analysis of one model reads them.

    Args:
        model: that they were captured from.
        activations: an activation cache, or a mapping from hook-point names to arrays, MLX's or NumPy's.

    Raises:
        HookError: for what is neither, for a mapping without any hook point of the model's, and for an array that has
            not the axes of its hook point.
    """

    def __init__(self, model: HookedModel, activations: Activations) -> None:
        if not isinstance(activations, Mapping):
            raise HookError(
                f"activations is an activation cache or a mapping of arrays, got {type(activations).__name__}."
            )
        self.model = model
        self.activations: Mapping[str, mx.array]
        # Of one value only: its heads are read one after the other.
        self._parts: tuple[str, HeadParts] | None = None
        if isinstance(activations, ActivationCache):
            self.activations = activations
            self.points = {name: records[0].hook_point for name, records in activations.records.items()}
            return
        arrays = {_name(key): value for key, value in activations.items()}
        self.points = {name: p for name in arrays if (p := self._point(name)) is not None}
        if not self.points:
            keys = f"its keys are {', '.join(map(repr, list(arrays)[:5]))}" if arrays else "it is empty"
            raise HookError(f"activations maps names of hook points to arrays; of the model's there is none: {keys}.")
        self.activations = {name: _array(arrays[name], point) for name, point in self.points.items()}

    def _point(self, name: str) -> HookPoint | None:
        known = self.model.hook_points.get(name) or self._derived_point(name)
        return known if known is not None else self.model.architecture.locate(name)

    def _derived_point(self, name: str) -> HookPoint | None:
        """The point of what each head adds, which no module emits."""
        for layer in range(self.model.cfg.n_layers):
            point = hook_points.block_point("result", layer)
            if point.name == name:
                sizes = (None, None, self.model.architecture.n_query_heads(layer), self.model.cfg.d_model)
                return replace(point, sizes=sizes)
        return None

    def __contains__(self, name: str) -> bool:
        return name in self.points

    def array(self, name: str) -> mx.array:
        """The value at a hook point.

        Raises:
            HookError: says what to capture, where it is not there.
        """
        if name not in self.points:
            raise HookError(f"The activations lack {name}: capture it too. They hold {', '.join(self.points)}.")
        return self.activations[name]

    def positions(self, name: str) -> Sequence[int] | None:
        """Absolute positions along the position axis of ``array(name)``; None where they are not known."""
        return self.activations.positions(name) if isinstance(self.activations, ActivationCache) else None

    def heads(self, name: str) -> Sequence[int] | None:
        """The heads that ``array(name)`` holds along its head axis; None for all, or where it has no such axis."""
        return self.activations.heads(name) if isinstance(self.activations, ActivationCache) else None

    def listed_positions(self, name: str) -> Sequence[int]:
        """``positions(name)``; where they are not known, places along the axis, from 0."""
        value = self.array(name)
        known = self.positions(name)
        return known if known is not None else range(value.shape[self._axes(name).index("pos")])

    def _axes(self, name: str) -> Sequence[str]:
        return self.points[name].axes or _RAW

    def check_one_run(self, name: str, other: str) -> None:
        """Refuse arrays of unlike batches or positions, of which nothing else is known.

        Raises:
            HookError: says what each holds.
        """
        if isinstance(self.activations, ActivationCache):
            return
        own, others = (self._size_of_run(self.array(n), self._axes(n)) for n in (name, other))
        if any(size != others[axis] for axis, size in own.items()):
            holds, held = (", ".join(f"{axis} {size}" for axis, size in sizes.items()) for sizes in (own, others))
            raise HookError(f"{name} holds {holds} and {other} {held}: they are of one run.")

    @staticmethod
    def _size_of_run(value: mx.array, axes: Sequence[str]) -> dict[str, int]:
        return {axis: size for axis, size in zip(axes, value.shape, strict=False) if axis in ("batch", "pos")}

    def rows(self, name: str, positions: Sequence[int] | None) -> mx.array:
        """``array(name)`` at these absolute positions (None: all that there are).

        Raises:
            HookError: when it was captured at others.
        """
        value = self.array(name)
        held = self.listed_positions(name)
        if positions is None or list(positions) == list(held):
            return value
        missing = sorted(set(positions) - set(held))
        if missing:
            raise HookError(f"{name} was not captured at position {missing[0]}: capture it at the same positions.")
        at = mx.array([list(held).index(position) for position in positions])
        return mx.take(value, at, axis=self._axes(name).index("pos"))

    def stream_values(self, pattern: str) -> Iterator[StreamValue]:
        """The values that a key or a pattern of keys means, by layer and head; see :func:`hook_points.expand_key`.

        Raises:
            UnknownHookError: for a key that means nothing here; lists what there is.
            HookError: for a value that has not the width of the stream.
        """
        return (self._value(spelled, key) for spelled, key in hook_points.expand_key(pattern, self.points))

    def _value(self, spelled: str, key: CacheKey) -> StreamValue:
        if key.name not in self.points:
            return self._derived_value(spelled, key)
        point = self.points[key.name]
        value, axes = self.array(key.name), point.axes
        if axes == hook_points.PER_HEAD and key.head is not None:
            heads = self.heads(key.name)
            value = value[..., list(heads).index(key.head) if heads is not None else key.head, :]
            axes = hook_points.RESID
        allowed = (hook_points.RESID, hook_points.PER_HEAD, _RAW, self.model.last_stream.axes)
        if axes not in allowed or key.derived is not None or value.shape[-1] != self.model.cfg.d_model:
            raise self._other_width(spelled, axes, value)
        return StreamValue(spelled, key.name, point.layer, key.head, value, self.positions(key.name))

    def _derived_value(self, spelled: str, key: CacheKey) -> StreamValue:
        """What the heads of a layer add, or one of them, made of what they hold."""
        layer = int(key.name.split(".")[1])
        if key.name != hook_points.block_point("result", layer).name:
            raise HookError(f"{spelled} is not held: HookedModel.forward with extract_head_values_projected keeps it.")
        source = self.model.head_input(layer)
        if self._parts is None or self._parts[0] != source:
            self._parts = source, self.model.head_path(layer).parts(self.array(source))
        parts = self._parts[1]
        value = parts.all() if key.head is None else parts.of(key.head)
        return StreamValue(spelled, key.name, layer, key.head, value, self.positions(source))

    def _other_width(self, spelled: str, axes: Sequence[str], value: mx.array) -> HookError:
        return HookError(
            f"{spelled} is {', '.join(axes) or 'of unnamed axes'}, shape {tuple(value.shape)}: a lens reads what "
            f"has the width of the stream, {self.model.cfg.d_model}."
        )


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise HookError(f"activations maps names of hook points to arrays, got the key {key!r}.")
    return hook_points.canonical_name(key)


def _array(given: Any, point: HookPoint) -> mx.array:
    """An array as MLX's, with the axes of its hook point."""
    numbers = isinstance(given, np.ndarray) and given.dtype.kind in "biuf"
    if not numbers and not isinstance(given, mx.array):
        raise HookError(
            f"activations maps names of hook points to arrays, got {type(given).__name__} for {point.name}."
        )
    array = mx.array(given)
    if point.axes and array.ndim != len(point.axes):
        raise HookError(f"{point.name} is [{', '.join(point.axes)}], got an array of shape {tuple(array.shape)}.")
    for axis, size, known in zip(point.axes, array.shape, point.sizes, strict=False):
        if known is not None and size != known:
            raise HookError(f"{point.name} has {axis} {known}, got an array of shape {tuple(array.shape)}.")
    return array
