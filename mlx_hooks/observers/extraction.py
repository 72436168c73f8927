"""Which token is looked at by which: attention as a graph of a generation."""

from collections.abc import Iterator, Mapping
from numbers import Real
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..activations import to_numpy
from ..errors import HookError
from . import graph
from .base import InferenceHook, LayerAttention, State, Wanted, indices
from .columns import Columns, LazyRecords
from .edges import Edges, strongest

if TYPE_CHECKING:
    import networkx


class AttentionExtractionHook(InferenceHook):
    """Keeps the attention weights above a threshold, as edges from key to query.

        hook = AttentionExtractionHook(threshold=0.1)
        model.generate("When Mary and John went to the store , John gave a drink to", max_tokens=3, hooks=[hook])
        hook.get_token_attention_summary("Mary")["total_received"]
        hook.get_edges_for_layer_head(layer=2, head=1)[:5]            # the strongest first
        hook.save_graphml("attention.graphml")

    Each query row is recorded once, with absolute positions. Weights are selected on the arrays; memory grows with the
    edges that are kept. It holds the latest generation: a new one begins afresh.

    An **edge** runs the way that information flows: ``source_pos`` is the key that is attended to, ``target_pos`` the
    query that attends to it. A token *receives* attention as key, from later queries and itself. It *gives* attention
    as query: over all keys that is 1 per head and layer, of which the edges hold what exceeds the threshold.

    Args:
        threshold: weights above it are kept; from 0 to below 1.
        store_values: keep value vectors too, and show with each edge that of its source: what the query reads there.
        top_k: of each query row, keep the k strongest at most; of equal ones the earlier keys.
        layers, heads: which ones to look at; None for all.
        store_matrices: keep the whole matrices too. Their memory grows with the square of the length.
    """

    def __init__(
        self,
        threshold: float = 0.1,
        store_values: bool = False,
        top_k: int | None = None,
        layers: Any = None,
        heads: Any = None,
        store_matrices: bool = False,
    ) -> None:
        super().__init__("attention_extractor")
        is_number = isinstance(threshold, Real) and not isinstance(threshold, bool)
        if not is_number or not 0 <= threshold < 1:
            raise HookError(f"threshold is a number from 0 to below 1, got {threshold!r}.", field="threshold")
        self.threshold = float(threshold)
        self.store_values = bool(store_values)
        self.top_k = None if top_k is None else _count("top_k", top_k)
        self.layers = indices("layers", layers)
        self.heads = indices("heads", heads)
        self.store_matrices = bool(store_matrices)
        self._forget()

    def _forget(self) -> None:
        self.tokens: list[str] = []
        """The text of each token that was read so far, by position."""
        self.prompt_length = 0
        self._edges = Edges()
        self._values: dict[tuple[int, int], Columns] = {}
        self._n_heads: dict[int, int] = {}
        self._matrices: list[np.ndarray] = []

    def clear(self) -> None:
        """Forget the generation."""
        super().clear()
        self._forget()

    def attention_wanted(self, streams: Mapping[int, str]) -> Wanted:
        """The weights, and values where they are kept."""
        arrays = ("value",) if self.store_values else ()
        return Wanted(self.layers, self.heads, arrays, in_parts=not self.store_matrices)

    def on_generation_begin(self, prompt_tokens: list[str], state: State) -> None:
        """Begin afresh."""
        self.clear()
        self.prompt_length = len(prompt_tokens)

    def on_layer_attention(
        self, layer_idx: int, attention: LayerAttention, tokens: list[str], position: int, state: State
    ) -> None:
        """Keep a layer's edges.

        Raises:
            HookError: for weights that are not numbers, as they are where scores overflow.
        """
        self.tokens = tokens
        # NumPy takes the row: MLX would queue it behind the pass that runs meanwhile.
        weights = np.asarray(attention.weights)[0]
        # A row that is not a number sums to none: one pass over the array, and no mask of its size.
        if not np.isfinite(weights.sum()):
            raise HookError(f"The attention of layer {layer_idx} is not a number: its scores overflowed.")
        found = strongest(weights, self.threshold, self.top_k)
        self._edges.append(layer_idx, attention.pass_index, position, attention.positions, attention.heads, found)
        if self.store_values:
            assert attention.value is not None
            self._n_heads[layer_idx] = attention.n_heads
            self._keep_values((layer_idx, attention.pass_index), attention.value)
        if self.store_matrices:
            self._matrices.append(np.array(weights))

    def _keep_values(self, place: tuple[int, int], value: mx.array) -> None:
        """Keep values [1, key, kv_head, d_head] of the positions that are new."""
        kept = self._values.setdefault(place, Columns(value=(np.float32, value.shape[2:])))
        # As above, where NumPy has the type; it has no bfloat16.
        new = np.asarray(value)[0, len(kept) :] if value.dtype == mx.float32 else to_numpy(value[0, len(kept) :])
        kept.append(value=new)

    # What was kept

    @property
    def attention_data(self) -> LazyRecords:
        """A record per pass, layer and head, in the order of the passes; each is made when it is read.

        ``{layer, head, position, tokens, edges, generation_context: {prompt_length, total_length}}``: position is that
        of the pass's first query, tokens are those up to its last one. An edge is ``{source_pos, target_pos, weight,
        source_token, target_token}``, with ``store_values`` also ``value`` [d_head]. With ``store_matrices`` there is
        ``attention_matrix`` [query, key]; where a layer runs several times in one pass, ``pass_index``.
        """
        return LazyRecords(lambda: self._edges.n_records, self._record)

    @property
    def n_edges(self) -> int:
        """How many edges were kept."""
        return len(self._edges)

    @property
    def nbytes(self) -> int:
        """Bytes of what was kept, texts aside."""
        values, matrices = self._values.values(), self._matrices
        return self._edges.nbytes + sum(kept.nbytes for kept in values) + sum(matrix.nbytes for matrix in matrices)

    def edge_arrays(self) -> dict[str, np.ndarray]:
        """All edges as arrays of equal length: layer, head, source, target, weight; in the order of the passes.

        ``source`` and ``target`` are absolute positions, of the key and of the query; ``nth`` counts the passes through
        a layer that runs several times in one forward pass, and is 0 for nearly all models.
        """
        return self._edges.arrays()

    def _record(self, index: int) -> dict[str, Any]:
        at, block, place, own = self._edges.record(index)
        record = {
            "layer": block.layer,
            "head": self._edges.heads[block.layer][place],
            "position": block.position,
            "tokens": self.tokens[: block.stop],
            "edges": list(self._shown(own, [block.layer] * len(own), [block.nth] * len(own))),
            "generation_context": {"prompt_length": self.prompt_length, "total_length": block.stop},
        }
        if block.layer in self._edges.repeating:
            record["pass_index"] = block.nth
        if self.store_matrices:
            record["attention_matrix"] = self._matrices[at][place]
        return record

    def _shown(self, at: np.ndarray, layers: list[int], passes: list[int]) -> Iterator[dict[str, Any]]:
        """The edges at these places, as records show them."""
        rows = self._edges.rows(at)
        columns = zip(layers, passes, *(rows[name] for name in ("head", "source", "target", "weight")), strict=True)
        for layer, nth, head, source, target, weight in columns:
            edge = {
                "source_pos": source,
                "target_pos": target,
                "weight": weight,
                "source_token": self.tokens[source],
                "target_token": self.tokens[target],
            }
            if self.store_values:
                values = self._values[layer, nth]["value"][source]
                edge["value"] = values[head * len(values) // self._n_heads[layer]].copy()
            yield edge

    def get_edges_for_layer_head(self, layer: int, head: int) -> list[dict[str, Any]]:
        """The edges of one head, the strongest first.

        Raises:
            HookError: for a layer or head that was not looked at.
        """
        looked_at = self._edges.heads
        if head not in looked_at.get(layer, ()):
            what = f"head {head!r} of layer {layer}" if layer in looked_at else f"layer {layer!r}"
            seen = looked_at.get(layer) if layer in looked_at else sorted(looked_at)
            raise HookError(f"No attention of {what} was seen. There are: {', '.join(map(str, seen or ())) or 'none'}.")
        edges = self.edge_arrays()
        own = np.flatnonzero((edges["layer"] == layer) & (edges["head"] == head))
        own = own[np.argsort(-edges["weight"][own], kind="stable")]
        return list(self._shown(own, [layer] * len(own), edges["nth"][own].tolist()))

    # Who attends to whom

    def attention_received_as_key(self, by: str = "position") -> dict[Any, float]:
        """How much attention each token received: the weights of all edges from it, in all layers and heads, added up.

        The most attended first. ``by`` is "position", or "token": tokens with the same text are taken together.
        """
        return self._totals("source", by)

    def attention_given_as_query(self, by: str = "position") -> dict[Any, float]:
        """How much attention each token gave, as far as the edges hold it: the weights of all edges to it, added up."""
        return self._totals("target", by)

    def _totals(self, end: str, by: str) -> dict[Any, float]:
        if by not in ("position", "token"):
            raise HookError(f"by is 'position' or 'token', got {by!r}.")
        edges = self.edge_arrays()
        totals = np.bincount(edges[end], weights=edges["weight"], minlength=len(self.tokens)).tolist()
        found: dict[Any, float] = {}
        for position, total in enumerate(totals):
            key = position if by == "position" else self.tokens[position]
            if total:
                found[key] = found.get(key, 0.0) + total
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def get_token_attention_summary(self, token: str | None = None, *, position: int | None = None) -> dict[str, Any]:
        """Who attends to a token, and to whom it attends, in all layers and heads.

            hook.get_token_attention_summary("Mary")            # all tokens with this text, taken together
            hook.get_token_attention_summary(position=1)

        Returns:
            ``received_attention``: as key, ``[{from, from_position, weight, layer, head}]`` with the queries that
            attend to it; ``given_attention``: as query, ``[{to, to_position, ...}]`` with the keys that it attends to;
            their sums ``total_received`` and ``total_given``; ``token`` and ``positions``. The strongest come first. A
            text that is not among the tokens has no positions and sums of 0; blanks around a token's text do not
            count, unless ``token`` has some.

        Raises:
            HookError: for a token that is no text, a position that was not read, and unless one of the two is given.
        """
        if (token is None) == (position is None):
            raise HookError("A summary is of a token or of a position: give one of them.")
        if position is not None:
            position = self._read_position(position)
            token, positions = self.tokens[position], [position]
        elif not isinstance(token, str):
            raise HookError(f"token is the text of a token, got {token!r}: give a position as position=...")
        else:
            bare = token == token.strip()
            positions = [i for i, text in enumerate(self.tokens) if (text.strip() if bare else text) == token]
        received = self._ends(positions, at="source", other="target", word="from")
        given = self._ends(positions, at="target", other="source", word="to")
        return {
            "token": token,
            "positions": positions,
            "received_attention": received,
            "given_attention": given,
            "total_received": sum((edge["weight"] for edge in received), 0.0),
            "total_given": sum((edge["weight"] for edge in given), 0.0),
        }

    def _read_position(self, position: Any) -> int:
        try:
            found = -1 if isinstance(position, bool) else index(position)
        except TypeError:
            found = -1
        if not 0 <= found < len(self.tokens):
            read = f"Positions 0 to {len(self.tokens) - 1} were read" if self.tokens else "No position was read"
            raise HookError(f"{read}, got {position!r}.")
        return found

    def _ends(self, positions: list[int], *, at: str, other: str, word: str) -> list[dict[str, Any]]:
        edges = self.edge_arrays()
        own = np.flatnonzero(np.isin(edges[at], positions))
        own = own[np.argsort(-edges["weight"][own], kind="stable")]
        columns = (edges[name][own].tolist() for name in (other, "weight", "layer", "head"))
        return [
            {word: self.tokens[end], f"{word}_position": end, "weight": weight, "layer": layer, "head": head}
            for end, weight, layer, head in zip(*columns, strict=True)
        ]

    def layer_head_stats(self) -> dict[str, dict[str, float]]:
        """By layer and head (``"L0_H1"``) the number of edges, their mean and their largest weight."""
        edges = self.edge_arrays()
        stats = {}
        for layer in sorted(self._edges.heads):
            of_layer = edges["layer"] == layer
            for head in self._edges.heads[layer]:
                weights = edges["weight"][of_layer & (edges["head"] == head)]
                stats[f"L{layer}_H{head}"] = {
                    "edge_count": len(weights),
                    "avg_weight": float(weights.mean(dtype=np.float64)) if len(weights) else 0.0,
                    "max_weight": float(weights.max()) if len(weights) else 0.0,
                }
        return stats

    # As a file or a graph

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; see ``graph.as_dict``."""
        return graph.as_dict(self)

    def save_json(self, path: str | Path) -> None:
        """Write ``to_dict()`` as strict JSON: the file is there whole or not at all.

        Raises:
            HookError: when it cannot be written.
        """
        graph.save_json(self, path)

    def to_networkx(self, by: str = "position") -> "networkx.MultiDiGraph":
        """The attention graph; see ``graph.as_graph``."""
        return graph.as_graph(self, by)

    def save_graphml(self, path: str | Path, by: str = "position") -> None:
        """Write ``to_networkx(by)`` as GraphML: the file is there whole or not at all.

        Raises:
            HookError: when it cannot be written.
        """
        graph.save_graphml(self, path, by)


def _count(name: str, value: Any) -> int:
    try:
        found = 0 if isinstance(value, bool) else index(value)
    except TypeError:
        found = 0
    if found < 1:
        raise HookError(f"{name} is None or a whole number from 1 up, got {value!r}.", field=name)
    return found


def create_attention_extraction_hook(
    threshold: float = 0.1, store_values: bool = False, **options: Any
) -> AttentionExtractionHook:
    """An :class:`AttentionExtractionHook`; options are those of the class."""
    return AttentionExtractionHook(threshold, store_values, **options)
