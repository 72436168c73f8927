"""A PyTorch checkpoint without PyTorch: weights of a GPT-2-like model, what they compute, a torch that stores them."""

import math
from types import ModuleType
from typing import Any

import numpy as np

SPECIAL = {"<PAD>": 0, "<EOS>": 1, "<BOS>": 2, "<UNK>": 3}
VOCABULARY = SPECIAL | {character: 4 + i for i, character in enumerate(" Helowrd\n")}
CONFIG = {"vocab_size": 13, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 16, "dropout": 0.1}
TORCH = """
import pickle

class Tensor:
    def __init__(self, array): self.array = array
    def float(self): return self
    def numpy(self): return self.array

def save(checkpoint, path):
    with open(path, "wb") as file:
        pickle.dump(checkpoint, file)

def load(path, map_location=None, weights_only=False):
    assert weights_only
    with open(path, "rb") as file:
        checkpoint = pickle.load(file)
    if "model_state_dict" in checkpoint:
        checkpoint["model_state_dict"] = {k: Tensor(v) for k, v in checkpoint["model_state_dict"].items()}
    return checkpoint
"""
"""The source of a module that stands in for PyTorch where checkpoints are written and read; tensors are arrays."""


def torch() -> ModuleType:
    """The stand-in as a module."""
    module = ModuleType("torch")
    exec(TORCH, module.__dict__)
    return module


def random_state(bias: bool = False) -> dict[str, np.ndarray]:
    """A checkpoint's weights, named and shaped as such checkpoints have them."""
    rng = np.random.default_rng(0)
    width, length = CONFIG["n_embd"], CONFIG["block_size"]
    norms, linears = ["ln_f"], {}
    for i in range(CONFIG["n_layer"]):
        norms += [f"h.{i}.ln_1", f"h.{i}.ln_2"]
        linears |= {f"h.{i}.attn.c_attn": (3 * width, width), f"h.{i}.attn.c_proj": (width, width)}
        linears |= {f"h.{i}.ffn.c_fc": (4 * width, width), f"h.{i}.ffn.c_proj": (width, 4 * width)}
    shapes: dict[str, Any] = {"wte.weight": (CONFIG["vocab_size"], width), "wpe.weight": (length, width)}
    shapes |= {f"{name}.weight": (width,) for name in norms} | {f"{name}.weight": s for name, s in linears.items()}
    if bias:
        shapes |= {f"{name}.bias": (width,) for name in norms} | {f"{name}.bias": s[:1] for name, s in linears.items()}
    state = {f"transformer.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    state |= {f"transformer.h.{i}.attn.causal_mask": np.tril(np.ones((1, 1, length, length))) for i in range(2)}
    return state | {"lm_head.weight": state["transformer.wte.weight"]}


def formulas(state: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    """Logits [pos, d_vocab], in float64, of the model whose weights these are."""
    weights = {name.removeprefix("transformer."): value.astype(np.float64) for name, value in state.items()}
    n_heads, n = CONFIG["n_head"], len(ids)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    x = weights["wte.weight"][ids] + weights["wpe.weight"][:n]
    for i in range(CONFIG["n_layer"]):
        q, k, v = (
            part.reshape(n, n_heads, -1).swapaxes(0, 1)
            for part in np.split(linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, axis=-1)
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        shares = np.exp(np.where(np.tril(np.ones((n, n))) > 0, scores, -np.inf))
        z = (shares / shares.sum(-1, keepdims=True)) @ v
        x = x + linear(z.swapaxes(0, 1).reshape(n, -1), f"h.{i}.attn.c_proj")
        h = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.ffn.c_fc")
        h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        x = x + linear(h, f"h.{i}.ffn.c_proj")
    return norm(x, "ln_f") @ weights["lm_head.weight"].T
