"""A NeuroScope server in a process of its own, for as long as a ``with`` block lasts."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

READY = "NeuroScope server on "


@contextmanager
def local_server(model: str | None = None) -> Iterator[str]:
    """Start ``python -m api_server`` on a free port and answer its URL; it is stopped at the end of the block.

    Raises:
        RuntimeError: the server did not start; with what it said.
    """
    command = [sys.executable, "-m", "api_server", "--port", "0", *(["--model", model] if model else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.startswith(READY):
            raise RuntimeError(f"The server did not start: {line or 'it ended'}")
        yield line.removeprefix(READY).strip()
    finally:
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
