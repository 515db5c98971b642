//! The table of bridge functions and its loading.

use std::ffi::{CStr, c_char, c_void};
use std::path::Path;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};

use crate::bridge_file::BridgeFile;
use crate::callback;
use crate::cpu::CpuVtable;
use crate::error::{Error, Result};
use crate::kernel::{KernelCall, KernelSpec};
use crate::locate::{self, Located};
use crate::platform::Platform;
use crate::transforms::TransformsVtable;
use crate::{Array, runtime};

macro_rules! opaque {
    ($($name:ident),*) => {$(
        #[repr(C)]
        pub(crate) struct $name { _private: [u8; 0] }
    )*};
}
opaque!(RawArray, RawList, RawFunction, RawKernel);

/// Index of a stream in the bridge's table.
pub(crate) type StreamArg = i32;

/// A closure as the bridge calls it; see `bridge.h`.
#[repr(C)]
pub(crate) struct Callback {
    pub(crate) data: *mut c_void,
    pub(crate) call: unsafe extern "C" fn(*mut c_void, *const *const RawList, usize, *mut RawList) -> i32,
    pub(crate) drop: Option<unsafe extern "C" fn(*mut c_void)>,
}

include!(concat!(env!("OUT_DIR"), "/api.rs"));

/// The compiled bridge. It is loaded after libmlx and resolves against it.
static BRIDGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/zmlx_bridge.bin"));

pub(crate) struct Loaded {
    pub(crate) api: &'static Api,
    pub(crate) located: Located,
}

static LOADED: OnceLock<Result<Loaded>> = OnceLock::new();

/// The bridge, loaded on first use.
#[inline]
pub(crate) fn api() -> Result<&'static Api> {
    if callback::inside() {
        return Err(Error::InsideCallback);
    }
    match LOADED.get() {
        Some(Ok(loaded)) => Ok(loaded.api),
        _ => loaded().map(|l| l.api),
    }
}

/// The bridge where an [`Array`] proves that it has been loaded; also inside callbacks.
#[inline]
pub(crate) fn api_of(_: &Array) -> Option<&'static Api> {
    loaded_api()
}

/// The bridge if it has been loaded.
#[inline]
pub(crate) fn loaded_api() -> Option<&'static Api> {
    match LOADED.get() {
        Some(Ok(loaded)) => Some(loaded.api),
        _ => None,
    }
}

pub(crate) fn loaded() -> Result<&'static Loaded> {
    LOADED.get_or_init(load).as_ref().map_err(Clone::clone)
}

fn load() -> Result<Loaded> {
    let located = runtime::find_library()?;
    let scope = if Platform::HERE.opens_symbols_to_all() { RTLD_GLOBAL } else { RTLD_LOCAL };
    let flags = RTLD_NOW | scope;
    let open = |path: &Path| {
        // SAFETY: loading runs the initialisers of libmlx or of our own bridge, which have no preconditions.
        unsafe { Library::open(Some(path), flags) }.map_err(|e| load_error(path, &e))
    };
    let mlx = open(&located.library)?;
    check_version(&mlx, &located.library)?;
    // Stays loaded for the life of the process: arrays hold code of it.
    std::mem::forget(mlx);
    let file = BridgeFile::new(BRIDGE)?;
    let path = file.path().to_path_buf();
    let bridge = open(&path);
    file.loaded();
    let bridge = bridge?;
    // SAFETY: the symbol has this signature (build/table.rs writes it).
    let api = unsafe {
        let get = bridge
            .get::<unsafe extern "C" fn(u64) -> *const Api>(b"zmlx_bridge_api\0")
            .map_err(|e| load_error(&path, &e))?;
        get(size_of::<Api>() as u64).as_ref()
    };
    std::mem::forget(bridge);
    let api = api.ok_or_else(|| Error::LibraryLoad {
        path,
        message: "the bridge and this build disagree on their function table".to_owned(),
    })?;
    Ok(Loaded { api, located })
}

/// The loader's message is in the error's source.
fn load_error(path: &Path, error: &libloading::Error) -> Error {
    let message = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    Error::LibraryLoad { path: path.to_path_buf(), message }
}

/// A libmlx of another version would be undefined behaviour to use, so its version is asked for before anything else.
fn check_version(mlx: &Library, path: &Path) -> Result<()> {
    // SAFETY: `const char* mlx::core::version()` has this mangled name and signature in every release.
    let found = unsafe {
        match mlx.get::<unsafe extern "C" fn() -> *const c_char>(b"_ZN3mlx4core7versionEv\0") {
            Ok(version) => CStr::from_ptr(version()).to_string_lossy().into_owned(),
            Err(_) => "of unknown version".to_owned(),
        }
    };
    if found == locate::MLX_VERSION {
        return Ok(());
    }
    Err(locate::LocateError::WrongVersion { path: path.to_path_buf(), found }.into())
}

/// Text of the bridge's last error on this thread.
pub(crate) fn last_error(api: &Api) -> String {
    let (mut data, mut len) = (std::ptr::null(), 0);
    // SAFETY: the out pointers are valid; the text lives until the next failing call on this thread.
    unsafe {
        (api.last_error)(&mut data, &mut len);
        text(data, len)
    }
}

/// Copies text that the bridge handed out.
///
/// # Safety
/// `data` points to `len` readable bytes, or `len` is 0.
pub(crate) unsafe fn text(data: *const u8, len: usize) -> String {
    if len == 0 {
        return String::new();
    }
    // SAFETY: as the caller promises.
    String::from_utf8_lossy(unsafe { std::slice::from_raw_parts(data, len) }).into_owned()
}

/// Turns a status of the bridge into a result.
pub(crate) fn check(api: &Api, status: i32, what: &'static str) -> Result<()> {
    match status {
        0 => Ok(()),
        2 => Err(callback::take_pending()),
        _ => Err(Error::Mlx { what, message: last_error(api) }),
    }
}

/// The error of a failed op, with the shapes of its operands.
#[cold]
pub(crate) fn op_error<'a>(
    api: &Api,
    status: i32,
    op: &'static str,
    collect: impl FnOnce(&mut Vec<Option<&'a Array>>),
) -> Error {
    if status == 2 {
        return callback::take_pending();
    }
    let message = last_error(api);
    let mut operands = Vec::new();
    collect(&mut operands);
    let shown: Vec<String> = operands.iter().take(8).map(|a| a.map_or("-".to_owned(), describe)).collect();
    let more = if operands.len() > 8 { ", ..." } else { "" };
    Error::Op { op, operands: shown.join(", ") + more, message }
}

/// `float32[2, 3]`.
pub(crate) fn describe(a: &Array) -> String {
    format!("{}{:?}", a.dtype(), a.shape())
}
