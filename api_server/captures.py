"""The capture store: runs' activations in files, to be read back later in ranges.

    store = CaptureStore(max_bytes=2**32)
    with store.begin() as writer:                       # discarded unless it is finished
        writer.add(fields, array)
        writer.finish(about)
    store.get(writer.capture_id).array(0)               # a view of the file: only what is looked at is read

A capture is a folder, named by its id, of two files: ``data.bin`` has the arrays' bytes, little-endian, C order, each
at a multiple of 64; ``manifest.json`` says what they are. It is written under another name and renamed when it is
whole, so one that a crash cut short is known by its name and removed at the next start. Nothing but such folders is
touched.
"""

import fcntl
import logging
import math
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mlx_hooks.storage.files import sync
from neuroscope_bridge import payload

from .errors import CapturesBusy, CapturesUnwritable, CaptureTooLarge, Stopping, UnknownCapture

log = logging.getLogger("api_server.captures")

ALIGNMENT = 64
BLOCK = 4096
"""What a file takes on disk is a multiple of this; a capture is two files and their folder."""

_FINISHED = re.compile(r"cap-[0-9a-f]{32}")
_UNFINISHED = re.compile(r"\.writing-cap-[0-9a-f]{32}")
_PREFIX = "neuroscope-captures-"
_LOCK, _DATA, _MANIFEST = ".lock", "data.bin", "manifest.json"


class StoredRecord(BaseModel):
    """One array of a capture: where it lies in the data, and the fields of its wire record."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    offset: int = Field(ge=0, multiple_of=ALIGNMENT)
    nbytes: int = Field(ge=0)
    dtype: Literal["float32", "float16", "int32"]
    shape: list[int]
    axes: list[str]
    hook_id: str
    layer_name: str
    component: str
    hook_point: str
    layer_index: int | None
    phase: str
    step: int
    pass_index: int
    positions: tuple[int, int]
    is_input: bool
    position_ids: list[int] | None = None
    heads: list[int] | None = None
    reduce: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> "StoredRecord":
        if len(self.axes) != len(self.shape) or min(self.shape, default=0) < 0:
            raise ValueError(f"shape {self.shape} with axes {self.axes}")
        if self.nbytes != math.prod(self.shape) * self.numpy_dtype.itemsize:
            raise ValueError(f"{self.nbytes} bytes for shape {self.shape} of {self.dtype}")
        return self

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")


class CaptureAbout(BaseModel):
    """What a capture's description says of its run."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    model: str
    n_layers: int
    n_heads: int
    head_counts: dict[str, int] = Field(default_factory=dict)
    """How many heads the model has at each captured hook point with a head axis: fewer at k and v."""
    tokens: dict[str, Any]
    hooks: dict[str, Any]
    interventions: list[dict[str, Any]] = Field(default_factory=list)
    finish_reason: str | None = None

    @property
    def prompt_length(self) -> int:
        return int(self.tokens["prompt_length"])


class Manifest(BaseModel):
    """``manifest.json``"""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    version: Literal[1] = 1
    capture_id: str
    created: float
    data_bytes: int = Field(ge=0)
    about: CaptureAbout
    records: list[StoredRecord]

    @model_validator(mode="after")
    def _is_whole(self) -> "Manifest":
        for record in self.records:
            if record.offset + record.nbytes > self.data_bytes:
                raise ValueError(f"a record ends at byte {record.offset + record.nbytes} of {self.data_bytes}")
        return self


@dataclass(frozen=True)
class Entry:
    """A capture in the list: what is known of it without opening it. ``used`` is when it was last read or made."""

    capture_id: str
    created: float
    used: float
    nbytes: int
    disk_bytes: int
    model: str
    hook_ids: tuple[str, ...]
    prompt_length: int
    n_tokens: int

    @classmethod
    def of(cls, manifest: Manifest, disk_bytes: int, used: float) -> "Entry":
        about = manifest.about
        return cls(
            capture_id=manifest.capture_id,
            created=manifest.created,
            used=used,
            nbytes=sum(record.nbytes for record in manifest.records),
            disk_bytes=disk_bytes,
            model=about.model,
            hook_ids=tuple(about.hooks),
            prompt_length=about.prompt_length,
            n_tokens=len(about.tokens["ids"]),
        )


@dataclass(frozen=True)
class Damaged:
    """A capture that cannot be read. It takes room, and is the first to make some."""

    capture_id: str
    used: float
    disk_bytes: int


class Capture:
    """A finished capture, open for reading. It reads whole even if it is deleted meanwhile."""

    def __init__(self, entry: Entry, manifest: Manifest, data: np.ndarray) -> None:
        self.entry = entry
        self.capture_id = manifest.capture_id
        self.about = manifest.about
        self.records = manifest.records
        self._data = data

    def array(self, record: StoredRecord) -> np.ndarray:
        """A record's array: a read-only view of the file."""
        raw = self._data[record.offset : record.offset + record.nbytes]
        return raw.view(record.numpy_dtype).reshape(record.shape)


class CaptureStore:
    """Finished captures, within a bound of bytes and of age.

    Args:
        folder: where captures are kept and found again at the next start; made, for this user only, if it is not
            there. None: a temporary folder that is removed with the store.
        max_bytes: most bytes on disk; those unused for longest make room.
        max_age: seconds after which a capture that nobody reads is removed.
        clock: the time, in seconds since 1970.

    Raises:
        CannotOpenCaptures: the folder cannot be used, or another server does so.
    """

    def __init__(
        self,
        folder: Path | None = None,
        max_bytes: int = 4 * 2**30,
        max_age: float = 3600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.max_bytes = max_bytes
        self.max_age = max_age
        self.clock = clock
        self.durable = folder is not None
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}  # in the order of use
        self._damaged: dict[str, Damaged] = {}
        self._kept = 0
        self._claimed = 0
        self._folder: Path | None = None
        self._closed = False
        self._leave: Callable[[], object] = lambda: None
        if folder is not None:
            self._open(Path(folder).expanduser())

    # -- reading ------------------------------------------------------------------------------------------------------

    def captures(self) -> list[Entry]:
        """All captures, the newest first."""
        with self._lock:
            self._forget_old()
            return sorted(self._entries.values(), key=lambda entry: (-entry.created, entry.capture_id))

    def get(self, capture_id: str) -> Capture:
        """Open a capture, which counts as use.

        Raises:
            UnknownCapture: lists those that there are.
        """
        try:
            with self._lock:
                self._forget_old()
                entry = replace(self._known(capture_id), used=self.clock())
                folder = self._path(capture_id)
                # From here on it may be deleted: what is open stays.
                text, data = (folder / _MANIFEST).read_bytes(), _map(folder / _DATA)
                os.utime(folder, (entry.used, entry.used))
                self._drop(entry)
                self._enter(entry)
            # A long one takes a while, in which nobody waits.
            return Capture(entry, _checked(text, capture_id, data), data)
        except (OSError, ValueError) as error:
            log.warning("capture %s is damaged and left out: %s", capture_id, _reason(error))
            with self._lock:
                if capture_id in self._entries:
                    entry = self._entries[capture_id]
                    self._drop(entry)
                    self._enter(Damaged(capture_id, entry.used, entry.disk_bytes))
                raise self._unknown(capture_id) from error

    @property
    def disk_bytes(self) -> int:
        """What all captures and those that are being written take."""
        with self._lock:
            return self._claimed + self._kept

    def delete(self, capture_id: str) -> None:
        """Forget a capture, also a damaged one.

        Raises:
            UnknownCapture: lists those that there are.
        """
        with self._lock:
            self._forget_old()
            self._remove(self._damaged.get(capture_id) or self._known(capture_id))

    def clear(self) -> int:
        """Forget all captures, damaged ones too; answers how many there were."""
        with self._lock:
            entries = self._all()
            for entry in entries:
                self._remove(entry)
            return len(entries)

    def forget_old(self) -> None:
        """Remove the captures that nobody has read for ``max_age``; a thread of the store's does so now and then."""
        with self._lock:
            if self._folder is not None:
                self._forget_old()

    def close(self) -> None:
        """Let the folder go; a temporary one is removed."""
        with self._lock:
            self._leave()
            self._entries.clear()
            self._damaged.clear()
            self._kept = 0
            self._folder = None
            self._closed = True

    # -- writing ------------------------------------------------------------------------------------------------------

    def begin(self, claimed: bool = True) -> "CaptureWriter":
        """Start a capture.

        Args:
            claimed: whether it takes room from the first byte on. One that may turn out not to be needed does so only
                from its ``claim`` on: nothing is removed for its sake before.
        """
        with self._lock:
            if self._closed:
                raise Stopping
            if self._folder is None:
                self._open(None)
            self._forget_old()
            return CaptureWriter(self, claimed)

    def _reserve(self, writer: "CaptureWriter", nbytes: int) -> None:
        """Make room for more bytes of an unfinished capture."""
        with self._lock:
            if writer.reserved + nbytes > self.max_bytes:
                raise CaptureTooLarge(self.max_bytes)
            if self._claimed + nbytes > self.max_bytes:
                raise CapturesBusy(self.max_bytes)
            self._claimed += nbytes
            writer.reserved += nbytes
            self._make_room()

    def _settle(self, writer: "CaptureWriter", manifest: Manifest | None) -> None:
        """An unfinished capture has ended: it is one of the finished ones now, or it is gone."""
        with self._lock:
            if manifest is None or self._folder is None:
                self._claimed -= writer.reserved
                writer.reserved = 0
                _remove_folder(writer.folder)
                if manifest is not None:
                    raise Stopping
                return
            os.utime(writer.folder, (manifest.created, manifest.created))
            writer.folder.rename(self._path(manifest.capture_id))
            if self.durable:
                sync(self._folder)
            self._claimed -= writer.reserved
            self._enter(Entry.of(manifest, writer.reserved, manifest.created))
            self._forget_old()

    def _unfinished(self, capture_id: str) -> Path:
        assert self._folder is not None
        return self._folder / f".writing-{capture_id}"

    # -- housekeeping -------------------------------------------------------------------------------------------------

    def _open(self, folder: Path | None) -> None:
        private = folder is None
        try:
            if folder is None:
                _clear_away_left_ones()
                folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
            else:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(lock)
                raise CannotOpenCaptures(f"another server keeps its captures in {folder}: choose another.") from error
        except OSError as error:
            raise CannotOpenCaptures(f"captures cannot be kept in {folder}: {error.strerror or error}.") from error
        stopped = threading.Event()
        # Also at the interpreter's exit, and when nobody has the store any more.
        self._leave = weakref.finalize(self, _let_go, lock, folder if private else None, stopped)
        self._folder = folder
        self._find()
        pause = min(60.0, max(1.0, self.max_age / 10))
        arguments = (weakref.ref(self), stopped, pause)
        threading.Thread(target=_keep_house, args=arguments, name="captures-housekeeping", daemon=True).start()

    def _find(self) -> None:
        """The captures of an earlier server."""
        assert self._folder is not None
        found: list[Entry | Damaged] = []
        now = self.clock()
        for path in sorted(self._folder.iterdir()):
            if path.is_symlink() or not path.is_dir():
                continue
            if _UNFINISHED.fullmatch(path.name):
                _remove_folder(path)
            elif _FINISHED.fullmatch(path.name):
                try:
                    manifest = _checked((path / _MANIFEST).read_bytes(), path.name, _map(path / _DATA))
                    sizes = [(path / name).stat().st_size for name in (_DATA, _MANIFEST)]
                    found.append(Entry.of(manifest, _on_disk(*sizes), min(now, path.stat().st_mtime)))
                except (OSError, ValueError) as error:
                    # It may be worth something to its owner: it stays, within the bounds.
                    log.warning("capture %s is damaged and left out: %s", path.name, _reason(error))
                    found.append(Damaged(path.name, min(now, path.stat().st_mtime), _size_of(path)))
        for entry in sorted(found, key=lambda entry: entry.used):
            self._enter(entry)
        self._forget_old()
        self._make_room()

    def _forget_old(self) -> None:
        oldest = self.clock() - self.max_age
        # All of them: where the clock was set back, the order of use is not that of time.
        for entry in self._all():
            if entry.used < oldest:
                self._remove(entry)

    def _all(self) -> "list[Entry | Damaged]":
        """In the order in which they make room."""
        return [*self._damaged.values(), *self._entries.values()]

    def _make_room(self) -> None:
        for entry in self._all():
            if self.disk_bytes <= self.max_bytes:
                return
            self._remove(entry)

    def _enter(self, entry: Entry | Damaged) -> None:
        """Put a capture at the end of the order of use."""
        if isinstance(entry, Damaged):
            self._damaged[entry.capture_id] = entry
        else:
            self._entries[entry.capture_id] = entry
        self._kept += entry.disk_bytes

    def _drop(self, entry: Entry | Damaged) -> None:
        if isinstance(entry, Damaged):
            del self._damaged[entry.capture_id]
        else:
            del self._entries[entry.capture_id]
        self._kept -= entry.disk_bytes

    def _remove(self, entry: Entry | Damaged) -> None:
        self._drop(entry)
        if isinstance(entry, Damaged):
            log.warning("capture %s, which is damaged, is removed", entry.capture_id)
        # Renamed first: half removed, it would be a damaged one at the next start.
        gone = self._unfinished(entry.capture_id)
        try:
            self._path(entry.capture_id).rename(gone)
        except OSError as error:
            log.warning("capture %s cannot be removed: %s", entry.capture_id, _reason(error))
            return
        _remove_folder(gone)

    def _path(self, capture_id: str) -> Path:
        assert self._folder is not None
        return self._folder / capture_id

    def _known(self, capture_id: str) -> Entry:
        # A look-up, never a path made of what a request says.
        if capture_id not in self._entries:
            raise self._unknown(capture_id)
        return self._entries[capture_id]

    def _unknown(self, capture_id: str) -> UnknownCapture:
        return UnknownCapture(capture_id, [entry.capture_id for entry in self.captures()])


class CaptureWriter:
    """A capture that is being written; made by ``CaptureStore.begin``. For one thread.

    Every method but ``discard`` raises ``CaptureTooLarge``, ``CapturesBusy`` (no room) or ``CapturesUnwritable``.
    """

    def __init__(self, store: CaptureStore, claimed: bool) -> None:
        self.capture_id = f"cap-{uuid.uuid4().hex}"
        self.folder = store._unfinished(self.capture_id)
        self.reserved = 0
        self._store = store
        self._is_claimed = False
        self._open = True
        self._size = 0
        self._records: list[StoredRecord] = []
        try:
            self.folder.mkdir(mode=0o700)
            self._file: IO[bytes] = (self.folder / _DATA).open("wb")
        except OSError as error:
            raise CapturesUnwritable(_reason(error)) from error
        if claimed:
            self.claim()

    def claim(self) -> None:
        """This capture is needed: from now on it takes room of older ones."""
        if not self._is_claimed:
            self._reserve_up_to(_on_disk(self._size, 0))
            self._is_claimed = True

    def add(self, fields: dict[str, Any], array: np.ndarray) -> None:
        """Append an array.

        Args:
            fields: those of its wire record but ``data`` and ``encoding``.
            array: float32, float16 or int32.
        """
        raw = payload.array_bytes(array)
        offset = -(-self._size // ALIGNMENT) * ALIGNMENT
        if self._is_claimed:
            self._reserve_up_to(_on_disk(offset + len(raw), 0))
        try:
            self._file.write(b"\0" * (offset - self._size))
            self._file.write(raw)
        except OSError as error:
            raise CapturesUnwritable(_reason(error)) from error
        self._size = offset + len(raw)
        fields = {name: value for name, value in fields.items() if name not in ("data", "encoding")}
        placed = {"offset": offset, "nbytes": len(raw), "dtype": array.dtype.name, "shape": list(array.shape)}
        self._records.append(StoredRecord(**fields | placed))

    def finish(self, about: CaptureAbout) -> None:
        """Make it one of the store's captures."""
        self.claim()
        manifest = Manifest(
            capture_id=self.capture_id,
            created=self._store.clock(),
            data_bytes=self._size,
            about=about,
            records=self._records,
        )
        text = manifest.model_dump_json().encode()
        self._reserve_up_to(_on_disk(self._size, len(text)))
        try:
            with (self.folder / _MANIFEST).open("wb") as file:
                file.write(text)
                self._write_through(file)
            self._write_through(self._file)
            self._file.close()
            if self._store.durable:
                sync(self.folder)
            self._store._settle(self, manifest)
        except OSError as error:
            raise CapturesUnwritable(_reason(error)) from error
        self._open = False

    def discard(self) -> None:
        """Give it up; nothing happens to a finished one."""
        if self._open:
            self._open = False
            try:
                self._file.close()
            except OSError as error:
                log.warning("capture %s: %s", self.capture_id, _reason(error))
            self._store._settle(self, None)

    def __enter__(self) -> "CaptureWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def _reserve_up_to(self, nbytes: int) -> None:
        if nbytes > self.reserved:
            self._store._reserve(self, nbytes - self.reserved)

    def _write_through(self, file: IO[bytes]) -> None:
        file.flush()
        if self._store.durable:
            os.fsync(file.fileno())


class CannotOpenCaptures(Exception):
    """The folder for captures cannot be used; one clause that says why."""


def _on_disk(*sizes: int) -> int:
    """Bytes on disk of files of these sizes, and of their folder."""
    return BLOCK + sum(-(-size // BLOCK) * BLOCK for size in sizes)


def _checked(text: bytes, capture_id: str, data: np.ndarray) -> Manifest:
    manifest = Manifest.model_validate_json(text)
    if manifest.capture_id != capture_id:
        raise ValueError("the manifest is of another capture")
    if data.size != manifest.data_bytes:
        raise ValueError(f"the data has {data.size} bytes where {manifest.data_bytes} were written")
    return manifest


def _size_of(folder: Path) -> int:
    """Bytes on disk of whatever lies in a folder."""
    return _on_disk(*(path.lstat().st_size for path in folder.rglob("*")))


def _map(path: Path) -> np.ndarray:
    # An empty file cannot be mapped.
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)


def _reason(error: Exception) -> str:
    """What went wrong, without a path."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, fault['loc'])) or 'manifest'}: {fault['msg']}"
    return str(error)


def _remove_folder(folder: Path) -> None:
    """Remove a capture's own files; what somebody else put there stays, and so does the folder then."""
    try:
        for name in (_MANIFEST, _DATA):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        log.warning("the folder %s cannot be removed: %s", folder.name, _reason(error))


def _clear_away_left_ones() -> None:
    """Remove the temporary folders of servers that were killed: theirs, and locked by nobody."""
    for lock_file in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            state = lock_file.stat()
            # A new one may not be locked yet.
            if state.st_uid != os.getuid() or time.time() - state.st_mtime < 60:
                continue
            lock = os.open(lock_file, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock_file.parent, ignore_errors=True)
            finally:
                os.close(lock)
        except OSError:
            continue  # in use, or gone meanwhile


def _keep_house(found: "weakref.ref[CaptureStore]", stopped: threading.Event, pause: float) -> None:
    """Remove what is old, though nobody asks; for a thread, which does not keep the store alive."""
    while not stopped.wait(pause):
        store = found()
        if store is None:
            return
        store.forget_old()
        del store


def _let_go(lock: int, temporary: Path | None, stopped: threading.Event) -> None:
    stopped.set()
    if temporary is not None:
        shutil.rmtree(temporary, ignore_errors=True)
    os.close(lock)
