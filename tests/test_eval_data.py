"""What effects are measured on: whatever is given becomes the same examples, and nothing is padded."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_hooks import HookedModel, HookError
from mlx_hooks.analysis import eval_data
from mlx_hooks.analysis.circuits import ablation_study, activation_patching, path_patching
from mlx_hooks.analysis.circuits.edge_runs import EdgeRuns
from mlx_hooks.analysis.circuits.groups import replace_groups
from mlx_hooks.analysis.eval_data import NOTHING, EvalData, EvalExample, eval_data_of

PARIS = {"clean": "The capital of France is", "corrupted": "The capital of Italy is"}


def test_texts_ids_arrays_and_batches_are_the_same_examples(tiny: HookedModel) -> None:
    texts = ["The capital of France is Paris .", "Hello !"]
    ids = [tiny.to_tokens(text)[0].tolist() for text in texts]
    width = max(map(len, ids)) + 3
    padded = mx.array([row + [0] * (width - len(row)) for row in ids])
    lengths = mx.array([[0, len(row)] for row in ids])
    given: list[Any] = [texts, ids, [np.array(row) for row in ids], [(padded, lengths)], iter(texts)]
    first, *others = [eval_data_of(tiny, one).examples for one in given]
    assert first == tuple(EvalExample(tuple(row), (*row[1:], NOTHING)) for row in ids)
    assert all(other == first for other in others)
    data = eval_data_of(tiny, texts)
    assert eval_data_of(tiny, data) is data
    assert (len(data), data.n_targets, data.kind) == (2, len(ids[0]) + len(ids[1]) - 2, "texts")


def test_a_batch_asks_for_what_its_loss_asks_for(tiny: HookedModel) -> None:
    # mlx-lm counts targets from where the prompt ends, and its loss for a row as long as the batch is exactly these.
    tokens, lengths = mx.array([[5, 6, 7, 8, 9]]), mx.array([[3, 5]])
    (example,) = eval_data_of(tiny, [(tokens, lengths)]).examples
    assert example.targets == (NOTHING, NOTHING, 8, 9, NOTHING)
    steps = np.arange(1, 5)
    assert [t for t in example.targets if t != NOTHING] == np.array([6, 7, 8, 9])[(steps >= 3) & (steps <= 5)].tolist()
    # A row of which nothing is asked is no example.
    assert len(eval_data_of(tiny, [(mx.array([[5, 6, 7], [5, 6, 7]]), mx.array([[0, 3], [3, 3]]))])) == 1


def test_endless_batches_are_bounded(tiny: HookedModel) -> None:
    def endless() -> Iterator[tuple[mx.array, mx.array]]:
        while True:
            yield mx.array([[1, 2, 3]] * 4), mx.array([[0, 3]] * 4)

    assert len(eval_data_of(tiny, endless(), max_examples=6)) == 6
    assert len(eval_data_of(tiny, endless())) == 64


def test_what_has_a_length_is_taken_whole_unless_asked_otherwise(tiny: HookedModel) -> None:
    rows = [[1, 2, 3 + i] for i in range(70)]
    assert len(eval_data_of(tiny, rows)) == len(eval_data_of(tiny, np.array(rows))) == 70
    assert len(eval_data_of(tiny, rows, max_examples=3)) == 3


def test_data_that_was_made_before_is_cut_as_lists_are(tiny: HookedModel) -> None:
    rows = [[1, 2, 3, 4, 5], [1, 2], [3, 4, 5, 6]]
    made = eval_data_of(tiny, rows)
    assert eval_data_of(tiny, made, max_examples=3, max_tokens=5) is made
    for limits in ({"max_examples": 2}, {"max_tokens": 3}, {"max_examples": 1, "max_tokens": 2}):
        assert eval_data_of(tiny, made, **limits) == eval_data_of(tiny, rows, **limits)
    late = eval_data_of(tiny, [(mx.array([[1, 2, 3, 4], [1, 2, 3, 4]]), mx.array([[3, 4], [0, 4]]))])
    assert len(eval_data_of(tiny, late, max_tokens=2)) == 1
    with pytest.raises(HookError, match="There is no eval data"):
        eval_data_of(tiny, late, max_examples=1, max_tokens=2)
    answers = eval_data_of(tiny, [PARIS | {"answer": "Paris"}])
    with pytest.raises(HookError, match="Example 0 has 6 tokens; at most 4 are read"):
        eval_data_of(tiny, answers, max_tokens=4)


def test_analyses_run_on_all_that_they_are_given_and_on_as_many_as_are_asked(llama: HookedModel) -> None:
    pairs = [{"clean": [5, 9, i % 50], "corrupted": [4, 9, i % 50], "answer": 7, "wrong": 8} for i in range(70)]
    made = eval_data_of(llama, pairs)
    cell: Any = [{"hook_point": "blocks.2.hook_resid_pre"}]
    for given in (pairs, made):
        assert len(EdgeRuns(llama, given).data) == 70
        assert len(replace_groups(llama, given, [["L1 mlp"]]).plain) == 70
        for n, asked in ((70, {}), (3, {"max_examples": 3})):
            assert len(activation_patching(llama, given, cell, **asked).patched) == n
            assert len(path_patching(llama, given, "logits", senders=["L2 mlp"], **asked).patched) == n
            study = ablation_study(llama, given, {"components": ["blocks"], "ablations": ["zero"], **asked})
            assert study.result["eval_data"]["examples"] == n


PROMPT = EvalExample((1, 2), (NOTHING, 3), (1, 4), 5)


@pytest.mark.parametrize(
    "changed", [{"tokens": (1, 60)}, {"targets": (NOTHING, 60)}, {"corrupted": (60, 4)}, {"wrong": 60}, {"wrong": -2}]
)
def test_data_that_was_made_for_another_model_is_refused(llama: HookedModel, changed: dict[str, Any]) -> None:
    data = EvalData((PROMPT, replace(PROMPT, **changed)), "answers")
    with pytest.raises(HookError, match=r"Example 1 has token (60|-2): ids are 0 to 59") as caught:
        eval_data_of(llama, data)
    assert caught.value.field == "eval_data"


def test_data_that_was_made_for_a_model_that_reads_more_is_fitted(tiny: HookedModel) -> None:
    n = tiny.cfg.max_positions or 0
    long = EvalExample((1,) * (n + 1), (2,) * (n + 1))
    assert eval_data_of(tiny, EvalData((long,), "texts")).to_dict()["cut"] == 1
    asked = replace(long, targets=(*[NOTHING] * n, 2))
    with pytest.raises(HookError, match=f"Example 0 has {n + 1} tokens; at most {n} are read"):
        eval_data_of(tiny, EvalData((asked,), "answers"))


@pytest.mark.parametrize("name", ["max_examples", "max_tokens"])
@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "x"])
def test_limits_are_whole_numbers(tiny: HookedModel, name: str, wrong: Any) -> None:
    for given in ([[1, 2]], eval_data_of(tiny, [[1, 2]])):
        with pytest.raises(HookError, match=f"{name} is a whole number from 1 up, or None") as caught:
            eval_data_of(tiny, given, **{name: wrong})
        assert caught.value.field == name


def test_prompts_with_answers(tiny: HookedModel) -> None:
    paris, rome = (tiny.to_tokens(text)[0, -1].item() for text in ("Paris", "Rome"))
    data = eval_data_of(tiny, [PARIS | {"answer": "Paris", "wrong": rome}])
    (example,) = data.examples
    assert example.targets == (NOTHING,) * 5 + (paris,)
    assert example.wrong == rome
    assert example.corrupted == tuple(tiny.to_tokens(PARIS["corrupted"])[0].tolist())
    assert data.to_dict() == {
        "kind": "answers", "examples": 1, "targets": 1, "corrupted": True, "wrong_answers": True, "cut": 0
    }  # fmt: skip
    bare = eval_data_of(tiny, [{"clean": [0, 5, 6], "answer": 7, "wrong": None}])
    assert not bare.has_corrupted
    assert not bare.has_wrong


def test_batches_hold_examples_of_one_length_and_leave_none_out(tiny: HookedModel) -> None:
    rows = [[1] * n for n in (3, 5, 3, 4, 3, 5)]
    batches = list(eval_data_of(tiny, rows).batches(2))
    assert [batch.indices.tolist() for batch in batches] == [[0, 2], [4], [1, 5], [3]]
    assert all(batch.tokens.shape == (len(batch.indices), len(rows[batch.indices[0]])) for batch in batches)
    assert batches[0].asked.tolist() == [0, 1]


def test_of_long_examples_fewer_run_at_once(tiny: HookedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_data, "TOKENS_AT_ONCE", 9)
    data = eval_data_of(tiny, [[1] * n for n in (3, 3, 3, 3, 12, 12, 4)])
    assert [batch.indices.tolist() for batch in data.batches(8)] == [[0, 1, 2], [3], [4], [5], [6]]
    assert [batch.indices.tolist() for batch in data.batches(2)] == [[0, 1], [2, 3], [4], [5], [6]]


def test_long_texts_lose_their_ends_and_keep_what_they_are_asked(tiny: HookedModel) -> None:
    data = eval_data_of(tiny, [[1, 2, 3, 4, 5], [1, 2]], max_tokens=3)
    assert data.examples[0] == EvalExample((1, 2, 3), (2, 3, 4))
    assert data.n_cut == 1
    late = (mx.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]), mx.array([[4, 5], [0, 5]]))
    assert len(eval_data_of(tiny, [late], max_tokens=2)) == 1
    with pytest.raises(HookError, match="clean of example 0 has 6 tokens; at most 4 are read"):
        eval_data_of(tiny, [PARIS | {"answer": "Paris"}], max_tokens=4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("The capital", "Eval data is a list of texts, .*got str"),
        (None, "got NoneType"),
        ({"clean": "a"}, "got dict"),
        ([], "There is no eval data"),
        ([""], "Example 0 is empty"),
        ([[3]], "Example 0 has one token"),
        ([[1, 2], [1, 10_000]], "Example 1 has token 10000: ids are 0 to 521"),
        ([[1.5, 2]], r"got \[1.5, 2\] as example 0"),
        ([3], "got int as example 0"),
        ([[1, 2], {"clean": [1], "answer": 2}], "of one kind: example 1 has clean, answer, those before texts"),
        ([{"clean": [1], "answer": 2}, {"clean": [1], "answer": 2, "wrong": 3}], "example 1 has clean, answer, wrong"),
        ([{"clean": [1]}], "A prompt has clean and answer, .*; example 0 has clean."),
        ([{"clean": [1], "answer": 2, "right": 3}], "has clean, answer, right"),
        ([{"clean": [1, 2], "corrupted": [1], "answer": 2}], "as many tokens; example 0 has 2 and 1"),
        ([{"clean": [1, 2], "corrupted": [1, 2], "answer": 2}], "clean and corrupted of example 0 are the same"),
        ([{"clean": [1, 2], "answer": 2, "wrong": 2}], "answer and wrong of example 0 are the same token"),
        ([{"clean": [1, 2], "answer": "Paris Rome"}], "answer of example 0: 'Paris Rome' is 2 tokens"),
        ([(mx.array([[1, 2]]), mx.array([[0, 2], [0, 2]]))], "The lengths of batch 0 are .*for 1 rows"),
    ],
)
def test_what_is_no_eval_data_is_refused(tiny: HookedModel, given: Any, message: str) -> None:
    with pytest.raises(HookError, match=message) as caught:
        eval_data_of(tiny, given)
    assert caught.value.field == "eval_data"


def test_text_needs_a_tokenizer(llama: HookedModel) -> None:
    assert isinstance(eval_data_of(llama, [[1, 2]]), EvalData)
    with pytest.raises(HookError, match="no tokenizer"):
        eval_data_of(llama, ["Hello !"])
