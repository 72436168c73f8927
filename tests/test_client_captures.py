"""Kept captures through the Python client, against a running server."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import requests
from server_tools import load_tiny, running_server

from api_server import ModelWorker
from neuroscope_bridge import (
    LMStudioNeuroScopeClient,
    NeuroScopeAPIError,
    ResponseFormatError,
    ServerUnreachableError,
    stack_records,
)
from neuroscope_bridge.payload import npy_header, read_safetensors

MESSAGES = [{"role": "user", "content": "w1 w2 w3 w4"}]
HOOKS = [
    *({"layer_name": f"blocks.{i}", "component": "residual", "hook_id": f"r/{i}"} for i in range(3)),
    {"layer_name": "blocks.1", "component": "query", "hook_id": "q"},
]
COMPONENTS = ["residual", "mlp", "attention_pattern", "attention_scores", "query", "key", "value"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama", "tiny")
        with running_server(worker) as url:
            yield url


@pytest.fixture
def client(url: str) -> Iterator[LMStudioNeuroScopeClient]:
    with LMStudioNeuroScopeClient(url) as client:
        yield client
        client.clear_captures()


@pytest.fixture
def kept(client: LMStudioNeuroScopeClient) -> Any:
    return client.generate_with_activations(MESSAGES, HOOKS, max_tokens=4, temperature=0, keep_capture=True)


@pytest.fixture
def q(kept: Any) -> np.ndarray:
    """All positions of all heads, (1, 9, 4, 8)."""
    return stack_records(kept["activations"]["q"])


def test_captures_are_listed_described_and_deleted(client: LMStudioNeuroScopeClient, kept: Any) -> None:
    assert [one["id"] for one in client.list_captures()] == [kept["capture_id"]]
    about = client.capture(kept["capture_id"])
    assert about["tokens"]["ids"] == kept["tokens"]["ids"]
    assert [one["name"] for one in about["arrays"]][-1] == "q/blocks.1.attn.hook_rot_q"
    other = client.generate_with_activations(MESSAGES, HOOKS, max_tokens=0, keep_capture=True)["capture_id"]
    assert [one["id"] for one in client.list_captures(limit=1)] == [other]
    assert [one["id"] for one in client.list_captures(after=other)] == [kept["capture_id"]]
    assert client.delete_capture(other)["deleted"] is True
    assert client.clear_captures()["deleted"] == 1
    with pytest.raises(NeuroScopeAPIError, match="Unknown capture") as error:
        client.capture(kept["capture_id"])
    assert error.value.status == 404


def test_arrays_are_views_of_one_buffer(client: LMStudioNeuroScopeClient, kept: Any) -> None:
    found = client.capture_activations(kept["capture_id"])
    assert [*found] == [*(f"r/{i}/blocks.{i}.hook_resid_post" for i in range(3)), "q/blocks.1.attn.hook_rot_q"]
    for i in range(3):
        whole = stack_records(kept["activations"][f"r/{i}"])
        assert np.array_equal(found[f"r/{i}/blocks.{i}.hook_resid_post"], whole)
    buffers = {id(_owner(array)) for array in found.values()}
    assert len(buffers) == 1
    assert all(array.flags.writeable and array.flags.aligned for array in found.values())


def _owner(array: np.ndarray) -> Any:
    base: Any = array
    while (below := base.obj if isinstance(base, memoryview) else base.base) is not None:
        base = below
    return base


RANGES = {
    "an index": ({"positions": 2}, [2], range(4)),
    "a negative one": ({"positions": -1}, [8], range(4)),
    "a list": ({"positions": [0, 2, 5]}, [0, 2, 5], range(4)),
    "a numpy array": ({"positions": np.array([1, 3])}, [1, 3], range(4)),
    "a range": ({"positions": range(2, 5)}, [2, 3, 4], range(4)),
    "a slice": ({"positions": slice(2, -1)}, range(2, 8), range(4)),
    "an open slice": ({"positions": slice(None, 3)}, [0, 1, 2], range(4)),
    "last": ({"positions": "last"}, [5, 6, 7, 8], range(4)),
    "heads": ({"heads": [0, 3]}, range(9), [0, 3]),
    "both": ({"positions": slice(-3, None), "heads": -1}, [6, 7, 8], [3]),
}


@pytest.mark.parametrize("what", RANGES)
def test_ranges_are_numpys(client: LMStudioNeuroScopeClient, kept: Any, q: np.ndarray, what: str) -> None:
    ranges, positions, heads = RANGES[what]
    expected = q[:, list(positions)][:, :, list(heads)]
    (found,) = client.capture_activations(kept["capture_id"], "q", **ranges).values()
    assert np.array_equal(found, expected)
    assert np.array_equal(client.capture_activations(kept["capture_id"], "q", **ranges, format="npy"), expected)
    for encoding in ("base64", "json"):
        got = client.capture_activations(kept["capture_id"], "q", **ranges, format="json", encoding=encoding)
        assert np.array_equal(got["q"][0]["data"], expected)


def test_layers_reduction_and_type(client: LMStudioNeuroScopeClient, kept: Any, q: np.ndarray) -> None:
    found = client.capture_activations(kept["capture_id"], layers=[0, 2])
    assert [*found] == ["r/0/blocks.0.hook_resid_post", "r/2/blocks.2.hook_resid_post"]
    (norm,) = client.capture_activations(kept["capture_id"], "q", reduce="norm").values()
    np.testing.assert_allclose(norm, np.linalg.norm(q, axis=-1), rtol=1e-6)
    half = client.capture_activations(kept["capture_id"], "q", format="npy", dtype="float16")
    assert np.array_equal(half, q.astype(np.float16))


def test_one_hook_point_is_one_array(client: LMStudioNeuroScopeClient, kept: Any, q: np.ndarray) -> None:
    capture_id = kept["capture_id"]
    assert np.array_equal(
        client.capture_activations(capture_id, hook_point="blocks.1.attn.hook_rot_q", format="npy"), q
    )
    assert len(client.capture_activations(capture_id, hook_point="blocks.*.hook_resid_post")) == 3


@pytest.mark.parametrize("positions", [1.5, slice(0, 8, 2), ["1"], True, [None], {"start": 1}])
def test_what_is_no_index_is_refused_before_it_is_sent(client: LMStudioNeuroScopeClient, positions: Any) -> None:
    with pytest.raises(ValueError, match="positions is an index, a list of them or a slice without step"):
        client.capture_activations("cap-0", positions=positions)


def test_the_server_s_refusal_is_an_error_of_the_client(client: LMStudioNeuroScopeClient, kept: Any) -> None:
    with pytest.raises(NeuroScopeAPIError, match="holds one array") as error:
        client.capture_activations(kept["capture_id"], format="npy")
    assert (error.value.status, error.value.param) == (400, "format")
    with pytest.raises(NeuroScopeAPIError, match="holds the positions 0-8, but '9' was asked for"):
        client.capture_activations(kept["capture_id"], "q", positions=9)


def test_a_stream_tells_its_capture(client: LMStudioNeuroScopeClient) -> None:
    *steps, last = client.generate_with_activations(MESSAGES, HOOKS, max_tokens=3, stream=True, keep_capture=True)
    found = client.capture_activations(last["capture_id"], "r/0")
    records = [record for step in steps for record in step["activations"]["r/0"]]
    assert np.array_equal(found["r/0/blocks.0.hook_resid_post"], stack_records(records))


def answering(content: bytes) -> tuple[str, threading.Thread]:
    """A server that gives one answer, whole or not, and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(content)

    thread = threading.Thread(target=answer)
    thread.start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}", thread


def head(length: int) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: application/x-npy\r\nContent-Length: {length}\r\n\r\n".encode()


@pytest.mark.parametrize(
    ("content", "error", "said"),
    [
        (head(1000) + b"x" * 10, ServerUnreachableError, "broke"),
        (head(10) + b"x" * 10, ResponseFormatError, "Not an npy file"),
        (head(len(npy_header(np.dtype("<f4"), (2,)))) + npy_header(np.dtype("<f4"), (2,)), ResponseFormatError, "8 b"),
    ],
)
def test_an_answer_that_breaks_off_or_is_none_is_an_error(content: bytes, error: type[Exception], said: str) -> None:
    url, thread = answering(content)
    with LMStudioNeuroScopeClient(url) as client, pytest.raises(error, match=said):
        client.capture_activations("cap-0", "q", format="npy")
    thread.join()


def test_a_large_json_reply_goes_another_way_and_is_the_same(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"messages": MESSAGES, "activation_hooks": HOOKS, "max_tokens": 2, "temperature": 0}
    route, plain = f"{url}/v1/chat/completions/with_activations", {"Accept-Encoding": "identity"}

    def reply(**headers: str) -> Any:
        with requests.post(route, json=body, headers=plain | headers, timeout=30) as response:
            assert response.status_code == 200
            found = response.json()
            return response.headers, {name: found[name] for name in ("activations", "choices", "tokens", "hooks")}

    headers, expected = reply()
    monkeypatch.setattr("api_server.downloads.IN_MEMORY_BYTES", 100)
    mapped, found = reply()
    assert found == expected
    assert {name: mapped[name] for name in ("Content-Type", "Content-Length")} == {
        name: headers[name] for name in ("Content-Type", "Content-Length")
    }
    shrunk, found = reply(**{"Accept-Encoding": "gzip"})
    assert shrunk["Content-Encoding"] == "gzip"
    assert found == expected


def test_a_slow_reader_holds_up_nobody_and_gets_everything(url: str, client: LMStudioNeuroScopeClient) -> None:
    prompt = [i % 50 for i in range(120)]
    hooks = [{"layer_name": f"blocks.{i}", "component": c, "hook_id": f"{c}{i}"} for i in range(3) for c in COMPONENTS]
    kept = client.complete_with_activations(prompt, hooks, max_tokens=1, keep_capture=True, activation_encoding="none")
    expected = client.capture_activations(kept["capture_id"])
    route = f"{url}/v1/captures/{kept['capture_id']}/activations?format=safetensors"
    with requests.get(route, stream=True, timeout=30) as slow:
        first = slow.raw.read(1000)
        client.delete_capture(kept["capture_id"])
        for _ in range(5):
            assert client.health_check()
        content = first + slow.raw.read()
    assert len(content) == int(slow.headers["Content-Length"])
    found, _ = read_safetensors(content)
    assert all(np.array_equal(found[name], array) for name, array in expected.items())


def test_who_leaves_in_the_middle_of_a_download_disturbs_nobody(url: str, client: LMStudioNeuroScopeClient) -> None:
    hooks = [{"layer_name": f"blocks.{i}", "component": c, "hook_id": f"{c}{i}"} for i in range(3) for c in COMPONENTS]
    kept = client.complete_with_activations([1] * 120, hooks, max_tokens=1, keep_capture=True)
    route = f"{url}/v1/captures/{kept['capture_id']}/activations?format=safetensors"
    for _ in range(10):
        with requests.get(route, stream=True, timeout=30) as left:
            left.raw.read(10)
    assert client.capture_activations(kept["capture_id"], "query1")
