"""An independent oracle of what stands in a block besides attention: formulas in NumPy float64, weights as they are.

Nothing here calls the engine or an MLX kernel. ``Weights`` reads a model's parameters by path, quantised ones
dequantised bit by bit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

Array = np.ndarray


def f64(array: mx.array) -> Array:
    """A float64 copy of any MLX array; integers stay exact."""
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array).astype(np.float64)


class Weights:
    """A model's parameters by path (``"model.layers.0.mlp.up_proj.weight"``), in float64.

    The path of block ``i`` is ``blocks[i]``: ``"model.layers.0"``.
    """

    def __init__(self, model: nn.Module) -> None:
        self.arrays = dict(tree_flatten(model.parameters()))
        self.modules = dict(model.named_modules())
        paths = {id(module): path for path, module in self.modules.items()}
        self.blocks = [paths[id(block)] for block in model.layers]

    def __contains__(self, path: str) -> bool:
        return path in self.arrays

    def __getitem__(self, path: str) -> Array:
        module = self.modules.get(path.rpartition(".")[0])
        if path.endswith(".weight") and hasattr(module, "bits"):
            return self._dequantized(path.removesuffix(".weight"), module.bits, module.group_size)
        if path.endswith(".weight") and hasattr(module, "weight_scale"):
            scale = self[path.replace(".weight", ".weight_scale")]
            return ternary(np.array(self.arrays[path])) * (1 / scale if module.invert_weight_scales else scale)
        return f64(self.arrays[path])

    def _dequantized(self, path: str, bits: int, group_size: int) -> Array:
        """scale * q + bias in groups; numbers q of ``bits`` bits, the lowest first, fill words of 32."""
        packed = np.array(self.arrays[f"{path}.weight"])
        q = (packed[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & np.uint32(2**bits - 1)
        q = q.reshape(*packed.shape[:-1], -1, group_size)
        scales, biases = self[f"{path}.scales"][..., None], self[f"{path}.biases"][..., None]
        return (scales * q + biases).reshape(*packed.shape[:-1], -1)

    def linear(self, path: str, x: Array) -> Array:
        y = x @ self[f"{path}.weight"].T
        return y + self[f"{path}.bias"] if f"{path}.bias" in self else y

    def rms_norm(self, path: str, x: Array, eps: float, offset: float = 0.0) -> Array:
        return rms_norm(x, eps) * (self[f"{path}.weight"] + offset)


def ternary(packed: Array) -> Array:
    """Numbers -1, 0 and 1 of two bits each; the four of a byte are rows a quarter of the matrix apart (BitNet)."""
    return np.concatenate([(packed >> 2 * i) & 3 for i in range(4)]).astype(np.float64) - 1


# ---------------------------------------------------------------------------------------------------------------------
# Norms


def rms_norm(x: Array, eps: float) -> Array:
    """Root mean square norm without weight (Zhang and Sennrich 2019)."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def layer_norm(x: Array, eps: float) -> Array:
    """Layer norm without weight (Ba et al. 2016)."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)


# ---------------------------------------------------------------------------------------------------------------------
# Activation functions


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    return np.log1p(np.exp(x))


def relu2(x: Array) -> Array:
    return np.maximum(x, 0) ** 2


def gelu(x: Array) -> Array:
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def gelu_tanh(x: Array) -> Array:
    """The approximation of Hendrycks and Gimpel 2016."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


Gated = Callable[[Array, Array], Array]


def gated(activation: Callable[[Array], Array]) -> Gated:
    """``gated(silu)(gate, up) == silu(gate) * up``."""
    return lambda gate, up: activation(gate) * up


def swiglu_oai(alpha: float, limit: float) -> Gated:
    """The gate clipped from above, the linear part from both sides and 1 more (gpt-oss)."""
    return lambda gate, up: (
        np.minimum(gate, limit) * sigmoid(alpha * np.minimum(gate, limit)) * (np.clip(up, -limit, limit) + 1)
    )


def situ(beta: float, linear_beta: float) -> Gated:
    """Both parts bent towards a limit by tanh (Kimi K3)."""
    return lambda gate, up: beta * np.tanh(gate / beta) * sigmoid(gate) * linear_beta * np.tanh(up / linear_beta)


def clamped_swiglu(limit: float, after: bool) -> Gated:
    """Both parts clipped; the gate before its activation function (DeepSeek V4.1) or after it (Step 3.5)."""
    return lambda gate, up: (
        (np.minimum(silu(gate), limit) if after else silu(np.minimum(gate, limit))) * np.clip(up, -limit, limit)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Experts


@dataclass(frozen=True)
class Part:
    """The parameters below a path."""

    weights: Weights
    path: str

    def __getitem__(self, name: str) -> Array:
        return self.weights[f"{self.path}.{name}"]

    def __contains__(self, name: str) -> bool:
        return f"{self.path}.{name}" in self.weights

    def linear(self, path: str, x: Array) -> Array:
        return self.weights.linear(f"{self.path}.{path}", x)

    def glu(self, path: str, x: Array, activation: Gated) -> Array:
        gate, up = self.linear(f"{path}.gate_proj", x), self.linear(f"{path}.up_proj", x)
        return self.linear(f"{path}.down_proj", activation(gate, up))

    def every(self, path: str, x: Array) -> Array:
        """What each expert's projection makes of x [..., (expert,) in]: [..., expert, out]."""
        y = np.einsum("...ei,eoi->...eo", x, self[f"{path}.weight"])
        return y + self[f"{path}.bias"] if f"{path}.bias" in self else y


@dataclass(frozen=True)
class Rule:
    """How a router makes a choice and its weights of one logit per expert.

    Args:
        score: of the logits.
        bias: added to the scores for the choice only.
        groups: experts are in two groups, of which the better one is kept, by "sum" or "max" of its scores.
        dropped: score of the other group; where it is 0, an expert with a score below 0 is not preferred to it.
        weigh: what the chosen scores become: "sum" (divided by it), "softmax" or "" (as they are).
        scale: multiplies the weights.
    """

    score: Callable[[Array], Array] = lambda x: x
    bias: str = ""
    groups: str = ""
    dropped: float = 0.0
    weigh: str = ""
    scale: float = 1.0

    def preference(self, part: Part, logits: Array) -> Array:
        """What the choice goes by: the experts for which it is highest are chosen."""
        scores = self.score(logits)
        scores = scores + part[self.bias] if self.bias else scores
        if self.groups:
            halves = scores.reshape(*scores.shape[:-1], 2, -1)
            worth = halves.sum(-1) if self.groups == "sum" else halves.max(-1)
            kept = worth == worth.max(-1, keepdims=True)
            scores = np.where(kept[..., None], halves, self.dropped).reshape(scores.shape)
        return scores

    def weights(self, part: Part, logits: Array, indices: Array) -> Array:
        chosen = np.take_along_axis(self.score(logits), indices, axis=-1)
        if self.weigh == "softmax":
            chosen = softmax(chosen)
        if self.weigh == "sum":
            chosen = chosen / chosen.sum(-1, keepdims=True)
        return chosen * self.scale


@dataclass(frozen=True)
class SparseMixer(Rule):
    """PhiMoE (Liu et al. 2023): each of two picks is weighed against the logits that come near it."""

    noise: float = 0.1

    def weights(self, part: Part, logits: Array, indices: Array) -> Array:
        left, found = logits, []
        for k in range(2):
            pick = indices[..., k : k + 1]
            best = np.take_along_axis(logits, pick, axis=-1)
            far = (best - logits) / np.maximum(np.abs(logits), best) > 2 * self.noise
            found.append(np.take_along_axis(softmax(np.where(far, -np.inf, left)), pick, axis=-1))
            left = left.copy()
            np.put_along_axis(left, pick, -np.inf, axis=-1)
        return np.concatenate(found, axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Mixers: what a call gives for x [batch, pos, d_model], and the two things that it keeps for the next call. ``window``:
# the last inputs of the convolution, [batch, width - 1, channels]; ``state``: what the recurrence carries.

Kept = tuple[Array, Array]


def convolution(part: Part, path: str, window: Array, x: Array) -> tuple[Array, Array]:
    """A causal convolution of each channel for itself, and the window after it."""
    kernel, full = part[f"{path}.weight"][..., 0], np.concatenate([window, x], axis=1)
    y = np.stack([(full[:, t : t + kernel.shape[1]] * kernel.T).sum(1) for t in range(x.shape[1])], axis=1)
    return y + part[f"{path}.bias"] if f"{path}.bias" in part else y, full[:, x.shape[1] :]


def mamba(part: Part, x: Array, kept: Kept | None) -> tuple[Array, Kept]:
    """Gu and Dao 2023, with FalconMamba's norms of time step, B and C. ``state``: [batch, channel, state]."""
    a = -np.exp(part["A_log"])
    inner, gate = np.split(part.linear("in_proj", x), 2, axis=-1)
    window, state = kept or (np.zeros((len(x), 3, inner.shape[-1])), np.zeros((len(x), *a.shape)))
    inner, window = convolution(part, "conv1d", window, inner)
    inner, outputs = silu(inner), []
    for u in inner.swapaxes(0, 1):
        step, b, c = (rms_norm(y, 1e-6) for y in np.split(part.linear("x_proj", u), [32, 48], axis=-1))
        step = softplus(part.linear("dt_proj", step))
        state = np.exp(step[..., None] * a) * state + (step * u)[..., None] * b[:, None]
        outputs.append((state * c[:, None]).sum(-1) + part["D"] * u)
    return part.linear("out_proj", silu(gate) * np.stack(outputs, axis=1)), (window, state)


def gated_delta(part: Part, x: Array, kept: Kept | None) -> tuple[Array, Kept]:
    """Yang et al. 2024: what the state says of a key decays, and is moved towards the value.

    2 key heads of 32, 4 value heads of 64; ``state``: [batch, value head, d_value, d_key].
    """
    batch, length, _ = x.shape
    q, k, v, z = np.split(part.linear("in_proj_qkvz", x).reshape(batch, length, 2, 320), [32, 64, 192], axis=-1)
    b, a = np.split(part.linear("in_proj_ba", x).reshape(batch, length, 2, 4), 2, axis=-1)
    mixed = np.concatenate([y.reshape(batch, length, -1) for y in (q, k, v)], axis=-1)
    window, state = kept or (np.zeros((batch, 3, mixed.shape[-1])), np.zeros((batch, 4, 64, 32)))
    mixed, window = convolution(part, "conv1d", window, mixed)
    q, k, v = np.split(silu(mixed), [64, 128], axis=-1)
    q, k = (
        (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6)).repeat(2, axis=2)
        for y in (q.reshape(batch, length, 2, 32), k.reshape(batch, length, 2, 32))
    )
    v, a, b = v.reshape(batch, length, 4, 64), a.reshape(batch, length, 4), b.reshape(batch, length, 4)
    decay, rate, outputs = np.exp(-np.exp(part["A_log"]) * softplus(a + part["dt_bias"])), sigmoid(b), []
    for t in range(length):
        state = state * decay[:, t, :, None, None]
        wrong = v[:, t] - np.einsum("bhvk,bhk->bhv", state, k[:, t])
        state = state + np.einsum("bhv,bhk->bhvk", wrong * rate[:, t, :, None], k[:, t])
        outputs.append(np.einsum("bhvk,bhk->bhv", state, q[:, t]) / np.sqrt(32))
    y = rms_norm(np.stack(outputs, axis=1), 1e-6) * part["norm.weight"]
    y = y * silu(z.reshape(batch, length, 4, 64))
    return part.linear("out_proj", y.reshape(batch, length, -1)), (window, state)


def short_convolution(part: Part, x: Array, kept: Kept | None) -> tuple[Array, Kept]:
    """LFM2: a gated convolution; its window is all that is kept."""
    b, c, inner = np.split(part.linear("in_proj", x), 3, axis=-1)
    window = kept[1] if kept else np.zeros((len(x), 2, inner.shape[-1]))
    y, window = convolution(part, "conv", window, b * inner)
    return part.linear("out_proj", c * y), (window, window)
