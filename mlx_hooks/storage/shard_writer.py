"""Captured rows on their way to files: one writer per folder, and uploads beside it."""

import json
import operator
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CaptureWarning, HookError, UnreadableShardWarning, UploadWarning
from .files import HeldFolder, clear_left, whole_file, writing
from .manifest import (
    COLUMNS,
    ENTRY,
    MANIFEST,
    Manifest,
    check_same_layers,
    is_entry,
    now,
    plain,
    rank_folder,
    shard_name,
    shard_number,
)
from .remote import Backlog, RemoteFolder
from .rows import LABELS
from .tensors import TensorFile, write_arrays
from .uploads import Uploads, folders_in, joined


class ShardWriter:
    """Writes rows to a folder, and uploads them if asked.

        layers = {"blocks.1.hook_resid_post": {"axes": ["d_model"], "shape": [64], "dtype": "bfloat16"}}
        with ShardWriter("mechint_cache", layers=layers) as writer:
            writer.write({"blocks.1.hook_resid_post": values}, tokens=ids, sequence=rows, position=places, step=200)

    A folder that holds captures is continued: shards are numbered on, and what is written belongs to a new session. A
    shard whose writer was killed before the manifest named it is named then.

    With ``remote``, a thread uploads each shard and then a manifest that names it. An upload that fails keeps the
    shard, is told by an UploadWarning when the next rows are written, and is tried again then, and when this is closed.
    A place in S3 has one writer: where another begins to write there, nothing more of this one is uploaded.

    Args:
        folder: made if it is not there. Files in it that are no captures stay as they are.
        layers: what a row of each layer is, by canonical name: ``axes`` and ``shape`` of a row, where the size of an
            axis of keys is not looked at; ``dtype``; what else there is to know, as ``asked``, another name.
        description: plain JSON for the manifest: ``config``, ``model``.
        max_rows: the most rows in one file.
        rank, world_size: which process of how many this is, in distributed training.
        each_rank: every rank writes, to a folder of its own below ``folder``.
        remote: where to upload.
        keep_local: whether a file stays when its upload is confirmed.
        upload_seconds: how long ``close`` waits for uploads.

    Raises:
        HookError: the folder cannot be written, is being written by another, or holds captures of other layers, sizes
            or of another model's type; it or the place in S3 holds those of all ranks and this writes one's, or the
            other way round; nothing can be uploaded; each before any rows are written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        layers: Mapping[str, Mapping[str, Any]],
        description: Mapping[str, Any] | None = None,
        max_rows: int = 10_000,
        rank: int = 0,
        world_size: int = 1,
        each_rank: bool = False,
        remote: RemoteFolder | None = None,
        keep_local: bool = True,
        upload_seconds: float = 60.0,
    ) -> None:
        if max_rows < 1:
            raise HookError(f"A file has room for at least one row, got max_rows {max_rows}.", field="max_rows")
        check_ranks(Path(folder), each_rank)
        if remote is not None:
            check_ranks(remote, each_rank)
        self.folder = Path(folder) / rank_folder(rank) if each_rank else Path(folder)
        self.max_rows, self.rank = max_rows, rank
        remote = remote.below(rank_folder(rank)) if remote and each_rank else remote
        self._upload_seconds = upload_seconds
        self._is_closed = self._has_warned = self._has_told_of_steps = self._has_told_of_order = False
        self._last_here = -1
        description = plain(description or {}, "description")
        with writing(self.folder / MANIFEST):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._hold = hold(self.folder)
        try:
            manifest, version = joined(self.folder, remote) if remote else (Manifest.load(self.folder), None)
            self._manifest = manifest or Manifest.new(layers)
            check_same_layers(self._manifest, str(self.folder), layers, description)
            complete(self.folder, self._manifest)
            self._number = _next_number(self.folder, self._manifest, remote)
            self._last_before = max((entry["step"] for entry in self._manifest.entries), default=-1)
            self._open_session(world_size, description)
            self._uploads: Uploads | None = None
            if remote is not None:
                self._uploads = Uploads(self.folder, self._manifest, remote, version, keep_local=keep_local)
                # Before the training rather than with the first shard: this shows that one can write there.
                self._uploads.send(MANIFEST)
            self._manifest.save(self.folder)
        except BaseException:
            self._hold.release()
            raise
        self._backlog = None
        if self._uploads is not None:
            self._backlog = Backlog(self._uploads.send)
            for name in self._uploads.pending:
                self._backlog.add(name)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What ``manifest.json`` tells."""
        return self._manifest.data

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ShardWriter({self.folder}, {self.manifest['total_rows']} rows)"

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
            step: a whole number from 0 up.
            metadata: plain JSON to keep with them, of which numbers may be MLX's and NumPy's.

        Raises:
            HookError: for rows of other layers or sizes, or of unequal number, for what is no step and for metadata
                that is no JSON; and when a file cannot be written: what was written before it stays.

        Warns:
            CaptureWarning: earlier sessions captured this step or later ones, or this one later ones; once each.
            UploadWarning: earlier shards could not be uploaded; once until uploading works again.
        """
        if self._is_closed:
            raise HookError(f"The captures in {self.folder} are closed: nothing more is written.")
        columns = {"tokens": tokens, "sequence": sequence, "position": position}
        columns = {name: np.asarray(column).astype(LABELS[name]) for name, column in columns.items()}
        arrays: dict[str, Any] = {**activations, **columns}
        self._check(activations, arrays)
        about = {"step": whole_step(step), "metadata": plain(metadata or {}, "metadata")}
        self._tell_of_steps(about["step"])
        if self._backlog is not None and self._backlog.is_idle and not self._backlog.failed:
            self._has_warned = False  # before these rows wait there too
        n = len(columns["tokens"])
        parts = [slice(start, min(start + self.max_rows, n)) for start in range(0, n, self.max_rows)]
        paths = [self._write_shard(arrays, part, {**about, "part": [i, len(parts)]}) for i, part in enumerate(parts)]
        self._tell_of_uploads()
        return paths

    def report(self, info: Mapping[str, Any]) -> None:
        """Keep what is known of the training (``step``, ``train_loss``) in the manifest, where a number that is not
        finite becomes null. It is written with the next shard, or when this is closed.

        Raises:
            HookError: it is no plain JSON.
        """
        report = plain(info, "report")
        with self._manifest.lock:
            self._manifest.data["training"].append(report)

    def close(self) -> None:
        """Write what was reported and wait for uploads, at most ``upload_seconds``; nothing more is written.

        Raises:
            HookError: the manifest cannot be written.

        Warns:
            UploadWarning: what could not be uploaded; it is uploaded when the folder is continued.
        """
        if self._is_closed:
            return
        left: dict[str, str] = {}
        try:
            with self._manifest.lock:
                self._manifest.data["sessions"][-1]["ended"] = now()
                self._manifest.save(self.folder)
        finally:
            try:
                if self._backlog is not None:
                    self._backlog.retry()
                    self._backlog.add(MANIFEST)
                    left = self._backlog.close(self._upload_seconds)
            finally:
                # Whoever has no patience for uploads can open the folder again all the same.
                self._is_closed = True
                if self._uploads is not None:
                    self._uploads.close()
                self._hold.release()
        if left:
            self._warn(left, "when capturing to this folder goes on, or by upload(folder, url)")

    # --- Opening. ---

    def _open_session(self, world_size: int, description: Mapping[str, Any]) -> None:
        data = self._manifest.data
        earlier = [about["session"] for about in [*data["sessions"], *data["shards"]]]
        self.session = 1 + max(earlier, default=-1)
        with writing(self.folder / MANIFEST):
            self._manifest.describe(description)
        data["sessions"].append(
            {
                "session": self.session,
                "started": now(),
                "ended": None,
                "rank": self.rank,
                "world_size": world_size,
                "max_rows": self.max_rows,
                "config": description.get("config"),
            }
        )

    # --- Writing. ---

    def _check(self, activations: Mapping[str, mx.array], arrays: Mapping[str, Any]) -> None:
        layers = self.manifest["layers"]
        if set(activations) != set(layers):
            raise HookError(f"Rows are of {', '.join(layers)}; got {', '.join(activations) or 'none'}.")
        n = len(arrays["tokens"])
        if any(array.ndim < 1 or array.shape[0] != n for array in arrays.values()) or not n:
            counts = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            raise HookError(f"All layers and labels have the same number of rows, at least one; got {counts}.")
        for name, array in activations.items():
            axes, sizes = layers[name]["axes"], layers[name]["shape"]
            given = array.shape[1:]
            if len(given) != len(sizes) or any(
                has != size for axis, size, has in zip(axes, sizes, given, strict=True) if axis != "key"
            ):
                raise HookError(f"A row of {name} has axes {', '.join(axes)} of {list(sizes)}; got {list(given)}.")

    def _tell_of_steps(self, step: int) -> None:
        before, self._last_here = self._last_here, step
        if step < before and not self._has_told_of_order:
            self._has_told_of_order = True
            warnings.warn(
                f"Step {step} is written to {self.folder} after step {before}: rows with the same step are read as "
                "those of one, so count steps on through all epochs.",
                CaptureWarning,
                stacklevel=3,
            )
        last = self._last_before
        if step > last or self._has_told_of_steps:
            return
        self._has_told_of_steps = True
        warnings.warn(
            f"Step {step} is written to {self.folder}, where earlier sessions captured steps up to {last}: of a step "
            "that is captured again the later rows count, and losses are added to the earlier ones. To go on with that "
            f"training after it, give first_step, here above {last}; for another training, another storage_path (and "
            "s3_prefix).",
            CaptureWarning,
            stacklevel=3,
        )

    def _write_shard(self, arrays: dict[str, Any], part: slice, about: Mapping[str, Any]) -> Path:
        name = shard_name(self._number, about["step"])
        path = self.folder / name
        # What is whole is not copied.
        parts = {key: array if part == slice(0, len(array)) else array[part] for key, array in arrays.items()}
        entry = {
            "file": name,
            "shard": self._number,
            **about,
            "session": self.session,
            "rank": self.rank,
            "rows": part.stop - part.start,
            "shapes": {key: list(array.shape) for key, array in parts.items()},
            "saved": now(),
        }
        with writing(path):
            if not is_entry({**entry, "bytes": 0, "local": True, "remote": None}):
                raise ValueError("the reader would not accept its entry of the manifest")
            notes = {"format": "mlx", ENTRY: json.dumps(entry, allow_nan=False)}
            with whole_file(path) as draft:
                write_arrays(draft, {key: lambda array=array: array for key, array in parts.items()}, notes)  # type: ignore[misc]
        self._number += 1
        with self._manifest.lock:
            self._manifest.add([_named(entry, path)])
            self._manifest.save(self.folder)
        if self._backlog is not None:
            self._backlog.add(name)
        return path

    # --- Uploading. ---

    def _tell_of_uploads(self) -> None:
        if self._backlog is None:
            return
        failed = self._backlog.failed
        if failed:
            self._backlog.retry()
            if not self._has_warned:
                self._has_warned = True
                self._warn(failed, "with the next rows, and at the end")

    def _warn(self, left: Mapping[str, str], again: str) -> None:
        shards = [name for name in left if name != MANIFEST]
        what = f"{len(shards)} of the shards in {self.folder}" if shards else f"The manifest in {self.folder}"
        reason = next(iter(left.values())).rstrip(".")
        warnings.warn(
            f"{what} could not be uploaded ({reason}). Nothing is lost: they stay there, and are tried again {again}.",
            UploadWarning,
            stacklevel=3,
        )


def hold(folder: Path) -> HeldFolder:
    """Hold a folder of shards.

    Raises:
        HookError: another writes there, or it cannot be opened.
    """
    try:
        return HeldFolder(folder)
    except BlockingIOError as error:
        raise HookError(
            f"{folder} is being written by another run: wait for its end, or capture to another folder (storage_path).",
            field="storage_path",
        ) from error
    except OSError as error:
        raise HookError(f"cannot read {folder}: {error.strerror or error}") from error


def check_ranks(place: Path | RemoteFolder, each_rank: bool) -> None:
    """Raises HookError where one rank has written what all are to write now, or the other way round."""
    name, field = (place.url, "s3_prefix") if isinstance(place, RemoteFolder) else (str(place), "storage_path")
    found = folders_in(place)
    if not each_rank and any(found):
        raise HookError(f"{name} holds captures of all ranks: give those of one rank another {field}.", field=field)
    if each_rank and "" in found:
        raise HookError(
            f"{name} holds captures that one rank wrote: give those of all ranks another {field}.", field=field
        )


def whole_step(step: Any) -> int:
    """A training step as Python's number, whoever's it was.

    Raises:
        HookError: it is none.
    """
    try:
        whole = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        whole = -1
    if whole < 0:
        raise HookError(f"step is a whole number from 0 up, got {step!r}.", field="step")
    return whole


def complete(folder: Path, manifest: Manifest) -> None:
    """Bring a folder that is held, and its manifest, to what they would be had no writer been killed."""
    clear_left(folder, is_held=True)
    manifest.add(_unnamed(folder, manifest))
    for entry in manifest.entries:
        path = folder / entry["file"]
        if entry["remote"] and not entry["local"]:
            # Its writer was killed between saying that the file is gone and removing it.
            path.unlink(missing_ok=True)
        manifest.update(entry["file"], local=path.is_file())


def _next_number(folder: Path, manifest: Manifest, remote: RemoteFolder | None) -> int:
    """The number of the next shard: above those of all files, whether or not they could be read, and of all entries."""
    names = [*(path.name for path in folder.iterdir()), *(entry["file"] for entry in manifest.entries)]
    if remote is not None:
        # A writer on another machine may have been killed before the manifest there named what it uploaded.
        names += remote.names()
    return 1 + max((number for name in names if (number := shard_number(name)) is not None), default=-1)


def _named(entry: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A shard's entry as the manifest has it."""
    return {**entry, "bytes": path.stat().st_size, "local": True, "remote": None}


def _unnamed(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Entries of the whole shards in a folder that its manifest does not name, whose writer was killed in between.

    Warns:
        UnreadableShardWarning: a file is called as a shard and is none of these layers.
    """
    named = {entry["file"] for entry in manifest.entries}
    found = []
    for path in sorted(folder.iterdir()):
        if shard_number(path.name) is None or path.name in named:
            continue
        try:
            found.append(_own_entry(path, manifest))
        except (OSError, ValueError, LookupError, TypeError) as error:
            warnings.warn(
                f"{path} is no shard of these captures and stays as it is: {error}.",
                UnreadableShardWarning,
                stacklevel=5,
            )
    return found


def _own_entry(path: Path, manifest: Manifest) -> dict[str, Any]:
    """The entry of a shard, from what its header tells.

    Raises:
        OSError, ValueError, LookupError, TypeError: it is no whole shard of the manifest's layers.
    """
    file = TensorFile(path)
    entry = json.loads(file.notes[ENTRY])
    layers = manifest.data["layers"]
    if entry["file"] != path.name or set(file) != {*layers, *COLUMNS} or set(entry["shapes"]) != set(file):
        raise ValueError("it holds other layers")
    if not is_entry(named := _named(entry, path)):
        raise ValueError("its description is damaged")
    return named
