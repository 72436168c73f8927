"""An independent oracle for attention: the formulas in NumPy float64.

It shares no code with the engine or mlx-lm and uses no kernel of MLX. Queries, keys and values are
[batch, pos, head, d_head], scores and patterns [batch, head, query, key], as hook points show them.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten


def float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def weights_of(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: float64(value) for name, value in tree_flatten(module.parameters())}


# ---------------------------------------------------------------------------------------------------------------------
# Scores, pattern and z


def causal(queries: np.ndarray, n_keys: int) -> np.ndarray:
    """Which keys, at positions from 0, the queries at these positions see, [query, key]."""
    return np.arange(n_keys)[None] <= queries[:, None]


def window(queries: np.ndarray, n_keys: int, size: int) -> np.ndarray:
    """Causal, and the last ``size`` positions only."""
    return causal(queries, n_keys) & (np.arange(n_keys)[None] > queries[:, None] - size)


def chunk(queries: np.ndarray, n_keys: int, size: int) -> np.ndarray:
    """Causal, and the query's own chunk of ``size`` positions only."""
    return causal(queries, n_keys) & (np.arange(n_keys)[None] // size == queries[:, None] // size)


def scores_of(
    q: np.ndarray, k: np.ndarray, *, scale: float, visible: np.ndarray, cap: float = 0.0, tiled: bool = False
) -> np.ndarray:
    """Scaled, capped and masked scores; query head h reads key head h // group, or h % key heads where ``tiled``."""
    scores = np.einsum("bqhd,bkhd->bhqk", q, per_query(k, q.shape[2], tiled)) * scale
    if cap:
        scores = np.tanh(scores / cap) * cap
    return np.where(visible, scores, -np.inf)


def pattern_of(scores: np.ndarray, sinks: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The softmax over keys and a sink per head, if any: the pattern, and the sink's mass [batch, head, query]."""
    sink = np.full(scores.shape[1], -np.inf) if sinks is None else sinks
    sink = np.broadcast_to(sink[None, :, None, None], (*scores.shape[:-1], 1))
    top = np.maximum(scores.max(-1, keepdims=True), sink)
    masses, sink = np.exp(scores - top), np.exp(sink - top)
    total = masses.sum(-1, keepdims=True) + sink
    return masses / total, (sink / total)[..., 0]


def z_of(pattern: np.ndarray, v: np.ndarray, tiled: bool = False) -> np.ndarray:
    return np.einsum("bhqk,bkhd->bqhd", pattern, per_query(v, pattern.shape[1], tiled))


def per_query(x: np.ndarray, n_heads: int, tiled: bool = False) -> np.ndarray:
    """Keys or values as each query head reads them."""
    repeats = n_heads // x.shape[2]
    return np.tile(x, (1, 1, repeats, 1)) if tiled else np.repeat(x, repeats, axis=2)


def block_sparse(
    first: int, n_queries: int, n_keys: int, *, n_heads: int, block: int, local: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """What mlx-lm's phi3small sees in a block-sparse layer, [head, query, key], and what it adds to the scores.

    Blocks decide, not positions: a query sees the later keys of its own block. The blocks of the queries are counted
    from the end of the last whole block. The causal mask, which is boolean, is added: 1 where a key is not later.
    """
    query_blocks, key_blocks = -(-n_queries // block), -(-n_keys // block)
    rows = np.arange(n_queries) + query_blocks * block - n_queries
    at = (key_blocks - query_blocks + rows // block)[None, :, None]
    key = (np.arange(n_keys) // block)[None, None]
    vertical = (key + np.arange(1, n_heads + 1)[:, None, None]) % stride == 0
    seen = (at >= key) & ((at - key < local) | vertical)
    added = causal(first + np.arange(n_queries), n_keys) if n_queries > 1 else np.zeros((1, n_keys))
    return seen, added.astype(float)


# ---------------------------------------------------------------------------------------------------------------------
# From projections to what attention gets


def rms_norm(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight + bias


@dataclass(frozen=True)
class Rotary:
    """Rotary embedding (Su et al. 2021) of the first 2 * len(wavelengths) columns of [batch, pos, head, d_head].

    Args:
        wavelengths: positions per radian, one per pair of columns.
        interleaved: pairs are neighbours; otherwise halves apart.
        scale: of the columns that are rotated.
    """

    wavelengths: np.ndarray
    interleaved: bool
    scale: float = 1.0

    def __call__(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        half = len(self.wavelengths)
        rotated, rest = x[..., : 2 * half] * self.scale, x[..., 2 * half :]
        angles = (positions[:, None] / self.wavelengths)[:, None]
        a, b = (
            (rotated[..., ::2], rotated[..., 1::2]) if self.interleaved else (rotated[..., :half], rotated[..., half:])
        )
        turned = a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)
        pairs = np.stack(turned, axis=-1) if self.interleaved else np.stack(turned, axis=-2)
        return np.concatenate([pairs.reshape(rotated.shape), rest], axis=-1)


def plain_wavelengths(width: int, base: float) -> np.ndarray:
    return base ** (np.arange(0, width, 2) / width)


def yarn(width: int, base: float, scaling: dict, interleaved: bool) -> Rotary:
    """YaRN (Peng et al. 2023): long wavelengths are stretched, short ones kept, a ramp between."""
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

    def column(turns: float) -> float:
        return width * np.log(original / (turns * 2 * np.pi)) / (2 * np.log(base))

    low = max(np.floor(column(scaling["beta_fast"])), 0)
    high = min(np.ceil(column(scaling["beta_slow"])), width - 1)
    stretched = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
    kept = plain_wavelengths(width, base)
    wavelengths = 1 / ((1 - stretched) / kept + stretched / (factor * kept))
    scale = yarn_magnitude(factor, scaling["mscale"]) / yarn_magnitude(factor, scaling["mscale_all_dim"])
    return Rotary(wavelengths, interleaved, scale)


def yarn_magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * np.log(factor) + 1


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, section 2.1), as the text books write it: keys and values per head.

    Args:
        n_heads, nope, rope, rank: heads, widths of a query without and with rotation, width of the latent.
        rotary: of the last ``rope`` columns; None where there is none.
        q_scale, kv_scale: of the queries and of the latent.
        eps: of both norms inside.
    """

    n_heads: int
    nope: int
    rope: int
    rank: int
    rotary: Rotary | None
    eps: float = 1e-6
    q_scale: float = 1.0
    kv_scale: float = 1.0

    def __call__(
        self, weights: dict[str, np.ndarray], x: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries and keys, [nope + rope] wide, and values, from the input of the attention module."""
        q = self.low_rank_query(weights, x) @ weights["q_b_proj.weight"].T if "q_b_proj.weight" in weights else None
        q = x @ weights["q_proj.weight"].T if q is None else q
        q = q.reshape(*x.shape[:2], self.n_heads, self.nope + self.rope) * self.q_scale
        down = x @ weights["kv_a_proj_with_mqa.weight"].T
        latent = rms_norm(down[..., : self.rank], weights["kv_a_layernorm.weight"], self.eps) * self.kv_scale
        q_rope, k_rope = q[..., self.nope :], down[..., None, self.rank :]
        if self.rotary is not None:
            q_rope, k_rope = self.rotary(q_rope, positions), self.rotary(k_rope, positions)
        k = np.einsum("bpr,hrd->bphd", latent, weights["embed_q.weight"])
        v = np.einsum("bpr,hdr->bphd", latent, weights["unembed_out.weight"])
        k_rope = np.broadcast_to(k_rope, (*k.shape[:-1], self.rope))
        return (
            np.concatenate([q[..., : self.nope], q_rope], axis=-1),
            np.concatenate([k, k_rope], axis=-1),
            v,
        )

    def low_rank_query(self, weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return rms_norm(x @ weights["q_a_proj.weight"].T, weights["q_a_layernorm.weight"], self.eps)


def selected(
    weights: dict[str, np.ndarray],
    x: np.ndarray,
    low_rank_query: np.ndarray,
    rotary: Rotary,
    *,
    n_heads: int,
    kept: int,
) -> np.ndarray:
    """Which keys DeepSeek-V3.2's indexer leaves visible, [batch, 1, query, key], of a whole sequence."""
    length = x.shape[1]
    positions = np.arange(length)
    q = (low_rank_query @ weights["indexer.wq_b.weight"].T).reshape(*x.shape[:2], n_heads, -1)
    k = layer_norm(x @ weights["indexer.wk.weight"].T, weights["indexer.k_norm.weight"], weights["indexer.k_norm.bias"])
    q, k = rotary(q, positions), rotary(k[:, :, None], positions)[:, :, 0]
    relevance = np.maximum(np.einsum("bqhd,bkd->bhqk", q, k), 0)
    relevance = np.einsum("bhqk,bqh->bqk", relevance, x @ weights["indexer.weights_proj.weight"].T)
    seen = causal(positions, length)
    relevance = np.where(seen, relevance, -np.inf)
    least = np.sort(relevance, axis=-1)[..., -min(kept, length)][..., None]
    return ((relevance >= least) & seen)[:, None]


def dequantized(packed: tuple[mx.array, mx.array, mx.array], group_size: int, bits: int) -> np.ndarray:
    """MLX's affine quantisation undone: numbers of ``bits`` bits, lowest first in each uint32, a scale and a bias per
    group of columns.
    """
    words, scales, biases = (np.array(part) for part in packed)
    numbers = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & (2**bits - 1)
    numbers = numbers.reshape(*words.shape[:-1], -1, group_size).astype(np.float64)
    return (numbers * scales[..., None] + biases[..., None]).reshape(*words.shape[:-1], -1)
