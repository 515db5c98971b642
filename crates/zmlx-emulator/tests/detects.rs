//! Kernels that are wrong are found out, and the error says where.

use zmlx_emulator::{Access, Buffer, Dialect, Dtype, Error, KernelText, Launch, Module};

/// Runs a body with one input `x` and one output `out` of 64 floats each, under eight seeds.
fn errors(dialect: Dialect, body: &str, grid: u32, group: u32, init: Option<f32>) -> Vec<Error> {
    let kernel = KernelText::new("wrong", body).input("x", Dtype::F32, 1).output("out", Dtype::F32);
    let module = Module::build(dialect, &[kernel]).unwrap_or_else(|e| panic!("{e}"));
    let input = [Buffer::from_f32(Dtype::F32, &[1.0; 64], &[64])];
    let shapes = [vec![64]];
    (0..8)
        .filter_map(|seed| {
            let mut launch = Launch::new(&input, &shapes, [grid, 1, 1], [group, 1, 1]).seed(seed);
            launch.init_value = init;
            module.run(0, &launch).err()
        })
        .collect()
}

fn always(dialect: Dialect, body: &str, grid: u32, group: u32) -> Error {
    let mut found = errors(dialect, body, grid, group, None);
    assert_eq!(found.len(), 8, "not under every seed: {found:?}");
    found.swap_remove(0)
}

#[test]
fn accesses_outside_of_buffers() {
    let e = always(Dialect::Metal, "uint i = thread_position_in_grid.x;\nout[i] = x[i + 1];", 64, 64);
    let Error::OutOfBounds { buffer, index: 64, len: 64, by, access: Access::Read, at, .. } = &e else {
        panic!("{e}")
    };
    assert_eq!((buffer.as_str(), by.thread, at.as_str()), ("x", [63, 0, 0], "wrong.metal:2"));
}

#[test]
fn unguarded_cuda_grids_overrun() {
    let kernel = KernelText::new("over", "int i = blockIdx.x * blockDim.x + threadIdx.x;\nout[i] = 1.0f;")
        .output("out", Dtype::F32);
    let module = Module::build(Dialect::Cuda, &[kernel]).unwrap();
    let e = module.run(0, &Launch::new(&[], &[vec![60]], [60, 1, 1], [32, 1, 1])).unwrap_err();
    let Error::OutOfBounds { index, len: 60, access: Access::Write, at, .. } = &e else { panic!("{e}") };
    assert!((60..64).contains(index) && at == "over.cu:2", "{e}");
}

#[test]
fn negative_and_far_indices() {
    for (text, want) in [("out[int(i) - 1] = 1.0f;", -1), ("out[i + 100000000ul] = 1.0f;", 100_000_000)] {
        let body = format!("uint i = thread_position_in_threadgroup.x;\n{text}");
        let e = always(Dialect::Metal, &body, 1, 1);
        assert!(
            matches!(&e, Error::OutOfBounds { buffer, index, .. } if buffer == "out" && *index == want),
            "{e}"
        );
    }
}

#[test]
fn shared_and_private_arrays_have_bounds() {
    let shared = "threadgroup float s[8]; uint i = thread_position_in_grid.x;\n threadgroup float* p = s;\n\
                  p[i] = 1.0f; out[i] = p[i];";
    let e = always(Dialect::Metal, shared, 64, 64);
    assert!(matches!(&e, Error::OutOfBounds { buffer, len: 8, .. } if buffer == "s"), "{e}");
    let private = "float a[4] = {1, 2, 3, 4}; int i = threadIdx.x;\nout[i] = a[i / 8];";
    let e = always(Dialect::Cuda, private, 64, 64);
    assert!(
        matches!(&e, Error::OutOfBounds { buffer, note, .. } if buffer == "array" && note.contains("wrong.cu:2")),
        "{e}"
    );
}

#[test]
fn missing_barriers_race() {
    let metal = "threadgroup float s[64]; uint i = thread_position_in_grid.x;\ns[i] = 0;\n\
                 threadgroup_barrier(mem_flags::mem_threadgroup);\ns[i] = x[i];\n@\nout[i] = s[63 - i];";
    let cuda = "__shared__ float s[64]; int i = threadIdx.x;\ns[i] = 0;\n__syncthreads();\ns[i] = x[i];\n@\nout[i] = s[63 - i];";
    for (dialect, body, barrier) in [
        (Dialect::Metal, metal, "threadgroup_barrier(mem_flags::mem_threadgroup);"),
        (Dialect::Cuda, cuda, "__syncthreads();"),
    ] {
        let found = errors(dialect, &body.replace('@', ""), 64, 64, None);
        assert_eq!(found.len(), 8, "{found:?}");
        assert!(found.iter().all(|e| matches!(e, Error::Race { buffer, .. } if buffer == "s")), "{found:?}");
        assert!(errors(dialect, &body.replace('@', barrier), 64, 64, None).is_empty());
    }
    // A barrier that orders device memory does not order shared memory.
    let weak = metal.replace('@', "threadgroup_barrier(mem_flags::mem_device);");
    assert_eq!(errors(Dialect::Metal, &weak, 64, 64, None).len(), 8);
}

#[test]
fn shared_memory_written_again_before_all_have_read_it() {
    let body = "threadgroup float s[2]; uint i = thread_position_in_grid.x;\n\
        for (int k = 0; k < 3; k++) {\n if (i % 32 == 0) s[i / 32] = x[i] + k;\n\
        threadgroup_barrier(mem_flags::mem_threadgroup);\n float v = s[0] + s[1];\n @\n out[i] = v;\n}";
    let found = errors(Dialect::Metal, &body.replace('@', ""), 64, 64, None);
    assert_eq!(found.len(), 8);
    for e in &found {
        assert!(
            matches!(e, Error::Race { other_access: Access::Read, access: Access::Write, at, .. } if at == "wrong.metal:3")
                || matches!(e, Error::Race { other_access: Access::Write, access: Access::Read, at, .. } if at == "wrong.metal:5"),
            "{e}"
        );
    }
    let barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);";
    assert!(errors(Dialect::Metal, &body.replace('@', barrier), 64, 64, None).is_empty());
}

#[test]
fn simdgroup_barriers_order_a_simdgroup_only() {
    let body = "threadgroup float s[64]; uint i = thread_position_in_grid.x;\ns[i] = x[i];\n\
                simdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = s[i ^ @];";
    assert!(errors(Dialect::Metal, &body.replace('@', "1"), 64, 64, None).is_empty());
    assert_eq!(errors(Dialect::Metal, &body.replace('@', "32"), 64, 64, None).len(), 8);
}

#[test]
fn groups_that_write_the_same_output_race() {
    let body = "out[thread_position_in_threadgroup.x] = float(threadgroup_position_in_grid.x);";
    let e = always(Dialect::Metal, body, 128, 64);
    assert!(matches!(&e, Error::Race { buffer, .. } if buffer == "out"), "{e}");
}

#[test]
fn reads_of_memory_never_written() {
    let cases = [
        (Dialect::Metal, "threadgroup float s[64]; uint i = thread_position_in_grid.x; out[i] = s[i];", "s"),
        (Dialect::Cuda, "__shared__ float s[64]; out[threadIdx.x] = s[threadIdx.x];", "s"),
        (Dialect::Metal, "out[thread_position_in_grid.x] += 1.0f;", "out"),
        (Dialect::Cuda, "atomicAdd(out + threadIdx.x, 1.0f);", "out"),
    ];
    for (dialect, body, name) in cases {
        let e = always(dialect, body, 64, 64);
        assert!(matches!(&e, Error::Uninitialised { buffer, .. } if buffer == name), "{body}: {e}");
    }
    // The second group does not see what the first one left.
    let stale = "threadgroup float s[32]; uint i = thread_position_in_threadgroup.x;\n\
                 if (threadgroup_position_in_grid.x == 0) s[i] = 1.0f;\nout[thread_position_in_grid.x] = s[i];";
    let e = always(Dialect::Metal, stale, 64, 32);
    assert!(matches!(e, Error::Uninitialised { .. }), "{e}");
}

#[test]
fn outputs_left_unwritten() {
    let body = "uint i = thread_position_in_grid.x;\nif (i % 16 != 3) out[i] = x[i];";
    let e = always(Dialect::Metal, body, 64, 32);
    let Error::Unwritten { first, count: 4, len: 64, .. } = &e else { panic!("{e}") };
    assert_eq!(first, &[3, 19, 35, 51]);
    assert!(errors(Dialect::Metal, body, 64, 32, Some(0.0)).is_empty());
}

#[test]
fn barriers_that_not_all_threads_reach() {
    let cases = [
        (
            Dialect::Metal,
            "uint i = thread_position_in_grid.x;\nif (i < 32)\nthreadgroup_barrier(mem_flags::mem_none);\nout[i] = 1.0f;",
        ),
        (
            Dialect::Metal,
            "uint i = thread_position_in_grid.x; out[i] = 1.0f;\nif (i >= 60) return;\nthreadgroup_barrier(mem_flags::mem_none);",
        ),
        (
            Dialect::Metal,
            "uint i = thread_position_in_grid.x; float v = 0;\nif (i % 2) v = simd_sum(x[i]);\nthreadgroup_barrier(mem_flags::mem_none);\nout[i] = v;",
        ),
        (
            Dialect::Cuda,
            "int i = threadIdx.x; out[i] = 1.0f;\nif (i % 2) __syncthreads();\nelse __syncwarp();",
        ),
        (
            Dialect::Cuda,
            "int i = threadIdx.x; float v = 1;\nif (i % 2) v = __shfl_xor_sync(0xffffffffu, v, 2);\n__syncthreads(); out[i] = v;",
        ),
    ];
    for (dialect, body) in cases {
        let e = always(dialect, body, 64, 64);
        assert!(matches!(&e, Error::Divergence { text, .. } if text.contains("line")), "{body}: {e}");
    }
}

#[test]
fn a_wait_for_what_never_comes_ends() {
    let body = "while (atomic_load_explicit(&out[0], memory_order_relaxed) < 65.0f) {\n\
                if (thread_position_in_grid.x < @) { atomic_fetch_add_explicit(&out[0], 1.0f, memory_order_relaxed); } }";
    for (adders, ends) in [("64", true), ("0", false)] {
        let kernel = KernelText::new("wait", &body.replace('@', adders)).output("out", Dtype::F32).atomic();
        let module = Module::build(Dialect::Metal, &[kernel]).unwrap();
        let shapes = [vec![1]];
        let launch = Launch::new(&[], &shapes, [64, 1, 1], [64, 1, 1]).init_value(0.0).step_limit(100_000);
        let result = module.run(0, &launch);
        assert!(
            if ends { result.is_ok() } else { matches!(result, Err(Error::Deadlock { .. })) },
            "{result:?}"
        );
    }
}

#[test]
fn shuffles_from_lanes_that_are_not_there() {
    let e = always(
        Dialect::Metal,
        "uint i = thread_position_in_grid.x;\nout[i] = simd_shuffle_down(x[i], 16);",
        16,
        16,
    );
    assert!(
        matches!(&e, Error::Undefined { text, .. } if text.contains("lane") && text.contains("line 2")),
        "{e}"
    );
}

#[test]
fn misaligned_vectors_and_division_by_zero() {
    let kernel = KernelText::new(
        "four",
        "uint i = thread_position_in_grid.x;\n((device float4*)out)[i] = ((const device float4*)x)[i];",
    )
    .input("x", Dtype::F32, 1)
    .output("out", Dtype::F32);
    let module = Module::build(Dialect::Metal, &[kernel]).unwrap();
    let input = Buffer::from_f32(Dtype::F32, &[1.0; 64], &[64]);
    let shapes = [vec![64]];
    assert!(
        module.run(0, &Launch::new(std::slice::from_ref(&input), &shapes, [16, 1, 1], [16, 1, 1])).is_ok()
    );
    let e =
        module.run(0, &Launch::new(&[input.with_offset(1)], &shapes, [16, 1, 1], [16, 1, 1])).unwrap_err();
    assert!(
        matches!(&e, Error::Misaligned { buffer, text, .. } if buffer == "x" && text.contains("16")),
        "{e}"
    );
    let e = always(Dialect::Cuda, "int i = threadIdx.x;\nout[i] = float(7 / i);", 64, 64);
    assert!(
        matches!(&e, Error::Undefined { text, .. } if text.contains("division") && text.contains("wrong.cu:2")),
        "{e}"
    );
}

#[test]
fn writes_to_inputs_and_too_much_shared_memory() {
    let e = always(
        Dialect::Cuda,
        "int i = threadIdx.x; out[i] = 0.0f;\nconst_cast<float*>(x)[i] = 1.0f;",
        64,
        64,
    );
    assert!(matches!(&e, Error::Undefined { text, .. } if text.contains("input x")), "{e}");
    let e = always(
        Dialect::Metal,
        "threadgroup float s[9000]; uint i = thread_position_in_grid.x; s[i] = 1.0f; out[i] = s[i];",
        64,
        64,
    );
    assert!(matches!(&e, Error::Resource { text, .. } if text.contains("32768")), "{e}");
}

#[test]
fn launches_that_do_not_fit() {
    let kernel = KernelText::new("fit", "out[0] = x[0];").input("x", Dtype::F32, 1).output("out", Dtype::F32);
    let module = Module::build(Dialect::Metal, &[kernel]).unwrap();
    let good = [Buffer::from_f32(Dtype::F32, &[1.0], &[1])];
    let half = [Buffer::from_f32(Dtype::F16, &[1.0], &[1])];
    let short = [Buffer { data: vec![0; 4], ..Buffer::from_f32(Dtype::F32, &[1.0; 3], &[3]) }];
    let shapes = [vec![1]];
    let cases: [(&[Buffer], [u32; 3], [u32; 3]); 6] = [
        (&good, [0, 1, 1], [1, 1, 1]),
        (&good, [1, 1, 1], [0, 1, 1]),
        (&good, [1, 1, 1], [1025, 1, 1]),
        (&half, [1, 1, 1], [1, 1, 1]),
        (&short, [1, 1, 1], [1, 1, 1]),
        (&[], [1, 1, 1], [1, 1, 1]),
    ];
    for (inputs, grid, group) in cases {
        let e = module.run(0, &Launch::new(inputs, &shapes, grid, group)).unwrap_err();
        assert!(matches!(&e, Error::Launch { kernel, .. } if kernel == "fit"), "{e}");
    }
    assert!(module.run(0, &Launch::new(&good, &shapes, [1, 1, 1], [1, 1, 1])).is_ok());
    assert!(matches!(
        module.run(1, &Launch::new(&good, &shapes, [1, 1, 1], [1, 1, 1])),
        Err(Error::Launch { .. })
    ));
    for bad in ["", "1x", "a b", "x;y"] {
        let kernel = KernelText::new(bad, "").output("out", Dtype::F32);
        assert!(matches!(Module::build(Dialect::Metal, &[kernel]), Err(Error::Launch { .. })), "{bad:?}");
    }
}

#[test]
fn compile_errors_show_the_line() {
    let good = KernelText::new("good", "out[0] = 1.0f;").output("out", Dtype::F32);
    let bad =
        KernelText::new("bad", "float a = 1.0f;\nfloat b = a +;\nout[0] = b;").output("out", Dtype::F32);
    let Err(Error::Compile { log }) = Module::build(Dialect::Cuda, &[good, bad]) else { panic!("compiled") };
    assert!(log.contains("bad.cu:2:") && log.contains(">    2 | float b = a +;"), "{log}");
    assert!(log.contains("     1 | float a = 1.0f;") && !log.contains("good"), "{log}");
}
