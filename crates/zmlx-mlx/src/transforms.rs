//! Evaluation and function transforms: gradients, vectorisation, compilation, checkpointing.
//!
//! Closures get and give arrays and may fail; their error, or their panic, comes back from the transform as it was.

use std::ffi::c_void;
use std::ptr;

use crate::api::{RawFunction, RawList, StreamArg, api, check, loaded_api};
use crate::array::{Array, List};
use crate::callback::{self, Borrowed, no_panic};
use crate::error::{Error, Result};
use crate::stream;

/// Computes arrays and waits for them.
pub fn eval(arrays: &[&Array]) -> Result<()> {
    let api = api()?;
    // SAFETY: valid handles for the call.
    let status = unsafe { (api.eval)(arrays.as_ptr(), arrays.len()) };
    check(api, status, "evaluation")
}

/// Submits the computation of arrays and returns at once. Errors of the computation come up when a result is read.
pub fn async_eval(arrays: &[&Array]) -> Result<()> {
    let api = api()?;
    // SAFETY: valid handles for the call.
    let status = unsafe { (api.async_eval)(arrays.as_ptr(), arrays.len()) };
    check(api, status, "async_eval")
}

/// Runs a bridge function that fills two lists.
fn two_lists(
    what: &'static str,
    call: impl FnOnce(&crate::api::Api, &mut *mut RawList, &mut *mut RawList, StreamArg) -> i32,
) -> Result<(Vec<Array>, Vec<Array>)> {
    let api = api()?;
    let (mut first, mut second) = (ptr::null_mut(), ptr::null_mut());
    let status = call(api, &mut first, &mut second, stream::current(api)?);
    check(api, status, what)?;
    // SAFETY: on success the bridge wrote two owned lists.
    let (first, second) = unsafe { (List::from_raw(first), List::from_raw(second)) };
    Ok((first.into_arrays()?, second.into_arrays()?))
}

fn single(lists: &[Vec<Array>]) -> &[Array] {
    lists.first().map_or(&[], Vec::as_slice)
}

/// The outputs of `f` at `primals`, and the vector-Jacobian products with `cotangents` (one an output), one a primal.
pub fn vjp(
    f: impl Fn(&[Array]) -> Result<Vec<Array>>,
    primals: &[&Array],
    cotangents: &[&Array],
) -> Result<(Vec<Array>, Vec<Array>)> {
    let body = |lists: &[Vec<Array>]| f(single(lists));
    let borrowed = Borrowed::new(&body);
    let (p, c) = (primals, cotangents);
    // SAFETY: the callback and the handles outlive the call.
    two_lists("vjp", |api, a, b, stream| unsafe {
        (api.vjp)(&borrowed.raw(), p.as_ptr(), p.len(), c.as_ptr(), c.len(), a, b, stream)
    })
}

/// The outputs of `f` at `primals`, and the Jacobian-vector products with `tangents` (one a primal), one an output.
pub fn jvp(
    f: impl Fn(&[Array]) -> Result<Vec<Array>>,
    primals: &[&Array],
    tangents: &[&Array],
) -> Result<(Vec<Array>, Vec<Array>)> {
    let body = |lists: &[Vec<Array>]| f(single(lists));
    let borrowed = Borrowed::new(&body);
    let (p, t) = (primals, tangents);
    // SAFETY: the callback and the handles outlive the call.
    two_lists("jvp", |api, a, b, stream| unsafe {
        (api.jvp)(&borrowed.raw(), p.as_ptr(), p.len(), t.as_ptr(), t.len(), a, b, stream)
    })
}

/// A function that gives the values of `f` and the gradients of its first value, which must be a scalar, with respect
/// to the inputs numbered `argnums`.
pub fn value_and_grad(
    f: impl Fn(&[Array]) -> Result<Vec<Array>>,
    argnums: &[i32],
) -> impl Fn(&[&Array]) -> Result<(Vec<Array>, Vec<Array>)> {
    let argnums = argnums.to_vec();
    move |inputs| {
        if let Some(bad) = argnums.iter().find(|&&n| n < 0 || n as usize >= inputs.len()) {
            let count = inputs.len();
            return Err(Error::Argument(format!("gradient with respect to input {bad} of {count} inputs")));
        }
        let body = |lists: &[Vec<Array>]| f(single(lists));
        let borrowed = Borrowed::new(&body);
        // SAFETY: the callback and the handles outlive the call.
        two_lists("value_and_grad", |api, a, b, stream| unsafe {
            let (n, i) = (&argnums, inputs);
            (api.value_and_grad)(&borrowed.raw(), n.as_ptr(), n.len(), i.as_ptr(), i.len(), a, b, stream)
        })
    }
}

/// A function that gives the gradients of the scalar `f` with respect to the inputs numbered `argnums`.
pub fn grad(
    f: impl Fn(&[Array]) -> Result<Array>,
    argnums: &[i32],
) -> impl Fn(&[&Array]) -> Result<Vec<Array>> {
    let both = value_and_grad(move |inputs| Ok(vec![f(inputs)?]), argnums);
    move |inputs| both(inputs).map(|(_, gradients)| gradients)
}

/// `f` vectorised: inputs are mapped over `in_axes` (-1 for an input that is the same for all), outputs get the mapped
/// axis at `out_axes`. Empty axes mean 0 for all.
pub fn vmap(
    f: impl Fn(&[Array]) -> Result<Vec<Array>>,
    in_axes: &[i32],
    out_axes: &[i32],
) -> impl Fn(&[&Array]) -> Result<Vec<Array>> {
    let (in_axes, out_axes) = (in_axes.to_vec(), out_axes.to_vec());
    move |inputs| {
        let api = api()?;
        let body = |lists: &[Vec<Array>]| f(single(lists));
        let borrowed = Borrowed::new(&body);
        let mut out = ptr::null_mut();
        let (i, n, o) = (inputs, &in_axes, &out_axes);
        // SAFETY: the callback and the handles outlive the call.
        let status = unsafe {
            (api.vmap)(
                &borrowed.raw(),
                i.as_ptr(),
                i.len(),
                n.as_ptr(),
                n.len(),
                o.as_ptr(),
                o.len(),
                &mut out,
                stream::current(api)?,
            )
        };
        check(api, status, "vmap")?;
        // SAFETY: on success the bridge wrote an owned list.
        unsafe { List::from_raw(out) }.into_arrays()
    }
}

/// A function of arrays that MLX holds: compiled, checkpointed, or with a gradient of its own.
pub struct Function(*mut RawFunction);

// SAFETY: calls and the final drop happen under the bridge's lock, and the closures inside are `Send`.
unsafe impl Send for Function {}
// SAFETY: as above; the lock makes calls from several threads follow one another.
unsafe impl Sync for Function {}

impl Function {
    /// Calls it.
    pub fn call(&self, inputs: &[&Array]) -> Result<Vec<Array>> {
        let api = api()?;
        let mut out = ptr::null_mut();
        // SAFETY: a live function and live handles.
        let status = unsafe {
            (api.function_call)(self.0, inputs.as_ptr(), inputs.len(), &mut out, stream::current(api)?)
        };
        check(api, status, "function call")?;
        // SAFETY: on success the bridge wrote an owned list.
        unsafe { List::from_raw(out) }.into_arrays()
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        if let Some(api) = loaded_api() {
            // SAFETY: an owned function, freed once.
            unsafe { (api.function_free)(self.0 as *mut c_void) };
        }
    }
}

/// `f` compiled: traced once for each combination of input shapes and dtypes (once at all when `shapeless`), with
/// element-wise ops fused into kernels. `f` must depend on its inputs alone. On the CPU, MLX builds the kernels with
/// `g++` at run time and compiles nothing when there is none.
pub fn compile(
    f: impl Fn(&[Array]) -> Result<Vec<Array>> + Send + 'static,
    shapeless: bool,
) -> Result<Function> {
    let api = api()?;
    let callback = callback::owned(Box::new(move |lists| f(single(lists))));
    let mut out = ptr::null_mut();
    // SAFETY: the bridge copies the callback and owns its closure.
    let status = unsafe { (api.compile)(&callback, shapeless, &mut out) };
    check(api, status, "compile")?;
    Ok(Function(out))
}

/// Turns the compilation of [`compile`]d functions off (they run as written) or on again, for the whole process.
pub fn set_compile_enabled(enabled: bool) -> Result<()> {
    let api = api()?;
    // SAFETY: no pointers.
    let status = unsafe { (api.set_compile_enabled)(enabled) };
    check(api, status, "set_compile_enabled")
}

/// `f` that keeps no intermediate results for its gradient and computes them again when that is asked for.
pub fn checkpoint(f: impl Fn(&[Array]) -> Result<Vec<Array>> + Send + 'static) -> Result<Function> {
    let api = api()?;
    let callback = callback::owned(Box::new(move |lists| f(single(lists))));
    let mut out = ptr::null_mut();
    // SAFETY: the bridge copies the callback and owns its closure.
    let status = unsafe { (api.checkpoint)(&callback, &mut out) };
    check(api, status, "checkpoint")?;
    Ok(Function(out))
}

/// `f` with a gradient of its own: `gradient(primals, cotangents, outputs)` gives one array a primal.
pub fn custom_vjp(
    f: impl Fn(&[Array]) -> Result<Vec<Array>> + Send + 'static,
    gradient: impl Fn(&[Array], &[Array], &[Array]) -> Result<Vec<Array>> + Send + 'static,
) -> Result<Function> {
    let api = api()?;
    let forward = callback::owned(Box::new(move |lists| f(single(lists))));
    let backward = callback::owned(Box::new(move |lists| match lists {
        [primals, cotangents, outputs] => {
            let gradients = gradient(primals, cotangents, outputs)?;
            if gradients.len() == primals.len() {
                return Ok(gradients);
            }
            let (found, expected) = (gradients.len(), primals.len());
            Err(Error::Argument(format!("custom_vjp gave {found} gradients for {expected} inputs")))
        }
        _ => Err(Error::Argument("custom_vjp was called without primals, cotangents and outputs".to_owned())),
    }));
    let mut out = ptr::null_mut();
    // SAFETY: the bridge copies the callbacks and owns their closures.
    let status = unsafe { (api.custom_vjp)(&forward, &backward, &mut out) };
    check(api, status, "custom_vjp")?;
    Ok(Function(out))
}

/// Rules of differentiation and vectorisation for the outputs of a primitive; see [`with_transforms`]. They build
/// graphs: nothing is computed in them.
pub trait Transforms: Send + Sync + 'static {
    /// Gradients with respect to the inputs numbered `argnums`, each in the shape of its input.
    fn vjp(
        &self,
        primals: &[Array],
        cotangents: &[Array],
        outputs: &[Array],
        argnums: &[usize],
    ) -> Result<Vec<Array>>;

    /// Tangents of all outputs for tangents of the inputs numbered `argnums`.
    fn jvp(&self, primals: &[Array], tangents: &[Array], argnums: &[usize]) -> Result<Vec<Array>>;

    /// The outputs for inputs that carry a further axis (`None`: the same for all), with the axis of each output.
    fn vmap(&self, inputs: &[Array], axes: &[Option<usize>]) -> Result<(Vec<Array>, Vec<usize>)>;
}

#[repr(C)]
pub(crate) struct TransformsVtable {
    data: *mut c_void,
    drop: unsafe extern "C" fn(*mut c_void),
    call: unsafe extern "C" fn(
        *mut c_void,
        i32,
        *const *const RawList,
        usize,
        *const i32,
        usize,
        *mut RawList,
        *mut i32,
    ) -> i32,
}

/// The rules, and how many outputs there are.
type Rules = (Box<dyn Transforms>, usize);

/// The outputs of one primitive that has not run yet (a [CPU primitive](crate::cpu), a [kernel](crate::kernel)), with
/// these rules in place of its own. All of its outputs must be given, in order.
pub fn with_transforms(outputs: &[&Array], rules: impl Transforms) -> Result<Vec<Array>> {
    let api = api()?;
    let held: *mut Rules = Box::into_raw(Box::new((Box::new(rules), outputs.len())));
    let vtable = TransformsVtable { data: held as *mut c_void, drop: free_rules, call: call_rules };
    let mut out = ptr::null_mut();
    // SAFETY: live handles; the bridge takes over `held` whatever happens.
    let status = unsafe { (api.with_transforms)(&vtable, outputs.as_ptr(), outputs.len(), &mut out) };
    check(api, status, "with_transforms")?;
    // SAFETY: on success the bridge wrote an owned list.
    unsafe { List::from_raw(out) }.into_arrays()
}

unsafe extern "C" fn free_rules(data: *mut c_void) {
    // SAFETY: made by `Box::into_raw` in `with_transforms`; the bridge frees it once.
    let rules = unsafe { Box::from_raw(data as *mut Rules) };
    // A panic in the destructor of something captured must not reach C++.
    let _ = no_panic(|| {
        // This may be a worker thread, where MLX must not be called.
        let _inside = callback::Inside::enter();
        drop(rules);
        Ok(())
    });
}

unsafe extern "C" fn call_rules(
    data: *mut c_void,
    rule: i32,
    lists: *const *const RawList,
    lists_n: usize,
    numbers: *const i32,
    numbers_n: usize,
    out: *mut RawList,
    out_axes: *mut i32,
) -> i32 {
    let result = no_panic(|| {
        // SAFETY: the bridge passes the live rules, live lists and `numbers_n` numbers.
        let ((rules, outputs), lists, numbers) = unsafe {
            let numbers = if numbers_n == 0 { &[] } else { std::slice::from_raw_parts(numbers, numbers_n) };
            (&*(data as *const Rules), std::slice::from_raw_parts(lists, lists_n), numbers)
        };
        let lists = lists.iter().map(|l| List::read(*l)).collect::<Result<Vec<_>>>()?;
        let argnums = || numbers.iter().map(|&n| n as usize).collect::<Vec<_>>();
        let arrays = match (rule, lists.as_slice()) {
            (0, [primals, cotangents, outputs]) => rules.vjp(primals, cotangents, outputs, &argnums())?,
            (1, [primals, tangents]) => rules.jvp(primals, tangents, &argnums())?,
            (2, [inputs]) => {
                let axes: Vec<Option<usize>> = numbers.iter().map(|&n| usize::try_from(n).ok()).collect();
                let (arrays, axes) = rules.vmap(inputs, &axes)?;
                for (i, axis) in axes.iter().enumerate().take(*outputs) {
                    // SAFETY: the bridge gives room for one axis an output.
                    unsafe { *out_axes.add(i) = *axis as i32 };
                }
                arrays
            }
            _ => {
                return Err(Error::Argument(
                    "a transform was called with other lists than it takes".to_owned(),
                ));
            }
        };
        arrays.iter().try_for_each(|a| List::push_to(out, a))
    });
    match result {
        Ok(()) => 0,
        Err(error) => {
            callback::set_pending(error);
            2
        }
    }
}
