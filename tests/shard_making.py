"""Shards whose every number follows from the step, and a process that writes them until it is killed.

As a script: reads lines ``FOLDER SECONDS`` and for each forks a writer, which goes on where the folder ends and is
killed after so many seconds; answers a line. ``FOLDER manifest`` and ``FOLDER shard`` kill it inside: before the
manifest is replaced, and when half a shard is written. With an address in S3 as argument it uploads there, and keeps
no copy.
"""

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hooks.storage import shard_writer
from mlx_hooks.storage.manifest import Manifest
from mlx_hooks.storage.remote import RemoteFolder
from mlx_hooks.storage.shard_writer import ShardWriter

ROOT = Path(__file__).parent.parent
LAYER = "blocks.0.hook_resid_post"
LAYERS = {LAYER: {"axes": ["d_model"], "shape": [4], "dtype": "float32", "asked": "model.layers.0"}}


def columns(step: int, n: int) -> dict[str, np.ndarray]:
    """Labels of ``n`` rows of a step, which differ from those of every other step."""
    return {"tokens": np.arange(n) + 1000 * step, "sequence": np.arange(n) // 3, "position": np.arange(n) % 3}


def values(step: int, n: int) -> np.ndarray:
    """[row, 4]"""
    return np.arange(4 * n, dtype=np.float32).reshape(n, 4) + 1000 * step


def write_step(writer: ShardWriter, step: int, n: int = 6, **more: Any) -> list[Path]:
    return writer.write({LAYER: values(step, n)}, step=step, **columns(step, n), **more)


def write_until_killed(folder: Path, moment: str, remote: RemoteFolder | None) -> None:
    writer = ShardWriter(folder, layers=LAYERS, remote=remote, keep_local=remote is None)
    step = 1 + max((entry["step"] for entry in writer.manifest["shards"]), default=-1)
    if moment == "manifest":
        Manifest.save = lambda *_: kill_self()  # type: ignore[method-assign]
    elif moment == "shard":
        shard_writer.write_arrays = half  # type: ignore[assignment]
    while True:
        write_step(writer, step)
        step += 1
        if remote is not None:
            time.sleep(0.02)  # uploads are to be on their way, not far behind


def half(path: Path, arrays: Any, notes: dict[str, str]) -> None:
    path.write_bytes(b"half a shard")
    kill_self()


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def child_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OPENBLAS_NUM_THREADS": "1"}


@contextmanager
def killer(*arguments: str) -> Iterator[Any]:
    """``kill(folder, moment)`` lets a process write shards until it is killed; see above."""
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=child_environment(),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    def kill(folder: Path, moment: float | str) -> None:
        process.stdin.write(f"{folder} {moment}\n")
        process.stdin.flush()
        assert process.stdout.readline().strip() == "9"

    try:
        yield kill
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def main() -> None:
    remote = RemoteFolder.of_url(sys.argv[1]) if len(sys.argv) > 1 else None
    for line in sys.stdin:
        folder, moment = line.split()
        child = os.fork()
        if not child:
            try:
                write_until_killed(Path(folder), moment, remote)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        if moment not in ("manifest", "shard"):
            time.sleep(float(moment))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        sys.stdout.write(f"{os.WTERMSIG(status) if os.WIFSIGNALED(status) else 'not killed'}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
