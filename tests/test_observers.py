"""Observers of generation: each pass told once, in order, with what an independent forward pass computes."""

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import networkx
import numpy as np
import pytest
import reference
from tiny_models import CONFIGS, make_model

from mlx_hooks import (
    ActivationHook,
    AttentionExtractionHook,
    HookedModel,
    HookError,
    InferenceHook,
    LayerAttention,
    ObserverError,
    ObserverWarning,
    SymbolicStreamHook,
    UnsupportedModelError,
    create_attention_extraction_hook,
    run_generation,
)
from mlx_hooks.activations import to_numpy
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.generation import Sampling, generate_steps
from mlx_hooks.instrument import attending
from mlx_hooks.observers import Watch, Watched

PROMPT = [1, 5, 9, 3, 7]
LONG = list(range(1, 12))
STORY = "When Mary and John went to the store , John gave a drink to"


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> HookedModel:
    return HookedModel(make_model(request.param))


@pytest.fixture(scope="module")
def llama() -> HookedModel:
    return HookedModel(make_model("llama"))


class Everything(InferenceHook):
    """Writes down every event, its arrays as NumPy's."""

    def __init__(self) -> None:
        super().__init__("everything")
        self.events: list[tuple[Any, ...]] = []
        self.attention: dict[tuple[int, int], list[tuple[np.ndarray, ...]]] = {}
        self.ffn: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        self.logits: list[np.ndarray] = []
        self.ids: list[int] = []
        self.tokens: list[str] = []
        self.state: dict[str, Any] = {}

    def on_generation_begin(self, prompt_tokens, state):
        self.events.append(("begin", prompt_tokens))
        self.state = dict(state)

    def on_generation_end(self, generated_tokens, state):
        self.events.append(("end", generated_tokens, state["finish_reason"]))

    def on_forward_begin(self, input_ids, position, state):
        self.events.append(("forward", position, state["phase"], state["step"], state["positions"]))
        self.ids += input_ids[0].tolist()
        assert state["token_ids"] == self.ids

    def on_forward_end(self, logits, position, state):
        self.events.append(("logits", position))
        self.logits.append(to_numpy(logits))

    def on_attention_computed(self, layer_idx, head_idx, attention_weights, query, key, value, tokens, position, state):
        self.events.append(("attention", layer_idx, head_idx, position))
        arrays = tuple(to_numpy(array) for array in (attention_weights, query, key, value))
        self.attention.setdefault((layer_idx, head_idx), []).append(arrays)
        assert len(tokens) == attention_weights.shape[-1]
        self.tokens = tokens

    def on_ffn_computed(self, layer_idx, ffn_input, ffn_output, tokens, position, state):
        self.events.append(("ffn", layer_idx, position))
        self.ffn.setdefault(layer_idx, []).append((to_numpy(ffn_input), to_numpy(ffn_output)))


def in_chunks(model: HookedModel, prompt: list[int], hooks: list[InferenceHook], size: int, max_tokens: int) -> list:
    """Generated ids, with the prompt read in chunks of ``size``."""
    options = {"max_tokens": max_tokens, "sampling": Sampling(), "stop": [], "plan": model.resolve_hooks([])}
    watched = Watched(hooks, model.architecture)
    steps = generate_steps(model.instrument, None, prompt, prefill_step_size=size, watched=watched, **options)
    return [step.token for step in steps]


# The events


def test_events_come_pass_by_pass_in_forward_order(llama: HookedModel) -> None:
    seen = Everything()
    tokens = llama.generate(PROMPT, max_tokens=3, hooks=[seen]).tokens
    layers = [
        [*(("attention", layer, head) for head in range(4)), ("ffn", layer)] for layer in range(llama.cfg.n_layers)
    ]

    def events(position: int, stop: int, phase: str, step: int) -> list[tuple[Any, ...]]:
        inside = [(*event, position) for layer in layers for event in layer]
        return [("forward", position, phase, step, range(position, stop)), *inside, ("logits", position)]

    assert seen.events == [
        ("begin", [str(token) for token in PROMPT]),
        *events(0, 4, "prefill", 0),
        *events(4, 5, "prefill", 0),
        *events(5, 6, "decode", 1),
        *events(6, 7, "decode", 2),
        ("end", [str(token) for token in tokens], "length"),
    ]
    # The last generated token is never fed to the model.
    assert seen.ids == PROMPT + tokens[:-1]
    assert seen.tokens == [str(token) for token in seen.ids]
    settings = {"temperature": 0.0, "top_k": None, "max_new_tokens": 3, "prompt_length": 5}
    assert {name: seen.state[name] for name in settings} == settings


@pytest.mark.parametrize("chunk", [2048, 3])
def test_arrays_are_those_of_one_forward_pass(model: HookedModel, chunk: int) -> None:
    """Each query row once; keys and values of all positions so far, those that the head reads."""
    seen = Everything()
    tokens = in_chunks(model, LONG, [seen], chunk, max_tokens=4)
    assert tokens == model.generate(LONG, max_tokens=4).tokens
    fed = LONG + tokens[:-1]
    expected = reference.forward(model.model, [fed])
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    assert len(seen.attention) == model.cfg.n_layers * model.cfg.n_heads
    for (layer, head), passes in seen.attention.items():
        at = f"blocks.{layer}.attn"
        begin = 0
        for weights, query, key, value in passes:
            stop = begin + weights.shape[1]
            for got, name, part in [
                (weights[0], "hook_pattern", np.s_[0, head, begin:stop, :stop]),
                (query[0], "hook_rot_q", np.s_[0, begin:stop, head]),
                (key[0], "hook_rot_k", np.s_[0, :stop, head // group]),
                (value[0], "hook_v", np.s_[0, :stop, head // group]),
                ((weights @ value)[0], "hook_z", np.s_[0, begin:stop, head]),
            ]:
                np.testing.assert_allclose(got, expected[f"{at}.{name}"][part], atol=5e-5, err_msg=f"{at}.{name}")
            begin = stop
        assert begin == len(fed)
    for layer, passes in seen.ffn.items():
        for i, name in enumerate(("mlp.hook_in", "hook_mlp_out")):
            whole = np.concatenate([arrays[i] for arrays in passes], axis=1)
            np.testing.assert_allclose(whole, expected[f"blocks.{layer}.{name}"], atol=5e-5)
    np.testing.assert_allclose(np.concatenate(seen.logits, axis=1), expected["hook_logits"], atol=2e-4)


def test_weights_are_the_captured_pattern_bit_for_bit(llama: HookedModel) -> None:
    seen = Everything()
    result = llama.generate(LONG, max_tokens=4, hooks=[seen], capture=["blocks.*.attn.hook_pattern"])
    for (layer, head), passes in seen.attention.items():
        pattern = result.cache.numpy(("pattern", layer))[0, head]
        begin = 0
        for weights, *_ in passes:
            stop = begin + weights.shape[1]
            assert np.array_equal(weights[0], pattern[begin:stop, : weights.shape[2]])
            begin = stop


@pytest.mark.parametrize(
    "name",
    ["gemma2", "gemma3_text", "gpt_oss", "deepseek_v2", "gemma3n", "nanbeige", "llama4_text", "qwen3_next", "granite"],
)
def test_weights_times_values_are_z_on_other_architectures(name: str) -> None:
    """Hand-written softmax, sliding windows, sinks, latents, shared keys, several passes, mixers beside attention."""
    try:
        model = HookedModel(tiny_model(name))
    except HookError as error:
        pytest.skip(str(error))

    class Z(InferenceHook):
        def __init__(self):
            super().__init__("z")
            self.rows: dict[tuple[int, int, int], list[np.ndarray]] = {}

        def on_attention_computed(self, layer, head, weights, query, key, value, tokens, position, state):
            for i, row in enumerate(to_numpy(weights @ value.astype(mx.float32))[0]):
                self.rows.setdefault((layer, head, position + i), []).append(row)

    seen = Z()
    result = model.generate(LONG, max_tokens=4, hooks=[seen], capture=["blocks.*.attn.hook_z"])
    compared = 0
    for records in result.cache.records.values():
        for record in records:
            for i, position in enumerate(record.position_ids):
                for head, z in enumerate(record.numpy()[0, i]):
                    row = seen.rows[record.hook_point.layer, head, position][record.pass_index]
                    np.testing.assert_allclose(row, z, atol=1e-4 * max(1, np.abs(z).max()))
                    compared += 1
    assert compared == sum(len(rows) for rows in seen.rows.values()) > 0


def test_observers_change_nothing(model: HookedModel) -> None:
    plain = list(model.generate_steps(LONG, max_tokens=6))
    hooks = [Everything(), AttentionExtractionHook(), ActivationHook()]
    seen = list(model.generate_steps(LONG, max_tokens=6, hooks=hooks))
    assert [(step.token, step.logprob) for step in seen] == [(step.token, step.logprob) for step in plain]


def test_events_show_what_interventions_made(llama: HookedModel) -> None:
    seen, plain = Everything(), Everything()
    edits = [{"hook_point": "blocks.1.attn.hook_pattern", "type": "scale", "factor": 0.5, "heads": [2]}]
    llama.generate(PROMPT, max_tokens=3, hooks=[seen], interventions=edits)
    llama.generate(PROMPT, max_tokens=3, hooks=[plain])
    for edited, own in zip(seen.attention[1, 2][:2], plain.attention[1, 2][:2], strict=True):
        np.testing.assert_allclose(edited[0], own[0] / 2, rtol=1e-6)
    assert np.array_equal(seen.attention[1, 1][0][0], plain.attention[1, 1][0][0])
    # What an edit makes larger than a softmax can be is kept all the same.
    edits[0] |= {"factor": 40.0}
    hook = AttentionExtractionHook(threshold=0.9, layers=[1], heads=[2])
    llama.generate(PROMPT, max_tokens=1, hooks=[hook], interventions=edits)
    whole = plain.attention[1, 2][0][0][0] * 40
    got = [(e["target_pos"], e["source_pos"]) for record in hook.attention_data for e in record["edges"]]
    assert [pair for pair in got if pair[0] < 4] == [tuple(pair) for pair in np.argwhere(whole > 0.9).tolist()]


# What costs


class Passes(InferenceHook):
    def on_forward_begin(self, input_ids, position, state):
        self.data.append(position)


def watched_names(hooks: list[InferenceHook], model: HookedModel) -> set[str]:
    watch = Watch(Watched(hooks, model.architecture), model.instrument, None, PROMPT, {})
    return {hook.point.component for hook in watch.hooks}


def test_only_what_an_event_shows_is_captured(llama: HookedModel) -> None:
    off = Everything()
    off.enabled = False
    assert watched_names([Passes("passes"), SymbolicStreamHook(), off], llama) == set()
    assert watched_names([ActivationHook()], llama) == {"mlp_in", "mlp_out"}
    assert watched_names([AttentionExtractionHook()], llama) == {"pattern"}
    assert watched_names([AttentionExtractionHook(store_values=True)], llama) == {"pattern", "v"}
    assert watched_names([Everything()], llama) == {"pattern", "rot_q", "rot_k", "v", "mlp_in", "mlp_out"}
    some = Watch(Watched([AttentionExtractionHook(layers=[1])], llama.architecture), llama.instrument, None, PROMPT, {})
    assert [hook.point.name for hook in some.hooks] == ["blocks.1.attn.hook_pattern"]


def test_a_hook_without_attention_events_leaves_the_kernel_alone(
    llama: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the pattern was computed")

    monkeypatch.setattr(attending, "attention_scores", never)
    hook = Passes("passes")
    llama.generate(PROMPT, max_tokens=3, hooks=[hook, ActivationHook()])
    assert hook.data == [0, 4, 5, 6]
    with pytest.raises(AssertionError):
        llama.generate(PROMPT, max_tokens=3, hooks=[AttentionExtractionHook()])


def test_a_hook_that_is_off_is_not_told(llama: HookedModel) -> None:
    hook = Passes("passes")
    hook.enabled = False
    llama.generate(PROMPT, max_tokens=2, hooks=[hook])
    assert hook.data == []
    assert repr(hook) == "Passes('passes', enabled=False)"


def test_an_event_may_be_set_on_the_instance(llama: HookedModel) -> None:
    hook = InferenceHook("plain")
    hook.on_forward_begin = lambda input_ids, position, state: hook.data.append(position)  # type: ignore[method-assign]
    llama.generate(PROMPT, max_tokens=2, hooks=[hook])
    assert hook.data == [0, 4, 5]


# Errors


class Fails(InferenceHook):
    def __init__(self, event: str) -> None:
        super().__init__("fails")

        def fail(*_: object) -> None:
            raise ZeroDivisionError("of mine")

        setattr(self, event, fail)


EVENTS = [
    "on_generation_begin",
    "on_forward_begin",
    "on_attention_computed",
    "on_layer_attention",
    "on_ffn_computed",
    "on_forward_end",
    "on_generation_end",
]


@pytest.mark.parametrize("event", EVENTS)
def test_what_a_hook_raises_is_raised(llama: HookedModel, event: str) -> None:
    with pytest.raises(ObserverError, match=rf"The hook 'fails' failed in {event}: ZeroDivisionError: of mine") as met:
        llama.generate(PROMPT, max_tokens=3, hooks=[Fails(event)])
    assert isinstance(met.value.__cause__, ZeroDivisionError)
    assert (met.value.name, met.value.event) == ("fails", event)
    # The model is plain again.
    assert type(llama.model).__name__ == "Model"
    assert "_neuroscope_site" not in llama.model.layers[0].__dict__
    assert (
        llama.generate(PROMPT, max_tokens=3).tokens
        == HookedModel(make_model("llama")).generate(PROMPT, max_tokens=3).tokens
    )


@pytest.mark.parametrize("event", EVENTS)
def test_errors_may_be_collected(llama: HookedModel, event: str) -> None:
    hook, other = Fails(event), Passes("passes")
    with pytest.warns(ObserverWarning, match="The hook 'fails' failed in") as warned:
        result = llama.generate(PROMPT, max_tokens=3, hooks=[hook, other], hook_errors="collect")
    assert len(warned) == 1
    assert result.tokens == llama.generate(PROMPT, max_tokens=3).tokens
    assert other.data == [0, 4, 5, 6]
    expected = {"on_generation_begin": 1, "on_generation_end": 1, "on_forward_begin": 4, "on_forward_end": 4}
    expected |= {"on_attention_computed": 4 * 3, "on_layer_attention": 4 * 3, "on_ffn_computed": 4 * 3}
    assert len(hook.errors) == expected[event]
    assert all(isinstance(error.__cause__, ZeroDivisionError) and error.event == event for error in hook.errors)


def test_an_interrupt_is_no_error_of_a_hook(llama: HookedModel) -> None:
    hook = Passes("stops")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    hook.on_forward_end = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llama.generate(PROMPT, max_tokens=3, hooks=[hook], hook_errors="collect")


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ([AttentionExtractionHook], "hooks is a list of InferenceHook objects, got the class AttentionExtractionHook"),
        (AttentionExtractionHook(), "hooks is a list of InferenceHook objects, got AttentionExtractionHook("),
        (["attention"], "got 'attention' in it"),
        (None, "hooks is a list of InferenceHook objects, got None"),
        ([AttentionExtractionHook(layers=[3])], "asks for layer 3: layers are 0 to 2"),
        ([AttentionExtractionHook(heads=[4])], "asks for head 4: layer 0 has heads 0 to 3"),
        ([ActivationHook([0, 7])], "asks for layer 7: layers are 0 to 2"),
    ],
)
def test_what_cannot_be_observed_is_said_before_the_run(llama: HookedModel, hooks: Any, message: str) -> None:
    with pytest.raises(HookError, match=message.replace("(", r"\(")):
        llama.generate_steps(PROMPT, hooks=hooks)


def test_a_hook_is_made_and_listed_once(llama: HookedModel) -> None:
    class Bare(InferenceHook):
        def __init__(self) -> None:
            pass

    with pytest.raises(HookError, match=r"Bare.__init__ has to call super\(\).__init__\(name\)"):
        llama.generate_steps(PROMPT, hooks=[Bare()])
    hook = Passes("passes")
    with pytest.raises(HookError, match="is listed twice"):
        llama.generate_steps(PROMPT, hooks=[hook, hook])
    with pytest.raises(HookError, match="hook_errors is 'raise' or 'collect', got 'ignore'"):
        llama.generate_steps(PROMPT, hook_errors="ignore")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "threshold is a number from 0 to below 1, got 1.0"),
        ({"threshold": float("nan")}, "threshold is a number"),
        ({"threshold": "0.1"}, "threshold is a number"),
        ({"top_k": 0}, "top_k is None or a whole number from 1 up, got 0"),
        ({"layers": ["0"]}, "layers are None"),
        ({"heads": [-1]}, "heads are None"),
        ({"layers": []}, "layers are None"),
    ],
)
def test_options_of_the_attention_hook_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        AttentionExtractionHook(**options)


def test_a_model_without_attention_says_so() -> None:
    model = HookedModel(tiny_model("mamba"))
    with pytest.raises(HookError, match="would see nothing: mamba has no attention pattern to show"):
        model.generate_steps(PROMPT, hooks=[AttentionExtractionHook()])
    # Other events are as everywhere.
    hook = Passes("passes")
    model.generate(PROMPT, max_tokens=2, hooks=[hook])
    assert hook.data == [0, 4, 5]


def test_layers_without_attention_are_passed_by_unless_they_are_named() -> None:
    model = HookedModel(tiny_model("qwen3_next"))
    with_attention = [p.layer for p in model.hook_points.values() if p.component == "pattern"]
    assert 0 < len(with_attention) < model.cfg.n_layers
    hook = AttentionExtractionHook()
    model.generate(PROMPT, max_tokens=2, hooks=[hook])
    assert sorted({record["layer"] for record in hook.attention_data}) == with_attention
    other = next(layer for layer in range(model.cfg.n_layers) if layer not in with_attention)
    with pytest.raises(HookError, match=f"would see nothing: layer {other} of qwen3_next has no attention pattern"):
        model.generate_steps(PROMPT, hooks=[AttentionExtractionHook(layers=[other])])


def test_what_is_there_and_cannot_be_shown_is_said_with_its_reason() -> None:
    try:
        model = HookedModel(tiny_model("deepseek_v41"))
    except HookError as error:
        pytest.skip(str(error))
    with pytest.raises(UnsupportedModelError, match="has no blocks.0.attn.hook_pattern: each query attends"):
        model.generate_steps(PROMPT, hooks=[AttentionExtractionHook()])


# When


def test_the_end_is_told_when_a_generation_is_closed_and_not_after_an_error(llama: HookedModel) -> None:
    seen = Everything()
    steps = llama.generate_steps(PROMPT, max_tokens=9, hooks=[seen])
    first = next(steps)
    steps.close()
    assert seen.events[-1] == ("end", [str(first.token)], "closed")
    # The pass that ran ahead is not told.
    assert [event[1] for event in seen.events if event[0] == "forward"] == [0, 4]
    seen = Everything()
    with pytest.raises(ObserverError):
        llama.generate(PROMPT, max_tokens=3, hooks=[seen, Fails("on_ffn_computed")])
    assert seen.events[-1][0] != "end"


def test_the_end_is_told_once_before_the_last_step(llama: HookedModel) -> None:
    seen = Everything()
    steps = llama.generate_steps(PROMPT, max_tokens=2, hooks=[seen])
    next(steps)
    assert seen.events[-1][0] == "logits"
    next(steps)
    assert seen.events[-1][0] == "end"
    steps.close()
    assert [event[0] for event in seen.events].count("end") == 1
    seen = Everything()
    llama.generate(PROMPT, max_tokens=0, hooks=[seen])
    assert seen.events[-1] == ("end", [], "length")
    assert seen.ids == PROMPT


def test_a_pass_that_ran_ahead_of_an_end_token_is_not_told(tiny: HookedModel) -> None:
    seen = Everything()
    result = tiny.generate(STORY, max_tokens=20, hooks=[seen])
    assert result.finish_reason == "stop"
    assert seen.ids == result.prompt_tokens + result.tokens[:-1]
    assert seen.events[-1] == ("end", ["Mary", ".", "<eos>"], "stop")


def test_while_an_event_runs_the_model_is_plain_and_may_be_used(model: HookedModel) -> None:
    expected = np.array(model([LONG]))
    outcome = model.generate(PROMPT, max_tokens=3)

    class Runs(Everything):
        def on_layer_attention(self, layer_idx, attention, tokens, position, state):
            super().on_layer_attention(layer_idx, attention, tokens, position, state)
            assert "_neuroscope_site" not in model.model.layers[0].__dict__
            assert np.array_equal(np.array(model([LONG])), expected)
            # A softmax of four axes, as attention that is written out has it, is nobody's.
            mx.eval(mx.softmax(mx.zeros((1, 4, 2, 2)), axis=-1))

    runs, seen = Runs(), Everything()
    assert model.generate(PROMPT, max_tokens=3, hooks=[runs]).tokens == outcome.tokens
    model.generate(PROMPT, max_tokens=3, hooks=[seen])
    assert runs.events == seen.events
    for place, passes in seen.attention.items():
        for mine, own in zip(runs.attention[place], passes, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(mine, own, strict=True))


def test_generations_that_take_turns_tell_their_own_observers(llama: HookedModel) -> None:
    alone = [Everything(), Everything()]
    for hook, prompt in zip(alone, (PROMPT, LONG), strict=True):
        llama.generate(prompt, max_tokens=4, hooks=[hook])
    turns = [Everything(), Everything()]
    runs = [
        llama.generate_steps(prompt, max_tokens=4, hooks=[hook])
        for hook, prompt in zip(turns, (PROMPT, LONG), strict=True)
    ]
    for _ in zip(*runs, strict=True):
        pass
    assert [hook.events for hook in turns] == [hook.events for hook in alone]


# Attention as edges


def independent_edges(model: HookedModel, fed: list[int], threshold: float) -> dict[tuple[int, int], set]:
    """(layer, head) -> {(source, target)} from one NumPy forward pass."""
    values = reference.forward(model.model, [fed])
    found = {}
    for layer in range(model.cfg.n_layers):
        for head, pattern in enumerate(values[f"blocks.{layer}.attn.hook_pattern"][0]):
            found[layer, head] = {(int(key), int(query)) for query, key in np.argwhere(pattern > threshold)}
    return found


@pytest.mark.parametrize("rows_of_a_part", [256, 3])
@pytest.mark.parametrize("chunk", [2048, 4])
def test_edges_are_the_weights_above_the_threshold_each_once(
    model: HookedModel, chunk: int, rows_of_a_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attending, "ROWS_OF_A_PART", rows_of_a_part)
    hook = create_attention_extraction_hook(threshold=0.15)
    tokens = in_chunks(model, LONG, [hook], chunk, max_tokens=5)
    fed = LONG + tokens[:-1]
    expected = independent_edges(model, fed, 0.15)
    values = reference.forward(model.model, [fed])
    got: dict[tuple[int, int], list] = {}
    for record in hook.attention_data:
        edges = got.setdefault((record["layer"], record["head"]), [])
        for edge in record["edges"]:
            edges.append((edge["source_pos"], edge["target_pos"]))
            pattern = values[f"blocks.{record['layer']}.attn.hook_pattern"][0, record["head"]]
            assert edge["weight"] == pytest.approx(pattern[edge["target_pos"], edge["source_pos"]], abs=2e-5)
            assert edge["source_token"] == str(fed[edge["source_pos"]])
            assert edge["target_token"] == str(fed[edge["target_pos"]])
    assert {place: set(edges) for place, edges in got.items()} == expected
    assert all(len(edges) == len(set(edges)) for edges in got.values())


def test_records_are_the_seed_s(llama: HookedModel) -> None:
    hook = AttentionExtractionHook(threshold=0.2)
    llama.generate(PROMPT, max_tokens=3, hooks=[hook])
    data = hook.attention_data
    # Two passes of the prompt, one of each generated token that was fed; in each all layers and heads.
    places = [(record["position"], record["layer"], record["head"]) for record in data]
    assert places == [(at, layer, head) for at in (0, 4, 5, 6) for layer in range(3) for head in range(4)]
    assert len(data) == 48
    assert data[-1] == data[47] == data[40:][-1]
    with pytest.raises(IndexError):
        data[48]
    record = data[0]
    assert set(record) == {"layer", "head", "position", "tokens", "edges", "generation_context"}
    assert record["tokens"] == [str(token) for token in PROMPT[:4]]
    assert record["generation_context"] == {"prompt_length": 5, "total_length": 4}
    assert set(record["edges"][0]) == {"source_pos", "target_pos", "weight", "source_token", "target_token"}
    assert json.dumps(record)
    assert data[-1]["generation_context"] == {"prompt_length": 5, "total_length": 7}
    assert hook.n_edges == sum(len(record["edges"]) for record in data)


def test_a_hook_holds_the_latest_generation(llama: HookedModel) -> None:
    hook = AttentionExtractionHook()
    llama.generate(LONG, max_tokens=3, hooks=[hook])
    llama.generate(PROMPT, max_tokens=1, hooks=[hook])
    fresh = AttentionExtractionHook()
    llama.generate(PROMPT, max_tokens=1, hooks=[fresh])
    assert list(hook.attention_data) == list(fresh.attention_data)
    hook.clear()
    assert (list(hook.attention_data), hook.tokens, hook.n_edges) == ([], [], 0)


def test_hooks_of_different_thresholds_layers_and_heads_do_not_meet(llama: HookedModel) -> None:
    hooks = [
        AttentionExtractionHook(0.05),
        AttentionExtractionHook(0.3, layers=[1], heads=[2, 0]),
        AttentionExtractionHook(0.2, top_k=1, heads=[3]),
    ]
    llama.generate(LONG, max_tokens=4, hooks=hooks)
    whole = hooks[0].edge_arrays()

    def edges(arrays: dict[str, np.ndarray], chosen: Any = slice(None)) -> list[tuple]:
        names = ("layer", "head", "source", "target", "weight")
        return sorted(zip(*(arrays[name][chosen].tolist() for name in names), strict=True))

    chosen = (whole["weight"] > 0.3) & (whole["layer"] == 1) & np.isin(whole["head"], [0, 2])
    assert edges(hooks[1].edge_arrays()) == edges(whole, chosen)
    best: dict[tuple, tuple] = {}
    for layer, head, source, target, weight in edges(whole):
        if head == 3 and weight > 0.2 and weight > best.get((layer, target), (0, 0))[1]:
            best[layer, target] = (source, weight)
    expected = sorted((layer, 3, source, target, weight) for (layer, target), (source, weight) in best.items())
    assert edges(hooks[2].edge_arrays()) == expected
    assert [record["head"] for record in hooks[1].attention_data[:2]] == [0, 2]


@pytest.mark.parametrize("threshold", [0.0, 0.02])
@pytest.mark.parametrize("top_k", [1, 2, 3, 50])
def test_top_k_keeps_the_strongest_of_each_row_and_of_equal_ones_the_earlier(threshold: float, top_k: int) -> None:
    from mlx_hooks.observers.edges import strongest

    rng = np.random.default_rng(0)
    # Few different weights, so that many are equal.
    weights = (rng.integers(0, 5, (3, 8, 40)) / 100).astype(np.float32)
    found = strongest(weights, threshold, top_k)
    got = list(zip(found.heads.tolist(), found.rows.tolist(), found.keys.tolist(), strict=True))
    expected = []
    for head in range(3):
        for row in range(8):
            ranked = sorted(range(40), key=lambda key: (-weights[head, row, key], key))[:top_k]
            expected += [(head, row, key) for key in sorted(ranked) if weights[head, row, key] > threshold]
    assert got == expected
    assert found.weights.tolist() == [weights[place] for place in expected]


@pytest.mark.parametrize("rows_of_a_part", [256, 3])
def test_values_are_those_of_the_source_that_the_head_reads(
    model: HookedModel, rows_of_a_part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attending, "ROWS_OF_A_PART", rows_of_a_part)
    hook = AttentionExtractionHook(threshold=0.1, store_values=True)
    tokens = model.generate(LONG, max_tokens=4, hooks=[hook]).tokens
    values = reference.forward(model.model, [LONG + tokens[:-1]])
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    compared = 0
    for record in hook.attention_data:
        v = values[f"blocks.{record['layer']}.attn.hook_v"][0]
        for edge in record["edges"]:
            np.testing.assert_allclose(edge["value"], v[edge["source_pos"], record["head"] // group], atol=5e-5)
            compared += 1
    assert compared == hook.n_edges > 0
    edge = hook.get_edges_for_layer_head(2, 3)[0]
    np.testing.assert_allclose(
        edge["value"], values["blocks.2.attn.hook_v"][0, edge["source_pos"], 3 // group], atol=5e-5
    )


def test_matrices_are_kept_when_asked_for(llama: HookedModel) -> None:
    hook, seen = AttentionExtractionHook(store_matrices=True, heads=[1, 3]), Everything()
    llama.generate(LONG, max_tokens=3, hooks=[hook, seen])
    passes: dict[tuple[int, int], list] = {}
    for record in hook.attention_data:
        passes.setdefault((record["layer"], record["head"]), []).append(record["attention_matrix"])
    assert len(passes) == 6
    for place, matrices in passes.items():
        for matrix, (weights, *_) in zip(matrices, seen.attention[place], strict=True):
            assert np.array_equal(matrix, weights[0])


def test_a_layer_that_runs_twice_says_which_time() -> None:
    try:
        model = HookedModel(tiny_model("nanbeige"))
    except HookError as error:
        pytest.skip(str(error))
    hook = AttentionExtractionHook(0.05, store_values=True)
    result = model.generate(PROMPT, max_tokens=2, hooks=[hook], capture=["blocks.*.attn.hook_v"])
    assert {record["pass_index"] for record in hook.attention_data} == {0, 1}
    for record in hook.attention_data:
        v = result.cache.of_pass(record["pass_index"]).numpy(("v", record["layer"]))[0]
        for edge in record["edges"]:
            np.testing.assert_allclose(
                edge["value"], v[edge["source_pos"], record["head"] * v.shape[1] // model.cfg.n_heads], atol=1e-5
            )


def test_edges_of_a_head_come_strongest_first(llama: HookedModel) -> None:
    hook = AttentionExtractionHook(0.1)
    llama.generate(LONG, max_tokens=4, hooks=[hook])
    edges = hook.get_edges_for_layer_head(layer=1, head=2)
    every = [e for r in hook.attention_data if (r["layer"], r["head"]) == (1, 2) for e in r["edges"]]
    assert edges == sorted(every, key=lambda edge: -edge["weight"])
    assert edges[0]["weight"] > edges[-1]["weight"]
    with pytest.raises(HookError, match=r"No attention of layer 7 was seen. There are: 0, 1, 2."):
        hook.get_edges_for_layer_head(7, 0)
    with pytest.raises(HookError, match=r"No attention of head 9 of layer 0 was seen. There are: 0, 1, 2, 3."):
        hook.get_edges_for_layer_head(0, 9)


def test_a_summary_tells_what_was_received_as_key_and_given_as_query(tiny: HookedModel) -> None:
    hook = AttentionExtractionHook(0.1)
    result = tiny.generate(STORY, max_tokens=3, hooks=[hook])
    fed = result.prompt_tokens + result.tokens[:-1]
    _, cache = tiny.run_with_cache([fed], "blocks.*.attn.hook_pattern")
    patterns = np.stack([cache.numpy(("pattern", layer))[0] for layer in range(4)])
    patterns = np.where(patterns > 0.1, patterns, 0)
    where = [i for i, token in enumerate(fed) if tiny.tokenizer.decode([token]) == "John"]
    assert len(where) == 2
    summary = hook.get_token_attention_summary("John")
    assert summary["positions"] == where
    assert summary["total_received"] == pytest.approx(patterns[..., where].sum(), abs=1e-3)
    assert summary["total_given"] == pytest.approx(patterns[:, :, where].sum(), abs=1e-3)
    assert summary["total_received"] != pytest.approx(summary["total_given"], abs=0.1)
    one = hook.get_token_attention_summary(position=where[1])
    assert (one["token"], one["positions"]) == ("John", [where[1]])
    assert one["total_received"] == pytest.approx(patterns[..., where[1]].sum(), abs=1e-3)
    strongest = one["given_attention"][0]
    layer, head, key = np.unravel_index(patterns[:, :, where[1]].argmax(), patterns[:, :, where[1]].shape)
    assert (strongest["layer"], strongest["head"], strongest["to_position"]) == (layer, head, key)
    assert strongest["to"] == tiny.tokenizer.decode([fed[key]])
    assert {"from", "from_position", "weight", "layer", "head"} == set(one["received_attention"][0])
    # As key and as query, by position and by text.
    received, given = hook.attention_received_as_key(), hook.attention_given_as_query()
    assert list(received) == sorted(received, key=lambda position: -received[position])
    for position in range(len(fed)):
        assert received.get(position, 0) == pytest.approx(patterns[..., position].sum(), abs=1e-3)
        assert given.get(position, 0) == pytest.approx(patterns[:, :, position].sum(), abs=1e-3)
    assert hook.attention_received_as_key("token")["John"] == pytest.approx(summary["total_received"])
    assert hook.attention_given_as_query("token")["John"] == pytest.approx(summary["total_given"])
    with pytest.raises(HookError, match="by is 'position' or 'token', got 'head'"):
        hook.attention_received_as_key("head")


def test_a_summary_of_what_is_not_there(tiny: HookedModel) -> None:
    hook = AttentionExtractionHook(0.1)
    tiny.generate(STORY, max_tokens=1, hooks=[hook])
    empty = hook.get_token_attention_summary("elephant")
    assert (empty["positions"], empty["total_received"], empty["total_given"]) == ([], 0.0, 0.0)
    for position in (15, -1, True, 1.0):
        with pytest.raises(HookError, match="Positions 0 to 14 were read, got"):
            hook.get_token_attention_summary(position=position)
    for arguments in ({}, {"token": "a", "position": 1}):
        with pytest.raises(HookError, match="give one of them"):
            hook.get_token_attention_summary(**arguments)


def test_blanks_around_a_token_count_only_if_they_are_given() -> None:
    hook = AttentionExtractionHook(0.1)
    hook.on_generation_begin([" the", "the", "the "], {})
    weights = mx.array([[[[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]]])
    attention = LayerAttention(weights, range(3), (0,), 1)
    hook.on_layer_attention(0, attention, [" the", "the", "the "], 0, {})
    assert hook.get_token_attention_summary("the")["positions"] == [0, 1, 2]
    assert hook.get_token_attention_summary(" the")["positions"] == [0]


def test_memory_grows_with_the_edges_that_are_kept(tiny: HookedModel) -> None:
    prompt = tiny.to_tokens([5 + i % 500 for i in range(600)])
    few, many = AttentionExtractionHook(0.5), AttentionExtractionHook(0.02)
    tiny.generate(prompt, max_tokens=2, hooks=[few, many])
    assert few.n_edges < many.n_edges
    for hook in (few, many):
        assert hook.nbytes <= 14 * hook.n_edges + 30 * 3 * 4
    # All weights would take 600 * 600 * 4 * 16 bytes.
    assert few.nbytes < 600 * 600 * 4 * 16 / 50


def test_no_python_object_is_made_per_weight(tiny: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt's weights, millions of them, are selected as arrays, some rows of all heads at a time."""
    from mlx_hooks.observers import extraction

    shapes: list[tuple[int, ...]] = []
    select = extraction.strongest
    monkeypatch.setattr(extraction, "strongest", lambda w, *rest: shapes.append(w.shape) or select(w, *rest))
    monkeypatch.setattr(AttentionExtractionHook, "_shown", None)
    tiny.generate(tiny.to_tokens([5 + i % 500 for i in range(600)]), max_tokens=2, hooks=[AttentionExtractionHook()])
    # 599 rows in parts with the keys that they can see, the prompt's last row, a generated token; in each of 4 layers.
    assert shapes == [(4, 256, 256), (4, 256, 512), (4, 87, 599)] * 4 + [(4, 1, 600)] * 4 + [(4, 1, 601)] * 4


def test_parts_are_the_whole_with_sinks_and_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gpt_oss", "gemma3_text", "deepseek_v2", "gemma2", "mistral3"):
        try:
            model = HookedModel(tiny_model(name))
        except HookError:
            continue
        whole, parts = AttentionExtractionHook(0.01, store_matrices=True), AttentionExtractionHook(0.01)
        model.generate(LONG, max_tokens=3, hooks=[whole])
        monkeypatch.setattr(attending, "ROWS_OF_A_PART", 4)
        model.generate(LONG, max_tokens=3, hooks=[parts])
        monkeypatch.undo()
        one, other = whole.edge_arrays(), parts.edge_arrays()
        order = [np.lexsort([edges[key] for key in ("source", "target", "head", "layer")]) for edges in (one, other)]
        assert whole.n_edges > 20
        for key in ("layer", "head", "source", "target"):
            assert np.array_equal(one[key][order[0]], other[key][order[1]]), name
        np.testing.assert_allclose(one["weight"][order[0]], other["weight"][order[1]], atol=1e-6)
        assert len(whole.attention_data) == len(parts.attention_data)


# The graph


def test_json_is_the_seed_s_strict_and_whole(tiny: HookedModel, tmp_path: Path) -> None:
    hook = AttentionExtractionHook(0.2, store_values=True)
    tiny.generate(STORY, max_tokens=3, hooks=[hook])
    target = tmp_path / "attention.json"
    hook.save_json(target)
    assert list(tmp_path.iterdir()) == [target]

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(target.read_text(), parse_constant=refuse)
    assert read == hook.to_dict()
    records = list(hook.attention_data)
    assert read["attention_records"] == len(records) == len(read["full_data"]) == 64
    for shown, record in zip(read["full_data"], records, strict=True):
        total = shown["generation_context"]["total_length"]
        assert read["tokens"][:total] == record["tokens"]
        assert [edge["weight"] for edge in shown["edges"]] == [edge["weight"] for edge in record["edges"]]
        for a, b in zip(shown["edges"], record["edges"], strict=True):
            assert a["value"] == b["value"].tolist()
    for name, stats in read["layer_head_stats"].items():
        layer, head = (int(part[1:]) for part in name.split("_"))
        weights = [e["weight"] for r in records if (r["layer"], r["head"]) == (layer, head) for e in r["edges"]]
        assert stats["edge_count"] == len(weights)
        assert stats["avg_weight"] == pytest.approx(np.mean(weights))
        assert stats["max_weight"] == max(weights)
    assert len(read["layer_head_stats"]) == 16
    totals: dict[str, float] = {}
    for edge in (edge for record in records for edge in record["edges"]):
        totals[edge["source_token"]] = totals.get(edge["source_token"], 0) + edge["weight"]
    assert dict(read["top_attended_tokens"]) == pytest.approx(totals)
    weights = [total for _, total in read["top_attended_tokens"]]
    assert weights == sorted(weights, reverse=True)
    assert set(read["unique_tokens"]) <= set(read["tokens"])


def test_the_graph_runs_from_key_to_query(tiny: HookedModel, tmp_path: Path) -> None:
    hook = AttentionExtractionHook(0.2)
    tiny.generate(STORY, max_tokens=3, hooks=[hook])
    made = hook.to_networkx()
    assert isinstance(made, networkx.MultiDiGraph)
    assert made.nodes[2] == {"token": "Mary", "position": 2, "prompt": True}
    assert not made.nodes[16]["prompt"]
    assert made.number_of_edges() == hook.n_edges
    # Attention is causal: information flows forward.
    assert all(source <= target for source, target in made.edges())
    received = {node: sum(data["weight"] for *_, data in made.out_edges(node, data=True)) for node in made}
    assert {node: total for node, total in received.items() if total} == pytest.approx(hook.attention_received_as_key())
    by_text = hook.to_networkx(by="token")
    assert by_text.nodes["John"]["count"] == 2
    assert sum(data["count"] for *_, data in by_text.edges(data=True)) == hook.n_edges
    total = sum(data["weight"] for *_, data in by_text.out_edges("John", data=True))
    assert total == pytest.approx(hook.attention_received_as_key("token")["John"])
    target = tmp_path / "attention.graphml"
    hook.save_graphml(target)
    read = networkx.read_graphml(target, node_type=int, force_multigraph=True)
    assert list(tmp_path.iterdir()) == [target]
    assert dict(read.nodes(data=True)) == dict(made.nodes(data=True))

    def plain(graph: networkx.MultiDiGraph) -> list:
        return sorted((a, b, d["layer"], d["head"], d["weight"]) for a, b, d in graph.edges(data=True))

    assert plain(read) == plain(made)
    hook.save_graphml(target, by="token")
    read = networkx.read_graphml(target, force_multigraph=True)
    assert plain(read) == plain(by_text)
    with pytest.raises(HookError, match="by is 'position' or 'token', got 'layer'"):
        hook.to_networkx(by="layer")


def test_what_xml_has_no_character_for_is_written_out(tmp_path: Path) -> None:
    tokens = ["a\x00b", "\ud800", "<&>\"'", "\U0001f600", "\ufffe", "\n"]
    hook = AttentionExtractionHook(0.1)
    hook.on_generation_begin(tokens, {})
    hook.on_layer_attention(0, LayerAttention(mx.eye(6)[None, None], range(6), (0,), 1), tokens, 0, {})
    for by in ("position", "token"):
        hook.save_graphml(tmp_path / "a.graphml", by=by)
        read = networkx.read_graphml(tmp_path / "a.graphml", force_multigraph=True)
        texts = {data["token"] for _, data in read.nodes(data=True)}
        assert texts == {"a\\x00b", "\\ud800", "<&>\"'", "\U0001f600", "\\ufffe", "\n"}
    hook.save_json(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["tokens"] == tokens


@pytest.mark.parametrize("save", [AttentionExtractionHook.save_json, AttentionExtractionHook.save_graphml])
def test_a_file_that_cannot_be_written_loses_nothing(save: Any, tmp_path: Path, monkeypatch: Any) -> None:
    hook = AttentionExtractionHook(0.1)
    with pytest.raises(HookError, match="cannot write .*no/such/a.json"):
        save(hook, tmp_path / "no" / "such" / "a.json")
    with pytest.raises(HookError, match="it is a folder; name a file in it"):
        save(hook, tmp_path)
    target = tmp_path / "a.json"
    target.write_text("older")

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("json.dump", full)
    monkeypatch.setattr("networkx.write_graphml", full)
    with pytest.raises(HookError, match="No space left on device"):
        save(hook, target)
    assert target.read_text() == "older"
    assert list(tmp_path.iterdir()) == [target]


# MLPs and streams


def test_norms_of_mlps_are_kept_by_layer_and_position(llama: HookedModel) -> None:
    hook = ActivationHook(layers_to_track=[2, 0], store_activations=True)
    tokens = llama.generate(LONG, max_tokens=3, hooks=[hook]).tokens
    fed = LONG + tokens[:-1]
    values = reference.forward(llama.model, [fed])
    seen = {}
    for record in hook.activations:
        layer, position = record["layer"], record["position"]
        seen[layer, position] = record
        read = values[f"blocks.{layer}.mlp.hook_in"][0, position]
        added = values[f"blocks.{layer}.hook_mlp_out"][0, position]
        np.testing.assert_allclose(record["ffn_input"], read, atol=5e-5)
        np.testing.assert_allclose(record["ffn_output"], added, atol=5e-5)
        assert record["input_norm"] == pytest.approx(np.sqrt((read**2).sum()), rel=1e-4)
        assert record["output_norm"] == pytest.approx(np.sqrt((added**2).sum()), rel=1e-4)
        assert record["tokens"] == [str(token) for token in fed[: position + 1]]
    assert sorted(seen) == [(layer, position) for layer in (0, 2) for position in range(len(fed))]
    assert len(hook.activations) == len(seen)
    short = ActivationHook([])
    llama.generate(PROMPT, max_tokens=1, hooks=[short])
    assert {record["layer"] for record in short.activations} == {0, 1, 2}
    assert set(short.activations[0]) == {"layer", "position", "input_norm", "output_norm", "tokens"}


def test_streams_are_followed_where_they_are_declared() -> None:
    model = HookedModel(make_model("llama"))
    model.model.layers[0].stream_type = "symbolic"
    model.model.layers[2].self_attn.stream_type = "contextual"
    hook, seen, types = SymbolicStreamHook(), Everything(), []
    spy = InferenceHook("spy")
    spy.on_layer_attention = lambda layer, *rest: types.append((layer, rest[-1].get("stream_type")))
    spy.attention_wanted = lambda streams: AttentionExtractionHook().attention_wanted(streams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(PROMPT, max_tokens=2, hooks=[hook, seen, spy])
    places = [(r["position"], r["layer"], r["head"], r["stream_type"]) for r in hook.stream_data]
    kinds = {0: "symbolic", 2: "contextual"}
    assert places == [(at, layer, head, kinds[layer]) for at in (0, 4, 5) for layer in (0, 2) for head in range(4)]
    turns = {at: i for i, at in enumerate((0, 4, 5))}
    for record in hook.stream_data:
        weights = seen.attention[record["layer"], record["head"]][turns[record["position"]]][0]
        assert record["attention_norm"] == pytest.approx(np.sqrt((weights.astype(np.float64) ** 2).sum()), rel=1e-5)
    assert seen.state["streams"] == kinds
    assert types[:3] == [(0, "symbolic"), (1, None), (2, "contextual")]


def test_a_model_without_streams_is_said_once(llama: HookedModel) -> None:
    hook = SymbolicStreamHook()
    with pytest.warns(ObserverWarning, match="declares no streams"):
        llama.generate(PROMPT, max_tokens=2, hooks=[hook])
    llama.generate(PROMPT, max_tokens=2, hooks=[hook])
    assert hook.stream_data == []


# run_generation


def test_run_generation_answers_prompt_and_text(tiny: HookedModel) -> None:
    hook = create_attention_extraction_hook(threshold=0.1, store_values=False)
    ids, text = run_generation(tiny, tiny.tokenizer, STORY, None, 5, temperature=0.0, hooks=[hook])
    expected = tiny.generate(STORY, max_tokens=5)
    assert ids == expected.prompt_tokens + expected.tokens
    assert text == f"{STORY} Mary ."
    assert len(hook.attention_data) == 16 * 4
    assert hook.tokens == [*tiny.to_str_tokens(STORY), "Mary", "."]


def test_run_generation_takes_mlx_lm_s_models_and_any_tokenizer(tiny: HookedModel) -> None:
    class Plain:
        eos_token_id = 3

        def encode(self, text: str) -> list[int]:
            return tiny.tokenizer.encode(text)

        def decode(self, ids: list[int]) -> str:
            return tiny.tokenizer.decode(ids)

    expected = run_generation(tiny, None, STORY, max_new_tokens=5, temperature=0.0)
    inner = tiny.tokenizer._tokenizer
    for model, tokenizer in [(tiny.model, tiny.tokenizer), (tiny.model, inner), (tiny, inner)]:
        assert run_generation(model, tokenizer, STORY, max_new_tokens=5, temperature=0.0) == expected
    hook = AttentionExtractionHook()
    ids, text = run_generation(tiny, Plain(), STORY, max_new_tokens=5, temperature=0.0, hooks=[hook], stop=["."])
    assert (ids, hook.tokens[2]) == (expected[0][:-1], "Mary")
    assert text == tiny.tokenizer.decode(ids)
    assert tiny.tokenizer is not None
    assert type(tiny.tokenizer).__name__ == "TokenizerWrapper"


def test_run_generation_draws_as_generate_does(tiny: HookedModel) -> None:
    options = {"temperature": 1.0, "top_k": 5, "seed": 3}
    ids, _ = run_generation(tiny, None, STORY, max_new_tokens=8, **options)
    expected = tiny.generate(STORY, max_tokens=8, **options)
    assert ids == expected.prompt_tokens + expected.tokens


@pytest.mark.parametrize("device", [None, "cpu", mx.cpu, mx.Device(mx.cpu, 0)])
def test_run_generation_computes_where_it_is_told(tiny: HookedModel, device: Any) -> None:
    before = mx.default_device()
    used: list[Any] = []
    hook = Passes("device")
    hook.on_forward_end = lambda logits, position, state: used.append(mx.default_device())  # type: ignore[method-assign]
    run_generation(tiny, None, STORY, device, max_new_tokens=2, temperature=0, hooks=[hook])
    assert set(map(str, used)) == {str(mx.Device(mx.cpu, 0)) if device is not None else str(before)}
    assert mx.default_device() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "tpu"}, "device is None, 'cpu', 'gpu'"),
        ({"prompt_text": ["a"]}, "prompt_text is a text, got list"),
        ({"tokenizer": 3}, "The tokenizer has no encode: give one with encode and decode, got 3"),
        ({"max_new_tokens": -1}, "max_tokens is a whole number from 0 up, got -1"),
        ({"max_new_tokens": 2.5}, "max_tokens is a whole number from 0 up, got 2.5"),
        ({"top_p": 2}, "top_p is a number from 0 to 1"),
        ({"sings": True}, "generate has no argument 'sings'"),
        ({"hooks": ["x"]}, "hooks is a list of InferenceHook objects"),
    ],
)
def test_what_run_generation_cannot_do_is_one_sentence(tiny: HookedModel, arguments: dict, message: str) -> None:
    with pytest.raises(HookError, match=message):
        run_generation(**{"model": tiny, "tokenizer": None, "prompt_text": STORY} | arguments)


@pytest.mark.skipif(mx.is_available(mx.gpu), reason="this MLX has a GPU")
def test_a_device_that_is_not_there_is_said(tiny: HookedModel) -> None:
    for device in ("mps", "gpu", "cuda:0", mx.gpu):
        with pytest.raises(HookError, match="This MLX cannot compute on .*: give 'cpu', or None"):
            run_generation(tiny, None, STORY, device, max_new_tokens=2)


def test_the_bar_is_on_standard_error_when_asked_for(tiny: HookedModel, capsys: pytest.CaptureFixture) -> None:
    run_generation(tiny, None, STORY, max_new_tokens=3, temperature=0.0)
    assert capsys.readouterr() == ("", "")
    run_generation(tiny, None, STORY, max_new_tokens=3, temperature=0.0, show_progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3/3" in shown.err
