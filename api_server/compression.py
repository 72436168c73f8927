"""Replies are compressed for those who ask by ``Accept-Encoding``: zstd, gzip or br.

JSON shrinks well. Activations in binary hardly do, so npy and safetensors are left alone unless the server was told
otherwise; then they are compressed as they are read. Events are sent as they come, and parts of a
download are parts of the bytes as they are.
"""

from flask import Flask, Response, request
from flask_compress import Compress

TEXT = ["application/json", "text/html", "text/css", "text/javascript"]
BINARY = ["application/x-npy", "application/x-safetensors"]
# Activations are megabytes: the fast levels cost a tenth of the time for a few percent of the size.
_LEVELS = {"COMPRESS_LEVEL": 1, "COMPRESS_ZSTD_LEVEL": 1, "COMPRESS_BR_LEVEL": 1}


def register(app: Flask, *, binary: bool) -> None:
    """Compress what ``app`` answers, activations in binary only if ``binary``."""
    app.config.update(
        COMPRESS_MIMETYPES=TEXT + (BINARY if binary else []),
        COMPRESS_ALGORITHM=["zstd", "gzip", "br"],
        COMPRESS_ALGORITHM_STREAMING=["zstd", "gzip", "br"],
        COMPRESS_REGISTER=False,
        COMPRESS_EVALUATE_CONDITIONAL_REQUEST=False,
        **_LEVELS,
    )
    compress = Compress(app)

    @app.after_request
    def compressed(response: Response) -> Response:
        if response.status_code != 200 or request.method == "HEAD":
            return response
        etag, _ = response.get_etag()
        response = compress.after_request(response)
        if etag and "Content-Encoding" in response.headers:
            # The same numbers in other bytes: the tag still says whether they are known, but parts do not fit together.
            response.set_etag(etag, weak=True)
            response.headers.pop("Accept-Ranges", None)
        return response
