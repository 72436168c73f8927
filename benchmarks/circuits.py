"""What the tools of circuits take, as ratios to what they are measured by.

    python benchmarks/circuits.py --patching    # exact patching of all heads x positions, beside a run for each cell
    python benchmarks/circuits.py --edges       # scores of all edges, beside a forward pass and the EAP-IG library

Without either both are measured. The figures are written to docs/benchmarks.md.
"""

import argparse

import edge_scores
import patching
from page import PAGE, busy, environment, write_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patching", action="store_true", help="patching of all heads x positions")
    parser.add_argument("--edges", action="store_true", help="scores of all edges")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    both = asked.patching == asked.edges
    for flag, heading, report in (
        ("patching", "Patching, many cells at once", patching.report),
        ("edges", "Scores of all edges", edge_scores.report),
    ):
        if not (both or getattr(asked, flag)):
            continue
        load = busy()
        write_section(
            heading,
            f"`python benchmarks/circuits.py --{flag} --rounds {asked.rounds}`\n\n"
            f"{environment('mlx', 'mlx-lm', *(['torch', 'transformer-lens'] if flag == 'edges' else []))}\n"
            f"{load.capitalize()}.\n{report(asked.rounds)}",
        )
        print(f"{heading}: written to {PAGE}")


if __name__ == "__main__":
    main()
