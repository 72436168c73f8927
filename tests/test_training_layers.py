"""From sample_layers to hook points."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError, UnknownHookError, UntrustedHookWarning
from mlx_hooks.activations import to_numpy
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.hook_points import block_point
from mlx_hooks.selftest import Check, SelfTest
from mlx_hooks.training.layers import detected_layers, sampled_layers
from mlx_hooks.training.trained import TrainedModel


def names(model: HookedModel, asked: Sequence[str | int] | None) -> list[str]:
    return [layer.point.name for layer in sampled_layers(model, asked)]


def stream(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


@pytest.mark.parametrize(
    "spelling", [1, -2, "1", "model.layers.1", "transformer.h.1", "blocks.1", "layers.1", "resid_out_1", stream(1)]
)
def test_a_block_is_the_stream_that_leaves_it(llama: HookedModel, spelling: str | int) -> None:
    (layer,) = sampled_layers(llama, [spelling])
    assert (layer.point.name, layer.asked) == (stream(1), spelling)


def test_other_names(llama: HookedModel) -> None:
    assert names(llama, ["transformer.wte", "model.norm"]) == ["hook_embed", "ln_final.hook_normalized"]
    assert names(llama, ["blocks.*"]) == names(llama, ["*"]) == [stream(i) for i in range(3)]
    assert names(llama, ["blocks.*.attn.hook_z", 0]) == [
        "blocks.0.attn.hook_z", stream(0), "blocks.1.attn.hook_z", "blocks.2.attn.hook_z",
    ]  # fmt: skip
    assert names(llama, ["model.layers.0.mlp.up_proj"]) == ["model.layers.0.mlp.up_proj.output"]
    # Each once, by the name that means it alone.
    (first, *rest) = sampled_layers(llama, ["blocks.*", "0"])
    assert (first.point.name, first.asked, len(rest)) == (stream(0), None, 2)


@pytest.mark.parametrize(
    ("n_layers", "layers"), [(1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (6, [0, 2, 3, 5]), (32, [7, 15, 23, 31])]
)
def test_detected_layers(n_layers: int, layers: list[int]) -> None:
    from types import SimpleNamespace
    from typing import Any

    model: Any = SimpleNamespace(
        cfg=SimpleNamespace(n_layers=n_layers),
        hook_points={stream(i): block_point("resid_post", i) for i in range(n_layers)},
    )
    assert detected_layers(model) == [stream(i) for i in layers]
    model.hook_points, model.cfg.model_type = {}, "other"
    with pytest.raises(HookError, match="No layers can be detected: other has no hook_resid_post. Name some in sample"):
        detected_layers(model)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (3, UnknownHookError, "Blocks are 0 to 2, got 3."),
        (-4, UnknownHookError, "Blocks are 0 to 2, got -4."),
        ("blocks.3", UnknownHookError, "Blocks are 0 to 2, got 'blocks.3'."),
        (
            "blocks",
            UnknownHookError,
            "Unknown hook point 'blocks'.* Blocks are named 0 to 2 or model.layers.0 to model",
        ),
        ("blocks.1.hook_resid", UnknownHookError, "Did you mean blocks.1.hook_resid_p"),
        ("head_out_L0H1", UnknownHookError, "is made of blocks.0.attn.hook_z"),
        (True, HookError, "A layer is a number or a name, got True."),
        (
            "input_ids",
            HookError,
            "embed.hook_in cannot be captured as rows of tokens: its value is one number per token",
        ),
    ],
)
def test_names_that_mean_nothing(llama: HookedModel, asked: str | int, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        sampled_layers(llama, [asked])
    assert raised.value.field == "sample_layers"


@pytest.mark.parametrize(
    ("name", "axes", "shape", "dtype"),
    [
        ("blocks.1.hook_mlp_out", ["d_model"], [32], "float32"),
        ("blocks.1.attn.hook_k", ["head", "d_head"], [2, 8], "float32"),
        ("blocks.1.attn.hook_pattern", ["head", "key"], [4, None], "float32"),
        ("model.layers.1.mlp.down_proj.input", ["feature"], [48], "float32"),
    ],
)
def test_what_a_row_is(llama: HookedModel, name: str, axes: list[str], shape: list, dtype: str) -> None:
    layers = TrainedModel(llama, [name]).layers
    assert layers == {name: {"axes": axes, "shape": shape, "dtype": dtype, "asked": name}}


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "mamba2", "deepseek_v3", "qwen3_next", "nanbeige"])
def test_rows_of_other_architectures(name: str) -> None:
    """Experts, state-space layers, latent attention, layers that run twice: of these, the last time."""
    model = tiny_model(name)
    tokens = mx.array(np.random.default_rng(0).integers(1, 50, (2, 7)))
    trained = TrainedModel(model, None)
    rows = trained.forward(tokens).rows(np.array([7, 3]))
    model.eval()
    _, cache = trained.hooked.run_with_cache(tokens, list(trained.layers))
    assert list(zip(rows.sequence, rows.position, strict=True)) == [(0, i) for i in range(7)] + [
        (1, i) for i in range(3)
    ]
    for layer, values in rows.values.items():
        expected = to_numpy(cache.records[layer][-1].value)[rows.sequence, rows.position]
        assert np.array_equal(to_numpy(values), expected)


def test_streams_of_several_are_refused() -> None:
    model = tiny_model("gemma3n")
    with pytest.raises(HookError, match=r"its value is \[stream, batch, pos, d_model\]"):
        TrainedModel(model, [0])
    with pytest.raises(
        HookError,
        match=r"^No layers can be detected: hook_resid_post of gemma3n is \[stream, batch, pos, d_model\]. Name some "
        r"in sample_layers, such as blocks.\*.hook_mlp_out.$",
    ):
        TrainedModel(model, None)
    assert list(TrainedModel(model, ["blocks.*.hook_mlp_out"]).layers)


def test_experts_are_told_through_adapters() -> None:
    """The router is a projection, which adapters wrap."""
    model = tiny_model("qwen3_moe")
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "dropout": 0.0, "scale": 5.0})
    assert HookedModel(model).untrusted == []
    trained = TrainedModel(model, ["blocks.*.mlp.hook_expert_indices"])
    rows = trained.forward(mx.array([[1, 2, 3]])).rows()
    assert {(values.shape, values.dtype) for values in rows.values.values()} == {((3, 2), mx.uint32)}


def test_what_is_not_to_be_trusted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = f"{stream(1)}, {stream(2)}".split(", ")

    def broken(model: HookedModel) -> tuple[SelfTest, dict]:
        check = Check("resid_post = resid_mid + mlp_out", 0.0, "made to fail")
        check.note(1.0, wrong)
        return SelfTest("llama", [check]), {}

    monkeypatch.setattr("mlx_hooks.model.quick_selftest", broken)
    monkeypatch.setattr("mlx_hooks.training.layers.quick_selftest", broken)
    with pytest.warns(UntrustedHookWarning):
        HookedModel(make_model("llama"))
    # Whoever captures something else is not warned.
    assert list(TrainedModel(make_model("llama"), [0]).layers) == [stream(0)]
    with pytest.raises(
        HookError,
        match=r"blocks.1.hook_resid_post cannot be captured, nor can 1 more of what is asked for: resid_post = "
        r"resid_mid \+ mlp_out does not hold on llama.",
    ) as raised:
        TrainedModel(make_model("llama"), ["blocks.*"])
    assert raised.value.field == "sample_layers"


def test_hooks_of_an_outer_block_are_not_met() -> None:
    """What is captured is what the model computes, not what somebody edits meanwhile."""
    model = make_model("llama")
    hooked = HookedModel(model)
    trained = TrainedModel(hooked, [1])
    tokens = mx.array([[1, 2, 3]])
    plain = trained.forward(tokens).values[stream(1)]
    seen = []
    with hooked.hooks([(stream(0), lambda value, point: seen.append(point) or value * 2)]):
        held = trained.forward(tokens).values[stream(1)]
    assert mx.array_equal(held, plain)
    assert not seen


def test_values_that_are_not_one_per_token() -> None:
    model = make_model("gpt2")
    with pytest.raises(
        HookError, match=r"hook_pos_embed cannot be captured as rows of tokens: its value is \[pos, d_m"
    ):
        TrainedModel(model, ["pos_embed"])
