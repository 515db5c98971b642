//! Compiles a translation unit to a shared library, once for each text.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::Error;
use crate::kernel::{Dialect, KernelText};
use crate::source::file_name;

const RUNTIME: &str = include_str!("../simt/runtime.cpp");
const HEADERS: [(&str, &str); 12] = [
    ("abi.h", include_str!("../simt/abi.h")),
    ("context.h", include_str!("../simt/context.h")),
    ("hooks.h", include_str!("../simt/hooks.h")),
    ("world.h", include_str!("../simt/world.h")),
    ("memory.h", include_str!("../simt/memory.h")),
    ("simt.h", include_str!("../simt/simt.h")),
    ("metal_types.h", include_str!("../simt/metal_types.h")),
    ("metal.h", include_str!("../simt/metal.h")),
    ("metal_entry.h", include_str!("../simt/metal_entry.h")),
    ("cuda_types.h", include_str!("../simt/cuda_types.h")),
    ("cuda.h", include_str!("../simt/cuda.h")),
    ("mlx_device.cuh", include_str!("../simt/mlx_device.cuh")),
];
/// Headers that kernel texts include: everything in them is there already.
const EMPTY: [&str; 12] = [
    "metal_stdlib",
    "metal_math",
    "metal_simdgroup",
    "metal_atomic",
    "metal_compute",
    "cuda_fp16.h",
    "cuda_bf16.h",
    "cooperative_groups.h",
    "cooperative_groups/reduce.h",
    "cuda/std/limits",
    "cuda/std/array",
    "cuda/std/type_traits",
];
const FLAGS: [&str; 15] = [
    "-std=c++20",
    // Enough to keep values in registers; the instrumentation runs after it.
    "-O1",
    "-g1",
    "-w",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-exceptions",
    "-fno-rtti",
    // As on GPUs: integers wrap, memory may be seen as another type, and nothing is fused that is not written so.
    "-fwrapv",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fsanitize=thread",
    "-fsanitize=alignment,bounds,integer-divide-by-zero",
    "-fno-omit-frame-pointer",
];

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |source| Error::Io { path: path.to_owned(), source }
}

/// FNV-1a over 128 bits: names of cache files, not a defence against anybody.
fn hash(parts: &[&str]) -> String {
    let mut h: u128 = 0x6c62272e07bb014262b821756295c58d;
    for part in parts {
        for b in part.bytes().chain([0xff]) {
            h = (h ^ u128::from(b)).wrapping_mul(0x0000000001000000000000000000013B);
        }
    }
    format!("{h:032x}")
}

/// `ZMLX_EMULATOR_CACHE`, else `zmlx/emulator` in the user's cache, else in the temporary directory.
pub(crate) fn cache_dir() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = set("ZMLX_EMULATOR_CACHE") {
        return dir;
    }
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|h| h.join(".cache")));
    base.unwrap_or_else(std::env::temp_dir).join("zmlx").join("emulator")
}

/// The compiler: a program and its first arguments, as `CXX` may hold both.
fn compiler() -> (String, Vec<String>) {
    let text = std::env::var("CXX").ok().filter(|v| !v.trim().is_empty()).unwrap_or_else(|| "c++".into());
    let mut words = text.split_whitespace().map(str::to_owned);
    (words.next().unwrap_or_default(), words.collect())
}

fn version() -> Result<String, Error> {
    let (program, first) = compiler();
    match Command::new(&program).args(first).arg("--version").output() {
        Ok(out) if out.status.success() => Ok(format!(
            "{program} {}",
            String::from_utf8_lossy(&out.stdout).lines().next().unwrap_or_default()
        )),
        _ => Err(Error::NoCompiler(program)),
    }
}

/// A file name beside `path` that no other process or thread uses.
fn temporary(path: &Path) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().and_then(OsStr::to_str).unwrap_or("file");
    path.with_file_name(format!(".{}-{n}-{name}", std::process::id()))
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let temp = temporary(path);
    fs::write(&temp, text).map_err(io(&temp))?;
    fs::rename(&temp, path).map_err(io(path))
}

/// Runs the compiler; its messages where it fails.
fn run(arguments: &[&OsStr]) -> Result<Result<(), String>, Error> {
    let (program, first) = compiler();
    let out = Command::new(&program)
        .args(first)
        .args(arguments)
        .output()
        .map_err(|_| Error::NoCompiler(program))?;
    let log = String::from_utf8_lossy(&out.stderr).into_owned();
    Ok(if out.status.success() { Ok(()) } else { Err(log) })
}

/// The headers in a directory named by their content.
fn headers(root: &Path) -> Result<PathBuf, Error> {
    let texts: Vec<&str> = HEADERS.iter().map(|(_, text)| *text).collect();
    let dir = root.join(format!("include-{}", hash(&texts)));
    for sub in [dir.clone(), dir.join("cooperative_groups"), dir.join("cuda").join("std")] {
        fs::create_dir_all(&sub).map_err(io(&sub))?;
    }
    for (name, text) in HEADERS {
        write(&dir.join(name), text)?;
    }
    for name in EMPTY {
        write(&dir.join(name), "#pragma once\n")?;
    }
    Ok(dir)
}

/// The scheduler's object file, compiled once.
fn runtime(root: &Path, include: &Path, version: &str) -> Result<PathBuf, Error> {
    let object = root
        .join(format!("runtime-{}.o", hash(&[RUNTIME, HEADERS[0].1, HEADERS[1].1, HEADERS[2].1, version])));
    if object.exists() {
        return Ok(object);
    }
    let (source, temp) = (temporary(&object.with_extension("cpp")), temporary(&object));
    write(&source, RUNTIME)?;
    let include = format!("-I{}", include.display());
    let arguments: Vec<&OsStr> = ["-std=c++20", "-O2", "-w", "-fPIC", "-fvisibility=hidden", &include, "-c"]
        .into_iter()
        .map(OsStr::new)
        .chain([source.as_os_str(), OsStr::new("-o"), temp.as_os_str()])
        .collect();
    let result = run(&arguments)?;
    fs::remove_file(&source).map_err(io(&source))?;
    result.map_err(|log| Error::Compile { log: format!("the emulator's runtime:\n{log}") })?;
    fs::rename(&temp, &object).map_err(io(&object))?;
    Ok(object)
}

/// The shared library of a translation unit.
pub(crate) fn library(dialect: Dialect, kernels: &[KernelText], unit: &str) -> Result<PathBuf, Error> {
    let root = cache_dir();
    let version = version()?;
    let mut parts = vec![unit, RUNTIME, &version];
    parts.extend(HEADERS.iter().map(|(_, text)| *text).chain(FLAGS));
    let library = root.join(format!("{}.so", hash(&parts)));
    if library.exists() {
        return Ok(library);
    }
    fs::create_dir_all(&root).map_err(io(&root))?;
    let include_dir = headers(&root)?;
    let runtime = runtime(&root, &include_dir, &version)?;
    let source = temporary(&library.with_extension("cpp"));
    let (object, linked) = (source.with_extension("o"), temporary(&library));
    write(&source, unit)?;
    let include = format!("-I{}", include_dir.display());
    let mut arguments: Vec<&OsStr> = FLAGS.iter().map(OsStr::new).collect();
    if dialect == Dialect::Metal {
        // Metal has no double: 0.5 is a float.
        let clang = version.contains("clang");
        arguments.push(OsStr::new(if clang {
            "-cl-single-precision-constant"
        } else {
            "-fsingle-precision-constant"
        }));
    }
    arguments.extend([OsStr::new(&include), OsStr::new("-c"), source.as_os_str()]);
    arguments.extend([OsStr::new("-o"), object.as_os_str()]);
    let compiled = run(&arguments)?;
    fs::remove_file(&source).map_err(io(&source))?;
    compiled.map_err(|log| Error::Compile { log: readable(&log, dialect, kernels) })?;
    // Linked without the sanitizer flags: the runtime's functions stand for the sanitizer's.
    let result = run(&[
        OsStr::new("-shared"),
        object.as_os_str(),
        runtime.as_os_str(),
        OsStr::new("-o"),
        linked.as_os_str(),
        OsStr::new("-lm"),
        OsStr::new("-lpthread"),
    ])?;
    fs::remove_file(&object).map_err(io(&object))?;
    result.map_err(|log| Error::Compile { log })?;
    fs::rename(&linked, &library).map_err(io(&library))?;
    Ok(library)
}

/// The first errors, each followed by the lines of kernel text around it.
pub(crate) fn readable(log: &str, dialect: Dialect, kernels: &[KernelText]) -> String {
    let mut out = String::new();
    let errors =
        log.lines().filter(|l| l.contains("error:") || l.contains("error #") || l.contains(": error"));
    for line in errors.take(6) {
        out += line;
        out.push('\n');
        for kernel in kernels {
            for (header, text) in [(false, &kernel.body), (true, &kernel.header)] {
                if let Some(number) = line_of(line, &file_name(dialect, kernel, header)) {
                    out += &around(text, number);
                }
            }
        }
    }
    if out.is_empty() { log.lines().take(40).map(|l| format!("{l}\n")).collect() } else { out }
}

/// The number in `file:12:` or `file(12):` at the start of a message.
fn line_of(message: &str, file: &str) -> Option<usize> {
    let rest = message.strip_prefix(file)?;
    let rest = rest.strip_prefix([':', '('])?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

fn around(text: &str, number: usize) -> String {
    let first = number.saturating_sub(2).max(1);
    text.lines()
        .enumerate()
        .skip(first - 1)
        .take(number + 3 - first)
        .map(|(i, l)| format!("{} {:4} | {l}\n", if i + 1 == number { ">" } else { " " }, i + 1))
        .collect()
}
