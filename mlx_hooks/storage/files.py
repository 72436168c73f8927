"""Files and folders that are there whole or not at all, whatever ends the process that writes them.

What is being written has another name beside its own: a leading dot, and ``.writing`` in it. Readers pass it by.
"""

import fcntl
import os
import secrets
import shutil
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import HookError

_MARK = ".writing"
_YOUNG_FOLDER = 60.0
"""Seconds: a folder may be this old before its writer has locked it."""
_YOUNG_FILE = 3600.0
"""Seconds: a file, which nobody locks, may be as old as this before its writer goes on."""


@contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A new path beside ``path`` to write to; when the block ends well, the file takes its place.

        with whole_file(Path("report.json")) as draft:
            draft.write_text(report)

    Args:
        durable: the file survives a crash of the machine too, at the price of waiting for the disk.

    Raises:
        OSError: the file cannot be written, or what is there is no file; it is still there.
    """
    path = _target(path)
    draft = _beside(path)
    try:
        yield draft
        if durable:
            sync(draft)
        draft.replace(path)
    finally:
        if path.parent.exists():
            draft.unlink(missing_ok=True)
    if durable:
        _sync_if_there(path.parent)


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace a file by text in UTF-8, or by bytes."""
    with whole_file(path, durable=durable) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def try_file(path: Path) -> None:
    """Raise OSError if a file could not be written at ``path``; nothing is left there."""
    draft = _beside(_target(path))
    draft.touch()
    draft.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block that writes a file: what goes wrong there is told of the file that was asked for.

    Raises:
        HookError: for a folder, and when the block raises OSError or ValueError.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder; name a file in it")
        yield
    except (OSError, ValueError) as error:
        # The whole text would name the draft, which nobody knows.
        raise HookError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def reading(path: str | Path, what: str, where: str = "it") -> Iterator[None]:
    """A block that reads a file or folder: what goes wrong there is told of it.

        with reading(path, "circuit"):
            return parse(json.loads(path.read_text()))

    Args:
        what: should be there, as a sentence has it.
        where: the place in which a key is missing when one is.

    Raises:
        HookError: when the block finds no file, cannot read it, or stumbles over what it holds.
    """
    try:
        yield
    except HookError as error:
        raise HookError(f"{path} is no {what} that can be read: {error}", field=error.field) from error
    except FileNotFoundError as error:
        raise HookError(f"There is no file {error.filename or path}.") from error
    except OSError as error:
        raise HookError(f"{path} cannot be read: {error.strerror or error}.") from error
    except KeyError as error:
        raise HookError(f"{path} is no {what} that can be read: {where} lacks {error}.") from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise HookError(f"{path} is no {what} that can be read: {str(error).rstrip('.')}.") from error


@contextmanager
def whole_folder(path: Path, *, drafts: Path | None = None, durable: bool = True) -> Iterator[Path]:
    """A new folder to fill; when the block ends well, it gets the name ``path``, with all that is in it.

    It is locked while the block runs, so that :func:`clear_left` knows it from one whose writer was killed.

    Args:
        drafts: where it lies until then, on the same disk; by default beside ``path``. Folders between the two are made
            when they are needed, so they may come and go meanwhile.
        durable: it survives a crash of the machine too, at the price of waiting for the disk.

    Raises:
        OSError: it cannot be written, or there is something at ``path`` already, which stays as it is.
    """
    drafts = path.parent if drafts is None else drafts
    draft = _beside(drafts / path.name)
    draft.mkdir()
    lock = os.open(draft, os.O_RDONLY)
    try:
        # A disk that knows no locks can be saved on: there, what a killed writer left stays.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield draft
        if durable:
            for inside in [*draft.rglob("*"), draft]:
                sync(inside)
        move_folder(draft, path, below=drafts, durable=durable)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a folder's lock for a block: alone, or together with others who share it.

    The system drops it with the process. On a disk that knows no locks the block runs as it is.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class HeldFolder:
    """A folder whose lock one holder has, from when this is made until ``release`` or the end of its block.

    The system drops it with the process. On a disk that knows no locks everyone holds it.

    Raises:
        BlockingIOError: another holds it, in this process or in another.
        OSError: it cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY)
        # A holder that is forgotten holds no more.
        self.release: Callable[[], object] = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise
        except OSError:
            return

    def __enter__(self) -> "HeldFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def move_folder(source: Path, target: Path, *, below: Path, durable: bool = True) -> None:
    """Move a folder at once: a reader sees it at one place or at the other.

    Who lists several folders and must not miss what is moved between them shares the lock of ``below`` meanwhile.

    Args:
        below: a folder above both; those between it and ``target`` are made, and those between it and ``source``
            removed when they are empty.

    Raises:
        OSError: it cannot be moved, or there is something at ``target`` already. Once it has moved, nothing is raised.
    """
    with locked(below):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            source.rename(target)
        finally:
            _remove_empty(target.parent, below)
        _remove_empty(source.parent, below)
    if durable:
        for folder in [target.parent, *target.parent.parents]:
            _sync_if_there(folder)
            if folder == below:
                break


def remove_folder(path: Path, *, drafts: Path | None = None) -> None:
    """Remove a folder and all that is in it: it is gone for every reader at once, before the first file is deleted.

    Args:
        drafts: a folder above it, on the same disk, where it lies until all is deleted; by default the one that it is
            in. Folders between the two are removed when they are empty.

    Raises:
        OSError: it cannot be removed. What cannot be deleted once it is gone for readers is :func:`clear_left`'s.
    """
    drafts = path.parent if drafts is None else drafts
    aside = _beside(drafts / path.name)
    with locked(drafts):
        path.rename(aside)
        _remove_empty(path.parent, drafts)
    if aside.is_symlink():
        aside.unlink(missing_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    for folder in {path.parent, drafts}:
        _sync_if_there(folder)


def clear_left(folder: Path, *, is_held: bool = False) -> None:
    """Remove from a folder what killed writers left in it. What is being written stays, and so does what is young.

    Args:
        is_held: the caller holds the folder and is the only one to write files there: young ones go too.
    """
    for left in folder.iterdir():
        if is_temporary(left.name):
            # Another process may clear the same, and what cannot be removed does no harm.
            with suppress(OSError):
                _clear(left, 0.0 if is_held else _YOUNG_FILE)


def is_temporary(name: str) -> bool:
    """Whether a file or folder is called as what is not whole."""
    return name.startswith(".") and _MARK in name


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_if_there(folder: Path) -> None:
    """``sync`` after what was to be done has been done: another process may have moved the folder since."""
    with suppress(OSError):
        sync(folder)


def _remove_empty(folder: Path, below: Path) -> None:
    """Remove a folder and those above it, up to ``below``, as long as they are empty."""
    with suppress(OSError):
        while folder != below and below in folder.parents:
            folder.rmdir()
            folder = folder.parent


def _target(path: Path) -> Path:
    """The file that is to be replaced: what a link leads to.

    Raises:
        OSError: for a device or a pipe, which would be gone.
    """
    target = path.resolve() if path.is_symlink() else path
    if target.exists() and not target.is_file() and not target.is_dir():
        raise FileExistsError("it is a device or a pipe; name a file")
    return target


def _beside(path: Path) -> Path:
    # The suffix stays the last part: libraries choose a format by it.
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}{_MARK}{path.suffix}")


def _clear(left: Path, young_file: float) -> None:
    state = left.lstat()
    is_folder = stat.S_ISDIR(state.st_mode)
    if time.time() - state.st_mtime < (_YOUNG_FOLDER if is_folder else young_file):
        return
    if not is_folder:
        left.unlink()
        return
    lock = os.open(left, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(left)
    finally:
        os.close(lock)
