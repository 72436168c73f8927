"""What commands write: a file whole or not at all."""

from pathlib import Path

from ..errors import HookError


def write_whole(path: Path, text: str) -> None:
    """Replace a file whole or not at all: the text is complete before it gets the name.

    Raises:
        HookError: when the file cannot be written; an older one is still there.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder; name a file in it")
        draft = path.with_name(path.name + ".part")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise HookError(f"cannot write {path}: {error}") from error
