//! Devices and streams: where ops run.
//!
//! Every op is put on the calling thread's current stream: the one given to [`with_stream`], else the default stream
//! of the default device. The default device is the GPU where the library and machine have one.

use std::cell::Cell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::api::{Api, StreamArg, api, check};
use crate::error::{Error, Result};

/// A kind of processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Device {
    /// The central processor.
    Cpu,
    /// The GPU of the loaded library: CUDA or Metal.
    Gpu,
}

/// A queue of work on one device. Work on one stream runs in order; streams run beside each other, and MLX makes one
/// wait for another where data flows between them. Streams live as long as the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stream {
    index: StreamArg,
    device: Device,
}

thread_local! {
    static CURRENT: Cell<Option<Stream>> = const { Cell::new(None) };
}

static CPU_STREAM: OnceLock<Stream> = OnceLock::new();
static GPU_STREAM: OnceLock<Stream> = OnceLock::new();
/// Index of the default stream of the default device; -1 before first use.
static DEFAULT: AtomicI32 = AtomicI32::new(-1);

impl Stream {
    /// A new stream.
    pub fn new(device: Device) -> Result<Self> {
        let api = api()?;
        let mut index = 0;
        // SAFETY: a valid out pointer.
        let status = unsafe { (api.stream_new)(device == Device::Gpu, &mut index) };
        match status {
            0 => Ok(Self { index, device }),
            _ if device == Device::Gpu && !gpu_available()? => {
                Err(Error::Unavailable { what: "a GPU stream", needs: "a CUDA or Metal backend" })
            }
            _ => Err(check(api, status, "Stream::new").err().unwrap_or(Error::InsideCallback)),
        }
    }

    /// The default stream of a device.
    pub fn default_of(device: Device) -> Result<Self> {
        let cell = if device == Device::Cpu { &CPU_STREAM } else { &GPU_STREAM };
        if let Some(stream) = cell.get() {
            return Ok(*stream);
        }
        // Not inside get_or_init: making a stream waits for the lock, whose holder may want this cell.
        let made = Self::new(device)?;
        Ok(*cell.get_or_init(|| made))
    }

    /// The device it runs on.
    pub fn device(self) -> Device {
        self.device
    }

    pub(crate) fn index(self) -> StreamArg {
        self.index
    }

    /// Waits until everything submitted to the stream is done, and reports errors of its work.
    pub fn synchronize(self) -> Result<()> {
        let api = api()?;
        // SAFETY: an index of the bridge's table.
        let status = unsafe { (api.stream_synchronize)(self.index) };
        check(api, status, "synchronize")
    }
}

/// Whether the loaded library can use a GPU of this machine.
pub fn gpu_available() -> Result<bool> {
    let api = api()?;
    let mut gpu = false;
    // SAFETY: a valid out pointer.
    let status = unsafe { (api.default_device_is_gpu)(&mut gpu) };
    check(api, status, "default device")?;
    Ok(gpu)
}

/// The device that ops use outside [`with_stream`] and [`with_device`].
pub fn default_device() -> Result<Device> {
    Ok(default_stream()?.device)
}

fn default_stream() -> Result<Stream> {
    let index = DEFAULT.load(Ordering::Relaxed);
    for cell in [&CPU_STREAM, &GPU_STREAM] {
        if let Some(s) = cell.get()
            && s.index == index
        {
            return Ok(*s);
        }
    }
    let device = if gpu_available()? { Device::Gpu } else { Device::Cpu };
    let stream = Stream::default_of(device)?;
    DEFAULT.store(stream.index, Ordering::Relaxed);
    Ok(stream)
}

/// Sets the default device of the whole process.
pub fn set_default_device(device: Device) -> Result<()> {
    DEFAULT.store(Stream::default_of(device)?.index, Ordering::Relaxed);
    Ok(())
}

/// The calling thread's current stream, as the bridge wants it.
#[inline]
pub(crate) fn current(_: &Api) -> Result<StreamArg> {
    if let Some(stream) = CURRENT.with(Cell::get) {
        return Ok(stream.index);
    }
    match DEFAULT.load(Ordering::Relaxed) {
        -1 => default_stream().map(|s| s.index),
        index => Ok(index),
    }
}

/// The calling thread's current stream if it is on the CPU, else the default CPU stream.
pub(crate) fn current_cpu() -> Result<StreamArg> {
    match CURRENT.with(Cell::get) {
        Some(stream) if stream.device == Device::Cpu => Ok(stream.index),
        _ => Stream::default_of(Device::Cpu).map(|s| s.index),
    }
}

/// The device of the calling thread's current stream, where ops run.
pub fn current_device() -> Result<Device> {
    match CURRENT.with(Cell::get) {
        Some(stream) => Ok(stream.device),
        None => default_device(),
    }
}

/// Runs `f` with `stream` as this thread's current stream.
pub fn with_stream<T>(stream: Stream, f: impl FnOnce() -> T) -> T {
    struct Restore(Option<Stream>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.with(|c| c.set(self.0));
        }
    }
    let _restore = Restore(CURRENT.with(|c| c.replace(Some(stream))));
    f()
}

/// Runs `f` with the default stream of `device` as this thread's current stream.
pub fn with_device<T>(device: Device, f: impl FnOnce() -> Result<T>) -> Result<T> {
    with_stream(Stream::default_of(device)?, f)
}

/// Waits for the calling thread's current stream.
pub fn synchronize() -> Result<()> {
    let api = api()?;
    // SAFETY: an index of the bridge's table.
    let status = unsafe { (api.stream_synchronize)(current(api)?) };
    check(api, status, "synchronize")
}
