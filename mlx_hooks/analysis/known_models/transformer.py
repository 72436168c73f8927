"""A small transformer as mlx-lm's are, without anything that a construction would have to make up for.

Its norms pass the stream on as it is, there are no biases but the unembedding's, scores are plain products of queries
and keys, positions are learned. So what a part adds to the stream is read by all later ones as it was written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

ACTIVATIONS = {
    "relu": nn.relu,
    "relu2": lambda x: nn.relu(x) * nn.relu(x),
    "linear": lambda x: x,
}


@dataclass
class ModelArgs(BaseModelArgs):
    """The sizes; ``intermediate_size`` is 0 without MLPs, ``hidden_act`` a key of ACTIVATIONS."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    intermediate_size: int = 0
    hidden_act: str = "relu"
    lm_head_bias: bool = False


class Attention(nn.Module):
    """Heads whose scores are products of queries and keys, not divided by anything."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.n_heads = args.num_attention_heads
        self.head_dim = args.head_dim
        self.scale = 1.0
        width = self.n_heads * self.head_dim
        self.q_proj = nn.Linear(args.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(args.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(args.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, args.hidden_size, bias=False)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        n_batch, n_pos, _ = x.shape
        queries, keys, values = (
            projection(x).reshape(n_batch, n_pos, self.n_heads, -1).transpose(0, 2, 1, 3)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        z = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(z.transpose(0, 2, 1, 3).reshape(n_batch, n_pos, -1))


class MLP(nn.Module):
    """Up, activation, down."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)
        self._activation = ACTIVATIONS[args.hidden_act]

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self._activation(self.up_proj(x)))


class Block(nn.Module):
    """Attention, and an MLP where there is one, each added to the stream."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.input_layernorm = nn.Identity()
        self.self_attn = Attention(args)
        if args.intermediate_size:
            self.post_attention_layernorm = nn.Identity()
            self.mlp = MLP(args)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        if "mlp" not in self:
            return h
        return h + self.mlp(self.post_attention_layernorm(h))


class Trunk(nn.Module):
    """Embeddings of tokens and positions, the blocks, the last norm."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.wpe = nn.Embedding(args.max_position_embeddings, args.hidden_size)
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.Identity()

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        h = self.embed_tokens(inputs)
        if cache is None:
            cache = [None] * len(self.layers)
        offset = 0 if cache[0] is None else cache[0].offset
        h = h + self.wpe(mx.arange(inputs.shape[1]) + offset)
        mask = create_attention_mask(h, cache[0])
        for layer, c in zip(self.layers, cache, strict=True):
            h = layer(h, mask, c)
        return self.norm(h)


class Model(nn.Module):
    """The trunk and an unembedding of its own; maps ids [batch, pos] to logits [batch, pos, d_vocab]."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Trunk(args)
        self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=args.lm_head_bias)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.lm_head(self.model(inputs, cache))

    @property
    def layers(self) -> list[Block]:
        return self.model.layers


@dataclass(frozen=True, eq=False)
class Head:
    """What a head reads by and what it writes.

    Args:
        query, key: score(q, k) is the product of ``query`` of position q and ``key`` of position k [rows, d_model].
        value, write: what is read by a row of ``value`` is written along that of ``write`` [rows, d_model].
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    write: np.ndarray

    @property
    def width(self) -> int:
        return max(len(self.query), len(self.value))


@dataclass(frozen=True, eq=False)
class Neurons:
    """An MLP's neurons: what each reads by and what it writes [d_mlp, d_model]."""

    read: np.ndarray
    write: np.ndarray


@dataclass(frozen=True, eq=False)
class Layer:
    """The heads and neurons of a block; all layers have as many heads, and all have neurons or none has."""

    heads: Sequence[Head]
    neurons: Neurons | None = None


class Stream:
    """The residual stream as a direct sum of parts, each of which stands on dimensions of its own.

        stream = Stream(token=16, position=8)
        stream["token"]           # the one-hots of the part [16, d_model]: they write it, and read it
        stream["token"][3]        # token 3 [d_model]

    Args:
        sizes: dimensions by the part's name, in order.
    """

    def __init__(self, **sizes: int) -> None:
        self.sizes = sizes
        self.d_model = sum(sizes.values())
        starts = np.cumsum([0, *sizes.values()])
        self.starts = dict(zip(sizes, starts.tolist(), strict=False))

    def __getitem__(self, part: str) -> np.ndarray:
        return np.eye(self.d_model)[self.starts[part] : self.starts[part] + self.sizes[part]]

    def any_of(self, part: str) -> np.ndarray:
        """What reads the sum of a part, [1, d_model]: of one-hots, 1."""
        return self[part].sum(axis=0, keepdims=True)


def rows(*parts: np.ndarray) -> np.ndarray:
    """What several parts of a score read by, one after the other [rows, d_model]; single vectors are one row."""
    return np.vstack([np.atleast_2d(part) for part in parts])


def build(
    name: str,
    tokens: np.ndarray,
    positions: np.ndarray,
    layers: Sequence[Layer],
    unembed: np.ndarray,
    bias: np.ndarray | None = None,
    activation: str = "relu",
) -> Model:
    """The model with these weights, float32.

    Args:
        name: its ``model_type``.
        tokens, positions: what is written for each of them [token, d_model], [pos, d_model].
        unembed: what reads each token's logit [token, d_model].
        bias: added to the logits [token]; None for nothing.
        activation: a key of ACTIVATIONS.
    """
    d_model, n_heads = tokens.shape[1], len(layers[0].heads)
    d_head = max(head.width for layer in layers for head in layer.heads)
    d_mlp = max((len(layer.neurons.read) for layer in layers if layer.neurons is not None), default=0)
    weights = {"model.embed_tokens.weight": tokens, "model.wpe.weight": positions, "lm_head.weight": unembed}
    if bias is not None:
        weights["lm_head.bias"] = bias
    for i, layer in enumerate(layers):
        block = f"model.layers.{i}"
        for projection, part in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "write")):
            joint = np.zeros((n_heads, d_head, d_model))
            for place, head in zip(joint, layer.heads, strict=True):
                own = getattr(head, part)
                place[: len(own)] = own
            flat = joint.reshape(-1, d_model)
            weights[f"{block}.self_attn.{projection}_proj.weight"] = flat.T if part == "write" else flat
        if d_mlp:
            read, write = np.zeros((2, d_mlp, d_model))
            if layer.neurons is not None:
                read[: len(layer.neurons.read)] = layer.neurons.read
                write[: len(layer.neurons.write)] = layer.neurons.write
            weights |= {f"{block}.mlp.up_proj.weight": read, f"{block}.mlp.down_proj.weight": write.T}
    args = ModelArgs(
        model_type=name,
        hidden_size=d_model,
        num_hidden_layers=len(layers),
        num_attention_heads=n_heads,
        head_dim=d_head,
        vocab_size=len(tokens),
        max_position_embeddings=len(positions),
        intermediate_size=d_mlp,
        hidden_act=activation,
        lm_head_bias=bias is not None,
    )
    model = Model(args)
    model.load_weights([(key, mx.array(np.asarray(value, dtype=np.float32))) for key, value in weights.items()])
    mx.eval(model.parameters())
    return model


def writes_unread(stream: Stream, seed: int, part: str = "unread", width: int = 4) -> Head:
    """A head that attends to what it happens to, reads the whole stream, and writes where no other part reads."""
    rng = np.random.default_rng(seed)
    query, key, value = rng.normal(size=(3, width, stream.d_model)) / np.sqrt(width)
    return Head(query, key, value, rng.normal(size=(width, stream.sizes[part])) @ stream[part])


def reads_nothing(stream: Stream, part: str) -> Head:
    """A head that could write to a part that is read, but has nothing to write: its values are 0, its scores too."""
    nothing = np.zeros((stream.sizes[part], stream.d_model))
    return Head(nothing, nothing, nothing, stream[part])


def joined(*several: Neurons) -> Neurons:
    """The neurons of several sets side by side."""
    return Neurons(rows(*(one.read for one in several)), rows(*(one.write for one in several)))
