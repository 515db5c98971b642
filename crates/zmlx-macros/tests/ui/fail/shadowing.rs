use zmlx_macros::kernel;

#[kernel]
fn shadowed_function(x: f32) -> f32 {
    let exp = x + 1.0;
    exp(x)
}

#[kernel]
fn out_of_scope(x: f32) -> f32 {
    {
        let inner = x;
    }
    inner
}

#[kernel]
fn loop_variable(x: f32) -> f32 {
    for i in 0..2 {}
    x * i as f32
}

#[kernel]
fn function_sees_no_variables(x: f32) -> f32 {
    fn f(v: f32) -> f32 { v + x }
    f(x)
}

#[kernel]
fn closure_as_value(x: f32) -> f32 {
    let f = |v| v;
    x + f
}

fn main() {}
