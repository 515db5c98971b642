//! What templates expect of Python: methods of its values, `json.dumps` and `strftime`.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

/// Python's methods on strings, lists and dicts.
pub(super) fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if let (Some(text), [argument]) = (value.as_str(), args)
        && let Some(affix) = argument.as_str()
    {
        match method {
            "removeprefix" => return Ok(Value::from(text.strip_prefix(affix).unwrap_or(text))),
            "removesuffix" => return Ok(Value::from(text.strip_suffix(affix).unwrap_or(text))),
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// `json.dumps(value, ensure_ascii=False)`: unlike Jinja's own `tojson` it escapes nothing for HTML and
/// keeps key order.
pub(super) fn to_json(
    state: &State,
    value: &Value,
    rest: Rest<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let indent: Option<Value> = match kwargs.get::<Option<Value>>("indent")? {
        Some(indent) => Some(indent),
        None => rest.first().cloned(),
    };
    let indent = indent.and_then(|indent| indent.as_usize()).map(|width| width.min(32));
    let mut writer = JsonWriter {
        state,
        out: String::new(),
        indent,
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        item: if indent.is_some() { ",".to_owned() } else { ", ".to_owned() },
        colon: ": ".to_owned(),
    };
    if let Some(separators) = kwargs.get::<Option<Value>>("separators")? {
        writer.item = separators.get_item_by_index(0)?.to_string();
        writer.colon = separators.get_item_by_index(1)?.to_string();
    }
    kwargs.assert_all_used()?;
    writer.write(value, 0)?;
    Ok(Value::from_safe_string(writer.out))
}

struct JsonWriter<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    out: String,
    indent: Option<usize>,
    ensure_ascii: bool,
    sort_keys: bool,
    item: String,
    colon: String,
}

impl JsonWriter<'_, '_, '_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        // Lists can be lazy and huge, so each value is paid for before the next is made.
        self.state.consume_fuel(1)?;
        if depth > 64 {
            return Err(Error::new(ErrorKind::InvalidOperation, "value is nested too deeply for tojson"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.write_all(value.try_iter()?, None, depth)?,
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort_by_key(ToString::to_string);
                }
                self.write_all(keys.into_iter(), Some(value), depth)?;
            }
            kind => return Err(Error::new(ErrorKind::BadSerialization, format!("{kind} has no JSON form"))),
        }
        Ok(())
    }

    /// The items of a list, or with `map` the pairs of a map whose keys these are.
    fn write_all(
        &mut self,
        items: impl Iterator<Item = Value>,
        map: Option<&Value>,
        depth: usize,
    ) -> Result<(), Error> {
        let (open, close) = if map.is_some() { ('{', '}') } else { ('[', ']') };
        self.out.push(open);
        let mut empty = true;
        for item in items {
            if !empty {
                let separator = std::mem::take(&mut self.item);
                self.out.push_str(&separator);
                self.item = separator;
            }
            empty = false;
            self.new_line(depth + 1);
            match map {
                None => self.write(&item, depth + 1)?,
                Some(map) => {
                    self.write_string(&item.to_string());
                    let colon = std::mem::take(&mut self.colon);
                    self.out.push_str(&colon);
                    self.colon = colon;
                    self.write(&map.get_item(&item)?, depth + 1)?;
                }
            }
        }
        if !empty {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(width) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', width * depth));
        }
    }

    fn write_string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// The directives of C's `strftime` that chat templates use, for a time in UTC.
pub(crate) fn strftime(format: &str, time: SystemTime) -> String {
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second_of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    let (day_name, month_name) = (DAYS[(days % 7) as usize], MONTHS[(month - 1) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = match chars.next() {
            Some('-') => chars.next().map(|c| (c, false)),
            other => other.map(|c| (c, true)),
        };
        let Some((directive, padded)) = directive else {
            out.push('%');
            break;
        };
        let two = |number: u64| if padded { format!("{number:02}") } else { number.to_string() };
        match directive {
            'Y' => out.push_str(&year.to_string()),
            'y' => out.push_str(&two(year % 100)),
            'm' => out.push_str(&two(month)),
            'd' => out.push_str(&two(day)),
            'e' => out.push_str(&format!("{day:2}")),
            'H' => out.push_str(&two(hour)),
            'I' => out.push_str(&two((hour + 11) % 12 + 1)),
            'M' => out.push_str(&two(minute)),
            'S' => out.push_str(&two(second)),
            'p' => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            'B' => out.push_str(month_name),
            'b' | 'h' => out.push_str(&month_name[..3]),
            'A' => out.push_str(day_name),
            'a' => out.push_str(&day_name[..3]),
            'F' => out.push_str(&format!("{year}-{month:02}-{day:02}")),
            'T' => out.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            'Z' => out.push_str("UTC"),
            'z' => out.push_str("+0000"),
            '%' => out.push('%'),
            other => out.extend(['%', other]),
        }
    }
    out
}

/// Year, month (1-12) and day (1-31) of a day counted from 1970-01-01: Howard Hinnant's `civil_from_days`,
/// whose years begin in March so that the leap day comes last.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn formats_time() {
        let cases = [
            (0, "%Y-%m-%d %H:%M:%S %A %j", "1970-01-01 00:00:00 Thursday %j"),
            (951_782_400, "%d %b %Y, %B %-d, %a, %y%%", "29 Feb 2000, February 29, Tue, 00%"),
            (1_735_689_599, "%F %T %I:%M %p %e%", "2024-12-31 23:59:59 11:59 PM 31%"),
        ];
        for (seconds, format, expected) in cases {
            assert_eq!(strftime(format, UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }
}
