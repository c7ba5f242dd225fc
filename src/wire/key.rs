//! API keys, and who somebody is, on the wire.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::domain::quota::Amount;
use crate::wire::patch::Field;
use crate::wire::quota::{QuotaAmount, changes};

/// What somebody is in a tenant. What each may: docs/permissions.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Operates the installation, and is owner of its own tenant.
    Platform,
    /// Everything in its tenant, owners included.
    Owner,
    /// Everything in its tenant but what concerns owners.
    Admin,
    /// Uploads and changes tasks, and runs them.
    Developer,
    /// Runs tasks, and steers what waits and runs.
    Operator,
    /// Looks.
    Viewer,
}

/// Where a key stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum KeyState {
    /// It works.
    Active,
    /// A rotation made another in its place; it works until it expires.
    Replaced,
    /// Its time is over.
    Expired,
    /// Somebody revoked it.
    Revoked,
}

/// An API key, without the key itself.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Key {
    /// Its id.
    pub id: Uuid,
    /// For people.
    pub name: String,
    /// Its first characters, which may be shown.
    pub prefix: String,
    /// Where it stands.
    pub state: KeyState,
    /// What it may at most.
    pub role: Role,
    /// What it is narrowed to: `action`, `action:task` or `*:task`. Empty: all that the role may.
    pub scopes: Vec<String>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// Who made it.
    pub created_by: Option<String>,
    /// From when on it is refused; `null`: never.
    pub expires_at: Option<DateTime<Utc>>,
    /// Its last use, up to a minute late; `null`: never used.
    pub last_used_at: Option<DateTime<Utc>>,
    /// The key that a rotation made in its place.
    pub replaced_by: Option<Uuid>,
    /// When it was revoked.
    pub revoked_at: Option<DateTime<Utc>>,
    /// Limits of what is submitted with it and the keys that it was rotated from and into, together. The tenant's quotas hold
    /// besides.
    #[serde(default)]
    pub quotas: Vec<KeyQuota>,
}

/// A limit of a key.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct KeyQuota {
    /// Which one.
    #[schema(example = "invocations_per_day")]
    pub name: String,
    /// How much: a whole number, or `"unlimited"`.
    #[schema(value_type = QuotaAmount)]
    pub limit: Amount,
    /// How much is used, with what servers hold ahead.
    pub used: u64,
    /// When it is counted from 0 again; absent while nothing is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resets_at: Option<DateTime<Utc>>,
}

/// A key to be made.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewKey {
    /// For people: 1 to 200 bytes.
    pub name: String,
    /// What it may at most; never more than its maker.
    pub role: Role,
    /// What it is narrowed to: `action`, `action:task` or `*:task`; at most 64. Empty: all that the role may.
    #[serde(default)]
    pub scopes: Vec<String>,
    /// From when on it is refused; at most 10 years ahead.
    pub expires_at: Option<DateTime<Utc>>,
    /// Limits of what is submitted with it, by name: `invocations_per_s` and `invocations_per_day`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = changes)]
    pub quotas: BTreeMap<String, Option<Amount>>,
}

/// A key that was made. The key itself is shown here and never again.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct MadeKey {
    /// The key itself, for the header `x-api-key`.
    pub secret: String,
    /// What is known of it from now on.
    pub key: Key,
}

/// Changes of a key, as a JSON merge patch.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KeyPatch {
    /// For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What it is narrowed to, in place of what it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scopes: Option<Vec<String>>,
    /// From when on it is refused; `null`: never.
    #[serde(default, skip_serializing_if = "Field::is_absent")]
    #[schema(value_type = Option<DateTime<Utc>>)]
    pub expires_at: Field<DateTime<Utc>>,
    /// Limits of what is submitted with it, by name: `invocations_per_s` and `invocations_per_day`; `null` takes one back.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = changes)]
    pub quotas: BTreeMap<String, Option<Amount>>,
}

/// How a key is rotated.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RotateKey {
    /// Seconds that the old key goes on working; default 86,400 (a day), at most 2,592,000 (30 days).
    pub overlap_s: Option<u32>,
    /// From when on the new key is refused. Default: as far ahead as the old key's was when it was made.
    pub expires_at: Option<DateTime<Utc>>,
}

/// What kind of somebody acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ActorKind {
    /// An API key.
    Key,
    /// A user who logged in.
    User,
    /// Somebody with a token of an issuer elsewhere.
    Subject,
}

/// Who the credential belongs to.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Me {
    /// Id of the tenant.
    pub tenant_id: Uuid,
    /// Name of the tenant.
    pub tenant: String,
    /// What acts.
    pub kind: ActorKind,
    /// Its id.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// What it is in the tenant.
    pub role: Role,
    /// What it is narrowed to; empty: all that the role may.
    pub scopes: Vec<String>,
    /// Until when the credential works; `null`: until it is revoked.
    pub expires_at: Option<DateTime<Utc>>,
    /// Every action that it may on something.
    pub may: Vec<String>,
}
