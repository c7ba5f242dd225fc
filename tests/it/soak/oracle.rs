//! The witness outside the database: what workers wrote into their journals, line by line, and what callers were told.
//! Knows nothing of the queue's tables.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

/// Attempts of one invocation that are told apart; further ones are a violation by themselves.
const MAX_ATTEMPTS: u32 = 63;
/// Violations that are kept in words.
const MAX_SHOWN: usize = 20;

/// What is known of one invocation. Attempts are bits.
#[derive(Debug, Default, Clone, Copy)]
pub struct Seen {
    /// Attempts that started.
    pub started: u64,
    /// Attempts whose end arrived at their worker with the guest's own word that it was they.
    pub succeeded: u64,
    /// Ends of the invocation that the database accepted.
    pub accepted: u8,
}

/// Everything the journals said so far.
pub struct Oracle {
    path: PathBuf,
    file: File,
    rest: Vec<u8>,
    /// By invocation.
    pub seen: HashMap<u128, Seen>,
    /// Invocations with a success.
    pub done: usize,
    /// Starts in all.
    pub starts: u64,
    /// Attempts of the capped task that run now, each with the process that runs it.
    capped: HashMap<(u128, u32), u32>,
    /// The most that ran at once.
    pub most_capped: usize,
    cap: usize,
    /// What must never be.
    pub violations: Vec<String>,
    /// How many of them.
    pub violated: usize,
}

impl Oracle {
    /// Over a journal that may not exist yet. Of the task `capped` at most `cap` may run at once.
    pub fn open(path: &Path, cap: usize) -> Self {
        File::options().append(true).create(true).open(path).unwrap();
        Self {
            path: path.to_owned(),
            file: File::open(path).unwrap(),
            rest: Vec::new(),
            seen: HashMap::new(),
            done: 0,
            starts: 0,
            capped: HashMap::new(),
            most_capped: 0,
            cap,
            violations: Vec::new(),
            violated: 0,
        }
    }

    /// Say that nothing of this process runs any more: it was killed, or stands still.
    pub fn gone(&self, pid: u32) {
        let mut file = File::options().append(true).open(&self.path).unwrap();
        file.write_all(format!("{pid} L\n").as_bytes()).unwrap();
    }

    /// Read what has been written since.
    pub fn read(&mut self) {
        let mut bytes = std::mem::take(&mut self.rest);
        self.file.read_to_end(&mut bytes).unwrap();
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        for line in bytes[..whole].split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            let line = std::str::from_utf8(line).unwrap();
            self.line(line);
        }
        self.rest = bytes.split_off(whole);
    }

    fn line(&mut self, line: &str) {
        let mut words = line.splitn(6, ' ');
        let mut word = || words.next().unwrap_or("");
        let pid: u32 = word().parse().unwrap_or_else(|_| panic!("not a journal line: {line}"));
        let kind = word();
        if kind == "L" {
            self.capped.retain(|_, by| *by != pid);
            return;
        }
        let id = word();
        let invocation = u128::from_str_radix(id, 16).unwrap_or_else(|_| panic!("not an id: {line}"));
        let attempt: u32 = word().parse().unwrap_or(u32::MAX);
        if !(1..=MAX_ATTEMPTS).contains(&attempt) {
            self.violation(format!("attempt out of all bounds: {line}"));
            return;
        }
        let bit = 1u64 << attempt;
        match kind {
            "S" => {
                self.starts += 1;
                if word() == "capped" {
                    self.capped.insert((invocation, attempt), pid);
                    self.most_capped = self.most_capped.max(self.capped.len());
                    if self.capped.len() > self.cap {
                        let now = self.capped.len();
                        self.violation(format!("{now} of the capped task run at once: {line}"));
                    }
                }
                let seen = self.seen.entry(invocation).or_default();
                let twice = seen.started & bit != 0;
                seen.started |= bit;
                if twice {
                    self.violation(format!("one attempt started twice: {line}"));
                }
            }
            "E" => {
                self.capped.remove(&(invocation, attempt));
                let (reason, output) = (word(), word());
                if reason == "succeeded" {
                    let own = serde_json::from_str::<serde_json::Value>(output).is_ok_and(|o| {
                        o["attempt"] == attempt
                            && o["invocation_id"].as_str().is_some_and(|i| i.replace('-', "") == id)
                    });
                    if !own {
                        self.violation(format!("not this attempt's own output: {line}"));
                    }
                    let seen = self.seen.entry(invocation).or_default();
                    self.done += usize::from(seen.succeeded == 0);
                    seen.succeeded |= bit;
                }
            }
            "A" => {
                if matches!(word(), "succeeded" | "dead" | "cancelled" | "expired") {
                    let seen = self.seen.entry(invocation).or_default();
                    seen.accepted = seen.accepted.saturating_add(1);
                    let (twice, unheard) = (seen.accepted > 1, seen.succeeded & bit == 0);
                    if twice {
                        self.violation(format!("a second end was accepted: {line}"));
                    }
                    if unheard {
                        self.violation(format!("an end was accepted that no guest reported: {line}"));
                    }
                }
            }
            _ => panic!("not a journal line: {line}"),
        }
    }

    fn violation(&mut self, what: String) {
        self.violated += 1;
        if self.violations.len() < MAX_SHOWN {
            self.violations.push(what);
        }
    }

    /// All lines about the invocations that are named in violations.
    pub fn stories(&self) -> String {
        let journal = std::fs::read_to_string(&self.path).unwrap_or_default();
        let named: HashSet<&str> = self
            .violations
            .iter()
            .flat_map(|v| v.split(' '))
            .filter(|word| word.len() == 32 && word.bytes().all(|b| b.is_ascii_hexdigit()))
            .collect();
        let lines =
            journal.lines().filter(|line| line.split(' ').nth(2).is_some_and(|id| named.contains(id)));
        lines.take(200).collect::<Vec<_>>().join("\n")
    }

    /// Hold the journals against what callers were told and what the database says now: `ended` has the final state of
    /// every invocation with a result, `attempts` the reason of every attempt. Adds what does not fit to the violations,
    /// and says how many starts there were beyond one per invocation.
    pub fn compare(
        &mut self,
        acknowledged: &HashSet<u128>,
        ended: &HashMap<u128, String>,
        attempts: &HashMap<(u128, u32), String>,
    ) -> Compared {
        let mut compared = Compared::default();
        for id in acknowledged {
            match ended.get(id).map(String::as_str) {
                Some("succeeded") => {}
                other => {
                    compared.lost += 1;
                    self.violation(format!("acknowledged, and now {other:?}: {id:032x}"));
                }
            }
        }
        let mut wrong = Vec::new();
        for (id, seen) in &self.seen {
            let started = (1..=MAX_ATTEMPTS).filter(|n| seen.started >> n & 1 == 1);
            let mut kept = 0;
            for attempt in started {
                match attempts.get(&(*id, attempt)).map(String::as_str) {
                    Some("succeeded") if seen.succeeded >> attempt & 1 == 1 => kept += 1,
                    Some("lease-lost" | "host-fault") => compared.explained += 1,
                    other => wrong
                        .push(format!("attempt {attempt} of {id:032x} started and is recorded as {other:?}")),
                }
            }
            if kept != 1 {
                wrong.push(format!("{kept} kept successes of {id:032x}"));
            }
        }
        for what in wrong {
            self.violation(what);
        }
        compared
    }
}

/// What a comparison found.
#[derive(Debug, Default, Clone, Copy)]
pub struct Compared {
    /// Acknowledged invocations that did not end well.
    pub lost: usize,
    /// Starts whose attempt is recorded as lost with its lease or its host.
    pub explained: usize,
}
