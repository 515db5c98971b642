//! Arguments, closures and threads that try to break things: each gets an error, and the process lives on.

use std::sync::Arc;

use zmlx_mlx::cpu::{CpuKernel, CpuPrimitive, Spec, from_fn};
use zmlx_mlx::stream::{Device, with_device};
use zmlx_mlx::{Array, Dtype, Error, Result, async_eval, fast, io, ops, transforms};

fn vector(values: &[f32]) -> Result<Array> {
    Array::from_slice(values, &[values.len() as i32])
}

fn same(inputs: &[Spec]) -> Result<Vec<Spec>> {
    Ok(vec![inputs[0].clone()])
}

#[test]
fn arguments_that_mlx_would_divide_by_or_trust() -> Result<()> {
    let m = ops::arange(0.0, 12.0, 1.0, Dtype::Float32)?.reshape(&[3, 4])?;
    let x = Array::from_slice(&[1.0f32; 64], &[1, 64])?;
    let packed = Array::from_slice(&[1u32; 80], &[10, 8])?;
    let (line, kernel) = (vector(&[1.0; 4])?.reshape(&[1, 4, 1])?, vector(&[1.0; 2])?.reshape(&[1, 2, 1])?);
    let (good, small) = (Array::from_slice(&[1.0f32; 10], &[10, 1])?, Array::from_slice(&[1.0f32], &[1, 1])?);
    let product = |scales: &Array, biases: &Array, group, bits| {
        ops::quantized_matmul(&x, &packed, scales, Some(biases), true, Some(group), Some(bits), "affine")
    };
    let no_heads = ops::zeros(&[1, 0, 2, 8], Dtype::Float32)?;
    let q = ops::zeros(&[1, 3, 2, 8], Dtype::Float32)?;
    let wide = [111_620, 429_509_837, 384_773]; // their product is 2^64 + 4
    let cases: Vec<(&str, Result<Array>)> = vec![
        ("unflatten", m.unflatten(0, &[0, -1])),
        ("reshape to negative dimensions", m.reshape(&[-3, -4])),
        ("reshape to a size that wraps", vector(&[1.0; 4])?.reshape(&wide)),
        ("broadcast to a size that wraps", vector(&[1.0])?.broadcast_to(&wide)),
        ("broadcasting sum that wraps", {
            let a = vector(&[1.0])?.broadcast_to(&[111_620, 1, 1])?;
            a.add(&vector(&[1.0])?.broadcast_to(&[429_509_837, 1])?)
        }),
        ("slice by 0", ops::slice(&m, &[0, 0], &[3, 4], &[0, 1])),
        ("slice_update by 0", ops::slice_update(&m, &m, &[0, 0], &[3, 4], &[1, 0])),
        ("negative slice", ops::slice_dynamic(&m, &Array::scalar(0i32)?, &[0], &[-1, 4])),
        ("conv1d groups", ops::conv1d(&line, &kernel, 1, 0, 1, 0)),
        ("conv1d stride", ops::conv1d(&line, &kernel, 0, 0, 1, 1)),
        ("quantize group", ops::quantize(&x, Some(0), Some(4), "affine", None).map(|mut v| v.remove(0))),
        ("matmul bits", product(&good, &good, 64, 0)),
        ("matmul scales", product(&small, &good, 64, 4)),
        ("matmul biases", product(&good, &small, 64, 4)),
        (
            "attention heads",
            fast::scaled_dot_product_attention(&q, &no_heads, &no_heads, 1.0, "", None, None),
        ),
        ("depends on nothing", ops::depends(&[], &[]).map(|mut v| v.remove(0))),
        ("diagonal beyond memory", vector(&[1.0; 3])?.diag(1_000_000_000)),
        ("memory", ops::ones(&[1 << 20, 1 << 20, 1 << 8], Dtype::Float32)),
    ];
    for (name, result) in cases {
        let outcome = result.and_then(|a| a.eval());
        assert!(outcome.is_err(), "{name} succeeded");
    }
    assert!(product(&good, &good, 64, 4)?.eval().is_ok());
    let empty = transforms::checkpoint(|v| Ok(v.to_vec()))?;
    assert!(empty.call(&[]).is_err());
    assert!(transforms::checkpoint(|_| Ok(vec![]))?.call(&[&m]).is_err());
    Ok(())
}

#[test]
fn safetensors_headers_that_lie() -> Result<()> {
    let folder = tempfile::tempdir().map_err(Error::custom)?;
    let path = folder.path().join("x.safetensors");
    for tensor in [
        r#"{"dtype":"F32","shape":[-2,-3],"data_offsets":[0,24]}"#,
        r#"{"dtype":"F32","shape":[111620,429509837,384773],"data_offsets":[0,16]}"#,
        r#"{"dtype":"F32","shape":[4],"data_offsets":[18446744073709551600,0]}"#,
        r#"{"dtype":"F32"}"#,
        "5",
    ] {
        let header = format!("{{\"a\":{tensor}}}");
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend([0; 24]);
        std::fs::write(&path, bytes).map_err(Error::custom)?;
        let read = io::load_safetensors(&path).and_then(|a| a["a"].add_scalar(1.0)?.to_vec::<f32>());
        assert!(read.is_err(), "{tensor}");
    }
    Ok(())
}

#[test]
fn traces_belong_to_their_function_on_every_thread() -> Result<()> {
    let x = vector(&[1.0])?;
    let token = Arc::new(());
    std::thread::scope(|scope| {
        // One thread keeps calling functions that others make and drop.
        let (send, receive) = std::sync::mpsc::channel::<(transforms::Function, f32)>();
        let caller = scope.spawn(move || {
            receive
                .into_iter()
                .all(|(f, want)| f.call(&[&x]).and_then(|v| v[0].item::<f32>()).is_ok_and(|y| y == want))
        });
        for i in 0..30 {
            let held = Arc::clone(&token);
            let f = transforms::compile(
                move |v| {
                    let _held = &held;
                    Ok(vec![v[0].add_scalar(f64::from(i))?])
                },
                false,
            )?;
            send.send((f, 1.0 + i as f32)).map_err(Error::custom)?;
        }
        drop(send);
        assert!(caller.join().unwrap());
        // A drop while another thread holds the lock is left to whoever takes it next.
        vector(&[0.0])?;
        assert_eq!(Arc::strong_count(&token), 1, "the traces are gone with their functions");
        Ok(())
    })
}

#[test]
fn gradients_made_on_one_thread_are_read_on_another() -> Result<()> {
    let gradient = std::thread::spawn(|| -> Result<Array> {
        let x = vector(&[1.0, 2.0])?;
        let f = transforms::checkpoint(|v| Ok(vec![v[0].square()?]))?;
        Ok(transforms::grad(|v| f.call(&[&v[0]])?[0].sum_all(), &[0])(&[&x])?.remove(0))
    });
    let gradient = gradient.join().unwrap()?;
    assert_eq!(gradient.to_vec::<f32>()?, [2.0, 4.0]);
    Ok(())
}

#[test]
fn failures_follow_what_was_submitted() -> Result<()> {
    let sad = CpuPrimitive::new(from_fn("sad", same, |_, _| {
        std::thread::sleep(std::time::Duration::from_millis(5));
        Err(Error::Custom("told you".to_owned()))
    }));
    let x = vector(&[1.0, 2.0])?;
    let failing = || -> Result<Array> { Ok(sad.apply(&[&x])?.remove(0)) };

    // A decode loop: the next step is submitted before the last is read.
    let y = failing()?;
    async_eval(&[&y])?;
    let z = y.add_scalar(1.0)?;
    async_eval(&[&z])?;
    assert!(y.to_vec::<f32>().is_err());
    assert!(z.to_vec::<f32>().is_err(), "what depends on it has failed too");

    // Read by another thread; and after the submitting thread is gone.
    let y = failing()?;
    async_eval(&[&y])?;
    std::thread::scope(|s| assert!(s.spawn(|| y.to_vec::<f32>().is_err()).join().unwrap()));
    let (sad, x) = (sad.clone(), x.clone());
    let orphan = std::thread::spawn(move || -> Result<Array> {
        let y = sad.apply(&[&x])?.remove(0);
        async_eval(&[&y])?;
        Ok(y)
    });
    assert!(orphan.join().unwrap()?.to_vec::<f32>().is_err());
    // Nothing of it is left for later.
    let _ = Array::scalar(1.0f32)?.add_scalar(1.0)?.eval();
    assert_eq!(Array::scalar(1.0f32)?.add_scalar(1.0)?.item::<f32>()?, 2.0);
    Ok(())
}

/// Panics when dropped.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("bomb");
    }
}

#[test]
fn panics_that_panic_again() -> Result<()> {
    let x = vector(&[1.0])?;
    let e = transforms::grad(|_| std::panic::panic_any(Bomb), &[0])(&[&x]).unwrap_err();
    assert!(matches!(e, Error::Panic(_)));
    let kernel = CpuPrimitive::new(from_fn("bomb", same, |_, _| std::panic::panic_any(Bomb)));
    assert!(kernel.apply(&[&x])?[0].eval().is_err());
    Ok(())
}

/// Gives nonsense for inputs of 5 elements.
struct Fickle {
    then: fn(&Spec) -> Vec<Spec>,
}

impl CpuKernel for Fickle {
    fn name(&self) -> &str {
        "fickle"
    }
    fn outputs(&self, inputs: &[Spec]) -> Result<Vec<Spec>> {
        Ok(if inputs[0].shape == [5] { (self.then)(&inputs[0]) } else { inputs.to_vec() })
    }
    fn in_place(&self) -> Vec<(usize, usize)> {
        vec![(0, 0)]
    }
    fn eval(&self, _: &[zmlx_mlx::cpu::CpuInput<'_>], o: &mut [zmlx_mlx::cpu::CpuOutput<'_>]) -> Result<()> {
        o[0].as_mut_slice::<f32>()?.fill(1.0);
        Ok(())
    }
}

#[test]
fn kernels_that_change_their_mind_about_shapes() -> Result<()> {
    let answers: [fn(&Spec) -> Vec<Spec>; 4] = [
        |_| vec![],
        |s| vec![s.clone(), s.clone()],
        |s| vec![Spec::new(&[-1, -4], s.dtype)],
        |s| vec![Spec::new(&[1 << 20], s.dtype)],
    ];
    for then in answers {
        let f = transforms::compile(move |v| CpuPrimitive::new(Fickle { then }).apply(&[&v[0]]), true)?;
        assert_eq!(f.call(&[&vector(&[0.0; 4])?])?[0].to_vec::<f32>()?, [1.0; 4]);
        assert!(f.call(&[&vector(&[0.0; 5])?]).and_then(|v| v[0].eval()).is_err());
    }
    Ok(())
}

#[test]
fn asking_for_streams_inside_a_kernel_spoils_nothing() -> Result<()> {
    let kernel = CpuPrimitive::new(from_fn("asks", same, |_, outputs| {
        assert_eq!(with_device(Device::Cpu, || Array::scalar(1.0f32)).unwrap_err(), Error::InsideCallback);
        outputs[0].as_mut_slice::<f32>()?.fill(2.0);
        Ok(())
    }));
    let y = kernel.apply(&[&vector(&[0.0])?])?.remove(0);
    assert_eq!(y.to_vec::<f32>()?, [2.0]);
    assert_eq!(with_device(Device::Cpu, || y.add_scalar(1.0))?.to_vec::<f32>()?, [3.0]);
    Ok(())
}

#[test]
fn device_addresses_are_refused_where_there_is_no_cuda() {
    if zmlx_mlx::runtime::backend_available(zmlx_mlx::runtime::Backend::Cuda).unwrap() {
        return;
    }
    let error = Array::from_slice(&[1f32, 2.0], &[2]).unwrap().device_address().unwrap_err();
    assert!(error.to_string().contains("does not run on CUDA"), "{error}");
}
