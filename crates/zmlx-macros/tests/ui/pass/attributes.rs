//! Attributes, visibility and raw names are kept; a kernel may stand inside a function.
#![deny(missing_docs, warnings)]

use zmlx_macros::{elementwise, kernel};

/// The least that a runtime must have.
mod runtime {
    /// An array.
    pub struct Array;
    /// A result.
    pub type Result<T> = std::result::Result<T, String>;
    /// A kernel.
    pub struct Kernel(pub &'static str);
    impl Kernel {
        /// From IR.
        pub fn from_ir_json(json: &'static str) -> Result<Self> {
            Ok(Self(json))
        }
        /// Runs it.
        pub fn call1(&self, inputs: &[&Array]) -> Result<Array> {
            if inputs.len() == 1 { Ok(Array) } else { Err(self.0.to_owned()) }
        }
    }
}

/// Twice.
#[kernel(crate = crate::runtime)]
#[inline]
#[must_use]
pub(crate) fn r#double(r#type: f32) -> f32 {
    r#type * 2.0
}

#[kernel(crate = crate::runtime)]
#[cfg(any())]
fn absent(x: f32) -> f32 {
    x
}

fn main() {
    #[kernel(crate = crate::runtime)]
    fn local(mut x: f32) -> f32 {
        x += 1.0;
        x
    }
    assert!(double(&runtime::Array).is_ok());
    assert!(local(&runtime::Array).is_ok());
    assert!(local::kernel().0.contains("\"name\":\"local\""));
    assert!(elementwise!(crate = crate::runtime, |x| -x).0.contains("\"ew_"));
}
