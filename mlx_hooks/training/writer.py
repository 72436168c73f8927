"""The writer of what a configuration captures."""

from collections.abc import Mapping
from typing import Any

from ..storage.remote import RemoteFolder
from ..storage.shard_writer import ShardWriter
from .config import MechIntConfig


def open_writer(
    config: MechIntConfig,
    layers: Mapping[str, Mapping[str, Any]],
    description: Mapping[str, Any] | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> ShardWriter:
    """Open the folder that a configuration names, before training: what could not be stored is told here.

    Args:
        layers: by canonical name, ``axes`` and ``shape`` of a row, ``dtype``, ``asked``.
        description: plain JSON for the manifest, as ``model``; the configuration is added.
        rank, world_size: of distributed training. With ``writing_ranks="first"`` rank 0 alone opens a writer.

    Raises:
        HookError: the folder cannot be written, is being written, or holds captures that do not go with these; or S3
            cannot be used: no boto3, credentials or bucket, or no answer.
    """
    remote = None
    if config.storage_backend != "local":
        assert config.s3_bucket is not None, "MechIntConfig asks for it"
        remote = RemoteFolder(config.s3_bucket, config.s3_prefix)
    return ShardWriter(
        config.storage_path,
        layers=layers,
        description={**(description or {}), "config": config.to_dict()},
        max_rows=config.max_activations_per_shard,
        rank=rank,
        world_size=world_size,
        each_rank=config.writing_ranks == "all",
        remote=remote,
        keep_local=config.storage_backend != "s3",
    )
