"""An independent oracle: the forward pass of llama, qwen2, qwen3 and gpt2, from the formulas, in NumPy float64.

It shares no code with the engine or mlx-lm. ``edits`` replaces a value at a hook point on the way, so that what an
edit should do can be computed without the engine.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

Edit = Callable[[np.ndarray], np.ndarray]


def forward(model: nn.Module, tokens: list[list[int]], edits: dict[str, Edit] | None = None) -> dict[str, np.ndarray]:
    """Every hook point's value by canonical name, for tokens [batch, pos]."""
    return _Reference(model, edits or {}).run(np.array(tokens))


class _Reference:
    def __init__(self, model: nn.Module, edits: dict[str, Edit]) -> None:
        self.args = model.args
        self.kind = model.args.model_type
        self.weights = {
            name: np.array(value.astype(mx.float32)).astype(np.float64)
            for name, value in tree_flatten(model.parameters())
        }
        self.edits = edits
        self.values: dict[str, np.ndarray] = {}

    def put(self, name: str, value: np.ndarray) -> np.ndarray:
        if name in self.edits:
            value = self.edits[name](value)
        self.values[name] = value
        return value

    def linear(self, path: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.weights[f"{path}.weight"].T
        return y + self.weights[f"{path}.bias"] if f"{path}.bias" in self.weights else y

    def norm(self, path: str, x: np.ndarray) -> np.ndarray:
        weight = self.weights[f"{path}.weight"]
        if self.kind == "gpt2":
            x = x - x.mean(-1, keepdims=True)
            eps = self.args.layer_norm_epsilon
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight + self.weights[f"{path}.bias"]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.args.rms_norm_eps) * weight

    def run(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        gpt2 = self.kind == "gpt2"
        blocks, embed = ("model.h", "model.wte") if gpt2 else ("model.layers", "model.embed_tokens")
        tokens = self.put("embed.hook_in", tokens)
        x = self.put("hook_embed", self.weights[f"{embed}.weight"][tokens])
        if gpt2:
            x = x + self.put("hook_pos_embed", self.weights["model.wpe.weight"][: tokens.shape[1]])
        n_layers = self.args.n_layer if gpt2 else self.args.num_hidden_layers
        for i in range(n_layers):
            x = self.block(f"{blocks}.{i}", f"blocks.{i}", x)
        x = self.put("ln_final.hook_in", x)
        x = self.put("ln_final.hook_normalized", self.norm("model.ln_f" if gpt2 else "model.norm", x))
        head = "lm_head.weight" if "lm_head.weight" in self.weights else f"{embed}.weight"
        self.put("hook_logits", x @ self.weights[head].T)
        return self.values

    def block(self, path: str, at: str, x: np.ndarray) -> np.ndarray:
        gpt2 = self.kind == "gpt2"
        ln1, ln2, attn = (
            ("ln_1", "ln_2", "attn") if gpt2 else ("input_layernorm", "post_attention_layernorm", "self_attn")
        )
        pre = self.put(f"{at}.hook_resid_pre", x)
        h = self.put(f"{at}.ln1.hook_in", pre)
        h = self.put(f"{at}.ln1.hook_normalized", self.norm(f"{path}.{ln1}", h))
        out = self.put(f"{at}.hook_attn_out", self.attention(f"{path}.{attn}", f"{at}.attn", h))
        mid = self.put(f"{at}.hook_resid_mid", pre + out)
        h = self.put(f"{at}.ln2.hook_in", mid)
        h = self.put(f"{at}.ln2.hook_normalized", self.norm(f"{path}.{ln2}", h))
        out = self.put(f"{at}.hook_mlp_out", self.mlp(f"{path}.mlp", f"{at}.mlp", h))
        return self.put(f"{at}.hook_resid_post", mid + out)

    def attention(self, path: str, at: str, x: np.ndarray) -> np.ndarray:
        x = self.put(f"{at}.hook_in", x)
        args = self.args
        n_heads = args.n_head if self.kind == "gpt2" else args.num_attention_heads
        n_kv = args.num_key_value_heads
        batch, length, _ = x.shape
        if self.kind == "gpt2":
            q, k, v = np.split(self.linear(f"{path}.c_attn", x), 3, axis=-1)
        else:
            q, k, v = (self.linear(f"{path}.{name}_proj", x) for name in "qkv")
        q = self.put(f"{at}.hook_q", q.reshape(batch, length, n_heads, -1))
        k = self.put(f"{at}.hook_k", k.reshape(batch, length, n_kv, -1))
        v = self.put(f"{at}.hook_v", v.reshape(batch, length, n_kv, -1))
        if self.kind == "qwen3":
            q, k = self.norm(f"{path}.q_norm", q), self.norm(f"{path}.k_norm", k)
        if self.kind != "gpt2":
            q, k = self.rotate(q), self.rotate(k)
        q, k = self.put(f"{at}.hook_rot_q", q), self.put(f"{at}.hook_rot_k", k)
        group = n_heads // n_kv
        scores = np.einsum("bqhd,bkhd->bhqk", q, k.repeat(group, axis=2)) / np.sqrt(q.shape[-1])
        future = np.triu(np.ones((length, length), dtype=bool), k=1)
        scores = self.put(f"{at}.hook_attn_scores", np.where(future, -np.inf, scores))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        pattern = self.put(f"{at}.hook_pattern", weights / weights.sum(-1, keepdims=True))
        z = self.put(f"{at}.hook_z", np.einsum("bhqk,bkhd->bqhd", pattern, v.repeat(group, axis=2)))
        return self.linear(f"{path}.{'c_proj' if self.kind == 'gpt2' else 'o_proj'}", z.reshape(batch, length, -1))

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding, half-split layout (Su et al. 2021; the layout is GPT-NeoX's)."""
        half = x.shape[-1] // 2
        angles = np.arange(x.shape[1])[:, None] * 10000.0 ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None, :], np.sin(angles)[:, None, :]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def mlp(self, path: str, at: str, x: np.ndarray) -> np.ndarray:
        x = self.put(f"{at}.hook_in", x)
        if self.kind == "gpt2":
            pre = self.put(f"{at}.hook_pre", self.linear(f"{path}.c_fc", x))
            cubic = np.sqrt(2 / np.pi) * (pre + 0.044715 * pre**3)
            post = self.put(f"{at}.hook_post", 0.5 * pre * (1 + np.tanh(cubic)))
            return self.linear(f"{path}.c_proj", post)
        gate = self.put(f"{at}.hook_pre", self.linear(f"{path}.gate_proj", x))
        up = self.put(f"{at}.hook_pre_linear", self.linear(f"{path}.up_proj", x))
        post = self.put(f"{at}.hook_post", gate / (1 + np.exp(-gate)) * up)
        return self.linear(f"{path}.down_proj", post)
