//! What does not compile, with its message at its place. After a change of messages: `TRYBUILD=overwrite cargo test`.

#[test]
fn messages() {
    let t = trybuild::TestCases::new();
    t.pass("tests/ui/pass/*.rs");
    t.compile_fail("tests/ui/fail/*.rs");
}
