//! Metal kernels that are right give the right values, under several orders of threads.

use zmlx_emulator::{Buffer, Dialect, Dtype, KernelText, Launch, Module, TemplateArg};

fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| i as f32 * 0.25 - 3.0).collect()
}

fn build(kernel: KernelText) -> Module {
    Module::build(Dialect::Metal, &[kernel]).unwrap_or_else(|e| panic!("{e}"))
}

const SUM: &str = r"
    threadgroup float part[32];
    uint i = thread_position_in_grid.x;
    float v = i < uint(x_shape[0]) ? x[i] : 0.0f;
    v = simd_sum(v);
    if (thread_index_in_simdgroup == 0) part[simdgroup_index_in_threadgroup] = v;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (simdgroup_index_in_threadgroup == 0) {
        float p = thread_index_in_simdgroup < simdgroups_per_threadgroup ? part[thread_index_in_simdgroup] : 0.0f;
        p = simd_sum(p);
        if (thread_index_in_simdgroup == 0) out[threadgroup_position_in_grid.x] = p;
    }";

#[test]
fn vector_add_with_a_cut_last_group() {
    let kernel = KernelText::new("add", "uint i = thread_position_in_grid.x;\n out[i] = a[i] + b[i];")
        .input("a", Dtype::F32, 1)
        .input("b", Dtype::F32, 1)
        .output("out", Dtype::F32);
    let module = build(kernel);
    let x = ramp(1000);
    let inputs = [Buffer::from_f32(Dtype::F32, &x, &[1000]), Buffer::from_f32(Dtype::F32, &x, &[1000])];
    let want: Vec<f32> = x.iter().map(|v| v + v).collect();
    for seed in 0..4 {
        let shapes = [vec![1000]];
        let launch = Launch::new(&inputs, &shapes, [1000, 1, 1], [256, 1, 1]).seed(seed);
        assert_eq!(module.run(0, &launch).unwrap()[0].to_f32(), want);
    }
}

#[test]
fn block_reduction() {
    let module = build(KernelText::new("sum", SUM).input("x", Dtype::F32, 1).output("out", Dtype::F32));
    let x: Vec<f32> = (0..700).map(|i| (i % 13) as f32).collect();
    let input = [Buffer::from_f32(Dtype::F32, &x, &[700])];
    let want: Vec<f32> = x.chunks(256).map(|c| c.iter().sum()).collect();
    for seed in 0..8 {
        // 768 threads: whole groups, so that every lane of a simdgroup is there.
        let shapes = [vec![3]];
        let launch = Launch::new(&input, &shapes, [768, 1, 1], [256, 1, 1]).seed(seed);
        assert_eq!(module.run(0, &launch).unwrap()[0].to_f32(), want);
    }
}

#[test]
fn atomic_histogram_on_device_and_in_shared_memory() {
    let body = r"
        threadgroup atomic_uint count[8];
        uint t = thread_index_in_threadgroup;
        if (t < 8) atomic_store_explicit(&count[t], 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&count[x[thread_position_in_grid.x]], 1u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (t < 8) atomic_fetch_add_explicit(&out[t], atomic_load_explicit(&count[t], memory_order_relaxed), memory_order_relaxed);";
    let module = build(
        KernelText::new("histogram", body).input("x", Dtype::U32, 1).output("out", Dtype::U32).atomic(),
    );
    let x: Vec<u32> = (0..512).map(|i| (i * i + i / 7) % 8).collect();
    let mut want = [0u32; 8];
    x.iter().for_each(|&v| want[v as usize] += 1);
    let input = [Buffer::from_u32(&x, &[512])];
    for seed in 0..4 {
        let shapes = [vec![8]];
        let launch = Launch::new(&input, &shapes, [512, 1, 1], [128, 1, 1]).init_value(0.0).seed(seed);
        assert_eq!(module.run(0, &launch).unwrap()[0].to_u32(), want);
    }
}

#[test]
fn sixteen_bit_floats_round_to_nearest_even() {
    let body = r"
        uint i = thread_position_in_grid.x;
        h[i] = x[i] * 1.5f;
        b[i] = static_cast<bfloat16_t>(x[i] * 1.5f);
        half twice = h_in[i] + h_in[i];
        hh[i] = metal::exp(twice);
        T back = T(b_in[i]);
        bb[i] = back * back;";
    let kernel = KernelText::new("narrow", body)
        .input("x", Dtype::F32, 1)
        .input("h_in", Dtype::F16, 1)
        .input("b_in", Dtype::Bf16, 1)
        .output("h", Dtype::F16)
        .output("b", Dtype::Bf16)
        .output("hh", Dtype::F16)
        .output("bb", Dtype::Bf16)
        .template("T", TemplateArg::Dtype(Dtype::Bf16));
    let x: Vec<f32> = (0..4096).map(|i| (i as f32 - 2048.0) * 0.003_7).collect();
    let one = |d| Buffer::from_f32(d, &x, &[4096]);
    let inputs = [one(Dtype::F32), one(Dtype::F16), one(Dtype::Bf16)];
    let shapes = vec![vec![4096]; 4];
    let out = build(kernel).run(0, &Launch::new(&inputs, &shapes, [4096, 1, 1], [256, 1, 1])).unwrap();
    let scaled: Vec<f32> = x.iter().map(|v| v * 1.5).collect();
    assert_eq!(out[0], Buffer::from_f32(Dtype::F16, &scaled, &[4096]));
    assert_eq!(out[1], Buffer::from_f32(Dtype::Bf16, &scaled, &[4096]));
    let half: Vec<f32> = inputs[1].to_f32();
    let twice =
        Buffer::from_f32(Dtype::F16, &half.iter().map(|v| v + v).collect::<Vec<_>>(), &[4096]).to_f32();
    for (got, v) in out[2].to_f32().iter().zip(&twice) {
        let want = half::f16::from_f32(v.exp()).to_f32();
        assert!(*got == want || (got - want).abs() <= want * 0.001, "exp({v}) = {got}, not {want}");
    }
    let square: Vec<f32> = inputs[2].to_f32().iter().map(|v| v * v).collect();
    assert_eq!(out[3], Buffer::from_f32(Dtype::Bf16, &square, &[4096]));
}

#[test]
fn vectors_of_four_through_a_cast_pointer() {
    let body = r"
        uint i = thread_position_in_grid.x;
        const device float4* p = (const device float4*)(x);
        device float4* q = reinterpret_cast<device float4*>(out);
        float4 v = p[i];
        v.xy = v.yx;
        q[i] = fma(v, float4(2.0f), float4(scale, 0.0f, 0.0f, 1.0f));";
    let kernel = KernelText::new("four", body)
        .input("x", Dtype::F32, 1)
        .input("scale", Dtype::F32, 0)
        .output("out", Dtype::F32);
    let x = ramp(64);
    let inputs = [Buffer::from_f32(Dtype::F32, &x, &[64]), Buffer::from_f32(Dtype::F32, &[0.5], &[])];
    let out = build(kernel).run(0, &Launch::new(&inputs, &[vec![64]], [16, 1, 1], [16, 1, 1])).unwrap();
    let want: Vec<f32> =
        x.chunks(4).flat_map(|c| [2.0 * c[1] + 0.5, 2.0 * c[0], 2.0 * c[2], 2.0 * c[3] + 1.0]).collect();
    assert_eq!(out[0].to_f32(), want);
}

#[test]
fn simd_operations() {
    let body = r"
        uint lane = thread_index_in_simdgroup, n = threads_per_simdgroup;
        int v = x[lane];
        out[lane] = simd_max(v);
        out[n + lane] = simd_prefix_exclusive_sum(v);
        out[2 * n + lane] = simd_shuffle_xor(v, 1);
        out[3 * n + lane] = simd_shuffle_down(v, 4);
        out[4 * n + lane] = simd_broadcast(v, 7);
        out[5 * n + lane] = int(popcount(uint(simd_vote::vote_t(simd_ballot(v > 20)))));
        out[6 * n + lane] = simd_any(v == 3) ? 1 : 0;";
    let kernel = KernelText::new("lanes", body).input("x", Dtype::I32, 1).output("out", Dtype::I32);
    let x: Vec<i32> = (0..32).map(|i| (i * 11) % 32).collect();
    let input = [Buffer::from_i32(&x, &[32])];
    let out = build(kernel).run(0, &Launch::new(&input, &[vec![7 * 32]], [32, 1, 1], [32, 1, 1])).unwrap()[0]
        .to_i64();
    let x: Vec<i64> = x.into_iter().map(i64::from).collect();
    for i in 0..32 {
        assert_eq!(out[i], 31);
        assert_eq!(out[32 + i], x[..i].iter().sum::<i64>());
        assert_eq!(out[64 + i], x[i ^ 1]);
        assert_eq!(out[96 + i], x[if i + 4 < 32 { i + 4 } else { i }]);
        assert_eq!(out[128 + i], x[7]);
        assert_eq!(out[160 + i], x.iter().filter(|&&v| v > 20).count() as i64);
        assert_eq!(out[192 + i], 1);
    }
}

#[test]
fn two_axes_strides_header_and_macros() {
    let header = "#include <metal_stdlib>\nusing namespace metal;\n#define SCALE 3.0f\n\
                  template <typename T> T scaled(const device T* p, int64_t at) { return p[at] * T(SCALE); }\n";
    let body = r"
        uint2 g = thread_position_in_grid.xy;
        int64_t at = g.y * x_strides[0] + g.x * x_strides[1];
        out[g.y * threads_per_grid.x + g.x] = scaled(x, at) + ceildiv(x_ndim, 2);";
    let kernel =
        KernelText::new("turned", body).header(header).input("x", Dtype::F32, 2).output("out", Dtype::F32);
    // A second kernel of the same unit defines the macro again.
    let other = KernelText::new("other", "out[thread_position_in_grid.x] = SCALE;")
        .header("#define SCALE 5.0f\n")
        .output("out", Dtype::F32);
    let module = Module::build(Dialect::Metal, &[kernel, other]).unwrap();
    let x = ramp(15);
    let input = [Buffer::from_f32(Dtype::F32, &x, &[5, 3]).with_strides(&[1, 5])];
    let out = module.run(0, &Launch::new(&input, &[vec![5, 3]], [3, 5, 1], [2, 4, 1])).unwrap();
    let want: Vec<f32> = (0..15).map(|i| x[i / 3 + i % 3 * 5] * 3.0 + 1.0).collect();
    assert_eq!(out[0].to_f32(), want);
    let out = module.run(1, &Launch::new(&[], &[vec![4]], [4, 1, 1], [4, 1, 1])).unwrap();
    assert_eq!(out[0].to_f32(), [5.0; 4]);
}

#[test]
fn what_apples_compiler_refuses_is_refused() {
    let cases = [
        ("out[0] = erf(x[0]);", "erf"),
        ("out[0] = metal::expm1(x[0]);", "expm1"),
        ("bfloat16_t b = x[0]; out[0] = float(b);", "bfloat"),
        ("double d = x[0]; out[0] = float(d);", "double"),
        ("out[0] = metal::max(x[0], 1);", "ambiguous"),
        ("const float* p = x; out[0] = p[0];", "address space"),
    ];
    for (body, word) in cases {
        let kernel = KernelText::new("refused", body).input("x", Dtype::F32, 1).output("out", Dtype::F32);
        let error = Module::build(Dialect::Metal, &[kernel]).expect_err(body).to_string();
        assert!(error.contains(word) && error.contains("refused.metal:1"), "{body}: {error}");
    }
}
