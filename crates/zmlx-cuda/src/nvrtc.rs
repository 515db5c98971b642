//! NVIDIA's compiler: found when it is first needed, and asked for machine code of one GPU.

use std::path::{Path, PathBuf};

use zmlx_nvrtc::{NvrtcError, Unit, in_folder};

use crate::error::{CudaError, Result};

/// Names the folder that NVRTC is in, or that holds `nvidia/cu13/lib` as its wheel unpacks.
pub const VARIABLE: &str = "ZMLX_NVRTC";

/// Names that the loader knows, newest first. A CUDA library of MLX has one of them loaded already.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// Where the tests of kernels keep the wheel, within the cache folder.
const CACHED: &str = "emulator/nvrtc-13";

/// The compiler.
#[derive(Debug)]
pub struct Nvrtc(zmlx_nvrtc::Nvrtc);

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
            match zmlx_nvrtc::Nvrtc::open(Path::new(name)) {
                Ok(nvrtc) => return Ok(Self(nvrtc)),
                // The loader does not know it.
                Err(NvrtcError::Load { .. }) => {}
                Err(error) => return Err(broken(Path::new(name), &error)),
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
        zmlx_nvrtc::Nvrtc::open(path).map(Self).map_err(|e| broken(path, &e))
    }

    /// Its version.
    pub fn version(&self) -> (i32, i32) {
        self.0.version()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Machine code for `arch` (such as `sm_90`) of a text that needs no headers. May be called from several threads.
    ///
    /// # Errors
    /// [`CudaError::Compile`] with what the compiler says of the text; [`CudaError::Nvrtc`].
    pub fn compile(&self, name: &str, text: &str, arch: &str) -> Result<Vec<u8>> {
        let file = format!("{name}.cu");
        let options = ["--std=c++17", "--device-as-default-execution-space"].map(str::to_owned);
        let unit = Unit { file: &file, text, headers: &[], arch, options: &options };
        match self.0.compile(&unit) {
            Ok(compiled) => Ok(compiled.code),
            Err(NvrtcError::Compile { log }) => Err(CudaError::Compile {
                kernel: name.to_owned(),
                arch: arch.to_owned(),
                log: log.trim().to_owned(),
            }),
            Err(error @ NvrtcError::Zero(_)) => Err(CudaError::Argument(format!("{name}: {error}"))),
            Err(error) => Err(broken(self.path(), &error)),
        }
    }
}

fn broken(path: &Path, error: &NvrtcError) -> CudaError {
    let message = match error {
        NvrtcError::Load { message, .. } => message.clone(),
        other => other.to_string(),
    };
    CudaError::Nvrtc { path: path.into(), message }
}
