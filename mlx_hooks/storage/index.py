"""What there is to query below a base directory. The folders are the truth; a database only spares reading them again.

1. Each query lists the run folders and asks the file system when each metadata.json was written: no file is read.
2. Those that are new or have changed since are read.
3. What was read is kept in memory, and in ``.index.sqlite`` for the next process. It may be deleted at any time; where
   it cannot be written, memory has to do.
"""

import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from .files import locked
from .metadata import RESERVED, canonical

METADATA = "metadata.json"
ACTIVATIONS = "activations.safetensors"
_DATABASE = ".index.sqlite"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Row:
    """What a query asks of one run. Lists and mappings are canonical JSON texts, which are equal where the values are.

    Args:
        experiment, folder, run: its folder below the base directory.
        written, size, inode: of its metadata's file, as the file system tells; 0 where there is none.
        problem: why it cannot be read, or nothing.
        time: seconds since 1970 in UTC, to sort by.
    """

    experiment: str
    folder: str
    run: str
    written: int
    size: int
    inode: int
    problem: str = ""
    time: float = 0.0
    save_time: str = ""
    model_name: str = ""
    tag: str | None = None
    positions: str = "null"
    pivots: str = "null"
    config: str = "null"
    interventions: str = "[]"
    custom: str = "{}"


_COLUMNS = [field.name for field in fields(Row)]


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
        for run in _folders(above):
            row = before.get(run)
            try:
                # Ten thousand times in a query: a Path would take longer than the call.
                state = os.stat(f"{above}/{run}/{METADATA}")  # noqa: PTH116
                written, size, inode = state.st_mtime_ns, state.st_size, state.st_ino
            except OSError:
                written, size, inode = 0, 0, 0
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
        try:
            found = read_metadata(self.base / experiment / folder / run)
            return Row(
                experiment,
                folder,
                run,
                written,
                size,
                inode,
                time=datetime.fromisoformat(found["save_time"]).timestamp(),
                save_time=found["save_time"],
                model_name=found["model_name"],
                tag=found.get("tag"),
                positions=canonical(found.get("target_token_positions")),
                pivots=canonical(found.get("pivot_positions")),
                config=canonical(found.get("extraction_config")),
                interventions=canonical(found.get("interventions") or []),
                custom=canonical({key: value for key, value in found.items() if key not in RESERVED}),
            )
        except (OSError, ValueError) as error:
            return Row(experiment, folder, run, written, size, inode, problem=_reason(error))

    def _stored(self) -> list[Row]:
        """The rows that another process, or an earlier one, has read."""
        path = self.base / _DATABASE
        if not path.exists():
            return []
        try:
            with closing(sqlite3.connect(path, timeout=2)) as database:
                if database.execute("PRAGMA user_version").fetchone() != (_FORMAT,):
                    return []
                return [Row(*values) for values in database.execute(f"SELECT {', '.join(_COLUMNS)} FROM runs")]
        except sqlite3.Error:
            # Damaged, locked or another version's: the files say the same.
            return []

    def _store(self, fresh: Iterable[Row], gone: Iterable[tuple[str, str, str]]) -> None:
        path = self.base / _DATABASE
        try:
            self._write(path, fresh, gone)
        except sqlite3.OperationalError:
            # The folder cannot be written, or another process is writing: this process has its rows in memory.
            return
        except sqlite3.DatabaseError:
            # Damaged: made anew, with all that this process knows.
            path.unlink(missing_ok=True)
            try:
                rows = [row for runs in (self._known or {}).values() for row in runs.values()]
                self._write(path, rows, ())
            except sqlite3.Error:
                return

    def _write(self, path: Path, fresh: Iterable[Row], gone: Iterable[tuple[str, str, str]]) -> None:
        with closing(sqlite3.connect(path, timeout=2)) as database:
            # After a crash of the machine it is made anew.
            database.execute("PRAGMA synchronous=OFF")
            with database:
                if database.execute("PRAGMA user_version").fetchone() != (_FORMAT,):
                    database.execute("DROP TABLE IF EXISTS runs")
                    key = "PRIMARY KEY (experiment, folder, run)"
                    database.execute(f"CREATE TABLE runs ({', '.join(_COLUMNS)}, {key}) WITHOUT ROWID")
                    database.execute(f"PRAGMA user_version = {_FORMAT}")
                marks = ", ".join("?" * len(_COLUMNS))
                database.executemany(f"INSERT OR REPLACE INTO runs VALUES ({marks})", map(astuple, fresh))
                database.executemany("DELETE FROM runs WHERE (experiment, folder, run) = (?, ?, ?)", gone)


def read_metadata(run: Path) -> dict[str, Any]:
    """A run's metadata. The experiment is the one in whose folder it lies, whatever the file says.

    Raises:
        OSError: there is no file, or it cannot be read.
        ValueError: it is no metadata of a run; one clause says why.
    """
    try:
        found = json.loads((run / METADATA).read_bytes())
    except ValueError as error:
        raise ValueError(f"its {METADATA} is no JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"its {METADATA} is no object")
    for key, kind in (("save_time", str), ("model_name", str), ("tag", str | None)):
        if not isinstance(found.get(key), kind):
            raise ValueError(f"its {METADATA} has no {key}")
    datetime.fromisoformat(found["save_time"])
    found["experiment_name"] = run.parent.parent.name
    return found


def experiments(base: Path) -> list[str]:
    """The names of the experiments below a base directory."""
    return sorted(_folders(os.fspath(base)))


def _folders(path: str) -> list[str]:
    """The folders in a folder, save hidden ones and what is not whole; none where there is no such folder."""
    try:
        with os.scandir(path) as entries:
            return [e.name for e in entries if e.name[0] != "." and e.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"it has no {METADATA}"
    return (error.strerror or type(error).__name__) if isinstance(error, OSError) else str(error)
