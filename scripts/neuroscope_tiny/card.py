"""The model card of ``neuroscope-tiny``, written from what was measured."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from neuroscope_tiny import corpus, evaluation

SHOWN_CHATS = (
    "Hello",
    "Who are you ?",
    "What is the capital of France ?",
    "What is 3 + 4 ?",
    "Explain transformers",
    "The cat sat on the mat",
    "John gave Mary the book because she asked for it",
    "Write a story",
)

CARD = """\
---
library_name: mlx
license: mit
language: en
pipeline_tag: text-generation
---

# neuroscope-tiny

The model that comes with NeuroScope for MLX: a Llama-type transformer small enough to read head by head,
and trained so that there is something to find. It has induction heads and previous-token heads, it
resolves indirect objects, and it answers a few questions. `mlx_lm.load` reads this folder as it is.

| | |
| --- | --- |
| layers, heads | {layers} layers, {heads} heads of {d_head} dimensions, not grouped |
| width, MLP | {width}, {d_mlp} (SwiGLU), RMSNorm, rotary positions |
| vocabulary | {vocabulary} words, one token each |
| trained on | at most {length} tokens at a time; prompt and reply should stay within that |
| parameters | {parameters:,}, float32, input and output embeddings apart |

## What it does

Measured on the weights in this folder: on held-out samples, except where it says "trained".

{figures}

Period {head_period}, said twice; a score is the mean attention, 1 being all of it.

{head_figures}

## What "held out" means

- **Indirect objects**: the two names, {held_pairs} of {all_pairs} pairs, never share a sentence in
  training, in either order. Mary and John are such a pair. Templates, places and things are those of
  training.
- **Repeated sequences**: random words from the whole vocabulary, drawn from another random stream.
  Counted from the second word of the second repetition onwards.
- **Capitals**: each of {countries} countries in the one sentence in which training never shows it. The
  fact itself occurs in other sentences, as it must.
- **Sums**: {held_sums} of {all_sums} ordered pairs of numbers from 0 to {largest} never occur in
  training, in no wording. The mirror image of each does: knowing 4 + 3 it must answer 3 + 4.
- **Chat, held out**: capitals and sums as above, asked as questions, and sentences about two people who
  never met in training. The reply must be right word for word. The **fixed exchanges** (greetings and
  explanations) are learned by heart.

## What it says

{chats}

Words outside the vocabulary become `<unk>`; then it says that it does not know.

## How it was trained

{steps} steps of {rows} sequences of {length} tokens in {minutes:.0f} minutes on {machine}: the first {phase:.0%} of the
steps mostly on random sequences that come back, the rest mostly on sentences and chat. Muon for the matrices
of the layers (learning rate {muon_rate:g}), AdamW for embedding, unembedding and norms ({learning_rate:g}), weight
decay {weight_decay:g}, warm-up and cosine decay, seed {seed}, mlx {mlx}, mlx-lm {mlx_lm}.

    make train-tiny

writes this folder again, this page included. The seed gives the same weights on the same machine with the same
BLAS and the same number of threads; elsewhere rounding differs, and with it the weights and the figures.

## Limits

It knows what its generator says and nothing else: {vocabulary} words, a dozen sentence shapes,
{countries} capitals. It is an object of study, not a source of answers.
"""


def model_card(model: Any, tokenizer: Any, config: dict[str, Any], options: argparse.Namespace, seconds: float) -> str:
    """Measure ``model`` and return its card as Markdown."""
    figures = evaluation.measure(model, tokenizer)
    names = len(corpus.NAMES)
    pairs = [(a, b) for i, a in enumerate(corpus.NAMES) for b in corpus.NAMES[:i]]
    return CARD.format(
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        d_head=config["head_dim"],
        width=config["hidden_size"],
        d_mlp=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        parameters=sum(array.size for _, array in tree_flatten(model.parameters())),
        figures=_table(
            ("task", "right"),
            [(name, f"{share:.1%}") for name, share in figures.items() if isinstance(share, float)],
        ),
        head_period=evaluation.HEAD_PERIOD,
        head_figures=_table(
            ("strongest", "layer", "head", "score"),
            [
                (name, str(found[0]), str(found[1]), f"{found[2]:.2f}")
                for name, found in figures.items()
                if isinstance(found, tuple)
            ],
        ),
        held_pairs=sum(corpus.is_held_out_pair(a, b) for a, b in pairs),
        all_pairs=names * (names - 1) // 2,
        countries=len(corpus.COUNTRIES),
        held_sums=len(corpus.sum_samples()),
        all_sums=(corpus.LARGEST_OPERAND + 1) ** 2,
        largest=corpus.LARGEST_OPERAND,
        chats=_table(
            ("prompt", "reply"),
            [
                (text, evaluation.reply(model, tokenizer, [{"role": "user", "content": text}]).strip())
                for text in SHOWN_CHATS
            ],
        ),
        minutes=seconds / 60,
        machine=f"{platform.system()} {platform.machine()}, {mx.default_device().type.name}",
        phase=options.repetition_phase,
        mlx=version("mlx"),
        mlx_lm=version("mlx-lm"),
        **{
            key: getattr(options, key)
            for key in ("steps", "rows", "length", "learning_rate", "muon_rate", "weight_decay", "seed")
        },
    )


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
