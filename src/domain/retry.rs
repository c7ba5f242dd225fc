//! When a failed attempt is followed by another. Owns the policy and the arithmetic; the caller brings the
//! randomness and the clock.

use serde::{Deserialize, Serialize};

/// How the wait between attempts grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backoff {
    /// Always `initial_ms`.
    Fixed,
    /// `initial_ms · factorⁿ`, at most `max_ms`.
    Exponential,
}

/// What happens after a failed attempt. Absent fields have the defaults of [`RetryPolicy::default`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RetryPolicy {
    /// Attempts in all, the first included. 1 to 100.
    pub max_attempts: u16,
    /// Growth of the wait.
    pub backoff: Backoff,
    /// First wait in milliseconds. 0 to 86,400,000.
    pub initial_ms: u64,
    /// Growth per failure (exponential only). 1 to 100.
    pub factor: f64,
    /// Longest wait in milliseconds. 0 to 604,800,000 (a week).
    pub max_ms: u64,
    /// Share of the wait that is random: 0 none, 1 anywhere from nothing to all of it. 0 to 1.
    pub jitter: f64,
}

impl Default for RetryPolicy {
    /// 3 attempts, 1 s doubling up to 5 min, half of each wait random.
    fn default() -> Self {
        Self {
            max_attempts: 3,
            backoff: Backoff::Exponential,
            initial_ms: 1_000,
            factor: 2.0,
            max_ms: 300_000,
            jitter: 0.5,
        }
    }
}

/// A retry policy with a value outside its range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("retry.{field} must be {allowed}")]
pub struct InvalidPolicy {
    /// The field.
    pub field: &'static str,
    /// Its range in words.
    pub allowed: &'static str,
}

impl RetryPolicy {
    /// The largest `max_attempts`.
    pub const MAX_ATTEMPTS: u16 = 100;

    /// Refuses values outside the ranges.
    ///
    /// # Errors
    /// The first field that is out of range.
    pub fn check(&self) -> Result<(), InvalidPolicy> {
        let rows = [
            ((1..=Self::MAX_ATTEMPTS).contains(&self.max_attempts), "max_attempts", "from 1 to 100"),
            (self.initial_ms <= 86_400_000, "initial_ms", "from 0 to 86400000"),
            ((1.0..=100.0).contains(&self.factor), "factor", "from 1 to 100"),
            (self.max_ms <= 604_800_000, "max_ms", "from 0 to 604800000"),
            ((0.0..=1.0).contains(&self.jitter), "jitter", "from 0 to 1"),
        ];
        for (ok, field, allowed) in rows {
            if !ok {
                return Err(InvalidPolicy { field, allowed });
            }
        }
        Ok(())
    }

    /// Milliseconds to wait after the failure number `failures` (1 for the first). `random` is uniform in `[0, 1)`.
    /// Equal jitter generalised: `wait · (1 − jitter) + wait · jitter · random`, so it never exceeds `max_ms`.
    #[must_use]
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    pub fn delay_ms(&self, failures: u16, random: f64) -> u64 {
        let initial = self.initial_ms as f64;
        let full = match self.backoff {
            Backoff::Fixed => initial,
            Backoff::Exponential => initial * self.factor.powi(i32::from(failures.saturating_sub(1))),
        };
        let capped = full.min(self.max_ms as f64);
        (capped * (1.0 - self.jitter) + capped * self.jitter * random.clamp(0.0, 1.0)) as u64
    }
}

/// A retry policy with gaps: what is absent comes from the level above.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs)] // the fields of `RetryPolicy`
pub struct PartialRetry {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff: Option<Backoff>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initial_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub factor: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jitter: Option<f64>,
}

impl PartialRetry {
    /// `base` with what is named here in its place.
    #[must_use]
    pub fn over(&self, base: &RetryPolicy) -> RetryPolicy {
        RetryPolicy {
            max_attempts: self.max_attempts.unwrap_or(base.max_attempts),
            backoff: self.backoff.unwrap_or(base.backoff),
            initial_ms: self.initial_ms.unwrap_or(base.initial_ms),
            factor: self.factor.unwrap_or(base.factor),
            max_ms: self.max_ms.unwrap_or(base.max_ms),
            jitter: self.jitter.unwrap_or(base.jitter),
        }
    }
}

/// How an attempt ended, as far as retrying cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It did what it was asked for.
    Success,
    /// It failed and may be tried again, not before this many milliseconds if given.
    Retryable {
        /// The guest's own wish.
        after_ms: Option<u64>,
    },
    /// It failed and will always fail.
    Fatal,
    /// Somebody asked for its end.
    Cancelled,
    /// Not its own doing.
    HostFault,
}

/// What becomes of the invocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Ended well.
    Succeeded,
    /// Ended badly for good.
    Dead,
    /// Ended on request.
    Cancelled,
    /// Another attempt after this many milliseconds; counts against the policy.
    Retry {
        /// The wait.
        delay_ms: u64,
    },
    /// Another attempt after this many milliseconds; does not count against the policy.
    Release {
        /// The wait.
        delay_ms: u64,
    },
    /// The same where this host could not run it, by no fault that counts against [`MAX_HOST_FAULTS`].
    HandBack {
        /// The wait.
        delay_ms: u64,
    },
}

impl Verdict {
    /// The word of the queue protocol.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Dead => "dead",
            Self::Cancelled => "cancelled",
            Self::Retry { .. } => "retry",
            Self::Release { .. } | Self::HandBack { .. } => "release",
        }
    }
}

/// Attempts that ended by the host's fault are repeated at most this often, so that an input which kills its host
/// cannot do so for ever.
pub const MAX_HOST_FAULTS: u16 = 10;

/// Decide after an attempt; of the earlier ones `spent` counted as failures, and `faults` ended by the fault of a host.
#[must_use]
pub fn decide(ending: Ending, policy: &RetryPolicy, spent: u16, faults: u16, random: f64) -> Verdict {
    match ending {
        Ending::Success => Verdict::Succeeded,
        Ending::Fatal => Verdict::Dead,
        Ending::Cancelled => Verdict::Cancelled,
        Ending::Retryable { after_ms } => {
            let failures = spent.saturating_add(1);
            if failures >= policy.max_attempts {
                Verdict::Dead
            } else {
                let delay_ms = after_ms
                    .map(|wish| wish.min(RetryPolicy::MAX_WISH_MS))
                    .unwrap_or_else(|| policy.delay_ms(failures, random));
                Verdict::Retry { delay_ms }
            }
        }
        Ending::HostFault => {
            let faults = faults.saturating_add(1);
            if faults > MAX_HOST_FAULTS {
                Verdict::Dead
            } else {
                // The first time at once: most often a neighbour's crash. Then 200 ms doubling up to 30 s.
                let delay_ms = match faults {
                    0 | 1 => 0,
                    n => (100u64 << n.min(16)).min(30_000),
                };
                Verdict::Release { delay_ms }
            }
        }
    }
}

impl RetryPolicy {
    /// The longest wait a guest may ask for: a week.
    pub const MAX_WISH_MS: u64 = 604_800_000;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn policies() -> impl Strategy<Value = RetryPolicy> {
        (1u16..=100, any::<bool>(), 0u64..=86_400_000, 1.0f64..=100.0, 0u64..=604_800_000, 0.0f64..=1.0)
            .prop_map(|(max_attempts, fixed, initial_ms, factor, max_ms, jitter)| RetryPolicy {
                max_attempts,
                backoff: if fixed { Backoff::Fixed } else { Backoff::Exponential },
                initial_ms,
                factor,
                max_ms,
                jitter,
            })
    }

    proptest! {
        #[test]
        fn a_wait_never_exceeds_the_maximum(p in policies(), n in 1u16..=100, r in 0.0f64..1.0) {
            prop_assert!(p.check().is_ok());
            prop_assert!(p.delay_ms(n, r) <= p.max_ms);
        }

        #[test]
        fn waits_without_jitter_never_shrink(p in policies(), n in 1u16..100) {
            let p = RetryPolicy { jitter: 0.0, ..p };
            prop_assert!(p.delay_ms(n, 0.5) <= p.delay_ms(n + 1, 0.5));
        }

        #[test]
        fn retryable_failures_end_after_exactly_max_attempts(p in policies(), r in 0.0f64..1.0) {
            let mut spent = 0;
            while let Verdict::Retry { .. } = decide(Ending::Retryable { after_ms: None }, &p, spent, 0, r) {
                spent += 1;
            }
            prop_assert_eq!(spent + 1, p.max_attempts);
        }
    }

    #[test]
    fn host_faults_do_not_use_up_retries_but_end_in_the_end() {
        let once = RetryPolicy { max_attempts: 1, ..RetryPolicy::default() };
        assert_eq!(decide(Ending::HostFault, &once, 0, 0, 0.0), Verdict::Release { delay_ms: 0 });
        assert!(matches!(decide(Ending::HostFault, &once, 0, 9, 0.0), Verdict::Release { .. }));
        assert_eq!(decide(Ending::HostFault, &once, 0, 10, 0.0), Verdict::Dead);
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        let bad = RetryPolicy { jitter: f64::NAN, ..RetryPolicy::default() };
        assert_eq!(bad.check().unwrap_err().field, "jitter");
        let bad = RetryPolicy { max_attempts: 0, ..RetryPolicy::default() };
        assert_eq!(bad.check().unwrap_err().field, "max_attempts");
    }
}
