//! Images of `[N, H, W, C]`.

use zmlx_lang::Dtype;
use zmlx_mlx::Array;

use super::case::{Case, Input};
use super::entry::{Domain, Entry};
use super::{argument, kernel};
use crate::Result;

type Mlx<T> = zmlx_mlx::Result<T>;

const BILINEAR: &str = "resize_bilinear(x: array[4], height: scalar i32, width: scalar i32) =
  let y = (f32(index(2)) + 0.5) * (f32(height) / f32(len(2))) - 0.5;
  let z = (f32(index(1)) + 0.5) * (f32(width) / f32(len(1))) - 0.5;
  let i = i32(floor(y));
  let j = i32(floor(z));
  let v = y - floor(y);
  let w = z - floor(z);
  let top = lerp(x[index(3), i, j, index(0); clamp], x[index(3), i, j + 1, index(0); clamp], w);
  let bottom = lerp(x[index(3), i + 1, j, index(0); clamp], x[index(3), i + 1, j + 1, index(0); clamp], w);
  lerp(top, bottom, v)";

const NEAREST: &str = "resize_nearest(x: array[4], height: scalar i32, width: scalar i32) =
  let i = (2 * index(2) + 1) * height // (2 * len(2));
  let j = (2 * index(1) + 1) * width // (2 * len(1));
  x[index(3), i, j, index(0); clamp]";

/// The text of a depthwise convolution with a `k` by `k` window, `k` odd.
fn convolution(k: usize) -> String {
    let place = |axis: usize, by: usize| match by as i64 - k as i64 / 2 {
        0 => format!("index({axis})"),
        d if d < 0 => format!("index({axis}) - {}", -d),
        d => format!("index({axis}) + {d}"),
    };
    let term = |i: usize, j: usize| {
        let (y, z) = (place(2, i), place(1, j));
        format!("x[index(3), {y}, {z}, index(0); zero] * weight[{i}, {j}, index(0)]")
    };
    let terms: Vec<String> = (0..k * k).map(|n| term(n / k, n % k)).collect();
    format!("depthwise_conv_{k}x{k}(x: array[4], weight: array[3]) =\n  {}", terms.join("\n  + "))
}

/// Windows that have a kernel.
const WINDOWS: [usize; 3] = [3, 5, 7];

pub(super) fn entries() -> Vec<Entry> {
    let image = Domain::Image;
    let mut all = vec![
        Entry::text(image, BILINEAR, "interpolated between the four nearest", resize_cases, |a, s| {
            Ok(vec![resize_mlx(a, s, true)?])
        })
        .notes("Half-pixel centres, edges repeated."),
        Entry::text(image, NEAREST, "the nearest element", resize_cases, |a, s| {
            Ok(vec![resize_mlx(a, s, false)?])
        })
        .notes("Half-pixel centres, in integers."),
    ];
    for k in WINDOWS {
        let cases = move || {
            let one = |n: i32, h: i32, w: i32, c: i32| {
                let k = k as i32;
                let inputs = vec![Input::random(&[n, h, w, c], 2.0, 1), Input::random(&[k, k, c], 1.0, 2)];
                Case::new(format!("{n} of {h} x {w} x {c}"), inputs).domain(&[n, h, w, c]).slack(2.0)
            };
            vec![one(1, 1, 1, 1), one(2, 5, 4, 3), one(1, 9, 13, 5), one(0, 3, 3, 2).alone()]
        };
        let entry = Entry::text(
            image,
            convolution(k),
            "sum over the window of x weight, channel by channel",
            cases,
            move |a, _| {
                let channels = a[0].dim(3)?;
                let weight = a[1].transpose(&[2, 0, 1])?.expand_dims(&[3])?;
                Ok(vec![a[0].conv2d(&weight, 1, k as i32 / 2, 1, channels)?])
            },
        );
        all.push(entry.notes("Padded with zeros, stride 1. Weight [K, K, C]."));
    }
    all
}

fn resize_cases() -> Vec<Case> {
    let one = |n: i32, h: i32, w: i32, c: i32, to: [i32; 2]| {
        let size = |v: i32| Input::int(Dtype::I32, i64::from(v));
        let inputs = vec![Input::random(&[n, h, w, c], 2.0, 1), size(h), size(w)];
        Case::new(format!("{h} x {w} to {to:?}"), inputs).domain(&[n, to[0], to[1], c])
    };
    vec![
        one(1, 2, 3, 1, [3, 4]),
        one(2, 5, 7, 3, [10, 14]),
        one(1, 9, 8, 2, [4, 3]),
        one(1, 4, 4, 1, [4, 4]),
        one(1, 1, 1, 5, [3, 2]),
        one(0, 2, 2, 1, [4, 4]).alone(),
    ]
}

/// For each place of an axis, the two it lies between and the second's part.
fn neighbours(from: i32, to: i32, smooth: bool) -> (Vec<i32>, Vec<i32>, Vec<f32>) {
    let last = (from - 1).max(0);
    let mut all = (Vec::new(), Vec::new(), Vec::new());
    for o in 0..to {
        let exact = (f64::from(o) + 0.5) * f64::from(from) / f64::from(to) - if smooth { 0.5 } else { 0.0 };
        let low = exact.floor() as i32;
        all.0.push(low.clamp(0, last));
        all.1.push((low + 1).clamp(0, last));
        all.2.push(if smooth { (exact - exact.floor()) as f32 } else { 0.0 });
    }
    all
}

fn resize_mlx(a: &[Array], setting: &super::Setting, smooth: bool) -> Mlx<Array> {
    let to = setting.domain.clone().unwrap_or_default();
    let mut x = a[0].clone();
    for axis in [1, 2] {
        let (low, high, part) = neighbours(x.dim(axis)?, to[axis as usize], smooth);
        let n = to[axis as usize];
        let places = |p: &[i32]| Array::from_slice(p, &[n]);
        let (low, high) = (x.take(&places(&low)?, axis)?, x.take(&places(&high)?, axis)?);
        let mut shape = [1; 4];
        shape[axis as usize] = n;
        let part = Array::from_slice(&part, &shape)?;
        x = low.add(&high.subtract(&low)?.multiply(&part)?)?;
    }
    Ok(x)
}

fn resized(name: &str, x: &Array, size: (i32, i32)) -> Result<Array> {
    let &[n, h, w, c] = x.shape() else {
        return Err(argument(name, format!("x has shape {:?}, not [N, H, W, C]", x.shape())));
    };
    if size.0 < 1 || size.1 < 1 || h < 1 || w < 1 {
        return Err(argument(name, format!("can't resize {h} x {w} to {} x {}", size.0, size.1)));
    }
    let call = kernel(name)?.bind(&[x]).scalar("height", h).scalar("width", w);
    call.domain(&[n, size.0, size.1, c]).run1()
}

/// `x` (`[N, H, W, C]`) at another size `(height, width)`, interpolated between the four nearest elements; half-pixel
/// centres, edges repeated. Keeps the float dtype.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when `x` has not four axes, or for sizes below 1.
pub fn resize_bilinear(x: &Array, size: (i32, i32)) -> Result<Array> {
    resized("resize_bilinear", x, size)
}

/// `x` (`[N, H, W, C]`) at another size `(height, width)`, of the nearest elements; half-pixel centres.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when `x` has not four axes, or for sizes below 1.
pub fn resize_nearest(x: &Array, size: (i32, i32)) -> Result<Array> {
    resized("resize_nearest", x, size)
}

/// Each channel of `x` (`[N, H, W, C]`) convolved with its own window of `weight` (`[K, K, C]`, K of 3, 5 or 7), padded
/// with zeros, stride 1: the same shape.
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) when shapes do not fit, or for another window.
pub fn depthwise_conv(x: &Array, weight: &Array) -> Result<Array> {
    let name = "depthwise_conv_3x3";
    let (&[_, _, _, c], &[k, l, d]) = (x.shape(), weight.shape()) else {
        let what = format!(
            "x has shape {:?}, weight {:?}; expected [N, H, W, C] and [K, K, C]",
            x.shape(),
            weight.shape()
        );
        return Err(argument(name, what));
    };
    if k != l || c != d || !WINDOWS.iter().any(|w| *w as i32 == k) {
        return Err(argument(
            name,
            format!("a weight of [{k}, {l}, {d}] does not fit {c} channels, K of 3, 5 or 7"),
        ));
    }
    kernel(&format!("depthwise_conv_{k}x{k}"))?.bind(&[x, weight]).domain(x.shape()).run1()
}
