//! The GPU: its primary context, which MLX uses too, and what it is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use cudarc::driver::result as cu;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};

use crate::error::{CudaError, Result, driver, message};

/// Oldest driver API that has all that is called here.
const DRIVER_VERSION: i32 = 12_000;

/// An NVIDIA GPU.
///
/// All work goes through the device's primary context, the one that the CUDA runtime and so MLX use: an address of either
/// is an address of both.
pub struct Device {
    context: sys::CUcontext,
    device: sys::CUdevice,
    /// What it is.
    info: DeviceInfo,
    /// Where compiled kernels are kept.
    cache: Option<PathBuf>,
}

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of its memory.
    pub memory: u64,
    /// Bytes of shared memory a block may have.
    pub shared_memory: u32,
    /// Bytes of its second-level cache.
    pub l2_cache: u64,
    /// Bytes a second that its memory moves at most, by its clock and its bus; 0 if the driver does not say.
    pub bandwidth: u64,
    /// Driver API version, as `1000 * major + 10 * minor`.
    pub driver: i32,
}

impl DeviceInfo {
    /// The target of the compiler, such as `sm_90`.
    pub fn arch(&self) -> String {
        format!("sm_{}{}", self.capability.0, self.capability.1)
    }
}

// SAFETY: a context may be used from any thread that has made it current, which every call does.
unsafe impl Send for Device {}
// SAFETY: as above; the driver synchronises calls within a context.
unsafe impl Sync for Device {}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Device({})", self.info.name)
    }
}

/// Whether the driver's library is there. Loading it has no effect beyond that.
pub fn driver_present() -> bool {
    // SAFETY: NVIDIA's library has no initialiser that a program could tell.
    cfg!(not(target_os = "macos")) && unsafe { sys::is_culib_present() }
}

impl Device {
    /// The GPU `ordinal`, with compiled kernels kept in `cache`.
    ///
    /// # Errors
    /// [`CudaError::NoDriver`], [`CudaError::NoDevice`], [`CudaError::OldDriver`], [`CudaError::OldDevice`] (8.0 is the
    /// oldest).
    pub fn open(ordinal: usize, cache: Option<&Path>) -> Result<Arc<Self>> {
        if !driver_present() {
            return Err(CudaError::NoDriver);
        }
        cu::init().map_err(|error| CudaError::NoDevice(message(error)))?;
        let mut version = 0;
        // SAFETY: a valid out pointer.
        driver("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&mut version) }.result())?;
        if version < DRIVER_VERSION {
            return Err(CudaError::OldDriver(version));
        }
        let count = driver("cuDeviceGetCount", cu::device::get_count())?;
        let index = i32::try_from(ordinal).ok().filter(|i| *i < count);
        let index = index.ok_or_else(|| CudaError::NoDevice(format!("{count} GPUs, no number {ordinal}")))?;
        let device = driver("cuDeviceGet", cu::device::get(index))?;
        let info = describe(device, version)?;
        if info.capability.0 < 8 {
            let (name, (major, minor)) = (info.name, info.capability);
            return Err(CudaError::OldDevice { name, major, minor, needed: "8.0" });
        }
        // SAFETY: a device of the driver; released in `drop`.
        let context = driver("cuDevicePrimaryCtxRetain", unsafe { cu::primary_ctx::retain(device) })?;
        Ok(Arc::new(Self { context, device, info, cache: cache.map(Path::to_path_buf) }))
    }

    /// What it is.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Where compiled kernels are kept.
    pub fn cache(&self) -> Option<&Path> {
        self.cache.as_deref()
    }

    /// Makes its context the calling thread's.
    pub(crate) fn bind(&self) -> Result<()> {
        // SAFETY: a context that is retained.
        driver("cuCtxSetCurrent", unsafe { cu::ctx::set_current(self.context) })
    }

    /// The driver's number of it.
    pub(crate) fn number(&self) -> sys::CUdevice {
        self.device
    }

    /// Waits for all work of the context, that of MLX too.
    ///
    /// # Errors
    /// [`CudaError::Driver`], also for errors of earlier work.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        driver("cuCtxSynchronize", cu::ctx::synchronize())
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once. At the end of a process the driver may be gone; nothing is left to do then.
        let _ = unsafe { cu::primary_ctx::release(self.device) };
    }
}

fn describe(device: sys::CUdevice, driver_version: i32) -> Result<DeviceInfo> {
    let attribute = |which: Attribute| {
        // SAFETY: a device of the driver.
        driver("cuDeviceGetAttribute", unsafe { cu::device::get_attribute(device, which) })
    };
    let size = |which: Attribute| attribute(which).map(|v| u32::try_from(v).unwrap_or(0));
    Ok(DeviceInfo {
        name: driver("cuDeviceGetName", cu::device::get_name(device))?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: size(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        // SAFETY: a device of the driver.
        memory: driver("cuDeviceTotalMem", unsafe { cu::device::total_mem(device) })? as u64,
        shared_memory: size(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        l2_cache: u64::from(size(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
        bandwidth: bandwidth(
            size(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE).unwrap_or(0),
            size(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH).unwrap_or(0),
        ),
        driver: driver_version,
    })
}

/// Bytes a second of a memory with that clock in kHz, which moves twice a cycle, and that many bits.
fn bandwidth(kilohertz: u32, bits: u32) -> u64 {
    2 * 1000 * u64::from(kilohertz) * u64::from(bits) / 8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_h100_moves_what_its_datasheet_says() {
        assert_eq!(bandwidth(2_619_000, 5120), 3_352_320_000_000);
    }

    /// Where there is a driver this says what the GPU is, else what is missing.
    #[test]
    fn a_gpu_is_described_or_said_to_be_missing() {
        match Device::open(0, None) {
            Ok(device) => assert!(device.info().arch().starts_with("sm_") && device.info().memory > 0),
            Err(error) => {
                let expected = match driver_present() {
                    true => "nvidia-smi",
                    false => "install one, or run without CUDA",
                };
                assert!(error.to_string().contains(expected), "{error}");
            }
        }
        let error = Device::open(1 << 20, None).unwrap_err();
        assert!(matches!(error, CudaError::NoDriver | CudaError::NoDevice(_)), "{error}");
    }
}
