"""A trait's score at each token, with the commitment point and the peak; several traits one below the other."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ....errors import HookError
from ... import pictures
from ...spelling import one_line, shortened, visible
from . import svg
from .checks import check_index, check_numbers, check_scores, check_text, check_tokens
from .painting import INK_FAINT, LINE, MARK, SHADE, TokenTicks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL, GAP = 130.0, 46.0
"""Heights in the page: of a trait's panel, and of what lies above it."""
LEFT = 58.0
MAX_PICTURE = 240
"""Tokens that a picture shows at most."""
_COUNTS, _SPEEDS = ("persistence", "persistence_total"), ("peak_velocity", "avg_velocity")


@dataclass(frozen=True)
class TraitScores:
    """One trait's scores at the tokens of a chart.

    Args:
        name: the trait.
        source: where the vector is: "probe, layer 16".
        scores: [n_tokens]; h.v / norm(v).
        boundary: the score between the classes that the vector was made from, if it is known.
        commitment, peak: indices of tokens of the chart, or None.
        dynamics: what ``TraitDynamics.to_dict`` answers; empty for none.

    Raises:
        HookError: for numbers that are none, and figures that ``dynamics`` lacks.
    """

    name: str
    source: str
    scores: list[float]
    boundary: float | None = None
    commitment: int | None = None
    peak: int | None = None
    dynamics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_text("The name of a trait", self.name)
        check_scores(self.name, self.scores, len(self.scores))
        check_numbers(self.name, self.centre)
        check_index("A commitment point", self.commitment, len(self.scores))
        check_index("A peak", self.peak, len(self.scores))
        if self.dynamics:
            figures = [self.dynamics[name] for name in (*_COUNTS, "threshold")]
            # Fewer than two scores have no speed.
            figures += [speed for name in _SPEEDS if (speed := self.dynamics[name]) is not None]
            check_numbers(f"dynamics of {self.name}", *figures)

    @property
    def centre(self) -> float:
        return 0.0 if self.boundary is None else self.boundary

    def scale(self, top: float, bottom: float) -> svg.Scale:
        """The panel's numbers: the scores, what parts them, and whatever is marked."""
        marked = [self.scores[i] for i in (self.commitment, self.peak) if i is not None]
        return svg.Scale.around(svg.shown_range(self.scores, [self.centre, *marked]), top, bottom)


@dataclass(frozen=True)
class ScoreChart:
    """Scores of one or several traits on one text. Each has a panel with its own scale: traits of different layers have
    no common one.

    Args:
        title: what was read.
        tokens: as texts, the prompt's first.
        n_prompt: how many of them are the prompt.
        traits: at least one.

    Raises:
        HookError: for traits that have not one score for each token, and what else cannot be drawn.
    """

    title: str
    tokens: list[str]
    n_prompt: int
    traits: list[TraitScores]

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.n_prompt)
        if not self.traits:
            raise HookError("A chart of scores has at least one trait.")
        for trait in self.traits:
            check_scores(trait.name, trait.scores, len(self.tokens))

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "ScoreChart":
        """The chart of an entry of ``results`` that ``monitor_dynamics`` answers."""
        prompt, response = entry["prompt"], entry["response"]
        n_prompt = len(prompt["tokens"])
        traits = [
            _trait(name, method, found, n_prompt)
            for name, by_method in entry["traits"].items()
            for method, found in by_method.items()
        ]
        title = f"“{one_line(prompt['text'])}”"
        return cls(title, [*prompt["tokens"], *response["tokens"]], n_prompt, traits)

    def html(self) -> str:
        """A part of a page: the drawing, the figures, the text on coloured ground, and all scores as a table."""
        parts = [self._drawing(), self._facts()]
        for trait in self.traits:
            centre = "the class boundary" if trait.boundary is not None else "0"
            parts.append(
                svg.element("p", html.escape(f"{trait.name} ({trait.source}): red above {centre}, blue below"))
            )
            parts.append(svg.marked_text(self.tokens, trait.scores, trait.centre, self.n_prompt))
        return "\n".join([*parts, self._table()])

    def _drawing(self) -> str:
        axis = svg.TokenAxis(self.tokens, self.n_prompt, LEFT)
        right = max(axis.right, LEFT + 420)
        parts = _legend(
            LEFT, any(t.commitment is not None for t in self.traits), any(t.boundary is not None for t in self.traits)
        )
        bottom = 14.0
        for i, trait in enumerate(self.traits):
            top = bottom + GAP
            bottom = top + PANEL
            parts += [
                *axis.prompt_shade(top, bottom),
                svg.element("text", _named(trait), x=LEFT, y=top - 20),
                *(axis.names(top - 5) if i == 0 else []),
                *self._panel(trait, axis, trait.scale(top, bottom)),
            ]
        parts += axis.labels(bottom)
        names = ", ".join(trait.name for trait in self.traits)
        return svg.drawing(right + 16, bottom + axis.label_height + 6, parts, f"Scores per token of {names}")

    def _panel(self, trait: TraitScores, axis: svg.TokenAxis, scale: svg.Scale) -> list[str]:
        parts = scale.drawn(axis.left, axis.right)
        if trait.boundary is not None:
            y = scale.at(trait.boundary)
            parts.append(svg.line(axis.left, y, axis.right, y, "boundary"))
        points = [(axis.x(i), scale.at(score)) for i, score in enumerate(trait.scores)]
        # The response's line begins at the prompt's last token, so that the step between them can be seen.
        joint = max(0, self.n_prompt - 1)
        parts += [svg.polyline(points[: self.n_prompt], "prompt-line"), svg.polyline(points[joint:], "response-line")]
        for i, (x, y) in enumerate(points):
            said = svg.told(f"{self._place(i)}: {visible(self.tokens[i])}\n{trait.name} {svg.number(trait.scores[i])}")
            class_ = "dot" if i >= self.n_prompt else "dot of-prompt"
            class_ += "" if scale.low <= trait.scores[i] <= scale.high else " beyond"
            parts.append(svg.element("circle", said, cx=float(x), cy=float(y), r=2.6, class_=class_))
        if trait.commitment is not None:
            x, y = points[trait.commitment]
            parts += [svg.line(x, scale.top, x, scale.bottom, "mark-line"), _diamond(x, y)]
        if trait.peak is not None:
            parts.append(_triangle(*points[trait.peak], above=trait.scores[trait.peak] >= trait.centre))
        return parts

    def _facts(self) -> str:
        if not any(trait.dynamics for trait in self.traits):
            return ""
        heads = [("trait", "word"), ("vector", "word"), ("commitment point", "word"), ("peak", "word")]
        heads += [(name, "") for name in ("persistence (tokens)", "in all", "fastest step", "mean step", "threshold")]
        rows = []
        for trait in (trait for trait in self.traits if trait.dynamics):
            found = trait.dynamics
            speeds = ["-" if found[name] is None else svg.number(found[name]) for name in _SPEEDS]
            lasting = [str(found[name]) for name in _COUNTS]
            peak = (
                "none" if trait.peak is None else f"{svg.number(trait.scores[trait.peak])} at {self._token(trait.peak)}"
            )
            limit = svg.number(found["threshold"])
            rows.append([trait.name, trait.source, self._token(trait.commitment), peak, *lasting, *speeds, limit])
        return svg.table(heads, rows)

    def _place(self, index: int) -> str:
        """A token's place as dynamics count it: within the prompt or the response."""
        return f"prompt {index}" if index < self.n_prompt else f"response {index - self.n_prompt}"

    def _token(self, index: int | None) -> str:
        return "none" if index is None else f"{self._place(index)}: {shortened(self.tokens[index], 16)}"

    def _table(self) -> str:
        heads = [("", "word"), ("token", "word"), *((trait.name, "") for trait in self.traits)]
        rows = [
            [self._place(i), visible(token), *(svg.number(trait.scores[i]) for trait in self.traits)]
            for i, token in enumerate(self.tokens)
        ]
        return f"<details><summary>All scores</summary>\n{svg.table(heads, rows)}</details>"

    def png(self) -> bytes:
        """The drawing as a PNG file's bytes.

        Raises:
            HookError: without matplotlib, and for more tokens than can be read.
        """
        pictures.check_picture(len(self.tokens), MAX_PICTURE)
        from matplotlib.figure import Figure

        ticks = TokenTicks(self.tokens, self.n_prompt)
        figure = Figure(
            figsize=(max(5.5, 1.1 + ticks.width), 0.7 + ticks.height + 1.75 * len(self.traits)), layout="constrained"
        )
        all_axes = figure.subplots(len(self.traits), sharex=True, squeeze=False)[:, 0]
        for trait, axes in zip(self.traits, all_axes, strict=True):
            self._paint(trait, axes)
        ticks.paint(all_axes[-1])
        ticks.name_parts(all_axes[0])
        figure.suptitle(self.title, fontsize=9, x=0.01, ha="left", **pictures.PLAIN)
        _paint_legend(figure, self.traits)
        return pictures.png(figure)

    def _paint(self, trait: TraitScores, axes: "Axes") -> None:
        joint = max(0, self.n_prompt - 1)
        every = range(len(self.tokens))
        if self.n_prompt:
            axes.axvspan(-0.5, self.n_prompt - 0.5, color=SHADE, linewidth=0)
            axes.plot(
                every[: self.n_prompt], trait.scores[: self.n_prompt], color=INK_FAINT, marker="o", markersize=2.5
            )
        axes.plot(every[joint:], trait.scores[joint:], color=LINE, linewidth=1.6)
        axes.plot(every[self.n_prompt :], trait.scores[self.n_prompt :], "o", color=LINE, markersize=3.2)
        scale = trait.scale(0, 1)
        if scale.low < 0 < scale.high:
            axes.axhline(0, color=INK_FAINT, linewidth=0.6)
        if trait.boundary is not None:
            axes.axhline(trait.boundary, color=INK_FAINT, linewidth=0.9, linestyle=(0, (2, 3)))
        if trait.commitment is not None:
            axes.axvline(trait.commitment, color=MARK, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.plot([trait.commitment], [trait.scores[trait.commitment]], "D", color=MARK, markersize=6)
        if trait.peak is not None:
            score = trait.scores[trait.peak]
            above = score >= trait.centre
            axes.annotate(
                "", (trait.peak, score), (0, 9 if above else -9), textcoords="offset points",
                arrowprops={"arrowstyle": "-|>", "color": "black", "mutation_scale": 9, "shrinkA": 0, "shrinkB": 3},
            )  # fmt: skip
        axes.set_ylim(scale.low, scale.high)
        axes.set_xlim(-0.5, len(self.tokens) - 0.5)
        axes.set_title(f"{trait.name}   {trait.source}", fontsize=8, loc="left", pad=12, **pictures.PLAIN)
        axes.set_ylabel("score", fontsize=8)
        axes.tick_params(axis="y", labelsize=7)
        axes.grid(axis="y", color="#d8dde2", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)


STYLE = """
.prompt-line { fill: none; stroke: var(--faint); stroke-width: 1.2; }
.response-line { fill: none; stroke: var(--line); stroke-width: 2; }
.dot { fill: var(--line); }
.dot.of-prompt { fill: var(--faint); }
.dot.beyond { fill: var(--paper); stroke: var(--faint); }
.dot:hover { stroke: var(--ink); stroke-width: 2; }
.mark, .mark-line, .peak { pointer-events: none; }
.mark { fill: var(--mark); stroke: var(--paper); }
.mark-line { stroke: var(--mark); stroke-dasharray: 4 3; }
.peak { fill: var(--ink); }
"""


def _named(trait: TraitScores) -> str:
    name = svg.element("tspan", html.escape(trait.name), class_="strong")
    return name + svg.element("tspan", html.escape(trait.source), dx=10)


def _trait(name: str, method: str, found: Mapping[str, Any], n_prompt: int) -> TraitScores:
    scores, dynamics = found["scores"], found["dynamics"]
    offset = n_prompt if dynamics["tokens"] == "response" else 0
    commitment, peak = dynamics["commitment_point"], dynamics["peak"]
    return TraitScores(
        name,
        f"{method}, layer {found['layer']}",
        [*scores["prompt"], *scores["response"]],
        found["threshold"],
        None if commitment is None else commitment + offset,
        None if peak is None else peak["index"] + offset,
        dynamics,
    )


def _legend(left: float, committed: bool, bounded: bool) -> list[str]:
    """What the marks mean, in one line at the top."""
    parts, x = [], left
    marks: list[tuple[list[str], str]] = [([_triangle(6, 17, above=True)], "peak")]
    if committed:
        marks.append(([_diamond(6, 10)], "commitment point"))
    if bounded:
        marks.append(([svg.line(0, 10, 14, 10, "boundary")], "class boundary"))
    for drawn, name in marks:
        parts.append(svg.element("g", "".join(drawn), transform=f"translate({x:.0f} 4)"))
        parts.append(svg.label(x + 19, 18, name))
        x += 34 + 6.2 * len(name)
    parts.append(svg.label(x, 18, "score: h.v/|v|"))
    return parts


def _diamond(x: float, y: float) -> str:
    places = f"{x - 5.5:.1f},{y:.1f} {x:.1f},{y - 5.5:.1f} {x + 5.5:.1f},{y:.1f} {x:.1f},{y + 5.5:.1f}"
    return svg.element("polygon", points=places, class_="mark")


def _triangle(x: float, y: float, *, above: bool) -> str:
    """A mark that points at (x, y), from above or from below."""
    side = -1 if above else 1
    base = y + side * 12
    places = f"{x:.1f},{y + side * 4:.1f} {x - 4.5:.1f},{base:.1f} {x + 4.5:.1f},{base:.1f}"
    return svg.element("polygon", points=places, class_="peak")


def _paint_legend(figure: Any, traits: Sequence[TraitScores]) -> None:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], linestyle="", marker="v", color="black", markersize=5, label="peak")]
    if any(trait.commitment is not None for trait in traits):
        marks.append(Line2D([], [], linestyle="", marker="D", color=MARK, markersize=5, label="commitment point"))
    if any(trait.boundary is not None for trait in traits):
        dashes = (0, (2, 3))
        marks.append(Line2D([], [], color=INK_FAINT, linestyle=dashes, label="class boundary"))
    figure.legend(handles=marks, loc="outside lower left", ncols=3, fontsize=7, frameon=False, title_fontsize=7)
