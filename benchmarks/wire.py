"""How fast activations travel: from an array in the server to a NumPy array in the Python client, over loopback.

    python benchmarks/wire.py --mb 64

A second process serves a kept capture of random numbers through the real server; its file was just written, so it is
read from memory, not from a disk. Each encoding is timed in turn, round after round, in an order that moves on by one:
neither a slow moment of the machine nor what ran before falls on one of them alone. Beside them the naive way: Flask's
``jsonify(array.tolist())``, read by ``np.array(response.json())``, through the same HTTP server. Lists and the naive
way carry fewer numbers, since they are slow. The figures go to docs/benchmarks.md.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import requests
from flask import Response, jsonify
from page import PAGE, busy, environment, write_section
from tqdm import tqdm

from api_server import ModelWorker, Server, ServerConfig, create_app
from api_server.captures import CaptureAbout
from neuroscope_bridge import LMStudioNeuroScopeClient

WIDTH = 1024
HOOK = "layer_0_residual"
NAIVE, LISTS = "`jsonify(array.tolist())`, the naive way", "JSON, lists"


@dataclass(frozen=True)
class Way:
    """One way for ``rows`` rows of float32: how to fetch them, and the largest error that it may make."""

    fetch: Callable[[], np.ndarray]
    rows: int
    aim: str
    error: float = 0.0


def numbers(mb: int) -> np.ndarray:
    """The activations that travel, (1, positions, 1024), the same in both processes."""
    rows = mb * 2**20 // 4 // WIDTH
    return np.random.default_rng(0).standard_normal((1, rows, WIDTH), np.float32)


def serve(mb: int) -> None:
    """The second process: writes the server's address and the capture's id, then serves until it is ended."""
    array, config = numbers(mb), ServerConfig(port=0, max_reply_bytes=2**30)
    app = create_app(ModelWorker(), config)
    record = {
        "hook_id": HOOK,
        "layer_name": "blocks.0",
        "component": "residual",
        "hook_point": "blocks.0.hook_resid_post",
        "layer_index": 0,
        "axes": ["batch", "pos", "d_model"],
        "phase": "prefill",
        "step": 0,
        "pass_index": 0,
        "positions": (0, array.shape[1]),
        "is_input": False,
    }
    tokens = {"ids": [], "strings": [], "prompt_length": 0}
    hooks = {HOOK: {"fired": 1, "positions": [0, array.shape[1]], "bytes": array.nbytes}}
    with app.extensions["captures"].begin() as writer:
        writer.add(record, array)
        writer.finish(CaptureAbout(model="none", n_layers=1, n_heads=1, tokens=tokens, hooks=hooks))

    @app.get("/naive/<int:rows>")
    def naive(rows: int) -> Response:
        return jsonify({"data": array[:, :rows].tolist()})

    server = Server(app, config)
    print(server.url, writer.capture_id, flush=True)
    server.run()


def ways(client: LMStudioNeuroScopeClient, capture_id: str, rows: int, few: int) -> dict[str, Way]:
    """Every way by its label."""

    def part(count: int) -> slice:
        return slice(0, count)

    def binary(dtype: str) -> np.ndarray:
        (array,) = client.capture_activations(capture_id, HOOK, dtype=dtype).values()
        return array

    def json(encoding: str, dtype: str, count: int) -> np.ndarray:
        found = client.capture_activations(capture_id, HOOK, part(count), format="json", encoding=encoding, dtype=dtype)
        return found[HOOK][0]["data"]

    def naive() -> np.ndarray:
        plain = {"Accept-Encoding": "identity"}
        with requests.get(f"{client.base_url}/naive/{few}", headers=plain, timeout=600) as response:
            return np.array(response.json()["data"], np.float32)

    half = 2**-11
    return {
        "safetensors, float32": Way(lambda: binary("float32"), rows, "500 MB/s"),
        "safetensors, float16": Way(lambda: binary("float16"), rows, "", half),
        "npy, float32": Way(lambda: client.capture_activations(capture_id, HOOK, format="npy"), rows, ""),
        "JSON, base64, float32": Way(lambda: json("base64", "float32", rows), rows, ""),
        "JSON, base64, float16": Way(lambda: json("base64", "float16", rows), rows, "150 MB/s", half),
        LISTS: Way(lambda: json("json", "float32", few), few, "15 times the naive way"),
        NAIVE: Way(naive, few, ""),
    }


def check(way: Way, array: np.ndarray) -> None:
    """What comes must be what was sent."""
    found, sent = way.fetch(), array[:, : way.rows]
    if found.shape != sent.shape or not np.allclose(found, sent, rtol=way.error, atol=way.error * 1e-3):
        raise SystemExit("What came is not what was sent.")


def measure(mb: int, few_mb: int, rounds: int) -> dict[str, tuple[float, float, str]]:
    """MB/s of float32 numbers, the median and the best, and the aim, by way."""
    array = numbers(mb)
    rows, few = array.shape[1], min(array.shape[1], few_mb * 2**20 // 4 // WIDTH)
    command = [sys.executable, __file__, "--serve", "--mb", str(mb)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url, capture_id = process.stdout.readline().split()
            with LMStudioNeuroScopeClient(url) as client:
                todo = ways(client, capture_id, rows, few)
                for way in todo.values():
                    check(way, array)
                rates: dict[str, list[float]] = {label: [] for label in todo}
                order = list(todo.items())
                for _ in tqdm(range(rounds), file=sys.stderr):
                    order.append(order.pop(0))
                    for label, way in order:
                        began = time.perf_counter()
                        way.fetch()
                        rates[label].append(way.rows * WIDTH * 4 / 1e6 / (time.perf_counter() - began))
        finally:
            process.terminate()
    return {label: (statistics.median(rates[label]), max(rates[label]), way.aim) for label, way in todo.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=64, help="MiB of float32 activations")
    parser.add_argument("--few-mb", type=int, default=8, help="MiB for lists and the naive way")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--print-only", action="store_true", help="leave docs/benchmarks.md as it is")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.mb)
        return
    load = busy()
    results = measure(options.mb, options.few_mb, options.rounds)
    naive = results[NAIVE][0]
    rows = [["from array to NumPy array", "MB/s", "best", "times the naive way", "aim"], ["---"] * 5]
    rows += [
        [label, f"{rate:.4g}", f"{best:.4g}", f"{rate / naive:.3g}", aim or "-"]
        for label, (rate, best, aim) in results.items()
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = f"""\
`python benchmarks/wire.py --mb {options.mb} --few-mb {options.few_mb} --rounds {options.rounds}`

{environment("numpy", "orjson", "flask", "waitress", "requests")}
{options.mb} MiB of float32 activations (lists and the naive way: {options.few_mb} MiB), from the server's capture store
to a NumPy array in the Python client, over loopback, server and client in a process each. What is timed is a
capture that is kept and that the system still has in memory; running the model and writing the capture are not in it.
No reply is compressed. MB/s are of float32 numbers, however they travel. Medians of {options.rounds} rounds, and the
best; {load}.

{table}

float32 arrives bit for bit in every encoding, which is checked; float16 is half the bytes, and rounded. Lists are
slowest where Python makes an object of each number.
"""
    print(f"\n{text}")
    if not options.print_only:
        write_section("Activations on the wire", text)
        print(f"Written to {PAGE}.")


if __name__ == "__main__":
    main()
