"""Activation patching: what of a run makes the difference between two prompts, place by place.

Two prompts of as many tokens differ in what they ask for. One of them runs, with one place's activation put in from the
run of the other:

    denoising    the corrupted prompt runs, something is put in from the clean run. Its recovery is
                 (patched - corrupted) / (clean - corrupted): 1 where the place alone brings the answer back.
    noising      the clean prompt runs, something is put in from the corrupted run. Its damage is
                 (clean - patched) / (clean - corrupted): 1 where nothing is left of the answer without the place.

The two answer different questions: denoising finds what is enough, noising what is needed. Both are ratios of means
over examples. Source: Meng et al., "Locating and Editing Factual Associations in GPT" (2022); Heimersheim and Nanda,
"How to use and interpret activation patching" (2024).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
from pydantic import Field

from ...errors import HookError
from ...hook_points import HookPoint, select, short_name, unknown_point
from ...model import HookedModel
from ...options import options
from ...token_text import TokenText
from ..components import Part, components_of, logits_of
from ..eval_data import FIELD, EvalBatch, EvalData, eval_data_of
from ..intervals import CONFIDENCE, RESAMPLES, Estimate, IntervalOptions, ratios
from ..patched_runs import Cell, PatchedRuns
from ..progress import Passes, Progress
from ..spelling import shortened
from .metrics import Metric, PlainRun, check_differ, metric_of
from .places import place_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Direction = Literal["denoising", "noising"]
Sweep = Literal["layer x position", "layer x head", "layer x head x position", "component"]
SWEEPS: tuple[str, ...] = get_args(Sweep)
Count = Annotated[int, Field(ge=1)]
EFFECTS: dict[str, str] = {"denoising": "recovery", "noising": "damage"}
"""What is told of a direction."""
_DEFAULTS = {"layer x position": "resid_pre", "layer x head": "z", "layer x head x position": "z"}
"""The component that a sweep over layers patches where nobody says."""


@options
class PatchingOptions:
    """Options of :func:`activation_patching`.

    Args:
        sweep: the places that are patched, one after the other: a kind of sweep, or a list of cells, each a mapping
            with ``hook_point`` (a name, a pattern, or a list of them), and if wished ``positions`` and ``heads``.
        component: which part of a layer a sweep over layers patches; None for ``resid_pre``, with heads for ``z``. With
            heads it is one with a head axis: ``z``, ``q``, ``k``, ``v``, ``rot_q``, ``rot_k``, ``attn_scores``,
            ``pattern``.
        components: which parts a sweep over components patches; None for all heads, attentions, mixers and MLPs.
        direction: "denoising" puts the clean run's activations into the corrupted one's, "noising" the other way.
        align: where a sweep counts positions from if prompts differ in length: "start" or "end". Only positions that
            all have are patched.
        metric: a name, or a function; see :func:`metric_of`.
        max_examples: the first so many examples are run; None for all, see :func:`eval_data_of`.
        batch_size: examples of one length that run together, fewer of long ones: see :meth:`EvalData.batches`.
        rows: rows of a forward pass, which are cells x examples; None for as many as are fast and small.
    """

    sweep: Sweep | Sequence[Any] = "layer x position"
    component: str | None = None
    components: Sequence[Part] | None = None
    direction: Direction = "denoising"
    align: Literal["start", "end"] | None = None
    metric: str | Callable[..., Any] | Metric | None = None
    max_examples: Count | None = None
    batch_size: Count = 8
    rows: Count | None = None

    def __post_init__(self) -> None:
        if isinstance(self.sweep, str) and self.sweep not in SWEEPS:
            raise HookError(f"sweep must be a list of cells or one of {', '.join(SWEEPS)}, got {self.sweep!r}.")
        if self.component is not None and (not isinstance(self.sweep, str) or self.sweep == "component"):
            raise HookError("component is of sweeps over layers: a sweep over components has components.")
        if self.components is not None and self.sweep != "component":
            raise HookError('components is of the sweep "component": a sweep over layers has a component.')


@dataclass(frozen=True, eq=False)
class PatchingResult:
    """What each place recovers, or damages.

    Args:
        sweep: the kind of sweep; "cells" where they were given, "path" of :func:`path_patching`.
        component: the part of a layer that was patched; None where there are several.
        direction: "denoising" or "noising".
        metric: its name.
        metric_description: what it is, in words.
        axes: what the axes of ``patched`` run over, with a label for each entry: {"layer": ("0", "1"), ...}.
        patched: the metric with each place patched, [example, *axes]; nan where there is no such place.
        clean, corrupted: the metric of the two prompts, [example].
        eval_data: what it was told by, in short.
        is_estimate: whether it is a first-order estimate: see :func:`attribution_patching`.
    """

    sweep: str
    component: str | None
    direction: Direction
    metric: str
    metric_description: str
    axes: dict[str, tuple[str, ...]]
    patched: np.ndarray
    clean: np.ndarray
    corrupted: np.ndarray
    eval_data: dict[str, Any]
    is_estimate: bool = False

    @property
    def effect_name(self) -> str:
        """ "recovery" or "damage"."""
        return EFFECTS[self.direction]

    @property
    def effects(self) -> np.ndarray:
        """Recovery or damage of each place, [*axes]: 1 is all of it, 0 nothing."""
        above, below = self._parts()
        return above.mean(axis=0) / below.mean()

    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        """What the effects are ratios of: [example, *axes] and [example]."""
        base = self.corrupted if self.direction == "denoising" else self.clean
        moved = self.patched - base.reshape(-1, *[1] * (self.patched.ndim - 1))
        return moved if self.direction == "denoising" else -moved, self.clean - self.corrupted

    def estimates(
        self, *, confidence: float = CONFIDENCE, resamples: int = RESAMPLES, seed: int = 0
    ) -> dict[tuple[str, ...], Estimate]:
        """The effects with bootstrap intervals over examples, by the labels of their places.

        Raises:
            HookError: for what :class:`IntervalOptions` does not allow.
        """
        chosen = IntervalOptions(confidence=confidence, resamples=resamples, seed=seed)
        above, below = self._parts()
        there = self._places()
        columns = above[:, np.isfinite(self.patched[0])]
        found = ratios(columns, below, **chosen.of_intervals)
        return {self._labels(at): estimate for at, estimate in zip(there, found, strict=True)}

    def top(self, n: int = 10) -> list[tuple[tuple[str, ...], float]]:
        """The n places with the largest effects by size, and these.

        Raises:
            HookError: for an n below 0.
        """
        if type(n) is not int or n < 0:
            raise HookError(f"n is a whole number from 0 on, got {n!r}.", field="n")
        effects = self.effects
        ranked = sorted(self._places(), key=lambda at: -abs(effects[at]))
        return [(self._labels(at), float(effects[at])) for at in ranked[:n]]

    def _places(self) -> list[tuple[int, ...]]:
        return [tuple(map(int, at)) for at in np.argwhere(np.isfinite(self.patched[0]))]

    def _labels(self, at: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(labels[i] for labels, i in zip(self.axes.values(), at, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: of numbers the means over examples, nested as the axes are; None where there is none."""
        return {
            "sweep": self.sweep,
            "estimate": self.is_estimate,
            "component": self.component,
            "direction": self.direction,
            "metric": self.metric,
            "metric_description": self.metric_description,
            "eval_data": self.eval_data,
            "axes": {name: list(labels) for name, labels in self.axes.items()},
            "levels": {"clean": float(self.clean.mean()), "corrupted": float(self.corrupted.mean())},
            "patched": _plain(self.patched.mean(axis=0)),
            "effect": self.effect_name,
            "effects": _plain(self.effects),
        }


def _plain(values: np.ndarray) -> list[Any]:
    return np.where(np.isfinite(values), values, None).tolist()  # type: ignore[call-overload]


def activation_patching(
    model: HookedModel, eval_data: Any, sweep: Any = "layer x position", *, progress: Progress = None, **options: Any
) -> PatchingResult:
    """Put activations of one run into another, place by place, and tell what that brings back or takes away.

        pairs = [{"clean": "The capital of France is", "corrupted": "The capital of Italy is",
                  "answer": " Paris", "wrong": " Rome"}]
        activation_patching(model, pairs).effects                               # [layer, position]
        activation_patching(model, pairs, "layer x head", direction="noising").top(5)
        activation_patching(model, pairs, [{"hook_point": "blocks.2.attn.hook_z", "heads": 1, "positions": -1}])

    Args:
        eval_data: prompts with corrupted partners; see :func:`eval_data_of`.
        sweep: which places: see :class:`PatchingOptions`.
        progress: called with the runs of a batch that are done and to do: one for each cell, and the plain ones.
        options: see :class:`PatchingOptions`.

    Raises:
        HookError: for eval data without corrupted prompts, prompts of several lengths without ``align``, what cannot be
            patched, with the reason, and a metric that does not tell clean from corrupted prompts.
    """
    chosen = PatchingOptions(sweep=sweep, **options)
    pairs = Pairs(model, eval_data, chosen.metric, chosen.direction, chosen.max_examples, chosen.batch_size)
    grid = grid_of(model, pairs.data, chosen)
    places = list(grid.cells)
    patched = np.full((len(pairs.data), *grid.shape), np.nan)
    of_batch = pairs.needs_plain + PatchedRuns.PASSES + len(places)
    passes = Passes(progress, pairs.n_passes + of_batch * len(pairs.batches))
    pairs.measure(passes)
    for batch in pairs.batches:
        plain = pairs.plain(batch, passes)
        runs = PatchedRuns(model, *pairs.sides(batch), list(grid.cells.values()), chosen.rows, passes)
        for indices, logits in runs.logits():
            found = np.tile(pairs.base[batch.indices], len(indices))
            if logits is not None:
                found = pairs.metric.numbers(logits, batch, plain)
            for i, values in zip(indices, found.reshape(len(indices), -1), strict=True):
                # The examples' axis last: an index of several axes takes a view.
                np.moveaxis(patched, 0, -1)[places[i]][batch.indices] = values
            passes.passed(len(indices))
    return pairs.result(chosen.sweep, grid.axes, patched, component=grid.component)


class Pairs:
    """Clean prompts, their corrupted partners, and what both are judged by.

    Args:
        model: what is run.
        eval_data: see :func:`eval_data_of`.
        metric: see :func:`metric_of`.
        direction: which of the two runs, and which is put in.
        max_examples: the first so many are taken; None for all.
        batch_size: examples of one length that run together, fewer of long ones: see :meth:`EvalData.batches`.
        cost: of a batch's most expensive pass; see :func:`rows_at_once`.

    Raises:
        HookError: for eval data without corrupted prompts.
    """

    def __init__(
        self,
        model: HookedModel,
        eval_data: Any,
        metric: Any,
        direction: Direction,
        max_examples: int | None,
        batch_size: int,
        cost: int = 1,
    ) -> None:
        self.model = model
        self.direction = direction
        self.data = eval_data_of(model, eval_data, max_examples=max_examples)
        if not self.data.has_corrupted:
            raise HookError("Patching needs corrupted prompts, of as many tokens as the clean ones.", field=FIELD)
        self.metric = metric_of(metric, self.data)
        self.batches = list(self.data.batches(batch_size, cost))
        self.clean, self.corrupted = np.zeros(len(self.data)), np.zeros(len(self.data))
        """The metric of both, [example], as ``measure`` finds it."""

    @property
    def n_passes(self) -> int:
        """How many ``measure`` takes."""
        return 2 * len(self.batches)

    @property
    def needs_plain(self) -> bool:
        """Whether ``plain`` takes a pass."""
        return self.metric.needs_plain

    def measure(self, passes: Passes) -> None:
        """Run both as they are.

        Raises:
            HookError: for a metric that is the same for both in the mean: then nothing is a share of their difference.
        """
        for batch in self.batches:
            assert batch.corrupted is not None
            plain = logits_of(self.model, batch.tokens)
            self.clean[batch.indices] = self.metric.numbers(plain, batch, plain)
            passes.passed()
            logits = logits_of(self.model, batch.corrupted)
            self.corrupted[batch.indices] = self.metric.numbers(logits, batch, plain)
            passes.passed()
        check_differ(self.clean, self.corrupted)

    @property
    def is_denoising(self) -> bool:
        """Whether the corrupted prompts run."""
        return self.direction == "denoising"

    @property
    def base(self) -> np.ndarray:
        """The metric of the prompts that run, as they are, [example]."""
        return self.corrupted if self.is_denoising else self.clean

    def sides(self, batch: EvalBatch) -> tuple[np.ndarray, np.ndarray]:
        """The tokens that run, and those from whose run something is put in, [batch, pos]."""
        assert batch.corrupted is not None
        return (batch.corrupted, batch.tokens) if self.is_denoising else (batch.tokens, batch.corrupted)

    def plain(self, batch: EvalBatch, passes: Passes) -> PlainRun | None:
        """What is kept of the clean run, for a metric that needs it; else None."""
        if not self.needs_plain:
            return None
        found = self.metric.plain_run(logits_of(self.model, batch.tokens), batch)
        passes.passed()
        return found

    def result(
        self,
        sweep: Any,
        axes: dict[str, tuple[str, ...]],
        patched: np.ndarray,
        *,
        component: str | None = None,
        is_estimate: bool = False,
    ) -> PatchingResult:
        """What is told of the metric with each place patched, [example, *axes]."""
        return PatchingResult(
            sweep=sweep if isinstance(sweep, str) else "cells",
            component=component,
            direction=self.direction,
            metric=self.metric.name,
            metric_description=self.metric.description,
            axes=axes,
            patched=patched,
            clean=self.clean,
            corrupted=self.corrupted,
            eval_data=self.data.to_dict(),
            is_estimate=is_estimate,
        )


@dataclass(frozen=True)
class Grid:
    """The places of a sweep.

    Args:
        axes: what they are laid out along, with labels.
        cells: what is patched, by place: an index into each axis.
        component: the part of a layer that all of them are of, if there is one.
    """

    axes: dict[str, tuple[str, ...]]
    cells: dict[tuple[int, ...], Cell]
    component: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(labels) for labels in self.axes.values())


def grid_of(model: HookedModel, data: EvalData, chosen: PatchingOptions) -> Grid:
    """The cells that options ask for, laid out.

    Raises:
        HookError: for what the model does not have, or cannot replace, and for positions that are ambiguous.
    """
    shortest = min(len(example.tokens) for example in data.examples)
    if not isinstance(chosen.sweep, str):
        given = [_cell(model, item, i) for i, item in enumerate(chosen.sweep)]
        if not given:
            raise HookError("sweep is empty: give at least one cell.", field="sweep")
        made = Grid({"cell": tuple(map(str, given))}, {(i,): cell for i, cell in enumerate(given)})
    elif chosen.sweep == "component":
        usual: tuple[Part, ...] = ("mixer_out", "heads", "attn_out", "mlp_out")
        found = components_of(model, chosen.components, usual=usual)
        names = tuple(component.name for component in found)
        made = Grid({"component": names}, {(i,): Cell.of(component) for i, component in enumerate(found)})
    else:
        made = _over_layers(model, data, chosen)
    for cell in made.cells.values():
        cell.check(model, shortest)
    return made


def _over_layers(model: HookedModel, data: EvalData, chosen: PatchingOptions) -> Grid:
    sweep = str(chosen.sweep)
    component = chosen.component or _DEFAULTS[sweep]
    points = _points(model, component)
    first = points[0]
    component = first.component
    if "head" in sweep and "head" not in first.axes:
        raise HookError(f"{sweep} patches a component with a head axis, as z, q, k, v, pattern; {component} has none.")
    if "position" in sweep and first.position_axis is None:
        raise HookError(f"{sweep} patches a component with a position axis; {component} has none.")
    axes: dict[str, tuple[str, ...]] = {"layer": tuple(str(point.layer) for point in points)}
    if "head" in sweep:
        n_heads = max(point.size("head") or 0 for point in points)
        axes["head"] = tuple(f"{'KV' if first.group > 1 else 'H'}{head}" for head in range(n_heads))
    if "position" in sweep:
        positions = _positions(data, chosen.align)
        axes["position"] = tuple(_position_labels(model, data, positions))
    cells = {}
    for at in np.ndindex(*(len(labels) for labels in axes.values())):
        place = dict(zip(axes, map(int, at), strict=True))
        point = points[place["layer"]]
        if "head" in place and place["head"] >= (point.size("head") or 0):
            # Layers may differ in their heads.
            continue
        heads = (place["head"],) if "head" in place else None
        own = (positions[place["position"]],) if "position" in place else None
        cells[tuple(place.values())] = Cell((point.name,), own, heads)
    return Grid(axes, cells, component)


def _points(model: HookedModel, component: str) -> list[HookPoint]:
    """A component's hook points, in the layers where it is there and can be replaced.

    Raises:
        HookError: where there is no such layer, with the reason.
    """
    names = [short_name(component, layer) for layer in range(model.cfg.n_layers)]
    there = [model.hook_points[name] for name in names if name in model.hook_points]
    if not there:
        model.architecture.check_supported(names[0])
        raise unknown_point(names[0], model.hook_points)
    found = [point for point in there if all(not place.why_not for place in model.architecture.locations_of(point))]
    if not found:
        model.architecture.check_editable(there[0])
    return found


def _positions(data: EvalData, align: str | None) -> list[int]:
    """The positions that a sweep goes over: those that all prompts have, negative ones from the end."""
    lengths = [len(example.tokens) for example in data.examples]
    shortest, longest = min(lengths), max(lengths)
    if align is None and shortest < longest:
        raise HookError(
            f"The prompts have {shortest} to {longest} tokens, so a position is not the same in all: give align "
            '"start" or "end", from where positions are counted, or prompts of one length.',
            field="align",
        )
    return list(range(-shortest, 0)) if align == "end" else list(range(shortest))


def _position_labels(model: HookedModel, data: EvalData, positions: Sequence[int]) -> list[str]:
    """Positions with their tokens, where all prompts have the same."""
    spelling = TokenText(model.tokenizer)
    rows = [row for example in data.examples for row in (example.tokens, example.corrupted) if row is not None]
    labels = []
    for position in positions:
        tokens = {row[position] for row in rows}
        same = model.tokenizer is not None and len(tokens) == 1
        labels.append(f"{position} {shortened(spelling.text(*tokens))}" if same else str(position))
    return labels


def _cell(model: HookedModel, given: Any, i: int) -> Cell:
    """A cell as a caller gives it."""
    if isinstance(given, Cell):
        return given
    allowed = ("hook_point", "positions", "heads")
    if not isinstance(given, Mapping) or "hook_point" not in given or set(given) - set(allowed):
        raise HookError(
            f"A cell is a mapping with hook_point, and if wished positions and heads; cell {i} is {given!r}.",
            field="sweep",
        )
    names = tuple(point.name for point in select(model.hook_points, given["hook_point"]))
    positions, heads = (
        None if given.get(name) is None else _numbers(given[name], name, i) for name in ("positions", "heads")
    )
    return Cell(names, positions, heads)


def _numbers(given: Any, name: str, i: int) -> tuple[int, ...]:
    numbers = [given] if isinstance(given, int) else given
    is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers) > 0
    if not is_list or any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
        raise HookError(f"{name} of cell {i} is a whole number or a list of them, got {given!r}.", field="sweep")
    return tuple(numbers)


def draw_patching(result: PatchingResult) -> list[tuple[str, "Figure"]]:
    """The effects as a heat map: layers, or their heads, from top to bottom.

    Raises:
        HookError: for what is no result, and without matplotlib.
    """
    if not isinstance(result, PatchingResult):
        raise HookError(f"result is what a patching function answered, got {type(result).__name__}.", field="result")
    from ..charts import component_map, figure, heat_map, map_size

    told = {"denoising": "recovered by putting in clean activations", "noising": "lost by putting in corrupted ones"}
    label, effects = f"share {told[result.direction]}", result.effects
    what = result.component or {"component": "components", "path": "what a sender tells a receiver"}.get(result.sweep)
    kind = (
        "Path patching"
        if result.sweep == "path"
        else "Attribution patching"
        if result.is_estimate
        else "Activation patching"
    )
    title = f"{kind} ({result.direction}): {what} by {result.metric.replace('_', ' ')}"
    names = list(result.axes)
    if names == ["component"]:
        components = [{"component": name, "layer": place_of(name).layer} for name in result.axes["component"]]
        size = map_size(components)
        made, (axes,) = figure(title, width=size["width"], height=size["height"])
        component_map(axes, components, effects.tolist(), label)
        return [(kind, made)]
    labels = list(result.axes.values())
    rows = [f"{names[0]} {row}" if names[0] == "layer" else row for row in labels[0]]
    columns: Sequence[str] = labels[1] if len(labels) > 1 else [result.effect_name]
    if len(labels) == 3:
        rows, columns = [f"L{layer}{head}" for layer in labels[0] for head in labels[1]], labels[2]
    # Labels of few columns stand upright side by side.
    each = max(0.42, 0.09 * max(map(len, columns))) if len(columns) <= 12 else 0.42
    width, height = min(14.0, 3.6 + each * len(columns)), min(14.0, 1.9 + 0.3 * len(rows))
    made, (axes,) = figure(title, width=max(width, 5.5), height=height)
    heat_map(axes, effects.reshape(len(rows), len(columns)), rows, columns, label)
    return [(kind, made)]
