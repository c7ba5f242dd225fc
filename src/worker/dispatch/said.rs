//! What cells say of the attempts in them, and what follows from it. The rest of the loop is above.

use sandbar_host::capability::call::Ask;
use sandbar_host::cell::CellEvent;
use tracing::warn;

use super::{Dispatch, whose};
use crate::store::invocation::Family;
use crate::worker::attempt::{attempt_name, host_fault};
use crate::worker::capability::Asker;
use crate::worker::cells::Place;
use crate::worker::live;

impl Dispatch<'_> {
    /// The cell in a place said something. It may have been taken over: what it says of attempts is believed as far as they
    /// are in it.
    pub(super) fn said(&mut self, place: Place, said: CellEvent) {
        match said {
            CellEvent::Finished { token, outcome } => self.end(token, *outcome),
            CellEvent::Progress { token, progress } => {
                if let Some(flight) = self.in_flight.get(&token) {
                    live::progress(&self.live, &flight.claimed, flight.started_at, &progress);
                }
            }
            CellEvent::Log { token, first, log } => {
                if let Some(flight) = self.in_flight.get_mut(&token) {
                    flight.live.log(&self.live, &flight.claimed, flight.started_at, first, log);
                }
            }
            CellEvent::Http { token, call, message } => {
                let flight = self.in_flight.get(&token).filter(|flight| flight.place == Some(place));
                if let (Some(flight), Some(cell)) = (flight, self.cells.get(place)) {
                    let whose = whose(self.lease, &flight.claimed);
                    self.egress.hear(self.lease, whose, cell, token, call, message);
                }
            }
            CellEvent::Ask { token, call, ask: Ask::Memory { bytes } } => {
                if self.in_flight.get(&token).is_some_and(|flight| flight.place == Some(place)) {
                    self.admission.memory().ask(token, call, bytes);
                }
            }
            CellEvent::Ask { token, call, ask } => {
                let flight = self.in_flight.get(&token).filter(|flight| flight.place == Some(place));
                if let (Some(flight), Some(cell)) = (flight, self.cells.get(place)) {
                    let asker = Asker {
                        attempt: attempt_name(self.lease, &flight.claimed),
                        tenant: flight.claimed.tenant,
                        task: flight.claimed.task_id,
                        family: flight
                            .claimed
                            .spec
                            .family
                            .unwrap_or(Family { root: flight.claimed.invocation, depth: 0 }),
                    };
                    self.capabilities.hear(self.lease, asker, cell, (token, call), ask);
                }
            }
            CellEvent::Used(uses) => self.cells.used(place, &uses),
            CellEvent::Gone { reason } => {
                self.cells.down(place);
                let lost: Vec<u64> = self
                    .in_flight
                    .iter()
                    .filter(|(_, f)| f.place == Some(place))
                    .map(|(token, _)| *token)
                    .collect();
                warn!(reason, attempts = lost.len(), "a cell died");
                self.admission.died(&lost, &reason);
                for token in lost {
                    self.admission.ended(token, false);
                    self.end(token, host_fault(&format!("its cell died: {reason}")));
                }
            }
        }
    }
}
