//! How often an address, a key and a tenant may call this server, and what callers are told about it. Owns the counting
//! (by `governor`) in bounded memory; which rates hold is configuration. Other servers count for themselves.
//!
//! A call without a credential counts for its address, and so does one of an operation that asks for none, whatever it
//! carries; so does one whose credential is not among those that this server has seen to be valid in the last seconds,
//! before anybody looks for it: guessing costs the guesser, not Postgres.

use std::hash::{BuildHasher, Hash, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use axum::extract::{ConnectInfo, MatchedPath, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{Extensions, HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DefaultKeyedStateStore;
use governor::{Quota, RateLimiter};
use ipnet::IpNet;
use tokio::sync::watch;
use uuid::Uuid;

use crate::api::Api;
use crate::api::access::{Access, operation};
use crate::api::problem::{Code, Problem};
use crate::domain::rate::{Rate, Rates};

/// Somebody who is remembered takes some hundred bytes: at most some 20 MB for each of the three kinds.
const MAX_ENTRIES: usize = 200_000;
/// Buckets that those share who come when the memory is full.
const SHARED: u16 = 16_384;
/// So many calls pass between two looks at how much is remembered.
const LOOK_EVERY: u32 = 1_024;
/// Whoever has been quiet long enough is forgotten at the first look after this time.
const FORGET_EVERY: Duration = Duration::from_secs(10);
/// A full memory is swept at most this often: looking through it takes some milliseconds.
const SWEEP_EVERY: Duration = Duration::from_millis(250);
/// Entries of `X-Forwarded-For` that are looked at, from the last one on.
const MAX_HOPS: usize = 16;
/// The only thing that is never refused: whether the process runs.
const LIVENESS: &str = "/livez";

const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const STANDING: HeaderName = HeaderName::from_static("ratelimit");

/// Where a request comes from, as far as the proxies that are trusted say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientAddress(pub IpAddr);

type Keyed<K> = RateLimiter<K, DefaultKeyedStateStore<K>, DefaultClock, StateInformationMiddleware>;

/// One rate for many callers.
#[derive(Debug)]
struct Limiter<K: Hash + Eq + Clone> {
    rate: Rate,
    each: Keyed<K>,
    /// Those who came when `each` was full, by their hash.
    shared: Keyed<u16>,
    max: usize,
    seed: RandomState,
    calls: AtomicU32,
    swept: Mutex<Swept>,
}

#[derive(Debug)]
struct Swept {
    at: Instant,
    full: bool,
}

/// How somebody stands after a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    rate: Rate,
    remaining: u32,
}

/// Too soon: how long to wait.
#[derive(Debug, Clone, Copy)]
struct Refused(Rate, Duration);

impl<K: Hash + Eq + Clone> Limiter<K> {
    /// `None` when everything is let through.
    fn new(rate: Rate, max: usize) -> Option<Self> {
        let quota =
            Quota::per_second(NonZeroU32::new(rate.per_s)?).allow_burst(NonZeroU32::new(rate.burst.max(1))?);
        Some(Self {
            rate,
            each: RateLimiter::keyed(quota).with_middleware(),
            shared: RateLimiter::keyed(quota).with_middleware(),
            max,
            seed: RandomState::new(),
            calls: AtomicU32::new(0),
            swept: Mutex::new(Swept { at: Instant::now(), full: false }),
        })
    }

    fn check(&self, key: &K) -> Result<Standing, Refused> {
        let look = self.calls.fetch_add(1, Ordering::Relaxed).is_multiple_of(LOOK_EVERY);
        let answer = if self.is_full(look) {
            let bucket = u16::try_from(self.seed.hash_one(key) % u64::from(SHARED)).unwrap_or(0);
            self.shared.check_key(&bucket)
        } else {
            self.each.check_key(key)
        };
        match answer {
            Ok(state) => Ok(Standing { rate: self.rate, remaining: state.remaining_burst_capacity() }),
            Err(refused) => Err(Refused(self.rate, refused.wait_time_from(DefaultClock::default().now()))),
        }
    }

    /// Whether nobody new can be remembered. Forgets those who need not be remembered, when it is time to.
    fn is_full(&self, look: bool) -> bool {
        let mut swept = self.swept.lock().unwrap_or_else(PoisonError::into_inner);
        if look {
            let age = swept.at.elapsed();
            let crowded = self.each.len() + LOOK_EVERY as usize >= self.max;
            if (crowded && age >= SWEEP_EVERY) || age >= FORGET_EVERY {
                swept.at = Instant::now();
                self.each.retain_recent();
                self.each.shrink_to_fit();
                self.shared.retain_recent();
                swept.full = self.each.len() + LOOK_EVERY as usize >= self.max;
            } else if crowded {
                swept.full = true;
            }
        }
        swept.full
    }
}

#[derive(Debug)]
struct Limiters {
    address: Option<Limiter<IpAddr>>,
    key: Option<Limiter<Uuid>>,
    tenant: Option<Limiter<Uuid>>,
}

impl Limiters {
    fn new(rates: &Rates) -> Self {
        Self {
            address: Limiter::new(rates.address, MAX_ENTRIES),
            key: Limiter::new(rates.key, MAX_ENTRIES),
            tenant: Limiter::new(rates.tenant, MAX_ENTRIES),
        }
    }
}

/// All that is counted. New rates begin with full bursts.
#[derive(Debug)]
pub(super) struct Limits {
    now: RwLock<Arc<Limiters>>,
    rates: watch::Receiver<Rates>,
    proxies: Vec<IpNet>,
}

impl Limits {
    pub(super) fn new(mut rates: watch::Receiver<Rates>, proxies: Vec<IpNet>) -> Self {
        let first = Limiters::new(&rates.borrow_and_update());
        Self { now: RwLock::new(Arc::new(first)), rates, proxies }
    }

    fn now(&self) -> Arc<Limiters> {
        let known = Arc::clone(&self.now.read().unwrap_or_else(PoisonError::into_inner));
        let wanted = *self.rates.borrow();
        let same = |has: Option<Rate>, wants: Rate| has.map_or(wants.per_s == 0, |has| has == wants);
        if same(known.address.as_ref().map(|l| l.rate), wanted.address)
            && same(known.key.as_ref().map(|l| l.rate), wanted.key)
            && same(known.tenant.as_ref().map(|l| l.rate), wanted.tenant)
        {
            return known;
        }
        let mut now = self.now.write().unwrap_or_else(PoisonError::into_inner);
        *now = Arc::new(Limiters::new(&wanted));
        Arc::clone(&now)
    }

    /// Count a call of somebody unknown. What it comes from is in the extensions, put there by [`measure`].
    ///
    /// # Errors
    /// It comes too soon.
    pub(super) fn stranger(&self, extensions: &Extensions) -> Result<(), Problem> {
        let limiters = self.now();
        let (Some(limiter), Some(address)) = (&limiters.address, extensions.get::<ClientAddress>()) else {
            return Ok(());
        };
        note(extensions, "address", limiter.check(&whole_site(address.0)))
    }

    /// Count a call of this tenant by this key.
    ///
    /// # Errors
    /// It comes too soon.
    pub(super) fn known(&self, extensions: &Extensions, tenant: Uuid, key: Uuid) -> Result<(), Problem> {
        let limiters = self.now();
        if let Some(limiter) = &limiters.key {
            note(extensions, "key", limiter.check(&key))?;
        }
        if let Some(limiter) = &limiters.tenant {
            note(extensions, "tenant", limiter.check(&tenant))?;
        }
        Ok(())
    }

    fn client(&self, peer: IpAddr, headers: &HeaderMap) -> ClientAddress {
        let mut address = peer.to_canonical();
        let lines = headers.get_all("x-forwarded-for");
        let lines: Vec<&str> = lines.iter().filter_map(|line| line.to_str().ok()).collect();
        let hops = lines.iter().rev().flat_map(|line| line.rsplit(',')).take(MAX_HOPS);
        // Each proxy that is trusted says whom it had it from; whatever stands before a stranger is the stranger's word.
        for hop in hops {
            if !self.proxies.iter().any(|net| net.contains(&address)) {
                break;
            }
            let Ok(before) = hop.trim().parse::<IpAddr>() else { break };
            address = before.to_canonical();
        }
        ClientAddress(address)
    }
}

/// Whoever has one IPv6 address has 2⁶⁴ of them.
fn whole_site(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(ip) => {
            let [a, b, c, d, ..] = ip.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
    }
}

/// What a request was counted for so far.
#[derive(Debug, Clone, Default)]
struct Counted(Arc<Mutex<Vec<(&'static str, Standing)>>>);

fn note(
    extensions: &Extensions,
    who: &'static str,
    checked: Result<Standing, Refused>,
) -> Result<(), Problem> {
    let (standing, refused) = match checked {
        Ok(standing) => (standing, None),
        Err(Refused(rate, wait)) => (Standing { rate, remaining: 0 }, Some(wait)),
    };
    if let Some(Counted(counted)) = extensions.get() {
        counted.lock().unwrap_or_else(PoisonError::into_inner).push((who, standing));
    }
    let Some(wait) = refused else { return Ok(()) };
    // Whole seconds, and never 0: that would be an invitation.
    let seconds = u32::try_from(wait.as_millis().div_ceil(1_000)).unwrap_or(u32::MAX).max(1);
    let detail = format!(
        "this {who} may call this server {} times per second, {} at once after a pause",
        standing.rate.per_s, standing.rate.burst
    );
    Err(Problem::new(Code::RateLimited, detail).retry_after(seconds))
}

/// Learn where a request comes from, count it if nobody is named or asked for, and tell the caller how it stands.
pub(super) async fn measure(State(api): State<Api>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
    let peer = peer.map_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED), |ConnectInfo(peer)| peer.ip());
    let client = api.limits.client(peer, request.headers());
    let counted = Counted::default();
    request.extensions_mut().insert(client);
    request.extensions_mut().insert(counted.clone());
    let nameless =
        !request.headers().contains_key("x-api-key") && !request.headers().contains_key(AUTHORIZATION);
    let path = request.extensions().get::<MatchedPath>();
    let lives = path.is_some_and(|path| path.as_str() == LIVENESS);
    // Nobody looks at a credential there: a made-up one must not be a way past the count.
    let open = path
        .and_then(|path| operation(request.method(), path.as_str()))
        .is_none_or(|operation| operation.access == Access::Open);
    let counts = (nameless || open) && !lives;
    let mut response = match counts.then(|| api.limits.stranger(request.extensions())) {
        Some(Err(problem)) => problem.into_response(),
        _ => next.run(request).await,
    };
    let counted = counted.0.lock().unwrap_or_else(PoisonError::into_inner);
    tell(&counted, response.headers_mut());
    response
}

/// `RateLimit-Policy` and `RateLimit`, as the IETF's draft has them: quota and window, remaining and reset in seconds.
fn tell(counted: &[(&'static str, Standing)], headers: &mut HeaderMap) {
    if counted.is_empty() {
        return;
    }
    let (mut policy, mut standing) = (String::new(), String::new());
    for (who, Standing { rate, remaining }) in counted {
        let comma = if policy.is_empty() { "" } else { ", " };
        let burst = rate.burst.max(1);
        let seconds = |requests: u32| requests.div_ceil(rate.per_s).max(1);
        policy.push_str(&format!("{comma}\"{who}\";q={burst};w={}", seconds(burst)));
        let reset = seconds(burst.saturating_sub(*remaining));
        standing.push_str(&format!("{comma}\"{who}\";r={remaining};t={reset}"));
    }
    for (name, text) in [(POLICY, policy), (STANDING, standing)] {
        if let Ok(value) = HeaderValue::from_str(&text) {
            headers.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn address(n: u32) -> IpAddr {
        Ipv4Addr::from(n).into()
    }

    #[test]
    fn a_burst_is_let_through_and_then_the_rate_and_everybody_has_their_own() {
        let limiter = Limiter::new(Rate { per_s: 1, burst: 3 }, MAX_ENTRIES).unwrap();
        for remaining in [2, 1, 0] {
            assert_eq!(limiter.check(&address(1)).unwrap().remaining, remaining);
        }
        let Refused(_, wait) = limiter.check(&address(1)).unwrap_err();
        assert!(wait <= Duration::from_secs(1), "{wait:?}");
        assert_eq!(limiter.check(&address(2)).unwrap().remaining, 2);
        assert!(Limiter::<IpAddr>::new(Rate { per_s: 0, burst: 3 }, 1).is_none());
    }

    #[test]
    fn a_million_addresses_take_bounded_memory_and_are_still_held_to_the_rate() {
        let limiter = Limiter::new(Rate { per_s: 1, burst: 2 }, 50_000).unwrap();
        let mut let_through = 0;
        let mut most = 0;
        // One address that never stops: before the memory is full it has a place of its own, afterwards a share of one.
        let (began, greedy) = (Instant::now(), address(u32::MAX));
        let mut of_greedy = 0;
        for n in 0..1_000_000 {
            let_through += usize::from(limiter.check(&address(n)).is_ok());
            if n.is_multiple_of(100) {
                of_greedy += u64::from(limiter.check(&greedy).is_ok());
            }
            if n.is_multiple_of(LOOK_EVERY) {
                most = most.max(limiter.each.len());
            }
        }
        assert!(most <= 50_000, "{most}");
        assert!(limiter.shared.len() <= usize::from(SHARED));
        let rate = 2 * (began.elapsed().as_secs() + 1);
        assert!(of_greedy <= 2 * 2 + rate, "{of_greedy} in {:?}", began.elapsed());
        // All who were remembered, some of the others: a flood of new addresses does not get through.
        assert!((49_000..900_000).contains(&let_through), "{let_through}");
        // When it is over, there is room again.
        let ended = Instant::now();
        while limiter.each.len() > 1 {
            assert!(ended.elapsed() < Duration::from_secs(20), "{}", limiter.each.len());
            limiter.swept.lock().unwrap().at = Instant::now().checked_sub(FORGET_EVERY).unwrap();
            limiter.calls.store(0, Ordering::Relaxed);
            let _ = limiter.check(&address(7));
            std::thread::yield_now();
        }
    }

    #[test]
    fn an_address_at_its_limit_is_not_forgiven_by_the_sweep_that_forgets_a_flood() {
        let limiter = Limiter::new(Rate { per_s: 1, burst: 1_000 }, 50_000).unwrap();
        let (began, greedy) = (Instant::now(), address(u32::MAX));
        let mut let_through = 0u64;
        while limiter.check(&greedy).is_ok() {
            let_through += 1;
        }
        assert!(let_through >= 1_000);
        for n in 0..40_000 {
            let _ = limiter.check(&address(n));
        }
        assert!(limiter.each.len() > 40_000 - LOOK_EVERY as usize);
        // Each of the others called once: after a second there is nothing to remember of them, and they are forgotten.
        while limiter.each.len() > 1 {
            assert!(began.elapsed() < Duration::from_secs(60), "{}", limiter.each.len());
            std::thread::yield_now();
            limiter.swept.lock().unwrap().at = Instant::now().checked_sub(FORGET_EVERY).unwrap();
            limiter.calls.store(0, Ordering::Relaxed);
            let_through += u64::from(limiter.check(&greedy).is_ok());
        }
        while limiter.check(&greedy).is_ok() {
            let_through += 1;
        }
        // What the rate gives in that time, and not another burst.
        let due = 1_000 + began.elapsed().as_secs() + 2;
        assert!(let_through <= due, "{let_through} of {due}");
    }

    #[test]
    fn only_proxies_that_are_trusted_say_where_a_request_comes_from() {
        let (_, rates) = watch::channel(Rates::UNLIMITED);
        let limits = Limits::new(rates, vec!["10.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()]);
        let client = |peer: &str, forwarded: &[&str]| {
            let mut headers = HeaderMap::new();
            for line in forwarded {
                headers.append("x-forwarded-for", HeaderValue::from_str(line).unwrap());
            }
            limits.client(peer.parse().unwrap(), &headers).0.to_string()
        };
        assert_eq!(client("192.0.2.1", &["198.51.100.1"]), "192.0.2.1");
        assert_eq!(client("10.0.0.1", &[]), "10.0.0.1");
        assert_eq!(client("::ffff:10.0.0.1", &["198.51.100.1"]), "198.51.100.1");
        // The first entry is what the client made up.
        assert_eq!(client("10.0.0.1", &["1.2.3.4, 198.51.100.1, 10.2.2.2"]), "198.51.100.1");
        assert_eq!(client("10.0.0.1", &["1.2.3.4", "198.51.100.1"]), "198.51.100.1");
        assert_eq!(client("10.0.0.1", &["nonsense"]), "10.0.0.1");
        assert_eq!(
            whole_site("2001:db8::1".parse().unwrap()),
            whole_site("2001:db8::ffff:1".parse().unwrap())
        );
        assert_ne!(
            whole_site("2001:db8::1".parse().unwrap()),
            whole_site("2001:db8:0:1::1".parse().unwrap())
        );
    }

    #[test]
    fn callers_are_told_as_the_draft_has_it() {
        let mut headers = HeaderMap::new();
        tell(&[], &mut headers);
        assert!(headers.is_empty());
        let key = Standing { rate: Rate { per_s: 10, burst: 25 }, remaining: 4 };
        let tenant = Standing { rate: Rate { per_s: 100, burst: 100 }, remaining: 99 };
        tell(&[("key", key), ("tenant", tenant)], &mut headers);
        assert_eq!(headers[POLICY], "\"key\";q=25;w=3, \"tenant\";q=100;w=1");
        assert_eq!(headers[STANDING], "\"key\";r=4;t=3, \"tenant\";r=99;t=1");
    }

    #[test]
    fn new_rates_hold_at_the_next_call() {
        let strict = Rate { per_s: 1, burst: 1 };
        let (sender, rates) = watch::channel(Rates { key: strict, ..Rates::UNLIMITED });
        let limits = Limits::new(rates, Vec::new());
        let call = || limits.known(&Extensions::new(), Uuid::nil(), Uuid::nil());
        call().unwrap();
        assert_eq!(call().unwrap_err().code(), Code::RateLimited);
        sender.send_replace(Rates::UNLIMITED);
        call().unwrap();
    }
}
