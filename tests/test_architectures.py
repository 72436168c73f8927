"""Every mlx-lm architecture passes the self-test, and the table of what can be hooked says what is so."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from every_architecture import DOCUMENT, IS_OLDER, NEED_METAL, OLDER

from mlx_hooks import CapturedActivation, HookedModel, HookError, UntrustedHookWarning
from mlx_hooks.attention import KeyPositions
from mlx_hooks.coverage.configurations import CONFIGURATIONS, VARIANTS
from mlx_hooks.coverage.models import architectures, tiny_model
from mlx_hooks.coverage.table import ATTENTION, REST, STREAM, document, note_row, survey, table_row
from mlx_hooks.generation import Sampling, generate_steps
from mlx_hooks.instrument.taps import Tap

if IS_OLDER:
    pytest.skip(OLDER, allow_module_level=True)


def test_every_architecture_of_mlx_lm_has_a_tiny_configuration() -> None:
    assert set(architectures()) == set(CONFIGURATIONS)
    assert len(CONFIGURATIONS) > 120
    assert {name.partition("/")[0] for name in VARIANTS} <= set(CONFIGURATIONS)


@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
def test_an_architecture_passes_the_selftest_and_stands_in_the_table(name: str) -> None:
    if name in NEED_METAL and not mx.metal.is_available():
        pytest.skip(f"{name} calls a Metal kernel")
    found = survey(name)
    assert found.report is not None
    assert found.passed, str(found.report)
    assert len(found.report.checks) >= (5 if name == "olmo" else 10)
    lines = DOCUMENT.read_text().splitlines()
    if not mx.metal.is_available():
        for row in [*(table_row(found, columns) for columns in (STREAM, ATTENTION, REST)), note_row(found)]:
            assert row in lines, f"docs/architectures.md is out of date: neuroscope coverage -o {DOCUMENT.name}"


@pytest.mark.skipif(mx.metal.is_available(), reason="the table was written on the CPU build")
def test_the_table_is_the_one_that_the_command_writes() -> None:
    assert document(survey(name) for name in architectures()) == DOCUMENT.read_text()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_passes_the_selftest(name: str) -> None:
    report = HookedModel(tiny_model(name)).selftest()
    assert report.passed, str(report)


@pytest.mark.parametrize("name", sorted([*CONFIGURATIONS, *VARIANTS]))
def test_what_is_selected_is_a_part_of_the_whole_capture(name: str) -> None:
    if name in NEED_METAL and not mx.metal.is_available():
        pytest.skip(f"{name} calls a Metal kernel")
    model, prompt = HookedModel(tiny_model(name)), [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
    limits: list[dict] = [{}, {"positions": "last"}, {"positions": [1, 9, 12]}, {"reduce": "last"}, {"reduce": "mean"}]
    hooks = [{"hook_point": "blocks.*.hook_resid_post", "hook_id": str(i)} | more for i, more in enumerate(limits)]

    def captured(hook: dict) -> list[CapturedActivation]:
        # mlx-lm's own olmo runs on single tokens only.
        chunk = 1 if name == "olmo" else 4
        options: dict = {"max_tokens": 3, "sampling": Sampling(), "stop": [], "prefill_step_size": chunk}
        steps = generate_steps(model.instrument, None, prompt, plan=model.resolve_hooks([hook]), **options)
        return [record for step in steps for record in step.activations[hook["hook_id"]]]

    # Each alone: passes in which none is due are attached without any.
    whole, last, some, last_rows, means = map(captured, hooks)
    assert [record.step for record in whole[:: len(whole) // 3]] == [0, 1, 2]

    def compare(got: list[CapturedActivation], kept: list[list[int]], reduced: bool = False) -> None:
        expected = [(record, positions) for record, positions in zip(whole, kept, strict=True) if positions]
        assert [list(record.position_ids) for record in got] == [positions for _, positions in expected]
        for record, (source, positions) in zip(got, expected, strict=True):
            axis = source.hook_point.position_axis
            assert axis is not None
            rows = np.take(source.numpy(), [p - source.positions[0] for p in positions], axis=axis)
            np.testing.assert_array_equal(record.numpy(), rows.take(0, axis) if reduced else rows)

    ids = [list(record.position_ids) for record in whole]
    compare(last, [positions[-1:] for positions in ids])
    compare(some, [[p for p in positions if p in (1, 9, 12)] for positions in ids])
    compare(last_rows, [positions[-1:] for positions in ids], reduced=True)
    for mean, source in zip(means, whole, strict=True):
        expected = source.numpy().astype(np.float64).mean(axis=source.hook_point.position_axis)
        assert list(mean.position_ids) == list(source.position_ids)
        np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(mx.metal.is_available(), reason="there it runs")
def test_a_model_that_needs_metal_loads_with_a_warning_and_says_what_is_missing() -> None:
    with pytest.warns(UntrustedHookWarning, match="bitnet: the plain model runs does not hold"):
        model = HookedModel(tiny_model("bitnet"))
    report = model.selftest()
    assert not report.passed
    assert "No Metal back-end" in report.checks[0].why
    assert report.untrusted == list(model.hook_points)


def test_a_hook_point_that_cannot_be_shown_says_why() -> None:
    model = HookedModel(tiny_model("deepseek_v41"))
    with pytest.raises(HookError, match="no blocks.0.attn.hook_pattern.*each query attends to rows gathered for it"):
        model.run_with_cache([[1, 2]], "blocks.0.attn.hook_pattern")
    with pytest.raises(HookError, match="no blocks.0.attn.hook_pattern.*rows gathered for it"):
        model.generate([1], max_tokens=0, capture=[{"layer_name": "0", "component": "attention_pattern"}])


def test_layers_that_run_twice_say_which_pass() -> None:
    model = HookedModel(tiny_model("nanbeige"))
    _, cache = model.run_with_cache([[1, 2, 3]], "blocks.*.hook_resid_*")
    records = cache.records["blocks.0.hook_resid_pre"]
    assert [record.pass_index for record in records] == [0, 1]
    with pytest.raises(
        HookError, match=r"ran 2 times in one forward pass: read cache.of_pass\(0\) to cache.of_pass\(1\)"
    ):
        cache["resid_pre", 0]
    second = cache.of_pass(1)
    assert mx.array_equal(second["resid_pre", 0], records[1].value)
    # The last norm stands between the passes.
    norm = model.model.model.norm
    assert mx.array_equal(second["resid_pre", 0], norm(cache.of_pass(0)["resid_post", model.cfg.n_layers - 1]))
    with pytest.raises(HookError, match="no pass 2: passes are 0, 1"):
        cache.of_pass(2)


def test_passes_stay_apart_in_generation() -> None:
    model = HookedModel(tiny_model("nanbeige"))
    result = model.generate([1, 2, 3, 4], max_tokens=3, capture=["blocks.1.hook_resid_post"])
    expected = model.run_with_cache([[1, 2, 3, 4, *result.tokens[:-1]]], "blocks.1.hook_resid_post")[1]
    for index in (0, 1):
        ours, full = result.cache.of_pass(index)["resid_post", 1], expected.of_pass(index)["resid_post", 1]
        assert mx.allclose(ours, full, atol=1e-4)


def test_the_selftest_reports_an_identity_that_does_not_hold() -> None:
    model = HookedModel(tiny_model("llama"))
    report = model.selftest()
    assert report.passed
    assert report.untrusted == []
    assert "z = pattern @ v" in str(report)
    assert all(check.compared for check in report.checks)

    kernel = mx.fast.scaled_dot_product_attention
    try:
        mx.fast.scaled_dot_product_attention = lambda q, k, v, **options: kernel(q, k, v, **options) * 1.01
        broken = model.selftest()
    finally:
        mx.fast.scaled_dot_product_attention = kernel
    failed = [check.name for check in broken.checks if not check.passed]
    assert failed[0] == "z = pattern @ v"
    assert "an edit that puts back the pattern or scores changes nothing" in failed
    assert "pattern = softmax(scores)" not in failed
    assert "blocks.0.attn.hook_pattern" in broken.untrusted
    assert broken.to_dict()["passed"] is False


@pytest.mark.parametrize("name", ["laguna", "gpt_oss", "deepseek_v3", "gemma2", "plamo", "llama"])
def test_the_heads_that_are_kept_are_each_layers_own(name: str) -> None:
    model = HookedModel(tiny_model(name))
    names = [n for n, p in model.hook_points.items() if "head" in p.axes]
    tokens = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    _, whole = model.run_with_cache(tokens, names)
    _, some = model.run_with_cache(tokens, names, heads=[1, 3])
    for point in names:
        axes = model.hook_points[point].axes
        held = some.heads(point)
        assert held is not None
        taken = mx.take(whole[point], mx.array(held), axis=axes.index("head"))
        assert mx.allclose(some[point], taken, rtol=1e-5, atol=1e-6), point
        assert some[point].shape == taken.shape
    if name == "laguna":
        # Its layers have 4 and 6 heads.
        assert model.hook_points["blocks.1.attn.hook_z"].sizes == (None, None, 6, 32)
        _, last = model.run_with_cache(tokens, "blocks.1.attn.hook_pattern", heads=5)
        assert mx.allclose(last["pattern", 1][:, 0], whole["pattern", 1][:, 5], atol=1e-6)
        with pytest.raises(HookError, match="Heads are 0 to 3, got 5"):
            model.run_with_cache(tokens, "blocks.*.attn.hook_pattern", heads=5)


def test_sizes_are_those_of_the_values() -> None:
    for name in ("openelm", "gemma3n", "mixtral", "mamba"):
        model = HookedModel(tiny_model(name))
        _, cache = model.run_with_cache([[1, 2, 3]])
        for point in model.hook_points.values():
            shape = cache.records[point.name][0].value.shape
            assert len(point.sizes) in (0, len(shape))
            assert all(size in (None, real) for size, real in zip(point.sizes, shape, strict=False)), point
        assert model.hook_points["blocks.0.hook_resid_post"].size("d_model") == model.cfg.d_model


# The CPU build multiplies quantised weights in half precision number by number: not every type has every combination.
IN_FULL = ["llama", "gemma2"]
QUANTISED = [
    *((name, dtype, bits) for name in IN_FULL for dtype in (mx.float32, mx.bfloat16, mx.float16) for bits in (4, 8)),
    *(
        (name, dtype, bits)
        for name in ("gemma3", "qwen3_next", "mixtral", "deepseek_v3", "gpt_oss", "mamba2")
        for dtype, bits in ((mx.float32, 4), (mx.bfloat16, 8))
    ),
    ("mamba2", mx.float16, 4),
    ("mixtral", mx.float16, 4),
]


@pytest.mark.parametrize(("name", "dtype", "bits"), QUANTISED, ids=str)
def test_a_quantised_model_of_any_type_passes_the_selftest(name: str, dtype: mx.Dtype, bits: int) -> None:
    raw = tiny_model(name, dtype=dtype)
    nn.quantize(raw, group_size=32, bits=bits)
    report = HookedModel(raw).selftest()
    assert report.passed, str(report)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gemma3", "cohere", "granite", "mamba2", "qwen3_next/dense", "phi3small"]
)
def test_a_model_in_half_precision_passes_the_selftest(name: str, dtype: mx.Dtype) -> None:
    changes = {"mlp_only_layers": [0, 1, 2, 3]} if name == "qwen3_next/dense" else {}
    report = HookedModel(tiny_model(name.partition("/")[0], dtype=dtype, **changes)).selftest()
    assert report.passed, str(report)


def test_layernorm_means_the_norms_that_a_block_has() -> None:
    def captured(name: str, layer_name: str) -> list[str]:
        model = HookedModel(tiny_model(name))
        plan = model.resolve_hooks([{"layer_name": layer_name, "component": "layernorm"}])
        return [capture.point.name.split(".")[2] for capture in plan.captures]

    assert captured("gemma2", "transformer.h.1") == ["ln1", "ln1_post", "ln2", "ln2_post"]
    assert captured("olmo2", "1") == ["ln1_post", "ln2_post"]
    assert captured("cohere", "1") == ["ln1"]
    # The architecture's own name for a norm counts; llama's stands for the norm before the MLP elsewhere.
    assert captured("gemma2", "model.layers.1.post_attention_layernorm") == ["ln1_post"]
    assert captured("gemma2", "model.layers.1.pre_feedforward_layernorm") == ["ln2"]
    assert captured("glm4", "model.layers.1.post_attention_layernorm") == ["ln2"]
    assert captured("gpt2", "model.layers.1.post_attention_layernorm") == ["ln2"]
    with pytest.raises(HookError, match="nanochat has no blocks.0.ln1.hook_normalized"):
        captured("nanochat", "0")


def test_streams_of_several_are_found_by_layer_and_component() -> None:
    for name, shape in (("gemma3n", (3, 1, 2, 64)), ("deepseek_v41", (1, 2, 3, 64))):
        model = HookedModel(tiny_model(name))
        result = model.generate([1, 2], max_tokens=0, capture=[{"layer_name": "0", "component": "residual"}])
        (record,) = result.activations["0_residual"]
        assert record.value.shape == shape
        assert record.hook_point.axes[record.value.shape.index(2)] == "pos"


def ignore_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tap, "edit_value", lambda self, value: (setattr(self, "fired", True), (value, False))[1])


def forget_the_order_of_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    def in_order(cls: type, cache: object, n_keys: int, total: int) -> KeyPositions:
        return cls(None if n_keys == total else np.arange(total - n_keys, total), total)

    monkeypatch.setattr(KeyPositions, "of", classmethod(in_order))


def show_other_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Tap.read_rows

    def halved(self: Tap, value: mx.array, computed: list[int] | None) -> None:
        original(self, value / 2 if self.point.component == "attn_scores" else value, computed)

    monkeypatch.setattr(Tap, "read_rows", halved)


@pytest.mark.parametrize(
    ("name", "fault", "identity"),
    [
        ("llama", ignore_edits, "an edit that changes a value changes the logits"),
        ("llama", show_other_scores, "pattern = softmax(scores)"),
        ("gemma3_text", forget_the_order_of_a_ring, "decoding past a rotating KV cache: z = pattern @ v"),
    ],
)
def test_the_selftest_sees_a_fault_of_the_engine(
    name: str, fault: Callable, identity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The window is wider than what the self-test reads.
    model = HookedModel(tiny_model(name, **({"sliding_window": 512} if name == "gemma3_text" else {})))
    assert model.selftest().passed
    fault(monkeypatch)
    failed = [check.name for check in model.selftest().checks if not check.passed]
    assert any(check.startswith(identity) for check in failed), failed
