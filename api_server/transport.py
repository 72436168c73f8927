"""What every view needs from HTTP: the body as a checked request, the worker, whether the caller is still there."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar, cast

from flask import Response, current_app, g, request, url_for
from pydantic import BaseModel, ValidationError
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import RequestEntityTooLarge

from mlx_hooks import HookedModel
from neuroscope_bridge import payload

from .aside import Report
from .captures import CaptureStore
from .config import ServerConfig
from .downloads import large_json
from .errors import ApiError, BodyTooLarge, describe, invalid_request, json_reply
from .interpretability import Interpretability
from .jobs import Job
from .models import LoadedModel
from .schemas.analysis import TraitsRequest
from .schemas.fields import DEFAULT_MAX_TOKENS, supported
from .schemas.queries import NoQuery
from .schemas.requests import CaptureRequest, GenerationRequest, RegisterHooksRequest
from .worker import ModelWorker

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


def worker() -> ModelWorker:
    """The worker that ``create_app`` was given."""
    return cast(ModelWorker, _part("model_worker"))


def captures() -> CaptureStore:
    """Where captures are kept."""
    return cast(CaptureStore, _part("captures"))


def config() -> ServerConfig:
    """What ``create_app`` was told to allow."""
    return cast(ServerConfig, _part("server_config"))


def interpretability() -> Interpretability:
    """What analyses of captured activations work with."""
    return cast(Interpretability, _part("interpretability"))


def _part(name: str) -> Any:
    """Of the application; a blueprint that serves in another one brings its own."""
    return g.get("neuroscope_parts", current_app.extensions)[name]


def read(model: type[M]) -> M:
    """The request's body as ``model``; an address that takes a body takes no query parameters.

    Raises:
        ApiError: 415 for another content type than JSON, 413 for a body over the limit, 400 for one that does not fit
            the model or exceeds what this server allows.
    """
    read_query(NoQuery)
    # A page in a browser may post text/plain to any address without asking; JSON it may not.
    if request.mimetype != "application/json":
        got = f"not {request.mimetype!r}" if request.mimetype else "and none was sent"
        raise ApiError(
            415, f"The Content-Type must be application/json, {got}.", code="unsupported_media_type", param=None
        )
    try:
        asked = model.model_validate_json(request.get_data(cache=False))
    except RequestEntityTooLarge as error:
        raise BodyTooLarge(config().max_body_bytes) from error
    except ValidationError as error:
        raise invalid_request(error, model) from None
    g.model = getattr(asked, "model", None)
    return _within_limits(asked)


def read_form(model: type[M]) -> tuple[M, FileStorage]:
    """The request's form as ``model``, which has a field ``file``, and that file.

    Raises:
        ApiError: as ``read``, where the content type is ``multipart/form-data``; 403 for a form of another site's page.
    """
    read_query(NoQuery)
    if request.mimetype != "multipart/form-data":
        got = f"not {request.mimetype!r}" if request.mimetype else "and none was sent"
        raise ApiError(
            415, f"The Content-Type must be multipart/form-data, {got}.", code="unsupported_media_type", param=None
        )
    _check_origin()
    if not request.mimetype_params.get("boundary"):
        message = "The Content-Type must name the boundary: multipart/form-data; boundary=..."
        raise ApiError(400, message, code="invalid_form")
    # Of all fields together the limit is that of the body.
    request.max_form_memory_size = request.max_content_length
    try:
        texts, files = request.form, request.files
    except RequestEntityTooLarge as error:
        if (request.content_length or 0) <= config().max_body_bytes:
            known = ", ".join(supported(model))
            message = f"The form has more than {request.max_form_parts} fields. Supported: {known}."
            raise ApiError(400, message, code="invalid_form") from error
        raise BodyTooLarge(config().max_body_bytes) from error
    if not texts and not files:
        # A form that breaks off is read as none.
        message = "The form has no fields: it breaks off, or its boundary is another than its Content-Type says."
        raise ApiError(400, message, code="invalid_form")
    names = [name for given in (texts, files) for name, _ in given.items(multi=True)]
    for name in names:
        if names.count(name) > 1:
            raise ApiError(400, f"Field {name!r} is given twice.", code="invalid_value", param=name)
        if (name in files) != (name == "file") and name in model.model_fields:
            wanted = "a file, with a name" if name == "file" else "a text, no file"
            raise ApiError(400, f"Field {name!r} must be {wanted}.", code="invalid_value", param=name)
    try:
        given = texts.to_dict() | {name: file.filename or "" for name, file in files.items()}
        asked = model.model_validate(given)
    except ValidationError as error:
        raise invalid_request(error, model) from None
    g.model = getattr(asked, "model", None)
    return asked, files["file"]


def _check_origin() -> None:
    """A page in a browser may send a form to any address without asking, as it may text/plain; it says whose it is."""
    origin, allowed = request.headers.get("Origin"), [one.lower() for one in config().cors_origins]
    if origin is None or origin.lower() in allowed or "*" in allowed:
        return
    # One's own pages are those of the same host, whatever terminates TLS before it.
    if origin.lower() in (f"{scheme}://{request.host}".lower() for scheme in ("http", "https")):
        return
    raise ApiError(
        403,
        f"A page of {origin[:100]!r} may not send forms to this server; --cors-origin, or cors_origins of a blueprint, "
        "names those that may.",
        code="origin_not_allowed",
    )


def _within_limits(asked: M) -> M:
    """The same request, if it asks for no more than this server allows."""
    limits = config()
    if isinstance(asked, TraitsRequest):
        _check_limit("max_tokens", asked.max_tokens or 0, limits.max_tokens, "tokens per request")
        if asked.max_tokens is None and limits.max_tokens < DEFAULT_MAX_TOKENS:
            asked = asked.model_copy(update={"max_tokens": limits.max_tokens})
    if isinstance(asked, GenerationRequest):
        name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
        wanted, each = getattr(asked, name), limits.max_tokens // asked.n
        unit = "tokens per request, all choices together"
        _check_limit("n", asked.n, limits.max_tokens, unit)
        _check_limit(name, (wanted or 0) * asked.n, limits.max_tokens, unit)
        if wanted is None and each < DEFAULT_MAX_TOKENS:
            asked = asked.model_copy(update={"max_tokens": each})
    if isinstance(asked, CaptureRequest):
        _check_limit("activation_hooks", len(asked.activation_hooks or []), limits.max_hooks, "hooks")
    if isinstance(asked, RegisterHooksRequest):
        _check_limit("hooks", len(asked.hooks), limits.max_hooks, "hooks")
    return asked


def _check_limit(param: str, wanted: int, limit: int, unit: str) -> None:
    if wanted > limit:
        raise ApiError(
            400,
            f"Field {param!r} asks for {wanted}; this server allows at most {limit} {unit}.",
            code="limit_exceeded",
            param=param,
        )


def submit(
    work: Callable[[], Any], kind: str, model: LoadedModel | None = None, user: str | None = None, **about: Any
) -> Job[Any]:
    """Queue work for this request; the reply's header names the job.

    The queue is fair among addresses, and at one address among those who give a ``user``.
    """
    caller = (request.remote_addr or "", user or "")
    job = worker().submit(work, kind=kind, model=model, caller=caller, request_id=g.request_id, **about)
    g.job_id = job.id
    g.model = model.model_id if model else g.get("model")
    return job


def call(function: Callable[[], T], kind: str, model: LoadedModel | None = None) -> T:
    """What a short function answers on the worker thread."""

    def work() -> Iterator[T]:
        yield function()

    return cast(T, submit(work, kind, model, brief=True).result(reader_gone()))


def in_background(job: Job[Any]) -> Response:
    """202 and the job, which goes on without its caller."""
    return json_reply(worker().shown(job), 202, {"Location": url_for(_part("job_endpoint"), job_id=job.id)})


def answer_of_model(asked: Any, kind: str, analyse: Callable[[HookedModel, Any, Report], dict[str, Any]]) -> Response:
    """What a long analysis of a loaded model finds, or the job that looks for it.

    Args:
        asked: a request with ``model`` and ``background``.
        kind: what the job is.
        analyse: is given the model, the request, and what to tell how far it has come.
    """
    loaded = worker().get(asked.model)
    service = interpretability()
    work = service.on_model(loaded, partial(analyse, loaded.model, asked))

    def body(found: dict[str, Any]) -> dict[str, Any]:
        return found | {"model": loaded.model_id}

    render: Callable[..., Any] | None = body if asked.background else None
    job = service.submit(partial(submit, work, kind, loaded, render=render))
    return in_background(job) if asked.background else large_json(body(job.result(reader_gone())))


def read_query(model: type[M]) -> M:
    """The query parameters as ``model``, whose fields may be numbers and booleans: ``?top_k=5``.

    Raises:
        ApiError: 400 for an unknown parameter, which lists the known ones; one given twice; one that does not fit.
    """
    for name, values in request.args.lists():
        if len(values) > 1:
            raise ApiError(400, f"Query parameter {name!r} is given twice.", code="invalid_value", param=name)
    try:
        return model.model_validate_strings(request.args.to_dict())
    except ValidationError as error:
        raise invalid_request(error, model, "Query parameter") from None


def reader_gone() -> Callable[[], bool]:
    """A question that any thread may ask: has the caller of this request closed the connection?"""
    asked: Callable[[], bool] = request.environ.get("waitress.client_disconnected", lambda: False)
    return asked


def event_stream(events: Iterator[dict[str, Any]], job: Job[Any]) -> Response:
    """Server-sent events, ending with ``data: [DONE]``; closing the connection cancels ``job``.

    The first event is awaited here, so that what fails before it is an ordinary error reply. A later error is the
    last event, ``data: {"error": {...}}``, and no ``[DONE]`` follows.
    """
    request_id = g.request_id
    sent = g.sent = [0]
    try:
        first = next(events)
    except BaseException:
        job.cancel()
        raise

    def body() -> Iterator[bytes]:
        for frame in frames():
            sent[0] += len(frame)
            yield frame

    def frames() -> Iterator[bytes]:
        yield _frame(first)
        try:
            for event in events:
                yield _frame(event)
        except Exception as error:
            yield _frame(describe(error, request_id).body(request_id))
        else:
            yield b"data: [DONE]\n\n"

    response = Response(body(), content_type="text/event-stream")
    response.headers["Cache-Control"] = "no-cache"
    response.headers["X-Accel-Buffering"] = "no"
    # Closing a generator that was never begun runs none of its code, so the job is told directly.
    response.call_on_close(job.cancel)
    return response


def _frame(event: dict[str, Any]) -> bytes:
    return b"data: " + payload.dumps(event) + b"\n\n"
