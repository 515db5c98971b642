//! Rust closures that MLX calls: how their errors and panics travel.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::api::{Callback, RawList};
use crate::array::{Array, List};
use crate::error::{Error, Result};

thread_local! {
    static PENDING: RefCell<Option<Error>> = const { RefCell::new(None) };
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is running a CPU primitive.
#[inline]
pub(crate) fn inside() -> bool {
    INSIDE.with(Cell::get)
}

/// Marks the thread as running a CPU primitive until dropped.
pub(crate) struct Inside {
    before: bool,
}

impl Inside {
    pub(crate) fn enter() -> Self {
        Self { before: INSIDE.with(|c| c.replace(true)) }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.with(|c| c.set(self.before));
    }
}

/// Keeps the error of a callback while C++ unwinds to the bridge function that Rust called.
pub(crate) fn set_pending(error: Error) {
    PENDING.with(|p| *p.borrow_mut() = Some(error));
}

pub(crate) fn take_pending() -> Error {
    let pending = PENDING.with(|p| p.borrow_mut().take());
    pending.unwrap_or(Error::Mlx { what: "callback", message: "failed without saying why".to_owned() })
}

/// Runs `f`, turning a panic into an error.
pub(crate) fn no_panic<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(result) => result,
        Err(payload) => {
            let text = panic_text(payload.as_ref());
            // The payload's own destructor may panic, and there is no net any more.
            std::mem::forget(payload);
            Err(Error::Panic(text))
        }
    }
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        (*text).to_owned()
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text.clone()
    } else {
        "a panic without a message".to_owned()
    }
}

/// What the bridge calls: lists of arrays in, one list out. Transforms of one function use one list; a custom
/// gradient gets primals, cotangents and outputs.
pub(crate) type Body<'a> = dyn Fn(&[Vec<Array>]) -> Result<Vec<Array>> + 'a;

/// A closure borrowed for one call.
pub(crate) struct Borrowed<'a> {
    body: &'a Body<'a>,
}

impl<'a> Borrowed<'a> {
    pub(crate) fn new(body: &'a Body<'a>) -> Self {
        Self { body }
    }

    /// For a call during which `self` stays where it is.
    pub(crate) fn raw(&self) -> Callback {
        let data = &raw const self.body as *mut c_void;
        Callback { data, call: call::<&'a Body<'a>>, drop: None }
    }
}

type Owned = Box<dyn Fn(&[Vec<Array>]) -> Result<Vec<Array>> + Send>;

/// A closure that the bridge owns and frees.
pub(crate) fn owned(body: Owned) -> Callback {
    unsafe extern "C" fn free(data: *mut c_void) {
        // SAFETY: `data` came from `Box::into_raw` below, and the bridge frees it once.
        let owned = unsafe { Box::from_raw(data as *mut Owned) };
        // A panic in the destructor of something captured must not reach C++.
        let _ = no_panic(|| {
            drop(owned);
            Ok(())
        });
    }
    Callback { data: Box::into_raw(Box::new(body)) as *mut c_void, call: call::<Owned>, drop: Some(free) }
}

unsafe extern "C" fn call<F>(
    data: *mut c_void,
    lists: *const *const RawList,
    count: usize,
    out: *mut RawList,
) -> i32
where
    F: std::ops::Deref,
    F::Target: Fn(&[Vec<Array>]) -> Result<Vec<Array>>,
{
    let result = no_panic(|| {
        // SAFETY: the bridge passes back the `data` it was given, which is alive: borrowed for the call, or owned.
        let body = unsafe { &*(data as *const F) };
        // SAFETY: the bridge passes `count` valid lists that live for the call.
        let lists = unsafe { std::slice::from_raw_parts(lists, count) };
        let arguments = lists.iter().map(|l| List::read(*l)).collect::<Result<Vec<_>>>()?;
        let arrays = body(&arguments)?;
        arrays.iter().try_for_each(|a| List::push_to(out, a))
    });
    match result {
        Ok(()) => 0,
        Err(error) => {
            set_pending(error);
            2
        }
    }
}
