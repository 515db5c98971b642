//! From logits to the next token, as lazy ops: the next step can be submitted before this token is known.

use std::time::{SystemTime, UNIX_EPOCH};

use zmlx_mlx::{Array, Dtype, Result, ops, random};

use crate::options::SamplerOptions;

/// A chosen token, not computed yet.
pub(crate) struct Sampled {
    /// Its id, `[1]` uint32.
    pub(crate) token: Array,
    /// One bool: the logits hold NaN or plus infinity, so the choice means nothing.
    pub(crate) not_a_number: Array,
}

/// Chooses tokens. Follows mlx-lm's samplers op for op, so that the same seed draws the same tokens.
pub(crate) struct Sampler {
    options: SamplerOptions,
    /// Key of the next draw.
    key: Option<Array>,
    /// The last tokens, for the repetition penalty; the newest may not be computed yet.
    recent: Option<Array>,
    bias: Option<(Array, Array)>,
}

impl Sampler {
    /// A sampler after a prompt.
    pub(crate) fn new(options: &SamplerOptions, prompt: &[u32]) -> Result<Self> {
        let key = match options.temperature {
            0.0 => None,
            _ => Some(random::key(options.seed.unwrap_or_else(clock_seed))?),
        };
        let penalises = options.repetition_penalty != 1.0 && options.repetition_context > 0;
        let recent = match penalises {
            true => {
                let tail = &prompt[prompt.len().saturating_sub(options.repetition_context)..];
                Some(Array::from_slice(tail, &[tail.len() as i32])?)
            }
            false => None,
        };
        let (ids, values): (Vec<u32>, Vec<f32>) = options.logit_bias.iter().copied().unzip();
        let n = ids.len() as i32;
        let bias = match ids.is_empty() {
            true => None,
            false => Some((Array::from_slice(&ids, &[1, n])?, Array::from_slice(&values, &[1, n])?)),
        };
        Ok(Self { options: options.clone(), key, recent, bias })
    }

    /// The next token from logits `[1, vocabulary]`.
    pub(crate) fn sample(&mut self, logits: &Array) -> Result<Sampled> {
        let logits = self.process(logits)?;
        let normaliser = logits.logsumexp(&[0, 1], true)?;
        let not_a_number = normaliser.isfinite()?.logical_not()?;
        let logprobs = logits.subtract(&normaliser)?;
        let token = match self.key.take() {
            None => logprobs.argmax(-1, false)?,
            Some(key) => {
                let (next, draw) = random::split(&key)?;
                self.key = Some(next);
                let scaled = self.filter(logprobs)?.multiply_scalar(1.0 / self.options.temperature)?;
                random::categorical(&scaled, -1, &draw)?
            }
        };
        if let Some(recent) = self.recent.take() {
            let joined = ops::concatenate(&[&recent, &token], 0)?;
            let n = joined.dim(0)?;
            let keep = n.min(i32::try_from(self.options.repetition_context).unwrap_or(i32::MAX));
            self.recent = Some(joined.slice_axis(0, n - keep, n)?);
        }
        Ok(Sampled { token, not_a_number })
    }

    /// Whether the likeliest token is taken as the logits are.
    pub(crate) fn is_greedy(&self) -> bool {
        self.key.is_none() && self.recent.is_none() && self.bias.is_none()
    }

    /// The largest logit of computed float32 logits, if nothing else is asked for: a few microseconds in place of five
    /// ops. The lowest index of equals, as argmax.
    pub(crate) fn greedy(&self, logits: &Array) -> Result<Option<Sampled>> {
        if !self.is_greedy() || logits.dtype() != Dtype::Float32 {
            return Ok(None);
        }
        let values = logits.as_slice::<f32>()?;
        let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let odd = !largest.is_finite() || values.iter().any(|v| v.is_nan());
        let token = values.iter().position(|v| *v == largest).unwrap_or(0) as u32;
        Ok(Some(Sampled { token: Array::from_slice(&[token], &[1])?, not_a_number: Array::scalar(odd)? }))
    }

    /// Logit bias and repetition penalty.
    fn process(&self, logits: &Array) -> Result<Array> {
        let mut logits = logits.clone();
        if let Some((ids, values)) = &self.bias {
            logits = logits.scatter_add_axis(ids, &values.astype(logits.dtype())?, -1)?;
        }
        if let Some(recent) = self.recent.as_ref().filter(|r| r.size() > 0) {
            let ids = recent.expand_dims(&[0])?;
            let chosen = logits.take_along_axis(&ids, -1)?;
            let penalty = Array::scalar_as(self.options.repetition_penalty.into(), logits.dtype())?;
            let negative = chosen.less(&Array::scalar_as(0.0, logits.dtype())?)?;
            let punished = ops::where_(&negative, &chosen.multiply(&penalty)?, &chosen.divide(&penalty)?)?;
            logits = logits.put_along_axis(&ids, &punished, -1)?;
        }
        Ok(logits)
    }

    /// Top-p, min-p and top-k: tokens that fall out get a log-probability of minus infinity.
    fn filter(&self, mut logprobs: Array) -> Result<Array> {
        let o = &self.options;
        let never = |like: &Array| Array::scalar_as(f64::NEG_INFINITY, like.dtype());
        if o.top_p < 1.0 {
            let sorted = logprobs.sort(-1)?;
            let probs = sorted.astype(Dtype::Float32)?.exp()?;
            let above = probs.cumsum(-1, true, false)?;
            let total = above.slice_axis(-1, 0, 1)?.add(&probs.slice_axis(-1, 0, 1)?)?;
            let dropped = above.greater_equal(&total.multiply_scalar(o.top_p)?)?;
            let count = dropped.sum(&[-1], true)?;
            let threshold = sorted.take_along_axis(&count, -1)?;
            logprobs = ops::where_(&logprobs.less(&threshold)?, &never(&logprobs)?, &logprobs)?;
        }
        if o.min_p > 0.0 {
            let least = logprobs.max(&[-1], true)?.add_scalar(o.min_p.ln())?;
            logprobs = ops::where_(&logprobs.less(&least)?, &never(&logprobs)?, &logprobs)?;
        }
        let vocabulary = logprobs.dim(-1)?;
        let k = i32::try_from(o.top_k).unwrap_or(i32::MAX);
        if k > 0 && k < vocabulary {
            let order = logprobs.negative()?.argpartition(k - 1, -1)?;
            let rest = order.slice_axis(-1, k, vocabulary)?;
            let values = never(&logprobs)?.broadcast_to(rest.shape())?;
            logprobs = logprobs.put_along_axis(&rest, &values, -1)?;
        }
        Ok(logprobs)
    }
}

fn clock_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(values: &[f32]) -> Array {
        Array::from_slice(values, &[1, values.len() as i32]).unwrap()
    }

    /// The tokens that a filter leaves.
    fn left(options: SamplerOptions, probabilities: &[f32]) -> Vec<usize> {
        let sampler = Sampler::new(&options, &[]).unwrap();
        let logprobs: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let kept = sampler.filter(logits(&logprobs)).unwrap().to_vec::<f32>().unwrap();
        (0..kept.len()).filter(|&i| kept[i] > f32::NEG_INFINITY).collect()
    }

    #[test]
    fn filters_leave_the_right_tokens() {
        let p = [0.1, 0.4, 0.2, 0.3];
        let base = SamplerOptions { temperature: 1.0, ..SamplerOptions::default() };
        let cases = [
            ("off", base.clone(), vec![0, 1, 2, 3]),
            ("top_k 2", SamplerOptions { top_k: 2, ..base.clone() }, vec![1, 3]),
            ("top_k beyond the vocabulary", SamplerOptions { top_k: 9, ..base.clone() }, vec![0, 1, 2, 3]),
            ("top_p 0.6", SamplerOptions { top_p: 0.6, ..base.clone() }, vec![1, 3]),
            ("top_p tiny keeps one", SamplerOptions { top_p: 1e-9, ..base.clone() }, vec![1]),
            ("min_p half", SamplerOptions { min_p: 0.5, ..base.clone() }, vec![1, 2, 3]),
            ("min_p 1 keeps the best", SamplerOptions { min_p: 1.0, ..base.clone() }, vec![1]),
            ("together", SamplerOptions { top_p: 0.95, min_p: 0.3, top_k: 2, ..base.clone() }, vec![1, 3]),
        ];
        for (name, options, want) in cases {
            assert_eq!(left(options, &p), want, "{name}");
        }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals_and_seeds_repeat() {
        let mut greedy = Sampler::new(&SamplerOptions::default(), &[]).unwrap();
        let x = logits(&[0.0, 2.0, 2.0]);
        assert_eq!(greedy.sample(&x).unwrap().token.item::<u32>().unwrap(), 1);
        let draw = |seed| -> Vec<u32> {
            let options = SamplerOptions { temperature: 1.0, seed: Some(seed), ..SamplerOptions::default() };
            let mut sampler = Sampler::new(&options, &[]).unwrap();
            (0..50).map(|_| sampler.sample(&x).unwrap().token.item::<u32>().unwrap()).collect()
        };
        assert_eq!(draw(5), draw(5));
        assert_ne!(draw(5), draw(6));
        let counts = draw(5).iter().fold([0; 3], |mut c, &t| {
            c[t as usize] += 1;
            c
        });
        assert!(counts[1] > 8 && counts[2] > 8 && counts[0] < 20, "{counts:?}");
    }

    #[test]
    fn penalty_and_bias_move_the_choice() {
        let x = logits(&[1.0, 2.0, -1.0]);
        let options =
            SamplerOptions { repetition_penalty: 3.0, repetition_context: 2, ..SamplerOptions::default() };
        let mut sampler = Sampler::new(&options, &[2, 1]).unwrap();
        let processed = sampler.process(&x).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(processed, [1.0, 2.0 / 3.0, -3.0]);
        // 0 is chosen and pushes 2 out of the two recent tokens; then 0 and 1 are both divided.
        assert_eq!(sampler.sample(&x).unwrap().token.item::<u32>().unwrap(), 0);
        assert_eq!(sampler.process(&x).unwrap().to_vec::<f32>().unwrap(), [1.0 / 3.0, 2.0 / 3.0, -1.0]);
        let biased =
            SamplerOptions { logit_bias: vec![(2, 10.0), (1, f32::NEG_INFINITY)], ..Default::default() };
        let mut sampler = Sampler::new(&biased, &[]).unwrap();
        assert_eq!(sampler.sample(&x).unwrap().token.item::<u32>().unwrap(), 2);
    }
}
