"""One start of capturing: a model in training, and the folder to which its rows go."""

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import CaptureWarning, HookError
from ..model import HookedModel
from ..options import plain_json
from ..storage.files import writing
from ..storage.manifest import MANIFEST, rank_folder
from ..storage.remote import RemoteFolder
from ..storage.shard_writer import ShardWriter, hold
from .batches import Batch
from .config import MechIntConfig
from .trained import Forward, TrainedModel
from .writer import open_writer

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SPLIT = ("AllToShardedLinear", "ShardedToAllLinear", "QuantizedAllToShardedLinear", "QuantizedShardedToAllLinear")


class Capturing:
    """Captures a model's activations to a folder. Made before training begins, so that what is wrong is told then.

    Args:
        model: an mlx-lm model, or a HookedModel of it.
        config: what is captured, and where it goes.

    Attributes:
        shards: the files that were written.
        n_rows: the number of rows in them.

    Raises:
        HookError: for layers that cannot be captured, for wrong options of analyses, and where the folder cannot be
            written.
    """

    def __init__(self, model: nn.Module | HookedModel, config: MechIntConfig) -> None:
        # Imported when it is needed: analyses are much to load.
        from .analyses import check_options

        self.config = config
        check_options(config.analysis_options)
        self.rank, n_ranks = ranks()
        self.trained = TrainedModel(model, config.sample_layers)
        if n_ranks > 1 and any(type(module).__name__ in _SPLIT for module in self.trained.module.modules()):
            raise HookError("The model's layers are split among processes: capturing needs whole ones in each.")
        self.shards: list[Path] = []
        self.n_rows = 0
        self._guarded = 0
        self._missed: list[str] = []
        hooked = self.trained.hooked
        model_facts = {"name": self.trained.name or hooked.model_name, **hooked.cfg.to_dict()}
        self.writer: ShardWriter | None = open_writer(
            config, self.trained.layers, {"model": model_facts}, rank=self.rank, world_size=n_ranks
        )

    @classmethod
    def of(cls, model: nn.Module | HookedModel, config: MechIntConfig) -> "Capturing | None":
        """The capturing of this process; None where another one of a distributed training writes."""
        return cls(model, config) if writes_here(config) else None

    def is_due(self, step: int) -> bool:
        """Whether a step is one of those that are captured."""
        return step % self.config.save_hidden_every_n_steps == 0

    def probe(self, batch: Batch, step: int, metadata: Mapping[str, Any] | None = None) -> list[Path]:
        """Run a batch with the weights as they are now, and write its rows; training does not notice.

        Raises:
            HookError: it cannot be run or written.
        """
        forward, notes = self.run(batch)
        return self.save([forward], [None], step, dict(metadata or {}) | notes)

    def run(self, batch: Batch) -> tuple[Forward, dict[str, Any]]:
        """Run a batch with the weights as they are now; answers the forward pass, and metadata to save with it.

        Raises:
            HookError: the model no longer has one of the layers.
        """
        batch = batch.first(self.config.max_sequences_per_step)
        notes = {} if batch.prompts is None else {"prompt_lengths": batch.prompts.tolist()}
        return self.trained.forward(batch.inputs, batch.lengths), notes

    def save(
        self,
        forwards: Iterable[Forward],
        lengths: Iterable[np.ndarray | None],
        step: int,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[Path]:
        """Write the rows of forward passes; answers the files, none where there are no rows.

        Args:
            lengths: of each forward pass what :meth:`Forward.rows` takes.
            metadata: to keep with them; :func:`mlx_hooks.options.plain_json` of it.

        Raises:
            HookError: they cannot be written, the metadata are no plain JSON, or the capturing was closed.
        """
        if self.writer is None:
            raise HookError("Capturing has ended: what was captured is in its folder.")
        notes = plain_json({} if metadata is None else metadata, "metadata")
        if not isinstance(notes, dict):
            raise HookError(f"metadata is a mapping, got {type(metadata).__name__}.", field="metadata")
        parts, starts, start = [], [], 0
        for forward, n in zip(forwards, lengths, strict=True):
            if len(part := forward.rows(n)):
                parts.append(part)
                starts.append(start)
            # Sequences that are all padding count: a row tells which sequence of the batches is its own.
            start += forward.tokens.shape[0]
        if not parts:
            return []
        values = {name: _joined([part.values[name] for part in parts]) for name in parts[0].values}
        mx.eval(values)
        paths = self.writer.write(
            values,
            tokens=np.concatenate([part.tokens for part in parts]),
            sequence=np.concatenate([part.sequence + start for part, start in zip(parts, starts, strict=True)]),
            position=np.concatenate([part.position for part in parts]),
            step=step,
            metadata=notes,
        )
        self.shards += paths
        n_rows = sum(len(part) for part in parts)
        self.n_rows += n_rows
        if self.config.verbose:
            logger.info("step %d: %d rows of %d layers, %s", step, n_rows, len(values), paths[-1].name)
        return paths

    def guard(self, capture: Callable[..., T], *args: Any) -> T | None:
        """Capture, once training has begun, by a function and its arguments: a failure is a warning then, and training
        goes on.

        Raises:
            Exception: when the first of all fails, since little is lost then.
        """
        self._guarded += 1
        try:
            return capture(*args)
        except Exception as error:  # a disk that is full must not end hours of training
            if self._guarded == 1:
                raise
            self._missed.append(_reason(error))
            if len(self._missed) == 1:
                warnings.warn(f"A training step was not captured: {self._missed[0]}", CaptureWarning, stacklevel=3)
            return None

    def statistics(self) -> dict[str, Any]:
        """``total_samples_saved`` (rows in files), ``total_shards``, ``tracked_layers``."""
        return {
            "total_samples_saved": self.n_rows,
            "total_shards": len(self.shards),
            "tracked_layers": list(self.trained.layers),
        }

    def report(self, kind: str, step: int, info: Mapping[str, Any]) -> None:
        """Note a loss report in the manifest: ``kind`` is "train" or "validation"."""
        if self.writer is not None:
            self.writer.report({"kind": kind, "step": step, **_plain(info)})

    def close(self) -> None:
        """End capturing; may be called again.

        Warns:
            CaptureWarning: where steps were not captured, or the folder could not be completed.
        """
        writer, self.writer = self.writer, None
        if writer is None:
            return
        try:
            writer.close()
        except HookError as error:  # the training before it was none the worse
            warnings.warn(f"The end of capturing could not be noted: {error}", CaptureWarning, stacklevel=3)
        if len(self._missed) > 1:
            warnings.warn(
                f"{len(self._missed)} of {self._guarded} steps were not captured, the last one because: "
                f"{self._missed[-1]}",
                CaptureWarning,
                stacklevel=3,
            )


def ranks() -> tuple[int, int]:
    """This process's number in distributed training, and how many there are: (0, 1) outside it."""
    group = mx.distributed.init()
    return group.rank(), group.size()


def writes_here(config: MechIntConfig) -> bool:
    """Whether this process is one that captures."""
    return ranks()[0] == 0 or config.writing_ranks == "all"


def check_storage(config: MechIntConfig) -> None:
    """See to the folder and the bucket of a configuration before a model is loaded; the folder is made.

    Raises:
        HookError: the folder cannot be written or is being written, or S3 cannot be used.
    """
    if not writes_here(config):
        return
    # Where each rank writes, each has a folder of its own: they start at once, and must not meet in one.
    below = rank_folder(ranks()[0]) if config.writing_ranks == "all" else ""
    folder = Path(config.storage_path) / below
    with writing(folder / MANIFEST):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise HookError(f"cannot write {folder}: it may not be changed.", field="storage_path")
    hold(folder).release()
    if config.storage_backend != "local":
        assert config.s3_bucket is not None, "MechIntConfig asks for it"
        RemoteFolder(config.s3_bucket, config.s3_prefix).below(below).read(MANIFEST)


def _joined(values: list[mx.array]) -> mx.array:
    """Rows below one another; patterns get as many keys as the longest, with 0 for those that were not there."""
    if len(values) == 1:
        return values[0]
    shape = np.max([value.shape[1:] for value in values], axis=0).tolist()
    padded = [
        mx.pad(value, [(0, 0), *((0, whole - size) for whole, size in zip(shape, value.shape[1:], strict=True))])
        for value in values
    ]
    return mx.concatenate(padded)


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text if isinstance(error, HookError) and text else f"{type(error).__name__}: {text}"


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    """A report as plain JSON: numbers of MLX and NumPy become Python's, and what is no number a text."""
    plain: dict[str, Any] = {}
    for name, value in info.items():
        number = value.item() if hasattr(value, "item") else value
        plain[str(name)] = number if isinstance(number, bool | int | float | str | None) else str(number)
    return plain
