"""What can go wrong between a client and the server; everything derives from `NeuroScopeError`."""

from __future__ import annotations

from typing import Any


class NeuroScopeError(Exception):
    """Base of every error that `neuroscope_bridge` raises about a server or its data."""


class PayloadError(NeuroScopeError, ValueError):
    """An array or a record does not fit the wire format; the message says what was expected and what came."""


class NumberTooLargeError(PayloadError):
    """A finite number would become infinite in the dtype that was asked for."""


class ResponseFormatError(NeuroScopeError):
    """The server answered something that is not the JSON this client understands."""


class ServerUnreachableError(NeuroScopeError):
    """No server answers at the URL, or it went away in the middle of an answer."""


class ServerTimeoutError(NeuroScopeError):
    """The server accepted the request and then sent nothing for `timeout` seconds."""


class NeuroScopeAPIError(NeuroScopeError):
    """The server refused the request, and said why.

        try:
            client.generate_with_activations(messages, hooks)
        except NeuroScopeAPIError as error:
            if error.status == 409:      # no model loaded
                client.load_model("neuroscope-tiny")

    Args:
        message: The server's sentence.
        status: HTTP status: 400 bad request, 404 not found, 405 wrong method, 409 no model loaded, 413 too
            large, 500 server fault, 503 busy. None when the error came inside a stream that had started well.
        type: `invalid_request_error` or `server_error`.
        code: Machine-readable cause such as `no_model_loaded`, or None.
        param: Name of the request field at fault, or None.
        body: The whole answer, parsed where it was JSON, else text.
        request_id: What the server's log calls the request, or None.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        type: str | None = None,
        code: str | None = None,
        param: str | None = None,
        body: Any = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.type = type
        self.code = code
        self.param = param
        self.body = body
        self.request_id = request_id

    def __str__(self) -> str:
        return self.message if self.status is None else f"{self.message} (HTTP {self.status})"
