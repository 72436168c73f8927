"""The store of captures: its bounds, its files, what survives an end without notice."""

import errno
import io
import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from server_tools import load_tiny, running_server, server_process, url_of

from api_server import ModelWorker, ServerConfig, create_app
from api_server.app import close_app
from api_server.captures import BLOCK, CannotOpenCaptures, Capture, CaptureAbout, CaptureStore
from api_server.errors import CapturesBusy, CapturesUnwritable, CaptureTooLarge, UnknownCapture
from api_server.ranges import ReducedBytes, select
from neuroscope_bridge.payload import decode_activation, read_safetensors, stack_records

ABOUT = CaptureAbout(
    model="tiny",
    n_layers=2,
    n_heads=4,
    tokens={"ids": [1, 2, 3], "strings": ["a", "b", "c"], "prompt_length": 2},
    hooks={"r0": {"fired": 1, "positions": [0, 2], "bytes": 0}},
)
SMALL = 3 * BLOCK
"""What one array of up to a block takes on disk: its file, the manifest's, the folder."""


class Clock:
    """The time, as the test says."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def fields(step: int = 0, positions: tuple[int, int] = (0, 2), **changes: Any) -> dict[str, Any]:
    return {
        "hook_id": "r0",
        "layer_name": "blocks.0",
        "component": "residual",
        "hook_point": "blocks.0.hook_resid_post",
        "layer_index": 0,
        "axes": ["batch", "pos", "d_model"],
        "phase": "decode" if step else "prefill",
        "step": step,
        "pass_index": 0,
        "positions": positions,
        "is_input": False,
    } | changes


def keep(store: CaptureStore, array: np.ndarray | None = None, **changes: Any) -> str:
    array = np.arange(8, dtype=np.float32).reshape(1, 2, 4) if array is None else array
    with store.begin() as writer:
        writer.add(fields(positions=(0, array.shape[1]), **changes), array)
        writer.finish(ABOUT)
    return writer.capture_id


def ids(store: CaptureStore) -> list[str]:
    return [entry.capture_id for entry in store.captures()]


def the_array(capture: Capture) -> np.ndarray:
    return capture.array(capture.records[0])


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_store(clock: Clock) -> Iterator[Callable[..., CaptureStore]]:
    made: list[CaptureStore] = []

    def make(folder: Path | None = None, **limits: Any) -> CaptureStore:
        made.append(CaptureStore(folder, clock=clock, **limits))
        return made[-1]

    yield make
    for store in made:
        store.close()


MakeStore = Callable[..., CaptureStore]


# Files


def test_what_was_written_is_read_back_bit_for_bit(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    random = np.random.default_rng(0)
    written = [
        random.standard_normal((1, 3, 5)).astype(np.float32),
        np.array([[[np.nan, -np.inf, 0.0, -0.0]]], np.float32),
        np.arange(6, dtype=np.int32).reshape(1, 6, 1),
        np.empty((1, 0, 4), np.float32),
        np.float16([[[1.5]]]),
        random.standard_normal((4, 3, 1)).astype(np.float32).transpose(2, 1, 0),
    ]
    with store.begin() as writer:
        for array in written:
            writer.add(fields(), array)
        writer.finish(ABOUT)
    capture = store.get(writer.capture_id)
    for record, array in zip(capture.records, written, strict=True):
        assert record.offset % 64 == 0
        found = capture.array(record)
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
        assert not found.flags.writeable


def test_a_range_reads_its_bytes_only(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    array = np.arange(2**20, dtype=np.float32).reshape(1, 1024, 1024)
    (tensor,) = select(store.get(keep(store, array)), positions="7:9")
    piece: Any = tensor.array()
    while not isinstance(piece, np.memmap):
        assert isinstance(piece, memoryview) or not piece.flags.owndata
        piece = piece.obj if isinstance(piece, memoryview) else piece.base
    assert np.array_equal(tensor.array(), array[:, 7:9])


def test_the_folder_is_for_this_user_only_and_what_is_strange_in_it_stays(
    make_store: MakeStore, tmp_path: Path
) -> None:
    folder = tmp_path / "made" / "captures"
    first = make_store(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    first.close()
    strange = [folder / "notes.txt", folder / ("cap-" + "g" * 32), folder / "x" / "data.bin", folder / ".writing-x"]
    for path in strange:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "data.bin").write_text("mine")
    (folder / (".writing-cap-" + "0" * 32)).symlink_to(outside)
    store = make_store(folder)
    capture_id = keep(store)
    (folder / capture_id / "notes.txt").write_text("mine")
    store.clear()
    assert ids(store) == []
    assert all(path.read_text() == "mine" for path in [*strange, outside / "data.bin"])
    assert [path.read_text() for path in folder.glob(".writing-cap-*/notes.txt")] == ["mine"]


def test_two_servers_do_not_share_a_folder(make_store: MakeStore, tmp_path: Path) -> None:
    first = make_store(tmp_path)
    with pytest.raises(CannotOpenCaptures, match="another server"):
        make_store(tmp_path)
    first.close()
    make_store(tmp_path)


def test_a_folder_that_cannot_be_is_one_sentence(make_store: MakeStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotOpenCaptures, match="cannot be kept in"):
        make_store(tmp_path / "file" / "captures")


def test_without_a_folder_captures_go_with_the_store(make_store: MakeStore) -> None:
    store = make_store()
    assert store._folder is None, "an app that keeps nothing makes no folder"
    keep(store)
    folder = store._folder
    assert folder is not None
    assert folder.exists()
    store.close()
    assert not folder.exists()


def test_what_a_killed_server_left_in_the_temporary_folder_is_cleared_away(
    make_store: MakeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    running, left = make_store(), tmp_path / "neuroscope-captures-left"
    keep(running)
    left.mkdir()
    (left / ".lock").touch()
    (left / "data.bin").write_text("x")
    for lock in tmp_path.glob("*/.lock"):
        os.utime(lock, (0, 0))
    keep(make_store())
    assert not left.exists()
    assert len(ids(running)) == 1
    assert the_array(running.get(ids(running)[0])).size == 8


# Bounds


def test_captures_unused_for_longest_make_room(make_store: MakeStore, tmp_path: Path, clock: Clock) -> None:
    store = make_store(tmp_path, max_bytes=3 * SMALL)
    made = []
    for _ in range(3):
        made.append(keep(store))
        clock.now += 1
    assert store.disk_bytes == 3 * SMALL
    store.get(made[0])
    clock.now += 1
    made.append(keep(store))
    assert set(ids(store)) == {made[0], made[2], made[3]}
    assert {path.name for path in tmp_path.glob("cap-*")} == set(ids(store))
    keep(store, np.zeros((1, 1, BLOCK // 2), np.float32))
    assert len(ids(store)) == 2
    assert made[3] in ids(store)
    assert store.disk_bytes <= 3 * SMALL


def test_one_larger_than_all_is_refused_and_takes_nothing_with_it(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(tmp_path, max_bytes=3 * SMALL)
    small = keep(store)
    with pytest.raises(CaptureTooLarge, match=f"{3 * SMALL} bytes") as refusal:
        keep(store, np.zeros((1, 1, 10 * BLOCK), np.float32))
    assert refusal.value.status == 413
    assert ids(store) == [small]
    assert store.disk_bytes == SMALL
    assert len(list(tmp_path.iterdir())) == 2, "the lock and the small one"


def test_two_at_once_that_fill_the_store_together(make_store: MakeStore) -> None:
    store = make_store(max_bytes=4 * SMALL)
    half = np.zeros((1, 1, 5 * BLOCK // 4), np.float32)
    with store.begin() as one, store.begin() as two:
        one.add(fields(), half)
        with pytest.raises(CapturesBusy):
            two.add(fields(), np.concatenate([half, half], axis=1))
    assert store.disk_bytes == 0
    keep(store, half)


def test_one_that_may_not_be_needed_takes_no_room(make_store: MakeStore) -> None:
    store = make_store(max_bytes=3 * SMALL)
    kept = {keep(store) for _ in range(3)}
    with store.begin(claimed=False) as writer:
        writer.add(fields(), np.zeros((1, 2, BLOCK // 8), np.float32))
        assert set(ids(store)) == kept
        writer.claim()
        assert len(ids(store)) == 2
        writer.finish(ABOUT)
    assert writer.capture_id in ids(store)


def test_old_ones_go_unless_somebody_reads_them(make_store: MakeStore, clock: Clock, tmp_path: Path) -> None:
    store = make_store(tmp_path, max_age=100)
    old, read = keep(store), keep(store)
    clock.now += 60
    store.get(read)
    clock.now += 60
    assert ids(store) == [read]
    with pytest.raises(UnknownCapture, match=read):
        store.get(old)
    clock.now += 101
    assert ids(store) == []
    assert list(tmp_path.glob("*cap-*")) == []


def test_old_ones_go_though_the_clock_was_set_back_and_by_any_writing(
    make_store: MakeStore, clock: Clock, tmp_path: Path
) -> None:
    store = make_store(tmp_path, max_age=100)
    late = keep(store)
    clock.now -= 50
    early = keep(store)
    clock.now += 101
    assert ids(store) == [late], "the older one stands behind it in the order of use"
    clock.now += 50
    with store.begin():
        assert list(tmp_path.glob("cap-*")) == []
    assert early != late


def test_old_ones_go_though_nobody_asks(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    store = CaptureStore(tmp_path, max_age=0.1)
    housekeeping = set(threading.enumerate()) - before
    assert [thread.name for thread in housekeeping] == ["captures-housekeeping"]
    keep(store)
    deadline = time.monotonic() + 20
    while list(tmp_path.glob("cap-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob("*cap-*")) == []
    store.close()
    for thread in housekeeping:
        thread.join(20)
        assert not thread.is_alive()


# Restart


def test_captures_are_found_again_in_the_order_of_use(make_store: MakeStore, clock: Clock, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    arrays = [np.full((1, 2, 4), i, np.float32) for i in range(3)]
    made = []
    for array in arrays:
        made.append(keep(store, array))
        clock.now += 1
    store.get(made[0])
    bytes_before = store.disk_bytes
    store.close()
    store = make_store(tmp_path)
    assert ids(store) == made[::-1]
    assert store.disk_bytes == bytes_before
    for i in (1, 2, 0):
        clock.now += 1
        assert np.array_equal(the_array(store.get(made[i])), arrays[i])
    store.close()
    clock.now += 1
    assert ids(make_store(tmp_path, max_bytes=2 * SMALL)) == [made[2], made[0]]


def test_old_ones_are_not_found_again(make_store: MakeStore, clock: Clock, tmp_path: Path) -> None:
    store = make_store(tmp_path, max_age=100)
    keep(store)
    store.close()
    clock.now += 101
    assert ids(make_store(tmp_path, max_age=100)) == []


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "half a manifest": lambda folder: _edit(folder, lambda text: text[: len(text) // 2]),
    "no JSON object": lambda folder: _edit(folder, lambda text: "[]"),
    "not UTF-8": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe{"),
    "of another capture": lambda folder: _edit(folder, lambda text: text.replace(folder.name, "cap-" + "0" * 32)),
    "a later version": lambda folder: _edit(folder, lambda text: text.replace('"version":1', '"version":2')),
    "beyond the data": lambda folder: _edit(folder, lambda text: text.replace('"offset":0', '"offset":6400')),
    "negative": lambda folder: _edit(folder, lambda text: text.replace('"offset":0', '"offset":-64')),
    "another shape": lambda folder: _edit(folder, lambda text: text.replace("[1,2,4]", "[1,2,5]")),
    "another type": lambda folder: _edit(folder, lambda text: text.replace('"float32"', '"object"')),
    "no data": lambda folder: (folder / "data.bin").unlink(),
    "data cut short": lambda folder: os.truncate(folder / "data.bin", 31),
    "data too long": lambda folder: os.truncate(folder / "data.bin", 33),
    "data is a folder": lambda folder: ((folder / "data.bin").unlink(), (folder / "data.bin").mkdir()),
}


def _edit(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "manifest.json"
    before = path.read_text()
    assert change(before) != before
    path.write_text(change(before))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_reported_and_left_out(
    make_store: MakeStore, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path)
    good, bad = keep(store), keep(store)
    with caplog.at_level(logging.WARNING):
        DAMAGES[damage](tmp_path / bad)
        with pytest.raises(UnknownCapture):
            store.get(bad)
        store.close()
        store = make_store(tmp_path)
    assert ids(store) == [good]
    assert the_array(store.get(good)).size == 8
    assert len(caplog.messages) == 2
    assert all(bad in message and str(tmp_path) not in message for message in caplog.messages)


@pytest.mark.parametrize("found", ["at the start", "by a reader"])
def test_a_damaged_one_counts_and_is_the_first_to_make_room(
    make_store: MakeStore, tmp_path: Path, clock: Clock, found: str
) -> None:
    store = make_store(tmp_path, max_bytes=3 * SMALL, max_age=100)
    good, bad = keep(store), keep(store)
    (tmp_path / bad / "manifest.json").write_text("{")
    if found == "at the start":
        store.close()
        store = make_store(tmp_path, max_bytes=3 * SMALL, max_age=100)
    with pytest.raises(UnknownCapture):
        store.get(bad)
    assert (tmp_path / bad / "data.bin").exists()
    assert store.disk_bytes == 2 * SMALL
    made = [keep(store), keep(store)]
    assert set(ids(store)) == {good, *made}
    assert not (tmp_path / bad).exists()
    assert store.disk_bytes == 3 * SMALL


def test_a_damaged_one_can_be_deleted_and_grows_old(make_store: MakeStore, tmp_path: Path, clock: Clock) -> None:
    for remove in ("delete", "clear", "age"):
        store = make_store(tmp_path, max_age=100)
        bad = keep(store)
        (tmp_path / bad / "manifest.json").write_text("{")
        store.close()
        store = make_store(tmp_path, max_age=100)
        assert ids(store) == []
        if remove == "delete":
            store.delete(bad)
        elif remove == "clear":
            assert store.clear() == 1
        else:
            clock.now += 101
            store.forget_old()
        assert list(tmp_path.glob("*cap-*")) == [], remove
        assert store.disk_bytes == 0
        store.close()


def test_an_unfinished_one_vanishes_with_its_request_and_at_the_next_start(
    make_store: MakeStore, tmp_path: Path
) -> None:
    store = make_store(tmp_path)
    with store.begin() as writer:
        writer.add(fields(), np.zeros((1, 2, 4), np.float32))
        assert len(list(tmp_path.glob(".writing-cap-*"))) == 1
    assert list(tmp_path.glob("*cap-*")) == []
    writer = store.begin()
    writer.add(fields(), np.zeros((1, 2, 4), np.float32))
    left = tmp_path / "left"
    shutil.copytree(writer.folder, left)
    writer.discard()
    store.close()
    left.rename(writer.folder)
    assert ids(make_store(tmp_path)) == []
    assert list(tmp_path.glob("*cap-*")) == []


# What is no one sequence


def names_and_shapes(store: CaptureStore, *records: tuple[dict[str, Any], tuple[int, ...]]) -> dict[str, Any]:
    with store.begin() as writer:
        for number, (changes, shape) in enumerate(records):
            writer.add(fields(**changes), np.full(shape, number, np.float32))
        writer.finish(ABOUT)
    return {tensor.name: tensor.array() for tensor in select(store.get(writer.capture_id))}


def test_passes_of_a_layer_are_arrays_of_their_own(make_store: MakeStore) -> None:
    found = names_and_shapes(
        make_store(),
        ({"pass_index": 0}, (1, 2, 4)),
        ({"pass_index": 1}, (1, 2, 4)),
        ({"pass_index": 0, "step": 1, "positions": (2, 3)}, (1, 1, 4)),
        ({"pass_index": 1, "step": 1, "positions": (2, 3)}, (1, 1, 4)),
    )
    assert {name: array[0, :, 0].tolist() for name, array in found.items()} == {
        "r0/blocks.0.hook_resid_post#pass0": [0, 0, 2],
        "r0/blocks.0.hook_resid_post#pass1": [1, 1, 3],
    }


NOT_ONE: dict[str, list[tuple[dict[str, Any], tuple[int, ...]]]] = {
    "states": [({"axes": ["batch", "state_1"]}, (1, 4)), ({"axes": ["batch", "state_1"], "step": 1}, (1, 4))],
    "one state": [({"axes": ["batch", "state_1"]}, (1, 4))],
    "keys that a window has dropped": [
        ({"axes": ["batch", "head", "query", "key"]}, (1, 2, 2, 2)),
        ({"axes": ["batch", "head", "query", "key"], "step": 1, "positions": (2, 3)}, (1, 2, 1, 2)),
    ],
    "positions twice": [({}, (1, 2, 4)), ({"step": 1, "positions": (1, 2)}, (1, 1, 4))],
    "other rows than positions": [({}, (1, 3, 4))],
    "another width": [({}, (1, 2, 4)), ({"step": 1, "positions": (2, 3)}, (1, 1, 5))],
}


@pytest.mark.parametrize("what", NOT_ONE)
def test_what_is_no_sequence_is_an_array_per_step(make_store: MakeStore, what: str) -> None:
    found = names_and_shapes(make_store(), *NOT_ONE[what])
    assert list(found) == [f"r0/blocks.0.hook_resid_post#step{step}" for step in range(len(NOT_ONE[what]))]
    for number, (array, (_, shape)) in enumerate(zip(found.values(), NOT_ONE[what], strict=True)):
        assert array.shape == shape
        assert (array == number).all()


def test_input_and_output_of_one_name_are_told_apart(make_store: MakeStore) -> None:
    found = names_and_shapes(make_store(), ({"is_input": True}, (1, 2, 4)), ({}, (1, 2, 4)))
    assert list(found) == ["r0/blocks.0.hook_resid_post#input", "r0/blocks.0.hook_resid_post"]


def test_rows_of_a_batch_are_joined_along_the_positions(make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api_server.scratch.IN_MEMORY_BYTES", 10)
    random = np.random.default_rng(0)
    parts = [random.standard_normal((3, n, 2, 4)).astype(np.float32) for n in (4, 1, 1)]
    store, start = make_store(), 0
    with store.begin() as writer:
        for step, part in enumerate(parts):
            stop = start + part.shape[1]
            axes = ["batch", "pos", "head", "d_head"]
            writer.add(fields(step=step, positions=(start, stop), axes=axes), part)
            start = stop
        writer.finish(ABOUT)
    capture, whole = store.get(writer.capture_id), np.concatenate(parts, axis=1)
    (tensor,) = select(capture)
    assert np.array_equal(tensor.array(), whole)
    (tensor,) = select(capture, positions="0,2,3,5")
    assert np.array_equal(tensor.array(), whole[:, [0, 2, 3, 5]])
    (tensor,) = select(capture, positions="1:", reduce="max")
    assert np.array_equal(tensor.array("float16"), whole[:, 1:].max(axis=1).astype(np.float16))


class FullDisk(io.BytesIO):
    """A file on a disk that is full."""

    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")


def test_a_full_disk_is_507_without_a_path(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = make_store(tmp_path)
    capture = store.get(keep(store))
    monkeypatch.setattr("api_server.scratch.IN_MEMORY_BYTES", 10)
    monkeypatch.setattr("tempfile.TemporaryFile", FullDisk)
    with pytest.raises(CapturesUnwritable, match=r"disk: No space left on device\.$") as refusal:
        ReducedBytes(select(capture, reduce="mean"), "float32").ready()
    assert refusal.value.status == 507
    monkeypatch.setattr("pathlib.Path.open", lambda *_: FullDisk())
    with store.begin() as writer, pytest.raises(CapturesUnwritable, match=r"No space left on device\.$"):
        writer.add(fields(), np.zeros((1, 2, 4), np.float32))
    assert len(list(tmp_path.glob("*cap-*"))) == 1


# Threads


def test_who_reads_reads_to_the_end_though_it_is_deleted(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    array = np.random.default_rng(0).standard_normal((1, 512, 512)).astype(np.float32)
    capture = store.get(keep(store, array))
    store.clear()
    assert list(tmp_path.glob("*cap-*")) == []
    assert np.array_equal(the_array(capture), array)


def test_many_threads_write_read_and_delete(make_store: MakeStore) -> None:
    store = make_store(max_bytes=12 * SMALL)
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(25):
                array = random.standard_normal((1, 4, 64)).astype(np.float32)
                capture_id = keep(store, array)
                try:
                    capture = store.get(capture_id)
                except UnknownCapture:
                    continue  # made room for another thread's
                if random.random() < 0.3:
                    store.delete(capture_id)
                assert np.array_equal(the_array(capture), array)
                assert store.disk_bytes <= store.max_bytes
        except UnknownCapture:
            pass
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.disk_bytes == sum(entry.disk_bytes for entry in store.captures())


# Runs that are kept


CHAT = "/v1/chat/completions/with_activations"
REQUEST = {
    "messages": [{"role": "user", "content": "w1 w2 w3 w4"}],
    "temperature": 0,
    "activation_encoding": "base64",
    "activation_hooks": [{"layer_name": f"blocks.{i}", "component": "residual", "hook_id": f"r{i}"} for i in range(3)],
}
BYTES_OF_A_POSITION = 3 * 32 * 4


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama", "tiny")
        yield worker


@contextmanager
def serving(worker: ModelWorker, **config: Any) -> Iterator[str]:
    with running_server(worker, ServerConfig(port=0, **config)) as url:
        yield url


def post(url: str, **changes: Any) -> Any:
    with requests.post(url + CHAT, json=REQUEST | changes, timeout=60) as reply:
        return reply.status_code, reply.json()


def events(url: str, **changes: Any) -> list[Any]:
    with requests.post(url + CHAT, json=REQUEST | {"stream": True} | changes, timeout=60) as reply:
        assert reply.status_code == 200, reply.text
        lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def fetched(url: str, capture_id: str) -> dict[str, np.ndarray]:
    with requests.get(f"{url}/v1/captures/{capture_id}/activations?format=safetensors", timeout=60) as reply:
        assert reply.status_code == 200, reply.text
        return read_safetensors(reply.content)[0]


def test_a_run_too_large_for_a_reply_is_kept_whole(worker: ModelWorker) -> None:
    limit = 10 * BYTES_OF_A_POSITION
    with serving(worker, max_reply_bytes=limit) as url:
        _, small = post(url, max_tokens=5)
        assert "omitted" not in small
        assert small["capture_id"] is None
        status, large = post(url, max_tokens=6)
        assert status == 200
        assert large["omitted"]["bytes"] == 11 * BYTES_OF_A_POSITION
        assert large["omitted"]["limit"] == limit
        assert f"/v1/captures/{large['capture_id']}/activations" in large["omitted"]["message"]
        records = [record for found in large["activations"].values() for record in found]
        assert len(records) == 3 * 6
        assert all(record["encoding"] == "none" and "data" not in record for record in records)
        assert large["hooks"]["r0"]["bytes"] == 11 * 32 * 4
        found = fetched(url, large["capture_id"])
        for i in range(3):
            whole = found[f"r{i}/blocks.{i}.hook_resid_post"]
            assert whole.shape == (1, 11, 32)
            assert np.array_equal(whole[:, :10], stack_records(small["activations"][f"r{i}"]))


def test_a_stream_too_large_for_a_reply_is_kept_from_its_start(worker: ModelWorker) -> None:
    with serving(worker) as url:
        plain = events(url, max_tokens=6)
    for limit, sent in [(8 * BYTES_OF_A_POSITION, 3), (6 * BYTES_OF_A_POSITION, 1), (1, 0)]:
        with serving(worker, max_reply_bytes=limit) as url:
            large = events(url, max_tokens=6)
            with_data = [all("data" in r for found in one["activations"].values() for r in found) for one in large[:-1]]
            assert with_data == [True] * sent + [False] * (6 - sent)
            assert "capture_id" not in large[0]
            assert large[-1]["omitted"]["bytes"] == 11 * BYTES_OF_A_POSITION
            found = fetched(url, large[-1]["capture_id"])
        records = [record for one in plain[:-1] for record in one["activations"]["r1"]]
        assert np.array_equal(found["r1/blocks.1.hook_resid_post"], stack_records(records))
    assert plain[-1]["capture_id"] is None
    assert "omitted" not in plain[-1]


def test_a_kept_stream_has_its_capture_and_its_data(worker: ModelWorker) -> None:
    with serving(worker) as url:
        kept = events(url, max_tokens=4, keep_capture=True)
        found = fetched(url, kept[-1]["capture_id"])
    records = [record for one in kept[:-1] for record in one["activations"]["r2"]]
    assert np.array_equal(found["r2/blocks.2.hook_resid_post"], stack_records(records))


def test_without_encoding_nothing_is_too_large(worker: ModelWorker) -> None:
    with serving(worker, max_reply_bytes=1) as url:
        _, reply = post(url, max_tokens=4, activation_encoding="none")
        assert (reply["capture_id"], "omitted" in reply) == (None, False)
        _, reply = post(url, max_tokens=4, activation_encoding="none", keep_capture=True)
        assert "omitted" not in reply
        assert fetched(url, reply["capture_id"])["r0/blocks.0.hook_resid_post"].shape == (1, 9, 32)


def test_float16_counts_as_it_travels_and_is_kept_in_full(worker: ModelWorker) -> None:
    with serving(worker, max_reply_bytes=9 * BYTES_OF_A_POSITION // 2) as url:
        _, reply = post(url, max_tokens=4, activation_dtype="float16")
        assert "omitted" not in reply
        _, reply = post(url, max_tokens=5, activation_dtype="float16")
        assert reply["omitted"]["bytes"] == 10 * BYTES_OF_A_POSITION // 2
        assert {record["dtype"] for record in reply["activations"]["r0"]} == {"float16"}
        assert fetched(url, reply["capture_id"])["r0/blocks.0.hook_resid_post"].dtype == np.float32


def test_one_larger_than_the_store_is_413_and_leaves_nothing(worker: ModelWorker, tmp_path: Path) -> None:
    with serving(worker, captures_dir=tmp_path, captures_max_bytes=SMALL, max_reply_bytes=64) as url:
        status, reply = post(url, max_tokens=30)
        assert status == 413
        assert reply["error"]["code"] == "capture_too_large"
        *_, last = events(url, max_tokens=30)
        assert last["error"]["code"] == "capture_too_large"
        assert list(tmp_path.glob("*cap-*")) == []


def test_a_stream_that_stays_small_disturbs_no_other_capture(
    worker: ModelWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api_server.keeping.HELD_BYTES", 100)
    with serving(worker, captures_dir=tmp_path, captures_max_bytes=2 * SMALL) as url:
        first = post(url, max_tokens=1, keep_capture=True)[1]["capture_id"]
        assert events(url, max_tokens=30)[-1]["capture_id"] is None
        assert [path.name for path in tmp_path.glob("*cap-*")] == [first]


def test_a_reader_who_leaves_leaves_nothing_behind(worker: ModelWorker, tmp_path: Path) -> None:
    with serving(worker, captures_dir=tmp_path) as url:
        body = REQUEST | {"stream": True, "keep_capture": True, "max_tokens": 20_000}
        with requests.post(url + CHAT, json=body, stream=True, timeout=60) as reply:
            next(reply.iter_lines())
            assert len(list(tmp_path.glob(".writing-cap-*"))) == 1
        deadline = time.monotonic() + 20
        while list(tmp_path.glob("*cap-*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(tmp_path.glob("*cap-*")) == []


def test_an_app_on_a_folder_in_use_does_not_start(worker: ModelWorker, tmp_path: Path) -> None:
    app = create_app(worker, ServerConfig(captures_dir=tmp_path))
    with pytest.raises(CannotOpenCaptures):
        create_app(worker, ServerConfig(captures_dir=tmp_path))
    close_app(app)


# A process


ARGUMENTS = ["--port", "0", "--model", "neuroscope-tiny", "--captures-dir"]


def test_after_a_kill_in_the_middle_of_a_run_the_store_is_whole(tmp_path: Path) -> None:
    body: dict[str, Any] = REQUEST | {"messages": [{"role": "user", "content": "hello"}], "keep_capture": True}
    with server_process(*ARGUMENTS, str(tmp_path)) as process:
        url = url_of(process)
        _, kept = post(url, **body, max_tokens=3)
        whole = {hook_id: stack_records(records) for hook_id, records in kept["activations"].items()}
        with requests.post(url + CHAT, json=body | {"stream": True, "max_tokens": 400}, stream=True, timeout=60) as run:
            lines = run.iter_lines()
            assert len([next(lines) for _ in range(6)]) == 6
            process.kill()
            process.wait(10)
    assert len(list(tmp_path.glob(".writing-cap-*"))) == 1
    with server_process(*ARGUMENTS, str(tmp_path)) as process:
        url = url_of(process)
        assert list(tmp_path.glob(".writing-cap-*")) == []
        with requests.get(url + "/v1/captures", timeout=10) as listed:
            assert [one["id"] for one in listed.json()["data"]] == [kept["capture_id"]]
        found = fetched(url, kept["capture_id"])
        assert all(np.array_equal(found[f"{name}/blocks.{name[1]}.hook_resid_post"], whole[name]) for name in whole)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert [path.name for path in tmp_path.glob("*cap-*")] == [kept["capture_id"]]


def test_json_of_a_kept_capture_decodes(worker: ModelWorker) -> None:
    with serving(worker) as url:
        _, kept = post(url, max_tokens=2, keep_capture=True)
        with requests.get(f"{url}/v1/captures/{kept['capture_id']}/activations/r0", timeout=10) as reply:
            (record,) = reply.json()["activations"]["r0"]
    assert np.array_equal(decode_activation(record), stack_records(kept["activations"]["r0"]))
