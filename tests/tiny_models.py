"""Tiny random models of several architectures, made in place: seeded, a few thousand parameters each."""

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn

N_LAYERS = 3

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": N_LAYERS,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 60,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama_untied": _LLAMA | {"tie_word_embeddings": False, "num_key_value_heads": 4},
    "qwen2": _LLAMA | {"model_type": "qwen2", "rope_theta": 10000.0, "tie_word_embeddings": True},
    "qwen3": _LLAMA | {"model_type": "qwen3", "head_dim": 12, "rope_theta": 10000.0, "tie_word_embeddings": False},
    "gpt2": {
        "model_type": "gpt2",
        "n_ctx": 512,
        "n_positions": 512,
        "n_embd": 32,
        "n_head": 4,
        "n_layer": N_LAYERS,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 60,
    },
}


def make_model(name: str | dict[str, Any], seed: int = 0, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """A model of ``CONFIGS[name]``, or of a configuration, with random weights, norms and biases included."""
    config = CONFIGS[name] if isinstance(name, str) else name
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.apply(lambda p: (p + 0.3 * mx.random.normal(p.shape)).astype(dtype))
    mx.eval(model.parameters())
    return model
