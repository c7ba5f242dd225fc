//! The parent's side of HTTP: one request, dialled by the rules. Owns resolving, checking every address, dialling what
//! was checked and nothing else, TLS, and the bounds on headers and times. One connection per request: nothing is shared
//! between tenants. No proxy, no redirect, no cookie, no environment: a guest that follows a redirect makes a new
//! request, which is checked like the first. Believes nothing of what a cell says.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HOST};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
pub use http_body::Frame;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsConnector;

use super::address::Networks;
use super::call::{Code, Headers, MAX_HEADER_BYTES, MAX_HEADERS, MAX_PATH, Refusal, Request};
use super::grant::{Destination, Host, HttpGrant, Scheme};

/// Resolutions at once: each holds a thread of the process while the system's resolver thinks.
const MAX_RESOLUTIONS: usize = 32;
/// Longest resolution, the wait for a place included.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Addresses of a name that are looked at; a name with more is refused, since all must be checked.
const MAX_ADDRESSES: usize = 32;
/// Longest time to a connection, TLS included, over all addresses.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time to one address while there are others to try.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for the head of a response; an attempt that runs longer than this may ask again.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(600);
/// Bytes that a connection buffers of a response's head: names, values and what is between them.
const HEAD_BYTES: usize = MAX_HEADER_BYTES * 2;

/// Headers that belong to the connection, which is ours.
const FORBIDDEN: [&str; 11] = [
    "connection",
    "expect",
    "host",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Whether a guest may not send this header; the name is in lower case.
#[must_use]
pub fn forbidden(name: &str) -> bool {
    FORBIDDEN.contains(&name)
}

type Addresses = Pin<Box<dyn Future<Output = io::Result<Vec<IpAddr>>> + Send>>;
/// Asks for the addresses of a name.
type Resolve = dyn Fn(String) -> Addresses + Send + Sync;

/// Dials for guests.
pub struct Client {
    networks: Networks,
    tls: TlsConnector,
    resolve: Box<Resolve>,
    resolving: Semaphore,
}

/// The body of a request on its way out.
pub type RequestBody = UnsyncBoxBody<Bytes, io::Error>;

/// The head of a response, and what follows.
pub struct Answer {
    /// Such as 200.
    pub status: u16,
    /// Within the bounds.
    pub headers: Headers,
    /// What follows.
    pub body: Incoming,
    /// Ends with the response.
    pub connection: Connection,
}

/// A connection of one request. Dropping it closes it.
pub struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Client {
    /// With the system's resolver and its trusted certificates. `networks`: what the operator opens besides what is
    /// public; `roots`: authorities that are trusted besides.
    ///
    /// # Errors
    /// One of `roots` is no certificate that could be trusted, or TLS cannot be set up.
    pub fn new(networks: Networks, roots: &[CertificateDer<'static>]) -> io::Result<Self> {
        Self::resolving_by(networks, roots, |name| {
            Box::pin(async move {
                // The port means nothing here; it comes from the destination.
                Ok(tokio::net::lookup_host((name, 0)).await?.map(|address| address.ip()).collect())
            })
        })
    }

    fn resolving_by(
        networks: Networks,
        extra: &[CertificateDer<'static>],
        resolve: impl Fn(String) -> Addresses + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        // A store with broken certificates among good ones serves with the good ones; one without any trusts nobody.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        for one in extra {
            roots.add(one.clone()).map_err(io::Error::other)?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Sessions would tell a server that two requests of different tenants come from one place.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(Self {
            networks,
            tls: TlsConnector::from(Arc::new(config)),
            resolve: Box::new(resolve),
            resolving: Semaphore::new(MAX_RESOLUTIONS),
        })
    }

    /// Sends a request and waits for the head of its response.
    ///
    /// # Errors
    /// It is not granted, its destination may not be reached, or it fails; nothing was sent unless the words say so.
    pub async fn send(
        &self,
        grants: &[HttpGrant],
        request: &Request,
        body: RequestBody,
    ) -> Result<Answer, Refusal> {
        let to = Destination::parse(request.scheme, &request.authority)
            .map_err(|error| Refusal::new(Code::HttpRequestUriInvalid, error.to_string()))?;
        if !grants.iter().any(|grant| grant.allows(&to)) {
            return Err(Refusal::new(
                Code::HttpRequestDenied,
                format!("the task has no grant for {to}; an admin of the tenant can give it"),
            ));
        }
        let request_head = head(request, &to)?;
        let deadline = Instant::now() + at_most(request.connect_ms, CONNECT_TIMEOUT);
        let addresses = self.addresses(&to).await?;
        let connecting = self.connect(&to, &addresses, deadline);
        let stream = timeout_at(deadline, connecting).await.map_err(|_| connect_timeout())??;
        let (mut sender, connection) = http1::Builder::new()
            .max_buf_size(HEAD_BYTES)
            .max_headers(MAX_HEADERS)
            .handshake::<_, RequestBody>(TokioIo::new(stream))
            .await
            .map_err(|error| failed(&error))?;
        let connection = Connection(tokio::spawn(async move {
            // Whoever waits for the response or its body hears of it.
            let _ = connection.await;
        }));
        let (mut parts, ()) = http::Request::new(()).into_parts();
        (parts.method, parts.uri, parts.headers) = request_head;
        let wait = at_most(request.first_byte_ms, FIRST_BYTE_TIMEOUT);
        let response = timeout(wait, sender.send_request(http::Request::from_parts(parts, body)))
            .await
            .map_err(|_| Refusal::new(Code::HttpResponseTimeout, format!("{to} did not answer in time")))?
            .map_err(|error| failed(&error))?;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Err(Refusal::new(
                Code::HttpProtocolError,
                format!("{to} wants to speak another protocol"),
            ));
        }
        let (parts, body) = response.into_parts();
        Ok(Answer { status: parts.status.as_u16(), headers: headers_of(&parts.headers)?, body, connection })
    }

    /// Every address of the destination, each allowed.
    async fn addresses(&self, to: &Destination) -> Result<Vec<IpAddr>, Refusal> {
        let addresses = match &to.host {
            Host::Address(address) => vec![*address],
            Host::Name(name) => {
                let resolution = async {
                    let _place = self.resolving.acquire().await;
                    (self.resolve)(name.clone()).await
                };
                let mut found = timeout(RESOLVE_TIMEOUT, resolution)
                    .await
                    .map_err(|_| {
                        Refusal::new(Code::DnsTimeout, format!("{name} could not be resolved in time"))
                    })?
                    .map_err(|_| Refusal::new(Code::DnsError, format!("{name} cannot be resolved")))?;
                found.dedup();
                found
            }
        };
        if addresses.is_empty() || addresses.len() > MAX_ADDRESSES {
            let found = addresses.len();
            return Err(Refusal::new(Code::DnsError, format!("{} has {found} addresses", to.host)));
        }
        self.networks.check_all(&addresses).map_err(|scope| {
            Refusal::new(
                Code::DestinationIpProhibited,
                format!("{} leads to {scope}, which is refused", to.host),
            )
        })?;
        Ok(addresses)
    }

    /// Dials the addresses in order until one answers.
    async fn connect(
        &self,
        to: &Destination,
        addresses: &[IpAddr],
        deadline: Instant,
    ) -> Result<Box<dyn Stream>, Refusal> {
        let mut last = Refusal::new(Code::ConnectionRefused, format!("{to} does not accept connections"));
        for (tried, address) in addresses.iter().enumerate() {
            let until = match addresses.len() - tried {
                1 => deadline,
                _ => deadline.min(Instant::now() + ADDRESS_TIMEOUT),
            };
            match timeout_at(until, TcpStream::connect(SocketAddr::new(*address, to.port))).await {
                Ok(Ok(stream)) => {
                    // A small request is not to wait for the answer to the packet before it.
                    let _ = stream.set_nodelay(true);
                    return match to.scheme {
                        Scheme::Http => Ok(Box::new(stream)),
                        Scheme::Https => self.secure(to, stream).await,
                    };
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Ok(Err(_)) => {
                    last = Refusal::new(Code::ConnectionRefused, format!("{to} cannot be reached"));
                }
                Err(_) => last = connect_timeout(),
            }
        }
        Err(last)
    }

    async fn secure(&self, to: &Destination, stream: TcpStream) -> Result<Box<dyn Stream>, Refusal> {
        let name = match &to.host {
            Host::Name(name) => ServerName::try_from(name.clone())
                .map_err(|_| Refusal::new(Code::TlsProtocolError, format!("{name} is no name for TLS")))?,
            Host::Address(address) => ServerName::IpAddress((*address).into()),
        };
        match self.tls.connect(name, stream).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => {
                let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
                let certificate = matches!(inner, Some(rustls::Error::InvalidCertificate(_)));
                let code = if certificate { Code::TlsCertificateError } else { Code::TlsProtocolError };
                Err(Refusal::new(code, format!("no secure connection to {to}: {error}")))
            }
        }
    }
}

/// What a connection runs over.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

fn at_most(asked_ms: Option<u64>, most: Duration) -> Duration {
    asked_ms.map_or(most, |ms| Duration::from_millis(ms).min(most))
}

fn connect_timeout() -> Refusal {
    Refusal::new(Code::ConnectionTimeout, "no connection in time")
}

/// Whether a request could be sent at all, wherever it is allowed to go: the same rules as when it is.
///
/// # Errors
/// Its destination, method, path or headers are malformed, too long, or not the guest's to set.
pub fn check(request: &Request) -> Result<(), Refusal> {
    let to = Destination::parse(request.scheme, &request.authority)
        .map_err(|error| Refusal::new(Code::HttpRequestUriInvalid, error.to_string()))?;
    head(request, &to).map(drop)
}

/// Method, target and headers of a request, checked as if nobody had before.
fn head(request: &Request, to: &Destination) -> Result<(Method, http::Uri, HeaderMap), Refusal> {
    let method = Method::from_bytes(request.method.as_bytes())
        .map_err(|_| Refusal::new(Code::HttpRequestMethodInvalid, "the method is malformed"))?;
    if method == Method::CONNECT {
        // It would make a raw socket of the connection.
        return Err(Refusal::new(Code::HttpRequestMethodInvalid, "CONNECT cannot be used"));
    }
    if request.path.len() > MAX_PATH {
        return Err(Refusal::new(
            Code::HttpRequestUriTooLong,
            format!("the path has more than {MAX_PATH} bytes"),
        ));
    }
    // Only the path goes on the request line: anything else there could address another host.
    let path = match request.path.as_str() {
        "" => "/".to_owned(),
        path if path.starts_with('?') => format!("/{path}"),
        path => path.to_owned(),
    };
    let uri = path
        .starts_with('/')
        .then(|| http::uri::PathAndQuery::try_from(path).ok().map(http::Uri::from))
        .flatten()
        .ok_or_else(|| Refusal::new(Code::HttpRequestUriInvalid, "the path is malformed"))?;
    let bytes: usize = request.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > MAX_HEADER_BYTES || request.headers.len() > MAX_HEADERS {
        return Err(Refusal::new(
            Code::HttpRequestHeaderSectionSize,
            format!("the request has more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them"),
        ));
    }
    let malformed = || Refusal::new(Code::HttpProtocolError, "a header is malformed or may not be set");
    let mut headers = HeaderMap::with_capacity(request.headers.len() + 1);
    headers.insert(HOST, HeaderValue::from_str(&to.authority()).map_err(|_| malformed())?);
    for (name, value) in &request.headers {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| malformed())?;
        let value = HeaderValue::from_bytes(value).map_err(|_| malformed())?;
        // Two lengths, or one that is no number, are two requests to some servers.
        let length = name == CONTENT_LENGTH
            && (headers.contains_key(&name) || !value.as_bytes().iter().all(u8::is_ascii_digit));
        if forbidden(name.as_str()) || length {
            return Err(malformed());
        }
        headers.append(name, value);
    }
    Ok((method, uri, headers))
}

fn headers_of(map: &HeaderMap) -> Result<Headers, Refusal> {
    let bytes: usize = map.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if bytes > MAX_HEADER_BYTES {
        return Err(too_many_headers());
    }
    Ok(map.iter().map(|(name, value)| (name.as_str().to_owned(), value.as_bytes().to_vec())).collect())
}

fn too_many_headers() -> Refusal {
    Refusal::new(
        Code::HttpResponseHeaderSectionSize,
        format!("the response has more than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them"),
    )
}

/// What became of a request whose connection stood.
fn failed(error: &hyper::Error) -> Refusal {
    if error.is_parse_too_large() {
        too_many_headers()
    } else if error.is_parse() {
        Refusal::new(Code::HttpProtocolError, "the answer is no HTTP")
    } else if error.is_user() {
        Refusal::new(
            Code::HttpRequestBodySize,
            "the body of the request is not what its length says, or broke off",
        )
    } else if error.is_incomplete_message() {
        Refusal::new(Code::HttpResponseIncomplete, "the connection was closed before the answer was complete")
    } else {
        Refusal::new(Code::ConnectionTerminated, "the connection broke")
    }
}

/// What became of a response whose body broke off.
#[must_use]
pub fn broken_body(error: &hyper::Error) -> Refusal {
    failed(error)
}

#[cfg(test)]
mod tests;
