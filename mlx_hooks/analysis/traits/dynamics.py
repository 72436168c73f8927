"""How a trait's score moves from token to token: velocity, commitment, peak, persistence.

Source: the inference tools guide of trait-interp (2025). Its definitions stand, save two: persistence counts
tokens of the peak's sign that follow it without a gap, and a commitment can be asked for relative to the trait's scale.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...errors import HookError

THRESHOLD = 0.1
"""The guide's: an acceleration below it, in units of score, is none."""


@dataclass(frozen=True)
class Peak:
    """The score that is furthest from 0, and where; the first of several."""

    index: int
    score: float


@dataclass(frozen=True)
class TraitDynamics:
    """What :func:`trait_dynamics` answers; its numbers are plain ones.

    Args:
        n: how many scores there were.
        velocity: first differences, [n - 1].
        acceleration: second differences, [n - 2].
        commitment_point: index of a token, or None.
        peak: None without scores.
        peak_velocity: the largest |velocity|; None for fewer than 2 scores.
        avg_velocity: the mean |velocity|; None for fewer than 2 scores.
        persistence: tokens for which the peak lasts, without a gap.
        persistence_total: all later tokens that are as strong as that.
        threshold: in units of score: |acceleration| below it is none.
        relative: whether it was asked for as a share of the largest |acceleration|.
        stays_below: whether it had to stay below.
    """

    n: int
    velocity: list[float]
    acceleration: list[float]
    commitment_point: int | None
    peak: Peak | None
    peak_velocity: float | None
    avg_velocity: float | None
    persistence: int
    persistence_total: int
    threshold: float
    relative: bool
    stays_below: bool

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)


def trait_dynamics(
    scores: Sequence[float] | np.ndarray,
    *,
    threshold: float = THRESHOLD,
    relative: bool = False,
    stays_below: bool = False,
) -> TraitDynamics:
    """How scores [n], one per token, move. Computed in float64.

    | | |
    | --- | --- |
    | velocity[i] | score[i + 1] - score[i] |
    | acceleration[i] | velocity[i + 1] - velocity[i], which tokens i, i + 1 and i + 2 make |
    | commitment point | the first i with abs(acceleration[i]) below the threshold: token i, the first of the three |
    | peak | the score of the largest absolute value, the first of several |
    | persistence | tokens right after the peak, without a gap, of the peak's sign and above half of it |
    | persistence_total | all such tokens after the peak |

    >>> found = trait_dynamics([0, 1, 4, 4, 4, 1.5, 3])
    >>> found.velocity, found.acceleration
    ([1.0, 3.0, 0.0, 0.0, -2.5, 1.5], [2.0, -3.0, 0.0, -2.5, 4.0])
    >>> found.commitment_point, found.peak, found.persistence, found.persistence_total
    (2, Peak(index=2, score=4.0), 2, 3)

    Args:
        threshold: a number above 0. 0.1 is the guide's, in units of score, so what it means depends on the scale of the
            trait: where scores move by hundredths, token 0 commits.
        relative: the threshold is a share of the largest abs(acceleration), at most 1; where all are 0, token 0
            commits.
        stays_below: the commitment point is the first i from which on all are below, to the end.

    Raises:
        HookError: for scores that are not [n] finite numbers, and for a threshold that is none.
    """
    array = _checked(scores)
    _check_threshold(threshold, relative)
    with np.errstate(over="ignore", invalid="ignore"):
        velocity = np.diff(array)
        acceleration = np.diff(velocity)
    if not (np.isfinite(velocity).all() and np.isfinite(acceleration).all()):
        raise HookError("Scores lie too far apart: their differences leave float64.")
    sizes, speeds = np.abs(acceleration), np.abs(velocity)
    limit = threshold * float(sizes.max(initial=0.0)) if relative else float(threshold)
    peak, persistence, total = _peak(array)
    return TraitDynamics(
        n=array.size,
        velocity=velocity.tolist(),
        acceleration=acceleration.tolist(),
        commitment_point=_commitment(sizes, limit, stays_below),
        peak=peak,
        peak_velocity=float(speeds.max()) if speeds.size else None,
        avg_velocity=float(speeds.mean()) if speeds.size else None,
        persistence=persistence,
        persistence_total=total,
        threshold=limit,
        relative=relative,
        stays_below=stays_below,
    )


def _checked(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    try:
        array = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError):
        raise HookError("Scores are numbers [n], one per token.") from None
    if array.ndim != 1:
        raise HookError(f"Scores are numbers [n], one per token; got {list(array.shape)}.")
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        raise HookError(f"Scores are finite numbers, got {array[wrong[0]]} at index {wrong[0]}.")
    return array


def _check_threshold(threshold: float, relative: bool) -> None:
    is_number = isinstance(threshold, int | float | np.integer | np.floating) and not isinstance(threshold, bool)
    if not is_number or not 0 < threshold < math.inf or (relative and threshold > 1):
        share = ", and a share of at most 1 where it is relative" if relative else ""
        raise HookError(f"threshold is a finite number above 0{share}; got {threshold!r}.", field="threshold")


def _commitment(sizes: np.ndarray, limit: float, stays_below: bool) -> int | None:
    # A share of nothing is nothing, below which nothing lies: scores on a line commit at once.
    below = sizes < limit if limit > 0 else np.ones(sizes.shape, dtype=bool)
    if stays_below:
        below = np.logical_and.accumulate(below[::-1])[::-1]
    found = np.flatnonzero(below)
    return int(found[0]) if found.size else None


def _peak(scores: np.ndarray) -> tuple[Peak | None, int, int]:
    """The peak, and how many tokens after it are of its sign and above half of it: without a gap, and in all."""
    if not scores.size:
        return None, 0, 0
    index = int(np.abs(scores).argmax())
    score = float(scores[index])
    strong = scores[index + 1 :] * np.sign(score) > abs(score) / 2
    gaps = np.flatnonzero(~strong)
    return Peak(index, score), int(gaps[0]) if gaps.size else strong.size, int(strong.sum())
