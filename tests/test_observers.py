"""Observers of generation: each pass told once, in order, with what an independent forward pass computes."""

import threading
import warnings
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import reference
from observing import LONG, PROMPT, STORY, Everything, Passes, in_chunks
from tiny_models import make_model

from mlx_hooks import (
    ActivationHook,
    AttentionExtractionHook,
    HookedModel,
    HookError,
    InferenceHook,
    ObserverError,
    ObserverWarning,
    SymbolicStreamHook,
    UnsupportedModelError,
)
from mlx_hooks.activations import to_numpy
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.hook_points import HookPoint
from mlx_hooks.hooks import Hook
from mlx_hooks.instrument import attending
from mlx_hooks.observers import Watch, Watched

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
    model = HookedModel(tiny_model(name))

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


def test_an_attention_whose_keys_are_not_known_has_weights_alone() -> None:
    """A layer that attends anew to keys that it made before: which ones, its passes do not say."""
    model = HookedModel(tiny_model("iquestloopcoder"))
    for hook in (Everything(), AttentionExtractionHook(store_values=True)):
        with pytest.raises(HookError, match="iquestloopcoder attends several times with the same ones"):
            model.generate_steps(LONG, hooks=[hook])
    hook = AttentionExtractionHook(0.01, store_matrices=True)
    result = model.generate(LONG, max_tokens=3, hooks=[hook], capture=["blocks.*.attn.hook_pattern"])
    assert {record["pass_index"] for record in hook.attention_data} == {0, 1, 2}
    for record in hook.attention_data:
        pattern = result.cache.of_pass(record["pass_index"]).numpy(("pattern", record["layer"]))[0, record["head"]]
        matrix, begin = record["attention_matrix"], record["position"]
        assert np.array_equal(matrix, pattern[begin : begin + len(matrix), : matrix.shape[1]])


def test_a_pass_that_shows_a_part_of_an_event_is_an_error(llama: HookedModel) -> None:
    watch = Watch(Watched([Everything()], llama.architecture), llama.instrument, None, PROMPT, {})
    watch.begin()
    weights = next(hook for hook in watch.hooks if hook.point.component == "pattern")
    instrument, tokens = llama.instrument, mx.array(PROMPT)
    message = "The attention of layer 0 cannot be told: pass 0 through it showed weights and nothing else"
    with (
        pytest.raises(HookError, match=message),
        watch.following(tokens, 0, "prefill", 0),
        instrument.attached(instrument.plan([weights]), begins=0),
    ):
        llama.model(tokens[None])


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


def test_an_event_that_would_never_come_is_refused(llama: HookedModel) -> None:
    class Mine(AttentionExtractionHook):
        def on_attention_computed(self, *_):
            pass

    message = "Mine overrides on_attention_computed, but AttentionExtractionHook takes all heads at once"
    with pytest.raises(HookError, match=message):
        llama.generate_steps(PROMPT, hooks=[Mine()])

    class Further(AttentionExtractionHook):
        def on_layer_attention(self, layer_idx, attention, *rest):
            super().on_layer_attention(layer_idx, attention, *rest)
            self.data.append(layer_idx)

    hook, plain = Further(), AttentionExtractionHook()
    llama.generate(PROMPT, max_tokens=2, hooks=[hook, plain])
    assert hook.data == [0, 1, 2] * 3
    assert list(hook.attention_data) == list(plain.attention_data)


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
        ({"top_k": True}, "top_k is None or a whole number from 1 up, got True"),
        ({"top_k": 1.0}, "top_k is None or a whole number from 1 up, got 1.0"),
        ({"top_k": 0}, "top_k is None or a whole number from 1 up, got 0"),
        ({"layers": ["0"]}, "layers are None"),
        ({"heads": [-1]}, "heads are None"),
        ({"layers": []}, "layers are None"),
    ],
)
def test_options_of_the_attention_hook_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        AttentionExtractionHook(**options)


def test_numbers_of_numpy_are_numbers() -> None:
    hook = AttentionExtractionHook(np.float32(0.25), top_k=np.int64(3), layers=np.arange(2))
    assert (hook.threshold, hook.top_k, hook.layers) == (0.25, 3, (0, 1))
    assert (type(hook.threshold), type(hook.top_k)) == (float, int)


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
    model = HookedModel(tiny_model("deepseek_v41"))
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


def test_hooked_runs_inside_an_event_do_not_meet_the_pass_that_they_interrupt() -> None:
    """What a softmax of four axes belongs to, in an architecture that writes its attention out."""
    model = HookedModel(tiny_model("gemma2"))

    def look(value: mx.array, point: Any) -> None:
        mx.eval(mx.softmax(mx.zeros((1, 4, 2, 2)), axis=-1))

    class Runs(Everything):
        def on_layer_attention(self, *arguments):
            super().on_layer_attention(*arguments)
            pattern = ("blocks.0.attn.hook_pattern", lambda value, point: None)
            model.run_with_hooks([PROMPT], [("blocks.0.hook_resid_post", look), pattern])

    runs, seen = Runs(), Everything()
    model.generate(PROMPT, max_tokens=2, hooks=[runs])
    model.generate(PROMPT, max_tokens=2, hooks=[seen])
    assert runs.events == seen.events


def test_hooks_of_an_outer_block_are_set_aside_too(llama: HookedModel) -> None:
    expected = np.array(llama([LONG]))
    edit = ("blocks.1.hook_mlp_out", lambda value, point: value * 0)
    events: list[str] = []
    hook = InferenceHook("runs")
    for name in EVENTS:
        if name != "on_layer_attention":

            def event(*_: object, name: str = name) -> None:
                events.append(name)
                assert np.array_equal(np.array(llama([LONG])), expected)

            setattr(hook, name, event)
    with llama.hooks([edit]):
        edited = np.array(llama([LONG]))
        llama.generate(PROMPT, max_tokens=2, hooks=[hook])
        assert np.array_equal(np.array(llama([LONG])), edited)
    assert not np.array_equal(edited, expected)
    assert set(events) == set(EVENTS) - {"on_layer_attention"}


def test_a_generation_inside_an_event_begins_with_rows_of_its_own(
    llama: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attending, "ROWS_OF_A_PART", 3)
    # Too short for parts, which would set rows anew.
    short, alone = PROMPT[:3], AttentionExtractionHook()
    llama.generate(short, max_tokens=2, hooks=[alone])
    inner: list[dict[str, np.ndarray]] = []

    class Runs(AttentionExtractionHook):
        def on_layer_attention(self, layer_idx, attention, *rest):
            super().on_layer_attention(layer_idx, attention, *rest)
            if attention.positions.start == 3:
                hook = AttentionExtractionHook()
                llama.generate(short, max_tokens=2, hooks=[hook])
                inner.append(hook.edge_arrays())

    runs, plain = Runs(), AttentionExtractionHook()
    llama.generate(LONG, max_tokens=2, hooks=[runs])
    llama.generate(LONG, max_tokens=2, hooks=[plain])
    assert len(inner) == llama.cfg.n_layers
    for edges in inner:
        assert all(np.array_equal(edges[name], own) for name, own in alone.edge_arrays().items())
    assert list(runs.attention_data) == list(plain.attention_data)


def test_a_thread_that_is_told_leaves_another_one_s_pass_alone(
    llama: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone is told of a generated token while another thread reads a prompt in parts."""
    monkeypatch.setattr(attending, "ROWS_OF_A_PART", 3)
    run, rows = llama.instrument.run, []

    def tell() -> None:
        with llama.instrument.set_aside():
            rows.append(run.rows)

    def see(value: mx.array, point: HookPoint) -> None:
        before = run.rows
        other = threading.Thread(target=tell)
        other.start()
        other.join(5)
        # It did not wait for this pass, and did not touch it.
        assert not other.is_alive()
        assert run.rows is before
        assert before is not None

    point = llama.hook_points["blocks.1.attn.hook_pattern"]
    instrument = llama.instrument
    with instrument.attached(instrument.plan([Hook(point, see, reads=True, in_parts=True)])):
        llama.model(mx.array([LONG]))
    assert len(rows) == 4
    assert run.rows is None


def test_what_a_generation_computed_is_let_go_at_its_end(llama: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: keys and values of a long generation would wait for the cycle collector."""
    watches: list[Watch] = []
    begin = Watch.begin
    monkeypatch.setattr(Watch, "begin", lambda watch: watches.append(watch) or begin(watch))
    llama.generate(PROMPT, max_tokens=3, hooks=[Everything()])
    steps = llama.generate_steps(PROMPT, max_tokens=3, hooks=[Everything()])
    next(steps)
    assert watches[1]._so_far
    steps.close()
    with pytest.raises(ObserverError):
        llama.generate(PROMPT, max_tokens=3, hooks=[Everything(), Fails("on_ffn_computed")])
    assert len(watches) == 3
    for watch in watches:
        assert (watch.hooks, watch._so_far, watch._partial, watch._latest) == ([], {}, {}, None)


def test_what_one_observer_does_to_what_it_is_shown_no_other_sees(llama: HookedModel) -> None:
    class Spoils(InferenceHook):
        def on_generation_begin(self, prompt_tokens, state):
            prompt_tokens.clear()

        def on_layer_attention(self, layer_idx, attention, tokens, position, state):
            tokens.clear()
            attention.weights[:] = 0

        def on_ffn_computed(self, layer_idx, ffn_input, ffn_output, tokens, position, state):
            tokens.clear()
            ffn_input[:] = 0

        def on_forward_end(self, logits, position, state):
            logits[:] = 0

    seen, plain = [Everything(), AttentionExtractionHook(), ActivationHook()], [Everything(), AttentionExtractionHook()]
    llama.generate(PROMPT, max_tokens=3, hooks=[Spoils("spoils"), *seen])
    llama.generate(PROMPT, max_tokens=3, hooks=plain)
    assert seen[0].events == plain[0].events
    for place, passes in plain[0].attention.items():
        for mine, own in zip(seen[0].attention[place], passes, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(mine, own, strict=True))
    assert seen[1].attention_data == plain[1].attention_data
    assert (len(seen[1].tokens), len(seen[2].tokens), seen[1].prompt_length) == (7, 7, 5)
    assert all(record["input_norm"] > 0 for record in seen[2].activations)
    assert all(np.any(logits) for logits in seen[0].logits)


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


def test_a_hook_is_told_of_one_generation_at_a_time(llama: HookedModel) -> None:
    hook = AttentionExtractionHook()
    older = llama.generate_steps(PROMPT, max_tokens=5, hooks=[hook])
    next(older)
    llama.generate(LONG, max_tokens=3, hooks=[hook])
    edges = hook.n_edges
    with pytest.raises(HookError, match="observes a later generation by now: give each one that runs its own hook"):
        next(older)
    assert hook.n_edges == edges
    older = llama.generate_steps(PROMPT, max_tokens=5, hooks=[hook])
    next(older)
    llama.generate(LONG, max_tokens=3, hooks=[hook])
    # One that was left alone may be closed.
    older.close()


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
