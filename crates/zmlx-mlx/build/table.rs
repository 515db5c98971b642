//! Reads the tables of bridge functions and writes both sides of the bridge from them.
//!
//! A line of `ops.table` gives a documented Rust function, its `extern "C"` signature, and the C++ that calls MLX;
//! a line of `raw.table` gives a signature whose C++ body is written by hand. Since both languages' declarations
//! come from one line, they cannot disagree.

use std::fmt::Write;

/// One parameter: name and table type.
pub struct Param {
    name: String,
    ty: String,
}

/// What an op returns.
#[derive(PartialEq, Clone, Copy)]
pub enum Ret {
    One,
    Two,
    Many,
}

pub struct Function {
    section: String,
    name: String,
    docs: Vec<String>,
    params: Vec<Param>,
    ret: Ret,
    /// The C++ expression; `mx::name(args, s)` when the table gives none.
    cpp: String,
}

type Parsed = Result<Vec<Function>, String>;

/// Parses a table. Lines: `# comment`, `[section]`, `/// docs`, `name(a: Type, ...) -> Array = cpp expression`.
pub fn parse(text: &str, ops: bool) -> Parsed {
    let mut section = String::new();
    let mut docs = Vec::new();
    let mut functions = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        let fail = |what: &str| Err(format!("bridge table, line {}: {what}: {line}", number + 1));
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(doc) = line.strip_prefix("///") {
            docs.push(doc.to_owned());
            continue;
        }
        if let Some(name) = line.strip_prefix('[') {
            section = name.trim_end_matches(']').to_owned();
            continue;
        }
        let Some((name, rest)) = line.split_once('(') else { return fail("no parameter list") };
        let Some((params, rest)) = rest.split_once(')') else { return fail("unclosed parameter list") };
        let mut list = Vec::new();
        for param in params.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let Some((name, ty)) = param.split_once(':') else { return fail("parameter without a type") };
            let ty = ty.trim();
            if kind(ty).is_none() {
                return fail(&format!("unknown type {ty}"));
            }
            list.push(Param { name: name.trim().to_owned(), ty: ty.to_owned() });
        }
        let (ret, cpp) = match rest.split_once('=') {
            Some((ret, cpp)) => (ret.trim(), cpp.trim().to_owned()),
            None => (rest.trim(), String::new()),
        };
        let ret = match ret.trim_start_matches("->").trim() {
            "Array" | "" => Ret::One,
            "(Array, Array)" => Ret::Two,
            "Vec<Array>" => Ret::Many,
            other => return fail(&format!("unknown return type {other}")),
        };
        if ops && docs.is_empty() {
            return fail("an op needs documentation");
        }
        let f = Function {
            section: section.clone(),
            name: name.trim().to_owned(),
            docs: std::mem::take(&mut docs),
            params: list,
            ret,
            cpp,
        };
        functions.push(f);
    }
    Ok(functions)
}

/// How a table type looks on each side. `{}` stands for the parameter's name.
struct Kind {
    /// Type in the safe Rust signature.
    rust: &'static str,
    /// Types in the extern signature.
    ffi: &'static [&'static str],
    /// Expressions that turn the safe value into the extern ones.
    pass: &'static [&'static str],
    /// C parameter types, one for each of `ffi`.
    c: &'static [&'static str],
    /// C++ expression that gives MLX its argument.
    cpp: &'static str,
}

const fn k(
    rust: &'static str,
    ffi: &'static [&'static str],
    pass: &'static [&'static str],
    c: &'static [&'static str],
    cpp: &'static str,
) -> Option<Kind> {
    Some(Kind { rust, ffi, pass, c, cpp })
}

fn kind(ty: &str) -> Option<Kind> {
    const RAW: &str = "*const RawArray";
    const SLICE_I32: &[&str] = &["*const i32", "usize"];
    const PASS_SLICE: &[&str] = &["{}.as_ptr()", "{}.len()"];
    const C_I32: &[&str] = &["const int32_t*", "size_t"];
    match ty {
        "Array" => k("&Array", &[RAW], &["{}.raw()"], &["const array*"], "*{}"),
        "Array?" => k("Option<&Array>", &[RAW], &["Array::raw_or_null({})"], &["const array*"], "opt({})"),
        "Arrays" => k(
            "&[&Array]",
            &["*const &Array", "usize"],
            PASS_SLICE,
            &["const array* const* const*", "size_t"],
            "to_vec({}, {}_n)",
        ),
        "i32" => k("i32", &["i32"], &["{}"], &["int32_t"], "{}"),
        "i32?" => k("Option<i32>", &["*const i32"], &["opt_ptr(&{})"], &["const int32_t*"], "opt({})"),
        "i64" => k("i64", &["i64"], &["{}"], &["int64_t"], "{}"),
        "u64" => k("u64", &["u64"], &["{}"], &["uint64_t"], "{}"),
        "usize" => k("usize", &["usize"], &["{}"], &["size_t"], "{}"),
        "f32" => k("f32", &["f32"], &["{}"], &["float"], "{}"),
        "f32?" => k("Option<f32>", &["*const f32"], &["opt_ptr(&{})"], &["const float*"], "opt({})"),
        "f64" => k("f64", &["f64"], &["{}"], &["double"], "{}"),
        "bool" => k("bool", &["bool"], &["{}"], &["bool"], "{}"),
        "Dtype" => k("Dtype", &["i32"], &["{}.code()"], &["int32_t"], "to_dtype({})"),
        "Dtype?" => {
            k("Option<Dtype>", &["i32"], &["{}.map_or(-1, Dtype::code)"], &["int32_t"], "opt_dtype({})")
        }
        "axes" => k("&[i32]", SLICE_I32, PASS_SLICE, C_I32, "to_ints({}, {}_n)"),
        "shape" => k("&[i32]", SLICE_I32, PASS_SLICE, C_I32, "to_shape({}, {}_n)"),
        "str" => k(
            "&str",
            &["*const u8", "usize"],
            PASS_SLICE,
            &["const char*", "size_t"],
            "std::string({}, {}_n)",
        ),
        // The remaining ones appear in raw.table only.
        "arr" => k("", &[RAW], &[], &["const array*"], ""),
        "arr_out" => k("", &["*mut *mut RawArray"], &[], &["array**"], ""),
        "list" => k("", &["*const RawList"], &[], &["const List*"], ""),
        "list_mut" => k("", &["*mut RawList"], &[], &["List*"], ""),
        "list_out" => k("", &["*mut *mut RawList"], &[], &["List**"], ""),
        "ptr" => k("", &["*const c_void"], &[], &["const void*"], ""),
        "ptr_mut" => k("", &["*mut c_void"], &[], &["void*"], ""),
        "ptr_out" => k("", &["*mut *const c_void"], &[], &["const void**"], ""),
        "i32s" => k("", SLICE_I32, &[], C_I32, ""),
        "i32s_out" => k("", &["*mut *const i32", "*mut usize"], &[], &["const int32_t**", "size_t*"], ""),
        "i32_out" => k("", &["*mut i32"], &[], &["int32_t*"], ""),
        "bool_out" => k("", &["*mut bool"], &[], &["bool*"], ""),
        "u64_out" => k("", &["*mut u64"], &[], &["uint64_t*"], ""),
        "usize_out" => k("", &["*mut usize"], &[], &["size_t*"], ""),
        "str_out" => k("", &["*mut *const u8", "*mut usize"], &[], &["const char**", "size_t*"], ""),
        "callback" => k("", &["*const Callback"], &[], &["const Callback*"], ""),
        "function" => k("", &["*const RawFunction"], &[], &["const Function*"], ""),
        "function_out" => k("", &["*mut *mut RawFunction"], &[], &["Function**"], ""),
        "kernel" => k("", &["*const RawKernel"], &[], &["const Kernel*"], ""),
        "kernel_out" => k("", &["*mut *mut RawKernel"], &[], &["Kernel**"], ""),
        "kernel_spec" => k("", &["*const KernelSpec"], &[], &["const KernelSpec*"], ""),
        "kernel_call" => k("", &["*const KernelCall"], &[], &["const KernelCall*"], ""),
        "transforms_vtable" => k("", &["*const TransformsVtable"], &[], &["const TransformsVtable*"], ""),
        "cpu_vtable" => k("", &["*const CpuVtable"], &[], &["const CpuVtable*"], ""),
        _ => None,
    }
}

fn fields(f: &Function) -> impl Iterator<Item = (&Param, Kind)> {
    f.params.iter().map(|p| (p, kind(&p.ty).expect("parse() checked the type")))
}

/// Name in the table of functions: the section keeps `fast::rope` and a possible `ops::rope` apart.
fn symbol(f: &Function) -> String {
    if f.section.is_empty() { f.name.clone() } else { format!("{}_{}", f.section, f.name) }
}

fn c_params(f: &Function) -> Vec<String> {
    let mut out = Vec::new();
    for (p, kind) in fields(f) {
        for (i, c) in kind.c.iter().enumerate() {
            out.push(format!("{c} {}{}", p.name, if i == 0 { "" } else { "_n" }));
        }
    }
    out
}

fn op_outputs(ret: Ret) -> &'static [(&'static str, &'static str)] {
    match ret {
        Ret::One => &[("array** out", "*mut *mut RawArray")],
        Ret::Two => &[("array** out", "*mut *mut RawArray"), ("array** out1", "*mut *mut RawArray")],
        Ret::Many => &[("List** out", "*mut *mut RawList")],
    }
}

fn op_c_params(f: &Function) -> String {
    let mut params = c_params(f);
    params.push("StreamArg stream".to_owned());
    params.extend(op_outputs(f.ret).iter().map(|(c, _)| (*c).to_owned()));
    params.join(", ")
}

/// `api.h`: prototypes, the table of function pointers and the function that hands it out.
pub fn cpp_header(ops: &[Function], raw: &[Function]) -> String {
    let mut h = String::from("// Generated from bridge/*.table.\n#pragma once\n#include \"bridge.h\"\n\n");
    for f in ops {
        let _ = writeln!(h, "int32_t zmlx_{}({}) noexcept;", symbol(f), op_c_params(f));
    }
    for f in raw {
        let _ = writeln!(h, "int32_t zmlx_{}({}) noexcept;", symbol(f), c_params(f).join(", "));
    }
    h.push_str("\nstruct Api {\n");
    for f in ops {
        let _ = writeln!(h, "  int32_t (*{})({});", symbol(f), op_c_params(f));
    }
    for f in raw {
        let _ = writeln!(h, "  int32_t (*{})({});", symbol(f), c_params(f).join(", "));
    }
    h.push_str("};\n\n");
    // A function without a body then fails to link.
    let names: Vec<String> = ops.iter().chain(raw).map(|f| format!("zmlx_{}", symbol(f))).collect();
    let _ = writeln!(h, "#define API_FIELDS {{ {} }}", names.join(", "));
    h
}

/// `ops.cpp`: the bodies of the ops and the table itself.
pub fn cpp_ops(ops: &[Function]) -> String {
    let mut c = String::from("// Generated from bridge/ops.table.\n#include \"api.h\"\n\n");
    for f in ops {
        let namespace = match f.section.as_str() {
            "fast" => "mx::fast::",
            "random" => "mx::random::",
            _ => "mx::",
        };
        let call = if f.cpp.is_empty() {
            let mut args: Vec<String> = fields(f).map(|(p, kind)| kind.cpp.replace("{}", &p.name)).collect();
            args.push("s".to_owned());
            format!("{namespace}{}({})", f.name, args.join(", "))
        } else {
            // In a written-out expression `$x` stands for the converted parameter x.
            let mut call = f.cpp.clone();
            let mut sorted: Vec<_> = fields(f).collect();
            sorted.sort_by_key(|(p, _)| std::cmp::Reverse(p.name.len()));
            for (p, kind) in sorted {
                call = call.replace(&format!("${}", p.name), &kind.cpp.replace("{}", &p.name));
            }
            call
        };
        let body = match f.ret {
            Ret::One => format!("put(out, {call});"),
            Ret::Two => format!("auto r = {call}; put2(out, out1, std::move(r));"),
            Ret::Many => format!("put(out, {call});"),
        };
        let _ = writeln!(
            c,
            "int32_t zmlx_{}({}) noexcept {{ return guard([&] {{ auto s = to_stream(stream); {body} }}); }}",
            symbol(f),
            op_c_params(f)
        );
    }
    c.push_str(
        "\nextern \"C\" __attribute__((visibility(\"default\"))) const Api* zmlx_bridge_api(uint64_t size) {\n  \
         static const Api api = API_FIELDS;\n  return size == sizeof(Api) ? &api : nullptr;\n}\n",
    );
    c
}

/// `api.rs`: the table of function pointers as Rust sees it.
pub fn rust_api(ops: &[Function], raw: &[Function]) -> String {
    let mut r = String::from("// Generated from bridge/*.table.\n#[repr(C)]\npub(crate) struct Api {\n");
    let mut field = |f: &Function, outputs: &[(&str, &str)], stream: bool| {
        let mut types: Vec<&str> = Vec::new();
        let kinds: Vec<Kind> = fields(f).map(|(_, kind)| kind).collect();
        for kind in &kinds {
            types.extend(kind.ffi);
        }
        if stream {
            types.push("StreamArg");
        }
        types.extend(outputs.iter().map(|(_, t)| *t));
        let _ =
            writeln!(r, "    pub(crate) {}: unsafe extern \"C\" fn({}) -> i32,", symbol(f), types.join(", "));
    };
    for f in ops {
        field(f, op_outputs(f.ret), true);
    }
    for f in raw {
        field(f, &[], false);
    }
    r.push_str("}\n");
    r
}

/// `ops.rs`: one documented safe function an op, in a module a section, and methods on `Array`.
pub fn rust_ops(ops: &[Function]) -> String {
    let mut r = String::from("// Generated from bridge/ops.table.\n");
    let mut sections: Vec<&str> = Vec::new();
    for f in ops {
        if !sections.contains(&f.section.as_str()) {
            sections.push(&f.section);
        }
    }
    for section in sections {
        let of_section = || ops.iter().filter(|f| f.section == section);
        let doc = match section {
            "fast" => "Ops that MLX has one fused kernel for (`mlx.core.fast`).",
            "random" => "Random numbers from explicit keys (`mlx.core.random`).",
            _ => "Array ops (`mlx.core`).",
        };
        let _ = writeln!(r, "/// {doc}\npub mod {section} {{\n    use super::prelude::*;\n");
        for f in of_section() {
            rust_function(&mut r, f);
        }
        r.push_str("}\n");
    }
    r.push_str("impl Array {\n");
    for f in ops.iter().filter(|f| f.section == "ops" && f.params.first().is_some_and(|p| p.ty == "Array")) {
        let kinds: Vec<_> = fields(f).skip(1).collect();
        let params: Vec<String> =
            kinds.iter().map(|(p, kind)| format!("{}: {}", p.name, kind.rust)).collect();
        let names: Vec<&str> = kinds.iter().map(|(p, _)| p.name.as_str()).collect();
        let _ = writeln!(r, "    /// {} See [`ops::{}`].", f.docs[0].trim(), f.name);
        let _ = writeln!(
            r,
            "    #[inline]\n    #[allow(clippy::too_many_arguments)]\n    pub fn {}(&self{}{}) -> Result<{}> {{ ops::{}(self{}{}) }}",
            f.name,
            if params.is_empty() { "" } else { ", " },
            params.join(", "),
            rust_ret(f.ret),
            f.name,
            if names.is_empty() { "" } else { ", " },
            names.join(", ")
        );
    }
    r.push_str("}\n");
    r
}

fn rust_ret(ret: Ret) -> &'static str {
    match ret {
        Ret::One => "Array",
        Ret::Two => "(Array, Array)",
        Ret::Many => "Vec<Array>",
    }
}

fn rust_function(r: &mut String, f: &Function) {
    let mut params = Vec::new();
    let mut pass = Vec::new();
    let mut arrays = Vec::new();
    for (p, kind) in fields(f) {
        params.push(format!("{}: {}", p.name, kind.rust));
        pass.extend(kind.pass.iter().map(|e| e.replace("{}", &p.name)));
        match p.ty.as_str() {
            "Array" => arrays.push(format!("operands.push(Some({}));", p.name)),
            "Array?" => arrays.push(format!("operands.push({});", p.name)),
            "Arrays" => arrays.push(format!("operands.extend({}.iter().copied().map(Some));", p.name)),
            _ => {}
        }
    }
    pass.push("stream::current(api)?".to_owned());
    let (outs, finish) = match f.ret {
        Ret::One => ("let mut out = ptr::null_mut();", "Ok(unsafe { Array::from_raw(out) })"),
        Ret::Two => (
            "let mut out = ptr::null_mut(); let mut out1 = ptr::null_mut();",
            "Ok(unsafe { (Array::from_raw(out), Array::from_raw(out1)) })",
        ),
        Ret::Many => ("let mut out = ptr::null_mut();", "unsafe { List::from_raw(out) }.into_arrays()"),
    };
    pass.push("&mut out".to_owned());
    if f.ret == Ret::Two {
        pass.push("&mut out1".to_owned());
    }
    for doc in &f.docs {
        let _ = writeln!(r, "    ///{doc}");
    }
    let _ = writeln!(
        r,
        "    #[allow(clippy::too_many_arguments)]\n    pub fn {name}({params}) -> Result<{ret}> {{\n        let api = api()?;\n        {outs}\n        \
         // SAFETY: every pointer comes from a live borrow, and the out pointers are valid for writes.\n        \
         let status = unsafe {{ (api.{symbol})({pass}) }};\n        if status != 0 {{\n            \
         return Err(op_error(api, status, \"{name}\", |{operands}| {{ {arrays} }}));\n        }}\n        \
         // SAFETY: on success the bridge wrote owned handles.\n        {finish}\n    }}\n",
        name = f.name,
        params = params.join(", "),
        ret = rust_ret(f.ret),
        symbol = symbol(f),
        pass = pass.join(", "),
        operands = if arrays.is_empty() { "_operands" } else { "operands" },
        arrays = arrays.join(" "),
    );
}
