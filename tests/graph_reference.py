"""An independent oracle of edges: the forward pass of llama, qwen2, qwen3 and gpt2 as a graph, in NumPy float64.

Each input sums up what it reads, node by node, so that any edge can carry something else. It shares no code with the
engine; of the formulas it uses those of ``reference.py``.
"""

from collections.abc import Mapping

import mlx.nn as nn
import numpy as np
from reference import _Reference

Written = dict[str, np.ndarray]
"""What nodes write [batch, pos, d_model] by name."""


class GraphReference(_Reference):
    """The model as a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, {})
        gpt2 = self.kind == "gpt2"
        self.n_layers = self.args.n_layer if gpt2 else self.args.num_hidden_layers
        self.n_heads = self.args.n_head if gpt2 else self.args.num_attention_heads
        self.n_kv = self.n_heads if gpt2 else self.args.num_key_value_heads
        self.root = "model.h" if gpt2 else "model.layers"

    def run_with(self, tokens: list[list[int]], carried: Mapping[str, np.ndarray] = {}) -> tuple[Written, np.ndarray]:
        """What the nodes write and the logits [batch, pos, d_vocab], with some edges carrying something else.

        Args:
            carried: [batch, pos, d_model] by the edge's name.
        """
        gpt2, ids = self.kind == "gpt2", np.array(tokens)
        embed = "model.wte" if gpt2 else "model.embed_tokens"
        x = self.weights[f"{embed}.weight"][ids]
        if gpt2:
            x = x + self.weights["model.wpe.weight"][: ids.shape[1]]
        written: Written = {"embed": x}

        def read(name: str) -> np.ndarray:
            parts = [carried.get(f"{source}->{name}", value) for source, value in written.items()]
            return np.sum(parts, axis=0) + constant

        constant = np.zeros(x.shape[-1])
        for layer in range(self.n_layers):
            added, bias = self._attend(layer, read)
            written |= added
            constant = constant + bias
            written[f"L{layer} mlp"] = self._multiply(layer, read(f"L{layer} mlp"))
        stream = self.norm("model.ln_f" if gpt2 else "model.norm", read("logits"))
        head = "lm_head.weight" if "lm_head.weight" in self.weights else f"{embed}.weight"
        return written, stream @ self.weights[head].T

    def _multiply(self, layer: int, stream: np.ndarray) -> np.ndarray:
        path = f"{self.root}.{layer}"
        norm = "ln_2" if self.kind == "gpt2" else "post_attention_layernorm"
        return self.mlp(f"{path}.mlp", "", self.norm(f"{path}.{norm}", stream))

    def _attend(self, layer: int, read) -> tuple[Written, np.ndarray]:
        gpt2, path = self.kind == "gpt2", f"{self.root}.{layer}"
        attn = f"{path}.attn" if gpt2 else f"{path}.self_attn"
        made: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": []}
        for place, kind in enumerate("qkv"):
            for head in range(self.n_heads if kind == "q" else self.n_kv):
                grouped = kind != "q" and self.n_kv != self.n_heads
                stream = read(f"L{layer}{'KV' if grouped else 'H'}{head}<{kind}>")
                normed = self.norm(f"{path}.{'ln_1' if gpt2 else 'input_layernorm'}", stream)
                if gpt2:
                    whole = np.split(self.linear(f"{attn}.c_attn", normed), 3, axis=-1)[place]
                else:
                    whole = self.linear(f"{attn}.{kind}_proj", normed)
                n = self.n_heads if kind == "q" else self.n_kv
                value = whole.reshape(*whole.shape[:2], n, -1)[:, :, head]
                if self.kind == "qwen3" and kind != "v":
                    value = self.norm(f"{attn}.{kind}_norm", value)
                made[kind].append(value if gpt2 or kind == "v" else self.rotate(value[:, :, None])[:, :, 0])
        length = made["q"][0].shape[1]
        future = np.triu(np.ones((length, length), dtype=bool), k=1)
        out = "c_proj" if gpt2 else "o_proj"
        weight, found = self.weights[f"{attn}.{out}.weight"], {}
        for head in range(self.n_heads):
            group = head * self.n_kv // self.n_heads
            q, k, v = made["q"][head], made["k"][group], made["v"][group]
            scores = np.where(future, -np.inf, q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
            pattern = np.exp(scores - scores.max(-1, keepdims=True))
            z = pattern / pattern.sum(-1, keepdims=True) @ v
            width = z.shape[-1]
            found[f"L{layer}H{head}"] = z @ weight[:, head * width : (head + 1) * width].T
        return found, self.weights.get(f"{attn}.{out}.bias", np.zeros(weight.shape[0]))
