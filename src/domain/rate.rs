//! How often somebody may call: a steady rate with a burst above it. Owns the figures, not the counting.

/// A steady rate and a burst. A rate of 0 is none: everything is let through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Requests per second in the long run.
    pub per_s: u32,
    /// Requests at once after a pause.
    pub burst: u32,
}

/// What one server lets through. Several servers let through as many times that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// Of one address, for calls without a credential that this server has just seen to be valid.
    pub address: Rate,
    /// Of one key.
    pub key: Rate,
    /// Of one tenant, by all of its keys.
    pub tenant: Rate,
}

impl Rates {
    /// Nothing is refused.
    pub const UNLIMITED: Self = {
        let none = Rate { per_s: 0, burst: 0 };
        Self { address: none, key: none, tenant: none }
    };
}
