use serde_json::{Value as Json, json};

use super::decoders;

/// A published model whose shapes a random one can take.
#[derive(Debug, Clone, Copy)]
pub struct PublishedModel {
    /// Its name here.
    pub name: &'static str,
    /// What it is, in a few words.
    pub about: &'static str,
    /// Its configuration, without quantisation.
    pub config: fn() -> Json,
}

/// The models, one entry each.
pub const MODELS: &[PublishedModel] = &[
    PublishedModel {
        name: "deepseek_v3",
        about: "deepseek-ai/DeepSeek-V3 (and R1): 671 B parameters, 37 B active, latent attention, 256 experts",
        config: deepseek_v3,
    },
    PublishedModel {
        name: "deepseek_v32",
        about: "deepseek-ai/DeepSeek-V3.2: 672 B parameters, 37 B active, sparse latent attention, 256 experts",
        config: deepseek_v32,
    },
    PublishedModel {
        name: "gemma3_1b",
        about: "google/gemma-3-1b-it: 1.0 B parameters, attention through a window in five layers of six, dense",
        config: gemma3_1b,
    },
    PublishedModel {
        name: "glm45_air",
        about: "zai-org/GLM-4.5-Air: 106.9 B parameters, 12 B active, attention, 128 experts and a shared one",
        config: decoders::glm45_air,
    },
    PublishedModel {
        name: "glm4_7_flash",
        about: "zai-org/GLM-4.7-Flash: 29.9 B parameters, 3.6 B active, latent attention, 64 experts",
        config: glm4_7_flash,
    },
    PublishedModel {
        name: "gpt_oss_20b",
        about: "openai/gpt-oss-20b: 20.9 B parameters, 3.6 B active, every other layer through a window, 32 experts",
        config: || gpt_oss(24, 32),
    },
    PublishedModel {
        name: "gpt_oss_120b",
        about: "openai/gpt-oss-120b: 116.8 B parameters, 5.1 B active, every other layer through a window, 128 experts",
        config: || gpt_oss(36, 128),
    },
    PublishedModel {
        name: "kimi_k25",
        about: "moonshotai/Kimi-K2.5, what reads text: 1,026 B parameters, 32 B active, latent attention, 384 experts",
        config: kimi_k25,
    },
    PublishedModel {
        name: "lfm2_8b",
        about: "LiquidAI/LFM2-8B-A1B: 8.3 B parameters, 1.6 B active, convolutions and attention, 32 experts",
        config: lfm2_8b,
    },
    PublishedModel {
        name: "lfm2_24b",
        about: "LiquidAI/LFM2-24B-A2B: 23.8 B parameters, 2.3 B active, convolutions and attention, 64 experts",
        config: lfm2_24b,
    },
    PublishedModel {
        name: "lfm2_1b",
        about: "LiquidAI/LFM2-1.2B: 1.2 B parameters, convolutions and attention, dense",
        config: decoders::lfm2_1b,
    },
    PublishedModel {
        name: "ministral3_3b",
        about: "mistralai/Ministral-3-3B-Instruct-2512, its text part: 3.4 B parameters, attention, dense",
        config: decoders::ministral3_3b,
    },
    PublishedModel {
        name: "mistral_7b",
        about: "mistralai/Mistral-7B-v0.3: 7.2 B parameters, attention, dense",
        config: decoders::mistral_7b,
    },
    PublishedModel {
        name: "mixtral_8x7b",
        about: "mistralai/Mixtral-8x7B-v0.1: 46.7 B parameters, 12.9 B active, attention, 8 experts",
        config: decoders::mixtral_8x7b,
    },
    PublishedModel {
        name: "olmoe_7b",
        about: "allenai/OLMoE-1B-7B-0924: 6.9 B parameters, 1.3 B active, attention, 64 experts",
        config: decoders::olmoe_7b,
    },
    PublishedModel {
        name: "phi3_mini",
        about: "microsoft/Phi-3-mini-4k-instruct: 3.8 B parameters, attention, dense",
        config: decoders::phi3_mini,
    },
    PublishedModel {
        name: "qwen25_05b",
        about: "Qwen/Qwen2.5-0.5B: 494 M parameters, attention, dense",
        config: decoders::qwen25_05b,
    },
    PublishedModel {
        name: "qwen3_30b",
        about: "Qwen/Qwen3-30B-A3B: 30.5 B parameters, 3.3 B active, attention, 128 experts",
        config: qwen3_30b,
    },
    PublishedModel {
        name: "qwen3_4b",
        about: "Qwen/Qwen3-4B: 4.0 B parameters, attention, dense",
        config: decoders::qwen3_4b,
    },
    PublishedModel {
        name: "qwen3_5_35b",
        about: "Qwen/Qwen3.5-35B-A3B, what reads text: 34.7 B parameters, 2.9 B active, delta nets and attention, 256 experts",
        config: qwen3_5_35b,
    },
    PublishedModel {
        name: "qwen3_next_80b",
        about: "Qwen/Qwen3-Next-80B-A3B: 79.7 B parameters, 3.6 B active, delta nets and attention, 512 experts",
        config: qwen3_next_80b,
    },
    PublishedModel {
        name: "smollm2_135m",
        about: "HuggingFaceTB/SmolLM2-135M: 135 M parameters, attention, dense",
        config: smollm2_135m,
    },
];

fn deepseek_v3() -> Json {
    json!({
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": true,
        "routed_scaling_factor": 2.5,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "attention_bias": false,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": 163_840,
        "tie_word_embeddings": false,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    })
}

fn deepseek_v32() -> Json {
    let mut config = deepseek_v3();
    config["architectures"] = json!(["DeepseekV32ForCausalLM"]);
    config["model_type"] = json!("deepseek_v32");
    config["index_head_dim"] = json!(128);
    config["index_n_heads"] = json!(64);
    config["index_topk"] = json!(2048);
    config
}

fn glm4_7_flash() -> Json {
    json!({
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "vocab_size": 154_880,
        "hidden_size": 2048,
        "intermediate_size": 10_240,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 47,
        "first_k_dense_replace": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "norm_topk_prob": true,
        "routed_scaling_factor": 1.8,
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "v_head_dim": 256,
        "attention_bias": false,
        "partial_rotary_factor": 1.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "rope_scaling": null,
        "max_position_embeddings": 202_752,
        "tie_word_embeddings": false,
        "eos_token_id": [154_820, 154_827, 154_829],
        "pad_token_id": 154_820,
        "torch_dtype": "bfloat16",
    })
}

fn kimi_k25() -> Json {
    let mut text = deepseek_v3();
    let differs = json!({
        "model_type": "kimi_k2",
        "vocab_size": 163_840,
        "first_k_dense_replace": 1,
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50_000.0,
        "max_position_embeddings": 262_144,
        "bos_token_id": 163_584,
        "eos_token_id": 163_585,
    });
    if let (Some(text), Json::Object(differs)) = (text.as_object_mut(), differs) {
        text.extend(differs);
    }
    text["rope_scaling"]["factor"] = json!(64);
    json!({
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": text,
        "bos_token_id": 163_584,
        "eos_token_id": 163_585,
        "torch_dtype": "bfloat16",
    })
}

fn lfm2_8b() -> Json {
    lfm2_moe(24, &[2, 6, 10, 14, 18, 21])
}

fn lfm2_24b() -> Json {
    let mut config = lfm2_moe(40, &[2, 6, 10, 14, 18, 22, 26, 30, 34, 38]);
    config["intermediate_size"] = json!(11_776);
    config["moe_intermediate_size"] = json!(1536);
    config["num_experts"] = json!(64);
    config
}

/// LFM2-8B-A1B with so many layers and attention in some.
fn lfm2_moe(layers: usize, attention: &[usize]) -> Json {
    let layer = |i: usize| if attention.contains(&i) { "full_attention" } else { "conv" };
    json!({
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        "vocab_size": 65536,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_hidden_layers": layers,
        "layer_types": (0..layers).map(layer).collect::<Vec<_>>(),
        "num_dense_layers": 2,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": true,
        "use_expert_bias": true,
        "routed_scaling_factor": 1.0,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "conv_L_cache": 3,
        "conv_bias": false,
        "norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 128_000,
        "tie_word_embeddings": true,
        "bos_token_id": 1,
        "eos_token_id": 7,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    })
}

fn gemma3_1b() -> Json {
    json!({
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": 262_144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000,
        "rope_local_base_freq": 10_000,
        "rope_scaling": null,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "max_position_embeddings": 32_768,
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    })
}

/// Both have the same shapes but for these two numbers.
fn gpt_oss(layers: usize, experts: i32) -> Json {
    let layer = |i: usize| if i.is_multiple_of(2) { "sliding_attention" } else { "full_attention" };
    json!({
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": layers,
        "layer_types": (0..layers).map(layer).collect::<Vec<_>>(),
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "attention_bias": true,
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": false,
        },
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": false,
        "eos_token_id": 200_002,
        "pad_token_id": 199_999,
        "torch_dtype": "bfloat16",
    })
}

fn qwen3_30b() -> Json {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": true,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "attention_bias": false,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": null,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": false,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "torch_dtype": "bfloat16",
    })
}

fn qwen3_5_35b() -> Json {
    json!({
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": false,
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "vocab_size": 248_320,
            "hidden_size": 2048,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_hidden_layers": 40,
            "full_attention_interval": 4,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "attention_bias": false,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000_000,
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": true,
                "mrope_section": [11, 11, 10],
            },
            "max_position_embeddings": 262_144,
            "tie_word_embeddings": false,
            "eos_token_id": 248_044,
            "dtype": "bfloat16",
        },
    })
}

fn qwen3_next_80b() -> Json {
    json!({
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_hidden_layers": 48,
        "full_attention_interval": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": true,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": false,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000_000,
        "rope_scaling": null,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": false,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "torch_dtype": "bfloat16",
    })
}

fn smollm2_135m() -> Json {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "attention_bias": false,
        "mlp_bias": false,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "rope_scaling": null,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": true,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    })
}
