"""What there is to query below a base directory. The folders are the truth; a database only spares reading them again.

1. Each query lists the run folders and asks the file system when each metadata.json was written: no file is read.
2. Those that are new or have changed since are read.
3. What was read is kept in memory, and in ``.index.sqlite`` for the next process. It may be deleted at any time; where
   it cannot be written, memory has to do.
"""

import json
import os
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import astuple, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from .files import clear_left, locked, write_whole
from .metadata import RESERVED, canonical, canonical_lines

METADATA = "metadata.json"
ACTIVATIONS = "activations.safetensors"
_DATABASE = ".index.sqlite"
_FORMAT = 3


@dataclass(frozen=True, slots=True)
class Row:
    """What a query asks of one run. Lists and mappings are canonical JSON texts, which are equal where the values are;
    the custom keys' has an item per line.

    Args:
        experiment, folder, run: its folder below the base directory.
        written, size, inode: of its metadata's file, as the file system tells; 0 where there is none.
        problem: why it cannot be read, or nothing.
        time: seconds since 1970 in UTC, to sort by.
        digits: those of the time in the saver's zone, from the year to the microsecond, to search by.
    """

    experiment: str
    folder: str
    run: str
    written: int
    size: int
    inode: int
    problem: str = ""
    time: float = 0.0
    digits: str = ""
    save_time: str = ""
    model_name: str = ""
    tag: str | None = None
    positions: str = "null"
    pivots: str = "null"
    config: str = "null"
    interventions: str = "[]"
    custom: str = "{}"


_COLUMNS = [field.name for field in fields(Row)]
_KINDS: list[Any] = [field.type for field in fields(Row)]
_JSON = {"positions": object, "pivots": object, "config": object, "interventions": object, "custom": dict}
"""The columns that hold JSON, and what is in it."""


class RunIndex:
    """The runs below a base directory.

    Args:
        base: the folder of all experiments.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        self._known: dict[tuple[str, str], dict[str, Row]] | None = None
        """What was read, by experiment and model, and by run."""
        self._lock = threading.Lock()
        self._is_usable = True
        """Whether the database holds what it should; if not, it is made anew."""

    def rows(self, experiment: str | None = None) -> list[Row]:
        """All runs as they are now, or those of one experiment.

        Raises:
            OSError: the base directory cannot be listed.
        """
        with self._lock:
            if self._known is None:
                self._known = {}
                for row in self._stored():
                    self._known.setdefault((row.experiment, row.folder), {})[row.run] = row
            known, seen = self._known, set()
            fresh: list[Row] = []
            gone: list[tuple[str, str, str]] = []
            # Nothing is moved while runs are listed and read, so nothing is missed between two folders.
            with locked(self.base, shared=True):
                for place in self._places(experiment):
                    seen.add(place)
                    before = known.get(place, {})
                    known[place] = self._listed(place, before, fresh)
                    gone += [(*place, run) for run in before.keys() - known[place].keys()]
            for place in [place for place in known if place not in seen and experiment in (None, place[0])]:
                gone += [(*place, run) for run in known.pop(place)]
            if fresh or gone:
                self._store(fresh, gone)
            return [row for place in known if experiment in (None, place[0]) for row in known[place].values()]

    def _places(self, experiment: str | None) -> Iterator[tuple[str, str]]:
        """Experiments and their models' folders."""
        for name in experiments(self.base) if experiment is None else [experiment]:
            for folder in _folders(f"{self.base}/{name}"):
                yield name, folder

    def _listed(self, place: tuple[str, str], before: dict[str, Row], fresh: list[Row]) -> dict[str, Row]:
        """A folder's runs. Those that ``before`` does not have as they are now are read, and noted in ``fresh``."""
        above = f"{self.base}/{place[0]}/{place[1]}"
        now = {}
        for run, written, size, inode in _written(above):
            row = before.get(run)
            if row is None or row.problem or row.written != written or row.size != size or row.inode != inode:
                row = self._read(*place, run, written, size, inode)
                if row.problem and not Path(above, run).is_dir():
                    # Removed in between.
                    continue
                fresh.append(row)
            now[run] = row
        return now

    def _read(self, experiment: str, folder: str, run: str, written: int, size: int, inode: int) -> Row:
        """A run's row, of its folder's names and what the file system tells of its metadata's file."""
        place = (experiment, folder, run, written, size, inode)
        try:
            if not _is_text(experiment, folder, run):
                raise ValueError("its folder's name is no UTF-8")
            return Row(*place, **_described(read_metadata(self.base / experiment / folder / run)))
        except (OSError, ValueError) as error:
            return Row(*place, problem=reason(error))

    def _stored(self) -> list[Row]:
        """The rows that another process, or an earlier one, has read."""
        path = self.base / _DATABASE
        if not path.exists():
            return []
        try:
            with closing(sqlite3.connect(path, timeout=2)) as database:
                rows = [Row(*values) for values in database.execute(f"SELECT {', '.join(_COLUMNS)} FROM runs")]
                version = database.execute("PRAGMA user_version").fetchone()
        except sqlite3.Error:
            # Damaged, locked or another version's: the files say the same.
            version = None
        if version == (_FORMAT,) and _are_sound(rows):
            return rows
        self._is_usable = False
        return []

    def _store(self, fresh: Iterable[Row], gone: Iterable[tuple[str, str, str]]) -> None:
        # Where the folder cannot be written, or another process is writing, memory has to do.
        with suppress(OSError, OverflowError, sqlite3.Error):
            try:
                if self._is_usable:
                    self._write(fresh, gone)
            except sqlite3.OperationalError:
                raise
            except sqlite3.DatabaseError:
                self._is_usable = False
            if not self._is_usable:
                # Made anew, with all that this process knows.
                (self.base / _DATABASE).unlink(missing_ok=True)
                self._write([row for runs in (self._known or {}).values() for row in runs.values()], ())
                self._is_usable = True

    def _write(self, fresh: Iterable[Row], gone: Iterable[tuple[str, str, str]]) -> None:
        with closing(sqlite3.connect(self.base / _DATABASE, timeout=2)) as database:
            # After a crash of the machine it is made anew.
            database.execute("PRAGMA synchronous=OFF")
            with database:
                key = "PRIMARY KEY (experiment, folder, run)"
                database.execute(f"CREATE TABLE IF NOT EXISTS runs ({', '.join(_COLUMNS)}, {key}) WITHOUT ROWID")
                database.execute(f"PRAGMA user_version = {_FORMAT}")
                marks = ", ".join("?" * len(_COLUMNS))
                storable = [astuple(row) for row in fresh if _is_text(row.experiment, row.folder, row.run)]
                database.executemany(f"INSERT OR REPLACE INTO runs VALUES ({marks})", storable)
                left = [place for place in gone if _is_text(*place)]
                database.executemany("DELETE FROM runs WHERE (experiment, folder, run) = (?, ?, ?)", left)


def _described(found: dict[str, Any]) -> dict[str, Any]:
    """What a row holds of a run's metadata.

    Raises:
        ValueError: it cannot be held; one clause says why.
    """
    try:
        time = datetime.fromisoformat(found["save_time"])
        row = {
            "time": time.timestamp(),
            "digits": re.sub(r"\D", "", time.replace(tzinfo=None).isoformat(timespec="microseconds")),
            "save_time": found["save_time"],
            "model_name": found["model_name"],
            "tag": found.get("tag"),
            "positions": canonical(found.get("target_token_positions")),
            "pivots": canonical(found.get("pivot_positions")),
            "config": canonical(found.get("extraction_config")),
            "interventions": canonical(found.get("interventions") or []),
            "custom": canonical_lines({key: value for key, value in found.items() if key not in RESERVED}),
        }
    except (OverflowError, RecursionError) as error:
        raise ValueError(
            f"its {METADATA} has a {'time' if isinstance(error, OverflowError) else 'value'} beyond what can be read"
        ) from error
    if not _is_text(*(text for text in row.values() if isinstance(text, str))):
        raise ValueError(f"its {METADATA} has a text that is no Unicode")
    return row


def _is_text(*texts: str) -> bool:
    """Whether texts can be written as UTF-8: names that are no UTF-8 and halves of characters cannot."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_sound(rows: list[Row]) -> bool:
    """Whether rows of a database are what they should be: queries work on them unchecked."""
    for name, kind in zip(_COLUMNS, _KINDS, strict=True):
        values = {getattr(row, name) for row in rows}
        if not all(isinstance(value, kind) for value in values):
            return False
        try:
            if name in _JSON and not all(isinstance(json.loads(text), _JSON[name]) for text in values):
                return False
        except (ValueError, RecursionError):
            return False
    return True


def read_metadata(run: Path) -> dict[str, Any]:
    """A run's metadata. The experiment is the one in whose folder it lies, whatever the file says.

    Raises:
        OSError: there is no file, or it cannot be read.
        ValueError: it is no metadata of a run; one clause says why.
    """
    try:
        found = json.loads((run / METADATA).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its {METADATA} is no JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"its {METADATA} is no object")
    for key, kind in (("save_time", str), ("model_name", str), ("tag", str | None)):
        if not isinstance(found.get(key), kind):
            raise ValueError(f"its {METADATA} has no {key}")
    datetime.fromisoformat(found["save_time"])
    found["experiment_name"] = run.parent.parent.name
    return found


def rewrite_experiment(run: Path) -> bool:
    """Write the experiment of a run's folder into its metadata, unless the run was moved; whether it was possible.

    What a killed writer left beside the metadata is removed. A run that lies elsewhere and is linked here stays as it
    is: its file may be another experiment's too.
    """
    if any(folder.is_symlink() for folder in (run, *run.parents[:2])):
        return True
    base = run.parents[2]
    try:
        with locked(base):
            if run.is_dir():
                clear_left(run)
                write_whole(run / METADATA, json.dumps(read_metadata(run), indent=2))
    except (OSError, ValueError, RecursionError):
        return False
    return True


def experiments(base: Path) -> list[str]:
    """The names of the experiments below a base directory."""
    return sorted(_folders(os.fspath(base)))


def _folders(path: str) -> list[str]:
    """The folders in a folder, linked ones too, save hidden ones and what is not whole; none where there is none."""
    try:
        with os.scandir(path) as entries:
            return [e.name for e in entries if e.name[0] != "." and e.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _written(folder: str) -> Iterator[tuple[str, int, int, int]]:
    """A folder's runs, each with the time, size and inode of its metadata's file; 0 where there is none."""
    try:
        at = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        for run in _folders(folder):
            try:
                # Ten thousand times in a query: a Path, or the whole path, would take longer than the call.
                state = os.stat(f"{run}/{METADATA}", dir_fd=at)
                yield run, state.st_mtime_ns, state.st_size, state.st_ino
            except OSError:
                yield run, 0, 0, 0
    finally:
        os.close(at)


def reason(error: Exception, file: str = METADATA) -> str:
    """Why a file of a run cannot be read, without its path; one clause."""
    if isinstance(error, FileNotFoundError):
        return f"it has no {file}"
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
