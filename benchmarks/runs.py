"""What a query over many saved runs costs: the first one, later ones, and after runs were added, edited and removed.

    python benchmarks/runs.py               # --runs 10000

The runs are saved by the saver itself, each with one small activation cache and its own tag and custom keys, in ten
experiments. Later queries of the same process are timed one by one; the table shows medians and the slowest. Times are
the processor's, those in the system included: other work on the machine does not count.
The figures are written to docs/benchmarks.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from page import PAGE, busy, environment, write_section
from tqdm import tqdm

from mlx_hooks import ActivationLoader, ActivationSaver, ExtractionConfig, QueryResult
from mlx_hooks.storage import files

EXPERIMENTS = 10
RESIDUAL = ExtractionConfig(extract_resid_out=True)
BOTH = ExtractionConfig(extract_resid_out=True, extract_attn_pattern=True)
IN_A_NEW_PROCESS = """
import sys, time
from mlx_hooks import ActivationLoader
loader = ActivationLoader(sys.argv[1])
begin = time.process_time()
assert len(loader.query("*")) == int(sys.argv[2])
print(time.process_time() - begin)
"""


def save(base: Path, count: int) -> float:
    """Save runs; answers the seconds of one. Waiting for the disk is left out, which is not what is measured."""
    files.os.fsync = lambda descriptor: None  # type: ignore[attr-defined]
    savers = [ActivationSaver(base, f"experiment_{i}") for i in range(EXPERIMENTS)]
    begin = time.process_time()
    for i in tqdm(range(count), desc="Saving"):
        config = BOTH if i % 2 else RESIDUAL
        values = {"blocks.0.hook_resid_post": mx.full((1, 1, 8), i)}
        model = f"owner/model-{i % 3}"
        savers[i % EXPERIMENTS].save(values, model, ["last"], None, config, own_keys(i), f"batch_{i}")
    return (time.process_time() - begin) / count


def own_keys(i: int) -> dict[str, Any]:
    """A caller's own metadata of a run."""
    return {"batch_id": i, "loss": i / 7, "span": [i, i + 1], "settings": {"seed": i}, "is_even": i % 2 == 0}


def seconds(ask: Callable[[], QueryResult], expected: int, rounds: int) -> list[float]:
    """Times of some queries, each of which finds what is expected."""
    spans = []
    for _ in range(rounds):
        begin = time.process_time()
        found = ask()
        spans.append(time.process_time() - begin)
        assert len(found) == expected, (len(found), expected)
    return spans


def change(loader: ActivationLoader, base: Path) -> None:
    """What others do meanwhile: a run is added, another edited, another removed."""
    ActivationSaver(base, "experiment_0").save(mx.zeros(1), "other", ["last"], None, None)
    found = loader.query("experiment_1")
    path = found[0].path / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tag": "edited"}))
    found.remove(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    count, load = asked.runs, busy()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        each = save(base, count)
        (first,) = seconds(lambda: ActivationLoader(base).query("*"), count, 1)
        command = [sys.executable, "-c", IN_A_NEW_PROCESS, folder, str(count)]
        again = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        loader = ActivationLoader(base, "experiment_7")
        loader.query("*")
        asks: dict[str, tuple[Callable[[], QueryResult], int]] = {
            "all runs": (lambda: loader.query("*"), count),
            "by a custom key, a whole number": (lambda: loader.query("*", custom_keys={"batch_id": 17}), 1),
            "a broken number": (lambda: loader.query("*", custom_keys={"loss": 17 / 7}), 1),
            "a list and a mapping": (
                lambda: loader.query("*", custom_keys={"span": [17, 18], "settings": {"seed": 17}}),
                1,
            ),
            "true, for every second run": (
                lambda: loader.query("*", custom_keys={"is_even": True}),
                len(range(0, count, 2)),
            ),
            "by configuration and model": (
                lambda: loader.query(
                    "*", model_name="model-1", extraction_config=ExtractionConfig(extract_attn_pattern=True)
                ),
                len(range(1, count, 6)),
            ),
            "by tag, in one experiment": (lambda: loader.query(tag="batch_17"), 1),
        }
        rows = [(name, seconds(ask, expected, asked.rounds)) for name, (ask, expected) in asks.items()]
        changed = []
        for _ in range(asked.rounds):
            change(loader, base)
            changed += seconds(lambda: loader.query("*"), count, 1)
        rows.append(("all runs, after one was added, one edited, one removed", changed))
    table = "\n".join(
        f"| {name} | {1000 * statistics.median(spans):.0f} | {1000 * max(spans):.0f} |" for name, spans in rows
    )
    write_section(
        "Queries over saved runs",
        f"`python benchmarks/runs.py --runs {count}`\n\n"
        f"{environment('mlx', 'mlx-lm')}\n"
        f"{count:,} runs in {EXPERIMENTS} experiments, of one small array each; {load}. Times are the processor's,\n"
        f"those in the system included. Saving one takes {1000 * each:.1f} ms without waiting for the disk. The first\n"
        f"query of all, which reads every metadata.json, takes {first:.1f} s; the first one of another process, which\n"
        f"finds the index, {1000 * again:.0f} ms. Later ones:\n\n"
        f"| milliseconds | median of {asked.rounds} | slowest |\n| --- | --- | --- |\n{table}\n\n"
        "Every query lists the folders and asks when each metadata.json was written, so it sees what other processes\n"
        "did.",
    )
    print(PAGE)


if __name__ == "__main__":
    main()
