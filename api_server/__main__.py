"""``python -m api_server``: the server from the command line; ``neuroscope serve`` is the same."""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from mlx_hooks import HookError

from . import logs
from .app import close_app, create_app
from .captures import CannotOpenCaptures
from .config import ServerConfig
from .errors import ApiError
from .schemas.fields import MAX_HOOKS, MAX_TOKENS
from .server import Server
from .worker import ModelWorker


def main(argv: Sequence[str] | None = None, prog: str = "python -m api_server") -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status: 0 after a signal, 1 if it could not start.

    Args:
        argv: the arguments after the program's name; those of this process if None.
        prog: the program's name in the usage message.
    """
    _leave_on_signals()
    options = _parser(prog).parse_args(argv)
    api_key = options.api_key or os.environ.get("NEUROSCOPE_API_KEY") or None
    logs.configure(options.log_level, options.log_format, secret=api_key)
    try:
        return _serve(_config(options, api_key), options.model, options.model_id)
    except CannotStart as error:
        sys.stderr.write(f"neuroscope: {error}\n")
        return 1


def _leave_on_signals() -> None:
    """Until there is a worker to stop, a signal ends the process as orderly as later ones do."""

    def leave(signum: int, _: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)


# A forward pass cannot be interrupted: after the grace and this, the process ends all the same.
STUCK_SECONDS = 10.0
DRAIN_SECONDS = 5.0


class CannotStart(Exception):
    """One sentence that says why."""


def _config(options: argparse.Namespace, api_key: str | None) -> ServerConfig:
    if options.experiments is not None and not options.experiments.is_dir():
        raise CannotStart(f"There is no folder {options.experiments}: --experiments names one with experiments.")
    if options.mechint is not None and not options.mechint.is_dir():
        raise CannotStart(f"There is no folder {options.mechint}: --mechint names one with captured activations.")
    try:
        return ServerConfig(
            host=options.host,
            port=options.port,
            api_key=api_key,
            allowed_hosts=tuple(options.allowed_host),
            cors_origins=tuple(options.cors_origin),
            model_roots=tuple(options.model_root),
            max_body_bytes=int(options.max_body_mb * 2**20),
            max_tokens=options.max_tokens,
            max_hooks=options.max_hooks,
            max_connections=options.max_connections,
            experiments=options.experiments,
            mechint=options.mechint,
            compress_binary=options.compress_binary,
            max_queued=options.max_queued,
            max_active=options.max_active,
            max_model_bytes=int(options.max_models_gb * 2**30) if options.max_models_gb else _most_of_memory(),
            grace_seconds=options.grace,
            max_reply_bytes=int(options.max_reply_mb * 2**20),
            captures_dir=options.captures_dir,
            captures_max_bytes=int(options.captures_max_gb * 2**30),
            captures_max_age=options.captures_max_age,
        )
    except ValueError as error:
        raise CannotStart(str(error)) from error


def _serve(config: ServerConfig, model: str | None, model_id: str | None) -> int:
    if not config.is_local and not config.api_key:
        raise CannotStart(f"--host {config.host} is open to other machines: give --api-key or NEUROSCOPE_API_KEY.")
    worker = ModelWorker(
        max_queued=config.max_queued, max_active=config.max_active, max_model_bytes=config.max_model_bytes
    )
    try:
        app = create_app(worker, config)
    except CannotOpenCaptures as error:
        raise CannotStart(str(error)) from error
    try:
        server = Server(app, config, waiting=worker.max_queued + worker.max_active)
    except OSError as error:
        why = (error.strerror or str(error)).split(" (while ")[0]  # socket.create_server repeats the address there
        raise CannotStart(f"cannot listen on {config.host} port {config.port}: {why}. Choose another.") from error
    serving = threading.Event()
    _stop_on_signals(worker, config.grace_seconds, serving)
    worker.start()
    try:
        if model:
            worker.load(model, model_id)
        serving.set()
        threading.Thread(target=_stop_after, args=(worker, server), name="stopper", daemon=True).start()
        sys.stdout.write(f"NeuroScope server on {server.url}\n")
        sys.stdout.flush()
        server.run()
    except (HookError, ApiError) as error:
        raise CannotStart(str(error)) from error
    except SystemExit:
        pass
    finally:
        # Unfinished ones of requests that still run go at the next start, or with the folder.
        ended = close_app(app)
        if not worker.stop() or not ended:
            # A forward pass or a load cannot be interrupted, and ending the interpreter under it would abort.
            logging.shutdown()
            os._exit(0)
    return 0


def _stop_on_signals(worker: ModelWorker, grace: float, serving: threading.Event) -> None:
    """The first signal lets running requests end for a while, the second cancels them, the third ends the process."""
    seen = 0

    def stop(signum: int, _: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        worker.request_stop(grace if seen == 1 else 0.0)
        if not serving.is_set():
            raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _stop_after(worker: ModelWorker, server: Server) -> None:
    """The server answers for as long as the worker has something to end, and until what it sent is out."""
    worker.wait_for_stop(STUCK_SECONDS)
    server.stop(DRAIN_SECONDS)


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="The NeuroScope REST server.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; another than loopback needs a key")
    parser.add_argument("--port", type=_port, default=8080, help="port; 0 lets the system choose (default 8080)")
    parser.add_argument("--model", metavar="PATH", help="load this model before listening")
    parser.add_argument("--model-id", metavar="ID", help="its id in requests (default: last part of PATH)")
    parser.add_argument("--api-key", help="ask for this key; as NEUROSCOPE_API_KEY, ps does not show it")
    parser.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="also answer to this name, such as that of a proxy; may be repeated",
    )
    parser.add_argument(
        "--cors-origin",
        metavar="URL",
        action="append",
        default=[],
        help="let pages of this origin use the server from a browser, such as https://lab.example; '*' lets in the "
        "pages of all; may be repeated (default: none)",
    )
    parser.add_argument(
        "--model-root",
        metavar="DIR",
        action="append",
        default=[],
        type=Path,
        help="load models by path from this folder only; may be repeated (default: any folder, with an API key none; "
        "the bundled model and Hugging Face ids are always allowed)",
    )
    parser.add_argument("--max-body-mb", type=_size, default=32, help="largest request body in MiB (default 32)")
    parser.add_argument(
        "--max-tokens", type=_up_to(MAX_TOKENS), default=MAX_TOKENS, help=f"per request (default {MAX_TOKENS})"
    )
    parser.add_argument(
        "--max-hooks", type=_up_to(MAX_HOOKS), default=MAX_HOOKS, help=f"hooks per request (default {MAX_HOOKS})"
    )
    parser.add_argument(
        "--max-connections", type=_up_to(10_000), default=200, help="open at a time; more wait (default 200)"
    )
    parser.add_argument("--max-queued", type=_up_to(10_000), default=64, help="requests that may wait (default 64)")
    parser.add_argument("--max-active", type=_up_to(10_000), default=4, help="requests that run in turn (default 4)")
    parser.add_argument(
        "--max-models-gb",
        type=_size,
        metavar="GB",
        help="GiB of weights that may be loaded at a time; models used longest ago make room (default: 70%% of memory)",
    )
    parser.add_argument(
        "--grace", type=_seconds, default=5.0, help="seconds that running requests may go on after a signal (default 5)"
    )
    parser.add_argument(
        "--max-reply-mb",
        type=_size,
        default=64,
        help="MiB of activations in a reply; a larger run is kept, to be fetched in ranges (default 64)",
    )
    parser.add_argument(
        "--captures-dir", type=Path, metavar="DIR", help="keep captures here, over restarts (default: while it runs)"
    )
    parser.add_argument(
        "--captures-max-gb", type=_size, default=4, metavar="GB", help="GiB that captures may take (default 4)"
    )
    parser.add_argument(
        "--captures-max-age",
        type=_lifetime,
        default=3600.0,
        metavar="SECONDS",
        help="delete a capture that nobody has read for so long (default 3600)",
    )
    parser.add_argument(
        "--experiments",
        type=Path,
        metavar="DIR",
        help="let requests watch the trait vectors of the experiments in this folder (default: only vectors that they "
        "bring)",
    )
    parser.add_argument(
        "--mechint",
        type=Path,
        metavar="DIR",
        help="let requests analyse the activations that were captured to this folder during training (default: only "
        "those that they bring)",
    )
    parser.add_argument(
        "--compress-binary", action="store_true", help="compress npy and safetensors too, for those who ask"
    )
    parser.add_argument(
        "--log-level",
        default="warning",
        choices=["debug", "info", "warning", "error"],
        help="info writes a line per request, debug tracebacks (default warning)",
    )
    parser.add_argument("--log-format", default="text", choices=logs.FORMATS, help="(default text)")
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text!r}")
    return int(text)


def _up_to(most: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"a number from 1 to {most}, not {text!r}")
        return int(text)

    return count


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"seconds from 0 to 86400, not {text!r}")
    return seconds


def _lifetime(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= 10 * 365 * 86400:
        raise argparse.ArgumentTypeError(f"seconds from 1 to {10 * 365 * 86400}, not {text!r}")
    return seconds


def _most_of_memory() -> int:
    return int(0.7 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size <= 4096:
        raise argparse.ArgumentTypeError(f"a size is a number of MiB above 0, at most 4096, not {text!r}")
    return size


if __name__ == "__main__":
    sys.exit(main())
