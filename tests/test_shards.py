"""Shards: written, continued, killed, read."""

import hashlib
import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import shard_making
from safetensors.numpy import load_file
from shard_making import LAYER, LAYERS, child_environment, killer, values, write_step

from mlx_hooks import CaptureWarning, HookError, MechIntConfig, UnreadableShardWarning
from mlx_hooks.storage import manifest as manifests
from mlx_hooks.storage import shards
from mlx_hooks.storage.shards import ShardReader, ShardWriter, record_analysis
from mlx_hooks.training.writer import open_writer

ROOT = Path(__file__).parent.parent


def steps_written(folder: Path, *steps: int, n: int = 6, **options: Any) -> Path:
    with ShardWriter(folder, layers=LAYERS, **options) as writer:
        for step in steps:
            write_step(writer, step, n)
    return folder


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(do: Any) -> HookError:
    with pytest.raises(HookError) as caught:
        do()
    return caught.value


# --- What is in the files. ---


def test_a_shard_holds_at_most_so_many_rows(tmp_path: Path) -> None:
    steps_written(tmp_path, 0, 200, n=5, max_rows=2)
    found = names(tmp_path)
    assert found == [
        "activations_shard_000000_step_0.safetensors",
        "activations_shard_000001_step_0.safetensors",
        "activations_shard_000002_step_0.safetensors",
        "activations_shard_000003_step_200.safetensors",
        "activations_shard_000004_step_200.safetensors",
        "activations_shard_000005_step_200.safetensors",
        "manifest.json",
    ]
    told = manifest_of(tmp_path)
    assert [entry["rows"] for entry in told["shards"]] == [2, 2, 1, 2, 2, 1]
    assert (told["total_shards"], told["total_rows"]) == (6, 10)
    assert told["shards"][4]["bytes"] == (tmp_path / found[4]).stat().st_size
    # Another library reads the same.
    tensors = load_file(tmp_path / found[4])
    np.testing.assert_array_equal(tensors[LAYER], values(200, 5)[2:4])
    assert tensors["tokens"].tolist() == [200_002, 200_003]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_values_keep_the_type_and_the_bits_of_the_model(dtype: mx.Dtype, tmp_path: Path) -> None:
    given = mx.random.normal((7, 2, 3)).astype(dtype)
    layers = {LAYER: {"axes": ["head", "d_head"], "shape": [2, 3]}}
    with ShardWriter(tmp_path, layers=layers, max_rows=4) as writer:
        paths = writer.write({LAYER: given}, step=0, **shard_making.columns(0, 7))
    read = mx.concatenate([mx.load(str(path))[LAYER] for path in paths])
    assert read.dtype == dtype
    assert mx.array_equal(read, given)
    reader = ShardReader(tmp_path)
    assert mx.array_equal(reader.read_shard(reader.entries[0]).activations[LAYER], given[:4])
    np.testing.assert_array_equal(reader.rows(LAYER).sample(7).values, np.array(given.astype(mx.float32)).reshape(7, 6))


def test_the_manifest_grows_with_each_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, layers=LAYERS, description={"model": {"model_type": "llama"}}) as writer:
        assert manifest_of(tmp_path)["total_shards"] == 0
        for n, step in enumerate((0, 200, 400), start=1):
            path = write_step(writer, step, metadata={"epoch": n})[-1]
            told = manifest_of(tmp_path)
            assert told == writer.manifest
            assert (told["total_shards"], told["shards"][-1]["file"]) == (n, path.name)
            assert told["shards"][-1]["metadata"] == {"epoch": n}
    told = manifest_of(tmp_path)
    assert (told["format"], told["model"], len(told["id"])) == ("neuroscope-shards-1", {"model_type": "llama"}, 32)
    assert told["sessions"][0]["started"] <= told["sessions"][0]["ended"]


def test_each_shard_is_one_line_of_the_manifest(tmp_path: Path) -> None:
    steps_written(tmp_path, 0, 1)
    lines = (tmp_path / "manifest.json").read_text().splitlines()
    assert sum('"activations_shard_' in line for line in lines) == 2


def test_reports_are_in_the_manifest_with_the_next_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, layers=LAYERS) as writer:
        writer.report({"step": 10, "train_loss": 2.5})
        writer.report({"step": 20, "train_loss": float("nan"), "more": [float("inf"), 1]})
        assert manifest_of(tmp_path)["training"] == []
        write_step(writer, 20)
        assert [told["train_loss"] for told in manifest_of(tmp_path)["training"]] == [2.5, None]
        writer.report({"step": 30})
    assert manifest_of(tmp_path)["training"][1:] == [
        {"step": 20, "train_loss": None, "more": [None, 1]},
        {"step": 30},
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activations": {}}, "Rows are of blocks.0.hook_resid_post; got none."),
        ({"activations": {LAYER: np.zeros((6, 5))}}, r"has axes d_model of \[4\]; got \[5\]"),
        ({"activations": {LAYER: np.zeros((5, 4))}}, "the same number of rows"),
        ({"activations": {LAYER: np.zeros(6)}}, r"got \[\]"),
        ({"tokens": [1, 2]}, "the same number of rows"),
        ({"step": -1}, "step is a whole number from 0 up, got -1"),
        ({"step": 5.0}, "step is a whole number from 0 up, got 5.0"),
        ({"step": True}, "step is a whole number from 0 up, got True"),
        ({"step": "5"}, "step is a whole number from 0 up, got '5'"),
        ({"step": None}, "step is a whole number from 0 up, got None"),
        (
            {"metadata": {"run": {"at": Path("x")}}},
            r"metadata\['run'\]\['at'\] is a PosixPath; what is kept are numbers",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_not_written(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = {"activations": {LAYER: values(0, 6)}, "step": 0, **shard_making.columns(0, 6)} | change
    with ShardWriter(tmp_path, layers=LAYERS) as writer:
        with pytest.raises(HookError, match=said):
            writer.write(**given)
        assert names(tmp_path) == ["manifest.json"]
        write_step(writer, 0)
    assert refusal(lambda: write_step(writer, 1)).args[0].endswith("are closed: nothing more is written.")


def test_a_disk_that_is_full_loses_only_what_is_written_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = shard_making.shard_writer.write_arrays

    def full(path: Path, *rest: Any) -> None:
        if "_000001_" in path.name:
            path.write_bytes(b"some")
            raise OSError(28, "No space left on device")
        write(path, *rest)

    with ShardWriter(tmp_path, layers=LAYERS) as writer:
        write_step(writer, 0)
        monkeypatch.setattr(shard_making.shard_writer, "write_arrays", full)
        assert str(refusal(lambda: write_step(writer, 1))).endswith("step_1.safetensors: No space left on device")
        monkeypatch.undo()
        write_step(writer, 2)
    assert len(names(tmp_path)) == 3
    assert ShardReader(tmp_path).steps == [0, 2]


def test_numbers_of_other_libraries_are_kept_as_python_s(tmp_path: Path) -> None:
    metadata = {"loss": np.float32(0.5), "rate": mx.array(0.25), "counts": np.arange(2), "epoch": (1, float("nan"))}
    with ShardWriter(tmp_path, layers=LAYERS, description={"config": {"k": np.int64(4)}}) as writer:
        for step in (np.int64(5), mx.array(6)):
            write_step(writer, step, metadata=metadata)  # type: ignore[arg-type]
        writer.report({"step": np.int64(5), "train_loss": mx.array(2.5)})
    reader = ShardReader(tmp_path)
    assert reader.steps == [5, 6]
    shard = reader.read_shard(reader.entries[0])
    assert shard.metadata == {"loss": 0.5, "rate": 0.25, "counts": [0, 1], "epoch": [1, None]}
    told = manifest_of(tmp_path)
    assert (told["config"], told["training"]) == ({"k": 4}, [{"step": 5, "train_loss": 2.5}])


def test_what_is_no_json_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    error = refusal(lambda: ShardWriter(tmp_path / "x", layers=LAYERS, description={"config": {"k": object()}}))
    assert str(error).startswith("description['config']['k'] is a object; what is kept are numbers, texts")
    assert not (tmp_path / "x").exists()


def test_nothing_is_written_that_the_reader_would_refuse(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, layers=LAYERS, rank="0") as writer:  # type: ignore[arg-type]
        assert "the reader would not accept its entry" in str(refusal(lambda: write_step(writer, 0)))
    assert names(tmp_path) == ["manifest.json"]
    assert ShardReader(tmp_path).entries == []


def test_reports_are_not_made_json_again_with_each_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    dumps = json.dumps
    monkeypatch.setattr(
        manifests.json, "dumps", lambda value, **options: (made.append(value), dumps(value, **options))[1]
    )
    with ShardWriter(tmp_path, layers=LAYERS) as writer:
        for step in range(4):
            writer.report({"step": step})
            write_step(writer, step)
    assert [made.count({"step": step}) for step in range(4)] == [1, 1, 1, 1]
    assert [told["step"] for told in manifest_of(tmp_path)["training"]] == [0, 1, 2, 3]


# --- Going on. ---


def test_numbering_goes_on_in_a_new_session(tmp_path: Path) -> None:
    steps_written(tmp_path, 0, 200, description={"config": {"every": 200}})
    steps_written(tmp_path, 400, max_rows=2, description={"config": {"every": 100}})
    told = manifest_of(tmp_path)
    assert [(e["shard"], e["step"], e["session"]) for e in told["shards"]] == [
        (0, 0, 0), (1, 200, 0), (2, 400, 1), (3, 400, 1), (4, 400, 1),
    ]  # fmt: skip
    assert [(s["session"], s["max_rows"], s["config"]) for s in told["sessions"]] == [
        (0, 10_000, {"every": 200}),
        (1, 2, {"every": 100}),
    ]
    assert told["config"] == {"every": 100}


def test_of_a_step_that_was_captured_again_the_later_rows_count(tmp_path: Path) -> None:
    steps_written(tmp_path, 0, 200, 400)
    with pytest.warns(CaptureWarning) as caught:
        steps_written(tmp_path, 200, 400, n=2)
    assert [str(warning.message) for warning in caught] == [
        f"Step 200 is written to {tmp_path}, where earlier sessions captured steps up to 400: of a step that is "
        "captured again the later rows count, and losses are added to the earlier ones. To go on with that training "
        "after it, give first_step, here above 400; for another training, another storage_path (and s3_prefix)."
    ]
    reader = ShardReader(tmp_path)
    assert [(entry["step"], entry["rows"]) for entry in reader.entries] == [(0, 6), (200, 2), (400, 2)]
    assert (reader.steps, len(reader.rows(0, steps=[200]))) == ([0, 200, 400], 2)
    assert reader.description["total_rows"] == 10
    assert manifest_of(tmp_path)["total_rows"] == 22


def test_a_step_that_comes_before_earlier_ones_is_told_too(tmp_path: Path) -> None:
    steps_written(tmp_path, 0, 200)
    with pytest.warns(CaptureWarning, match=r"Step 1 is written to .* captured steps up to 200"):
        steps_written(tmp_path, 1)
    steps_written(tmp_path, 201)  # warnings are errors: it says nothing


def test_a_step_counts_that_was_captured_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_written(tmp_path, 0, 1, n=5, max_rows=2)
    write = shard_making.shard_writer.write_arrays

    def full(path: Path, *rest: Any) -> None:
        if "_000008_" in path.name:
            raise OSError(28, "No space left on device")
        write(path, *rest)

    monkeypatch.setattr(shard_making.shard_writer, "write_arrays", full)
    with ShardWriter(tmp_path, layers=LAYERS, max_rows=2) as writer:
        with pytest.warns(CaptureWarning):
            refusal(lambda: write_step(writer, 0, n=6))
        monkeypatch.undo()
    reader = ShardReader(tmp_path)
    assert [len(reader.rows(0, steps=[step])) for step in (0, 1)] == [5, 5]
    with ShardWriter(tmp_path, layers=LAYERS, max_rows=2) as writer:
        assert [entry["part"] for entry in writer.manifest["shards"]] == [[0, 3], [1, 3], [2, 3]] * 2 + [[0, 3], [1, 3]]
        with pytest.warns(CaptureWarning):
            write_step(writer, 0, n=3)
        write_step(writer, 0, n=1)
    assert len(ShardReader(tmp_path).rows(0, steps=[0])) == 4


def test_of_a_step_that_nobody_captured_whole_the_later_rows_count(tmp_path: Path) -> None:
    for n in (5, 6):
        steps_written(tmp_path, n, n=n, max_rows=2)
    entries = ShardReader(tmp_path).entries
    same = [entry | {"step": 0} for entry in entries if entry["part"][0]]
    assert [entry["session"] for entry in manifests.current(same, [])] == [1, 1]


def test_a_damaged_part_of_a_step_lets_the_earlier_rows_count(tmp_path: Path) -> None:
    steps_written(tmp_path, 0, n=5, max_rows=2)
    with pytest.warns(CaptureWarning):
        steps_written(tmp_path, 0, n=6, max_rows=2)
    (tmp_path / "activations_shard_000003_step_0.safetensors").unlink()
    with pytest.warns(UnreadableShardWarning):
        assert len(ShardReader(tmp_path, unreadable="skip").rows(0)) == 5


def test_two_captures_of_a_step_in_one_session_both_count(tmp_path: Path) -> None:
    steps_written(tmp_path, 5, 5)
    assert len(ShardReader(tmp_path).rows(0, steps=[5])) == 12


@pytest.mark.parametrize(
    ("layers", "model_type", "said"),
    [
        ({"blocks.1.hook_resid_post": LAYERS[LAYER]}, "llama", "not of blocks.1.hook_resid_post"),
        ({LAYER: LAYERS[LAYER] | {"shape": [8]}}, "llama", r"rows \[d_model 4\] of .* they are \[d_model 8\]"),
        ({LAYER: LAYERS[LAYER] | {"axes": ["d_mlp"]}}, "llama", r"they are \[d_mlp 4\]"),
        ({LAYER: LAYERS[LAYER] | {"dtype": "bfloat16"}}, "llama", "in float32, and now they are bfloat16"),
        (LAYERS, "qwen3", "captures of a llama model, and this is a qwen3"),
    ],
)
def test_captures_that_do_not_go_together_are_refused(
    layers: dict[str, Any], model_type: str, said: str, tmp_path: Path
) -> None:
    steps_written(tmp_path, 0, description={"model": {"model_type": "llama"}})
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(HookError, match=said) as caught:
        ShardWriter(tmp_path, layers=layers, description={"model": {"model_type": model_type}})
    assert caught.value.field == "storage_path"
    assert (tmp_path / "manifest.json").read_bytes() == before
    steps_written(tmp_path, 200)  # nobody holds the folder


def test_patterns_of_batches_of_any_length_go_together(tmp_path: Path) -> None:
    name = "blocks.0.attn.hook_pattern"
    for n in (3, 5):
        layers = {name: {"axes": ["head", "key"], "shape": [2, n], "dtype": "float32"}}
        with ShardWriter(tmp_path, layers=layers) as writer:
            writer.write({name: mx.ones((n, 2, n))}, step=n, **shard_making.columns(0, n))
    assert ShardReader(tmp_path).rows(name).shape == (2, 5)


def test_one_process_writes_a_folder_at_a_time(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, layers=LAYERS) as writer:
        assert "is being written by another run" in str(refusal(lambda: ShardWriter(tmp_path, layers=LAYERS)))
        code = "import sys; from shard_making import *; ShardWriter(sys.argv[1], layers=LAYERS)"
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=child_environment(),
        )
        assert "is being written by another run" in other.stderr
        write_step(writer, 0)
    steps_written(tmp_path, 1)


def test_a_writer_that_is_forgotten_holds_no_folder(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, layers=LAYERS)
    write_step(writer, 0)
    del writer
    steps_written(tmp_path, 1)


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "adapters.safetensors").write_bytes(b"weights")
    (tmp_path / "activations_shard_000000_step_0.pt").write_bytes(b"another format")
    steps_written(tmp_path, 0)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(names(tmp_path)) == 5


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": "other"}',
        '{"format": "neuroscope-shards-1"}',
        '{"format": "neuroscope-shards-1", "id": "a", "layers": {"a": 1}, "shards": [], "sessions": [], '
        '"training": [], "analysis_history": []}',
    ],
)
def test_a_damaged_manifest_is_left_as_it_is(text: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    for use in (lambda: ShardWriter(tmp_path, layers=LAYERS), lambda: ShardReader(tmp_path)):
        assert str(refusal(use)).startswith(f"cannot read {tmp_path / 'manifest.json'}: it")
    assert (tmp_path / "manifest.json").read_text() == text


@pytest.mark.parametrize(
    "change",
    [
        {"file": "../activations_shard_000000_step_0.safetensors"},
        {"step": "0"},
        {"remote": 5},
        {"remote": "s3://a/b"},
        {"part": [1, 1]},
        {"part": "0"},
    ],
)
def test_an_entry_that_names_a_file_elsewhere_or_too_little_is_damaged(change: dict[str, Any], tmp_path: Path) -> None:
    told = manifest_of(steps_written(tmp_path, 0))
    told["shards"][0] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(told))
    assert str(refusal(lambda: ShardReader(tmp_path))).endswith("it is damaged")


def test_the_manifest_s_own_keys_are_not_described(tmp_path: Path) -> None:
    assert "'shards' is a key" in str(refusal(lambda: ShardWriter(tmp_path, layers=LAYERS, description={"shards": []})))
    assert "at least one row" in str(refusal(lambda: ShardWriter(tmp_path, layers=LAYERS, max_rows=0)))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert str(refusal(lambda: ShardWriter(tmp_path / "file", layers=LAYERS))).startswith(
        f"cannot write {tmp_path}/file"
    )


def test_what_was_analysed_is_in_the_manifest(tmp_path: Path) -> None:
    steps_written(tmp_path, 0)
    record_analysis(tmp_path, {"analyses": ["sae"], "fvu": float("nan")})
    told = ShardReader(tmp_path).description["analysis_history"][0]
    assert told.pop("analysed").startswith("20")
    assert told == {"analyses": ["sae"], "fvu": None}
    with ShardWriter(tmp_path, layers=LAYERS):
        assert "being written" in str(refusal(lambda: record_analysis(tmp_path, {})))


# --- Killed. ---


def check_whole(folder: Path) -> dict[str, str]:
    """Checks that the manifest names whole shards, each step once and none left out; the bytes of each, hashed."""
    told = manifest_of(folder)
    assert [entry["step"] for entry in told["shards"]] == list(range(len(told["shards"])))
    assert [entry["shard"] for entry in told["shards"]] == list(range(len(told["shards"])))
    assert (told["total_shards"], told["total_rows"]) == (len(told["shards"]), 6 * len(told["shards"]))
    hashes = {}
    for entry in told["shards"]:
        content = (folder / entry["file"]).read_bytes()
        tensors = load_file(folder / entry["file"])
        np.testing.assert_array_equal(tensors[LAYER], values(entry["step"], 6))
        assert tensors["tokens"].tolist() == shard_making.columns(entry["step"], 6)["tokens"].tolist()
        hashes[entry["file"]] = hashlib.sha256(content).hexdigest()
    return hashes


def test_killed_at_any_moment_nothing_that_the_manifest_named_is_lost(tmp_path: Path) -> None:
    generator = random.Random(0)
    known: dict[str, str] = {}
    with killer() as kill:
        # A busy machine may take long to begin.
        for _ in range(20):
            kill(tmp_path, 0.3)
            if (tmp_path / "manifest.json").exists():
                break
        for _ in range(12):
            found = check_whole(tmp_path)
            assert found.items() >= known.items()
            known = found
            kill(tmp_path, generator.uniform(0.01, 0.2))
    steps_written(tmp_path)
    assert check_whole(tmp_path).items() >= known.items()
    assert len(known) > 20
    told = manifest_of(tmp_path)
    assert len(names(tmp_path)) == 1 + len(told["shards"])  # nothing half is left
    assert len(ShardReader(tmp_path).rows(0)) == told["total_rows"]


def test_a_shard_that_the_manifest_does_not_name_yet_is_named_when_going_on(tmp_path: Path) -> None:
    with killer() as kill:
        steps_written(tmp_path, 0)
        kill(tmp_path, "manifest")
        kill(tmp_path, "shard")
    assert "activations_shard_000001_step_1.safetensors" in names(tmp_path)
    assert manifest_of(tmp_path)["total_shards"] == 2  # the second child named it
    assert sum("writing" in name for name in names(tmp_path)) == 1
    steps_written(tmp_path, 2)
    check_whole(tmp_path)
    assert [entry["session"] for entry in manifest_of(tmp_path)["shards"]] == [0, 1, 3]
    assert len(names(tmp_path)) == 4


def test_what_is_called_as_a_shard_and_is_none_stays(tmp_path: Path) -> None:
    steps_written(tmp_path, 0)
    broken = tmp_path / "activations_shard_000007_step_3.safetensors"
    broken.write_bytes(b"broken")
    other = tmp_path / "other"
    with ShardWriter(other, layers={"blocks.1.hook_resid_post": LAYERS[LAYER]}) as writer:
        path = writer.write({"blocks.1.hook_resid_post": values(0, 6)}, step=0, **shard_making.columns(0, 6))[0]
    foreign = path.rename(tmp_path / "activations_shard_000008_step_0.safetensors")
    with pytest.warns(UnreadableShardWarning) as caught:
        steps_written(tmp_path, 1)
    assert [str(w.message).split(" is no shard of these captures and stays as it is")[0] for w in caught] == [
        str(broken), str(foreign),
    ]  # fmt: skip
    assert broken.read_bytes() == b"broken"
    assert [entry["shard"] for entry in manifest_of(tmp_path)["shards"]] == [0, 9]


# --- Several ranks. ---


def ranks_written(folder: Path, world_size: int, *steps: int) -> None:
    for rank in range(world_size):
        with ShardWriter(folder, layers=LAYERS, rank=rank, world_size=world_size, each_rank=True) as writer:
            for step in steps:
                write_step(writer, step, n=rank + 1)


def test_the_folders_of_ranks_read_as_one(tmp_path: Path) -> None:
    ranks_written(tmp_path, 3, 0, 200)
    assert names(tmp_path) == ["rank_000", "rank_001", "rank_002"]
    reader = ShardReader(tmp_path)
    part = reader.rows(0).sample(99)
    assert part.rank is not None
    assert part.rank.tolist() == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
    np.testing.assert_array_equal(part.values[2:4], values(0, 2))
    assert [entry["file"].split("/")[0] for entry in reader.entries[::2]] == ["rank_000", "rank_001", "rank_002"]
    assert {(session["rank"], session["world_size"]) for session in reader.description["sessions"]} == {
        (0, 3), (1, 3), (2, 3),
    }  # fmt: skip
    assert reader.description["total_rows"] == 12


def test_a_step_that_fewer_ranks_captured_again_is_theirs(tmp_path: Path) -> None:
    ranks_written(tmp_path, 3, 0, 200)
    with pytest.warns(CaptureWarning):
        ranks_written(tmp_path, 2, 200)
    part = ShardReader(tmp_path).rows(0, steps=[200]).sample(99)
    assert part.rank is not None
    assert part.session is not None
    assert (part.rank.tolist(), set(part.session.tolist())) == ([0, 1, 1], {1})
    assert len(ShardReader(tmp_path).rows(0, steps=[0])) == 6


def test_captures_of_one_rank_and_of_all_are_not_mixed(tmp_path: Path) -> None:
    ranks_written(tmp_path / "all", 2, 0)
    assert "of all ranks" in str(refusal(lambda: ShardWriter(tmp_path / "all", layers=LAYERS)))
    steps_written(tmp_path / "one", 0)
    assert "that one rank wrote" in str(refusal(lambda: ranks_written(tmp_path / "one", 2, 0)))


# --- From a configuration. ---


def test_a_configuration_says_where_and_how(tmp_path: Path) -> None:
    config = MechIntConfig(storage_path=tmp_path / "a", max_activations_per_shard=4)
    with open_writer(config, LAYERS, {"model": {"model_type": "llama"}}) as writer:
        assert len(write_step(writer, 0)) == 2
    told = manifest_of(tmp_path / "a")
    assert told["config"] == config.to_dict() == told["sessions"][0]["config"]
    assert told["model"] == {"model_type": "llama"}
    config = MechIntConfig(storage_path=tmp_path / "b", writing_ranks="all")
    open_writer(config, LAYERS, rank=1, world_size=2).close()
    assert names(tmp_path / "b") == ["rank_001"]


# --- Reading what is damaged. ---


def test_a_shard_that_is_gone_or_damaged_is_named(tmp_path: Path) -> None:
    steps_written(tmp_path, 0, 1, 2)
    paths = [tmp_path / entry["file"] for entry in ShardReader(tmp_path).entries]
    size = paths[1].stat().st_size
    paths[1].write_bytes(paths[1].read_bytes()[:-4])
    assert str(refusal(lambda: ShardReader(tmp_path))) == (
        f"cannot read {paths[1]}: it has {size - 4} bytes and was written with {size}"
    )
    paths[1].unlink()
    assert str(refusal(lambda: ShardReader(tmp_path))) == f"cannot read {paths[1]}: it is gone"
    content = bytearray(paths[2].read_bytes())
    content[10:20] = b"##########"
    paths[2].write_bytes(content)
    with pytest.warns(UnreadableShardWarning, match=r"2 of 3 shards are passed over: cannot read .*: it is gone; "):
        reader = ShardReader(tmp_path, unreadable="skip")
    assert reader.steps == [0]
    assert "its header is damaged" in str(refusal(lambda: shards.Shard(paths[2], reader.entries[0] | {"step": 2})))
    with pytest.raises(HookError, match="'refuse' or 'skip'"):
        ShardReader(tmp_path, unreadable="ignore")  # type: ignore[arg-type]


def test_where_nothing_was_captured(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert str(refusal(lambda folder=folder: ShardReader(folder))).startswith(
            "There are no captured activations in"
        )
    steps_written(tmp_path)
    assert "There are no captured rows" in str(refusal(lambda: ShardReader(tmp_path).rows(0)))


def test_more_shards_than_a_process_may_have_open_files(tmp_path: Path) -> None:
    steps_written(tmp_path, 0, n=300, max_rows=1)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        rows = ShardReader(tmp_path).rows(0)
        np.testing.assert_array_equal(rows.take(np.arange(300)[::-1]).values, values(0, 300)[::-1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_manifest_tells_the_sessions_of_both_copies(tmp_path: Path) -> None:
    here = manifests.Manifest.parse((steps_written(tmp_path, 0) / "manifest.json").read_bytes(), "here")
    steps_written(tmp_path, 1)
    here.join(manifests.Manifest.parse((tmp_path / "manifest.json").read_bytes(), "there"))
    told = manifest_of(tmp_path)
    assert (here.data["sessions"], here.data["shards"]) == (told["sessions"], told["shards"])
    assert here.data["total_rows"] == 12


def test_a_shard_that_was_cut_in_place_is_not_read_further(tmp_path: Path) -> None:
    """Who reads mapped memory beyond its file's end is ended by the system."""
    rows = ShardReader(steps_written(tmp_path, 0)).rows(LAYER)
    expected = rows.take([0, 1]).values
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(100)
    assert "changed since it was opened" in str(refusal(lambda: rows.take([0])))
    refusal(lambda: rows.take([0]))
    path.write_bytes(whole)
    np.testing.assert_array_equal(rows.take([0, 1]).values, expected)
    # What was opened can be read on when its name is another file's, or nobody's.
    path.unlink()
    np.testing.assert_array_equal(rows.take([0, 1]).values, expected)
