"""Tokens, and other texts that may hold anything, as they can stand in a line, a cell or a column."""

import unicodedata
from collections.abc import Sequence

_BLOCKS = "▁▂▃▄▅▆▇█"


def visible(token: str) -> str:
    """A token as it can stand in a line: spaces as dots, what cannot be printed as its code.

    >>> visible(" Paris\\n")
    '·Paris\\\\n'
    """
    parts = ["·" if c == " " else c if c.isprintable() else c.encode("unicode_escape").decode() for c in token]
    return "".join(parts)


def shortened(token: str, length: int = 9) -> str:
    """``visible``, with dots in place of what exceeds ``length`` characters."""
    spelled = visible(token)
    return spelled if len(spelled) <= length else spelled[: length - 1] + "…"


def one_line(text: str, length: int = 90) -> str:
    """A text in one line, its spaces as they are, with dots in place of what exceeds ``length`` characters.

    >>> one_line("Paris is\\nthe capital of France .", 20)
    'Paris is the capita…'
    """
    line = " ".join(text.split())
    spelled = "".join(c if c.isprintable() else visible(c) for c in line)
    return spelled if len(spelled) <= length else f"{spelled[: length - 1]}…"


def fitted(text: str, width: int) -> str:
    """Text that takes exactly ``width`` columns of a terminal, the last of them empty."""
    if columns(text) < width:
        return text + " " * (width - columns(text))
    while columns(text) > width - 2:
        text = text[:-1]
    return f"{text}…" + " " * (width - 1 - columns(text))


def columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)


def in_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell."""
    widths = [max(map(columns, column)) + 2 for column in zip(*rows, strict=True)]
    return ["".join(fitted(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def course(values: Sequence[float]) -> str:
    """Numbers as columns of eight heights, from the lowest to the highest.

    >>> course([0, 1, 7, 3.5])
    '▁▂█▅'
    """
    low, high = min(values, default=0.0), max(values, default=0.0)
    heights = [(value - low) / (high - low) if high > low else 0.0 for value in values]
    return "".join(_BLOCKS[min(7, int(height * 7 + 0.5))] for height in heights)
