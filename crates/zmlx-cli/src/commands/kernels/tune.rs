//! `zmlx kernels tune`: launch parameters that are measured and kept.

use zmlx_kernels::Array;
use zmlx_kernels::tuning::{self, TUNE_VARIABLE};

use super::inputs::Inputs;
use super::{Target, device_word, set_device};
use crate::args::TuneArgs;
use crate::failure::Failure;
use crate::output;

/// Tunes, prints the decision with its evidence, and says where it is kept.
pub(super) fn run(args: &TuneArgs) -> Result<(), Failure> {
    let target = Target::new(&args.kernel)?;
    let name = target.name();
    let Some(kernel) = target.kernel()? else {
        return Err(Failure::usage(format_args!("kernel {name} is written by hand: it has nothing to tune")));
    };
    let inputs = Inputs::new(&target, &args.inputs)?;
    if inputs.needs_setting() {
        return Err(Failure::usage(format_args!(
            "kernel {name} runs over a shape that its inputs do not decide: such kernels can't be tuned"
        )));
    }
    inputs.check_size(inputs.traffic(&target)?)?;
    set_device(args.device)?;
    let device = device_word()?;
    let arrays = inputs.arrays()?;
    let arrays: Vec<&Array> = arrays.iter().collect();
    let decision = kernel.tune(&arrays, &zmlx_tune::Settings::default()).map_err(Failure::runtime)?;
    let kept = match tuning::directory() {
        Some(folder) => format!("stored in {}", folder.display()),
        None => format!("not stored: {TUNE_VARIABLE} is off, or there is no cache folder"),
    };
    let text = format!("{}, on {device}\n{decision}\n{kept}\n", inputs.describe());
    output::write_stdout(text.as_bytes())
}
