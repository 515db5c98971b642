//! `zmlx doctor`: which MLX library was found and what it can run on.

use std::fmt::Write;
use std::path::PathBuf;

use serde::Serialize;
use zmlx_graph::cuda::{self, CudaError};
use zmlx_mlx::mac::Mac;
use zmlx_mlx::runtime::{self, Doctor};

use crate::args::DoctorArgs;
use crate::failure::Failure;
use crate::output::{self, Console};

#[derive(Serialize)]
struct Record<'a> {
    zmlx: &'static str,
    #[serde(flatten)]
    mlx: &'a Doctor,
    /// What decode past MLX needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    cuda: Option<&'a Cuda>,
}

/// What decode on an NVIDIA GPU past MLX needs beside the CUDA library.
#[derive(Serialize)]
struct Cuda {
    gpu: Needed,
    nvrtc: Needed,
}

/// Something that is there, or not.
#[derive(Serialize)]
struct Needed {
    found: bool,
    /// What it is, or what to do about its absence.
    says: String,
}

impl Needed {
    fn new(found: Result<String, CudaError>) -> Self {
        match found {
            Ok(says) => Self { found: true, says },
            Err(error) => Self { found: false, says: error.to_string() },
        }
    }
}

impl Cuda {
    /// Nothing on systems that NVIDIA makes no drivers for.
    fn look() -> Option<Self> {
        let gpu = |d: cuda::DeviceInfo| {
            let (major, minor) = d.capability;
            let (driver, of) = (d.driver / 1000, d.driver % 1000 / 10);
            let (sms, speed) = (d.multiprocessors, d.bandwidth as f64 / 1e9);
            let name = d.name;
            format!(
                "{name}, compute capability {major}.{minor}, {sms} multiprocessors, {speed:.0} GB/s, driver for CUDA {driver}.{of}"
            )
        };
        let nvrtc =
            |((major, minor), path): ((i32, i32), PathBuf)| format!("{major}.{minor}, {}", path.display());
        (!cfg!(target_os = "macos")).then(|| Self {
            gpu: Needed::new(cuda::device().map(gpu)),
            nvrtc: Needed::new(cuda::compiler().map(nvrtc)),
        })
    }

    fn rows(&self) -> [(&'static str, String); 2] {
        let row = |needed: &Needed| match needed.found {
            true => needed.says.clone(),
            false => format!("not available: {}", needed.says),
        };
        [("GPU", row(&self.gpu)), ("NVRTC", row(&self.nvrtc))]
    }
}

/// Prints the report; fails when no backend is usable.
pub(crate) fn run(args: &DoctorArgs, console: &Console) -> Result<(), Failure> {
    if let Some(variant) = &args.fetch {
        let variant = Some(variant.as_str()).filter(|v| !v.is_empty());
        let library = runtime::fetch(variant).map_err(Failure::runtime)?;
        console.note(&format!("fetched {}", library.display()));
    }
    let found = runtime::doctor();
    let cuda = Cuda::look();
    if args.json {
        output::write_json(&Record { zmlx: env!("CARGO_PKG_VERSION"), mlx: &found, cuda: cuda.as_ref() })?;
    } else {
        output::write_stdout(report(&found, cuda.as_ref()).as_bytes())?;
    }
    if found.backends.iter().any(|backend| backend.available) {
        return Ok(());
    }
    let why = found.error.as_deref().unwrap_or("see the report above");
    Err(Failure::runtime(anyhow::anyhow!("no backend is usable: {why}")))
}

fn report(found: &Doctor, cuda: Option<&Cuda>) -> String {
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
    for (name, value) in cuda.iter().flat_map(|cuda| cuda.rows()) {
        row(name, &value);
    }
    for (name, value) in found.mac.iter().flat_map(mac_rows) {
        row(name, &value);
    }
    if let Some(error) = &found.error {
        row("error", error);
    }
    text
}

/// What a Mac is and whether Metal works on it; `unknown` for what the system does not say.
fn mac_rows(mac: &Mac) -> [(&'static str, String); 5] {
    const UNKNOWN: &str = "unknown";
    let size = |n: Option<u64>| n.map_or_else(|| UNKNOWN.to_owned(), output::bytes);
    let mut chip = mac.chip.clone().unwrap_or_else(|| UNKNOWN.to_owned());
    let kinds: Vec<String> =
        mac.cpu_cores.iter().map(|k| format!("{} {}", k.cores, k.name.to_lowercase())).collect();
    if !kinds.is_empty() {
        let _ = write!(chip, ", {} cores", kinds.join(" and "));
    }
    let gpu_cores = mac.gpu_cores.map_or_else(|| UNKNOWN.to_owned(), |n| n.to_string());
    let _ = write!(chip, ", GPU cores: {gpu_cores}");
    let memory = format!(
        "{}, recommended working set {}",
        size(mac.memory_bytes),
        size(mac.recommended_working_set_bytes)
    );
    let metallib = match &mac.metallib {
        Some(path) if mac.metallib_found => path.display().to_string(),
        Some(path) => format!("not found: {} is missing; fetch the library again", path.display()),
        None => "not looked for: no library is loaded".to_owned(),
    };
    let usable = match (mac.metal_usable, &mac.metal_error) {
        (true, _) => "usable: a sum on the GPU is right".to_owned(),
        (false, Some(why)) => format!("not usable: {why}"),
        (false, None) => "not tried: no library is loaded".to_owned(),
    };
    let macos = mac.macos_version.clone().unwrap_or_else(|| UNKNOWN.to_owned());
    [("chip", chip), ("memory", memory), ("macOS", macos), ("metallib", metallib), ("Metal", usable)]
}

#[cfg(test)]
mod tests {
    use zmlx_mlx::mac::CoreKind;

    use super::*;

    fn unknown() -> Mac {
        Mac {
            chip: None,
            cpu_cores: Vec::new(),
            gpu_cores: None,
            memory_bytes: None,
            recommended_working_set_bytes: None,
            macos_version: None,
            metallib: None,
            metallib_found: false,
            metal_usable: false,
            metal_error: None,
        }
    }

    fn mac() -> Mac {
        let kind = |name: &str, cores| CoreKind { name: name.to_owned(), cores };
        Mac {
            chip: Some("Apple M2".into()),
            cpu_cores: vec![kind("Performance", 4), kind("Efficiency", 4)],
            gpu_cores: Some(10),
            memory_bytes: Some(17_179_869_184),
            recommended_working_set_bytes: Some(11_453_251_584),
            macos_version: Some("14.5".into()),
            metallib: Some("/m/lib/mlx.metallib".into()),
            metallib_found: true,
            metal_usable: true,
            metal_error: None,
        }
    }

    #[test]
    fn a_mac_is_described() {
        let rows = mac_rows(&mac()).map(|(name, value)| format!("{name}: {value}"));
        assert_eq!(
            rows,
            [
                "chip: Apple M2, 4 performance and 4 efficiency cores, GPU cores: 10",
                "memory: 17.18 GB, recommended working set 11.45 GB",
                "macOS: 14.5",
                "metallib: /m/lib/mlx.metallib",
                "Metal: usable: a sum on the GPU is right",
            ]
        );
        let rows = mac_rows(&Mac {
            metallib_found: false,
            metal_usable: false,
            metal_error: Some("no device".into()),
            ..mac()
        });
        assert_eq!(rows[3].1, "not found: /m/lib/mlx.metallib is missing; fetch the library again");
        assert_eq!(rows[4].1, "not usable: no device");
        let rows = mac_rows(&unknown());
        assert_eq!(rows[0].1, "unknown, GPU cores: unknown");
        assert_eq!(rows[1].1, "unknown, recommended working set unknown");
        assert!(rows[3].1.starts_with("not looked for") && rows[4].1.starts_with("not tried"), "{rows:?}");
    }

    #[test]
    fn what_decode_past_mlx_needs_has_rows() {
        let found = Needed::new(Ok("NVIDIA H100".to_owned()));
        let cuda = Cuda { gpu: found, nvrtc: Needed::new(Err(CudaError::NoDriver)) };
        let [(_, gpu), (name, nvrtc)] = cuda.rows();
        assert_eq!((gpu.as_str(), name), ("NVIDIA H100", "NVRTC"));
        assert!(nvrtc.starts_with("not available: no NVIDIA driver") && nvrtc.contains("install"), "{nvrtc}");
    }

    #[test]
    fn the_record_has_the_mac_only_where_there_is_one() {
        let mut found = Doctor {
            version: None,
            library: None,
            found_by: "not found".into(),
            backends: Vec::new(),
            error: None,
            mac: None,
        };
        let record =
            |mlx: &Doctor| serde_json::to_value(Record { zmlx: "0", mlx, cuda: None }).expect("a record");
        assert!(record(&found).get("mac").is_none());
        assert!(!report(&found, None).contains("chip"));
        found.mac = Some(mac());
        let mac = &record(&found)["mac"];
        for (name, value) in [
            ("chip", serde_json::json!("Apple M2")),
            ("gpu_cores", 10.into()),
            ("memory_bytes", 17_179_869_184u64.into()),
            ("recommended_working_set_bytes", 11_453_251_584u64.into()),
            ("macos_version", "14.5".into()),
            ("metallib_found", true.into()),
            ("metal_usable", true.into()),
        ] {
            assert_eq!(mac[name], value, "{name}");
        }
        assert!(report(&found, None).contains("chip      Apple M2"), "{}", report(&found, None));
    }
}
