//! Budgets and events over the wire.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a budget counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// Fuel of all attempts.
    Fuel,
    /// CPU seconds of all attempts.
    CpuS,
    /// Attempts that ended with a receipt.
    Attempts,
}

/// Over which time, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum BudgetPeriod {
    /// From midnight to midnight.
    Day,
    /// From the first to the last of a month.
    Month,
}

/// What somebody means to use. It stops nothing.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BudgetRequest {
    /// Of this task; absent: of the whole tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// What is counted.
    pub measure: Measure,
    /// Over which time.
    pub period: BudgetPeriod,
    /// How much, from 1.
    #[schema(minimum = 1)]
    pub amount: i64,
    /// Percentages of it that become events when they are reached: 1 to 10 of them, from 1 to 1000. Absent: 50, 80 and 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thresholds: Option<Vec<i16>>,
}

/// A budget and where it stands.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Budget {
    /// Its name.
    pub name: String,
    /// Of this task; absent: of the whole tenant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
    /// What is counted.
    pub measure: Measure,
    /// Over which time.
    pub period: BudgetPeriod,
    /// How much.
    pub amount: i64,
    /// Percentages that become events.
    pub thresholds: Vec<i16>,
    /// What is used in the period that runs.
    pub used: i64,
    /// When it began.
    pub starts_at: DateTime<Utc>,
    /// When it ends.
    pub ends_at: DateTime<Utc>,
    /// When the budget was set last.
    pub updated_at: DateTime<Utc>,
}

/// The budgets of a tenant; there are at most 100.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Budgets {
    /// By name.
    pub items: Vec<Budget>,
}

/// Something that a tenant is told once.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its id, in the order of time.
    pub id: uuid::Uuid,
    /// When it was noticed.
    pub at: DateTime<Utc>,
    /// What kind of event.
    #[schema(example = "budget-threshold")]
    pub kind: String,
    /// The rest. Of a `budget-threshold`: `budget`, `task`, `measure`, `period`, `starts_at`, `ends_at`, `threshold` in
    /// percent, `amount` and `used`.
    #[schema(value_type = Object)]
    pub data: serde_json::Value,
}
