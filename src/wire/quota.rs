//! Quotas over the wire: what a tenant may use, what it uses, plans, and changes as merge patches.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::Ref;
use utoipa::openapi::schema::{Object, ObjectBuilder, OneOfBuilder, Schema, SchemaType, Type};

use crate::domain::quota::Amount;
use crate::wire::patch::Field;

/// What a tenant may use.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Quotas {
    /// Its plan.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<String>,
    /// Every quota.
    pub quotas: Vec<QuotaStanding>,
}

/// One quota of a tenant.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct QuotaStanding {
    /// Which one.
    #[schema(example = "invocations_per_day")]
    pub name: String,
    /// How much: a whole number, or `"unlimited"`.
    #[schema(value_type = QuotaAmount)]
    pub limit: Amount,
    /// Who said so: `default` (the configuration), `plan` or `tenant` (the platform, for this one).
    #[schema(example = "plan")]
    pub source: String,
    /// What happens when it is hit: `refuses` (429), `forbids` (403), `waits`, `truncates`, `fails` (the call of
    /// a task, which goes on), `deletes` (what is older); `shares` says who goes first.
    #[schema(example = "refuses")]
    pub effect: String,
    /// How much is used; absent where it is not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<u64>,
    /// When it is counted from 0 again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resets_at: Option<DateTime<Utc>>,
}

/// Amounts by name, where `null` inherits again.
pub(super) fn changes() -> Object {
    let null = ObjectBuilder::new().schema_type(SchemaType::Type(Type::Null));
    let either = OneOfBuilder::new().item(Ref::from_schema_name("QuotaAmount")).item(null).build();
    ObjectBuilder::new().additional_properties(Some(Schema::OneOf(either))).build()
}

/// How much: a whole number, or `"unlimited"`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum QuotaAmount {
    /// So much and no more.
    At(u64),
    /// As much as there is.
    Unlimited(QuotaUnlimited),
}

/// No bound.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum QuotaUnlimited {
    /// As much as there is.
    Unlimited,
}

/// A change of what a tenant may use: a JSON merge patch.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct QuotasPatch {
    /// Its plan; `null`: none.
    #[serde(default, skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<String>)]
    pub plan: Field<String>,
    /// Quotas by name: a whole number or `"unlimited"`; `null`: as the plan or the configuration says.
    #[serde(default)]
    #[schema(schema_with = changes)]
    pub quotas: BTreeMap<String, Option<Amount>>,
}

/// Shares that a task has of its tenant's quotas. Only `invocations_per_s`, `invocations_per_day` and
/// `attempt_memory_bytes` can be shared out.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TaskQuotas {
    /// By name: a whole number or `"unlimited"`. In a change, `null` takes a share back.
    #[serde(default)]
    #[schema(schema_with = changes)]
    pub quotas: BTreeMap<String, Option<Amount>>,
}

/// A plan of the platform.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Plan {
    /// Its name.
    #[schema(example = "team")]
    pub name: String,
    /// What its tenants may use, where it says something.
    #[schema(value_type = BTreeMap<String, QuotaAmount>)]
    pub quotas: BTreeMap<String, Amount>,
    /// Last change.
    pub updated_at: DateTime<Utc>,
}

/// The plans of the platform.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Plans {
    /// By name.
    pub items: Vec<Plan>,
}

/// What a plan says.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    /// By name: a whole number or `"unlimited"`; what is absent is as the configuration says.
    #[schema(value_type = BTreeMap<String, QuotaAmount>)]
    pub quotas: BTreeMap<String, Amount>,
}
