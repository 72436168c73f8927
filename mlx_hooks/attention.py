"""Scores and pattern from exactly what the attention kernel received, on an axis of absolute key positions.

The fused kernel never forms the pattern, so it is computed beside it, in float32: the kernel itself accumulates in
float32, and rounding a pattern to half precision would make its rows miss 1 by more than the kernel's own error.

A query whose keys are all masked has scores of -inf. Where a causal or boolean mask does it, or the lowest number there
is in an additive one, the kernel attends to every key alike, and so does the pattern; where an additive -inf does it,
the kernel's output is NaN, and so is the pattern. With sinks, the sink takes the whole mass. (MLX's CPU build.)
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import HookError


def attention_scores(
    q: mx.array, k: mx.array, *, scale: float, mask: mx.array | str | None, rows: list[int] | None = None
) -> mx.array:
    """Scaled and masked scores before the softmax, [batch, head, query, key], float32; masked entries are -inf.

    Args:
        q: [batch, head, query, d_head], as the kernel received it.
        k: [batch, kv_head, key, d_head]; each key head serves ``head / kv_head`` query heads.
        scale: what the kernel multiplies the products with.
        mask: None, ``"causal"`` (aligned at the last query and key), a boolean array (True is kept) or an additive one.
        rows: query rows to compute; None for all.
    """
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    picked = list(range(n_queries)) if rows is None else rows
    if rows is not None:
        q = q[:, :, mx.array(rows)]
    q = q.astype(mx.float32) * scale
    k = _repeat_heads(k.astype(mx.float32), q.shape[1])
    scores = q @ k.swapaxes(-1, -2)
    if mask is None:
        return scores
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"Unknown attention mask {mask!r}: allowed are 'causal', an array or None.")
        last_key = mx.array(picked)[:, None] + (n_keys - n_queries)
        return mx.where(mx.arange(n_keys)[None] <= last_key, scores, -mx.inf)
    if rows is not None and mask.shape[-2] != 1:
        mask = mx.take(mask, mx.array(rows), axis=-2)
    if mask.dtype == mx.bool_:
        return mx.where(mask, scores, -mx.inf)
    return show_masked(scores + mask.astype(mx.float32), mask)


def show_masked(scores: mx.array, mask: mx.array | None = None) -> mx.array:
    """Float32 scores with -inf where "masked" is written as the lowest finite number of a type."""
    sign = scores if mask is None else mask
    return mx.where(sign <= mx.finfo(sign.dtype).min, -mx.inf, scores.astype(mx.float32))


def attention_pattern(
    scores: mx.array, sinks: mx.array | None = None, *, mask: mx.array | str | None = None
) -> tuple[mx.array, mx.array | None]:
    """Softmax over keys, [batch, head, query, key], and the mass of the sinks, [batch, head, query]; float32.

    Rows sum to 1, with the sink's mass where there are sinks (a score per head that stands for no key). Masked entries
    are exactly 0, except in a row with every key masked: the module's docstring says what ``mask`` then makes of it.
    """
    if sinks is None:
        lowest = mx.array(mx.finfo(mx.float32).min)
        if isinstance(mask, mx.array) and mask.dtype != mx.bool_:
            lowest = mx.where(mx.any(mask == -mx.inf), -mx.inf, lowest)
        # Equal finite scores share the mass; beside any other score the lowest number weighs exactly 0.
        return mx.softmax(mx.maximum(scores, lowest), axis=-1, precise=True), None
    column = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, -1, 1, 1), (*scores.shape[:-1], 1))
    whole = mx.softmax(mx.concatenate([column, scores], axis=-1), axis=-1, precise=True)
    return whole[..., 1:], whole[..., 0]


def pattern_in_parts(
    q: mx.array,
    k: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
    size: int,
) -> Iterator[tuple[range, mx.array]]:
    """The pattern some query rows after the others: rows of the call, and their pattern [batch, head, row, key].

    For a reader that keeps little of each. Causal attention hides the keys after a part's last row from all of it, so
    they are left out: half of the work, and the memory of one part. Each part is another matrix product than the
    whole, so they agree within rounding.
    """
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    for start in range(0, n_queries, size):
        rows = range(start, min(start + size, n_queries))
        if isinstance(mask, str):
            keys = k[:, :, : n_keys - n_queries + rows.stop]
            scores = attention_scores(q[:, :, start : rows.stop], keys, scale=scale, mask=mask)
        else:
            scores = attention_scores(q, k, scale=scale, mask=mask, rows=list(rows))
        if isinstance(mask, str) and sinks is None and mx.default_device() == mx.cpu:
            yield rows, _numpy_softmax(scores)
        else:
            yield rows, attention_pattern(scores, sinks, mask=mask)[0]


def _numpy_softmax(scores: mx.array) -> mx.array:
    """Softmax over keys, evaluated, of rows with a score in each: several times as fast as MLX's own on a CPU.

    Rows whose scores overflowed are NaN, as MLX's are; who reads them says so.
    """
    held = np.asarray(scores)
    with np.errstate(invalid="ignore"):
        weights = held - held.max(axis=-1, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=-1, keepdims=True)
    return mx.array(weights)


def weighted_values(pattern: mx.array, v: mx.array) -> mx.array:
    """``pattern @ v``: [batch, head, query, d_head] in float32, for v of [batch, kv_head, key, d_head]."""
    return pattern.astype(mx.float32) @ _repeat_heads(v.astype(mx.float32), pattern.shape[1])


def pick_heads(
    heads: list[int], q: mx.array, k: mx.array, mask: mx.array | str | None, sinks: mx.array | None
) -> tuple[mx.array, mx.array, mx.array | str | None, mx.array | None]:
    """What the kernel received, of some query heads only: each with the key-value head that it reads."""
    n_heads, picked = q.shape[1], mx.array(heads)
    group = n_heads // k.shape[1]
    if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[1] == n_heads:
        mask = mx.take(mask, picked, axis=1)
    sinks = None if sinks is None else mx.take(sinks.reshape(-1), picked)
    return mx.take(q, picked, axis=1), mx.take(k, mx.array([h // group for h in heads]), axis=1), mask, sinks


def _repeat_heads(x: mx.array, n_heads: int) -> mx.array:
    """Give each query head its key-value head: head h reads kv_head h // (n_heads / kv_heads)."""
    return x if x.shape[1] == n_heads else mx.repeat(x, n_heads // x.shape[1], axis=1)


class KeyPositions:
    """Which absolute position each key of the kernel belongs to, for caches that forget or reorder keys.

    Args:
        positions: one per key, or one per key of each row [batch, 1, 1, key], or None where key i is position i.
        total: positions so far, those of this call included.
    """

    def __init__(self, positions: np.ndarray | mx.array | None, total: int) -> None:
        self.positions = positions
        self.total = total

    @classmethod
    def of(cls, cache: Any, n_keys: int, total: int) -> "KeyPositions":
        """Read off a KV cache after it was updated.

        Raises:
            HookError: for a cache whose order of keys is not known.
        """
        if n_keys == total:
            return cls(None, total)
        if hasattr(cache, "start_position"):
            return cls(np.arange(cache.start_position, cache.start_position + n_keys), total)
        if all(hasattr(cache, name) for name in ("max_size", "keep", "_idx", "offset")):
            # A ring: the first ``keep`` positions stay, the others are overwritten from slot ``keep`` on.
            slots = np.arange(n_keys)
            if cache._idx < n_keys:
                slots = np.concatenate([slots[: cache.keep], slots[cache._idx :], slots[cache.keep : cache._idx]])
            positions = np.empty(n_keys, dtype=int)
            positions[slots] = np.concatenate([np.arange(cache.keep), np.arange(total - n_keys + cache.keep, total)])
            return cls(positions, total)
        name = type(cache).__name__ if cache is not None else "no cache"
        raise HookError(
            f"The kernel got {n_keys} keys for {total} positions, and with {name} it is not known which: "
            "attention scores and pattern cannot be captured here."
        )

    def spread(self, array: mx.array, fill: float) -> mx.array:
        """[..., key] with keys as the kernel has them, on the axis of all positions; ``fill`` where there is no key."""
        if self.positions is None:
            return array
        if isinstance(self.positions, mx.array):
            at = mx.broadcast_to(self.positions, array.shape)
            return mx.put_along_axis(mx.full((*array.shape[:-1], self.total), fill, array.dtype), at, array, axis=-1)
        column = np.full(self.total, -1)
        column[self.positions] = np.arange(len(self.positions))
        here = mx.array(column >= 0)
        return mx.where(here, mx.take(array, mx.array(np.maximum(column, 0)), axis=-1), fill)

    def gather(self, array: mx.array) -> mx.array:
        """The inverse of ``spread``."""
        if self.positions is None:
            return array
        if isinstance(self.positions, mx.array):
            at = mx.broadcast_to(self.positions, (*array.shape[:-1], self.positions.shape[-1]))
            return mx.take_along_axis(array, at, axis=-1)
        return mx.take(array, mx.array(self.positions), axis=-1)

    def own(self, keys: mx.array, length: int) -> mx.array:
        """The last ``length`` positions' keys or values, in order, of [batch, kv_head, key, d_head]."""
        if self.positions is None:
            return keys[..., -length:, :]
        assert isinstance(self.positions, np.ndarray)
        return mx.take(keys, mx.array(np.argsort(self.positions)[-length:]), axis=-2)
