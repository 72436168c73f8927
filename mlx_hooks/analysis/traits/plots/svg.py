"""What the charts share: pieces of inline SVG, a scale, an axis of tokens, two colours that part at a centre.

Colours are CSS variables, so that a page is right in the light and in the dark; the pictures take the light ones.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...pages import hint
from ...spelling import columns, shortened, visible

HIGH, LOW = (214, 69, 56), (47, 111, 214)
"""Above the centre and below it, in the light."""
DEPTH = 0.8
"""How much of the colour the largest value has: what is written on it can still be read."""
_NAME_WIDTH = 52.0
"""What the word "prompt" needs above its tokens, with room around it."""
STYLE = f"""
:root {{ --high: {" ".join(map(str, HIGH))}; --low: {" ".join(map(str, LOW))}; --line: #1f6feb; --mark: #b35900;
  --shade: rgb(110 125 140 / 0.11); --rule: rgb(110 125 140 / 0.35); }}
svg {{ display: block; font: 11px system-ui, sans-serif; }}
svg text {{ fill: var(--faint); }}
svg .strong {{ fill: var(--ink); font-weight: 600; }}
svg .ink {{ fill: var(--ink); }}
.high {{ fill: rgb(var(--high) / calc(var(--share) * {DEPTH})); }}
.low {{ fill: rgb(var(--low) / calc(var(--share) * {DEPTH})); }}
.shade {{ fill: var(--shade); }}
.rule {{ stroke: var(--rule); }}
.zero {{ stroke: var(--faint); stroke-width: 0.8; }}
.boundary {{ stroke: var(--faint); stroke-dasharray: 2 3; }}
h2 {{ font-size: 1rem; font-weight: 600; margin: 2rem 0 0.2rem; }}
p {{ margin: 0.2rem 0 0.8rem; max-width: 60rem; }}
table {{ border-collapse: collapse; margin: 0.6rem 0; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 3px 12px 3px 0; text-align: right; white-space: nowrap; }}
th {{ font-weight: 500; color: var(--faint); }}
td {{ border-top: 1px solid var(--rule); }}
th.word, td.word, th.prose, td.prose {{ text-align: left; }}
td.prose {{ white-space: normal; min-width: 16rem; max-width: 44rem; }}
summary {{ color: var(--faint); cursor: pointer; }}
"""
DARK = "--high: 226 92 78; --low: 78 136 244; --line: #6ea8fe; --mark: #f0a04b;"


def element(name: str, content: str = "", **attributes: Any) -> str:
    """An element: ``content`` is markup, attributes are escaped. Underscores stand for hyphens; a last one falls off.

    >>> element("rect", x=1.5, class_="a")
    '<rect x="1.5" class="a"></rect>'
    """
    spelled = "".join(f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"' for key, value in attributes.items())
    return f"<{name}{spelled}>{content}</{name}>"


def _value(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else hint(str(value))


def label(x: float, y: float, content: str, *, anchor: str = "start", **attributes: Any) -> str:
    """A text, escaped."""
    return element("text", html.escape(content), x=float(x), y=float(y), text_anchor=anchor, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def polyline(points: Sequence[tuple[float, float]], class_: str) -> str:
    """A line through points; nothing for fewer than two."""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return element("polyline", points=places, class_=class_) if len(points) > 1 else ""


def told(content: str) -> str:
    """What is shown while the element around it is pointed at."""
    return element("title", html.escape(content))


def drawing(width: float, height: float, parts: Sequence[str], what: str) -> str:
    """A drawing of its own size, in a box that scrolls.

    Args:
        what: what it shows, for readers who do not see it.
    """
    size = {"width": math.ceil(width), "height": math.ceil(height)}
    body = "\n".join(parts)
    return f"<div>{element('svg', body, **size, role='img', aria_label=what)}</div>"


def number(value: float) -> str:
    """A number as it stands at an axis or in a table.

    >>> number(0.25), number(-1234.5), number(0.000123), number(3.0)
    ('0.25', '-1234', '0.000123', '3')
    """
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:.0f}" if abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:.3g}"


def share_of(value: float, centre: float, limit: float) -> tuple[str, float]:
    """On which side of the centre a value lies, and how far, from 0 to 1.

    >>> share_of(-1.0, 1.0, 4.0)
    ('low', 0.5)
    """
    distance = value - centre
    return "high" if distance >= 0 else "low", min(1.0, abs(distance) / limit) if limit > 0 else 0.0


def limit_of(distances: Sequence[float]) -> float:
    """Where colours end: at the largest of the tokens' distances from the centre.

    The stream at the first token is often many times longer than at all others, and says little: beyond twice their
    distance its own does not count.

    >>> limit_of([3.0, 2.0]), limit_of([90.0, 2.0, 1.0])
    (3.0, 2.0)
    """
    rest = max(distances[1:], default=0.0)
    first = max(distances[:1], default=0.0)
    return rest if first > 2 * rest > 0 else max(first, rest)


def shown_range(scores: Sequence[float], also: Sequence[float] = ()) -> list[float]:
    """What a scale has to show: all scores and ``also``, without the first token's when it lies further from the others
    than these from each other.

    >>> shown_range([90.0, 2.0, 1.0], [0.0])
    [2.0, 1.0, 0.0]
    """
    rest = [*scores[1:], *also]
    if len(rest) < 2 or (air := max(rest) - min(rest)) == 0 or not scores:
        return [*scores, *also]
    return rest if not min(rest) - air <= scores[0] <= max(rest) + air else [*scores, *also]


@dataclass(frozen=True)
class Scale:
    """A number's place on an axis: ``low`` at ``bottom``, ``high`` at ``top`` (coordinates grow downwards)."""

    low: float
    high: float
    top: float
    bottom: float

    @classmethod
    def around(cls, values: Sequence[float], top: float, bottom: float) -> "Scale":
        """A scale with a little air above and below all values."""
        low, high = min(values, default=0.0), max(values, default=0.0)
        air = 0.14 * (high - low) or 0.5 * abs(high) or 1.0
        return cls(low - air, high + air, top, bottom)

    def at(self, value: float) -> float:
        """Where a value stands; one beyond the ends, at the end."""
        value = min(max(value, self.low), self.high)
        return self.bottom - (value - self.low) / (self.high - self.low) * (self.bottom - self.top)

    def ticks(self, about: int = 4) -> list[float]:
        """Round numbers on the axis: multiples of 1, 2 or 5 times a power of ten."""
        raw = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [i * step for i in range(first, last + 1)]

    def drawn(self, left: float, right: float) -> list[str]:
        """Lines and numbers of the ticks."""
        parts = []
        for value in self.ticks():
            y = self.at(value)
            parts.append(line(left, y, right, y, "zero" if value == 0 else "rule"))
            parts.append(label(left - 8, y + 3.5, number(value), anchor="end"))
        return parts


@dataclass(frozen=True)
class TokenAxis:
    """Tokens side by side, each as wide as its label needs while there is room; upright labels where there is not.

    Args:
        tokens: as texts.
        n_prompt: how many of them are the prompt.
        left: where the first begins.
    """

    tokens: list[str]
    n_prompt: int
    left: float

    @property
    def step(self) -> float:
        return min(64.0, max(18.0, 900.0 / max(1, len(self.tokens))))

    @property
    def right(self) -> float:
        return self.left + self.step * len(self.tokens)

    @property
    def lies_flat(self) -> bool:
        return self.step >= 52

    def x(self, i: float) -> float:
        """The middle of a token."""
        return self.left + self.step * (i + 0.5)

    @property
    def shown(self) -> list[str]:
        return [shortened(token, 9 if self.lies_flat else 16) for token in self.tokens]

    @property
    def label_height(self) -> float:
        """What the labels need below the axis."""
        return 22.0 if self.lies_flat else 14 + 6.3 * max(map(columns, self.shown), default=0)

    def labels(self, y: float) -> list[str]:
        """A label under each token, below ``y``."""
        parts = []
        for i, (shown, token) in enumerate(zip(self.shown, self.tokens, strict=True)):
            x, class_ = self.x(i), "ink" if i >= self.n_prompt else "faint"
            content = told(f"{i}: {visible(token)}") + html.escape(shown)
            if self.lies_flat:
                parts.append(element("text", content, x=x, y=y + 15, text_anchor="middle", class_=class_))
            else:
                turned = f"translate({x + 3.5:.1f} {y + 7:.1f}) rotate(-90)"
                parts.append(element("text", content, transform=turned, text_anchor="end", class_=class_))
        return parts

    def prompt_shade(self, top: float, bottom: float) -> list[str]:
        """The ground under the prompt."""
        if not self.n_prompt:
            return []
        size: dict[str, Any] = {"width": self.step * self.n_prompt, "height": float(bottom - top)}
        return [element("rect", x=float(self.left), y=float(top), **size, class_="shade")]

    def names(self, y: float) -> list[str]:
        """Which part is which, above ``y``."""
        parts, border = [], self.left + self.step * self.n_prompt
        if 0 < border - self.left < _NAME_WIDTH:
            # It ends where the response begins, to the left of its own tokens if need be.
            parts.append(label(border - 6, y, "prompt", anchor="end"))
        elif self.n_prompt:
            parts.append(label(self.left + 4, y, "prompt"))
        if self.n_prompt < len(self.tokens):
            parts.append(label(border + 4, y, "response"))
        return parts


def table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of plain texts; each head has the class of its column: "", "word" or "prose"."""
    head = "".join(_cell("th", name, class_) for name, class_ in heads)
    lines = ("".join(_cell("td", cell, class_) for cell, (_, class_) in zip(row, heads, strict=True)) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>"


def _cell(name: str, content: str, class_: str) -> str:
    of_class = f' class="{class_}"' if class_ else ""
    return f"<{name}{of_class}>{html.escape(content)}</{name}>"


def marked_text(tokens: Sequence[str], scores: Sequence[float], centre: float, n_prompt: int) -> str:
    """The tokens as running text, each on a ground that says how far its score lies from the centre."""
    limit = limit_of([abs(score - centre) for score in scores])
    parts = []
    for i, (token, score) in enumerate(zip(tokens, scores, strict=True)):
        side, share = share_of(score, centre, limit)
        first = " first" if i == n_prompt and i else ""
        parts.append(
            f'<span class="{side}{first}" style="--share: {share:.3f}" title="{hint(f"{i}: {number(score)}")}">'
            f"{html.escape(visible(token))}</span>"
        )
    return f'<p class="running">{"".join(parts)}</p>'


RUNNING_STYLE = f"""
.running {{ color: var(--ink); font-size: 13px; line-height: 1.9; }}
.running span {{ display: inline-block; padding: 0 3px; margin: 0 1px; border-radius: 2px; }}
.running .first {{ margin-left: 0.8rem; }}
.running .high {{ background: rgb(var(--high) / calc(var(--share) * {DEPTH})); }}
.running .low {{ background: rgb(var(--low) / calc(var(--share) * {DEPTH})); }}
"""
