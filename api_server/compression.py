"""Replies are compressed for those who ask by ``Accept-Encoding``: zstd, gzip or br.

JSON shrinks well. Activations in binary hardly do, so npy and safetensors are left alone unless the server was told
otherwise; then they are compressed as they are read. Events are sent as they come, and parts of a download are parts of
the bytes as they are. HEAD of a download tells of these too: how long it would be when compressed nobody knows.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from flask import Flask, Response, request
from flask_compress import Compress

TEXT = ["application/json", "text/html", "text/css", "text/javascript"]
BINARY = ["application/x-npy", "application/x-safetensors"]
ENCODINGS = ("zstd", "gzip", "br")
# Activations are megabytes: the fast levels cost a tenth of the time for a few percent of the size.
_LEVELS = {"COMPRESS_LEVEL": 1, "COMPRESS_ZSTD_LEVEL": 1, "COMPRESS_BR_LEVEL": 1}


def wanted_encoding() -> str | None:
    """The encoding that this request's ``Accept-Encoding`` likes best, ours first among equals; None for none."""
    accepted = request.accept_encodings
    best = max(ENCODINGS, key=accepted.quality)
    # A * speaks of what is not named; who says nothing of identity likes it least.
    identity = max((quality for name, quality in accepted if name.lower() == "identity"), default=0.0)
    return best if accepted.quality(best) > 0 and accepted.quality(best) >= identity else None


def register(app: Flask, *, binary: bool) -> None:
    """Compress what ``app`` answers, activations in binary only if ``binary``."""
    app.config.update(
        COMPRESS_MIMETYPES=TEXT + (BINARY if binary else []),
        COMPRESS_ALGORITHM=ENCODINGS,
        COMPRESS_ALGORITHM_STREAMING=ENCODINGS,
        COMPRESS_REGISTER=False,
        COMPRESS_EVALUATE_CONDITIONAL_REQUEST=False,
        **_LEVELS,
    )
    compress = Compress(app)

    @app.after_request
    def compressed(response: Response) -> Response:
        if response.status_code in (200, 206, 304):
            response.vary.add("Accept-Encoding")
        wanted = wanted_encoding()
        is_file = response.direct_passthrough
        if wanted is None or response.status_code != 200 or (is_file and request.method == "HEAD"):
            return response
        if is_file and response.mimetype in app.config["COMPRESS_MIMETYPES"]:
            # The HTTP server's own wrapper has a length, and would be read to its end before the first byte leaves.
            _stream(response)
        etag, _ = response.get_etag()
        # It reads the header itself, and takes q=0 for a wish.
        asked = request.environ["HTTP_ACCEPT_ENCODING"]
        request.environ["HTTP_ACCEPT_ENCODING"] = wanted
        try:
            response = compress.after_request(response)
        finally:
            request.environ["HTTP_ACCEPT_ENCODING"] = asked
        if etag and "Content-Encoding" in response.headers:
            # The same numbers in other bytes: the tag still says whether they are known, but parts do not fit together.
            response.set_etag(etag, weak=True)
            response.headers.pop("Accept-Ranges", None)
        return response


def _stream(response: Response) -> None:
    """Make of a reply that is a file one that is read as it is sent."""
    file = response.response
    if hasattr(file, "close"):
        response.call_on_close(file.close)
    response.response = _chunks(file)


def _chunks(file: Iterable[Any]) -> Iterator[Any]:
    yield from file
