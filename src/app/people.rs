//! People: login, sessions, passwords, invitations, members. Owns how a password is kept (argon2id), how guessing is slowed
//! down, and who may make whom what. Nothing here tells whether an address belongs to anybody: an unknown one takes as long
//! and gets the same answer as a wrong password.

use std::sync::OnceLock;
use std::time::Duration;

use argon2::Argon2;
use argon2::password_hash::{PasswordHash, PasswordHasher as _, PasswordVerifier as _, SaltString};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::app::task::page;
use crate::app::{App, Error, FieldError, Result, audit};
use crate::domain::ids::{TenantId, UserId};
use crate::domain::permission::{Action, Role};
use crate::store::people::{InvitationRow, MemberRow, MembershipRow, Refreshed, UserRow};
use crate::store::tenant::{Actor, Identity, key_hash};

/// Passwords that are hashed at once: each takes 19 MiB and a core for some 20 ms.
const HASHING: usize = 2;
/// Longest wait for a turn to hash.
const HASH_WAIT: Duration = Duration::from_secs(5);
/// Bytes of a password: from here on it is not guessed online; up to there hashing it costs nothing extra.
pub const PASSWORD: (usize, usize) = (10, 256);
/// A session ends this long after its login.
const SESSION: Duration = Duration::from_secs(30 * 86_400);
/// Failed logins for an address that have no consequence, then the first and the longest lock.
const LOCK: (i32, Duration, Duration) = (5, Duration::from_secs(30), Duration::from_secs(3_600));
/// How long an invitation can be accepted.
const INVITATION: TimeDelta = TimeDelta::days(7);
/// Invitations of a tenant that can be accepted.
const MAX_INVITATIONS: i64 = 1_000;

/// Turns of hashing.
#[derive(Debug)]
pub struct Hashing(Semaphore);

impl Default for Hashing {
    fn default() -> Self {
        Self(Semaphore::new(HASHING))
    }
}

/// What a login gives.
#[derive(Debug)]
pub struct Session {
    /// For the header.
    pub access: String,
    /// When it expires.
    pub expires_at: DateTime<Utc>,
    /// For the next one; works once.
    pub refresh: String,
    /// Where it acts.
    pub tenant: MembershipRow,
    /// Where else it could.
    pub tenants: Vec<MembershipRow>,
}

/// An address as it is kept.
///
/// # Errors
/// It cannot be one.
pub fn email(text: &str) -> std::result::Result<String, String> {
    let text = text.trim().to_lowercase();
    let fine = text.len() <= 254
        && !text.chars().any(|c| c.is_whitespace() || c.is_control())
        && text
            .split_once('@')
            .is_some_and(|(local, host)| !local.is_empty() && host.len() > 1 && !host.contains('@'));
    if fine { Ok(text) } else { Err("must be an address like ada@example.org".to_owned()) }
}

/// Whether a password may be one.
///
/// # Errors
/// It is too short or too long.
pub fn password(text: &str) -> std::result::Result<(), String> {
    let (least, most) = PASSWORD;
    if (least..=most).contains(&text.len()) {
        Ok(())
    } else {
        Err(format!("must have {least} to {most} bytes"))
    }
}

/// Hash a password; takes a core for a while.
///
/// # Errors
/// The system has no randomness.
pub fn hash(password: &str) -> anyhow::Result<String> {
    let failed = |error| anyhow::anyhow!("cannot hash a password: {error}");
    let salt = SaltString::encode_b64(&rand::random::<[u8; 16]>()).map_err(failed)?;
    Ok(Argon2::default().hash_password(password.as_bytes(), &salt).map_err(failed)?.to_string())
}

fn matches(password: &str, hash: &str) -> bool {
    PasswordHash::new(hash)
        .is_ok_and(|hash| Argon2::default().verify_password(password.as_bytes(), &hash).is_ok())
}

/// What a password is checked against when nobody has the address.
fn nobodys_hash() -> String {
    static HASH: OnceLock<String> = OnceLock::new();
    HASH.get_or_init(|| hash("a password that nobody has").unwrap_or_default()).clone()
}

pub(super) fn new_token(kind: &str) -> String {
    let random: [u8; 32] = rand::random();
    format!("{kind}_{}", URL_SAFE_NO_PAD.encode(random))
}

pub(super) fn invalid(pointer: &str, detail: impl Into<String>) -> Error {
    Error::InvalidFields(vec![FieldError::new(pointer, detail)])
}

fn check_user_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > 200 || name.chars().any(char::is_control) {
        return Err(invalid("/name", "must be 1 to 200 bytes without control characters"));
    }
    Ok(())
}

/// Refuse to make somebody what the caller is not, or to touch an owner without being one.
pub(super) fn check_role(caller: &Identity, role: Role) -> Result<()> {
    let owner = matches!(role, Role::Owner | Role::Platform);
    if (owner && !caller.role.may(Action::ManageOwners)) || !caller.role.includes(role) {
        return Err(Error::Forbidden { role: caller.role, action: Action::ManageOwners, scoped: false });
    }
    Ok(())
}

impl App {
    /// Do something with a password when it is its turn, where it stops nobody else.
    pub(super) async fn hashing<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let turn = tokio::time::timeout(HASH_WAIT, self.inner.hashing.0.acquire()).await;
        let _turn = turn
            .map_err(|_| Error::Overloaded("too many passwords are being checked"))?
            .map_err(|error| Error::Internal(error.into()))?;
        tokio::task::spawn_blocking(work).await.map_err(|error| Error::Internal(error.into()))
    }

    /// The user whose address and password these are. Failures are counted, whoever they concern.
    async fn prove(&self, address: &str, password: &str) -> Result<UserRow> {
        let address = email(address).map_err(|_| Error::LoginFailed)?;
        if password.len() > PASSWORD.1 {
            return Err(Error::LoginFailed);
        }
        let email_hash: [u8; 32] = Sha256::digest(address.as_bytes()).into();
        let locked = self.inner.store.login_locked(&email_hash).await?;
        if !locked.is_zero() {
            return Err(Error::LoginLocked(locked));
        }
        let user = self.inner.store.user_find(Some(&address), None).await?;
        let against = user.as_ref().map(|user| user.password_hash.clone());
        let given = password.to_owned();
        let right = self.hashing(move || matches(&given, &against.unwrap_or_else(nobodys_hash))).await?;
        let user = user.filter(|_| right);
        self.inner.store.login_tried(&email_hash, user.is_none().then_some(LOCK)).await?;
        user.ok_or(Error::LoginFailed)
    }

    /// Begin a session: with the first tenant the user became a member of, or the one that is named.
    ///
    /// # Errors
    /// [`Error::LoginFailed`], whatever is wrong; [`Error::LoginLocked`] after too many of those.
    pub async fn login(&self, address: &str, password: &str, tenant: Option<&str>) -> Result<Session> {
        let user = self.prove(address, password).await?;
        let tenants = self.inner.store.user_tenants(user.id).await?;
        let chosen = tenants.iter().find(|t| tenant.is_none_or(|name| t.name == name)).cloned();
        self.open(&user, chosen.ok_or(Error::LoginFailed)?, tenants).await
    }

    async fn open(
        &self,
        user: &UserRow,
        tenant: MembershipRow,
        tenants: Vec<MembershipRow>,
    ) -> Result<Session> {
        let (session, refresh) = (Uuid::now_v7(), new_token("sbr"));
        let store = &self.inner.store;
        store.session_open(session, user.id, tenant.tenant, &key_hash(&refresh), SESSION).await?;
        let (access, expires_at) = self.token(session, user.id, tenant.tenant).await?;
        audit::by(tenant.tenant, Actor::User(user.id, session), &user.name);
        Ok(Session { access, expires_at, refresh, tenant, tenants })
    }

    /// Exchange a refresh token for a new pair, in the same tenant or another of the user's.
    ///
    /// # Errors
    /// [`Error::SessionOver`]: it is unknown, over, or was used before; the latter ends the session.
    pub async fn refresh(&self, refresh: &str, tenant: Option<TenantId>) -> Result<Session> {
        let new = new_token("sbr");
        match self.inner.store.session_refresh(&key_hash(refresh), &key_hash(&new), tenant).await? {
            Refreshed::Fine(session, user, tenant) => {
                let tenants = self.inner.store.user_tenants(user).await?;
                let chosen =
                    tenants.iter().find(|t| t.tenant == tenant).cloned().ok_or(Error::SessionOver)?;
                let (access, expires_at) = self.token(session, user, tenant).await?;
                audit::by(tenant, Actor::User(user, session), "");
                Ok(Session { access, expires_at, refresh: new, tenant: chosen, tenants })
            }
            Refreshed::Reused(user, tenant) => {
                tracing::warn!(%user, "a refresh token was used twice: its session has ended");
                audit::by(tenant, Actor::User(user, Uuid::nil()), "");
                self.inner.keys.forget_sessions(user);
                Err(Error::SessionOver)
            }
            Refreshed::Unknown | Refreshed::Stranger => Err(Error::SessionOver),
        }
    }

    /// End what the caller logged in with: the session with its refresh tokens, or the key that a person made for itself.
    /// A key of a program stays: whoever made it revokes it.
    ///
    /// # Errors
    /// [`Error::NoUser`]: the caller is neither; or Postgres does not answer.
    pub async fn logout(&self, caller: &Identity) -> Result<()> {
        match caller.actor {
            Actor::User(user, session) => {
                self.inner.store.session_end(session).await?;
                self.inner.keys.forget_sessions(user);
            }
            Actor::Key(key) => {
                if !self.tenant(caller.tenant).await?.key_end_own(key).await? {
                    return Err(Error::NoUser);
                }
                self.inner.keys.forget(key);
                audit::changed(Value::Null, json!({"key": key, "state": "revoked"}));
            }
            Actor::Subject(_) => return Err(Error::NoUser),
        }
        Ok(())
    }

    /// Change the caller's own password; all its other sessions end.
    ///
    /// # Errors
    /// The caller is no user, the current password is wrong, or the new one cannot be one.
    pub async fn change_password(&self, caller: &Identity, current: &str, new: &str) -> Result<()> {
        let Actor::User(id, session) = caller.actor else { return Err(Error::NoUser) };
        password(new).map_err(|detail| invalid("/new", detail))?;
        let user = self.inner.store.user_find(None, Some(id)).await?.ok_or(Error::NoUser)?;
        let email_hash: [u8; 32] = Sha256::digest(user.email.as_bytes()).into();
        let locked = self.inner.store.login_locked(&email_hash).await?;
        if !locked.is_zero() {
            return Err(Error::LoginLocked(locked));
        }
        let (given, against) = (current.to_owned(), user.password_hash);
        if given.len() > PASSWORD.1 || !self.hashing(move || matches(&given, &against)).await? {
            self.inner.store.login_tried(&email_hash, Some(LOCK)).await?;
            return Err(Error::LoginFailed);
        }
        let new = new.to_owned();
        let hash = self.hashing(move || hash(&new)).await?.map_err(Error::Internal)?;
        self.inner.store.user_password(id, &hash, Some(session)).await?;
        self.inner.keys.forget_sessions(id);
        audit::changed(Value::Null, json!({"user": id, "other_sessions": "ended"}));
        Ok(())
    }

    /// Invite somebody. The token in the answer is all that is needed to come in.
    ///
    /// # Errors
    /// The caller may not make anybody that, the address cannot be one, or there are too many.
    pub async fn invite(&self, caller: &Identity, to: &str, role: Role) -> Result<(InvitationRow, String)> {
        let email = email(to).map_err(|detail| invalid("/email", detail))?;
        check_role(caller, role)?;
        let now = Utc::now();
        let row = InvitationRow {
            id: Uuid::now_v7(),
            email,
            role,
            invited_by: caller.label(),
            created_at: now,
            expires_at: now + INVITATION,
            accepted_at: None,
        };
        let token = new_token("sbi");
        let mut connection = self.tenant(caller.tenant).await?;
        if !connection.invitation_create(&row, &key_hash(&token), MAX_INVITATIONS).await? {
            return Err(Error::TooManyInvitations);
        }
        audit::changed(Value::Null, json!({"id": row.id, "email": row.email, "role": role.as_str()}));
        Ok((row, token))
    }

    /// Invitations, newest first, and whether there are more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invitations(
        &self,
        tenant: TenantId,
        after: Option<Uuid>,
        limit: u16,
    ) -> Result<(Vec<InvitationRow>, bool)> {
        Ok(page(self.tenant(tenant).await?.invitations(after, i64::from(limit) + 1).await?, limit))
    }

    /// Take an invitation back.
    ///
    /// # Errors
    /// There is none.
    pub async fn uninvite(&self, tenant: TenantId, id: Uuid) -> Result<()> {
        let gone = self.tenant(tenant).await?.invitation_delete(id).await?;
        let gone = gone.ok_or(Error::InvitationNotFound)?;
        audit::changed(json!({"id": id, "email": gone.email, "role": gone.role.as_str()}), Value::Null);
        Ok(())
    }

    /// Accept an invitation: with the password of the user who is there, or with name and password of a new one.
    ///
    /// # Errors
    /// It is unknown or over, or the password is wrong.
    pub async fn accept(&self, token: &str, name: Option<&str>, given: &str) -> Result<Session> {
        let hash_of = key_hash(token);
        let store = &self.inner.store;
        let found = store.invitation_find(&hash_of).await?;
        let (tenant, address, role) = found.ok_or(Error::InvitationNotFound)?;
        let (user, new) = match store.user_find(Some(&address), None).await? {
            Some(_) => (self.prove(&address, given).await?, None),
            None => {
                let name = name.ok_or_else(|| invalid("/name", "is needed: nobody has this address yet"))?;
                check_user_name(name)?;
                password(given).map_err(|detail| invalid("/password", detail))?;
                let text = given.to_owned();
                let password_hash = self.hashing(move || hash(&text)).await?.map_err(Error::Internal)?;
                let user = UserRow {
                    id: UserId::generate(),
                    email: address.clone(),
                    name: name.to_owned(),
                    password_hash,
                };
                (user.clone(), Some(user))
            }
        };
        let new = new.as_ref().map(|user| (user.name.as_str(), user.password_hash.as_str()));
        let taken = store.invitation_accept(&hash_of, user.id, new).await?;
        taken.ok_or(Error::InvitationNotFound)?;
        audit::changed(Value::Null, json!({"user": user.id, "email": address, "role": role.as_str()}));
        let tenants = store.user_tenants(user.id).await?;
        let chosen = tenants.iter().find(|t| t.tenant == tenant).cloned();
        self.open(&user, chosen.ok_or(Error::InvitationNotFound)?, tenants).await
    }

    /// Members, and whether there are more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn members(
        &self,
        tenant: TenantId,
        after: Option<UserId>,
        limit: u16,
    ) -> Result<(Vec<MemberRow>, bool)> {
        Ok(page(self.tenant(tenant).await?.members(None, after, i64::from(limit) + 1).await?, limit))
    }

    /// Give a member another role, or remove it (`None`).
    ///
    /// # Errors
    /// There is none, the caller may not, or it is the last owner.
    pub async fn change_member(
        &self,
        caller: &Identity,
        id: UserId,
        role: Option<Role>,
    ) -> Result<MemberRow> {
        let mut connection = self.tenant(caller.tenant).await?;
        let before = connection.members(Some(id), None, 1).await?.pop().ok_or(Error::MemberNotFound(id))?;
        check_role(caller, before.role)?;
        if let Some(role) = role {
            check_role(caller, role)?;
        }
        match connection.member_change(id, role).await?.as_str() {
            "done" => {}
            "last" => return Err(Error::LastOwner),
            _ => return Err(Error::MemberNotFound(id)),
        }
        self.inner.keys.forget_sessions(id);
        let shape = |role: Role| json!({"user": id, "email": before.email, "role": role.as_str()});
        audit::changed(shape(before.role), role.map_or(Value::Null, shape));
        Ok(MemberRow { role: role.unwrap_or(before.role), ..before })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_password_is_kept_as_argon2id_and_matches_only_itself() {
        let hash = hash("correct horse").unwrap();
        assert!(hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{hash}");
        assert!(matches("correct horse", &hash) && !matches("correct horses", &hash));
        assert!(!matches("x", "nonsense") && !matches("", &nobodys_hash()));
        assert!(
            password("short").is_err()
                && password(&"x".repeat(257)).is_err()
                && password("long enough").is_ok()
        );
    }

    #[test]
    fn addresses_are_kept_in_one_spelling() {
        assert_eq!(email(" Ada@Example.org ").unwrap(), "ada@example.org");
        for bad in ["", "ada", "@x", "ada@", "a b@c", "a@b@c", "a@\0b"] {
            assert!(email(bad).is_err(), "{bad:?}");
        }
    }
}
