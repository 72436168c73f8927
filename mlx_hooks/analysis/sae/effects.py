"""What a sparse autoencoder does in its model: how much of the loss it keeps, and what its latents steer to."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ...activations import scalar, to_numpy
from ...errors import HookError
from ...hook_points import HookPoint
from ...interventions import Intervention
from ...model import HookedModel, Tokens
from .autoencoder import SparseAutoencoder

Spell = Callable[[int], str | None]
Progress = Callable[[int, int], None]


def loss_recovered(
    model: HookedModel, sae: SparseAutoencoder, texts: Sequence[Tokens], hook_point: str | None = None
) -> dict[str, Any]:
    """How much of what the stream is good for survives the autoencoder.

    The cross-entropy of the next token, in nats, of the model itself, with what the autoencoder reads back in the place
    of the activations, and with 0 in their place. ``loss_recovered`` is (zero - autoencoder) / (zero - plain): 1 where
    nothing is lost, 0 where zeros would do as well; None where zeros do no harm.

    Args:
        texts: texts or token ids, of at least two tokens each.
        hook_point: in place of the autoencoder's own.

    Raises:
        HookError: for no texts, too short ones, and a hook point that the model does not have or that has another
            width.
    """
    rows, where = _rows(model, texts), sae.where(hook_point)
    edits: dict[str, list[tuple[str, Any]]] = {
        "loss": [],
        "loss_with_sae": [(where, sae.replace_value())],
        "loss_zero_ablated": [(where, _zeros)],
    }
    sums = dict.fromkeys(edits, 0.0)
    for tokens in rows:
        for name, hooks in edits.items():
            sums[name] += _cross_entropy(model.run_with_hooks(tokens, hooks), tokens)
    n_tokens = sum(tokens.shape[1] - 1 for tokens in rows)
    losses = {name: total / n_tokens for name, total in sums.items()}
    harm = losses["loss_zero_ablated"] - losses["loss"]
    recovered = (losses["loss_zero_ablated"] - losses["loss_with_sae"]) / harm if harm > 0 else None
    return {**losses, "loss_recovered": recovered, "n_tokens": n_tokens}


def steering_effects(
    model: HookedModel,
    sae: SparseAutoencoder,
    texts: Sequence[Tokens],
    coefficients: dict[int, float],
    *,
    hook_point: str | None = None,
    top: int = 5,
    seed: int = 0,
    spell: Spell | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """What adding a latent's direction does to the model's predictions, at every position of some texts.

    For each latent: ``kl``, the mean of KL(plain || steered) in nats; ``kl_random``, the same for a random direction of
    the same length, which says what any push of that size does; ``kl_ablated``, with the latent's own contribution
    taken off; ``promoted`` and ``suppressed``, the tokens whose log probability rises and falls most on average over
    positions, with the change in nats.

    Args:
        coefficients: by latent, what is added, in units of its activation.
        top: tokens to name.
        seed: of the random directions.
        spell: a token id's text.

    Raises:
        HookError: as :func:`loss_recovered`, and for latents that there are not.
    """
    rows, where = _rows(model, texts), sae.where(hook_point)
    plain = [_log_probabilities(model(tokens)) for tokens in rows]
    random = np.random.default_rng(seed)
    found = []
    for done, (feature, coefficient) in enumerate(coefficients.items(), 1):
        edit = sae.steering(feature, coefficient, hook_point=where)
        vector = np.asarray(edit.vector)
        push = random.standard_normal(vector.shape)
        push *= np.linalg.norm(vector) / np.linalg.norm(push)
        kl, change = _moved(rows, plain, partial(_intervened, model, edit))
        found.append(
            {
                "feature": feature,
                "coefficient": float(coefficient),
                "kl": kl,
                "kl_random": _moved(rows, plain, partial(_intervened, model, replace(edit, vector=push)))[0],
                "kl_ablated": _moved(
                    rows, plain, partial(model.run_with_hooks, fwd_hooks=[(where, sae.ablate_feature(feature))])
                )[0],
                "promoted": _tokens(change, np.argsort(-change, kind="stable")[:top], spell),
                "suppressed": _tokens(change, np.argsort(change, kind="stable")[:top], spell),
            }
        )
        if progress is not None:
            progress(done, len(coefficients))
    return found


def _intervened(model: HookedModel, edit: Intervention, tokens: mx.array) -> mx.array:
    with model.intervening([edit]):
        return model(tokens)


def _moved(
    rows: list[mx.array], plain: list[mx.array], run: Callable[[mx.array], mx.array]
) -> tuple[float, np.ndarray]:
    """The mean over positions of KL(plain || run), and of the change of each token's log probability [d_vocab]."""
    divergence, change, n_positions = 0.0, np.zeros(plain[0].shape[-1]), 0
    for tokens, before in zip(rows, plain, strict=True):
        after = _log_probabilities(run(tokens))
        # What has no probability in the model adds nothing, also where its logit is -inf.
        apart = mx.where(before > -mx.inf, before - after, 0.0)
        divergence += scalar((mx.exp(before) * apart).sum())
        change -= to_numpy(apart.sum(axis=0), "float64")
        n_positions += len(before)
    return divergence / n_positions, change / n_positions


def _log_probabilities(logits: mx.array) -> mx.array:
    """[pos, d_vocab] in float32 of logits [1, pos, d_vocab]."""
    wide = logits[0].astype(mx.float32)
    return wide - mx.logsumexp(wide, axis=-1, keepdims=True)


def _cross_entropy(logits: mx.array, tokens: mx.array) -> float:
    """The sum over positions but the last of -log p(next token), in nats."""
    chosen = mx.take_along_axis(_log_probabilities(logits)[:-1], tokens[0, 1:, None], axis=-1)
    return -scalar(chosen.sum())


def _zeros(value: mx.array, point: HookPoint) -> mx.array:
    return mx.zeros_like(value)


def _rows(model: HookedModel, texts: Sequence[Tokens]) -> list[mx.array]:
    """Token ids [1, pos] of each text or row of ids, cut off at the model's context."""
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise HookError(f"Texts are a list of texts or of rows of token ids, got {texts!r:.60}.", field="eval_data")
    rows = [row[None, : model.cfg.max_positions] for text in texts for row in model.to_tokens(text)]
    if any(row.shape[1] < 2 for row in rows):
        raise HookError(
            "Each text has at least 2 tokens: the second is what the first is to predict.", field="eval_data"
        )
    return rows


def _tokens(change: np.ndarray, chosen: np.ndarray, spell: Spell | None) -> list[dict[str, Any]]:
    return [
        {"token": int(i), "text": None if spell is None else spell(int(i)), "change": float(change[i])} for i in chosen
    ]
