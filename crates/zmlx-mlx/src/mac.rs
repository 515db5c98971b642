//! What a Mac is: chip, cores, memory, system, and whether Metal works on it.
//!
//! From documented sources: `sysctl` (the names are in `<sys/sysctl.h>` and Apple's "Determining system capabilities"),
//! the entry of the GPU in the I/O registry, and MLX's own device information. The parsers take text, so they are tested
//! everywhere. Nothing of this has been run on a Mac.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;

use crate::error::Result;
use crate::ops;
use crate::platform::Platform;
use crate::stream::{Device, with_device};
use crate::{Array, runtime};

/// What was found out about this Mac. What the system does not say is `None`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mac {
    /// The chip's name: `Apple M2`.
    pub chip: Option<String>,
    /// Kinds of CPU cores, the fastest first.
    pub cpu_cores: Vec<CoreKind>,
    /// Number of GPU cores.
    pub gpu_cores: Option<u32>,
    /// Main memory in bytes, which CPU and GPU share.
    pub memory_bytes: Option<u64>,
    /// How much of the memory Metal recommends to use at most, in bytes, as MLX reports it.
    pub recommended_working_set_bytes: Option<u64>,
    /// The system's version: `15.5`.
    pub macos_version: Option<String>,
    /// Where MLX looks for its compiled Metal kernels; `None` if no library was found.
    pub metallib: Option<PathBuf>,
    /// Whether that file is there.
    pub metallib_found: bool,
    /// Whether a sum on the GPU gave the right answer.
    pub metal_usable: bool,
    /// Why not.
    pub metal_error: Option<String>,
}

/// CPU cores of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CoreKind {
    /// Apple's name: `Performance`, `Efficiency`.
    pub name: String,
    /// How many.
    pub cores: u32,
}

/// Asks the system and MLX. `library` is the libmlx that is loaded.
pub(crate) fn look(library: Option<&Path>) -> Mac {
    let mut mac = Mac {
        gpu_cores: gpu_cores(&output("/usr/sbin/ioreg", &["-rc", "AGXAccelerator", "-d", "1"])),
        ..parse_sysctl(&output("/usr/sbin/sysctl", SYSCTL_NAMES))
    };
    let Some(library) = library else { return mac };
    mac.metallib = Platform::MacOs.metallib(library);
    mac.metallib_found = mac.metallib.as_deref().is_some_and(Path::is_file);
    mac.recommended_working_set_bytes = runtime::recommended_working_set().filter(|&bytes| bytes > 0);
    match adds_up(Device::Gpu) {
        Ok(true) => mac.metal_usable = true,
        Ok(false) => mac.metal_error = Some("1 + 1 on the GPU is not 2".to_owned()),
        Err(e) => mac.metal_error = Some(e.to_string()),
    }
    mac
}

/// The shortest proof that a device works: for Metal it takes the driver, the metallib and a kernel.
fn adds_up(device: Device) -> Result<bool> {
    with_device(device, || {
        let ones = Array::from_slice(&[1.0f32; 8], &[8])?;
        Ok(ops::add(&ones, &ones)?.to_vec::<f32>()? == [2.0; 8])
    })
}

const SYSCTL_NAMES: &[&str] = &[
    "machdep.cpu.brand_string",
    "kern.osproductversion",
    "hw.memsize",
    "hw.perflevel0.name",
    "hw.perflevel0.physicalcpu",
    "hw.perflevel1.name",
    "hw.perflevel1.physicalcpu",
    "hw.perflevel2.name",
    "hw.perflevel2.physicalcpu",
];

/// What the program prints; nothing if it can't be run. Its status does not matter: `sysctl` fails when one of several
/// names is unknown, and prints the others.
fn output(program: &str, arguments: &[&str]) -> String {
    let out = Command::new(program).args(arguments).env("LC_ALL", "C").output();
    out.map(|out| String::from_utf8_lossy(&out.stdout).into_owned()).unwrap_or_default()
}

/// Reads `name: value` lines of `sysctl`.
fn parse_sysctl(text: &str) -> Mac {
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim()).filter(|v| !v.is_empty()).map(str::to_owned)
    };
    let cpu_cores = (0..3)
        .map_while(|level| {
            let cores = value(&format!("hw.perflevel{level}.physicalcpu"))?.parse().ok()?;
            let name =
                value(&format!("hw.perflevel{level}.name")).unwrap_or_else(|| format!("level {level}"));
            Some(CoreKind { name, cores })
        })
        .collect();
    Mac {
        chip: value("machdep.cpu.brand_string"),
        cpu_cores,
        gpu_cores: None,
        memory_bytes: value("hw.memsize").and_then(|v| v.parse().ok()),
        recommended_working_set_bytes: None,
        macos_version: value("kern.osproductversion"),
        metallib: None,
        metallib_found: false,
        metal_usable: false,
        metal_error: None,
    }
}

/// Reads `"gpu-core-count" = N` among the properties that `ioreg` prints for the GPU.
fn gpu_cores(text: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        // Before the name are only the lines of the tree.
        let line = line.trim_start_matches(|c: char| c == '|' || c.is_whitespace());
        let value = line.strip_prefix("\"gpu-core-count\"")?.trim_start().strip_prefix('=')?;
        value.trim().parse().ok().filter(|&n| n > 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const M2: &str = "machdep.cpu.brand_string: Apple M2\nkern.osproductversion: 14.5\nhw.memsize: 17179869184\n\
        hw.perflevel0.name: Performance\nhw.perflevel0.physicalcpu: 4\n\
        hw.perflevel1.name: Efficiency\nhw.perflevel1.physicalcpu: 4\n";

    fn kind(name: &str, cores: u32) -> CoreKind {
        CoreKind { name: name.to_owned(), cores }
    }

    #[test]
    fn sysctl_is_read() {
        let mac = parse_sysctl(M2);
        assert_eq!(mac.chip.as_deref(), Some("Apple M2"));
        assert_eq!(mac.macos_version.as_deref(), Some("14.5"));
        assert_eq!(mac.memory_bytes, Some(17_179_869_184));
        assert_eq!(mac.cpu_cores, [kind("Performance", 4), kind("Efficiency", 4)]);
    }

    #[test]
    fn what_sysctl_does_not_say_is_unknown() {
        let nothing = parse_sysctl("");
        assert_eq!((nothing.chip, nothing.memory_bytes, nothing.macos_version), (None, None, None));
        assert_eq!(nothing.cpu_cores, []);
        // A virtual machine has one kind of cores; names and sizes may be missing or no numbers.
        let mac = parse_sysctl(
            "machdep.cpu.brand_string: Apple M1 (Virtual)\nkern.osproductversion:\nhw.memsize: much\n\
             hw.memsize_usable: 1\nhw.perflevel0.physicalcpu: 3\n",
        );
        assert_eq!(mac.chip.as_deref(), Some("Apple M1 (Virtual)"));
        assert_eq!((mac.memory_bytes, mac.macos_version), (None, None));
        assert_eq!(mac.cpu_cores, [kind("level 0", 3)]);
    }

    #[test]
    fn gpu_cores_are_read() {
        let entry = "+-o AGXAcceleratorG14G  <class AGXAcceleratorG14G, id 0x1000004a6, registered, matched, active>\n    {\n      \"IOClass\" = \"AGXAcceleratorG14G\"\n      \"gpu-core-count\" = 10\n      \"model\" = \"Apple M2\"\n    }\n";
        let cases = [
            (entry, Some(10)),
            ("    | |   \"gpu-core-count\" = 38\n", Some(38)),
            ("\"gpu-core-count\"=8", Some(8)),
            ("\"gpu-core-count\" = ?\n", None),
            ("\"gpu-core-count\" = 0\n", None),
            ("\"my-gpu-core-count\" = 4\n", None),
            ("\"note\" = \"gpu-core-count = 7\"\n", None),
            ("", None),
        ];
        for (text, cores) in cases {
            assert_eq!(gpu_cores(text), cores, "{text}");
        }
    }

    #[test]
    fn a_program_that_is_not_there_says_nothing() {
        assert_eq!(output("/nowhere/sysctl", SYSCTL_NAMES), "");
    }

    #[test]
    fn the_proof_holds_on_the_cpu() {
        assert!(adds_up(Device::Cpu).expect("a CPU"));
    }

    #[test]
    fn a_mac_without_a_library_has_no_metallib() {
        let mac = look(None);
        assert_eq!((mac.metallib, mac.metallib_found, mac.metal_usable), (None, false, false));
    }
}
