"""What observers of a generation cost over the same generation without them, paired in one process.

    python benchmarks/observers.py              # --tokens 2048 --rounds 3; about three minutes on two quiet cores

In each round a plain run stands amidst the observed ones, whose order turns round from one to the next, so that a slow
moment of the machine falls on all of them. The table shows medians of these ratios, and their quartiles.
The figures go to docs/benchmarks.md.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np
from capture_overhead import cell, seconds
from page import PAGE, busy, environment, write_section
from tqdm import tqdm

from mlx_hooks import ActivationHook, AttentionExtractionHook, HookedModel, InferenceHook

PROMPT = "When Mary and John went to the store , John gave a drink to"
END_TOKEN = {3: -1e9}


class Strongest(InferenceHook):
    """A hook of one's own, told head by head, that looks at each head's weights."""

    def on_attention_computed(self, layer_idx, head_idx, attention_weights, *rest) -> None:  # type: ignore[override]
        self.data.append(attention_weights.max().item())


KINDS: dict[str, Callable[[], InferenceHook]] = {
    "attention, threshold 0.1": lambda: AttentionExtractionHook(0.1),
    "attention, threshold 0.1, with values": lambda: AttentionExtractionHook(0.1, store_values=True),
    "a hook of one's own, head by head": lambda: Strongest("strongest"),
    "MLPs": ActivationHook,
}


def runs(model: HookedModel, n_tokens: int) -> dict[str, Callable[[list[InferenceHook]], object]]:
    """Generating so many tokens, and reading a prompt of so many."""
    rng = np.random.default_rng(0)
    prompt = mx.array(rng.integers(5, model.cfg.d_vocab, (1, n_tokens)))
    sampling = {"temperature": 1.0, "seed": 1, "logit_bias": END_TOKEN}
    return {
        "generating": lambda hooks: model.generate(PROMPT, max_tokens=n_tokens, hooks=hooks, **sampling),
        "reading a prompt": lambda hooks: model.generate(prompt, max_tokens=1, hooks=hooks),
    }


def measured(run: Callable[[list[InferenceHook]], object], backwards: bool) -> dict[str, float]:
    """Seconds that each kind takes, and that a plain run in their midst does."""
    names = list(KINDS)
    names.insert(len(names) // 2, "plain")
    order = reversed(names) if backwards else names
    return {name: seconds(partial(run, [KINDS[name]()] if name in KINDS else [])) for name in order}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3, help="at least 3 for figures that are written down")
    parser.add_argument("--print-only", action="store_true", help="leave docs/benchmarks.md as it is")
    options = parser.parse_args()
    if options.rounds < 3 and not options.print_only:
        parser.error("--rounds is at least 3 where the figures are written; for fewer, give --print-only")
    load = busy()
    model = HookedModel.from_pretrained("neuroscope-tiny")
    columns = runs(model, options.tokens)
    ratios: dict[tuple[str, str], list[float]] = {(kind, way): [] for kind in KINDS for way in columns}
    plain: dict[str, list[float]] = {way: [] for way in columns}
    kept = AttentionExtractionHook(0.1)
    columns["reading a prompt"]([kept])
    for number in tqdm(range(options.rounds), file=sys.stderr):
        for way, run in columns.items():
            taken = measured(run, backwards=bool(number % 2))
            plain[way].append(taken.pop("plain"))
            for kind, time_taken in taken.items():
                ratios[kind, way].append(time_taken / plain[way][-1])
    rows = [[kind, *(cell(ratios[kind, way]) for way in columns)] for kind in KINDS]
    rows.append(["plain, seconds", *(f"{statistics.median(plain[way]):.2f}" for way in columns)])
    header = ["time over plain", *(f"{way}, {options.tokens:,} tokens" for way in columns)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])
    text = f"""\
`python benchmarks/observers.py --tokens {options.tokens} --rounds {options.rounds}`

{environment("mlx", "mlx-lm", "numpy")} {load}.
`neuroscope-tiny`, all layers and heads. Medians of {options.rounds} rounds, and their quartiles. Of the
{options.tokens:,} tokens' {16 * options.tokens * (options.tokens + 1) // 2:,} attention weights, {kept.n_edges:,} were
kept of the prompt, in {kept.nbytes / 1e6:.2f} MB.

{table}
"""
    print(f"\n{text}")
    if not options.print_only:
        write_section("Observers of a generation", text)
        print(f"Written to {PAGE}.")


if __name__ == "__main__":
    main()
