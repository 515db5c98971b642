//! What every text must satisfy; shared by the tests and the fuzz target.

use zmlx_lang::{LangError, text};

/// Calls every entry point of the parser: a text that parses must print and parse again, another must give a report
/// with a place inside it.
pub fn every_entry_point(text: &str) {
    let error_is_a_report = |e: LangError| match e {
        LangError::Syntax { message, offset } => {
            assert!(message.starts_with("error") && offset <= text.len(), "{message}");
        }
        LangError::Kernel { .. } => {}
        e => panic!("{e:?} for {text:?}"),
    };
    let _ = text::parse_expr(text, &[]).map_err(error_is_a_report);
    for kernel in [text::parse_kernel(text), text::elementwise(None, text)] {
        match kernel {
            Ok(kernel) => {
                kernel.validate().unwrap_or_else(|e| panic!("{e} for {text:?}"));
                let printed = kernel.to_text();
                // Expansions can make a text longer than the one they came from.
                if printed.len() > text::MAX_TEXT {
                    continue;
                }
                let again = text::parse_kernel(&printed);
                let again = again.unwrap_or_else(|e| panic!("{text:?} printed as\n{printed}\n{e}"));
                assert_eq!(again.to_text(), printed, "{text:?}");
            }
            Err(e) => error_is_a_report(e),
        }
    }
}
