"""Replies of raw bytes: large ones, sent from where they lie, whole or in parts, and not again if they are known."""

import hashlib
import logging
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

from flask import Response, request
from werkzeug.wsgi import wrap_file

from mlx_hooks import __version__
from neuroscope_bridge import payload

from .compression import wanted_encoding
from .errors import ApiError
from .scratch import mapped

log = logging.getLogger("api_server.downloads")

FORMAT_VERSION = 1
"""Of the bytes of downloads: counted up when the same query of the same capture gives other ones."""
IN_MEMORY_BYTES = 2**20
"""A JSON reply up to this size goes through memory."""
READ_BYTES = 2**20


class Source(Protocol):
    """Bytes that are made when they are read, a stretch at a time."""

    @property
    def nbytes(self) -> int: ...

    def ready(self) -> None:
        """Called before anything is sent.

        Raises:
            ApiError: the bytes cannot be made.
        """

    def at(self, offset: int) -> tuple[int, memoryview]:
        """A stretch with the byte at ``offset``: where it starts, and its bytes."""


class Pieces:
    """Sources one after the other as a file to read, which holds no more than the stretch that is being read.

    >>> file = Pieces([b"abc", b"", b"defg"], 1, 6)
    >>> bytes(file.read(4)), bytes(file.read(4)), bytes(file.read(4))
    (b'bc', b'def', b'')
    """

    def __init__(self, parts: Sequence[Source | bytes], start: int = 0, stop: int | None = None) -> None:
        whole = [_Whole(part) if isinstance(part, bytes) else part for part in parts]
        self._sources: list[Source] = [source for source in whole if source.nbytes]
        self._ends = list(accumulate(source.nbytes for source in self._sources))
        self._start = start
        self._stop = stop if stop is not None else (self._ends or [0])[-1]
        self._at = start
        self._held, self._held_from = memoryview(b""), 0

    def ready(self) -> None:
        """Raises ApiError if what is to be read cannot be made."""
        for source, end in zip(self._sources, self._ends, strict=True):
            if end > self._start and end - source.nbytes < self._stop:
                source.ready()

    def read(self, size: int = -1) -> memoryview:
        """At most ``size`` bytes, of one stretch; none at the end."""
        left = self._stop - self._at
        size = left if size < 0 else min(size, left)
        if size <= 0:
            return memoryview(b"")
        # The server reads a place again until the socket has taken it.
        if not self._held_from <= self._at < self._held_from + len(self._held):
            number = bisect_right(self._ends, self._at)
            begin = self._ends[number] - self._sources[number].nbytes
            self._held = memoryview(b"")
            start, self._held = self._sources[number].at(self._at - begin)
            self._held_from = begin + start
        part = self._held[self._at - self._held_from :][:size]
        self._at += len(part)
        return part

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file; positions count from where this one starts."""
        self._at = offset + (self._start, self._at, self._stop)[whence]
        return self.tell()

    def tell(self) -> int:
        return self._at - self._start

    def close(self) -> None:
        """Let the sources go, and the files that they read."""
        self._sources, self._ends, self._stop = [], [], self._at
        self._held = memoryview(b"")


class _Whole:
    """Bytes that are there."""

    def __init__(self, buffer: bytes | memoryview) -> None:
        self._buffer = memoryview(buffer)
        self.nbytes = len(buffer)

    def ready(self) -> None:
        """Nothing is to be made."""

    def at(self, offset: int) -> tuple[int, memoryview]:
        """All of them."""
        return 0, self._buffer


def entity_tag(*parts: object) -> str:
    """A strong ETag of what always gives the same bytes from this version of the product."""
    return hashlib.sha256(repr((FORMAT_VERSION, __version__, *parts)).encode()).hexdigest()[:32]


def large_json(body: object) -> Response:
    """A JSON reply that may be megabytes long.

    The HTTP server would copy such a body to a file bit by bit and read it back, many times over where the reader is
    slower than the file. Here it is one mapped file, of which the socket takes what it can; no memory waits with it.
    On a disk without room for that file it goes the ordinary way.
    """
    text = payload.dumps(body)
    if len(text) > IN_MEMORY_BYTES and wanted_encoding() is None:
        try:
            lying = mapped([text], len(text))
        except OSError as error:
            log.warning("a reply of %d bytes waits in memory: %s", len(text), error.strerror)
        else:
            return _passed_through(Pieces([_Whole(lying.data)]), len(text), "application/json")
    return Response(text, mimetype="application/json")


def is_known(etag: str) -> bool:
    """Whether the caller has this already (``If-None-Match``)."""
    return request.if_none_match.contains_weak(etag)


def check_if_match(etag: str) -> None:
    """Raises ApiError 412 for a caller who wants other bytes than there are (``If-Match``)."""
    if request.if_match and not request.if_match.contains(etag):
        raise ApiError(412, f'If-Match names other bytes: these have the ETag "{etag}".', code="precondition_failed")


def not_modified(etag: str) -> Response:
    """304."""
    return _tagged(Response(status=304), etag)


def tagged_json(body: object, etag: str) -> Response:
    """A JSON reply that need not be sent again."""
    return _tagged(large_json(body), etag)


def download(parts: Sequence[Source | bytes], content_type: str, filename: str, etag: str) -> Response:
    """Sources as a file, or the part of it that ``Range`` asks for.

    Args:
        parts: one after the other.
        content_type: what they are.
        filename: what a browser calls it; plain letters, digits, dots, ``_`` and ``-``.
        etag: from ``entity_tag``.

    Raises:
        ApiError: 416 for a range that lies outside, and what the sources cannot make.
    """
    size = sum(len(part) if isinstance(part, bytes) else part.nbytes for part in parts)
    span = _asked_range(size, etag)
    start, stop = span or (0, size)
    file = Pieces(parts, start, stop)
    # Flask answers HEAD from the same view; nothing is read for it then.
    if request.method != "HEAD":
        file.ready()
    response = _passed_through(file, stop - start, content_type, 206 if span else 200)
    response.headers["Accept-Ranges"] = "bytes"
    response.headers["Content-Disposition"] = f'attachment; filename="{filename}"'
    if span:
        response.headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return _tagged(response, etag)


def _passed_through(file: Pieces, size: int, content_type: str, status: int = 200) -> Response:
    """A reply that the HTTP server sends from the file itself."""
    wrapped = wrap_file(request.environ, file, READ_BYTES)  # type: ignore[arg-type]
    response = Response(wrapped, status, content_type=content_type, direct_passthrough=True)
    response.content_length = size
    return response


def _tagged(response: Response, etag: str) -> Response:
    response.set_etag(etag)
    # Others may not see it; the caller asks whether it is still there.
    response.headers["Cache-Control"] = "private, no-cache"
    return response


_ONE_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,18})-([0-9]{0,18})[ \t]*", re.IGNORECASE)


def _asked_range(size: int, etag: str) -> tuple[int, int] | None:
    """Start and stop of the one range asked for; None for the whole.

    Several ranges, foreign units and what is no range get the whole (RFC 9110, 14.2); a suffix longer than the file is
    all of it.
    """
    asked = _ONE_RANGE.fullmatch(request.headers.get("Range", ""))
    if asked is None or request.method != "GET":
        return None
    known = request.if_range
    if known is not None and (known.date is not None or (known.etag is not None and known.etag != etag)):
        return None
    if request.headers.get("If-Range", "").startswith("W/"):
        return None  # what the caller has a part of was compressed
    first, last = (int(digits) if digits else None for digits in asked.groups())
    if first is None:
        if last is None:
            return None
        first, last = max(0, size - last), size - 1
    elif last is not None and last < first:
        return None
    if first >= size:
        raise ApiError(
            416,
            f"The range lies outside the {size} bytes.",
            code="range_not_satisfiable",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return first, min(size, size if last is None else last + 1)
