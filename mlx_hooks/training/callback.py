"""``MechIntCallback``: capture while ``mlx_lm`` trains."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.tuner.callbacks import TrainingCallback

from ..errors import CaptureWarning, HookError
from ..model import HookedModel
from .batches import ReadBatch, read_batch
from .capturing import Capturing, writes_here
from .config import MechIntConfig


class MechIntCallback(TrainingCallback):
    """Captures activations of training batches while mlx-lm trains a model. Losses and weights are, bit for bit, those
    of the same training without it.

        callback = MechIntCallback({"sample_layers": ["model.layers.1"], "save_hidden_every_n_steps": 100})
        callback.train(model, optimizer, train_set, val_set, args=args)         # mlx_lm.tuner.train's arguments

        with callback.inside_lora():                                            # or mlx_lm's command, from Python
            mlx_lm.lora.run(args)

        callback = MechIntCallback(config, model)                               # or by hand
        train(model, optimizer, train_set, val_set, args=args, training_callback=callback,
              iterate_batches=callback.wrap_batches(iterate_batches))
        callback.finish()

    mlx-lm compiles its training step, so that hooks in it would see nothing. Instead a batch is run once more before it
    is handed to the step, without dropout, with the weights as they are then. Batches for validation are passed on.

    A step is the number of batches on which the weights had been trained: step 0 is the first batch and the weights as
    they were. Steps that are multiples of ``save_hidden_every_n_steps`` are captured. Where gradients are accumulated,
    batches count, not updates.

    Args:
        config: a :class:`MechIntConfig`, or a mapping with its fields.
        model: the model that will be trained; ``train`` and ``inside_lora`` know it themselves.
        first_step: the number of batches of earlier training that this one continues.
        wrapped_callback: another TrainingCallback, which is told of everything too.
        read_batch: answers what the model reads of a batch, for losses and batches of one's own: a
            ``mlx_hooks.training.batches.Batch``.

    Attributes:
        saved_shards: the files that were written.
        step: the number of batches on which the weights have been trained; None before the first.

    Raises:
        HookError: for a wrong configuration, and when the model is given for what cannot be captured of it.
    """

    def __init__(
        self,
        config: MechIntConfig | Mapping[str, Any] | None = None,
        model: nn.Module | HookedModel | None = None,
        *,
        first_step: int = 0,
        wrapped_callback: TrainingCallback | None = None,
        read_batch: ReadBatch = read_batch,
    ) -> None:
        self.config = MechIntConfig.of(config)
        if isinstance(first_step, bool) or not isinstance(first_step, int) or first_step < 0:
            raise HookError(f"first_step is a whole number from 0 up, got {first_step!r}.", field="first_step")
        self.first_step = first_step
        self.wrapped_callback = wrapped_callback
        self.read_batch = read_batch
        self.saved_shards: list[Path] = []
        self.step: int | None = None
        self._capturing: Capturing | None = None
        self._model: nn.Module | None = None
        self._finished = self._has_told = False
        if model is not None:
            self._start(model)

    def train(
        self,
        model: nn.Module,
        optimizer: Any,
        train_dataset: Any,
        val_dataset: Any = None,
        args: Any = None,
        loss: Callable | None = None,
        iterate_batches: Callable | None = None,
        training_callback: TrainingCallback | None = None,
    ) -> None:
        """``mlx_lm.tuner.train`` with capture; its arguments, and its defaults.

        Raises:
            HookError: before training begins, for what cannot be captured or written.
        """
        from mlx_lm.tuner import trainer

        self._start(model)
        try:
            trainer.train(
                model.model if isinstance(model, HookedModel) else model,
                optimizer,
                train_dataset,
                val_dataset,
                args=trainer.TrainingArgs() if args is None else args,
                loss=trainer.default_loss if loss is None else loss,
                iterate_batches=self.wrap_batches(iterate_batches),
                training_callback=self if training_callback is None else _Both(training_callback, self),
            )
        finally:
            self.finish()

    @contextmanager
    def inside_lora(self) -> Iterator["MechIntCallback"]:
        """A block in which ``mlx_lm.lora.run`` and ``mlx_lm.lora.train_model`` train with capture."""
        from mlx_lm import lora

        plain = lora.train
        lora.train = self.train
        try:
            yield self
        finally:
            lora.train = plain
            self.finish()

    def wrap_batches(self, iterate_batches: Callable | None = None) -> Callable[..., Iterator[Any]]:
        """mlx-lm's ``iterate_batches``, or one with its arguments, that captures as it gives batches for training.

        Raises:
            HookError: the model is not known.
        """
        from mlx_lm.tuner import trainer

        plain = trainer.iterate_batches if iterate_batches is None else iterate_batches
        if self._model is None:
            raise HookError("The model to capture is not known: MechIntCallback(config, model).", field="model")

        def batches(*args: Any, loop: bool = False, **options: Any) -> Iterator[Any]:
            found = plain(*args, loop=loop, **options)
            return self._captured(found) if loop else found

        return batches

    def get_statistics(self) -> dict[str, Any]:
        """``total_samples_saved`` (rows in files), ``total_shards``, ``tracked_layers``; empty where another process of
        a distributed training writes."""
        return {} if self._capturing is None else self._capturing.statistics()

    def finish(self) -> None:
        """End capturing; the folder is complete. May be called again.

        Warns:
            CaptureWarning: how many steps were not captured, where some were not.
        """
        self._finished = True
        if self._capturing is not None:
            self._capturing.close()

    def on_train_loss_report(self, train_info: dict) -> None:
        """Note a loss in the manifest.

        Warns:
            CaptureWarning: the training's batches are not wrapped, so that nothing is captured; once.
        """
        self._tell_of_batches()
        self._report("train", train_info, int(train_info.get("iteration", 0)))
        if self.wrapped_callback is not None:
            self.wrapped_callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict) -> None:
        """Note a validation loss in the manifest."""
        self._report("validation", val_info, int(val_info.get("iteration", 0)))
        if self.wrapped_callback is not None:
            self.wrapped_callback.on_val_loss_report(val_info)

    def _start(self, model: nn.Module | HookedModel) -> None:
        module = model.model if isinstance(model, HookedModel) else model
        if self._finished:
            raise HookError("This callback's training has ended: make a new MechIntCallback.")
        if self._model is not None:
            if self._model is not module:
                raise HookError("This callback was made for another model.", field="model")
            return
        self._capturing = Capturing.of(model, self.config)
        self._model = module

    def _captured(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, some of which are captured before they are given."""
        try:
            for step, batch in enumerate(batches, self.first_step):
                self.step = step
                capturing = self._capturing
                if capturing is not None and capturing.is_due(step) and not self._finished:
                    self.saved_shards += capturing.guard(self._probe, capturing, batch, step) or []
                yield batch
        finally:
            self.finish()

    def _probe(self, capturing: Capturing, batch: Any, step: int) -> list[Path]:
        return capturing.probe(self.read_batch(batch), step)

    def _tell_of_batches(self) -> None:
        if self.step is not None or self._has_told or not writes_here(self.config):
            return
        self._has_told = True
        warnings.warn(
            "Nothing is captured, since the training's batches are not wrapped: train by callback.train, or make "
            "MechIntCallback(config, model) and give train iterate_batches=callback.wrap_batches(iterate_batches).",
            CaptureWarning,
            stacklevel=3,
        )

    def _report(self, kind: str, info: Mapping[str, Any], iteration: int) -> None:
        if self._capturing is not None:
            self._capturing.report(kind, self.first_step + iteration, info)


class _Both(TrainingCallback):
    """Tells two callbacks of everything."""

    def __init__(self, *callbacks: TrainingCallback) -> None:
        self.callbacks = callbacks

    def on_train_loss_report(self, train_info: dict) -> None:
        for callback in self.callbacks:
            callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict) -> None:
        for callback in self.callbacks:
            callback.on_val_loss_report(val_info)
