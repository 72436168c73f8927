"""What capturing costs while a model trains: the bundled model's own training, with capture and without, in step.

    python benchmarks/training.py               # --steps 600; about eight minutes of one core

Two models from the same seed get the same batches, one of them with capture, and who goes first changes from step to
step, so that a slow moment of the machine falls on both. Times are the processor's. The figures go to
docs/benchmarks.md.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from neuroscope_tiny.train import make_batch, make_model, make_optimizer, make_step, parser
from page import PAGE, busy, environment, write_section
from tqdm import tqdm

from mlx_hooks import MechIntHooks

Step = Callable[[mx.array, mx.array], mx.array]


def trained(settings: argparse.Namespace) -> tuple[mx.array, Step]:
    """An untrained model, and what trains it one step further and waits for it."""
    mx.random.seed(settings.seed)
    model = make_model()
    optimizer = make_optimizer(settings)
    mx.eval(model.parameters())
    step = make_step(model, optimizer, settings.weight_decay)

    def run(ids: mx.array, weights: mx.array) -> mx.array:
        loss = step(ids, weights)
        mx.eval(model.state, optimizer.state, loss)
        return loss

    return model, run


def seconds(run: Callable[[], object]) -> float:
    """The processor's time that a call takes."""
    began = time.process_time()
    run()
    return time.process_time() - began


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--steps", type=int, default=600)
    arguments.add_argument("--every", type=int, default=200, help="steps from one capture to the next")
    arguments.add_argument("--print-only", action="store_true", help="leave docs/benchmarks.md as it is")
    asked = arguments.parse_args()
    settings, load = parser().parse_args([]), busy()
    generator = random.Random(f"training {settings.seed}")
    (plain_model, plain), (model, captured) = trained(settings), trained(settings)
    with tempfile.TemporaryDirectory() as folder:
        hooks = MechIntHooks({"storage_path": folder, "save_hidden_every_n_steps": asked.every})
        around = seconds(lambda: hooks.register_hooks(model))
        times: dict[str, list[float]] = {"plain": [], "captured": [], "captures": []}

        def with_capture(ids: mx.array, weights: mx.array, step: int) -> None:
            took = seconds(lambda: hooks.on_training_step(batch=ids[:, :-1], global_step=step))
            if step % asked.every == 0:
                times["captures"].append(took)
            captured(ids, weights)

        # What is compiled and allocated at first is no step's.
        ids, weights = make_batch(generator, settings, 0.0)
        plain(ids, weights)
        captured(ids, weights)
        for step in tqdm(range(asked.steps), file=sys.stderr):
            ids, weights = make_batch(generator, settings, step / settings.steps)
            mx.eval(ids, weights)
            kinds = {
                "plain": lambda ids=ids, weights=weights: plain(ids, weights),
                "captured": lambda ids=ids, weights=weights, step=step: with_capture(ids, weights, step),
            }
            for kind in sorted(kinds, reverse=bool(step % 2)):
                times[kind].append(seconds(kinds[kind]))
        around += seconds(hooks.on_train_end)
        statistics = hooks.sampler.get_statistics() if hooks.sampler else {}
        nbytes = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    weights_of = [dict(tree_flatten(one.parameters())) for one in (plain_model, model)]
    if not all(mx.array_equal(weights_of[0][name], weights_of[1][name]) for name in weights_of[0]):
        raise SystemExit("training with capture gave other weights")
    total = {kind: sum(spans) for kind, spans in times.items()}
    per_step = 1000 * total["plain"] / asked.steps
    per_capture = 1000 * total["captures"] / len(times["captures"])
    layers = len(statistics["tracked_layers"])
    rows = statistics["total_samples_saved"] // len(times["captures"])
    text = (
        f"`python benchmarks/training.py --steps {asked.steps} --every {asked.every}`\n\n"
        f"{environment('mlx', 'mlx-lm')}\n"
        f"The bundled model's own training, {settings.rows} sequences of {settings.length} tokens a step, compiled;\n"
        f"{load}. Times are the processor's. Losses and weights were those without capture, bit for bit.\n\n"
        "| | |\n| --- | --- |\n"
        f"| a step of training | {per_step:.0f} ms |\n"
        f"| a capture: {rows:,} rows of {layers} layers, {nbytes / len(times['captures']) / 1e6:.1f} MB | "
        f"{per_capture:.0f} ms |\n"
        f"| a capture, every {asked.every} steps, over training without | "
        f"{1 + per_capture / (asked.every * per_step):.4f} |\n"
        f"| all {asked.steps} steps with {len(times['captures'])} captures over the same steps without | "
        f"{total['captured'] / total['plain']:.4f} |\n"
        f"| once: hooks registered, the folder closed | {1000 * around:.0f} ms |\n"
    )
    if asked.print_only:
        print(text)
        return
    write_section("Capture while training", text)
    print(PAGE)


if __name__ == "__main__":
    main()
