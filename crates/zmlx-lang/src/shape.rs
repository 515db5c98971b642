//! Shapes of a call: the domain that a kernel runs over, how inputs broadcast into it, and its outputs' shapes.

use crate::error::{LangError, Result};
use crate::kernel::Role;
use crate::program::{Program, ProgramInput, ProgramOutput};

/// The places a kernel runs over. The last axis is the row.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Domain {
    /// Axes, outermost first; empty for a 0-d domain, which is one row of one element.
    pub shape: Vec<usize>,
    /// Product of all axes but the last.
    pub rows: usize,
    /// Length of the last axis.
    pub cols: usize,
}

impl Domain {
    /// The domain of a shape, unless it has more elements than can be counted.
    pub fn new(shape: &[usize]) -> Option<Self> {
        let (cols, outer) = shape.split_last().map_or((1, &[][..]), |(last, outer)| (*last, outer));
        let rows = outer.iter().try_fold(1usize, |n, d| n.checked_mul(*d))?;
        rows.checked_mul(cols)?;
        Some(Self { shape: shape.to_vec(), rows, cols })
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The domain of a call with inputs of these shapes: `given` if there is one, else the numpy broadcast of the element
/// and row inputs' shapes.
///
/// # Errors
/// [`LangError::Shape`] naming the input when shapes do not broadcast (to each other, or to `given`), when the last
/// axis of a row input is not 1, when a scalar has more than one element, when an indexed input has another rank than
/// declared, and when nothing decides the domain.
pub fn domain(program: &Program, shapes: &[Vec<usize>], given: Option<&[usize]>) -> Result<Domain> {
    let error = |what: String| LangError::Shape { kernel: program.name.clone(), what };
    if shapes.len() != program.inputs.len() {
        return Err(error(format!("it takes {} inputs, got {}", program.inputs.len(), shapes.len())));
    }
    let mut shape: Option<Vec<usize>> = given.map(<[usize]>::to_vec);
    // Who made the broadcast shape what it is, for the message.
    let mut seen: Vec<String> = Vec::new();
    for (input, found) in program.inputs.iter().zip(shapes) {
        check_role(input, found).map_err(error)?;
        if !matches!(input.role, Role::Element | Role::Row) {
            continue;
        }
        let met = match (&shape, given) {
            (None, _) => Some(found.clone()),
            (Some(s), Some(_)) => broadcasts_to(found, s).then(|| s.clone()),
            (Some(s), None) => broadcast(s, found),
        };
        let Some(met) = met else {
            let others = match given {
                Some(to) => format!("the given domain {to:?}"),
                None => seen.join(", "),
            };
            return Err(error(format!(
                "input {} of shape {found:?} does not broadcast with {others}",
                input.name
            )));
        };
        shape = Some(met);
        seen.push(format!("{} {found:?}", input.name));
    }
    let shape =
        shape.ok_or_else(|| error("no element or row input decides its domain; give a shape".to_owned()))?;
    Domain::new(&shape).ok_or_else(|| error(format!("the domain {shape:?} has too many elements")))
}

fn check_role(input: &ProgramInput, found: &[usize]) -> std::result::Result<(), String> {
    let name = &input.name;
    match input.role {
        Role::Row if found.last().is_some_and(|last| *last != 1) => {
            Err(format!("input {name} holds one value a row: its last axis must be 1, got shape {found:?}"))
        }
        Role::Scalar(_) if found.iter().any(|d| *d != 1) => {
            Err(format!("input {name} is a scalar: it must have one element, got shape {found:?}"))
        }
        Role::Indexed(rank) if found.len() != rank as usize => {
            Err(format!("input {name} must have {rank} axes, got shape {found:?}"))
        }
        _ => Ok(()),
    }
}

/// The numpy broadcast of two shapes.
pub fn broadcast(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let axis = |s: &[usize], k: usize| if k < s.len() { s[s.len() - 1 - k] } else { 1 };
    let meet = |k| match (axis(a, k), axis(b, k)) {
        (1, d) | (d, 1) => Some(d),
        (c, d) => (c == d).then_some(c),
    };
    (0..rank).rev().map(meet).collect()
}

/// Whether `shape` broadcasts to exactly `to`.
pub fn broadcasts_to(shape: &[usize], to: &[usize]) -> bool {
    shape.len() <= to.len() && shape.iter().rev().zip(to.iter().rev()).all(|(s, t)| *s == 1 || s == t)
}

/// Elements to step along each axis of the domain in a row-major array of `shape` that broadcasts to it; 0 where it
/// repeats.
pub fn broadcast_strides(shape: &[usize], domain: &[usize]) -> Vec<usize> {
    let mut strides = vec![0; domain.len()];
    let mut step = 1;
    for k in 0..shape.len().min(domain.len()) {
        let d = shape[shape.len() - 1 - k];
        if d != 1 {
            strides[domain.len() - 1 - k] = step;
        }
        step *= d;
    }
    strides
}

/// The outputs' shapes: the domain for an element output; the domain without its last axis (or with 1 there) for one
/// that is a value a row; for a scattered one its like-input's shape, or the shape in `given`.
///
/// # Errors
/// [`LangError::Shape`] naming the output when a scattered output has no shape or another rank than its coordinates,
/// or when a shape is given that the output can't have.
pub fn output_shapes(
    program: &Program,
    domain: &Domain,
    shapes: &[Vec<usize>],
    given: &[Option<Vec<usize>>],
) -> Result<Vec<Vec<usize>>> {
    let one = |(n, output): (usize, &ProgramOutput)| {
        let given = given.get(n).and_then(Option::as_ref);
        output_shape(output, domain, shapes, given)
            .map_err(|what| LangError::Shape { kernel: program.name.clone(), what })
    };
    program.outputs.iter().enumerate().map(one).collect()
}

fn output_shape(
    output: &ProgramOutput,
    domain: &Domain,
    shapes: &[Vec<usize>],
    given: Option<&Vec<usize>>,
) -> std::result::Result<Vec<usize>, String> {
    let name = &output.name;
    let own = match &output.scatter {
        Some(scatter) => {
            let like = scatter.like.and_then(|i| shapes.get(i as usize));
            let shape =
                like.or(given).ok_or_else(|| format!("output {name} is scattered to: give its shape"))?;
            if shape.len() != scatter.at.len() {
                let axes = scatter.at.len();
                return Err(format!(
                    "output {name} is addressed by {axes} coordinates, its shape is {shape:?}"
                ));
            }
            shape.clone()
        }
        None if output.per_row => {
            let mut shape = domain.shape.clone();
            let last = shape.pop();
            if output.keep_dims && last.is_some() {
                shape.push(1);
            }
            shape
        }
        None => domain.shape.clone(),
    };
    match given {
        Some(g) if *g != own => Err(format!("output {name} has shape {own:?}, {g:?} was given")),
        _ => Ok(own),
    }
}
