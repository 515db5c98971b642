//! NVRTC, NVIDIA's compiler as a library: found when it is first needed, and asked for machine code of one GPU.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::{fs, ptr};

use libloading::Library;

use crate::error::{CudaError, Result};

/// Names the folder that NVRTC is in, or that holds `nvidia/cu13/lib` as its wheel unpacks.
pub const VARIABLE: &str = "ZMLX_NVRTC";

/// Names that the loader knows, newest first. A CUDA library of MLX has one of them loaded already.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// Where wheels and toolkits put it within their folder.
const PLACES: [&str; 5] = ["", "lib", "lib64", "nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"];

/// Where the tests of kernels keep the wheel, within the cache folder.
const CACHED: &str = "emulator/nvrtc-13";

type Program = *mut c_void;
type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
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

/// The compiler.
#[derive(Debug)]
pub struct Nvrtc {
    library: Library,
    path: PathBuf,
    version: (i32, i32),
}

impl Nvrtc {
    /// The compiler that [`VARIABLE`] names, else one that the loader knows, else one below `cache`, `CUDA_HOME` or
    /// `CUDA_PATH`.
    ///
    /// # Errors
    /// [`CudaError::NoNvrtc`], [`CudaError::Nvrtc`].
    pub fn find(cache: Option<&Path>) -> Result<Self> {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(dir) = variable(VARIABLE) {
            let found = in_folder(&dir);
            let searched = format!("{VARIABLE}={}", dir.display());
            return Self::open(&found.ok_or(CudaError::NoNvrtc { searched })?);
        }
        for name in NAMES {
            // SAFETY: NVIDIA's library; loading it has no effect beyond its own state.
            if let Ok(library) = unsafe { Library::new(name) } {
                return Self::with(library, PathBuf::from(name));
            }
        }
        let folders = [cache.map(|c| c.join(CACHED)), variable("CUDA_HOME"), variable("CUDA_PATH")];
        let folders: Vec<PathBuf> = folders.into_iter().flatten().collect();
        match folders.iter().find_map(|dir| in_folder(dir)) {
            Some(path) => Self::open(&path),
            None => {
                let names = NAMES.iter().map(|n| (*n).to_owned());
                let folders = folders.iter().map(|f| f.display().to_string());
                Err(CudaError::NoNvrtc { searched: names.chain(folders).collect::<Vec<_>>().join(", ") })
            }
        }
    }

    fn open(path: &Path) -> Result<Self> {
        // SAFETY: as above.
        let library = unsafe { Library::new(path) };
        let fail = |e: libloading::Error| CudaError::Nvrtc { path: path.into(), message: e.to_string() };
        Self::with(library.map_err(fail)?, path.to_path_buf())
    }

    fn with(library: Library, path: PathBuf) -> Result<Self> {
        let mut nvrtc = Self { library, path, version: (0, 0) };
        let version: Version = nvrtc.function("nvrtcVersion")?;
        // SAFETY: valid out pointers.
        let code = unsafe { version(&mut nvrtc.version.0, &mut nvrtc.version.1) };
        nvrtc.checked("nvrtcVersion", code)?;
        Ok(nvrtc)
    }

    /// Its version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn function<T: Copy>(&self, name: &'static str) -> Result<T> {
        // SAFETY: callers name the type that NVRTC's header gives the function.
        let found = unsafe { self.library.get::<T>(name.as_bytes()) };
        found.map(|f| *f).map_err(|e| CudaError::Nvrtc { path: self.path.clone(), message: e.to_string() })
    }

    fn checked(&self, call: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        Err(CudaError::Nvrtc { path: self.path.clone(), message: format!("{call} gave {code}") })
    }

    /// Machine code for `arch` (such as `sm_90`) of a text that needs no headers. May be called from several threads.
    ///
    /// # Errors
    /// [`CudaError::Compile`] with what the compiler says of the text; [`CudaError::Nvrtc`].
    pub fn compile(&self, name: &str, text: &str, arch: &str) -> Result<Vec<u8>> {
        let zero = |_| CudaError::Argument(format!("the text of {name} holds a zero byte"));
        let c = |text: &str| CString::new(text).map_err(zero);
        let (unit, file) = (c(text)?, c(&format!("{name}.cu"))?);
        let mut program = Owned(ptr::null_mut(), self);
        let create: Create = self.function("nvrtcCreateProgram")?;
        // SAFETY: strings end in zero and outlive the call, which copies them; there are no headers.
        let code =
            unsafe { create(&mut program.0, unit.as_ptr(), file.as_ptr(), 0, ptr::null(), ptr::null()) };
        self.checked("nvrtcCreateProgram", code)?;
        let options = [
            c(&format!("--gpu-architecture={arch}"))?,
            c("--std=c++17")?,
            c("--device-as-default-execution-space")?,
        ];
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let compile: Compile = self.function("nvrtcCompileProgram")?;
        // SAFETY: a live program; the options outlive the call.
        let code = unsafe { compile(program.0, pointers.len() as c_int, pointers.as_ptr()) };
        if code != 0 {
            let log = self.bytes(&program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?;
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned();
            return Err(CudaError::Compile { kernel: name.to_owned(), arch: arch.to_owned(), log });
        }
        self.bytes(&program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")
    }

    fn bytes(&self, program: &Owned<'_>, size: &'static str, get: &'static str) -> Result<Vec<u8>> {
        let (count, copy): (Size, Bytes) = (self.function(size)?, self.function(get)?);
        let mut n = 0;
        // SAFETY: a live program and a valid out pointer.
        self.checked(size, unsafe { count(program.0, &mut n) })?;
        let mut bytes = vec![0u8; n];
        // SAFETY: a live program, and room for as many bytes as it has just stated.
        self.checked(get, unsafe { copy(program.0, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

/// Destroys a program when done.
struct Owned<'a>(Program, &'a Nvrtc);

impl Drop for Owned<'_> {
    fn drop(&mut self) {
        if self.0.is_null() {
            return;
        }
        if let Ok(destroy) = self.1.function::<Destroy>("nvrtcDestroyProgram") {
            // SAFETY: a program of this library, destroyed once.
            unsafe { destroy(&mut self.0) };
        }
    }
}

/// The compiler's library in a folder or below it.
fn in_folder(dir: &Path) -> Option<PathBuf> {
    PLACES.iter().find_map(|place| {
        let files = fs::read_dir(dir.join(place)).ok()?;
        let mut found: Vec<PathBuf> = files.flatten().map(|f| f.path()).collect();
        found.retain(|p| {
            let name = p.file_name().and_then(|n| n.to_str());
            // Not libnvrtc-builtins, which the compiler loads itself, nor its other forms.
            name.is_some_and(|n| n.starts_with("libnvrtc.so"))
        });
        found.sort();
        found.pop()
    })
}
