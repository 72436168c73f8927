"""Scores and pattern for every kind of mask, against a plain NumPy softmax, and what is refused."""

from contextlib import nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache
from tiny_models import CONFIGS, make_model

from mlx_hooks import HookedModel, HookError, load_model
from mlx_hooks.activations import CapturedActivation, join, to_numpy
from mlx_hooks.attention import attention_pattern, attention_scores, weighted_values
from mlx_hooks.hook_points import block_point

SHAPE = (2, 4, 5, 8)  # batch, head, query, d_head; 7 keys, 2 key-value heads
KEYS = 7
VISIBLE = np.arange(KEYS)[None] <= np.arange(5)[:, None] + 2


def tensors() -> tuple[mx.array, mx.array, mx.array]:
    mx.random.seed(0)
    return mx.random.normal(SHAPE), mx.random.normal((2, 2, KEYS, 8)), mx.random.normal((2, 2, KEYS, 8))


def masks() -> dict[str, tuple[object, np.ndarray]]:
    """Name -> what the kernel gets, and which keys it leaves visible [query, key]."""
    lowest = float(mx.finfo(mx.float32).min)
    bias = np.random.default_rng(0).normal(size=(5, KEYS)).astype(np.float32)
    return {
        "none": (None, np.ones_like(VISIBLE)),
        "causal": ("causal", VISIBLE),
        "boolean": (mx.array(VISIBLE), VISIBLE),
        "boolean with batch and head": (mx.array(np.broadcast_to(VISIBLE, (2, 1, 5, KEYS))), VISIBLE),
        "one row for all queries": (mx.array(VISIBLE[2:3]), np.broadcast_to(VISIBLE[2:3], VISIBLE.shape)),
        "additive -inf": (mx.array(np.where(VISIBLE, 0, -np.inf).astype(np.float32)), VISIBLE),
        "additive lowest number": (mx.array(np.where(VISIBLE, 0, lowest).astype(np.float32)), VISIBLE),
        "additive bias": (mx.array(np.where(VISIBLE, bias, -np.inf)), VISIBLE),
    }


@pytest.mark.parametrize("rows", [None, [3], [4, 0, 2]])
@pytest.mark.parametrize("name", masks())
def test_pattern_and_values_equal_the_kernels(name: str, rows: list[int] | None) -> None:
    q, k, v = tensors()
    mask, visible = masks()[name]
    scores = attention_scores(q, k, scale=0.3, mask=mask, rows=rows)
    pattern, sink = attention_pattern(scores)
    assert sink is None
    picked = rows if rows is not None else range(5)
    assert scores.shape == (2, 4, len(picked), KEYS)
    hidden = ~visible[list(picked)]
    assert np.isneginf(np.array(scores)[..., hidden]).all()
    assert (np.array(pattern)[..., hidden] == 0).all()
    np.testing.assert_allclose(np.array(pattern).sum(-1), 1, atol=1e-6)
    kernel = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    np.testing.assert_allclose(
        np.array(weighted_values(pattern, v)), np.array(kernel)[:, :, list(picked)], rtol=1e-5, atol=1e-5
    )


def test_an_unknown_mask_is_refused() -> None:
    q, k, _ = tensors()
    with pytest.raises(ValueError, match="Unknown attention mask 'prefix'"):
        attention_scores(q, k, scale=1.0, mask="prefix")


def test_a_batched_cache_is_refused() -> None:
    model = HookedModel(make_model("llama"))
    with pytest.raises(HookError, match="BatchKVCache keeps an offset per row"):
        model.run_with_cache([[1]], "hook_embed", kv_cache=[BatchKVCache([0]) for _ in range(3)])


def test_a_cache_whose_keys_are_not_known_is_refused_where_it_matters() -> None:
    class Forgetful(KVCache):
        def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
            keys, values = super().update_and_fetch(keys, values)
            return keys[..., -3:, :], values[..., -3:, :]

    model = HookedModel(make_model("llama"))
    for names, error in [("blocks.1.attn.hook_pattern", "3 keys for 4 positions, and with Forgetful"), ("*resid*", "")]:
        kv_cache = [Forgetful() for _ in range(3)]
        model.run_with_cache([[1, 2, 3]], names, kv_cache=kv_cache)
        with pytest.raises(HookError, match=error) if error else nullcontext():
            model.run_with_cache([[4]], names, kv_cache=kv_cache)


@pytest.mark.parametrize("bad", ["x", [], [None] * 2])
def test_what_is_no_kv_cache_of_the_model_is_refused(bad: object) -> None:
    with pytest.raises(HookError, match="kv_cache is mlx-lm's list of 3 caches"):
        HookedModel(make_model("llama")).run_with_cache([[1]], "hook_embed", kv_cache=bad)


@pytest.mark.parametrize("times", [0, 2])
def test_attention_that_does_not_call_the_kernel_exactly_once_is_refused(times: int) -> None:
    model = HookedModel(make_model("llama"))
    attention = model.model.model.layers[1].self_attn

    class ByHand(type(attention)):
        def __call__(self, x: mx.array, mask: object = None, cache: object = None) -> mx.array:
            for _ in range(times):
                x = super().__call__(x, mask, cache)
            return x

    attention.__class__ = ByHand
    with pytest.raises(HookError, match=f"attended {times} times in one call, expected once: blocks.1.attn.hook_z"):
        model.run_with_cache([[1, 2]], "blocks.1.attn.hook_z")


def test_an_edit_of_resid_mid_starts_from_the_blocks_own_input() -> None:
    # A block that adds in place changes its input's Python object before the edit is made.
    raw = make_model("llama")

    class InPlace(type(raw.model.layers[0])):
        def __call__(self, x: mx.array, mask: object = None, cache: object = None) -> mx.array:
            x += 0
            normalized = self.input_layernorm(x)
            attended = self.self_attn(normalized, mask, cache)
            x += attended
            x += self.mlp(self.post_attention_layernorm(x))
            return x

    plain = HookedModel(raw).run_with_hooks([[1, 2, 3]], [("blocks.1.hook_resid_mid", lambda value, point: value * 2)])
    raw.model.layers[1].__class__ = InPlace
    edited = HookedModel(raw).run_with_hooks([[1, 2, 3]], [("blocks.1.hook_resid_mid", lambda value, point: value * 2)])
    assert mx.array_equal(plain, edited)


def record(ids: object, value: mx.array) -> CapturedActivation:
    return CapturedActivation(block_point("resid_post", 0), value, ids, "prefill", 0)


def test_joined_records_say_which_positions_they_have() -> None:
    joined = join([record([1, 3], mx.zeros((1, 2, 4))), record([6], mx.ones((1, 1, 4)))])
    assert joined.position_ids == (1, 3, 6)
    assert joined.positions == (1, 7)
    with pytest.raises(HookError, match="Records of blocks.0.hook_resid_post overlap: positions 0-1 and 1-2"):
        join([record(range(2), mx.zeros((1, 2, 4))), record(range(1, 3), mx.zeros((1, 2, 4)))])
    with pytest.raises(HookError, match="overlap: positions 1-5 and 3-3"):
        join([record([5, 1], mx.zeros((1, 2, 4))), record([3], mx.zeros((1, 1, 4)))])


def test_numbers_of_every_type_become_numpy() -> None:
    assert to_numpy(mx.array([1, 2], mx.int64)).dtype == np.int32
    assert to_numpy(mx.array([0.1], mx.bfloat16)).dtype == np.float32
    assert to_numpy(mx.array([0.1], mx.bfloat16))[0] == np.float32(0.10009765625)
    assert to_numpy(mx.array([0.5], mx.float32), "float16").dtype == np.float16


def test_a_quantised_model_says_how() -> None:
    raw = make_model("llama")
    assert HookedModel(raw).cfg.quantization is None
    nn.quantize(raw, group_size=32, bits=4, class_predicate=lambda path, _: path.endswith(("q_proj", "k_proj")))
    assert HookedModel(raw).cfg.quantization == {"bits": 4, "group_size": 32}
    nn.quantize(raw, group_size=32, bits=8, class_predicate=lambda path, m: path.endswith("v_proj"))
    mixed = {"4 bits, groups of 32": 6, "8 bits, groups of 32": 3}
    assert HookedModel(raw).cfg.quantization == {"bits": 4, "group_size": 32, "mixed": mixed}


def test_a_model_loads_by_name_or_folder() -> None:
    assert load_model("neuroscope-tiny").cfg.to_dict()["n_layers"] == 4


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_is_the_models(name: str) -> None:
    cfg = HookedModel(make_model(name)).cfg
    grouped = name in ("llama", "qwen2", "qwen3")
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_key_value_heads) == (3, 32, 4, 2 if grouped else 4)
    assert (cfg.d_head, cfg.d_mlp) == (12 if name == "qwen3" else 8, 128 if name == "gpt2" else 48)
    assert (cfg.d_vocab, cfg.max_positions, cfg.model_type) == (60, 512, CONFIGS[name]["model_type"])
