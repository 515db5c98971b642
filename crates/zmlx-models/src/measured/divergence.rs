//! Where two forms of a model that are fed the same tokens first have another likeliest token.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A step at which two forms have another likeliest token. Then the margin is at most twice the distance, whatever is wrong:
/// only how small both are says that it is a near-tie.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Divergence {
    /// The step, from 0.
    pub step: u64,
    /// The reference's likeliest token.
    pub expected: u32,
    /// The other form's.
    pub found: u32,
    /// How far the reference's two best logits are apart.
    pub margin: f64,
    /// Largest absolute difference of a logit of the other form from the reference's.
    pub distance: f64,
}

impl Divergence {
    /// Of the logits of a step, one for each token; `None` if the likeliest is the same. The first of equal ones counts.
    pub fn of(step: u64, reference: &[f32], other: &[f32]) -> Option<Self> {
        let (expected, found) = (likeliest(reference), likeliest(other));
        if expected == found {
            return None;
        }
        let best = f64::from(*reference.get(expected as usize)?);
        let others = reference.iter().enumerate().filter(|(token, _)| *token != expected as usize);
        let second = others.map(|(_, v)| f64::from(*v)).fold(f64::NEG_INFINITY, f64::max);
        let apart = reference.iter().zip(other).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs());
        Some(Self { step, expected, found, margin: best - second, distance: apart.fold(0.0, f64::max) })
    }
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "step {}: token {} and not {}, margin {:.3e}, logits apart by up to {:.3e}",
            self.step, self.found, self.expected, self.margin, self.distance
        )
    }
}

/// The token of the largest logit, the first of equal ones; 0 of none.
pub fn likeliest(row: &[f32]) -> u32 {
    (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_margin_is_the_references_and_the_distance_of_all_logits() {
        // Token 2 leads by 0.25; the other form has token 0 ahead and is off by 3 at token 3, which neither chooses.
        let reference = [1.0, -4.0, 1.25, -8.0];
        let found = Divergence::of(7, &reference, &[1.5, -4.0, 1.25, -5.0]).unwrap();
        let expected = Divergence { step: 7, expected: 2, found: 0, margin: 0.25, distance: 3.0 };
        assert_eq!(found, expected);
        assert_eq!(
            found.to_string(),
            "step 7: token 0 and not 2, margin 2.500e-1, logits apart by up to 3.000e0"
        );
        assert_eq!(Divergence::of(7, &reference, &[1.0, -4.0, 1.125, -5.0]), None);
    }

    #[test]
    fn the_first_of_equal_logits_is_the_likeliest() {
        assert_eq!(likeliest(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(likeliest(&[]), 0);
        // Equal in the reference: a tie, which the least difference breaks.
        let found = Divergence::of(0, &[3.0, 3.0], &[3.0, 3.5]).unwrap();
        assert_eq!((found.expected, found.found, found.margin), (0, 1, 0.0));
        assert_eq!(Divergence::of(0, &[], &[]), None);
    }
}
