use zmlx_macros::kernel;

#[kernel]
fn structure(x: f32) -> f32 {
    struct S;
    x
}

#[kernel]
fn constant_of_data(x: f32) -> f32 {
    const C: f32 = sigmoid(1.0);
    x + C
}

#[kernel]
fn generic_helper(x: f32) -> f32 {
    fn f<T>(v: T) -> T { v }
    f(x)
}

#[kernel]
fn turbofish(x: f32) -> f32 {
    x.max::<f32>(1.0)
}

fn main() {}
