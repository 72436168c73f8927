"""Saved runs: what is loaded is what was saved, queries find it, and nothing is lost whatever happens meanwhile."""

import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors
from tiny_models import make_model

import mlx_hooks.storage.metadata as about
from mlx_hooks import (
    ActivationCache,
    ActivationLoader,
    ActivationSaver,
    ExtractionConfig,
    HookedModel,
    HookError,
    Intervention,
    UnreadableRunWarning,
)
from mlx_hooks.activations import CapturedActivation, labels
from mlx_hooks.hook_points import HookPoint
from mlx_hooks.storage import files
from mlx_hooks.storage import index as run_index
from mlx_hooks.storage.files import is_temporary
from mlx_hooks.storage.tensors import TensorFile

ROOT = Path(__file__).parent.parent
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
RESID = ExtractionConfig(extract_resid_out=True)
BOTH = ExtractionConfig(extract_resid_out=True, extract_attn_pattern=True)


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return HookedModel(make_model("llama", dtype=mx.bfloat16), name="tests/llama-16")


@pytest.fixture
def saver(tmp_path: Path) -> ActivationSaver:
    return ActivationSaver(tmp_path / "saved", "first")


@pytest.fixture
def loader(saver: ActivationSaver) -> ActivationLoader:
    return ActivationLoader.from_saver(saver)


def save(saver: ActivationSaver, value: Any = None, model: Any = "tests/llama-16", **more: Any) -> Path:
    """A small run."""
    given: dict[str, Any] = {"target_token_positions": ["last"], "interventions": None, "extraction_config": RESID}
    return saver.save(mx.array([1.0, 2.0]) if value is None else value, model, **given | more)


def check_equal(loaded: ActivationCache, saved: ActivationCache) -> None:
    """Record by record, label by label and bit by bit."""
    assert list(loaded) == list(saved)
    for name, records in saved.records.items():
        assert len(loaded.records[name]) == len(records)
        for a, b in zip(loaded.records[name], records, strict=True):
            ours, theirs = labels(a), labels(b)
            assert list(ours.pop("position_ids")) == list(theirs.pop("position_ids"))
            assert ours == theirs
            assert (a.hook_point.sizes, a.hook_point.group) == (b.hook_point.sizes, b.hook_point.group)
            assert a.value.dtype == b.value.dtype
            assert a.value.shape == b.value.shape
            assert bool(mx.all(a.value == b.value))
            assert a.nbytes == b.nbytes
    assert loaded.interventions == saved.interventions
    assert loaded.mapping_index == saved.mapping_index
    assert loaded.token_positions == saved.token_positions
    assert loaded.row_lengths == saved.row_lengths


# What is loaded


def test_the_workflow_of_the_guide(tiny: HookedModel, tmp_path: Path) -> None:
    tokenizer = tiny.get_tokenizer()
    dataset = [tokenizer(text, return_tensors="np") for text in ("Example text 1", "Example text 2", "Example text 3")]
    saver = ActivationSaver(base_dir=tmp_path / "saved_activations", experiment_name="documentation_example")
    caches = []
    for i, inputs in enumerate(dataset):
        cache = tiny.forward(inputs, target_token_positions=["last"], extraction_config=BOTH)
        caches.append(cache)
        saver.save(
            activations=cache,
            model=tiny,
            target_token_positions=["last"],
            interventions=None,
            extraction_config=BOTH,
            other_metadata={"batch_id": i},
            tag=f"batch_{i}",
        )
    loader = ActivationLoader.from_saver(saver)
    activations, metadata = loader.query(tag="batch_0").load(-1)
    check_equal(activations, caches[0])
    activations, metadata = loader.query(custom_keys={"batch_id": 1}).load(-1)
    check_equal(activations, caches[1])
    assert (metadata["tag"], metadata["batch_id"]) == ("batch_1", 1)
    patterns = ExtractionConfig(extract_attn_pattern=True)
    found = loader.query(model_name="neuroscope-tiny", extraction_config=patterns)
    assert [run.tag for run in found.results] == ["batch_0", "batch_1", "batch_2"]
    assert not loader.query(extraction_config=ExtractionConfig(extract_mlp_out=True)).results


def test_a_loaded_cache_is_the_saved_one(llama: HookedModel, saver: ActivationSaver, loader: ActivationLoader) -> None:
    edit = {"hook_point": "blocks.0.attn.hook_z", "type": "scale", "factor": 0.5, "positions": {"start": 2}}
    config = ExtractionConfig(
        extract_resid_out=True,
        extract_attn_pattern=True,
        extract_head_values=True,
        extract_head_out=True,
        attn_heads=[{"layer": 1, "head": 3}, {"layer": 2, "head": 0}],
        save_input_ids=True,
    )
    wanted = ["last", (0, 2), -3, slice(1, None, 2), "inputs-partition-1"]
    cache = llama.forward(TOKENS, wanted, config, pivot_positions=[5], interventions=[edit])
    assert cache["resid_out_0"].dtype == mx.bfloat16
    path = saver.save(cache, llama, wanted, [edit], config, pivot_positions=[5])
    loaded, metadata = loader.query().load()
    check_equal(loaded, cache)
    assert [receipt.fired for receipt in loaded.interventions] == [1]
    assert bool(mx.all(loaded["pattern_L1H3"] == cache["pattern_L1H3"]))
    assert "pattern_L1H2" not in loaded
    assert metadata == json.loads((path / "metadata.json").read_text())
    assert metadata["model_name"] == "tests/llama-16"
    assert path.parts[-4:-1] == ("saved", "first", "tests_llama-16")
    assert metadata["run_id"] == path.name
    assert metadata["model"]["d_model"] == 32
    assert set(metadata["versions"]) == {"mlx", "mlx-lm", "neuroscope-mlx"}
    assert metadata["keys"]["blocks.1.attn.hook_pattern"] == {
        "axes": ["batch", "head", "query", "key"],
        "dtype": "float32",
        "shapes": [[1, 1, len(cache.token_positions[0]), 8]],
    }
    # What was loaded says how it was made.
    saver.save_cache(loaded, tag="again")
    again, told = loader.query(
        tag="again", interventions=[edit], pivot_positions=[5], target_token_positions=wanted
    ).load()
    check_equal(again, cache)
    assert {key: told[key] for key in ("extraction_config", "model")} == {
        key: metadata[key] for key in ("extraction_config", "model")
    }


def test_records_of_a_generation_keep_their_places(
    llama: HookedModel, saver: ActivationSaver, loader: ActivationLoader
) -> None:
    result = llama.generate(TOKENS, max_tokens=3, capture=["blocks.*.attn.hook_pattern", "blocks.*.attn.hook_k"])
    assert len(result.cache.records["blocks.0.attn.hook_k"]) == 3
    save(saver, result.cache, llama)
    loaded, _ = loader.query().load()
    check_equal(loaded, result.cache)
    assert bool(mx.all(loaded["pattern", 1] == result.cache["pattern", 1]))


def test_passes_and_reductions_are_kept(saver: ActivationSaver, loader: ActivationLoader, llama: HookedModel) -> None:
    point = llama.hook_points["blocks.1.hook_resid_post"]
    cache = ActivationCache()
    for i in range(2):
        cache.add(
            CapturedActivation(point, mx.ones((1, 2, 32)) * i, (4, 6), "decode", 7, "hook-1", "1", "residual", True, i)
        )
    cache.add(
        CapturedActivation(llama.hook_points["hook_embed"], mx.ones((1, 32)), range(3), "prefill", 0, reduce="mean")
    )
    save(saver, cache)
    loaded, _ = loader.query().load()
    check_equal(loaded, cache)
    assert bool(mx.all(loaded.of_pass(1)["resid_post", 1] == 1))


def test_what_was_spilled_is_saved_and_a_dataset_too(
    llama: HookedModel, saver: ActivationSaver, loader: ActivationLoader, tmp_path: Path
) -> None:
    _, cache = llama.run_with_cache(TOKENS, "blocks.*.hook_resid_post", spill_to=tmp_path / "spilled")
    save(saver, cache, llama)
    loaded, _ = loader.query().load()
    check_equal(loaded, cache)
    dataset = llama.extract_cache([TOKENS, TOKENS[:5]], ["last"], BOTH, progress=False)
    saver.save_cache(dataset, {"labels": [0, 1]}, tag="dataset_run")
    loaded, metadata = loader.query(tag="dataset_run", extraction_config=BOTH).load()
    check_equal(loaded, dataset)
    assert metadata["labels"] == [0, 1]
    with pytest.raises(HookError, match="does not say its model_name, .* use save"):
        saver.save_cache(cache)


TYPES = ["bool_", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64",
         "float16", "bfloat16", "float32", "complex64"]  # fmt: skip


def test_arrays_of_every_type_come_back_bit_for_bit(saver: ActivationSaver, loader: ActivationLoader) -> None:
    arrays: dict[str, Any] = {name: mx.array([[0, 1, 1]]).astype(getattr(mx, name)) for name in TYPES}
    arrays |= {
        "odd": mx.array([mx.nan, -mx.inf, -0.0]),
        "transposed": mx.arange(6).reshape(2, 3).T,
        "scalar": mx.array(2.5, mx.bfloat16),
        "empty": mx.zeros((0, 3)),
        "f64": np.array([1 / 3, np.pi]),
        "big_endian": np.array([1, 2], dtype=">i4"),
        "strided": np.arange(6)[::2],
    }
    path = save(saver, arrays)
    loaded, metadata = loader.query().load()
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert type(loaded[name]) is type(array) or isinstance(loaded[name], np.ndarray)
        assert loaded[name].shape == array.shape
        if isinstance(array, mx.array):
            assert loaded[name].dtype == array.dtype
            bits = [np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a) for a in (loaded[name], array)]
        else:
            assert loaded[name].dtype == array.dtype.newbyteorder("=")
            bits = [loaded[name], array]
        np.testing.assert_array_equal(*bits)
    assert metadata["keys"]["f64"] == {"shape": [2], "dtype": "float64"}
    with safetensors.safe_open(path / "activations.safetensors", "numpy") as others:
        assert others.get_tensor("f64").tolist() == [1 / 3, np.pi]
        assert others.get_tensor("transposed").tolist() == [[0, 3], [1, 4], [2, 5]]


def test_mlx_reads_the_same_file(llama: HookedModel, saver: ActivationSaver) -> None:
    cache = llama.forward(TOKENS, ["all"], BOTH)
    loaded = mx.load(str(saver.save_cache(cache) / "activations.safetensors"))
    assert sorted(loaded) == sorted(cache)
    assert all(loaded[name].dtype == cache[name].dtype and bool(mx.all(loaded[name] == cache[name])) for name in cache)


def test_one_array_is_saved_as_one(saver: ActivationSaver, loader: ActivationLoader) -> None:
    save(saver, mx.array([1.5], mx.bfloat16))
    value, _ = loader.query().load()
    assert value.dtype == mx.bfloat16
    assert value.item() == 1.5
    save(saver, np.array([[1, 2]]))
    value, _ = loader.query().load()
    assert isinstance(value, np.ndarray)
    assert value.tolist() == [[1, 2]]


def test_one_key_is_read_without_the_others(
    llama: HookedModel, saver: ActivationSaver, loader: ActivationLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = llama.forward(TOKENS, ["all"], BOTH)
    saver.save_cache(cache)
    read: list[str] = []
    real = TensorFile.numpy
    monkeypatch.setattr(TensorFile, "numpy", lambda self, name: (read.append(name), real(self, name))[1])
    loaded, _ = loader.query().load()
    assert "pattern_L1H2" in loaded
    assert loaded.nbytes == cache.nbytes
    assert [key for key, _ in loaded.expand("pattern_L1H{j}")][-1] == "pattern_L1H3"
    assert read == []
    _ = loaded["resid_out_1"]
    assert read == ["blocks.1.hook_resid_post"]


def test_a_large_file_is_mapped_not_read(saver: ActivationSaver, loader: ActivationLoader) -> None:
    path = save(saver, {"a": mx.array([1.0]), "z": mx.array([2.0])}) / "activations.safetensors"
    # A hole of 64 GB between the two: whoever reads the file whole does not come back.
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    hole = 2**36
    header["hole"] = {"dtype": "U8", "shape": [hole], "data_offsets": [4, 4 + hole]}
    header["z"]["data_offsets"] = [4 + hole, 8 + hole]
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data[8 + length : 12 + length])
        file.seek(8 + len(text) + 4 + hole)
        file.write(data[12 + length :])
    loaded, _ = loader.query().load()
    assert (loaded["a"].item(), loaded["z"].item()) == (1.0, 2.0)


def test_what_is_loaded_outlives_the_run(saver: ActivationSaver, loader: ActivationLoader) -> None:
    save(saver, {"a": mx.array([1.0]), "b": mx.array([2.0])})
    found = loader.query()
    loaded, _ = found.load()
    found.remove(-1)
    assert loaded["b"].item() == 2.0


# Saving


def test_runs_of_the_same_second_are_all_kept(saver: ActivationSaver, loader: ActivationLoader) -> None:
    paths = [save(saver, tag=f"batch_{i}") for i in range(20)]
    assert len(set(paths)) == 20
    assert [run.tag for run in loader.query()] == [f"batch_{i}" for i in range(20)]


def test_a_clock_that_stands_still_keeps_the_order(
    saver: ActivationSaver, loader: ActivationLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = about.now()

    class Clock:
        @staticmethod
        def now() -> Any:
            return still.replace(tzinfo=None)

    monkeypatch.setattr(about, "datetime", Clock)
    for i in range(10):
        save(saver, tag=str(i))
    assert [run.tag for run in loader.query()] == [str(i) for i in range(10)]


SAVER = """
import sys
import mlx.core as mx
from mlx_hooks import ActivationSaver
for i in range(int(sys.argv[2])):
    ActivationSaver(sys.argv[1], "first").save(mx.full((4,), i), sys.argv[3], ["last"], None, None, {"i": i})
"""


def test_two_processes_save_at_once(saver: ActivationSaver, loader: ActivationLoader) -> None:
    command = [sys.executable, "-c", SAVER, str(saver.base_dir), "10"]
    writers = [subprocess.Popen([*command, name], cwd=ROOT) for name in ("model/a", "model_a")]
    while any(writer.poll() is None for writer in writers):
        if saver.base_dir.exists():
            for run in loader.query():
                assert run.load()[0].shape == (4,)
    assert [writer.returncode for writer in writers] == [0, 0]
    found = loader.query()
    assert sorted((run.model_name, run.load()[1]["i"]) for run in found) == sorted(
        (name, i) for name in ("model/a", "model_a") for i in range(10)
    )
    assert [path.name for path in saver.base_dir.iterdir() if is_temporary(path.name)] == []


SLOW = """
import sys
import mlx.core as mx
from mlx_hooks import ActivationSaver
import mlx_hooks.storage.content as content
class Slow(dict):
    def items(self):
        for i, item in enumerate(super().items()):
            if i:
                print("writing", flush=True)
                sys.stdin.read()
            yield item
real = content.write_arrays
def write(path, arrays, notes):
    path.write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
content.write_arrays = write
ActivationSaver(sys.argv[1], "first").save(mx.zeros(4), "m", ["last"], None, None)
"""


def test_a_killed_saver_leaves_no_run(saver: ActivationSaver, loader: ActivationLoader) -> None:
    save(saver, tag="before")
    command = [sys.executable, "-c", SLOW, str(saver.base_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        (left,) = (path for path in saver.base_dir.iterdir() if is_temporary(path.name))
        assert [run.tag for run in loader.query("*")] == ["before"]
        # Another saver comes while it is being written, and when its writer is dead.
        os.utime(left, (0, 0))
        save(ActivationSaver(saver.base_dir, "second"))
        assert left.exists()
        writer.send_signal(signal.SIGKILL)
    assert [run.tag for run in loader.query("*")] == ["before", None]
    os.utime(left, (0, 0))
    save(ActivationSaver(saver.base_dir, "second"))
    assert not left.exists()


def test_a_full_disk_leaves_nothing(
    saver: ActivationSaver, loader: ActivationLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(saver, tag="before")

    def full(path: Path, *rest: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlx_hooks.storage.content.write_arrays", full)
        with pytest.raises(
            HookError, match=r"could not be saved in .*saved: No space left on device. Nothing of it is left"
        ):
            save(saver)
    assert [run.tag for run in loader.query()] == ["before"]
    assert sorted(path.name for path in saver.base_dir.iterdir()) == [".index.sqlite", "first"]


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that this process may not write to: as root, it is nobody meanwhile."""
    is_root = os.geteuid() == 0
    passage = stat.S_IXGRP | stat.S_IXOTH
    modes = {path: path.stat().st_mode for path in (folder, *folder.parents)}
    # What root alone may pass is opened, and closed again.
    closed = [path for path in folder.parents if is_root and modes[path] & passage != passage]
    try:
        for path in closed:
            path.chmod(modes[path] | passage)
        folder.chmod(0o555)
        if is_root:
            os.seteuid(65534)
        yield
    finally:
        if is_root:
            os.seteuid(0)
        for path in (folder, *closed):
            path.chmod(modes[path])


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with read_only(tmp_path), pytest.raises(HookError, match="could not be saved in .*: Permission denied"):
        save(ActivationSaver(tmp_path / "saved"))


def test_a_base_directory_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(HookError, match="could not be saved in .*file: File exists"):
        save(ActivationSaver(tmp_path / "file"))
    with pytest.raises(HookError, match="could not be saved in .*file/deeper: Not a directory"):
        save(ActivationSaver(tmp_path / "file" / "deeper"))
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(HookError, match="could not be saved in /proc/saved: "):
        save(ActivationSaver("/proc/saved"))


@pytest.mark.parametrize(
    "name", ["", "..", ".", "a/b", "../x", "a\\b", "a\0b", ".hidden", "*", " x", "x ", "x.", "a\n", 3, None, "a" * 101]
)
def test_an_experiment_is_named_as_one_folder(tmp_path: Path, name: Any) -> None:
    with pytest.raises(HookError, match="experiment_name"):
        ActivationSaver(tmp_path, name)
    saver = ActivationSaver(tmp_path, "first")
    save(saver)
    with pytest.raises(HookError, match="new_experiment_name"):
        saver.rename_experiment(name)
    with pytest.raises(HookError, match="new_experiment_name"):
        ActivationLoader.from_saver(saver).query().update_run_experiment(0, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".index.sqlite", "first"]


@pytest.mark.parametrize("tag", ["", " ", "..", "a/b", "a\\b", "a\0b", "a\nb", 3, True])
def test_a_tag_is_a_text_without_path_characters(saver: ActivationSaver, tag: Any) -> None:
    with pytest.raises(HookError, match="A tag is a text without / and"):
        save(saver, tag=tag)
    assert not saver.base_dir.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"other_metadata": {"tag": "x"}}, "reserved key 'tag'. Reserved are format, run_id"),
        ({"other_metadata": {"x": mx.zeros(1)}}, r"other_metadata\['x'\] is array .* which JSON does not have"),
        ({"other_metadata": {"x": [1, {"y": {1}}]}}, r"other_metadata\['x'\]\[1\]\['y'\] is set"),
        ({"other_metadata": {"x": float("nan")}}, "is float nan"),
        ({"other_metadata": {1: "x"}}, "has the key 1; keys are texts"),
        ({"other_metadata": "x"}, "other_metadata is a mapping, got str"),
        ({"value": [1, 2]}, "What can be saved is an activation cache, an array or arrays by name; got list"),
        ({"value": {"a": {"b": mx.zeros(1)}}}, "got dict as 'a'"),
        ({"value": {3: mx.zeros(1)}}, "by name, a text other than '__metadata__'; got 3"),
        ({"value": np.array(["text"])}, "value holds str128; what can be saved is bool, uint8"),
        ({"model": 3}, "model is a HookedModel or its name, got 3"),
        ({"model": " "}, "model is a HookedModel or its name"),
        ({"target_token_positions": [{1}]}, r"target_token_positions is set"),
        ({"extraction_config": {"extract": True}}, "Unknown flag 'extract'"),
        ({"extraction_config": 3}, "An extraction_config is"),
        ({"interventions": {"type": "zero"}}, "interventions is a list"),
        ({"interventions": [{"type": "zero", "hook": 1}]}, "Unknown key 'hook' in an intervention"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    saver: ActivationSaver, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(HookError, match=message):
        save(saver, **given)
    assert not saver.base_dir.exists()


def test_the_environment_names_the_base_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTIVATION_BASE_DIR", str(tmp_path))
    save(ActivationSaver.from_env("mine"))
    assert len(ActivationLoader.from_env("mine").query()) == 1
    for empty in (
        lambda: monkeypatch.setenv("ACTIVATION_BASE_DIR", ""),
        lambda: monkeypatch.delenv("ACTIVATION_BASE_DIR"),
    ):
        empty()
        for kind in (ActivationSaver, ActivationLoader):
            with pytest.raises(HookError, match="ACTIVATION_BASE_DIR is not set"):
                kind.from_env()
    for base in ("", "a\0b", 3):
        with pytest.raises(HookError, match="base_dir is the path of a folder"):
            ActivationSaver(base)  # type: ignore[arg-type]


# Queries


@pytest.fixture
def many(saver: ActivationSaver) -> ActivationLoader:
    return fill(saver)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> ActivationLoader:
    """The same, for tests that only ask."""
    return fill(ActivationSaver(tmp_path_factory.mktemp("filled"), "first"))


def fill(saver: ActivationSaver) -> ActivationLoader:
    edit = {"hook_point": "blocks.0.attn.hook_z", "type": "add", "vector": [1.0, 2.0]}
    large = Intervention("hook_embed", "add", vector=np.arange(100.0))
    heads = ExtractionConfig(extract_head_out=True, attn_heads=[{"layer": 0, "head": 1}, {"layer": 2, "head": 3}])
    save(saver, model="openai-community/gpt2", tag="a", other_metadata={"seed": 1, "nested": {"x": [1, 2]}, "y": None})
    save(
        saver,
        model="gpt2",
        tag="b",
        extraction_config=BOTH,
        target_token_positions=[-1, (2, 5)],
        other_metadata={"seed": 2},
    )
    save(saver, model="mistral/gpt2-xl", tag="c", interventions=[edit], pivot_positions=[3], extraction_config=heads)
    save(saver, model="/models/gpt2/", tag="d", interventions=[large, edit], extraction_config=None)
    save(ActivationSaver(saver.base_dir, "second"), model="gpt2", tag="e")
    return ActivationLoader.from_saver(saver)


@pytest.mark.parametrize(
    ("criteria", "tags"),
    [
        ({}, "abcd"),
        ({"experiment_name": "second"}, "e"),
        ({"experiment_name": "*"}, "abcde"),
        ({"experiment_name": "third"}, ""),
        ({"model_name": "gpt2"}, "abd"),
        ({"model_name": "openai-community/gpt2"}, "a"),
        ({"model_name": "/models/gpt2"}, "d"),
        ({"model_name": "gpt"}, ""),
        ({"tag": "b"}, "b"),
        ({"target_token_positions": ["last"]}, "acd"),
        ({"target_token_positions": "last"}, "acd"),
        ({"target_token_positions": [-1, (2, 5)]}, "b"),
        ({"pivot_positions": [3]}, "c"),
        ({"custom_keys": {"seed": 1}}, "a"),
        ({"custom_keys": {"nested": {"x": (1, 2)}}}, "a"),
        ({"custom_keys": {"y": None}}, "a"),
        ({"custom_keys": {"seed": 1, "y": 3}}, ""),
        ({"custom_keys": {}}, "abcd"),
        ({"extraction_config": RESID}, "ab"),
        ({"extraction_config": ExtractionConfig(extract_attn_pattern=True)}, "b"),
        ({"extraction_config": ExtractionConfig(save_logits=False)}, ""),
        ({"extraction_config": {"extract_attn_pattern": False}}, "ac"),
        ({"extraction_config": ExtractionConfig()}, "abc"),
        ({"extraction_config": ExtractionConfig(attn_heads=[{"layer": 2, "head": 3}])}, "abc"),
        ({"extraction_config": ExtractionConfig(attn_heads=[{"layer": 2, "head": 1}])}, "ab"),
        ({"interventions": []}, "ab"),
        ({"interventions": [Intervention("blocks.0.attn.hook_z", "add", vector=mx.array([1.0, 2.0]))]}, "c"),
        ({"interventions": [{"hook_point": "hook_embed", "type": "add", "vector": list(range(100))},
                            {"hook_point": "blocks.0.attn.hook_z", "type": "add", "vector": [1, 2]}]}, "d"),
        ({"interventions": [{"hook_point": "blocks.0.attn.hook_z", "type": "add", "vector": [1, 3]}]}, ""),
        ({"experiment_name": "*", "model_name": "gpt2", "extraction_config": RESID, "interventions": []}, "abe"),
    ],
)  # fmt: skip
def test_a_query_finds_what_meets_all_criteria(filled: ActivationLoader, criteria: dict[str, Any], tags: str) -> None:
    assert [run.tag for run in filled.query(**criteria)] == list(tags)


def test_a_time_is_found_by_its_beginning(filled: ActivationLoader) -> None:
    first = filled.query()[0]
    stamp = first.metadata["save_time"]
    second = first.run_id[:19]
    for written in (
        stamp,
        first.run_id,
        stamp[:19],
        second,
        stamp[:19].replace("T", " "),
        stamp[:10],
        stamp[:4],
        second[:16],
    ):
        assert "a" in [run.tag for run in filled.query(save_time=written)]
    assert [run.tag for run in filled.query(save_time=stamp)] == ["a"]
    assert not filled.query(save_time="2023-04-15")
    for wrong in ("yesterday", "2023-4-15", "20230415", "", 5):
        with pytest.raises(HookError, match="A time is written '2023-04-15_14-30-25'"):
            filled.query(save_time=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("criteria", "message"),
    [
        ({"experiment_name": "../x"}, "experiment_name is a text"),
        ({"tag": "a/b"}, "A tag is a text"),
        ({"model_name": 3}, "model_name is a text, got 3"),
        ({"custom_keys": {"tag": "b"}}, "reserved key 'tag'"),
        ({"custom_keys": 3}, "is a mapping"),
        ({"extraction_config": {"resid": True}}, "Unknown flag"),
        ({"interventions": "zero"}, "interventions is a list"),
    ],
)
def test_criteria_that_no_run_could_meet_are_refused(
    filled: ActivationLoader, criteria: dict[str, Any], message: str
) -> None:
    with pytest.raises(HookError, match=message):
        filled.query(**criteria)


def test_without_a_folder_there_is_nothing_to_query(tmp_path: Path) -> None:
    with pytest.raises(HookError, match="There is no folder .*nowhere: nothing was saved there"):
        ActivationLoader(tmp_path / "nowhere").query()
    assert not (tmp_path / "nowhere").exists()


def test_what_is_printed_at_an_index_is_what_it_means(filled: ActivationLoader) -> None:
    found = filled.query()
    lines = str(found).splitlines()
    assert lines[1] == f"1 - {found[1].run_id}: experiment first, model gpt2, tag b"
    assert found.get_paths()[1] == found[1].path
    assert [found.load(i)[1]["tag"] for i in (0, 1, -1, np.int64(-2))] == ["a", "b", "d", "c"]
    assert found.load()[1]["tag"] == "d"
    assert found.load(found[2].run_id)[1]["tag"] == "c"
    assert [run.tag for run in found[1:3]] == ["b", "c"]
    assert str(filled.query(tag="zzz")) == "No runs."
    assert found[0].load()[1]["run_id"] == found[0].run_id


def test_a_run_that_is_not_there_is_named(filled: ActivationLoader) -> None:
    found = filled.query()
    second = found[0].run_id[:15]
    with pytest.raises(HookError, match=rf"4 runs begin with '{second}': .*Give more of the name, or an index"):
        found.load(second)
    with pytest.raises(HookError, match="No run found begins with '2023-04-15_14-30-25'. There are: 20"):
        found.load("2023-04-15_14-30-25")
    for index in (4, -5):
        with pytest.raises(HookError, match=f"There is no run {index}: there are 4, 0 to 3, -1 is the newest"):
            found.load(index)
    for wrong in (True, 1.5, None, [0]):
        with pytest.raises(HookError, match="A run is named by an index or by its folder's name"):
            found.load(wrong)  # type: ignore[arg-type]
    with pytest.raises(HookError, match="found no runs"):
        filled.query(tag="zzz").load(-1)


def test_removing_removes_what_was_listed(many: ActivationLoader) -> None:
    found = many.query()
    (found[1].path / "notes.txt").write_text("of this run")
    gone = found[1].path
    found.remove(1)
    assert [run.tag for run in found] == ["a", "c", "d"]
    found.remove(-1)
    assert [run.tag for run in found] == ["a", "c"]
    assert not gone.exists()
    assert [run.tag for run in many.query("*")] == ["a", "c", "e"]
    stale = many.query()
    stale.remove(stale[0].run_id)
    with pytest.raises(HookError, match="is not at .* any more: query again"):
        found.remove(0)
    with pytest.raises(HookError, match="is not at .* any more: query again"):
        found.load(0)
    assert [run.tag for run in many.query("*")] == ["c", "e"]


def test_a_run_changes_its_experiment(many: ActivationLoader) -> None:
    found = many.query()
    found.update_run_experiment(0, "third")
    found.update_run_experiment("2" if len(found) == 1 else found[1].run_id, "second")
    assert [run.experiment_name for run in found] == ["third", "second", "first", "first"]
    assert [run.tag for run in many.query()] == ["c", "d"]
    assert [run.tag for run in many.query("second")] == ["b", "e"]
    value, metadata = many.query("third").load()
    assert value.tolist() == [1.0, 2.0]
    assert metadata["experiment_name"] == "third"
    assert json.loads((found[0].path / "metadata.json").read_text())["experiment_name"] == "third"
    found.update_run_experiment(0, "third")
    assert [run.tag for run in many.query("*")] == list("abcde")


def test_an_experiment_is_renamed(many: ActivationLoader, saver: ActivationSaver) -> None:
    saver.rename_experiment("renamed")
    assert [run.tag for run in many.query("renamed")] == list("abcd")
    assert len(many.query()) == 0
    assert {
        json.loads((p / "metadata.json").read_text())["experiment_name"] for p in many.query("renamed").get_paths()
    } == {"renamed"}
    save(saver, tag="later")
    assert many.query("renamed")[-1].tag == "later"
    with pytest.raises(HookError, match="There is an experiment 'second' already"):
        saver.rename_experiment("second")
    with pytest.raises(HookError, match="There is no experiment 'first' in .*There are: renamed, second"):
        ActivationSaver(saver.base_dir, "first").rename_experiment("fourth")
    assert len(many.query("*")) == 6


MOVER = """
import sys
from mlx_hooks import ActivationLoader
loader = ActivationLoader(sys.argv[1], "first")
for _ in range(60):
    loader.query("*").update_run_experiment(0, "a" if loader.query("a") else "z")
    loader.query("*").update_run_experiment(0, "z" if loader.query("a") else "a")
"""


def test_a_run_that_is_moved_is_at_one_place_or_the_other(saver: ActivationSaver, loader: ActivationLoader) -> None:
    save(saver)
    seen = set()
    with subprocess.Popen([sys.executable, "-c", MOVER, str(saver.base_dir)], cwd=ROOT) as mover:
        while mover.poll() is None:
            (run,) = loader.query("*")
            seen.add(run.experiment_name)
    assert mover.returncode == 0
    assert len(seen) > 1


# What cannot be read


def damage_nothing(run: Path) -> None:
    (run / "metadata.json").unlink()


def damage_json(run: Path) -> None:
    (run / "metadata.json").write_text('{"save_time": "20')


def damage_list(run: Path) -> None:
    (run / "metadata.json").write_text("[]")


def damage_time(run: Path) -> None:
    (run / "metadata.json").write_text('{"save_time": "now", "model_name": "m"}')


def damage_name(run: Path) -> None:
    (run / "metadata.json").write_text('{"save_time": "2023-04-15T14:30:25"}')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_nothing, "it has no metadata.json"),
        (damage_json, "its metadata.json is no JSON"),
        (damage_list, "its metadata.json is no object"),
        (damage_time, "Invalid isoformat string"),
        (damage_name, "its metadata.json has no model_name"),
    ],
)
def test_a_run_that_cannot_be_read_is_named_and_the_others_are_found(
    many: ActivationLoader, damage: Any, reason: str
) -> None:
    before = many.query()
    damage(before[1].path)
    for _ in range(2):
        with pytest.warns(UnreadableRunWarning, match=rf"passed over, .*first/gpt2/{before[1].run_id} \({reason}"):
            assert [run.tag for run in many.query()] == ["a", "c", "d"]
    with pytest.raises(HookError, match=rf"{before[1].run_id}.*(cannot be read|query again)"):
        before.load(1)
    # It is mended, and found again.
    good = before[0].path
    for name in ("metadata.json", "activations.safetensors"):
        shutil.copy(good / name, before[1].path / name)
    assert [run.tag for run in many.query()] == ["a", "a", "c", "d"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "bytes where its header tells of"),
        (lambda data: data + b"x", "bytes where its header tells of"),
        (lambda data: data[:4], "too short"),
        (lambda data: b"\xff" * 8 + data[8:], "header is longer than the file"),
        (lambda data: data[:8] + b"x" + data[9:], "header is damaged"),
        (lambda data: data.replace(b'"F32"', b'"F99"'), "header is damaged"),
        (lambda data: data.replace(b'"shape": [2]', b'"shape": [3]'), "header is damaged"),
        (lambda data: data.replace(b'"content"', b'"context"'), "it is no run.s file"),
    ],
)
def test_a_damaged_file_is_an_error_when_it_is_loaded(
    saver: ActivationSaver, loader: ActivationLoader, damage: Any, reason: str
) -> None:
    path = save(saver) / "activations.safetensors"
    changed = damage(path.read_bytes())
    assert changed != path.read_bytes()
    path.write_bytes(changed)
    with pytest.raises(HookError, match=f"The activations of the run at .* cannot be read: .*{reason}"):
        loader.query().load()


# The index


def test_what_other_processes_do_is_noticed(saver: ActivationSaver, loader: ActivationLoader) -> None:
    path = save(saver, tag="a")
    assert [run.tag for run in loader.query()] == ["a"]
    save(ActivationSaver(saver.base_dir, "first"), tag="b")
    assert [run.tag for run in loader.query()] == ["a", "b"]
    described = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps(described | {"tag": "edited by hand"}))
    assert [run.tag for run in loader.query()] == ["edited by hand", "b"]
    # As long as before, in the same file.
    (path / "metadata.json").write_text(json.dumps(described | {"tag": "edited by head"}))
    assert [run.tag for run in loader.query()] == ["edited by head", "b"]
    shutil.rmtree(path)
    assert [run.tag for run in loader.query()] == ["b"]


def test_a_time_that_was_written_by_hand_is_found(saver: ActivationSaver, loader: ActivationLoader) -> None:
    path = save(saver) / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"save_time": "2023-04-15 14:30:25+00:00"}))
    assert len(loader.query(save_time="2023-04-15_14-30-25")) == len(loader.query(save_time="2023")) == 1
    assert not loader.query(save_time="2023-04-15_14-30-26")


def test_the_index_is_made_again_from_the_files(many: ActivationLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    database = many.base_dir / ".index.sqlite"
    many.query("*")
    read: list[Any] = []
    real = about.canonical
    monkeypatch.setattr("mlx_hooks.storage.index.canonical", lambda value: (read.append(value), real(value))[1])

    def tags() -> str:
        return "".join(str(run.tag) for run in ActivationLoader(many.base_dir).query("*"))

    assert (tags(), len(read)) == ("abcde", 0)
    for damaged in (None, b"", b"not a database", database.read_bytes()[:1000]):
        database.unlink() if damaged is None else database.write_bytes(damaged)
        assert tags() == "abcde"
        assert read
        read.clear()
        assert (tags(), len(read)) == ("abcde", 0)
    # A database that says something else than the files is not believed.
    found = many.query()
    described = json.loads((found[0].path / "metadata.json").read_text())
    (found[0].path / "metadata.json").write_text(json.dumps(described | {"tag": "x"}))
    assert tags() == "xbcde"


@pytest.mark.parametrize("index", [None, b"", b"not a database" * 500, "of now"])
def test_a_folder_that_cannot_be_written_can_be_queried(many: ActivationLoader, index: Any) -> None:
    database = many.base_dir / ".index.sqlite"
    many.query("*")
    if index is None:
        database.unlink()
    elif index != "of now":
        database.write_bytes(index)
    with read_only(many.base_dir):
        assert [run.tag for run in ActivationLoader(many.base_dir).query("*")] == list("abcde")
    assert database.exists() == (index is not None)


def test_an_index_that_cannot_be_written_is_done_without(
    many: ActivationLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    (many.base_dir / ".index.sqlite").unlink(missing_ok=True)
    (many.base_dir / ".index.sqlite").mkdir()
    for _ in range(2):
        assert [run.tag for run in ActivationLoader(many.base_dir).query("*")] == list("abcde")


def test_a_run_without_values_is_an_error_when_it_is_loaded(saver: ActivationSaver, loader: ActivationLoader) -> None:
    path = save(saver)
    found = loader.query()
    for file, what in (("activations.safetensors", "The activations of the run"), ("metadata.json", "The run")):
        (path / file).unlink()
        with pytest.raises(HookError) as missing:
            found.load()
        assert str(missing.value) == f"{what} at {path} cannot be read: it has no {file}."
        (path / file).mkdir()
        with pytest.raises(HookError) as folder:
            found.load()
        assert str(folder.value) == f"{what} at {path} cannot be read: Is a directory."


def test_thousands_of_runs_are_queried_at_once(saver: ActivationSaver) -> None:
    path = save(saver, tag="batch_0", other_metadata=own(0), extraction_config=BOTH)
    described = json.loads((path / "metadata.json").read_text())
    for i in range(1, 3000):
        run = path.with_name(f"2023-04-15_14-30-25-{i:06d}-00000000")
        run.mkdir()
        changed = {"save_time": f"2023-04-15T14:30:25.{i:06d}+00:00", "tag": f"batch_{i}"}
        (run / "metadata.json").write_text(json.dumps(described | changed | own(i)))
        os.link(path / "activations.safetensors", run / "activations.safetensors")
    loader = ActivationLoader.from_saver(saver)
    loader.query()
    mixed = {"custom_keys": {"batch_id": 17}, "model_name": "llama-16", "extraction_config": RESID}
    by_key = [({"custom_keys": {key: value}}, [17]) for key, value in own(17).items() if key not in ("even", "zero")]
    asked = [(mixed, [17]), *by_key]
    asked += [({"custom_keys": {"even": True}}, range(0, 3000, 2)), ({"custom_keys": {"zero": 0}}, range(3000))]
    for criteria, batches in asked:
        # The processor's time, and the fastest of several: others may be at work on this machine.
        spans = []
        for _ in range(5):
            begin = time.process_time()
            found = loader.query(**criteria)
            spans.append(time.process_time() - begin)
        assert {run.tag for run in found} == {f"batch_{i}" for i in batches}
        assert min(spans) < 0.03, criteria
    assert len(loader.query()) == 3000


def own(i: int) -> dict[str, Any]:
    """Custom keys of every kind: those of a caller who keeps scores and settings with each run."""
    return {
        "batch_id": i,
        "loss": i / 7,
        "span": [i, i + 1],
        "settings": {"seed": i, "rates": [0.5]},
        "even": i % 2 == 0,
        "zero": 0,
        "scores": [i + k / 7 for k in range(40)],
    }


# Names and texts


HALF = "half of \ud83d"


def test_half_characters_are_refused_and_nothing_is_saved(saver: ActivationSaver, loader: ActivationLoader) -> None:
    save(saver, tag="good")
    for given, what in [
        ({"tag": HALF}, "A tag"),
        ({"model": HALF}, "A model's name"),
        ({"other_metadata": {"k": [HALF]}}, r"other_metadata\['k'\]\[0\]"),
        ({"other_metadata": {HALF: 1}}, "A key of other_metadata"),
        ({"target_token_positions": [HALF]}, "target_token_positions"),
    ]:
        with pytest.raises(HookError, match=rf"^{what} is a text in Unicode, got 'half of \\ud83d'"):
            save(saver, **given)
    assert [run.tag for run in loader.query()] == ["good"]


def test_names_that_are_no_text_hide_no_others(many: ActivationLoader) -> None:
    good = many.query()[0].path
    foreign = os.fsencode(good.parent) + b"/caf\xe9"
    shutil.copytree(os.fsencode(good), foreign)
    other = good.with_name("other")
    shutil.copytree(good, other)
    described = json.loads((other / "metadata.json").read_text())
    (other / "metadata.json").write_text(json.dumps(described | {"tag": HALF}))
    for loader in (many, many, ActivationLoader(many.base_dir, "first")):
        with pytest.warns(UnreadableRunWarning, match="no UTF-8|no Unicode") as warned:
            assert [run.tag for run in loader.query()] == list("abcd")
        assert all(part in str(warned[0].message) for part in ("caf\\udce9 (its folder's name is no UTF-8)", "other ("))
    shutil.rmtree(foreign)
    shutil.rmtree(other)
    assert [run.tag for run in many.query("*")] == list("abcde")


def test_long_names_in_any_script_are_folders(saver: ActivationSaver, loader: ActivationLoader) -> None:
    names = ["模" * 100, "模" * 99 + "型", "m" * 300]
    folders = {save(saver, model=name).parent.name for name in names}
    assert len(folders) == 3
    assert all(len(folder.encode()) <= 100 for folder in folders)
    assert all(len(loader.query(model_name=name)) == 1 for name in names)
    with pytest.raises(HookError, match=r"up to 100 letters \(200 bytes in UTF-8\)"):
        ActivationSaver(saver.base_dir, "模" * 67)
    assert save(ActivationSaver(saver.base_dir, "模" * 66)).exists()


def test_metadata_without_an_end_is_refused(saver: ActivationSaver) -> None:
    endless: dict[str, Any] = {}
    endless["itself"] = endless
    with pytest.raises(HookError, match="other_metadata is nested too deeply, or holds itself"):
        save(saver, other_metadata=endless)
    with pytest.raises(HookError, match="custom_keys is nested too deeply"):
        ActivationLoader.from_saver(saver).query(custom_keys=endless)
    with pytest.raises(HookError, match="custom_keys has the reserved key"):
        ActivationLoader.from_saver(saver).query(custom_keys={"tag": 1})


def test_a_masked_array_keeps_its_mask_or_is_refused(saver: ActivationSaver) -> None:
    masked = np.ma.array([1, 2, 999], mask=[0, 0, 1])
    with pytest.raises(HookError, match="A masked array would lose its mask: give its data and its mask"):
        save(saver, masked)
    with pytest.raises(HookError, match="A masked array as 'a' would lose its mask"):
        save(saver, {"a": masked})


def change(path: Path, **changes: Any) -> None:
    """Edit a run's metadata by hand."""
    file = path / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "written",
    ["2023-04-15T14:30:25Z", "20230415T143025", "2023-04-15T14:30:25,5", "2023-04-15T14:30:25+02", "2023-04-15"],
)
def test_a_time_in_another_form_spoils_no_query(saver: ActivationSaver, loader: ActivationLoader, written: str) -> None:
    save(saver, tag="good")
    change(save(saver, tag="edited"), save_time=written)
    try:
        expected = ["edited"] if datetime.fromisoformat(written) else []
    except ValueError:
        expected = []  # An older Python reads fewer forms.
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert [run.tag for run in loader.query(save_time="2023-04-15")] == expected
        assert [run.tag for run in loader.query(save_time=time.strftime("%Y"))] == ["good"]
    assert bool(warned) == (not expected)


@pytest.mark.parametrize("written", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "0001-01-01T00:00:00"])
def test_a_time_beyond_the_calendar_hides_no_others(
    saver: ActivationSaver, loader: ActivationLoader, written: str
) -> None:
    save(saver, tag="good")
    change(save(saver), save_time=written)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreadableRunWarning)
        assert "good" in [run.tag for run in loader.query(save_time=time.strftime("%Y"))]


def test_deep_nesting_is_one_unreadable_run(many: ActivationLoader) -> None:
    path = many.query()[1].path / "metadata.json"
    path.write_text('{"save_time": "2023-04-15", "model_name": "m", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.warns(UnreadableRunWarning, match="its metadata.json is no JSON"):
        assert [run.tag for run in many.query(custom_keys={})] == ["a", "c", "d"]
    change(many.query("second")[0].path, extraction_config={"attn_heads": 3})
    heads = ExtractionConfig(attn_heads=[{"layer": 0, "head": 0}])
    with pytest.warns(UnreadableRunWarning):
        assert [run.tag for run in many.query("*", extraction_config=heads)] == ["a"]


# What others do meanwhile


@contextmanager
def once_between(monkeypatch: pytest.MonkeyPatch, folder: Path, act: Callable[[], Any]) -> Iterator[None]:
    """Do what another process might between a rename and the flush that follows it."""
    real = files.sync
    done: list[Path] = []

    def sync(path: Path) -> None:
        if path == folder and path.exists() and not done:
            done.append(path)
            act()
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", sync)
        yield
    assert done


def test_what_is_done_is_not_reported_as_failed(
    saver: ActivationSaver, loader: ActivationLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = saver.base_dir / "first" / "tests_llama-16"
    other = ActivationSaver(saver.base_dir, "first")
    with once_between(monkeypatch, place, lambda: other.rename_experiment("second")):
        save(saver, tag="a")
    assert [run.tag for run in loader.query("second")] == ["a"]
    save(saver, tag="b")
    save(saver, tag="c")
    found = loader.query()
    with once_between(monkeypatch, place, lambda: ActivationSaver(saver.base_dir, "first").rename_experiment("third")):
        found.remove(0)
    assert [run.tag for run in found] == ["c"]
    assert [run.tag for run in loader.query("third")] == ["c"]
    found = loader.query("third")
    moved = saver.base_dir / "fourth" / "tests_llama-16"
    with once_between(monkeypatch, moved, lambda: ActivationSaver(saver.base_dir, "fourth").rename_experiment("fifth")):
        found.update_run_experiment(0, "fourth")
    assert [(run.tag, run.experiment_name) for run in loader.query("fifth")] == [("c", "fifth")]


def test_a_folder_is_made_under_the_lock(saver: ActivationSaver, loader: ActivationLoader) -> None:
    saver.base_dir.mkdir()
    with files.locked(saver.base_dir):
        thread = threading.Thread(target=save, args=(saver,))
        thread.start()
        thread.join(0.3)
        # Who removes empty folders holds the lock too, so it is not gone before the run is in it.
        assert thread.is_alive()
        assert not (saver.base_dir / "first").exists()
    thread.join(20)
    assert len(loader.query()) == 1


def test_metadata_is_rewritten_under_the_lock(saver: ActivationSaver) -> None:
    path = save(saver)
    change(path, experiment_name="another")
    with files.locked(saver.base_dir):
        thread = threading.Thread(target=run_index.rewrite_experiment, args=(path,))
        thread.start()
        thread.join(0.3)
        # Who moves the run away holds the lock too, so nothing is written where it was.
        assert thread.is_alive()
        assert json.loads((path / "metadata.json").read_text())["experiment_name"] == "another"
    thread.join(20)
    assert json.loads((path / "metadata.json").read_text())["experiment_name"] == "first"


def test_a_run_that_is_removed_while_it_is_read_is_no_unreadable_one(
    saver: ActivationSaver, loader: ActivationLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(saver, tag="a")
    gone = save(saver, tag="gone")
    real = run_index.read_metadata

    def read(run: Path) -> dict[str, Any]:
        if run == gone:
            shutil.rmtree(run)
        return real(run)

    monkeypatch.setattr(run_index, "read_metadata", read)
    # A warning would be an error here.
    assert [run.tag for run in loader.query()] == ["a"]
    assert not gone.exists()


def test_a_run_that_could_not_be_read_once_is_read_again(
    saver: ActivationSaver, loader: ActivationLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(saver, tag="a")

    def read(run: Path) -> dict[str, Any]:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(run_index, "read_metadata", read)
        with pytest.warns(UnreadableRunWarning, match="Permission denied"):
            assert not loader.query()
    # Neither time nor size of the file has changed.
    assert [run.tag for run in loader.query()] == ["a"]


def test_an_emptied_experiment_leaves_its_name(saver: ActivationSaver, loader: ActivationLoader) -> None:
    save(saver)
    loader.query().remove(0)
    assert [path.name for path in saver.base_dir.iterdir() if not path.name.startswith(".")] == []
    save(ActivationSaver(saver.base_dir, "second"), tag="b")
    ActivationSaver(saver.base_dir, "second").rename_experiment("first")
    loader.query().update_run_experiment(0, "third")
    assert sorted(path.name for path in saver.base_dir.iterdir()) == [".index.sqlite", "third"]
    (saver.base_dir / "third" / "notes.txt").write_text("mine")
    loader.query("third").remove(0)
    assert [path.name for path in (saver.base_dir / "third").iterdir()] == ["notes.txt"]


def test_links_to_folders_are_followed(saver: ActivationSaver, loader: ActivationLoader, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    saver.base_dir.mkdir()
    (saver.base_dir / "first").symlink_to(tmp_path / "elsewhere")
    path = save(saver, tag="a")
    run = tmp_path / path.name
    shutil.move(path, run)
    path.symlink_to(run)
    assert [run.tag for run in loader.query()] == [run.tag for run in loader.query("*")] == ["a"]
    assert loader.query().load()[0].tolist() == [1.0, 2.0]
    # Of a linked run the link is removed.
    loader.query().remove(0)
    assert run.exists()
    assert len(loader.query("*")) == 0
    assert [path.name for path in saver.base_dir.iterdir() if is_temporary(path.name)] == []


def test_a_disk_without_locks_can_be_saved_on(
    saver: ActivationSaver, loader: ActivationLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*given: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    save(saver, tag="a")
    saver.rename_experiment("second")
    assert [run.tag for run in loader.query("second")] == ["a"]


def test_a_query_writes_into_no_run(saver: ActivationSaver, loader: ActivationLoader, tmp_path: Path) -> None:
    path = save(saver, tag="a")
    copied = saver.base_dir / "copied" / path.parent.name / path.name
    shutil.copytree(path, copied)
    other = ActivationSaver(tmp_path / "other", "mine")
    linked = save(other, tag="a")
    (saver.base_dir / "linked").symlink_to(other.base_dir / "mine")
    (linked / ".metadata.0123abcd.writing.json").touch()
    os.utime(linked / ".metadata.0123abcd.writing.json", (0, 0))

    def state(run: Path) -> tuple[Any, ...]:
        file = (run / "metadata.json").stat()
        return file.st_mtime_ns, file.st_ino, sorted(run.iterdir())

    before = [state(copied), state(linked)]
    for base in (saver.base_dir, other.base_dir, saver.base_dir):
        ActivationLoader(base).query("*")
    # The folder says to which experiment a run belongs, whatever its file says.
    assert [run.experiment_name for run in loader.query("*")] == ["copied", "first", "linked"]
    assert loader.query("copied").load()[1]["experiment_name"] == "copied"
    # Of a linked experiment the link is renamed, and of a linked run it is moved.
    ActivationSaver(saver.base_dir, "linked").rename_experiment("renamed")
    (saver.base_dir / "of_runs" / "model").mkdir(parents=True)
    (saver.base_dir / "of_runs" / "model" / linked.name).symlink_to(linked)
    loader.query("of_runs").update_run_experiment(0, "moved")
    assert [len(loader.query(name)) for name in ("renamed", "moved")] == [1, 1]
    assert [state(copied), state(linked)] == before


def test_what_a_killed_mover_left_is_mended_by_the_next(saver: ActivationSaver, loader: ActivationLoader) -> None:
    path = save(saver, tag="a")
    target = saver.base_dir / "second" / path.parent.name / path.name
    target.parent.mkdir(parents=True)
    path.rename(target)
    left = target / ".metadata.0123abcd.writing.json"
    left.touch()
    os.utime(left, (0, 0))
    loader.query("second").update_run_experiment(0, "third")
    (run,) = loader.query("third").get_paths()
    assert json.loads((run / "metadata.json").read_text())["experiment_name"] == "third"
    assert sorted(path.name for path in run.iterdir()) == ["activations.safetensors", "metadata.json"]


def test_another_programs_file_is_told(saver: ActivationSaver, loader: ActivationLoader) -> None:
    path = save(saver, {"a": mx.zeros(2)}) / "activations.safetensors"
    found = loader.query()
    whole = path.read_bytes()
    for damage, reason in [
        (lambda data: data.replace(b"libraries", b"librarian"), "its description is damaged"),
        (lambda data: data.replace(b'\\"kind\\"', b'\\"mind\\"'), "its description is damaged"),
        (lambda data: data.replace(b'"content": "{', b'"content": "['), "its description is damaged"),
    ]:
        assert damage(whole) != whole
        path.write_bytes(damage(whole))
        with pytest.raises(HookError, match=f"cannot be read: {reason}.$"):
            found.load()
    path.unlink()
    mx.save_safetensors(str(path), {"a": mx.zeros(2)})
    with pytest.raises(HookError, match=r"cannot be read: it is no run's file.$"):
        found.load()


# What the index holds


def columns(*changes: str) -> str:
    return "; ".join(f"UPDATE runs SET {change}" for change in changes)


@pytest.mark.parametrize(
    "script",
    [
        columns("config = '{'"),
        columns("config = NULL"),
        columns("custom = '[]'"),
        columns("interventions = '['"),
        columns("time = 'x' WHERE tag = 'a'"),
        columns("digits = 5"),
        columns("size = 'many'", "tag = 3"),
        columns("tag = X'ff'"),
        columns("model_name = CAST(X'ff' AS TEXT)"),
        "DROP TABLE runs",
        "DROP TABLE runs; CREATE TABLE runs (a, b)",
        "DROP TABLE runs; CREATE VIEW runs AS SELECT 1",
        "PRAGMA user_version = 7",
    ],
)
def test_an_index_that_holds_something_else_is_made_anew(
    many: ActivationLoader, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    many.query("*")
    with closing(sqlite3.connect(many.base_dir / ".index.sqlite")) as database:
        database.executescript(script)
    criteria: dict[str, Any] = {
        "extraction_config": ExtractionConfig(),
        "custom_keys": {},
        "save_time": time.strftime("%Y"),
    }
    assert [run.tag for run in ActivationLoader(many.base_dir).query("*", **criteria)] == list("abce")
    monkeypatch.setattr(run_index, "read_metadata", pytest.fail)
    assert [run.tag for run in ActivationLoader(many.base_dir).query("*", **criteria)] == list("abce")


def test_size_and_inode_tell_a_change_that_the_time_does_not(saver: ActivationSaver, loader: ActivationLoader) -> None:
    path = save(saver, tag="a") / "metadata.json"
    assert [run.tag for run in loader.query()] == ["a"]
    state = path.stat()
    path.write_text(path.read_text().replace('"tag": "a"', '"tag": "long"'))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert [run.tag for run in loader.query()] == ["long"]
    other = path.with_name("other.json")
    other.write_text(path.read_text().replace('"tag": "long"', '"tag": "LONG"'))
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    other.replace(path)
    assert [run.tag for run in loader.query()] == ["LONG"]


def test_a_number_is_found_however_it_is_written(saver: ActivationSaver, loader: ActivationLoader) -> None:
    change(save(saver, tag="whole"), n=17, m=0, big=10**20, text="17", none=None)
    change(save(saver, tag="float"), n=17.0, m=-0.0, big=1e20, text='1"7', none=1)
    change(save(saver, tag="other"), n=170, m=1, big=10**20 + 1, text="170", deep={"n": 17})
    for custom, tags in [
        ({"n": 17}, ["whole", "float"]),
        ({"n": 17.0}, ["whole", "float"]),
        ({"m": 0}, ["whole", "float"]),
        ({"big": 10**20}, ["whole", "float"]),
        ({"text": "17"}, ["whole"]),
        ({"text": '1"7'}, ["float"]),
        ({"none": None}, ["whole"]),
        ({"deep": {"n": 17}}, ["other"]),
        ({"deep": {"n": 17.0}}, ["other"]),
        ({"m": False}, []),
        ({"n": 17, "m": 0.0}, ["whole", "float"]),
    ]:
        assert [run.tag for run in loader.query(custom_keys=custom)] == tags, custom


def test_a_number_in_any_criterion_is_found_however_it_is_written(
    saver: ActivationSaver, loader: ActivationLoader
) -> None:
    edit = {"hook_point": "hook_embed", "type": "scale", "factor": 2}
    save(saver, interventions=[edit], pivot_positions=[3], tag="whole")
    save(saver, interventions=[edit | {"factor": 2.0}], pivot_positions=[3], tag="float")
    change(save(saver, interventions=[edit | {"factor": 2.5}], tag="other"), pivot_positions=[3.0])
    for factor in (2, 2.0):
        found = loader.query(interventions=[edit | {"factor": factor}])
        assert [run.tag for run in found] == ["whole", "float"]
    assert len(loader.query(pivot_positions=[3])) == 3


def test_an_item_of_another_key_or_in_a_text_is_not_taken_for_the_runs(
    saver: ActivationSaver, loader: ActivationLoader
) -> None:
    save(saver, other_metadata={"x": {"a": 1}, "b": '\n"a":1\n', 'c\n"a":1\n': 2, "d": [{"a": 1}]}, tag="without")
    save(saver, other_metadata={"a": 1, "b": {"z": [1, {"y": None}], "é": "ü"}}, tag="with")
    assert [run.tag for run in loader.query(custom_keys={"a": 1})] == ["with"]
    assert [run.tag for run in loader.query(custom_keys={"b": {"é": "ü", "z": [1, {"y": None}]}})] == ["with"]
    assert [run.tag for run in loader.query(custom_keys={"b": '\n"a":1\n'})] == ["without"]
    assert not loader.query(custom_keys={"b": {"z": [1, {"y": None}]}})


# What the cache says of how it was made


def test_a_cache_is_not_saved_as_another_one(
    llama: HookedModel, saver: ActivationSaver, loader: ActivationLoader
) -> None:
    edit = {"hook_point": "blocks.0.hook_mlp_out", "type": "zero"}
    made = llama.forward(TOKENS, ["last"], RESID, interventions=[edit])
    for given, name in [
        ((["first"], [edit], RESID), "target_token_positions"),
        (("last", None, RESID), "interventions"),
        (("last", [edit | {"hook_point": "hook_embed"}], RESID), "interventions"),
        ((["last"], [edit], BOTH), "extraction_config"),
    ]:
        with pytest.raises(HookError, match=f"The activation cache was made with {name} .*: give these, or save it wi"):
            saver.save(made, llama, *given)
    with pytest.raises(HookError, match=r"was made with pivot_positions None: .* got \[3\]"):
        saver.save(made, llama, ["last"], [edit], RESID, pivot_positions=[3])
    assert not saver.base_dir.exists()
    saver.save(made, llama, "last", [edit], RESID.to_dict(), tag="a")
    saver.save(made, "another name", np.array(["last"]).tolist(), (Intervention.of(edit),), None, tag="b")
    plain = llama.forward(TOKENS, "last", RESID)
    for interventions in (None, [], ()):
        saver.save(plain, llama, ["last"], interventions, RESID)
    assert [run.tag for run in loader.query(extraction_config=RESID, interventions=[edit])] == ["a", "b"]
    assert len(loader.query(extraction_config=RESID, interventions=[])) == 3


def test_the_numbers_of_a_large_vector_tell_it_from_others(saver: ActivationSaver, loader: ActivationLoader) -> None:
    def edit(last: float) -> list[dict[str, Any]]:
        return [{"hook_point": "hook_embed", "type": "add", "vector": mx.array([0.0] * 99 + [last])}]

    save(saver, interventions=edit(1.0), tag="one")
    save(saver, interventions=edit(2.0), tag="two")
    assert [run.tag for run in loader.query(interventions=edit(2.0))] == ["two"]
    assert not loader.query(interventions=edit(3.0))


def scaled(value: mx.array, point: HookPoint) -> mx.array:
    return value * 0.5


def noted(loader: ActivationLoader) -> Any:
    """The interventions of the newest run."""
    return loader.query()[-1].metadata["interventions"]


EDIT = {"hook_point": "blocks.0.hook_mlp_out", "type": "zero"}
FUNCTION = {"type": "function", "name": "scaled", "hook_points": ["blocks.0.hook_mlp_out"]}


@pytest.mark.parametrize("how", ["run_with_cache", "spilled", "generate", "select"])
def test_an_edited_cache_is_not_saved_as_unedited(
    llama: HookedModel, saver: ActivationSaver, loader: ActivationLoader, how: str, tmp_path: Path
) -> None:
    if how == "generate":
        cache = llama.generate(TOKENS, max_tokens=2, capture=["hook_embed"], interventions=iter([EDIT])).cache
    else:
        names, spill = ["hook_embed", "blocks.0.hook_mlp_out"], tmp_path / "spilled" if how == "spilled" else None
        _, cache = llama.run_with_cache(TOKENS, names, interventions=iter([EDIT]), spill_to=spill)
        cache = cache.select("hook_embed") if how == "select" else cache
    assert [receipt.type for receipt in cache.interventions] == ["zero"]
    for given in (None, [], [EDIT, EDIT], [EDIT | {"type": "scale", "factor": 2}]):
        with pytest.raises(
            HookError, match=r"with interventions .*'type': 'zero'.*: give these \(cache.edited_by\); got"
        ):
            saver.save(cache, llama, None, given, None)
    assert not saver.base_dir.exists()
    saver.save(cache, llama, None, [EDIT], None)
    assert noted(loader) == [EDIT]
    assert not loader.query(interventions=[])
    _, unedited = llama.run_with_cache(TOKENS, "hook_embed")
    with pytest.raises(HookError, match=r"was made with interventions \[\]"):
        saver.save(unedited, llama, None, [EDIT], None)


def test_what_blocks_keep_in_force_is_saved_with_the_run(
    llama: HookedModel, saver: ActivationSaver, loader: ActivationLoader
) -> None:
    own = {"hook_point": "blocks.1.hook_mlp_out", "type": "scale", "factor": 0.5}
    with llama.intervening([EDIT]), llama.hooks([("blocks.*.hook_mlp_out", scaled)]):
        made = llama.forward(TOKENS, "last", RESID, interventions=[own])
        rows = llama.extract_cache([TOKENS, TOKENS[:3]], "last", RESID, interventions=iter([own]), progress=False)
        _, cache = llama.run_with_cache(TOKENS, "hook_embed")
    everywhere = FUNCTION | {"hook_points": [f"blocks.{i}.hook_mlp_out" for i in range(llama.cfg.n_layers)]}
    for edited in (made, rows):
        saver.save_cache(edited)
        assert noted(loader) == [EDIT, everywhere, own]
    with pytest.raises(HookError, match="was made with interventions"):
        saver.save(made, llama, "last", [own], RESID)
    saver.save(cache, llama, None, cache.edited_by, None)
    assert noted(loader) == [EDIT, everywhere]
    assert not loader.query(interventions=[])
    assert len(loader.query(interventions=[EDIT, everywhere])) == 1
    # Outside, nothing is in force, and what was loaded knows what was.
    assert llama.forward(TOKENS, "last", RESID).metadata["interventions"] == []
    loaded, _ = loader.query().load()
    with pytest.raises(HookError, match="was made with interventions"):
        saver.save(loaded, llama, None, None, None)


def test_functions_of_a_generation_are_saved_with_it(
    llama: HookedModel, saver: ActivationSaver, loader: ActivationLoader
) -> None:
    cache = llama.generate(
        TOKENS, max_tokens=2, capture=["hook_embed"], fwd_hooks=iter([("blocks.0.hook_mlp_out", scaled)])
    ).cache
    with pytest.raises(HookError, match="was made with interventions .*'function'"):
        saver.save(cache, llama, None, None, None)
    saver.save(cache, llama, None, [FUNCTION], None)
    assert noted(loader) == [FUNCTION]


def test_a_thread_is_not_told_of_anothers_blocks(llama: HookedModel) -> None:
    found: list[Any] = []
    with llama.hooks([("hook_embed", scaled)]):
        assert len(llama.instrument.editing) == 1
        other = threading.Thread(target=lambda: found.extend(llama.instrument.editing))
        other.start()
        other.join()
    assert not found
    assert not llama.instrument.editing


@pytest.mark.parametrize("kind", [np.array, mx.array])
def test_what_is_changed_after_the_run_is_saved_as_it_was(
    llama: HookedModel, saver: ActivationSaver, loader: ActivationLoader, kind: Any
) -> None:
    vector, source = kind(np.ones(32, np.float32)), kind(np.ones((len(TOKENS), 32), np.float32))
    edits: list[dict[str, Any]] = [
        {"hook_point": "blocks.0.hook_mlp_out", "type": "add", "vector": vector},
        {"hook_point": "blocks.1.hook_mlp_out", "type": "patch", "source": source},
    ]
    made = llama.forward(TOKENS, "last", RESID, interventions=edits)
    saver.save_cache(made)
    before = noted(loader)
    vector[:] = 5.0
    source[:] = 5.0
    edits[0]["coefficient"] = 3.0
    edits.pop()
    saver.save_cache(made)
    assert noted(loader) == before
    assert before[0]["vector"] == [1.0] * 32


def test_a_place_has_one_name(llama: HookedModel, saver: ActivationSaver, loader: ActivationLoader) -> None:
    spellings: list[dict[str, Any]] = [
        EDIT,
        {"hook_point": "mlp_out_0", "type": "zero"},
        {"layer_name": "transformer.h.0", "component": "mlp", "type": "zero"},
        {"layer_name": "0", "component": "mlp", "type": "zero"},
    ]
    for spelling in spellings:
        made = llama.forward(TOKENS, "last", RESID, interventions=[spelling])
        for other in spellings:
            saver.save(made, llama, "last", [other], RESID)
            assert noted(loader) == [EDIT]
    for spelling in spellings:
        assert len(loader.query(interventions=[spelling])) == len(spellings) ** 2
    everywhere = {"layer_name": "*", "component": "mlp", "type": "zero"}
    saver.save_cache(llama.forward(TOKENS, "last", RESID, interventions=[everywhere]))
    assert noted(loader) == [everywhere]
    with pytest.raises(HookError, match="Unknown layer 'here'"):
        loader.query(interventions=[everywhere | {"layer_name": "here"}])


def test_only_what_differs_of_a_configuration_is_told(llama: HookedModel, saver: ActivationSaver) -> None:
    heads = [{"layer": 1, "head": 2}, {"layer": 0, "head": 1}]
    made = llama.forward(TOKENS, "last", ExtractionConfig(extract_attn_pattern=True, attn_heads=heads))
    same = ExtractionConfig(extract_attn_pattern=True, attn_heads=[*heads[::-1], heads[0]])
    saver.save(made, llama, "last", None, same)
    other = {"extract_attn_pattern": True, "attn_heads": heads, "save_input_ids": True}
    with pytest.raises(
        HookError, match=r"extraction_config \{'save_input_ids': False\}: .* \{'save_input_ids': True\}"
    ):
        saver.save(made, llama, "last", None, other)
    with pytest.raises(HookError, match="extraction_config {'attn_heads': .*got {'attn_heads': 'all'}"):
        saver.save(made, llama, "last", None, ExtractionConfig(extract_attn_pattern=True))


def test_none_is_what_the_cache_says_or_nothing(
    llama: HookedModel, saver: ActivationSaver, loader: ActivationLoader
) -> None:
    pivots = {"target_token_positions": ["last", "inputs-partition-0"], "pivot_positions": [3]}
    made = llama.forward(TOKENS, **pivots, extraction_config=RESID)
    saver.save(made, llama, None, None, None)
    found = loader.query(**pivots, extraction_config=RESID)
    assert len(found) == 1
    # Of a cache that says nothing, nothing is known, and what is told later is no contradiction.
    _, cache = llama.run_with_cache(TOKENS, "hook_embed")
    saver.save(cache, llama, None, None, None)
    loaded, told = loader.query().load()
    assert told["target_token_positions"] is told["extraction_config"] is told["pivot_positions"] is None
    saver.save_cache(loaded)
    saver.save(loaded, llama, ["last"], None, RESID, pivot_positions=[3])
    assert len(loader.query(target_token_positions=["last"], pivot_positions=[3])) == 1


@pytest.mark.parametrize("kind", [np.array, mx.array, tuple])
def test_pivots_are_a_list_or_an_array(
    llama: HookedModel, saver: ActivationSaver, loader: ActivationLoader, kind: Any
) -> None:
    pivots = kind([2, 4])
    made = llama.forward(TOKENS, ["inputs-partition-1"], RESID, pivot_positions=pivots)
    saver.save(made, llama, ["inputs-partition-1"], None, RESID, pivot_positions=pivots)
    assert loader.query()[-1].metadata["pivot_positions"] == [2, 4]
    assert len(loader.query(pivot_positions=pivots)) == 1


def test_another_models_cache_is_not_saved_as_this_ones(
    llama: HookedModel, tiny: HookedModel, saver: ActivationSaver, loader: ActivationLoader
) -> None:
    made = llama.forward(TOKENS, "last", RESID)
    with pytest.raises(HookError, match=r"made by another model, 'tests/llama-16' with .*'d_model': 32"):
        saver.save(made, tiny, "last", None, RESID)
    assert not saver.base_dir.exists()
    saver.save(made, llama, "last", None, RESID)
    loaded, _ = loader.query().load()
    with pytest.raises(HookError, match="made by another model"):
        saver.save(loaded, tiny, "last", None, RESID)
    saver.save(loaded, llama, "last", None, RESID)
