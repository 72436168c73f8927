"""A trait's score at each token in each layer, as colours that part at 0."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....errors import HookError
from ... import pictures
from ...spelling import one_line, visible
from ..capture import SUBLAYERS
from . import svg
from .checks import check_numbers, check_text, check_tokens
from .painting import INK_FAINT, TokenTicks, diverging

MAX_PICTURE = 240
LEFT = 58.0


@dataclass(frozen=True)
class LayerChart:
    """One number per layer and token: the projection of the stream there onto a trait's vector.

    Args:
        title: what was read.
        tokens: as texts, the prompt's first.
        n_prompt: how many of them are the prompt.
        values: [n_layers, n_tokens].
        own_layer: the layer that the vector was made at, which is marked; None for none.
        unit: what the numbers are.
        per_layer: each layer's colours reach from 0 to its own largest value. The stream grows from layer to layer, so
            that on one scale for all the first ones are pale.

    Raises:
        HookError: for values of another shape, or that are not finite.
    """

    title: str
    tokens: list[str]
    n_prompt: int
    values: np.ndarray
    own_layer: int | None = None
    unit: str = "h.v/|v|"
    per_layer: bool = False

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.n_prompt)
        check_text("The unit of a chart", self.unit)
        # The vector may be of a deeper model: its layer need not be drawn.
        check_numbers("The vector's own layer", *([] if self.own_layer is None else [self.own_layer]))
        values = np.asarray(self.values, dtype=np.float64)
        if values.ndim != 2 or not values.size or values.shape[1] != len(self.tokens):
            raise HookError(
                f"A layer chart has values [n_layers, n_tokens], here for {len(self.tokens)} tokens; "
                f"got {list(values.shape)}."
            )
        if not np.isfinite(values).all():
            raise HookError("A layer chart has finite values only.")
        check_numbers("A layer chart", float(np.abs(values).max()))
        object.__setattr__(self, "values", values)

    @classmethod
    def of(cls, record: Mapping[str, Any], sublayer: int = 2, *, per_layer: bool = False) -> "LayerChart":
        """The chart of what ``capture_all_layers`` answers, at one of ``SUBLAYERS`` by index."""
        prompt, response, about = record["prompt"], record["response"], record["metadata"]
        parts = [np.asarray(record["projections"][part], np.float64) for part in ("prompt", "response")]
        # JSON lists of no tokens have one axis.
        values = np.concatenate([part for part in parts if part.size])[:, :, sublayer].T
        made_at = "a vector per layer" if about["layer"] is None else f"layer {about['layer']}"
        title = f"{about['trait']} ({about['method']}, {made_at}), {SUBLAYERS[sublayer]}"
        if about.get("alignment") == "predicts":
            title += ", response as it was predicted"
        return cls(
            f"{title}, on “{one_line(prompt['text'], 60)}”",
            [*prompt["tokens"], *response["tokens"]],
            len(prompt["tokens"]),
            values,
            about["layer"],
            about.get("projection", "h.v/|v|"),
            per_layer,
        )

    @property
    def limits(self) -> list[float]:
        """Where each layer's colours end, above 0 and below."""
        distances = np.abs(self.values)
        if self.per_layer:
            return [svg.limit_of(row) for row in distances.tolist()]
        return [svg.limit_of(distances.max(axis=0).tolist())] * len(distances)

    @property
    def _goes_beyond(self) -> bool:
        """Whether some value lies beyond the colours."""
        return bool((np.abs(self.values) > np.array(self.limits)[:, None]).any())

    def html(self) -> str:
        """A part of a page: the drawing, and all values as a table."""
        return f"{self._drawing()}\n{self._table()}"

    def _drawing(self) -> str:
        axis = svg.TokenAxis(self.tokens, self.n_prompt, LEFT)
        n_layers, limits = len(self.values), self.limits
        height = 22.0 if n_layers <= 16 else 16.0
        top = 58.0
        bottom = top + height * n_layers
        right = max(axis.right, LEFT + 460)
        parts = [*self._legend(), *axis.names(top - 6)]
        for layer in range(n_layers):
            y = bottom - height * (layer + 1)
            own = layer == self.own_layer
            parts.append(
                svg.label(LEFT - 8, y + height / 2 + 4, f"{layer}", anchor="end", class_="strong" if own else "faint")
            )
            parts += [self._cell(axis, layer, token, y, height, limits[layer]) for token in range(len(self.tokens))]
        if self.own_layer is not None and 0 <= self.own_layer < n_layers:
            y = bottom - height * (self.own_layer + 1)
            box: dict[str, Any] = {"x": axis.left - 0.5, "y": y, "width": axis.right - axis.left, "height": height}
            parts.append(svg.element("rect", **box, class_="own-layer"))
        if 0 < self.n_prompt < len(self.tokens):
            x = axis.left + axis.step * self.n_prompt - 0.5
            parts.append(svg.line(x, top - 14, x, bottom, "parting"))
        middle = (top + bottom) / 2
        parts.append(svg.label(0, 0, "layer", anchor="middle", transform=f"translate(14 {middle:.0f}) rotate(-90)"))
        parts += axis.labels(bottom)
        return svg.drawing(right + 16, bottom + axis.label_height + 6, parts, "Scores by layer and token")

    def _cell(self, axis: svg.TokenAxis, layer: int, token: int, y: float, height: float, limit: float) -> str:
        value = float(self.values[layer, token])
        side, share = svg.share_of(value, 0.0, limit)
        said = svg.told(f"layer {layer}, {token}: {visible(self.tokens[token])}\n{svg.number(value)}")
        box: dict[str, Any] = {"x": axis.x(token) - axis.step / 2, "y": y, "width": axis.step - 1, "height": height - 1}
        cell = svg.element("rect", said, **box, class_=f"{side} cell", style=f"--share: {share:.3f}")
        if axis.step < 40:
            return cell
        written = svg.label(
            axis.x(token) - 0.5, y + height / 2 + 3.5, svg.number(value), anchor="middle", class_="value"
        )
        return cell + written

    def _legend(self) -> list[str]:
        """The colours from one end to the other, with the numbers that they stand for."""
        n, width, x, y = 24, 6.0, LEFT, 8.0
        parts = []
        for i in range(n):
            side, share = svg.share_of((i + 0.5) / n * 2 - 1, 0.0, 1.0)
            box: dict[str, Any] = {"x": x + i * width, "y": y, "width": width, "height": 10.0}
            parts.append(svg.element("rect", **box, class_=side, style=f"--share: {share:.3f}"))
        limit = max(self.limits)
        ends = ("-max", "max of the layer") if self.per_layer else (svg.number(-limit), svg.number(limit))
        if self._goes_beyond:
            ends = (f"≤ {ends[0]}", f"≥ {ends[1]}")
        parts += [
            svg.label(x, y + 22, ends[0]),
            svg.label(x + n * width / 2, y + 22, "0", anchor="middle"),
            svg.label(x + n * width, y + 22, ends[1], anchor="start" if self.per_layer else "end"),
            svg.label(x + n * width + 16, y + 9, self.unit),
        ]
        if self.own_layer is not None:
            parts.append(svg.label(x + n * width + 30 + 6.2 * len(self.unit), y + 9, "framed: the vector's own layer"))
        return parts

    def _table(self) -> str:
        heads = [("", ""), ("token", "word"), *((f"layer {i}", "") for i in range(len(self.values)))]
        rows = [
            [str(i), visible(token), *(svg.number(float(value)) for value in self.values[:, i])]
            for i, token in enumerate(self.tokens)
        ]
        return f"<details><summary>All values</summary>\n{svg.table(heads, rows)}</details>"

    def png(self) -> bytes:
        """The drawing as a PNG file's bytes.

        Raises:
            HookError: without matplotlib, and for more tokens than can be read.
        """
        pictures.check_picture(len(self.tokens), MAX_PICTURE)
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle

        ticks = TokenTicks(self.tokens, self.n_prompt)
        n_layers = len(self.values)
        size = (
            max(5.5, 1.9 + ticks.width),
            0.9 + ticks.height + max(1.2, (0.24 if n_layers <= 16 else 0.17) * n_layers),
        )
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        limits = np.array(self.limits)
        shares = self.values / np.where(limits > 0, limits, 1.0)[:, None]
        limit = 1.0 if self.per_layer else float(limits.max()) or 1.0
        shown = shares if self.per_layer else self.values
        image = axes.imshow(shown, vmin=-limit, vmax=limit, cmap=diverging(), aspect="auto", origin="lower")
        axes.set_yticks(range(n_layers))
        axes.tick_params(axis="y", labelsize=7)
        axes.set_ylabel("layer", fontsize=8)
        if 0 < self.n_prompt < len(self.tokens):
            axes.axvline(self.n_prompt - 0.5, color="black", linewidth=1)
        if self.own_layer is not None and 0 <= self.own_layer < n_layers:
            style: dict[str, Any] = {
                "fill": False,
                "edgecolor": "black",
                "linewidth": 1.2,
                "clip_on": False,
                "zorder": 4,
            }
            frame = Rectangle((-0.5, self.own_layer - 0.5), len(self.tokens), 1, **style)
            axes.add_patch(frame)
        axes.set_xticks(np.arange(-0.5, len(self.tokens)), minor=True)
        axes.set_yticks(np.arange(-0.5, n_layers), minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set_visible(False)
        ticks.paint(axes)
        ticks.name_parts(axes)
        axes.set_title(self.title, fontsize=9, loc="left", pad=14, **pictures.PLAIN)
        bar = figure.colorbar(
            image, ax=axes, pad=0.012, fraction=0.05, aspect=18, extend="both" if self._goes_beyond else "neither"
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7, color=INK_FAINT)
        bar.set_label(f"{self.unit}, as a share of the layer's largest" if self.per_layer else self.unit, fontsize=7)
        return pictures.png(figure)


STYLE = """
.cell:hover { stroke: var(--ink); stroke-width: 2; }
svg .value { fill: var(--ink); font-size: 10px; pointer-events: none; }
.own-layer { fill: none; stroke: var(--ink); stroke-width: 1.4; pointer-events: none; }
.parting { stroke: var(--ink); }
"""
