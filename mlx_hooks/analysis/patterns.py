"""What attention did with some tokens, layer by layer: patterns, the keys that each query could see, sinks, values.

All of it is what the kernel got and made; nothing is made anew.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..activations import to_numpy
from ..capture import CaptureRun
from ..errors import HookError
from ..hook_points import block_point
from ..model import HookedModel

_BYTES_AT_ONCE = 2**28


@dataclass(frozen=True, eq=False)
class LayerPattern:
    """One layer's attention, in its first pass where the layer runs several times.

    Args:
        layer: the block's index.
        pattern: [batch, head, query, key], float32; rows add up to 1 with the sink's share.
        visible: which keys some head's mask leaves to a query, [batch, query, key].
        sink: the share that a sink took, [batch, head, query]; None without sinks.
        values: as the kernel got them, [batch, key, kv_head, d_head]; None where they were not asked for, or are not
            shown.
    """

    layer: int
    pattern: np.ndarray
    visible: np.ndarray
    sink: np.ndarray | None
    values: mx.array | None = None


def has_pattern(model: HookedModel, layer: int) -> str:
    """Why a layer has no attention pattern; empty where it has one."""
    name = block_point("pattern", layer).name
    if name in model.hook_points:
        return ""
    try:
        model.architecture.check_supported(name)
    except HookError as error:
        return str(error).rstrip(".")
    return "it has no attention"


def layer_patterns(
    model: HookedModel, tokens: np.ndarray, layers: Sequence[int], *, values: bool = False
) -> Iterator[LayerPattern]:
    """The attention of layers that have a pattern, one after the other, for tokens [batch, pos].

    Scores and patterns take 8 bytes for each head, query and key: so many layers run at once as fit into 256 MB.

    Raises:
        HookError: where the model cannot read the tokens.
    """
    batch, length = tokens.shape
    at_once: list[int] = []
    n_bytes = 0
    for layer in layers:
        own = 8 * batch * length * length * max(1, model.architecture.n_query_heads(layer))
        if at_once and n_bytes + own > _BYTES_AT_ONCE:
            yield from _captured(model, tokens, at_once, values)
            at_once, n_bytes = [], 0
        at_once.append(layer)
        n_bytes += own
    if at_once:
        yield from _captured(model, tokens, at_once, values)


def _captured(model: HookedModel, tokens: np.ndarray, layers: Sequence[int], values: bool) -> Iterator[LayerPattern]:
    wanted = ["pattern", "attn_scores", "sink", *(["v"] if values else [])]
    points = {
        (layer, component): model.hook_points[name]
        for layer in layers
        for component in wanted
        if (name := block_point(component, layer).name) in model.hook_points
    }
    try:
        run = CaptureRun(model.instrument, mx.array(tokens), list(points.values()))
        cache = run.run(logits="none")[1]
    except ValueError as error:
        # Some models of mlx-lm cannot read several tokens at once.
        message = f"{model.cfg.model_type} cannot read tokens of shape {list(tokens.shape)}"
        raise HookError(f"{message}: {str(error).rstrip('.')}.") from error
    for layer in layers:
        found = {
            component: cache.records[points[layer, component].name][0].value
            for component in wanted
            if (layer, component) in points
        }
        pattern = to_numpy(found["pattern"])
        if "attn_scores" in found:
            visible = np.array(mx.any(found["attn_scores"] > -mx.inf, axis=1))
        else:
            visible = np.broadcast_to(np.tril(np.ones(pattern.shape[-2:], bool)), pattern[:, 0].shape)
        sink = to_numpy(found["sink"]) if "sink" in found else None
        yield LayerPattern(layer, pattern, visible, sink, found.get("v"))
