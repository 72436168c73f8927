"""``run_generation``: a model, a prompt and observers in one call."""

from typing import Any

import mlx.core as mx
import pytest
from observing import STORY, Passes

from mlx_hooks import (
    AttentionExtractionHook,
    HookedModel,
    HookError,
    create_attention_extraction_hook,
    run_generation,
)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 5, "max_new_tokens": 2}, "run_generation takes max_new_tokens, not max_tokens"),
        ({"capture": ["blocks.*.hook_resid_post"]}, "capture with model.generate"),
    ],
)
def test_options_that_would_come_to_nothing_are_refused(
    tiny: HookedModel, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(HookError, match=message):
        run_generation(tiny, tiny.tokenizer, STORY, **options)
