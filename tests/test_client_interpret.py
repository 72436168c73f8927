"""The client's analyses of captured activations, against a real server."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from server_tools import CAPTURED_TEXTS

from neuroscope_bridge import LMStudioNeuroScopeClient
from neuroscope_bridge.errors import NeuroScopeAPIError, PayloadError
from neuroscope_bridge.payload import safetensors_buffers

RESID, PATTERN = "blocks.2.hook_resid_post", "blocks.1.attn.hook_pattern"
ROWS = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)


@pytest.fixture
def client(live_server: SimpleNamespace) -> Iterator[LMStudioNeuroScopeClient]:
    with LMStudioNeuroScopeClient(live_server.base_url) as client:
        yield client


def test_layers(client: LMStudioNeuroScopeClient) -> None:
    found = client.interpret_layers()
    assert found["layers"] == [RESID, PATTERN]
    assert found["steps"] == list(CAPTURED_TEXTS)
    assert client.interpret_layers("neuroscope-tiny") == found


def test_what_was_captured_is_analysed(client: LMStudioNeuroScopeClient) -> None:
    direct = client.interpret("neuron", 2, {"steps": [200]})
    assert list(direct["results"]) == [RESID]
    job = client.interpret("neuron", "2", {"steps": [200]}, background=True)
    later = client.wait_for_job(job["id"], interval=0.02)
    assert later | {"timestamp": 0} == direct | {"timestamp": 0}
    assert list(client.interpret("heads")["results"]) == [PATTERN]


def test_a_model_is_analysed(client: LMStudioNeuroScopeClient) -> None:
    found = client.interpret("causal", config={"eval_data": ["the cat sat on the mat"]}, model="neuroscope-tiny")
    assert found["analysis_type"] == "causal"
    assert found["results"]


def test_arrays_and_files_are_uploaded(client: LMStudioNeuroScopeClient, tmp_path: Path) -> None:
    arrays = {
        "layer1": ROWS,
        "layer2": ROWS.astype(np.float16),
        "tokens": np.arange(64),
        "layer3": np.ones((64, 2), int),
    }
    found = client.interpret_upload(arrays, "neuron")
    assert found["filename"] == "activations.safetensors"
    assert list(found["results"]) == ["layer1", "layer2", "layer3"]
    np.testing.assert_allclose(found["results"]["layer1"]["mean_activation"], ROWS.mean(0), atol=1e-5)
    (top, *_) = found["results"]["layer1"]["top_tokens"]
    assert top["tokens"][0]["token_id"] == top["tokens"][0]["row"] == ROWS[:, top["neuron"]].argmax()
    npz, plain = tmp_path / "a.npz", tmp_path / "b.safetensors"
    np.savez(npz, layer1=ROWS)
    plain.write_bytes(b"".join(safetensors_buffers({"layer1": ROWS}, {})))
    for path in (npz, str(plain)):
        again = client.interpret_upload(path, "neuron", "layer1", {})
        assert again["filename"] == Path(path).name
        for key in ("mean_activation", "max_activation"):
            assert again["results"]["layer1"][key] == found["results"]["layer1"][key]
    job = client.interpret_upload(npz, "neuron", background=True)
    assert client.wait_for_job(job["id"], interval=0.02)["results"] == again["results"]
    # What a form changed on its way does not stay.
    assert client.interpret("neuron", 2)["results"]


def test_what_is_refused_is_said(client: LMStudioNeuroScopeClient, tmp_path: Path) -> None:
    with pytest.raises(NeuroScopeAPIError, match="layer9"):
        client.interpret_upload({"layer1": ROWS}, "neuron", "layer9")
    with pytest.raises(NeuroScopeAPIError, match="not captured"):
        client.interpret("neuron", "3")
    with pytest.raises(PayloadError, match="real numbers"):
        client.interpret_upload({"layer1": ROWS.astype(complex)}, "neuron")
    with pytest.raises(FileNotFoundError):
        client.interpret_upload(tmp_path / "none.npz", "neuron")


def test_numbers_too_large_for_an_index_are_no_indices(client: LMStudioNeuroScopeClient) -> None:
    found = client.interpret_upload({"layer1": np.full((4, 2), 2**40)}, "neuron")
    assert found["results"]["layer1"]["mean_activation"] == [2.0**40] * 2


def test_arrays_of_mlx_are_sent_as_they_are(client: LMStudioNeuroScopeClient) -> None:
    half = mx.array(ROWS).astype(mx.bfloat16)
    found = client.interpret_upload({"layer1": half, "turned": half.T}, "neuron")["results"]
    expected = np.array(half.astype(mx.float32))
    np.testing.assert_allclose(found["layer1"]["mean_activation"], expected.mean(0), atol=1e-6)
    np.testing.assert_allclose(found["turned"]["mean_activation"], expected.mean(1), atol=1e-6)
    plain = client.interpret("causal", config={"eval_data": [[1, 2, 3, 4]], "components": ["mlp_out"]})["results"]
    for rows in (mx.array([[1, 2, 3, 4]]), [mx.array([1, 2, 3, 4])], np.array([[1, 2, 3, 4]])):
        config = {"eval_data": rows, "components": ["mlp_out"]}
        assert client.interpret("causal", config=config)["results"] == plain


def test_a_number_that_json_does_not_have_is_refused_here(client: LMStudioNeuroScopeClient) -> None:
    with pytest.raises(ValueError, match="threshold must be a finite number, got nan"):
        client.interpret("neuron", config={"threshold": float("nan")})
