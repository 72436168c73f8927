"""An edit does what an independent recomputation says, at every hook point, in one pass and with a KV cache."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from reference import forward
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError, HookPoint

TOKENS = [[1, 5, 9, 3, 7, 2]]


def test_a_replaced_activation_changes_the_output_as_recomputed(model: HookedModel) -> None:
    plain = np.array(model(TOKENS))
    noise = np.random.default_rng(0)
    for name, point in model.hook_points.items():
        if point.layer not in (None, 1):
            continue
        values = forward(model.model, TOKENS)[name]
        if point.component == "embed_in":
            new = (values + 1) % model.cfg.d_vocab
        elif point.component == "pattern":
            new = values[..., ::-1, :].copy()
        elif point.component == "attn_scores":
            new = np.where(np.isfinite(values), values + noise.normal(size=values.shape), values)
        else:
            new = values + noise.normal(size=values.shape)
        replacement = mx.array(new if point.component == "embed_in" else new.astype(np.float32))
        logits = model.run_with_hooks(TOKENS, [(name, lambda value, at, r=replacement: r)])
        expected = forward(model.model, TOKENS, {name: lambda value, n=new: n})["hook_logits"]
        np.testing.assert_allclose(np.array(logits), expected, rtol=5e-5, atol=5e-5, err_msg=name)
        assert not np.allclose(expected, plain, atol=1e-2), f"the edit at {name} does nothing: the test cannot fail"


def test_edits_at_several_points_add_up(model: HookedModel) -> None:
    def double(value: mx.array, point: HookPoint) -> mx.array:
        return value * 2

    names = ["blocks.0.hook_attn_out", "blocks.0.hook_resid_mid", "blocks.1.attn.hook_z", "blocks.2.hook_mlp_out"]
    logits = model.run_with_hooks(TOKENS, [(name, double) for name in names])
    expected = forward(model.model, TOKENS, {name: lambda value: value * 2 for name in names})["hook_logits"]
    np.testing.assert_allclose(np.array(logits), expected, rtol=5e-5, atol=5e-5)


def test_captures_show_edited_values_and_what_follows_from_them(model: HookedModel) -> None:
    def shift(value: mx.array, point: HookPoint) -> mx.array:
        return value + 1

    with model.hooks([("blocks.1.hook_resid_mid", shift)]):
        _, cache = model.run_with_cache(TOKENS)
    expected = forward(model.model, TOKENS, {"blocks.1.hook_resid_mid": lambda value: value + 1})
    np.testing.assert_allclose(cache.numpy(("resid_mid", 1)), expected["blocks.1.hook_resid_mid"], rtol=1e-4, atol=1e-4)
    assert mx.array_equal(cache["resid_mid", 1], cache["resid_pre", 1] + cache["attn_out", 1] + 1)
    assert mx.array_equal(cache["resid_post", 1], cache["resid_mid", 1] + cache["mlp_out", 1])
    np.testing.assert_allclose(cache.numpy("hook_logits"), expected["hook_logits"], rtol=1e-4, atol=1e-4)


def test_an_edit_of_what_a_norm_reads_leaves_the_stream_alone(model: HookedModel) -> None:
    with model.hooks([("blocks.1.ln2.hook_in", lambda value, point: value * 3 + 1)]):
        _, cache = model.run_with_cache(TOKENS)
    assert mx.array_equal(cache["resid_mid", 1], cache["resid_pre", 1] + cache["attn_out", 1])
    assert mx.array_equal(cache["blocks.1.ln2.hook_in"], cache["resid_mid", 1] * 3 + 1)


@pytest.mark.parametrize("component", ["q", "k", "rot_q", "rot_k", "v", "z", "pattern", "attn_scores", "resid_pre"])
def test_an_edit_lasts_through_cached_decoding(model: HookedModel, component: str) -> None:
    # With one full pass as the oracle: an edited key or value must be the one that later tokens see.
    name = next(n for n, p in model.hook_points.items() if p.component == component and p.layer == 1)

    def scale(value: mx.array, point: HookPoint) -> mx.array:
        # Each entry of the last axis by another factor: norms and softmax would undo a common one.
        return value * (0.5 + 0.1 * mx.arange(value.shape[-1]))

    row = TOKENS[0]
    full = np.array(model.run_with_hooks([row], [(name, scale)]))
    kv_cache = make_prompt_cache(model.model)
    parts = [model.run_with_hooks([part], [(name, scale)], kv_cache) for part in (row[:3], row[3:4], row[4:])]
    np.testing.assert_allclose(np.array(mx.concatenate(parts, axis=1)), full, rtol=5e-5, atol=5e-5)
    assert not np.allclose(full, np.array(model([row])), atol=1e-2)


def test_none_leaves_the_value_alone_even_if_the_hook_scribbles_on_it(model: HookedModel) -> None:
    plain = model(TOKENS)

    def scribble(value: mx.array, point: HookPoint) -> None:
        value += 100

    logits = model.run_with_hooks(TOKENS, [(None, scribble)])
    assert mx.array_equal(logits, plain)


def test_returning_the_value_unchanged_changes_nothing_bit_for_bit(model: HookedModel) -> None:
    plain = model(TOKENS)
    fused = [n for n, p in model.hook_points.items() if p.component not in ("attn_scores", "pattern", "resid_mid")]
    logits = model.run_with_hooks(TOKENS, [(fused, lambda value, point: value)])
    assert mx.array_equal(logits, plain)


def test_hooks_at_one_point_run_in_order() -> None:
    model = HookedModel(make_model("llama"))
    seen: list[float] = []

    def plus_one(value: mx.array, point: HookPoint) -> mx.array:
        seen.append(value[0, 0, 0].item())
        return value + 1

    model.run_with_hooks(TOKENS, [("hook_embed", plus_one), ("hook_embed", plus_one)])
    assert seen[1] == pytest.approx(seen[0] + 1, abs=1e-6)


def test_zeroing_one_head_removes_exactly_what_it_adds() -> None:
    model = HookedModel(make_model("llama"))
    _, cache = model.run_with_cache(TOKENS)

    def zero_head(z: mx.array, point: HookPoint) -> mx.array:
        z[:, :, 1] = 0
        return z

    with model.hooks([("blocks.2.attn.hook_z", zero_head)]):
        _, edited = model.run_with_cache(TOKENS)
    weight = np.array(model.model.model.layers[2].self_attn.o_proj.weight)
    width = model.cfg.d_head
    head = cache.numpy(("z", 2))[:, :, 1] @ weight[:, width : 2 * width].T
    difference = cache.numpy(("attn_out", 2)) - edited.numpy(("attn_out", 2))
    np.testing.assert_allclose(difference, head, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_replacement_takes_the_type_of_the_value(dtype: mx.Dtype) -> None:
    model = HookedModel(make_model("llama", dtype=dtype))
    _, cache = model.run_with_cache(TOKENS)
    with model.hooks([("blocks.0.hook_resid_post", lambda value, point: value.astype(mx.float32))]):
        _, again = model.run_with_cache(TOKENS)
    assert all(again[name].dtype == cache[name].dtype for name in cache)


def test_a_replacement_of_another_shape_is_refused() -> None:
    model = HookedModel(make_model("llama"))
    with pytest.raises(HookError, match=r"hook_embed returned shape \(1, 6, 31\): expected \(1, 6, 32\)"):
        model.run_with_hooks(TOKENS, [("hook_embed", lambda value, point: value[..., 1:])])
    with pytest.raises(HookError, match="returned ndarray: return an mlx array or None"):
        model.run_with_hooks(TOKENS, [("hook_embed", lambda value, point: np.array(value))])
