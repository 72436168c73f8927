"""Heads as maps of the stream: what each one's queries, keys and values read, and what it writes.

Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).

    1. A few tokens run once and show what lies between the stream and what attention reads: nothing, or a norm. A norm
       is linear up to a scale that is its own at each position; its weight, and its centring, are made part of the map.
    2. What attention reads is replaced by rows of the identity, one per sequence, in all layers at once, and what
       queries, keys and values become is the map. So the model's own modules say it: fused, quantised and adapted ones
       need no special case, and of what lies before nothing is computed. The first run has to be what the map says.
    3. A norm of queries or keys is found in the same way, and is linear up to a scale of each head.
    4. What heads write is the output projection, as ``contributions.py`` finds it.

So each map is known up to a scale, which the scores that are made of them leave out. Rotary positions are left out as
well: a map of queries or keys is that of the first position, where no rotation has begun.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from ..activations import ActivationCache
from ..contributions import LinearNorm, relative_deviation, rounding
from ..errors import HookError
from ..hook_points import HEADS, RESID, HookPoint, block_point
from ..hooks import Hook, Recorder
from ..model import HookedModel, check_hooked

_ROWS = 256
"""Rows of the identity that run at once."""
KINDS = ("query", "key", "value", "output")
_POINTS = {"query": "q", "key": "k", "value": "v"}
_ROTATED = {"query": "rot_q", "key": "rot_k"}
_SHOWN = ("resid_pre", "ln1_in", "ln1", "attn_in", *_POINTS.values(), *_ROTATED.values())


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """The heads of a layer as maps of the stream, in float32, each up to a scale of its own.

    Of a row x of the stream a head's query is ``x @ query[h]``, and what it writes where it attends to x alone is
    ``x @ value[h] @ output[h]``. Heads that share a key-value head have the same key and value.

    Args:
        layer: the block's index.
        query, key, value: [head, d_model, d_head]; None where they are no such map.
        output: [head, d_head, d_model]; None likewise.
        reasons: why there is none, by name.
    """

    layer: int
    query: mx.array | None = None
    key: mx.array | None = None
    value: mx.array | None = None
    output: mx.array | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def why_not(self, *kinds: str) -> str:
        """Why maps of these kinds are not there; empty where they all are."""
        return next((self.reasons[kind] for kind in kinds if getattr(self, kind) is None), "")


def head_weights(
    model: HookedModel, layers: Iterable[int] | None = None, kinds: Sequence[str] = KINDS
) -> dict[int, HeadWeights]:
    """The maps of the heads, by layer.

        weights = head_weights(model)[1]
        weights.value[0] @ weights.output[0]        # the OV circuit of L1H0
        weights.query[0] @ weights.key[0].T         # its QK circuit

    All maps of a layer take 16 bytes for each number of its output projection.

    Args:
        layers: None for all; negative numbers count from the last.
        kinds: which maps, of "query", "key", "value" and "output"; the others are None.

    Raises:
        HookError: for layers that there are not.
    """
    return _Finding(model, chosen_layers(model, layers), kinds).all()


def chosen_layers(model: HookedModel, layers: Iterable[int] | None) -> list[int]:
    """The layers asked for, ascending, each once.

    Raises:
        HookError: for what is no HookedModel, no layers, what is no whole number, and layers that there are not.
    """
    check_hooked(model)
    n_layers = model.cfg.n_layers
    if layers is None:
        return list(range(n_layers))
    if not isinstance(layers, Iterable):
        raise HookError(f"Layers are a list of whole numbers from 0 to {n_layers - 1}, got {layers!r}.", field="layers")
    asked = list(layers)
    wrong = [i for i in asked if not isinstance(i, int) or isinstance(i, bool) or not -n_layers <= i < n_layers]
    if wrong or not asked:
        what = f"got {wrong[0]!r}" if wrong else "got none"
        raise HookError(f"Layers are 0 to {n_layers - 1}, {what}.", field="layers")
    return sorted({i % n_layers for i in asked})


class _Finding:
    """One search for the maps of some layers of a model."""

    def __init__(self, model: HookedModel, layers: Sequence[int], kinds: Sequence[str]) -> None:
        self.model = model
        self.kinds = [kind for kind in KINDS if kind in kinds]
        self.components = [_POINTS[kind] for kind in self.kinds if kind in _POINTS]
        self.layers = [layer for layer in layers if self._has(layer, "attn_in")]
        self.without = dict.fromkeys(layers, "it has no attention that reads the stream")
        names = [
            name
            for layer in self.layers
            for component in _SHOWN
            if (name := block_point(component, layer).name) in model.hook_points
        ]
        self.natural = self._record(mx.array(_tokens(model.cfg.d_vocab)), names, {}) if names else ActivationCache()

    def all(self) -> dict[int, HeadWeights]:
        found = {
            layer: HeadWeights(layer, reasons=dict.fromkeys(self.kinds, why)) for layer, why in self.without.items()
        }
        if self.layers:
            maps = self._maps() if self.components else {}
            norms = self._norms() if self.components else {}
            for layer in self.layers:
                found[layer] = self._layer(layer, maps, norms)
        return found

    def _layer(self, layer: int, maps: dict[str, mx.array], norms: dict[str, mx.array]) -> HeadWeights:
        made: dict[str, mx.array] = {}
        reasons: dict[str, str] = {}
        for kind in self.kinds:
            try:
                if kind == "output":
                    found = self._output(layer)
                else:
                    read = self._through_norm(layer, self._checked_map(layer, kind, maps))
                    found = self._per_query_head(layer, self._normed(layer, kind, read, norms))
            except HookError as error:
                reasons[kind] = str(error).rstrip(".")
                continue
            mx.eval(found)
            made[kind] = found
        query, key, value, output = (made.get(kind) for kind in KINDS)
        return HeadWeights(layer, query, key, value, output, reasons)

    # What is run.

    def _has(self, layer: int, component: str) -> bool:
        return block_point(component, layer).name in self.model.hook_points

    def _value(self, layer: int, component: str) -> mx.array:
        """What the first run had, in its first pass."""
        name = block_point(component, layer).name
        if name not in self.natural.records:
            self.model.architecture.check_supported(name)
            raise HookError(f"There is no {name}.")
        return self.natural.records[name][0].value

    def _record(self, tokens: mx.array, names: Sequence[str], put: Mapping[str, mx.array]) -> ActivationCache:
        """Values at hook points while others are replaced; nothing else is computed."""
        instrument, points = self.model.instrument, self.model.hook_points
        cache = ActivationCache()
        recorder = Recorder(instrument.run, cache.add)

        def putting(name: str, array: mx.array) -> Hook:
            return Hook(points[name], lambda value, point: mx.broadcast_to(array, value.shape))

        hooks = [putting(name, array) for name, array in put.items()]
        hooks += [recorder.hook(points[name]) for name in names]
        with instrument.attached(instrument.plan(hooks), alone=True):
            self.model.model(tokens)
        mx.eval([record.value for records in cache.records.values() for record in records])
        return cache

    def _maps(self) -> dict[str, mx.array]:
        """By hook point what it holds for each row of the identity, and for zeros: [d_model + 1, head, d_head]."""
        width = self.model.cfg.d_model
        fitting = [layer for layer in self.layers if self._value(layer, "attn_in").shape[-1] == width]
        names = [block_point(component, layer).name for layer in fitting for component in self.components]
        names = [name for name in names if name in self.model.hook_points]
        parts: dict[str, list[mx.array]] = {name: [] for name in names}
        for start in range(0, width + 1, _ROWS):
            rows = mx.arange(start, min(start + _ROWS, width + 1))
            one_hot = (rows[:, None] == mx.arange(width)[None])[:, None].astype(mx.float32)
            put = {block_point("attn_in", layer).name: one_hot for layer in fitting}
            cache = self._record(mx.zeros((len(rows), 1), mx.int32), names, put)
            for name in names:
                parts[name].append(cache.records[name][0].value[:, 0].astype(mx.float32))
        return {name: mx.concatenate(part) for name, part in parts.items()}

    def _norms(self) -> dict[str, mx.array]:
        """By hook point of a rotated query or key what it holds for the probes of ``_normed``, [probe, head, d_head].

        They are four rows of signs, the second pair the negative of the first, and one of ones.
        """
        asked = {
            block_point(_POINTS[kind], layer).name: block_point(_ROTATED[kind], layer).name
            for layer in self.layers
            for kind in _ROTATED
            if kind in self.kinds
            if self._has(layer, _POINTS[kind]) and self._has(layer, _ROTATED[kind])
        }
        put = {}
        for name in list(asked):
            value = self.natural.records[name][0].value
            try:
                self.model.architecture.check_editable(self.model.hook_points[name])
            except HookError:
                del asked[name]
                continue
            put[name] = _probes(value.shape[-1])[:, None, None]
        if not asked:
            return {}
        cache = self._record(mx.zeros((5, 1), mx.int32), list(asked.values()), put)
        return {name: records[0].value[:, 0].astype(mx.float32) for name, records in cache.records.items()}

    # What follows from it.

    def _checked_map(self, layer: int, kind: str, maps: dict[str, mx.array]) -> mx.array:
        """From what attention reads to queries, keys or values, [their head, d_model, d_head].

        Raises:
            HookError: where the first run was not what the map says.
        """
        point = self._point(layer, _POINTS[kind])
        for place in self.model.architecture.locations_of(point):
            if place.why_not:
                raise HookError(f"its {kind} has no map of its own: {place.why_not.partition(': edit')[0]}")
        read, got = self._value(layer, "attn_in"), self._value(layer, point.component)
        if point.name not in maps:
            raise HookError(f"what it reads is {read.shape[-1]} wide, and the stream {self.model.cfg.d_model}")
        rows = maps.pop(point.name)
        weights, bias = rows[:-1] - rows[-1:], rows[-1]
        said = mx.tensordot(read.astype(mx.float32), weights, axes=1) + bias
        if said.shape != got.shape or not relative_deviation(said, got) <= rounding(got.dtype):
            raise HookError(f"its {kind} is no linear map of what attention reads")
        return weights.transpose(1, 0, 2)

    def _point(self, layer: int, component: str) -> HookPoint:
        self._value(layer, component)
        point = self.model.hook_points[block_point(component, layer).name]
        if point.axes != HEADS:
            raise HookError(f"{point.name} is laid out otherwise")
        return point

    def _through_norm(self, layer: int, weights: mx.array) -> mx.array:
        """The map from the stream, of that from what attention reads."""
        stream, read = self._value(layer, "resid_pre"), self._value(layer, "attn_in")
        if stream.shape == read.shape and mx.array_equal(stream, read):
            return weights
        sublayer = next(s for s in self.model.architecture.sublayers[layer] if s.kind == "attn")
        before = sublayer.before
        is_normed = (
            before is not None
            and self._has(layer, "ln1_in")
            and self._has(layer, "ln1")
            and mx.array_equal(stream, self._value(layer, "ln1_in"))
            and mx.array_equal(read, self._value(layer, "ln1"))
        )
        if before is None or not is_normed:
            raise HookError("between the stream and what attention reads lies more than a norm")
        norm = LinearNorm(before, stream.shape[-1])
        norm.freeze(stream)
        weights = norm.weight[:, None] * weights
        return weights - weights.mean(axis=-2, keepdims=True) if norm.centred else weights

    def _normed(self, layer: int, kind: str, weights: mx.array, norms: dict[str, mx.array]) -> mx.array:
        """The map to queries or keys as the kernel gets them at the first position, but for a scale of each head."""
        if kind == "value":
            return weights
        point, rotated = self._point(layer, _POINTS[kind]), self._point(layer, _ROTATED[kind])
        given, got = (self._value(layer, p.component).astype(mx.float32) for p in (point, rotated))
        if given.shape != got.shape or rotated.name not in norms:
            raise HookError(f"between the projection of its {kind} and attention lies more than a norm and a rotation")
        shown, signs = norms[rotated.name], _probes(given.shape[-1])
        once, again = ((shown[i] - shown[i + 2]) / 2 * signs[i] for i in (0, 1))
        weight = mx.where(signs[0] != 0, once, again)
        size = mx.abs(weight).max(axis=-1, keepdims=True)
        centred = mx.abs(shown[4]).max(axis=-1, keepdims=True) <= 1e-3 * size
        spread = mx.where(centred, given - given.mean(axis=-1, keepdims=True), given) * weight
        scale = (spread * got).sum(-1, keepdims=True) / mx.maximum((spread**2).sum(-1, keepdims=True), 1e-30)
        if not relative_deviation(spread * scale, got) <= rounding(self._value(layer, rotated.component).dtype):
            raise HookError(f"between the projection of its {kind} and attention lies more than a norm and a rotation")
        level = mx.where(centred[..., None], weights.mean(axis=-1, keepdims=True), 0)
        return (weights - level) * weight[:, None]

    def _per_query_head(self, layer: int, weights: mx.array) -> mx.array:
        n_heads, own = self.model.architecture.n_query_heads(layer), weights.shape[0]
        if own == n_heads:
            return weights
        if n_heads % own:
            raise HookError(f"its {own} key-value heads do not serve {n_heads} query heads alike")
        served = self.model.architecture.values_per_query(layer, mx.arange(own).reshape(1, -1, 1, 1), n_heads)
        if served.shape[1] == own:
            served = mx.repeat(served, n_heads // own, axis=1)
        return mx.take(weights, served.reshape(-1), axis=0)

    def _output(self, layer: int) -> mx.array:
        path = self.model.head_path(layer)
        if path.point.component != "z":
            raise HookError("between its heads and the output projection lies a gate")
        width = path.n_heads * path.d_head
        zero = path.project_value(mx.zeros((1, 1, width)))
        parts = []
        for start in range(0, width, _ROWS):
            rows = mx.arange(start, min(start + _ROWS, width))
            one_hot = (rows[:, None] == mx.arange(width)[None]).astype(mx.float32)
            parts.append(path.project_value(one_hot[None]) - zero)
            mx.eval(parts[-1])
        written = mx.concatenate(parts, axis=1)[0] * path.factor
        if path.after is not None:
            written = LinearNorm(path.after, written.shape[-1]).spread(written)
        return written.reshape(path.n_heads, path.d_head, -1)


def check_one_stream(model: HookedModel) -> None:
    """Refuse a model whose layers do not read a plain sum of what earlier ones wrote.

    Raises:
        HookError: with the reason.
    """
    sums = (model.architecture.other_sum(layer) for layer in range(model.cfg.n_layers))
    reason = next((why for why in sums if why), "")
    if not reason and model.last_stream.axes != RESID:
        reason = "it has several streams"
    if reason:
        raise HookError(f"The layers of {model.cfg.model_type} read no plain sum of what heads write: {reason}.")


def _tokens(d_vocab: int) -> list[list[int]]:
    """Rows of one token each: at the first position nothing is rotated."""
    return [[d_vocab * part // 11 % d_vocab] for part in (1, 3, 5, 8)]


def _probes(width: int) -> mx.array:
    """Vectors of length 1 per entry and mean 0: two, their negatives, and ones; [5, width]."""
    # What the first leaves out of an odd width is in the second.
    signs = mx.where(mx.arange(width) % 2 == 0, 1.0, -1.0) * (mx.arange(width) < width - width % 2)
    pair = mx.stack([signs, mx.roll(signs, 1)])
    return mx.concatenate([pair, -pair, mx.ones((1, width))])
