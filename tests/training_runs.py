"""Short trainings of tiny models, by mlx-lm and by loops of one's own, for tests of what is captured of them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.base import create_attention_mask
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, iterate_batches
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_models import make_model

from mlx_hooks.loading import fetch
from mlx_hooks.storage.shards import ShardReader

TRAINING, VALIDATION = range(1, 40), range(40, 60)
"""Token ids of the two sets: a captured token tells from which it came."""


def sequences(ids: range, count: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Sequences of several lengths, each with the number of its prompt's tokens, as mlx-lm's data sets have them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 40, count)
    return [(rng.integers(ids.start, ids.stop, n).tolist(), int(n) % 3) for n in lengths]


def prepared(kind: str) -> nn.Module:
    """A tiny model as a kind of training has it: "full", "lora", "dora" or "qlora" (in bfloat16, four bits)."""
    model = make_model("llama", dtype=mx.bfloat16 if kind == "qlora" else mx.float32)
    if kind == "qlora":
        nn.quantize(
            model, group_size=32, bits=4, class_predicate=lambda path, _: path.endswith("_proj") and "self" in path
        )
    return model


def adapt(model: nn.Module, kind: str) -> None:
    """Put adapters in, with dropout, as ``mlx_lm.lora`` does; nothing for full training."""
    if kind == "full":
        return
    model.freeze()
    mx.random.seed(7)
    linear_to_lora_layers(model, 2, {"rank": 4, "dropout": 0.3, "scale": 5.0}, use_dora=kind == "dora")


@dataclass
class Trained:
    """A finished training: the model, the losses in order, and the weights before each batch with the batch."""

    model: nn.Module
    losses: list[tuple[int, float]] = field(default_factory=list)
    seen: list[tuple[dict[str, mx.array], mx.array, mx.array]] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.parameters()))


class Losses(TrainingCallback):
    """Notes every loss."""

    def __init__(self) -> None:
        self.found: list[tuple[int, float]] = []

    def on_train_loss_report(self, info: dict) -> None:
        self.found.append((info["iteration"], info["train_loss"]))

    def on_val_loss_report(self, info: dict) -> None:
        self.found.append((info["iteration"], info["val_loss"]))


def spying(trained: Trained) -> Callable[..., Iterator[Any]]:
    """mlx-lm's batches, noted with the weights that they meet."""

    def batches(*args: Any, loop: bool = False, **options: Any) -> Iterator[Any]:
        for batch, lengths in iterate_batches(*args, loop=loop, **options):
            if loop:
                weights = tree_map(mx.array, dict(tree_flatten(trained.model.parameters())))
                mx.eval(weights)
                trained.seen.append((weights, batch, lengths))
            yield batch, lengths

    return batches


def run(
    train: Callable[..., None],
    folder: Path,
    kind: str = "full",
    *,
    iters: int = 9,
    adapted: bool = True,
    **options: Any,
) -> Trained:
    """Train a tiny model with ``train``, which takes the arguments of mlx-lm's."""
    model = prepared(kind)
    if adapted:
        adapt(model, kind)
    trained = Trained(model)
    losses = Losses()
    settings = {"steps_per_report": 1, "steps_per_eval": 4, "val_batches": 1, "batch_size": 4, "max_seq_length": 33}
    args = TrainingArgs(iters=iters, adapter_file=str(folder / "adapters.safetensors"), **settings | options)
    mx.random.seed(3)
    np.random.seed(5)
    train(
        model,
        optim.Adam(1e-3),
        sequences(TRAINING, 24),
        sequences(VALIDATION, 8),
        args=args,
        iterate_batches=spying(trained),
        training_callback=losses,
    )
    trained.losses = losses.found
    return trained


def same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    """Whether arrays are equal bit for bit."""
    return set(one) == set(other) and all(_bits(one[name]) == _bits(other[name]) for name in one)


def _bits(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()


def streams(model: nn.Module, inputs: mx.array) -> list[mx.array]:
    """The stream that leaves each block of a llama model, [batch, pos, d_model], without any hook."""
    model.eval()
    h = model.model.embed_tokens(inputs)
    mask = create_attention_mask(h, None)
    found = []
    for block in model.model.layers:
        h = block(h, mask, None)
        found.append(h)
    return found


@contextmanager
def classes_restored(model: nn.Module) -> Iterator[None]:
    """mlx-lm's gradient checkpoints change the class of the blocks for good."""
    cls = type(model.layers[0])
    plain = cls.__call__
    try:
        yield
    finally:
        cls.__call__ = plain


def own_loop(
    model: nn.Module, steps: int, *, compiled: bool, each: Callable[[int, mx.array], None] = lambda step, batch: None,
    after: Callable[[int], None] = lambda step: None,
) -> list[float]:  # fmt: skip
    """A training loop by hand: ``each`` is told of a step and its batch before it, ``after`` after it."""
    optimizer = optim.Adam(1e-3)
    rng = np.random.default_rng(1)
    mx.random.seed(11)
    state = [model.state, optimizer.state, mx.random.state]

    def loss(model: nn.Module, batch: mx.array) -> mx.array:
        lengths = mx.full((len(batch), 2), batch.shape[1]) * mx.array([0, 1])
        return default_loss(model, batch, lengths)[0]

    def step(batch: mx.array) -> mx.array:
        value, gradients = nn.value_and_grad(model, loss)(model, batch)
        optimizer.update(model, gradients)
        return value

    run_step = mx.compile(step, inputs=state, outputs=state) if compiled else step
    model.train()
    losses = []
    for number in range(steps):
        batch = mx.array(rng.integers(TRAINING.start, TRAINING.stop, (3, 8 + number % 2)))
        each(number, batch)
        value = run_step(batch)
        mx.eval(value, state)
        losses.append(value.item())
        after(number)
    return losses


def folder_of(path: Path) -> SimpleNamespace:
    """What lies in a folder of shards: ``steps``, and ``entries`` by step."""
    reader = ShardReader(path)
    shards: dict[int, list[Any]] = {}
    for entry in reader.entries:
        shards.setdefault(entry["step"], []).append(reader.read_shard(entry))
    return SimpleNamespace(reader=reader, steps=reader.steps, shards=shards)


def write_lora_folder(folder: Path) -> Path:
    """A model and data sets as ``mlx_lm.lora`` reads them: ``model`` and ``data`` in a folder."""
    (folder / "model").symlink_to(fetch("neuroscope-tiny"))
    (folder / "data").mkdir()
    for name, count in (("train", 12), ("valid", 4)):
        texts = [f"The capital of France is Paris . When Mary and John went to the store , {i}" for i in range(count)]
        lines = "\n".join(json.dumps({"text": text}) for text in texts)
        (folder / "data" / f"{name}.jsonl").write_text(lines)
    return folder
