//! A queue of work on the GPU, events in it, and graphs captured from it.

use std::sync::Arc;

use cudarc::driver::result as cu;
use cudarc::driver::sys;

use crate::device::Device;
use crate::error::{CudaError, Result, driver};
use crate::kernels::{Arg, Launch};
use crate::module::Function;

/// A queue of work.
#[derive(Debug)]
pub struct Stream {
    device: Arc<Device>,
    stream: sys::CUstream,
}

// SAFETY: the driver synchronises calls on a stream.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// A queue that waits for no other.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn new(device: &Arc<Device>) -> Result<Arc<Self>> {
        device.bind()?;
        let stream = driver("cuStreamCreate", cu::stream::create(cu::stream::StreamKind::NonBlocking))?;
        Ok(Arc::new(Self { device: Arc::clone(device), stream }))
    }

    /// Its device.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(crate) fn raw(&self) -> sys::CUstream {
        self.stream
    }

    pub(crate) fn bind(&self) -> Result<()> {
        self.device.bind()
    }

    /// Waits until all that it was given is done.
    ///
    /// # Errors
    /// [`CudaError::Driver`], also for what earlier work did wrong.
    pub fn synchronize(&self) -> Result<()> {
        self.bind()?;
        // SAFETY: a live stream.
        driver("cuStreamSynchronize", unsafe { cu::stream::synchronize(self.stream) })
    }

    /// Launches a kernel. With `overlap` it may begin before the one before it has ended: kernels that wait for their
    /// predecessor themselves (programmatic dependent launch) gain the time of a start.
    ///
    /// # Safety
    /// The addresses among the arguments are memory of the GPU as the kernel takes it, which lives until it is done.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub(crate) unsafe fn launch(&self, function: &Function, launch: &Launch, overlap: bool) -> Result<()> {
        // Little-endian: the low half of a word is where a number of 32 bits is read from.
        let word = |arg: &Arg| match arg {
            Arg::Ptr(address) => *address,
            Arg::I32(number) => u64::from(number.cast_unsigned()),
        };
        let mut words: Vec<u64> = launch.args.iter().map(word).collect();
        let mut pointers: Vec<*mut std::ffi::c_void> =
            words.iter_mut().map(|w| std::ptr::from_mut(w).cast()).collect();
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]) = (launch.grid, launch.block);
        let config = sys::CUlaunchConfig {
            gridDimX: grid_x,
            gridDimY: grid_y,
            gridDimZ: grid_z,
            blockDimX: block_x,
            blockDimY: block_y,
            blockDimZ: block_z,
            sharedMemBytes: launch.shared,
            hStream: self.stream,
            attrs: &mut attribute,
            numAttrs: u32::from(overlap),
        };
        // SAFETY: each parameter points at a word that outlives the call, which copies them; the rest is the caller's.
        let code = unsafe {
            sys::cuLaunchKernelEx(&config, function.raw(), pointers.as_mut_ptr(), std::ptr::null_mut())
        };
        driver("cuLaunchKernelEx", code.result())
    }

    /// What `record` puts on the stream, as a graph that can be replayed. Nothing runs now.
    ///
    /// # Errors
    /// Those of `record`; [`CudaError::Driver`].
    pub(crate) fn capture(self: &Arc<Self>, record: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.bind()?;
        // Other threads (those of MLX) may go on allocating meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a live stream.
        driver("cuStreamBeginCapture", unsafe { cu::stream::begin_capture(self.stream, mode) })?;
        let recorded = record();
        // SAFETY: capture was begun above; it is ended also after an error, or the stream would be of no use.
        let graph = driver("cuStreamEndCapture", unsafe { cu::stream::end_capture(self.stream) });
        recorded?;
        let graph = graph?;
        if graph.is_null() {
            return Err(CudaError::Driver {
                call: "cuStreamEndCapture",
                message: "nothing was captured".into(),
            });
        }
        let mut exec = std::ptr::null_mut();
        // SAFETY: a captured graph, instantiated once and destroyed once.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) }.result();
        // SAFETY: as above.
        let destroyed = unsafe { cu::graph::destroy(graph) };
        driver("cuGraphInstantiate", made)?;
        driver("cuGraphDestroy", destroyed)?;
        let graph = Graph { stream: Arc::clone(self), exec };
        // The first replay should not pay for it.
        // SAFETY: a live graph and stream.
        driver("cuGraphUpload", unsafe { cu::graph::upload(graph.exec, self.stream) })?;
        Ok(graph)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: a live stream, destroyed once; work on it goes on to its end.
            let _ = unsafe { cu::stream::destroy(self.stream) };
        }
    }
}

/// Captured work that can be replayed.
#[derive(Debug)]
pub(crate) struct Graph {
    stream: Arc<Stream>,
    exec: sys::CUgraphExec,
}

// SAFETY: used through `&mut` only.
unsafe impl Send for Graph {}
// SAFETY: a shared reference gives nothing.
unsafe impl Sync for Graph {}

impl Graph {
    /// Puts the captured work on its stream once more.
    ///
    /// # Safety
    /// All memory that the captured work names is still there.
    pub(crate) unsafe fn replay(&mut self) -> Result<()> {
        self.stream.bind()?;
        // SAFETY: a live graph and stream.
        driver("cuGraphLaunch", unsafe { cu::graph::launch(self.exec, self.stream.raw()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.stream.bind().is_ok() {
            // SAFETY: a live graph, destroyed once.
            let _ = unsafe { cu::graph::exec_destroy(self.exec) };
        }
    }
}

/// A mark in a stream.
#[derive(Debug)]
pub(crate) struct Event {
    device: Arc<Device>,
    event: sys::CUevent,
}

// SAFETY: the driver synchronises calls on an event.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// A mark; `timed` if times are wanted.
    pub(crate) fn new(device: &Arc<Device>, timed: bool) -> Result<Self> {
        device.bind()?;
        let flags = if timed {
            sys::CUevent_flags::CU_EVENT_DEFAULT
        } else {
            sys::CUevent_flags::CU_EVENT_DISABLE_TIMING
        };
        let event = driver("cuEventCreate", cu::event::create(flags))?;
        Ok(Self { device: Arc::clone(device), event })
    }

    /// Sets it after all that the stream was given.
    pub(crate) fn record(&self, stream: &Stream) -> Result<()> {
        self.device.bind()?;
        // SAFETY: a live event and stream.
        driver("cuEventRecord", unsafe { cu::event::record(self.event, stream.raw()) })
    }

    /// Waits for it.
    pub(crate) fn wait(&self) -> Result<()> {
        self.device.bind()?;
        // SAFETY: a live event.
        driver("cuEventSynchronize", unsafe { cu::event::synchronize(self.event) })
    }

    /// Seconds from `earlier` to this; both have passed.
    pub(crate) fn seconds_since(&self, earlier: &Self) -> Result<f64> {
        self.device.bind()?;
        // SAFETY: live events.
        let milliseconds = unsafe { cu::event::elapsed(earlier.event, self.event) };
        Ok(f64::from(driver("cuEventElapsedTime", milliseconds)?) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: a live event, destroyed once.
            let _ = unsafe { cu::event::destroy(self.event) };
        }
    }
}
