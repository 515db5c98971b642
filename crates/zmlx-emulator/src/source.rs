//! The translation unit: each kernel in a namespace of its own, with the signature that MLX writes.

use crate::compile::readable;
use crate::kernel::{Dialect, KernelText, TemplateArg};
use crate::{Error, address_space, rewrite};

/// Attributes that MLX adds to a Metal signature where the body names them.
const METAL_ATTRIBUTES: [(&str, &str); 20] = [
    ("dispatch_quadgroups_per_threadgroup", "uint"),
    ("dispatch_simdgroups_per_threadgroup", "uint"),
    ("dispatch_threads_per_threadgroup", "uint3"),
    ("grid_origin", "uint3"),
    ("grid_size", "uint3"),
    ("quadgroup_index_in_threadgroup", "uint"),
    ("quadgroups_per_threadgroup", "uint"),
    ("simdgroup_index_in_threadgroup", "uint"),
    ("simdgroups_per_threadgroup", "uint"),
    ("thread_execution_width", "uint"),
    ("thread_index_in_quadgroup", "uint"),
    ("thread_index_in_simdgroup", "uint"),
    ("thread_index_in_threadgroup", "uint"),
    ("thread_position_in_grid", "uint3"),
    ("thread_position_in_threadgroup", "uint3"),
    ("threadgroup_position_in_grid", "uint3"),
    ("threadgroups_per_grid", "uint3"),
    ("threads_per_grid", "uint3"),
    ("threads_per_simdgroup", "uint"),
    ("threads_per_threadgroup", "uint3"),
];

/// What a kernel's parameter is filled with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    /// Data of this input.
    Input(usize),
    /// Its dimensions, as 32-bit integers.
    Shape(usize),
    /// Its strides, as 64-bit integers.
    Strides(usize),
    /// Its number of dimensions.
    Ndim(usize),
    /// Data of this output.
    Output(usize),
}

/// The parameters of a kernel, in order. MLX adds shape, strides and ndim where the body holds their names as text.
pub(crate) fn slots(kernel: &KernelText) -> Vec<Slot> {
    let mut slots = Vec::new();
    for (i, input) in kernel.inputs.iter().enumerate() {
        slots.push(Slot::Input(i));
        let extras = [("_shape", Slot::Shape(i)), ("_strides", Slot::Strides(i)), ("_ndim", Slot::Ndim(i))];
        for (suffix, slot) in extras {
            if input.ndim > 0 && kernel.body.contains(&format!("{}{suffix}", input.name)) {
                slots.push(slot);
            }
        }
    }
    slots.extend((0..kernel.outputs.len()).map(Slot::Output));
    slots
}

/// Name of a part of a kernel's text in compiler messages.
pub(crate) fn file_name(dialect: Dialect, kernel: &KernelText, header: bool) -> String {
    let ending = if dialect == Dialect::Metal { "metal" } else { "cu" };
    if header { format!("{}.header.{ending}", kernel.name) } else { format!("{}.{ending}", kernel.name) }
}

/// The type, the name and the argument of one parameter, for argument number `k` of an entry point.
fn parameter(dialect: Dialect, kernel: &KernelText, slot: Slot, k: usize) -> (String, String) {
    let metal = dialect == Dialect::Metal;
    match slot {
        Slot::Input(i) => {
            let p = &kernel.inputs[i];
            let ty = if metal { p.dtype.metal() } else { p.dtype.cuda() };
            let by_value = metal && p.ndim == 0;
            let (mark, star) = if by_value { ("&", "*") } else { ("*", "") };
            (format!("const {ty}{mark} {}", p.name), format!("{star}static_cast<const {ty}*>(a[{k}])"))
        }
        Slot::Shape(i) | Slot::Strides(i) => {
            let shape = matches!(slot, Slot::Shape(_));
            let name = &kernel.inputs[i].name;
            let (suffix, element, class) =
                if shape { ("shape", "int", "Shape") } else { ("strides", "int64_t", "Strides") };
            if metal {
                (
                    format!("const {element}* {name}_{suffix}"),
                    format!("static_cast<const {element}*>(a[{k}])"),
                )
            } else {
                (format!("const {class} {name}_{suffix}"), format!("*static_cast<const {class}*>(a[{k}])"))
            }
        }
        Slot::Ndim(i) => {
            let name = &kernel.inputs[i].name;
            let mark = if metal { "&" } else { "" };
            (format!("const int{mark} {name}_ndim"), format!("*static_cast<const int*>(a[{k}])"))
        }
        Slot::Output(i) => {
            let p = &kernel.outputs[i];
            let ty = if metal { p.dtype.metal() } else { p.dtype.cuda() };
            let ty = if kernel.atomic_outputs { format!("atomic<{ty}>") } else { ty.to_owned() };
            (format!("{ty}* {}", p.name), format!("static_cast<{ty}*>(a[{k}])"))
        }
    }
}

/// Template parameters and arguments (Metal), or the lines that stand for them (CUDA).
fn template(dialect: Dialect, kernel: &KernelText) -> (String, String) {
    let metal = dialect == Dialect::Metal;
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for (name, arg) in &kernel.template {
        let (kind, value) = match *arg {
            TemplateArg::Int(v) => ("int", v.to_string()),
            TemplateArg::Bool(v) => ("bool", v.to_string()),
            TemplateArg::Dtype(d) => ("typename", if metal { d.metal() } else { d.cuda() }.to_owned()),
        };
        if metal {
            left.push(format!("{kind} {name}"));
            right.push(value);
        } else if kind == "typename" {
            left.push(format!("using {name} = {value};"));
        } else {
            left.push(format!("constexpr {kind} {name} = {value};"));
        }
    }
    if metal && !left.is_empty() {
        (format!("template <{}> ", left.join(", ")), format!("<{}>", right.join(", ")))
    } else {
        (left.join(" "), String::new())
    }
}

fn check_name(kernel: &KernelText) -> Result<(), Error> {
    let bad = |message: String| Err(Error::Launch { kernel: kernel.name.clone(), message });
    let identifier = |name: &str| {
        name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
            && name.bytes().next().is_some_and(|b| !b.is_ascii_digit())
    };
    if kernel.outputs.is_empty() {
        return bad("a kernel needs at least one output".into());
    }
    let names = kernel.inputs.iter().map(|p| &p.name).chain(kernel.outputs.iter().map(|p| &p.name));
    let all = names.chain(kernel.template.iter().map(|(n, _)| n)).chain([&kernel.name]);
    match all.into_iter().find(|n| !identifier(n)) {
        Some(name) => bad(format!("{name:?} is not an identifier")),
        None => Ok(()),
    }
}

/// Names that a header defines as macros, to be forgotten after its kernel.
pub(crate) fn macros(header: &str) -> impl Iterator<Item = &str> {
    header.lines().filter_map(|line| {
        let rest = line.trim_start().strip_prefix('#')?.trim_start().strip_prefix("define")?;
        rest.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).find(|w| !w.is_empty())
    })
}

/// The function of kernel number `index` and its entry point `zs_entry_<index>`.
fn one(dialect: Dialect, kernel: &KernelText, index: usize, arrays: &mut usize) -> Result<String, Error> {
    check_name(kernel)?;
    let metal = dialect == Dialect::Metal;
    if kernel.atomic_outputs && !metal {
        let message = "MLX has atomic outputs for Metal only".into();
        return Err(Error::Launch { kernel: kernel.name.clone(), message });
    }
    if metal {
        let name = |header| file_name(dialect, kernel, header);
        let found = address_space::missing(kernel);
        let log: String = found
            .iter()
            .map(|&(h, line)| {
                format!(
                    "{}:{line}: error: a pointer or reference without address space (device, thread, ...)\n",
                    name(h)
                )
            })
            .collect();
        if !log.is_empty() {
            return Err(Error::Compile { log: readable(&log, dialect, std::slice::from_ref(kernel)) });
        }
    }
    let misplaced = |e: rewrite::Misplaced| Error::Compile {
        log: format!(
            "{}:{}: shared memory is declared outside of a function",
            file_name(dialect, kernel, true),
            e.0
        ),
    };
    let header = rewrite::shared_memory(&kernel.header, 0, arrays).map_err(misplaced)?;
    let body = rewrite::shared_memory(&kernel.body, 1, arrays).map_err(misplaced)?;
    let (mut params, mut args): (Vec<_>, Vec<_>) =
        slots(kernel).into_iter().enumerate().map(|(k, s)| parameter(dialect, kernel, s, k)).unzip();
    let (before, types) = template(dialect, kernel);
    if metal {
        for (name, ty) in METAL_ATTRIBUTES.iter().filter(|(name, _)| kernel.body.contains(name)) {
            params.push(format!("{ty} {name}"));
            args.push(format!("zs_{name}(*t)"));
        }
    }
    let (open, close, inside, front) = if metal {
        ("", "", String::new(), before)
    } else {
        let open =
            "namespace mlx::core::cu { using namespace ::mlx::core::cu; namespace cg = cooperative_groups; ";
        (open, "}", before, String::new())
    };
    let function = format!("custom_kernel_{}", kernel.name);
    let undefine: String = macros(&kernel.header).map(|m| format!("#undef {m}\n")).collect();
    Ok(format!(
        "namespace zk_{index} {{\n#line 1 \"{}\"\n{header}\n{open}{front}\n__attribute__((noinline)) static void \
         {function}({}) {{ {inside}\n#line 1 \"{}\"\n{body}\n}}\n#line 1 \"entry_{index}\"\nextern \"C\" \
         __attribute__((visibility(\"default\"))) ZS_RAW void zs_entry_{index}(void** a, const ZsThread* t) {{ \
         {function}{types}({}); }}\n{close}}}\n{undefine}",
        file_name(dialect, kernel, true),
        params.join(", "),
        file_name(dialect, kernel, false),
        args.join(", "),
    ))
}

/// The text that the compiler gets.
pub(crate) fn translation_unit(dialect: Dialect, kernels: &[KernelText]) -> Result<String, Error> {
    let mut out = String::from(match dialect {
        Dialect::Metal => "#include \"metal.h\"\n#include \"metal_entry.h\"\n",
        Dialect::Cuda => "#include \"cuda.h\"\n",
    });
    let mut arrays = 0;
    for (i, kernel) in kernels.iter().enumerate() {
        out += &one(dialect, kernel, i, &mut arrays)?;
    }
    Ok(out)
}
