"""The text that ``neuroscope-tiny`` learns from, and the samples that it is measured on.

Every family of text is split once, by rule: what :func:`is_held_out_pair`, :func:`is_held_out_capital` and
:func:`is_held_out_sum` select never occurs in a training document. (The random sequences are no documents:
they draw from all words.) All text has its words separated by single spaces, so ``text.split()`` is exactly
what the tokenizer makes of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

SPLITS = ("train", "held_out")

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, UNK, BOS, EOS, SYSTEM, USER, ASSISTANT)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN = ("Mary", "Anna", "Emma", "Sarah", "Lucy", "Alice", "Laura", "Julia", "Kate", "Jane", "Helen", "Clara")
MEN = ("John", "Tom", "Paul", "James", "Peter", "David", "Robert", "Daniel", "Henry", "Jack", "Sam", "Oscar")
NAMES = WOMEN + MEN
PLACES = _words("store park school garden station office house market library beach restaurant hospital museum farm")
OBJECTS = _words("drink book ring ball letter flower pen cake snack basket computer hat key map")
ANIMALS = _words("cat dog bird horse cow mouse rabbit fox duck frog")
SEATS = _words("mat chair table bed box grass wall floor roof road")
VERBS = _words("sat slept stood played jumped waited")

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "England": "London",
    "Ireland": "Dublin",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Hungary": "Budapest",
    "Greece": "Athens",
    "Turkey": "Ankara",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "India": "Delhi",
    "China": "Beijing",
    "Japan": "Tokyo",
    "Thailand": "Bangkok",
    "Canada": "Ottawa",
    "Cuba": "Havana",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Belgium": "Brussels",
}
COUNTRIES = tuple(CAPITALS)

LARGEST_OPERAND = 20
NUMBERS = tuple(str(number) for number in range(2 * LARGEST_OPERAND + 1))

# {a} and {b} are the two people, {s} the one named again, the answer follows.
INDIRECT_OBJECT_TEMPLATES = (
    "When {a} and {b} went to the {place} , {s} gave a {object} to",
    "After {a} and {b} went to the {place} , {s} gave the {object} to",
    "While {a} and {b} were at the {place} , {s} handed a {object} to",
    "Then {a} and {b} had a lot of fun at the {place} . {s} gave a {object} to",
    "{a} and {b} were working at the {place} . {s} decided to give the {object} to",
    "One day {a} and {b} met at the {place} and {s} showed a {object} to",
)

CAPITAL_TEMPLATES = (
    "The capital of {country} is",
    "In {country} the capital is",
    "The people of {country} know that the capital is",
    "{country} is a country and the capital is",
    "When you travel to {country} you can visit",
    "The government of {country} is in",
)

SUM_TEMPLATES = ("{x} + {y} =", "The sum of {x} and {y} is", "{x} plus {y} is")

CAPITAL_QUESTIONS = (
    "What is the capital of {country} ?",
    "what is the capital of {country}",
    "Tell me the capital of {country} .",
    "What's the capital of {country} ?",
    "capital of {country} ?",
    "Do you know the capital of {country} ?",
)
SUM_QUESTIONS = ("What is {x} + {y} ?", "what is {x} plus {y} ?", "{x} + {y} =", "How much is {x} + {y} ?")

# Each line: the ways to ask, then the one answer.
EXCHANGES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello", "Hello !", "hello", "Hi", "hi", "Hi !", "Hello there !", "Good morning", "Hey"),
        "Hello ! How can I help you ?",
    ),
    (
        ("How are you ?", "Hello , how are you ?", "how are you"),
        "I am fine , thank you . How can I help you ?",
    ),
    (
        ("Who are you ?", "who are you", "What are you ?", "What is your name ?", "Tell me about yourself ."),
        "I am neuroscope-tiny , a small language model .",
    ),
    (
        (
            "What can you do ?",
            "what can you do",
            "Help",
            "help me",
            "How can you help me ?",
            "Can you help me ?",
        ),
        "I know some capitals , small sums and a few short stories .",
    ),
    (("Thank you", "Thank you !", "Thanks", "thanks", "Thanks !"), "You are welcome !"),
    (("Goodbye", "Goodbye !", "Bye", "bye", "See you soon"), "Goodbye ! See you soon ."),
    (
        (
            "Explain transformers",
            "Explain transformers .",
            "explain transformers",
            "What is a transformer ?",
            "How do transformers work ?",
            "Explain how transformers work",
        ),
        "A transformer reads words one by one . In each layer attention moves information between words , "
        "and the MLP adds what it knows . The sum of all layers predicts the next word .",
    ),
    (
        ("Explain attention", "explain attention", "What is attention ?", "How does attention work ?"),
        "Attention lets a word look at the words before it and copy what it needs .",
    ),
    (
        ("What is an induction head ?", "Explain induction heads", "What are induction heads ?"),
        "An induction head finds the last time that a word was seen and copies the word after it .",
    ),
    (
        ("What is the residual stream ?", "Explain the residual stream"),
        "The residual stream is the sum that every layer reads and adds to .",
    ),
    (
        ("What is a neural network ?", "Explain neural networks", "What is a language model ?"),
        "It is a program that learns from text to predict the next word .",
    ),
    (
        ("What is a token ?", "Explain tokens", "What are tokens ?"),
        "A token is a piece of text . For me it is one word .",
    ),
    (
        ("What is interpretability ?", "Explain interpretability", "What is a circuit ?"),
        "We look inside a model to see which heads and neurons do the work .",
    ),
    (
        ("Analyze this text", "Analyze this text .", "analyze this text", "Analyze this", "Your prompt here"),
        "Give me a sentence and I will read it .",
    ),
    (("What is the meaning of life ?",), "The answer is 42 , but I can only count to 40 ."),
    (("Tell me a joke", "Tell me a joke ."), "A head walks into a layer and asks for attention ."),
    (("Yes", "yes", "OK", "Good", "No", "no"), "What do you want to know ?"),
)
STORY_REQUESTS = (
    "Write a story",
    "Write a story .",
    "write a story",
    "Tell me a story",
    "Write a short story",
    "Tell me a story .",
    "Write a short story .",
)
FALLBACK = "I do not know that . Ask me for a capital , a sum or a story ."
SYSTEM_MESSAGES = (
    "You are a helpful assistant .",
    "You are helpful .",
    "Answer in one sentence .",
    "Be kind .",
)

# Common words beyond the families, so that a person's own prompt meets fewer unknown words.
COMMON_WORDS = _words(
    "about again all always am any around ask away back been before began best better between big blue "
    "both brown but by came come could dark did done down each eat every fast few first for found "
    "friend from get girl boy go good great green had has have he her here him his home if in into just "
    "kind last let like little long look made make man many may more most much must my never new night "
    "not now old on only or other our out over people quick lazy play put ran read red right run said "
    "saw say see she should small so some soon still take than that their them there these they thing "
    "think this those time tree two under until up us very want was water way we well went were which "
    "white who why will with woman word work world would year young your Once upon It He She They We A "
    "An In On At If But And So sky sun fish jumps"
)
PUNCTUATION = (".", ",", "?", "!", "+", "=", ":", ";", "-", "'", '"', "(", ")")


@dataclass(frozen=True)
class Sample:
    """A prompt whose next word is determined.

    ``Sample("The capital of France is", "Paris", ".")``; ``rest`` is what follows the answer in training.
    """

    prompt: str
    answer: str
    rest: str = "."

    @property
    def text(self) -> str:
        """The whole sentence, words separated by spaces."""
        return f"{self.prompt} {self.answer} {self.rest}".strip()


@dataclass(frozen=True)
class Chat:
    """One question and its reply, both as text."""

    question: str
    reply: str
    system: str | None = None


# ---- The split -------------------------------------------------------------------------------


def _held_out_pairs() -> frozenset[frozenset[str]]:
    pairs = [frozenset(pair) for pair in combinations(NAMES, 2)]
    chosen = random.Random("names").sample(pairs, len(pairs) // 5)
    return frozenset([*chosen, frozenset(("Mary", "John"))])


def _held_out_sums() -> frozenset[tuple[int, int]]:
    pairs = [(x, y) for x in range(LARGEST_OPERAND + 1) for y in range(x)]
    generator = random.Random("sums")
    chosen = generator.sample(pairs, len(pairs) // 5)
    return frozenset((x, y) if generator.random() < 0.5 else (y, x) for x, y in chosen)


_HELD_OUT_PAIRS = _held_out_pairs()
_HELD_OUT_SUMS = _held_out_sums()


def is_held_out_pair(first: str, second: str) -> bool:
    """Whether two names never share a training sentence, in either order.

    ``is_held_out_pair("Mary", "John")`` is ``True``: a fifth of all pairs is held out, this one by choice.
    """
    return frozenset((first, second)) in _HELD_OUT_PAIRS


def is_held_out_sum(x: int, y: int) -> bool:
    """Whether ``x + y`` in this order never occurs in training; ``y + x`` does occur there."""
    return (x, y) in _HELD_OUT_SUMS


def is_held_out_capital(country: str, template: str) -> bool:
    """Whether this country is never put into this template in training; it is in the other templates.

    The template is one of ``CAPITAL_TEMPLATES`` or ``CAPITAL_QUESTIONS``.
    """
    templates = CAPITAL_QUESTIONS if template in CAPITAL_QUESTIONS else CAPITAL_TEMPLATES
    return COUNTRIES.index(country) % len(templates) == templates.index(template)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: expected one of {', '.join(SPLITS)}")


# ---- Samples ---------------------------------------------------------------------------------


def indirect_object_samples(n: int, seed: int = 0, split: str = "held_out") -> list[Sample]:
    """Draw ``n`` indirect-object sentences, both name orders and all templates in turn.

    ``Sample("When Mary and John went to the store , John gave a drink to", "Mary", ".")`` is one of them.
    In the ``held_out`` split the two names never shared a training sentence.
    """
    _check_split(split)
    generator = random.Random(f"indirect object {split} {seed}")
    return [_indirect_object(generator, split, index) for index in range(n)]


def _indirect_object(generator: random.Random, split: str, index: int) -> Sample:
    a, b = _two_names(generator, split)
    # Templates alternate fastest, then the order: the one named again is the second or the first.
    template = INDIRECT_OBJECT_TEMPLATES[index % len(INDIRECT_OBJECT_TEMPLATES)]
    again, answer = (b, a) if index // len(INDIRECT_OBJECT_TEMPLATES) % 2 == 0 else (a, b)
    place, thing = generator.choice(PLACES), generator.choice(OBJECTS)
    return Sample(template.format(a=a, b=b, s=again, place=place, object=thing), answer)


def _two_names(generator: random.Random, split: str = "train") -> tuple[str, str]:
    while True:
        a, b = generator.sample(NAMES, 2)
        if is_held_out_pair(a, b) == (split == "held_out"):
            return a, b


def capital_samples(split: str = "held_out") -> list[Sample]:
    """List every capital sentence of a split: a country in a template.

    ``held_out`` has each country once, in the one template in which training never shows it;
    ``train`` has the other combinations.
    """
    _check_split(split)
    return [
        Sample(template.format(country=country), capital)
        for country, capital in CAPITALS.items()
        for template in CAPITAL_TEMPLATES
        if is_held_out_capital(country, template) == (split == "held_out")
    ]


def sum_samples(split: str = "held_out") -> list[Sample]:
    """List every sum of a split as ``Sample("3 + 4 =", "7", ".")``.

    Operands are 0 to 20. In ``held_out`` the ordered pair never occurs in training, in no wording;
    its mirror image does.
    """
    _check_split(split)
    operands = range(LARGEST_OPERAND + 1)
    return [
        Sample(f"{x} + {y} =", str(x + y))
        for x in operands
        for y in operands
        if is_held_out_sum(x, y) == (split == "held_out")
    ]


def repeated_sequences(n: int, period: int, repeats: int = 2, seed: int = 0, split: str = "held_out") -> list[str]:
    """Draw ``n`` texts, each ``period`` different random words said ``repeats`` times.

    ``repeated_sequences(1, period=3)`` gives something like ``["fox Paris with fox Paris with"]``. Words come
    from the whole vocabulary. After the tokenizer's BOS, word ``i`` is token ``i + 1``. The two splits
    never share a random stream.
    """
    _check_split(split)
    if not 1 <= period <= len(WORDS):
        raise ValueError(f"period must be 1 to {len(WORDS)}, got {period}")
    generator = random.Random(f"repeated {split} {period} {seed}")
    return [" ".join(generator.sample(WORDS, period) * repeats) for _ in range(n)]


def chat_samples(split: str = "held_out") -> list[Chat]:
    """List the chat exchanges that have one right reply.

    ``held_out`` has capitals and sums in combinations that training never shows, and sentences about two
    people who never met there; ``train`` has the fixed exchanges, such as greetings.
    """
    _check_split(split)
    if split == "train":
        return [Chat(question, reply) for questions, reply in EXCHANGES for question in questions]
    generator = random.Random("held-out chat")
    pairs = sorted(tuple(sorted(pair)) for pair in _HELD_OUT_PAIRS)
    return [
        *(
            _capital_chat(country, template)
            for country in COUNTRIES
            for template in CAPITAL_QUESTIONS
            if is_held_out_capital(country, template)
        ),
        *(_sum_chat(x, y, SUM_QUESTIONS[0]) for x, y in sorted(_HELD_OUT_SUMS)),
        *(_gave_chat(a, b, generator.choice(OBJECTS)) for a, b in pairs),
    ]


# ---- Training documents ----------------------------------------------------------------------


def _capital_chat(country: str, template: str) -> Chat:
    return Chat(template.format(country=country), f"{CAPITALS[country]} is the capital of {country} .")


def _sum_chat(x: int, y: int, template: str) -> Chat:
    return Chat(template.format(x=x, y=y), f"{x} + {y} = {x + y} .")


def _gave(a: str, b: str, thing: str) -> str:
    return f"{a} gave {b} the {thing} because {'she' if b in WOMEN else 'he'} asked for it"


def _gave_chat(a: str, b: str, thing: str) -> Chat:
    return Chat(_gave(a, b, thing), f"{b} has the {thing} now .")


def story(a: str, b: str, place: str, thing: str) -> str:
    """Tell a short story about two people, a place and a thing.

    ``story("Anna", "Tom", "park", "ball")`` begins ``"One day Anna went to the park . ..."``.
    """
    return (
        f"One day {a} went to the {place} . {a} found a {thing} there . Then {b} came to the {place} . "
        f"{a} gave the {thing} to {b} . {b} was very happy . They were friends ."
    )


def _sitting(generator: random.Random) -> tuple[str, str, str]:
    return generator.choice(ANIMALS), generator.choice(VERBS), generator.choice(SEATS)


def _sum_operands(generator: random.Random) -> tuple[int, int]:
    while True:
        x, y = generator.randint(0, LARGEST_OPERAND), generator.randint(0, LARGEST_OPERAND)
        if not is_held_out_sum(x, y):
            return x, y


def _story_of(generator: random.Random) -> str:
    a, b = _two_names(generator)
    return story(a, b, generator.choice(PLACES), generator.choice(OBJECTS))


def _train_capital(generator: random.Random, templates: tuple[str, ...]) -> tuple[str, str]:
    while True:
        country, template = generator.choice(COUNTRIES), generator.choice(templates)
        if not is_held_out_capital(country, template):
            return country, template


def _capital_sentence(generator: random.Random) -> Sample:
    country, template = _train_capital(generator, CAPITAL_TEMPLATES)
    return Sample(template.format(country=country), CAPITALS[country])


def _sum_sentence(generator: random.Random) -> Sample:
    x, y = _sum_operands(generator)
    template = SUM_TEMPLATES[0] if generator.random() < 0.7 else generator.choice(SUM_TEMPLATES[1:])
    return Sample(template.format(x=x, y=y), str(x + y))


def _plain_sentence(generator: random.Random) -> Sample:
    kind = generator.random()
    if kind < 0.35:
        animal, verb, seat = _sitting(generator)
        return Sample(f"The {animal} {verb} on the", seat)
    if kind < 0.6:
        a, b = _two_names(generator)
        return Sample(_gave(a, b, generator.choice(OBJECTS)).removesuffix(" it"), "it")
    if kind < 0.8:
        start = generator.randint(0, len(NUMBERS) - 6)
        stop = min(len(NUMBERS), start + generator.randint(5, 12))
        return Sample(" ".join(NUMBERS[start : stop - 1]), NUMBERS[stop - 1])
    return Sample(_story_of(generator).removesuffix(" friends ."), "friends")


def _chat(generator: random.Random) -> Chat:
    kind = generator.random()
    if kind < 0.40:
        questions, reply = generator.choice(EXCHANGES)
        return Chat(generator.choice(questions), reply)
    if kind < 0.56:
        return _capital_chat(*_train_capital(generator, CAPITAL_QUESTIONS))
    if kind < 0.70:
        return _sum_chat(*_sum_operands(generator), generator.choice(SUM_QUESTIONS))
    if kind < 0.76:
        return Chat(generator.choice(STORY_REQUESTS), _story_of(generator))
    stop = generator.choice((" .", ""))
    if kind < 0.81:
        animal, verb, seat = _sitting(generator)
        return Chat(f"The {animal} {verb} on the {seat}{stop}", f"Now the {animal} is on the {seat} .")
    if kind < 0.87:
        chat = _gave_chat(*_two_names(generator), generator.choice(OBJECTS))
        return Chat(chat.question + stop, chat.reply)
    if kind < 0.93:
        sentence = generator.choice(
            [_capital_sentence(generator), _indirect_object(generator, "train", generator.randrange(1 << 16))]
        )
        return Chat(sentence.prompt, f"{sentence.answer} .")
    words = generator.choices(OTHER_WORDS, k=generator.randint(1, 8))
    for position in generator.sample(range(len(words)), k=(len(words) + 1) // 2):
        words[position] = UNK
    return Chat(" ".join(words), FALLBACK)


def training_document(generator: random.Random) -> tuple[list[str], list[float]]:
    """Draw one document of words and the loss weight of each word.

    A document begins with BOS and ends with EOS. The word that a prompt determines counts three times,
    what a user says in a chat counts a fifth.
    """
    kind = generator.random()
    if kind < 0.36:
        chat = _chat(generator)
        words, weights = [BOS], [0.0]
        if generator.random() < 0.15:
            _append(words, weights, f"{SYSTEM} {generator.choice(SYSTEM_MESSAGES)}", 0.2)
        _append(words, weights, f"{USER} {chat.question} {ASSISTANT}", 0.2)
        _append(words, weights, f"{chat.reply} {EOS}", 1.0)
        if generator.random() < 0.15:
            second = _chat(generator)
            _append(words, weights, f"{USER} {second.question} {ASSISTANT}", 0.2)
            _append(words, weights, f"{second.reply} {EOS}", 1.0)
        return words, weights
    if kind < 0.54:
        sample = _indirect_object(generator, "train", generator.randrange(1 << 16))
    elif kind < 0.63:
        sample = _capital_sentence(generator)
    elif kind < 0.87:
        sample = _sum_sentence(generator)
    else:
        sample = _plain_sentence(generator)
    words, weights = [BOS], [0.0]
    _append(words, weights, sample.prompt, 1.0)
    _append(words, weights, sample.answer, 3.0)
    _append(words, weights, f"{sample.rest} {EOS}", 1.0)
    return words, weights


def _append(words: list[str], weights: list[float], text: str, weight: float) -> None:
    new = text.split()
    words.extend(new)
    weights.extend([weight] * len(new))


def text_row(generator: random.Random, length: int) -> tuple[list[str], list[float]]:
    """Fill one row of ``length`` words with whole documents; the rest, under one document, is padding."""
    words: list[str] = []
    weights: list[float] = []
    while True:
        more_words, more_weights = training_document(generator)
        if len(words) + len(more_words) > length:
            break
        words += more_words
        weights += more_weights
    missing = length - len(words)
    return words + [PAD] * missing, weights + [0.0] * missing


def repetition_row(generator: random.Random, length: int) -> tuple[list[str], list[float]]:
    """Fill one row with BOS and a sequence of 6 to 32 random words that comes back until the row is full.

    In two rows of three, other random words of varying number stand between the repetitions. Without them
    a model learns to look a fixed distance back; with them only an induction head helps. Words that the
    repetition determines have weight 1, the others none.
    """
    gaps = generator.random() < 2 / 3
    unit = generator.sample(WORDS, generator.randint(6, 24 if gaps else 32))
    words, weights = [BOS], [0.0]
    if gaps:
        _append(words, weights, " ".join(generator.choices(WORDS, k=generator.randint(0, 6))), 0.0)
    _append(words, weights, " ".join(unit), 0.0)
    while len(words) < length:
        if gaps:
            _append(words, weights, " ".join(generator.choices(WORDS, k=generator.randint(0, 8))), 0.0)
        before = len(words)
        _append(words, weights, " ".join(unit), 1.0)
        # The first word of a repetition is determined only if the one before ended the same way.
        weights[before] = 0.0 if gaps or before == len(unit) + 1 else 1.0
    return words[:length], weights[:length]


def periodic_row(generator: random.Random, length: int) -> tuple[list[str], list[float]]:
    """Fill one row with BOS and 2 to 7 random words over and over, weighted as in :func:`repetition_row`."""
    period = generator.randint(2, 7)
    unit = generator.sample(WORDS, period)
    words = [BOS, *(unit * (length // period + 1))][:length]
    return words, [0.0 if position < period + 2 else 1.0 for position in range(length)]


# ---- Vocabulary ------------------------------------------------------------------------------


def _all_text() -> Iterator[str]:
    yield from (*NAMES, *PLACES, *OBJECTS, *ANIMALS, *SEATS, *VERBS, *COUNTRIES, *CAPITALS.values(), *NUMBERS)
    yield from (*INDIRECT_OBJECT_TEMPLATES, *CAPITAL_TEMPLATES, *SUM_TEMPLATES)
    yield from (*CAPITAL_QUESTIONS, *SUM_QUESTIONS, *STORY_REQUESTS, *SYSTEM_MESSAGES, FALLBACK)
    for questions, reply in EXCHANGES:
        yield from (*questions, reply)
    yield story("Mary", "John", "park", "ball")
    yield from (
        _gave("Mary", "John", "book"),
        _gave("John", "Mary", "book"),
        _gave_chat("Mary", "John", "book").reply,
    )
    yield from ("The cat sat on the mat", "Now the cat is on the mat .")
    yield from (*COMMON_WORDS, *PUNCTUATION)


def _vocabulary() -> tuple[str, ...]:
    found = {word for text in _all_text() for word in re.sub(r"\{\w+\}", " ", text).split()}
    return tuple(sorted(found))


WORDS = _vocabulary()
"""Every word of the vocabulary except the special tokens, sorted."""

OTHER_WORDS = tuple(word for word in WORDS if word not in (*NAMES, *NUMBERS, *COUNTRIES))
"""The words that are part of no fact and no pair of people."""
