//! What a cell and its parent say to each other about one HTTP call of a guest. Owns the messages and their bounds;
//! both sides hold each other to them. Bodies flow in pieces, each way as far as the receiver has given room.

use serde::{Deserialize, Serialize};

use crate::blob;
use crate::egress::grant::Scheme;

/// Calls that one attempt may have at the same time.
pub const MAX_CALLS: usize = 8;
/// Bytes of a body that may be under way in one direction of a call before the receiver has given room for more.
pub const WINDOW: usize = 64 << 10;
/// Bytes of a body in one message.
pub const MAX_PIECE: usize = 16 << 10;
/// Names and values of the headers of a request or of a response, in bytes.
pub const MAX_HEADER_BYTES: usize = 32 << 10;
/// Headers of a request or of a response.
pub const MAX_HEADERS: usize = 100;
/// Bytes of a path with its query.
pub const MAX_PATH: usize = 8 << 10;

/// What the smallest piece counts of a window: each is a message, however little is in it.
const MIN_COST: usize = 64;

/// What a piece of so many bytes counts of a window.
#[must_use]
pub fn cost(bytes: usize) -> u32 {
    u32::try_from(bytes.max(MIN_COST)).unwrap_or(u32::MAX)
}

/// Pieces that a window holds at the most.
pub const MAX_PIECES: usize = WINDOW / MIN_COST;

/// Headers as they came: names in lower case, values as bytes.
pub type Headers = Vec<(String, Vec<u8>)>;

/// What a guest wants to send.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Such as `GET`.
    pub method: String,
    /// How.
    pub scheme: Scheme,
    /// To whom: `host` or `host:port`.
    pub authority: String,
    /// Path and query.
    pub path: String,
    /// All headers but `host`.
    pub headers: Headers,
    /// A body follows.
    pub body: bool,
    /// Milliseconds for a connection; the parent has a bound of its own.
    pub connect_ms: Option<u64>,
    /// Milliseconds from the request to the head of the response.
    pub first_byte_ms: Option<u64>,
    /// Milliseconds between two pieces of the response.
    pub between_bytes_ms: Option<u64>,
}

/// From a guest.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromGuest {
    /// A call begins.
    Request(Box<Request>),
    /// A piece of the request's body.
    Body(#[serde(with = "blob")] Vec<u8>),
    /// The body is complete.
    BodyEnd,
    /// There is room for so much more of the response, in terms of [`cost`].
    Room(u32),
    /// The guest has let go of the call, ended or not. The last message.
    Closed,
}

/// To a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// The response begins.
    Head {
        /// Such as 200.
        status: u16,
        /// All of them.
        headers: Headers,
    },
    /// A piece of the response's body.
    Body(#[serde(with = "blob")] Vec<u8>),
    /// The response is complete.
    End,
    /// There is room for so much more of the request, in terms of [`cost`].
    Room(u32),
    /// The call has failed. The last message.
    Refused(Refusal),
}

/// Why a call failed: a code of `wasi:http` and words for the log of the attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For the program.
    pub code: Code,
    /// For people. Never says an address that a name resolved to: that is the operator's business.
    pub message: String,
}

impl Refusal {
    /// With these words.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Codes of `wasi:http`, as far as they are used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the names are those of the standard
pub enum Code {
    HttpRequestDenied,
    DestinationIpProhibited,
    DnsTimeout,
    DnsError,
    ConnectionRefused,
    ConnectionTimeout,
    ConnectionTerminated,
    ConnectionLimitReached,
    ConnectionReadTimeout,
    TlsProtocolError,
    TlsCertificateError,
    HttpRequestMethodInvalid,
    HttpRequestUriInvalid,
    HttpRequestUriTooLong,
    HttpRequestHeaderSectionSize,
    HttpRequestBodySize,
    HttpResponseHeaderSectionSize,
    HttpResponseBodySize,
    HttpResponseIncomplete,
    HttpResponseTimeout,
    HttpProtocolError,
    InternalError,
}
