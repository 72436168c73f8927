"""What a model loses without a part of it: ablation, layer by layer and component by component.

    1. The model runs as it is; each example has its loss, and its logit difference where wrong answers are given.
    2. One component's output is replaced at all positions: by zeros, by its mean over the data, or by what it is on
       another input (resampled). Everything after it is computed anew.
    3. The change of the loss, of the logit difference, and the divergence KL(as it is || ablated), each in nats or
       logits, are means over examples, with confidence intervals.

Which replacement is right depends on the question: zero leaves no trace of the component and takes the model where it
has never been; the mean keeps what does not depend on the input; resampling keeps the component's distribution, and
with corrupted partners removes just what tells the two apart. Source: Wang et al., "Interpretability in the Wild"
(2022); Zhang and Nanda, "Towards Best Practices of Activation Patching" (2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import mlx.core as mx
import numpy as np
from pydantic import Field

from ..activations import to_numpy
from ..errors import HookError
from ..model import HookedModel
from ..options import options, options_of
from .components import Component, Numbers, Part, Replacement, captured, components_of, edits, logits_of
from .eval_data import FIELD, NOTHING, EvalBatch, EvalData, eval_data_of
from .intervals import IntervalOptions, few, means
from .measures import at_targets, divergences, log_probabilities, logit_differences
from .progress import Passes, Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Ablation = Literal["zero", "mean", "resample"]
MeanOver = Literal["all", "position"]
Count = Annotated[int, Field(ge=1)]

ABLATIONS: dict[str, str] = {
    "zero": "zeros",
    "mean": "the component's mean over all examples and positions",
    "position": "the component's mean over all examples, position by position",
    "resample": "what the component is at the same positions of another example, drawn once for each",
    "corrupted": "what the component is on the example's corrupted partner",
}
"""What is put in the place of a component."""
MEASURES = ("loss", "kl", "logit_difference")


@options
class ExampleOptions(IntervalOptions):
    """What runs over examples have in common, besides :class:`IntervalOptions`.

    Args:
        mean_over: "all" takes one mean over all positions; "position" one per position, over the examples that have it.
        max_examples: the first so many examples are run; None for all, see :func:`eval_data_of`.
        max_tokens: of longer texts the rest is left out; None for what the model reads at most.
        batch_size: examples of one length that run together, fewer of long ones: see :meth:`EvalData.batches`.
        seed: of all that is drawn: partners in resampling, resamples of the bootstrap, random sets.
    """

    mean_over: MeanOver = "all"
    max_examples: Count | None = None
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    batch_size: Count = 8


@options
class CausalOptions(ExampleOptions):
    """Options of :func:`analyse_causal`, besides those of :class:`ExampleOptions`.

    Args:
        ablations: which replacements are made.
        components: which parts; None for attention, mixers and MLPs of every layer. "heads" replaces each head's z,
            "blocks" all that a block adds.
    """

    ablations: Sequence[Ablation] = ("zero", "mean", "resample")
    components: Sequence[Part] | None = None

    def __post_init__(self) -> None:
        for name in ("ablations", "components"):
            given = getattr(self, name)
            if given is not None and (not given or len(set(given)) < len(given)):
                raise HookError(f"{name} names at least one, each once, got {list(given)}.", field=name)


@dataclass(frozen=True, eq=False)
class Measured:
    """One batch's measures, [batch] each, in float64.

    Args:
        loss: nats per asked token, the mean of each example.
        kl: KL(plain || this) in nats, the mean over each example's asked positions; 0 for the plain run itself.
        logit_difference: the answer's logit less the wrong one's; None where no wrong ones are given.
    """

    loss: np.ndarray
    kl: np.ndarray
    logit_difference: np.ndarray | None


class Bench:
    """A model, data and components: runs with some components replaced, and measures what follows.

    Circuits are found on it too.

    Args:
        model, data: what is run.
        components: all that may be replaced.
        batch_size: examples of one length that run together, fewer of long ones: see :meth:`EvalData.batches`.
        mean_over: see :class:`CausalOptions`.
        seed: of who is whose partner in resampling.
    """

    def __init__(
        self,
        model: HookedModel,
        data: EvalData,
        components: Sequence[Component],
        *,
        batch_size: int = 8,
        mean_over: MeanOver = "all",
        seed: int = 0,
    ) -> None:
        self.model = model
        self.data = data
        self.components = list(components)
        self.batches = list(data.batches(batch_size))
        self.mean_over = mean_over
        self.points = list(dict.fromkeys(name for component in components for name in component.points))
        self.partners = partners_of(data, seed)
        """The index of each example's partner in resampling; None where it has none."""
        self._means: dict[str, dict[int, Replacement]] | None = None

    def describe(self, ablation: Ablation) -> str:
        """What an ablation puts in, in words."""
        if ablation == "mean" and self.mean_over == "position":
            return ABLATIONS["position"]
        return ABLATIONS["corrupted" if ablation == "resample" and self.data.has_corrupted else ablation]

    def n_passes(self, ablation: Ablation) -> int:
        """How many passes ``replacements`` takes, of all batches together."""
        known = ablation == "zero" or (ablation == "mean" and self._means is not None)
        return 0 if known else len(self.batches)

    def replacements(self, ablation: Ablation, batch: EvalBatch, passes: Passes | None = None) -> Numbers | None:
        """What is put in for a batch; None stands for zeros.

        Examples without a partner get what they have themselves in resampling: see ``is_resampled``.

        Args:
            passes: counts those that it takes: for the first mean all batches run.
        """
        passes = passes or Passes()
        if ablation == "zero":
            return None
        if ablation == "mean":
            if self._means is None:
                self._means = self._find_means(passes)
            return self._means
        tokens = batch.corrupted
        if tokens is None:
            length = batch.tokens.shape[1]
            own = [i if self.partners[i] is None else self.partners[i] for i in batch.indices]
            # Attention looks back only: what stands behind changes nothing at the positions before.
            tokens = np.array([self.data.examples[int(i or 0)].tokens[:length] for i in own])
        found = self.values(tokens)
        passes.passed()
        return found

    def is_resampled(self, batch: EvalBatch) -> np.ndarray:
        """Which examples of a batch have a partner to be resampled from, [batch]."""
        return np.array([batch.corrupted is not None or self.partners[i] is not None for i in batch.indices])

    def values(self, tokens: np.ndarray) -> dict[str, dict[int, Replacement]]:
        """What all components are on tokens [batch, pos]."""
        held = captured(self.model, tokens, self.points)
        return {
            name: {index: Replacement(value, True) for index, value in passes.items()} for name, passes in held.items()
        }

    def _find_means(self, passes: Passes) -> dict[str, dict[int, Replacement]]:
        if self.mean_over == "position":
            check_means(self.data)
        sums: dict[tuple[str, int], np.ndarray] = {}
        counts: dict[tuple[str, int], np.ndarray] = {}
        longest = max(batch.tokens.shape[1] for batch in self.batches)
        for batch in self.batches:
            n, length = batch.tokens.shape
            for name, held in captured(self.model, batch.tokens, self.points).items():
                for index, value in held.items():
                    rows = to_numpy(value).astype(np.float64).sum(axis=0)
                    key = name, index
                    if key not in sums:
                        sums[key], counts[key] = np.zeros((longest, *rows.shape[1:])), np.zeros(longest)
                    sums[key][:length] += rows
                    counts[key][:length] += n
            passes.passed()
        found: dict[str, dict[int, Replacement]] = {}
        for (name, index), total in sums.items():
            count = counts[name, index]
            by_position = self.mean_over == "position"
            mean = total / count.reshape(-1, *[1] * (total.ndim - 1)) if by_position else total.sum(0) / count.sum()
            found.setdefault(name, {})[index] = Replacement(mean.astype(np.float32), by_position)
        return found

    def run(self, tokens: np.ndarray, replaced: Sequence[Component] = (), numbers: Numbers | None = None) -> mx.array:
        """Logits [batch, pos, d_vocab] with some components replaced."""
        return logits_of(self.model, tokens, edits(replaced, numbers))

    def measure(self, logits: mx.array, batch: EvalBatch, plain: mx.array | None = None) -> Measured:
        """Loss, divergence from the plain run's log probabilities, and logit difference, of each example.

        Raises:
            HookError: for numbers that are not finite.
        """
        is_asked = batch.targets[:, batch.asked] != NOTHING
        here = log_probabilities(logits, batch)
        losses = -at_targets(here, batch)
        changes = mx.zeros_like(losses) if plain is None else divergences(plain, here)
        loss, kl = (_means_of(to_numpy(each), is_asked) for each in (losses, changes))
        difference = None
        if batch.wrong is not None:
            difference = to_numpy(logit_differences(logits, batch)).astype(np.float64)
        if not all(np.isfinite(each).all() for each in (loss, kl, difference) if each is not None):
            raise HookError("The model's logits are not finite on the eval data: nothing can be measured.")
        return Measured(loss, np.maximum(kl, 0), difference)


def _means_of(values: np.ndarray, is_asked: np.ndarray) -> np.ndarray:
    """The mean of each row over the positions asked, in float64."""
    return np.where(is_asked, values.astype(np.float64), 0).sum(axis=1) / is_asked.sum(axis=1)


def check_means(data: EvalData) -> None:
    """Raise HookError where means by position would put back what is there: at the last position that is asked for.

    It is an error for any prompt with an answer; of texts, which are asked all along, for all of them.
    """
    own = []
    for example in data.examples:
        asked = max(i for i, target in enumerate(example.targets) if target != NOTHING) + 1
        begun = {other.tokens[:asked] for other in data.examples if len(other.tokens) >= asked}
        own.append(len(begun) == 1)
    if all(own) or (data.kind == "answers" and any(own)):
        raise HookError(
            f"The mean by position of example {own.index(True)} is its own where it is asked: give other prompts that "
            'are as long, mean_over "all", or another ablation.',
            field=FIELD,
        )


def partners_of(data: EvalData, seed: int) -> list[int | None]:
    """For each example another one, drawn among those that are as long or longer and begin differently."""
    generator = np.random.default_rng(seed)
    found: list[int | None] = []
    for example in data.examples:
        n = len(example.tokens)
        others = [i for i, e in enumerate(data.examples) if len(e.tokens) >= n and e.tokens[:n] != example.tokens]
        found.append(int(generator.choice(others)) if others else None)
    return found


def analyse_causal(
    model: HookedModel, eval_data: Any, options: CausalOptions | dict | None = None, progress: Progress = None
) -> dict[str, Any]:
    """Ablate every component on its own, and tell what that costs.

        found = analyse_causal(model, ["The capital of France is Paris ."], {"components": ["heads"]})
        found["components"][0]["ablations"]["mean"]["loss_change"]      # {"mean", "low", "high", "n"}

    Args:
        eval_data: see :func:`eval_data_of`.
        progress: called with the passes that are done, and how many there are.

    Returns:
        plain JSON values: ``plain`` has the measures without ablation; each of ``components`` its ``ablations``, in
        which ``loss_change`` and ``logit_difference_change`` are ablated less plain, and ``kl`` is KL(plain ||
        ablated). Every example counts the same. An interval is None for fewer than 5 examples.

    Raises:
        HookError: for no eval data, and for components that the model does not have.
    """
    chosen = options_of(CausalOptions, options)
    data = eval_data_of(model, eval_data, max_examples=chosen.max_examples, max_tokens=chosen.max_tokens)
    components = components_of(model, chosen.components)
    bench = Bench(model, data, components, batch_size=chosen.batch_size, mean_over=chosen.mean_over, seed=chosen.seed)
    plain, changes, left_out = _measure_all(bench, chosen.ablations, progress)
    measured = [name for name in MEASURES if name != "logit_difference" or data.has_wrong]
    estimates = dict(zip(changes, means(np.stack(list(changes.values()), axis=1), **chosen.of_intervals), strict=True))
    at_first = [name for name in measured if name != "kl"]
    before = means(np.stack([plain[name] for name in at_first], axis=1), **chosen.of_intervals)
    return {
        "eval_data": data.to_dict(),
        "ablations": {ablation: bench.describe(ablation) for ablation in chosen.ablations},
        "plain": {name: estimate.to_dict() for name, estimate in zip(at_first, before, strict=True)},
        "components": [
            component.to_dict()
            | {
                "ablations": {
                    ablation: {
                        _called(name): estimates[i, ablation, name].to_dict() if name in measured else None
                        for name in MEASURES
                    }
                    for ablation in chosen.ablations
                }
            }
            for i, component in enumerate(components)
        ],
        "confidence": chosen.confidence,
        "notes": _notes(data, left_out),
    }


_STRONGEST = 16
"""Components whose intervals are drawn."""


def draw_causal(result: dict[str, Any]) -> list[tuple[str, "Figure"]]:
    """The effects of all components by each ablation, and the strongest with their intervals."""
    from .charts import component_map, estimates, figure, map_size

    components, ablations = result["components"], list(result["ablations"])
    measure, label = ("loss_change", "change of the loss, nats")
    if result["eval_data"]["wrong_answers"]:
        measure, label = ("logit_difference_change", "change of the logit difference")
    made, all_axes = figure("Ablation of one component at a time", len(ablations), **map_size(components))
    for axes, ablation in zip(all_axes, ablations, strict=True):
        component_map(axes, components, [c["ablations"][ablation][measure]["mean"] for c in components], label)
        axes.set_title(ablation, fontsize=9)
    strongest, some_axes = figure("The strongest effects", len(ablations), height=1.2 + 0.22 * _STRONGEST)
    for axes, ablation in zip(some_axes, ablations, strict=True):
        effects = {c["component"]: c["ablations"][ablation][measure] for c in components}
        order = sorted(effects, key=lambda name: -abs(effects[name]["mean"] or 0))[:_STRONGEST]
        estimates(axes, {name: effects[name] for name in order}, label)
        axes.set_title(f"{ablation}, {result['confidence']:.0%} intervals", fontsize=9)
    return [("One component at a time", made), ("The strongest effects", strongest)]


def _called(measure: str) -> str:
    return measure if measure == "kl" else f"{measure}_change"


def _notes(data: EvalData, left_out: int) -> list[str]:
    notes = few(len(data), are_ratios=False)
    if left_out:
        notes.append(
            f"Resampling leaves out {left_out} of {len(data)} examples: there is no other as long as they are to take "
            "activations from."
        )
    if data.n_cut:
        notes.append(f"{data.n_cut} texts were longer than allowed and are read without their ends.")
    return notes


_Key = tuple[int, str, str]
"""A component's index, an ablation and a measure."""


def _measure_all(
    bench: Bench, ablations: Sequence[Ablation], progress: Progress
) -> tuple[dict[str, np.ndarray], dict[_Key, np.ndarray], int]:
    """Plain measures [example], changes [example] (nan where there is none), and how many could not be resampled."""
    n = len(bench.data)
    measures = [name for name in MEASURES if name != "logit_difference" or bench.data.has_wrong]
    plain: dict[str, np.ndarray] = {name: np.zeros(n) for name in measures}
    keys: list[_Key] = [(i, a, name) for i in range(len(bench.components)) for a in ablations for name in measures]
    changes: dict[_Key, np.ndarray] = {key: np.full(n, np.nan) for key in keys}
    left_out, of_batch = 0, 1 + len(bench.components) * len(ablations)
    passes = Passes(progress, len(bench.batches) * of_batch + sum(map(bench.n_passes, ablations)))
    for batch in bench.batches:
        logits = bench.run(batch.tokens)
        here, before = bench.measure(logits, batch), log_probabilities(logits, batch)
        for name in measures:
            plain[name][batch.indices] = getattr(here, name)
        passes.passed()
        for ablation in ablations:
            numbers = bench.replacements(ablation, batch, passes)
            counted = bench.is_resampled(batch) if ablation == "resample" else np.ones(len(batch.indices), dtype=bool)
            left_out += int((~counted).sum())
            for i, component in enumerate(bench.components):
                found = bench.measure(bench.run(batch.tokens, [component], numbers), batch, before)
                for name in measures:
                    change = getattr(found, name) - (0 if name == "kl" else getattr(here, name))
                    changes[i, ablation, name][batch.indices] = np.where(counted, change, np.nan)
                passes.passed()
    return plain, changes, left_out
