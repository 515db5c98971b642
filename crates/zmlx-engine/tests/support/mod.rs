//! Running tests once more on the path of processors that have none of their own.

use std::process::Command;

/// The variable and value that rule out everything but portable code.
pub const PORTABLE: (&str, &str) = ("ZMLX_SIMD", "scalar");

/// Whether this process runs on the portable path.
pub fn is_portable() -> bool {
    zmlx_simd::isa_name() == PORTABLE.1
}

/// This test program in a process of its own on the portable path, with these arguments; gives what it printed.
pub fn portable(arguments: &[&str]) -> String {
    let program = std::env::current_exe().expect("the test program has a path");
    let output = Command::new(program).args(arguments).env(PORTABLE.0, PORTABLE.1).output();
    let output = output.expect("the test program starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let printed = text(&output.stdout);
    assert!(output.status.success(), "on the portable path:\n{printed}\n{}", text(&output.stderr));
    printed
}

/// All tests of this program but the one named `this`, on the portable path.
#[allow(dead_code)] // Not every test program that shares this file wants it.
pub fn all_again(this: &str) {
    if is_portable() {
        return;
    }
    let printed = portable(&["--skip", this]);
    let passed = printed.lines().filter(|line| line.starts_with("test ") && line.ends_with("ok")).count();
    assert!(passed > 2, "nothing was tested:\n{printed}");
}
