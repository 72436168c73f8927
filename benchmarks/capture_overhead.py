"""What capturing costs over the same model's plain forward pass, paired in one process.

    make benchmark        # or: python benchmarks/capture_overhead.py --layers 12 --width 512 --tokens 128

Every kind of capture is timed against a plain run right before it, in turn, so that a slow moment of the machine falls
on all of them; the table shows medians of these ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from tqdm import trange

from mlx_hooks import HookedModel
from mlx_hooks.hook_points import COMPONENTS, block_point

DECODED = 32


def make_model(layers: int, width: int) -> HookedModel:
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        num_attention_heads=8,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        vocab_size=8192,
    )
    mx.random.seed(0)
    model = llama.Model(args)
    mx.eval(model.parameters())
    return HookedModel(model)


def decode(model: HookedModel, tokens: mx.array, capture: list[str]) -> None:
    if capture:
        model.generate(tokens, max_tokens=DECODED, capture=capture)
        return
    kv_cache = make_prompt_cache(model.model)
    token = mx.argmax(model.model(tokens, cache=kv_cache)[:, -1], axis=-1)
    for _ in range(DECODED - 1):
        token = mx.argmax(model.model(token[None], cache=kv_cache)[:, -1], axis=-1)
        mx.async_eval(token)
    mx.eval(token)


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    model = make_model(options.layers, options.width)
    tokens = mx.random.randint(0, 8192, (1, options.tokens))

    def names(*components: str) -> list[str]:
        return [block_point(c, layer).name for layer in range(options.layers) for c in components]

    block_outputs = [c for name, row in COMPONENTS.items() if name != "embedding" for c in row.output]
    residual = names("resid_post")

    def plain() -> None:
        mx.eval(model.model(tokens))

    forward: dict[str, Callable[[], object]] = {
        "hooks available, none attached": lambda: mx.eval(model(tokens)),
        "residual at all layers": lambda: model.run_with_cache(tokens, residual),
        "the ten components at all layers": lambda: model.run_with_cache(
            tokens, ["hook_embed", *names(*block_outputs)]
        ),
        "patterns at all layers": lambda: model.run_with_cache(tokens, names("pattern")),
        "every hook point": lambda: model.run_with_cache(tokens),
    }
    ratios: dict[str, list[float]] = {name: [] for name in forward}
    decoding: list[float] = []
    plain_ms: list[float] = []
    for run in (plain, *forward.values()):
        run()
    for _ in trange(options.rounds, desc="rounds"):
        for name, run in forward.items():
            base = seconds(plain)
            plain_ms.append(1000 * base)
            ratios[name].append(seconds(run) / base)
        alone = seconds(lambda: decode(model, tokens, []))
        decoding.append(seconds(lambda: decode(model, tokens, residual)) / alone)
    shape = f"{options.layers} layers, {options.width} wide, {options.tokens} tokens"
    print(f"\n{shape}; plain forward {statistics.median(plain_ms):.1f} ms; medians of {options.rounds} rounds\n")
    print("| capture | time over plain |\n| --- | --- |")
    for name, values in ratios.items():
        print(f"| {name} | {statistics.median(values):.3f} |")
    print(f"| decoding {DECODED} tokens, residual at all layers | {statistics.median(decoding):.3f} |")


if __name__ == "__main__":
    main()
