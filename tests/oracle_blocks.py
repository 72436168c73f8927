"""An independent oracle of what stands in a block besides attention: formulas in NumPy float64, weights as they are.

Nothing here calls the engine or an MLX kernel. ``Weights`` reads a model's parameters by path, quantised ones
dequantised bit by bit.
"""

import math
from collections.abc import Callable

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
