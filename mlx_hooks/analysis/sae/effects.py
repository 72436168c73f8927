"""What a sparse autoencoder does in its model: how much of the loss it keeps, and what its latents steer to."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from ...activations import scalar, to_numpy
from ...errors import HookError, UnknownHookError
from ...interventions import Intervention
from ...model import HookedModel
from ...storage.rows import Rows
from ..eval_data import NOTHING, EvalData, eval_data_of
from .autoencoder import SparseAutoencoder

Spell = Callable[[int], str | None]
Progress = Callable[[int, int], None]
_BATCH = 4
"""Sequences that run at once."""


def check_place(model: HookedModel, rows: Rows, data: EvalData) -> None:
    """Refuse rows that are none of the model's: an autoencoder of them has no place in it.

    Raises:
        HookError: for a name that is no hook point of the model, and for rows of another size than it has there.
    """
    if not rows.name:
        raise HookError("The rows do not say where in the model they belong: name their layer.", field="layer_name")
    try:
        _, cache = model.run_with_cache([list(data.examples[0].tokens)], rows.name)
    except UnknownHookError as error:
        raise HookError(f"The autoencoder has no place in the model: {error}", field="layer_name") from error
    size = int(np.prod(cache[rows.name].shape[2:]))
    if size != rows.width:
        raise HookError(
            f"{rows.name} has rows of {size} numbers in the model, and those to learn from have {rows.width}.",
            field="layer_name",
        )


def loss_recovered(
    model: HookedModel, sae: SparseAutoencoder, eval_data: Any, hook_point: str | None = None
) -> dict[str, Any]:
    """How much of what the stream is good for survives the autoencoder.

    The cross-entropy of the next token, in nats, of the model itself, with what the autoencoder reads back in the place
    of the activations, and with 0 in their place. ``loss_recovered`` is (zero - autoencoder) / (zero - plain): 1 where
    nothing is lost, 0 where zeros would do as well; None where zeros do no harm.
    ``n_targets`` are the tokens that were to be predicted.

    Args:
        eval_data: what :func:`eval_data_of` takes: texts, rows of token ids, batches, or prompts with an answer. The
            loss is of what they ask for.
        hook_point: in place of the autoencoder's own.

    Raises:
        HookError: as :func:`eval_data_of`, and for a hook point that the model does not have or that has another width.
    """
    data, where = eval_data_of(model, eval_data), sae.where(hook_point)
    edits: dict[str, list[tuple[str, Any]]] = {
        "loss": [],
        "loss_with_sae": [(where, sae.replace_value())],
        "loss_zero_ablated": [(where, sae.changing(mx.zeros_like))],
    }
    sums = dict.fromkeys(edits, 0.0)
    for batch in data.batches(_BATCH):
        for name, hooks in edits.items():
            sums[name] += _cross_entropy(model.run_with_hooks(mx.array(batch.tokens), hooks), batch.targets)
    losses = {name: total / data.n_targets for name, total in sums.items()}
    harm = losses["loss_zero_ablated"] - losses["loss"]
    recovered = (losses["loss_zero_ablated"] - losses["loss_with_sae"]) / harm if harm > 0 else None
    return {**losses, "loss_recovered": recovered, "n_targets": data.n_targets}


def steering_effects(
    model: HookedModel,
    sae: SparseAutoencoder,
    eval_data: Any,
    coefficients: dict[int, float],
    *,
    hook_point: str | None = None,
    top: int = 5,
    seed: int = 0,
    spell: Spell | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """What adding a latent's direction does to the model's predictions, at every position that is read.

    For each latent: ``kl``, the mean of KL(plain || steered) in nats; ``kl_random``, the same for a random direction of
    the same length, which says what any push of that size does; ``kl_ablated``, with the latent's own contribution
    taken off; ``promoted`` and ``suppressed``, the tokens whose log probability rises and falls most on average over
    positions, with the change in nats.

    Args:
        eval_data: what :func:`eval_data_of` takes.
        coefficients: by latent, what is added, in units of its activation.
        top: tokens to name.
        seed: of the random directions.
        spell: a token id's text.

    Raises:
        HookError: as :func:`loss_recovered`, and for latents that there are not.
    """
    data, where = eval_data_of(model, eval_data), sae.where(hook_point)
    random = np.random.default_rng(seed)
    runs: list[dict[str, _Shift]] = []
    for feature, coefficient in coefficients.items():
        edit = sae.steering(feature, coefficient, hook_point=where)
        vector = np.asarray(edit.vector)
        push = random.standard_normal(vector.shape)
        push *= np.linalg.norm(vector) / np.linalg.norm(push)
        ablation = [(where, sae.ablate_feature(feature))]
        runs.append(
            {
                "kl": _Shift(partial(_intervened, model, edit)),
                "kl_random": _Shift(partial(_intervened, model, replace(edit, vector=push))),
                "kl_ablated": _Shift(partial(model.run_with_hooks, fwd_hooks=ablation)),
            }
        )
    batches = list(data.batches(_BATCH))
    for done, batch in enumerate(batches, 1):
        tokens = mx.array(batch.tokens)
        plain = _log_probabilities(model(tokens))
        for shifts in runs:
            for shift in shifts.values():
                shift.add(tokens, plain)
        if progress is not None:
            progress(done, len(batches))
    found = []
    for (feature, coefficient), shifts in zip(coefficients.items(), runs, strict=True):
        change = shifts["kl"].change
        told: dict[str, Any] = {"feature": feature, "coefficient": float(coefficient)}
        told |= {name: shift.divergence for name, shift in shifts.items()}
        told["promoted"] = _tokens(change, np.argsort(-change, kind="stable")[:top], spell)
        told["suppressed"] = _tokens(change, np.argsort(change, kind="stable")[:top], spell)
        found.append(told)
    return found


class _Shift:
    """How far an edited run's predictions are from the plain ones, over all positions.

    Args:
        run: logits [batch, pos, d_vocab] of tokens, with the edit.
    """

    def __init__(self, run: Callable[[mx.array], mx.array]) -> None:
        self.run = run
        self.sum, self.changes, self.n_positions = 0.0, np.zeros(()), 0

    def add(self, tokens: mx.array, plain: mx.array) -> None:
        """Count some sequences; ``plain`` are the model's own log probabilities [batch * pos, d_vocab]."""
        edited = _log_probabilities(self.run(tokens))
        # What has no probability in the model adds nothing, also where its logit is -inf.
        apart = mx.where(plain > -mx.inf, plain - edited, 0.0)
        self.sum += scalar((mx.exp(plain) * apart).sum())
        self.changes = self.changes - to_numpy(apart.sum(axis=0), "float64")
        self.n_positions += len(plain)

    @property
    def divergence(self) -> float:
        """The mean of KL(plain || edited), in nats."""
        return self.sum / self.n_positions

    @property
    def change(self) -> np.ndarray:
        """The mean change of each token's log probability [d_vocab], in nats."""
        return self.changes / self.n_positions


def _intervened(model: HookedModel, edit: Intervention, tokens: mx.array) -> mx.array:
    with model.intervening([edit]):
        return model(tokens)


def _log_probabilities(logits: mx.array) -> mx.array:
    """[batch * pos, d_vocab] in float32 of logits [batch, pos, d_vocab]."""
    wide = logits.reshape(-1, logits.shape[-1]).astype(mx.float32)
    return wide - mx.logsumexp(wide, axis=-1, keepdims=True)


def _cross_entropy(logits: mx.array, targets: np.ndarray) -> float:
    """The sum of -log p(target), in nats, over the positions that have a target [batch, pos]."""
    asked = np.flatnonzero(targets.reshape(-1) != NOTHING)
    ids = mx.array(targets.reshape(-1)[asked])
    chosen = mx.take_along_axis(_log_probabilities(logits)[mx.array(asked)], ids[:, None], axis=-1)
    return -scalar(chosen.sum())


def _tokens(change: np.ndarray, chosen: np.ndarray, spell: Spell | None) -> list[dict[str, Any]]:
    return [
        {"token_id": int(i), "token": None if spell is None else spell(int(i)), "change": float(change[i])}
        for i in chosen
    ]
