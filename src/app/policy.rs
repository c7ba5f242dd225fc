//! Limits and retry of an invocation: what the installation says, then the task, then the request. Each later word
//! replaces the earlier one, and the outcome is checked against the ranges.

use sandbar_host::limits::{Limits, PartialLimits};

use crate::app::FieldError;
use crate::domain::retry::RetryPolicy;

pub use crate::domain::retry::PartialRetry;

/// `base` with `wanted` in its place.
///
/// # Errors
/// The first limit out of range, by its pointer in a body that has `limits`.
pub fn limits(base: Limits, wanted: &PartialLimits) -> Result<Limits, FieldError> {
    let limits = base.with(wanted);
    match limits.check() {
        Ok(()) => Ok(limits),
        Err(error) => Err(FieldError::new(format!("/limits/{}", error.name), error.to_string())),
    }
}

/// `base` with `wanted` in its place.
///
/// # Errors
/// The first field out of range, by its pointer in a body that has `retry`.
pub fn retry(base: &RetryPolicy, wanted: &PartialRetry) -> Result<RetryPolicy, FieldError> {
    let policy = wanted.over(base);
    match policy.check() {
        Ok(()) => Ok(policy),
        Err(error) => Err(FieldError::new(format!("/retry/{}", error.field), error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_later_word_replaces_an_earlier_one_field_by_field() {
        let task = PartialLimits { fuel: Some(5), timeout_ms: Some(7), ..PartialLimits::default() };
        let request = PartialLimits { fuel: Some(9), ..PartialLimits::default() };
        let merged = limits(limits(Limits::default(), &task).unwrap(), &request).unwrap();
        assert_eq!(merged, Limits { fuel: 9, timeout_ms: 7, ..Limits::default() });
        let wanted = PartialRetry { max_attempts: Some(1), ..PartialRetry::default() };
        assert_eq!(
            retry(&RetryPolicy::default(), &wanted).unwrap(),
            RetryPolicy { max_attempts: 1, ..RetryPolicy::default() }
        );
    }

    #[test]
    fn a_value_out_of_range_is_named_by_its_pointer() {
        let wanted = PartialLimits { memory_bytes: Some(1), ..PartialLimits::default() };
        assert_eq!(limits(Limits::default(), &wanted).unwrap_err().pointer, "/limits/memory_bytes");
        let wanted = PartialRetry { jitter: Some(1.5), ..PartialRetry::default() };
        assert_eq!(retry(&RetryPolicy::default(), &wanted).unwrap_err().pointer, "/retry/jitter");
    }
}
