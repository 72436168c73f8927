"""What following traits costs over the same generation without them, paired in one process, in processor time.

    python benchmarks/traits.py              # --layers 12 --width 512 --tokens 64 --rounds 7; some minutes

In each round a plain generation stands amidst the others, whose order turns round from one to the next, so that a slow
moment of the machine falls on all of them. The table shows medians of these ratios, and their quartiles.
The figures go to docs/benchmarks.md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
from capture_overhead import cell
from page import PAGE, busy, environment, write_section
from random_llama import random_llama
from tqdm import tqdm

from mlx_hooks import HookedModel, TraitVector, capture_all_layers, capture_single_layer, watch_traits
from mlx_hooks.analysis.identity import ModelIdentity

COUNTS = (1, 8, 64)


def traits(model: HookedModel, count: int) -> list[TraitVector]:
    """So many random vectors, at one layer after the other."""
    drawn = np.random.default_rng(0).normal(size=(count, model.cfg.d_model))
    return [TraitVector(f"trait {i}", i % model.cfg.n_layers, "given", vector) for i, vector in enumerate(drawn)]


def kinds(model: HookedModel, prompt: list[int], n_tokens: int) -> dict[str, Callable[[], object]]:
    """What is timed, each a generation of the same tokens."""
    # Whose vectors they are is checked by all weights, once for many prompts.
    options = {"max_tokens": n_tokens, "temperature": 0.0, "identity": ModelIdentity.of(model)}
    watched = {f"scores of {_several(count)}": partial(watch, model, prompt, count, n_tokens) for count in COUNTS}
    one, eight = traits(model, 1), traits(model, 8)
    middle = model.cfg.n_layers // 2
    return watched | {
        "all layers, 1 trait, no attention": lambda: capture_all_layers(model, prompt, one, attention=False, **options),
        "all layers, 1 trait": lambda: capture_all_layers(model, prompt, one, **options),
        "all layers, 8 traits": lambda: capture_all_layers(model, prompt, eight, **options),
        "inside one layer, 1 trait": lambda: capture_single_layer(model, prompt, one, layer=middle, **options),
    }


def watch(model: HookedModel, prompt: list[int], count: int, n_tokens: int) -> None:
    for _ in watch_traits(model, prompt, traits(model, count), max_tokens=n_tokens, temperature=0.0):
        pass


def seconds(run: Callable[[], object]) -> float:
    """The processor's, of all threads: what else the machine does is not in it."""
    began = time.process_time()
    run()
    return time.process_time() - began


def _several(count: int) -> str:
    return f"{count} trait{'s' if count > 1 else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64, help="of the prompt, and generated")
    parser.add_argument("--rounds", type=int, default=7, help="at least 3 for figures that are written down")
    parser.add_argument("--print-only", action="store_true", help="leave docs/benchmarks.md as it is")
    options = parser.parse_args()
    if options.rounds < 3 and not options.print_only:
        parser.error("--rounds is at least 3 where the figures are written; for fewer, give --print-only")
    load = busy()
    model = HookedModel(random_llama(options.layers, options.width))
    prompt = np.random.default_rng(0).integers(0, model.cfg.d_vocab, options.tokens).tolist()
    timed = kinds(model, prompt, options.tokens)
    names = list(timed)
    # The last generated token is read too, as it is where traits are followed.
    timed["plain"] = lambda: model.generate(prompt, max_tokens=options.tokens, temperature=0.0, read_last=True)
    names.insert(len(names) // 2, "plain")
    for run in timed.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(options.rounds), file=sys.stderr):
        for name in reversed(names) if number % 2 else names:
            taken[name].append(seconds(timed[name]))
    rows = [
        [name, cell([mine / plain for mine, plain in zip(taken[name], taken["plain"], strict=True)])]
        for name in names
        if name != "plain"
    ]
    rows.append(["plain, seconds", f"{statistics.median(taken['plain']):.2f}"])
    table = "\n".join(f"| {' | '.join(row)} |" for row in [["processor time over plain", ""], ["---", "---"], *rows])
    text = f"""\
`python benchmarks/traits.py --layers {options.layers} --width {options.width} --tokens {options.tokens} \
--rounds {options.rounds}`

{environment("mlx", "mlx-lm", "numpy")} {load}.
A llama of {options.layers} layers, {options.width} wide, 8 heads, float32: a prompt of {options.tokens} tokens and
{options.tokens} generated ones. Scores are of traits at one layer after the other. Medians of {options.rounds} rounds,
and their quartiles.

{table}
"""
    print(f"\n{text}")
    if not options.print_only:
        write_section("Traits", text)
        print(f"Written to {PAGE}.")


if __name__ == "__main__":
    main()
