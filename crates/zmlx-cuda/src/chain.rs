//! Launches one after another as a graph of their own: for measuring kernels and for trying them on a GPU.

use std::sync::Arc;

use crate::device::Device;
use crate::error::{CudaError, Result};
use crate::kernels::{Launch, Source};
use crate::module::{self, Functions};
use crate::stream::{Event, Graph, Stream};

/// Kernels that are loaded, and a stream for them.
#[derive(Debug)]
pub struct Bench {
    device: Arc<Device>,
    stream: Arc<Stream>,
    functions: Functions,
}

impl Bench {
    /// Compiles and loads what it can of `sources`; what it cannot comes back with the reason.
    ///
    /// # Errors
    /// [`CudaError::Driver`] if there can be no stream.
    pub fn new<'a>(
        device: &Arc<Device>,
        sources: &[&'a Source],
    ) -> Result<(Self, Vec<(&'a Source, CudaError)>)> {
        let stream = Stream::new(device)?;
        let (mut functions, mut failed) = (Functions::new(), Vec::new());
        // All at once, on all processors; only if one fails it is worth asking which.
        match module::load(device, sources) {
            Ok(all) => functions = all,
            Err(_) => {
                for source in sources {
                    match module::load(device, &[source]) {
                        Ok(one) => functions.extend(one),
                        Err(error) => failed.push((*source, error)),
                    }
                }
            }
        }
        Ok((Self { device: Arc::clone(device), stream, functions }, failed))
    }

    /// The stream that chains run on.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Registers a thread and bytes that did not fit into them; nothing if the kernel is not loaded.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    pub fn registers(&self, source: &Source) -> Result<Option<(i32, i32)>> {
        self.functions.get(source).map(|f| f.registers()).transpose()
    }

    /// Captures launches, of a kernel each. With `overlap` each may begin before the one before it has ended.
    ///
    /// # Errors
    /// [`CudaError::Argument`] for a kernel that is not loaded; [`CudaError::Driver`].
    ///
    /// # Safety
    /// The addresses among the arguments are memory of the GPU as the kernels take it, which outlives the chain.
    pub unsafe fn chain(&self, launches: &[(&Source, Launch)], overlap: bool) -> Result<Chain> {
        let missing = || CudaError::Argument("a chain names a kernel that is not loaded".to_owned());
        let mut steps = Vec::new();
        for (source, launch) in launches {
            let function = Arc::clone(self.functions.get(*source).ok_or_else(missing)?);
            function.allow_shared(launch.shared)?;
            steps.push((function, launch.clone()));
        }
        let graph = self.stream.capture(|| {
            for (index, (function, launch)) in steps.iter().enumerate() {
                // SAFETY: as the caller promises; nothing runs now.
                unsafe { self.stream.launch(function, launch, overlap && index > 0) }?;
            }
            Ok(())
        })?;
        let marks = [Event::new(&self.device, true)?, Event::new(&self.device, true)?];
        // The chain keeps its kernels.
        let functions = steps.into_iter().map(|(function, _)| function).collect();
        Ok(Chain { stream: Arc::clone(&self.stream), graph, marks, _functions: functions })
    }
}

/// Launches that can be replayed.
#[derive(Debug)]
pub struct Chain {
    stream: Arc<Stream>,
    graph: Graph,
    marks: [Event; 2],
    _functions: Vec<Arc<module::Function>>,
}

impl Chain {
    /// Runs all once more and waits for them: the seconds that they took on the GPU.
    ///
    /// # Errors
    /// [`CudaError::Driver`].
    ///
    /// # Safety
    /// As for [`Bench::chain`].
    pub unsafe fn seconds(&mut self) -> Result<f64> {
        self.marks[0].record(&self.stream)?;
        // SAFETY: as the caller promises.
        unsafe { self.graph.replay() }?;
        self.marks[1].record(&self.stream)?;
        self.marks[1].wait()?;
        self.marks[1].seconds_since(&self.marks[0])
    }
}
