use std::ffi::c_void;
use std::fmt;
use std::ptr::{self, NonNull};

use half::{bf16, f16};

use crate::api::{Api, RawArray, RawList, api, api_of, check, loaded_api, text};
use crate::element::{Complex64, Element, Plain};
use crate::error::{Error, Result};
use crate::{Dtype, ops};

/// An n-dimensional array of MLX: a node of a lazy graph, computed when it is first read or evaluated.
///
/// Cloning is cheap (a reference count). Arrays are immutable; ops give new ones. See the crate's documentation for
/// threads.
#[repr(transparent)]
pub struct Array(NonNull<RawArray>);

// SAFETY: the handle is a reference-counted pointer with atomic counts. What MLX changes behind it (status, inputs,
// events) it changes only under the bridge's lock; shape and dtype never change; data is read only once available.
unsafe impl Send for Array {}
// SAFETY: as above: shared access from several threads is either to immutable parts or under the lock.
unsafe impl Sync for Array {}

impl Array {
    /// Takes over a handle that the bridge made.
    ///
    /// # Safety
    /// `raw` is an owned, non-null handle.
    #[inline]
    pub(crate) unsafe fn from_raw(raw: *mut RawArray) -> Self {
        // SAFETY: non-null, as the caller promises.
        Self(unsafe { NonNull::new_unchecked(raw) })
    }

    #[inline]
    pub(crate) fn raw(&self) -> *const RawArray {
        self.0.as_ptr()
    }

    #[inline]
    pub(crate) fn raw_or_null(a: Option<&Self>) -> *const RawArray {
        a.map_or(ptr::null(), Self::raw)
    }

    /// Copies `data` into an array of `shape`, whose size must be the slice's length.
    pub fn from_slice<T: Element>(data: &[T], shape: &[i32]) -> Result<Self> {
        check_size(data.len(), shape)?;
        let api = api()?;
        let mut out = ptr::null_mut();
        // SAFETY: the slice holds as many elements of the dtype as the shape says.
        let status = unsafe {
            (api.array_from_data)(
                data.as_ptr() as *const c_void,
                shape.as_ptr(),
                shape.len(),
                T::DTYPE.code(),
                &mut out,
            )
        };
        check(api, status, "Array::from_slice")?;
        // SAFETY: on success the bridge wrote an owned handle.
        Ok(unsafe { Self::from_raw(out) })
    }

    /// Makes an array of `data`, without a copy where the backend can use memory of others (Metal, page-aligned
    /// buffers); elsewhere MLX copies it and the vector is freed at once.
    pub fn from_vec<T: Element>(data: Vec<T>, shape: &[i32]) -> Result<Self> {
        unsafe extern "C" fn free<T>(context: *mut c_void) {
            // SAFETY: made by `Box::into_raw` below; the bridge calls this once.
            drop(unsafe { Box::from_raw(context as *mut Vec<T>) });
        }
        check_size(data.len(), shape)?;
        let api = api()?;
        let mut owner = Box::new(data);
        let pointer = owner.as_mut_ptr() as *mut c_void;
        let context = Box::into_raw(owner) as *mut c_void;
        let mut out = ptr::null_mut();
        // SAFETY: the vector holds as many elements as the shape says and lives until `free` is called.
        let status = unsafe {
            let free = free::<T> as *const c_void;
            (api.array_from_owned)(
                pointer,
                shape.as_ptr(),
                shape.len(),
                T::DTYPE.code(),
                context,
                free,
                &mut out,
            )
        };
        check(api, status, "Array::from_vec")?;
        // SAFETY: on success the bridge wrote an owned handle.
        Ok(unsafe { Self::from_raw(out) })
    }

    /// A 0-dimensional array.
    pub fn scalar<T: Element>(value: T) -> Result<Self> {
        Self::from_slice(&[value], &[])
    }

    /// A 0-dimensional array of `dtype` with the nearest value to `value`. As MLX's Python does with plain numbers,
    /// this keeps the dtype of the other operand: `x.multiply(&Array::scalar_as(2.0, x.dtype())?)`.
    pub fn scalar_as(value: f64, dtype: Dtype) -> Result<Self> {
        match dtype {
            Dtype::Bool => Self::scalar(value != 0.0),
            Dtype::Uint8 => Self::scalar(value as u8),
            Dtype::Uint16 => Self::scalar(value as u16),
            Dtype::Uint32 => Self::scalar(value as u32),
            Dtype::Uint64 => Self::scalar(value as u64),
            Dtype::Int8 => Self::scalar(value as i8),
            Dtype::Int16 => Self::scalar(value as i16),
            Dtype::Int32 => Self::scalar(value as i32),
            Dtype::Int64 => Self::scalar(value as i64),
            Dtype::Float16 => Self::scalar(f16::from_f64(value)),
            Dtype::Bfloat16 => Self::scalar(bf16::from_f64(value)),
            Dtype::Float32 => Self::scalar(value as f32),
            Dtype::Float64 => Self::scalar(value),
            Dtype::Complex64 => Self::scalar(Complex64 { re: value as f32, im: 0.0 }),
        }
    }

    /// The dimensions.
    #[inline]
    pub fn shape(&self) -> &[i32] {
        let (mut data, mut len) = (ptr::null(), 0);
        let Some(api) = api_of(self) else { return &[] };
        // SAFETY: a valid handle; the shape lives as long as the array and never changes.
        unsafe {
            (api.array_shape)(self.raw(), &mut data, &mut len);
            if len == 0 { &[] } else { std::slice::from_raw_parts(data, len) }
        }
    }

    /// One dimension; negative axes count from the end.
    pub fn dim(&self, axis: i32) -> Result<i32> {
        let shape = self.shape();
        let index = if axis < 0 { axis + shape.len() as i32 } else { axis };
        usize::try_from(index)
            .ok()
            .and_then(|i| shape.get(i).copied())
            .ok_or_else(|| Error::Argument(format!("axis {axis} of an array of shape {shape:?}")))
    }

    /// Number of dimensions.
    #[inline]
    pub fn ndim(&self) -> usize {
        self.shape().len()
    }

    /// Number of elements.
    #[inline]
    pub fn size(&self) -> usize {
        self.shape().iter().map(|&d| d as usize).product()
    }

    /// Bytes of all elements.
    #[inline]
    pub fn nbytes(&self) -> usize {
        self.size() * self.dtype().size()
    }

    /// The element type.
    #[inline]
    pub fn dtype(&self) -> Dtype {
        let mut code = 0;
        if let Some(api) = api_of(self) {
            // SAFETY: a valid handle.
            unsafe { (api.array_dtype)(self.raw(), &mut code) };
        }
        Dtype::from_code(code).unwrap_or(Dtype::Float32)
    }

    /// Identifies the graph node: equal for clones, different for different nodes that live at the same time.
    pub fn id(&self) -> u64 {
        let mut id = 0;
        if let Some(api) = api_of(self) {
            // SAFETY: a valid handle.
            unsafe { (api.array_id)(self.raw(), &mut id) };
        }
        id
    }

    /// Computes the array and waits for it.
    pub fn eval(&self) -> Result<()> {
        crate::eval(&[self])
    }

    /// Evaluates, and gives the data pointer and whether the memory is row-contiguous.
    fn data(&self) -> Result<(*const u8, bool)> {
        let api = api()?;
        let (mut contiguous, mut data) = (false, ptr::null());
        // SAFETY: a valid handle and valid out pointers.
        let status = unsafe { (api.array_eval_data)(self.raw(), &mut contiguous, &mut data) };
        check(api, status, "evaluation")?;
        Ok((data as *const u8, contiguous))
    }

    /// Computes the array and gives its address in the memory of the GPU, without moving it: for kernels that are launched
    /// past MLX, with the CUDA library only. The address holds as long as the array lives and nobody reads it on the
    /// host, which moves it to memory that host and GPU share.
    ///
    /// # Errors
    /// [`Error::Mlx`] if the library does not run on CUDA or the computation fails; [`Error::Argument`] for a strided view.
    pub fn device_address(&self) -> Result<u64> {
        let api = api()?;
        let (mut contiguous, mut address) = (false, 0);
        // SAFETY: a valid handle and valid out pointers.
        let status = unsafe { (api.array_device_data)(self.raw(), &mut contiguous, &mut address) };
        check(api, status, "device address")?;
        if !contiguous {
            let message = "the array is a strided view: make it contiguous before taking its address";
            return Err(Error::Argument(message.to_owned()));
        }
        Ok(address)
    }

    fn expect<T: Element>(&self) -> Result<()> {
        let found = self.dtype();
        if found == T::DTYPE { Ok(()) } else { Err(Error::Dtype { expected: T::DTYPE, found }) }
    }

    /// Computes the array and copies its elements out in row-major order. The dtype must match.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        self.expect::<T>()?;
        let (data, contiguous) = self.data()?;
        if contiguous {
            // SAFETY: row-contiguous data of `size` elements of this dtype, kept alive by `self`.
            return Ok(unsafe { T::read(data, self.size()) });
        }
        let dense = ops::contiguous(self)?;
        let (data, _) = dense.data()?;
        // SAFETY: as above, kept alive by `dense`.
        Ok(unsafe { T::read(data, dense.size()) })
    }

    /// Computes the array and borrows its elements, without a copy. The dtype must match and the array be
    /// row-contiguous (see [`ops::contiguous`]).
    pub fn as_slice<T: Plain>(&self) -> Result<&[T]> {
        self.expect::<T>()?;
        let (data, contiguous) = self.data()?;
        if self.size() == 0 {
            return Ok(&[]);
        }
        if !contiguous || !(data as usize).is_multiple_of(align_of::<T>()) {
            return Err(Error::Argument(
                "the array is a strided view: make it contiguous before borrowing".to_owned(),
            ));
        }
        // SAFETY: aligned, row-contiguous, `size` elements, and not written again while `self` holds a reference
        // (MLX reuses a buffer only when nobody else refers to it).
        Ok(unsafe { std::slice::from_raw_parts(data as *const T, self.size()) })
    }

    /// Computes an array of one element and returns that. The dtype must match.
    pub fn item<T: Element>(&self) -> Result<T> {
        if self.size() != 1 {
            return Err(Error::Argument(format!("item() of an array of shape {:?}", self.shape())));
        }
        self.to_vec().map(|v| v[0])
    }

    /// `a + value`, keeping the dtype.
    pub fn add_scalar(&self, value: f64) -> Result<Self> {
        ops::add(self, &Self::scalar_as(value, self.dtype())?)
    }

    /// `a * value`, keeping the dtype.
    pub fn multiply_scalar(&self, value: f64) -> Result<Self> {
        ops::multiply(self, &Self::scalar_as(value, self.dtype())?)
    }

    /// Elements `start..stop` along one axis; negative positions and axes count from the end.
    pub fn slice_axis(&self, axis: i32, start: i32, stop: i32) -> Result<Self> {
        let shape = self.shape();
        let size = self.dim(axis)?;
        let axis = if axis < 0 { axis as isize + shape.len() as isize } else { axis as isize } as usize;
        let place = |p: i32| if p < 0 { (p + size).max(0) } else { p.min(size) };
        let mut from = vec![0; shape.len()];
        let mut to = shape.to_vec();
        from[axis] = place(start);
        to[axis] = place(stop).max(from[axis]);
        ops::slice(self, &from, &to, &vec![1; shape.len()])
    }
}

fn check_size(len: usize, shape: &[i32]) -> Result<()> {
    let product =
        shape.iter().try_fold(1usize, |n, &d| usize::try_from(d).ok().and_then(|d| n.checked_mul(d)));
    if product == Some(len) {
        return Ok(());
    }
    Err(Error::Argument(format!("{len} elements do not make an array of shape {shape:?}")))
}

impl Clone for Array {
    #[inline]
    fn clone(&self) -> Self {
        let mut out = ptr::null_mut();
        if let Some(api) = api_of(self) {
            // SAFETY: a valid handle; copying it is an atomic count and takes no lock.
            unsafe { (api.array_clone)(self.raw(), &mut out) };
        }
        match NonNull::new(out) {
            Some(raw) => Self(raw),
            // Only when 16 bytes can't be had.
            None => std::alloc::handle_alloc_error(std::alloc::Layout::new::<[usize; 2]>()),
        }
    }
}

impl Drop for Array {
    #[inline]
    fn drop(&mut self) {
        if let Some(api) = loaded_api() {
            // SAFETY: an owned handle, freed once.
            unsafe { (api.array_free)(self.0.as_ptr() as *mut c_void) };
        }
    }
}

/// Shape and dtype; does not evaluate.
impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Array({}{:?})", self.dtype(), self.shape())
    }
}

/// The values as MLX prints them; evaluates.
impl fmt::Display for Array {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = api().and_then(|api| {
            let (mut data, mut len) = (ptr::null(), 0);
            // SAFETY: a valid handle; the text lives until the next call on this thread.
            unsafe {
                let status = (api.array_text)(self.raw(), &mut data, &mut len);
                check(api, status, "printing")?;
                Ok(text(data, len))
            }
        });
        match shown {
            Ok(text) => f.write_str(&text),
            Err(error) => write!(f, "<{error}>"),
        }
    }
}

/// A list of arrays made by the bridge.
pub(crate) struct List(*mut RawList);

impl List {
    /// # Safety
    /// `raw` is an owned list of the bridge.
    pub(crate) unsafe fn from_raw(raw: *mut RawList) -> Self {
        Self(raw)
    }

    pub(crate) fn into_arrays(self) -> Result<Vec<Array>> {
        Self::read(self.0)
    }

    /// Handles to the arrays of a list that lives for the call.
    pub(crate) fn read(list: *const RawList) -> Result<Vec<Array>> {
        let api = api()?;
        let mut len = 0;
        // SAFETY: callers pass live lists of the bridge.
        unsafe { (api.list_len)(list, &mut len) };
        (0..len).map(|i| Self::get(api, list, i)).collect()
    }

    fn get(api: &Api, list: *const RawList, index: usize) -> Result<Array> {
        let mut out = ptr::null_mut();
        // SAFETY: a live list; an index out of range is an error of the bridge.
        let status = unsafe { (api.list_get)(list, index, &mut out) };
        check(api, status, "reading a list")?;
        // SAFETY: on success the bridge wrote an owned handle.
        Ok(unsafe { Array::from_raw(out) })
    }

    pub(crate) fn push_to(list: *mut RawList, a: &Array) -> Result<()> {
        let api = api()?;
        // SAFETY: callers pass live lists of the bridge.
        let status = unsafe { (api.list_push)(list, a.raw()) };
        check(api, status, "returning arrays")
    }
}

impl Drop for List {
    fn drop(&mut self) {
        if let Some(api) = loaded_api() {
            // SAFETY: an owned list, freed once.
            unsafe { (api.list_free)(self.0) };
        }
    }
}
