"""What a server's answer means: parsed and checked, or as the exception that it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import orjson
import requests
from urllib3 import exceptions as transport

from .errors import (
    NeuroScopeAPIError,
    PayloadError,
    ResponseFormatError,
    ServerTimeoutError,
    ServerUnreachableError,
)
from .payload import decode_activation

READ_BYTES = 1 << 20
CHUNK_BYTES = 1 << 16
SNIPPET = 200  # characters of a foreign answer that an error quotes

Reply = dict[str, Any]


def parse(text: bytes | memoryview | str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def quoted(text: bytes | memoryview | str) -> str:
    """The beginning of a foreign answer, for an error message."""
    return repr(text[:SNIPPET] if isinstance(text, str) else bytes(text[:SNIPPET]).decode("utf-8", "replace"))


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


def read_body(response: requests.Response, source: str, timeout: float) -> bytes | memoryview:
    """A streamed answer's body; where its size is known, read into one buffer.

    Raises:
        ServerTimeoutError: nothing came for the client's `timeout`.
        ServerUnreachableError: the connection broke before the end.
        ResponseFormatError: it is not in the compression that its header names.
    """
    length = response.headers.get("Content-Length", "")
    with response:
        if not length.isdecimal() or "Content-Encoding" in response.headers:
            return b"".join(chunks(response, source, timeout))
        # Not a bytearray, which would be filled with zeros first.
        body, at = np.empty(int(length), np.uint8).data, 0
        with _named(source, timeout):
            while at < len(body) and (count := response.raw.readinto(body[at : at + READ_BYTES])):
                at += count
    if at < len(body):
        raise ServerUnreachableError(f"{source}: the connection broke after {at} of {len(body)} bytes.")
    return body


def chunks(response: requests.Response, source: str, timeout: float) -> Iterator[bytes]:
    """A streamed answer's body as it comes; raises as `read_body` does."""
    with _named(source, timeout):
        # Not iter_content: on a body without chunked encoding it waits for a full block.
        while chunk := response.raw.read1(CHUNK_BYTES, decode_content=True):
            yield chunk


@contextmanager
def _named(source: str, timeout: float) -> Iterator[None]:
    """What goes wrong with a connection, as this package's errors."""
    try:
        yield
    except transport.ReadTimeoutError as error:
        raise timed_out(source, timeout) from error
    except transport.DecodeError as error:
        raise undecodable(source, error) from error
    except (transport.HTTPError, OSError) as error:
        raise ServerUnreachableError(f"{source}: the connection broke in the middle of the answer.") from error


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
