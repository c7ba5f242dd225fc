//! Which cell is whose, when one is started or ended, and who waits for one. Owns the book and the rules; never starts,
//! ends or talks to a process, and has no clock.
//!
//! A room is a place for one process. Rooms of everybody are there for good. The others are bounded in number: each
//! belongs to one owner while its process lives, is begun when that owner has something to run, and ends when it was
//! idle for long, or at once when it is idle and somebody else needs the place. When none is idle, the one that has
//! had its place longest takes nothing new for a while, so that it may become so. An attempt of an owner without a
//! room waits, and who waits keeps nobody else from starting.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::domain::fairness::Candidate;
use crate::domain::isolation::{Owner, Rules};

/// How long an attempt waits for a room before it is handed back.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long an owner keeps its room at least, while it has something to run: a start costs more than a slice.
pub const TENURE: Duration = Duration::from_secs(2);
/// How long a room takes nothing new, in the hope of becoming idle; then another is asked. Each time in vain doubles it,
/// so that long attempts delay others and do not keep them out.
pub const LEAVING: Duration = Duration::from_secs(4);
/// Times that still double it.
const MAX_DOUBLINGS: u32 = 12;
/// Attempts that one owner without a room may have waiting; more of them are not claimed.
const WAITING_PER_OWNER: u32 = 4;
/// The part of a worker's slots that attempts without a room may take in all.
const WAITING_SHARE: u32 = 4;

/// The number of a room; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Room(u64);

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Start a process in this room.
    Start(Room),
    /// End the one in it, which runs nothing, and say so by [`Rooms::left`].
    End(Room),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// No process yet, or a new one is being started.
    Starting,
    Up,
    /// It gets nothing more, and its place is nobody's until the process is gone.
    Ending,
}

#[derive(Debug)]
struct Entry {
    /// `None`: of whoever comes first.
    owner: Option<Owner>,
    stage: Stage,
    /// Attempts that were placed here and have not been given back.
    busy: u32,
    /// It has had nothing to do since then, if it has nothing to do.
    idle_since: Instant,
    /// Since when its owner has had it.
    since: Instant,
    /// It takes nothing new, since then.
    leaving: Option<Instant>,
    /// How often it took nothing new in vain.
    in_vain: u32,
}

impl Entry {
    /// Until when it takes nothing new.
    fn leaves_until(&self) -> Option<Instant> {
        self.leaving.map(|since| since + LEAVING * (1 << self.in_vain.min(MAX_DOUBLINGS)))
    }

    fn is_own(&self) -> bool {
        self.owner != Some(Owner::Everybody)
    }

    fn takes(&self, owner: Owner) -> bool {
        self.owner == Some(owner) && self.stage == Stage::Up && self.leaving.is_none()
    }
}

/// The book of one worker.
#[derive(Debug)]
pub struct Rooms {
    /// Most rooms that are not of everybody.
    max: usize,
    idle: Duration,
    rooms: BTreeMap<Room, Entry>,
    waiting: HashMap<Owner, VecDeque<(u64, Instant)>>,
    next: u64,
}

impl Rooms {
    /// With at most `max` rooms of single owners, which end after `idle` without work.
    #[must_use]
    pub fn new(max: u32, idle: Duration) -> Self {
        Self { max: max as usize, idle, rooms: BTreeMap::new(), waiting: HashMap::new(), next: 0 }
    }

    /// One more room; with `None` it will be of the first who comes.
    pub fn open(&mut self, owner: Option<Owner>, now: Instant) -> Room {
        let room = Room(self.next);
        self.next += 1;
        let entry = Entry {
            owner,
            stage: Stage::Starting,
            busy: 0,
            idle_since: now,
            since: now,
            leaving: None,
            in_vain: 0,
        };
        self.rooms.insert(room, entry);
        room
    }

    /// A process is ready there.
    pub fn up(&mut self, room: Room, now: Instant) {
        if let Some(entry) = self.rooms.get_mut(&room).filter(|entry| entry.stage == Stage::Starting) {
            entry.stage = Stage::Up;
            entry.idle_since = now;
        }
    }

    /// The process there is gone, and another will be.
    pub fn down(&mut self, room: Room) {
        if let Some(entry) = self.rooms.get_mut(&room).filter(|entry| entry.stage == Stage::Up) {
            entry.stage = Stage::Starting;
        }
    }

    /// The process there is gone for good.
    pub fn left(&mut self, room: Room) {
        self.rooms.remove(&room);
    }

    /// Whether a process of everybody is up.
    #[must_use]
    pub fn any_shared(&self) -> bool {
        self.rooms.values().any(|entry| entry.takes(Owner::Everybody))
    }

    /// The least busy room of this owner, counted as busier by one from now on.
    pub fn take(&mut self, owner: Owner, now: Instant) -> Option<Room> {
        let own = self.rooms.iter().filter(|(_, entry)| entry.takes(owner));
        let room = own.min_by_key(|(_, entry)| entry.busy).map(|(room, _)| *room).or_else(|| {
            let homeless = owner != Owner::Everybody && !self.has_room(owner);
            let mut free = self
                .rooms
                .iter()
                .filter(|(_, entry)| homeless && entry.owner.is_none() && entry.stage == Stage::Up);
            free.next().map(|(room, _)| *room)
        })?;
        let entry = self.rooms.get_mut(&room)?;
        if entry.owner.is_none() {
            entry.owner = Some(owner);
            entry.since = now;
        }
        entry.busy += 1;
        Some(room)
    }

    /// An attempt has left this room.
    pub fn give_back(&mut self, room: Room, now: Instant) {
        if let Some(entry) = self.rooms.get_mut(&room) {
            entry.busy = entry.busy.saturating_sub(1);
            entry.idle_since = now;
        }
    }

    /// An attempt waits for a room of its owner.
    pub fn wait(&mut self, owner: Owner, token: u64, now: Instant) {
        self.waiting.entry(owner).or_default().push_back((token, now));
    }

    /// It waits no longer.
    pub fn forget(&mut self, owner: Owner, token: u64) {
        if let Some(queue) = self.waiting.get_mut(&owner) {
            queue.retain(|(one, _)| *one != token);
            if queue.is_empty() {
                self.waiting.remove(&owner);
            }
        }
    }

    /// Nobody waits any longer.
    pub fn forget_all(&mut self) {
        self.waiting.clear();
    }

    /// The next attempt that waits and need not.
    pub fn next_placed(&mut self) -> Option<u64> {
        let owner = self.waiting.keys().copied().find(|owner| self.could_take(*owner))?;
        self.pop(owner)
    }

    /// The next attempt that has waited for too long.
    pub fn next_overdue(&mut self, now: Instant) -> Option<u64> {
        let late = |since: Instant| now.saturating_duration_since(since) >= PATIENCE;
        let owner = self
            .waiting
            .iter()
            .find(|(_, queue)| queue.front().is_some_and(|(_, since)| late(*since)))
            .map(|(owner, _)| *owner)?;
        self.pop(owner)
    }

    fn pop(&mut self, owner: Owner) -> Option<u64> {
        let queue = self.waiting.get_mut(&owner)?;
        let token = queue.pop_front().map(|(token, _)| token);
        if queue.is_empty() {
            self.waiting.remove(&owner);
        }
        token
    }

    fn could_take(&self, owner: Owner) -> bool {
        self.rooms.values().any(|entry| entry.takes(owner))
            || (owner != Owner::Everybody
                && !self.has_room(owner)
                && self.rooms.values().any(|entry| entry.owner.is_none() && entry.stage == Stage::Up))
    }

    /// Whether the owner has a room, be it one that takes nothing now.
    fn has_room(&self, owner: Owner) -> bool {
        self.rooms.values().any(|entry| entry.owner == Some(owner) && entry.stage != Stage::Ending)
    }

    /// What is to be done now.
    pub fn tend(&mut self, now: Instant) -> Vec<Step> {
        let mut steps = Vec::new();
        for (room, entry) in &mut self.rooms {
            let had_enough = now.saturating_duration_since(entry.idle_since) >= self.idle;
            let wanted = entry.owner.is_none_or(|owner| self.waiting.contains_key(&owner));
            if entry.is_own() && entry.stage != Stage::Ending && entry.busy == 0 && had_enough && !wanted {
                entry.stage = Stage::Ending;
                steps.push(Step::End(*room));
            }
        }
        let mut homeless: Vec<(Instant, Owner)> = self
            .waiting
            .iter()
            .filter(|(owner, _)| **owner != Owner::Everybody && !self.has_room(**owner))
            .filter_map(|(owner, queue)| queue.front().map(|(_, since)| (*since, *owner)))
            .collect();
        homeless.sort_unstable();
        let own = self.rooms.values().filter(|entry| entry.is_own()).count();
        let mut free = self.max.saturating_sub(own);
        let ending = |entry: &&Entry| entry.is_own() && entry.stage == Stage::Ending;
        let mut coming = self.rooms.values().filter(ending).count();
        let mut short = 0;
        for (_, owner) in homeless {
            if free > 0 {
                free -= 1;
                steps.push(Step::Start(self.open(Some(owner), now)));
            } else if coming > 0 {
                coming -= 1;
            } else if let Some(room) = self.idlest() {
                steps.push(Step::End(room));
            } else {
                short += 1;
            }
        }
        self.make_leave(short, now);
        steps
    }

    /// Ends the room that has been idle longest, if one is.
    fn idlest(&mut self) -> Option<Room> {
        let idle = self.rooms.iter_mut().filter(|(_, entry)| {
            let wanted = entry.owner.is_none_or(|owner| self.waiting.contains_key(&owner));
            entry.is_own()
                && entry.stage != Stage::Ending
                && entry.busy == 0
                && (entry.leaving.is_some() || !wanted)
        });
        let (room, entry) = idle.min_by_key(|(_, entry)| entry.idle_since)?;
        entry.stage = Stage::Ending;
        Some(*room)
    }

    /// Lets as many rooms take nothing new as owners are short of one.
    fn make_leave(&mut self, short: usize, now: Instant) {
        let mut leaving = 0;
        for entry in self.rooms.values_mut().filter(|entry| entry.stage != Stage::Ending) {
            let Some(until) = entry.leaves_until() else { continue };
            if leaving == short {
                entry.leaving = None;
            } else if now >= until {
                // What runs there takes too long: it begins anew, at the end of the line.
                entry.leaving = None;
                entry.in_vain += 1;
                entry.since = now;
            } else {
                leaving += 1;
            }
        }
        while leaving < short {
            let longest = self.rooms.values_mut().filter(|entry| {
                entry.is_own()
                    && entry.stage == Stage::Up
                    && entry.leaving.is_none()
                    && now.saturating_duration_since(entry.since) >= TENURE
            });
            let Some(entry) = longest.min_by_key(|entry| entry.since) else { return };
            entry.leaving = Some(now);
            leaving += 1;
        }
    }

    /// When to look again, if nothing happens before. What is due and was left undone waits for something to happen.
    #[must_use]
    pub fn wake_at(&self, now: Instant) -> Option<Instant> {
        let overdue =
            self.waiting.values().filter_map(|queue| queue.front()).map(|(_, since)| *since + PATIENCE);
        let short = !self.waiting.is_empty();
        let rooms = self.rooms.values().filter(|entry| entry.is_own() && entry.stage != Stage::Ending);
        let rooms = rooms.filter_map(|entry| match entry.leaves_until() {
            Some(until) => Some(until),
            None if entry.busy == 0 => entry.owner.map(|_| entry.idle_since + self.idle),
            None => short.then_some(entry.since + TENURE),
        });
        overdue.chain(rooms).filter(|at| *at > now).min()
    }

    /// Whom to claim for, as things are. `slots`: of the worker.
    #[must_use]
    pub fn reach(&self, rules: &Arc<Rules>, slots: u32) -> Reach {
        let home: HashSet<Owner> = self
            .rooms
            .values()
            .filter(|entry| entry.stage == Stage::Up && entry.leaving.is_none())
            .filter_map(|entry| entry.owner)
            .collect();
        let waiting: HashMap<Owner, u32> = self
            .waiting
            .iter()
            .filter(|(owner, _)| !home.contains(*owner))
            .map(|(owner, queue)| (*owner, u32::try_from(queue.len()).unwrap_or(u32::MAX)))
            .collect();
        let taken = waiting.values().copied().fold(0, u32::saturating_add);
        let room = (slots / WAITING_SHARE).max(1).saturating_sub(taken);
        Reach { rules: Arc::clone(rules), home, waiting, room }
    }
}

/// Whom a worker should claim for at one moment, and how much.
#[derive(Debug, Clone)]
pub struct Reach {
    rules: Arc<Rules>,
    /// They have a room that takes something.
    home: HashSet<Owner>,
    /// Attempts that wait of those who have none.
    waiting: HashMap<Owner, u32>,
    /// How many more of them may wait in all.
    room: u32,
}

impl Reach {
    /// Keeps to what makes sense to claim: of owners without a room only a few attempts each and in all, so that those
    /// that wait never take the slots of the others. `turn`: any number, another each time, so that the same do not
    /// always come first.
    pub fn limit(&self, candidates: &mut Vec<Candidate>, turn: usize) {
        let mut all = self.room;
        let mut each: HashMap<Owner, u32> = HashMap::new();
        let count = candidates.len().max(1);
        candidates.rotate_left(turn % count);
        candidates.retain_mut(|candidate| {
            let owner = self.rules.owner(candidate.tenant);
            if self.home.contains(&owner) {
                return true;
            }
            let waiting = self.waiting.get(&owner).copied().unwrap_or(0);
            let own = each.entry(owner).or_insert(WAITING_PER_OWNER.saturating_sub(waiting));
            let may = all.min(*own).min(candidate.free.unwrap_or(u32::MAX));
            *own -= may;
            all -= may;
            candidate.free = Some(may);
            may > 0
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::domain::ids::TenantId;
    use crate::domain::isolation::{Groups, Isolation};
    use proptest::prelude::*;

    const IDLE: Duration = Duration::from_secs(60);

    fn tenant(n: u8) -> TenantId {
        TenantId(uuid::Uuid::from_u128(n.into()))
    }

    fn owner(n: u8) -> Owner {
        Owner::Tenant(tenant(n))
    }

    fn started(steps: &[Step]) -> Vec<Room> {
        steps
            .iter()
            .filter_map(|step| if let Step::Start(room) = step { Some(*room) } else { None })
            .collect()
    }

    /// A worker whose processes start and end at once.
    struct World {
        rooms: Rooms,
        now: Instant,
        /// Owner and room of every attempt that runs.
        running: HashMap<u64, (Owner, Room)>,
        next: u64,
        starts: usize,
    }

    impl World {
        fn new(max: u32) -> Self {
            let rooms = Rooms::new(max, IDLE);
            Self { rooms, now: Instant::now(), running: HashMap::new(), next: 0, starts: 0 }
        }

        fn come(&mut self, owner: Owner) -> u64 {
            self.next += 1;
            self.place(owner, self.next);
            self.next
        }

        fn place(&mut self, owner: Owner, token: u64) {
            match self.rooms.take(owner, self.now) {
                Some(room) => drop(self.running.insert(token, (owner, room))),
                None => self.rooms.wait(owner, token, self.now),
            }
        }

        fn pass(&mut self, time: Duration, owners: &HashMap<u64, Owner>) {
            self.now += time;
            for _ in 0..3 {
                for step in self.rooms.tend(self.now) {
                    match step {
                        Step::Start(room) => {
                            self.starts += 1;
                            self.rooms.up(room, self.now);
                        }
                        Step::End(room) => {
                            assert!(self.running.values().all(|(_, of)| *of != room), "it runs something");
                            self.rooms.left(room);
                        }
                    }
                }
                while let Some(token) = self.rooms.next_placed() {
                    self.place(owners[&token], token);
                }
            }
        }

        fn end(&mut self, token: u64) {
            if let Some((_, room)) = self.running.remove(&token) {
                self.rooms.give_back(room, self.now);
            }
        }
    }

    #[test]
    fn an_idle_room_ends_after_its_time_and_at_once_when_somebody_else_needs_the_place() {
        let mut rooms = Rooms::new(1, IDLE);
        let now = Instant::now();
        rooms.wait(owner(1), 7, now);
        let first = started(&rooms.tend(now))[0];
        assert_eq!(rooms.next_placed(), None, "it is not up yet");
        rooms.up(first, now);
        assert_eq!(rooms.next_placed(), Some(7));
        assert_eq!(rooms.take(owner(1), now), Some(first));
        rooms.wait(owner(2), 8, now);
        assert_eq!(rooms.tend(now), [], "nobody is idle");
        rooms.give_back(first, now);
        assert_eq!(rooms.tend(now), [Step::End(first)]);
        assert_eq!(rooms.tend(now), [], "the process is there until it is gone");
        rooms.left(first);
        let second = started(&rooms.tend(now))[0];
        rooms.up(second, now);
        assert_eq!(rooms.next_placed(), Some(8));
        assert_eq!(rooms.tend(now + IDLE / 2), []);
        assert_eq!(rooms.tend(now + IDLE), [Step::End(second)]);
    }

    #[test]
    fn the_first_room_is_of_whoever_comes_first_and_of_nobody_else() {
        let mut rooms = Rooms::new(2, IDLE);
        let now = Instant::now();
        let spare = rooms.open(None, now);
        rooms.up(spare, now);
        assert_eq!(rooms.tend(now + IDLE * 2), [], "it has served nobody yet");
        assert_eq!(rooms.take(owner(1), now), Some(spare));
        assert_eq!(rooms.take(owner(1), now), Some(spare));
        assert_eq!(rooms.take(owner(2), now), None);
    }

    #[test]
    fn who_has_waited_too_long_is_named() {
        let mut rooms = Rooms::new(1, IDLE);
        let now = Instant::now();
        rooms.wait(owner(1), 1, now);
        rooms.wait(owner(1), 2, now + PATIENCE);
        assert_eq!(rooms.next_overdue(now + PATIENCE / 2), None);
        assert_eq!(rooms.next_overdue(now + PATIENCE), Some(1));
        assert_eq!(rooms.next_overdue(now + PATIENCE), None);
    }

    #[test]
    fn what_waits_for_a_room_never_takes_the_slots_of_the_others() {
        let mut rooms = Rooms::new(1, IDLE);
        let now = Instant::now();
        let rules = Arc::new(Rules::new(Isolation::Tenant, &Groups::new()).unwrap());
        let first = rooms.open(Some(owner(0)), now);
        rooms.up(first, now);
        for turn in 0..40 {
            let mut candidates: Vec<Candidate> =
                (0..40).map(|n| Candidate { tenant: tenant(n), weight: 100, free: None }).collect();
            rooms.reach(&rules, 64).limit(&mut candidates, turn);
            let (home, others): (Vec<Candidate>, Vec<Candidate>) =
                candidates.into_iter().partition(|c| c.tenant == tenant(0));
            assert_eq!(home[0].free, None, "it has a room");
            assert_eq!(others.iter().map(|c| c.free.unwrap()).sum::<u32>(), 16);
            assert!(others.iter().all(|c| (1..=WAITING_PER_OWNER).contains(&c.free.unwrap())));
        }
    }

    proptest! {
        #[test]
        fn no_two_owners_share_a_room_the_bound_holds_and_everybody_gets_a_turn(
            max in 1u32..4,
            coming in prop::collection::vec((0u8..6, 0u64..900), 1..120),
        ) {
            let mut world = World::new(max);
            let mut owners = HashMap::new();
            let mut left: VecDeque<u64> = VecDeque::new();
            for (who, ms) in coming {
                let token = world.come(owner(who));
                owners.insert(token, owner(who));
                left.push_back(token);
                world.pass(Duration::from_millis(ms), &owners);
                prop_assert!(world.rooms.rooms.len() <= max as usize);
                let mut of: HashMap<Room, Owner> = HashMap::new();
                for (owner, room) in world.running.values() {
                    prop_assert_eq!(*of.entry(*room).or_insert(*owner), *owner);
                }
                if left.len() > 8 && let Some(token) = left.pop_front() {
                    world.end(token);
                }
            }
            // Whatever runs ends after a second; nobody waits for ever.
            for _ in 0..1_000 {
                let running: Vec<u64> = world.running.keys().copied().collect();
                for token in running {
                    world.end(token);
                }
                world.pass(Duration::from_secs(1), &owners);
                if world.running.is_empty() && world.rooms.waiting.is_empty() {
                    break;
                }
            }
            prop_assert!(world.rooms.waiting.is_empty() && world.running.is_empty());
            world.pass(IDLE, &owners);
            prop_assert!(world.rooms.rooms.is_empty(), "the idle end");
        }

        #[test]
        fn an_owner_that_always_has_something_to_run_does_not_keep_its_room_for_ever(busy in 1u8..5, ms in 100u64..3_000) {
            let mut world = World::new(1);
            let mut owners = HashMap::new();
            let waits = owner(9);
            let mut running: VecDeque<u64> = VecDeque::new();
            for round in 0..200u32 {
                let token = world.come(owner(0));
                owners.insert(token, owner(0));
                running.push_back(token);
                if round == 20 {
                    let token = world.come(waits);
                    owners.insert(token, waits);
                }
                while running.len() > busy.into() {
                    if let Some(token) = running.pop_front() {
                        world.end(token);
                    }
                }
                world.pass(Duration::from_millis(ms), &owners);
                if world.running.values().any(|(owner, _)| *owner == waits) {
                    return Ok(());
                }
            }
            prop_assert!(false, "it waits for ever");
        }
    }
}
