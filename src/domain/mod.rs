//! Pure decisions: ids, names, states, retry, fair shares. No I/O, no clock of its own, nothing of ours imported.
//! (Deriving `sqlx::Type` on ids is the one exception: the alternative is a second id type per table.)

pub mod admission;
pub mod announced;
pub mod breaker;
pub mod budget;
pub mod bulk;
pub mod fairness;
pub mod fingerprint;
pub mod grants;
pub mod history;
pub mod ids;
pub mod invocation;
pub mod isolation;
pub mod issuer;
pub mod lease;
pub mod lending;
pub mod names;
pub mod permission;
pub mod quota;
pub mod rate;
pub mod retry;
pub mod rooms;
pub mod spending;
pub mod suspicion;
pub mod tokens;
pub mod why;
pub mod worker;
