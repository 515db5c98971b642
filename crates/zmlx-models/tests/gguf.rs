//! GGUF files made here: each gives the tokens and texts of the model folder that it was made from.
//!
//! `ZMLX_GGUF` may name a real SmolLM2-135M-Instruct file, and `ZMLX_GGUF_VOCABULARIES` llama.cpp's folder `models` with
//! vocabularies and the ids that the original tokenizers give.

mod gguf_writer;

use std::path::{Path, PathBuf};

use gguf_writer::{Writer, from_folder};
use serde_json::Value as Json;
use zmlx_models::{
    ChatMessage, ConvertOptions, DeviceChoice, DtypeChoice, Flow, GenerateOptions, LoadOptions, Model,
    Session, convert, inspect,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

fn embedded() -> PathBuf {
    root().join("../../models/tiny-lfm2-moe")
}

fn json(path: &Path) -> Json {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn load(path: &Path) -> Model {
    let options =
        LoadOptions { dtype: DtypeChoice::F32, device: DeviceChoice::Cpu, ..LoadOptions::default() };
    Model::load(path, &options, &mut |_| {}).unwrap()
}

fn tokens(model: &Model, prompt: &[u32], n: usize) -> Vec<u32> {
    let options = GenerateOptions { max_tokens: n, ignore_eos: true, ..GenerateOptions::default() };
    Session::new(model).generate(prompt, &options, &mut |_| Flow::Continue).unwrap().tokens
}

/// The hyperparameters that every architecture has.
fn common(w: &mut Writer, architecture: &str, config: &Json, eps: &str) {
    let int = |key: &str| config[key].as_u64().unwrap() as u32;
    let key = |name: &str| format!("{architecture}.{name}");
    w.u32(&key("block_count"), int("num_hidden_layers"));
    w.u32(&key("context_length"), int("max_position_embeddings"));
    w.u32(&key("embedding_length"), int("hidden_size"));
    w.u32(&key("feed_forward_length"), int("intermediate_size"));
    w.u32(&key("attention.head_count"), int("num_attention_heads"));
    w.u32(&key("attention.head_count_kv"), int("num_key_value_heads"));
    w.f32(&key("attention.layer_norm_rms_epsilon"), config[eps].as_f64().unwrap() as f32);
    w.f32(&key("rope.freq_base"), config["rope_theta"].as_f64().unwrap() as f32);
}

fn renamed(name: &str, pairs: &[(&str, &str)]) -> String {
    let mut name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd");
    for (here, there) in pairs {
        name = name.replace(here, there);
    }
    name
}

/// llama.cpp's factors for Llama 3.1, in double precision.
fn llama3_factors(config: &Json) -> Vec<f32> {
    let scaling = &config["rope_scaling"];
    let number = |key: &str| scaling[key].as_f64().unwrap();
    let (factor, low, high) = (number("factor"), number("low_freq_factor"), number("high_freq_factor"));
    let (context, base) =
        (number("original_max_position_embeddings"), config["rope_theta"].as_f64().unwrap());
    let dims = config["head_dim"].as_i64().unwrap();
    let one = |i: i64| {
        let wave = 2.0 * std::f64::consts::PI * base.powf(2.0 * i as f64 / dims as f64);
        if wave < context / high {
            1.0
        } else if wave > context / low {
            factor
        } else {
            let smooth = (context / wave - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..dims / 2).map(|i| one(i) as f32).collect()
}

fn llama(dir: &Path) -> Writer {
    let config = json(&dir.join("config.json"));
    let names = |name: &str| {
        renamed(
            name,
            &[
                ("self_attn.o_proj", "attn_output"),
                ("self_attn.", "attn_"),
                ("mlp.", "ffn_"),
                ("input_layernorm", "attn_norm"),
                ("post_attention_layernorm", "ffn_norm"),
                ("model.norm", "output_norm"),
                ("lm_head", "output"),
                ("_proj", ""),
            ],
        )
    };
    let mut w = from_folder(dir, "llama", &names);
    common(&mut w, "llama", &config, "rms_norm_eps");
    w.u32("llama.rope.dimension_count", config["head_dim"].as_u64().unwrap() as u32);
    let factors = llama3_factors(&config);
    w.floats("rope_freqs.weight", &[factors.len() as i32], &factors);
    w
}

fn qwen3moe(dir: &Path) -> Writer {
    let config = json(&dir.join("config.json"));
    let names = |name: &str| {
        renamed(
            name,
            &[
                ("self_attn.o_proj", "attn_output"),
                ("self_attn.", "attn_"),
                ("mlp.gate.", "ffn_gate_inp."),
                ("mlp.switch_mlp.gate_proj", "ffn_gate_exps"),
                ("mlp.switch_mlp.up_proj", "ffn_up_exps"),
                ("mlp.switch_mlp.down_proj", "ffn_down_exps"),
                ("input_layernorm", "attn_norm"),
                ("post_attention_layernorm", "ffn_norm"),
                ("model.norm", "output_norm"),
                ("lm_head", "output"),
                ("_proj", ""),
            ],
        )
    };
    let mut w = from_folder(dir, "qwen3moe", &names);
    common(&mut w, "qwen3moe", &config, "rms_norm_eps");
    for (there, here) in [
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
    ] {
        w.u32(&format!("qwen3moe.{there}"), config[here].as_u64().unwrap() as u32);
    }
    w
}

fn lfm2moe(dir: &Path) -> Writer {
    let config = json(&dir.join("config.json"));
    let names = |name: &str| {
        renamed(
            name,
            &[
                ("model.embedding_norm", "token_embd_norm"),
                ("operator_norm", "attn_norm"),
                ("self_attn.out_proj", "attn_output"),
                ("q_layernorm", "q_norm"),
                ("k_layernorm", "k_norm"),
                ("self_attn.", "attn_"),
                (".conv.", ".shortconv."),
                ("feed_forward.gate.", "ffn_gate_inp."),
                ("feed_forward.expert_bias", "exp_probs_b.bias"),
                ("feed_forward.switch_mlp.gate_proj", "ffn_gate_exps"),
                ("feed_forward.switch_mlp.up_proj", "ffn_up_exps"),
                ("feed_forward.switch_mlp.down_proj", "ffn_down_exps"),
                ("feed_forward.", "ffn_"),
                ("q_proj", "q"),
                ("k_proj", "k"),
                ("v_proj", "v"),
                ("gate_proj", "gate"),
                ("up_proj", "up"),
                ("down_proj", "down"),
            ],
        )
    };
    let mut w = from_folder(dir, "lfm2moe", &names);
    common(&mut w, "lfm2moe", &config, "norm_eps");
    let heads = config["num_key_value_heads"].as_i64().unwrap() as i32;
    let of = |t: &Json| if t == "conv" { 0 } else { heads };
    let per_layer: Vec<i32> = config["layer_types"].as_array().unwrap().iter().map(of).collect();
    w.i32s("lfm2moe.attention.head_count_kv", &per_layer);
    for (there, here) in [
        ("expert_count", "num_experts"),
        ("expert_used_count", "num_experts_per_tok"),
        ("expert_feed_forward_length", "moe_intermediate_size"),
        ("leading_dense_block_count", "num_dense_layers"),
        ("shortconv.l_cache", "conv_L_cache"),
    ] {
        w.u32(&format!("lfm2moe.{there}"), config[here].as_u64().unwrap() as u32);
    }
    w.u32("lfm2moe.expert_gating_func", 2);
    w
}

/// Adds a folder's `tokenizer.json`, of a kind that GGUF knows as `pre`.
fn add_tokenizer(w: &mut Writer, dir: &Path, pre: &str) {
    let json = json(&dir.join("tokenizer.json"));
    let vocabulary = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocabulary.len()];
    let mut kinds = vec![1; tokens.len()];
    vocabulary.iter().for_each(|(token, id)| tokens[id.as_u64().unwrap() as usize] = token.clone());
    for added in json["added_tokens"].as_array().unwrap() {
        kinds[added["id"].as_u64().unwrap() as usize] = 3;
    }
    let merges = json["model"]["merges"].as_array().unwrap().iter();
    let merges: Vec<String> =
        merges.map(|m| format!("{} {}", m[0].as_str().unwrap(), m[1].as_str().unwrap())).collect();
    w.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", pre);
    w.texts("tokenizer.ggml.tokens", &tokens).texts("tokenizer.ggml.merges", &merges);
    w.i32s("tokenizer.ggml.token_type", &kinds);
    w.u32("tokenizer.ggml.bos_token_id", 1).u32("tokenizer.ggml.eos_token_id", 4);
    let config = self::json(&dir.join("tokenizer_config.json"));
    w.text("tokenizer.chat_template", config["chat_template"].as_str().unwrap());
}

fn embedded_writer() -> Writer {
    let mut w = lfm2moe(&embedded());
    add_tokenizer(&mut w, &embedded(), "gpt-2");
    w
}

fn save(dir: &tempfile::TempDir, w: &Writer) -> PathBuf {
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, w.bytes()).unwrap();
    path
}

#[test]
fn tokens_of_llama_and_qwen3moe_are_those_of_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    for (name, writer) in [("llama-q4", llama as fn(&Path) -> Writer), ("qwen3_moe-q4", qwen3moe)] {
        let folder = root().join("tests/oracle").join(name);
        let model = load(&save(&dir, &writer(&folder)));
        assert!(model.tokenizer().is_none(), "{name}");
        for case in json(&folder.join("golden.json"))["f32"].as_array().unwrap() {
            let numbers = |v: &Json| serde_json::from_value::<Vec<u32>>(v.clone()).unwrap();
            let (prompt, want) = (numbers(&case["prompt"]), numbers(&case["tokens"]));
            assert_eq!(tokens(&model, &prompt, want.len()), want, "{name} after {} tokens", case["length"]);
        }
    }
}

#[test]
fn the_embedded_model_is_the_same_model_as_gguf() {
    let dir = tempfile::tempdir().unwrap();
    let path = save(&dir, &embedded_writer());
    let (model, whole) = (load(&path), load(&embedded()));
    let golden = json(&root().join("../../fixtures/tiny-lfm2-moe.golden.json"));
    for case in golden["cases"].as_array().unwrap() {
        let numbers = |v: &Json| serde_json::from_value::<Vec<u32>>(v.clone()).unwrap();
        let (prompt, want) = (numbers(&case["prompt_ids"]), numbers(&case["tokens"]));
        assert_eq!(tokens(&model, &prompt, 60), want[..60], "prompt {}", case["prompt"]);
    }
    assert_eq!(model.info().parameters_total, whole.info().parameters_total);
    assert_eq!(model.info().parameters_active, whole.info().parameters_active);
    assert_eq!(model.info().context_length, whole.info().context_length);
    assert_eq!(model.eos_token_ids(), [4]);
    assert_eq!(inspect(&path).unwrap().quantization.len(), model.info().quantization.len());

    let (here, there) = (model.tokenizer().unwrap(), whole.tokenizer().unwrap());
    let messages = [("user", "Tell me of a fox."), ("assistant", "Once")];
    let messages = messages.map(|(role, text)| ChatMessage::new(role, text));
    let chat = here.apply_chat_template(&messages, true).unwrap();
    assert_eq!(chat, there.apply_chat_template(&messages, true).unwrap());
    for text in
        ["Once upon a time", "  Ünïcode 日本語, it's 1234!\n\n\t x", "<|im_start|>a<|im_end|>", "", &chat]
    {
        for special in [false, true] {
            let ids = here.encode(text, special).unwrap();
            assert_eq!(ids, there.encode(text, special).unwrap(), "{text:?}");
            assert_eq!(here.decode(&ids, false).unwrap(), there.decode(&ids, false).unwrap(), "{text:?}");
            assert_eq!(here.decode(&ids, true).unwrap(), there.decode(&ids, true).unwrap(), "{text:?}");
        }
    }
}

#[test]
fn converted_files_are_the_same_models() {
    let dir = tempfile::tempdir().unwrap();
    let options = ConvertOptions { device: DeviceChoice::Cpu, ..ConvertOptions::default() };
    let to_folder = |w: &Writer, name: &str| {
        let (path, folder) = (save(&dir, w), dir.path().join(name));
        convert(&path, &folder, &options, &mut |_, _| Flow::Continue).map(|_| (load(&path), folder))
    };
    let (file, folder) = to_folder(&embedded_writer(), "embedded").unwrap();
    let model = load(&folder);
    assert_eq!(tokens(&model, &[1, 17, 5], 40), tokens(&file, &[1, 17, 5], 40));
    assert_eq!(model.eos_token_ids(), file.eos_token_ids());
    assert_eq!(format!("{:?}", model.info().quantization), format!("{:?}", file.info().quantization));
    let (here, there) = (model.tokenizer().unwrap(), file.tokenizer().unwrap());
    let messages = [ChatMessage::new("user", "Tell me of a fox.")];
    let chat = there.apply_chat_template(&messages, true).unwrap();
    assert_eq!(here.apply_chat_template(&messages, true).unwrap(), chat);
    for text in ["  Ünïcode 日本語, it's 1234!\n\n\t x", "<|im_start|>a<|im_end|>", &chat] {
        let ids = there.encode(text, true).unwrap();
        assert_eq!(here.encode(text, true).unwrap(), ids, "{text:?}");
        assert_eq!(here.decode(&ids, true).unwrap(), there.decode(&ids, true).unwrap(), "{text:?}");
    }
    let (file, folder) = to_folder(&qwen3moe(&root().join("tests/oracle/qwen3_moe-q4")), "qwen3").unwrap();
    assert_eq!(tokens(&load(&folder), &[3, 9], 24), tokens(&file, &[3, 9], 24));
    assert!(!folder.join("tokenizer.json").exists());

    // No configuration can say what its tensor of rotary factors says.
    let error = to_folder(&llama(&root().join("tests/oracle/llama-q4")), "llama").unwrap_err().to_string();
    assert!(error.contains("rotary factors"), "{error}");
    assert!(!dir.path().join("llama").exists());
}

#[test]
fn texts_begin_and_end_as_the_file_says() {
    let dir = tempfile::tempdir().unwrap();
    let mut w = embedded_writer();
    let ids = |w: &Writer| load(&save(&dir, w)).tokenizer().unwrap().encode("a fox", true).unwrap();
    let plain = ids(&w);
    let around = |first: &[u32], last: &[u32]| [first, &plain, last].concat();
    w.bool("tokenizer.ggml.add_bos_token", true);
    assert_eq!(ids(&w), around(&[1], &[]));
    w.bool("tokenizer.ggml.add_eos_token", true);
    assert_eq!(ids(&w), around(&[1], &[4]));
    // These begin with it unless the file says otherwise.
    w.remove("tokenizer.ggml.add_bos_token").remove("tokenizer.ggml.add_eos_token");
    w.text("tokenizer.ggml.pre", "llama-bpe");
    assert_eq!(ids(&w), around(&[1], &[]));
    w.bool("tokenizer.ggml.add_bos_token", false);
    assert_eq!(ids(&w), plain);
}

#[test]
fn the_real_model_where_it_is_at_hand() {
    let Some(path) = std::env::var_os("ZMLX_GGUF") else { return };
    let model = load(Path::new(&path));
    assert_eq!(model.info().parameters_total, 134_515_008);
    assert_eq!(model.eos_token_ids(), [2]);
    let tokenizer = model.tokenizer().unwrap();
    let message = ChatMessage::new("user", "What is the capital of France?");
    let text = tokenizer.apply_chat_template(&[message], true).unwrap();
    let prompt = tokenizer.encode(&text, false).unwrap();
    assert_eq!(prompt[0], 1);
    assert_eq!(tokenizer.decode(&prompt, false).unwrap(), text);
    let done = Session::new(&model).generate(&prompt, &GenerateOptions::default(), &mut |_| Flow::Continue);
    let text = done.unwrap().text;
    assert!(text.contains("Paris"), "{text}");
}

#[test]
fn vocabularies_of_llama_cpp_where_they_are_at_hand() {
    let Some(folder) = std::env::var_os("ZMLX_GGUF_VOCABULARIES") else { return };
    for name in ["gpt-2", "qwen2", "llama-bpe", "starcoder", "refact"] {
        let file = |end: &str| Path::new(&folder).join(format!("ggml-vocab-{name}.gguf{end}"));
        let texts = std::fs::read_to_string(file(".inp")).unwrap();
        let ids = std::fs::read_to_string(file(".out")).unwrap();
        let tokenizer = zmlx_models::gguf::read_tokenizer(&file("")).unwrap().unwrap();
        let texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
        let ids: Vec<&str> = ids.split('\n').collect();
        assert!(texts.len() > 40 && ids.len() >= texts.len(), "{name}");
        for (text, ids) in texts.iter().zip(ids) {
            let want: Vec<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
            assert_eq!(tokenizer.encode(text, false).unwrap(), want, "{name}: {text:?}");
        }
    }
}
