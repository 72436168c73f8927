"""A linear model: attention is uniform and MLPs have no activation, so what each edge does is a product of matrices.

Each node writes to a part of the stream that is its own, and each input reads the parts of its sources through random
matrices; queries and keys read nothing. An edge is true if it lies on a way to the logits. The logit difference is
linear in every activation, so attribution by gradients is exact, and ``edge_effects`` says in NumPy float64 what it is,
for any ablation:

    effect of source -> input  =  sum over positions of (what is put in - what the source wrote) . d metric / d input
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from ...errors import HookError
from .known import KnownModel, check_heads, check_whole
from .transformer import Head, Layer, Model, Neurons, Stream, build

OWN = 4
"""Dimensions of each node's part of the stream, and of what each node computes in between."""
POSITIONS = 32


@dataclass(frozen=True)
class KnownLinear(KnownModel):
    """The construction for a vocabulary, a number of layers and of heads per layer; ``density`` is of edges drawn.

    Raises:
        HookError: for sizes, a density and a seed that make no model.
    """

    name: ClassVar[str] = "linear"
    description: ClassVar[str] = "Random matrices along sparse edges, all linear: attribution by gradients is exact."
    notes: ClassVar[str] = "True edges do not depend on the ablation; how strong each is does: see edge_effects."
    kinds: ClassVar[tuple[str, ...]] = ("tokens",)
    LENGTH: ClassVar[int] = 8

    vocabulary: int = 12
    n_layers: int = 2
    n_heads: int = 3
    density: float = 0.5
    seed: int = 9

    def __post_init__(self) -> None:
        check_whole("vocabulary", self.vocabulary, 2)
        check_whole("n_layers", self.n_layers, 1)
        check_heads(self)
        check_whole("seed", self.seed, 0)
        if type(self.density) not in (int, float) or not 0 <= self.density <= 1:
            raise HookError(f"density is a number from 0 to 1, got {self.density!r}.", field="density")

    # The graph: which parts of the stream each node reads.

    @property
    def nodes(self) -> list[str]:
        """What reads and what writes, in forward order: "embed", "L0H0", "L0 mlp", ..., "logits"."""
        layers = range(self.n_layers)
        inner = [name for i in layers for name in (*(f"L{i}H{h}" for h in range(self.n_heads)), f"L{i} mlp")]
        return ["embed", *inner, "logits"]

    @cached_property
    def sources(self) -> dict[str, list[str]]:
        """What each node reads, at least the embedding; some nodes lie on no way to the logits."""
        rng = np.random.default_rng(self.seed)
        nodes = self.nodes
        return {
            node: [s for s in nodes[:i] if self._before(s, node) and rng.random() < self.density] or nodes[: min(i, 1)]
            for i, node in enumerate(nodes)
        }

    def _before(self, source: str, node: str) -> bool:
        """Whether a node earlier in the list writes before the other reads: heads of one layer do not."""
        return not ("H" in source and "H" in node and source.partition("H")[0] == node.partition("H")[0])

    @property
    def true_edges(self) -> Mapping[str, Mapping[str, list[str]]]:
        matter = {"logits"}
        for node in reversed(self.nodes):
            matter |= set(self.sources[node]) if node in matter else set()
        edges = {
            "tokens": [_edge(source, node) for node in self.nodes if node in matter for source in self.sources[node]]
        }
        return {"corrupted": edges, "zero": edges, "mean": edges}

    # The matrices.

    @cached_property
    def _stream(self) -> Stream:
        return Stream(**dict.fromkeys(self.nodes[:-1], OWN))

    @cached_property
    def _maps(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """How each node reads and writes, [rows, d_model] both; the embedding's are tokens and positions."""
        rng, stream = np.random.default_rng(self.seed + 1), self._stream
        tokens, positions = (rng.normal(size=(n, OWN)) @ stream["embed"] for n in (self.vocabulary, POSITIONS))
        maps = {"embed": (tokens, positions)}
        for node in self.nodes[1:]:
            n_rows = self.vocabulary if node == "logits" else OWN
            own = self.sources[node]
            read = np.zeros((n_rows, stream.d_model))
            for source in own:
                read += rng.normal(size=(n_rows, OWN)) @ stream[source] / np.sqrt(OWN * len(own))
            write = read if node == "logits" else rng.normal(size=(OWN, OWN)) @ stream[node] / np.sqrt(OWN)
            maps[node] = (read, write)
        return maps

    def module(self) -> Model:
        nothing = np.zeros((OWN, self._stream.d_model))
        layers = [
            Layer(
                [Head(nothing, nothing, *self._maps[f"L{i}H{h}"]) for h in range(self.n_heads)],
                Neurons(*self._maps[f"L{i} mlp"]),
            )
            for i in range(self.n_layers)
        ]
        unembed, _ = self._maps["logits"]
        return build("known_linear", *self._maps["embed"], layers, unembed, activation="linear")

    # What it computes.

    def written(self, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """What each node writes [pos, d_model], and the ``logits`` [pos, d_vocab], float64."""
        words, places = self._maps["embed"]
        found = {"embed": words[list(tokens)] + places[: len(tokens)]}
        for node in self.nodes[1:]:
            read, write = self._maps[node]
            hidden = sum(found[source] for source in self.nodes[: len(found)]) @ read.T
            hidden = _uniform(len(tokens)) @ hidden if "H" in node else hidden
            found[node] = hidden if node == "logits" else hidden @ write
        return found

    def gradients(self, n: int, answer: int, wrong: int) -> dict[str, np.ndarray]:
        """The derivative [pos, d_model] of the last logit difference by what each node reads, for n positions."""
        read, _ = self._maps["logits"]
        last = np.zeros((n, self._stream.d_model))
        last[-1] = read[answer] - read[wrong]
        found = {"logits": last}
        for node in reversed(self.nodes[1:-1]):
            read, write = self._maps[node]
            # All that reads what this node writes; of other nodes' parts it knows nothing.
            after = sum(found.values()) @ write.T
            found[node] = (_uniform(n).T @ after if "H" in node else after) @ read
        return found

    def edge_effects(self, pairs: Sequence[Mapping[str, Any]], ablation: str = "corrupted") -> dict[str, np.ndarray]:
        """How much the logit difference changes when each edge alone is replaced: every edge of the graph, [pair].

        Args:
            pairs: of one length, as ``pairs`` gives them.
            ablation: "corrupted", "zero", or "mean" (at each position, over the pairs' clean prompts).

        Raises:
            HookError: for another ablation.
        """
        self.edges(ablation)
        own = [self.written(pair["clean"]) for pair in pairs]
        if ablation == "corrupted":
            put = [self.written(pair["corrupted"]) for pair in pairs]
        elif ablation == "mean":
            put = [{node: np.mean([one[node] for one in own], axis=0) for node in self.nodes}] * len(pairs)
        else:
            put = [{node: np.zeros_like(value) for node, value in one.items()} for one in own]
        slopes = [self.gradients(len(pair["clean"]), pair["answer"], pair["wrong"]) for pair in pairs]
        effects: dict[str, np.ndarray] = {}
        for i, node in enumerate(self.nodes):
            for source in (s for s in self.nodes[:i] if self._before(s, node)):
                changes = [
                    float(((new[source] - old[source]) * slope[node]).sum())
                    for old, new, slope in zip(own, put, slopes, strict=True)
                ]
                effects[_edge(source, node)] = np.array(changes)
                if "H" in node:
                    effects |= {f"{source}->{node}<{kind}>": np.zeros(len(pairs)) for kind in "qk"}
        return effects

    # What it is about.

    def pair(self, rng: np.random.Generator, kind: str) -> dict[str, Any]:
        """Tokens at random; the answer is what the model says last, the wrong one what it says to other tokens."""
        for _ in range(100):
            prompts = rng.integers(0, self.vocabulary, size=(2, self.LENGTH)).tolist()
            answer, wrong = (int(self.written(tokens)["logits"][-1].argmax()) for tokens in prompts)
            if answer != wrong:
                return {"clean": prompts[0], "corrupted": prompts[1], "answer": answer, "wrong": wrong}
        raise HookError(f"With seed {self.seed} the linear model says the same to all prompts.", field="seed")


def _edge(source: str, node: str) -> str:
    return f"{source}->{node}<v>" if "H" in node else f"{source}->{node}"


def _uniform(n: int) -> np.ndarray:
    """Attention to all positions so far alike, [query, key]."""
    return np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
