"""Token directions: which logit, or which difference of two, is asked about."""

from collections.abc import Sequence
from operator import index
from typing import Any

import mlx.core as mx

from ..errors import HookError
from ..model import HookedModel

Token = int | str
Direction = Token | Sequence[Token]
"""A token, or a pair of them: then the difference, first less second, is meant."""

_FIELD = "token_directions"


def resolve_directions(model: HookedModel, asked: Any) -> list[tuple[int, ...]]:
    """Directions as tuples of one or two ids each, all alike.

    >>> resolve_directions(model, [("Paris", "Rome"), (157, 160)])
    [(157, 160), (157, 160)]

    Args:
        asked: a token, a tuple of two, or a list of tokens or of pairs. A token is an id, or a text that the tokenizer
            has as one token.

    Raises:
        HookError: for what is none of these, ids beyond the vocabulary, and single tokens mixed with pairs.
    """
    listed = asked if isinstance(asked, list) else [asked]
    found = [tuple(token_id(model, t) for t in (d if isinstance(d, tuple | list) else [d])) for d in listed]
    if not found or any(len(d) != len(found[0]) or len(d) not in (1, 2) for d in found):
        raise HookError(
            f"token_directions is a list of tokens or a list of pairs of tokens, got {asked!r}.", field=_FIELD
        )
    return found


def directions_of_rows(model: HookedModel, asked: Any, batch: int) -> list[tuple[int, ...]]:
    """One direction per batch row: as many as rows are given, or one for all of them."""
    found = resolve_directions(model, asked)
    if len(found) not in (1, batch):
        raise HookError(
            f"token_directions has one direction per batch row, or one for all: got {len(found)} for {batch} "
            f"row{'s' if batch > 1 else ''}. A pair of tokens is written as a tuple: (a, b).",
            field=_FIELD,
        )
    return found * batch if len(found) == 1 else found


def token_id(model: HookedModel, token: Any) -> int:
    """The id of a token given as id or text.

    Raises:
        HookError: for an id beyond the vocabulary, and for a text that is not one token of the tokenizer's.
    """
    if isinstance(token, str):
        return _id_of_text(model, token)
    try:
        found = index(token)
    except TypeError:
        found = -1
    if isinstance(token, bool) or not 0 <= found < model.cfg.d_vocab:
        raise HookError(f"A token is an id from 0 to {model.cfg.d_vocab - 1} or a text, got {token!r}.", field=_FIELD)
    return found


def _id_of_text(model: HookedModel, text: str) -> int:
    if model.tokenizer is None:
        raise HookError(f"This model has no tokenizer: give the id of {text!r}.", field=_FIELD)
    ids = list(model.tokenizer.encode(text, add_special_tokens=False))
    if len(ids) != 1 or ids[0] == getattr(model.tokenizer, "unk_token_id", None):
        what = "an unknown one" if len(ids) == 1 else f"{len(ids)} tokens"
        raise HookError(f"{text!r} is {what} to this model's tokenizer: give a text that is one token.", field=_FIELD)
    return ids[0]


def along(values: mx.array, directions: list[tuple[int, ...]]) -> mx.array:
    """Values [batch, pos, d_vocab] at one direction per row: of a pair, the difference, [batch, pos] in float32."""
    picked = [_of_token(values, [d[i] for d in directions]) for i in range(len(directions[0]))]
    return picked[0] - picked[1] if len(picked) == 2 else picked[0]


def accuracy(values: mx.array, directions: list[tuple[int, ...]]) -> mx.array:
    """The share of batch rows [pos], from 0 to 1, in which the first of a pair exceeds the second; for single tokens,
    in which the token is the likeliest of all."""
    if len(directions[0]) == 2:
        right = along(values, directions) > 0
    else:
        right = mx.argmax(values, axis=-1) == mx.array([d[0] for d in directions])[:, None]
    return right.astype(mx.float32).mean(axis=0)


def _of_token(values: mx.array, ids: list[int]) -> mx.array:
    at = mx.broadcast_to(mx.array(ids)[:, None, None], (*values.shape[:2], 1))
    return mx.take_along_axis(values, at, axis=-1)[..., 0].astype(mx.float32)
