"""Trait vectors: methods against other computations of the same, what they are made of, and whose they are."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from neuroscope_tiny.corpus import capital_samples, indirect_object_samples, sum_samples
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from tiny_models import CONFIGS, make_model

from mlx_hooks import Experiment, HookedModel, HookError, TraitVector, extract_vectors, read_record
from mlx_hooks.activations import to_numpy
from mlx_hooks.analysis.identity import ModelIdentity
from mlx_hooks.analysis.traits import extraction, methods
from mlx_hooks.analysis.traits import vectors as vectors_module
from mlx_hooks.analysis.traits.extraction import Examples, Span
from mlx_hooks.analysis.traits.methods import PRECISION, Classes, Fit, NoDirection, fit, judge, scores
from mlx_hooks.analysis.traits.prompts import Chat, render
from mlx_hooks.analysis.traits.vectors import METHODS, save_vectors
from mlx_hooks.cli import main
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.storage.tensors import TensorFile, write_arrays


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def planted(
    d: int, n: int, strength: float, *, spread: float = 1.0, draw: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise [n, d] twice, the first moved by ``strength`` along a unit direction, which is the same for one d.

    ``spread`` is the noise's standard deviation along one axis; along the others it is 1.
    """
    order = np.random.default_rng(0)
    axes, _ = np.linalg.qr(order.normal(size=(d, d)))
    direction = order.normal(size=d)
    direction /= np.linalg.norm(direction)
    noise = np.random.default_rng(draw).normal(size=(2 * n, d)) @ (axes * np.where(np.arange(d) < 1, spread, 1.0)).T
    return 20 + noise[:n] + strength * direction, 20 + noise[n:], direction


# Methods


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("d", "n", "strength", "spread"),
    [(32, 100, 6, 1), (64, 100, 6, 1), (64, 200, 6, 4), (32, 60, 20, 1), (64, 100, 1000, 3), (128, 60, 30, 1)],
)
def test_every_method_recovers_a_planted_direction(method: str, d: int, n: int, strength: float, spread: float) -> None:
    positive, negative, direction = planted(d, n, strength, spread=spread)
    found = fit(method, positive, negative)
    assert cosine(found.vector, direction) > 0.95
    assert found.accuracy > 0.99
    unseen_positive, unseen_negative, _ = planted(d, n, strength, spread=spread, draw=1)
    accuracy, effect_size = judge(found.vector, found.threshold, unseen_positive, unseen_negative)
    assert accuracy > 0.99
    assert effect_size is not None
    assert effect_size > 4


@pytest.mark.parametrize("method", METHODS)
def test_the_scale_and_the_place_of_activations_do_not_matter(method: str) -> None:
    positive, negative, _ = planted(16, 60, 8, spread=3)
    one = fit(method, positive, negative)
    other = fit(method, 1000 * positive + 7, 1000 * negative + 7)
    # Where FastICA stops among Gaussian sources depends on rounding.
    assert cosine(one.vector, other.vector) > (0.99 if method == "ica" else 1 - 1e-6)
    assert one.accuracy == pytest.approx(other.accuracy, abs=0.01)
    length = np.linalg.norm(other.vector) / np.linalg.norm(one.vector)
    assert length == pytest.approx(
        {"probe": 1e-3, "gradient": 1}.get(method, 1e3), rel=0.03 if method == "ica" else 1e-4
    )


def test_mean_diff_is_the_difference_of_the_means() -> None:
    positive, negative, _ = planted(16, 30, 2)
    found = fit("mean_diff", positive, negative[:20])
    expected = positive.mean(axis=0) - negative[:20].mean(axis=0)
    np.testing.assert_allclose(found.vector, expected, rtol=1e-6)
    # Halfway between the means of the scores, and on either side of it.
    unit = expected / np.linalg.norm(expected)
    above, below = positive @ unit, negative[:20] @ unit
    assert found.threshold == pytest.approx((above.mean() + below.mean()) / 2, abs=1e-4)
    assert found.accuracy == np.mean([*(above > found.threshold), *(below <= found.threshold)])
    pooled = np.sqrt((above.var() + below.var()) / 2)
    assert found.effect_size == pytest.approx((above.mean() - below.mean()) / pooled, rel=1e-5)


def test_the_probe_is_logistic_regression_at_the_optimum() -> None:
    """Of the penalised likelihood: by sklearn on other data, and because its slope is 0 there."""
    positive, negative, _ = planted(12, 80, 1.5, spread=5)
    found = fit("probe", positive, negative[:50])
    rows = np.concatenate([positive, negative[:50]])
    label = np.r_[np.ones(80), np.zeros(50)]
    unit = np.median(rows.std(axis=0)) * np.sqrt(12)
    reference = LogisticRegression(tol=1e-8, max_iter=5000).fit(rows / unit, label)
    np.testing.assert_allclose(found.vector, reference.coef_[0] / unit, rtol=1e-2, atol=1e-4)
    v, bias = found.vector.astype(np.float64), found.notes["bias"]
    error = label - 1 / (1 + np.exp(-(rows @ v + bias)))
    np.testing.assert_allclose((error @ (rows - rows.mean(axis=0))) / unit, v * unit, atol=0.02)
    assert abs(error.sum()) < 0.02
    # The threshold is where the odds are even.
    assert found.threshold == pytest.approx(-bias / np.linalg.norm(v), rel=1e-6)
    assert found.accuracy == np.mean((rows @ v + bias > 0) == label)
    assert found.notes["converged"]


def loud(*spreads: float, d: int = 256, n: int = 100, unseen: int = 500) -> tuple[list[np.ndarray], np.ndarray]:
    """Positive and negative rows to fit, then others, and the truth. The first dimensions are loud and tell nothing."""
    order = np.random.default_rng(0)
    direction = order.normal(size=d)
    direction[: len(spreads)] = 0
    direction *= 7 / np.linalg.norm(direction)
    spread = np.array([*spreads, *[1.0] * (d - len(spreads))])
    rows = [order.normal(size=(size, d)) * spread for size in (n, n, unseen, unseen)]
    return [rows[0] + direction, rows[1], rows[2] + direction, rows[3]], direction


@pytest.mark.parametrize("spreads", [(), (20, 10, 5), (60, 30, 10), (150, 60, 30), (5000,)])
def test_the_probe_cancels_what_is_loud_and_tells_nothing(spreads: tuple[float, ...]) -> None:
    (positive, negative, *unseen), direction = loud(*spreads)
    found = fit("probe", positive, negative)
    accuracy, _ = judge(found.vector, found.threshold, *unseen)
    assert found.accuracy == 1
    assert accuracy > 0.99
    assert cosine(found.vector, direction) > 0.94
    assert found.notes["converged"]


def test_the_probe_of_dimensions_that_mostly_stand_still_is_measured_by_the_others() -> None:
    positive, negative = np.zeros((20, 9)), np.zeros((20, 9))
    positive[:, 3] = np.linspace(0, 1, 20) + 0.8
    negative[:, 3] = np.linspace(0, 1, 20)
    found = fit("probe", positive, negative)
    assert cosine(found.vector, np.eye(9)[3]) > 1 - 1e-9
    unit = np.concatenate([positive, negative])[:, 3].std()
    reference = LogisticRegression(tol=1e-8).fit(np.r_[positive, negative] / unit, np.arange(40) < 20)
    assert found.vector[3] == pytest.approx(reference.coef_[0, 3] / unit, rel=1e-2)


@pytest.mark.parametrize("quiet", [1e-1, 1e-2, 1e-4, 0])
def test_quiet_dimensions_do_not_make_the_probe_long(quiet: float) -> None:
    """Where they are more than the others, the penalty must not vanish with what they scatter."""
    order = np.random.default_rng(0)
    direction = np.where(np.arange(128) < 60, order.normal(size=128), 0)
    direction /= np.linalg.norm(direction)
    noise = order.normal(size=(2, 80, 128)) * np.where(np.arange(128) < 60, 1, quiet)
    positive, negative = noise[0] + direction, noise[1] - direction
    found = fit("probe", positive, negative)
    alone = fit("probe", positive[:, :60], negative[:, :60])
    assert cosine(found.vector, direction) > 0.7
    assert np.linalg.norm(found.vector) < 6 * np.linalg.norm(alone.vector)


def test_ica_takes_the_source_that_separates_with_its_sign() -> None:
    order = np.random.default_rng(3)
    mixing = order.normal(size=(10, 10))
    sources = order.laplace(size=(2000, 10)) / np.sqrt(2)
    classes = np.where(np.arange(2000) < 1000, 1.0, -1.0)
    for which, sign in ((7, 1), (2, -1)):
        made = sources.copy()
        made[:, which] = sign * classes + 0.1 * sources[:, which]
        rows = made @ mixing.T
        found = fit("ica", rows[:1000], rows[1000:])
        assert cosine(found.vector, sign * mixing[:, which]) > 0.99
        # The column of a source whose standard deviation is 1.
        assert np.linalg.norm(found.vector) == pytest.approx(np.linalg.norm(mixing[:, which]), rel=0.05)
        assert found.notes["n_sources"] == 10
        assert found.notes["converged"]


def test_the_number_of_sources_goes_with_the_number_of_rows() -> None:
    for n, d, expected in ((3, 50, 4), (40, 50, 4), (100, 50, 10), (100, 6, 6), (800, 60, 50), (2, 50, 3)):
        positive, negative, _ = planted(d, n, 8)
        assert fit("ica", positive, negative).notes["n_sources"] == expected


def test_of_several_starts_the_one_is_kept_that_separates_best(monkeypatch: pytest.MonkeyPatch) -> None:
    positive, negative, _ = planted(64, 60, 3)
    found = fit("ica", positive, negative, seed=2**32 - 2)
    monkeypatch.setattr(methods, "_ICA_STARTS", 1)
    alone = [fit("ica", positive, negative, seed).notes["separation"] for seed in (2**32 - 2, 2**32 - 1, 0, 1)]
    assert found.notes["separation"] == pytest.approx(max(alone), rel=1e-6) != pytest.approx(alone[0], rel=1e-3)


def smooth_auc(v: np.ndarray, positive: np.ndarray, negative: np.ndarray, tau: float) -> float:
    unit = v / np.linalg.norm(v)
    return float(-np.logaddexp(0, -((positive @ unit)[:, None] - negative @ unit) / tau).mean())


@pytest.mark.parametrize("spread", [1, 6])
def test_gradient_is_where_the_smooth_auc_is_largest(spread: float) -> None:
    positive, negative, _ = planted(10, 40, 2, spread=spread)
    found = fit("gradient", positive, negative[:30])
    within = [each - each.mean(axis=0) for each in (positive, negative[:30])]
    distance = np.linalg.norm(positive.mean(axis=0) - negative[:30].mean(axis=0))
    tau = 2 * np.sqrt(sum(np.square(each).sum() for each in within) / 70 / 10) + distance / 6
    assert found.notes["tau"] == pytest.approx(tau, rel=1e-9)
    start = positive.mean(axis=0) - negative[:30].mean(axis=0)
    best = minimize(lambda v: -smooth_auc(v, positive, negative[:30], tau), start / np.linalg.norm(start))
    assert smooth_auc(found.vector, positive, negative[:30], tau) == pytest.approx(-best.fun, abs=1e-6)
    assert cosine(found.vector, best.x) > 0.9999
    assert np.linalg.norm(found.vector) == pytest.approx(1, abs=1e-6)
    for seed in (1, 2):
        assert cosine(fit("gradient", positive, negative[:30], seed).vector, found.vector) > 0.9999


def test_gradient_is_no_mean_difference_in_disguise() -> None:
    """Some positive examples lie far out elsewhere: the mean follows them, the order of pairs hardly does."""
    positive, negative, direction = planted(32, 100, 5)
    far = np.random.default_rng(9).normal(size=32)
    far -= far @ direction * direction
    positive[:8] += 100 * far / np.linalg.norm(far)
    by_mean, by_order = fit("mean_diff", positive, negative), fit("gradient", positive, negative)
    unseen, others, _ = planted(32, 500, 5, draw=1)
    assert cosine(by_mean.vector, direction) < 0.6
    assert cosine(by_order.vector, direction) > 0.9
    above, below = (scores(by_order.vector, each) for each in (unseen, others))
    assert (above[:, None] > below).mean() > 0.99
    above, below = (scores(by_mean.vector, each) for each in (unseen, others))
    assert (above[:, None] > below).mean() < 0.98


def test_gradient_turns_away_from_what_only_scatters() -> None:
    positive, negative, _ = planted(24, 60, 3, spread=20)
    unseen, others, _ = planted(24, 60, 3, spread=20, draw=1)
    by_mean, by_order = fit("mean_diff", positive, negative), fit("gradient", positive, negative)
    sharp, blurred = (judge(found.vector, found.threshold, unseen, others)[1] for found in (by_order, by_mean))
    assert sharp > 1.3 * blurred


def test_of_many_activations_some_pairs_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    positive, negative, direction = planted(16, 200, 6)
    assert np.array_equal(*(fit("gradient", positive, negative, seed).vector for seed in (0, 0)))
    everything = fit("gradient", positive, negative).vector
    monkeypatch.setattr(methods, "_PAIRS", 2500)
    one, same, other = (fit("gradient", positive, negative, seed).vector for seed in (0, 0, 1))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert cosine(one, direction) > 0.95
    assert 0.99 < cosine(one, everything) < 1 - 1e-6
    first, second = methods._pairs(200, 70, np.random.default_rng(0))
    for rows, size in ((first, 200), (second, 70)):
        often = np.bincount(np.array(rows), minlength=size)
        assert often.sum() == 2500
        assert np.ptp(often) <= 1
    assert methods._pairs(50, 50, np.random.default_rng(0)) is None


def test_where_much_is_to_be_computed_ica_begins_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    positive, negative, _ = planted(64, 60, 3)
    monkeypatch.setattr(methods, "_ICA_WORK", 0)
    found = fit("ica", positive, negative, seed=2**32 - 2)
    monkeypatch.setattr(methods, "_ICA_STARTS", 1)
    assert found.notes == fit("ica", positive, negative, seed=2**32 - 2).notes


def test_what_several_methods_need_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    positive, negative, _ = planted(16, 40, 5)
    made: list[tuple[int, ...]] = []
    eigh = np.linalg.eigh

    def counted(matrix: np.ndarray) -> Any:
        if matrix.shape == (16, 16):
            made.append(matrix.shape)
        return eigh(matrix)

    alone = {method: fit(method, positive, negative).vector for method in METHODS}
    monkeypatch.setattr(np.linalg, "eigh", counted)
    classes = Classes(positive, negative)
    for method in METHODS:
        assert np.array_equal(classes.fit(method).vector, alone[method])
    assert len(made) == 1


@pytest.mark.parametrize("shape", [(30, 12), (8, 40)])
def test_principal_axes_are_those_of_the_singular_values(shape: tuple[int, int]) -> None:
    order = np.random.default_rng(1)
    positive, negative = order.normal(size=(2, *shape)) * (1 + np.arange(shape[1]))
    classes = Classes(positive, negative)
    rows = np.concatenate([positive, negative])
    rows = rows - rows.mean(axis=0)
    _, length, axes = np.linalg.svd(rows, full_matrices=False)
    coordinates, found = classes.principal
    rank = min(2 * shape[0] - 1, shape[1])
    assert coordinates.shape == (2 * shape[0], rank)
    np.testing.assert_allclose(found @ found.T, np.eye(rank), atol=1e-9)
    np.testing.assert_allclose(np.abs((found * axes[:rank]).sum(axis=1)), 1, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(coordinates, axis=0), length[:rank], rtol=1e-9)
    np.testing.assert_allclose(coordinates @ found, rows, atol=1e-9)
    assert (found[np.arange(rank), np.abs(found).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize(
    ("method", "steps"), [("probe", "_PROBE_STEPS"), ("ica", "_ICA_STEPS"), ("gradient", "_CLIMB_STEPS")]
)
def test_what_has_not_converged_says_so(method: str, steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    positive, negative, _ = planted(16, 40, 2)
    assert fit(method, positive, negative).notes["converged"] in (True, False)
    monkeypatch.setattr(methods, steps, 1)
    assert fit(method, positive, negative).notes["converged"] is False


@pytest.mark.parametrize("method", METHODS)
def test_classes_that_do_not_scatter_are_separated_without_end(method: str) -> None:
    positive, negative = np.full((3, 8), 2.0), np.full((4, 8), 1.0)
    found = fit(method, positive, negative)
    assert cosine(found.vector, np.ones(8)) > 1 - 1e-6
    assert found.accuracy == 1
    assert found.effect_size is None
    json.dumps(found.notes, allow_nan=False)
    assert judge(found.vector, found.threshold, positive, positive) == (0.5, 0.0)


@pytest.mark.parametrize("method", METHODS)
def test_where_nothing_differs_there_is_no_direction(method: str) -> None:
    with pytest.raises(HookError, match=f"Nothing distinguishes the classes: {method} finds no direction"):
        fit(method, np.ones((3, 8)), np.ones((4, 8)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "precision"), [(np.float32, PRECISION), (np.float16, 2.0**-10)])
def test_what_is_apart_by_rounding_is_not_apart(method: str, dtype: type, precision: float) -> None:
    """Also where a dimension's numbers are small, since larger ones have cancelled each other, or one's are huge."""
    order = np.random.default_rng(0)
    state = order.normal(size=32)
    state[5], state[6] = 1e-4, 300
    moved = 2 if dtype is np.float32 else 0.25
    rounding = moved * np.finfo(dtype).eps * np.maximum(1, np.abs(state))
    positive, negative = (
        np.tile(state, (20, 1)) + rounding * (shift + order.normal(size=(20, 32)) / 4) for shift in (0, 1)
    )
    with pytest.raises(HookError, match=f"Nothing distinguishes the classes: {method} finds no direction"):
        fit(method, positive, negative, precision=precision)
    # The difference is there, and only its size says that it is nothing.
    assert fit("mean_diff", positive, negative, precision=0).accuracy > 0.95
    # One dimension that moves is enough.
    positive[:, 8] += 1000 * precision
    assert cosine(fit(method, positive, negative, precision=precision).vector, np.eye(32)[8]) > 0.9


def in_bfloat16(rows: np.ndarray) -> np.ndarray:
    return to_numpy(mx.array(rows.astype(np.float32)).astype(mx.bfloat16))


@pytest.mark.parametrize(("scatter", "nuisance", "length"), [(0.1, 3, 1), (0.02, 0, 0.6)])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_small_beside_what_all_share_is_found_in_bfloat16(
    method: str, scatter: float, nuisance: float, length: float
) -> None:
    """Half precision's rounding is a share of what all rows share: that hides neither a trait nor the axes it needs."""
    order = np.random.default_rng(1)
    shared = 5 * order.normal(size=256)
    direction, other = np.linalg.qr(order.normal(size=(256, 2)))[0].T
    loud = 0.7 * direction + np.sqrt(1 - 0.49) * other
    positive, negative, *unseen = (
        in_bfloat16(
            shared
            + scatter * order.normal(size=(150, 256))
            + nuisance * order.normal(size=(150, 1)) * loud
            + sign * length * direction
        )
        for sign in (1, -1, 1, -1)
    )
    found, expected = (fit(method, positive, negative, precision=each) for each in (2.0**-7, PRECISION))
    assert cosine(found.vector, expected.vector) > 0.99
    if method in ("probe", "gradient") or not nuisance:
        assert judge(found.vector, found.threshold, *unseen)[0] > 0.99


def test_sources_are_not_looked_for_in_rounding() -> None:
    """An axis of rounding, brought to the variance of the others, would tell the classes apart."""
    order = np.random.default_rng(0)
    positive, negative = (np.ones((40, 8)) + np.eye(8)[0] * order.normal(size=(40, 1)) for _ in range(2))
    positive[:, 1] += 3e-7
    by_rounding = Classes(positive, negative, precision=0).fit("ica").notes
    assert (by_rounding["n_sources"], by_rounding["separation"] > 10) == (2, True)
    found = Classes(positive, negative).fit("ica").notes
    assert (found["n_sources"], found["separation"] < 1) == (1, True)


@pytest.mark.parametrize(
    ("method", "positive", "negative", "message"),
    [
        ("lda", np.ones((2, 3)), np.ones((2, 3)), "A method is one of probe, mean_diff, ica, gradient; got 'lda'"),
        (
            "ica",
            np.ones((1, 3)),
            np.ones((2, 3)),
            r"two arrays \[at least 2, d\] with one d, got \(1, 3\) and \(2, 3\)",
        ),
        ("ica", np.ones((2, 3)), np.ones((2, 4)), r"got \(2, 3\) and \(2, 4\)"),
        ("ica", np.ones(3), np.ones(3), r"got \(3,\) and \(3,\)"),
        ("probe", np.ones((2, 3)), np.full((2, 3), np.nan), "The negative activations are not finite"),
    ],
)
def test_what_no_vector_can_be_made_of_is_refused(
    method: str, positive: np.ndarray, negative: np.ndarray, message: str
) -> None:
    with pytest.raises(HookError, match=message):
        fit(method, positive, negative)


def test_a_fit_is_float32_and_plain() -> None:
    for method in METHODS:
        positive, negative, _ = planted(8, 20, 3)
        found = fit(method, positive.astype(np.float32), negative.astype(np.float32))
        assert isinstance(found, Fit)
        assert found.vector.dtype == np.float32
        assert json.loads(json.dumps(found.notes)) == found.notes


# Extraction

POSITIVE = [
    [3, 14, 15, 9, 26, 5],
    [35, 8, 9, 7, 9],
    [3, 2, 3, 8],
    [46, 2, 6, 4, 3, 3, 8],
    [3, 27, 9, 50, 2],
    [8, 8, 4, 1],
]
NEGATIVE = [[1, 41, 42, 13], [56, 23, 7, 30, 9, 50], [48, 8, 0, 16, 8], [8, 7, 2, 4, 2], [11, 12], [30, 31, 32]]


# Prompts of other lengths take other kernels, which round otherwise.
CAPITALS = [
    f"What is the capital of {country} ?" for country in ("Italy", "Spain", "Norway", "Poland", "Greece", "Peru")
]
SUMS = [f"What is {i} + {9 - i} ?" for i in range(6)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("span", "layer"), [("0:1", 1), ("0:1", 3), ("0:3", 0)])
def test_what_all_prompts_begin_with_tells_nothing(span: str, layer: int, dtype: mx.Dtype) -> None:
    model = HookedModel.from_pretrained("neuroscope-tiny")
    model.model.set_dtype(dtype)
    for method in METHODS:
        with pytest.raises(HookError, match=f"Layer {layer}: Nothing distinguishes the classes: {method} finds no"):
            extract_vectors(model, CAPITALS, SUMS, trait="x", layers=[layer], methods=[method], span=span)
    assert len(extract_vectors(model, CAPITALS, SUMS, trait="x", layers=[layer], methods=METHODS)) == len(METHODS)


@pytest.mark.parametrize("span", ["last", "response"])
@pytest.mark.parametrize(
    ("dtype", "precision"), [(mx.float32, 2.0**-17), (mx.float16, 2.0**-10), (mx.bfloat16, 2.0**-7)]
)
def test_how_much_is_rounding_goes_with_the_models_numbers(
    dtype: mx.Dtype, precision: float, span: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = HookedModel(make_model("llama"))
    model.model.set_dtype(dtype)
    used = []

    def made(*of: Any) -> Classes:
        used.append(of[2])
        return Classes(*of)

    monkeypatch.setattr(extraction, "Classes", made)
    options: dict[str, Any] = {"layers": [0, 2], "methods": ["mean_diff", "probe"], "max_new_tokens": 2}
    extract_vectors(model, POSITIVE, NEGATIVE, trait="x", span=span, **options)
    assert used == [precision] * 2


@pytest.fixture(scope="module")
def windowed() -> tuple[HookedModel, list[list[int]], list[list[int]]]:
    """A model of two layers that look 8 tokens back and one that looks at all; its prompts differ before the window."""
    model = HookedModel(tiny_model("gemma3_text"))
    tail = np.random.default_rng(0).integers(20, 40, 30).tolist()
    return model, *([[first, i, 9, *tail] for i in range(10, 20)] for first in (7, 8))


def test_layers_that_do_not_see_a_difference_do_not_stop_the_others(windowed: tuple) -> None:
    model, positive, negative = windowed
    options: dict[str, Any] = {"trait": "x", "methods": ["mean_diff", "probe"]}
    with pytest.warns(UserWarning, match="no vector of") as told:
        vectors = extract_vectors(model, positive, negative, **options)
    seeing = sorted({vector.layer for vector in vectors})
    assert 0 < seeing[0] <= seeing[-1] == model.cfg.n_layers - 1
    assert [v.name for v in vectors] == [f"{method}_layer{i}" for i in seeing for method in options["methods"]]
    assert all(vector.metadata["held_out_accuracy"] == 1 for vector in vectors)
    named = "; ".join(f"layer {i}: mean_diff, probe" for i in range(seeing[0]))
    message = f"x: nothing distinguishes the classes, so there is no vector of {named}."
    assert [str(each.message) for each in told] == [message]
    with pytest.raises(NoDirection, match="^Layer 0: Nothing distinguishes the classes: mean_diff finds no direction"):
        extract_vectors(model, positive, negative, layers=[0], **options)


def states(model: HookedModel, rows: list[list[int]], layer: int, span: slice) -> np.ndarray:
    """Means over a span of whole captures."""
    found = [model.run_with_cache(row)[1].numpy(f"blocks.{layer}.hook_resid_post")[0] for row in rows]
    return np.stack([each.astype(np.float64)[span].mean(axis=0) for each in found])


@pytest.mark.parametrize(("span", "meant"), [("last", slice(-1, None)), ("0:2", slice(0, 2)), ("-2:", slice(-2, None))])
def test_vectors_are_made_of_the_models_own_states(model: HookedModel, span: str, meant: slice) -> None:
    vectors = extract_vectors(
        model, POSITIVE, NEGATIVE, trait="x", methods=["mean_diff", "probe"], span=span, held_out=0
    )
    assert [(v.layer, v.method) for v in vectors] == [(i, m) for i in range(3) for m in ("mean_diff", "probe")]
    for vector in vectors:
        rows = [states(model, each, vector.layer, meant) for each in (POSITIVE, NEGATIVE)]
        expected = fit(vector.method, *rows)
        np.testing.assert_allclose(vector.vector, expected.vector, rtol=1e-3, atol=1e-4)
        assert vector.threshold == pytest.approx(expected.threshold, rel=1e-3, abs=1e-4)
        assert vector.metadata["span"] == span
        assert (vector.metadata["n_positive"], vector.metadata["n_negative"]) == (6, 6)
        assert vector.metadata["held_out_accuracy"] is None
        assert vector.metadata["accuracy"] == expected.accuracy
        assert vector.metadata["effect_size"] == pytest.approx(expected.effect_size, rel=1e-3)
        assert vector.chat is None
        assert vector.identity == ModelIdentity.of(model)
        assert json.loads(json.dumps(dict(vector.metadata))) == vector.metadata


def test_layers_and_methods_are_taken_as_asked() -> None:
    model = HookedModel(make_model("llama"))
    vectors = extract_vectors(model, POSITIVE, NEGATIVE, trait="x", layers=[-1, 0, 2], methods=["ica", "mean_diff"])
    assert [v.name for v in vectors] == ["ica_layer0", "mean_diff_layer0", "ica_layer2", "mean_diff_layer2"]
    again = extract_vectors(model, POSITIVE, NEGATIVE, trait="x", layers=[0, 2], methods=["ica", "mean_diff"])
    assert all(np.array_equal(one.vector, same.vector) for one, same in zip(vectors, again, strict=True))


def test_of_a_whole_prompt_leading_special_tokens_are_left_out(tiny: HookedModel) -> None:
    special = set(tiny.hf_tokenizer.all_special_ids)
    texts = ["The capital of France is", "The capital of Italy is"], ["3 + 4 =", "2 + 2 = 4"]
    vector = extract_vectors(
        tiny, *texts, trait="x", span="prompt", layers=[1], methods=["mean_diff"], chat=Chat(use=False)
    )[0]
    rows = [[tiny.to_tokens(text).tolist()[0] for text in each] for each in texts]
    assert all(row[0] in special and row[1] not in special for each in rows for row in each)
    positive, negative = (states(tiny, each, 1, slice(1, None)) for each in rows)
    np.testing.assert_allclose(vector.vector, positive.mean(0) - negative.mean(0), rtol=1e-4, atol=1e-5)


def test_texts_go_through_the_chat_template_and_the_vector_says_so(tiny: HookedModel) -> None:
    texts = ["The capital of France is", "The capital of Italy is"], ["3 + 4 =", "2 + 2 ="]
    options: dict[str, Any] = {"trait": "x", "layers": [3], "methods": ["mean_diff"]}
    own, plain = (extract_vectors(tiny, *texts, **options, chat=chat)[0] for chat in (None, Chat(use=False)))
    assert (own.chat, plain.chat) == (Chat(), Chat(use=False))
    for vector in (own, plain):
        rows = [[render(tiny, text, vector.chat) for text in each] for each in texts]
        positive, negative = (states(tiny, each, 3, slice(-1, None)) for each in rows)
        np.testing.assert_allclose(vector.vector, positive.mean(0) - negative.mean(0), rtol=1e-4, atol=1e-5)
    assert not np.allclose(own.vector, plain.vector)
    assert own.metadata["prompts"] != plain.metadata["prompts"]


def test_a_response_is_every_token_that_the_model_generates(tiny: HookedModel) -> None:
    """The last one too, and an end token."""
    texts = ["3 + 4 =", "2 + 2 ="], ["The capital of France is", "The capital of Italy is"]
    for max_new_tokens in (2, 20):
        vector = extract_vectors(
            tiny,
            *texts,
            trait="x",
            span="response",
            layers=[2],
            methods=["mean_diff"],
            chat=Chat(use=False),
            max_new_tokens=max_new_tokens,
        )[0]
        means, ends = [], set()
        for each in texts:
            found = []
            for text in each:
                result = tiny.generate(text, max_tokens=max_new_tokens)
                ends.add(result.finish_reason)
                rows = [[*result.prompt_tokens, *result.tokens]]
                found.append(states(tiny, rows, 2, slice(len(result.prompt_tokens), None))[0])
            means.append(np.mean(found, axis=0))
        assert "stop" in ends or max_new_tokens == 2
        np.testing.assert_allclose(vector.vector, means[0] - means[1], rtol=1e-3, atol=1e-4)
        assert vector.metadata["max_new_tokens"] == max_new_tokens


def test_held_out_prompts_are_no_part_of_a_vector() -> None:
    model = HookedModel(make_model("llama"))
    options: dict[str, Any] = {"trait": "x", "methods": ["mean_diff", "probe"]}
    split = Examples.of(model, POSITIVE, NEGATIVE, held_out=0.4)
    fitted, held = ([[list(e.tokens) for e in each] for each in part] for part in (split.fitted, split.held_out))
    assert [len(each) for each in (*fitted, *held)] == [4, 4, 2, 2]
    for rows, *parts in zip((POSITIVE, NEGATIVE), fitted, held, strict=True):
        assert sorted(parts[0] + parts[1]) == sorted(rows)
    by_share = extract_vectors(model, POSITIVE, NEGATIVE, held_out=0.4, **options)
    given = extract_vectors(model, *fitted, held_out=(held[0], held[1]), **options)
    at_zero = []
    for share, own in zip(by_share, given, strict=True):
        assert np.array_equal(share.vector, own.vector)
        positive, negative = (states(model, each, share.layer, slice(-1, None)) for each in held)
        unit = share.vector.astype(np.float64) / share.norm
        above, below = positive @ unit, negative @ unit
        at_zero.append(np.mean([*(above > 0), *(below <= 0)]))
        pooled = np.sqrt((above.var() + below.var()) / 2)
        for vector in (share, own):
            right = [*(above > vector.threshold), *(below <= vector.threshold)]
            assert vector.metadata["held_out_accuracy"] == np.mean(right)
            assert vector.metadata["effect_size"] == pytest.approx((above.mean() - below.mean()) / pooled, rel=1e-4)
            assert (vector.metadata["n_positive"], vector.metadata["n_held_out_negative"]) == (4, 2)
    assert [vector.metadata["held_out_accuracy"] for vector in given] != at_zero


def test_the_split_is_seeded_and_keeps_equals_together() -> None:
    model = HookedModel(make_model("llama"))
    one, same, other = (Examples.of(model, POSITIVE, NEGATIVE, seed=seed) for seed in (0, 0, 5))
    assert one == same
    assert one.digest == same.digest != other.digest
    assert {e.tokens for e in one.held_out[0]} != {e.tokens for e in other.held_out[0]}
    assert [len(each) for each in one.held_out] == [1, 1]
    twice = Examples.of(model, [*POSITIVE, *POSITIVE], NEGATIVE)
    assert [len(each) for each in (*twice.fitted, *twice.held_out)] == [10, 5, 2, 1]
    assert not set(twice.fitted[0]) & set(twice.held_out[0])
    for positive, share in ((POSITIVE[:4], 0.2), (POSITIVE, 0)):
        assert Examples.of(model, positive, NEGATIVE, held_out=share).held_out == ([], [])
    most = Examples.of(model, POSITIVE, NEGATIVE, held_out=0.99)
    assert [len(each) for each in most.fitted] == [2, 2]


@pytest.mark.parametrize(
    ("span", "tokens", "expected"),
    [
        ("last", [1, 5, 9], range(2, 3)),
        ("prompt", [1, 0, 9, 1], range(2, 4)),
        ("response", [1, 5], range(2, 2)),
        ("1:", [4, 5, 6], range(1, 3)),
        (":-1", [4, 5, 6], range(0, 2)),
        (" -3 : -1 ", [4, 5, 6], range(0, 2)),
        ("0:3", [4, 5, 6], range(0, 3)),
    ],
)
def test_spans_are_positions(span: str, tokens: list[int], expected: range) -> None:
    assert Span.of(span).positions(tokens, special=[0, 1]) == expected


@pytest.mark.parametrize("span", ["0:4", "-4:", "2:2", "2:1", "3:"])
def test_a_slice_has_to_lie_in_the_prompt(span: str) -> None:
    with pytest.raises(HookError, match=f"The span {span} is not in the prompt, which has 3 tokens"):
        Span.of(span).positions([4, 5, 6], special=())


def broken_model() -> HookedModel:
    """Its second layer answers what is not finite."""
    inner = make_model("llama")
    inner.model.layers[1].mlp.down_proj.weight = inner.model.layers[1].mlp.down_proj.weight * mx.inf
    with pytest.warns(UserWarning, match="identity|not"):
        return HookedModel(inner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive": []}, "The positive prompts are a list of at least one text or row of token ids"),
        ({"negative": "text"}, "The negative prompts are a list of at least one text"),
        ({"positive": [[1, 2]]}, "A vector needs two different positive prompts at least, got 1"),
        (
            {"negative": [[1, 2], [1, 2]]},
            "two different negative prompts at least, got 1: texts that come to the same tokens count once.",
        ),
        ({"negative": [[1, 2], POSITIVE[3]]}, "^Positive prompt 3 is among the negative prompts too"),
        ({"positive": [[1, 2], [99]]}, "Positive prompt 1: Token ids are 0 to 59, got 99 to 99"),
        ({"positive": [[1, 2], [[1], [2]]]}, "Positive prompt 1: A prompt is one row of tokens, got 2"),
        ({"positive": [[1, 2], "text"]}, r"Positive prompt 1 \('text'\): This model has no tokenizer"),
        (
            {"positive": [[1, 2], [1] * 513]},
            "Positive prompt 1: The prompt has 513 tokens; the model reads at most 512",
        ),
        ({"span": "first"}, "A span is last, prompt, response or start:stop, got 'first'"),
        ({"span": 3}, "A span is last, prompt, response or start:stop, got 3"),
        ({"span": "1:4"}, "^Negative prompt 4: The span 1:4 is not in the prompt, which has 2 tokens"),
        ({"span": "response", "max_new_tokens": 0}, "The span response needs max_new_tokens from 1 up, got 0"),
        (
            {"span": "response", "positive": [[1, 2], [1] * 512]},
            "prompt 1: The prompt fills the model's context of 512",
        ),
        ({"held_out": 1.0}, "held_out is a share from 0 to below 1, or positive and negative prompts; got 1.0"),
        ({"held_out": "half"}, "held_out is a share from 0 to below 1"),
        ({"held_out": ([[1]], [])}, "The held-out negative prompts are a list of at least one"),
        ({"held_out": ([[1]], [[1]])}, "Held-out positive prompt 0 is among the held-out negative prompts too"),
        (
            {"held_out": ([[1]], [NEGATIVE[0]])},
            "Held-out negative prompt 0 is among the prompts that vectors are made of too",
        ),
        ({"layers": [3]}, "Layers of llama are 0 to 2, got 3"),
        ({"layers": [True]}, "Layers of llama are 0 to 2, got True"),
        ({"layers": []}, "Layers of llama are 0 to 2, got none"),
        ({"methods": ["lda"]}, "methods are some of probe, mean_diff, ica, gradient; got 'lda'"),
        ({"layers": 1}, "layers is a list of layers, got 1"),
        ({"layers": "1"}, "layers is a list of layers, got '1'"),
        ({"methods": None}, "methods are some of probe, mean_diff, ica, gradient; got None"),
        ({"methods": [["probe"]]}, r"methods are some of .*; got \['probe'\]"),
        ({"methods": "probe"}, "methods are some of probe, mean_diff, ica, gradient; got 'probe'"),
        ({"methods": []}, r"methods are some of .*; got \[\]"),
        ({"seed": -1}, "seed is a whole number from 0 up, got -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is a whole number from 0 up, got 1.5"),
        (
            {"span": "0:1", "positive": [[1, 2], [1, 3]], "negative": [[1, 4], [1, 5]]},
            "Layer 0: Nothing distinguishes the classes: probe finds no direction",
        ),
    ],
)
def test_what_cannot_be_extracted_is_one_sentence(llama: HookedModel, options: dict, message: str) -> None:
    with pytest.raises(HookError, match=message):
        extract_vectors(llama, **({"positive": POSITIVE, "negative": NEGATIVE, "trait": "x"} | options))


def test_activations_that_are_not_finite_are_refused_with_their_prompt() -> None:
    with pytest.raises(HookError, match=r"^Positive prompt 0: The activations of layer 1 are not finite"):
        extract_vectors(broken_model(), POSITIVE, NEGATIVE, trait="x", held_out=0)


def test_of_layers_that_run_several_times_the_last_pass_counts() -> None:
    model = HookedModel(tiny_model("iquestloopcoder"))
    vector = extract_vectors(model, [[1, 2], [1, 3]], [[1, 4], [1, 5]], trait="x", layers=[0], methods=["mean_diff"])[0]
    means = []
    for rows in ([[1, 2], [1, 3]], [[1, 4], [1, 5]]):
        caches = [model.run_with_cache(row, "blocks.0.hook_resid_post")[1] for row in rows]
        last = max(record.pass_index for record in caches[0].records["blocks.0.hook_resid_post"])
        assert last > 0
        means.append(np.mean([c.of_pass(last).numpy("blocks.0.hook_resid_post")[0, -1] for c in caches], axis=0))
    np.testing.assert_allclose(vector.vector, means[0] - means[1], rtol=1e-3, atol=1e-4)


def test_a_trait_is_measured_in_one_stream() -> None:
    with pytest.raises(
        HookError, match="Positive prompt 0: blocks.0.hook_resid_post is .*: a trait is measured in one"
    ):
        extract_vectors(HookedModel(tiny_model("gemma3n")), POSITIVE, NEGATIVE, trait="x", held_out=0)


# Files


@pytest.fixture(scope="module")
def made(llama: HookedModel) -> TraitVector:
    return extract_vectors(llama, POSITIVE, NEGATIVE, trait="x", layers=[1], methods=["probe"])[0]


def test_a_saved_vector_is_read_back_bit_for_bit(llama: HookedModel, made: TraitVector, tmp_path: Path) -> None:
    path = made.save(tmp_path / "vectors")
    assert path == tmp_path / "vectors" / "probe_layer1.safetensors"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    read = TraitVector.load(path).check(llama)
    assert np.array_equal(read.vector, made.vector)
    assert read.vector.dtype == np.float32
    for name in ("trait", "layer", "method", "threshold", "chat", "metadata", "identity"):
        assert getattr(read, name) == getattr(made, name)
    assert read.norm == made.norm == pytest.approx(np.linalg.norm(made.vector.astype(np.float64)))
    assert read.path == path


def test_a_vector_of_another_model_is_refused(made: TraitVector) -> None:
    assert made.check(HookedModel(make_model("llama"))) is made
    other = HookedModel(make_model("llama", seed=1))
    with pytest.raises(HookError, match=r"^The vector x/probe_layer1 is of another model: its weights differ\.$"):
        made.check(other)
    assert made.check(other, other_model=True) is made
    wide = HookedModel(make_model(CONFIGS["llama"] | {"hidden_size": 48}))
    with pytest.raises(HookError, match="The vector x/probe_layer1 is 32 wide; the stream of llama is 48"):
        made.check(wide, other_model=True)
    shallow = HookedModel(make_model(CONFIGS["llama"] | {"num_hidden_layers": 1}))
    with pytest.raises(HookError, match="The vector x/probe_layer1 is of layer 1; llama has layers 0 to 0"):
        made.check(shallow, other_model=True)


def test_a_damaged_vector_is_refused_in_one_sentence(made: TraitVector, tmp_path: Path) -> None:
    saved = made.save(tmp_path)
    whole, about = saved.read_bytes(), TensorFile(saved).notes["trait_vector"]

    def told(**otherwise: Any) -> bytes:
        notes = {"trait_vector": json.dumps(json.loads(about) | otherwise)}
        other = tmp_path / "other.safetensors"
        other.unlink(missing_ok=True)
        write_arrays(other, {"vector": lambda: made.vector}, notes)
        return other.read_bytes()

    for content, why in (
        (whole[:-4], r"it has \d+ bytes where its header tells of \d+"),
        (whole[:100], "its header is longer than the file"),
        (b"hello", "it is too short to be a safetensors file"),
        (b"", "it is too short to be a safetensors file"),
        (whole.replace(b'\\"format\\"', b'\\"fomrat\\"'), "it lacks 'format'"),
        (whole.replace(b"trait_vector/1", b"trait_vector/9"), "is of the format 'neuroscope.trait_vector/9'"),
        (told(layer=-1), "damaged.safetensors .*: A layer is a whole number from 0 up, got -1."),
        (told(threshold="x"), "damaged.safetensors .*: A threshold is a finite number, got 'x'."),
        (told(chat=3), "damaged.safetensors .*: A chat has use, system, template, got 3."),
        (told(norm=made.norm * 1.01), r"damaged.safetensors .*: its norm is told to be \d.*, and is \d"),
        (told(norm=None), "its norm is told to be None"),
        (
            told(identity=json.loads(about)["identity"] | {"n_layers": math.inf}),
            "damaged.safetensors is no trait vector",
        ),
        (told(metadata=3), "damaged.safetensors is no trait vector"),
    ):
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(content)
        with pytest.raises(HookError, match=why):
            TraitVector.load(path)
    with pytest.raises(HookError, match=r"^There is no file .*missing.safetensors\.$"):
        TraitVector.load(tmp_path / "missing.safetensors")
    (tmp_path / "file").touch()
    with pytest.raises(HookError, match=r"cannot write .*file/probe_layer1.safetensors"):
        made.save(tmp_path / "file")


def test_of_several_vectors_all_are_written_or_none(
    made: TraitVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = ([replace(made, vector=made.vector * size, layer=layer) for layer in range(3)] for size in (1, 2))
    paths = save_vectors(older, tmp_path)
    assert paths == [tmp_path / f"probe_layer{layer}.safetensors" for layer in range(3)]
    before = {path: path.read_bytes() for path in paths}

    def refused(vectors: list[TraitVector], message: str) -> None:
        with pytest.raises(HookError, match=message):
            save_vectors(vectors, tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before

    (tmp_path / "probe_layer9.safetensors").mkdir()
    refused([*newer, replace(made, layer=9)], "cannot write .*probe_layer9.safetensors: it is a folder")
    refused([*newer, newer[1]], "one vector of each method and layer, got several probe_layer1")
    refused(
        [*newer, replace(made, layer=5, metadata={"a": np.float32(1)})],
        "^metadata of probe_layer5 are plain JSON values: .*float32",
    )
    refused(
        [*newer, replace(made, layer=5, metadata={"a": math.nan})], "^metadata of probe_layer5 are plain JSON values"
    )
    n_written = iter(range(9))

    def full(path: Path, *rest: Any) -> None:
        if next(n_written) == 2:
            raise OSError(28, "No space left on device")
        write_arrays(path, *rest)

    monkeypatch.setattr(vectors_module, "write_arrays", full)
    refused(newer, "cannot write .*probe_layer2.safetensors: No space left on device")
    monkeypatch.undo()
    save_vectors(newer, tmp_path)
    assert [TraitVector.load(path).norm for path in paths] == pytest.approx([2 * made.norm] * 3)


def test_a_vector_is_of_plain_values_and_measures_large_ones() -> None:
    with pytest.raises(HookError, match="metadata is a mapping, got 3"):
        TraitVector("x", 0, "given", [1, 2], metadata=3)
    large = TraitVector("x", 0, "given", np.full(128, 3e38))
    values = np.full((2, 128), 5, np.float32)
    np.testing.assert_allclose(large.dot(values), [128 * 5 * 3e38] * 2, rtol=1e-6)
    np.testing.assert_allclose(large.score(values), [5 * np.sqrt(128)] * 2, rtol=1e-6)


# Commands


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    """Two traits of the bundled model, sentences of indirect objects and of capitals against sums, and a broken one."""
    sums = [sample.prompt for sample in sum_samples("train")[:12]]
    objects = [sample.prompt for sample in indirect_object_samples(12)]
    capitals = [sample.prompt for sample in capital_samples("train")[:12]]
    for name, positive, negative in (("object", objects, sums), ("capital", capitals, sums), ("broken", [], sums)):
        folder = tmp_path / "tests" / name / "extraction"
        folder.mkdir(parents=True)
        (folder / "positive.txt").write_text("\n".join(positive))
        (folder / "negative.json").write_text(json.dumps(negative))
    return Experiment(tmp_path, "tests")


def neuroscope(experiment: Experiment, command: str, *options: str) -> int:
    of_all = ["traits", command, "--root", str(experiment.root), "--experiment", experiment.name]
    model = ["--model", "neuroscope-tiny", "--layers", "0,3"] if command == "extract" else []
    return main([*of_all, *model, *options])


def test_extract_writes_vectors_and_one_broken_trait_does_not_stop_the_others(
    experiment: Experiment, tiny: HookedModel, capsys: pytest.CaptureFixture
) -> None:
    assert neuroscope(experiment, "extract", "--all-traits", "--methods", "mean_diff,probe") == 1
    shown = capsys.readouterr()
    assert re.search(r"^neuroscope: broken: .*positive.txt has no prompts: it needs at least one.$", shown.err, re.M)
    assert shown.out.splitlines()[-1] == "2 done, 0 skipped, 1 failed"
    assert "object: 10 positive and 10 negative prompts, 2 and 2 held out; span last" in shown.out
    assert re.search(r"^ +3  probe +100.0% +100.0% +\d+\.\d\d +[\d.]+$", shown.out, re.M)
    trait = experiment.trait("object")
    assert [file.name for file in trait.vectors()] == [f"{m}_layer{i}" for m in ("probe", "mean_diff") for i in (0, 3)]
    texts = trait.prompts("positive"), trait.prompts("negative")
    expected = extract_vectors(tiny, *texts, trait="object", methods=["probe"], layers=[3])[0]
    found = trait.find("probe", 3).check(tiny)
    assert np.array_equal(found.vector, expected.vector)
    assert found.metadata["held_out_accuracy"] == 1
    assert found.metadata["prompts"] == expected.metadata["prompts"]
    assert experiment.trait("broken").vectors() == []


def test_extract_says_of_which_layers_there_is_no_vector(
    experiment: Experiment,
    windowed: tuple,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, *classes = windowed
    trait = experiment.trait("object")
    monkeypatch.setattr(HookedModel, "from_pretrained", lambda name: model)
    monkeypatch.setattr(type(trait), "prompts", lambda self, kind: classes[kind == "negative"])
    monkeypatch.setattr(type(trait), "held_out", lambda self: None)
    options = ["--trait", "object", "--methods", "mean_diff", "--layers", "all"]
    assert neuroscope(experiment, "extract", *options) == 0
    shown = capsys.readouterr().out
    assert "  nothing distinguishes the classes, so there is no vector of layer 0: mean_diff" in shown
    there = {file.layer for file in trait.vectors()}
    assert 0 not in there
    assert model.cfg.n_layers - 1 in there
    # What is there stays, and what cannot be is no failure the second time either.
    assert neuroscope(experiment, "extract", *options, "--skip-existing") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("object: nothing distinguishes the classes, so there is no vector of layer 0: mean_diff")
    assert shown.splitlines()[-1] == "0 done, 1 skipped, 0 failed"
    assert neuroscope(experiment, "extract", *options[:-1], "0") == 1
    assert "Layer 0: Nothing distinguishes the classes: mean_diff finds no direction" in capsys.readouterr().err


def test_vectors_of_other_prompts_are_replaced_when_that_is_said(
    experiment: Experiment, capsys: pytest.CaptureFixture
) -> None:
    options = ["--trait", "object", "--methods", "mean_diff"]
    assert neuroscope(experiment, "extract", *options, "--no-chat") == 0
    files = experiment.trait("object").vectors()
    before = [file.path.read_bytes() for file in files]
    assert TraitVector.load(files[0].path).chat == Chat(use=False)
    # The same again is no change, save for the time.
    assert neuroscope(experiment, "extract", *options, "--no-chat") == 0
    vectors = [TraitVector.load(file.path).vector for file in files]
    assert [content[-512:] for content in before] == [vector.tobytes() for vector in vectors]
    before = [file.path.read_bytes() for file in files]
    capsys.readouterr()
    assert neuroscope(experiment, "extract", *options, "--span", "prompt", "--no-chat") == 1
    shown = capsys.readouterr()
    assert "mean_diff_layer0.safetensors is made of other prompts, or otherwise (its span is last)" in shown.err
    assert "It is replaced only with --overwrite." in shown.err
    assert shown.out.splitlines()[-1] == "0 done, 0 skipped, 1 failed"
    assert [file.path.read_bytes() for file in files] == before
    # What is there is skipped if it is what is asked for, and only then.
    assert neuroscope(experiment, "extract", *options, "--span", "prompt", "--no-chat", "--skip-existing") == 1
    capsys.readouterr()
    assert neuroscope(experiment, "extract", *options, "--no-chat", "--skip-existing") == 0
    assert capsys.readouterr().out.splitlines() == ["object: all vectors are there", "0 done, 1 skipped, 0 failed"]
    assert [file.path.read_bytes() for file in files] == before
    assert neuroscope(experiment, "extract", *options, "--span", "prompt", "--no-chat", "--overwrite") == 0
    assert TraitVector.load(files[0].path).metadata["span"] == "prompt"
    before = [file.path.read_bytes() for file in files]
    capsys.readouterr()
    more = ["--trait", "object", "--methods", "mean_diff,probe", "--span", "prompt", "--no-chat", "--skip-existing"]
    assert neuroscope(experiment, "extract", *more) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert rows == [["0", "probe"], ["3", "probe"]]
    assert [file.path.read_bytes() for file in files] == before


def test_vectors_of_another_model_are_not_replaced_silently(
    experiment: Experiment, llama: HookedModel, made: TraitVector, capsys: pytest.CaptureFixture
) -> None:
    trait = experiment.trait("object")
    path = replace(made, layer=3).save(trait.vectors_folder)
    before = path.read_bytes()
    assert neuroscope(experiment, "extract", "--trait", "object") == 1
    assert "probe_layer3.safetensors is of another model: model_type=llama, n_layers=3" in capsys.readouterr().err
    assert path.read_bytes() == before
    path.write_bytes(before[:50])
    assert neuroscope(experiment, "extract", "--trait", "object", "--skip-existing") == 1
    assert "probe_layer3.safetensors cannot be used (" in capsys.readouterr().err
    assert [file.name for file in trait.vectors()] == ["probe_layer3"]
    assert neuroscope(experiment, "extract", "--trait", "object", "--methods", "probe", "--overwrite") == 0
    assert trait.find(layer=3).trait == "object"


def test_a_traits_own_settings_and_held_out_prompts_are_used(experiment: Experiment, tiny: HookedModel) -> None:
    trait = experiment.trait("object")
    (trait.folder / "trait.json").write_text(json.dumps({"span": "-2:", "system": "Answer."}))
    (trait.folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    for which, text in (("positive", "John gave a book to"), ("negative", "8 + 1 =")):
        (trait.folder / "extraction" / f"held_out_{which}.txt").write_text(text)
    assert neuroscope(experiment, "extract", "--trait", "object", "--methods", "mean_diff") == 0
    vector = experiment.trait("object").find(layer=3)
    assert vector.chat == Chat(None, "Answer.", "{% for m in messages %}{{ m.content }} {% endfor %}")
    about = vector.metadata
    assert (about["span"], about["held_out"], about["n_positive"], about["n_held_out_positive"]) == (
        "-2:",
        "given",
        12,
        1,
    )
    rows = [[render(tiny, text, vector.chat) for text in trait.prompts(which)] for which in ("positive", "negative")]
    assert tiny.to_str_tokens(rows[0][0])[-1] == "to"
    positive, negative = (states(tiny, each, 3, slice(-2, None)) for each in rows)
    np.testing.assert_allclose(vector.vector, positive.mean(0) - negative.mean(0), rtol=1e-3, atol=1e-5)


def test_list_shows_what_there_is_and_what_is_taken(experiment: Experiment, capsys: pytest.CaptureFixture) -> None:
    neuroscope(experiment, "extract", "--trait", "object", "--methods", "mean_diff,ica")
    damaged = experiment.trait("capital").vectors_folder / "ica_layer1.safetensors"
    damaged.parent.mkdir()
    damaged.write_bytes(b"hello")
    capsys.readouterr()
    assert neuroscope(experiment, "list") == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("neuroscope: capital: ")
    assert "ica_layer1.safetensors" in shown.err
    assert len(shown.err.splitlines()) == 1
    lines = shown.out.splitlines()
    assert lines[lines.index("capital (Capital)") + 1] == "  no vectors that can be read"
    assert lines[0] == f"{experiment.folder}: 3 traits"
    assert lines[lines.index("broken (Broken)") + 1] == "  no vectors"
    rows = lines[lines.index("object (Object)") + 2 :]
    assert [row.split()[:2] for row in rows[:4]] == [["0", "mean_diff"], ["3", "mean_diff"], ["0", "ica"], ["3", "ica"]]
    why = "mean_diff: the first of probe, mean_diff, ica, gradient that there is; layer [03]: the best accuracy"
    assert re.match(rf"  mean_diff_layer[03] is taken: {why}", rows[4])
    damaged.unlink()
    assert neuroscope(experiment, "list") == 0
    # One broken file does not hide the others.
    broken = experiment.trait("object").vectors()[1]
    broken.path.write_bytes(b"junk")
    capsys.readouterr()
    assert neuroscope(experiment, "list") == 1
    shown = capsys.readouterr()
    assert re.fullmatch(r"neuroscope: object: .*mean_diff_layer3.safetensors is no trait vector .*\n", shown.err)
    lines = shown.out.splitlines()
    rows = lines[lines.index("object (Object)") + 2 :]
    assert [row.split()[:2] for row in rows[:3]] == [["0", "mean_diff"], ["0", "ica"], ["3", "ica"]]
    assert rows[3].startswith("  mean_diff_layer0 is taken: mean_diff: the first")
    assert rows[3].endswith("the only one (passed over, since it cannot be read: mean_diff_layer3)")
    (experiment.trait("object").folder / "trait.json").write_text('{"layer": 3}')
    assert neuroscope(experiment, "list") == 1
    assert "\n  none is taken: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trait", "none"], "The experiment tests has no trait 'none'. There are: broken, capital, object."),
        (["--trait", "object", "--layers", "0,x"], "--layers is all, or numbers with commas between them, got '0,x'"),
        (["--trait", "object", "--layers", "4"], "Layers of neuroscope-tiny are 0 to 3, got 4"),
        (["--trait", "object", "--methods", "pca"], "methods are some of probe, mean_diff, ica, gradient; got 'pca'"),
        (["--trait", "object", "--span", "all"], "object: A span is last, prompt, response or start:stop, got 'all'"),
        (["--trait", "object", "--held-out", "2"], "object: held_out is a share from 0 to below 1"),
        (["--all-traits", "--experiment", "other"], "There is no experiment 'other'"),
        (["--all-traits", "--experiment", "empty"], "The experiment empty has no traits"),
        (["--all-traits", "--model", "none/such/model"], "There is no"),
    ],
)
def test_what_cannot_be_extracted_is_one_line(
    experiment: Experiment, options: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    (experiment.root / "empty").mkdir()
    assert neuroscope(experiment, "extract", *options) == 1
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(("raised", "status"), [(RuntimeError("no memory"), 1), (KeyboardInterrupt(), 130)])
def test_what_anything_raises_is_told_with_its_trait(
    raised: BaseException,
    status: int,
    experiment: Experiment,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    vectors = Examples.vectors

    def failing(self: Examples, model: HookedModel, trait: str, *rest: Any, **options: Any) -> list[TraitVector]:
        if trait == "capital":
            raise raised
        return vectors(self, model, trait, *rest, **options)

    monkeypatch.setattr(Examples, "vectors", failing)
    assert neuroscope(experiment, "extract", "--all-traits", "--methods", "mean_diff") == status
    shown = capsys.readouterr()
    if status == 1:
        assert "neuroscope: capital: RuntimeError: no memory\n" in shown.err
        assert shown.out.splitlines()[-1] == "1 done, 0 skipped, 2 failed"
    else:
        assert shown.err.splitlines()[-1] == "neuroscope: interrupted; vectors were written of no trait"
        assert neuroscope(experiment, "extract", "--trait", "object", "--trait", "capital", "--layers", "0") == status
        assert capsys.readouterr().err.splitlines()[-1] == "neuroscope: interrupted; vectors were written of object"


def test_an_interrupted_load_is_one_line(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HookedModel, "from_pretrained", interrupted)
    assert neuroscope(experiment, "extract", "--all-traits") == 130
    assert capsys.readouterr().err == "neuroscope: interrupted; vectors were written of no trait\n"


def test_a_trait_may_be_named_several_times(experiment: Experiment, capsys: pytest.CaptureFixture) -> None:
    options = ["--methods", "mean_diff", "--layers", "1"]
    named = [part for name in ("object", "capital", "object") for part in ("--trait", name)]
    assert neuroscope(experiment, "extract", *named, *options) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 done, 0 skipped, 0 failed"
    assert all(experiment.trait(name).vectors() for name in ("object", "capital"))


def test_a_vector_of_ones_own_can_be_captured_of_several_traits(
    experiment: Experiment, tiny: HookedModel, capsys: pytest.CaptureFixture
) -> None:
    for name in ("object", "capital"):
        for method in ("probe", "given"):
            vector = TraitVector(name, 2, method, np.ones(tiny.cfg.d_model))
            vector.save(experiment.trait(name).vectors_folder)
    options = ["--model", "neuroscope-tiny", "--method", "given", "--prompts", "Hello", "--max-tokens", "1"]
    assert neuroscope(experiment, "capture-layers", "--trait", "object", "--trait", "capital", *options) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "2 done, 0 skipped, 0 failed"
    for name in ("object", "capital"):
        found = list((experiment.trait(name).folder / "inference").rglob("prompt_0.safetensors"))
        assert [read_record(path)["metadata"]["method"] for path in found] == ["given"]


def test_a_failed_extraction_leaves_the_vectors_of_before(
    experiment: Experiment, capsys: pytest.CaptureFixture
) -> None:
    trait = experiment.trait("object")
    assert neuroscope(experiment, "extract", "--trait", "object", "--methods", "mean_diff,probe") == 0
    before = {file.path: file.path.read_bytes() for file in trait.vectors()}
    (trait.vectors_folder / "ica_layer3.safetensors").mkdir()
    more = ["--methods", "mean_diff,probe,ica", "--span", "prompt", "--overwrite"]
    assert neuroscope(experiment, "extract", "--trait", "object", *more) == 1
    assert "ica_layer3.safetensors: it is a folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in trait.vectors_folder.iterdir() if path.is_file()} == before


def test_an_unwritable_folder_is_one_line_and_others_are_done(
    experiment: Experiment, capsys: pytest.CaptureFixture
) -> None:
    experiment.trait("capital").vectors_folder.touch()
    assert neuroscope(experiment, "extract", "--all-traits", "--methods", "mean_diff") == 1
    shown = capsys.readouterr()
    assert re.search(r"neuroscope: capital: .*vectors cannot be read: Not a directory", shown.err)
    assert shown.out.splitlines()[-1] == "1 done, 0 skipped, 2 failed"
