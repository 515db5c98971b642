//! What differs between Linux and macOS. Nothing here looks at the machine: each function takes the platform, so both
//! cases are tested on either. The build script uses this file too, for the system that it builds for.
//!
//! The few system calls that only one of the systems has are where they are used: the bridge's anonymous file on Linux
//! (`bridge_file.rs`) and the programs that describe a Mac (`mac.rs`). No thread's priority is set on either: MLX starts
//! its own threads, and those of CPU kernels are as wanted by the program that runs them.

use std::path::{Path, PathBuf};

/// An operating system that MLX is released for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Platform {
    /// Linux with glibc.
    Linux,
    /// macOS on Apple silicon.
    MacOs,
}

use Platform::{Linux, MacOs};

/// The oldest macOS that the released library runs on (its wheel's tag is `macosx_14_0_arm64`).
pub const OLDEST_MACOS: &str = "14.0";

impl Platform {
    /// The one that this was compiled for. Any other Unix is taken for Linux, until no wheel is found for it.
    pub const HERE: Self = if cfg!(target_os = "macos") { MacOs } else { Linux };

    /// By Rust's name of the operating system, as in `CARGO_CFG_TARGET_OS`.
    pub fn from_os(os: &str) -> Self {
        if os == "macos" { MacOs } else { Linux }
    }

    /// File name of MLX's library.
    pub fn library_file(self) -> &'static str {
        match self {
            Linux => "libmlx.so",
            MacOs => "libmlx.dylib",
        }
    }

    /// File name of the bridge, where it has to be a file.
    pub fn bridge_file(self) -> &'static str {
        match self {
            Linux => "zmlx_bridge.so",
            MacOs => "zmlx_bridge.dylib",
        }
    }

    /// The environment variable with the folders where the system's loader looks first.
    pub fn library_path_variable(self) -> &'static str {
        match self {
            Linux => "LD_LIBRARY_PATH",
            MacOs => "DYLD_LIBRARY_PATH",
        }
    }

    /// Arguments that link the bridge, for a compiler of the GCC or Clang kind. `lib_dir` holds libmlx.
    ///
    /// No rpath on either: the program opens libmlx by its path, then the bridge, which must take that very libmlx.
    /// On Linux it names libmlx by its soname, which the loader knows by then. On macOS an install name with `@rpath`
    /// would be searched for on disk and could be another installation's, so symbols are looked up among all that is
    /// loaded. `tools/check-macos` sees to it that each of them exists.
    pub fn bridge_link_arguments(self, lib_dir: &Path) -> Vec<String> {
        let words: &[&str] = match self {
            Linux => &["-lmlx", "-Wl,--no-undefined,--allow-shlib-undefined,--strip-all,-z,now"],
            // Else the path of the build would be the library's name.
            MacOs => &["-Wl,-undefined,dynamic_lookup", "-Wl,-install_name,@rpath/zmlx_bridge.dylib"],
        };
        let folder = (self == Linux).then(|| format!("-L{}", lib_dir.display()));
        folder.into_iter().chain(words.iter().map(ToString::to_string)).collect()
    }

    /// The variable that tells compilers the oldest system to build for, and its value where the user sets none. Rust's
    /// own default is older, and MLX's headers use parts of C++ that came later.
    pub fn deployment_target(self) -> Option<(&'static str, &'static str)> {
        (self == MacOs).then_some(("MACOSX_DEPLOYMENT_TARGET", OLDEST_MACOS))
    }

    /// Whether libmlx's symbols must be open to all that is loaded later, as the bridge's look-up on macOS needs.
    pub fn opens_symbols_to_all(self) -> bool {
        self == MacOs
    }

    /// Where MLX looks for its compiled Metal kernels, given the library file; none on Linux, whose libraries hold all.
    pub fn metallib(self, library: &Path) -> Option<PathBuf> {
        (self == MacOs).then(|| library.with_file_name("mlx.metallib"))
    }

    /// The tag of the wheel that pip is asked for when it does not run on that platform. `None` if MLX has no release.
    pub fn wheel_tag(self, arch: &str) -> Option<&'static str> {
        match (self, arch) {
            (Linux, "x86_64") => Some("manylinux_2_35_x86_64"),
            (Linux, "aarch64") => Some("manylinux_2_35_aarch64"),
            (MacOs, "aarch64") => Some("macosx_14_0_arm64"),
            _ => None,
        }
    }

    /// The user's folder for what can be made anew: `$XDG_CACHE_HOME/zmlx`, else `~/.cache/zmlx` or
    /// `~/Library/Caches/zmlx`. `variable` gives environment variables that are set. `None` without a home.
    pub fn cache_folder(self, variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
        let home = || {
            Some(variable("HOME")?.join(match self {
                Linux => ".cache",
                MacOs => "Library/Caches",
            }))
        };
        Some(variable("XDG_CACHE_HOME").or_else(home)?.join("zmlx"))
    }

    /// The user's folder for what should be kept: `$XDG_DATA_HOME/zmlx`, else `~/.local/share/zmlx`; on macOS always
    /// `~/Library/Application Support/zmlx`.
    pub fn data_folder(self, variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
        let base = match self {
            Linux => {
                variable("XDG_DATA_HOME").or_else(|| Some(variable("HOME")?.join(".local").join("share")))
            }
            MacOs => Some(variable("HOME")?.join("Library").join("Application Support")),
        };
        Some(base?.join("zmlx"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for (os, platform, library, variable, tag) in [
            ("linux", Linux, "libmlx.so", "LD_LIBRARY_PATH", Some("manylinux_2_35_aarch64")),
            ("macos", MacOs, "libmlx.dylib", "DYLD_LIBRARY_PATH", Some("macosx_14_0_arm64")),
        ] {
            assert_eq!(Platform::from_os(os), platform, "{os}");
            assert_eq!(platform.library_file(), library, "{os}");
            assert_eq!(platform.library_path_variable(), variable, "{os}");
            assert_eq!(platform.wheel_tag("aarch64"), tag, "{os}");
            assert_eq!(platform.wheel_tag("riscv64"), None, "{os}");
        }
        assert_eq!(Linux.deployment_target(), None);
        assert_eq!(MacOs.deployment_target(), Some(("MACOSX_DEPLOYMENT_TARGET", "14.0")));
        // The program's own is in the workspace's configuration, which can't read a constant.
        let cargo = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../.cargo/config.toml"));
        let line = format!("MACOSX_DEPLOYMENT_TARGET = \"{OLDEST_MACOS}\"");
        assert!(cargo.is_ok_and(|text| text.lines().any(|l| l == line)), "no {line}");
        assert_eq!(Linux.wheel_tag("x86_64"), Some("manylinux_2_35_x86_64"));
        assert_eq!(MacOs.wheel_tag("x86_64"), None, "MLX has no release for Intel");
        assert_eq!(Platform::HERE, Platform::from_os(std::env::consts::OS));
    }

    #[test]
    fn the_bridge_names_no_path_on_macos() {
        let arguments = MacOs.bridge_link_arguments(Path::new("/wheel/mlx/lib"));
        assert!(arguments.iter().all(|a| !a.contains("/wheel")), "{arguments:?}");
        assert!(arguments.iter().any(|a| a == "-Wl,-install_name,@rpath/zmlx_bridge.dylib"), "{arguments:?}");
        assert!(arguments.iter().any(|a| a == "-Wl,-undefined,dynamic_lookup"), "{arguments:?}");
        assert!(MacOs.opens_symbols_to_all(), "the look-up needs it");
        let arguments = Linux.bridge_link_arguments(Path::new("/wheel/mlx/lib"));
        assert_eq!(arguments[..2], ["-L/wheel/mlx/lib", "-lmlx"]);
        assert!(!arguments.iter().any(|a| a.contains("rpath")), "{arguments:?}");
        assert!(!Linux.opens_symbols_to_all());
    }

    #[test]
    fn the_metallib_lies_beside_the_library() {
        let library = Path::new("/x/site-packages/mlx/lib/libmlx.dylib");
        let metallib = PathBuf::from("/x/site-packages/mlx/lib/mlx.metallib");
        assert_eq!(MacOs.metallib(library), Some(metallib));
        assert_eq!(Linux.metallib(Path::new("/x/mlx/lib/libmlx.so")), None);
    }

    #[test]
    fn folders() {
        let home: &[(&str, &str)] = &[("HOME", "/h")];
        let xdg: &[(&str, &str)] = &[("HOME", "/h"), ("XDG_CACHE_HOME", "/c"), ("XDG_DATA_HOME", "/d")];
        let cases = [
            (Linux, home, Some("/h/.cache/zmlx"), Some("/h/.local/share/zmlx")),
            (Linux, xdg, Some("/c/zmlx"), Some("/d/zmlx")),
            (MacOs, home, Some("/h/Library/Caches/zmlx"), Some("/h/Library/Application Support/zmlx")),
            (MacOs, xdg, Some("/c/zmlx"), Some("/h/Library/Application Support/zmlx")),
            (MacOs, &[][..], None, None),
        ];
        for (platform, set, cache, data) in cases {
            let variable = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, v)| PathBuf::from(v));
            assert_eq!(platform.cache_folder(variable), cache.map(PathBuf::from), "{platform:?} {set:?}");
            assert_eq!(platform.data_folder(variable), data.map(PathBuf::from), "{platform:?} {set:?}");
        }
    }
}
