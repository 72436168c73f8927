"""Logit lens and head scores: against the model's own output and patterns whose answer is known."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import CONFIGS, make_model

from mlx_hooks import HookedModel, HookError, LogitLens
from mlx_hooks.analysis import heads

TOKENS = [1, 5, 9, 3, 7]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_lens_on_the_last_layer_is_the_models_own_output(name: str) -> None:
    model = HookedModel(make_model(name))
    lens = LogitLens.from_model(model)
    for position in (-1, 2):
        rows = lens.predictions(TOKENS, position=position, top_k=60)
        assert [row.layer for row in rows] == [0, 1, 2]
        probabilities = mx.softmax(model(TOKENS)[0, position])
        own = {p.token_id: p.probability for p in rows[-1].predictions}
        # One row through the unembedding instead of five: float32 rounding.
        np.testing.assert_allclose([own[i] for i in range(60)], np.array(probabilities), rtol=1e-4, atol=1e-6)
        assert [p.probability for p in rows[0].predictions] == sorted(p.probability for p in rows[0].predictions)[::-1]


def test_the_lens_on_a_middle_layer_is_its_residual_through_norm_and_unembedding() -> None:
    model = HookedModel(make_model("llama_untied"))
    rows = LogitLens(model).predictions(TOKENS, top_k=3)
    _, cache = model.run_with_cache(TOKENS)
    x = cache.numpy(("resid_post", 1))[0, -1].astype(np.float64)
    inner = model.model
    x = x / np.sqrt((x**2).mean() + 1e-5) * np.array(inner.model.norm.weight)
    logits = np.array(inner.lm_head.weight) @ x
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert [p.token_id for p in rows[1].predictions] == list(np.argsort(-expected)[:3])
    np.testing.assert_allclose([p.probability for p in rows[1].predictions], np.sort(expected)[::-1][:3], rtol=1e-4)


def test_the_lens_refuses_a_position_outside_the_prompt() -> None:
    with pytest.raises(HookError, match="outside the 5 tokens"):
        LogitLens(HookedModel(make_model("llama"))).predictions(TOKENS, position=5)


def test_the_bundled_model_knows_the_answer_at_its_last_layer(tiny: HookedModel) -> None:
    rows = LogitLens(tiny).predictions("The capital of France is", top_k=1)
    assert rows[-1].predictions[0].token.strip() == "Paris"
    assert rows[0].predictions[0].probability < rows[-1].predictions[0].probability


def test_the_lens_takes_one_row_and_at_least_one_prediction() -> None:
    lens = LogitLens(HookedModel(make_model("llama")))
    with pytest.raises(HookError, match="one row of tokens and a top_k from 1, got 2 and 5"):
        lens.predictions([TOKENS, TOKENS])
    with pytest.raises(HookError, match="got 1 and 0"):
        lens.predictions(TOKENS, top_k=0)
    assert len(lens.predictions(TOKENS, top_k=1000)[0].predictions) == 60


def one_hot_pattern(targets: list[int]) -> np.ndarray:
    """A head [1, query, key] that looks from each position at exactly one other."""
    pattern = np.zeros((1, len(targets), len(targets)))
    pattern[0, np.arange(len(targets)), targets] = 1
    return pattern


def test_a_perfect_previous_token_head_scores_one() -> None:
    assert heads.previous_token_scores(one_hot_pattern([0, 0, 1, 2, 3])) == [1.0]
    # Resting on the first token does not count, although it is the one before at position 1.
    assert heads.previous_token_scores(one_hot_pattern([0, 0, 0, 0, 0])) == [0.0]
    half = 0.5 * one_hot_pattern([0, 0, 1, 2, 3]) + 0.5 * one_hot_pattern([0, 0, 0, 0, 0])
    assert heads.previous_token_scores(half) == [0.5]


def test_a_perfect_induction_head_scores_one() -> None:
    tokens = [7, 8, 9, 7, 8, 9]
    assert heads.induction_scores(one_hot_pattern([0, 0, 0, 1, 2, 3]), tokens) == [1.0]
    # The same token's earlier occurrence is a duplicate-token head's target, not an induction head's.
    assert heads.induction_scores(one_hot_pattern([0, 0, 0, 0, 1, 2]), tokens) == [0.0]
    # First occurrences do not count, wherever they look.
    assert heads.induction_scores(one_hot_pattern([0, 1, 2, 1, 2, 2]), tokens) == [pytest.approx(2 / 3)]


def test_attention_to_what_followed_all_earlier_occurrences_adds_up() -> None:
    pattern = 0.5 * one_hot_pattern([0, 0, 1, 1, 1]) + 0.5 * one_hot_pattern([0, 0, 1, 1, 3])
    assert heads.induction_scores(pattern, [4, 5, 4, 6, 4]) == [pytest.approx((1 + 1) / 2)]


def test_a_token_that_repeats_at_once_does_not_count_attention_to_itself() -> None:
    with pytest.raises(HookError, match="No token occurs twice with something between"):
        heads.induction_scores(one_hot_pattern([0, 1, 2]), [1, 2, 2])


def test_heads_are_ranked_over_layers() -> None:
    ranked = heads.ranked({0: np.array([0.2, 0.9]), 1: np.array([0.5, 0.9])})
    assert [str(row) for row in ranked] == ["L0H1 0.90", "L1H1 0.90", "L1H0 0.50", "L0H0 0.20"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heads.previous_token_scores(np.ones((2, 3, 4))), "as many queries as keys"),
        (lambda: heads.previous_token_scores(np.ones((1, 2, 2))), "at least 3 positions, got 2"),
        (lambda: heads.induction_scores(np.ones((1, 3, 3)), [1, 2]), "3 positions needs as many tokens"),
        (lambda: heads.induction_scores(np.ones((1, 3, 3)), [1, 2, 3]), "needs a repetition"),
    ],
)
def test_what_cannot_be_scored_is_an_error(call: object, message: str) -> None:
    with pytest.raises(HookError, match=message):
        call()
