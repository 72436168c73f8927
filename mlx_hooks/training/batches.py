"""What a training step's batch is: token ids, with or without the lengths of its sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import HookError


@dataclass(frozen=True)
class Batch:
    """What the model reads at a training step.

    Args:
        inputs: token ids [batch, pos].
        lengths: of each sequence the number of tokens that are no padding, [batch]; None where there is none.
        prompts: of each sequence the number of tokens at its start that the loss leaves out, [batch]; None where that
            is not known.
    """

    inputs: mx.array
    lengths: np.ndarray | None = None
    prompts: np.ndarray | None = None

    def first(self, count: int | None) -> "Batch":
        """The first so many sequences; None for all of them."""
        if count is None or count >= self.inputs.shape[0]:
            return self
        parts = (None if array is None else array[:count] for array in (self.lengths, self.prompts))
        return Batch(self.inputs[:count], *parts)


ReadBatch = Callable[[Any], Batch]


def read_batch(batch: Any) -> Batch:
    """Read a batch of a training loop.

    Args:
        batch: token ids [batch, pos], which the model reads as they are; or a pair of these and lengths, as mlx-lm's
            ``iterate_batches`` gives them: [batch, 2], where the loss begins and where the sequence ends, or [batch].
            Of a pair the model reads all columns but the last, as in mlx-lm's own loss.

    Raises:
        HookError: it is something else.
    """
    if not isinstance(batch, tuple | list):
        return Batch(token_ids(batch))
    if len(batch) != 2:
        raise _refused(f"{len(batch)} things")
    tokens, ends = token_ids(batch[0]), np.array(batch[1])
    if not np.issubdtype(ends.dtype, np.integer) or ends.shape not in ((len(tokens),), (len(tokens), 2)):
        raise _refused(f"tokens {tuple(tokens.shape)} and {ends.dtype} of shape {ends.shape}")
    prompts, lengths = (None, ends) if ends.ndim == 1 else (ends[:, 0], ends[:, 1])
    width = tokens.shape[1] - 1
    if width < 1:
        raise _refused(f"{len(tokens)} sequences of one token")
    return Batch(tokens[:, :-1], np.minimum(lengths, width), None if prompts is None or not prompts.any() else prompts)


def token_ids(tokens: Any) -> mx.array:
    """Token ids [batch, pos] as an MLX array.

    Raises:
        HookError: they are something else.
    """
    if not isinstance(tokens, mx.array | np.ndarray):
        raise _refused(type(tokens).__name__)
    if isinstance(tokens, mx.array):
        whole = mx.issubdtype(tokens.dtype, mx.integer)
    else:
        whole = np.issubdtype(tokens.dtype, np.integer)
    if not whole or tokens.ndim != 2 or not tokens.size:
        raise _refused(f"{tokens.dtype} of shape {tuple(tokens.shape)}")
    return tokens if isinstance(tokens, mx.array) else mx.array(tokens)


def check_lengths(lengths: Any, shape: Sequence[int]) -> np.ndarray | None:
    """The number of tokens of each sequence that are no padding, [batch], for token ids of a shape, [batch, pos]; None
    for all.

    Raises:
        HookError: there is not one whole number from 0 to pos for each sequence.
    """
    if lengths is None:
        return None
    found = np.array(lengths)
    n_sequences, longest = shape
    told = f"lengths has a number of tokens from 0 to {longest} for each of the {n_sequences} sequences, got"
    if not np.issubdtype(found.dtype, np.integer) or found.shape != (n_sequences,):
        raise HookError(f"{told} {found.dtype} of shape {found.shape}.", field="lengths")
    if len(wrong := found[(found < 0) | (found > longest)]):
        raise HookError(f"{told} {wrong[0]}.", field="lengths")
    return found


def _refused(got: str) -> HookError:
    return HookError(
        "A batch is token ids [batch, pos], or these and the lengths of the sequences, [batch] or [batch, 2] as "
        f"mlx-lm has them; got {got}.",
        field="batch",
    )
