"""Capture while mlx-lm trains: what is captured, and that training does not notice."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx_lm.models.base import create_attention_mask
from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train
from tiny_models import make_model
from training_runs import (
    TRAINING,
    VALIDATION,
    Losses,
    Trained,
    adapt,
    classes_restored,
    folder_of,
    prepared,
    run,
    same,
    sequences,
    spying,
    streams,
    write_lora_folder,
)

from mlx_hooks import CaptureWarning, HookedModel, HookError, MechIntCallback, MechIntConfig, UnknownHookError
from mlx_hooks.training.batches import Batch
from mlx_hooks.training.trained import undisturbed

EVERY = 4
NAMES = [f"blocks.{i}.hook_resid_post" for i in range(3)]


def settings(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"storage_path": str(tmp_path / "shards"), "save_hidden_every_n_steps": EVERY} | more


KINDS = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora"},
    "dora": {"kind": "dora"},
    "qlora": {"kind": "qlora", "iters": 5},
    "checkpointed": {"kind": "full", "grad_checkpoint": True},
    "accumulating": {"kind": "lora", "grad_accumulation_steps": 3},
}
EVERYTHING = [*NAMES, "blocks.1.hook_attn_out", "blocks.*.attn.hook_pattern", "model.layers.2.self_attn.q_proj"]


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_training_does_not_notice(options: dict[str, Any], tmp_path: Path) -> None:
    with classes_restored(make_model("llama")):
        plain = run(train, tmp_path, **options)
    with classes_restored(make_model("llama")):
        callback = MechIntCallback(settings(tmp_path, sample_layers=EVERYTHING))
        captured = run(callback.train, tmp_path, **options)
    assert captured.losses == plain.losses
    assert same(captured.weights, plain.weights)
    assert all(same(one[0], other[0]) for one, other in zip(captured.seen, plain.seen, strict=True))
    found = folder_of(tmp_path / "shards")
    assert found.steps == [0, 4, 8][: 1 + options.get("iters", 9) // 4]
    for step, (shard,) in found.shards.items():
        weights, batch, lengths = plain.seen[step]
        check_rows(shard, options["kind"], weights, batch, lengths)


def check_rows(shard: Any, kind: str, weights: dict[str, mx.array], batch: mx.array, lengths: mx.array) -> None:
    """The rows of a shard are those of a model with these weights that reads the batch, bit for bit."""
    model = prepared(kind)
    adapt(model, kind)
    model.load_weights(list(weights.items()))
    inputs = batch[:, :-1]
    rows = [(i, p) for i, (_, length) in enumerate(lengths.tolist()) for p in range(min(length, inputs.shape[1]))]
    assert list(zip(shard.sequence.tolist(), shard.position.tolist(), strict=True)) == rows
    assert shard.tokens.tolist() == [batch[i, p].item() for i, p in rows]
    for name, stream in zip(NAMES, streams(model, inputs), strict=True):
        assert same({name: shard.activations[name]}, {name: mx.stack([stream[i, p] for i, p in rows])})


def test_padding_and_validation_are_not_captured(tmp_path: Path) -> None:
    run(MechIntCallback(settings(tmp_path, save_hidden_every_n_steps=1)).train, tmp_path)
    found = folder_of(tmp_path / "shards")
    assert found.steps == list(range(9))
    tokens = np.concatenate([shard.tokens for shards in found.shards.values() for shard in shards])
    assert tokens.min() >= TRAINING.start
    assert tokens.max() < VALIDATION.start


def test_batches_wrapped_by_hand(tmp_path: Path) -> None:
    seen: list[Trained] = []

    def by_hand(model: nn.Module, *data: Any, iterate_batches: Any, training_callback: Losses, **options: Any) -> None:
        callback = MechIntCallback(MechIntConfig(**settings(tmp_path)), model, wrapped_callback=training_callback)
        train(
            model, *data, iterate_batches=callback.wrap_batches(iterate_batches), training_callback=callback, **options
        )
        assert callback.step == 8
        assert [path.name[:24] for path in callback.saved_shards] == [f"activations_shard_00000{i}" for i in range(3)]
        # The generator of batches is gone with the training, and the capture has ended with it.
        seen.append(callback)

    plain, captured = run(train, tmp_path), run(by_hand, tmp_path)
    assert captured.losses == plain.losses
    assert same(captured.weights, plain.weights)
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    trained = [(entry["step"], entry["train_loss"]) for entry in manifest["training"] if entry["kind"] == "train"]
    validated = [(entry["step"], entry["val_loss"]) for entry in manifest["training"] if entry["kind"] == "validation"]
    assert sorted(trained + validated) == sorted(plain.losses)
    assert [step for step, _ in validated] == [0, 3, 7, 8]


@pytest.mark.parametrize("known", [True, False], ids=["with the model", "without"])
def test_a_callback_without_its_batches_is_told(known: bool, tmp_path: Path) -> None:
    model = prepared("full")
    callback = MechIntCallback(settings(tmp_path), model if known else None)
    args = TrainingArgs(iters=4, batch_size=4, steps_per_report=2, adapter_file=str(tmp_path / "a.safetensors"))
    with pytest.warns(CaptureWarning, match="Nothing is captured, .* are not wrapped: train by callback.train") as told:
        train(model, optim.Adam(1e-3), sequences(TRAINING, 12), args=args, training_callback=callback)
    assert len(told) == 1
    callback.finish()


def test_adapters_may_come_after_the_callback(tmp_path: Path) -> None:
    model = prepared("lora")
    callback = MechIntCallback(settings(tmp_path, sample_layers=[*EVERYTHING]), model)
    adapt(model, "lora")
    trained = Trained(model)
    np.random.seed(0)
    args = TrainingArgs(iters=5, batch_size=4, max_seq_length=33, adapter_file=str(tmp_path / "adapters.safetensors"))
    callback.train(model, optim.Adam(1e-3), sequences(TRAINING, 12), args=args, iterate_batches=spying(trained))
    found = folder_of(tmp_path / "shards")
    for step in (0, 4):
        check_rows(found.shards[step][0], "lora", *trained.seen[step])
    # A module that was replaced is the one that has its path now.
    weights, batch, _ = trained.seen[4]
    reference = prepared("lora")
    adapt(reference, "lora")
    reference.load_weights(list(weights.items()))
    block = reference.model.layers[2]
    expected = block.self_attn.q_proj(block.input_layernorm(streams(reference, batch[:, :-1])[1]))
    shard = found.shards[4][0]
    got = shard.activations["model.layers.2.self_attn.q_proj.output"]
    assert same({"q": got}, {"q": expected[mx.array(shard.sequence), mx.array(shard.position)]})


def test_a_sublayer_may_be_replaced(tmp_path: Path) -> None:
    model, twin = make_model("llama"), make_model("llama", seed=1)
    callback = MechIntCallback(settings(tmp_path, sample_layers=["blocks.1.hook_attn_out"]), model)
    model.model.layers[1].self_attn = twin.model.layers[1].self_attn
    data = sequences(TRAINING, 8)
    batch, _ = next(callback.wrap_batches(iterate_batches)(data, 4, 33, loop=True))
    shard = folder_of(tmp_path / "shards").shards[0][0]
    mask = create_attention_mask(mx.zeros((1, batch.shape[1] - 1, 1)), None)
    block = model.model.layers[1]
    expected = block.self_attn(block.input_layernorm(streams(model, batch[:, :-1])[0]), mask, None)
    got = shard.activations["blocks.1.hook_attn_out"]
    assert same({"": got}, {"": expected[mx.array(shard.sequence), mx.array(shard.position)]})


def test_a_blocks_inside_is_seen_where_it_was_checkpointed_before(tmp_path: Path) -> None:
    model = make_model("llama_untied")
    with classes_restored(model):
        run(train, tmp_path, iters=1, grad_checkpoint=True)
        callback = MechIntCallback(settings(tmp_path, sample_layers=["blocks.1.hook_attn_out"]))
        run(callback.train, tmp_path, iters=1, grad_checkpoint=True)
    with classes_restored(model):
        twin = MechIntCallback(settings(tmp_path / "twin", sample_layers=["blocks.1.hook_attn_out"]))
        run(twin.train, tmp_path, iters=1)
    one, other = (folder_of(folder / "shards").shards[0][0] for folder in (tmp_path, tmp_path / "twin"))
    assert same(one.activations, other.activations)


def test_patterns_are_rows_of_query_tokens(tmp_path: Path) -> None:
    name = "blocks.1.attn.hook_pattern"
    trained = run(MechIntCallback(settings(tmp_path, sample_layers=[name])).train, tmp_path)
    for step, (shard,) in folder_of(tmp_path / "shards").shards.items():
        weights, batch, _ = trained.seen[step]
        model = make_model("llama")
        model.load_weights(list(weights.items()))
        _, cache = HookedModel(model).run_with_cache(batch[:, :-1], name)
        pattern = np.array(cache[name])[shard.sequence, :, shard.position]
        assert np.array(shard.activations[name]).tobytes() == pattern.tobytes()


def test_few_sequences_of_a_step_and_few_rows_of_a_file(tmp_path: Path) -> None:
    more = {"max_sequences_per_step": 2, "max_activations_per_shard": 20}
    trained = run(MechIntCallback(settings(tmp_path, **more)).train, tmp_path)
    found = folder_of(tmp_path / "shards")
    assert any(len(shards) > 1 for shards in found.shards.values())
    for step, shards in found.shards.items():
        assert all(len(shard.tokens) <= 20 for shard in shards)
        _, batch, lengths = trained.seen[step]
        rows = [batch[i, p].item() for i in range(2) for p in range(min(lengths[i, 1].item(), batch.shape[1] - 1))]
        assert np.concatenate([shard.tokens for shard in shards]).tolist() == rows
        if lengths[:2, 0].tolist() != [0, 0]:
            assert shards[0].metadata["prompt_lengths"] == lengths[:2, 0].tolist()


def test_training_that_goes_on_counts_on(tmp_path: Path) -> None:
    run(MechIntCallback(settings(tmp_path)).train, tmp_path, iters=6)
    run(MechIntCallback(settings(tmp_path), first_step=6).train, tmp_path, iters=6)
    found = folder_of(tmp_path / "shards")
    assert found.steps == [0, 4, 8]
    assert [entry["file"][18:31] for entry in found.reader.entries] == [
        "000000_step_0",
        "000001_step_4",
        "000002_step_8",
    ]
    reports = [entry["step"] for entry in found.reader.manifest["training"] if entry["kind"] == "train"]
    assert reports == [*range(1, 13)]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("reason", [Interrupted, KeyboardInterrupt])
def test_a_training_that_breaks_off_leaves_what_was_captured(reason: type, tmp_path: Path) -> None:
    class Breaking(Losses):
        def on_train_loss_report(self, info: dict) -> None:
            if info["iteration"] == 6:
                raise reason

    callback = MechIntCallback(settings(tmp_path), wrapped_callback=Breaking())
    with pytest.raises(reason):
        run(callback.train, tmp_path)
    found = folder_of(tmp_path / "shards")
    assert found.steps == [0, 4]
    assert [entry["step"] for entry in found.reader.manifest["training"] if entry["kind"] == "train"] == [*range(1, 7)]
    callback.finish()
    with pytest.raises(HookError, match="has ended: make a new MechIntCallback"):
        callback.train(make_model("llama"), None, [])


def test_batches_that_are_not_taken_to_the_end(tmp_path: Path) -> None:
    model = make_model("llama")
    callback = MechIntCallback(settings(tmp_path, save_hidden_every_n_steps=1), model)
    batches = callback.wrap_batches(iterate_batches)(sequences(TRAINING, 8), 4, 33, loop=True)
    next(batches)
    batches.close()
    assert folder_of(tmp_path / "shards").steps == [0]
    with pytest.raises(HookError, match="has ended"):
        callback.train(model, None, [])


def full_disk(*args: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_capture_that_fails_does_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(train, tmp_path)

    class Filling(Losses):
        def on_train_loss_report(self, info: dict) -> None:
            if info["iteration"] == 3:
                monkeypatch.setattr("mlx_hooks.training.capturing.Capturing.save", full_disk)

    callback = MechIntCallback(settings(tmp_path, save_hidden_every_n_steps=2), wrapped_callback=Filling())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        captured = run(callback.train, tmp_path)
    texts = [str(warning.message) for warning in told if warning.category is CaptureWarning]
    assert texts == [
        "A training step was not captured: OSError: [Errno 28] No space left on device",
        "3 of 5 steps were not captured, the last one because: OSError: [Errno 28] No space left on device",
    ]
    assert captured.losses == plain.losses
    assert same(captured.weights, plain.weights)
    assert folder_of(tmp_path / "shards").steps == [0, 2]


def test_an_end_that_cannot_be_noted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise HookError("cannot write manifest.json: No space left on device")

    callback = MechIntCallback(settings(tmp_path), make_model("llama"))
    with monkeypatch.context() as patched:
        patched.setattr("mlx_hooks.storage.manifest.Manifest.save", fail)
        with pytest.warns(CaptureWarning, match="The end of capturing could not be noted: cannot write manifest.json"):
            callback.finish()
    callback.finish()


def test_a_first_capture_that_fails_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_hooks.training.capturing.Capturing.save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(MechIntCallback(settings(tmp_path)).train, tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sample_layers": ["model.layers.7"]}, UnknownHookError, "Blocks are 0 to 2, got 'model.layers.7'."),
        ({"sample_layers": [5]}, UnknownHookError, "Blocks are 0 to 2, got 5."),
        ({"sample_layers": ["input_ids"]}, HookError, "cannot be captured as rows of tokens: its value is one number"),
        ({"storage_path": "{file}"}, HookError, "cannot write"),
        ({"storage_backend": "s3", "s3_bucket": "shards"}, HookError, "s3://shards/.* credentials"),
        ({"unknown": 1}, HookError, "MechIntConfig has no field 'unknown'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_told_before_training(
    change: dict, error: type, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "file").write_text("")
    change = {name: str(tmp_path / "file") if value == "{file}" else value for name, value in change.items()}
    model = make_model("llama")
    steps: list[int] = []

    def batches(*args: Any, **options: Any) -> Any:
        steps.append(1)
        return iterate_batches(*args, **options)

    with pytest.raises(error, match=message):
        MechIntCallback(settings(tmp_path) | change).train(
            model, optim.Adam(1e-3), sequences(TRAINING, 8), iterate_batches=batches
        )
    assert not steps


def test_a_model_must_be_known_and_stay_the_same(tmp_path: Path) -> None:
    with pytest.raises(HookError, match="The model to capture is not known"):
        MechIntCallback(settings(tmp_path)).wrap_batches(iterate_batches)
    callback = MechIntCallback(settings(tmp_path), make_model("llama"))
    with pytest.raises(HookError, match="made for another model"):
        callback.train(make_model("llama"), None, [])
    with pytest.raises(HookError, match="first_step is a whole number from 0 up, got -1"):
        MechIntCallback(settings(tmp_path), first_step=-1)


def test_batches_of_another_kind(tmp_path: Path) -> None:
    def pairs(dataset: Any, batch_size: int, max_seq_length: int, loop: bool = False, comm_group: Any = None) -> Any:
        while True:
            yield mx.array([[1, 2, 3, 4]]), mx.array([[0.0, 1, 1, 1]])

    def loss(model: nn.Module, ids: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        return nn.losses.cross_entropy(model(ids), ids).mean(), mx.array(4)

    def go(callback: MechIntCallback) -> None:
        args = TrainingArgs(iters=2, batch_size=1, adapter_file=str(tmp_path / "adapters.safetensors"))
        callback.train(model, optim.Adam(1e-3), [], args=args, loss=loss, iterate_batches=pairs)

    model = make_model("llama")
    with pytest.raises(HookError, match=r"A batch is token ids .* got tokens \(1, 4\) and float32 of shape \(1, 4\)."):
        go(MechIntCallback(settings(tmp_path)))
    go(MechIntCallback(settings(tmp_path / "own"), read_batch=lambda batch: Batch(batch[0])))
    assert folder_of(tmp_path / "own" / "shards").shards[0][0].tokens.tolist() == [1, 2, 3, 4]


def test_an_undisturbed_model() -> None:
    model = prepared("lora")
    adapt(model, "lora")
    model.train()
    model.model.layers[2].eval()
    flags = [module.training for module in model.modules()]
    mx.random.seed(1)
    drawn = mx.random.normal((3,)).tolist()
    mx.random.seed(1)
    held = mx.random.state[0]

    def disturb() -> None:
        with undisturbed(model):
            assert not any(module.training for module in model.modules())
            mx.eval(mx.random.normal((2,)))
            raise Interrupted

    with pytest.raises(Interrupted):
        disturb()
    assert [module.training for module in model.modules()] == flags
    assert mx.random.normal((3,)).tolist() == drawn
    mx.random.seed(1)
    assert held.tolist() == mx.random.state[0].tolist()


def test_lora_run_from_python(tmp_path: Path, lora_folder: Path) -> None:
    from mlx_lm import lora

    plain_train = lora.train
    weights = []
    for captured in (False, True):
        args = lora_arguments(lora_folder, tmp_path / f"adapters_{captured}")
        mx.random.seed(0)
        if captured:
            with MechIntCallback(settings(tmp_path)).inside_lora() as callback:
                lora.run(args)
            assert len(callback.saved_shards) == 2
        else:
            lora.run(args)
        weights.append(mx.load(str(tmp_path / f"adapters_{captured}" / "adapters.safetensors")))
    assert lora.train is plain_train
    assert same(*weights)
    found = folder_of(tmp_path / "shards")
    assert found.steps == [0, 4]
    assert found.reader.layers.keys() == {f"blocks.{i}.hook_resid_post" for i in range(4)}


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data, as ``mlx_lm.lora`` reads them."""
    return write_lora_folder(tmp_path_factory.mktemp("lora"))


def lora_arguments(folder: Path, adapters: Path) -> Any:
    from types import SimpleNamespace

    from mlx_lm.lora import CONFIG_DEFAULTS

    changes = {"model": str(folder / "model"), "data": str(folder / "data"), "train": True, "iters": 5, "batch_size": 2}
    more = {
        "adapter_path": str(adapters),
        "num_layers": 2,
        "val_batches": 1,
        "max_seq_length": 64,
        "learning_rate": 1e-3,
    }
    return SimpleNamespace(**CONFIG_DEFAULTS | changes | more)
