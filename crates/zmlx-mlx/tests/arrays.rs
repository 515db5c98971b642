//! Arrays: making, reading, showing, errors, files, memory.

use std::collections::BTreeMap;

use half::{bf16, f16};
use zmlx_mlx::stream::{Device, gpu_available, with_device};
use zmlx_mlx::{Array, Complex64, Dtype, Element, Error, Result, eval, fast, io, ops, random};

fn iota(n: i32) -> Result<Array> {
    ops::arange(0.0, n.into(), 1.0, Dtype::Float32)
}

fn round_trip<T: Element + PartialEq + std::fmt::Debug>(values: &[T]) -> Result<()> {
    let shape = [values.len() as i32];
    let a = Array::from_slice(values, &shape)?;
    assert_eq!(a.to_vec::<T>()?, values);
    assert_eq!(a.nbytes(), size_of_val(values));
    assert_eq!(Array::from_vec(values.to_vec(), &shape)?.to_vec::<T>()?, values);
    Ok(())
}

#[test]
fn every_element_type_comes_back() -> Result<()> {
    round_trip(&[true, false, true])?;
    round_trip(&[1u8, 255])?;
    round_trip(&[1u16, 65535])?;
    round_trip(&[7u32, u32::MAX])?;
    round_trip(&[u64::MAX, 0])?;
    round_trip(&[-1i8, 127])?;
    round_trip(&[-300i16, 2])?;
    round_trip(&[-5i32, i32::MAX])?;
    round_trip(&[i64::MIN, 1])?;
    round_trip(&[f16::from_f32(1.5), f16::NEG_INFINITY])?;
    round_trip(&[bf16::from_f32(-2.0), bf16::MAX])?;
    round_trip(&[1.0f32, -0.0, f32::INFINITY])?;
    round_trip(&[1e300f64, -2.0])?;
    round_trip(&[Complex64 { re: 1.0, im: -2.0 }])
}

#[test]
fn empty_and_scalar_arrays() -> Result<()> {
    let empty = Array::from_slice::<f32>(&[], &[0, 3])?;
    assert_eq!((empty.shape(), empty.size()), (&[0, 3][..], 0));
    assert!(empty.to_vec::<f32>()?.is_empty());
    assert!(empty.as_slice::<f32>()?.is_empty());
    assert_eq!(Array::scalar(3i32)?.item::<i32>()?, 3);
    assert_eq!(Array::scalar(3i32)?.shape(), &[] as &[i32]);
    for dtype in Dtype::ALL {
        assert_eq!(Array::scalar_as(1.0, dtype)?.dtype(), dtype);
        assert_eq!(Array::scalar_as(1.0, dtype)?.nbytes(), dtype.size());
    }
    Ok(())
}

#[test]
fn strided_views_read_in_row_major_order() -> Result<()> {
    let a = iota(6)?.reshape(&[2, 3])?;
    let t = a.transpose(&[1, 0])?;
    assert_eq!(t.to_vec::<f32>()?, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    assert!(t.as_slice::<f32>().is_err());
    assert_eq!(t.contiguous()?.as_slice::<f32>()?, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    assert_eq!(a.slice_axis(-1, -2, 3)?.to_vec::<f32>()?, [1.0, 2.0, 4.0, 5.0]);
    assert_eq!(a.slice_axis(0, 5, 9)?.shape(), &[0, 3]);
    let back = ops::slice(&iota(4)?, &[3], &[-5], &[-1])?;
    assert_eq!(back.to_vec::<f32>()?, [3.0, 2.0, 1.0, 0.0]);
    Ok(())
}

#[test]
fn a_borrowed_slice_outlives_reuse_of_buffers() -> Result<()> {
    let a = iota(1000)?.contiguous()?;
    let before = a.as_slice::<f32>()?.to_vec();
    let borrowed = a.as_slice::<f32>()?;
    // Were the buffer donated, one of these would overwrite it.
    let mut b = a.clone();
    for _ in 0..10 {
        b = b.add_scalar(1.0)?;
        b.eval()?;
    }
    assert_eq!(borrowed, before);
    Ok(())
}

#[test]
fn display_and_debug() -> Result<()> {
    let a = Array::from_slice(&[1i32, 2], &[2])?;
    assert_eq!(a.to_string(), "array([1, 2], dtype=int32)");
    assert_eq!(format!("{a:?}"), "Array(int32[2])");
    let bad = ops::matmul(&a.astype(Dtype::Float32)?, &iota(2)?)?;
    assert!(bad.to_string().contains('2'));
    Ok(())
}

#[test]
fn errors_name_the_op_and_the_shapes() -> Result<()> {
    let (a, b) = (iota(6)?.reshape(&[2, 3])?, iota(4)?);
    let cases: Vec<(&str, Result<Array>, &[&str])> = vec![
        ("matmul", a.matmul(&b), &["matmul(float32[2, 3], float32[4])"]),
        ("add", a.add(&b), &["add(float32[2, 3], float32[4])"]),
        ("reshape", a.reshape(&[4]), &["reshape(float32[2, 3])"]),
        ("concatenate", ops::concatenate(&[&a, &b], 0), &["concatenate(float32[2, 3], float32[4])"]),
        ("axis", a.sum(&[7], false), &["sum(float32[2, 3])"]),
        ("negative", ops::zeros(&[-1], Dtype::Float32), &["negative"]),
        ("huge", ops::ones(&[i32::MAX, i32::MAX], Dtype::Float32), &["memory"]),
        ("mode", ops::quantized_matmul(&a, &a, &a, None, true, None, None, "nonsense"), &["nonsense"]),
        ("optional", fast::rms_norm(&a, Some(&b), 1e-5), &["rms_norm(float32[2, 3], float32[4])"]),
    ];
    for (name, result, words) in cases {
        let text = result.err().unwrap_or_else(|| panic!("{name} succeeded")).to_string();
        for word in words {
            assert!(text.contains(word), "{name}: {text}");
        }
    }
    assert!(matches!(a.to_vec::<i32>(), Err(Error::Dtype { expected: Dtype::Int32, found: Dtype::Float32 })));
    assert!(matches!(Array::from_slice(&[1.0f32], &[2]), Err(Error::Argument(_))));
    assert!(matches!(Array::from_slice(&[1.0f32], &[-1]), Err(Error::Argument(_))));
    assert!(matches!(a.item::<f32>(), Err(Error::Argument(_))));
    assert!(a.dim(2).is_err() && a.dim(-3).is_err());
    assert_eq!(a.dim(-1)?, 3);
    // bf16 experts have no CPU kernel: the error comes up in evaluation, not as an abort.
    let failing = with_device(Device::Cpu, || {
        let half = ops::ones(&[2, 4, 4], Dtype::Bfloat16)?;
        let pick = Array::from_slice(&[1u32, 0], &[2])?;
        ops::gather_mm(&half, &half, None, Some(&pick), false)
    })?;
    assert!(failing.eval().unwrap_err().to_string().contains("float32"));
    // ... and the stream works on after it.
    assert_eq!(iota(3)?.sum_all()?.item::<f32>()?, 3.0);
    Ok(())
}

#[test]
fn quantised_products_match_dequantised_ones() -> Result<()> {
    // GPUs multiply float32 in reduced precision (TF32) unless told otherwise.
    let (rtol, atol) = if gpu_available()? { (1e-2, 0.1) } else { (1e-4, 1e-3) };
    let key = random::key(7)?;
    let w = random::normal(&[64, 128], Dtype::Float32, None, None, &key)?;
    let x = random::normal(&[3, 128], Dtype::Float32, None, None, &random::key(8)?)?;
    let experts = w.reshape(&[4, 16, 128])?;
    for (mode, bits, group) in [
        ("affine", 4, 64),
        ("affine", 8, 32),
        ("affine", 3, 64),
        ("mxfp4", 4, 32),
        ("mxfp8", 8, 32),
        ("nvfp4", 4, 16),
    ] {
        let parts = ops::quantize(&w, Some(group), Some(bits), mode, None)?;
        let biases = parts.get(2);
        assert_eq!(biases.is_some(), mode == "affine");
        let dense = ops::dequantize(
            &parts[0],
            &parts[1],
            biases,
            Some(group),
            Some(bits),
            mode,
            None,
            Some(Dtype::Float32),
        )?;
        let product =
            ops::quantized_matmul(&x, &parts[0], &parts[1], biases, true, Some(group), Some(bits), mode)?;
        let reference = x.matmul(&dense.transpose(&[1, 0])?)?;
        assert!(ops::allclose(&product, &reference, rtol, atol, false)?.item::<bool>()?, "{mode} {bits}");

        let parts = ops::quantize(&experts, Some(group), Some(bits), mode, None)?;
        let picked = Array::from_slice(&[2u32, 0, 3], &[3])?;
        let gathered = ops::gather_qmm(
            &x.expand_dims(&[1])?,
            &parts[0],
            &parts[1],
            parts.get(2),
            None,
            Some(&picked),
            true,
            Some(group),
            Some(bits),
            mode,
            None,
            false,
        )?;
        let all = product.reshape(&[3, 4, 16])?;
        for (row, expert) in [2, 0, 3].into_iter().enumerate() {
            let row = row as i32;
            let want = all.slice_axis(0, row, row + 1)?.slice_axis(1, expert, expert + 1)?.flatten(0, -1)?;
            let got = gathered.slice_axis(0, row, row + 1)?.flatten(0, -1)?;
            assert!(
                ops::allclose(&got, &want, rtol, atol, false)?.item::<bool>()?,
                "{mode} {bits} expert {expert}"
            );
        }
    }
    Ok(())
}

#[test]
fn fused_ops_match_their_formulas() -> Result<()> {
    let x = random::normal(&[2, 4, 6, 8], Dtype::Float32, None, None, &random::key(1)?)?;
    let w = random::normal(&[8], Dtype::Float32, None, None, &random::key(2)?)?;
    let close = |a: &Array, b: &Array| ops::allclose(a, b, 1e-5, 1e-5, false)?.item::<bool>();

    let mean = x.square()?.mean(&[-1], true)?.add_scalar(1e-5)?;
    assert!(close(&fast::rms_norm(&x, Some(&w), 1e-5)?, &x.multiply(&mean.rsqrt()?)?.multiply(&w)?)?);

    let centred = x.subtract(&x.mean(&[-1], true)?)?;
    let normed = centred.multiply(&x.var(&[-1], true, 0)?.add_scalar(1e-5)?.rsqrt()?)?;
    assert!(close(&fast::layer_norm(&x, Some(&w), Some(&w), 1e-5)?, &normed.multiply(&w)?.add(&w)?)?);

    let keys = random::normal(&[2, 2, 6, 8], Dtype::Float32, None, None, &random::key(3)?)?;
    let attention = fast::scaled_dot_product_attention(&x, &keys, &keys, 0.5, "causal", None, None)?;
    let repeated = keys.repeat(2, 1)?;
    let scores = x.matmul(&repeated.swapaxes(-1, -2)?)?.multiply_scalar(0.5)?;
    let mask = ops::tri(6, 6, 0, Dtype::Bool)?;
    let masked = ops::where_(&mask, &scores, &Array::scalar(f32::NEG_INFINITY)?)?;
    assert!(close(&attention, &masked.softmax(&[-1], true)?.matmul(&repeated)?)?);

    let at = |offset| fast::rope(&x, 8, false, Some(10000.0), 1.0, offset, None);
    let dynamic = fast::rope_dynamic(&x, 8, false, Some(10000.0), 1.0, &Array::scalar(3i32)?, None)?;
    assert!(close(&dynamic, &at(3)?)?);
    assert!(!close(&at(0)?, &at(3)?)?);
    Ok(())
}

#[test]
fn gated_delta_rule_matches_the_recurrence() -> Result<()> {
    // One head, dk = dv = 32 (the sizes MLX's kernel wants are multiples of 32).
    let random = |seed, shape: &[i32]| random::normal(shape, Dtype::Float32, None, None, &random::key(seed)?);
    let (q, k, v) = (
        random(1, &[1, 3, 1, 32])?,
        random(2, &[1, 3, 1, 32])?.multiply_scalar(0.1)?,
        random(3, &[1, 3, 1, 32])?,
    );
    let g = random(4, &[1, 3, 1])?.sigmoid()?;
    let beta = random(5, &[1, 3, 1])?.sigmoid()?;
    let out = match fast::gated_delta_update(&q, &k, &v, &g, &beta, None, None) {
        Ok(out) => out,
        Err(e) => panic!("{e}"),
    };
    let mut state = ops::zeros(&[32, 32], Dtype::Float32)?;
    for t in 0..3 {
        let step = |a: &Array| a.slice_axis(1, t, t + 1)?.flatten(0, -1);
        let (qt, kt, vt) = (step(&q)?, step(&k)?, step(&v)?);
        state = state.multiply(&step(&g)?)?;
        let predicted = state.matmul(&kt)?;
        let delta = vt.subtract(&predicted)?.multiply(&step(&beta)?)?;
        state = state.add(&ops::outer(&delta, &kt)?)?;
        let want = state.matmul(&qt)?;
        let got = step(&out[0])?;
        assert!(ops::allclose(&got, &want, 1e-4, 1e-4, false)?.item::<bool>()?, "step {t}: {got} {want}");
    }
    Ok(())
}

#[test]
fn sorting_and_indexing() -> Result<()> {
    let a = Array::from_slice(&[3.0f32, 1.0, 2.0, 5.0, 4.0], &[5])?;
    assert_eq!(a.sort(0)?.to_vec::<f32>()?, [1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(a.argsort(0)?.to_vec::<u32>()?, [1, 2, 0, 4, 3]);
    let top = a.argpartition(-2, 0)?.slice_axis(0, -2, 5)?;
    let mut picked = a.take_along_axis(&top, 0)?.to_vec::<f32>()?;
    picked.sort_by(f32::total_cmp);
    assert_eq!(picked, [4.0, 5.0]);
    let set = ops::slice_update(&a, &Array::from_slice(&[9.0f32, 8.0], &[2])?, &[1], &[3], &[1])?;
    assert_eq!(set.to_vec::<f32>()?, [3.0, 9.0, 8.0, 5.0, 4.0]);
    assert_eq!(a.argmax(0, false)?.item::<u32>()?, 3);
    let parts = a.split_at(&[2], 0)?;
    assert_eq!((parts.len(), parts[1].size()), (2, 3));
    let x = Array::from_slice(&[1.0f32, 2.0, 3.0, 4.0], &[1, 4, 1])?;
    let kernel = Array::from_slice(&[1.0f32, 10.0], &[1, 2, 1])?;
    assert_eq!(ops::conv1d(&x, &kernel, 1, 0, 1, 1)?.to_vec::<f32>()?, [21.0, 32.0, 43.0]);
    Ok(())
}

#[test]
fn random_numbers_follow_their_key() -> Result<()> {
    let draw = |seed| {
        random::uniform(
            &Array::scalar(0.0f32)?,
            &Array::scalar(1.0f32)?,
            &[100],
            Dtype::Float32,
            &random::key(seed)?,
        )?
        .to_vec::<f32>()
    };
    assert_eq!(draw(1)?, draw(1)?);
    assert_ne!(draw(1)?, draw(2)?);
    assert!(draw(1)?.iter().all(|x| (0.0..1.0).contains(x)));
    let (a, b) = random::split(&random::key(1)?)?;
    assert_ne!(a.to_vec::<u32>()?, b.to_vec::<u32>()?);
    Ok(())
}

#[test]
fn safetensors_files() -> Result<()> {
    let folder = tempfile::tempdir().map_err(Error::custom)?;
    let path = folder.path().join("a.safetensors");
    let arrays: BTreeMap<String, Array> = [
        ("w".to_owned(), iota(6)?.reshape(&[2, 3])?),
        ("b".to_owned(), Array::from_slice(&[bf16::ONE], &[1])?),
    ]
    .into();
    let metadata: BTreeMap<String, String> = [("format".to_owned(), "mlx".to_owned())].into();
    io::save_safetensors(&path, &arrays, &metadata)?;
    let names: Vec<_> = std::fs::read_dir(folder.path()).map_err(Error::custom)?.collect();
    assert_eq!(names.len(), 1, "no temporary file is left: {names:?}");
    let loaded = io::load_safetensors(&path)?;
    assert_eq!(loaded["w"].to_vec::<f32>()?, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    assert_eq!(loaded["b"].dtype(), Dtype::Bfloat16);

    let whole = std::fs::read(&path).map_err(Error::custom)?;
    let write = |bytes: &[u8]| std::fs::write(&path, bytes).map_err(Error::custom);
    write(&whole[..4])?;
    assert!(io::load_safetensors(&path).unwrap_err().to_string().contains("shorter"));
    write(&[&u64::MAX.to_le_bytes()[..], b"{}"].concat())?;
    assert!(io::load_safetensors(&path).unwrap_err().to_string().contains("claims"));
    write(&[&2u64.to_le_bytes()[..], b"??"].concat())?;
    assert!(matches!(io::load_safetensors(&path), Err(Error::File { .. })));
    // Cut data is found when the tensor is read.
    write(&whole[..whole.len() - 8])?;
    let cut = io::load_safetensors(&path).and_then(|a| eval(&a.values().collect::<Vec<_>>()));
    assert!(cut.is_err());
    for bad in [folder.path().join("missing.safetensors"), folder.path().to_path_buf()] {
        assert!(matches!(io::load_safetensors(&bad), Err(Error::File { .. })));
    }
    let nowhere = folder.path().join("no/such/folder/x.safetensors");
    assert!(io::save_safetensors(&nowhere, &arrays, &metadata).is_err());
    write(b"GGUX....")?;
    assert!(io::load_gguf(&path).unwrap_err().to_string().contains("not a GGUF"));
    Ok(())
}
