//! Kernels as machine code: compiled once, kept in the cache folder, loaded into the GPU.

use std::collections::{HashMap, HashSet};
use std::ffi::{CString, c_void};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::{fs, thread};

use cudarc::driver::result as cu;
use cudarc::driver::sys;
use sha2::{Digest, Sha256};

use crate::device::Device;
use crate::error::{CudaError, Result, driver};
use crate::kernels::Source;
use crate::nvrtc::Nvrtc;

/// Changes when the compiler's options do, so that older machine code is not taken.
const RECIPE: &str = "1";

/// A kernel that can be launched.
#[derive(Debug)]
pub(crate) struct Function {
    device: Arc<Device>,
    module: sys::CUmodule,
    function: sys::CUfunction,
    name: String,
}

// SAFETY: immutable once loaded.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    fn load(device: &Arc<Device>, name: &str, code: &[u8]) -> Result<Self> {
        device.bind()?;
        let symbol =
            CString::new(name).map_err(|_| CudaError::Argument(format!("a kernel named {name:?}")))?;
        // SAFETY: machine code as the compiler made it, which the driver copies.
        let module = unsafe { cu::module::load_data(code.as_ptr().cast::<c_void>()) };
        let module = driver("cuModuleLoadData", module)?;
        let mut loaded = Self {
            device: Arc::clone(device),
            module,
            function: std::ptr::null_mut(),
            name: name.to_owned(),
        };
        // SAFETY: a live module.
        loaded.function = driver("cuModuleGetFunction", unsafe { cu::module::get_function(module, symbol) })?;
        Ok(loaded)
    }

    pub(crate) fn raw(&self) -> sys::CUfunction {
        self.function
    }

    /// Lets blocks have that much shared memory: more than 48 KiB must be asked for.
    pub(crate) fn allow_shared(&self, bytes: u32) -> Result<()> {
        let most = self.device.info().shared_memory;
        if bytes > most {
            let message =
                format!("{} asks for {bytes} bytes of shared memory a block, the GPU has {most}", self.name);
            return Err(CudaError::Argument(message));
        }
        self.device.bind()?;
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: a loaded function.
        let set = unsafe { cu::function::set_function_attribute(self.function, which, bytes as i32) };
        driver("cuFuncSetAttribute", set)
    }

    /// Registers a thread, and bytes a thread that did not fit into them.
    pub(crate) fn registers(&self) -> Result<(i32, i32)> {
        self.device.bind()?;
        let get = |which| {
            // SAFETY: a loaded function.
            driver("cuFuncGetAttribute", unsafe {
                cu::function::get_function_attribute(self.function, which)
            })
        };
        let registers = get(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_NUM_REGS)?;
        Ok((registers, get(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?))
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: loaded once; whoever launches it keeps it.
            let _ = unsafe { cu::module::unload(self.module) };
        }
    }
}

/// Kernels by what they are made of.
pub(crate) type Functions = HashMap<Source, Arc<Function>>;

/// Compiles what the cache folder lacks, on all processors, and loads all. Each kernel counts once.
pub(crate) fn load(device: &Arc<Device>, sources: &[&Source]) -> Result<Functions> {
    let wanted: Vec<&Source> = sources.iter().copied().collect::<HashSet<_>>().into_iter().collect();
    let mut loaded = Functions::new();
    for (source, code) in machine_code(device, &wanted)? {
        loaded.insert(source.clone(), Arc::new(Function::load(device, source.name, &code)?));
    }
    Ok(loaded)
}

/// The machine code of each text for the device.
fn machine_code<'a>(device: &Device, sources: &[&'a Source]) -> Result<Vec<(&'a Source, Vec<u8>)>> {
    let nvrtc = Nvrtc::find(device.cache())?;
    let folder = device.cache().map(|c| c.join("cuda"));
    compile_all(&nvrtc, &device.info().arch(), folder.as_deref(), sources)
}

/// The machine code of each text: from `folder` if it is there, else compiled and put there.
pub fn compile_all<'a>(
    nvrtc: &Nvrtc,
    arch: &str,
    folder: Option<&Path>,
    sources: &[&'a Source],
) -> Result<Vec<(&'a Source, Vec<u8>)>> {
    let next = AtomicUsize::new(0);
    let threads = thread::available_parallelism().map_or(1, usize::from).min(sources.len().max(1));
    let work = || -> Result<Vec<(&'a Source, Vec<u8>)>> {
        let mut made = Vec::new();
        while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
            made.push((*source, compiled(nvrtc, arch, folder, source)?));
        }
        Ok(made)
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut all = Vec::new();
        for worker in workers {
            all.extend(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(all)
    })
}

/// One text's machine code.
fn compiled(nvrtc: &Nvrtc, arch: &str, folder: Option<&Path>, source: &Source) -> Result<Vec<u8>> {
    let text = source.text();
    let place = folder.map(|f| f.join(file_name(nvrtc.version(), arch, source.name, &text)));
    if let Some(code) = place.as_deref().and_then(|p| fs::read(p).ok()).filter(|c| is_cubin(c)) {
        return Ok(code);
    }
    let code = nvrtc.compile(source.name, &text, arch)?;
    if let Some(place) = place {
        // A cache that cannot be written costs time at the next start and nothing else.
        keep(&place, &code);
    }
    Ok(code)
}

/// Machine code is an ELF file.
fn is_cubin(code: &[u8]) -> bool {
    code.starts_with(b"\x7fELF")
}

fn file_name((major, minor): (i32, i32), arch: &str, name: &str, text: &str) -> String {
    let mut hash = Sha256::new();
    for part in [RECIPE, arch, &format!("{major}.{minor}"), name, text] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    let mut file = format!("{name}-");
    for byte in &hash.finalize()[..16] {
        // Writing to a String cannot fail.
        let _ = write!(file, "{byte:02x}");
    }
    file + ".cubin"
}

/// Writes to a temporary name and renames, so that nobody ever reads half a file.
fn keep(place: &Path, code: &[u8]) -> Option<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let folder = place.parent()?;
    fs::create_dir_all(folder).ok()?;
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let temporary: PathBuf = folder.join(format!(".{}-{number}.tmp", std::process::id()));
    let written = fs::write(&temporary, code).and_then(|()| fs::rename(&temporary, place));
    if written.is_err() {
        fs::remove_file(&temporary).ok();
    }
    written.ok()
}
