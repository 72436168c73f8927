"""What is captured is what the model computed: bit for bit where the arithmetic is the same, else against NumPy."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from reference import forward
from tiny_models import CONFIGS, N_LAYERS, make_model

from mlx_hooks import HookedModel
from mlx_hooks.activations import ActivationCache, join

TOKENS = [[1, 5, 9, 3, 7, 2, 5, 9], [4, 4, 8, 0, 59, 2, 11, 30]]
LAYERS = range(N_LAYERS)


@pytest.fixture(params=[mx.float32, mx.float16, mx.bfloat16, "q4", "q8"], ids=str)
def variant(request: pytest.FixtureRequest) -> HookedModel:
    """A llama in each number format; 64 wide in 32-groups would hide nothing that 32 wide does."""
    if isinstance(request.param, str):
        model = make_model("llama")
        nn.quantize(model, group_size=32, bits=int(request.param[1:]), class_predicate=_fits_groups)
        return HookedModel(model)
    return HookedModel(make_model("llama", dtype=request.param))


def _fits_groups(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def equal(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and mx.array_equal(a, b).item()


def test_logits_with_every_hook_attached_equal_plain_logits_bit_for_bit(model: HookedModel) -> None:
    tokens = mx.array(TOKENS)
    plain = model.model(tokens)
    logits, cache = model.run_with_cache(tokens)
    assert equal(logits, plain)
    assert equal(cache["hook_logits"], plain)
    assert list(cache) == list(model.hook_points)
    assert equal(model.model(tokens), plain)


def test_every_hook_point_equals_the_independent_forward_pass(model: HookedModel) -> None:
    _, cache = model.run_with_cache(TOKENS)
    expected = forward(model.model, TOKENS)
    assert set(expected) == set(cache)
    for name, value in expected.items():
        got = cache.numpy(name)
        assert got.shape == value.shape, name
        # float32 against float64: rounding grows with the stream, which is a few tens wide here.
        np.testing.assert_allclose(got, value, rtol=5e-5, atol=5e-5, err_msg=name)


def test_axes_describe_the_shapes(model: HookedModel) -> None:
    _, cache = model.run_with_cache(TOKENS)
    cfg = model.cfg
    sizes = {
        "batch": 2, "pos": 8, "query": 8, "key": 8,
        "d_model": cfg.d_model, "d_head": cfg.d_head, "d_mlp": cfg.d_mlp, "d_vocab": cfg.d_vocab,
    }  # fmt: skip
    for name, point in model.hook_points.items():
        heads = cfg.n_key_value_heads if point.component in ("k", "rot_k", "v") else cfg.n_heads
        assert cache[name].shape == tuple({**sizes, "head": heads}[axis] for axis in point.axes), name


def test_the_stream_is_the_sum_of_what_is_added_bit_for_bit(variant: HookedModel) -> None:
    _, cache = variant.run_with_cache(TOKENS)
    assert equal(cache["resid_pre", 0], cache["hook_embed"])
    for i in LAYERS:
        assert equal(cache["resid_mid", i], cache["resid_pre", i] + cache["attn_out", i])
        assert equal(cache["resid_post", i], cache["resid_pre", i] + cache["attn_out", i] + cache["mlp_out", i])
        if i:
            assert equal(cache["resid_pre", i], cache["resid_post", i - 1])


def test_the_stream_sums_up_on_every_architecture(model: HookedModel) -> None:
    _, cache = model.run_with_cache(TOKENS)
    for i in LAYERS:
        assert equal(cache["resid_post", i], cache["resid_pre", i] + cache["attn_out", i] + cache["mlp_out", i])


def test_unembedding_the_last_residual_gives_the_logits_bit_for_bit(variant: HookedModel) -> None:
    logits, cache = variant.run_with_cache(TOKENS)
    assert equal(variant.unembed(cache["resid_post", N_LAYERS - 1]), logits)


def test_unembedding_on_every_architecture(model: HookedModel) -> None:
    logits, cache = model.run_with_cache(TOKENS)
    assert equal(model.unembed(cache["resid_post", N_LAYERS - 1]), logits)


def test_q_k_v_and_z_are_what_the_kernel_got_and_gave(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[mx.array, ...]] = []
    kernel = mx.fast.scaled_dot_product_attention

    def spy(q: mx.array, k: mx.array, v: mx.array, **options: object) -> mx.array:
        out = kernel(q, k, v, **options)
        seen.append((q, k, v, out))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(mx.fast, "scaled_dot_product_attention", spy)
        model.model(mx.array(TOKENS))
    _, cache = model.run_with_cache(TOKENS)
    assert len(seen) == N_LAYERS
    for i, arrays in enumerate(seen):
        for component, array in zip(["rot_q", "rot_k", "v", "z"], arrays, strict=True):
            assert equal(cache[component, i], array.swapaxes(1, 2)), (component, i)


def test_pattern_rows_sum_to_one_and_see_no_future(variant: HookedModel) -> None:
    _, cache = variant.run_with_cache(TOKENS)
    future = np.triu(np.ones((8, 8), dtype=bool), k=1)
    for i in LAYERS:
        pattern, scores = cache.numpy(("pattern", i)), cache.numpy(("attn_scores", i))
        np.testing.assert_allclose(pattern.sum(-1), 1, atol=3e-7)
        assert (pattern[..., future] == 0).all()
        assert np.isneginf(scores[..., future]).all()
        assert np.isfinite(scores[..., ~future]).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_pattern_times_values_is_z(dtype: mx.Dtype) -> None:
    model = HookedModel(make_model("llama", dtype=dtype))
    _, cache = model.run_with_cache(TOKENS)
    for i in LAYERS:
        v = cache.numpy(("v", i)).repeat(2, axis=2)
        z = np.einsum("bhqk,bkhd->bqhd", cache.numpy(("pattern", i)), v)
        # Four units in the last place of the kernel's type, at the size of the values that it adds up.
        tolerance = 4 * mx.finfo(dtype).eps * np.abs(v).max()
        np.testing.assert_allclose(cache.numpy(("z", i)), z, rtol=0, atol=tolerance)


def test_prefill_and_cached_decode_equal_one_full_forward_pass(model: HookedModel) -> None:
    row = TOKENS[0]
    _, full = model.run_with_cache([row])
    kv_cache = make_prompt_cache(model.model)
    parts = [model.run_with_cache([part], kv_cache=kv_cache)[1] for part in (row[:3], row[3:6], row[6:7], row[7:])]
    for name in model.hook_points:
        joined = join([record for part in parts for record in part.records[name]])
        assert list(joined.position_ids) == list(range(8)), name
        # Matrix products of other shapes add up in another order: float32 rounding, no more.
        np.testing.assert_allclose(joined.numpy(), full.numpy(name), rtol=5e-5, atol=5e-5, err_msg=name)


def test_decoded_rows_of_the_pattern_have_one_key_more_each() -> None:
    model = HookedModel(make_model("llama"))
    kv_cache = make_prompt_cache(model.model)
    shapes = [model.run_with_cache([part], "blocks.0.attn.hook_pattern", kv_cache=kv_cache)[1]["pattern", 0].shape
              for part in ([1, 5, 9], [3], [7])]  # fmt: skip
    assert shapes == [(1, 4, 3, 3), (1, 4, 1, 4), (1, 4, 1, 5)]


def test_a_row_of_a_batch_equals_that_row_alone(model: HookedModel) -> None:
    _, both = model.run_with_cache(TOKENS)
    for row, tokens in enumerate(TOKENS):
        _, alone = model.run_with_cache([tokens])
        for name, point in model.hook_points.items():
            if point.axes[0] == "batch":
                np.testing.assert_allclose(
                    both.numpy(name)[row], alone.numpy(name)[0], rtol=1e-4, atol=1e-4, err_msg=name
                )


@pytest.mark.parametrize(
    ("positions", "kept"), [("last", [7]), (2, [2]), (-2, [6]), ([1, 5], [1, 5]), (slice(2, 6, 2), [2, 4])]
)
def test_selected_positions_are_the_same_rows(positions: object, kept: list[int]) -> None:
    model = HookedModel(make_model("qwen3"))
    _, full = model.run_with_cache(TOKENS)
    _, some = model.run_with_cache(TOKENS, positions=positions)
    for name, point in model.hook_points.items():
        axis = point.position_axis
        expected = np.take(full.numpy(name), kept, axis=axis)
        if point.component in ("attn_scores", "pattern"):
            # Computed for these rows only: a smaller matrix product, so rounding may differ.
            np.testing.assert_allclose(some.numpy(name), expected, rtol=1e-5, atol=1e-6)
        else:
            assert np.array_equal(some.numpy(name), expected), name
        assert list(some.positions(name)) == kept


def test_names_filter_keeps_only_what_it_names() -> None:
    model = HookedModel(make_model("llama"))
    _, cache = model.run_with_cache(TOKENS, names_filter="blocks.*.hook_resid_post")
    assert list(cache) == [f"blocks.{i}.hook_resid_post" for i in LAYERS]
    _, cache = model.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("hook_z"))
    assert list(cache) == [f"blocks.{i}.attn.hook_z" for i in LAYERS]
    _, cache = model.run_with_cache(TOKENS, names_filter=["hook_embed", "model.layers.1.mlp.up_proj"])
    assert list(cache) == ["hook_embed", "model.layers.1.mlp.up_proj.output"]


def test_a_raw_module_path_gives_that_modules_input_and_output() -> None:
    model = HookedModel(make_model("llama"))
    path = "model.layers.1.mlp.up_proj"
    _, cache = model.run_with_cache(TOKENS, names_filter=[f"{path}.input", path, "blocks.1.mlp.hook_pre_linear"])
    assert equal(cache[f"{path}.output"], cache["mlp_pre_linear", 1])
    up_proj = model.model.model.layers[1].mlp.up_proj
    assert equal(up_proj(cache[f"{path}.input"]), cache[f"{path}.output"])


def test_in_place_arithmetic_of_the_model_does_not_reach_captured_values() -> None:
    # gpt2 adds the positional embedding to the token embedding in place.
    model = HookedModel(make_model("gpt2"))
    _, cache = model.run_with_cache(TOKENS)
    assert equal(cache["hook_embed"], model.model.model.wte(mx.array(TOKENS)))


def test_attention_pattern_matches_a_sliding_window() -> None:
    config = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 3}
    model = HookedModel(make_model(CONFIGS["llama"] | config))
    _, cache = model.run_with_cache(TOKENS)
    distance = np.arange(8)[:, None] - np.arange(8)[None, :]
    visible = (distance >= 0) & (distance < 3)
    for i in (1, 2):
        pattern = cache.numpy(("pattern", i))
        assert (pattern[..., ~visible] == 0).all()
        assert (pattern[..., visible] > 0).all()
        z = np.einsum("bhqk,bkhd->bqhd", pattern, cache.numpy(("v", i)).repeat(2, axis=2))
        np.testing.assert_allclose(cache.numpy(("z", i)), z, rtol=1e-5, atol=1e-5)


def test_records_that_do_not_begin_at_the_first_position_join_where_they_stand() -> None:
    model = HookedModel(make_model("llama"))
    kv_cache = make_prompt_cache(model.model)
    model.run_with_cache([1, 5, 9], "hook_embed", kv_cache=kv_cache)
    parts = [model.run_with_cache([t], "blocks.1.attn.hook_pattern", kv_cache=kv_cache)[1] for t in (3, 7)]
    joined = join([part.records["blocks.1.attn.hook_pattern"][0] for part in parts])
    assert joined.positions == (3, 5)
    assert joined.position_ids == range(3, 5)
    assert joined.value.shape == (1, 4, 2, 5)


def test_joining_nothing_but_one_record_changes_nothing() -> None:
    model = HookedModel(make_model("llama"))
    _, cache = model.run_with_cache(TOKENS, "hook_embed")
    record = cache.records["hook_embed"][0]
    assert join([record]) is record
    assert isinstance(cache, ActivationCache)
    assert cache.nbytes == 2 * 8 * 32 * 4
