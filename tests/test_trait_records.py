"""Files of captures: what is written is read, what is wrong with a file is named, and batches go on past what fails."""

import copy
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from every_architecture import FALCON_H1

from mlx_hooks import Experiment, HookedModel, HookError, TraitVector, capture_all_layers, capture_single_layer
from mlx_hooks.analysis.identity import ModelIdentity
from mlx_hooks.analysis.traits import batch as batches
from mlx_hooks.analysis.traits import records as files
from mlx_hooks.analysis.traits.batch import CaptureBatch
from mlx_hooks.analysis.traits.prompts import Chat
from mlx_hooks.analysis.traits.records import (
    arrays_of,
    json_parts,
    json_path,
    read_record,
    write_record,
)
from mlx_hooks.analysis.traits.verify import verify_format
from mlx_hooks.cli import main
from mlx_hooks.coverage.models import tiny_model

PROMPTS = ["The capital of France is", "When Mary and John went to the store ,"]
GREEDY = ["--temperature", "0", "--max-tokens", "3"]
Record = dict[str, Any]


def vector_of(model: HookedModel, trait: str, layer: int, method: str = "probe", seed: int = 0) -> TraitVector:
    numbers = np.random.default_rng(seed).normal(size=model.cfg.d_model)
    about = {"model": model.model_name}
    return TraitVector(trait, layer, method, numbers, chat=Chat(), metadata=about, identity=ModelIdentity.of(model))


@pytest.fixture(scope="module")
def layers(tiny: HookedModel) -> Record:
    """A capture of all layers."""
    [record] = capture_all_layers(tiny, PROMPTS[0], [vector_of(tiny, "polite", 2)], max_tokens=3)
    return record


@pytest.fixture(scope="module")
def single(tiny: HookedModel) -> Record:
    """A capture of one layer."""
    [record] = capture_single_layer(tiny, PROMPTS[0], [vector_of(tiny, "polite", 2)], layer=1, max_tokens=3)
    return record


@pytest.fixture
def experiment(tiny: HookedModel, tmp_path: Path) -> Experiment:
    """Two traits with vectors and one without, and the prompts that they share."""
    folder = tmp_path / "experiments" / "demo"
    for trait, layers_made in (("honest", [0, 1, 2, 3]), ("polite", [1])):
        for layer in layers_made:
            vector_of(tiny, trait, layer, seed=layer).save(folder / trait / "extraction" / "vectors")
    (folder / "wordless" / "extraction").mkdir(parents=True)
    (folder / "inference_prompts.txt").write_text("\n".join(PROMPTS))
    return Experiment(tmp_path / "experiments", "demo")


def same(a: Any, b: Any) -> None:
    """Equal nested structures, arrays bit for bit, keys in the same order."""
    assert type(a) is type(b)
    if isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            same(*pair)
    else:
        assert a == b


# Records


@pytest.mark.parametrize("kind", ["layers", "single"])
def test_what_is_written_is_read(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    record, path = request.getfixturevalue(kind), tmp_path / "new" / "prompt_0.safetensors"
    write_record(record, path, json_beside=True)
    found = read_record(path)
    same(found, record)
    assert verify_format(path) == []
    assert sorted(p.name for p in path.parent.iterdir()) == ["prompt_0.json", "prompt_0.safetensors"]


def test_records_have_the_keys_of_the_guide(layers: Record, single: Record) -> None:
    assert list(layers) == ["prompt", "response", "projections", "attention_weights", "metadata"]
    assert list(layers["prompt"]) == list(layers["response"]) == ["text", "tokens", "token_ids", "n_tokens"]
    assert list(layers["projections"]) == list(layers["attention_weights"]) == ["prompt", "response"]
    n, n_response = layers["prompt"]["n_tokens"], layers["response"]["n_tokens"]
    keys = [row["layer_0"].shape for row in layers["attention_weights"]["response"]]
    # The guide's: 7 tokens of prompt, then 8 and 9 keys.
    assert keys == [(n + k + 1,) for k in range(n_response)]
    assert {"prompt", "response", "layer", "internals", "metadata"} <= set(single)
    internals = single["internals"]["response"]
    assert set(internals["attention"]) == {"q_proj", "k_proj", "v_proj", "attn_weights"}
    assert {"up_proj", "gelu", "down_proj"} <= set(internals["mlp"])
    assert list(internals["residual"]) == ["input", "after_attn", "output"]
    required = {"trait", "trait_display_name", "vector_path", "model", "capture_date", "temperature"}
    assert required <= set(layers["metadata"])
    assert required | {"layer"} <= set(single["metadata"])


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_short_responses_are_kept_too(tiny: HookedModel, tmp_path: Path, max_tokens: int) -> None:
    vector, path = vector_of(tiny, "polite", 2), tmp_path / "prompt_0.safetensors"
    for capture in (capture_all_layers, lambda *given, **more: capture_single_layer(*given, layer=1, **more)):
        [record] = capture(tiny, PROMPTS[0], [vector], max_tokens=max_tokens)
        write_record(record, path)
        same(read_record(path), record)
        assert verify_format(path) == []


@pytest.mark.parametrize("name", ["jamba", "gpt_oss", "mixtral", "cohere", FALCON_H1, "deepseek_v2"])
@pytest.mark.parametrize("alignment", ["at", "predicts"])
def test_captures_of_every_kind_of_layer_are_right(name: str, alignment: str, tmp_path: Path) -> None:
    model, path, prompt = HookedModel(tiny_model(name)), tmp_path / "prompt_0.safetensors", [3, 1, 4, 1, 5]
    vector = TraitVector("t", 0, "given", np.arange(model.cfg.d_model) + 1.0)
    found = capture_all_layers(model, prompt, [vector], max_tokens=2, alignment=alignment)
    for layer in range(model.cfg.n_layers):
        found += capture_single_layer(model, prompt, [vector], layer=layer, max_tokens=2, alignment=alignment)
    for record in found:
        write_record(record, path, json_beside=True)
        assert verify_format(path) == []
        same(read_record(path), record)


def test_a_file_says_what_it_is_in_its_header(layers: Record, tmp_path: Path) -> None:
    path = tmp_path / "prompt_0.safetensors"
    write_record(layers, path)
    arrays, notes = mx.load(str(path), return_metadata=True)
    assert notes["format"] == "neuroscope.trait_capture/1"
    assert set(arrays) == {name for name, _ in arrays_of(layers)}
    assert {"projections/prompt", "attention_weights/response/2/layer_3"} <= set(arrays)
    assert json.loads(notes["record"])["metadata"] == layers["metadata"]


def test_json_is_strict_and_has_the_same_numbers(single: Record, tmp_path: Path) -> None:
    path = tmp_path / "prompt_0.safetensors"
    write_record(single, path, json_beside=True)
    text = json_path(path).read_text()
    plain = json.loads(text, parse_constant=pytest.fail)
    assert list(plain) == list(single)
    for name, array in arrays_of(single):
        node = plain
        for key in name.split("/"):
            node = node[int(key) if isinstance(node, list) else key]
        np.testing.assert_array_equal(np.array(node, array.dtype), array)
    assert plain["internals"]["prompt"]["mlp"]["gelu"] == plain["internals"]["prompt"]["mlp"]["activated"]


def test_numbers_in_json_are_the_shortest_of_float32() -> None:
    numbers = np.array([0.1, 1e-7, 1 / 3, 3.0, 16777216.0], np.float32)
    record = {"a": numbers, "b": {"c": np.float32(0.1) * np.ones((2, 3), np.float32).T}, "d": np.array([[1, 2]])}
    text = b'{"a":[0.1,1e-7,0.33333334,3.0,16777216.0],"b":{"c":[[0.1,0.1],[0.1,0.1],[0.1,0.1]]},"d":[[1,2]]}'
    assert b"".join(json_parts(record)) == text


def test_all_numbers_of_float32_come_back_from_json() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32)
    numbers = bits.view(np.float32)[np.isfinite(bits.view(np.float32))]
    found = json.loads(b"".join(json_parts({"a": numbers})))["a"]
    np.testing.assert_array_equal(np.array(found, np.float32).view(np.uint32), numbers.view(np.uint32))


def test_numbers_that_are_not_finite_are_not_written(layers: Record, tmp_path: Path) -> None:
    path = tmp_path / "prompt_0.safetensors"
    broken = copy.deepcopy(layers)
    broken["projections"]["prompt"][0, 0, 0] = np.nan
    with pytest.raises(HookError, match="projections/prompt holds numbers that are not finite"):
        write_record(broken, path)
    assert list(tmp_path.iterdir()) == []


def test_json_of_an_earlier_record_goes_with_it(layers: Record, tmp_path: Path) -> None:
    path = tmp_path / "prompt_0.safetensors"
    write_record(layers, path, json_beside=True)
    write_record(layers, path)
    assert not json_path(path).exists()


# verify-format

Change = Callable[[Record], Any]


def _set(*keys: Any) -> Change:
    """A change that puts the last of the keys where the others lead."""

    def change(record: Record) -> None:
        node = record
        for key in keys[:-2]:
            node = node[key]
        node[keys[-2]] = keys[-1]

    return change


def _drop(*keys: Any) -> Change:
    def change(record: Record) -> None:
        node = record
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]

    return change


def _edit(function: Callable[[np.ndarray], np.ndarray], *keys: Any) -> Change:
    def change(record: Record) -> None:
        node = record
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = function(node[keys[-1]])

    return change


def _ahead(pattern: np.ndarray) -> np.ndarray:
    pattern[..., 0, :2] = 0.5
    return pattern


def _longer(row: np.ndarray) -> np.ndarray:
    return np.concatenate([row, np.zeros_like(row[..., :1])], axis=-1)


WEIGHTS = "attention_weights"
WRONG_LAYERS: list[tuple[Change, str]] = [
    (_drop("prompt"), "prompt is missing"),
    (_drop("response", "tokens"), "response/tokens is missing"),
    (_set("prompt", "text", 5), "prompt/text is a text, got a whole number"),
    (_set("prompt", "tokens", ["a"]), "prompt/tokens has 1 entries, n_tokens is 8"),
    (_set("response", "token_ids", ["a", "b", "c"]), "response/token_ids is a list of whole numbers"),
    (_drop("metadata", "vector_path"), "metadata/vector_path is missing"),
    (_set("metadata", "alignment", "before"), "metadata/alignment is one of at, predicts, got 'before'"),
    (_set("metadata", "n_layers", True), "metadata/n_layers is a whole number, got true or false"),
    (_set("metadata", "n_layers", 10**12), "metadata/n_layers is a whole number from 0 to 10000"),
    (_set("metadata", "n_layers", 10_000), "metadata/model_identity/n_layers is 4, metadata/n_layers 10000"),
    (_set("metadata", "layer", 99), "metadata/layer is 99, n_layers is 4"),
    (_set("metadata", "method", "xyz"), "metadata/method is one of probe, mean_diff, ica, gradient, given, got 'xyz'"),
    (_set("metadata", "trait", ""), "metadata/trait is empty"),
    (_set("metadata", "capture_date", "yesterday"), "metadata/capture_date is an ISO date, got 'yesterday'"),
    (_set("metadata", "vector_norm", 0), "metadata/vector_norm is above 0 and finite"),
    (_set("metadata", "vector_norm", []), "metadata/vector_norm is a number, or with each_layer a list"),
    (_set("metadata", "each_layer", True), "metadata/vector_norm is a number, or with each_layer a list"),
    (_set("metadata", "temperature", -1), "metadata/temperature is a number from 0 up, got -1"),
    (_set("metadata", "top_p", 7), "metadata/top_p is a number from 0 to 1, got 7"),
    (_set("metadata", "seed", -1), "metadata/seed is a whole number from 0 up, got -1"),
    (_set("metadata", "max_tokens", 1), "response/n_tokens is 3, metadata/max_tokens 1"),
    (_set("metadata", "vector_sha256", "abc"), "metadata/vector_sha256 is 64 hexadecimal digits"),
    (_drop("metadata", "model_identity"), "metadata/model_identity is missing"),
    (_set("metadata", "layers_without_attention", {"0": ""}), "metadata/layers_without_attention/0 is a reason"),
    (_set("prompt", "token_ids", [-5] * 8), "prompt/token_ids are from 0 to 4294967295"),
    (_set("more", 1), "more is not expected"),
    (_edit(lambda a: a.astype(np.float16), "projections", "prompt"), "the type float16, not float32"),
    (_set("projections", "other", np.zeros(3, np.float32)), "projections/other is not expected"),
    (_set("metadata", "temperature", "warm"), "metadata/temperature is a whole number or a number, got a text"),
    (_set("metadata", "projection", "h"), "metadata/projection is one of h.v/|v|, h.v, got 'h'"),
    (_set("metadata", "layers_without_attention", []), "metadata/layers_without_attention is a mapping, got a list"),
    (_drop("projections", "prompt"), "projections/prompt is an array, got nothing"),
    (_edit(lambda a: a[:-1], "projections", "prompt"),
     "projections/prompt has the shape (7, 4, 3); by n_tokens and n_layers it has (8, 4, 3)"),
    (_edit(lambda a: a[:, :3], "projections", "response"), "projections/response has the shape (3, 3, 3)"),
    (_edit(lambda a: a.astype(np.int32), "projections", "response"), "holds numbers of the type int32"),
    (_drop(WEIGHTS, "prompt", "layer_2"), "attention_weights/prompt/layer_2 is missing"),
    (_edit(lambda rows: rows[:-1], WEIGHTS, "response"),
     "attention_weights/response has 2 entries, n_tokens of the response is 3"),
    (_edit(_longer, WEIGHTS, "response", 1, "layer_0"),
     "attention_weights/response/1/layer_0 has the shape (11); by n_tokens and the alignment 'at' it has (10)"),
    (_set("metadata", "alignment", "predicts"),
     "attention_weights/response/0/layer_0 has the shape (9); by n_tokens and the alignment 'predicts' it has (8)"),
    (_edit(lambda a: a * 0.5, WEIGHTS, "response", 0, "layer_1"),
     "attention_weights/response/0/layer_1 has rows of attention that do not sum to 1: 0.5 to 0.5"),
    (_edit(_ahead, WEIGHTS, "prompt", "layer_3"), "attention_weights/prompt/layer_3 looks ahead"),
    (_set("metadata", "temperature", 10**400), f"metadata/temperature is a number from 0 up, got {10**59}"),
    (_set("metadata", "top_p", 10**400), f"metadata/top_p is a number from 0 to 1, got {10**59}"),
    (_set("metadata", "seed", -(10**400)), "metadata/seed is a whole number from 0 up, got -1"),
    (_set("metadata", "layer", 10**400), f"metadata/layer is {10**59}, n_layers is 4"),
    (_set("metadata", "d_model", 10**400), "metadata/d_model is a whole number from 0 to 1000000, got 1"),
    (_set("metadata", "vector_norm", 10**400), "metadata/vector_norm is above 0 and finite"),
    (_set("prompt", "n_tokens", 10**400), "prompt/tokens has 8 entries, n_tokens is 1"),
    (_set("metadata", "n_passes", -3), "metadata/n_passes is a whole number from 1 up, got -3"),
    (_set("metadata", "n_heads", 0), "metadata/n_heads is 0, and there are attention weights"),
    (_set("metadata", "chat", {"a": 1}), "metadata/chat is nothing, or has use, system, template and used"),
    (_set("metadata", "chat", {"use": None, "system": None, "template": None, "used": 1}), "metadata/chat is nothing"),
    (_set("metadata", "model_identity", {}), "metadata/model_identity has model_type, n_layers"),
    (_set("metadata", "model_identity", "n_layers", float(10**300)), "metadata/model_identity/n_layers is 1"),
    (_set("metadata", "model_identity", "d_model", 127), "model_identity/d_model is 127, metadata/d_model 128"),
    (_set("metadata", "vector_path", [1]), "metadata/vector_path is a text or nothing, or with each_layer a list"),
    (_set("metadata", "attention_sinks", [{}]), "metadata/attention_sinks is a list of layers, got {}; n_layers is 4"),
    (_set("metadata", "looks_ahead", [[1]]), "metadata/looks_ahead is a list of layers, got [1]; n_layers is 4"),
    (_set("metadata", "looks_ahead", [4]), "metadata/looks_ahead is a list of layers, got 4; n_layers is 4"),
    (_set("metadata", "layers_without_attention", {"x": "y"}), "layers_without_attention is a mapping of layers, got"),
    (_set("metadata", "attends_repeatedly", 5), "metadata/attends_repeatedly is a mapping, got a whole number"),
    (_set("metadata", "attends_repeatedly", {"1": 5}), "metadata/attends_repeatedly/1 is a reason"),
    (_set("metadata", "after_attn", 3), "metadata/after_attn is a list, got a whole number"),
    (_set("metadata", "after_attn", ["a"]), "metadata/after_attn is a list of 4 texts, got ['a']"),
    (_set(WEIGHTS, "response", 0, 5), "attention_weights/response/0 is a mapping, got a whole number"),
]  # fmt: skip
WRONG_SINGLE: list[tuple[Change, str]] = [
    (_drop("layer"), "layer is missing"),
    (_set("layer", 9), "layer is 9, metadata/layer 1"),
    (_set("metadata", "layer", 0), "layer is 1, metadata/layer 0"),
    (_drop("metadata", "widths"), "metadata/widths is missing"),
    (_set("metadata", "widths", "residual/input", 3), "metadata/widths/residual/input is 3, d_model is 128"),
    (_set("metadata", "absent", {"attention/q_proj": ""}), "metadata/absent/attention/q_proj is a reason"),
    (_set("internals", "other", {"a": {"b": np.zeros(3, np.float32)}}), "internals/other is not expected"),
    (_set("internals", "prompt", "foo", {"bar": np.zeros((1, 1), np.float32)}), "internals/prompt/foo is not expected"),
    (_set("projections", "prompt", "foo", np.zeros(8, np.float32)), "projections/prompt/foo is not expected"),
    (_set("metadata", "widths", "residual/input", 10**400), f"metadata/widths/residual/input is {10**59}, d_model"),
    (_set("metadata", "widths", "mlp/activated", "wide"), "metadata/widths/mlp/activated is a whole number from 0 up"),
    (_set("metadata", "widths", "mlp/activated", 10**400), f"by n_tokens and metadata/widths it has (8, {10**59})"),
    (_set("layer", 10**400), f"layer is {10**59}, metadata/layer 1"),
    (_set("metadata", "after_attn", []), "metadata/after_attn is a list of 1 texts"),
    (_drop("internals", "response"), "internals/response is a mapping, got nothing"),
    (_drop("internals", "prompt", "attention", "k_proj"),
     "internals/prompt/attention/k_proj is missing, and metadata/absent gives no reason"),
    (_drop("internals", "prompt", "residual"), "internals/prompt/residual/input is missing"),
    (_edit(lambda a: a[:, :-1], "internals", "prompt", "attention", "q_proj"),
     "internals/prompt/attention/q_proj has the shape (8, 127); by n_tokens and metadata/widths it has (8, 128)"),
    (_edit(_ahead, "internals", "prompt", "attention", "attn_weights"), "attention/attn_weights looks ahead"),
    (_edit(lambda rows: rows[1:], "internals", "response", "attention", "attn_weights"),
     "internals/response/attention/attn_weights is a list of 3 arrays"),
    (_edit(lambda a: a[0], "internals", "response", "attention", "attn_weights", 2), "attn_weights/2 has the shape"),
    (_edit(lambda a: a[:, :2], "projections", "prompt", "residual"), "prompt/residual has the shape (8, 2)"),
    (_drop("projections", "response", "heads"), "projections/response/heads is missing"),
    (_edit(lambda a: a[:3], "projections", "neurons", "alignment"), "projections/neurons/alignment has the shape (3)"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change", "problem"),
    [("layers", *case) for case in WRONG_LAYERS] + [("single", *case) for case in WRONG_SINGLE],
)
def test_what_is_wrong_is_named(
    kind: str, change: Change, problem: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    record, path = copy.deepcopy(request.getfixturevalue(kind)), tmp_path / "prompt_0.safetensors"
    change(record)
    write_record(record, path)
    found = verify_format(path)
    assert any(problem in told for told in found), found
    assert len(found) < 20
    assert max(map(len, found)) < 240


def test_numbers_that_are_not_finite_are_named(layers: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, path = copy.deepcopy(layers), tmp_path / "prompt_0.safetensors"
    record["attention_weights"]["prompt"]["layer_0"][3, 1] = np.inf
    monkeypatch.setattr(files.np, "isfinite", lambda array: np.ones(1, bool))
    write_record(record, path)
    monkeypatch.undo()
    assert verify_format(path) == ["attention_weights/prompt/layer_0 holds numbers that are not finite"]


def test_rows_of_attention_with_a_sink_sum_to_at_most_one(tmp_path: Path) -> None:
    model, path = HookedModel(tiny_model("gpt_oss")), tmp_path / "prompt_0.safetensors"
    vector = TraitVector("t", 0, "given", np.ones(model.cfg.d_model))
    [record] = capture_all_layers(model, [3, 1, 4], [vector], max_tokens=2)
    assert record["metadata"]["attention_sinks"] == list(range(model.cfg.n_layers))
    assert record["attention_weights"]["prompt"]["layer_0"].sum(axis=-1).max() < 0.99
    write_record(record, path)
    assert verify_format(path) == []
    record["attention_weights"]["prompt"]["layer_0"] *= 4
    write_record(record, path)
    assert any("sum to at most 1, the rest is the sink's" in told for told in verify_format(path))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda plain: plain["projections"]["prompt"][0][0].__setitem__(1, 5.0), "projections/prompt/0/0/1 is 5.0"),
        (lambda plain: plain["projections"]["prompt"][0].pop(), "projections/prompt is no array: its lists differ"),
        (lambda plain: plain["projections"]["prompt"].pop(), "projections/prompt has the shape (7, 4, 3), expected (8"),
        (lambda plain: plain["projections"].__setitem__("prompt", "x"), "projections/prompt has the shape ()"),
        (
            lambda plain: plain["projections"]["prompt"][0][0].__setitem__(1, None),
            "projections/prompt holds something else",
        ),
        (lambda plain: plain["prompt"].__setitem__("n_tokens", 3), "prompt/n_tokens is 3, expected 8"),
        (lambda plain: plain.pop("response"), "response is missing"),
        (lambda plain: plain.__setitem__("more", 1), "more is not expected"),
        (lambda plain: plain["attention_weights"]["response"].pop(), "attention_weights/response has 2 entries"),
    ],
)
def test_json_that_disagrees_is_named(layers: Record, tmp_path: Path, change: Change, problem: str) -> None:
    path = tmp_path / "prompt_0.safetensors"
    write_record(layers, path, json_beside=True)
    plain = json.loads(json_path(path).read_text())
    change(plain)
    json_path(path).write_text(json.dumps(plain))
    assert len(verify_format(path)) == 1
    assert f"prompt_0.json disagrees: {problem}" in verify_format(path)[0]


def test_the_same_json_in_another_spelling_agrees(single: Record, tmp_path: Path) -> None:
    path = tmp_path / "prompt_0.safetensors"
    write_record(single, path, json_beside=True)
    json_path(path).write_text(json.dumps(json.loads(json_path(path).read_text()), indent=1, sort_keys=True))
    assert verify_format(path) == []


def test_what_is_wrong_with_large_sizes_is_named_at_once(layers: Record, tmp_path: Path) -> None:
    record, path = copy.deepcopy(layers), tmp_path / "prompt_0.safetensors"
    about = record["metadata"]
    about["n_layers"] = about["model_identity"]["n_layers"] = 10_000
    about["after_attn"] = ["attn_out"] * 10_000
    write_record(record, path)
    first, second = verify_format(path)
    assert first == "projections/prompt has the shape (8, 4, 3); by n_tokens and n_layers it has (8, 10000, 3)"
    assert second.startswith("projections/response has the shape (3, 4, 3)")


def test_numbers_that_were_changed_are_named(layers: Record, tmp_path: Path) -> None:
    path = tmp_path / "prompt_0.safetensors"
    write_record(layers, path)
    content = path.read_bytes()
    value = layers["projections"]["prompt"][3, 2, 1].tobytes()
    assert content.count(value) >= 1
    path.write_bytes(content.replace(value, np.float32(1.5).tobytes(), 1))
    [problem] = verify_format(path)
    assert "its numbers are not those that were written" in problem
    assert read_record(path, arrays=False)["prompt"] == layers["prompt"]


def test_a_header_has_no_numbers_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "prompt_0.safetensors"
    mx.save_safetensors(str(path), {}, {"format": "neuroscope.trait_capture/1", "record": '{"metadata": {"a": NaN}}'})
    assert "NaN has no place in JSON" in verify_format(path)[0]


@pytest.mark.parametrize("text", ["{", "[NaN]", "[" * 100_000])
def test_json_that_is_none_is_named(layers: Record, tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompt_0.safetensors"
    write_record(layers, path)
    json_path(path).write_text(text)
    assert "prompt_0.json is no JSON" in verify_format(path)[0]


def _rubbish(folder: Path, layers: Record) -> dict[Path, str]:
    """Files that are no captures, and what is told of them."""
    whole = folder / "whole.safetensors"
    write_record(layers, whole)
    content = whole.read_bytes()
    paths = {name: folder / name for name in (
        "missing.safetensors", "random.safetensors", "empty.safetensors", "short.safetensors", "pickled.safetensors",
        "zipped.safetensors", "prompt_0.pt", "vector.safetensors", "other.safetensors", "prompt_0.json",
        "place.safetensors", "flat.safetensors", "deep.safetensors",
    )}  # fmt: skip
    paths["random.safetensors"].write_bytes(bytes(range(256)) * 8)
    paths["empty.safetensors"].write_bytes(b"")
    paths["short.safetensors"].write_bytes(content[:-10])
    paths["pickled.safetensors"].write_bytes(pickle.dumps({"projections": [1, 2, 3]}))
    with zipfile.ZipFile(paths["zipped.safetensors"], "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    paths["prompt_0.pt"].write_bytes(pickle.dumps({}))
    paths["prompt_0.json"].write_text("{}")
    array = {"projections/prompt": mx.zeros((1,))}
    mx.save_safetensors(str(paths["vector.safetensors"]), array, {"format": "mlx"})
    mx.save_safetensors(
        str(paths["other.safetensors"]), array, {"format": "neuroscope.trait_capture/2", "record": "{}"}
    )
    own = {"format": "neuroscope.trait_capture/1"}
    mx.save_safetensors(str(paths["place.safetensors"]), {"metadata/x": mx.zeros((1,))}, own | {"record": "{}"})
    mx.save_safetensors(str(paths["flat.safetensors"]), {}, own | {"record": "[1]"})
    mx.save_safetensors(str(paths["deep.safetensors"]), {}, own | {"record": "[" * 100_000})
    told = [
        "There is no file", "its header is longer than the file", "too short to be a safetensors file",
        "no trait capture that can be read: it has", "is a pickle", "is a pickle", "is a pickle",
        "is of the format 'mlx': this version reads 'neuroscope.trait_capture/1'",
        "is of the format 'neuroscope.trait_capture/2'", "is no capture: that is a .safetensors file",
        "has no place for the array 'metadata/x'", "the record is a mapping, got a list", "can be read",
    ]  # fmt: skip
    return dict(zip(paths.values(), told, strict=True)) | {folder: "cannot be read: Is a directory"}


def test_files_that_are_no_captures_are_told_in_a_sentence(
    layers: Record, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rubbish = _rubbish(tmp_path, layers)
    for path, told in rubbish.items():
        [problem] = verify_format(path)
        assert told in problem
    assert main(["traits", "verify-format", *map(str, rubbish), str(tmp_path / "whole.safetensors")]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == f"{tmp_path / 'whole.safetensors'}: right"
    assert sum(line.endswith(": 1 wrong") for line in shown) == len(rubbish)


def test_verify_format_says_what_a_file_is_that_is_no_capture(layers: Record, tmp_path: Path) -> None:
    write_record(layers, tmp_path / "whole.safetensors", json_beside=True)
    (problem,) = verify_format(tmp_path / "whole.json")
    assert problem == f"{tmp_path / 'whole.json'} is checked with whole.safetensors beside it: give that one."
    path = TraitVector("polite", 1, "probe", np.ones(4)).save(tmp_path)
    assert verify_format(path) == [f"{path} is a trait vector, no capture."]


# Batches


def outcomes(batch: CaptureBatch) -> list[tuple[str, str | None, str]]:
    return sorted((o.trait, o.name or "", o.status) for o in batch.outcomes)


def run(experiment: Experiment, model: HookedModel, prompts: list[str] = PROMPTS, **options: Any) -> CaptureBatch:
    traits = [trait for trait in experiment.traits() if trait.name != "wordless"]
    asked = {"max_tokens": 2, "temperature": 0} | options
    batch = CaptureBatch(traits, prompts, **asked)
    batch.run(model, progress=False)
    return batch


def captures(experiment: Experiment) -> dict[str, bytes]:
    """All files of captures, by trait and name."""
    found = experiment.folder.glob("*/inference/*/*")
    return {f"{path.parts[-4]}/{path.name}": path.read_bytes() for path in sorted(found)}


ALL = [(trait, f"prompt_{i}") for trait in ("honest", "polite") for i in range(2)]


def test_a_trait_that_fails_stops_no_other(tiny: HookedModel, experiment: Experiment) -> None:
    other = replace(vector_of(tiny, "alien", 1), identity=ModelIdentity("llama", 4, 128, 522, "another"))
    other.save(experiment.folder / "alien" / "extraction" / "vectors")
    broken = experiment.folder / "broken" / "extraction" / "vectors" / "probe_layer1.safetensors"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no vector")
    batch = CaptureBatch(experiment.traits(), ["", *PROMPTS], max_tokens=2, save_json=True)
    assert [o.trait for o in batch.outcomes] == ["broken", "wordless"]
    batch.run(tiny, progress=False)
    expected = [(trait, f"prompt_{i}", "done") for trait in ("honest", "polite") for i in (1, 2)]
    expected += [(trait, "prompt_0", "failed") for trait in ("honest", "polite")]
    expected += [(trait, "", "failed") for trait in ("alien", "broken", "wordless")]
    assert outcomes(batch) == sorted(expected)
    reasons = {o.trait: o.reason for o in batch.outcomes if o.name is None}
    assert "is of another model: its weights differ" in reasons["alien"]
    assert "is no trait vector that can be read" in reasons["broken"]
    assert "has no vectors" in reasons["wordless"]
    lines = batch.summary().splitlines()
    assert lines[0] == "4 done, 0 skipped, 5 failed"
    assert len(lines) == 6
    assert "  failed: polite, prompt_0: A prompt is a text that is not empty, got ''." in lines
    for path in experiment.folder.glob("*/inference/*/*.safetensors"):
        assert verify_format(path) == []
        assert json_path(path).exists()


def test_what_a_model_raises_is_a_failure_of_its_files_alone(
    tiny: HookedModel, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capture(model: HookedModel, prompt: str, vectors: Any, **options: Any) -> list[Record]:
        if prompt == PROMPTS[0]:
            raise RuntimeError("out of memory")
        return capture_all_layers(model, prompt, vectors, **options)

    monkeypatch.setattr(batches, "capture_all_layers", capture)
    batch = run(experiment, tiny)
    assert outcomes(batch) == [(*file, "failed" if file[1] == "prompt_0" else "done") for file in ALL]
    assert batch.outcomes[0].reason == "RuntimeError: out of memory"


def test_many_traits_share_a_run(tiny: HookedModel, experiment: Experiment) -> None:
    passes: list[int] = []
    with tiny.hooks([("hook_embed", lambda value, point: passes.append(value.shape[1]))]):
        run(experiment, tiny, PROMPTS[:1])
    assert len(passes) == 4


def test_the_vector_is_the_one_that_is_found(tiny: HookedModel, experiment: Experiment) -> None:
    run(experiment, tiny, PROMPTS[:1], vector_layer=1)
    path = experiment.folder / "honest" / "inference" / "residual_stream_activations" / "prompt_0.safetensors"
    record = read_record(path)
    assert record["metadata"]["vector_path"] == "../honest/extraction/vectors/probe_layer1.safetensors"
    assert record["metadata"]["trait_display_name"] == "Honest"
    [expected] = capture_all_layers(
        tiny, PROMPTS[0], [vector_of(tiny, "honest", 1, seed=1)], max_tokens=2, temperature=0
    )
    np.testing.assert_allclose(record["projections"]["prompt"], expected["projections"]["prompt"], atol=1e-5)


def test_a_traits_settings_and_template_are_used(tiny: HookedModel, experiment: Experiment) -> None:
    trait = experiment.trait("polite")
    (trait.folder / "trait.json").write_text('{"display_name": "Good manners"}')
    (trait.folder / "chat_template.jinja").write_text("{{ messages[0].content }} the")
    # Its vector does not say how prompts were put.
    replace(vector_of(tiny, "polite", 1), chat=None).save(trait.vectors_folder)
    passes: list[int] = []
    with tiny.hooks([("hook_embed", lambda value, point: passes.append(value.shape[1]))]):
        run(experiment, tiny, PROMPTS[:1], max_tokens=0)
    # The two traits read other tokens.
    assert len(passes) == 4
    record = read_record(trait.folder / "inference/residual_stream_activations/prompt_0.safetensors")
    assert record["metadata"]["trait_display_name"] == "Good manners"
    assert record["prompt"]["tokens"][-1] == "the"
    assert record["prompt"]["text"] == PROMPTS[0]


def test_each_layer_needs_a_vector_of_each_layer(tiny: HookedModel, experiment: Experiment) -> None:
    batch = run(experiment, tiny, PROMPTS[:1], each_layer=True)
    assert outcomes(batch) == [("honest", "prompt_0", "done"), ("polite", "", "failed")]
    assert "there are none of 0, 2, 3" in batch.summary()
    [path] = experiment.folder.glob("*/inference/*/*.safetensors")
    assert read_record(path)["metadata"]["vector_path"] == [
        f"../honest/extraction/vectors/probe_layer{layer}.safetensors" for layer in range(4)
    ]


def test_existing_files_are_skipped_or_made_again(tiny: HookedModel, experiment: Experiment) -> None:
    run(experiment, tiny)
    made = captures(experiment)
    assert outcomes(run(experiment, tiny, skip_existing=True)) == [(*file, "skipped") for file in ALL]
    assert captures(experiment) == made
    # JSON that is missing is made of the file, without a run.
    passes: list[int] = []
    with tiny.hooks([("hook_embed", lambda value, point: passes.append(1))]):
        run(experiment, tiny, skip_existing=True, save_json=True)
    assert passes == []
    for path in experiment.folder.glob("*/inference/*/*.safetensors"):
        assert json_path(path).exists()
        assert verify_format(path) == []
    assert outcomes(run(experiment, tiny)) == [(*file, "done") for file in ALL]
    # Without save_json, no JSON of an earlier capture stays.
    assert list(captures(experiment)) == list(made)


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"prompts": PROMPTS[::-1]}, "another prompt, tokens of the prompt"),
        ({"seed": 1}, "another seed"),
        ({"max_tokens": 1}, "another max_tokens"),
        ({"alignment": "predicts"}, "another alignment"),
        ({"attention": False}, "another attention"),
        ({"normalize": False}, "another projection"),
        ({"temperature": 1.5}, "another temperature"),
        ({"top_p": 0.5}, "another top_p"),
    ],
)
def test_other_captures_are_not_replaced_silently(
    tiny: HookedModel, experiment: Experiment, options: dict[str, Any], differs: str
) -> None:
    run(experiment, tiny, save_json=True)
    made = captures(experiment)
    for skip_existing in (False, True):
        batch = run(experiment, tiny, skip_existing=skip_existing, **options)
        assert outcomes(batch) == [(*file, "failed") for file in ALL]
        assert f"holds a capture with {differs}: it is replaced only with overwrite." in batch.outcomes[0].reason
        assert captures(experiment) == made
    assert outcomes(run(experiment, tiny, overwrite=True, **options)) == [(*file, "done") for file in ALL]


def test_other_vectors_and_models_are_other_captures(tiny: HookedModel, experiment: Experiment) -> None:
    run(experiment, tiny)
    vector_of(tiny, "polite", 1, seed=9).save(experiment.folder / "polite" / "extraction" / "vectors")
    batch = run(experiment, tiny, skip_existing=True)
    statuses = {"honest": "skipped", "polite": "failed"}
    assert outcomes(batch) == [(*file, statuses[file[0]]) for file in ALL]
    assert "with another vector_sha256" in batch.summary()


def test_vectors_of_other_methods_and_layers_are_other_captures(tiny: HookedModel, experiment: Experiment) -> None:
    run(experiment, tiny, PROMPTS[:1])
    vectors = experiment.folder / "honest" / "extraction" / "vectors"
    numbers = TraitVector.load(vectors / "probe_layer2.safetensors")
    replace(numbers, method="ica").save(vectors)
    for options, differs in [
        ({"vector_layer": 2}, "vector_sha256, layer, vector_layer"),
        ({"method": "ica"}, "vector_sha256, method, layer, vector_layer"),
        ({"each_layer": True}, "vector_sha256, layer, vector_layer, each_layer"),
    ]:
        batch = run(experiment, tiny, PROMPTS[:1], skip_existing=True, **options)
        [reason] = [o.reason for o in batch.outcomes if o.trait == "honest"]
        assert f"holds a capture with another {differs}: " in reason


def test_captures_of_other_weights_are_other_captures(tiny: HookedModel, experiment: Experiment) -> None:
    run(experiment, tiny, PROMPTS[:1])
    # The same numbers, said to be of no model in particular.
    for path in list(experiment.folder.glob("*/extraction/vectors/*")):
        replace(TraitVector.load(path), identity=None).save(path.parent)
    other = HookedModel.from_pretrained("neuroscope-tiny")
    other.model.model.norm.weight = other.model.model.norm.weight * 2
    batch = run(experiment, other, PROMPTS[:1], skip_existing=True)
    assert outcomes(batch) == [("honest", "prompt_0", "failed"), ("polite", "prompt_0", "failed")]
    assert "with another model_identity:" in batch.summary()


@pytest.mark.parametrize("content", ['{"rubbish": 1}', "{", "[" * 100_000])
def test_json_that_is_something_else_is_not_skipped(tiny: HookedModel, experiment: Experiment, content: str) -> None:
    run(experiment, tiny, PROMPTS[:1], save_json=True)
    made = captures(experiment)
    beside = experiment.folder / "polite" / "inference" / "residual_stream_activations" / "prompt_0.json"
    beside.write_text(content)
    assert not run(experiment, tiny, PROMPTS[:1], skip_existing=True).has_failed
    batch = run(experiment, tiny, PROMPTS[:1], skip_existing=True, save_json=True)
    assert outcomes(batch) == [("honest", "prompt_0", "skipped"), ("polite", "prompt_0", "failed")]
    assert "prompt_0.json holds something else" in batch.summary()
    assert beside.read_text() == content
    batch = run(experiment, tiny, PROMPTS[:1], skip_existing=True, save_json=True, overwrite=True)
    assert outcomes(batch) == [("honest", "prompt_0", "skipped"), ("polite", "prompt_0", "skipped")]
    assert captures(experiment) == made


def test_traits_that_share_a_run_have_its_attention_encoded_once(
    tiny: HookedModel, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[Any] = []
    encode = files._encode
    monkeypatch.setattr(files, "_encode", lambda node: encoded.append(node) or encode(node))
    run(experiment, tiny, PROMPTS[:1], save_json=True)
    assert sum(isinstance(node, dict) and "layer_0" in node.get("prompt", {}) for node in encoded) == 1
    for path in experiment.folder.glob("*/inference/*/*.safetensors"):
        assert verify_format(path) == []


def test_captures_of_other_prompts_lie_beside_the_first(tiny: HookedModel, experiment: Experiment) -> None:
    run(experiment, tiny)
    run(experiment, tiny, PROMPTS[1:], prefix="custom-1", save_json=True)
    names = ["custom-1_0.json", "custom-1_0.safetensors", "prompt_0.safetensors", "prompt_1.safetensors"]
    assert list(captures(experiment)) == [f"{trait}/{name}" for trait in ("honest", "polite") for name in names]
    run(experiment, tiny, PROMPTS[:1], prefix="custom-1", captured_layer=2)
    assert "polite/custom-1_0_layer2.safetensors" in captures(experiment)
    for prefix in ("", "a b", "../x", "a/b", ".a", "é", "a\n", 5):
        with pytest.raises(HookError, match="prefix is made of letters, digits, - and _"):
            run(experiment, tiny, prefix=prefix)


def test_earlier_captures_that_stay_are_told_of(tiny: HookedModel, experiment: Experiment) -> None:
    run(experiment, tiny, ["a", "b", "c", "d"])
    batch = run(experiment, tiny, [PROMPTS[0], ""], overwrite=True)
    lines = batch.summary().splitlines()
    assert "  honest: there still are earlier captures, prompt 2, 3" in lines
    assert (
        "  failed: polite, prompt_1: A prompt is a text that is not empty, got ''; "
        "the file that is there is an earlier capture." in lines
    )
    assert "earlier" not in run(experiment, tiny, PROMPTS[:1]).summary()


def test_the_size_of_attention_is_told_before_the_run(
    tiny: HookedModel, experiment: Experiment, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_hooks.cli.traits.capturing.MUCH", 0)
    assert command("capture-layers", experiment, "--trait", "polite", "--prompts", PROMPTS[0]) == 0
    assert "attention weights will take up to 0.0 GB; --no-attention leaves them out" in capsys.readouterr().err
    assert command("capture-layers", experiment, "--trait", "polite", "--no-attention", "--overwrite") == 0
    assert "GB" not in capsys.readouterr().err


@pytest.mark.parametrize("captured_layer", [None, 1])
def test_the_size_of_attention_is_that_of_the_files(
    tiny: HookedModel, experiment: Experiment, captured_layer: int | None
) -> None:
    traits = [experiment.trait("honest"), experiment.trait("polite")]
    batch = CaptureBatch(traits, ["", *PROMPTS], captured_layer=captured_layer, max_tokens=3, temperature=0)
    expected = batch.attention_bytes(tiny)
    batch.run(tiny, progress=False)
    records = [read_record(path) for path in experiment.folder.glob("*/inference/*/*.safetensors")]
    sizes = [
        array.nbytes
        for record in records
        for name, array in arrays_of(record)
        if name.startswith("attention_weights") or "attn_weights" in name
    ]
    assert len(records) == 4
    assert sum(sizes) == expected


def test_several_traits_may_be_named(experiment: Experiment, capsys: pytest.CaptureFixture) -> None:
    several = ["--trait", "polite", "--trait", "honest", "--trait", "polite", "--prefix", "two"]
    assert command("capture-layers", experiment, *several, "--prompts", "a") == 0
    assert list(captures(experiment)) == ["honest/two_0.safetensors", "polite/two_0.safetensors"]
    assert command("capture-layer", experiment, *several, "--layer", "1", "--method", "given") == 1
    assert "has no vector" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["prompt_0.safetensors", "prompt_0.json"])
@pytest.mark.parametrize("content", ["notes of mine", "{}", "[1, 2]", '{"prompt": 5, "metadata": {}}'])
def test_files_of_others_are_not_replaced(tiny: HookedModel, experiment: Experiment, name: str, content: str) -> None:
    path = experiment.folder / "polite" / "inference" / "residual_stream_activations" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    for skip_existing in (False, True):
        batch = run(experiment, tiny, PROMPTS[:1], save_json=True, overwrite=False, skip_existing=skip_existing)
        assert outcomes(batch)[-1] == ("polite", "prompt_0", "failed")
        assert "holds something else" in batch.summary()
        assert path.read_text() == content
    batch = run(experiment, tiny, PROMPTS[:1], save_json=True, overwrite=True)
    assert not batch.has_failed
    assert verify_format(path.with_suffix(".safetensors")) == []


def test_an_interrupted_write_leaves_whole_files_only(
    tiny: HookedModel, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(experiment, tiny, PROMPTS[:1], save_json=True)
    made = captures(experiment)
    written = []

    def interrupted(path: Path, arrays: Any, notes: Any) -> None:
        written.append(path)
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "write_arrays", interrupted)
    for prompts in (PROMPTS[:1], PROMPTS):
        with pytest.raises(KeyboardInterrupt):
            run(experiment, tiny, prompts)
        assert captures(experiment) == made
    assert len(written) == 2


def test_what_killed_writers_left_is_cleared(tiny: HookedModel, experiment: Experiment) -> None:
    run(experiment, tiny, PROMPTS[:1])
    made = captures(experiment)
    left = [path / ".prompt_0.0000.writing.safetensors" for path in experiment.folder.glob("*/inference/*")]
    for path in left:
        path.write_bytes(b"half of it")
        os.utime(path, (0, 0))
    run(experiment, tiny, PROMPTS[:1], skip_existing=True)
    assert captures(experiment) == made


def test_a_disk_that_is_full_fails_one_file_and_keeps_the_old_one(
    tiny: HookedModel, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(experiment, tiny, save_json=True)
    made, write = captures(experiment), files.write_arrays

    def full(path: Path, arrays: Any, notes: Any) -> None:
        if "prompt_1" in path.name and "polite" in str(path):
            raise OSError(28, "No space left on device")
        write(path, arrays, notes)

    monkeypatch.setattr(files, "write_arrays", full)
    batch = run(experiment, tiny, save_json=True)
    assert "prompt_1.safetensors: No space left on device" in batch.summary()
    assert outcomes(batch) == [(*file, "failed" if file == ("polite", "prompt_1") else "done") for file in ALL]
    kept = captures(experiment)
    assert kept["polite/prompt_1.safetensors"] == made["polite/prompt_1.safetensors"]
    assert kept["polite/prompt_1.json"] == made["polite/prompt_1.json"]


def test_a_folder_that_cannot_be_written_to_is_told_before_the_model_is_needed(experiment: Experiment) -> None:
    (experiment.folder / "polite" / "inference").write_text("a file in the way")
    batch = CaptureBatch(experiment.traits(), PROMPTS)
    assert [o.trait for o in batch.outcomes] == ["polite", "wordless"]
    assert "cannot write" in batch.outcomes[0].reason
    assert batch.is_ready
    assert not (experiment.folder / "honest" / "inference").exists()


def test_prompts_longer_than_the_context_fail_alone(tiny: HookedModel, experiment: Experiment) -> None:
    batch = run(experiment, tiny, ["a " * 300, PROMPTS[0]])
    assert outcomes(batch) == [(*file, "failed" if file[1] == "prompt_0" else "done") for file in ALL]
    assert "the model reads at most 128" in batch.summary()


def test_batches_refuse_what_no_capture_can_have(tiny: HookedModel, experiment: Experiment) -> None:
    traits = experiment.traits()
    for options, message in [
        ({"prompts": []}, "at least one trait and one prompt"),
        ({"traits": []}, "at least one trait and one prompt"),
        ({"captured_layer": 1, "each_layer": True}, "each_layer is for captures of all layers"),
        ({"alignment": "x"}, "alignment is one of"),
        ({"temperature": -1.0}, "temperature is a number"),
    ]:
        asked: dict[str, Any] = {"traits": traits, "prompts": PROMPTS} | options
        with pytest.raises(HookError, match=message):
            CaptureBatch(asked.pop("traits"), asked.pop("prompts"), **asked)
    batch = CaptureBatch(traits, PROMPTS, captured_layer=4)
    with pytest.raises(HookError, match="Layers are 0 to 3, got 4"):
        batch.run(tiny, progress=False)


def test_the_model_is_the_one_that_the_vectors_name(tiny: HookedModel, experiment: Experiment) -> None:
    assert CaptureBatch(experiment.traits(), PROMPTS).model_name() == "neuroscope-tiny"
    other = replace(vector_of(tiny, "polite", 1), metadata={"model": "another"})
    other.save(experiment.folder / "polite" / "extraction" / "vectors")
    with pytest.raises(
        HookError, match=r"The vectors name another \(1\) and neuroscope-tiny \(\d\): say which model to take"
    ):
        CaptureBatch(experiment.traits(), PROMPTS).model_name()
    replace(other, metadata={}).save(experiment.folder / "polite" / "extraction" / "vectors")
    assert CaptureBatch(experiment.traits(), PROMPTS).model_name() == "neuroscope-tiny"
    with pytest.raises(HookError, match="say which model"):
        CaptureBatch([experiment.trait("polite")], PROMPTS).model_name()


# The commands


def command(name: str, experiment: Experiment, *more: str) -> int:
    return main(["traits", name, "--root", str(experiment.root), "--experiment", experiment.name, *GREEDY, *more])


def test_the_guides_commands_capture_all_traits(
    tiny: HookedModel, experiment: Experiment, capsys: pytest.CaptureFixture
) -> None:
    asked = ["--all-traits", "--save-json", "--skip-existing"]
    assert command("capture-layers", experiment, *asked) == 1
    assert capsys.readouterr().out.splitlines()[0] == "4 done, 0 skipped, 1 failed"
    assert command("capture-layer", experiment, *asked, "--layer", "2", "--prompts", *PROMPTS) == 1
    assert command("capture-layers", experiment, *asked) == 1
    assert "0 done, 4 skipped, 1 failed" in capsys.readouterr().out
    names = [
        f"prompt_{i}{layer}.{suffix}"
        for i in range(2)
        for layer in ("", "_layer2")
        for suffix in ("json", "safetensors")
    ]
    found = captures(experiment)
    assert sorted(found) == sorted(f"{trait}/{name}" for trait in ("honest", "polite") for name in names)
    written = [str(path) for path in experiment.folder.glob("*/inference/*/*.safetensors")]
    assert main(["traits", "verify-format", *written]) == 0
    record = read_record(experiment.folder / "polite/inference/layer_internal_states/prompt_1_layer2.safetensors")
    assert (record["layer"], record["metadata"]["vector_layer"]) == (2, 1)


def test_one_trait_with_prompts_of_a_file(experiment: Experiment, tmp_path: Path) -> None:
    custom = tmp_path / "custom.json"
    custom.write_text(json.dumps(["The capital of Spain is"]))
    options = ["--trait", "honest", "--layer", "3", "--method", "probe", "--no-attention", "--alignment", "predicts"]
    assert command("capture-layers", experiment, *options, "--prompts_file", str(custom), "--seed", "5") == 0
    record = read_record(experiment.folder / "honest/inference/residual_stream_activations/prompt_0.safetensors")
    about = {"layer": 3, "attention": "not captured", "alignment": "predicts", "seed": 5, "max_tokens": 3}
    assert {key: record["metadata"][key] for key in about} == about
    assert record["prompt"]["text"] == "The capital of Spain is"
    assert not json_path(
        experiment.folder / "honest/inference/residual_stream_activations/prompt_0.safetensors"
    ).exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--trait", "rude"], "has no trait 'rude'. There are: honest, polite, wordless."),
        (["--all-traits", "--prompts-file", "nowhere.txt"], "There is no file nowhere.txt."),
        (["--all-traits", "--max-tokens", "-1"], "max_tokens is a whole number from 0 up, got -1."),
        (["--all-traits", "--model", "nowhere"], "nowhere"),
        (["--all-traits", "--prefix", "../x"], "prefix is made of letters, digits, - and _, got '../x'."),
    ],
)
def test_what_cannot_be_done_is_one_line(
    experiment: Experiment, capsys: pytest.CaptureFixture, more: list[str], told: str
) -> None:
    assert command("capture-layers", experiment, *more) == 1
    shown = capsys.readouterr().err
    assert told in shown
    assert shown.startswith("neuroscope: ")
    assert captures(experiment) == {}


def test_a_layer_that_is_not_there_is_one_line(experiment: Experiment, capsys: pytest.CaptureFixture) -> None:
    assert command("capture-layer", experiment, "--all-traits", "--layer", "9") == 1
    assert capsys.readouterr().err == "neuroscope: Layers are 0 to 3, got 9.\n"


def test_an_experiment_without_traits_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    assert command("capture-layers", Experiment(tmp_path, "empty"), "--all-traits", "--prompts", "a") == 1
    assert "The experiment empty has no traits" in capsys.readouterr().err


def test_an_empty_prompt_file_is_one_line(experiment: Experiment, capsys: pytest.CaptureFixture) -> None:
    (experiment.folder / "inference_prompts.txt").write_text("\n \n")
    assert command("capture-layers", experiment, "--all-traits") == 1
    assert "has no prompts: it needs at least one." in capsys.readouterr().err


def test_nothing_is_loaded_where_every_trait_fails(
    experiment: Experiment, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HookedModel, "from_pretrained", lambda name: pytest.fail("the model was loaded"))
    assert command("capture-layers", experiment, "--trait", "wordless") == 1
    assert "0 done, 0 skipped, 1 failed" in capsys.readouterr().out


def test_an_interrupted_command_tells_what_was_done(
    experiment: Experiment, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(model: HookedModel, prompt: str, vectors: Any, **options: Any) -> list[Record]:
        if prompt == PROMPTS[1]:
            raise KeyboardInterrupt
        return capture_all_layers(model, prompt, vectors, **options)

    monkeypatch.setattr(batches, "capture_all_layers", interrupted)
    assert command("capture-layers", experiment, "--all-traits") == 130
    shown = capsys.readouterr()
    assert "2 done, 0 skipped, 1 failed, 2 not reached" in shown.out
    assert "interrupted; the files that were written are whole" in shown.err
    for path in experiment.folder.glob("*/inference/*/*"):
        assert verify_format(path) == []
