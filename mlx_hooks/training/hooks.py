"""``MechIntHooks``: capture in a training loop of one's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import HookError
from ..model import HookedModel
from ..storage.shard_writer import whole_step
from .batches import read_batch
from .capturing import Capturing, writes_here
from .config import MechIntConfig
from .sampler import ActivationSampler


class MechIntHooks:
    """Captures activations in a training loop of one's own, eager or compiled.

        hooks = MechIntHooks(config)
        hooks.register_hooks(model)
        for step, batch in enumerate(batches):
            hooks.on_training_step(batch=batch, global_step=step)      # captures when step % N == 0
            loss = train_step(batch)                                   # mx.compile or not
        hooks.on_train_end()

    ``on_training_step`` with a batch runs it once more, without dropout, with the weights that it finds: called before
    the update, those that the batch is trained on. In a loop without ``mx.compile`` the training's own forward pass can
    be saved instead: leave the batch out, or call ``hooks.sampler.save_activations(step)``, which save the latest one.
    Calls in evaluation mode (``model.eval()``) are validation and are not kept, unless the model was never in training
    mode. What cannot be kept does not disturb the forward pass, and is told when it is to be saved. A step whose batch
    was captured is not saved once more. The arguments ``trainer`` and ``pl_module`` are accepted as in loops of other
    frameworks and are without effect.

    Args:
        config: a :class:`MechIntConfig`, or a mapping with its fields.
        sampler: the class of the sampler: :class:`ActivationSampler`, or a subclass with its arguments.

    Attributes:
        sampler: keeps the latest forward pass of training; None before ``register_hooks``, and in a process of a
            distributed training that does not write.
        saved_shards: the files that were written.
    """

    def __init__(
        self,
        config: MechIntConfig | Mapping[str, Any] | None = None,
        sampler: type[ActivationSampler] = ActivationSampler,
    ) -> None:
        if not (isinstance(sampler, type) and issubclass(sampler, ActivationSampler)):
            raise HookError(f"sampler is ActivationSampler or a subclass of it, got {sampler!r}.", field="sampler")
        self.config = MechIntConfig.of(config)
        self._sampler_class = sampler
        self.sampler: ActivationSampler | None = None
        self.saved_shards: list[Path] = []
        self._registered = False
        self._epoch = 0
        self._n_steps = 0
        self._latest: int | None = None

    def register_hooks(self, model: nn.Module | HookedModel, trainer: Any = None) -> None:
        """Begin capturing of a model.

        Raises:
            HookError: for layers that it does not have, a folder that cannot be written, and a second time.
        """
        if self._registered:
            raise HookError("Hooks are registered already: on_train_end() ends that.")
        if writes_here(self.config):
            sampler = self._sampler_class.of_loop(self.config)
            sampler.register_hooks(model)
            self.sampler = sampler
        self._registered = True
        self._latest = None

    def on_training_step(
        self,
        trainer: Any = None,
        pl_module: Any = None,
        outputs: Any = None,
        batch: Any = None,
        batch_idx: int | None = None,
        global_step: int | None = None,
    ) -> Path | None:
        """Capture this step, if it is one of every N.

        Args:
            batch: token ids [batch, pos] as the model reads them, or a pair of these and lengths, as mlx-lm's
                ``iterate_batches`` gives them, of which the model reads all columns but the last. None saves the latest
                forward pass.
            global_step: a whole number from 0 up; counted from 0 without it.

        Returns:
            the last file that was written; None where nothing was.

        Raises:
            HookError: no hooks are registered, the step is no number, or the first step of all cannot be captured.

        Warns:
            CaptureWarning: a later step could not be captured.
        """
        capturing = self._capturing()
        step = self._n_steps if global_step is None else whole_step(global_step)
        self._n_steps = step + 1
        if capturing is None or step == self._latest:
            return None
        assert self.sampler is not None
        if not capturing.is_due(step):
            if batch is None:
                # So that a later step is not saved with this one's forward pass.
                self.sampler.clear_cache()
            return None
        notes = {"epoch": self._epoch} | ({} if batch_idx is None else {"batch_idx": int(batch_idx)})
        path = None
        if batch is None:
            path = capturing.guard(self.sampler.save_activations, step, notes)
        elif step != self.sampler.last_step:  # else it was saved by hand, from the training's own forward pass
            path = capturing.guard(_save_batch, self.sampler, batch, step, notes)
        self._latest = step
        self.saved_shards += [shard for shard in capturing.shards if shard not in self.saved_shards]
        return path

    def on_epoch_end(self, trainer: Any = None, pl_module: Any = None) -> None:
        """Note in what is captured from now on that another epoch has begun."""
        self._epoch += 1

    def on_train_end(self, trainer: Any = None, pl_module: Any = None) -> None:
        """End capturing: the model is as if it had never been hooked, and the folder is complete."""
        if self.sampler is not None:
            self.sampler.remove_hooks()
        self._registered = False

    def __enter__(self) -> "MechIntHooks":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.on_train_end()

    def _capturing(self) -> Capturing | None:
        if not self._registered:
            raise HookError("No hooks are registered: register_hooks(model) comes first.")
        return None if self.sampler is None else self.sampler.capturing


def _save_batch(sampler: ActivationSampler, batch: Any, step: int, notes: Mapping[str, Any]) -> Path | None:
    return sampler.save_batch(read_batch(batch), step, notes)
