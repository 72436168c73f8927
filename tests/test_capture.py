"""What a capture keeps, what it takes, where it goes: selections, stops, estimates, budgets, files, chunks."""

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from reference import forward
from tiny_models import CONFIGS, N_LAYERS, make_model

from mlx_hooks import HookedModel, HookError, HookPoint, UntrustedHookWarning
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.storage.files import is_temporary
from mlx_hooks.storage.spill import SpillFolder, StoredActivation

TOKENS = [[1, 5, 9, 3, 7, 2, 5, 9], [4, 4, 8, 0, 59, 2, 11, 30]]
RESIDUAL = "blocks.*.hook_resid_post"


def equal(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and mx.array_equal(a, b, equal_nan=True).item()


# Heads


def test_heads_are_those_of_the_independent_forward_pass(model: HookedModel) -> None:
    _, cache = model.run_with_cache(TOKENS, heads=[3, 1])
    expected = forward(model.model, TOKENS)
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    for name, point in model.hook_points.items():
        value = expected[name]
        held = None
        if "head" in point.axes:
            served = sorted({head // group for head in (1, 3)})
            held = tuple(served) if point.component in ("k", "rot_k", "v") else (1, 3)
            value = np.take(value, held, axis=point.axes.index("head"))
        assert cache.heads(name) == held, name
        assert cache.records[name][0].heads == held, name
        np.testing.assert_allclose(cache.numpy(name), value, rtol=5e-5, atol=5e-5, err_msg=name)


def test_key_value_heads_come_once_for_all_the_heads_that_they_serve(llama: HookedModel) -> None:
    assert (llama.cfg.n_heads, llama.cfg.n_key_value_heads) == (4, 2)
    _, whole = llama.run_with_cache(TOKENS, "blocks.1.attn.hook_rot_k")
    for heads, held in [([0, 1], (0,)), ([-1], (1,)), (2, (1,)), ([0, 3], (0, 1))]:
        _, cache = llama.run_with_cache(TOKENS, "blocks.1.attn.hook_rot_k", heads=heads)
        assert cache.heads(("rot_k", 1)) == held
        assert equal(cache["rot_k", 1], whole["rot_k", 1][:, :, list(held)])


def test_heads_and_positions_select_together(llama: HookedModel) -> None:
    names = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_z"]
    _, whole = llama.run_with_cache(TOKENS, names)
    _, cache = llama.run_with_cache(TOKENS, names, positions=[2, 5], heads=[0, 2])
    assert equal(cache["pattern", 1], whole["pattern", 1][:, [0, 2]][:, :, [2, 5]])
    assert equal(cache["z", 1], whole["z", 1][:, [2, 5]][:, :, [0, 2]])


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([4], "Heads are 0 to 3, got 4."),
        ([0, -5], "Heads are 0 to 3, got -5."),
        ([], "heads is None, a whole number or a list of them, got []"),
        (True, "got True"),
        ("all", "got 'all'"),
        ([0.5], "got [0.5]"),
    ],
)
def test_heads_that_the_model_does_not_have_are_refused(llama: HookedModel, heads: Any, message: str) -> None:
    with pytest.raises(HookError) as error:
        llama.run_with_cache(TOKENS, heads=heads)
    assert message in str(error.value)


def test_heads_of_a_selection_without_any_are_refused(llama: HookedModel) -> None:
    with pytest.raises(HookError, match="heads selects nothing: hook_embed have no head axis"):
        llama.run_with_cache(TOKENS, "hook_embed", heads=[0])


@pytest.mark.parametrize("selection", [{}, {"positions": [1, 150]}, {"heads": [2]}])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_outside_the_selection_stays_alive(name: str, selection: dict) -> None:
    model = HookedModel(make_model(name))
    tokens = mx.array([[i % 50 for i in range(600)]], mx.int32)
    mx.eval(tokens)
    gc.collect()
    for name, point in model.hook_points.items():
        if point.position_axis is None or point.layer not in (None, 1):
            continue
        chosen = {k: v for k, v in selection.items() if k != "heads" or "head" in point.axes}
        before = mx.get_active_memory()
        _, cache = model.run_with_cache(tokens, name, logits="none", **chosen)
        # MLX lets an array lie in a buffer that is up to 16 kB larger; a whole value is 77 kB or more.
        assert mx.get_active_memory() - before <= cache.nbytes + 17_000, name
        del cache


# Stopping early


@pytest.mark.parametrize("layer", [*range(N_LAYERS + 1), -1, -N_LAYERS])
def test_a_run_stops_before_a_block_with_the_stream_that_enters_it(model: HookedModel, layer: int) -> None:
    _, whole = model.run_with_cache(TOKENS)
    residual, cache = model.run_with_cache(TOKENS, stop_at_layer=layer)
    k = layer % (N_LAYERS + 1) if layer >= 0 else N_LAYERS + layer
    expected = whole["resid_pre", k] if k < N_LAYERS else whole["resid_post", N_LAYERS - 1]
    assert equal(residual, expected)
    names = list(model.hook_points)
    first_left_out = f"blocks.{k}.hook_resid_pre" if k < N_LAYERS else "ln_final.hook_in"
    assert list(cache) == names[: names.index(first_left_out)]
    for name in cache:
        assert equal(cache[name], whole[name]), name


def test_later_layers_are_not_called(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    block_class = type(llama.model.layers[0])
    original = block_class.__call__

    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        called.append(next(i for i, block in enumerate(llama.model.layers) if block is self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(block_class, "__call__", counting)
    monkeypatch.setattr("mlx_hooks.instrument.plan._observing_classes", {})
    llama.run_with_cache(TOKENS, RESIDUAL, stop_at_layer=2)
    assert called == [0, 1]


def test_a_stopped_run_leaves_the_model_plain(llama: HookedModel) -> None:
    classes = [type(module) for _, module in llama.model.named_modules()]
    kernel = mx.fast.scaled_dot_product_attention
    plain = llama.model(mx.array(TOKENS))
    llama.run_with_cache(TOKENS, stop_at_layer=1)
    assert [type(module) for _, module in llama.model.named_modules()] == classes
    assert mx.fast.scaled_dot_product_attention is kernel
    assert equal(llama.model(mx.array(TOKENS)), plain)


def test_a_stopped_run_meets_edits_and_the_hooks_of_a_block(llama: HookedModel) -> None:
    seen: list[str] = []

    def double(value: mx.array, point: HookPoint) -> mx.array:
        seen.append(point.name)
        return value * 2

    with llama.hooks([("hook_embed", double), ("blocks.2.hook_mlp_out", double)]):
        residual, _ = llama.run_with_cache(TOKENS, "hook_embed", stop_at_layer=0)
        whole, _ = llama.run_with_cache(TOKENS, "hook_embed")
    _, plain = llama.run_with_cache(TOKENS, "hook_embed")
    assert equal(residual, plain["embed"] * 2)
    assert whole.shape == (2, 8, 60)
    assert seen == ["hook_embed", "hook_embed", "blocks.2.hook_mlp_out"]


def test_a_hook_that_runs_the_model_itself_does_not_stop_the_run_with_its_own_pass(llama: HookedModel) -> None:
    inner: list[mx.array] = []
    expected, _ = llama.run_with_cache(TOKENS, "hook_embed", stop_at_layer=2)
    plain = llama([[1, 2]])

    def look_aside(value: mx.array, point: HookPoint) -> None:
        if not inner:
            inner.append(value)
            inner.append(llama([[1, 2]]))

    with llama.hooks([("blocks.0.hook_resid_post", look_aside)]):
        residual, _ = llama.run_with_cache(TOKENS, "blocks.1.hook_mlp_out", stop_at_layer=2)
    assert equal(residual, expected)
    assert equal(inner[1], plain)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("blocks.2.hook_resid_post", "stop_at_layer=1 leaves out blocks.2.hook_resid_post: blocks 0 to 0 run"),
        (["hook_embed", "layers_output[1]"], "leaves out blocks.1.hook_resid_post"),
        ([RESIDUAL, "hook_logits"], "leaves out hook_logits"),
        ("blocks.2.*", "leaves out blocks.2.hook_resid_pre, blocks.2.ln1.hook_in, blocks.2.ln1.hook_normalized, ..."),
        ("model.layers.1.mlp.up_proj", "leaves out model.layers.1.mlp.up_proj.output"),
        (lambda name: name == "hook_logits", "leaves out hook_logits"),
        ("model.norm", "Hooks on model.norm.output did not fire"),
    ],
)
def test_points_beyond_the_stop_are_refused(llama: HookedModel, names: Any, message: str) -> None:
    with pytest.raises(HookError) as error:
        llama.run_with_cache(TOKENS, names, stop_at_layer=1)
    assert message in str(error.value)


def test_globs_and_predicates_select_what_is_reached(llama: HookedModel) -> None:
    for names in (RESIDUAL, [RESIDUAL], lambda name: name.endswith("resid_post")):
        _, cache = llama.run_with_cache(TOKENS, names, stop_at_layer=2)
        assert list(cache) == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    _, cache = llama.run_with_cache(TOKENS, "model.layers.1.mlp.up_proj", stop_at_layer=2)
    assert cache["model.layers.1.mlp.up_proj.output"].shape == (2, 8, 48)


def test_a_stop_that_cannot_be_is_refused(llama: HookedModel) -> None:
    kv_cache = make_prompt_cache(llama.model)
    for layer, options, message in [
        (4, {}, "stop_at_layer is -3 to 3, the number of layers, got 4"),
        (-4, {}, "got -4"),
        (True, {}, "stop_at_layer is None or a whole number, got True"),
        (1, {"kv_cache": kv_cache}, "leave kv_cache out"),
        (0, {"chunk": 4}, "leave chunk out"),
    ]:
        with pytest.raises(HookError, match=message):
            llama.run_with_cache(TOKENS, stop_at_layer=layer, **options)
    assert all(entry.offset == 0 for entry in kv_cache)


def test_a_registered_hook_beyond_the_stop_is_not_silence() -> None:
    model = HookedModel(make_model("llama"))
    model.register_activation_hook("2", "residual", "late")
    with pytest.raises(HookError, match="stop_at_layer=1 leaves out blocks.2.hook_resid_post"):
        model.run_with_cache(TOKENS, "hook_embed", stop_at_layer=1)
    model.run_with_cache(TOKENS, "hook_embed", stop_at_layer=3)
    assert model.captured_activations("late")[0].value.shape == (2, 8, 32)


# Estimates


SELECTIONS: list[dict[str, Any]] = [
    {},
    {"names_filter": RESIDUAL},
    {"names_filter": "blocks.1.attn.*", "heads": [0, 3]},
    {"positions": "last", "names_filter": lambda name: name != "hook_pos_embed"},
    {"names_filter": ["blocks.*.attn.hook_pattern", "hook_logits"], "positions": [0, 3], "heads": 1},
    {"names_filter": "model.embed_tokens"},
    {"stop_at_layer": 2},
    {"chunk": 3},
    {"chunk": 3, "names_filter": "blocks.*.attn.*", "positions": [1, 7], "heads": [2], "stop_at_layer": -1},
]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_an_estimate_is_exact(name: str, dtype: mx.Dtype) -> None:
    model = HookedModel(make_model(name, dtype=dtype))
    for options in SELECTIONS:
        if name == "gpt2" and (options.get("names_filter") == "model.embed_tokens" or "chunk" in options):
            # hook_pos_embed has no axis that joins; the model has no embed_tokens.
            continue
        estimate = model.estimate_capture(TOKENS, **options)
        _, cache = model.run_with_cache(TOKENS, **options)
        assert estimate.nbytes == cache.nbytes, options
        by_point = {name: sum(record.nbytes for record in records) for name, records in cache.records.items()}
        assert estimate.by_point == by_point, options
        assert model.estimate_capture((2, 8), **options) == estimate


def test_an_estimate_of_a_quantised_model_is_exact() -> None:
    raw = make_model("llama", dtype=mx.float16)
    nn.quantize(raw, group_size=32, bits=4, class_predicate=lambda _, m: hasattr(m, "to_quantized") and
                m.weight.shape[-1] % 32 == 0)  # fmt: skip
    model = HookedModel(raw)
    assert model.estimate_capture(TOKENS).nbytes == model.run_with_cache(TOKENS)[1].nbytes


def test_an_estimate_leaves_a_kv_cache_where_it_stands(llama: HookedModel) -> None:
    kv_cache = make_prompt_cache(llama.model)
    llama.run_with_cache([[1, 2, 3]], "hook_embed", kv_cache=kv_cache)
    names = ["blocks.*.attn.hook_pattern", RESIDUAL]
    estimate = llama.estimate_capture([[4, 5]], names, kv_cache=kv_cache)
    assert [entry.offset for entry in kv_cache] == [3] * N_LAYERS
    logits, cache = llama.run_with_cache([[4, 5]], names, kv_cache=kv_cache)
    assert estimate.nbytes == cache.nbytes
    assert estimate.by_point["blocks.1.attn.hook_pattern"] == 4 * 2 * 5 * 4
    other = make_prompt_cache(llama.model)
    llama.model(mx.array([[1, 2, 3]]), cache=other)
    assert equal(logits, llama.model(mx.array([[4, 5]]), cache=other))


def test_an_estimate_computes_nothing_and_calls_no_hook(llama: HookedModel) -> None:
    def fail(value: mx.array, point: HookPoint) -> None:
        raise AssertionError("a hook was called")

    gc.collect()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with llama.hooks([("hook_embed", fail)]):
        estimate = llama.estimate_capture((4, 20_000))
    # The patterns alone.
    assert estimate.nbytes > N_LAYERS * 4 * 4 * 20_000**2 * 4
    assert mx.get_peak_memory() - before < 10e6


def test_an_estimate_can_be_read(llama: HookedModel) -> None:
    estimate = llama.estimate_capture((1, 1000), [RESIDUAL, "hook_embed"])
    assert str(estimate).splitlines() == [
        "512.0 kB at 4 hook points",
        "  hook_embed                  1 x 128.0 kB",
        "  blocks.{i}.hook_resid_post  3 x 128.0 kB",
    ]
    for shape in ((0, 5), (1, -1)):
        with pytest.raises(HookError, match="A shape is"):
            llama.estimate_capture(shape)


# Budgets and files


def test_a_capture_over_its_budget_is_refused_before_it_runs(llama: HookedModel) -> None:
    calls: list[int] = []
    nbytes = llama.estimate_capture(TOKENS, RESIDUAL).nbytes
    with llama.hooks([("hook_embed", lambda value, point: calls.append(1))]):
        with pytest.raises(HookError) as error:
            llama.run_with_cache(TOKENS, RESIDUAL, max_bytes=nbytes - 1)
        assert not calls
        _, cache = llama.run_with_cache(TOKENS, RESIDUAL, max_bytes=nbytes)
    assert calls == [1]
    assert cache.nbytes == nbytes
    assert "takes 6,144 bytes, max_bytes is 6,143" in str(error.value)
    assert "spill_to" in str(error.value)
    assert "blocks.{i}.hook_resid_post  3 x 2.0 kB" in str(error.value)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("max_bytes", [None, 0, 5000, 10**9])
def test_what_exceeds_the_budget_is_written_and_read_back_bit_for_bit(
    dtype: mx.Dtype, max_bytes: int | None, tmp_path: Path
) -> None:
    model = HookedModel(make_model("llama", dtype=dtype))
    logits, expected = model.run_with_cache(TOKENS, heads=[1, 2])
    folder = tmp_path / "new" / "capture"
    spilled_logits, cache = model.run_with_cache(TOKENS, heads=[1, 2], max_bytes=max_bytes, spill_to=folder)
    assert equal(spilled_logits, logits)
    assert list(cache) == list(expected)
    assert cache.nbytes == expected.nbytes
    for name in expected:
        assert equal(cache[name], expected[name]), name
        assert cache.heads(name) == expected.heads(name)
        assert list(cache.positions(name)) == list(expected.positions(name))
    stored = [r for records in cache.records.values() for r in records if isinstance(r, StoredActivation)]
    in_memory = cache.nbytes - sum(record.nbytes for record in stored)
    assert in_memory <= (max_bytes or 0)
    files = sorted(folder.glob("*")) if folder.exists() else []
    assert len(files) == len(stored)
    assert bool(stored) == (max_bytes != 10**9)
    assert all(file.suffix == ".safetensors" for file in files)


def test_a_file_says_what_it_holds(llama: HookedModel, tmp_path: Path) -> None:
    llama.run_with_cache([[1, 2, 3]], "blocks.1.attn.hook_v", positions=[0, 2], heads=[3], spill_to=tmp_path)
    (file,) = tmp_path.iterdir()
    _, metadata = mx.load(str(file), return_metadata=True)
    assert file.name == "000000_blocks.1.attn.hook_v.safetensors"
    assert metadata["hook_point"] == "blocks.1.attn.hook_v"
    assert json.loads(metadata["axes"]) == ["batch", "pos", "head", "d_head"]
    assert json.loads(metadata["position_ids"]) == [0, 2]
    assert json.loads(metadata["heads"]) == [1]


def test_spilled_records_are_read_when_asked_and_not_kept(llama: HookedModel, tmp_path: Path) -> None:
    _, cache = llama.run_with_cache(TOKENS, RESIDUAL, spill_to=tmp_path)
    value = cache["resid_post", 1]
    assert value.shape == (2, 8, 32)
    alive = weakref.ref(cache.records["blocks.1.hook_resid_post"][0])
    assert "value" not in alive().__dict__
    (tmp_path / "000001_blocks.1.hook_resid_post.safetensors").unlink()
    with pytest.raises(HookError, match=r"blocks.1.hook_resid_post was spilled to .*, which cannot be read"):
        cache["resid_post", 1]
    assert cache.nbytes == 3 * 2 * 8 * 32 * 4
    assert "safetensors" in repr(alive())


def test_a_folder_that_holds_something_is_not_overwritten(llama: HookedModel, tmp_path: Path) -> None:
    other = tmp_path / "thesis.txt"
    other.write_text("mine")
    with pytest.raises(HookError, match=r"spill_to is a new or empty folder, and .* holds 'thesis.txt'"):
        llama.run_with_cache(TOKENS, RESIDUAL, spill_to=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(HookError, match="cannot be read as one"):
        llama.run_with_cache(TOKENS, RESIDUAL, spill_to=other)
    assert other.read_text() == "mine"
    folder = tmp_path / "capture"
    _, first = llama.run_with_cache(TOKENS, RESIDUAL, spill_to=folder)
    value = first["resid_post", 1]
    with pytest.raises(HookError, match="give another"):
        llama.run_with_cache([[3, 2, 1]], RESIDUAL, spill_to=folder)
    assert equal(first["resid_post", 1], value)


def test_a_run_that_fails_takes_its_files_along(llama: HookedModel, tmp_path: Path) -> None:
    folder = tmp_path / "capture"

    def fail(value: mx.array, point: HookPoint) -> None:
        assert len(list(folder.iterdir())) == 2
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), llama.hooks([("blocks.2.hook_resid_pre", fail)]):
        llama.run_with_cache(TOKENS, RESIDUAL, spill_to=folder)
    assert not folder.exists()


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_none(
    llama: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mx.save_safetensors

    def half(path: str, *rest: Any) -> None:
        real(path, *rest)
        raise RuntimeError("[write] Unable to write: no space left on device")

    monkeypatch.setattr(mx, "save_safetensors", half)
    with pytest.raises(HookError, match=r"hook_embed could not be written to .*no space left"):
        llama.run_with_cache(TOKENS, "hook_embed", spill_to=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_there_under_its_name_before_it_is_whole(
    llama: HookedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = mx.save_safetensors, []

    def watching(path: str, *rest: Any) -> None:
        real(path, *rest)
        seen.append([p.name for p in tmp_path.iterdir()])

    monkeypatch.setattr(mx, "save_safetensors", watching)
    llama.run_with_cache(TOKENS, "hook_embed", spill_to=tmp_path)
    assert [[is_temporary(name) for name in names] for names in seen] == [[True]]


@pytest.mark.parametrize("budget", [-1, 1.5, True, "1 GB"])
def test_a_budget_that_is_no_number_of_bytes_is_refused(llama: HookedModel, budget: Any) -> None:
    with pytest.raises(HookError, match="max_bytes is None or a whole number of bytes from 0 up"):
        llama.run_with_cache(TOKENS, max_bytes=budget)


def test_a_spilled_pass_never_holds_more_than_its_budget_and_a_record(llama: HookedModel, tmp_path: Path) -> None:
    tokens = mx.array([[i % 50 for i in range(600)]])
    names = ["blocks.*.attn.hook_pattern", "blocks.*.attn.hook_attn_scores"]
    mx.eval(tokens)
    one = 4 * 600 * 600 * 4

    def peak(**options: Any) -> int:
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        llama.run_with_cache(tokens, names, **options)
        return mx.get_peak_memory() - before

    in_memory = peak()
    spilled = peak(spill_to=tmp_path / "a")
    assert in_memory > 6 * one
    # A record, the kernel's own scores, and what softmax and masking need beside them.
    assert spilled < 5 * one


# Long inputs


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_chunks_equal_one_pass(name: str, chunk: int) -> None:
    model = HookedModel(make_model(name))
    logits, whole = model.run_with_cache(TOKENS)
    chunked_logits, cache = model.run_with_cache(TOKENS, chunk=chunk, logits="all")
    np.testing.assert_allclose(np.array(chunked_logits), np.array(logits), rtol=2e-5, atol=2e-5)
    assert list(cache) == list(whole)
    for key in whole:
        assert len(cache.records[key]) == -(-8 // chunk)
        assert cache.positions(key) == whole.positions(key)
        np.testing.assert_allclose(cache.numpy(key), whole.numpy(key), rtol=2e-5, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("positions", ["last", [6, 1, -3], slice(2, 7, 2), 4])
def test_positions_of_the_whole_input_are_kept_in_chunks(llama: HookedModel, positions: Any) -> None:
    names = ["blocks.1.attn.hook_pattern", RESIDUAL]
    _, whole = llama.run_with_cache(TOKENS, names)
    _, cache = llama.run_with_cache(TOKENS, names, positions=positions, chunk=3)
    every = list(range(8))
    wanted = {"last": [7]}.get(positions) if isinstance(positions, str) else None
    if wanted is None:
        wanted = every[positions] if isinstance(positions, slice) else sorted(np.atleast_1d(positions) % 8)
    assert list(cache.positions(("resid_post", 1))) == list(wanted)
    np.testing.assert_allclose(cache.numpy(("resid_post", 1)), whole.numpy(("resid_post", 1))[:, wanted], atol=2e-5)
    pattern = cache.numpy(("pattern", 1))
    np.testing.assert_allclose(
        pattern, whole.numpy(("pattern", 1))[:, :, wanted, : pattern.shape[-1]], rtol=2e-5, atol=2e-5
    )


def test_chunks_continue_a_kv_cache(llama: HookedModel) -> None:
    _, whole = llama.run_with_cache(TOKENS, RESIDUAL)
    kv_cache = make_prompt_cache(llama.model)
    llama.run_with_cache([row[:3] for row in TOKENS], "hook_embed", kv_cache=kv_cache)
    _, cache = llama.run_with_cache([row[3:] for row in TOKENS], RESIDUAL, kv_cache=kv_cache, chunk=2)
    assert list(cache.positions(("resid_post", 2))) == [3, 4, 5, 6, 7]
    assert kv_cache[0].offset == 8
    np.testing.assert_allclose(cache.numpy(("resid_post", 2)), whole.numpy(("resid_post", 2))[:, 3:], atol=2e-5)
    kv_cache = make_prompt_cache(llama.model)
    llama.run_with_cache([row[:3] for row in TOKENS], "hook_embed", kv_cache=kv_cache)
    rest = [row[3:] for row in TOKENS]
    _, cache = llama.run_with_cache(rest, RESIDUAL, positions=[-1, 4], kv_cache=kv_cache, chunk=2)
    assert list(cache.positions(("resid_post", 2))) == [4, 7]
    np.testing.assert_allclose(cache.numpy(("resid_post", 2)), whole.numpy(("resid_post", 2))[:, [4, 7]], atol=2e-5)


def test_chunks_stop_at_a_layer(llama: HookedModel) -> None:
    residual, _ = llama.run_with_cache(TOKENS, RESIDUAL, stop_at_layer=2)
    last, cache = llama.run_with_cache(TOKENS, RESIDUAL, stop_at_layer=2, chunk=3)
    assert list(cache) == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    np.testing.assert_allclose(cache.numpy(("resid_post", 1)), np.array(residual), atol=2e-5)
    np.testing.assert_allclose(np.array(last), np.array(residual[:, -1:]), atol=2e-5)


@pytest.mark.parametrize("name", ["mamba", "qwen3_next", "jamba"])
@pytest.mark.parametrize("stop_at_layer", [None, 1])
def test_chunks_of_a_state_space_model_know_where_they_stand(name: str, stop_at_layer: int | None) -> None:
    model, tokens, point = HookedModel(tiny_model(name)), TOKENS[:1], "blocks.0.hook_resid_post"
    _, whole = model.run_with_cache(tokens, point, chunk=3, stop_at_layer=stop_at_layer)
    assert [list(r.position_ids) for r in whole.records[point]] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    for positions in ([7], [1, 7], "last"):
        _, cache = model.run_with_cache(tokens, point, positions, chunk=3, stop_at_layer=stop_at_layer)
        kept = [1, 7] if positions == [1, 7] else [7]
        assert list(cache.positions(point)) == kept
        np.testing.assert_array_equal(cache.numpy(point), whole.numpy(point)[:, kept])
    kv_cache = make_prompt_cache(model.model)
    model.run_with_cache(tokens, point, [0], kv_cache, chunk=3)
    _, more = model.run_with_cache(tokens, point, kv_cache=kv_cache)
    assert list(more.positions(point)) == list(range(8, 16))


def test_logits_of_all_positions_of_the_last_or_of_none(llama: HookedModel) -> None:
    logits = llama(TOKENS)
    for chunk in (None, 3):
        for which, rows in [("all", 8), ("last", 1), ("none", 0), (None, 1 if chunk else 8)]:
            got, _ = llama.run_with_cache(TOKENS, "hook_embed", logits=which, chunk=chunk)
            assert got.shape == (2, rows, 60)
            np.testing.assert_allclose(np.array(got), np.array(logits[:, 8 - rows :]), atol=2e-5)
    with pytest.raises(HookError, match="logits is None, 'all', 'last' or 'none', got 'first'"):
        llama.run_with_cache(TOKENS, logits="first")


@pytest.mark.parametrize("chunk", [0, -1, 2.0, True])
def test_a_chunk_that_is_no_number_of_tokens_is_refused(llama: HookedModel, chunk: Any) -> None:
    with pytest.raises(HookError, match="chunk is None or a whole number of tokens from 1 up"):
        llama.run_with_cache(TOKENS, chunk=chunk)


def test_registered_hooks_record_every_chunk(tmp_path: Path) -> None:
    model = HookedModel(make_model("llama"))
    model.register_activation_hook("1", "residual", "mid")
    model.run_with_cache(TOKENS, "hook_embed", chunk=3, spill_to=tmp_path)
    assert [record.positions for record in model.captured_activations("mid")] == [(0, 3), (3, 6), (6, 8)]
    model.run_with_cache(TOKENS, "hook_embed")
    assert [record.positions for record in model.captured_activations("mid")] == [(0, 8)]


def test_a_long_capture_to_files_runs_in_flat_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    length, chunk = 20_000, 500
    small = {"num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 16}
    model = HookedModel(make_model(CONFIGS["llama"] | small))
    tokens = mx.array(np.random.default_rng(0).integers(0, 60, (1, length)))
    names = [RESIDUAL, "blocks.*.hook_mlp_out", "blocks.*.attn.hook_z"]
    kv_cache = make_prompt_cache(model.model)
    above_kv: list[int] = []
    keep = SpillFolder.keep

    def measuring(self: SpillFolder, record: Any) -> Any:
        if record.hook_point.name == "blocks.0.hook_resid_post":
            kv = sum(entry.nbytes for entry in kv_cache)
            above_kv.append(mx.get_active_memory() - kv)
        return keep(self, record)

    monkeypatch.setattr(SpillFolder, "keep", measuring)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    gc.collect()
    _, cache = model.run_with_cache(tokens, names, kv_cache=kv_cache, chunk=chunk, spill_to=tmp_path)
    assert cache.nbytes == 6 * length * 16 * 4
    assert cache.positions(("resid_post", 1)) == range(length)
    third = len(above_kv) // 3
    first, last = max(above_kv[1:third]), max(above_kv[-third:])
    # Held in memory, the last third would stand 5 MB higher; one chunk's records are 0.2 MB.
    assert last - first < 0.3e6
    # What was read at random equals a pass that knows nothing of files.
    _, part = model.run_with_cache(tokens[:, :1000], RESIDUAL, chunk=chunk)
    np.testing.assert_allclose(cache.numpy(("resid_post", 1))[:, :1000], part.numpy(("resid_post", 1)), atol=2e-5)


@pytest.mark.parametrize("name", ["phi3", "openelm", "jamba", "lfm2", "gpt_oss"])
def test_views_of_what_is_not_kept_are_not_kept_alive(name: str) -> None:
    model = HookedModel(tiny_model(name))
    points = [n for n in model.hook_points if n.endswith(("mlp.hook_pre", "mixer.hook_state", "hook_sink"))]
    heads = [0] if any(n.endswith("hook_sink") for n in points) else None
    tokens = [[i % 90 for i in range(200)]]
    model.run_with_cache(tokens, points, heads=heads)
    mx.clear_cache()
    before = mx.get_active_memory()
    _, cache = model.run_with_cache(tokens, points, heads=heads, logits="none")
    mx.clear_cache()
    held = mx.get_active_memory() - before
    # Buffers are rounded up to pages.
    assert held <= cache.nbytes + 17_000 * len(points), (held, cache.nbytes)


def test_stopping_after_the_last_layer_answers_the_last_pass() -> None:
    model = HookedModel(tiny_model("nanbeige"))
    residual, _ = model.run_with_cache([[1, 2, 3]], "blocks.0.hook_resid_post", stop_at_layer=model.cfg.n_layers)
    logits, _ = model.run_with_cache([[1, 2, 3]], "hook_embed")
    assert mx.array_equal(model.unembed(residual), logits)


def test_positions_in_a_list_may_count_from_the_end(llama: HookedModel) -> None:
    tokens = [list(range(10))]
    _, cache = llama.run_with_cache(tokens, "hook_embed", positions=[0, 4, -1])
    assert list(cache.positions("hook_embed")) == [0, 4, 9]
    with pytest.raises(HookError, match=r"Positions \[100\] are outside the 10 tokens"):
        llama.run_with_cache(tokens, "hook_embed", positions=[0, 100])


def test_a_state_space_cache_may_be_filled_estimated_and_copied() -> None:
    model = HookedModel(tiny_model("mamba"))
    kv_cache = make_prompt_cache(model.model)
    model([[1, 2, 3]], kv_cache)
    assert model.estimate_capture([[3]], "hook_embed", kv_cache=kv_cache).nbytes == 256
    again = copy.deepcopy(kv_cache)
    _, cache = model.run_with_cache([[4]], "hook_embed", kv_cache=kv_cache, max_bytes=10**6)
    assert cache.records["hook_embed"][0].positions == (3, 4)
    assert model.run_with_cache([[4]], "hook_embed", kv_cache=again)[1].records["hook_embed"][0].positions == (3, 4)
    unseen = make_prompt_cache(model.model)
    model.model(mx.array([[1, 2]]), cache=unseen)
    with pytest.raises(HookError, match="How many positions this state-space cache covers is not known"):
        model.run_with_cache([[3]], "hook_embed", kv_cache=unseen)


def test_a_model_that_does_not_run_here_loads_with_a_warning() -> None:
    if mx.metal.is_available():
        pytest.skip("there it runs")
    with pytest.warns(UntrustedHookWarning, match="the plain model runs"):
        HookedModel(tiny_model("qwen3_next", dtype=mx.bfloat16))


@pytest.mark.parametrize("folder", ["", 3])
def test_what_is_no_folder_is_refused(llama: HookedModel, folder: Any) -> None:
    with pytest.raises(HookError, match="spill_to is the path of a new or empty folder"):
        llama.run_with_cache([[1]], "hook_embed", spill_to=folder)
