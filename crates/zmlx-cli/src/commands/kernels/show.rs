//! `zmlx kernels show`: what a kernel is, its generated source, what it costs.

use std::fmt::Write;

use zmlx_kernels::catalogue::{Entry, Gradient};
use zmlx_kernels::lang::emit::Dialect;
use zmlx_kernels::raw::RawKernel;
use zmlx_kernels::{Array, Kernel};

use super::inputs::{Inputs, gradient};
use super::list::Row;
use super::timing::copy_bandwidth;
use super::{Target, device_word};
use crate::args::{ShowArgs, SourceLanguage};
use crate::failure::Failure;
use crate::{output, request};

/// Bytes of the copy that stands for the device's bandwidth.
const COPY_BYTES: u64 = 256 << 20;

/// Prints what was asked for.
pub(super) fn run(args: &ShowArgs) -> Result<(), Failure> {
    let bandwidth = request::bandwidth(args.bandwidth.as_deref())?;
    if args.grad && args.source.is_none() && !args.explain {
        return Err(Failure::usage(
            "--grad needs --source or --explain; without them the gradient's text is shown anyway",
        ));
    }
    let target = Target::new(&args.kernel)?;
    let text = match args.source {
        Some(language) => {
            let dialect = match language {
                SourceLanguage::Metal => Dialect::Metal,
                SourceLanguage::Cuda => Dialect::Cuda,
            };
            source(&target, args, dialect)?
        }
        None if args.explain => explain(&target, args, bandwidth)?,
        None => describe(&target)?,
    };
    output::write_stdout(text.as_bytes())
}

fn describe(target: &Target) -> Result<String, Failure> {
    let mut text = String::new();
    // Writing to a String cannot fail.
    if let Target::Entry(entry) = target {
        for (name, value) in Row::new(entry)?.lines() {
            let _ = writeln!(text, "{name:<9} {}", output::one_line(&value));
        }
        let _ = writeln!(text);
    }
    let Some(kernel) = target.kernel()? else {
        text.push_str("Its bodies are written by hand: --source metal and --source cuda print them.\n");
        return Ok(text);
    };
    let _ = writeln!(text, "{}", kernel.text().trim_end());
    if let Target::Entry(Entry { gradient: Gradient::None(_), .. }) = target {
        return Ok(text);
    }
    let _ = match gradient(kernel) {
        Ok(gradient) => writeln!(text, "\ngradient:\n{}", gradient.text().trim_end()),
        Err(failure) => writeln!(text, "\ngradient: none: {}", reason(&failure)),
    };
    Ok(text)
}

fn reason(failure: &Failure) -> String {
    failure.error().map_or_else(String::new, |e| output::one_line(&e.to_string()))
}

/// The kernel that is meant, and its inputs.
fn chosen(target: &Target, args: &ShowArgs) -> Result<(Kernel, Inputs), Failure> {
    let inputs = Inputs::new(target, &args.inputs)?;
    match target.kernel()? {
        Some(kernel) if args.grad => inputs.of_gradient(kernel),
        Some(kernel) => Ok((kernel.clone(), inputs)),
        None => Err(Failure::usage(format_args!(
            "kernel {} is written by hand: only its own --source can be shown",
            target.name()
        ))),
    }
}

fn source(target: &Target, args: &ShowArgs, dialect: Dialect) -> Result<String, Failure> {
    if let Target::Entry(entry) = target
        && let Some(raw) = entry.raw_kernel()
        && !args.grad
    {
        return raw_source(raw, &Inputs::new(target, &args.inputs)?, dialect);
    }
    let (kernel, inputs) = chosen(target, args)?;
    let domain: Option<Vec<usize>> =
        inputs.setting.domain.as_ref().map(|d| d.iter().map(|n| usize::try_from(*n).unwrap_or(0)).collect());
    let source = kernel
        .source_over(dialect, &inputs.dtypes(), &inputs.shapes(), domain.as_deref())
        .map_err(Failure::runtime)?;
    let launch = format!("{:?}", source.grid);
    let names = [source.inputs.join(", "), source.outputs.join(", ")];
    Ok(whole(&source.name, &inputs, names, &launch, (&source.header, &source.body)))
}

fn raw_source(raw: &RawKernel, inputs: &Inputs, dialect: Dialect) -> Result<String, Failure> {
    let text = raw.text(dialect).ok_or_else(|| {
        Failure::usage(format_args!("kernel {} has no body for {}", raw.name(), dialect.name()))
    })?;
    let launch = raw.gpu_launch(&inputs.specs(), &inputs.setting.parameters).map_err(Failure::bad_input)?;
    let launch = format!(
        "grid {:?}, threads a group {:?}, template {:?}, parameters {:?}",
        launch.grid, launch.threadgroup, launch.template, inputs.setting.parameters
    );
    let names = ["as given".to_owned(), "as its body names them".to_owned()];
    Ok(whole(raw.name(), inputs, names, &launch, (&text.header, &text.body)))
}

fn whole(name: &str, inputs: &Inputs, names: [String; 2], launch: &str, parts: (&str, &str)) -> String {
    let [takes, gives] = names;
    let (header, body) = parts;
    format!(
        "// {name}\n// for {}\n// launch: {launch}\n{}\n// Body of the function, whose head MLX writes; inputs: {takes}; \
         outputs: {gives}.\n{}\n",
        inputs.describe(),
        header.trim_end(),
        body.trim_end()
    )
}

fn explain(target: &Target, args: &ShowArgs, given: Option<f64>) -> Result<String, Failure> {
    let (kernel, inputs) = chosen(target, args)?;
    if inputs.needs_setting() && !args.grad {
        return Err(Failure::usage(format_args!(
            "kernel {} runs over a shape that its inputs do not decide: --explain can't show it",
            target.name()
        )));
    }
    let arrays = inputs.placeholders()?;
    let arrays: Vec<&Array> = arrays.iter().collect();
    let device = device_word()?;
    let (rate, said) = match given {
        Some(rate) => (rate, "as given".to_owned()),
        None => {
            let rate = copy_bandwidth(COPY_BYTES).map_err(Failure::runtime)?;
            (rate, format!("measured with a copy of {} on {device}", output::bytes(COPY_BYTES / 2)))
        }
    };
    let text = kernel.explain(&arrays, rate).map_err(Failure::bad_input)?;
    Ok(format!("{text}inputs: {}\nbandwidth: {:.1} GB/s, {said}\n", inputs.describe(), rate / 1e9))
}
