//! The cell's side of HTTP: `wasi:http/outgoing-handler` over a carrier that takes requests out of the process. Owns the
//! cap on calls of one attempt, what their buffers count against its memory, and the line in its log for each refusal.
//! Decides nothing about destinations, and opens no socket.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use wasmtime::StoreContextMut;
use wasmtime::component::{Linker, Resource};
use wasmtime_wasi_http::p2::bindings;
use wasmtime_wasi_http::p2::bindings::http::outgoing_handler::Host as _;
use wasmtime_wasi_http::p2::bindings::http::types::{self, ErrorCode};
use wasmtime_wasi_http::p2::types::{HostFutureIncomingResponse, HostOutgoingRequest};
use wasmtime_wasi_http::{
    Error, ForbiddenHeaderFilter, RequestOptions, WasiBody, WasiHttp, WasiHttpHooks, WasiHttpView,
};

use super::call::{
    Code, FromGuest, MAX_CALLS, MAX_HEADER_BYTES, MAX_HEADERS, MAX_PATH, MAX_PIECE, Refusal, Request,
    ToGuest, WINDOW, cost,
};
use super::client::forbidden;
use super::grant::Scheme;
use crate::outcome::LogLevel;
use crate::output::{SharedCapture, lock};
use crate::state::{Host, LiveSink};

/// Bytes a guest may write to the body of a request in one call.
const WRITE_BYTES: usize = 64 << 10;
/// What one call keeps in this process at the most: both windows, two writes of the guest on their way, and headers
/// both ways. Counted against the attempt's memory when the call begins.
pub(crate) const CALL_BYTES: u64 = (2 * WINDOW + 2 * WRITE_BYTES + 2 * MAX_HEADER_BYTES) as u64;
/// Where refusals stand in the log of an attempt.
const LOG_TARGET: &str = "sandbar.http";

/// The interface of the library whose function for errors is replaced, under the library's own version of it.
const TYPES: &str = "wasi:http/types@0.2.12";

/// Takes messages about calls out of the process, and hands out what comes back.
#[derive(Default)]
pub struct Calls {
    next: AtomicU64,
    open: Mutex<HashMap<u64, Open>>,
}

struct Open {
    replies: UnboundedSender<ToGuest>,
    room: Arc<Semaphore>,
}

impl Calls {
    fn open(&self) -> MutexGuard<'_, HashMap<u64, Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new call: its number, its answers, and the room for its body.
    fn begin(&self) -> (u64, UnboundedReceiver<ToGuest>, Arc<Semaphore>) {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        // The parent keeps to the window, so no more than that waits here.
        let (replies, receiver) = unbounded_channel();
        let room = Arc::new(Semaphore::new(WINDOW));
        self.open().insert(number, Open { replies, room: room.clone() });
        (number, receiver, room)
    }

    /// The parent said something; of a call that is over it is forgotten.
    pub(crate) fn deliver(&self, call: u64, message: ToGuest) {
        if let Some(open) = self.open().get(&call) {
            match message {
                ToGuest::Room(bytes) => {
                    let room = WINDOW.saturating_sub(open.room.available_permits());
                    open.room.add_permits(room.min(bytes as usize));
                }
                other => {
                    let _ = open.replies.send(other);
                }
            }
        }
    }

    fn end(&self, call: u64) {
        self.open().remove(&call);
    }
}

/// One call, until the guest has let go of all of it.
struct Line {
    sink: Arc<dyn LiveSink>,
    token: u64,
    call: u64,
    live: Arc<AtomicUsize>,
}

impl Line {
    fn say(&self, message: FromGuest) {
        self.sink.http(self.token, self.call, message);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(calls) = self.sink.calls() {
            calls.end(self.call);
        }
        self.say(FromGuest::Closed);
        self.live.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What an attempt has to do with HTTP.
pub(crate) struct Hooks {
    /// Who carries; without it every request is denied.
    sink: Option<Arc<dyn LiveSink>>,
    token: u64,
    capture: SharedCapture,
    /// Calls that hold buffers.
    live: Arc<AtomicUsize>,
    /// Calls whose buffers have been counted; a call that is over leaves its share to the next.
    counted: usize,
}

impl Hooks {
    pub(crate) fn new(token: u64, capture: SharedCapture) -> Self {
        Self { sink: None, token, capture, live: Arc::default(), counted: 0 }
    }

    /// Lets requests out through this sink.
    pub(crate) fn carried_by(&mut self, sink: Option<Arc<dyn LiveSink>>) {
        self.sink = sink.filter(|sink| sink.calls().is_some());
    }
}

type Sent = Result<(http::Response<WasiBody>, Io), Error>;
type Io = Box<dyn Future<Output = Result<(), Error>> + Send>;

impl WasiHttpHooks for Hooks {
    fn forbidden_header_filter(&mut self) -> ForbiddenHeaderFilter {
        Arc::new(|name| forbidden(name.as_str()))
    }

    /// The parent writes it, from the destination that was checked.
    fn set_host_header(&mut self) -> bool {
        false
    }

    fn p2_outgoing_body_chunk_size(&mut self) -> usize {
        WRITE_BYTES
    }

    fn send_request(
        &mut self,
        request: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _done: Io,
    ) -> Box<dyn Future<Output = Sent> + Send> {
        let begun =
            self.sink.clone().and_then(|sink| sink.calls().map(Calls::begin).map(|begun| (sink, begun)));
        let Some((sink, (call, replies, room))) = begun else {
            return Box::new(std::future::ready(Err(Error::HttpRequestDenied)));
        };
        self.live.fetch_add(1, Ordering::AcqRel);
        let line = Arc::new(Line { sink, token: self.token, call, live: self.live.clone() });
        let notes = Notes { capture: self.capture.clone(), what: what(&request) };
        Box::new(async move {
            let ended = converse(line, replies, room, request, options.unwrap_or_default(), &notes).await;
            ended.map_err(|refusal| notes.refused(&refusal))
        })
    }
}

/// Method and destination, for the log: the path may hold what nobody should read there.
fn what(request: &http::Request<WasiBody>) -> [(String, String); 2] {
    let host = request.uri().authority().map_or_else(String::new, ToString::to_string);
    [("method".to_owned(), request.method().to_string()), ("host".to_owned(), host)]
}

/// Where refusals are written down.
#[derive(Clone)]
struct Notes {
    capture: SharedCapture,
    what: [(String, String); 2],
}

impl Notes {
    fn refused(&self, refusal: &Refusal) -> Error {
        let message = format!("HTTP request failed: {}", refusal.message);
        lock(&self.capture).record(LogLevel::Warn, LOG_TARGET, &message, &self.what);
        error(refusal.code)
    }
}

fn error(code: Code) -> Error {
    match code {
        Code::HttpRequestDenied => Error::HttpRequestDenied,
        Code::DestinationIpProhibited => Error::DestinationIpProhibited,
        Code::DnsTimeout => Error::DnsTimeout,
        Code::DnsError => Error::DnsError { rcode: None, info_code: None },
        Code::ConnectionRefused => Error::ConnectionRefused,
        Code::ConnectionTimeout => Error::ConnectionTimeout,
        Code::ConnectionTerminated => Error::ConnectionTerminated,
        Code::ConnectionLimitReached => Error::ConnectionLimitReached,
        Code::ConnectionReadTimeout => Error::ConnectionReadTimeout,
        Code::TlsProtocolError => Error::TlsProtocolError,
        Code::TlsCertificateError => Error::TlsCertificateError,
        Code::HttpRequestMethodInvalid => Error::HttpRequestMethodInvalid,
        Code::HttpRequestUriInvalid => Error::HttpRequestUriInvalid,
        Code::HttpRequestUriTooLong => Error::HttpRequestUriTooLong,
        Code::HttpRequestHeaderSectionSize => Error::HttpRequestHeaderSectionSize(None),
        Code::HttpRequestBodySize => Error::HttpRequestBodySize(None),
        Code::HttpResponseHeaderSectionSize => Error::HttpResponseHeaderSectionSize(None),
        Code::HttpResponseBodySize => Error::HttpResponseBodySize(None),
        Code::HttpResponseIncomplete => Error::HttpResponseIncomplete,
        Code::HttpResponseTimeout => Error::HttpResponseTimeout,
        Code::HttpProtocolError => Error::HttpProtocolError,
        Code::InternalError => Error::InternalError(None),
    }
}

/// The request as a message, if it keeps to the bounds: what does not is refused before it costs a frame.
fn message(parts: &http::request::Parts, body: bool, options: RequestOptions) -> Result<Request, Refusal> {
    let scheme = match parts.uri.scheme_str() {
        Some("http") => Scheme::Http,
        Some("https") => Scheme::Https,
        _ => return Err(Refusal::new(Code::HttpProtocolError, "only http and https can be used")),
    };
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    if path.len() > MAX_PATH {
        return Err(Refusal::new(
            Code::HttpRequestUriTooLong,
            format!("the path has more than {MAX_PATH} bytes"),
        ));
    }
    let bytes: usize = parts.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes > MAX_HEADER_BYTES || parts.headers.len() > MAX_HEADERS {
        return Err(Refusal::new(
            Code::HttpRequestHeaderSectionSize,
            format!("the request has more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them"),
        ));
    }
    let ms =
        |time: Option<std::time::Duration>| time.map(|t| u64::try_from(t.as_millis()).unwrap_or(u64::MAX));
    Ok(Request {
        method: parts.method.as_str().to_owned(),
        scheme,
        authority: parts.uri.authority().map_or_else(String::new, ToString::to_string),
        path: path.to_owned(),
        headers: parts
            .headers
            .iter()
            .map(|(name, value)| (name.as_str().to_owned(), value.as_bytes().to_vec()))
            .collect(),
        body,
        connect_ms: ms(options.connect_timeout),
        first_byte_ms: ms(options.first_byte_timeout),
        between_bytes_ms: ms(options.between_bytes_timeout),
    })
}

fn broken() -> Refusal {
    Refusal::new(Code::ConnectionTerminated, "the call was ended by the worker")
}

/// One call from the request to the head of its response; the rest of the upload and the response's body go on after.
async fn converse(
    line: Arc<Line>,
    mut replies: UnboundedReceiver<ToGuest>,
    room: Arc<Semaphore>,
    request: http::Request<WasiBody>,
    options: RequestOptions,
    notes: &Notes,
) -> Result<(http::Response<WasiBody>, Io), Refusal> {
    let (parts, body) = request.into_parts();
    let has_body = !body.is_end_stream();
    line.say(FromGuest::Request(Box::new(message(&parts, has_body, options)?)));
    let mut sending = Box::pin(upload(line.clone(), room, body));
    let mut sent = !has_body;
    let (status, headers) = loop {
        tokio::select! {
            done = &mut sending, if !sent => {
                sent = true;
                done?;
            }
            reply = replies.recv() => match reply {
                Some(ToGuest::Head { status, headers }) => break (status, headers),
                Some(ToGuest::Refused(refusal)) => return Err(refusal),
                // Room never comes this way, and nothing else comes before the head.
                _ => return Err(broken()),
            },
        }
    };
    let incoming = Incoming { line, replies, taken: 0, notes: notes.clone(), over: AtomicBool::new(false) };
    let mut response = http::Response::new(incoming.boxed_unsync());
    *response.status_mut() = http::StatusCode::from_u16(status).map_err(|_| broken())?;
    for (name, value) in headers {
        let name = http::HeaderName::from_bytes(name.as_bytes()).map_err(|_| broken())?;
        let value = http::HeaderValue::from_bytes(&value).map_err(|_| broken())?;
        response.headers_mut().append(name, value);
    }
    let rest: Io = if sent {
        Box::new(std::future::ready(Ok(())))
    } else {
        Box::new(async move { sending.await.map_err(|refusal| error(refusal.code)) })
    };
    Ok((response, rest))
}

/// Sends the body of a request, as far as there is room.
async fn upload(line: Arc<Line>, room: Arc<Semaphore>, mut body: WasiBody) -> Result<(), Refusal> {
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| {
            Refusal::new(Code::ConnectionTerminated, "the guest did not finish the body of its request")
        })?;
        // Trailers of requests are not sent: hardly a server reads them.
        let Ok(mut data) = frame.into_data() else { continue };
        while !data.is_empty() {
            let piece = data.split_to(data.len().min(MAX_PIECE));
            room.acquire_many(cost(piece.len())).await.map_err(|_| broken())?.forget();
            line.say(FromGuest::Body(piece.to_vec()));
        }
    }
    line.say(FromGuest::BodyEnd);
    Ok(())
}

/// The body of a response, as the guest reads it.
struct Incoming {
    line: Arc<Line>,
    replies: UnboundedReceiver<ToGuest>,
    /// What was taken and for which no room has been given yet.
    taken: u32,
    notes: Notes,
    over: AtomicBool,
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if self.over.load(Ordering::Relaxed) {
            return Poll::Ready(None);
        }
        let Poll::Ready(reply) = self.replies.poll_recv(cx) else { return Poll::Pending };
        if let Some(ToGuest::Body(bytes)) = reply {
            self.taken = self.taken.saturating_add(cost(bytes.len()));
            // In quarters: a message for each piece would cost more than the piece.
            if self.taken as usize >= WINDOW / 4 {
                let taken = std::mem::take(&mut self.taken);
                self.line.say(FromGuest::Room(taken));
            }
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from(bytes)))));
        }
        self.over.store(true, Ordering::Relaxed);
        match reply {
            Some(ToGuest::End) => Poll::Ready(None),
            Some(ToGuest::Refused(refusal)) => Poll::Ready(Some(Err(self.notes.refused(&refusal)))),
            _ => Poll::Ready(Some(Err(self.notes.refused(&broken())))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

/// Links `wasi:http`.
pub(crate) fn link(linker: &mut Linker<Host>) -> wasmtime::Result<()> {
    let options = bindings::LinkOptions::default();
    types::add_to_linker::<Host, WasiHttp>(linker, &(&options).into(), WasiHttpView::http)?;
    linker.instance("wasi:http/outgoing-handler@0.2.0")?.func_wrap("handle", handle)?;
    linker.allow_shadowing(true);
    linker.instance(TYPES)?.func_wrap("http-error-code", error_code)?;
    linker.allow_shadowing(false);
    Ok(())
}

/// What ended a body. The library's own looks for a form of errors that bodies do not end with, and finds nothing.
fn error_code(
    mut cx: StoreContextMut<'_, Host>,
    (error,): (Resource<types::IoError>,),
) -> wasmtime::Result<(Option<ErrorCode>,)> {
    let host = cx.data_mut();
    host.common.calls += 1;
    let code = host.table.get(&error)?.downcast_ref::<Error>().map(|error| match error {
        Error::HttpResponseBodySize(size) => ErrorCode::HttpResponseBodySize(*size),
        Error::HttpResponseIncomplete => ErrorCode::HttpResponseIncomplete,
        Error::HttpProtocolError => ErrorCode::HttpProtocolError,
        Error::ConnectionReadTimeout => ErrorCode::ConnectionReadTimeout,
        Error::ConnectionTerminated => ErrorCode::ConnectionTerminated,
        other => ErrorCode::InternalError(Some(other.to_string())),
    });
    Ok((code,))
}

type Handled = Result<Resource<HostFutureIncomingResponse>, ErrorCode>;

/// The library's own, behind the bounds of an attempt.
fn handle(
    mut cx: StoreContextMut<'_, Host>,
    (request, options): (Resource<HostOutgoingRequest>, Option<Resource<types::RequestOptions>>),
) -> wasmtime::Result<(Handled,)> {
    let host = cx.data_mut();
    if let Err(refused) = admit(host) {
        host.common.calls += 1;
        host.table.delete(request)?;
        return Ok((Err(refused),));
    }
    match host.http().handle(request, options) {
        Ok(response) => Ok((Ok(response),)),
        Err(error) => Ok((Err(error.downcast()?),)),
    }
}

/// Whether one more call may begin: not too many at once, and their buffers within the attempt's memory.
fn admit(host: &mut Host) -> Result<(), ErrorCode> {
    let hooks = &mut host.hooks;
    if hooks.sink.is_none() {
        return Err(ErrorCode::HttpRequestDenied);
    }
    let live = hooks.live.load(Ordering::Acquire);
    let refusal = if live >= MAX_CALLS {
        let words = format!("{MAX_CALLS} requests are under way, as many as an attempt may have");
        Some((ErrorCode::ConnectionLimitReached, words))
    } else if live < hooks.counted {
        None
    } else if host.common.limiter.hold(CALL_BYTES) {
        hooks.counted += 1;
        None
    } else {
        let words =
            format!("the attempt has no {CALL_BYTES} bytes of memory left for the buffers of a request");
        Some((ErrorCode::InternalError(Some("out of memory".to_owned())), words))
    };
    match refusal {
        None => Ok(()),
        Some((code, words)) => {
            let message = format!("HTTP request failed: {words}");
            lock(&hooks.capture).record(LogLevel::Warn, LOG_TARGET, &message, &[]);
            Err(code)
        }
    }
}
