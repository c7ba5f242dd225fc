//! Tenants, for the platform: made, suspended, deleted. Owns what each state means: suspended, nothing new starts and
//! nothing is changed, and what runs ends or is cancelled; deleting, the same until the grace time is over, and then
//! everything goes, by the duty `erase`.

use chrono::{TimeDelta, Utc};
use serde_json::{Value, json};

use crate::app::task::page;
use crate::app::{App, Error, FieldError, Result, audit, people};
use crate::domain::ids::TenantId;
use crate::domain::permission::{Action, Role};
use crate::store::tenant::{Identity, TenantRow, TenantState};

/// Time between a deletion and its execution: when nobody says, and at most. Until then it can be undone.
pub const GRACE: (TimeDelta, TimeDelta) = (TimeDelta::days(7), TimeDelta::days(90));

/// Whether an action is possible while nothing new may start.
fn harmless(action: Action) -> bool {
    action.as_str().starts_with("read-")
        || matches!(
            action,
            Action::Cancel
                | Action::ErasePayloads
                | Action::Download
                | Action::OperatePlatform
                | Action::ManageTenants
                | Action::ManageKeys
                | Action::ManagePeople
        )
}

fn shape(row: &TenantRow) -> Value {
    json!({"id": row.id, "name": row.name, "state": row.state.as_str(), "delete_after": row.delete_after})
}

fn check_name(name: &str) -> Result<()> {
    let fine = (1..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-');
    if fine {
        return Ok(());
    }
    let detail = "must be 1 to 63 characters of a-z, 0-9 and -, and begin with a letter or a digit";
    Err(Error::InvalidFields(vec![FieldError::new("/name", detail)]))
}

impl App {
    /// Refuse what a tenant that is not active may not do.
    ///
    /// # Errors
    /// [`Error::TenantSuspended`].
    pub fn check_active(caller: &Identity, action: Action) -> Result<()> {
        if caller.active || harmless(action) { Ok(()) } else { Err(Error::TenantSuspended) }
    }

    /// Tenants by name, and whether there are more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn tenants(&self, after: &str, limit: u16) -> Result<(Vec<TenantRow>, bool)> {
        Ok(page(self.inner.store.tenant_list(None, after, i64::from(limit) + 1).await?, limit))
    }

    /// One tenant.
    ///
    /// # Errors
    /// There is none.
    pub async fn tenant_row(&self, id: TenantId) -> Result<TenantRow> {
        let found = self.inner.store.tenant_list(Some(id), "", 1).await?.pop();
        found.ok_or_else(|| Error::TenantNotFound(id.to_string()))
    }

    /// Make a tenant, and invite its owner: the token of the invitation comes along.
    ///
    /// # Errors
    /// The name is taken, or cannot be one.
    pub async fn make_tenant(
        &self,
        caller: &Identity,
        name: &str,
        owner: Option<&str>,
    ) -> Result<(TenantRow, Option<String>)> {
        check_name(name)?;
        if let Some(address) = owner {
            people::email(address)
                .map_err(|detail| Error::InvalidFields(vec![FieldError::new("/owner", detail)]))?;
        }
        let id = TenantId::generate();
        if !self.inner.store.tenant_create(id, name).await? {
            return Err(Error::TenantNameTaken(name.to_owned()));
        }
        let made = self.tenant_row(id).await?;
        let token = match owner {
            Some(address) => {
                // The platform acts in the new tenant this once: somebody has to be the first.
                let there = Identity { tenant: id, ..caller.clone() };
                Some(self.invite(&there, address, Role::Owner).await?.1)
            }
            None => None,
        };
        audit::changed(Value::Null, shape(&made));
        Ok((made, token))
    }

    /// Suspend a tenant, make it active again, or let it be deleted after `grace` seconds. With `cancel` what runs is
    /// asked to stop.
    ///
    /// # Errors
    /// There is none, its time is over, it is the caller's own, or the grace time is out of range.
    pub async fn set_tenant(
        &self,
        caller: &Identity,
        id: TenantId,
        state: TenantState,
        grace_s: Option<u32>,
        cancel: bool,
    ) -> Result<TenantRow> {
        let before = self.tenant_row(id).await?;
        if id == caller.tenant && state != TenantState::Active {
            return Err(Error::OwnTenant);
        }
        let grace = grace_s.map_or(GRACE.0, |seconds| TimeDelta::seconds(seconds.into()));
        if grace > GRACE.1 {
            let detail = "must be at most 7776000 (90 days)";
            return Err(Error::InvalidFields(vec![FieldError::new("/grace_s", detail)]));
        }
        let delete_after = (state == TenantState::Deleting).then(|| Utc::now() + grace);
        if !self.inner.store.tenant_change(id, state, delete_after, cancel).await? {
            return Err(Error::TenantNotFound(id.to_string()));
        }
        // A tenant that is gone in the same moment was changed all the same.
        let after = self.tenant_row(id).await?;
        self.inner.keys.forget_tenant(id);
        audit::changed(shape(&before), shape(&after));
        Ok(after)
    }
}
