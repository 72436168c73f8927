"""Heads from captured rows: put together again, they score as the patterns that they were cut from."""

import json
from typing import Any

import numpy as np
import pytest

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis import heads
from mlx_hooks.analysis.captured_heads import SCORES, analyse_heads, draw_heads
from mlx_hooks.analysis.known_models import KnownInduction
from mlx_hooks.analysis.pictures import png
from mlx_hooks.storage.rows import ArrayRows

KNOWN = KnownInduction()


def said_twice(seed: int, count: int) -> list[int]:
    words = (1 + np.random.default_rng(seed).permutation(KNOWN.vocabulary - 1)[:count]).tolist()
    return [0, *words, *words]


SEQUENCES = [said_twice(0, 8), said_twice(1, 5), [0, 3, 1, 2, 7], said_twice(2, 8)]


@pytest.fixture(scope="module")
def patterns() -> list[list[np.ndarray]]:
    """[layer][sequence] of [head, query, key]."""
    model = HookedModel(KNOWN.model())
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in (0, 1)]
    caches = [model.run_with_cache(tokens, names)[1] for tokens in SEQUENCES]
    return [[cache.numpy(name)[0] for cache in caches] for name in names]


def rows_of(patterns: list[np.ndarray], steps: list[int], order: np.ndarray | None = None, **left: Any) -> ArrayRows:
    """The patterns as captured rows: keys padded, one row per query."""
    widest = max(pattern.shape[-1] for pattern in patterns)
    values = [np.pad(p, [(0, 0), (0, 0), (0, widest - p.shape[-1])]).transpose(1, 0, 2) for p in patterns]
    sizes = [len(value) for value in values]
    labels = {
        "tokens": np.concatenate(SEQUENCES),
        "sequence": np.repeat(np.arange(len(sizes)), sizes),
        "position": np.concatenate([np.arange(size) for size in sizes]),
        "step": np.repeat(steps, sizes),
        "rank": np.zeros(sum(sizes)),
        "session": np.zeros(sum(sizes)),
    } | left
    at = np.arange(sum(sizes)) if order is None else order
    kept = {name: label[at] for name, label in labels.items() if label is not None}
    return ArrayRows(np.concatenate(values)[at], "blocks.1.attn.hook_pattern", ["head", "key"], **kept)


def test_scores_are_those_of_the_patterns(patterns: list[list[np.ndarray]]) -> None:
    for own in patterns:
        found = analyse_heads(rows_of(own, [5] * 4))
        for name, score in [
            ("previous_token", heads.previous_token_scores),
            ("first_token", heads.first_token_scores),
            ("entropy", heads.entropies),
        ]:
            np.testing.assert_allclose(found[name], np.mean([score(p) for p in own], axis=0), rtol=1e-6)
        again = [heads.induction_scores(own[i], SEQUENCES[i]) for i in (0, 1, 3)]
        np.testing.assert_allclose(found["induction"], np.mean(again, axis=0), rtol=1e-6)
        assert (found["step"], found["sequences"], found["with_repetition"]) == (5, 4, 3)
        json.dumps(found, allow_nan=False)
    assert analyse_heads(rows_of(patterns[0], [5] * 4))["previous_token"][KNOWN.previous_head] > 0.99
    assert analyse_heads(rows_of(patterns[1], [5] * 4))["induction"][KNOWN.induction_head] > 0.99


def test_each_step_is_scored_on_its_own(patterns: list[list[np.ndarray]]) -> None:
    found = analyse_heads(rows_of(patterns[1], [200, 200, 0, 400]))
    assert [(step["step"], step["sequences"]) for step in found["by_step"]] == [(0, 1), (200, 2), (400, 1)]
    assert found["by_step"][0]["induction"] is None
    assert found["induction"] == found["by_step"][-1]["induction"]
    np.testing.assert_allclose(
        found["by_step"][1]["induction"],
        np.mean([heads.induction_scores(patterns[1][i], SEQUENCES[i]) for i in (0, 1)], axis=0),
        rtol=1e-6,
    )


def test_rows_of_a_step_may_come_in_any_order_and_in_parts(
    patterns: list[list[np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = analyse_heads(rows_of(patterns[1], [5] * 4))
    n = sum(map(len, SEQUENCES))
    mixed = analyse_heads(rows_of(patterns[1], [5] * 4, np.random.default_rng(0).permutation(n)))
    for name in SCORES:
        np.testing.assert_allclose(mixed[name], plain[name], rtol=1e-6)
    monkeypatch.setattr("mlx_hooks.analysis.captured_heads._BYTES_AT_ONCE", 1000)
    seen: list[tuple[int, int]] = []
    assert analyse_heads(rows_of(patterns[1], [5] * 4), progress=lambda *done: seen.append(done)) == plain
    assert seen[-1] == (n, n)
    assert len(seen) > 5


def test_what_is_not_whole_is_counted_and_left_out(patterns: list[list[np.ndarray]]) -> None:
    n = sum(map(len, SEQUENCES))
    # Without the first sequence's position 4, and with two tokens of the second.
    second = len(SEQUENCES[0])
    kept = np.array([i for i in range(n) if i != 4 and not second + 2 <= i < second + len(SEQUENCES[1])])
    found = analyse_heads(rows_of(patterns[1], [5] * 4, kept))
    assert found["left_out"] == {"short": 1, "incomplete": 1}
    assert found["sequences"] == 2
    few = analyse_heads(rows_of(patterns[1], [5] * 4), {"max_sequences": 1})
    np.testing.assert_allclose(few["induction"], heads.induction_scores(patterns[1][0], SEQUENCES[0]), rtol=1e-6)
    with pytest.raises(HookError, match="No sequence .* is whole and has at least 3 tokens: 0 are shorter, of 4 "):
        analyse_heads(rows_of(patterns[1], [5] * 4, np.flatnonzero(np.arange(n) % 5 != 1)))


def test_what_is_no_pattern_is_refused(patterns: list[list[np.ndarray]]) -> None:
    with pytest.raises(HookError, match="rows of blocks.*hook_pattern with the axes head and key; x has d_model"):
        analyse_heads(ArrayRows(np.ones((3, 4)), "x", ["d_model"]))
    with pytest.raises(HookError, match="go from 0 to 3: shares of attention are 0 to 1"):
        analyse_heads(rows_of([3 * pattern for pattern in patterns[0]], [5] * 4))
    with pytest.raises(HookError, match="came without tokens and positions"):
        analyse_heads(rows_of(patterns[0], [5] * 4, position=None))


def test_entropies_and_first_tokens_of_known_patterns() -> None:
    n = 6
    causal = np.tril(np.ones((n, n)))
    first, own = np.zeros((n, n)), np.eye(n)
    first[:, 0] = 1
    known = np.stack([causal / causal.sum(1, keepdims=True), first, own, (first + own) / 2])
    np.testing.assert_allclose(heads.entropies(known)[:3], [1, 0, 0], atol=1e-12)
    assert heads.entropies(known)[3] == pytest.approx(np.mean(np.log(2) / np.log(np.arange(2, n + 1))))
    np.testing.assert_allclose(heads.first_token_scores(known), [np.mean(1 / np.arange(2, 7)), 1, 0, 0.5])
    assert heads.has_repetition([1, 2, 1])
    assert not heads.has_repetition([1, 2, 2, 3])
    for score in (heads.entropies, heads.first_token_scores):
        with pytest.raises(HookError, match="at least 2 positions"):
            score(np.ones((1, 1, 1)))


def test_the_pictures_are_drawn(patterns: list[list[np.ndarray]]) -> None:
    assert [title for title, _ in draw_heads(analyse_heads(rows_of(patterns[1], [5] * 4)))] == ["Scores of the heads"]
    drawn = draw_heads(analyse_heads(rows_of(patterns[1], [0, 100, 200, 300])))
    assert [title for title, _ in drawn] == ["Scores of the heads", "Scores step by step"]
    assert all(png(figure).startswith(b"\x89PNG") for _, figure in drawn)
