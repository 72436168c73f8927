"""Observers of generation: what a model computes while it generates, event by event."""

from .base import Head, InferenceHook, LayerAttention, Wanted
from .extraction import AttentionExtractionHook, create_attention_extraction_hook
from .ffn import ActivationHook
from .streams import SymbolicStreamHook
from .watching import SeenPass, Watch, Watched

__all__ = [
    "ActivationHook",
    "AttentionExtractionHook",
    "Head",
    "InferenceHook",
    "LayerAttention",
    "SeenPass",
    "SymbolicStreamHook",
    "Wanted",
    "Watch",
    "Watched",
    "create_attention_extraction_hook",
]
