//! HTTP in a component: `wasi:http/outgoing-handler`, waited for.

use std::time::Duration;

use wasip2::http::outgoing_handler;
use wasip2::http::types::{
    ErrorCode, Fields, IncomingBody, IncomingResponse, Method, OutgoingBody, OutgoingRequest, RequestOptions,
    Scheme, http_error_code,
};
use wasip2::io::streams::StreamError;

use super::{Error, Request, Response};

/// Bytes asked for in one read.
const READ: u64 = 64 << 10;

pub(super) fn send(request: &Request) -> Result<Response, Error> {
    let (secure, authority, path) = request.parts()?;
    let fields = Fields::new();
    for (name, value) in &request.headers {
        fields.append(name, value).map_err(|_| Error::new("HTTP-request-header-size"))?;
    }
    let sized = request.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    if !request.body.is_empty() && !sized {
        let length = request.body.len().to_string();
        fields.append("content-length", length.as_bytes()).map_err(|_| internal())?;
    }
    let outgoing = OutgoingRequest::new(fields);
    outgoing.set_method(&method(&request.method)).map_err(|()| Error::new("HTTP-request-method-invalid"))?;
    let scheme = if secure { Scheme::Https } else { Scheme::Http };
    let invalid = |()| Error::new("HTTP-request-URI-invalid");
    outgoing.set_scheme(Some(&scheme)).map_err(invalid)?;
    outgoing.set_authority(Some(authority)).map_err(invalid)?;
    outgoing.set_path_with_query(Some(if path.is_empty() { "/" } else { path })).map_err(invalid)?;
    let body = match request.body.is_empty() {
        true => None,
        false => Some(outgoing.body().map_err(|()| internal())?),
    };
    let options = RequestOptions::new();
    let ns = |time: Option<Duration>| time.map(|t| u64::try_from(t.as_nanos()).unwrap_or(u64::MAX));
    // A host that knows no timeouts has its own.
    let _ = options.set_connect_timeout(ns(request.connect));
    let _ = options.set_first_byte_timeout(ns(request.first_byte));
    let future = outgoing_handler::handle(outgoing, Some(options)).map_err(|code| named(&code))?;
    if let Some(body) = body {
        // Whoever refuses the request does not read its body: the answer says why.
        if write(&body, &request.body).is_ok() {
            let _ = OutgoingBody::finish(body, None);
        }
    }
    future.subscribe().block();
    match future.get() {
        Some(Ok(Ok(response))) => read(&response, request.max_bytes),
        Some(Ok(Err(code))) => Err(named(&code)),
        _ => Err(internal()),
    }
}

fn write(body: &OutgoingBody, mut bytes: &[u8]) -> Result<(), StreamError> {
    let stream = body.write().map_err(|()| StreamError::Closed)?;
    while !bytes.is_empty() {
        let room = usize::try_from(stream.check_write()?).unwrap_or(usize::MAX).min(bytes.len());
        if room == 0 {
            stream.subscribe().block();
            continue;
        }
        let (now, rest) = bytes.split_at(room);
        stream.write(now)?;
        bytes = rest;
    }
    stream.blocking_flush()
}

fn read(response: &IncomingResponse, max_bytes: usize) -> Result<Response, Error> {
    let headers = response.headers().entries();
    let body = response.consume().map_err(|()| internal())?;
    let bytes = drain(&body, max_bytes)?;
    Ok(Response { status: response.status(), headers, body: bytes })
}

fn drain(body: &IncomingBody, max_bytes: usize) -> Result<Vec<u8>, Error> {
    let stream = body.stream().map_err(|()| internal())?;
    let mut bytes = Vec::new();
    loop {
        match stream.blocking_read(READ) {
            Ok(more) if bytes.len() + more.len() > max_bytes => {
                return Err(Error::new("HTTP-response-body-size"));
            }
            Ok(more) => bytes.extend_from_slice(&more),
            Err(StreamError::Closed) => return Ok(bytes),
            Err(StreamError::LastOperationFailed(error)) => {
                return Err(http_error_code(&error).map_or_else(internal, |code| named(&code)));
            }
        }
    }
}

fn method(name: &str) -> Method {
    match name {
        "GET" => Method::Get,
        "HEAD" => Method::Head,
        "POST" => Method::Post,
        "PUT" => Method::Put,
        "DELETE" => Method::Delete,
        "CONNECT" => Method::Connect,
        "OPTIONS" => Method::Options,
        "TRACE" => Method::Trace,
        "PATCH" => Method::Patch,
        other => Method::Other(other.to_owned()),
    }
}

fn internal() -> Error {
    Error::new("internal-error")
}

/// The name of a code as the standard writes it.
fn named(code: &ErrorCode) -> Error {
    Error::new(match code {
        ErrorCode::DnsTimeout => "DNS-timeout",
        ErrorCode::DnsError(_) => "DNS-error",
        ErrorCode::DestinationNotFound => "destination-not-found",
        ErrorCode::DestinationUnavailable => "destination-unavailable",
        ErrorCode::DestinationIpProhibited => "destination-IP-prohibited",
        ErrorCode::DestinationIpUnroutable => "destination-IP-unroutable",
        ErrorCode::ConnectionRefused => "connection-refused",
        ErrorCode::ConnectionTerminated => "connection-terminated",
        ErrorCode::ConnectionTimeout => "connection-timeout",
        ErrorCode::ConnectionReadTimeout => "connection-read-timeout",
        ErrorCode::ConnectionWriteTimeout => "connection-write-timeout",
        ErrorCode::ConnectionLimitReached => "connection-limit-reached",
        ErrorCode::TlsProtocolError => "TLS-protocol-error",
        ErrorCode::TlsCertificateError => "TLS-certificate-error",
        ErrorCode::TlsAlertReceived(_) => "TLS-alert-received",
        ErrorCode::HttpRequestDenied => "HTTP-request-denied",
        ErrorCode::HttpRequestLengthRequired => "HTTP-request-length-required",
        ErrorCode::HttpRequestBodySize(_) => "HTTP-request-body-size",
        ErrorCode::HttpRequestMethodInvalid => "HTTP-request-method-invalid",
        ErrorCode::HttpRequestUriInvalid => "HTTP-request-URI-invalid",
        ErrorCode::HttpRequestUriTooLong => "HTTP-request-URI-too-long",
        ErrorCode::HttpRequestHeaderSectionSize(_) => "HTTP-request-header-section-size",
        ErrorCode::HttpRequestHeaderSize(_) => "HTTP-request-header-size",
        ErrorCode::HttpResponseIncomplete => "HTTP-response-incomplete",
        ErrorCode::HttpResponseHeaderSectionSize(_) => "HTTP-response-header-section-size",
        ErrorCode::HttpResponseBodySize(_) => "HTTP-response-body-size",
        ErrorCode::HttpResponseTimeout => "HTTP-response-timeout",
        ErrorCode::HttpProtocolError => "HTTP-protocol-error",
        _ => "internal-error",
    })
}
