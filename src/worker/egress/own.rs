//! One request that the worker makes itself, for an attempt that has no guest. Under the rules, caps and counts of those
//! that guests make; owns how much of the answer is kept.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::{BodyExt as _, StreamBody};
use sandbar_host::egress::call::{Code, Headers, Refusal, Request};
use sandbar_host::egress::client::{Answer, Client, Frame, RequestBody, broken_body};
use tokio::time::timeout;

use super::allowance::{Allowance, Short};
use super::{
    BETWEEN_BYTES, Counted, Egress, FULL, Meter, Whose, by_the_rules, granted, is_full, nothing,
    sent_too_much,
};
use crate::app::vault::Vault;
use crate::domain::quota::Quota;
use crate::store::WorkerStore;
use crate::worker::lease::{Held, Lease};

/// What one request needs. Dropping it while it sends closes the connection.
pub struct Own {
    client: Arc<Client>,
    store: WorkerStore,
    vault: Arc<Vault>,
    whose: Whose,
    held: Held,
    meter: Arc<Meter>,
    caps: (u64, u64),
    allowance: Arc<Allowance>,
    _counted: [Counted; 2],
}

/// Why nothing came back.
#[derive(Debug, Clone)]
pub enum NotSent {
    /// The request was not let through, or failed.
    Refused(Refusal),
    /// The tenant or the task may send no more today.
    Short(Short),
}

impl From<Refusal> for NotSent {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<Short> for NotSent {
    fn from(short: Short) -> Self {
        Self::Short(short)
    }
}

/// What came back.
pub struct Fetched {
    /// Such as 200.
    pub status: u16,
    /// Within the bounds of any answer.
    pub headers: Headers,
    /// The beginning of the body, as much as was to be kept.
    pub body: Vec<u8>,
    /// Bytes of the rest.
    pub dropped: u64,
}

impl Egress {
    /// One request for an attempt that makes none otherwise. Its bytes count as the attempt's ([`Egress::end`]).
    ///
    /// # Errors
    /// The worker or the tenant has as many under way as it may.
    pub fn own(&mut self, lease: &Lease, whose: Whose, token: u64) -> Result<Own, Refusal> {
        let tenant: Arc<AtomicUsize> = self.tenants.entry(whose.tenant).or_default().clone();
        if is_full(&self.live, &tenant) {
            return Err(Refusal::new(Code::ConnectionLimitReached, FULL));
        }
        Ok(Own {
            client: self.client.clone(),
            store: self.store.clone(),
            vault: self.vault.clone(),
            whose,
            held: lease.held(),
            meter: self.attempts.entry(token).or_default().meter.clone(),
            caps: (self.settings.sent_bytes, self.settings.received_bytes),
            allowance: self.allowance.clone(),
            _counted: [Counted::new(&self.live), Counted::new(&tenant)],
        })
    }
}

impl Own {
    /// Whether the lease is held under which it is made.
    pub fn is_held(&self) -> bool {
        self.held.is_held()
    }

    /// The database of the attempt.
    pub fn store(&self) -> &WorkerStore {
        &self.store
    }

    /// Send it, and keep up to `keep` bytes of the answer's body. The rest is read and counted, up to the cap.
    ///
    /// # Errors
    /// It may not go where it wants to, or fails; more is sent or comes than an attempt may send or receive, or than its
    /// tenant or task may today.
    pub async fn send(&self, mut request: Request, body: Bytes, keep: u64) -> Result<Fetched, NotSent> {
        let grants = granted((&self.store, &self.vault), self.whose, &mut request).await?;
        let (sent_cap, received_cap) = self.caps;
        if body.len() as u64 > sent_cap {
            return Err(sent_too_much(sent_cap).into());
        }
        if !self.is_held() {
            return Err(Refusal::new(Code::ConnectionTerminated, "the attempt is to end").into());
        }
        let whose = self.whose.of();
        let sent = if request.body { body.len() as u64 } else { 0 };
        self.allowance.take(whose, Quota::EgressRequestsPerDay, 1).await?;
        if let Err(short) = self.allowance.take(whose, Quota::EgressBytesPerDay, sent).await {
            self.allowance.put_back(whose, Quota::EgressRequestsPerDay, 1).await;
            return Err(short.into());
        }
        let body = if request.body { self.body(body) } else { nothing() };
        // Boxed: connecting is the largest part of a call, and most of its life is not that.
        let answer = match Box::pin(self.client.send(&grants, &request, body)).await {
            Ok(answer) => answer,
            Err(refusal) => {
                if by_the_rules(&refusal) {
                    self.allowance.put_back(whose, Quota::EgressRequestsPerDay, 1).await;
                    self.allowance.put_back(whose, Quota::EgressBytesPerDay, sent).await;
                }
                return Err(refusal.into());
            }
        };
        let Answer { status, headers, mut body, connection } = answer;
        let keep = usize::try_from(keep).unwrap_or(usize::MAX);
        let mut fetched = Fetched { status, headers, body: Vec::new(), dropped: 0 };
        loop {
            let next = timeout(BETWEEN_BYTES, body.frame()).await.map_err(|_| {
                Refusal::new(
                    Code::ConnectionReadTimeout,
                    "the next piece of the response did not come in time",
                )
            })?;
            let Some(frame) = next else { break };
            // Trailers of responses are left out.
            let Ok(data) = frame.map_err(|error| broken_body(&error))?.into_data() else { continue };
            if !Meter::add(&self.meter.received, data.len(), received_cap) {
                let words = format!("an attempt may receive {received_cap} bytes in all");
                return Err(Refusal::new(Code::HttpResponseBodySize, words).into());
            }
            self.allowance.take(whose, Quota::EgressBytesPerDay, data.len() as u64).await?;
            let kept = data.len().min(keep.saturating_sub(fetched.body.len()));
            fetched.body.extend_from_slice(data.get(..kept).unwrap_or_default());
            fetched.dropped = fetched.dropped.saturating_add((data.len() - kept) as u64);
        }
        drop(connection);
        Ok(fetched)
    }

    /// The body as the connection reads it: counted when it goes, not before.
    fn body(&self, body: Bytes) -> RequestBody {
        let meter = self.meter.clone();
        StreamBody::new(stream::once(async move {
            // Within the cap, as was made sure of.
            Meter::add(&meter.sent, body.len(), u64::MAX);
            Ok::<_, io::Error>(Frame::data(body))
        }))
        .boxed_unsync()
    }
}
