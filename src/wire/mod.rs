//! What goes over the wire: requests, responses and the problem body. Apart from domain and store on purpose, because
//! these shapes are promised to clients and those are not. Owns no rules: ranges are checked in `app`.

pub mod artifact;
pub mod audit;
pub mod bulk;
pub mod dead_letter;
pub mod encryption;
pub mod invocation;
pub mod key;
pub mod operate;
pub mod patch;
pub mod people;
pub mod problem;
pub mod quota;
pub mod secret;
pub mod spending;
pub mod task;
pub mod tenant;
pub mod usage;
pub mod why;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One page of a list.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// What the page shows.
    pub items: Vec<T>,
    /// Address of the next page; `null` on the last one.
    pub next: Option<String>,
}
