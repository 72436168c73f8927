"""Captures of traits, of all layers and of one, against what one full forward pass over prompt and response shows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import reference
from every_architecture import FALCON_H1, IS_OLDER, OLDER
from mlx.utils import tree_flatten
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError, TraitVector, capture_all_layers, capture_single_layer
from mlx_hooks.activations import ActivationCache
from mlx_hooks.analysis.identity import ModelIdentity
from mlx_hooks.analysis.traits.prompts import Chat
from mlx_hooks.analysis.traits.records import write_record
from mlx_hooks.analysis.traits.verify import verify_format
from mlx_hooks.coverage.models import tiny_model

PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
"""11 tokens: longer than the sliding windows, which are 8."""
N = len(PROMPT)
MAX_TOKENS = 4
BFLOAT16 = "llama, bfloat16"
# Grouped queries, soft caps and norms after sublayers, no gates, parallel branches, experts, mixers, sinks, a latent.
NAMES = ["llama", "gemma2", "gpt2", "cohere", "mixtral", "jamba", "mamba", FALCON_H1, "gpt_oss", "minicpm3", BFLOAT16]


@pytest.fixture(scope="module", params=NAMES)
def any_model(request: pytest.FixtureRequest) -> HookedModel:
    if request.param == BFLOAT16:
        return HookedModel(tiny_model("llama", dtype=mx.bfloat16))
    return HookedModel(tiny_model(request.param))


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    """Four query heads on two key-value heads."""
    return HookedModel(tiny_model("llama"))


def vector_of(model: HookedModel, trait: str = "polite", layer: int = 0, seed: int = 0, **more: Any) -> TraitVector:
    numbers = np.random.default_rng(seed).normal(size=model.cfg.d_model).astype(np.float32)
    return TraitVector(trait, layer, "mean_diff", numbers, **more)


def whole_run(model: HookedModel, record: dict) -> ActivationCache:
    """One pass over prompt and response, without a KV cache."""
    ids = record["prompt"]["token_ids"] + record["response"]["token_ids"]
    return model.run_with_cache(ids)[1]


def close(model: HookedModel, got: np.ndarray, expected: np.ndarray, what: object = "") -> None:
    """Equal within what a pass in chunks may differ by from one pass, relative to the largest value."""
    assert got.shape == expected.shape, what
    half = any(weight.dtype == mx.bfloat16 for _, weight in tree_flatten(model.model.parameters()))
    atol = (0.04 if half else 1e-5) * max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol, err_msg=str(what))


def along(vector: TraitVector, value: np.ndarray) -> np.ndarray:
    """h.v/|v| in float64."""
    v = vector.vector.astype(np.float64)
    return value.astype(np.float64) @ (v / np.sqrt((v**2).sum()))


def added(cache: ActivationCache, layer: int) -> np.ndarray:
    """What a layer's attention and mixer add to its stream."""
    names = [f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.mixer.hook_out"]
    return np.asarray(sum(cache.numpy(name)[0] for name in names if name in cache))


def rows_of(record: dict, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a whole run [token, ...] that prompt and response of a record show."""
    first = N if record["metadata"]["alignment"] == "at" else N - 1
    return whole[:N], whole[first : first + record["response"]["n_tokens"]]


# All layers


@pytest.mark.parametrize("alignment", ["at", "predicts"])
def test_projections_are_those_of_the_residual_stream(any_model: HookedModel, alignment: str) -> None:
    vector = vector_of(any_model)
    [record] = capture_all_layers(any_model, PROMPT, [vector], max_tokens=MAX_TOKENS, alignment=alignment, seed=3)
    cache, n_layers = whole_run(any_model, record), any_model.cfg.n_layers
    stream = []
    for layer in range(n_layers):
        before, after = (cache.numpy(f"blocks.{layer}.hook_resid_{end}")[0] for end in ("pre", "post"))
        # The real residual: what enters, and what attention adds.
        stream.append([along(vector, value) for value in (before, before + added(cache, layer), after)])
    expected = rows_of(record, np.array(stream).transpose(2, 0, 1))
    for part, rows in zip(("prompt", "response"), expected, strict=True):
        got = record["projections"][part]
        assert got.dtype == np.float32
        assert got.shape == (record[part]["n_tokens"], n_layers, 3)
        close(any_model, got, rows, part)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_projections_are_those_of_the_formulas(name: str) -> None:
    """An oracle that shares no code with the engine."""
    model = HookedModel(make_model(name))
    vector = vector_of(model, layer=1)
    [record] = capture_all_layers(model, PROMPT, [vector], max_tokens=MAX_TOKENS)
    values = reference.forward(model.model, [PROMPT + record["response"]["token_ids"]])
    for layer in range(model.cfg.n_layers):
        for i, point in enumerate(("hook_resid_pre", "hook_resid_mid", "hook_resid_post")):
            scores = along(vector, values[f"blocks.{layer}.{point}"][0])
            got = np.concatenate([record["projections"][part][:, layer, i] for part in ("prompt", "response")])
            np.testing.assert_allclose(got, scores, rtol=1e-3, atol=1e-3)
        pattern = values[f"blocks.{layer}.attn.hook_pattern"][0].mean(axis=0)
        weights = record["attention_weights"]
        np.testing.assert_allclose(weights["prompt"][f"layer_{layer}"], pattern[:N, :N], rtol=0, atol=1e-4)
        for k, row in enumerate(weights["response"]):
            np.testing.assert_allclose(row[f"layer_{layer}"], pattern[N + k, : N + k + 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("alignment", ["at", "predicts"])
def test_attention_is_the_mean_pattern_over_heads(any_model: HookedModel, alignment: str) -> None:
    [record] = capture_all_layers(
        any_model, PROMPT, [vector_of(any_model)], max_tokens=MAX_TOKENS, alignment=alignment, temperature=0
    )
    cache = whole_run(any_model, record)
    attending = [i for i in range(any_model.cfg.n_layers) if f"blocks.{i}.attn.hook_pattern" in cache]
    keys = [f"layer_{layer}" for layer in attending]
    weights, without = record["attention_weights"], record["metadata"]["layers_without_attention"]
    assert list(weights["prompt"]) == keys
    assert sorted(map(int, without)) == [i for i in range(any_model.cfg.n_layers) if i not in attending]
    assert all("mixer" in why for why in without.values())
    assert len(weights["response"]) == record["response"]["n_tokens"] == MAX_TOKENS
    for layer, key in zip(attending, keys, strict=True):
        pattern = cache.numpy(f"blocks.{layer}.attn.hook_pattern")[0].mean(axis=0)
        close(any_model, weights["prompt"][key], pattern[:N, :N], key)
        for k, row in enumerate(weights["response"]):
            assert list(row) == keys
            n_keys = N + k + (alignment == "at")
            close(any_model, row[key], pattern[n_keys - 1, :n_keys], (key, k))


def test_a_prompt_is_run_once_for_all_traits_and_each_token_once(llama: HookedModel) -> None:
    vectors = [vector_of(llama, f"trait_{i}", layer=i % 2, seed=i) for i in range(5)]
    passes: list[int] = []
    with llama.hooks([("hook_embed", lambda value, point: passes.append(value.shape[1]))]):
        records = capture_all_layers(llama, PROMPT, vectors, max_tokens=MAX_TOKENS)
        assert passes == [N - 1, 1] + [1] * MAX_TOKENS
        passes.clear()
        capture_single_layer(llama, PROMPT, vectors, layer=1, max_tokens=MAX_TOKENS, alignment="predicts")
        # The last token is read only where its own state is shown.
        assert passes == [N - 1, 1] + [1] * (MAX_TOKENS - 1)
    for vector, record in zip(vectors, records, strict=True):
        [alone] = capture_all_layers(llama, PROMPT, [vector], max_tokens=MAX_TOKENS)
        assert record["metadata"]["trait"] == vector.trait
        np.testing.assert_allclose(record["projections"]["response"], alone["projections"]["response"], atol=1e-5)
        assert record["metadata"] | {"capture_date": ""} == alone["metadata"] | {"capture_date": ""}


def test_metadata_says_how_a_capture_was_made(tiny: HookedModel) -> None:
    vector = vector_of(tiny, "social_proof", layer=2)
    [record] = capture_all_layers(tiny, "The capital of France is", [vector], max_tokens=3, temperature=0, seed=7)
    expected = {
        "trait": "social_proof",
        "trait_display_name": "Social Proof",
        "vector_path": None,
        "model": "neuroscope-tiny",
        "temperature": 0,
        "layer": 2,
        "method": "mean_diff",
        "vector_norm": pytest.approx(np.linalg.norm(vector.vector)),
        "projection": "h.v/|v|",
        "alignment": "at",
        "sublayers": ["residual_in", "after_attn", "residual_out"],
        "after_attn": ["hook_resid_mid"] * 4,
        "attention": "mean over heads",
        "seed": 7,
        "top_p": 0.9,
        "max_tokens": 3,
        "finish_reason": "stop",
        "n_layers": 4,
        "d_model": 128,
        "n_heads": 4,
        "chat": {"use": None, "system": None, "template": None, "used": True},
        "model_identity": ModelIdentity.of(tiny).to_dict(),
    }
    assert {key: record["metadata"][key] for key in expected} == expected
    assert record["metadata"]["capture_date"].endswith("+00:00")
    assert record["prompt"]["text"] == "The capital of France is"
    assert record["prompt"]["tokens"] == tiny.to_str_tokens(record["prompt"]["token_ids"])
    assert record["response"]["tokens"] == tiny.to_str_tokens(record["response"]["token_ids"])


@pytest.mark.skipif(IS_OLDER, reason=OLDER)
def test_parallel_branches_say_what_the_stream_after_attention_is_made_of() -> None:
    model = HookedModel(tiny_model("nemotron_h"))
    [record] = capture_all_layers(model, PROMPT, [vector_of(model)], max_tokens=1)
    kinds = [[s.kind for s in sublayers] for sublayers in model.architecture.sublayers]
    made_of = {"mixer": "hook_resid_pre + mixer.hook_out", "attn": "hook_resid_pre + hook_attn_out"}
    assert record["metadata"]["after_attn"] == [made_of.get(kind, "hook_resid_pre") for [kind] in kinds]
    assert set(record["metadata"]["after_attn"]) == {"hook_resid_pre", *made_of.values()}


def test_of_layers_that_run_several_times_the_last_is_shown() -> None:
    model = HookedModel(tiny_model("nanbeige"))
    vector = vector_of(model)
    [record] = capture_all_layers(model, PROMPT, [vector], max_tokens=2)
    [inside] = capture_single_layer(model, PROMPT, [vector], layer=0, max_tokens=2)
    assert record["metadata"]["n_passes"] == inside["metadata"]["n_passes"] == 2
    last = whole_run(model, record).of_pass(1)
    expected = last.numpy("blocks.0.hook_resid_post")[0]
    for part, rows in zip(("prompt", "response"), rows_of(record, along(vector, expected)), strict=True):
        close(model, record["projections"][part][:, 0, 2], rows)
        close(model, inside["projections"][part]["residual"][:, 2], rows)
    pattern = last.numpy("blocks.0.attn.hook_pattern")[0]
    close(model, inside["internals"]["prompt"]["attention"]["attn_weights"], pattern[:, :N, :N])


def test_a_quantised_models_parts_add_up() -> None:
    quantised = tiny_model("llama")
    nn.quantize(quantised, group_size=32, bits=4)
    model = HookedModel(quantised)
    vector = vector_of(model)
    [record] = capture_single_layer(model, PROMPT, [vector], layer=0, max_tokens=2)
    neurons = record["projections"]["neurons"]
    for part in ("prompt", "response"):
        found, mlp = record["projections"][part], record["internals"][part]["mlp"]
        close(model, found["heads"].sum(axis=1) + found["heads_bias"], found["attn_out"])
        close(model, mlp["activated"] @ neurons["alignment"] + neurons["bias"], found["mlp_out"])
    cfg = model.cfg
    assert record["metadata"]["widths"]["attention/v_proj"] == cfg.n_key_value_heads * cfg.d_head
    assert record["metadata"]["widths"]["mlp/down_proj"] == cfg.d_model


def test_the_same_seed_draws_the_same_response(tiny: HookedModel) -> None:
    def response(seed: int) -> list[int]:
        [record] = capture_all_layers(
            tiny, "The", [vector_of(tiny)], max_tokens=9, temperature=3.0, top_p=1.0, seed=seed
        )
        return record["response"]["token_ids"]

    assert response(1) == response(1) != response(2)


def test_traits_with_chats_of_their_own_read_their_own_tokens(tiny: HookedModel) -> None:
    plain = vector_of(tiny, "plain", chat=Chat(use=False))
    own = vector_of(tiny, "own", chat=Chat(template="{{ messages[0].content }} the"))
    again = vector_of(tiny, "again", chat=Chat(use=False), seed=4)
    passes: list[int] = []
    with tiny.hooks([("hook_embed", lambda value, point: passes.append(value.shape[1]))]):
        records = capture_all_layers(tiny, "The capital", [plain, own, again], max_tokens=0)
    assert [record["metadata"]["trait"] for record in records] == ["plain", "own", "again"]
    tokens = [record["prompt"]["tokens"] for record in records]
    assert tokens[0] == tokens[2] != tokens[1]
    assert tokens[1][-1] == "the"
    # The first and the third share a run.
    assert len(passes) == 4
    assert records[1]["metadata"]["chat"]["template"] == "{{ messages[0].content }} the"
    assert not records[0]["metadata"]["chat"]["used"]


def test_each_layer_may_be_measured_along_its_own_vector(llama: HookedModel) -> None:
    vectors = [vector_of(llama, layer=layer, seed=layer) for layer in range(llama.cfg.n_layers)]
    [record] = capture_all_layers(llama, PROMPT, [vectors], max_tokens=2)
    alone = capture_all_layers(llama, PROMPT, vectors, max_tokens=2)
    for layer in range(llama.cfg.n_layers):
        for part in ("prompt", "response"):
            got, own = (found["projections"][part][:, layer] for found in (record, alone[layer]))
            np.testing.assert_allclose(got, own, rtol=1e-5, atol=1e-5)
    assert record["metadata"]["each_layer"]
    assert record["metadata"]["layer"] is None
    assert len(record["metadata"]["vector_norm"]) == llama.cfg.n_layers
    with pytest.raises(HookError, match="there are none of 1"):
        capture_all_layers(llama, PROMPT, [vectors[:1]], max_tokens=2)


def test_a_vector_may_be_measured_in_its_own_length(llama: HookedModel) -> None:
    vector = vector_of(llama)
    [unit] = capture_all_layers(llama, PROMPT, [vector], max_tokens=1)
    [own] = capture_all_layers(llama, PROMPT, [vector], max_tokens=1, normalize=False)
    assert own["metadata"]["projection"] == "h.v"
    expected = unit["projections"]["prompt"] * vector.norm
    np.testing.assert_allclose(own["projections"]["prompt"], expected, rtol=1e-4, atol=1e-4)


def test_without_a_response_and_without_attention(llama: HookedModel) -> None:
    [record] = capture_all_layers(llama, PROMPT, [vector_of(llama)], max_tokens=0, attention=False)
    assert record["response"] == {"text": "", "tokens": [], "token_ids": [], "n_tokens": 0}
    assert record["projections"]["response"].shape == (0, llama.cfg.n_layers, 3)
    assert record["attention_weights"] == {"prompt": {}, "response": []}
    [record] = capture_all_layers(llama, PROMPT, [vector_of(llama)], max_tokens=2, attention=False)
    assert record["attention_weights"] == {"prompt": {}, "response": [{}, {}]}
    assert record["metadata"]["attention"] == "not captured"


def test_tokens_are_cut_to_the_context_and_longer_prompts_refused(tiny: HookedModel) -> None:
    limit = tiny.cfg.max_positions
    assert limit is not None
    [record] = capture_all_layers(tiny, [7] * (limit - 2), [vector_of(tiny)], max_tokens=50, temperature=3.0)
    assert record["response"]["n_tokens"] <= 2
    [record] = capture_all_layers(tiny, [7] * limit, [vector_of(tiny)], max_tokens=50)
    assert record["response"]["n_tokens"] == 0
    for capture in (capture_all_layers, lambda *given: capture_single_layer(*given, layer=0)):
        with pytest.raises(HookError, match=f"The prompt has {limit + 1} tokens; the model reads at most {limit}."):
            capture(tiny, [7] * (limit + 1), [vector_of(tiny)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vectors": []}, "vectors is a list of at least one TraitVector"),
        ({"vectors": "abc"}, "vectors is a list of at least one TraitVector"),
        ({"vectors": [np.ones(64)]}, "vectors is a list of at least one TraitVector"),
        ({"vectors": np.ones((2, 64))}, "vectors is a list of at least one TraitVector"),
        ({"vectors": [[]]}, "vectors is a list of at least one TraitVector"),
        ({"vectors": [[np.ones(64)]]}, "vectors is a list of at least one TraitVector"),
        ({"normalize": "no"}, "normalize is true or false, got 'no'"),
        ({"attention": "no"}, "attention is true or false, got 'no'"),
        ({"alignment": "before"}, "alignment is one of at, predicts, got 'before'"),
        ({"max_tokens": -1}, "max_tokens is a whole number from 0 up"),
        ({"seed": None}, "seed is a whole number from 0 up"),
        ({"top_p": 2.0}, "top_p is a number from 0 to 1"),
        ({"prompt": []}, "Tokens are"),
        ({"prompt": [[1, 2], [3, 4]]}, "A capture is of one prompt, got 2 rows"),
    ],
)
def test_bad_input_is_told_in_a_sentence(llama: HookedModel, changed: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"prompt": PROMPT, "vectors": [vector_of(llama)], "max_tokens": 1} | changed
    with pytest.raises(HookError, match=message):
        capture_all_layers(llama, asked.pop("prompt"), asked.pop("vectors"), **asked)


def test_vectors_of_other_models_are_refused(llama: HookedModel) -> None:
    other = ModelIdentity("llama", llama.cfg.n_layers, llama.cfg.d_model, llama.cfg.d_vocab, "another")
    for vector, message in [
        (vector_of(llama, identity=other), "is of another model: its weights differ"),
        (TraitVector("t", 0, "probe", np.ones(5)), "is 5 wide"),
        (vector_of(llama, layer=9), "is of layer 9"),
    ]:
        with pytest.raises(HookError, match=message):
            capture_all_layers(llama, PROMPT, [vector], max_tokens=1)
        with pytest.raises(HookError, match=message):
            capture_single_layer(llama, PROMPT, [vector], layer=0, max_tokens=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [("gemma3n", "A trait is measured in one residual stream"), ("kimi_k3", "The stream after attention of layer 0")],
)
def test_models_without_one_residual_stream_are_refused(name: str, message: str) -> None:
    model = HookedModel(tiny_model(name))
    with pytest.raises(HookError, match=message):
        capture_all_layers(model, PROMPT, [vector_of(model)], max_tokens=1)


# One layer


def layers_of(model: HookedModel) -> Iterator[int]:
    """The layers of a model that are made differently."""
    seen = set()
    for layer, sublayers in enumerate(model.architecture.sublayers):
        form = tuple((sublayer.kind, type(sublayer.module)) for sublayer in sublayers)
        if form not in seen:
            seen.add(form)
            yield layer


POINTS = {
    "attention": {"q_proj": "attn.hook_q", "k_proj": "attn.hook_k", "v_proj": "attn.hook_v"},
    "mlp": {"activated": "mlp.hook_post", "router_scores": "mlp.hook_router_scores",
            "expert_indices": "mlp.hook_expert_indices", "expert_weights": "mlp.hook_expert_weights"},
    "mixer": {"input": "mixer.hook_in", "output": "mixer.hook_out"},
}  # fmt: skip


@pytest.mark.parametrize("alignment", ["at", "predicts"])
def test_internals_are_those_of_one_full_pass(any_model: HookedModel, alignment: str) -> None:
    vector = vector_of(any_model)
    for layer in layers_of(any_model):
        [record] = capture_single_layer(
            any_model, PROMPT, [vector], layer=layer, max_tokens=MAX_TOKENS, alignment=alignment, temperature=0
        )
        cache, at = whole_run(any_model, record), f"blocks.{layer}"
        internals, absent = record["internals"], record["metadata"]["absent"]
        assert record["layer"] == record["metadata"]["layer"] == layer
        for group, names in POINTS.items():
            for name, point in names.items():
                if f"{at}.{point}" not in cache:
                    assert name not in internals["prompt"].get(group, {})
                    assert (
                        group == "mixer"
                        or name in ("router_scores", "expert_indices", "expert_weights")
                        or (absent[f"{group}/{name}"])
                    )
                elif f"{group}/{name}" not in absent:
                    value = cache.numpy(f"{at}.{point}")[0]
                    for part, rows in zip(internals, rows_of(record, value.reshape(len(value), -1)), strict=True):
                        close(any_model, internals[part][group][name], rows, (layer, part, name))
        before, after = (cache.numpy(f"{at}.hook_resid_{end}")[0] for end in ("pre", "post"))
        stream = {"input": before, "after_attn": before + added(cache, layer), "output": after}
        for name, value in stream.items():
            for part, rows in zip(internals, rows_of(record, value), strict=True):
                close(any_model, internals[part]["residual"][name], rows, (layer, part, name))
        check_attention_weights(any_model, record, cache)


def check_attention_weights(model: HookedModel, record: dict, cache: ActivationCache) -> None:
    name = f"blocks.{record['layer']}.attn.hook_pattern"
    if name not in cache:
        assert record["metadata"]["absent"]["attention/attn_weights"]
        return
    pattern = cache.numpy(name)[0]
    close(model, record["internals"]["prompt"]["attention"]["attn_weights"], pattern[:, :N, :N])
    rows = record["internals"]["response"]["attention"]["attn_weights"]
    assert len(rows) == MAX_TOKENS
    for k, row in enumerate(rows):
        n_keys = N + k + (record["metadata"]["alignment"] == "at")
        close(model, row, pattern[:, n_keys - 1, :n_keys], k)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_internals_are_those_of_the_formulas(name: str) -> None:
    model, layer = HookedModel(make_model(name)), 1
    vector = vector_of(model)
    [record] = capture_single_layer(model, PROMPT, [vector], layer=layer, max_tokens=MAX_TOKENS)
    oracle = reference._Reference(model.model, {})
    values = oracle.run(np.array([PROMPT + record["response"]["token_ids"]]))
    at, weights = f"blocks.{layer}", oracle.weights
    gated = name == "llama"
    path = f"model.layers.{layer}" if gated else f"model.h.{layer}"
    down, out = ("mlp.down_proj", "self_attn.o_proj") if gated else ("mlp.c_proj", "attn.c_proj")
    expected = {
        ("attention", "q_proj"): values[f"{at}.attn.hook_q"],
        ("attention", "k_proj"): values[f"{at}.attn.hook_k"],
        ("attention", "v_proj"): values[f"{at}.attn.hook_v"],
        ("mlp", "gate_proj"): values[f"{at}.mlp.hook_pre"] if gated else None,
        ("mlp", "up_proj"): values[f"{at}.mlp.hook_pre{'_linear' if gated else ''}"],
        ("mlp", "activated"): values[f"{at}.mlp.hook_post"],
        ("mlp", "down_proj"): values[f"{at}.hook_mlp_out"],
        ("residual", "after_attn"): values[f"{at}.hook_resid_mid"],
    }
    v = vector.vector.astype(np.float64) / vector.norm
    z = values[f"{at}.attn.hook_z"][0]
    # Each head's own slice of the output projection.
    slices = weights[f"{path}.{out}.weight"].reshape(model.cfg.d_model, model.cfg.n_heads, -1)
    heads = np.einsum("phd,mhd,m->ph", z, slices, v)
    for part, first in (("prompt", 0), ("response", N)):
        rows = slice(first, first + record[part]["n_tokens"])
        for (group, name_), value in expected.items():
            found = record["internals"][part][group].get(name_)
            if value is None:
                assert found is None
                continue
            np.testing.assert_allclose(found, value[0].reshape(value.shape[1], -1)[rows], rtol=1e-3, atol=1e-3)
        projected = record["projections"][part]
        np.testing.assert_allclose(projected["heads"], heads[rows], rtol=1e-3, atol=1e-3)
        for component in ("attn_out", "mlp_out"):
            scores = values[f"{at}.hook_{component}"][0] @ v
            np.testing.assert_allclose(projected[component], scores[rows], rtol=1e-3, atol=1e-3)
    neurons = record["projections"]["neurons"]
    np.testing.assert_allclose(neurons["alignment"], weights[f"{path}.{down}.weight"].T @ v, rtol=1e-4, atol=1e-5)
    bias = 0.0 if gated else weights[f"{path}.{down}.bias"] @ v
    np.testing.assert_allclose(neurons["bias"], bias, rtol=1e-4, atol=1e-5)


def test_what_heads_and_neurons_add_along_a_trait_adds_up(any_model: HookedModel) -> None:
    vectors = [vector_of(any_model, "one"), vector_of(any_model, "two", seed=9)]
    for layer in layers_of(any_model):
        records = capture_single_layer(any_model, PROMPT, vectors, layer=layer, max_tokens=MAX_TOKENS)
        for vector, record in zip(vectors, records, strict=True):
            neurons, about = record["projections"]["neurons"], record["metadata"]["neurons"]
            for part in ("prompt", "response"):
                found, mlp = record["projections"][part], record["internals"][part].get("mlp", {})
                stream = record["internals"][part]["residual"]
                close(any_model, found["residual"], np.stack([along(vector, x) for x in stream.values()], axis=1))
                if "heads" in found:
                    close(any_model, found["heads"].sum(axis=1) + found["heads_bias"], found["attn_out"])
                if "alignment" in neurons:
                    total = mlp["activated"] @ neurons["alignment"] + neurons["bias"]
                    whole = found["mlp_out"] if about.endswith("is mlp_out") else along(vector, mlp["down_proj"])
                    close(any_model, total, whole, (layer, about))
                    assert mlp["gelu"] is mlp["activated"]
                else:
                    assert record["metadata"]["absent"]["projections/neurons"] == about


def test_where_a_norm_follows_the_down_projection_metadata_says_so() -> None:
    for name, ending in (("llama", "is mlp_out"), ("gemma2", "before it is added to the stream")):
        model = HookedModel(tiny_model(name))
        [record] = capture_single_layer(model, PROMPT, [vector_of(model)], layer=0, max_tokens=0)
        assert record["metadata"]["neurons"].endswith(ending)


class NormedMLP(nn.Module):
    """A gated MLP whose neurons pass a norm before the down projection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj, self.ffn_sub_norm = nn.Linear(hidden, width, bias=False), nn.RMSNorm(hidden)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.ffn_sub_norm(nn.silu(self.gate_proj(x)) * self.up_proj(x)))


def test_where_a_norm_lies_before_the_down_projection_metadata_says_so() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp = NormedMLP(64, 32)
    hooked = HookedModel(model)
    [record] = capture_single_layer(hooked, PROMPT, [vector_of(hooked)], layer=0, max_tokens=0)
    assert record["metadata"]["neurons"].startswith("activated passes a norm before the down projection")
    assert record["internals"]["prompt"]["mlp"]["activated"].shape == (N, 32)


def test_of_layers_that_attend_several_times_the_last_is_told_of() -> None:
    model = HookedModel(tiny_model("longcat_flash"))
    vector, told = vector_of(model), "2 attentions: after_attn and attention weights are those of the last"
    [record] = capture_all_layers(model, PROMPT, [vector], max_tokens=1)
    [inside] = capture_single_layer(model, PROMPT, [vector], layer=0, max_tokens=1)
    assert record["metadata"]["attends_repeatedly"] == dict.fromkeys(map(str, range(model.cfg.n_layers)), told)
    assert inside["metadata"]["attends_repeatedly"] == {"0": told}
    # Each layer runs once.
    assert record["metadata"]["n_passes"] == inside["metadata"]["n_passes"] == 1


@pytest.mark.skipif(IS_OLDER, reason=OLDER)
def test_a_model_that_looks_ahead_by_itself_is_told_of(llama: HookedModel, tmp_path: Path) -> None:
    model, path = HookedModel(tiny_model("phi3small")), tmp_path / "prompt_0.safetensors"
    records = capture_all_layers(model, PROMPT, [vector_of(model)], max_tokens=1)
    records += capture_single_layer(model, PROMPT, [vector_of(model)], layer=0, max_tokens=1)
    assert 0 in records[0]["metadata"]["looks_ahead"]
    assert records[1]["metadata"]["looks_ahead"] == [0]
    for record in records:
        write_record(record, path)
        assert verify_format(path) == []
    [record] = capture_all_layers(llama, PROMPT, [vector_of(llama)], max_tokens=1)
    assert record["metadata"]["looks_ahead"] == []
    assert record["metadata"]["attends_repeatedly"] == {}


def test_widths_are_those_of_grouped_queries(llama: HookedModel) -> None:
    [record] = capture_single_layer(llama, PROMPT, [vector_of(llama)], layer=1, max_tokens=1)
    cfg, shapes = llama.cfg, {name: a.shape for name, a in record["internals"]["prompt"]["attention"].items()}
    assert cfg.n_key_value_heads < cfg.n_heads
    assert shapes == {
        "q_proj": (N, cfg.n_heads * cfg.d_head),
        "k_proj": (N, cfg.n_key_value_heads * cfg.d_head),
        "v_proj": (N, cfg.n_key_value_heads * cfg.d_head),
        "attn_weights": (cfg.n_heads, N, N),
    }
    points = record["metadata"]["hook_points"]
    assert record["metadata"]["n_key_value_heads"] == cfg.n_key_value_heads
    assert points["attention/q_proj"] == "blocks.1.attn.hook_q"
    assert points["attention/v_proj"] == "model.layers.1.self_attn.v_proj.output"
    assert points["residual/after_attn"] == "blocks.1.hook_resid_mid"


def test_what_a_layer_lacks_is_told_and_what_it_has_instead_is_there() -> None:
    experts = HookedModel(tiny_model("mixtral"))
    [record] = capture_single_layer(experts, PROMPT, [vector_of(experts)], layer=0, max_tokens=2)
    assert set(record["internals"]["response"]["mlp"]) == {"router_scores", "expert_indices", "expert_weights"}
    assert "experts" in record["metadata"]["absent"]["mlp/activated"]
    latent = HookedModel(tiny_model("deepseek_v2"))
    [record] = capture_single_layer(latent, PROMPT, [vector_of(latent)], layer=0, max_tokens=2)
    assert {"k", "v"} <= set(record["internals"]["prompt"]["attention"])
    assert "latent" in record["metadata"]["absent"]["attention/k_proj"]
    twice = HookedModel(tiny_model("longcat_flash"))
    [record] = capture_single_layer(twice, PROMPT, [vector_of(twice)], layer=0, max_tokens=2)
    assert record["metadata"]["absent"]["attention/q_proj"] == "the layer has 2 sublayers of this kind"
    assert "attn_out" not in record["projections"]["prompt"]


def test_a_layer_that_is_not_there_is_refused(llama: HookedModel) -> None:
    for given in (None, "abc", [np.ones(64)], [[vector_of(llama)]]):
        with pytest.raises(HookError, match="vectors is a list of"):
            capture_single_layer(llama, PROMPT, given, layer=0)  # type: ignore[arg-type]
    for layer in (-1, 2, True, "1"):
        with pytest.raises(HookError, match="Layers are 0 to 1"):
            capture_single_layer(llama, PROMPT, [vector_of(llama)], layer=layer)  # type: ignore[arg-type]
