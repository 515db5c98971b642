//! Memory of the GPU, and of the host where the GPU writes.

use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUpointer_attribute as PointerAttribute};
use cudarc::driver::{DriverError, result as cu};

use crate::device::Device;
use crate::error::{CudaError, Result, driver, message};
use crate::stream::Stream;

/// Memory of the GPU, zeros at first.
#[derive(Debug)]
pub struct DeviceBuffer {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
}

impl DeviceBuffer {
    /// So many bytes of zeros for `what`.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn new(device: &Arc<Device>, bytes: usize, what: &'static str) -> Result<Self> {
        device.bind()?;
        let size = bytes.max(16);
        // SAFETY: freed in `drop`.
        let address = unsafe { cu::malloc_sync(size) }.map_err(|error| out_of_memory(error, size, what))?;
        let buffer = Self { device: Arc::clone(device), address, bytes };
        // SAFETY: the range has just been made, and nobody else knows of it.
        driver("cuMemsetD8", unsafe { cu::memset_d8_sync(address, 0, size) })?;
        settled()?;
        Ok(buffer)
    }

    /// A copy of `bytes`.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn of(device: &Arc<Device>, bytes: &[u8], what: &'static str) -> Result<Self> {
        let buffer = Self::new(device, bytes.len(), what)?;
        buffer.fill(bytes)?;
        Ok(buffer)
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Copies `bytes` to its start, after all that the stream was given before.
    ///
    /// # Errors
    /// [`CudaError::Argument`] if they do not fit in; [`CudaError::Driver`].
    pub fn write(&self, stream: &Stream, bytes: &[u8]) -> Result<()> {
        if bytes.len() > self.bytes {
            return Err(CudaError::Argument(format!("{} bytes into {}", bytes.len(), self.bytes)));
        }
        self.device.bind()?;
        // SAFETY: within the buffer; pageable memory is copied from before the call returns.
        driver("cuMemcpyHtoDAsync", unsafe { cu::memcpy_htod_async(self.address, bytes, stream.raw()) })
    }

    /// Copies `bytes` to its start, at once: for memory that no submitted work uses.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn fill(&self, bytes: &[u8]) -> Result<()> {
        if bytes.len() > self.bytes {
            return Err(CudaError::Argument(format!("{} bytes into {}", bytes.len(), self.bytes)));
        }
        self.device.bind()?;
        // SAFETY: within the buffer; the bytes are staged when the call returns.
        driver("cuMemcpyHtoD", unsafe { cu::memcpy_htod_sync(self.address, bytes) })?;
        settled()
    }

    /// Its first bytes, when the stream has done what it was given before.
    ///
    /// # Errors
    /// [`CudaError::Argument`] if there are fewer; [`CudaError::Driver`].
    pub fn read(&self, stream: &Stream, bytes: &mut [u8]) -> Result<()> {
        if bytes.len() > self.bytes {
            return Err(CudaError::Argument(format!("{} bytes from {}", bytes.len(), self.bytes)));
        }
        stream.synchronize()?;
        // SAFETY: within the buffer; the call returns when they are copied.
        driver("cuMemcpyDtoH", unsafe { cu::memcpy_dtoh_sync(bytes, self.address) })
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `malloc_sync`, freed once. The driver waits for work that uses it.
            let _ = unsafe { cu::free_sync(self.address) };
        }
    }
}

/// Waits for what was put on the context's own stream. Its calls may return before the GPU has done what they ask (filling
/// always, copying from pageable memory once it is staged), and our streams do not wait for it: zeros could come after what
/// a kernel wrote. On a GPU that others keep busy tokens were wrong now and then before this waited.
fn settled() -> Result<()> {
    // SAFETY: the context's own stream, which is always there.
    driver("cuStreamSynchronize", unsafe { cu::stream::synchronize(std::ptr::null_mut()) })
}

fn out_of_memory(error: DriverError, bytes: usize, what: &'static str) -> CudaError {
    match error.0 {
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => CudaError::OutOfMemory { bytes, what },
        _ => CudaError::Driver { call: "cuMemAlloc", message: message(error) },
    }
}

/// Memory of the GPU that someone else owns, an array of MLX for one; kept alive as long as this.
#[derive(Clone)]
pub struct External {
    address: u64,
    bytes: usize,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for External {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "External({} bytes at {:#x})", self.bytes, self.address)
    }
}

impl External {
    /// `bytes` bytes at `address`, which `owner` keeps; the driver is asked whether they are there. What the GPU has not at
    /// hand yet (memory that it shares with the host) is brought there.
    ///
    /// # Errors
    /// [`CudaError::Address`] if the driver knows of no such memory.
    pub fn new(
        device: &Device,
        what: &str,
        address: u64,
        bytes: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        device.bind()?;
        let wrong = |message: String| CudaError::Address { what: what.to_owned(), address, bytes, message };
        let (mut start, mut size) = (0, 0);
        // SAFETY: valid out pointers; the driver looks the address up and does not read it.
        let found = unsafe { sys::cuMemGetAddressRange_v2(&mut start, &mut size, address) };
        found.result().map_err(|error| wrong(message(error)))?;
        if address.wrapping_sub(start).saturating_add(bytes as u64) > size as u64 {
            return Err(wrong(format!("the allocation there has {size} bytes from {start:#x} on")));
        }
        let mut managed = 0i32;
        let is_managed = PointerAttribute::CU_POINTER_ATTRIBUTE_IS_MANAGED;
        // SAFETY: an int, as the attribute has it; the address is one of the driver.
        let known =
            unsafe { sys::cuPointerGetAttribute((&raw mut managed).cast::<c_void>(), is_managed, address) };
        known.result().map_err(|error| wrong(message(error)))?;
        if managed != 0 && bytes > 0 {
            // Where managed memory cannot be moved ahead it moves when it is touched: slower once, and right.
            // SAFETY: a range of managed memory.
            let _ = unsafe { sys::cuMemPrefetchAsync(address, bytes, device.number(), std::ptr::null_mut()) };
        }
        Ok(Self { address, bytes, _owner: owner })
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Its size.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }
}

/// Rows of equal width at equal distances in the memory of the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    /// Where the first begins.
    pub address: u64,
    /// Bytes from one to the next.
    pub pitch: usize,
}

/// Copies `count` rows of `width` bytes within the GPU, in the stream's order.
///
/// # Safety
/// Both ranges are memory of the GPU that lives until the stream is done, and nobody else writes them meanwhile.
pub(crate) unsafe fn copy_rows(
    stream: &Stream,
    from: Rows,
    to: Rows,
    width: usize,
    count: usize,
) -> Result<()> {
    if width == 0 || count == 0 {
        return Ok(());
    }
    stream.bind()?;
    let copy = sys::CUDA_MEMCPY2D {
        srcXInBytes: 0,
        srcY: 0,
        srcMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        srcHost: std::ptr::null(),
        srcDevice: from.address,
        srcArray: std::ptr::null_mut(),
        srcPitch: from.pitch,
        dstXInBytes: 0,
        dstY: 0,
        dstMemoryType: sys::CUmemorytype::CU_MEMORYTYPE_DEVICE,
        dstHost: std::ptr::null_mut(),
        dstDevice: to.address,
        dstArray: std::ptr::null_mut(),
        dstPitch: to.pitch,
        WidthInBytes: width,
        Height: count,
    };
    // SAFETY: as the caller promises.
    driver("cuMemcpy2DAsync", unsafe { sys::cuMemcpy2DAsync_v2(&copy, stream.raw()) }.result())
}

/// Words of the host that the GPU writes and the host reads: `len` of 32 bits, zeros at first.
#[derive(Debug)]
pub struct Ring {
    device: Arc<Device>,
    words: *mut u32,
    len: usize,
}

// SAFETY: page-locked memory of the process; read by volatile reads only.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    /// So many words.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn new(device: &Arc<Device>, len: usize) -> Result<Self> {
        device.bind()?;
        let bytes = len.max(4) * size_of::<u32>();
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: freed in `drop`.
        let words = unsafe { cu::malloc_host(bytes, flags) };
        let words = words.map_err(|e| out_of_memory(e, bytes, "page-locked memory"))?.cast::<u32>();
        // SAFETY: as many bytes as were made.
        unsafe { std::ptr::write_bytes(words, 0, len.max(4)) };
        Ok(Self { device: Arc::clone(device), words, len })
    }

    /// Where the GPU writes: with unified addresses the host's own.
    pub fn address(&self) -> u64 {
        self.words as u64
    }

    /// How many words.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Word `index`, modulo the length, as the GPU last wrote it.
    pub fn word(&self, index: usize) -> u32 {
        // SAFETY: within the words; the GPU may write them now, hence volatile.
        unsafe { self.words.add(index % self.len.max(1)).read_volatile() }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: made by `malloc_host`, freed once.
            let _ = unsafe { cu::free_host(self.words.cast()) };
        }
    }
}
