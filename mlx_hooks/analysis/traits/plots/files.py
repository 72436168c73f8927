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
    try:
        charts = _charts(content, SUBLAYERS.index(sublayer), per_layer)
    except HookError as error:
        raise HookError(f"{path} cannot be drawn: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, StopIteration) as error:
        raise HookError(f"{path} cannot be drawn: {type(error).__name__} {error}.") from error
    if charts is None:
        kinds = "no dynamics, no steering and no capture of all layers"
        raise HookError(f"{path} holds {kinds}: there is nothing to draw.")
    if not charts:
        raise HookError(f"{path} holds no results: there is nothing to draw.")
    return charts


def _charts(content: Mapping[str, Any], sublayer: int, per_layer: bool) -> list[Chart] | None:
    """The charts of a file's content; None for that of another kind."""
    form = content.get("format")
    if form == monitoring.FORMAT:
        return [ScoreChart.of(entry) for entry in content["results"]]
    if form == steering.FORMAT:
        return [SteeringChart.of(content, i) for i in range(len(content["runs"][0]["measured"]))]
    if "projections" in content and "internals" not in content:
        return [LayerChart.of(content, sublayer, per_layer=per_layer)]
    return None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HookError(f"There is no file {path}.") from error
    except OSError as error:
        raise HookError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise HookError(f"{path} is no JSON: {error}.") from error
    except RecursionError as error:
        raise HookError(f"{path} cannot be read: its JSON is nested too deeply.") from error
    if not isinstance(content, dict):
        raise HookError(f"{path} is no JSON object: there is nothing to draw.")
    return content
