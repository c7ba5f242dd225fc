//! Which tasks have new work, as servers tell workers: so that one that has run such a task before can go first. A hint;
//! whoever hears nothing looks by itself. Never says how much work there is, or whose.

use std::collections::BTreeSet;
use std::fmt;

use crate::domain::ids::TaskId;

/// Tasks that are named; with more, the announcement says only that there is work. 64 ids fit Postgres' bound of a
/// notification (8,000 bytes) three times.
const MAX_TASKS: usize = 64;

/// Work that has become ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Announced {
    /// Of these tasks only.
    Of(BTreeSet<TaskId>),
    /// Of any task.
    Any,
}

impl Announced {
    /// Of these.
    pub fn of(tasks: impl IntoIterator<Item = TaskId>) -> Self {
        let mut all = Self::Of(BTreeSet::new());
        for task in tasks {
            all.add(&Self::Of(BTreeSet::from([task])));
        }
        all
    }

    /// This and the other.
    pub fn add(&mut self, other: &Self) {
        match (&mut *self, other) {
            (Self::Any, _) => {}
            (Self::Of(tasks), Self::Of(more)) => {
                tasks.extend(more);
                if tasks.len() > MAX_TASKS {
                    *self = Self::Any;
                }
            }
            (_, Self::Any) => *self = Self::Any,
        }
    }
}

/// Ids between spaces; empty means any.
impl fmt::Display for Announced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Of(tasks) = self else { return Ok(()) };
        for (i, task) in tasks.iter().enumerate() {
            if i > 0 {
                f.write_str(" ")?;
            }
            task.fmt(f)?;
        }
        Ok(())
    }
}

/// What is not understood means any: a newer server may say it in other words.
impl From<&str> for Announced {
    fn from(text: &str) -> Self {
        let tasks: Result<Vec<TaskId>, _> = text.split_ascii_whitespace().map(str::parse).collect();
        match tasks {
            Ok(tasks) if !tasks.is_empty() => Self::of(tasks),
            _ => Self::Any,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_says_the_same_after_its_way_through_a_notification() {
        let some = Announced::of((0..MAX_TASKS).map(|_| TaskId::generate()));
        assert!(matches!(&some, Announced::Of(tasks) if tasks.len() == MAX_TASKS));
        assert!(some.to_string().len() < 8_000);
        assert_eq!(Announced::from(some.to_string().as_str()), some);
        assert_eq!(Announced::from(Announced::Any.to_string().as_str()), Announced::Any);
    }

    #[test]
    fn too_many_tasks_and_words_that_are_not_understood_mean_any() {
        assert_eq!(Announced::of((0..=MAX_TASKS).map(|_| TaskId::generate())), Announced::Any);
        let mut one = Announced::of([TaskId::generate()]);
        assert_eq!(Announced::from(format!("{one} and more").as_str()), Announced::Any);
        one.add(&Announced::Any);
        assert_eq!(one, Announced::Any);
    }
}
