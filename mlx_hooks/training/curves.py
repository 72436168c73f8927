"""Numbers over training steps, as tables and as plain JSON values."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class Curves(TypedDict):
    """What ``run_over_steps`` answers.

    ``analyses[name][layer][metric][i]`` belongs to ``steps[i]``; it is None where nothing was measured. A layer of
    which no step could be analysed has ``{"error": sentence}``.
    """

    steps: list[int]
    analyses: dict[str, dict[str, dict[str, Any]]]
    training: list[dict[str, Any]]


class CurveTable:
    """Collects the numbers of analyses, layer by layer and step by step."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, dict[int, Mapping[str, Any]]]] = {}

    def add(self, name: str, layer: str, step: int, numbers: Mapping[str, Any]) -> None:
        """Add numbers by metric, or ``{"error": sentence}``."""
        self._found.setdefault(name, {}).setdefault(layer, {})[step] = numbers

    def curves(self, training: Sequence[Mapping[str, Any]]) -> Curves:
        """All of them, with the reports of the loss.

        Args:
            training: as the manifest of shards has them.
        """
        steps = sorted({step for layers in self._found.values() for found in layers.values() for step in found})
        return {
            "steps": steps,
            "analyses": {
                name: {layer: _over(steps, found) for layer, found in layers.items()}
                for name, layers in self._found.items()
            },
            "training": [dict(report) for report in training],
        }


def _over(steps: Sequence[int], found: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    numbers = {step: row for step, row in found.items() if "error" not in row}
    if not numbers:
        return {"error": next(iter(found.values()))["error"]}
    metrics = dict.fromkeys(key for row in numbers.values() for key in row)
    return {metric: [numbers.get(step, {}).get(metric) for step in steps] for metric in metrics}
