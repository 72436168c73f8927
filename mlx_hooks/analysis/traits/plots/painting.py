"""What the pictures share: the page's light colours, and tokens under an axis."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...pictures import PLAIN
from ...spelling import columns, shortened
from .svg import DEPTH, HIGH, LOW

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAME_WIDTH = 0.5
"""Inches that the word "prompt" needs above its tokens, with room around it."""
INK_FAINT, LINE, MARK, SHADE = "#5c6670", "#1f6feb", "#b35900", "#eef0f2"


def diverging() -> Any:
    """The page's two colours as a colour map, white between them."""
    from matplotlib.colors import LinearSegmentedColormap

    low, high = (tuple(1 - DEPTH * (1 - part / 255) for part in colour) for colour in (LOW, HIGH))
    return LinearSegmentedColormap.from_list("neuroscope", [low, (1, 1, 1), high])


@dataclass(frozen=True)
class TokenTicks:
    """Tokens as the labels of a horizontal axis, one at each whole number from 0; lengths in inches."""

    tokens: list[str]
    n_prompt: int

    @property
    def step(self) -> float:
        return min(0.62, max(0.17, 9 / max(1, len(self.tokens))))

    @property
    def width(self) -> float:
        return self.step * len(self.tokens)

    @property
    def height(self) -> float:
        """What the labels need below the axis."""
        return 0.3 if self._lie_flat else 0.1 + 0.075 * max(map(columns, self._shown), default=0)

    @property
    def _lie_flat(self) -> bool:
        return self.step >= 0.5

    @property
    def _shown(self) -> list[str]:
        return [shortened(token, 9 if self._lie_flat else 16) for token in self.tokens]

    def paint(self, axes: "Axes") -> None:
        rotation = 0 if self._lie_flat else 90
        axes.set_xticks(range(len(self.tokens)), self._shown, rotation=rotation, fontsize=7, **PLAIN)
        axes.tick_params(axis="x", length=2)
        for i, tick in enumerate(axes.get_xticklabels()):
            tick.set_color(INK_FAINT if i < self.n_prompt else "black")

    def name_parts(self, axes: "Axes") -> None:
        """Say above the axes which tokens are prompt and response."""
        style: dict[str, Any] = {"fontsize": 7, "color": INK_FAINT, "textcoords": "offset points"}
        style["xycoords"] = axes.get_xaxis_transform()
        if 0 < self.n_prompt * self.step < _NAME_WIDTH:
            # It ends where the response begins, to the left of its own tokens if need be.
            axes.annotate("prompt", (self.n_prompt - 0.5, 1), xytext=(-4, 3), ha="right", **style)
        elif self.n_prompt:
            axes.annotate("prompt", (-0.4, 1), xytext=(0, 3), **style)
        if self.n_prompt < len(self.tokens):
            axes.annotate("response", (self.n_prompt - 0.4, 1), xytext=(0, 3), **style)
