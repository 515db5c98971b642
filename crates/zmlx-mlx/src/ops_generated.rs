//! The ops of `bridge/ops.table`, as functions and as methods of [`Array`].

mod prelude {
    pub(super) use std::ptr;

    pub(super) use crate::api::{api, op_error};
    pub(super) use crate::array::{Array, List};
    pub(super) use crate::error::Result;
    pub(super) use crate::{Dtype, stream};

    /// A pointer to the value of an option, null without one.
    pub(super) fn opt_ptr<T>(value: &Option<T>) -> *const T {
        value.as_ref().map_or(ptr::null(), |v| v as *const T)
    }
}

use prelude::*;

include!(concat!(env!("OUT_DIR"), "/ops.rs"));
