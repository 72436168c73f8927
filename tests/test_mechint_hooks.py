"""Capture in training loops of one's own, and by a sampler."""

import copy
import gc
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import evaluate, grad_checkpoint
from tiny_models import make_model
from training_runs import (
    VALIDATION,
    adapt,
    classes_restored,
    folder_of,
    own_loop,
    prepared,
    same,
    sequences,
    streams,
)

from mlx_hooks import ActivationSampler, CaptureWarning, HookedModel, HookError, MechIntConfig, MechIntHooks
from mlx_hooks.training.batches import Batch

EVERY = 3
STREAM = "blocks.1.hook_resid_post"
LAYERS = ["model.layers.1", "blocks.0.hook_attn_out", "blocks.2.attn.hook_pattern"]


def config(folder: Path, **more: Any) -> MechIntConfig:
    return MechIntConfig(**{"sample_layers": LAYERS, "save_hidden_every_n_steps": EVERY, "storage_path": folder} | more)


def weights(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def tokens(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).integers(1, 60, shape))


def expected_stream(values: dict[str, mx.array], batch: mx.array, layer: int = 1) -> mx.array:
    model = make_model("llama")
    model.load_weights(list(values.items()))
    stream = streams(model, batch)[layer]
    return stream.reshape(-1, stream.shape[-1])


# Loops


# On Linux MLX compiles a compiled step with g++, the longer the more weights are trained.
@pytest.mark.parametrize(("kind", "compiled"), [("full", False), ("lora", False), ("lora", True)])
def test_a_loop_that_gives_its_batches(kind: str, compiled: bool, tmp_path: Path) -> None:
    plain, model = prepared(kind), prepared(kind)
    adapt(plain, kind)
    adapt(model, kind)
    losses = own_loop(plain, 8, compiled=compiled)
    met: dict[int, tuple[dict[str, mx.array], mx.array]] = {}
    with MechIntHooks(config(tmp_path)) as hooks:
        hooks.register_hooks(model)

        def each(step: int, batch: mx.array) -> None:
            met[step] = ({name: mx.array(value) for name, value in weights(model).items()}, batch)
            mx.eval(met[step])
            path = hooks.on_training_step(batch=batch, batch_idx=step, global_step=step)
            assert (path is not None) == (step % EVERY == 0)

        assert own_loop(model, 8, compiled=compiled, each=each) == losses
        assert len(hooks.saved_shards) == 3
    assert same(weights(model), weights(plain))
    assert type(model) is type(plain)
    found = folder_of(tmp_path)
    assert found.steps == [0, 3, 6]
    reference = prepared(kind)
    adapt(reference, kind)
    for step, (shard,) in found.shards.items():
        values, batch = met[step]
        reference.load_weights(list(values.items()))
        stream = streams(reference, batch)[1]
        assert same({STREAM: shard.activations[STREAM]}, {STREAM: stream.reshape(-1, stream.shape[-1])})
        assert shard.tokens.tolist() == batch.reshape(-1).tolist()
        assert shard.metadata == {"epoch": 0, "batch_idx": step}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_eager_loop_s_own_forward_passes(checkpointed: bool, tmp_path: Path) -> None:
    """The guide's manual loop, whose forward pass is differentiated."""
    plain, model = make_model("llama"), make_model("llama")
    met: dict[int, tuple[dict[str, mx.array], mx.array]] = {}
    with classes_restored(model):
        if checkpointed:
            grad_checkpoint(model.layers[0])
        losses = own_loop(plain, 7, compiled=False)
        hooks = MechIntHooks(config(tmp_path))
        hooks.register_hooks(model)

        def each(step: int, batch: mx.array) -> None:
            met[step] = ({name: mx.array(value) for name, value in weights(model).items()}, batch)
            mx.eval(met[step])

        def after(step: int) -> None:
            if step % hooks.config.save_hidden_every_n_steps == 0 and hooks.sampler:
                hooks.saved_shards.append(hooks.sampler.save_activations(step))
                hooks.sampler.clear_cache()

        assert own_loop(model, 7, compiled=False, each=each, after=after) == losses
        hooks.on_train_end(trainer=None, pl_module=model)
        assert same(weights(model), weights(plain))
    found = folder_of(tmp_path)
    assert found.steps == [0, 3, 6]
    for step, (shard,) in found.shards.items():
        values, batch = met[step]
        # mlx-lm's loss hands the model all columns but the last.
        assert shard.tokens.tolist() == batch[:, :-1].reshape(-1).tolist()
        assert same({STREAM: shard.activations[STREAM]}, {STREAM: expected_stream(values, batch[:, :-1])})


def test_the_latest_forward_pass_alone_is_held(tmp_path: Path) -> None:
    model = make_model("llama")
    with MechIntHooks(config(tmp_path)) as hooks:
        hooks.register_hooks(model)
        assert hooks.sampler is not None
        for step in range(5):
            model(tokens(2, 5, seed=step))
            assert len(hooks.sampler.activations[STREAM]) == 1
        # A step that is due saves it, one that was saved is not saved twice.
        assert [hooks.on_training_step(global_step=step) is None for step in (6, 6)] == [False, True]
        # A step that is not due has no use for it.
        model(tokens(2, 5))
        assert hooks.on_training_step(global_step=7) is None
        assert hooks.sampler.activations[STREAM] == []
    assert folder_of(tmp_path).shards[6][0].tokens.tolist() == tokens(2, 5, seed=4).reshape(-1).tolist()


def test_a_compiled_loop_s_own_forward_passes_are_refused(tmp_path: Path) -> None:
    model = make_model("llama")
    with MechIntHooks(config(tmp_path)) as hooks:
        hooks.register_hooks(model)
        own_loop(model, 2, compiled=True)
        # A validation pass afterwards is none of the loop's.
        model(tokens(1, 4))
        assert hooks.sampler is not None
        with pytest.raises(HookError, match=r"mx.compile compiled, which shows no values: on_training_step\(batch="):
            hooks.sampler.save_activations(0)
        with pytest.raises(HookError, match="mx.compile"):
            hooks.on_training_step(global_step=0)
        # Batches can still be given.
        assert hooks.on_training_step(global_step=3, batch=tokens(1, 4)) is not None


def test_epochs_and_steps_are_counted(tmp_path: Path) -> None:
    trainer, module = SimpleNamespace(), SimpleNamespace()
    hooks = MechIntHooks({"storage_path": str(tmp_path), "save_hidden_every_n_steps": 2})
    hooks.register_hooks(make_model("llama"), trainer)
    for _ in range(2):
        for number in range(3):
            hooks.on_training_step(trainer, module, None, tokens(1, 4), number)
        hooks.on_epoch_end(trainer, module)
    hooks.on_train_end(trainer, module)
    found = folder_of(tmp_path)
    assert {step: shards[0].metadata for step, shards in found.shards.items()} == {
        0: {"epoch": 0, "batch_idx": 0},
        2: {"epoch": 0, "batch_idx": 2},
        4: {"epoch": 1, "batch_idx": 1},
    }


def test_steps_that_begin_again_with_each_epoch_are_told(tmp_path: Path) -> None:
    with MechIntHooks(config(tmp_path)) as hooks:
        hooks.register_hooks(make_model("llama"))
        for step in (0, 3):
            hooks.on_training_step(batch=tokens(1, 4), global_step=step)
        with pytest.warns(CaptureWarning, match="Step 0 is written to .* after step 3: .* count steps on"):
            hooks.on_training_step(batch=tokens(1, 4), global_step=0)
        # Once: warnings are errors here.
        for step in (3, 0):
            assert hooks.on_training_step(batch=tokens(1, 4), global_step=step) is not None


def test_batches_with_lengths(tmp_path: Path) -> None:
    with MechIntHooks(config(tmp_path)) as hooks:
        hooks.register_hooks(make_model("llama"))
        hooks.on_training_step(batch=(tokens(2, 6), mx.array([[0, 3], [2, 6]])), global_step=0)
        hooks.on_training_step(batch=(tokens(2, 6), np.array([4, 2])), global_step=3)
    found = folder_of(tmp_path)
    assert found.shards[0][0].position.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert found.shards[0][0].metadata["prompt_lengths"] == [0, 2]
    assert found.shards[3][0].position.tolist() == [0, 1, 2, 3, 0, 1]


def test_hooks_that_fail_later_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MechIntHooks(config(tmp_path)) as hooks:
        hooks.register_hooks(make_model("llama"))
        with pytest.raises(HookError, match="A batch is token ids"):
            hooks.on_training_step(batch="text", global_step=0)
        with pytest.warns(CaptureWarning, match="A training step was not captured: A batch is token ids"):
            assert hooks.on_training_step(batch="text", global_step=3) is None
        assert hooks.on_training_step(batch=tokens(1, 4), global_step=6) is not None


def test_hooks_are_registered_once_and_first(tmp_path: Path) -> None:
    hooks = MechIntHooks(config(tmp_path))
    assert hooks.sampler is None
    with pytest.raises(HookError, match=r"register_hooks\(model\) comes first"):
        hooks.on_training_step(batch=tokens(1, 4))
    hooks.register_hooks(make_model("llama"))
    with pytest.raises(HookError, match="registered already"):
        hooks.register_hooks(make_model("llama"))
    hooks.on_train_end()
    hooks.on_train_end()
    with pytest.raises(HookError, match="comes first"):
        hooks.on_training_step(batch=tokens(1, 4))


@pytest.mark.parametrize("how", ["by hand", "compiled", "mlx-lm's evaluate"])
def test_validation_is_not_captured(how: str, tmp_path: Path) -> None:
    model = make_model("llama")
    run = mx.compile(model) if how == "compiled" else model

    def validate(step: int) -> None:
        model.eval()
        if how == "mlx-lm's evaluate":
            evaluate(model, sequences(VALIDATION, 4), 2, 1, 33)
        else:
            mx.eval(run(mx.full((1, 5), VALIDATION.start)))
        model.train()
        hooks.on_training_step(global_step=step)

    with MechIntHooks(config(tmp_path, save_hidden_every_n_steps=1)) as hooks:
        hooks.register_hooks(model)
        own_loop(model, 3, compiled=False, after=validate)
    found = folder_of(tmp_path)
    assert found.steps == [0, 1, 2]
    assert all(shard.tokens.max() < VALIDATION.start for (shard,) in found.shards.values())


def test_a_loop_that_trains_in_evaluation_mode(tmp_path: Path) -> None:
    """As mlx-lm loads models; nothing tells what is validation there."""
    model = make_model("llama")
    model.eval()
    with MechIntHooks(config(tmp_path)) as hooks:
        hooks.register_hooks(model)
        model(tokens(1, 4))
        assert hooks.on_training_step(global_step=0) is not None


def test_what_cannot_be_kept_does_not_end_the_training(tmp_path: Path) -> None:
    model = make_model("llama")
    logits = make_model("llama")(tokens(2, 5))
    with MechIntHooks(config(tmp_path)) as hooks:
        hooks.register_hooks(model)
        assert hooks.sampler is not None
        hooks.sampler.max_cache_bytes = 100
        assert same({"": model(tokens(2, 5))}, {"": logits})
        # A batch that is given needs nothing kept.
        assert hooks.on_training_step(batch=tokens(1, 4), global_step=0) is not None
        model(tokens(2, 5))
        why = r"kB of 1 forward pass are more than max_cache_bytes, 100 B: raise it, or capture fewer layers."
        with pytest.warns(CaptureWarning, match=rf"The latest forward pass was not captured: .*{why}"):
            hooks.on_training_step(global_step=3)
        hooks.sampler.max_cache_bytes = 10**6
        embeddings = model.model.embed_tokens(tokens(2, 5))
        assert same({"": model(None, input_embeddings=embeddings)}, {"": logits})
        with pytest.raises(HookError, match="The latest forward pass was not captured: A batch is token ids"):
            hooks.sampler.save_activations(3)
        model(tokens(2, 5))
        assert hooks.sampler.save_activations(6) is not None


def test_the_model_s_own_errors_are_its_own(tmp_path: Path) -> None:
    model, calls = make_model("llama"), []

    def fail(value: mx.array, point: Any) -> None:
        calls.append(point.name)
        raise HookError("made to fail")

    with MechIntHooks(config(tmp_path)) as hooks:
        hooks.register_hooks(model)
        with HookedModel(model).hooks([("hook_embed", fail)]), pytest.raises(HookError, match="made to fail"):
            model(tokens(1, 4))
    assert len(calls) == 1


class Normalising(ActivationSampler):
    """As in the guide."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.n_saved = 0

    def save_activations(self, global_step: int, metadata: Any = None) -> Path | None:  # type: ignore[override]
        for layer_name, acts in self.activations.items():
            self.activations[layer_name] = [(a - a.mean()) / (mx.sqrt(a.var()) + 1e-8) for a in acts]
        self.n_saved += 1
        return super().save_activations(global_step, metadata)


@pytest.mark.parametrize("given", [True, False], ids=["batches", "own passes"])
def test_a_sampler_of_one_s_own_in_hooks(given: bool, tmp_path: Path) -> None:
    model = make_model("llama")
    with MechIntHooks(config(tmp_path, sample_layers=[STREAM]), sampler=Normalising) as hooks:
        hooks.register_hooks(model)
        if not given:
            model(tokens(2, 5))
        batch = (mx.pad(tokens(2, 5), [(0, 0), (0, 1)]), mx.array([5, 3])) if given else None
        assert hooks.on_training_step(batch=batch, global_step=0) is not None
        assert isinstance(hooks.sampler, Normalising)
        assert hooks.sampler.n_saved == 1
        assert hooks.sampler.get_statistics()["current_cache_samples"] == (0 if given else 10)
    shard = folder_of(tmp_path).shards[0][0]
    stream = np.array(streams(make_model("llama"), tokens(2, 5))[1]).reshape(-1, 32)
    expected = ((stream - stream.mean()) / stream.std())[[*range(8)] if given else [*range(10)]]
    np.testing.assert_allclose(np.array(shard.activations[STREAM]), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(HookError, match="sampler is ActivationSampler or a subclass of it, got 'mine'"):
        MechIntHooks(sampler="mine")  # type: ignore[arg-type]


def test_a_step_is_written_once(tmp_path: Path) -> None:
    """Whoever gives the batch and saves by hand besides, before or after."""
    model = make_model("llama")
    with MechIntHooks(config(tmp_path, save_hidden_every_n_steps=1)) as hooks:
        hooks.register_hooks(model)
        assert hooks.sampler is not None
        given = hooks.on_training_step(batch=tokens(1, 4), global_step=0)
        model(tokens(1, 4))
        assert hooks.sampler.save_activations(0) == given
        model(tokens(1, 3))
        saved = hooks.sampler.save_activations(1)
        assert hooks.on_training_step(batch=tokens(1, 3), global_step=1) is None
        assert hooks.saved_shards == [given, saved]
    assert [(entry["step"], entry["rows"]) for entry in folder_of(tmp_path).reader.entries] == [(0, 4), (1, 3)]


def test_hooks_that_are_registered_again_capture_the_first_step(tmp_path: Path) -> None:
    hooks = MechIntHooks(config(tmp_path / "one"))
    for again in (False, True):
        hooks.register_hooks(make_model("llama"))
        with pytest.warns(CaptureWarning, match="earlier sessions") if again else nullcontext():
            assert hooks.on_training_step(batch=tokens(1, 4), global_step=0) is not None
        hooks.on_train_end()


def test_a_forward_pass_is_saved_as_one_step(tmp_path: Path) -> None:
    model = make_model("llama")
    with MechIntHooks(config(tmp_path)) as hooks:
        hooks.register_hooks(model)
        assert hooks.sampler is not None
        model(tokens(1, 4))
        path = hooks.sampler.save_activations(0)
        assert hooks.sampler.save_activations(0) == path
        with pytest.raises(HookError, match="Nothing was captured since the last save: run the model first"):
            hooks.sampler.save_activations(3)
    assert folder_of(tmp_path).steps == [0]


def test_a_loop_that_forgets_the_training_mode_is_told(tmp_path: Path) -> None:
    model = make_model("llama")
    model.train()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", CaptureWarning)
        with MechIntHooks(config(tmp_path)) as hooks:
            hooks.register_hooks(model)
            for step in range(10):
                model(tokens(1, 4, seed=step))
                hooks.on_training_step(global_step=step)
                if step == 4:
                    model.eval()
                    model(tokens(1, 2))
    assert folder_of(tmp_path).steps == [0, 3]
    assert ["call model.train() after it" in str(one.message) for one in told] == [True, True]
    assert "2 of 4 steps were not captured" in str(told[1].message)


@pytest.mark.parametrize("step", [1.0, True, -1, "3", None])
def test_a_step_is_a_whole_number(step: Any, tmp_path: Path) -> None:
    model = make_model("llama")
    with MechIntHooks(config(tmp_path, save_hidden_every_n_steps=1)) as hooks:
        hooks.register_hooks(model)
        assert hooks.sampler is not None
        model(tokens(1, 4))
        hooks.sampler.save_activations(1)
        with pytest.raises(HookError, match="step is a whole number from 0 up"):
            hooks.sampler.save_activations(step)
        if step is not None:  # which means that steps are counted
            with pytest.raises(HookError, match="step is a whole number from 0 up"):
                hooks.on_training_step(batch=tokens(1, 4), global_step=step)
        assert hooks.on_training_step(batch=tokens(1, 4), global_step=np.int64(2)) is not None
    assert folder_of(tmp_path).steps == [1, 2]


def test_a_sampler_that_is_registered_again_saves_the_step_given_last(tmp_path: Path) -> None:
    model = make_model("llama")
    sampler = ActivationSampler([STREAM], tmp_path)
    sampler.register_hooks(model)
    first = sampler.save_batch(Batch(tokens(1, 4)), 0)
    sampler.remove_hooks()
    sampler.register_hooks(model)
    model(tokens(1, 3))
    with pytest.warns(CaptureWarning, match="earlier sessions"):
        assert sampler.save_activations(0) != first
    sampler.remove_hooks()


def test_who_is_forgotten_keeps_nothing(tmp_path: Path) -> None:
    model, plain = make_model("llama"), type(make_model("llama"))
    forgotten, kept = (ActivationSampler([STREAM], tmp_path / name) for name in ("one", "two"))
    forgotten.register_hooks(model)
    kept.register_hooks(model)
    del forgotten
    gc.collect()
    model(tokens(1, 4))
    assert len(kept.activations[STREAM]) == 1
    del kept
    gc.collect()
    assert same({"": model(tokens(1, 4))}, {"": make_model("llama")(tokens(1, 4))})
    assert type(model) is plain
    assert "_neuroscope_followed" not in model.__dict__


# The sampler


def sampler_of(folder: Path, **more: Any) -> ActivationSampler:
    return ActivationSampler(**{"layers": LAYERS, "save_dir": folder, "device": "cpu"} | more)


def test_a_sampler(tmp_path: Path) -> None:
    model = make_model("llama")
    sampler = sampler_of(tmp_path, max_samples_per_shard=20)
    assert sampler.get_statistics() == {
        "total_samples_saved": 0, "current_cache_samples": 0, "total_shards": 0, "tracked_layers": []
    }  # fmt: skip
    sampler.register_hooks(model)
    batches = [tokens(2, 5), tokens(3, 7, seed=1)]
    plain = [streams(make_model("llama"), batch)[1].reshape(-1, 32) for batch in batches]
    for batch in batches:
        model(batch)
    assert [array.shape for array in sampler.activations[STREAM]] == [(2, 5, 32), (3, 7, 32)]
    path = sampler.save_activations(100, {"note": "two passes"})
    assert path == tmp_path / "activations_shard_000001_step_100.safetensors"
    assert sampler.get_statistics() == {
        "total_samples_saved": 31,
        "current_cache_samples": 31,
        "total_shards": 2,
        "tracked_layers": ["blocks.0.hook_attn_out", STREAM, "blocks.2.attn.hook_pattern"],
    }
    # Again, without clearing: nothing is written twice.
    assert sampler.save_activations(100) == path
    assert sampler.get_statistics()["total_samples_saved"] == 31
    # What comes later is written alone.
    model(batches[0])
    assert sampler.get_statistics()["current_cache_samples"] == 10
    sampler.save_activations(200)
    sampler.clear_cache()
    assert sampler.get_statistics()["current_cache_samples"] == 0
    with pytest.raises(HookError, match="Nothing was captured since the last save"):
        sampler.save_activations(300)
    sampler.remove_hooks()
    assert type(model) is type(make_model("llama"))
    found = folder_of(tmp_path)
    rows = found.reader.rows("model.layers.1", [100]).take(np.arange(31))
    assert np.array_equal(rows.values, np.array(mx.concatenate(plain)))
    assert rows.sequence.tolist() == [0] * 5 + [1] * 5 + [2] * 7 + [3] * 7 + [4] * 7
    assert rows.tokens.tolist() == batches[0].reshape(-1).tolist() + batches[1].reshape(-1).tolist()
    assert found.shards[100][0].metadata == {"note": "two passes"}
    assert found.reader.rows("blocks.2.attn.hook_pattern", [100]).shape == (4, 7)


def test_a_sampler_s_lengths(tmp_path: Path) -> None:
    model = make_model("llama")
    with sampler_of(tmp_path) as sampler:
        sampler.register_hooks(model)
        model(tokens(2, 5))
        sampler.save_activations(0, lengths=[5, 2])
        model(tokens(2, 5))
        with pytest.raises(HookError, match="from 0 to 5 for each of the 2 sequences, got 6"):
            sampler.save_activations(1, lengths=[6, 2])
        model(tokens(1, 4))
        for wrong in ([[1, 2]], [[1, 2], [1, 2]], [[1, 2], ["a"]]):
            with pytest.raises(HookError, match="lengths has"):
                sampler.save_activations(1, lengths=wrong)
        sampler.save_activations(1, lengths=[mx.array([1, 2]), [3]])
        model(tokens(1, 4))
        assert sampler.save_activations(2, lengths=mx.array([0])) is None
    found = folder_of(tmp_path)
    assert found.steps == [0, 1]
    assert found.shards[0][0].position.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert found.shards[1][0].position.tolist() == [0, 0, 1, 0, 1, 2]


def test_sequences_that_are_all_padding_count(tmp_path: Path) -> None:
    model = make_model("llama")
    with sampler_of(tmp_path) as sampler:
        sampler.register_hooks(model)
        for shape in ((3, 4), (2, 4), (1, 4)):
            model(tokens(*shape))
        sampler.save_activations(0, lengths=[[2, 1, 0], [0, 0], [2]])
    assert folder_of(tmp_path).shards[0][0].sequence.tolist() == [0, 0, 1, 5, 5]


def test_metadata_is_plain_json(tmp_path: Path) -> None:
    model = make_model("llama")
    notes = {"loss": np.float32(0.5), "norm": mx.array(2), "seen": np.arange(2), "from": Path("texts"), 1: float("nan")}
    with sampler_of(tmp_path) as sampler:
        sampler.register_hooks(model)
        model(tokens(1, 4))
        with pytest.raises(HookError, match=r"^metadata\['a'\]\[0\] is plain JSON: .* got object.$") as raised:
            sampler.save_activations(0, {"a": [object()]})
        assert raised.value.field == "metadata"
        with pytest.raises(HookError, match="metadata is a mapping, got list."):
            sampler.save_activations(0, [1])  # type: ignore[arg-type]
        sampler.save_activations(0, notes)
    metadata = folder_of(tmp_path).shards[0][0].metadata
    assert metadata == {"loss": 0.5, "norm": 2, "seen": [0, 1], "from": "texts", "1": None}


def test_as_many_tokens_as_heads(tmp_path: Path) -> None:
    model, name = make_model("llama"), "blocks.2.attn.hook_pattern"
    with sampler_of(tmp_path) as sampler:
        sampler.register_hooks(model)
        model(tokens(2, 4))
        sampler.save_activations(0)
    _, cache = HookedModel(model).run_with_cache(tokens(2, 4), name)
    shard = folder_of(tmp_path).shards[0][0]
    expected = np.array(cache[name])[shard.sequence, :, shard.position]
    assert np.array_equal(np.array(shard.activations[name]), expected)


def test_a_subclass_that_changes_what_is_saved(tmp_path: Path) -> None:
    model = make_model("llama")
    with Normalising([STREAM], tmp_path) as sampler:
        sampler.register_hooks(model)
        model(tokens(2, 5))
        model(tokens(1, 9))
        sampler.save_activations(1)
    rows = folder_of(tmp_path).reader.rows(STREAM).take(np.arange(19)).values
    for part, batch in ((rows[:10], tokens(2, 5)), (rows[10:], tokens(1, 9))):
        stream = np.array(streams(make_model("llama"), batch)[1]).reshape(-1, 32)
        np.testing.assert_allclose(part, (stream - stream.mean()) / stream.std(), rtol=1e-4, atol=1e-5)


def test_activations_that_were_lost_are_an_error(tmp_path: Path) -> None:
    model = make_model("llama")
    with ActivationSampler([STREAM], tmp_path) as sampler:
        sampler.register_hooks(model)
        model(tokens(2, 5))
        sampler.activations[STREAM] = []
        with pytest.raises(HookError, match="one array for each of the 1 forward passes, got 0"):
            sampler.save_activations(1)
        sampler.activations[STREAM] = [mx.zeros((4, 4))]
        with pytest.raises(HookError, match="has no entry for each of 2 x 5 tokens"):
            sampler.save_activations(1)


def test_what_is_held_has_a_bound(tmp_path: Path) -> None:
    model = make_model("llama")
    with ActivationSampler([STREAM], tmp_path) as sampler:
        sampler.register_hooks(model)
        sampler.max_cache_bytes = 2 * 10 * 32 * 4
        model(tokens(2, 5))
        model(tokens(2, 5))
        with pytest.raises(HookError, match="of 3 forward passes are more than max_cache_bytes, 2.6 kB: call save_act"):
            model(tokens(2, 5))
        sampler.save_activations(1)
        model(tokens(2, 5))
    assert len(folder_of(tmp_path).shards[1][0].tokens) == 20


def test_runs_of_a_hooked_model_are_not_its_training_s(tmp_path: Path) -> None:
    hooked = HookedModel(make_model("llama"))
    with ActivationSampler([STREAM], tmp_path) as sampler:
        sampler.register_hooks(hooked)
        hooked.run_with_cache([1, 2, 3])
        assert sampler.activations[STREAM] == []
        plain = hooked.model(tokens(1, 4))
        assert len(sampler.activations[STREAM]) == 1
        HookedModel(hooked.model)
        assert len(sampler.activations[STREAM]) == 1
    assert same({"logits": plain}, {"logits": make_model("llama")(tokens(1, 4))})


def test_a_copy_of_the_model_is_its_own(tmp_path: Path) -> None:
    model = make_model("llama")
    with ActivationSampler([STREAM], tmp_path) as sampler:
        sampler.register_hooks(model)
        twin = copy.deepcopy(model)
        logits = twin(tokens(1, 4))
        assert sampler.activations[STREAM] == []
        assert same({"": model(tokens(1, 4))}, {"": logits})
        assert len(sampler.activations[STREAM]) == 1


def test_two_samplers_and_no_order_of_their_ends(tmp_path: Path) -> None:
    model = make_model("llama")
    plain = type(model)
    first, second = (ActivationSampler([layer], tmp_path / str(layer)) for layer in (0, 1))
    first.register_hooks(model)
    second.register_hooks(model)
    model(tokens(1, 4))
    first.remove_hooks()
    model(tokens(1, 4))
    assert len(second.activations[STREAM]) == 2
    with HookedModel(model).hooks([(STREAM, lambda value, point: None)]):
        second.remove_hooks()
    assert type(model) is plain
    assert all("_neuroscope" not in name for module in model.modules() for name in module.__dict__)
    with pytest.raises(HookError, match="No hooks are registered"):
        second.save_activations(1)


def test_continued_sequences_know_their_positions(tmp_path: Path) -> None:
    from mlx_lm.models.cache import make_prompt_cache

    model = make_model("llama")
    with ActivationSampler([STREAM], tmp_path) as sampler:
        sampler.register_hooks(model)
        kv_cache = make_prompt_cache(model)
        model(tokens(1, 4), cache=kv_cache)
        model(tokens(1, 2), cache=kv_cache)
        sampler.save_activations(0)
    assert folder_of(tmp_path).shards[0][0].position.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_a_model_reads_must_be_token_ids(tmp_path: Path) -> None:
    with ActivationSampler([STREAM], tmp_path) as sampler:
        model = make_model("llama")
        sampler.register_hooks(model)
        with pytest.raises(HookError, match="A batch is token ids"):
            model(mx.zeros((1, 3)))
        with pytest.raises(HookError, match="registered already"):
            sampler.register_hooks(model)


def test_dropout_of_the_loop_s_own_pass_is_kept(tmp_path: Path) -> None:
    """What is saved of an eager loop is what the training computed, with what it dropped."""
    model = prepared("lora")
    adapt(model, "lora")
    adapter = model.model.layers[2].self_attn.q_proj
    adapter.lora_b = mx.random.normal(adapter.lora_b.shape)
    batch = tokens(2, 6)
    model.train()

    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(batch), batch).mean()

    with ActivationSampler(["blocks.2.hook_resid_post"], tmp_path) as sampler:
        sampler.register_hooks(model)
        saved = []
        for step in range(2):
            mx.random.seed(0)
            _, gradients = nn.value_and_grad(model, loss)(model)
            mx.eval(gradients)
            sampler.save_activations(step)
            saved.append(folder_of(tmp_path).shards[step][0].activations["blocks.2.hook_resid_post"])
    assert same({"": saved[0]}, {"": saved[1]})
    assert not same({"": saved[0]}, {"": streams(model, batch)[2].reshape(-1, 32)})
