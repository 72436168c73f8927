"""Captures 100,000 tokens of one sequence to files, and prints the memory that it takes on the way.

    python benchmarks/long_capture.py           # --tokens 100000 --chunk 500; about six minutes on two cores

The KV cache grows with the sequence, whatever is captured, and so do the scores that MLX's CPU kernel forms for a
chunk (on a GPU it forms none). What a capture adds must not grow: that is the memory in use between chunks, without the
KV cache, and the peak within chunks, without the peak of the same chunks run plain. The figures are written to
docs/benchmarks.md.
"""

import argparse
import tempfile
import time
from itertools import pairwise

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from page import PAGE, environment, write_section
from random_llama import random_llama
from tqdm import tqdm

from mlx_hooks import HookedModel

NAMES = ["blocks.*.hook_resid_post", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out"]
VOCABULARY = 1024
MB = 1e6


class Meter:
    """Memory of each chunk: in use at its end beside the KV cache, and at its peak."""

    def __init__(self, kv_cache: list, chunks: int, label: str) -> None:
        self.kv_cache = kv_cache
        self.in_use: list[int] = []
        self.peak: list[int] = []
        self.progress = tqdm(total=chunks, desc=label)
        mx.reset_peak_memory()

    def chunk_ends(self) -> None:
        self.in_use.append(mx.get_active_memory() - sum(entry.nbytes for entry in self.kv_cache))
        self.peak.append(mx.get_peak_memory())
        mx.reset_peak_memory()
        self.progress.update()

    def close(self) -> None:
        """Let go of the KV cache: the next run has its own."""
        self.kv_cache = []
        self.progress.close()


def run_plain(model: HookedModel, tokens: mx.array, chunk: int) -> Meter:
    kv_cache = make_prompt_cache(model.model)
    meter = Meter(kv_cache, -(-tokens.shape[1] // chunk), "plain")
    for begin in range(0, tokens.shape[1], chunk):
        # The trunk: nobody asks for the logits of 100,000 positions.
        hidden = model.model.model(tokens[:, begin : begin + chunk], cache=kv_cache)
        mx.eval(hidden, [entry.state for entry in kv_cache])
        del hidden
        mx.clear_cache()
        meter.chunk_ends()
    meter.close()
    return meter


def run_capture(model: HookedModel, tokens: mx.array, chunk: int, folder: str) -> tuple[Meter, int]:
    """The meter, and the bytes written."""
    kv_cache = make_prompt_cache(model.model)
    meter = Meter(kv_cache, -(-tokens.shape[1] // chunk), "captured to files")
    clear_cache = mx.clear_cache

    def chunk_ends() -> None:
        # The last thing that a chunk does.
        clear_cache()
        meter.chunk_ends()

    mx.clear_cache = chunk_ends
    try:
        _, cache = model.run_with_cache(tokens, NAMES, kv_cache=kv_cache, chunk=chunk, logits="none", spill_to=folder)
    finally:
        mx.clear_cache = clear_cache
    meter.close()
    return meter, cache.nbytes


def thirds(values: list[int]) -> list[float]:
    """The highest value of each third, in MB."""
    bounds = [round(i * len(values) / 3) for i in range(4)]
    return [max(values[a:b]) / MB for a, b in pairwise(bounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--chunk", type=int, default=500)
    parser.add_argument("--folder", help="a new or empty folder for the files; without it, one that is removed again")
    parser.add_argument("--print-only", action="store_true", help="leave docs/benchmarks.md as it is")
    options = parser.parse_args()
    model = HookedModel(random_llama(2, 32, heads=1, vocabulary=VOCABULARY, wider=2))
    tokens = mx.array(np.random.default_rng(0).integers(0, VOCABULARY, (1, options.tokens)))
    estimate = model.estimate_capture(tokens, NAMES)

    plain = run_plain(model, tokens, options.chunk)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        captured, written = run_capture(model, tokens, options.chunk, options.folder or scratch)
    took = time.perf_counter() - began

    added = [peak - base for peak, base in zip(captured.peak, plain.peak, strict=True)]
    rows = [
        ("in use between chunks, KV cache aside", thirds(captured.in_use)),
        ("peak", thirds(captured.peak)),
        ("peak of the same chunks, plain", thirds(plain.peak)),
        ("peak, less the plain one", thirds(added)),
    ]
    table = "\n".join(f"| {name} | {' | '.join(f'{value:.2f}' for value in row)} |" for name, row in rows)
    text = f"""\
`python benchmarks/long_capture.py --tokens {options.tokens} --chunk {options.chunk}`

{environment("mlx", "mlx-lm")}
A llama of 2 layers, 32 wide, one head; {options.tokens:,} tokens as one sequence, in chunks of {options.chunk}; three
hook points per layer: {written / MB:.1f} MB written (estimated before: {estimate.nbytes / MB:.1f} MB), in {took:.0f} s.

| MB, highest in | first third | second third | last third |
| --- | --- | --- | --- |
{table}

The plain peak grows with the KV cache and with the scores that MLX's CPU kernel forms for a chunk. The last row is what
capturing adds to it.
"""
    print(f"\n{text}")
    if not options.print_only:
        write_section("A long text to files", text)
        print(f"Written to {PAGE}.")


if __name__ == "__main__":
    main()
