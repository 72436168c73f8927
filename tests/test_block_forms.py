"""Blocks, experts, mixers and weights by name: that a value IS what its hook point says, on every architecture.

The self-test proves identities with the engine's own code. Here each value is compared with the formula that its name
stands for, in NumPy float64 from the model's weights (``oracle_blocks``), and edits with what it makes of them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import oracle_blocks as oracle
import pytest
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.models.cache import ArraysCache, CacheList, make_prompt_cache
from mlx_lm.utils import quantize_model
from oracle_blocks import (
    Array,
    Gated,
    Part,
    Rule,
    Weights,
    f64,
    gated,
    gelu,
    gelu_tanh,
    layer_norm,
    relu2,
    rms_norm,
    silu,
)
from packaging.version import Version

from mlx_hooks import ActivationCache, HookedModel, HookError
from mlx_hooks.coverage.configurations import CONFIGURATIONS, VARIANTS
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.hook_points import short_name

if Version(version("mlx-lm")) < Version("0.32.2"):
    pytest.skip("an older mlx-lm lacks some architectures and computes some differently", allow_module_level=True)

import mlx_lm.models.muse_spark as spark

METAL_ONLY = ("bitnet", "muse_spark")
# 2 rows of 20 tokens. Of top-2 experts 80 are called: from 64 on mlx-lm sorts tokens by expert.
TOKENS = [[(7 * i + 3 * i * i) % 96 for i in range(1, 21)], [(11 * i + i * i + 5) % 96 for i in range(1, 21)]]
RUNNING = [name for name in CONFIGURATIONS if name not in METAL_ONLY]
# ":" and a number format: the same model with quantised weights.
QUANTIZED = ["llama:4bit", "llama/untied:8bit", "llama:mixed", "qwen2_moe:4bit", "deepseek_v3:8bit", "lfm2:mixed"]


@cache
def hooked(name: str) -> HookedModel:
    name, _, bits = name.partition(":")
    model = tiny_model(name)
    if bits == "mixed":
        model, _ = quantize_model(model, {}, group_size=32, bits=4, quant_predicate=mixed_bits)
    elif bits:
        nn.quantize(model, group_size=32, bits=int(bits[0]))
    return HookedModel(model)


def mixed_bits(path: str, module: nn.Module) -> bool | dict[str, int]:
    """Eight bits for what ends a sublayer, none for queries, four for the rest."""
    if path.endswith(("q_proj", "out_proj")):
        return False
    return {"bits": 8, "group_size": 32} if path.endswith(("down_proj", "w2")) else {"bits": 4, "group_size": 32}


@cache
def weights_of(name: str) -> Weights:
    return Weights(hooked(name).model)


def tokens_of(name: str) -> list[list[int]]:
    """olmo reads one token at a time only; llama4 has one expert for each token."""
    return (
        [row[:1] for row in TOKENS] if name == "olmo" else [row * 2 for row in TOKENS] if name == "llama4" else TOKENS
    )


def close(got: Any, expected: Array, what: str = "", factor: float = 1.0) -> None:
    """Equal up to float32 rounding, relative to the largest value."""
    got = f64(got) if isinstance(got, mx.array) else got
    assert got.shape == expected.shape, what
    finite = np.abs(expected[np.isfinite(expected)])
    np.testing.assert_allclose(got, expected, rtol=0, atol=factor * 2e-5 * max(finite.max(), 1e-3), err_msg=what)


def captured(
    name: str, names: list[str], hooks: list[tuple[str, Any]] | None = None, lengths: tuple[int, ...] = ()
) -> list[ActivationCache]:
    """What is recorded at ``names``, call by call: one pass, or calls of ``lengths`` tokens with a KV cache."""
    model = hooked(name)
    if name == "olmo":
        lengths = (1, 1, 1) if lengths else ()
    with model.hooks(hooks or []):
        if not lengths:
            return [model.run_with_cache(tokens_of(name), names)[1]]
        kv_cache, start, runs = make_prompt_cache(model.model), 0, []
        for length in lengths:
            part = [row[start : start + length] for row in TOKENS]
            runs.append(model.run_with_cache(part, names, kv_cache=kv_cache)[1])
            start += length
        return runs


CALLS = (11, 7, 1, 1)
"""Two chunks of the prompt, then two single tokens."""


def values(run: ActivationCache, name: str) -> list[Array]:
    """What one call recorded at a point, pass by pass."""
    return [f64(record.value) for record in run.records[name]]


# ---------------------------------------------------------------------------------------------------------------------
# MLPs

SWIGLU = gated(silu)
# Gate, up and down projection inside the MLP. A whole number: that part of a projection's output, split in two;
# "even", "odd": every second column. No gate: not gated.
_FUSED = (("gate_up_proj", 0), ("gate_up_proj", 1), "down_proj")
_W123 = ("w1", "w3", "w2")
PARTS: dict[str, tuple[Any, Any, str]] = {
    "exaone": ("c_fc_0", "c_fc_1", "c_proj"),
    "internlm2": _W123,
    "lfm2": _W123,
    "lfm2-vl": _W123,
    "qwen": ("w2", "w1", "c_proj"),
    "talkie": ("mlp_gate", "mlp_linear", "mlp_resid"),
    **dict.fromkeys(("glm", "glm4", "phi3", "plamo2", "plamo3"), _FUSED),
    "openelm": (("proj_1", 0), ("proj_1", 1), "proj_2"),
    "olmo": (("ff_proj", 1), ("ff_proj", 0), "ff_out"),
    "phi3small": (("up_proj", "even"), ("up_proj", "odd"), "down_proj"),
    **dict.fromkeys(("apertus", "nemotron", "nemotron_h"), (None, "up_proj", "down_proj")),
    **dict.fromkeys(("gpt2", "gpt_bigcode", "starcoder2", "nanochat"), (None, "c_fc", "c_proj")),
    "phi": (None, "fc1", "fc2"),
    "gptj": (None, "fc_in", "fc_out"),
    "gpt_neox": (None, "dense_h_to_4h", "dense_4h_to_h"),
    "rwkv7": (None, "key", "value"),
}
LLAMA_PARTS = ("gate_proj", "up_proj", "down_proj")


def xielu(name: str, mlp: str) -> Callable[[Array], Array]:
    """Huang and Schlag 2024: quadratic above 0, exponential below."""
    weights = weights_of(name)
    alpha_p, alpha_n, beta = (weights[f"{mlp}.act_fn.{part}"] for part in ("alpha_p", "alpha_n", "beta"))
    p, n = oracle.softplus(alpha_p), beta + oracle.softplus(alpha_n)
    eps = weights[f"{mlp}.act_fn.eps"]
    return lambda x: np.where(x > 0, p * x**2, (np.expm1(np.minimum(x, eps)) - x) * n) + beta * x


def sparse_gelu(layer: int) -> Callable[[Array], Array]:
    """gemma3n: what exceeds mean + 0.52 standard deviations (the 70th percentile), in even layers."""
    if layer % 2:
        return gelu_tanh
    return lambda x: gelu_tanh(np.maximum(0, x - x.mean(-1, keepdims=True) - 0.5244005 * x.std(-1, keepdims=True)))


ACTIVATIONS: dict[str, Any] = {
    **dict.fromkeys(("gemma", "spark2_5"), gated(gelu)),
    **dict.fromkeys(
        ("gear", "gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "recurrent_gemma"), gated(gelu_tanh)
    ),
    **dict.fromkeys(("gpt_bigcode", "starcoder2"), gelu),
    **dict.fromkeys(("gpt2", "gpt_neox", "gptj", "phi"), gelu_tanh),
    **dict.fromkeys(("nanochat", "nemotron", "nemotron_h", "rwkv7"), relu2),
    "kimi_k3": oracle.situ(1.3, 0.7),
    "minimax_m3_vl": oracle.swiglu_oai(1.3, 0.7),
    "phi3small": oracle.swiglu_oai(1.702, 2.0),
}


def activation(name: str, layer: int, mlp: str) -> Callable[..., Array]:
    if name == "apertus":
        return xielu(name, mlp)
    if name == "gemma3n":
        return gated(sparse_gelu(layer))
    return ACTIVATIONS.get(name, SWIGLU)


def mlps(name: str) -> list[tuple[int, int, str]]:
    """Layer, number within the layer, and path of every dense MLP that stands in a block for itself."""
    weights = weights_of(name)
    down = PARTS.get(name.partition(":")[0], LLAMA_PARTS)[2]
    found = []
    for layer, block in enumerate(weights.blocks):
        paths = [p.removesuffix(f".{down}.weight") for p in weights.arrays if p.endswith(f".{down}.weight")]
        mine = [p for p in paths if p.startswith(f"{block}.") or p == block]
        mine = [p for p in mine if not re.search("expert|switch|attn|attention|shared", p)]
        found += [(layer, number, path) for number, path in enumerate(mine)]
    return found


def projected(x: Array, weights: Weights, path: str, part: Any) -> Array:
    """What a projection, or the named half of its columns, makes of its input."""
    if isinstance(part, str):
        return weights.linear(f"{path}.{part}", x)
    y = weights.linear(f"{path}.{part[0]}", x)
    return y[..., part[1] == "odd" :: 2] if isinstance(part[1], str) else np.split(y, 2, axis=-1)[part[1]]


@pytest.mark.parametrize("name", RUNNING + QUANTIZED)
def test_mlp_hook_points_are_gate_up_and_what_goes_down(name: str) -> None:
    """hook_pre and hook_pre_linear are the columns that the formula takes for gate and up; hook_post is its value.

    Both are edited in every layer, so the projections show that edits land in the right columns, hook_post that it is
    linear in hook_pre_linear and follows the activation function in hook_pre, and the MLP's output that it counts.
    """
    model, weights, places = hooked(name), weights_of(name), mlps(name)
    inside = [point for point in model.hook_points.values() if point.component.startswith("mlp_p")]
    assert sorted({layer for layer, _, _ in places}) == sorted({p.layer for p in inside})
    if not places:
        return
    gate, up, down = PARTS.get(name.partition(":")[0], LLAMA_PARTS)
    first = up if isinstance(up, str) else up[0]
    names = [f"{path}.{suffix}" for _, _, path in places for suffix in (f"{first}.input", f"{down}.output")]
    names += [p.name for p in inside]
    edits = {"mlp_pre": lambda x: 0.5 * x + 0.1, "mlp_pre_linear": lambda x: 2 * x, "mlp_post": lambda x: 1.5 * x - 0.1}
    hooks = [(p.name, lambda value, point: edits[point.component](value)) for p in inside]
    for run in captured(name, names, hooks, CALLS):
        for layer, number, path in places:
            per_pass = sum(layer == other for other, _, _ in places)
            pre, linear, post = (
                values(run, f"blocks.{layer}.mlp.{hook}")[number::per_pass] if has else []
                for hook, has in (("hook_pre", True), ("hook_pre_linear", gate), ("hook_post", True))
            )
            formula = activation(name, layer, path)
            for i, x in enumerate(values(run, f"{path}.{first}.input")):
                what, y = f"layer {layer}, pass {i}", values(run, f"{path}.{down}.output")[i]
                if name != "prism_hadamard_qwen35":  # its weights are packed in a way of its own
                    close(pre[i], edits["mlp_pre"](projected(x, weights, path, gate or up)), what)
                    close(y, weights.linear(f"{path}.{down}", post[i]), what)
                    if gate:
                        close(linear[i], edits["mlp_pre_linear"](projected(x, weights, path, up)), what)
                close(post[i], edits["mlp_post"](formula(pre[i], linear[i]) if gate else formula(pre[i])), what)


# ---------------------------------------------------------------------------------------------------------------------
# What a block adds to the stream

EDITS: dict[str, Callable[[Any], Any]] = {
    "attn_out": lambda x: 1.5 * x - 0.1,
    "mixer_out": lambda x: 0.7 * x + 0.1,
    "resid_mid": lambda x: 0.5 * x + 0.2,
    "mlp_out": lambda x: 1.2 * x + 0.1,
    "side_out": lambda x: 0.1 - x,
}
EPSILONS = {"qwen2_moe": 1e-6, "qwen3_next": 1e-6, "plamo": 1e-6, "plamo2": 1e-6, "plamo3": 1e-6, "deepseek_v41": 1e-20}
SUBLAYERS = (
    r"(self_attn|linear_attn|attn|attention|conv|local_mixer|mamba|mixer|temporal_block|mlp|mlps|feed_forward|moe|"
    r"block_sparse_moe|mlp_block|router|experts)(\.([01]|o_proj|o_b_proj|out_proj|dense|down_proj|fc2|fc_out|dense_4h_to_h))?"
)
# Experts whose sum is the output of the module that edits change: nothing shows it unedited.
NOT_EDITED = {"phixtral": "mlp_out", "kimi_k3": "mlp_out", "deepseek_v41": "mlp_out"}
# hook_resid_mid can be read but not replaced: the sum is not made where it could be met.
READ_ONLY_MID = ("gemma3n", "deepseek_v41", "iquestloopcoder")


class Block:
    """One pass through one block: what was recorded in it, compared step by step with what should have been.

    ``put`` compares a value with the recorded one and answers what goes on: the value, edited.
    """

    def __init__(self, name: str, layer: int, run: ActivationCache, edits: dict[str, Any], turn: int = 0) -> None:
        self.name, self.layer, self.run, self.edits, self.turn = name, layer, run, edits, turn
        self.weights = weights_of(name)
        self.path = self.weights.blocks[layer]

    def value(self, component: str) -> Array:
        return self._of_turn(short_name(component, self.layer))

    def raw(self, path: str, place: str = "output") -> Array:
        """What the module at a path in the block got or gave."""
        return self._of_turn(f"{self.path}.{path}.{place}")

    def _of_turn(self, name: str) -> Array:
        records = self.run.records[name]
        of_turn = records if len(records) == 1 else [record for record in records if record.pass_index == self.turn]
        assert len(of_turn) == 1, name
        return f64(of_turn[0].value)

    def has(self, component: str) -> bool:
        return short_name(component, self.layer) in self.run.records

    def put(self, component: str, value: Array) -> Array:
        value = self.edits.get(component, lambda x: x)(value)
        close(self.value(component), value, f"{component} of layer {self.layer}, pass {self.turn}")
        return value

    def gets(self, path: str, value: Array) -> None:
        close(self.raw(path, "input"), value, f"input of {path} in layer {self.layer}, pass {self.turn}")

    def made_by(self, path: str) -> Array:
        """What the projection at a path makes of what it got: unedited, where its output is what edits change."""
        return self.linear(path, self.raw(path, "input")) if "." in path else self.raw(path)

    def normed(self, component: str, path: str, x: Array, offset: float = 0.0) -> Array:
        """A norm's output, compared, like its input, with its hook points; there are none where "-" stands for it."""
        y = self.norm(path, x, offset)
        assert self.has(component) == (path != "-"), component
        if path != "-":
            self.put(component, y)
            if not component.endswith("_post"):
                self.put(f"{component}_in", x)
        return y

    def linear(self, path: str, x: Array) -> Array:
        return self.weights.linear(f"{self.path}.{path}", x)

    def weight(self, path: str) -> Array:
        return self.weights[f"{self.path}.{path}"]

    def norm(self, path: str, x: Array, offset: float = 0.0) -> Array:
        """Root mean square norm, or layer norm where ``path`` begins with "layer:"; "-" leaves x as it is."""
        if path == "-":
            return x
        kind, _, path = path.rpartition(":")
        full = f"{self.path}.{path}"
        after = self.name == "muse_glimmer" and path.startswith("post")
        y = (layer_norm if kind else rms_norm)(x, 1e-8 if after else EPSILONS.get(self.name.partition(":")[0], 1e-5))
        y = y * (self.weights[f"{full}.weight"] + offset)
        return y + self.weights[f"{full}.bias"] if f"{full}.bias" in self.weights else y


Form = Callable[[Block], None]


def sequential(parts: str, offsets: tuple[float, ...] = (0, 0, 0, 0), multiplier: float = 1.0) -> Form:
    """Mixing, then MLP, with the norms around them: "before mixing after | before mlp after"."""
    mixing, mlp = (half.split() for half in parts.split("|"))

    def form(block: Block) -> None:
        x = block.value("resid_pre")
        ln1, attn, ln1_post = mixing
        attn = next(path for path in attn.split("/") if f"{block.path}.{path}" in block.weights.modules)
        if not attn.endswith("o_proj"):  # there the module itself is never called
            block.gets(attn, block.normed("ln1", ln1, x, offsets[0]))
        out = multiplier * block.normed("ln1_post", ln1_post, block.made_by(attn), offsets[1])
        mid = block.put("resid_mid", x + block.put("attn_out" if block.has("attn_out") else "mixer_out", out))
        ln2, ffn, ln2_post = mlp
        block.gets(ffn.partition(".")[0], block.put("mlp_in", block.normed("ln2", ln2, mid, offsets[2])))
        out = multiplier * block.normed("ln2_post", ln2_post, block.made_by(ffn), offsets[3])
        block.put("resid_post", mid + block.put("mlp_out", out))

    return form


def parallel(norm: str, attn: str, mlp: str, second_norm: str = "") -> Form:
    """Attention and MLP, given by their last projection, read the same stream; there is none between them."""

    def form(block: Block) -> None:
        assert not block.has("resid_mid")
        x = block.value("resid_pre")
        block.gets(attn.partition(".")[0], block.put("attn_in", block.normed("ln1", norm, x)))
        second = block.normed("ln2", second_norm, x) if second_norm else block.norm(norm, x)
        block.gets(mlp.partition(".")[0], block.put("mlp_in", second))
        attn_out = block.put("attn_out", block.made_by(attn))
        block.put("resid_post", x + attn_out + block.put("mlp_out", block.made_by(mlp)))

    return form


def gemma4(block: Block) -> None:
    """Sandwich norms; experts beside the MLP or per-layer inputs; at the end the whole stream is multiplied."""
    x = block.value("resid_pre")
    attn_out = block.put("attn_out", block.normed("ln1_post", "post_attention_layernorm", block.raw("self_attn")))
    mid = block.put("resid_mid", x + attn_out)
    block.gets("mlp", block.normed("ln2", "pre_feedforward_layernorm", mid))
    out = block.raw("mlp")
    if "experts" in block.weights.modules[block.path]:
        block.gets("router", mid)
        block.gets("experts", block.norm("pre_feedforward_layernorm_2", mid))
        out = block.norm("post_feedforward_layernorm_1", out)
        out = out + block.norm("post_feedforward_layernorm_2", block.raw("experts"))
    h = mid + block.put("mlp_out", block.normed("ln2_post", "post_feedforward_layernorm", out))
    if block.has("side_out"):
        gate = gelu_tanh(block.linear("per_layer_input_gate", h)) * per_layer_inputs(block)
        side = block.norm("post_per_layer_input_norm", block.linear("per_layer_projection", gate))
        h = h + block.put("side_out", side)
    block.put("resid_post", h * block.weight("layer_scalar"))


def per_layer_inputs(block: Block) -> Array:
    """What gemma4 gives each layer besides the stream: from the token, and from its embedding (width 32 each)."""
    weights, trunk = block.weights, block.path.rpartition(".layers.")[0]
    tokens = values(block.run, "embed.hook_in")[0].astype(int)
    own = np.s_[..., 32 * block.layer : 32 * block.layer + 32]
    looked_up = weights[f"{trunk}.embed_tokens_per_layer.weight"][tokens][own] * np.sqrt(32)
    start = weights[f"{trunk}.embed_tokens.weight"][tokens] * 8
    made = weights.linear(f"{trunk}.per_layer_model_projection", start)[own] / 8
    made = rms_norm(made, 1e-5) * weights[f"{trunk}.per_layer_projection_norm.weight"]
    return (looked_up + made) / np.sqrt(2)


def talkie(block: Block) -> None:
    """Gains on both branches, and the normed embedding added to the stream again in every block."""
    x, tokens = block.value("resid_pre"), values(block.run, "embed.hook_in")[0].astype(int)
    block.gets("attn", rms_norm(x, 1.2e-7))
    mid = block.put("resid_mid", x + block.put("attn_out", block.weight("attn_gain.a_g") * block.raw("attn")))
    block.gets("mlp", rms_norm(mid, 1.2e-7))
    h = mid + block.put("mlp_out", block.weight("mlp_gain.a_g") * block.raw("mlp"))
    embedded = rms_norm(block.weights["model.embed.weight"][tokens], 1.2e-7)
    block.put("resid_post", h + block.put("side_out", block.weight("embed_skip.a_g") * embedded))


def longcat(block: Block) -> None:
    """Attention and MLP twice; experts read the first MLP's input and are added at the end."""
    h = block.value("resid_pre")
    for turn in range(2):
        block.turn = turn
        block.gets(f"self_attn.{turn}", block.normed("ln1", f"input_layernorm.{turn}", h))
        h = block.put("resid_mid", h + block.put("attn_out", block.raw(f"self_attn.{turn}")))
        normed = block.normed("ln2", f"post_attention_layernorm.{turn}", h)
        block.gets(f"mlps.{turn}", normed)
        if turn == 0:
            block.gets("mlp", normed)
        h = h + block.put("mlp_out", block.raw(f"mlps.{turn}"))
    block.turn = 0
    block.put("resid_post", h + block.put("side_out", block.raw("mlp")))


def falcon_h1(block: Block) -> None:
    """A mixer beside attention: both read the same normed stream and are added before the MLP."""
    x = block.value("resid_pre")
    for path in ("mamba", "self_attn"):
        block.gets(path, block.norm("input_layernorm", x))
    mid = x + block.put("mixer_out", block.raw("mamba")) + block.put("attn_out", block.raw("self_attn"))
    mid = block.put("resid_mid", mid)
    block.gets("feed_forward", block.norm("pre_ff_layernorm", mid))
    block.put("resid_post", mid + block.put("mlp_out", block.raw("feed_forward")))


def nemotron_h(block: Block) -> None:
    """One sublayer per block: state space, MLP, attention, experts, state space."""
    component = ("mixer_out", "mlp_out", "attn_out", "mlp_out", "mixer_out")[block.layer]
    assert not block.has("resid_mid")
    x = block.value("resid_pre")
    block.gets("mixer", block.norm("norm", x))
    block.put("resid_post", x + block.put(component, block.raw("mixer")))


def nemotron_nas(block: Block) -> None:
    """Blocks without attention, without MLP, without both, and with a linear layer in place of one."""
    first, second = (("attn_out", "mlp_out"), ("", "mlp_out"), ("mixer_out", ""), ("attn_out", "mlp_out"), ("", ""))[
        block.layer
    ]
    x = block.value("resid_pre")
    assert block.has("resid_mid") == bool(first and second)
    if first:
        block.gets("self_attn", block.norm("input_layernorm", x))
        x = x + block.put(first, block.raw("self_attn"))
    if first and second:
        x = block.put("resid_mid", x)
    if second:
        block.gets("mlp", block.norm("post_attention_layernorm", x))
        x = x + block.put(second, block.raw("mlp"))
    block.put("resid_post", x)


def gemma3n(block: Block) -> None:
    """Several streams: one is predicted from all, goes through the block, and corrects all (AltUp, LAuReL)."""
    streams = block.value("resid_pre")
    n = len(streams)

    def coefficients(x: Array, which: str) -> Array:
        routed = np.tanh(block.linear("altup.modality_router", block.norm("altup.router_norm", x) / x.shape[-1]))
        return routed @ np.clip(block.weight(f"altup.{which}.weight"), -0.5, 0.5).T

    mix = coefficients(streams[0], "prediction_coefs").reshape(*streams.shape[1:3], n, n)
    predicted = streams + np.einsum("sbpd,bpts->tbpd", streams, mix)
    normed = block.norm("input_layernorm", predicted[0])
    block.gets("self_attn", normed)
    low_rank = block.linear("laurel.linear_right", block.linear("laurel.linear_left", normed))
    side = block.put("side_out", normed + block.norm("laurel.post_laurel_norm", low_rank))
    attn = block.put("attn_out", block.norm("post_attention_layernorm", block.raw("self_attn")))
    mid = block.put("resid_mid", (predicted[0] + attn + side) / np.sqrt(2))
    block.gets("mlp", block.norm("pre_feedforward_layernorm", mid))
    active = mid + block.put("mlp_out", block.norm("post_feedforward_layernorm", block.raw("mlp")))
    corrected = predicted[0] + (active - predicted[0]) * (1 + coefficients(active, "correction_coefs"))[..., :1]
    close(block.value("resid_post")[0], corrected, f"first stream after layer {block.layer}")


def deepseek_v41(block: Block) -> None:
    """Several streams: each sublayer reads a weighted sum of them and is added to all, which are mixed among themselves
    by a matrix whose rows and columns sum to 1 (hyper-connections)."""
    streams, weights = block.value("resid_pre"), np.empty(0)
    for component, after, path, connection in (
        ("attn_out", "resid_mid", "self_attn.o_b_proj", "attn_hc"),
        ("mlp_out", "resid_post", "mlp", "ffn_hc"),
    ):
        n = streams.shape[2]
        flat = rms_norm(streams.reshape(*streams.shape[:2], -1), 1e-20)
        scale = block.weight(f"{connection}.scale")[[0] * n + [1] * n + [2] * n**2]
        mix = flat @ block.weight(f"{connection}.fn").T * scale + block.weight(f"{connection}.base")
        pre, post = oracle.sigmoid(mix[..., :n]) + 1e-6, 2 * oracle.sigmoid(mix[..., n : 2 * n])
        comb = oracle.softmax(mix[..., 2 * n :].reshape(*mix.shape[:2], n, n)) + 1e-6
        for axis in (-2, -1) * 3 + (-2,):
            comb = comb / (comb.sum(axis, keepdims=True) + 1e-6)
        if component == "mlp_out":
            block.gets("mlp", block.norm("post_attention_layernorm", np.einsum("bps,bpsd->bpd", weights, streams)))
        weights = pre  # the MLP reads with the weights that attention's connection made
        added = block.put(component, block.made_by(path))
        streams = post[..., None] * added[..., None, :] + np.einsum("bpst,bpsd->bptd", comb, streams)
        streams = block.put(after, streams)


def kimi_k3(block: Block) -> None:
    """The stream is a sum within two layers; sublayers read a softmax mixture of it and of the sums before."""
    starts = [Block(block.name, layer, block.run, {}).value("resid_pre") for layer in range(0, block.layer + 1, 2)]

    def mixture(sums: list[Array], which: str) -> Array:
        w = block.weight(f"{which}_res_norm.weight") * block.weight(f"{which}_res_proj.weight")[0]
        stacked = np.stack(sums, axis=-2)
        return (oracle.softmax(rms_norm(stacked, 1e-5) @ w)[..., None] * stacked).sum(-2)

    x, starting = block.value("resid_pre"), block.layer % 2 == 0
    sums = starts if starting else [*starts, x]
    block.gets("self_attn", block.norm("input_layernorm", x if block.layer == 0 else mixture(sums, "self_attention")))
    total = block.put("attn_out" if block.has("attn_out") else "mixer_out", block.made_by("self_attn.o_proj"))
    total = total if starting else x + total
    block.gets("mlp", block.norm("post_attention_layernorm", mixture([*starts, total], "mlp")))
    block.put("resid_post", total + block.put("mlp_out", block.raw("mlp")))


_SANDWICH = (
    "input_layernorm self_attn/local_mixer post_attention_layernorm"
    " | pre_feedforward_layernorm mlp post_feedforward_layernorm"
)
_PLAMO = "pre_mixer_norm mixer post_mixer_norm | pre_mlp_norm mlp post_mlp_norm"
_POST = "- self_attn post_attention_layernorm | - mlp post_feedforward_layernorm"
_LLAMA = "input_layernorm self_attn/linear_attn/mamba - | post_attention_layernorm mlp -"
FORMS: dict[str, Form] = {
    "llama": sequential(_LLAMA),
    "qwen3_next": sequential(_LLAMA),
    "gpt2": sequential("layer:ln_1 attn - | layer:ln_2 mlp -"),
    "nemotron": sequential(
        "layer:input_layernorm self_attn - | layer:post_attention_layernorm mlp -", offsets=(1, 0, 1, 0)
    ),
    "lfm2": sequential("operator_norm self_attn/conv - | ffn_norm feed_forward -"),
    "lille-130m": sequential("- attention - | - feed_forward -"),
    "recurrent_gemma": sequential(
        "temporal_pre_norm temporal_block - | channel_pre_norm mlp_block -", offsets=(1, 0, 1, 0)
    ),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "gear", "muse_glimmer"), sequential(_SANDWICH, (1, 1, 1, 1))),
    "glm4": sequential(
        "input_layernorm self_attn post_self_attn_layernorm | post_attention_layernorm mlp post_mlp_layernorm"
    ),
    "afmoe": sequential(
        "input_layernorm self_attn post_attention_layernorm | pre_mlp_layernorm mlp post_mlp_layernorm"
    ),
    **dict.fromkeys(("plamo2", "plamo3"), sequential(_PLAMO, (1, 1 / 5, 1, 1 / 5**1.5))),
    **dict.fromkeys(("olmo2", "exaone4"), sequential(_POST)),
    "granite": sequential(_LLAMA, multiplier=0.7),
    "granitemoe": sequential(_LLAMA.replace(" mlp", " block_sparse_moe"), multiplier=0.7),
    "granitemoehybrid/dense": sequential(_LLAMA, multiplier=0.7),
    "minicpm": sequential(_LLAMA, multiplier=1.3 / 2**0.5),
    "minicpm3": sequential(_LLAMA, multiplier=1.3 / 2**0.5),
    "gpt_neox/sequential": sequential("layer:input_layernorm attention - | layer:post_attention_layernorm mlp -"),
    "stablelm/sequential": sequential("layer:input_layernorm self_attn - | layer:post_attention_layernorm mlp -"),
    **dict.fromkeys(
        ("cohere", "cohere2", "stablelm"), parallel("layer:input_layernorm", "self_attn.o_proj", "mlp.down_proj")
    ),
    "phi": parallel("layer:input_layernorm", "self_attn.dense", "mlp.fc2"),
    "gptj": parallel("layer:ln_1", "attn.out_proj", "mlp.fc_out"),
    "phixtral": parallel("layer:ln", "mixer.out_proj", "moe"),
    "plamo": parallel("norm", "self_attn.o_proj", "mlp.down_proj"),
    "gpt_neox": parallel(
        "layer:input_layernorm", "attention.dense", "mlp.dense_4h_to_h", "layer:post_attention_layernorm"
    ),
    **dict.fromkeys(("gemma4_text", "gemma4", "gemma4/per_layer_inputs"), gemma4),
    "talkie": talkie,
    **dict.fromkeys(("longcat_flash", "longcat_flash_ngram"), longcat),
    "falcon_h1": falcon_h1,
    "nemotron_h": nemotron_h,
    "nemotron-nas": nemotron_nas,
    "nanbeige": sequential(_LLAMA),
    "iquestloopcoder": sequential("input_layernorm self_attn.o_proj - | post_attention_layernorm mlp.down_proj -"),
    "gemma3n": gemma3n,
    "deepseek_v41": deepseek_v41,
    "kimi_k3": kimi_k3,
    "kimi_k3/no_residual_blocks": sequential(_LLAMA),
}


def form_of(name: str) -> Form:
    return FORMS.get(name) or FORMS.get(re.split("[/:]", name)[0], sequential(_LLAMA))


@pytest.mark.parametrize("lengths", [(), CALLS], ids=["read", "edited in chunks and decode"])
@pytest.mark.parametrize("name", [*FORMS, *QUANTIZED])
def test_a_block_adds_to_the_stream_what_its_form_says(name: str, lengths: tuple[int, ...]) -> None:
    """What is added, and the stream between and after, from what the modules got and gave; edits go on from there."""
    model, weights = hooked(name), weights_of(name)
    shown = (*EDITS, "resid_pre", "resid_post", "embed_in", "attn_in", "mlp_in")
    points = [p for p in model.hook_points.values() if p.component in shown or p.component.startswith("ln")]
    edits = dict(EDITS) if lengths else {}
    if name in READ_ONLY_MID:
        edits.pop("resid_mid", None)
    edits.pop(NOT_EDITED.get(name, ""), None)
    hooks = [(p.name, lambda x, point: edits[point.component](x)) for p in points if p.component in edits]
    places = "|".join(map(re.escape, weights.blocks))
    paths = [path for path in weights.modules if re.fullmatch(rf"({places})\.{SUBLAYERS}", path)]
    if name == "iquestloopcoder":
        paths = [path for path in paths if not path.endswith("self_attn")]  # never called itself
    raw = [f"{path}.{place}" for path in paths for place in ("input", "output")]
    for run in captured(name, [p.name for p in points] + raw, hooks, lengths):
        for layer in range(len(weights.blocks)):
            n_passes = len(run.records[short_name("resid_pre", layer)])
            for turn in range(n_passes):
                form_of(name)(Block(name, layer, run, edits, turn))


@pytest.mark.parametrize(
    ("name", "point"),
    [("nanbeige", "hook_resid_post"), ("iquestloopcoder", "hook_mlp_out"), ("longcat_flash", "hook_attn_out")],
)
def test_layers_that_run_twice_are_read_pass_by_pass(name: str, point: str) -> None:
    """An edit of the second pass alone, by the number of the call, changes nothing in the first."""
    calls: list[int] = []

    def second_only(value: mx.array, hook_point: Any) -> mx.array | None:
        calls.append(len(calls))
        return value + 1 if calls[-1] % 2 else None

    plain = captured(name, [f"blocks.0.{point}"])[0]
    edited = captured(name, [f"blocks.0.{point}"], [(f"blocks.0.{point}", second_only)])[0]
    first, second = (plain.of_pass(k)[f"blocks.0.{point}"] for k in range(2))
    assert mx.array_equal(edited.of_pass(0)[f"blocks.0.{point}"], first).item()
    assert not mx.array_equal(second, first).item()
    close(edited.of_pass(1)[f"blocks.0.{point}"], f64(second) + 1)
    with pytest.raises(HookError, match="of_pass"):
        plain[f"blocks.0.{point}"]


@pytest.mark.parametrize("name", READ_ONLY_MID)
def test_a_stream_that_is_not_made_where_it_is_met_is_read_only_and_says_so(name: str) -> None:
    with pytest.raises(HookError, match="can be read but not replaced: it is not formed where it could be replaced"):
        hooked(name).run_with_hooks(TOKENS, [("blocks.0.hook_resid_mid", lambda value, point: value)])


# ---------------------------------------------------------------------------------------------------------------------
# Experts


@dataclass(frozen=True)
class Experts:
    """Experts in a block: paths of the layer in the block, of router and experts in the layer, and the formulas.

    ``shared`` is added to the weighted sum: the path of an MLP, multiplied by the sigmoid of ``shared_gate``'s output.
    """

    path: str
    rule: Rule
    router: str = "gate"
    experts: str = "switch_mlp"
    activation: Gated = SWIGLU
    shared: str = ""
    shared_gate: str = ""
    combine: Callable[[Part, Array, Array], Array] | None = None
    inside: Callable[[Part, Array], Array] = lambda part, x: x
    weighted_input: bool = False

    def logits(self, part: Part, x: Array) -> Array:
        y = x @ part[f"{self.router}.weight"].T
        return y + part[f"{self.router}.bias"] if f"{self.router}.bias" in part else y

    def outputs(self, part: Part, x: Array, layer: int) -> Array:
        """What every expert makes of the layer's input x [..., d_model]: [..., expert, d_model]."""
        x, act = self.inside(part, x)[..., None, :], activation_of(self, layer)
        if f"{self.experts}.fc1.weight" in part:
            return part.every(f"{self.experts}.fc2", act(part.every(f"{self.experts}.fc1", x)))
        gate, up = part.every(f"{self.experts}.gate_proj", x), part.every(f"{self.experts}.up_proj", x)
        return part.every(f"{self.experts}.down_proj", act(gate, up))

    def result(self, part: Part, x: Array, total: Array, layer: int) -> Array:
        """The layer's output, given the weighted sum of what the chosen experts gave."""
        if self.combine is not None:
            return self.combine(part, x, total)
        if not self.shared:
            return total
        shared = part.glu(self.shared, x, activation_of(self, layer, shared=True))
        return total + (oracle.sigmoid(part.linear(self.shared_gate, x)) * shared if self.shared_gate else shared)


def activation_of(experts: Experts, layer: int, shared: bool = False) -> Any:
    """Step 3.5 clips in its layer 2 only, with other limits for the shared expert."""
    if experts.shared == "share_expert" and layer == 2:
        return oracle.clamped_swiglu(0.6 if shared else 0.4, after=True)
    return experts.activation


def klear_result(part: Part, x: Array, total: Array) -> Array:
    """Experts and shared experts in proportions that are computed for each token."""
    share = oracle.softmax(part.linear("coefficient", x))
    return total * share[..., :1] + part.glu("shared_experts", x, SWIGLU) * share[..., 1:]


def nemotron_result(part: Part, x: Array, total: Array) -> Array:
    """Experts work in a latent space."""
    shared = part.linear("shared_experts.down_proj", relu2(part.linear("shared_experts.up_proj", x)))
    return part.linear("fc2_latent_proj", total) + shared


def kimi_k3_result(part: Part, x: Array, total: Array) -> Array:
    normed = rms_norm(total, 1e-5) * part["routed_expert_norm.weight"]
    return part.linear("routed_expert_up_proj", normed) + part.glu("shared_experts", x, oracle.situ(1.3, 0.7))


_SIGMOID, _SOFTMAX = oracle.sigmoid, oracle.softmax
_V3 = Rule(_SIGMOID, bias="gate.e_score_correction_bias", weigh="sum", scale=1.3)
_BAILING = Rule(_SIGMOID, bias="gate.expert_bias", groups="sum", weigh="sum", scale=1.3)
_CHOSEN_SOFTMAX = Rule(weigh="softmax")
_BELOW_0_7 = oracle.clamped_swiglu(0.7, after=False)
EXPERTS: dict[str, Experts] = {
    "mixtral": Experts("block_sparse_moe", _CHOSEN_SOFTMAX),
    "jamba": Experts("feed_forward", _CHOSEN_SOFTMAX, "router"),
    "phixtral": Experts("moe", _CHOSEN_SOFTMAX, activation=gelu_tanh),
    "granitemoe": Experts("block_sparse_moe", _CHOSEN_SOFTMAX, "router.layer"),
    "granitemoehybrid": Experts("block_sparse_moe", _CHOSEN_SOFTMAX, "router.layer"),
    "gpt_oss": Experts("mlp", _CHOSEN_SOFTMAX, "router", "experts", oracle.swiglu_oai(1.702, 7.0)),
    "phimoe": Experts("block_sparse_moe", oracle.SparseMixer()),
    **dict.fromkeys(("qwen3_moe", "qwen3_vl_moe", "mellum"), Experts("mlp", Rule(_SOFTMAX, weigh="sum"))),
    "olmoe": Experts("mlp", Rule(_SOFTMAX)),
    "qwen2_moe": Experts("mlp", Rule(_SOFTMAX), shared="shared_expert", shared_gate="shared_expert_gate"),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_moe"),
        Experts("mlp", Rule(_SOFTMAX, weigh="sum"), shared="shared_expert", shared_gate="shared_expert_gate"),
    ),
    "ernie4_5_moe": Experts("mlp", Rule(_SOFTMAX, weigh="sum"), shared="shared_experts"),
    "hunyuan": Experts("mlp", Rule(_SOFTMAX), "gate.wg", shared="shared_mlp"),
    "deepseek": Experts("mlp", Rule(_SOFTMAX), shared="shared_experts"),
    "deepseek_v2": Experts("mlp", Rule(_SOFTMAX, groups="max", scale=1.3), shared="shared_experts"),
    "mistral4": Experts("mlp", Rule(_SOFTMAX, weigh="sum", scale=1.3), shared="shared_experts"),
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32"),
        Experts("mlp", replace(_V3, groups="sum"), shared="shared_experts"),
    ),
    **dict.fromkeys(
        ("exaone_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "kimi_k25", "kimi_vl", "solar_open"),
        Experts("mlp", _V3, shared="shared_experts"),
    ),
    "dots1": Experts("mlp", _V3, experts="experts", shared="shared_experts"),
    "mimo_v2_flash": Experts("mlp", _V3),
    "deepseek_v41": Experts(
        "mlp",
        replace(_V3, score=lambda x: np.sqrt(oracle.softplus(x / 1.3))),
        experts="experts.switch_mlp",
        activation=_BELOW_0_7,
        shared="shared_experts",
    ),
    "kimi_linear": Experts("mlp", replace(_V3, bias="e_score_correction_bias"), shared="shared_experts"),
    "kimi_k3": Experts(
        "mlp",
        replace(_V3, bias="e_score_correction_bias"),
        activation=oracle.situ(1.3, 0.7),
        combine=kimi_k3_result,
        inside=lambda part, x: part.linear("routed_expert_down_proj", x),
    ),
    "nemotron_h": Experts(
        "mixer",
        _V3,
        activation=relu2,
        combine=nemotron_result,
        inside=lambda part, x: part.linear("fc1_latent_proj", x),
    ),
    **dict.fromkeys(
        ("bailing_moe", "bailing_moe_linear"),
        Experts("mlp", _BAILING, "gate.gate_proj", shared="shared_experts"),
    ),
    "bailing_hybrid": Experts("mlp", replace(_BAILING, dropped=-np.inf), "gate.gate_proj", shared="shared_experts"),
    "bailing_moe_v3": Experts("mlp", replace(_BAILING, dropped=-np.inf), shared="shared_experts"),
    "lfm2_moe": Experts("feed_forward", Rule(_SIGMOID, bias="expert_bias", weigh="sum", scale=1.3)),
    "minimax": Experts("block_sparse_moe", Rule(_SIGMOID, bias="e_score_correction_bias", weigh="sum")),
    "minimax_m3_vl": Experts(
        "block_sparse_moe",
        replace(_V3, bias="e_score_correction_bias"),
        activation=oracle.swiglu_oai(1.3, 0.7),
        shared="shared_experts",
    ),
    "afmoe": Experts("mlp", replace(_V3, bias="expert_bias"), "router.gate", "experts", shared="shared_experts"),
    "Klear": Experts("mlp", replace(_V3, bias="expert_bias", scale=1), experts="experts", combine=klear_result),
    "laguna": Experts(
        "mlp",
        replace(_V3, score=lambda x: _SIGMOID(0.7 * np.tanh(x / 0.7)), scale=1),
        "gate.proj",
        combine=lambda part, x, total: 1.3 * total + part.glu("shared_expert", x, SWIGLU),
    ),
    "step3p5": Experts("mlp", replace(_V3, bias="gate.router_bias"), "gate.gate", shared="share_expert"),
    "llama4": Experts("feed_forward", Rule(_SIGMOID), "router", "experts", shared="shared_expert", weighted_input=True),
    # Two experts more than there are give their input back.
    **dict.fromkeys(
        ("longcat_flash", "longcat_flash_ngram"),
        Experts("mlp", Rule(_SOFTMAX, bias="router.e_score_correction_bias", scale=1.3), "router.classifier"),
    ),
}
_EXPERT_EDITS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "read": {},
    "edited": {
        "router_scores": lambda x: 0.9 * x[..., ::-1] + 0.05,
        "expert_weights": lambda x: 0.5 * x + 0.1,
        "expert_out": lambda x: 0.7 * x + 0.01,
    },
    "other experts": {"expert_indices": lambda x: x ^ 1},
    "no experts": {"expert_weights": lambda x: 0 * x},
}


@pytest.mark.parametrize("edits", _EXPERT_EDITS.values(), ids=list(_EXPERT_EDITS))
@pytest.mark.parametrize("name", [*EXPERTS, *(name for name in QUANTIZED if name.partition(":")[0] in EXPERTS)])
def test_experts_are_chosen_weighed_and_summed_as_their_rule_says(name: str, edits: dict[str, Any]) -> None:
    """Scores from the layer's input, the choice and weights from the scores, what each expert gives, and the sum."""
    model, weights, experts = hooked(name), weights_of(name), EXPERTS[name.partition(":")[0]]
    components = ("router_scores", "expert_indices", "expert_weights", "expert_out")
    points = [p for p in model.hook_points.values() if p.component in components]
    layers = sorted({p.layer for p in points})
    paths = {layer: f"{weights.blocks[layer]}.{experts.path}" for layer in layers}
    raw = [f"{path}.{place}" for path in paths.values() for place in ("input", "output")]
    hooks = [(p.name, lambda x, point: edits[point.component](x)) for p in points if p.component in edits]

    def edited(component: str, value: Array) -> Array:
        return edits.get(component, lambda x: x)(value)

    for run in captured(name, [p.name for p in points] + raw, hooks, CALLS if len(edits) > 1 else ()):
        for layer in layers:
            part = Part(weights, paths[layer])
            scores, indices, chosen_weights, outputs = (
                values(run, short_name(component, layer))[0] for component in components
            )
            x, y = (values(run, f"{paths[layer]}.{place}")[0] for place in ("input", "output"))
            logits = edited("router_scores", experts.logits(part, x))
            close(scores, logits, f"scores of layer {layer}")
            assert run.records[short_name("expert_indices", layer)][0].value.dtype in (mx.uint32, mx.int32)
            indices = indices.astype(int)
            before = indices ^ 1 if "expert_indices" in edits else indices
            assert (np.diff(np.sort(before, axis=-1), axis=-1) > 0).all()
            # Compared by how much they are preferred: experts that tie are as good as one another.
            preference = experts.rule.preference(part, logits)
            preferred = np.sort(np.take_along_axis(preference, before, axis=-1), axis=-1)
            close(preferred, np.sort(preference, axis=-1)[..., -before.shape[-1] :], f"choice in layer {layer}")
            close(chosen_weights, edited("expert_weights", experts.rule.weights(part, logits, before)), "weights")
            x_in = x * chosen_weights if experts.weighted_input else x
            every = experts.outputs(part, x_in, layer)
            real = (indices < every.shape[-2])[..., None]  # the others give their input back
            picked = np.take_along_axis(every, np.where(real, indices[..., None], 0), axis=-2)
            close(outputs, edited("expert_out", picked), f"what experts give in layer {layer}", factor=2)
            outputs = outputs if real.all() else np.where(real, outputs, x[..., None, :])
            weighted = outputs if experts.weighted_input else outputs * chosen_weights[..., None]
            close(y, experts.result(part, x, weighted.sum(-2), layer), f"sum in layer {layer}", factor=2)


def test_every_architecture_with_experts_has_a_rule_here() -> None:
    with_experts = {
        name for name in RUNNING if any(p.component == "expert_out" for p in hooked(name).hook_points.values())
    }
    assert with_experts == {*EXPERTS, "gemma4"}


@pytest.mark.parametrize("name", ["gemma4", "gemma4/per_layer_inputs"])
def test_experts_of_gemma4_stand_in_the_block(name: str) -> None:
    """The router norms its input for itself; weights are a softmax of the chosen, times a number per expert."""
    model, weights = hooked(name), weights_of(name)
    edits = {"router_scores": lambda x: -x, "expert_weights": lambda x: 0.5 * x, "expert_out": lambda x: x + 0.1}
    points = [p for p in model.hook_points.values() if p.component in (*edits, "expert_indices")]
    hooks = [(p.name, lambda x, point: edits[point.component](x)) for p in points if p.component in edits]
    raw = [f"{path}.{end}" for path in weights.blocks for end in ("router.input", "experts.input", "experts.output")]
    experts = Experts("", Rule(weigh="softmax"), experts="experts.switch_glu", activation=gated(gelu_tanh))
    for run in captured(name, [p.name for p in points] + raw, hooks, CALLS):
        for layer, path in enumerate(weights.blocks):
            part, x = Part(weights, path), values(run, f"{path}.router.input")[0]
            scores, indices, chosen_weights, outputs = (
                values(run, short_name(c, layer))[0]
                for c in ("router_scores", "expert_indices", "expert_weights", "expert_out")
            )
            close(scores, -part.linear("router.proj", rms_norm(x, 1e-5) * part["router.scale"] / 8))
            indices = indices.astype(int)
            assert (np.sort(indices, axis=-1) == np.sort(np.argsort(-scores, axis=-1)[..., :2], axis=-1)).all()
            expected = experts.rule.weights(part, scores, indices) * part["router.per_expert_scale"][indices]
            close(chosen_weights, 0.5 * expected)
            every = experts.outputs(part, values(run, f"{path}.experts.input")[0], layer)
            close(outputs, np.take_along_axis(every, indices[..., None], axis=-2) + 0.1, factor=2)
            close(values(run, f"{path}.experts.output")[0], (outputs * chosen_weights[..., None]).sum(-2), factor=2)


def test_scores_of_experts_that_are_called_one_by_one() -> None:
    name = "blocks.0.mlp.hook_router_scores"
    (run,) = captured("dbrx", [name, "transformer.blocks.0.ffn.input"])
    x = values(run, "transformer.blocks.0.ffn.input")[0]
    close(values(run, name)[0], weights_of("dbrx").linear("transformer.blocks.0.ffn.router.layer", x))


@pytest.mark.parametrize(
    ("name", "point", "reason"),
    [
        ("dbrx", "blocks.1.mlp.hook_expert_out", "experts are called one by one for each token"),
        ("dbrx", "blocks.0.mlp.hook_expert_indices", "experts are called one by one for each token"),
        ("deepseek_v41", "blocks.2.attn.hook_pattern", "each query attends to rows gathered for it"),
        ("kimi_k3", "blocks.0.hook_resid_mid", "Unknown hook point"),
    ],
)
def test_what_cannot_be_shown_says_why(name: str, point: str, reason: str) -> None:
    with pytest.raises(HookError, match=reason):
        hooked(name).run_with_cache(TOKENS, point)


# ---------------------------------------------------------------------------------------------------------------------
# Mixers

MIXERS = {
    "mamba": ("mixer", oracle.mamba),
    "qwen3_next": ("linear_attn", oracle.gated_delta),
    "lfm2": ("conv", oracle.short_convolution),
}


@pytest.mark.parametrize("edit", [lambda state: state, lambda state: 0.5 * state + 0.1], ids=["read", "edited"])
@pytest.mark.parametrize("name", [*MIXERS, "lfm2:mixed"])
def test_a_mixer_follows_its_recurrence(name: str, edit: Callable[[Any], Any]) -> None:
    """Input, output and state of every call; an edited state is what the next call begins with."""
    model, weights = hooked(name), weights_of(name)
    path, recurrence = MIXERS[name.partition(":")[0]]
    layers = [p.layer for p in model.hook_points.values() if p.component == "mixer_state"]
    names = [short_name(c, layer) for layer in layers for c in ("ln1", "mixer_in", "mixer_state", "mixer_out")]
    hooks = [(short_name("mixer_state", layer), lambda value, point: edit(value)) for layer in layers]
    for lengths in (CALLS, ()):  # without a KV cache the state is shown as well
        kept: dict[int, oracle.Kept | None] = dict.fromkeys(layers)
        for run in captured(name, names, hooks, lengths):
            for layer in layers:
                normed, x, state, out = (
                    values(run, short_name(c, layer))[0] for c in ("ln1", "mixer_in", "mixer_state", "mixer_out")
                )
                assert (x == normed).all()
                expected, (window, last) = recurrence(Part(weights, f"{weights.blocks[layer]}.{path}"), x, kept[layer])
                kept[layer] = (window, edit(last))
                close(out, expected, f"output of layer {layer}", factor=2)
                close(state, edit(last), f"state of layer {layer}", factor=2)


WITH_STATE = [
    *("bailing_hybrid", "bailing_moe_linear", "bailing_moe_v3", "falcon_h1", "gear", "granitemoehybrid", "jamba"),
    *(
        "kimi_k3",
        "kimi_linear",
        "lfm2",
        "lfm2-vl",
        "lfm2_moe",
        "mamba",
        "mamba2",
        "nemotron_h",
        "olmo_hybrid",
        "plamo2",
    ),
    *("prism_hadamard_qwen35", "qwen3_5", "qwen3_5_moe", "qwen3_next", "recurrent_gemma", "rwkv7"),
]


def test_every_mixer_with_a_state_is_tested_here() -> None:
    shown = {n for n in RUNNING if any(p.component == "mixer_state" for p in hooked(n).hook_points.values())}
    assert shown == set(WITH_STATE)


@pytest.mark.parametrize("name", WITH_STATE)
def test_a_state_is_what_the_plain_model_keeps(name: str) -> None:
    """The last entry of a mixer's cache (rwkv7's third is its MLP's), after chunks and single tokens, and one pass."""
    model = hooked(name)
    names = [p.name for p in model.hook_points.values() if p.component == "mixer_state"]
    plain = make_prompt_cache(model.model)
    model.model(mx.array(TOKENS), cache=plain)
    entries = [c for cache in plain for c in (cache.caches if isinstance(cache, CacheList) else [cache])]
    kept = [f64(c.cache[1 if name == "rwkv7" else -1]) for c in entries if isinstance(c, ArraysCache)]
    assert len(kept) == len(names)
    for lengths in (CALLS, (20,), ()):
        last = captured(name, names, lengths=lengths)[-1]
        for point, expected in zip(names, kept, strict=True):
            close(values(last, point)[0], expected, point, factor=10)


# ---------------------------------------------------------------------------------------------------------------------
# Weights

# The logits are not made of the stream that leaves the last block alone.
NOT_OF_THE_LAST_STREAM = ("deepseek_v41", "kimi_k3")


@pytest.mark.parametrize("name", NOT_OF_THE_LAST_STREAM)
def test_unembedding_is_refused_where_the_last_stream_does_not_suffice(name: str) -> None:
    model = hooked(name)
    (run,) = captured(name, [short_name("resid_post", model.cfg.n_layers - 1)])
    with pytest.raises(HookError, match="Logits are not made of the last stream alone"):
        model.unembed(run["resid_post", model.cfg.n_layers - 1])


@pytest.mark.parametrize(
    "name", [name for name in [*RUNNING, *VARIANTS, *QUANTIZED] if name not in NOT_OF_THE_LAST_STREAM]
)
def test_unembedding_the_last_stream_gives_the_logits_bit_for_bit(name: str) -> None:
    model = hooked(name)
    last = short_name("resid_post", model.cfg.n_layers - 1)
    run = captured(name, [last, "hook_logits"])[0]
    streams = [record.value for record in run.records[last]]
    assert mx.array_equal(model.unembed(streams[-1]), run["hook_logits"]).item()


@pytest.mark.parametrize("name", ["llama", "llama/untied", *(name for name in QUANTIZED if name.startswith("llama"))])
def test_embedding_and_unembedding_use_the_weights_as_they_are(name: str) -> None:
    model, weights = hooked(name), weights_of(name)
    (run,) = captured(name, ["hook_embed", "blocks.1.hook_resid_post", "ln_final.hook_normalized", "hook_logits"])
    close(run["hook_embed"], weights["model.embed_tokens.weight"][np.array(TOKENS)])
    normed = rms_norm(values(run, "blocks.1.hook_resid_post")[0], 1e-5) * weights["model.norm.weight"]
    close(run["ln_final.hook_normalized"], normed)
    end = "model.embed_tokens" if model.model.args.tie_word_embeddings else "lm_head"
    close(run["hook_logits"], normed @ weights[f"{end}.weight"].T)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize(
    # No experts: MLX's CPU build multiplies those in float32 only.
    "name",
    ["granite", "minicpm", "cohere", "gpt_neox", "falcon_h1", "glm4", "olmo2", "lfm2", "mamba2", "talkie"],
)
def test_half_precision_changes_no_sum(name: str, dtype: mx.Dtype) -> None:
    """The model's own additions, in its own order and type, from what was captured."""
    model = HookedModel(tiny_model(name, dtype=dtype))
    plain = model.model(mx.array(TOKENS))
    logits, run = model.run_with_cache(TOKENS)
    assert mx.array_equal(logits, plain).item()
    assert logits.dtype == plain.dtype
    for layer in range(model.cfg.n_layers):
        parts = {c: [r.value for r in run.records.get(short_name(c, layer), [])] for c in (*EDITS, "resid_pre")}
        stream = parts["resid_pre"][0]
        assert stream.dtype == dtype
        if model.architecture.is_parallel(layer):
            stream = (parts["attn_out"][0] + parts["mlp_out"][0]) + stream
        else:
            for component in ("mixer_out", "attn_out", "mlp_out", "side_out"):
                stream = stream + parts[component][0] if parts[component] else stream
        assert mx.array_equal(run["resid_post", layer], stream).item(), layer


@pytest.mark.parametrize(
    "name",
    ["gemma3", "mistral3", "mistral3/mistral4", "pixtral", "lfm2-vl", "qwen2_vl", "qwen3_vl"],
)
def test_a_vision_language_wrapper_shows_its_text_model(name: str) -> None:
    """The same names and the same numbers as the text model inside it, wrapped for itself."""
    outer = hooked(name)
    inner = HookedModel(outer.model.language_model)
    _, outside = outer.run_with_cache(tokens_of(name))
    _, inside = inner.run_with_cache(tokens_of(name))
    assert list(outside) == list(inside)
    for point in inside:
        assert mx.array_equal(outside[point], inside[point]).item(), point


# ---------------------------------------------------------------------------------------------------------------------
# Architectures that call Metal kernels, with these replaced by their arithmetic


@pytest.fixture
def bitnet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def product(self: BitLinear, x: mx.array, packed: mx.array) -> mx.array:
        weight = mx.array(oracle.ternary(np.array(packed)).astype(np.float32))
        return x @ weight.T * (1 / self.weight_scale if self.invert_weight_scales else self.weight_scale)

    monkeypatch.setattr(BitLinear, "execute_matmul_kernel", product)
    yield from forgotten()


@pytest.fixture
def muse_spark(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels' documented arithmetic, in float32."""

    def rms(x: mx.array, eps: float) -> mx.array:
        return mx.fast.rms_norm(x, None, eps)

    def qk_norm(
        qkvg: mx.array, *, n_heads: int, n_kv_heads: int, head_dim: int, eps: float, query_scale: float
    ) -> tuple[mx.array, mx.array]:
        heads = qkvg.reshape(*qkvg.shape[:-1], -1, head_dim)
        return rms(heads[..., :n_heads, :], eps) * query_scale, rms(heads[..., n_heads : n_heads + n_kv_heads, :], eps)

    def qk_norm_rope(qkvg: mx.array, *, rope_base: float, offset: int, **sizes: Any) -> tuple[mx.array, ...]:
        rotate = nn.RoPE(sizes["head_dim"], traditional=True, base=rope_base)
        return tuple(rotate(x.swapaxes(1, 2), offset=offset).swapaxes(1, 2) for x in qk_norm(qkvg, **sizes))

    def rms_norm_sigmoid_gate(x: mx.array, gate: mx.array, *, eps: float) -> mx.array:
        return rms(x, eps).transpose(0, 2, 1, 3).reshape(gate.shape) * mx.sigmoid(gate)

    def pre_norm(stream: mx.array, norm: nn.Module, *, dtype: mx.Dtype) -> mx.array:
        return mx.fast.rms_norm(stream, norm.weight, norm.eps)

    def norm_add_norm(
        branch: mx.array, stream: mx.array, *, alpha: Any, beta: Any, post_weight: Any, post_eps: float, next_norm: Any
    ) -> tuple[mx.array, mx.array | None]:
        total = alpha * stream + beta * rms(branch if post_weight is None else post_weight * branch, post_eps)
        return total, None if next_norm is None else pre_norm(total, next_norm, dtype=branch.dtype)

    def expert_routing(
        logits: mx.array, bias: mx.array, *, top_k: int, multiplier: float, score_eps: float, route_scale: float
    ) -> tuple[mx.array, mx.array]:
        scores = mx.sigmoid(logits * multiplier)
        chosen = mx.argsort(-(scores + bias), axis=-1)[..., :top_k]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        return chosen, weights / (weights.sum(axis=-1, keepdims=True) + score_eps) * route_scale

    def post_expert_norm_combine(
        experts: mx.array, weights: mx.array, *, norm_weight: mx.array, eps: float
    ) -> mx.array:
        return (rms(experts * norm_weight, eps) * weights[..., None]).sum(axis=-2)

    for stand_in in (
        *(qk_norm, qk_norm_rope, rms_norm_sigmoid_gate, pre_norm, norm_add_norm, expert_routing),
        post_expert_norm_combine,
    ):
        monkeypatch.setattr(spark, stand_in.__name__, stand_in)
    yield from forgotten()


def forgotten() -> Iterator[None]:
    """Models made with stand-ins are not kept."""
    yield
    hooked.cache_clear()
    weights_of.cache_clear()


@pytest.mark.usefixtures("bitnet")
def test_ternary_weights() -> None:
    """The self-test; the stream, edited; gate, up, their product, its norm and what goes down."""
    model, weights = hooked("bitnet"), weights_of("bitnet")
    report = model.selftest()
    assert report.passed, str(report)
    test_a_block_adds_to_the_stream_what_its_form_says("bitnet", CALLS)
    names = [f"blocks.1.mlp.{hook}" for hook in ("hook_in", "hook_pre", "hook_pre_linear", "hook_post")]
    path = "model.layers.1.mlp"
    hooks = [(names[3], lambda value, point: 2 * value)]
    for run in captured("bitnet", [*names, f"{path}.output"], hooks, CALLS):
        x, gate, up, post = (values(run, name)[0] for name in names)
        close(gate, weights.linear(f"{path}.gate_proj", x))
        close(up, weights.linear(f"{path}.up_proj", x))
        close(post, 2 * relu2(gate) * up)
        normed = weights.rms_norm(f"{path}.ffn_sub_norm", post, 1e-5)
        close(run[f"{path}.output"], weights.linear(f"{path}.down_proj", normed), factor=5)


@pytest.mark.usefixtures("muse_spark")
def test_branches_that_are_added_in_a_fused_kernel() -> None:
    """The self-test; what is shown of the stream and the experts; what never fires is not there, or says why."""
    model, weights = hooked("muse_spark"), weights_of("muse_spark")
    report = model.selftest()
    assert report.passed, str(report)
    (run,) = captured("muse_spark", list(model.hook_points))
    assert list(run) == list(model.hook_points)
    experts = Experts("mlp", replace(_V3, score=lambda x: _SIGMOID(0.7 * x)), experts="experts")
    for layer, path in enumerate(weights.blocks):
        part = Part(weights, f"{path}.mlp")
        x, logits, indices, out = (
            values(run, short_name(c, layer))[0] for c in ("mlp_in", "router_scores", "expert_indices", "expert_out")
        )
        close(logits, experts.logits(part, x))
        preference = experts.rule.preference(part, logits)
        chosen = np.sort(np.argsort(-preference, axis=-1)[..., :2], axis=-1)
        assert (np.sort(indices, axis=-1) == chosen).all()
        latent = rms_norm(part.linear("pre_expert_proj", x), 1e-5) * part["pre_expert_norm.weight"]
        every = experts.outputs(part, latent, layer)
        close(out, np.take_along_axis(every, indices[..., None].astype(int), axis=-2), factor=2)
    for absent in ("blocks.1.ln1.hook_normalized", "blocks.0.ln2.hook_normalized", "blocks.0.hook_attn_out",
                   "blocks.0.hook_mlp_out", "blocks.0.hook_resid_mid", "blocks.0.mlp.hook_expert_weights"):  # fmt: skip
        with pytest.raises(HookError, match="in a fused kernel"):
            model.run_with_cache(TOKENS, absent)
