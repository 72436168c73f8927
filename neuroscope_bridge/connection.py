"""The connection under the client: requests to one server, and what can go wrong with them."""

from __future__ import annotations

import ipaddress
from types import TracebackType
from typing import IO, Any, TypeVar
from urllib.parse import SplitResult, urlsplit

import requests
from requests.auth import AuthBase
from urllib3 import exceptions as transport

from .errors import ResponseFormatError, ServerUnreachableError
from .payload import dumps
from .replies import Reply, api_error, caused_by, expect, innermost, parse, quoted, read_body, timed_out, undecodable

Self = TypeVar("Self", bound="Connection")

DEFAULT_BASE_URL = "http://127.0.0.1:8080"
DEFAULT_TIMEOUT = 600.0
CONNECT_TIMEOUT = 10.0
MAX_TIMEOUT = 1_000_000.0  # eleven days; from some point on a socket refuses a longer one


class Connection:
    """A kept-open connection to a NeuroScope server, that speaks JSON. For one thread.

    Arguments and errors are those of `LMStudioNeuroScopeClient`.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_BASE_URL,
        timeout: float = DEFAULT_TIMEOUT,
        api_key: str | None = None,
        compress: bool = False,
    ) -> None:
        parts = _server_address(base_url)
        if not isinstance(timeout, int | float) or isinstance(timeout, bool) or not 0 < timeout <= MAX_TIMEOUT:
            raise ValueError(f"timeout must be seconds above 0 and at most {MAX_TIMEOUT:.0f}, got {timeout!r}.")
        if api_key is not None and not (
            api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""
        ):
            raise ValueError("api_key must be printable ASCII without spaces around it.")  # and never quoted
        self.base_url = base_url.rstrip("/")
        self.timeout = timeout
        self._session = requests.Session()
        self._session.headers.update({"Content-Type": "application/json", "Accept": "application/json"})
        if not compress:
            self._session.headers["Accept-Encoding"] = "identity"
        # Proxies of the environment are for the world outside; a loopback server is never behind one.
        self._session.trust_env = not _is_loopback(parts.hostname or "")
        self._session.auth = _Bearer(api_key)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(base_url={self.base_url!r}, timeout={self.timeout!r})"

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that are kept open; a later call opens new ones."""
        self._session.close()

    def _field(
        self,
        method: str,
        route: str,
        name: str,
        kind: type,
        body: Reply | None = None,
        params: Reply | None = None,
    ) -> Any:
        return expect(self._json(method, route, body, params), name, kind, f"{method} {route}")

    def _json(self, method: str, route: str, body: Reply | None = None, params: Reply | None = None) -> Reply:
        return self._object(self._send(method, route, body, params).content, f"{method} {route}")

    def _large_json(self, method: str, route: str, body: Reply | None = None, params: Reply | None = None) -> Reply:
        """The same, several times faster for megabytes."""
        source = f"{method} {route}"
        response = self._send(method, route, body, params, stream=True, accept="application/json")
        return self._object(read_body(response, source, self.timeout), source)

    def _form(self, route: str, fields: Reply, file: tuple[str, bytes | IO[bytes]]) -> Reply:
        """The reply to a form: texts by name, None left out, and a file, `(name, content)`."""
        texts = [(name, (None, text)) for name, text in fields.items() if text is not None]
        source = f"POST {route}"
        response = self._send("POST", route, stream=True, accept="application/json", form=[("file", file), *texts])
        return self._object(read_body(response, source, self.timeout), source)

    def _object(self, text: bytes | memoryview, source: str) -> Reply:
        reply = parse(text)
        if not isinstance(reply, dict):
            raise ResponseFormatError(
                f"{source}: expected a JSON object, got {quoted(text)}. Is {self.base_url} a NeuroScope server?"
            )
        return reply

    def _send(
        self,
        method: str,
        route: str,
        body: Reply | None = None,
        params: Reply | None = None,
        stream: bool = False,
        accept: str = "text/event-stream",
        form: list[Any] | None = None,
    ) -> requests.Response:
        data = None if body is None else dumps({name: value for name, value in body.items() if value is not None})
        headers: dict[str, Any] = {"Accept": accept} if stream else {}
        if form is not None:
            # A form's content type names where its parts end; requests writes it.
            headers["Content-Type"] = None
        try:
            response = self._session.request(
                method,
                self.base_url + route,
                params=params,
                data=data,
                files=form,
                headers=headers,
                timeout=(min(CONNECT_TIMEOUT, self.timeout), self.timeout),
                allow_redirects=False,
                stream=stream,
            )
        except requests.ConnectTimeout as error:
            raise self._unreachable("it does not accept connections") from error
        except requests.Timeout as error:
            raise timed_out(f"{method} {route}", self.timeout) from error
        except requests.exceptions.ContentDecodingError as error:
            raise undecodable(f"{method} {route}", error) from error
        except requests.RequestException as error:
            # A read timeout in the middle of a body arrives as a ConnectionError.
            if caused_by(error, transport.ReadTimeoutError):
                raise timed_out(f"{method} {route}", self.timeout) from error
            if caused_by(error, transport.ProtocolError):
                raise ServerUnreachableError(
                    f"The server at {self.base_url} closed the connection before it answered {method} {route}."
                ) from error
            raise self._unreachable(innermost(error)) from error
        if response.status_code >= 300:
            with response:
                raise api_error(response, f"{method} {route}")
        return response

    def _unreachable(self, reason: str) -> ServerUnreachableError:
        return ServerUnreachableError(
            f"No NeuroScope server answers at {self.base_url} ({reason}). Start one with `neuroscope serve`."
        )


class _Bearer(AuthBase):
    """The api key as a header, and nothing where there is none; .netrc must supply no other."""

    def __init__(self, api_key: str | None) -> None:
        self._api_key = api_key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._api_key is not None:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        return request


def _server_address(base_url: str) -> SplitResult:
    try:
        parts = urlsplit(base_url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False  # a port beyond 65535, or half an IPv6 address
    if not fits:
        got = "one with '@' in it" if "@" in base_url else repr(base_url)  # a password is never quoted
        raise ValueError(f"base_url must look like {DEFAULT_BASE_URL}, with a port from 1 to 65535, got {got}.")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError("base_url must hold neither user, query nor fragment; give a key as api_key.")
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
