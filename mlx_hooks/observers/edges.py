"""Attention weights that were kept, as edges from key to query in arrays: selecting them, storing them."""

from typing import Any, NamedTuple

import numpy as np

from .columns import Columns


class Found(NamedTuple):
    """Selected weights of an array [head, query, key]: their indices along its axes, and themselves."""

    heads: np.ndarray
    rows: np.ndarray
    keys: np.ndarray
    weights: np.ndarray


def strongest(weights: np.ndarray, threshold: float, top_k: int | None = None) -> Found:
    """The weights above a threshold, and of each row at most the ``top_k`` strongest; of equal ones the earlier keys.

    Args:
        weights: [head, query, key].

    >>> strongest(np.array([[[0.5, 0.05, 0.45]]]), 0.1).keys.tolist()
    [0, 2]
    """
    above = weights > threshold
    if top_k is not None and top_k < weights.shape[-1] and np.count_nonzero(above) > 4 * top_k * above[..., 0].size:
        # Far more than are wanted: only those from the k-th strongest on have to be put in order.
        above &= weights >= np.partition(weights, -top_k, axis=-1)[..., -top_k, None]
    places = np.flatnonzero(above)
    kept = weights.reshape(-1)[places]
    rows, keys = np.divmod(places, weights.shape[-1])
    if top_k is not None and len(places):
        order = np.lexsort((keys, -kept, rows))
        first = np.flatnonzero(np.diff(rows[order], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(first, np.diff(np.append(first, len(order))))
        chosen = np.sort(order[rank < top_k])
        rows, keys, kept = rows[chosen], keys[chosen], kept[chosen]
    heads, rows = np.divmod(rows, weights.shape[1])
    return Found(heads, rows, keys, kept)


class Block(NamedTuple):
    """The edges of one layer in one forward pass."""

    layer: int
    position: int
    stop: int
    nth: int
    edges: range
    record: int


class Edges:
    """The edges of a generation, in the order of its passes: 14 bytes each, and a row per pass and layer."""

    def __init__(self) -> None:
        self._edges = Columns(source=np.int32, target=np.int32, head=np.int16, weight=np.float32)
        # Where the edges of a pass and layer begin, and which record its first head is.
        self._blocks = Columns(
            layer=np.int32, position=np.int32, stop=np.int32, nth=np.int16, edge=np.int64, record=np.int64
        )
        self.heads: dict[int, tuple[int, ...]] = {}
        """The heads that were looked at, by layer."""
        self.repeating: set[int] = set()
        """Layers that ran several times in one pass."""
        self.n_records = 0

    def append(self, layer: int, nth: int, position: int, rows: range, heads: tuple[int, ...], found: Found) -> None:
        """Add what was found in rows at the positions ``rows`` of the pass that begins at ``position``."""
        if rows.start > position and len(self._blocks):
            # A further part of a long prompt.
            self._blocks["stop"][-1] = rows.stop
        else:
            self._blocks.append(
                layer=[layer],
                position=[position],
                stop=[rows.stop],
                nth=[nth],
                edge=[len(self._edges)],
                record=[self.n_records],
            )
            self.heads[layer] = heads
            self.n_records += len(heads)
            self.repeating |= {layer} if nth else set()
        head = np.array(heads, np.int16)[found.heads]
        self._edges.append(source=found.keys, target=found.rows + rows.start, head=head, weight=found.weights)

    def __len__(self) -> int:
        return len(self._edges)

    @property
    def nbytes(self) -> int:
        return self._edges.nbytes + self._blocks.nbytes

    def block(self, index: int) -> Block:
        """A pass and layer, counted from 0."""
        row = {name: int(self._blocks[name][index]) for name in ("layer", "position", "stop", "nth", "edge", "record")}
        end = int(self._blocks["edge"][index + 1]) if index + 1 < len(self._blocks) else len(self)
        edges = range(row.pop("edge"), end)
        return Block(edges=edges, **row)

    def record(self, index: int) -> tuple[int, Block, int, np.ndarray]:
        """The block of a record and its index, the head's place in it, and where its edges are."""
        at = int(np.searchsorted(self._blocks["record"], index, side="right")) - 1
        block = self.block(at)
        place = index - block.record
        head = self.heads[block.layer][place]
        own = np.flatnonzero(self._edges["head"][block.edges.start : block.edges.stop] == head) + block.edges.start
        return at, block, place, own

    def arrays(self) -> dict[str, np.ndarray]:
        """All edges: layer, head, source, target, weight and nth (the pass through the layer), equally long."""
        counts = np.diff(np.append(self._blocks["edge"], len(self)))
        of_blocks = {name: np.repeat(self._blocks[name], counts) for name in ("layer", "nth")}
        return of_blocks | {name: self._edges[name] for name in ("head", "source", "target", "weight")}

    def rows(self, at: np.ndarray) -> dict[str, Any]:
        """Some of the edges as lists of plain numbers."""
        return {name: self._edges[name][at].tolist() for name in ("head", "source", "target", "weight")}
