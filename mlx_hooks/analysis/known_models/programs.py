"""Programs compiled into weights by hand, as Tracr compiles RASP, for causal attention; with heads that distract.

Source: Lindner et al., "Tracr: Compiled Transformers as a Laboratory for Interpretability" (2023). Three of its
programs, in forms that a model can compute which sees what came before and nothing else:

    frac_prevs   at each position: which share of the letters so far is x. Layer 0's MLP marks x; a head of layer 1
                 attends to all positions alike, so what it reads is the share.
    reverse      START, letters, SEP, and then the letters backwards: at SEP the last letter is said, at the next
                 position the one before it. A head of layer 0 finds SEP and writes where it stands; its MLP has a
                 neuron for each place of SEP and each position, which says where to look; a head of layer 1 looks.
    histogram    at each position after START: how often its letter came so far, itself counted. A head attends to the
                 same letter and to START alike, so START gets 1 / (1 + count); the MLP of the same layer inverts that,
                 piecewise linearly, exactly at what counts give.

A number f is said as the token whose number v is nearest: the logit of v is SHARP (2 v f - v^2), the square by a bias.

**Distractors**: heads and neurons that read the whole stream and write where nothing reads, and such as could write to
parts that are read but have nothing to write. No edge to them or from them matters. Nothing is normed; besides the
unembedding nothing has a bias: what is constant reads the positions, so it is an edge from the embedding, which zeros
take away and corrupted prompts leave alone. Hence the different true edges by ablation.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from .known import KnownModel, check_heads, check_whole, distinct
from .transformer import Head, Layer, Model, Neurons, Stream, build, joined, reads_nothing, rows, writes_unread

SURE = 20 * np.log(2)
"""A key that is meant has this much of a score more than one that is not: 2^20 times its weight."""
POSITIONS = 32
"""Of the models; prompts are shorter."""
UNREAD = 8
"""Dimensions that the distractors write to."""


class Program(KnownModel):
    """A known model that computes a program: ``program`` says in plain Python what it should say."""

    @abstractmethod
    def program(self, tokens: Sequence[int]) -> list[int | None]:
        """The token that is to be said at each position; None where the program says nothing."""

    @abstractmethod
    def prompt(self, rng: np.random.Generator) -> list[int]:
        """A prompt, drawn."""

    def answer(self, tokens: Sequence[int]) -> int:
        """What the program says at the last position."""
        found = self.program(tokens)[-1]
        assert found is not None
        return found

    def asked(self, clean: Sequence[int], corrupted: Sequence[int]) -> dict[str, Any]:
        """A pair of prompts with what the program says for each."""
        answers = {"answer": self.answer(clean), "wrong": self.answer(corrupted)}
        return {"clean": list(clean), "corrupted": list(corrupted)} | answers

    def _heads(self, stream: Stream, layer: int, n_heads: int, part: str, own: Mapping[int, Head]) -> list[Head]:
        """A layer's heads: its own at their places, distractors at the others; some could write to ``part``."""
        return [
            own[i]
            if i in own
            else reads_nothing(stream, part)
            if (layer + i) % 3 == 0
            else writes_unread(stream, 10 * layer + i)
            for i in range(n_heads)
        ]


def _idle(stream: Stream, seed: int) -> Neurons:
    """Neurons that read everything and write where nothing reads."""
    rng = np.random.default_rng(seed)
    write = rng.normal(size=(6, stream.sizes["unread"])) @ stream["unread"]
    return Neurons(rng.normal(size=(6, stream.d_model)), write)


@dataclass(frozen=True)
class KnownFraction(Program):
    """The share of x among the letters so far, for a number of letters, x the first of them.

    Raises:
        HookError: for fewer than two letters, and heads that are not there.
    """

    name: ClassVar[str] = "frac_prevs"
    description: ClassVar[str] = "The share of the letter x so far, as a token: an MLP marks it, a head takes the mean."
    notes: ClassVar[str] = (
        "The head attends to all positions alike whatever it reads, so the true edges are the same by zeros and by "
        "corrupted prompts."
    )
    kinds: ClassVar[tuple[str, ...]] = ("letters",)
    SHARP: ClassVar[float] = 100.0
    LENGTH: ClassVar[int] = 8

    n_letters: int = 4
    n_heads: int = 4
    mean_head: int = 2

    def __post_init__(self) -> None:
        check_whole("n_letters", self.n_letters, 2)
        check_heads(self, "mean_head")

    @property
    def fractions(self) -> list[Fraction]:
        """What is said by the tokens after the letters, in their order."""
        return sorted({Fraction(count, n) for n in range(1, self.LENGTH + 1) for count in range(n + 1)})

    def program(self, tokens: Sequence[int]) -> list[int | None]:
        said = {fraction: self.n_letters + i for i, fraction in enumerate(self.fractions)}
        shares = [Fraction(list(tokens[: i + 1]).count(0), i + 1) for i in range(len(tokens))]
        return [said[share] for share in shares]

    def module(self) -> Model:
        values = np.array([float(fraction) for fraction in self.fractions])
        n_tokens = self.n_letters + len(values)
        stream = Stream(token=n_tokens, position=POSITIONS, is_x=1, share=1, unread=UNREAD)
        nothing = np.zeros((1, stream.d_model))
        mean = Head(query=nothing, key=nothing, value=stream["is_x"], write=stream["share"])
        marks = Neurons(read=stream["token"][:1], write=stream["is_x"])
        layers = [
            Layer(self._heads(stream, 0, self.n_heads, "is_x", {}), joined(marks, _idle(stream, 100))),
            Layer(self._heads(stream, 1, self.n_heads, "share", {self.mean_head: mean}), _idle(stream, 101)),
        ]
        unembed, bias = np.zeros((n_tokens, stream.d_model)), np.zeros(n_tokens)
        unembed[self.n_letters :] = 2 * self.SHARP * values[:, None] * stream["share"]
        bias[: self.n_letters], bias[self.n_letters :] = -10 * self.SHARP, -self.SHARP * values**2
        return build("known_frac_prevs", stream["token"], stream["position"], layers, unembed, bias)

    def prompt(self, rng: np.random.Generator) -> list[int]:
        letters = rng.integers(1, self.n_letters, self.LENGTH)
        return np.where(rng.random(self.LENGTH) < rng.random(), 0, letters).tolist()

    def pair(self, rng: np.random.Generator, kind: str) -> dict[str, Any]:
        clean, corrupted = self.prompt(rng), self.prompt(rng)
        while self.answer(clean) == self.answer(corrupted):
            corrupted = self.prompt(rng)
        return self.asked(clean, corrupted)

    @property
    def true_edges(self) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        mean = f"L1H{self.mean_head}"
        edges = {"letters": ("embed->L0 mlp", f"L0 mlp->{mean}<v>", f"{mean}->logits")}
        return {"corrupted": edges, "zero": edges}


@dataclass(frozen=True)
class KnownReverse(Program):
    """Letters backwards after SEP, for a number of letters.

    Raises:
        HookError: for fewer letters than a pair of prompts has, and heads that are not there.
    """

    name: ClassVar[str] = "reverse"
    description: ClassVar[str] = "Letters, SEP, and the letters backwards: where SEP stands says where to look."
    notes: ClassVar[str] = (
        "Corrupted prompts change letters ('letters') or where SEP stands ('length'). Of 'length' a true edge has next "
        "to no gradient: where plain EAP ranks it, and so what its strongest edges keep, is a matter of rounding. What "
        "reads positions alone shows with zeros and not with corrupted prompts. By zeros, estimates from gradients "
        "miss embed->L0 mlp: the neuron that is on reads 1 - 1 there, and what those that are off would do no "
        "gradient says."
    )
    kinds: ClassVar[tuple[str, ...]] = ("letters", "length")
    START: ClassVar[int] = 0
    SEP: ClassVar[int] = 1
    LENGTH: ClassVar[int] = 12
    SAY: ClassVar[float] = 10.0
    IN_PAIR: ClassVar[int] = 10

    n_letters: int = 12
    n_heads: int = 4
    finding_head: int = 1
    looking_head: int = 3

    def __post_init__(self) -> None:
        check_whole("n_letters", self.n_letters, self.IN_PAIR)
        check_heads(self, "finding_head", "looking_head")

    @property
    def letters(self) -> range:
        """Ids of the letters."""
        return range(self.SEP + 1, self.SEP + 1 + self.n_letters)

    def program(self, tokens: Sequence[int]) -> list[int | None]:
        said: list[int | None] = [None] * len(tokens)
        if self.SEP in tokens:
            at = list(tokens).index(self.SEP)
            for i, letter in enumerate(reversed(tokens[1:at])):
                if at + i < len(tokens):
                    said[at + i] = letter
        return said

    def module(self) -> Model:
        n_tokens = self.letters.stop
        places = dict.fromkeys(("position", "separator", "target"), POSITIONS)
        stream = Stream(token=n_tokens, **places, said=self.n_letters, unread=UNREAD)
        token, position, always = stream["token"], stream["position"], stream.any_of("position")
        letter = token[self.letters.start : self.letters.stop]
        finding = Head(
            query=SURE * rows(2 * always, always),
            key=rows(token[self.SEP], position[0]),
            value=position,
            write=stream["separator"],
        )
        looking = Head(query=SURE * stream["target"], key=position, value=letter, write=stream["said"])
        where = [(at, q) for at in range(2, self.LENGTH) for q in range(at, min(2 * at - 1, self.LENGTH))]
        looks = Neurons(
            # 1 where SEP stands there and this is the position; at most 0 where one of them is not so.
            read=rows(*(stream["separator"][at] + position[q] - always for at, q in where)),
            write=rows(*(stream["target"][2 * at - q - 1] for at, q in where)),
        )
        layers = [
            Layer(
                self._heads(stream, 0, self.n_heads, "target", {self.finding_head: finding}),
                joined(looks, _idle(stream, 100)),
            ),
            Layer(self._heads(stream, 1, self.n_heads, "said", {self.looking_head: looking}), _idle(stream, 101)),
        ]
        unembed = np.zeros((n_tokens, stream.d_model))
        unembed[self.letters.start :] = self.SAY * stream["said"]
        return build("known_reverse", token, position, layers, unembed)

    def prompt(self, rng: np.random.Generator) -> list[int]:
        """Letters may come again; SEP stands where there are enough to go on to the end, or behind."""
        at = int(rng.integers(self.LENGTH // 2 + 1, self.LENGTH))
        return self._prompt(rng.choice(self.letters, at - 1).tolist(), at)

    def _prompt(self, letters: Sequence[int], at: int) -> list[int]:
        own = list(letters[: at - 1])
        return [self.START, *own, self.SEP, *reversed(own)][: self.LENGTH]

    def pair(self, rng: np.random.Generator, kind: str) -> dict[str, Any]:
        """Different letters. SEP stands at 7, 8 or 9, in the other prompt elsewhere up to 10: behind what is asked."""
        letters = distinct(rng, self.letters, self.IN_PAIR)
        new = letters.pop()
        at, other = distinct(rng, range(7, 11), 2)
        at, other = (other, at) if at == 10 else (at, other)
        clean = self._prompt(letters, at)
        if kind == "length":
            return self.asked(clean, self._prompt(letters, other))
        corrupted = list(clean)
        corrupted[2 * at - self.LENGTH] = new
        return self.asked(clean, corrupted)

    @property
    def true_edges(self) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        finding, looking = f"L0H{self.finding_head}", f"L1H{self.looking_head}"
        says = f"{looking}->logits"
        chain = (f"{finding}->L0 mlp", f"L0 mlp->{looking}<q>", says)
        reads = [*(f"embed->{finding}<{kind}>" for kind in "qkv"), "embed->L0 mlp"]
        zero = (*reads, *chain, f"embed->{looking}<k>", f"embed->{looking}<v>")
        by_kind = {"letters": (f"embed->{looking}<v>", says), "length": (f"embed->{finding}<k>", *chain)}
        return {"corrupted": by_kind, "zero": dict.fromkeys(self.kinds, zero)}


@dataclass(frozen=True)
class KnownHistogram(Program):
    """How often a letter came so far, for a number of letters.

    Raises:
        HookError: for fewer than two letters, and heads that are not there.
    """

    name: ClassVar[str] = "histogram"
    description: ClassVar[str] = "How often the letter came so far: a head attends to its like, an MLP counts by that."
    notes: ClassVar[str] = (
        "Corrupted prompts change the last letter ('last') or an earlier one ('earlier'). That START is what the head "
        "reads, and what is constant in the MLP, shows with zeros and not with corrupted prompts. Layer 1 does nothing."
    )
    kinds: ClassVar[tuple[str, ...]] = ("last", "earlier")
    START: ClassVar[int] = 0
    LENGTH: ClassVar[int] = 10
    SHARP: ClassVar[float] = 5.0

    n_letters: int = 4
    n_heads: int = 4
    same_head: int = 0

    def __post_init__(self) -> None:
        check_whole("n_letters", self.n_letters, 2)
        check_heads(self, "same_head")

    @property
    def letters(self) -> range:
        """Ids of the letters."""
        return range(1, 1 + self.n_letters)

    @property
    def counts(self) -> range:
        """What is said by the tokens after the letters, in their order."""
        return range(1, self.LENGTH)

    def program(self, tokens: Sequence[int]) -> list[int | None]:
        first = self.letters.stop - 1
        return [first + list(tokens[: i + 1]).count(token) if i else None for i, token in enumerate(tokens)]

    def module(self) -> Model:
        n_tokens = self.letters.stop + len(self.counts)
        stream = Stream(token=n_tokens, position=POSITIONS, share=1, count=1, unread=UNREAD)
        token, position, always = stream["token"], stream["position"], stream.any_of("position")
        letter = token[self.letters.start : self.letters.stop]
        same = Head(
            query=SURE * rows(letter, always),
            key=rows(letter, token[self.START]),
            value=token[self.START : self.START + 1],
            write=stream["share"],
        )
        # Between 1 / (1 + c) and 1 / (2 + c) the count falls by (c + 1)(c + 2) times the share: each knot adds to it.
        knots = np.arange(self.LENGTH)
        inverts = Neurons(
            read=always / (1 + knots)[:, None] - stream["share"], write=2.0 * (1 + knots)[:, None] * stream["count"]
        )
        layers = [
            Layer(
                self._heads(stream, 0, self.n_heads, "share", {self.same_head: same}),
                joined(inverts, _idle(stream, 100)),
            ),
            Layer(self._heads(stream, 1, self.n_heads, "count", {}), _idle(stream, 101)),
        ]
        values = np.array(self.counts, dtype=float)
        unembed, bias = np.zeros((n_tokens, stream.d_model)), np.zeros(n_tokens)
        unembed[self.letters.stop :] = 2 * self.SHARP * values[:, None] * stream["count"]
        bias[: self.letters.stop] = -10 * self.SHARP * self.LENGTH**2
        bias[self.letters.stop :] = -self.SHARP * values**2
        return build("known_histogram", token, position, layers, unembed, bias)

    def prompt(self, rng: np.random.Generator) -> list[int]:
        return [self.START, *rng.choice(self.letters, self.LENGTH - 1).tolist()]

    def pair(self, rng: np.random.Generator, kind: str) -> dict[str, Any]:
        while True:
            clean = self.prompt(rng)
            corrupted, last = list(clean), clean[-1]
            place = self.LENGTH - 1 if kind == "last" else int(rng.integers(1, self.LENGTH - 1))
            corrupted[place] = int(rng.choice(self.letters))
            counts = clean.count(last), corrupted.count(corrupted[-1])
            # With another last letter, what there is of it before must differ too: else queries alone say the same.
            if counts[0] not in (counts[1], counts[1] - (kind == "last")):
                return self.asked(clean, corrupted)

    @property
    def true_edges(self) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        same = f"L0H{self.same_head}"
        chain = (f"{same}->L0 mlp", "L0 mlp->logits")
        keys = f"embed->{same}<k>"
        by_kind = {"last": (f"embed->{same}<q>", keys, *chain), "earlier": (keys, *chain)}
        zero = (f"embed->{same}<q>", keys, f"embed->{same}<v>", "embed->L0 mlp", *chain)
        return {"corrupted": by_kind, "zero": dict.fromkeys(self.kinds, zero)}
