//! Compiles CUDA text with NVRTC, the compiler that MLX uses on NVIDIA machines. No GPU is needed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use zmlx_nvrtc::{Compiled, NvrtcError, Unit, in_folder};

use crate::Error;
use crate::compile::{cache_dir, readable};
use crate::kernel::{Dialect, KernelText, TemplateArg};
use crate::source::{Slot, file_name, macros, slots};

/// The wheels that hold the compiler and every header that kernels include.
const WHEELS: [&str; 4] = [
    "nvidia-cuda-nvrtc==13.*",
    "nvidia-cuda-runtime==13.*",
    "nvidia-cuda-crt==13.*",
    "nvidia-cuda-cccl==13.*",
];
/// Where those wheels put their files.
const ROOT: &str = "nvidia/cu13";
const UTILS: &str = "mlx/backend/cuda/device/utils.cuh";
const DEVICE: &str = concat!(
    "#pragma once\n#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cuda/std/array>\n",
    "#include <cuda/std/cstdint>\n#include <cuda/std/limits>\n#include <cuda/std/tuple>\n",
    "#include <cuda/std/type_traits>\n",
    include_str!("../simt/mlx_device.cuh"),
);

/// A loaded NVRTC with its headers.
#[derive(Debug)]
pub struct Nvrtc {
    compiler: zmlx_nvrtc::Nvrtc,
    include: PathBuf,
}

impl Nvrtc {
    /// NVRTC from `ZMLX_NVRTC` (a directory that holds `nvidia/cu13/lib`), from the cache, or fetched into the cache
    /// as wheels from the Python package index: 65 MB, said on stderr. `PYTHON` names another interpreter than
    /// `python3`.
    ///
    /// Errors: [`Error::NoNvrtc`], [`Error::Io`], [`Error::Load`].
    pub fn find() -> Result<Self, Error> {
        if let Some(dir) = std::env::var_os("ZMLX_NVRTC").filter(|v| !v.is_empty()) {
            return Self::open(Path::new(&dir));
        }
        let dir = cache_dir().join("nvrtc-13");
        {
            // One thread of the process fetches; the others find what it has put there.
            static FETCHING: std::sync::Mutex<()> = std::sync::Mutex::new(());
            let _one = FETCHING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if !dir.join(ROOT).join("lib").is_dir() {
                fetch(&dir)?;
            }
        }
        Self::open(&dir)
    }

    fn open(dir: &Path) -> Result<Self, Error> {
        let root = dir.join(ROOT);
        let lib = root.join("lib");
        let found = in_folder(&lib);
        let path = found.ok_or_else(|| Error::NoNvrtc(format!("no libnvrtc in {}", lib.display())))?;
        let compiler = zmlx_nvrtc::Nvrtc::open(&path).map_err(failed)?;
        Ok(Self { compiler, include: root.join("include") })
    }

    /// Compiles a kernel, wrapped as MLX wraps it: a cubin for `sm_90`, PTX for `compute_90`.
    ///
    /// The header that MLX puts in front is a stand-in with its names (`Shape`, `AlignedVector`, `load_vector`, ...);
    /// CUDA's own headers are the real ones.
    ///
    /// Errors: [`Error::Compile`] with NVRTC's messages and the lines they mean, [`Error::Nvrtc`].
    pub fn compile(&self, kernel: &KernelText, arch: &str) -> Result<Vec<u8>, Error> {
        let text = format!("{}{}", front(""), wrap(kernel, &kernel.header));
        self.compile_text(&text, std::slice::from_ref(kernel), arch)
    }

    /// Compiles kernels together, each in a namespace of its own: CUDA's headers, which take seconds, are read once.
    /// Their texts must not name their own helpers from the root (`::helper`).
    ///
    /// Errors: as of [`Nvrtc::compile`]; a message names the kernel that it is about.
    pub fn compile_all(&self, kernels: &[KernelText], arch: &str) -> Result<Vec<u8>, Error> {
        let (mut includes, mut text) = (String::new(), String::new());
        for (i, kernel) in kernels.iter().enumerate() {
            // Headers cannot be included inside of a namespace; blank lines keep the numbers.
            let is_include = |l: &str| {
                l.trim_start().strip_prefix('#').is_some_and(|r| r.trim_start().starts_with("include"))
            };
            let mut header = String::new();
            for line in kernel.header.lines() {
                let target = if is_include(line) { &mut includes } else { &mut header };
                target.push_str(line);
                target.push('\n');
                if is_include(line) {
                    header.push('\n');
                }
            }
            text += &format!("namespace zk_{i} {{\n{}}}\n", wrap(kernel, &header));
            text.extend(macros(&kernel.header).map(|m| format!("#undef {m}\n")));
        }
        self.compile_text(&format!("{}{text}", front(&includes)), kernels, arch)
    }

    /// Compiles a whole translation unit that includes no header, as it is. Gives the cubin (for `sm_90`) or PTX (for
    /// `compute_90`) and what the compiler says of it: registers, spills and shared memory of each kernel.
    ///
    /// Errors: as of [`Nvrtc::compile`].
    pub fn compile_unit(&self, name: &str, text: &str, arch: &str) -> Result<(Vec<u8>, String), Error> {
        let kernel = KernelText::new(name, text);
        let text = format!("#line 1 \"{}\"\n{text}", file_name(Dialect::Cuda, &kernel, false));
        let options: &[&str] = if arch.starts_with("sm_") { &["--ptxas-options=-v"] } else { &[] };
        let Compiled { code, log } =
            self.compile_with(&text, std::slice::from_ref(&kernel), arch, options)?;
        Ok((code, log))
    }

    fn compile_text(&self, text: &str, kernels: &[KernelText], arch: &str) -> Result<Vec<u8>, Error> {
        self.compile_with(text, kernels, arch, &[]).map(|compiled| compiled.code)
    }

    fn compile_with(
        &self,
        text: &str,
        kernels: &[KernelText],
        arch: &str,
        more: &[&str],
    ) -> Result<Compiled, Error> {
        let include = self.include.display();
        let mut options = vec![
            "--device-as-default-execution-space".to_owned(),
            format!("--include-path={include}"),
            format!("--include-path={include}/cccl"),
        ];
        options.extend(more.iter().map(|o| (*o).to_owned()));
        let headers = [(UTILS, DEVICE)];
        let unit = Unit { file: "wrapped.cu", text, headers: &headers, arch, options: &options };
        self.compiler.compile(&unit).map_err(|error| match error {
            NvrtcError::Compile { log } => Error::Compile { log: readable(&log, Dialect::Cuda, kernels) },
            NvrtcError::Zero(_) => {
                let kernel = kernels.first().map_or_else(|| "kernels".to_owned(), |k| k.name.clone());
                Error::Launch { kernel, message: error.to_string() }
            }
            other => failed(other),
        })
    }
}

/// That the compiler does not work.
fn failed(error: NvrtcError) -> Error {
    match error {
        NvrtcError::Load { path, message } => Error::Load { path, message },
        NvrtcError::Call { call, code } => Error::Nvrtc { call, code },
        other => Error::NoNvrtc(other.to_string()),
    }
}

/// The wheels into `dir`, which appears only when they are complete.
fn fetch(dir: &Path) -> Result<(), Error> {
    let parent = dir.parent().unwrap_or(dir);
    fs::create_dir_all(parent).map_err(|source| Error::Io { path: parent.into(), source })?;
    let temp = parent.join(format!(".nvrtc-{}", std::process::id()));
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    eprintln!("fetching {} into {}", WHEELS.join(" "), dir.display());
    let out = Command::new(&python)
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"])
        .arg(&temp)
        .args(WHEELS)
        .output()
        .map_err(|e| Error::NoNvrtc(format!("{python} cannot be run: {e}")))?;
    if !out.status.success() {
        // What there is of it is of no use; that it cannot be removed changes nothing.
        fs::remove_dir_all(&temp).ok();
        return Err(Error::NoNvrtc(String::from_utf8_lossy(&out.stderr).trim().to_owned()));
    }
    match fs::rename(&temp, dir) {
        Ok(()) => Ok(()),
        // Another process was faster.
        Err(_) if dir.join(ROOT).is_dir() => {
            fs::remove_dir_all(&temp).map_err(|source| Error::Io { path: temp, source })
        }
        Err(source) => Err(Error::Io { path: dir.into(), source }),
    }
}

/// What MLX puts in front of every kernel, and more headers.
fn front(includes: &str) -> String {
    format!("#include \"{UTILS}\"\n#include <cooperative_groups.h>\n{includes}")
}

/// The text that MLX would give NVRTC after that front.
fn wrap(kernel: &KernelText, header: &str) -> String {
    let parameter = |slot: Slot| match slot {
        Slot::Input(i) => format!("const {}* {}", kernel.inputs[i].dtype.cuda(), kernel.inputs[i].name),
        Slot::Shape(i) => format!("const __grid_constant__ Shape {}_shape", kernel.inputs[i].name),
        Slot::Strides(i) => format!("const __grid_constant__ Strides {}_strides", kernel.inputs[i].name),
        Slot::Ndim(i) => format!("const __grid_constant__ int {}_ndim", kernel.inputs[i].name),
        Slot::Output(i) => format!("{}* {}", kernel.outputs[i].dtype.cuda(), kernel.outputs[i].name),
    };
    let constants: String = kernel
        .template
        .iter()
        .map(|(name, arg)| match *arg {
            TemplateArg::Int(v) => format!("constexpr int {name} = {v}; "),
            TemplateArg::Bool(v) => format!("constexpr bool {name} = {v}; "),
            TemplateArg::Dtype(d) => format!("using {name} = {}; ", d.cuda()),
        })
        .collect();
    format!(
        "#line 1 \"{}\"\n{header}\nnamespace mlx::core::cu {{ using namespace ::mlx::core::cu;\n\
         namespace cg = cooperative_groups;\n__global__ void custom_kernel_{}({}) {{ {constants}\n#line 1 \"{}\"\n{}\n\
         }}\n}}\n",
        file_name(Dialect::Cuda, kernel, true),
        kernel.name,
        slots(kernel).into_iter().map(parameter).collect::<Vec<_>>().join(", "),
        file_name(Dialect::Cuda, kernel, false),
        kernel.body,
    )
}
