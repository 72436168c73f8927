"""What a folder of shards has in S3: one folder's shards and manifest at one place, and nobody else's."""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import HookError
from .manifest import MANIFEST, RANK_FOLDERS, Manifest
from .remote import RemoteFolder, ReplacedError


class Uploads:
    """Brings a folder's shards to its place in S3, each followed by a manifest that names it.

    Two runs that write to one place would take each other's names and drop each other's shards from the manifest. So
    the manifest there is replaced only where it is what this wrote last: whoever opened the place later has it, and the
    other one's shards stay where they are.

    Args:
        folder: the one that is held.
        manifest: the folder's, joined with that of the place.
        remote: the place.
        version: of the manifest that was joined; None where there was none.
        keep_local: whether a file stays when its upload is confirmed.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, remote: RemoteFolder, version: str | None, *, keep_local: bool
    ) -> None:
        self._folder, self._manifest, self.remote, self._version = folder, manifest, remote, version
        self._keep_local = keep_local
        self._taken: HookError | None = None
        self._is_closed = False

    @property
    def pending(self) -> list[str]:
        """Files here that are not there yet, or should not be here any more."""
        with self._manifest.lock:
            return [
                entry["file"]
                for entry in self._manifest.entries
                if entry["local"] and not (entry["remote"] and self._keep_local)
            ]

    def close(self) -> None:
        """Change the folder no more: another may write it."""
        with self._manifest.lock:
            self._is_closed = True

    def send(self, name: str) -> None:
        """Bring a shard to its place, or the manifest alone.

        Raises:
            HookError: it could not be done, and why; what is here stays.
        """
        if name != MANIFEST:
            self._send_shard(name)
        self._send_manifest()
        if name != MANIFEST and self._manifest.entry(name)["local"] and not self._keep_local:
            # What the manifest says is local must be there, whenever the process ends.
            with self._changing():
                self._manifest.update(name, local=False)
            (self._folder / name).unlink(missing_ok=True)

    def _send_shard(self, name: str) -> None:
        if self._manifest.entry(name)["remote"] is not None:
            return
        self._check_alone()
        try:
            digest = self.remote.put(self._folder / name, name)
        except ReplacedError as error:
            raise self._other_run() from error
        with self._changing():
            self._manifest.update(name, remote=f"{self.remote.url}/{name}", sha256=digest)

    def _send_manifest(self) -> None:
        self._check_alone()
        content = self._manifest.remote_text().encode()
        try:
            self._version = self.remote.write(MANIFEST, content, replaces=self._version)
        except ReplacedError:
            # It may be what this wrote, of which the answer was lost.
            self._check_alone()
            self._version = self.remote.write(MANIFEST, content, replaces=self._version)

    def _check_alone(self) -> None:
        """Raise HookError where another has written the manifest there since this did."""
        if self._taken is not None:
            raise self._taken
        if self.remote.version(MANIFEST) == self._version:
            return
        text, version = self.remote.read_version(MANIFEST)
        if text is not None:
            there = Manifest.parse(text, f"{self.remote.url}/{MANIFEST}")
            if there.data["id"] != self._manifest.data["id"] or there.is_ahead_of(self._manifest):
                self._taken = self._other_run()
                raise self._taken
        self._version = version

    def _other_run(self) -> HookError:
        return HookError(
            f"another run writes to {self.remote.url}: give each its own s3_prefix and storage_path", field="s3_prefix"
        )

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A block that changes the manifest and saves it: not when all was closed, and another may write the folder."""
        with self._manifest.lock:
            if self._is_closed:
                raise HookError("capturing has ended")
            yield
            self._manifest.save(self._folder)


def folders_in(place: Path | RemoteFolder) -> list[str]:
    """The folders of a place that have a manifest: "" for itself, ``rank_003`` and the like for those of ranks."""
    if isinstance(place, RemoteFolder):
        found = [below for below, _, last in (name.rpartition("/") for name in place.names()) if last == MANIFEST]
        return [below for below in found if not below or fnmatch.fnmatchcase(below, RANK_FOLDERS)]
    ranks = [path.parent.name for path in sorted(place.glob(f"{RANK_FOLDERS}/{MANIFEST}"))]
    return [*([""] if (place / MANIFEST).exists() else []), *ranks]


def joined(folder: Path, remote: RemoteFolder) -> tuple[Manifest | None, str | None]:
    """The manifest of a folder and of its place in S3, as one, and the version of the latter; None where there is none.

    Raises:
        HookError: it cannot be read, or the two are not of the same captures.
    """
    manifest = Manifest.load(folder)
    text, version = remote.read_version(MANIFEST)
    if text is not None:
        there = Manifest.parse(text, f"{remote.url}/{MANIFEST}")
        if manifest is None:
            manifest = there
        elif manifest.data["id"] != there.data["id"]:
            raise HookError(
                f"{remote.url} holds other captures than {folder}: give another s3_prefix or storage_path.",
                field="s3_prefix",
            )
        elif manifest.contradicts(there):
            raise HookError(
                f"{remote.url} was continued by another run than {folder}: give another s3_prefix and storage_path.",
                field="s3_prefix",
            )
        manifest.join(there)
    for entry in [] if manifest is None else manifest.entries:
        if entry["remote"] and entry["remote"] != f"{remote.url}/{entry['file']}":
            raise HookError(
                f"What was captured to {folder} is at {entry['remote'].rpartition('/')[0]}, not at {remote.url}: go on "
                "there, or give another storage_path.",
                field="s3_prefix",
            )
    return manifest, version
