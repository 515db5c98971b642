//! Rust functions as MLX primitives: values, gradients, in-place reuse, errors, streams, threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use zmlx_mlx::cpu::{CpuInput, CpuKernel, CpuOutput, CpuPrimitive, Spec, from_fn};
use zmlx_mlx::stream::{Device, Stream, with_stream};
use zmlx_mlx::{Array, Dtype, Error, Result, ops, transforms};

fn vector(values: &[f32]) -> Result<Array> {
    Array::from_slice(values, &[values.len() as i32])
}

/// `y = x^3`, with its gradient.
struct Cube;

impl CpuKernel for Cube {
    fn name(&self) -> &str {
        "cube"
    }
    fn outputs(&self, inputs: &[Spec]) -> Result<Vec<Spec>> {
        match inputs {
            [x] if x.dtype == Dtype::Float32 => Ok(vec![x.clone()]),
            other => Err(Error::Argument(format!("cube takes one float32 array, not {other:?}"))),
        }
    }
    fn eval(&self, inputs: &[CpuInput<'_>], outputs: &mut [CpuOutput<'_>]) -> Result<()> {
        let x = inputs[0].as_slice::<f32>()?;
        for (y, x) in outputs[0].as_mut_slice::<f32>()?.iter_mut().zip(x) {
            *y = x * x * x;
        }
        Ok(())
    }
    fn vjp(&self, p: &[Array], c: &[Array], _: &[Array], argnums: &[usize]) -> Result<Vec<Array>> {
        assert_eq!(argnums, [0]);
        Ok(vec![p[0].square()?.multiply_scalar(3.0)?.multiply(&c[0])?])
    }
}

fn cube(x: &Array) -> Result<Array> {
    Ok(CpuPrimitive::new(Cube).apply(&[x])?.remove(0))
}

#[test]
fn values_gradients_compile_and_views() -> Result<()> {
    let x = vector(&[1.0, 2.0, 3.0])?;
    assert_eq!(cube(&x)?.to_vec::<f32>()?, [1.0, 8.0, 27.0]);
    let g = transforms::grad(|v| cube(&v[0])?.sum_all(), &[0])(&[&x])?;
    assert_eq!(g[0].to_vec::<f32>()?, [3.0, 12.0, 27.0]);

    for shapeless in [false, true] {
        let f = transforms::compile(
            |v| Ok(vec![cube(&v[0].add_scalar(1.0)?)?.multiply_scalar(2.0)?]),
            shapeless,
        )?;
        assert_eq!(f.call(&[&x])?[0].to_vec::<f32>()?, [16.0, 54.0, 128.0]);
        assert_eq!(
            f.call(&[&vector(&[0.0])?])?[0].to_vec::<f32>()?,
            [2.0],
            "another shape, shapeless={shapeless}"
        );
        let g = transforms::grad(|v| f.call(&[&v[0]])?[0].sum_all(), &[0])(&[&vector(&[1.0])?])?;
        assert_eq!(g[0].to_vec::<f32>()?, [24.0]);
    }

    // Strided, broadcast and offset inputs arrive contiguous.
    let m = ops::arange(0.0, 6.0, 1.0, Dtype::Float32)?.reshape(&[2, 3])?;
    let want: Vec<f32> = [0.0f32, 3.0, 1.0, 4.0, 2.0, 5.0].iter().map(|x| x * x * x).collect();
    assert_eq!(cube(&m.transpose(&[1, 0])?)?.to_vec::<f32>()?, want);
    assert_eq!(cube(&vector(&[2.0])?.broadcast_to(&[2, 2])?)?.to_vec::<f32>()?, [8.0; 4]);
    assert_eq!(cube(&m.slice_axis(1, 1, 3)?)?.to_vec::<f32>()?, [1.0, 8.0, 64.0, 125.0]);
    assert_eq!(cube(&m.flip(&[1])?.slice_axis(0, 0, 1)?)?.to_vec::<f32>()?, [8.0, 1.0, 0.0]);
    assert_eq!(cube(&ops::zeros(&[0, 4], Dtype::Float32)?)?.to_vec::<f32>()?, [] as [f32; 0]);
    Ok(())
}

#[test]
fn errors_and_panics_are_errors() -> Result<()> {
    let same = |inputs: &[Spec]| Ok(vec![inputs[0].clone()]);
    let x = vector(&[1.0])?;
    let fails = |kernel: CpuPrimitive| -> String {
        let first = kernel.apply(&[&x]).and_then(|mut y| y.remove(0).eval());
        first.unwrap_err().to_string()
    };
    let text =
        fails(CpuPrimitive::new(from_fn("sad", same, |_, _| Err(Error::Custom("told you".to_owned())))));
    assert!(text.contains("[sad] told you"), "{text}");
    let text = fails(CpuPrimitive::new(from_fn("rude", same, |_, _| panic!("boom"))));
    assert!(text.contains("[rude]") && text.contains("boom"), "{text}");
    let text = fails(CpuPrimitive::new(from_fn("typed", same, |i, _| i[0].as_slice::<i32>().map(|_| ()))));
    assert!(text.contains("float32, not int32"), "{text}");
    let text = fails(CpuPrimitive::new(from_fn("calls", same, |_, _| Array::scalar(1.0f32).map(|_| ()))));
    assert!(text.contains("inside a CPU primitive"), "{text}");
    let text = fails(CpuPrimitive::new(from_fn("none", |_| Ok(vec![]), |_, _| Ok(()))));
    assert!(text.contains("at least one output"), "{text}");
    let text = fails(CpuPrimitive::new(from_fn("shape panic", |_| panic!("shapes"), |_, _| Ok(()))));
    assert!(text.contains("shapes"), "{text}");
    assert!(matches!(cube(&x.astype(Dtype::Int32)?), Err(Error::Argument(_))));

    // Without a gradient.
    let plain = CpuPrimitive::new(from_fn("plain", same, |_, _| Ok(())));
    let e = transforms::grad(move |v| plain.apply(&[&v[0]])?[0].sum_all(), &[0])(&[&x]).unwrap_err();
    assert_eq!(e, Error::NoGradient("plain".to_owned()));
    // After all that, the stream still works.
    assert_eq!(cube(&x)?.item::<f32>()?, 1.0);
    Ok(())
}

#[test]
fn a_failed_array_stays_failed_and_spoils_no_other() -> Result<()> {
    let same = |inputs: &[Spec]| Ok(vec![inputs[0].clone()]);
    let sad = CpuPrimitive::new(from_fn("sad", same, |_, _| Err(Error::Custom("told you".to_owned()))));
    let (x, constant) = (vector(&[1.0])?, vector(&[2.0])?);

    let y = sad.apply(&[&x])?.remove(0);
    assert!(y.eval().is_err());
    assert!(y.eval().unwrap_err().to_string().contains("failed before"), "not old memory");
    assert!(y.clone().to_vec::<f32>().is_err());
    assert!(cube(&y).and_then(|z| z.eval()).is_err());

    // What depends on it fails with it; what does not is not touched.
    let z = cube(&sad.apply(&[&x])?.remove(0))?;
    assert!(zmlx_mlx::eval(&[&z, &constant]).unwrap_err().to_string().contains("told you"));
    assert!(z.to_vec::<f32>().is_err());
    assert_eq!(constant.to_vec::<f32>()?, [2.0]);

    // Submitted and read later.
    let y = sad.apply(&[&x])?.remove(0);
    zmlx_mlx::async_eval(&[&y])?;
    assert!(y.to_vec::<f32>().unwrap_err().to_string().contains("told you"));
    assert!(y.to_vec::<f32>().is_err());
    assert_eq!(cube(&constant)?.item::<f32>()?, 8.0);

    // Threads that share the stream do not get each other's failures.
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..4)
            .map(|i| {
                let (sad, x) = (&sad, &x);
                scope.spawn(move || {
                    (0..50).all(|_| match i % 2 {
                        0 => sad.apply(&[x]).and_then(|mut y| y.remove(0).eval()).is_err(),
                        _ => cube(x).and_then(|y| y.item::<f32>()).is_ok_and(|v| v == 1.0),
                    })
                })
            })
            .collect();
        assert!(handles.into_iter().all(|h| h.join().unwrap()));
    });
    Ok(())
}

/// Adds 1 in place and counts how often its output had its input's memory.
struct Increment {
    reused: Arc<AtomicUsize>,
    last: Arc<AtomicUsize>,
}

impl CpuKernel for Increment {
    fn name(&self) -> &str {
        "increment"
    }
    fn outputs(&self, inputs: &[Spec]) -> Result<Vec<Spec>> {
        Ok(vec![inputs[0].clone()])
    }
    fn in_place(&self) -> Vec<(usize, usize)> {
        vec![(0, 0)]
    }
    fn eval(&self, inputs: &[CpuInput<'_>], outputs: &mut [CpuOutput<'_>]) -> Result<()> {
        assert_eq!(outputs[0].source(), Some(0));
        assert!(inputs[0].as_slice::<f32>().is_err(), "handed over");
        let y = outputs[0].as_mut_slice::<f32>()?;
        let address = y.as_ptr() as usize;
        if self.last.swap(address, Ordering::Relaxed) == address {
            self.reused.fetch_add(1, Ordering::Relaxed);
        }
        y.iter_mut().for_each(|v| *v += 1.0);
        Ok(())
    }
}

#[test]
fn donated_buffers_are_reused_and_held_ones_are_not() -> Result<()> {
    let (reused, last) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let increment = CpuPrimitive::new(Increment { reused: Arc::clone(&reused), last });
    let next = |x: &Array| -> Result<Array> { Ok(increment.apply(&[x])?.remove(0)) };
    let mut x = ops::zeros(&[1000], Dtype::Float32)?.add_scalar(0.0)?;
    for _ in 0..10 {
        x = next(&x)?; // the old handle is dropped: nobody else needs the buffer
    }
    assert_eq!(x.to_vec::<f32>()?, [10.0; 1000]);
    assert_eq!(reused.load(Ordering::Relaxed), 9, "a chain runs in one buffer");

    let held = next(&x)?;
    let again = next(&x)?;
    let strided = next(&x.reshape(&[10, 100])?.transpose(&[1, 0])?)?;
    assert_eq!(held.to_vec::<f32>()?, [11.0; 1000]);
    assert_eq!(again.to_vec::<f32>()?, [11.0; 1000]);
    assert_eq!(strided.to_vec::<f32>()?, [11.0; 1000]);
    assert_eq!(x.to_vec::<f32>()?, [10.0; 1000], "an array that is still referred to is not written");
    assert_eq!(reused.load(Ordering::Relaxed), 9);
    Ok(())
}

#[test]
fn works_across_streams_and_threads() -> Result<()> {
    let (a, b) = (Stream::new(Device::Cpu)?, Stream::new(Device::Cpu)?);
    let mut x = vector(&[0.5; 64])?;
    for i in 0..20 {
        // x -> (x^3 + 0.875 - x^3 ...) on alternating streams: order matters, so a missing fence would show.
        let s = if i % 2 == 0 { a } else { b };
        x = with_stream(s, || cube(&x)?.add_scalar(0.375))?;
    }
    let mut want = 0.5f32;
    for _ in 0..20 {
        want = want * want * want + 0.375;
    }
    assert_eq!(x.to_vec::<f32>()?, [want; 64]);

    // Graphs built on one thread, extended, evaluated and dropped on others.
    let lazy = cube(&vector(&[1.0, 2.0])?)?;
    let results: Vec<Result<Vec<f32>>> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..8)
            .map(|i| {
                let lazy = lazy.clone();
                scope.spawn(move || {
                    let mut y = lazy;
                    for _ in 0..50 {
                        y = cube(&y)?.add_scalar(f64::from(i))?.minimum(&Array::scalar(2.0f32)?)?;
                        if i % 2 == 0 {
                            y.eval()?;
                        }
                    }
                    y.to_vec::<f32>()
                })
            })
            .collect();
        handles.into_iter().map(|h| h.join().unwrap()).collect()
    });
    for result in results {
        assert_eq!(result?.len(), 2);
    }
    assert_eq!(lazy.to_vec::<f32>()?, [1.0, 8.0]);
    Ok(())
}

#[test]
fn arrays_can_be_cloned_and_dropped_inside_while_others_wait() -> Result<()> {
    let held = vector(&[1.0, 2.0])?;
    let kernel = CpuPrimitive::new(from_fn(
        "cloner",
        |inputs| Ok(vec![inputs[0].clone()]),
        move |_, outputs| {
            for _ in 0..1000 {
                let copy = held.clone();
                assert_eq!((copy.shape(), copy.dtype()), (&[2][..], Dtype::Float32));
            }
            outputs[0].as_mut_slice::<f32>()?.fill(3.0);
            Ok(())
        },
    ));
    let stream = Stream::new(Device::Cpu)?;
    let x = vector(&[0.0, 0.0])?;
    for _ in 0..20 {
        let y = with_stream(stream, || kernel.apply(&[&x]))?.remove(0);
        zmlx_mlx::async_eval(&[&y])?;
        stream.synchronize()?;
        // Evaluated inside a transform, where the lock is held.
        let z = with_stream(stream, || kernel.apply(&[&x]))?.remove(0);
        let g = transforms::grad(|v| z.eval().and_then(|()| v[0].sum_all()), &[0])(&[&x])?;
        assert_eq!((y.to_vec::<f32>()?, z.to_vec::<f32>()?), (vec![3.0; 2], vec![3.0; 2]));
        assert_eq!(g[0].to_vec::<f32>()?, [1.0; 2]);
    }
    Ok(())
}

#[test]
fn closures_and_captured_arrays_are_freed() -> Result<()> {
    let token = Arc::new(());
    let captured = (Arc::clone(&token), vector(&[1.0; 100])?);
    let kernel = CpuPrimitive::new(from_fn(
        "holder",
        |inputs| Ok(vec![inputs[0].clone()]),
        move |_, outputs| {
            let _keep = &captured;
            outputs[0].as_mut_slice::<f32>()?.fill(1.0);
            Ok(())
        },
    ));
    let y = kernel.apply(&[&vector(&[0.0])?])?.remove(0);
    drop(kernel);
    y.eval()?;
    drop(y);
    // The worker may hold the last reference for a moment; any call afterwards drains what it could not free.
    Stream::default_of(Device::Cpu)?.synchronize()?;
    assert_eq!(Arc::strong_count(&token), 1);
    Ok(())
}
