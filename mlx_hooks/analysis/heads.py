"""Head detectors: how strongly each head's attention pattern follows a known rule.

Scores are shares of attention from 0 to 1, from one pattern [head, query, key] and its tokens; they are correlational.
Source: Olsson et al., "In-context Learning and Induction Heads" (2022).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import HookError


@dataclass(frozen=True)
class HeadScore:
    """One head's score by one rule."""

    layer: int
    head: int
    score: float

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head} {self.score:.2f}"


def previous_token_scores(pattern: np.ndarray) -> np.ndarray:
    """Mean attention from each position to the one before it, [head].

    Position 1 is left out: there, the one before is also the first, which many heads rest on.
    """
    pattern = _checked(pattern)
    queries = np.arange(2, pattern.shape[1])
    if not len(queries):
        raise HookError(f"A previous-token score needs at least 3 positions, got {pattern.shape[1]}.")
    return pattern[:, queries, queries - 1].mean(axis=1)


def induction_scores(pattern: np.ndarray, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Mean attention, from tokens that occurred before, to what followed their earlier occurrences, [head].

    With tokens ``A B C A`` the last position counts its attention to ``B``. The attention to what followed all earlier
    occurrences is added up.

    Raises:
        HookError: when no token occurs twice, or the tokens do not fit the pattern.
    """
    pattern = _checked(pattern)
    ids = np.asarray(tokens)
    if ids.shape != pattern.shape[1:2]:
        raise HookError(
            f"An attention pattern of {pattern.shape[1]} positions needs as many tokens, got shape {ids.shape}."
        )
    followed = _continuations(ids)
    queries = followed.any(axis=1)
    if not queries.any():
        raise HookError("No token occurs twice with something between: an induction score needs a repetition.")
    return (pattern * followed).sum(axis=2)[:, queries].mean(axis=1)


def has_repetition(tokens: Sequence[int] | np.ndarray) -> bool:
    """Whether an induction score can be told: some token occurs twice with something between."""
    return bool(_continuations(np.asarray(tokens)).any())


def _continuations(ids: np.ndarray) -> np.ndarray:
    """For each query the keys that followed an earlier occurrence of its token, [query, key] of bool."""
    n = len(ids)
    same = np.tril(ids[:, None] == ids[None, :], k=-1)
    followed = np.zeros((n, n), dtype=bool)
    followed[:, 1:] = same[:, :-1]
    # A token that repeats at once would count the attention to itself.
    return followed & np.tril(np.ones((n, n), dtype=bool), k=-1)


def first_token_scores(pattern: np.ndarray) -> np.ndarray:
    """Mean attention to the first position, [head]; of the positions after it, which have a choice."""
    pattern = _checked(pattern)
    if pattern.shape[1] < 2:
        raise HookError("A first-token score needs at least 2 positions, got 1.")
    return pattern[:, 1:, 0].mean(axis=1)


def entropies(pattern: np.ndarray) -> np.ndarray:
    """Mean entropy of the attention of each position, as a share of the largest that it can have, [head].

    0 is attention to one key, 1 the same attention to every key up to its own; the first position, which has no
    choice, is left out.
    """
    pattern = _checked(pattern).astype(np.float64)
    if pattern.shape[1] < 2:
        raise HookError("An entropy needs at least 2 positions, got 1.")
    logs = np.log(pattern, out=np.zeros_like(pattern), where=pattern > 0)
    entropy = -(pattern * logs).sum(axis=2)[:, 1:]
    # Of weights that add to 1 but for rounding.
    return np.clip(entropy / np.log(np.arange(2, pattern.shape[1] + 1)), 0, 1).mean(axis=1)


def ranked(scores: Mapping[int, np.ndarray]) -> list[HeadScore]:
    """All heads of all layers, strongest first, from ``{layer: [head]}``."""
    rows = [HeadScore(layer, head, float(score)) for layer, row in scores.items() for head, score in enumerate(row)]
    return sorted(rows, key=lambda row: (-row.score, row.layer, row.head))


def _checked(pattern: np.ndarray) -> np.ndarray:
    pattern = np.asarray(pattern)
    if pattern.ndim != 3 or pattern.shape[1] != pattern.shape[2]:
        raise HookError(
            f"An attention pattern is [head, query, key] with as many queries as keys, got {pattern.shape}."
        )
    return pattern
