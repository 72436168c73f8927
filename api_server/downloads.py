"""Replies of raw bytes: large ones, sent from where they lie, whole or in parts, and not again if they are known."""

import hashlib
import tempfile
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from flask import Response, request
from werkzeug.wsgi import wrap_file

from neuroscope_bridge import payload

from .errors import ApiError

Buffer = bytes | memoryview

IN_MEMORY_BYTES = 2**20
"""A JSON reply up to this size goes through memory."""
READ_BYTES = 2**20


class Pieces:
    """Buffers one after the other as a file to read: what the server sends comes from the buffers' own memory.

    >>> file = Pieces([b"abc", b"", b"defg"], 1, 6)
    >>> bytes(file.read(4)), bytes(file.read(4)), bytes(file.read(4))
    (b'bc', b'def', b'')
    """

    def __init__(self, buffers: Sequence[Buffer], start: int = 0, stop: int | None = None) -> None:
        self._buffers = [memoryview(buffer) for buffer in buffers if len(buffer)]
        self._ends = list(accumulate(len(buffer) for buffer in self._buffers))
        self._start = start
        self._stop = stop if stop is not None else (self._ends or [0])[-1]
        self._at = start

    def read(self, size: int = -1) -> memoryview:
        """At most ``size`` bytes, of one buffer; none at the end."""
        left = self._stop - self._at
        size = left if size < 0 else min(size, left)
        if size <= 0:
            return memoryview(b"")
        number = bisect_right(self._ends, self._at)
        buffer = self._buffers[number]
        offset = self._at - (self._ends[number] - len(buffer))
        part = buffer[offset : offset + size]
        self._at += len(part)
        return part

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of a file; positions count from where this one starts."""
        self._at = offset + (self._start, self._at, self._stop)[whence]
        return self.tell()

    def tell(self) -> int:
        return self._at - self._start

    def close(self) -> None:
        """Let the buffers go, and the files that they are views of."""
        self._buffers, self._ends, self._stop = [], [], self._at


def entity_tag(*parts: object) -> str:
    """A strong ETag of what always gives the same bytes."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def large_json(body: object) -> Response:
    """A JSON reply that may be megabytes long.

    The HTTP server would copy such a body to a file bit by bit and read it back, many times over where the reader is
    slower than the file. Here it is one mapped file, of which the socket takes what it can; no memory waits with it.
    """
    text = payload.dumps(body)
    wants_less = any(request.accept_encodings[name] > 0 for name in ("gzip", "zstd", "br"))
    if len(text) <= IN_MEMORY_BYTES or wants_less:
        return Response(text, mimetype="application/json")
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, np.uint8, "w+", shape=len(text))
    mapped[:] = np.frombuffer(text, np.uint8)
    return _passed_through(Pieces([mapped.data]), len(text), "application/json")


def is_known(etag: str) -> bool:
    """Whether the caller has this already (``If-None-Match``)."""
    return request.if_none_match.contains_weak(etag)


def not_modified(etag: str) -> Response:
    """304."""
    return _tagged(Response(status=304), etag)


def tagged_json(body: object, etag: str) -> Response:
    """A JSON reply that need not be sent again."""
    return _tagged(large_json(body), etag)


def download(buffers: Sequence[Buffer], content_type: str, filename: str, etag: str) -> Response:
    """Buffers as a file, or the part of it that ``Range`` asks for.

    Args:
        buffers: one after the other.
        content_type: what they are.
        filename: what a browser calls it; plain letters, digits, dots, ``_`` and ``-``.
        etag: from ``entity_tag``.

    Raises:
        ApiError: 416 for a range that lies outside.
    """
    size = sum(len(buffer) for buffer in buffers)
    start, stop = _asked_range(size, etag) or (0, size)
    is_part = (start, stop) != (0, size) or _asked_range(size, etag) is not None
    response = _passed_through(Pieces(buffers, start, stop), stop - start, content_type, 206 if is_part else 200)
    response.headers["Accept-Ranges"] = "bytes"
    response.headers["Content-Disposition"] = f'attachment; filename="{filename}"'
    if is_part:
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


def _asked_range(size: int, etag: str) -> tuple[int, int] | None:
    """Start and stop of the one range asked for; None for the whole, which several ranges and foreign units get too."""
    asked = request.range
    if asked is None or asked.units != "bytes" or len(asked.ranges) != 1:
        return None
    known = request.if_range
    if known is not None and (known.date is not None or (known.etag is not None and known.etag != etag)):
        return None
    if request.headers.get("If-Range", "").startswith("W/"):
        return None  # what the caller has a part of was compressed
    span = asked.range_for_length(size)
    if span is None:
        raise ApiError(
            416,
            f"The range lies outside the {size} bytes.",
            code="range_not_satisfiable",
            headers={"Content-Range": f"bytes */{size}"},
        )
    return span
