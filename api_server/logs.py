"""The server's log: one line per request and per fault, as text or as JSON.

No traceback, no path of a file and no key stands in it; a fault is its type, its message and the lines of modules that
it came through. At level debug tracebacks are written too, for those who look for the reason on their own machine.
"""

import copy
import json
import logging
import re
import time
import uuid
from types import TracebackType
from typing import Any

from flask import Response, g, request
from pythonjsonlogger.json import JsonFormatter

access = logging.getLogger("api_server.access")

FORMATS = ("text", "json")
FIELDS = ("request_id", "method", "route", "status", "ms", "bytes", "model", "job_id", "error", "reason", "at")
"""What a line may tell besides time, level, logger and message."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def request_id(given: str) -> str:
    """The id that a client gave its request, if it is one; else a new one."""
    return given if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"


# -- what must not be told --------------------------------------------------------------------------------------------

# The server's own addresses look like paths.
_PATH = r"(?:file://)?(?:~[\w.-]*|[A-Za-z]:)?[/\\](?!(?:v1|health|docs|openapi\.json)\b)"
_QUOTED = re.compile(rf"""(['"]){_PATH}(?:(?!\1).)*\1""")
_BARE = re.compile(rf"""(?<![\w:/\\.<>~}}-]){_PATH}[^\s'"(),;\]}}>]+""")

_REST = r"""((?:[/\\][^\s'"(),;\]}>]*[^\s'"(),;\]}>.])?/?)"""


def scrub(text: str, keep: str | None = None) -> str:
    """The text with the paths of files cut to their last part.

    >>> scrub("No safetensors found in /root/models/tiny")
    'No safetensors found in tiny'

    Args:
        text: a message of a library.
        keep: a path that the caller sent, which may be told to the caller again.
    """
    if keep and keep.strip("/\\"):
        own = re.compile(rf"(?<![\w/\\.~-]){re.escape(keep.rstrip('/'))}(?![\w-]|\.\w){_REST}")
        parts, at = [], 0
        for found in own.finditer(text):
            # Of a file inside of it, its name.
            name = "/" + _last_part(found[1]) if found[1].strip("/\\") else found[1]
            parts += [scrub(text[at : found.start()]), keep.rstrip("/"), name]
            at = found.end()
        return "".join(parts) + scrub(text[at:])
    text = _QUOTED.sub(lambda found: found[1] + _last_part(found[0][1:-1]) + found[1], text)
    return _BARE.sub(lambda found: _last_part(found[0]), text)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "..."


def way(traceback: TracebackType | None) -> str:
    """The modules and lines that an exception came through: ``api_server.worker:214 < mlx_hooks.model:31``."""
    places = []
    while traceback is not None:
        places.append(f"{traceback.tb_frame.f_globals.get('__name__', '?')}:{traceback.tb_lineno}")
        traceback = traceback.tb_next
    return " < ".join(reversed(places))


# -- lines ------------------------------------------------------------------------------------------------------------


def account(response: Response) -> None:
    """One line for this request, once its reply is sent."""
    facts: dict[str, Any] = {
        "request_id": g.request_id,
        "method": request.method,
        "route": request.url_rule.rule if request.url_rule else None,
        "status": response.status_code,
        "model": g.get("model") or (request.view_args or {}).get("model_id"),
        "job_id": g.get("job_id"),
    }
    began, sent = g.began, g.get("sent", [response.content_length])

    def write() -> None:
        facts.update(ms=round(1000 * (time.perf_counter() - began)), bytes=sent[0])
        access.info("request", extra={name: value for name, value in facts.items() if value is not None})

    response.call_on_close(write) if response.is_streamed else write()


def refused(request_id: str, status: int, nbytes: int) -> None:
    """One line for a request that the HTTP layer refused, whose method and address it may not even have read."""
    access.info("request", extra={"request_id": request_id, "status": status, "bytes": nbytes})


class _Discreet:
    """Makes a line of a record: of an exception its type, message and way, of a path its last part, no secret."""

    def __init__(self, *arguments: Any, tracebacks: bool, secret: str | None = None, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._tracebacks, self._secret = tracebacks, secret

    def format(self, record: logging.LogRecord) -> str:
        record = copy.copy(record)
        record.msg, record.args = scrub(record.getMessage()), None
        if record.exc_info and record.exc_info[1] is not None:
            kind, error, traceback = record.exc_info
            record.error, record.reason, record.at = kind.__name__, scrub(str(error)), way(traceback)
        if not self._tracebacks:
            record.exc_info = record.exc_text = record.stack_info = None
        line: str = super().format(record)  # type: ignore[misc]
        for secret in (self._secret, json.dumps(self._secret)[1:-1]) if self._secret else ():
            line = line.replace(secret, "***")
        return line


def _value(value: Any) -> str:
    """A field's value as it is, if that is one word; else as JSON."""
    text = str(value)
    return text if text.isprintable() and text and not _UNLIKE_A_WORD.search(text) else json.dumps(text)


_UNLIKE_A_WORD = re.compile(r"""[\s"'\\]""")


class TextFormatter(_Discreet, logging.Formatter):
    """``2026-01-01 12:00:00,000 INFO api_server.access request route=/health status=200``"""

    def formatMessage(self, record: logging.LogRecord) -> str:
        said = {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        # One line, whatever a message holds, and nothing in it that could pass for a field or move a terminal's cursor.
        message = super().formatMessage(record).replace("\n", " ")
        message = "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in message)
        return " ".join([message, *(f"{name}={_value(value)}" for name, value in said.items())])


class JsonLineFormatter(_Discreet, JsonFormatter):
    """``{"time": ..., "level": "INFO", "logger": "api_server.access", "message": "request", "status": 200, ...}``"""


_SHOWN = "%(asctime)s %(levelname)s %(name)s %(message)s"
_NAMES = {"asctime": "time", "levelname": "level", "name": "logger"}


def formatter(form: str, *, tracebacks: bool = False, secret: str | None = None) -> logging.Formatter:
    """What makes lines of records.

    Args:
        form: one of ``FORMATS``.
        tracebacks: whether to write them.
        secret: what is never written, whoever says it.
    """
    if form == "json":
        return JsonLineFormatter(_SHOWN, rename_fields=_NAMES, tracebacks=tracebacks, secret=secret)
    return TextFormatter(_SHOWN, tracebacks=tracebacks, secret=secret)


def configure(level: str, form: str, secret: str | None = None) -> None:
    """Write the log to standard error.

    Args:
        level: debug, info (a line per request), warning or error.
        form: one of ``FORMATS``.
        secret: what is never written.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(form, tracebacks=level == "debug", secret=secret))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    # Waitress warns of every request that waits for a thread; the worker's queue has a limit and an answer of its own.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
