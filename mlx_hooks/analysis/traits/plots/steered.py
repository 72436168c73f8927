"""What steering did to a trait's score: by coefficient, and token by token on the same words."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ....errors import HookError
from ... import pictures
from ...spelling import one_line
from . import svg
from .checks import check_numbers, check_scores, check_text, check_tokens
from .painting import INK_FAINT, LINE, SHADE, TokenTicks
from .scores import MAX_PICTURE

LEFT = 58.0
_WIDTH, _HEIGHT = 420.0, 150.0


@dataclass(frozen=True)
class SteeredScores:
    """One coefficient's numbers.

    Args:
        mean, shift: of its own words, and against coefficient 0.
        scores: of the prompt and of coefficient 0's words, read under this coefficient.
        forced_shift: their mean against coefficient 0.
        text: its own words.
    """

    coefficient: float
    mean: float
    shift: float
    scores: list[float]
    forced_shift: float
    text: str


@dataclass(frozen=True)
class SteeringChart:
    """A trait under several coefficients of a vector.

    Args:
        title: what was steered and measured.
        tokens: of the prompt and of coefficient 0's response.
        n_prompt: how many of them are the prompt.
        runs: by growing coefficient, 0 among them.

    Raises:
        HookError: for runs that have not one score for each token, and what else cannot be drawn.
    """

    title: str
    tokens: list[str]
    n_prompt: int
    runs: list[SteeredScores]

    def __post_init__(self) -> None:
        check_tokens(self.tokens, self.n_prompt)
        for run in self.runs:
            what = f"coefficient {run.coefficient!s:.40}"
            check_numbers(what, run.coefficient, run.mean, run.shift, run.forced_shift)
            check_scores(what, run.scores, len(self.tokens))
            check_text("A response", run.text)
        if [run.coefficient for run in self.runs].count(0) != 1:
            raise HookError("A chart of steering has coefficient 0 once.")

    @classmethod
    def of(cls, plain: Mapping[str, Any], index: int = 0) -> "SteeringChart":
        """The chart of what ``Steering.to_dict`` answers.

        Args:
            index: of the measuring vector.
        """
        about, prompt = plain["metadata"], plain["prompt"]
        still = next(run for run in plain["runs"] if run["coefficient"] == 0)
        runs = []
        for run in sorted(plain["runs"], key=lambda run: run["coefficient"]):
            one = run["measured"][index]
            scores = [*one["forced_scores"]["prompt"], *one["forced_scores"]["response"]]
            runs.append(
                SteeredScores(
                    run["coefficient"], one["mean_score"], one["shift"], scores, one["forced_shift"], run["text"]
                )
            )
        one = still["measured"][index]
        title = (
            f"{one['trait']} ({one['method']}, layer {one['layer']}) while {about['trait']} is added at layer "
            f"{about['layer']}, on “{one_line(prompt['text'], 50)}”"
        )
        return cls(title, [*prompt["tokens"], *still["tokens"]], len(prompt["tokens"]), runs)

    @property
    def _reach(self) -> float:
        """The largest |coefficient|."""
        return max(abs(run.coefficient) for run in self.runs)

    @property
    def _still(self) -> SteeredScores:
        return next(run for run in self.runs if run.coefficient == 0)

    def html(self) -> str:
        """A part of a page: by coefficient, by token, and the words themselves."""
        heads = [("coefficient", ""), ("mean score", ""), ("shift", ""), ("shift on the same words", "")]
        rows = [
            [*map(svg.number, (run.coefficient, run.mean, run.shift, run.forced_shift)), run.text] for run in self.runs
        ]
        return "\n".join([self._by_coefficient(), self._by_token(), svg.table([*heads, ("response", "prose")], rows)])

    def _by_coefficient(self) -> str:
        top, bottom = 44.0, 44.0 + _HEIGHT
        means = [run.mean for run in self.runs]
        forced = self._forced_means()
        scale = svg.Scale.around([*means, *forced], top, bottom)
        # The same scale lies along the other axis, from left to right.
        across = svg.Scale.around([run.coefficient for run in self.runs], LEFT + _WIDTH, LEFT)
        parts = [
            svg.element("line", x1=LEFT, y1=12.0, x2=LEFT + 18, y2=12.0, class_="own-words"),
            svg.label(LEFT + 24, 16, "mean score of its own words"),
            svg.element("line", x1=LEFT + 190, y1=12.0, x2=LEFT + 208, y2=12.0, class_="same-words"),
            svg.label(LEFT + 214, 16, "of the words of coefficient 0"),
            *scale.drawn(LEFT, LEFT + _WIDTH),
        ]
        for values, class_, name in ((forced, "same-words", "the words of 0"), (means, "own-words", "own words")):
            points = [(across.at(run.coefficient), scale.at(y)) for run, y in zip(self.runs, values, strict=True)]
            parts.append(svg.polyline(points, class_))
            for (x, y), run, value in zip(points, self.runs, values, strict=True):
                said = svg.told(f"coefficient {svg.number(run.coefficient)}, {name}: {svg.number(value)}")
                parts.append(svg.element("circle", said, cx=x, cy=y, r=3.5, class_=f"{class_} point"))
        for value in across.ticks(8):
            parts.append(svg.label(across.at(value), bottom + 16, svg.number(value), anchor="middle"))
        parts.append(svg.label(LEFT + _WIDTH / 2, bottom + 34, "coefficient", anchor="middle"))
        return svg.drawing(LEFT + _WIDTH + 20, bottom + 42, parts, "Mean score by coefficient")

    def _forced_means(self) -> list[float]:
        """The mean scores of the words of coefficient 0, under each coefficient."""
        return [self._still.mean + run.forced_shift for run in self.runs]

    def _by_token(self) -> str:
        axis = svg.TokenAxis(self.tokens, self.n_prompt, LEFT)
        top, bottom = 24.0, 24.0 + 1.3 * _HEIGHT
        scale = svg.Scale.around(self._range, top, bottom)
        parts = [*axis.prompt_shade(top, bottom), *axis.names(top - 6), *scale.drawn(axis.left, axis.right)]
        placed = _apart([scale.at(run.scores[-1]) for run in self.runs])
        for run, y in zip(self.runs, placed, strict=True):
            class_, style = self._look(run.coefficient)
            points = [(axis.x(i), scale.at(score)) for i, score in enumerate(run.scores)]
            line = svg.polyline(points, f"steered {class_}")
            said = svg.told(f"coefficient {svg.number(run.coefficient)}")
            parts.append(svg.element("g", said + line, style=style))
            parts.append(svg.label(axis.right + 8, y + 4, svg.number(run.coefficient), class_="ink"))
        parts += axis.labels(bottom)
        height = bottom + axis.label_height + 6
        return svg.drawing(axis.right + 60, height, parts, "Score per token on the words of coefficient 0")

    @property
    def _range(self) -> list[float]:
        """What the scale of the tokens has to show."""
        return [score for run in self.runs for score in svg.shown_range(run.scores)]

    def _look(self, coefficient: float) -> tuple[str, str]:
        """Class and style of a coefficient's line: the further from 0, the more colour."""
        if coefficient == 0:
            return "still", ""
        side, share = svg.share_of(coefficient, 0.0, self._reach)
        return f"to-{side}", f"--share: {0.35 + 0.65 * share:.3f}"

    def png(self) -> bytes:
        """The drawings as a PNG file's bytes.

        Raises:
            HookError: without matplotlib, and for more tokens than can be read.
        """
        pictures.check_picture(len(self.tokens), MAX_PICTURE)
        from matplotlib.figure import Figure

        ticks = TokenTicks(self.tokens, self.n_prompt)
        width = max(6.5, 1.4 + ticks.width)
        figure = Figure(figsize=(width, 5.2 + ticks.height), layout="constrained")
        upper, lower = figure.subplots(2, gridspec_kw={"height_ratios": (1, 1.25)})
        coefficients = [run.coefficient for run in self.runs]
        same, own = "the words of coefficient 0", "its own words"
        upper.plot(coefficients, self._forced_means(), "s--", color=INK_FAINT, markersize=4, linewidth=1.2, label=same)
        upper.plot(coefficients, [run.mean for run in self.runs], "o-", color=LINE, markersize=4, label=own)
        upper.set_xlabel("coefficient", fontsize=8)
        upper.set_ylabel("mean score", fontsize=8)
        upper.legend(fontsize=7, frameon=False, loc="upper right")
        if self.n_prompt:
            lower.axvspan(-0.5, self.n_prompt - 0.5, color=SHADE, linewidth=0)
        ends = []
        for run in self.runs:
            lower.plot(run.scores, color=self._colour(run.coefficient), linewidth=1.8)
            ends.append(run.scores[-1])
        scale = svg.Scale.around(self._range, 0, 1)
        low, high = scale.low, scale.high
        lower.set_ylim(low, high)
        for run, y in zip(self.runs, _apart(ends, (high - low) / 16), strict=True):
            label = svg.number(run.coefficient)
            lower.text(len(self.tokens) - 0.4, y, label, fontsize=7, va="center", color=self._colour(run.coefficient))
        lower.set_xlim(-0.5, len(self.tokens) + 0.4 / ticks.step)
        lower.set_ylabel("score on the words of coefficient 0", fontsize=8)
        ticks.paint(lower)
        ticks.name_parts(lower)
        for axes in (upper, lower):
            axes.tick_params(labelsize=7)
            axes.grid(axis="y", color="#d8dde2", linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(self.title, fontsize=9, x=0.01, ha="left", **pictures.PLAIN)
        return pictures.png(figure)

    def _colour(self, coefficient: float) -> Any:
        if coefficient == 0:
            return "black"
        side, share = svg.share_of(coefficient, 0.0, self._reach)
        strength = 0.35 + 0.65 * share
        return tuple(1 - strength * (1 - part / 255) for part in (svg.HIGH if side == "high" else svg.LOW))


STYLE = """
.steered { fill: none; stroke-width: 2; }
.to-high { stroke: rgb(var(--high) / var(--share)); }
.to-low { stroke: rgb(var(--low) / var(--share)); }
.still { stroke: var(--ink); }
.own-words { fill: none; stroke: var(--line); stroke-width: 2; }
.same-words { fill: none; stroke: var(--faint); stroke-width: 1.4; stroke-dasharray: 5 3; }
.own-words.point { fill: var(--line); }
.same-words.point { fill: var(--paper); stroke-dasharray: none; }
"""


def _apart(places: list[float], least: float = 13.0) -> list[float]:
    """Places of labels, moved as little as needed for neighbours to be ``least`` apart: [0, 1, 50] -> [-6, 7, 50]."""
    order = sorted(range(len(places)), key=places.__getitem__)
    # Without the gaps that they need, places may not fall: those that would share their mean.
    groups: list[list[float]] = []
    for rank, i in enumerate(order):
        groups.append([places[i] - rank * least])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    shared = [fmean(group) for group in groups for _ in group]
    moved = {i: place + rank * least for rank, (i, place) in enumerate(zip(order, shared, strict=True))}
    return [moved[i] for i in range(len(places))]
