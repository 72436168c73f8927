"""What the pictures of analyses share: figures, histograms, scatters and heat maps in one style."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .pictures import PLAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f6feb", "#b35900", "#2da44e", "#8250df", "#5c6670", "#bf3989", "#0a7ea4", "#9a6700")
"""Of kinds, in this order; they can be told apart in grey and by those who see few colours, as far as eight can."""
FAINT = "#5c6670"
_BINS = 40


def figure(title: str, columns: int = 1, *, width: float = 5.0, height: float = 3.6) -> tuple["Figure", list["Axes"]]:
    """A figure with so many drawings side by side, each ``width`` by ``height`` inches."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(width * columns, height), layout="constrained")
    made.suptitle(title, fontsize=11, **PLAIN)
    axes = [made.add_subplot(1, columns, i + 1) for i in range(columns)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8)
    return made, axes


def histogram(
    axes: "Axes",
    numbers: Mapping[str, np.ndarray],
    label: str,
    limits: tuple[float, float] | None = None,
    *,
    rare: bool = False,
) -> None:
    """How often numbers occur, as outlines over each other; ``numbers`` by what they are.

    Args:
        rare: the count's axis is logarithmic, so that few numbers far out are seen.
    """
    joined = np.concatenate([np.ravel(each) for each in numbers.values()])
    low, high = limits or (float(joined.min()), float(joined.max()))
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    for colour, (name, each) in zip(COLOURS, numbers.items(), strict=False):
        axes.hist(each, bins=edges.tolist(), histtype="stepfilled", alpha=0.45, color=colour, label=name)
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("count", fontsize=9)
    if rare:
        axes.set_yscale("log")
    if len(numbers) > 1:
        axes.legend(fontsize=8, frameon=False, loc="upper right")


def heat_map(
    axes: "Axes",
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    *,
    limits: tuple[float, float] | None = None,
    marked: Sequence[tuple[int, int]] = (),
) -> None:
    """Numbers [row, column] as colours, and written out where there is room; nan is left empty.

    Args:
        limits: where the colours end. None: as far from 0 on either side as the largest number.
        marked: cells (row, column) with a frame.
    """
    from matplotlib.patches import Rectangle

    there = np.isfinite(values)
    size = float(np.abs(values[there]).max()) if there.any() else 1.0
    low, high = limits or (-(size or 1.0), size or 1.0)
    colours = "RdBu_r" if low < 0 else "Blues"
    shown = axes.imshow(np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_yticks(range(len(rows)), rows, fontsize=8, **PLAIN)
    axes.set_xticks(range(len(columns)), columns, fontsize=8, rotation=0 if len(columns) <= 12 else 90, **PLAIN)
    scale = axes.figure.colorbar(shown, ax=axes)
    scale.set_label(label, fontsize=8)
    scale.ax.tick_params(labelsize=7)
    if values.size <= 200:
        for row, column in np.argwhere(there):
            number = values[row, column]
            is_dark = abs(number) > 0.6 * max(high, -low)
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
            axes.text(column, row, f"{number:.2g}", color="white" if is_dark else "black", **style)
    for row, column in marked:
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2))


def component_map(
    axes: "Axes",
    components: Sequence[Mapping[str, Any]],
    numbers: Sequence[float | None],
    label: str,
    marked: Sequence[bool] | None = None,
) -> None:
    """A number per component of a model: layers from top to bottom, parts from left to right.

    Args:
        components: as results list them, with ``layer`` and ``component``; "L2H1" stands in the column H1.
        marked: which of them get a frame.
    """
    layers = sorted({one["layer"] for one in components})
    places = [(one["layer"], one["component"].removeprefix(f"L{one['layer']}").strip()) for one in components]
    columns = list(dict.fromkeys(column for _, column in sorted(places, key=lambda place: _column_order(place[1]))))
    values = np.full((len(layers), len(columns)), np.nan)
    cells = [(layers.index(layer), columns.index(column)) for layer, column in places]
    for cell, number in zip(cells, numbers, strict=True):
        values[cell] = np.nan if number is None else number
    framed = [cell for cell, is_marked in zip(cells, marked or [False] * len(cells), strict=True) if is_marked]
    names = [column or "block" for column in columns]
    heat_map(axes, values, [f"layer {layer}" for layer in layers], names, label, marked=framed)


def _column_order(column: str) -> tuple[int, int]:
    is_head = column[:1] == "H" and column[1:].isdigit()
    return (0, int(column[1:])) if is_head else (1, ("mixer", "attn", "mlp", "side", "").index(column))


def map_size(components: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How large a ``component_map`` of these is to be, in inches: ``figure``'s width and height."""
    n_layers = len({one["layer"] for one in components})
    n_columns = len({one["component"].removeprefix(f"L{one['layer']}") for one in components})
    return {"width": min(14.0, 3.2 + 0.42 * n_columns), "height": min(14.0, 1.6 + 0.34 * n_layers)}


def estimates(axes: "Axes", named: Mapping[str, Mapping[str, Any]], label: str) -> None:
    """Means as points with their intervals, from top to bottom; each as ``Estimate.to_dict`` has it."""
    shown = {name: one for name, one in named.items() if one["mean"] is not None}
    for y, one in enumerate(shown.values()):
        if one["low"] is not None:
            axes.plot([one["low"], one["high"]], [y, y], color=COLOURS[0], linewidth=1.5)
        axes.plot([one["mean"]], [y], color=COLOURS[0], marker="o", markersize=5)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_yticks(range(len(shown)), list(shown), fontsize=8, **PLAIN)
    axes.invert_yaxis()
    axes.set_xlabel(label, fontsize=9)
