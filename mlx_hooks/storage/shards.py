"""Shards: captured rows in safetensors files with a manifest, in one folder.

    mechint_cache/
        activations_shard_000000_step_0.safetensors       one tensor per layer [row, ...], tokens, sequence, position
        activations_shard_000001_step_200.safetensors
        manifest.json                                      what was captured of which model, and every shard

A shard is there whole or not at all, and the manifest is replaced with each one.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import HookError, UnknownHookError
from ..hook_points import block_point, canonical_name, parse_layer_name
from .files import whole_file, write_whole, writing
from .rows import LABELS, RowPart, Rows
from .tensors import TensorFile, write_arrays

MANIFEST = "manifest.json"
FORMAT = "neuroscope-shards-1"
_ENTRY = "entry"
_COLUMNS = ("tokens", "sequence", "position")
_OF_ENTRY = ("step", "rank", "session")


class ShardWriter:
    """Writes rows to a folder.

    Args:
        folder: made if it is not there.
        layers: what a row of each layer is, by canonical name: ``axes`` and ``shape`` of a row, ``dtype``.
        description: plain JSON for the manifest: ``config``, ``model``.
        max_rows: the most rows in one file.

    Raises:
        HookError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        layers: Mapping[str, Mapping[str, Any]],
        description: Mapping[str, Any] | None = None,
        max_rows: int = 10_000,
        rank: int = 0,
    ) -> None:
        self.folder, self.max_rows, self.rank = Path(folder), max_rows, rank
        self.session = 0
        with writing(self.folder / MANIFEST):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.manifest: dict[str, Any] = {
                "format": FORMAT,
                **(description or {}),
                "layers": {name: dict(layer) for name, layer in layers.items()},
                "shards": [],
                "total_shards": 0,
                "total_rows": 0,
                "sessions": [{"session": self.session, "started": _now()}],
                "training": [],
                "analysis_history": [],
            }
            self._write_manifest()

    def write(
        self,
        activations: Mapping[str, mx.array],
        *,
        tokens: Any,
        sequence: Any,
        position: Any,
        step: int,
        metadata: Mapping[str, Any] | None = None,
    ) -> list[Path]:
        """Write the rows of one step, to as many files as they need; answers their paths.

        Args:
            activations: [row, ...] by layer, in the type that the model computed.
            tokens, sequence, position: whole numbers, [row] each; see :class:`RowPart`.
            metadata: plain JSON to keep with them.

        Raises:
            HookError: rows of unequal number, and files that cannot be written.
        """
        columns = {"tokens": tokens, "sequence": sequence, "position": position}
        columns = {name: np.asarray(column).astype(LABELS[name]) for name, column in columns.items()}
        arrays: dict[str, Any] = {**activations, **columns}
        n = len(columns["tokens"])
        if set(activations) != set(self.manifest["layers"]):
            raise HookError(f"Rows are of {', '.join(self.manifest['layers'])}; got {', '.join(activations)}.")
        if any(array.shape[0] != n for array in arrays.values()) or not n:
            counts = ", ".join(f"{name} {array.shape[0]}" for name, array in arrays.items())
            raise HookError(f"All layers have the same number of rows, at least one; got {counts}.")
        parts = [slice(start, min(start + self.max_rows, n)) for start in range(0, n, self.max_rows)]
        return [self._write_shard(arrays, part, step, metadata or {}) for part in parts]

    def close(self) -> None:
        """Nothing more is written."""

    def _write_shard(self, arrays: dict[str, Any], part: slice, step: int, metadata: Mapping[str, Any]) -> Path:
        number = self.manifest["total_shards"]
        name = f"activations_shard_{number:06d}_step_{step}.safetensors"
        entry = {
            "file": name,
            "shard": number,
            "step": step,
            "session": self.session,
            "rank": self.rank,
            "rows": part.stop - part.start,
            "shapes": {key: [part.stop - part.start, *array.shape[1:]] for key, array in arrays.items()},
            "saved": _now(),
            "metadata": dict(metadata),
        }
        path = self.folder / name
        parts = {key: lambda array=array: array[part] for key, array in arrays.items()}
        with writing(path), whole_file(path) as draft:
            write_arrays(draft, parts, {"format": "mlx", _ENTRY: json.dumps(entry)})
        self.manifest["shards"].append(entry)
        self.manifest["total_shards"] = number + 1
        self.manifest["total_rows"] += entry["rows"]
        self._write_manifest()
        return path

    def _write_manifest(self) -> None:
        with writing(self.folder / MANIFEST):
            write_whole(self.folder / MANIFEST, json.dumps(self.manifest, indent=1, allow_nan=False))


class Shard:
    """One file of rows: ``activations`` by layer, ``tokens``, ``sequence``, ``position``, ``step``, ``metadata``."""

    def __init__(self, path: Path, entry: Mapping[str, Any]) -> None:
        self.path, self.entry = path, entry
        self.step: int = entry["step"]
        self.metadata: dict[str, Any] = dict(entry["metadata"])
        try:
            self.file = TensorFile(path)
        except (OSError, ValueError) as error:
            raise HookError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        if missing := [name for name in entry["shapes"] if name not in set(self.file)]:
            raise HookError(f"cannot read {path}: it lacks {missing[0]}")

    @property
    def activations(self) -> dict[str, mx.array]:
        """By layer [row, ...], in the type that the model computed; read from the file."""
        return {name: self.file.read(name) for name in self.file if name not in _COLUMNS}

    tokens = property(lambda self: self.file.numpy("tokens"))
    sequence = property(lambda self: self.file.numpy("sequence"))
    position = property(lambda self: self.file.numpy("position"))

    def values(self, layer: str, indices: np.ndarray) -> np.ndarray:
        """Rows of a layer at indices, [row, ...] in float32."""
        mapped = self.file.numpy(layer)
        chosen = mapped[indices]
        if self.file.is_bfloat16(layer):
            return (chosen.astype(np.uint32) << 16).view(np.float32)
        return chosen.astype(np.float32)


class ShardReader:
    """What was captured to a folder.

        reader = ShardReader("mechint_cache")
        reader.steps                                    # [0, 200, 400]
        reader.rows("model.layers.2")                   # all rows of the stream that leaves block 2
        reader.read_shard(reader.entries[0]).activations

    Where two sessions saved the same step, as after resuming from an older checkpoint, the later one's rows count.

    Raises:
        HookError: there is no manifest, or it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        self.manifest = _read_manifest(self.folder)
        self.layers: dict[str, dict[str, Any]] = self.manifest["layers"]
        self.entries: list[dict[str, Any]] = _current(self.manifest["shards"])
        self._opened: dict[str, Shard] = {}

    @property
    def description(self) -> dict[str, Any]:
        """What the manifest tells besides its layers and shards."""
        return {key: value for key, value in self.manifest.items() if key not in ("layers", "shards")}

    @property
    def steps(self) -> list[int]:
        """The training steps that were captured, ascending."""
        return sorted({entry["step"] for entry in self.entries})

    def layer_name(self, asked: str | int) -> str:
        """The canonical name of a captured layer, from any of its names.

        Raises:
            UnknownHookError: it was not captured; lists what was.
        """
        name = canonical_name(str(asked))
        if name in self.layers:
            return name
        for canonical, layer in self.layers.items():
            if str(asked) == str(layer.get("asked")):
                return canonical
        try:
            block = parse_layer_name(str(asked), n_layers=1_000_000).layer
        except UnknownHookError:
            block = None
        if block is not None and (name := block_point("resid_post", block).name) in self.layers:
            return name
        raise UnknownHookError(f"{asked!r} was not captured. There are: {', '.join(self.layers)}.", field="layer_name")

    def rows(self, layer: str | int, steps: Sequence[int] | None = None) -> Rows:
        """The rows of a layer, at all captured steps or at some.

        Raises:
            UnknownHookError: the layer was not captured.
            HookError: a step was not captured, or there are no rows.
        """
        name = self.layer_name(layer)
        if steps is not None and (unknown := sorted(set(steps) - set(self.steps))):
            raise HookError(f"Step {unknown[0]} was not captured. Steps: {_listed(self.steps)}.")
        entries = [entry for entry in self.entries if steps is None or entry["step"] in steps]
        if not entries:
            raise HookError(f"There are no captured rows in {self.folder}.")
        return ShardRows(self, name, entries)

    def read_shard(self, entry: Mapping[str, Any]) -> Shard:
        """One file.

        Raises:
            HookError: it cannot be read.
        """
        name = entry["file"]
        if name not in self._opened:
            self._opened[name] = Shard(self.folder / name, entry)
        return self._opened[name]


class ShardRows(Rows):
    """Rows of one layer in several files; made by ``ShardReader.rows``."""

    def __init__(self, reader: ShardReader, name: str, entries: Sequence[Mapping[str, Any]]) -> None:
        self.reader, self.name, self.entries = reader, name, list(entries)
        self.axes = tuple(reader.layers[name]["axes"])
        self.shape = tuple(np.max([entry["shapes"][name][1:] for entry in self.entries], axis=0).tolist())

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([entry["rows"] for entry in self.entries])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, indices: Any) -> RowPart:
        """The rows at indices [n]."""
        indices = np.asarray(indices, dtype=np.int64)
        values = np.zeros((len(indices), *self.shape), dtype=np.float32)
        labels = {name: np.zeros(len(indices), dtype=kind) for name, kind in LABELS.items()}
        where = np.searchsorted(self._ends, indices, side="right")
        for i in np.unique(where):
            entry = self.entries[i]
            shard = self.reader.read_shard(entry)
            chosen = np.flatnonzero(where == i)
            inside = indices[chosen] - (self._ends[i] - entry["rows"])
            found = shard.values(self.name, inside)
            # Patterns of shorter batches have fewer keys.
            missing = [(0, whole - size) for whole, size in zip(self.shape, found.shape[1:], strict=True)]
            values[chosen] = np.pad(found, [(0, 0), *missing])
            for name in _COLUMNS:
                labels[name][chosen] = shard.file.numpy(name)[inside]
            for name in _OF_ENTRY:
                labels[name][chosen] = entry[name]
        return RowPart(values.reshape(len(indices), -1), **labels)


def _current(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shards that count, of all sessions."""
    latest: dict[tuple[int, int], int] = {}
    for entry in entries:
        key = (entry["rank"], entry["step"])
        latest[key] = max(latest.get(key, 0), entry["session"])
    return [entry for entry in entries if entry["session"] == latest[entry["rank"], entry["step"]]]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise HookError(f"cannot read {path}: its format is {manifest['format']!r}, not {FORMAT!r}")
    except OSError as error:
        raise HookError(f"There are no captured activations in {folder}: {error.strerror} ({MANIFEST}).") from error
    except (ValueError, LookupError, TypeError) as error:
        raise HookError(f"cannot read {path}: it is damaged") from error
    return manifest


def _listed(steps: Sequence[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 20 else [*shown[:10], "...", *shown[-3:]])


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
