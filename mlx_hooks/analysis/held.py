"""What an activation cache, or a mapping of arrays, holds for an analysis: values of stream width, by key."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from .. import hook_points
from ..activations import ActivationCache
from ..errors import HookError
from ..hook_points import CacheKey, HookPoint
from ..model import HookedModel

_RAW = ("batch", "pos", "feature")
"""The axes of a raw module's value that has the shape of a stream."""

Activations = ActivationCache | Mapping[str, mx.array]


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
        activations: an activation cache, or a mapping from hook-point names to arrays.

    Raises:
        HookError: for what is neither.
    """

    def __init__(self, model: HookedModel, activations: Activations) -> None:
        if not isinstance(activations, Mapping):
            raise HookError(
                f"activations is an activation cache or a mapping of arrays, got {type(activations).__name__}."
            )
        self.model = model
        self.activations = activations
        if isinstance(activations, ActivationCache):
            self.points = {name: records[0].hook_point for name, records in activations.records.items()}
            self._names = {name: name for name in self.points}
        else:
            self._names = {hook_points.canonical_name(name): name for name in activations}
            self.points = {name: p for name in self._names if (p := self._point(name)) is not None}

    def _point(self, name: str) -> HookPoint | None:
        known = self.model.hook_points.get(name)
        return known if known is not None else self.model.architecture.locate(name)

    def __contains__(self, name: str) -> bool:
        return name in self.points

    def array(self, name: str) -> mx.array:
        """The value at a hook point.

        Raises:
            HookError: says what to capture, where it is not there.
        """
        if name not in self.points:
            raise HookError(f"The activations lack {name}: capture it too. They hold {', '.join(self.points)}.")
        return self.activations[self._names[name]]

    def positions(self, name: str) -> Sequence[int] | None:
        """Absolute positions along the position axis of ``array(name)``; None where they are not known."""
        return self.activations.positions(name) if isinstance(self.activations, ActivationCache) else None

    def rows(self, name: str, positions: Sequence[int] | None) -> mx.array:
        """``array(name)`` at these absolute positions (None: all that there are).

        Raises:
            HookError: when it was captured at others.
        """
        value, held = self.array(name), self.positions(name)
        if positions is None or held is None or list(positions) == list(held):
            return value
        missing = sorted(set(positions) - set(held))
        if missing:
            raise HookError(f"{name} was not captured at position {missing[0]}: capture it at the same positions.")
        at = mx.array([list(held).index(position) for position in positions])
        return mx.take(value, at, axis=self.points[name].position_axis)

    def stream_values(self, pattern: str) -> list[StreamValue]:
        """The values that a key or a pattern of keys means, by layer and head; see :func:`hook_points.expand_key`.

        Raises:
            UnknownHookError: for a key that means nothing here; lists what there is.
            HookError: for a value that has not the width of the stream.
        """
        return [self._value(spelled, key) for spelled, key in hook_points.expand_key(pattern, self.points)]

    def _value(self, spelled: str, key: CacheKey) -> StreamValue:
        point = self.points.get(key.name)
        layer: int | None
        axes: tuple[str, ...]
        if point is None:
            # A derived point, which is made of what its layer's heads hold.
            layer = int(key.name.split(".")[1])
            source = self.model.head_input(layer)
            value, axes = self.model.head_results(self.array(source), layer), hook_points.PER_HEAD
            heads = None
        else:
            source, layer, axes = key.name, point.layer, point.axes
            value, heads = self.array(key.name), self._heads(key.name)
        if axes == hook_points.PER_HEAD and key.head is not None:
            value = value[..., list(heads).index(key.head) if heads is not None else key.head, :]
            axes = hook_points.RESID
        allowed = (hook_points.RESID, hook_points.PER_HEAD, _RAW, self.model.last_stream.axes)
        if axes not in allowed or key.derived is not None or value.shape[-1] != self.model.cfg.d_model:
            raise HookError(
                f"{spelled} is {', '.join(axes) or 'of unnamed axes'}, shape {tuple(value.shape)}: a lens reads what "
                f"has the width of the stream, {self.model.cfg.d_model}."
            )
        return StreamValue(spelled, key.name, layer, key.head, value, self.positions(source))

    def _heads(self, name: str) -> Sequence[int] | None:
        return self.activations.heads(name) if isinstance(self.activations, ActivationCache) else None
