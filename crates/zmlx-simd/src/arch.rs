//! Which instruction set to run on: detected once, or chosen with the `ZMLX_SIMD` environment variable.

use crate::SimdError;
use pulp::Arch;
use std::sync::OnceLock;

/// The environment variable that overrides the detected instruction set.
pub const ISA_VARIABLE: &str = "ZMLX_SIMD";

/// The instruction sets this machine can run, best first, with their names; "scalar" is always the last.
pub fn available() -> Vec<(&'static str, Arch)> {
    let mut list = Vec::new();
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    {
        if let Some(simd) = pulp::x86::V4::try_new() {
            list.push(("avx512", Arch::V4(simd)));
        }
        if let Some(simd) = pulp::x86::V3::try_new() {
            list.push(("avx2", Arch::V3(simd)));
        }
    }
    #[cfg(target_arch = "aarch64")]
    if let Some(simd) = pulp::aarch64::Neon::try_new() {
        list.push(("neon", Arch::Neon(simd)));
    }
    list.push(("scalar", Arch::Scalar));
    list
}

/// The instruction set of this name ("avx512", "avx2", "neon", "scalar").
///
/// # Errors
/// [`SimdError::UnknownIsa`], listing the names that work here, if this machine does not have it.
pub fn arch_named(name: &str) -> Result<Arch, SimdError> {
    let list = available();
    match list.iter().find(|(n, _)| *n == name) {
        Some((_, arch)) => Ok(*arch),
        None => Err(SimdError::UnknownIsa {
            asked: name.to_owned(),
            allowed: list.iter().map(|(n, _)| *n).collect(),
        }),
    }
}

/// What an override (the variable's value, if it is set) selects; an empty value counts as unset.
fn choose(value: Option<&str>) -> Result<Arch, SimdError> {
    match value {
        None | Some("") => Ok(available()[0].1),
        Some(name) => arch_named(name),
    }
}

fn cached() -> &'static Result<Arch, SimdError> {
    static CHOICE: OnceLock<Result<Arch, SimdError>> = OnceLock::new();
    CHOICE.get_or_init(|| {
        let value = std::env::var_os(ISA_VARIABLE).map(|v| v.to_string_lossy().into_owned());
        choose(value.as_deref())
    })
}

/// The instruction set to run on: what `ZMLX_SIMD` names, else the best one detected. Decided once a process.
///
/// # Errors
/// [`SimdError::UnknownIsa`] if `ZMLX_SIMD` names one that this machine does not have.
pub fn try_arch() -> Result<Arch, SimdError> {
    cached().clone()
}

/// [`try_arch`] for callers with no error path. A bad `ZMLX_SIMD` is reported once on standard error, and the best
/// detected set is used; a program should call [`try_arch`] at its start and stop there.
pub fn arch() -> Arch {
    static DETECTED: OnceLock<Arch> = OnceLock::new();
    match cached() {
        Ok(arch) => *arch,
        Err(error) => *DETECTED.get_or_init(|| {
            eprintln!("warning: {ISA_VARIABLE} is ignored: {error}");
            available()[0].1
        }),
    }
}

/// The name of the instruction set [`arch`] gives: "avx512", "avx2", "neon" or "scalar".
pub fn isa_name() -> &'static str {
    match arch() {
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Arch::V4(_) => "avx512",
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        Arch::V3(_) => "avx2",
        #[cfg(target_arch = "aarch64")]
        Arch::Neon(_) => "neon",
        _ => "scalar",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides() {
        assert!(matches!(choose(Some("scalar")), Ok(Arch::Scalar)));
        for (name, arch) in available() {
            let chosen = choose(Some(name)).unwrap();
            assert_eq!(std::mem::discriminant(&chosen), std::mem::discriminant(&arch), "{name}");
        }
        let best = std::mem::discriminant(&available()[0].1);
        assert_eq!(std::mem::discriminant(&choose(None).unwrap()), best);
        assert_eq!(std::mem::discriminant(&choose(Some("")).unwrap()), best);
    }

    #[test]
    fn unknown_names_list_what_works() {
        let error = choose(Some("sse9")).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("\"sse9\"") && text.contains("scalar"), "{text}");
    }
}
