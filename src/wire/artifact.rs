//! Files that were collected, on the wire.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A file that was collected from the last attempt.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Artifact {
    /// From the root of the scratch directory, without a slash at its beginning.
    #[schema(example = "out/report.csv")]
    pub path: String,
    /// Size.
    pub size_bytes: i64,
    /// Where to go from here.
    pub links: ArtifactLinks,
}

/// Where to go from an artifact.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ArtifactLinks {
    /// Its bytes.
    #[serde(rename = "self")]
    pub this: String,
}
