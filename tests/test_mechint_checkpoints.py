"""Checkpoints of training: what fits is loaded, what does not is refused by name."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_models import CONFIGS, make_model

from mlx_hooks import HookedModel, HookError, ModelLoadError
from mlx_hooks.training.checkpoints import checkpoints_by_step, load_checkpoint, weights_kept

LORA = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
TOKENS = mx.array([[1, 5, 9, 2]])


def save(model: nn.Module, path: Path) -> Path:
    mx.save_safetensors(str(path), dict(tree_flatten(model.parameters())))
    return path


def same(one: nn.Module, other: nn.Module) -> bool:
    return bool(mx.array_equal(one(TOKENS), other(TOKENS)).item())


@pytest.fixture
def adapters(tmp_path: Path) -> SimpleNamespace:
    """A model with trained adapters, and the folder that mlx-lm's training would have written."""
    model = make_model("llama")
    model.freeze()
    linear_to_lora_layers(model, 2, LORA)
    for name, weight in tree_flatten(model.trainable_parameters()):
        model.load_weights([(name, weight + 0.1 * mx.random.normal(weight.shape))], strict=False)
    folder = tmp_path / "adapters"
    folder.mkdir()
    trained = dict(tree_flatten(model.trainable_parameters()))
    for name in ("adapters.safetensors", "0000010_adapters.safetensors"):
        mx.save_safetensors(str(folder / name), trained)
    mx.save_safetensors(
        str(folder / "0000005_adapters.safetensors"), {name: 0.5 * weight for name, weight in trained.items()}
    )
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": LORA}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return SimpleNamespace(model=model, folder=folder)


def test_a_weights_file_is_loaded_whole(tmp_path: Path) -> None:
    trained, model = make_model("llama", seed=1), make_model("llama", seed=0)
    assert not same(trained, model)
    assert load_checkpoint(model, save(trained, tmp_path / "model.safetensors")) is False
    assert same(trained, model)


def test_the_folder_of_a_whole_model_is_loaded() -> None:
    from mlx_hooks.loading import fetch, load

    folder = fetch("neuroscope-tiny")
    trained, _ = load("neuroscope-tiny")
    model, _ = load("neuroscope-tiny")
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * 2
    load_checkpoint(model, folder)
    assert same(trained, model)


@pytest.mark.parametrize("which", ["", "adapters.safetensors", "0000010_adapters.safetensors"])
def test_adapters_are_put_into_a_model_that_has_none(adapters: SimpleNamespace, which: str) -> None:
    model = make_model("llama")
    assert load_checkpoint(model, adapters.folder / which) is True
    assert same(adapters.model, model)
    # A second time they are there.
    assert load_checkpoint(model, adapters.folder / "0000005_adapters.safetensors") is False
    assert not same(adapters.model, model)
    assert load_checkpoint(model, adapters.folder) is False
    assert same(adapters.model, model)
    HookedModel(model)


def test_what_full_fine_tuning_of_some_layers_saves_is_loaded(tmp_path: Path) -> None:
    trained, model = make_model("llama"), make_model("llama")
    trained.layers[-1].mlp.up_proj.weight = trained.layers[-1].mlp.up_proj.weight * 2
    last = {f"model.layers.2.{name}": weight for name, weight in tree_flatten(trained.layers[-1].parameters())}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"fine_tune_type": "full", "num_layers": 1}))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), last)
    load_checkpoint(model, tmp_path)
    assert same(trained, model)


def test_after_the_block_the_model_is_as_it_was(adapters: SimpleNamespace, tmp_path: Path) -> None:
    model, untouched = make_model("llama"), make_model("llama")
    names = [name for name, _ in model.named_modules()]
    other = save(make_model("llama", seed=3), tmp_path / "model.safetensors")
    with weights_kept(model):
        load_checkpoint(model, other)
        load_checkpoint(model, adapters.folder)
        assert not same(model, untouched)
    assert same(model, untouched)
    assert [name for name, _ in model.named_modules()] == names


def test_weights_are_put_back_to_the_bit_every_time(adapters: SimpleNamespace) -> None:
    model = make_model("llama")
    before = {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}
    logits = np.array(model(TOKENS))
    for _ in range(10):
        with weights_kept(model):
            for path in checkpoints_by_step(adapters.folder).values():
                load_checkpoint(model, path)
                assert not np.array_equal(np.array(model(TOKENS)), logits)
        after = {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}
        assert list(after) == list(before)
        assert all(np.array_equal(after[name], before[name]) for name in before)
        np.testing.assert_array_equal(np.array(model(TOKENS)), logits)


def test_parameters_keep_their_types(tmp_path: Path) -> None:
    model = make_model("llama")
    model.set_dtype(mx.bfloat16)
    trained = make_model("llama", seed=1)
    load_checkpoint(model, save(trained, tmp_path / "model.safetensors"))
    parameters, expected = (dict(tree_flatten(each.parameters())) for each in (model, trained))
    assert {weight.dtype for weight in parameters.values()} == {mx.bfloat16}
    assert all(mx.array_equal(parameters[name], expected[name].astype(mx.bfloat16)).item() for name in parameters)


def test_packed_weights_stay_whole_numbers(tmp_path: Path) -> None:
    model, trained = make_model("llama"), make_model("llama", seed=1)
    for each in (model, trained):
        nn.quantize(
            each,
            group_size=32,
            bits=4,
            class_predicate=lambda path, module: hasattr(module, "to_quantized") and "down_proj" not in path,
        )
    load_checkpoint(model, save(trained, tmp_path / "model.safetensors"))
    assert model.layers[0].mlp.up_proj.weight.dtype == mx.uint32
    assert same(model, trained)


def refused(folder: Path) -> list[tuple[str, str]]:
    (folder / "text.safetensors").write_text("no tensors")
    (folder / "weights.pt").write_bytes(b"PK")
    (folder / "notes.txt").write_text("notes")
    (folder / "empty").mkdir()
    save(make_model(CONFIGS["llama"] | {"num_hidden_layers": 4}), folder / "deeper.safetensors")
    save(make_model(CONFIGS["llama"] | {"num_hidden_layers": 2}), folder / "flatter.safetensors")
    save(make_model(CONFIGS["llama"] | {"hidden_size": 16}), folder / "narrow.safetensors")
    mx.save_safetensors(str(folder / "none.safetensors"), {})
    return [
        ("nowhere", "There is no checkpoint at .*nowhere"),
        ("text.safetensors", "it is no whole safetensors file"),
        ("weights.pt", "PyTorch checkpoint: convert it with mlx_lm.convert"),
        ("notes.txt", "a .safetensors file or a folder, got notes.txt"),
        ("empty", "neither adapters.safetensors nor config.json"),
        ("deeper.safetensors", r"this one has no model\.layers\.3\.\S+, \S+, \S+ and \d more"),
        ("flatter.safetensors", r"it lacks model\.layers\.2\.\S+"),
        ("narrow.safetensors", r"of another shape are \S+ \(\[60, 16\], here \[60, 32\]\)"),
        ("none.safetensors", "holds no weights"),
    ]


def test_what_is_no_checkpoint_of_the_model_is_refused_and_leaves_it(tmp_path: Path) -> None:
    model, untouched = make_model("llama"), make_model("llama")
    for name, message in refused(tmp_path):
        with pytest.raises(ModelLoadError, match=message):
            load_checkpoint(model, tmp_path / name)
        assert same(model, untouched)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_parameters": {"rank": 2}}, "cannot be put into this model: it lacks"),
        ({"lora_parameters": LORA | {"rank": 3}}, "of another shape are .*lora_a"),
        ({"num_layers": 1}, "this one has no .*lora_"),
    ],
)
def test_adapters_that_do_not_fit_leave_the_model(
    adapters: SimpleNamespace, change: dict[str, Any], message: str
) -> None:
    path = adapters.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model, untouched = make_model("llama"), make_model("llama")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ModelLoadError, match=message):
        load_checkpoint(model, adapters.folder)
    assert same(model, untouched)
    assert [name for name, _ in model.named_modules()] == names
    path.write_text("[]")
    with pytest.raises(ModelLoadError, match="no JSON object"):
        load_checkpoint(model, adapters.folder)


def test_numbered_files_are_checkpoints_by_step(adapters: SimpleNamespace, tmp_path: Path) -> None:
    found = checkpoints_by_step(adapters.folder)
    assert {step: path.name for step, path in found.items()} == {
        5: "0000005_adapters.safetensors",
        10: "0000010_adapters.safetensors",
    }
    assert list(checkpoints_by_step({20: "b", 3: "a"}).items()) == [(3, Path("a")), (20, Path("b"))]
    shutil.rmtree(adapters.folder)
    with pytest.raises(HookError, match="no numbered checkpoint in .*adapters"):
        checkpoints_by_step(adapters.folder)
    for wrong in ({}, {"5": "a"}, {-1: "a"}):
        with pytest.raises(HookError, match="paths by step"):
            checkpoints_by_step(wrong)
