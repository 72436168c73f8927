"""Analyses of attention heads on the worker: from a checked request to plain data; see ``circuits.py``."""

from typing import Any

from mlx_hooks import HookedModel
from mlx_hooks.analysis.attention_analysis import analyse_attention
from mlx_hooks.analysis.composition import composition_scores
from mlx_hooks.analysis.head_detection import detect_heads
from mlx_hooks.analysis.head_weights import chosen_layers

from .aside import Report
from .errors import ApiError
from .inference import check_tokens, prompt_tokens, room_for
from .schemas.heads import AttentionRequest, CompositionRequest, HeadsRequest


def attention(model: HookedModel, asked: AttentionRequest, report: Report) -> dict[str, Any]:
    """What each head attends to in a prompt, and what flows from token to token."""
    tokens = prompt_tokens(model, asked.source)
    room_for(model, tokens)
    return analyse_attention(model, tokens, _layers(model, asked), asked.options, report).to_dict()


def heads(model: HookedModel, asked: HeadsRequest, report: Report) -> dict[str, Any]:
    """How strongly each head follows each rule, over many sequences."""
    for i, row in enumerate(asked.prompts or []):
        if isinstance(row, list):
            check_tokens(model, row, f"prompts[{i}]")
    _layers(model, asked)
    return detect_heads(model, asked.prompts, asked.options, report).to_dict()


def composition(model: HookedModel, asked: CompositionRequest, report: Report) -> dict[str, Any]:
    """Which heads could read what earlier heads write."""
    return composition_scores(model, _layers(model, asked), report).to_dict(asked.top)


def _layers(model: HookedModel, asked: AttentionRequest | HeadsRequest | CompositionRequest) -> list[int]:
    """The layers that are asked for, each once: -1 and the last one are the same."""
    found = chosen_layers(model, asked.layers)
    if asked.layers is not None and len(found) < len(asked.layers):
        raise ApiError(
            400,
            f"Field 'layers' has each layer once, and negative numbers count from the last of {model.cfg.n_layers}.",
            code="invalid_value",
            param="layers",
        )
    return found
