use zmlx_macros::kernel;

#[kernel(fast)]
fn unknown_option(x: f32) -> f32 {
    x
}

#[kernel(name = "not a name")]
fn bad_name(x: f32) -> f32 {
    x
}

#[kernel(crate = super::runtime)]
fn relative(x: f32) -> f32 {
    x
}

#[kernel]
fn unknown_role(#[column] x: f32) -> f32 {
    x
}

#[kernel]
fn default_of_other_type(x: f32, #[scalar = 1] eps: f32) -> f32 {
    x + eps
}

#[kernel]
fn default_of_data(x: f32, #[scalar = x] eps: f32) -> f32 {
    x + eps
}

#[kernel]
fn two_roles(#[row] #[scalar] x: f32) -> f32 {
    x
}

fn main() {}
