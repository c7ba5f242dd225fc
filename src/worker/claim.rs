//! One turn of claiming: whom to ask for, by memory or after a look, and how many of each, by their shares. Owns no
//! slots.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::domain::fairness::{Candidate, Charge, FairShare};
use crate::domain::ids::{LeaseId, TaskId, TenantId, WorkerId};
use crate::domain::rooms::Reach;
use crate::store::queue::{Claimed, Want};
use crate::store::{Error, WorkerStore};
use crate::worker::memory::Memory;
use crate::worker::unanswered::Unanswered;

/// Tenants looked at in one turn; a larger installation is served in the order of ids, turn by turn.
const MAX_CANDIDATES: i32 = 2_000;
/// After a claim that found others there before it: the wait before looking again.
const CONTENDED: Duration = Duration::from_millis(5);

/// What a worker knows from one turn to the next.
#[derive(Debug, Default)]
pub struct Known {
    /// Who is owed how much.
    pub share: FairShare,
    /// Who had work.
    pub memory: Memory,
    /// Claims that got no answer.
    pub unanswered: Unanswered,
}

/// What a turn brought.
pub struct Turn {
    /// What is ours to run now, and what its tenant was charged.
    pub taken: Vec<(Claimed, Option<Charge>)>,
    /// Worth asking again then, if nothing is heard before; `None`: nothing waits.
    pub next: Option<Instant>,
}

/// Claim up to `free` attempts, of those that a cell is in reach for. `idle`: nothing runs, so a look costs nobody anything.
///
/// # Errors
/// As a claim's.
pub async fn turn(
    store: &WorkerStore,
    known: &mut Known,
    (free, reach): (u32, Option<&Reach>),
    idle: bool,
    who: (WorkerId, i64),
) -> Result<Turn, Error> {
    let limit = |candidates: &mut Vec<Candidate>| {
        if let Some(reach) = reach {
            reach.limit(candidates, rand::random_range(0..MAX_CANDIDATES as usize));
        }
    };
    let mut guess = known.memory.guess(idle).to_vec();
    let by_memory = !known.memory.is_due();
    if !guess.is_empty() {
        limit(&mut guess);
        let (taken, asked) = take(store, known, &guess, free, who, by_memory).await?;
        if !taken.is_empty() {
            known.memory.claimed(taken.iter().map(|(claimed, _)| claimed));
            known.memory.guessed();
        }
        if !taken.is_empty() || !idle {
            // Those we know of have no more, or not in sight: what comes is announced, the rest is for the next look.
            let filled = asked > 0 && taken.len() >= asked;
            let next = if filled { Instant::now() } else { known.memory.look_at() };
            return Ok(Turn { taken, next: Some(next) });
        }
    }
    let began = Instant::now();
    let candidates: Vec<Candidate> = store
        .ready_tenants(MAX_CANDIDATES)
        .await?
        .into_iter()
        .map(|t| Candidate {
            tenant: t.tenant,
            weight: t.weight.unsigned_abs(),
            free: t.free.map(|free| u32::try_from(free).unwrap_or(0)),
        })
        .collect();
    let mut within = candidates.clone();
    limit(&mut within);
    let (taken, asked) = take(store, known, &within, free, who, false).await?;
    // Of those out of reach more is claimed when a cell comes up.
    let empty = within.is_empty();
    known.memory.looked(candidates, began.elapsed());
    known.memory.claimed(taken.iter().map(|(claimed, _)| claimed));
    let next = match taken.len() {
        _ if empty => None,
        // Tenants had work and gave us none: others are at it, or it was just committed, or it is parked.
        0 => Some(Instant::now() + CONTENDED),
        few if few < asked => Some(known.memory.look_at()),
        _ => Some(Instant::now()),
    };
    Ok(Turn { taken, next })
}

/// Claim for these tenants, by their shares; what a tenant could not fill is given back to it. `by_memory`: from the
/// marks on. Returns also how many were asked for.
async fn take(
    store: &WorkerStore,
    known: &mut Known,
    candidates: &[Candidate],
    free: u32,
    (worker, epoch): (WorkerId, i64),
    by_memory: bool,
) -> Result<(Vec<(Claimed, Option<Charge>)>, usize), Error> {
    let asks = known.share.choose(candidates, free);
    if asks.is_empty() {
        return Ok((Vec::new(), 0));
    }
    let asked = asks.iter().map(|ask| ask.count as usize).sum();
    let wanted: Vec<Want> = asks
        .iter()
        .map(|ask| Want {
            tenant: ask.tenant,
            count: i32::try_from(ask.count).unwrap_or(i32::MAX),
            after: if by_memory { known.memory.mark(ask.tenant) } else { None },
        })
        .collect();
    let lease = LeaseId::generate();
    let result = store.claim_under(worker, epoch, lease, &wanted).await;
    if result.is_err() {
        known.unanswered.add(lease);
    }
    let mut tasks: HashMap<TenantId, Vec<TaskId>> = HashMap::new();
    for one in result.iter().flatten() {
        tasks.entry(one.tenant).or_default().push(one.task_id);
    }
    let mut charges: HashMap<TenantId, std::vec::IntoIter<Charge>> = HashMap::new();
    for ask in &asks {
        let of = tasks.remove(&ask.tenant).unwrap_or_default();
        charges.insert(ask.tenant, known.share.claimed(ask, &of).into_iter());
    }
    let claimed = result?;
    // Of one tenant in the same order as above, so each gets the charge of its own task.
    let taken = claimed
        .into_iter()
        .map(|one| {
            let charge = charges.get_mut(&one.tenant).and_then(Iterator::next);
            (one, charge)
        })
        .collect();
    Ok((taken, asked))
}
