"""The application: ``create_app`` takes the worker, which is the expensive thing, and what to allow."""

import hmac
import ipaddress
import logging
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from flask import Flask, Response, g, request
from werkzeug.routing import PathConverter

from . import errors
from .captures import CaptureStore
from .errors import ApiError
from .routes import BLUEPRINTS
from .schemas.requests import MODEL_PARTS
from .worker import ModelWorker

log = logging.getLogger("api_server.access")


@dataclass(frozen=True)
class ServerConfig:
    """What the server allows.

    Args:
        host: the address it listens on. On a loopback address only requests that name a loopback host are answered,
            so that a page in a browser cannot reach the server under a name of its own (DNS rebinding).
        port: 0 lets the system choose.
        api_key: if set, every address but ``/health`` wants ``Authorization: Bearer``.
        max_body_bytes: the largest request body.
        max_queued: how many requests may wait for the worker; one more is answered 503.
        max_active: how many requests run at a time, token by token in turn.
        max_model_bytes: how many bytes of weights may be loaded; None for no limit.
        grace_seconds: how long running requests may go on once the server was asked to stop.
        max_reply_bytes: the most bytes of activations, before encoding, in a JSON reply or stream; a larger run is
            kept as a capture, and the reply says how to fetch it.
        captures_dir: where captures are kept, and found again at the next start; a temporary folder if None.
        captures_max_bytes: how many bytes on disk captures may take; those unused for longest make room.
        captures_max_age: seconds after which a capture that nobody reads is deleted.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    max_body_bytes: int = 32 * 2**20
    max_queued: int = 64
    max_active: int = 4
    max_model_bytes: int | None = None
    grace_seconds: float = 5.0
    max_reply_bytes: int = 64 * 2**20
    captures_dir: Path | None = None
    captures_max_bytes: int = 4 * 2**30
    captures_max_age: float = 3600.0

    @property
    def is_local(self) -> bool:
        return is_loopback(self.host)


def create_app(worker: ModelWorker, config: ServerConfig | None = None) -> Flask:
    """The WSGI application around a started worker. What it opens is closed with it, or by ``close_app``.

    >>> with ModelWorker() as worker:
    ...     create_app(worker).test_client().get("/health").json["status"]
    'healthy'
    """
    config = config or ServerConfig()
    app = Flask("api_server", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = config.max_body_bytes
    app.config["API_KEY"] = config.api_key
    app.url_map.merge_slashes = False
    app.url_map.converters["model"] = _ModelId
    app.config["MAX_REPLY_BYTES"] = config.max_reply_bytes
    app.extensions["model_worker"] = worker
    app.extensions["captures"] = CaptureStore(config.captures_dir, config.captures_max_bytes, config.captures_max_age)
    errors.register(app)

    @app.before_request
    def admit() -> None:
        g.request_id, g.began = f"req-{uuid.uuid4().hex}", time.perf_counter()
        if config.is_local:
            _check_host(request.environ.get("HTTP_HOST", ""))
        if config.api_key and request.path != "/health":
            _check_key(request.headers.get("Authorization", ""), config.api_key)

    @app.after_request
    def account(response: Response) -> Response:
        response.headers["X-Request-Id"] = g.request_id
        if "job_id" in g:
            response.headers["X-Job-Id"] = g.job_id
        took = 1000 * (time.perf_counter() - g.began)
        log.info("%s %s %r %d %.0f ms", g.request_id, request.method, request.path, response.status_code, took)
        return response

    for blueprint in BLUEPRINTS:
        app.register_blueprint(blueprint)
    return app


def close_app(app: Flask) -> None:
    """Let go of the folder of captures; a temporary one is removed."""
    app.extensions["captures"].close()


class _ModelId(PathConverter):
    """A model's id as the end of an address, slashes included; what means something else there is none."""

    regex = rf"(?!load$)(?!.*/(?:{'|'.join(MODEL_PARTS)})$)[^/].*?"


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only: ``is_loopback("127.0.0.1")``."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_host(header: str) -> None:
    try:
        host = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        host = ""
    if not is_loopback(host):
        raise ApiError(
            403,
            f"Host {header[:100]!r} is refused: this server answers to localhost, 127.0.0.1 and [::1] only.",
            code="host_not_allowed",
        )


def _check_key(header: str, api_key: str) -> None:
    scheme, _, key = header.partition(" ")
    given = key.strip() if scheme.lower() == "bearer" else ""
    if not hmac.compare_digest(given.encode(), api_key.encode()):
        raise ApiError(
            401,
            "An API key is needed: send 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
