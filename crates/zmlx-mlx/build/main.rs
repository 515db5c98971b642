//! Builds the bridge: a small shared library of C++ over stock libmlx, generated in part from the tables in
//! `bridge/`. It is embedded into the Rust library and loaded at run time, after libmlx itself, so no program that
//! uses this crate needs link flags, an rpath or `LD_LIBRARY_PATH`.

#[path = "../src/locate.rs"]
#[allow(dead_code)] // the running program uses more of it
mod locate;
#[path = "../src/platform.rs"]
#[allow(dead_code)]
mod platform;
mod table;

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

fn main() {
    if let Err(error) = build() {
        // One message, without a backtrace: it says what to do.
        eprintln!("error: {error}");
        println!("cargo::error={error}");
        std::process::exit(1);
    }
}

fn build() -> Result<(), Box<dyn Error>> {
    for variable in [locate::DIR_VARIABLE, locate::VARIANT_VARIABLE, locate::CACHE_VARIABLE] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    for path in ["bridge", "build", "src/locate.rs", "src/platform.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let os = env::var("CARGO_CFG_TARGET_OS")?;
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    if env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|e| e == "musl") {
        return Err(locate::LocateError::UnsupportedPlatform {
            platform: "musl (the wheels are for glibc)".to_owned(),
        }
        .into());
    }
    let located = locate::for_build(&os, &arch, &mut |note| println!("cargo::warning={note}"))?;
    let include = located.include.clone().ok_or("the library was found without headers")?;
    let lib_dir = located.library.parent().ok_or("the library has no parent folder")?.to_path_buf();
    // A library that is gone (cache emptied) must be looked for again.
    println!("cargo::rerun-if-changed={}", located.library.display());
    println!("cargo::rustc-env=ZMLX_BUILD_LIBRARY={}", located.library.display());
    println!("cargo::rustc-env=ZMLX_BUILD_FOUND_BY={}", located.found_by);

    let ops = table::parse(&fs::read_to_string("bridge/ops.table")?, true)?;
    let raw = table::parse(&fs::read_to_string("bridge/raw.table")?, false)?;
    fs::write(out.join("api.h"), table::cpp_header(&ops, &raw))?;
    fs::write(out.join("ops.cpp"), table::cpp_ops(&ops))?;
    fs::write(out.join("api.rs"), table::rust_api(&ops, &raw))?;
    fs::write(out.join("ops.rs"), table::rust_ops(&ops))?;

    compile(&out, &include, &lib_dir, &os)
}

fn compile(out: &Path, include: &Path, lib_dir: &Path, os: &str) -> Result<(), Box<dyn Error>> {
    let platform = platform::Platform::from_os(os);
    let mut build = cc::Build::new();
    if let Some((variable, value)) = platform.deployment_target() {
        println!("cargo::rerun-if-env-changed={variable}");
        if env::var_os(variable).is_none() {
            build.env(variable, value);
        }
    }
    build
        .cpp(true)
        .std("c++20")
        .pic(true)
        .opt_level(2)
        .debug(false)
        .warnings(true)
        .flag("-fvisibility=hidden")
        // Warnings about MLX's own headers are not ours to mend.
        .flag("-isystem")
        .flag(include)
        .include("bridge")
        .include(out);
    let mut sources = vec![out.join("ops.cpp")];
    for name in ["array", "transforms", "kernels", "cpu_primitive", "runtime", "bench", "pool"] {
        sources.push(PathBuf::from(format!("bridge/{name}.cpp")));
    }
    build.files(&sources);
    let objects = build.try_compile_intermediates()?;
    let library = out.join("zmlx_bridge.bin");
    let mut link = build.try_get_compiler()?.to_command();
    link.arg("-shared").arg("-o").arg(&library).args(&objects);
    link.args(platform.bridge_link_arguments(lib_dir));
    let status = link.status()?;
    if status.success() {
        Ok(())
    } else {
        // Not the whole command: its debug form holds the environment, which may hold secrets.
        let arguments: Vec<_> = link.get_args().map(|a| a.to_string_lossy()).collect();
        Err(format!(
            "linking the bridge failed: {} {}",
            link.get_program().to_string_lossy(),
            arguments.join(" ")
        )
        .into())
    }
}
