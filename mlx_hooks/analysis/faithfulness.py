"""What is faithful, and when nothing can be said of it: for circuits of components and of edges alike."""

import numpy as np

from ..errors import HookError
from .eval_data import FIELD
from .intervals import Estimate

_SMALL = 1e-6
"""A metric that changes by less, relative to its size, does not change."""


def check_differ(first: np.ndarray, second: np.ndarray, what: str) -> None:
    """Raises HookError where two measures [example] have the same mean; ``what`` says what that means."""
    size = max(np.abs(first).mean(), np.abs(second).mean(), _SMALL)
    if abs(first.mean() - second.mean()) <= _SMALL * size:
        raise HookError(f"No circuit can be told: {what}.", field=FIELD)


def is_near(faithfulness: float, asked: float) -> bool:
    """Whether it is as near to 1 as asked: a circuit that does better than the model lacks what holds it back."""
    return abs(faithfulness - 1) <= 1 - asked + _SMALL


def less_than_one(estimate: Estimate) -> Estimate:
    """1 less an estimate, ends and all."""
    low, high = (None if end is None else 1 - end for end in (estimate.high, estimate.low))
    return Estimate(None if estimate.mean is None else 1 - estimate.mean, low, high, estimate.n)
