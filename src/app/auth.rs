//! Who a key belongs to, remembered for a few seconds, and whether it may what it wants (`domain::permission` has the
//! table). Never keeps a key, only its hash. An unknown key is remembered as well, so that asking again and again costs
//! no query; how many unknown ones are looked up at once is bounded, so that strangers cannot take all connections.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tokio::sync::Semaphore;

use crate::app::{App, Error, Inner, Result, token};
use crate::domain::ids::{InvocationId, KeyId, TenantId, UserId};
use crate::domain::permission::{Action, Reach};
use crate::store::tenant::{Actor, Identity, key_hash};

/// A key that was revoked elsewhere works at most this long; one that was unknown is asked for again after it.
const STALE_AFTER: Duration = Duration::from_secs(5);
/// Keys remembered, in two generations: 100,000 of them take some 30 MB.
const MAX_KEYS: usize = 65_536;
/// Unknown keys remembered, in two generations.
const MAX_UNKNOWN: usize = 16_384;
/// Longest key or token that is looked at.
const MAX_CREDENTIAL_BYTES: usize = 8 << 10;
/// Keys that are looked up in Postgres at once; the others wait.
const LOOKUPS: usize = 4;
/// Time between writes of when keys were used.
const USES_EVERY: Duration = Duration::from_secs(5);
/// A key's last use is written at most this often.
const USE_GRAIN: Duration = Duration::from_secs(60);
/// Uses of one statement.
const USES_PER_STATEMENT: usize = 1_000;

/// A map that forgets what was not put for a while: when the young generation is full it becomes the old one, and the
/// old one goes. Holds at most twice its bound, and never looks through what it holds.
#[derive(Debug)]
struct Generations<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    bound: usize,
}

impl<K: Hash + Eq, V> Generations<K, V> {
    fn new(bound: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), bound }
    }

    fn get(&self, key: &K) -> Option<&V> {
        self.young.get(key).or_else(|| self.old.get(key))
    }

    fn put(&mut self, key: K, value: V) {
        if self.young.len() >= self.bound && !self.young.contains_key(&key) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }

    fn retain(&mut self, keep: impl Fn(&V) -> bool) {
        self.young.retain(|_, v| keep(v));
        self.old.retain(|_, v| keep(v));
    }
}

type KeyHash = [u8; 32];

#[derive(Debug)]
struct Seen {
    known: Generations<KeyHash, (Arc<Identity>, Instant)>,
    unknown: Generations<KeyHash, Instant>,
    /// When the last use of a key was noted.
    noted: Generations<KeyId, Instant>,
    /// Noted, and not yet written.
    uses: Vec<(TenantId, KeyId, DateTime<Utc>)>,
}

/// Keys seen lately. The maps are found by hashes of secrets under a random state of their own, so that how long a look
/// takes says nothing about a secret.
#[derive(Debug)]
pub struct Keys {
    seen: Mutex<Seen>,
    lookups: Semaphore,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            seen: Mutex::new(Seen {
                known: Generations::new(MAX_KEYS),
                unknown: Generations::new(MAX_UNKNOWN),
                noted: Generations::new(MAX_KEYS),
                uses: Vec::new(),
            }),
            lookups: Semaphore::new(LOOKUPS),
        }
    }
}

impl Keys {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known: somebody, or that there is nobody.
    fn get(&self, hash: &KeyHash, now: Instant) -> Option<Option<Arc<Identity>>> {
        let fresh = |at: &Instant| now.saturating_duration_since(*at) < STALE_AFTER;
        let seen = self.lock();
        if let Some((identity, at)) = seen.known.get(hash).filter(|(_, at)| fresh(at)) {
            let _ = at;
            return Some(Some(Arc::clone(identity)));
        }
        seen.unknown.get(hash).is_some_and(fresh).then_some(None)
    }

    fn put(&self, hash: KeyHash, identity: Option<Arc<Identity>>, now: Instant) {
        let mut seen = self.lock();
        match identity {
            Some(identity) => seen.known.put(hash, (identity, now)),
            None => seen.unknown.put(hash, now),
        }
    }

    /// Note that a key was used, unless that was noted lately.
    fn used(&self, identity: &Identity, now: Instant) {
        let Actor::Key(key) = identity.actor else { return };
        let mut seen = self.lock();
        let lately = seen.noted.get(&key).is_some_and(|at| now.saturating_duration_since(*at) < USE_GRAIN);
        if !lately && seen.uses.len() < MAX_KEYS {
            seen.noted.put(key, now);
            seen.uses.push((identity.tenant, key, Utc::now()));
        }
    }

    fn take_uses(&self) -> Vec<(TenantId, KeyId, DateTime<Utc>)> {
        std::mem::take(&mut self.lock().uses)
    }

    /// Forget what is known of a key: it was changed here. Other servers go by [`STALE_AFTER`].
    pub(super) fn forget(&self, key: KeyId) {
        self.lock().known.retain(|(identity, _)| identity.actor != Actor::Key(key));
    }

    /// The same for all sessions of a user.
    pub(super) fn forget_sessions(&self, user: UserId) {
        let of_user = |actor: Actor| matches!(actor, Actor::User(id, _) if id == user);
        self.lock().known.retain(|(identity, _)| !of_user(identity.actor));
    }

    /// The same for everybody in a tenant.
    pub(super) fn forget_tenant(&self, tenant: TenantId) {
        self.lock().known.retain(|(identity, _)| identity.tenant != tenant);
    }
}

impl App {
    /// Who this key or token belongs to; `None` for nobody.
    ///
    /// # Errors
    /// Postgres does not answer; [`Error::Token`] says why a token is refused.
    pub async fn authenticate(&self, key: &str) -> Result<Option<Arc<Identity>>> {
        if key.is_empty() || key.len() > MAX_CREDENTIAL_BYTES {
            return Ok(None);
        }
        let hash = key_hash(key);
        let found = match self.inner.keys.get(&hash, Instant::now()) {
            Some(found) => found,
            None if token::looks_like_one(key) => self.verified(key, hash).await?,
            None => self.look_up(hash).await?,
        };
        let found = found.filter(|identity| identity.expires_at.is_none_or(|at| at > Utc::now()));
        if let Some(identity) = &found {
            self.inner.keys.used(identity, Instant::now());
        }
        Ok(found)
    }

    /// Whether this key or token was found to be somebody's in the last seconds: asking for it costs nothing. One that
    /// was found to be nobody's is not remembered in this sense.
    #[must_use]
    pub fn remembers(&self, key: &str) -> bool {
        let found = self.inner.keys.get(&key_hash(key), Instant::now()).flatten();
        found.is_some_and(|identity| identity.expires_at.is_none_or(|at| at > Utc::now()))
    }

    /// Whose token this is. It is remembered as keys are, so that it is verified every five seconds and not each time.
    async fn verified(&self, token: &str, hash: KeyHash) -> Result<Option<Arc<Identity>>> {
        // Taken before any question, so that an answer is never older than it claims.
        let now = Instant::now();
        if let Some(outsider) = self.outsider(token).await?.map(Arc::new) {
            self.inner.keys.put(hash, Some(Arc::clone(&outsider)), now);
            return Ok(Some(outsider));
        }
        let (session, expires_at) = self.verify(token).await?;
        let found = self.inner.store.identify_session(session).await?;
        let found = found.map(|identity| Arc::new(Identity { expires_at, ..identity }));
        self.inner.keys.put(hash, found.clone(), now);
        Ok(found)
    }

    async fn look_up(&self, hash: KeyHash) -> Result<Option<Arc<Identity>>> {
        let keys = &self.inner.keys;
        let closed = |_| Error::Internal(anyhow::anyhow!("the lookups are closed"));
        let _permit = keys.lookups.acquire().await.map_err(closed)?;
        // Taken before the question, so that an answer is never older than it claims.
        let now = Instant::now();
        // Whoever waited here may find that another has asked.
        if let Some(found) = keys.get(&hash, now) {
            return Ok(found);
        }
        let found = self.inner.store.identify(&hash).await?.map(Arc::new);
        keys.put(hash, found.clone(), now);
        Ok(found)
    }

    /// Whether this caller may do this on this task (`None`: on what belongs to no task, or on all).
    ///
    /// # Errors
    /// [`Error::Forbidden`]: it may not.
    pub fn authorize(caller: &Identity, action: Action, task: Option<&str>) -> Result<()> {
        match caller.permits().reach(action) {
            Reach::All => Ok(()),
            Reach::Some(permits) if task.is_some_and(|task| permits.on(action, task)) => Ok(()),
            _ => Err(Error::Forbidden { role: caller.role, action, scoped: caller.role.may(action) }),
        }
    }

    /// Whether this caller may do this on this invocation. One that is outside its scopes is not there.
    ///
    /// # Errors
    /// It may not.
    pub async fn authorize_invocation(
        &self,
        caller: &Identity,
        action: Action,
        id: InvocationId,
    ) -> Result<()> {
        let Reach::Some(permits) = caller.permits().reach(action) else {
            return Self::authorize(caller, action, None);
        };
        let task = self.tenant(caller.tenant).await?.invocation_task(id).await?;
        let within = task.is_some_and(|task| permits.on(action, &task));
        if within { Ok(()) } else { Err(Error::InvocationNotFound(id)) }
    }

    pub(super) async fn write_uses(&self) -> Result<()> {
        let uses = self.inner.keys.take_uses();
        for some in uses.chunks(USES_PER_STATEMENT) {
            self.inner.store.keys_used(some).await?;
        }
        Ok(())
    }

    /// Writes down when keys were used, until the application is gone. What could not be written is lost: it is for
    /// people, and the next use says the same.
    pub(super) async fn keep_uses(inner: Weak<Inner>) {
        loop {
            tokio::time::sleep(USES_EVERY).await;
            let Some(inner) = inner.upgrade() else { return };
            if let Err(error) = (App { inner }).write_uses().await {
                tracing::debug!(%error, "cannot write when keys were used");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::domain::permission::{Role, Scope};

    fn identity(scopes: &[&str]) -> Identity {
        Identity {
            tenant: TenantId::generate(),
            actor: Actor::Key(KeyId::generate()),
            name: "test".into(),
            role: Role::Developer,
            scopes: scopes.iter().map(|s| s.parse::<Scope>().unwrap()).collect(),
            expires_at: None,
            active: true,
        }
    }

    #[test]
    fn a_key_is_asked_for_again_after_five_seconds_known_or_not() {
        let keys = Keys::default();
        let somebody = Arc::new(identity(&[]));
        let start = Instant::now();
        keys.put([1; 32], Some(somebody.clone()), start);
        keys.put([2; 32], None, start);
        let later = start + Duration::from_millis(4_999);
        assert_eq!(keys.get(&[1; 32], later), Some(Some(somebody.clone())));
        assert_eq!(keys.get(&[2; 32], later), Some(None));
        for n in [1, 2, 3] {
            assert_eq!(keys.get(&[n; 32], start + STALE_AFTER), None);
        }
        let Actor::Key(id) = somebody.actor else { panic!("not a key") };
        keys.forget(id);
        assert_eq!(keys.get(&[1; 32], later), None);
    }

    #[test]
    fn strangers_cannot_fill_the_memory_and_do_not_push_out_those_who_are_known() {
        let keys = Keys::default();
        let now = Instant::now();
        keys.put(key_hash("known"), Some(Arc::new(identity(&[]))), now);
        for n in 0..MAX_UNKNOWN * 3 {
            keys.put(key_hash(&n.to_string()), None, now);
        }
        let seen = keys.lock();
        assert!(seen.unknown.young.len() + seen.unknown.old.len() <= 2 * MAX_UNKNOWN);
        assert!(seen.known.get(&key_hash("known")).is_some());
    }

    #[test]
    fn uses_are_noted_once_a_minute() {
        let keys = Keys::default();
        let (somebody, now) = (identity(&[]), Instant::now());
        for seconds in [0, 1, 59, 60, 61] {
            keys.used(&somebody, now + Duration::from_secs(seconds));
        }
        assert_eq!(keys.take_uses().len(), 2);
        assert!(keys.take_uses().is_empty());
    }

    #[test]
    fn a_scope_on_a_task_reaches_that_task_and_nothing_that_belongs_to_none() {
        let narrow = identity(&["submit:echo"]);
        assert!(App::authorize(&narrow, Action::Submit, Some("echo")).is_ok());
        for (action, task) in [
            (Action::Submit, Some("other")),
            (Action::Submit, None),
            (Action::ReadLogs, Some("echo")),
            (Action::ManageKeys, None),
        ] {
            let refused = App::authorize(&narrow, action, task);
            assert!(matches!(refused, Err(Error::Forbidden { .. })), "{action:?} {task:?}");
        }
        assert!(App::authorize(&identity(&[]), Action::Submit, None).is_ok());
    }
}
