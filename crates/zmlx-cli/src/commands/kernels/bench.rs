//! `zmlx kernels bench`: kernels of the catalogue beside plain MLX ops, in one run.

use serde::Serialize;
use zmlx_kernels::Array;
use zmlx_kernels::catalogue::Entry;

use super::inputs::Inputs;
use super::timing::{Job, copy_job};
use super::{Target, device_word, entry, set_device};
use crate::args::BenchArgs;
use crate::failure::Failure;
use crate::output::{self, Console};

/// What is timed when no name is given.
const USUAL: [&str; 10] = [
    "softmax",
    "rms_norm",
    "add_rms_norm",
    "silu",
    "gelu_tanh",
    "mish",
    "swiglu2",
    "cross_entropy",
    "cumsum",
    "top_k_gating",
];
const SAMPLES: u32 = 11;
/// Rounds that are not counted.
const WARM_UP: u32 = 1;

#[derive(Serialize)]
struct Record {
    device: &'static str,
    device_name: Option<String>,
    samples: u32,
    kernels: Vec<Measured>,
}

/// What was measured of one kernel: medians.
#[derive(Serialize)]
struct Measured {
    kernel: &'static str,
    inputs: Vec<String>,
    /// Compulsory: inputs once, outputs once.
    bytes: u64,
    ms: f64,
    gb_per_s: f64,
    /// Of a copy that moves as many bytes.
    copy_gb_per_s: f64,
    share_of_copy: f64,
    above_copy: bool,
    plain_mlx_ms: Option<f64>,
    /// Time of plain MLX over the kernel's.
    speedup: Option<f64>,
    remarks: Vec<String>,
}

/// Times what was named and prints a line for each.
pub(super) fn run(args: &BenchArgs, console: &Console) -> Result<(), Failure> {
    let samples = samples(args.samples.as_deref())?;
    let names = args.kernels.iter().map(String::as_str);
    let entries: Vec<&'static Entry> = if args.kernels.is_empty() {
        USUAL.into_iter().map(entry).collect::<Result<_, _>>()?
    } else {
        names.map(entry).collect::<Result<_, _>>()?
    };
    // A shape that does not fit is said before anything is timed.
    let chosen = entries.into_iter().map(|e| {
        let inputs = Inputs::new(&Target::Entry(e), &args.inputs)?;
        let bytes = inputs.traffic(&Target::Entry(e))?;
        inputs.check_size(bytes)?;
        Ok((e, inputs, bytes))
    });
    let chosen = chosen.collect::<Result<Vec<_>, Failure>>()?;
    set_device(args.device)?;
    let device = device_word()?;
    let device_name = zmlx_mlx::runtime::device_name().ok();
    if !args.json {
        console.note(&format!(
            "{device}{}: medians of {samples} samples; ours, plain MLX and a copy of as many bytes take turns",
            device_name.as_ref().map_or_else(String::new, |n| format!(" ({n})"))
        ));
        output::write_stdout(format!("{}\n", head()).as_bytes())?;
    }
    let mut kernels = Vec::new();
    for (entry, inputs, bytes) in &chosen {
        let measured = measure(entry, inputs, *bytes, samples)?;
        if !args.json {
            output::write_stdout(format!("{}\n", line(&measured)).as_bytes())?;
        }
        kernels.push(measured);
    }
    if args.json {
        return output::write_json(&Record { device, device_name, samples, kernels });
    }
    for kernel in &kernels {
        for remark in &kernel.remarks {
            output::write_stdout(format!("* {}: {remark}\n", kernel.kernel).as_bytes())?;
        }
    }
    Ok(())
}

fn samples(text: Option<&str>) -> Result<u32, Failure> {
    let Some(text) = text else { return Ok(SAMPLES) };
    let number = text.trim().parse::<u32>().ok().filter(|n| (3..=10_000).contains(n));
    number.ok_or_else(|| {
        Failure::usage(format_args!("--samples must be a whole number from 3 to 10000, not '{text}'"))
    })
}

fn measure(entry: &'static Entry, inputs: &Inputs, bytes: u64, samples: u32) -> Result<Measured, Failure> {
    let arrays = inputs.arrays()?;
    let given: Vec<&Array> = arrays.iter().collect();
    let mut remarks = Vec::new();
    let mut ours = Job::new(Box::new(|| entry.call(&given, &inputs.setting))).map_err(Failure::runtime)?;
    let reference = || Ok((entry.reference)(&arrays, &inputs.setting)?);
    let mut plain = match Job::new(Box::new(reference)) {
        Ok(job) => Some(job),
        Err(error) => {
            remarks.push(format!("plain MLX refuses this call: {}", output::one_line(&error.to_string())));
            None
        }
    };
    let (mut copy, copied) = copy_job(bytes).map_err(Failure::runtime)?;
    for round in 0..samples + WARM_UP {
        ours.sample(round >= WARM_UP).map_err(Failure::runtime)?;
        if let Some(plain) = &mut plain {
            plain.sample(round >= WARM_UP).map_err(Failure::runtime)?;
        }
        copy.sample(round >= WARM_UP).map_err(Failure::runtime)?;
    }
    let (seconds, plain) = (ours.median(), plain.map(|p| p.median()));
    let (rate, copy_rate) = (bytes as f64 / seconds, copied as f64 / copy.median());
    let share = rate / copy_rate;
    if inputs.own_shapes {
        remarks.push(
            "shapes of its largest case in the catalogue, too small for more than the time of a call".into(),
        );
    }
    if share > 1.0 {
        remarks.push(
            "above the copy's bandwidth: less is written than read, the data stay in a cache, or the copy was \
             disturbed; a larger --shape or more --samples tells"
                .into(),
        );
    }
    Ok(Measured {
        kernel: &entry.name,
        inputs: inputs.given.iter().map(|g| format!("{} {}", g.name, g.ty())).collect(),
        bytes,
        ms: seconds * 1e3,
        gb_per_s: rate / 1e9,
        copy_gb_per_s: copy_rate / 1e9,
        share_of_copy: share,
        above_copy: share > 1.0,
        plain_mlx_ms: plain.map(|p| p * 1e3),
        speedup: plain.map(|p| p / seconds),
        remarks,
    })
}

fn head() -> String {
    format!(
        "{:22} {:>20} {:>10} {:>9} {:>10} {:>7} {:>10} {:>9}",
        "kernel", "first input", "ms", "GB/s", "copy GB/s", "share", "plain ms", "speedup"
    )
}

fn line(m: &Measured) -> String {
    let plain = m.plain_mlx_ms.map_or_else(|| "-".into(), |p| format!("{p:.3}"));
    let speedup = m.speedup.map_or_else(|| "-".into(), |s| format!("{s:.2}x"));
    let first = m.inputs.first().and_then(|i| i.split_once(' ')).map_or("", |(_, ty)| ty);
    let share = format!("{:.0}%{}", 100.0 * m.share_of_copy, if m.above_copy { "*" } else { "" });
    format!(
        "{:22} {first:>20} {:10.3} {:9.2} {:10.2} {share:>7} {plain:>10} {speedup:>9}",
        m.kernel, m.ms, m.gb_per_s, m.copy_gb_per_s
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_have_a_range() {
        assert_eq!(samples(None).ok(), Some(SAMPLES));
        assert_eq!(samples(Some("3")).ok(), Some(3));
        for bad in ["2", "0", "-1", "10001", "many", ""] {
            assert_eq!(samples(Some(bad)).err().map(|f| f.code()), Some(2), "{bad}");
        }
    }

    #[test]
    fn usual_names_are_in_the_catalogue() {
        for name in USUAL {
            assert!(entry(name).is_ok(), "{name}");
        }
    }

    #[test]
    fn a_figure_above_the_copy_is_marked() {
        let measured = |share: f64| Measured {
            kernel: "softmax",
            inputs: vec!["x f32 [2, 3]".into()],
            bytes: 48,
            ms: 1.0,
            gb_per_s: 1.0,
            copy_gb_per_s: 1.0,
            share_of_copy: share,
            above_copy: share > 1.0,
            plain_mlx_ms: None,
            speedup: None,
            remarks: Vec::new(),
        };
        assert!(line(&measured(1.25)).contains("125%*"));
        assert!(line(&measured(0.5)).contains(" 50% "));
    }
}
