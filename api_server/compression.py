"""Replies are compressed for those who ask by ``Accept-Encoding``: zstd, gzip or br.

JSON shrinks well. Activations in binary hardly do, so npy and safetensors are left alone unless the server was told
otherwise. Events are sent as they come. Whoever sends a range or an ETag means the bytes as they are, so conditional
and partial replies are never compressed.
"""

from flask import Flask, Response
from flask_compress import Compress

TEXT = ["application/json", "text/html", "text/css", "text/javascript"]
BINARY = ["application/x-npy", "application/x-safetensors", "application/octet-stream"]
# Activations are megabytes: the fast levels cost a tenth of the time for a few percent of the size.
_LEVELS = {"COMPRESS_LEVEL": 1, "COMPRESS_ZSTD_LEVEL": 1, "COMPRESS_BR_LEVEL": 1}


def register(app: Flask, *, binary: bool) -> None:
    """Compress what ``app`` answers, activations in binary only if ``binary``."""
    app.config.update(
        COMPRESS_MIMETYPES=TEXT + (BINARY if binary else []),
        COMPRESS_ALGORITHM=["zstd", "gzip", "br"],
        COMPRESS_STREAMS=False,
        COMPRESS_REGISTER=False,
        COMPRESS_EVALUATE_CONDITIONAL_REQUEST=False,
        **_LEVELS,
    )
    compress = Compress(app)

    @app.after_request
    def compressed(response: Response) -> Response:
        whole = response.status_code == 200 and not {"ETag", "Content-Range"} & set(response.headers.keys())
        return compress.after_request(response) if whole else response
