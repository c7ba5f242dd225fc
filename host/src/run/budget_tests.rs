//! The memory budget of an attempt against a model of it: random memories and tables that grow in a random order.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fmt::Write as _;

use proptest::prelude::*;

use super::tests::{attempt, command, load};
use super::*;
use crate::engine::TABLE_ELEMENTS;

const PAGE: u64 = 64 << 10;
const ELEMENT: u64 = 8;

/// A memory in pages, or a table in elements.
#[derive(Debug, Clone)]
struct Thing {
    unit: u64,
    size: u64,
    max: Option<u64>,
}

fn memory() -> impl Strategy<Value = Thing> {
    (0u64..12, prop::option::of(0u64..24)).prop_map(|(size, more)| Thing {
        unit: PAGE,
        size,
        max: more.map(|more| size + more),
    })
}

fn table() -> impl Strategy<Value = Thing> {
    (0u64..9_000, prop::option::of(0u64..60_000)).prop_map(|(size, more)| Thing {
        unit: ELEMENT,
        size,
        max: more.map(|more| (size + more).min(TABLE_ELEMENTS)),
    })
}

/// The program that does these steps and leaves with the number of the first that went otherwise than it should; and
/// the highest sum there ever was, none if it should not even start.
fn program(things: &[Thing], steps: &[(prop::sample::Index, u64)], limit: u64) -> (String, Option<u64>) {
    let mut text =
        String::from("(module (import \"wasi_snapshot_preview1\" \"proc_exit\" (func $exit (param i32)))\n");
    for (index, thing) in things.iter().enumerate() {
        let max = thing.max.map_or(String::new(), |max| max.to_string());
        if thing.unit == PAGE {
            writeln!(text, "(memory $m{index} {} {max})", thing.size).unwrap();
        } else {
            writeln!(text, "(table $t{index} {} {max} funcref)", thing.size).unwrap();
        }
    }
    writeln!(text, "(func (export \"_start\")").unwrap();
    let mut sizes: Vec<u64> = things.iter().map(|thing| thing.size).collect();
    let sum =
        |sizes: &[u64]| -> u64 { sizes.iter().zip(things).map(|(size, thing)| size * thing.unit).sum() };
    let mut peak = sum(&sizes);
    let starts = peak <= limit;
    for (number, (which, by)) in steps.iter().enumerate() {
        let index = which.index(things.len());
        let thing = &things[index];
        let by = if thing.unit == PAGE { by % 16 } else { by * 700 };
        let old = sizes[index];
        let most = if thing.unit == PAGE { 65_536 } else { TABLE_ELEMENTS };
        sizes[index] = old + by;
        let fits = sizes[index] <= thing.max.unwrap_or(most).min(most) && sum(&sizes) <= limit;
        let expected = if fits { old.to_string() } else { "-1".to_owned() };
        if fits {
            peak = peak.max(sum(&sizes));
        } else {
            sizes[index] = old;
        }
        let grow = if thing.unit == PAGE {
            format!("(memory.grow $m{index} (i32.const {by}))")
        } else {
            format!("(table.grow $t{index} (ref.null func) (i32.const {by}))")
        };
        writeln!(
            text,
            "(if (i32.ne {grow} (i32.const {expected})) (then (call $exit (i32.const {}))))",
            number + 1
        )
        .unwrap();
    }
    text.push_str("))");
    (text, starts.then_some(peak))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn growth_is_granted_while_the_sum_fits_and_every_attempt_gets_the_whole_budget_anew(
        memories in prop::collection::vec(memory(), 0..=4),
        tables in prop::collection::vec(table(), 0..=4),
        steps in prop::collection::vec((any::<prop::sample::Index>(), 0u64..40), 0..40),
        limit in PAGE..40 * PAGE,
    ) {
        let things: Vec<Thing> = memories.into_iter().chain(tables).collect();
        prop_assume!(!things.is_empty());
        let (wat, peak) = program(&things, &steps, limit);
        let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // One slot: what the first attempt took must have come back for the second.
        let runtime = Runtime::new(1).unwrap();
        let module = load(&runtime, &wat);
        let limits = Limits { memory_bytes: limit, ..Limits::default() };
        for _ in 0..2 {
            let one = attempt(&module, command(b""), limits);
            let outcome = tokio.block_on(runtime.attempt(module.clone(), one, Arc::new(Control::new(0, 0))));
            prop_assert!(outcome.receipt.peak_memory_bytes <= limit);
            match peak {
                Some(peak) => {
                    prop_assert_eq!(&outcome.termination, &Termination::Succeeded, "{}", wat);
                    prop_assert_eq!(outcome.receipt.peak_memory_bytes, peak);
                }
                None => prop_assert_eq!(&outcome.termination, &Termination::OutOfMemory, "{}", wat),
            }
        }
    }
}
