"""What each head adds to the stream: parts that add up to ``hook_attn_out`` on every architecture, or the reason."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every_architecture import on_every_architecture
from mlx_lm.tuner.lora import LoRALinear
from reference import forward
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError
from mlx_hooks.contributions import LinearNorm, relative_deviation
from mlx_hooks.coverage.models import tiny_model

TOKENS = [1, 5, 9, 3, 7]
REFUSED = {
    "deepseek_v41": "its heads have no output projection of their own",
    "longcat_flash": "the block attends several times",
    "longcat_flash_ngram": "the block attends several times",
    "mamba": "it has no attention",
    "mamba2": "it has no attention",
    "rwkv7": "it has no attention",
}


def parts(model: HookedModel, layer: int, tokens: list[int] = TOKENS) -> tuple[mx.array, mx.array, mx.array]:
    """What each head adds, what is added besides, and ``hook_attn_out``, of the first pass through the layer."""
    path = model.head_path(layer)
    _, cache = model.run_with_cache(tokens, [path.point.name, f"blocks.{layer}.hook_attn_out"])
    results, bias = path.split(cache.records[path.point.name][0].value)
    return results, bias, cache.records[f"blocks.{layer}.hook_attn_out"][0].value


@on_every_architecture
def test_the_heads_add_up_to_what_attention_adds(name: str) -> None:
    model = HookedModel(tiny_model(name))
    attending = [layer for layer in range(model.cfg.n_layers) if f"blocks.{layer}.attn.hook_z" in model.hook_points]
    reason = REFUSED.get(name.partition("/")[0])
    if reason is not None:
        with pytest.raises(HookError, match=f"What each head of layer 0 adds cannot be told on .*: {reason}"):
            model.head_input(0)
        return
    assert attending
    for layer in attending:
        # mlx-lm's own olmo runs on single tokens only.
        results, bias, added = parts(model, layer, TOKENS[:1] if name == "olmo" else TOKENS)
        assert results.shape[-2:] == (model.architecture.n_query_heads(layer), model.cfg.d_model)
        assert relative_deviation(results.sum(axis=-2) + bias, added) < 2e-6


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_a_heads_result_is_its_z_times_its_columns_of_the_output_projection(name: str) -> None:
    inner = make_model(name)
    model = HookedModel(inner)
    expected = forward(inner, [TOKENS])
    attn = inner.model.h[1].attn.c_proj if name == "gpt2" else inner.model.layers[1].self_attn.o_proj
    weight = np.array(attn.weight).astype(np.float64)
    z = expected["blocks.1.attn.hook_z"]
    by_head = weight.reshape(weight.shape[0], *z.shape[2:])
    _, cache = model.run_with_cache(TOKENS, "blocks.1.attn.hook_z")
    assert model.head_input(1) == model.head_input(-2) == "blocks.1.attn.hook_z"
    got = model.head_results(cache["z", 1], 1)
    np.testing.assert_allclose(got, np.einsum("bphd,ohd->bpho", z, by_head), rtol=2e-4, atol=2e-5)
    one = model.head_results(cache["z", 1][0, 2], 1)
    np.testing.assert_allclose(one, got[0, 2], rtol=1e-5, atol=1e-6)


def test_a_norm_after_the_projection_keeps_the_statistics_of_all_heads() -> None:
    inner = tiny_model("gemma2")
    model = HookedModel(inner)
    _, cache = model.run_with_cache(TOKENS, "blocks.0.attn.hook_z")
    z = cache.numpy("blocks.0.attn.hook_z").astype(np.float64)
    block = inner.model.layers[0]
    weight = np.array(block.self_attn.o_proj.weight).astype(np.float64).reshape(-1, *z.shape[2:])
    by_head = np.einsum("bphd,ohd->bpho", z, weight)
    rms = np.sqrt((by_head.sum(2) ** 2).mean(-1) + inner.args.rms_norm_eps)[..., None, None]
    expected = by_head / rms * (1 + np.array(block.post_attention_layernorm.weight).astype(np.float64))
    got = model.head_results(cache["z", 0], 0)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-5)


def test_the_bias_of_a_norm_after_the_projection_is_added_once() -> None:
    inner = tiny_model("gemma2")
    norm = inner.model.layers[0].post_attention_layernorm = nn.LayerNorm(inner.args.hidden_size)
    norm.bias = mx.random.normal(norm.bias.shape)
    results, bias, added = parts(HookedModel(inner), 0)
    assert relative_deviation(results.sum(axis=-2) + bias, added) < 2e-6
    np.testing.assert_allclose(bias[0, 0], norm.bias, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_adds_up_within_its_rounding(dtype: mx.Dtype) -> None:
    for name in ("llama", "gpt2"):
        results, bias, added = parts(HookedModel(make_model(name, dtype=dtype)), 2)
        assert results.dtype == mx.float32
        assert relative_deviation(results.sum(axis=-2) + bias, added) < 4 * mx.finfo(dtype).eps


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_and_adapted_projections_add_up(bits: int) -> None:
    inner = make_model("qwen2")
    nn.quantize(inner, group_size=32, bits=bits, class_predicate=lambda path, _: path.endswith("o_proj"))
    for block in inner.model.layers:
        adapted = LoRALinear.from_base(block.self_attn.o_proj, r=4)
        adapted.lora_b = mx.random.normal(adapted.lora_b.shape)
        block.self_attn.o_proj = adapted
    results, bias, added = parts(HookedModel(inner), 1)
    assert relative_deviation(results.sum(axis=-2) + bias, added) < 2e-6


def test_behind_a_gate_the_projections_own_input_is_asked_for() -> None:
    model = HookedModel(tiny_model("qwen3_next"))
    name = model.head_input(1)
    assert name == "model.layers.1.self_attn.o_proj.input"
    _, cache = model.run_with_cache(TOKENS, [name, "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"])
    total = model.head_results(cache[name], 1).sum(axis=-2)
    assert relative_deviation(total, cache["attn_out", 1]) < 2e-6
    with pytest.raises(HookError, match=r"o_proj.input holds has the shape \[..., 128\], all heads, got \(1, 5"):
        model.head_results(cache["z", 1], 1)


class Squaring(nn.Module):
    """No linear projection: heads cannot be told apart in what it gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.linear = inner

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) ** 2


def test_a_projection_that_is_not_linear_is_refused() -> None:
    inner = make_model("llama")
    inner.model.layers[1].self_attn.o_proj = Squaring(inner.model.layers[1].self_attn.o_proj)
    model = HookedModel(inner)
    assert model.head_input(0) == "blocks.0.attn.hook_z"
    with pytest.raises(HookError, match="layer 1 adds cannot be told on llama: the heads' parts do not add up"):
        model.head_input(1)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (3, (1, 4, 8), "Layers are 0 to 2, got 3"),
        (-4, (1, 4, 8), "Layers are 0 to 2, got -4"),
        (0, (1, 8, 4), r"hook_z holds has the shape \[..., 4, 8\], all heads, got \(1, 8, 4\)"),
        (0, (1, 2, 8), r"got \(1, 2, 8\)"),
    ],
)
def test_what_is_no_value_of_all_heads_is_an_error(layer: int, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(HookError, match=message):
        HookedModel(make_model("llama")).head_results(mx.zeros(shape), layer)


class Plus(nn.RMSNorm):
    """Gemma's norm: 1 is added to the weight."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, 1 + self.weight, self.eps)


@pytest.mark.parametrize("width", [2, 7, 32])
@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm, Plus])
def test_a_frozen_norm_is_the_norm_and_adds_up(kind: type[nn.Module], width: int) -> None:
    mx.random.seed(0)
    norm = kind(width)
    norm.apply(lambda weight: weight + mx.random.normal(weight.shape))
    value, part = mx.random.normal((2, 3, width)), mx.random.normal((2, 3, width))
    frozen = LinearNorm(norm, width).freeze(value)
    np.testing.assert_allclose(frozen(value), norm(value), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(frozen.linear(part) + frozen(value - part), norm(value), rtol=1e-4, atol=1e-5)
    if kind is nn.LayerNorm:
        x, p = (np.array(a).astype(np.float64) for a in (value, part))
        spread = np.sqrt(((x - x.mean(-1, keepdims=True)) ** 2).mean(-1, keepdims=True) + norm.eps)
        expected = (p - p.mean(-1, keepdims=True)) / spread * np.array(norm.weight)
        np.testing.assert_allclose(frozen.linear(part), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(frozen.bias, norm.bias, atol=1e-6)


def test_what_is_no_norm_of_the_whole_input_cannot_be_frozen() -> None:
    with pytest.raises(HookError, match="GroupNorm is no norm that scales"):
        LinearNorm(nn.GroupNorm(4, 32), 32).freeze(mx.random.normal((1, 3, 32)))
