//! Attention over latents and products of heads against their formulas in double precision.

mod support;

use support::attention::{cached, filled, kept, softmax, table, turned};
use support::{Device, close, compile, dot, floats, matrix, nvrtc, rms_norm, wide};
use zmlx_cuda::kernels::{
    Angles, CacheOperands, Float, Format, HeadProducts, HeadProductsOperands, HeadRows, LatentAttend,
    LatentOperands, Norm, Plan, Type,
};

const AFFINE4: Format = Format::Affine { bits: 4, group: 32, scales: Float::Bf16 };

/// What attention reads and must leave.
struct World {
    operands: LatentOperands,
    caches_after: [Vec<f64>; 2],
    /// `[tokens, heads, latent]`
    mixed: Vec<f64>,
}

fn world(kernel: &LatentAttend, position: usize, device: &mut Device, rng: &mut fastrand::Rng) -> World {
    let &LatentAttend { heads, latent, rope, sequences, length, cache, .. } = kernel;
    let m = &mut device.memory;
    let (tokens, capacity) = (sequences * length, position + length + 3);
    let queries: Vec<f32> = floats(rng, tokens * heads * latent).iter().map(|v| 0.3 * v).collect();
    let [token, head] = kernel.turned_strides;
    let raw_turned = floats(rng, tokens * token);
    let compressed = floats(rng, tokens * kernel.compressed_stride);
    let (norm, half) = (floats(rng, latent), kernel.angles.half);
    let tables = [0, 1].map(|_| table(half, capacity));
    let filled = [latent, rope].map(|w| filled(m, rng, cache, sequences * capacity * w));
    let (addresses, mut caches) = (filled.each_ref().map(|f| f.0), filled.map(|f| f.1));
    for t in 0..tokens {
        let at = position + t % length;
        let row = &compressed[t * kernel.compressed_stride..][..latent + rope];
        let weight = kernel.norm.weight.then_some(&norm[..]);
        let fresh = [
            rms_norm(&row[..latent], weight, kernel.norm.eps),
            turned(kernel.angles, wide(&row[latent..]), &tables[1], at),
        ];
        for (cached, fresh) in caches.iter_mut().zip(fresh) {
            let place = (t / length * capacity + at) * fresh.len();
            cached[place..place + fresh.len()].iter_mut().zip(fresh).for_each(|(c, v)| *c = kept(cache, v));
        }
    }
    let mut mixed = Vec::new();
    for t in 0..tokens {
        let seen = position + t % length + 1;
        let row = |i: usize, p: usize, w: usize| &caches[i][(t / length * capacity + p) * w..][..w];
        for h in 0..heads {
            let q = wide(&queries[(t * heads + h) * latent..][..latent]);
            let pe = &raw_turned[t * token + h * head..][..rope];
            let pe = turned(kernel.angles, wide(pe), &tables[0], seen - 1);
            let score = |p: usize| {
                f64::from(kernel.scale) * (dot(row(0, p, latent), 0, &q) + dot(row(1, p, rope), 0, &pe))
            };
            let weights = softmax(&(0..seen).map(score).collect::<Vec<_>>());
            mixed.extend(
                (0..latent).map(|d| (0..seen).map(|p| weights[p] * row(0, p, latent)[d]).sum::<f64>()),
            );
        }
    }
    let operands = LatentOperands {
        queries: m.f32(&queries),
        turned: m.f32(&raw_turned),
        compressed: m.f32(&compressed),
        norm: kernel.norm.weight.then(|| m.f32(&norm)),
        angles: tables.map(|t| m.f32(&t)),
        cache: CacheOperands {
            position: m.i32(&[position as i32]),
            capacity: capacity as i32,
            keys: addresses[0],
            values: addresses[1],
        },
        // What earlier launches left means nothing.
        parts: m.f32(&vec![f32::NAN; kernel.parts()]),
        stats: m.f32(&vec![f32::NAN; kernel.stats()]),
    };
    World { operands, caches_after: caches, mixed }
}

/// Kernels, and the position of their call.
fn cases() -> Vec<(LatentAttend, usize)> {
    let small =
        LatentAttend { scale: 0.11, splits: 3, least: 4, warps: 2, ..LatentAttend::new(6, [64, 16], [1, 1]) };
    let odd = LatentAttend {
        angles: Angles { half: 3, traditional: false, magnitude: 1.2 },
        norm: Norm { eps: 1e-3, weight: false },
        turned_strides: [5 * 20, 20],
        compressed_stride: 60,
        splits: 4,
        scale: 0.2,
        ..LatentAttend::new(5, [40, 10], [2, 3])
    };
    // Rows of queries with the part that is not turned between them, as in GLM-4.7-Flash.
    let glm = LatentAttend {
        turned_strides: [20 * 256, 256],
        scale: 0.0625,
        ..LatentAttend::new(20, [512, 64], [1, 1])
    };
    let wide = LatentAttend { cache: Float::F32, ..small };
    vec![
        (small, 0),
        (small, 7),
        (small, 93),
        (wide, 21),
        (LatentAttend { least: 1, warps: 1, ..wide }, 2),
        // A token of each of a batch.
        (LatentAttend { sequences: 3, ..small }, 40),
        (odd, 50),
        (LatentAttend { cache: Float::F16, angles: Angles { half: 5, ..odd.angles }, ..odd }, 9),
        (LatentAttend { cache: Float::F32, length: 8, sequences: 1, turned_strides: [50, 10], ..odd }, 30),
        (LatentAttend { heads: 4, length: 8, sequences: 1, splits: 1, warps: 8, ..odd }, 19),
        (glm, 300),
        (LatentAttend { cache: Float::F32, ..glm }, 40),
    ]
}

#[test]
fn attention_over_latents_and_the_products_that_read_it() {
    let mut rng = fastrand::Rng::with_seed(40);
    let mut device = Device::default();
    for (i, (kernel, position)) in cases().into_iter().enumerate() {
        let &LatentAttend { heads, latent, sequences, length, .. } = &kernel;
        let (world, tokens, rows) = (world(&kernel, position, &mut device, &mut rng), sequences * length, 13);
        let format = if latent % 32 == 0 { AFFINE4 } else { Format::Dense(Float::F32) };
        let w = matrix(&mut device.memory, &mut rng, format, heads * rows, latent);
        let product = HeadProducts::new(heads, [rows, latent], format, tokens).of_parts(&kernel);
        let operands = HeadProductsOperands {
            x: world.operands.parts,
            stats: Some(world.operands.stats),
            weights: w.weights,
            out: device.memory.fresh(Type::F32, tokens * heads * rows),
        };
        let want: Vec<f64> = (0..tokens * heads * rows)
            .map(|n| {
                let (row, r) = (n / rows, n % rows);
                dot(&w.values, row % heads * rows + r, &world.mixed[row * latent..][..latent])
            })
            .collect();
        let mut first = None;
        // Twice, in another order of blocks and over what is left of the first: the same bits.
        for _ in 0..2 {
            device.run(&kernel.source().unwrap(), &kernel.launch(&world.operands).unwrap());
            device.run(&product.source().unwrap(), &product.launch(&operands).unwrap());
            let got = device.memory.read(operands.out);
            // The cache holds rounded latents: that of the reference may be another one where two are as near.
            close(&format!("case {i}"), &got, &want, 2e-4);
            let caches = [world.operands.cache.keys, world.operands.cache.values];
            for (address, want) in caches.iter().zip(&world.caches_after) {
                let got = cached(kernel.cache, &device, *address);
                close(&format!("cache of case {i}"), &got, want, 2e-4);
            }
            assert_eq!(*first.get_or_insert_with(|| got.clone()), got, "case {i}");
        }
    }
}

#[test]
fn what_is_no_number_shows() {
    let mut rng = fastrand::Rng::with_seed(41);
    let mut device = Device::default();
    let (kernel, _) = cases().remove(0);
    let world = world(&kernel, 20, &mut device, &mut rng);
    let bad = vec![f32::NAN; kernel.heads * kernel.latent];
    let operands = LatentOperands { queries: device.memory.f32(&bad), ..world.operands };
    let format = Format::Dense(Float::F32);
    let w = matrix(&mut device.memory, &mut rng, format, kernel.heads * 8, kernel.latent);
    let product = HeadProducts::new(kernel.heads, [8, kernel.latent], format, 1).of_parts(&kernel);
    let of_parts = HeadProductsOperands {
        x: operands.parts,
        stats: Some(operands.stats),
        weights: w.weights,
        out: device.memory.fresh(Type::F32, kernel.heads * 8),
    };
    device.run(&kernel.source().unwrap(), &kernel.launch(&operands).unwrap());
    device.run(&product.source().unwrap(), &product.launch(&of_parts).unwrap());
    assert!(device.memory.read(of_parts.out).iter().all(|v| v.is_nan()));
}

#[test]
fn products_of_heads_in_all_formats() {
    let mut rng = fastrand::Rng::with_seed(42);
    let mut device = Device::default();
    let formats = [
        AFFINE4,
        Format::Affine { bits: 4, group: 64, scales: Float::F16 },
        Format::Affine { bits: 8, group: 64, scales: Float::F32 },
        Format::Mxfp4,
        Format::Dense(Float::Bf16),
        Format::Dense(Float::F16),
        Format::Dense(Float::F32),
    ];
    for (i, format) in formats.into_iter().enumerate() {
        for (heads, rows, columns, tokens, strides) in
            [(3, 37, 192, 1, [3 * 256, 256]), (5, 8, 64, 3, [5 * 64, 64]), (300, 5, 64, 1, [300 * 68, 68])]
        {
            let w = matrix(&mut device.memory, &mut rng, format, heads * rows, columns);
            let x = floats(&mut rng, tokens * strides[0]);
            let kernel = HeadProducts {
                x: HeadRows::Rows(strides),
                ..HeadProducts::new(heads, [rows, columns], format, tokens)
            };
            let operands = HeadProductsOperands {
                x: device.memory.f32(&x),
                stats: None,
                weights: w.weights,
                out: device.memory.fresh(Type::F32, tokens * heads * rows),
            };
            device.run(&kernel.source().unwrap(), &kernel.launch(&operands).unwrap());
            let want: Vec<f64> = (0..tokens * heads * rows)
                .map(|n| {
                    let (t, head, r) = (n / rows / heads, n / rows % heads, n % rows);
                    let x = wide(&x[t * strides[0] + head * strides[1]..][..columns]);
                    dot(&w.values, head * rows + r, &x)
                })
                .collect();
            let what = format!("format {i}, {heads} heads {rows}x{columns}");
            close(&what, &device.memory.read(operands.out), &want, 1e-5);
        }
    }
}

#[test]
fn wrong_shapes_are_refused() {
    let good = LatentAttend::new(20, [512, 64], [1, 1]);
    for (bad, said) in [
        (LatentAttend { latent: 516, ..good }, "width of a latent is 516"),
        (LatentAttend { latent: 1024, ..good }, "up to 512"),
        (LatentAttend { rope: 63, ..good }, "width of a rotary key is 63"),
        (LatentAttend { scale: f32::NAN, ..good }, "the scale is NaN"),
    ] {
        let error = bad.source().unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    let error = good.launch(&LatentOperands::default()).unwrap_err().to_string();
    assert!(error.contains("the weights of the latents' norm"), "{error}");
    let product = HeadProducts::new(20, [256, 512], AFFINE4, 1).of_parts(&good);
    let error = product.launch(&HeadProductsOperands::default()).unwrap_err().to_string();
    assert!(error.contains("what the parts count"), "{error}");
    let narrow = HeadProducts::new(20, [256, 48], AFFINE4, 1).source().unwrap_err().to_string();
    assert!(narrow.contains("columns is 48"), "{narrow}");
}

#[test]
fn real_shapes_compile_for_sm_90_without_spills() {
    let Some(nvrtc) = nvrtc() else { return };
    for (name, heads, [nope, value]) in [("GLM-4.7-Flash", 20, [192, 256]), ("DeepSeek-V3", 128, [128, 128])]
    {
        for (cache, length) in [(Float::Bf16, 1), (Float::F16, 1), (Float::F32, 1), (Float::Bf16, 4)] {
            let width = heads * (nope + 64);
            let kernel = LatentAttend {
                cache,
                turned_strides: [width, nope + 64],
                ..LatentAttend::new(heads, [512, 64], [1, length])
            };
            let what = format!("{name}, {length} tokens, {cache:?}, {} splits", kernel.splits);
            compile(&nvrtc, &what, &kernel.source().unwrap());
        }
        let attention = LatentAttend::new(heads, [512, 64], [1, 1]);
        for format in [
            Format::Affine { bits: 4, group: 64, scales: Float::Bf16 },
            Format::Affine { bits: 8, group: 64, scales: Float::Bf16 },
            Format::Mxfp4,
            Format::Dense(Float::Bf16),
        ] {
            let up = HeadProducts::new(heads, [512, nope], format, 1);
            let down = HeadProducts::new(heads, [value, 512], format, 1).of_parts(&attention);
            for kernel in [up, down] {
                let Plan { lanes, rows, split, warps, .. } = kernel.plan;
                let what = format!(
                    "{name}, {heads} heads {}x{}, {format:?}: lanes {lanes} rows {rows} split {split} warps {warps}",
                    kernel.rows, kernel.columns
                );
                compile(&nvrtc, &what, &kernel.source().unwrap());
            }
        }
    }
}
