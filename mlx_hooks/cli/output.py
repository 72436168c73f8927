"""What commands write: a file whole or not at all."""

from pathlib import Path

from ..errors import HookError
from ..storage import files


def write_whole(path: Path, text: str | bytes) -> None:
    """Replace a file by a text, or by bytes.

    Raises:
        HookError: when the file cannot be written; an older one is still there.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder; name a file in it")
        files.write_whole(path, text)
    except (OSError, ValueError) as error:
        raise HookError(f"cannot write {path}: {error}") from error
