//! What guests may reach by HTTP, and how they do. [`grant`]: which destinations a task has been given. [`address`]:
//! which addresses a request may be sent to, whatever was given. [`call`]: what a cell and its parent say about a
//! request. `guest`: the cell's side, `wasi:http`. [`placeholder`]: secrets that the parent puts into headers. [`client`]: the parent's side, the only code that dials.
//!
//! A cell has no network. It passes a request on as data, and whoever takes it believes none of it.

pub mod address;
pub mod call;
pub mod client;
pub mod grant;
pub(crate) mod guest;
pub mod placeholder;
