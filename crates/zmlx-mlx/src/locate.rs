//! Finding, checking and fetching the released `libmlx`.
//!
//! The same file serves the build script (which needs headers and a library to build the bridge) and the
//! running program (which needs a library to load), so both search in the same way and say the same things.
//! It uses the standard library only; unpacking is left to Python's `zipfile`.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::platform::Platform;

/// The MLX release this crate is built for. A C++ ABI is only good for the exact version.
pub const MLX_VERSION: &str = "0.32.4";

/// Environment variable naming a folder that holds `lib/libmlx.so` (or the library itself) and `include/`.
pub const DIR_VARIABLE: &str = "ZMLX_MLX_DIR";
/// Environment variable picking the wheel that a fetch takes: `cpu`, `cuda12`, `cuda13` or `metal`.
pub const VARIANT_VARIABLE: &str = "ZMLX_MLX_VARIANT";
/// Environment variable naming the cache folder; the default is the platform's user cache folder.
pub const CACHE_VARIABLE: &str = "ZMLX_CACHE_DIR";

/// Why no usable `libmlx` was found or fetched. Every message says what to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LocateError {
    /// `ZMLX_MLX_DIR` names a folder without a library in it.
    NoLibraryInDir { dir: PathBuf },
    /// A folder with a library but without the C++ headers that a build needs.
    NoHeaders { dir: PathBuf },
    /// A library of another release.
    WrongVersion { path: PathBuf, found: String },
    /// `ZMLX_MLX_VARIANT` is none of the known ones, or not for this platform.
    UnknownVariant { variant: String, known: &'static str },
    /// This operating system or processor has no released wheel.
    UnsupportedPlatform { platform: String },
    /// `python3` could not be started.
    NoPython { detail: String },
    /// `python3 -m pip` does not work.
    NoPip { detail: String },
    /// pip could not download the wheel.
    Download { package: String, detail: String, offline: bool },
    /// The wheel was downloaded but could not be unpacked or has not the expected content.
    Unpack { package: String, detail: String },
    /// The cache folder can't be written.
    Cache { dir: PathBuf, detail: String },
}

impl fmt::Display for LocateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoLibraryInDir { dir } => write!(
                f,
                "{DIR_VARIABLE}={} holds no libmlx (looked there, in lib/ and in mlx/lib/): point it at the `mlx` folder of an unpacked wheel, or unset it",
                dir.display()
            ),
            Self::NoHeaders { dir } => write!(
                f,
                "{DIR_VARIABLE}={} has libmlx but not the C++ headers that a build needs (include/mlx): point it at the whole `mlx` folder of an unpacked wheel",
                dir.display()
            ),
            Self::WrongVersion { path, found } => write!(
                f,
                "{} is MLX {found}, but this build needs exactly {MLX_VERSION}: point {DIR_VARIABLE} at {MLX_VERSION}, or unset it to have that fetched",
                path.display()
            ),
            Self::UnknownVariant { variant, known } => {
                write!(f, "{VARIANT_VARIABLE}={variant} is not known here: use one of {known}")
            }
            Self::UnsupportedPlatform { platform } => write!(
                f,
                "MLX {MLX_VERSION} has no released library for {platform}: use Linux x86-64 or arm64, or macOS on Apple silicon, or set {DIR_VARIABLE} to a library of your own"
            ),
            Self::NoPython { detail } => write!(
                f,
                "python3 is needed once, to fetch libmlx with pip, and could not be run ({detail}): install Python 3 with pip, or set {DIR_VARIABLE} to an unpacked mlx wheel"
            ),
            Self::NoPip { detail } => write!(
                f,
                "`python3 -m pip` does not work ({detail}): install pip (for example the package python3-pip), or set {DIR_VARIABLE} to an unpacked mlx wheel"
            ),
            Self::Download { package, detail, offline: true } => write!(
                f,
                "pip could not reach a package index to download {package} ({detail}): go online once, or set {DIR_VARIABLE} to an unpacked mlx wheel"
            ),
            Self::Download { package, detail, offline: false } => write!(
                f,
                "pip found no {package} for this platform ({detail}): check the platform and Python version, or set {DIR_VARIABLE} to an unpacked mlx wheel"
            ),
            Self::Unpack { package, detail } => {
                write!(
                    f,
                    "the wheel of {package} could not be unpacked ({detail}): remove it from the cache and try again"
                )
            }
            Self::Cache { dir, detail } => write!(
                f,
                "the cache folder {} cannot be written ({detail}): set {CACHE_VARIABLE} to a folder that can",
                dir.display()
            ),
        }
    }
}

impl std::error::Error for LocateError {}

/// A `libmlx` that was found, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// The library file itself.
    pub library: PathBuf,
    /// The folder of the C++ headers, where there is one.
    pub include: Option<PathBuf>,
    /// How it was found, for people to read.
    pub found_by: String,
}

/// Name of the Python package that carries libmlx for `variant` (the platform's default when `None`).
pub fn package_for(os: &str, variant: Option<&str>) -> Result<&'static str, LocateError> {
    match (os, variant) {
        ("linux", None | Some("cpu")) => Ok("mlx-cpu"),
        ("linux", Some("cuda13")) => Ok("mlx-cuda-13"),
        ("linux", Some("cuda12")) => Ok("mlx-cuda-12"),
        ("macos", None | Some("metal")) => Ok("mlx-metal"),
        ("linux", Some(other)) => {
            Err(LocateError::UnknownVariant { variant: other.to_owned(), known: "cpu, cuda13, cuda12" })
        }
        ("macos", Some(other)) => {
            Err(LocateError::UnknownVariant { variant: other.to_owned(), known: "metal" })
        }
        (other, _) => Err(LocateError::UnsupportedPlatform { platform: other.to_owned() }),
    }
}

/// The cache folder: `ZMLX_CACHE_DIR`, else the platform's ([`Platform::cache_folder`]).
pub fn cache_dir() -> Result<PathBuf, LocateError> {
    let set = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    if let Some(dir) = set(CACHE_VARIABLE) {
        return Ok(dir);
    }
    Platform::HERE.cache_folder(set).ok_or_else(|| LocateError::Cache {
        dir: PathBuf::from("~/.cache/zmlx"),
        detail: "neither HOME nor XDG_CACHE_HOME is set".to_owned(),
    })
}

/// Looks for the library of `os` in `dir`: the file itself, `dir/lib`, `dir/mlx/lib`, `dir`. Gives absolute paths of the
/// library and, where they are, its headers.
pub fn in_dir(os: &str, dir: &Path) -> Option<(PathBuf, Option<PathBuf>)> {
    let dir = fs::canonicalize(dir).ok()?;
    let headers = |include: PathBuf| include.join("mlx/mlx.h").is_file().then_some(include);
    if dir.is_file() {
        let include = dir.parent().and_then(|lib| headers(lib.join("../include")));
        return Some((dir, include));
    }
    for (lib, include) in [("lib", "include"), ("mlx/lib", "mlx/include"), ("", "../include")] {
        let library = dir.join(lib).join(Platform::from_os(os).library_file());
        if library.is_file() {
            return Some((library, headers(dir.join(include))));
        }
    }
    None
}

/// The version that the headers in `include` declare.
pub fn header_version(include: &Path) -> Option<String> {
    let text = fs::read_to_string(include.join("mlx/version.h")).ok()?;
    let part = |name: &str| {
        let line = text.lines().find(|l| l.contains(&format!("#define {name} ")))?;
        line.split_whitespace().nth(2).map(str::to_owned)
    };
    Some(format!(
        "{}.{}.{}",
        part("MLX_VERSION_MAJOR")?,
        part("MLX_VERSION_MINOR")?,
        part("MLX_VERSION_PATCH")?
    ))
}

/// Finds a libmlx with headers for the build: `ZMLX_MLX_DIR`, then an importable Python package, then the cache,
/// then a download. `note` is told about candidates that were passed over.
pub fn for_build(os: &str, arch: &str, note: &mut dyn FnMut(String)) -> Result<Located, LocateError> {
    if let Some(dir) = env::var_os(DIR_VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from) {
        let (library, include) = match in_dir(os, &dir) {
            Some((library, Some(include))) => (library, include),
            Some((_, None)) => return Err(LocateError::NoHeaders { dir }),
            None => return Err(LocateError::NoLibraryInDir { dir }),
        };
        check_headers(&library, &include)?;
        return Ok(Located { library, include: Some(include), found_by: DIR_VARIABLE.to_owned() });
    }
    let variant = env::var(VARIANT_VARIABLE).ok().filter(|v| !v.is_empty());
    let package = package_for(os, variant.as_deref())?;
    // A build for another system can't use the packages of the Python found here.
    if variant.is_none() && os == env::consts::OS && arch == env::consts::ARCH {
        for dir in python_packages() {
            match in_dir(os, &dir) {
                Some((library, Some(include))) => match check_headers(&library, &include) {
                    Ok(()) => {
                        let found_by = "the mlx package of python3".to_owned();
                        return Ok(Located { library, include: Some(include), found_by });
                    }
                    Err(why) => note(format!("passed over {}: {why}", dir.display())),
                },
                _ => note(format!("passed over {}: it has no libmlx with headers", dir.display())),
            }
        }
    }
    fetch(os, arch, package)
}

fn check_headers(library: &Path, include: &Path) -> Result<(), LocateError> {
    match header_version(include) {
        Some(v) if v == MLX_VERSION => Ok(()),
        Some(found) => Err(LocateError::WrongVersion { path: library.to_path_buf(), found }),
        None => Err(LocateError::WrongVersion {
            path: library.to_path_buf(),
            found: "of unknown version".to_owned(),
        }),
    }
}

/// Folders of an `mlx` package that `python3` can import (none when there is no python3).
fn python_packages() -> Vec<PathBuf> {
    let script = "import importlib.util as u\ns = u.find_spec('mlx')\nprint('\\n'.join(s.submodule_search_locations or []) if s else '')";
    match Command::new("python3").args(["-c", script]).output() {
        Ok(out) if out.status.success() => String::from_utf8_lossy(&out.stdout)
            .lines()
            .filter(|l| !l.is_empty())
            .map(PathBuf::from)
            .collect(),
        _ => Vec::new(),
    }
}

/// The wheel in the cache folder, downloaded and unpacked there by pip when it is not there yet.
///
/// Nothing is installed and no virtual environment is made. The folder appears under its final name only when
/// complete, so concurrent builds and interrupted downloads do no harm.
pub fn fetch(os: &str, arch: &str, package: &'static str) -> Result<Located, LocateError> {
    let root = cache_dir()?.join("mlx");
    let folder = root.join(format!("{MLX_VERSION}-{package}-{os}-{arch}"));
    let found_by = format!("the {package} {MLX_VERSION} wheel in the cache");
    // The whole of it, of the right version; anything else is made anew.
    let complete = || match in_dir(os, &folder) {
        Some((library, Some(include))) if check_headers(&library, &include).is_ok() => {
            Some(Located { library, include: Some(include), found_by: found_by.clone() })
        }
        _ => None,
    };
    if let Some(located) = complete() {
        return Ok(located);
    }
    let cache_error = |e: std::io::Error| LocateError::Cache { dir: root.clone(), detail: e.to_string() };
    static FETCHES: AtomicUsize = AtomicUsize::new(0);
    let number = FETCHES.fetch_add(1, Ordering::Relaxed);
    let staging = root.join(format!(".fetch-{package}-{}-{number}", std::process::id()));
    fs::create_dir_all(staging.join("wheel")).map_err(cache_error)?;
    let done = fetch_into(&staging, os, arch, package).and_then(|()| {
        // Another process may have been quicker: its copy is as good. What is there and not complete is in the way.
        if complete().is_none() && folder.exists() {
            fs::remove_dir_all(&folder).map_err(cache_error)?;
        }
        match fs::rename(staging.join("unpacked"), &folder) {
            Err(e) if complete().is_none() => Err(cache_error(e)),
            _ => Ok(()),
        }
    });
    // What is left in the staging folder is of no use to anybody, also after a failure.
    let _ = fs::remove_dir_all(&staging);
    done?;
    complete().ok_or_else(|| LocateError::Unpack {
        package: package.to_owned(),
        detail: format!("{} holds no libmlx {MLX_VERSION} with headers", folder.display()),
    })
}

fn fetch_into(staging: &Path, os: &str, arch: &str, package: &str) -> Result<(), LocateError> {
    let python = |args: &[&OsStr]| Command::new("python3").args(args).output();
    let pip = python(&["-m".as_ref(), "pip".as_ref(), "--version".as_ref()])
        .map_err(|e| LocateError::NoPython { detail: e.to_string() })?;
    if !pip.status.success() {
        return Err(LocateError::NoPip { detail: last_line(&pip.stderr) });
    }
    let requirement = format!("{package}=={MLX_VERSION}");
    let wheel_dir = staging.join("wheel");
    let mut args: Vec<&OsStr> =
        ["-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q", "-d"]
            .into_iter()
            .map(OsStr::new)
            .collect();
    args.push(wheel_dir.as_os_str());
    // pip picks by the platform it runs on, unless the build is for another one.
    let platform = Platform::from_os(os)
        .wheel_tag(arch)
        .ok_or_else(|| LocateError::UnsupportedPlatform { platform: format!("{os} on {arch}") })?;
    if (os, arch) != (env::consts::OS, env::consts::ARCH) {
        let cross = ["--only-binary=:all:", "--python-version", "3.12", "--platform", platform];
        args.extend(cross.into_iter().map(OsStr::new));
    }
    args.push(requirement.as_ref());
    let out = python(&args).map_err(|e| LocateError::NoPython { detail: e.to_string() })?;
    if !out.status.success() {
        let text = String::from_utf8_lossy(&out.stderr);
        let unreachable = [
            "NewConnectionError",
            "Temporary failure",
            "Max retries",
            "Connection",
            "timed out",
            "ProxyError",
        ];
        let offline = unreachable.iter().any(|w| text.contains(w));
        return Err(LocateError::Download { package: requirement, detail: last_line(&out.stderr), offline });
    }
    let unpack_error = |detail: String| LocateError::Unpack { package: requirement.clone(), detail };
    let wheel = fs::read_dir(&wheel_dir)
        .map_err(|e| unpack_error(e.to_string()))?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .find(|p| p.extension() == Some(OsStr::new("whl")))
        .ok_or_else(|| unpack_error("pip downloaded no .whl file".to_owned()))?;
    let out = python(&[
        "-m".as_ref(),
        "zipfile".as_ref(),
        "-e".as_ref(),
        wheel.as_os_str(),
        staging.join("unpacked").as_os_str(),
    ])
    .map_err(|e| LocateError::NoPython { detail: e.to_string() })?;
    if out.status.success() { Ok(()) } else { Err(unpack_error(last_line(&out.stderr))) }
}

fn last_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let line = text.lines().map(str::trim).rfind(|l| !l.is_empty() && !l.starts_with("[notice]"));
    line.unwrap_or("no message").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with empty files of these names.
    fn folder(files: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for file in files {
            let path = folder.path().join(file);
            fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
            fs::write(path, "").expect("a file");
        }
        folder
    }

    #[test]
    fn libraries_are_found_in_the_layout_of_wheels() {
        // `pip install mlx` on a Mac unpacks the wheels mlx and mlx-metal into one folder of site-packages.
        let mac =
            folder(&["mlx/core.so", "mlx/lib/libmlx.dylib", "mlx/lib/mlx.metallib", "mlx/include/mlx/mlx.h"]);
        let linux = folder(&["mlx/lib/libmlx.so", "mlx/include/mlx/mlx.h"]);
        for (os, folder, file) in [("macos", &mac, "libmlx.dylib"), ("linux", &linux, "libmlx.so")] {
            let base = fs::canonicalize(folder.path()).expect("a path");
            let library = base.join("mlx/lib").join(file);
            // site-packages itself, as the cache's folders are; the package `mlx`; its `lib`; the file.
            for dir in ["", "mlx", "mlx/lib"] {
                let (found, include) = in_dir(os, &base.join(dir)).expect(dir);
                assert_eq!(found, library, "{os} {dir:?}");
                assert!(include.is_some_and(|i| i.join("mlx/mlx.h").is_file()), "{os} {dir:?}");
            }
            assert_eq!(in_dir(os, &library).map(|(found, _)| found), Some(library), "{os}");
        }
        assert_eq!(in_dir("macos", linux.path()), None);
        assert_eq!(in_dir("linux", mac.path()), None);
        let metallib = in_dir("macos", mac.path()).and_then(|(found, _)| Platform::MacOs.metallib(&found));
        assert!(metallib.is_some_and(|path| path.is_file()));
    }

    #[test]
    fn each_platform_has_its_packages() {
        for (os, variant, package) in [
            ("linux", None, Some("mlx-cpu")),
            ("linux", Some("cuda13"), Some("mlx-cuda-13")),
            ("linux", Some("metal"), None),
            ("macos", None, Some("mlx-metal")),
            ("macos", Some("metal"), Some("mlx-metal")),
            ("macos", Some("cpu"), None),
            ("freebsd", None, None),
        ] {
            assert_eq!(package_for(os, variant).ok(), package, "{os} {variant:?}");
        }
    }
}
