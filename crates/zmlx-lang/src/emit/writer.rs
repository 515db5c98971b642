/// Text with indentation.
#[derive(Debug, Default)]
pub(super) struct Writer {
    text: String,
    depth: usize,
}

impl Writer {
    /// One line.
    pub fn line(&mut self, line: impl AsRef<str>) {
        self.text.extend(std::iter::repeat_n("  ", self.depth + 1));
        self.text.push_str(line.as_ref());
        self.text.push('\n');
    }

    /// A line that begins in the first column: a preprocessor directive.
    pub fn directive(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
    }

    /// A line that opens a block.
    pub fn open(&mut self, line: impl AsRef<str>) {
        self.line(format!("{} {{", line.as_ref()));
        self.depth += 1;
    }

    /// Opens a block.
    pub fn block(&mut self) {
        self.line("{");
        self.depth += 1;
    }

    /// Ends a block.
    pub fn close(&mut self) {
        self.depth -= 1;
        self.line("}");
    }

    /// Ends a block and opens its alternative.
    pub fn otherwise(&mut self) {
        self.depth -= 1;
        self.open("} else");
    }

    /// The text.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.text)
    }
}
