//! Which libmlx runs, and on what.
//!
//! The library is loaded on first use, from the first of: `ZMLX_MLX_DIR`; the folders of the system's library path
//! (`LD_LIBRARY_PATH`, `DYLD_LIBRARY_PATH`); the cache, when `ZMLX_MLX_VARIANT` is set; the program's own folder, its
//! `lib` and `../lib`; the place where the build found it; the cache. Its version must be exactly
//! [`locate::MLX_VERSION`].

use std::env;
use std::path::{Path, PathBuf};
use std::ptr;

use serde::Serialize;

use crate::api::{api, check, loaded, text};
use crate::error::{Error, Result};
use crate::locate::{self, Located};
use crate::mac::{self, Mac};
use crate::platform::Platform;

/// A backend of MLX.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Plain CPU.
    Cpu,
    /// NVIDIA CUDA.
    Cuda,
    /// Apple Metal.
    Metal,
}

impl Backend {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Cuda, Self::Metal];

    /// `cpu`, `cuda` or `metal`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Metal => "metal",
        }
    }

    pub(crate) fn needs(self) -> &'static str {
        match self {
            Self::Cpu => "a CPU",
            Self::Cuda => "a CUDA libmlx and an NVIDIA GPU",
            Self::Metal => "a Metal libmlx and an Apple GPU",
        }
    }

    fn missing(self, library: Option<&Path>) -> String {
        let has = |word: &str| library.is_some_and(|p| p.to_string_lossy().contains(word));
        match self {
            _ if library.is_none() => "no libmlx is loaded".to_owned(),
            Self::Cpu => "this libmlx was built without a CPU backend".to_owned(),
            Self::Cuda if Platform::HERE != Platform::Linux => "CUDA is for Linux".to_owned(),
            Self::Cuda if has("cuda") => {
                "the CUDA libmlx is loaded, but it finds no NVIDIA GPU or driver".to_owned()
            }
            Self::Cuda => format!(
                "the loaded libmlx has no CUDA: `zmlx doctor --fetch cuda13`, then run with {}=cuda13 (or {} at an unpacked mlx-cuda-13 wheel)",
                locate::VARIANT_VARIABLE,
                locate::DIR_VARIABLE
            ),
            Self::Metal if Platform::HERE == Platform::MacOs => {
                "Metal needs Apple silicon and the mlx-metal library".to_owned()
            }
            Self::Metal => "Metal is for macOS on Apple silicon".to_owned(),
        }
    }
}

/// What `doctor` found out about one backend.
#[derive(Debug, Clone, Serialize)]
pub struct BackendReport {
    /// `cpu`, `cuda` or `metal`.
    pub name: &'static str,
    /// Whether it can be used.
    pub available: bool,
    /// Name of its device.
    pub device_name: Option<String>,
    /// Memory of its device.
    pub memory_bytes: Option<u64>,
    /// What is missing to use it.
    pub missing: Option<String>,
}

/// The state of the MLX installation that this program uses.
#[derive(Debug, Clone, Serialize)]
pub struct Doctor {
    /// Version of the loaded library.
    pub version: Option<String>,
    /// The loaded library.
    pub library: Option<PathBuf>,
    /// How it was found.
    pub found_by: String,
    /// The backends, usable or not.
    pub backends: Vec<BackendReport>,
    /// Why no library is loaded.
    pub error: Option<String>,
    /// The machine; on macOS only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
}

/// The name of the GPU of the loaded library. [`Error::Unavailable`] without one.
pub fn device_name() -> Result<String> {
    for backend in [Backend::Metal, Backend::Cuda] {
        let state = backend_state(backend)?;
        if state.available {
            return Ok(state.name);
        }
    }
    Err(Error::Unavailable { what: "the name of the GPU", needs: "a GPU" })
}

/// Loads the library if need be and reports on it. Never fails: what is wrong is in the report.
pub fn doctor() -> Doctor {
    let (library, found_by, error) = match loaded() {
        Ok(l) => (Some(l.located.library.clone()), l.located.found_by.clone(), None),
        Err(e) => (None, "not found".to_owned(), Some(e.to_string())),
    };
    let backends = Backend::ALL
        .into_iter()
        .map(|b| {
            let state = if error.is_none() { backend_state(b) } else { Ok(BackendState::default()) };
            let (state, failure) = match state {
                Ok(state) => (state, None),
                Err(e) => (BackendState::default(), Some(e.to_string())),
            };
            let missing =
                (!state.available).then(|| failure.unwrap_or_else(|| b.missing(library.as_deref())));
            BackendReport {
                name: b.name(),
                available: state.available,
                device_name: Some(state.name).filter(|n| !n.is_empty()),
                memory_bytes: Some(state.memory).filter(|&m| m > 0),
                missing,
            }
        })
        .collect();
    let version = library.is_some().then(|| locate::MLX_VERSION.to_owned());
    let mac = (Platform::HERE == Platform::MacOs).then(|| mac::look(library.as_deref()));
    Doctor { version, library, found_by, backends, error, mac }
}

/// Whether the loaded library has this backend and the machine a device for it.
pub fn backend_available(backend: Backend) -> Result<bool> {
    backend_state(backend).map(|state| state.available)
}

/// What MLX says of a backend; 0 and an empty name for what it does not say.
#[derive(Default)]
struct BackendState {
    available: bool,
    name: String,
    memory: u64,
    working_set: u64,
}

fn backend_state(backend: Backend) -> Result<BackendState> {
    let api = api()?;
    let mut state = BackendState::default();
    let (mut name, mut name_n) = (ptr::null(), 0);
    // SAFETY: valid out pointers; the text lives until the next call on this thread.
    unsafe {
        let status = (api.backend)(
            backend as i32,
            &mut state.available,
            &mut name,
            &mut name_n,
            &mut state.memory,
            &mut state.working_set,
        );
        check(api, status, "backend")?;
        state.name = text(name, name_n);
    }
    // MLX does not say how much memory the CPU has.
    if backend == Backend::Cpu && state.available && state.memory == 0 {
        state.memory = system_memory();
    }
    Ok(state)
}

/// What Metal recommends to use at most, in bytes; 0 if it does not say, `None` without Metal.
pub(crate) fn recommended_working_set() -> Option<u64> {
    backend_state(Backend::Metal).ok().filter(|state| state.available).map(|state| state.working_set)
}

/// Main memory in bytes; 0 when the system does not say.
fn system_memory() -> u64 {
    // SAFETY: plain queries without pointers.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    u64::try_from(pages).unwrap_or(0) * u64::try_from(size).unwrap_or(0)
}

/// Where the loaded library is; loads it if need be.
pub fn library() -> Result<PathBuf> {
    loaded().map(|l| l.located.library.clone())
}

/// Downloads and unpacks the wheel of `variant` (the platform's ordinary one when `None`) into the cache, unless it is
/// there, and returns the library. Needs `python3` with pip.
pub fn fetch(variant: Option<&str>) -> Result<PathBuf> {
    let package = locate::package_for(env::consts::OS, variant)?;
    Ok(locate::fetch(env::consts::OS, env::consts::ARCH, package)?.library)
}

pub(crate) fn find_library() -> Result<Located> {
    let located =
        |library: PathBuf, found_by: &str| Located { library, include: None, found_by: found_by.to_owned() };
    let variable = |name: &str| env::var_os(name).filter(|v| !v.is_empty());
    if let Some(dir) = variable(locate::DIR_VARIABLE).map(PathBuf::from) {
        return match locate::in_dir(env::consts::OS, &dir) {
            Some((library, _)) => Ok(located(library, locate::DIR_VARIABLE)),
            None => Err(locate::LocateError::NoLibraryInDir { dir }.into()),
        };
    }
    let mut searched = Vec::new();
    let path_variable = Platform::HERE.library_path_variable();
    for dir in variable(path_variable).iter().flat_map(env::split_paths) {
        let library = dir.join(Platform::HERE.library_file());
        if library.is_file() {
            return Ok(located(library, path_variable));
        }
    }
    let variant = env::var(locate::VARIANT_VARIABLE).ok().filter(|v| !v.is_empty());
    let cached = || -> Result<PathBuf> {
        let package = locate::package_for(env::consts::OS, variant.as_deref())?;
        let (os, arch) = (env::consts::OS, env::consts::ARCH);
        Ok(locate::cache_dir()?.join("mlx").join(format!("{}-{package}-{os}-{arch}", locate::MLX_VERSION)))
    };
    if variant.is_some() {
        let dir = cached()?;
        return match locate::in_dir(env::consts::OS, &dir) {
            Some((library, _)) => Ok(located(library, locate::VARIANT_VARIABLE)),
            None => Err(Error::LibraryNotFound {
                version: locate::MLX_VERSION,
                searched: dir.display().to_string(),
            }),
        };
    }
    if let Some(folder) = env::current_exe().ok().as_deref().and_then(Path::parent) {
        for dir in [folder.to_path_buf(), folder.join("lib"), folder.join("../lib")] {
            let library = dir.join(Platform::HERE.library_file());
            if library.is_file() {
                return Ok(located(library, "beside the program"));
            }
        }
        searched.push(folder.display().to_string());
    }
    let built = PathBuf::from(env!("ZMLX_BUILD_LIBRARY"));
    if built.is_file() {
        return Ok(located(built, concat!("the build (", env!("ZMLX_BUILD_FOUND_BY"), ")")));
    }
    searched.push(built.display().to_string());
    if let Ok(dir) = cached() {
        if let Some((library, _)) = locate::in_dir(env::consts::OS, &dir) {
            return Ok(located(library, "the cache"));
        }
        searched.push(dir.display().to_string());
    }
    Err(Error::LibraryNotFound { version: locate::MLX_VERSION, searched: searched.join(", ") })
}
