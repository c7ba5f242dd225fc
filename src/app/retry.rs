//! Running again what ended badly: a new invocation with the input, tags, limits, retries and priority of the old one.
//! Never touches the old one.

use crate::app::invoke::{Invoked, as_accepted, restricts};
use crate::app::{App, Error, Result};
use crate::domain::admission::Admission;
use crate::domain::ids::{InvocationId, KeyId, TenantId};
use crate::domain::invocation::State;
use crate::domain::names::{IdempotencyKey, TaskName};
use crate::store::invocation::{InputKind, Spec};
use crate::store::queue::{Enqueued, NewInvocation};
use crate::store::task::Kind;
use sandbar_host::ModuleKind;

impl App {
    /// Run a dead, cancelled or expired invocation again as a new one, of the same version or of `version`; durable on
    /// return. The same idempotency key and request give the first retry again. It counts against the limits of `by`.
    ///
    /// # Errors
    /// It is not this tenant's, has not ended, or has succeeded; its task is gone or inactive; the version is not
    /// ready, or does not take the input.
    pub async fn retry(
        &self,
        tenant: TenantId,
        id: InvocationId,
        version: Option<i32>,
        key: Option<IdempotencyKey>,
        by: Option<KeyId>,
    ) -> Result<Invoked> {
        let found = self.tenant(tenant).await?.invocation_repeatable(id).await?;
        let mut old = found.ok_or(Error::InvocationNotFound(id))?;
        match old.ended {
            Some(State::Dead | State::Cancelled | State::Expired) => {}
            Some(state) => return Err(Error::NotRetryable(state)),
            None => {
                let now = self.invocation(tenant, id, 0).await?;
                return Err(Error::NotRetryable(now.summary.state));
            }
        }
        if old.task_deleted {
            return Err(Error::TaskNotFound(old.task.as_str().to_owned()));
        }
        let target = self.target(tenant, &old.task, Some(version.unwrap_or(old.version))).await?;
        self.open_input(tenant, id, &mut old).await?;
        let mut input = old.input;
        let fits = match (&old.spec.input, target.kind) {
            (InputKind::Task, Kind::Module(ModuleKind::Task)) => {
                if let Some(manifest) = &target.manifest
                    && target.number != old.version
                    && manifest.input_schema.as_ref().is_some_and(restricts)
                {
                    input = self.inner.schemas.check(target.hash, manifest, input, "/input").await?;
                }
                true
            }
            (InputKind::Command { .. }, Kind::Module(ModuleKind::CommandP1 | ModuleKind::CommandP2))
            | (InputKind::Http, Kind::Http) => true,
            _ => false,
        };
        if !fits {
            return Err(Error::WrongInputKind { kind: target.kind, errors: Vec::new() });
        }
        let mut spec = Spec { retry_of: Some(id), ..old.spec };
        // What was accepted once is run again within what may be now.
        self.quotas_of(tenant).await?.hold(target.task, &mut spec.limits, false)?;
        let row = NewInvocation {
            tenant,
            id: InvocationId::generate(),
            task: target.task,
            version: target.number,
            priority: old.priority,
            input,
            spec,
            tags: old.tags,
            run_at: None,
            expires_at: None,
            idempotency: key.map(|key| (key.as_str().to_owned(), fingerprint(&old.task, id, version))),
            admission: Admission::default(),
        };
        let ready = self.seal(row).await?;
        let accepted = as_accepted(&old.task, ready.row());
        let invoked = match self.enqueue_within_quota(ready, by).await? {
            Enqueued::Accepted(_) | Enqueued::Waiting(_) => {
                Invoked { invocation: accepted, replayed: false, existing: false }
            }
            Enqueued::Replayed(id) | Enqueued::Existing(id) => {
                let invocation = self.invocation(tenant, id, 0).await?;
                Invoked { invocation, replayed: true, existing: false }
            }
            Enqueued::Conflict => return Err(Error::IdempotencyKeyReused),
            // It asks for neither; should it one day, these are the answers.
            Enqueued::Duplicate(holder) => return Err(Error::UniqueKeyTaken { holder }),
            Enqueued::UnknownDependency(id) => return Err(Error::DependencyNotFound(id)),
        };
        if old.ended == Some(State::Dead) {
            self.redriven(tenant, id, invoked.invocation.summary.id).await;
        }
        Ok(invoked)
    }
}

/// Never that of an ordinary request, whose body is an object.
fn fingerprint(task: &TaskName, id: InvocationId, version: Option<i32>) -> [u8; 32] {
    crate::app::invoke::fingerprint(task, format!("[\"retry\",\"{id}\",{}]", version.unwrap_or(0)).as_bytes())
}
