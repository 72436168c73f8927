"""Measures a model on the held-out samples of :mod:`neuroscope_tiny.corpus`.

The head scores recompute every attention pattern in numpy from the weights alone, so they say what the
model attends to without any of the library that they are used to test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import generate

from neuroscope_tiny import corpus

HEAD_PERIOD = 20
"""Period of the repeated sequences on which heads are scored."""


def answer_accuracy(model: Any, tokenizer: Any, samples: Sequence[corpus.Sample]) -> float:
    """Return the share of samples whose answer is the most probable next token."""
    right = 0
    prompts = [tokenizer.encode(sample.prompt) for sample in samples]
    answers = [tokenizer.encode(sample.answer, add_special_tokens=False)[0] for sample in samples]
    for length in sorted(set(map(len, prompts))):  # equal lengths go through the model together
        rows = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        logits = model(mx.array([prompts[index] for index in rows]))[:, -1]
        predicted = np.array(mx.argmax(logits, axis=-1))
        right += sum(predicted[i] == answers[index] for i, index in enumerate(rows))
    return right / len(samples)


def repetition_accuracy(model: Any, tokenizer: Any, texts: Sequence[str], period: int) -> float:
    """Return the share of right top-1 predictions from the second token of the second repetition onwards."""
    tokens = np.array([tokenizer.encode(text) for text in texts])
    predicted = np.array(mx.argmax(model(mx.array(tokens)), axis=-1))
    first = 1 + period + 1  # after BOS, one repetition, and its first token again
    return float((predicted[:, first - 1 : -1] == tokens[:, first:]).mean())


def reply(model: Any, tokenizer: Any, messages: list[dict[str, str]], max_tokens: int = 60) -> str:
    """Answer a chat greedily: ``reply(model, tokenizer, [{"role": "user", "content": "Hello"}])``."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return generate(model, tokenizer, prompt, max_tokens=max_tokens)


def chat_accuracy(model: Any, tokenizer: Any, chats: Sequence[corpus.Chat]) -> float:
    """Return the share of chats whose reply, EOS included, is word for word the most probable one."""
    right = 0
    rows: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = {}
    for chat in chats:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": chat.question}], add_generation_prompt=True)
        answer = [*tokenizer.encode(chat.reply, add_special_tokens=False), tokenizer.eos_token_id]
        rows.setdefault((len(prompt), len(answer)), []).append((prompt, answer))
    for (start, count), group in rows.items():
        # Greedy decoding gives the reply exactly when each token of it is the most probable after the others.
        logits = model(mx.array([prompt + answer for prompt, answer in group]))
        predicted = np.array(mx.argmax(logits[:, start - 1 : start - 1 + count], axis=-1))
        right += int((predicted == np.array([answer for _, answer in group])).all(axis=1).sum())
    return right / len(chats)


def recompute(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recompute a Llama-type model in numpy and return its attention patterns and its logits.

    ``tokens`` is ``[batch, pos]``, the patterns are ``[layer, batch, head, query_pos, key_pos]``. That the
    logits equal the model's own shows that the patterns are what the model attends to.
    """
    args = model.args
    weights = {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(model.parameters())}
    n_batch, n_pos = tokens.shape
    d_head = args.hidden_size // args.num_attention_heads
    frequencies = args.rope_theta ** (-np.arange(0, d_head, 2) / d_head)
    angles = np.arange(n_pos)[:, None] * frequencies
    cosine, sine = np.cos(angles), np.sin(angles)
    future = np.triu(np.ones((n_pos, n_pos), dtype=bool), k=1)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + args.rms_norm_eps) * weights[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(n_batch, n_pos, -1, d_head).transpose(0, 2, 1, 3)

    def rotate(x: np.ndarray) -> np.ndarray:
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cosine - high * sine, low * sine + high * cosine], axis=-1)

    residual = weights["model.embed_tokens.weight"][tokens]
    patterns = []
    for layer in range(args.num_hidden_layers):
        block = f"model.layers.{layer}"
        x = norm(residual, f"{block}.input_layernorm")
        q, k, v = (heads(linear(x, f"{block}.self_attn.{name}_proj")) for name in "qkv")
        scores = rotate(q) @ rotate(k).swapaxes(-1, -2) / np.sqrt(d_head)
        scores = np.where(future, -np.inf, scores)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        pattern = scores / scores.sum(-1, keepdims=True)
        patterns.append(pattern)
        z = (pattern @ v).transpose(0, 2, 1, 3).reshape(n_batch, n_pos, -1)
        residual = residual + linear(z, f"{block}.self_attn.o_proj")
        x = norm(residual, f"{block}.post_attention_layernorm")
        gate = linear(x, f"{block}.mlp.gate_proj")
        residual = residual + linear(
            gate / (1 + np.exp(-gate)) * linear(x, f"{block}.mlp.up_proj"), f"{block}.mlp.down_proj"
        )
    return np.stack(patterns), linear(norm(residual, "model.norm"), "lm_head")


def induction_scores(patterns: np.ndarray, period: int) -> np.ndarray:
    """Score each head as an induction head: ``[layer, head]``, 0 to 1.

    Mean attention from each token of the second repetition to the token after its previous occurrence.
    ``patterns`` are those of BOS and a sequence of ``period`` tokens, twice.
    """
    queries = np.arange(1 + period, 1 + 2 * period)
    return patterns[..., queries, queries - period + 1].mean(axis=(1, 3))


def previous_token_scores(patterns: np.ndarray) -> np.ndarray:
    """Score each head as a previous-token head: mean attention to the position before, ``[layer, head]``."""
    queries = np.arange(1, patterns.shape[-1])
    return patterns[..., queries, queries - 1].mean(axis=(1, 3))


def best_head(scores: np.ndarray) -> tuple[int, int, float]:
    """Return layer, head and score of the highest score: ``(2, 5, 0.93)``."""
    layer, head = np.unravel_index(int(scores.argmax()), scores.shape)
    return int(layer), int(head), float(scores[layer, head])


def measure(model: Any, tokenizer: Any, seed: int = 0, n: int = 240, quick: bool = False) -> dict[str, Any]:
    """Measure everything that the model card states; accuracies and head scores are 0 to 1."""
    n = n // 4 if quick else n
    result: dict[str, Any] = {
        "indirect object": answer_accuracy(model, tokenizer, corpus.indirect_object_samples(n, seed)),
        "capitals": answer_accuracy(model, tokenizer, corpus.capital_samples()),
        "sums": answer_accuracy(model, tokenizer, corpus.sum_samples()),
        "sums, trained pairs": answer_accuracy(model, tokenizer, corpus.sum_samples("train")),
        "chat": chat_accuracy(model, tokenizer, corpus.chat_samples()),
        "chat, trained exchanges": chat_accuracy(model, tokenizer, corpus.chat_samples("train")),
    }
    for period, repeats in ((5, 4), (10, 4), (20, 3), (30, 2)):
        texts = corpus.repeated_sequences(n // 4, period, repeats, seed)
        result[f"repetition, period {period}"] = repetition_accuracy(model, tokenizer, texts, period)
    tokens = np.array([tokenizer.encode(text) for text in corpus.repeated_sequences(n // 8, HEAD_PERIOD, 2, seed)])
    patterns, _ = recompute(model, tokens)
    result["induction head"] = best_head(induction_scores(patterns, HEAD_PERIOD))
    result["previous-token head"] = best_head(previous_token_scores(patterns))
    return result
