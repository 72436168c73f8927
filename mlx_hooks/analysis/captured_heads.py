"""What the heads of a layer attend to, from captured patterns: step by step of a training, where there are several.

A captured row of a pattern is one query: its attention over the keys, head by head. Here the rows of a sequence are put
together again by their positions, and scored by ``heads.py``.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from ..errors import HookError
from ..options import options, options_of
from ..storage.rows import RowPart, Rows
from . import heads
from .progress import Progress
from .top_rows import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = ("previous_token", "induction", "first_token", "entropy")
_AXES = ("head", "key")
_BYTES_AT_ONCE = 2**26
_ROUNDING = 1e-2
"""By how much a share may exceed 1 in half precision."""
_SHORTEST = 3
"""Positions that a sequence needs for every score."""


@options
class HeadOptions:
    """Options of :func:`analyse_heads`.

    Args:
        max_sequences: of each step the first so many sequences are scored; None is all of them.
    """

    max_sequences: Annotated[int, Field(ge=1)] | None = 64


@dataclass
class _Step:
    """The scores of one step's sequences."""

    n_sequences: int = 0
    scores: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in SCORES})
    """[head] of each sequence that has the score."""

    def add(self, pattern: np.ndarray, tokens: np.ndarray) -> None:
        self.n_sequences += 1
        self.scores["previous_token"].append(heads.previous_token_scores(pattern))
        self.scores["first_token"].append(heads.first_token_scores(pattern))
        self.scores["entropy"].append(heads.entropies(pattern))
        if heads.has_repetition(tokens):
            self.scores["induction"].append(heads.induction_scores(pattern, tokens))

    def told(self) -> dict[str, Any]:
        means = {name: np.mean(rows, axis=0).tolist() if rows else None for name, rows in self.scores.items()}
        return {"sequences": self.n_sequences, "with_repetition": len(self.scores["induction"]), **means}


def analyse_heads(rows: Rows, options: HeadOptions | dict | None = None, progress: Progress = None) -> dict[str, Any]:
    """How strongly each head of a layer follows known rules, at every step that was captured.

        found = analyse_heads(ShardReader("mechint_cache").rows("blocks.1.attn.hook_pattern"))
        found["induction"]                                  # [head], at the last step
        [step["induction"] for step in found["by_step"]]    # how it came to that

    Args:
        rows: of a layer's ``hook_pattern``, with tokens and positions.
        progress: called with the rows that are done and that there are.

    Returns:
        plain JSON values: of each step the means over its sequences, [head] each. ``previous_token``, ``first_token``
        and ``induction`` are shares of attention, ``entropy`` is a share of the largest possible one. ``induction`` is
        of the sequences in which a token comes again, None without any. The last step's stand at the top.
        ``left_out`` counts sequences of fewer than three tokens, and those of which positions are missing.

    Raises:
        HookError: for rows that are no patterns or came without tokens and positions, and when no sequence is whole.
    """
    chosen = options_of(HeadOptions, options)
    if rows.axes != _AXES:
        raise HookError(
            f"Heads are told from attention patterns, rows of blocks.*.attn.hook_pattern with the axes head and key; "
            f"{rows.name or 'these'} has {', '.join(rows.axes)}.",
            field="layer",
        )
    steps: dict[int, _Step] = {}
    left_out = {"short": 0, "incomplete": 0}
    for sequence in _sequences(rows, progress):
        tokens, position, at = sequence.tokens, sequence.position, sequence.step
        assert tokens is not None
        assert position is not None
        assert at is not None
        n = len(sequence)
        step = steps.setdefault(int(at[0]), _Step())
        if chosen.max_sequences is not None and step.n_sequences >= chosen.max_sequences:
            continue
        if not np.array_equal(position, np.arange(n)):
            left_out["incomplete"] += 1
        elif n < _SHORTEST:
            left_out["short"] += 1
        else:
            pattern = sequence.values.reshape(n, *rows.shape)[:, :, :n].transpose(1, 0, 2)
            step.add(pattern, tokens)
    told = [{"step": step, **steps[step].told()} for step in sorted(steps) if steps[step].n_sequences]
    if not told:
        raise HookError(
            f"No sequence of {rows.name} is whole and has at least {_SHORTEST} tokens: {left_out['short']} are "
            f"shorter, of {left_out['incomplete']} positions are missing."
        )
    return {
        "layer": rows.name,
        "heads": rows.shape[0],
        "rows": len(rows),
        "by_step": told,
        "left_out": left_out,
        **{name: told[-1][name] for name in (*SCORES, "step", "sequences", "with_repetition")},
    }


def _sequences(rows: Rows, progress: Progress) -> Iterator[RowPart]:
    """The rows of each sequence by position, in the order in which steps were stored."""
    held: dict[tuple[int, ...], list[RowPart]] = {}
    pass_key: tuple[int, ...] | None = None
    done = 0
    for part in rows.parts(max(1, _BYTES_AT_ONCE // (4 * rows.width))):
        labels = [part.session, part.rank, part.step, part.sequence]
        if part.tokens is None or part.position is None or any(label is None for label in labels):
            raise HookError(f"{rows.name} came without tokens and positions: its sequences cannot be put together.")
        values = finite(part, rows)
        if values.min() < 0 or values.max() > 1 + _ROUNDING:
            raise HookError(
                f"The rows of {rows.name} go from {values.min():.3g} to {values.max():.3g}: shares of attention are 0 "
                "to 1, as blocks.*.attn.hook_pattern has them.",
                field="layer",
            )
        keys = np.stack([np.asarray(label) for label in labels], axis=1)
        for start, stop in _runs(keys):
            key = tuple(map(int, keys[start]))
            if pass_key is not None and key[:3] != pass_key:
                yield from _joined(held)
            pass_key = key[:3]
            held.setdefault(key, []).append(part.at(slice(start, stop)))
        done += len(part)
        if progress is not None:
            progress(done, len(rows))
    yield from _joined(held)


def _runs(keys: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where equal rows of keys stand one after the other, as start and stop."""
    changes = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    bounds = [0, *changes.tolist(), len(keys)]
    yield from pairwise(bounds)


def _joined(held: dict[tuple[int, ...], list[RowPart]]) -> Iterator[RowPart]:
    """The sequences that are held, each by position; afterwards none is held."""
    for parts in held.values():
        names = ("values", "tokens", "position", "step")
        joined = RowPart(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
        assert joined.position is not None
        yield joined.at(np.argsort(joined.position, kind="stable"))
    held.clear()


def draw_heads(result: dict[str, Any]) -> list[tuple[str, "Figure"]]:
    """The heads' scores at the last step; and how induction and previous-token scores came to that, over steps."""
    from .charts import COLOURS, figure, heat_map

    names = [f"H{head}" for head in range(result["heads"])]
    nothing = [np.nan] * len(names)
    values = np.array([nothing if result[name] is None else result[name] for name in SCORES])
    width = max(5.0, 2.5 + 0.5 * len(names))
    made, (axes,) = figure(f"Heads of {result['layer']}, step {result['step']}", width=width, height=3.0)
    heat_map(axes, values, [name.replace("_", " ") for name in SCORES], names, "score", limits=(0.0, 1.0))
    drawn = [("Scores of the heads", made)]
    if len(result["by_step"]) > 1:
        made, both = figure(f"Heads of {result['layer']} during training", 2)
        for axes, name in zip(both, ("previous_token", "induction"), strict=True):
            told = [(step["step"], step[name]) for step in result["by_step"] if step[name] is not None]
            for head in range(len(names)):
                line = [scores[head] for _, scores in told]
                colour = COLOURS[head % len(COLOURS)]
                axes.plot([step for step, _ in told], line, color=colour, marker=".", label=names[head], linewidth=1.2)
            axes.set_ylim(0, 1.02)
            axes.set_xlabel("training step", fontsize=9)
            axes.set_ylabel(f"{name.replace('_', '-')} score", fontsize=9)
        if len(names) <= len(COLOURS):
            both[1].legend(fontsize=7, frameon=False, loc="upper right")
        drawn.append(("Scores step by step", made))
    return drawn
