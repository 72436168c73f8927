"""Watch a circuit form: train a small model with capture, then analyse what was captured, up to a report with pictures.

    python examples/mechint_hooks_example.py --output mechint_example

Two layers learn to go on with words that came before, in an order that is new each time: an induction head forms. A
model of one layer, trained in the same way, cannot: give --layers 1. The guide is docs/training.md.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.trainer import TrainingArgs

from mlx_hooks import EvalMechIntRunner, HookError, MechIntCallback, MechIntConfig, ShardReader
from mlx_hooks.storage.rows import Rows

WORDS = """\
<start> apple bread cloud dance earth field glass heart igloo jelly kite lemon music night ocean paper queen river stone
table uncle voice water yacht zebra acorn beach chair drum eagle flute grape horse ivory jewel knife light maple nest"""
VOCABULARY = WORDS.split()
SHORTEST, LONGEST, MOST_BETWEEN = 8, 20, 4
LENGTH = 1 + 2 * LONGEST + 2 * MOST_BETWEEN
WIDTH, HEADS = 64, 2
BATCH = 32
PAIRS = 128

Sequence = tuple[list[int], int]
"""Token ids, and how many at the start are not learned, as mlx-lm's training takes them."""


class Words:
    """The tokenizer: a word is a token."""

    def encode(self, text: str) -> list[int]:
        return [VOCABULARY.index(word) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(VOCABULARY[i] for i in ids)


def make_sequence(generator: random.Random) -> Sequence:
    """Words, all different, of which a stretch then comes again; only the second time can be learned.

    Other words of varying number stand before and between, so that looking back by a fixed distance is of no use.
    """
    fresh = iter(generator.sample(range(1, len(VOCABULARY)), LONGEST + 2 * MOST_BETWEEN))

    def others() -> list[int]:
        return [next(fresh) for _ in range(generator.randint(0, MOST_BETWEEN))]

    stretch = [next(fresh) for _ in range(generator.randint(SHORTEST, LONGEST))]
    first = [0, *others(), *stretch, *others()]
    return first + stretch, len(first) + 1


def make_pairs(count: int, length: int = 38) -> list[dict[str, list[int] | int]]:
    """Prompts whose answer is what followed last time, each with one in which something else followed.

    They have as many tokens each, since those of one length run together.
    """
    generator = random.Random("held out")
    pairs: list[dict[str, list[int] | int]] = []
    while len(pairs) < count:
        tokens, _ = make_sequence(generator)
        if len(tokens) != length + 1:
            continue
        asked, answer = tokens[-2:]
        other = generator.choice([word for word in range(1, len(VOCABULARY)) if word not in tokens])
        corrupted = tokens[:-1]
        corrupted[tokens.index(asked) + 1] = other
        pairs.append({"clean": tokens[:-1], "corrupted": corrupted, "answer": answer, "wrong": other})
    return pairs


def make_model(layers: int = 2, seed: int = 0) -> Model:
    """A model with random weights. Its residual stream starts as the tokens themselves: heads that look for an equal
    token form sooner so."""
    mx.random.seed(seed)
    args = {
        "model_type": "llama", "hidden_size": WIDTH, "num_hidden_layers": layers, "intermediate_size": 2 * WIDTH,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "vocab_size": len(VOCABULARY), "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    model = Model(ModelArgs.from_dict(args))
    model.model.embed_tokens.weight = 0.2 * mx.random.normal(model.model.embed_tokens.weight.shape)
    return model


def make_optimizer(steps: int) -> optim.MultiOptimizer:
    """Muon for the matrices of the layers, which brings induction on early, AdamW for the rest."""

    def schedule(peak: float) -> Callable:
        warm_up = max(1, steps // 10)
        decay = optim.cosine_decay(peak, steps - warm_up, peak / 50)
        return optim.join_schedules([optim.linear_schedule(0.0, peak, warm_up), decay], [warm_up])

    muon = optim.Muon(schedule(0.02), weight_decay=0.0)
    adam = optim.AdamW(schedule(6e-3), betas=[0.9, 0.98], weight_decay=0.1)
    return optim.MultiOptimizer(
        [muon, adam], [lambda name, weight: name.startswith("model.layers.") and weight.ndim == 2]
    )


def train_captured(model: Model, config: MechIntConfig, adapter_file: Path, steps: int, seed: int = 0) -> None:
    """Train with mlx-lm's own loop, while activations are captured; weights are saved at every captured step."""
    generator = random.Random(seed)
    sequences = [make_sequence(generator) for _ in range(steps * BATCH)]
    # mlx-lm draws the order of batches from NumPy's global state.
    np.random.seed(seed)
    args = TrainingArgs(
        batch_size=BATCH,
        # Captured are the weights before a batch: one more shows those after the last but one.
        iters=steps + 1,
        steps_per_report=min(25, steps),
        steps_per_save=config.save_hidden_every_n_steps,
        max_seq_length=LENGTH,
        adapter_file=str(adapter_file),
    )
    MechIntCallback(config).train(model, make_optimizer(steps), sequences, args=args)


def came_before(rows: Rows) -> list[bool]:
    """Labels for the probe: whether the word at a row stood in its sequence before."""
    part = rows.take(np.arange(len(rows)))
    seen: set[tuple[int, int]] = set()
    labels = []
    for word in zip(part.sequences.tolist(), part.tokens.tolist(), strict=True):
        labels.append(word in seen)
        seen.add(word)
    return labels


def show(results: dict[str, Any], curves: Any) -> None:
    """A few of the numbers; what failed is in the report."""
    analyses = results["analyses"]
    for layer, found in made(analyses["sae"]):
        print(f"   {layer:24} L0 {found['l0']:5.1f} of {found['d_sae']}, variance unexplained {told(found['fvu'])}")
    for layer, found in made(analyses["probe"]):
        print(
            f"   {layer:24} did this word come before? {found['accuracy']['mean']:.1%} of held-out tokens right, "
            f"with shuffled labels {found['control']['accuracy']:.1%}"
        )
    for _, circuit in made({"circuit": analyses["circuit"]}):
        print(f"   circuit: {', '.join(circuit['circuit'])}, faithfulness {told(circuit['faithfulness']['mean'])}")
    print("   Best induction score of each layer, step by step")
    print(f"   {'step':24} {' '.join(f'{step:>5}' for step in curves['steps'])}")
    for layer, found in made(curves["analyses"]["heads"]):
        scores = ("     " if score is None else f"{score:5.2f}" for score in found["induction"])
        print(f"   {layer:24} {' '.join(scores)}")


def made(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Results by layer without those that failed."""
    found = {} if isinstance(results.get("error"), str) else results
    return [(layer, result) for layer, result in found.items() if "error" not in result]


def told(number: float | None) -> str:
    return "unknown" if number is None else f"{number:.3f}"


def count(text: str) -> int:
    """A whole number from 1 up, of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 up is needed, got {text!r}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("mechint_example"), help="folder for all that is written")
    parser.add_argument("--layers", type=count, default=2, help="of the model that is trained")
    parser.add_argument("--steps", type=count, default=250, help="of training")
    parser.add_argument("--every", type=count, default=25, help="training steps from one capture to the next")
    parser.add_argument("--sae-steps", type=count, default=400, help="training steps of each sparse autoencoder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        workflow(**vars(options))
    except (HookError, OSError) as error:
        sys.stderr.write(f"example: {error}\n")
        return 1
    return 0


def workflow(output: Path, layers: int, steps: int, every: int, sae_steps: int, seed: int) -> None:
    """Train, analyse, and write a report to ``output``."""
    captured, weights = output / "captured", output / "weights"
    if every > steps:
        raise HookError(f"--every is at most --steps, {steps}, got {every}: no weights would be saved.")
    if captured.exists():
        raise HookError(f"{captured} is of an earlier run, and two do not mix: name another --output.")
    weights.mkdir(parents=True, exist_ok=True)
    config = MechIntConfig(
        sample_layers=["blocks.*.hook_resid_post", "blocks.*.mlp.hook_post", "blocks.*.attn.hook_pattern"],
        save_hidden_every_n_steps=every,
        storage_path=captured,
        analyses_to_run=["sae", "neuron", "feature", "probe", "heads", "causal", "circuit"],
        analysis_options={
            # Each pair asks for one token alone: the loss in the model takes more of them.
            "sae": {
                "architecture": "topk",
                "k": 4,
                "d_sae": 128,
                "held_out": 0.2,
                "max_steps": sae_steps,
                "eval_sequences": PAIRS,
            },
            "causal": {"max_examples": 32},
            "circuit": {"max_examples": 32},
        },
        enable_feature_steering=True,
    )
    model = make_model(layers, seed)
    print(f"1. Training {layers} layers for {steps} steps, captured every {every}")
    train_captured(model, config, weights / "adapters.safetensors", steps, seed)

    print("\n2. Analysing what was captured")
    reader = ShardReader(captured)
    # Autoencoders are put into the model, so they are of rows with the weights that it has now, but for one small step.
    last = reader.steps[-1:]
    labels = came_before(reader.rows("blocks.0.hook_resid_post", last))
    pairs = make_pairs(PAIRS)
    runner = EvalMechIntRunner(model, config, tokenizer=Words(), labels=labels)
    results = runner.run_mechint_eval(hidden_shards_path=captured, eval_data=pairs, steps=last)
    print("\n3. Head scores and ablations at every captured step")
    curves = runner.run_over_steps(captured, ["heads", "causal"], checkpoints=weights, eval_data=pairs)
    report = runner.export_results(output / "report")
    show(results, curves)
    print(f"\nThe report is {report}")


if __name__ == "__main__":
    sys.exit(main())
