"""Shards: captured rows in safetensors files with a manifest, in one folder.

    mechint_cache/
        activations_shard_000000_step_0.safetensors       one tensor per layer [row, ...], tokens, sequence, position
        activations_shard_000001_step_200.safetensors
        manifest.json                                      what was captured of which model, and every shard

A shard is there whole or not at all, and the manifest is replaced with each one. Where every rank of a distributed
training writes, each has such a folder below: ``rank_000``, ``rank_001``, ... What was uploaded lies in the bucket in
the same way.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from ..errors import HookError, UnknownHookError, UnreadableShardWarning
from ..hook_points import block_point, canonical_name, parse_layer_name
from .files import writing
from .manifest import COLUMNS, MANIFEST, Manifest, check_same_layers, current, now, plain
from .remote import SCHEME, RemoteFolder, cache_folder, file_sha256
from .rows import LABELS, RowPart, Rows
from .shard_writer import ShardWriter, check_ranks, complete, hold
from .tensors import TensorFile
from .uploads import Uploads, folders_in, joined

__all__ = ["Shard", "ShardReader", "ShardRows", "ShardWriter", "fetch", "record_analysis", "upload"]

_OF_ENTRY = ("step", "rank", "session")
_MOST_OPEN = 100
"""Files mapped at a time: each takes one of the 256 file descriptors that a process has on a Mac."""


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
        return {name: self.file.read(name) for name in self.file if name not in COLUMNS}

    tokens = property(lambda self: self.file.numpy("tokens"))
    sequence = property(lambda self: self.file.numpy("sequence"))
    position = property(lambda self: self.file.numpy("position"))

    def values(self, layer: str, indices: np.ndarray) -> np.ndarray:
        """Rows of a layer at indices, [row, ...] in float32."""
        mapped = self.file.numpy(layer)
        chosen = mapped[indices]
        if self.file.is_bfloat16(layer):
            return np.left_shift(chosen, 16, dtype=np.uint32).view(np.float32)
        return chosen.astype(np.float32, copy=False)


class ShardReader:
    """What was captured to a folder, here or in S3.

        reader = ShardReader("mechint_cache")           # or "s3://my-bucket/experiments/exp001"
        reader.steps                                    # [0, 200, 400]
        reader.rows("model.layers.2")                   # all rows of the stream that leaves block 2
        reader.read_shard(reader.entries[0]).activations

    Where two sessions saved the same step, as after resuming from an older checkpoint, the rows of the later one that
    saved it whole count. The
    folders of several ranks read as one. A shard that is in S3 alone is downloaded when it is first read, to
    ``$XDG_CACHE_HOME/neuroscope-mlx/captures`` (``~/.cache``), and stays there until that folder is removed.

    Args:
        path: the folder, or its address in S3.
        unreadable: "refuse" shards that are damaged or gone, or "skip" them with a warning.

    Raises:
        HookError: there is no manifest, or it cannot be read; or a shard is damaged or gone.

    Warns:
        UnreadableShardWarning: names the shards that were passed over.
    """

    def __init__(self, path: str | Path, *, unreadable: Literal["refuse", "skip"] = "refuse") -> None:
        if unreadable not in ("refuse", "skip"):
            raise HookError(f"unreadable is 'refuse' or 'skip', got {unreadable!r}.", field="unreadable")
        is_remote = str(path).startswith(SCHEME)
        self.folder = cache_folder(str(path)) if is_remote else Path(path)
        self._where = str(path)
        self._opened: OrderedDict[str, Shard] = OrderedDict()
        self._remotes: dict[str, RemoteFolder] = {}
        if is_remote:
            remote = RemoteFolder.of_url(str(path))
            manifests = _remote_manifests(remote)
            # Where they are now, wherever they were uploaded to.
            self._remotes = {below: remote.below(below) for below in manifests}
        else:
            manifests = _local_manifests(self.folder)
        if not manifests:
            raise HookError(f"There are no captured activations in {path}: it has no {MANIFEST}.")
        first, *others = manifests.values()
        for manifest in others:
            check_same_layers(first, self._where, manifest.data["layers"], manifest.data)
        self.manifest: dict[str, Any] = first.data
        self.layers: dict[str, dict[str, Any]] = self.manifest["layers"]
        self._sessions = [session for manifest in manifests.values() for session in manifest.data["sessions"]]
        entries = [
            entry | {"file": f"{below}/{entry['file']}".lstrip("/")}
            for below, manifest in manifests.items()
            for entry in manifest.entries
        ]
        self.entries: list[dict[str, Any]] = current(self._readable(entries, unreadable), self._sessions)

    def _readable(self, entries: list[dict[str, Any]], unreadable: str) -> list[dict[str, Any]]:
        """The entries whose shards can be read."""
        problems = {}
        for entry in entries:
            try:
                self._check(entry, with_header=unreadable == "skip")
            except HookError as error:
                if unreadable == "refuse":
                    raise
                problems[entry["file"]] = error
        if problems:
            told = "; ".join([*map(str, list(problems.values())[:3]), *["..."][: len(problems) > 3]])
            warnings.warn(
                f"{len(problems)} of {len(entries)} shards are passed over: {told}",
                UnreadableShardWarning,
                stacklevel=4,
            )
        return [entry for entry in entries if entry["file"] not in problems]

    def _check(self, entry: Mapping[str, Any], *, with_header: bool) -> None:
        """Raises HookError where a shard is neither here nor in S3, or has another size than was written."""
        path = self.folder / entry["file"]
        if not path.is_file():
            if not entry.get("remote"):
                raise HookError(f"cannot read {path}: it is gone")
            return
        size = path.stat().st_size
        if size != entry.get("bytes", size):
            raise HookError(f"cannot read {path}: it has {size} bytes and was written with {entry['bytes']}")
        if with_header:
            Shard(path, entry)

    @property
    def description(self) -> dict[str, Any]:
        """What the manifest tells besides its layers and shards; of several ranks, what that of the first tells, and
        the sessions of all."""
        told = {key: value for key, value in self.manifest.items() if key not in ("layers", "shards")}
        totals = {"total_shards": len(self.entries), "total_rows": sum(entry["rows"] for entry in self.entries)}
        return told | totals | {"sessions": self._sessions}

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
            raise HookError(f"Step {unknown[0]} was not captured. Steps: {_listed(self.steps)}.", field="steps")
        entries = [entry for entry in self.entries if steps is None or entry["step"] in steps]
        if not entries:
            raise HookError(f"There are no captured rows in {self._where}.")
        return ShardRows(self, name, entries)

    def read_shard(self, entry: Mapping[str, Any]) -> Shard:
        """One file.

        Raises:
            HookError: it cannot be read.
        """
        name = entry["file"]
        # Taken out and put back, the newest last: other threads may read too.
        shard = self._opened.pop(name, None) or Shard(self._file(entry), entry)
        if not shard.file.is_whole:
            raise HookError(f"cannot read {shard.path}: it has changed since it was opened")
        self._opened[name] = shard
        if len(self._opened) > _MOST_OPEN:
            self._opened.popitem(last=False)
        return shard

    def _file(self, entry: Mapping[str, Any]) -> Path:
        """Where a shard lies on this machine; it is downloaded if need be."""
        path = self.folder / entry["file"]
        if path.is_file() or not entry.get("remote"):
            return path
        below, _, name = entry["file"].rpartition("/")
        if below not in self._remotes:
            self._remotes[below] = RemoteFolder.of_url(entry["remote"].rpartition("/")[0])
        remote = self._remotes[below]
        # The checksum stands for the content: another capture to the same place is another file.
        copy = cache_folder(remote.url) / entry["sha256"][:16] / name
        if not copy.is_file() or copy.stat().st_size != entry["bytes"]:
            with writing(copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
                remote.get(name, copy, entry["sha256"])
        return copy


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
        labels = {name: np.zeros(len(indices), dtype=kind) for name, kind in LABELS.items()}
        for entry, chosen, inside in self._found(indices):
            shard = self.reader.read_shard(entry)
            for name in COLUMNS:
                labels[name][chosen] = shard.file.numpy(name)[inside]
            for name in _OF_ENTRY:
                labels[name][chosen] = entry[name]
        return RowPart(self.values(indices), **labels)

    def values(self, indices: Any) -> np.ndarray:
        """The values at indices [n], [n, width]: without their labels."""
        indices = np.asarray(indices, dtype=np.int64)
        values = np.zeros((len(indices), *self.shape), dtype=np.float32)
        for entry, chosen, inside in self._found(indices):
            found = self.reader.read_shard(entry).values(self.name, inside)
            if found.shape[1:] != self.shape:
                # Patterns of shorter batches have fewer keys.
                missing = [(0, whole - size) for whole, size in zip(self.shape, found.shape[1:], strict=True)]
                found = np.pad(found, [(0, 0), *missing])
            values[chosen] = found
        return values.reshape(len(indices), self.width)

    def _found(self, indices: np.ndarray) -> Iterator[tuple[Mapping[str, Any], np.ndarray, np.ndarray]]:
        """Shard by shard: its entry, which of the indices lie in it, and where in it they do, ascending.

        Raises:
            IndexError: there are no such rows.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows are 0 to {len(self) - 1}, got {indices.min()} to {indices.max()}")
        order = np.argsort(indices, kind="stable")
        ends = np.searchsorted(indices[order], self._ends)
        for i, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
            if end > start:
                chosen = order[start:end]
                yield self.entries[i], chosen, indices[chosen] - (self._ends[i] - self.entries[i]["rows"])


def fetch(url: str, folder: str | Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Download captures from S3 to a folder, to read them there or to go on capturing.

    What is there already, by size and checksum, is not downloaded again. The manifest comes last.

    Args:
        url: "s3://my-bucket/experiments/exp001".
        folder: made if it is not there.
        progress: is told how many shards are done, of how many.

    Returns:
        the folder.

    Raises:
        HookError: nothing was captured there, it cannot be downloaded, or the folder holds other captures, those of one
            rank where all wrote or the other way round, or is being written.
    """
    folder = Path(folder)
    remote = RemoteFolder.of_url(url)
    manifests = _remote_manifests(remote)
    if not manifests:
        raise HookError(f"There are no captured activations in {url}: it has no {MANIFEST}.")
    for each_rank in {bool(below) for below in manifests}:
        check_ranks(folder, each_rank)
    total = sum(len(manifest.entries) for manifest in manifests.values())
    done = 0
    for below, manifest in manifests.items():
        inner = folder / below
        with writing(inner / MANIFEST):
            inner.mkdir(parents=True, exist_ok=True)
        with hold(inner):
            here = Manifest.load(inner)
            if here is not None and here.data["id"] != manifest.data["id"]:
                raise HookError(f"{inner} holds other captures than {url}: fetch these to another folder.")
            for entry in manifest.entries:
                path = inner / entry["file"]
                with writing(path):
                    if not path.is_file() or file_sha256(path) != entry["sha256"]:
                        remote.below(below).get(entry["file"], path, entry["sha256"])
                manifest.update(entry["file"], local=True)
                done += 1
                if progress is not None:
                    progress(done, total)
            if here is not None:
                manifest.join(here)
            manifest.save(inner)
    return folder


def upload(
    folder: str | Path, url: str, progress: Callable[[int, int], None] | None = None, *, keep_local: bool = True
) -> None:
    """Upload captures to S3: what is not there yet, as after an upload that failed, or was captured without S3.

        upload("mechint_cache", "s3://my-bucket/experiments/exp001")

    Args:
        folder: where they are.
        url: where their other shards are, if any were uploaded.
        progress: is told how many shards are done, of how many.
        keep_local: whether files stay when their upload is confirmed.

    Raises:
        HookError: there are no captures, or they are being written; others are in that place, as those of one rank
            where these are of all, or another run writes there; or a file cannot be uploaded. What was uploaded before
            it is there.
    """
    folder = Path(folder)
    remote = RemoteFolder.of_url(url)
    names = list(_local_manifests(folder))
    if not names:
        raise HookError(f"There are no captured activations in {folder}: it has no {MANIFEST}.")
    for each_rank in {bool(name) for name in names}:
        check_ranks(remote, each_rank)
    with ExitStack() as held:
        found = []
        for name in names:
            held.enter_context(hold(folder / name))
            found.append(_uploads(folder / name, remote.below(name), keep_local=keep_local))
        work = [(uploads, name) for uploads in found for name in uploads.pending]
        for done, (uploads, name) in enumerate(work, start=1):
            uploads.send(name)
            if progress is not None:
                progress(done, len(work))
        for uploads in found:
            uploads.send(MANIFEST)


def _uploads(folder: Path, remote: RemoteFolder, *, keep_local: bool) -> Uploads:
    """What is to be uploaded of a folder that is held and has a manifest."""
    manifest, version = joined(folder, remote)
    assert manifest is not None
    complete(folder, manifest)
    manifest.save(folder)
    return Uploads(folder, manifest, remote, version, keep_local=keep_local)


def record_analysis(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Add to the ``analysis_history`` of a folder's manifest what was analysed, with the time (``analysed``).

    Raises:
        HookError: there is no manifest, it cannot be written, or captures are being written there.
    """
    folder = Path(folder)
    for below in _local_manifests(folder):
        inner = folder / below
        with hold(inner):
            manifest = Manifest.load(inner)
            if manifest is not None:
                manifest.data["analysis_history"].append({"analysed": now(), **plain(record, "record")})
                manifest.save(inner)


def _local_manifests(folder: Path) -> dict[str, Manifest]:
    """The manifests in a folder and in those of ranks below, by the folder's name: "" for itself."""
    found = {}
    for below in folders_in(folder):
        if (manifest := Manifest.load(folder / below)) is not None:
            found[below] = manifest
    return found


def _remote_manifests(remote: RemoteFolder) -> dict[str, Manifest]:
    """The same of a folder in S3."""
    found = {}
    for below in folders_in(remote):
        inner = remote.below(below)
        text = inner.read(MANIFEST)
        if text is not None:
            found[below] = Manifest.parse(text, f"{inner.url}/{MANIFEST}")
    return found


def _listed(steps: Sequence[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= 20 else [*shown[:10], "...", *shown[-3:]])
