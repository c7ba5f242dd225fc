//! Encryption at rest over the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What holds for the payloads of a tenant.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Encryption {
    /// Payloads of invocations that are accepted from now on are sealed: the tenant or the installation wants it.
    pub payloads: bool,
    /// The tenant wants it.
    pub tenant: bool,
    /// The installation wants it of every tenant.
    pub installation: bool,
    /// The tenant's data key; absent before its first use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<DataKey>,
}

/// A data key, by name.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DataKey {
    /// Its fingerprint.
    #[schema(example = "9f86d081884c7d65")]
    pub id: String,
    /// The fingerprint of the master key that wraps it.
    pub master: String,
}

/// What a tenant wants for its payloads.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EncryptionRequest {
    /// Seal the payloads of what is accepted from now on.
    pub payloads: bool,
}
