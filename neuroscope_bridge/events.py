"""The events of a streamed generation, read from the connection as they come."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from types import TracebackType

import requests

from .errors import ResponseFormatError, ServerUnreachableError
from .replies import Reply, chunks, error_of, parse, quoted, with_arrays


class EventStream:
    """The events of a streamed generation, each as soon as it comes.

        with client.generate_with_activations(messages, hooks, stream=True) as events:
            for event in events:
                print(event["choices"][0]["delta"].get("content", ""), end="")
                event.get("activations")      # of this step, as numpy arrays

    `close`, or leaving the `with`, closes the connection, which ends the generation on the server. An
    iterator that is read to its end closes itself.

    Raises:
        NeuroScopeAPIError: the server reported an error in the stream (its `status` is None).
        ServerUnreachableError: the connection broke before the end of the stream.
        ServerTimeoutError: nothing came for the client's `timeout`.
        ResponseFormatError: an event that is not JSON, or damaged activations.
    """

    def __init__(self, response: requests.Response, source: str, timeout: float) -> None:
        self._response = response
        kind = response.headers.get("Content-Type", "")
        if not kind.startswith("text/event-stream"):
            response.close()
            raise ResponseFormatError(f"{source}: expected an event stream, got {kind or 'no content type'!r}.")
        # Not a method of this object: a cycle would leave the connection open until the garbage collector comes.
        self._events = _events(response, source, timeout)

    def __iter__(self) -> EventStream:
        return self

    def __next__(self) -> Reply:
        return next(self._events)

    def __enter__(self) -> EventStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the iterator has ended then. Safe to call twice."""
        self._events.close()
        self._response.close()


def _events(response: requests.Response, source: str, timeout: float) -> Generator[Reply, None, None]:
    try:
        for text in parse_event_stream(chunks(response, source, timeout)):
            if text == "[DONE]":
                return
            event = parse(text)
            if not isinstance(event, dict):
                raise ResponseFormatError(f"{source}: expected a JSON object as event, got {quoted(text)}.")
            if event.get("error") is not None:
                raise error_of(event, None, source)
            yield with_arrays(event, source)
        raise ServerUnreachableError(f"{source}: the stream ended before its [DONE].")
    finally:
        response.close()


def parse_event_stream(chunks: Iterable[bytes]) -> Iterator[str]:
    """The data of each server-sent event in a stream of bytes, cut anywhere.

        list(parse_event_stream([b"data: {\\"a\\"", b": 1}\\n\\n: comment\\ndata: [DONE]\\n\\n"]))
        # ['{"a": 1}', '[DONE]']

    Lines end in LF, CRLF or CR; several `data` lines of one event are joined by LF; comments and other
    fields are skipped; an event that no empty line finishes is dropped. All as the standard says
    (https://html.spec.whatwg.org/multipage/server-sent-events.html).

    Raises:
        ResponseFormatError: a line that is not UTF-8.
    """
    data: list[str] = []
    for line in _lines(chunks):
        if not line:
            if data:
                yield "\n".join(data)
            data = []
            continue
        field, _, value = line.partition(b":")
        if field == b"data":
            try:
                data.append(value.removeprefix(b" ").decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ResponseFormatError(f"An event is not UTF-8: {error}") from error


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Complete lines without their ends; bytes are cut, not text, so no character is split."""
    pending: list[bytes] = []
    mark = b"\xef\xbb\xbf"  # a byte-order mark may open the stream
    for chunk in chunks:
        pending.append(chunk)
        if b"\n" not in chunk and b"\r" not in chunk:
            continue
        lines = b"".join(pending).splitlines(keepends=True)
        # A CR at the end may be half of a CRLF: its line waits for what follows.
        pending = [] if lines[-1].endswith(b"\n") else [lines.pop()]
        for line in lines:
            yield line.rstrip(b"\r\n").removeprefix(mark)
            mark = b""
    rest = b"".join(pending)
    if rest.endswith(b"\r"):
        yield rest[:-1].removeprefix(mark)
