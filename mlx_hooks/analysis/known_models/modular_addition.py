"""Addition modulo p by known frequencies: "a b =" is followed by (a + b) mod p.

Source: Nanda et al., "Progress measures for grokking via mechanistic interpretability" (2023), arXiv:2301.05217. What
their model learns is here set by hand, for the angles w_f = 2 pi f / p of a few frequencies f:

    1. A number a is embedded as cos(w_f a) and sin(w_f a).
    2. At "=" one head reads the first number, another one the second.
    3. The MLP multiplies them, x y = ((x + y)^2 - (x - y)^2) / 4 with x^2 = relu(x)^2 + relu(-x)^2, and so makes
       cos(w_f (a + b)) = cos cos - sin sin and sin(w_f (a + b)) = sin cos + cos sin.
    4. The logit of c is SAY times the sum over frequencies of cos(w_f (a + b - c)), read from these two.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from ...errors import HookError
from .known import KnownModel, check_heads, check_whole
from .transformer import Head, Layer, Model, Neurons, Stream, build, reads_nothing, rows, writes_unread

SURE = 20 * np.log(2)
POSITIONS = 32


@dataclass(frozen=True)
class KnownModularAddition(KnownModel):
    """The construction for an odd modulus and frequencies from 1 to (modulus - 1) / 2.

    Raises:
        HookError: for another modulus, frequencies that do not tell all numbers apart, and fewer than two heads.
    """

    name: ClassVar[str] = "modular_addition"
    description: ClassVar[str] = "(a + b) mod p by a few frequencies: two heads read the numbers, an MLP multiplies."
    notes: ClassVar[str] = "Which position a head reads shows with zeros and not with corrupted prompts."
    kinds: ClassVar[tuple[str, ...]] = ("first", "second")
    SAY: ClassVar[float] = 10.0

    modulus: int = 23
    frequencies: tuple[int, ...] = (2, 3, 4, 11)
    n_heads: int = 4

    def __post_init__(self) -> None:
        check_whole("modulus", self.modulus, 3)
        if self.modulus % 2 == 0:
            raise HookError(f"modulus is odd, got {self.modulus}.", field="modulus")
        highest, given = self.modulus // 2, self.frequencies
        listed = isinstance(given, tuple | list) and all(type(f) is int and 1 <= f <= highest for f in given)
        if not listed or not given or len(set(given)) < len(given):
            raise HookError(
                f"frequencies are different whole numbers from 1 to {highest}, got {given!r}.", field="frequencies"
            )
        if gcd(self.modulus, *given) > 1:
            # All waves would come again before the modulus: different sums would look alike.
            raise HookError(
                f"frequencies and modulus have no divisor in common, got {given!r} and {self.modulus}.",
                field="frequencies",
            )
        check_heads(self, least=2)

    @property
    def equals(self) -> int:
        """The id of "=", after the numbers."""
        return self.modulus

    def waves(self, numbers: Any) -> np.ndarray:
        """cos(w_f n) of all frequencies, then sin(w_f n), [number, 2 frequencies]."""
        angles = 2 * np.pi * np.outer(numbers, self.frequencies) / self.modulus
        return np.hstack([np.cos(angles), np.sin(angles)])

    def module(self) -> Model:
        n = len(self.frequencies)
        stream = Stream(waves=2 * n, equals=1, position=POSITIONS, first=2 * n, second=2 * n, product=2 * n, unread=8)
        heads = [
            Head(2 * SURE * stream["position"][2:3], stream["position"][place : place + 1], stream["waves"], stream[to])
            for place, to in enumerate(("first", "second"))
        ]
        others = [
            reads_nothing(stream, "product") if i % 2 else writes_unread(stream, i) for i in range(2, self.n_heads)
        ]
        first, second, product = (stream[part] for part in ("first", "second", "product"))
        cosines, sines = slice(0, n), slice(n, 2 * n)
        neurons = [
            _products(first[cosines], second[cosines], product[cosines]),
            _products(first[sines], second[sines], -product[cosines]),
            _products(first[sines], second[cosines], product[sines]),
            _products(first[cosines], second[sines], product[sines]),
        ]
        layer = Layer([*heads, *others], Neurons(*(rows(*part) for part in zip(*neurons, strict=True))))
        numbers = self.waves(np.arange(self.modulus))
        tokens = np.vstack([numbers @ stream["waves"], stream["equals"]])
        unembed = np.vstack([self.SAY * numbers @ product, np.zeros((1, stream.d_model))])
        return build("known_modular_addition", tokens, stream["position"], [layer], unembed, activation="relu2")

    def closed_form(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits at "=" [d_vocab] for "a b =", as if heads read exactly one position."""
        a, b, _ = tokens
        sums = self.waves([a + b]) @ self.waves(np.arange(self.modulus)).T
        return np.append(self.SAY * sums[0], 0.0)

    def pair(self, rng: np.random.Generator, kind: str) -> dict[str, Any]:
        clean = [*rng.integers(0, self.modulus, 2).tolist(), self.equals]
        corrupted = list(clean)
        place = self.kinds.index(kind)
        corrupted[place] = int(clean[place] + rng.integers(1, self.modulus)) % self.modulus
        answer, wrong = (sum(tokens[:2]) % self.modulus for tokens in (clean, corrupted))
        return {"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": wrong}

    @property
    def true_edges(self) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        by_kind = {
            kind: (f"embed->L0H{head}<v>", f"L0H{head}->L0 mlp", "L0 mlp->logits")
            for head, kind in enumerate(self.kinds)
        }
        reads = [f"embed->L0H{head}<{kind}>" for head in (0, 1) for kind in "qkv"]
        zero = (*reads, "L0H0->L0 mlp", "L0H1->L0 mlp", "L0 mlp->logits")
        return {"corrupted": by_kind, "zero": dict.fromkeys(self.kinds, zero)}

    # Progress measures

    def all_logits(self, model: Any) -> np.ndarray:
        """The logits at "=" of all sums, [a, b, c] in float64.

        Args:
            model: maps ids [batch, pos] to logits: the module, or the hooked model with interventions in force.
        """
        a, b = np.divmod(np.arange(self.modulus**2), self.modulus)
        prompts = np.stack([a, b, np.full_like(a, self.equals)], axis=1)
        logits = np.array(model(mx.array(prompts)).astype(mx.float32)).astype(np.float64)
        return logits[:, -1, : self.modulus].reshape(3 * (self.modulus,))

    def restricted_loss(self, logits: np.ndarray) -> float:
        """The mean loss of what logits [a, b, c] have along the waves of a + b of the frequencies, and their mean.

        Low where the model computes by these frequencies, as Nanda et al. define it.
        """
        return self.loss(self._along(logits) + logits.mean(axis=(0, 1)))

    def excluded_loss(self, logits: np.ndarray) -> float:
        """The mean loss without what logits [a, b, c] have along the waves of a + b of the frequencies.

        High where the model computes by these frequencies.
        """
        return self.loss(logits - self._along(logits))

    def loss(self, logits: np.ndarray) -> float:
        """The mean over all sums of -log probability of the right answer, of logits [a, b, c], in nats."""
        highest = logits.max(axis=-1, keepdims=True)
        log_total = highest[..., 0] + np.log(np.exp(logits - highest).sum(axis=-1))
        a, b = np.indices(logits.shape[:2])
        return float((log_total - logits[a, b, (a + b) % self.modulus]).mean())

    def _along(self, logits: np.ndarray) -> np.ndarray:
        a, b = np.indices(logits.shape[:2])
        waves = self.waves((a + b).ravel()).reshape(*a.shape, -1)
        # Waves of different frequencies are orthogonal, and each has half of p^2 for its square.
        return np.einsum("abw,cw->abc", waves, np.einsum("abw,abc->cw", waves, logits)) / (self.modulus**2 / 2)


def fourier_energy(embedding: np.ndarray) -> np.ndarray:
    """The share of each frequency in an embedding of numbers [p, d_model], p odd.

    It is [(p + 1) / 2]; 0 is the mean.

        fourier_energy(W_E)[[2, 3, 4, 11]].sum()

    Raises:
        HookError: for an embedding that is 0, and for an even number of numbers.
    """
    rows = np.asarray(embedding, dtype=np.float64)
    if rows.ndim != 2 or len(rows) % 2 == 0:
        raise HookError(f"An embedding is [p, d_model] with an odd p, got {list(rows.shape)}.")
    energy = (np.abs(np.fft.rfft(rows, axis=0)) ** 2).sum(axis=1)
    # Frequencies but 0 are there twice: rfft leaves out the second, which is as large.
    energy[1:] *= 2
    if not energy.sum() > 0:
        raise HookError("An embedding of zeros has no frequencies.")
    return energy / energy.sum()


def _products(x: np.ndarray, y: np.ndarray, write: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neurons that read x and y and write their product, of relu(.)^2: what they read and write [4 rows, d_model]."""
    return np.vstack([x + y, -x - y, x - y, y - x]), np.vstack([write, write, -write, -write]) / 4
