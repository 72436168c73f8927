"""Metrics of circuits against NumPy in float64."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.circuits.metrics import METRICS, Metric, metric_of
from mlx_hooks.analysis.eval_data import EvalBatch, EvalData, eval_data_of

PROMPTS = [
    {"clean": [1, 2, 3], "corrupted": [1, 2, 4], "answer": 5, "wrong": 6},
    {"clean": [3, 2, 1], "corrupted": [3, 2, 4], "answer": 7, "wrong": 0},
]


@pytest.fixture(scope="module")
def answers(llama: HookedModel) -> EvalData:
    return eval_data_of(llama, PROMPTS)


@pytest.fixture(scope="module")
def texts(llama: HookedModel) -> EvalData:
    return eval_data_of(llama, [[1, 2, 3, 4], [5, 6, 7, 8]])


def batch_of(data: EvalData) -> EvalBatch:
    return next(iter(data.batches(8)))


def logits_like(batch: EvalBatch, seed: int = 0, copies: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(copies * len(batch.tokens), batch.tokens.shape[1], 60))


def oracle(name: str, logits: np.ndarray, batch: EvalBatch, plain: np.ndarray) -> list[float]:
    found = []
    for row, (values, own) in enumerate(zip(logits, plain, strict=True)):
        logs, before = (each - np.log(np.exp(each).sum(-1, keepdims=True)) for each in (values, own))
        asked = [p for p, target in enumerate(batch.targets[row]) if target >= 0]
        here = [logs[p, batch.targets[row, p]] for p in asked]
        of = {
            "logit_difference": lambda r=row, v=values: v[-1, batch.targets[r, -1]] - v[-1, batch.wrong[r]],
            "logit": lambda r=row, v=values, a=asked: np.mean([v[p, batch.targets[r, p]] for p in a]),
            "probability": lambda h=here: np.mean(np.exp(h)),
            "log_probability": lambda h=here: np.mean(h),
            "loss": lambda h=here: -np.mean(h),
            "kl": lambda a=asked, q=logs, p=before: np.mean([(np.exp(p[i]) * (p[i] - q[i])).sum() for i in a]),
        }
        found.append(float(of[name]()))
    return found


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_what_they_say(name: str, answers: EvalData, texts: EvalData) -> None:
    for data in [answers] if name == "logit_difference" else [answers, texts]:
        batch = batch_of(data)
        logits, plain = logits_like(batch), logits_like(batch, seed=1)
        found = metric_of(name, data).numbers(mx.array(logits), batch, mx.array(plain))
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, oracle(name, logits, batch, plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", METRICS)
def test_copies_of_a_batch_are_measured_one_by_one(name: str, answers: EvalData) -> None:
    batch, metric = batch_of(answers), metric_of(name, answers)
    logits, plain = mx.array(logits_like(batch, copies=3)), mx.array(logits_like(batch, seed=1))
    alone = [metric(logits[i : i + 2], batch, plain) for i in (0, 2, 4)]
    np.testing.assert_array_equal(np.array(metric(logits, batch, plain)), np.array(mx.concatenate(alone)))


@pytest.mark.parametrize("name", METRICS)
def test_gradients_are_those_of_finite_differences(name: str, answers: EvalData) -> None:
    batch, metric = batch_of(answers), metric_of(name, answers)
    logits, plain = logits_like(batch), logits_like(batch, seed=1)
    along = logits_like(batch, seed=2)
    gradient = mx.grad(lambda x: metric(x, batch, mx.array(plain)).sum())(mx.array(logits))
    ends = [sum(oracle(name, logits + step * along, batch, plain)) for step in (1e-5, -1e-5)]
    assert float((np.array(gradient) * along).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-5)


def test_the_default_follows_the_data(answers: EvalData, texts: EvalData) -> None:
    assert metric_of(None, answers).name == "logit_difference"
    assert metric_of(None, texts).name == "log_probability"
    assert metric_of(Metric("kl"), texts) == Metric("kl")
    assert [Metric(name).needs_plain for name in METRICS] == [False, False, False, False, False, True]


def test_the_divergence_from_itself_is_0_and_a_token_that_is_ruled_out_adds_nothing(answers: EvalData) -> None:
    batch, metric = batch_of(answers), metric_of("kl", answers)
    logits = logits_like(batch)
    logits[:, :, 3] = -np.inf
    found = metric.numbers(mx.array(logits), batch, mx.array(logits))
    np.testing.assert_allclose(found, 0, atol=1e-6)


def test_functions_are_metrics_and_see_copies_as_a_longer_batch(answers: EvalData) -> None:
    def top(logits: mx.array, batch: EvalBatch) -> mx.array:
        assert len(batch.indices) == len(batch.tokens) == logits.shape[0]
        return logits[:, -1].max(axis=-1)

    batch, metric = batch_of(answers), metric_of(top, answers)
    logits = mx.array(logits_like(batch, copies=2)).astype(mx.bfloat16)
    assert (metric.name, metric.description) == ("top", "the function top")
    assert not metric.needs_plain
    assert metric(logits, batch).dtype == mx.float32
    np.testing.assert_array_equal(metric.numbers(logits, batch), np.array(logits.astype(mx.float32))[:, -1].max(-1))
    assert metric_of(partial(top), answers).name == "partial"
    assert batch.repeated(2).indices.tolist() == [0, 1, 0, 1]
    assert batch.repeated(1) is batch


def test_what_is_no_metric_is_refused(answers: EvalData, texts: EvalData) -> None:
    batch = batch_of(answers)
    logits = mx.array(logits_like(batch))
    with pytest.raises(HookError, match="metric is a function or one of logit_difference, .* got 'accuracy'"):
        metric_of("accuracy", answers)
    with pytest.raises(HookError, match="metric is a function or one of .* got int"):
        metric_of(3, answers)  # type: ignore[arg-type]
    for given in (Metric("logit_difference"), "logit_difference"):
        with pytest.raises(HookError, match="A logit difference needs wrong answers"):
            metric_of(given, texts)
    with pytest.raises(HookError, match="kl compares with the clean run"):
        metric_of("kl", answers)(logits, batch)
    with pytest.raises(HookError, match=r"a number per row, \[2\]; got shape \(2, 3\)"):
        metric_of(lambda logits, batch: logits[..., 0], answers)(logits, batch)
    with pytest.raises(HookError, match=r"a number per row, \[2\]; got float"):
        metric_of(lambda logits, batch: 1.0, answers)(logits, batch)  # type: ignore[arg-type,return-value]
    with pytest.raises(HookError, match="A batch of 2 examples has logits of as many rows or copies, got 3"):
        metric_of("loss", answers)(mx.concatenate([logits, logits[:1]]), batch)
    with pytest.raises(HookError, match="loss is not finite"):
        metric_of("loss", answers).numbers(logits * mx.inf, batch)
