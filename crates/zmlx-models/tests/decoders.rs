//! Families with plain attention in every layer, and LFM2: configurations that cannot be, layouts of published checkpoints.
//! Tokens and logits: `oracle.rs`.

mod folders;

use folders::{check, copy, edit_config, edit_weights, experts_apart, refused};
use serde_json::{Value as Json, json};
use zmlx_mlx::Array;

type Edit = fn(&mut Json);
type Case = (Edit, &'static [&'static str]);

fn all_refused(name: &str, cases: &[Case]) {
    for (edit, words) in cases {
        let dir = copy(name);
        edit_config(dir.path(), edit);
        refused(dir.path(), words);
    }
}

fn remove(config: &mut Json, key: &str) {
    assert!(config.as_object_mut().unwrap().remove(key).is_some(), "no {key}");
}

#[test]
fn dense_configurations_that_cannot_be() {
    all_refused(
        "qwen2-q4",
        &[
            (|c| c["use_sliding_window"] = json!(true), &["use_sliding_window", "false"]),
            (|c| c["num_key_value_heads"] = json!(3), &["num_attention_heads", "divide"]),
            (|c| remove(c, "vocab_size"), &["vocab_size", "missing"]),
            (|c| c["vocab_size"] = json!(255), &["embed_tokens", "expected shape"]),
            (
                |c| c["quantization"]["model.layers.0.mlp.up_proj"] = json!({ "mode": "int4" }),
                &["model.layers.0.mlp.up_proj", "int4", "unknown"],
            ),
        ],
    );
    all_refused(
        "qwen3-q4",
        &[
            (|c| remove(c, "head_dim"), &["head_dim", "missing"]),
            (|c| remove(c, "rope_theta"), &["rope_theta", "missing"]),
            (|c| remove(c, "tie_word_embeddings"), &["tie_word_embeddings", "missing"]),
            (|c| remove(&mut c["rope_scaling"], "factor"), &["rope_scaling.factor", "missing"]),
            (|c| c["head_dim"] = json!(16), &["expected shape"]),
        ],
    );
    all_refused(
        "mistral-q4",
        &[
            (|c| c["layer_types"] = json!(["sliding_attention"]), &["layer_types", "sliding"]),
            (|c| c["head_dim"] = json!(31), &["even"]),
            (|c| c["rms_norm_eps"] = json!("small"), &["rms_norm_eps", "small"]),
        ],
    );
    all_refused(
        "phi3-q4",
        &[
            (|c| c["rope_scaling"]["long_factor"] = json!([1, 2]), &["rope_scaling.long_factor", "half"]),
            (|c| c["partial_rotary_factor"] = json!(2.0), &["partial_rotary_factor", "from 2 to 16"]),
            (
                |c| remove(c, "original_max_position_embeddings"),
                &["original_max_position_embeddings", "missing"],
            ),
            (|c| c["num_key_value_heads"] = json!(4), &["qkv_proj", "expected shape"]),
        ],
    );
    all_refused(
        "lfm2-q4",
        &[
            (|c| remove(c, "block_ff_dim"), &["intermediate_size", "missing"]),
            (|c| remove(c, "block_auto_adjust_ff_dim"), &["block_auto_adjust_ff_dim", "missing"]),
            (|c| c["block_dim"] = json!(32), &["block_dim", "hidden_size", "64"]),
            (|c| c["block_ffn_dim_multiplier"] = json!(1e9), &["block_ffn_dim_multiplier", "2^24"]),
            (|c| c["full_attn_idxs"] = json!([9]), &["full_attn_idxs", "layer numbers"]),
            (|c| c["conv_L_cache"] = json!(0), &["conv_L_cache"]),
        ],
    );
}

#[test]
fn configurations_of_mistral3_that_cannot_be() {
    all_refused(
        "mistral3-q4",
        &[
            (|c| remove(c, "text_config"), &["text_config", "missing"]),
            (|c| c["text_config"] = json!([1]), &["text_config", "object"]),
            (|c| c["text_config"]["model_type"] = json!("mistral4"), &["text_config.model_type", "mistral4"]),
            (|c| remove(&mut c["text_config"], "hidden_size"), &["text_config.hidden_size", "missing"]),
            (
                |c| remove(&mut c["text_config"], "rope_parameters"),
                &["text_config.rope_parameters", "missing"],
            ),
            (
                |c| remove(&mut c["text_config"]["rope_parameters"], "llama_4_scaling_beta"),
                &["text_config.rope_parameters.llama_4_scaling_beta", "missing"],
            ),
            (
                |c| c["text_config"]["rope_parameters"]["original_max_position_embeddings"] = json!(0),
                &["text_config.rope_parameters.original_max_position_embeddings", "above 0"],
            ),
        ],
    );
}

#[test]
fn sparse_configurations_that_cannot_be() {
    all_refused(
        "mixtral-q4",
        &[
            (|c| remove(c, "num_local_experts"), &["num_local_experts", "missing"]),
            (|c| c["num_experts_per_tok"] = json!(9), &["num_experts_per_tok", "9 of 8 experts"]),
            (|c| c["num_local_experts"] = json!(4), &["expected shape"]),
            (|c| c["rope_scaling"] = json!({ "type": "linear", "factor": 2 }), &["rope_scaling", "plain"]),
        ],
    );
    all_refused(
        "olmoe-q4",
        &[
            (|c| c["clip_qkv"] = json!(8.0), &["clip_qkv", "not supported"]),
            (|c| c["mlp_bias"] = json!(true), &["mlp_bias", "not supported"]),
            (|c| c["num_experts"] = json!("many"), &["num_experts", "many"]),
            (|c| c["num_attention_heads"] = json!(3), &["num_attention_heads", "divide"]),
            (|c| c["attention_bias"] = json!(true), &["missing", "q_proj.bias"]),
        ],
    );
    all_refused(
        "glm4_moe-q4",
        &[
            (|c| c["n_group"] = json!(3), &["n_group", "3 groups of 8 experts"]),
            (|c| c["n_group"] = json!(8), &["n_group", "8 groups of 8 experts"]),
            (|c| c["topk_group"] = json!(5), &["topk_group", "5 of 2 groups"]),
            (|c| c["topk_method"] = json!("greedy"), &["topk_method", "noaux_tc"]),
            (|c| c["scoring_func"] = json!("softmax"), &["scoring_func", "sigmoid"]),
            (|c| c["partial_rotary_factor"] = json!(0.1), &["partial_rotary_factor", "even"]),
            (|c| remove(c, "use_qk_norm"), &["use_qk_norm", "missing"]),
            (|c| c["use_qk_norm"] = json!(false), &["extra tensor", "k_norm"]),
            (|c| c["first_k_dense_replace"] = json!(-1), &["first_k_dense_replace"]),
            (|c| c["first_k_dense_replace"] = json!(0), &["missing", "layers.0.mlp"]),
            (|c| c["n_shared_experts"] = json!(2), &["shared_experts", "expected shape"]),
            (
                |c| {
                    (c["n_shared_experts"], c["moe_intermediate_size"]) = (json!(1 << 24), json!(1 << 24));
                },
                &["n_shared_experts", "too wide"],
            ),
            (|c| c["num_experts_per_tok"] = json!(9), &["num_experts_per_tok", "9 of 8 experts"]),
        ],
    );
}

#[test]
fn published_layouts_give_the_same_tokens() {
    let dir = copy("mixtral-q4");
    edit_weights(dir.path(), |w| {
        experts_apart(w, 8, |name| {
            name.replace("gate_proj", "w1").replace("down_proj", "w2").replace("up_proj", "w3")
        })
    });
    check(dir.path());

    let dir = copy("olmoe-q4");
    edit_weights(dir.path(), |w| experts_apart(w, 8, str::to_owned));
    check(dir.path());

    // A layer past the last predicts further tokens.
    let dir = copy("glm4_moe-q4");
    edit_weights(dir.path(), |w| {
        experts_apart(w, 8, str::to_owned);
        w.insert("model.layers.3.eh_proj.weight".to_owned(), Array::scalar(1.0f32).unwrap());
    });
    check(dir.path());

    // Kernels as `[C, 1, K]`.
    let dir = copy("lfm2-q4");
    edit_weights(dir.path(), |w| {
        for (name, array) in w.iter_mut().filter(|(name, _)| name.ends_with("conv.conv.weight")) {
            *array = array.transpose(&[0, 2, 1]).unwrap().contiguous().unwrap();
            assert_eq!(array.shape()[1], 1, "{name}");
        }
    });
    check(dir.path());

    // What reads images beside the text part, and the two orders of prefixes.
    for prefix in ["model.language_model.", "language_model.model."] {
        let dir = copy("mistral3-q4");
        edit_weights(dir.path(), |w| {
            for (name, array) in std::mem::take(w) {
                w.insert(name.replace("language_model.model.", prefix), array);
            }
            for name in ["vision_tower.patch_conv.weight", "multi_modal_projector.norm.weight"] {
                w.insert(name.to_owned(), Array::scalar(1.0f32).unwrap());
            }
        });
        check(dir.path());
    }
    let dir = copy("mistral3-q4");
    edit_weights(dir.path(), |w| {
        let name = "language_model.model.layers.0.mlp.down_proj.weight_scale_inv";
        w.insert(name.to_owned(), Array::scalar(1.0f32).unwrap());
    });
    refused(dir.path(), &["weight_scale_inv", "convert"]);
}
