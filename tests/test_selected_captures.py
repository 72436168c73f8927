"""Captures of some positions and heads are slices of the whole capture; reduced ones are recomputed in float64.

Bit for bit, but for attention scores and what is made of them: of some rows only they are another matrix product, and a
BLAS may choose another order of additions for its shape. There the tolerance is ROUNDING.
"""

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from tiny_models import N_LAYERS, make_model

from mlx_hooks import (
    CapturedActivation,
    GenerationResult,
    HookedModel,
    HookError,
    HookSpec,
    InferenceHook,
    UnknownHookError,
)
from mlx_hooks.activations import join
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.generation import Sampling, collect, generate_steps
from mlx_hooks.hook_points import HookPoint
from mlx_hooks.hooks import Hook
from mlx_hooks.instrument import attending
from mlx_hooks.reductions import REDUCTIONS, Projection, check_reducible

PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
"""11 tokens: longer than the sliding windows, which are 8."""
MAX_TOKENS = 4
LONG_PROMPT = [3 + 7 * i * i % 53 for i in range(44)]
"""Long enough for products of rows to be computed in blocks."""
LAST = len(PROMPT) + MAX_TOKENS - 2
"""The last position that the model reads."""
SELECTIONS: list[Any] = ["last", 4, [1, 5, 12], [LAST], slice(2, 6), {"start": 9}, {"stop": 3}, slice(10, 12)]
ARCHITECTURES = [
    *("gpt2", "llama", "gemma3_text", "mixtral", "gpt_oss", "deepseek_v3"),
    *("mamba", "mamba2", "rwkv7"),
]
"""Learned positions, grouped queries, sliding windows, experts, sinks, latent attention, and none at all."""
OF_ROWS = ("attn_scores", "pattern", "sink")
"""What is computed for the rows that are kept only."""
ROUNDING = 1e-5
"""Relative and absolute: float32 products of 16 to 64 terms of size 1, added in another order."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> HookedModel:
    return HookedModel(tiny_model(request.param))


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    """Four query heads, two key-value heads."""
    return HookedModel(make_model("llama"))


class SilentDetokenizer:
    """A tokenizer's that spells nothing."""

    last_segment = ""

    def add_token(self, token: int) -> None:
        pass

    def finalize(self) -> None:
        pass


def generate(
    model: HookedModel, capture: Iterable[Any], chunk: int = 2048, prompt: Sequence[int] = PROMPT, **options: Any
) -> GenerationResult:
    """Generate, the prompt in chunks of ``chunk`` tokens."""
    asked = {"max_tokens": MAX_TOKENS, "sampling": Sampling(), "stop": [], "prefill_step_size": chunk} | options
    steps = generate_steps(model.instrument, None, prompt, plan=model.resolve_hooks(capture), **asked)
    return collect(prompt, steps, model.hook_points)


def everywhere(model: HookedModel, **limits: Any) -> list[dict[str, Any]]:
    """A hook at every point that runs over positions, under the point's name."""
    return [
        {"hook_point": name} | limits for name, point in model.hook_points.items() if point.position_axis is not None
    ]


def at(selection: Any, ids: Iterable[int], of_prompt: bool) -> list[int]:
    """What a selection means of a record's positions, from its definition."""
    if selection == "last":
        return [p for p in ids if p == len(PROMPT) - 1] if of_prompt else list(ids)
    if isinstance(selection, dict):
        selection = slice(selection.get("start"), selection.get("stop"))
    if isinstance(selection, slice):
        return [p for p in ids if p in range(1000)[selection]]
    return [p for p in ids if p in np.atleast_1d(selection)]


def rows_of(record: CapturedActivation, positions: list[int]) -> np.ndarray:
    """Rows of a record of consecutive positions."""
    axis = record.hook_point.position_axis
    assert axis is not None
    return np.take(record.numpy(), [p - record.positions[0] for p in positions], axis=axis)


def assert_same(got: np.ndarray, expected: np.ndarray, point: HookPoint, rows: bool = True) -> None:
    """Bit for bit, or within ROUNDING where ``rows`` were selected of something that is computed for these alone."""
    if rows and point.component in OF_ROWS:
        np.testing.assert_allclose(got, expected, rtol=ROUNDING, atol=ROUNDING, err_msg=point.name)
    else:
        np.testing.assert_array_equal(got, expected, err_msg=point.name)


def assert_selected(part: GenerationResult, whole: GenerationResult, selection: Any = None) -> None:
    """Each record is what a selection of positions (None: all), and the record's heads, are of the whole one."""
    for name, full in whole.activations.items():
        kept = [(r, list(r.position_ids)) for r in full]
        if selection is not None:
            kept = [(r, at(selection, positions, r.phase == "prefill")) for r, positions in kept]
        kept = [(record, positions) for record, positions in kept if positions]
        got = part.activations[name]
        assert [(r.phase, r.step, list(r.position_ids)) for r in got] == [(r.phase, r.step, p) for r, p in kept], name
        for record, (source, positions) in zip(got, kept, strict=True):
            expected = rows_of(source, positions)
            if record.heads is not None:
                expected = np.take(expected, record.heads, axis=source.hook_point.axes.index("head"))
            assert_same(record.numpy(), expected, source.hook_point, rows=selection is not None)


@pytest.mark.parametrize("chunk", [2048, 3])
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_selected_positions_are_rows_of_the_whole_capture(model: HookedModel, selection: Any, chunk: int) -> None:
    whole = generate(model, everywhere(model), chunk)
    part = generate(model, everywhere(model, positions=selection), chunk)
    assert part.tokens == whole.tokens
    assert_selected(part, whole, selection)


@pytest.mark.parametrize("heads", [0, [3, 1], [-1]], ids=str)
def test_selected_heads_are_those_of_the_whole_capture(model: HookedModel, heads: Any) -> None:
    whole = generate(model, everywhere(model), chunk=3)
    points = [point for point in model.hook_points.values() if "head" in point.axes and point.position_axis is not None]
    part = generate(model, [{"hook_point": p.name, "positions": [2, 12], "heads": heads} for p in points], chunk=3)
    for point in points:
        n_query = model.architecture.n_query_heads(point.layer)
        for record, source in zip(part.activations[point.name], kept(whole, point.name, [2, 12]), strict=True):
            axis = point.axes.index("head")
            n_heads = source.value.shape[axis]
            held = sorted({h % n_query * n_heads // n_query for h in np.atleast_1d(heads).tolist()})
            assert record.heads == tuple(held)
            rows = rows_of(source, [p for p in (2, 12) if p in source.position_ids])
            assert_same(record.numpy(), np.take(rows, held, axis=axis), point)


def kept(result: GenerationResult, name: str, positions: list[int]) -> list[CapturedActivation]:
    """The records that hold one of the positions."""
    return [r for r in result.activations[name] if set(positions) & set(r.position_ids)]


@pytest.mark.parametrize(("seed", "chunk"), [(0, 2048), (1, 7)])
def test_selections_at_random_of_a_longer_prompt(model: HookedModel, seed: int, chunk: int) -> None:
    rng = np.random.default_rng(seed)
    whole = generate(model, everywhere(model), chunk, LONG_PROMPT)
    n_heads = min(model.architecture.n_query_heads(layer) or 1 for layer in range(model.cfg.n_layers))
    for which in ("rows", "heads", "both"):
        rows = sorted(rng.choice(len(LONG_PROMPT) + 2, rng.integers(1, 19), replace=False).tolist())
        heads = rng.choice(n_heads, rng.integers(1, n_heads + 1), replace=False).tolist()
        positions = None if which == "heads" else rows
        hooks = everywhere(model, positions=positions)
        for hook in hooks:
            if which != "rows" and "head" in model.hook_points[hook["hook_point"]].axes:
                hook["heads"] = heads
        assert_selected(generate(model, hooks, chunk, LONG_PROMPT), whole, positions)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "deepseek_v3"])
def test_one_pass_keeps_the_same_selection(name: str) -> None:
    model, rng = HookedModel(tiny_model(name)), np.random.default_rng(2)
    names = [point.name for point in model.hook_points.values() if "head" in point.axes]
    _, whole = model.run_with_cache(LONG_PROMPT, names)
    for n_rows in (1, 5, 18):
        rows = sorted(rng.choice(len(LONG_PROMPT), n_rows, replace=False).tolist())
        for limits in ({"positions": rows}, {"heads": [3, 1]}, {"positions": rows, "heads": [0, 3]}):
            _, part = model.run_with_cache(LONG_PROMPT, names, **limits)
            for point in map(model.hook_points.__getitem__, names):
                ((record,), (source,)) = part.records[point.name], whole.records[point.name]
                expected = rows_of(source, limits.get("positions", list(source.position_ids)))
                if "heads" in limits:
                    expected = np.take(expected, record.heads, axis=point.axes.index("head"))
                assert_same(record.numpy(), expected, point, rows="positions" in limits)


def test_selection_takes_memory_of_its_own_only(llama: HookedModel) -> None:
    hooks = [{"layer_name": "*", "component": "attention_pattern", "positions": "last", "heads": [2]}]
    result = generate(llama, hooks)
    (records,) = result.activations.values()
    lengths = range(len(PROMPT), len(PROMPT) + MAX_TOKENS)
    assert sorted(record.nbytes for record in records) == sorted(4 * n for n in lengths for _ in range(N_LAYERS))


def test_what_is_not_selected_does_not_stay_alive() -> None:
    model, prompt = HookedModel(make_model("llama")), [i % 60 for i in range(400)]

    def grown(**limits: Any) -> int:
        mx.synchronize()
        before = mx.get_active_memory()
        result = model.generate(prompt, max_tokens=2, capture=everywhere(model, **limits))
        mx.synchronize()
        assert result.activations
        return mx.get_active_memory() - before

    whole, last, two = grown(), grown(positions="last"), grown(positions=[5, 200])
    assert whole > 12_000_000
    assert last < whole / 100
    assert two < whole / 100


def test_attention_is_computed_for_kept_rows_and_heads_only(
    llama: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[int, list[int] | None]] = []
    plain = attending.attention_scores

    def counting(q: mx.array, k: mx.array, **options: Any) -> mx.array:
        computed.append((q.shape[1], options["rows"]))
        return plain(q, k, **options)

    monkeypatch.setattr(attending, "attention_scores", counting)
    hook = {"hook_point": "blocks.*.attn.hook_pattern", "positions": [4, 5, 12], "heads": [1, 2]}
    generate(llama, [hook], chunk=3)
    # Chunks 0-2, 3-5, 6-8, 9; the prompt's last token 10; generated tokens 11, 12 and 13.
    assert computed == [(2, [1, 2])] * N_LAYERS + [(2, [0])] * N_LAYERS


def test_passes_without_a_position_do_not_meet_the_hook(llama: HookedModel) -> None:
    attached: list[list[str]] = []
    plain = llama.instrument.plan

    def noting(hooks: list[Any]) -> Any:
        attached.append([hook.point.name for hook in hooks])
        return plain(hooks)

    hooks = [
        {"hook_point": "hook_embed", "positions": "last"},
        {"hook_point": "blocks.0.attn.hook_pattern", "positions": [1]},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama.instrument, "plan", noting)
        generate(llama, hooks, chunk=4)
    assert attached == [[], ["blocks.0.attn.hook_pattern"], [], ["hook_embed"]]


def test_a_pass_that_a_hook_runs_in_between_begins_where_it_does() -> None:
    model, starts, inside = HookedModel(tiny_model("mamba")), [], []

    def running(value: mx.array, point: HookPoint) -> None:
        starts.append((model.instrument.run.start, model.instrument.run.length))
        if not inside:
            inside.append(True)
            model.model(mx.array([[1, 2]]))
            inside.clear()

    hook = Hook(model.hook_points["blocks.0.hook_resid_post"], running)
    generate(model, [{"hook_point": "hook_embed", "positions": "last"}], chunk=4, hooks=[hook])
    passes = [(0, 4), (4, 4), (8, 2), (10, 1), (11, 1), (12, 1), (13, 1)]
    assert starts == [start for each in passes for start in (each, (0, 2))]


# Reduction


def reference(source: list[CapturedActivation], positions: list[int], reduce: str) -> np.ndarray:
    """One record's reduction in float64, from records of consecutive positions."""
    whole = join(source)
    array, axis = rows_of(whole, positions).astype(np.float64), whole.hook_point.position_axis
    if reduce == "norm":
        return np.sqrt((array**2).sum(axis=-1))
    return {"mean": np.mean, "max": np.max, "last": lambda a, axis: a.take(-1, axis)}[reduce](array, axis=axis)


def reducible(point: HookPoint, reduce: str) -> bool:
    try:
        check_reducible(reduce, point)
    except HookError:
        return False
    return point.position_axis is not None


@pytest.mark.parametrize("chunk", [2048, 3])
@pytest.mark.parametrize("selection", [None, "last", [1, 5, 6, 12], {"start": 3}], ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_reductions_are_those_of_each_record(model: HookedModel, reduce: str, selection: Any, chunk: int) -> None:
    points = [point for point in model.hook_points.values() if reducible(point, reduce)]
    assert len(points) > 5 * model.cfg.n_layers
    whole = generate(model, [{"hook_point": point.name} for point in points], chunk)
    part = generate(model, [{"hook_point": p.name, "positions": selection, "reduce": reduce} for p in points], chunk)
    assert part.tokens == whole.tokens
    for point in points:
        axis = len(point.axes) - 1 if reduce == "norm" else point.position_axis
        expected = []
        for source in whole.activations[point.name]:
            chosen = source.position_ids if selection is None else at(selection, source.position_ids, source.step == 0)
            if chosen:
                expected.append((source.step, list(chosen), reference([source], list(chosen), reduce)))
        got = part.activations[point.name]
        assert [record.step for record in got] == [step for step, _, _ in expected]
        for record, (_, chosen, array) in zip(got, expected, strict=True):
            assert (record.reduce, record.value.dtype) == (reduce, mx.float32)
            assert record.hook_point.axes == point.axes[:axis] + point.axes[axis + 1 :]
            assert len(record.hook_point.axes) == record.value.ndim
            assert list(record.position_ids) == (chosen[-1:] if reduce == "last" else chosen)
            with np.errstate(invalid="ignore"):
                np.testing.assert_allclose(record.numpy(), array, rtol=1e-5, atol=1e-5, err_msg=point.name)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ("x", "A projection has an array of vectors, got 'x'"),
        (None, "A projection has an array of vectors, got None"),
        ([[1.0], [1.0, 2.0]], "A projection has an array of vectors, got"),
        (np.ones((1, 4), np.complex64), "A projection has vectors of floats, got mlx.core.complex64"),
        (np.ones((1, 4), int), "A projection has vectors of floats, got mlx.core.int64"),
        (np.ones(4), "A projection has vectors \\[vector, feature\\], got an array of shape"),
        (np.full((1, 4), 1e300), "A projection has vectors of finite numbers"),
    ],
)
def test_what_is_no_projection_is_refused(vectors: Any, message: str) -> None:
    with pytest.raises(HookError, match=message):
        Projection(vectors)


@pytest.mark.parametrize("chunk", [2048, 4])
def test_projections_are_dot_products_of_the_whole_capture(model: HookedModel, chunk: int) -> None:
    vectors = np.random.default_rng(5).normal(size=(3, model.cfg.d_model)).astype(np.float32)
    spec = HookSpec(hook_point="blocks.*.hook_resid_post", hook_id="scores", reduce=Projection(mx.array(vectors)))
    result = generate(model, ["blocks.*.hook_resid_post", spec], chunk)
    projected = {r.hook_point.name: [] for r in result.activations["scores"]}
    for record in result.activations["scores"]:
        assert record.reduce == "projection"
        assert record.hook_point.axes == ("batch", "pos", "vector")
        projected[record.hook_point.name].append(record)
    assert len(projected) == model.cfg.n_layers
    for name, records in projected.items():
        whole = result.cache.numpy(name).astype(np.float64)
        joined = join(records)
        assert joined.position_ids == range(LAST + 1)
        np.testing.assert_allclose(joined.numpy(), whole @ vectors.T.astype(np.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [2048, 4])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text", "gpt_oss"])
def test_a_pattern_is_averaged_over_heads_in_its_pass(name: str, chunk: int) -> None:
    model = HookedModel(tiny_model(name))
    spec = HookSpec(hook_point="blocks.1.attn.hook_pattern", hook_id="mean", reduce="head_mean")
    result = generate(model, ["blocks.1.attn.hook_pattern", spec], chunk)
    mean = join(result.activations["mean"])
    assert mean.hook_point.axes == ("batch", "query", "key")
    whole = result.cache.numpy("blocks.1.attn.hook_pattern")
    np.testing.assert_allclose(mean.numpy(), whole.mean(axis=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("stop_at", [None, 2])
def test_the_last_token_is_read_where_that_is_asked_for(model: HookedModel, stop_at: int | None) -> None:
    """Whatever ends the generation; what is read is what one full pass over all tokens shows."""
    plain = generate(model, [])
    end = None if stop_at is None else plain.tokens[stop_at]
    tokenizer = None if end is None else SimpleNamespace(eos_token_ids={end}, detokenizer=SilentDetokenizer())
    steps = list(
        generate_steps(
            model.instrument,
            tokenizer,
            PROMPT,
            max_tokens=MAX_TOKENS,
            sampling=Sampling(),
            stop=[],
            plan=model.resolve_hooks(["blocks.*.hook_resid_post"]),
            read_last=True,
        )
    )
    chosen = [step.token for step in steps if step.token is not None]
    assert chosen == (plain.tokens if end is None else plain.tokens[: plain.tokens.index(end) + 1])
    assert [step.finish_reason for step in steps] == [None] * len(chosen) + ["length" if end is None else "stop"]
    assert steps[-1].token is None
    read = collect(PROMPT, steps, model.hook_points)
    _, whole = model.run_with_cache([*PROMPT, *chosen], "blocks.*.hook_resid_post")
    for name in whole:
        assert read.cache.positions(name) == range(len(PROMPT) + len(chosen))
        np.testing.assert_allclose(read.cache.numpy(name), whole.numpy(name), rtol=1e-3, atol=1e-4)


def test_what_edits_the_last_token_is_accounted_for(llama: HookedModel) -> None:
    last = len(PROMPT) + MAX_TOKENS - 1
    edit = {"hook_point": "blocks.1.hook_resid_post", "type": "scale", "factor": 2.0, "positions": last}
    result = llama.generate(PROMPT, max_tokens=MAX_TOKENS, interventions=[edit], read_last=True)
    assert result.interventions[0].positions == (last,)
    with pytest.raises(HookError, match=f"position {last} is out of reach"):
        llama.generate(PROMPT, max_tokens=MAX_TOKENS, interventions=[edit])


class Passes(InferenceHook):
    """Notes where passes begin and what ends them."""

    def on_forward_begin(self, input_ids: mx.array, position: int, state: dict[str, Any]) -> None:
        self.data.append(position)

    def on_generation_end(self, generated_tokens: list[str], state: dict[str, Any]) -> None:
        self.data.append((len(generated_tokens), state["finish_reason"]))


def test_observers_are_told_of_the_pass_that_reads_the_last_token(llama: HookedModel) -> None:
    seen = Passes("passes")
    llama.generate(PROMPT, max_tokens=2, hooks=[seen], read_last=True)
    assert seen.data == [0, len(PROMPT) - 1, len(PROMPT), len(PROMPT) + 1, (2, "length")]


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_half_precision_is_reduced_in_float32(reduce: str) -> None:
    model = HookedModel(make_model("llama", dtype=mx.float16))
    name = "blocks.2.hook_resid_post"
    whole = generate(model, [name]).activations[name]
    got = generate(model, [{"hook_point": name, "reduce": reduce}]).activations[name]
    for record, source in zip(got, whole, strict=True):
        assert (source.value.dtype, record.value.dtype) == (mx.float16, mx.float32)
        expected = reference([source], list(source.position_ids), reduce)
        np.testing.assert_allclose(record.numpy(), expected, rtol=2e-6)


def test_the_last_row_alone_is_computed_for_last(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = []
    plain = attending.attention_scores
    monkeypatch.setattr(attending, "attention_scores", lambda q, k, **o: (rows.append(o["rows"]), plain(q, k, **o))[1])
    hook = {"hook_point": "blocks.0.attn.hook_pattern", "positions": {"stop": 9}, "reduce": "last"}
    ((record,),) = generate(llama, [hook]).activations.values()
    assert rows == [[8]]
    assert (list(record.position_ids), record.value.shape) == ([8], (1, 4, len(PROMPT)))


def test_reduced_records_are_not_joined(llama: HookedModel) -> None:
    name = "blocks.0.hook_resid_post"
    cache = generate(llama, [{"hook_point": name, "reduce": "mean"}]).cache
    with pytest.raises(HookError, match="4 records, each reduced to its mean: no axis joins them"):
        cache[name]
    assert [record.value.shape for record in cache.records[name]] == [(1, 32)] * 4
    norms = generate(llama, [{"hook_point": name, "reduce": "norm"}]).cache
    assert norms[name].shape == (1, LAST + 1)
    with pytest.raises(HookError, match="differ in reduce"):
        join([norms.records[name][0], generate(llama, [name]).cache.records[name][1]])


def test_a_cache_prefers_the_activation_itself(llama: HookedModel) -> None:
    name = "blocks.0.hook_resid_post"
    hooks = [{"hook_point": name, "reduce": "mean", "hook_id": "mean"}, {"hook_point": name, "hook_id": "whole"}]
    result = generate(llama, hooks)
    assert result.cache[name].shape == (1, LAST + 1, 32)
    assert result.activations["mean"][0].value.shape == (1, 32)


def test_a_reduced_or_partial_record_is_no_source(llama: HookedModel) -> None:
    name = "blocks.0.attn.hook_z"
    for limits, message in [({"reduce": "norm"}, "was reduced to its norm"), ({"heads": [1]}, "holds heads 1 only")]:
        (records,) = generate(llama, [{"hook_point": name} | limits]).activations.values()
        edit = {"hook_point": name, "type": "patch", "source": records}
        with pytest.raises(HookError, match=message):
            llama.generate(PROMPT, max_tokens=MAX_TOKENS, interventions=[edit])


# Places


def test_a_layer_glob_means_every_layer_that_has_the_component(llama: HookedModel) -> None:
    for glob in ("*", "blocks.*", "transformer.h.*", "model.layers.*", "layers.*"):
        (spec,) = llama.resolve_hooks([{"layer_name": glob, "component": "query"}]).hook_ids
        assert spec == f"{glob}_query"
        records = generate(llama, [{"layer_name": glob, "component": "query"}]).activations[spec]
        names = [record.layer_name for record in records[:N_LAYERS]]
        assert names == [glob.replace("*", str(i)) for i in range(N_LAYERS)]
        assert [r.hook_point.name for r in records[:N_LAYERS]] == [
            f"blocks.{i}.attn.hook_rot_q" for i in range(N_LAYERS)
        ]
    norms = llama.resolve_hooks([HookSpec("transformer.h.*.ln_1", "layernorm")])
    assert [capture.point.name for capture in norms.captures] == [f"blocks.{i}.ln1.hook_normalized" for i in range(3)]
    both = HookSpec("*", "residual", capture_input=True)
    assert len(llama.resolve_hooks([both])) == 2 * N_LAYERS


def test_a_layer_glob_leaves_out_layers_without_the_component() -> None:
    model = HookedModel(tiny_model("jamba"))
    asked = model.resolve_hooks([HookSpec("*", "attention_pattern")])
    having = [name for name in model.hook_points if name.endswith("hook_pattern")]
    assert [capture.point.name for capture in asked.captures] == having
    assert 0 < len(having) < model.cfg.n_layers
    with pytest.raises(UnknownHookError, match=r"has no blocks\.0\.attn\.hook_pattern"):
        HookedModel(tiny_model("mamba")).resolve_hooks([HookSpec("*", "attention_pattern")])


@pytest.mark.parametrize(
    ("hook_point", "layer_name", "component", "is_input"),
    [
        ("blocks.1.attn.hook_pattern", "blocks.1", "attention_pattern", False),
        ("blocks.1.hook_resid_pre", "blocks.1", "residual", True),
        ("layers_output[2]", "blocks.2", "residual", False),
        ("blocks.0.attn.hook_z", "blocks.0", "z", False),
        ("blocks.0.ln2.hook_in", "blocks.0", "layernorm", True),
        ("embed.hook_in", "embed", "embedding", True),
        ("ln_final.hook_normalized", "ln_final", "layernorm", False),
        ("hook_logits", "hook_logits", "logits", False),
        ("model.layers.1.mlp.up_proj.input", "blocks.1", "module", True),
    ],
)
def test_a_hook_point_is_told_in_the_rest_vocabulary(
    llama: HookedModel, hook_point: str, layer_name: str, component: str, is_input: bool
) -> None:
    (capture,) = llama.resolve_hooks([HookSpec(hook_point=hook_point)]).captures
    assert capture.labels == {
        "hook_id": hook_point, "layer_name": layer_name, "component": component, "is_input": is_input
    }  # fmt: skip
    if component not in ("z", "logits", "module"):
        sides = {"capture_input": is_input, "capture_output": not is_input}
        spec = HookSpec(
            {"embed": "transformer.wte", "ln_final": "transformer.ln_f"}.get(layer_name, layer_name), component, **sides
        )
        assert capture.point in [point for point, _ in spec.points(llama.architecture)]


def test_a_spec_is_plain_json_and_back() -> None:
    for given, shown in [
        ({"positions": [5, 2]}, {"positions": [2, 5]}),
        ({"positions": 3}, {"positions": [3]}),
        ({"positions": slice(2, None)}, {"positions": {"start": 2}}),
        ({"positions": {"stop": 4}, "reduce": "max"}, {"positions": {"start": 0, "stop": 4}, "reduce": "max"}),
        ({"positions": "last", "heads": 2}, {"positions": "last", "heads": [2]}),
    ]:
        spec = HookSpec(hook_point="hook_embed", **given)
        plain = dict.fromkeys(("layer_name", "component", "positions", "heads", "reduce"))
        plain |= {"hook_id": "hook_embed", "hook_point": "hook_embed"}
        assert spec.to_dict() == plain | {"capture_input": False, "capture_output": True} | shown
        assert HookSpec.of(spec.to_dict()) == spec


# Refusals


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"positions": [-1]}, "positions are a whole number from 0 up"),
        ({"positions": [2, 2]}, "a list of different ones"),
        ({"positions": []}, "or 'last'; got"),
        ({"positions": "first"}, "or 'last'; got 'first'"),
        ({"positions": slice(0, 4, 2)}, "positions are a whole number from 0 up"),
        ({"positions": {"start": 4, "stop": 4}}, "positions are a whole number from 0 up"),
        ({"positions": [3, LAST + 1]}, f"position {LAST + 1} is out of reach: this run comes to positions 0 to {LAST}"),
        ({"positions": {"start": LAST + 1}}, f"nothing to capture: this run comes to positions 0 to {LAST}"),
        ({"heads": []}, "heads is None, a whole number or a list"),
        ({"heads": [4]}, "Heads are 0 to 3, got 4"),
        ({"heads": [0], "hook_point": "hook_embed"}, "heads need a head axis; the axes of hook_embed are batch, pos"),
        ({"reduce": Projection(mx.ones((1, 5)))}, "blocks.0.attn.hook_z is 8 wide, and the projection's vectors 5."),
        (
            {"reduce": Projection(mx.ones((2, 11))), "hook_point": "blocks.0.attn.hook_pattern"},
            "blocks.0.attn.hook_pattern has no last axis of features to reduce by a projection; its axes are",
        ),
        ({"reduce": "sum"}, "reduce is null, one of mean, max, last, norm, head_mean or a Projection, got 'sum'"),
        ({"reduce": "mean", "hook_point": "embed.hook_in"}, "holds ids, which cannot be reduced"),
        ({"reduce": "norm", "hook_point": "blocks.0.attn.hook_attn_scores"}, "holds -inf at masked keys"),
        ({"reduce": "max", "hook_point": "model.layers.0.mlp.up_proj"}, "no axis over positions to reduce by 'max'"),
        ({"positions": [0], "hook_point": "model.layers.0.mlp.up_proj"}, "no axis over positions to select on"),
        ({"hook_point": "blocks.*.hook_nothing"}, "Unknown hook point 'blocks.\\*.hook_nothing'"),
        ({"layer_name": "1"}, "layer_name and component, or else hook_point"),
        ({"capture_input": True}, "A hook_point is one place"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_the_model_runs(
    llama: HookedModel, limits: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.instrument, "attached", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(HookError, match=message):
        generate(llama, [{"hook_point": "blocks.0.attn.hook_z", "hook_id": "mine"} | limits])


def test_states_have_no_positions() -> None:
    model = HookedModel(tiny_model("mamba"))
    name = "blocks.0.mixer.hook_state"
    for limits in ({"positions": "last"}, {"reduce": "last"}):
        with pytest.raises(HookError, match="Hook 'blocks.0.mixer.hook_state': .* has no axis over positions"):
            generate(model, [{"hook_point": name} | limits])
    whole, norms = (generate(model, [{"hook_point": name} | limits], chunk=4) for limits in ({}, {"reduce": "norm"}))
    for state, norm in zip(whole.activations[name], norms.activations[name], strict=True):
        np.testing.assert_allclose(norm.numpy(), np.linalg.norm(state.numpy(), axis=-1), rtol=1e-5)
        assert norm.hook_point.axes == state.hook_point.axes[:-1]


def test_sinks_have_no_features_to_take_a_norm_of() -> None:
    model = HookedModel(tiny_model("gpt_oss"))
    with pytest.raises(HookError, match="no last axis of features to reduce by 'norm'"):
        model.resolve_hooks([{"hook_point": "blocks.*.attn.hook_sink", "reduce": "norm"}])


def test_a_text_that_ends_early_leaves_a_hook_silent(llama: HookedModel) -> None:
    capture = [{"hook_point": "hook_embed", "positions": [LAST]}, {"hook_point": "hook_logits", "positions": "last"}]
    steps = llama.generate_steps(PROMPT, max_tokens=MAX_TOKENS, capture=capture)
    first = next(steps)
    steps.close()
    assert [len(records) for records in first.activations.values()] == [0, 1]


# Registered hooks


def test_registered_hooks_keep_their_selection_in_every_kind_of_run(llama: HookedModel) -> None:
    name = "blocks.1.hook_resid_post"
    _, cache = llama.run_with_cache(PROMPT, name)
    whole = cache.numpy(name)
    hook_id = llama.register_activation_hook("transformer.h.1", "residual", positions=[2, 7])
    mean_id = llama.register_activation_hook(hook_point=name, reduce="mean", positions={"start": 1}, hook_id="mean")
    last_id = llama.register_activation_hook(hook_point=name, reduce="last", hook_id="last")
    try:
        for run in (
            lambda: llama.run_with_cache(PROMPT, "hook_embed"),
            lambda: llama.run_with_cache(PROMPT, "hook_embed", chunk=4),
            lambda: llama.run_with_hooks(PROMPT, []),
            lambda: llama.generate(PROMPT, max_tokens=0),
        ):
            run()
            records = llama.captured_activations(hook_id)
            assert [p for record in records for p in record.position_ids] == [2, 7]
            np.testing.assert_allclose(join(records).numpy(), whole[:, [2, 7]], atol=2e-5)
            (mean,) = llama.captured_activations(mean_id)
            np.testing.assert_allclose(mean.numpy(), whole[:, 1:].mean(axis=1), atol=2e-5)
            (last,) = llama.captured_activations(last_id)
            np.testing.assert_allclose(last.numpy(), whole[:, -1], atol=2e-5)
        with pytest.raises(HookError, match="position 7 is out of reach: this run comes to positions 0 to 3"):
            llama.run_with_hooks(PROMPT[:4], [])
        with pytest.raises(HookError, match="position 7 is out of reach"):
            llama.run_with_cache(PROMPT[:4], "hook_embed")
    finally:
        llama.clear_activation_hooks()


def test_calls_with_a_kv_cache_are_parts_of_a_sequence(llama: HookedModel) -> None:
    _, cache = llama.run_with_cache(PROMPT, "hook_embed")
    hook_id = llama.register_activation_hook("transformer.wte", "embedding", positions=[2, 7])
    try:
        kv_cache = make_prompt_cache(llama.model)
        kept = []
        for begin, stop in ((0, 5), (5, 7), (7, 9)):
            llama.run_with_hooks(PROMPT[begin:stop], [], kv_cache)
            kept += [(list(r.position_ids), r.numpy()) for r in llama.captured_activations(hook_id)]
        assert [ids for ids, _ in kept] == [[2], [7]]
        np.testing.assert_array_equal(
            np.concatenate([a for _, a in kept], axis=1), cache.numpy("hook_embed")[:, [2, 7]]
        )
    finally:
        llama.clear_activation_hooks()
