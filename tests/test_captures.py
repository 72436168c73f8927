"""Kept captures: every range, reduction and format against NumPy slicing of what the reply itself carried."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flask.testing import FlaskClient
from server_tools import load_tiny
from werkzeug.test import TestResponse

from api_server import ModelWorker, ServerConfig, create_app
from api_server.app import close_app
from neuroscope_bridge.payload import decode_activation, read_safetensors, stack_records

CHAT = "/v1/chat/completions/with_activations"
MESSAGES = [{"role": "user", "content": "w1 w2 w3 w4"}]
N_PROMPT, N_FED = 6, 9
"""The prompt's tokens, and those that went through the model: four are generated, the last is never read."""
N_LAYERS, N_HEADS, N_KV_HEADS = 3, 4, 2
HOOKS = [
    *({"layer_name": f"blocks.{i}", "component": "residual", "hook_id": f"layer/{i}"} for i in range(N_LAYERS)),
    {"layer_name": "blocks.1", "component": "attention_pattern", "hook_id": "pattern"},
    {"layer_name": "blocks.1", "component": "attention_scores", "hook_id": "scores"},
    {"layer_name": "blocks.2", "component": "query", "hook_id": "q"},
    {"layer_name": "blocks.2", "component": "key", "hook_id": "k"},
    {"layer_name": "blocks.0", "component": "residual", "hook_id": "both", "capture_input": True},
    {"layer_name": "wte", "component": "embedding", "hook_id": "ids", "capture_input": True, "capture_output": False},
]
RESIDUALS = [f"layer/{i}" for i in range(N_LAYERS)]


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load=load_tiny) as worker:
        worker.load("llama", "tiny")
        yield worker


@pytest.fixture
def make_client(worker: ModelWorker) -> Iterator[Callable[..., FlaskClient]]:
    made = []

    def make(**config: Any) -> FlaskClient:
        made.append(create_app(worker, ServerConfig(**config)))
        return made[-1].test_client()

    yield make
    for app in made:
        close_app(app)


@pytest.fixture(scope="module")
def client(worker: ModelWorker) -> Iterator[FlaskClient]:
    app = create_app(worker)
    yield app.test_client()
    close_app(app)


@pytest.fixture(scope="module")
def kept(client: FlaskClient) -> Any:
    """A reply whose capture was kept."""
    return run(client)


@pytest.fixture(scope="module")
def whole(kept: Any) -> dict[str, np.ndarray]:
    """All positions of each array by its name, from the records of the reply."""
    found: dict[str, list[Any]] = {}
    for hook_id, records in kept["activations"].items():
        for record in records:
            found.setdefault(f"{hook_id}/{record['hook_point']}", []).append(record)
    return {name: stack_records(records) for name, records in found.items()}


def run(client: FlaskClient, status: int = 200, **changes: Any) -> Any:
    body = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0, "activation_hooks": HOOKS, "keep_capture": True}
    reply = client.post(CHAT, json=body | {"activation_encoding": "base64"} | changes)
    assert reply.status_code == status, reply.get_data(as_text=True)
    return reply.get_json()


def get(client: FlaskClient, kept: Any, hook_id: str | None = None, status: int = 200, **query: Any) -> TestResponse:
    headers = query.pop("headers", {})
    address = f"/v1/captures/{kept['capture_id']}/activations" + (f"/{hook_id}" if hook_id else "")
    reply = client.get(address, query_string=query, headers=headers)
    assert reply.status_code == status, reply.get_data(as_text=True)[:500]
    return reply


def arrays(client: FlaskClient, kept: Any, hook_id: str | None = None, **query: Any) -> dict[str, np.ndarray]:
    found, _ = read_safetensors(get(client, kept, hook_id, format="safetensors", **query).data)
    return found


def refused(client: FlaskClient, kept: Any, hook_id: str | None = None, status: int = 400, **query: Any) -> Any:
    return get(client, kept, hook_id, status, **query).get_json()["error"]


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Bit for bit, type and shape included."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


# Reading


def test_the_whole_capture_is_what_the_reply_carried(
    client: FlaskClient, kept: Any, whole: dict[str, np.ndarray]
) -> None:
    found = arrays(client, kept)
    assert list(found) == list(whole)
    assert "both/blocks.0.hook_resid_pre" in found
    assert "both/blocks.0.hook_resid_post" in found
    assert all(same(found[name], whole[name]) for name in whole)
    assert found["layer/0/blocks.0.hook_resid_post"].shape == (1, N_FED, 32)
    assert found["pattern/blocks.1.attn.hook_pattern"].shape == (1, N_HEADS, N_FED, N_FED)
    assert found["ids/embed.hook_in"].dtype == np.int32


POSITIONS = {
    "3": [3],
    "-1": [8],
    "0,2,7": [0, 2, 7],
    "7,2,2,0": [0, 2, 7],
    "2:8": range(2, 8),
    ":4": range(4),
    "-3:": range(6, 9),
    "5:100": range(5, 9),
    ":": range(9),
    "last": [5, 6, 7, 8],
}


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_are_a_slice_of_the_whole(
    client: FlaskClient, kept: Any, whole: dict[str, np.ndarray], positions: str
) -> None:
    found = arrays(client, kept, positions=positions)
    for name, array in whole.items():
        along = 2 if array.ndim == 4 and ("pattern" in name or "scores" in name) else 1
        assert same(found[name], np.take(array, list(POSITIONS[positions]), axis=along)), name


HEADS = {"1": ([1], [0]), "0,3": ([0, 3], [0, 1]), "-2:": ([2, 3], [1]), ":": (range(4), [0, 1])}


@pytest.mark.parametrize("heads", HEADS)
def test_heads_are_query_heads_and_the_key_value_heads_that_serve_them(
    client: FlaskClient, kept: Any, whole: dict[str, np.ndarray], heads: str
) -> None:
    q, k = HEADS[heads]
    for name, axis, chosen in [
        ("q/blocks.2.attn.hook_rot_q", 2, q),
        ("k/blocks.2.attn.hook_rot_k", 2, k),
        ("pattern/blocks.1.attn.hook_pattern", 1, q),
        ("scores/blocks.1.attn.hook_attn_scores", 1, q),
    ]:
        hook_id = name.split("/")[0]
        (found,) = arrays(client, kept, hook_id, heads=heads).values()
        assert same(found, np.take(whole[name], list(chosen), axis=axis)), name
        (both,) = arrays(client, kept, hook_id, heads=heads, positions=["1,4", ""][0]).values()
        along = 2 if axis == 1 else 1
        assert same(both, np.take(np.take(whole[name], list(chosen), axis=axis), [1, 4], axis=along)), name


@pytest.mark.parametrize(("layers", "chosen"), [("0", [0]), ("0,2", [0, 2]), ("1:", [1, 2]), ("-1", [2])])
def test_layers_choose_among_the_hook_points(client: FlaskClient, kept: Any, layers: str, chosen: list[int]) -> None:
    found = arrays(client, kept, layers=layers)
    assert {int(name.split("/blocks.")[1][0]) for name in found} == set(chosen)
    assert not any(name.startswith("ids/") for name in found)


@pytest.mark.parametrize("reduce", ["mean", "max", "last", "norm"])
@pytest.mark.parametrize("positions", [":", "1,4,8"])
def test_reductions_are_numpys(
    client: FlaskClient, kept: Any, whole: dict[str, np.ndarray], reduce: str, positions: str
) -> None:
    rows = list(range(9)) if positions == ":" else [1, 4, 8]
    for name, array in whole.items():
        hook_id = name.rsplit("/", 1)[0]
        if hook_id in ("both", "ids") or (reduce == "norm" and hook_id == "scores"):
            continue
        along = 2 if hook_id in ("pattern", "scores") else 1
        part = np.take(array, rows, axis=along)
        expected = {
            "mean": lambda part=part, along=along: part.astype(np.float64).mean(axis=along).astype(np.float32),
            "max": lambda part=part, along=along: part.max(axis=along).astype(np.float32),
            "last": lambda part=part, along=along: np.take(part, -1, axis=along).astype(np.float32),
            "norm": lambda part=part: np.sqrt((part.astype(np.float64) ** 2).sum(axis=-1)).astype(np.float32),
        }[reduce]()
        (found,) = arrays(client, kept, hook_id, reduce=reduce, positions=positions).values()
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        if reduce in ("max", "last"):
            assert same(found, expected)


@pytest.mark.parametrize("query", [{}, {"positions": "2:8", "heads": "0,3"}, {"positions": "last", "reduce": "max"}])
@pytest.mark.parametrize("hook_id", ["q", "k", "pattern", "scores"])
def test_all_formats_carry_the_same_numbers(
    client: FlaskClient, kept: Any, hook_id: str, query: dict[str, str]
) -> None:
    (expected,) = arrays(client, kept, hook_id, **query).values()
    npy = get(client, kept, hook_id, format="npy", **query)
    assert npy.content_type == "application/x-npy"
    assert same(np.load(io.BytesIO(npy.data), allow_pickle=False), expected)
    for encoding in ("base64", "json"):
        (records,) = get(client, kept, hook_id, encoding=encoding, **query).json["activations"].values()
        (record,) = records
        assert same(decode_activation(record), expected)
        assert record["shape"] == list(expected.shape)
        assert len(record["axes"]) == expected.ndim
    (record,) = get(client, kept, hook_id, encoding="none", **query).json["activations"][hook_id]
    assert "data" not in record


def test_a_record_says_which_rows_and_heads_it_holds(client: FlaskClient, kept: Any) -> None:
    def record(hook_id: str, **query: str) -> Any:
        return get(client, kept, hook_id, encoding="none", **query).json["activations"][hook_id][0]

    one = record("k", positions="0,2,5", heads="3")
    assert (one["positions"], one["position_ids"], one["heads"], one["reduce"]) == ([0, 6], [0, 2, 5], [1], None)
    assert (one["phase"], one["step"]) == (None, None)
    one = record("q", positions="2:4", reduce="mean")
    assert (one["positions"], one["position_ids"], one["heads"], one["reduce"]) == ([2, 4], None, None, "mean")
    assert one["axes"] == ["batch", "head", "d_head"]
    assert one["shape"] == [1, N_HEADS, 8]


def test_float16_halves_the_bytes_and_leaves_integers(client: FlaskClient, kept: Any, whole: Any) -> None:
    found = arrays(client, kept, dtype="float16", positions="2:")
    assert found.pop("ids/embed.hook_in").dtype == np.int32
    for name, array in found.items():
        along = 2 if "pattern" in name or "scores" in name else 1
        assert same(array, np.take(whole[name], range(2, 9), axis=along).astype(np.float16)), name


def test_safetensors_says_what_its_arrays_are(client: FlaskClient, kept: Any) -> None:
    reply = get(client, kept, "q", format="safetensors", positions="1:3")
    _, metadata = read_safetensors(reply.data)
    assert metadata["capture_id"] == kept["capture_id"]
    about = json.loads(metadata["arrays"])["q/blocks.2.attn.hook_rot_q"]
    assert about["axes"] == ["batch", "pos", "head", "d_head"]
    assert about["positions"] == [1, 3]
    assert about["hook_id"] == "q"


def test_the_library_of_safetensors_reads_it(client: FlaskClient, kept: Any, whole: Any) -> None:
    from safetensors.numpy import load

    found = load(get(client, kept, format="safetensors").data)
    assert all(same(found[name], array) for name, array in whole.items())
    assert set(found) == set(whole)


REFUSALS = {
    "no such parameter": ("q", {"position": "1"}, "positions"),
    "not a range": ("q", {"positions": "1-3"}, "'2:10'"),
    "a step": ("q", {"positions": "1:8:2"}, "'2:10'"),
    "far away": ("q", {"positions": "9"}, "0-8"),
    "one of them far away": ("q", {"positions": "0,9"}, "0-8"),
    "one of the heads": ("q", {"heads": "0,4"}, "0-3"),
    "an empty range": ("q", {"positions": "20:30"}, "0-8"),
    "no such head": ("q", {"heads": "4"}, "0-3"),
    "no such head of k": ("k", {"heads": "4"}, "0-3"),
    "no head axis": ("layer/0", {"heads": "0"}, "no head axis"),
    "no such layer": ("q", {"layers": "0"}, "2"),
    "norm of token ids": ("ids", {"reduce": "norm"}, "ids, which cannot be reduced"),
    "mean of token ids": ("ids", {"reduce": "mean"}, "ids, which cannot be reduced"),
    "norm of masked scores": ("scores", {"reduce": "norm"}, "masked"),
    "no such reduction": ("q", {"reduce": "min"}, "'mean', 'max', 'last' or 'norm'"),
    "no such format": ("q", {"format": "npz"}, "'npy'"),
    "several arrays in one npy": (None, {"format": "npy"}, "layers"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_is_refused_with_what_can(client: FlaskClient, kept: Any, what: str) -> None:
    hook_id, query, said = REFUSALS[what]
    error = refused(client, kept, hook_id, **query)
    assert said in error["message"], error["message"]
    assert error["param"] == ("position" if what == "no such parameter" else next(iter(query)))


def test_unknown_hooks_and_captures_are_404_with_those_there_are(client: FlaskClient, kept: Any) -> None:
    assert "layer/0, layer/1" in refused(client, kept, "layer/9", 404)["message"]
    for method in ("GET", "DELETE"):
        reply = client.open("/v1/captures/cap-0", method=method)
        assert reply.status_code == 404
        assert kept["capture_id"] in reply.json["error"]["message"]


HOSTILE = ["..", "../..", "%2e%2e", "..%2f..%2fetc", "%2e%2e%2fmanifest.json", ".writing-cap-", "cap-" + "0" * 32,
           "x" * 5000, "%00", "cap-%0a", "~", "*", "C:%5C", "%F0%9F%98%80"]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_no_id_leaves_the_store(client: FlaskClient, kept: Any, text: str) -> None:
    own = f"/v1/captures/{kept['capture_id']}/activations"
    for address in (f"/v1/captures/{text}", f"/v1/captures/{text}/activations", f"{own}/{text}"):
        assert client.get(address).status_code in (404, 400), address
    assert client.delete(f"/v1/captures/{text}").status_code in (404, 405)
    assert get(client, kept, "q").status_code == 200


# What was selected when it was captured


@pytest.fixture(scope="module")
def selected(client: FlaskClient) -> Any:
    """A run whose hooks keep some positions and heads, or a number of each."""
    hooks = [
        {"hook_point": "blocks.2.attn.hook_rot_q", "hook_id": "q", "heads": [1, 3], "positions": [1, 4, 7]},
        {"hook_point": "blocks.2.attn.hook_rot_k", "hook_id": "k", "heads": [2, 3], "positions": "last"},
        {"hook_point": "blocks.1.attn.hook_pattern", "hook_id": "pattern", "positions": [0, 3, 8], "heads": 2},
        {"layer_name": "*", "component": "residual", "hook_id": "mean", "reduce": "mean"},
        {"layer_name": "blocks.1", "component": "residual", "hook_id": "norm", "reduce": "norm"},
    ]
    return run(client, activation_hooks=hooks)


def test_rows_with_gaps_are_one_array(client: FlaskClient, selected: Any, whole: dict[str, np.ndarray]) -> None:
    q, k = whole["q/blocks.2.attn.hook_rot_q"], whole["k/blocks.2.attn.hook_rot_k"]
    (found,) = arrays(client, selected, "q").values()
    assert same(found, q[:, [1, 4, 7]][:, :, [1, 3]])
    (found,) = arrays(client, selected, "q", positions="4:", heads="3").values()
    assert same(found, q[:, [4, 7]][:, :, [3]])
    (found,) = arrays(client, selected, "k", positions="6:").values()
    assert same(found, k[:, [6, 7, 8]][:, :, [1]])
    (found,) = arrays(client, selected, "k", heads="2").values()
    assert same(found, k[:, [5, 6, 7, 8]][:, :, [1]])
    (found,) = arrays(client, selected, "pattern", positions="3,8").values()
    assert same(found, whole["pattern/blocks.1.attn.hook_pattern"][:, [2]][:, :, [3, 8]])
    (record,) = get(client, selected, "q", encoding="none").json["activations"]["q"]
    assert (record["positions"], record["position_ids"], record["heads"]) == ([1, 8], [1, 4, 7], [1, 3])
    assert "1, 4, 7" in refused(client, selected, "q", positions="2")["message"]
    assert "1, 3" in refused(client, selected, "q", heads="1,2")["message"]
    assert "2-3" in refused(client, selected, "k", heads="0")["message"]


def test_what_was_reduced_over_positions_stays_step_by_step(
    client: FlaskClient, selected: Any, whole: dict[str, np.ndarray]
) -> None:
    found = arrays(client, selected, "mean", layers="1")
    assert list(found) == [f"mean/blocks.1.hook_resid_post#step{step}" for step in range(4)]
    sent = [r for r in selected["activations"]["mean"] if r["layer_index"] == 1]
    assert all(same(a, decode_activation(r)) for a, r in zip(found.values(), sent, strict=True))
    assert found["mean/blocks.1.hook_resid_post#step0"].shape == (1, 32)
    assert "no position axis" in refused(client, selected, "mean", positions="1")["message"]
    (norm,) = arrays(client, selected, "norm", positions="2:").values()
    residual = whole["layer/1/blocks.1.hook_resid_post"].astype(np.float64)
    np.testing.assert_allclose(norm, np.linalg.norm(residual, axis=-1)[:, 2:], rtol=1e-6)
    assert "was reduced by 'norm'" in refused(client, selected, "norm", reduce="mean")["message"]


# HTTP


def test_an_etag_spares_the_second_time(client: FlaskClient, kept: Any) -> None:
    for query in ({"format": "npy"}, {"format": "safetensors"}, {}):
        first = get(client, kept, "q", **query)
        etag = first.headers["ETag"]
        assert not etag.startswith("W/")
        again = get(client, kept, "q", 304, headers={"If-None-Match": etag}, **query)
        assert again.data == b""
        assert again.headers["ETag"] == etag
        assert get(client, kept, "q", headers={"If-None-Match": '"other"'}, **query).data == first.data
        assert get(client, kept, "k", **query).headers["ETag"] != etag
        assert get(client, kept, "q", positions="1", **query).headers["ETag"] != etag


@pytest.mark.parametrize(
    ("asked", "start", "stop"), [("bytes=0-9", 0, 10), ("bytes=100-", 100, None), ("bytes=-7", -7, None)]
)
@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_a_range_is_a_part_of_the_same_bytes(
    client: FlaskClient, kept: Any, format: str, asked: str, start: int, stop: int | None
) -> None:
    full = get(client, kept, "q", format=format)
    assert full.headers["Accept-Ranges"] == "bytes"
    assert full.content_length == len(full.data)
    part = get(client, kept, "q", 206, format=format, headers={"Range": asked})
    assert part.data == full.data[start:stop]
    assert part.content_length == len(part.data)
    begin = start % len(full.data)
    assert part.headers["Content-Range"] == f"bytes {begin}-{begin + len(part.data) - 1}/{len(full.data)}"
    held = {"Range": asked, "If-Range": full.headers["ETag"]}
    assert get(client, kept, "q", 206, format=format, headers=held).data == part.data
    stale = {"Range": asked, "If-Range": '"other"'}
    assert get(client, kept, "q", 200, format=format, headers=stale).data == full.data


def test_a_range_outside_is_416_and_several_are_the_whole(client: FlaskClient, kept: Any) -> None:
    full = get(client, kept, "q", format="npy")
    reply = get(client, kept, "q", 416, format="npy", headers={"Range": "bytes=999999-"})
    assert reply.headers["Content-Range"] == f"bytes */{len(full.data)}"
    assert reply.json["error"]["code"] == "range_not_satisfiable"
    assert get(client, kept, "q", format="npy", headers={"Range": "bytes=0-1,4-5"}).data == full.data


def test_a_file_name_holds_nothing_strange(client: FlaskClient) -> None:
    odd = 'a"b; x=\u00e9/\u4e16'
    kept = run(client, activation_hooks=[{"layer_name": "0", "component": "mlp", "hook_id": odd}])
    reply = get(client, kept, odd, format="npy")
    name = reply.headers["Content-Disposition"].removeprefix("attachment; filename=")
    assert name.strip('"').replace(".npy", "").replace("-", "").replace("_", "").isalnum()
    assert name.isascii()


# The list


def test_captures_are_listed_described_and_deleted(make_client: Callable[..., FlaskClient]) -> None:
    client = make_client()
    assert client.get("/v1/captures").json["data"] == []
    ids = [run(client)["capture_id"] for _ in range(3)]
    listed = client.get("/v1/captures").json
    assert [one["id"] for one in listed["data"]] == ids[::-1]
    assert listed["has_more"] is False
    assert listed["data"][0]["hook_ids"] == [hook["hook_id"] for hook in HOOKS]
    assert (listed["data"][0]["prompt_tokens"], listed["data"][0]["completion_tokens"]) == (N_PROMPT, 4)
    first = client.get("/v1/captures?limit=2").json
    assert [one["id"] for one in first["data"]] == ids[:0:-1]
    assert first["has_more"] is True
    rest = client.get(f"/v1/captures?limit=2&after={first['data'][-1]['id']}").json
    assert [one["id"] for one in rest["data"]] == [ids[0]]
    expires = [one["expires"] for one in rest["data"]]
    gone = client.get("/v1/captures?after=cap-0")
    assert (gone.status_code, gone.json["error"]["param"]) == (404, "after")
    assert "from its start" in gone.json["error"]["message"]
    assert [one["expires"] for one in client.get("/v1/captures").json["data"]][2:] == expires
    assert client.delete(f"/v1/captures/{ids[1]}").json == {"id": ids[1], "object": "capture", "deleted": True}
    assert {one["id"] for one in client.get("/v1/captures").json["data"]} == {ids[0], ids[2]}
    assert client.delete("/v1/captures").json == {"status": "captures_cleared", "deleted": 2}
    listed = client.get("/v1/captures").json
    assert (listed["data"], listed["disk_bytes"]) == ([], 0)


def test_a_description_has_the_run_and_each_array(client: FlaskClient, kept: Any, whole: dict[str, np.ndarray]) -> None:
    about = client.get(f"/v1/captures/{kept['capture_id']}").json
    assert about["tokens"] == kept["tokens"]
    assert about["hooks"] == kept["hooks"]
    assert about["bytes"] == sum(receipt["bytes"] for receipt in kept["hooks"].values())
    assert {one["name"]: tuple(one["shape"]) for one in about["arrays"]} == {n: a.shape for n, a in whole.items()}


def test_nothing_is_kept_that_nobody_asked_for(make_client: Callable[..., FlaskClient]) -> None:
    client = make_client()
    assert run(client, keep_capture=False)["capture_id"] is None
    assert client.get("/v1/captures").json["data"] == []


def test_a_failed_run_leaves_nothing(make_client: Callable[..., FlaskClient], tmp_path: Path) -> None:
    client = make_client(captures_dir=tmp_path)
    run(client, 400, activation_hooks=[{"layer_name": "9", "component": "mlp"}])
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# By hook point


def test_npy_names_one_of_several_arrays_of_a_hook(client: FlaskClient, kept: Any, whole: dict[str, Any]) -> None:
    points = [name.removeprefix("both/") for name in whole if name.startswith("both/")]
    assert len(points) == 2
    for point in points:
        reply = get(client, kept, "both", format="npy", hook_point=point)
        assert same(np.load(io.BytesIO(reply.data)), whole[f"both/{point}"])
    error = refused(client, kept, "both", format="npy")
    assert "2: both/blocks.0.hook_resid_pre, both/blocks.0.hook_resid_post" in error["message"]
    assert "'hook_point'" in error["message"]


def test_a_glob_means_hook_points_of_all_hooks(client: FlaskClient, kept: Any, whole: dict[str, Any]) -> None:
    found = arrays(client, kept, hook_point="blocks.*.hook_resid_post", positions="-1:")
    names = [*(f"layer/{i}/blocks.{i}.hook_resid_post" for i in range(N_LAYERS)), "both/blocks.0.hook_resid_post"]
    assert set(found) == set(names)
    assert all(same(found[name], whole[name][:, -1:]) for name in names)
    assert [*arrays(client, kept, hook_point="layers_output[2]")] == ["layer/2/blocks.2.hook_resid_post"]
    tag = get(client, kept, hook_point="layers_output[2]").headers["ETag"]
    assert tag != get(client, kept).headers["ETag"]


def test_a_hook_point_that_was_not_captured_is_refused_with_those_that_were(client: FlaskClient, kept: Any) -> None:
    for wanted in ("blocks.0.hook_resid_mid", "blocks.*.hook_mlp_out", ""):
        error = refused(client, kept, "both", hook_point=wanted)
        assert error["param"] == "hook_point"
        assert "character" in error["message"] or "blocks.0.hook_resid_pre, blocks.0" in error["message"]


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_binary_has_no_encoding(client: FlaskClient, kept: Any, format: str) -> None:
    for encoding in ("base64", "json"):
        error = refused(client, kept, "q", format=format, encoding=encoding)
        assert error["param"] == "encoding"
        assert error["message"] == "Query parameter 'encoding' belongs to format=json: leave it out."


def test_a_reduction_travels_as_the_type_asked_for(client: FlaskClient, kept: Any, whole: dict[str, Any]) -> None:
    (mean,) = arrays(client, kept, "q", reduce="mean", dtype="float16").values()
    expected = np.mean(whole["q/blocks.2.attn.hook_rot_q"], axis=1, dtype=np.float64)
    assert same(mean, expected.astype(np.float32).astype(np.float16))
