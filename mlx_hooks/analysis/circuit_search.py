"""A small circuit of components: found by patching and ablation, checked by ablating all the rest, and all of it.

    1. Activation patching: in the run of the corrupted prompt each component gets what it was in the clean run. Its
       recovery is (patched - corrupted) / (clean - corrupted) of the metric. Without corrupted prompts there is none.
    2. Damage: each component is ablated on its own; it is a share of what ablating all of them costs.
    3. From all components, one after the other is left out, the least important first. It stays out if the circuit
       that is left, with everything else ablated, is still faithful enough. That is repeated until nothing more can go.
       The same is done with the most important components that together are faithful, and the smaller circuit is kept:
       no single component of it can be left out. Where all smaller sets are few they are tried too.
    4. That is done with one half of the examples, and the circuit is judged by the other.
    5. The circuit is held against the same number of components drawn at random, and the model is run with the circuit
       alone ablated: a complete circuit leaves nothing behind.

Faithfulness of a set of components is (metric with all others ablated - metric with all ablated) / (metric of the model
- metric with all ablated): 1 is the whole model. It is a ratio of means over examples. Sources: Wang et al.,
"Interpretability in the Wild" (2022); Conmy et al., "Towards Automated Circuit Discovery" (2023).
"""

import math
from collections.abc import Callable, Collection, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

import mlx.core as mx
import numpy as np
from pydantic import Field

from ..errors import HookError
from ..model import HookedModel
from ..options import options, options_of
from .ablation import Ablation, Bench, ExampleOptions
from .components import Component, Numbers, Part, components_of
from .eval_data import FIELD, EvalBatch, eval_data_of
from .faithfulness import check_differ, is_near, less_than_one
from .intervals import FEWEST, Estimate, few, means, ratios
from .patched_runs import Cell, PatchedRuns
from .progress import Passes, Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = {
    "logit_difference": "the answer's logit less the wrong answer's",
    "log_probability": "the log probability of the answer, in nats",
    "text_log_probability": "the mean log probability of the texts' next tokens, in nats",
}
_MOST_KEPT = 2**30
"""Bytes of replacements that are kept from run to run; more are made anew for each."""
_ENOUGH = 10
"""Different examples of which half are held out."""
_MOST_SETS = 200
"""Smaller sets that are tried, all of them or none."""


@options
class CircuitOptions(ExampleOptions):
    """Options of :func:`analyse_circuit`, besides those of :class:`ExampleOptions`.

    Args:
        faithfulness: what the circuit has to reach.
        components: which parts are searched; None for heads, mixers and MLPs, and attention where heads cannot be
            replaced.
        ablation: what is put in the place of what is left out; None for resampling where there are corrupted prompts,
            else the mean.
        random_sets: as many sets of the circuit's size are drawn to compare.
    """

    faithfulness: Annotated[float, Field(gt=0, le=1)] = 0.9
    components: Sequence[Part] | None = None
    ablation: Ablation | None = None
    random_sets: Annotated[int, Field(ge=0)] = 10

    def __post_init__(self) -> None:
        given = self.components
        if given is not None and (not given or len(set(given)) < len(given)):
            raise HookError(f"components names at least one, each once, got {list(given)}.", field="components")
        if given is not None and ({"heads", "attn_out"} <= set(given) or ("blocks" in given and len(given) > 1)):
            raise HookError(
                "A circuit's components do not overlap: heads or attn_out, and blocks alone.", field="components"
            )


class Search:
    """Metrics of sets of components, each set run once.

    Args:
        bench: the model with all components that may be left out.
        ablation: what is put in the place of those that are.
        progress: called with the runs over the data that are done, and about how many there are to do.
    """

    def __init__(self, bench: Bench, ablation: Ablation, progress: Progress = None) -> None:
        self.bench = bench
        self.ablation = ablation
        self.progress = progress
        self.n_runs = 0
        self._passes = Passes(self._tell)
        alone = [ablation == "resample" and not bench.data.has_corrupted and p is None for p in bench.partners]
        self.counted = ~np.array(alone)
        """Which examples can be ablated: the others have no partner to be resampled from. [example]"""
        self._known: dict[frozenset[str], np.ndarray] = {}
        self._kept: dict[int, Numbers | None] = {}
        self._n_bytes = 0

    @property
    def metric(self) -> str:
        """A key of METRICS."""
        data = self.bench.data
        if data.has_wrong:
            return "logit_difference"
        return "log_probability" if data.kind == "answers" else "text_log_probability"

    def of(self, circuit: Collection[str]) -> np.ndarray:
        """The metric [counted example] with everything outside a set of components ablated."""
        key = frozenset(circuit)
        if key not in self._known:
            outside = [c for c in self.bench.components if c.name not in key]
            found = np.zeros(len(self.bench.data))
            for i, batch in enumerate(self.bench.batches):
                numbers = self._replacements(i, batch) if outside else None
                found[batch.indices] = self._score(batch.tokens, batch, outside, numbers)
                self._tell()
            self._known[key] = found[self.counted]
            self._advance()
        return self._known[key]

    def corrupted(self) -> np.ndarray:
        """The metric [counted example] of the corrupted prompts."""
        found = np.zeros(len(self.bench.data))
        for batch in self.bench.batches:
            assert batch.corrupted is not None
            found[batch.indices] = self._score(batch.corrupted, batch)
            self._tell()
        return found[self.counted]

    def patched(self) -> np.ndarray:
        """The metric [counted example, component] of the corrupted prompts, with one component as in the clean run."""
        found = np.zeros((len(self.bench.data), len(self.bench.components)))
        cells = [Cell.of(component) for component in self.bench.components]
        for batch in self.bench.batches:
            assert batch.corrupted is not None
            plain = self._score(batch.corrupted, batch)
            self._tell()
            runs = PatchedRuns(self.bench.model, batch.corrupted, batch.tokens, cells, passes=self._passes)
            for indices, logits in runs.logits():
                n = len(indices)
                scores = np.tile(plain, n) if logits is None else self._told(logits, batch.repeated(n))
                found[np.ix_(batch.indices, np.array(indices))] = scores.reshape(n, -1).T
                self._tell()
        self._advance()
        return found[self.counted]

    def _score(
        self, tokens: np.ndarray, batch: EvalBatch, replaced: Sequence[Component] = (), numbers: Numbers | None = None
    ) -> np.ndarray:
        return self._told(self.bench.run(tokens, replaced, numbers), batch)

    def _told(self, logits: mx.array, batch: EvalBatch) -> np.ndarray:
        measured = self.bench.measure(logits, batch)
        return -measured.loss if measured.logit_difference is None else measured.logit_difference

    def _replacements(self, i: int, batch: EvalBatch) -> Numbers | None:
        if i in self._kept:
            return self._kept[i]
        numbers = self.bench.replacements(self.ablation, batch, self._passes)
        n_bytes = sum(r.array.nbytes for passes in (numbers or {}).values() for r in passes.values())
        if self._n_bytes + n_bytes <= _MOST_KEPT:
            self._kept[i] = numbers
            self._n_bytes += n_bytes
        return numbers

    def _advance(self) -> None:
        self.n_runs += 1
        self._tell()

    def _tell(self, *passes: int) -> None:
        """Say so after each pass: others may have a turn there."""
        if self.progress is not None:
            # How many sweeps there will be is not known: two are usual.
            self.progress(self.n_runs, max(3 * len(self.bench.components) + 4, self.n_runs + 1))


def analyse_circuit(
    model: HookedModel, eval_data: Any, options: CircuitOptions | dict | None = None, progress: Progress = None
) -> dict[str, Any]:
    """Find a small circuit that is faithful, and say how far it is one.

        found = analyse_circuit(model, [{"clean": ..., "corrupted": ..., "answer": " Paris", "wrong": " Rome"}, ...])
        found["circuit"]                            # ["L1H1", "L2H0", ...]
        found["faithfulness"]                       # {"mean", "low", "high", "n"}

    Args:
        eval_data: see :func:`eval_data_of`. With ``corrupted`` prompts components are patched; texts will do otherwise.
        progress: called with the runs over the data that are done, and about how many there are to do.

    Returns:
        plain JSON values. Of each of ``components`` the ``recovery`` (None without corrupted prompts) and the
        ``damage`` of ablating it alone, by all examples, and whether it is ``in_circuit``. Of the circuit whether it
        ``is_smallest`` (no smaller set is faithful; False where not all were tried), and by the examples that were
        ``held_out`` (indices; all where there are none) its ``faithfulness``, that of its ``complement`` (all the
        rest), and ``completeness``, which is 1 less the latter; and the faithfulness of ``random`` sets of the same
        size.

    Raises:
        HookError: for no eval data, components that the model does not have, and a metric that tells neither clean from
            corrupted prompts nor the model from one with all components ablated.
    """
    chosen = options_of(CircuitOptions, options)
    data = eval_data_of(model, eval_data, max_examples=chosen.max_examples, max_tokens=chosen.max_tokens)
    ablation: Ablation = chosen.ablation or ("resample" if data.has_corrupted else "mean")
    bench = Bench(
        model,
        data,
        _searched(model, chosen.components),
        batch_size=chosen.batch_size,
        mean_over=chosen.mean_over,
        seed=chosen.seed,
    )
    search = Search(bench, ablation, progress)
    if not search.counted.any():
        raise HookError("Resampling takes activations from another example that is as long: give several.", field=FIELD)
    return _reported(search, chosen)


def _searched(model: HookedModel, parts: Sequence[Part] | None) -> list[Component]:
    found = components_of(model, parts, usual=("mixer_out", "heads", "attn_out", "mlp_out"))
    split = {component.layer for component in found if component.part == "heads"}
    return [c for c in found if parts is not None or c.part != "attn_out" or c.layer not in split]


def _reported(search: Search, chosen: CircuitOptions) -> dict[str, Any]:
    components = search.bench.components
    names = [component.name for component in components]
    whole, nothing = search.of(names), search.of([])
    choosing, judging = _halves(search, chosen.seed)
    no_circuit = "with all components ablated the metric is what it is without: there is no circuit"
    check_differ(whole[choosing], nothing[choosing], no_circuit)
    settings = chosen.of_intervals

    def faithfulness(circuits: Sequence[Collection[str]]) -> list[Estimate]:
        scores = [(search.of(circuit) - nothing)[judging] for circuit in circuits]
        return ratios(np.stack(scores, axis=1), (whole - nothing)[judging], **settings) if scores else []

    def share(circuit: Collection[str]) -> float:
        return float((search.of(circuit) - nothing)[choosing].mean() / (whole - nothing)[choosing].mean())

    without = np.stack([search.of([n for n in names if n != name]) for name in names], axis=1)
    effects = {"damage": (whole[:, None] - without, whole - nothing)}
    corrupted = search.corrupted() if search.bench.data.has_corrupted else None
    if corrupted is not None:
        nothing_back = "clean and corrupted prompts have the same metric: nothing can be recovered"
        check_differ(whole[choosing], corrupted[choosing], nothing_back)
        effects["recovery"] = (search.patched() - corrupted[:, None], whole - corrupted)
    alone = {name: ratios(above, below, **settings) for name, (above, below) in effects.items()}
    sizes = [np.abs(above[choosing].mean(axis=0) / below[choosing].mean()) for above, below in effects.values()]
    importance = dict(zip(names, np.max(sizes, axis=0).tolist(), strict=True))
    circuit, is_smallest = smallest(share, importance, chosen.faithfulness)
    own, complement = faithfulness([circuit, [name for name in names if name not in circuit]])
    notes = [
        *_notes(search, whole, nothing),
        *few(int(judging.sum())),
        *_notes_of_circuit(own, chosen.faithfulness, is_held_out=not choosing.all()),
        *_notes_of_size(circuit, names, is_smallest),
    ]
    drawn = _random_sets(names, circuit, chosen.random_sets, chosen.seed)
    compared = [estimate.mean for estimate in faithfulness(drawn)]
    levels = {"clean": whole, "corrupted": corrupted, "ablated": nothing}
    if search.progress is not None:
        search.progress(search.n_runs, search.n_runs)
    return {
        "eval_data": search.bench.data.to_dict(),
        "metric": METRICS[search.metric],
        "ablation": search.bench.describe(search.ablation),
        "levels": {
            name: None if values is None else means(values[:, None], **settings)[0].to_dict()
            for name, values in levels.items()
        },
        "components": [
            component.to_dict()
            | {
                "recovery": alone["recovery"][i].to_dict() if "recovery" in alone else None,
                "damage": alone["damage"][i].to_dict(),
                "in_circuit": component.name in circuit,
            }
            for i, component in enumerate(components)
        ],
        "circuit": circuit,
        "size": len(circuit),
        "is_smallest": is_smallest,
        "chosen_with": int(choosing.sum()),
        "judged_by": int(judging.sum()),
        "held_out": [] if choosing.all() else np.flatnonzero(search.counted)[judging].tolist(),
        "asked_faithfulness": chosen.faithfulness,
        "faithfulness": own.to_dict(),
        "complement": complement.to_dict(),
        "completeness": less_than_one(complement).to_dict(),
        "random": {
            "sets": len(drawn),
            "faithfulness": compared,
            "mean": float(np.mean([each for each in compared if each is not None])) if drawn else None,
        },
        "confidence": chosen.confidence,
        "runs": search.n_runs,
        "notes": notes,
    }


def _notes(search: Search, whole: np.ndarray, nothing: np.ndarray) -> list[str]:
    notes = []
    n_alone = int((~search.counted).sum())
    if n_alone:
        notes.append(f"{n_alone} of {len(search.counted)} examples are left out: no other is as long as they are.")
    if whole.mean() < nothing.mean():
        notes.append("The model does worse than with all components ablated: the circuit is one of doing worse.")
    if search.metric == "logit_difference" and whole.mean() < 0:
        notes.append("On average the model prefers the wrong answers.")
    return notes


def _notes_of_circuit(own: Estimate, asked: float, *, is_held_out: bool) -> list[str]:
    notes = []
    if not is_held_out:
        notes.append(
            "Faithfulness is that of the examples with which the circuit was chosen, which flatters it; of at least "
            f"{_ENOUGH} different ones half are held out."
        )
    elif own.mean is None or not is_near(own.mean, asked):
        notes.append("On the examples that were held out the circuit does not reach the faithfulness asked.")
    if own.low is None and own.n >= FEWEST:
        notes.append(
            "By these examples the model may be no better than one with all components ablated: shares of that "
            "difference have no intervals. Give more examples, or such as the model can do."
        )
    return notes


def _notes_of_size(circuit: Sequence[str], names: Sequence[str], is_smallest: bool) -> list[str]:
    if len(circuit) == len(names):
        tried = "none of fewer is" if is_smallest else "no smaller one was found, though not all were tried"
        return [f"The circuit is all components: {tried}."]
    return [] if is_smallest else ["Not all smaller sets were tried: of this circuit no single component can go."]


def _halves(search: Search, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which examples the circuit is chosen with, and which it is judged by, [counted example] of bool.

    Examples of the same prompts stay together. Of few different ones all are on both sides.
    """
    prompts: dict[frozenset[tuple[int, ...] | None], int] = {}
    examples = [search.bench.data.examples[i] for i in np.flatnonzero(search.counted)]
    which = np.array([prompts.setdefault(frozenset({e.tokens, e.corrupted}), len(prompts)) for e in examples])
    if len(prompts) < _ENOUGH:
        return np.ones(len(which), dtype=bool), np.ones(len(which), dtype=bool)
    drawn = np.random.default_rng(seed).permutation(len(prompts))[: len(prompts) // 2]
    choosing = np.isin(which, drawn)
    return choosing, ~choosing


def smallest(
    share: Callable[[Collection[str]], float], importance: dict[str, float], asked: float
) -> tuple[list[str], bool]:
    """The smallest faithful set of components that was found, in forward order, and whether there is no smaller one.

    Args:
        share: the faithfulness of a set; that of all is 1.
        importance: of all components.
    """
    names = list(importance)
    ranked = sorted(names, key=lambda name: -importance[name])

    def is_faithful(circuit: Collection[str]) -> bool:
        return is_near(share(circuit), asked)

    grown = next(ranked[:size] for size in range(1, len(ranked) + 1) if is_faithful(ranked[:size]))
    found = min((_pruned(start, importance, is_faithful) for start in (names, grown)), key=len)
    sizes = range(1, len(found))
    tries_all = sum(math.comb(len(names), size) for size in sizes) <= _MOST_SETS
    if tries_all:
        smaller = (some for size in sizes for some in combinations(ranked, size))
        found = list(next((some for some in smaller if is_faithful(some)), found))
    return [name for name in names if name in found], tries_all


def _pruned(
    circuit: Sequence[str], importance: dict[str, float], is_faithful: Callable[[Collection[str]], bool]
) -> list[str]:
    """What is left of a faithful circuit when no single component can go."""
    kept, went = list(circuit), True
    while went:
        went = False
        for name in sorted(kept, key=lambda name: importance[name]):
            fewer = [other for other in kept if other != name]
            if is_faithful(fewer):
                kept, went = fewer, True
    return kept


def _random_sets(names: Sequence[str], circuit: Collection[str], count: int, seed: int) -> list[list[str]]:
    """Sets of the circuit's size, drawn among all of this size but the circuit; each once."""
    generator = np.random.default_rng(seed)
    found: dict[frozenset[str], None] = {}
    # Of few components there may be fewer sets than asked.
    for _ in range(10 * count):
        drawn = frozenset(generator.choice(names, len(circuit), replace=False).tolist())
        if drawn != frozenset(circuit) and len(found) < count:
            found[drawn] = None
    return [[name for name in names if name in drawn] for drawn in found]


def draw_circuit(result: dict[str, Any]) -> list[tuple[str, "Figure"]]:
    """Recovery and damage of all components, those of the circuit framed; and its faithfulness beside the controls'."""
    from .charts import FAINT, component_map, estimates, figure, map_size

    components = result["components"]
    inside = [component["in_circuit"] for component in components]
    measures = {"recovery": "share recovered by patching", "damage": "share lost by ablation"}
    shown = {name: label for name, label in measures.items() if components[0][name] is not None}
    made, all_axes = figure(f"Circuit of {sum(inside)} components (framed)", len(shown), **map_size(components))
    for axes, (name, label) in zip(all_axes, shown.items(), strict=True):
        component_map(axes, components, [component[name]["mean"] for component in components], label, inside)
    drawn = [("The circuit among all components", made)]
    judged, (axes,) = figure("How faithful the circuit is", height=2.6)
    named = {"the circuit": result["faithfulness"], "all but the circuit": result["complement"]}
    estimates(axes, named, "faithfulness, 1 is the whole model")
    drawn_at = [score for score in result["random"]["faithfulness"] if score is not None]
    if drawn_at:
        axes.plot(drawn_at, [len(named)] * len(drawn_at), color=FAINT, marker="|", markersize=12, linestyle="none")
        axes.set_yticks(range(len(named) + 1), [*named, "random, as many"], fontsize=8)
        axes.set_ylim(len(named) + 0.5, -0.5)
    axes.axvline(1, color=FAINT, linewidth=0.8, linestyle="--")
    return [*drawn, ("Faithfulness", judged)]
