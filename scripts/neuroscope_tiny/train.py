"""Trains ``neuroscope-tiny`` and writes its folder: ``python -m neuroscope_tiny.train``.

Two phases: repeated random sequences first, because induction forms slowly and only from them; then mostly
sentences and chat, with repetition kept in. The same seed on the same machine and BLAS gives the same
weights; elsewhere rounding differs and so do the weights, though not what the model can do.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map
from mlx_lm import load
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import load_tokenizer
from tqdm import tqdm

from neuroscope_tiny import corpus, evaluation
from neuroscope_tiny.card import model_card
from neuroscope_tiny.tokenizer import vocabulary, write_tokenizer

OUTPUT = Path(__file__).parents[2] / "mlx_hooks" / "bundled" / "neuroscope-tiny"
IDS = vocabulary()

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "vocab_size": len(IDS),
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": IDS[corpus.BOS],
    "eos_token_id": IDS[corpus.EOS],
    "pad_token_id": IDS[corpus.PAD],
    "torch_dtype": "float32",
}


def make_batch(generator: random.Random, options: argparse.Namespace, progress: float) -> tuple[mx.array, mx.array]:
    """Draw one batch: token ids and loss weights, both ``[row, position]``."""
    first_phase = progress < options.repetition_phase
    repeating, periodic = (0.9, 0.0) if first_phase else (0.3, 0.05)
    ids, weights = [], []
    for index in range(options.rows):
        if index < periodic * options.rows:
            words, row_weights = corpus.periodic_row(generator, options.length)
        elif index < (periodic + repeating) * options.rows:
            words, row_weights = corpus.repetition_row(generator, options.length)
        else:
            words, row_weights = corpus.text_row(generator, options.length)
        ids.append([IDS[word] for word in words])
        weights.append(row_weights)
    return mx.array(ids), mx.array(weights)


def loss(model: nn.Module, ids: mx.array, weights: mx.array) -> mx.array:
    """Return the weighted mean cross-entropy of each next token."""
    losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
    counts = weights[:, 1:]
    return (losses * counts).sum() / mx.maximum(counts.sum(), 1.0)


def make_optimizer(options: argparse.Namespace) -> optim.MultiOptimizer:
    """Use Muon for the matrices inside the layers, AdamW for embeddings, unembedding and norms.

    Muon brings induction on in a fraction of the steps that AdamW alone takes.
    """

    def schedule(peak: float) -> Callable[[mx.array], mx.array]:
        warmup = max(1, min(100, options.steps // 10))
        decay = optim.cosine_decay(peak, options.steps - warmup, peak / 50)
        return optim.join_schedules([optim.linear_schedule(0.0, peak, warmup), decay], [warmup])

    adam = optim.AdamW(schedule(options.learning_rate), betas=[0.9, 0.98], weight_decay=options.weight_decay)
    muon = optim.Muon(schedule(options.muon_rate), weight_decay=0.0)
    return optim.MultiOptimizer(
        [muon, adam], [lambda name, weight: name.startswith("model.layers.") and weight.ndim == 2]
    )


def make_step(
    model: nn.Module, optimizer: optim.MultiOptimizer, weight_decay: float
) -> Callable[[mx.array, mx.array], mx.array]:
    """Compile one training step, which returns the loss before the update."""
    state = [model.state, optimizer.state]
    muon = optimizer.optimizers[0]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(ids: mx.array, weights: mx.array) -> mx.array:
        value, gradients = nn.value_and_grad(model, loss)(model, ids, weights)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        # Muon's own weight decay is normalised away with the gradient, so the decay is applied here.
        kept = 1 - muon.learning_rate * weight_decay
        for layer in model.layers:
            layer.update(tree_map(lambda weight: weight * kept if weight.ndim == 2 else weight, layer.parameters()))
        return value

    return step


def make_model() -> Model:
    """Make an untrained model whose residual stream starts as the tokens themselves.

    With MLX's default embedding scale the first MLP's random output drowns the embedding, and heads that must
    find an equal token form late and stay blurred; with a much larger one sums are learned by heart.
    """
    model = Model(ModelArgs.from_dict(CONFIG))
    model.model.embed_tokens.weight = 0.2 * mx.random.normal(model.model.embed_tokens.weight.shape)
    return model


def train(options: argparse.Namespace) -> tuple[Model, float]:
    """Train a model from random weights; return it with the seconds that it took."""
    mx.random.seed(options.seed)
    generator = random.Random(f"training {options.seed}")
    model = make_model()
    optimizer = make_optimizer(options)
    mx.eval(model.parameters())
    step = make_step(model, optimizer, options.weight_decay)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        write_tokenizer(Path(scratch), CONFIG["max_position_embeddings"])
        tokenizer = load_tokenizer(Path(scratch))
    bar = tqdm(range(options.steps), desc="training", unit="step", mininterval=options.interval)
    for index in bar:
        ids, weights = make_batch(generator, options, index / options.steps)
        value = step(ids, weights)
        mx.eval(model.state, optimizer.state, value)
        if index % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
        if options.measure_every and index % options.measure_every == options.measure_every - 1:
            tqdm.write(f"step {index + 1}: {_in_short(evaluation.measure(model, tokenizer, seed=1, quick=True))}")
    return model, time.monotonic() - start


def _in_short(figures: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value[2]:.2f}" if isinstance(value, tuple) else f"{name} {value:.1%}"
        for name, value in figures.items()
    )


def write_folder(model: Model, folder: Path, options: argparse.Namespace, seconds: float) -> None:
    """Write the finished model beside ``folder``, measure what was written, then put it in place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        staging.chmod(0o755)
        (staging / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        generation = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        (staging / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        write_tokenizer(staging, CONFIG["max_position_embeddings"])
        parameters = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(str(staging / "model.safetensors"), parameters, metadata={"format": "mlx"})
        written, tokenizer = load(str(staging))
        card = model_card(written, tokenizer, CONFIG, options, seconds)
        (staging / "README.md").write_text(card)
        if folder.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.replace(retired / folder.name)
            staging.replace(folder)
            shutil.rmtree(retired)
        else:
            staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    """The settings of training, and the bundled model's as their defaults."""
    parser = argparse.ArgumentParser(description="Train neuroscope-tiny.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--rows", type=int, default=32, help="sequences per step")
    parser.add_argument("--length", type=int, default=72, help="tokens per sequence")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--muon-rate", type=float, default=0.01, help="learning rate of the layers' matrices")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--repetition-phase", type=float, default=0.28, help="share of steps on repetition first")
    parser.add_argument("--measure-every", type=int, default=200, help="steps between measurements, 0 for none")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between progress updates")
    return parser


def main() -> None:
    """Train, measure and write the bundled model."""
    options = parser().parse_args()
    if options.steps < 2:
        parser().error(f"--steps is a whole number from 2 up, got {options.steps}")
    model, seconds = train(options)
    write_folder(model, options.output, options, seconds)
    print((options.output / "README.md").read_text())


if __name__ == "__main__":
    main()
