"""``ActivationSampler``: keeps what a model's own forward passes compute, until it is saved."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..capture import readable
from ..errors import HookError
from ..instrument import follow_calls
from ..model import HookedModel
from .batches import check_lengths, token_ids
from .capturing import Capturing
from .config import MechIntConfig
from .trained import Forward

MAX_CACHE_BYTES = 2**30
"""Bytes of activations that a sampler holds at most between two saves."""


class ActivationSampler:
    """Keeps the activations of a model's forward passes, and saves them as rows of tokens.

        sampler = ActivationSampler(layers=["model.layers.1", "model.layers.2"], save_dir="activations")
        sampler.register_hooks(model)
        logits = model(tokens)
        path = sampler.save_activations(global_step=100)
        sampler.clear_cache()

    Every plain call of the model is kept, one that ``nn.value_and_grad`` differentiates too; runs of ``HookedModel``
    are not. A function that ``mx.compile`` compiled calls no Python after its first run: nothing can be kept there, and
    saving is an error. ``activations`` may be changed before it is saved, as a subclass may do that overrides
    ``save_activations`` and then calls it. In distributed training rank 0 alone keeps and saves.

    Args:
        layers: as ``sample_layers`` of :class:`MechIntConfig`; None detects them.
        save_dir: the folder of the shards.
        max_samples_per_shard: the most rows in one file.
        device: accepted and without effect: MLX's arrays are in memory that all devices share.

    Attributes:
        activations: by layer one array per kept forward pass, [batch, pos, ...], of patterns
            [batch, head, query, key].
        max_cache_bytes: the most that is held between two saves; a forward pass that exceeds it is an error.
    """

    def __init__(
        self,
        layers: Sequence[str | int] | None = None,
        save_dir: str | Path = "./activations",
        max_samples_per_shard: int = 10_000,
        device: Any = None,
    ) -> None:
        self._set_up(
            MechIntConfig(sample_layers=layers, storage_path=save_dir, max_activations_per_shard=max_samples_per_shard)
        )

    def _set_up(self, config: MechIntConfig, *, latest: bool = False) -> None:
        self.config = config
        self.activations: dict[str, list[mx.array]] = {}
        self.max_cache_bytes = MAX_CACHE_BYTES
        self.capturing: Capturing | None = None
        self._latest = latest
        self._forwards: list[Forward] = []
        self._n_saved = 0
        self._last_path: Path | None = None
        self._compiled = False
        self._end: Callable[[], None] | None = None

    @classmethod
    def of(cls, config: MechIntConfig, *, latest: bool = False) -> "ActivationSampler":
        """A sampler with all of a configuration's settings.

        Args:
            latest: keep the latest forward pass alone.
        """
        made = cls.__new__(cls)
        made._set_up(config, latest=latest)
        return made

    def register_hooks(self, model: nn.Module | HookedModel) -> None:
        """Keep what the model's forward passes compute from now on, until ``remove_hooks``. The folder is made.

        Raises:
            HookError: for layers that the model does not have, a folder that cannot be written, and when hooks are
                registered already.
        """
        if self._end is not None:
            raise HookError("Hooks are registered already: remove_hooks() ends that.")
        self.capturing = Capturing.of(model, self.config)
        self.clear_cache()
        self._compiled = False
        if self.capturing is None:
            self._end = _nothing
        else:
            self._end = follow_calls(self.capturing.trained.hooked.instrument, self._around)

    def remove_hooks(self) -> None:
        """Keep nothing any more, and close the folder; what is kept and not saved is lost. May be called again."""
        if self._end is not None:
            self._end()
            self._end = None
        if self.capturing is not None:
            self.capturing.close()
        self.clear_cache()

    def __enter__(self) -> "ActivationSampler":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove_hooks()

    def save_activations(
        self, global_step: int, metadata: Mapping[str, Any] | None = None, lengths: Any = None
    ) -> Path | None:
        """Write the rows of the forward passes since the last save.

        What was saved can be looked at until the next forward pass or ``clear_cache``, and is not written again:
        saving twice writes once.

        Args:
            global_step: the training step that the rows belong to.
            metadata: plain JSON to keep with them.
            lengths: of each sequence of the forward pass the number of tokens that are no padding, [batch]; of several
                forward passes a list of these. None: all tokens are rows.

        Returns:
            the last file that was written; None where every token is padding, and where another process of a
            distributed training writes.

        Raises:
            HookError: nothing was captured, it was captured where it cannot be read, or it cannot be written.
        """
        if self._end is None:
            raise HookError("No hooks are registered: register_hooks(model) comes first.")
        if self.capturing is None:
            return None
        self._check_seen()
        if self._n_saved and self._n_saved == len(self._forwards):
            return self._last_path
        self._take_changes()
        forwards = self._forwards[self._n_saved :]
        paths = self.capturing.save(forwards, self._lengths(lengths, forwards), global_step, metadata)
        self._n_saved = len(self._forwards)
        self._last_path = paths[-1] if paths else None
        return self._last_path

    def get_statistics(self) -> dict[str, Any]:
        """``total_samples_saved`` (rows in files), ``current_cache_samples`` (tokens that are held), ``total_shards``,
        ``tracked_layers``."""
        none: dict[str, Any] = {"total_samples_saved": 0, "total_shards": 0, "tracked_layers": []}
        held = sum(forward.tokens.size for forward in self._forwards)
        known = none if self.capturing is None else self.capturing.statistics()
        return known | {"current_cache_samples": held}

    def clear_cache(self) -> None:
        """Forget what is held."""
        layers = self.capturing.trained.layers if self.capturing is not None else ()
        self.activations = {name: [] for name in layers}
        self._forwards = []
        self._n_saved = 0

    def _around(self, call: Callable[[], Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One forward pass of the model, kept."""
        assert self.capturing is not None
        trained = self.capturing.trained
        tokens = token_ids(args[0] if args else kwargs.get("inputs"))
        if _is_traced(tokens, trained.module):
            self._compiled = True
            return call()
        forward = trained.empty(tokens)
        with trained.hooked.instrument.attached(trained.plan(forward)):
            output = call()
        self._keep(forward)
        return output

    def _keep(self, forward: Forward) -> None:
        if self._latest or self._n_saved:
            # What was saved is not written again, so that nobody needs it any more.
            self.clear_cache()
        held = sum(array.nbytes for arrays in self.activations.values() for array in arrays)
        if held + forward.nbytes > self.max_cache_bytes:
            raise HookError(
                f"{readable(held + forward.nbytes)} of {len(self._forwards) + 1} forward passes are more than "
                f"max_cache_bytes, {readable(self.max_cache_bytes)}: call save_activations and clear_cache more often, "
                "or capture fewer layers."
            )
        self._forwards.append(forward)
        for name, value in forward.values.items():
            self.activations.setdefault(name, []).append(value)

    def _check_seen(self) -> None:
        """Raise HookError where there is nothing that can be saved."""
        how = "on_training_step(batch=...) of MechIntHooks, or MechIntCallback, runs the batch once more to capture it"
        if self._compiled:
            raise HookError(
                f"The model was called in a function that mx.compile compiled, which shows no values: {how}."
            )
        if not self._forwards:
            raise HookError(f"Nothing was captured since the last save: run the model first. In a compiled loop {how}.")
        try:
            mx.eval(self.activations)
        except (ValueError, RuntimeError) as error:
            raise HookError(
                f"What was captured cannot be read, as in a function that mx.compile compiled: {how}."
            ) from error

    def _take_changes(self) -> None:
        """What was put into ``activations`` is what counts."""
        for name in self._forwards[0].values:
            arrays = self.activations.get(name, [])
            if len(arrays) != len(self._forwards):
                raise HookError(
                    f"activations[{name!r}] has one array for each of the {len(self._forwards)} forward passes, got "
                    f"{len(arrays)}."
                )
            for forward, array in zip(self._forwards, arrays, strict=True):
                forward.values[name] = mx.array(array) if isinstance(array, np.ndarray) else array

    @staticmethod
    def _lengths(lengths: Any, forwards: Sequence[Forward]) -> list[np.ndarray | None]:
        counts = [forward.tokens.shape[0] for forward in forwards]
        if lengths is None or len(counts) == 1:
            given = lengths[0] if isinstance(lengths, list | tuple) and np.ndim(lengths[0]) == 1 else lengths
            return [check_lengths(given, count) for count in counts]
        if len(lengths) != len(counts):
            raise HookError(f"lengths has an entry for each of the {len(counts)} forward passes, got {len(lengths)}.")
        return [check_lengths(given, count) for given, count in zip(lengths, counts, strict=True)]


def _nothing() -> None:
    """Ends what was not begun."""


def _is_traced(tokens: mx.array, model: nn.Module) -> bool:
    """Whether a call is one that ``mx.compile`` traces: its arrays have no values."""
    try:
        mx.eval(tokens, next(_arrays(model), []))
    except (ValueError, RuntimeError):
        return True
    return False


def _arrays(tree: Any) -> Iterator[mx.array]:
    if isinstance(tree, mx.array):
        yield tree
    elif isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _arrays(part)
