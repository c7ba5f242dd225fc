//! A new password for whoever lost it. Nothing is sent by us: somebody who may makes a token and brings it over. Owns who may
//! make one for whom, and how long it is good; a token ends sessions and keys of its user, and no lock of the address.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::app::people::{check_role, email, hash, invalid, new_token, password};
use crate::app::{App, Error, Result, audit};
use crate::domain::ids::UserId;
use crate::domain::permission::Action;
use crate::store::tenant::{Actor, Identity, key_hash};

/// How long a token is good.
const LIFE: Duration = Duration::from_secs(3_600);

/// A token that was made. There is one for a user at a time.
pub struct MadeReset {
    /// What the user needs. Not kept by us.
    pub token: String,
    /// Whose.
    pub user: UserId,
    /// The user's address.
    pub email: String,
    /// Until when it can be used, once.
    pub expires_at: DateTime<Utc>,
}

impl App {
    /// Make a token for the user with this address. The platform may for everybody; a tenant's people for members who are in
    /// no other tenant, and are nothing that they themselves are not.
    ///
    /// # Errors
    /// Nobody here has the address; the user is in another tenant too; or the caller may not.
    pub async fn make_reset(&self, caller: &Identity, address: &str) -> Result<MadeReset> {
        let address = email(address).map_err(|detail| invalid("/email", detail))?;
        let platform = Self::authorize(caller, Action::ManageTenants, None).is_ok();
        let user = self.inner.store.user_find(Some(&address), None).await?.ok_or(Error::UserNotFound)?;
        let mut connection = self.tenant(caller.tenant).await?;
        if !platform {
            // One of another tenant is not there.
            let member = connection.members(Some(user.id), None, 1).await?.pop();
            check_role(caller, member.ok_or(Error::UserNotFound)?.role)?;
        }
        let token = new_token("sbp");
        let made = connection.reset_make(user.id, &key_hash(&token), platform, LIFE).await?;
        let expires_at = made.ok_or(Error::MemberElsewhere)?;
        audit::changed(Value::Null, json!({"user": user.id, "email": address, "expires_at": expires_at}));
        Ok(MadeReset { token, user: user.id, email: address, expires_at })
    }

    /// Set a new password by a token. It works once; all sessions and own keys of the user end.
    ///
    /// # Errors
    /// The token is unknown or over, or the password cannot be one.
    pub async fn use_reset(&self, token: &str, new: &str) -> Result<()> {
        password(new).map_err(|detail| invalid("/password", detail))?;
        let (token, store) = (key_hash(token), &self.inner.store);
        // Hashing is dear: only for whoever has a token.
        store.reset_find(&token).await?.ok_or(Error::ResetNotFound)?;
        let new = new.to_owned();
        let hashed = self.hashing(move || hash(&new)).await?.map_err(Error::Internal)?;
        let user = store.reset_use(&token, &hashed).await?.ok_or(Error::ResetNotFound)?;
        // Own keys, and sessions on other servers, work for at most five seconds more.
        self.inner.keys.forget_sessions(user);
        if let Some(tenant) = store.user_tenants(user).await?.first() {
            audit::by(tenant.tenant, Actor::User(user, Uuid::nil()), "");
        }
        audit::changed(Value::Null, json!({"user": user, "sessions": "ended"}));
        Ok(())
    }
}

/// A token for the user with this address, by whoever runs the server.
///
/// # Errors
/// Nobody has the address, or Postgres does not answer.
pub async fn make_on_the_server(admin_url: &str, address: &str) -> anyhow::Result<(String, DateTime<Utc>)> {
    let address = email(address).map_err(|detail| anyhow::anyhow!("the address {detail}"))?;
    let token = new_token("sbp");
    let until = crate::store::reset::make(admin_url, &address, &key_hash(&token), LIFE).await?;
    Ok((token, until))
}
