use serde_json::{Value as Json, json};

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
pub const MODELS: &[PublishedModel] = &[PublishedModel {
    name: "lfm2_8b",
    about: "LiquidAI/LFM2-8B-A1B: 8.3 B parameters, 1.6 B active, convolutions and attention, 32 experts",
    config: lfm2_8b,
}];

fn lfm2_8b() -> Json {
    let layer = |i: usize| if [2, 6, 10, 14, 18, 21].contains(&i) { "full_attention" } else { "conv" };
    json!({
        "architectures": ["Lfm2MoeForCausalLM"],
        "model_type": "lfm2_moe",
        "vocab_size": 65536,
        "hidden_size": 2048,
        "intermediate_size": 7168,
        "moe_intermediate_size": 1792,
        "num_hidden_layers": 24,
        "layer_types": (0..24).map(layer).collect::<Vec<_>>(),
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
