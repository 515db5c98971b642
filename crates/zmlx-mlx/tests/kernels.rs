//! GPU kernels on whatever backend is there, and the library's state.

use zmlx_mlx::kernel::{Launch, Source, Spec, cuda_kernel, metal_kernel};
use zmlx_mlx::runtime::{Backend, backend_available, doctor};
use zmlx_mlx::stream::{Device, Stream, gpu_available};
use zmlx_mlx::{Array, Dtype, Error, Result};

const METAL: &str = "uint i = thread_position_in_grid.x; if (i < x_shape[0]) y[i] = x[i] * 2;";
const CUDA: &str =
    "auto i = cooperative_groups::this_grid().thread_rank(); if (i < x_shape[0]) y[i] = x[i] * 2.0f;";

#[test]
fn a_kernel_runs_or_says_what_it_needs() -> Result<()> {
    for (backend, body) in [(Backend::Metal, METAL), (Backend::Cuda, CUDA)] {
        let source = Source { name: "twice", inputs: &["x"], outputs: &["y"], body, ..Source::default() };
        let made = if backend == Backend::Metal { metal_kernel(&source) } else { cuda_kernel(&source) };
        if !backend_available(backend)? {
            assert!(matches!(made, Err(Error::Unavailable { .. })));
            continue;
        }
        let kernel = made?;
        let x = Array::from_slice(&[1.0f32, 2.0, 3.0], &[3])?;
        let launch = Launch {
            outputs: &[Spec::new(&[3], Dtype::Float32)],
            grid: [3, 1, 1],
            threadgroup: [32, 1, 1],
            template: &[],
            init_value: None,
            verbose: false,
        };
        assert_eq!(kernel.call(&[&x], &launch)?[0].to_vec::<f32>()?, [2.0, 4.0, 6.0]);
        assert!(matches!(kernel.call(&[], &launch), Err(Error::Argument(_))));
        let none = Launch { grid: [0, 1, 1], ..launch };
        assert!(matches!(kernel.call(&[&x], &none), Err(Error::Argument(_))));
    }
    Ok(())
}

#[test]
fn the_doctor_reports_every_backend() -> Result<()> {
    let report = doctor();
    assert_eq!(report.error, None);
    assert_eq!(report.version.as_deref(), Some(zmlx_mlx::locate::MLX_VERSION));
    assert!(report.library.is_some_and(|l| l.is_file()));
    assert_eq!(report.backends.len(), 3);
    for backend in &report.backends {
        assert_eq!(backend.available, backend.missing.is_none(), "{backend:?}");
    }
    assert!(report.backends[0].available, "the CPU is always there");
    if !gpu_available()? {
        assert!(matches!(Stream::new(Device::Gpu), Err(Error::Unavailable { .. })));
    }
    Ok(())
}
