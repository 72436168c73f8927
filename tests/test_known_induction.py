"""Ground truth: on a model whose weights were set by hand, what is found is what the construction says."""

import numpy as np
import pytest

from mlx_hooks import (
    AttentionExtractionHook,
    HookedModel,
    LogitLens,
    attribution_points,
    direct_logit_attribution,
)
from mlx_hooks.analysis import heads
from mlx_hooks.analysis.known_models.induction import FINAL, START, UNEMBED, KnownInduction

KNOWN = KnownInduction()
OUTPUT = KNOWN.read("output").T
SHAPES = [KNOWN, KnownInduction(vocabulary=40, length=24, n_heads=4, previous_head=3, induction_head=2)]
LOOKS_BACK, FINDS = "blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"
# A score of 24, as float32 has it, is off by up to 1e-6, and so is a weight beside its equals, relatively.
CLOSE = {"atol": 1e-6, "rtol": 2e-6}
# A logit is 16 times what was written.
LOGITS_CLOSE = {"atol": 2e-5, "rtol": 2e-6}


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return HookedModel(KNOWN.model())


def random_tokens(seed: int, known: KnownInduction = KNOWN) -> list[int]:
    """The start, then any other tokens: some come never again, some often, some twice in a row."""
    return [START, *np.random.default_rng(seed).integers(1, known.vocabulary, known.length - 1).tolist()]


def said_twice(seed: int, known: KnownInduction = KNOWN, count: int = 10) -> list[int]:
    """The start, then ``count`` different tokens, and these again."""
    words = 1 + np.random.default_rng(seed).permutation(known.vocabulary - 1)[:count]
    return [START, *words.tolist(), *words.tolist()]


@pytest.mark.parametrize("known", SHAPES, ids=["2 heads", "4 heads"])
@pytest.mark.parametrize("make", [random_tokens, said_twice])
def test_every_hook_point_holds_what_the_construction_says(known: KnownInduction, make: object) -> None:
    model = HookedModel(known.model())
    assert not model.untrusted
    batch = [make(seed, known) for seed in range(5)]
    _, cache = model.run_with_cache(batch)
    for row, tokens in enumerate(batch):
        for name, expected in known.closed_form(tokens).items():
            value = cache.numpy(name) if name == "hook_pos_embed" else cache.numpy(name)[row]
            close = LOGITS_CLOSE if name == "hook_logits" else CLOSE
            np.testing.assert_allclose(value, expected, **close, err_msg=name)


def test_attention_is_where_the_construction_puts_it(model: HookedModel) -> None:
    tokens = random_tokens(0)
    _, cache = model.run_with_cache(tokens)
    looks_back = cache.numpy(LOOKS_BACK)[0, KNOWN.previous_head]
    finds = cache.numpy(FINDS)[0, KNOWN.induction_head]
    sources = KNOWN.continuations(tokens)
    assert {1, 2, 3, 4} <= set(map(len, sources.values()))  # earlier occurrences, of this sample's tokens
    for query in range(1, len(tokens)):
        assert looks_back[query, query - 1] > 0.999
        keys = sources.get(query, [0])
        assert finds[query, keys].sum() > 0.999
        np.testing.assert_allclose(finds[query, keys], 1 / len(keys), atol=5e-3)


def test_the_detectors_find_the_two_heads_and_no_others(model: HookedModel) -> None:
    tokens = said_twice(3)
    _, cache = model.run_with_cache(tokens)
    patterns = {layer: cache.numpy(("pattern", layer))[0] for layer in (0, 1)}
    previous = heads.ranked({i: heads.previous_token_scores(p) for i, p in patterns.items()})
    induction = heads.ranked({i: heads.induction_scores(p, tokens) for i, p in patterns.items()})
    for ranked, head in [(previous, (0, KNOWN.previous_head)), (induction, (1, KNOWN.induction_head))]:
        assert (ranked[0].layer, ranked[0].head) == head
        assert ranked[0].score > 0.999
        assert ranked[1].score < 0.2


def test_the_model_predicts_what_followed_before(model: HookedModel) -> None:
    tokens = random_tokens(1)
    logits = np.array(model(tokens))[0]
    sources = KNOWN.continuations(tokens)
    assert len(sources) < len(tokens) - 5
    for query, row in enumerate(logits):
        followers = np.bincount([tokens[k] for k in sources.get(query, [])], minlength=KNOWN.vocabulary)
        # Each token gets its share of the occurrences before; without any, no token is preferred.
        np.testing.assert_allclose(row, UNEMBED * FINAL * followers / max(followers.sum(), 1), atol=0.1)


def test_what_it_generates_repeats_what_it_read(model: HookedModel) -> None:
    tokens = said_twice(5)
    words = tokens[1:11]
    result = model.generate(tokens[:13], max_tokens=18, temperature=0)
    assert result.tokens == (words[2:] + words)[:18]


def test_without_the_previous_token_head_there_is_no_induction(model: HookedModel) -> None:
    tokens = said_twice(2)
    ablation = {"hook_point": "blocks.0.attn.hook_z", "type": "zero", "heads": [KNOWN.previous_head]}
    logits, cache = model.run_with_cache(tokens, interventions=[ablation])
    for name, expected in KNOWN.closed_form(tokens, previous=False).items():
        value = cache.numpy(name) if name == "hook_pos_embed" else cache.numpy(name)[0]
        np.testing.assert_allclose(value, expected, **CLOSE, err_msg=name)
    assert heads.induction_scores(cache.numpy(FINDS)[0], tokens)[KNOWN.induction_head] < 1e-3
    assert np.abs(np.array(logits)).max() < 0.02
    # The control of the control: the head that does nothing can go.
    idle = {"hook_point": "blocks.0.attn.hook_z", "type": "zero", "heads": [1 - KNOWN.previous_head]}
    without, _ = model.run_with_cache(tokens, interventions=[idle])
    np.testing.assert_array_equal(np.array(without), np.array(model(tokens)))


@pytest.mark.parametrize(("reader", "matters"), [("hook_q", False), ("hook_k", True), ("hook_v", False)])
def test_the_heads_are_joined_by_the_keys_alone(model: HookedModel, reader: str, matters: bool) -> None:
    tokens = said_twice(4)
    ablation = {"hook_point": "blocks.0.attn.hook_z", "type": "zero"}
    point = f"blocks.1.attn.{reader}"
    _, without = model.run_with_cache(tokens, point, interventions=[ablation])
    edited, _ = model.run_with_cache(
        tokens, (), interventions=[{"hook_point": point, "type": "patch", "source": without}]
    )
    effect = np.abs(np.array(edited) - np.array(model(tokens))).max()
    assert effect > 10 if matters else effect < 1e-4


def test_the_lens_sees_the_answer_after_the_induction_head_and_not_before(model: HookedModel) -> None:
    tokens = said_twice(6)[:14]
    before, after = LogitLens.from_model(model).predictions(tokens, top_k=KNOWN.vocabulary)
    np.testing.assert_allclose([p.probability for p in before.predictions], 1 / KNOWN.vocabulary, atol=1e-6)
    assert after.predictions[0].token_id == tokens[4]
    expected = KNOWN.closed_form(tokens)["hook_logits"][-1]
    expected = np.exp(expected - expected.max()) / np.exp(expected - expected.max()).sum()
    found = [p.probability for p in sorted(after.predictions, key=lambda p: p.token_id)]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


LENS_KEYS = {
    "resid_in_{i}": "hook_resid_pre",
    "resid_mid_{i}": "hook_resid_mid",
    "resid_out_{i}": "hook_resid_post",
    "attn_out_{i}": "hook_attn_out",
    "mlp_out_{i}": "hook_mlp_out",
}


@pytest.mark.parametrize("norm", ["own", "final"])
def test_the_lens_reads_every_layer_and_part_as_the_construction_says(model: HookedModel, norm: str) -> None:
    batch = [said_twice(1), random_tokens(2)[:21]]
    forms = [KNOWN.closed_form(tokens) for tokens in batch]
    _, cache = model.run_with_cache(batch)
    lens = LogitLens.from_model(model)
    for key, point in LENS_KEYS.items():
        read = lens.compute(cache, key, norm=norm)
        assert list(read) == [f"logit_lens_{key.format(i=layer)}" for layer in (0, 1)]
        for layer, logits in enumerate(read.values()):
            for row, form in enumerate(forms):
                value = form[f"blocks.{layer}.{point}"]
                # Frozen statistics are those of the last stream: what has all of the output reads as the logits.
                writes = np.any(value @ OUTPUT, axis=-1)[:, None]
                expected = KNOWN.lens(value) if norm == "own" else writes * form["hook_logits"]
                tolerance = 2e-4 * np.abs(expected).max() + 2e-5
                np.testing.assert_allclose(np.array(logits[row]), expected, rtol=2e-4, atol=tolerance)
                assert writes.any() == (layer == 1 and point in ("hook_resid_mid", "hook_resid_post", "hook_attn_out"))
                if not writes.any():
                    assert np.abs(np.array(logits[row])).max() < 1e-4, f"{point} of layer {layer} has a preference"
    last = lens.compute(cache, "resid_out_1")["logit_lens_resid_out_1"]
    np.testing.assert_array_equal(np.array(last), cache.numpy("hook_logits"))


def test_the_lens_on_single_heads_tells_the_induction_head_from_the_others(model: HookedModel) -> None:
    tokens = said_twice(11)
    _, cache = model.run_with_cache(tokens, ["blocks.*.attn.hook_z", "ln_final.hook_in"])
    read = LogitLens.from_model(model).compute(cache, "head_out_L{i}H{j}", norm="final")
    assert list(read) == [f"logit_lens_head_out_L{layer}H{head}" for layer in (0, 1) for head in (0, 1)]
    induction = np.array(read.pop(f"logit_lens_head_out_L1H{KNOWN.induction_head}"))[0]
    np.testing.assert_allclose(induction, KNOWN.closed_form(tokens)["hook_logits"], **LOGITS_CLOSE)
    for name, logits in read.items():
        assert np.abs(np.array(logits)).max() < 1e-4, name


def test_directions_show_when_the_answer_is_preferred(model: HookedModel) -> None:
    batch = [said_twice(seed)[:14] for seed in (12, 13, 14)]
    answers = [tokens[4] for tokens in batch]
    others = [tokens[7] for tokens in batch]
    pairs = list(zip(answers, others, strict=True))
    _, cache = model.run_with_cache(batch)
    lens = LogitLens.from_model(model)
    differences = list(lens.compute(cache, "resid_out_{i}", token_directions=pairs).values())
    expected = [[form["hook_logits"][-1, a] - form["hook_logits"][-1, b]] for form, (a, b) in
                zip(map(KNOWN.closed_form, batch), pairs, strict=True)]  # fmt: skip
    assert np.abs(np.array(differences[0])).max() < 1e-4
    np.testing.assert_allclose(np.array(differences[1])[:, -1:], expected, rtol=1e-5)
    accuracy = list(lens.compute(cache, "resid_out_{i}", token_directions=pairs, metric="accuracy").values())
    assert np.array(accuracy[1])[-1] == 1


@pytest.mark.parametrize("tokens", [said_twice(15), random_tokens(16)], ids=["said twice", "random"])
def test_the_induction_head_is_all_of_the_logit_and_the_others_are_nothing(
    model: HookedModel, tokens: list[int]
) -> None:
    _, cache = model.run_with_cache(tokens, attribution_points(model))
    logits = KNOWN.closed_form(tokens)["hook_logits"]
    own = np.array(model(tokens))[0]
    for token in range(KNOWN.vocabulary):
        found = direct_logit_attribution(cache, token, model=model, positions=None)
        for contribution in found.contributions:
            expected = logits[:, token] if contribution.name == f"L1H{KNOWN.induction_head}" else 0
            np.testing.assert_allclose(contribution.values[0], np.broadcast_to(expected, len(tokens)), atol=1e-4)
        np.testing.assert_allclose(found.total[0], own[:, token], atol=1e-4)
    names = found.names()
    assert {"embed", "pos_embed", "L0H0", "L0H1", "L1H0", "L1H1", "L0 mlp", "L1 mlp"} <= set(names)


def expected_edges(tokens: list[int], threshold: float) -> dict[tuple[int, int, int, int], float]:
    """(layer, head, source, target) -> weight of every edge above the threshold, by the construction."""
    form = KNOWN.closed_form(tokens)
    patterns = np.stack([form[LOOKS_BACK], form[FINDS]])
    # No weight may lie so close to the threshold that rounding decides.
    assert np.abs(patterns - threshold).min() > 1e-3
    found = np.argwhere(patterns > threshold).tolist()
    return {(layer, head, key, query): patterns[layer, head, query, key] for layer, head, query, key in found}


@pytest.mark.parametrize("threshold", [0.12, 0.6])
@pytest.mark.parametrize("tokens", [said_twice(7)[:13], random_tokens(8)[:30]], ids=["said twice", "random"])
def test_the_edges_of_a_generation_are_those_of_the_construction(
    model: HookedModel, tokens: list[int], threshold: float
) -> None:
    hook = AttentionExtractionHook(threshold=threshold)
    result = model.generate(tokens, max_tokens=12, temperature=0, hooks=[hook])
    read = [*tokens, *result.tokens][:-1]  # the last token is not read any more
    expected = expected_edges(read, threshold)
    found = hook.edge_arrays()
    ends = list(zip(*(found[name].tolist() for name in ("layer", "head", "source", "target")), strict=True))
    assert len(set(ends)) == len(ends)
    assert set(ends) == set(expected)
    np.testing.assert_allclose(found["weight"], [expected[edge] for edge in ends], **CLOSE)
    for head in [(0, KNOWN.previous_head), (1, KNOWN.induction_head)]:
        shown = hook.get_edges_for_layer_head(*head)
        own = {edge[2:]: weight for edge, weight in expected.items() if edge[:2] == head}
        assert {(edge["source_pos"], edge["target_pos"]) for edge in shown} == set(own)
        assert [edge["weight"] for edge in shown] == sorted((edge["weight"] for edge in shown), reverse=True)
        assert all(edge["source_token"] == str(read[edge["source_pos"]]) for edge in shown)


def test_the_edges_of_the_two_heads_are_the_rule_that_they_follow(model: HookedModel) -> None:
    tokens = said_twice(9)
    hook = AttentionExtractionHook(threshold=0.9)
    model.generate(tokens, max_tokens=1, hooks=[hook])
    ends = {
        (layer, head): {(edge["source_pos"], edge["target_pos"]) for edge in hook.get_edges_for_layer_head(layer, head)}
        for layer, head in [(0, KNOWN.previous_head), (1, KNOWN.induction_head)]
    }
    n = len(tokens)
    assert ends[0, KNOWN.previous_head] == {(0, 0)} | {(q - 1, q) for q in range(1, n)}
    # Said for the first time it rests on position 0; said again it reads what followed ten positions before.
    again = {(q - 9, q) for q in range(11, n)}
    assert ends[1, KNOWN.induction_head] == {(0, q) for q in range(11)} | again
    # Each of the ten words is read once by the induction head, as key; each of its second copies reads, as query.
    summary = hook.get_token_attention_summary(position=11)
    assert [edge["from_position"] for edge in summary["received_attention"] if edge["layer"] == 1] == [20]
    assert [edge["to_position"] for edge in summary["given_attention"] if edge["layer"] == 1] == [2]
