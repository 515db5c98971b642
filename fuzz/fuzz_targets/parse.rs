//! No text makes the parser panic, and what it takes prints to a text that gives the same kernel.
#![no_main]

// The function that the stable tests call too.
#[path = "../../crates/zmlx-lang/tests/text/check.rs"]
mod check;

libfuzzer_sys::fuzz_target!(|text: &str| check::every_entry_point(text));
