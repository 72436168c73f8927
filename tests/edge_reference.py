"""An independent oracle: runs of known models with single edges replaced, from the formulas, in NumPy float64.

It shares no code with the engine or the models; it reads the parameters of what is built.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

Values = dict[str, np.ndarray]
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "linear": lambda x: x,
    "gelu": lambda x: np.zeros_like(x),  # of models whose MLPs are 0
}


class EdgeReference:
    """Exact runs of a module of ``known_models`` that has heads and plain MLPs."""

    def __init__(self, module: nn.Module) -> None:
        flat = tree_flatten(module.parameters())
        self.weights = {name: np.array(value.astype(mx.float32)).astype(np.float64) for name, value in flat}
        self.args = module.args
        self.bigcode = module.args.model_type == "gpt_bigcode"
        self.n_layers = len(module.layers)
        self.n_heads = self.args.n_head if self.bigcode else self.args.num_attention_heads
        self.trunk = "transformer" if self.bigcode else "model"
        self.has_mlp = self.bigcode or bool(self.args.intermediate_size)

    @classmethod
    def of(cls, module: nn.Module) -> "EdgeReference":
        return (RouterReference if module.args.model_type == "mixtral" else cls)(module)

    @property
    def edges(self) -> list[str]:
        """Every edge in forward order."""
        return [f"{source}->{name}" for name, sources in self.inputs.items() for source in sources]

    @cached_property
    def inputs(self) -> dict[str, list[str]]:
        """The sources that each input reads."""
        found: dict[str, list[str]] = {}
        sources = ["embed"]
        for layer in range(self.n_layers):
            heads = [f"L{layer}H{head}" for head in range(self.n_heads)]
            found |= {f"{head}<{kind}>": list(sources) for head in heads for kind in "qkv"}
            sources += heads
            if self.has_mlp:
                found[f"L{layer} mlp"] = list(sources)
                sources.append(f"L{layer} mlp")
        return found | {"logits": sources}

    def run(self, tokens: Sequence[int], replaced: Mapping[str, np.ndarray] | None = None) -> tuple[np.ndarray, Values]:
        """Logits [pos, d_vocab] and what each node writes [pos, d_model], with edges carrying other values."""
        replaced = replaced or {}
        written = {"embed": self.embedded(tokens)}

        def read(name: str) -> np.ndarray:
            return sum(replaced.get(f"{source}->{name}", written[source]) for source in self.inputs[name])

        for layer in range(self.n_layers):
            heads = {}
            for head in range(self.n_heads):
                here = f"L{layer}H{head}"
                reads = (self.norm(layer, 1, read(f"{here}<{kind}>")) for kind in "qkv")
                heads[here] = self.attend(layer, head, *reads)
            written |= heads
            if self.has_mlp:
                here = f"L{layer} mlp"
                written[here] = self.mlp(layer, self.norm(layer, 2, read(here)))
        last = self.norm(None, 0, read("logits"))
        return last @ self.weights["lm_head.weight"].T + self.weights.get("lm_head.bias", 0), written

    def embedded(self, tokens: Sequence[int]) -> np.ndarray:
        embeddings = ("wte", "wpe") if self.bigcode else ("embed_tokens", "wpe")
        words, places = (self.weights[f"{self.trunk}.{name}.weight"] for name in embeddings)
        return words[list(tokens)] + places[: len(tokens)]

    def attend(self, layer: int, head: int, *reads: np.ndarray) -> np.ndarray:
        """What a head writes whose queries, keys and values read these streams."""
        q, k, v = (self.project(layer, head, kind, x) for kind, x in zip("qkv", reads, strict=True))
        n = len(q)
        scores = np.where(np.tril(np.ones((n, n), bool)), q @ k.T * self.scale(q.shape[-1]), -np.inf)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        pattern /= pattern.sum(-1, keepdims=True)
        return pattern @ v @ self.output(layer, head, v.shape[-1])

    def scale(self, d_head: int) -> float:
        return d_head**-0.5 if self.bigcode else 1.0

    def project(self, layer: int, head: int, kind: str, x: np.ndarray) -> np.ndarray:
        if self.bigcode:
            path = f"transformer.h.{layer}.attn.c_attn"
            of_kind = np.split(self.weights[f"{path}.weight"], 3)["qkv".index(kind)]
            bias = np.split(self.weights[f"{path}.bias"], 3)["qkv".index(kind)]
            return x @ np.split(of_kind, self.n_heads)[head].T + np.split(bias, self.n_heads)[head]
        weight = self.weights[f"model.layers.{layer}.self_attn.{kind}_proj.weight"]
        return x @ np.split(weight, self.n_heads)[head].T

    def output(self, layer: int, head: int, d_head: int) -> np.ndarray:
        path = f"transformer.h.{layer}.attn.c_proj" if self.bigcode else f"model.layers.{layer}.self_attn.o_proj"
        return self.weights[f"{path}.weight"].T[head * d_head : (head + 1) * d_head]

    def mlp(self, layer: int, x: np.ndarray) -> np.ndarray:
        if self.bigcode:
            assert not self.weights[f"transformer.h.{layer}.mlp.c_proj.weight"].any()
            return np.zeros_like(x)
        path = f"model.layers.{layer}.mlp"
        hidden = ACTIVATIONS[self.args.hidden_act](x @ self.weights[f"{path}.up_proj.weight"].T)
        return hidden @ self.weights[f"{path}.down_proj.weight"].T

    def norm(self, layer: int | None, which: int, x: np.ndarray) -> np.ndarray:
        if not self.bigcode:
            return x
        path = "transformer.ln_f" if layer is None else f"transformer.h.{layer}.ln_{which}"
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + self.args.layer_norm_epsilon)
        return centred / scale * self.weights[f"{path}.weight"] + self.weights[f"{path}.bias"]

    def effects(self, pairs: Sequence[Mapping], ablation: str) -> dict[str, np.ndarray]:
        """How much the answer's logit difference changes with each edge alone replaced, by edge [pair]."""
        found: dict[str, list[float]] = {edge: [] for edge in self.edges}
        runs = [self.run(pair["clean"]) for pair in pairs]
        for pair, (logits, written) in zip(pairs, runs, strict=True):

            def difference(logits: np.ndarray, pair: Mapping = pair) -> float:
                return float(logits[-1, pair["answer"]] - logits[-1, pair["wrong"]])

            if ablation == "zero":
                other = {name: np.zeros_like(value) for name, value in written.items()}
            elif ablation == "mean":
                other = {name: np.mean([one[name] for _, one in runs], axis=0) for name in written}
            else:
                assert ablation == "corrupted"
                other = self.run(pair["corrupted"])[1]
            for edge in self.edges:
                value = other[edge.partition("->")[0]]
                edited, _ = self.run(pair["clean"], {edge: value})
                found[edge].append(difference(edited) - difference(logits))
        return {edge: np.array(values) for edge, values in found.items()}


class RouterReference(EdgeReference):
    """The same of mixtral with attention that writes nothing."""

    def embedded(self, tokens: Sequence[int]) -> np.ndarray:
        return self.weights["model.embed_tokens.weight"][list(tokens)]

    def attend(self, layer: int, head: int, *reads: np.ndarray) -> np.ndarray:
        assert not self.weights[f"model.layers.{layer}.self_attn.o_proj.weight"].any()
        return np.zeros_like(reads[0])

    def norm(self, layer: int | None, which: int, x: np.ndarray) -> np.ndarray:
        name = ("", "input_layernorm", "post_attention_layernorm")[which]
        path = "model.norm" if layer is None else f"model.layers.{layer}.{name}"
        scale = np.sqrt((x**2).mean(-1, keepdims=True) + self.args.rms_norm_eps)
        return x / scale * self.weights[f"{path}.weight"]

    def mlp(self, layer: int, x: np.ndarray) -> np.ndarray:
        moe = f"model.layers.{layer}.block_sparse_moe"
        gate, up, down = (self.weights[f"{moe}.switch_mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        written = np.zeros_like(x)
        for row, out in zip(x, written, strict=True):
            scores = self.weights[f"{moe}.gate.weight"] @ row
            chosen = np.argsort(-scores)[: self.args.num_experts_per_tok]
            shares = np.exp(scores[chosen] - scores[chosen].max())
            for expert, share in zip(chosen, shares / shares.sum(), strict=True):
                gated = gate[expert] @ row
                out += share * down[expert] @ (gated / (1 + np.exp(-gated)) * (up[expert] @ row))
        return written
