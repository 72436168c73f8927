"""An S3 service in the tests' own process, which fails where it is told to."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import requests
from botocore.loaders import create_loader
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "captures"


class _Silent(WSGIRequestHandler):
    def log(self, *args: Any) -> None:
        """Each request would be a line on the terminal."""


class S3Server:
    """Moto's S3 over HTTP on a free port of the loopback interface."""

    def __init__(self) -> None:
        self.fails: Callable[[str, str], bool] = lambda method, path: False
        """Which requests are answered with 503: by method and path."""
        self.requests: list[tuple[str, str]] = []
        """The method and path of each."""
        self._inner = DomainDispatcherApplication(create_backend_app)
        self.port = 0
        self.start()

    def start(self) -> None:
        """Answer requests, after ``stop`` at the same port again."""
        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True, request_handler=_Silent)
        self.port = self._server.port
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _answer(self, environ: dict[str, Any], start: Any) -> Any:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path))
        if self.fails(method, path):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        return self._inner(environ, start)

    def stop(self) -> None:
        """Refuse connections from now on; what is in the buckets stays."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@cache
def _loader(*arguments: Any) -> Any:
    return create_loader(*arguments)


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A service that the environment leads to, with an empty bucket."""
    server = S3Server()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "an-id",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nonexistent/config",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent/credentials",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    # Reading the description of S3 again for each client would be half of the tests' time.
    monkeypatch.setattr("botocore.session.create_loader", _loader)
    requests.post(f"{server.url}/moto-api/reset", timeout=10).raise_for_status()
    requests.put(f"{server.url}/{BUCKET}", timeout=10).raise_for_status()
    try:
        yield server
    finally:
        server.stop()
