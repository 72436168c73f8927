"""Log probabilities in OpenAI's two shapes: a list of objects for chats, four parallel lists for texts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlx_hooks import TokenLogprobs
from mlx_hooks.token_text import TokenText

LOWEST = -9999.0
"""What OpenAI writes for a token that cannot be; JSON has no -Infinity."""


@dataclass(frozen=True)
class ScoredToken:
    """A token with its text, its bytes (None if it has none) and the natural log of its probability."""

    text: str
    raw: bytes | None
    logprob: float

    @property
    def is_text(self) -> bool:
        """Whether the bytes are whole characters."""
        return self.raw is None or self.text.encode() == self.raw

    def to_dict(self) -> dict[str, Any]:
        return {"token": self.text, "logprob": self.logprob, "bytes": None if self.raw is None else list(self.raw)}


@dataclass(frozen=True)
class TokenScore:
    """A chosen token, the likeliest ones in its place, and how many characters of text were there before it."""

    chosen: ScoredToken
    likeliest: list[ScoredToken]
    text_offset: int


def score(token: int, found: TokenLogprobs, text_offset: int, spelling: TokenText) -> TokenScore:
    """What the engine found, with every token spelled."""

    def scored(one: int, logprob: float) -> ScoredToken:
        return ScoredToken(spelling.text(one), spelling.raw(one), max(logprob, LOWEST))

    likeliest = [scored(one, logprob) for one, logprob in zip(found.tokens, found.logprobs, strict=True)]
    return TokenScore(scored(token, found.logprob), likeliest, text_offset)


def chat_logprobs(scores: Iterable[TokenScore]) -> dict[str, Any]:
    """``logprobs`` of a chat's choice."""
    content = [one.chosen.to_dict() | {"top_logprobs": [t.to_dict() for t in one.likeliest]} for one in scores]
    return {"content": content, "refusal": None}


def text_logprobs(scores: Iterable[TokenScore]) -> dict[str, Any]:
    """``logprobs`` of a text's choice: the chosen token is always among the top ones, so there may be one more."""
    scores = list(scores)
    return {
        "tokens": [_key(one.chosen) for one in scores],
        "token_logprobs": [one.chosen.logprob for one in scores],
        "top_logprobs": [_by_text([*one.likeliest, one.chosen]) for one in scores],
        "text_offset": [one.text_offset for one in scores],
    }


def _by_text(tokens: list[ScoredToken]) -> dict[str, float]:
    found: dict[str, float] = {}
    for token in tokens:
        # Of two tokens that are spelled alike, the likelier one comes first and is kept.
        found.setdefault(_key(token), token.logprob)
    return found


def _key(token: ScoredToken) -> str:
    return token.text if token.is_text else f"bytes:{token.text}"
