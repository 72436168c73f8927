"""Attention in every form that mlx-lm's architectures have, against the formulas written out in NumPy float64.

What hook points show is held against ``oracle_attention``: right heads, right layout, right mask, right formula; and an
edit of scores or pattern against what attention then gives, computed outside of the engine.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
import oracle_attention as oracle
import pytest
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache
from oracle_attention import float64
from packaging.version import Version

from mlx_hooks import HookedModel, HookError
from mlx_hooks.attention import attention_pattern, attention_scores
from mlx_hooks.coverage.configurations import CONFIGURATIONS
from mlx_hooks.coverage.models import tiny_model

if Version(version("mlx-lm")) < Version("0.32.2"):
    pytest.skip("an older mlx-lm lacks some architectures and computes some differently", allow_module_level=True)

# Kernels of these run on Metal only.
NEEDS_METAL = ("bitnet", "muse_spark")
WITHOUT_ATTENTION = ("mamba", "mamba2", "rwkv7")

Edit = Callable[[np.ndarray], np.ndarray]


class Shown:
    """What one call of a model showed: ``shown["pattern", 1]`` is the array of layer 1, ``shown["z", 1, 2]`` that of
    the third pass through it.
    """

    def __init__(self, cache: Any) -> None:
        self.arrays: dict[tuple, np.ndarray] = {}
        self.dtypes: dict[str, mx.Dtype] = {}
        for records in cache.records.values():
            for record in records:
                point = record.hook_point
                key = point.component, point.layer, record.pass_index
                assert key not in self.arrays, f"shown twice: {point.name}, pass {record.pass_index}"
                self.arrays[key] = float64(record.value)
                self.dtypes[point.component] = record.value.dtype

    def __getitem__(self, key: tuple) -> np.ndarray:
        return self.arrays[key if len(key) == 3 else (*key, 0)]

    def __contains__(self, key: object) -> bool:
        return key in self.arrays


@functools.cache
def hooked(name: str, dtype: mx.Dtype = mx.float32) -> HookedModel:
    """One model per architecture: tests leave nothing on it."""
    return HookedModel(tiny_model(name, dtype=dtype))


def run(
    model: HookedModel,
    lengths: Sequence[int],
    kv_cache: list | None = None,
    edits: dict[str, Edit] | None = None,
    names: Sequence[str] = ("*.attn.*", "hook_logits"),
) -> list[Shown]:
    """Run one sequence cut into calls of ``lengths``; the edits are made in the last call.

    Without a KV cache there is one call.
    """
    shown, start = [], 0
    for i, length in enumerate(lengths):
        last = i == len(lengths) - 1
        tokens = [[(7 * p + 3) % 96 for p in range(start, start + length)]]
        with model.hooks([(name, _hook(edit)) for name, edit in (edits or {}).items()] if last else []):
            shown.append(Shown(model.run_with_cache(tokens, list(names), kv_cache=kv_cache)[1]))
        start += length
    return shown


def _hook(edit: Edit) -> Callable[[mx.array, Any], mx.array]:
    return lambda value, point: mx.array(edit(float64(value)).astype(np.float32))


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    """Equal up to ``tolerance`` of the largest finite value; infinities stand at the same places."""
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
    finite = np.isfinite(expected)
    largest = np.abs(expected[finite]).max()
    np.testing.assert_allclose(got[finite], expected[finite], rtol=0, atol=tolerance * max(largest, 1e-3))


# ---------------------------------------------------------------------------------------------------------------------
# Which head is which: fused, interleaved and repeated projections of every architecture

# Query head h reads key-value head h % key-value heads.
TILED = ("plamo",)
# Keys and values are kept as one latent per position.
LATENT = (
    "bailing_hybrid",
    "bailing_moe_v3",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_k25",
    "kimi_k3",
    "kimi_linear",
    "kimi_vl",
    "longcat_flash",
    "longcat_flash_ngram",
    "mistral4",
)
# For more than one token mlx-lm's own model fails.
ONE_BY_ONE = ("olmo",)
# Keys are convolved, which may turn them round, or normed with weights around 0.
DIRECTION_CHANGES = {"baichuan_m1": ("k",), "cohere": ("q", "k")}


def turns_of(model: HookedModel) -> list[tuple[int, int]]:
    """Layers that attend, each kind of them once, with the passes through it."""
    found, kinds = [], set()
    for layer in sorted({p.layer for p in model.hook_points.values() if p.component == "z"}):
        shown = one_layer(model, layer)
        shapes = tuple((key[0], array.shape) for key, array in shown.arrays.items())
        if shapes not in kinds:
            kinds.add(shapes)
            found += [(layer, key[2]) for key in shown.arrays if key[0] == "q"]
    return found


def one_layer(model: HookedModel, layer: int, edited: str = "", turn: int = 0, head: int = 0) -> Shown:
    """The heads of one layer; ``edited`` ("q", "k" or "v") gets one head's columns moved on by one, in one pass.

    That leaves every mean and square alone, so that a norm over all heads does not spread it.
    """
    names = [
        point.name
        for point in model.hook_points.values()
        if point.layer == layer and point.component in ("q", "k", "v", "rot_q", "rot_k", "pattern", "z")
    ]
    calls = iter(range(100))

    def move(value: np.ndarray) -> np.ndarray:
        if next(calls) == turn:
            value[:, :, head] = np.roll(value[:, :, head], 1, axis=-1)
        return value

    edits = {f"blocks.{layer}.attn.hook_{edited}": move} if edited else {}
    if model.cfg.model_type in ONE_BY_ONE:
        return run(model, [1] * 6, make_prompt_cache(model.model), edits, names)[-1]
    return run(model, [6], None, edits, names)[0]


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


@pytest.mark.parametrize("name", sorted(set(CONFIGURATIONS) - {*NEEDS_METAL, *WITHOUT_ATTENTION}))
def test_a_head_is_the_same_head_everywhere(name: str) -> None:
    model = hooked(name)
    turns = turns_of(model)
    assert turns
    for layer, turn in turns:
        before = one_layer(model, layer)
        n_heads = before["q", layer, turn].shape[2]
        for part in ("q", "k", "v"):
            if (part, layer, turn) not in before:
                continue
            n_own = before[part, layer, turn].shape[2]
            reading = np.arange(n_heads) % n_own if name in TILED else np.arange(n_heads) // (n_heads // n_own)
            for head in {0, n_own - 1}:
                shared = name in ("afm7", "gemma3n", "gemma4_text") and layer >= 2
                if part == "v" and (name in LATENT or shared):
                    why = "kept as one latent: edit hook_q, the pattern" if name in LATENT else "of an earlier layer"
                    with pytest.raises(HookError, match=why):
                        one_layer(model, layer, part, turn, head)
                    continue
                after = one_layer(model, layer, part, turn, head)
                check_one_head(before, after, part, layer, turn, head, reading == head)
            if name not in ONE_BY_ONE and part in "qk":
                check_direction(name, before[part, layer, turn], before[f"rot_{part}", layer, turn], part)


def check_one_head(before: Shown, after: Shown, part: str, layer: int, turn: int, head: int, reads: np.ndarray) -> None:
    """What changed is the edited head, and the query heads that read it."""
    if part in "qk":
        rotated = f"rot_{part}", layer, turn
        assert before[rotated].shape == before[part, layer, turn].shape
        turned = 1 - cosine(before[rotated], after[rotated]).min((0, 1))
        own = np.arange(len(turned)) == head
        assert (turned[own] > 1e-3).all()
        assert (turned[~own] < 1e-9).all()
    # A second pass that attends twice, with keys of the first pass and with its own, gives one z of both.
    twice = turn == 1 and ("pattern", layer, 2) in before
    z, new_z = before["z", layer, turn], after["z", layer, turn]
    changes = [np.abs(z - new_z).max((0, 1, 3))]
    if part in "qk" and ("pattern", layer, turn) in before:
        at = ("pattern", layer, 2 if twice and part == "k" else turn)
        changes.append(np.abs(before[at] - after[at]).max((0, 2, 3)))
    for change in changes:
        assert (change[reads] > 1e-4).all()
        assert (change[~reads] < 1e-5).all()
    if part == "v" and not twice and z.shape[1] > 1:
        # Values with their columns moved on give a z with its columns moved on.
        np.testing.assert_allclose(new_z[:, :, reads], np.roll(z, 1, axis=-1)[:, :, reads], atol=1e-5)


def check_direction(name: str, projected: np.ndarray, rotated: np.ndarray, part: str) -> None:
    """At position 0 nothing is rotated: each head points where its projection does, up to the weights of a norm."""
    assert rotated.shape == projected.shape
    if part not in DIRECTION_CHANGES.get(name, ()):
        assert cosine(projected[:, 0], rotated[:, 0]).min() > 0.9


# ---------------------------------------------------------------------------------------------------------------------
# Scores, pattern, sink and z from what attention got, by each architecture's own rule

WINDOW = CHUNK = 8


@dataclass(frozen=True)
class Rule:
    """How one layer of an architecture attends; ``passes`` are the passes through it that attend so."""

    layer: int
    scale: float
    sees: str = "causal"
    cap: float = 0.0
    sinks: str = ""
    tiled: bool = False
    passes: tuple[int, ...] = (0,)

    def visible(self, first: int, length: int, n_keys: int) -> np.ndarray:
        queries = np.arange(first, first + length)
        if self.sees == "window":
            return oracle.window(queries, n_keys, WINDOW)
        return oracle.chunk(queries, n_keys, CHUNK) if self.sees == "chunk" else oracle.causal(queries, n_keys)

    def scores(self, q: np.ndarray, k: np.ndarray, first: int) -> np.ndarray:
        visible = self.visible(first, q.shape[1], k.shape[1])
        return oracle.scores_of(q, k, scale=self.scale, visible=visible, cap=self.cap, tiled=self.tiled)

    def sink_weights(self, model: HookedModel) -> np.ndarray | None:
        return float64(model.architecture.blocks[self.layer]["self_attn"][self.sinks]) if self.sinks else None


@dataclass(frozen=True)
class BlockSparse(Rule):
    """phi3small's block-sparse layers as mlx-lm computes them."""

    def scores(self, q: np.ndarray, k: np.ndarray, first: int) -> np.ndarray:
        n_queries, n_keys = q.shape[1], k.shape[1]
        seen, added = oracle.block_sparse(first, n_queries, n_keys, n_heads=q.shape[2], block=32, local=1, stride=2)
        scores = oracle.scores_of(q, k, scale=self.scale, visible=np.array(True))
        return np.where(seen, scores + added, -np.inf)


HEAD_OF_32 = 32**-0.5
FORMS: dict[str, list[Rule]] = {
    # Grouped queries, with and without a window.
    "llama": [Rule(0, HEAD_OF_32, "window"), Rule(1, HEAD_OF_32)],
    "qwen3": [Rule(1, HEAD_OF_32)],
    "nanbeige": [Rule(1, HEAD_OF_32, passes=(0, 1))],
    "plamo": [Rule(0, HEAD_OF_32, tiled=True)],
    "gemma3_text": [Rule(0, 48**-0.5, "window"), Rule(1, 48**-0.5), Rule(2, 48**-0.5, "window")],
    "cohere2": [Rule(0, HEAD_OF_32, "window"), Rule(1, HEAD_OF_32)],
    "recurrent_gemma": [Rule(2, HEAD_OF_32, "window")],
    "iquestloopcoder": [Rule(0, HEAD_OF_32)],
    # A sink.
    "gpt_oss": [Rule(0, HEAD_OF_32, "window", sinks="sinks"), Rule(1, HEAD_OF_32, sinks="sinks")],
    "mimo_v2_flash": [Rule(0, 64**-0.5), Rule(1, 64**-0.5, "window", sinks="attention_sink_bias")],
    # Chunks.
    "llama4": [Rule(0, HEAD_OF_32, "chunk"), Rule(2, HEAD_OF_32, "chunk"), Rule(3, HEAD_OF_32)],
    # Written out, with a soft cap.
    "gemma2": [Rule(0, 48**-0.5, cap=2.0), Rule(1, 48**-0.5, cap=2.0)],
    "gear": [Rule(1, 24**-0.5, "window", cap=1.3), Rule(2, 24**-0.5, cap=1.3)],
    "olmo": [Rule(0, HEAD_OF_32), Rule(1, HEAD_OF_32)],
    "phi3small": [BlockSparse(0, 1.3 / 16), Rule(1, 1.3 / 16)],
    # Keys and values of another layer.
    "gemma3n": [Rule(0, 1.0, "window"), Rule(1, 1.0), Rule(2, 1.0, "window"), Rule(3, 1.0)],
    "gemma4_text": [Rule(0, 1.0, "window"), Rule(1, 1.0), Rule(2, 1.0, "window"), Rule(3, 1.0)],
    "afm7": [Rule(1, HEAD_OF_32), Rule(2, HEAD_OF_32), Rule(3, HEAD_OF_32)],
    "hunyuan": [Rule(0, HEAD_OF_32), Rule(1, HEAD_OF_32), Rule(2, HEAD_OF_32)],
}
# Calls of a sequence that leaves windows and chunks: in one, a prompt beyond the window, one within, chunks.
CALLS = {
    "one pass": ([20], False),
    "decoding beyond the window": ([14, *[1] * 6], True),
    "decoding over the window's edge": ([5, *[1] * 15], True),
    "chunks": ([7, 8, 5], True),
    "chunks after decoding": ([6, 1, 1, 1, 4, 1], True),
}


def calls_of(name: str, way: str) -> list[int]:
    """The same for each architecture, where it can."""
    if name in ONE_BY_ONE:
        return [1] * 8
    lengths = list(CALLS[way][0])
    if name == "phi3small":
        lengths[0] += 16  # to leave a block of 32
    return lengths


def run_form(name: str, way: str, edits: dict[str, Edit] | None = None, dtype: mx.Dtype = mx.float32) -> list[Shown]:
    model = hooked(name, dtype)
    cached = CALLS[way][1] or name in ONE_BY_ONE
    return run(model, calls_of(name, way), make_prompt_cache(model.model) if cached else None, edits)


def so_far(shown: Sequence[Shown], component: str, layer: int, turn: int = 0) -> np.ndarray:
    """Heads of all calls together."""
    return np.concatenate([one[component, layer, turn] for one in shown], axis=1)


def check_calls(model: HookedModel, shown: list[Shown], rule: Rule, tolerance: float = 2e-5) -> None:
    """Every call's scores, pattern, sink and z are those of the rule."""
    first = 0
    for i, one in enumerate(shown):
        for turn in rule.passes:
            at = rule.layer, turn
            k, v = (so_far(shown[: i + 1], part, *at) for part in ("rot_k", "v"))
            scores = rule.scores(one[("rot_q", *at)], k, first)
            pattern, sink = oracle.pattern_of(scores, rule.sink_weights(model))
            close(one[("attn_scores", *at)], scores, tolerance)
            close(one[("pattern", *at)], pattern, tolerance)
            close(one[("z", *at)], oracle.z_of(pattern, v, rule.tiled), tolerance)
            assert (("sink", *at) in one) == bool(rule.sinks)
            if rule.sinks:
                close(one[("sink", *at)], sink, tolerance)
        first += one["rot_q", rule.layer].shape[1]


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("name", FORMS)
def test_scores_pattern_and_z_follow_the_architectures_rule(name: str, way: str) -> None:
    shown = run_form(name, way)
    for rule in FORMS[name]:
        check_calls(hooked(name), shown, rule)


@pytest.mark.parametrize(
    ("name", "sources"), [("gemma3n", {2: 0, 3: 1}), ("gemma4_text", {2: 0, 3: 1}), ("afm7", {2: 1})]
)
def test_a_layer_without_keys_shows_those_of_its_source(name: str, sources: dict[int, int]) -> None:
    for one in run_form(name, "decoding beyond the window"):
        for layer, source in sources.items():
            for part in ("rot_k", "v"):
                np.testing.assert_array_equal(one[part, layer], one[part, source])
            assert ("k", layer, 0) not in one


def test_values_of_another_layer_are_edited_there() -> None:
    # In decode, on keys that the source layer put into its KV cache in the same call.
    def negate(value: np.ndarray) -> np.ndarray:
        return -value

    model = hooked("afm7")
    for layer in (2, 3):
        with pytest.raises(HookError, match="these are the keys and values of an earlier layer: edit them there"):
            run(model, [5, 1], make_prompt_cache(model.model), {f"blocks.{layer}.attn.hook_v": negate})
    plain = run_form("afm7", "decoding beyond the window")
    edited = run_form("afm7", "decoding beyond the window", {"blocks.1.attn.hook_v": negate})
    for layer in (2, 3):
        np.testing.assert_array_equal(edited[-1]["v", layer], -plain[-1]["v", 1])
        v = so_far([*plain[:-1], edited[-1]], "v", layer)
        close(edited[-1]["z", layer], oracle.z_of(edited[-1]["pattern", layer], v))


def test_a_layer_that_shares_projections_shows_its_own_keys() -> None:
    # hunyuan hands on what the projection gave; each layer norms the keys with weights of its own.
    model = hooked("hunyuan")
    one = run_form("hunyuan", "one pass")[0]
    np.testing.assert_array_equal(one["v", 1], one["v", 0])
    source, reader = (oracle.weights_of(model.architecture.blocks[i]["self_attn"]) for i in (0, 1))
    weight = "key_layernorm.weight"
    close(one["rot_k", 1] / reader[weight], one["rot_k", 0] / source[weight])


@pytest.mark.parametrize("keep", [0, 2, 4])
@pytest.mark.parametrize("lengths", [[5, *[1] * 12], [12, 1, 1, 1], [6, 1, 1, 4, 1, 5, 1]])
def test_a_rotating_cache_that_keeps_the_first_positions(keep: int, lengths: list[int]) -> None:
    """As mlx-lm's ``max_kv_size`` makes it. Masks are drawn on the cache's slots, kept positions first."""
    model = hooked("qwen3")
    shown = run(model, lengths, [RotatingKVCache(WINDOW, keep=keep) for _ in range(2)])
    first, slots = 0, np.arange(0)
    for i, one in enumerate(shown):
        new = np.arange(first, first + lengths[i])
        size = WINDOW if lengths[i] == 1 else WINDOW - 1 + lengths[i]
        held = len(slots) + len(new)
        slots = np.concatenate([slots, new])
        if i and held > size:
            slots = np.concatenate([slots[:keep], slots[held - size + keep :]])
        # Seen by the slots' order, not by position: query j sees the slots from j on that are not after it.
        offset = min(WINDOW - 1, first)
        order = np.arange(len(slots))
        visible = np.zeros((len(new), new[-1] + 1), dtype=bool)
        for j in range(len(new)):
            seen = (order <= offset + j) & (order > offset + j - WINDOW) if len(new) > 1 else order >= 0
            visible[j, slots[seen]] = True
        k, v = (so_far(shown[: i + 1], part, 1) for part in ("rot_k", "v"))
        scores = oracle.scores_of(one["rot_q", 1], k, scale=HEAD_OF_32, visible=visible)
        pattern, _ = oracle.pattern_of(scores)
        close(one["attn_scores", 1], scores)
        close(one["pattern", 1], pattern)
        close(one["z", 1], oracle.z_of(pattern, v))
        first += lengths[i]


def test_from_projections_through_norm_and_rotation_to_what_attention_gets() -> None:
    model = hooked("qwen3")
    weights = oracle.weights_of(model.architecture.blocks[1]["self_attn"])
    rotary = oracle.Rotary(oracle.plain_wavelengths(32, 10000.0), interleaved=False)
    first = 0
    for one in run_form("qwen3", "decoding beyond the window"):
        positions = np.arange(first, first + one["q", 1].shape[1])
        for part in ("q", "k"):
            projected = (one["attn_in", 1] @ weights[f"{part}_proj.weight"].T).reshape(one[part, 1].shape)
            close(one[part, 1], projected)
            normed = oracle.rms_norm(projected, weights[f"{part}_norm.weight"], 1e-6)
            close(one[f"rot_{part}", 1], rotary(normed, positions))
        close(one["v", 1], (one["attn_in", 1] @ weights["v_proj.weight"].T).reshape(one["v", 1].shape))
        first = positions[-1] + 1


# ---------------------------------------------------------------------------------------------------------------------
# Latent attention, from the weights: several tokens and single ones show the same

YARN_SCALE = oracle.yarn_magnitude(8.0, 0.7) ** 2
LATENT_FORMS: dict[str, tuple[int, oracle.Latent, float]] = {
    # Architecture -> layer, how its heads are made, and the scale of the scores.
    "deepseek_v3": (
        1,
        oracle.Latent(4, 32, 16, 160, oracle.yarn(16, 10000.0, CONFIGURATIONS["deepseek_v3"]["rope_scaling"], True)),
        48**-0.5 * YARN_SCALE,
    ),
    "kimi_linear": (2, oracle.Latent(4, 64, 32, 128, None, eps=1e-5), 96**-0.5),
    "mistral4": (
        1,
        oracle.Latent(4, 64, 32, 128, oracle.yarn(32, 10000.0, CONFIGURATIONS["mistral4"]["rope_parameters"], True)),
        96**-0.5 * YARN_SCALE,
    ),
    "longcat_flash": (
        1,
        oracle.Latent(
            4,
            64,
            32,
            128,
            oracle.Rotary(oracle.plain_wavelengths(32, 10000.0), interleaved=True),
            eps=1e-5,
            q_scale=(64 / 160) ** 0.5,
            kv_scale=(64 / 128) ** 0.5,
        ),
        96**-0.5,
    ),
    "deepseek_v32": (
        1,
        oracle.Latent(4, 32, 16, 160, oracle.yarn(16, 10000.0, CONFIGURATIONS["deepseek_v32"]["rope_scaling"], True)),
        48**-0.5 * YARN_SCALE,
    ),
}


def latent_expectations(name: str, x: np.ndarray, turn: int) -> dict[str, np.ndarray]:
    """Heads, scores, pattern and z of a whole sequence, from the attention module's input [batch, pos, d_model]."""
    layer, form, scale = LATENT_FORMS[name]
    attn = hooked(name).architecture.blocks[layer]["self_attn"]
    weights = oracle.weights_of(attn[turn] if isinstance(attn, list) else attn)
    positions = np.arange(x.shape[1])
    q, k, v = form(weights, x, positions)
    if name == "mistral4":
        # The whole query grows by steps of 8 positions, the model's original length.
        q = q * (1 + 0.3 * np.log(1 + positions // 8))[:, None, None]
    visible = oracle.causal(positions, len(positions))
    if name == "deepseek_v32":
        scaling = CONFIGURATIONS[name]["rope_scaling"]
        rotary = oracle.yarn(16, 10000.0, scaling, interleaved=False)
        visible = oracle.selected(weights, x, form.low_rank_query(weights, x), rotary, n_heads=8, kept=8)
    scores = oracle.scores_of(q, k, scale=scale, visible=visible)
    pattern, _ = oracle.pattern_of(scores)
    heads = {"rot_q": q, "rot_k": k, "v": v, "z": oracle.z_of(pattern, v)}
    return heads | {"attn_scores": scores, "pattern": pattern}


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("name", LATENT_FORMS)
def test_latent_attention_shows_heads_as_the_formula_has_them(name: str, way: str) -> None:
    layer = LATENT_FORMS[name][0]
    shown = run_form(name, way)
    for turn in (0, 1) if name == "longcat_flash" else (0,):
        expected = latent_expectations(name, so_far(shown, "attn_in", layer, turn), turn)
        first = 0
        for one in shown:
            stop = first + one["rot_q", layer].shape[1]
            for part in ("rot_q", "rot_k", "v", "z"):
                close(one[part, layer, turn], expected[part][:, first:stop], 5e-5)
            for part in ("attn_scores", "pattern"):
                close(one[part, layer, turn], expected[part][:, :, first:stop, :stop], 5e-5)
            first = stop


@pytest.mark.parametrize("way", ["one pass", "decoding beyond the window"])
def test_sparse_attention_gives_exactly_nothing_to_keys_that_are_not_selected(way: str) -> None:
    shown = run_form("deepseek_v32", way)
    seen = np.concatenate([(one["pattern", 1] > 0).sum(-1) for one in shown], axis=2)
    np.testing.assert_array_equal(seen, np.broadcast_to(np.minimum(np.arange(20) + 1, 8), seen.shape))


# ---------------------------------------------------------------------------------------------------------------------
# Two loops through the layers, the second with keys of the first and of its own


@pytest.mark.parametrize("way", CALLS)
def test_a_second_loop_attends_to_the_first_ones_keys_and_to_its_own(way: str) -> None:
    model = hooked("iquestloopcoder")
    shown, first = run_form("iquestloopcoder", way), 0
    gates = oracle.weights_of(model.model)
    for i, one in enumerate(shown):
        q, stop = one["rot_q", 0, 1], first + one["rot_q", 0, 1].shape[1]
        z = []
        for turn, visible in ((0, oracle.causal), (1, functools.partial(oracle.window, size=WINDOW))):
            k, v = (so_far(shown[: i + 1], part, 0, turn) for part in ("rot_k", "v"))
            scores = oracle.scores_of(q, k, scale=HEAD_OF_32, visible=visible(np.arange(first, stop), stop))
            pattern, _ = oracle.pattern_of(scores)
            close(one["attn_scores", 0, turn + 1], scores)
            close(one["pattern", 0, turn + 1], pattern)
            z.append(oracle.z_of(pattern, v))
        weight, bias = (gates[f"model.gate_projections.0.{kind}"] for kind in ("weight", "bias"))
        gate = 1 / (1 + np.exp(-(np.einsum("bqhd,hd->bqh", q, weight.reshape(4, 32)) + bias)))[..., None]
        close(one["z", 0, 1], gate * z[0] + (1 - gate) * z[1])
        first = stop


# ---------------------------------------------------------------------------------------------------------------------
# Keys gathered for each query: queries, sink and z are shown, and no pattern


@pytest.mark.parametrize("lengths", [[8], [6, 1, 1, 1, 1, 1, 1], [7, 6, 3]])
def test_gathered_attention_shows_queries_sink_and_z(lengths: list[int]) -> None:
    model, shown, first = hooked("deepseek_v41"), [], 0
    caches = make_prompt_cache(model.model)
    weights = oracle.weights_of(model.architecture.blocks[0]["self_attn"])
    rotary = oracle.Rotary(oracle.plain_wavelengths(16, 10000.0), interleaved=True)
    rows = np.zeros((1, 0, 32))
    for length in lengths:
        tokens = [[(7 * p + 3) % 96 for p in range(first, first + length)]]
        shown.append(Shown(model.run_with_cache(tokens, ["*.attn.*"], kv_cache=caches)[1]))
        one = shown[-1]
        assert ("pattern", 0, 0) not in one
        # The last columns are rotated.
        turned = rotary(one["q", 0][..., 16:], np.arange(first, first + length))
        close(one["rot_q", 0], np.concatenate([one["q", 0][..., :16], turned], axis=-1))
        # In the first layer one row per position is key and value: what mlx-lm's cache holds of the last 8.
        rows = np.concatenate([rows, float64(caches[0].window)[:, -length:]], axis=1)
        first += length
        visible = oracle.window(np.arange(first - length, first), first, WINDOW)
        scores = oracle.scores_of(one["rot_q", 0], rows[:, :, None], scale=HEAD_OF_32, visible=visible)
        pattern, sink = oracle.pattern_of(scores, weights["sinks"])
        close(one["sink", 0], sink)
        close(one["z", 0], oracle.z_of(pattern, rows[:, :, None]))


@pytest.mark.parametrize("name", ["deepseek_v41", "gpt_oss"])
def test_a_sinks_mass_is_read_only(name: str) -> None:
    with pytest.raises(HookError, match="hook_sink can be read but not replaced: .* edit the pattern"):
        run(hooked(name), [3], None, {"blocks.0.attn.hook_sink": lambda value: value * 0})


# ---------------------------------------------------------------------------------------------------------------------
# Edited keys and values stay in the KV cache


@pytest.mark.parametrize("part", ["rot_k", "v"])
@pytest.mark.parametrize(
    "name", ["llama", "plamo", "gemma3_text", "gpt_oss", "llama4", "gemma2", "gear", "gemma4_text"]
)
def test_later_calls_attend_to_edited_keys_and_values(name: str, part: str) -> None:
    model = hooked(name)
    caches, plain_caches = make_prompt_cache(model.model), make_prompt_cache(model.model)
    layer = FORMS[name][0].layer
    edits = {f"blocks.{layer}.attn.hook_{part}": lambda value: np.roll(value, 3, axis=-1) * 1.3}
    plain = [run(model, [6], plain_caches)[0]]
    shown = [run(model, [6], caches, edits)[0]]
    np.testing.assert_allclose(
        shown[0][part, layer], np.roll(plain[0][part, layer], 3, axis=-1) * 1.3, rtol=1e-6, atol=1e-6
    )
    for tokens in ([[5]], [[8]], [[1, 4, 2]], [[7]]):
        shown.append(Shown(model.run_with_cache(tokens, ["*.attn.*"], kv_cache=caches)[1]))
    for rule in FORMS[name]:
        check_calls(model, shown, rule)


# ---------------------------------------------------------------------------------------------------------------------
# A quantised KV cache

GROUP = 32


def quantized_cache(model: HookedModel, bits: int) -> list:
    """As mlx-lm's ``kv_bits``: plain KV caches are quantised, others left as they are."""
    caches = make_prompt_cache(model.model)
    return [QuantizedKVCache(GROUP, bits) if type(cache) is KVCache else cache for cache in caches]


def held(cache: QuantizedKVCache) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values that a quantised cache holds, [batch, key, kv_head, d_head]."""
    return tuple(
        oracle.dequantized(packed, GROUP, cache.bits)[:, :, : cache.offset].swapaxes(1, 2)
        for packed in (cache.keys, cache.values)
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lengths", [[6], [6, 1, 1, 1], [6, 1, 5, 3]])
@pytest.mark.parametrize(("name", "layer"), [("qwen3", 0), ("qwen3", 1), ("llama", 1), ("gpt2", 1)])
def test_a_quantised_cache_shows_what_attention_reads_from_it(
    name: str, layer: int, lengths: list[int], bits: int
) -> None:
    model = hooked(name)
    caches = quantized_cache(model, bits)
    shown = run(model, lengths, caches, names=["*.attn.*", "*.hook_attn_out"])
    k, v = held(caches[layer])
    np.testing.assert_allclose(so_far(shown, "rot_k", layer), k, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(so_far(shown, "v", layer), v, rtol=1e-5, atol=1e-6)
    rule = Rule(layer, HEAD_OF_32)
    check_calls(model, shown, rule)
    if layer == 0:
        # The same numbers as without quantisation, up to half a step of it.
        exact = run(model, [sum(lengths)])[0]
        step = float64(caches[0].keys[1]).max()
        assert 0 < np.abs(exact["rot_k", 0] - so_far(shown, "rot_k", 0)).max() <= step
    out = model.architecture.blocks[layer].get("self_attn") or model.architecture.blocks[layer]["attn"]
    weights = oracle.weights_of(out)
    at = "o_proj" if "o_proj.weight" in weights else "c_proj"
    for one in shown:
        z = one["z", layer].reshape(*one["z", layer].shape[:2], -1)
        close(one["attn_out", layer], z @ weights[f"{at}.weight"].T + weights.get(f"{at}.bias", 0), 5e-5)


@pytest.mark.parametrize("name", sorted(set(CONFIGURATIONS) - {*NEEDS_METAL, *WITHOUT_ATTENTION, "phi3small"}))
def test_a_quantised_cache_works_where_it_works_in_mlx_lm(name: str) -> None:
    model = hooked(name)

    def answers(hooks: list) -> list[Any]:
        caches, found = quantized_cache(model, 8), []
        for tokens in ([[5]], [[3, 9, 2]], [[7]]):
            try:
                with model.hooks(hooks):
                    found.append(float64(model.model(mx.array(tokens), cache=caches)))
            except Exception as error:  # whatever mlx-lm itself raises
                return [*found, (type(error), str(error))]
        return found

    hooks = [("*.attn.*", lambda value, point: None)]
    for plain, hooked_ in zip(answers([]), answers(hooks), strict=True):
        np.testing.assert_array_equal(hooked_, plain)


# ---------------------------------------------------------------------------------------------------------------------
# Edits of scores and pattern replace what attention uses

HEAD = 1


def bent_scores(row: int) -> Edit:
    def bend(scores: np.ndarray) -> np.ndarray:
        new = scores.copy()
        new[:, HEAD, row] = np.where(np.isfinite(scores[:, HEAD, row]), 0.3 - 2 * scores[:, HEAD, row], -np.inf)
        return new

    return bend


def bent_pattern(row: int) -> Edit:
    """Rows of an edited pattern need not sum to 1."""

    def bend(pattern: np.ndarray) -> np.ndarray:
        new = pattern.copy()
        new[:, HEAD, row] = np.where(pattern[:, HEAD, row] > 0, 0.7 * pattern[:, HEAD, row] + 0.05, 0)
        return new

    return bend


def check_edit(
    edited: Shown,
    plain: Shown,
    at: tuple[int, int],
    part: str,
    scores: np.ndarray,
    v: np.ndarray,
    row: int,
    sinks: np.ndarray | None = None,
    tiled: bool = False,
    tolerance: float = 5e-5,
) -> None:
    """Scores, pattern and z of a call in which ``part`` was edited; ``scores`` and ``v`` are those of the formula."""
    if part == "attn_scores":
        scores = bent_scores(row)(scores)
    pattern, _ = oracle.pattern_of(scores, sinks)
    if part == "pattern":
        pattern = bent_pattern(row)(pattern)
    close(edited[("attn_scores", *at)], scores, tolerance)
    close(edited[("pattern", *at)], pattern, tolerance)
    close(edited[("z", *at)], oracle.z_of(pattern, v, tiled), tolerance)
    assert np.abs(edited[("z", *at)] - plain[("z", *at)])[:, row, HEAD].max() > 1e-3
    logits = edited["logits", None], plain["logits", None]
    finite = np.isfinite(logits[1])
    change = np.abs(np.where(finite, logits[0], 0) - np.where(finite, logits[1], 0)).max((0, 2))
    assert change[row] > 1e-4
    assert (change[:row] < 1e-3 * change.max() + 1e-5).all()


@pytest.mark.parametrize("part", ["attn_scores", "pattern"])
@pytest.mark.parametrize("way", ["one pass", "decoding beyond the window", "chunks"])
@pytest.mark.parametrize("name", FORMS)
def test_attention_uses_edited_scores_and_patterns(name: str, way: str, part: str) -> None:
    plain, length = run_form(name, way), calls_of(name, way)[-1]
    row = length // 2
    for rule in FORMS[name]:
        edit = bent_scores(row) if part == "attn_scores" else bent_pattern(row)
        shown = run_form(name, way, {f"blocks.{rule.layer}.attn.hook_{part}": edit})
        at = rule.layer, 0
        k, v = (so_far(shown, heads, *at) for heads in ("rot_k", "v"))
        scores = rule.scores(shown[-1][("rot_q", *at)], k, k.shape[1] - length)
        sinks = rule.sink_weights(hooked(name))
        check_edit(shown[-1], plain[-1], at, part, scores, v, row, sinks, rule.tiled)


@pytest.mark.parametrize("part", ["attn_scores", "pattern"])
@pytest.mark.parametrize("way", ["one pass", "decoding beyond the window", "chunks"])
@pytest.mark.parametrize("name", LATENT_FORMS)
def test_latent_attention_uses_edited_scores_and_patterns(name: str, way: str, part: str) -> None:
    plain, length = run_form(name, way), CALLS[way][0][-1]
    row, layer = length // 2, LATENT_FORMS[name][0]
    edit = bent_scores(row) if part == "attn_scores" else bent_pattern(row)
    shown = run_form(name, way, {f"blocks.{layer}.attn.hook_{part}": edit})
    expected = latent_expectations(name, so_far(shown, "attn_in", layer), 0)
    scores = expected["attn_scores"][:, :, -length:]
    check_edit(shown[-1], plain[-1], (layer, 0), part, scores, expected["v"], row)


@pytest.mark.parametrize("part", ["attn_scores", "pattern"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lengths", [[6, 1], [6, 4]])
def test_attention_over_a_quantised_cache_uses_edited_scores_and_patterns(
    lengths: list[int], bits: int, part: str
) -> None:
    model, row, rule = hooked("qwen3"), lengths[-1] // 2, Rule(1, HEAD_OF_32)
    plain = run(model, lengths, quantized_cache(model, bits))
    edit = bent_scores(row) if part == "attn_scores" else bent_pattern(row)
    caches = quantized_cache(model, bits)
    shown = run(model, lengths, caches, {f"blocks.1.attn.hook_{part}": edit})
    k, v = held(caches[1])
    scores = rule.scores(shown[-1]["rot_q", 1], k, 6)
    check_edit(shown[-1], plain[-1], (1, 0), part, scores, v, row)


# ---------------------------------------------------------------------------------------------------------------------
# Half precision


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("way", ["one pass", "decoding beyond the window"])
@pytest.mark.parametrize("name", ["llama", "plamo", "cohere2", "gemma2", "gear", "olmo"])
def test_half_precision_patterns_are_float32_and_sum_to_one(name: str, way: str, dtype: mx.Dtype) -> None:
    model, eps = hooked(name, dtype), mx.finfo(dtype).eps
    shown = run_form(name, way, dtype=dtype)
    for one in shown:
        assert one.dtypes["attn_scores"] == one.dtypes["pattern"] == mx.float32
        for rule in FORMS[name]:
            total = one["pattern", rule.layer].sum(-1) + (one["sink", rule.layer] if rule.sinks else 0)
            np.testing.assert_allclose(total, 1, atol=1e-5)
    for rule in FORMS[name]:
        first = 0
        for i, one in enumerate(shown):
            k, v = (so_far(shown[: i + 1], part, rule.layer) for part in ("rot_k", "v"))
            scores = rule.scores(one["rot_q", rule.layer], k, first)
            pattern, _ = oracle.pattern_of(scores, rule.sink_weights(model))
            # The fused kernel's scores are made beside it in float32; those written out are the model's own.
            tolerance = 8 * eps if rule.cap or name in ONE_BY_ONE else 2e-5
            close(one["attn_scores", rule.layer], scores, tolerance)
            close(one["pattern", rule.layer], pattern, 2 * tolerance)
            close(one["z", rule.layer], oracle.z_of(pattern, v, rule.tiled), 8 * eps)
            first += one["rot_q", rule.layer].shape[1]


# ---------------------------------------------------------------------------------------------------------------------
# The fused kernel itself, and what is computed beside it, where MLX was once reported wrong


@dataclass(frozen=True)
class Kernel:
    """The inputs of the fused kernel, [batch, head, pos, d_head], and the sequence as the oracle has it."""

    n_queries: int
    n_keys: int
    dtype: mx.Dtype = mx.float32
    n_heads: int = 4
    n_key_value_heads: int = 2
    d_head: int = 16
    scale: float = 0.3
    arrays: list[mx.array] = field(default_factory=list)

    def __post_init__(self) -> None:
        mx.random.seed(0)
        for heads, length in (
            (self.n_heads, self.n_queries),
            (self.n_key_value_heads, self.n_keys),
            (self.n_key_value_heads, self.n_keys),
        ):
            array = mx.random.normal((2, length, heads, self.d_head)).astype(self.dtype)
            self.arrays.append(array.transpose(0, 2, 1, 3))

    def fused(self, rows: slice = slice(None), **options: Any) -> np.ndarray:
        q, k, v = self.arrays
        z = mx.fast.scaled_dot_product_attention(q[:, :, rows], k, v, scale=self.scale, **options)
        return float64(z).swapaxes(1, 2)

    def beside(self, mask: Any = None, sinks: mx.array | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The engine's scores, its pattern, and z of that pattern."""
        q, k, v = self.arrays
        scores = attention_scores(q, k, scale=self.scale, mask=mask)
        pattern = float64(attention_pattern(scores, sinks, mask=mask)[0])
        return float64(scores), pattern, oracle.z_of(pattern, float64(v).swapaxes(1, 2))

    def expected(self, visible: np.ndarray, sinks: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        q, k, v = (float64(array).swapaxes(1, 2) for array in self.arrays)
        scores = oracle.scores_of(q, k, scale=self.scale, visible=visible)
        pattern, _ = oracle.pattern_of(scores, sinks)
        return scores, pattern, oracle.z_of(pattern, v)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_sink_weighs_the_same_for_one_query_and_for_many(dtype: mx.Dtype) -> None:
    # Reported of MLX: one query and many gave different results.
    kernel, sinks = Kernel(34, 34, dtype), mx.array([0.7, -1.1, 2.3, 0.2])
    scores, pattern, z = kernel.expected(np.ones((34, 34), dtype=bool), float64(sinks.astype(dtype)))
    tolerance = max(1e-5, 8 * mx.finfo(dtype).eps)
    close(kernel.fused(sinks=sinks.astype(dtype)), z, tolerance)
    for row in (0, 33):
        close(kernel.fused(slice(row, row + 1), sinks=sinks.astype(dtype)), z[:, row : row + 1], tolerance)
    got = kernel.beside(sinks=sinks.astype(dtype))
    for value, expected in zip(got, (scores, pattern, z), strict=True):
        close(value, expected)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(1, 7), (3, 7), (6, 7), (9, 40), (7, 7)])
def test_a_causal_mask_ends_with_the_last_query_at_the_last_key(n_queries: int, n_keys: int) -> None:
    # Not as in PyTorch, where the first query stands at the first key.
    kernel = Kernel(n_queries, n_keys)
    visible = oracle.causal(np.arange(n_keys - n_queries, n_keys), n_keys)
    expected = kernel.expected(visible)
    close(kernel.fused(mask="causal"), expected[2])
    for value, wanted in zip(kernel.beside("causal"), expected, strict=True):
        close(value, wanted)


def closed_rows(kind: str, dtype: mx.Dtype) -> tuple[Any, np.ndarray]:
    """A mask that leaves some queries without a key, and which keys it leaves visible."""
    visible = np.tril(np.ones((5, 5), dtype=bool))
    visible[[1, 3]] = False
    if kind == "boolean":
        return mx.array(visible), visible
    lowest = mx.finfo(dtype).min if kind == "lowest number" else -mx.inf
    return mx.where(mx.array(visible), 0.0, lowest).astype(dtype), visible


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("kind", ["boolean", "lowest number", "minus infinity"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_query_without_keys_shows_what_the_kernel_makes_of_it(kind: str, dtype: mx.Dtype, with_sinks: bool) -> None:
    # Reported of MLX: not what the formula gives, and once NaN.
    kernel = Kernel(5, 5, dtype)
    mask, visible = closed_rows(kind, dtype)
    sinks = mx.array([0.7, -1.1, 2.3, 0.2]).astype(dtype) if with_sinks else None
    fused = kernel.fused(mask=mask, sinks=sinks)
    scores, pattern, z = kernel.beside(mask, sinks)
    np.testing.assert_array_equal(np.isneginf(scores), np.broadcast_to(~visible, scores.shape))
    closed = pattern[:, :, [1, 3]]
    if with_sinks:
        np.testing.assert_array_equal(closed, 0)
    elif kind == "minus infinity":
        assert np.isnan(closed).all()
    else:
        np.testing.assert_array_equal(closed, np.float32(1 / 5))
    np.testing.assert_array_equal(np.isnan(fused), np.isnan(z))
    np.testing.assert_allclose(fused, z, atol=max(1e-5, 8 * mx.finfo(dtype).eps) * np.nanmax(np.abs(z)))


def test_a_causal_mask_leaves_queries_before_the_first_key_all_keys_alike() -> None:
    # More queries than keys.
    kernel = Kernel(6, 4)
    _, pattern, z = kernel.beside("causal")
    np.testing.assert_array_equal(pattern[:, :, :2], np.float32(1 / 4))
    close(kernel.fused(mask="causal"), z)


@pytest.mark.parametrize(("name", "cls"), [("qwen3", KVCache), ("gemma2", KVCache), ("qwen3", QuantizedKVCache)])
@pytest.mark.parametrize("part", ["attn_scores", "pattern"])
def test_a_row_put_back_where_every_key_is_masked_changes_nothing(name: str, cls: type, part: str) -> None:
    mask, visible = closed_rows("boolean", mx.float32)

    class Closed(cls):
        def make_mask(self, *args: Any, **options: Any) -> mx.array:
            return mask

    def caches() -> list:
        return [Closed(GROUP, 8) if cls is QuantizedKVCache else Closed() for _ in range(2)]

    plain = run(hooked(name), [5], caches())[0]
    hidden = np.broadcast_to(~visible, plain["pattern", 1].shape)
    np.testing.assert_array_equal(np.isneginf(plain["attn_scores", 1]), hidden)
    np.testing.assert_allclose(plain["pattern", 1][:, :, [1, 3]], 1 / 5, rtol=1e-6)
    same = run(hooked(name), [5], caches(), {f"blocks.*.attn.hook_{part}": lambda value: value})[0]
    close(same["logits", None], plain["logits", None])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_heads_of_a_transposed_projection_are_read_as_heads(dtype: mx.Dtype) -> None:
    # Reported of MLX as wrong scores: [batch, pos, head, d_head] seen from the kernel's side, with many positions.
    size = 2 * 82 * 8 * 64
    projected = (mx.arange(size, dtype=mx.float32) / size - 0.5).reshape(2, 82, 8, 64).astype(dtype)
    heads = projected.transpose(0, 2, 1, 3)
    x = float64(projected)
    scores = oracle.scores_of(x, x, scale=0.125, visible=np.array(True))
    pattern, _ = oracle.pattern_of(scores)
    tolerance = max(1e-5, 8 * mx.finfo(dtype).eps)
    fused = mx.fast.scaled_dot_product_attention(heads, heads, heads, scale=0.125)
    close(float64(fused).swapaxes(1, 2), oracle.z_of(pattern, x), tolerance)
    got = attention_scores(heads, heads, scale=0.125, mask=None)
    close(float64(got), scores)
    close(float64(attention_pattern(got)[0]), pattern)


@pytest.mark.parametrize(
    ("name", "quantised"),
    [
        *((name, False) for name in ("llama", "gpt_oss", "gemma2", "gear", "deepseek_v32", "deepseek_v41")),
        ("qwen3", True),
    ],
)
@pytest.mark.parametrize("positions", ["last", [14, 12]])
def test_single_query_rows_are_those_of_the_whole(name: str, quantised: bool, positions: Any) -> None:
    model = hooked(name)
    shown = []
    for asked in (None, positions):
        caches = quantized_cache(model, 8) if quantised else make_prompt_cache(model.model)
        run(model, [12], caches)
        names = [n for n in model.hook_points if n.endswith(("hook_attn_scores", "hook_pattern", "hook_sink"))]
        shown.append(Shown(model.run_with_cache([[5, 9, 2]], names, asked, caches)[1]))
    rows = [2] if positions == "last" else [2, 0]
    assert shown[1].arrays
    for key, array in shown[1].arrays.items():
        close(array, shown[0][key][:, :, rows], 1e-6)


@pytest.mark.parametrize("name", ["iquestloopcoder", "llama", "deepseek_v3", "gemma2"])
def test_what_breaks_off_inside_attention_is_not_seen_by_other_models(name: str) -> None:
    model, other = hooked(name), hooked("qwen3")
    own = other([5, 9, 2])

    def breaks(value: mx.array, point: Any) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        model.run_with_hooks([5, 9, 2], [("blocks.0.attn.hook_pattern", breaks)])
    seen: list[str] = []
    # The kernel of the layers before is met by nobody of this model.
    watch = [("blocks.1.attn.hook_z", lambda value, point: seen.append(point.name))]
    assert mx.array_equal(other.run_with_hooks([5, 9, 2], watch), own)
    assert seen == ["blocks.1.attn.hook_z"]
