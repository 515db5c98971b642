//! NVRTC, NVIDIA's compiler as a library: loaded from a file at run time, called safely. Where it is looked for, and what a
//! text is compiled with, is for those who call.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::{fs, ptr};

use libloading::Library;

/// Where wheels and toolkits put it within their folder.
const PLACES: [&str; 5] = ["", "lib", "lib64", "nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"];

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

/// Why a text was not compiled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NvrtcError {
    /// The library, or a function of it, is not there.
    #[error("loading {}: {message}: take libnvrtc of CUDA 12 or 13", path.display())]
    Load {
        /// The library.
        path: PathBuf,
        /// What the loader said.
        message: String,
    },
    /// The compiler refused to work (not: refused the text).
    #[error("{call} gave {code}")]
    Call {
        /// The function.
        call: &'static str,
        /// Its result.
        code: i32,
    },
    /// A text or an option cannot be passed on.
    #[error("{0} holds a zero byte: take it out")]
    Zero(&'static str),
    /// The text is not valid.
    #[error("the text does not compile:\n{log}")]
    Compile {
        /// What the compiler said.
        log: String,
    },
}

/// The result of calls here.
pub type Result<T> = std::result::Result<T, NvrtcError>;

/// A translation unit.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unit<'a> {
    /// The name by which messages call it.
    pub file: &'a str,
    /// The text.
    pub text: &'a str,
    /// Headers that lie in no folder: names as they are included, and texts.
    pub headers: &'a [(&'a str, &'a str)],
    /// Virtual (`compute_90`) or real (`sm_90`) architecture.
    pub arch: &'a str,
    /// More options.
    pub options: &'a [String],
}

/// What became of a unit.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// PTX for a virtual architecture, a cubin for a real one.
    pub code: Vec<u8>,
    /// What the compiler said: warnings, and what options ask for.
    pub log: String,
}

/// The loaded compiler. May be called from several threads.
#[derive(Debug)]
pub struct Nvrtc {
    library: Library,
    path: PathBuf,
    version: (i32, i32),
}

impl Nvrtc {
    /// Loads the library: a file, or a name that the loader knows.
    ///
    /// # Errors
    /// [`NvrtcError::Load`], [`NvrtcError::Call`].
    pub fn open(path: &Path) -> Result<Self> {
        // SAFETY: NVIDIA's library; loading it has no effect beyond its own state.
        let library = unsafe { Library::new(path) };
        let fail = |e: libloading::Error| NvrtcError::Load { path: path.into(), message: e.to_string() };
        let mut nvrtc = Self { library: library.map_err(fail)?, path: path.into(), version: (0, 0) };
        let version: Version = nvrtc.function("nvrtcVersion")?;
        // SAFETY: valid out pointers.
        let code = unsafe { version(&mut nvrtc.version.0, &mut nvrtc.version.1) };
        checked("nvrtcVersion", code)?;
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

    /// Compiles a unit.
    ///
    /// # Errors
    /// [`NvrtcError::Compile`] with what the compiler says of the text; [`NvrtcError::Zero`], [`NvrtcError::Call`],
    /// [`NvrtcError::Load`] for a function that the library lacks.
    pub fn compile(&self, unit: &Unit<'_>) -> Result<Compiled> {
        let program = self.program(unit)?;
        let arch = c_string("an architecture", &format!("--gpu-architecture={}", unit.arch))?;
        let more = unit.options.iter().map(|o| c_string("an option", o)).collect::<Result<Vec<_>>>()?;
        let options: Vec<*const c_char> = std::iter::once(&arch).chain(&more).map(|o| o.as_ptr()).collect();
        let compile: Compile = self.function("nvrtcCompileProgram")?;
        // SAFETY: a live program; the options outlive the call.
        let code = unsafe { compile(program.0, options.len() as c_int, options.as_ptr()) };
        let log = self.bytes(&program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")?;
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
        if code != 0 {
            return Err(NvrtcError::Compile { log });
        }
        let code = if unit.arch.starts_with("sm_") {
            self.bytes(&program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN")?
        } else {
            self.bytes(&program, "nvrtcGetPTXSize", "nvrtcGetPTX")?
        };
        Ok(Compiled { code, log })
    }

    fn program(&self, unit: &Unit<'_>) -> Result<Owned<'_>> {
        let (text, file) = (c_string("the text", unit.text)?, c_string("the name of the text", unit.file)?);
        let of = |part: fn(&(&str, &str)) -> Result<CString>| -> Result<Vec<CString>> {
            unit.headers.iter().map(part).collect()
        };
        let names = of(|(name, _)| c_string("the name of a header", name))?;
        let texts = of(|(_, text)| c_string("a header", text))?;
        let pointers = |all: &[CString]| all.iter().map(|c| c.as_ptr()).collect::<Vec<_>>();
        let (names, texts) = (&pointers(&names), &pointers(&texts));
        let mut program = Owned(ptr::null_mut(), self);
        let create: Create = self.function("nvrtcCreateProgram")?;
        // SAFETY: all strings end in zero and outlive the call, which copies them; as many names as texts.
        let code = unsafe {
            let headers = (names.len() as c_int, texts.as_ptr(), names.as_ptr());
            create(&mut program.0, text.as_ptr(), file.as_ptr(), headers.0, headers.1, headers.2)
        };
        checked("nvrtcCreateProgram", code)?;
        Ok(program)
    }

    fn bytes(&self, program: &Owned<'_>, size: &'static str, get: &'static str) -> Result<Vec<u8>> {
        let (count, copy): (Size, Bytes) = (self.function(size)?, self.function(get)?);
        let mut n = 0;
        // SAFETY: a live program and a valid out pointer.
        checked(size, unsafe { count(program.0, &mut n) })?;
        let mut bytes = vec![0u8; n];
        // SAFETY: a live program, and room for as many bytes as it has just stated.
        checked(get, unsafe { copy(program.0, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }

    fn function<T: Copy>(&self, name: &'static str) -> Result<T> {
        // SAFETY: callers name the type that NVRTC's header gives the function.
        let found = unsafe { self.library.get::<T>(name.as_bytes()) };
        found.map(|f| *f).map_err(|e| NvrtcError::Load { path: self.path.clone(), message: e.to_string() })
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

fn c_string(what: &'static str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| NvrtcError::Zero(what))
}

fn checked(call: &'static str, code: c_int) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(NvrtcError::Call { call, code }) }
}

/// The compiler's library in a folder, or where wheels and toolkits put it below one; the newest if there are several.
pub fn in_folder(dir: &Path) -> Option<PathBuf> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_found_where_wheels_and_toolkits_put_it() {
        for place in PLACES {
            let dir = tempfile::tempdir().unwrap();
            let lib = dir.path().join(place);
            fs::create_dir_all(&lib).unwrap();
            assert_eq!(in_folder(dir.path()), None, "{place}");
            for name in
                ["libnvrtc-builtins.so.13.0", "libnvrtc.alt.so.13", "libnvrtc.so.12", "libnvrtc.so.13"]
            {
                fs::write(lib.join(name), "").unwrap();
            }
            assert_eq!(in_folder(dir.path()), Some(lib.join("libnvrtc.so.13")), "{place}");
        }
    }

    #[test]
    fn what_is_no_library_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libnvrtc.so.13");
        fs::write(&path, "no library").unwrap();
        let error = Nvrtc::open(&path).unwrap_err();
        assert!(matches!(&error, NvrtcError::Load { path: at, .. } if *at == path), "{error}");
    }
}
