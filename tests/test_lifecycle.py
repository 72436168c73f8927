"""Hooks live inside a call or a block; afterwards the model is as if they had never been there."""

import threading

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers
from tiny_models import CONFIGS, make_model

from mlx_hooks import HookedModel, HookError, HookPoint, UnknownHookError, UnsupportedModelError, UntrustedHookWarning

TOKENS = [[1, 5, 9, 3]]
KERNEL = mx.fast.scaled_dot_product_attention


def state(model: HookedModel) -> list:
    """Everything that attaching hooks may touch: classes, instance attributes, parameter paths, MLX's kernel."""
    modules = [(path, type(module), sorted(module.__dict__)) for path, module in model.model.named_modules()]
    parameters = [path for path, _ in tree_flatten(model.model.parameters())]
    return [modules, parameters, mx.fast.scaled_dot_product_attention is KERNEL]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_leaves_classes_functions_and_parameters_untouched(name: str) -> None:
    raw = make_model(name)
    classes = [type(module) for _, module in raw.named_modules()]
    model = HookedModel(raw)
    before = state(model)
    assert before[-1], "MLX's own kernel is back in place"
    assert [type(module) for _, module in raw.named_modules()] == classes
    model.run_with_cache(TOKENS)
    model.run_with_hooks(TOKENS, [(None, lambda value, point: None)])
    model.generate([1, 2], max_tokens=3, capture=["blocks.*"])
    assert state(model) == before


@pytest.mark.parametrize("name", CONFIGS)
def test_an_exception_at_any_hook_point_leaves_the_model_untouched(name: str) -> None:
    model = HookedModel(make_model(name))
    before = state(model)
    kv_cache = make_prompt_cache(model.model)
    cache_classes = [type(entry) for entry in kv_cache]
    plain = model(TOKENS)
    for point_name in model.hook_points:

        def fail(value: mx.array, point: HookPoint) -> None:
            raise RuntimeError(point.name)

        with pytest.raises(RuntimeError, match=point_name):
            model.run_with_hooks(TOKENS, [(point_name, fail)], make_prompt_cache(model.model))
        assert state(model) == before, point_name
    with pytest.raises(RuntimeError, match="hook_z"):
        model.run_with_hooks(TOKENS, [("blocks.1.attn.hook_z", fail)], kv_cache)
    assert [type(entry) for entry in kv_cache] == cache_classes
    assert mx.array_equal(model(TOKENS), plain)


def test_hooks_inside_a_block_meet_every_run_and_end_with_it() -> None:
    model = HookedModel(make_model("llama"))
    plain = model(TOKENS)
    before = state(model)
    with model.hooks([("blocks.1.hook_mlp_out", lambda value, point: value * 0)]) as same:
        assert same is model
        hooked = model(TOKENS)
        assert mx.array_equal(model.model(mx.array(TOKENS)), hooked)
    assert not mx.array_equal(hooked, plain)
    assert mx.array_equal(model(TOKENS), plain)
    assert state(model) == before


def test_nested_blocks_add_up_and_unwind_in_order() -> None:
    model = HookedModel(make_model("llama"))
    calls: list[str] = []
    with model.hooks([("hook_embed", lambda value, point: calls.append("outer"))]):
        with model.hooks([("hook_embed", lambda value, point: calls.append("inner"))]):
            _, cache = model.run_with_cache(TOKENS, "hook_embed")
        model(TOKENS)
    model(TOKENS)
    assert calls == ["outer", "inner", "outer"]
    assert cache["hook_embed"].shape == (1, 4, 32)


def test_an_exception_in_an_inner_block_leaves_the_outer_hooks_attached() -> None:
    model = HookedModel(make_model("llama"))
    calls: list[int] = []
    with model.hooks([("hook_embed", lambda value, point: calls.append(1))]):
        with pytest.raises(ZeroDivisionError), model.hooks([("hook_embed", lambda value, point: 1 / 0)]):
            model(TOKENS)
        model(TOKENS)
    assert len(calls) == 2


def test_mlx_lms_own_generation_meets_the_hooks_of_a_block() -> None:
    model = HookedModel(make_model("llama"))
    positions: list[int] = []

    def note(value: mx.array, point: HookPoint) -> None:
        positions.extend(range(model.instrument.run.start, model.instrument.run.start + value.shape[1]))

    with model.hooks([("hook_embed", note)]):
        steps = generate_step(mx.array(TOKENS[0]), model.model, max_tokens=3)
        assert len(list(steps)) == 3
    assert positions[:6] == [0, 1, 2, 3, 4, 5]


def test_another_threads_plain_run_is_not_seen() -> None:
    model = HookedModel(make_model("llama"))
    seen: list[threading.Thread] = []
    results: list[mx.array] = []

    def plain_run() -> None:
        # MLX arrays belong to the thread that made them.
        results.append(np.array(make_model("llama")(mx.array(TOKENS))))
        results.append(np.array(model.model(mx.array(TOKENS))))
        mx.clear_streams()

    def double(value: mx.array, point: HookPoint) -> mx.array:
        seen.append(threading.current_thread())
        return value * 2

    with model.hooks([("blocks.0.attn.hook_z", double), ("blocks.0.hook_resid_pre", double)]):
        thread = threading.Thread(target=plain_run)
        thread.start()
        thread.join()
        assert not seen
        model(TOKENS)
        assert len(seen) == 2
    assert np.array_equal(results[0], results[1])


def test_another_threads_hooked_run_waits_for_the_block() -> None:
    model = HookedModel(make_model("llama"))
    order: list[str] = []

    def hooked_run() -> None:
        order.append("asked")
        np.array(model(TOKENS))
        order.append("ran")
        mx.clear_streams()

    with model.hooks([("hook_embed", lambda value, point: None)]):
        thread = threading.Thread(target=hooked_run)
        thread.start()
        thread.join(timeout=0.3)
        order.append("block ends")
    thread.join()
    assert order == ["asked", "block ends", "ran"]


def test_two_models_hooked_at_once_keep_apart() -> None:
    one, two = HookedModel(make_model("llama", seed=1)), HookedModel(make_model("qwen3", seed=2))
    alone = [m.run_with_cache(TOKENS)[1].numpy(("pattern", 1)) for m in (one, two)]
    kernel = mx.fast.scaled_dot_product_attention
    with one.hooks([("blocks.1.attn.hook_pattern", lambda value, point: None)]):
        _, inner = two.run_with_cache(TOKENS)
        _, outer = one.run_with_cache(TOKENS)
    assert np.array_equal(outer.numpy(("pattern", 1)), alone[0])
    assert np.array_equal(inner.numpy(("pattern", 1)), alone[1])
    assert mx.fast.scaled_dot_product_attention is kernel


def test_an_unknown_name_is_refused_before_anything_runs() -> None:
    model = HookedModel(make_model("llama"))
    with pytest.raises(UnknownHookError, match=r"Did you mean blocks\.2\.hook_resid_post\?.*Layers \(i\): 0-2"):
        model.run_with_cache(TOKENS, "blocks.2.resid_post")
    with pytest.raises(UnknownHookError, match="Unknown hook point 'blocks.3.hook_resid_post'"):
        model.run_with_hooks(TOKENS, [("blocks.3.hook_resid_post", lambda value, point: None)])


def test_a_hook_that_cannot_fire_any_more_is_an_error_not_silence() -> None:
    model = HookedModel(make_model("llama"))
    nn.quantize(model.model, group_size=32, bits=4, class_predicate=lambda path, _: path.endswith("q_proj"))
    before = state(model)
    message = "blocks.1.attn.hook_q lives in 'model.layers.1.self_attn.q_proj', which was replaced since HookedModel"
    with pytest.raises(HookError, match=message):
        model.run_with_cache(TOKENS, "blocks.1.attn.hook_q")
    with pytest.raises(HookError, match=message):
        model.run_with_hooks(TOKENS, [("blocks.1.attn.hook_q", lambda value, point: value * 0)])
    with pytest.raises(HookError, match=message):
        model.generate([1, 2], max_tokens=2, capture=["blocks.1.attn.hook_q"])
    with pytest.raises(HookError, match=message), model.hooks([("blocks.1.attn.hook_q", lambda value, point: None)]):
        model(TOKENS)
    assert state(model) == before
    again = HookedModel(model.model)
    assert again.run_with_cache(TOKENS, "blocks.1.attn.hook_q")[1]["q", 1].shape == (1, 4, 4, 8)


def test_adapters_that_arrive_later_are_noticed_too() -> None:
    # The base projection still runs inside the adapter, so a hook on it would show a value without the adapter's part.
    model = HookedModel(make_model("llama"))
    linear_to_lora_layers(model.model, 3, {"rank": 2, "scale": 10.0, "dropout": 0.0})
    with pytest.raises(HookError, match="was replaced since HookedModel"):
        model.run_with_cache(TOKENS, "blocks.1.attn.hook_q")
    model.run_with_cache(TOKENS, "blocks.*.hook_resid_post")


def test_a_module_that_the_model_does_not_call_is_an_error() -> None:
    model = HookedModel(make_model("llama"))
    model.model.spare = nn.Linear(2, 2)
    model = HookedModel(model.model)
    before = state(model)
    with pytest.raises(HookError, match=r"Hooks on spare.output did not fire: the model ran without calling 'spare'"):
        model.run_with_cache(TOKENS, "spare")
    with pytest.raises(HookError, match="did not fire"), model.hooks([("spare", lambda value, point: None)]):
        model(TOKENS)
    assert state(model) == before


def test_two_wrappers_of_one_model_share_its_hooks() -> None:
    raw = make_model("llama")
    one, two = HookedModel(raw), HookedModel(raw)
    before = state(one)
    _, plain = two.run_with_cache(TOKENS)
    with one.hooks([("hook_embed", lambda value, point: value * 2)]):
        _, inner = two.run_with_cache(TOKENS)
        third = HookedModel(raw)
        _, again = third.run_with_cache(TOKENS)
        outer = one(TOKENS)
    assert mx.array_equal(inner["hook_embed"], plain["hook_embed"] * 2)
    assert mx.array_equal(inner["hook_logits"], outer)
    assert mx.array_equal(again["hook_logits"], outer)
    assert state(one) == before
    assert mx.array_equal(one(TOKENS), plain["hook_logits"])


def test_hooks_on_raw_modules_outlast_another_wrapping() -> None:
    raw = make_model("llama")
    calls: list[str] = []
    with HookedModel(raw).hooks([("model.layers.1.mlp.up_proj", lambda value, point: calls.append(point.name))]):
        HookedModel(raw).run_with_cache(TOKENS, "hook_embed")
    assert calls == ["model.layers.1.mlp.up_proj.output"]


def test_an_inner_block_that_cannot_be_attached_leaves_the_outer_one_attached() -> None:
    model = HookedModel(make_model("llama"))
    calls: list[int] = []
    with model.hooks([("blocks.1.attn.hook_q", lambda value, point: calls.append(1))]):
        q_proj = model.model.model.layers[1].self_attn.q_proj
        model.model.model.layers[1].self_attn.q_proj = nn.Linear(32, 32)
        with pytest.raises(HookError, match="was replaced since"):
            model.run_with_cache(TOKENS, "hook_embed")
        model.model.model.layers[1].self_attn.q_proj = q_proj
        model(TOKENS)
    assert calls == [1]


def test_a_model_may_be_wrapped_inside_a_block_that_edits_it() -> None:
    raw = make_model("llama")
    with HookedModel(raw).hooks([("blocks.1.attn.hook_z", lambda value, point: value * 0)]):
        HookedModel(raw)


def test_threads_with_wrappers_of_their_own_wait_for_each_other() -> None:
    raw = make_model("llama")
    one = HookedModel(raw)
    results: list[np.ndarray] = []

    def capture() -> None:
        results.append(HookedModel(raw).run_with_cache(TOKENS)[1].numpy("hook_embed"))
        mx.clear_streams()

    with one.hooks([("hook_embed", lambda value, point: value * 2)]):
        thread = threading.Thread(target=capture)
        thread.start()
        thread.join(timeout=0.3)
        assert not results
    thread.join()
    assert np.array_equal(results[0], one.run_with_cache(TOKENS)[1].numpy("hook_embed"))


def test_a_hook_may_run_the_model_itself() -> None:
    model = HookedModel(make_model("llama"))
    _, expected = model.run_with_cache(TOKENS, "blocks.2.hook_resid_post", positions="last")
    inner: list[mx.array] = []

    def look_aside(value: mx.array, point: HookPoint) -> None:
        if not inner:
            inner.append(value)
            inner.append(model([[1, 2]]))

    with model.hooks([("blocks.0.hook_resid_post", look_aside)]):
        _, cache = model.run_with_cache(TOKENS, "blocks.2.hook_resid_post", positions="last")
    # The inner pass met the same recorder: its record is there too, at its own position, and the outer one is right.
    (aside, own) = cache.records["blocks.2.hook_resid_post"]
    assert (aside.positions, own.positions) == ((1, 2), (3, 4))
    assert mx.array_equal(own.value, expected["resid_post", 2])


def test_phase_and_step_of_an_outer_block_come_back() -> None:
    model = HookedModel(make_model("llama"))
    seen: list[tuple[str, int]] = []

    def note(value: mx.array, point: HookPoint) -> None:
        seen.append((model.instrument.run.phase, model.instrument.run.step))

    with model.hooks([("hook_embed", note)]):
        model(TOKENS)
        model.generate([1, 2], max_tokens=3)
        model(TOKENS)
    assert seen == [("prefill", 0), ("prefill", 0), ("prefill", 0), ("decode", 1), ("decode", 2), ("prefill", 0)]


def test_a_block_in_which_the_model_never_ran_is_no_error() -> None:
    model = HookedModel(make_model("llama"))
    with model.hooks([("blocks.1.attn.hook_q", lambda value, point: None)]):
        pass


def test_a_model_with_lora_adapters_is_hooked_with_them() -> None:
    raw = make_model("llama")
    linear_to_lora_layers(raw, 3, {"rank": 2, "scale": 10.0, "dropout": 0.0, "keys": None})
    raw.apply(lambda p: p + 0.1 * mx.random.normal(p.shape))
    raw.eval()
    plain = raw(mx.array(TOKENS))
    logits, cache = HookedModel(raw).run_with_cache(TOKENS)
    assert mx.array_equal(logits, plain)
    q_proj = raw.model.layers[1].self_attn.q_proj
    assert type(q_proj).__name__ == "LoRALinear"
    assert mx.array_equal(cache["q", 1].reshape(1, 4, -1), q_proj(cache["blocks.1.attn.hook_in"]))


def test_a_model_that_lists_one_block_twice_is_refused() -> None:
    raw = make_model("llama")
    raw.model.layers[2] = raw.model.layers[1]
    with pytest.raises(UnsupportedModelError, match="lists a block twice"):
        HookedModel(raw)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_multiplier_is_part_of_what_is_added(dtype: mx.Dtype) -> None:
    # The children of granite's blocks are llama's, but what they add is multiplied.
    granite = {"model_type": "granite", "logits_scaling": 1.02, "attention_multiplier": 0.35, "rope_theta": 10000.0}
    rest = {"embedding_multiplier": 1.02, "residual_multiplier": 0.97, "attention_bias": False, "mlp_bias": False}
    model = HookedModel(make_model(CONFIGS["llama"] | granite | rest, dtype=dtype))
    modules = ["model.layers.1.self_attn", "model.layers.1.mlp"]
    _, cache = model.run_with_cache(TOKENS, [*modules, "blocks.1.*", "hook_embed", "blocks.0.hook_resid_pre"])
    assert mx.array_equal(cache["attn_out", 1], cache["model.layers.1.self_attn.output"] * 0.97)
    assert mx.array_equal(cache["mlp_out", 1], cache["model.layers.1.mlp.output"] * 0.97)
    assert mx.array_equal(cache["resid_pre", 0], cache["embed"] * 1.02)


def block_that_adds_unseen(model: nn.Module, layer: int) -> None:
    block = model.model.layers[layer]

    class Unseen(type(block)):
        def __call__(self, x: mx.array, mask: object = None, cache: object = None) -> mx.array:
            h = mx.add(x, self.self_attn(self.input_layernorm(x), mask, cache))
            return mx.add(h, self.mlp(self.post_attention_layernorm(h)))

    block.__class__ = Unseen


def test_a_block_whose_sums_cannot_be_seen_is_warned_of_and_the_rest_works() -> None:
    raw = make_model("llama")
    block_that_adds_unseen(raw, 2)
    with pytest.warns(UntrustedHookWarning, match="every hook point is met.*blocks.2.hook_attn_out") as warned:
        model = HookedModel(raw)
    assert len(warned) == 1
    assert model.selftest().untrusted == [f"blocks.2.hook_{name}" for name in ("attn_out", "resid_mid", "mlp_out")]
    with pytest.raises(HookError, match="did not fire"):
        model.run_with_cache(TOKENS, "blocks.2.hook_attn_out")
    logits, cache = model.run_with_cache(TOKENS, ["blocks.1.*", "blocks.2.attn.hook_pattern"])
    assert mx.array_equal(logits, raw(mx.array(TOKENS)))
    assert cache["pattern", 2].shape == (1, 4, 4, 4)


def test_a_block_that_adds_twice_is_warned_of() -> None:
    raw = make_model("llama")
    block = raw.model.layers[1]

    class Scaled(type(block)):
        def __call__(self, x: mx.array, mask: object = None, cache: object = None) -> mx.array:
            return super().__call__(x, mask, cache) * 0.99

    block.__class__ = Scaled
    with pytest.warns(UntrustedHookWarning, match="resid_post = resid_pre .* does not hold .*blocks.1.hook_resid_post"):
        HookedModel(raw)


def test_a_kernel_that_is_not_softmax_attention_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(q: mx.array, k: mx.array, v: mx.array, **options: object) -> mx.array:
        return KERNEL(q, k, v, **options) * 0.999

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", other)
    with pytest.warns(UntrustedHookWarning, match="z = pattern @ v does not hold .*blocks.0.attn.hook_pattern"):
        HookedModel(make_model("llama"))


@pytest.mark.parametrize("thing", [None, "neuroscope-tiny", nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))])
def test_what_is_no_language_model_is_refused(thing: object) -> None:
    with pytest.raises(UnsupportedModelError):
        HookedModel(thing)
