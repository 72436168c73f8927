"""Records of a capture that exceed its memory budget, in safetensors files.

One file per record, written while the model runs, so that a capture of any length needs the memory of its budget.
"""

import json
import re
from pathlib import Path
from types import TracebackType
from typing import cast

import mlx.core as mx

from ..activations import CapturedActivation, labels
from ..errors import HookError
from .files import whole_file

_KEY = "value"


class StoredActivation(CapturedActivation):
    """A record whose value lies in a file and is read from it at each access."""

    def __init__(self, record: CapturedActivation, path: Path) -> None:
        # The class is frozen, and ``value`` is a property here.
        self.__dict__.update(labels(record), path=path, _nbytes=record.value.nbytes)

    @property
    def value(self) -> mx.array:
        """The value, read from the file.

        Raises:
            HookError: when the file is gone or is no safetensors file any more.
        """
        path: Path = self.__dict__["path"]
        try:
            return cast(dict[str, mx.array], mx.load(str(path)))[_KEY]
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise HookError(f"{self.hook_point.name} was spilled to {path}, which cannot be read: {error}") from error

    @property
    def nbytes(self) -> int:
        return self.__dict__["_nbytes"]

    def __repr__(self) -> str:
        return f"StoredActivation({self.hook_point.name}, positions {self.positions}, {self.__dict__['path']})"


class SpillFolder:
    """Takes the records of one capture: the first ones stay in memory, up to a budget, the others go to files.

        with SpillFolder("capture", max_bytes=2**30) as spill:
            kept = spill.keep(record)           # the record itself, or one that reads the same value from its file

    The folder is made when the first file is; when the block ends in an exception, its files are removed.

    Args:
        folder: a new or empty folder.
        max_bytes: most bytes to hold in memory.

    Raises:
        HookError: when there is something in the folder: nothing of another's is overwritten, and an activation cache
            of an earlier capture may still read there.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        if not isinstance(folder, str | Path) or not str(folder):
            raise HookError(f"spill_to is the path of a new or empty folder, got {folder!r}.")
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.bytes_in_memory = 0
        self._written: list[Path] = []
        self._made_folder = False
        try:
            found = next(self.folder.iterdir(), None) if self.folder.exists() else None
        except OSError as error:
            raise HookError(f"spill_to is a folder, and {self.folder} cannot be read as one: {error}.") from error
        if found is not None:
            raise HookError(f"spill_to is a new or empty folder, and {self.folder} holds {found.name!r}: give another.")

    def keep(self, record: CapturedActivation) -> CapturedActivation:
        """The record, or, beyond the budget, one whose value has been computed and written."""
        if self.bytes_in_memory + record.nbytes <= self.max_bytes:
            self.bytes_in_memory += record.nbytes
            return record
        name = re.sub(r"[^\w.-]", "_", record.hook_point.name)
        path = self.folder / f"{len(self._written):06d}_{name}.safetensors"
        try:
            if not self.folder.exists():
                self.folder.mkdir(parents=True)
                self._made_folder = True
            write_tensor(path, record.value, _metadata(record))
        except (OSError, RuntimeError) as error:
            raise HookError(f"{record.hook_point.name} could not be written to {path}: {error}") from error
        self._written.append(path)
        return StoredActivation(record, path)

    def __enter__(self) -> "SpillFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            return
        for path in self._written:
            path.unlink(missing_ok=True)
        if self._made_folder and self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def write_tensor(path: Path, value: mx.array, metadata: dict[str, str]) -> None:
    """Write one array to a safetensors file that is there whole or not at all."""
    with whole_file(path) as draft:
        mx.save_safetensors(str(draft), {_KEY: value}, metadata)


def _metadata(record: CapturedActivation) -> dict[str, str]:
    """What a reader of the file alone needs to know; safetensors holds texts."""
    return {
        "hook_point": record.hook_point.name,
        "axes": json.dumps(record.hook_point.axes),
        "phase": record.phase,
        "step": str(record.step),
        "position_ids": json.dumps(list(record.position_ids)),
        "heads": json.dumps(record.heads),
    }
