//! Reading, changing and cancelling invocations.

use std::collections::BTreeMap;

use chrono::Utc;

use crate::app::invoke::{MAX_AHEAD, invalid};
use crate::app::sealed::Part;
use crate::app::task::page;
use crate::app::{App, Error, Result};
use crate::domain::announced::Announced;
use crate::domain::ids::{InvocationId, TenantId};
use crate::domain::names::Tags;
use crate::domain::why::Facts;
use crate::store::invocation::{
    Changed, Filter, Invocation, InvocationChange, Kept, Output, ResultRow, Summary,
};
use crate::store::queue::Cancelled;

impl App {
    /// One invocation with its attempts, and its output if that has at most `inline_bytes`.
    ///
    /// # Errors
    /// It is not this tenant's.
    pub async fn invocation(
        &self,
        tenant: TenantId,
        id: InvocationId,
        inline_bytes: i32,
    ) -> Result<Invocation> {
        let found = self.tenant(tenant).await?.invocation_get(id, inline_bytes).await?;
        self.open_payloads(tenant, found.ok_or(Error::InvocationNotFound(id))?).await
    }

    /// Invocations that pass the filter, newest first; and whether there are more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invocations(
        &self,
        tenant: TenantId,
        filter: &Filter,
        limit: u16,
    ) -> Result<(Vec<Summary>, bool)> {
        let rows = self.tenant(tenant).await?.invocation_list(filter, i64::from(limit) + 1).await?;
        Ok(page(rows, limit))
    }

    /// What is known about the waiting of an invocation (`domain::why` says what follows from it).
    ///
    /// # Errors
    /// It is not this tenant's.
    pub async fn why(&self, tenant: TenantId, id: InvocationId) -> Result<Facts> {
        self.tenant(tenant).await?.invocation_why(id).await?.ok_or(Error::InvocationNotFound(id))
    }

    /// What an invocation left.
    ///
    /// # Errors
    /// It is not this tenant's, has not ended, or left nothing.
    pub async fn result(&self, tenant: TenantId, id: InvocationId) -> Result<Output> {
        let mut connection = self.tenant(tenant).await?;
        match connection.invocation_result(id).await? {
            None => Err(Error::InvocationNotFound(id)),
            Some((_, Kept { erased_at: Some(_), .. })) => Err(Error::PayloadsErased(id)),
            Some((ResultRow::Output(mut output), kept)) => {
                drop(connection);
                let (sealed, bytes) = (kept.sealed.as_deref(), output.bytes.take().unwrap_or_default());
                let bytes = self.open_part(tenant, id, sealed, 0, Part::Output, bytes).await?;
                output.size_bytes = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
                output.bytes = Some(bytes);
                Ok(output)
            }
            Some((ResultRow::Nothing(state), _)) => Err(Error::NoOutput(state)),
            Some((ResultRow::Unfinished, _)) => {
                let now = connection.invocation_get(id, 0).await?;
                let now = now.ok_or(Error::InvocationNotFound(id))?;
                Err(Error::NotFinished(now.summary.state))
            }
        }
    }

    /// Change an invocation: priority and time while it waits, tags at any time.
    ///
    /// # Errors
    /// It is not this tenant's, runs or has ended; a value is out of range.
    pub async fn change(
        &self,
        tenant: TenantId,
        id: InvocationId,
        change: &InvocationChange,
    ) -> Result<Invocation> {
        if change.priority.is_some_and(|p| !(-100..=100).contains(&p)) {
            return Err(invalid("/priority", "must be from -100 to 100"));
        }
        if change.run_at.flatten().is_some_and(|at| at > Utc::now() + MAX_AHEAD) {
            return Err(invalid("/run_at", "must be at most 366 days ahead"));
        }
        let set: BTreeMap<String, String> =
            change.tags.iter().filter_map(|(k, v)| Some((k.clone(), v.clone()?))).collect();
        Tags::try_from(set).map_err(|error| invalid("/tags", error.to_string()))?;
        if change.tags.keys().any(|key| key.contains('\0')) {
            return Err(invalid("/tags", "may not contain control characters"));
        }
        let mut connection = self.tenant(tenant).await?;
        let before = connection.invocation_get(id, 0).await?;
        let changed = connection.invocation_change(id, change).await?;
        let found = connection.invocation_get(id, 0).await?.ok_or(Error::InvocationNotFound(id))?;
        drop(connection);
        let found = self.open_payloads(tenant, found).await?;
        match changed {
            Changed::Done(ready) => {
                let settings = |i: &Invocation| {
                    let s = &i.summary;
                    serde_json::json!({"priority": s.priority, "run_at": s.run_at, "tags": s.tags})
                };
                let before = before.as_ref().map_or(serde_json::Value::Null, settings);
                crate::app::audit::changed(before, settings(&found));
                if ready {
                    self.inner.signals.ready.announce(&Announced::Any);
                    if let Err(error) =
                        self.inner.store.notify_ready(&self.inner.signals.outgoing(&Announced::Any)).await
                    {
                        tracing::debug!(%error, "cannot notify workers; they poll");
                    }
                }
                Ok(found)
            }
            Changed::Unknown => Err(Error::InvocationNotFound(id)),
            Changed::Started => Err(Error::AlreadyStarted),
            Changed::Finished => Err(Error::AlreadyFinished(found.summary.state)),
            Changed::TooManyTags => Err(invalid("/tags", "may be at most 16")),
            Changed::Expired => Err(invalid("/run_at", "must be before the invocation expires")),
        }
    }

    /// Ask for the end of an invocation. True: it has ended; false: it runs, and its worker has been told.
    ///
    /// # Errors
    /// It is not this tenant's, or has ended.
    pub async fn cancel(&self, tenant: TenantId, id: InvocationId) -> Result<(Invocation, bool)> {
        let mut connection = self.tenant(tenant).await?;
        let met = connection.invocation_cancel(id).await?;
        match met {
            Cancelled::Now => self.inner.signals.done(&[id]),
            Cancelled::Soon => self.inner.signals.cancelled(id),
            Cancelled::TooLate | Cancelled::Unknown => {}
        }
        let found = connection.invocation_get(id, 0).await?;
        drop(connection);
        let found = self.open_payloads(tenant, found.ok_or(Error::InvocationNotFound(id))?).await?;
        match met {
            Cancelled::Unknown => Err(Error::InvocationNotFound(id)),
            Cancelled::TooLate => Err(Error::AlreadyFinished(found.summary.state)),
            Cancelled::Now => Ok((found, true)),
            Cancelled::Soon => Ok((found, false)),
        }
    }
}
