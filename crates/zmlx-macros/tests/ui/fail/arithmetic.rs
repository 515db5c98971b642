use zmlx_macros::kernel;

#[kernel]
fn overflow(n: u8) -> u8 {
    n + (200 + 100u8)
}

#[kernel]
fn below_zero(n: u32) -> u32 {
    n + (1u32 - 2)
}

#[kernel]
fn by_zero(n: i32) -> i32 {
    n / 0
}

#[kernel]
fn literal(n: i8) -> i8 {
    n + 128
}

#[kernel]
fn shift(n: u8) -> u8 {
    n << 8
}

#[kernel]
fn negative(n: u32) -> u32 {
    -n
}

#[kernel]
fn bits(x: f32) -> f32 {
    x ^ x
}

fn main() {}
