//! `zmlx convert`: a model as a folder in MLX's format.

use std::time::Instant;

use zmlx_models::{ConvertError, ConvertOptions, Flow, Recode, convert};

use crate::args::ConvertArgs;
use crate::failure::Failure;
use crate::interrupt::{Interrupt, SecondPress};
use crate::output::{self, Console, Unit, bytes, count};
use crate::{model, request};

/// Writes the folder.
pub(crate) fn run(args: ConvertArgs, console: &Console) -> Result<(), Failure> {
    let matrices = match request::quantization(&args.quantize, args.mode.as_deref())? {
        Some(quantization) => Recode::Quantize(quantization),
        None if args.dequantize => Recode::Dequantize,
        None => Recode::Keep,
    };
    let dtype = request::dtype_choice(args.dtype);
    let options = ConvertOptions { matrices, dtype, device: request::device_choice(args.device) };
    let source = request::model_source(Some(args.model))?;
    let interrupt = Interrupt::install(SecondPress::Exits)?;
    let path = model::locate(&source, console)?;
    let guard = interrupt.during_reply();
    let started = Instant::now();
    let mut bar = None;
    let written = convert(&path, &args.out, &options, &mut |done, total| {
        bar.get_or_insert_with(|| console.bar("writing", Unit::Bytes, total)).set_position(done);
        if guard.stop_requested() { Flow::Stop } else { Flow::Continue }
    });
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let model = written.map_err(|error| match error {
        ConvertError::Folder(error) => Failure::folder(error),
        ConvertError::Load(error) => Failure::load(error),
        error => Failure::runtime(error),
    })?;
    console.note(&format!(
        "{} parameters, {} in {} file(s), {:.2} bits a parameter, {:.1} s",
        count(model.parameters),
        bytes(model.bytes),
        model.shards.len(),
        model.bits_per_weight(),
        started.elapsed().as_secs_f64()
    ));
    output::write_stdout(format!("{}\n", model.dir.display()).as_bytes())
}
