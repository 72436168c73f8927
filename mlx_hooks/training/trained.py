"""A model that is being trained, run or watched without leaving a trace on its training."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..activations import CapturedActivation
from ..errors import HookError, UntrustedHookWarning
from ..hook_points import ATTENTION, HookPoint
from ..hooks import Recorder
from ..instrument import Plan
from ..model import HookedModel
from .layers import SampledLayer, check_axes, check_trusted, sampled_layers

logger = logging.getLogger(__name__)

_OF_PATTERN = ["head", "key"]
"""The axes of a row of scores or of a pattern."""


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A block in which the model does not drop anything out, and which training does not notice.

    Afterwards each module is in training or not as it was before, one by one, and MLX's random state is what it was.
    """
    flags = [(module, module.training) for module in model.modules()]
    state: Any = mx.random.state
    keys = [mx.array(key) for key in state]
    model.eval()
    try:
        yield
    finally:
        # A module's flag is set for all that is in it, and each comes before what is in it.
        for module, flag in flags:
            if module.training != flag:
                module.train(flag)
        for key, before in zip(state, keys, strict=True):
            # In place: what compiled functions hold is this very array.
            key[:] = before


@dataclass(frozen=True)
class TokenRows:
    """Rows of one or several forward passes, one per token: ``values`` by layer [row, ...], and for each row its token
    id, the row of the batch that it belongs to, and its position, [row] each."""

    values: dict[str, mx.array]
    tokens: np.ndarray
    sequence: np.ndarray
    position: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Forward:
    """What one forward pass showed: ``tokens`` [batch, pos] that begin at position ``start``, and by layer its value,
    not evaluated yet: [batch, pos, ...], or of ``patterns`` [batch, head, query, key]. ``lengths`` [batch] are the
    numbers of tokens that are no padding, where they are known."""

    tokens: mx.array
    patterns: frozenset[str] = frozenset()
    start: int = 0
    lengths: np.ndarray | None = None
    values: dict[str, mx.array] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(value.nbytes for value in self.values.values())

    def rows(self, lengths: np.ndarray | None = None) -> TokenRows:
        """The rows of the tokens; of each sequence the first so many, the others are padding.

        Args:
            lengths: the number of tokens of each sequence, [batch]; None for those that are known, or all.

        Raises:
            HookError: a value does not have an entry for each token.
        """
        batch, length = self.tokens.shape
        real = np.ones((batch, length), bool)
        lengths = self.lengths if lengths is None else lengths
        if lengths is not None:
            real = np.arange(length) < lengths[:, None]
        sequence, column = (index.astype(np.int32) for index in np.nonzero(real))
        flat = mx.array(sequence * length + column)
        values = {}
        for name, value in self.values.items():
            if name in self.patterns and value.ndim == 4:
                value = value.swapaxes(1, 2)
            if value.shape[:2] != (batch, length):
                raise HookError(
                    f"{name} has shape {value.shape}: it has no entry for each of {batch} x {length} tokens."
                )
            values[name] = mx.take(value.reshape(batch * length, *value.shape[2:]), flat, axis=0)
        return TokenRows(values, np.array(self.tokens)[real].astype(np.int32), sequence, column + self.start)


def _wrapped(module: nn.Module) -> HookedModel:
    """A model with hook points. Of those that are not to be trusted none is captured, so that nobody is warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrustedHookWarning)
        return HookedModel(module)


class TrainedModel:
    """A model in training and the layers that are captured of it.

    Args:
        model: an mlx-lm model, or a HookedModel of it. It may be given adapters or quantised at any time.
        asked: ``sample_layers`` of :class:`MechIntConfig`.

    Raises:
        HookError: for layers that it does not have or that cannot be captured.
    """

    def __init__(self, model: nn.Module | HookedModel, asked: Sequence[str | int] | None) -> None:
        self.module: nn.Module = model.model if isinstance(model, HookedModel) else model
        self.name = model.model_name if isinstance(model, HookedModel) else None
        with undisturbed(self.module):
            self.hooked = model if isinstance(model, HookedModel) else _wrapped(self.module)
            self.sampled: list[SampledLayer] = sampled_layers(self.hooked, asked)
            self.layers = self._meet()

    def forward(self, inputs: mx.array, lengths: np.ndarray | None = None) -> Forward:
        """Run token ids [batch, pos] with the weights as they are now, without a KV cache; nothing is evaluated.

        Args:
            lengths: of each sequence the number of tokens that are no padding, [batch], where that is known.
        """
        found = self.empty(inputs, lengths)
        with undisturbed(self.module), self.hooked.instrument.attached(self.plan(found), alone=True):
            self.module(inputs)
        return found

    def empty(self, tokens: mx.array, lengths: np.ndarray | None = None) -> Forward:
        """A forward pass of token ids [batch, pos] that is yet to show something."""
        patterns = frozenset(name for name, layer in self.layers.items() if layer["axes"] == _OF_PATTERN)
        return Forward(tokens, patterns, lengths=lengths)

    def plan(self, forward: Forward) -> Plan:
        """Hooks that fill in what the forward pass shows. Of layers that run several times in it, the last time counts.

        Raises:
            HookError: the model no longer has one of the layers.
        """

        def keep(record: CapturedActivation) -> None:
            forward.values[record.hook_point.name] = record.value
            forward.start = record.positions[0]

        try:
            plan = self._plan(keep)
            if plan.is_current:
                return plan
        except HookError as error:
            logger.info("the model is wrapped anew: %s", error)
        with undisturbed(self.module):
            self.hooked = _wrapped(self.module)
            check_trusted(self.hooked, list(self.layers))
        return self._plan(keep)

    def _plan(self, keep: Any) -> Plan:
        instrument = self.hooked.instrument
        return instrument.plan([Recorder(instrument.run, keep).hook(layer.point) for layer in self.sampled])

    def _meet(self) -> dict[str, dict[str, Any]]:
        """What a row of each layer is, from a run of two tokens that is not evaluated."""
        met: dict[str, tuple[HookPoint, mx.array]] = {}

        def keep(record: CapturedActivation) -> None:
            met[record.hook_point.name] = (record.hook_point, record.value)

        with self.hooked.instrument.attached(self._plan(keep), alone=True):
            self.module(mx.zeros((1, 2), mx.int32))
        layers = {}
        for layer in self.sampled:
            point, value = met[layer.point.name]
            axes = point.axes or tuple(f"axis {i}" for i in range(value.ndim))
            check_axes(point.name, axes)
            # Keys are as many as the batch has tokens.
            per_row = {"axes": _OF_PATTERN, "shape": [value.shape[1], None]}
            if axes != ATTENTION:
                per_row = {"axes": list(axes[2:]), "shape": list(value.shape[2:])}
            dtype = str(value.dtype).removeprefix("mlx.core.")
            layers[point.name] = {**per_row, "dtype": dtype, "asked": layer.asked}
        return layers
