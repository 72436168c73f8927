"""What logits say of what is asked of a batch: log probabilities, logit differences, divergences; nothing is evaluated.

Rows of logits are those of the batch, or of ``batch.repeated(n)``.
"""

import mlx.core as mx
import numpy as np

from .eval_data import EvalBatch


def log_probabilities(logits: mx.array, batch: EvalBatch) -> mx.array:
    """Of every token at the positions that are asked of the batch, [rows, asked, d_vocab] in float32."""
    asked = logits[:, mx.array(batch.asked)].astype(mx.float32)
    return asked - mx.logsumexp(asked, axis=-1, keepdims=True)


def at_targets(values: mx.array, batch: EvalBatch) -> mx.array:
    """Of values [rows, asked, d_vocab] that of each target, [rows, asked]; where nothing is asked, some other."""
    targets = mx.array(np.maximum(batch.targets[:, batch.asked], 0))
    return mx.take_along_axis(values, targets[..., None], axis=-1)[..., 0]


def logit_differences(logits: mx.array, batch: EvalBatch) -> mx.array:
    """The answer's logit less the wrong one's, [rows] in float32, of a batch that has wrong ones."""
    assert batch.wrong is not None
    # The asked position of an answer is the last.
    pair = mx.array(np.stack([batch.targets[:, -1], batch.wrong], axis=1))
    picked = mx.take_along_axis(logits[:, -1], pair, axis=-1).astype(mx.float32)
    return picked[:, 0] - picked[:, 1]


def divergences(p: mx.array, q: mx.array) -> mx.array:
    """KL(p || q) in nats over the last axis, from log probabilities; a token that p rules out adds nothing."""
    return mx.where(p == -mx.inf, 0.0, mx.exp(p) * (p - q)).sum(axis=-1)
