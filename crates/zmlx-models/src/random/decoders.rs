//! Configurations of models with plain attention in every layer, and of LFM2.

use serde_json::{Value as Json, json};

/// Keys that all have.
fn decoder(model_type: &str, architecture: &str, rest: Json) -> Json {
    let mut config = json!({
        "architectures": [architecture],
        "model_type": model_type,
        "rope_scaling": null,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    });
    if let (Some(config), Json::Object(rest)) = (config.as_object_mut(), rest) {
        config.extend(rest);
    }
    config
}

pub(super) fn glm45_air() -> Json {
    let rest = json!({
        "vocab_size": 151_552,
        "hidden_size": 4096,
        "intermediate_size": 10_944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "first_k_dense_replace": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": true,
        "routed_scaling_factor": 1.0,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "use_qk_norm": false,
        "attention_bias": true,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000,
        "max_position_embeddings": 131_072,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": false,
        "eos_token_id": [151_329, 151_336, 151_338],
        "pad_token_id": 151_329,
    });
    decoder("glm4_moe", "Glm4MoeForCausalLM", rest)
}

pub(super) fn lfm2_1b() -> Json {
    let rest = json!({
        "vocab_size": 65_536,
        "hidden_size": 2048,
        "block_dim": 2048,
        "block_ff_dim": 12_288,
        "block_auto_adjust_ff_dim": true,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
        "num_hidden_layers": 16,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "conv_L_cache": 3,
        "conv_bias": false,
        "norm_eps": 1e-5,
        "rope_theta": 1_000_000,
        "max_position_embeddings": 128_000,
        "bos_token_id": 1,
        "eos_token_id": 7,
        "pad_token_id": 0,
    });
    decoder("lfm2", "Lfm2ForCausalLM", rest)
}

pub(super) fn ministral3_3b() -> Json {
    let rest = json!({
        "vocab_size": 131_072,
        "hidden_size": 3072,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1_000_000,
            "factor": 16.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16_384,
            "llama_4_scaling_beta": 0.1,
        },
        "max_position_embeddings": 262_144,
        "sliding_window": null,
        "tie_word_embeddings": true,
    });
    let text = decoder("ministral3", "Ministral3ForCausalLM", rest);
    json!({
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": text,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    })
}

pub(super) fn mistral_7b() -> Json {
    let rest = json!({
        "vocab_size": 32_768,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000,
        "max_position_embeddings": 32_768,
        "sliding_window": null,
        "tie_word_embeddings": false,
        "bos_token_id": 1,
        "eos_token_id": 2,
    });
    decoder("mistral", "MistralForCausalLM", rest)
}

pub(super) fn mixtral_8x7b() -> Json {
    let rest = json!({
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000,
        "max_position_embeddings": 32_768,
        "sliding_window": null,
        "tie_word_embeddings": false,
        "bos_token_id": 1,
        "eos_token_id": 2,
    });
    decoder("mixtral", "MixtralForCausalLM", rest)
}

pub(super) fn olmoe_7b() -> Json {
    let rest = json!({
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": false,
        "attention_bias": false,
        "clip_qkv": null,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": false,
        "eos_token_id": 50_279,
        "pad_token_id": 1,
    });
    decoder("olmoe", "OlmoeForCausalLM", rest)
}

pub(super) fn phi3_mini() -> Json {
    let rest = json!({
        "vocab_size": 32_064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000,
        "original_max_position_embeddings": 4096,
        "max_position_embeddings": 4096,
        "sliding_window": 2047,
        "tie_word_embeddings": false,
        "bos_token_id": 1,
        "eos_token_id": 32_000,
        "pad_token_id": 32_000,
    });
    decoder("phi3", "Phi3ForCausalLM", rest)
}

pub(super) fn qwen25_05b() -> Json {
    let rest = json!({
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "max_position_embeddings": 32_768,
        "use_sliding_window": false,
        "tie_word_embeddings": true,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    });
    decoder("qwen2", "Qwen2ForCausalLM", rest)
}

pub(super) fn qwen3_4b() -> Json {
    let rest = json!({
        "vocab_size": 151_936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": false,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "max_position_embeddings": 40_960,
        "use_sliding_window": false,
        "tie_word_embeddings": true,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    });
    decoder("qwen3", "Qwen3ForCausalLM", rest)
}
