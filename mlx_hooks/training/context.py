"""What an analysis is, and what it is made of."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import HookError, UnknownHookError
from ..model import HookedModel
from ..options import options_of
from ..storage.rows import Rows
from ..storage.shards import ShardReader

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Needs = Literal["rows", "patterns", "model"]
Progress = Callable[[int, int], None]
"""Called with how much is done, and of how much."""
Spell = Callable[[int], str | None]
"""The text of a token id."""

MODEL = "model"
"""In the place of a layer's name, for analyses of the whole model."""
_SHOWN_STEPS = 12


@dataclass(frozen=True)
class EvalContext:
    """What analyses are made of; each takes what it needs.

    Args:
        reader: a folder of shards that was opened.
        rows: rows by layer, in its place.
        model: with the weights that are meant.
        eval_data: what the model is run on, in any form of ``analysis.eval_data``; it is read once per analysis.
        labels: of ``probe``: one per row in stored order, of all rows or of those of ``steps``; a mapping from token to
            label; or a function of rows.
        spell: tells tokens as text; None tells them as numbers.
        steps: only the rows of these training steps; None is all.
        seed: of analyses that draw, where their options name none.
        sae_folder: where trained autoencoders are saved, a folder per layer; None does not save them.
        steer: whether ``sae`` steers with what it found.
    """

    reader: ShardReader | None = None
    rows: Mapping[str, Rows] | None = None
    model: HookedModel | None = None
    eval_data: Any = None
    labels: Any = None
    spell: Spell | None = None
    steps: tuple[int, ...] | None = None
    seed: int | None = None
    sae_folder: Path | None = None
    steer: bool = False

    @property
    def has_captured(self) -> bool:
        """Whether there is anything captured to look at."""
        return self.reader is not None or self.rows is not None

    @property
    def running(self) -> HookedModel:
        """The model, for analyses that run it.

        Raises:
            HookError: there is none.
        """
        if self.model is None:
            raise HookError("This analysis runs the model: give one.", field="model")
        return self.model

    def layers(self, needs: Needs) -> list[str]:
        """The captured layers that an analysis of this kind can be made of, in stored order."""
        if self.reader is not None:
            axes = {name: tuple(layer["axes"]) for name, layer in self.reader.layers.items()}
        else:
            axes = {name: rows.axes for name, rows in (self.rows or {}).items()}
        return [name for name, own in axes.items() if ("key" in own) == (needs == "patterns")]

    def rows_of(self, layer: str | int) -> Rows:
        """The rows of a captured layer, by any of its names.

        Raises:
            HookError: nothing was captured, or not this layer, or not at these steps.
        """
        if self.reader is not None:
            self._check_steps(self.reader.steps)
            return self.reader.rows(layer, self.steps)
        if self.rows is None:
            raise HookError("Nothing captured was given: name the folder of shards, hidden_shards_path.")
        if self.steps is not None:
            raise HookError("Rows by step are read from a folder of shards; these came without steps.", field="steps")
        if str(layer) not in self.rows:
            raise UnknownHookError(f"{layer!r} was not captured. There are: {', '.join(self.rows)}.")
        return self.rows[str(layer)]

    def at(self, steps: Sequence[int]) -> "EvalContext":
        """The same, of the rows of some training steps.

        Raises:
            HookError: for what is no list of at least one whole number.
        """
        wanted = tuple(steps) if isinstance(steps, Iterable) else ()
        if not wanted or any(isinstance(step, bool) or not isinstance(step, Integral) for step in wanted):
            raise HookError(
                f"steps is a list of at least one training step, whole numbers; got {steps!r:.100}.", field="steps"
            )
        return replace(self, steps=tuple(map(int, wanted)))

    @property
    def lists_labels(self) -> bool:
        """Whether there is a label per row, rather than a rule for them."""
        return self.labels is not None and not callable(self.labels) and not isinstance(self.labels, Mapping)

    @property
    def labels_of_rows(self) -> Any:
        """The labels of the rows of ``steps``: labels that are one per row of all steps are narrowed to these."""
        if self.reader is None or self.steps is None or not self.lists_labels:
            return self.labels
        steps = self.row_steps
        if len(self.labels) != len(steps):
            return self.labels
        return [label for label, step in zip(self.labels, steps.tolist(), strict=True) if step in self.steps]

    @property
    def row_steps(self) -> np.ndarray:
        """The training step of every captured row, [row], in stored order."""
        entries = [] if self.reader is None else self.reader.entries
        return np.repeat([entry["step"] for entry in entries], [entry["rows"] for entry in entries])

    def _check_steps(self, captured: Sequence[int]) -> None:
        unknown = sorted(set(self.steps or ()) - set(captured))
        if unknown:
            raise HookError(f"Step {unknown[0]} was not captured. Steps: {_listed(captured)}.", field="steps")


@dataclass(frozen=True)
class Metric:
    """One number of a result.

    Args:
        key: what curves and results call it.
        label: what a person reads, with the unit.
        of: takes it from a result; None where it is undefined.
        kind: "share" of 1, "count" of things, or any other "number".
    """

    key: str
    label: str
    of: Callable[[Mapping[str, Any]], float | None]
    kind: Literal["number", "share", "count"] = "number"


@dataclass(frozen=True)
class Analysis:
    """One kind of analysis.

    Args:
        name: as in ``analyses_to_run``.
        title: its heading in a report.
        about: what it measures, for who reads a report.
        needs: rows of a layer, rows of an attention pattern, or the model and data to run it on.
        options_class: its options.
        apply: makes the result, plain JSON values, of a context, a layer's rows (None for the model), options and a
            progress function.
        metrics: the numbers of a result that are tabulated, and followed over training.
        draw: pictures of a result, as titles and matplotlib figures.
        draws_together: whether ``draw`` is given the results of all layers at once, by layer.
    """

    name: str
    title: str
    about: str
    needs: Needs
    options_class: type
    apply: Callable[[EvalContext, Any, Any, Progress | None], dict[str, Any]]
    metrics: tuple[Metric, ...]
    draw: Callable[[dict[str, Any]], "list[tuple[str, Figure]]"]
    draws_together: bool = False

    def options(self, given: Any = None, seed: int | None = None) -> Any:
        """Its options from a mapping, an instance, or None for the defaults.

        Args:
            seed: that of the options, where they have one and ``given`` names none.

        Raises:
            HookError: for unknown or wrong ones; ``error.field`` names it.
        """
        if seed is not None and not isinstance(given, self.options_class) and "seed" in _fields(self.options_class):
            given = {"seed": seed, **(given or {})}
        return options_of(self.options_class, given)

    def scalars(self, result: Mapping[str, Any]) -> dict[str, float]:
        """The metrics of a result by key; undefined ones are left out."""
        found = {metric.key: metric.of(result) for metric in self.metrics}
        return {key: float(value) for key, value in found.items() if value is not None}


def _listed(steps: Sequence[int]) -> str:
    shown = [str(step) for step in steps]
    return ", ".join(shown if len(shown) <= _SHOWN_STEPS else [*shown[:6], "...", *shown[-3:]])


def _fields(options_class: Any) -> set[str]:
    return {field.name for field in fields(options_class)}
