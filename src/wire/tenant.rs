//! Tenants on the wire.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// Where a tenant stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TenantState {
    /// It works.
    Active,
    /// Nothing new starts, and nothing is changed.
    Suspended,
    /// The same, and everything goes at `delete_after`.
    Deleting,
}

/// A tenant.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Tenant {
    /// Its id.
    pub id: Uuid,
    /// Its name.
    pub name: String,
    /// Where it stands.
    pub state: TenantState,
    /// Its share of the slots.
    pub weight: i32,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When its state was changed last.
    pub changed_at: Option<DateTime<Utc>>,
    /// When everything of it goes; until then it can be made active again.
    pub delete_after: Option<DateTime<Utc>>,
}

/// A tenant to be made.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewTenant {
    /// 1 to 63 characters of a-z, 0-9 and -, beginning with a letter or a digit.
    pub name: String,
    /// Address of somebody who is invited as its owner.
    pub owner: Option<String>,
}

/// A tenant that was made.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct MadeTenant {
    /// The tenant.
    pub tenant: Tenant,
    /// What its owner needs for `POST /v1/auth/accept`, if one is invited. Not shown again.
    pub invitation_token: Option<String>,
}

/// States that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum WantedState {
    /// It works; also the way back from a deletion whose time has not come.
    Active,
    /// Nothing new starts, and nothing is changed.
    Suspended,
}

/// Changes of a tenant.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TenantPatch {
    /// What it shall be.
    pub state: WantedState,
    /// Cancel what runs, too. Default: it goes on to its end.
    #[serde(default)]
    pub cancel: bool,
}
