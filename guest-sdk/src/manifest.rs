//! The self-description that a component carries in its custom section `sandbar:task`: JSON text,
//! rendered at compile time. Owns its layout; the host's reader is the other side of it.

use crate::schema::{Node, schema, string, text};

/// What the `task` macro knows about a task.
#[derive(Debug, Clone, Copy)]
pub struct Manifest {
    /// Name under which the task is uploaded.
    pub name: &'static str,
    /// The doc comment of the function; empty for none.
    pub description: &'static str,
    /// Schema of the input; none if it is not JSON.
    pub input: Option<&'static Node>,
    /// Schema of the output; none if it is not JSON.
    pub output: Option<&'static Node>,
    /// Limits, retry policy and grants as JSON members, each after a comma, as the macro checked them.
    pub more: &'static str,
}

impl Manifest {
    /// Bytes of the JSON text.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.write(&mut [], 0)
    }

    /// Always false. Here because `len` is.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// The JSON text; `N` must be [`Manifest::len`].
    #[must_use]
    pub const fn render<const N: usize>(&self) -> [u8; N] {
        let mut out = [0; N];
        let end = self.write(&mut out, 0);
        assert!(end == N, "N must be Manifest::len");
        out
    }

    const fn write(&self, out: &mut [u8], at: usize) -> usize {
        let mut at = text("{\"name\":", out, at);
        at = string(self.name, out, at);
        if !self.description.is_empty() {
            at = text(",\"description\":", out, at);
            at = string(self.description, out, at);
        }
        at = text(",\"sdk\":", out, at);
        at = string(concat!("sandbar-guest ", env!("CARGO_PKG_VERSION")), out, at);
        if let Some(input) = self.input {
            at = text(",\"input_schema\":", out, at);
            at = schema(input, "", out, at);
        }
        if let Some(output) = self.output {
            at = text(",\"output_schema\":", out, at);
            at = schema(output, "", out, at);
        }
        at = text(self.more, out, at);
        text("}", out, at)
    }
}
