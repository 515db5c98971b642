//! Names in scope.

use std::rc::Rc;

use syn::{ExprClosure, ItemFn};

use crate::types::Shape;
use crate::value::Value;

/// What a name stands for.
#[derive(Clone)]
pub enum Meaning {
    /// A variable; `None` before its first assignment, with the type it was declared with.
    Variable { value: Option<Value>, mutable: bool, shape: Option<Shape> },
    /// A constant.
    Constant(Value),
    /// A closure with the names it sees.
    Closure(Rc<(ExprClosure, Env)>),
    /// A helper function, with the number of bindings it sees the items of.
    Function(Rc<ItemFn>, usize),
    /// Nothing: holds the place of a variable where only items are seen.
    Hidden,
}

#[derive(Clone)]
pub struct Binding {
    pub name: String,
    pub meaning: Meaning,
}

/// The names in scope, innermost last.
#[derive(Clone, Default)]
pub struct Env {
    bindings: Vec<Binding>,
    /// Bindings below this are outside the closure that is being inlined: it reads them, but can't assign them.
    barrier: usize,
}

impl Env {
    /// A mark to return to with [`Env::leave`].
    pub fn enter(&self) -> usize {
        self.bindings.len()
    }

    pub fn leave(&mut self, mark: usize) {
        self.bindings.truncate(mark);
    }

    pub fn add(&mut self, name: String, meaning: Meaning) {
        self.bindings.push(Binding { name, meaning });
    }

    /// The innermost meaning of a name.
    pub fn get(&self, name: &str) -> Option<&Meaning> {
        self.bindings.iter().rev().find(|b| b.name == name).map(|b| &b.meaning)
    }

    /// The same for assignment, with whether it lies outside the closure being inlined.
    pub fn get_mut(&mut self, name: &str) -> Option<(&mut Meaning, bool)> {
        let at = self.bindings.iter().rposition(|b| b.name == name)?;
        Some((&mut self.bindings[at].meaning, at < self.barrier))
    }

    /// What a helper function sees of the first `visible` bindings: items, not variables. Places stay the same.
    pub fn items(&self, visible: usize) -> Self {
        let seen = |b: &Binding| match b.meaning {
            Meaning::Constant(_) | Meaning::Function(..) => b.clone(),
            _ => Binding { name: String::new(), meaning: Meaning::Hidden },
        };
        Self { bindings: self.bindings[..visible].iter().map(seen).collect(), barrier: 0 }
    }

    /// What a closure's body sees: everything, to read.
    pub fn captured(&self) -> Self {
        Self { bindings: self.bindings.clone(), barrier: self.bindings.len() }
    }

    /// The variables, for joining the two ways through an `if`.
    pub fn variables_mut(&mut self) -> impl Iterator<Item = (&String, &mut Option<Value>)> {
        self.bindings.iter_mut().filter_map(|b| match &mut b.meaning {
            Meaning::Variable { value, .. } => Some((&b.name, value)),
            _ => None,
        })
    }
}
