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
        axes.legend(fontsize=8, frameon=False)


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
    axes.figure.colorbar(shown, ax=axes, label=label)
    if values.size <= 200:
        for row, column in np.argwhere(there):
            number = values[row, column]
            is_dark = (number - low) / (high - low) > 0.8 or (low < 0 and number < 0.6 * low)
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
            axes.text(column, row, f"{number:.2g}", color="white" if is_dark else "black", **style)
    for row, column in marked:
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2))
