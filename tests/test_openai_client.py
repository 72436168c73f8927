"""OpenAI's own Python client against the running server: what it offers works, or is refused by name."""

import inspect
import json
import math
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
import requests
from byte_models import DETOKENIZERS, SAID, TEXT, byte_model, byte_tokenizer
from mlx_lm.sample_utils import make_logits_processors
from openai import OpenAI
from server_tools import MESSAGES, load_tiny, running_server

from api_server import ModelWorker, ServerConfig
from api_server.logprobs import chat_logprobs, score, text_logprobs
from api_server.schemas.replies import ChatEvent, ChatReply, CompletionEvent, CompletionReply
from mlx_hooks import HookedModel, TokenLogprobs
from mlx_hooks.token_text import TokenText

PROMPT = "w1 w2 w3"
NOT_FIELDS = {"extra_headers", "extra_query", "extra_body", "timeout"}


def client_of(url: str, **options: Any) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", **({"api_key": "any", "max_retries": 0} | options))


def load(path: str) -> HookedModel:
    return byte_model(path) if path in DETOKENIZERS else load_tiny(path)


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    with ModelWorker(load=load) as worker:
        for name in (*DETOKENIZERS, "llama"):
            worker.load(name)
        yield worker


@pytest.fixture(scope="module")
def url(worker: ModelWorker) -> Iterator[str]:
    with running_server(worker) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with client_of(url) as client:
        yield client


def chat(client: OpenAI, **fields: Any) -> Any:
    fields = {"model": "llama", "messages": MESSAGES, "max_tokens": 6, "seed": 1} | fields
    return client.chat.completions.create(**fields)


def complete(client: OpenAI, **fields: Any) -> Any:
    fields = {"model": "llama", "prompt": PROMPT, "max_tokens": 6, "seed": 1} | fields
    return client.completions.create(**fields)


def text_of(completion: Any, index: int = 0) -> str:
    choice = completion.choices[index]
    return choice.message.content if hasattr(choice, "message") else choice.text


def said_in(chunks: list[Any], index: int = 0) -> str:
    """The text of one choice of a stream."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join((choice.delta.content or "") if hasattr(choice, "delta") else choice.text for choice in choices)


def logprobs_after(worker: ModelWorker, tokens: list[int], n_new: int) -> np.ndarray:
    """Rows [n_new, d_vocab]: the log softmax, in float64, at the places that led to the last ``n_new`` tokens."""
    model = worker.get("llama").model
    logits = worker.call(lambda: np.array(model([tokens])))[0].astype(np.float64)
    rows = logits[len(tokens) - n_new - 1 : -1]
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def ids_of(words: list[str]) -> list[int]:
    return [tokenizer_ids[word] for word in words]


tokenizer_ids = load_tiny("llama").tokenizer.get_vocab()
PROMPT_IDS = ids_of(PROMPT.split())
CHAT_IDS = ids_of(["<user>", "w1", "w2", "w3", "w4", "<assistant>"])

# -- models -----------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == [*DETOKENIZERS, "llama"]
    model = client.models.retrieve("llama")
    assert (model.id, model.object, model.owned_by) == ("llama", "model", "local")
    assert abs(model.created - time.time()) < 600


def test_the_bundled_model_answers(live_server: SimpleNamespace) -> None:
    with client_of(live_server.base_url) as client:
        asked = {"model": "neuroscope-tiny", "temperature": 0, "max_tokens": 10}
        question = [{"role": "user", "content": "What is the capital of France ?"}]
        answer = client.chat.completions.create(messages=question, **asked)
        assert "Paris" in answer.choices[0].message.content
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(client.chat.completions.create(messages=question, stream=True, **asked))
        assert said_in(chunks) == answer.choices[0].message.content
        # The tokenizer puts the spaces between words: offsets are those in the text all the same.
        text = client.completions.create(prompt="The capital of France is", logprobs=1, **asked | {"max_tokens": 4})
        said, found = text.choices[0].text, text.choices[0].logprobs
        words = [(said[offset:].split() or ["<eos>"])[0] for offset in found.text_offset]
        assert (words, len(words) > 1) == (found.tokens, True)


# -- log probabilities ------------------------------------------------------------------------------------------------


def check_chat_logprobs(worker: ModelWorker, content: list[Any], k: int) -> None:
    tokens = CHAT_IDS + ids_of([one.token for one in content])
    rows = logprobs_after(worker, tokens, len(content))
    for one, row in zip(content, rows, strict=True):
        assert one.logprob == pytest.approx(row[tokenizer_ids[one.token]], abs=1e-4)
        assert bytes(one.bytes).decode() == one.token
        assert [tokenizer_ids[top.token] for top in one.top_logprobs] == list(np.argsort(-row)[:k])
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(np.sort(row)[::-1][:k], abs=1e-4)
        assert all(bytes(top.bytes).decode() == top.token for top in one.top_logprobs)


@pytest.mark.parametrize("k", [0, 1, 20])
def test_a_chat_s_logprobs_are_the_model_s_own(client: OpenAI, worker: ModelWorker, k: int) -> None:
    bent = {"temperature": 2, "top_p": 0.9, "logit_bias": {"20": 5}, "presence_penalty": 1}
    answer = chat(client, logprobs=True, top_logprobs=k, **bent).choices[0]
    assert len(answer.logprobs.content) == 6
    assert answer.logprobs.refusal is None
    assert [one.token for one in answer.logprobs.content] == answer.message.content.split()
    check_chat_logprobs(worker, answer.logprobs.content, k)
    assert answer.message.content == text_of(chat(client, **bent))
    chunks = list(chat(client, logprobs=True, top_logprobs=k, stream=True, **bent))
    streamed = [one for chunk in chunks for one in getattr(chunk.choices[0].logprobs, "content", None) or []]
    assert streamed == answer.logprobs.content
    assert chunks[-1].choices[0].logprobs is None


@pytest.mark.parametrize("k", [0, 2, 5])
def test_a_text_s_logprobs_are_the_model_s_own(client: OpenAI, worker: ModelWorker, k: int) -> None:
    answer = complete(client, logprobs=k, temperature=2).choices[0]
    found = answer.logprobs
    ids = ids_of(found.tokens)
    for i, row in enumerate(logprobs_after(worker, PROMPT_IDS + ids, 6)):
        assert found.token_logprobs[i] == pytest.approx(row[ids[i]], abs=1e-4)
        likeliest = [int(j) for j in np.argsort(-row)[:k]]
        assert {tokenizer_ids[word] for word in found.top_logprobs[i]} == {*likeliest, ids[i]}
        for word, logprob in found.top_logprobs[i].items():
            assert logprob == pytest.approx(row[tokenizer_ids[word]], abs=1e-4)
        assert answer.text[found.text_offset[i] :].split()[0] == found.tokens[i]
    chunks = list(complete(client, logprobs=k, temperature=2, stream=True))
    parts = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in parts for one in getattr(part, name)] == getattr(found, name)


def test_without_logprobs_there_are_none(client: OpenAI) -> None:
    assert chat(client).choices[0].logprobs is None
    assert complete(client).choices[0].logprobs is None
    assert all(chunk.choices[0].logprobs is None for chunk in chat(client, stream=True))


@pytest.mark.parametrize("model", DETOKENIZERS)
def test_bytes_are_true_where_a_token_is_part_of_a_character(client: OpenAI, model: str) -> None:
    ask = {"model": model, "messages": [{"role": "user", "content": "é"}], "temperature": 0, "max_tokens": 20}
    answer = chat(client, logprobs=True, top_logprobs=1, **ask).choices[0]
    assert (answer.message.content, answer.finish_reason) == (TEXT, "stop")
    content = answer.logprobs.content
    assert [bytes(one.bytes) for one in content] == [*SAID, b"<end>"]
    assert [one.token for one in content[2:6]] == ["\\xf0\\x9f", "\\x98\\x80", "\\xc3", "\\xa9"]
    assert [one.top_logprobs[0].bytes for one in content] == [one.bytes for one in content]
    chunks = list(chat(client, logprobs=True, top_logprobs=1, stream=True, **ask))
    assert [one for chunk in chunks[:-1] for one in chunk.choices[0].logprobs.content] == content
    found = complete(client, model=model, prompt="?", logprobs=1, temperature=0, max_tokens=20).choices[0].logprobs
    assert found.tokens == ["h", "i", *(f"bytes:{one.token}" for one in content[2:6]), "x", "<end>"]
    assert found.text_offset == [0, 1, 2, 2, 3, 3, 4, 5]


@pytest.mark.parametrize("model", DETOKENIZERS)
def test_characters_are_never_split(client: OpenAI, model: str) -> None:
    ask = {"model": model, "messages": [{"role": "user", "content": "?"}], "temperature": 0, "max_tokens": 20}
    chunks = list(chat(client, stream=True, **ask))
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["h", "i", "😀", "é", "x", None]
    assert chunks[-1].choices[0].finish_reason == "stop"
    texts = [chunk.choices[0].text for chunk in complete(client, model=model, prompt="?", temperature=0, stream=True)]
    assert texts == ["h", "i", "😀", "é", ""]


@pytest.mark.parametrize("model", DETOKENIZERS)
@pytest.mark.parametrize(("stop", "said"), [("😀é", "hi"), (["nowhere", "éx"], "hi😀"), ("i😀", "h"), (["x!"], TEXT)])
def test_stop_texts_end_the_answer_across_tokens(client: OpenAI, model: str, stop: Any, said: str) -> None:
    ask = {"model": model, "prompt": "?", "temperature": 0, "max_tokens": 20, "stop": stop}
    answer = complete(client, **ask)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (said, "stop")
    streamed = complete(client, stream=True, stream_options={"include_usage": True}, **ask)
    *chunks, last = list(streamed)
    assert said_in(chunks) == said
    assert chunks[-1].choices[0].finish_reason == "stop"
    # The tokens that spell the stop text were generated.
    assert last.usage == answer.usage
    assert answer.usage.completion_tokens >= len(said)


def test_impossible_tokens_and_those_spelled_alike_stay_json() -> None:
    found = TokenLogprobs(-math.inf, [256, 257], [-0.5, -math.inf])
    scored = score(256, found, 3, TokenText(byte_tokenizer()))
    assert [one["logprob"] for one in chat_logprobs([scored])["content"][0]["top_logprobs"]] == [-0.5, -9999.0]
    said = text_logprobs([scored])
    assert said["token_logprobs"] == [-9999.0]
    # The chosen token is already there under its text: the likelier number stays.
    assert said["top_logprobs"] == [{"bytes:\\xf0\\x9f": -0.5, "bytes:\\x98\\x80": -9999.0}]


@pytest.mark.parametrize("fields", [{"n": 2, "logprobs": True, "top_logprobs": 2}, {}], ids=["all", "none"])
def test_replies_are_what_the_description_says(url: str, fields: dict[str, Any]) -> None:
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    for route, body, whole, event in (
        ("chat/completions", {"messages": MESSAGES}, ChatReply, ChatEvent),
        ("completions", {"prompt": PROMPT}, CompletionReply, CompletionEvent),
    ):
        body |= {"model": "llama", "max_tokens": 3} | fields
        if "logprobs" in fields and route == "completions":
            body = {k: v for k, v in body.items() if k != "top_logprobs"} | {"logprobs": 2}
        text = requests.post(f"{url}/v1/{route}", json=body, timeout=30).text
        assert (whole.model_validate_json(text).choices[0].logprobs is None) == (not fields)
        stream = requests.post(f"{url}/v1/{route}", json=body | with_usage, timeout=30).text
        events = [event.model_validate_json(line[6:]) for line in stream.split("\n\n") if line.startswith("data: {")]
        assert events[-1].usage is not None


# -- choices and usage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [chat, complete])
def test_choices_are_those_of_seeds_that_count_up(client: OpenAI, ask: Callable[..., Any]) -> None:
    answer = ask(client, n=3, seed=7, temperature=1.5)
    alone = [ask(client, seed=7 + i, temperature=1.5) for i in range(3)]
    assert [text_of(answer, i) for i in range(3)] == [text_of(one) for one in alone]
    assert len({text_of(one) for one in alone}) == 3
    assert [(choice.index, choice.finish_reason) for choice in answer.choices] == [(i, "length") for i in range(3)]
    n_prompt = alone[0].usage.prompt_tokens
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (n_prompt, 18, n_prompt + 18)


@pytest.mark.parametrize("ask", [chat, complete])
def test_choices_stream_under_their_index(client: OpenAI, ask: Callable[..., Any]) -> None:
    options = {"n": 3, "seed": 7, "temperature": 1.5}
    whole = ask(client, **options)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    for i in range(3):
        assert said_in(chunks, i) == text_of(whole, i)
        reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.index == i]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    if ask is chat:
        roles = [(chunk.choices[0].index, chunk.choices[0].delta.role) for chunk in chunks[:-1]]
        assert [index for index, role in roles if role == "assistant"] == [0, 1, 2]


def test_choices_have_their_own_logprobs(client: OpenAI) -> None:
    answer = chat(client, n=2, temperature=1.5, logprobs=True)
    for choice in answer.choices:
        assert [one.token for one in choice.logprobs.content] == choice.message.content.split()


def test_choices_may_end_differently(client: OpenAI) -> None:
    words = text_of(chat(client, seed=8, temperature=1.5, max_tokens=8)).split()
    first = text_of(chat(client, seed=7, temperature=1.5, max_tokens=8)).split()
    stop = next(word for word in words if word not in first)
    answer = chat(client, n=2, seed=7, temperature=1.5, max_tokens=8, stop=stop)
    assert [choice.finish_reason for choice in answer.choices] == ["length", "stop"]
    assert answer.usage.completion_tokens == 8 + words.index(stop) + 1


def test_with_activations_there_is_one_choice(client: OpenAI) -> None:
    hooks = [{"layer_name": "0", "component": "mlp"}]
    route = "/chat/completions/with_activations"
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(route, body={"messages": MESSAGES, "activation_hooks": hooks, "n": 2}, cast_to=object)
    assert caught.value.param == "n"
    assert "only 1 is supported, not 2" in str(caught.value)


@pytest.mark.parametrize("ask", [chat, complete])
def test_usage_comes_as_asked_for(client: OpenAI, ask: Callable[..., Any]) -> None:
    whole = ask(client)
    with_usage = list(ask(client, stream=True, stream_options={"include_usage": True, "include_obfuscation": False}))
    assert (with_usage[-1].choices, with_usage[-1].usage) == ([], whole.usage)
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in with_usage[:-1])
    assert with_usage[-2].choices[0].finish_reason == "length"
    for options in (None, {"include_usage": False}):
        without = list(ask(client, stream=True, stream_options=options))
        assert without[-1].choices[0].finish_reason == "length"
        assert without[-1].usage == whole.usage
        assert all("usage" not in chunk.model_fields_set for chunk in without[:-1])
    assert len({chunk.id for chunk in with_usage}) == 1


def test_accounts_of_activations_stay_with_the_finish(url: str) -> None:
    hooks = [{"layer_name": "0", "component": "mlp", "hook_id": "m"}]
    body = {"model": "llama", "prompt": PROMPT, "max_tokens": 2, "activation_hooks": hooks, "stream": True}
    body |= {"stream_options": {"include_usage": True}, "logprobs": 1}
    lines = requests.post(f"{url}/v1/completions/with_activations", json=body, timeout=30).text.split("\n\n")
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [event["usage"] is None for event in events] == [True, True, True, False]
    assert [len(event["choices"]) for event in events] == [1, 1, 1, 0]
    assert [len(event["choices"][0]["logprobs"]["tokens"]) for event in events[:2]] == [1, 1]
    assert all(event["activations"]["m"] for event in events[:2])
    assert events[2]["hooks"]["m"]["fired"] == 2
    assert events[2]["tokens"]["prompt_length"] == 3


# -- what bends the choice of tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [chat, complete])
def test_a_bias_makes_and_forbids_tokens(client: OpenAI, ask: Callable[..., Any]) -> None:
    assert text_of(ask(client, logit_bias={"17": 100}, temperature=0)).split() == ["w11"] * 6
    plain = text_of(ask(client, temperature=0)).split()
    banned = {str(tokenizer_ids[plain[0]]): -100}
    assert plain[0] not in text_of(ask(client, logit_bias=banned, temperature=0)).split()


def greedy(worker: Any, prompt: list[int], bend: Callable[[np.ndarray, list[int]], np.ndarray]) -> list[int]:
    """Six greedy tokens of logits that ``bend`` changed, knowing what was generated."""
    new: list[int] = []
    for _ in range(6):
        row = worker.call(lambda: np.array(worker.get("llama").model([prompt + new])))[0, -1].astype(np.float64)
        new.append(int(bend(row, new).argmax()))
    return new


@pytest.mark.parametrize(("frequency", "presence"), [(2.0, 0.0), (0.0, 2.0), (1.0, -0.5)])
def test_penalties_are_openai_s(client: OpenAI, worker: ModelWorker, frequency: float, presence: float) -> None:
    def bend(row: np.ndarray, new: list[int]) -> np.ndarray:
        counts = np.bincount(new, minlength=row.size)
        return row - frequency * counts - presence * (counts > 0)

    answer = complete(client, temperature=0, frequency_penalty=frequency, presence_penalty=presence)
    assert ids_of(text_of(answer).split()) == greedy(worker, PROMPT_IDS, bend)


def test_filters_and_other_servers_options_in_extra_body(client: OpenAI, worker: ModelWorker) -> None:
    import mlx.core as mx

    (processor,) = make_logits_processors(repetition_penalty=5.0)

    def bend(row: np.ndarray, new: list[int]) -> np.ndarray:
        tokens = mx.array(ids_of(prompt.split()) + new)
        return np.array(processor(tokens, mx.array(row[None], mx.float32)))[0]

    prompt = f"{PROMPT} {text_of(complete(client, temperature=0))}"
    plain = complete(client, prompt=prompt, temperature=0)
    penalised = complete(client, prompt=prompt, temperature=0, extra_body={"repetition_penalty": 5.0})
    expected = worker.call(lambda: greedy_here(worker, ids_of(prompt.split()), bend))
    assert ids_of(text_of(penalised).split()) == expected != ids_of(text_of(plain).split())
    likeliest = text_of(complete(client, temperature=0))
    assert text_of(complete(client, temperature=2, extra_body={"top_k": 1})) == likeliest
    assert text_of(complete(client, temperature=2, extra_body={"min_p": 1.0})) == likeliest
    assert text_of(complete(client, temperature=2)) != likeliest
    assert text_of(complete(client, temperature=2, top_p=0.001)) == likeliest


def greedy_here(worker: ModelWorker, prompt: list[int], bend: Callable[[np.ndarray, list[int]], np.ndarray]) -> Any:
    """``greedy`` on the worker's own thread."""
    return greedy(SimpleNamespace(call=lambda function: function(), get=worker.get), prompt, bend)


def test_the_same_seed_is_the_same_text(client: OpenAI) -> None:
    texts = [text_of(chat(client, seed=seed, temperature=1.5)) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_either_name_limits_the_tokens(client: OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model="llama", messages=MESSAGES, **{name: 3})  # type: ignore[call-overload]
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


# -- messages ---------------------------------------------------------------------------------------------------------


def test_a_message_may_be_parts_of_text(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "w1 w2 "}, {"type": "text", "text": "w3 w4"}]
    answer = chat(client, messages=[{"role": "user", "content": parts}])
    assert (text_of(answer), answer.usage) == (text_of(chat(client)), chat(client).usage)


def test_a_developer_is_the_system(client: OpenAI) -> None:
    answers = [chat(client, messages=[{"role": role, "content": "w9"}, *MESSAGES]) for role in ("developer", "system")]
    assert text_of(answers[0]) == text_of(answers[1])
    assert answers[0].usage == answers[1].usage


@pytest.mark.parametrize("as_message", [lambda message: message, lambda message: message.model_dump()])
def test_an_answer_comes_back_as_a_message(client: OpenAI, as_message: Callable[[Any], Any]) -> None:
    said = chat(client).choices[0].message
    plain = [*MESSAGES, {"role": "assistant", "content": said.content}, *MESSAGES]
    again = [*MESSAGES, as_message(said), *MESSAGES]
    assert text_of(chat(client, messages=again)) == text_of(chat(client, messages=plain))


# -- every field of the client ----------------------------------------------------------------------------------------

# Those that have an effect, each with a test above.
CHAT_FIELDS = {
    "messages", "model", "frequency_penalty", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens", "n",
    "presence_penalty", "seed", "stop", "stream", "stream_options", "temperature", "top_logprobs", "top_p",
}  # fmt: skip
TEXT_FIELDS = CHAT_FIELDS - {"messages", "max_completion_tokens", "top_logprobs"} | {"prompt"}
# A name of the caller's for itself, which no answer depends on.
NAMES = {"user"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
# Values that ask for nothing, and one that is refused.
OTHERS: dict[str, tuple[list[Any], Any]] = {
    "audio": ([None], {"voice": "alloy", "format": "wav"}),
    "function_call": ([None, "none"], "auto"),
    "functions": ([None, []], [{"name": "f"}]),
    "metadata": ([None, {}], {"a": "b"}),
    "modalities": ([None, ["text"]], ["text", "audio"]),
    "moderation": ([None], {"model": "m"}),
    "parallel_tool_calls": ([None, True, False], "yes"),
    "prediction": ([None], {"type": "content", "content": "w1"}),
    "prompt_cache_key": ([None], "k"),
    "prompt_cache_options": ([None], {"mode": "x"}),
    "prompt_cache_retention": ([None], "24h"),
    "reasoning_effort": ([None, "none"], "high"),
    "response_format": ([None, {"type": "text"}], {"type": "json_object"}),
    "safety_identifier": ([None], "me"),
    "service_tier": ([None, "auto", "default"], "flex"),
    "store": ([None, False], True),
    "tool_choice": ([None, "none"], "required"),
    "tools": ([None, []], [TOOL]),
    "verbosity": ([None], "low"),
    "web_search_options": ([None], {}),
    "best_of": ([None, 1], 2),
    "echo": ([None, False], True),
    "suffix": ([None], "w9"),
}


def fields_of(create: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(create).parameters) - NOT_FIELDS


def test_every_field_of_the_client_is_known(client: OpenAI) -> None:
    """A new version of the client may bring a field: say here what becomes of it."""
    assert fields_of(client.chat.completions.create) - CHAT_FIELDS - NAMES <= set(OTHERS)
    assert fields_of(client.completions.create) - TEXT_FIELDS - NAMES <= set(OTHERS)
    assert set(OTHERS) <= fields_of(client.chat.completions.create) | fields_of(client.completions.create)


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_a_field_without_support_is_refused_by_name_unless_it_asks_for_nothing(client: OpenAI, name: str) -> None:
    nothing, refused = OTHERS[name]
    for ask, create in ((chat, client.chat.completions.create), (complete, client.completions.create)):
        if name not in fields_of(create):
            continue
        plain = text_of(ask(client))
        for value in nothing:
            assert text_of(ask(client, **{name: value})) == plain
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **{name: refused})
        assert caught.value.param == name
        assert f"'{name}'" in caught.value.body["message"]


def test_a_name_of_the_caller_s_changes_nothing(client: OpenAI) -> None:
    assert text_of(chat(client, user="me")) == text_of(chat(client))
    assert text_of(complete(client, user="me")) == text_of(complete(client))


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "w1", "tool_call_id": "x"}, "messages[0].role"),
        ({"role": "function", "content": "w1", "name": "f"}, "messages[0].role"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0].type",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]},
            "messages[0].content[0].type",
        ),
        ({"role": "user", "content": "w1", "name": "me"}, "messages[0].name"),
        ({"role": "assistant", "content": "w1", "tool_calls": [TOOL]}, "messages[0].tool_calls"),
        ({"role": "assistant", "content": "w1", "refusal": "no"}, "messages[0].refusal"),
    ],
    ids=str,
)
def test_messages_that_are_more_than_text_are_refused_by_name(client: OpenAI, message: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=[message])
    assert caught.value.param == param
    assert param in caught.value.body["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"n": 0}, "n"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"logit_bias": {"w1": 1}}, "logit_bias"),
        ({"extra_body": {"beams": 2}}, "beams"),
    ],
    ids=str,
)
def test_values_that_cannot_be_are_refused_by_name(client: OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **fields)
    assert caught.value.param == param
    assert param in caught.value.body["message"]


@pytest.mark.parametrize("fields", [{"logprobs": 6}, {"logprobs": True}, {"logprobs": -1}, {"prompt": [PROMPT]}])
def test_values_that_a_text_cannot_have_are_refused_by_name(client: OpenAI, fields: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **fields)
    assert caught.value.param == next(iter(fields))


# -- errors and the end of streams ------------------------------------------------------------------------------------


def test_errors_are_the_client_s_own_exceptions(client: OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("nobody")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        chat(client, model="nobody")
    with pytest.raises(openai.NotFoundError):
        chat(client, model="nobody", stream=True)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="llama", input="w1")
    with pytest.raises(openai.BadRequestError) as wrong:
        chat(client, temperature=3)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.APIConnectionError):
        client_of("http://127.0.0.1:1").models.list()


def test_without_a_model_there_is_a_conflict_and_without_the_key_no_entrance() -> None:
    with ModelWorker(load=load) as worker, running_server(worker, ServerConfig(port=0, api_key="k3y")) as url:
        with client_of(url) as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with client_of(url, api_key="k3y") as client:
            assert client.models.list().data == []
            with pytest.raises(openai.NotFoundError):
                chat(client)
            with pytest.raises(openai.ConflictError) as caught:
                client.post("/chat/completions", body={"messages": MESSAGES}, cast_to=object)
            assert caught.value.code == "no_model_loaded"


@pytest.mark.parametrize("ask", [chat, complete])
def test_closing_a_stream_ends_the_generation(ask: Callable[..., Any]) -> None:
    with ModelWorker(load=load) as worker:
        model = worker.load("llama").model
        steps, done = model.generate_steps, []

        def slow(*args: Any, **options: Any) -> Iterator[Any]:
            for step in steps(*args, **options):
                done.append(step.index)
                yield step
                time.sleep(0.02)

        model.generate_steps = slow  # type: ignore[method-assign]
        with running_server(worker) as url, client_of(url) as client:
            with ask(client, stream=True, max_tokens=400, n=2) as stream:
                next(iter(stream))
            # Answered after the generation that was given up, which had 800 tokens to go.
            assert ask(client, max_tokens=1).usage.completion_tokens == 1
    assert len(done) < 100
