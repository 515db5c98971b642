//! NVRTC takes what is CUDA and refuses what is not. Skipped, with the reason, only where NVRTC can be neither found
//! nor fetched; `ZMLX_REQUIRE_NVRTC=1` makes that a failure.

use zmlx_emulator::nvrtc::Nvrtc;
use zmlx_emulator::{Buffer, Dialect, Dtype, Error, KernelText, Launch, Module, TemplateArg};

fn nvrtc() -> Option<Nvrtc> {
    match Nvrtc::find() {
        Ok(nvrtc) => Some(nvrtc),
        Err(e) => {
            assert!(std::env::var_os("ZMLX_REQUIRE_NVRTC").is_none(), "{e}");
            eprintln!("skipped: {e}");
            None
        }
    }
}

#[test]
fn good_kernels_compile_and_bad_ones_show_the_line() {
    let Some(nvrtc) = nvrtc() else { return };
    let body = r"
        auto i = cg::this_grid().thread_rank();
        __shared__ float part[32];
        float v = i < x_shape[0] ? float(x[i * x_strides[0]]) * N : 0.0f;
        auto four = load_vector<4>(y, 0);
        for (int n = 16; n > 0; n /= 2) v += __shfl_xor_sync(0xffffffffu, v, n);
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v + four[0];
        __syncthreads();
        out[i] = T(part[threadIdx.x / 32] + half_of(v));";
    let good = KernelText::new("good", body)
        .header("__device__ float half_of(float v) { return 0.5f * v; }\n")
        .input("x", Dtype::F16, 1)
        .input("y", Dtype::F32, 1)
        .output("out", Dtype::Bf16)
        .template("T", TemplateArg::Dtype(Dtype::Bf16))
        .template("N", TemplateArg::Int(3));
    let cubin = nvrtc.compile(&good, "sm_90").unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(&cubin[..4], b"\x7fELF");
    let ptx = nvrtc.compile(&good, "compute_80").unwrap_or_else(|e| panic!("{e}"));
    assert!(String::from_utf8_lossy(&ptx).contains("custom_kernel_good"));

    let header = "#include <cooperative_groups/reduce.h>\n#define M 2\n\
                  __device__ float half_of(float v) { return M * v; }\n";
    let other = KernelText::new("other", "out[0] = half_of(1.0f);").header(header).output("out", Dtype::F32);
    let both = [good, other.clone(), KernelText { name: "third".into(), ..other }];
    let ptx = nvrtc.compile_all(&both, "compute_90").unwrap_or_else(|e| panic!("{e}"));
    let ptx = String::from_utf8_lossy(&ptx).into_owned();
    assert!(["good", "other", "third"].iter().all(|n| ptx.contains(&format!("custom_kernel_{n}"))));

    let bad = KernelText::new("bad", "float v = 1.0f;\nout[0] = simd_sum(v);").output("out", Dtype::F32);
    let Err(Error::Compile { log }) = nvrtc.compile_all(&[both[1].clone(), bad], "sm_90") else {
        panic!("compiled")
    };
    assert!(
        log.contains("bad.cu(2)") && log.contains("simd_sum") && log.contains(">    2 | out[0]"),
        "{log}"
    );
    // Ambiguous with cuda_fp16.h; the emulator's stand-in agrees.
    let mixed =
        KernelText::new("mixed", "out[0] = x[0] + 1.0f;").input("x", Dtype::F16, 1).output("out", Dtype::F32);
    assert!(matches!(nvrtc.compile(&mixed, "sm_90"), Err(Error::Compile { .. })));
    assert!(Module::build(Dialect::Cuda, &[mixed]).is_err());
}

/// What the emulator offers is CUDA's: both compilers take this text.
#[test]
fn the_emulators_names_are_cudas() {
    let Some(nvrtc) = nvrtc() else { return };
    let body = r"
        unsigned i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % warpSize;
        auto block = cg::this_thread_block();
        auto warp = cg::tiled_partition<32>(block);
        extern __shared__ float dynamic[];
        __shared__ unsigned count[2];
        if (block.thread_rank() == 0) count[0] = count[1] = 0u;
        dynamic[threadIdx.x] = 0.0f;
        block.sync();
        float4 v = __ldg(reinterpret_cast<const float4*>(x) + i);
        float2 two = make_float2(v.x, v.y);
        __half2 pair = __float22half2_rn(two);
        float2 back = __half22float2(pair);
        __nv_bfloat162 wide = __floats2bfloat162_rn(v.z, v.w);
        float f = back.x + back.y + __bfloat162float(wide.x) + float(wide.y);
        f += __expf(f) + expm1f(f) + log1pf(fabsf(f)) + erff(f) + erfcf(f) + rsqrtf(f * f + 1.0f) + tanhf(f) + fmaf(f, f, 1.0f);
        f = __fadd_rn(__fmul_rn(f, 2.0f), __fmaf_rn(f, f, 1.0f)) + fminf(f, 1.0f) + fmaxf(f, 2.0f) + max(f, 1.0f) + min(3, 4);
        f += exp2f(f) + log2f(f) + powf(f, 2.0f) + floorf(f) + rintf(f) + copysignf(1.0f, f) + __fdividef(f, 3.0f) + __frcp_rn(f);
        unsigned bits = __float_as_uint(f) ^ __umulhi(i, 0x9E3779B9u) ^ __brev(i) ^ __byte_perm(i, 7u, 0x5140u);
        bits += __popc(bits) + __clz(int(bits)) + __ffs(int(bits)) + __funnelshift_l(bits, i, 3);
        f += __shfl_sync(0xffffffffu, f, 3) + __shfl_up_sync(0xffffffffu, f, 1) + __shfl_down_sync(0xffffffffu, f, 1, 16) + __shfl_xor_sync(0xffffffffu, f, 8);
        unsigned votes = __ballot_sync(0xffffffffu, f > 0.0f) + __any_sync(0xffffffffu, f > 0.0f) + __all_sync(0xffffffffu, f > 0.0f);
        votes += __reduce_add_sync(0xffffffffu, bits & 1u) + __reduce_max_sync(0xffffffffu, lane);
        f += warp.shfl_down(f, 4) + warp.shfl_xor(f, 1) + cg::reduce(warp, f, cg::plus<float>()) + float(warp.ballot(f > 1.0f));
        __syncwarp();
        atomicAdd(&count[0], votes); atomicMax(&count[1], bits); atomicAdd(dynamic + threadIdx.x, f);
        __threadfence();
        __syncthreads();
        AlignedVector<float, 4> four = load_vector<4>(x, i, x_shape[0], 0.0f);
        four[1] = isnan(f) || isinf(f) ? cuda::std::numeric_limits<float>::infinity() : f;
        four[2] = float(count[0]) + dynamic[threadIdx.x];
        store_vector<4>(out, i, four);
        h[i] = __float2half_rn(f) + __ushort_as_half(0x3c00) * hexp(__half(0.5f));
        b[i] = __hmax(__float2bfloat16(f), x_ndim ? __nv_bfloat16(1.0f) : __nv_bfloat16(2.0f));
        auto at = elem_to_loc<int64_t>(i, x_shape.data(), x_strides.data(), x_ndim);
        if (cg::this_grid().thread_rank() == 0 && gridDim.x > 1000u) out[at] = 0.0f;";
    let kernel = KernelText::new("names", body)
        .header("#include <cooperative_groups/reduce.h>\n")
        .input("x", Dtype::F32, 1)
        .output("out", Dtype::F32)
        .output("h", Dtype::F16)
        .output("b", Dtype::Bf16);
    nvrtc.compile(&kernel, "sm_90").unwrap_or_else(|e| panic!("{e}"));
    let module = Module::build(Dialect::Cuda, &[kernel]).unwrap_or_else(|e| panic!("{e}"));
    let input = [Buffer::from_f32(Dtype::F32, &[0.25; 256], &[256])];
    let shapes = [vec![256], vec![64], vec![64]];
    let launch = Launch::new(&input, &shapes, [64, 1, 1], [64, 1, 1]).shared_memory(64 * 4);
    module.run(0, &launch).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn a_directory_without_nvrtc_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    // The variable is read in a process of its own.
    let out = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "good_kernels_compile_and_bad_ones_show_the_line"])
        .env("ZMLX_NVRTC", dir.path())
        .env("ZMLX_REQUIRE_NVRTC", "1")
        .output()
        .unwrap();
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stdout).contains("no libnvrtc in"), "{out:?}");
}
