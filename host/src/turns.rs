//! Places that tenants take in turn. Owns who is next for work that is scarce on this machine: compilations, looks at
//! uploads. Knows nothing of the work. Bounds what runs, in all and of one tenant; how many wait is bounded by whoever
//! lets them.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Places, given to waiting tenants one after the other; within a tenant first come, first served.
#[derive(Debug)]
pub struct Turns {
    pub(crate) at_once: usize,
    of_one: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    running: usize,
    tenants: HashMap<u128, Tenant>,
    /// Tenants with somebody waiting; the next to be served first.
    order: VecDeque<u128>,
}

/// One that has a place or waits for one.
#[derive(Debug, Default)]
struct Tenant {
    running: usize,
    waiting: VecDeque<oneshot::Sender<Turn>>,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub struct Turn {
    turns: Option<Arc<Turns>>,
    tenant: u128,
}

impl Turns {
    /// `at_once` places, of which one tenant has at most `of_one`. Both at least 1.
    #[must_use]
    pub fn new(at_once: usize, of_one: usize) -> Arc<Self> {
        Arc::new(Self { at_once: at_once.max(1), of_one: of_one.max(1), state: Mutex::default() })
    }

    /// Waits for a place. Whoever stops waiting gives up the turn. `None` does not come: whoever waits keeps `self`, and it
    /// forgets nobody.
    pub async fn take(self: &Arc<Self>, tenant: u128) -> Option<Turn> {
        let (give, given) = oneshot::channel();
        {
            let mut state = self.lock();
            let waiting = &mut state.tenants.entry(tenant).or_default().waiting;
            let first = waiting.is_empty();
            waiting.push_back(give);
            if first {
                state.order.push_back(tenant);
            }
            self.serve(&mut state);
        }
        given.await.ok()
    }

    /// Gives what is free to those whose turn it is.
    fn serve(self: &Arc<Self>, state: &mut State) {
        while state.running < self.at_once {
            let free = |id: &u128| state.tenants.get(id).is_none_or(|tenant| tenant.running < self.of_one);
            let Some(at) = state.order.iter().position(free) else {
                return;
            };
            let Some(id) = state.order.remove(at) else {
                return;
            };
            let Some(tenant) = state.tenants.get_mut(&id) else {
                continue;
            };
            let turn = Turn { turns: Some(Arc::clone(self)), tenant: id };
            match tenant.waiting.pop_front().map(|give| give.send(turn)) {
                Some(Ok(())) => {
                    tenant.running += 1;
                    state.running += 1;
                }
                // Nobody waits for it any more. It was never counted, and the lock is held here.
                Some(Err(mut turn)) => turn.turns = None,
                None => {}
            }
            if tenant.waiting.is_empty() {
                if tenant.running == 0 {
                    state.tenants.remove(&id);
                }
            } else {
                state.order.push_back(id);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(turns) = self.turns.take() else {
            return;
        };
        let mut state = turns.lock();
        state.running = state.running.saturating_sub(1);
        if let Some(tenant) = state.tenants.get_mut(&self.tenant) {
            tenant.running = tenant.running.saturating_sub(1);
            if tenant.running == 0 && tenant.waiting.is_empty() {
                state.tenants.remove(&self.tenant);
            }
        }
        turns.serve(&mut state);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use std::future::Future;
    use std::pin::Pin;
    use std::task::{Context, Poll, Waker};

    type Waiting = Pin<Box<dyn Future<Output = Option<Turn>>>>;

    fn wait(turns: &Arc<Turns>, tenant: u128) -> Waiting {
        let turns = Arc::clone(turns);
        let mut waiting: Waiting = Box::pin(async move { turns.take(tenant).await });
        // In the queue from its first poll on; what it says then is asked again.
        if let Poll::Ready(turn) = waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return Box::pin(std::future::ready(turn));
        }
        waiting
    }

    fn ready(waiting: &mut Waiting) -> Option<Turn> {
        match waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(turn) => Some(turn.unwrap()),
            Poll::Pending => None,
        }
    }

    /// Serves until nobody waits; who was served, in order.
    fn order(mut all: Vec<(u128, Waiting)>) -> Vec<u128> {
        let mut served = Vec::new();
        while !all.is_empty() {
            let at = all.iter_mut().enumerate().find_map(|(at, (_, w))| ready(w).map(|turn| (at, turn)));
            let (at, turn) = at.expect("somebody's turn");
            served.push(all.remove(at).0);
            drop(turn);
        }
        served
    }

    #[test]
    fn a_tenant_with_many_waiting_delays_others_by_one_each() {
        let turns = Turns::new(1, 1);
        let mut first = wait(&turns, 1);
        let running = ready(&mut first).unwrap();
        let mut all: Vec<_> = (0..50).map(|_| (1, wait(&turns, 1))).collect();
        all.push((2, wait(&turns, 2)));
        all.push((3, wait(&turns, 3)));
        drop(running);
        let served = order(all);
        assert_eq!(served[..4], [1, 2, 3, 1]);
        assert_eq!(served.len(), 52);
        assert!(turns.lock().tenants.is_empty() && turns.lock().order.is_empty());
    }

    #[test]
    fn of_one_tenant_only_so_many_run_and_the_other_places_are_for_others() {
        let turns = Turns::new(3, 2);
        let mut mine: Vec<_> = (0..5).map(|_| wait(&turns, 1)).collect();
        let mut running: Vec<_> = mine.iter_mut().take(2).filter_map(ready).collect();
        assert_eq!(running.len(), 2);
        assert!(mine.iter_mut().skip(2).all(|w| ready(w).is_none()), "a place is left, but not for this one");
        let mut other = wait(&turns, 2);
        let other = ready(&mut other).unwrap();
        let mut third = wait(&turns, 3);
        assert!(ready(&mut third).is_none(), "three run");
        drop(other);
        assert!(ready(&mut third).is_some());
        running.pop();
        let next: Vec<_> = mine.iter_mut().skip(2).filter_map(ready).collect();
        assert_eq!(next.len(), 1);
    }

    #[test]
    fn whoever_stops_waiting_leaves_the_place_to_the_next() {
        let turns = Turns::new(1, 1);
        let mut first = wait(&turns, 1);
        let running = ready(&mut first).unwrap();
        let gone = wait(&turns, 1);
        let given = wait(&turns, 2);
        let mut last = wait(&turns, 3);
        drop(gone);
        drop(running);
        assert!(ready(&mut last).is_none(), "the turn is the second tenant's");
        // It has the place and never looked.
        drop(given);
        assert!(ready(&mut last).is_some());
    }
}
