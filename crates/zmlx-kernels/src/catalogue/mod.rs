//! The catalogue: kernels that are ready to use, each with its definition, its gradient, a reference and test inputs.
//!
//! An [`Entry`] is data: a text of the kernel language (or bodies written by hand), a formula, what to know of dtypes
//! and accumulation, whether it has a gradient, the same computation in plain MLX ops, and cases to test it with.
//! Beside it stands a function with a natural signature:
//!
//! ```
//! use zmlx_kernels::{Array, catalogue};
//!
//! # fn main() -> zmlx_kernels::Result<()> {
//! let x = Array::from_slice(&[1.0f32, 2.0, 3.0, 6.0], &[2, 2])?;
//! assert_eq!(catalogue::sum(&x)?.to_vec::<f32>()?, [3.0, 9.0]);
//! assert_eq!(catalogue::get("sum").map(|e| e.formula.as_ref()), Some("sum of the row"));
//! # Ok(()) }
//! ```
//!
//! A new op is an entry in the file of its family. The families are listed once, in this file.

mod case;
mod entry;
mod table;

use std::collections::HashMap;
use std::sync::LazyLock;

pub use case::{Case, Input, Setting, Values};
pub use entry::{Body, Domain, Entry, Gradient, Reference};
pub use table::table;

use crate::{Error, Kernel, Result};

macro_rules! families {
    ($($family:ident),* $(,)?) => {
        $(mod $family; pub use $family::*;)*

        fn collect() -> Vec<Entry> {
            let mut all = Vec::new();
            $(all.extend($family::entries());)*
            all
        }
    };
}

families! {
    activation, softmax, norm, reduce, loss, glu, dropout, scan, rope, index, bits, image, optim, gate,
}

struct Registry {
    entries: Vec<Entry>,
    /// By name and by alias.
    known: HashMap<String, usize>,
}

static REGISTRY: LazyLock<Registry> = LazyLock::new(|| {
    let entries = collect();
    let names = |(n, e): (usize, &Entry)| {
        let own = std::iter::once(e.name.to_string()).chain(e.aliases.iter().map(|a| (*a).to_owned()));
        own.map(|name| (name, n)).collect::<Vec<_>>()
    };
    let known = entries.iter().enumerate().flat_map(names).collect();
    Registry { entries, known }
});

/// Every entry, family by family.
pub fn entries() -> &'static [Entry] {
    &REGISTRY.entries
}

/// The entry of a name or of an alias.
pub fn get(name: &str) -> Option<&'static Entry> {
    let registry = &*REGISTRY;
    registry.known.get(name).map(|n| &registry.entries[*n])
}

/// The kernel of an entry.
///
/// # Errors
/// [`Error::Argument`] when there is no entry of this name, or when it is written by hand.
pub fn kernel(name: &str) -> Result<&'static Kernel> {
    get(name).ok_or_else(|| argument(name, "the catalogue has no such entry"))?.kernel()
}

fn argument(kernel: &str, what: impl Into<String>) -> Error {
    Error::Argument { kernel: kernel.to_owned(), what: what.into() }
}
