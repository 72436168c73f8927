"""What commands write: a file whole or not at all."""

import os
from pathlib import Path

from ..errors import HookError
from ..storage import files


def write_whole(path: Path, text: str | bytes) -> None:
    """Replace a file by a text, or by bytes.

    Raises:
        HookError: when the file cannot be written; an older one is still there.
    """
    try:
        check_target(path)
        files.write_whole(path, text)
    except (OSError, ValueError) as error:
        # The error's own text would name the draft that is written first.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise HookError(f"cannot write {path}: {reason}") from error


def check_target(path: Path) -> None:
    """Say before the work is done that a file cannot be written.

    Raises:
        HookError: it is a folder, or there is none for it, or none that can be written.
    """
    folder = path.absolute().parent
    reason = None
    if path.is_dir():
        reason = "it is a folder; name a file in it"
    elif not folder.is_dir():
        reason = f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK):
        reason = f"nothing may be written in {folder}"
    if reason is not None:
        raise HookError(f"cannot write {path}: {reason}")
