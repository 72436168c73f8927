"""``manifest.json``: what a folder of shards says of itself."""

import json
import math
import re
import threading
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import HookError
from .files import write_whole, writing

MANIFEST = "manifest.json"
FORMAT = "neuroscope-shards-1"
ENTRY = "entry"
"""The key under which a shard's header holds its entry of the manifest."""
COLUMNS = ("tokens", "sequence", "position")
"""The tensors of a shard that are no layers."""
RANK_FOLDERS = "rank_[0-9][0-9][0-9]*"
_SHARD = re.compile(r"activations_shard_(\d{6,})_step_(\d+)\.safetensors")
_LISTS = ("shards", "sessions", "training", "analysis_history")
_OF_FOLDER = {"format", "id", "layers", "total_shards", "total_rows", *_LISTS}
_OF_ENTRY = {
    "file": str, "step": int, "session": int, "rank": int, "rows": int, "bytes": int, "shapes": dict, "metadata": dict,
    "local": bool,
}  # fmt: skip


def shard_name(number: int, step: int) -> str:
    """``activations_shard_000001_step_200.safetensors``."""
    return f"activations_shard_{number:06d}_step_{step}.safetensors"


def shard_number(name: str) -> int | None:
    """The number of a shard in its file's name; None for another file."""
    match = _SHARD.fullmatch(name)
    return int(match[1]) if match else None


def rank_folder(rank: int) -> str:
    """Where a rank writes that has a folder of its own: ``rank_003``."""
    return f"rank_{rank:03d}"


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


class Manifest:
    """What is in a folder of shards, in memory and in its file, which is replaced as a whole.

    Its keys: ``format``, ``id`` (the folder's, wherever copies of it lie), ``layers``, ``shards`` (an entry of each),
    ``total_shards``, ``total_rows``, ``sessions`` (each start of capturing), ``training`` (what was reported of it),
    ``analysis_history``, and what the last writer described: ``config``, ``model``.

    An entry tells a shard's ``file``, ``shard`` (its number), ``step``, ``session``, ``rank``, ``rows``, ``bytes``,
    ``part`` ([i, n]: the i-th of the n files that were to be written of the step then), ``shapes`` by tensor,
    ``saved``, ``metadata``, and where it is: ``local`` (true or false), ``remote`` (its address
    in S3, or null) and then ``sha256``.

    Args:
        data: its content. Hold ``lock`` to change it where another thread may.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data
        self.lock = threading.RLock()
        # Entries by file, and reports, as JSON: a manifest of thousands is written with each shard.
        self._lines: dict[str, str] = {}
        self._reports: list[str] = []

    @classmethod
    def new(cls, layers: Mapping[str, Mapping[str, Any]]) -> "Manifest":
        """Of a folder without shards."""
        return cls(
            {
                "format": FORMAT,
                "id": uuid.uuid4().hex,
                "layers": {name: dict(layer) for name, layer in layers.items()},
                "shards": [],
                "total_shards": 0,
                "total_rows": 0,
                "sessions": [],
                "training": [],
                "analysis_history": [],
            }
        )

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> "Manifest":
        """From the content of a file.

        Raises:
            HookError: it is no manifest, or damaged; names ``where``.
        """
        try:
            data = json.loads(text)
            form = data["format"]
            is_whole = form == FORMAT and _is_whole(data)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise HookError(f"cannot read {where}: it is no manifest of captures, or damaged") from error
        if form != FORMAT:
            raise HookError(f"cannot read {where}: its format is {form!r}, not {FORMAT!r}")
        if not is_whole:
            raise HookError(f"cannot read {where}: it is damaged")
        return cls(data)

    @classmethod
    def load(cls, folder: Path) -> "Manifest | None":
        """Of a folder; None where there is none.

        Raises:
            HookError: it cannot be read.
        """
        path = folder / MANIFEST
        try:
            return cls.parse(path.read_bytes(), str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise HookError(f"cannot read {path}: {error.strerror or error}") from error

    @property
    def entries(self) -> list[dict[str, Any]]:
        """The shards' entries, by number."""
        return self.data["shards"]

    def entry(self, file: str) -> dict[str, Any]:
        """The entry of a shard that there is."""
        with self.lock:  # a list that is being sorted looks empty to other threads
            return next(entry for entry in self.entries if entry["file"] == file)

    def update(self, file: str, **values: Any) -> None:
        """Change the entry of a shard that there is."""
        with self.lock:
            self.entry(file).update(values)
            self._lines.pop(file, None)

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Name more shards; one that is named already stays as it is."""
        with self.lock:
            named = {entry["file"] for entry in self.entries}
            self.entries.extend(dict(entry) for entry in entries if entry["file"] not in named)
            self.entries.sort(key=lambda entry: shard_number(entry["file"]) or 0)
            self.data["total_shards"] = len(self.entries)
            self.data["total_rows"] = sum(entry["rows"] for entry in self.entries)

    def is_ahead_of(self, other: "Manifest") -> bool:
        """Whether this tells of sessions or shards that another copy of the same manifest does not know."""
        return bool(self._sessions - other._sessions or self._shards - other._shards)

    def contradicts(self, other: "Manifest") -> bool:
        """Whether two copies of the same manifest mean different sessions, or different shards, by the same name."""
        sessions = Counter((rank, session) for rank, session, _ in self._sessions | other._sessions)
        shards = Counter(file for file, _, _ in self._shards | other._shards)
        return max([*sessions.values(), *shards.values()], default=0) > 1

    @property
    def _sessions(self) -> set[tuple[int, int, str]]:
        return {(session["rank"], session["session"], session["started"]) for session in self.data["sessions"]}

    @property
    def _shards(self) -> set[tuple[str, int, str | None]]:
        with self.lock:
            return {(entry["file"], entry["session"], entry.get("saved")) for entry in self.entries}

    def join(self, other: "Manifest") -> None:
        """Add what another copy of the same manifest knows: shards, sessions, and the longer histories."""
        self._reports = []
        known = {(session["rank"], session["session"]) for session in self.data["sessions"]}
        self.data["sessions"] += [s for s in other.data["sessions"] if (s["rank"], s["session"]) not in known]
        for name in ("training", "analysis_history"):
            self.data[name] = max(self.data[name], other.data[name], key=len)
        self.add(other.entries)

    def describe(self, description: Mapping[str, Any]) -> None:
        """Set what is the describer's to tell.

        Raises:
            HookError: for a key that is the manifest's own.
        """
        if taken := set(description) & _OF_FOLDER:
            raise HookError(f"{sorted(taken)[0]!r} is a key of the manifest's own; describe it under another.")
        self.data.update(description)

    def save(self, folder: Path) -> None:
        """Replace the file.

        Raises:
            HookError: it cannot be written, or holds what JSON does not.
        """
        with self.lock, writing(folder / MANIFEST):
            write_whole(folder / MANIFEST, self._text(self.data))

    def remote_text(self) -> str:
        """The file as it is uploaded: it names the shards that were uploaded before it."""
        with self.lock:
            uploaded = [entry for entry in self.entries if entry["remote"]]
            totals = {"total_shards": len(uploaded), "total_rows": sum(entry["rows"] for entry in uploaded)}
            return self._text(self.data | {"shards": uploaded} | totals)

    def _text(self, data: Mapping[str, Any]) -> str:
        """JSON with a line for each item of its lists."""
        lines = []
        for key, value in data.items():
            if key == "shards":
                items = [self._line(entry) for entry in value]
            elif key == "training":
                self._reports += [json.dumps(report, allow_nan=False) for report in value[len(self._reports) :]]
                items = self._reports
            elif key in _LISTS:
                items = [json.dumps(item, allow_nan=False) for item in value]
            else:
                lines.append(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
                continue
            lines.append(f" {json.dumps(key)}: [" + ",".join(f"\n  {item}" for item in items) + "]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def _line(self, entry: Mapping[str, Any]) -> str:
        if entry["file"] not in self._lines:
            self._lines[entry["file"]] = json.dumps(entry, allow_nan=False)
        return self._lines[entry["file"]]


def check_same_layers(
    manifest: Manifest, where: str, layers: Mapping[str, Mapping[str, Any]], description: Mapping[str, Any]
) -> None:
    """Raises HookError unless rows of these layers, of a model that is described so, go with what a manifest names."""
    there = manifest.data["layers"]
    elsewhere = "capture to another folder (storage_path)."
    if set(there) != set(layers):
        raise HookError(
            f"{where} holds captures of {', '.join(there)}, not of {', '.join(layers)}: {elsewhere}",
            field="storage_path",
        )
    for name, layer in layers.items():
        had, has = _sizes(there[name]), _sizes(layer)
        had_numbers, has_numbers = there[name].get("dtype"), layer.get("dtype")
        if had != has:
            raise HookError(
                f"{where} holds rows {_shown(had)} of {name}, and now they are {_shown(has)}: {elsewhere}",
                field="storage_path",
            )
        if had_numbers and has_numbers and had_numbers != has_numbers:
            raise HookError(
                f"{where} holds rows of {name} in {had_numbers}, and now they are {has_numbers}: {elsewhere}",
                field="storage_path",
            )
    had_type, has_type = (_model_type(about) for about in (manifest.data, description))
    if had_type and has_type and had_type != has_type:
        raise HookError(
            f"{where} holds captures of a {had_type} model, and this is a {has_type}: {elsewhere}",
            field="storage_path",
        )


def current(entries: Sequence[dict[str, Any]], sessions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The shards that count: of those with the same step the ones of the last session that has it whole.

    Each rank counts its own sessions. A step that was captured again by fewer ranks is that of those alone. Where no
    session has all files of a step, the last one counts.
    """
    captured: dict[tuple[int, int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for entry in entries:
        captured[entry["step"], entry["rank"], entry["session"]].append(entry)
    latest: dict[int, dict[int, int]] = defaultdict(dict)
    # Those that are whole come last, and among them the last session.
    for step, rank, session in sorted(captured, key=lambda key: (_has_all_parts(captured[key]), key)):
        latest[step][rank] = session
    known = {(session["rank"], session["session"]): session for session in sessions}
    for of_step in latest.values():
        told = [known[key] for key in of_step.items() if key in known]
        if told:
            world_size = max(told, key=lambda session: session["started"])["world_size"]
            for rank in [rank for rank in of_step if rank >= world_size]:
                del of_step[rank]
    return [entry for entry in entries if latest[entry["step"]].get(entry["rank"]) == entry["session"]]


def _has_all_parts(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether these, of one step, are all files that were to be written of it."""
    found: Counter[tuple[int, int]] = Counter()
    for entry in entries:
        i, n = entry.get("part", (0, 1))
        # Files are numbered as they are written: those of one batch of rows begin at the same number.
        found[(shard_number(entry["file"].rpartition("/")[2]) or 0) - i, n] += 1
    return all(count == n for (_, n), count in found.items())


def plain(value: Any, name: str) -> Any:
    """Plain JSON from what Python, NumPy and MLX have of it; a number that is infinite or none (a loss that diverged)
    is null.

    Raises:
        HookError: it is something else; ``name`` says what it is.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner, f"{name}[{str(key)!r}]") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, f"{name}[{i}]") for i, inner in enumerate(value)]
    if isinstance(value, np.generic | np.ndarray | mx.array):
        return plain(value.tolist(), name)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, str | int | float | None):
        raise HookError(
            f"{name} is a {type(value).__name__}; what is kept are numbers, texts, true, false, null, and lists and "
            "mappings of these.",
            field=name.partition("[")[0],
        )
    return value


def is_entry(entry: Any) -> bool:
    """Whether this is all that an entry tells."""
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(key), kind) for key, kind in _OF_ENTRY.items())
        and isinstance(entry.get("remote"), str | None)
        and _is_part(entry.get("part", [0, 1]))
        and (entry.get("remote") is None or isinstance(entry.get("sha256"), str))
        # A manifest may come from elsewhere: no file outside the folder is meant.
        and shard_number(entry["file"]) is not None
    )


def _is_part(part: Any) -> bool:
    """Whether this is [i, n]: i of n, from 0."""
    return (
        isinstance(part, list)
        and len(part) == 2
        and all(type(number) is int for number in part)
        and 0 <= part[0] < part[1]
    )


def _is_whole(data: Mapping[str, Any]) -> bool:
    layers = data.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(data.get(name), list) for name in _LISTS):
        return False
    return (
        isinstance(data.get("id"), str)
        and all(len(layer["axes"]) == len(layer["shape"]) for layer in layers.values())
        and all({"session", "rank", "world_size", "started"} <= set(session) for session in data["sessions"])
        and all(map(is_entry, data["shards"]))
    )


def _sizes(layer: Mapping[str, Any]) -> list[tuple[str, int | None]]:
    """The axes of a row and their sizes; how many keys there are differs from batch to batch."""
    pairs = zip(layer["axes"], layer["shape"], strict=True)
    return [(axis, None if axis == "key" else size) for axis, size in pairs]


def _shown(sizes: Sequence[tuple[str, int | None]]) -> str:
    return f"[{', '.join(axis if size is None else f'{axis} {size}' for axis, size in sizes)}]"


def _model_type(about: Mapping[str, Any]) -> str | None:
    model = about.get("model")
    return model.get("model_type") if isinstance(model, Mapping) else None
