"""Curves over training steps, drawn by matplotlib."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..analysis.pictures import PLAIN
from .context import MODEL, Analysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 2
_SHOWN_LAYERS = 10
"""Lines that can be told apart."""


def loss_charts(training: Sequence[Mapping[str, Any]]) -> "list[tuple[str, Figure]]":
    """The loss that training reported; nothing where it reported none."""
    lines = {
        label: [(report["step"], report[key]) for report in training if report.get(key) is not None]
        for key, label in (("train_loss", "training"), ("val_loss", "validation"))
    }
    if not any(lines.values()):
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3), layout="constrained")
    axes = figure.subplots()
    for label, points in lines.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3)
    _finish(axes, "loss (nats per token)", [step for points in lines.values() for step, _ in points])
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return [("Loss while training", figure)]


def curve_charts(
    analysis: Analysis, steps: Sequence[int], layers: Mapping[str, Mapping[str, Any]]
) -> "list[tuple[str, Figure]]":
    """One drawing: a panel for each number of an analysis, in it a line for each layer."""
    drawn = {layer: own for layer, own in layers.items() if "error" not in own}
    keys = [metric for metric in analysis.metrics if any(metric.key in own for own in drawn.values())]
    if not keys or len(steps) < 2:
        return []
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    n_rows = -(-len(keys) // _COLUMNS)
    figure = Figure(figsize=(9, 2.7 * n_rows + (0.4 if len(drawn) > 1 else 0)), layout="constrained")
    panels = figure.subplots(n_rows, _COLUMNS, squeeze=False).ravel()
    shown = dict(list(drawn.items())[-_SHOWN_LAYERS:])
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(shown)))
    for axes, metric in zip(panels, keys, strict=False):
        for (layer, own), color in zip(shown.items(), colors, strict=True):
            values = np.array([np.nan if n is None else n for n in own.get(metric.key, [None] * len(steps))], float)
            there = np.isfinite(values)
            label = None if layer == MODEL else layer
            axes.plot(np.array(steps)[there], values[there], color=color, label=label, marker="o", markersize=3)
        _finish(axes, metric.label, steps)
        if metric.kind == "share":
            axes.set_ylim(-0.04, 1.04)
        elif metric.kind == "count":
            axes.yaxis.get_major_locator().set_params(integer=True)
    for axes in panels[len(keys) :]:
        axes.set_visible(False)
    if len(shown) > 1:
        figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7, frameon=False
        )
    return [(f"{analysis.title}, step by step", figure)]


def _finish(axes: Any, label: str, steps: Sequence[int]) -> None:
    margin = 0.03 * (max(steps) - min(steps) or 1)
    axes.set_xlim(min(steps) - margin, max(steps) + margin)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xlabel("batches trained on", fontsize=8)
    axes.set_title(label, fontsize=9, loc="left", **PLAIN)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e7ea", linewidth=0.6)
    axes.set_axisbelow(True)
