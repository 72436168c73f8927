"""The tuned lens: it comes closer to the model's output on texts that it has not seen, and belongs to one model."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from neuroscope_tiny.corpus import indirect_object_samples
from tiny_models import CONFIGS, make_model

from mlx_hooks import HookedModel, HookError, LogitLens, TunedLens
from mlx_hooks.analysis import tuned_lens
from mlx_hooks.analysis.identity import fingerprint
from mlx_hooks.coverage.models import tiny_model

TOKENS = [[1, 5, 9, 3, 7], [2, 4, 4, 8]]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [f"{sample.prompt} {sample.answer}" for sample in indirect_object_samples(48)]


@pytest.fixture(scope="module")
def trained(tiny: HookedModel, texts: list[str]) -> TunedLens:
    return TunedLens.train(tiny, texts[:32], steps=60, progress=False)


def test_training_brings_unseen_texts_closer_to_the_models_output(
    tiny: HookedModel, trained: TunedLens, texts: list[str]
) -> None:
    report = trained.report
    assert report is not None
    assert len(report.before) == len(report.after) == 3
    assert all(after < 0.7 * before for before, after in zip(report.before, report.after, strict=True))
    unseen = texts[32:]
    plain, tuned = TunedLens.identity(tiny).divergence(unseen), trained.divergence(unseen)
    assert all(after < 0.8 * before for before, after in zip(plain, tuned, strict=True))
    assert str(report).splitlines()[1] == f"  layer 0: {report.before[0]:.4f} -> {report.after[0]:.4f}"


def test_divergences_are_the_formula_over_all_positions() -> None:
    model = HookedModel(make_model("gpt2"))
    lens = LogitLens(model)
    divergences = np.zeros(2)
    for row in TOKENS:
        logits, cache = model.run_with_cache(row, "blocks.*.hook_resid_post")
        own = log_softmax(logits)
        for layer in range(2):
            read = log_softmax(lens.compute(cache, f"resid_out_{layer}")[f"logit_lens_resid_out_{layer}"])
            divergences[layer] += (np.exp(own) * (own - read)).sum()
    found = TunedLens.identity(model).divergence(TOKENS)
    np.testing.assert_allclose(found, divergences / 9, rtol=1e-4)


def log_softmax(logits: mx.array) -> np.ndarray:
    x = np.array(logits).astype(np.float64)[0]
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def test_rows_of_a_batch_are_weighed_by_their_tokens_alone() -> None:
    model = HookedModel(make_model("llama"))
    lens = TunedLens.identity(model)
    parameters = {"weight": lens.weight, "bias": lens.bias}
    together = np.array(lens._loss(parameters, *lens._batch(TOKENS)))
    np.testing.assert_allclose(together, lens.divergence(TOKENS), rtol=1e-5)


def test_the_identity_reads_as_the_plain_lens_bit_for_bit() -> None:
    for dtype in (mx.float32, mx.bfloat16):
        model = HookedModel(make_model("llama", dtype=dtype))
        _, cache = model.run_with_cache(TOKENS[0], "blocks.*.hook_resid_post")
        lens, tuned = LogitLens(model), TunedLens.identity(model)
        plain, same = (lens.compute(cache, "resid_out_{i}", tuned=one) for one in (None, tuned))
        assert all(mx.array_equal(plain[key], same[key]) for key in plain)


def test_a_translator_is_applied_before_the_norm() -> None:
    model = HookedModel(make_model("llama"))
    mx.random.seed(1)
    tuned = TunedLens(model, 0.1 * mx.random.normal((2, 32, 32)), mx.random.normal((2, 32)))
    logits, cache = model.run_with_cache(TOKENS[0], "blocks.*.hook_resid_post")
    found = LogitLens(model).compute(cache, "resid_out_{i}", tuned=tuned)
    x = cache["resid_post", 1]
    expected = model.unembed(x + x @ tuned.weight[1] + tuned.bias[1])
    np.testing.assert_allclose(found["logit_lens_resid_out_1"], expected, rtol=1e-5, atol=1e-5)
    assert mx.array_equal(found["logit_lens_resid_out_2"], logits)
    _, cache = model.run_with_cache(TOKENS[0], "blocks.0.hook_attn_out")
    with pytest.raises(HookError, match="A tuned lens reads blocks.*resid_post .*, not blocks.0.hook_attn_out"):
        LogitLens(model).compute(cache, "attn_out_0", tuned=tuned)


def test_the_same_seed_trains_the_same_lens() -> None:
    model = HookedModel(make_model("llama"))
    options = {"steps": 4, "batch_size": 1, "progress": False}
    one, same, other = (TunedLens.train(model, TOKENS, seed=seed, **options) for seed in (3, 3, 4))
    assert mx.array_equal(one.weight, same.weight)
    assert not mx.array_equal(one.weight, other.weight)


def test_the_model_is_left_as_it_was() -> None:
    model = HookedModel(make_model("llama"))
    before = model(TOKENS[0])
    TunedLens.train(model, TOKENS, steps=2, progress=False)
    assert mx.array_equal(model(TOKENS[0]), before)


def test_a_saved_lens_is_read_back_bit_for_bit(tiny: HookedModel, trained: TunedLens, tmp_path: Path) -> None:
    path = trained.save(tmp_path / "lens")
    assert path == tmp_path / "lens.safetensors"
    read = TunedLens.load(path, tiny)
    assert mx.array_equal(read.weight, trained.weight)
    assert mx.array_equal(read.bias, trained.bias)
    assert read.report == trained.report
    assert [file.name for file in tmp_path.iterdir()] == ["lens.safetensors"]
    assert TunedLens.identity(tiny).save(path) == path
    assert TunedLens.load(path, tiny).report is None


def test_a_lens_of_another_model_is_refused(tmp_path: Path) -> None:
    model = HookedModel(make_model("llama"))
    path = TunedLens.identity(model).save(tmp_path / "lens.safetensors")
    assert TunedLens.load(path, HookedModel(make_model("llama"))).report is None
    for other, why in (
        (make_model("gpt2"), "this is model_type=gpt2, n_layers=3, d_model=32, d_vocab=60"),
        (make_model("llama", seed=1), "another model: its weights differ"),
        (make_model("llama", dtype=mx.float16), "another model: its weights differ"),
    ):
        with pytest.raises(HookError, match=why):
            TunedLens.load(path, HookedModel(other))


def test_what_is_no_tuned_lens_is_refused(tmp_path: Path) -> None:
    model = HookedModel(make_model("llama"))
    whole = TunedLens.identity(model).save(tmp_path / "whole.safetensors").read_bytes()
    files = {"half": whole[: len(whole) // 2], "text": b"hello", "empty": b""}
    for name, content in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros(1)})
    later = {"tuned_lens": json.dumps({"format": "neuroscope.tuned_lens/9"})}
    mx.save_safetensors(str(tmp_path / "later.safetensors"), {"weight": mx.zeros(1), "bias": mx.zeros(1)}, later)
    for name in ("half", "text", "empty", "other"):
        with pytest.raises(HookError, match=f"{name}.safetensors is no tuned lens that can be read"):
            TunedLens.load(tmp_path / f"{name}.safetensors", model)
    (tmp_path / "plain").write_bytes(b"hello")
    with pytest.raises(HookError, match=r"plain is no tuned lens that can be read: it is no whole safetensors file\.$"):
        TunedLens.load(tmp_path / "plain", model)
    for name in ("missing", "missing.safetensors"):
        with pytest.raises(HookError, match=rf"^There is no file {tmp_path}/{name}\.$"):
            TunedLens.load(tmp_path / name, model)
    with pytest.raises(HookError, match=rf"^{tmp_path} cannot be read: Is a directory\.$"):
        TunedLens.load(tmp_path, model)
    with pytest.raises(HookError, match="is of the format 'neuroscope.tuned_lens/9', and this version reads"):
        TunedLens.load(tmp_path / "later.safetensors", model)
    with pytest.raises(HookError, match=r"cannot be written to .*lens.safetensors: No such file or directory$"):
        TunedLens.identity(model).save(tmp_path / "no" / "folder" / "lens")


def change(path: Path, arrays: dict | None = None, about: dict | None = None) -> Path:
    """The same file with other arrays, or another description; what is None in these is left out."""
    held, metadata = mx.load(str(path), return_metadata=True)
    told = json.loads(metadata["tuned_lens"]) | (about or {})
    held = {name: array for name, array in (held | (arrays or {})).items() if array is not None}
    other = path.with_name("changed.safetensors")
    told = {name: value for name, value in told.items() if value != "left out"}
    mx.save_safetensors(str(other), held, {"tuned_lens": json.dumps(told)})
    return other


@pytest.mark.parametrize(
    ("arrays", "about", "message"),
    [
        ({"bias": None}, {}, "it lacks 'bias'"),
        ({}, {"model": "left out"}, "it lacks 'model'"),
        ({}, {"d_model": "left out"}, "it lacks 'd_model'"),
        ({}, {"report": "left out"}, "it lacks 'report'"),
        ({}, {"report": {"before": [1]}}, "it lacks 'after'"),
        ({}, {"report": [1]}, "no tuned lens that can be read"),
        ({}, {"report": {"before": ["a"], "after": [], "n_tokens": 1}}, "no tuned lens that can be read"),
        ({"bias": mx.zeros((2, 32), mx.int32)}, {}, "its bias is mlx.core.int32"),
        ({"bias": mx.full((2, 32), mx.nan)}, {}, "its bias is mlx.core.float32, or not finite"),
    ],
)
def test_a_damaged_tuned_lens_is_refused_in_one_sentence(
    arrays: dict, about: dict, message: str, tmp_path: Path
) -> None:
    model = HookedModel(make_model("llama"))
    whole = TunedLens.identity(model).save(tmp_path / "lens.safetensors")
    with pytest.raises(HookError, match=message):
        TunedLens.load(change(whole, arrays, about), model)
    mx.save_safetensors(str(whole), {"weight": mx.zeros(1)}, {"tuned_lens": "[1]"})
    with pytest.raises(HookError, match="no tuned lens that can be read"):
        TunedLens.load(whole, model)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_one_changed_number_makes_another_model(dtype: mx.Dtype) -> None:
    inner = make_model(CONFIGS["llama"] | {"intermediate_size": 640}, dtype=dtype)
    before = fingerprint(HookedModel(inner))
    weight = inner.model.layers[1].mlp.up_proj.weight
    assert weight.size > 8 * 1024
    weight[300, 17] = weight[300, 17] + 0.5
    inner.model.layers[1].mlp.up_proj.weight = weight
    assert fingerprint(HookedModel(inner)) != before


def test_the_fingerprint_reads_quantised_weights() -> None:
    inner = tiny_model("llama")
    plain = fingerprint(HookedModel(inner))
    nn.quantize(inner, group_size=32, bits=4)
    assert fingerprint(HookedModel(inner)) not in (plain, "")


def test_texts_are_cut_off_at_the_models_context() -> None:
    model = HookedModel(make_model(CONFIGS["llama"] | {"max_position_embeddings": 6}))
    assert model.cfg.max_positions == 6
    lens = TunedLens.identity(model)
    assert lens.divergence([[1, 5, 9, 3, 7, 2, 8, 4]]) == lens.divergence([[1, 5, 9, 3, 7, 2]])


def test_the_learning_rate_falls_to_nothing_over_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    adam = tuned_lens.optim.Adam
    monkeypatch.setattr(
        tuned_lens.optim, "Adam", lambda learning_rate: given.append(learning_rate) or adam(learning_rate)
    )
    TunedLens.train(HookedModel(make_model("llama")), TOKENS, steps=4, learning_rate=0.1, progress=False)
    rates = [given[0](mx.array(step)).item() for step in range(5)]
    np.testing.assert_allclose(rates, [0.1, 0.075, 0.05, 0.025, 0], atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": []}, "texts is a list of texts or of rows of token ids"),
        ({"texts": "hello"}, "texts is a list of texts"),
        ({"texts": ["hello"]}, "This model has no tokenizer"),
        ({"steps": 0}, "steps is a whole number from 1 up, got 0"),
        ({"steps": 1.5}, "steps is a whole number from 1 up, got 1.5"),
        ({"steps": "3"}, "steps is a whole number from 1 up, got '3'"),
        ({"batch_size": -1}, "batch_size is a whole number from 1 up, got -1"),
        ({"batch_size": 2.5}, "batch_size is a whole number from 1 up, got 2.5"),
        ({"seed": -1}, "seed is a whole number from 0 up, got -1"),
        ({"seed": True}, "seed is a whole number from 0 up, got True"),
        ({"learning_rate": float("nan")}, "learning_rate is a finite number above 0, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate is a finite number above 0, got inf"),
        ({"learning_rate": "1"}, "learning_rate is a finite number above 0, got '1'"),
    ],
)
def test_what_cannot_be_trained_is_an_error(options: dict, message: str) -> None:
    with pytest.raises(HookError, match=message):
        TunedLens.train(HookedModel(make_model("llama")), **({"texts": TOKENS, "progress": False} | options))


def test_models_of_one_layer_and_of_several_passes_have_none() -> None:
    with pytest.raises(HookError, match="all layers but the last: this model has one layer"):
        TunedLens.identity(HookedModel(make_model(CONFIGS["llama"] | {"num_hidden_layers": 1})))
    looped = HookedModel(tiny_model("iquestloopcoder"))
    with pytest.raises(HookError, match="the layers of iquestloopcoder run several times"):
        TunedLens.train(looped, TOKENS, steps=1, progress=False)


def test_models_of_several_streams_have_none() -> None:
    with pytest.raises(HookError, match="needs one stream that makes the logits, unlike gemma3n"):
        TunedLens.identity(HookedModel(tiny_model("gemma3n")))
    with pytest.raises(HookError, match=r"translators \(2, 32, 32\) and \(2, 32\), got"):
        TunedLens(HookedModel(make_model("llama")), mx.zeros((3, 32, 32)), mx.zeros((3, 32)))
