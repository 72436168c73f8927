"""The description of the API, ``/openapi.json``, from the models that validate requests and those that name replies.

Each view says what it takes and gives, in one decorator under its route:

    @blueprint.post("/tokenize")
    @described(TokenizeRequest, replies=TokenizeReply, tags=["Tokens"], errors=(404, 409))
    def tokenize() -> Response:
        \"\"\"The tokens of a text.\"\"\"

The docstring's first line is the summary. SpecTree makes the document; nothing of it runs during a request.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from flask import Flask
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from spectree import Response as Replies
from spectree import SpecTree
from spectree.plugins.flask_plugin import FlaskPlugin

from .config import ServerConfig
from .schemas.replies import ErrorReply

View = TypeVar("View", bound=Callable[..., Any])
Schema = dict[str, Any]

JSON = "application/json"
EVENTS = "text/event-stream"
_SCHEMA = "#/components/schemas/{name}"

OPEN_OPERATIONS = frozenset({"health"})
"""Operations that need no API key."""

_ABOUT = """Capture and edit what language models compute, exactly. Shapes are OpenAI's where OpenAI has one.

Bodies are JSON, save where a file is uploaded, and strictly typed; an unknown field or query parameter is a 400 that
lists the known ones. Every error has one shape, `ErrorReply`. Every answer has an `X-Request-Id`, the client's own if
it sent one. Replies may gain fields; clients pass over those that they do not know."""

_PATH_PARAMETERS = {
    "model_id": "A loaded model. Slashes in an id may be sent as they are or as %2F.",
    "hook_id": "A hook. Slashes in an id may be sent as they are or as %2F.",
    "capture_id": "A kept capture.",
    "job_id": "A job, as in the header `X-Job-Id` of the reply that it made.",
}

_ERRORS = {
    400: "The request does not fit; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "This server does not answer to that Host, or does not load models from that folder.",
    404: "Unknown; the message lists what there is.",
    409: "No model is loaded, or the job was cancelled.",
    413: "The body, or what is asked for, is larger than this server allows.",
    415: "The body, or a file in it, is of another kind than the one that is read here.",
    412: "The bytes are others than `If-Match` names.",
    416: "The range lies outside.",
    500: "A fault in the server.",
    503: "Busy, stopping or cancelled; see Retry-After.",
    507: "The capture could not be written.",
}

REQUEST_ID_HEADER = "X-Request-Id"
RETRY_AFTER_HEADER = "Retry-After"
JOB_ID_HEADER = "X-Job-Id"
_HEADERS: Schema = {
    REQUEST_ID_HEADER: {
        "description": "Names this request in errors and in the server's log.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
    },
    RETRY_AFTER_HEADER: {"description": "Seconds to wait.", "schema": {"type": "string", "pattern": "^[0-9]+$"}},
    JOB_ID_HEADER: {
        "description": "The job that the request was, or is: `GET` and `DELETE /v1/jobs/{job_id}`.",
        "schema": {"type": "string", "pattern": "^job-"},
    },
    "Location": {
        "description": "The job's address.",
        "required": True,
        "schema": {"type": "string", "pattern": "^/v1/jobs/"},
    },
    "Accept-Ranges": {
        "description": "The bytes can be fetched in parts, with `Range`; JSON, and what is compressed, cannot.",
        "schema": {"const": "bytes"},
    },
    "Content-Range": {
        "description": "Which bytes these are, of how many: `bytes 0-99/4096`; with 416 `bytes */4096`.",
        "required": True,
        "schema": {"type": "string", "pattern": r"^bytes ([0-9]+-[0-9]+|\*)/[0-9]+$"},
    },
    "Vary": {"description": "The request's headers that the answer depends on.", "schema": {"type": "string"}},
    "Content-Encoding": {
        "description": "There if the answer is compressed, as `Accept-Encoding` asked.",
        "schema": {"enum": ["zstd", "gzip", "br"]},
    },
}


@dataclass(frozen=True)
class _Extras:
    """What an operation has beyond JSON bodies and JSON replies."""

    errors: frozenset[int]
    job: bool
    event: type[BaseModel] | None
    media: Mapping[str, Schema]
    headers: Mapping[str, str]
    example: Mapping[str, Any] | None


class _SilentPlugin(FlaskPlugin):
    """SpecTree's own would read a streamed reply whole; ``transport.read`` validates, and words the errors."""

    def validate(self, func: Callable[..., Any], *settings: Any, **arguments: Any) -> Any:
        return func(**arguments)


_tree = SpecTree(
    backend=_SilentPlugin,
    mode="strict",
    annotations=False,
    path="docs",
    title="NeuroScope for MLX",
    description=_ABOUT,
    version=version("neuroscope-mlx"),
    openapi_version="3.1.0",
    validation_error_status=400,
    validation_error_model=ErrorReply,
    naming_strategy=lambda model: model.__name__,
    nested_naming_strategy=lambda parent, child: child,
)
_extras: dict[str, _Extras] = {}


def described(
    body: type[BaseModel] | None = None,
    *,
    replies: type[BaseModel] | Mapping[int, type[BaseModel] | None],
    tags: Sequence[str],
    form: type[BaseModel] | None = None,
    query: type[BaseModel] | None = None,
    errors: Sequence[int] = (),
    job: bool = False,
    event: type[BaseModel] | None = None,
    media: Mapping[str, Schema] | None = None,
    headers: Mapping[str, str] | None = None,
    example: Mapping[str, Any] | None = None,
) -> Callable[[View], View]:
    """Describe a view. Its name is the operation's id, its docstring the text; the view itself stays as it is.

    Args:
        body: the model of the JSON body; adds the errors 413 and 415.
        form: the model of the body where that is a form with a file; adds the same.
        replies: the model of the reply, or one per status; None for a reply without a body.
        query: the model of the query parameters.
        errors: statuses beyond those that any request can get (400, 401, 403, 500).
        job: whether the worker does it, as a job: it can be cancelled (409), or find no room or no time (503).
        event: the model of one server-sent event, where ``stream`` asks for events.
        media: other content types of replies 200 and 206, with their schemas.
        headers: headers of the replies below 400 besides X-Request-Id, with a sentence each.
        example: a body that is answered well wherever the bundled model is loaded.
    """
    by_status = dict(replies) if isinstance(replies, Mapping) else {200: replies}
    answers: dict[str, Any] = {f"HTTP_{status}": model for status, model in by_status.items()}
    possible = frozenset({400, 403, 500, *errors, *((413, 415) if body or form else ()), *((409, 503) if job else ())})

    def decorate(view: View) -> View:
        name = view.__name__
        if name in _extras:
            raise ValueError(f"Two views are called {name!r}: an operation's id must be its own.")
        _extras[name] = _Extras(possible, job, event, media or {}, headers or {}, example)
        decorated: View = _tree.validate(
            query=query,
            json=body,
            form=form,
            resp=Replies(**answers),
            tags=tuple(tags),
            path_parameter_descriptions=_PATH_PARAMETERS,
            skip_validation=True,
            operation_id=name,
        )(view)
        return decorated

    return decorate


def is_described(view: Callable[..., Any]) -> bool:
    """Whether a view stands in the description."""
    return _tree.get_function_metadata(view) is not None


def describe_api(app: Flask, config: ServerConfig) -> Schema:
    """The OpenAPI document of an application whose views are registered, with the limits and the key of ``config``."""
    api_key = config.api_key is not None
    with app.app_context():
        document: Schema = copy.deepcopy(_tree.spec)
    events = [extras.event for extras in _extras.values() if extras.event]
    _, schemas = models_json_schema(
        [(event, "serialization") for event in events], ref_template=_SCHEMA.format(name="{model}")
    )
    components = document["components"]
    components["schemas"] |= schemas["$defs"]
    components["headers"] = copy.deepcopy(_HEADERS)
    components["responses"] = {f"Error{status}": _error(status) for status in _ERRORS}
    if api_key:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    for path in document["paths"].values():
        for operation in path.values():
            _complete(operation, _extras[operation["operationId"]], api_key)
    document["paths"] = dict(sorted(document["paths"].items()))
    _limit(components["schemas"], config)
    return document


def _limit(schemas: Schema, config: ServerConfig) -> None:
    """Let the schemas say what this server allows, where it is less than what any server could."""
    for schema in schemas.values():
        fields = schema.get("properties", {})
        for name in ("max_tokens", "max_completion_tokens"):
            for kind in fields.get(name, {}).get("anyOf", []):
                if "maximum" in kind:
                    kind["maximum"] = config.max_tokens
        for name in ("activation_hooks", "hooks"):
            field = fields.get(name, {})
            for kind in (field, *field.get("anyOf", [])):
                if "maxItems" in kind:
                    kind["maxItems"] = config.max_hooks


def _complete(operation: Schema, extras: _Extras, api_key: bool) -> None:
    """Add what SpecTree has no words for: errors, events, other content types, headers."""
    for parameter in operation["parameters"]:
        if parameter["in"] == "path":
            # An empty one would be another address.
            parameter["schema"] = {"type": "string", "minLength": 1}
    wants_key = api_key and operation["operationId"] not in OPEN_OPERATIONS
    operation["security"] = [{"bearer": []}] if wants_key else []
    responses = {status: one for status, one in operation["responses"].items() if int(status) < 400}
    for status, response in responses.items():
        response["headers"] = {name: _header_named(name) for name in _headers_of(status, extras)}
        response["headers"] |= {name: _header(text) for name, text in extras.headers.items()}
    for status in ("200", "206"):
        if status in responses:
            responses[status].setdefault("content", {}).update(_other_content(extras))
    for status in {*extras.errors, *((401,) if wants_key else ())}:
        responses[str(status)] = {"$ref": f"#/components/responses/Error{status}"}
    operation["responses"] = dict(sorted(responses.items()))
    if not operation["description"]:
        del operation["description"]
    if extras.example is not None:
        operation["requestBody"]["content"][JSON]["example"] = extras.example


def _headers_of(status: str, extras: _Extras) -> list[str]:
    """The common headers of a reply below 400."""
    names = [REQUEST_ID_HEADER, *([JOB_ID_HEADER] if extras.job else [])]
    names += {"202": ["Location"], "206": ["Content-Range"]}.get(status, [])
    names += ["Accept-Ranges"] if extras.media and status != "304" else []
    return names + ["Vary"] + (["Content-Encoding"] if status == "200" else [])


def _header_named(name: str) -> Schema:
    return {"$ref": f"#/components/headers/{name}"}


def _other_content(extras: _Extras) -> Schema:
    content = {kind: {"schema": schema} for kind, schema in extras.media.items()}
    if extras.event:
        said = [{"$ref": _SCHEMA.format(name=model.__name__)} for model in (extras.event, ErrorReply)]
        done = {"const": "[DONE]", "description": "The end; it does not come after an error."}
        data = {"type": "string", "contentMediaType": JSON, "contentSchema": {"anyOf": said}}
        # The schema of one event: OpenAPI 3.1 has no word for the sequence.
        one = {"type": "object", "properties": {"data": {"anyOf": [done, data]}}, "required": ["data"]}
        content[EVENTS] = {"schema": one}
    return content


def _error(status: int) -> Schema:
    # What fails in the course of a job has its id.
    names = [REQUEST_ID_HEADER, *([RETRY_AFTER_HEADER] if status == 503 else []), JOB_ID_HEADER]
    names += ["Vary", *(["Content-Range"] if status == 416 else [])]
    return {
        "description": _ERRORS[status],
        "headers": {name: _header_named(name) for name in names},
        "content": {JSON: {"schema": {"$ref": _SCHEMA.format(name=ErrorReply.__name__)}}},
    }


def _header(description: str) -> Schema:
    return {"description": description, "schema": {"type": "string"}}
