"""The graph of a model, found by experiment.

What an input reads is the sum of what all nodes before it wrote, so the model is its graph exactly, and every edge can
be taken apart from the others: see ``edge_runs.py``. That it is so is not assumed: a short run shows where in each
layer the stream is read and what is added to it, and another, in which every input is given what it reads of other
tokens, must give what these tokens give. Both have several tokens per row where the model reads several at a time: else
nothing could be told of attention, nor of what comes from the positions before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...architectures import Architecture, Sublayer
from ...capture import CaptureRun
from ...contributions import relative_deviation, rounding
from ...errors import HookError
from ...hook_points import HookPoint, block_point
from ...hooks import Hook
from ...model import HookedModel, check_hooked
from ..components import logits_of
from .model_graph import EMBED, KINDS, LOGITS, Edge, Entry, Input, Kind, ModelGraph, Node, Reading, Writer

__all__ = ["Edge", "Entry", "Input", "ModelGraph", "Node", "Reading", "Writer", "graph_of"]

_ROWS, _LENGTH = 3, 4
"""Of the runs' tokens."""


def graph_of(model: HookedModel) -> ModelGraph:
    """The graph of a model, found by two short runs.

        [edge.name for edge in graph_of(model).edges][:2]       # ["embed->L0H0<q>", "embed->L0H1<q>"]

    Heads that share keys and values (grouped queries) have one input for them. Where the parts of a layer's heads
    cannot be told (a norm with a bias behind them, say) its attention is one node, and where q, k and v are not made of
    the stream in sight it is one input. A mixture of experts is one node.

    Raises:
        HookError: for what is no HookedModel, and where the stream is not the sum of what such nodes write, with the
            place.
    """
    check_hooked(model)
    return _Finder(model).find()


@dataclass(frozen=True, eq=False)
class _Sight:
    """What a run shows of a sublayer.

    Args:
        norm: between the stream and the sublayer: its own or, in blocks side by side, that of another.
        place: where it reads the stream.
        alone: whether no other sublayer reads it there.
        behind: how many sublayers of its block come before.
    """

    layer: int
    sublayer: Sublayer
    norm: nn.Module | None
    place: HookPoint
    alone: bool
    behind: int


class _Finder:
    """Finds where the stream is read and written, by experiment."""

    def __init__(self, model: HookedModel) -> None:
        self.model = model
        self.architecture: Architecture = model.architecture
        # Of one token attention is 1 whatever its scores, and nothing comes from the positions before.
        length = min(_LENGTH, model.cfg.max_positions or _LENGTH)
        # Different ones for the two runs.
        drawn = [np.random.default_rng(seed).integers(0, model.cfg.d_vocab, (_ROWS, length)) for seed in (5, 7)]
        if not self._reads(drawn[0]):
            drawn = [each[:, :1] for each in drawn]
        self.tokens, self.others = (mx.array(each) for each in drawn)

    def _reads(self, tokens: np.ndarray) -> bool:
        """Whether the model reads tokens [batch, pos]: some of mlx-lm's models read one at a time."""
        try:
            with self.model.instrument.attached(self.model.instrument.plan([]), alone=True):
                logits_of(self.model, tokens)
        except HookError:
            return False
        return True

    def refuse(self, why: str) -> HookError:
        return HookError(f"The edges of {self.model.cfg.model_type} cannot be told apart: {why}.", field="model")

    def find(self) -> ModelGraph:
        if more := self.architecture.more_than_last_stream:
            raise self.refuse(more)
        stream = self.model.hook_points[block_point("resid_pre", 0).name]
        if "stream" in stream.axes:
            raise self.refuse("it has several residual streams")
        shown = self._shown(self._points(), self.tokens)
        writers = [Writer(stream, (Node(EMBED, None, "embed"),))]
        readings: list[Reading] = []
        sights: list[_Sight] = []
        for layer in range(self.model.cfg.n_layers):
            n_before = sum(len(writer.nodes) for writer in writers)
            own: list[Writer] = []
            for sublayer in self._sublayers(layer):
                sight = self._sight(layer, sublayer, shown)
                own.append(self._writer(layer, sublayer))
                seen = n_before + sum(len(writer.nodes) for writer in own[: sight.behind])
                readings.append(Reading(sight.place, self._entries(sight, own[-1], shown), seen))
                sights.append(sight)
            writers += own
        last = self.model.last_stream
        end = Entry(last, (Input(LOGITS, None, "logits"),))
        readings.append(Reading(last, (end,), sum(len(writer.nodes) for writer in writers)))
        return self._confirmed(writers, readings, sights)

    # What there is.

    def _sublayers(self, layer: int) -> list[Sublayer]:
        found = self.architecture.sublayers[layer]
        kinds = [sublayer.kind for sublayer in found]
        if "side" in kinds or block_point("side_out", layer).name in self.model.hook_points:
            raise self.refuse(f"layer {layer} has a branch beside attention and MLP")
        if len(set(kinds)) < len(kinds):
            raise self.refuse(f"layer {layer} has several sublayers of a kind")
        return sorted(found, key=lambda sublayer: sublayer.kind == "mlp")

    def _points(self) -> list[HookPoint]:
        """All that the run has to show."""
        found: list[HookPoint] = []
        for layer in range(self.model.cfg.n_layers):
            names = [block_point(component, layer).name for component in ("resid_pre", "resid_mid", *KINDS)]
            found += [self.model.hook_points[name] for name in names if name in self.model.hook_points]
            for sublayer in self._sublayers(layer):
                found += [self._input(module) for module in (sublayer.before, sublayer.first) if module is not None]
        return list(dict.fromkeys(found))

    def _input(self, module: nn.Module) -> HookPoint:
        point = self.architecture.locate(f"{self.architecture.path(module)}.input")
        assert point is not None
        return point

    def _shown(self, points: Sequence[HookPoint], tokens: mx.array) -> dict[str, mx.array]:
        records = CaptureRun(self.model.instrument, tokens, points).run(alone=True, logits="none")[1].records
        if any(len(found) > 1 for found in records.values()):
            raise self.refuse("layers run several times")
        return {name: found[0].value for name, found in records.items()}

    def _writer(self, layer: int, sublayer: Sublayer) -> Writer:
        added = block_point(f"{sublayer.kind}_out", layer).name
        if added not in self.model.hook_points:
            why = self.architecture.unsupported.get(added, "it cannot be seen")
            raise self.refuse(f"what {sublayer.kind} of layer {layer} adds is not shown: {why}")
        node = Node(f"L{layer} {sublayer.kind}", layer, sublayer.kind)
        whole = Writer(self.model.hook_points[added], (node,))
        if sublayer.kind != "attn":
            return whole
        try:
            path = self.model.head_path(layer)
        except HookError:
            return whole
        if path.after is not None and path.adds_constant:
            # What it adds whatever the heads hold is scaled by what they hold.
            return whole
        heads = tuple(Node(f"L{layer}H{head}", layer, "heads", head) for head in range(path.n_heads))
        return Writer(path.point, heads, path)

    # Where the stream is read.

    def _sight(self, layer: int, sublayer: Sublayer, shown: dict[str, mx.array]) -> _Sight:
        others = [other for other in self._sublayers(layer) if other is not sublayer]
        # A norm without weights is an empty mapping, and false.
        norm = self._norm_of_another(sublayer, others, shown) if sublayer.before is None else sublayer.before
        place = self._input(sublayer.first if norm is None else norm)
        alone = all(other.before is not norm and other.before is not None for other in others)
        streams = [("resid_pre", 0), ("resid_mid", len(others))]
        # Both hold the same where the sublayers before write nothing.
        for component, n_before in reversed(streams) if sublayer.kind == "mlp" else streams:
            stream = shown.get(block_point(component, layer).name)
            if stream is not None and _equal(stream, shown[place.name]):
                return _Sight(layer, sublayer, norm, place, norm is None or alone, n_before)
        raise self.refuse(f"what {sublayer.kind} of layer {layer} reads is not the stream")

    def _norm_of_another(
        self, sublayer: Sublayer, others: Sequence[Sublayer], shown: dict[str, mx.array]
    ) -> nn.Module | None:
        read = shown[self._input(sublayer.first).name]
        for other in others:
            norm = other.before
            if norm is not None and _equal(norm(shown[self._input(norm).name]), read):
                return norm
        return None

    def _entries(self, sight: _Sight, writer: Writer, shown: dict[str, mx.array]) -> tuple[Entry, ...]:
        if sight.sublayer.kind == "attn":
            found = [self._projection(sight, kind, writer, shown) for kind in KINDS]
            if all(entry is not None for entry in found):
                return tuple(entry for entry in found if entry is not None)
        return (self._whole(sight, writer),)

    def _whole(self, sight: _Sight, writer: Writer) -> Entry:
        kind = sight.sublayer.kind
        own = Input(f"L{sight.layer} {kind}", sight.layer, kind, feeds=tuple(node.name for node in writer.nodes))
        if sight.alone:
            return Entry(sight.place, (own,))
        # Others read the stream there too: it is replaced behind the norm.
        return Entry(self._input(sight.sublayer.first), (own,), norm=sight.norm)

    def _projection(self, sight: _Sight, kind: Kind, writer: Writer, shown: dict[str, mx.array]) -> Entry | None:
        """One of q, k and v; None where it is not made of the stream by norm and projection."""
        point = self.model.hook_points.get(block_point(kind, sight.layer).name)
        location = self.architecture.projection_of(sight.layer, kind)
        if point is None or location is None:
            return None
        try:
            self.architecture.check_editable(point)
        except HookError:
            return None
        value, n_heads = shown[point.name], point.size("head") or 0
        inputs = tuple(self._head_input(sight.layer, kind, head, n_heads, writer) for head in range(n_heads))
        entry = Entry(point, inputs, sight.norm, location.module, location)
        try:
            made = entry(shown[sight.place.name])
        except (ValueError, TypeError):
            # A norm or a projection that takes more than the stream.
            return None
        same = made.shape == value.shape and relative_deviation(made, value) <= rounding(value.dtype)
        return entry if same else None

    def _head_input(self, layer: int, kind: Kind, head: int, n_heads: int, writer: Writer) -> Input:
        n_query = self.architecture.n_query_heads(layer)
        name = f"L{layer}H{head}" if n_heads == n_query else f"L{layer}KV{head}"
        feeds = [
            node.name
            for node in writer.nodes
            if node.head is None or self.architecture.key_value_head(layer, node.head, n_heads) == head
        ]
        return Input(f"{name}<{kind}>", layer, "attn", kind, head, tuple(feeds))

    # Whether it is so.

    def _confirmed(self, writers: list[Writer], readings: list[Reading], sights: list[_Sight]) -> ModelGraph:
        """The graph, if sublayers depend on their inputs alone, and the stream is the sum of what the nodes write."""
        points = list(dict.fromkeys([reading.place for reading in readings] + [writer.point for writer in writers]))
        own, other = (self._shown(points, tokens) for tokens in (self.tokens, self.others))
        for i, sight in enumerate(sights):
            writer, reading = writers[i + 1], readings[i]
            if self._depends_alone(writer, reading, other):
                continue
            whole = Reading(reading.place, (self._whole(sight, writer),), reading.n_before)
            if len(reading.entries) == 1 or not self._depends_alone(writer, whole, other):
                kind = sight.sublayer.kind
                raise self.refuse(f"{kind} of layer {sight.layer} depends on more than the stream that it reads")
            readings[i] = whole
        self._check_sum(writers, readings[-1].place, own)
        return ModelGraph(self.model, tuple(writers), tuple(readings))

    def _depends_alone(self, writer: Writer, reading: Reading, other: dict[str, mx.array]) -> bool:
        """Whether a sublayer that is given what it reads of other tokens does what it does there."""
        stream, instrument = other[reading.place.name], self.model.instrument
        hooks = [Hook(entry.point, partial(_answer, entry(stream))) for entry in reading.entries]
        with instrument.attached(instrument.plan(hooks), alone=True):
            run = CaptureRun(instrument, self.tokens, [writer.point])
            made = run.run(logits="none")[1].records[writer.point.name][0].value
        return relative_deviation(made, other[writer.point.name]) <= rounding(made.dtype)

    def _check_sum(self, writers: list[Writer], last: HookPoint, own: dict[str, mx.array]) -> None:
        total = mx.zeros(own[last.name].shape, dtype=mx.float32)
        for writer in writers:
            value = own[writer.point.name]
            total = total + writer.split(value).sum(axis=0)
            if writer.path is not None:
                total = total + writer.path.parts(value).constant
        if not (off := relative_deviation(total, own[last.name])) <= rounding(own[last.name].dtype):
            raise self.refuse(f"the stream is not the sum of what its nodes write (off by {off:.2g})")


def _equal(a: mx.array, b: mx.array) -> bool:
    return a.size == b.size and bool(mx.all(a.reshape(-1) == b.reshape(-1)).item())


def _answer(value: mx.array, shown: mx.array, point: HookPoint) -> mx.array:
    return value.reshape(shown.shape)
