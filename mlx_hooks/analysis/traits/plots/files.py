"""Charts of what lies in files: dynamics, steering, captures of all layers. A file's content says what it is."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....errors import HookError
from .. import monitoring, steering
from ..capture import SUBLAYERS
from ..records import read_record
from . import Chart
from .layers import LayerChart
from .scores import ScoreChart
from .steered import SteeringChart


def charts_of(path: str | Path, *, sublayer: str = "residual_out", per_layer: bool = False) -> list[Chart]:
    """The charts of a file that a command of traits wrote.

    Args:
        path: dynamics (JSON): a chart for each prompt; steering (JSON): one for each trait that was measured; a capture
            of all layers (safetensors, or the JSON beside it): one.
        sublayer: of a capture, "residual_in", "after_attn" or "residual_out".
        per_layer: see :class:`LayerChart`.

    Raises:
        HookError: for a file that cannot be read, or holds nothing that can be drawn.
    """
    path = Path(path)
    if sublayer not in SUBLAYERS:
        raise HookError(f"sublayer is one of {', '.join(SUBLAYERS)}, got {sublayer!r}.", field="sublayer")
    content = _read_json(path) if path.suffix == ".json" else read_record(path)
    form = content.get("format")
    try:
        if form == monitoring.FORMAT:
            return [ScoreChart.of(entry) for entry in content["results"]]
        if form == steering.FORMAT:
            return [SteeringChart.of(content, i) for i in range(len(content["runs"][0]["measured"]))]
        if "projections" in content and "internals" not in content:
            return [LayerChart.of(content, SUBLAYERS.index(sublayer), per_layer=per_layer)]
    except (KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
        raise HookError(f"{path} cannot be drawn: {type(error).__name__} {error}.") from error
    raise HookError(f"{path} holds no dynamics, no steering and no capture of all layers: there is nothing to draw.")


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HookError(f"There is no file {path}.") from error
    except OSError as error:
        raise HookError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise HookError(f"{path} is no JSON: {error}.") from error
    if not isinstance(content, dict):
        raise HookError(f"{path} is no JSON object: there is nothing to draw.")
    return content
