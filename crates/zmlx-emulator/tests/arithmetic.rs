//! Conversions and functions of the emulated devices against those of Rust.

use zmlx_emulator::{Buffer, Dialect, Dtype, KernelText, Launch, Module};

/// 65,536 floats spread over all bit patterns: subnormals, infinities and NaN are among them.
fn spread() -> Vec<f32> {
    (0..65536u32).map(|i| f32::from_bits((i << 16) | (i.wrapping_mul(40503) & 0xffff))).collect()
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

#[test]
fn narrow_floats_convert_as_ieee_says() {
    let x = spread();
    let input = [Buffer::from_f32(Dtype::F32, &x, &[65536])];
    let metal = "uint i = thread_position_in_grid.x;\nh[i] = half(x[i]); b[i] = bfloat(x[i]);\n\
                 hf[i] = float(as_type<half>(ushort(i))); bf[i] = float(as_type<bfloat>(ushort(i)));";
    let cuda = "unsigned i = blockIdx.x * blockDim.x + threadIdx.x;\nh[i] = __half(x[i]); b[i] = __nv_bfloat16(x[i]);\n\
                hf[i] = __half2float(__ushort_as_half(i)); bf[i] = __bfloat162float(__ushort_as_bfloat16(i));";
    for (dialect, body) in [(Dialect::Metal, metal), (Dialect::Cuda, cuda)] {
        let kernel = KernelText::new("narrow", body)
            .input("x", Dtype::F32, 1)
            .output("h", Dtype::F16)
            .output("b", Dtype::Bf16)
            .output("hf", Dtype::F32)
            .output("bf", Dtype::F32);
        let shapes = vec![vec![65536]; 4];
        let module = Module::build(dialect, &[kernel]).unwrap();
        let out = module.run(0, &Launch::new(&input, &shapes, [65536, 1, 1], [256, 1, 1])).unwrap();
        let out: Vec<Vec<f32>> = out.iter().map(Buffer::to_f32).collect();
        for i in 0..65536 {
            let v = x[i];
            assert!(same(out[0][i], half::f16::from_f32(v).to_f32()), "half({v:e}) = {:e}", out[0][i]);
            assert!(same(out[1][i], half::bf16::from_f32(v).to_f32()), "bfloat({v:e}) = {:e}", out[1][i]);
            assert!(same(out[2][i], half::f16::from_bits(i as u16).to_f32()), "half bits {i:#x}");
            assert!(same(out[3][i], half::bf16::from_bits(i as u16).to_f32()), "bfloat bits {i:#x}");
        }
    }
}

type Function = (&'static str, &'static str, fn(f64) -> f64);

/// Metal text, CUDA text, and what they mean.
const FUNCTIONS: [Function; 22] = [
    ("metal::exp(v)", "expf(v)", f64::exp),
    ("metal::log(metal::abs(v))", "logf(fabsf(v))", |v| v.abs().ln()),
    ("tanh(v)", "tanh(v)", f64::tanh),
    ("precise::sqrt(fabs(v))", "sqrt(abs(v))", |v| v.abs().sqrt()),
    ("metal::rsqrt(v * v + 1.0f)", "rsqrtf(v * v + 1.0f)", |v| 1.0 / f64::from((v * v + 1.0) as f32).sqrt()),
    ("sin(v)", "sinf(v)", f64::sin),
    ("fast::cos(v)", "__cosf(v)", f64::cos),
    ("pow(2.0f, v)", "powf(2.0f, v)", |v| 2f64.powf(v)),
    ("floor(v)", "floorf(v)", f64::floor),
    ("ceil(v)", "ceilf(v)", f64::ceil),
    ("trunc(v)", "truncf(v)", f64::trunc),
    ("round(v)", "roundf(v)", f64::round),
    ("rint(v)", "rintf(v)", f64::round_ties_even),
    ("clamp(v, -1.0f, 1.0f)", "fminf(fmaxf(v, -1.0f), 1.0f)", |v| v.clamp(-1.0, 1.0)),
    ("fma(v, 2.0f, 1.0f)", "__fmaf_rn(v, 2.0f, 1.0f)", |v| 2.0 * v + 1.0),
    ("max(v, 0.0f) + min(v, 0.0f)", "max(v, 0.0f) + min(v, 0.0f)", |v| v),
    ("float(popcount(uint(abs(v)) + 7u))", "float(__popc(unsigned(fabsf(v)) + 7u))", |v| {
        f64::from((v.abs() as u32 + 7).count_ones())
    }),
    ("float(clz(uint(abs(v)) + 1u))", "float(__clz(int(fabsf(v)) + 1))", |v| {
        f64::from((v.abs() as u32 + 1).leading_zeros())
    }),
    (
        "float(mulhi(uint(abs(v)) + 1u, 0x80000001u))",
        "float(__umulhi(unsigned(fabsf(v)) + 1u, 0x80000001u))",
        |v| f64::from((((u64::from(v.abs() as u32) + 1) * 0x8000_0001) >> 32) as u32),
    ),
    ("select(1.0f, 2.0f, isnan(v))", "isnan(v) ? 2.0f : 1.0f", |_| 1.0),
    ("sign(v)", "copysignf(v == 0.0f ? 0.0f : 1.0f, v)", |v| if v == 0.0 { 0.0 } else { v.signum() }),
    ("log1p(exp(v))", "log1pf(expf(v))", |v| f64::from(v.exp() as f32).ln_1p()),
];

#[test]
fn functions_agree_with_rust() {
    let x: Vec<f32> = (0..512).map(|i| (i as f32 - 256.0) * 0.0371).collect();
    let input = [Buffer::from_f32(Dtype::F32, &x, &[512])];
    let shapes = [vec![512]];
    for dialect in [Dialect::Metal, Dialect::Cuda] {
        let kernels: Vec<KernelText> = FUNCTIONS
            .iter()
            .enumerate()
            .map(|(i, (metal, cuda, _))| {
                let body = match dialect {
                    Dialect::Metal => {
                        format!("uint i = thread_position_in_grid.x; float v = x[i];\nout[i] = {metal};")
                    }
                    Dialect::Cuda => format!("int i = threadIdx.x; float v = x[i];\nout[i] = {cuda};"),
                };
                KernelText::new(&format!("f{i}"), &body).input("x", Dtype::F32, 1).output("out", Dtype::F32)
            })
            .collect();
        let module = Module::build(dialect, &kernels).unwrap();
        for (k, (metal, cuda, want)) in FUNCTIONS.iter().enumerate() {
            let out =
                module.run(k, &Launch::new(&input, &shapes, [512, 1, 1], [512, 1, 1])).unwrap()[0].to_f32();
            for (&v, got) in x.iter().zip(out) {
                let want = want(f64::from(v));
                let error = (f64::from(got) - want).abs();
                assert!(
                    f64::from(got) == want || error <= want.abs() * 3e-7,
                    "{dialect:?} {metal} {cuda} at {v}: {got}, not {want}"
                );
            }
        }
    }
}
