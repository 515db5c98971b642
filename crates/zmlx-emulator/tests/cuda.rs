//! CUDA kernels that are right give the right values, under several orders of threads.

use zmlx_emulator::{Buffer, Dialect, Dtype, KernelText, Launch, Module, TemplateArg};

fn build(kernel: KernelText) -> Module {
    Module::build(Dialect::Cuda, &[kernel]).unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn vector_add_in_whole_blocks() {
    let body = "auto i = cg::this_grid().thread_rank();\nif (i < N) out[i] = a[i] + b[i];";
    let kernel = KernelText::new("add", body)
        .input("a", Dtype::F32, 1)
        .input("b", Dtype::F32, 1)
        .output("out", Dtype::F32)
        .template("N", TemplateArg::Int(1000));
    let x: Vec<f32> = (0..1000).map(|i| i as f32).collect();
    let input = Buffer::from_f32(Dtype::F32, &x, &[1000]);
    let out = build(kernel)
        .run(0, &Launch::new(&[input.clone(), input], &[vec![1000]], [1000, 1, 1], [256, 1, 1]))
        .unwrap();
    assert_eq!(out[0].to_f32(), x.iter().map(|v| v + v).collect::<Vec<_>>());
}

#[test]
fn block_reduction_in_static_and_dynamic_shared_memory() {
    for shared in ["__shared__ float part[32];", "extern __shared__ float part[];"] {
        let body = format!(
            r"{shared}
            unsigned i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
            float v = i < x_shape[0] ? x[i] : 0.0f;
            #pragma unroll
            for (int n = 16; n > 0; n /= 2) v += __shfl_down_sync(0xffffffffu, v, n);
            if (lane == 0) part[warp] = v;
            __syncthreads();
            if (warp == 0) {{
                float p = lane < blockDim.x / 32 ? part[lane] : 0.0f;
                for (int n = 16; n > 0; n /= 2) p += __shfl_xor_sync(0xffffffffu, p, n);
                if (lane == 0) out[blockIdx.x] = p;
            }}"
        );
        let module = build(KernelText::new("sum", &body).input("x", Dtype::F32, 1).output("out", Dtype::F32));
        let x: Vec<f32> = (0..700).map(|i| (i % 17) as f32).collect();
        let input = [Buffer::from_f32(Dtype::F32, &x, &[700])];
        for seed in 0..8 {
            let shapes = [vec![3]];
            let launch =
                Launch::new(&input, &shapes, [700, 1, 1], [256, 1, 1]).shared_memory(32 * 4).seed(seed);
            let want: Vec<f32> = x.chunks(256).map(|c| c.iter().sum()).collect();
            assert_eq!(module.run(0, &launch).unwrap()[0].to_f32(), want, "{shared} seed {seed}");
        }
    }
}

#[test]
fn atomic_histogram() {
    let body = r"
        __shared__ unsigned count[8];
        if (threadIdx.x < 8) count[threadIdx.x] = 0;
        __syncthreads();
        atomicAdd(&count[x[blockIdx.x * blockDim.x + threadIdx.x]], 1u);
        __syncthreads();
        if (threadIdx.x < 8) atomicAdd(out + threadIdx.x, count[threadIdx.x]);";
    let module =
        build(KernelText::new("histogram", body).input("x", Dtype::U32, 1).output("out", Dtype::U32));
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
fn sixteen_bit_floats() {
    let body = r"
        int i = threadIdx.x;
        h[i] = __float2half(__half2float(a[i]) * 1.5f);
        T v = b[i];
        o[i] = v * v;";
    let kernel = KernelText::new("narrow", body)
        .input("a", Dtype::F16, 1)
        .input("b", Dtype::Bf16, 1)
        .output("h", Dtype::F16)
        .output("o", Dtype::Bf16)
        .template("T", TemplateArg::Dtype(Dtype::Bf16));
    let x: Vec<f32> = (0..256).map(|i| (i as f32 - 128.0) * 0.37).collect();
    let inputs = [Buffer::from_f32(Dtype::F16, &x, &[256]), Buffer::from_f32(Dtype::Bf16, &x, &[256])];
    let out = build(kernel)
        .run(0, &Launch::new(&inputs, &[vec![256], vec![256]], [256, 1, 1], [256, 1, 1]))
        .unwrap();
    let want: Vec<f32> = inputs[0].to_f32().iter().map(|v| v * 1.5).collect();
    assert_eq!(out[0], Buffer::from_f32(Dtype::F16, &want, &[256]));
    let want: Vec<f32> = inputs[1].to_f32().iter().map(|v| v * v).collect();
    assert_eq!(out[1], Buffer::from_f32(Dtype::Bf16, &want, &[256]));
}

#[test]
fn vectors_of_four() {
    let header = "__device__ __forceinline__ float4 twice(const float4* __restrict__ p, int i) {\n\
                  float4 v = __ldg(p + i);\nreturn make_float4(v.x + v.x, v.y + v.y, v.z + v.z, v.w + v.w); }\n";
    let body = r"
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < 10) {
            reinterpret_cast<float4*>(a)[i] = twice((const float4*)(x), i);
            store_vector<4>(b, i, load_vector<4>(x, i));
        }";
    let kernel = KernelText::new("four", body)
        .header(header)
        .input("x", Dtype::F32, 1)
        .output("a", Dtype::F32)
        .output("b", Dtype::F32);
    let x: Vec<f32> = (0..40).map(|i| i as f32).collect();
    let shapes = vec![vec![40]; 2];
    let module = build(kernel);
    let input = [Buffer::from_f32(Dtype::F32, &x, &[40])];
    let out = module.run(0, &Launch::new(&input, &shapes, [10, 1, 1], [32, 1, 1])).unwrap();
    assert_eq!(out[0].to_f32(), x.iter().map(|v| v + v).collect::<Vec<_>>());
    assert_eq!(out[1].to_f32(), x);
}

#[test]
fn tiles_of_cooperative_groups() {
    let body = r"
        auto warp = cg::tiled_partition<32>(cg::this_thread_block());
        float sum = cg::reduce(warp, x[threadIdx.x], cg::plus<float>{});
        auto part = cg::tiled_partition<8>(cg::this_thread_block());
        float most = cg::reduce(part, x[threadIdx.x], cg::greater<float>{});
        out[threadIdx.x] = sum;
        top[threadIdx.x] = most;";
    let kernel = KernelText::new("tiles", body)
        .header("#include <cooperative_groups/reduce.h>\n")
        .input("x", Dtype::F32, 1)
        .output("out", Dtype::F32)
        .output("top", Dtype::F32);
    let x: Vec<f32> = (0..64).map(|i| ((i * 29) % 64) as f32).collect();
    let input = [Buffer::from_f32(Dtype::F32, &x, &[64])];
    let module = build(kernel);
    for seed in 0..4 {
        let shapes = [vec![64], vec![64]];
        let out = module.run(0, &Launch::new(&input, &shapes, [64, 1, 1], [64, 1, 1]).seed(seed)).unwrap();
        for i in 0..64 {
            assert_eq!(out[0].to_f32()[i], x[i / 32 * 32..][..32].iter().sum::<f32>());
            assert_eq!(out[1].to_f32()[i], x[i / 8 * 8..][..8].iter().fold(0.0, |a: f32, &b| a.max(b)));
        }
    }
}

#[test]
fn outputs_that_are_changed_in_place() {
    let kernel = KernelText::new("advance", "out[threadIdx.x] += 1.0f;").output("out", Dtype::F32);
    let module = build(kernel);
    let (shapes, before) = ([vec![3]], [Some(Buffer::from_f32(Dtype::F32, &[1.0, 2.0, 3.0], &[3]))]);
    let launch = Launch::new(&[], &shapes, [3, 1, 1], [3, 1, 1]);
    // Without anything in them they cannot be read.
    assert!(module.run(0, &launch).is_err());
    let out = module.run(0, &launch.clone().initial(&before)).unwrap();
    assert_eq!(out[0].to_f32(), [2.0, 3.0, 4.0]);
    let short = [Some(Buffer::from_f32(Dtype::F32, &[1.0], &[1]))];
    assert!(module.run(0, &launch.initial(&short)).is_err());
}
