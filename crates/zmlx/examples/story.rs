//! A story from the embedded model: `cargo run --release -p zmlx --example story`.

use std::io::Write;

use zmlx::prelude::*;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Any model folder will do; this one comes with the crate.
    let folder = zmlx::models::embedded_model_dir()?;
    let model = Model::load(&folder, &LoadOptions::default(), &mut |_| {})?;
    let prompt = model.tokenizer().ok_or("no tokenizer")?.encode("Once upon a time", true)?;
    let options = GenerateOptions { max_tokens: 60, ..GenerateOptions::default() };
    let done = Session::new(&model).generate(&prompt, &options, &mut |event| {
        if let Event::Token { text, .. } = event {
            print!("{text}");
            let _ = std::io::stdout().flush();
        }
        Flow::Continue
    })?;
    println!("\n{} tokens, {} on {}", done.tokens.len(), done.dtype, done.device);
    Ok(())
}
