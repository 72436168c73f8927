"""What capturing costs over the same model's plain forward pass, paired in one process.

    make benchmark        # or: python benchmarks/capture_overhead.py --layers 12 --width 512 --tokens 128

Every kind of capture is timed next to a plain run, in turn, and who goes first changes from round to round, so that a
slow moment of the machine falls on all of them. The table shows medians of these ratios, and the middle half of them.
Peers (TransformerLens, nnsight, mlxterp) run on the same shape where they are installed, each over its own plain run.
The figures go to docs/benchmarks.md.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from page import PAGE, busy, environment, write_section
from peers import NONE, PATTERNS, RESIDUAL, TEN, VOCABULARY, peers
from random_llama import random_llama
from tqdm import tqdm

from mlx_hooks import HookedModel
from mlx_hooks.hook_points import COMPONENTS, block_point

DECODED = 32
EVERY, DECODING = "every hook point", "decoding"
LABELS = {
    NONE: "hooks available, none attached",
    RESIDUAL: "residual at all layers",
    TEN: "the ten components at all layers",
    PATTERNS: "patterns at all layers",
    EVERY: "every hook point",
    DECODING: f"decoding {DECODED} tokens, residual at all layers",
}

Run = Callable[[], object]


def captures(model: HookedModel, tokens: mx.array) -> dict[str, tuple[Run, Run]]:
    """The plain run and the run that captures, by kind of capture."""

    def names(*components: str) -> list[str]:
        points = [block_point(c, layer).name for layer in range(model.cfg.n_layers) for c in components]
        return [name for name in points if name in model.hook_points]

    def plain() -> None:
        mx.eval(model.model(tokens))

    def capture(names_filter: list[str] | None) -> tuple[Run, Run]:
        return plain, lambda: model.run_with_cache(tokens, names_filter)

    residual = names("resid_post")
    block_outputs = [c for name, row in COMPONENTS.items() if name != "embedding" for c in row.output]
    return {
        NONE: (plain, lambda: mx.eval(model(tokens))),
        RESIDUAL: capture(residual),
        TEN: capture(["hook_embed", *names(*block_outputs)]),
        PATTERNS: capture(names("pattern")),
        EVERY: capture(None),
        DECODING: (
            lambda: decode(model, tokens),
            lambda: model.generate(tokens, max_tokens=DECODED, capture=residual),
        ),
    }


def decode(model: HookedModel, tokens: mx.array) -> None:
    """The shortest loop that decodes greedily: no sampler, no text, no log probabilities."""
    kv_cache = make_prompt_cache(model.model)
    token = mx.argmax(model.model(tokens, cache=kv_cache)[:, -1], axis=-1)
    for _ in range(DECODED - 1):
        token = mx.argmax(model.model(token[None], cache=kv_cache)[:, -1], axis=-1)
        mx.async_eval(token)
    mx.eval(token)


def seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(pairs: dict[str, tuple[Run, Run]], rounds: int, label: str) -> tuple[dict[str, list[float]], float]:
    """Time over plain of every pair in every round, and the median plain forward in milliseconds."""
    for pair in pairs.values():
        for run in pair:
            run()
    ratios: dict[str, list[float]] = {kind: [] for kind in pairs}
    plain_ms: list[float] = []
    for number in tqdm(range(rounds), desc=label, file=sys.stderr):
        gc.collect()
        for kind, (plain, capture) in pairs.items():
            if number % 2:
                with_capture, base = seconds(capture), seconds(plain)
            else:
                base, with_capture = seconds(plain), seconds(capture)
            ratios[kind].append(with_capture / base)
            if kind != DECODING:
                plain_ms.append(1000 * base)
    return ratios, statistics.median(plain_ms)


def cell(ratios: list[float] | None) -> str:
    """Median and middle half: "1.15 (1.12-1.18)"."""
    if not ratios:
        return "-"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11, help="at least 9 for figures that are written down")
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out")
    parser.add_argument("--print-only", action="store_true", help="leave docs/benchmarks.md as it is")
    options = parser.parse_args()
    if options.rounds < 9 and not options.print_only:
        parser.error("--rounds is at least 9 where the figures are written; for fewer, give --print-only")

    load = busy()
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, options.tokens))
    model = HookedModel(random_llama(options.layers, options.width))
    results = {"NeuroScope": measure(captures(model, mx.array(ids)), options.rounds, "NeuroScope")}
    found, missing = ([], []) if options.no_peers else peers(options.layers, options.width, ids)
    for peer in found:
        pairs = {kind: (peer.plain, capture) for kind, capture in peer.captures.items()}
        results[peer.name] = measure(pairs, options.rounds, peer.name)

    header = ["time over plain", *results]
    rows = [[label, *(cell(ratios.get(kind)) for ratios, _ in results.values())] for kind, label in LABELS.items()]
    rows.append(["plain forward, ms", *(f"{plain_ms:.0f}" for _, plain_ms in results.values())])
    table = "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])
    shape = f"{options.layers} layers, {options.width} wide, 8 heads, {options.tokens} tokens, float32"
    text = f"""\
`python benchmarks/capture_overhead.py --layers {options.layers} --width {options.width} --tokens {options.tokens} \
--rounds {options.rounds}`

{environment("mlx", "mlx-lm", *(["torch", "transformers"] if found else []))}
A llama of {shape}. Medians of {options.rounds} paired rounds, the middle half in brackets;
{load}.

{table}
"""
    if found:
        text += """
Each library is compared with the plain forward of the same model in its own framework: times across frameworks are not
compared. `-` is what a library was not asked for. In PyTorch the plain model runs its fused attention; TransformerLens
runs the one that forms patterns.
"""
    if missing:
        text += f"\n{' '.join(missing)}\n"
    print(f"\n{text}")
    if not options.print_only:
        write_section("Capture overhead", text)
        print(f"Written to {PAGE}.")


if __name__ == "__main__":
    main()
