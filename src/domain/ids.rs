//! Typed ids: ids of different things do not mix. Owns no meaning beyond that.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident;)+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, sqlx::Type)]
        #[serde(transparent)]
        #[sqlx(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new id, greater than those made before it (UUID version 7).
            #[must_use]
            pub fn generate() -> Self {
                Self(Uuid::now_v7())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                text.parse().map(Self)
            }
        }
    )+};
}

ids! {
    /// A customer of the installation.
    TenantId;
    /// An API key (not the secret).
    KeyId;
    /// A person, who may be a member of several tenants.
    UserId;
    /// A task definition.
    TaskId;
    /// One request to run a version on one input.
    InvocationId;
    /// One worker process.
    WorkerId;
    /// One claimed batch.
    LeaseId;
    /// One bulk operation.
    BulkId;
    /// One pause.
    PauseId;
    /// Something that a running attempt asked to start.
    StartId;
}
