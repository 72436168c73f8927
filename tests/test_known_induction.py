"""Ground truth: on a model whose weights were set by hand, what is found is what the construction says."""

import numpy as np
import pytest
from known_models import START, UNEMBED, KnownInduction

from mlx_hooks import HookedModel, LogitLens
from mlx_hooks.analysis import heads

KNOWN = KnownInduction()
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
        np.testing.assert_allclose(row, UNEMBED * followers / max(followers.sum(), 1), atol=0.1)


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
