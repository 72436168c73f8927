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
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from ...errors import HookError

_PROBE_STEPS = 1000
_ICA_STEPS = 200
_ICA_STARTS = 4
"""Among sources that are nearly Gaussian FastICA ends where it happens to: the start that separates best is kept."""
_ICA_SOURCES = (4, 50)
"""Fewest and most sources that are looked for."""
_ROWS_PER_SOURCE = 20
_PAIRED = 1024
"""Activations per class of which all pairs are formed; of more of them, so many are drawn."""
_ADAM_STEPS = 1000
_ADAM_RATE = 0.05
_STANDSTILL = 1e-5
"""Adam has arrived when the unit vector moves less than this in a step."""


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


def fit(method: str, positive: np.ndarray, negative: np.ndarray, seed: int = 0) -> Fit:
    """A direction from activations [n, d] with the trait and [m, d] without it.

    - ``mean_diff``: the mean of the positive ones less that of the negative ones, as long as it is.
    - ``probe``: logistic regression (L2, C = 1) on activations that are divided by their RMS distance from their mean,
      one number, so that the penalty means the same on every model. The vector is the coefficient in units of
      activations: ``h.v`` plus a constant is the log odds. The threshold is even odds.
    - ``ica``: FastICA on the first principal components, one for every 20 rows (4 to 50): with more sources than that
      it finds accidents of the sample. Of the sources of four starts the one is taken whose class means are farthest
      apart in pooled standard deviations; the vector is its column of the mixing matrix: the way that activations go
      when the source grows by one standard deviation. The sign is such that the positive ones score higher.
    - ``gradient``: the unit vector with the largest smooth AUC, see :func:`_gradient`.

    Save for the probe the threshold is halfway between the scores' means.

    Args:
        seed: of where ``ica`` and ``gradient`` begin.

    Raises:
        HookError: for an unknown method, fewer than two rows in a class, rows of other widths or that are not finite,
            and where nothing distinguishes the classes.
    """
    if method not in _WAYS:
        raise HookError(f"A method is one of {', '.join(_WAYS)}; got {method!r}.", field="method")
    rows = [np.asarray(each, np.float64) for each in (positive, negative)]
    for name, each in zip(("positive", "negative"), rows, strict=True):
        if each.ndim != 2 or len(each) < 2 or each.shape[1] != rows[0].shape[-1]:
            raise HookError(
                f"Activations are two arrays [at least 2, d] with one d, got {rows[0].shape} and {rows[1].shape}."
            )
        if not np.isfinite(each).all():
            raise HookError(f"The {name} activations are not finite: no direction can be made of them.")
    direction, threshold, notes = _WAYS[method](rows[0], rows[1], seed)
    with np.errstate(over="ignore"):
        vector = direction.astype(np.float32)
    if not np.isfinite(vector).all() or not vector.any():
        raise HookError(f"Nothing distinguishes the classes: {method} finds no direction.")
    if threshold is None:
        threshold = float(sum(scores(vector, each).mean() for each in rows) / 2)
    accuracy, effect_size = judge(vector, threshold, rows[0], rows[1])
    return Fit(vector, threshold, accuracy, effect_size, notes)


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


def _mean_diff(positive: np.ndarray, negative: np.ndarray, seed: int) -> _Found:
    return positive.mean(axis=0) - negative.mean(axis=0), None, {}


def _probe(positive: np.ndarray, negative: np.ndarray, seed: int) -> _Found:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    rows, centre = _centred(positive, negative)
    unit = np.sqrt(np.square(rows).sum(axis=1).mean())
    if not unit:
        return centre * 0, None, {}
    is_positive = np.arange(len(rows)) < len(positive)
    model = LogisticRegression(C=1.0, solver="lbfgs", max_iter=_PROBE_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(rows / unit, is_positive)
    vector = model.coef_[0] / unit
    length = np.linalg.norm(vector)
    bias = float(model.intercept_[0] - centre @ vector)
    notes = {"bias": bias, "converged": bool(model.n_iter_[0] < _PROBE_STEPS)}
    return vector, -bias / length if length else None, notes


def _ica(positive: np.ndarray, negative: np.ndarray, seed: int) -> _Found:
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    rows, _ = _centred(positive, negative)
    coordinates, axes = _principal(rows)
    fewest, most = _ICA_SOURCES
    n_sources = min(max(fewest, min(len(rows) // _ROWS_PER_SOURCE, most)), coordinates.shape[1], len(rows) - 1)
    if not n_sources:
        return rows[0] * 0, None, {}
    # Coordinates whose variance is 1: FastICA's own whitening keeps what rounding leaves of further ones.
    spread = coordinates[:, :n_sources].std(axis=0)
    best = -1.0
    for start in range(_ICA_STARTS):
        model = FastICA(whiten=False, random_state=(seed + start) % 2**32, max_iter=_ICA_STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            sources = model.fit_transform(coordinates[:, :n_sources] / spread)
        above, below = sources[: len(positive)], sources[len(positive) :]
        pooled = np.sqrt((above.var(axis=0) + below.var(axis=0)) / 2)
        distance = above.mean(axis=0) - below.mean(axis=0)
        separation = np.abs(distance) / np.maximum(pooled, np.finfo(np.float64).tiny)
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


def _gradient(positive: np.ndarray, negative: np.ndarray, seed: int) -> _Found:
    """The unit vector v that maximises the mean over all pairs of ``log sigmoid((v.p - v.n) / tau)``.

    A smooth form of the AUC, the share of pairs that are in order. Pairs that lie in order by some tau already pull no
    more, those that do not keep their pull: so outliers far out on their own side do not turn the vector, nor do
    directions in which all examples scatter. To maximise the difference of the means would give mean_diff, normalised;
    so would this for an infinite tau.

    tau is twice the pooled standard deviation within the classes (per dimension of the data) and a sixth of the
    distance of their means. With the first alone, the few closest pairs would decide where the classes lie far apart;
    with the second alone, noise would where they hardly differ.

    Adam begins at a random vector, and goes on until it stands still. The vector is looked for where the examples are,
    among as many dimensions as they have, since outside of these nothing pulls.
    """
    rows, _ = _centred(positive, negative)
    coordinates, axes = _principal(rows)
    if not coordinates.shape[1]:
        return rows[0] * 0, None, {}
    above, below = coordinates[: len(positive)], coordinates[len(positive) :]
    within = np.square(above - above.mean(axis=0)).sum() + np.square(below - below.mean(axis=0)).sum()
    spread = np.sqrt(within / len(rows) / coordinates.shape[1])
    distance = np.linalg.norm(above.mean(axis=0) - below.mean(axis=0))
    tau = 2 * spread + distance / 6
    order = np.random.default_rng(seed)
    start = order.standard_normal((coordinates.shape[1],))
    if start @ (above.mean(axis=0) - below.mean(axis=0)) < 0:
        start = -start
    found, converged = _climb(_drawn(above, order) / tau, _drawn(below, order) / tau, start)
    return found @ axes, None, {"tau": float(tau), "converged": converged}


def _climb(above: np.ndarray, below: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, bool]:
    """The unit vector with the largest smooth AUC of rows in units of tau, and whether Adam came to rest at it."""
    # float64 is the CPU's.
    with mx.stream(mx.cpu):
        p, n, zero = mx.array(above, mx.float64), mx.array(below, mx.float64), mx.array(0.0, mx.float64)

        def disorder(free: mx.array) -> mx.array:
            v = free / mx.sqrt(mx.square(free).sum())
            return mx.logaddexp(zero, (n @ v)[None, :] - (p @ v)[:, None]).mean()

        slope = mx.grad(disorder)
        adam = optim.Adam(learning_rate=_ADAM_RATE)
        free = mx.array(start / np.linalg.norm(start), mx.float64)
        unit = np.array(free)
        for _ in range(_ADAM_STEPS):
            free = adam.apply_gradients({"v": slope(free)}, {"v": free})["v"]
            mx.eval(free, adam.state)
            before, unit = unit, np.array(free) / np.linalg.norm(np.array(free))
            if np.linalg.norm(unit - before) < _STANDSTILL:
                return unit, True
    return unit, False


def _drawn(rows: np.ndarray, order: np.random.Generator) -> np.ndarray:
    return rows if len(rows) <= _PAIRED else rows[np.sort(order.choice(len(rows), _PAIRED, replace=False))]


def _centred(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All rows less their mean, positive ones first, and the mean."""
    rows = np.concatenate([positive, negative])
    centre = rows.mean(axis=0)
    return rows - centre, centre


def _principal(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates [n, rank] of centred rows along their principal axes [rank, d], the largest variance first."""
    left, length, axes = np.linalg.svd(rows, full_matrices=False)
    rank = int((length > length[0] * max(rows.shape) * np.finfo(np.float64).eps).sum())
    # An axis may point either way: here the way of its largest number, so that the same rows begin alike everywhere.
    sign = np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)])[:rank]
    return left[:, :rank] * (length[:rank] * sign), axes[:rank] * sign[:, None]


_WAYS: dict[str, Callable[[np.ndarray, np.ndarray, int], _Found]] = {
    "probe": _probe,
    "mean_diff": _mean_diff,
    "ica": _ica,
    "gradient": _gradient,
}
