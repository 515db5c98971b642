//! `zmlx doctor`: which MLX library was found and what it can run on.

use std::fmt::Write;

use serde::Serialize;
use zmlx_mlx::runtime::{self, Doctor};

use crate::args::DoctorArgs;
use crate::failure::Failure;
use crate::output::{self, Console};

#[derive(Serialize)]
struct Record<'a> {
    zmlx: &'static str,
    #[serde(flatten)]
    mlx: &'a Doctor,
}

/// Prints the report; fails when no backend is usable.
pub(crate) fn run(args: &DoctorArgs, console: &Console) -> Result<(), Failure> {
    if let Some(variant) = &args.fetch {
        let variant = Some(variant.as_str()).filter(|v| !v.is_empty());
        let library = runtime::fetch(variant).map_err(Failure::runtime)?;
        console.note(&format!("fetched {}", library.display()));
    }
    let found = runtime::doctor();
    if args.json {
        output::write_json(&Record { zmlx: env!("CARGO_PKG_VERSION"), mlx: &found })?;
    } else {
        output::write_stdout(report(&found).as_bytes())?;
    }
    if found.backends.iter().any(|backend| backend.available) {
        return Ok(());
    }
    let why = found.error.as_deref().unwrap_or("see the report above");
    Err(Failure::runtime(anyhow::anyhow!("no backend is usable: {why}")))
}

fn report(found: &Doctor) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name:<9} {}", output::one_line(value));
    };
    row("zmlx", env!("CARGO_PKG_VERSION"));
    row("mlx", found.version.as_deref().unwrap_or("not found"));
    let library =
        found.library.as_ref().map_or_else(|| "not found".into(), |path| path.display().to_string());
    row("library", &library);
    row("found by", &found.found_by);
    for backend in &found.backends {
        let mut value = String::from(if backend.available { "available" } else { "not available" });
        if let Some(device) = &backend.device_name {
            let _ = write!(value, ", {device}");
        }
        if let Some(memory) = backend.memory_bytes {
            let _ = write!(value, ", {} memory", output::bytes(memory));
        }
        if let Some(missing) = &backend.missing {
            let _ = write!(value, ": {missing}");
        }
        row(backend.name, &value);
    }
    if let Some(error) = &found.error {
        row("error", error);
    }
    text
}
