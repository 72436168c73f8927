"""Connections: what waitress makes of sockets, with errors in the API's shape and an end to every wait.

A client that opens a connection and leaves it, sends its request byte by byte or never reads its reply takes a place
that others could have. Nobody is waited for longer than ``Patience`` says, and when all places are taken those who
make no use of theirs are the first to lose it.
"""

import logging
import math
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flask import Flask
from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import TcpWSGIServer
from waitress.task import ErrorTask
from waitress.utilities import RequestEntityTooLarge

from neuroscope_bridge import payload

from . import logs
from .description import REQUEST_ID_HEADER
from .errors import BodyTooLarge, error_body

log = logging.getLogger("api_server")

READ_THROUGH = 4
"""A body of up to so many times the limit is read before it is refused: some clients read no answer until then."""


TELL_SECONDS = 60.0
"""Between two lines of the log that say that all connections are taken."""


@dataclass(frozen=True)
class Patience:
    """How long a client is waited for, in seconds.

    Args:
        request: for a whole request, from its first byte; each ``bytes_per_second`` that came of it add a second.
        idle: for the next request on a connection.
        reply: for a reader to take anything of what waits for it.
        crowded: for the first two where all places are taken.
        bytes_per_second: the slowest that a body may come.
    """

    request: float = 30.0
    idle: float = 60.0
    reply: float = 60.0
    crowded: float = 2.0
    bytes_per_second: int = 16 * 2**10


class JsonErrorTask(ErrorTask):
    """Waitress's own refusals (a malformed request line, headers too large) in the API's error shape."""

    def execute(self) -> None:
        error = self.request.error
        request_id = logs.request_id(self.request.headers.get("X_REQUEST_ID", ""))
        code = "request_too_large" if error.code == 431 else error.reason.lower().replace(" ", "_")
        content = error_body(error.code, f"{error.reason}: {error.body}.", code, request_id=request_id)
        if error.code == 413:
            # The app's limit, which is what a caller can keep to; waitress's own is wider.
            content = BodyTooLarge(self.channel.server.max_body_bytes).body(request_id)
        body = payload.dumps(content)
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", "application/json"), (REQUEST_ID_HEADER, request_id)]
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)
        logs.refused(request_id, error.code, len(body))


class Request(HTTPRequestParser):
    """A request on its way in. One that asks whether to send its body is told to only where there is one to read."""

    completed: bool
    expect_continue: bool

    def received(self, data: bytes) -> int:
        taken = int(super().received(data))
        if self.expect_continue and self.headers_finished:
            limit = self.adj.max_request_body_size // READ_THROUGH
            if self.content_length > limit and not self.completed:
                self.error = RequestEntityTooLarge(f"exceeds max_body of {limit}")
                self.completed = True
            # Waitress would ask for the rest of a request that is whole, and never answer it.
            self.expect_continue = not self.completed
        return taken


class Channel(HTTPChannel):
    """One connection, and what its client is waited for."""

    parser_class = Request
    error_task_class = JsonErrorTask

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._wait: tuple[Any, ...] = ()
        self._since = 0.0
        self._received = 0
        super().__init__(*arguments, **options)

    def received(self, data: bytes) -> bool:
        self._received += len(data)
        return bool(super().received(data))

    def overdue(self, now: float, crowded: bool) -> float:
        """Seconds that the client is late with what is waited for; below 0 while it is not.

        Args:
            now: monotonic time.
            crowded: whether others wait for a place.
        """
        patience: Patience = self.server.patience
        # Of each wait: what makes it another one, which begins anew.
        if self.total_outbufs_len:
            wait, seconds = ("reply", self.last_activity), patience.reply
        elif self.requests:
            wait, seconds = ("nothing", None), math.inf
        elif self.request is not None:
            wait, seconds = ("request", self.request), patience.request
        else:
            wait, seconds = ("idle", self.last_activity), patience.idle
        if wait != self._wait:
            self._wait, self._since, self._received = wait, now, 0
        if crowded and wait[0] in ("request", "idle"):
            seconds = min(seconds, patience.crowded)
        if wait[0] == "request":
            seconds += self._received / patience.bytes_per_second
        return now - self._since - seconds

    def drop(self) -> None:
        """Close, whatever waits to be sent: the loop finds the socket shut down, and does the rest."""
        self.will_close = True
        with suppress(OSError):  # its client was faster
            self.socket.shutdown(socket.SHUT_RDWR)


class Listener(TcpWSGIServer):
    """The listening socket, with its channels and threads.

    Args:
        app: the application.
        listening: a bound socket.
        limits: waitress's settings.
        patience: how long clients are waited for.
    """

    channel_class = Channel
    next_channel_cleanup: float

    def __init__(self, app: Flask, listening: socket.socket, limits: Adjustments, patience: Patience) -> None:
        self.patience = patience
        self._told = -math.inf
        about = (listening.family, listening.type, listening.proto, listening.getsockname())
        super().__init__(app, _sock=listening, adj=limits, bind_socket=False, sockinfo=about)

    @property
    def max_body_bytes(self) -> int:
        return int(self.adj.max_request_body_size) // READ_THROUGH

    def readable(self) -> bool:
        """Whether to accept one more connection; the loop asks at each of its turns, at least once a second."""
        now = time.monotonic()
        crowded = len(self.active_channels) >= self.adj.connection_limit
        if crowded or now >= self.next_channel_cleanup:
            self.next_channel_cleanup = now + self.adj.cleanup_interval
            self._look_after(now, crowded)
        return bool(self.accepting) and not crowded

    def _look_after(self, now: float, crowded: bool) -> None:
        channels = [one for one in self.active_channels.values() if not one.will_close]
        late = [one for one in channels if one.overdue(now, crowded=False) >= 0]
        if crowded and len(channels) == len(self.active_channels) and not late:
            # One place is enough: the next to come will ask again.
            late = [max(channels, key=lambda one: one.overdue(now, crowded=True))]
            if late[0].overdue(now, crowded=True) < 0:
                late = []
            self._tell_crowded(now)
        for channel in late:
            channel.drop()

    def _tell_crowded(self, now: float) -> None:
        if now - self._told >= TELL_SECONDS:
            self._told = now
            log.warning("all %d connections are taken; others wait", len(self.active_channels))
