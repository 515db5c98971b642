//! Rotary embeddings as configurations ask for them: `rope_scaling`, or `rope_parameters` of newer ones.
//!
//! Kinds and arithmetic are those of `mlx_lm.models.rope_utils` 0.32.2.

use serde_json::Value as Json;
use zmlx_graph::ops::{self, Frequencies, RopeFrequencies};
use zmlx_graph::{Builder, Value};

use crate::config::{ModelConfig, missing, positive, wrong};
use crate::error::LoadError;

/// How queries and keys are turned by their position.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rope {
    /// Leading part of a head that is turned.
    dims: i32,
    base: f64,
    /// Neighbours instead of halves.
    traditional: bool,
    kind: RopeKind,
    /// `0.1 * mscale_all_dim * ln factor + 1` of YaRN, else 1.
    mscale: f64,
}

#[derive(Debug, Clone, PartialEq)]
enum RopeKind {
    /// Positions times this.
    Positions(f64),
    /// Other frequencies, and what multiplies queries and keys first.
    Frequencies(Frequencies, f64),
}

/// The base: `rope_parameters.rope_theta`, which wins as in mlx-lm, or `rope_theta`, or `default`.
pub(super) fn rope_theta(c: &ModelConfig, default: Option<f64>) -> Result<f64, LoadError> {
    let nested = c.get("rope_parameters").and_then(|p| p.get("rope_theta")).filter(|v| !v.is_null());
    match nested {
        Some(value) => positive("rope_parameters.rope_theta", value),
        None => c.positive_or("rope_theta", default),
    }
}

impl Rope {
    /// As the section `rope_scaling` says, or else `rope_parameters`; plain where neither is there.
    ///
    /// As in mlx-lm, YaRN's `truncate` and `attention_factor` are not looked at.
    pub(super) fn read(c: &ModelConfig, dims: i32, base: f64, traditional: bool) -> Result<Self, LoadError> {
        for key in ["rope_scaling", "rope_parameters"] {
            if let Some(values) = c.get(key) {
                return Section { key, values }.rope(c, dims, base, traditional);
            }
        }
        Ok(Self::plain(dims, base, traditional))
    }

    /// As the section of `rope_parameters` for layers of that kind says, if it has sections for kinds of layers: newer
    /// configurations do where they differ. `base` is meant where it names none.
    pub(super) fn of_layers(
        c: &ModelConfig,
        kind: &str,
        dims: i32,
        base: f64,
        traditional: bool,
    ) -> Result<Option<Self>, LoadError> {
        let Some(values) = c.get("rope_parameters").and_then(|p| p.get(kind)) else { return Ok(None) };
        let key = format!("rope_parameters.{kind}");
        if !values.is_object() {
            return Err(c.wrong(&key, values, "an object"));
        }
        let section = Section { key: &key, values };
        let base = section.number("rope_theta", Some(base))?;
        section.rope(c, dims, base, traditional).map(Some)
    }

    /// With the powers of a base.
    pub(super) fn plain(dims: i32, base: f64, traditional: bool) -> Self {
        Self { dims, base, traditional, kind: RopeKind::Positions(1.0), mscale: 1.0 }
    }

    /// Turns `x`, `[batch, heads, length, head_dim]`.
    pub(super) fn apply(&self, b: &mut Builder<'_>, path: &str, x: Value) -> Value {
        let &Self { dims, traditional, .. } = self;
        match &self.kind {
            RopeKind::Positions(scale) => {
                let (base, scale) = (self.base as f32, *scale as f32);
                b.node(path, ops::Rope { dims, base, traditional, scale }, &[x])
            }
            RopeKind::Frequencies(frequencies, magnitude) => {
                let op = RopeFrequencies::new(dims, traditional, frequencies.clone(), *magnitude);
                b.node(path, op, &[x])
            }
        }
    }

    /// By what a family multiplies its scale of attention where it heeds YaRN's `mscale_all_dim`: the square of
    /// `0.1 * mscale_all_dim * ln factor + 1`; 1 without.
    pub(super) fn attention_factor(&self) -> f64 {
        self.mscale * self.mscale
    }
}

/// A section of the configuration.
struct Section<'a> {
    key: &'a str,
    values: &'a Json,
}

impl Section<'_> {
    fn path(&self, name: &str) -> String {
        format!("{}.{name}", self.key)
    }

    fn get(&self, name: &str) -> Option<&Json> {
        self.values.get(name).filter(|v| !v.is_null())
    }

    fn number(&self, name: &str, default: Option<f64>) -> Result<f64, LoadError> {
        match self.get(name) {
            Some(value) => positive(&self.path(name), value),
            None => default.ok_or_else(|| missing(&self.path(name))),
        }
    }

    /// A number that may be 0.
    fn weight(&self, name: &str, default: f64) -> Result<f64, LoadError> {
        match self.get(name) {
            Some(value) if value.as_f64() == Some(0.0) => Ok(0.0),
            _ => self.number(name, Some(default)),
        }
    }

    /// `dims / 2` factors; a single number stands for all.
    fn factors(&self, name: &str, dims: i32) -> Result<Vec<f32>, LoadError> {
        let value = self.get(name).ok_or_else(|| missing(&self.path(name)))?;
        let key = self.path(name);
        let half = usize::try_from(dims / 2).unwrap_or(0);
        let Some(items) = value.as_array() else { return Ok(vec![positive(&key, value)? as f32; half]) };
        if items.len() != half {
            let message = format!("{} for {dims} rotated dimensions: must be half as many", items.len());
            return Err(LoadError::Config { key, message });
        }
        items.iter().map(|v| positive(&key, v).map(|f| f as f32)).collect()
    }

    fn rope(&self, c: &ModelConfig, dims: i32, base: f64, traditional: bool) -> Result<Rope, LoadError> {
        let kinds = "of type default, linear, llama3, yarn, longrope or mrope";
        let kind = self.get("type").or_else(|| self.get("rope_type"));
        let mut mscale = 1.0;
        let kind = match kind.map(|k| k.as_str().unwrap_or_default()) {
            // What mrope has besides concerns images.
            None | Some("default" | "mrope") => RopeKind::Positions(1.0),
            Some("linear") => RopeKind::Positions(1.0 / self.number("factor", None)?),
            Some("llama3") => RopeKind::Frequencies(self.llama3(base)?, 1.0),
            Some("yarn" | "deepseek_yarn" | "telechat3-yarn") => {
                let factor = self.number("factor", None)?;
                let all_dims = self.weight("mscale_all_dim", 0.0)?;
                mscale = yarn_mscale(factor, all_dims);
                let magnitude = yarn_mscale(factor, self.weight("mscale", 1.0)?) / mscale;
                RopeKind::Frequencies(self.yarn(base, factor)?, magnitude)
            }
            Some("longrope" | "su") => self.longrope(c, dims, base)?,
            // Not of mlx-lm: what GGUF files carry instead of llama3's parameters.
            Some("factors") => {
                let factors = self.factors("factors", dims)?;
                RopeKind::Frequencies(Frequencies::Factors { base, factors }, 1.0)
            }
            Some(_) => return Err(wrong(self.key, self.values, kinds)),
        };
        Ok(Rope { dims, base, traditional, kind, mscale })
    }

    fn llama3(&self, base: f64) -> Result<Frequencies, LoadError> {
        Ok(Frequencies::Llama3 {
            base,
            factor: self.number("factor", None)?,
            low_freq_factor: self.number("low_freq_factor", Some(1.0))?,
            high_freq_factor: self.number("high_freq_factor", Some(4.0))?,
            original_context: self.number("original_max_position_embeddings", Some(8192.0))?,
        })
    }

    fn yarn(&self, base: f64, factor: f64) -> Result<Frequencies, LoadError> {
        // Its logarithm divides.
        if base <= 1.0 {
            let message = format!("{base}: must be above 1 for {} of type yarn", self.key);
            return Err(LoadError::Config { key: "rope_theta".to_owned(), message });
        }
        Ok(Frequencies::Yarn {
            base,
            factor,
            original_context: self.number("original_max_position_embeddings", Some(4096.0))?,
            beta_fast: self.number("beta_fast", Some(32.0))?,
            beta_slow: self.number("beta_slow", Some(1.0))?,
        })
    }

    /// The long factors at every length, as in mlx-lm; queries and keys grow with the context's stretch.
    fn longrope(&self, c: &ModelConfig, dims: i32, base: f64) -> Result<RopeKind, LoadError> {
        let name = "original_max_position_embeddings";
        let original = match c.get(name) {
            Some(_) => c.positive(name)?,
            None => self.number(name, None)?,
        };
        self.get("short_factor").ok_or_else(|| missing(&self.path("short_factor")))?;
        let factors = self.factors("long_factor", dims)?;
        let stretch = c.positive("max_position_embeddings")? / original;
        let magnitude = if stretch <= 1.0 { 1.0 } else { (1.0 + stretch.ln() / original.ln()).sqrt() };
        if !magnitude.is_finite() {
            let message = format!("{original}: must be above 1");
            return Err(LoadError::Config { key: name.to_owned(), message });
        }
        Ok(RopeKind::Frequencies(Frequencies::Factors { base, factors }, magnitude))
    }
}

/// By how much YaRN makes queries and keys longer.
fn yarn_mscale(factor: f64, mscale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(config: Json) -> Result<Rope, String> {
        let Json::Object(root) = config else { return Err("not an object".to_owned()) };
        Rope::read(&ModelConfig::from_json(root), 8, 1e4, false).map_err(|e| e.to_string())
    }

    /// Frequencies that mlx-lm 0.32.2 computes for 8 dimensions of base 10000, and its factor of queries and keys.
    #[test]
    fn frequencies_are_those_of_mlx_lm() {
        let cases = [
            (
                json!({ "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                        "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.5 }),
                1.064468903941252,
                [1.0, 10.0, 195.12195, 40000.0],
            ),
            (
                json!({ "rope_type": "yarn", "factor": 32.0, "truncate": false }),
                1.3465735902799727,
                [1.0, 10.0, 193.93939, 32000.0],
            ),
            (
                json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64 }),
                1.138629436111989,
                [1.0, 16.0, 400.0, 4000.0],
            ),
            (
                json!({ "type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [1.0, 1.5, 2.5, 40.0],
                        "original_max_position_embeddings": 4096 }),
                1.1902380714238083,
                [1.0, 15.0, 250.0, 40000.0],
            ),
        ];
        for (section, magnitude, freqs) in cases {
            let rope = read(json!({ "max_position_embeddings": 131_072, "rope_scaling": section })).unwrap();
            let RopeKind::Frequencies(found, m) = &rope.kind else { panic!("{section}: {rope:?}") };
            assert!((m - magnitude).abs() < 1e-12, "{section}: {m}");
            let found = found.array(8).unwrap().to_vec::<f32>().unwrap();
            assert_eq!(found, freqs.map(|f: f64| f as f32), "{section}");
        }
    }

    #[test]
    fn kinds_of_layers_have_sections_of_their_own() {
        let config = |parameters: Json| {
            let root = json!({ "rope_parameters": parameters }).as_object().cloned().unwrap_or_default();
            ModelConfig::from_json(root)
        };
        let of = |parameters: Json| {
            let read = Rope::of_layers(&config(parameters), "full_attention", 8, 1e4, false);
            read.map_err(|e| e.to_string())
        };
        assert_eq!(of(json!({ "rope_theta": 5.0 })), Ok(None));
        let full = json!({ "full_attention": { "rope_type": "linear", "factor": 8.0, "rope_theta": 1e6 } });
        let found = of(full).unwrap().unwrap();
        assert_eq!((found.base, &found.kind), (1e6, &RopeKind::Positions(0.125)));
        let plain = json!({ "full_attention": { "rope_type": "default" } });
        assert_eq!(of(plain), Ok(Some(Rope::plain(8, 1e4, false))));
        for (wrong, word) in [
            (json!({ "full_attention": 3 }), "rope_parameters.full_attention"),
            (json!({ "full_attention": { "rope_type": "linear" } }), "rope_parameters.full_attention.factor"),
        ] {
            let error = of(wrong).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn sections_that_change_nothing_and_sections_that_cannot_be() {
        let plain = Rope::plain(8, 1e4, false);
        for config in [
            json!({}),
            json!({ "rope_scaling": null, "rope_parameters": { "rope_theta": 5.0 } }),
            json!({ "rope_parameters": { "rope_type": "default", "partial_rotary_factor": 0.25 } }),
            json!({ "rope_scaling": { "type": "mrope", "mrope_section": [1, 1, 2] } }),
        ] {
            assert_eq!(read(config), Ok(plain.clone()));
        }
        let cases = [
            (json!({ "type": "dynamic", "factor": 2 }), "rope_scaling"),
            (json!({ "type": 3 }), "rope_scaling"),
            (json!({ "type": "linear" }), "rope_scaling.factor"),
            (json!({ "type": "yarn" }), "rope_scaling.factor"),
            (json!({ "type": "yarn", "factor": 4, "mscale": -1 }), "rope_scaling.mscale"),
            (json!({ "type": "longrope", "long_factor": [1, 1, 1, 1] }), "original_max_position_embeddings"),
            (
                json!({ "type": "longrope", "short_factor": 1, "long_factor": [1, 1],
                        "original_max_position_embeddings": 64 }),
                "rope_scaling.long_factor",
            ),
        ];
        for (section, word) in cases {
            let error = read(json!({ "rope_scaling": section.clone() })).unwrap_err();
            assert!(error.contains(word), "{section}: {error}");
        }
    }

    #[test]
    fn the_scale_of_attention_follows_mscale_all_dim() {
        let of = |section: Json| read(json!({ "rope_scaling": section })).unwrap().attention_factor();
        assert_eq!(of(json!({ "type": "yarn", "factor": 40 })), 1.0);
        let one = 0.1 * 40f64.ln() + 1.0;
        assert_eq!(
            of(json!({ "type": "yarn", "factor": 40, "mscale": 1, "mscale_all_dim": 1.0 })),
            one * one
        );
    }
}
