//! Names and paths: variables, constants of the types, `T::function(...)`.

use syn::{Expr, ExprCall, ExprPath, PathArguments, Result};
use zmlx_lang::{Dtype, Node};

use crate::body::Body;
use crate::env::Meaning;
use crate::value::{Known, Scalar, Table, Type, Value, error, int_range};

/// Rejects generic arguments and qualified types.
pub fn plain(p: &ExprPath) -> Result<()> {
    if p.qself.is_some() {
        return Err(error(p, "qualified paths are not accepted in a kernel"));
    }
    match p.path.segments.iter().find(|s| !matches!(s.arguments, PathArguments::None)) {
        Some(s) => Err(error(s, "generic arguments are not accepted in a kernel")),
        None => Ok(()),
    }
}

impl Body {
    /// A name or a path that stands for a value.
    pub fn path(&mut self, p: &ExprPath) -> Result<Value> {
        plain(p)?;
        let Some(ident) = p.path.get_ident() else { return constant(p).map(Value::Scalar) };
        let name = crate::signature::name(ident);
        match self.env.get(&name) {
            Some(Meaning::Variable { value: Some(v), .. } | Meaning::Constant(v)) => Ok(v.clone()),
            Some(Meaning::Variable { value: None, .. }) => Err(error(
                p,
                format!("{name} may have no value here: not every way to this place assigns it"),
            )),
            Some(Meaning::Closure(_) | Meaning::Function(..)) => {
                Err(error(p, format!("{name} is a function; it can only be called")))
            }
            Some(Meaning::Hidden) | None => Err(error(
                p,
                format!("unknown name {name}: a kernel sees its parameters and what its body declares"),
            )),
        }
    }

    /// `f32::exp(x)`, `f32::from_bits(u)`, `u32::max(a, b)`.
    pub fn associated(&mut self, p: &ExprPath, e: &ExprCall) -> Result<Value> {
        let segments = segments(p);
        let (ty, function) = match segments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["std" | "core", "primitive", ty, function] | [ty, function] => {
                (ty.to_owned(), function.to_owned())
            }
            _ => {
                return Err(error(
                    p,
                    "unknown function; a kernel calls methods, the language's functions and its own",
                ));
            }
        };
        let Some(dtype) = Dtype::from_name(&ty).filter(|d| !matches!(d, Dtype::F16 | Dtype::Bf16)) else {
            let what = "unknown function; a kernel sees the language's functions, those its body declares, and those of \
                        f32, integers and bool";
            return Err(error(p, what));
        };
        if dtype == Dtype::F32 && function == "from_bits" {
            let [arg] = self.scalars::<1>(e, e.args.iter())?;
            return Ok(self.float_of_bits(arg, e)?.into());
        }
        let Some((receiver, args)) =
            e.args.iter().collect::<Vec<_>>().split_first().map(|(r, a)| (*r, a.to_vec()))
        else {
            return Err(error(e, format!("{ty}::{function} needs arguments")));
        };
        let x = self.scalar(receiver)?;
        let x = self.emit.coerce(x, dtype, receiver)?;
        let name = &p.path.segments[p.path.segments.len() - 1].ident;
        Ok(self.method_of(x, name, &args, e)?.into())
    }

    fn float_of_bits(&mut self, bits: Scalar, e: &ExprCall) -> Result<Scalar> {
        let bits = self.emit.coerce(bits, Dtype::U32, e)?;
        if let Some(v) = bits.known_int() {
            return Ok(Scalar::float(f64::from(f32::from_bits(v as u32))));
        }
        let id = self.emit.strong(bits);
        Ok(Scalar::node(Dtype::F32, self.emit.graph.add(Node::Bitcast(Dtype::F32, id))))
    }

    /// The element of an indexed input at computed places.
    pub fn load(
        &mut self,
        table: Table,
        at: Vec<Scalar>,
        bounds: zmlx_lang::Bounds,
        place: &dyn quote::ToTokens,
    ) -> Result<Scalar> {
        if at.len() != table.rank as usize {
            let what = format!("this input has {} axes, {} coordinates are given", table.rank, at.len());
            return Err(error(place, what));
        }
        let mut ids = Vec::new();
        for c in at {
            if !c.ty.is_int() {
                return Err(error(place, format!("a coordinate is an integer, not {}", c.ty.name())));
            }
            let c = self.emit.settle(c, place)?;
            ids.push(self.emit.strong(c));
        }
        let id = self.emit.graph.add(Node::Load { input: table.input, at: ids, bounds });
        // A float table may be stored in any dtype; its elements are f32.
        let id = if table.dtype == Dtype::F32 { self.emit.graph.cast(Dtype::F32, id) } else { id };
        Ok(Scalar::node(table.dtype, id))
    }

    /// Exactly `N` scalar arguments.
    pub fn scalars<'a, const N: usize>(
        &mut self,
        at: &dyn quote::ToTokens,
        args: impl ExactSizeIterator<Item = &'a Expr>,
    ) -> Result<[Scalar; N]> {
        let given = args.len();
        let values = args.map(|a| self.scalar(a)).collect::<Result<Vec<_>>>()?;
        values.try_into().map_err(|_| error(at, format!("expected {N} arguments, {given} are given")))
    }
}

fn segments(p: &ExprPath) -> Vec<String> {
    p.path.segments.iter().map(|s| s.ident.to_string()).collect()
}

/// `f32::INFINITY`, `i32::MAX`, `std::f32::consts::PI`.
fn constant(p: &ExprPath) -> Result<Scalar> {
    let segments = segments(p);
    let path = segments.iter().map(String::as_str).collect::<Vec<_>>();
    let path = match path[..] {
        ["std" | "core", ref rest @ ..] => rest,
        ref all => all,
    };
    let found = match *path {
        ["f32", "consts", name] | ["consts", name] => math_constant(name).map(Scalar::float),
        ["f32", name] => float_constant(name).map(Scalar::float),
        [ty, name] => Dtype::from_name(ty).filter(|d| d.compute().is_int()).and_then(|d| match name {
            "MAX" => Some(Scalar::int(d, int_range(d).1)),
            "MIN" => Some(Scalar::int(d, int_range(d).0)),
            "BITS" => Some(Scalar::known(Type::U32, Known::Int(d.size() as i128 * 8))),
            _ => None,
        }),
        _ => None,
    };
    found.ok_or_else(|| {
        let what = "unknown path; accepted are f32::INFINITY, NEG_INFINITY, NAN, EPSILON, MAX, MIN, MIN_POSITIVE, \
                    f32::consts::*, and MAX, MIN and BITS of integer types";
        error(p, what)
    })
}

fn float_constant(name: &str) -> Option<f64> {
    Some(match name {
        "INFINITY" => f64::INFINITY,
        "NEG_INFINITY" => f64::NEG_INFINITY,
        "NAN" => f64::NAN,
        "EPSILON" => f32::EPSILON.into(),
        "MAX" => f32::MAX.into(),
        "MIN" => f32::MIN.into(),
        "MIN_POSITIVE" => f32::MIN_POSITIVE.into(),
        _ => return None,
    })
}

/// As doubles, which round to the `f32` constants.
fn math_constant(name: &str) -> Option<f64> {
    use std::f64::consts as c;
    Some(match name {
        "PI" => c::PI,
        "TAU" => c::TAU,
        "E" => c::E,
        "SQRT_2" => c::SQRT_2,
        "LN_2" => c::LN_2,
        "LN_10" => c::LN_10,
        "LOG2_E" => c::LOG2_E,
        "LOG2_10" => c::LOG2_10,
        "LOG10_E" => c::LOG10_E,
        "LOG10_2" => c::LOG10_2,
        "FRAC_PI_2" => c::FRAC_PI_2,
        "FRAC_PI_3" => c::FRAC_PI_3,
        "FRAC_PI_4" => c::FRAC_PI_4,
        "FRAC_PI_6" => c::FRAC_PI_6,
        "FRAC_PI_8" => c::FRAC_PI_8,
        "FRAC_1_PI" => c::FRAC_1_PI,
        "FRAC_2_PI" => c::FRAC_2_PI,
        "FRAC_2_SQRT_PI" => c::FRAC_2_SQRT_PI,
        "FRAC_1_SQRT_2" => c::FRAC_1_SQRT_2,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::math_constant;

    #[test]
    fn doubles_round_to_the_f32_constants() {
        use std::f32::consts as c;
        for (name, expected) in [
            ("PI", c::PI),
            ("TAU", c::TAU),
            ("E", c::E),
            ("SQRT_2", c::SQRT_2),
            ("LN_2", c::LN_2),
            ("LN_10", c::LN_10),
            ("LOG2_E", c::LOG2_E),
            ("LOG2_10", c::LOG2_10),
            ("LOG10_E", c::LOG10_E),
            ("LOG10_2", c::LOG10_2),
            ("FRAC_PI_2", c::FRAC_PI_2),
            ("FRAC_PI_3", c::FRAC_PI_3),
            ("FRAC_PI_4", c::FRAC_PI_4),
            ("FRAC_PI_6", c::FRAC_PI_6),
            ("FRAC_PI_8", c::FRAC_PI_8),
            ("FRAC_1_PI", c::FRAC_1_PI),
            ("FRAC_2_PI", c::FRAC_2_PI),
            ("FRAC_2_SQRT_PI", c::FRAC_2_SQRT_PI),
            ("FRAC_1_SQRT_2", c::FRAC_1_SQRT_2),
        ] {
            assert_eq!(math_constant(name).map(|v| v as f32), Some(expected), "{name}");
        }
    }
}
