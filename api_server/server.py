"""The app on a socket, through waitress.

server = Server(create_app(worker, config), config)      # OSError if the address is taken
print(server.url)
server.run()                                             # until SystemExit, KeyboardInterrupt or stop()
"""

import socket
import threading
import time
from typing import Any

from flask import Flask
from waitress.channel import HTTPChannel
from waitress.server import create_server
from waitress.task import ErrorTask

from neuroscope_bridge import payload

from . import logs
from .config import ServerConfig
from .description import REQUEST_ID_HEADER
from .errors import BodyTooLarge, error_body

# A job's caller waits in a thread, so there are more threads than the worker lets wait: /health always finds one.
SPARE_THREADS = 16


class Server:
    """A bound, listening server.

    Args:
        app: made by ``create_app``.
        config: the address, 0 as port for any free one, and the limits.
        waiting: how many callers may wait for the worker at a time.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(self, app: Flask, config: ServerConfig, waiting: int = 64) -> None:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self._socket = socket.create_server((config.host, config.port), family=family)
        self._server: Any = create_server(
            app,
            sockets=[self._socket],
            threads=waiting + SPARE_THREADS,
            # Reading on while a request runs is how a closed connection is noticed.
            channel_request_lookahead=1,
            # What a slow reader has not taken goes to a temporary file; no thread waits for it.
            outbuf_high_watermark=2**40,
            # The app refuses what is over its limit, in JSON, after the body was read; far more is not read at all.
            max_request_body_size=4 * config.max_body_bytes,
            connection_limit=config.max_connections,
            asyncore_use_poll=True,
            ident=None,
        )
        self._server.channel_class = _Channel
        self._server.max_body_bytes = config.max_body_bytes
        self._host = config.host
        self._left: list[Any] = []

    @property
    def port(self) -> int:
        return int(self._server.effective_port)

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}"

    def run(self) -> None:
        """Serve until ``stop``, SystemExit or KeyboardInterrupt; then let the requests that are running end.

        Stop the worker first: a request that waits for it would keep this from returning for some seconds.
        """
        self._server.run()
        self._server.task_dispatcher.shutdown()
        # Only now: a thread that still wrote would find its pipe to the loop closed.
        for channel in [*self._server._map.values(), *self._left]:
            channel.handle_close() if isinstance(channel, HTTPChannel) else channel.close()

    def start(self) -> threading.Thread:
        """Run in a thread of its own, for programs that do more than serve."""
        thread = threading.Thread(target=self.run, name="http-server", daemon=True)
        thread.start()
        return thread

    def stop(self, drain: float = 0.0) -> None:
        """Make ``run`` return; from any thread.

        Args:
            drain: seconds that requests have to end, and readers to take what was sent.
        """
        deadline = time.monotonic() + drain
        while time.monotonic() < deadline and any(self._is_busy(channel) for channel in self._channels()):
            time.sleep(0.02)
        self._server.trigger.pull_trigger(self._leave)

    def _channels(self) -> list[HTTPChannel]:
        # A copy made by one C call: the loop adds and removes channels meanwhile.
        return [one for one in list(self._server._map.values()) if isinstance(one, HTTPChannel)]

    @staticmethod
    def _is_busy(channel: HTTPChannel) -> bool:
        return bool(channel.requests or channel.total_outbufs_len)

    def _leave(self) -> None:
        # Waitress's loop ends when it has nothing left to watch.
        self._left += self._server._map.values()
        self._server._map.clear()


class _JsonErrorTask(ErrorTask):
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


class _Channel(HTTPChannel):
    error_task_class = _JsonErrorTask
