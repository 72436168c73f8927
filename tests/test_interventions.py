"""Every intervention does what NumPy recomputes, while reading the prompt and while generating."""

import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every_architecture import FALCON_H1, needs_block_sparse
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from reference import forward
from tiny_models import CONFIGS, make_model

from mlx_hooks import CapturedActivation, HookedModel, HookError, HookPoint, Intervention
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.interventions import TYPES

PROMPT = [1, 5, 9, 3, 7, 2]
LENGTH = 10
"""Positions of a run that generates five tokens, of which four are fed."""
RNG = np.random.default_rng(0)
Array = np.ndarray
SPREAD = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    """Four heads, two key-value heads."""
    return HookedModel(make_model("llama"))


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2"])
def model(request: pytest.FixtureRequest) -> HookedModel:
    return HookedModel(make_model(request.param))


# The oracle


def normal(seed: int, name: str, outer: list[int], shape: list[int]) -> Array:
    """One row of noise, as docs/design.md says: SplitMix64 over seed, name and indices is the key."""
    state = 0
    for part in [seed, zlib.crc32(name.encode()), *outer]:
        x = ((state ^ part) + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        state = x ^ (x >> 31)
    return np.array(mx.random.normal(shape, key=mx.array([state >> 32, state % 2**32], mx.uint32)))


def noise(seed: int, name: str, value: Array, axes: tuple[str, ...]) -> Array:
    made = np.empty_like(value)
    if axes[-1] == "key":
        for b, q, k in np.ndindex(value.shape[0], *value.shape[2:]):
            made[b, :, q, k] = normal(seed, name, [b, q, k], [value.shape[1]])
        return made
    for at in np.ndindex(value.shape[: axes.index("pos") + 1]):
        made[at] = normal(seed, name, list(at), list(value.shape[len(at) :]))
    return made


def selected(value: Array, axes: tuple[str, ...], spec: dict[str, Any]) -> Array:
    """Which entries an intervention means, for a whole sequence whose prompt is PROMPT."""
    mask = np.ones(value.shape, bool)
    first, stop = {"prefill": (0, len(PROMPT)), "decode": (len(PROMPT), 10**9), None: (0, 10**9)}[spec.get("phase")]
    for axis, name in enumerate(axes):
        ids = np.arange(value.shape[axis])
        if name in ("pos", "query"):
            keep = (ids >= first) & (ids < stop)
            if spec.get("positions") is not None:
                keep &= np.isin(ids, spec["positions"])
        else:
            key = {"head": "heads", "key": "keys", "batch": ""}.get(name, "neurons")
            keep = np.isin(ids, spec[key]) if spec.get(key) is not None else np.ones(len(ids), bool)
        mask &= keep.reshape([-1 if i == axis else 1 for i in range(value.ndim)])
    if axes[-1] == "key":
        mask &= np.tril(np.ones(value.shape[-2:], bool)) & (value != -np.inf)
    return mask


def expected_edit(spec: dict[str, Any], point: HookPoint, norms: dict[str, list[float]]) -> Callable[[Array], Array]:
    def edit(value: Array) -> Array:
        mask = selected(value, point.axes, spec)
        with np.errstate(invalid="ignore"):
            new = np.where(mask, change(value, mask), value)
        for side, x in (("before", value), ("after", new)):
            norms[side].append(float((x[mask & (x != -np.inf)] ** 2).sum()))
        return new

    def change(h: Array, mask: Array) -> Array:
        kind = spec["type"]
        if kind == "zero":
            return np.zeros_like(h)
        if kind == "scale":
            return h * spec["factor"]
        if kind == "clamp":
            return np.minimum(np.maximum(h, spec["min"]), spec["max"])
        if kind == "noise":
            return h + spec["std"] * noise(spec["seed"], point.name, h, point.axes)
        if kind != "add":
            return np.broadcast_to(spec["values"], h.shape)
        v = np.zeros(h.shape[-1])
        v[spec.get("neurons", slice(None))] = spec["vector"]
        v = np.broadcast_to(v, h.shape)
        if spec.get("norm_match"):
            length = np.sqrt(np.where(mask, h**2, 0).sum(-1, keepdims=True))
            v = v * length / np.sqrt(np.where(mask, v**2, 0).sum(-1, keepdims=True) + 1e-300)
        return h + spec["coefficient"] * v

    return edit


def compare(model: HookedModel, specs: list[dict[str, Any]], oracle: nn.Module | None = None, **tolerance: Any) -> Any:
    """Generate with interventions and recompute the whole sequence; the logits of every position must agree."""
    result = model.generate(PROMPT, max_tokens=5, interventions=specs, capture=["hook_logits"])
    sequence = [PROMPT + result.tokens[:-1]]
    norms: list[dict[str, list[float]]] = [{"before": [], "after": []} for _ in specs]
    edits: dict[str, Callable[[Array], Array]] = {}
    for spec, squares in zip(specs, norms, strict=True):
        for point in model.resolve_interventions([spec]).asked[0][1]:
            one, before = expected_edit(spec, point, squares), edits.get(point.name, lambda value: value)
            edits[point.name] = lambda value, one=one, before=before: one(before(value))
    expected = forward(oracle or model.model, sequence, edits)["hook_logits"]
    plain = forward(oracle or model.model, sequence)["hook_logits"]
    assert not np.allclose(expected, plain, atol=1e-2), f"{specs} do nothing: the test cannot fail"
    np.testing.assert_allclose(result.cache.numpy("hook_logits"), expected, **(tolerance or SPREAD))
    for receipt, squares in zip(result.interventions, norms, strict=True):
        rtol = tolerance.get("rtol", 1e-3)
        assert receipt.norm_before == pytest.approx(sum(squares["before"]) ** 0.5, rel=rtol)
        assert receipt.norm_after == pytest.approx(sum(squares["after"]) ** 0.5, rel=rtol, abs=1e-6)
    return result


def specs_of(kind: str) -> dict[str, Any]:
    """The numbers of a type, from one number to whatever broadcasts to any selection."""
    return {
        "zero": {},
        "mean": {"values": 0.25},
        "set": {"values": 0.3},
        "patch": {"values": -0.2},
        "add": {"vector": 0.5, "coefficient": 1.5},
        "scale": {"factor": 0.4},
        "clamp": {"min": 0.02, "max": 0.15},
        "noise": {"std": 0.5, "seed": 7},
    }[kind] | {"type": kind}


POINTS = ["hook_embed", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_v",
          "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z",
          "blocks.2.mlp.hook_post", "blocks.1.hook_resid_post"]  # fmt: skip


@pytest.mark.parametrize("phase", ["prefill", "decode", None])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", POINTS)
def test_every_type_at_every_kind_of_point(llama: HookedModel, name: str, kind: str, phase: str | None) -> None:
    if "scores" in name and kind in ("scale", "clamp"):
        kind_spec = specs_of(kind) | ({"factor": -2.0} if kind == "scale" else {"min": -0.3, "max": 0.5})
    else:
        kind_spec = specs_of(kind)
    if name.endswith("attn_scores") and kind in ("zero", "mean", "set", "patch", "add"):
        # The same number in a whole row is nothing to the softmax.
        kind_spec |= {"keys": [0, 2, 7]}
    result = compare(llama, [kind_spec | {"hook_point": name, "phase": phase}])
    phases = ("prefill", "decode") if phase is None else (phase,)
    assert result.interventions[0].phases == phases
    first, stop = (0, LENGTH) if phase is None else (0, 6) if phase == "prefill" else (6, LENGTH)
    assert result.interventions[0].positions == tuple(range(first, stop))
    # The prompt goes in two calls: all but the last token, and the last.
    assert result.interventions[0].fired == (2 if phase != "decode" else 0) + (4 if phase != "prefill" else 0)


@pytest.mark.parametrize("kind", ["zero", "scale", "noise", "add"])
def test_other_architectures(model: HookedModel, kind: str) -> None:
    for name in ("blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.0.hook_resid_post"):
        # A norm takes away what is the same for a whole vector.
        some = {"neurons": [0, 3, 5]} if "resid" in name else {}
        compare(model, [specs_of(kind) | some | {"hook_point": name}])


@pytest.mark.parametrize(
    "spec",
    [
        {"hook_point": "blocks.1.attn.hook_z", "heads": [1, 3]},
        {"hook_point": "blocks.1.attn.hook_z", "heads": [2], "neurons": [0, 5], "positions": [1, 4, 8]},
        {"hook_point": "blocks.1.attn.hook_k", "heads": [1], "positions": [0, 5]},
        {"hook_point": "blocks.1.attn.hook_v", "heads": [0], "phase": "decode"},
        {"hook_point": "blocks.1.attn.hook_pattern", "heads": [3], "positions": [2, 5, 6]},
        {"hook_point": "blocks.1.attn.hook_pattern", "heads": [3], "keys": [0, 4], "positions": [4, 5, 7]},
        {"hook_point": "blocks.2.mlp.hook_post", "neurons": [0, 7, 47], "positions": [5, 6]},
        {"hook_point": "blocks.0.hook_resid_post", "neurons": [31], "phase": "prefill"},
        {"hook_point": "blocks.*.hook_resid_post", "positions": [3, 7]},
    ],
)
@pytest.mark.parametrize("kind", ["zero", "add", "scale", "noise"])
def test_limits(llama: HookedModel, spec: dict[str, Any], kind: str) -> None:
    strong = {"add": {"vector": 3.0}, "scale": {"factor": 4.0}, "noise": {"std": 4.0}, "zero": {}}[kind]
    result = compare(llama, [specs_of(kind) | strong | spec])
    if "positions" in spec:
        assert result.interventions[0].positions == tuple(spec["positions"])


def test_spellings_of_a_selection_mean_the_same(llama: HookedModel) -> None:
    name = "blocks.1.attn.hook_z"
    runs = [
        llama.run_with_cache(PROMPT, "hook_logits", interventions=[Intervention(name, "zero", positions=p, heads=h)])[0]
        for p, h in [
            ([2, 3, 4], [1]),
            ({"start": 2, "stop": 5}, 1),
            (slice(2, 5), {"start": 1, "stop": 2}),
            (np.arange(2, 5), np.array([1])),
            (range(2, 5), range(1, 2)),
            ((4, 3, 2), (np.int64(1),)),
        ]
    ]
    assert all(mx.array_equal(run, runs[0]) for run in runs)


def test_layer_and_component_name_a_place(llama: HookedModel) -> None:
    byname, byrest = (
        llama.run_with_cache(PROMPT, "hook_logits", interventions=[place | {"type": "scale", "factor": 2.0}])
        for place in (
            {"hook_point": "blocks.1.hook_mlp_out"},
            {"layer_name": "transformer.h.1", "component": "mlp"},
        )
    )
    assert mx.array_equal(byname[0], byrest[0])
    assert byrest[1].interventions[0].hook_points == ("blocks.1.hook_mlp_out",)


def test_aliases_and_globs(llama: HookedModel) -> None:
    specs = [{"hook_point": p, "type": "zero"} for p in ("layers_output[1]", "blocks.*.attn.hook_z", "model.norm")]
    plan = llama.resolve_interventions(specs)
    assert [[point.name for point in points] for _, points in plan.asked] == [
        ["blocks.1.hook_resid_post"],
        [f"blocks.{i}.attn.hook_z" for i in range(3)],
        ["model.norm.output"],
    ]


def test_last_is_the_prompts_last_token_and_each_generated_one(llama: HookedModel) -> None:
    spec = {"hook_point": "blocks.1.hook_resid_post", "type": "scale", "factor": 3.0}
    for phase, positions in [("prefill", (5,)), ("decode", (6, 7, 8, 9)), (None, (5, 6, 7, 8, 9))]:
        result = llama.generate(PROMPT, max_tokens=5, interventions=[spec | {"positions": "last", "phase": phase}])
        assert result.interventions[0].positions == positions
    compare(llama, [spec | {"positions": [5, 6, 7, 8, 9]}])
    listed = llama.generate(PROMPT, max_tokens=5, interventions=[spec | {"positions": [5, 6, 7, 8, 9]}], capture="*")
    last = llama.generate(PROMPT, max_tokens=5, interventions=[spec | {"positions": "last"}], capture="*")
    assert all(mx.array_equal(last.cache[name], listed.cache[name]) for name in listed.cache)


@pytest.mark.parametrize(("bits", "kind"), [(4, "zero"), (4, "add"), (8, "scale"), (8, "noise"), (8, "set")])
def test_quantised_models(bits: int, kind: str) -> None:
    config = CONFIGS["llama"] | {"intermediate_size": 64}
    raw = make_model(config)
    nn.quantize(raw, group_size=32, bits=bits)
    model = HookedModel(raw)
    assert model.cfg.quantization is not None
    oracle = make_model(config)
    _dequantise(raw, oracle)
    for name in ("blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern", "blocks.1.hook_resid_post"):
        compare(model, [specs_of(kind) | {"hook_point": name, "positions": [3, 5, 7]}], oracle, rtol=2e-3, atol=2e-3)


def _dequantise(source: nn.Module, target: nn.Module) -> None:
    """Write into ``target`` the numbers that the quantised weights of ``source`` stand for."""
    modules = dict(source.named_modules())
    for path, module in target.named_modules():
        mine = modules[path]
        if "scales" in mine:
            settings = {"group_size": mine.group_size, "bits": mine.bits}
            module.weight = mx.dequantize(mine.weight, mine.scales, mine.biases, **settings)
        elif "weight" in mine:
            module.weight = mine.weight


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kind", TYPES)
def test_half_precision_is_rounded_once(dtype: mx.Dtype, kind: str) -> None:
    model = HookedModel(make_model("llama", dtype=dtype))
    name = "blocks.1.hook_resid_post"
    _, plain = model.run_with_cache(PROMPT, name)
    spec = specs_of(kind) | {"hook_point": name, "positions": [1, 4]}
    _, cache = model.run_with_cache(PROMPT, name, interventions=[spec])
    point = model.hook_points[name]
    whole = expected_edit(spec, point, {"before": [], "after": []})(plain.numpy(name).astype(np.float64))
    assert cache[name].dtype == dtype
    step = 2.0**-8 if dtype == mx.bfloat16 else 2.0**-11
    np.testing.assert_allclose(cache.numpy(name), whole, rtol=1.01 * step, atol=1e-7)
    untouched = [0, 2, 3, 5]
    assert mx.array_equal(cache[name][:, untouched], plain[name][:, untouched])


# Values, sources, means, vectors


def test_values_follow_the_order_of_what_is_listed(llama: HookedModel) -> None:
    values = RNG.normal(size=(3, 2, 4)).astype(np.float32)
    spec = {"hook_point": "blocks.1.attn.hook_z", "type": "set", "positions": [8, 1, 6], "heads": [3, 0],
            "neurons": {"start": 2, "stop": 6}, "values": values.tolist()}  # fmt: skip
    result = llama.generate(PROMPT, max_tokens=5, interventions=[spec], capture=["blocks.1.attn.hook_z"])
    got = result.cache.numpy("blocks.1.attn.hook_z")[0]
    for i, position in enumerate([8, 1, 6]):
        for j, head in enumerate([3, 0]):
            np.testing.assert_array_equal(got[position, head, 2:6], values[i, j])
    plain = llama.generate(PROMPT, max_tokens=5, capture=["blocks.1.attn.hook_z"]).cache.numpy("blocks.1.attn.hook_z")
    np.testing.assert_array_equal(got[1, 0, :2], plain[0, 1, 0, :2])


def test_a_steering_vector_with_norm_matching(llama: HookedModel) -> None:
    vector = RNG.normal(size=32).astype(np.float32)
    spec = {"hook_point": "blocks.1.hook_resid_post", "type": "add", "vector": vector, "coefficient": 0.7}
    compare(llama, [spec])
    compare(llama, [spec | {"norm_match": True}])
    compare(llama, [spec | {"norm_match": True, "positions": [2, 5, 7]}])
    # Norms are over the selected neurons.
    some = {"positions": [2, 5, 7], "neurons": [0, 4, 9], "vector": vector[:3], "coefficient": 5.0}
    result = compare(llama, [spec | some | {"norm_match": True}])
    assert result.interventions[0].norm_before is not None
    heads = {"hook_point": "blocks.1.attn.hook_z", "type": "add", "vector": RNG.normal(size=8), "norm_match": True}
    compare(llama, [heads | {"coefficient": -2.0, "heads": [1, 2]}])


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern",
                                  "blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_rot_k"])  # fmt: skip
def test_patching_from_another_run(llama: HookedModel, name: str) -> None:
    other = [4, 8, 15, 16, 23, 42]
    _, source = llama.run_with_cache(other, name)
    spec = {"hook_point": name, "type": "patch", "positions": [1, 3, 5]}
    if "head" in llama.hook_points[name].axes:
        spec["heads"] = [1]
    theirs = forward(llama.model, [other])[name]

    def patch(value: Array) -> Array:
        fitted = np.zeros_like(value)
        fitted[tuple(slice(n) for n in theirs.shape)] = theirs
        return np.where(selected(value, llama.hook_points[name].axes, spec), fitted, value)

    results = [
        llama.generate(PROMPT, max_tokens=5, interventions=[spec | {"source": one}], capture=["hook_logits"])
        for one in (source, source.records[name], source.records[name][0], source[name], source.numpy(name))
    ]
    sequence = [PROMPT + results[0].tokens[:-1]]
    expected = forward(llama.model, sequence, {name: patch})["hook_logits"]
    np.testing.assert_allclose(results[0].cache.numpy("hook_logits"), expected, **SPREAD)
    assert not np.allclose(expected, forward(llama.model, sequence)["hook_logits"], atol=1e-2)
    for result in results[1:]:
        assert mx.array_equal(result.cache["hook_logits"], results[0].cache["hook_logits"])


def test_patching_with_records_of_prompt_and_generated_tokens(llama: HookedModel) -> None:
    name = "blocks.1.hook_resid_post"
    plain = llama.generate(PROMPT, max_tokens=5, capture=[name, "hook_logits"])
    spec = {"hook_point": name, "type": "patch", "source": plain.activations[name]}
    again = llama.generate(PROMPT, max_tokens=5, interventions=[spec], capture=["hook_logits"])
    assert again.tokens == plain.tokens
    assert mx.array_equal(again.cache["hook_logits"], plain.cache["hook_logits"])
    assert again.interventions[0].norm_before == again.interventions[0].norm_after


def test_a_source_of_another_layer_is_taken_where_it_is_given(llama: HookedModel) -> None:
    _, cache = llama.run_with_cache(PROMPT)
    record = cache.records["blocks.0.hook_resid_post"][0]
    assert isinstance(record, CapturedActivation)
    spec = {"hook_point": "blocks.2.hook_resid_post", "type": "patch", "source": record}
    _, patched = llama.run_with_cache(PROMPT, "blocks.2.hook_resid_post", interventions=[spec])
    assert mx.array_equal(patched["resid_post", 2], cache["resid_post", 0])


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "blocks.1.attn.hook_v", "blocks.1.mlp.hook_post"])
def test_mean_over_prompts(llama: HookedModel, name: str) -> None:
    prompts = [[1, 2, 3], [30, 31, 32, 33, 34], [7]]
    rows = np.concatenate([forward(llama.model, [prompt])[name][0] for prompt in prompts])
    spec = {"hook_point": name, "type": "mean", "positions": [2, 5, 8]}
    if "head" in llama.hook_points[name].axes:
        spec["heads"] = [1]
    result = llama.generate(PROMPT, max_tokens=5, interventions=[spec | {"over": prompts}], capture=["hook_logits"])
    edit = expected_edit(spec | {"values": rows.mean(0)}, llama.hook_points[name], {"before": [], "after": []})
    expected = forward(llama.model, [PROMPT + result.tokens[:-1]], {name: edit})["hook_logits"]
    np.testing.assert_allclose(result.cache.numpy("hook_logits"), expected, **SPREAD)


def test_mean_pattern_is_taken_position_by_position(llama: HookedModel) -> None:
    name, prompts = "blocks.1.attn.hook_pattern", [PROMPT, [4, 8, 15, 16, 23, 42]]
    mean = np.mean([forward(llama.model, [prompt])[name] for prompt in prompts], axis=0)
    spec = {"hook_point": name, "type": "mean", "over": prompts}
    logits, _ = llama.run_with_cache(PROMPT, name, interventions=[spec])
    expected = forward(llama.model, [PROMPT], {name: lambda value: mean})["hook_logits"]
    np.testing.assert_allclose(np.array(logits), expected, **SPREAD)
    with pytest.raises(HookError, match="different lengths"):
        llama.run_with_cache(PROMPT, name, interventions=[spec | {"over": [[1, 2], [3]]}])
    with pytest.raises(HookError, match="has positions 0 to 5, not 6"):
        llama.generate(PROMPT, max_tokens=3, interventions=[spec])


def test_means_are_the_plain_models(llama: HookedModel) -> None:
    name = "blocks.1.hook_resid_post"
    spec = {"hook_point": name, "type": "mean", "over": [[1, 2, 3]]}
    _, alone = llama.run_with_cache(PROMPT, name, interventions=[spec])
    hook_id = llama.register_activation_hook("transformer.h.0", "residual")
    with llama.hooks([("hook_embed", lambda value, point: value * 5)]):
        _, hooked = llama.run_with_cache(PROMPT, name, interventions=[spec])
    assert [record.positions for record in llama.captured_activations(hook_id)] == [(0, 6)]
    llama.clear_activation_hooks()
    assert mx.array_equal(hooked[name], alone[name])


def test_a_mean_over_texts(tiny: HookedModel) -> None:
    texts = ["The capital of France is", "the cat"]
    results = [
        tiny.run_with_cache("the dog", "hook_logits", interventions=[
            {"hook_point": "blocks.1.hook_mlp_out", "type": "mean", "over": over}])[0]
        for over in (texts, [tiny.tokenizer.encode(text) for text in texts])
    ]  # fmt: skip
    assert mx.array_equal(*results)


def test_setting_token_ids(llama: HookedModel) -> None:
    spec = {"hook_point": "embed.hook_in", "type": "set", "values": 42, "positions": [1]}
    logits, _ = llama.run_with_cache(PROMPT, "hook_logits", interventions=[spec])
    assert mx.array_equal(logits, llama([[*PROMPT[:1], 42, *PROMPT[2:]]]))


def test_raw_modules(llama: HookedModel) -> None:
    for place, name in [("model.layers.1.mlp.down_proj", "blocks.1.hook_mlp_out"),
                        ("model.layers.1.mlp.down_proj.input", "blocks.1.mlp.hook_post")]:  # fmt: skip
        raw, named = (
            llama.run_with_cache(PROMPT, "hook_logits", interventions=[
                {"hook_point": p, "type": "add", "vector": 0.5, "positions": [1, 2], "neurons": [3, 30]}])[0]
            for p in (place, name)
        )  # fmt: skip
        assert mx.array_equal(raw, named)
        assert not mx.array_equal(raw, llama(PROMPT))
    with pytest.raises(HookError, match="neurons are 0 to 31"):
        llama.run_with_cache(PROMPT, interventions=[
            {"hook_point": "model.layers.1.mlp.down_proj", "type": "zero", "neurons": 32}])  # fmt: skip


# Attention


def test_editing_a_pattern_replaces_what_attention_uses(llama: HookedModel) -> None:
    name = "blocks.1.attn.hook_pattern"
    spec = {"hook_point": name, "type": "set", "values": 1.0, "heads": 2, "keys": 0}
    zero = {"hook_point": name, "type": "zero", "heads": 2, "keys": {"start": 1}}
    _, cache = llama.run_with_cache(PROMPT, interventions=[spec, zero])
    z, v = cache.numpy(("z", 1)), cache.numpy(("v", 1))
    # All of head 2 reads the first position alone: its value head is 1.
    np.testing.assert_allclose(z[0, :, 2], np.broadcast_to(v[0, 0, 1], (6, 8)), rtol=1e-6)


def test_rows_of_an_edited_pattern_are_not_renormalised(llama: HookedModel) -> None:
    name = "blocks.1.attn.hook_pattern"
    _, cache = llama.run_with_cache(PROMPT, interventions=[{"hook_point": name, "type": "scale", "factor": 0.5}])
    np.testing.assert_allclose(cache.numpy(name).sum(-1), 0.5, rtol=1e-6)


def test_masking_keys_knocks_attention_out(llama: HookedModel) -> None:
    name = "blocks.1.attn.hook_attn_scores"
    spec = {"hook_point": name, "type": "set", "values": None, "heads": [0], "keys": [1, 3], "positions": [3, 4, 7]}
    by_value = spec | {"values": -np.inf}
    result = llama.generate(PROMPT, max_tokens=5, interventions=[by_value], capture=["blocks.1.attn.hook_pattern"])
    pattern = result.cache.numpy("blocks.1.attn.hook_pattern")[0]
    assert (pattern[0][[3, 4, 7]][:, [1, 3]] == 0).all()
    assert (pattern[0][[5, 6, 8]][:, [1, 3]] > 0).all()
    np.testing.assert_allclose(pattern[0].sum(-1), 1, rtol=1e-5)
    listed = llama.generate(
        PROMPT, max_tokens=5, interventions=[spec | {"values": [None]}], capture=["blocks.1.attn.hook_pattern"]
    )
    assert mx.array_equal(listed.cache["pattern", 1], result.cache["pattern", 1])
    # Masked entries are left out of the norm, so nothing is left of it.
    assert result.interventions[0].norm_after == 0
    assert result.interventions[0].norm_before is not None
    assert result.interventions[0].norm_before > 0


def test_a_masked_score_stays_masked(llama: HookedModel) -> None:
    name = "blocks.1.attn.hook_attn_scores"
    mask = {"hook_point": name, "type": "set", "values": -np.inf, "keys": [1], "positions": {"start": 2}}
    masked, _ = llama.run_with_cache(PROMPT, "hook_logits", interventions=[mask])
    for kind in TYPES:
        after = specs_of(kind) | {"hook_point": name, "keys": [1], "positions": {"start": 2}}
        logits, cache = llama.run_with_cache(PROMPT, name, interventions=[mask, after])
        assert mx.array_equal(logits, masked), kind
        assert cache.interventions[1].norm_after == 0


def test_a_query_keeps_a_key(llama: HookedModel) -> None:
    spec = {"hook_point": "blocks.1.attn.hook_attn_scores", "type": "set", "values": -np.inf}
    for limits in ({}, {"keys": [0]}, {"keys": {"start": 0}}, {"keys": [0, 1, 2], "positions": [2]}):
        with pytest.raises(HookError, match="without any key"):
            llama.run_with_cache(PROMPT, "hook_logits", interventions=[spec | limits])


def test_no_edit_reaches_keys_after_the_query(llama: HookedModel) -> None:
    for name in ("blocks.1.attn.hook_attn_scores", "blocks.1.attn.hook_pattern"):
        spec = {"hook_point": name, "type": "set", "values": 0.5}
        _, cache = llama.run_with_cache(PROMPT, interventions=[spec])
        future = np.triu(np.ones((6, 6), bool), k=1)
        assert (cache.numpy(name)[..., future] == (-np.inf if "scores" in name else 0)).all()
        assert (cache.numpy(name)[..., ~future] == 0.5).all()


def expected_with_rows(model: HookedModel, name: str, rows: mx.array, head: int) -> np.ndarray:
    """Logits with a head's rows replaced by a plain hook."""

    def put(value: mx.array, point: HookPoint) -> mx.array:
        return mx.concatenate([value[:, :head], rows[:, head : head + 1], value[:, head + 1 :]], axis=1)

    return np.array(model.run_with_hooks(PROMPT, fwd_hooks=[(name, put)]))


@needs_block_sparse
@pytest.mark.parametrize("component", ["pattern", "attn_scores"])
def test_edits_reach_the_later_keys_that_a_layer_sees(component: str) -> None:
    model, name = HookedModel(tiny_model("phi3small")), f"blocks.0.attn.hook_{component}"
    _, other = model.run_with_cache([7, 3, 1, 9, 2, 4], name)
    plain, before = model.run_with_cache(PROMPT, name)
    future = np.triu(np.ones((6, 6), bool), k=1)
    assert np.isfinite(before.numpy(name)).all()
    assert (before.numpy(name)[..., future] != 0).any()
    spec = {"hook_point": name, "type": "patch", "source": other[name], "heads": [2]}
    logits, cache = model.run_with_cache(PROMPT, name, interventions=[spec])
    np.testing.assert_allclose(cache.numpy(name)[:, 2], other.numpy(name)[:, 2], rtol=1e-5)
    spoken = np.isfinite(np.array(plain))
    expected = expected_with_rows(model, name, other[name], 2)
    np.testing.assert_allclose(np.array(logits)[spoken], expected[spoken], rtol=1e-4, atol=1e-4)
    assert np.abs(np.array(logits)[spoken] - np.array(plain)[spoken]).max() > 1e-3
    # Keys that are chosen are those up to the query's own position.
    _, cache = model.run_with_cache(PROMPT, name, interventions=[{"hook_point": name, "type": "zero", "keys": [0, 3]}])
    edited = np.tril(np.ones((6, 6), bool)) & np.isin(np.arange(6), [0, 3])
    np.testing.assert_allclose(cache.numpy(name), np.where(edited, 0, before.numpy(name)), rtol=1e-5, atol=1e-6)
    # Numbers for fewer keys than there are: no later one gets one that was given for another.
    short = {"hook_point": name, "type": "set", "values": [0.2, 0.3, 0.5], "positions": [2]}
    _, cache = model.run_with_cache(PROMPT, name, interventions=[short])
    np.testing.assert_allclose(cache.numpy(name)[:, :, 2, :3], np.broadcast_to([0.2, 0.3, 0.5], (1, 4, 3)), rtol=1e-5)
    np.testing.assert_allclose(cache.numpy(name)[:, :, 2, 3:], before.numpy(name)[:, :, 2, 3:], rtol=1e-5)


# Chunks, order, several at once


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "blocks.1.attn.hook_pattern", "blocks.0.attn.hook_z"])
def test_noise_does_not_depend_on_how_the_text_is_cut_or_what_is_selected(llama: HookedModel, name: str) -> None:
    spec = {"hook_point": name, "type": "noise", "std": 0.3, "seed": 5}
    whole, _ = llama.run_with_cache(PROMPT, name, interventions=[spec])
    kv_cache = make_prompt_cache(llama.model)
    parts = [
        llama.run_with_cache(part, name, kv_cache=kv_cache, interventions=[spec])[0]
        for part in (PROMPT[:3], PROMPT[3:4], PROMPT[4:])
    ]
    np.testing.assert_allclose(np.array(mx.concatenate(parts, axis=1)), np.array(whole), rtol=1e-4, atol=1e-4)
    _, plain = llama.run_with_cache(PROMPT, name)

    def added(**more: Any) -> Array:
        _, cache = llama.run_with_cache(PROMPT, name, interventions=[spec | more])
        return cache.numpy(name) - plain.numpy(name)

    full, chosen = added(), added(positions=[2, 4])
    at = [slice(None)] * full.ndim
    at[llama.hook_points[name].position_axis or 0] = [2, 4]  # type: ignore[call-overload]
    np.testing.assert_array_equal(full[tuple(at)], chosen[tuple(at)])
    assert not np.allclose(full, added(seed=6), atol=0.05)


def test_rows_of_a_batch_get_noise_of_their_own(llama: HookedModel) -> None:
    name = "hook_embed"
    spec = {"hook_point": name, "type": "noise", "std": 0.3}
    _, alone = llama.run_with_cache(PROMPT, name, interventions=[spec])
    _, batch = llama.run_with_cache([PROMPT, PROMPT], name, interventions=[spec])
    assert mx.array_equal(batch[name][0], alone[name][0])
    assert not np.allclose(batch.numpy(name)[1], batch.numpy(name)[0], atol=0.05)


def test_noise_of_many_positions_is_standard_normal(llama: HookedModel) -> None:
    spec = {"hook_point": "hook_embed", "type": "noise", "std": 2.0, "seed": 1}
    tokens = RNG.integers(0, 60, (2, 400))
    _, plain = llama.run_with_cache(tokens, "hook_embed")
    _, cache = llama.run_with_cache(tokens, "hook_embed", interventions=[spec])
    drawn = (cache.numpy("hook_embed") - plain.numpy("hook_embed")) / 2
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.02
    rows = drawn.reshape(-1, 32)
    assert np.abs(np.corrcoef(rows[:50]) - np.eye(50)).max() < 0.8
    _, other = llama.run_with_cache(tokens, "hook_embed", interventions=[spec | {"seed": 2}])
    assert not np.allclose(other.numpy("hook_embed"), cache.numpy("hook_embed"), atol=0.1)


def test_layers_of_a_glob_get_noise_of_their_own(llama: HookedModel) -> None:
    spec = {"hook_point": "blocks.*.ln2.hook_in", "type": "noise", "std": 0.001}
    _, cache = llama.run_with_cache(PROMPT, interventions=[spec])
    drawn = [cache.numpy(f"blocks.{i}.ln2.hook_in") - cache.numpy(("resid_mid", i)) for i in range(3)]
    assert not np.allclose(drawn[0], drawn[1], atol=1e-3)


def test_long_prompts_in_chunks_equal_one_pass(llama: HookedModel) -> None:
    from mlx_hooks.generation import Sampling, generate_steps

    prompt = RNG.integers(0, 60, 23).tolist()
    specs = [
        {"hook_point": "blocks.1.hook_resid_post", "type": "noise", "std": 0.5},
        {"hook_point": "blocks.2.attn.hook_z", "type": "set", "positions": [3, 17, 9],
         "values": RNG.normal(size=(3, 1, 8))},
        {"hook_point": "blocks.0.hook_mlp_out", "type": "scale", "factor": 3.0, "positions": "last"},
    ]  # fmt: skip
    whole, cache = llama.run_with_cache(prompt, "hook_logits", interventions=specs)
    steps = generate_steps(
        llama.instrument, None, prompt, max_tokens=0, sampling=Sampling(), stop=(), prefill_step_size=5,
        plan=llama.resolve_hooks(["hook_logits"]), interventions=llama.resolve_interventions(specs),
    )  # fmt: skip
    (step,) = steps
    got = step.activations["hook_logits"][0].numpy()
    np.testing.assert_allclose(got, np.array(whole), rtol=1e-4, atol=1e-4)
    for a, b in zip(step.interventions, cache.interventions, strict=True):
        assert (a.positions, a.phases) == (b.positions, b.phases)
        assert a.norm_after == pytest.approx(b.norm_after, rel=1e-4)


def test_interventions_at_one_point_are_made_in_order(llama: HookedModel) -> None:
    name = "blocks.1.hook_resid_post"
    add, scale = {"type": "add", "vector": 1.0, "coefficient": 1.0}, {"type": "scale", "factor": 2.0}
    for specs in ([add, scale], [scale, add]):
        result = compare(llama, [spec | {"hook_point": name} for spec in specs])
        assert result.interventions[1].norm_before == result.interventions[0].norm_after
    _, cache = llama.run_with_cache(PROMPT, name)
    _, edited = llama.run_with_cache(PROMPT, name, interventions=[s | {"hook_point": name} for s in (add, scale)])
    assert mx.array_equal(edited[name], (cache[name] + 1) * 2)


def test_several_points_at_once(llama: HookedModel) -> None:
    compare(llama, [
        {"hook_point": "blocks.0.attn.hook_pattern", "type": "scale", "factor": 0.5, "heads": [0]},
        {"hook_point": "blocks.1.hook_resid_mid", "type": "noise", "std": 0.3, "seed": 1, "positions": [2, 7]},
        {"hook_point": "blocks.2.attn.hook_rot_q", "type": "clamp", "min": -0.5, "max": 0.5, "phase": "decode"},
    ])  # fmt: skip


def test_interventions_come_before_hooks(llama: HookedModel) -> None:
    seen: list[float] = []

    def look(value: mx.array, point: HookPoint) -> None:
        seen.append(value.abs().max().item())

    llama.generate(PROMPT, max_tokens=2, fwd_hooks=[("hook_embed", look)],
                   interventions=[{"hook_point": "hook_embed", "type": "zero"}])  # fmt: skip
    assert seen
    assert not any(seen)


def test_rows_of_a_batch(llama: HookedModel) -> None:
    rows = [PROMPT, PROMPT[::-1]]
    values = RNG.normal(size=(2, 1, 32)).astype(np.float32)
    spec = {"hook_point": "blocks.1.hook_resid_post", "type": "set", "values": values, "positions": [2]}
    _, cache = llama.run_with_cache(rows, interventions=[spec])
    np.testing.assert_array_equal(cache.numpy(("resid_post", 1))[:, 2], values[:, 0])
    with pytest.raises(HookError, match=r"values of shape \(2, 1, 32\) does not fit"):
        llama.run_with_cache(PROMPT, interventions=[spec])


# Receipts


def test_a_receipt_is_plain_json(llama: HookedModel) -> None:
    spec = {"hook_point": "blocks.*.attn.hook_z", "type": "zero", "heads": [0], "positions": [1, 7]}
    result = llama.generate(PROMPT, max_tokens=5, interventions=[spec])
    receipt = result.interventions[0].to_dict()
    norm = receipt.pop("norm_before")
    assert norm > 0
    assert receipt == {"index": 0, "type": "zero", "hook_points": [f"blocks.{i}.attn.hook_z" for i in range(3)],
                       "fired": 6, "positions": [1, 7], "phases": ["prefill", "decode"], "norm_after": 0.0}  # fmt: skip


def test_passes_that_ran_ahead_in_vain_do_not_count(tiny: HookedModel) -> None:
    spec = {"hook_point": "blocks.1.hook_resid_post", "type": "scale", "factor": 1.0}
    options: dict[str, Any] = {"capture": ["hook_embed"], "interventions": [spec]}
    result = tiny.generate("The capital of France is", max_tokens=20, **options)
    assert result.finish_reason == "stop"
    assert result.interventions[0].positions == tuple(result.cache.positions("hook_embed"))


def test_only_the_last_step_has_receipts(llama: HookedModel) -> None:
    spec = {"hook_point": "blocks.0.attn.hook_z", "type": "zero"}
    steps = list(llama.generate_steps(PROMPT, max_tokens=3, interventions=[spec]))
    assert [len(step.interventions) for step in steps] == [0, 0, 1]


def test_intervening_in_a_block(llama: HookedModel) -> None:
    spec = {"hook_point": "blocks.1.attn.hook_z", "type": "zero", "heads": 1, "positions": [1, 4]}
    with llama.intervening([spec]) as session:
        whole = llama(PROMPT)
    assert session.receipts[0].positions == (1, 4)
    kv_cache = make_prompt_cache(llama.model)
    with llama.intervening([spec]) as session:
        parts = [llama(part, kv_cache) for part in (PROMPT[:3], PROMPT[3:])]
    assert session.receipts[0].fired == 2
    np.testing.assert_allclose(np.array(mx.concatenate(parts, axis=1)), np.array(whole), rtol=1e-4, atol=1e-4)
    assert mx.array_equal(llama.run_with_cache(PROMPT, interventions=[spec])[0], whole)
    with llama.intervening([spec | {"positions": "last"}]) as session:
        llama(PROMPT)
        llama.generate(PROMPT, max_tokens=2)
    assert session.receipts[0].positions == (4, 5, 6)
    with llama.intervening([spec]) as session:
        pass
    assert session.receipts[0].fired == 0


def test_what_never_fires_is_an_error(llama: HookedModel, tiny: HookedModel) -> None:
    spec = {"hook_point": "blocks.1.attn.hook_z", "type": "zero"}
    fine = {"hook_point": "hook_embed", "type": "scale", "factor": 1.0}
    with pytest.raises(HookError, match=r"Intervention 1 \(zero at blocks.1.attn.hook_z\): it never fired") as caught, \
            llama.intervening([fine, spec | {"positions": [9]}]):  # fmt: skip
        llama(PROMPT)
    assert caught.value.intervention == 1
    with pytest.raises(HookError, match="it never fired"):
        tiny.generate("The capital of France is", max_tokens=40, interventions=[spec | {"positions": [39]}])
    assert type(llama.model).__name__ == "Model"


# States


STATE = "blocks.0.mixer.hook_state"


@pytest.fixture(scope="module", params=["mamba", FALCON_H1])
def recurrent(request: pytest.FixtureRequest) -> HookedModel:
    return HookedModel(tiny_model(request.param))


def test_a_state_is_patched_from_a_capture(recurrent: HookedModel) -> None:
    _, source = recurrent.run_with_cache(OTHER, STATE)
    plain, hooked = make_prompt_cache(recurrent.model), make_prompt_cache(recurrent.model)
    here = recurrent(PROMPT, plain)
    recurrent.run_with_hooks(PROMPT, [(STATE, lambda value, point: source[STATE])], hooked)
    unedited, expected = recurrent([3], plain), recurrent([3], hooked)
    assert not mx.array_equal(expected, unedited)
    for given in (source, source.records[STATE][0], source.numpy(STATE)):
        spec = {"hook_point": STATE, "type": "patch", "source": given}
        kv_cache = make_prompt_cache(recurrent.model)
        logits, cache = recurrent.run_with_cache(PROMPT, STATE, kv_cache=kv_cache, interventions=[spec])
        assert mx.array_equal(logits, here)  # the call itself is as it was
        assert mx.array_equal(cache[STATE], source[STATE])
        assert cache.interventions[0].positions == (5,)
        assert mx.array_equal(recurrent([3], kv_cache), expected)


def test_an_edited_state_changes_what_is_generated(recurrent: HookedModel) -> None:
    spec = {"hook_point": STATE, "type": "zero", "phase": "prefill"}
    result = recurrent.generate(PROMPT, max_tokens=3, capture=["hook_logits"], interventions=[spec])
    plain = recurrent.generate(PROMPT, max_tokens=3, capture=["hook_logits"])
    assert result.interventions[0].positions == (4, 5)
    same = [mx.array_equal(result.cache["hook_logits"][:, i], plain.cache["hook_logits"][:, i]) for i in range(6)]
    assert same == [True] * 5 + [False]  # the last token of the prompt is a call of its own


def test_what_a_state_cannot_be_is_refused(recurrent: HookedModel) -> None:
    _, source = recurrent.run_with_cache(PROMPT)
    shape = source[STATE].shape
    for change, said in [
        ({"source": source.records["hook_embed"]}, "the source has axes batch, pos, d_model"),
        ({"source": np.zeros((*shape[:-1], shape[-1] + 1))}, "does not fit"),
        ({"source": source, "positions": 5}, "which names no positions"),
        ({"source": [*source.records[STATE], *source.records[STATE]]}, "no axis that joins them"),
    ]:
        with pytest.raises(HookError, match=said):
            recurrent.run_with_cache(PROMPT, interventions=[{"hook_point": STATE, "type": "patch"} | change])


# Layers that run several times in one forward pass


@pytest.fixture(scope="module", params=["nanbeige", "longcat_flash", "iquestloopcoder"])
def looped(request: pytest.FixtureRequest) -> HookedModel:
    """Its attention and MLP outputs are met twice per forward pass."""
    return HookedModel(tiny_model(request.param))


def with_calls(model: HookedModel, name: str, change: Callable[[int, mx.array], mx.array | None]) -> mx.array:
    """Logits with a hook that is told which call of its point this is: one forward pass, so calls are passes."""
    calls = iter(range(9))
    return model.run_with_hooks(PROMPT, [(name, lambda value, point: change(next(calls), value))])


OTHER = [4, 8, 15, 16, 23, 42]
LOOPED = "blocks.1.hook_attn_out"


@pytest.mark.parametrize(("passes", "edited"), [(None, {0, 1}), (0, {0}), ([1], {1}), ({"start": 1}, {1})])
def test_passes_limit_an_edit(looped: HookedModel, passes: Any, edited: set[int]) -> None:
    spec = {"hook_point": LOOPED, "type": "scale", "factor": 0.5, "passes": passes}
    logits, cache = looped.run_with_cache(PROMPT, LOOPED, interventions=[spec])
    expected = with_calls(looped, LOOPED, lambda call, value: value * 0.5 if call in edited else None)
    assert mx.array_equal(logits, expected)
    assert cache.interventions[0].fired == len(edited)
    assert looped.generate(PROMPT, max_tokens=3, interventions=[spec]).interventions[0].fired == 4 * len(edited)


def test_a_pass_that_never_comes_is_an_error(looped: HookedModel) -> None:
    spec = {"hook_point": LOOPED, "type": "zero", "passes": [5]}
    with pytest.raises(HookError, match=r"it never fired: .* in passes \[5\]"):
        looped.run_with_cache(PROMPT, LOOPED, interventions=[spec])


def test_each_pass_is_patched_from_its_own_records(looped: HookedModel) -> None:
    _, source = looped.run_with_cache(OTHER)
    values = [record.value for record in source.records[LOOPED]]
    spec = {"hook_point": LOOPED, "type": "patch", "source": source}
    whole = with_calls(looped, LOOPED, lambda call, value: values[call])
    for given in (source, source.records[LOOPED], source.records[LOOPED][::-1]):
        logits, _ = looped.run_with_cache(PROMPT, LOOPED, interventions=[spec | {"source": given}])
        assert mx.array_equal(logits, whole)
    second = with_calls(looped, LOOPED, lambda call, value: values[1] if call == 1 else None)
    for given in (source, source.of_pass(1), source.records[LOOPED][1], values[1]):
        limited = spec | {"source": given, "passes": 1}
        logits, _ = looped.run_with_cache(PROMPT, LOOPED, interventions=[limited])
        assert mx.array_equal(logits, second)
    crossed = with_calls(looped, LOOPED, lambda call, value: values[1] if call == 0 else None)
    limited = spec | {"source": source.of_pass(1), "passes": 0}
    logits, _ = looped.run_with_cache(PROMPT, LOOPED, interventions=[limited])
    assert mx.array_equal(logits, crossed)


def test_a_source_of_one_pass_does_not_serve_several(looped: HookedModel) -> None:
    _, source = looped.run_with_cache(PROMPT)
    spec = {"hook_point": LOOPED, "type": "patch", "source": source}
    for given in (source.of_pass(0), source.of_pass(1), source.records[LOOPED][0], source.of_pass(0)[LOOPED]):
        for limit in ({}, {"passes": [0, 1]}):
            with pytest.raises(HookError, match="the source is of one pass, and this layer runs several times"):
                looped.run_with_cache(PROMPT, LOOPED, interventions=[spec | limit | {"source": given}])
    looped.run_with_cache(PROMPT, interventions=[spec | {"hook_point": "hook_embed", "source": source.of_pass(0)}])


def test_a_mean_is_taken_pass_by_pass(looped: HookedModel) -> None:
    prompts = [[1, 2, 3], OTHER]
    runs = [looped.run_with_cache(prompt, LOOPED)[1] for prompt in prompts]
    means = [mx.concatenate([run.of_pass(i)[LOOPED] for run in runs], axis=1).mean((0, 1)) for i in range(2)]
    spec = {"hook_point": LOOPED, "type": "mean", "over": prompts}
    logits, _ = looped.run_with_cache(PROMPT, LOOPED, interventions=[spec])
    expected = with_calls(looped, LOOPED, lambda call, value: mx.broadcast_to(means[call], value.shape))
    np.testing.assert_allclose(np.array(logits), np.array(expected), **SPREAD)


def test_no_pass_of_a_step_that_ran_ahead_in_vain_counts(looped: HookedModel) -> None:
    spec = {"hook_point": LOOPED, "type": "scale", "factor": 0.9}
    end = looped.generate(PROMPT, max_tokens=1, interventions=[spec]).tokens[0]
    text = SimpleNamespace(last_segment="", finalize=lambda: None)
    ending = HookedModel(looped.model, SimpleNamespace(eos_token_ids={end}, detokenizer=text))
    result = ending.generate(PROMPT, max_tokens=5, interventions=[spec])
    assert result.finish_reason == "stop"
    receipt = result.interventions[0]
    assert (receipt.fired, receipt.positions) == (4, tuple(range(6)))  # two passes in each of the prompt's two calls


# Refusals


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"type": "zero"}, "has a hook_point, or else layer_name and component"),
        ({"hook_point": "hook_embed", "layer_name": "0", "component": "mlp", "type": "zero"}, "has a hook_point, or"),
        ({"layer_name": "0", "type": "zero"}, "has a hook_point, or else"),
        ({"hook_point": "hook_embed"}, "Unknown type of intervention ''. There are: zero, mean"),
        ({"hook_point": "hook_embed", "type": "erase"}, "Unknown type of intervention 'erase'"),
        ({"hook_point": "hook_embed", "type": ["zero"]}, "Unknown type of intervention"),
        ({"hook_point": 5, "type": "zero"}, "hook_point is a string"),
        ({"hook_point": "hook_embed", "type": "zero", "head": 1}, "Unknown key 'head'"),
        ({"hook_point": "hook_embed", "type": "zero", "factor": 2}, "factor does not belong to this type"),
        ({"hook_point": "hook_embed", "type": "scale"}, "factor is missing"),
        ({"hook_point": "hook_embed", "type": "set"}, "takes exactly one of values and source"),
        ({"hook_point": "hook_embed", "type": "mean", "values": 1, "over": ["a"]}, "exactly one of values and over"),
        ({"hook_point": "hook_embed", "type": "clamp"}, "takes min, max or both"),
        ({"hook_point": "hook_embed", "type": "clamp", "min": 2, "max": 1}, "min is at most max"),
        ({"hook_point": "hook_embed", "type": "scale", "factor": "2"}, "factor is a number"),
        ({"hook_point": "hook_embed", "type": "scale", "factor": True}, "factor is a number"),
        ({"hook_point": "hook_embed", "type": "scale", "factor": float("nan")}, "finite"),
        ({"hook_point": "hook_embed", "type": "scale", "factor": 1e39}, "finite in float32"),
        ({"hook_point": "hook_embed", "type": "scale", "factor": 10**400}, "finite in float32"),
        ({"hook_point": "hook_embed", "type": "noise", "std": -1}, "std is a number from 0"),
        ({"hook_point": "hook_embed", "type": "noise", "std": 1, "seed": -1}, "seed is a whole number"),
        ({"hook_point": "hook_embed", "type": "noise", "std": 1, "seed": 1.5}, "seed is a whole number"),
        ({"hook_point": "hook_embed", "type": "add", "vector": [1, "a"]}, "vector are a number, or lists"),
        ({"hook_point": "hook_embed", "type": "add", "vector": [[1], [1, 2]]}, "vector are a number, or lists"),
        ({"hook_point": "hook_embed", "type": "add", "vector": []}, "got none"),
        ({"hook_point": "hook_embed", "type": "add", "vector": [True] * 32}, "vector are a number, or lists"),
        ({"hook_point": "hook_embed", "type": "add", "vector": np.ones(32, complex)}, "complex128"),
        ({"hook_point": "hook_embed", "type": "add", "vector": [float("nan")] * 32}, "must be finite"),
        ({"hook_point": "hook_embed", "type": "add", "vector": [None] * 32}, "must be finite"),
        ({"hook_point": "hook_embed", "type": "add", "vector": [0.0] * 32, "norm_match": True}, "which is 0 here"),
        ({"hook_point": "hook_embed", "type": "add", "vector": 1.0, "norm_match": 1}, "norm_match is true or false"),
        ({"hook_point": "hook_embed", "type": "set", "values": float("inf")}, "must be finite"),
        ({"hook_point": "hook_embed", "type": "set", "values": 1e39}, "must be finite"),
        ({"hook_point": "hook_embed", "type": "set", "values": -np.inf}, "masks keys in attention scores only"),
        ({"hook_point": "hook_embed", "type": "set", "source": "x"}, "source is an activation cache"),
        ({"hook_point": "hook_embed", "type": "set", "source": []}, "source is an activation cache"),
        ({"hook_point": "hook_embed", "type": "set", "source": [3]}, "source is an activation cache"),
        ({"hook_point": "hook_embed", "type": "mean", "over": "text"}, "over is a list of prompts"),
        ({"hook_point": "hook_embed", "type": "mean", "over": []}, "over is a list of prompts"),
        ({"hook_point": "hook_embed", "type": "mean", "over": [5]}, "a prompt of over is a text or a list"),
        ({"hook_point": "hook_embed", "type": "mean", "over": [[]]}, "a prompt of over is a text or a list"),
        ({"hook_point": "hook_embed", "type": "mean", "over": ["text"]}, "no tokenizer"),
        ({"hook_point": "hook_embed", "type": "mean", "over": [[60]]}, "Token ids are 0 to 59"),
        ({"hook_point": "hook_embed", "type": "zero", "positions": -1}, "positions are a whole number from 0 up"),
        ({"hook_point": "hook_embed", "type": "zero", "positions": []}, "positions are a whole number from 0 up"),
        ({"hook_point": "hook_embed", "type": "zero", "positions": [1, 1]}, "a list of different ones"),
        ({"hook_point": "hook_embed", "type": "zero", "positions": True}, "positions are a whole number"),
        ({"hook_point": "hook_embed", "type": "zero", "positions": 1.5}, "positions are a whole number"),
        ({"hook_point": "hook_embed", "type": "zero", "positions": "first"}, "or 'last'"),
        ({"hook_point": "hook_embed", "type": "zero", "positions": {}}, "positions are"),
        ({"hook_point": "hook_embed", "type": "zero", "positions": {"start": 3, "stop": 3}}, "positions are"),
        ({"hook_point": "hook_embed", "type": "zero", "positions": {"begin": 3}}, "positions are"),
        ({"hook_point": "hook_embed", "type": "zero", "positions": [6]}, "this run comes to positions 0 to 5"),
        ({"hook_point": "hook_embed", "type": "zero", "positions": {"start": 6}}, "there is nothing to edit"),
        ({"hook_point": "hook_embed", "type": "zero", "passes": -1}, "passes are a whole number from 0 up"),
        ({"hook_point": "hook_embed", "type": "zero", "phase": "training"}, "phase is 'prefill', 'decode'"),
        ({"hook_point": "hook_embed", "type": "zero", "phase": "decode"}, "'decode' never comes in this run"),
        ({"hook_point": "hook_embed", "type": "zero", "heads": [0]}, "heads need a head axis"),
        ({"hook_point": "hook_embed", "type": "zero", "keys": [0]}, "keys need a key axis"),
        ({"hook_point": "hook_embed", "type": "zero", "neurons": 32}, "neurons are 0 to 31, got [32]"),
        ({"hook_point": "hook_embed", "type": "zero", "neurons": {"start": 32}}, "neurons are 0 to 31"),
        ({"hook_point": "blocks.1.attn.hook_z", "type": "zero", "heads": [4]}, "heads are 0 to 3, got [4]"),
        ({"hook_point": "blocks.1.attn.hook_v", "type": "zero", "heads": [2]}, "heads are 0 to 1, got [2]"),
        ({"hook_point": "blocks.1.mlp.hook_post", "type": "zero", "neurons": [48]}, "neurons are 0 to 47"),
        ({"hook_point": "blocks.1.attn.hook_pattern", "type": "zero", "neurons": [0]}, "a last axis of features"),
        ({"hook_point": "blocks.1.attn.hook_pattern", "type": "zero", "keys": [6]}, "keys are out of reach"),
        ({"hook_point": "blocks.1.attn.hook_pattern", "type": "zero", "keys": [3], "positions": 2}, "nothing to edit"),
        ({"hook_point": "blocks.1.attn.hook_pattern", "type": "add", "vector": 1, "norm_match": True}, "features"),
        ({"hook_point": "blocks.1.attn.hook_pattern", "type": "set", "values": [1, 0, 0]}, "position 5 has 6 keys, 3"),
        ({"hook_point": "hook_embed", "type": "set", "values": [0.0] * 31}, "values of shape (31,) does not fit"),
        ({"hook_point": "hook_embed", "type": "set", "values": np.zeros((2, 32)), "positions": [1]}, "does not fit"),
        ({"hook_point": "hook_embed", "type": "set", "values": np.zeros((6, 32))}, "pos 1, d_model 32"),
        ({"hook_point": "hook_embed", "type": "set", "values": np.zeros((1, 1, 1, 1))}, "does not fit"),
        ({"hook_point": "hook_embed", "type": "add", "vector": [0.0] * 3, "neurons": [1, 2]}, "d_model 2"),
        ({"hook_point": "embed.hook_in", "type": "zero"}, "can only be set or patched"),
        ({"hook_point": "embed.hook_in", "type": "set", "values": 60}, "0 to 59"),
        ({"hook_point": "embed.hook_in", "type": "set", "values": 1.5}, "0 to 59"),
        ({"hook_point": "blocks.3.hook_resid_post", "type": "zero"}, "Unknown hook point 'blocks.3.hook_resid_post'"),
        ({"layer_name": "transformer.h.9", "component": "mlp", "type": "zero"}, "Unknown layer 'transformer.h.9'"),
        ({"layer_name": "0", "component": "soul", "type": "zero"}, "Unknown component 'soul'"),
        ({"hook_point": "model.layers.0", "type": "zero", "heads": [0]}, "is a raw module"),
        ("zero", "An intervention is an Intervention or a mapping"),
    ],
)  # fmt: skip
def test_rubbish_is_refused_before_the_run(llama: HookedModel, spec: Any, said: str) -> None:
    fine = {"hook_point": "hook_embed", "type": "scale", "factor": 1.0}
    with pytest.raises(HookError) as caught:
        llama.run_with_cache(PROMPT, "hook_embed", interventions=[fine, spec])
    assert said in str(caught.value)
    assert caught.value.intervention == 1


def test_rubbish_lists_are_refused(llama: HookedModel) -> None:
    for rubbish in ("zero", {"type": "zero"}, 5, None):
        with pytest.raises(HookError, match="interventions is a list"):
            llama.run_with_cache(PROMPT, interventions=rubbish)  # type: ignore[arg-type]


def test_a_source_must_have_the_positions_that_are_patched(llama: HookedModel) -> None:
    name = "blocks.1.hook_resid_post"
    _, cache = llama.run_with_cache(PROMPT[:4])
    spec = {"hook_point": name, "type": "patch", "source": cache}
    with pytest.raises(HookError, match="the source has positions 0 to 3, not 4: give positions that it has"):
        llama.run_with_cache(PROMPT, interventions=[spec])
    llama.run_with_cache(PROMPT, interventions=[spec | {"positions": {"stop": 4}}])
    with pytest.raises(HookError, match="not 4"):
        llama.generate(PROMPT[:4], max_tokens=3, interventions=[spec])
    llama.generate(PROMPT[:4], max_tokens=3, interventions=[spec | {"phase": "prefill"}])
    with pytest.raises(HookError, match="the source holds no blocks.1.hook_mlp_out"):
        llama.run_with_cache(PROMPT[:4], interventions=[
            spec | {"hook_point": "blocks.1.hook_mlp_out", "source": cache.select(name)}])  # fmt: skip
    with pytest.raises(HookError, match="the source has axes batch, pos, d_model"):
        llama.run_with_cache(PROMPT[:4], interventions=[
            spec | {"hook_point": "blocks.1.attn.hook_z", "source": cache.records[name]}])  # fmt: skip
    with pytest.raises(HookError, match="are of one hook point"):
        llama.run_with_cache(PROMPT[:4], interventions=[
            spec | {"source": [cache.records[name][0], cache.records["hook_embed"][0]]}])  # fmt: skip
    with pytest.raises(HookError, match="source of shape"):
        llama.run_with_cache(PROMPT[:4], interventions=[spec | {"source": np.zeros((1, 4, 31))}])
    with pytest.raises(HookError, match="expected the axes batch, pos, d_model"):
        llama.run_with_cache(PROMPT[:4], interventions=[spec | {"source": np.zeros(32)}])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": "AAAA"}, "encoded"),
        ({"positions": [0, 5]}, "one per row of its data"),
        ({"positions": None}, "one per row of its data"),
        ({"axes": ["batch", "pos"]}, "3 axes of data"),
        ({"axes": ["a", "b", "c"]}, "one per row of its data"),
        ({"data": [[[float("nan")] * 32] * 6]}, "must be finite"),
    ],
)
def test_damaged_records_are_refused(llama: HookedModel, change: dict[str, Any], said: str) -> None:
    record = {"hook_point": "hook_embed", "axes": ["batch", "pos", "d_model"], "positions": [0, 6],
              "data": np.zeros((1, 6, 32)).tolist()}  # fmt: skip
    spec = {"hook_point": "hook_embed", "type": "patch"}
    llama.run_with_cache(PROMPT, interventions=[spec | {"source": record}])
    with pytest.raises(HookError, match=said):
        llama.run_with_cache(PROMPT, interventions=[spec | {"source": record | change}])
    for key in record:
        short = {name: value for name, value in record.items() if name != key}
        with pytest.raises(HookError, match=f"lacks '{key}'"):
            llama.run_with_cache(PROMPT, interventions=[spec | {"source": short}])


def test_numbers_beyond_the_models_type_are_an_error() -> None:
    model = HookedModel(make_model("llama", dtype=mx.float16))
    with pytest.raises(HookError, match="numbers that are not finite"):
        model.run_with_cache(PROMPT, interventions=[{"hook_point": "hook_embed", "type": "set", "values": 1e6}])


@pytest.mark.parametrize("size", [1e-30, 1e30, 3e38])
def test_norms_of_sizes_whose_squares_float32_cannot_hold(llama: HookedModel, size: float) -> None:
    name = "blocks.2.hook_resid_post"
    big = {"hook_point": name, "type": "set", "values": size}
    half = {"hook_point": name, "type": "scale", "factor": 0.5}
    _, cache = llama.run_with_cache(PROMPT, name, interventions=[big, half])
    norm = size * np.sqrt(len(PROMPT) * 32)
    np.testing.assert_allclose([r.norm_after for r in cache.interventions], [norm, norm / 2], rtol=1e-5)
    assert cache.interventions[1].norm_before == cache.interventions[0].norm_after
    steer = {"hook_point": name, "type": "add", "vector": [0.0] * 31 + [size], "norm_match": True, "coefficient": 0.1}
    _, cache = llama.run_with_cache(PROMPT, name, interventions=[big | {"values": size / 10}, steer])
    expected = np.full(32, size / 10)
    expected[-1] += 0.1 * size / 10 * np.sqrt(32)
    np.testing.assert_allclose(cache.numpy(name)[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("left", [np.inf, -np.inf, np.nan])
def test_what_is_left_must_be_finite(llama: HookedModel, left: float) -> None:
    name = "blocks.2.hook_resid_post"

    def spoil(value: mx.array, point: HookPoint) -> mx.array:
        value[:, 1, 2] = left
        return value

    keep = {"hook_point": name, "type": "scale", "factor": 1.0}
    with llama.hooks([(name, spoil)]), pytest.raises(HookError, match="it left numbers that are not finite"):
        llama.run_with_cache(PROMPT, name, interventions=[keep])
    with llama.hooks([(name, spoil)]):
        _, cache = llama.run_with_cache(PROMPT, name, interventions=[{"hook_point": name, "type": "zero"}])
    assert (cache.interventions[0].norm_before, cache.interventions[0].norm_after) == (None, 0)


def test_nothing_is_left_behind(llama: HookedModel) -> None:
    plain = llama(PROMPT)
    llama.generate(PROMPT, max_tokens=3, interventions=[{"hook_point": "blocks.*.attn.hook_pattern", "type": "zero"}])
    assert mx.array_equal(llama(PROMPT), plain)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "step3p5"])
def test_keys_that_a_rotating_cache_forgot_are_not_edited(name: str) -> None:
    # A pattern does not say which of its zeros are keys: the scores beside it do.
    model = HookedModel(tiny_model(name))
    layer = next(i for i, c in enumerate(make_prompt_cache(model.model)) if isinstance(c, RotatingKVCache))
    point = f"blocks.{layer}.attn.hook_pattern"
    prompt = [(i * 7) % 90 for i in range(20)]
    asked = {"hook_point": point, "type": "set", "values": 0.3, "keys": [0, 14]}
    edited = model.generate(prompt, max_tokens=5, capture=[point, "hook_logits"], interventions=[asked])
    row = [*prompt, *edited.tokens[:-1]]
    _, whole = model.run_with_cache([row], [point, "hook_logits"], interventions=[asked])
    np.testing.assert_allclose(edited.cache.numpy(point), whole.numpy(point), atol=1e-4)
    np.testing.assert_allclose(edited.cache.numpy("hook_logits"), whole.numpy("hook_logits"), rtol=1e-3, atol=1e-3)
    assert (edited.cache.numpy(point)[:, :, 22:, 0] == 0).all()
    assert np.allclose(edited.cache.numpy(point)[:, :, 15:20, 14], 0.3)


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("gemma4_text", "blocks.3.attn.hook_v"),
        ("gemma3n", "blocks.3.attn.hook_rot_k"),
        ("deepseek_v3", "blocks.0.attn.hook_v"),
        ("gpt_oss", "blocks.0.attn.hook_sink"),
        ("gemma3n", "blocks.0.hook_resid_mid"),
    ],
)
def test_what_can_only_be_read_is_refused_before_the_run(name: str, point: str) -> None:
    with pytest.raises(HookError, match=f"{point} can be read but not replaced") as caught:
        HookedModel(tiny_model(name)).resolve_interventions([{"hook_point": point, "type": "zero"}])
    assert caught.value.intervention == 0


def test_a_state_is_no_stream_whatever_its_size() -> None:
    model = HookedModel(tiny_model("mamba"))
    n_channels = model.run_with_cache([[1]], "blocks.0.mixer.hook_state")[1]["blocks.0.mixer.hook_state"].shape[1]
    tokens, point = [[1] * n_channels], "blocks.0.mixer.hook_state"
    _, cache = model.run_with_cache(tokens, point)
    assert cache.records[point][0].hook_point.axes == ("batch", "state_1", "state_2")
    with pytest.raises(HookError):
        model.run_with_cache(tokens, point, interventions=[{"hook_point": point, "type": "zero", "positions": [3]}])
