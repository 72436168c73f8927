"""How a picture's edges run from node to node without hiding behind others: curves that clear the boxes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_SIDEWAYS = (0.2, 0.4, 0.55, 0.7, 0.9, 1.15, 1.5, 2.0, 2.6)
_BENDS = np.array([0.0, *(sign * bend for bend in _SIDEWAYS for sign in (1, -1))])
"""How far to the side a curve may set out, and come in."""
_LIFT = 0.55
"""How far above its start a curve turns, and below its end; less where there is less room."""
_CLEAR = 0.06
"""What is left free beside a box."""
_CELL = 0.09
"""Curves in the same cell lie on each other."""
_SAMPLES = 48
_BEHIND, _BESIDE, _BENT = 1000.0, 1.0, 3.0
"""What a point behind a box, a point on another curve, and a unit of bending cost."""


@dataclass(frozen=True)
class Box:
    """A node's box: its middle and its sizes."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Wire:
    """An edge to be drawn, upwards.

    Args:
        start, end: [x, y].
        source, target: which boxes it may touch.
        slides: of the start and of the end, between which x it may stand instead; None where it stands fast.
    """

    start: tuple[float, float]
    end: tuple[float, float]
    source: str
    target: str
    slides: tuple[tuple[float, float] | None, tuple[float, float] | None] = (None, None)


def curves(wires: Sequence[Wire], boxes: Mapping[str, Box], sides: tuple[float, float]) -> list[np.ndarray]:
    """A cubic Bezier curve for each wire: its four control points [4, 2].

    The short ones, which have little choice, are laid first. Each takes the way that goes behind the fewest boxes, lies
    on the fewest others, and bends the least.

    Args:
        boxes: of all nodes, by name.
        sides: the least and the greatest x that there is room for.
    """
    found: dict[int, np.ndarray] = {}
    laid = _Laid(wires, sides)
    for i in sorted(range(len(wires)), key=lambda i: wires[i].end[1] - wires[i].start[1]):
        ways, bent = _ways(wires[i])
        points = _points(ways)
        foreign = [box for name, box in boxes.items() if name not in (wires[i].source, wires[i].target)]
        hidden = _behind(points, foreign) + _outside(points, sides)
        best = int((_BEHIND * hidden + _BESIDE * laid.shared(points) + _BENT * bent).argmin())
        found[i] = ways[best]
        laid.add(points[best])
    return [found[i] for i in range(len(wires))]


class _Laid:
    """Where curves are already, in cells of the picture."""

    def __init__(self, wires: Sequence[Wire], sides: tuple[float, float]) -> None:
        self._origin = np.array([sides[0], min(wire.start[1] for wire in wires)])
        highest = max(wire.end[1] for wire in wires)
        shape = np.ceil((np.array([sides[1], highest]) - self._origin) / _CELL).astype(int) + 1
        self._taken = np.zeros(shape, dtype=bool)

    def _cells(self, points: np.ndarray) -> tuple[np.ndarray, ...]:
        cells = np.round((points - self._origin) / _CELL).astype(int)
        return tuple(np.moveaxis(np.clip(cells, 0, np.array(self._taken.shape) - 1), -1, 0))

    def add(self, points: np.ndarray) -> None:
        self._taken[self._cells(points)] = True

    def shared(self, points: np.ndarray) -> np.ndarray:
        """How many of the points [way, point, 2] lie on a curve, [way]."""
        return self._taken[self._cells(points)].sum(axis=-1)


def _ways(wire: Wire) -> tuple[np.ndarray, np.ndarray]:
    """The curves that a wire may take [way, 4, 2], and by how much each bends [way]; the first one is straight.

    All of them are at the same height at the same share of the way.
    """
    out, back = (bends.ravel() for bends in np.meshgrid(_BENDS, _BENDS, indexing="ij"))
    (x, y), (to_x, to_y) = wire.start, wire.end
    lift = min(_LIFT, (to_y - y) / 3)
    starts, ends = (
        np.full(len(bends), at) if slide is None else np.clip(at + bends, *slide)
        for at, bends, slide in zip((x, to_x), (out, back), wire.slides, strict=True)
    )
    xs = np.stack([starts, x + out, to_x + back, ends], axis=1)
    ys = np.tile([y, y + lift, to_y - lift, to_y], (len(out), 1))
    ways = np.stack([xs, ys], axis=-1)
    ways[0, :, 0] = x + (to_x - x) * (ys[0] - y) / (to_y - y)
    return ways, np.abs(out) + np.abs(back) + np.abs(out - back)


def _points(ways: np.ndarray) -> np.ndarray:
    """Points along curves, [way, point, 2]."""
    t = np.linspace(0, 1, _SAMPLES)[:, None]
    weights = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    return np.einsum("pc,wcx->wpx", weights, ways)


def _outside(points: np.ndarray, sides: tuple[float, float]) -> np.ndarray:
    """How many of the points of each way there is no room for, [way]."""
    return ((points[..., 0] < sides[0]) | (points[..., 0] > sides[1])).sum(axis=-1)


def _behind(points: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """How many of the points of each way are behind a box, [way]; all ways are of the same heights."""
    inside = np.zeros(points.shape[:2], dtype=bool)
    heights = points[0, :, 1]
    for box in boxes:
        beside = np.flatnonzero(np.abs(heights - box.y) < box.height / 2 + _CLEAR)
        inside[:, beside] |= np.abs(points[:, beside, 0] - box.x) < box.width / 2 + _CLEAR
    return inside.sum(axis=-1)
