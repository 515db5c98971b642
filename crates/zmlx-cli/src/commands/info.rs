//! `zmlx info`: what a model folder or GGUF file holds, from its headers alone.

use std::fmt::Write;

use zmlx_models::{Blueprint, LayerInfo, ModelInfo, QuantizationInfo, SizesFrom};

use crate::args::InfoArgs;
use crate::failure::Failure;
use crate::interrupt::{Interrupt, SecondPress};
use crate::output::{self, Console, bytes, count, grouped};
use crate::{model, request};

/// Prints the description.
pub(crate) fn run(args: InfoArgs, console: &Console) -> Result<(), Failure> {
    let source = request::model_source(args.model)?;
    // A download can be long.
    let _interrupt = Interrupt::install(SecondPress::Exits)?;
    let folder = if args.json {
        model::locate(&source, &console.without_progress())?
    } else {
        model::locate(&source, console)?
    };
    let Blueprint { info, sizes, .. } = Blueprint::read(&folder).map_err(Failure::load)?;
    if args.json {
        output::write_json(&info)
    } else {
        let place = if folder.is_file() { "file" } else { "folder" };
        output::write_stdout(describe(place, &folder.display().to_string(), &info, sizes).as_bytes())
    }
}

fn describe(place: &'static str, path: &str, info: &ModelInfo, sizes: SizesFrom) -> String {
    let file_size = match sizes {
        SizesFrom::Headers => bytes(info.file_bytes),
        SizesFrom::Config => format!("{}, by config.json: there are no weight files", bytes(info.file_bytes)),
    };
    let mut rows = vec![
        (place, path.to_owned()),
        ("family", info.family.clone()),
        (
            "parameters",
            format!(
                "{} total, {} active per token",
                count(info.parameters_total),
                count(info.parameters_active)
            ),
        ),
        ("bytes per token", bytes(info.bytes_per_token)),
        ("file size", file_size),
        ("quantisation", quantization(&info.quantization)),
        ("layers", layers(&info.layers, |layer| &layer.mixer)),
        ("feed-forward", layers(&info.layers, |layer| &layer.feed_forward)),
        ("hidden size", grouped(info.hidden_size as u64)),
        (
            "context",
            info.context_length
                .map_or_else(|| "not stated".into(), |n| format!("{} tokens", grouped(n as u64))),
        ),
        ("vocabulary", grouped(info.vocab_size as u64)),
    ];
    if let Some((total, active)) = info.experts {
        rows.push(("experts", format!("{total}, {active} active per token")));
    }
    let mut text = String::new();
    for (name, value) in rows {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<16} {}", output::one_line(&value));
    }
    text
}

fn quantization(settings: &[QuantizationInfo]) -> String {
    if settings.is_empty() {
        return "none".into();
    }
    let words: Vec<String> = settings
        .iter()
        .map(|setting| {
            let held = format!("{} modules, {}", setting.modules, bytes(setting.bytes));
            if setting.mode == "none" {
                format!("none ({held})")
            } else {
                format!("{} {}-bit group {} ({held})", setting.mode, setting.bits, setting.group_size)
            }
        })
        .collect();
    words.join("; ")
}

/// `6: conv conv full_attention ...`; long models in runs: `40: conv x2, full_attention, ...`.
fn layers(layers: &[LayerInfo], kind: impl Fn(&LayerInfo) -> &String) -> String {
    let kinds: Vec<&str> = layers.iter().map(|layer| kind(layer).as_str()).collect();
    let listed = if kinds.len() <= 8 {
        kinds.join(" ")
    } else {
        kinds
            .chunk_by(|a, b| a == b)
            .map(|run| match run {
                [one] => (*one).to_owned(),
                _ => format!("{} x{}", run[0], run.len()),
            })
            .collect::<Vec<_>>()
            .join(", ")
    };
    format!("{}: {listed}", kinds.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stack(mixers: &[&str]) -> Vec<LayerInfo> {
        let layer = |(index, mixer): (usize, &&str)| LayerInfo {
            index,
            mixer: (*mixer).into(),
            feed_forward: if index == 0 { "dense" } else { "moe" }.into(),
        };
        mixers.iter().enumerate().map(layer).collect()
    }

    #[test]
    fn layers_are_compact() {
        let short = stack(&["conv", "conv", "full_attention"]);
        assert_eq!(layers(&short, |layer| &layer.mixer), "3: conv conv full_attention");
        let long = stack(&["conv"; 12]);
        assert_eq!(layers(&long, |layer| &layer.mixer), "12: conv x12");
        assert_eq!(layers(&long, |layer| &layer.feed_forward), "12: dense, moe x11");
        assert_eq!(layers(&[], |layer| &layer.mixer), "0: ");
    }

    #[test]
    fn every_distinct_setting_is_listed() {
        let setting = |mode: &str, bits, group_size| QuantizationInfo {
            mode: mode.into(),
            bits,
            group_size,
            modules: 3,
            bytes: 1500,
        };
        assert_eq!(quantization(&[]), "none");
        assert_eq!(
            quantization(&[setting("affine", 4, 64), setting("none", 16, 0)]),
            "affine 4-bit group 64 (3 modules, 1.5 kB); none (3 modules, 1.5 kB)"
        );
    }
}
