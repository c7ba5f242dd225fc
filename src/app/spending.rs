//! Budgets: set, shown and watched. Owns when they are looked at; a budget stops nothing, quotas do (`quota`).

use std::time::Duration;

use serde_json::{Value, json};
use uuid::Uuid;

use crate::app::invoke::invalid;
use crate::app::task::page;
use crate::app::{App, Error, Result, audit};
use crate::domain::ids::TenantId;
use crate::domain::names::TaskName;
use crate::domain::spending::{MAX_BUDGETS, thresholds};
use crate::store::WorkerStore;
use crate::store::spending::{Budget, BudgetRow, EventRow, Put};

/// How soon a threshold that is reached becomes an event.
pub const EVERY: Duration = Duration::from_secs(30);
/// Budgets that one run looks at.
const AT_ONCE: i64 = 100;

fn shape(budget: &Budget) -> Value {
    json!({
        "name": budget.name,
        "task": budget.task,
        "measure": budget.measure.as_str(),
        "period": budget.period.as_str(),
        "amount": budget.amount,
        "thresholds": budget.thresholds,
    })
}

impl App {
    /// This tenant's budgets, and what is used of each.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn budgets(&self, tenant: TenantId) -> Result<Vec<BudgetRow>> {
        Ok(self.tenant(tenant).await?.budgets(None).await?)
    }

    /// Set a budget, new or changed.
    ///
    /// # Errors
    /// [`Error::InvalidFields`]; there is no such task; there are too many.
    pub async fn set_budget(&self, tenant: TenantId, mut budget: Budget) -> Result<BudgetRow> {
        if budget.amount < 1 {
            return Err(invalid("/amount", "must be from 1 to 9223372036854775807"));
        }
        budget.thresholds = thresholds(budget.thresholds).map_err(|why| invalid("/thresholds", why))?;
        let mut connection = self.tenant(tenant).await?;
        let before = connection.budgets(Some(&budget.name)).await?.pop();
        match connection.budget_put(&budget).await? {
            Put::Done => {}
            Put::UnknownTask => {
                let name = budget.task.as_ref().map_or("", TaskName::as_str);
                return Err(Error::TaskNotFound(name.to_owned()));
            }
            Put::TooMany => {
                let limit = MAX_BUDGETS.unsigned_abs();
                return Err(Error::OverQuota { name: "budgets", limit, wanted: limit + 1 });
            }
        }
        audit::changed(before.map_or(Value::Null, |row| shape(&row.budget)), shape(&budget));
        let found = connection.budgets(Some(&budget.name)).await?.pop();
        found.ok_or_else(|| Error::BudgetNotFound(budget.name.as_str().to_owned()))
    }

    /// Delete a budget. Its events stay.
    ///
    /// # Errors
    /// There is none.
    pub async fn delete_budget(&self, tenant: TenantId, name: &TaskName) -> Result<()> {
        if !self.tenant(tenant).await?.budget_delete(name).await? {
            return Err(Error::BudgetNotFound(name.as_str().to_owned()));
        }
        audit::changed(json!({ "name": name }), Value::Null);
        Ok(())
    }

    /// This tenant's events, newest first; and whether there are more.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn events(
        &self,
        tenant: TenantId,
        after: Option<Uuid>,
        limit: u16,
    ) -> Result<(Vec<EventRow>, bool)> {
        let rows = self.tenant(tenant).await?.events(after, i64::from(limit) + 1).await?;
        Ok(page(rows, limit))
    }
}

/// Look at budgets whose turn it is, and say which thresholds are reached. Returns how many events that made, and whether
/// there is more to look at.
///
/// # Errors
/// Postgres does not answer, or the duty is somebody else's by now.
pub async fn watch(store: &WorkerStore) -> crate::store::Result<(u64, bool)> {
    let (events, seen) = store.budgets_look(EVERY, AT_ONCE).await?;
    for (tenant, event) in &events {
        let text = |name: &str| event.data[name].to_string();
        tracing::warn!(
            %tenant,
            budget = text("budget"),
            percent = text("threshold"),
            used = text("used"),
            amount = text("amount"),
            measure = text("measure"),
            period = text("period"),
            "a threshold of a budget is reached"
        );
    }
    Ok((events.len() as u64, seen >= AT_ONCE.unsigned_abs()))
}
