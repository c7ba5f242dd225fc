//! HTTP requests of guests, carried out for them: cells have no network. Owns which attempt a call belongs to, its caps,
//! and that nothing goes on once an attempt has ended, is cancelled or its lease is lost. The rules about destinations
//! are the host crate's; grants are asked of the database for every request, so one that is taken away is gone at once.
//! Believes no cell: bodies come in pieces, within the window, or the call ends. `own`: requests that the worker makes
//! itself, by the same rules.

pub mod allowance;
mod own;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt, Empty, StreamBody};
use rustls::pki_types::CertificateDer;
use sandbar_host::cell::Cell;
use sandbar_host::egress::address::Networks;
use sandbar_host::egress::call::{
    Code, FromGuest, MAX_CALLS, MAX_PIECE, MAX_PIECES, Refusal, Request, ToGuest, WINDOW, cost,
};
use sandbar_host::egress::client::{Answer, Client, Frame, RequestBody, broken_body};
use sandbar_host::egress::grant::{Destination, HttpGrant};
use sandbar_host::egress::placeholder;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tracing::{debug, warn};

pub use allowance::{Allowance, Short};
pub use own::{Fetched, NotSent, Own};

use crate::app::secret;
use crate::app::vault::Vault;
use crate::domain::ids::{InvocationId, TaskId, TenantId};
use crate::domain::quota::Quota;
use crate::store::WorkerStore;
use crate::store::grant::Grants;
use crate::store::kv::AttemptName;
use crate::worker::lease::Lease;

/// Calls at once of all attempts of a worker: each is a socket, and a quarter of a MiB of buffers when both sides stall.
const MAX_CALLS_PER_WORKER: usize = 1_024;
/// Calls at once of one tenant in a worker, so that it leaves sockets to others.
const MAX_CALLS_PER_TENANT: usize = 256;
/// Longest wait for the next piece of a response.
const BETWEEN_BYTES: Duration = Duration::from_secs(60);

/// What an operator sets.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Networks that are opened besides public ones.
    pub private_networks: Networks,
    /// Authorities that HTTPS trusts besides the system's.
    pub roots: Vec<CertificateDer<'static>>,
    /// Bytes of bodies that one attempt may send.
    pub sent_bytes: u64,
    /// Bytes of bodies that one attempt may receive.
    pub received_bytes: u64,
}

/// Everything guests of this worker do by HTTP. Dropping it ends it.
pub struct Egress {
    client: Arc<Client>,
    store: WorkerStore,
    vault: Arc<Vault>,
    settings: Settings,
    allowance: Arc<Allowance>,
    attempts: HashMap<u64, Attempt>,
    /// Calls that have a task, over all attempts and by tenant.
    live: Arc<AtomicUsize>,
    tenants: HashMap<TenantId, Arc<AtomicUsize>>,
}

#[derive(Default)]
struct Attempt {
    calls: HashMap<u64, Call>,
    meter: Arc<Meter>,
    /// Why nothing more is carried.
    closed: bool,
}

/// Bytes of bodies, both ways.
#[derive(Default)]
struct Meter {
    sent: AtomicU64,
    received: AtomicU64,
}

impl Meter {
    /// Counts, and says whether that is still within the cap.
    fn add(count: &AtomicU64, bytes: usize, cap: u64) -> bool {
        count.fetch_add(bytes as u64, Ordering::AcqRel).saturating_add(bytes as u64) <= cap
    }

    fn sum(&self) -> u64 {
        self.sent.load(Ordering::Acquire).saturating_add(self.received.load(Ordering::Acquire))
    }
}

struct Call {
    /// Pieces of the request on their way to the connection, and `None` for their end; gone when that was said. Dropped
    /// before, the body has broken off.
    body: Option<mpsc::Sender<Option<Bytes>>>,
    /// What was taken in of the request and not yet passed on.
    waiting: Arc<AtomicUsize>,
    /// Room of the response.
    room: Arc<Semaphore>,
    task: JoinHandle<()>,
}

impl Drop for Call {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One that counts as long as it lives.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Whose call it is.
#[derive(Debug, Clone, Copy)]
pub struct Whose {
    /// The tenant.
    pub tenant: TenantId,
    /// The task.
    pub task: TaskId,
    /// The invocation.
    pub invocation: InvocationId,
    /// Its attempt.
    pub attempt: AttemptName,
}

impl Whose {
    /// Whose quotas count it.
    fn of(self) -> (TenantId, TaskId) {
        (self.tenant, self.task)
    }
}

impl Egress {
    /// Nothing under way.
    ///
    /// # Errors
    /// One of the roots cannot be trusted, or TLS cannot be set up.
    pub fn new(
        settings: Settings,
        store: WorkerStore,
        vault: Arc<Vault>,
        allowance: Arc<Allowance>,
    ) -> io::Result<Self> {
        let client = Arc::new(Client::new(settings.private_networks.clone(), &settings.roots)?);
        Ok(Self {
            client,
            store,
            vault,
            settings,
            allowance,
            attempts: HashMap::new(),
            live: Arc::default(),
            tenants: HashMap::new(),
        })
    }

    /// A guest says something about a call. The caller has made sure that the attempt is in this cell.
    pub fn hear(
        &mut self,
        lease: &Lease,
        whose: Whose,
        cell: &Arc<Cell>,
        token: u64,
        number: u64,
        message: FromGuest,
    ) {
        let attempt = self.attempts.entry(token).or_default();
        match message {
            FromGuest::Request(request) => self.begin(lease, whose, cell, token, number, *request),
            FromGuest::Closed => {
                attempt.calls.remove(&number);
            }
            other => {
                if let Some(call) = attempt.calls.get_mut(&number)
                    && !call.hear(other)
                {
                    warn!(invocation = %whose.invocation, "a cell breaks the rules of a call: it is ended");
                    attempt.calls.remove(&number);
                    cell.http(
                        number,
                        refused(Code::InternalError, "the call broke the rules of its protocol"),
                    );
                }
            }
        }
    }

    fn begin(
        &mut self,
        lease: &Lease,
        whose: Whose,
        cell: &Arc<Cell>,
        token: u64,
        number: u64,
        request: Request,
    ) {
        let tenant = self.tenants.entry(whose.tenant).or_default().clone();
        let Some(attempt) = self.attempts.get_mut(&token) else { return };
        let words = if attempt.closed || !lease.is_held() {
            Some((Code::ConnectionTerminated, "the attempt is to end"))
        } else if attempt.calls.len() >= MAX_CALLS {
            Some((Code::ConnectionLimitReached, "the attempt has as many requests under way as it may"))
        } else if is_full(&self.live, &tenant) {
            Some((Code::ConnectionLimitReached, FULL))
        } else if attempt.calls.contains_key(&number) {
            Some((Code::InternalError, "the call exists"))
        } else {
            None
        };
        if let Some((code, words)) = words {
            cell.http(number, refused(code, words));
            return;
        }
        // A window full of pieces, and their end.
        let (sender, pieces) = mpsc::channel(MAX_PIECES + 1);
        let waiting = Arc::new(AtomicUsize::new(0));
        let room = Arc::new(Semaphore::new(WINDOW));
        let body = request.body.then_some(sender);
        let line = Line {
            cell: cell.clone(),
            number,
            whose: whose.of(),
            allowance: self.allowance.clone(),
            meter: attempt.meter.clone(),
            room: room.clone(),
            waiting: waiting.clone(),
            sent_cap: self.settings.sent_bytes,
            received_cap: self.settings.received_bytes,
            _counted: [Counted::new(&self.live), Counted::new(&tenant)],
        };
        let (client, store, vault) = (self.client.clone(), self.store.clone(), self.vault.clone());
        let task = tokio::spawn(async move {
            if let Err(refusal) = line.carry(&client, (&store, &vault), whose, request, pieces).await {
                debug!(invocation = %whose.invocation, tenant = %whose.tenant, code = ?refusal.code, "egress refused: {refusal}");
                line.cell.http(line.number, ToGuest::Refused(refusal));
            }
        });
        attempt.calls.insert(number, Call { body, waiting, room, task });
    }

    /// The attempt is to end: nothing of it goes on, and nothing more begins.
    pub fn close(&mut self, token: u64) {
        let attempt = self.attempts.entry(token).or_default();
        attempt.closed = true;
        attempt.calls.clear();
    }

    /// The attempt has ended. Bytes of bodies that went both ways.
    pub fn end(&mut self, token: u64) -> u64 {
        self.tenants.retain(|_, calls| Arc::strong_count(calls) > 1);
        self.attempts.remove(&token).map_or(0, |attempt| attempt.meter.sum())
    }

    /// Nothing goes on.
    pub fn abandon(&mut self) {
        self.attempts.clear();
        self.tenants.clear();
    }
}

impl Call {
    /// False: the cell did what it may not.
    fn hear(&mut self, message: FromGuest) -> bool {
        match message {
            FromGuest::Body(piece) => {
                let cost = cost(piece.len()) as usize;
                let Some(body) = &self.body else { return false };
                // The answer may have come before all of the body was read: nobody reads the rest.
                if body.is_closed() {
                    return true;
                }
                let fits = piece.len() <= MAX_PIECE
                    && self.waiting.fetch_add(cost, Ordering::AcqRel).saturating_add(cost) <= WINDOW;
                fits && !matches!(
                    body.try_send(Some(Bytes::from(piece))),
                    Err(mpsc::error::TrySendError::Full(_))
                )
            }
            FromGuest::BodyEnd => self
                .body
                .take()
                .is_some_and(|body| !matches!(body.try_send(None), Err(mpsc::error::TrySendError::Full(_)))),
            FromGuest::Room(bytes) => {
                let fits = self.room.available_permits().saturating_add(bytes as usize) <= WINDOW;
                if fits {
                    self.room.add_permits(bytes as usize);
                }
                fits
            }
            FromGuest::Request(_) | FromGuest::Closed => false,
        }
    }
}

/// Words for [`is_full`].
const FULL: &str = "the worker has as many requests under way as it takes";

/// Whether no more requests go, of anybody or of this tenant.
fn is_full(live: &AtomicUsize, tenant: &AtomicUsize) -> bool {
    tenant.load(Ordering::Acquire) >= MAX_CALLS_PER_TENANT
        || live.load(Ordering::Acquire) >= MAX_CALLS_PER_WORKER
}

fn refused(code: Code, words: &str) -> ToGuest {
    ToGuest::Refused(Refusal::new(code, words))
}

/// One call on its way.
struct Line {
    cell: Arc<Cell>,
    number: u64,
    whose: (TenantId, TaskId),
    allowance: Arc<Allowance>,
    meter: Arc<Meter>,
    room: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    sent_cap: u64,
    received_cap: u64,
    _counted: [Counted; 2],
}

impl Line {
    async fn carry(
        &self,
        client: &Client,
        (store, vault): (&WorkerStore, &Vault),
        whose: Whose,
        mut request: Request,
        pieces: mpsc::Receiver<Option<Bytes>>,
    ) -> Result<(), Refusal> {
        let grants = granted((store, vault), whose, &mut request).await?;
        let request = &request;
        let taken = self.allowance.take(self.whose, Quota::EgressRequestsPerDay, 1).await;
        taken.map_err(|short| short.refusal())?;
        let broke_off = Arc::new(OnceLock::new());
        let body = if request.body { self.body(pieces, broke_off.clone()) } else { nothing() };
        // Boxed: connecting is the largest part of a call, and most of its life is not that.
        let answer = match Box::pin(client.send(&grants, request, body)).await {
            Ok(answer) => answer,
            Err(refusal) => {
                if by_the_rules(&refusal) {
                    self.allowance.put_back(self.whose, Quota::EgressRequestsPerDay, 1).await;
                }
                return Err(broke_off.get().cloned().unwrap_or(refusal));
            }
        };
        let between =
            request.between_bytes_ms.map_or(BETWEEN_BYTES, Duration::from_millis).min(BETWEEN_BYTES);
        self.pass_on(answer, between).await
    }

    /// The body of the request as the connection reads it: what is read makes room for more.
    /// `broke_off`: set to why no more of it may go.
    fn body(&self, pieces: mpsc::Receiver<Option<Bytes>>, broke_off: Arc<OnceLock<Refusal>>) -> RequestBody {
        let (cell, number, meter) = (self.cell.clone(), self.number, self.meter.clone());
        let (allowance, whose) = (self.allowance.clone(), self.whose);
        let (waiting, cap) = (self.waiting.clone(), self.sent_cap);
        StreamBody::new(stream::unfold(pieces, move |mut pieces| {
            let (cell, meter, waiting, broke_off, allowance) =
                (cell.clone(), meter.clone(), waiting.clone(), broke_off.clone(), allowance.clone());
            async move {
                let piece = match pieces.recv().await {
                    Some(piece) => piece?,
                    // Never the end: half a request is not to look like a whole one.
                    None => return Some((Err(io::Error::other("the body broke off")), pieces)),
                };
                let refusal = if Meter::add(&meter.sent, piece.len(), cap) {
                    let taken = allowance.take(whose, Quota::EgressBytesPerDay, piece.len() as u64).await;
                    taken.err().map(|short| short.refusal())
                } else {
                    Some(sent_too_much(cap))
                };
                if let Some(refusal) = refusal {
                    // The first one is the reason.
                    let _ = broke_off.set(refusal);
                    return Some((Err(io::Error::other("more than may be sent")), pieces));
                }
                let cost = cost(piece.len());
                waiting.fetch_sub(cost as usize, Ordering::AcqRel);
                cell.http(number, ToGuest::Room(cost));
                Some((Ok(Frame::data(piece)), pieces))
            }
        }))
        .boxed_unsync()
    }

    /// The response, as far as the guest takes it.
    async fn pass_on(&self, answer: Answer, between: Duration) -> Result<(), Refusal> {
        let Answer { status, headers, mut body, connection } = answer;
        self.cell.http(self.number, ToGuest::Head { status, headers });
        loop {
            let next = tokio::time::timeout(between, body.frame()).await;
            let Some(frame) = next.map_err(|_| {
                Refusal::new(
                    Code::ConnectionReadTimeout,
                    "the next piece of the response did not come in time",
                )
            })?
            else {
                break;
            };
            // Trailers of responses are left out.
            let Ok(mut data) = frame.map_err(|error| broken_body(&error))?.into_data() else { continue };
            if !Meter::add(&self.meter.received, data.len(), self.received_cap) {
                return Err(Refusal::new(
                    Code::HttpResponseBodySize,
                    format!("an attempt may receive {} bytes in all", self.received_cap),
                ));
            }
            let taken = self.allowance.take(self.whose, Quota::EgressBytesPerDay, data.len() as u64).await;
            taken.map_err(|short| short.refusal())?;
            while !data.is_empty() {
                let piece = data.split_to(data.len().min(MAX_PIECE));
                let room = self.room.acquire_many(cost(piece.len())).await;
                room.map_err(|_| Refusal::new(Code::InternalError, "the call is over"))?.forget();
                self.cell.http(self.number, ToGuest::Body(piece.to_vec()));
            }
        }
        drop(connection);
        self.cell.http(self.number, ToGuest::End);
        Ok(())
    }
}

fn no_grants(whose: Whose, error: &crate::store::Error) -> Refusal {
    warn!(%error, invocation = %whose.invocation, "cannot look up grants");
    Refusal::new(Code::InternalError, "the grants of the task cannot be looked up now")
}

/// Where the task may send requests, as it is now; the secrets that the headers of this one ask for are in their places.
async fn granted(
    (store, vault): (&WorkerStore, &Vault),
    whose: Whose,
    request: &mut Request,
) -> Result<Vec<HttpGrant>, Refusal> {
    let wanted = placeholder::wanted(request)?;
    let grants = if wanted.is_empty() {
        store.grants(whose.tenant, whose.invocation).await.map_err(|error| no_grants(whose, &error))?
    } else {
        with_secrets(store, vault, whose, request, &wanted).await?
    };
    Ok(grants.http.iter().filter_map(|grant| HttpGrant::parse(grant).ok()).collect())
}

/// Puts the secrets that the headers ask for where they are asked for, if all of them may go there. Says what the task has
/// been given besides.
async fn with_secrets(
    store: &WorkerStore,
    vault: &Vault,
    whose: Whose,
    request: &mut Request,
    wanted: &[placeholder::Wanted],
) -> Result<Grants, Refusal> {
    let names: Vec<String> = wanted.iter().map(|one| one.secret.clone()).collect();
    let held =
        store.attempt_secrets(whose.attempt, &names).await.map_err(|error| no_grants(whose, &error))?;
    let Some((grants, sealed)) = held else {
        return Err(Refusal::new(Code::ConnectionTerminated, "the attempt is to end"));
    };
    let to = Destination::parse(request.scheme, &request.authority)
        .map_err(|error| Refusal::new(Code::HttpRequestUriInvalid, error.to_string()))?;
    for one in wanted {
        let may = grants.secret_headers.iter().any(|grant| {
            grant.secret == one.secret
                && grant.header == one.header
                && HttpGrant::parse(&grant.host).is_ok_and(|host| host.allows(&to))
        });
        if !may {
            let words = format!(
                "the task has no grant to send the secret `{}` in the header `{}` to {to}; an admin of the tenant can give it",
                one.secret, one.header
            );
            return Err(Refusal::new(Code::HttpRequestDenied, words));
        }
    }
    let opened = secret::open(vault, whose.tenant, &sealed).map_err(|error| {
        warn!(%error, invocation = %whose.invocation, "a secret does not open on this worker");
        Refusal::new(Code::InternalError, "the secret does not open on this worker: see its log")
    })?;
    let value_of =
        |name: &str| opened.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_slice());
    placeholder::fill(request, value_of)?;
    Ok(grants)
}

fn sent_too_much(cap: u64) -> Refusal {
    Refusal::new(Code::HttpRequestBodySize, format!("an attempt may send {cap} bytes in all"))
}

/// Whether the request was refused before anything of it went out.
fn by_the_rules(refusal: &Refusal) -> bool {
    matches!(
        refusal.code,
        Code::HttpRequestDenied | Code::DestinationIpProhibited | Code::HttpRequestUriInvalid
    )
}

fn nothing() -> RequestBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}
