"""Scores token by token equal those recomputed in float64 from one full pass; prompts are read and put as asked."""

import json
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import make_model

from mlx_hooks import HookedModel, HookError, TraitVector, watch_traits
from mlx_hooks.analysis.identity import ModelIdentity
from mlx_hooks.analysis.traits.prompts import Chat, read_prompts, render
from mlx_hooks.analysis.traits.watching import TraitStep
from mlx_hooks.coverage.models import tiny_model
from mlx_hooks.loading import load

FITS = TraitVector("t", 0, "given", np.ones(32))
PROMPT = [3, 14, 15, 9, 26]


def random_vectors(model: HookedModel, layers: list[int]) -> list[TraitVector]:
    numbers = np.random.default_rng(3)
    return [
        TraitVector(f"trait {i}", layer, "given", numbers.normal(size=model.cfg.d_model) * (i + 1))
        for i, layer in enumerate(layers)
    ]


def watched(model: HookedModel, vectors: list[TraitVector], **options: Any) -> tuple[list[TraitStep], np.ndarray]:
    """The steps, and all scores [pos, trait]."""
    steps = list(watch_traits(model, PROMPT, vectors, **{"max_tokens": 6} | options))
    return steps, np.concatenate([step.scores for step in steps])


def recomputed(model: HookedModel, ids: list[int], vectors: list[TraitVector], normalize: bool = True) -> np.ndarray:
    """Scores in float64 of one full pass over all tokens."""
    _, cache = model.run_with_cache(ids, [vector.hook_point for vector in vectors])
    columns = []
    for vector in vectors:
        v = vector.vector.astype(np.float64)
        stream = cache.numpy(vector.hook_point)[0].astype(np.float64)
        columns.append(stream @ (v / np.sqrt((v * v).sum()) if normalize else v))
    return np.stack(columns, axis=-1)


@pytest.mark.parametrize("normalize", [True, False])
def test_scores_are_those_of_a_full_pass_at_every_token(model: HookedModel, normalize: bool) -> None:
    # Layers out of order, and two traits at one layer.
    vectors = random_vectors(model, [1, 0, 1])
    steps, scores = watched(model, vectors, normalize=normalize)
    ids = [token for step in steps for token in step.token_ids]
    assert [p for step in steps for p in step.positions] == list(range(len(PROMPT) + 6))
    assert ids == [*PROMPT, *model.generate(PROMPT, max_tokens=6).tokens]
    assert [step.phase for step in steps] == ["prompt"] + ["response"] * 6
    assert [step.finish_reason for step in steps] == [None] * 6 + ["length"]
    np.testing.assert_allclose(scores, recomputed(model, ids, vectors, normalize), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["mamba2", "gpt_oss", "nanbeige", "deepseek_v3"])
def test_other_kinds_of_layers(name: str) -> None:
    model = HookedModel(tiny_model(name))
    vectors = random_vectors(model, [model.cfg.n_layers - 1, 0])
    steps = list(watch_traits(model, PROMPT, vectors, max_tokens=3))
    ids = [token for step in steps for token in step.token_ids]
    scores = np.concatenate([step.scores for step in steps])
    _, cache = model.run_with_cache(ids, [vector.hook_point for vector in vectors])
    last = cache.of_pass(max(r.pass_index for records in cache.records.values() for r in records))
    for j, vector in enumerate(vectors):
        stream = last.numpy(vector.hook_point)[0].astype(np.float64)
        np.testing.assert_allclose(scores[:, j], stream @ vector.unit.astype(np.float64), rtol=2e-3, atol=2e-4)


def test_a_prompt_alone_is_read(llama: HookedModel) -> None:
    steps, scores = watched(llama, random_vectors(llama, [0]), max_tokens=0)
    assert [step.finish_reason for step in steps] == ["length"]
    np.testing.assert_allclose(scores, recomputed(llama, PROMPT, random_vectors(llama, [0])), rtol=1e-4, atol=1e-5)


def test_no_more_is_generated_than_the_model_reads(tiny: HookedModel) -> None:
    vectors = random_vectors(tiny, [2])
    limit = tiny.cfg.max_positions
    assert limit is not None
    steps = list(watch_traits(tiny, [5] * (limit - 2), vectors, max_tokens=50, temperature=1.0, seed=4))
    assert steps[-1].positions.stop == limit
    assert [step.finish_reason for step in list(watch_traits(tiny, [5] * limit, vectors))] == ["length"]
    with pytest.raises(HookError, match=f"The prompt has {limit + 1} tokens; the model reads at most {limit}"):
        watch_traits(tiny, [5] * (limit + 1), vectors)


def test_an_end_token_has_scores_too(tiny: HookedModel) -> None:
    vectors = random_vectors(tiny, [1])
    tokens = render(tiny, "What is the capital of France ?")
    steps = list(watch_traits(tiny, tokens, vectors, max_tokens=30))
    assert steps[-1].tokens == ["<eos>"]
    assert steps[-1].finish_reason == "stop"
    ids = [token for step in steps for token in step.token_ids]
    scores = np.concatenate([step.scores for step in steps])
    np.testing.assert_allclose(scores, recomputed(tiny, ids, vectors), rtol=1e-4, atol=1e-4)


def test_a_text_is_put_as_a_chat_where_that_is_asked_for(tiny: HookedModel) -> None:
    vectors = random_vectors(tiny, [1])
    (plain,) = watch_traits(tiny, "hello", vectors, max_tokens=0)
    (put,) = watch_traits(tiny, "hello", vectors, chat=Chat(), max_tokens=0)
    assert plain.tokens == ["<bos>", "hello"]
    assert put.token_ids == render(tiny, "hello", Chat())
    assert len(put.token_ids) > 2


def test_one_prompt_is_watched_and_token_ids_are_put_already(llama: HookedModel) -> None:
    vectors = random_vectors(llama, [0])
    for several in ([[2, 5], [2, 6]], mx.array([[2, 5], [2, 6]])):
        with pytest.raises(HookError, match=r"^Traits are watched on one prompt, got 2 rows\.$"):
            watch_traits(llama, several, vectors)
    (step,) = watch_traits(llama, [[2, 5]], vectors, max_tokens=0)
    assert step.token_ids == [2, 5]
    with pytest.raises(HookError, match="chat is how a text is put to a model: token ids are put already"):
        watch_traits(llama, [2, 5], vectors, chat=Chat())


@pytest.mark.parametrize("chat", [Chat(), Chat(use=False), Chat(template="{{ messages[0].content }}")])
def test_too_long_a_prompt_is_told_by_us_alone(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the tokenizer too, which would promise an indexing error, and does so once for each."""
    model = HookedModel.from_pretrained("neuroscope-tiny")
    told: list[str] = []
    logger = logging.getLogger("transformers.tokenization_utils_base")
    monkeypatch.setattr(logger, "warning", lambda text, *rest, **_: told.append(text))
    with pytest.raises(HookError, match="The prompt has .* tokens; the model reads at most 128"):
        render(model, "hello " * 200, chat)
    assert told == []


def test_a_vector_of_another_model_is_refused(llama: HookedModel) -> None:
    other = HookedModel(make_model("llama", seed=1))
    vector = TraitVector("t", 0, "given", np.ones(32), identity=ModelIdentity.of(other))
    with pytest.raises(HookError, match="t/given_layer0 is of another model: its weights differ"):
        watch_traits(llama, PROMPT, [vector])
    (step,) = watch_traits(llama, PROMPT, [vector], max_tokens=0, other_model=True)
    assert len(step.scores) == len(PROMPT)


def test_steering_moves_the_score_by_the_vectors_length(llama: HookedModel) -> None:
    (vector,) = random_vectors(llama, [1])
    edits = [vector.intervention(2.5)]
    (plain,), before = watched(llama, [vector], max_tokens=0)
    (steered,), after = watched(llama, [vector], max_tokens=0, interventions=edits)
    np.testing.assert_allclose(after - before, 2.5 * vector.norm, rtol=1e-5)
    _, raw = watched(llama, [vector], max_tokens=0, normalize=False)
    _, moved = watched(llama, [vector], max_tokens=0, normalize=False, interventions=edits)
    np.testing.assert_allclose(moved - raw, 2.5 * vector.norm**2, rtol=1e-5)
    assert steered.interventions[0].positions == tuple(range(len(PROMPT)))
    assert plain.interventions == ()


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        *((wrong, "vectors is a list of at least one TraitVector") for wrong in ([], 5, "t", None, [np.ones(32)])),
        *((of([FITS]), "vectors is a list of at least one TraitVector") for of in (iter, np.array)),
        (FITS, "vectors is a list of at least one TraitVector"),
        ([TraitVector("t", 0, "given", np.ones(5))], "t/given_layer0 is 5 wide; the stream of llama is 32"),
        ([TraitVector("t", 9, "given", np.ones(32))], "t/given_layer9 is of layer 9; llama has layers 0 to 2"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(llama: HookedModel, vectors: Any, message: str) -> None:
    with pytest.raises(HookError, match=message):
        watch_traits(llama, PROMPT, vectors)


# Vectors


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vector": np.zeros(4)}, "is 0 everywhere: it has no direction"),
        ({"vector": [1.0, float("nan")]}, "holds numbers that are not finite"),
        ({"vector": [1e39, 0.0]}, "holds numbers that are not finite"),
        ({"vector": np.ones((2, 2))}, r"is a list of numbers \[d_model\]"),
        ({"vector": ["1"]}, r"is a list of numbers \[d_model\]"),
        ({"vector": []}, r"is a list of numbers \[d_model\]"),
        ({"method": "guess"}, "Unknown method 'guess'. There are: probe, mean_diff, ica, gradient"),
        ({"layer": -1}, "A layer is a whole number from 0 up"),
        ({"layer": True}, "A layer is a whole number from 0 up"),
        ({"trait": ""}, "A trait has a name"),
        ({"threshold": float("inf")}, "A threshold is a finite number"),
    ],
)
def test_what_is_no_vector_is_refused(changed: dict[str, Any], message: str) -> None:
    asked: dict[str, Any] = {"trait": "t", "layer": 0, "method": "probe", "vector": [1.0, 2.0]}
    with pytest.raises(HookError, match=message):
        TraitVector(**asked | changed)


def test_scores_and_dot_products_of_activations() -> None:
    vector = TraitVector("t", 3, "given", mx.array([3.0, 4.0], mx.bfloat16))
    assert vector.norm == 5
    assert vector.hook_point == "blocks.3.hook_resid_post"
    assert vector.score(mx.array([[1.0, 0.5]])).tolist() == [pytest.approx(1.0)]
    assert vector.dot(np.array([1.0, 0.5])) == 5
    with pytest.raises(HookError, match="measures values that are 2 wide"):
        vector.score(np.ones(3))


# Prompts


def test_a_prompt_goes_through_the_models_template_or_the_traits_own(tiny: HookedModel) -> None:
    def spelled(chat: Chat | None) -> str:
        return " ".join(tiny.to_str_tokens(render(tiny, "hello", chat)))

    assert spelled(None) == spelled(Chat(use=True)) == "<bos> <|user|> hello <|assistant|>"
    assert spelled(Chat(use=False)) == "<bos> hello"
    assert "<|system|> Help" in spelled(Chat(system="Help"))
    own = "{% for m in messages %}{{ m['content'] }} the {% endfor %}"
    assert spelled(Chat(template=own)).endswith("hello the")


def test_a_model_without_a_template_reads_the_text(tiny: HookedModel) -> None:
    model = HookedModel(*load("neuroscope-tiny"))
    model.tokenizer.has_chat_template = False
    assert render(model, "hello") == render(tiny, "hello", Chat(use=False))
    with pytest.raises(HookError, match="llama has no chat template: give the trait one, or leave chat out"):
        render(model, "hello", Chat(use=True))


@pytest.mark.parametrize(
    ("prompt", "chat", "message"),
    [
        ("", None, "A prompt is a text that is not empty"),
        (" \n", None, "A prompt is a text that is not empty"),
        ("word " * 200, Chat(use=False), "The prompt has 201 tokens; the model reads at most 128"),
        ("hello", Chat(template="{{ raise_exception('no') }}"), "The chat template refuses the prompt 'hello': no"),
        ("hello", Chat(template="{% for"), "The chat template refuses the prompt 'hello'"),
    ],
)
def test_what_cannot_be_put_is_said(tiny: HookedModel, prompt: str, chat: Chat | None, message: str) -> None:
    with pytest.raises(HookError, match=message):
        render(tiny, prompt, chat)


def test_a_chat_is_plain_json_and_back() -> None:
    chat = Chat(use=True, system="s", template="t")
    assert Chat.from_dict(json.loads(json.dumps(chat.to_dict()))) == chat
    assert Chat.from_dict(None) == Chat()
    for wrong in ({"sytem": "s"}, ["use"], {"use": "yes"}, {"use": False, "system": "s"}, {"template": 3}):
        with pytest.raises(HookError):
            Chat.from_dict(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.txt", "One\n\n two \n", ["One", " two "]),
        ("bom.txt", "\ufeffOne\r\ntwo", ["One", "two"]),
        ("a.json", '["One\\nline", "two", ""]', ["One\nline", "two"]),
    ],
)
def test_prompts_of_a_file(tmp_path: Path, name: str, content: str, prompts: list[str]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\n", "a.txt has no prompts: it needs at least one"),
        ("a.txt", b"", "a.txt has no prompts"),
        ("a.txt", b"\xff\xfe\xfd", "a.txt cannot be read"),
        ("a.txt", None, "There is no file"),
        ("a.csv", b"x", "Prompts are read from .txt or .json"),
        ("a.json", b"{", "a.json is no JSON"),
        ("a.json", b'{"a": 1}', "a.json is to be a list of texts"),
        ("a.json", b"[1]", "a.json is to be a list of texts"),
    ],
)
def test_files_without_prompts_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(HookError, match=message):
        read_prompts(tmp_path / name)


def test_a_folder_is_no_file_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(HookError, match="cannot be read: Is a directory"):
        read_prompts(tmp_path / "a.txt")


def test_a_model_without_tokenizer_reads_tokens_only() -> None:
    with pytest.raises(HookError, match="This model has no tokenizer"):
        render(HookedModel(make_model("llama")), "hello")
