"""Every error that leaves the server, in one shape: ``{"error": {"message", "type", "code", "param", "request_id"}}``.

Views and the worker raise; only this module renders. ``describe`` knows nothing of Flask, so an event stream that
breaks after its first event sends the same object.
"""

import json
import logging
from typing import Any

from flask import Flask, Response, g
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound

from mlx_hooks import HookError, UnknownHookError
from neuroscope_bridge import payload

from .schemas.fields import supported

log = logging.getLogger("api_server")

RETRY_AFTER_SECONDS = 1


class ApiError(Exception):
    """A request that is answered with an error.

    >>> raise ApiError(404, "Unknown model 'x'. Loaded: tiny.", code="model_not_found", param="model")

    Args:
        status: the HTTP status.
        message: one sentence with what was got and what is allowed.
        code: a short name that programs can compare.
        param: the field that is at fault, such as ``activation_hooks[0].component``.
        headers: further headers of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = headers or {}

    def body(self, request_id: str | None) -> dict[str, Any]:
        """The reply's JSON object."""
        return error_body(self.status, self.message, self.code, self.param, request_id)


class UnknownModel(ApiError):
    """A model id that is not loaded; the message lists those that are."""

    def __init__(self, model_id: str, loaded: list[str]) -> None:
        known = f"Loaded: {', '.join(loaded)}." if loaded else "None is loaded: POST /v1/models/load first."
        super().__init__(404, f"Unknown model {model_id!r}. {known}", code="model_not_found", param="model")


class UnknownHook(ApiError):
    """A hook id that is not registered; the message lists those that are."""

    def __init__(self, hook_id: str, registered: list[str]) -> None:
        known = f"Registered: {', '.join(registered)}." if registered else "None is registered."
        super().__init__(404, f"Unknown hook {hook_id!r}. {known}", code="hook_not_found", param="hook_id")


class UnknownCapture(ApiError):
    """A capture id that the store does not have; the message lists the newest that it has."""

    def __init__(self, capture_id: str, kept: list[str], shown: int = 10) -> None:
        more = f" and {len(kept) - shown} more" if len(kept) > shown else ""
        known = f"Kept: {', '.join(kept[:shown])}{more}." if kept else "None is kept: send keep_capture with a request."
        message = f"Unknown capture {capture_id[:100]!r}. {known}"
        super().__init__(404, message, code="capture_not_found", param="capture_id")


class CaptureTooLarge(ApiError):
    """A capture larger than all that the store may hold."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            413,
            f"The capture is larger than this server keeps: {limit} bytes ({limit / 2**20:.4g} MiB). "
            "Capture fewer hook points, positions or heads, or reduce them.",
            code="capture_too_large",
        )


class CapturesBusy(ApiError):
    """Captures that are being written take all the room there is."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            503,
            f"Captures that are being written fill this server's {limit} bytes. Try again later.",
            code="captures_busy",
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
        )


class CapturesUnwritable(ApiError):
    """The disk has no room for activations, or refuses them."""

    def __init__(self, reason: str) -> None:
        super().__init__(507, f"The activations could not be written to disk: {reason}.", code="captures_unwritable")


class NoModelLoaded(ApiError):
    """A request that needs a model before one was loaded."""

    def __init__(self, to_load: str = "Load one with POST /v1/models/load") -> None:
        super().__init__(409, f"No model is loaded. {to_load}.", code="no_model_loaded", param="model")


class Busy(ApiError):
    """The queue is full, or as much is under way as may be."""

    def __init__(self, count: int, what: str = "requests are waiting") -> None:
        super().__init__(
            503,
            f"The server is busy: {count} {what}. Try again after {RETRY_AFTER_SECONDS} s.",
            code="busy",
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)},
        )


class BodyTooLarge(ApiError):
    """A request body over the server's limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(
            413,
            f"The request's body is larger than this server reads: {limit} bytes ({limit / 2**20:.4g} MiB).",
            code="request_too_large",
        )


class Stopping(ApiError):
    """The server is going down; running work is cancelled, waiting work is not begun."""

    def __init__(self) -> None:
        super().__init__(
            503, "The server is stopping.", code="stopping", headers={"Retry-After": str(RETRY_AFTER_SECONDS)}
        )


class Cancelled(ApiError):
    """Work that was given up: its reader went away, or somebody asked for it."""

    def __init__(self, message: str) -> None:
        super().__init__(409, message, code="cancelled")


class UnknownJob(ApiError):
    """A job id that nobody remembers."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            404,
            f"Unknown job {job_id!r}. GET /v1/jobs lists those that run or ended a while ago.",
            code="job_not_found",
            param="job_id",
        )


class NoRoomForModel(ApiError):
    """A model that would exceed the memory for models, even with all idle ones unloaded."""

    def __init__(self, needed: int, limit: int, in_use: int) -> None:
        why = (
            f"{in_use} bytes are in use by running requests and loads: try again later"
            if in_use
            else "choose a smaller one"
        )
        super().__init__(
            503 if in_use else 400,
            f"The model needs {needed} bytes; models may take {limit} ({limit / 2**30:.4g} GiB) in all: {why}.",
            code="no_room_for_model",
            param="model_path",
            headers={"Retry-After": str(RETRY_AFTER_SECONDS)} if in_use else None,
        )


def error_body(
    status: int, message: str, code: str, param: str | None = None, request_id: str | None = None
) -> dict[str, Any]:
    """The one error shape; ``type`` follows from the status."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "code": code, "param": param, "request_id": request_id}}


def describe(error: BaseException, request_id: str) -> ApiError:
    """The ``ApiError`` that any exception is answered with; an unexpected one is logged under ``request_id``."""
    known = shown(error, request_id)
    if known.code == "internal_error":
        log.error("request %s failed", request_id, exc_info=error, extra={"request_id": request_id})
    return known


def shown(error: BaseException, request_id: str) -> ApiError:
    """The same, and nothing is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, HookError):
        return _of_hook(error)
    if isinstance(error, MemoryError):
        message = "This takes more memory than the server has: ask for less, or try again later."
        return ApiError(503, message, code="out_of_memory", headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
    return ApiError(500, f"Internal error. The server's log describes it under {request_id}.", code="internal_error")


def _of_hook(error: HookError) -> ApiError:
    if error.intervention is None:
        return ApiError(400, str(error), code="invalid_value", param=error.field)
    code = "unknown_hook" if isinstance(error, UnknownHookError) else "invalid_intervention"
    return ApiError(400, str(error), code=code, param=f"interventions[{error.intervention}]")


def _of_http(error: HTTPException) -> ApiError:
    status = error.code or 500
    # Werkzeug's own headers name a content type and length that are not ours; of the rest, Allow must stay.
    headers = {k: v for k, v in error.get_headers() if k.lower() not in ("content-type", "content-length")}
    message, code = error.description or error.name, error.name.lower().replace(" ", "_")
    if isinstance(error, NotFound):
        message = "There is no such address. GET /health, GET /v1/models and POST /v1/models/load are places to start."
    elif isinstance(error, MethodNotAllowed):
        message = f"This address does not accept that method. Allowed: {headers.get('Allow', 'none')}."
    return ApiError(status, message, code=code, headers=headers)


def invalid_request(error: ValidationError, model: type[BaseModel], part: str = "Field") -> ApiError:
    """The reply to what does not fit ``model``: the first fault, named, with what is allowed.

    Args:
        error: what pydantic found.
        model: what was wanted.
        part: what a field is called: "Query parameter" where it is one.
    """
    fault = error.errors(include_url=False)[0]
    kind, loc = fault["type"], fault["loc"]
    if kind == "json_invalid":
        return ApiError(400, f"The body is not valid JSON: {fault['msg'].split(': ', 1)[-1]}.", code="invalid_json")
    param = _spell(loc)
    if kind == "extra_forbidden":
        known = ", ".join(supported(_model_at(model, loc))) or "none"
        message = f"{part} {param!r} is not supported here. Supported: {known}."
    elif kind == "missing":
        message = f"{part} {param!r} is required."
    elif kind == "model_type" and not param:
        message = "The body must be a JSON object."
    elif not param:
        message = f"{fault['msg']}."
    else:
        message = f"{part} {param!r} {_wanted(fault)}."
    # A check of several fields may name one.
    return ApiError(400, message, code="invalid_value", param=param or fault.get("ctx", {}).get("param"))


def _spell(loc: tuple[int | str, ...]) -> str:
    """``("hooks", 0, "component")`` -> ``hooks[0].component``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _model_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The model whose field the last part of ``loc`` is."""
    for part in loc[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            model = next(_models_in(model.model_fields[part].annotation), model)
    return model


def _models_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _wanted(fault: Any) -> str:
    """``must be a valid integer, not "5"``"""
    bounds = {"too_short": ("at least", "min_length"), "too_long": ("at most", "max_length")}
    kind = fault["type"].removeprefix("string_")
    if kind in bounds:
        word, key = bounds[kind]
        unit, count = "character" if fault["type"].startswith("string_") else "item", fault["ctx"][key]
        return f"must have {word} {count} {unit}{'' if count == 1 else 's'}"
    said = fault["msg"].replace("Input should be", "must be")
    return (said if said.startswith("must be") else f"is refused: {said}") + _got(fault["input"])


def _got(value: Any) -> str:
    """What was sent, if it is short enough to repeat."""
    if isinstance(value, dict | list):
        return ""
    # Not the wire's writer: it has no NaN and no integer beyond 64 bits, and this is where they are refused.
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | int | float | None) else repr(value)
    return f", not {text}" if len(text) <= 40 else ""


def json_reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A strict-JSON reply: no NaN, no Infinity."""
    return Response(payload.dumps(body), status, headers, mimetype="application/json")


def register(app: Flask) -> None:
    """Render every exception of ``app`` in the one shape."""

    @app.errorhandler(Exception)
    def render(error: Exception) -> Response:
        known = describe(error, g.request_id)
        return json_reply(known.body(g.request_id), known.status, known.headers)
