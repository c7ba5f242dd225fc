//! Login, members and invitations on the wire.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::wire::key::Role;

/// Who wants to come in.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// Address.
    pub email: String,
    /// Password.
    pub password: String,
    /// Name of the tenant to act in. Default: the first the user became a member of.
    pub tenant: Option<String>,
}

/// A refresh token to be exchanged.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Refresh {
    /// The newest refresh token of the session. It works once.
    pub refresh_token: String,
    /// Id of the tenant to act in from now on. Default: the same.
    pub tenant_id: Option<Uuid>,
}

/// An invitation to be accepted.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Accept {
    /// What the invitation's maker was given.
    pub token: String,
    /// Password of the user with the invited address; if there is none, the password of the new one, 10 to 256 bytes.
    pub password: String,
    /// Name of the new user; needed if there is none with the address.
    pub name: Option<String>,
}

/// A password to be changed.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewPassword {
    /// The one that is.
    pub current: String,
    /// The one that shall be: 10 to 256 bytes.
    pub new: String,
}

/// Somebody who lost the password.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewReset {
    /// Address of the user.
    pub email: String,
}

/// A token for a new password.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct MadeReset {
    /// What the user needs for `POST /v1/auth/reset`. Not shown again.
    pub token: String,
    /// Id of the user.
    pub user: Uuid,
    /// The user's address.
    pub email: String,
    /// Until when it can be used, once.
    pub expires_at: DateTime<Utc>,
}

/// A lost password to be replaced.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Reset {
    /// What was made for the user.
    pub token: String,
    /// The new password: 10 to 256 bytes.
    pub password: String,
}

/// A key for oneself.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OwnKey {
    /// For people: 1 to 200 bytes, like the name of the machine.
    pub name: String,
}

/// A tenant in which a user may act.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Membership {
    /// Its id.
    pub tenant_id: Uuid,
    /// Its name.
    pub tenant: String,
    /// What the user is there.
    pub role: Role,
}

/// A session.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// For `Authorization: Bearer …`.
    pub access_token: String,
    /// When it expires.
    pub expires_at: DateTime<Utc>,
    /// For the next pair of tokens; works once, until 30 days after the login.
    pub refresh_token: String,
    /// Where it acts.
    pub acts_in: Membership,
    /// Every tenant in which it could.
    pub tenants: Vec<Membership>,
}

/// A member of the tenant.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Member {
    /// Id of the user.
    pub id: Uuid,
    /// Address.
    pub email: String,
    /// Name.
    pub name: String,
    /// What it is in the tenant.
    pub role: Role,
    /// Member since.
    pub since: DateTime<Utc>,
}

/// A member's new role.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MemberPatch {
    /// What it shall be; never more than whoever says so.
    pub role: Role,
}

/// Somebody to be invited.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewInvitation {
    /// Address.
    pub email: String,
    /// What it shall be; never more than whoever invites.
    pub role: Role,
}

/// An invitation.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Invitation {
    /// Its id.
    pub id: Uuid,
    /// Who is invited.
    pub email: String,
    /// As what.
    pub role: Role,
    /// By whom.
    pub invited_by: String,
    /// When.
    pub created_at: DateTime<Utc>,
    /// Until when it can be accepted.
    pub expires_at: DateTime<Utc>,
    /// When it was accepted.
    pub accepted_at: Option<DateTime<Utc>>,
}

/// An invitation that was made.
#[derive(Clone, Serialize, Deserialize, ToSchema)]
pub struct MadeInvitation {
    /// What whoever is invited needs for `POST /v1/auth/accept`. Not shown again.
    pub token: String,
    /// What is known of it from now on.
    pub invitation: Invitation,
}

/// A public key (RFC 8037).
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Jwk {
    /// `OKP`.
    pub kty: String,
    /// `Ed25519`.
    pub crv: String,
    /// `EdDSA`.
    pub alg: String,
    /// `sig`.
    #[serde(rename = "use")]
    pub usage: String,
    /// Its name in tokens.
    pub kid: String,
    /// The key, in base64url.
    pub x: String,
}

/// Public keys.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Jwks {
    /// The newest first.
    pub keys: Vec<Jwk>,
}
