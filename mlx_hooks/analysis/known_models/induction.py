"""A model whose every number is known: two layers of attention that find what followed a token before.

``KnownInduction().model()`` is mlx-lm's ``gpt_bigcode`` (learned positions, LayerNorm, biases, an unembedding of its
own) with weights set by hand; ``closed_form`` says in NumPy float64 what its hook points hold, from formulas alone. The
construction, so that it can be recomputed:

**The stream** is a direct sum of one-hots. For a vocabulary of V tokens and P positions it has, in this order,

    token     V + 1      dimension t is 1 for token t                      written by the token embedding
    position  P + 1      dimension p is 1 at position p                    written by the position embedding
    previous  V + 1      dimension t is 1 where t was the token before     written by ``previous_head`` of layer 0
    output    V + 1      dimension t is 1 where t is to come               written by ``induction_head`` of layer 1
    ballast   2          B and -B, with B = 1024                           written by the position embedding
    spare     the rest   0, so that the heads divide the width

The last dimension of each of the first four is minus the sum of its others, so everything that is written has mean 0.

**LayerNorm** is then a scaling alone. Its weight is B sqrt(2 / d_model), 0 on the ballast, its bias 0. So it multiplies
all but the ballast by ``g = 1 / sqrt(1 + (s + d_model eps) / (2 B^2))``, where s is the sum of squares of all but the
ballast. g is 1 within 2e-6 whatever is written, so no part of the model feels another one through the norm. The last
norm's weight is FINAL = 4 times that of the others.

**Attention** divides by sqrt(d_head); the query's weights multiply by it. So the scores are these, times the g of each
side's position:

    previous_head of layer 0    PREVIOUS = 17 ln 2 from position q to key q - 1, else 0.
                                Value: the token, written to `previous`.
    induction_head of layer 1   MATCH = 34 ln 2 times the share of the query's token in the key's `previous`, plus
                                REST = 17 ln 2 (the query's side of it is a bias) at key 0.
                                Value: the token, written to `output`; token 0 has no value.
    all other heads             0, so uniform attention; values and output 0.

A key that is not meant gets 2^-17 of the weight of one that is. (A power of 2, since float32 adds these exactly to 1.)
So position q looks back by 1 / (1 + q 2^-17), 0.9995 at the least. The induction head shares itself between the tokens
that followed earlier occurrences of its own token, equally; where there are none it rests on position 0, and writes
nothing. Sequences begin with token 0, which does not come again: position 0 is its own "token before". The only edge
between heads of the two layers is from ``previous_head`` to the keys of ``induction_head``.

**MLPs** have weights and biases 0. **The unembedding** is UNEMBED = 4 times the `output` part, so a logit is 16 times
what was written there: where the induction head has nothing to say, all logits are 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from mlx_lm.models import gpt_bigcode

from ...selftest import LENGTH as TESTED
from .known import KnownModel, causal_softmax, check_heads, check_whole, distinct

BALLAST = 1024.0
EPSILON = 1e-5
PREVIOUS = 17 * np.log(2)
MATCH = 34 * np.log(2)
REST = 17 * np.log(2)
FINAL = 4.0
UNEMBED = 4.0
WORDS = 3
"""Different words that a prompt has at the least."""
START = 0
"""The token that sequences begin with, and that has no value in the induction head."""


@dataclass(frozen=True)
class KnownInduction(KnownModel):
    """The construction for a vocabulary, a greatest length and a number of heads per layer.

    Raises:
        HookError: for fewer tokens or positions than prompts need, and heads that are not there.
    """

    name: ClassVar[str] = "induction"
    description: ClassVar[str] = "A previous-token head and an induction head that reads it through its keys."
    notes: ClassVar[str] = (
        "Zeros are no ablation here: the stream has a ballast that keeps its norms constant. Each kind of prompts "
        "shows other edges: 'match' corrupts the token that came before the answer, 'question' the last token, 'value' "
        "the token that is to be repeated."
    )
    kinds: ClassVar[tuple[str, ...]] = ("match", "question", "value")

    vocabulary: int = 16
    length: int = 64
    n_heads: int = 2
    previous_head: int = 1
    induction_head: int = 0

    def __post_init__(self) -> None:
        check_whole("vocabulary", self.vocabulary, WORDS + 3)
        # The self-test asks it at so many positions, which is more than the shortest prompts have.
        check_whole("length", self.length, max(WORDS + 2, TESTED))
        check_heads(self, "previous_head", "induction_head")

    # Where things stand in the stream.

    @property
    def _used(self) -> int:
        return 3 * (self.vocabulary + 1) + (self.length + 1) + 2

    @property
    def d_head(self) -> int:
        """Room for a token and the rest (layer 1), or a position (layer 0), and for the whole stream in all heads."""
        return max(self.vocabulary + 1, self.length, -(-self._used // self.n_heads))

    @property
    def d_model(self) -> int:
        return self.n_heads * self.d_head

    def one_hots(self, part: str) -> np.ndarray:
        """What is written for each token, or position, in one part of the stream, [token or position, d_model]."""
        sizes = {"token": self.vocabulary, "position": self.length, "previous": self.vocabulary}
        sizes["output"] = self.vocabulary
        names = list(sizes)
        start = sum(sizes[name] + 1 for name in names[: names.index(part)])
        rows = np.zeros((sizes[part], self.d_model))
        rows[:, start : start + sizes[part]] = np.eye(sizes[part])
        rows[:, start + sizes[part]] = -1
        return rows

    def read(self, part: str) -> np.ndarray:
        """What reads the one-hots of a part, and not what balances them, [token or position, d_model]."""
        return np.maximum(self.one_hots(part), 0)

    @property
    def ballast(self) -> np.ndarray:
        """[d_model]"""
        row = np.zeros(self.d_model)
        row[self._used - 2 : self._used] = BALLAST, -BALLAST
        return row

    # The model.

    def model(self) -> gpt_bigcode.Model:
        """mlx-lm's model with these weights, float32."""
        sizes = {"n_embd": self.d_model, "n_layer": 2, "n_inner": 4, "n_head": self.n_heads, "n_positions": self.length}
        args = {"model_type": "gpt_bigcode", "vocab_size": self.vocabulary, "layer_norm_epsilon": EPSILON}
        options = {"multi_query": False, "tie_word_embeddings": False}
        model = gpt_bigcode.Model(gpt_bigcode.ModelArgs(**sizes, **args, **options))
        model.load_weights([(name, mx.array(value.astype(np.float32))) for name, value in self.weights().items()])
        mx.eval(model.parameters())
        return model

    def weights(self) -> dict[str, np.ndarray]:
        """Every parameter by its name in mlx-lm, float64."""
        norm = np.where(self.ballast == 0, BALLAST * np.sqrt(2 / self.d_model), 0)
        weights = {
            "transformer.wte.weight": self.one_hots("token"),
            "transformer.wpe.weight": self.one_hots("position") + self.ballast,
            "transformer.ln_f.weight": FINAL * norm,
            "transformer.ln_f.bias": np.zeros(self.d_model),
            "lm_head.weight": UNEMBED * self.read("output"),
        }
        for layer, attention in enumerate((self._previous_token_layer(), self._induction_layer())):
            block = f"transformer.h.{layer}"
            weights |= {f"{block}.attn.{name}": value for name, value in attention.items()}
            for name in ("ln_1", "ln_2"):
                weights |= {f"{block}.{name}.weight": norm, f"{block}.{name}.bias": np.zeros(self.d_model)}
            weights |= {
                f"{block}.mlp.c_fc.weight": np.zeros((4, self.d_model)),
                f"{block}.mlp.c_fc.bias": np.zeros(4),
                f"{block}.mlp.c_proj.weight": np.zeros((self.d_model, 4)),
                f"{block}.mlp.c_proj.bias": np.zeros(self.d_model),
            }
        return weights

    def _previous_token_layer(self) -> dict[str, np.ndarray]:
        positions, shift = self.read("position"), np.eye(self.length, k=1)  # dimension p is 1 at position p + 1
        query = PREVIOUS * shift @ positions
        return self._layer(self.previous_head, query, positions, self.read("token"), self.one_hots("previous"))

    def _induction_layer(self) -> dict[str, np.ndarray]:
        value = self.read("token")
        value[START] = 0
        key = np.vstack([self.read("previous"), self.read("position")[:1]])
        layer = self._layer(self.induction_head, MATCH * self.read("token"), key, value, self.one_hots("output"))
        # The query has no token for the last dimension of the key: a bias stands there.
        rest = self.induction_head * self.d_head + self.vocabulary
        layer["c_attn.bias"][rest] = REST * np.sqrt(self.d_head)
        return layer

    def _layer(
        self, head: int, query: np.ndarray, key: np.ndarray, value: np.ndarray, write: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Weights with one head; what it reads by and what it writes are [d_head or less, d_model]."""
        joint = np.zeros((3, self.n_heads, self.d_head, self.d_model))
        output = np.zeros((self.n_heads, self.d_head, self.d_model))
        for place, rows in (
            (joint[0, head], query * np.sqrt(self.d_head)),
            (joint[1, head], key),
            (joint[2, head], value),
            (output[head], write),
        ):
            place[: len(rows)] = rows
        return {
            "c_attn.weight": joint.reshape(3 * self.d_model, self.d_model),
            "c_attn.bias": np.zeros(3 * self.d_model),
            "c_proj.weight": output.reshape(self.d_model, self.d_model).T,
            "c_proj.bias": np.zeros(self.d_model),
        }

    def module(self) -> gpt_bigcode.Model:
        return self.model()

    # What it is about.

    def pair(self, rng: np.random.Generator, kind: str) -> dict[str, Any]:
        """Different words, 10 where there is room, and one of them again: the answer is what followed it."""
        n_words = min(10, self.vocabulary - 3, self.length - 2)
        words = distinct(rng, range(START + 1, self.vocabulary), n_words + 1)
        new = words.pop()
        i, j = distinct(rng, range(n_words - 1), 2)
        clean, wrong = [START, *words, words[i]], words[j + 1]
        corrupted = list(clean)
        if kind == "match":
            corrupted[1 + i] = new
        elif kind == "question":
            corrupted[-1] = words[j]
        else:
            corrupted[2 + i] = wrong = new
        return {"clean": clean, "corrupted": corrupted, "answer": words[i + 1], "wrong": wrong}

    @property
    def true_edges(self) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        previous, induction = f"L0H{self.previous_head}", f"L1H{self.induction_head}"
        says = f"{induction}->logits"
        by_kind = {
            "match": (f"embed->{previous}<v>", f"{previous}->{induction}<k>", says),
            "question": (f"embed->{induction}<q>", says),
            "value": (f"embed->{induction}<v>", says),
        }
        return {"corrupted": by_kind}

    # What it computes.

    def gain(self, squares: np.ndarray | float) -> np.ndarray:
        """LayerNorm's factor for a stream of this sum of squares beside the ballast."""
        return 1 / np.sqrt(1 + (np.asarray(squares) + self.d_model * EPSILON) / (2 * BALLAST**2))

    def closed_form(self, tokens: Sequence[int], *, previous: bool = True) -> dict[str, np.ndarray]:
        """The hook points' values for one sequence by canonical name, float64, without the batch axis.

        Args:
            tokens: ids [pos].
            previous: False where layer 0's previous-token head writes nothing.

        Returns:
            patterns [head, query, key], the stream and what is added to it [pos, d_model], logits [pos, d_vocab].
        """
        ids, n = np.asarray(tokens), len(tokens)
        one_hot = np.eye(self.vocabulary)[ids]
        at = np.arange(n)
        gain = self.gain(4.0)  # a token and a position, 1 and -1 each

        scores = np.where(at[None] == at[:, None] - 1, PREVIOUS * gain**2, 0.0)
        looks_back = causal_softmax(scores)
        before = gain * looks_back @ one_hot if previous else np.zeros_like(one_hot)
        squares = 4.0 + _squares(before)

        gain = self.gain(squares)
        scores = MATCH * (gain[:, None] * one_hot) @ (gain[:, None] * before).T + REST * gain * (at == 0)
        finds = causal_softmax(scores)
        spoken = one_hot * (ids != START)[:, None]
        output = finds @ (gain[:, None] * spoken)
        squares = squares + _squares(output)

        uniform = causal_softmax(np.zeros((n, n)))
        patterns = np.tile(uniform, (2, self.n_heads, 1, 1))
        patterns[0, self.previous_head], patterns[1, self.induction_head] = looks_back, finds
        embed, place = self.one_hots("token")[ids], (self.one_hots("position") + self.ballast)[:n]
        first, second = before @ self.one_hots("previous"), output @ self.one_hots("output")
        stream = [embed + place, embed + place + first, embed + place + first + second]
        values = {"hook_embed": embed, "hook_pos_embed": place}
        for layer, added in enumerate((first, second)):
            values |= {
                f"blocks.{layer}.hook_resid_pre": stream[layer],
                f"blocks.{layer}.attn.hook_pattern": patterns[layer],
                f"blocks.{layer}.hook_attn_out": added,
                f"blocks.{layer}.hook_resid_mid": stream[layer + 1],
                f"blocks.{layer}.hook_mlp_out": np.zeros_like(embed),
                f"blocks.{layer}.hook_resid_post": stream[layer + 1],
            }
        return values | {"hook_logits": UNEMBED * FINAL * self.gain(squares)[:, None] * output}

    def lens(self, value: np.ndarray) -> np.ndarray:
        """Logits [pos, d_vocab] of a value [pos, d_model] with mean 0, through the last norm and the unembedding."""
        scale = BALLAST * np.sqrt(2 / self.d_model) / np.sqrt((value**2).mean(-1, keepdims=True) + EPSILON)
        return UNEMBED * FINAL * scale * (value @ self.read("output").T)

    def continuations(self, tokens: Sequence[int]) -> dict[int, list[int]]:
        """Which earlier positions the induction head reads, by query position: those whose token before is the query's.

        [0, 5, 6, 5] -> {3: [2]}: position 3 holds token 5, which was followed at position 2.
        """
        found = {q: [k for k in range(1, q + 1) if tokens[k - 1] == tokens[q]] for q in range(1, len(tokens))}
        return {q: keys for q, keys in found.items() if keys}


def _squares(one_hots: np.ndarray) -> np.ndarray:
    """Sum of squares [pos] of what is written for [pos, token], with what balances it."""
    return (one_hots**2).sum(-1) + one_hots.sum(-1) ** 2
