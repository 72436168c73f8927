"""A llama of a given shape with random weights, the same each time: what benchmarks run on."""

import mlx.core as mx
from mlx_lm.models import llama


def random_llama(layers: int, width: int, heads: int = 8, vocabulary: int = 8192, wider: int = 4) -> llama.Model:
    """``layers`` blocks of ``heads`` heads on a stream of ``width``, with an MLP ``wider`` times as wide; float32."""
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=wider * width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rms_norm_eps=1e-5,
        vocab_size=vocabulary,
    )
    mx.random.seed(0)
    model = llama.Model(args)
    mx.eval(model.parameters())
    return model
