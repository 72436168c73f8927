"""``ActivationSampler``: keeps what a model's own forward passes compute, until it is saved."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..capture import readable
from ..errors import HookError
from ..instrument import follow_calls
from ..model import HookedModel
from ..storage.shard_writer import whole_step
from .batches import Batch, check_lengths, token_ids
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
    ``save_activations`` and then calls it. In distributed training rank 0 alone keeps and saves. A sampler that nobody
    holds any more keeps nothing, and the model is left as it was.

    Args:
        layers: as ``sample_layers`` of :class:`MechIntConfig`; None detects them.
        save_dir: the folder of the shards.
        max_samples_per_shard: the most rows in one file.
        device: accepted and without effect: MLX's arrays are in memory that all devices share.

    Attributes:
        activations: by layer one array per kept forward pass, [batch, pos, ...], of patterns
            [batch, head, query, key].
        max_cache_bytes: the most that is held between two saves; a forward pass that exceeds it is an error.
        last_step: the step whose rows were written last; None before.
    """

    def __init__(
        self,
        layers: Sequence[str | int] | None = None,
        save_dir: str | Path = "./activations",
        max_samples_per_shard: int = 10_000,
        device: Any = None,
    ) -> None:
        self.config = MechIntConfig(
            sample_layers=layers, storage_path=save_dir, max_activations_per_shard=max_samples_per_shard
        )
        self.activations: dict[str, list[mx.array]] = {}
        self.max_cache_bytes = MAX_CACHE_BYTES
        self.capturing: Capturing | None = None
        self.last_step: int | None = None
        self._of_loop = False
        self._forwards: list[Forward] = []
        self._n_saved = 0
        self._last_path: Path | None = None
        self._compiled = self._met_training = self._left_out = False
        self._unkept: HookError | None = None
        self._given_step: int | None = None
        self._is_given = False
        self._end: Callable[[], None] | None = None

    @classmethod
    def of(cls, config: MechIntConfig) -> "ActivationSampler":
        """A sampler with all of a configuration's settings."""
        made = cls(config.sample_layers, config.storage_path, config.max_activations_per_shard)
        made.config = config
        return made

    @classmethod
    def of_loop(cls, config: MechIntConfig) -> "ActivationSampler":
        """A sampler for a training loop: it keeps the latest forward pass alone, and where the model was ever in
        training mode none in evaluation mode, which is validation. What cannot be kept is told when it is saved."""
        made = cls.of(config)
        made._of_loop = True
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
        self._compiled = self._met_training = self._left_out = False
        self.last_step = self._given_step = None
        if self.capturing is None:
            self._end = _nothing
        else:
            self._met_training = self.capturing.trained.module.training
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
        saving a step twice writes it once, and so does saving one whose batch ``MechIntHooks`` captured.

        Args:
            global_step: the training step that the rows belong to, a whole number from 0 up.
            metadata: plain JSON to keep with them; numbers of MLX and NumPy become Python's.
            lengths: of each sequence of the forward pass the number of tokens that are no padding, [batch]; of several
                forward passes a list of these; none is longer than its sequence. None: all tokens are rows.

        Returns:
            the last file that was written; None where every token is padding, and where another process of a
            distributed training writes.

        Raises:
            HookError: nothing was captured since another step was saved, it was captured where it cannot be read, or it
                cannot be written; the step is no number.
        """
        step = whole_step(global_step)
        if self._end is None:
            raise HookError("No hooks are registered: register_hooks(model) comes first.")
        if self.capturing is None:
            return None
        if step == self._given_step:
            return self._last_path
        if self._n_saved and self._n_saved == len(self._forwards):
            if step == self.last_step:
                return self._last_path
            # What is held is another step's.
            self.clear_cache()
        self._check_seen()
        self._take_changes()
        forwards = self._forwards[self._n_saved :]
        paths = self.capturing.save(forwards, self._lengths(lengths, forwards), step, metadata)
        self._n_saved = len(self._forwards)
        self.last_step, self._last_path = step, paths[-1] if paths else None
        return self._last_path

    def save_batch(self, batch: Batch, global_step: int, metadata: Mapping[str, Any] | None = None) -> Path | None:
        """Run a batch of training with the weights as they are now, and save that by ``save_activations`` instead of a
        forward pass of the training's own; nothing is held afterwards.

        Raises:
            HookError: no hooks are registered, or it cannot be run or written.
        """
        if self._end is None:
            raise HookError("No hooks are registered: register_hooks(model) comes first.")
        if self.capturing is None:
            return None
        self._given_step, self._is_given = None, True
        try:
            forward, notes = self.capturing.run(batch)
            self.clear_cache()
            self._hold(forward)
            path = self.save_activations(global_step, dict(metadata or {}) | notes)
        finally:
            self._is_given = False
            self.clear_cache()
        self._given_step = whole_step(global_step)
        return path

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
        self._unkept = None

    def _around(self, call: Callable[[], Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """One forward pass of the model, kept."""
        assert self.capturing is not None
        trained = self.capturing.trained
        if self._of_loop and not self._is_training(trained.module):
            self._left_out = True
            return call()
        forward: Forward | None = None
        with self._told_later():
            tokens = token_ids(args[0] if args else kwargs.get("inputs"))
            if _is_traced(tokens, trained.module):
                self._compiled = True
            else:
                forward = trained.empty(tokens)
                plan = trained.plan(forward)
        if forward is None or self._unkept is not None:
            return call()
        with trained.hooked.instrument.attached(plan):
            output = call()
        with self._told_later():
            self._keep(forward)
        return output

    def _is_training(self, model: nn.Module) -> bool:
        """Whether a call is training's; all are of a model that was never in training mode, where one cannot tell."""
        self._met_training = self._met_training or model.training
        return model.training or not self._met_training

    @contextmanager
    def _told_later(self) -> Iterator[None]:
        """A block whose HookError does not reach a training loop through its own forward pass: saving raises it."""
        if self._of_loop:
            self._unkept = None
        try:
            yield
        except HookError as error:
            if not self._of_loop:
                raise
            self.clear_cache()
            self._unkept = error

    def _keep(self, forward: Forward) -> None:
        self._left_out = False
        if self._of_loop or self._n_saved:
            # What was saved is not written again, so that nobody needs it any more.
            self.clear_cache()
        held = sum(array.nbytes for arrays in self.activations.values() for array in arrays)
        if held + forward.nbytes > self.max_cache_bytes:
            several = len(self._forwards) + 1
            raise HookError(
                f"{readable(held + forward.nbytes)} of {several} forward pass{'es' if several > 1 else ''} are more "
                f"than max_cache_bytes, {readable(self.max_cache_bytes)}: "
                + ("call save_activations and clear_cache more often, " if several > 1 else "raise it, ")
                + "or capture fewer layers."
            )
        self._hold(forward)

    def _hold(self, forward: Forward) -> None:
        self._forwards.append(forward)
        for name, value in forward.values.items():
            self.activations.setdefault(name, []).append(value)

    def _check_seen(self) -> None:
        """Raise HookError where there is nothing that can be saved."""
        how = "on_training_step(batch=...) of MechIntHooks, or MechIntCallback, runs the batch once more to capture it"
        if self._compiled and not self._is_given:
            raise HookError(
                f"The model was called in a function that mx.compile compiled, which shows no values: {how}."
            )
        if self._unkept is not None:
            raise HookError(f"The latest forward pass was not captured: {self._unkept}") from self._unkept
        if not self._forwards and self._left_out:
            raise HookError(
                "Nothing was captured since the last save: calls of the model in evaluation mode are left out as "
                "validation, so call model.train() after it."
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
        shapes = [forward.tokens.shape for forward in forwards]
        if lengths is None or len(shapes) == 1:
            given = lengths[0] if isinstance(lengths, list | tuple) and np.ndim(lengths[0]) == 1 else lengths
            return [check_lengths(given, shape) for shape in shapes]
        if len(lengths) != len(shapes):
            raise HookError(f"lengths has an entry for each of the {len(shapes)} forward passes, got {len(lengths)}.")
        return [check_lengths(given, shape) for given, shape in zip(lengths, shapes, strict=True)]


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
