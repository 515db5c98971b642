//! Loads, patches, generates: `cargo run --release -p zmlx --example inference_smoke -- [DIR]`.

use zmlx::prelude::*;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Any model folder or GGUF file will do; the embedded model if none is named.
    let folder = match std::env::args_os().nth(1) {
        Some(dir) => dir.into(),
        None => zmlx::models::embedded_model_dir()?,
    };
    let mut model = Model::load(&folder, &LoadOptions::default(), &mut |_| {})?;
    zmlx::patch(&mut model, &PatchOptions::default())?;
    let prompt = model.tokenizer().ok_or("no tokenizer")?.encode("Once upon a time", true)?;
    let options = GenerateOptions { max_tokens: 64, ..GenerateOptions::default() };
    let done = Session::new(&model).generate(&prompt, &options, &mut |_| Flow::Continue)?;
    println!("{}\n\n{:.0} tokens a second", done.text, done.decode_tps);
    println!("{}", model.patch_report().ok_or("not patched")?);
    Ok(())
}
