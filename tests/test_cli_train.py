"""``neuroscope train``: mlx-lm's command with capture."""

import json
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from training_runs import folder_of, same, write_lora_folder

from mlx_hooks.cli import main
from mlx_hooks.storage.files import HeldFolder


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora_folder(tmp_path_factory.mktemp("lora"))


def lora_options(folder: Path, adapters: Path, **more: Any) -> list[str]:
    options = {"model": "neuroscope-tiny", "data": folder / "data", "adapter-path": adapters, "iters": 5} | more
    options |= {"batch-size": 2, "num-layers": 2, "val-batches": 1, "max-seq-length": 64, "learning-rate": 1e-3}
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def weights(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "adapters.safetensors"))


def test_training_with_capture(
    lora_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm import lora

    model = str(lora_folder / "model")
    monkeypatch.setattr("sys.argv", ["lora", "--train", *lora_options(lora_folder, tmp_path / "plain", model=model)])
    lora.main()
    settings = tmp_path / "capture.yaml"
    settings.write_text(f"storage_path: {tmp_path / 'other'}\nmax_activations_per_shard: 30\n")
    storage = tmp_path / "shards"
    mine = ["--mechint", str(settings), "--layers", "1", "blocks.2.attn.hook_z", "--every", "2"]
    mine += ["--storage", str(storage), "--first-step", "10"]
    capsys.readouterr()
    assert main(["train", *mine, "--", *lora_options(lora_folder, tmp_path / "captured")]) == 0
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "captured"))
    found = folder_of(storage)
    assert found.steps == [10, 12, 14]
    rows = sum(entry["rows"] for entry in found.reader.entries)
    names = "blocks.1.hook_resid_post, blocks.2.attn.hook_z"
    files = len(found.reader.entries)
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == f"Captured {rows} tokens in {files} files of {storage}: {names}"
    told = [line for line in said.err.splitlines() if line.startswith("step ")]
    assert [line.split(":")[0] for line in told] == ["step 10", "step 12", "step 14"]
    assert " rows of 2 layers, activations_shard_" in told[0]
    assert max(entry["rows"] for entry in found.reader.entries) <= 30


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        (["--layers", "nope"], "Unknown hook point 'nope'"),
        (["--every", "0"], "save_hidden_every_n_steps must be greater than or equal to 1, got 0"),
        (["--first-step", "-1"], "first_step is a whole number from 0 up, got -1"),
        (["--mechint", "{tmp}/missing.json"], "cannot read {tmp}/missing.json: No such file"),
        (["--mechint", "{tmp}/list.json"], "cannot read {tmp}/list.json: it has no fields of MechIntConfig"),
        (["--mechint", "{tmp}/broken.yaml"], "cannot read {tmp}/broken.yaml: "),
        (["--mechint", "{tmp}/unknown.json"], "MechIntConfig has no field 'layers'. There are: sample_layers, "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_is_one_line(
    mine: list[str], message: str, lora_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "unknown.json").write_text(json.dumps({"layers": [1]}))
    mine = [part.replace("{tmp}", str(tmp_path)) for part in mine] + ["--storage", str(tmp_path / "shards")]
    assert main(["train", *mine, "--", *lora_options(lora_folder, tmp_path / "adapters")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"neuroscope: {message.replace('{tmp}', str(tmp_path))}")
    assert said.count("\n") == 1


def test_the_bundled_model_in_a_file_of_options(
    lora_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = tmp_path / "lora.yaml"
    options.write_text(f"model: neuroscope-tiny\ndata: {lora_folder / 'data'}\nnum_layers: 2\nval_batches: 1\n")
    quiet = tmp_path / "quiet.json"
    quiet.write_text('{"verbose": false}')
    more = ["--config", str(options), "--iters", "1", "--batch-size", "2", "--adapter-path", str(tmp_path / "adapters")]
    mine = ["--mechint", str(quiet), "--storage", str(tmp_path / "shards")]
    assert main(["train", *mine, "--", *more]) == 0
    assert folder_of(tmp_path / "shards").steps == [0]
    assert "step 0" not in capsys.readouterr().err


def file(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("")
    return {"storage_path": str(folder / "file")}


def held(folder: Path) -> dict[str, Any]:
    (folder / "shards").mkdir()
    return {"storage_path": str(folder / "shards")}


def s3(folder: Path) -> dict[str, Any]:
    return {"storage_path": str(folder / "shards"), "storage_backend": "s3", "s3_bucket": "captures"}


@pytest.mark.parametrize(
    ("storage", "message"), [(file, "cannot write"), (held, "is being written by another run"), (s3, "credentials")]
)
def test_storage_is_seen_to_before_anything_is_loaded(
    storage: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded() -> None:
        raise AssertionError("mlx_lm.lora was begun")

    monkeypatch.setattr("mlx_lm.lora.main", loaded)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    settings = tmp_path / "capture.json"
    settings.write_text(json.dumps(storage(tmp_path)))
    with HeldFolder(tmp_path / "shards") if storage is held else nullcontext():
        assert main(["train", "--mechint", str(settings), "--", "--model", "nowhere"]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_options_of_mlx_lm_without_their_place_are_told(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--layers", "1", "--model", "neuroscope-tiny"])
    told = capsys.readouterr().err.splitlines()[-1]
    assert "unrecognized arguments: --model" in told
    assert told.endswith(": the options of mlx_lm.lora come after --")


@pytest.mark.parametrize("options", [[], ["--data", "texts"]])
def test_a_model_must_be_named(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_lm.lora.main", lambda: None)
    assert main(["train", "--storage", str(tmp_path / "shards"), "--", *options]) == 1
    message = "The options of mlx_lm.lora come after --, at least --model and --data."
    assert capsys.readouterr().err == f"neuroscope: {message}\n"
    assert not (tmp_path / "shards").exists()


def test_lines_of_captures_are_shown_meanwhile_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, levels = logging.getLogger("mlx_hooks.training"), []
    monkeypatch.setattr("mlx_lm.lora.main", lambda: levels.append(log.level))
    level, handlers = log.level, list(log.handlers)
    assert main(["train", "--storage", str(tmp_path / "shards"), "--", "--model", "neuroscope-tiny"]) == 0
    assert levels == [logging.INFO]
    assert (log.level, log.handlers) == (level, handlers)


def test_what_mlx_lm_refuses_is_one_line(lora_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    options = lora_options(tmp_path, tmp_path / "adapters")
    assert main(["train", "--storage", str(tmp_path / "shards"), "--", *options]) == 1
    assert capsys.readouterr().err.startswith("neuroscope: mlx_lm.lora: Training set not found")
