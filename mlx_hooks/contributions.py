"""What the heads of a layer add to the stream, one by one: the linear map from each head's output to ``attn_out``.

Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).

    1. A few tokens run once, and show what lies between ``hook_z`` and ``hook_attn_out`` in each layer: nothing, a
       gate, a norm, a constant factor. What the run does not confirm is refused, with the reason.
    2. A head's result is the output projection of its part alone, less the projection of zero, which is the bias. The
       model's own module projects, so quantised and adapted ones need no special case.
    3. A norm after the projection keeps the statistics that it has for all heads together: so frozen, it is linear.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from .activations import ActivationCache, scalar
from .architectures import Architecture
from .capture import CaptureRun
from .errors import HookError
from .hook_points import HookPoint, block_point
from .hooks import Hook, Recorder
from .instrument import Instrument, plainly


class LinearNorm:
    """A norm apart from its statistics: ``norm(x) = (x [- mean]) * weight * scale(x) + bias``.

    Weight and bias are found by what the norm gives for vectors of length 1 per entry, so that LayerNorm, RMSNorm and
    norms that add 1 to their weight are all read alike; ``freeze`` says so when a norm is none of these.

    Args:
        norm: maps [batch, pos, width] to the same shape.
        width: entries that it takes together, 2 or more.
    """

    def __init__(self, norm: Callable[[mx.array], mx.array], width: int) -> None:
        self._norm = norm
        # Of mean 0, also where the width is odd; what the one leaves out is in the other.
        signs = mx.where(mx.arange(width) % 2 == 0, 1.0, -1.0) * (mx.arange(width) < width - width % 2)
        probes = [signs, mx.roll(signs, 1)]
        up, down = ([self._of(sign * probe) for probe in probes] for sign in (1, -1))
        self.bias = (up[0] + down[0]) / 2
        weights = [(a - b) / 2 * probe for a, b, probe in zip(up, down, probes, strict=True)]
        self.weight = mx.where(probes[0] != 0, weights[0], weights[1])
        level = scalar(mx.abs(self._of(mx.ones(width)) - self.bias).max())
        # A centred norm makes nothing of a level vector: NaN where it has no epsilon.
        self.centred = not level > 1e-3 * scalar(mx.abs(self.weight).max())

    def _of(self, vector: mx.array) -> mx.array:
        return self._given(vector[None, None])[0, 0]

    def _given(self, value: mx.array) -> mx.array:
        norm = self._norm
        return (plainly(norm, value) if isinstance(norm, nn.Module) else norm(value)).astype(mx.float32)

    def freeze(self, value: mx.array) -> "FrozenNorm":
        """The linear map that the norm is at ``value`` [batch, pos, width].

        Raises:
            HookError: when it does not give what the norm gives.
        """
        value = value.astype(mx.float32)
        given = self._given(value)
        spread = self.spread(value)
        squares = mx.maximum((spread * spread).sum(axis=-1, keepdims=True), 1e-30)
        frozen = FrozenNorm(self, ((given - self.bias) * spread).sum(axis=-1, keepdims=True) / squares)
        if not (off := relative_deviation(frozen(value), given)) <= 1e-4:
            raise HookError(
                f"{type(self._norm).__name__} is no norm that scales, or centres and scales, its whole input (off by "
                f"{off:.2g}): its statistics cannot be frozen."
            )
        return frozen

    def spread(self, value: mx.array) -> mx.array:
        """The norm of a value but for its scale and bias."""
        return (value - value.mean(axis=-1, keepdims=True) if self.centred else value) * self.weight


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with the statistics of one value: ``linear`` of parts of the value adds up to ``linear`` of the whole.

    Args:
        norm: weight and bias.
        scale: what is multiplied with at each position [batch, pos, 1].
    """

    norm: LinearNorm
    scale: mx.array

    @property
    def bias(self) -> mx.array:
        """What the norm adds, [width]."""
        return self.norm.bias

    def linear(self, value: mx.array) -> mx.array:
        """The norm of a value [batch, pos, width] without its bias, in float32."""
        return self.norm.spread(value.astype(mx.float32)) * self.scale

    def __call__(self, value: mx.array) -> mx.array:
        return self.linear(value) + self.bias


@dataclass(frozen=True)
class HeadPath:
    """How what the heads of a layer hold becomes what attention adds to the stream.

    Args:
        point: where the value is met that the output projection reads: ``hook_z``, or, behind a gate, its own input.
        n_heads, d_head: how the heads lie in it.
        project: the output projection.
        after: the norm between it and the stream, if there is one.
        factor: what is multiplied with on the way, 1.0 for nearly all models.
    """

    point: HookPoint
    n_heads: int
    d_head: int
    project: nn.Module
    after: nn.Module | None
    factor: float

    def split(self, value: mx.array) -> tuple[mx.array, mx.array]:
        """What each head adds, [..., head, d_model], and what is added whatever they hold, [..., d_model], in float32.

        Args:
            value: of ``point``, all heads of it: [..., head, d_head] or [..., head * d_head].
        """
        parts = self.parts(value)
        return parts.all(), parts.constant

    def parts(self, value: mx.array) -> "HeadParts":
        """The same, a head at a time: a projection is made for each head that is asked for, and for no other."""
        return HeadParts(self, value)

    @property
    def adds_constant(self) -> bool:
        """Whether something is added whatever the heads hold: a bias of the projection, or of the norm behind it."""
        zero = self.project_value(mx.zeros((1, 1, self.n_heads * self.d_head)))
        biases = [zero] if self.after is None else [zero, LinearNorm(self.after, zero.shape[-1]).bias]
        return any(bool(mx.any(bias != 0).item()) for bias in biases)

    def constant_in(self, rest: mx.array) -> mx.array:
        """What is added whatever the heads hold, of a run of which only what was added is known; as ``rest``.

        Args:
            rest: what attention added less what its heads did, [..., d_model]. It is the answer, unless the run was
                edited there: so of it only the scale is read that a norm behind a bias had, and no other difference.
        """
        zero = self.project_value(mx.zeros((1, 1, self.n_heads * self.d_head)))[0, 0]
        if self.after is None:
            return mx.broadcast_to(zero * self.factor, rest.shape)
        norm = LinearNorm(self.after, zero.shape[-1])
        spread = norm.spread(zero)
        along = ((rest / self.factor - norm.bias) * spread).sum(axis=-1, keepdims=True)
        return (along / mx.maximum((spread * spread).sum(), 1e-30) * spread + norm.bias) * self.factor

    def flat(self, value: mx.array) -> mx.array:
        """The value as the projection reads it, [batch, pos, head * d_head], in float32."""
        width = self.n_heads * self.d_head
        by_head = self.point.component == "z" and value.shape[-2:] == (self.n_heads, self.d_head)
        if not by_head and value.shape[-1:] != (width,):
            shape = f"{self.n_heads}, {self.d_head}" if self.point.component == "z" else str(width)
            raise HookError(f"What {self.point.name} holds has the shape [..., {shape}], all heads, got {value.shape}.")
        return value.reshape(1, -1, width).astype(mx.float32)

    def project_value(self, value: mx.array) -> mx.array:
        """The output projection of [batch, pos, head * d_head], in float32."""
        return plainly(self.project, value).astype(mx.float32)


class HeadParts:
    """What the heads of a layer add where they hold a value.

    Args:
        path: the layer's.
        value: of the path's point, all heads of it: [..., head, d_head] or [..., head * d_head].
    """

    def __init__(self, path: HeadPath, value: mx.array) -> None:
        self._path = path
        self._flat = path.flat(value)
        self._zero = path.project_value(mx.zeros_like(self._flat[:, :1]))
        self._lead = value.shape[: -2 if value.shape[-2:] == (path.n_heads, path.d_head) else -1]
        self._frozen: FrozenNorm | None = None
        if path.after is not None:
            self._frozen = LinearNorm(path.after, self._zero.shape[-1]).freeze(path.project_value(self._flat))

    def of(self, head: int) -> mx.array:
        """What one head adds, [..., d_model], in float32."""
        heads = mx.arange(self._flat.shape[-1]) // self._path.d_head
        part = self._path.project_value(mx.where(heads == head, self._flat, 0)) - self._zero
        return self._shaped(part if self._frozen is None else self._frozen.linear(part))

    def all(self) -> mx.array:
        """What each head adds, [..., head, d_model], in float32."""
        return mx.stack([self.of(head) for head in range(self._path.n_heads)], axis=-2)

    @property
    def constant(self) -> mx.array:
        """What is added whatever the heads hold, [..., d_model], in float32."""
        zero = mx.broadcast_to(self._zero, (*self._flat.shape[:2], self._zero.shape[-1]))
        return self._shaped(zero if self._frozen is None else self._frozen(zero))

    def _shaped(self, added: mx.array) -> mx.array:
        return (added * self._path.factor).reshape(*self._lead, -1)


class MlpBiases:
    """The biases that MLPs add to the stream whatever they read, found by running a few tokens once.

    Args:
        instrument: the model's.
    """

    def __init__(self, instrument: Instrument) -> None:
        architecture = instrument.architecture
        self._projections: dict[int, tuple[nn.Module, float]] = {}
        found = []
        for layer in range(architecture.cfg.n_layers):
            projection, added = architecture.output_bias(layer), block_point("mlp_out", layer).name
            if projection is not None and added in architecture.points:
                given = _raw(architecture, f"{architecture.path(projection)}.output")
                found.append((layer, projection, given, architecture.points[added]))
        if not found:
            return
        points = [point for _, _, *ends in found for point in ends]
        cache = CaptureRun(instrument, _tokens(architecture), points).run(alone=True)[1]
        for layer, projection, *ends in found:
            given_value, added_value = (cache.records[point.name][0].value for point in ends)
            factor, off = _fit(given_value, added_value)
            if off <= rounding(given_value.dtype):
                self._projections[layer] = projection, factor

    def of(self, layer: int) -> mx.array | None:
        """The bias that a layer's MLP adds, [d_model] in float32; None where it has none, or none that can be told."""
        if layer not in self._projections:
            return None
        projection, factor = self._projections[layer]
        return projection["bias"].astype(mx.float32) * factor


class HeadPaths:
    """The paths of a model's layers, found by running a few tokens once.

    Args:
        instrument: the model's.
    """

    def __init__(self, instrument: Instrument) -> None:
        self._instrument = instrument
        self._architecture = instrument.architecture
        self._paths: dict[int, HeadPath | str] = {}
        self._find()

    def of(self, layer: int) -> HeadPath:
        """A layer's path.

        Raises:
            HookError: why there is none.
        """
        path = self._paths[layer]
        if isinstance(path, str):
            raise HookError(f"What each head of layer {layer} adds cannot be told on {self._kind}: {path}.")
        return path

    @property
    def _kind(self) -> str:
        return self._architecture.cfg.model_type

    def _find(self) -> None:
        architecture, wanted = self._architecture, []
        inputs, outputs = {}, {}
        for layer in range(architecture.cfg.n_layers):
            points = [block_point(component, layer) for component in ("z", "attn_out")]
            found = architecture.output_projection(layer)
            if isinstance(found, str):
                self._paths[layer] = found
            elif missing := [point.name for point in points if point.name not in architecture.points]:
                self._paths[layer] = f"there is no {missing[0]}"
            else:
                path = architecture.path(found)
                inputs[layer], outputs[layer] = (_raw(architecture, f"{path}.{end}") for end in ("input", "output"))
                wanted += [*(architecture.points[point.name] for point in points), inputs[layer], outputs[layer]]
        if not wanted:
            return
        cache = CaptureRun(self._instrument, _tokens(architecture), wanted).run(alone=True)[1]
        gated = [layer for layer in inputs if not self._reads_z(layer, cache, inputs[layer])]
        apart = self._keep_heads_apart(gated, inputs)
        for layer, point in inputs.items():
            z = architecture.points[block_point("z", layer).name]
            if layer in gated and layer not in apart:
                self._paths[layer] = "what its output projection reads is not laid out by heads"
                continue
            self._paths[layer] = self._path(layer, cache, point if layer in gated else z, outputs[layer])

    def _reads_z(self, layer: int, cache: ActivationCache, point: HookPoint) -> bool:
        """Whether the output projection reads ``hook_z`` as it is."""
        z, read = (cache.records[name][0].value for name in (block_point("z", layer).name, point.name))
        return z.size == read.size and bool(mx.all(z.reshape(read.shape) == read).item())

    def _keep_heads_apart(self, layers: list[int], inputs: dict[int, HookPoint]) -> set[int]:
        """The layers in which the projection reads zeros where a head gave zeros, and nowhere else."""
        if not layers:
            return set()
        cache = ActivationCache()
        recorder = Recorder(self._instrument.run, cache.add)
        hooks = [Hook(self._architecture.points[block_point("z", layer).name], _without_odd_heads) for layer in layers]
        hooks += [recorder.hook(inputs[layer]) for layer in layers]
        with self._instrument.attached(self._instrument.plan(hooks), alone=True):
            mx.eval(self._architecture.model(_tokens(self._architecture)))
        apart = set()
        for layer in layers:
            value = cache.records[inputs[layer].name][0].value
            n_heads = self._architecture.n_query_heads(layer)
            if value.shape[-1] % n_heads:
                continue
            left = mx.any(value.reshape(-1, n_heads, value.shape[-1] // n_heads) != 0, axis=(0, 2)).tolist()
            if left == [head % 2 == 0 for head in range(n_heads)]:
                apart.add(layer)
        return apart

    def _path(self, layer: int, cache: ActivationCache, point: HookPoint, output: HookPoint) -> HeadPath | str:
        """The path, if the run confirms it, else why there is none."""
        sublayer = next(s for s in self._architecture.sublayers[layer] if s.kind == "attn")
        project = self._architecture.output_projection(layer)
        assert isinstance(project, nn.Module)
        value = cache.records[point.name][0].value
        n_heads = self._architecture.n_query_heads(layer)
        d_head = value.shape[-1] if point.component == "z" else value.shape[-1] // n_heads
        added = cache.records[block_point("attn_out", layer).name][0].value
        path = HeadPath(point, n_heads, d_head, project, sublayer.after, 1.0)
        try:
            heads, bias = path.split(value)
        except HookError as error:
            return str(error).rstrip(".")
        factor, off = _fit(heads.sum(axis=-2) + bias, added)
        if not off <= rounding(cache.records[output.name][0].value.dtype):
            return f"the heads' parts do not add up to hook_attn_out, off by {off:.2g} of its largest entry"
        return HeadPath(point, n_heads, d_head, project, sublayer.after, factor)


def _raw(architecture: Architecture, name: str) -> HookPoint:
    point = architecture.locate(name)
    assert point is not None
    return point


def _tokens(architecture: Architecture) -> mx.array:
    """Rows of one token each: some of mlx-lm's own models read no more than one at a time."""
    d_vocab = architecture.cfg.d_vocab
    return mx.array([[d_vocab * part // 7 % d_vocab] for part in (1, 3, 5)])


def _fit(given: mx.array, added: mx.array) -> tuple[float, float]:
    """The factor between two arrays, 1.0 where it is that within rounding, and how far they are off then."""
    a, b = given.astype(mx.float32), added.astype(mx.float32)
    # Of zeros no factor can be told.
    factor = scalar(mx.where(mx.any(a != 0), (a * b).sum() / mx.maximum((a * a).sum(), 1e-30), 1.0))
    factor = factor if abs(factor - 1) > rounding(added.dtype) else 1.0
    return factor, relative_deviation(a * factor, b)


def rounding(dtype: mx.Dtype) -> float:
    """How far sums of a model's values may be off, relative to the largest: 1e-4, more in half precision."""
    return max(1e-4, 8 * mx.finfo(dtype).eps)


def relative_deviation(got: mx.array, expected: mx.array) -> float:
    """The largest absolute difference over the largest absolute value."""
    a, b = got.astype(mx.float32), expected.astype(mx.float32)
    return scalar(mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-9))


def _without_odd_heads(z: mx.array, point: HookPoint) -> mx.array:
    axis = point.axes.index("head")
    even = (mx.arange(z.shape[axis]) % 2 == 0).reshape(*[-1 if i == axis else 1 for i in range(z.ndim)])
    return mx.where(even, z, 0)
