"""The README's blocks do what they say."""

import json
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import documents
import pytest
from documents import DEFAULT

from mlx_hooks import HookedModel

blocks = partial(documents.blocks, "README.md")


def test_the_engines_block_runs_with_the_shapes_that_it_names() -> None:
    block = next(block for block in blocks("python") if "HookedModel" in block)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["cache"]["blocks.3.hook_resid_post"].shape == (1, 6, 128)
    assert "(1, 6, 128)" in block
    assert names["result"].text.strip().startswith("Paris")
    n_positions = len(names["result"].prompt_tokens) + len(names["result"].tokens) - 1
    assert names["result"].cache["resid_post", 0].shape == (1, n_positions, 128)


def test_the_block_of_interventions_runs() -> None:
    block = next(block for block in blocks("python") if "interventions=[" in block)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["result"].text.strip() == "Rome"
    assert "# Rome" in block
    assert names["result"].interventions[0].positions == (4,)
    assert [names["model"].to_str_tokens("The capital of France is")[4].strip()] == ["France"]


def test_the_memory_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {"model": HookedModel.from_pretrained("neuroscope-tiny")}
    block = next(block for block in blocks("python") if "spill_to" in block)
    exec(compile(block, "README.md", "exec"), names)
    assert capsys.readouterr().out.startswith("204.8 MB at 4 hook points")
    assert "204.8 MB at 4 hook points" in block
    assert names["residual"].shape == names["cache"]["resid_post", 1].shape == (1, 15, 128)
    assert list((tmp_path / "captured").iterdir())


def test_the_block_of_traits_runs(capsys: pytest.CaptureFixture) -> None:
    block = next(block for block in blocks("python") if "watch_traits" in block)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    *_, refused = capsys.readouterr().out.splitlines()
    assert refused.startswith("I do not know that .")
    assert "# with 2 times the vector: I do not know that ." in block
    assert names["step"].scores.shape == (1, 1)
    assert names["refusal"].metadata["held_out_accuracy"] == 1


def test_the_block_of_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = next(block for block in blocks("python") if "MechIntCallback" in block)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["curves"]["steps"] == [0, 10, 20]
    assert "# at steps 0, 10 and 20" in block
    assert set(names["curves"]["analyses"]["heads"]) == {f"blocks.{i}.attn.hook_pattern" for i in range(4)}
    assert "error" not in str(names["results"]["analyses"])
    assert sorted(path.name for path in (tmp_path / "mechint_results").iterdir()) == [
        "mechint_report.md",
        "mechint_results.json",
        "pictures",
    ]


def test_the_block_of_circuits_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    block = next(block for block in blocks("python") if "smallest_circuit" in block)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    (name, score), n_edges = names["scores"].ranked[0], len(names["scores"].edges)
    assert f"# ({name!r}, {score:.1f}): what ablating it changes" in block
    assert f"all {n_edges} edges" in block
    assert len(names["circuit"]) < n_edges / 3
    assert {path.name for path in tmp_path.iterdir()} == {"circuit.json", "circuit.png"}


def test_the_block_of_observers_lens_and_runs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    block = next(block for block in blocks("python") if "ActivationSaver" in block)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    received = names["hook"].attention_received_as_key(by="token")
    first = ", ".join(f"{text!r}: {weight:.1f}" for text, weight in list(received.items())[:3])
    assert f"{{{first}, ...}}" in block
    assert (tmp_path / "attention.graphml").read_text().startswith("<?xml")
    assert capsys.readouterr().out.startswith("logit difference at position 5")
    assert names["activations"]["resid_out_3"].shape == (2, 1, 128)
    assert names["metadata"]["tag"] == "first"


def test_the_clients_block_runs(live_server: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    block = next(block for block in blocks("python") if "LMStudioNeuroScopeClient" in block)
    assert DEFAULT in block
    names: dict = {}
    exec(compile(block.replace(DEFAULT, live_server.base_url), "README.md", "exec"), names)
    data = names["result"]["activations"]["layer_2_attention"][0]["data"]
    assert data.shape == (1, names["result"]["tokens"]["prompt_length"], 128)
    assert names["result"]["interventions"][0]["norm_after"] * 2 == names["result"]["interventions"][0]["norm_before"]
    assert capsys.readouterr().out.strip()
    names["client"].close()


def test_the_clients_block_of_traits_runs(live_server: SimpleNamespace) -> None:
    block = next(block for block in blocks("python") if "stored_traits" in block)
    names: dict = {}
    exec(compile(block.replace(DEFAULT, live_server.base_url), "README.md", "exec"), names)
    assert set(names["found"]["scores"][0]["scores"]) == {"mine"}
    stored = {trait["name"] for trait in names["experiment"]["traits"]}
    assert set(names["stored"]["scores"][0]["scores"]) == stored
    # The chat template puts tokens around the prompt.
    assert len(names["stored"]["scores"]) > len(names["found"]["scores"])
    names["client"].close()


def test_the_routes_of_traits_are_told_in_full() -> None:
    readme, changes = ((documents.ROOT / name).read_text() for name in ("README.md", "CHANGELOG.md"))
    assert "`POST`, `GET /v1/analysis/traits`" in readme
    for name in ("stored_chat", "stored_traits"):
        assert name in readme, name
        assert name in changes, name


def test_the_curl_block_runs(live_server: SimpleNamespace) -> None:
    block = next(block for block in blocks("") if "curl" in block)
    script = block.replace(DEFAULT, live_server.base_url)
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    decoder = json.JSONDecoder()
    loaded, end = decoder.raw_decode(done.stdout)
    reply, _ = decoder.raw_decode(done.stdout[end:].lstrip())
    assert loaded["status"] == "loaded"
    assert reply["choices"][0]["message"]["content"].strip() == "Paris is the capital of France ."
    assert reply["activations"]["layer_1_residual"][0]["hook_point"] == "blocks.1.hook_resid_post"
