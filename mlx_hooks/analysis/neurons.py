"""How strongly and how often each neuron of a layer is active, and on which tokens most.

One pass over the rows, part by part; sums are float64.
"""

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import Field

from ..errors import HookError
from ..options import options, options_of
from ..storage.rows import Rows
from .progress import Progress
from .top_rows import Spell, TopRows, check_vectors, finite, from_position

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Count = Annotated[int, Field(ge=1)]


@options
class NeuronOptions:
    """Options of :func:`analyse_neurons`.

    Args:
        threshold: a neuron fires where its activation is above it.
        rare_below: a neuron that fires at a smaller share of the rows is rare.
        top_tokens: rows with the highest activation that are told of each neuron; 0 for none.
        top_neurons: of how many neurons they are told: those with the highest maximum.
        skip_positions: the first so many positions of each sequence are left out: activations of the first token are
            often far from all others.
        part_size: rows that are read at once.
    """

    threshold: float = 0.0
    rare_below: Annotated[float, Field(ge=0, le=1)] = 0.01
    top_tokens: Annotated[int, Field(ge=0)] = 5
    top_neurons: Count = 512
    skip_positions: Annotated[int, Field(ge=0)] = 0
    part_size: Count = 4096


class _Sums:
    """What is known of each neuron from the rows so far.

    Means and squares of parts are put together as Chan, Golub and LeVeque (1979) do, so that a large mean does not
    swallow the variance.
    """

    def __init__(self, width: int, threshold: float) -> None:
        self.threshold = threshold
        self.n = 0
        self.mean, self.squares, self.sizes, self.fired = (np.zeros(width) for _ in range(4))

    def add(self, values: np.ndarray) -> None:
        values = values.astype(np.float64)
        n, mean = len(values), values.mean(axis=0)
        distance = mean - self.mean
        self.squares += np.square(values - mean).sum(axis=0) + np.square(distance) * self.n * n / (self.n + n)
        self.mean += distance * n / (self.n + n)
        self.sizes += np.abs(values).sum(axis=0)
        self.fired += (values > self.threshold).sum(axis=0)
        self.n += n


def analyse_neurons(
    rows: Rows, options: NeuronOptions | dict | None = None, spell: Spell = None, progress: Progress = None
) -> dict[str, Any]:
    """What each neuron of a layer does, over all rows.

        found = analyse_neurons(ShardReader("mechint_cache").rows("blocks.2.mlp.hook_post"))
        np.array(found["mean_activation"])                  # [neuron]
        found["n_dead"], found["rare_neurons"]

    Args:
        rows: of one layer; heads and their dimensions are neurons side by side.
        spell: what a token id is as text.
        progress: called with the rows that are done and that there are.

    Returns:
        plain JSON values, a list over neurons each: ``mean_activation``, ``max_activation`` (with its sign, so below 0
        where all are), ``std``, ``mean_abs``, ``firing_rate`` (the share of rows above the threshold, 0), ``sparsity``
        (the same numbers under the name that they have elsewhere, although they are large where a neuron is *not*
        sparse) and ``zero_fraction`` (1 less the firing rate). ``dead_neurons`` never fire, ``rare_neurons`` rarely.
        ``top_tokens`` are the rows with the highest activations: the first is where the maximum is.

    Raises:
        HookError: for attention patterns, and for activations that are not finite.
    """
    chosen = options_of(NeuronOptions, options)
    check_vectors(rows)
    sums = _Sums(rows.width, chosen.threshold)
    top = TopRows(max(1, chosen.top_tokens))
    done = 0
    for part in rows.parts(chosen.part_size):
        kept = np.flatnonzero(from_position(part, chosen.skip_positions))
        if len(kept):
            values = finite(part.at(kept), rows)
            top.add(values, kept + done)
            sums.add(values)
        done += len(part)
        if progress is not None:
            progress(done, len(rows))
    if not sums.n:
        raise HookError(f"No row is behind the first {chosen.skip_positions} positions.", field="skip_positions")
    rate = sums.fired / sums.n
    largest = top.values[0]
    told = np.sort(np.argsort(-largest, kind="stable")[: chosen.top_neurons])
    by_neuron = top.told(rows, spell, told) if chosen.top_tokens else []
    dead, rare = np.flatnonzero(sums.fired == 0), np.flatnonzero(rate < chosen.rare_below)
    return {
        "layer": rows.name,
        "rows": sums.n,
        "shape": list(rows.shape),
        "axes": list(rows.axes),
        "threshold": chosen.threshold,
        "mean_activation": sums.mean.tolist(),
        "max_activation": largest.astype(np.float64).tolist(),
        "std": np.sqrt(sums.squares / sums.n).tolist(),
        "mean_abs": (sums.sizes / sums.n).tolist(),
        "firing_rate": rate.tolist(),
        "sparsity": rate.tolist(),
        "zero_fraction": (1 - rate).tolist(),
        "n_dead": len(dead),
        "dead_neurons": dead.tolist(),
        "rare_below": chosen.rare_below,
        "n_rare": len(rare),
        "rare_neurons": rare.tolist(),
        "top_tokens": [
            {"neuron": int(neuron), "tokens": tokens} for neuron, tokens in zip(told, by_neuron, strict=False)
        ],
        "notes": _notes(rows),
    }


def _notes(rows: Rows) -> list[str]:
    if rows.axes[-1:] == ("d_mlp",):
        return []
    return [
        "These are no neurons with an activation function but dimensions of a vector, whose zero is no rest and whose "
        "basis is arbitrary: how often a number is above the threshold says little here."
    ]


def draw_neurons(result: dict[str, Any]) -> list[tuple[str, "Figure"]]:
    """How often neurons fire, and their mean and largest activations, as histograms."""
    from .charts import figure, histogram

    made, (left, right) = figure("Neurons of " + (result["layer"] or "the layer"), 2)
    rate = np.array(result["firing_rate"])
    histogram(left, {"neurons": rate}, "share of rows above the threshold", (0.0, 1.0))
    left.set_title(f"{result['n_dead']} of {len(rate)} never fire, {result['n_rare']} rarely", fontsize=9)
    numbers = {"mean": np.array(result["mean_activation"]), "largest": np.array(result["max_activation"])}
    histogram(right, numbers, "activation", rare=True)
    return [("Firing rates and activations", made)]
