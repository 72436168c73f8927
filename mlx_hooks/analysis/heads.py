"""Head detectors: how strongly each head's attention pattern follows a known rule.

Scores are shares of attention from 0 to 1, from one pattern [head, query, key] and its tokens; they are correlational.
``DETECTORS`` has a row for each rule: the keys that count for each query, and what a sequence has to have for it.
Sources: Olsson et al., "In-context Learning and Induction Heads" (2022); Wang et al., "Interpretability in the Wild"
(2022), for duplicate tokens.
"""

from collections.abc import Callable, Mapping, Sequence
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


@dataclass(frozen=True)
class Detector:
    """A rule that a head may follow.

    Args:
        name: the rule's, as in ``DETECTORS``.
        looks_at: which keys count, in words.
        keys: of ids [pos] the keys that count for each query, [query, key] of bool; a query without any has no say.
        needs: what tokens lack for which no query has a key that counts.
    """

    name: str
    looks_at: str
    keys: Callable[[np.ndarray], np.ndarray]
    needs: str

    def scores(self, pattern: np.ndarray, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Mean attention of the queries that have a say to the keys that count, [head].

        Raises:
            HookError: when no query has a say, or the tokens do not fit the pattern.
        """
        pattern = _checked(pattern)
        ids = np.asarray(tokens)
        if ids.shape != pattern.shape[1:2]:
            raise HookError(
                f"An attention pattern of {pattern.shape[1]} positions needs as many tokens, got shape {ids.shape}."
            )
        counted = self.keys(ids)
        if not counted.any():
            raise HookError(f"{self.needs}.")
        return mean_attention(pattern, counted)


def mean_attention(pattern: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Attention to the keys that count [query, key], mean over the queries that have one, [head]."""
    return (pattern * counted).sum(axis=2)[:, counted.any(axis=1)].mean(axis=1)


def _one_before(ids: np.ndarray) -> np.ndarray:
    """[query, key] of bool, as all of these. At position 1 the one before is also the first: many heads rest on it."""
    keys = np.eye(len(ids), k=-1, dtype=bool)
    keys[:2] = False
    return keys


def _earlier_same(ids: np.ndarray) -> np.ndarray:
    return np.tril(ids[:, None] == ids[None, :], k=-1)


def _continuations(ids: np.ndarray) -> np.ndarray:
    n = len(ids)
    followed = np.zeros((n, n), dtype=bool)
    followed[:, 1:] = _earlier_same(ids)[:, :-1]
    # A token that repeats at once would count the attention to itself.
    return followed & np.tril(np.ones((n, n), dtype=bool), k=-1)


def _first(ids: np.ndarray) -> np.ndarray:
    keys = np.zeros((len(ids), len(ids)), dtype=bool)
    keys[1:, 0] = True
    return keys


def _own(ids: np.ndarray) -> np.ndarray:
    keys = np.eye(len(ids), dtype=bool)
    # The first position has no choice.
    keys[0] = False
    return keys


_DETECTORS = [
    Detector("previous_token", "the position before", _one_before, "A previous-token score needs at least 3 positions"),
    Detector(
        "induction",
        "what followed earlier occurrences of the query's token",
        _continuations,
        "No token occurs twice with something between: an induction score needs a repetition",
    ),
    Detector(
        "duplicate_token",
        "earlier occurrences of the query's token",
        _earlier_same,
        "No token occurs twice: a duplicate-token score needs a repetition",
    ),
    Detector("first_token", "the first position", _first, "A first-token score needs at least 2 positions"),
    Detector("current_token", "the query's own position", _own, "A current-token score needs at least 2 positions"),
]
DETECTORS = {detector.name: detector for detector in _DETECTORS}


def previous_token_scores(pattern: np.ndarray) -> np.ndarray:
    """Mean attention from each position to the one before it, [head].

    Position 1 is left out: there, the one before is also the first, which many heads rest on.
    """
    pattern = _checked(pattern)
    if pattern.shape[1] < 3:
        raise HookError(f"A previous-token score needs at least 3 positions, got {pattern.shape[1]}.")
    return DETECTORS["previous_token"].scores(pattern, np.zeros(pattern.shape[1]))


def induction_scores(pattern: np.ndarray, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Mean attention, from tokens that occurred before, to what followed their earlier occurrences, [head].

    With tokens ``A B C A`` the last position counts its attention to ``B``. The attention to what followed all earlier
    occurrences is added up.

    Raises:
        HookError: when no token occurs twice, or the tokens do not fit the pattern.
    """
    return DETECTORS["induction"].scores(pattern, tokens)


def has_repetition(tokens: Sequence[int] | np.ndarray) -> bool:
    """Whether an induction score can be told: some token occurs twice with something between."""
    return bool(_continuations(np.asarray(tokens)).any())


def duplicate_token_scores(pattern: np.ndarray, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Mean attention, from tokens that occurred before, to their earlier occurrences, [head].

    With tokens ``A B C A`` the last position counts its attention to the first ``A``. The attention to all earlier
    occurrences is added up.

    Raises:
        HookError: when no token occurs twice, or the tokens do not fit the pattern.
    """
    return DETECTORS["duplicate_token"].scores(pattern, tokens)


def first_token_scores(pattern: np.ndarray) -> np.ndarray:
    """Mean attention to the first position, [head]; of the positions after it, which have a choice."""
    pattern = _checked(pattern)
    if pattern.shape[1] < 2:
        raise HookError("A first-token score needs at least 2 positions, got 1.")
    return DETECTORS["first_token"].scores(pattern, np.zeros(pattern.shape[1]))


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
