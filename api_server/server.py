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
from waitress.adjustments import Adjustments

from .config import ServerConfig
from .connections import READ_THROUGH, Channel, Listener, Patience

# A job's caller waits in a thread, so there are more threads than the worker lets wait: /health always finds one.
SPARE_THREADS = 16


class Server:
    """A bound, listening server.

    Args:
        app: made by ``create_app``.
        config: the address, 0 as port for any free one, and the limits.
        waiting: how many callers may wait for the worker at a time.
        patience: how long it waits for what a client is to send or to take.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(self, app: Flask, config: ServerConfig, waiting: int = 64, patience: Patience | None = None) -> None:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self._socket = socket.create_server((config.host, config.port), family=family)
        limits = Adjustments(
            sockets=[self._socket],
            threads=waiting + SPARE_THREADS,
            # Reading on while a request runs is how a closed connection is noticed.
            channel_request_lookahead=1,
            # What a slow reader has not taken goes to a temporary file; no thread waits for it.
            outbuf_high_watermark=2**40,
            # The app refuses what is over its limit, in JSON, after the body was read; far more is not read at all.
            max_request_body_size=READ_THROUGH * config.max_body_bytes,
            connection_limit=config.max_connections,
            cleanup_interval=1,
            asyncore_use_poll=True,
            ident=None,
        )
        self._server = Listener(app, self._socket, limits, patience or Patience())
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
            channel.handle_close() if isinstance(channel, Channel) else channel.close()

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
        try:
            self._server.trigger.pull_trigger(self._leave)
        except OSError:
            # Woken by somebody else's pull, the loop may have left and closed its pipe meanwhile.
            if self._server._map:
                raise

    def _channels(self) -> list[Channel]:
        # A copy made by one C call: the loop adds and removes channels meanwhile.
        return [one for one in list(self._server._map.values()) if isinstance(one, Channel)]

    @staticmethod
    def _is_busy(channel: Channel) -> bool:
        return bool(channel.requests or channel.total_outbufs_len)

    def _leave(self) -> None:
        # Waitress's loop ends when it has nothing left to watch.
        self._left += self._server._map.values()
        self._server._map.clear()
