//! How an attempt gets from its claim to where it runs: admission, a cell, its code there. The rest of the loop is above.

use std::sync::Arc;

use chrono::Utc;
use sandbar_host::ModuleHash;
use sandbar_host::capability::call::Answer;
use sandbar_host::cell::{CancelReason, Cell, SubmitError};
use sandbar_host::files::scratch_bytes;
use sandbar_host::limits::fixed_bytes;
use sandbar_host::outcome::Termination;
use tracing::info;

use super::{Dispatch, InFlight, MAX_PLACES, MAX_WARM, QUARANTINED, Report, whose};
use crate::domain::fairness::Charge;
use crate::domain::lending::{Need, Relief};
use crate::store::invocation::InputKind;
use crate::store::queue::Claimed;
use crate::worker::admission::Verdict;
use crate::worker::attempt::{attempt, host_fault, unreadable, without_run};
use crate::worker::cells::Place;
use crate::worker::http;
use crate::worker::live::Live;

impl Dispatch<'_> {
    /// Take a claimed attempt in, and start it if it may.
    pub(super) fn start(&mut self, claimed: Claimed, charge: Option<Charge>) {
        let key = (claimed.tenant, claimed.sha256);
        let (limits, input) = (&claimed.spec.limits, claimed.input.len() as u64);
        let need = match claimed.spec.input {
            InputKind::Http => Need { fixed: http::reserved_bytes(limits, input), memory: 0 },
            InputKind::Task | InputKind::Command { .. } => {
                let scratch = claimed.spec.scratch.as_ref().map_or(0, |scratch| scratch_bytes(scratch.bytes));
                Need {
                    fixed: fixed_bytes(limits, input).saturating_add(scratch),
                    memory: limits.memory_bytes,
                }
            }
        };
        let withheld = claimed.withheld;
        let token = self.register(claimed, charge);
        if let Some(withheld) = withheld {
            self.end(token, without_run(unreadable(withheld)));
            return;
        }
        let verdict = self.admission.ask(token, key, need);
        self.admitted(token, &verdict);
    }

    /// Give a claimed attempt a token.
    pub(super) fn register(&mut self, claimed: Claimed, charge: Option<Charge>) -> u64 {
        if self.warm.len() >= MAX_WARM {
            self.warm.clear();
        }
        self.warm.insert(claimed.task_id);
        let token = self.next_token;
        self.next_token += 1;
        self.tokens.insert(claimed.invocation, token);
        self.in_flight.insert(
            token,
            InFlight {
                claimed,
                charge,
                place: None,
                started_at: Utc::now(),
                cancelled: false,
                displaced: 0,
                placeless: false,
                live: Live::default(),
                announced: false,
                handed_back: false,
            },
        );
        token
    }

    /// Hand an attempt that may start to a cell, and end one that never will.
    fn admitted(&mut self, token: u64, verdict: &Verdict) {
        match verdict {
            Verdict::Wait => {}
            Verdict::Start => self.begin(token),
            Verdict::Quarantined => {
                self.end(token, without_run(Termination::Denied { capability: QUARANTINED.to_owned() }));
            }
            Verdict::TooLarge => {
                let bytes = self.admission.worker_bytes();
                self.end(
                    token,
                    host_fault(&format!(
                        "it declares more memory than this worker gives one attempt: it has {bytes} bytes for all, and one tenant may have {}",
                        self.settings.tenant_memory_bytes
                    )),
                );
            }
        }
    }

    /// Lend to those that ask for memory, and hand back who is in their way.
    pub(super) fn relieve(&mut self) {
        while let Some(relief) = self.admission.memory().relieve() {
            match relief {
                Relief::Lend { token, call, bytes } => {
                    let place = self.in_flight.get(&token).and_then(|flight| flight.place);
                    if let Some(cell) = place.and_then(|place| self.cells.get(place)) {
                        cell.answer(call, Answer::Memory(bytes));
                    }
                }
                Relief::HandBack(token) => {
                    let Some(flight) = self.in_flight.get_mut(&token) else { continue };
                    info!(
                        invocation = %flight.claimed.invocation,
                        "memory is short: the youngest attempt is handed back"
                    );
                    flight.handed_back = true;
                    let id = flight.claimed.invocation;
                    self.cancel(id, CancelReason::LeaseLost);
                }
            }
        }
    }

    /// Start those that waited and may start now.
    pub(super) fn start_waiting(&mut self) {
        while let Some((token, verdict)) = self.admission.next() {
            self.admitted(token, &verdict);
        }
    }

    /// Start what may start: in a cell, or, where there is no guest, here.
    fn begin(&mut self, token: u64) {
        let Some(flight) = self.in_flight.get_mut(&token) else { return };
        if flight.claimed.spec.input != InputKind::Http {
            self.place(token);
            return;
        }
        if !self.lease.is_held() {
            self.end(token, without_run(Termination::LeaseLost));
            return;
        }
        self.journal.started(&flight.claimed);
        flight.announced = true;
        flight.started_at = Utc::now();
        let own = self.egress.own(self.lease, whose(self.lease, &flight.claimed), token);
        self.http.start(token, &flight.claimed, own);
    }

    /// Find a cell for an attempt that may start, or let it wait for one.
    fn place(&mut self, token: u64) {
        let Some(tenant) = self.in_flight.get(&token).map(|flight| flight.claimed.tenant) else { return };
        match self.cells.take(tenant) {
            Some((place, cell)) => self.submit(token, place, cell),
            None => self.cells.wait(tenant, token),
        }
    }

    /// Start and end cells as they are needed, place those that waited for one, and hand back who waited too long.
    pub(super) fn place_waiting(&mut self) {
        self.cells.tend();
        while let Some(token) = self.cells.next_placed() {
            self.place(token);
        }
        while let Some(token) = self.cells.next_overdue() {
            if let Some(flight) = self.in_flight.get_mut(&token) {
                flight.placeless = true;
            }
            self.end(
                token,
                host_fault("no cell came up or came free for its tenant in time; it is handed back"),
            );
        }
    }

    /// The cell died before the attempt began to run there: it takes no part in that, and goes to another.
    pub(super) fn displace(&mut self, token: u64, place: Place, cell: &Arc<Cell>) {
        self.cells.gone(place, cell);
        self.cells.give_back(place);
        let Some(flight) = self.in_flight.get_mut(&token) else {
            return;
        };
        flight.displaced += 1;
        if flight.displaced > MAX_PLACES {
            self.end(token, host_fault("cells died before it could begin"));
        } else {
            self.place(token);
        }
    }

    /// Submit to this cell; where it has not got the code, make that ready first and come back.
    pub(super) fn submit(&mut self, token: u64, place: Place, cell: Arc<Cell>) {
        // By the clock, not by the watch: after a suspension this may run before the watch wakes, and by then somebody
        // else may run this attempt.
        if !self.lease.is_held() {
            self.cells.give_back(place);
            self.end(token, without_run(Termination::LeaseLost));
            return;
        }
        let Some(flight) = self.in_flight.get_mut(&token) else {
            self.cells.give_back(place);
            return;
        };
        if !flight.announced {
            self.journal.started(&flight.claimed);
            flight.announced = true;
        }
        let mut sent = attempt(&flight.claimed);
        sent.options.memory_lent = self.admission.memory().lent(token);
        match cell.submit(token, &sent) {
            Ok(()) => {
                flight.place = Some(place);
                flight.started_at = Utc::now();
            }
            Err(SubmitError::NotLoaded) => {
                let (tenant, hash) = (flight.claimed.tenant, ModuleHash::from_bytes(flight.claimed.sha256));
                let modules = self.modules.clone();
                let reports = self.reports.clone();
                tokio::spawn(async move {
                    let result = async {
                        let artifact = modules.artifact(tenant, hash).await?;
                        cell.load(&artifact).await?;
                        Ok(())
                    }
                    .await;
                    // Refused only when the loop has ended.
                    let _ = reports.send(Report::Loaded { token, place, cell, result });
                });
            }
            Err(SubmitError::Gone) => self.displace(token, place, &cell),
            Err(error) => {
                self.cells.give_back(place);
                self.end(token, host_fault(&error.to_string()));
            }
        }
    }
}
