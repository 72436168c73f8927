"""The indirect-object circuit of the bundled model: found by EAP-IG, held against ACDC, judged, predicted from, drawn.

    python examples/ioi_circuit.py --output ioi

"When Mary and John went to the store , John gave a drink to" is followed by Mary. In the corrupted prompt Mary gives,
so John is to follow. The metric is the logit of the answer less that of the giver. Guide: docs/circuits.md.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hooks import (
    Circuit,
    EdgeRuns,
    EdgeScores,
    HookedModel,
    HookError,
    acdc,
    attribute_edges,
    smallest_circuit,
    validate_circuit,
)
from mlx_hooks.analysis.circuits.drawing import save_picture
from mlx_hooks.analysis.circuits.graphml import save_graphml
from mlx_hooks.analysis.circuits.neuronpedia import save_neuronpedia, to_neuronpedia

TEMPLATES = (
    "When {a} and {b} went to the store , {giver} gave a drink to",
    "After {a} and {b} went to the park , {giver} gave the ball to",
    "While {a} and {b} were at the school , {giver} handed a book to",
    "Then {a} and {b} had a lot of fun at the garden . {giver} gave a flower to",
    "{a} and {b} were working at the office . {giver} decided to give the key to",
    "One day {a} and {b} met at the station and {giver} showed a map to",
)
FOUND_WITH = (("Mary", "John"), ("Tom", "Anna"), ("Emma", "Lucy"), ("Paul", "James"))
JUDGED_BY = (("Sarah", "Peter"), ("David", "Alice"), ("Laura", "Julia"), ("Robert", "Daniel"))
FAITHFULNESS = 0.9
THRESHOLD = 0.15
"""Of the logit difference: what an edge has to change for ACDC to keep it."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("ioi"), help="folder for the files")
    try:
        find(parser.parse_args(argv).output)
    except (HookError, OSError) as error:
        sys.stderr.write(f"example: {error}\n")
        return 1
    return 0


def prompts(names: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    """Each template with each pair of names; either of the two is the giver in turn."""
    made = []
    for i, (one, other) in enumerate(names):
        for j, template in enumerate(TEMPLATES):
            giver, answer = (one, other) if (i + j) % 2 else (other, one)
            clean, corrupted = (template.format(a=one, b=other, giver=name) for name in (giver, answer))
            made.append({"clean": clean, "corrupted": corrupted, "answer": answer, "wrong": giver})
    return made


def find(output: Path) -> None:
    """Find the circuit, judge it, predict from it, and write it to ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    model = HookedModel.from_pretrained("neuroscope-tiny")
    runs = EdgeRuns(model, prompts(FOUND_WITH))
    print(f"Logit difference      {runs.plain.mean():.2f}, answer less giver")
    print(f"  all edges ablated   {runs.ablated.mean():.2f}, as with the other giver\n")

    scores = attribute_edges(runs)
    print(f"EAP-IG scores {len(scores.edges)} edges in {scores.seconds:.1f} seconds; the strongest:")
    for name, score in scores.ranked[:5]:
        print(f"  {name:20} {score:7.2f}")
    integral, whole = scores.settings["integral"], scores.settings["whole_change"]
    print(f"  of the embedding     {integral:7.2f}, which is to be the whole change, {whole:.2f}")
    found = smallest_circuit(runs, scores, FAITHFULNESS)
    circuit = found.circuit
    print(f"\nThe circuit           {len(circuit)} of {found.edges_of_model} edges ({found.share:.1%})")
    judged = validate_circuit(EdgeRuns(model, prompts(JUDGED_BY)), circuit)
    print(f"  faithfulness        {found.faithfulness:.3f}; on other names {told(judged.faithfulness)}")
    print(f"  completeness        {told(judged.completeness)}")
    print(f"  random circuits     {judged.random_mean:.3f}")

    compare(runs, scores, circuit)
    predict(model, runs, scores)
    write(model, circuit, output)


def told(estimate: Any) -> str:
    return f"{estimate.mean:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def compare(runs: EdgeRuns, scores: EdgeScores, circuit: Circuit) -> None:
    """ACDC keeps the edges that cannot go one after the other: an exact search, without gradients."""
    started = time.perf_counter()
    few = prompts(FOUND_WITH[:1])
    exact = acdc(EdgeRuns(runs.model, few), threshold=THRESHOLD, scores=scores)
    kept = set(exact.circuit().edges)
    both = kept & set(circuit.edges)
    chance = len(kept) * len(circuit) / len(scores.edges)
    seconds = time.perf_counter() - started
    print(f"\nACDC, threshold {THRESHOLD}  {len(kept)} edges in {seconds:.0f} seconds, on {len(few)} of the prompts")
    shares = f"{len(both) / len(kept):.0%} of ACDC's and {len(both) / len(circuit):.0%} of the circuit's"
    print(f"  in both circuits    {len(both)}, {shares} (by chance {chance:.0f})")


def predict(model: HookedModel, runs: EdgeRuns, scores: EdgeScores) -> None:
    """The head with the strongest edge to the logits: where it looks, what it reads, and what ablating it costs."""
    mover = next(name for name, _ in scores.ranked if name.endswith("->logits") and "H" in name).removesuffix(
        "->logits"
    )
    reads = next(name for name, _ in scores.ranked if f"->{mover}<" in name)
    out = [name for name in scores.edges if name.startswith(f"{mover}->")]
    predicted = sum(scores[name] for name in out)
    measured = (runs.without([out])[0] - runs.plain).mean()
    print(f"\nThe name mover        {mover}, whose edge to the logits is the strongest")
    print(f"  last word looks at  the giver's second mention, {looks_at_the_giver(model, mover):.0%} of its attention")
    print(f"  reads there         the answer, mostly by {reads}")
    print(f"  ablated, predicted  {predicted:.2f}, the sum of the scores of its {len(out)} edges")
    print(f"  ablated, measured   {measured:.2f}")


def looks_at_the_giver(model: HookedModel, name: str) -> float:
    """The share of a head's attention from the last word to the giver where it is named again, mean over prompts."""
    layer, head = map(int, name.removeprefix("L").split("H"))
    shares = []
    for given in prompts(FOUND_WITH):
        _, cache = model.run_with_cache(given["clean"], f"blocks.{layer}.attn.hook_pattern")
        tokens = model.to_str_tokens(given["clean"])
        again = max(i for i, token in enumerate(tokens) if token == given["wrong"])
        shares.append(cache["pattern", layer][0, head, -1, again].item())
    return float(np.mean(shares))


def write(model: HookedModel, circuit: Circuit, output: Path) -> None:
    """As JSON, as a picture, and for other tools."""
    circuit.save(output / "circuit.json")
    for name in ("circuit.png", "circuit.dot"):
        save_picture(circuit, output / name, f"Indirect objects in neuroscope-tiny: {len(circuit)} edges")
    save_graphml(circuit, output / "circuit.graphml")
    graph = to_neuronpedia(circuit, model, prompts(FOUND_WITH)[0], slug="neuroscope-tiny-ioi")
    save_neuronpedia(graph, output / "neuronpedia.json")
    print(f"\nWritten: {', '.join(sorted(str(path) for path in output.glob('*.*')))}")


if __name__ == "__main__":
    sys.exit(main())
