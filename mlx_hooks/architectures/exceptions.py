"""What names do not show, by the mlx-lm module that defines a class; each with its reason."""

# The stream is not the block's first argument.
STREAM_ARGUMENT = {"talkie": 1}
# Fused projections that group each key-value head with its query heads: [kv_head, queries + 2, d_head].
GROUPED_PROJECTIONS = ("gpt_neox", "phi3small", "internlm2")
# Fused gate and up projections: where the gate begins and the step between its columns, as parts of the width.
GATE_SECOND = ("olmo",)
INTERLEAVED_GATE = ("phi3small",)
# The first norm of all makes the stream anew, inside the first block.
NORM_OF_THE_STREAM = "pre_norm"
# Blocks whose stream is not the sum of what is added to it in sight, with the reason. What their sublayers give, after
# the norms that follow them, is shown as what they add.
OTHER_SUMS = {
    "gemma3n": "the block mixes several streams: LAuReL and AltUp weigh what attention and MLP add",
    "deepseek_v41": "the block mixes several streams: hyper-connections weigh what attention and MLP add",
    "kimi_k3": "attention and MLP read a learned mixture of the sums of earlier blocks",
    "muse_spark": "branches are normed and weighed as they are added, in a fused kernel",
    "iquestloopcoder": "",  # plain sums, made outside of any module
}
# Where a configuration makes their blocks add up in sight all the same.
PLAIN_SUMS = {"kimi_k3": lambda block: not block.use_attn_res}
# Models whose logits are made of more than the stream that leaves the last block.
MORE_THAN_THE_LAST_STREAM = {
    "deepseek_v41": "the last block also gives the weights that mix its streams",
    "kimi_k3": "the last norm reads a mixture of it and of the sums of earlier blocks",
}
# Models that run their layers several times and norm the stream in between, unless this attribute says not.
NORMED_BETWEEN_PASSES = {"nanbeige": "skip_loop_final_norm"}
# The submodule that reads the stream between attention and MLP, where no sum shows it.
READERS_OF_MID = {
    "gemma3n": "pre_feedforward_layernorm",
    "deepseek_v41": "ffn_hc",
    "iquestloopcoder": "post_attention_layernorm",
}
# Blocks of several streams: where the axis of the streams lies.
STREAM_AXES = {
    ("gemma3n", "resid_pre"): ("stream", "batch", "pos", "d_model"),
    ("gemma3n", "resid_post"): ("stream", "batch", "pos", "d_model"),
    ("deepseek_v41", "resid_pre"): ("batch", "pos", "stream", "d_model"),
    ("deepseek_v41", "resid_mid"): ("batch", "pos", "stream", "d_model"),
    ("deepseek_v41", "resid_post"): ("batch", "pos", "stream", "d_model"),
}
# Query head h reads key-value head h % n_key_value_heads.
TILED_VALUES = ("plamo",)
# Attention that gathers keys for each query, which becomes an entry of the batch.
GATHERED = ("deepseek_v41",)
# Functions that add to the stream in the place of an operator.
ADDING_FUNCTIONS = {"gemma3_text": "clip_residual"}
# The model calls the parts of a block itself, never the block.
BLOCKS_NOT_CALLED = ("iquestloopcoder",)
# Hook points that an architecture has but that cannot be shown, with the reason.
UNSUPPORTED = {
    "deepseek_v41": dict.fromkeys(
        ("rot_k", "v", "attn_scores", "pattern"),
        "each query attends to rows gathered for it, from a window and from groups of compressed positions",
    ),
    "dbrx": dict.fromkeys(
        ("expert_indices", "expert_out", "expert_weights"), "experts are called one by one for each token"
    ),
    "muse_spark": dict.fromkeys(
        ("attn_out", "resid_mid", "ln2_in", "ln2", "ln2_post", "mlp_out"), OTHER_SUMS["muse_spark"]
    )
    | {"expert_weights": "experts are weighed and summed in a fused kernel"},
}
# The same in all layers but the first.
UNSUPPORTED_LATER = {
    "muse_spark": dict.fromkeys(("ln1_in", "ln1"), "the layer before applies this norm, in a fused kernel"),
}
# Attention modules without projections of their own that read the keys and values of an earlier layer.
READS_OTHER_KEYS = ("gemma4_text", "afm7")
# Attention written out with a softmax, and when.
HAND_WRITTEN = {
    "gemma2": lambda attn: True,
    "olmo": lambda attn: True,
    "gear": lambda attn: attn.attn_logit_softcapping,
    "phi3small": lambda attn: attn.block_sparse,
}

# Routers that are a module around the projection and give its scores alone; the choice is made outside.
SCORES_ONLY = ("afmoe", "dbrx", "hunyuan")
# Layers of experts that multiply with the router's weight themselves.
ROUTING_INSIDE = ("muse_spark",)
# Experts whose input is weighted, not what they give.
WEIGHTED_INPUT = ("llama4",)
