//! Gradients, vectorisation, compilation; errors and panics through C++.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use zmlx_mlx::{Array, Dtype, Error, Result, ops, transforms};

fn vector(values: &[f32]) -> Result<Array> {
    Array::from_slice(values, &[values.len() as i32])
}

#[test]
fn gradients_of_every_kind() -> Result<()> {
    let x = vector(&[1.0, 2.0])?;
    let y = vector(&[3.0, 5.0])?;
    let f = |v: &[Array]| v[0].multiply(&v[1])?.multiply(&v[0])?.sum_all(); // sum(x^2 y)
    let g = transforms::grad(f, &[0, 1])(&[&x, &y])?;
    assert_eq!(g[0].to_vec::<f32>()?, [6.0, 20.0]);
    assert_eq!(g[1].to_vec::<f32>()?, [1.0, 4.0]);

    let (values, gradients) = transforms::value_and_grad(|v| Ok(vec![f(v)?]), &[1])(&[&x, &y])?;
    assert_eq!((values[0].item::<f32>()?, gradients[0].to_vec::<f32>()?), (23.0, vec![1.0, 4.0]));

    let square = |v: &[Array]| Ok(vec![v[0].square()?]);
    let (out, back) = transforms::vjp(square, &[&x], &[&vector(&[1.0, 10.0])?])?;
    assert_eq!((out[0].to_vec::<f32>()?, back[0].to_vec::<f32>()?), (vec![1.0, 4.0], vec![2.0, 40.0]));
    let (_, forward) = transforms::jvp(square, &[&x], &[&vector(&[1.0, 10.0])?])?;
    assert_eq!(forward[0].to_vec::<f32>()?, [2.0, 40.0]);

    // Second derivative: a gradient inside a gradient.
    let cube = |v: &[Array]| v[0].multiply(&v[0])?.multiply(&v[0])?.sum_all();
    let second = transforms::grad(move |v| transforms::grad(cube, &[0])(&[&v[0]])?[0].sum_all(), &[0]);
    assert_eq!(second(&[&x])?[0].to_vec::<f32>()?, [6.0, 12.0]);
    Ok(())
}

#[test]
fn vmap_maps_and_broadcasts() -> Result<()> {
    let a = ops::arange(0.0, 6.0, 1.0, Dtype::Float32)?.reshape(&[3, 2])?;
    let b = vector(&[10.0, 100.0])?;
    let dot = |v: &[Array]| Ok(vec![ops::inner(&v[0], &v[1])?]);
    let out = transforms::vmap(dot, &[0, -1], &[])(&[&a, &b])?;
    assert_eq!(out[0].to_vec::<f32>()?, [100.0, 320.0, 540.0]);
    Ok(())
}

#[test]
fn compiled_functions_trace_once_for_each_shape() -> Result<()> {
    let traces = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&traces);
    let f = transforms::compile(
        move |v| {
            counter.fetch_add(1, Ordering::Relaxed);
            Ok(vec![v[0].exp()?.add_scalar(1.0)?.log()?])
        },
        false,
    )?;
    for values in [&[0.0f32, 1.0][..], &[2.0, 3.0], &[1.0]] {
        let got = f.call(&[&vector(values)?])?[0].to_vec::<f32>()?;
        for (g, v) in got.iter().zip(values) {
            assert!((g - (v.exp() + 1.0).ln()).abs() < 1e-5);
        }
    }
    assert_eq!(traces.load(Ordering::Relaxed), 2, "two shapes");
    drop(f);
    // A drop while another thread holds the lock is left to whoever takes it next.
    vector(&[0.0])?;
    assert_eq!(Arc::strong_count(&traces), 1, "dropping the function frees its closure");
    Ok(())
}

#[test]
fn custom_gradients_and_checkpoints() -> Result<()> {
    let f = transforms::custom_vjp(
        |v| Ok(vec![v[0].square()?]),
        |primals, cotangents, _| Ok(vec![cotangents[0].multiply(&primals[0])?.multiply_scalar(100.0)?]),
    )?;
    let x = vector(&[1.0, 2.0])?;
    let g = transforms::grad(|v| f.call(&[&v[0]])?[0].sum_all(), &[0])(&[&x])?;
    assert_eq!(g[0].to_vec::<f32>()?, [100.0, 200.0]);
    assert_eq!(f.call(&[&x])?[0].to_vec::<f32>()?, [1.0, 4.0]);

    let c = transforms::checkpoint(|v| Ok(vec![v[0].exp()?.sin()?]))?;
    let g = transforms::grad(|v| c.call(&[&v[0]])?[0].sum_all(), &[0])(&[&x])?;
    let want: Vec<f32> = [1.0f32, 2.0].iter().map(|x| x.exp().cos() * x.exp()).collect();
    for (a, b) in g[0].to_vec::<f32>()?.iter().zip(&want) {
        assert!((a - b).abs() < 1e-4);
    }
    let short = transforms::custom_vjp(|v| Ok(vec![v[0].add(&v[1])?]), |_, c, _| Ok(c.to_vec()))?;
    let e = transforms::grad(|v| short.call(&[&v[0], &v[1]])?[0].sum_all(), &[0])(&[&x, &x]).unwrap_err();
    assert!(e.to_string().contains("1 gradients for 2 inputs"), "{e}");
    Ok(())
}

#[test]
fn errors_and_panics_come_back_as_they_were() -> Result<()> {
    let x = vector(&[1.0])?;
    let failing = |_: &[Array]| Err(Error::Custom("mine".to_owned()));
    assert_eq!(transforms::grad(failing, &[0])(&[&x]).unwrap_err(), Error::Custom("mine".to_owned()));
    let panicking = |_: &[Array]| -> Result<Array> { panic!("oh {}", "no") };
    assert_eq!(transforms::grad(panicking, &[0])(&[&x]).unwrap_err(), Error::Panic("oh no".to_owned()));
    let compiled = transforms::compile(|_| panic!("inside compile"), false)?;
    assert_eq!(compiled.call(&[&x]).unwrap_err(), Error::Panic("inside compile".to_owned()));
    let op = transforms::vmap(|v| Ok(vec![v[0].matmul(&v[0])?]), &[0], &[0])(&[&x]).unwrap_err();
    assert!(matches!(op, Error::Op { op: "matmul", .. }), "{op}");
    assert!(matches!(transforms::grad(|v| Ok(v[0].clone()), &[3])(&[&x]), Err(Error::Argument(_))));
    assert!(transforms::grad(|v| Ok(v[0].clone()), &[0])(&[&vector(&[1.0, 2.0])?]).is_err(), "not a scalar");
    // Evaluating a tracer is MLX's error; afterwards all works.
    let inside = transforms::compile(|v| v[0].eval().map(|()| v.to_vec()), false)?;
    assert!(inside.call(&[&x]).is_err());
    assert_eq!(transforms::grad(|v| v[0].square()?.sum_all(), &[0])(&[&x])?[0].item::<f32>()?, 2.0);
    Ok(())
}
