"""Where the nodes of a circuit stand, as their names say it: to draw and to export one needs no model."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import HookError

if TYPE_CHECKING:
    from .circuit import Circuit

EMBED, LOGITS = "embed", "logits"
_NODE = re.compile(r"L(\d+)(?:H(\d+)| (mixer|attn|mlp|side))")
_KIND = re.compile(r".*<([qkv])>")
_ROWS = {"mixer": 0, "head": 1, "attn": 1, "side": 2, "mlp": 3}
"""What of a layer stands below what, in the order of a forward pass."""
_LAST = 2**31
SIGNED = ("eap", "eap-ig", "exact")
"""Methods whose scores say what the metric changes by when the edge is ablated."""
SIZED = ("acdc",)
"""Methods whose scores say how far the metric moves without the edge, and not whether up or down."""


@dataclass(frozen=True)
class Place:
    """Where a node stands.

    Args:
        name: "embed", "L0H1", "L0 mlp", "logits".
        layer: the block's index; None for "embed" and "logits".
        part: "embed", "head", "attn", "mlp", "mixer", "side" or "logits".
        head: the query head; None for what is no head.
    """

    name: str
    layer: int | None
    part: str
    head: int | None = None

    @property
    def row(self) -> tuple[int, int]:
        """What stands lower has a lower one; the heads of a layer share theirs."""
        if self.layer is None:
            return (-1, 0) if self.part == EMBED else (_LAST, 0)
        return self.layer, _ROWS[self.part]


@dataclass(frozen=True)
class Step:
    """From one node to another.

    Args:
        source, target: their names.
        edge: the edge's, which leads to several nodes where heads share keys and values.
        kind: "q", "k" or "v" of a head; None for what has one input.
        score: the edge's; None for none.
        effect: what the edge adds to the metric: its score with the other sign, since that is the change without the
            edge. None without a score, and for scores of methods that are not SIGNED.
        share: of the edge, by the number of nodes that it leads to.
    """

    source: str
    target: str
    edge: str
    kind: str | None
    score: float | None
    effect: float | None
    share: float

    @property
    def strength(self) -> float | None:
        """The effect, or the size of a score that says no more; None without a score."""
        return abs(self.score) if self.effect is None and self.score is not None else self.effect


def place_of(name: str) -> Place:
    """Where a node stands.

    >>> place_of("L2H1")
    Place(name='L2H1', layer=2, part='head', head=1)

    Raises:
        HookError: for what is no node's name.
    """
    if name in (EMBED, LOGITS):
        return Place(name, None, name)
    found = _NODE.fullmatch(name)
    if found is None:
        raise HookError(f"{name!r} is no node of a circuit: they are called embed, L0H1, L0 mlp, logits and so on.")
    layer, head, part = found.groups()
    return Place(name, int(layer), part or "head", None if head is None else int(head))


def places_of(circuit: "Circuit") -> dict[str, Place]:
    """A circuit's nodes by name, in forward order, and "logits" behind them."""
    return {name: place_of(name) for name in (*circuit.nodes, LOGITS)}


def steps_of(circuit: "Circuit") -> list[Step]:
    """A circuit's edges, each as often as it leads to a node of it."""
    listed = circuit.steps
    counts: dict[str, int] = {}
    for _, _, edge in listed:
        counts[edge] = counts.get(edge, 0) + 1
    is_signed = circuit.metadata.get("method") in SIGNED
    found = []
    for source, target, edge in listed:
        kind, score = _KIND.fullmatch(edge), circuit.edges[edge]
        effect = -score if is_signed and score is not None else None
        found.append(Step(source, target, edge, kind[1] if kind else None, score, effect, 1 / counts[edge]))
    return found
