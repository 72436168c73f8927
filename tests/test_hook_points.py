"""The vocabulary: names, aliases, the REST table, and errors that list what there is."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_models import N_LAYERS, make_model

from mlx_hooks import HookedModel, HookError, HookPoint, HookSpec, UnknownHookError
from mlx_hooks.hook_points import (
    COMPONENTS,
    DERIVED,
    CacheKey,
    block_point,
    cache_key,
    canonical_name,
    expand_key,
    short_name,
)
from mlx_hooks.hooks import select_positions


def names(model: HookedModel, layer_name: str, component: str, **sides: bool) -> list[str]:
    return [point.name for point, _ in HookSpec(layer_name, component, **sides).points(model.architecture)]


def test_hook_points_stand_in_forward_order(model: HookedModel) -> None:
    seen: list[str] = []
    model.run_with_hooks([1, 2, 3], [(None, lambda value, point: seen.append(point.name))])
    assert sorted(seen) == sorted(model.hook_points)
    listed = [name for name in model.hook_points if "resid" in name or name.startswith(("hook_", "ln_final"))]
    assert [name for name in seen if name in set(listed)] == [n for n in listed if n in set(seen)]


@pytest.mark.parametrize("spelling", ["transformer.h.1", "model.layers.1", "layers.1", "blocks.1", "1", "model.h.1"])
def test_every_spelling_of_a_block_means_it_on_every_architecture(model: HookedModel, spelling: str) -> None:
    assert names(model, spelling, "residual") == ["blocks.1.hook_resid_post"]


@pytest.mark.parametrize("spelling", ["transformer.wte", "model.embed_tokens"])
def test_the_embedding_and_the_last_norm_have_aliases(model: HookedModel, spelling: str) -> None:
    assert names(model, spelling, "embedding") == ["hook_embed"]
    for norm in ("transformer.ln_f", "model.norm"):
        assert names(model, norm, "layernorm") == ["ln_final.hook_normalized"]


def test_the_rest_table_maps_every_component_at_both_sides(model: HookedModel) -> None:
    at = "blocks.2."
    expected = {
        "residual": (["hook_resid_post"], ["hook_resid_pre"]),
        "attention": (["hook_attn_out"], ["attn.hook_in"]),
        "mlp": (["hook_mlp_out"], ["mlp.hook_in"]),
        "layernorm": (["ln1.hook_normalized", "ln2.hook_normalized"], ["ln1.hook_in", "ln2.hook_in"]),
        "query": (["attn.hook_rot_q"], None),
        "key": (["attn.hook_rot_k"], None),
        "value": (["attn.hook_v"], None),
        "attention_scores": (["attn.hook_attn_scores"], None),
        "attention_pattern": (["attn.hook_pattern"], None),
    }
    assert set(expected) | {"embedding"} == set(COMPONENTS)
    for component, (output, given) in expected.items():
        assert names(model, "transformer.h.2", component) == [at + name for name in output]
        if given is None:
            with pytest.raises(UnknownHookError, match=f"'{component}' has no input"):
                names(model, "transformer.h.2", component, capture_input=True)
        else:
            sides = {"capture_input": True, "capture_output": False}
            assert names(model, "transformer.h.2", component, **sides) == [at + name for name in given]
            both = names(model, "transformer.h.2", component, capture_input=True)
            assert both == [at + name for name in given + output]
    sides = {"capture_input": True, "capture_output": False}
    assert names(model, "transformer.wte", "embedding", **sides) == ["embed.hook_in"]


@pytest.mark.parametrize(
    ("layer_name", "name"),
    [
        ("transformer.h.1.ln_1", "ln1"),
        ("model.layers.1.input_layernorm", "ln1"),
        ("blocks.1.ln2", "ln2"),
        ("model.layers.1.post_attention_layernorm", "ln2"),
    ],
)
def test_layernorm_is_exactly_one_when_the_layer_name_names_it(model: HookedModel, layer_name: str, name: str) -> None:
    assert names(model, layer_name, "layernorm") == [f"blocks.1.{name}.hook_normalized"]


@pytest.mark.parametrize(
    ("layer_name", "component", "message"),
    [
        ("transformer.h.3", "residual", "Unknown layer 'transformer.h.3'. Blocks: transformer.h.0 to transformer.h.2"),
        ("-1", "residual", "Unknown layer '-1'"),
        ("00", "residual", "Unknown layer '00'"),
        ("\u0661", "residual", "Unknown layer"),
        ("", "residual", "Unknown layer ''"),
        ("model.layers.1.self_attn", "attention", "Unknown layer 'model.layers.1.self_attn'"),
        ("transformer.h.1", "neurons", "Unknown component 'neurons'. There are: residual, attention, mlp, embedding"),
        ("transformer.h.1", "embedding", "has no component 'embedding': ask it of transformer.wte"),
        ("transformer.wte", "residual", "has no component 'residual': ask it of a block"),
        ("transformer.ln_f", "mlp", "has no component 'mlp': ask it of a block"),
        ("transformer.h.1.ln_1", "mlp", "has no component 'mlp': ask it of a block"),
    ],
)
def test_an_unknown_layer_or_component_lists_what_there_is(layer_name: str, component: str, message: str) -> None:
    model = HookedModel(make_model("llama"))
    with pytest.raises(UnknownHookError) as caught:
        names(model, layer_name, component)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("layers_input[2]", "blocks.2.hook_resid_pre"),
        ("layers_output[12]", "blocks.12.hook_resid_post"),
        ("attentions_input[1]", "blocks.1.attn.hook_in"),
        ("mlps_input[1]", "blocks.1.mlp.hook_in"),
        ("blocks.4.hook_in", "blocks.4.hook_resid_pre"),
        ("blocks.4.ln1.hook_out", "blocks.4.ln1.hook_normalized"),
        ("blocks.4.ln2.hook_out", "blocks.4.ln2.hook_normalized"),
        ("blocks.4.attn.k.hook_out", "blocks.4.attn.hook_k"),
        ("blocks.4.attn.v.hook_out", "blocks.4.attn.hook_v"),
        ("blocks.4.mlp.hook_out", "blocks.4.hook_mlp_out"),
        ("pos_embed.hook_out", "hook_pos_embed"),
        ("ln_final.hook_out", "ln_final.hook_normalized"),
        ("attentions_output[0]", "blocks.0.hook_attn_out"),
        ("mlps_output[0]", "blocks.0.hook_mlp_out"),
        ("attention_probabilities[3]", "blocks.3.attn.hook_pattern"),
        ("token_embeddings", "hook_embed"),
        ("logits", "hook_logits"),
        ("embed", "hook_embed"),
        ("embed.hook_out", "hook_embed"),
        ("blocks.4.hook_out", "blocks.4.hook_resid_post"),
        ("blocks.4.attn.hook_out", "blocks.4.hook_attn_out"),
        ("blocks.4.attn.q.hook_out", "blocks.4.attn.hook_q"),
        ("unembed.hook_out", "hook_logits"),
        ("blocks.4.hook_resid_mid", "blocks.4.hook_resid_mid"),
    ],
)
def test_other_libraries_names_are_accepted(alias: str, name: str) -> None:
    assert canonical_name(alias) == name


def test_short_names_are_transformerlens_ones() -> None:
    assert short_name("pattern", 3) == "blocks.3.attn.hook_pattern"
    assert short_name("post", 3) == "blocks.3.mlp.hook_post"
    assert short_name("logits") == "hook_logits"
    with pytest.raises(UnknownHookError, match="Unknown component 'patern' in a block. There are: resid_pre"):
        short_name("patern", 3)


def test_a_cache_says_what_it_holds_when_asked_for_more() -> None:
    model = HookedModel(make_model("llama"))
    _, cache = model.run_with_cache([1, 2], ["hook_embed", "blocks.*.hook_resid_post"])
    assert ("resid_post", 1) in cache
    assert "layers_output[1]" in cache
    assert ("pattern", 1) not in cache
    assert "nonsense" not in cache
    with pytest.raises(UnknownHookError, match=r"There are: hook_embed, blocks\.\{i\}\.hook_resid_post\. Layers"):
        cache["pattern", 1]
    assert list(cache.select("blocks.1.*")) == ["blocks.1.hook_resid_post"]
    assert repr(cache) == "ActivationCache(4 hook points, 0.0 MB)"


@pytest.mark.parametrize(
    "bad", ["blocks.*.hook_nothing", ["hook_embed", 3], lambda name: False, "model.layers.9.mlp", "output", ""]
)
def test_a_filter_that_selects_nothing_is_an_error(bad: object) -> None:
    model = HookedModel(make_model("llama"))
    with pytest.raises(UnknownHookError):
        model.run_with_cache([1, 2], bad)


@pytest.mark.parametrize("positions", [5, -6, [0, 9], [], "first", slice(5, 9), True, 1.5, ["last"], None])
def test_positions_outside_the_call_are_refused(positions: object) -> None:
    with pytest.raises(HookError, match="outside the 5 tokens|Positions are 'last', a whole number"):
        select_positions(positions, start=0, length=5)


def test_a_filter_may_be_any_iterable() -> None:
    model = HookedModel(make_model("llama"))
    _, cache = model.run_with_cache([1, 2], (f"blocks.{i}.hook_resid_post" for i in (2, 0)))
    assert list(cache) == ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
    with pytest.raises(HookError, match="A filter is None, a name"):
        model.run_with_cache([1, 2], 5)


def test_positions_may_come_from_numpy() -> None:
    assert select_positions(np.array([1, 3]), start=0, length=5) == [1, 3]
    assert select_positions(np.int64(2), start=0, length=5) == [2]


def test_positions_are_absolute_when_a_kv_cache_goes_before() -> None:
    assert select_positions([7, -1], start=5, length=4) == [2, 3]
    assert select_positions(slice(6, 8), start=5, length=4) == [1, 2]


def test_a_model_prints_its_hook_points(model: HookedModel) -> None:
    text = repr(model)
    assert f"{N_LAYERS} layers" in text
    assert "blocks.{i}.attn.hook_pattern" in text
    assert "batch, head, query, key" in text
    assert len(text.splitlines()) < 40


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"layer_name": "1"}, "missing component"),
        ({"layer_name": "1", "component": "mlp", "layer": 3}, "unknown layer"),
        ({"layer_name": 1, "component": "mlp"}, "layer_name of a hook is a string, got 1"),
        ({"layer_name": "1", "component": "mlp", "capture_output": False}, "captures nothing"),
        ({"layer_name": "1", "component": "mlp", "capture_output": "no"}, "capture_output of a hook is true or false"),
        (7, "A hook is a HookSpec or a mapping, got int"),
    ],
)
def test_a_malformed_spec_is_refused(spec: object, message: str) -> None:
    with pytest.raises(HookError, match=message):
        HookSpec.of(spec)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("resid_in_12", CacheKey("blocks.12.hook_resid_pre")),
        ("resid_mid_5", CacheKey("blocks.5.hook_resid_mid")),
        ("resid_out_5", CacheKey("blocks.5.hook_resid_post")),
        ("attn_in_5", CacheKey("blocks.5.attn.hook_in")),
        ("attn_out_5", CacheKey("blocks.5.hook_attn_out")),
        ("mlp_in_5", CacheKey("blocks.5.mlp.hook_in")),
        ("mlp_out_5", CacheKey("blocks.5.hook_mlp_out")),
        ("values_L5", CacheKey("blocks.5.attn.hook_v", derived="flat")),
        ("keys_L5", CacheKey("blocks.5.attn.hook_k", derived="flat")),
        ("queries_L5", CacheKey("blocks.5.attn.hook_q", derived="flat")),
        ("head_values_L15H11", CacheKey("blocks.15.attn.hook_v", 11)),
        ("head_keys_L5H1", CacheKey("blocks.5.attn.hook_k", 1)),
        ("head_queries_L5H1", CacheKey("blocks.5.attn.hook_q", 1)),
        ("pattern_L5H1", CacheKey("blocks.5.attn.hook_pattern", 1)),
        ("avg_attn_pattern_L5H1", CacheKey("blocks.5.attn.hook_pattern", 1, "mean")),
        ("head_out_L5H1", CacheKey("blocks.5.attn.hook_result", 1)),
        ("projected_value_L5H1", CacheKey("blocks.5.attn.hook_v_projected", 1)),
        ("last_layernorm", CacheKey("ln_final.hook_in")),
        ("input_ids", CacheKey("embed.hook_in")),
        ("input_embeddings", CacheKey("hook_embed")),
        ("logits", CacheKey("hook_logits")),
        ("layers_output[12]", CacheKey("blocks.12.hook_resid_post")),
        ("blocks.4.hook_resid_mid", CacheKey("blocks.4.hook_resid_mid")),
        ("resid_out_5x", CacheKey("resid_out_5x")),
        ("pattern_L5", CacheKey("pattern_L5")),
    ],
)
def test_keys_of_easyroutine_are_read(key: str, meant: CacheKey) -> None:
    assert cache_key(key) == meant


def many_layers(n_heads: int = 12) -> dict[str, HookPoint]:
    """Points of 12 layers, in no order."""
    head = (None, None, n_heads, 8)
    rows = [replace(block_point("z", i), sizes=head) for i in reversed(range(12))]
    rows += [replace(block_point("v", i), sizes=(None, None, 2, 8), group=n_heads // 2) for i in range(12)]
    return {point.name: point for point in [*(block_point("resid_post", i) for i in range(12)), *rows]}


@pytest.mark.parametrize("pattern", ["resid_out_{i}", "resid_out_{}", "resid_out_{layer}", "resid_out_*"])
def test_a_pattern_stands_for_every_layer_in_numerical_order(pattern: str) -> None:
    assert expand_key(pattern, many_layers()) == [
        (f"resid_out_{i}", CacheKey(f"blocks.{i}.hook_resid_post")) for i in range(12)
    ]


def test_a_pattern_may_be_canonical_or_another_librarys() -> None:
    names = [f"blocks.{i}.hook_resid_post" for i in range(12)]
    for pattern in ("blocks.{i}.hook_resid_post", "blocks.*.hook_resid_post"):
        assert expand_key(pattern, many_layers()) == [(name, CacheKey(name)) for name in names]
    assert [key.name for _, key in expand_key("layers_output[{i}]", many_layers())] == names
    assert expand_key("resid_out_11", many_layers()) == [("resid_out_11", CacheKey(names[11]))]


def test_a_pattern_over_heads_goes_by_layer_and_then_by_head() -> None:
    every = [(f"head_out_L{i}H{j}", CacheKey(f"blocks.{i}.attn.hook_result", j)) for i in range(12) for j in range(12)]
    assert expand_key("head_out_L{i}H{j}", many_layers()) == every
    assert expand_key("head_out_L3H{j}", many_layers()) == every[36:48]
    assert expand_key("head_out_L{i}H{i}", many_layers()) == every[::13]
    some = {f"blocks.{i}.attn.hook_z": (4, 10) for i in range(12)}
    assert expand_key("head_out_L{i}H{j}", many_layers(), some)[:3] == [every[4], every[10], every[16]]


def test_of_keys_and_values_a_head_is_the_query_head_that_they_serve() -> None:
    assert len(expand_key("head_values_L{i}H{j}", many_layers())) == 144
    model = HookedModel(make_model("llama"))
    groups = {c: model.hook_points[short_name(c, 1)].group for c in ("q", "k", "v", "pattern", "z", "resid_post")}
    assert groups == {"q": 1, "k": 2, "v": 2, "pattern": 1, "z": 1, "resid_post": 1}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("resid_out_12", r"Unknown hook point 'resid_out_12'.* Layers \(i\): 0-11"),
        ("resid_mid_{i}", r"Unknown hook point 'resid_mid_\{i\}'.* There are: blocks.\{i\}.hook_resid_post"),
        ("nonsense*", "Unknown hook point 'nonsense"),
        ("head_out_L3H12", "Unknown head 12 in 'head_out_L3H12': blocks.3.attn.hook_result has the heads 0-11"),
        ("head_out_L3H12*", "Unknown hook point"),
        (3, "A key is a string, not int"),
    ],
)
def test_a_pattern_that_means_nothing_lists_what_there_is(pattern: str, message: str) -> None:
    with pytest.raises(UnknownHookError, match=message):
        expand_key(pattern, many_layers())


def test_what_no_module_emits_is_not_captured_and_says_how_to_get_it() -> None:
    model = HookedModel(make_model("llama"))
    assert not any(point.component in DERIVED for point in model.hook_points.values())
    for name in ("blocks.1.attn.hook_result", "head_out_L1H0"):
        with pytest.raises(UnknownHookError, match=r"made of blocks.1.attn.hook_z, no module emits it: HookedModel"):
            model.run_with_cache([1, 2], name)
