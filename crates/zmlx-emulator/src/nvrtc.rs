//! Compiles CUDA text with NVRTC, the compiler that MLX uses on NVIDIA machines. No GPU is needed.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, ptr};

use libloading::Library;

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

type Program = *mut c_void;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Bytes = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;

/// A loaded NVRTC with its headers.
#[derive(Debug)]
pub struct Nvrtc {
    library: Library,
    path: PathBuf,
    include: PathBuf,
}

/// Destroys a program when done.
struct Owned<'a>(Program, &'a Nvrtc);

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        if let Ok(destroy) = self.1.function::<Destroy>(b"nvrtcDestroyProgram") {
            // SAFETY: a program of this library, destroyed once.
            unsafe { destroy(&mut self.0) };
        }
    }
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
        let found = fs::read_dir(&lib).ok().and_then(|files| {
            files.flatten().map(|f| f.path()).find(|p| {
                p.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("libnvrtc.so"))
            })
        });
        let path = found.ok_or_else(|| Error::NoNvrtc(format!("no libnvrtc in {}", lib.display())))?;
        // SAFETY: NVIDIA's library; loading it has no effect beyond its own state.
        let library = unsafe { Library::new(&path) }
            .map_err(|e| Error::Load { path: path.clone(), message: e.to_string() })?;
        Ok(Self { library, path, include: root.join("include") })
    }

    fn function<T: Copy>(&self, name: &[u8]) -> Result<T, Error> {
        // SAFETY: callers name the type that NVRTC's header gives the function.
        unsafe { self.library.get::<T>(name) }
            .map(|f| *f)
            .map_err(|e| Error::Load { path: self.path.clone(), message: e.to_string() })
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
        let mut log = String::new();
        let options: &[&str] = if arch.starts_with("sm_") { &["--ptxas-options=-v"] } else { &[] };
        let code = self.compile_with(&text, std::slice::from_ref(&kernel), arch, options, Some(&mut log))?;
        Ok((code, log))
    }

    fn compile_text(&self, text: &str, kernels: &[KernelText], arch: &str) -> Result<Vec<u8>, Error> {
        self.compile_with(text, kernels, arch, &[], None)
    }

    fn compile_with(
        &self,
        text: &str,
        kernels: &[KernelText],
        arch: &str,
        more: &[&str],
        said: Option<&mut String>,
    ) -> Result<Vec<u8>, Error> {
        let name = || kernels.first().map_or_else(|| "kernels".to_owned(), |k| k.name.clone());
        let zero = || Error::Launch { kernel: name(), message: "the text holds a zero byte".into() };
        let c = |text: &str| CString::new(text).map_err(|_| zero());
        let program = self.program(&c(text)?)?;
        let include = self.include.display();
        let mut options = vec![
            c("--device-as-default-execution-space")?,
            c(&format!("--gpu-architecture={arch}"))?,
            c(&format!("--include-path={include}"))?,
            c(&format!("--include-path={include}/cccl"))?,
        ];
        for option in more {
            options.push(c(option)?);
        }
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let compile: Compile = self.function(b"nvrtcCompileProgram")?;
        // SAFETY: a live program; the options outlive the call.
        let code = unsafe { compile(program.0, pointers.len() as c_int, pointers.as_ptr()) };
        let log = || {
            let bytes =
                self.bytes(&program, "nvrtcGetProgramLog", b"nvrtcGetProgramLogSize", b"nvrtcGetProgramLog")?;
            Ok::<_, Error>(String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned())
        };
        if code != 0 {
            let log = log()?;
            return Err(Error::Compile { log: readable(&log, Dialect::Cuda, kernels) });
        }
        if let Some(said) = said {
            *said = log()?;
        }
        if arch.starts_with("sm_") {
            self.bytes(&program, "nvrtcGetCUBIN", b"nvrtcGetCUBINSize", b"nvrtcGetCUBIN")
        } else {
            self.bytes(&program, "nvrtcGetPTX", b"nvrtcGetPTXSize", b"nvrtcGetPTX")
        }
    }

    fn program(&self, unit: &CStr) -> Result<Owned<'_>, Error> {
        // The stand-in holds no zero byte, nor do names.
        let c = |text: &str| CString::new(text).unwrap_or_default();
        let (file, utils, device) = (c("wrapped.cu"), c(UTILS), c(DEVICE));
        let (texts, names) = ([device.as_ptr()], [utils.as_ptr()]);
        let mut program = ptr::null_mut();
        let create: Create = self.function(b"nvrtcCreateProgram")?;
        // SAFETY: all strings end in zero and outlive the call, which copies them.
        let code =
            unsafe { create(&mut program, unit.as_ptr(), file.as_ptr(), 1, texts.as_ptr(), names.as_ptr()) };
        checked("nvrtcCreateProgram", code)?;
        Ok(Owned(program, self))
    }

    fn bytes(
        &self,
        program: &Owned<'_>,
        call: &'static str,
        size: &[u8],
        get: &[u8],
    ) -> Result<Vec<u8>, Error> {
        let (size, get): (Size, Bytes) = (self.function(size)?, self.function(get)?);
        let mut n = 0;
        // SAFETY: a live program.
        checked(call, unsafe { size(program.0, &mut n) })?;
        let mut bytes = vec![0u8; n];
        // SAFETY: a live program, and room for as many bytes as it has just stated.
        checked(call, unsafe { get(program.0, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

fn checked(call: &'static str, code: c_int) -> Result<(), Error> {
    if code == 0 { Ok(()) } else { Err(Error::Nvrtc { call, code }) }
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
