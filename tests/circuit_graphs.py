"""Graphs of circuits without a model, and runs of them whose metric is a formula."""

from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace

import numpy as np

from mlx_hooks.analysis.circuits.edge_runs import IndexedSets
from mlx_hooks.analysis.circuits.model_graph import Edge
from mlx_hooks.errors import HookError


class Graph:
    """Layers of attention heads and an MLP each, with every edge that looks forward."""

    def __init__(self, layers: int, heads: int, kv_heads: int | None = None, mlp: bool = True) -> None:
        kv_heads = kv_heads or heads
        self.nodes, self.inputs, self.edges = [SimpleNamespace(name="embed")], [], []
        for layer in range(layers):
            before = [node.name for node in self.nodes]
            own = [f"L{layer}H{h}" for h in range(heads)]
            served = {f"L{layer}H{h}<q>": (own[h],) for h in range(heads)}
            for kind in "kv":
                for g in range(kv_heads):
                    name = f"L{layer}KV{g}<{kind}>" if kv_heads < heads else f"L{layer}H{g}<{kind}>"
                    served[name] = tuple(own[g * heads // kv_heads : (g + 1) * heads // kv_heads])
            self._add(before, served)
            self.nodes += [SimpleNamespace(name=name) for name in own]
            if mlp:
                self._add([node.name for node in self.nodes], {f"L{layer} mlp": (f"L{layer} mlp",)})
                self.nodes.append(SimpleNamespace(name=f"L{layer} mlp"))
        self._add([node.name for node in self.nodes], {"logits": ()})
        nodes, inputs = ([each.name for each in found] for found in (self.nodes, self.inputs))
        self.edge_rows = np.array([inputs.index(edge.input) for edge in self.edges])
        self.edge_columns = np.array([nodes.index(edge.source) for edge in self.edges])

    def _add(self, sources: Sequence[str], served: dict[str, tuple[str, ...]]) -> None:
        for name, feeds in served.items():
            self.inputs.append(SimpleNamespace(name=name, feeds=feeds))
            self.edges += [Edge(source, name) for source in sources]

    def edges_of(self, names: Sequence[str]) -> list[Edge]:
        return [self.edge(name) for name in names]

    def edge(self, name: str) -> Edge:
        found = [edge for edge in self.edges if edge.name == name]
        if not found:
            raise HookError(f"There is no edge {name!r}.")
        return found[0]


class Runs:
    """Edge runs whose metric [set, example] is a function of what is replaced."""

    def __init__(self, graph: Graph, metric: Callable[[frozenset[str]], Sequence[float]]) -> None:
        self.graph = graph
        self.score = metric
        self.metric = SimpleNamespace(name="made up", fn=None)
        self.ablation, self.mean_over, self.seed = "corrupted", "position", 0
        self.model = None
        self.calls: list[int] = []
        self.plain = self.without([[]])[0]
        self.ablated = self.without([[edge.name for edge in graph.edges]])[0]
        self.corrupted = self.ablated
        self.data = SimpleNamespace(has_corrupted=True)
        self.calls.clear()

    def level(self, name: str, progress: object = None) -> np.ndarray:
        return getattr(self, name)

    def n_passes(self, *sweeps: int, levels: Sequence[str] = ()) -> int:
        return len(sweeps)

    def masked(self, sets: IndexedSets, progress: object = None) -> np.ndarray:
        return self.without([[self.graph.edges[i].name for i in each] for each in sets.sets], progress)

    def without(self, sets: Sequence[Collection[str]], progress: object = None) -> np.ndarray:
        self.calls.append(len(sets))
        return np.array([self.score(frozenset(names)) for names in sets], np.float64)
