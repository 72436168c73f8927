"""Direct logit attribution: on every architecture the parts add up to the logit; single parts against float64."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every_architecture import on_every_architecture
from reference import forward
from tiny_models import CONFIGS, make_model

from mlx_hooks import (
    ActivationLoader,
    ActivationSaver,
    ExtractionConfig,
    HookedModel,
    HookError,
    LogitLens,
    attribution_points,
    direct_logit_attribution,
)
from mlx_hooks.analysis import attribution
from mlx_hooks.analysis.attribution import Attribution
from mlx_hooks.contributions import HeadParts
from mlx_hooks.coverage.models import tiny_model

TOKENS = [[1, 5, 9, 3, 7], [2, 4, 4, 8, 0]]
PAIRS = [(11, 3), (20, 7)]
REFUSED = {
    "deepseek_v41": "the last block also gives the weights that mix its streams",
    "gemma3n": "layer 0: the block mixes several streams",
    "kimi_k3": "the last norm reads a mixture",
    "muse_spark": "layer 0: branches are normed and weighed",
    "nanbeige": "its last norm makes the stream anew after each pass through the layers",
    "nanochat": "its last norm is a function, not a module",
    "talkie": "its last norm is a function, not a module",
}
CAPPED = ("gear", "gear/no_softcap", "gemma2", "gemma4", "gemma4_text", "muse_glimmer", "recurrent_gemma")


def attributed(model: HookedModel, tokens: object, positions: object = None, rows: list | None = None) -> Attribution:
    _, cache = model.run_with_cache(rows or TOKENS, attribution_points(model))
    return direct_logit_attribution(cache, tokens, model=model, positions=positions)  # type: ignore[arg-type]


@on_every_architecture
def test_contributions_add_up_to_the_models_own_logits(name: str) -> None:
    model = HookedModel(tiny_model(name))
    if name in REFUSED:
        with pytest.raises(HookError, match=f"The logits of {name} are no sum of its parts: {REFUSED[name]}"):
            attribution_points(model)
        return
    # mlx-lm's own olmo runs on single tokens only.
    rows = [row[:1] for row in TOKENS] if name == "olmo" else TOKENS
    logits = np.array(model(rows), dtype=np.float64)
    for tokens in (PAIRS, [pair[0] for pair in PAIRS]):
        found = attributed(model, tokens, rows=rows)
        largest = max(1.0, *(np.abs(c.values).max() for c in found.contributions))
        assert found.deviation < 2e-5 * largest
        np.testing.assert_allclose(found.total, found.logits, atol=1e-4)
        assert (found.cap is not None) == (name.startswith(CAPPED))
        if found.cap is None:
            own = np.stack([logits[i, :, pair[0]] for i, pair in enumerate(PAIRS)])
            own -= 0 if tokens is not PAIRS else np.stack([logits[i, :, pair[1]] for i, pair in enumerate(PAIRS)])
            np.testing.assert_allclose(found.total, own, atol=1e-4)
        elif tokens is not PAIRS:
            own = np.stack([logits[i, :, pair[0]] for i, pair in enumerate(PAIRS)])
            np.testing.assert_allclose(found.cap * np.tanh(found.total / found.cap), own, atol=1e-4)
    assert found.notes.keys() == ({0, 1} if name.startswith("longcat") else set())


@pytest.mark.parametrize("name", ["llama", "llama_untied", "qwen2", "gpt2"])
def test_every_contribution_is_the_formula_in_float64(name: str) -> None:
    inner = make_model(name)
    expected = parts_in_float64(name, inner, TOKENS, PAIRS)
    found = attributed(HookedModel(inner), PAIRS)
    assert set(found.names()) == set(expected)
    for part, values in expected.items():
        np.testing.assert_allclose(found[part], values, rtol=1e-3, atol=1e-4, err_msg=part)


def parts_in_float64(
    name: str, inner: nn.Module, tokens: list[list[int]], pairs: list[tuple[int, int]]
) -> dict[str, np.ndarray]:
    """Each part's share of the logit difference, from the formulas."""
    values = forward(inner, tokens)
    gpt2, trunk = name == "gpt2", inner.model
    norm = trunk.ln_f if gpt2 else trunk.norm
    head = inner.lm_head if "lm_head" in inner else trunk.wte if gpt2 else trunk.embed_tokens
    unembedding = np.array(head.weight).astype(np.float64)
    direction = np.stack([unembedding[a] - unembedding[b] for a, b in pairs])[:, None]
    last = values["ln_final.hook_in"]

    def centred(x: np.ndarray) -> np.ndarray:
        return x - x.mean(-1, keepdims=True) if gpt2 else x

    size = np.sqrt((centred(last) ** 2).mean(-1, keepdims=True) + 1e-5)

    def share(x: np.ndarray) -> np.ndarray:
        return (centred(np.broadcast_to(x, last.shape)) / size * np.array(norm.weight) * direction).sum(-1)

    found = {"embed": share(values["hook_embed"])}
    if gpt2:
        found["pos_embed"] = share(values["hook_pos_embed"])
        found["final norm bias"] = np.broadcast_to((np.array(norm.bias) * direction).sum(-1), last.shape[:2])
    for i in range(3):
        block = trunk.h[i] if gpt2 else trunk.layers[i]
        out = block.attn.c_proj if gpt2 else block.self_attn.o_proj
        z = values[f"blocks.{i}.attn.hook_z"]
        weight = np.array(out.weight).astype(np.float64).reshape(last.shape[-1], *z.shape[2:])
        for h in range(z.shape[2]):
            found[f"L{i}H{h}"] = share(z[:, :, h] @ weight[:, h].T)
        mlp = values[f"blocks.{i}.hook_mlp_out"]
        if gpt2:
            found[f"L{i} attn bias"] = share(np.array(out.bias))
            found[f"L{i} mlp bias"] = share(np.array(block.mlp.c_proj.bias))
            mlp = mlp - np.array(block.mlp.c_proj.bias)
        found[f"L{i} mlp"] = share(mlp)
    return found


def test_an_unembedding_bias_has_its_own_share() -> None:
    inner = tiny_model("phi")
    found = attributed(HookedModel(inner), PAIRS)
    bias = np.array(inner.lm_head.bias)
    expected = [[bias[a] - bias[b]] * 5 for a, b in PAIRS]
    np.testing.assert_allclose(found["unembedding bias"], expected, atol=1e-6)
    assert "final norm bias" in found.names()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models_add_up(bits: int) -> None:
    inner = tiny_model("llama")
    nn.quantize(inner, group_size=32, bits=bits)
    found = attributed(HookedModel(inner), PAIRS)
    np.testing.assert_allclose(found.total, found.logits, atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_adds_up_within_its_rounding(dtype: mx.Dtype) -> None:
    for name in ("llama", "gpt2"):
        found = attributed(HookedModel(make_model(name, dtype=dtype)), PAIRS)
        largest = max(np.abs(c.values).max() for c in found.contributions)
        assert found.deviation < 8 * mx.finfo(dtype).eps * max(1.0, largest)


def test_positions_are_absolute_and_may_be_selected_while_capturing() -> None:
    model = HookedModel(make_model("gpt2"))
    whole = attributed(model, PAIRS)
    assert whole.positions == [0, 1, 2, 3, 4]
    some = attributed(model, PAIRS, positions=[3, -1])
    assert some.positions == [3, 4]
    np.testing.assert_allclose(some["L1H2"], whole["L1H2"][:, [3, 4]], atol=1e-6)
    default = direct_logit_attribution(
        model.run_with_cache(TOKENS, attribution_points(model), positions=[1, 2])[1], PAIRS, model=model
    )
    assert default.positions == [2]
    np.testing.assert_allclose(default["pos_embed"], whole["pos_embed"][:, [2]], atol=1e-5)


def test_the_bundled_model_names_its_heads(tiny: HookedModel) -> None:
    prompt = "When Mary and John went to the store , John gave a drink to"
    _, cache = tiny.run_with_cache(prompt, attribution_points(tiny), positions="last")
    found = LogitLens(tiny).direct_logit_attribution(cache, ("Mary", "John"))
    assert found.logits.item() > 1
    np.testing.assert_allclose(found.total, found.logits, atol=1e-4)
    name, value = found.top(1)[0]
    assert np.abs(found[name].item()) == abs(value) == max(np.abs(c.values.item()) for c in found.contributions)
    shown = str(found)
    assert shown.splitlines()[0] == "logit difference at position 14"
    assert shown.splitlines()[-1].startswith("sum  ")
    plain = found.to_dict()
    assert plain["contributions"][0]["name"] == "embed"
    assert plain["positions"] == [14]
    heads = [(c["layer"], c["head"]) for c in plain["contributions"] if c["head"] is not None]
    assert heads == [(layer, head) for layer in range(4) for head in range(4)]


def test_a_run_with_edits_does_not_add_up_silently() -> None:
    model = HookedModel(make_model("llama"))
    _, cache = model.run_with_cache(TOKENS, attribution_points(model))
    _, other = model.run_with_cache([row[::-1] for row in TOKENS], "blocks.1.hook_mlp_out")
    cache.records["blocks.1.hook_mlp_out"] = other.records["blocks.1.hook_mlp_out"]
    with pytest.raises(HookError, match=r"do not add up to the logit: they are off by .* allowed is 0.0001 of the lar"):
        direct_logit_attribution(cache, PAIRS, model=model)


def test_an_edited_run_is_attributed_where_the_edit_is_in_the_sum() -> None:
    model = HookedModel(make_model("llama"))
    for name, summed in (("attn.hook_z", True), ("hook_mlp_out", True), ("hook_resid_post", False)):
        edit = {"hook_point": f"blocks.1.{name}", "type": "scale", "factor": 2.0}
        logits, cache = model.run_with_cache(TOKENS, attribution_points(model), interventions=[edit])
        if not summed:
            with pytest.raises(HookError, match="do not add up to the logit"):
                direct_logit_attribution(cache, 3, model=model)
            continue
        found = direct_logit_attribution(cache, 3, model=model)
        np.testing.assert_allclose(found.total, np.array(logits)[:, -1:, 3], atol=1e-4)


class Capped(nn.Linear):
    """An unembedding whose logits are capped softly at 2."""

    def __call__(self, x: mx.array) -> mx.array:
        return 2 * mx.tanh(super().__call__(x) / 2)


def test_a_cap_that_the_configuration_does_not_state_is_found() -> None:
    inner = make_model("llama_untied")
    inner.lm_head.__class__ = Capped
    model = HookedModel(inner)
    _, cache = model.run_with_cache(TOKENS, attribution_points(model))
    with pytest.raises(HookError, match="The end of llama is no linear map of what the last norm gives"):
        direct_logit_attribution(cache, PAIRS, model=model)


def test_a_bias_before_a_cap_has_its_own_share() -> None:
    inner = make_model("llama_untied")
    # So small that the caps are not so near that rounding counts.
    inner.lm_head.weight = 0.1 * inner.lm_head.weight
    inner.lm_head.bias = mx.linspace(-1, 1, 60)
    inner.lm_head.__class__ = Capped
    inner.args.final_logit_softcapping = 2.0
    found = attributed(HookedModel(inner), PAIRS)
    bias = np.linspace(-1, 1, 60)
    np.testing.assert_allclose(found["unembedding bias"], [[bias[a] - bias[b]] * 5 for a, b in PAIRS], atol=1e-5)
    np.testing.assert_allclose(found.total, found.logits, atol=1e-4)


@pytest.mark.parametrize(
    ("missing", "tokens", "positions", "message"),
    [
        (
            "blocks.1.hook_mlp_out",
            PAIRS,
            -1,
            r"lack blocks.1.hook_mlp_out: run_with_cache\(prompt, attribution_po",
        ),
        ("blocks.2.attn.hook_z", PAIRS, -1, "The activations lack blocks.2.attn.hook_z"),
        ("blocks.0.hook_resid_pre", PAIRS, -1, "The activations lack blocks.0.hook_resid_pre"),
        ("ln_final.hook_in", PAIRS, -1, "The activations lack ln_final.hook_in"),
        ("", [1, 2, 3], -1, "one for all: got 3 for 2 rows"),
        ("", [61], -1, "A token is an id from 0 to 59"),
        ("", PAIRS, 7, "ln_final.hook_in was not captured at position 7"),
        ("", PAIRS, -6, "positions is None, a whole number or a list of them, got -6"),
        ("", PAIRS, "last", "positions is None, a whole number or a list of them, got 'last'"),
        ("", PAIRS, 1.5, "positions is None, a whole number or a list of them, got 1.5"),
        ("", PAIRS, slice(1, 2), "positions is None, a whole number or a list of them, got slice"),
        ("", PAIRS, True, "positions is None, a whole number or a list of them, got True"),
        ("", PAIRS, [], r"positions is None, a whole number or a list of them, got \[\]"),
    ],
)
def test_what_is_missing_or_wrong_is_said(missing: str, tokens: list, positions: object, message: str) -> None:
    model = HookedModel(make_model("llama"))
    names = [name for name in attribution_points(model) if name != missing]
    _, cache = model.run_with_cache(TOKENS, names)
    with pytest.raises(HookError, match=message):
        direct_logit_attribution(cache, tokens, model=model, positions=positions)  # type: ignore[arg-type]


def test_an_unknown_contribution_lists_what_there_is() -> None:
    found = attributed(HookedModel(make_model("llama")), PAIRS)
    with pytest.raises(HookError, match="There is no contribution 'L9H0'. There are: embed, L0H0, L0H1"):
        found["L9H0"]


def test_positions_may_be_numpys_and_places_are_checked() -> None:
    model = HookedModel(make_model("llama"))
    for positions in (np.int64(1), [np.int64(1)], np.array([1]), mx.array([1])):
        assert attributed(model, PAIRS, positions).positions == [1]
    found = attributed(model, PAIRS)
    assert found.top(1, row=np.int64(1), position=4) == found.top(1, row=-1)
    for place in ({"row": 9}, {"row": -3}, {"position": 5}, {"position": 1.5}, {"row": [0]}, {"row": True}):
        with pytest.raises(HookError, match=r"has 2 rows of 5 positions, counted from 0: there is no row"):
            found.top(3, **place)


FLAGS = ("embed", "resid_in", "head_out", "attn_out", "mlp_out", "last_layernorm")


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gemma2", "phi"])
def test_what_forward_keeps_is_attributed(name: str, tmp_path: Path) -> None:
    model = HookedModel(make_model(name) if name in CONFIGS else tiny_model(name))
    config = ExtractionConfig(**{f"extract_{flag}": True for flag in FLAGS})
    whole = attributed(model, PAIRS)
    cache = model.forward(TOKENS, ["all"], config)
    folder = ActivationSaver(tmp_path).save_cache(cache)
    assert folder.is_dir()
    loaded, _ = ActivationLoader(tmp_path).query().load(-1)
    for held in (cache, loaded, {key: cache.numpy(key) for key in cache}):
        found = direct_logit_attribution(held, PAIRS, model=model, positions=None)
        assert found.names() == whole.names()
        for part in found.names():
            np.testing.assert_allclose(found[part], whole[part], atol=1e-4, err_msg=part)
    last = model.extract_cache(
        [row[:n] for row, n in zip(TOKENS, (5, 3), strict=True)], ["last"], config, progress=False
    )
    assert direct_logit_attribution(last, PAIRS, model=model).total.shape == (2, 1)


def test_what_no_flag_keeps_is_named_with_the_way_to_it() -> None:
    model = HookedModel(tiny_model("lfm2"))
    cache = model.forward(TOKENS, ["all"], ExtractionConfig(**{f"extract_{flag}": True for flag in FLAGS}))
    needed = r"run_with_cache\(prompt, attribution_points\(model\)\) captures all that is needed"
    with pytest.raises(HookError, match=f"The activations lack blocks.0.mixer.hook_out: {needed}"):
        direct_logit_attribution(cache, PAIRS, model=model)


def test_some_heads_do_not_add_up_to_attention() -> None:
    model = HookedModel(make_model("llama"))
    heads = [{"layer": layer, "head": head} for layer, head in ((0, 0), (0, 2), (1, 1), (2, 0))]
    config = ExtractionConfig(**{f"extract_{flag}": True for flag in FLAGS}, attn_heads=heads)
    cache = model.forward(TOKENS, ["all"], config)
    with pytest.raises(HookError, match=r"blocks.0.attn.hook_result holds the heads 0, 2: attribution needs all 4"):
        direct_logit_attribution(cache, PAIRS, model=model)


def test_one_part_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedModel(make_model("llama"))
    order = []
    of, contribution = HeadParts.of, attribution._Part.contribution
    monkeypatch.setattr(HeadParts, "of", lambda parts, head: order.append("made") or of(parts, head))
    monkeypatch.setattr(
        attribution._Part, "contribution", lambda part, *end: order.append("read") or contribution(part, *end)
    )
    _, cache = model.run_with_cache(TOKENS, attribution_points(model))
    order.clear()
    direct_logit_attribution(cache, PAIRS, model=model)
    assert "made made" not in " ".join(order)
    assert order.count("made") == 12


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama"])
def test_an_edit_of_what_attention_adds_is_not_taken_for_its_bias(name: str) -> None:
    model = HookedModel(make_model(name) if name in CONFIGS else tiny_model(name))
    config = ExtractionConfig(**{f"extract_{flag}": True for flag in FLAGS})
    edit = {"hook_point": "blocks.1.hook_attn_out", "type": "zero"}
    cache = model.forward(TOKENS, ["all"], config, interventions=[edit])
    assert not np.any(cache.numpy("blocks.1.hook_attn_out"))
    with pytest.raises(HookError, match="do not add up to the logit"):
        direct_logit_attribution(cache, PAIRS, model=model, positions=None)


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_behind_a_norm_only_its_scale_is_read_from_what_was_added(norm: type) -> None:
    mx.random.seed(0)
    project, after = nn.Linear(32, 32), norm(32)
    after.weight = mx.random.uniform(0.5, 1.5, (32,))
    path = replace(HookedModel(make_model("llama")).head_path(0), project=project, after=after, factor=0.5)
    value = mx.random.normal((2, 5, path.n_heads, path.d_head))
    heads, constant = path.split(value)
    whole = 0.5 * after(project(value.reshape(2, 5, -1)))
    np.testing.assert_allclose(path.constant_in(whole - heads.sum(axis=-2)), constant, atol=1e-5)
    edited = path.constant_in(0 * whole - heads.sum(axis=-2))
    assert np.abs(np.array(edited + heads.sum(axis=-2))).max() > 0.1


def test_positions_of_a_mapping_are_places_along_its_axis(tmp_path: Path) -> None:
    model = HookedModel(make_model("llama"))
    _, cache = model.run_with_cache(TOKENS, attribution_points(model))
    mapping = {key: cache.numpy(key) for key in cache}
    for positions in (-1, 1, [0, 2], [2, -1], None):
        found = direct_logit_attribution(mapping, PAIRS, model=model, positions=positions)
        expected = direct_logit_attribution(cache, PAIRS, model=model, positions=positions)
        assert found.positions is None
        for part in expected.names():
            np.testing.assert_allclose(found[part], expected[part], atol=1e-5, err_msg=part)
    for positions, shown in ((1, "its one position"), ([0, 2], "the last of 2 positions")):
        found = direct_logit_attribution(mapping, PAIRS, model=model, positions=positions)
        assert str(found).splitlines()[0] == f"logit difference at row 0 of 2, {shown}"
    for positions in (99, [0, 5]):
        with pytest.raises(HookError, match=r"ln_final.hook_in was not captured at position (99|5)"):
            direct_logit_attribution(mapping, PAIRS, model=model, positions=positions)
    ActivationSaver(tmp_path).save(mapping, model, ["all"], None, None)
    loaded, _ = ActivationLoader(tmp_path).query().load(-1)
    again = direct_logit_attribution(loaded, PAIRS, model=model)
    assert again.logits.shape == (2, 1)
    assert len(str(again).splitlines()) == len(again.names()) + 2


def test_arrays_of_unlike_runs_are_refused() -> None:
    model = HookedModel(make_model("llama"))
    _, cache = model.run_with_cache(TOKENS, attribution_points(model))
    mapping, name = {key: cache.numpy(key) for key in cache}, "blocks.1.hook_mlp_out"
    for part, held in ((np.s_[:, -1:], "batch 2, pos 1"), (np.s_[:1], "batch 1, pos 5")):
        with pytest.raises(HookError, match=f"{name} holds {held} and ln_final.hook_in batch 2, pos 5: they are of"):
            direct_logit_attribution(mapping | {name: mapping[name][part]}, PAIRS, model=model)
    config = ExtractionConfig(**{f"extract_{flag}": True for flag in FLAGS})
    kept = model.forward(TOKENS, ["all"], config)
    mapping, name = {key: kept.numpy(key) for key in kept}, "blocks.1.attn.hook_result"
    with pytest.raises(HookError, match=rf"{name} has head 4, got an array of shape \(2, 5, 2, 32\)"):
        direct_logit_attribution(mapping | {name: mapping[name][:, :, :2]}, PAIRS, model=model)


def test_a_frozen_norm_reads_what_it_was_frozen_for() -> None:
    model = HookedModel(make_model("llama"))
    _, cache = model.run_with_cache(TOKENS, ["blocks.1.hook_resid_post", "ln_final.hook_in"])
    mapping, name = {key: cache.numpy(key) for key in cache}, "blocks.1.hook_resid_post"
    for part, held in ((np.s_[:, -1:], "batch 2, pos 1"), (np.s_[:1], "batch 1, pos 5")):
        with pytest.raises(HookError, match=f"{name} holds {held} and the last norm's input batch 2, pos 5"):
            LogitLens(model).compute(mapping | {name: mapping[name][part]}, name, norm="final")
