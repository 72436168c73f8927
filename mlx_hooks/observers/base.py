"""``InferenceHook``: what an observer of generation is, and what it is shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import HookError, ObserverError

State = dict[str, Any]
ARRAYS = ("query", "key", "value")


@dataclass(frozen=True)
class Wanted:
    """How much an observer is to be shown: what none wants is not computed.

    Args:
        layers: indices; None for all that there are.
        heads: query heads, of attention only; None for all.
        arrays: which of "query", "key" and "value" are collected beside the attention weights.
        in_parts: the weights of a long prompt may come some rows after the others, in several calls of
            ``on_layer_attention``; the whole matrix is then never held.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    arrays: tuple[str, ...] = ()
    in_parts: bool = False


class Head(NamedTuple):
    """One head's attention in one pass: weights [batch, query, key]; query, key and value [batch, ..., d_head].

    With all arrays, ``weights @ value`` is the head's z.
    """

    weights: mx.array
    query: mx.array | None
    key: mx.array | None
    value: mx.array | None


@dataclass(frozen=True)
class LayerAttention:
    """The attention of a layer in one pass, all heads in one array.

    Args:
        weights: [batch, head, query, key], float32. A row per query of the pass; keys stand at absolute positions from
            0 on. In a part of a prompt they end with the part's last query, if the mask is plainly causal; with a
            window or padding, those after it are there too, with weights of 0.
        positions: absolute position of each row.
        heads: the query heads that ``weights`` holds.
        query: [batch, pos, head, d_head], as the kernel got it, all heads.
        key, value: [batch, key, kv_head, d_head], of all positions so far; head h reads kv_head
            h // (n_heads / kv_heads). None, as query is, where nobody asked for them.
        n_heads: query heads of the layer.
        pass_index: which time, where the layer runs several times in one pass.
    """

    weights: mx.array
    positions: range
    heads: tuple[int, ...]
    n_heads: int
    query: mx.array | None = None
    key: mx.array | None = None
    value: mx.array | None = None
    pass_index: int = 0

    def of_head(self, head: int) -> Head:
        """What one query head computed."""
        n_keys = self.weights.shape[-1]
        query = None if self.query is None else self.query[:, :, head]
        shared = [None if x is None else x[:, :n_keys, head * x.shape[2] // self.n_heads] for x in self.key_and_value]
        return Head(self.weights[:, self.heads.index(head)], query, *shared)

    @property
    def key_and_value(self) -> tuple[mx.array | None, mx.array | None]:
        return self.key, self.value

    def of_heads(self, heads: Sequence[int] | None) -> "LayerAttention":
        """The part of it that belongs to some of its heads; None for all."""
        if heads is None or tuple(heads) == self.heads:
            return self
        at = mx.array([self.heads.index(head) for head in heads])
        return replace(self, weights=mx.take(self.weights, at, axis=1), heads=tuple(heads))


class InferenceHook:
    """An observer of generation: inherit from it, and override the events that matter.

        class Strongest(InferenceHook):
            def __init__(self):
                super().__init__("strongest")
                self.data = []

            def on_attention_computed(self, layer_idx, head_idx, attention_weights, query, key, value, tokens,
                                      position, state):
                self.data.append((layer_idx, head_idx, attention_weights.max().item()))

        model.generate("The capital of France is", max_tokens=5, hooks=[Strongest()])

    Only what an overridden event shows is computed: a hook without attention events costs no attention capture.

    **When.** Events come in the order of the forward passes, in each pass in forward order. The prompt is one or more
    passes (chunks of it, then its last token), each generated token is one; the last one is never fed to the model. The
    pass for a token is under way before the one for the token before it is told, so that the device never idles:
    ``on_forward_begin`` comes before the pass's other events, not before its computation. While an event runs, the
    model is plain, and may be used.

    **What.** ``position`` is the absolute position of the pass's first token; arrays are MLX's, of one batch row, and
    hold the rows of this pass only, so no row is shown twice. ``tokens`` are the texts of all tokens up to this pass's
    last one (ids as text without a tokenizer).

    ``state`` is one dictionary per generation, brought up to date before each pass (copy what is to stay):
    ``temperature``, ``top_k`` (None for no limit), ``max_new_tokens``, ``prompt_length``, ``token_ids``, ``tokens``,
    ``phase`` ("prefill" or "decode"), ``step`` (0 for the prompt, k for the k-th generated token), ``positions`` (a
    range: those of the pass), ``streams`` (layer -> stream type, see :class:`SymbolicStreamHook`), in attention events
    of such a layer ``stream_type``, at the end ``finish_reason``.

    **Errors** in an event end the generation with an :class:`ObserverError` that names hook and event; with
    ``hook_errors="collect"`` they are kept in ``errors``, with one warning, and the generation goes on.

    Args:
        name: for messages; hooks may share one.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.enabled = True
        """Whether it is told; one that is off when generation begins costs nothing."""
        self.errors: list[ObserverError] = []
        """What it raised in the latest generation, with ``hook_errors="collect"``."""
        self.data: list[Any] = []
        """For what a subclass gathers."""
        self._generation: object = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, enabled={self.enabled})"

    def clear(self) -> None:
        """Forget what was gathered."""
        self.data = []
        self.errors = []

    def on_generation_begin(self, prompt_tokens: list[str], state: State) -> None:
        """Before the first pass; the texts of the prompt's tokens."""

    def on_generation_end(self, generated_tokens: list[str], state: State) -> None:
        """After the last pass; the texts of the generated tokens, an end token included.

        Also when the generation is closed before its end (``finish_reason`` is then "closed"); not after an error.
        """

    def on_forward_begin(self, input_ids: mx.array, position: int, state: State) -> None:
        """A pass begins, with the ids [batch, pos] that it reads: with the KV cache, new ones only."""

    def on_forward_end(self, logits: mx.array, position: int, state: State) -> None:
        """A pass ended, with logits [batch, pos, d_vocab]: of the tokens of this pass, in the model's type.

        ``logits[:, -1]`` decide on the next token. Those of a prompt's chunk are computed if they are looked at.
        """

    def on_attention_computed(
        self,
        layer_idx: int,
        head_idx: int,
        attention_weights: mx.array,
        query: mx.array,
        key: mx.array,
        value: mx.array,
        tokens: list[str],
        position: int,
        state: State,
    ) -> None:
        """A head attended, in the pass that begins at ``position``.

        Args:
            attention_weights: [batch, query, key], float32: after interventions; keys from position 0 on.
            query: [batch, query, d_head], after rotary embedding, as the kernel got it.
            key, value: [batch, key, d_head] of the key-value head that this head reads, of all positions so far:
                ``attention_weights @ value`` is the head's z. (Where attention has sinks, rows sum to less than 1.)
        """

    def on_layer_attention(
        self, layer_idx: int, attention: LayerAttention, tokens: list[str], position: int, state: State
    ) -> None:
        """A layer attended: the same for all heads at once, which is much faster than head by head.

        Unless it is overridden, it calls ``on_attention_computed`` for each head.
        """
        for head in attention.heads:
            weights, query, key, value = attention.of_head(head)
            assert query is not None
            assert key is not None
            assert value is not None
            self.on_attention_computed(layer_idx, head, weights, query, key, value, tokens, position, state)

    def on_ffn_computed(
        self,
        layer_idx: int,
        ffn_input: mx.array,
        ffn_output: mx.array,
        tokens: list[str],
        position: int,
        state: State,
    ) -> None:
        """A layer's MLP, or its experts, ran: what it read (after the norm) and what it adds, [batch, pos, d_model]."""

    def attention_wanted(self, streams: Mapping[int, str]) -> Wanted | None:
        """What of attention is to be captured for this hook; None for nothing.

        Args:
            streams: the stream types that the model declares, by layer.
        """
        if self.overrides("on_attention_computed") or self.overrides("on_layer_attention"):
            return Wanted(arrays=ARRAYS)
        return None

    def ffn_wanted(self) -> Wanted | None:
        """Of which layers the MLP is to be captured for this hook; None for none."""
        return Wanted() if self.overrides("on_ffn_computed") else None

    def overrides(self, event: str) -> bool:
        """Whether an event is more than the one of this class, which does nothing."""
        return getattr(getattr(self, event), "__func__", None) is not getattr(InferenceHook, event)


def indices(name: str, asked: Any) -> tuple[int, ...] | None:
    """Layers or heads as an ascending tuple; None for all.

    Raises:
        HookError: for what is no whole number from 0 up.
    """
    if asked is None:
        return None
    try:
        found = {index(i) for i in ([asked] if isinstance(asked, int) else asked)}
    except TypeError:
        found = set()
    if isinstance(asked, bool) or not found or min(found) < 0:
        raise HookError(f"{name} are None (all) or a list of whole numbers from 0 up, got {asked!r}.", field=name)
    return tuple(sorted(found))
