"""What heads attend to in a prompt, and by which rule: as the construction says, and as plain loops compute it."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from every_architecture import IS_OLDER, OLDER, needs_block_sparse
from tiny_models import CONFIGS, make_model

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis import heads
from mlx_hooks.analysis.attention_analysis import (
    CLASSES,
    AttentionAnalysis,
    analyse_attention,
    draw_attention,
    draw_patterns,
)
from mlx_hooks.analysis.head_detection import HeadDetection, detect_heads
from mlx_hooks.analysis.intervals import Estimate, means
from mlx_hooks.analysis.known_models import KNOWN_MODELS, KnownInduction
from mlx_hooks.analysis.pictures import png
from mlx_hooks.coverage.models import tiny_model

KNOWN = KnownInduction()
WORDS = [3, 9, 5, 12, 7, 2]
TWICE = [0, *WORDS, *WORDS]
REPEATS = [7, 3, 9, 3, 3, 9, 21, 7, 3, 9, 40, 3]


@pytest.fixture(scope="module")
def known() -> HookedModel:
    return HookedModel(KNOWN.model())


@pytest.fixture(scope="module")
def tiny() -> HookedModel:
    return HookedModel.from_pretrained("neuroscope-tiny")


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return HookedModel(make_model("llama"))


def keys_that_count(rule: str, ids: list[int], query: int) -> set[int]:
    """By the rule's words, one query after the other."""
    if rule == "previous_token":
        return {query - 1} if query >= 2 else set()
    if rule == "first_token":
        return {0} if query else set()
    if rule == "current_token":
        return {query} if query else set()
    earlier = {key for key in range(query) if ids[key] == ids[query]}
    return earlier if rule == "duplicate_token" else {key + 1 for key in earlier if key + 1 < query}


def by_hand(pattern: np.ndarray, ids: list[int], rule: str, window: int = 10**6) -> np.ndarray | None:
    """[head], None where no query can follow the rule."""
    rows = []
    for query in range(len(ids)):
        keys = [key for key in keys_that_count(rule, ids, query) if query - key < window]
        if keys:
            rows.append(pattern[:, query, keys].sum(axis=1))
    return np.mean(rows, axis=0) if rows else None


@pytest.mark.parametrize("rule", heads.DETECTORS)
def test_scores_are_the_attention_to_the_keys_of_the_rule(rule: str) -> None:
    generator = np.random.default_rng(0)
    scores = np.where(np.tril(np.ones((12, 12), bool)), generator.normal(size=(3, 12, 12)), -np.inf)
    pattern = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    found = heads.DETECTORS[rule].scores(pattern, REPEATS)
    np.testing.assert_allclose(found, by_hand(pattern, REPEATS, rule), rtol=1e-12)
    named = {"previous_token": heads.previous_token_scores, "first_token": heads.first_token_scores}
    if rule in named:
        np.testing.assert_array_equal(named[rule](pattern), found)
    if rule == "duplicate_token":
        np.testing.assert_array_equal(heads.duplicate_token_scores(pattern, REPEATS), found)


def test_a_score_that_cannot_be_told_says_what_it_needs() -> None:
    for call, message in [
        (lambda: heads.duplicate_token_scores(np.ones((1, 3, 3)), [1, 2, 3]), "No token occurs twice"),
        (lambda: heads.duplicate_token_scores(np.ones((1, 3, 3)), [1, 2]), "needs as many tokens"),
        (lambda: heads.DETECTORS["current_token"].scores(np.ones((1, 1, 1)), [1]), "at least 2 positions"),
    ]:
        with pytest.raises(HookError, match=message):
            call()


# ---- One prompt ------------------------------------------------------------------------------


def test_the_known_heads_have_their_classes(known: HookedModel) -> None:
    found = analyse_attention(known, TWICE)
    previous, induction = found[f"L0H{KNOWN.previous_head}"], found[f"L1H{KNOWN.induction_head}"]
    assert (previous.pattern_type, induction.pattern_type) == ("previous_token", "induction")
    assert previous.confidence == pytest.approx(1, abs=1e-3)
    assert induction.confidence == pytest.approx(1, abs=1e-3)
    others = [head for head in found.heads if head not in (previous, induction)]
    assert {head.pattern_type for head in others} == {"broad"}
    assert {round(head.entropy or 0, 6) for head in others} == {1}
    assert found.of_type("induction") == [induction]
    # Position 7 holds the first word again: what followed it stands at 2.
    assert (induction.edges[0].query - 5, induction.edges[0].key) == (2, 2)
    assert all(edge.query - edge.key == 5 for edge in induction.edges)
    assert [one["edge"] for one in found.dependencies] == ["L0H1->L1H0<k>"]
    # In the middle of the prompt nothing is said twice: the head rests.
    rests = analyse_attention(known, TWICE[:7])
    assert rests["L1H0"].pattern_type == "first_token"
    assert rests["L1H0"].scores["induction"] is None
    assert "No token occurs twice" in rests.not_told["induction"]


def test_the_pattern_that_is_scored_is_the_kernels(llama: HookedModel) -> None:
    found = analyse_attention(llama, REPEATS, options={"dependencies": 0})
    _, cache = llama.run_with_cache(REPEATS, "blocks.*.attn.hook_pattern")
    for layer in range(3):
        pattern = cache.numpy(f"blocks.{layer}.attn.hook_pattern")[0].astype(np.float64)
        np.testing.assert_array_equal(found.patterns[layer], pattern)
        for rule in heads.DETECTORS:
            own = [found[f"L{layer}H{head}"].scores[rule] for head in range(4)]
            np.testing.assert_allclose(own, by_hand(pattern, REPEATS, rule), rtol=1e-6)
        entropy = [found[f"L{layer}H{head}"].entropy for head in range(4)]
        np.testing.assert_allclose(entropy, heads.entropies(pattern), rtol=1e-6)
        for head in range(4):
            one = found[f"L{layer}H{head}"]
            near = [pattern[head, q, q - 4 : q + 1].sum() for q in range(5, 12)]
            assert one.local == pytest.approx(np.mean(near))
            got = [pattern[head, key + 1 :, key].mean() if key < 11 else np.nan for key in range(12)]
            np.testing.assert_allclose(one.received, got)
        mean = pattern.mean(axis=0)
        np.testing.assert_allclose(found.flow[layer].own, np.diag(mean))
        np.testing.assert_allclose(found.flow[layer].given + found.flow[layer].own, 1, atol=1e-6)
    assert "dependencies" in found.not_told


def test_edges_weigh_attention_by_what_the_value_adds(llama: HookedModel) -> None:
    """Against the weights: four heads read two key-value heads, each through its rows of the output projection."""
    found = analyse_attention(llama, REPEATS, options={"top_k": 100})
    _, cache = llama.run_with_cache(REPEATS, ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_v"])
    pattern, v = (cache.numpy(f"blocks.1.attn.hook_{name}")[0] for name in ("pattern", "v"))
    out = np.array(llama.model.model.layers[1].self_attn.o_proj.weight).T.reshape(4, 8, 32)
    for head in range(4):
        size = pattern[head] * np.linalg.norm(v[:, head // 2] @ out[head], axis=-1)[None]
        edges = found[f"L1H{head}"].edges
        expected = {(q, k) for q in range(1, 12) for k in range(q + 1)}
        assert {(edge.query, edge.key) for edge in edges} == expected
        sizes = [size[edge.query, edge.key] for edge in edges]
        np.testing.assert_array_equal(np.argsort(-np.array(sizes), kind="stable"), range(len(sizes)))
        for edge in edges:
            assert edge.attention == pytest.approx(pattern[head, edge.query, edge.key], rel=1e-5)
            assert edge.share == pytest.approx(size[edge.query, edge.key] / size[edge.query].sum(), rel=1e-4)
    assert all(len(head.edges) == 2 for head in analyse_attention(llama, REPEATS, options={"top_k": 2}).heads)


def test_rollout_multiplies_the_layers(llama: HookedModel) -> None:
    found = analyse_attention(llama, REPEATS)
    expected = np.eye(12)
    for layer in range(3):
        expected = (found.patterns[layer].mean(axis=0) / 2 + np.eye(12) / 2) @ expected
    np.testing.assert_allclose(found.rollout, expected, rtol=1e-6)
    assert found.to_dict()["rollout"]["sources"] == pytest.approx(expected[-1].tolist())


def test_a_window_hides_what_lies_outside_of_it() -> None:
    model = HookedModel(tiny_model("gpt_oss"))
    window = model.model.args.sliding_window
    ids = [*range(1, 1 + window - 2), *range(1, 1 + window - 2), *range(1, 1 + window + 3)]
    found = analyse_attention(model, ids)
    _, cache = model.run_with_cache(ids, ["blocks.*.attn.hook_pattern", "blocks.*.attn.hook_sink"])
    for layer, width in ((0, window), (1, 10**6)):
        pattern, sink = (cache.numpy(f"blocks.{layer}.attn.hook_{name}")[0] for name in ("pattern", "sink"))
        for head in range(len(pattern)):
            one = found[f"L{layer}H{head}"]
            for rule in heads.DETECTORS:
                own = by_hand(pattern, ids, rule, width)
                assert own is not None
                assert one.scores[rule] == pytest.approx(own[head], rel=1e-4)
            assert one.sink == pytest.approx(sink[head].mean(), rel=1e-5)
            assert one.entropy is not None
            assert 0 <= one.entropy <= 1
    far = analyse_attention(model, [*range(1, window + 3), 1, 2])
    assert far["L0H0"].scores["induction"] is None
    assert far["L1H0"].scores["induction"] is not None
    assert far.not_told["induction of layer 0"] == "its window hides every key that counts"


def test_what_cannot_be_told_is_left_out_with_its_reason() -> None:
    mixed = analyse_attention(HookedModel(tiny_model("qwen3_next")), REPEATS)
    assert mixed.left_out == {0: "it has no attention", 2: "it has no attention"}
    assert {head.layer for head in mixed.heads} == {1, 3}
    assert mixed.not_told["share of layer 1"] == "between its heads and the output projection lies a gate"
    assert all(edge.share is None for edge in mixed["L1H0"].edges)
    assert mixed.not_told["dependencies"].startswith("Composition cannot be told on qwen3_next")
    one = analyse_attention(HookedModel(make_model("gpt2")), [5])
    assert {head.pattern_type for head in one.heads} == {"mixed"}
    assert one.heads[0].entropy is None
    assert set(one.not_told) >= {*heads.DETECTORS, "local"}
    json.dumps(one.to_dict(), allow_nan=False)


@needs_block_sparse
@pytest.mark.skipif(IS_OLDER, reason=OLDER)
def test_queries_that_see_later_keys_are_told() -> None:
    found = analyse_attention(HookedModel(tiny_model("phi3small")), [5, 9, 7, 3, 8, 2])
    assert np.triu(found.patterns[0].mean(axis=0), k=1).max() > 0
    (note,) = found.to_dict()["notes"]
    assert note.startswith("Queries see later keys too in layers 0: ")


def test_progress_is_told_by_layers_and_by_pairs_of_them(llama: HookedModel) -> None:
    told: list[tuple[int, int]] = []
    found = analyse_attention(llama, REPEATS, progress=lambda *at: told.append(at))
    assert told == [(i, 6) for i in range(1, 7)]
    assert found.notes == ()
    told.clear()
    analyse_attention(llama, REPEATS, options={"dependencies": 0}, progress=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_the_reply_is_plain_and_says_how_it_was_computed(tiny: HookedModel) -> None:
    prompt = "When Mary and John went to the store , John gave a drink to"
    told = analyse_attention(tiny, prompt, [0, -1]).to_dict()
    json.dumps(told, allow_nan=False)
    assert told["analyzed_layers"] == [0, 3]
    assert len(told["attention_heads"]) == 8
    assert sum(told["pattern_statistics"].values()) == 8
    assert set(told["how_computed"]["classes"]) == set(CLASSES) == set(told["pattern_statistics"])
    for head in told["attention_heads"]:
        assert len(head["key_tokens"]) == 3
        assert all(told["tokens"][edge["key"]] == edge["key_token"] for edge in head["edges"])
    assert [one["source_layer"] for one in told["cross_layer_dependencies"]] == [0]
    assert told["token_flow"][0]["received"][-1] is None
    strict = analyse_attention(tiny, prompt, options={"threshold": 1.0, "broad": 1.0})
    assert {head.pattern_type for head in strict.heads} == {"mixed"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: analyse_attention(m, [[1, 2], [3, 4]]), "one prompt, got 2"),
        (lambda m: analyse_attention(m, [1, 2, 3], options={"max_tokens": 2}), "has 3 tokens; at most 2 are analysed"),
        (lambda m: analyse_attention(m, [1, 2], [7]), "Layers are 0 to 2, got 7"),
        (lambda m: analyse_attention(m, [1, 2], options={"threshold": 2}), "threshold must be less than or equal"),
        (lambda m: analyse_attention(m, [1, 2])["L9H9"], "There is no head 'L9H9' here: the layers are 0, 1, 2"),
        (lambda m: analyse_attention(m, [1, 2]).of_type("x"), "There is no class 'x': there are sink, broad"),
        (lambda m: analyse_attention(HookedModel(tiny_model("mamba")), [1, 2]), "has no attention to analyse there"),
        (lambda m: detect_heads(m, []), "There are no prompts"),
        (lambda m: detect_heads(m, "abc"), "got one text"),
        (lambda m: detect_heads(m, 5), "Prompts are a list of texts or of rows of ids, got 5"),
        (lambda m: detect_heads(m, [[[1, 2], [3, 4]]]), "Prompt 0 has 2 rows"),
        (lambda m: detect_heads(m, [[1], [1] * 513]), "Prompt 1 has 513 tokens; at most 512 are read"),
        (lambda m: detect_heads(m, [[1, 2, 3]]).best("induction"), "There are no induction scores: No token occurs"),
        (lambda m: detect_heads(m, [[1, 2, 3]]).ranked("x"), "There is no rule 'x': there are previous_token"),
    ],
    ids=[
        "rows",
        "long",
        "layer",
        "option",
        "head",
        "class",
        "mamba",
        "none",
        "text",
        "number",
        "batch",
        "long prompt",
        "untold",
        "rule",
    ],
)
def test_what_cannot_be_analysed_is_told(llama: HookedModel, call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        call(llama)


def test_the_pictures_of_a_prompt_are_drawn(tiny: HookedModel) -> None:
    found: AttentionAnalysis = analyse_attention(tiny, "Mary had 3 $ and Mary had 4 $")
    drawn = [*draw_attention(found), *draw_patterns(found, ["L1H1"])]
    assert [title.partition(":")[0] for title, _ in drawn] == [
        "Classes of the heads",
        "What each token receives",
        "What each token gives",
        "L1H1",
    ]
    assert all(png(figure, dpi=50).startswith(b"\x89PNG") for _, figure in drawn)
    with pytest.raises(HookError, match="no head 'L0H9'"):
        draw_patterns(found, ["L0H9"])


# ---- Many sequences --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detected(known: HookedModel) -> HeadDetection:
    return detect_heads(known)


def test_the_known_heads_are_detected(detected: HeadDetection) -> None:
    assert detected.best("previous_token").score > 0.99
    assert detected.best("induction").score > 0.99
    assert (detected.best("previous_token").layer, detected.best("previous_token").head) == (0, KNOWN.previous_head)
    assert (detected.best("induction").layer, detected.best("induction").head) == (1, KNOWN.induction_head)
    for rule in ("previous_token", "induction"):
        assert detected.ranked(rule)[1].score == pytest.approx(detected.chance[rule], abs=1e-3)
    assert [str(one) for one in detected.ranked("copying")] == ["L1H0 1.00"]
    json.dumps(detected.to_dict(), allow_nan=False)
    assert set(detected.to_dict()["how_computed"]) == {*heads.DETECTORS, "copying"}


def test_heads_whose_weights_are_shuffled_are_not_detected(known: HookedModel) -> None:
    """The control: the same numbers in the wrong places find nothing."""
    raw = KNOWN.model()
    for block in raw.transformer.h:
        weight = block.attn.c_attn.weight
        order = np.random.default_rng(0).permutation(weight.shape[0])
        block.attn.c_attn.weight = weight[mx.array(order)]
    shuffled = detect_heads(HookedModel(raw), options={"sequences": 6})
    assert shuffled.best("previous_token").score < 0.5
    assert shuffled.best("induction").score < 0.5


def test_a_duplicate_token_head_is_detected_on_the_tokens_that_it_knows() -> None:
    """Of random tokens it knows the names alone."""
    known = KNOWN_MODELS["ioi"]()
    model = known.hooked()
    assert str(detect_heads(model).best("duplicate_token")).startswith("L0H1 ")
    names = list(known.names)
    found = detect_heads(model, [[0, *names, *names[::-1]], [0, *names, *names]])
    assert found.best("duplicate_token").score > 0.99
    assert found.ranked("duplicate_token")[1].score < 0.2


def test_the_bundled_models_heads_are_those_of_its_card(tiny: HookedModel) -> None:
    found = detect_heads(tiny)
    best = {rule: (found.best(rule).layer, found.best(rule).head) for rule in ("induction", "previous_token")}
    assert best == {"induction": (2, 1), "previous_token": (1, 1)}
    assert found.best("induction").score > 0.8
    # The heads that bring the name back copy it.
    assert found.scores["copying"][found.heads.index((2, 1))].mean == pytest.approx(0.985, abs=0.01)
    estimate = found.scores["induction"][found.heads.index((2, 1))]
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < estimate.mean < estimate.high
    assert estimate.n == found.sequences == 16


def test_detection_is_the_mean_over_sequences(llama: HookedModel) -> None:
    prompts = [REPEATS, REPEATS[::-1], [1, 2, 3, 4], [5, 6, 5, 6, 5]]
    seen: list[tuple[int, int]] = []
    options = {"layers": [2], "copying": False}
    found = detect_heads(llama, prompts, options, lambda *done: seen.append(done))
    # Others have a turn between the bootstraps, too.
    assert list(dict.fromkeys(seen)) == [(2, 4), (3, 4), (4, 4)]
    assert found.heads == ((2, 0), (2, 1), (2, 2), (2, 3))
    for rule in heads.DETECTORS:
        own = []
        for ids in prompts:
            pattern = llama.run_with_cache(ids, "blocks.2.attn.hook_pattern")[1].numpy("blocks.2.attn.hook_pattern")
            own.append(by_hand(pattern[0], ids, rule))
        told = [row for row in own if row is not None]
        assert [one.n for one in found.scores[rule]] == [len(told)] * 4
        np.testing.assert_allclose([one.mean for one in found.scores[rule]], np.mean(told, axis=0), rtol=1e-5)
    assert found.warnings == ["Confidence intervals need at least 5 sequences, got 4."]
    assert "copying" not in found.scores


def test_intervals_of_detection_are_those_that_are_asked_for(llama: HookedModel) -> None:
    rng = np.random.default_rng(4)
    prompts = [rng.integers(1, 60, 9).tolist() * 2 for _ in range(24)]
    rule = "previous_token"

    def told(**options: Any) -> list[Estimate]:
        return detect_heads(llama, prompts, {"layers": [1], "copying": False, **options}).scores[rule]

    patterns = [llama.run_with_cache(ids, "blocks.1.attn.hook_pattern")[1] for ids in prompts]
    own = [
        by_hand(one.numpy("blocks.1.attn.hook_pattern")[0], ids, rule)
        for one, ids in zip(patterns, prompts, strict=True)
    ]
    for options in ({}, {"confidence": 0.5}, {"resamples": 150}, {"seed": 3}):
        expected = means(np.array(own), **options)
        for one, other in zip(told(**options), expected, strict=True):
            np.testing.assert_allclose([one.mean, one.low, one.high], [other.mean, other.low, other.high], rtol=1e-5)
    assert told(seed=3) != told()


def test_all_prompts_are_read_and_of_what_never_ends_some(llama: HookedModel) -> None:
    options = {"layers": [0], "copying": False, "sequences": 2}
    assert detect_heads(llama, [[1, 2, 1]] * 70, options).sequences == 70
    assert detect_heads(llama, itertools.repeat([1, 2, 1]), options).sequences == 64


def test_random_tokens_are_said_twice_after_one_that_does_not_come_again(tiny: HookedModel, known: HookedModel) -> None:
    from mlx_hooks.analysis import head_detection

    for model, length in ((tiny, 25), (known, 15)):
        rows = head_detection._random(model, head_detection.DetectionOptions(sequences=3))
        special = set(model.tokenizer.all_special_ids) if model.tokenizer else set()
        for row in rows:
            first, words = row[0], row[1 : 1 + length]
            assert row == [first, *words, *words]
            assert len({first, *words}) == length + 1
            assert not special & set(words)
            assert model.tokenizer is None or first == model.tokenizer.bos_token_id
        assert rows[0] != rows[1]
    found = detect_heads(known, options={"sequences": 5, "copying": False})
    assert (found.length, found.to_dict()["length"]) == (15, 15)
    assert found.warnings == ["The model has room for 15 tokens said twice, not for 25."]
    assert detect_heads(tiny, options={"sequences": 5, "layers": [0], "copying": False}).warnings == []
    assert detect_heads(tiny, ["Mary gave"], {"layers": [0], "copying": False}).length is None
    with pytest.raises(HookError, match="need at least 2 different tokens and 5 positions"):
        detect_heads(HookedModel(make_model(CONFIGS["llama"] | {"max_position_embeddings": 4})))
