use std::fmt::Write;

use super::svg::escaped;
use crate::profile::{ProfileReport, ProfileRow};

const STYLE: &str = "body{font:14px system-ui,sans-serif;margin:24px;color:#112}table{border-collapse:collapse;\
margin:8px 0 24px}td,th{padding:3px 12px;text-align:right;border-bottom:1px solid #dde}td:first-child,\
th:first-child{text-align:left;font-family:ui-monospace,monospace}.bar{display:inline-block;height:9px;\
background:#7aa2e3;margin-right:6px}svg{max-width:100%;height:auto}";

impl ProfileReport {
    /// A page with the picture of [`Profile::svg`](crate::Profile::svg) and the tables. `heading` is plain text: what was
    /// run, and where. The page needs no other file.
    pub fn html(&self, heading: &str, picture: &str) -> String {
        let heading = escaped(heading);
        let mut page = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{heading}</title>\
             <style>{STYLE}</style></head><body>\n<h1>{heading}</h1>\n"
        );
        // Writing to a String cannot fail.
        let _ = writeln!(
            page,
            "<p>Each node was evaluated alone, so the times together are more than an undisturbed call takes. \
             Memory reads {:.1} GB/s; what is faster came from a processor's cache.</p>\n{picture}",
            self.bandwidth / 1e9
        );
        for (name, rows) in [("By op", &self.by_op), ("By module", &self.by_module)] {
            let _ = writeln!(
                page,
                "<h2>{name}</h2>\n<table><tr><th>name</th><th>nodes</th><th>time</th><th>share</th><th>bytes</th>\
                 <th>GB/s</th><th>roofline</th></tr>"
            );
            rows.iter().chain([&self.total]).for_each(|r| page.push_str(&row(r)));
            page.push_str("</table>\n");
        }
        page.push_str("</body></html>\n");
        page
    }
}

fn row(r: &ProfileRow) -> String {
    let rate = r.bytes_per_second.map_or_else(String::new, |b| format!("{:.1}", b / 1e9));
    let roofline = match (r.roofline, r.cache_resident) {
        (Some(f), true) => format!("{:.0} % (cache)", 100.0 * f),
        (Some(f), false) => format!("{:.0} %", 100.0 * f),
        (None, _) => String::new(),
    };
    let bytes = if r.bytes > 0 { r.bytes.to_string() } else { String::new() };
    format!(
        "<tr><td>{}</td><td>{}</td><td>{:.3} ms</td><td><span class=\"bar\" style=\"width:{:.0}px\"></span>{:.1} %\
         </td><td>{bytes}</td><td>{rate}</td><td>{roofline}</td></tr>\n",
        escaped(&r.name),
        r.nodes,
        r.seconds * 1e3,
        r.share * 120.0,
        r.share * 100.0
    )
}
