"""The Smalltalk client as one text that any Pharo image can file in."""

from __future__ import annotations

from importlib import resources
from typing import Protocol

TEMPLATE = "LMStudioRESTClient.st"
_DEFAULT_URL = "^ 'http://127.0.0.1:8080'"

_HEADER = """\
NeuroScope for MLX: the whole of the package NeuroScope-Core in one file, for Pharo 11 to 13.
File me in: 'LMStudioRESTClient.st' asFileReference fileIn.
Then, in a playground: LMStudioRESTClient default health.
LMStudioRESTClient default talks to {url}"""


class HasBaseUrl(Protocol):
    """Anything that knows where its server is, such as `LMStudioNeuroScopeClient`."""

    @property
    def base_url(self) -> str: ...


def generate_neuroscope_smalltalk_interface(client: HasBaseUrl) -> str:
    """The package NeuroScope-Core in chunk format: `LMStudioRESTClient`, with `default` set to the client's server,
    tensors, hooks and analysis.

        client = LMStudioNeuroScopeClient("http://127.0.0.1:9000")
        Path("LMStudioRESTClient.st").write_text(generate_neuroscope_smalltalk_interface(client))

    In Pharo, `'LMStudioRESTClient.st' asFileReference fileIn`, then `LMStudioRESTClient default health`.
    The text is ASCII, the same in every image.

    Raises:
        ValueError: the client's `base_url` has characters that a URL cannot have.
    """
    url = client.base_url
    if not (url.isascii() and url.isprintable() and " " not in url):
        raise ValueError(f"Not a URL: {url!r}. Expected printable ASCII without spaces.")
    template = (resources.files(__package__) / "templates" / TEMPLATE).read_text(encoding="ascii")
    before, found, after = template.partition(_DEFAULT_URL)
    if not found or _DEFAULT_URL in after:
        raise RuntimeError(f"{TEMPLATE} is damaged: it must hold {_DEFAULT_URL} exactly once.")
    return f"{_chunk(_literal(_HEADER.format(url=url)))}\n\n{before}^ {_escape(_literal(url))}{after}"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _escape(text: str) -> str:
    return text.replace("!", "!!")


def _chunk(text: str) -> str:
    return _escape(text) + "!"
