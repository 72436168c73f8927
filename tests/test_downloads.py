"""Downloads: read a stretch at a time, whatever was selected; what HTTP says about parts and encodings."""

import gzip
import io
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from waitress.buffers import ReadOnlyFileBasedBuffer

from api_server import ModelWorker, ServerConfig, create_app
from api_server.app import close_app
from api_server.captures import Capture, CaptureAbout, CaptureStore
from api_server.downloads import Pieces
from api_server.errors import ApiError
from api_server.ranges import select, sources
from api_server.scratch import room

ROW_AXES = ["batch", "pos", "head", "d_head"]
KEY_AXES = ["batch", "head", "query", "key"]
N_HEADS = 4


def record(axes: list[str], positions: tuple[int, int], point: str = "blocks.0.attn.hook_z", **changes: Any) -> Any:
    return {
        "hook_id": point.rsplit(".", 1)[-1],
        "layer_name": "blocks.0",
        "component": point.rsplit(".", 1)[-1],
        "hook_point": point,
        "layer_index": 0,
        "axes": axes,
        "phase": "decode" if positions[0] else "prefill",
        "step": positions[0],
        "pass_index": 0,
        "positions": positions,
        "is_input": False,
    } | changes


def keep(store: CaptureStore, *arrays: tuple[dict[str, Any], np.ndarray]) -> str:
    ends = [about["positions"][1] for about, _ in arrays]
    with store.begin() as writer:
        for about, array in arrays:
            writer.add(about, array)
        writer.finish(
            CaptureAbout(
                model="tiny",
                n_layers=1,
                n_heads=N_HEADS,
                tokens={"ids": [0] * max(ends), "strings": [""] * max(ends), "prompt_length": ends[0]},
                hooks={about["hook_id"]: {} for about, _ in arrays},
            )
        )
    return writer.capture_id


@pytest.fixture
def store() -> Iterator[CaptureStore]:
    store = CaptureStore()
    yield store
    store.close()


@pytest.fixture
def runs(store: CaptureStore) -> tuple[Capture, dict[str, np.ndarray]]:
    """A batch of rows and a pattern, of a prompt and three steps, and the whole arrays."""
    random, steps = np.random.default_rng(0), [(0, 5), (5, 6), (6, 7), (7, 8)]
    rows = random.standard_normal((3, 8, N_HEADS, 5)).astype(np.float32)
    pattern = np.tril(random.standard_normal((1, N_HEADS, 8, 8))).astype(np.float32)
    written = []
    for start, stop in steps:
        written.append((record(ROW_AXES, (start, stop)), rows[:, start:stop]))
        point = "blocks.0.attn.hook_pattern"
        written.append((record(KEY_AXES, (start, stop), point), pattern[:, :, start:stop, :stop]))
    return store.get(keep(store, *written)), {"hook_z": rows, "hook_pattern": pattern}


def cut(array: np.ndarray, name: str, positions: list[int], heads: list[int]) -> np.ndarray:
    at, head_at = (1, 2) if name == "hook_z" else (2, 1)
    return array.take(positions, at).take(heads, head_at)


SELECTIONS: list[tuple[str | None, list[int], str | None, list[int]]] = [
    (None, list(range(8)), None, [0, 1, 2, 3]),
    ("1,3,6", [1, 3, 6], None, [0, 1, 2, 3]),
    ("4:", [4, 5, 6, 7], "1:3", [1, 2]),
    ("-3:", [5, 6, 7], "0,3", [0, 3]),
    (":5", [0, 1, 2, 3, 4], "2", [2]),
]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("block", [1, 60, 250, 2**20])
def test_every_part_is_a_part_of_the_whole(
    runs: Any, monkeypatch: pytest.MonkeyPatch, block: int, selection: Any, dtype: str
) -> None:
    monkeypatch.setattr("api_server.ranges.BLOCK_BYTES", block)
    capture, arrays = runs
    positions, rows, heads, columns = selection
    tensors = select(capture, positions=positions, heads=heads)
    expected = b"head" + b"".join(
        cut(arrays[tensor.about["hook_id"]], tensor.about["hook_id"], rows, columns).astype(dtype).tobytes()
        for tensor in tensors
    )
    random = np.random.default_rng(block)
    spans = [(0, len(expected)), *np.sort(random.integers(0, len(expected) + 1, (12, 2))).tolist()]
    for start, stop in spans:
        file, got = Pieces([b"head", *sources(tensors, dtype)], start, stop), b""
        file.ready()
        while part := bytes(file.read(97)):
            # The HTTP server reads a place again until the socket has taken it.
            file.seek(file.tell() - len(part))
            assert bytes(file.read(97)) == part
            got += part
        assert got == expected[start:stop], (start, stop)
    for tensor in tensors:
        name = tensor.about["hook_id"]
        assert np.array_equal(tensor.array(dtype), cut(arrays[name], name, rows, columns).astype(dtype))


def test_reductions_are_read_in_parts_too(runs: Any) -> None:
    capture, arrays = runs
    tensors = select(capture, positions="2:", reduce="max")
    expected = b"".join(
        arrays[name].take(range(2, 8), at).max(axis=at).tobytes()
        for name, at in ((tensor.about["hook_id"], 1 if "z" in tensor.name else 2) for tensor in tensors)
    )
    file = Pieces(sources(tensors, "float32"), 10, 100)
    file.ready()
    assert bytes(file.read()) == expected[10:100]


@pytest.mark.parametrize("query", [{"heads": "0,2"}, {"heads": "1"}, {"positions": "0:900"}, {}])
def test_a_download_holds_a_stretch_whatever_its_size(store: CaptureStore, query: dict[str, str]) -> None:
    size = (1, 1000, N_HEADS, 512)
    written = [
        (record(ROW_AXES, (0, 1000), f"blocks.{i}.attn.hook_z", hook_id=f"z{i}"), np.full(size, i, np.float32))
        for i in range(4)
    ]
    capture = store.get(keep(store, *written))
    del written
    tensors = select(capture, **query)
    tracemalloc.start()
    try:
        file = Pieces(sources(tensors, "float16"))
        file.ready()
        taken = 0
        while part := file.read(2**16):
            taken += len(part)
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken == sum(tensor.nbytes("float16") for tensor in tensors) > 3 * 2**20
    assert held < 4 * 2**20, "more than the stretch that is read"


def test_what_float16_cannot_hold_is_said_before_the_first_byte(store: CaptureStore) -> None:
    array = np.zeros((1, 900, N_HEADS, 512), np.float32)
    array[0, 899, 3, 511] = 1e6
    tensors = select(store.get(keep(store, (record(ROW_AXES, (0, 900)), array))))
    with pytest.raises(ApiError, match="float16") as refusal:
        Pieces(sources(tensors, "float16")).ready()
    assert (refusal.value.status, refusal.value.param) == (400, "dtype")


# HTTP


MIB = 2**20


@pytest.fixture
def client() -> Iterator[tuple[FlaskClient, str]]:
    """A server that compresses binary too, and the address of a capture of 4 MiB."""
    app = create_app(ModelWorker(), ServerConfig(compress_binary=True, port=0))
    array = np.zeros((1, 512, N_HEADS, 512), np.float32)
    capture_id = keep(app.extensions["captures"], (record(ROW_AXES, (0, 512)), array))
    yield app.test_client(), f"/v1/captures/{capture_id}/activations"
    close_app(app)


def test_parts_are_those_of_the_standard(client: Any) -> None:
    http, address = client
    npy = f"{address}?format=npy"
    whole = http.get(npy)
    size = len(whole.data)
    for asked, start, stop in [(f"bytes=-{size + 9}", 0, size), ("bytes=-3", size - 3, size), ("bytes=0-0", 0, 1)]:
        part = http.get(npy, headers={"Range": asked})
        assert part.status_code == 206, asked
        assert part.data == whole.data[start:stop]
        assert part.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
    for asked in ("bytes=-0", f"bytes={size}-"):
        assert http.get(npy, headers={"Range": asked}).status_code == 416, asked
    for asked in ("bytes=5-2", "bytes=-", "lines=1-2", "bytes=0-1,3-4", "bytes=a-b"):
        assert http.get(npy, headers={"Range": asked}).status_code == 200, asked


def test_if_match_names_the_bytes_that_are_wanted(client: Any) -> None:
    http, address = client
    etag = http.get(f"{address}?format=npy").headers["ETag"]
    for asked, status in {etag: 200, "*": 200, '"other"': 412, f"W/{etag}": 412}.items():
        reply = http.get(f"{address}?format=npy", headers={"If-Match": asked})
        assert reply.status_code == status, asked
    assert http.get(address, headers={"If-Match": '"other"'}).json["error"]["code"] == "precondition_failed"


def test_every_answer_says_that_it_varies(client: Any) -> None:
    http, address = client
    npy = f"{address}?format=npy"
    etag = http.get(npy).headers["ETag"]
    head = http.head(npy)
    assert (head.status_code, head.content_length, head.data) == (200, http.get(npy).content_length, b"")
    replies = [head, http.get(npy, headers={"If-None-Match": etag}), http.get(npy, headers={"Range": "bytes=0-1"})]
    assert [reply.status_code for reply in replies] == [200, 304, 206]
    assert all(reply.headers["Vary"] == "Accept-Encoding" for reply in replies)


ENCODINGS = {
    "gzip": "gzip",
    "gzip;q=0": None,
    "gzip; q=0, *;q=0": None,
    "zstd;q=0, gzip": "gzip",
    "*": "zstd",
    "zstd;q=0, *": "gzip",
    "identity, gzip;q=0.5": None,
    "deflate": None,
    "": None,
}


@pytest.mark.parametrize("asked", ENCODINGS)
@pytest.mark.parametrize("large", [False, True])
def test_nothing_is_compressed_for_who_refuses_it(
    client: Any, monkeypatch: pytest.MonkeyPatch, asked: str, large: bool
) -> None:
    if large:
        monkeypatch.setattr("api_server.downloads.IN_MEMORY_BYTES", 100)
    http, address = client
    for query in ("?format=npy", "?positions=0:9"):
        reply = http.get(address + query, headers={"Accept-Encoding": asked})
        assert reply.headers.get("Content-Encoding") == ENCODINGS[asked]


def test_binary_is_compressed_while_it_is_sent(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    http, address = client
    read: list[int] = []
    original = Pieces.read

    def counted(self: Pieces, size: int = -1) -> memoryview:
        read.append(size)
        return original(self, size)

    class Wrapper(ReadOnlyFileBasedBuffer):
        """The HTTP server's: it has a length."""

        def __len__(self) -> int:
            return 4 * MIB

    monkeypatch.setattr(Pieces, "read", counted)
    headers = {"Accept-Encoding": "gzip"}
    with http.get(
        f"{address}?format=npy", headers=headers, environ_overrides={"wsgi.file_wrapper": Wrapper}, buffered=False
    ) as reply:
        parts = reply.iter_encoded()
        first = next(parts)
        assert len(read) <= 3, "the whole file was read before the first byte"
        packed = first + b"".join(parts)
    assert "Content-Length" not in reply.headers
    assert np.load(io.BytesIO(gzip.decompress(packed))).shape == (1, 512, N_HEADS, 512)


FULL_DISK = """
import resource, sys, tempfile
import numpy as np
from flask import Flask
from api_server import downloads, scratch
from api_server.errors import CapturesUnwritable

scratch.IN_MEMORY_BYTES = downloads.IN_MEMORY_BYTES = 100
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    scratch.room((2**20,), np.dtype(np.float32))[:] = 1
except CapturesUnwritable as error:
    print(error.status)
app = Flask("x")
with app.test_request_context():
    print(len(downloads.large_json({"x": "y" * 2**20}).get_data()))
"""


def test_a_disk_that_is_full_ends_no_process() -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["507", str(2**20 + 8)]), done.stderr


def test_a_file_has_its_blocks_before_it_is_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    original = np.memmap

    def mapping(file: Any, *arguments: Any, **options: Any) -> Any:
        taken.append(os.fstat(file.fileno()).st_blocks * 512)
        return original(file, *arguments, **options)

    monkeypatch.setattr("api_server.scratch.IN_MEMORY_BYTES", 100)
    monkeypatch.setattr("numpy.memmap", mapping)
    room((3 * MIB,), np.dtype(np.uint8))
    assert taken[0] >= 3 * MIB, "a hole: the process would end where the disk is full"
