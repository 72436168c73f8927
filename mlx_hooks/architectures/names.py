"""What mlx-lm's architectures call their parts. The first name that a module has counts."""

EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "embedding",
    "embeddings",
    "tok_embeddings",
    "token_embeddings",
    "ngram_embeddings",
    "embed_in",
    "embed",
    "embd.wte",
)
POSITION_EMBEDDINGS = ("wpe",)
FINAL_NORMS = (
    "ln_f",
    "final_layernorm",
    "final_layer_norm",
    "final_norm",
    "norm_f",
    "output_norm",
    "embedding_norm",
    "norm",
)
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap")

# Children of a block that move information between positions, and those that do not.
MIXING = (
    "self_attn",
    "attn.attention",
    "attn",
    "attention",
    "norm_attn_norm.attn",
    "mamba",
    "linear_attn",
    "conv",
    "local_mixer",
    "temporal_block",
    "mixer",
)
MLPS_OF_BLOCK = (
    "mlps",
    "mlp",
    "feed_forward",
    "ffn",
    "block_sparse_moe",
    "mlp_block",
    "moe",
    "mixer",
)

NORMS_BEFORE_MIXING = (
    "input_layernorm",
    "attention_layernorm",
    "attention_norm",
    "attn_norm",
    "att_norm",
    "operator_norm",
    "pre_mixer_norm",
    "temporal_pre_norm",
    "norm_attn_norm.norm_1",
    "ln_1",
    "ln",
    "norm",
)
NORMS_AFTER_MIXING = ("post_self_attn_layernorm", "post_mixer_norm")
NORMS_BEFORE_MLP = (
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "pre_ff_layernorm",
    "pre_mlp_norm",
    "feedforward_layernorm",
    "ffn_norm",
    "ff_norm",
    "channel_pre_norm",
    "norm_attn_norm.norm_2",
    "ln_2",
)
NORMS_AFTER_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_mlp_norm")
# Before the MLP in most architectures; after attention where another norm stands before the MLP or after it.
NORM_OF_TWO_MEANINGS = "post_attention_layernorm"

QUERIES = ("q_b_proj", "q_proj", "attn_query", "c_q")
KEYS = ("k_proj", "attn_key", "c_k")
VALUES = ("v_proj", "attn_value", "c_v")
FUSED = (
    "qkv_proj",
    "q_k_v_proj",
    "qkvg_proj",
    "query_key_value",
    "c_attn",
    "W_pack",
    "Wqkv",
    "wqkv",
    "att_proj",
)
OUTPUTS = ("o_proj", "out_proj", "dense", "wo", "attn_resid", "attn_out", "c_proj")
# Submodules that only state-space, convolution and linear-attention layers have.
MARKS_OF_A_MIXER = (
    "conv1d",
    "conv_1d",
    "conv",
    "q_conv",
    "q_conv1d",
    "qkv_conv",
    "key_conv",
    "token_shift",
    "g_norm",
    "linear",
)
N_HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head", "q_num_heads", "num_q_heads")
N_KEY_VALUE_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads", "k_num_heads", "n_kv_head")

# Set on attention modules that read the keys and values of an earlier layer.
SHARED_KEYS = "is_kv_shared_layer"

# Projections to the hidden layer of an MLP: role -> name. The first row whose names are all there counts.
MLPS = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate": "w1", "up": "w3", "down": "w2"},
    {"gate": "c_fc_0", "up": "c_fc_1", "down": "c_proj"},
    {"gate": "mlp_gate", "up": "mlp_linear", "down": "mlp_resid"},
    {"gate": "w2", "up": "w1", "down": "c_proj"},
    {"gate_up": "gate_up_proj", "down": "down_proj"},
    {"gate_up": "proj_1", "down": "proj_2"},
    {"gate_up": "ff_proj", "down": "ff_out"},
    {"up": "up_proj", "down": "down_proj"},
    {"up": "c_fc", "down": "c_proj"},
    {"up": "fc1", "down": "fc2"},
    {"up": "fc_in", "down": "fc_out"},
    {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
    {"up": "key", "down": "value"},
)
NORMS_INSIDE_MLP = ("ffn_sub_norm",)
EXPERTS = ("switch_mlp", "experts")
ROUTERS = ("gate", "router")

# The module inside a wrapper around the experts that gives each chosen expert's output.
EXPERTS_INSIDE = ("switch_glu", "switch_mlp", "experts")
# Inside a router: the projection to one score per expert.
ROUTER_PROJECTIONS = ("gate_proj", "gate", "wg", "layer", "proj", "classifier")

# What mlx-lm's ModelArgs call a number.
D_MODEL = ("hidden_size", "n_embd", "d_model", "hidden_dim", "dim", "model_dim")
D_VOCAB = ("vocab_size", "padded_vocab_size", "embedding_size", "num_vocab")
MAX_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")

# What blocks add to the stream besides their sublayers: a skip from the embedding, per-layer inputs, a shortcut.
SIDE_BRANCHES = ("embed_skip", "per_layer_input_gate", "mlps")
