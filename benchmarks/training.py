"""What capturing costs while a model trains: the bundled model's own training, with capture and without, in step.

    python benchmarks/training.py               # about twelve minutes of one core

Two models from the same seed get the same batches, one of them with capture, and who goes first changes from step to
step, so that a slow moment of the machine falls on both. In the compiled loop batches are given and run once more; in
the eager one, in which MLX compiles nothing, the training's own forward passes are saved. Captures are more frequent
than one would have them, so that there are several to time. Losses of all steps, and weights and the optimizer's state
at the end, must be equal. The figures go to docs/benchmarks.md.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from page import PAGE, busy, environment, write_section
from tqdm import tqdm

from mlx_hooks import MechIntHooks

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from neuroscope_tiny.train import make_batch, make_model, make_optimizer, make_step, parser

USUAL = 200
"""Steps from one capture to the next where nobody says otherwise."""


class Training:
    """An untrained model, and what trains it one step further and waits for it."""

    def __init__(self, settings: argparse.Namespace) -> None:
        mx.random.seed(settings.seed)
        self.model: nn.Module = make_model()
        self.optimizer: optim.MultiOptimizer = make_optimizer(settings)
        mx.eval(self.model.parameters())
        self.losses: list[float] = []
        self._step = make_step(self.model, self.optimizer, settings.weight_decay)

    def step(self, ids: mx.array, weights: mx.array) -> None:
        loss = self._step(ids, weights)
        mx.eval(self.model.state, self.optimizer.state, loss)
        self.losses.append(loss.item())

    def equals(self, other: "Training") -> bool:
        """Whether losses, weights and the optimizer's state are the same bit for bit."""
        mine, others = (dict(tree_flatten([one.model.parameters(), one.optimizer.state])) for one in (self, other))
        same = mine.keys() == others.keys() and all(mx.array_equal(mine[name], others[name]) for name in mine)
        return same and self.losses == other.losses


@dataclass
class Times:
    """Seconds: of each step without capture and with it, what of the latter was capturing (and by the clock), and of
    registering hooks and closing the folder."""

    plain: list[float] = field(default_factory=list)
    captured: list[float] = field(default_factory=list)
    captures: list[float] = field(default_factory=list)
    by_clock: list[float] = field(default_factory=list)
    around: float = 0.0
    n_rows: int = 0
    n_layers: int = 0
    nbytes: int = 0

    @property
    def per_step(self) -> float:
        return sum(self.plain) / len(self.plain)

    @property
    def per_capture(self) -> float:
        return sum(self.captures) / len(self.captures)

    @property
    def between(self) -> float:
        """Steps with hooks, without what capturing took, over the same steps without."""
        return (sum(self.captured) - sum(self.captures)) / sum(self.plain)

    def column(self) -> list[str]:
        n = len(self.captures)
        by_clock = 1000 * sum(self.by_clock) / n
        return [
            f"{1000 * self.per_step:.0f} ms",
            f"{self.n_rows // n:,} rows of {self.n_layers} layers, {self.nbytes / n / 1e6:.1f} MB",
            f"{1000 * self.per_capture:.0f} ms ({by_clock:.0f} ms by the clock)",
            f"{self.between:.4f}",
            f"{sum(self.captured) / sum(self.plain):.4f} ({n} captures in {len(self.plain)} steps)",
            f"{self.between + self.per_capture / (USUAL * self.per_step):.4f}",
            f"{1000 * self.around:.0f} ms",
        ]


ROWS = [
    "a step of training",
    "a capture",
    "its time",
    "steps without their captures, over training without",
    "all steps and captures, over training without",
    f"so, with a capture every {USUAL} steps",
    "once: hooks registered, the folder closed",
]


def seconds(run: Callable[[], object]) -> float:
    """The processor's time that a call takes."""
    began = time.process_time()
    run()
    return time.process_time() - began


def measured(settings: argparse.Namespace, steps: int, every: int, compiled: bool) -> Times:
    """Train with capture and without."""
    generator = random.Random(f"training {settings.seed}")
    plain, captured, times = Training(settings), Training(settings), Times()
    with tempfile.TemporaryDirectory() as folder:
        hooks = MechIntHooks({"storage_path": folder, "save_hidden_every_n_steps": every})
        times.around = seconds(lambda: hooks.register_hooks(captured.model))

        def capture(step: int, ids: mx.array) -> None:
            began = time.perf_counter()
            batch = ids[:, :-1] if compiled else None
            took = seconds(lambda: hooks.on_training_step(batch=batch, global_step=step))
            if step % every == 0:
                times.captures.append(took)
                times.by_clock.append(time.perf_counter() - began)

        def with_capture(step: int, ids: mx.array, weights: mx.array) -> None:
            if compiled:
                capture(step, ids)
            captured.step(ids, weights)
            if not compiled:
                capture(step, ids)

        # What is compiled and allocated at first is no step's.
        ids, weights = make_batch(generator, settings, 0.0)
        plain.step(ids, weights)
        captured.step(ids, weights)
        for step in tqdm(range(steps), "compiled" if compiled else "eager", file=sys.stderr):
            ids, weights = make_batch(generator, settings, step / settings.steps)
            mx.eval(ids, weights)
            runs = [
                (times.plain, lambda ids=ids, weights=weights: plain.step(ids, weights)),
                (times.captured, lambda step=step, ids=ids, weights=weights: with_capture(step, ids, weights)),
            ]
            for spans, run in runs if step % 2 else reversed(runs):
                spans.append(seconds(run))
        times.around += seconds(hooks.on_train_end)
        assert hooks.sampler is not None
        statistics = hooks.sampler.get_statistics()
        times.n_rows, times.n_layers = statistics["total_samples_saved"], len(statistics["tracked_layers"])
        times.nbytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    if not captured.equals(plain):
        raise SystemExit("training with capture gave other losses, weights or states of the optimizer")
    return times


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=400, help="of the compiled loop")
    arguments.add_argument("--eager-steps", type=int, default=200, help="of the eager loop")
    arguments.add_argument(
        "--every", type=int, default=21, help="steps from one capture to the next; odd, so that each goes first"
    )
    arguments.add_argument("--print-only", action="store_true", help="leave docs/benchmarks.md as it is")
    asked = arguments.parse_args()
    settings, load = parser().parse_args([]), busy()
    compiled = measured(settings, asked.steps, asked.every, compiled=True)
    mx.disable_compile()
    eager = measured(settings, asked.eager_steps, asked.every, compiled=False)
    lines = [
        f"| {name} | {one} | {other} |"
        for name, one, other in zip(ROWS, compiled.column(), eager.column(), strict=True)
    ]
    text = (
        f"`python benchmarks/training.py --steps {asked.steps} --eager-steps {asked.eager_steps} "
        f"--every {asked.every}`\n\n"
        f"{environment('mlx', 'mlx-lm')}\n"
        f"The bundled model's own training, {settings.rows} sequences of {settings.length} tokens a step; {load}.\n"
        "The compiled loop gives its batches, the eager one saves its own forward passes. Times are the processor's.\n"
        "Checked: the losses of all steps, and weights and the optimizer's state at the end, were those without\n"
        "capture, bit for bit.\n\n"
        "| | compiled | eager |\n| --- | --- | --- |\n" + "\n".join(lines) + "\n"
    )
    if asked.print_only:
        print(text)
        return
    write_section("Capture while training", text)
    print(PAGE)


if __name__ == "__main__":
    main()
