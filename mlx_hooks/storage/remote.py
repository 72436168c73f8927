"""A folder of an S3 bucket, through boto3, and a thread that uploads to it while something else goes on.

Which service, which region and whose credentials is boto3's own to find: ``AWS_ENDPOINT_URL``, ``AWS_PROFILE``,
``~/.aws`` and the like. Nothing of them is kept or shown.
"""

import base64
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from types import EllipsisType
from typing import Any
from urllib.parse import urlsplit

from ..errors import HookError
from .files import whole_file

SCHEME = "s3://"
PART = 64 * 2**20
"""Bytes: a file of this size or more is uploaded in parts of it."""
_CONNECT_SECONDS = 5
_ANSWER_SECONDS = 60
_MISSING = ("NoSuchKey", "404", "NotFound")
_REPLACED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")


class ReplacedError(HookError):
    """An object is not the one that was to be replaced: somebody else has written it."""


class RemoteFolder:
    """The objects of a bucket whose keys begin with a prefix.

        folder = RemoteFolder("my-bucket", "experiments/exp001")
        folder.put(Path("manifest.json"), "manifest.json")
        folder.read("manifest.json")

    A request that fails for a passing reason is tried three times (boto3's standard mode; ``AWS_MAX_ATTEMPTS``); a
    service that cannot be reached costs some 20 seconds.

    Args:
        bucket: the bucket's name.
        prefix: what the keys begin with; a ``/`` follows it.

    Raises:
        HookError: boto3 is not installed, or what it needs to know (a profile, say) is not there.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self.bucket = bucket
        self.prefix = prefix.strip("/")
        self._tried: set[str] = set()  # keys of uploads that are not known to have arrived: these may be replaced
        with self._told("cannot be used"):
            self._client = _client()

    @classmethod
    def of_url(cls, url: str) -> "RemoteFolder":
        """The folder of ``s3://bucket/prefix``.

        Raises:
            HookError: it is no such address.
        """
        bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
        if not url.startswith(SCHEME) or not bucket:
            raise HookError(f"An address in S3 is s3://bucket/prefix, got {url!r}.")
        return cls(bucket, prefix)

    @property
    def url(self) -> str:
        """``s3://bucket/prefix``."""
        return f"{SCHEME}{self.bucket}/{self.prefix}".rstrip("/")

    def __repr__(self) -> str:
        return f"RemoteFolder({self.url})"

    def put(self, path: Path, name: str) -> str:
        """Upload a file, and make sure that it is there: its size, and the checksum that the service computed.

        An object with another content is not replaced, unless it is what arrived when this was tried before.

        Returns:
            the SHA-256 of its bytes, in hexadecimal digits.

        Raises:
            ReplacedError: there is another object of this name.
            HookError: it is not there, and why.
        """
        from boto3.s3.transfer import TransferConfig

        size, whole, in_parts = _digests(path)
        # Threads of its own would take the processor from what goes on meanwhile.
        transfer = TransferConfig(multipart_threshold=PART, multipart_chunksize=PART, use_threads=False)
        with self._told(f"cannot take {name}"):
            if (there := self._head(name)) is not None and self._key(name) not in self._tried:
                if not self._is_there(name, there, size, (_base64(whole), in_parts)):
                    raise ReplacedError(f"{self.url} cannot take {name}: it has another object of this name.")
                return whole.hex()
            self._tried.add(self._key(name))
            self._client.upload_file(
                str(path), self.bucket, self._key(name), ExtraArgs={"ChecksumAlgorithm": "SHA256"}, Config=transfer
            )
            there = self._head(name)
            if there is None or not self._is_there(name, there, size, (_base64(whole), in_parts)):
                raise HookError(f"{self.url} cannot take {name}: it did not arrive as it was sent.")
        self._tried.discard(self._key(name))
        return whole.hex()

    def version(self, name: str) -> str | None:
        """What differs for each content of an object; None where there is no such object.

        Raises:
            HookError: it could not be asked, and why.
        """
        with self._told(f"cannot give {name}"):
            there = self._head(name)
        return None if there is None else there["ETag"]

    def write(self, name: str, content: bytes, *, replaces: str | EllipsisType | None = ...) -> str:
        """Replace a small object by bytes.

        Args:
            replaces: the version that is to be there, None where there is to be no such object; by default whatever
                there is.

        Returns:
            the new version.

        Raises:
            ReplacedError: there is another version.
            HookError: it could not be done, and why.
        """
        condition: dict[str, str] = {}
        if replaces is None:
            condition = {"IfNoneMatch": "*"}
        elif isinstance(replaces, str):
            condition = {"IfMatch": replaces}
        with self._told(f"cannot take {name}"):
            return self._put_small(name, content, condition)["ETag"]

    def read(self, name: str) -> bytes | None:
        """A small object's bytes; None where there is no such object.

        Raises:
            HookError: it could not be read, and why.
        """
        return self.read_version(name)[0]

    def read_version(self, name: str) -> tuple[bytes | None, str | None]:
        """The same, and its version."""
        with self._told(f"cannot give {name}"):
            try:
                there = self._client.get_object(Bucket=self.bucket, Key=self._key(name))
                return there["Body"].read(), there["ETag"]
            except self._client.exceptions.ClientError as error:
                if error.response["Error"]["Code"] not in _MISSING:
                    raise
                return None, None

    def get(self, name: str, path: Path, sha256: str | None = None) -> None:
        """Download an object to a file, which is there whole or not at all.

        Args:
            sha256: what its bytes are known to give.

        Raises:
            HookError: it could not be downloaded, or its bytes give another checksum.
            OSError: the file cannot be written.
        """
        with whole_file(path) as draft:
            with self._told(f"cannot give {name}"):
                self._client.download_file(self.bucket, self._key(name), str(draft))
            if sha256 is not None and file_sha256(draft) != sha256:
                raise HookError(f"{self.url}/{name} is not what was uploaded: its checksum differs.")

    def names(self) -> list[str]:
        """What there is: keys without the prefix, sorted.

        Raises:
            HookError: it could not be listed, and why.
        """
        start = f"{self.prefix}/" if self.prefix else ""
        with self._told("cannot be listed"):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=start)
            return sorted(found["Key"][len(start) :] for page in pages for found in page.get("Contents", ()))

    def below(self, name: str) -> "RemoteFolder":
        """A folder in this one; of "", this one."""
        inner = copy(self)
        inner.prefix = self._key(name).rstrip("/")
        return inner

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def _head(self, name: str) -> dict[str, Any] | None:
        """What the service tells of an object without its bytes; None where there is no such object."""
        try:
            return self._client.head_object(Bucket=self.bucket, Key=self._key(name), ChecksumMode="ENABLED")
        except self._client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in _MISSING:
                raise
            return None

    def _is_there(self, name: str, there: dict[str, Any], size: int, digests: tuple[str, str]) -> bool:
        """Whether an object has this size and one of these checksums."""
        if there["ContentLength"] != size:
            return False
        # Not every service computes it, and not every one in the same way: the object itself tells.
        return there.get("ChecksumSHA256") in digests or _base64(self._read_back(name)) in digests

    def _put_small(self, name: str, content: bytes, condition: dict[str, str]) -> dict[str, Any]:
        place = {"Bucket": self.bucket, "Key": self._key(name), "Body": content, "ChecksumAlgorithm": "SHA256"}
        try:
            return self._client.put_object(**place, **condition)
        except self._client.exceptions.ClientError as error:
            code = error.response["Error"]["Code"]
            if condition and code in (*_REPLACED, *_MISSING):
                raise ReplacedError(f"{self.url} cannot take {name}: somebody else has written it.") from error
            if condition and code == "NotImplemented":
                # A service that knows no conditions is written to as before there were any.
                return self._client.put_object(**place)
            raise

    def _read_back(self, name: str) -> bytes:
        digest = hashlib.sha256()
        for part in self._client.get_object(Bucket=self.bucket, Key=self._key(name))["Body"].iter_chunks(2**20):
            digest.update(part)
        return digest.digest()

    @contextmanager
    def _told(self, problem: str) -> Iterator[None]:
        """A block that talks to S3: what fails there is told as ``problem`` and its reason."""
        try:
            yield
        except ImportError as error:
            raise HookError("S3 needs boto3, which is not installed: pip install 'neuroscope-mlx[s3]'.") from error
        except Exception as error:
            if not _is_of_boto3(error):
                raise
            raise HookError(f"{self.url} {problem}: {self._reason(error)}.") from error

    def _reason(self, error: Exception) -> str:
        from boto3.exceptions import Boto3Error
        from botocore import exceptions as known

        if isinstance(error, Boto3Error) and isinstance(error.__context__, known.BotoCoreError | known.ClientError):
            error = error.__context__  # an upload's error holds the one that says why
        if isinstance(error, known.ClientError):
            code = error.response["Error"].get("Code", "")
            if code == "NoSuchBucket":
                return f"there is no bucket {self.bucket!r}"
            if code in _MISSING:
                return "there is no such object"
            if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 403:
                return f"access is denied ({code}); the credentials must be allowed to list, read and write there"
            return f"the service answers {error.response['Error'].get('Message') or code}".rstrip(".")
        if isinstance(error, known.NoCredentialsError | known.PartialCredentialsError):
            return (
                "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or make ~/.aws/credentials"
            )
        if isinstance(error, known.ConnectionError | known.HTTPClientError):
            # The whole text would show an address with a password in it.
            address = urlsplit(self._client.meta.endpoint_url)
            return f"{address.hostname}:{address.port or 443} does not answer"
        return str(error).strip().splitlines()[-1].rstrip(".")  # a wrong name: what is wrong stands below


def _is_of_boto3(error: Exception) -> bool:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    return isinstance(error, Boto3Error | BotoCoreError | ClientError)


def _client() -> Any:
    """A client of S3, of a session of its own: boto3's common one must not be made in two threads."""
    import boto3
    from botocore.config import Config

    retries = {"mode": os.environ.get("AWS_RETRY_MODE", "standard")}
    config = Config(retries=retries, connect_timeout=_CONNECT_SECONDS, read_timeout=_ANSWER_SECONDS)
    return boto3.session.Session().client("s3", config=config)


def _digests(path: Path) -> tuple[int, bytes, str]:
    """Of a file its size, its SHA-256, and the one that S3 tells of what was uploaded in parts."""
    whole, parts = hashlib.sha256(), []
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(PART):
            size += len(chunk)
            whole.update(chunk)
            parts.append(hashlib.sha256(chunk).digest())
    return size, whole.digest(), f"{_base64(hashlib.sha256(b''.join(parts)).digest())}-{len(parts)}"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal digits."""
    return _digests(path)[1].hex()


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


class Backlog:
    """Pieces of work, each with a name, done one after the other in a thread of its own.

        backlog = Backlog(upload)
        backlog.add("activations_shard_000000_step_0.safetensors")
        left = backlog.close(seconds=60)        # {} when all was done

    What fails waits until it is tried again, and does not hold up what comes after it. The thread does not keep the
    process alive.

    Args:
        work: does one piece; it raises where it could not be done.
    """

    def __init__(self, work: Callable[[str], None]) -> None:
        self._work = work
        self._waiting: dict[str, None] = {}
        self._failed: dict[str, str] = {}
        self._current: str | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="neuroscope-uploads", daemon=True)
        self._thread.start()

    def add(self, name: str) -> None:
        """Do this after what is waiting; a piece that waits already is not done twice."""
        with self._changed:
            self._failed.pop(name, None)
            self._waiting[name] = None
            self._changed.notify_all()

    @property
    def failed(self) -> dict[str, str]:
        """What failed when it was last tried: the reasons by name."""
        with self._changed:
            return dict(self._failed)

    @property
    def is_idle(self) -> bool:
        """Whether all was done, or failed."""
        with self._changed:
            return not self._waiting and self._current is None

    def retry(self) -> None:
        """Try what failed again, after what is waiting."""
        for name in self.failed:
            self.add(name)

    def wait(self, seconds: float) -> bool:
        """Wait until nothing is left to do, but not longer than this; whether nothing is left."""
        with self._changed:
            return self._changed.wait_for(lambda: self.is_idle, seconds)

    def close(self, seconds: float) -> dict[str, str]:
        """Wait as long, and begin no more work.

        Returns:
            what is not done, and why: what failed, and what there was no time for. A piece that is being done when the
            time is up may still be done.
        """
        deadline = time.monotonic() + seconds
        self.wait(seconds)
        with self._changed:
            late = [*([] if self._current is None else [self._current]), *self._waiting]
            self._waiting.clear()
            self._is_closed = True
            self._changed.notify_all()
            left = self._failed | dict.fromkeys(late, f"it was not done after {seconds:g} s")
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return left

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                name = self._current = next(iter(self._waiting))
                del self._waiting[name]
            try:
                self._work(name)
            except Exception as error:
                problem: str | None = str(error) or type(error).__name__
            else:
                problem = None
            with self._changed:
                self._current = None
                if problem is not None:
                    self._failed[name] = problem
                self._changed.notify_all()


def cache_folder(url: str) -> Path:
    """Where what is fetched from an address in S3 lies on this machine: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    readable = re.sub(r"[^\w.-]+", "_", url.removeprefix(SCHEME)).strip("._")[-100:]
    return Path(base) / "neuroscope-mlx" / "captures" / f"{readable}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
