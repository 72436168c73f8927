"""The rows at which each number of a layer is largest, and what they are in words."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ..errors import HookError
from ..storage.rows import RowPart, Rows

Spell = Callable[[int], str | None] | None
"""What a token id is as text; None where nobody knows."""
_KEYS = "key"


class TopRows:
    """The largest values of each column, met part by part.

    Args:
        count: rows that are kept of each column.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.values = np.zeros((0, 0), np.float32)
        """[kept, column], the largest first."""
        self.rows = np.zeros((0, 0), np.int64)
        """Where they are, [kept, column]; of equal values the earlier row comes first."""

    def add(self, values: np.ndarray, numbers: np.ndarray) -> None:
        """Meet values [row, column], at least one row, of the rows with these numbers [row]."""
        at = _largest(values, min(self.count, len(values)))
        found, rows = np.take_along_axis(values, at, axis=0), numbers[at]
        if len(self.values):
            found, rows = np.concatenate([self.values, found]), np.concatenate([self.rows, rows])
        order = np.lexsort((rows, -found), axis=0)[: self.count]
        self.values, self.rows = (np.take_along_axis(each, order, axis=0) for each in (found, rows))

    def told(self, rows: Rows, spell: Spell, columns: Iterable[int] | None = None) -> list[list[dict[str, Any]]]:
        """What is kept of each column as plain JSON values: ``activation``, ``row``, and what is known of it."""
        chosen = range(self.rows.shape[1]) if columns is None else [int(column) for column in columns]
        due = np.unique(self.rows[:, list(chosen)])
        part = rows.take(due)
        places = {int(row): i for i, row in enumerate(due)}
        return [
            [
                {"activation": float(value), **told_row(part, places[int(row)], int(row), spell)}
                for value, row in zip(self.values[:, column], self.rows[:, column], strict=True)
            ]
            for column in chosen
        ]


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the largest values of each column are, [count, column], by row; of equal values the earlier ones."""
    least = np.partition(values, len(values) - count, axis=0)[len(values) - count]
    above, equal = values > least, values == least
    kept = above | (equal & (np.cumsum(equal, axis=0) <= count - above.sum(axis=0)))
    return np.nonzero(kept.T)[1].reshape(values.shape[1], count).T


def told_row(part: RowPart, at: int, row: int, spell: Spell) -> dict[str, Any]:
    """One row of a part as plain JSON values: its number, and where known its token, sequence, position and step."""
    told: dict[str, Any] = {"row": row}
    if part.tokens is not None:
        told["token_id"] = int(part.tokens[at])
        told["token"] = spell(told["token_id"]) if spell is not None else None
    for name in ("sequence", "position", "step"):
        label = getattr(part, name)
        if label is not None:
            told[name] = int(label[at])
    return told


def from_position(part: RowPart, skipped: int) -> np.ndarray:
    """Which rows of a part are behind the first ``skipped`` positions of their sequences, [row] of bool.

    Raises:
        HookError: where positions are not known and some are to be skipped.
    """
    if not skipped:
        return np.ones(len(part), dtype=bool)
    if part.position is None:
        raise HookError("skip_positions needs the rows' positions, which are not known here.", field="skip_positions")
    return part.position >= skipped


def check_vectors(rows: Rows) -> None:
    """Refuse rows whose numbers mean nothing on their own.

    Raises:
        HookError: for attention patterns and scores.
    """
    if rows.axes[-1:] == (_KEYS,):
        raise HookError(
            f"{rows.name} holds attention over keys, which are other positions in each row: analyse it with 'heads'.",
            field="layer",
        )


def finite(part: RowPart, rows: Rows) -> np.ndarray:
    """The values of a part, [row, width].

    Raises:
        HookError: where some are not finite.
    """
    if not np.isfinite(part.values).all():
        raise HookError(_not_finite(rows))
    return part.values


def _not_finite(rows: Rows) -> str:
    """How many rows hold a number that is not finite, and which is the first."""
    count, first, start = 0, "", 0
    steps: set[int] = set()
    others: set[int] = set()
    for part in rows.parts():
        wrong = np.flatnonzero(~np.isfinite(part.values).all(axis=1))
        count += len(wrong)
        if len(wrong) and not first:
            told = told_row(part, int(wrong[0]), start + int(wrong[0]), None)
            first = ", ".join(
                f"{name} {told[name]}" for name in ("step", "sequence", "position", "row") if name in told
            )
        if part.step is not None:
            steps |= set(part.step[wrong].tolist())
            others |= set(part.step.tolist())
        start += len(part)
    hint = ""
    if steps and steps < others:
        hint = f"; other steps than {', '.join(map(str, sorted(steps)))} can be analysed"
    return (
        f"The activations of {rows.name or 'the layer'} are not finite in {count} of {len(rows)} rows, the first at "
        f"{first}{hint}."
    )
