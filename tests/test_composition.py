"""Composition and copying from weights: as whole matrices say it in NumPy, and on a model whose edges are known."""

import json
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis.composition import Composition, composition_scores, copying_scores
from mlx_hooks.analysis.head_weights import head_weights
from mlx_hooks.analysis.known_models import KNOWN_MODELS, KnownInduction
from mlx_hooks.coverage.models import tiny_model

Weights = dict[str, np.ndarray]
Circuits = list[dict[str, np.ndarray]]


def dense(model: nn.Module) -> Weights:
    """Every weight by name, float64; quantised ones as MLX dequantises them."""
    found = {}
    for name, value in tree_flatten(model.parameters()):
        path, _, kind = name.rpartition(".")
        if kind == "weight" and f"{path}.scales" in dict(tree_flatten(model.parameters())):
            module = dict(model.named_modules())[path]
            value = mx.dequantize(value, module.scales, module.biases, module.group_size, module.bits)
        if mx.issubdtype(value.dtype, mx.floating):
            found[name] = np.array(value.astype(mx.float32)).astype(np.float64)
    return found


def llama_like(model: nn.Module, layer: int) -> Circuits:
    """Query, key, value [d_model, d_head] and output [d_head, d_model] of each head, norms in them."""
    w, args, at = dense(model), model.args, f"model.layers.{layer}"
    n_heads, n_kv = args.num_attention_heads, args.num_key_value_heads
    plus = 1 if args.model_type == "gemma2" else 0
    norm = (w[f"{at}.input_layernorm.weight"] + plus)[:, None]
    parts = {}
    for name, count in (("q", n_heads), ("k", n_kv), ("v", n_kv)):
        whole = norm * w[f"{at}.self_attn.{name}_proj.weight"].T
        parts[name] = whole.reshape(whole.shape[0], count, -1).transpose(1, 0, 2)
        if f"{at}.self_attn.{name}_norm.weight" in w:
            parts[name] = parts[name] * w[f"{at}.self_attn.{name}_norm.weight"]
    out = w[f"{at}.self_attn.o_proj.weight"].T
    if args.model_type == "gemma2":
        out = out * (w[f"{at}.post_attention_layernorm.weight"] + 1)
    out = out.reshape(n_heads, -1, out.shape[-1])
    group = n_heads // n_kv
    return [
        {"query": parts["q"][h], "key": parts["k"][h // group], "value": parts["v"][h // group], "output": out[h]}
        for h in range(n_heads)
    ]


def gpt2(model: nn.Module, layer: int) -> Circuits:
    w, at, n_heads = dense(model), f"model.h.{layer}", model.args.n_head
    d = model.args.n_embd
    centring = np.eye(d) - np.ones((d, d)) / d
    whole = centring @ np.diag(w[f"{at}.ln_1.weight"]) @ w[f"{at}.attn.c_attn.weight"].T
    q, k, v = (part.reshape(d, n_heads, -1).transpose(1, 0, 2) for part in np.split(whole, 3, axis=1))
    out = w[f"{at}.attn.c_proj.weight"].T.reshape(n_heads, -1, d)
    return [{"query": q[h], "key": k[h], "value": v[h], "output": out[h]} for h in range(n_heads)]


def quantised() -> nn.Module:
    model = make_model("llama")
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, _: path.endswith("_proj") and "attn" in path)
    return model


def adapted() -> nn.Module:
    model = make_model("llama")
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "v_proj", "o_proj"):
            lora = LoRALinear.from_base(attention[name], r=2, scale=3.0)
            lora.lora_b = mx.random.normal(lora.lora_b.shape)
            attention[name] = lora
    return model


def fused(model: nn.Module, layer: int) -> Circuits:
    """Of an adapted model, with the adapters in the weights."""
    plain = make_model("llama")
    for own, other in zip(model.model.layers, plain.model.layers, strict=True):
        for name in ("q_proj", "v_proj", "o_proj"):
            other.self_attn[name] = own.self_attn[name].fuse()
    return llama_like(plain, layer)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, int], Circuits]]] = {
    "llama": (lambda: make_model("llama"), llama_like),
    "qwen3": (lambda: make_model("qwen3"), llama_like),
    "gpt2": (lambda: make_model("gpt2"), gpt2),
    "gemma2": (lambda: tiny_model("gemma2"), llama_like),
    "quantised": (quantised, llama_like),
    "adapted": (adapted, fused),
    "half": (lambda: make_model("llama", dtype=mx.bfloat16), llama_like),
}


@pytest.mark.parametrize("name", MODELS)
def test_maps_and_composition_are_those_of_whole_matrices(name: str) -> None:
    make, circuits_of = MODELS[name]
    raw = make()
    model = HookedModel(raw)
    n_layers = model.cfg.n_layers
    circuits = [circuits_of(raw, layer) for layer in range(n_layers)]
    for layer, found in head_weights(model).items():
        for kind in ("query", "key", "value", "output"):
            # Norms of queries and keys, and behind the projection, are known up to a scale.
            for own, expected in zip(np.array(getattr(found, kind)), [c[kind] for c in circuits[layer]], strict=True):
                cosine = (own * expected).sum() / np.linalg.norm(own) / np.linalg.norm(expected)
                assert cosine == pytest.approx(1, abs=1e-6)
    found = composition_scores(model)
    assert found.baseline == pytest.approx(1 / np.sqrt(model.cfg.d_model))
    for a, b in [(0, 1), (0, n_layers - 1)]:
        for h, source in enumerate(circuits[a]):
            written = source["value"] @ source["output"]
            for g, target in enumerate(circuits[b]):
                attends = target["query"] @ target["key"].T
                reads = {"q": attends, "k": attends.T, "v": target["value"] @ target["output"]}
                for kind, read in reads.items():
                    expected = np.linalg.norm(written @ read) / np.linalg.norm(written) / np.linalg.norm(read)
                    assert found.of((a, h), (b, g), kind) == pytest.approx(expected, rel=1e-4), (a, h, b, g, kind)
    assert np.isnan(found.of((1, 0), (0, 1), "q"))
    assert np.isnan(found.of((1, 0), (1, 1), "v"))


@pytest.mark.parametrize("name", ["plamo", "phi3", "cohere", "gemma3_text", "hunyuan", "dots1", "exaone4"])
def test_a_head_that_sees_one_token_holds_what_its_map_says(name: str) -> None:
    """Of the first token a head's z is its value; its score is the product of query and key, each up to a scale."""
    model = HookedModel(tiny_model(name))
    tokens = [[5], [9], [12], [30]]
    points = [f"blocks.0.{point}" for point in ("hook_resid_pre", "attn.hook_z", "attn.hook_rot_q", "attn.hook_rot_k")]
    stream, z, q, k = (model.run_with_cache(tokens, points)[1].numpy(point)[:, 0] for point in points)
    found = head_weights(model, [0])[0]
    n_heads = z.shape[1]
    served = np.array([head // (n_heads // k.shape[1]) for head in range(n_heads)])
    if name == "plamo":
        served = np.arange(n_heads) % k.shape[1]
    for kind, held in (("value", z), ("query", q), ("key", k[:, served])):
        maps = np.array(getattr(found, kind))
        said = np.einsum("td,hde->the", stream, maps)
        cosine = (said * held).sum(-1) / np.linalg.norm(said, axis=-1) / np.linalg.norm(held, axis=-1)
        np.testing.assert_allclose(cosine, 1, atol=1e-5, err_msg=kind)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_copying_is_that_of_the_whole_circuit_from_token_to_token(name: str) -> None:
    make, circuits_of = MODELS[name]
    raw = make()
    w = dense(raw)
    if name == "gpt2":
        d = raw.args.n_embd
        end = np.diag(w["model.ln_f.weight"]) @ w["model.wte.weight"].T
        embedding, end = w["model.wte.weight"], (np.eye(d) - np.ones((d, d)) / d) @ end
    else:
        embedding = w["model.embed_tokens.weight"]
        end = np.diag(w["model.norm.weight"]) @ embedding.T
    found = copying_scores(HookedModel(raw)).scores
    for layer, scores in found.items():
        for h, circuit in enumerate(circuits_of(raw, layer)):
            values = np.linalg.eigvals(embedding @ circuit["value"] @ circuit["output"] @ end)
            assert scores[h] == pytest.approx(values.sum().real / np.abs(values).sum(), abs=2e-4)


def test_the_baseline_is_what_rotated_heads_score() -> None:
    generator = np.random.default_rng(0)
    d, r = 24, 3
    a = generator.normal(size=(d, r)) * [5, 1, 0.1] @ generator.normal(size=(r, d))
    b = generator.normal(size=(d, r)) @ generator.normal(size=(r, d))
    squares = []
    for _ in range(2000):
        rotation, upper = np.linalg.qr(generator.normal(size=(d, d)))
        squares.append(np.linalg.norm(a @ (rotation * np.sign(np.diag(upper))) @ b) ** 2)
    score = np.sqrt(np.mean(squares)) / np.linalg.norm(a) / np.linalg.norm(b)
    assert score == pytest.approx(d**-0.5, rel=0.02)


@pytest.mark.parametrize(
    "known", [KnownInduction(), KnownInduction(40, 24, 4, previous_head=3, induction_head=2)], ids=["small", "large"]
)
def test_the_one_known_edge_is_the_only_one_above_the_baseline(known: KnownInduction) -> None:
    model = HookedModel(known.model())
    found = composition_scores(model)
    edge = f"L0H{known.previous_head}->L1H{known.induction_head}<k>"
    above = [one for one in found.strongest(None) if one.above > 0]
    assert [one.edge for one in above] == [edge]
    assert above[0].score > 1.5 * found.baseline
    assert all(one.score < 1e-6 for one in found.strongest(None)[1:])
    # Heads whose weights are 0 write nothing: they have no score, which is not a score of 0.
    assert np.isnan(found.of((0, 0), (1, known.induction_head), "k"))
    copying = copying_scores(model).scores
    assert copying[1][known.induction_head] == pytest.approx(1, abs=1e-4)
    # What the previous-token head writes reaches no logit by itself.
    assert np.isnan(copying[0]).all()
    told = found.to_dict()
    json.dumps(told, allow_nan=False)
    assert told["strongest"][0]["edge"] == edge


def test_in_the_linear_model_all_edges_between_heads_and_no_others_are_above_the_baseline() -> None:
    known = KNOWN_MODELS["linear"]()
    found = composition_scores(known.hooked())
    expected = {edge for edge in known.edges() if edge.startswith("L0H") and "->L1H" in edge}
    assert len(expected) > 2
    assert {one.edge for one in found.strongest(None) if one.above > 0} == expected


def test_the_indirect_object_circuit_has_the_strongest_compositions() -> None:
    """Its other heads are random: what they write and read scores about the baseline."""
    known = KNOWN_MODELS["ioi"]()
    model = known.hooked()
    found = composition_scores(model)
    expected = {edge for edge in known.edges() if "H" in edge.partition("->")[0] and "logits" not in edge}
    strongest = found.strongest(None)
    assert {one.edge for one in strongest[: len(expected)]} == expected
    rest = [one.score for one in strongest[len(expected) :] if one.score > 1e-6]
    assert np.sqrt(np.mean(np.square(rest))) == pytest.approx(found.baseline, rel=0.15)
    copying = copying_scores(model).scores
    mover = known.edges() & {f"L2H{head}->logits" for head in range(3)}
    assert mover == {"L2H2->logits"}
    assert copying[2][2] == pytest.approx(1, abs=1e-4)


def test_heads_that_write_nothing_have_no_scores() -> None:
    found = composition_scores(KNOWN_MODELS["planted_router"]().hooked())
    assert found.strongest(None) == []
    assert found.to_dict()["scored"] == 0


def test_heads_that_read_nothing_of_each_other_are_not_mistaken() -> None:
    """The control: with the previous-token head's output moved elsewhere, the edge is gone."""
    known = KnownInduction()
    raw = known.model()
    weight = raw.transformer.h[0].attn.c_proj.weight
    raw.transformer.h[0].attn.c_proj.weight = mx.roll(weight, known.vocabulary + 1, axis=0)
    found = composition_scores(HookedModel(raw))
    assert all(one.above < 0 for one in found.strongest(None))


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("deepseek_v3", "query", "no linear map of what attention reads"),
        ("qwen3_next", "output", "between its heads and the output projection lies a gate"),
        ("nanochat", "value", "between the stream and what attention reads lies more than a norm"),
        ("gemma4_text", "value", "no linear map"),
    ],
)
def test_what_is_no_map_of_the_stream_is_not_told(name: str, kind: str, reason: str) -> None:
    found = head_weights(HookedModel(tiny_model(name)))
    reasons = [one.reasons[kind] for one in found.values() if kind in one.reasons]
    assert any(reason in why for why in reasons)
    assert all(getattr(one, kind) is None for one in found.values() if kind in one.reasons)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deepseek_v3", "Composition cannot be told on deepseek_v3: L0 query: its query is no linear map"),
        ("mamba", "of these layers 0 attends, and composition is between two"),
        ("gemma3n", "read no plain sum of what heads write: the block mixes several streams"),
    ],
)
def test_a_model_without_composition_is_refused(name: str, message: str) -> None:
    with pytest.raises(HookError, match=message):
        composition_scores(HookedModel(tiny_model(name)))


@pytest.fixture(scope="module")
def found() -> Composition:
    return composition_scores(HookedModel(make_model("llama")), [-1, 0])


def test_layers_and_kinds_can_be_chosen(found: Composition) -> None:
    assert {layer for layer, _ in found.heads} == {0, 2}
    assert len(found.strongest(None)) == 3 * 16
    assert {one.kind for one in found.strongest(5, "v")} == {"v"}
    assert len(found.to_dict(3)["strongest"]) == 3


def test_one_layer_has_no_scores_and_says_why() -> None:
    found = composition_scores(HookedModel(make_model("llama")), [0, -3]).to_dict()
    assert (found["scored"], found["strongest"]) == (0, [])
    assert found["not_told"] == {"scores": "they are between two layers"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.of((1, 0), (2, 0), "q"), r"There is no head \(1, 0\)"),
        (lambda f: f.of(0, 1, "q"), "There is no head 0"),
        (lambda f: f.of((0, 0), (2, 0), "o"), "compose by q, k or v, got 'o'"),
        (lambda f: f.strongest(3, "Q"), "compose by q, k or v, got 'Q'"),
        (lambda f: f.strongest(-1), "count is a whole number from 0 on, or None, got -1"),
        (lambda f: composition_scores(HookedModel(make_model("llama")), [3]), "Layers are 0 to 2, got 3"),
        (lambda f: composition_scores(HookedModel(make_model("llama")), []), "Layers are 0 to 2, got none"),
        (lambda f: copying_scores(HookedModel(make_model("llama")), 5), "Layers are a list of whole numbers .* got 5"),
    ],
    ids=["head", "no head", "kind", "kind of the strongest", "count", "layer", "none", "no list"],
)
def test_what_is_not_there_is_told(found: Composition, call: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        call(found)
