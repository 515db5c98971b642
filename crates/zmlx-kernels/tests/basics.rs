//! Kernels on MLX arrays: forward, gradients, vmap, compile.

use zmlx_kernels::{Array, Kernel};
use zmlx_mlx::{ops, transforms};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

type Function = Box<dyn Fn(&Array) -> zmlx_mlx::Result<Array>>;

fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 17.0).collect()
}

fn close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= tolerance * (1.0 + e.abs()), "element {i}: {f} is not {e}");
    }
}

#[test]
fn softmax_forward_and_gradients_equal_mlx() -> Result<()> {
    let softmax = Kernel::new("softmax(x) = let e = exp(x - row_max(x)); e / row_sum(e)")?;
    for (rows, cols) in [(1, 1), (3, 5), (7, 513), (64, 1000)] {
        let x = Array::from_slice(&ramp(rows * cols), &[rows as i32, cols as i32])?;
        let w = Array::from_slice(&ramp(rows * cols + 3)[3..], &[rows as i32, cols as i32])?;
        let ours = softmax.call1(&[&x])?;
        let theirs = ops::softmax(&x, &[-1], true)?;
        close(&ours.to_vec::<f32>()?, &theirs.to_vec::<f32>()?, 1e-6);

        let k = softmax.clone();
        let loss = move |a: &[Array]| k.call1(&[&a[0]])?.multiply(&a[1])?.sum_all();
        let reference = |a: &[Array]| ops::softmax(&a[0], &[-1], true)?.multiply(&a[1])?.sum_all();
        let ours = transforms::grad(loss, &[0])(&[&x, &w])?.remove(0);
        let theirs = transforms::grad(reference, &[0])(&[&x, &w])?.remove(0);
        close(&ours.to_vec::<f32>()?, &theirs.to_vec::<f32>()?, 1e-5);
    }
    Ok(())
}

#[test]
fn second_derivatives_vmap_jvp_and_compile() -> Result<()> {
    let mish = Kernel::new("x * tanh(log(1 + exp(x)))")?;
    let x = Array::from_slice(&ramp(24), &[4, 6])?;
    let reference = |a: &Array| a.multiply(&a.exp()?.log1p()?.tanh()?);
    let second = |f: Function| -> zmlx_mlx::Result<Vec<f32>> {
        let f = std::rc::Rc::new(f);
        let once = move |a: &[Array]| {
            let f = f.clone();
            let inner = transforms::grad(move |b: &[Array]| f(&b[0])?.sum_all(), &[0]);
            inner(&[&a[0]])?.remove(0).sum_all()
        };
        transforms::grad(once, &[0])(&[&x])?.remove(0).to_vec::<f32>()
    };
    let k = mish.clone();
    let ours = second(Box::new(move |a| Ok(k.call1(&[a])?)))?;
    close(&ours, &second(Box::new(reference))?, 1e-5);

    let k = mish.clone();
    let mapped = transforms::vmap(move |a: &[Array]| Ok(k.call(&[&a[0]])?), &[1], &[0]);
    let transposed = reference(&x.transpose(&[1, 0])?)?;
    close(&mapped(&[&x])?[0].to_vec::<f32>()?, &transposed.to_vec::<f32>()?, 1e-6);

    let k = mish.clone();
    let (_, tangents) = transforms::jvp(move |a| Ok(k.call(&[&a[0]])?), &[&x], &[&x])?;
    let (_, expected) = transforms::jvp(move |a| Ok(vec![reference(&a[0])?]), &[&x], &[&x])?;
    close(&tangents[0].to_vec::<f32>()?, &expected[0].to_vec::<f32>()?, 1e-5);

    let k = mish.clone();
    let compiled = transforms::compile(move |a| Ok(k.call(&[&a[0]])?), false)?;
    close(&compiled.call(&[&x])?[0].to_vec::<f32>()?, &reference(&x)?.to_vec::<f32>()?, 1e-6);
    Ok(())
}

#[test]
fn broadcast_weights_get_summed_gradients() -> Result<()> {
    let rms = Kernel::new("rms_norm(x, w, eps: scalar = 1e-5) = x * rsqrt(row_mean(x * x) + eps) * w")?;
    let x = Array::from_slice(&ramp(5 * 33), &[5, 33])?;
    let w = Array::from_slice(&ramp(33), &[33])?;
    let ours = {
        let k = rms.clone();
        transforms::grad(move |a: &[Array]| k.call1(&[&a[0], &a[1]])?.square()?.sum_all(), &[0, 1])(&[
            &x, &w,
        ])?
    };
    let theirs = transforms::grad(
        |a: &[Array]| zmlx_mlx::fast::rms_norm(&a[0], Some(&a[1]), 1e-5)?.square()?.sum_all(),
        &[0, 1],
    )(&[&x, &w])?;
    for (o, t) in ours.iter().zip(&theirs) {
        assert_eq!(o.shape(), t.shape());
        close(&o.to_vec::<f32>()?, &t.to_vec::<f32>()?, 1e-4);
    }
    Ok(())
}
