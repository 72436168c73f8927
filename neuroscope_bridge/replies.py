"""What a server's answer means: parsed and checked, or as the exception that it stands for."""

from __future__ import annotations

from typing import Any

import orjson
import requests

from .errors import NeuroScopeAPIError, PayloadError, ResponseFormatError, ServerTimeoutError
from .payload import decode_activation

SNIPPET = 200  # characters of a foreign answer that an error quotes

Reply = dict[str, Any]


def parse(text: bytes | str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def quoted(text: bytes | str) -> str:
    """The beginning of a foreign answer, for an error message."""
    return repr(text[:SNIPPET].decode("utf-8", "replace") if isinstance(text, bytes) else text[:SNIPPET])


def expect(reply: Any, name: str, kind: type, source: str) -> Any:
    value = reply.get(name) if isinstance(reply, dict) else None
    if not isinstance(value, kind):
        got = quoted(repr(value)) if value is not None else "nothing"
        raise ResponseFormatError(f"{source}: expected {name!r} to be a {kind.__name__}, got {got}.")
    return value


def with_arrays(reply: Reply, source: str) -> Reply:
    """Decode `data` of every activation record in place; a reply without activations stays as it is."""
    activations = reply.get("activations")
    if activations is None:
        return reply
    try:
        for records in activations.values():
            for record in records:
                if record.get("encoding") != "none":
                    record["data"] = decode_activation(record)
    except (PayloadError, AttributeError, TypeError) as error:
        raise ResponseFormatError(f"{source}: damaged activations: {error}") from error
    return reply


def api_error(response: requests.Response, source: str) -> NeuroScopeAPIError:
    try:
        content = response.content
    except requests.RequestException:
        content = b""
    body = parse(content)
    if isinstance(body, dict) and "error" in body:
        return error_of(body, response.status_code, source)
    said = f": {quoted(content)}" if content else ""
    return NeuroScopeAPIError(
        f"{source}: {response.reason}{said}", response.status_code, body=content.decode("utf-8", "replace")
    )


def error_of(body: Reply, status: int | None, source: str) -> NeuroScopeAPIError:
    error = body["error"]
    if not isinstance(error, dict):
        return NeuroScopeAPIError(f"{source}: {error}", status, body=body)
    message = error.get("message") or "the server gave no reason"
    return NeuroScopeAPIError(
        message, status, error.get("type"), error.get("code"), error.get("param"), body, error.get("request_id")
    )


def timed_out(source: str, timeout: float) -> ServerTimeoutError:
    return ServerTimeoutError(
        f"{source}: nothing came for {timeout:g} s. Give the client a longer timeout, or stream the reply."
    )


def undecodable(source: str, error: Exception) -> ResponseFormatError:
    return ResponseFormatError(f"{source}: the answer is not in the compression that its header names: {error}")


def caused_by(error: BaseException, kind: type[BaseException]) -> bool:
    return any(isinstance(item, kind) for item in (error, *error.args)) or (
        error.__context__ is not None and caused_by(error.__context__, kind)
    )


def innermost(error: BaseException) -> str:
    """The root cause in the system's words, "Connection refused", without urllib3's nesting."""
    while error.__context__ is not None:
        error = error.__context__
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
