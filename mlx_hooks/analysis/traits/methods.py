"""Four ways to a direction that tells two sets of activations apart.

Each takes activations with and without the trait, [n, d] and [m, d], and answers one vector [d] that points to those
with it. What differs is the question:

    mean_diff   from where to where do the means move?
    probe       which direction predicts the class, under a penalty on its length?
    ica         which of the data's own independent sources tells the classes apart, and where does it point?
    gradient    along which direction do most pairs of examples lie in order, with some distance?

Statistics are NumPy's and scikit-learn's in float64, gradients MLX's.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import HookError

PRECISION = 64 * float(np.finfo(np.float32).eps)
"""The share of an activation that is rounding, in a model that computes in float32."""
_ROUNDING_RMS = 1 / np.sqrt(12)
"""The usual error of rounding, in steps of what is rounded to."""
_PROBE_STEPS = 1000
_ICA_STEPS = 200
_ICA_STARTS = 4
"""Among sources that are nearly Gaussian FastICA ends where it happens to: the start that separates best is kept."""
_ICA_WORK = 40_000_000
"""Rows x sources x steps after which there is no further start."""
_ICA_SOURCES = (4, 50)
"""Fewest and most sources that are looked for."""
_ROWS_PER_SOURCE = 20
_PAIRS = 2**17
"""Of more pairs than these, so many are drawn."""
_CLIMB_STEPS = 1000
_CLIMB_SLOPE = 1e-7
"""The smooth AUC is at its largest where its slope, per unit of the unit vector, is less than this."""


class NoDirection(HookError):
    """Nothing distinguishes the classes."""


@dataclass(frozen=True)
class Fit:
    """A direction, and how it separates what it was made of.

    Args:
        vector: [d], float32, in units of activations; its length is the method's.
        threshold: the score ``h.v / |v|`` above which an activation counts as positive.
        accuracy: the share of the fitted activations that lie on their side of it.
        effect_size: of them; see :func:`judge`.
        notes: what else the method tells, as plain JSON: ``converged``, ``n_sources``, ...
    """

    vector: np.ndarray
    threshold: float
    accuracy: float
    effect_size: float | None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Classes:
    """Activations with and without a trait, and what several methods make of them: it is made once.

    Args:
        positive, negative: [n, d] and [m, d]; kept as float64.
        precision: the share of an activation that is rounding.

    Raises:
        HookError: for fewer than two rows in a class, and rows of other widths or that are not finite.
    """

    positive: np.ndarray
    negative: np.ndarray
    precision: float = PRECISION

    def __post_init__(self) -> None:
        rows = [np.asarray(each, np.float64) for each in (self.positive, self.negative)]
        for name, each in zip(("positive", "negative"), rows, strict=True):
            if each.ndim != 2 or len(each) < 2 or each.shape[1] != rows[0].shape[-1]:
                raise HookError(
                    f"Activations are two arrays [at least 2, d] with one d, got {rows[0].shape} and {rows[1].shape}."
                )
            if not np.isfinite(each).all():
                raise HookError(f"The {name} activations are not finite: no direction can be made of them.")
            object.__setattr__(self, name, each)

    @cached_property
    def centre(self) -> np.ndarray:
        """The mean of all rows, [d]."""
        return np.concatenate([self.positive, self.negative]).mean(axis=0)

    @cached_property
    def rows(self) -> np.ndarray:
        """All rows less their mean, positive ones first."""
        return np.concatenate([self.positive, self.negative]) - self.centre

    @cached_property
    def rounding(self) -> np.ndarray:
        """How far a number may be from another for no reason but rounding, per dimension [d].

        A share of the dimension's largest number, or of what is usual among dimensions: in one whose numbers are small,
        large ones may have cancelled each other.
        """
        largest = np.abs(np.concatenate([self.positive, self.negative])).max(axis=0)
        return self.precision * np.maximum(largest, np.median(largest))

    @cached_property
    def principal(self) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates [n + m, rank] of the rows along their principal axes [rank, d], the largest variance first.

        Axes along which rows are no farther apart than rounding usually moves them are left out.
        """
        rows = self.rows
        size = np.sqrt(np.square(np.concatenate([self.positive, self.negative])).mean(axis=0))
        rounding = self.precision * _ROUNDING_RMS * np.median(size)
        is_wide = rows.shape[0] <= rows.shape[1]
        # A tenth of the time that the singular values take. It loses what is 1e-8 of the largest, which is rounding.
        square, found = np.linalg.eigh(rows @ rows.T if is_wide else rows.T @ rows)
        square, found = square[::-1], found[:, ::-1]
        least = max(square[0] * max(rows.shape) * np.finfo(np.float64).eps, len(rows) * rounding**2)
        rank = int((square > least).sum())
        length = np.sqrt(square[:rank])
        axes = (rows.T @ (found[:, :rank] / length)).T if is_wide else found[:, :rank].T
        # An axis may point either way: here that of its largest number, so that the same rows begin alike everywhere.
        axes = axes * np.sign(axes[np.arange(rank), np.abs(axes).argmax(axis=1)])[:, None]
        return rows @ axes.T, axes

    def fit(self, method: str, seed: int = 0) -> Fit:
        """A direction; see :func:`fit`."""
        if method not in _WAYS:
            raise HookError(f"A method is one of {', '.join(_WAYS)}; got {method!r}.", field="method")
        nothing = NoDirection(f"Nothing distinguishes the classes: {method} finds no direction.")
        if (np.abs(self.rows).max(axis=0) <= self.rounding).all():
            raise nothing
        direction, threshold, notes = _WAYS[method](self, seed)
        with np.errstate(over="ignore"):
            vector = direction.astype(np.float32)
        if not np.isfinite(vector).all() or not vector.any():
            raise nothing
        if threshold is None:
            threshold = float(sum(scores(vector, each).mean() for each in (self.positive, self.negative)) / 2)
        accuracy, effect_size = judge(vector, threshold, self.positive, self.negative)
        return Fit(vector, threshold, accuracy, effect_size, notes)


def fit(method: str, positive: np.ndarray, negative: np.ndarray, seed: int = 0, precision: float = PRECISION) -> Fit:
    """A direction from activations [n, d] with the trait and [m, d] without it.

    - ``mean_diff``: the mean of the positive ones less that of the negative ones, as long as it is.
    - ``probe``: logistic regression (L2, C = 1) on activations that are divided by one number, so that the penalty
      means the same on every model: :func:`usual_distance`. The vector is the coefficient in units of activations:
      ``h.v`` plus a constant is the log odds. The threshold is even odds.
    - ``ica``: FastICA on the first principal components, one for every 20 rows (4 to 50): with more sources than that
      it finds accidents of the sample. Of the sources of four starts (fewer where there is much to compute) the one is
      taken whose class means are farthest apart in pooled standard deviations; the vector is its column of the mixing
      matrix: the way that activations go when the source grows by one standard deviation. The sign is such that the
      positive ones score higher.
    - ``gradient``: the unit vector with the largest smooth AUC, see :func:`_gradient`.

    Save for the probe the threshold is halfway between the scores' means.

    Args:
        seed: of where ``ica`` and ``gradient`` begin.
        precision: the share of an activation that is rounding: what differs by no more does not differ.

    Raises:
        HookError: for an unknown method, fewer than two rows in a class, rows of other widths or that are not finite,
            and (NoDirection) where nothing distinguishes the classes.
    """
    return Classes(positive, negative, precision).fit(method, seed)


def scores(vector: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """``h.v / |v|`` of activations [n, d], in float64 [n]."""
    direction = vector.astype(np.float64)
    return activations.astype(np.float64) @ (direction / np.linalg.norm(direction))


def judge(
    vector: np.ndarray, threshold: float, positive: np.ndarray, negative: np.ndarray
) -> tuple[float, float | None]:
    """How well a direction separates two sets of activations.

    Returns:
        the share that lies on its side of the threshold; and the effect size d', the distance of the mean scores in
        pooled standard deviations, None where the scores of a class are all one number and the means differ.
    """
    above, below = scores(vector, positive), scores(vector, negative)
    right = (above > threshold).sum() + (below <= threshold).sum()
    distance, spread = above.mean() - below.mean(), np.sqrt((above.var() + below.var()) / 2)
    if not spread:
        return float(right / (len(above) + len(below))), None if distance else 0.0
    return float(right / (len(above) + len(below))), float(distance / spread)


_Found = tuple[np.ndarray, float | None, dict[str, Any]]
"""A direction, its threshold where it is not halfway between the means, and notes."""


def _mean_diff(classes: Classes, seed: int) -> _Found:
    return classes.positive.mean(axis=0) - classes.negative.mean(axis=0), None, {}


def usual_distance(rows: np.ndarray) -> float:
    """How far activations [n, d] would be from their mean if all dimensions scattered as the median one does.

    (At least half of the mean of roots, squared, where most are quiet.) The distance itself is that of the few loud
    dimensions that streams have: a penalty in its units would keep a probe from cancelling these.
    """
    spread = rows.std(axis=0)
    # What stands still tells nothing: of it there is what the mean's rounding leaves.
    spread = spread[spread > 1e-9 * spread.max()]
    # Of roots, a few loud dimensions do not make up the mean as they would of the numbers themselves.
    usual = max(np.median(spread), np.sqrt(spread).mean() ** 2 / 2)
    return float(usual * np.sqrt(len(spread)))


def _probe(classes: Classes, seed: int) -> _Found:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rows, centre = classes.rows, classes.centre
    unit = usual_distance(rows)
    is_positive = np.arange(len(rows)) < len(classes.positive)
    model = LogisticRegression(C=1.0, solver="lbfgs", max_iter=_PROBE_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows / unit, is_positive)
    vector = model.coef_[0] / unit
    length = np.linalg.norm(vector)
    bias = float(model.intercept_[0] - centre @ vector)
    notes = {"bias": bias, "converged": bool(model.n_iter_[0] < _PROBE_STEPS)}
    return vector, -bias / length if length else None, notes


def _ica(classes: Classes, seed: int) -> _Found:
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    coordinates, axes = classes.principal
    n_rows, n_positive = len(coordinates), len(classes.positive)
    fewest, most = _ICA_SOURCES
    n_sources = min(max(fewest, min(n_rows // _ROWS_PER_SOURCE, most)), coordinates.shape[1], n_rows - 1)
    if not n_sources:
        return classes.centre * 0, None, {}
    # Coordinates whose variance is 1: FastICA's own whitening keeps what rounding leaves of further ones.
    spread = coordinates[:, :n_sources].std(axis=0)
    best, work = -1.0, 0
    for start in range(_ICA_STARTS):
        if work > _ICA_WORK:
            break
        model = FastICA(whiten=False, random_state=(seed + start) % 2**32, max_iter=_ICA_STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            sources = model.fit_transform(coordinates[:, :n_sources] / spread)
        work += sources.size * model.n_iter_
        above, below = sources[:n_positive], sources[n_positive:]
        pooled = np.sqrt((above.var(axis=0) + below.var(axis=0)) / 2)
        distance = above.mean(axis=0) - below.mean(axis=0)
        # Finite also where a source is one number in each class.
        separation = np.abs(distance) / np.maximum(pooled, np.finfo(np.float64).eps)
        chosen = int(np.argmax(separation))
        if separation[chosen] > best:
            best = float(separation[chosen])
            direction = (model.mixing_[:, chosen] * spread) @ axes[:n_sources] * np.sign(distance[chosen])
            notes = {
                "n_sources": n_sources,
                "source": chosen,
                "separation": best,
                "converged": bool(model.n_iter_ < _ICA_STEPS),
            }
    return direction, None, notes


def _gradient(classes: Classes, seed: int) -> _Found:
    """The unit vector v that maximises the mean over all pairs of ``log sigmoid((v.p - v.n) / tau)``.

    A smooth form of the AUC, the share of pairs that are in order. Pairs that lie in order by some tau already pull no
    more, those that do not keep their pull: so outliers far out on their own side do not turn the vector, nor do
    directions in which all examples scatter. To maximise the difference of the means would give mean_diff, normalised;
    so would this for an infinite tau.

    tau is twice the pooled standard deviation within the classes (per dimension of the data) and a sixth of the
    distance of their means. With the first alone, the few closest pairs would decide where the classes lie far apart;
    with the second alone, noise would where they hardly differ.

    The ascent begins at a random vector, by L-BFGS on MLX's gradients. The vector is looked for where the examples are,
    among as many dimensions as they have, since outside of these nothing pulls.
    """
    coordinates, axes = classes.principal
    if not coordinates.shape[1]:
        return classes.centre * 0, None, {}
    above, below = np.split(coordinates, [len(classes.positive)])
    within = np.square(above - above.mean(axis=0)).sum() + np.square(below - below.mean(axis=0)).sum()
    spread = np.sqrt(within / len(coordinates) / coordinates.shape[1])
    apart = above.mean(axis=0) - below.mean(axis=0)
    tau = 2 * spread + np.linalg.norm(apart) / 6
    order = np.random.default_rng(seed)
    start = order.standard_normal((coordinates.shape[1],))
    if start @ apart < 0:
        start = -start
    found, converged = _climb(above / tau, below / tau, start, order)
    return found @ axes, None, {"tau": float(tau), "converged": converged}


def _climb(
    above: np.ndarray, below: np.ndarray, start: np.ndarray, order: np.random.Generator
) -> tuple[np.ndarray, bool]:
    """The unit vector with the largest smooth AUC of rows in units of tau, and whether its slope is 0 there."""
    from scipy.optimize import minimize

    pairs = _pairs(len(above), len(below), order)
    # float64 is the CPU's.
    with mx.stream(mx.cpu):
        p, n, zero = mx.array(above, mx.float64), mx.array(below, mx.float64), mx.array(0.0, mx.float64)

        def disorder(free: mx.array) -> mx.array:
            v = free / mx.sqrt(mx.square(free).sum())
            high, low = p @ v, n @ v
            apart = high[:, None] - low if pairs is None else high[pairs[0]] - low[pairs[1]]
            return mx.logaddexp(zero, -apart).mean()

        slope = mx.value_and_grad(disorder)

        def judged(free: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = slope(mx.array(free, mx.float64))
            return float(np.array(value)), np.array(gradient)

        steps = {"maxiter": _CLIMB_STEPS, "gtol": _CLIMB_SLOPE, "ftol": 0.0}
        found = minimize(judged, start / np.linalg.norm(start), jac=True, method="L-BFGS-B", options=steps)
    return found.x / np.linalg.norm(found.x), bool(np.abs(found.jac).max() <= 100 * _CLIMB_SLOPE)


def _pairs(n: int, m: int, order: np.random.Generator) -> tuple[mx.array, mx.array] | None:
    """Which rows make pairs, each row as often as others of its class; None for all with all."""
    if n * m <= _PAIRS:
        return None
    rows = (np.concatenate([order.permutation(size) for _ in range(-(-_PAIRS // size))])[:_PAIRS] for size in (n, m))
    first, second = (mx.array(each) for each in rows)
    return first, second


_WAYS: dict[str, Callable[[Classes, int], _Found]] = {
    "probe": _probe,
    "mean_diff": _mean_diff,
    "ica": _ica,
    "gradient": _gradient,
}
