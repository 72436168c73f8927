"""Exact patching of all heads x positions: cells that run together, beside a run for each cell.

A run for each cell is an intervention on the model that runs the same prompts, with the other run's activations at
hand. Every measured cell is compared: both ways give the same numbers.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_hooks import HookedModel
from mlx_hooks.analysis.circuits.metrics import metric_of
from mlx_hooks.analysis.circuits.patching import PatchingOptions, activation_patching, grid_of
from mlx_hooks.analysis.eval_data import eval_data_of

SWEEP = "layer x head x position"
NAMES = [("Mary", "John"), ("Tom", "Anna"), ("Kate", "Paul"), ("Helen", "David"), ("Lucy", "Sam"), ("Anna", "John")]
EVERY = 5
"""Of the runs for each cell every fifth is made."""


@dataclass
class Measured:
    """Processor seconds of all cells, as medians.

    Args:
        prompts, cells: how many.
        together, apart: cells that run together, and one after the other.
        off: the greatest difference between what the two tell.
    """

    prompts: int
    cells: int
    together: float
    apart: float
    off: float

    @property
    def ratio(self) -> float:
        return self.apart / self.together


def prompts(n: int) -> list[dict[str, str]]:
    """Indirect objects, whose corrupted partners have other names: the two differ from the second word on."""
    made = []
    for i in range(n):
        (a, b), (c, d) = NAMES[i % len(NAMES)], NAMES[(i + 2) % len(NAMES)]
        clean, corrupted = (f"When {x} and {y} went to the store , {y} gave a drink to" for x, y in ((a, b), (c, d)))
        made.append({"clean": clean, "corrupted": corrupted, "answer": f" {a}", "wrong": f" {c}"})
    return made


def measure(model: HookedModel, n_prompts: int, rounds: int) -> Measured:
    data = eval_data_of(model, prompts(n_prompts))
    batch, metric = next(data.batches(n_prompts)), metric_of(None, data)
    cells = list(grid_of(model, data, PatchingOptions(sweep=SWEEP)).cells.items())
    some = cells[::EVERY]

    def together() -> np.ndarray:
        return activation_patching(model, data, SWEEP, batch_size=n_prompts).patched

    def apart() -> np.ndarray:
        _, cache = model.run_with_cache(batch.tokens, "blocks.*.attn.hook_z")
        found = []
        for _, cell in some:
            (name,) = cell.hook_points
            limits = {"heads": list(cell.heads or ()), "positions": list(cell.positions or ())}
            with model.intervening([{"hook_point": name, "type": "patch", "source": cache[name], **limits}]):
                found.append(metric.numbers(model.model(mx.array(batch.corrupted)), batch))
        return np.array(found)

    off = max(
        np.abs(together()[(slice(None), *place)] - alone).max() for (place, _), alone in zip(some, apart(), strict=True)
    )
    times = [(_seconds(together), _seconds(apart)) for _ in range(rounds)]
    return Measured(
        n_prompts,
        len(cells),
        statistics.median(first for first, _ in times),
        statistics.median(second for _, second in times) * len(cells) / len(some),
        float(off),
    )


def _seconds(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


def report(rounds: int = 5, sizes: tuple[int, ...] = (1, 4, 8)) -> str:
    """A table for the page."""
    model = HookedModel.from_pretrained("neuroscope-tiny")
    rows = [measure(model, n, rounds) for n in sizes]
    lines = [
        f"| {row.prompts} | {row.cells} | {row.together * 1e3:.0f} | {row.apart * 1e3:.0f} | {row.ratio:.1f} | "
        f"{row.off:.0e} |"
        for row in rows
    ]
    return (
        "Activation patching of each head's z at each position of the bundled model, with prompts of 15 tokens that\n"
        "differ from the second word on. Cells share forward passes, which begin at the layer and the position that\n"
        "they change. Beside it a run for each cell, by `model.intervening` (every fifth is run, counted five times).\n"
        f"Processor time; medians of {rounds} rounds; one after the other.\n\n"
        "| prompts | cells | together, ms | a run for each, ms | times as fast | greatest difference |\n"
        "| --- | --- | --- | --- | --- | --- |\n" + "\n".join(lines)
    )
