"""A mixture of experts whose router is set by hand: which experts a token goes to, and with what weight, is known.

It is mlx-lm's ``mixtral``. The stream is a direct sum of one-hots, ``token`` (the embedding), ``said`` (what experts
write), and a ballast B = 2^14 that the embedding writes; the norms' weights are B / sqrt(d_model), so that a norm is a
scaling by 1 within 1e-6, whatever is written, and the last one hands on ``said`` alone. Attention writes
nothing.

**Router** of layer l: the score of expert ``first(t)`` is 3 for token t, that of ``second(l, t)`` is 3 less the gap of
the token, all others 0. Two experts are chosen, so their weights are 1 / (1 + exp(-gap)) and the rest.

**Expert** e writes the token ``(t + shift of e) mod V`` for token t: a neuron per token, silu(GATE) times the token,
divided by silu(GATE) on the way out. The unembedding is SAY times ``said``: the logits are SAY times the weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from mlx_lm.models import mixtral

from .known import KnownModel, check_whole
from .transformer import Stream

BALLAST = 2.0**14
EPSILON = 1e-5
GATE = 4.0
SHIFTS = (1, 4, 6, 9)
"""By expert."""
LEVEL = 3.0
"""The score of a token's first expert."""


@dataclass(frozen=True)
class KnownRouter(KnownModel):
    """The construction for a vocabulary of 10 tokens or more; two layers of four experts, of which two are chosen.

    Raises:
        HookError: for fewer tokens.
    """

    name: ClassVar[str] = "planted_router"
    description: ClassVar[str] = "A mixture of experts in which the experts and weights of every token are known."
    notes: ClassVar[str] = (
        "Zeros are no ablation here: the embedding has a ballast that keeps the norms constant. Heads write nothing. "
        "All experts of a layer are one node."
    )
    kinds: ClassVar[tuple[str, ...]] = ("last",)
    LENGTH: ClassVar[int] = 6
    SAY: ClassVar[float] = 10.0

    vocabulary: int = 12
    n_layers: ClassVar[int] = 2
    n_experts: ClassVar[int] = 4

    def __post_init__(self) -> None:
        # The experts' shifts are different tokens.
        check_whole("vocabulary", self.vocabulary, max(SHIFTS) + 1)

    def experts(self, layer: int, token: int) -> tuple[int, int]:
        """A token's experts in a layer: the one with more weight, which is the same in all layers, and another."""
        first = token % self.n_experts
        return first, (first + 1 + (token // self.n_experts + layer) % (self.n_experts - 1)) % self.n_experts

    def weights_of(self, token: int) -> tuple[float, float]:
        """The weights of its two experts, in that order."""
        first = 1 / (1 + np.exp(-self._gap(token)))
        return first, 1 - first

    def _gap(self, token: int) -> float:
        return 0.5 + token / self.vocabulary

    def closed_form(self, tokens: Sequence[int], without: tuple[int, int] | None = None) -> np.ndarray:
        """The logits [pos, d_vocab], float64; ``without`` is a (layer, expert) that gives nothing."""
        logits = np.zeros((len(tokens), self.vocabulary))
        for row, token in zip(logits, tokens, strict=True):
            for layer in range(self.n_layers):
                for expert, weight in zip(self.experts(layer, token), self.weights_of(token), strict=True):
                    if (layer, expert) != without:
                        row[(token + SHIFTS[expert]) % self.vocabulary] += self.SAY * weight
        return logits

    def module(self) -> mixtral.Model:
        n_tokens, n_experts = self.vocabulary, self.n_experts
        # Of an even width: the heads divide it, and have an even width themselves.
        stream = Stream(token=n_tokens, said=n_tokens, ballast=4 + -2 * n_tokens % 4)
        token, said, d_model = stream["token"], stream["said"], stream.d_model
        sizes = {"hidden_size": d_model, "intermediate_size": n_tokens, "num_hidden_layers": self.n_layers}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": n_tokens, "rms_norm_eps": EPSILON}
        experts = {"num_local_experts": n_experts, "num_experts_per_tok": 2, "tie_word_embeddings": False}
        model = mixtral.Model(mixtral.ModelArgs(model_type="mixtral", **sizes, **heads, **experts))
        norm = np.full(d_model, BALLAST / np.sqrt(d_model))
        reads_token = norm * token.any(axis=0)
        weights = {
            "model.embed_tokens.weight": token + BALLAST * stream["ballast"][0],
            "model.norm.weight": norm * said.any(axis=0),
            "lm_head.weight": self.SAY * said,
        }
        silu = GATE / (1 + np.exp(-GATE))
        for layer in range(self.n_layers):
            block = f"model.layers.{layer}"
            scores = np.zeros((n_experts, n_tokens))
            for t in range(n_tokens):
                first, second = self.experts(layer, t)
                scores[first, t], scores[second, t] = LEVEL, LEVEL - self._gap(t)
            moe = f"{block}.block_sparse_moe"
            weights |= {f"{block}.self_attn.{name}_proj.weight": np.zeros((d_model, d_model)) for name in "qkvo"}
            weights |= {
                f"{block}.input_layernorm.weight": reads_token,
                f"{block}.post_attention_layernorm.weight": reads_token,
                f"{moe}.gate.weight": scores @ token,
                f"{moe}.switch_mlp.gate_proj.weight": np.tile(GATE * stream.any_of("token"), (n_experts, n_tokens, 1)),
                f"{moe}.switch_mlp.up_proj.weight": np.tile(token, (n_experts, 1, 1)),
                f"{moe}.switch_mlp.down_proj.weight": np.stack(
                    [np.roll(said, -shift, axis=0).T / silu for shift in SHIFTS]
                ),
            }
        model.load_weights([(name, mx.array(value.astype(np.float32))) for name, value in weights.items()])
        mx.eval(model.parameters())
        return model

    def pair(self, rng: np.random.Generator, kind: str) -> dict[str, Any]:
        while True:
            clean = rng.integers(0, self.vocabulary, self.LENGTH).tolist()
            corrupted = [*clean[:-1], int(rng.integers(0, self.vocabulary))]
            answer, wrong = (int(self.closed_form(tokens[-1:])[0].argmax()) for tokens in (clean, corrupted))
            if answer != wrong:
                return {"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": wrong}

    @property
    def true_edges(self) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        layers = range(self.n_layers)
        edges = (*(f"embed->L{i} mlp" for i in layers), *(f"L{i} mlp->logits" for i in layers))
        return {"corrupted": {"last": edges}}
