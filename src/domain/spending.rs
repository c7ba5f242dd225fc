//! Budgets: what they measure, over which time, and what may be said in one. Owns the words and the ranges; counts nothing.

use std::str::FromStr;

/// Budgets of one tenant.
pub const MAX_BUDGETS: i64 = 100;
/// Thresholds of one budget.
pub const MAX_THRESHOLDS: usize = 10;
/// Largest threshold, in percent: somebody may want to hear of ten times too much.
pub const MAX_THRESHOLD: i16 = 1_000;
/// Thresholds when nobody names any.
pub const THRESHOLDS: [i16; 3] = [50, 80, 100];

macro_rules! words {
    ($(#[doc = $of:literal])+ $name:ident { $(#[doc = $doc:literal] $variant:ident $word:literal),+ }) => {
        $(#[doc = $of])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $(#[doc = $doc] $variant),+ }

        impl $name {
            /// Every one.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word in the API and in the database.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl FromStr for $name {
            type Err = ();
            fn from_str(text: &str) -> Result<Self, ()> {
                Self::ALL.iter().copied().find(|one| one.as_str() == text).ok_or(())
            }
        }
    };
}

words! {
    /// What a budget counts.
    Measure {
        /// Fuel of all attempts.
        Fuel "fuel",
        /// CPU seconds of all attempts.
        CpuSeconds "cpu_s",
        /// Attempts that ended with a receipt.
        Attempts "attempts"
    }
}

words! {
    /// Over which time, in UTC.
    Period {
        /// From midnight to midnight.
        Day "day",
        /// From the first to the last of a month.
        Month "month"
    }
}

/// Thresholds in order, each once.
///
/// # Errors
/// What is wrong with them.
pub fn thresholds(mut asked: Vec<i16>) -> Result<Vec<i16>, &'static str> {
    asked.sort_unstable();
    asked.dedup();
    if asked.is_empty() || asked.len() > MAX_THRESHOLDS {
        return Err("must be 1 to 10 percentages");
    }
    if asked.iter().any(|percent| !(1..=MAX_THRESHOLD).contains(percent)) {
        return Err("must be percentages from 1 to 1000");
    }
    Ok(asked)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn thresholds_are_in_order_and_in_range_and_words_are_read_as_they_are_written() {
        assert_eq!(thresholds(vec![100, 50, 100, 80]).unwrap(), THRESHOLDS);
        for bad in [vec![], vec![0], vec![-1], vec![1_001], (1..=11).collect()] {
            assert!(thresholds(bad).is_err());
        }
        for measure in Measure::ALL {
            assert_eq!(measure.as_str().parse(), Ok(*measure));
        }
        for period in Period::ALL {
            assert_eq!(period.as_str().parse(), Ok(*period));
        }
        assert_eq!("week".parse::<Period>(), Err(()));
    }
}
