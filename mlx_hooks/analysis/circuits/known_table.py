"""How well each method finds the known circuits: measured, and written to ``docs/circuits.md``."""

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ...errors import HookError
from ..eval_data import EvalData
from ..known_models import KNOWN_MODELS, KnownModel
from ..known_models.known import check_whole
from .circuit import Circuit
from .edge_attribution import attribute_edges
from .edge_runs import ABLATIONS, EdgeRuns
from .evaluation import SEEDS, Chance, chance_auc, edge_auc, permuted_answers, permuted_auc, scores_by_name
from .pruning import acdc_sweep
from .validation import CircuitValidation, validate_circuit

PAIRS = 24
"""Pairs of prompts for each model."""
SEARCHED = 8
"""Of them, which methods get that run the model for every edge; their edges are judged by all."""
_THRESHOLDS = np.geomspace(1e-3, 1, 7)
"""Of ACDC, as shares of what ablating all edges changes the metric by."""
RANDOM_CIRCUITS = 10
PERMUTATIONS = 50
"""Of answers."""
SCORED = 5
"""Of them, by which edges are scored too."""
COMPLETE_WITH = {
    "induction": 50,
    "ioi": 100,
    "frac_prevs": 5,
    "reverse": 500,
    "linear": 5,
    "modular_addition": 5,
}
"""Points with which the scores of the embedding's edges add up to the whole change within 1e-3, by model."""
INCOMPLETE = {
    "histogram": "the gradient jumps where one of its MLP's neurons goes on or off, and between such kinks no rule for "
    "smooth functions helps: the gap shrinks with the number of points, no faster",
    "planted_router": "the stream itself jumps where another expert is chosen, and no gradient sees a jump: more "
    "points do not help",
}
"""Why they do not with any number that can be run, by model."""
_BYTES = 2**23
"""Of what the nodes write, in one pass. Models as small as these run several times as fast while it fits the cache."""


@dataclass(frozen=True)
class OfKind:
    """What one method found on prompts of one kind alone, against the true edges of that kind.

    Args:
        kind: one of the model's.
        auc, faithfulness: as in MethodRow.
    """

    kind: str
    auc: float
    faithfulness: float


@dataclass(frozen=True)
class MethodRow:
    """What one method found.

    Args:
        method: a key of METHODS.
        auc: of its scores.
        faithfulness: of as many of its strongest edges as are true.
        missed: true edges that are not among these.
        seconds: that its scores took.
        told: what the scores of the embedding's edges add up to, as a share of the change that they should; None for
            methods of which it is not claimed.
        by_kind: the same on each kind of prompts alone, where the model has several.
    """

    method: str
    auc: float
    faithfulness: float
    missed: tuple[str, ...]
    seconds: float
    told: float | None
    by_kind: tuple[OfKind, ...] = ()

    @property
    def least_auc(self) -> float:
        """Of all kinds together and of each alone."""
        return min([self.auc, *(each.auc for each in self.by_kind)])


@dataclass(frozen=True)
class KnownSurvey:
    """All methods on one known model, by one kind of ablation.

    Args:
        name: key in KNOWN_MODELS.
        ablation: what an ablated edge carries, a key of ABLATIONS; ``is_meant`` if the construction means this one.
        n_edges, n_true, n_forced: edges of the model, of its circuit, and such as are left out of the AUC.
        faithfulness: of the true circuit.
        rows: one per method.
        random: the AUC of random scores.
        random_faithfulness: of random circuits of as many edges, all of which lead to logits; the mean.
        wrong_edges: the AUC of EAP-IG with as many random edges called true.
        permuted: the AUC of EAP-IG when each prompt is asked for another's answer.
        permuted_faithfulness: of the true circuit when each prompt is asked for another's answer, as a share of what
            there is to keep of the own one.
    """

    name: str
    ablation: str
    is_meant: bool
    n_edges: int
    n_true: int
    n_forced: int
    faithfulness: float
    rows: tuple[MethodRow, ...]
    random: Chance
    random_faithfulness: float
    wrong_edges: Chance
    permuted: Chance
    permuted_faithfulness: Chance


def _attributed(method: str) -> Callable[[EdgeRuns], Any]:
    return lambda runs: attribute_edges(runs, options={"method": method})


def _acdc(runs: EdgeRuns) -> Any:
    scale = float(np.abs(runs.plain - runs.ablated).mean())
    return acdc_sweep(runs, (_THRESHOLDS * scale).tolist())


METHODS: dict[str, Callable[[EdgeRuns], Any]] = {
    "eap": _attributed("eap"),
    "eap-ig": _attributed("eap-ig"),
    "acdc": _acdc,
    "exact": _attributed("exact"),
}
"""What gives scores of all edges, by name."""
SEARCHES = ("acdc", "exact")
"""Those that run the model for every edge."""


HEADING = "## How well circuits are found"


def survey(
    name: str, ablation: str | None = None, methods: Sequence[str] = tuple(METHODS), pairs: int = PAIRS
) -> KnownSurvey:
    """Measure methods on a known model.

        survey("induction").rows[0].auc

    Args:
        name: key in KNOWN_MODELS.
        ablation: one that the model knows the true edges of; None for the one that its construction means.
        methods: keys of METHODS; "eap-ig" is among them.
        pairs: of prompts, two of each kind or more.

    Raises:
        HookError: for another name, ablation, method or number.
    """
    known = _known(name)
    chosen: Any = known.ablation if ablation is None else ablation
    known.edges(chosen)
    unknown = [method for method in methods if method not in METHODS]
    if unknown or "eap-ig" not in methods:
        raise HookError(
            f"methods are of {', '.join(METHODS)}, with eap-ig among them, got {list(methods)}.", field="methods"
        )
    check_whole("pairs", pairs, 2 * len(known.kinds))
    prompts = known.pairs(pairs)
    made: Any = {"ablation": chosen, "batch_size": pairs, "max_bytes": _BYTES}
    model = known.hooked()
    runs, few = (EdgeRuns(model, some, **made) for some in (prompts, prompts[:SEARCHED]))
    true, forced = known.edges(chosen), known.forced
    # What all methods use is computed first: its time is no method's.
    judged = _judged(runs, true)
    for level in ("plain", "ablated"):
        few.level(level)
    measured = [_measured(method, few if method in SEARCHES else runs, runs, true, forced) for method in methods]
    scores = next(scores for row, scores in measured if row.method == "eap-ig")
    by_kind: dict[str, list[OfKind]] = {method: [] for method in methods}
    # The pairs are of each kind in turn. Of a single kind all has been told.
    for i, kind in enumerate(known.kinds if len(known.kinds) > 1 else ()):
        own = prompts[i :: len(known.kinds)]
        alone, few = (EdgeRuns(model, some, **made) for some in (own, own[:SEARCHED]))
        for method in methods:
            given = few if method in SEARCHES else alone
            row, _ = _measured(method, given, alone, known.edges(chosen, kind), forced)
            by_kind[method].append(OfKind(kind, row.auc, row.faithfulness))
    permuted, kept = _permuted(runs, true, forced)
    return KnownSurvey(
        name=name,
        ablation=chosen,
        is_meant=chosen == known.ablation,
        n_edges=len(runs.graph.edges),
        n_true=len(true),
        n_forced=len(forced),
        faithfulness=judged.faithfulness.mean or 0.0,
        rows=tuple(replace(row, by_kind=tuple(by_kind[row.method])) for row, _ in measured),
        random=chance_auc(scores, true, forced),
        random_faithfulness=judged.random_mean or 0.0,
        wrong_edges=permuted_auc(scores, true, forced),
        permuted=permuted,
        permuted_faithfulness=kept,
    )


def _known(name: str) -> KnownModel:
    if name not in list(KNOWN_MODELS):
        raise HookError(f"There is no known model {name!r}: {', '.join(KNOWN_MODELS)}.", field="name")
    return KNOWN_MODELS[name]()


def planned(names: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """All known models, or some, with every ablation by which the true edges are known; the meant one first.

    Raises:
        HookError: for a name that no known model has.
    """
    made = {name: _known(name) for name in (names if names is not None else KNOWN_MODELS)}
    return [
        (name, ablation)
        for name, known in made.items()
        for ablation in sorted(known.true_edges, key=lambda each: each != known.ablation)
    ]


def surveys(names: Iterable[str] | None = None) -> Iterator[KnownSurvey]:
    """Of what is ``planned``, one after the other."""
    for name, ablation in planned(names):
        yield survey(name, ablation)


def _judged(runs: EdgeRuns, true: Collection[str]) -> CircuitValidation:
    # Intervals are not asked for.
    options = {"random_circuits": RANDOM_CIRCUITS, "resamples": 100}
    return validate_circuit(runs, Circuit.of_edges(runs.graph, true, connected=False), options=options)


def _measured(
    method: str, given: EdgeRuns, runs: EdgeRuns, true: Collection[str], forced: Collection[str]
) -> tuple[MethodRow, Any]:
    """What a method found in the runs that it is given, judged by others; and its scores."""
    started = time.perf_counter()
    scores = METHODS[method](given)
    seconds = time.perf_counter() - started
    strongest = _strongest(scores, len(true))
    told = scores.settings["integral"] / scores.settings["whole_change"] if method == "eap-ig" else None
    row = MethodRow(
        method=method,
        auc=edge_auc(scores, true, forced),
        faithfulness=_kept(runs, strongest) / float((runs.plain - runs.ablated).mean()),
        missed=tuple(edge.name for edge in runs.graph.edges if edge.name in set(true) - {*strongest}),
        seconds=seconds,
        told=told,
    )
    return row, scores


def _strongest(scores: Any, n: int) -> list[str]:
    found = scores_by_name(scores)
    return sorted(found, key=lambda name: -abs(found[name]))[:n]


def _kept(runs: EdgeRuns, circuit: Collection[str]) -> float:
    """The metric with all other edges ablated, less that with all edges ablated; means over examples."""
    outside = [edge.name for edge in runs.graph.edges if edge.name not in set(circuit)]
    return float((runs.without([outside])[0] - runs.ablated).mean())


def _permuted(runs: EdgeRuns, true: Collection[str], forced: Collection[str]) -> tuple[Chance, Chance]:
    """Each prompt asked for another's answer: EAP-IG's AUC, and what the true circuit keeps, as a share."""
    asked = [permuted_answers(runs.data, seed) for seed in range(PERMUTATIONS)]
    given: Any = {"ablation": runs.ablation, "batch_size": len(runs.data), "max_bytes": _BYTES}
    scored = (METHODS["eap-ig"](EdgeRuns(runs.model, data, metric=runs.metric, **given)) for data in asked[:SCORED])
    aucs = [edge_auc(scores, true, forced) for scores in scored]
    shares = _kept_asked(runs, true, asked) / float((runs.plain - runs.ablated).mean())
    return _chance_of(aucs), _chance_of(shares.tolist())


def _kept_asked(runs: EdgeRuns, circuit: Collection[str], asked: Sequence[EvalData]) -> np.ndarray:
    """``_kept`` by other answers, [data]. Their prompts are the same, and so are the runs: one serves all."""
    outside = [edge.name for edge in runs.graph.edges if edge.name not in set(circuit)]
    masks = np.stack([runs.mask(outside), runs.mask(runs.graph.edges)])
    kept = np.zeros((len(asked), len(runs.data)))
    for batch in runs.batches:
        logits = runs.logits(batch, runs.replacements(batch), masks)
        for row, data in zip(kept, asked, strict=True):
            of_batch = replace(data, examples=tuple(data.examples[i] for i in batch.indices))
            (other,) = of_batch.batches(len(batch.indices))
            inside, nothing = runs.metric.numbers(logits, other).reshape(2, -1)
            row[batch.indices] = inside - nothing
    return kept.mean(axis=1)


def _chance_of(found: Sequence[float]) -> Chance:
    return Chance(float(np.mean(found)), min(found), max(found))


# ---- The document ------------------------------------------------------------------------------

_METHOD_HEADINGS = (
    "model",
    "ablation",
    "method",
    "AUC",
    "faithfulness",
    "least AUC by kind",
    "least faithfulness by kind",
    "of the whole change",
    "seconds",
)
_CONTROL_HEADINGS = (
    "model",
    "ablation",
    "edges",
    "true",
    "faithfulness of the true circuit",
    "of random circuits",
    "of the true circuit, answers permuted",
    "AUC of random scores",
    "of EAP-IG, random edges called true",
    "of EAP-IG, answers permuted",
)


def _method_cells(found: KnownSurvey, row: MethodRow) -> list[str]:
    told = "" if row.told is None else _share(row.told)
    all_kinds = [f"{row.auc:.3f}", _share(row.faithfulness)]
    return [*_first_cells(found), row.method, *all_kinds, *_kind_cells(row), told, _seconds(row.seconds)]


def _kind_cells(row: MethodRow) -> list[str]:
    if not row.by_kind:
        return ["", ""]
    return [
        f"{min(each.auc for each in row.by_kind):.3f}",
        _share(min(each.faithfulness for each in row.by_kind)),
    ]


def _control_cells(found: KnownSurvey) -> list[str]:
    edges = f"{found.n_edges}" + (f", {found.n_forced} forced" if found.n_forced else "")
    shares = [found.faithfulness, found.random_faithfulness]
    chances = [found.permuted_faithfulness, found.random, found.wrong_edges, found.permuted]
    return [*_first_cells(found), edges, f"{found.n_true}", *map(_share, shares), *map(_chance, chances)]


def _first_cells(found: KnownSurvey) -> list[str]:
    return [f"`{found.name}`", f"**{found.ablation}**" if found.is_meant else found.ablation]


def _share(value: float) -> str:
    # -0.00 is 0.
    return f"{round(value, 2) + 0.0:.2f}"


def _chance(found: Chance) -> str:
    return f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})"


_ENDS = re.compile(r" {0,3}##?(\s|$)")
"""What ends the section: a heading of its level, or of one above."""
_FENCE = re.compile(r" {0,3}(```+|~~~+)")


def placed(section: str, page: str) -> str:
    """A page with the section in place of the one that it has, or behind all else; nothing else of it changes."""
    lines = page.splitlines(keepends=True)
    headings = [i for i in _not_code(lines) if _ENDS.match(lines[i])]
    start = next((i for i in headings if lines[i].rstrip() == HEADING), None)
    if start is None:
        gap = "" if not page or page.endswith("\n\n") else "\n" if page.endswith("\n") else "\n\n"
        return page + gap + section
    end = next((i for i in headings if i > start), len(lines))
    after = "".join(lines[end:])
    return "".join(lines[:start]) + section + ("\n" + after if after else "")


def _not_code(lines: Sequence[str]) -> Iterator[int]:
    """Indices of the lines that stand in no fenced block, where "#" begins a comment."""
    fence = ""
    for i, line in enumerate(lines):
        mark = _FENCE.match(line)
        if fence:
            is_end = mark and mark[1].startswith(fence) and line.strip() == mark[1]
            fence = "" if is_end else fence
        elif mark:
            fence = mark[1]
        else:
            yield i


def document(found: Iterable[KnownSurvey]) -> str:
    """The last section of ``docs/circuits.md``, which tells how well each method finds the circuits."""
    listed = list(found)
    names = list(dict.fromkeys(each.name for each in listed))
    models = {name: KNOWN_MODELS[name]() for name in names}
    least = min(
        row.least_auc for each in listed if each.is_meant for row in each.rows if row.method in ("eap-ig", "acdc")
    )
    platform = "macOS, Metal" if mx.metal.is_available() else "MLX's CPU build"
    parts = [
        HEADING,
        "",
        f"Written by `neuroscope circuits --known --write docs/circuits.md` on {platform}; a test fails when it "
        "is no longer what is measured. The models are those of `mlx_hooks.analysis.known_models`: their weights were "
        "set so that it is known which edges matter. With the ablation that a construction means, EAP-IG and ACDC "
        f"have an AUC of {least:.3f} at the least, on all kinds of prompts together and on each alone.",
        "",
        *(f"- `{name}`: {models[name].description} {models[name].notes}".rstrip() for name in names),
        "",
        "An edge is true if replacing what it carries, and nothing else, changes the answer on some pair of prompts. "
        "So which edges are true depends on what is put in:",
        "",
        *(f"- {ablation}: {ABLATIONS[ablation]}" for ablation in dict.fromkeys(each.ablation for each in listed)),
        "",
        "In bold: the ablation that the construction means.",
        "",
        "### Methods",
        "",
        f"On {PAIRS} pairs of prompts, by the logit difference. The AUC is that of the scores' sizes against the true "
        "edges. Faithfulness is that of as many of the strongest edges as are true: what the model does with all "
        "others ablated, 1 being all of it. `exact` replaces one edge after the other; `acdc` is a sweep of "
        f"{len(_THRESHOLDS)} thresholds. These two search by the first {SEARCHED} pairs, and are judged by all. By "
        "kind: the same on the pairs of each kind alone, against the edges that are true of that kind; the least of "
        "the kinds, where a model has several. Of the "
        "whole change: what EAP-IG's scores of the embedding's edges add up to, with its 5 points; a mean, in which "
        "single examples' gaps may cancel. Times are those of the machine that wrote this, with two cores.",
        "",
        *_table(_METHOD_HEADINGS, [_method_cells(each, row) for each in listed for row in each.rows]),
        "",
        *_missed(listed),
        *_completeness(names),
        "### Circuits and controls",
        "",
        f"What has to fail does. Random circuits of as many edges ({RANDOM_CIRCUITS}, each edge of which leads to "
        "logits) keep little of what the model does. Random scores have an AUC of about 0.5 (mean of "
        f"{SEEDS} seeds, least to greatest), and so have EAP-IG's when as many random edges are called true. Asked for "
        f"another prompt's answer (mean of {PERMUTATIONS} permutations, least to greatest), the true circuit keeps "
        "little of what it keeps of the own one, in the mean; by a single permutation it may be a good deal. The share "
        "is below 0 where the answer that it gives is now the wrong one. EAP-IG scores edges by the first "
        f"{SCORED} of these.",
        "",
        "The last column shows what an AUC cannot: with permuted answers it stays at or near 1, because in models "
        "without noise an edge outside the circuit carries exactly what it carries when ablated, whatever is asked. "
        "The edges that are left are those along which anything can change; that they do nothing for the task is told "
        "by the effect alone. So an AUC on models made by hand is evidence about the method, never about the task.",
        "",
        *_table(_CONTROL_HEADINGS, [_control_cells(each) for each in listed]),
    ]
    return "\n".join(parts) + "\n"


def _missed(found: Sequence[KnownSurvey]) -> list[str]:
    told = [
        f"- `{each.name}`, {each.ablation}, {row.method}: {', '.join(f'`{name}`' for name in row.missed)}"
        for each in found
        for row in each.rows
        if row.missed
    ]
    return ["True edges that are not among the strongest:", "", *told, ""] if told else []


def _completeness(names: Collection[str]) -> list[str]:
    """How many points EAP-IG needs until its sum is what it should be, or why none are enough."""
    enough = [f"{COMPLETE_WITH[name]} for `{name}`" for name in names if name in COMPLETE_WITH]
    told = f" Points with which they do by corrupted prompts, within 1e-3: {', '.join(enough)}." if enough else ""
    return [
        "The scores of the embedding's edges should add up to the whole change. An AUC does not show whether they do: "
        "where a softmax or a product of gates turns over in a small part of the way, few points tell the order of "
        f"the edges and not their sizes.{told}",
        *(f"For `{name}` none are enough: {INCOMPLETE[name]}." for name in names if name in INCOMPLETE),
        "",
    ]


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(headings), f"|{'---|' * len(headings)}", *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
