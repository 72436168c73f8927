"""Attention of the streams that an architecture declares."""

import warnings
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from ..activations import scalar
from ..errors import ObserverWarning
from .base import InferenceHook, LayerAttention, State, Wanted


class SymbolicStreamHook(InferenceHook):
    """Follows the streams of an architecture that has several, such as a symbolic and a contextual one.

    A model declares the stream that a layer's attention works on as ``stream_type``, an attribute of the attention
    module or of its block: ``model.layers[0].stream_type = "symbolic"``. Layers without it are not looked at. mlx-lm's
    own architectures have one stream and declare none: the hook says so once, and costs nothing.

    ``stream_data`` has a record per pass, layer and head: ``{layer, head, position, stream_type, attention_norm}``,
    with the length (L2) of the weights [query, key] of the pass's rows. It holds the latest generation.
    """

    def __init__(self) -> None:
        super().__init__("symbolic_stream")
        self.stream_data: list[dict[str, Any]] = []
        self._has_said_so = False

    def clear(self) -> None:
        """Forget the generation."""
        super().clear()
        self.stream_data = []

    def attention_wanted(self, streams: Mapping[int, str]) -> Wanted | None:
        """The weights of the layers that declare a stream."""
        return Wanted(tuple(streams)) if streams else None

    def on_generation_begin(self, prompt_tokens: list[str], state: State) -> None:
        """Begin afresh."""
        self.clear()
        if not state["streams"] and not self._has_said_so:
            self._has_said_so = True
            warnings.warn(
                f"The model declares no streams (stream_type of a block): {self!r} has nothing to follow.",
                ObserverWarning,
                stacklevel=2,
            )

    def on_layer_attention(
        self, layer_idx: int, attention: LayerAttention, tokens: list[str], position: int, state: State
    ) -> None:
        """Record how long the weights of each head are."""
        norms = mx.sqrt(mx.square(attention.weights[0]).sum(axis=(1, 2)))
        self.stream_data += [
            {
                "layer": layer_idx,
                "head": head,
                "position": position,
                "stream_type": state["stream_type"],
                "attention_norm": scalar(norms[i]),
            }
            for i, head in enumerate(attention.heads)
        ]
