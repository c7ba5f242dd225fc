//! Memory accounting of one attempt: one sum over all linear memories and tables of all its
//! instances. Wasmtime asks before each growth; the answer is yes or no, never a trap. Where the worker has lent less than
//! the limit, a growth beyond that waits until it has lent more.

use std::sync::Arc;

use wasmtime::{ResourceLimiter, ResourceLimiterAsync};

use crate::capability::call::{Answer, Ask};
use crate::capability::guest::question;
use crate::state::LiveSink;

use crate::engine::{INSTANCES_PER_ATTEMPT, MEMORIES_PER_ATTEMPT, TABLES_PER_ATTEMPT};

/// Bytes of one table element in the engine.
const TABLE_ELEMENT_BYTES: u64 = 8;

/// What the worker has lent of the limit.
struct Loan {
    bytes: u64,
    token: u64,
    sink: Arc<dyn LiveSink>,
}

/// Sums, caps and remembers the peak.
pub struct Limiter {
    loan: Option<Loan>,
    limit: u64,
    used: u64,
    peak: u64,
    peak_before: u64,
    last: u64,
    refused: bool,
}

impl Limiter {
    /// Allows `limit` bytes in all.
    #[must_use]
    pub const fn new(limit: u64) -> Self {
        Self { loan: None, limit, used: 0, peak: 0, peak_before: 0, last: 0, refused: false }
    }

    /// The same, of which the attempt `token` has `bytes` from the start and asks for more by `sink`.
    pub(crate) fn lent(limit: u64, bytes: u64, token: u64, sink: Arc<dyn LiveSink>) -> Self {
        Self { loan: Some(Loan { bytes, token, sink }), ..Self::new(limit) }
    }

    /// Whether growth may have to wait.
    pub(crate) const fn is_lent(&self) -> bool {
        self.loan.is_some()
    }

    /// The highest sum so far, in bytes.
    #[must_use]
    pub const fn peak(&self) -> u64 {
        self.peak
    }

    /// Whether a growth was refused because of the limit.
    #[must_use]
    pub const fn refused(&self) -> bool {
        self.refused
    }

    fn grow(&mut self, by: u64) -> bool {
        match self.used.checked_add(by) {
            Some(sum) if sum <= self.limit => {
                self.used = sum;
                self.last = by;
                self.peak_before = self.peak;
                self.peak = self.peak.max(sum);
                true
            }
            _ => {
                self.last = 0;
                self.peak_before = self.peak;
                self.refused = true;
                false
            }
        }
    }

    /// Waits until so much more is lent. What the limit refuses anyway is not asked for.
    async fn borrow(&mut self, by: u64) {
        let needed = self.used.saturating_add(by);
        let Some(loan) = &mut self.loan else { return };
        if needed <= loan.bytes || needed > self.limit {
            return;
        }
        let Some(answer) = question(&loan.sink, loan.token, Ask::Memory { bytes: needed }) else { return };
        // An end without an answer is the end of this cell or of the attempt.
        if let Some(Answer::Memory(bytes)) = answer.await {
            loan.bytes = bytes.max(loan.bytes);
        }
    }

    /// Counts memory of this process that is held for the guest until its end; false if there is no room. Looks at the
    /// limit alone: whoever lends counts [`crate::limits::HELD_BYTES`] for it.
    pub(crate) fn hold(&mut self, bytes: u64) -> bool {
        self.grow(bytes)
    }

    /// The engine could not do what was allowed: take the last growth back.
    fn undo(&mut self) {
        self.used = self.used.saturating_sub(self.last);
        self.peak = self.peak_before;
        self.last = 0;
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(self.grow(desired.saturating_sub(current) as u64))
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.undo();
        Ok(())
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let elements = desired.saturating_sub(current) as u64;
        Ok(self.grow(elements.saturating_mul(TABLE_ELEMENT_BYTES)))
    }

    fn table_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.undo();
        Ok(())
    }

    fn instances(&self) -> usize {
        INSTANCES_PER_ATTEMPT as usize
    }

    fn tables(&self) -> usize {
        TABLES_PER_ATTEMPT as usize
    }

    fn memories(&self) -> usize {
        MEMORIES_PER_ATTEMPT as usize
    }
}

/// The same, after what is lacking was lent.
#[async_trait::async_trait]
impl ResourceLimiterAsync for Limiter {
    async fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        self.borrow(desired.saturating_sub(current) as u64).await;
        ResourceLimiter::memory_growing(self, current, desired, maximum)
    }

    fn memory_grow_failed(&mut self, error: wasmtime::Error) -> wasmtime::Result<()> {
        ResourceLimiter::memory_grow_failed(self, error)
    }

    async fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let elements = desired.saturating_sub(current) as u64;
        self.borrow(elements.saturating_mul(TABLE_ELEMENT_BYTES)).await;
        ResourceLimiter::table_growing(self, current, desired, maximum)
    }

    fn table_grow_failed(&mut self, error: wasmtime::Error) -> wasmtime::Result<()> {
        ResourceLimiter::table_grow_failed(self, error)
    }

    fn instances(&self) -> usize {
        ResourceLimiter::instances(self)
    }

    fn tables(&self) -> usize {
        ResourceLimiter::tables(self)
    }

    fn memories(&self) -> usize {
        ResourceLimiter::memories(self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::{Limiter, ResourceLimiter};

    #[test]
    fn memories_and_tables_share_one_limit() {
        let mut limiter = Limiter::new(200);
        assert!(limiter.memory_growing(0, 100, None).unwrap());
        assert!(limiter.table_growing(0, 10, None).unwrap());
        assert!(!limiter.memory_growing(100, 200, None).unwrap());
        assert!(limiter.refused());
        assert_eq!(limiter.peak(), 180);
    }

    proptest::proptest! {
        #[test]
        fn whatever_grows_in_whatever_order_the_limit_is_never_passed(
            limit in 0u64..1 << 20,
            steps in proptest::collection::vec((0usize..6, 0usize..1 << 19, 0u8..4), 1..100),
        ) {
            let mut limiter = Limiter::new(limit);
            // Three memories in bytes, three tables in elements of 8 bytes.
            let mut sizes = [0usize; 6];
            let mut peak = 0;
            for (which, by, fate) in steps {
                let (current, desired) = (sizes[which], sizes[which] + by);
                let table = which >= 3;
                let allowed = if table {
                    limiter.table_growing(current, desired, None).unwrap()
                } else {
                    limiter.memory_growing(current, desired, None).unwrap()
                };
                match (allowed, fate, table) {
                    // The engine could not do it: what was taken must come back.
                    (true, 0, true) => limiter.table_grow_failed(wasmtime::Error::msg("no")).unwrap(),
                    (true, 0, false) => limiter.memory_grow_failed(wasmtime::Error::msg("no")).unwrap(),
                    (true, ..) => sizes[which] = desired,
                    (false, ..) => proptest::prop_assert!(limiter.refused()),
                }
                let sum: u64 = sizes.iter().enumerate().map(|(n, size)| *size as u64 * if n >= 3 { 8 } else { 1 }).sum();
                proptest::prop_assert!(sum <= limit);
                proptest::prop_assert_eq!(sum, limiter.used);
                peak = peak.max(sum);
                proptest::prop_assert_eq!(peak, limiter.peak());
            }
        }
    }

    #[test]
    fn a_growth_that_the_engine_fails_is_not_counted() {
        let mut limiter = Limiter::new(200);
        assert!(limiter.memory_growing(0, 150, None).unwrap());
        limiter.memory_grow_failed(wasmtime::Error::msg("no")).unwrap();
        assert_eq!(limiter.peak(), 0);
        assert!(limiter.memory_growing(0, 200, None).unwrap());
        assert!(!limiter.refused());
    }
}
