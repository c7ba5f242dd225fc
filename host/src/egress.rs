//! What guests may reach by HTTP. [`grant`]: which destinations a task has been given. [`address`]: which addresses a
//! request may be sent to, whatever was given. Owns the rules; never opens a socket and never resolves a name.

pub mod address;
pub mod grant;
