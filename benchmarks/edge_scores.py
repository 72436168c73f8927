"""Scores of all edges of the bundled model beside one plain forward pass of the same batch, and the EAP-IG library.

The library's own points on the way are taken for the comparison, so that both make the same scores.
"""

import statistics
import time
from collections.abc import Callable

import eap_library
import mlx.core as mx
import numpy as np
from patching import prompts

from mlx_hooks import EdgeRuns, HookedModel, attribute_edges

STEPS = 5


def report(rounds: int = 5, n_prompts: int = 12) -> str:
    """A table for the page."""
    model = HookedModel.from_pretrained("neuroscope-tiny")
    runs = EdgeRuns(model, prompts(n_prompts))
    (batch,) = runs.batches
    assert batch.corrupted is not None
    assert batch.wrong is not None
    tokens = mx.array(batch.tokens)
    seconds: dict[str, list[float]] = {}
    # One after the other, so that what disturbs the machine disturbs all.
    for _ in range(rounds):
        for name, run in {
            "plain": lambda: mx.eval(model.model(tokens)),
            "eap": lambda: attribute_edges(runs, options={"method": "eap"}),
            "eap-ig": lambda: attribute_edges(runs, options={"method": "eap-ig", "steps": STEPS}),
            "exact": lambda: attribute_edges(runs, options={"method": "exact"}),
        }.items():
            seconds.setdefault(name, []).append(_seconds(run))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    lines = [
        f"| ours | {name}{f', m = {STEPS}' if name == 'eap-ig' else ''} | {median[name] * 1e3:.0f} | "
        f"{median[name] / median['plain']:.1f} | |"
        for name in ("eap", "eap-ig", "exact")
    ]
    peer = eap_library.measure(batch.tokens, batch.corrupted, batch.targets[:, -1], batch.wrong, STEPS)
    note = peer if isinstance(peer, str) else f"A plain forward pass of torch takes {peer.plain_seconds * 1e3:.1f} ms."
    if not isinstance(peer, str):
        for name, wanted in peer.scores.items():
            options = {"method": name} | ({"steps": STEPS, "rule": "left"} if name == "eap-ig" else {})
            off = _off(runs, attribute_edges(runs, options=options).to_dict()["edges"], wanted)
            lines.append(
                f"| {peer.name} | {name}{f', m = {STEPS}' if name == 'eap-ig' else ''} | "
                f"{peer.seconds[name] * 1e3:.0f} | {peer.seconds[name] / peer.plain_seconds:.1f} | {off:.0e} |"
            )
    return (
        f"All {len(runs.graph.edges)} edges of the bundled model (embedding, heads with q, k and v inputs, MLPs,\n"
        f"logits), scored on {n_prompts} pairs of prompts of {tokens.shape[1]} tokens. The ratio is to one plain\n"
        f"forward pass of that batch ({median['plain'] * 1e3:.1f} ms) in the same process and framework; medians\n"
        f"of {rounds} rounds. The EAP-IG library has the same weights, prompts and points; the last column is its\n"
        f"greatest difference from our scores.\n{note}\n\n"
        "| by | method | ms | plain forward passes | greatest difference |\n"
        "| --- | --- | --- | --- | --- |\n" + "\n".join(lines)
    )


def _off(runs: EdgeRuns, ours: dict[str, float], theirs: dict[str, float]) -> float:
    named = {runs.graph.edge(name).name: value for name, value in theirs.items()}
    assert set(named) == set(ours)
    return float(max(np.abs(ours[name] - value) for name, value in named.items()))


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
