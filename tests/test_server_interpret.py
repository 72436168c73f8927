"""``/interpret``: what was captured during training, uploads and a loaded model, analysed over HTTP."""

import io
import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from flask import Flask, abort, redirect, request
from flask.testing import FlaskClient
from server_tools import CAPTURED_TEXTS, load_tiny, running_server, save_captured, until
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import HTTPException
from werkzeug.serving import make_server
from werkzeug.test import encode_multipart

from api_server import ModelWorker, ServerConfig, create_app, interpretability, interpretability_blueprint
from api_server.__main__ import main
from api_server.app import close_app
from api_server.interpretability import MAX_ANALYSES
from api_server.uploads import read_upload
from mlx_hooks import HookedModel, HookError
from mlx_hooks.storage.shards import ShardReader, ShardWriter
from mlx_hooks.training.config import ANALYSES, MechIntConfig
from mlx_hooks.training.layers import sampled_layers

RESID, PATTERN = "blocks.2.hook_resid_post", "blocks.1.attn.hook_pattern"
CAUSAL = {"analysis_type": "causal"}
PROBE = {"analysis_type": "probe", "layer_name": RESID}
NEURON = {"analysis_type": "neuron", "layer_name": RESID, "config": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captured(tmp_path_factory.mktemp("mechint"))


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load_tiny) as worker:
        worker.load("neuroscope-tiny")
        yield worker


@pytest.fixture
def client(worker: ModelWorker, folder: Path) -> FlaskClient:
    return create_app(worker, ServerConfig(mechint=folder)).test_client()


@pytest.fixture
def values(folder: Path) -> np.ndarray:
    """The captured stream, read by hand: float32 [row, d_model]."""
    return np.concatenate(
        [np.array(mx.load(str(path))[RESID]) for path in sorted(folder.glob("activations_shard_*.safetensors"))]
    )


@contextmanager
def analysing(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While the block runs, analyses wait for the event and report progress."""
    go = threading.Event()

    def run(name: str, context: Any, layer: Any, options: Any, progress: Callable[[int, int], None]) -> dict[str, Any]:
        while not go.wait(0.005):
            progress(1, 4)
        return {"seen": name}

    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["api_server.interpretability"], "run_analysis", run)
        try:
            yield go
        finally:
            go.set()


def npz(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def upload(client: FlaskClient, content: bytes, name: str = "activations.npz", **fields: Any) -> Any:
    form = {"file": (io.BytesIO(content), name), "analysis_type": "neuron", **fields}
    return client.post("/interpret/upload", data={key: value for key, value in form.items() if value is not None})


def close_to(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


# -- what there is ----------------------------------------------------------------------------------------------------


def test_layers_are_those_that_were_captured(client: FlaskClient, values: np.ndarray) -> None:
    reply = client.get("/interpret/layers").json
    assert reply["layers"] == [RESID, PATTERN]
    assert reply["shapes"] == {RESID: [len(values), 128], PATTERN: [len(values), 4, 8]}
    assert reply["steps"] == list(CAPTURED_TEXTS)
    assert {RESID, PATTERN, "blocks.0.attn.hook_z"} < set(reply["available"])


def test_without_captures_there_are_no_layers(worker: ModelWorker, tmp_path: Path) -> None:
    for config in (ServerConfig(), ServerConfig(mechint=tmp_path)):
        reply = create_app(worker, config).test_client().get("/interpret/layers?model=neuroscope-tiny")
        assert (reply.status_code, reply.json["layers"], reply.json["shapes"]) == (200, [], {})
        assert RESID in reply.json["available"]


def test_without_a_model_the_captured_layers_are_there(folder: Path) -> None:
    with ModelWorker(load_tiny) as worker:
        client = create_app(worker, ServerConfig(mechint=folder)).test_client()
        assert client.get("/interpret/layers").json["layers"] == [RESID, PATTERN]
        assert client.get("/interpret/layers").json["available"] == []
        assert client.get("/interpret/layers?model=x").status_code == 404
        assert client.post("/interpret", json=NEURON).status_code == 200
        reply = client.post("/interpret", json={"analysis_type": "causal", "config": {"eval_data": ["the cat sat"]}})
        assert (reply.status_code, reply.json["error"]["code"]) == (409, "no_model_loaded")


# -- analyses of what was captured ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [RESID, "2", "model.layers.2", "transformer.h.2", "layers_output[2]"])
def test_a_layer_is_analysed_by_any_of_its_names(client: FlaskClient, values: np.ndarray, layer: str) -> None:
    reply = client.post("/interpret", json=NEURON | {"layer_name": layer})
    assert reply.status_code == 200, reply.text
    assert {key: reply.json[key] for key in ("analysis_type", "layer_name")} == {
        "analysis_type": "neuron",
        "layer_name": layer,
    }
    assert abs(reply.json["timestamp"] - time.time()) < 60
    assert list(reply.json["results"]) == [RESID]
    close_to(reply.json["results"][RESID]["mean_activation"], values.mean(0))
    assert reply.headers["X-Job-Id"]


def test_without_a_layer_all_that_suit_are_analysed(client: FlaskClient) -> None:
    assert list(client.post("/interpret", json={"analysis_type": "neuron"}).json["results"]) == [RESID]
    assert list(client.post("/interpret", json={"analysis_type": "heads"}).json["results"]) == [PATTERN]


def test_steps_choose_rows(client: FlaskClient, folder: Path) -> None:
    reply = client.post("/interpret", json=NEURON | {"config": {"steps": [200]}})
    (shard,) = folder.glob("*_step_200.safetensors")
    close_to(reply.json["results"][RESID]["mean_activation"], np.array(mx.load(str(shard))[RESID]).mean(0))
    assert client.post("/interpret", json=NEURON | {"config": {"steps": [100]}}).status_code == 400


def test_what_is_captured_meanwhile_is_seen_and_read_once(
    worker: ModelWorker, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    class Counted(ShardReader):
        def __init__(self, path: Any) -> None:
            opened.append(path)
            super().__init__(path)

    monkeypatch.setattr(sys.modules["api_server.interpretability"], "ShardReader", Counted)
    client = create_app(worker, ServerConfig(mechint=tmp_path)).test_client()
    reply = client.post("/interpret", json=NEURON)
    assert (reply.status_code, reply.json["error"]["code"]) == (404, "activations_not_found")
    opened.clear()
    writer = ShardWriter(tmp_path, layers={RESID: {"axes": ["d_model"], "shape": [2]}})
    assert client.get("/interpret/layers").json["layers"] == []
    for step in (0, 1):
        rows = {"tokens": [1, 2], "sequence": [0, 0], "position": [0, 1]}
        writer.write({RESID: mx.full((2, 2), step)}, step=step, **rows)
        for _ in range(3):
            reply = client.post("/interpret", json=NEURON)
        close_to(reply.json["results"][RESID]["mean_activation"], np.full(2, step / 2))
        assert client.get("/interpret/layers").json["shapes"] == {RESID: [2 + 2 * step, 2]}
    assert len(opened) == 3


def test_what_several_processes_captured_is_read_together(worker: ModelWorker, tmp_path: Path) -> None:
    client = create_app(worker, ServerConfig(mechint=tmp_path)).test_client()
    assert client.post("/interpret", json=NEURON).status_code == 404
    rows = {"tokens": [1, 2], "sequence": [0, 0], "position": [0, 1]}
    for rank in range(2):
        layers = {RESID: {"axes": ["d_model"], "shape": [2]}}
        writer = ShardWriter(tmp_path / f"rank_{rank:03d}", layers=layers)
        for step in range(2):
            writer.write({RESID: mx.full((2, 2), 2 * rank + step)}, step=step, **rows)
            shapes = client.get("/interpret/layers").json["shapes"]
            assert shapes == {RESID: [4 * rank + 2 * step + 2, 2]}
        writer.close()
    reply = client.post("/interpret", json=NEURON)
    close_to(reply.json["results"][RESID]["mean_activation"], np.full(2, 1.5))


def test_a_folder_without_shards_yet_has_no_activations(worker: ModelWorker, tmp_path: Path) -> None:
    ShardWriter(tmp_path, layers={RESID: {"axes": ["d_model"], "shape": [2]}}).close()
    client = create_app(worker, ServerConfig(mechint=tmp_path)).test_client()
    reply = client.post("/interpret", json=NEURON)
    assert (reply.status_code, reply.json["error"]["code"]) == (404, "activations_not_found")


def test_a_shard_that_is_cut_in_place_is_an_error(worker: ModelWorker, folder: Path, tmp_path: Path) -> None:
    """Reading what was mapped beyond the file's end would end the process."""
    copied = tmp_path / "captured"
    shutil.copytree(folder, copied)
    client = create_app(worker, ServerConfig(mechint=copied)).test_client()
    assert client.post("/interpret", json=NEURON).status_code == 200
    with next(copied.glob("*_step_200.safetensors")).open("r+b") as shard:
        shard.truncate(200)
    for _ in range(2):
        reply = client.post("/interpret", json=NEURON)
        assert reply.status_code == 400
        assert "cannot read activations_shard_" in reply.json["error"]["message"]


def test_what_could_be_captured_can_be(client: FlaskClient) -> None:
    available = client.get("/interpret/layers").json["available"]
    model = HookedModel.from_pretrained("neuroscope-tiny")
    assert [layer.point.name for layer in sampled_layers(model, available)] == available
    assert set(model.hook_points) - set(available) == {"embed.hook_in"}


def test_too_little_memory_is_said(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("Unable to allocate 29.8 GiB")

    monkeypatch.setattr(sys.modules["api_server.interpretability"], "run_analysis", fail)
    reply = client.post("/interpret", json=NEURON)
    assert (reply.status_code, reply.json["error"]["code"]) == (503, "out_of_memory")


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"analysis_type": "neurons"}, 400, "analysis_type", "'sae', 'neuron', 'feature', 'circuit', 'causal', "),
        ({}, 400, "analysis_type", "required"),
        (NEURON | {"layer_name": "3"}, 404, "layer_name", RESID),
        (NEURON | {"layer_name": "../../etc/passwd"}, 404, "layer_name", RESID),
        (NEURON | {"layer_name": PATTERN}, 400, "layer_name", RESID),
        (NEURON | {"config": {"wrong": 1}}, 400, "config.wrong", "There are:"),
        (NEURON | {"config": {"labels": ["a"]}}, 400, "config.labels", "probe"),
        (NEURON | {"config": {"eval_data": ["a b"]}}, 400, "config.eval_data", "causal"),
        (NEURON | {"config": {"part_size": 10**9}}, 400, "config.part_size", "100000"),
        (NEURON | {"analysis_type": "sae", "config": {"save_to": "/tmp/x"}}, 400, "config.save_to", "no files"),
        (NEURON | {"analysis_type": "sae", "config": {"steering": True}}, 400, "config.eval_data", "eval_data"),
        ({"analysis_type": "causal", "config": {"eval_data": [[1, -2]]}}, 400, "config.eval_data", "token -2"),
        ({"analysis_type": "causal", "config": {"steps": [0]}}, 400, "config.steps", "causal"),
        (NEURON | {"config": {"steps": [7]}}, 400, "config.steps", "0, 200"),
        (CAUSAL | {"config": {"eval_data": [1]}}, 400, "config.eval_data", "or objects with clean"),
        (CAUSAL | {"config": {"eval_data": ["a"], "components": 5}}, 400, "config.components", "must be a list"),
        (PROBE | {"config": {"labels": "x"}}, 400, "config.labels", "a list, one per row, or an object"),
        (PROBE | {"config": {"labels": [[1]]}}, 400, "config.labels", "null as labels"),
        (PROBE | {"config": {"labels": {"1": [1]}}}, 400, "config.labels", "null as labels"),
        (PROBE | {"config": {"labels": {"9" * 5000: 1}}}, 400, "config.labels", ""),
        (PROBE, 400, "config.labels", "one per row, or an object"),
        (NEURON | {"config": {"steps": [200], "part_size": "1"}}, 400, "config.part_size", "integer"),
        (NEURON | {"config": []}, 400, "config", "object"),
        (NEURON | {"config": {"steps": ["0"]}}, 400, "config.steps[0]", "integer"),
        (NEURON | {"extra": 1}, 400, "extra", "layer_name"),
        ({"analysis_type": "causal"}, 400, "config.eval_data", "eval_data"),
        ({"analysis_type": "causal", "layer_name": "2", "config": {"eval_data": ["a b"]}}, 400, "layer_name", "layer"),
        (NEURON | {"model": "x"}, 404, "model", "neuroscope-tiny"),
    ],
)  # fmt: skip
def test_what_cannot_be_analysed_is_refused_with_what_can(
    client: FlaskClient, body: dict[str, Any], status: int, param: str, says: str
) -> None:
    reply = client.post("/interpret", json=body)
    assert (reply.status_code, reply.json["error"]["param"]) == (status, param), reply.text
    assert says in reply.json["error"]["message"]


def test_a_server_without_a_folder_says_how_to_name_one(worker: ModelWorker) -> None:
    reply = create_app(worker).test_client().post("/interpret", json=NEURON)
    assert (reply.status_code, reply.json["error"]["code"]) == (400, "no_captured_activations")
    assert "--mechint DIR" in reply.json["error"]["message"]


def test_no_answer_tells_where_the_folder_lies(worker: ModelWorker, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "manifest.json").write_text("{")
    halved = tmp_path / "halved"
    shutil.copytree(folder, halved)
    shard = next(halved.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    for place in (tmp_path, broken, halved):
        reply = create_app(worker, ServerConfig(mechint=place)).test_client().post("/interpret", json=NEURON)
        assert reply.status_code in (400, 404)
        assert str(tmp_path) not in reply.text
        assert tmp_path.name not in reply.text


def test_a_folder_that_is_not_there_is_said_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mechint", str(tmp_path / "none"), "--port", "0"]) == 1
    assert "--mechint names one with captured activations" in capsys.readouterr().err


# -- analyses that run the model --------------------------------------------------------------------------------------


def test_causal_runs_the_loaded_model(client: FlaskClient) -> None:
    config = {"eval_data": ["The capital of France is Paris .", "the cat sat on the mat"]}
    reply = client.post("/interpret", json={"analysis_type": "causal", "config": config})
    assert reply.status_code == 200, reply.text
    assert reply.json["layer_name"] is None
    assert reply.json["results"]
    job = client.get(f"/v1/jobs/{reply.headers['X-Job-Id']}").json
    assert (job["kind"], job["model"], job["status"]) == ("interpret", "neuroscope-tiny", "completed")


# -- uploads ----------------------------------------------------------------------------------------------------------

ROWS = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)


def test_an_upload_is_analysed(client: FlaskClient) -> None:
    reply = upload(client, npz(layer1=ROWS, layer2=ROWS + 1))
    assert reply.status_code == 200, reply.text
    assert set(reply.json) == {"analysis_type", "layer_name", "results", "timestamp", "filename"}
    assert (reply.json["analysis_type"], reply.json["layer_name"]) == ("neuron", None)
    assert reply.json["filename"] == "activations.npz"
    close_to(reply.json["results"]["layer1"]["mean_activation"], ROWS.mean(0))
    close_to(reply.json["results"]["layer2"]["mean_activation"], ROWS.mean(0) + 1)


def test_the_form_says_which_analysis_and_layer(client: FlaskClient) -> None:
    reply = upload(client, npz(layer1=ROWS, layer2=ROWS), analysis_type="feature", layer_name="layer2", config="{}")
    assert reply.json["analysis_type"] == "feature"
    assert list(reply.json["results"]) == ["layer2"]


def test_a_shard_is_uploaded_as_it_is(client: FlaskClient, folder: Path) -> None:
    shard = next(folder.glob("*_step_200.safetensors"))
    reply = upload(client, shard.read_bytes(), shard.name, layer_name=RESID)
    close_to(reply.json["results"][RESID]["mean_activation"], np.array(mx.load(str(shard))[RESID]).mean(0))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("../../../etc/passwd", "etc_passwd"),
        ("..\\..\\evil.npz", "evil.npz"),
        ("/tmp/x.npz", "tmp_x.npz"),
        ("a b.npz", "a_b.npz"),
        ("....", "upload"),
        ("a\x00b.npz", "ab.npz"),
        ("über.npz", "uber.npz"),
    ],
)
def test_a_files_name_is_told_without_what_makes_paths(client: FlaskClient, name: str, told: str) -> None:
    reply = upload(client, npz(layer1=ROWS), name)
    assert reply.status_code == 200, reply.text
    assert not {"/", "\\", "\0"} & set(reply.json["filename"])
    assert ".." not in reply.json["filename"]
    assert reply.json["filename"].endswith(told[-6:])


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"analysis_type": None}, 400, "analysis_type"),
        ({"analysis_type": "causal"}, 400, "analysis_type"),
        ({"analysis_type": "x"}, 400, "analysis_type"),
        ({"analysis_type": ["neuron", "feature"]}, 400, "analysis_type"),
        ({"layer_name": "layer9"}, 404, "layer_name"),
        ({"layer_name": ""}, 400, "layer_name"),
        ({"config": "[]"}, 400, "config"),
        ({"config": "{"}, 400, "config"),
        ({"config": '{"x": NaN}'}, 400, "config"),
        ({"config": '{"wrong": 1}'}, 400, "config.wrong"),
        ({"config": '{"steps": [1]}'}, 400, "config.steps"),
        ({"analysis_type": "heads"}, 400, "analysis_type"),
        ({"analysis_type": "probe"}, 400, "config.labels"),
        ({"analysis_type": "feature", "file": (io.BytesIO(npz(layer1=np.ones((1, 4)))), "a.npz")}, 400, "file"),
        ({"background": "yes"}, 400, "background"),
        ({"unknown": "x"}, 400, "unknown"),
        ({"config": (io.BytesIO(b"{}"), "config.json")}, 400, "config"),
        ({"file": "text"}, 400, "file"),
        ({"file": None}, 400, "file"),
        ({"model": "x"}, 404, "model"),
    ],
    # Not what a file prints as, which differs between processes.
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else str(value),
)
def test_a_form_that_does_not_fit_is_refused(
    client: FlaskClient, fields: dict[str, Any], status: int, param: str
) -> None:
    form = {"file": (io.BytesIO(npz(layer1=ROWS)), "a.npz"), "analysis_type": "neuron", **fields}
    form = {key: value for key, value in form.items() if value is not None}
    reply = client.post("/interpret/upload", data=form, content_type="multipart/form-data")
    assert (reply.status_code, reply.json["error"]["param"]) == (status, param), reply.text


def test_another_body_than_a_form_is_refused(client: FlaskClient) -> None:
    for options in ({"json": {}}, {"data": {"analysis_type": "neuron"}}, {"data": npz(layer1=ROWS)}):
        assert client.post("/interpret/upload", **options).status_code == 415
    boundary, whole = encode_multipart({"config": " " * 1000}, boundary="b")
    for body in (b"xyz", b"", b"--b\r\n\r\n", whole[:200]):
        for kind, says in (("", "boundary"), (f"; boundary={boundary}", "breaks off")):
            reply = client.post("/interpret/upload", data=body, content_type=f"multipart/form-data{kind}")
            assert (reply.status_code, reply.json["error"]["code"]) == (400, "invalid_form"), reply.text
            assert says in reply.json["error"]["message"]
    assert upload(client, npz(layer1=ROWS)).status_code == 200
    assert client.post("/interpret/upload?analysis_type=neuron").json["error"]["param"] == "analysis_type"


def test_pickles_are_refused(client: FlaskClient) -> None:
    import pickle

    reply = upload(client, pickle.dumps({"activations": [1]}), "activations.pt")
    assert (reply.status_code, reply.json["error"]["param"]) == (415, "file")
    assert "safetensors" in reply.json["error"]["message"]


@pytest.mark.parametrize(
    ("origin", "allowed", "status"),
    [
        ("https://evil.example", (), 403),
        ("null", (), 403),
        ("http://localhost.evil.example", (), 403),
        ("http://[", (), 403),
        ("http://localhost", (), 200),
        ("https://localhost", (), 200),
        ("https://lab.example", ("https://lab.example",), 200),
        ("https://evil.example", ("https://lab.example",), 403),
        ("https://evil.example", ("*",), 200),
    ],
)
def test_a_page_of_another_site_cannot_send_a_form(
    worker: ModelWorker, origin: str, allowed: tuple[str, ...], status: int
) -> None:
    """A browser would send it without asking first."""
    client = create_app(worker, ServerConfig(cors_origins=allowed)).test_client()
    form = {"file": (io.BytesIO(npz(layer1=ROWS)), "a.npz"), "analysis_type": "neuron"}
    assert client.post("/interpret/upload", data=form, headers={"Origin": origin}).status_code == status


def test_uploads_are_bounded(worker: ModelWorker) -> None:
    client = create_app(worker, ServerConfig(max_body_bytes=20_000)).test_client()
    noise = np.random.default_rng(0).standard_normal((100, 100))
    reply = upload(client, npz(layer1=noise))
    assert (reply.status_code, reply.json["error"]["code"]) == (413, "request_too_large")
    packed = io.BytesIO()
    np.savez_compressed(packed, layer1=np.zeros((1000, 1000)))
    assert len(packed.getvalue()) < 20_000
    reply = upload(client, packed.getvalue())
    assert (reply.status_code, reply.json["error"]["code"]) == (413, "upload_too_large")
    assert upload(client, npz(layer1=ROWS)).status_code == 200


def test_a_long_config_is_read_as_far_as_a_body_may_be_long(client: FlaskClient) -> None:
    config = "{" + " " * 1_000_000 + "}"
    file = FileStorage(io.BytesIO(npz(layer1=ROWS)), "a.npz")
    form = {"file": file, "analysis_type": "neuron", "config": config}
    # The test client would leave the file open in which it puts a long form.
    boundary, body = encode_multipart(form)
    reply = client.post("/interpret/upload", data=body, content_type=f"multipart/form-data; boundary={boundary}")
    assert reply.status_code == 200, reply.text


def test_a_form_of_very_many_fields_is_not_called_too_long(client: FlaskClient) -> None:
    boundary, body = encode_multipart({f"field{i}": "x" for i in range(2000)})
    reply = client.post("/interpret/upload", data=body, content_type=f"multipart/form-data; boundary={boundary}")
    assert (reply.status_code, reply.json["error"]["code"]) == (400, "invalid_form"), reply.text
    assert "analysis_type" in reply.json["error"]["message"]


def test_only_so_many_uploads_are_unpacked_at_a_time(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["api_server.interpretability"]
    lock, reading, most = threading.Lock(), [0], [0]

    def slow(file: Any, max_bytes: int) -> Any:
        with lock:
            reading[0] += 1
            most[0] = max(most[0], reading[0])
        time.sleep(0.1)
        with lock:
            reading[0] -= 1
        return read_upload(file, max_bytes)

    monkeypatch.setattr(module, "read_upload", slow)
    threads = [threading.Thread(target=upload, args=(client, npz(layer1=ROWS))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == interpretability.MAX_RUNNING == 2


def test_tokens_that_a_model_does_not_have_are_not_spelled(client: FlaskClient) -> None:
    tokens = np.full(64, 10**9)
    reply = upload(client, npz(layer1=ROWS, tokens=tokens), model="neuroscope-tiny")
    assert reply.status_code == 200, reply.text
    (told, *_) = reply.json["results"]["layer1"]["top_tokens"]
    assert {(token["token_id"], token["token"]) for token in told["tokens"]} == {(10**9, None)}


def test_words_for_files_and_folders_are_those_of_the_request(client: FlaskClient) -> None:
    for fields in ({"layer_name": "layer9"}, {"analysis_type": "heads"}):
        assert "he file has no" in upload(client, npz(layer1=ROWS), **fields).json["error"]["message"]


# -- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["captured", "upload"])
def test_an_analysis_in_the_background_is_a_job(client: FlaskClient, kind: str, values: np.ndarray) -> None:
    if kind == "captured":
        reply = client.post("/interpret", json=NEURON | {"background": True})
        direct = client.post("/interpret", json=NEURON).json
    else:
        reply = upload(client, npz(layer1=ROWS), background="true")
        direct = upload(client, npz(layer1=ROWS), background="false").json
    assert reply.status_code == 202
    address = reply.headers["Location"]
    assert address == f"/v1/jobs/{reply.json['id']}"
    until(lambda: client.get(address).json["status"] == "completed")
    job = client.get(address).json
    assert job["kind"] == "interpret"
    assert job["result"] | {"timestamp": 0} == direct | {"timestamp": 0}


def test_a_job_that_fails_says_why(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise HookError("Three rows are too few.", field="k")

    monkeypatch.setattr(sys.modules["api_server.interpretability"], "run_analysis", fail)
    reply = client.post("/interpret", json=NEURON)
    assert (reply.status_code, reply.json["error"]["param"]) == (400, "config.k")
    reply = client.post("/interpret", json=NEURON | {"background": True})
    until(lambda: client.get(reply.headers["Location"]).json["status"] == "failed")
    assert client.get(reply.headers["Location"]).json["error"]["message"] == "Three rows are too few."


@pytest.mark.parametrize("body", [NEURON, {"analysis_type": "causal", "config": {"eval_data": ["the cat sat"]}}])
def test_an_analysis_shows_its_progress_and_can_be_cancelled(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    with analysing(monkeypatch):
        reply = client.post("/interpret", json=body | {"background": True})
        address = reply.headers["Location"]
        until(lambda: client.get(address).json["fraction"] == 0.25)
        # Others are served meanwhile.
        assert client.post("/v1/tokenize", json={"text": "the cat"}).status_code == 200
        assert client.delete(address).status_code == 200
        until(lambda: client.get(address).json["status"] == "cancelled")
    threads = [thread for thread in threading.enumerate() if thread.name == "analysis"]
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_closing_an_application_leaves_its_analyses(
    worker: ModelWorker, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(worker, ServerConfig(mechint=folder))
    with analysing(monkeypatch):
        reply = app.test_client().post("/interpret", json=NEURON | {"background": True})
        until(lambda: worker.shown(worker.job(reply.json["id"]))["fraction"] == 0.25)
        assert close_app(app)
        assert not [thread for thread in threading.enumerate() if thread.name == "analysis"]


def test_results_are_shown_one_at_a_time_and_the_oldest_make_room(
    client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def done(**fields: Any) -> str:
        address = str(upload(client, npz(layer1=ROWS), background="true", **fields).headers["Location"])
        until(lambda: client.get(address).json["status"] == "completed")
        return address

    first = done()
    size = len(json.dumps(client.get(first).json["result"]))
    assert {job["result"] for job in client.get("/v1/jobs").json["data"]} == {None}
    monkeypatch.setattr("api_server.worker.REMEMBERED_BYTES", int(1.5 * size))
    second, third = done(), done()
    assert client.post("/interpret", json=NEURON).status_code == 200
    assert [client.get(address).status_code for address in (first, second, third)] == [404, 404, 200]
    assert client.get(third).json["result"]["results"]


def test_only_so_many_analyses_are_taken(client: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    with analysing(monkeypatch) as go:
        jobs = [client.post("/interpret", json=NEURON | {"background": True}) for _ in range(MAX_ANALYSES)]
        assert {reply.status_code for reply in jobs} == {202}
        for reply in (client.post("/interpret", json=NEURON), upload(client, npz(layer1=ROWS))):
            assert (reply.status_code, reply.json["error"]["code"]) == (503, "busy")
            assert reply.headers["Retry-After"]
        # One that waits gives its place away at once.
        assert client.delete(jobs[-1].headers["Location"]).status_code == 200
        until(lambda: client.get(jobs[-1].headers["Location"]).json["status"] == "cancelled")
        last = client.post("/interpret", json=NEURON | {"background": True})
        assert last.status_code == 202
        go.set()
        until(lambda: client.get(last.headers["Location"]).json["status"] == "completed")


def test_who_leaves_cancels_the_analysis(worker: ModelWorker, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with analysing(monkeypatch), running_server(worker, ServerConfig(port=0, mechint=folder)) as url:
        asked = urllib.request.Request(
            f"{url}/interpret", json.dumps(NEURON).encode(), {"Content-Type": "application/json"}
        )
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(asked, timeout=0.3)
        until(lambda: worker.jobs()[0]["status"] == "cancelled")
        assert worker.jobs()[0]["kind"] == "interpret"


# -- in another application -------------------------------------------------------------------------------------------


@contextmanager
def serving(app: Flask) -> Iterator[str]:
    """The URL of an application on werkzeug's own server."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def curl(*arguments: str) -> Any:
    done = subprocess.run(["curl", "-sS", "--max-time", "60", *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def bare(folder: Path) -> Iterator[Flask]:
    """Somebody's own application, with the blueprint."""
    app = Flask("bare")
    model = HookedModel.from_pretrained("neuroscope-tiny")
    blueprint = interpretability_blueprint(model, MechIntConfig(storage_path=str(folder)))
    app.register_blueprint(blueprint)
    app.get("/")(lambda: "home")
    yield app
    blueprint.close()


def test_the_guides_three_calls_are_answered_by_another_application(
    bare: Flask, values: np.ndarray, tmp_path: Path
) -> None:
    file = tmp_path / "activations.safetensors"
    mx.save_safetensors(str(file), {"layer1": mx.array(ROWS)})
    with serving(bare) as url:
        assert curl(f"{url}/interpret/layers")["layers"] == [RESID, PATTERN]
        body = json.dumps(NEURON)
        found = curl("-X", "POST", f"{url}/interpret", "-H", "Content-Type: application/json", "-d", body)
        close_to(found["results"][RESID]["mean_activation"], values.mean(0))
        found = curl("-X", "POST", f"{url}/interpret/upload", "-F", f"file=@{file}", "-F", "analysis_type=feature")
        assert (found["analysis_type"], found["filename"]) == ("feature", "activations.safetensors")
        assert list(found["results"]) == ["layer1"]


def test_the_same_on_our_server(worker: ModelWorker, folder: Path, tmp_path: Path, values: np.ndarray) -> None:
    file = tmp_path / "activations.npz"
    file.write_bytes(npz(layer1=ROWS))
    with running_server(worker, ServerConfig(port=0, mechint=folder)) as url:
        assert curl(f"{url}/interpret/layers")["layers"] == [RESID, PATTERN]
        body = json.dumps(NEURON)
        found = curl("-X", "POST", f"{url}/interpret", "-H", "Content-Type: application/json", "-d", body)
        close_to(found["results"][RESID]["mean_activation"], values.mean(0))
        found = curl("-X", "POST", f"{url}/interpret/upload", "-F", f"file=@{file}", "-F", "analysis_type=neuron")
        close_to(found["results"]["layer1"]["mean_activation"], ROWS.mean(0))


def test_another_application_stays_its_own(bare: Flask) -> None:
    client = bare.test_client()
    assert client.get("/").text == "home"
    assert client.get("/nowhere").mimetype == "text/html"
    assert not {"model_worker", "server_config"} & set(bare.extensions)
    reply = client.post("/interpret", json={"analysis_type": "x"}, headers={"X-Request-Id": "mine"})
    assert (reply.status_code, reply.json["error"]["request_id"], reply.headers["X-Request-Id"]) == (
        400,
        "mine",
        "mine",
    )


def test_another_application_has_the_jobs_of_the_blueprint(bare: Flask) -> None:
    client = bare.test_client()
    config = {"eval_data": ["the cat sat on the mat"]}
    reply = client.post("/interpret", json={"analysis_type": "causal", "config": config, "background": True})
    assert reply.status_code == 202, reply.text
    until(lambda: client.get(reply.headers["Location"]).json["status"] == "completed")
    assert client.get(reply.headers["Location"]).json["result"]["analysis_type"] == "causal"


def test_another_application_refuses_as_it_likes(bare: Flask) -> None:
    def redirected() -> Any:
        abort(redirect("/login"))

    answers: list[tuple[Callable[[], Any], int, str]] = [
        (lambda: ({"error": "log in"}, 401), 401, "log in"),
        (lambda: abort(401), 401, "Unauthorized"),
        (lambda: redirect("/login"), 302, "/login"),
        (redirected, 302, "/login"),
        (lambda: 1 // 0, 500, "Internal Server Error"),
    ]
    now: list[Callable[[], Any]] = [lambda: None]
    bare.before_request(lambda: now[0]() if request.path.startswith("/interpret") else None)
    client = bare.test_client()
    for refusal, status, says in answers:
        now[0] = refusal
        reply = client.get("/interpret/layers")
        assert (reply.status_code, says in reply.text) == (status, True), reply.text
    now[0] = lambda: None
    assert client.post("/interpret", json={"analysis_type": "x"}).json["error"]["param"] == "analysis_type"


def test_another_application_has_its_own_pages_for_what_it_refuses() -> None:
    app = Flask("pages")
    blueprint = interpretability_blueprint(None, {"storage_path": "x"})
    app.register_blueprint(blueprint)
    app.before_request(lambda: abort(401))
    app.register_error_handler(HTTPException, lambda error: (f"our page {error.code}", error.code or 500))
    reply = app.test_client().get("/interpret/layers")
    assert (reply.status_code, reply.text) == (401, "our page 401")
    blueprint.close()


@pytest.mark.parametrize("body", [NEURON, {"analysis_type": "causal", "config": {"eval_data": ["the cat sat"]}}])
def test_closing_a_blueprint_answers_what_it_leaves(
    bare: Flask, monkeypatch: pytest.MonkeyPatch, body: dict[str, Any]
) -> None:
    client, replies = bare.test_client(), []
    blueprint: Any = bare.blueprints["interpretability"]
    with analysing(monkeypatch):
        job = client.post("/interpret", json=body | {"background": True})
        thread = threading.Thread(target=lambda: replies.append(client.post("/interpret", json=body)))
        thread.start()
        until(lambda: [one["fraction"] for one in client.get("/v1/jobs").json["data"]] == [0.25, 0.25])
        blueprint.close()
        thread.join(10)
    assert [(reply.status_code, reply.json["error"]["code"]) for reply in replies] == [(503, "stopping")]
    ended = blueprint._worker.shown(blueprint._worker.job(job.json["id"]))
    assert ended["error"]["code"] == "stopping"
    for reply in (client.get("/interpret/layers"), client.post("/interpret", json=body)):
        assert (reply.status_code, reply.json["error"]["code"]) == (503, "stopping")


def test_an_application_that_uses_the_model_itself_keeps_no_other_analysis_waiting(folder: Path) -> None:
    model = HookedModel.from_pretrained("neuroscope-tiny")
    app = Flask("user")
    blueprint = interpretability_blueprint(model, {"storage_path": str(folder)})
    app.register_blueprint(blueprint)
    client = app.test_client()
    body = {"analysis_type": "causal", "config": {"eval_data": ["the cat sat"]}, "background": True}
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, point: None)]):
        waiting, cancelled = (client.post("/interpret", json=body).headers["Location"] for _ in range(2))
        until(lambda: "another thread" in client.get(waiting).json["message"])
        assert client.post("/interpret", json=NEURON).status_code == 200
        client.delete(cancelled)
        until(lambda: client.get(cancelled).json["status"] == "cancelled")
    until(lambda: client.get(waiting).json["status"] == "completed")
    blueprint.close()


@pytest.mark.parametrize("steers", [False, True])
def test_a_blueprint_steers_where_its_configuration_says_so(
    folder: Path, llama: HookedModel, monkeypatch: pytest.MonkeyPatch, steers: bool
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        sys.modules["api_server.interpretability"],
        "run_analysis",
        lambda name, context, layer, options, progress: seen.append(context) or {},
    )
    blueprint = interpretability_blueprint(llama, MechIntConfig(storage_path=folder, enable_feature_steering=steers))
    app = Flask("steering")
    app.register_blueprint(blueprint)
    body = {"analysis_type": "sae", "layer_name": "2"}
    for config, expected in (({}, False), ({"eval_data": [[1, 2, 3]]}, steers)):
        assert app.test_client().post("/interpret", json=body | {"config": config}).status_code == 200
        assert seen[-1].steer is expected
    blueprint.close()


def test_a_configuration_that_would_fail_each_request_is_refused(tmp_path: Path) -> None:
    def made(**options: Any) -> Any:
        return interpretability_blueprint(None, {"storage_path": str(tmp_path), "analysis_options": options})

    made(neuron={"part_size": 10})
    with pytest.raises(HookError, match="no field 'foo'"):
        made(neuron={"foo": 1})
    with pytest.raises(HookError, match="leave save_to out"):
        made(sae={"save_to": tmp_path})
    for size in (-1, 0, "5", True):
        with pytest.raises(HookError, match="max_upload_bytes"):
            interpretability_blueprint(None, {"storage_path": "x"}, max_upload_bytes=size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="origin"):
        interpretability_blueprint(None, {"storage_path": "x"}, cors_origins=["lab.example/x"])


def test_a_blueprint_without_a_model_says_where_one_is_given() -> None:
    app = Flask("modelless")
    blueprint = interpretability_blueprint(None, {"storage_path": "x"}, cors_origins=["https://lab.example"])
    app.register_blueprint(blueprint)
    client = app.test_client()
    reply = client.post("/interpret", json={"analysis_type": "causal", "config": {"eval_data": ["the cat"]}})
    assert (reply.status_code, reply.json["error"]["code"]) == (409, "no_model_loaded")
    assert "interpretability_blueprint" in reply.json["error"]["message"]
    for origin, status in (("https://lab.example", 200), ("https://evil.example", 403)):
        form = {"file": (io.BytesIO(npz(layer1=ROWS)), "a.npz"), "analysis_type": "neuron"}
        reply = client.post("/interpret/upload", data=form, headers={"Origin": origin})
        assert reply.status_code == status
    assert "cors_origins" in reply.json["error"]["message"]
    blueprint.close()


def test_two_blueprints_stand_beside_one_another(folder: Path, tmp_path: Path) -> None:
    app = Flask("two")
    one = interpretability_blueprint(config={"storage_path": str(folder)}, name="one")
    two = interpretability_blueprint(config={"storage_path": str(tmp_path)}, name="two", max_upload_bytes=1000)
    app.register_blueprint(one, url_prefix="/one")
    app.register_blueprint(two, url_prefix="/two")
    client = app.test_client()
    assert client.get("/one/interpret/layers").json["layers"] == [RESID, PATTERN]
    assert client.get("/two/interpret/layers").json["layers"] == []
    reply = client.post("/one/interpret", json=NEURON | {"background": True})
    assert reply.headers["Location"] == f"/one/v1/jobs/{reply.json['id']}"
    form = {"analysis_type": "neuron"}
    for name, status in (("one", 200), ("two", 413)):
        form = {"file": (io.BytesIO(npz(layer1=ROWS)), "a.npz"), "analysis_type": "neuron"}
        assert client.post(f"/{name}/interpret/upload", data=form).status_code == status
    until(lambda: client.get(reply.headers["Location"]).json["status"] == "completed")
    one.close()
    two.close()


def test_a_plain_model_of_mlx_lm_will_do(llama: HookedModel) -> None:
    app = Flask("plain")
    blueprint = interpretability_blueprint(llama.model, {"storage_path": "nowhere"})
    app.register_blueprint(blueprint)
    client = app.test_client()
    assert "blocks.0.hook_resid_post" in client.get("/interpret/layers").json["available"]
    config = {"eval_data": [[1, 2, 3, 4], [5, 6, 7]]}
    reply = client.post("/interpret", json={"analysis_type": "causal", "config": config})
    assert reply.status_code == 200, reply.text
    reply = client.post("/interpret", json=NEURON)
    assert (reply.status_code, reply.json["error"]["code"]) == (404, "activations_not_found")
    blueprint.close()


def test_options_of_the_configuration_hold_unless_the_request_says_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        sys.modules["api_server.interpretability"],
        "run_analysis",
        lambda name, context, layer, options, progress: seen.append(options) or {},
    )
    config = MechIntConfig(storage_path=folder, analysis_options={"feature": {"n_components": 3}})
    app = Flask("configured")
    blueprint = interpretability_blueprint(None, config)
    app.register_blueprint(blueprint)
    for given, expected in (({}, 3), ({"n_components": 2}, 2)):
        reply = app.test_client().post("/interpret", json=NEURON | {"analysis_type": "feature", "config": given})
        assert reply.status_code == 200, reply.text
        assert seen[-1].n_components == expected
    blueprint.close()
    with pytest.raises(HookError, match="no field"):
        interpretability_blueprint(None, {"storage": "x"})


def test_every_analysis_can_be_asked_for(client: FlaskClient) -> None:
    known = client.get("/openapi.json").json["components"]["schemas"]["InterpretRequest"]["properties"]
    assert known["analysis_type"]["enum"] == list(ANALYSES)
    assert interpretability.ANALYSES_BY_NAME.keys() == set(ANALYSES)


def test_a_probe_takes_labels_by_token_or_by_row(client: FlaskClient, folder: Path) -> None:
    tokens = np.concatenate([np.array(mx.load(str(path))["tokens"]) for path in sorted(folder.glob("*.safetensors"))])
    by_row = ["seen" if row % 2 else "other" for row in range(len(tokens))]
    body = {"analysis_type": "probe", "layer_name": "2", "config": {"labels": by_row, "controls": 1, "folds": 2}}
    reply = client.post("/interpret", json=body)
    assert reply.status_code == 200, reply.text
    named = {str(token): "even" if token % 2 == 0 else "odd" for token in set(tokens.tolist())}
    body["config"]["labels"] = named
    reply = client.post("/interpret", json=body)
    assert reply.status_code == 200, reply.text
    assert [one["label"] for one in reply.json["results"][RESID]["classes"]] == ["even", "odd"]
    reply = client.post("/interpret", json=body | {"config": {}})
    assert (reply.status_code, reply.json["error"]["param"]) == (400, "config.labels")
    reply = client.post("/interpret", json=body | {"config": {"labels": ["a"]}})
    assert (reply.status_code, reply.json["error"]["param"]) == (400, "config.labels")


def test_an_autoencoder_is_tried_in_the_model_where_there_is_data(client: FlaskClient) -> None:
    config = {"max_steps": 10, "d_sae": 16, "top_features": 2}
    body = {"analysis_type": "sae", "layer_name": "2", "config": config}
    plain = client.post("/interpret", json=body)
    assert plain.status_code == 200, plain.text
    assert {"training_stats", "final_l0", "final_loss", "fvu"} <= set(plain.json["results"][RESID])
    config |= {"eval_data": ["The capital of France is Paris ."], "steering": True, "steering_features": 1}
    tried = client.post("/interpret", json=body)
    assert tried.status_code == 200, tried.text
    assert tried.json["results"][RESID]["loss_recovered"]
    assert tried.json["results"][RESID]["steering"]
    assert not plain.json["results"][RESID].get("steering")


def test_tokens_are_spelled_by_a_model_of_their_vocabulary(worker: ModelWorker, folder: Path) -> None:
    def spelled(client: FlaskClient, **further: str) -> set[Any]:
        (told, *_) = client.post("/interpret", json=NEURON | further).json["results"][RESID]["top_tokens"]
        return {token["token"] for token in told["tokens"]}

    client = create_app(worker, ServerConfig(mechint=folder)).test_client()
    assert all(token in "<bos> The capital of France is Paris . the cat sat on mat What ?" for token in spelled(client))
    with ModelWorker(load_tiny) as other:
        other.load("llama")
        client = create_app(other, ServerConfig(mechint=folder)).test_client()
        assert spelled(client) == {None}
        # Who names a model is taken at his word, as far as it has such tokens.
        assert spelled(client, model="llama") == {None, "<unk>"}
