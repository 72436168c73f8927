"""What the MLPs of a generation read and add."""

from typing import Any

import mlx.core as mx
import numpy as np

from ..activations import to_numpy
from .base import InferenceHook, State, Wanted, indices
from .columns import Columns, LazyRecords


class ActivationHook(InferenceHook):
    """Keeps how long the input and the output of each MLP are, at each position.

        hook = ActivationHook(layers_to_track=[0, 1, 2])
        model.generate("The capital of France is", max_tokens=3, hooks=[hook])
        hook.activations[0]        # {layer, position, input_norm, output_norm, tokens}

    It holds the latest generation: a new one begins afresh.

    Args:
        layers_to_track: indices of layers; None, or none, for all.
        store_activations: keep the vectors too, [d_model] in float32: ``ffn_input`` (what the MLP reads, after the
            norm) and ``ffn_output`` (what it adds to the stream).
    """

    def __init__(self, layers_to_track: Any = None, store_activations: bool = False) -> None:
        super().__init__("ffn_activation_tracker")
        tracks_all = layers_to_track is None or (hasattr(layers_to_track, "__len__") and not len(layers_to_track))
        self.layers_to_track = None if tracks_all else indices("layers_to_track", layers_to_track)
        self.store_activations = bool(store_activations)
        self._forget()

    def _forget(self) -> None:
        self.tokens: list[str] = []
        self._norms = Columns(layer=np.int32, position=np.int32, input_norm=np.float32, output_norm=np.float32)
        self._vectors: Columns | None = None

    def clear(self) -> None:
        """Forget the generation."""
        super().clear()
        self._forget()

    def ffn_wanted(self) -> Wanted:
        """The layers that are tracked."""
        return Wanted(self.layers_to_track)

    def on_generation_begin(self, prompt_tokens: list[str], state: State) -> None:
        """Begin afresh."""
        self.clear()

    def on_ffn_computed(
        self,
        layer_idx: int,
        ffn_input: mx.array,
        ffn_output: mx.array,
        tokens: list[str],
        position: int,
        state: State,
    ) -> None:
        """Keep the lengths of a layer's vectors."""
        self.tokens = tokens
        # NumPy takes the row: MLX would queue it behind the pass that runs meanwhile.
        read, added = to_numpy(ffn_input)[0], to_numpy(ffn_output)[0]
        self._norms.append(
            layer=np.full(len(read), layer_idx),
            position=np.arange(position, position + len(read)),
            input_norm=np.linalg.norm(read, axis=-1),
            output_norm=np.linalg.norm(added, axis=-1),
        )
        if self.store_activations:
            if self._vectors is None:
                self._vectors = Columns(input=(np.float32, read.shape[1:]), output=(np.float32, added.shape[1:]))
            self._vectors.append(input=read, output=added)

    @property
    def activations(self) -> LazyRecords:
        """A record per position and layer, in the order of the passes; each is made when it is read.

        ``{layer, position, input_norm, output_norm, tokens}``, with the tokens up to this position. With
        ``store_activations`` there are ``ffn_input`` and ``ffn_output`` too.
        """
        return LazyRecords(lambda: len(self._norms), self._record)

    def norms(self) -> dict[str, np.ndarray]:
        """The lengths as arrays of equal length: layer, position, input_norm, output_norm."""
        return {name: self._norms[name] for name in ("layer", "position", "input_norm", "output_norm")}

    def _record(self, index: int) -> dict[str, Any]:
        position = int(self._norms["position"][index])
        record = {
            "layer": int(self._norms["layer"][index]),
            "position": position,
            "input_norm": float(self._norms["input_norm"][index]),
            "output_norm": float(self._norms["output_norm"][index]),
            "tokens": self.tokens[: position + 1],
        }
        if self._vectors is not None:
            record |= {f"ffn_{name}": self._vectors[name][index].copy() for name in ("input", "output")}
        return record
