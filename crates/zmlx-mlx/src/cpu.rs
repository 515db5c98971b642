//! Rust functions as primitives of MLX on the CPU.
//!
//! A [`CpuKernel`] becomes a node of the lazy graph: it runs when its result is needed, on the worker thread of its
//! stream, with its inputs as contiguous typed views and its outputs as mutable views. It works inside `compile` and,
//! with a [`CpuKernel::vjp`], inside `grad`; its inputs may come from any stream or device.
//!
//! ```
//! use zmlx_mlx::cpu::{CpuPrimitive, from_fn};
//! use zmlx_mlx::kernel::Spec;
//! use zmlx_mlx::Array;
//!
//! # fn main() -> zmlx_mlx::Result<()> {
//! let twice = CpuPrimitive::new(from_fn(
//!     "twice",
//!     |inputs| Ok(vec![inputs[0].clone()]),
//!     |inputs, outputs| {
//!         let x = inputs[0].as_slice::<f32>()?;
//!         for (y, x) in outputs[0].as_mut_slice::<f32>()?.iter_mut().zip(x) {
//!             *y = 2.0 * x;
//!         }
//!         Ok(())
//!     },
//! ));
//! let y = twice.apply(&[&Array::from_slice(&[1.0f32, 2.0], &[2])?])?.remove(0);
//! assert_eq!(y.to_vec::<f32>()?, [2.0, 4.0]);
//! # Ok(()) }
//! ```

use std::ffi::{CString, c_char, c_void};
use std::ptr;
use std::sync::Arc;

use crate::api::{RawList, api, check, loaded_api};
use crate::array::{Array, List};
use crate::callback::{self, Inside};
use crate::element::Plain;
use crate::error::{Error, Result};
pub use crate::kernel::Spec;
use crate::{Dtype, stream};

#[repr(C)]
struct CpuView {
    data: *mut c_void,
    shape: *const i32,
    rank: usize,
    dtype: i32,
    bytes: usize,
    source: i32,
}

#[repr(C)]
pub(crate) struct CpuVtable {
    data: *mut c_void,
    drop: unsafe extern "C" fn(*mut c_void),
    name: *const c_char,
    in_place: *const i32,
    in_place_n: usize,
    eval: unsafe extern "C" fn(*mut c_void, *const CpuView, usize, *const CpuView, usize) -> i32,
    vjp: unsafe extern "C" fn(
        *mut c_void,
        *const *const RawList,
        usize,
        *const i32,
        usize,
        *mut RawList,
    ) -> i32,
    shapes: unsafe extern "C" fn(*mut c_void, *const RawList, *mut c_void, ShapeSink) -> i32,
}

type ShapeSink = unsafe extern "C" fn(*mut c_void, *const i32, usize);

/// A primitive's behaviour. All methods may run on other threads than the one that applied it.
pub trait CpuKernel: Send + Sync + 'static {
    /// Name in errors and graph dumps.
    fn name(&self) -> &str;

    /// Shapes and dtypes of the outputs (at least one), or why these inputs are wrong.
    fn outputs(&self, inputs: &[Spec]) -> Result<Vec<Spec>>;

    /// Computes the outputs. Every element must be written: buffers are reused and hold old values, except that an
    /// output with a [`CpuOutput::source`] holds that input's values. MLX can't be called here.
    fn eval(&self, inputs: &[CpuInput<'_>], outputs: &mut [CpuOutput<'_>]) -> Result<()>;

    /// Pairs (input, output): the output starts with the input's values, in the input's own memory when MLX says that
    /// nobody else needs it, else in a copy. The input is then not readable as an input. Same shape and dtype.
    fn in_place(&self) -> Vec<(usize, usize)> {
        Vec::new()
    }

    /// Gradients with respect to the inputs numbered `argnums`, each in the shape of its input.
    fn vjp(
        &self,
        _primals: &[Array],
        _cotangents: &[Array],
        _outputs: &[Array],
        _argnums: &[usize],
    ) -> Result<Vec<Array>> {
        Err(Error::NoGradient(self.name().to_owned()))
    }
}

/// An input of a running primitive: row-contiguous memory.
pub struct CpuInput<'a>(&'a CpuView);

/// An output of a running primitive: row-contiguous memory to be written.
pub struct CpuOutput<'a>(&'a CpuView);

impl CpuView {
    fn shape(&self) -> &[i32] {
        // SAFETY: the bridge gives `rank` dimensions that live for the callback.
        if self.rank == 0 { &[] } else { unsafe { std::slice::from_raw_parts(self.shape, self.rank) } }
    }

    fn dtype(&self) -> Dtype {
        Dtype::from_code(self.dtype).unwrap_or(Dtype::Uint8)
    }

    fn bytes(&self, what: &str) -> Result<(*mut u8, usize)> {
        if self.bytes == 0 {
            return Ok((ptr::NonNull::dangling().as_ptr(), 0));
        }
        if self.data.is_null() {
            return Err(Error::Argument(format!("{what} was handed over to an output: read it there")));
        }
        Ok((self.data as *mut u8, self.bytes))
    }

    fn typed<T: Plain>(&self, what: &str) -> Result<(*mut T, usize)> {
        let found = self.dtype();
        if found != T::DTYPE {
            return Err(Error::Dtype { expected: T::DTYPE, found });
        }
        self.bytes(what)?;
        if self.bytes == 0 {
            return Ok((ptr::NonNull::dangling().as_ptr(), 0));
        }
        if !(self.data as usize).is_multiple_of(align_of::<T>()) {
            return Err(Error::Argument(format!("{what} is not aligned for {found}")));
        }
        Ok((self.data as *mut T, self.bytes / size_of::<T>()))
    }
}

impl CpuInput<'_> {
    /// The dimensions.
    pub fn shape(&self) -> &[i32] {
        self.0.shape()
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.0.dtype()
    }

    /// The elements' bytes in row-major order, of any dtype.
    pub fn as_bytes(&self) -> Result<&[u8]> {
        let (data, len) = self.0.bytes("the input")?;
        // SAFETY: memory of `len` bytes that nobody writes during the callback.
        Ok(unsafe { std::slice::from_raw_parts(data, len) })
    }

    /// The elements in row-major order; the type must match the dtype.
    pub fn as_slice<T: Plain>(&self) -> Result<&[T]> {
        let (data, len) = self.0.typed::<T>("the input")?;
        // SAFETY: aligned memory of `len` elements that nobody writes during the callback.
        Ok(unsafe { std::slice::from_raw_parts(data, len) })
    }
}

impl CpuOutput<'_> {
    /// The dimensions.
    pub fn shape(&self) -> &[i32] {
        self.0.shape()
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.0.dtype()
    }

    /// The input whose values this output starts with, for an in-place pair.
    pub fn source(&self) -> Option<usize> {
        usize::try_from(self.0.source).ok()
    }

    /// The elements' bytes in row-major order, of any dtype. Only values of the dtype may be written (`bool`: 0 or 1).
    pub fn as_mut_bytes(&mut self) -> Result<&mut [u8]> {
        let (data, len) = self.0.bytes("the output")?;
        // SAFETY: as in `as_mut_slice`.
        Ok(unsafe { std::slice::from_raw_parts_mut(data, len) })
    }

    /// The elements in row-major order; the type must match the dtype.
    pub fn as_mut_slice<T: Plain>(&mut self) -> Result<&mut [T]> {
        let (data, len) = self.0.typed::<T>("the output")?;
        // SAFETY: aligned memory of `len` elements that belongs to this output alone during the callback; it came from
        // an allocator across the language border, so its bytes count as initialised, and any bytes are a value.
        Ok(unsafe { std::slice::from_raw_parts_mut(data, len) })
    }
}

/// A kernel that can be put into graphs.
#[derive(Clone)]
pub struct CpuPrimitive {
    kernel: Arc<dyn CpuKernel>,
}

type Held = Arc<dyn CpuKernel>;

impl CpuPrimitive {
    /// Wraps a kernel.
    pub fn new(kernel: impl CpuKernel) -> Self {
        Self { kernel: Arc::new(kernel) }
    }

    /// Adds a node to the graph, on the current stream if that is on the CPU, else on the CPU's default stream.
    pub fn apply(&self, inputs: &[&Array]) -> Result<Vec<Array>> {
        let api = api()?;
        let specs: Vec<Spec> = inputs.iter().map(|a| Spec::of(a)).collect();
        let outputs = callback::no_panic(|| self.kernel.outputs(&specs))?;
        let number = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
        let in_place: Vec<i32> = callback::no_panic(|| Ok(self.kernel.in_place()))?
            .iter()
            .flat_map(|&(i, o)| [number(i), number(o)])
            .collect();
        let name = CString::new(self.kernel.name().replace('\0', " ")).unwrap_or_default();
        let dims: Vec<i32> = outputs.iter().flat_map(|o| o.shape.iter().copied()).collect();
        let ranks: Vec<i32> = outputs.iter().map(|o| o.shape.len() as i32).collect();
        let dtypes: Vec<i32> = outputs.iter().map(|o| o.dtype.code()).collect();
        let stream = stream::current_cpu()?;
        let held: *mut Held = Box::into_raw(Box::new(Arc::clone(&self.kernel)));
        let vtable = CpuVtable {
            data: held as *mut c_void,
            drop: free,
            name: name.as_ptr(),
            in_place: in_place.as_ptr(),
            in_place_n: in_place.len() / 2,
            eval,
            vjp,
            shapes,
        };
        let mut out = ptr::null_mut();
        let (i, d, r, t) = (inputs, &dims, &ranks, &dtypes);
        // SAFETY: everything pointed to outlives the call; the bridge takes over `held` whatever happens.
        let status = unsafe {
            (api.cpu_apply)(
                &vtable,
                i.as_ptr(),
                i.len(),
                d.as_ptr(),
                d.len(),
                r.as_ptr(),
                r.len(),
                t.as_ptr(),
                t.len(),
                stream,
                &mut out,
            )
        };
        check(api, status, "CPU primitive")?;
        // SAFETY: on success the bridge wrote an owned list.
        unsafe { List::from_raw(out) }.into_arrays()
    }
}

/// # Safety
/// `data` is the `held` of an `apply` that the bridge has not freed yet.
unsafe fn kernel<'a>(data: *mut c_void) -> &'a dyn CpuKernel {
    // SAFETY: as the caller promises.
    unsafe { (*(data as *const Held)).as_ref() }
}

unsafe extern "C" fn free(data: *mut c_void) {
    // SAFETY: made by `Box::into_raw` in `apply`; the bridge frees it once.
    let held = unsafe { Box::from_raw(data as *mut Held) };
    // A panic in the destructor of something captured must not reach C++.
    let _ = callback::no_panic(|| {
        // This may be a worker thread, where MLX must not be called.
        let _inside = Inside::enter();
        drop(held);
        Ok(())
    });
}

unsafe extern "C" fn eval(
    data: *mut c_void,
    inputs: *const CpuView,
    inputs_n: usize,
    outputs: *const CpuView,
    outputs_n: usize,
) -> i32 {
    let result = callback::no_panic(|| {
        let _inside = Inside::enter();
        // SAFETY: the bridge passes the live kernel and arrays of views that live for the call (empty ones may have a
        // null pointer).
        let (kernel, inputs, outputs) = unsafe {
            let inputs = if inputs_n == 0 { &[] } else { std::slice::from_raw_parts(inputs, inputs_n) };
            let outputs = if outputs_n == 0 { &[] } else { std::slice::from_raw_parts(outputs, outputs_n) };
            (kernel(data), inputs, outputs)
        };
        let inputs: Vec<CpuInput<'_>> = inputs.iter().map(CpuInput).collect();
        let mut outputs: Vec<CpuOutput<'_>> = outputs.iter().map(CpuOutput).collect();
        kernel.eval(&inputs, &mut outputs)
    });
    let Err(error) = result else { return 0 };
    if let Some(api) = loaded_api() {
        let text = error.to_string();
        // SAFETY: the bridge copies the text.
        unsafe { (api.set_callback_error)(text.as_ptr(), text.len()) };
    }
    2
}

unsafe extern "C" fn vjp(
    data: *mut c_void,
    lists: *const *const RawList,
    lists_n: usize,
    argnums: *const i32,
    argnums_n: usize,
    out: *mut RawList,
) -> i32 {
    let result = callback::no_panic(|| {
        // SAFETY: the bridge passes the live kernel, live lists and `argnums_n` numbers.
        let (kernel, lists, argnums) = unsafe {
            let argnums = if argnums_n == 0 { &[] } else { std::slice::from_raw_parts(argnums, argnums_n) };
            (kernel(data), std::slice::from_raw_parts(lists, lists_n), argnums)
        };
        let lists = lists.iter().map(|l| List::read(*l)).collect::<Result<Vec<_>>>()?;
        let argnums: Vec<usize> = argnums.iter().map(|&n| n as usize).collect();
        let [primals, cotangents, outputs] = lists.as_slice() else {
            return Err(Error::Argument("vjp was called without primals, cotangents and outputs".to_owned()));
        };
        let gradients = kernel.vjp(primals, cotangents, outputs, &argnums)?;
        gradients.iter().try_for_each(|g| List::push_to(out, g))
    });
    finish(result)
}

unsafe extern "C" fn shapes(
    data: *mut c_void,
    inputs: *const RawList,
    sink: *mut c_void,
    push: ShapeSink,
) -> i32 {
    let result = callback::no_panic(|| {
        // SAFETY: the bridge passes the live kernel.
        let kernel = unsafe { kernel(data) };
        let specs: Vec<Spec> = List::read(inputs)?.iter().map(Spec::of).collect();
        for output in kernel.outputs(&specs)? {
            // SAFETY: the bridge's own sink and function; it copies the dimensions.
            unsafe { push(sink, output.shape.as_ptr(), output.shape.len()) };
        }
        Ok(())
    });
    finish(result)
}

fn finish(result: Result<()>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(error) => {
            callback::set_pending(error);
            2
        }
    }
}

/// A kernel of two closures: shapes of the outputs, and evaluation.
pub fn from_fn<S, E>(name: &str, outputs: S, eval: E) -> impl CpuKernel + use<S, E>
where
    S: Fn(&[Spec]) -> Result<Vec<Spec>> + Send + Sync + 'static,
    E: Fn(&[CpuInput<'_>], &mut [CpuOutput<'_>]) -> Result<()> + Send + Sync + 'static,
{
    Closures { name: name.to_owned(), outputs, eval }
}

struct Closures<S, E> {
    name: String,
    outputs: S,
    eval: E,
}

impl<S, E> CpuKernel for Closures<S, E>
where
    S: Fn(&[Spec]) -> Result<Vec<Spec>> + Send + Sync + 'static,
    E: Fn(&[CpuInput<'_>], &mut [CpuOutput<'_>]) -> Result<()> + Send + Sync + 'static,
{
    fn name(&self) -> &str {
        &self.name
    }

    fn outputs(&self, inputs: &[Spec]) -> Result<Vec<Spec>> {
        (self.outputs)(inputs)
    }

    fn eval(&self, inputs: &[CpuInput<'_>], outputs: &mut [CpuOutput<'_>]) -> Result<()> {
        (self.eval)(inputs, outputs)
    }
}
