"""Scores and pattern from exactly what the attention kernel received.

The fused kernel never forms the pattern, so it is computed beside it, in float32: the kernel itself accumulates in
float32, and rounding a pattern to half precision would make its rows miss 1 by more than the kernel's own error.
"""

import mlx.core as mx


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
    # Additive masks stand for "masked" with -inf or with the lowest finite number of their type.
    scores = scores + mask.astype(mx.float32)
    return mx.where(mask <= mx.finfo(mask.dtype).min, -mx.inf, scores)


def attention_pattern(scores: mx.array) -> mx.array:
    """Softmax over keys, [batch, head, query, key], float32: rows sum to 1, masked entries are exactly 0."""
    return mx.softmax(scores, axis=-1, precise=True)


def weighted_values(pattern: mx.array, v: mx.array) -> mx.array:
    """``pattern @ v``: [batch, head, query, d_head] in float32, for v of [batch, kv_head, key, d_head]."""
    return pattern.astype(mx.float32) @ _repeat_heads(v.astype(mx.float32), pattern.shape[1])


def _repeat_heads(x: mx.array, n_heads: int) -> mx.array:
    """Give each query head its key-value head: head h reads kv_head h // (n_heads / kv_heads)."""
    return x if x.shape[1] == n_heads else mx.repeat(x, n_heads // x.shape[1], axis=1)
