"""How a token is chosen, and how probable it was: mlx-lm's arithmetic, with a random state per generation.

MLX has one random state per thread. A generation that drew from it would depend on whatever else draws between its
steps, so each one has a key of its own, split once per token just as MLX splits its state: the same seed gives
mlx-lm's tokens bit for bit, however many generations take turns. A hook that draws random numbers without a key still
draws from MLX's state, which ``seed`` leaves alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors

from .errors import HookError

LOWEST_TEMPERATURE = 1e-6
"""Below it, logits divided by the temperature leave float32; 0 is the limit that is meant."""


@dataclass(frozen=True)
class Sampling:
    """What decides on a token; ``temperature`` 0 takes the most probable one. The same seed gives the same text.

    A generation with a seed, or at temperature 0, leaves MLX's random state alone; another one takes its own from it
    at its first step, so that after ``mx.random.seed`` it is repeatable too.

    Args:
        temperature, top_p, top_k, min_p: mlx-lm's; the filters see the distribution before the temperature.
        repetition_penalty: mlx-lm's: over the last 20 tokens, the prompt's among them, positive logits are divided by
            it, negative ones multiplied.
        frequency_penalty, presence_penalty: OpenAI's: a generated token's logit loses the first as often as the token
            was generated, and the second once. The prompt does not count.
        logit_bias: added to the logits of these token ids.
        seed: 0 to 2**64 - 1.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None

    def check(self) -> None:
        """Raises HookError for a number outside its range; ``error.field`` names it."""
        for name, kind, high in [
            ("temperature", "number", math.inf),
            ("top_p", "number", 1),
            ("min_p", "number", 1),
            ("repetition_penalty", "number", math.inf),
            ("top_k", "whole number", math.inf),
            ("seed", "whole number", 2**64 - 1),
        ]:
            value = getattr(self, name)
            if value is None and name in ("repetition_penalty", "seed"):
                continue
            types = int if kind == "whole number" else int | float
            # Written so that NaN fails.
            if isinstance(value, bool) or not isinstance(value, types) or not 0 <= value <= high or value == math.inf:
                upward = f" to {high}" if high < math.inf else " up"
                raise HookError(f"{name} is a {kind} from 0{upward}, got {value!r}.", field=name)
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise HookError(f"{name} is a finite number, got {value!r}.", field=name)
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise HookError(
                f"temperature is 0 or at least {LOWEST_TEMPERATURE}, got {self.temperature!r}.", field="temperature"
            )
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise HookError(f"logit_bias maps token ids to numbers, got {self.logit_bias!r}.", field="logit_bias")


def whole_number(name: str, value: Any) -> None:
    """Raise HookError for what is no whole number from 0 up."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise HookError(f"{name} is a whole number from 0 up, got {value!r}.")


@dataclass(frozen=True)
class TokenLogprobs:
    """How probable the model itself found a token, and the likeliest ones: natural logs of the softmax of its logits.

    Nothing that decides on the token is in these numbers: no bias, no penalty, no temperature, no filter. Edits of
    hooks and interventions are, since they change the model's logits.

    Args:
        logprob: of the token that was chosen.
        tokens: ids of the likeliest tokens, the likeliest first.
        logprobs: theirs.
    """

    logprob: float
    tokens: list[int]
    logprobs: list[float]


class Choice(NamedTuple):
    """A token [1], the log of its probability [], and what ``TokenLogprobs`` holds, as arrays not yet evaluated."""

    token: mx.array
    logprob: mx.array
    likely: tuple[mx.array, mx.array, mx.array] | None

    def arrays(self) -> list[mx.array]:
        return [self.token, self.logprob, *(self.likely or ())]

    def likeliest(self) -> TokenLogprobs | None:
        """The numbers, once they are evaluated."""
        if self.likely is None:
            return None
        said: list[Any] = [array.tolist() for array in self.likely]
        return TokenLogprobs(*said)


class Sampler:
    """Chooses the tokens of one generation, which must be its own.

        sampler = Sampler(Sampling(temperature=0.7, seed=1), d_vocab)
        sampler.read(prompt)                              # what the model was fed, [n]
        sampler.choose(logits).token                      # [1]; from logits [1, d_vocab]

    Args:
        top_logprobs: how many of the likeliest tokens each choice tells; None for no ``TokenLogprobs`` at all.
    """

    def __init__(self, sampling: Sampling, d_vocab: int, top_logprobs: int | None = None) -> None:
        self._processors = make_logits_processors(dict(sampling.logit_bias or {}), sampling.repetition_penalty)
        self._history: mx.array | None = None
        self._frequency, self._presence = sampling.frequency_penalty, sampling.presence_penalty
        self._counts: mx.array | None = None
        self._temperature = sampling.temperature
        # In mlx-lm's order. It raises for a top_k of the whole vocabulary or more, which leaves nothing out.
        self._filters = [
            *([partial(apply_top_p, top_p=sampling.top_p)] if 0 < sampling.top_p < 1 else []),
            *([partial(apply_min_p, min_p=sampling.min_p)] if sampling.min_p else []),
            *([partial(apply_top_k, top_k=sampling.top_k)] if 0 < sampling.top_k < d_vocab else []),
        ]
        self._key = None if sampling.temperature == 0 else _own_key(sampling.seed)
        self._top_logprobs = top_logprobs

    def read(self, tokens: mx.array) -> None:
        """Tokens [n] that the model was fed, in their order."""
        if self._processors:
            self._history = tokens if self._history is None else mx.concatenate([self._history, tokens])

    def choose(self, logits: mx.array) -> Choice:
        """The token that follows; its log probability is that after the processors, before the temperature."""
        # First, because processors write into the logits.
        model_s = None if self._top_logprobs is None else _logprobs(logits[0].astype(mx.float32))
        for processor in self._processors:
            logits = processor(self._history, logits)
        logprobs = _logprobs(self._penalised(logits))
        token = self._draw(logprobs)
        if self._counts is not None:
            self._counts = self._counts.at[token].add(1)
        likely = None if model_s is None else (model_s[token[0]], *largest(model_s, self._top_logprobs or 0))
        return Choice(token, logprobs[0, token[0]], likely)

    def _penalised(self, logits: mx.array) -> mx.array:
        if not (self._frequency or self._presence):
            return logits
        if self._counts is None:
            self._counts = mx.zeros(logits.shape[-1])
        penalty = self._frequency * self._counts + self._presence * (self._counts > 0)
        return logits - penalty.astype(logits.dtype)

    def _draw(self, logprobs: mx.array) -> mx.array:
        if self._key is None:
            return mx.argmax(logprobs, axis=-1)
        for kept in self._filters:
            logprobs = kept(logprobs)
        self._key, key = mx.random.split(self._key)
        return mx.random.categorical(logprobs * (1.0 / self._temperature), key=key)


def _logprobs(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, keepdims=True)


def largest(values: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Indices and values [..., k] of the largest of [..., n], the largest first; all n if there are no more."""
    k = min(k, values.shape[-1])
    indices = mx.argpartition(-values, kth=max(k - 1, 0), axis=-1)[..., :k]
    found = mx.take_along_axis(values, indices, axis=-1)
    order = mx.argsort(-found, axis=-1)
    return mx.take_along_axis(indices, order, axis=-1), mx.take_along_axis(found, order, axis=-1)


def _own_key(seed: int | None) -> mx.array:
    """The key that MLX's state would have after ``mx.random.seed(seed)``, or one that is split off that state."""
    if seed is not None:
        return mx.random.key(seed)
    state: Any = mx.random.state
    own = mx.random.split(state[0])[1]
    # One draw splits the state in the same way: what others draw from now on is not what the generation draws.
    mx.random.uniform()
    return own
