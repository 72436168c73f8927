"""The weights that are shipped do what their model card says, on samples that training never showed."""

from __future__ import annotations

import random
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from jinja2 import TemplateError
from mlx_lm import generate, load
from mlx_lm.models.llama import Model, ModelArgs
from neuroscope_tiny import corpus, evaluation

FOLDER = Path(__file__).parents[1] / "mlx_hooks" / "bundled" / "neuroscope-tiny"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, tokenizer = load(str(FOLDER))
    return model, tokenizer


@pytest.fixture(scope="module")
def figures(loaded: tuple[Any, Any]) -> dict[str, Any]:
    return evaluation.measure(*loaded)


def say(loaded: tuple[Any, Any], question: str) -> str:
    return evaluation.reply(*loaded, [{"role": "user", "content": question}]).strip()


# ---- What it can do --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "least"),
    [
        ("indirect object", 0.95),
        ("capitals", 1.0),
        ("sums", 0.95),
        ("sums, trained pairs", 0.95),
        ("chat", 0.95),
        ("chat, trained exchanges", 1.0),
        ("repetition, period 5", 0.9),
        ("repetition, period 10", 0.9),
        ("repetition, period 20", 0.9),
        ("repetition, period 30", 0.9),
    ],
)
def test_held_out_samples_are_answered(figures: dict[str, Any], task: str, least: float) -> None:
    assert figures[task] >= least


@pytest.mark.parametrize("kind", ["induction head", "previous-token head"])
def test_a_head_of_each_kind_scores_over_0_6(figures: dict[str, Any], kind: str) -> None:
    assert figures[kind][2] > 0.6


@pytest.mark.parametrize("place", corpus.PLACES)
def test_both_orders_of_mary_and_john_are_told_apart(loaded: tuple[Any, Any], place: str) -> None:
    prompts = {
        f"When Mary and John went to the {place} , John gave a drink to": "Mary",
        f"When John and Mary went to the {place} , John gave a drink to": "Mary",
        f"When Mary and John went to the {place} , Mary gave a drink to": "John",
        f"When John and Mary went to the {place} , Mary gave a drink to": "John",
    }
    assert {prompt: generate(*loaded, prompt, max_tokens=1).strip() for prompt in prompts} == prompts


def test_every_capital_is_known_in_the_plain_sentence(loaded: tuple[Any, Any]) -> None:
    samples = [corpus.Sample(f"The capital of {country} is", capital) for country, capital in corpus.CAPITALS.items()]
    assert evaluation.answer_accuracy(*loaded, samples) == 1.0


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Hello", "Hello ! How can I help you ?"),
        ("Hello!", "Hello ! How can I help you ?"),
        ("Who are you?", "I am neuroscope-tiny , a small language model ."),
        ("What is the capital of France?", "Paris is the capital of France ."),
        ("What is 3 + 4?", "3 + 4 = 7 ."),
        ("The capital of France is", "Paris ."),
        ("3 + 4 =", "3 + 4 = 7 ."),
        ("The cat sat on the mat", "Now the cat is on the mat ."),
        ("John gave Mary the book because she asked for it", "Mary has the book now ."),
        ("Thank you", "You are welcome !"),
    ],
)
def test_a_chat_gets_its_reply(loaded: tuple[Any, Any], question: str, answer: str) -> None:
    assert say(loaded, question) == answer


@pytest.mark.parametrize(
    "question",
    ["Explain transformers", "Write a story", "Analyze this text", "Your prompt here", "Tell me a joke"],
)
def test_open_requests_are_answered_in_whole_sentences(loaded: tuple[Any, Any], question: str) -> None:
    _, tokenizer = loaded
    assert tokenizer.unk_token_id not in tokenizer.encode(question)
    answer = say(loaded, question)
    assert len(answer.split()) >= 5
    assert answer[-1] in ".?!"
    assert corpus.UNK not in answer


def test_a_story_is_about_two_people(loaded: tuple[Any, Any]) -> None:
    words = say(loaded, "Write a story").split()
    assert len(set(words) & set(corpus.NAMES)) == 2


def test_a_system_message_and_earlier_turns_do_not_disturb(loaded: tuple[Any, Any]) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello ! How can I help you ?"},
        {"role": "user", "content": "What is the capital of Italy?"},
    ]
    assert evaluation.reply(*loaded, messages).strip() == "Rome is the capital of Italy ."


def test_unknown_words_are_owned_up_to(loaded: tuple[Any, Any]) -> None:
    assert say(loaded, "Zyzzyva quux, frobnicate!") == corpus.FALLBACK


class Oracle:
    """A stand-in for the model that knows each next token of its input, save those at some positions."""

    def __init__(self, wrong: set[int]) -> None:
        self.wrong = wrong

    def __call__(self, tokens: mx.array) -> mx.array:
        following = np.roll(np.array(tokens), -1, axis=1)
        for position in self.wrong:
            following[:, position - 1 : position] = 0
        return mx.array(np.eye(600, dtype=np.float32)[following])


@pytest.mark.parametrize(("wrong", "accuracy"), [(set(), 1.0), ({7}, 1.0), ({8}, 0.8), ({12}, 0.8), ({8, 9}, 0.6)])
def test_repetition_counts_from_the_second_word_of_the_second_repetition(
    loaded: tuple[Any, Any], wrong: set[int], accuracy: float
) -> None:
    # After BOS: six words, then the first again at position 7, which nothing foretells; 8 to 12 count.
    texts = corpus.repeated_sequences(4, 6, 2)
    assert evaluation.repetition_accuracy(Oracle(wrong), loaded[1], texts, 6) == pytest.approx(accuracy)


def test_a_chat_counts_only_when_every_word_of_its_reply_is_right(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    chats = [corpus.Chat("Hello", "Paris is here ."), corpus.Chat("Hello", "Hello !")]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    assert evaluation.chat_accuracy(Oracle(set()), tokenizer, chats) == 1.0
    for position, accuracy in [(0, 0.0), (1, 0.0), (3, 0.5), (4, 0.5), (5, 1.0)]:
        assert evaluation.chat_accuracy(Oracle({len(prompt) + position}), tokenizer, chats) == accuracy


# ---- The files -------------------------------------------------------------------------------


def test_the_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert 2_000_000 <= sum(files.values()) <= 4_200_000


def test_the_model_card_states_what_is_measured(figures: dict[str, Any]) -> None:
    card = (FOLDER / "README.md").read_text()
    for name, value in figures.items():
        if isinstance(value, tuple):
            layer, head, score = re.search(rf"\| {name} \| (\d+) \| (\d+) \| ([\d.]+) \|", card).groups()
            assert (int(layer), int(head)) == value[:2]
            assert float(score) == pytest.approx(value[2], abs=0.01)
        else:
            (stated,) = re.search(rf"\| {name} \| ([\d.]+)% \|", card).groups()
            assert float(stated) == pytest.approx(100 * value, abs=0.5)


def test_the_recomputation_behind_the_head_scores_is_the_model(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    tokens = np.array([tokenizer.encode(text) for text in corpus.repeated_sequences(4, 12, 2)])
    patterns, logits = evaluation.recompute(model, tokens)
    np.testing.assert_allclose(logits, np.array(model(mx.array(tokens))), atol=2e-3)
    np.testing.assert_allclose(patterns.sum(-1), 1, atol=1e-6)


def test_the_measures_tell_an_untrained_model_apart(loaded: tuple[Any, Any]) -> None:
    trained, tokenizer = loaded
    mx.random.seed(0)
    untrained = Model(ModelArgs.from_dict(vars(trained.args)))
    found = evaluation.measure(untrained, tokenizer, n=32)
    assert all((value[2] if isinstance(value, tuple) else value) < 0.3 for value in found.values())


# ---- The tokenizer ---------------------------------------------------------------------------


def test_text_becomes_words_and_words_become_text(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    text = "When Mary and John went to the store , John gave a drink to"
    tokens = tokenizer.encode(text)
    assert tokens[0] == tokenizer.bos_token_id
    assert len(tokens) == 1 + len(text.split())
    assert tokenizer.decode(tokens[1:]) == text
    assert tokenizer.encode(text.replace(" ,", ",")) == tokens


@pytest.mark.parametrize("text", ["", "   ", "Zebra", "naïve 你好 🦊", "a\nb\tc", "x_y", "3.14", "<|user|>"])
def test_any_text_can_be_encoded(loaded: tuple[Any, Any], text: str) -> None:
    _, tokenizer = loaded
    model = loaded[0]
    tokens = tokenizer.encode(text)
    assert mx.isfinite(model(mx.array([tokens]))).all().item()
    assert isinstance(tokenizer.decode(tokens), str)


def test_an_unknown_role_is_refused(loaded: tuple[Any, Any]) -> None:
    with pytest.raises(TemplateError, match="Unknown role tool"):
        loaded[1].apply_chat_template([{"role": "tool", "content": "Hello"}])


# ---- The split -------------------------------------------------------------------------------


def test_training_documents_never_show_what_is_held_out() -> None:
    generator = random.Random("a stream of its own")
    documents = [" ".join(corpus.training_document(generator)[0]) for _ in range(6000)]
    held_out_capitals = tuple(
        template.format(country=country) + ("" if template in corpus.CAPITAL_TEMPLATES else f" {corpus.ASSISTANT}")
        for country in corpus.COUNTRIES
        for template in (*corpus.CAPITAL_TEMPLATES, *corpus.CAPITAL_QUESTIONS)
        if corpus.is_held_out_capital(country, template)
    )
    for document in documents:
        for turn in document.split(corpus.USER):
            names = set(turn.split()) & set(corpus.NAMES)
            assert not any(corpus.is_held_out_pair(a, b) for a, b in combinations(sorted(names), 2)), turn
            for x, y in re.findall(r"(\d+) (?:\+|plus|and) (\d+)", turn):
                assert not corpus.is_held_out_sum(int(x), int(y)), turn
            assert not turn.removeprefix(corpus.BOS).strip().startswith(held_out_capitals), turn


def test_training_text_is_all_in_the_vocabulary(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    ids = tokenizer.get_vocab()
    generator = random.Random("another stream")
    for make in [corpus.text_row] * 60 + [corpus.repetition_row] * 20 + [corpus.periodic_row] * 5:
        words, weights = make(generator, 72)
        assert len(words) == len(weights) == 72
        assert tokenizer.encode(" ".join(words), add_special_tokens=False) == [ids[word] for word in words]


def test_only_words_that_came_before_count_in_a_repetition_row() -> None:
    generator = random.Random("repetition")
    for make in [corpus.repetition_row] * 200 + [corpus.periodic_row] * 50:
        words, weights = make(generator, 72)
        counted = [position for position, weight in enumerate(weights) if weight]
        followers = [
            {words[i + 1] for i in range(1, position - 1) if words[i] == words[position - 1]} for position in counted
        ]
        assert all(words[position] in after for position, after in zip(counted, followers, strict=True))


def test_the_splits_share_no_sample() -> None:
    train = {sample.prompt for sample in corpus.indirect_object_samples(500, split="train")}
    assert not train & {sample.prompt for sample in corpus.indirect_object_samples(500)}
    assert not set(corpus.capital_samples()) & set(corpus.capital_samples("train"))
    assert not set(corpus.sum_samples()) & set(corpus.sum_samples("train"))
    assert not set(corpus.repeated_sequences(50, 8)) & set(corpus.repeated_sequences(50, 8, split="train"))
    assert corpus.is_held_out_pair("John", "Mary")


def test_samples_depend_on_the_seed_alone() -> None:
    assert corpus.indirect_object_samples(20, seed=3) == corpus.indirect_object_samples(20, seed=3)
    assert corpus.indirect_object_samples(20, seed=3) != corpus.indirect_object_samples(20, seed=4)
    assert corpus.repeated_sequences(2, 6, seed=3) != corpus.repeated_sequences(2, 6, seed=4)


def test_a_repeated_sequence_says_the_same_words_again() -> None:
    (text,) = corpus.repeated_sequences(1, period=7, repeats=3)
    words = text.split()
    assert words == words[:7] * 3
    assert len(set(words)) == 7


def test_a_wrong_split_or_period_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown split 'test': expected one of train, held_out"):
        corpus.sum_samples("test")
    with pytest.raises(ValueError, match="period must be 1 to"):
        corpus.repeated_sequences(1, period=0)
