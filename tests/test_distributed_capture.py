"""Capture in distributed training: two processes on this machine, in MLX's ring."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tiny_models import make_model
from training_runs import folder_of

from mlx_hooks import ActivationSampler, HookError, MechIntConfig, MechIntHooks
from mlx_hooks.storage.files import HeldFolder
from mlx_hooks.storage.shards import ShardReader
from mlx_hooks.training.capturing import check_storage

HERE = Path(__file__).parent
SECONDS = 120


def ring(folder: Path, configs: list[dict[str, Any] | None]) -> list[list[SimpleNamespace]]:
    """What each of two processes tells of each training."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    command = [sys.executable, str(HERE / "ring_training.py"), str(folder), json.dumps(configs)]
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    running = [
        subprocess.Popen(
            command,
            env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            said, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, said
    finally:
        for process in running:
            process.kill()
            process.wait()
    told = [json.loads((folder / f"results_{rank}.json").read_text()) for rank in range(2)]
    return [[SimpleNamespace(**process) for process in training] for training in zip(*told, strict=True)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def config(folder: Path, **more: Any) -> dict[str, Any]:
    return {"storage_path": str(folder / "shards"), "save_hidden_every_n_steps": 2} | more


def read_tokens(batch: list[list[int]]) -> list[int]:
    """The tokens that the model reads of a batch, without padding, whose id is 0."""
    return [token for row in batch for token in row[:-1] if token]


def test_the_first_rank_writes_or_each_its_own(tmp_path: Path) -> None:
    one, all_ = tmp_path / "one", tmp_path / "all"
    configs = [None, config(one), config(all_, writing_ranks="all")]
    plain, first, each = ring(tmp_path, configs)
    assert [process.size for process in plain] == [2, 2]
    assert plain[0].batches != plain[1].batches
    for captured_ in (first, each):
        assert [(process.losses, process.weights) for process in captured_] == [(p.losses, p.weights) for p in plain]
    assert [process.n_shards for process in first] == [3, 0]
    found = folder_of(one / "shards")
    assert found.steps == [0, 2, 4]
    for step, (shard,) in found.shards.items():
        assert shard.tokens.tolist() == read_tokens(plain[0].batches[step])
    assert [process.n_shards for process in each] == [3, 3]
    reader = ShardReader(all_ / "shards")
    rows = reader.rows(2)
    part = rows.take(np.arange(len(rows)))
    for rank in range(2):
        for step in (0, 2, 4):
            assert part.rank is not None
            chosen = (part.rank == rank) & (part.step == step)
            assert part.tokens is not None
            assert part.tokens[chosen].tolist() == read_tokens(plain[rank].batches[step])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_does_not_write(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_hooks.training.capturing.ranks", lambda: (rank, 2))
    model, idle = make_model("llama"), rank == 1
    plain, tokens = type(model), mx.ones((1, 4), mx.int32)
    with MechIntHooks(config(tmp_path)) as hooks:
        hooks.register_hooks(model)
        assert (hooks.sampler is None) == idle
        assert (hooks.on_training_step(batch=tokens, global_step=0) is None) == idle
    with ActivationSampler(save_dir=tmp_path / "sampled") as sampler:
        sampler.register_hooks(model)
        assert (type(model) is plain) == idle
        model(tokens)
        assert (sampler.save_activations(0) is None) == idle
    assert [(tmp_path / name).exists() for name in ("shards", "sampled")] == [not idle] * 2
    assert type(model) is plain


def test_storage_is_seen_to_by_each_rank_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_hooks.training.capturing.ranks", lambda: (1, 2))
    folder = tmp_path / "shards"
    folders = [folder / f"rank_00{rank}" for rank in range(2)]
    for one in folders:
        one.mkdir(parents=True)
    with HeldFolder(folder), HeldFolder(folders[0]):
        check_storage(MechIntConfig(storage_path=folder, writing_ranks="all"))
        # Rank 0 alone writes, and sees to it.
        check_storage(MechIntConfig(storage_path=folder))
    with HeldFolder(folders[1]), pytest.raises(HookError, match="rank_001 is being written by another run"):
        check_storage(MechIntConfig(storage_path=folder, writing_ranks="all"))


def test_layers_split_among_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_hooks.training.capturing.ranks", lambda: (0, 2))
    model = make_model("llama")
    model.model.layers[0].mlp.extra = nn.layers.distributed.AllToShardedLinear(4, 4)
    with pytest.raises(HookError, match="The model's layers are split among processes"):
        MechIntHooks(config(tmp_path)).register_hooks(model)
