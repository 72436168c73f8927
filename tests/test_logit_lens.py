"""The logit lens against the model's own logits, and against the formulas in float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every_architecture import on_every_architecture
from reference import forward
from tiny_models import CONFIGS, make_model

from mlx_hooks import ActivationCache, HookedModel, HookError, LogitLens, ModelLoadError, UnknownHookError
from mlx_hooks.contributions import HeadPath, relative_deviation
from mlx_hooks.coverage.models import tiny_model

TOKENS = [[1, 5, 9, 3, 7], [2, 4, 4, 8, 0]]
STREAMS = ["blocks.*.hook_resid_post", "ln_final.hook_in"]
# Logits of these are made of more than the stream that leaves the last block.
REFUSED = ("deepseek_v41", "kimi_k3")
# The last norm is a function, or reads a mixture of several streams.
NOT_FROZEN = ("gemma3n", "nanochat", "talkie")


def resid(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


@on_every_architecture
def test_the_last_layer_is_the_models_own_output_bit_for_bit(name: str) -> None:
    model = HookedModel(tiny_model(name))
    lens = LogitLens.from_model(model)
    # mlx-lm's own olmo runs on single tokens only.
    tokens = [row[:1] for row in TOKENS] if name == "olmo" else TOKENS
    names = [n for n in STREAMS if "*" in n or n in model.hook_points]
    logits, cache = model.run_with_cache(tokens, names)
    passes = {record.pass_index for records in cache.records.values() for record in records}
    cache = cache.of_pass(max(passes))
    if name in REFUSED:
        with pytest.raises(HookError, match=f"not made of the last stream alone on {name}"):
            lens.compute(cache, "resid_out_{i}")
        return
    found = lens.compute(cache, "blocks.{i}.hook_resid_post")
    last = model.cfg.n_layers - 1
    assert list(found) == [f"logit_lens_{resid(i)}" for i in range(last + 1)]
    assert mx.array_equal(found[f"logit_lens_{resid(last)}"], logits)
    if name in NOT_FROZEN:
        with pytest.raises(HookError, match=r"its statistics cannot be kept. Use norm='own'"):
            lens.compute(cache, "resid_out_{i}", norm="final")
        return
    frozen = lens.compute(cache, "resid_out_{i}", norm="final")
    read = frozen[f"logit_lens_resid_out_{last}"]
    # Tokens that phi3small never says have logits of -inf.
    finite = logits > -mx.inf
    assert mx.array_equal(read > -mx.inf, finite)
    assert relative_deviation(mx.where(finite, read, 0), mx.where(finite, logits, 0)) < 2e-6


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_part_of_the_batch_or_of_the_positions_differs_by_rounding_alone(name: str) -> None:
    """Sums of other shapes round differently: bit equality needs the batch and the positions of the run."""
    model = HookedModel(make_model(name))
    logits, cache = model.run_with_cache(TOKENS, "blocks.2.hook_resid_post", positions="last")
    last = LogitLens(model).compute(cache, "resid_out_2")["logit_lens_resid_out_2"]
    assert relative_deviation(last, logits[:, -1:]) < 1e-6


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_exact_too(dtype: mx.Dtype) -> None:
    for name in ("llama", "qwen3", "gpt2"):
        model = HookedModel(make_model(name, dtype=dtype))
        logits, cache = model.run_with_cache(TOKENS, STREAMS)
        found = LogitLens(model).compute(cache, "resid_out_{i}")["logit_lens_resid_out_2"]
        assert found.dtype == dtype
        assert mx.array_equal(found, logits)


@pytest.mark.parametrize("name", ["llama", "llama_untied", "qwen2", "gpt2"])
@pytest.mark.parametrize("bits", [None, 8])
def test_every_layer_is_the_formula_in_float64(name: str, bits: int | None) -> None:
    inner = make_model(name)
    if bits is not None:
        ends = ("lm_head", "embed_tokens", "wte")
        nn.quantize(inner, group_size=32, bits=bits, class_predicate=lambda path, _: path.endswith(ends))
    model = HookedModel(inner)
    _, cache = model.run_with_cache(TOKENS, ["blocks.*.hook_resid_post", "blocks.1.hook_resid_mid", "ln_final.hook_in"])
    lens = LogitLens(model)
    own, frozen = (lens.compute(cache, "resid_out_{i}", norm=norm) for norm in ("own", "final"))
    bare = lens.compute(cache, "resid_out_{i}", apply_norm=False)
    gpt2 = name == "gpt2"
    trunk = inner.model
    norm = trunk.ln_f if gpt2 else trunk.norm
    weight = float64(norm.weight)
    bias = float64(norm.bias) if gpt2 else 0.0
    head = inner.lm_head if "lm_head" in inner else trunk.wte if gpt2 else trunk.embed_tokens
    unembedding = float64(head.weight if bits is None else mx.dequantize(head.weight, head.scales, head.biases, 32, 8))

    def spread(x: np.ndarray) -> np.ndarray:
        return x - x.mean(-1, keepdims=True) if gpt2 else x

    def size(x: np.ndarray) -> np.ndarray:
        return np.sqrt((spread(x) ** 2).mean(-1, keepdims=True) + 1e-5)

    final = cache.numpy("ln_final.hook_in").astype(np.float64)
    for layer in range(3):
        x = cache.numpy(("resid_post", layer)).astype(np.float64)
        key = f"logit_lens_resid_out_{layer}"
        for found, expected in (
            (own, spread(x) / size(x) * weight + bias),
            (frozen, spread(x) / size(final) * weight + bias),
            (bare, x),
        ):
            np.testing.assert_allclose(found[key], expected @ unembedding.T, rtol=2e-4, atol=2e-4)
    middle = lens.compute(cache, "resid_mid_1")["logit_lens_resid_mid_1"]
    x = cache.numpy("blocks.1.hook_resid_mid").astype(np.float64)
    expected = (spread(x) / size(x) * weight + bias) @ unembedding.T
    np.testing.assert_allclose(middle, expected, rtol=2e-4, atol=2e-4)


def float64(weight: mx.array) -> np.ndarray:
    return np.array(weight.astype(mx.float32)).astype(np.float64)


def test_readings_agree_with_an_independent_forward_pass() -> None:
    inner = make_model("gpt2")
    expected = forward(inner, TOKENS)
    model = HookedModel(inner)
    _, cache = model.run_with_cache(TOKENS, "blocks.*.hook_resid_post")
    found = LogitLens(model).compute(cache, "resid_out_2", apply_softmax=True)["logit_lens_resid_out_2"]
    logits = expected["hook_logits"]
    exps = np.exp(logits - logits.max(-1, keepdims=True))
    np.testing.assert_allclose(found, exps / exps.sum(-1, keepdims=True), rtol=1e-3, atol=1e-6)


def captured(model: HookedModel) -> ActivationCache:
    names = ["resid_post", "resid_mid", "attn_out", "mlp_out", "z"]
    points = [p.name for p in model.hook_points.values() if p.component in (*names, "ln_final_in", "pattern", "ln1")]
    return model.run_with_cache(TOKENS, points)[1]


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return HookedModel(make_model("llama_untied"))


@pytest.fixture(scope="module")
def cache(model: HookedModel) -> ActivationCache:
    return captured(model)


def test_patterns_are_read_in_the_order_of_layers_and_heads(cache: ActivationCache) -> None:
    many = HookedModel(make_model(CONFIGS["llama"] | {"num_hidden_layers": 11}))
    _, streams = many.run_with_cache(TOKENS, "blocks.*.hook_resid_post")
    found = LogitLens(many).compute(streams, "resid_out_{layer}")
    assert list(found) == [f"logit_lens_resid_out_{i}" for i in range(11)]
    lens = LogitLens(HookedModel(make_model("llama_untied")))
    heads = lens.compute(cache, "head_out_L{i}H{j}")
    assert list(heads) == [f"logit_lens_head_out_L{i}H{j}" for i in range(3) for j in range(4)]
    assert list(lens.compute(cache, "blocks.*.hook_*_out"))[:2] == [
        "logit_lens_blocks.0.hook_attn_out",
        "logit_lens_blocks.0.hook_mlp_out",
    ]


def test_frozen_readings_of_parts_add_up_to_the_stream(model: HookedModel, cache: ActivationCache) -> None:
    lens = LogitLens(model)
    pattern = ["resid_mid_1", "resid_out_0", "attn_out_1", "head_out_L1H{j}"]
    mid, pre, attn, *_ = (next(iter(lens.compute(cache, key, norm="final").values())) for key in pattern)
    np.testing.assert_allclose(mid, pre + attn, rtol=1e-4, atol=1e-4)
    heads = lens.compute(cache, "head_out_L1H{j}", norm="final")
    np.testing.assert_allclose(sum(heads.values()), attn, rtol=1e-4, atol=1e-4)
    whole = lens.compute(cache, "blocks.1.attn.hook_result", norm="final")["logit_lens_blocks.1.attn.hook_result"]
    assert whole.shape == (2, 5, 4, 60)
    np.testing.assert_allclose(whole[:, :, 2], heads["logit_lens_head_out_L1H2"], rtol=1e-5, atol=1e-5)


def test_directions_pick_logits_and_differences_row_by_row(model: HookedModel, cache: ActivationCache) -> None:
    lens = LogitLens(model)
    key = "resid_out_1"
    logits = np.array(lens.compute(cache, key)[f"logit_lens_{key}"])

    def asked(directions: object, **options: object) -> np.ndarray:
        return np.array(lens.compute(cache, key, directions, **options)[f"logit_lens_{key}"])

    rows = np.stack([logits[0, :, 3], logits[1, :, 9]])
    np.testing.assert_array_equal(asked([3, 9]), rows)
    np.testing.assert_array_equal(asked([(3, 1), (9, 0)]), rows - np.stack([logits[0, :, 1], logits[1, :, 0]]))
    np.testing.assert_array_equal(asked((3, 1)), logits[..., 3] - logits[..., 1])
    np.testing.assert_array_equal(asked([3]), logits[..., 3])
    np.testing.assert_array_equal(asked(np.int64(3)), logits[..., 3])
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    soft = asked((3, 1), apply_softmax=True)
    np.testing.assert_allclose(soft, probabilities[..., 3] - probabilities[..., 1], atol=1e-6)
    above = asked([(3, 1), (9, 0)], metric="accuracy")
    difference = asked([(3, 1), (9, 0)])
    np.testing.assert_array_equal(above, (difference > 0).mean(0))
    assert 0 < above.mean() < 1
    likeliest = logits.argmax(-1)
    best = asked([int(likeliest[0, 2]), int(likeliest[1, 4])], metric="accuracy")
    np.testing.assert_array_equal(best, (likeliest == likeliest[[0, 1], [2, 4]][:, None]).mean(0))
    bare = asked((3, 1), apply_norm=False)
    x = cache.numpy(("resid_post", 1)).astype(np.float64)
    weight = float64(model.model.lm_head.weight)
    np.testing.assert_allclose(bare, x @ (weight[3] - weight[1]), rtol=1e-4, atol=1e-4)


def test_tokens_may_be_texts(tiny: HookedModel) -> None:
    lens = LogitLens(tiny)
    _, cache = tiny.run_with_cache("The capital of France is", "blocks.*.hook_resid_post", positions="last")
    found = lens.compute(cache, "resid_out_{i}", token_directions=[(" Paris", "Rome")])
    assert found["logit_lens_resid_out_3"].shape == (1, 1)
    assert found["logit_lens_resid_out_3"].item() > 5 > found["logit_lens_resid_out_0"].item()
    for text, message in (("Paris is", "2 tokens"), ("qwertz", "an unknown one")):
        with pytest.raises(HookError, match=f"{text!r} is {message} to this model's tokenizer"):
            lens.compute(cache, "resid_out_0", token_directions=text)


def test_a_lens_is_made_of_a_name_and_of_a_plain_model(tiny: HookedModel) -> None:
    prompt = "The capital of France is"
    by_name = LogitLens.from_model_name("neuroscope-tiny").predictions(prompt)
    plain = LogitLens.from_model(tiny.model, tiny.tokenizer).predictions(prompt)
    assert by_name == plain == LogitLens.from_model(tiny).predictions(prompt)
    with pytest.raises(ModelLoadError):
        LogitLens.from_model_name("no/such/folder")


def test_plain_mappings_are_read_too(model: HookedModel, cache: ActivationCache) -> None:
    arrays = {"resid_out_1": cache["resid_post", 1], "ln_final.hook_in": cache["ln_final.hook_in"]}
    for norm in ("own", "final"):
        got = LogitLens(model).compute(arrays, "resid_out_1", norm=norm)["logit_lens_resid_out_1"]
        same = LogitLens(model).compute(cache, "resid_out_1", norm=norm)["logit_lens_resid_out_1"]
        assert mx.array_equal(got, same)


def test_statistics_are_those_of_the_same_positions(model: HookedModel) -> None:
    lens = LogitLens(model)
    _, cache = model.run_with_cache(TOKENS, "blocks.0.hook_resid_post", positions=[1, 3])
    _, whole = model.run_with_cache(TOKENS, STREAMS)
    both = ActivationCache(cache.records | {"ln_final.hook_in": whole.records["ln_final.hook_in"]})
    some = lens.compute(both, "resid_out_0", norm="final")["logit_lens_resid_out_0"]
    every = lens.compute(whole, "resid_out_0", norm="final")["logit_lens_resid_out_0"]
    np.testing.assert_allclose(some, every[:, mx.array([1, 3])], rtol=1e-5, atol=1e-5)
    _, last = model.run_with_cache(TOKENS, "ln_final.hook_in", positions="last")
    missing = ActivationCache(cache.records | last.records)
    with pytest.raises(HookError, match=r"ln_final.hook_in was not captured at position 1: capture it at the same"):
        lens.compute(missing, "resid_out_0", norm="final")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target_key": "resid_out_9"}, UnknownHookError, "Unknown hook point 'resid_out_9'"),
        ({"target_key": "resid_in_{i}"}, UnknownHookError, r"Unknown hook point 'resid_in_\{i\}'"),
        ({"target_key": "head_out_L0H7"}, UnknownHookError, "Unknown head 7"),
        ({"target_key": "pattern_L0H1"}, HookError, "has the width of the stream, 32"),
        ({"target_key": "blocks.0.attn.hook_z"}, HookError, r"z is batch, pos, head, d_head, shape \(2, 5, 4, 8\)"),
        ({"norm": "last"}, HookError, "norm is 'own' or 'final', got 'last'"),
        ({"token_directions": 3, "metric": "loss"}, HookError, "metric is 'logit_diff' or 'accuracy', got 'loss'"),
        ({"token_directions": [60, 1]}, HookError, "A token is an id from 0 to 59 or a text, got 60"),
        ({"token_directions": [(1, -1)]}, HookError, "A token is an id from 0 to 59 or a text, got -1"),
        ({"token_directions": [True]}, HookError, "A token is an id from 0 to 59 or a text, got True"),
        ({"token_directions": [1.5]}, HookError, "A token is an id from 0 to 59 or a text, got 1.5"),
        ({"token_directions": [1, 2, 3]}, HookError, "one for all: got 3 for 2 rows"),
        ({"token_directions": [1, (2, 3)]}, HookError, "a list of tokens or a list of pairs"),
        ({"token_directions": []}, HookError, "a list of tokens or a list of pairs"),
        ({"token_directions": [(1, 2, 3)]}, HookError, "a list of tokens or a list of pairs"),
        ({"token_directions": "yes"}, HookError, "This model has no tokenizer: give the id of 'yes'"),
        ({"target_key": "blocks.0.attn.hook_result", "token_directions": 1}, HookError, "holds all heads: read one"),
        ({"activations": [1]}, HookError, "activations is an activation cache or a mapping of arrays, got list"),
    ],
)
def test_what_cannot_be_read_is_a_clear_error(
    model: HookedModel, cache: ActivationCache, change: dict, error: type[HookError], message: str
) -> None:
    asked = {"activations": cache, "target_key": "resid_out_0"} | change
    with pytest.raises(error, match=message):
        LogitLens(model).compute(**asked)


def test_what_is_missing_is_named(model: HookedModel, cache: ActivationCache) -> None:
    part = cache.select(["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid"])
    with pytest.raises(HookError, match=r"norm='final' needs the last norm's input: capture ln_final.hook_in too"):
        LogitLens(model).compute(part, "resid_out_0", norm="final")


def test_architectures_of_several_streams_are_read_where_they_are_whole() -> None:
    model = HookedModel(tiny_model("gemma3n"))
    _, cache = model.run_with_cache(TOKENS, ["blocks.*.hook_resid_post", "blocks.0.hook_attn_out"])
    assert len(LogitLens(model).compute(cache, "resid_out_{i}")) == model.cfg.n_layers
    with pytest.raises(HookError, match=r"attn_out_0 is no stream of gemma3n, which has several streams \(stream, bat"):
        LogitLens(model).compute(cache, "attn_out_0")
    with pytest.raises(HookError, match="resid_out_0 is not what the last norm gives on gemma3n"):
        LogitLens(model).compute(cache, "resid_out_0", apply_norm=False)


def test_the_norm_cannot_be_left_out_where_it_is_a_function() -> None:
    model = HookedModel(tiny_model("talkie"))
    _, cache = model.run_with_cache(TOKENS, "blocks.*.hook_resid_post")
    with pytest.raises(HookError, match="The last norm of talkie is a function, not a module: it cannot be left out"):
        LogitLens(model).compute(cache, "resid_out_0", apply_norm=False)


# Readings of a prompt


def test_readings_are_those_of_compute_at_every_position(model: HookedModel, cache: ActivationCache) -> None:
    lens = LogitLens(model)
    rows = list(lens.readings(TOKENS[0], components=["attn_out", "resid_post", "heads"], positions=None, top_k=2))
    assert len(rows) == 3 * (1 + 4 + 1) * 5
    assert [(row.layer, row.hook_point.rpartition(".")[2], row.head) for row in rows[:31:5]] == [
        *((0, "hook_result", head) for head in range(4)),
        (0, "hook_attn_out", None),
        (0, "hook_resid_post", None),
        (1, "hook_result", 0),
    ]
    probabilities = lens.compute(cache, "attn_out_2", apply_softmax=True)["logit_lens_attn_out_2"][0]
    own = [row for row in rows if row.hook_point == "blocks.2.hook_attn_out"]
    for position, row in enumerate(own):
        assert row.position == position
        best = np.argsort(-np.array(probabilities[position]))[:2]
        assert [p.token_id for p in row.predictions] == best.tolist()
        np.testing.assert_allclose([p.probability for p in row.predictions], np.array(probabilities[position])[best])


def test_long_prompts_are_read_in_parts(model: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lens, asked = LogitLens(model), {"positions": None, "norm": "final", "token_directions": [3], "top_k": 1}
    whole = list(lens.readings(TOKENS[0], **asked))
    monkeypatch.setattr("mlx_hooks.analysis.logit_lens.CHUNK", 2)
    parts = list(lens.readings(TOKENS[0], **asked))
    assert [(row.layer, row.position) for row in parts] == [(i, p) for i in range(3) for p in range(5)]
    np.testing.assert_allclose([row.values for row in parts], [row.values for row in whole], rtol=1e-4, atol=1e-4)


def test_readings_answer_directions(model: HookedModel, cache: ActivationCache) -> None:
    lens = LogitLens(model)
    asked = {"token_directions": [(3, 1), (9, 0)], "positions": [1, -1], "apply_softmax": False, "norm": "final"}
    rows = list(lens.readings(TOKENS[0], **asked))
    logits = np.array(lens.compute(cache, "resid_out_1", norm="final")["logit_lens_resid_out_1"])[0]
    expected = [(logits[p, 3] - logits[p, 1], logits[p, 9] - logits[p, 0]) for p in (1, 4)]
    found = [row for row in rows if row.layer == 1]
    assert [row.position for row in found] == [1, 4]
    np.testing.assert_allclose([row.values for row in found], expected, rtol=1e-4, atol=1e-4)


def test_readings_of_gated_heads_and_of_several_passes() -> None:
    gated = HookedModel(tiny_model("qwen3_next"))
    rows = list(LogitLens(gated).readings(TOKENS[0], components="heads", positions=[2]))
    assert {(row.layer, row.position) for row in rows} == {(1, 2), (3, 2)}
    looped = LogitLens(HookedModel(tiny_model("iquestloopcoder")))
    rows = list(looped.readings(TOKENS[0]))
    assert [(row.pass_index, row.layer) for row in rows] == [(p, i) for p in range(2) for i in range(len(rows) // 2)]
    own = mx.softmax(looped.model(TOKENS[0])[0, -1])
    assert rows[-1].predictions[0].token_id == mx.argmax(own).item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": "pattern"}, "A lens on llama reads resid_pre, .*resid_post, heads; got 'pattern'"),
        ({"components": []}, "got none"),
        ({"components": "mixer_out"}, "got 'mixer_out'"),
        ({"positions": 5}, "outside the 5 tokens"),
        ({"top_k": 0}, "a top_k from 1, got 1 and 0"),
        ({"top_k": True}, "a top_k from 1, got 1 and True"),
        ({"norm": "mean"}, "norm is 'own' or 'final', got 'mean'"),
    ],
)
def test_what_a_prompt_cannot_be_asked_is_an_error(model: HookedModel, options: dict, message: str) -> None:
    with pytest.raises(HookError, match=message):
        list(LogitLens(model).readings(TOKENS[0], **options))


def test_heads_are_none_of_a_model_without_attention() -> None:
    with pytest.raises(HookError, match="A lens on mamba reads .*resid_post; got 'heads'"):
        LogitLens(HookedModel(tiny_model("mamba"))).readings(TOKENS[0], components="heads")


def test_each_head_takes_one_projection(
    model: HookedModel, cache: ActivationCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.head_path(0)
    made = []
    project = HeadPath.project_value
    monkeypatch.setattr(HeadPath, "project_value", lambda path, value: made.append(1) or project(path, value))
    lens = LogitLens(model)
    assert len(lens.compute(cache, "head_out_L0H{j}")) == 4
    # One of them is of zero, which is the bias.
    assert len(made) == 5
    made.clear()
    lens.compute(cache, "head_out_L0H2")
    assert len(made) == 2
    made.clear()
    assert len(list(lens.readings(TOKENS[0], components="heads", positions=None))) == 3 * 4 * 5
    assert len(made) == 3 * 5


def test_readings_of_a_long_prompt_are_those_of_compute(model: HookedModel) -> None:
    tokens = [(7 * i + i // 60) % 60 for i in range(300)]
    lens = LogitLens(model)
    rows = list(
        lens.readings(tokens, components=["resid_mid", "head_out"], positions=None, token_directions=[3], top_k=2)
    )
    points = [p.name for p in model.hook_points.values() if p.component in ("resid_mid", "z")]
    _, cache = model.run_with_cache([tokens], points)
    for key, component, head in (("resid_mid_1", "hook_resid_mid", None), ("head_out_L1H2", "hook_result", 2)):
        logits = np.array(lens.compute(cache, key)[f"logit_lens_{key}"])[0]
        own = [r for r in rows if r.layer == 1 and r.hook_point.endswith(component) and r.head == head]
        assert [r.position for r in own] == list(range(300))
        np.testing.assert_allclose([r.values[0] for r in own], logits[:, 3], rtol=1e-3, atol=1e-4)
        shares = np.array(mx.softmax(mx.array(logits), axis=-1))
        likely = [[p.probability for p in r.predictions] for r in own]
        np.testing.assert_allclose(likely, -np.sort(-shares, axis=-1)[:, :2], rtol=1e-3, atol=1e-6)


def test_components_have_easyroutine_s_names_too(model: HookedModel) -> None:
    lens = LogitLens(model)
    for name, own in (("resid_in", "resid_pre"), ("resid_out", "resid_post"), ("head_out", "heads")):
        assert list(lens.readings(TOKENS[0], components=name)) == list(lens.readings(TOKENS[0], components=[own]))


def test_frozen_readings_have_the_last_norms_input_in_every_pass() -> None:
    """Layers that run twice; the norm at the end runs once."""
    looped = LogitLens(HookedModel(tiny_model("iquestloopcoder")))
    for component in ("resid_post", "attn_out"):
        rows = list(looped.readings(TOKENS[0], components=component, norm="final", token_directions=[3]))
        _, cache = looped.model.run_with_cache([TOKENS[0]], [f"blocks.*.hook_{component}", "ln_final.hook_in"])
        final = cache.select("ln_final.hook_in").records
        for index in (0, 1):
            held = ActivationCache(cache.of_pass(index).records | final)
            read = looped.compute(held, f"blocks.*.hook_{component}", token_directions=3, norm="final")
            own = [row.values[0] for row in rows if row.pass_index == index]
            np.testing.assert_allclose(own, [one[0, -1].item() for one in read.values()], rtol=1e-4, atol=1e-5)


def test_a_tie_is_not_accurate(model: HookedModel) -> None:
    level = {"resid_out_1": mx.zeros((2, 3, 32))}
    found = LogitLens(model).compute(level, "resid_out_1", token_directions=(3, 1), metric="accuracy")
    assert found["logit_lens_resid_out_1"].tolist() == [0, 0, 0]


def test_numpy_arrays_are_read_as_mlx_s(model: HookedModel, cache: ActivationCache) -> None:
    heads = np.array(model.head_results(cache["z", 1], 1)).astype(np.float64)
    arrays = {"resid_out_1": cache.numpy(("resid_post", 1)), "blocks.1.attn.hook_result": heads}
    lens = LogitLens(model)
    for key in ("resid_out_1", "head_out_L1H3"):
        got, same = (lens.compute(held, key)[f"logit_lens_{key}"] for held in (arrays, cache))
        np.testing.assert_allclose(got, same, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        ({1: mx.zeros((1, 2, 32))}, "maps names of hook points to arrays, got the key 1"),
        ({"resid_out_0": [[0.0] * 32]}, "arrays, got list for blocks.0.hook_resid_post"),
        ({"resid_out_0": np.array(["a"])}, "arrays, got ndarray for blocks.0.hook_resid_post"),
        ({"resid_out_0": mx.zeros((2, 32))}, r"post is \[batch, pos, d_model\], got an array of shape \(2, 32\)"),
        ({"a": 1, "b": 2}, "of the model's there is none: its keys are 'a', 'b'.$"),
        ({}, "of the model's there is none: it is empty.$"),
        (ActivationCache(), "Unknown hook point 'resid_out_0'. There are none.$"),
        ({"blocks.0.attn.hook_result": mx.zeros((1, 2, 32))}, r"hook_result is \[batch, pos, head, d_model\], got"),
    ],
)
def test_what_a_mapping_holds_is_checked(model: HookedModel, activations: dict, message: str) -> None:
    with pytest.raises(HookError, match=message):
        LogitLens(model).compute(activations, "resid_out_0")
