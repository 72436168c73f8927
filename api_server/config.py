"""What the server allows, and to whom."""

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .schemas.fields import MAX_HOOKS, MAX_TOKENS


@dataclass(frozen=True)
class ServerConfig:
    """What the server allows.

    Args:
        host: the address it listens on. On a loopback address only requests that name a loopback host are answered,
            so that a page in a browser cannot reach the server under a name of its own (DNS rebinding).
        port: 0 lets the system choose.
        api_key: if set, every address but ``/health`` and the description wants ``Authorization: Bearer``.
        allowed_hosts: further names that requests may call the server by, such as that of a proxy before it. On an
            address other than loopback the name is only looked at if there are any.
        cors_origins: pages of these origins, ``https://lab.example:8000``, may use the server from a browser; ``*``
            lets in the pages of all.
        model_roots: folders from which models may be loaded by path; no link in a model's folder may lead out of them.
            Without a key none means any folder; with one, none. The bundled model and Hugging Face ids are always
            allowed.
        max_body_bytes: the largest request body.
        max_tokens: the most tokens that one request may generate, all its choices together.
        max_hooks: the most hooks of one request, and the most registered for one model.
        max_queued: how many requests may wait for the worker; one more is answered 503.
        max_active: how many requests run at a time, token by token in turn.
        max_connections: how many connections are open at a time; further ones wait to be accepted.
        max_model_bytes: how many bytes of weights may be loaded; None for no limit.
        grace_seconds: how long running requests may go on once the server was asked to stop.
        max_reply_bytes: the most bytes of activations, before encoding, in a JSON reply or stream; a larger run is
            kept as a capture, and the reply says how to fetch it.
        captures_dir: where captures are kept, and found again at the next start; a temporary folder if None.
        captures_max_bytes: how many bytes on disk captures may take; those unused for longest make room.
        captures_max_age: seconds after which a capture that nobody reads is deleted.
        experiments: the folder with experiments whose trait vectors requests may name; None for none.
        mechint: the folder with activations captured during training, which requests may analyse; None for none.
        compress_binary: whether npy and safetensors are compressed on ``Accept-Encoding``, as JSON is.

    Raises:
        ValueError: an origin is none, no request could give the key, or a limit is beyond what the server can do.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    model_roots: tuple[Path, ...] = ()
    max_body_bytes: int = 32 * 2**20
    max_tokens: int = MAX_TOKENS
    max_hooks: int = MAX_HOOKS
    max_queued: int = 64
    max_active: int = 4
    max_connections: int = 200
    max_model_bytes: int | None = None
    grace_seconds: float = 5.0
    max_reply_bytes: int = 64 * 2**20
    captures_dir: Path | None = None
    captures_max_bytes: int = 4 * 2**30
    captures_max_age: float = 3600.0
    experiments: Path | None = None
    mechint: Path | None = None
    compress_binary: bool = False

    def __post_init__(self) -> None:
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ValueError(f"An origin looks like https://lab.example or http://localhost:3000, not {origin!r}.")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            raise ValueError(
                "An API key is printable ASCII with no blank before or after it: no request could send this one."
            )
        for name, most in (("max_tokens", MAX_TOKENS), ("max_hooks", MAX_HOOKS)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be from 1 to {most}, got {getattr(self, name)}.")

    @property
    def is_local(self) -> bool:
        return is_loopback(self.host)

    def admits_host(self, host: str) -> bool:
        """Whether a request may call the server by this name, without its port."""
        if is_loopback(host) or host.lower() in (allowed.lower() for allowed in self.allowed_hosts):
            return True
        return not self.is_local and not self.allowed_hosts

    def admits_folder(self, path: Path) -> bool:
        """Whether a model may be loaded from a path; what a link points to counts, also of those inside the folder."""
        if not self.model_roots:
            return self.api_key is None
        roots = [root.expanduser().resolve() for root in self.model_roots]

        def is_inside(path: Path) -> bool:
            found = path.resolve()
            return any(found.is_relative_to(root) for root in roots)

        # Of the files in it a loader reads those that it has a name for, and of folders those with chat templates.
        return is_inside(path) and all(is_inside(file) for depth in ("*", "*/*") for file in _links(path, depth))


def _links(folder: Path, pattern: str) -> Iterator[Path]:
    return (path for path in folder.glob(pattern) if path.is_symlink())


_KEY = re.compile(r"[!-~]([ -~]*[!-~])?")
_ORIGIN = re.compile(r"https?://[^\s/?#@*,]+")


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only: ``is_loopback("127.0.0.1")``."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
