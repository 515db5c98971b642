//! Heads, caches and attention against their formulas in double precision.

mod support;

use support::attention::{cached, kept, softmax, table, turned};
use support::{Device, close, compile, floats, nvrtc, rms_norm, wide};
use zmlx_cuda::kernels::{
    Angles, Attend, AttendOperands, CacheOperands, Finish, Float, Growth, Heads, HeadsOperands, Norm,
    RawHeads, Type,
};

/// What a head goes through.
fn finished(finish: &Finish, raw: &[f32], weight: &[f32], table: &[f32], position: usize) -> Vec<f64> {
    let mut y = finish.norm.map_or_else(|| wide(raw), |n| rms_norm(raw, n.weight.then_some(weight), n.eps));
    if let Some(angles) = finish.rope {
        y = turned(angles, y, table, position);
    }
    if let Some(g) = finish.growth {
        let steps = (position as f64 / f64::from(g.original_context)).floor();
        y.iter_mut().for_each(|y| *y *= 1.0 + f64::from(g.beta) * (1.0 + steps).ln());
    }
    y
}

struct Case {
    heads: RawHeads,
    sequences: usize,
    length: usize,
    cache: Float,
    window: Option<usize>,
    sinks: bool,
    position: usize,
    splits: usize,
    least: usize,
    warps: usize,
    /// Whether memory holds NaN wherever no token of the call may look.
    poisoned: bool,
}

impl Case {
    fn capacity(&self) -> usize {
        self.position + self.length + 3
    }

    fn kernel(&self, fresh: bool) -> Attend {
        Attend {
            fresh,
            window: self.window,
            sinks: self.sinks,
            splits: self.splits,
            least: self.least,
            warps: self.warps,
            ..Attend::new(self.heads, [self.sequences, self.length], self.cache, SCALE)
        }
    }
}

fn plain(heads: usize, kv_heads: usize, key_width: usize, value_width: usize) -> RawHeads {
    RawHeads {
        heads,
        kv_heads,
        key_width,
        value_width,
        finish: Default::default(),
        strides: [0; 3],
        gates: false,
    }
}

/// Everything that a case needs, in memory, and what must come out.
struct World {
    operands: HeadsOperands,
    caches: [u64; 2],
    cache: CacheOperands,
    sinks: Option<u64>,
    sink_values: Option<Vec<f32>>,
    queries: Vec<f64>,
    gates: Vec<f64>,
    caches_after: [Vec<f64>; 2],
    out: Vec<f64>,
}

const SCALE: f32 = 0.17;

fn world(case: &Case, device: &mut Device, rng: &mut fastrand::Rng) -> World {
    let RawHeads { heads, kv_heads, key_width: dk, value_width: dv, finish, strides, gates } = case.heads;
    let m = &mut device.memory;
    let (tokens, capacity) = (case.sequences * case.length, case.capacity());
    let raw = strides.map(|s| floats(rng, tokens * s));
    let norms = [dk, dk, dv].map(|w| floats(rng, w));
    let tables = finish.map(|f| table(f.rope.map_or(1, |r| r.half), capacity));
    let mut caches = [dk, dv].map(|w| {
        let values = floats(rng, case.sequences * kv_heads * capacity * w);
        let mut values: Vec<f64> = values.iter().map(|v| kept(case.cache, f64::from(*v))).collect();
        let seen = case.window.map_or(0, |w| (case.position + 1).saturating_sub(w))..case.position;
        for (i, row) in values.chunks_exact_mut(w).enumerate() {
            if case.poisoned && !seen.contains(&(i % capacity)) {
                row.fill(f64::NAN);
            }
        }
        values
    });
    let narrow = |v: &Vec<f64>| v.iter().map(|v| *v as f32).collect::<Vec<_>>();
    let addresses = [0, 1].map(|i| m.floats(case.cache, &narrow(&caches[i])));
    let sinks = case.sinks.then(|| floats(rng, heads));
    let operands = HeadsOperands {
        raw: [0, 1, 2].map(|i| m.f32(&raw[i])),
        norms: [0, 1, 2].map(|i| finish[i].norm.filter(|n| n.weight).map(|_| m.f32(&norms[i]))),
        angles: [0, 1, 2].map(|i| finish[i].rope.map(|_| m.f32(&tables[i]))),
        gates: gates.then(|| m.fresh(Type::F32, tokens * heads * dk)),
    };
    let cache = CacheOperands {
        position: m.i32(&[case.position as i32]),
        capacity: capacity as i32,
        keys: addresses[0],
        values: addresses[1],
    };
    let (mut queries, mut gate_values) = (Vec::new(), Vec::new());
    for t in 0..tokens {
        let position = case.position + t % case.length;
        let q_width = if gates { 2 * dk } else { dk };
        for h in 0..heads {
            let row = &raw[0][t * strides[0] + h * q_width..][..q_width];
            queries.extend(finished(&finish[0], &row[..dk], &norms[0], &tables[0], position));
            gate_values.extend(wide(&row[dk..]));
        }
        for h in 0..kv_heads {
            for (i, w) in [(1, dk), (2, dv)] {
                let row = &raw[i][t * strides[i] + h * w..][..w];
                let y = finished(&finish[i], row, &norms[i], &tables[i], position);
                let at = ((t / case.length * kv_heads + h) * capacity + position) * w;
                caches[i - 1][at..at + w].iter_mut().zip(y).for_each(|(c, y)| *c = kept(case.cache, y));
            }
        }
    }
    let out = attention(case, &queries, &caches, sinks.as_deref());
    let sink_values = sinks;
    let sinks = sink_values.as_deref().map(|s| m.f32(s));
    World {
        operands,
        caches: addresses,
        cache,
        sinks,
        sink_values,
        queries,
        gates: gate_values,
        caches_after: caches,
        out,
    }
}

/// The formula.
fn attention(case: &Case, queries: &[f64], caches: &[Vec<f64>; 2], sinks: Option<&[f32]>) -> Vec<f64> {
    let RawHeads { heads, kv_heads, key_width: dk, value_width: dv, .. } = case.heads;
    let capacity = case.capacity();
    let mut out = Vec::new();
    for t in 0..case.sequences * case.length {
        let end = case.position + t % case.length + 1;
        let start = case.window.map_or(0, |w| end.saturating_sub(w));
        for h in 0..heads {
            let base = (t / case.length * kv_heads + h / (heads / kv_heads)) * capacity;
            let q = &queries[(t * heads + h) * dk..][..dk];
            let row = |i: usize, p: usize, w: usize| &caches[i][(base + p) * w..][..w];
            let mut scores: Vec<f64> = (start..end)
                .map(|p| f64::from(SCALE) * row(0, p, dk).iter().zip(q).map(|(a, b)| a * b).sum::<f64>())
                .collect();
            scores.extend(sinks.map(|s| f64::from(s[h])));
            let weights = softmax(&scores);
            out.extend(
                (0..dv).map(|d| (start..end).map(|p| weights[p - start] * row(1, p, dv)[d]).sum::<f64>()),
            );
        }
    }
    out
}

fn cases() -> Vec<Case> {
    let norm = |weight| Some(Norm { eps: 1e-6, weight });
    let rope = |half, traditional, magnitude| Some(Angles { half, traditional, magnitude });
    let base = |heads| Case {
        heads,
        sequences: 1,
        length: 1,
        cache: Float::Bf16,
        window: None,
        sinks: false,
        position: 0,
        splits: 4,
        least: 8,
        warps: 2,
        poisoned: false,
    };
    let lfm = RawHeads {
        finish: [
            Finish { norm: norm(true), rope: rope(32, false, 1.0), growth: None },
            Finish { norm: norm(true), rope: rope(32, false, 1.0), growth: None },
            Finish::default(),
        ],
        strides: [8 * 64 + 4 * 64; 3],
        ..plain(8, 2, 64, 64)
    };
    let partial = RawHeads {
        finish: [
            Finish {
                norm: norm(false),
                rope: rope(8, true, 1.3),
                growth: Some(Growth { beta: 0.2, original_context: 4.0 }),
            },
            Finish { norm: None, rope: rope(8, true, 1.3), growth: None },
            Finish { norm: norm(false), ..Default::default() },
        ],
        strides: [4 * 48, 2 * 48 + 4, 2 * 32],
        ..plain(4, 2, 48, 32)
    };
    let gated = RawHeads { strides: [3 * 2 * 256, 256, 256], gates: true, ..plain(3, 1, 256, 256) };
    vec![
        base(lfm),
        Case { position: 37, ..base(lfm) },
        Case { position: 100, length: 3, sequences: 2, least: 16, ..base(lfm) },
        Case { position: 21, cache: Float::F32, sinks: true, ..base(partial) },
        Case { position: 50, cache: Float::F16, window: Some(17), length: 2, sinks: true, ..base(partial) },
        Case { position: 9, splits: 1, ..base(gated) },
        Case { position: 40, splits: 3, cache: Float::F32, ..base(gated) },
        Case { position: 30, length: 8, splits: 2, ..base(partial) },
        // A token of each of a batch.
        Case { position: 70, sequences: 3, least: 16, ..base(lfm) },
        Case { position: 33, sequences: 5, window: Some(9), sinks: true, cache: Float::F32, ..base(partial) },
        Case { position: 20, sequences: 2, ..base(gated) },
    ]
}

#[test]
fn heads_are_finished_and_appended() {
    let mut rng = fastrand::Rng::with_seed(4);
    let mut device = Device::default();
    for (i, case) in cases().iter().enumerate() {
        let world = world(case, &mut device, &mut rng);
        let kernel =
            Heads { raw: case.heads, sequences: case.sequences, length: case.length, cache: case.cache };
        let queries = device.memory.fresh(Type::F32, world.queries.len());
        let launch = kernel.launch(&world.operands, &world.cache, queries).unwrap();
        device.run(&kernel.source().unwrap(), &launch);
        close(&format!("queries of case {i}"), &device.memory.read(queries), &world.queries, 1e-6);
        check_caches(i, case, &device, &world);
    }
}

fn check_caches(i: usize, case: &Case, device: &Device, world: &World) {
    for (address, want) in world.caches.iter().zip(&world.caches_after) {
        // A value in the middle between two that can be kept may go either way.
        close(&format!("cache of case {i}"), &cached(case.cache, device, *address), want, 2e-4);
    }
    if let Some(gates) = world.operands.gates {
        close(&format!("gates of case {i}"), &device.memory.read(gates), &world.gates, 0.0);
    }
}

/// Operands of a launch; without `fresh` queries are finished and keys appended before.
fn operands(case: &Case, kernel: &Attend, world: &World, device: &mut Device) -> AttendOperands {
    let m = &mut device.memory;
    let mut operands = AttendOperands {
        heads: world.operands,
        cache: world.cache,
        sinks: world.sinks,
        scratch: m.f32(&vec![f32::NAN; kernel.scratch()]),
        arrived: m.bytes(Type::U32, vec![0; 4 * kernel.arrived()]),
        out: m.fresh(Type::F32, world.out.len()),
    };
    if !kernel.fresh {
        let heads =
            Heads { raw: case.heads, sequences: case.sequences, length: case.length, cache: case.cache };
        let queries = device.memory.fresh(Type::F32, world.queries.len());
        let launch = heads.launch(&world.operands, &world.cache, queries).unwrap();
        device.run(&heads.source().unwrap(), &launch);
        operands.heads.raw[0] = queries;
    }
    operands
}

#[test]
fn attention_over_parts_of_a_cache() {
    let mut rng = fastrand::Rng::with_seed(5);
    let mut device = Device::default();
    for (i, case) in cases().iter().enumerate() {
        for fresh in [true, false] {
            let world = world(case, &mut device, &mut rng);
            let kernel = case.kernel(fresh);
            let operands = operands(case, &kernel, &world, &mut device);
            let (source, launch) = (kernel.source().unwrap(), kernel.launch(&operands).unwrap());
            device.run(&source, &launch);
            let first = device.memory.read(operands.out);
            // The cache holds rounded keys: that of the reference may be another one where two are as near.
            close(&format!("case {i}, fresh {fresh}"), &first, &world.out, 1e-4);
            check_caches(i, case, &device, &world);
            assert!(device.memory.get(operands.arrived).to_u32().iter().all(|n| *n == 0), "case {i}");
            // Again, in another order of blocks, over what is left of the first: the same bits.
            device.run(&source, &launch);
            assert_eq!(device.memory.read(operands.out), first, "case {i}, fresh {fresh}");
        }
    }
}

/// Shapes of each kind that tensor cores take: widths, groups, pieces, parts, windows that begin for some tokens of a call in
/// the middle of a set of positions.
fn tensor_cases() -> Vec<Case> {
    let shape = |heads: usize, kv_heads: usize, key_width: usize, value_width: usize| {
        let turned = Finish {
            norm: Some(Norm { eps: 1e-6, weight: false }),
            rope: Some(Angles { half: key_width / 4, traditional: false, magnitude: 1.0 }),
            growth: None,
        };
        RawHeads {
            finish: [turned, turned, Finish::default()],
            strides: [heads * key_width, kv_heads * key_width, kv_heads * value_width],
            ..plain(heads, kv_heads, key_width, value_width)
        }
    };
    let base = |heads| Case {
        heads,
        sequences: 1,
        length: 1,
        cache: Float::Bf16,
        window: None,
        sinks: false,
        position: 0,
        splits: 1,
        least: 16,
        warps: 2,
        poisoned: true,
    };
    let gated = RawHeads { strides: [8 * 2 * 256, 256, 256], gates: true, ..shape(8, 1, 256, 256) };
    vec![
        Case { splits: 4, ..base(shape(8, 2, 64, 64)) },
        base(shape(8, 1, 128, 128)),
        Case { cache: Float::F16, splits: 2, least: 40, ..base(gated) },
        Case {
            cache: Float::F16,
            window: Some(20),
            sinks: true,
            length: 3,
            sequences: 2,
            splits: 2,
            ..base(shape(5, 1, 64, 64))
        },
        Case { window: Some(33), sinks: true, warps: 4, ..base(shape(2, 2, 64, 64)) },
        Case { length: 8, window: Some(90), splits: 3, ..base(shape(8, 2, 96, 128)) },
    ]
}

/// Fails unless each value is within `most` of the largest.
fn within(what: &str, got: &[f32], want: &[f64], most: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let largest = want.iter().fold(0.0, |m: f64, w| m.max(w.abs()));
    let errors = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - w).abs() / largest);
    // NaN, without its sign, is above all numbers.
    let (worst, error) = errors.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert!(error <= most, "{what}: {error:e} at {worst}: {} for {}", got[worst], want[worst]);
}

/// Of queries and weights 17 bits are kept with bf16 (errors up to 2^-18 of each product), 23 with f16 (2^-24, as float32's
/// own). A score of these cases is a sum of up to 256 products with random signs and some units in size: its error is up to
/// some 1e-5 and 1e-6, and as much is a result's in units of the largest value. Without the low parts it would be 1e-3 and 1e-4.
#[test]
fn attention_on_tensor_cores() {
    let mut rng = fastrand::Rng::with_seed(6);
    let mut device = Device::default();
    let positions = [0, 1, 15, 16, 17, 127, 128, 129];
    let cases = positions.iter().flat_map(|&position| {
        tensor_cases().into_iter().enumerate().map(move |(i, case)| (i, Case { position, ..case }))
    });
    // As models have it: more than the sets that are asked for ahead.
    let long = tensor_cases().swap_remove(0);
    let long = Case { position: 599, splits: 2, least: 256, warps: 8, ..long };
    for (i, case) in cases.chain([(usize::MAX, long)]) {
        for fresh in [true, false] {
            let what = format!("case {i}, position {}, fresh {fresh}", case.position);
            let world = world(&case, &mut device, &mut rng);
            let kernel = case.kernel(fresh);
            assert!(kernel.on_tensor_cores(), "{what}");
            let operands = operands(&case, &kernel, &world, &mut device);
            device.run(&kernel.source().unwrap(), &kernel.launch(&operands).unwrap());
            // What is in the cache, new keys and values included, as it was rounded there.
            let caches =
                world.caches.map(|a| cached(case.cache, &device, a).iter().map(|v| f64::from(*v)).collect());
            let want = attention(&case, &world.queries, &caches, world.sink_values.as_deref());
            let most = if case.cache == Float::F16 { 3e-6 } else { 3e-5 };
            within(&what, &device.memory.read(operands.out), &want, most);
        }
    }
}

#[test]
fn real_shapes_compile_for_sm_90_without_spills() {
    let Some(nvrtc) = nvrtc() else { return };
    let rope = |half| Some(Angles { half, traditional: false, magnitude: 1.0 });
    let norm = Some(Norm { eps: 1e-6, weight: true });
    let shapes = [
        ("LFM2-8B", [32, 8], 64, false),
        ("Qwen3-30B", [32, 4], 128, false),
        ("GPT-OSS", [64, 8], 64, false),
        ("Qwen3.5", [16, 2], 256, true),
    ];
    for (name, heads, width, gates) in shapes {
        let turned = Finish { norm, rope: rope(width / 2), growth: None };
        let raw = RawHeads {
            finish: [turned, turned, Finish::default()],
            strides: [(heads[0] * (1 + usize::from(gates)) + 2 * heads[1]) * width; 3],
            gates,
            ..plain(heads[0], heads[1], width, width)
        };
        for (fresh, length) in [(true, 1), (false, 1), (true, 4)] {
            for (cache, window) in [(Float::Bf16, None), (Float::Bf16, Some(128)), (Float::F16, Some(128))] {
                let new = Attend::new(raw, [1, length], cache, 0.125);
                let kernel = Attend { fresh, window, sinks: window.is_some(), ..new };
                let what = format!("{name} fresh {fresh} {length} tokens {cache:?} window {window:?}");
                compile(&nvrtc, &what, &kernel.source().unwrap());
            }
        }
        let finish = Heads { raw, sequences: 1, length: 1, cache: Float::Bf16 };
        compile(&nvrtc, name, &finish.source().unwrap());
    }
}
