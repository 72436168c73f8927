"""A model as a graph: nodes that write to the residual stream, inputs that read it, and an edge for each pair.

What an input reads is the sum of what all nodes before it wrote, and of constants that are no node's: what a layer's
attention adds whatever its heads hold (the bias of its output), where the heads are nodes. No edge carries them, so no
ablation takes them away. What a node writes is ablated with its own constants: an MLP's bias, and that of attention
which is one node. :func:`graph_of` finds the nodes, and shows that it is so.
Source: Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021).
"""

import re
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...architectures import Heads, Location
from ...contributions import HeadPath
from ...errors import HookError
from ...hook_points import HookPoint
from ...instrument import plainly
from ...model import HookedModel

Kind = Literal["q", "k", "v"]
EMBED, LOGITS = "embed", "logits"
FIELD = "edges"
KINDS: tuple[Kind, ...] = ("q", "k", "v")
_NODES = "embed, L0H1 (a head), L0 mlp"
_INPUTS = "L1H0<q> (or <k>, <v>), L1 mlp, logits"
_OTHER_NAMES = [
    (re.compile(r"^input$"), EMBED),
    (re.compile(r"^a(\d+)\.h(\d+)(<[qkv]>)?$"), r"L\1H\2\3"),
    (re.compile(r"^m(\d+)$"), r"L\1 mlp"),
]
"""Names of the EAP library's."""


@dataclass(frozen=True)
class Node:
    """What writes to the stream.

    Args:
        name: "embed" (what enters the first block), "L0H1", "L0 attn", "L0 mlp", "L0 mixer".
        layer: None for the embedding.
        part: "embed", "heads", "attn", "mlp" or "mixer".
        head: the query head; None for what is no head.
    """

    name: str
    layer: int | None
    part: str
    head: int | None = None


@dataclass(frozen=True)
class Input:
    """What reads the stream.

    Args:
        name: "L1H0<q>"; "L1KV0<k>" where several query heads share keys and values; "L1 attn", "L1 mlp", "L1 mixer",
            "logits".
        layer: None for the logits.
        part: "attn", "mlp", "mixer" or "logits".
        kind: what of attention it becomes; None for all of it, and for what is not attention.
        head: the query head, or the key-value head; None without.
        feeds: the names of the nodes that it serves; none for the logits.
    """

    name: str
    layer: int | None
    part: str
    kind: Kind | None = None
    head: int | None = None
    feeds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edge:
    """What one input reads of one node; ``"L0H1->L1H0<k>"``."""

    source: str
    input: str

    @property
    def name(self) -> str:
        """Source, arrow and input."""
        return f"{self.source}->{self.input}"


@dataclass(frozen=True, eq=False)
class Writer:
    """The nodes of one sublayer, and where what they write is met.

    Args:
        point: the hook point.
        nodes: one, or the heads of a layer.
        path: from what the heads hold to what they add; None where the hook point holds what is added.
    """

    point: HookPoint
    nodes: tuple[Node, ...]
    path: HeadPath | None = None

    def split(self, value: mx.array) -> mx.array:
        """What each node writes, [node, batch, pos, d_model] in float32, of the hook point's value."""
        if self.path is None:
            return value.astype(mx.float32)[None]
        project = self.path.project
        if self.path.after is None and type(project) is nn.Linear:
            # The same as a projection per head, in one product.
            heads = value.reshape(*value.shape[:2], self.path.n_heads, self.path.d_head).astype(mx.float32)
            weight = project.weight.astype(mx.float32).reshape(-1, self.path.n_heads, self.path.d_head)
            return mx.einsum("bphe,dhe->hbpd", heads, weight) * self.path.factor
        return mx.moveaxis(self.path.parts(value).all(), -2, 0)


def _of_rows(project: nn.Module, rows: slice) -> nn.Module:
    """The projection to some of its outputs alone."""
    made = copy(project)
    for name in ("weight", "scales", "biases", "bias"):
        if project.get(name) is not None:
            made[name] = project[name][rows]
    return made


@dataclass(frozen=True, eq=False)
class Entry:
    """Inputs that are one array in the model.

    Args:
        point: the hook point at which what they have read is replaced.
        inputs: one, or one per head, in the order of the head axis.
        norm, project: what lies between the stream and the hook point; None for nothing.
        view: how the heads lie in what is projected; None for an input that is not by head.
    """

    point: HookPoint
    inputs: tuple[Input, ...]
    norm: nn.Module | None = None
    project: nn.Module | None = None
    location: Location | None = None

    def normed(self, stream: mx.array) -> mx.array:
        """The stream [..., pos, d_model] as the projection reads it."""
        return stream if self.norm is None else plainly(self.norm, stream)

    def projected(self, normed: mx.array) -> mx.array:
        """What the hook point holds where the projection reads this."""
        if self.project is None or self.location is None:
            return normed
        made = plainly(self.project, normed)
        made = made[self.location.index] if isinstance(made, tuple | list) else made
        return self.location.view.read(made)

    def head_of(self, normed: mx.array, head: int) -> mx.array:
        """The same of one head alone, [..., pos, d_head]."""
        view = None if self.location is None else self.location.view
        if self.project is not None and isinstance(view, Heads) and not view.stride:
            rows = slice(view.start + head * view.d_head, view.start + (head + 1) * view.d_head)
            if type(self.project) in (nn.Linear, nn.QuantizedLinear):
                return plainly(_of_rows(self.project, rows), normed)
        return self.projected(normed)[..., head, :]

    def __call__(self, stream: mx.array) -> mx.array:
        """What the hook point holds where its inputs read this stream [batch, pos, d_model]."""
        return self.projected(self.normed(stream))

    @property
    def is_stream(self) -> bool:
        """Whether the hook point holds the stream itself."""
        return self.norm is None and self.project is None


@dataclass(frozen=True, eq=False)
class Reading:
    """The inputs of one sublayer.

    Args:
        place: the hook point that shows the stream which is read.
        entries: what is made of it.
        n_before: how many of the graph's nodes come before it.
    """

    place: HookPoint
    entries: tuple[Entry, ...]
    n_before: int


@dataclass(frozen=True, eq=False)
class ModelGraph:
    """The nodes, inputs and edges of a model, in forward order; :func:`graph_of` makes it.

    Args:
        model: whose they are.
        writers: nodes by sublayer; the first is the embedding.
        readings: inputs by sublayer; the last is the logits.
    """

    model: HookedModel
    writers: tuple[Writer, ...]
    readings: tuple[Reading, ...]
    nodes: list[Node] = field(init=False)
    inputs: list[Input] = field(init=False)
    edges: list[Edge] = field(init=False)

    def __post_init__(self) -> None:
        nodes = [node for writer in self.writers for node in writer.nodes]
        entries = [(reading, entry) for reading in self.readings for entry in reading.entries]
        inputs = [each for _, entry in entries for each in entry.inputs]
        edges = [
            Edge(node.name, each.name)
            for reading, entry in entries
            for each in entry.inputs
            for node in nodes[: reading.n_before]
        ]
        for name, value in (("nodes", nodes), ("inputs", inputs), ("edges", edges)):
            object.__setattr__(self, name, value)

    @cached_property
    def edge_index(self) -> dict[str, int]:
        """Where each edge stands among the edges."""
        return {edge.name: i for i, edge in enumerate(self.edges)}

    @cached_property
    def edge_rows(self) -> np.ndarray:
        """Where each edge's input stands among the inputs, [edge]: the row of a mask [input, node]."""
        return np.array([self.input_index[edge.input] for edge in self.edges], dtype=np.int64)

    @cached_property
    def edge_columns(self) -> np.ndarray:
        """Where each edge's source stands among the nodes, [edge]: the column of a mask [input, node]."""
        return np.array([self.node_index[edge.source] for edge in self.edges], dtype=np.int64)

    @cached_property
    def node_index(self) -> dict[str, int]:
        """Where each node stands among the nodes."""
        return {node.name: i for i, node in enumerate(self.nodes)}

    @cached_property
    def input_index(self) -> dict[str, int]:
        """Where each input stands among the inputs."""
        return {each.name: i for i, each in enumerate(self.inputs)}

    def edge(self, name: str | Edge) -> Edge:
        """An edge by its name, or by that of the EAP library: ``"a0.h1->a1.h0<k>"``.

        Raises:
            HookError: for what is no edge of this model, with what there is.
        """
        if isinstance(name, Edge):
            name = name.name
        # Edges are mostly told by their own names, and there may be tens of thousands: names are taken apart last.
        if isinstance(name, str) and name in self.edge_index:
            return self.edges[self.edge_index[name]]
        if not isinstance(name, str) or name.count("->") != 1:
            raise HookError(f"An edge is written as 'L0H1->L1H0<k>', got {name!r}.", field=FIELD)
        source, reader = (end.strip() for end in name.split("->"))
        found = Edge(self.node(source).name, self.input(reader).name)
        if found.name not in self.edge_index:
            raise HookError(
                f"There is no edge {found.name!r}: {found.source} is not before {found.input}.", field=FIELD
            )
        return found

    def node(self, name: str) -> Node:
        """A node by its name.

        Raises:
            HookError: for one that the model does not have.
        """
        known = own_name(name)
        if known not in self.node_index:
            raise HookError(self._unknown("node", name, _NODES), field="nodes")
        return self.nodes[self.node_index[known]]

    def input(self, name: str) -> Input:
        """An input by its name; k and v of a query head are those of the key-value head that serves it.

        Raises:
            HookError: for one that the model does not have.
        """
        known = own_name(name)
        if known in self.input_index:
            return self.inputs[self.input_index[known]]
        match = re.fullmatch(r"(L\d+H\d+)<([kv])>", known)
        serving = [] if match is None else [i for i in self.inputs if i.kind == match[2] and match[1] in i.feeds]
        if len(serving) != 1:
            raise HookError(self._unknown("input", name, _INPUTS), field="inputs")
        return serving[0]

    def _unknown(self, what: str, name: object, like: str) -> str:
        cfg = self.model.cfg
        return (
            f"{cfg.model_type} has no {what} {name!r}: {what}s are called {like}; it has {cfg.n_layers} layers of "
            f"{cfg.n_heads} heads."
        )

    def edges_of(self, names: Iterable[str | Edge]) -> list[Edge]:
        """Edges by their names, each once, in forward order.

        Raises:
            HookError: for a name that is no edge.
        """
        return [self.edges[i] for i in self.indices_of(names)]

    def indices_of(self, names: Iterable[str | Edge]) -> np.ndarray:
        """Where edges stand among the edges, each once, in forward order.

        Raises:
            HookError: for a name that is no edge.
        """
        if isinstance(names, str) or not isinstance(names, Iterable):
            what = f"the text {names!r}" if isinstance(names, str) else type(names).__name__
            raise HookError(f"Edges are a list of names, got {what}.", field=FIELD)
        return np.array(sorted({self.edge_index[self.edge(name).name] for name in names}), dtype=np.int64)

    def inputs_of(self, node: str | Node) -> list[Input]:
        """The inputs that serve a node; none for the embedding."""
        name = node.name if isinstance(node, Node) else self.node(node).name
        return [each for each in self.inputs if name in each.feeds]


def edge_name(given: "str | Edge") -> str:
    """The name of an edge as it is here; of one of the EAP library's, "a0.h1->a1.h0<k>", "L0H1->L1H0<k>"."""
    name = given.name if isinstance(given, Edge) else given
    return "->".join(own_name(end.strip()) for end in name.split("->"))


def own_name(name: object) -> str:
    """The name of a node or an input as it is here, where it is the EAP library's: "a0.h1" is "L0H1"."""
    if not isinstance(name, str):
        return repr(name)
    for pattern, own in _OTHER_NAMES:
        if pattern.match(name):
            return pattern.sub(own, name)
    return name
