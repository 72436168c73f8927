"""What commands write: a file whole or not at all."""

from pathlib import Path

from ..storage import files


def write_whole(path: Path, text: str | bytes) -> None:
    """Replace a file by a text, or by bytes.

    Raises:
        HookError: when the file cannot be written; an older one is still there.
    """
    with files.writing(path):
        files.write_whole(path, text)


def check_writable(path: Path) -> None:
    """Raise HookError if a file could not be written at ``path``; nothing is left there."""
    with files.writing(path):
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.absolute().parent}")
        files.try_file(path)
