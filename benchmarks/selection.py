"""What a hook that keeps a selection saves: bytes and time of one request over loopback, beside the whole capture.

    python benchmarks/selection.py              # --tokens 512 --layers 12 --width 512

The server runs in this process, on a random llama; the client asks for the prompt alone (``max_tokens: 0``) and decodes
every array. Each request is timed next to one that keeps a single number, in turn; the table shows medians. Times are
the processor's, of server and client together: other work on the machine does not count.
The figures are written to docs/benchmarks.md.
"""

import argparse
import statistics
import threading
import time
from typing import Any

from page import PAGE, busy, environment, write_section
from random_llama import random_llama
from tqdm import tqdm

from api_server import ModelWorker, Server, ServerConfig, create_app
from mlx_hooks import HookedModel
from neuroscope_bridge import LMStudioNeuroScopeClient

VOCABULARY = 1024
RESIDUAL, PATTERN = "blocks.*.hook_resid_post", "blocks.*.attn.hook_pattern"
NOTHING: dict[str, Any] = {"hook_point": "hook_embed", "positions": 0, "reduce": "norm"}
CAPTURES: dict[str, dict[str, Any]] = {
    "residual, all positions": {"hook_point": RESIDUAL},
    'residual, `positions: "last"`': {"hook_point": RESIDUAL, "positions": "last"},
    'residual, `reduce: "mean"`': {"hook_point": RESIDUAL, "reduce": "mean"},
    'residual, `reduce: "norm"`': {"hook_point": RESIDUAL, "reduce": "norm"},
    "pattern, all queries and heads": {"hook_point": PATTERN},
    'pattern, `positions: "last"`': {"hook_point": PATTERN, "positions": "last"},
    "pattern, `heads: [0]`": {"hook_point": PATTERN, "heads": [0]},
}


def measure(client: LMStudioNeuroScopeClient, prompt: list[int], rounds: int) -> list[tuple[str, int, float, float]]:
    """For each capture its name, bytes of its arrays, processor seconds, and those beyond keeping one number."""

    def ask(hook: dict[str, Any]) -> tuple[int, float]:
        begin = time.process_time()
        reply = client.complete_with_activations(prompt, [hook], max_tokens=0)
        taken = time.process_time() - begin
        return sum(receipt["bytes"] for receipt in reply["hooks"].values()), taken

    found = []
    for name, hook in tqdm(CAPTURES.items()):
        pairs = [(ask(hook), ask(NOTHING)) for _ in range(rounds + 1)][1:]
        seconds = statistics.median(taken for (_, taken), _ in pairs)
        more = statistics.median(taken - plain for (_, taken), (_, plain) in pairs)
        found.append((name, pairs[0][0][0], seconds, more))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    load = busy()
    prompt = [i % VOCABULARY for i in range(asked.tokens)]
    config = ServerConfig(port=0, max_reply_bytes=2**31)
    with ModelWorker(
        load=lambda _: HookedModel(random_llama(asked.layers, asked.width, vocabulary=VOCABULARY))
    ) as worker:
        worker.load("random", "random")
        server = Server(create_app(worker, config), config, waiting=worker.max_queued)
        thread: threading.Thread = server.start()
        with LMStudioNeuroScopeClient(server.url) as client:
            rows = measure(client, prompt, asked.rounds)
        server.stop()
        thread.join()
    write_section(
        "Captures that keep a selection",
        f"`python benchmarks/selection.py --tokens {asked.tokens} --layers {asked.layers} --width {asked.width}`\n\n"
        f"{environment('mlx', 'mlx-lm')}\n"
        f"A llama of {asked.layers} layers, {asked.width} wide, 8 heads; one request over loopback that\n"
        f"reads a prompt of {asked.tokens} tokens, base64 float32, decoded in the client.\n"
        f"Medians of {asked.rounds} rounds; {load}.\n\n"
        "| capture at all layers | bytes | processor time, ms | beyond a request that keeps one number, ms |\n"
        "| --- | --- | --- | --- |\n"
        + "\n".join(
            f"| {name} | {nbytes:,} | {seconds * 1e3:.0f} | {more * 1e3:+.0f} |" for name, nbytes, seconds, more in rows
        ),
    )
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
