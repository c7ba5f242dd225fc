//! What a tenant may use: the list of quotas, how they are inherited, and tokens taken from a quota that all servers
//! share. Owns the rules; counts nothing and knows no clock.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{PoisonError, RwLock};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::domain::spending::{Measure, Period};

/// What happens when a quota is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// The request is refused until the window ends, or something has gone: 429.
    Refuses,
    /// The request is refused, and waiting does not help: 403.
    Forbids,
    /// What was accepted waits in the queue.
    Waits,
    /// What is beyond it is dropped and counted.
    Truncates,
    /// The call of a task fails, and the task goes on.
    Fails,
    /// What is older is deleted.
    Deletes,
    /// Nothing ends: it says who goes first.
    Shares,
}

impl Effect {
    /// The word of the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refuses => "refuses",
            Self::Forbids => "forbids",
            Self::Waits => "waits",
            Self::Truncates => "truncates",
            Self::Fails => "fails",
            Self::Deletes => "deletes",
            Self::Shares => "shares",
        }
    }
}

macro_rules! quotas {
    ($($(#[doc = $doc:literal])+ $variant:ident $name:literal $effect:ident $min:literal $max:literal $task:literal;)+) => {
        /// Every quota.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Quota { $($(#[doc = $doc])+ $variant),+ }

        impl Quota {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name in answers, commands and the database.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// What happens when it is hit.
            #[must_use]
            pub fn effect(self) -> Effect {
                match self { $(Self::$variant => Effect::$effect),+ }
            }

            /// Smallest and largest value.
            #[must_use]
            pub fn range(self) -> (u64, u64) {
                match self { $(Self::$variant => ($min, $max)),+ }
            }

            /// Whether a tenant may give its tasks shares of it.
            #[must_use]
            pub fn of_tasks(self) -> bool {
                match self { $(Self::$variant => $task),+ }
            }

            /// Whether a tenant may limit what is submitted with one of its keys.
            #[must_use]
            pub fn of_keys(self) -> bool {
                matches!(self, Self::InvocationsPerSecond | Self::InvocationsPerDay)
            }

            /// Whether there may be no bound at all.
            #[must_use]
            pub fn may_be_unlimited(self) -> bool {
                !matches!(self, Self::Weight | Self::RetentionDays)
            }

            /// Of one that bounds the ledger of usage: what it counts, and over which time.
            #[must_use]
            pub fn of_period(self) -> Option<(Measure, Period)> {
                match self {
                    Self::FuelPerDay => Some((Measure::Fuel, Period::Day)),
                    Self::FuelPerMonth => Some((Measure::Fuel, Period::Month)),
                    Self::CpuSecondsPerDay => Some((Measure::CpuSeconds, Period::Day)),
                    Self::CpuSecondsPerMonth => Some((Measure::CpuSeconds, Period::Month)),
                    _ => None,
                }
            }

            /// What it is, for the documentation.
            #[must_use]
            pub fn describe(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+).trim_ascii()),+ }
            }
        }
    };
}

quotas! {
    /// Invocations accepted per second, over all servers.
    InvocationsPerSecond "invocations_per_s" Refuses 1 1_000_000 true;
    /// Invocations accepted per day (UTC), over all servers.
    InvocationsPerDay "invocations_per_day" Refuses 1 1_000_000_000_000 true;
    /// Invocations that wait.
    QueueDepth "queue_depth" Refuses 0 1_000_000_000 false;
    /// Different modules stored.
    Modules "modules" Forbids 0 1_000_000 false;
    /// Bytes of all modules stored.
    ModuleBytes "module_bytes" Forbids 0 1_000_000_000_000_000 false;
    /// Memory that one attempt may ask for, in bytes.
    AttemptMemoryBytes "attempt_memory_bytes" Forbids 65_536 4_294_967_296 true;
    /// Attempts that run at once, over all workers.
    Concurrency "concurrency" Waits 1 1_000_000 false;
    /// Memory that attempts that run at once declare together, over all workers, in bytes.
    MemoryBytes "memory_bytes" Waits 65_536 1_000_000_000_000_000 false;
    /// Fuel that attempts use per day (UTC).
    FuelPerDay "fuel_per_day" Waits 1 1_000_000_000_000_000_000 true;
    /// Fuel that attempts use per month (UTC).
    FuelPerMonth "fuel_per_month" Waits 1 1_000_000_000_000_000_000 true;
    /// Seconds of CPU that attempts use per day (UTC).
    CpuSecondsPerDay "cpu_s_per_day" Waits 1 1_000_000_000 true;
    /// Seconds of CPU that attempts use per month (UTC).
    CpuSecondsPerMonth "cpu_s_per_month" Waits 1 1_000_000_000 true;
    /// Log bytes kept per day (UTC); later invocations of the day log nothing.
    LogBytesPerDay "log_bytes_per_day" Truncates 0 1_000_000_000_000_000 false;
    /// Bytes in the key-value stores of its tasks: of keys and values, and 64 for each key.
    KvBytes "kv_bytes" Fails 0 1_000_000_000_000_000 false;
    /// HTTP requests that tasks send per day (UTC), those that are refused not counted.
    EgressRequestsPerDay "egress_requests_per_day" Fails 0 1_000_000_000_000 true;
    /// Bytes of bodies that HTTP requests of tasks send and receive per day (UTC).
    EgressBytesPerDay "egress_bytes_per_day" Fails 0 1_000_000_000_000_000 true;
    /// Days that ended invocations are kept.
    RetentionDays "retention_days" Deletes 1 3_650 false;
    /// Share of the workers beside other tenants.
    Weight "weight" Shares 1 10_000 false;
}

/// A word that is not a quota.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a quota")]
pub struct UnknownQuota(pub String);

impl FromStr for Quota {
    type Err = UnknownQuota;
    fn from_str(text: &str) -> Result<Self, UnknownQuota> {
        let found = Self::ALL.iter().find(|quota| quota.as_str() == text);
        found.copied().ok_or_else(|| UnknownQuota(text.chars().take(64).collect()))
    }
}

/// How much of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// So much and no more.
    At(u64),
    /// As much as there is.
    Unlimited,
}

/// The text for [`Amount::Unlimited`].
const UNLIMITED: &str = "unlimited";
/// The weight of a tenant of which nothing is said.
pub const PLAIN_WEIGHT: u64 = 100;

impl Amount {
    /// The bound, if there is one.
    #[must_use]
    pub fn bound(self) -> Option<u64> {
        match self {
            Self::At(n) => Some(n),
            Self::Unlimited => None,
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(n) => n.fmt(f),
            Self::Unlimited => f.write_str(UNLIMITED),
        }
    }
}

impl FromStr for Amount {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == UNLIMITED {
            return Ok(Self::Unlimited);
        }
        text.parse()
            .map(Self::At)
            .map_err(|_| format!("`{text}` is neither a whole number nor `{UNLIMITED}`"))
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::At(n) => serializer.serialize_u64(*n),
            Self::Unlimited => serializer.serialize_str(UNLIMITED),
        }
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Either {
            Number(u64),
            Text(String),
        }
        match Either::deserialize(deserializer) {
            Ok(Either::Number(n)) => Ok(Self::At(n)),
            Ok(Either::Text(text)) if text == UNLIMITED => Ok(Self::Unlimited),
            _ => Err(serde::de::Error::custom(format!("must be a whole number or \"{UNLIMITED}\""))),
        }
    }
}

/// What one level says: the configuration, a plan, a tenant, a task, a key. What is absent is inherited.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Level(BTreeMap<Quota, Amount>);

impl Level {
    /// What it says of a quota.
    #[must_use]
    pub fn get(&self, quota: Quota) -> Option<Amount> {
        self.0.get(&quota).copied()
    }

    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Say this of a quota; `None`: inherit.
    ///
    /// # Errors
    /// It is out of the quota's range.
    pub fn set(&mut self, quota: Quota, amount: Option<Amount>) -> Result<(), String> {
        let Some(amount) = amount else {
            self.0.remove(&quota);
            return Ok(());
        };
        let (min, max) = quota.range();
        let fits = match amount {
            Amount::At(n) => (min..=max).contains(&n),
            Amount::Unlimited => quota.may_be_unlimited(),
        };
        if !fits {
            let or_not =
                if quota.may_be_unlimited() { format!(", or \"{UNLIMITED}\"") } else { String::new() };
            return Err(format!("must be from {min} to {max}{or_not}"));
        }
        self.0.insert(quota, amount);
        Ok(())
    }

    /// From what is stored. What this version does not know is left out: another version may have written it.
    #[must_use]
    pub fn from_json(value: &serde_json::Value) -> Self {
        let pairs = value.as_object().into_iter().flatten();
        Self(
            pairs
                .filter_map(|(name, value)| {
                    Some((name.parse::<Quota>().ok()?, serde_json::from_value(value.clone()).ok()?))
                })
                .collect(),
        )
    }

    /// As it is stored.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let pairs = self.0.iter().map(|(quota, amount)| {
            let value = match amount {
                Amount::At(n) => (*n).into(),
                Amount::Unlimited => UNLIMITED.into(),
            };
            (quota.as_str().to_owned(), value)
        });
        serde_json::Value::Object(pairs.collect())
    }
}

/// Who said what holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The configuration of the installation.
    Default,
    /// The tenant's plan.
    Plan,
    /// The platform, for this tenant.
    Tenant,
}

impl Source {
    /// The word of the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Plan => "plan",
            Self::Tenant => "tenant",
        }
    }
}

/// The levels above a task, the weakest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Levels {
    /// The configuration.
    pub default: Level,
    /// The plan.
    pub plan: Level,
    /// The tenant.
    pub tenant: Level,
}

impl Levels {
    /// What holds for the tenant, and who said so.
    #[must_use]
    pub fn holds(&self, quota: Quota) -> (Amount, Source) {
        let levels =
            [(&self.tenant, Source::Tenant), (&self.plan, Source::Plan), (&self.default, Source::Default)];
        let said = levels.into_iter().find_map(|(level, source)| Some((level.get(quota)?, source)));
        let nothing_said = match quota {
            // A share is never without bound.
            Quota::Weight => Amount::At(PLAIN_WEIGHT),
            _ => Amount::Unlimited,
        };
        said.unwrap_or((nothing_said, Source::Default))
    }

    /// The bound that holds for the tenant.
    #[must_use]
    pub fn bound(&self, quota: Quota) -> Option<u64> {
        self.holds(quota).0.bound()
    }
}

/// What holds of tenants of whom nothing is said; follows the configuration.
#[derive(Debug, Default)]
pub struct Defaults(RwLock<Level>);

impl Defaults {
    /// This, until something else is set.
    #[must_use]
    pub fn new(level: Level) -> Self {
        Self(RwLock::new(level))
    }

    /// This from now on.
    pub fn set(&self, level: Level) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = level;
    }

    /// All of it.
    #[must_use]
    pub fn level(&self) -> Level {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The bound of one quota, if there is one.
    #[must_use]
    pub fn bound(&self, quota: Quota) -> Option<u64> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(quota)?.bound()
    }

    /// What of it the database has to know, to let tenants wait by it.
    #[must_use]
    pub fn of_queues(&self) -> Level {
        let mut level = self.level();
        level.0.retain(|quota, amount| quota.effect() == Effect::Waits && amount.bound().is_some());
        level
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use serde_json::json;

    #[test]
    fn the_nearest_level_that_says_something_holds() {
        let level = |json| Level::from_json(&json);
        let levels = Levels {
            default: level(json!({"modules": 10, "module_bytes": 100, "invocations_per_s": 5})),
            plan: level(json!({"modules": 20, "invocations_per_s": "unlimited"})),
            tenant: level(json!({"modules": 30, "unknown": 1, "weight": "much"})),
        };
        assert_eq!(levels.holds(Quota::Modules), (Amount::At(30), Source::Tenant));
        assert_eq!(levels.holds(Quota::InvocationsPerSecond), (Amount::Unlimited, Source::Plan));
        assert_eq!(levels.holds(Quota::ModuleBytes), (Amount::At(100), Source::Default));
        assert_eq!(levels.holds(Quota::Weight), (Amount::At(PLAIN_WEIGHT), Source::Default));
        assert_eq!(levels.holds(Quota::Concurrency), (Amount::Unlimited, Source::Default));
        assert_eq!(levels.tenant.to_json(), json!({"modules": 30}));
    }

    #[test]
    fn amounts_are_numbers_or_unlimited_and_keep_their_ranges() {
        for (json, amount) in [("7", Amount::At(7)), ("\"unlimited\"", Amount::Unlimited)] {
            assert_eq!(serde_json::from_str::<Amount>(json).unwrap(), amount);
            assert_eq!(serde_json::to_string(&amount).unwrap(), json);
        }
        for bad in ["-1", "1.5", "\"many\"", "null", "[]"] {
            assert!(serde_json::from_str::<Amount>(bad).is_err(), "{bad}");
        }
        for quota in Quota::ALL {
            let (min, max) = quota.range();
            let mut level = Level::default();
            assert!(
                level.set(*quota, Some(Amount::At(min))).is_ok()
                    && level.set(*quota, Some(Amount::At(max))).is_ok()
            );
            assert!(level.set(*quota, Some(Amount::At(max + 1))).is_err(), "{quota:?}");
            assert_eq!(level.get(*quota), Some(Amount::At(max)));
            level.set(*quota, None).unwrap();
            assert_eq!(level, Level::default());
            assert_eq!(quota.as_str().parse(), Ok(*quota));
        }
    }

    #[test]
    fn the_operators_table_says_of_each_quota_what_happens() {
        let table = include_str!("../../docs/operations.md");
        for quota in Quota::ALL {
            let name = format!("`{}`", quota.as_str());
            let row = table.lines().find(|line| {
                line.starts_with("| `") && line.split('|').nth(1).is_some_and(|first| first.contains(&name))
            });
            let row = row.unwrap_or_else(|| panic!("{name} is not in the table"));
            assert!(row.contains(quota.effect().as_str()), "{name}: {row}");
        }
    }
}
