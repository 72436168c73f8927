"""Tokens, and other texts that may hold anything, as they can stand in a line, a cell or a column."""

import unicodedata


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
