"""The smallest useful configuration of every mlx-lm architecture: each kind of layer and branch a checkpoint has, once.

Sizes tell the axes apart: the stream is 64 wide where the width of a head can be chosen (32), else 128; 4 query and 2
key-value heads, 4 experts of width 32 of which 2 are chosen, a vocabulary of 96. Windows of 8 are left by a sequence of
20 tokens. Input widths are multiples of 32, so that 4-bit quantisation in groups of 32 takes every layer. Multipliers,
soft caps and limits are untypical (0.7, 1.3), so that leaving one out shows. An entry that departs from this says why.

A configuration is what `ModelArgs.from_dict` of the module `mlx_lm.models.<name>` gets. Some architectures write into
what they are given, and entries share parts: pass a deep copy.
"""

from typing import Any

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

# Two layers of the common design; `_LLAMA_HEADS` where a head's width can be chosen, `_LLAMA_WIDE` where it is
# hidden_size / num_attention_heads.
_LLAMA: dict[str, Any] = _SIZES | {"num_hidden_layers": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}

_LLAMA_HEADS: dict[str, Any] = _LLAMA | {"head_dim": 32}

_LLAMA_WIDE: dict[str, Any] = _LLAMA | {"hidden_size": 128}

# The same with the epsilon of Qwen's norms.
_QWEN: dict[str, Any] = _LLAMA_HEADS | {"rms_norm_eps": 1e-6}

_QWEN_WIDE: dict[str, Any] = _LLAMA_WIDE | {"rms_norm_eps": 1e-6}

_LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

_YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.3,
    "mscale_all_dim": 0.7,
}

# Latent attention: no two widths are equal.
_LATENT: dict[str, Any] = {
    "kv_lora_rank": 128,
    "q_lora_rank": 160,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 96,
}

# The same with smaller heads on a wider latent.
_NARROW_LATENT: dict[str, Any] = {
    "q_lora_rank": 128,
    "kv_lora_rank": 160,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 48,
}

_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}

# One dense layer, then experts with a shared one.
_ROUTED_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.3,
    "first_k_dense_replace": 1,
}

_SIGMOID_ROUTER: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
}

# Two groups of two experts, of which one group is kept.
_GROUPED_EXPERTS: dict[str, Any] = _ROUTED_EXPERTS | {
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_layer_freq": 1,
}

_BAILING_EXPERTS: dict[str, Any] = _EXPERTS | {
    "num_shared_experts": 1,
    "moe_shared_expert_intermediate_size": 64,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.3,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}

# A DeepSeek V3 without groups of experts: the text model of Kimi K2.5 and Kimi-VL, and near to the later GLM models.
_DEEPSEEK_V3: dict[str, Any] = (
    _LLAMA
    | _LATENT
    | _ROUTED_EXPERTS
    | _SIGMOID_ROUTER
    | {"num_key_value_heads": 4, "moe_layer_freq": 1, "attention_bias": False}
)

_GEMMA4_TEXT: dict[str, Any] = _LLAMA_HEADS | {
    "model_type": "gemma4_text",
    "global_head_dim": 64,
    "sliding_window": 8,
    "final_logit_softcapping": 3.0,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "tie_word_embeddings": True,
}

_GEMMA3_TEXT: dict[str, Any] = _LLAMA_HEADS | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 48,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
}

_GRANITE: dict[str, Any] = _LLAMA_WIDE | {
    "attention_bias": False,
    "attention_multiplier": 0.13,
    "embedding_multiplier": 1.3,
    "residual_multiplier": 0.7,
    "logits_scaling": 1.7,
    "tie_word_embeddings": True,
}

_LFM2: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "conv_bias": False,
    "conv_L_cache": 3,
    "layer_types": ["conv", "full_attention", "conv"],
}

# 144 * 2 / 3 * 0.7 = 67, rounded up to a multiple of 32: an inner width of 96.
_LFM2_DENSE: dict[str, Any] = _LFM2 | {
    "model_type": "lfm2",
    "block_dim": 128,
    "block_ff_dim": 144,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 0.7,
    "block_auto_adjust_ff_dim": True,
}

_LONGCAT: dict[str, Any] = _LATENT | {
    "vocab_size": 96,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 4,
    # False fails in mlx-lm: the attribute is then never set, yet read.
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "attention_bias": False,
    # Half as many zero (identity) experts as real ones, so that both are chosen.
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "zero_expert_type": "identity",
    "moe_topk": 2,
    "norm_topk_prob": False,
    "router_bias": False,
    "routed_scaling_factor": 1.3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}

# The scale of the queries steps up at every 8 positions.
_MINISTRAL3: dict[str, Any] = _LLAMA_HEADS | {
    "model_type": "ministral3",
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "llama_4_scaling_beta": 0.3,
    },
}

_QWEN3_MOE: dict[str, Any] = (
    _QWEN
    | _EXPERTS
    | {
        "num_hidden_layers": 3,
        "decoder_sparse_step": 1,
        # Released models have none; a dense layer between two sparse ones covers the branch.
        "mlp_only_layers": [1],
        "tie_word_embeddings": False,
    }
)

# Key heads are half the value heads, and the two head widths differ: 2 of 32 and 4 of 64.
_DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    # Released models: 4. Here linear, full, linear, full.
    "full_attention_interval": 2,
}

# The rope parameters say "type": mlx-lm would rename "rope_type" to it inside this very dict.
_QWEN3_5_TEXT: dict[str, Any] = (
    _SIZES
    | _DELTA
    | {
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "num_hidden_layers": 4,
        "rope_parameters": {
            "type": "default",
            "mrope_section": [2, 1, 1],
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
        },
        "tie_word_embeddings": False,
    }
)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "Klear": _LLAMA_WIDE
    | _EXPERTS
    | {
        "model_type": "Klear",
        "attention_bias": False,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
        "n_shared_experts": 1,
    },
    # Two layers with keys and values of their own, then two that read those of the second.
    "afm7": {
        "model_type": "afm7",
        "vocab_size": 96,
        "hidden_dim": 128,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim_scale_factor": 0.75,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
    },
    "afmoe": _LLAMA_HEADS
    | {
        "model_type": "afmoe",
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": 8,
        "num_dense_layers": 1,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "route_norm": True,
        "route_scale": 1.3,
        "score_func": "sigmoid",
        "n_group": 1,
        "topk_group": 1,
        "mup_enabled": True,
        "tie_word_embeddings": False,
    },
    "apertus": _LLAMA_WIDE
    | {
        "model_type": "apertus",
        "mlp_bias": False,
        "attention_bias": False,
        "post_norm": False,
        "qk_norm": True,
        "tie_word_embeddings": False,
        "rope_scaling": _LLAMA3_ROPE,
    },
    # The sliding layers have head counts, and so a head width (16), of their own.
    "baichuan_m1": _LLAMA_WIDE
    | {
        "model_type": "baichuan_m1",
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "sliding_window_layers": [1, 2],
        "conv_window": 2,
        "num_swa_attention_heads": 8,
        "num_swa_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    # Linear attention (dense), linear attention (experts), latent attention closing the group, and one left over.
    "bailing_hybrid": _LLAMA_HEADS
    | _NARROW_LATENT
    | _BAILING_EXPERTS
    | {
        "model_type": "bailing_hybrid",
        "num_key_value_heads": 4,
        "num_hidden_layers": 4,
        "layer_group_size": 3,
        "group_norm_size": 2,
        "rope_interleave": True,
        "partial_rotary_factor": 0.5,
        "rope_scaling": _YARN,
        "use_qkv_bias": False,
        "use_bias": False,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
    },
    "bailing_moe": _LLAMA_WIDE
    | _BAILING_EXPERTS
    | {
        "model_type": "bailing_moe",
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
    },
    # The same order of layers as bailing_hybrid, but plain attention where that has latent attention.
    "bailing_moe_linear": _LLAMA_WIDE
    | _BAILING_EXPERTS
    | {
        "model_type": "bailing_moe_linear",
        "num_hidden_layers": 4,
        "layer_group_size": 3,
        "group_norm_size": 2,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
    },
    # Checkpoints say "bailing_hybrid" and the architecture BailingMoeV3ForCausalLM, which mlx-lm maps to this module.
    "bailing_moe_v3": _LLAMA_HEADS
    | _NARROW_LATENT
    | _BAILING_EXPERTS
    | {
        "model_type": "bailing_hybrid",
        "num_key_value_heads": 4,
        "architectures": ["BailingMoeV3ForCausalLM"],
        "num_hidden_layers": 4,
        "layer_group_size": 3,
        "short_conv_kernel_size": 4,
        "kda_lower_bound": -5.0,
        "kda_safe_gate": True,
        "no_kda_lora": True,
        "rope_interleave": True,
        "tie_word_embeddings": False,
    },
    # The attention's inner norm spans hidden_size, so num_attention_heads * head_dim has to equal it. Runs on Metal
    # only; packed weights are integers, zero until filled.
    "bitnet": _LLAMA_WIDE
    | {"model_type": "bitnet", "head_dim": 32, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True},
    "cohere": {
        "model_type": "cohere",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "vocab_size": 96,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.7,
        "attention_bias": False,
        "layer_norm_bias": False,
        "use_qk_norm": True,
    },
    "cohere2": {
        "model_type": "cohere2",
        "hidden_size": 128,
        "head_dim": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "vocab_size": 96,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.7,
        "attention_bias": False,
        "layer_norm_bias": False,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    # clip_qkv is small enough to clip.
    "dbrx": {
        "model_type": "dbrx",
        "vocab_size": 96,
        "d_model": 128,
        "n_layers": 2,
        "n_heads": 4,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.3, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek": _LLAMA_WIDE
    | {
        "model_type": "deepseek",
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 1,
        "attention_bias": False,
    },
    "deepseek_v2": _LLAMA
    | _NARROW_LATENT
    | _GROUPED_EXPERTS
    | {
        "model_type": "deepseek_v2",
        "num_key_value_heads": 4,
        "topk_method": "group_limited_greedy",
        "rope_scaling": _YARN,
        "attention_bias": False,
    },
    "deepseek_v3": _LLAMA
    | _NARROW_LATENT
    | _SIGMOID_ROUTER
    | _GROUPED_EXPERTS
    | {"model_type": "deepseek_v3", "num_key_value_heads": 4, "rope_scaling": _YARN, "attention_bias": False},
    # Eight index heads: with few, a key that no head likes scores exactly 0, and ties are broken by chance.
    "deepseek_v32": _LLAMA
    | _NARROW_LATENT
    | _SIGMOID_ROUTER
    | _GROUPED_EXPERTS
    | {
        "model_type": "deepseek_v32",
        "num_key_value_heads": 4,
        "index_head_dim": 32,
        "index_n_heads": 8,
        "index_topk": 8,
        "rope_scaling": _YARN,
        "attention_bias": False,
    },
    # Layer 0 has the window only, layer 1 pools pairs of tokens, layer 2 (ratio 1, also the source of the candidate
    # blocks) has keys of its own, layer 3 an indexer on those of layer 2, layer 4 takes both from the layers before.
    # The reduced swiglu_limit clamps.
    "deepseek_v41": {
        "model_type": "deepseek_v41",
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "head_dim": 32,
        "q_lora_rank": 128,
        "qk_rope_head_dim": 16,
        "o_groups": 2,
        "o_lora_rank": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "scoring_func": "sqrtsoftplus",
        "gate_temp": 1.3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.3,
        "swiglu_limit": 0.7,
        "rms_norm_eps": 1e-20,
        "sliding_window": 8,
        "compress_ratios": [0, 2, 1, 1, 1],
        "kv_source_layer_ids": [1, 2],
        "index_source_layer_ids": [1, 2, 3],
        "compress_rope_theta": 160000.0,
        "candidate_source_layer_id": 2,
        "candidate_topk_blocks": 3,
        "candidate_block_size": 2,
        "index_n_heads": 8,
        "index_head_dim": 32,
        "index_topk": 4,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
        "max_position_embeddings": 512,
        "hc_mult": 3,
        "hc_sinkhorn_iters": 4,
        "hc_eps": 1e-6,
    },
    "dots1": _LLAMA_HEADS
    | _ROUTED_EXPERTS
    | {
        "model_type": "dots1",
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "scoring_func": "noaux_tc",
        "n_group": 1,
        "topk_group": 1,
        "tie_word_embeddings": False,
    },
    "ernie4_5": _LLAMA_HEADS | {"model_type": "ernie4_5", "use_bias": False, "tie_word_embeddings": True},
    "ernie4_5_moe": _LLAMA_HEADS
    | {
        "model_type": "ernie4_5_moe",
        "use_bias": False,
        "tie_word_embeddings": True,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "moe_layer_interval": 1,
        "moe_gate_act": "softmax",
    },
    # The attention's output is reshaped to hidden_size, so num_attention_heads * head_dim has to equal it.
    "exaone": _SIZES
    | {
        "model_type": "exaone",
        "hidden_size": 128,
        "num_layers": 2,
        "head_dim": 32,
        "rope_theta": 10000.0,
        "layer_norm_epsilon": 1e-5,
        "rope_scaling": _LLAMA3_ROPE,
        "tie_word_embeddings": True,
    },
    "exaone4": _LLAMA_HEADS
    | {
        "model_type": "exaone4",
        "num_hidden_layers": 3,
        "tie_word_embeddings": False,
        "rope_scaling": _LLAMA3_ROPE,
        "sliding_window": 8,
        "sliding_window_pattern": "LLG",
    },
    "exaone_moe": _LLAMA_HEADS
    | _EXPERTS
    | {
        "model_type": "exaone_moe",
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "is_moe_layer": [False, True, True],
        "sliding_window": 8,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
    # Only embedding_multiplier and lm_head_multiplier act in the forward pass; loading folds the others into weights.
    "falcon_h1": _LLAMA_HEADS
    | {
        "model_type": "falcon_h1",
        "attention_bias": False,
        "attention_in_multiplier": 1.3,
        "attention_out_multiplier": 0.7,
        "embedding_multiplier": 1.7,
        "key_multiplier": 0.4,
        "lm_head_multiplier": 0.6,
        "mamba_chunk_size": 8,
        "mamba_conv_bias": True,
        "mamba_d_conv": 4,
        "mamba_d_head": 16,
        "mamba_d_ssm": 96,
        "mamba_d_state": 24,
        "mamba_n_groups": 2,
        "mamba_n_heads": 6,
        "mamba_norm_before_gate": False,
        "mamba_proj_bias": False,
        "mamba_rms_norm": True,
        "mlp_bias": False,
        "mlp_multipliers": [0.9, 0.6],
        "projectors_bias": False,
        "ssm_in_multiplier": 1.25,
        "ssm_multipliers": [0.35, 0.25, 0.45, 0.5, 0.55],
        "ssm_out_multiplier": 0.3,
        "tie_word_embeddings": True,
    },
    # With the cap on attention logits the attention is written out by hand; without it (a variant below) mlx-lm's
    # usual function serves.
    "gear": _LLAMA_HEADS
    | {
        "model_type": "gear",
        "rope_theta": 1000000.0,
        "num_hidden_layers": 3,
        "layer_types": ["conv_mixer", "sliding_attention", "full_attention"],
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": 24.0,
        "sliding_window": 8,
        "conv_L_cache": 3,
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
        "final_logit_softcapping": 7.0,
        "attn_logit_softcapping": 1.3,
    },
    "gemma": _LLAMA_HEADS | {"model_type": "gemma"},
    "gemma2": _LLAMA_HEADS
    | {
        "model_type": "gemma2",
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 48,
    },
    # vocab_size stands twice: mlx-lm writes the outer one into text_config, in place.
    "gemma3": {
        "model_type": "gemma3",
        "vocab_size": 96,
        "text_config": _GEMMA3_TEXT | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    },
    "gemma3_text": _GEMMA3_TEXT,
    # Two layers with keys and values of their own, then two that read theirs, by layer type.
    "gemma3n": {
        "model_type": "gemma3n",
        "text_config": _LLAMA_HEADS
        | {
            "model_type": "gemma3n_text",
            "intermediate_size": [96, 128, 96, 160],
            "num_hidden_layers": 4,
            "rope_theta": 1000000.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            # Below vocab_size, as in the checkpoints: the tokens above it share the per-layer embedding of token 0.
            "vocab_size_per_layer_input": 80,
            "hidden_size_per_layer_input": 32,
            "sliding_window": 8,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 3.0,
            "activation_sparsity_pattern": [0.7, 0.0, 0.7, 0.0],
            "altup_num_inputs": 3,
            # Low enough to clip some of the coefficients (120 in the checkpoints).
            "altup_coef_clip": 0.5,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 32,
        },
    },
    # As the 26B checkpoint: experts beside the dense path, values made of keys in the full attention layers.
    "gemma4": {
        "model_type": "gemma4",
        "vocab_size": 96,
        "text_config": _GEMMA4_TEXT
        | {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "use_double_wide_mlp": False,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    },
    # As the 2B and 4B checkpoints: per-layer inputs, two layers that read the keys and values of the two before.
    "gemma4_text": _GEMMA4_TEXT
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 32,
        "use_double_wide_mlp": True,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
    },
    "glm": _LLAMA_HEADS | {"model_type": "glm", "attention_bias": True, "tie_word_embeddings": True},
    "glm4": _LLAMA_HEADS | {"model_type": "glm4", "attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4_moe": _LLAMA_HEADS
    | _ROUTED_EXPERTS
    | _SIGMOID_ROUTER
    | {
        "model_type": "glm4_moe",
        "rope_scaling": None,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "glm4_moe_lite": _DEEPSEEK_V3
    | {"model_type": "glm4_moe_lite", "q_lora_rank": 128, "kv_lora_rank": 160, "rope_scaling": None},
    "glm_moe_dsa": _DEEPSEEK_V3
    | {
        "model_type": "glm_moe_dsa",
        "q_lora_rank": 128,
        "kv_lora_rank": 160,
        # Below a sequence of 20 tokens, so that the indexer selects.
        "index_topk": 8,
        "index_n_heads": 8,
        "index_head_dim": 48,
        "indexer_rope_interleave": True,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 96,
        "n_ctx": 512,
        "n_embd": 128,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
    },
    # One key and value head, as in the checkpoints.
    "gpt_bigcode": {
        "model_type": "gpt_bigcode",
        "vocab_size": 96,
        "n_embd": 128,
        "n_head": 4,
        "n_layer": 2,
        "n_inner": 96,
        "n_positions": 512,
        "layer_norm_epsilon": 1e-5,
        "multi_query": True,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "vocab_size": 96,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-5,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
    # intermediate_size is the width of an expert: there is no dense layer.
    "gpt_oss": _LLAMA_HEADS
    | {
        "model_type": "gpt_oss",
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "rope_theta": 150000,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
    },
    "gptj": {
        "model_type": "gptj",
        "vocab_size": 96,
        "n_embd": 128,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 512,
        "rotary_dim": 16,
        "layer_norm_epsilon": 1e-5,
    },
    # o_proj and down_proj are quantised in groups of 64 by mlx-lm's own rule: their input widths are multiples of 64.
    "granite": _GRANITE | {"model_type": "granite", "intermediate_size": 192, "mlp_bias": False},
    # intermediate_size is the width of an expert, and 64 because mlx-lm quantises its down_proj in groups of 64.
    "granitemoe": _GRANITE
    | {"model_type": "granitemoe", "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    # No rotation of queries and keys, as in the checkpoints; intermediate_size is the width of an expert.
    "granitemoehybrid": _GRANITE
    | {
        "model_type": "granitemoehybrid",
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 96,
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 64,
        "mamba_d_conv": 4,
        "mamba_n_groups": 2,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "position_embedding_type": "nope",
    },
    # head_dim is required but not read: the head width is hidden_size / num_attention_heads.
    "helium": _LLAMA_WIDE
    | {
        "model_type": "helium",
        "head_dim": 32,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    # The middle layer takes the keys and values of the first, the last has its own again. Always tied.
    "hunyuan": _LLAMA_WIDE
    | {
        "model_type": "hunyuan",
        "num_hidden_layers": 3,
        "attention_bias": False,
        "num_experts": 4,
        "moe_topk": [2, 2, 2],
        "num_shared_expert": [1, 1, 1],
        "moe_intermediate_size": [32, 32, 32],
        "use_mixed_mlp_moe": True,
        "use_qk_norm": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
        "tie_word_embeddings": True,
    },
    "hunyuan_v1_dense": _LLAMA_HEADS
    | {
        "model_type": "hunyuan_v1_dense",
        "attention_bias": False,
        "use_qk_norm": True,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
        "tie_word_embeddings": False,
    },
    # The dynamic scaling acts only beyond max_position_embeddings.
    "internlm2": _LLAMA_WIDE
    | {
        "model_type": "internlm2",
        "bias": True,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "tie_word_embeddings": False,
    },
    "internlm3": _LLAMA_WIDE
    | {
        "model_type": "internlm3",
        "bias": False,
        "qkv_bias": False,
        "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
        "tie_word_embeddings": False,
    },
    "iquestloopcoder": _LLAMA_HEADS
    | {
        "model_type": "iquestloopcoder",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "loop_num": 2,
        "loop_window_size": 8,
    },
    # The four layers pair both mixers with both feed-forwards: expert layers are those of odd index.
    "jamba": _LLAMA_WIDE
    | {
        "model_type": "jamba",
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "attention", "mamba"],
        "attn_layer_offset": 1,
        "attn_layer_period": 3,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mamba_d_conv": 4,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        # "auto" would give 8, too narrow to quantise.
        "mamba_dt_rank": 32,
    },
    "kimi_k25": {
        "model_type": "kimi_k25",
        "text_config": _DEEPSEEK_V3
        | {
            "model_type": "kimi_k2",
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
            },
        },
    },
    # Residual blocks of two layers, started by a delta layer once with a dense and once with an expert feed-forward.
    # Layer 0's self_attention_res_proj and _norm are never read: there is no earlier block to mix in yet.
    "kimi_k3": {
        "model_type": "kimi_k3",
        "text_config": _LLAMA
        | _LATENT
        | {
            "model_type": "kimi_linear",
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "linear_attn_config": {
                "kda_layers": [1, 2, 3],
                "full_attn_layers": [4],
                "num_heads": 4,
                "head_dim": 32,
                "short_conv_kernel_size": 4,
                "gate_lower_bound": -5.0,
                "use_full_rank_gate": True,
            },
            "hidden_act": "situ",
            "activation_situ_beta": 1.3,
            "activation_situ_linear_beta": 0.7,
            "attn_res_block_size": 2,
            "mla_use_nope": True,
            "mla_use_output_gate": True,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 32,
            "moe_renormalize": True,
            "moe_router_activation_func": "sigmoid",
            "routed_scaling_factor": 1.3,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "num_expert_group": 1,
            "topk_group": 1,
            "routed_expert_hidden_size": 32,
            "latent_moe_use_norm": True,
        },
    },
    "kimi_linear": _LLAMA_HEADS
    | _LATENT
    | {
        "model_type": "kimi_linear",
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "model_max_length": 512,
        "linear_attn_config": {
            "kda_layers": [1, 2],
            "full_attn_layers": [3],
            "num_heads": 4,
            "head_dim": 32,
            "short_conv_kernel_size": 4,
        },
        "mla_use_nope": True,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 32,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "routed_scaling_factor": 1.3,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_expert_group": 1,
        "topk_group": 1,
    },
    # Kimi-VL projects its queries directly: no low rank there.
    "kimi_vl": {
        "model_type": "kimi_vl",
        "text_config": _DEEPSEEK_V3 | {"model_type": "deepseek_v3", "q_lora_rank": None},
    },
    "laguna": _LLAMA_HEADS
    | {
        "model_type": "laguna",
        "num_hidden_layers": 3,
        "attention_bias": False,
        "qkv_bias": False,
        "gating": True,
        "tie_word_embeddings": False,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_attention_heads_per_layer": [4, 6, 4],
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 50000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "partial_rotary_factor": 0.5,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "moe_routed_scaling_factor": 1.3,
        "moe_router_logit_softcapping": 0.7,
        "moe_router_score_func": "sigmoid",
    },
    "lfm2": _LFM2_DENSE,
    "lfm2-vl": {"model_type": "lfm2-vl", "text_config": _LFM2_DENSE},
    "lfm2_moe": _EXPERTS
    | _LFM2
    | {
        "model_type": "lfm2_moe",
        "intermediate_size": 96,
        "num_dense_layers": 1,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.3,
    },
    # The feed-forward's inner width follows from n_embd: 256, the least there is.
    "lille-130m": {
        "model_type": "lille-130m",
        "vocab_size": 96,
        "n_embd": 128,
        "n_head": 4,
        "n_kv_heads": 2,
        "n_layer": 2,
        "block_size": 512,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "llama": _LLAMA_HEADS
    | {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
    },
    # Every fourth layer attends to everything and without rotation, and mlx-lm reads the fourth layer's cache: four
    # layers at least. Only one expert per token is supported.
    "llama4": {
        "model_type": "llama4",
        "text_config": _LLAMA_HEADS
        | {
            "model_type": "llama4_text",
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "attention_bias": False,
            "attention_chunk_size": 8,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 96,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 1.0,
                "original_max_position_embeddings": 128,
            },
            "use_qk_norm": True,
            "attn_temperature_tuning": 4,
            "floor_scale": 8,
            "attn_scale": 0.3,
        },
    },
    # no_rope_layers says 1 where a layer does rotate. Tied, mlx-lm multiplies by the embedding's weight itself, which
    # fails once that is quantised.
    "llama4_text": _LLAMA_HEADS
    | {
        "model_type": "llama4_text",
        "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 0],
        "use_qk_norm": True,
        "tie_word_embeddings": True,
    },
    "longcat_flash": _LONGCAT | {"model_type": "longcat_flash", "attention_method": "MLA"},
    # Four n-gram embedders of hidden_size / 4: 128 keeps their width at 32.
    "longcat_flash_ngram": _LONGCAT
    | {
        "model_type": "longcat_flash_ngram",
        "hidden_size": 128,
        "kv_lora_rank": 64,
        "q_lora_rank": 96,
        "v_head_dim": 32,
        "ngram_vocab_size_ratio": 3,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    # use_bcdt_rms is what falcon_mamba adds, which mlx-lm loads with this module.
    "mamba": {
        "model_type": "mamba",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "state_size": 16,
        "num_hidden_layers": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 32,
        "use_bcdt_rms": True,
    },
    # The upper limit of the time step clips most steps: unclipped, untrained weights forget within ten tokens.
    "mamba2": {
        "model_type": "mamba2",
        "vocab_size": 96,
        "hidden_size": 64,
        "num_heads": 4,
        "head_dim": 32,
        "intermediate_size": 128,
        "state_size": 64,
        "num_hidden_layers": 2,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 2,
        "use_bias": False,
        "use_conv_bias": True,
        "tie_word_embeddings": False,
        "time_step_limit": [0.01, 0.5],
        "time_step_rank": 32,
    },
    "mellum": _LLAMA_HEADS
    | _EXPERTS
    | {
        "model_type": "mellum",
        "tie_word_embeddings": False,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 50000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        },
    },
    "mimo": _LLAMA_WIDE | {"model_type": "mimo", "num_nextn_predict_layers": 1},
    # Sliding layers have heads of their own number and bias the softmax with a sink; values are narrower than keys.
    "mimo_v2_flash": _SIZES
    | _SIGMOID_ROUTER
    | {
        "model_type": "mimo_v2_flash",
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "hybrid_layer_pattern": [0, 1, 0],
        "moe_layer_freq": [0, 1, 1],
        "head_dim": 64,
        "v_head_dim": 32,
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": 64,
        "swa_v_head_dim": 32,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 8,
        "attention_value_scale": 0.7,
        "partial_rotary_factor": 0.5,
        "rope_theta": 50000.0,
        "swa_rope_theta": 10000.0,
        "n_routed_experts": 4,
        "n_shared_experts": None,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.3,
        "layernorm_epsilon": 1e-5,
    },
    "minicpm": _LLAMA_WIDE | {"model_type": "minicpm", "dim_model_base": 32, "scale_depth": 1.3, "scale_emb": 1.7},
    # Values are hidden_size / num_attention_heads wide.
    "minicpm3": _LLAMA_WIDE
    | {
        "model_type": "minicpm3",
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "dim_model_base": 32,
        "scale_depth": 1.3,
        "scale_emb": 1.7,
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 128,
            "short_factor": [1.0, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3, 1.3, 1.4, 1.4, 1.5, 1.5, 1.6, 1.6, 1.7, 1.7],
            "long_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0, 2.2, 2.5, 2.8, 3.1, 3.4, 3.8, 4.2, 4.6],
        },
    },
    # Every layer has experts; intermediate_size is one expert's width, and half of each head is rotated.
    "minimax": _LLAMA_HEADS
    | {
        "model_type": "minimax",
        "intermediate_size": 32,
        "shared_intermediate_size": 0,
        "rotary_dim": 16,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
    },
    # Blocks of four keys, of which each query keeps three: a choice from the thirteenth token on. As published, the
    # dense layer attends to everything and the expert layer sparsely.
    "minimax_m3_vl": {
        "model_type": "minimax_m3_vl",
        "text_config": _LLAMA_HEADS
        | {
            "model_type": "minimax_m3",
            "intermediate_size": 32,
            "dense_intermediate_size": 96,
            "shared_intermediate_size": 64,
            "partial_rotary_factor": 0.5,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "routed_scaling_factor": 1.3,
            "use_qk_norm": True,
            "use_gemma_norm": True,
            "swiglu_alpha": 1.3,
            "swiglu_limit": 0.7,
            "moe_layer_freq": [0, 1],
            "sparse_attention_config": {
                "sparse_num_index_heads": 2,
                "sparse_index_dim": 64,
                "sparse_block_size": 4,
                "sparse_topk_blocks": 3,
                "sparse_local_block": 1,
                "sparse_attention_freq": [0, 1],
            },
        },
    },
    "ministral3": _MINISTRAL3 | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    # One of its three text models; the others are variants below. Without a window, as published.
    "mistral3": {"model_type": "mistral3", "text_config": _MINISTRAL3},
    # The scale of the queries steps up at every 8 positions, so that 20 tokens see it.
    "mistral4": _LLAMA
    | _LATENT
    | _ROUTED_EXPERTS
    | {
        "model_type": "mistral4",
        "head_dim": 96,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
            "llama_4_scaling_beta": 0.3,
        },
    },
    "mixtral": _LLAMA_WIDE
    | {
        "model_type": "mixtral",
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "muse_glimmer": _LLAMA_HEADS
    | {
        "model_type": "muse_glimmer",
        "num_hidden_layers": 3,
        "post_norm_eps": 1e-8,
        "sliding_window": 8,
        "qk_scale_factor": 1.7,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "final_logit_softcapping": 20.0,
        "output_multiplier": 0.7,
    },
    # Runs on Metal only: its kernels have no fallback.
    "muse_spark": {
        "model_type": "muse_spark",
        "text_config": {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_hidden_layers": 3,
            "vocab_size": 96,
            "rms_norm_eps": 1e-5,
            "post_norm_eps": 1e-8,
            "rope_parameters": {"rope_theta": 10000.0},
            "layer_rope_theta": [10000.0, 10000.0, 0],
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
            "final_logit_softcapping": 20.0,
            "output_multiplier": 0.7,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_hidden_size": 96,
            "moe_intermediate_size": 32,
            "qk_scale_factor": 1.7,
            "routed_scaling_factor": 1.3,
        },
    },
    # Both layers run twice.
    "nanbeige": _LLAMA_HEADS | {"model_type": "nanbeige", "num_loops": 2, "tie_word_embeddings": False},
    "nanochat": _SIZES | {"model_type": "nanochat", "hidden_size": 128, "num_hidden_layers": 2, "rope_theta": 10000.0},
    "nemotron": _SIZES
    | {
        "model_type": "nemotron",
        "hidden_act": "relu2",
        "num_hidden_layers": 2,
        "head_dim": 32,
        "norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    # Every kind of sub-block. The width of a feed-forward is int(2 * ffn_mult * hidden_size / 3), up to a multiple of
    # 256.
    "nemotron-nas": {
        "model_type": "nemotron-nas",
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "vocab_size": 96,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "rope_scaling": _LLAMA3_ROPE,
        "tie_word_embeddings": False,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 4.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"replace_with_linear": True}},
            {"attention": {"no_op": True}, "ffn": {"no_op": True}},
        ],
    },
    # Every block is one of: Mamba, perceptron, attention, mixture of experts. The experts' latent is untypically
    # wider than the stream.
    "nemotron_h": _SIZES
    | {
        "model_type": "nemotron_h",
        "head_dim": 32,
        "attention_bias": False,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "mamba_proj_bias": False,
        "ssm_state_size": 32,
        "conv_kernel": 4,
        "n_groups": 2,
        "mlp_bias": False,
        "layer_norm_epsilon": 1e-5,
        "use_bias": False,
        "use_conv_bias": True,
        "hybrid_override_pattern": ["M", "-", "*", "E", "M"],
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 128,
        "moe_latent_size": 160,
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.3,
        "time_step_limit": [0.001, 100.0],
    },
    # mlp_hidden_size counts both halves of the gated projection. Runs one token at a time only: for more, mlx-lm's
    # mask is the word "causal", which this architecture adds to the scores.
    "olmo": {
        "model_type": "olmo",
        "d_model": 128,
        "n_layers": 2,
        "mlp_hidden_size": 192,
        "n_heads": 4,
        "vocab_size": 96,
        "embedding_size": 96,
        "rope_theta": 10000.0,
        "weight_tying": False,
    },
    "olmo2": _LLAMA_HEADS | {"model_type": "olmo2", "tie_word_embeddings": False},
    "olmo3": _LLAMA_HEADS
    | {
        "model_type": "olmo3",
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        "tie_word_embeddings": False,
    },
    "olmo_hybrid": _LLAMA_HEADS
    | {
        "model_type": "olmo_hybrid",
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 48,
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    "olmoe": _LLAMA_HEADS
    | {
        "model_type": "olmoe",
        "intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
    },
    # Heads and widths per layer.
    "openelm": {
        "model_type": "openelm",
        "head_dim": 32,
        "num_transformer_layers": 2,
        "model_dim": 64,
        "vocab_size": 96,
        "ffn_dim_divisor": 32,
        "num_query_heads": [4, 6],
        "num_kv_heads": [2, 3],
        "ffn_multipliers": [1.5, 2.5],
        "ffn_with_glu": True,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "rms_norm_eps": 1e-6,
        "rope_freq_constant": 10000,
    },
    "phi": _SIZES
    | {
        "model_type": "phi",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "partial_rotary_factor": 0.4,
        "layer_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
    "phi3": _LLAMA_WIDE
    | {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.0, 1.0, 1.0, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3, 1.3, 1.4],
            "long_factor": [1.1, 1.2, 1.3, 1.5, 1.8, 2.1, 2.5, 3.0, 3.6, 4.3, 5.1, 6.0],
        },
        "tie_word_embeddings": False,
    },
    # The vocabulary cannot be smaller: the model sets its logits of fixed ids, up to 100351, to -inf, and with fewer
    # the write goes past the array. Hence 26 MB, and heads of 16. Its block-sparse layers add a boolean mask to the
    # scores, so that in mlx-lm a position there sees the later ones of its block.
    "phi3small": {
        "model_type": "phi3small",
        "hidden_size": 64,
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": 96,
        "gegelu_limit": 2.0,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 100352,
        "mup_attn_multiplier": 1.3,
        "mup_use_scaling": True,
        "mup_embedding_multiplier": 1.7,
        "mup_width_multiplier": 0.7,
        "rope_embedding_base": 10000.0,
        "rope_position_scale": 1.0,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 1,
        "blocksparse_vert_stride": 2,
    },
    "phimoe": _LLAMA_WIDE
    | {
        "model_type": "phimoe",
        "intermediate_size": 32,
        "original_max_position_embeddings": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        # Wide enough that the runner-up is sometimes within the band of 2 * noise.
        "router_jitter_noise": 0.1,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3, 1.3, 1.4, 1.4, 1.5],
            "long_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 1.9, 2.2, 2.5, 2.9, 3.3, 3.8, 4.4, 5.1, 5.8, 6.6],
            "short_mscale": 1.2,
            "long_mscale": 1.3,
        },
    },
    # The width of an expert is 4 * model_dim.
    "phixtral": {
        "model_type": "phixtral",
        "num_vocab": 96,
        "model_dim": 128,
        "num_heads": 4,
        "num_layers": 2,
        "rotary_dim": 16,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
    },
    "pixtral": {
        "model_type": "pixtral",
        "text_config": _LLAMA_HEADS | {"model_type": "llama", "tie_word_embeddings": False},
    },
    # n_shared_head query heads per head of keys and values.
    "plamo": {
        "model_type": "plamo",
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "n_shared_head": 2,
        "rms_norm_eps": 1e-6,
        "vocab_size": 96,
        "rope_theta": 10000.0,
    },
    # Even layers are Mamba, odd ones attention.
    "plamo2": _SIZES
    | {
        "model_type": "plamo2",
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_size_per_head": 32,
        "attention_window_size": 512,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_num_heads": 6,
        "mamba_step": 2,
        "mamba_chunk_size": 256,
        "mamba_enabled": True,
    },
    # Every third layer attends fully.
    "plamo3": _SIZES
    | {
        "model_type": "plamo3",
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "head_dim": 32,
        "window_size": 8,
        "sliding_window_pattern": 3,
        "rope_theta": 1000000,
        "rope_local_theta": 10000,
    },
    # A rotation takes blocks of at least 512 and a packed layer widths of multiples of 128: hence these sizes. Packed
    # weights are integers, zero until filled with random bits (centred: biases = -1.5 * scales); signs are +1 or -1.
    "prism_hadamard_qwen35": {
        "model_type": "prism_hadamard_qwen35",
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "gdn_activation_layout": "grouped",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "text_config": _SIZES
        | _DELTA
        | {
            "model_type": "qwen3_5_text",
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "rope_parameters": {
                "type": "default",
                "mrope_section": [2, 1, 1],
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
        },
        "modules": [
            {"path": "model.embed_tokens", "embedding": True, "dtype": "float16", "block": 512},
            {"path": "model.layers.0.linear_attn.in_proj_qkv", "embedding": False, "dtype": "float16", "block": 512},
            {"path": "model.layers.0.linear_attn.in_proj_z", "embedding": False, "dtype": "float16", "block": 512},
            {"path": "model.layers.0.linear_attn.out_proj", "embedding": False, "dtype": "float16", "block": 0},
            {"path": "model.layers.0.mlp.gate_proj", "embedding": False, "dtype": "float16", "block": 512},
            {"path": "model.layers.0.mlp.up_proj", "embedding": False, "dtype": "float16", "block": 512},
            {"path": "model.layers.0.mlp.down_proj", "embedding": False, "dtype": "float16", "block": 1024},
            {"path": "model.layers.1.self_attn.q_proj", "embedding": False, "dtype": "float16", "block": 512},
            {"path": "model.layers.1.self_attn.k_proj", "embedding": False, "dtype": "float16", "block": 512},
            {"path": "model.layers.1.self_attn.v_proj", "embedding": False, "dtype": "float16", "block": 512},
            {"path": "model.layers.1.self_attn.o_proj", "embedding": False, "dtype": "float16", "block": 0},
            {"path": "model.layers.1.mlp.gate_proj", "embedding": False, "dtype": "float16", "block": 512},
            {"path": "model.layers.1.mlp.up_proj", "embedding": False, "dtype": "float16", "block": 512},
            {"path": "model.layers.1.mlp.down_proj", "embedding": False, "dtype": "float16", "block": 1024},
            {"path": "lm_head", "embedding": False, "dtype": "float16", "block": 512},
        ],
    },
    # intermediate_size counts both halves of the gated projection; heads of keys and values equal the query heads.
    "qwen": {
        "model_type": "qwen",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "kv_channels": 32,
        "max_position_embeddings": 512,
        "layer_norm_epsilon": 1e-6,
        "intermediate_size": 192,
        "no_bias": True,
        "vocab_size": 96,
    },
    "qwen2": _QWEN_WIDE | {"model_type": "qwen2"},
    "qwen2_moe": _QWEN_WIDE
    | {
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "qwen2_vl": {
        "model_type": "qwen2_vl",
        "text_config": _QWEN_WIDE
        | {"model_type": "qwen2_vl", "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}},
    },
    # Tied, as the small released models.
    "qwen3": _QWEN | {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3_5": {"model_type": "qwen3_5", "text_config": _QWEN3_5_TEXT | {"model_type": "qwen3_5_text"}},
    "qwen3_5_moe": {
        "model_type": "qwen3_5_moe",
        "text_config": _QWEN3_5_TEXT
        | {
            "model_type": "qwen3_5_moe_text",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
    },
    "qwen3_moe": _QWEN3_MOE | {"model_type": "qwen3_moe"},
    "qwen3_next": _QWEN
    | _EXPERTS
    | _DELTA
    | {
        "model_type": "qwen3_next",
        "num_hidden_layers": 4,
        "decoder_sparse_step": 1,
        # Released models have none; a dense layer among sparse ones covers the branch.
        "mlp_only_layers": [2],
        "shared_expert_intermediate_size": 64,
        "partial_rotary_factor": 0.25,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl",
        "text_config": _QWEN
        | {
            "model_type": "qwen3_vl_text",
            "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
            "tie_word_embeddings": False,
        },
    },
    "qwen3_vl_moe": {"model_type": "qwen3_vl_moe", "text_config": _QWEN3_MOE | {"model_type": "qwen3_vl_moe_text"}},
    # The perceptron's width is intermediate_size / 2: 96. One key-value head, whatever num_key_value_heads says.
    "recurrent_gemma": {
        "model_type": "recurrent_gemma",
        "attention_bias": False,
        "conv1d_width": 4,
        "hidden_size": 128,
        "intermediate_size": 192,
        "logits_soft_cap": 13.0,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_window_size": 8,
        "vocab_size": 96,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    # The low ranks are multiples of 64: the architecture's own quantisation of "lora.2" names bits only, so that mlx
    # falls back to groups of 64.
    "rwkv7": {
        "model_type": "rwkv7",
        "vocab_size": 96,
        "hidden_size": 128,
        "intermediate_size": 96,
        "norm_eps": 1e-5,
        "head_dim": 32,
        "num_hidden_layers": 3,
        "a_low_rank_dim": 64,
        "v_low_rank_dim": 192,
        "gate_low_rank_dim": 256,
        "decay_low_rank_dim": 320,
    },
    "seed_oss": _QWEN
    | {
        "model_type": "seed_oss",
        "attention_bias": True,
        "attention_out_bias": False,
        "rope_scaling": {"rope_type": "default"},
    },
    # no_rope_layers says 1 where a layer rotates, 0 where it does not.
    "smollm3": _QWEN | {"model_type": "smollm3", "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
    "solar_open": _QWEN
    | _ROUTED_EXPERTS
    | {
        "model_type": "solar_open",
        "num_hidden_layers": 3,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
    },
    "spark2_5": _SIZES
    | {
        "model_type": "spark2_5",
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            "full_attention": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5},
        },
    },
    # As the 12B model: attention and perceptron in parallel, a norm per head.
    "stablelm": {
        "model_type": "stablelm",
        "vocab_size": 96,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "rope_theta": 10000.0,
        "use_qkv_bias": True,
        "partial_rotary_factor": 0.25,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "qk_layernorm": True,
    },
    "starcoder2": {
        "model_type": "starcoder2",
        "vocab_size": 96,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "norm_epsilon": 1e-5,
        "rope_theta": 10000.0,
    },
    # Full and dense, sliding and sparse, the same with clamped activations, full and sparse. Sliding layers have 6
    # heads, full ones 4; the limits are low, so that they bind on random weights.
    "step3p5": {
        "model_type": "step3p5",
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "vocab_size": 96,
        "num_attention_heads": 4,
        "num_attention_groups": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "rms_norm_eps": 1e-5,
        "rope_theta": [50000.0, 10000.0, 10000.0, 50000.0],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 256,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        "max_position_embeddings": 512,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "yarn_only_types": ["full_attention"],
        "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5],
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 6,
            "num_attention_groups": 2,
            "head_dim": 32,
        },
        "use_head_wise_attn_gate": True,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_intermediate_size": 32,
        "share_expert_dim": 64,
        "moe_layers_enum": "1,2,3",
        "moe_router_scaling_factor": 1.3,
        "norm_expert_weight": True,
        "swiglu_limits": [0.0, 0.0, 0.4, 0.0],
        "swiglu_limits_shared": [0.0, 0.0, 0.6, 0.0],
    },
    # No grouped queries.
    "talkie": {
        "model_type": "talkie",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 32,
        "intermediate_size": 96,
        "vocab_size": 96,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
    },
    "telechat3": _QWEN
    | {
        "model_type": "telechat3",
        "rope_scaling": {
            "rope_type": "telechat3-yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
        },
    },
    # Latent attention: no grouped queries.
    "youtu_llm": _LLAMA
    | {
        "model_type": "youtu_llm",
        "num_key_value_heads": 4,
        "kv_lora_rank": 160,
        "q_lora_rank": 96,
        "qk_rope_head_dim": 32,
        "v_head_dim": 128,
        "qk_nope_head_dim": 64,
        "rms_norm_eps": 1e-6,
    },
}

# Another path through an architecture above, named "architecture/variant". Direct queries come of one
# projection, without a low rank.
VARIANTS: dict[str, dict[str, Any]] = {
    "bailing_hybrid/direct_queries": CONFIGURATIONS["bailing_hybrid"] | {"q_lora_rank": None},
    "bailing_moe_v3/direct_queries": CONFIGURATIONS["bailing_moe_v3"] | {"q_lora_rank": None},
    "cohere/no_qk_norm": CONFIGURATIONS["cohere"] | {"use_qk_norm": False},
    # As the Lite checkpoints.
    "deepseek_v2/direct_queries": CONFIGURATIONS["deepseek_v2"] | {"q_lora_rank": None, "topk_method": "greedy"},
    "deepseek_v3/direct_queries": CONFIGURATIONS["deepseek_v3"] | {"q_lora_rank": None},
    # As the checkpoints without windows.
    "exaone4/full_attention": CONFIGURATIONS["exaone4"]
    | {"sliding_window": None, "sliding_window_pattern": None, "tie_word_embeddings": True},
    "falcon_h1/no_mamba_norm": CONFIGURATIONS["falcon_h1"] | {"mamba_rms_norm": False},
    "falcon_h1/untied": CONFIGURATIONS["falcon_h1"] | {"tie_word_embeddings": False},
    "gear/no_softcap": CONFIGURATIONS["gear"] | {"attn_logit_softcapping": None},
    # Per-layer inputs, shared keys and values and experts at once.
    "gemma4/per_layer_inputs": {
        "model_type": "gemma4",
        "vocab_size": 96,
        "text_config": CONFIGURATIONS["gemma4_text"]
        | {
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    },
    "glm4_moe/no_qk_norm": CONFIGURATIONS["glm4_moe"] | {"use_qk_norm": False},
    "gpt_bigcode/multi_head": CONFIGURATIONS["gpt_bigcode"] | {"multi_query": False},
    # Attention and perceptron one after the other.
    "gpt_neox/sequential": CONFIGURATIONS["gpt_neox"] | {"use_parallel_residual": False},
    # One perceptron instead of experts, and rotation.
    "granitemoehybrid/dense": CONFIGURATIONS["granitemoehybrid"]
    | {
        "num_local_experts": None,
        "num_experts_per_tok": None,
        "intermediate_size": 96,
        "position_embedding_type": "rope",
    },
    # The model then has an lm_head all the same, and never uses it.
    "helium/tied": CONFIGURATIONS["helium"] | {"tie_word_embeddings": True},
    "hunyuan/own_keys_and_values": CONFIGURATIONS["hunyuan"] | {"use_cla": False},
    "jamba/dense": CONFIGURATIONS["jamba"] | {"num_experts": 1},
    # A plain residual stream.
    "kimi_k3/no_residual_blocks": {
        "model_type": "kimi_k3",
        "text_config": CONFIGURATIONS["kimi_k3"]["text_config"] | {"attn_res_block_size": None},
    },
    "laguna/no_gate": CONFIGURATIONS["laguna"] | {"gating": False},
    "llama/untied": CONFIGURATIONS["llama"] | {"tie_word_embeddings": False},
    "llama4_text/untied": CONFIGURATIONS["llama4_text"] | {"tie_word_embeddings": False},
    "mamba/no_inner_norms": CONFIGURATIONS["mamba"] | {"use_bcdt_rms": False},
    "mimo_v2_flash/all_sinks": CONFIGURATIONS["mimo_v2_flash"] | {"add_full_attention_sink_bias": True},
    # The stream is divided by hidden_size / dim_model_base before the unembedding only where that is untied.
    "minicpm/tied": CONFIGURATIONS["minicpm"] | {"tie_word_embeddings": True},
    "mistral3/llama": {"model_type": "mistral3", "text_config": _LLAMA_HEADS | {"model_type": "mistral"}},
    "mistral3/mistral4": {"model_type": "mistral3", "text_config": CONFIGURATIONS["mistral4"]},
    # Experts on the stream itself.
    "nemotron_h/no_latent": CONFIGURATIONS["nemotron_h"] | {"moe_latent_size": None},
    "qwen3/untied": CONFIGURATIONS["qwen3"] | {"tie_word_embeddings": False},
    "seed_oss/untied": CONFIGURATIONS["seed_oss"] | {"tie_word_embeddings": False},
    # As the smaller checkpoints: attention and perceptron one after the other, no norm per head.
    "stablelm/sequential": CONFIGURATIONS["stablelm"] | {"use_parallel_residual": False, "qk_layernorm": False},
}
