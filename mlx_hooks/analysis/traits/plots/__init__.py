"""Charts of traits, each as a picture (PNG, by matplotlib) and as a part of a web page that needs nothing else."""

import html
from collections.abc import Sequence
from typing import Protocol

from ... import pages
from . import layers, scores, steered, svg
from .layers import LayerChart
from .scores import ScoreChart, TraitScores
from .steered import SteeredScores, SteeringChart

__all__ = ["Chart", "LayerChart", "ScoreChart", "SteeredScores", "SteeringChart", "TraitScores", "page_of"]


class Chart(Protocol):
    """What can be drawn."""

    @property
    def title(self) -> str: ...

    def html(self) -> str:
        """A part of a page, without its heading."""

    def png(self) -> bytes:
        """A PNG file's bytes."""


def page_of(title: str, charts: Sequence[Chart], about: str = "") -> str:
    """A whole page: the charts one below the other, each under its own title.

    Args:
        about: a line under the page's title, plain text.
    """
    parts = [f"<p>{html.escape(about)}</p>"] if about else []
    for chart in charts:
        parts.append(f"<section>\n<h2>{html.escape(chart.title)}</h2>\n{chart.html()}\n</section>")
    style = svg.STYLE + svg.RUNNING_STYLE + scores.STYLE + layers.STYLE + steered.STYLE
    return pages.page(title, "\n".join(parts), style, svg.DARK)
