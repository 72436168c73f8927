"""What effects are measured on: texts, rows of token ids, mlx-lm's training batches, or prompts with an answer.

Whatever is given becomes examples: tokens, and for each position the token that is to follow it. Padding is taken off
and nothing is padded again: examples of one length run together, so each is what it is alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np

from ..encoding import encode_text
from ..errors import HookError
from ..model import HookedModel, check_hooked
from .directions import token_id

NOTHING = -1
"""In the place of a target where nothing is asked."""
MOST = 64
"""Examples that are taken of what has no length, unless told otherwise: training batches have no end."""
TOKENS_AT_ONCE = 2**11
"""Of all that runs in one pass. With MLX's CPU build more are no faster, since caches hold less of them; on
any machine a server's other requests, and whoever cancels, wait for the pass."""
BACKWARD = 3
"""Forward passes that one with its gradients counts for."""
FIELD = "eval_data"
_KEYS = ("clean", "corrupted", "answer", "wrong")


@dataclass(frozen=True)
class EvalExample:
    """One sequence and what is asked of it.

    Args:
        tokens: ids [pos].
        targets: the id that is to follow each position [pos], NOTHING where none is asked.
        corrupted: ids [pos] of the same length that ask for something else; None without.
        wrong: the id that the answer, the last target, is compared with; None without.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    corrupted: tuple[int, ...] | None = None
    wrong: int | None = None


@dataclass(frozen=True, eq=False)
class EvalBatch:
    """Examples of one length, side by side.

    Args:
        indices: which of the data's examples they are.
        tokens, targets: [batch, pos]; see :class:`EvalExample`.
        corrupted: [batch, pos]; None without.
        wrong: [batch]; None without.
    """

    indices: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    corrupted: np.ndarray | None
    wrong: np.ndarray | None

    @property
    def asked(self) -> np.ndarray:
        """The positions, ascending, at which some example has a target."""
        return np.flatnonzero((self.targets != NOTHING).any(axis=0))

    def repeated(self, n: int) -> "EvalBatch":
        """The batch with n copies of its rows, one after the other."""
        if n == 1:
            return self
        arrays: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        more = {name: None if array is None else np.concatenate([array] * n) for name, array in arrays.items()}
        return replace(self, **more)  # type: ignore[arg-type]


@dataclass(frozen=True)
class EvalData:
    """Examples of one kind; :func:`eval_data_of` makes them.

    Args:
        examples: at least one.
        kind: "texts", whose every next token is asked for, or "answers", of which the last is.
        n_cut: how many texts were longer than allowed and lost their end.
    """

    examples: tuple[EvalExample, ...]
    kind: str
    n_cut: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def n_targets(self) -> int:
        """Positions at which something is asked, of all examples."""
        return sum(target != NOTHING for example in self.examples for target in example.targets)

    @property
    def has_corrupted(self) -> bool:
        """Whether each example has a corrupted partner: they are of one kind."""
        return self.examples[0].corrupted is not None

    @property
    def has_wrong(self) -> bool:
        """Whether each answer has a wrong one to be compared with."""
        return self.examples[0].wrong is not None

    def batches(self, size: int, cost: int = 1) -> Iterator[EvalBatch]:
        """The examples, at most ``size`` at once, as :func:`together` has them.

        Args:
            cost: see :func:`rows_at_once`.
        """
        for indices in together([len(example.tokens) for example in self.examples], size, cost):
            yield self._batch(indices)

    def _batch(self, indices: list[int]) -> EvalBatch:
        chosen = [self.examples[i] for i in indices]
        return EvalBatch(
            np.array(indices),
            np.array([example.tokens for example in chosen]),
            np.array([example.targets for example in chosen]),
            np.array([example.corrupted for example in chosen]) if self.has_corrupted else None,
            np.array([example.wrong for example in chosen]) if self.has_wrong else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """What they are, as plain JSON values; not the tokens."""
        return {
            "kind": self.kind,
            "examples": len(self),
            "targets": self.n_targets,
            "corrupted": self.has_corrupted,
            "wrong_answers": self.has_wrong,
            "cut": self.n_cut,
        }


def rows_at_once(tokens: int, cost: int = 1) -> int:
    """How many rows of so many tokens run in one pass: at most TOKENS_AT_ONCE tokens, or one row.

    Args:
        cost: passes that it counts for: 1, or BACKWARD.
    """
    return max(1, TOKENS_AT_ONCE // (cost * max(1, tokens)))


def together(lengths: Sequence[int], size: int, cost: int = 1) -> Iterator[list[int]]:
    """Indices of rows that run together: of one length, at most ``size``, of long ones as many as run in one pass.

    list(together([3, 5, 3, 3], 2))         # [[0, 2], [3], [1]]: lengths as they first appear
    """
    by_length: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        by_length.setdefault(length, []).append(i)
    for length, same in by_length.items():
        at_once = min(size, rows_at_once(length, cost))
        for start in range(0, len(same), at_once):
            yield same[start : start + at_once]


def eval_data_of(
    model: HookedModel, given: Any, *, max_examples: int | None = None, max_tokens: int | None = None
) -> EvalData:
    """Examples from what a caller has.

        eval_data_of(model, ["The capital of France is Paris .", ...])
        eval_data_of(model, mlx_lm.tuner.trainer.iterate_batches(dataset, 4, 512))
        eval_data_of(model, [{"clean": "The capital of France is", "corrupted": "The capital of Italy is",
                              "answer": " Paris", "wrong": " Rome"}])

    Args:
        given: an iterable of texts, of rows of ids [pos], of mlx-lm's batches (tokens [batch, pos], and for each row
            where what is learned begins and where the row ends [batch, 2]; what is padding is not asked for), or of
            mappings: ``clean`` and ``answer``, and if wished ``corrupted``, of as many tokens, and ``wrong``. Prompts
            are texts or rows of ids, answers single tokens, as texts or ids. All are of one kind. Or ``EvalData``.
        max_examples: only the first so many are taken; None for all, and of what has no length for MOST.
        max_tokens: of longer texts the rest is left out; None for what the model reads at most.

    Raises:
        HookError: for no examples, what is none of these, with its index, a text of one token, ids that the model does
            not have, and prompts that are too long, not as long as their partner, or the same.
    """
    check_hooked(model)
    for name, asked in (("max_examples", max_examples), ("max_tokens", max_tokens)):
        if asked is not None and (type(asked) is not int or asked < 1):
            raise HookError(f"{name} is a whole number from 1 up, or None, got {asked!r}.", field=name)
    limit = _limit(model, max_tokens)
    if isinstance(given, EvalData):
        return _fitted(model, given, max_examples, limit)
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise _not_data(type(given).__name__)
    if max_examples is None and not isinstance(given, Sized):
        max_examples = MOST
    found: list[EvalExample] = []
    kinds: dict[str, int] = {}
    n_cut = 0
    for i, item in enumerate(given):
        kind, examples, cut = _read(model, item, i, limit)
        n_cut += cut
        kinds.setdefault(kind, i)
        if len(kinds) > 1:
            (first, _), (second, at) = kinds.items()
            raise HookError(f"Examples are of one kind: example {at} has {second}, those before {first}.", field=FIELD)
        found += examples if max_examples is None else islice(examples, max_examples - len(found))
        if len(found) == max_examples:
            break
    if not found:
        raise _nothing()
    return EvalData(tuple(found), "answers" if "answer" in next(iter(kinds)) else "texts", n_cut)


def _not_data(what: str) -> HookError:
    return HookError(
        "Eval data is a list of texts, of rows of token ids, of batches with their lengths, or of mappings with clean "
        f"and answer; got {what}.",
        field=FIELD,
    )


def _nothing() -> HookError:
    return HookError("There is no eval data: give at least one text, row of ids, batch or prompt.", field=FIELD)


def _fitted(model: HookedModel, data: EvalData, max_examples: int | None, limit: int | None) -> EvalData:
    """Examples that were made before, for this model or another one, as they would have been made now."""
    examples = data.examples[:max_examples]
    for i, example in enumerate(examples):
        targets = [target for target in example.targets if target != NOTHING]
        wrong = [] if example.wrong is None else [example.wrong]
        _check_ids(model, [*example.tokens, *(example.corrupted or ()), *targets, *wrong], f"Example {i}")
        if data.kind == "answers":
            _check_length(len(example.tokens), limit, f"Example {i}")
    cut = [example if data.kind == "answers" else _cut(example, limit) for example in examples]
    n_cut = sum(a is not b for a, b in zip(examples, cut, strict=True))
    kept = tuple(example for example in cut if _asks(example))
    if not kept:
        raise _nothing()
    return data if kept == data.examples else EvalData(kept, data.kind, data.n_cut + n_cut)


def _limit(model: HookedModel, max_tokens: int | None) -> int | None:
    own = model.cfg.max_positions
    return own if max_tokens is None else max_tokens if own is None else min(own, max_tokens)


def _read(model: HookedModel, item: Any, i: int, limit: int | None) -> tuple[str, list[EvalExample], int]:
    """What an item is in words, its examples, and how many of them were cut."""
    if isinstance(item, Mapping):
        return _keys_of(item, i), [_prompt(model, item, i, limit)], 0
    if _is_batch(item):
        tokens, lengths = item
        rows = list(_rows_of_batch(model, tokens, lengths, i))
        examples = [_cut(example, limit) for example in rows]
        n_cut = sum(a is not b for a, b in zip(rows, examples, strict=True))
        # What is learned may begin behind the cut.
        return "texts", [example for example in examples if _asks(example)], n_cut
    ids = _tokens(model, item, i)
    if len(ids) < 2:
        raise HookError(f"Example {i} has one token: the first token that is asked for is the second.", field=FIELD)
    example = EvalExample(ids, (*ids[1:], NOTHING))
    cut = _cut(example, limit)
    return "texts", [cut], int(cut is not example)


def _asks(example: EvalExample) -> bool:
    return any(target != NOTHING for target in example.targets)


def _cut(example: EvalExample, limit: int | None) -> EvalExample:
    if limit is None or len(example.tokens) <= limit:
        return example
    # The last position keeps its target: the token itself need not be read.
    return replace(example, tokens=example.tokens[:limit], targets=example.targets[:limit])


def _tokens(model: HookedModel, given: Any, i: int, what: str = "") -> tuple[int, ...]:
    """The ids of a text or a row of ids."""
    where = f"{what} of example {i}" if what else f"Example {i}"
    if isinstance(given, str):
        ids = encode_text(model, given) if given.strip() else []
    elif isinstance(given, Sequence | np.ndarray | mx.array) and not isinstance(given, bytes):
        array = np.array(given) if len(given) else np.zeros(0, np.int64)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise _not_data(f"{given!r} as example {i}")
        ids = [int(token) for token in array]
    else:
        raise _not_data(f"{type(given).__name__} as example {i}")
    if not ids:
        raise HookError(f"{where} is empty.", field=FIELD)
    _check_ids(model, ids, where)
    return tuple(ids)


def _check_ids(model: HookedModel, ids: Sequence[int], where: str) -> None:
    outside = [token for token in ids if not 0 <= token < model.cfg.d_vocab]
    if outside:
        raise HookError(f"{where} has token {outside[0]}: ids are 0 to {model.cfg.d_vocab - 1}.", field=FIELD)


def _check_length(n_tokens: int, limit: int | None, where: str) -> None:
    if limit is not None and n_tokens > limit:
        raise HookError(f"{where} has {n_tokens} tokens; at most {limit} are read.", field=FIELD)


def _is_batch(item: Any) -> bool:
    return isinstance(item, tuple | list) and len(item) == 2 and getattr(item[0], "ndim", 0) == 2


def _rows_of_batch(model: HookedModel, batch: Any, lengths: Any, i: int) -> Iterator[EvalExample]:
    """The rows of a batch as mlx-lm makes them, without padding.

    mlx-lm's own loss asks one position more of a row that is padded: for the first token of its padding.
    """
    tokens, ends = np.array(batch), np.array(lengths)
    if ends.ndim == 1:
        ends = np.stack([np.zeros_like(ends), ends], axis=1)
    if ends.shape != (len(tokens), 2):
        raise HookError(
            f"The lengths of batch {i} are [batch, 2]: where each row's targets begin, and where it ends; "
            f"got {ends.shape} for {len(tokens)} rows.",
            field=FIELD,
        )
    for row, (start, stop) in zip(tokens, ends.tolist(), strict=True):
        ids = _tokens(model, row[:stop], i)
        targets = [ids[p + 1] if p + 1 < len(ids) and p + 1 >= start else NOTHING for p in range(len(ids))]
        example = EvalExample(ids, tuple(targets))
        if _asks(example):
            yield example


def _keys_of(item: Mapping[str, Any], i: int) -> str:
    unknown = [str(key) for key in item if key not in _KEYS]
    given = [key for key in _KEYS if item.get(key) is not None]
    if unknown or not {"clean", "answer"} <= set(given):
        raise HookError(
            f"A prompt has clean and answer, and may have corrupted and wrong; example {i} has "
            f"{', '.join(map(str, item)) or 'nothing'}.",
            field=FIELD,
        )
    return ", ".join(given)


def _prompt(model: HookedModel, item: Mapping[str, Any], i: int, limit: int | None) -> EvalExample:
    clean = _tokens(model, item["clean"], i, "clean")
    _check_length(len(clean), limit, f"clean of example {i}")
    corrupted = None
    if item.get("corrupted") is not None:
        corrupted = _tokens(model, item["corrupted"], i, "corrupted")
        if len(corrupted) != len(clean):
            raise HookError(
                f"clean and corrupted have as many tokens; example {i} has {len(clean)} and {len(corrupted)}.",
                field=FIELD,
            )
        if corrupted == clean:
            raise HookError(f"clean and corrupted of example {i} are the same.", field=FIELD)
    answer = _single(model, item["answer"], i, "answer")
    wrong = None if item.get("wrong") is None else _single(model, item["wrong"], i, "wrong")
    if wrong == answer:
        raise HookError(f"answer and wrong of example {i} are the same token.", field=FIELD)
    return EvalExample(clean, (*[NOTHING] * (len(clean) - 1), answer), corrupted, wrong)


def _single(model: HookedModel, given: Any, i: int, what: str) -> int:
    try:
        return token_id(model, given)
    except HookError as error:
        raise HookError(f"{what} of example {i}: {error}", field=FIELD) from error
