"""Generation with hooks: the same tokens as mlx-lm, and activations of every position once."""

import mlx.core as mx
import numpy as np
import pytest
from byte_models import byte_model
from mlx_lm import stream_generate
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError, HookSpec, UnknownHookError

PROMPT = [1, 5, 9, 3, 7]
EVERYTHING = ["hook_*", "embed.*", "blocks.*", "ln_final.*"]


def test_tokens_and_probabilities_are_mlx_lms_bit_for_bit(model: HookedModel) -> None:
    expected = list(generate_step(mx.array(PROMPT), model.model, max_tokens=8))
    steps = list(model.generate_steps(PROMPT, max_tokens=8, capture=EVERYTHING))
    assert [step.token for step in steps] == [token for token, _ in expected]
    assert [step.logprob for step in steps] == [logprobs[token].item() for token, logprobs in expected]


def test_sampling_with_a_seed_is_mlx_lms_and_repeatable(llama: HookedModel) -> None:
    mx.random.seed(7)
    sampler = make_sampler(0.9, 0.95, top_k=20)
    expected = [token for token, _ in generate_step(mx.array(PROMPT), llama.model, max_tokens=12, sampler=sampler)]
    options = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.95, "top_k": 20}
    assert llama.generate(PROMPT, seed=7, **options).tokens == expected
    assert llama.generate(PROMPT, seed=7, capture=EVERYTHING, **options).tokens == expected
    assert llama.generate(PROMPT, seed=8, **options).tokens != expected


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({"top_p": 0.7}, {"top_p": 0.7}),
        ({"min_p": 0.4}, {"min_p": 0.4}),
        ({"top_p": 0.9, "min_p": 0.05, "top_k": 7}, {"top_p": 0.9, "min_p": 0.05, "top_k": 7}),
    ],
    ids=str,
)
def test_filters_are_mlx_lms_in_their_order(llama: HookedModel, filters: dict, names: dict) -> None:
    mx.random.seed(11)
    sampler = make_sampler(1.7, **names)
    expected = [token for token, _ in generate_step(mx.array(PROMPT), llama.model, max_tokens=30, sampler=sampler)]
    assert llama.generate(PROMPT, max_tokens=30, temperature=1.7, seed=11, **filters).tokens == expected


@pytest.mark.parametrize("seeds", [(3, 4), (3, 3), (3, None)], ids=str)
def test_generations_that_take_turns_draw_what_each_alone_draws(llama: HookedModel, seeds: tuple) -> None:
    runs = [{"temperature": 1.5, "seed": seed, "max_tokens": 12, "top_p": 0.95} for seed in seeds]

    def steps(options: dict) -> list[int]:
        # Without a seed the state of MLX at the first step decides.
        mx.random.seed(5)
        return [step.token for step in llama.generate_steps(PROMPT, **options)]

    alone = [steps(options) for options in runs]
    mx.random.seed(5)
    pairs = zip(*(llama.generate_steps(PROMPT, **options) for options in runs), strict=True)
    together = [[step.token for step in pair] for pair in pairs]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone
    assert (alone[0] == alone[1]) == (seeds[0] == seeds[1])


@pytest.mark.parametrize("options", [{"temperature": 1.5, "seed": 3}, {}], ids=str)
def test_mlx_s_random_state_is_its_users(llama: HookedModel, options: dict) -> None:
    mx.random.seed(1)
    expected = [mx.random.uniform().item() for _ in range(6)]
    mx.random.seed(1)
    alone = llama.generate(PROMPT, max_tokens=6, **options).tokens
    mx.random.seed(1)
    met = [(mx.random.uniform().item(), step.token) for step in llama.generate_steps(PROMPT, max_tokens=6, **options)]
    assert [number for number, _ in met] == expected
    assert [token for _, token in met] == alone


def test_without_a_seed_a_generation_takes_one_number_of_mlx_s_state(llama: HookedModel) -> None:
    def two_runs(seed: int) -> tuple[list[int], list[int], float]:
        mx.random.seed(seed)
        first, second = (llama.generate(PROMPT, max_tokens=20, temperature=1.5).tokens for _ in range(2))
        return first, second, mx.random.uniform().item()

    first, second, number = two_runs(1)
    assert two_runs(1) == (first, second, number)
    assert two_runs(2)[0] != first
    # Neither the same numbers nor the same ones a token later.
    assert first != second
    assert first[1:] != second[:-1]
    mx.random.seed(1)
    assert [mx.random.uniform().item() for _ in range(3)][-1] == number


def test_logit_bias_and_repetition_penalty_are_mlx_lms(llama: HookedModel) -> None:
    expected = list(PROMPT)
    for _ in range(8):
        logits = llama([expected])[:, -1]
        for processor in make_logits_processors({11: 2.5, 12: -100.0}, 1.3):
            logits = processor(mx.array(expected), logits)
        expected.append(mx.argmax(logits).item())
    options = {"logit_bias": {11: 2.5, 12: -100.0}, "repetition_penalty": 1.3, "max_tokens": 8}
    tokens = llama.generate(PROMPT, **options).tokens
    assert tokens == expected[len(PROMPT) :]
    assert tokens != llama.generate(PROMPT, max_tokens=8).tokens


@pytest.mark.parametrize("top_logprobs", [0, 1, 5, 60, 1000])
def test_log_probabilities_are_those_of_the_model_s_own_logits(llama: HookedModel, top_logprobs: int) -> None:
    """Whatever bends the choice: bias, penalties, temperature and filters are not in them."""
    bent = {"logit_bias": {11: 5.0}, "repetition_penalty": 1.5, "temperature": 2.0, "top_p": 0.9, "seed": 1}
    bent |= {"frequency_penalty": 0.5, "presence_penalty": 0.5}
    result = llama.generate(PROMPT, max_tokens=10, top_logprobs=top_logprobs, **bent)
    assert result.tokens == llama.generate(PROMPT, max_tokens=10, **bent).tokens
    _, cache = llama.run_with_cache([PROMPT + result.tokens[:-1]], "hook_logits")
    logits = cache.numpy("hook_logits")[0, len(PROMPT) - 1 :].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    k = min(top_logprobs, 60)
    assert len(result.top_logprobs) == 10
    for said, row, token in zip(result.top_logprobs, expected, result.tokens, strict=True):
        assert said.logprob == pytest.approx(row[token], abs=1e-5)
        assert said.tokens == list(np.argsort(-row, kind="stable")[:k])
        np.testing.assert_allclose(said.logprobs, row[said.tokens], atol=1e-5)


def test_log_probabilities_are_of_the_edited_model(llama: HookedModel) -> None:
    edit = ("blocks.1.hook_mlp_out", lambda value, point: value * 0)
    said = llama.generate(PROMPT, max_tokens=1, top_logprobs=1, fwd_hooks=[edit]).top_logprobs[0]
    logits = np.array(llama.run_with_hooks([PROMPT], [edit]))[0, -1].astype(np.float64)
    assert said.logprobs[0] == pytest.approx((logits - np.log(np.exp(logits).sum())).max(), abs=1e-5)
    plain = llama.generate(PROMPT, max_tokens=1, top_logprobs=1).top_logprobs[0]
    assert plain.logprobs != pytest.approx(said.logprobs, abs=1e-3)


def test_log_probabilities_are_computed_only_when_asked_for(
    llama: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_hooks import sampling

    calls: list[int] = []
    largest = sampling.largest
    monkeypatch.setattr(sampling, "largest", lambda values, k: calls.append(k) or largest(values, k))
    result = llama.generate(PROMPT, max_tokens=3)
    assert (result.top_logprobs, calls) == ((), [])
    llama.generate(PROMPT, max_tokens=3, top_logprobs=2)
    assert calls == [2, 2, 2]


@pytest.mark.parametrize(("frequency", "presence"), [(0.7, 0.0), (0.0, 1.1), (0.4, -0.3)])
def test_frequency_and_presence_penalties_are_openai_s(llama: HookedModel, frequency: float, presence: float) -> None:
    """logit[j] - count[j] * frequency - (count[j] > 0) * presence, counted over what was generated."""
    options = {"frequency_penalty": frequency, "presence_penalty": presence, "max_tokens": 25}
    steps = list(llama.generate_steps(PROMPT, **options))
    tokens = [step.token for step in steps]
    _, cache = llama.run_with_cache([PROMPT + tokens[:-1]], "hook_logits")
    counts = np.zeros(60)
    for step, row in zip(steps, cache.numpy("hook_logits")[0, len(PROMPT) - 1 :].astype(np.float64), strict=True):
        row = row - counts * frequency - (counts > 0) * presence
        assert step.token == row.argmax()
        assert step.logprob == pytest.approx(row.max() - np.log(np.exp(row).sum()), abs=1e-5)
        counts[step.token] += 1
    assert tokens != llama.generate(PROMPT, max_tokens=25).tokens


def test_activations_of_prompt_and_generated_tokens_equal_one_forward_pass(model: HookedModel) -> None:
    result = model.generate(PROMPT, max_tokens=6, capture=EVERYTHING)
    fed = PROMPT + result.tokens[:-1]
    _, full = model.run_with_cache([fed])
    assert set(result.cache) == set(full)
    for name in full:
        assert list(result.cache.positions(name)) == list(range(len(fed))), name
        # Other shapes of matrix products: float32 rounding.
        np.testing.assert_allclose(result.cache.numpy(name), full.numpy(name), rtol=5e-5, atol=5e-5, err_msg=name)


def test_each_step_carries_its_own_positions_phase_and_shape(llama: HookedModel) -> None:
    specs = [HookSpec("transformer.h.1", "residual", "r"), HookSpec("transformer.h.1", "attention_pattern", "p")]
    steps = list(llama.generate_steps(PROMPT, max_tokens=3, capture=specs))
    assert [step.index for step in steps] == [0, 1, 2]
    assert [step.finish_reason for step in steps] == [None, None, "length"]
    rows = [(r.phase, r.step, r.positions, r.value.shape) for step in steps for r in step.activations["r"]]
    assert rows == [
        ("prefill", 0, (0, 5), (1, 5, 32)),
        ("decode", 1, (5, 6), (1, 1, 32)),
        ("decode", 2, (6, 7), (1, 1, 32)),
    ]
    shapes = [r.value.shape for step in steps for r in step.activations["p"]]
    assert shapes == [(1, 4, 5, 5), (1, 4, 1, 6), (1, 4, 1, 7)]


def test_a_prompt_in_chunks_gives_the_same_records(llama: HookedModel) -> None:
    from mlx_hooks.generation import Sampling, collect, generate_steps

    prompt = list(range(1, 12))
    plan = llama.resolve_hooks(EVERYTHING)
    options = {"max_tokens": 3, "sampling": Sampling(), "stop": [], "plan": plan}
    whole = collect(prompt, generate_steps(llama.instrument, None, prompt, **options), llama.hook_points)
    chunked = collect(
        prompt, generate_steps(llama.instrument, None, prompt, prefill_step_size=4, **options), llama.hook_points
    )
    assert chunked.tokens == whole.tokens
    for hook_id, records in whole.activations.items():
        assert [r.positions for r in chunked.activations[hook_id]] == [r.positions for r in records]
        for a, b in zip(chunked.activations[hook_id], records, strict=True):
            np.testing.assert_allclose(a.numpy(), b.numpy(), rtol=5e-5, atol=5e-5, err_msg=hook_id)


def test_zero_tokens_only_reads_the_prompt(llama: HookedModel) -> None:
    result = llama.generate(PROMPT, max_tokens=0, capture=["hook_embed", "blocks.2.hook_resid_post"])
    assert (result.tokens, result.text, result.finish_reason) == ([], "", "length")
    assert result.cache["resid_post", 2].shape == (1, 5, 32)
    assert result.cache.positions("hook_embed") == range(5)


def test_a_prompt_of_one_token_is_enough(llama: HookedModel) -> None:
    result = llama.generate([3], max_tokens=2, capture=["hook_embed"])
    assert [r.positions for r in result.activations["hook_embed"]] == [(0, 1), (1, 2)]


def test_edits_apply_to_every_pass(llama: HookedModel) -> None:
    edit = ("blocks.1.hook_mlp_out", lambda value, point: value * 0)
    result = llama.generate(PROMPT, max_tokens=4, fwd_hooks=[edit], capture=["hook_logits", "blocks.1.hook_mlp_out"])
    full = llama.run_with_hooks([PROMPT + result.tokens[:-1]], [edit])
    np.testing.assert_allclose(result.cache.numpy("hook_logits"), np.array(full), rtol=5e-5, atol=5e-5)
    assert not result.cache.numpy(("mlp_out", 1)).any()
    assert result.tokens != llama.generate(PROMPT, max_tokens=4).tokens


def test_between_steps_the_model_is_plain_and_others_may_run(llama: HookedModel) -> None:
    expected = llama.generate(PROMPT, max_tokens=5, capture=["blocks.1.attn.hook_pattern"])
    steps = llama.generate_steps(PROMPT, max_tokens=5, capture=["blocks.1.attn.hook_pattern"])
    tokens, classes = [], {type(module).__call__ for _, module in make_model("llama").named_modules()}
    for step in steps:
        tokens.append(step.token)
        assert {type(module).__call__ for _, module in llama.model.named_modules()} == classes
        llama.run_with_cache([9, 9, 9, 9])
    assert tokens == expected.tokens


def test_closing_the_iterator_ends_the_generation(llama: HookedModel) -> None:
    steps = llama.generate_steps(PROMPT, max_tokens=1000)
    next(steps)
    steps.close()
    assert list(steps) == []


def test_registered_hooks_record_in_every_run_until_unregistered(llama: HookedModel) -> None:
    model = HookedModel(llama.model)
    hook_id = model.register_activation_hook(layer_name="transformer.h.1", component="residual")
    assert hook_id == "transformer.h.1_residual"
    result = model.generate(PROMPT, max_tokens=3)
    assert [r.positions for r in model.captured_activations(hook_id)] == [(0, 5), (5, 6), (6, 7)]
    assert [r.positions for r in result.activations[hook_id]] == [(0, 5), (5, 6), (6, 7)]
    model([1, 2, 3])
    (record,) = model.captured_activations(hook_id)
    _, cache = llama.run_with_cache([1, 2, 3])
    assert mx.array_equal(record.value, cache["resid_post", 1])
    assert (record.layer_name, record.component, record.is_input) == ("transformer.h.1", "residual", False)
    with pytest.raises(HookError, match="registered already"):
        model.register_activation_hook("transformer.h.1", "residual")
    model.unregister_activation_hook(hook_id)
    with pytest.raises(UnknownHookError, match="No hook 'transformer.h.1_residual' is registered. Registered: none"):
        model.unregister_activation_hook(hook_id)
    with pytest.raises(UnknownHookError):
        model.captured_activations(hook_id)
    with pytest.raises(UnknownHookError, match="Unknown layer"):
        model.register_activation_hook("transformer.h.99", "residual")
    model.register_activation_hook("0", "mlp", hook_id="a", capture_input=True)
    model([1, 2])
    assert [r.is_input for r in model.captured_activations("a")] == [True, False]
    model.clear_activation_hooks()
    assert len(model.activation_hook_manager) == 0


def test_registered_hooks_record_beside_a_capture_that_is_asked_for(llama: HookedModel) -> None:
    model = HookedModel(llama.model)
    model.register_activation_hook("1", "residual", hook_id="mine")
    result = model.generate(PROMPT, max_tokens=3, capture=["hook_embed"])
    assert list(result.activations) == ["hook_embed"]
    assert [r.positions for r in model.captured_activations("mine")] == [(0, 5), (5, 6), (6, 7)]
    with pytest.raises(HookError, match="'mine' is registered already: choose another"):
        model.generate(PROMPT, capture=[HookSpec("0", "mlp", "mine")])


def test_interleaved_generations_keep_their_registered_records_apart(llama: HookedModel) -> None:
    model = HookedModel(llama.model)
    model.register_activation_hook("1", "residual", hook_id="mine")
    first, second = model.generate_steps(PROMPT, max_tokens=3), model.generate_steps([7, 8], max_tokens=3)
    next(first), next(second), next(first)
    assert [r.positions for r in model.captured_activations("mine")] == [(0, 2)]
    model.unregister_activation_hook("mine")
    assert len(list(first)) == 1
    assert len(list(second)) == 2


def test_names_that_overlap_capture_each_point_once(llama: HookedModel) -> None:
    for capture in (["hook_embed", "hook_*"], ["hook_embed", "hook_embed"], ["hook_*", "hook_embed"]):
        result = llama.generate(PROMPT, max_tokens=3, capture=capture)
        assert result.cache["hook_embed"].shape == (1, 7, 32)
        assert [r.positions for r in result.activations["hook_embed"]] == [(0, 5), (5, 6), (6, 7)]
    with pytest.raises(HookError, match="'hook_embed' is the name of a captured hook point too"):
        llama.resolve_hooks([HookSpec("transformer.wte", "embedding", "hook_embed"), "hook_embed"])


def test_a_raw_module_path_reads_as_one_sequence_too(llama: HookedModel) -> None:
    names = ["model.layers.1.mlp.up_proj", "blocks.1.mlp.hook_pre_linear"]
    result = llama.generate(PROMPT, max_tokens=3, capture=names)
    assert result.cache[f"{names[0]}.output"].shape == (1, 7, 48)
    assert mx.array_equal(result.cache[f"{names[0]}.output"], result.cache[names[1]])
    assert list(result.cache.positions(f"{names[0]}.output")) == list(range(7))


def test_a_raw_value_without_positions_keeps_its_records_apart(llama: HookedModel) -> None:
    result = llama.generate(PROMPT, max_tokens=2, capture=["model.layers.1.self_attn.rope"])
    records = result.activations["model.layers.1.self_attn.rope.output"]
    assert len(records) == 6  # queries and keys, of the prompt's two passes and of one token
    with pytest.raises(HookError, match="ran 2 times in one forward pass"):
        result.cache["model.layers.1.self_attn.rope.output"]


def test_the_cache_of_a_generation_stands_in_forward_order(llama: HookedModel) -> None:
    result = llama.generate(PROMPT, max_tokens=2, capture=["hook_logits", "blocks.2.*", "hook_embed"])
    assert list(result.cache) == [name for name in llama.hook_points if name in result.cache]


def test_top_k_of_the_whole_vocabulary_leaves_nothing_out(llama: HookedModel) -> None:
    options = {"max_tokens": 6, "temperature": 1.0, "seed": 3}
    expected = llama.generate(PROMPT, **options).tokens
    assert llama.generate(PROMPT, top_k=60, **options).tokens == expected
    assert llama.generate(PROMPT, top_k=10**6, **options).tokens == expected


def test_min_p_leaves_out_the_improbable(llama: HookedModel) -> None:
    greedy = llama.generate(PROMPT, max_tokens=8).tokens
    assert llama.generate(PROMPT, max_tokens=8, temperature=1.5, min_p=1.0, seed=1).tokens == greedy
    assert llama.generate(PROMPT, max_tokens=8, temperature=1.5, seed=1).tokens != greedy


def test_two_hooks_may_ask_for_one_point(llama: HookedModel) -> None:
    specs = [HookSpec("1", "residual", "a"), {"layer_name": "blocks.1", "component": "residual", "hook_id": "b"}]
    result = llama.generate(PROMPT, max_tokens=2, capture=specs)
    assert mx.array_equal(result.activations["a"][0].value, result.activations["b"][0].value)
    assert result.cache["resid_post", 1].shape == (1, 6, 32)
    with pytest.raises(HookError, match="share the hook_id 'a'"):
        llama.resolve_hooks([specs[0], specs[0]])


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "Tokens are a text or whole numbers"),
        ([1, 60], {}, "Token ids are 0 to 59, got 1 to 60"),
        ([-1], {}, "Token ids are 0 to 59"),
        ([1.5], {}, "whole numbers"),
        ([[1, 2], [3]], {}, "differ in length"),
        ([[1, 2], [3, 4]], {}, "takes one prompt, got 2 rows"),
        ("text", {}, "no tokenizer"),
        ([1], {"max_tokens": -1}, "max_tokens is a whole number from 0 up, got -1"),
        ([1], {"max_tokens": 2.5}, "max_tokens is a whole number"),
        ([1], {"top_logprobs": -1}, "top_logprobs is a whole number from 0 up, got -1"),
        ([1], {"top_logprobs": True}, "top_logprobs is a whole number from 0 up, got True"),
        ([1], {"frequency_penalty": float("inf")}, "frequency_penalty is a finite number, got inf"),
        ([1], {"presence_penalty": "1"}, "presence_penalty is a finite number, got '1'"),
        ([1], {"temperature": -0.1}, "temperature is a number from 0 up"),
        ([1], {"top_p": 1.5}, "top_p is a number from 0 to 1"),
        ([1], {"stop": ["x"]}, "Stop strings need a tokenizer"),
        ([1], {"beams": 4}, "generate has no argument 'beams'. Allowed: max_tokens"),
        ([1], {"logit_bias": {99: 1.0}}, "Token 99 is outside the vocabulary"),
        ([1], {"temperature": float("nan")}, "temperature is a number from 0 up, got nan"),
        ([1], {"temperature": 1e-39}, "temperature is 0 or at least 1e-06, got 1e-39"),
        ([1], {"temperature": True}, "temperature is a number"),
        ([1], {"top_k": 1.5}, "top_k is a whole number from 0 up"),
        ([1], {"seed": -1}, "seed is a whole number from 0 to"),
        ([1], {"seed": "x"}, "seed is a whole number"),
        ([1], {"repetition_penalty": -1}, "repetition_penalty is a number from 0 up"),
        ([1], {"logit_bias": [1]}, "logit_bias maps token ids to numbers"),
        ([1], {"stop": 5}, "stop is a string or a list of strings, got 5"),
        ([1], {"capture": 5}, "capture is a list of hook specs and hook-point names, got 5"),
        ([1], {"fwd_hooks": [5]}, r"fwd_hooks is a list of \(name_or_filter, function\), got 5"),
        ([1], {"fwd_hooks": [("hook_embed", 5)]}, "fwd_hooks is a list of"),
        ([1], {"capture": [""]}, "Unknown hook point ''"),
        ([1], {"capture": [".input"]}, "Unknown hook point '.input'"),
        (mx.array([1.0]), {}, "whole numbers"),
        ([1], {"capture": ["blocks.9.hook_resid_post"]}, "Unknown hook point"),
    ],
)
def test_bad_input_is_one_clear_error(llama: HookedModel, prompt: object, options: dict, message: str) -> None:
    with pytest.raises(HookError, match=message):
        llama.generate(prompt, **options)


def test_text_is_mlx_lms(tiny: HookedModel) -> None:
    prompt = tiny.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    replies = list(stream_generate(tiny.model, tiny.tokenizer, prompt, max_tokens=30))
    result = tiny.generate(prompt, max_tokens=30)
    assert result.text == "".join(reply.text for reply in replies)
    assert result.finish_reason == replies[-1].finish_reason == "stop"
    assert result.tokens[-1] in tiny.tokenizer.eos_token_ids


def test_a_stop_string_ends_the_text_wherever_tokens_part(tiny: HookedModel) -> None:
    whole = tiny.generate("The capital of France is", max_tokens=12).text
    for begin in range(1, len(whole) - 1):
        for length in (1, 2, 7):
            stop = whole[begin : begin + length]
            steps = list(tiny.generate_steps("The capital of France is", max_tokens=12, stop=stop))
            assert "".join(step.text for step in steps) == whole[: whole.index(stop)]
            assert steps[-1].finish_reason == "stop"


@pytest.mark.parametrize("detokenizer", ["naive", "bpe"])
def test_a_stop_string_in_what_was_held_back_ends_the_text(detokenizer: str) -> None:
    """The third token is half a character, which is spelled only when nothing more comes."""
    result = byte_model(detokenizer).generate("?", max_tokens=3, stop=["i\ufffd"])
    assert (result.text, result.finish_reason) == ("h", "stop")
    assert byte_model(detokenizer).generate("?", max_tokens=3).finish_reason == "length"


def test_an_end_token_that_comes_last_is_a_stop(tiny: HookedModel) -> None:
    result = tiny.generate("The capital of France is", max_tokens=3)
    assert (result.tokens[-1] in tiny.tokenizer.eos_token_ids, result.finish_reason) == (True, "stop")


def test_a_stop_string_that_never_comes_holds_nothing_back(tiny: HookedModel) -> None:
    whole = tiny.generate("The capital of France is", max_tokens=12)
    stopped = tiny.generate("The capital of France is", max_tokens=12, stop=[whole.text[-3:] + "#", "nowhere"])
    assert stopped.text == whole.text
    assert stopped.finish_reason == whole.finish_reason
