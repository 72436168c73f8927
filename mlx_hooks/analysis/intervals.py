"""How far a mean may be off: confidence intervals over examples.

They are bootstrap intervals, which of few examples are too narrow: a mean of fewer than ENOUGH has Student's t
interval instead.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993).
"""

import warnings
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..options import options

RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST = 5
"""Of fewer examples there are no intervals."""
ENOUGH = 20
"""From so many on, bootstrap intervals are about as wide as they claim to be."""
_NUMBERS_AT_ONCE = 5_000_000
"""Resampled numbers that are held at once."""


@options
class IntervalOptions:
    """What options of analyses with intervals have in common.

    Args:
        confidence, resamples: of the bootstrap intervals.
        seed: of the resamples.
    """

    confidence: Annotated[float, Field(gt=0, lt=1)] = CONFIDENCE
    resamples: Annotated[int, Field(ge=100)] = RESAMPLES
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def of_intervals(self) -> dict[str, Any]:
        """What :func:`means` and :func:`ratios` take."""
        return {"confidence": self.confidence, "resamples": self.resamples, "seed": self.seed}


@dataclass(frozen=True)
class Estimate:
    """A mean over examples.

    Args:
        mean: None where it is undefined.
        low, high: the ends of its confidence interval; None for fewer than FEWEST examples.
        n: examples.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "n": self.n}


def few(n: int, what: str = "examples", *, are_ratios: bool = True) -> list[str]:
    """What is to be said of the intervals of so many examples.

    Args:
        are_ratios: whether they are those of :func:`ratios`, for which there is no other interval.
    """
    if n < FEWEST:
        return [f"Confidence intervals need at least {FEWEST} {what}, got {n}."]
    if are_ratios and n < ENOUGH:
        return [f"Confidence intervals of fewer than {ENOUGH} {what}, here {n}, are too narrow."]
    return []


def means(
    values: np.ndarray, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> list[Estimate]:
    """The mean of each column, with its interval: Student's t of few examples, else BCa (percentile where undefined).

    Args:
        values: [example, column], finite; of nan examples a column has fewer.

    Returns:
        an :class:`Estimate` per column.
    """
    values = np.asarray(values, np.float64)
    found: dict[int, Estimate] = {}
    there = np.isfinite(values)
    # Columns that have the same examples are resampled together.
    kinds, which = np.unique(there, axis=1, return_inverse=True)
    for kind in range(kinds.shape[1]):
        columns = np.flatnonzero(which.reshape(-1) == kind)
        own = values[kinds[:, kind]][:, columns]
        low, high = _mean_ends(own.T, confidence, resamples, seed)
        for at, column in enumerate(columns):
            mean = float(own[:, at].mean()) if len(own) else None
            has_ends = len(own) >= FEWEST
            found[int(column)] = Estimate(
                mean, float(low[at]) if has_ends else None, float(high[at]) if has_ends else None, len(own)
            )
    return [found[column] for column in range(values.shape[1])]


def _mean_ends(values: np.ndarray, confidence: float, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the intervals of rows [row, example]."""
    n = values.shape[1]
    if n < FEWEST:
        return values[:, :0], values[:, :0]
    if n < ENOUGH:
        return _student(values, confidence)
    low, high = _bootstrap(values, "BCa", confidence, resamples, seed)
    undefined = ~(np.isfinite(low) & np.isfinite(high))
    if undefined.any():
        low[undefined], high[undefined] = _bootstrap(values[undefined], "percentile", confidence, resamples, seed)
    return low, high


def ratios(
    above: np.ndarray, below: np.ndarray, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
) -> list[Estimate]:
    """The ratio of two means over the same examples, per column, with its percentile interval.

    Args:
        above: [example, column].
        below: [example].

    Returns:
        an :class:`Estimate` per column: without a mean where ``below`` has mean 0, and without ends where there are
        fewer than FEWEST examples, or the mean of ``below`` is 0 in a resample, or may have either sign.
    """
    above, below = np.asarray(above, np.float64).T, np.asarray(below, np.float64)
    n = len(below)
    total = below.mean()
    if not total:
        return [Estimate(None, None, None, n) for _ in above]
    at = above.mean(axis=1) / total
    if n < FEWEST or not len(above):
        return [Estimate(float(mean), None, None, n) for mean in at]
    signs = _bootstrap(below[None], "percentile", confidence, resamples, seed)
    if signs[0][0] * signs[1][0] <= 0:
        return [Estimate(float(mean), None, None, n) for mean in at]
    # Both means are of the same resample.
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = (above @ counts.T) / (below @ counts.T)
    kept = drawn[:, np.isfinite(drawn).all(axis=0)]
    outside = (1 - confidence) / 2
    low, high = np.quantile(kept, [outside, 1 - outside], axis=1)
    return [Estimate(float(a), float(b), float(c), n) for a, b, c in zip(at, low, high, strict=True)]


def _student(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The ends of Student's t intervals of the means of rows [row, example]."""
    from scipy.stats import t

    n = values.shape[1]
    mean, off = values.mean(axis=1), values.std(axis=1, ddof=1) / np.sqrt(n)
    reach = float(t.ppf((1 + confidence) / 2, n - 1)) * off
    return mean - reach, mean + reach


def _bootstrap(
    values: np.ndarray, method: str, confidence: float, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the intervals of the means of rows [row, example]."""
    from scipy.stats import bootstrap

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # Where all resamples are alike BCa is undefined: who calls sees that.
        warnings.simplefilter("ignore")
        found = bootstrap(
            (values,),
            np.mean,
            axis=-1,
            vectorized=True,
            method=method,
            confidence_level=confidence,
            n_resamples=resamples,
            batch=max(1, min(resamples, _NUMBERS_AT_ONCE // max(1, values.size))),
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    return np.atleast_1d(found.low).astype(np.float64), np.atleast_1d(found.high).astype(np.float64)
