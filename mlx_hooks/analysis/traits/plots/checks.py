"""What a chart takes: files are drawn too, and anything may stand in a file."""

from collections.abc import Sequence
from typing import Any

from ....errors import HookError

_MOST = 1e100
"""What is further from 0 has no place on a scale: differences and shares of it leave float64."""


def check_tokens(tokens: Any, n_prompt: Any) -> None:
    """Raises HookError unless tokens are texts, at least one, of which the first ``n_prompt`` are the prompt."""
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise HookError("The tokens of a chart are texts, at least one.")
    if not isinstance(n_prompt, int) or not 0 <= n_prompt <= len(tokens):
        raise HookError(f"Of {len(tokens)} tokens, 0 to {len(tokens)} are the prompt; got {n_prompt!r}.")


def check_numbers(what: str, *numbers: Any) -> None:
    """Raises HookError for what is no finite number that can be drawn."""
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < _MOST:
            raise HookError(f"{what}: finite numbers are drawn, got {str(number)[:40]!r}.")


def check_scores(what: str, scores: Sequence[Any], n_tokens: int) -> None:
    """Raises HookError unless there is one number for each token."""
    if len(scores) != n_tokens:
        raise HookError(f"{what}: there are {len(scores)} scores for {n_tokens} tokens.")
    check_numbers(what, *scores)


def check_index(what: str, index: Any, size: int) -> None:
    """Raises HookError for what is neither None nor one of ``size`` places."""
    if index is not None and (isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < size):
        raise HookError(f"{what} is one of 0 to {size - 1}, or none; got {str(index)[:40]!r}.")


def check_text(what: str, text: Any) -> None:
    """Raises HookError for what is no text."""
    if not isinstance(text, str):
        raise HookError(f"{what} is a text, got {type(text).__name__}.")
