"""Smalltalk from Python: an Amber image with the generated classes filed in, and a server that only replays."""

from __future__ import annotations

import io
import json
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from werkzeug.formparser import parse_form_data

from neuroscope_bridge.payload import dumps, encode_activation

HARNESS = Path(__file__).parent / "smalltalk"


class SmalltalkError(Exception):
    """An exception that nothing handled in Smalltalk, with its class, message, status, code and body."""

    def __init__(self, details: dict[str, Any]) -> None:
        super().__init__(f"{details['class']}: {details['message']}")
        self.details = details


def compile_classes(*files: Path) -> dict[str, Any]:
    """File the chunk files in: `{"classes": {name: {superclass, comment, selectors}}, "problems": [...]}`."""
    done = subprocess.run(_node("compile", files), capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout, done.stderr
    return _result(done.stdout)


class Image:
    """A running image.

        with Image(chunk_file) as image:
            image.evaluate("x := 3. x + 4")      # 7

    Dictionaries, collections, numbers, strings, booleans and nil become Python's; nan and infinities are
    floats; anything else is its printString.

    With `counting` the image knows which methods in the files never ran.
    """

    def __init__(self, *files: Path, counting: bool = False) -> None:
        self._process = subprocess.Popen(
            _node("count" if counting else "run", files),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._log = threading.Thread(target=self._read_log, daemon=True)
        self._lines: list[str] = []
        self._log.start()

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._log.join()
        self._process.stdout.close()
        self._process.stderr.close()

    def evaluate(self, script: str) -> Any:
        """The value of the script's last statement. Raises SmalltalkError."""
        return self._ask(script)

    def run_tests(self) -> dict[str, dict[str, str]]:
        """Run every TestCase: `{"Class>>testSelector": {outcome, message}}`; passed, failed, error or skipped."""
        return self._ask({"do": "tests"})

    def methods_not_run(self) -> list[str]:
        """`Class>>selector` of every method in the files that nothing has run in this image, which must be counting."""
        return self._ask({"do": "unrun"})

    def _ask(self, request: Any) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the image ended: " + "".join(self._lines[-40:])
        return _result(line)

    def _read_log(self) -> None:
        for line in self._process.stderr:
            self._lines.append(line)


def _node(command: str, files: tuple[Path, ...]) -> list[str]:
    assert (HARNESS / "node_modules" / "amber").exists(), "Amber is missing: run `make setup`"
    return ["node", str(HARNESS / "run.js"), command, *map(str, files)]


def _result(line: str) -> Any:
    answer = json.loads(line, object_hook=_float_or_dict)
    if "error" in answer:
        raise SmalltalkError(answer["error"])
    return answer["result"]


def _float_or_dict(pairs: dict[str, Any]) -> Any:
    return float(pairs["float"]) if pairs.keys() == {"float"} else pairs


def form_of(headers: Mapping[str, str], body: bytes) -> dict[str, str] | None:
    """The texts of a form by name, of a file the name that it has; None for another body."""
    if not (headers.get("Content-Type") or "").startswith("multipart/form-data"):
        return None
    environ = {
        "REQUEST_METHOD": "POST",
        "CONTENT_TYPE": headers["Content-Type"],
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
    }
    _, texts, files = parse_form_data(environ)
    names = {name: file.filename or "" for name, file in files.items()}
    for file in files.values():
        file.close()
    return texts.to_dict() | names


@contextmanager
def canned_server(replies: dict[str, Any]) -> Iterator[SimpleNamespace]:
    """A server that answers `replies["GET /health"]` and the like, and keeps the `requests` it got.

    A reply is an object to send as JSON with status 200, or a pair of status and text, or a pair of status and
    object, or a function that is called with the handler and does it all.
    """
    seen: list[SimpleNamespace] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            seen.append(
                SimpleNamespace(
                    method=self.command,
                    path=self.path,
                    headers=dict(self.headers),
                    json=json.loads(body) if body and "json" in self.headers["Content-Type"] else None,
                    form=form_of(self.headers, body),
                )
            )
            reply = replies.get(f"{self.command} {self.path}", (404, "no such route"))
            if callable(reply):
                reply(self)
            else:
                self.send(*(reply if isinstance(reply, tuple) else (200, reply)))

        do_GET = do_POST = do_DELETE = answer

        def send(self, status: int, reply: Any) -> None:
            body = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield SimpleNamespace(base_url=f"http://127.0.0.1:{server.server_port}", requests=seen, replies=replies)
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def literal(text: str) -> str:
    """`text` as Smalltalk writes it."""
    return "'" + text.replace("'", "''") + "'"


def client(server: Any) -> str:
    """The expression of a client of `server`, which has a `base_url`."""
    return f"(LMStudioRESTClient baseUrl: {literal(server.base_url)})"


def record(
    array: Any,
    component: str = "residual",
    layer: int = 0,
    encoding: str = "base64",
    dtype: str = "float32",
    **fields: Any,
) -> dict[str, Any]:
    """A record as it arrives in JSON."""
    array = np.asarray(array)
    axes = ("batch", "head", "query", "key") if component.startswith("attention_") else ("batch", "pos", "d_model")
    fields = {"phase": "prefill", "step": 0, "positions": (0, array.shape[-2]), "is_input": False} | fields
    point = {"attention_pattern": "attn.hook_pattern", "attention_scores": "attn.hook_attn_scores"}.get(component)
    encoded = encode_activation(
        array,
        hook_id=fields.pop("hook_id", f"layer_{layer}_{component}"),
        layer_name=f"transformer.h.{layer}",
        component=component,
        hook_point=f"blocks.{layer}.{point or 'hook_' + component}",
        layer_index=layer,
        axes=axes,
        encoding=encoding,
        dtype=dtype,
        **fields,
    )
    return json.loads(dumps(encoded))


def serve_records(server: SimpleNamespace, *records: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Let a canned server answer the records, by hook id, where `tensors` asks for them."""
    activations: dict[str, list[dict[str, Any]]] = {}
    for each in records:
        activations.setdefault(each["hook_id"], []).append(each)
    server.replies["GET /health"] = {"activations": activations}
    return activations


def tensors(server: SimpleNamespace) -> str:
    """The expression of the served records' tensors: a Dictionary from hook id to a collection."""
    return f"({client(server)} convertActivationsForNeuroScope: ({client(server)} health at: 'activations'))"


def bits(values: Any, dtype: Any = np.float32) -> str:
    """The numbers as bits in hex, which tell 0.0 from -0.0."""
    return np.array(values, dtype).tobytes().hex()


AS_DICTIONARIES = "circuits collect: [ :each | each asDictionary ]"


def same_circuits(smalltalk: list[dict[str, Any]], python: list[dict[str, Any]]) -> None:
    """Whether `AS_DICTIONARIES` of a CircuitFinder's circuits are what the Python bridge finds in the same capture."""
    assert [each["name"] for each in smalltalk] == [each["name"] for each in python]
    for ours, theirs in zip(smalltalk, python, strict=True):
        assert ours["confidence"] == pytest.approx(theirs["confidence"], rel=1e-5, abs=1e-9)
        assert ours["components"] == theirs["components"]
        assert len(ours["pathway"]) == len(theirs["pathway"])
        assert "orrelational" in ours["description"]
