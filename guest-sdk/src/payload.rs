//! How bytes become a task's input and how what it returns becomes bytes: JSON unless the types say
//! otherwise.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::TaskError;
use crate::schema::{Node, Schema};

/// Raw bytes: the input of a task that does not read JSON, or an output of type
/// `application/octet-stream`.
///
/// ```
/// use sandbar_guest::{Bytes, Output, TaskError, task};
///
/// /// Reverses the lines of a text.
/// #[task]
/// fn tac(input: Bytes) -> Result<Output, TaskError> {
///     let text = String::from_utf8(input.0).map_err(TaskError::fatal)?;
///     let lines: Vec<&str> = text.lines().rev().collect();
///     Ok(Output::new("text/plain; charset=utf-8", lines.join("\n")))
/// }
/// # assert_eq!(tac(Bytes(b"a\nb".to_vec())).unwrap().bytes, b"b\na");
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}

/// An output with a media type of the task's choice.
///
/// ```
/// use sandbar_guest::{Bytes, Output, task};
///
/// /// Draws a dot.
/// #[task]
/// fn dot(colour: String) -> Output {
///     Output::new("image/svg+xml", format!(r#"<svg><circle r="1" fill="{colour}"/></svg>"#))
/// }
/// # assert_eq!(dot("red".to_owned()).content_type, "image/svg+xml");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Media type of `bytes`: ASCII, at most 255 bytes; the host puts `application/octet-stream` in
    /// place of anything else.
    pub content_type: String,
    /// The output itself. The limit `output_bytes` counts them.
    pub bytes: Vec<u8>,
}

impl Output {
    /// An output of the given media type.
    pub fn new(content_type: impl Into<String>, bytes: impl Into<Vec<u8>>) -> Self {
        Self { content_type: content_type.into(), bytes: bytes.into() }
    }
}

/// What a task can take: [`Bytes`], or any type that serde can read and whose [`Schema`] is known.
/// Empty input reads as `null`.
///
/// Implement it for a form of your own that is neither:
///
/// ```
/// use sandbar_guest::{Node, TaskError, TaskInput, task};
///
/// struct Lines(Vec<String>);
///
/// impl TaskInput for Lines {
///     const NODE: Option<&'static Node> = None;
///
///     fn from_bytes(bytes: Vec<u8>) -> Result<Self, TaskError> {
///         let text = String::from_utf8(bytes).map_err(TaskError::fatal)?;
///         Ok(Self(text.lines().map(str::to_owned).collect()))
///     }
/// }
///
/// #[task]
/// fn count_lines(input: Lines) -> usize {
///     input.0.len()
/// }
/// # let ctx = sandbar_guest::Context::test().build();
/// # assert_eq!(sandbar_guest::call!(count_lines, &ctx, "a\nb").unwrap().bytes, b"2");
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be the input of a task",
    label = "neither `Bytes` nor `serde::Deserialize` + `sandbar_guest::Schema`",
    note = "put `#[derive(serde::Deserialize, sandbar_guest::Schema)]` on `{Self}`"
)]
pub trait TaskInput: Sized {
    /// Schema of the input, if it is JSON.
    const NODE: Option<&'static Node>;

    /// Reads the input.
    ///
    /// # Errors
    /// Fatal, with serde's message, if the bytes are not what the type wants: they will not be
    /// another time either.
    fn from_bytes(bytes: Vec<u8>) -> Result<Self, TaskError>;
}

impl TaskInput for Bytes {
    const NODE: Option<&'static Node> = None;

    fn from_bytes(bytes: Vec<u8>) -> Result<Self, TaskError> {
        Ok(Self(bytes))
    }
}

impl<T: DeserializeOwned + Schema> TaskInput for T {
    const NODE: Option<&'static Node> = Some(T::NODE);

    fn from_bytes(bytes: Vec<u8>) -> Result<Self, TaskError> {
        let json: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(json).map_err(|error| TaskError::fatal(format!("input: {error}")))
    }
}

/// What a task can give: [`Output`], [`Bytes`], or any type that serde can write and whose [`Schema`]
/// is known.
///
/// Implement it for a form of your own:
///
/// ```
/// use sandbar_guest::{Node, Output, TaskError, TaskOutput, task};
///
/// struct Csv(Vec<[u32; 2]>);
///
/// impl TaskOutput for Csv {
///     const NODE: Option<&'static Node> = None;
///
///     fn into_output(self) -> Result<Output, TaskError> {
///         let rows = self.0.iter().map(|[a, b]| format!("{a},{b}\n"));
///         Ok(Output::new("text/csv", rows.collect::<String>()))
///     }
/// }
///
/// #[task]
/// fn squares(to: u32) -> Csv {
///     Csv((0..to).map(|n| [n, n * n]).collect())
/// }
/// # let ctx = sandbar_guest::Context::test().build();
/// # assert_eq!(sandbar_guest::call!(squares, &ctx, "2").unwrap().bytes, b"0,0\n1,1\n");
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be the output of a task",
    label = "none of `Output`, `Bytes`, `serde::Serialize` + `sandbar_guest::Schema`",
    note = "put `#[derive(serde::Serialize, sandbar_guest::Schema)]` on `{Self}`"
)]
pub trait TaskOutput {
    /// Schema of the output, if it is JSON.
    const NODE: Option<&'static Node>;

    /// Writes the output.
    ///
    /// # Errors
    /// Fatal if serde cannot write it as JSON, for example a map whose keys are not strings.
    fn into_output(self) -> Result<Output, TaskError>;
}

impl TaskOutput for Output {
    const NODE: Option<&'static Node> = None;

    fn into_output(self) -> Result<Output, TaskError> {
        Ok(self)
    }
}

impl TaskOutput for Bytes {
    const NODE: Option<&'static Node> = None;

    fn into_output(self) -> Result<Output, TaskError> {
        Ok(Output::new("application/octet-stream", self.0))
    }
}

impl<T: Serialize + Schema> TaskOutput for T {
    const NODE: Option<&'static Node> = Some(T::NODE);

    fn into_output(self) -> Result<Output, TaskError> {
        match serde_json::to_vec(&self) {
            Ok(bytes) => Ok(Output::new("application/json", bytes)),
            Err(error) => Err(TaskError::fatal(format!("output: {error}"))),
        }
    }
}

/// What a task function can return: an output, or a `Result` of one with an error that is or becomes
/// a [`TaskError`]. Never implemented by hand: [`TaskOutput`] is enough.
///
/// ```
/// use sandbar_guest::task;
///
/// #[task]
/// fn nothing() {}
///
/// #[task]
/// fn parsed(text: String) -> Result<u8, std::num::ParseIntError> {
///     text.parse()
/// }
/// # nothing();
/// # assert_eq!(parsed("7".to_owned()), Ok(7));
/// ```
#[diagnostic::on_unimplemented(
    message = "a task cannot return `{Self}`",
    label = "neither an output nor a `Result` of one",
    note = "an output is `Output`, `Bytes`, or a type with `#[derive(serde::Serialize, sandbar_guest::Schema)]`",
    note = "the error of a `Result` is `TaskError` or implements `std::error::Error`; make one of anything else with `.map_err(TaskError::fatal)`"
)]
pub trait TaskReturn {
    /// Schema of the output, if it is JSON.
    const NODE: Option<&'static Node>;

    /// Writes what was returned.
    ///
    /// # Errors
    /// The task's own error, or that of [`TaskOutput::into_output`].
    fn into_result(self) -> Result<Output, TaskError>;
}

impl<T: TaskOutput> TaskReturn for T {
    const NODE: Option<&'static Node> = T::NODE;

    fn into_result(self) -> Result<Output, TaskError> {
        self.into_output()
    }
}

impl<T: TaskOutput, E: Into<TaskError>> TaskReturn for Result<T, E> {
    const NODE: Option<&'static Node> = T::NODE;

    fn into_result(self) -> Result<Output, TaskError> {
        self.map_err(Into::into)?.into_output()
    }
}
