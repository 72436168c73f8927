"""The application: ``create_app`` takes the worker, which is the expensive thing, and what to allow."""

import hmac
import time
from urllib.parse import urlsplit

from flask import Flask, Response, g, request
from werkzeug.routing import PathConverter

from . import compression, cors, errors, logs
from .captures import CaptureStore
from .config import ServerConfig
from .description import JOB_ID_HEADER, REQUEST_ID_HEADER
from .errors import ApiError
from .interpretability import UNPACKED, Interpretability
from .routes import BLUEPRINTS
from .schemas.fields import MODEL_PARTS
from .worker import ModelWorker

# Addresses that need no key: whether the server lives, and how to talk to it.
OPEN_ENDPOINTS = frozenset({"health.health", "description.openapi", "description.docs", "description.asset"})


def create_app(worker: ModelWorker, config: ServerConfig | None = None) -> Flask:
    """The WSGI application around a started worker. What it opens is closed with it, or by ``close_app``.

    >>> with ModelWorker() as worker:
    ...     create_app(worker).test_client().get("/health").json["status"]
    'healthy'
    """
    config = config or ServerConfig()
    app = Flask("api_server", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = config.max_body_bytes
    app.url_map.merge_slashes = False
    app.url_map.converters["model"] = _ModelId
    app.extensions["model_worker"] = worker
    app.extensions["server_config"] = config
    app.extensions["captures"] = CaptureStore(config.captures_dir, config.captures_max_bytes, config.captures_max_age)
    app.extensions["interpretability"] = Interpretability(
        worker, config.mechint, max_array_bytes=UNPACKED * config.max_body_bytes
    )
    app.extensions["job_endpoint"] = "jobs.get_job"
    errors.register(app)

    @app.before_request
    def admit() -> None:
        g.request_id, g.began = logs.request_id(request.headers.get(REQUEST_ID_HEADER, "")), time.perf_counter()
        _check_host(request.environ.get("HTTP_HOST", ""), config)
        g.host_admitted = True
        # A browser asks by OPTIONS what it may do before it sends the key; the answer tells nothing else.
        if config.api_key and request.method != "OPTIONS" and request.endpoint not in OPEN_ENDPOINTS:
            _check_key(request.headers.get("Authorization", ""), config.api_key)

    # What is registered first runs last: the log tells what was sent.
    @app.after_request
    def account(response: Response) -> Response:
        response.headers[REQUEST_ID_HEADER] = g.request_id
        if "job_id" in g:
            response.headers[JOB_ID_HEADER] = g.job_id
        # A page of another host shows nothing of an answer, and no browser guesses that JSON is a page.
        response.headers["X-Content-Type-Options"] = "nosniff"
        logs.account(response)
        return response

    compression.register(app, binary=config.compress_binary)
    cors.register(app, config.cors_origins)
    for blueprint in BLUEPRINTS:
        app.register_blueprint(blueprint)
    return app


class _ModelId(PathConverter):
    """A model's id as the end of an address, slashes included; what means something else there is none."""

    regex = rf"(?!load$)(?!.*/(?:{'|'.join(MODEL_PARTS)})$)[^/].*?"


def close_app(app: Flask) -> bool:
    """Let go of the folder of captures, of which a temporary one is removed, and leave the analyses that run.

    Answers whether these ended.
    """
    app.extensions["captures"].close()
    return bool(app.extensions["interpretability"].close())


def _check_host(header: str, config: ServerConfig) -> None:
    try:
        host = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        host = ""
    if not config.admits_host(host):
        further = "".join(f", {name}" for name in config.allowed_hosts)
        raise ApiError(
            403,
            f"Host {header[:100]!r} is refused: this server answers to localhost, 127.0.0.1, [::1]{further} only.",
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
