//! The model beside the real functions: random sequences of everything that can be asked of the queue, on a real
//! Postgres through the store and on the model, which must agree on every answer and, again and again, on every table.
//! This is what makes the simulation honest.
//!
//! Time is virtual here too: it moves in hours, by shifting every stored time into the past.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use chrono::Utc;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use sandbar::domain::admission::{Admission, Concurrency, Condition, Dependency, Key, Unique, UniquePolicy};
use sandbar::domain::ids::{InvocationId, LeaseId, TaskId, TenantId, WorkerId};
use sandbar::domain::invocation::State;
use sandbar::domain::retry::{RetryPolicy, Verdict};
use sandbar::store::invocation::{InputKind, Spec};
use sandbar::store::queue::{
    Cancelled as RealCancelled, Enqueued as RealEnqueued, Finished, NewInvocation, Want,
};
use sandbar::store::worker::{Load, Registration};
use sandbar::store::{ApiStore, Connect, Error, WorkerStore};
use sandbar_host::limits::Limits;
use sandbar_host::log::Log;
use sandbar_host::outcome::{Outcome, Receipt, Termination};
use sqlx::PgPool;

use super::model::{Cancelled, Db, End, Enqueued, Gone, Item, KEY_TTL, Place, Row, Sabotage, Time};
use crate::support;

/// Operations of one sequence, and how often the tables are compared.
const OPERATIONS: usize = 500;
const COMPARE_EVERY: usize = 25;
const HOUR: Time = 3_600_000;
/// Silence after which a worker is dead: between two hours.
const DEAD_AFTER: Duration = Duration::from_secs(1_800);
const MAX_HANDOVERS: i16 = 3;
/// More rows than any move of a sequence has to handle at once.
const MANY: usize = 10_000;
/// Of what a missing safeguard leads to, so much is shown.
const SHOWN: usize = 200;

/// Where the two disagree, in words.
type Disagreement = String;

struct Both {
    random: StdRng,
    api: ApiStore,
    worker: WorkerStore,
    admin: PgPool,
    model: Db,
    tenants: Vec<(TenantId, TaskId)>,
    workers: Vec<(WorkerId, i64)>,
    /// Claimed attempts, with who claimed them; also those whose end has been told, so that it is told again.
    held: Vec<(usize, Finished, TaskId)>,
    invocations: Vec<(TenantId, InvocationId)>,
    /// Orders what is queued within one virtual hour.
    sequence: Time,
    began: Instant,
}

impl Both {
    async fn new(seed: u64) -> Self {
        let database = support::database().await;
        let connect = |url: String| Connect {
            url,
            max_connections: 4,
            acquire_timeout: Duration::from_secs(10),
            statement_timeout: Duration::from_secs(20),
        };
        let admin = database.admin().await;
        let mut both = Self {
            random: StdRng::seed_from_u64(seed),
            api: ApiStore::connect(&connect(database.api_url())).await.unwrap(),
            worker: WorkerStore::connect(&connect(database.worker_url())).await.unwrap(),
            model: Db::new(Sabotage::None),
            tenants: Vec::new(),
            workers: Vec::new(),
            held: Vec::new(),
            invocations: Vec::new(),
            sequence: 0,
            began: Instant::now(),
            admin,
        };
        both.model.now = 1_000 * HOUR;
        for name in ["one", "two", "three"] {
            both.tenant(name).await;
        }
        both.cap().await;
        both
    }

    async fn tenant(&mut self, name: &str) {
        let (tenant, task) = (TenantId::generate(), TaskId::generate());
        for statement in [
            "INSERT INTO sandbar.tenants (tenant_id, name) SELECT $1, $3 WHERE $2 IS NOT NULL",
            "INSERT INTO sandbar.tasks (tenant_id, task_id, name, current_version) VALUES ($1, $2, $3, 1)",
            "INSERT INTO sandbar.blobs (tenant_id, sha256, bytes) SELECT $1, sha256('m'), 'm' WHERE $2 IS NOT NULL AND $3 <> ''",
            "INSERT INTO sandbar.versions (tenant_id, task_id, number, sha256, size_bytes, kind, state)
             SELECT $1, $2, 1, sha256('m'), 1, 'task', 'ready' WHERE $3 <> ''",
        ] {
            sqlx::query(statement).bind(tenant).bind(task).bind(name).execute(&self.admin).await.unwrap();
        }
        self.tenants.push((tenant, task));
    }

    /// One tenant in all, and the task of another, may run little at once.
    async fn cap(&mut self) {
        let (tenant, task) = (self.tenants[0].0, self.tenants[1].1);
        let (of_tenant, of_task) = (self.random.random_range(1..=4), self.random.random_range(1..=3));
        for (statement, id, cap) in [
            ("UPDATE sandbar.tenants SET max_concurrency = $2 WHERE tenant_id = $1", tenant.0, of_tenant),
            ("UPDATE sandbar.tasks SET max_concurrency = $2 WHERE task_id = $1", task.0, of_task),
        ] {
            sqlx::query(statement).bind(id).bind(cap).execute(&self.admin).await.unwrap();
        }
        self.model.cap_tenant(tenant, i64::from(of_tenant));
        self.model.cap_task(task, i64::from(of_task));
    }

    /// Run a sequence.
    async fn run(&mut self, operations: usize) -> Result<(), Disagreement> {
        for n in 1..=operations {
            let what = self.step().await.map_err(|(what, why)| format!("operation {n}, {what}: {why}"))?;
            // A seed that is replayed shows where it began.
            if n % COMPARE_EVERY == 0
                || n == operations
                || super::number("SANDBAR_DIFFERENTIAL_SEED").is_some()
            {
                self.compare().await.map_err(|why| format!("tables after operation {n}, {what}: {why}"))?;
            }
        }
        Ok(())
    }

    async fn step(&mut self) -> Result<&'static str, (&'static str, String)> {
        let die = self.random.random_range(0..100);
        let (what, result) = match die {
            0..=24 => ("enqueue", self.enqueue().await),
            25..=29 => ("register", self.register().await),
            30..=52 => ("claim", self.claim().await),
            53..=76 => ("ack", self.ack().await),
            77..=82 => ("cancel", self.cancel().await),
            83..=86 => ("promote", self.promote().await),
            87..=89 => ("expire", self.expire().await),
            90..=92 => ("heartbeat", self.heartbeat().await),
            93 => ("reap one", self.reap(true).await),
            94 => ("reap", self.reap(false).await),
            95 => ("look", self.look().await),
            96 => ("tidy", self.tidy().await),
            97 => ("settle", self.settle().await),
            _ => ("advance", self.advance().await),
        };
        result.map(|()| what).map_err(|why| (what, why))
    }

    async fn enqueue(&mut self) -> Result<(), Disagreement> {
        let elapsed = self.began.elapsed().as_millis() as Time;
        self.sequence = elapsed.max(self.sequence + 1);
        let now = Utc::now();
        let mut rows: Vec<Row> = Vec::new();
        let (mut keys, mut unique) = (BTreeSet::new(), BTreeSet::new());
        for _ in 0..self.random.random_range(1..=5) {
            let mut row = self.row();
            row.key = row.key.filter(|(key, _)| keys.insert((row.tenant, key.clone())));
            row.unique = row.unique.filter(|(key, _)| unique.insert((row.task, key.clone())));
            rows.push(row);
        }
        let shift = |at: Time| now + chrono::Duration::milliseconds((at - self.model.now) as i64);
        let real: Vec<NewInvocation> = rows.iter().map(|row| as_asked(row, shift)).collect();
        for row in &mut rows {
            // Half an hour off in both; this says in which order it fell due.
            row.run_at = row.run_at.map(|at| at + self.sequence);
        }
        let answers =
            self.api.enqueue(&real, Duration::from_millis(KEY_TTL)).await.map_err(|e| e.to_string())?;
        let answers: Vec<Enqueued> = answers
            .into_iter()
            .map(|answer| match answer {
                RealEnqueued::Accepted(id) => Enqueued::Accepted(id),
                RealEnqueued::Waiting(id) => Enqueued::Waiting(id),
                RealEnqueued::Replayed(id) => Enqueued::Replayed(id),
                RealEnqueued::Conflict => Enqueued::Conflict,
                RealEnqueued::Existing(id) => Enqueued::Existing(id),
                RealEnqueued::Duplicate(id) => Enqueued::Duplicate(id),
                RealEnqueued::UnknownDependency(id) => Enqueued::UnknownDependency(id),
            })
            .collect();
        let expected = self.model.enqueue(&rows, self.model.now + self.sequence);
        self.invocations.extend(rows.iter().zip(&expected).filter_map(|(row, answer)| {
            matches!(answer, Enqueued::Accepted(_) | Enqueued::Waiting(_)).then_some((row.tenant, row.id))
        }));
        same(&answers, &expected)
    }

    fn row(&mut self) -> Row {
        let which = self.random.random_range(0..self.tenants.len());
        let (tenant, task) = self.tenants[which];
        let now = self.model.now;
        let random = &mut self.random;
        // Half an hour off, so that what is due is so on both sides however long the sequence takes.
        let hours = |random: &mut StdRng| random.random_range(0..4u64) * HOUR + HOUR / 2;
        let mut run_at = random.random_ratio(1, 4).then(|| now + hours(random));
        let unique = random.random_ratio(1, 4).then(|| {
            use UniquePolicy::{Debounce, Reject, Replace, Return};
            let policy = [Reject, Return, Replace, Debounce][random.random_range(0..4)];
            (format!("unique-{}", random.random_range(0..3)), policy)
        });
        if matches!(unique, Some((_, UniquePolicy::Debounce))) {
            run_at = Some(now + hours(random));
        }
        // Not where the task has a cap: a row that is behind two gates is met in two steps, and the model has one.
        let together = (which != 1 && random.random_ratio(1, 3)).then(|| {
            let limit = random.random_range(1..=2);
            (format!("key-{limit}"), limit)
        });
        let mut depends_on: Vec<(InvocationId, Condition)> = Vec::new();
        if random.random_ratio(1, 4) {
            use Condition::{Failed, Finished, Succeeded};
            let ours: Vec<InvocationId> = self
                .invocations
                .iter()
                .rev()
                .take(40)
                .filter(|(t, _)| *t == tenant)
                .map(|(_, id)| *id)
                .collect();
            for _ in 0..random.random_range(1..=3usize).min(ours.len()) {
                let on = ours[random.random_range(0..ours.len())];
                if depends_on.iter().all(|(id, _)| *id != on) {
                    depends_on.push((on, [Finished, Succeeded, Failed][random.random_range(0..3)]));
                }
            }
            if random.random_ratio(1, 12) {
                depends_on.push((InvocationId::generate(), Finished));
            }
        }
        Row {
            tenant,
            task,
            id: InvocationId::generate(),
            priority: random.random_range(-2..=2),
            run_at,
            expires_at: random.random_ratio(1, 4).then(|| now + hours(random)),
            key: random
                .random_ratio(1, 3)
                .then(|| (format!("key-{}", random.random_range(0..6)), random.random_range(1..=2u8))),
            unique,
            together,
            depends_on,
            cancels: random.random_bool(0.5),
        }
    }

    async fn register(&mut self) -> Result<(), Disagreement> {
        // A fifth come back under the id of one before, whether that is gone or not.
        let again = !self.workers.is_empty() && self.random.random_ratio(1, 5);
        let worker = if again {
            self.workers[self.random.random_range(0..self.workers.len())].0
        } else {
            WorkerId::generate()
        };
        let epoch: i64 = self.random.random();
        let registration =
            Registration { worker, epoch, host: "test".to_owned(), version: "0".to_owned(), slots: 8 };
        let registered = self.worker.worker_register(&registration).await.is_ok();
        let expected = self.model.register(worker, epoch);
        if expected {
            self.workers.push((worker, epoch));
        }
        same(&registered, &expected)
    }

    fn somebody(&mut self) -> Option<usize> {
        (!self.workers.is_empty()).then(|| self.random.random_range(0..self.workers.len()))
    }

    async fn claim(&mut self) -> Result<(), Disagreement> {
        let Some(who) = self.somebody() else { return Ok(()) };
        let (worker, epoch) = self.workers[who];
        let mut wanted: Vec<(TenantId, u32)> = Vec::new();
        for (tenant, _) in &self.tenants {
            if self.random.random_bool(0.7) {
                wanted.push((*tenant, self.random.random_range(1..=4)));
            }
        }
        if wanted.is_empty() {
            return Ok(());
        }
        self.even_out().await?;
        let lease = LeaseId::generate();
        let asks: Vec<Want> = wanted.iter().map(|(t, n)| Want::of(*t, *n as i32)).collect();
        let claimed = self.worker.claim_under(worker, epoch, lease, &asks).await;
        let expected = self.model.claim(worker, epoch, lease, &wanted);
        match (claimed, expected) {
            (Ok(claimed), Ok(expected)) => {
                // The same, as whoever lost the answer finds it.
                let again = self.worker.leased(worker, epoch, &[lease]).await.map_err(|e| e.to_string())?;
                let places = |of: &[sandbar::store::queue::Claimed]| {
                    let mut places: Vec<_> = of.iter().map(|c| (c.invocation, c.attempt, c.spent)).collect();
                    places.sort();
                    places
                };
                same(&places(&again), &places(&claimed))?;
                let task =
                    |tenant| self.tenants.iter().find(|t| t.0 == tenant).map_or(TaskId::generate(), |t| t.1);
                let mut got: Vec<Item> = claimed
                    .iter()
                    .map(|c| Item {
                        tenant: c.tenant,
                        invocation: c.invocation,
                        attempt: c.attempt,
                        spent: c.spent,
                        task: task(c.tenant),
                        lease: c.lease,
                    })
                    .collect();
                let mut expected = expected;
                got.sort();
                expected.sort();
                self.held.extend(claimed.into_iter().map(|c| {
                    let task = task(c.tenant);
                    (who, finished(c), task)
                }));
                same(&got, &expected)
            }
            (Err(Error::WorkerGone), Err(Gone)) => Ok(()),
            (claimed, expected) => Err(format!("{claimed:?} and {expected:?}")),
        }
    }

    /// What Postgres does in several steps and the model in one: the duty that repairs what cancellations leave behind,
    /// and the row of a key, without which a claim leaves alone what it meets on its second look.
    async fn even_out(&mut self) -> Result<(), Disagreement> {
        self.worker.unpark(MANY as i32).await.map_err(|e| e.to_string())?;
        sqlx::query(
            "INSERT INTO sandbar.caps (tenant_id, scope, task_id, key)
             SELECT DISTINCT tenant_id, 2::smallint, task_id, concurrency_key FROM sandbar.invocations
             WHERE concurrency_key IS NOT NULL ON CONFLICT DO NOTHING",
        )
        .execute(&self.admin)
        .await
        .map_err(|e| e.to_string())?;
        Ok(())
    }

    async fn ack(&mut self) -> Result<(), Disagreement> {
        if self.held.is_empty() {
            return Ok(());
        }
        // One worker's ends, sometimes told by another or under another epoch.
        let who = self.held[self.random.random_range(0..self.held.len())].0;
        let (mut worker, mut epoch) = self.workers[who];
        match self.random.random_range(0..12) {
            0 => epoch = epoch.wrapping_add(1),
            1 => (worker, epoch) = self.workers[self.random.random_range(0..self.workers.len())],
            _ => {}
        }
        let mut chosen = Vec::new();
        let mut index = 0;
        while index < self.held.len() && chosen.len() < 6 {
            if self.held[index].0 == who && self.random.random_bool(0.6) {
                chosen.push(self.held.swap_remove(index));
            } else {
                index += 1;
            }
        }
        let mut ends = Vec::new();
        let mut model = Vec::new();
        let mut tasks = Vec::new();
        for (_, mut end, task) in chosen {
            let (verdict, termination, reason) = match self.random.random_range(0..10) {
                0 => (Verdict::Dead, Termination::OutOfFuel, "out-of-fuel"),
                1..=2 => (
                    Verdict::Retry { delay_ms: self.random.random_range(0..3) * HOUR + HOUR / 2 },
                    Termination::Deadline,
                    "deadline",
                ),
                3 => (Verdict::Release { delay_ms: 0 }, fault(), "host-fault"),
                4 => (Verdict::Release { delay_ms: HOUR / 2 }, fault(), "host-fault"),
                5 => (Verdict::Cancelled, Termination::Cancelled, "cancelled"),
                _ => (Verdict::Succeeded, Termination::Succeeded, "succeeded"),
            };
            end.verdict = verdict;
            end.outcome.termination = termination;
            let item = Item {
                tenant: end.claimed.tenant,
                invocation: end.claimed.invocation,
                attempt: end.claimed.attempt,
                spent: end.claimed.spent,
                task,
                lease: end.claimed.lease,
            };
            model.push(End { item, verdict, reason });
            ends.push(end);
            tasks.push(task);
        }
        let acked = self.worker.ack(worker, epoch, &ends).await.map_err(|e| e.to_string())?;
        let mut got: Vec<(InvocationId, State)> =
            acked.accepted.iter().map(|a| (a.invocation, a.state)).collect();
        let mut expected = self.model.ack(worker, epoch, &model);
        let order = |a: &(InvocationId, State)| (a.0, a.1.as_str());
        got.sort_by_key(order);
        expected.sort_by_key(order);
        // Some ends are told again later.
        for (end, task) in ends.into_iter().zip(tasks) {
            let ours = self.workers.get(who) == Some(&(worker, epoch));
            if !ours || self.random.random_ratio(1, 3) {
                self.held.push((who, end, task));
            }
        }
        same(&got, &expected)
    }

    async fn cancel(&mut self) -> Result<(), Disagreement> {
        let known = self.random.random_range(0..=self.invocations.len());
        let (tenant, id) = match self.invocations.get(known) {
            Some(one) => *one,
            None => (self.tenants[0].0, InvocationId::generate()),
        };
        let mut connection = self.api.tenant(tenant).await.map_err(|e| e.to_string())?;
        let answer = match connection.invocation_cancel(id).await.map_err(|e| e.to_string())? {
            RealCancelled::Now => Cancelled::Now,
            RealCancelled::Soon => Cancelled::Soon,
            RealCancelled::TooLate => Cancelled::TooLate,
            RealCancelled::Unknown => Cancelled::Unknown,
        };
        same(&answer, &self.model.cancel(id))
    }

    async fn promote(&mut self) -> Result<(), Disagreement> {
        let limit = if self.random.random_bool(0.5) { 3 } else { MANY };
        let (moved, _) = self.worker.promote(limit as i32).await.map_err(|e| e.to_string())?;
        // Due times within one statement's time are in the order of the clock, which the model has not got: move all.
        let expected = self.model.promote(limit);
        if limit < MANY && moved > 0 {
            same(&moved, &expected)?;
            let (rest, _) = self.worker.promote(MANY as i32).await.map_err(|e| e.to_string())?;
            return same(&rest, &self.model.promote(MANY));
        }
        same(&moved, &expected)
    }

    /// Duties until they have nothing more to do.
    async fn settle(&mut self) -> Result<(), Disagreement> {
        while self.worker.settle(MANY as i32).await.map_err(|e| e.to_string())?.more {}
        self.model.settle(None);
        while self.model.unsettled() {
            self.model.settle(None);
        }
        self.worker.fold_usage(MANY as i32).await.map_err(|e| e.to_string())?;
        Ok(())
    }

    /// Who has work for whom, and how much of it.
    async fn look(&mut self) -> Result<(), Disagreement> {
        self.even_out().await?;
        let got: BTreeMap<TenantId, Option<u32>> = self
            .worker
            .ready_tenants(MANY as i32)
            .await
            .map_err(|e| e.to_string())?
            .into_iter()
            .map(|t| (t.tenant, t.free.map(i32::unsigned_abs)))
            .collect();
        let queued: BTreeMap<TenantId, Option<u32>> = self.model.ready_tenants().into_iter().collect();
        if let Some(forgotten) = self.model.startable().iter().find(|t| !got.contains_key(t)) {
            return Err(format!("{forgotten} has work that may start and is not named: {got:?}"));
        }
        match got.iter().find(|(tenant, free)| queued.get(tenant) != Some(free)) {
            Some(wrong) => Err(format!("Postgres names {wrong:?}, the model {queued:?}")),
            None => Ok(()),
        }
    }

    async fn expire(&mut self) -> Result<(), Disagreement> {
        let got: BTreeSet<InvocationId> =
            self.worker.expire(MANY as i32).await.map_err(|e| e.to_string())?.into_iter().collect();
        same(&got, &self.model.expire(MANY).into_iter().collect())
    }

    async fn heartbeat(&mut self) -> Result<(), Disagreement> {
        let Some(who) = self.somebody() else { return Ok(()) };
        let (worker, epoch) = self.workers[who];
        let got = match self.worker.worker_heartbeat(worker, epoch, Load::default()).await {
            Ok(orders) => Ok(orders.cancels.into_iter().collect::<BTreeSet<_>>()),
            Err(Error::WorkerGone) => Err(Gone),
            Err(error) => return Err(error.to_string()),
        };
        same(&got, &self.model.heartbeat(worker, epoch).map(|c| c.into_iter().collect()))
    }

    async fn reap(&mut self, one: bool) -> Result<(), Disagreement> {
        let only = if one { self.somebody().map(|who| self.workers[who].0) } else { None };
        if one && only.is_none() {
            return Ok(());
        }
        let got =
            self.worker.reap(DEAD_AFTER, i32::from(MAX_HANDOVERS), only).await.map_err(|e| e.to_string())?;
        let expected = self.model.reap(DEAD_AFTER.as_millis() as Time, MAX_HANDOVERS, only);
        same(
            &(got.workers, got.handed_on, got.given_up),
            &(expected.workers, expected.handed_on, expected.given_up),
        )
    }

    async fn tidy(&mut self) -> Result<(), Disagreement> {
        self.worker.tidy(MANY as i64).await.map_err(|e| e.to_string())?;
        self.model.tidy();
        Ok(())
    }

    /// Hours pass: every stored time moves back.
    async fn advance(&mut self) -> Result<(), Disagreement> {
        let hours = self.random.random_range(1..=3);
        let mut statements: Vec<String> = [
            ("scheduled", "due_at"),
            ("expiring", "expires_at"),
            ("idempotency_keys", "expires_at"),
            ("workers", "heartbeat_at"),
            ("invocations", "created_at"),
            ("invocations", "run_at"),
        ]
        .iter()
        .map(|(table, column)| {
            format!("UPDATE sandbar.{table} SET {column} = {column} - interval '{hours} hours'")
        })
        .collect();
        statements.extend(
            ["ready", "scheduled", "parked"]
                .iter()
                .map(|table| format!("UPDATE sandbar.{table} SET rank = rank - interval '{hours} hours'")),
        );
        for statement in statements {
            sqlx::query(&statement).execute(&self.admin).await.map_err(|e| e.to_string())?;
        }
        self.model.now += hours * HOUR;
        Ok(())
    }

    /// Every table against the model.
    async fn compare(&mut self) -> Result<(), Disagreement> {
        let places: Vec<(InvocationId, String)> = sqlx::query_as(
            "SELECT invocation_id, 'scheduled ' || attempt || ' ' || spent FROM sandbar.scheduled
             UNION ALL SELECT invocation_id, 'queued ' || attempt || ' ' || spent FROM sandbar.queued
             UNION ALL SELECT u.id, 'running ' || u.attempt || ' ' || u.spent || ' ' || l.lease_id
               FROM sandbar.leases l CROSS JOIN LATERAL unnest(l.invocations, l.attempts, l.spent) AS u(id, attempt, spent)
               WHERE NOT EXISTS (SELECT 1 FROM sandbar.attempts a WHERE a.invocation_id = u.id AND a.attempt = u.attempt)
             UNION ALL SELECT invocation_id, state || ' ' || reason FROM sandbar.results
             ORDER BY 1, 2",
        )
        .fetch_all(&self.admin)
        .await
        .unwrap();
        let expected: Vec<(InvocationId, String)> =
            self.model.places().map(|(id, place)| (id, describe(place))).collect();
        differ("places", &places, &expected)?;

        let attempts: Vec<(InvocationId, i16, String)> = sqlx::query_as(
            "SELECT invocation_id, attempt, termination ->> 'reason' FROM sandbar.attempts ORDER BY 1, 2",
        )
        .fetch_all(&self.admin)
        .await
        .unwrap();
        let expected: Vec<_> =
            self.model.attempts.iter().map(|((id, n), reason)| (*id, *n, reason.clone())).collect();
        differ("attempts", &attempts, &expected)?;

        for (table, expected) in
            [("cancels", self.model.cancels.clone()), ("expiring", self.model.expiries())]
        {
            let rows: Vec<(InvocationId,)> =
                sqlx::query_as(&format!("SELECT invocation_id FROM sandbar.{table} ORDER BY 1"))
                    .fetch_all(&self.admin)
                    .await
                    .unwrap();
            let rows: Vec<InvocationId> = rows.into_iter().map(|(id,)| id).collect();
            differ(table, &rows, &expected.into_iter().collect::<Vec<_>>())?;
        }

        let keys: Vec<(TenantId, String, InvocationId)> = sqlx::query_as(
            "SELECT tenant_id, key, invocation_id FROM sandbar.idempotency_keys ORDER BY tenant_id, key COLLATE \"C\"",
        )
        .fetch_all(&self.admin)
        .await
        .unwrap();
        differ("idempotency_keys", &keys, &self.model.remembered().into_iter().collect::<Vec<_>>())?;

        let workers: Vec<(WorkerId,)> = sqlx::query_as("SELECT worker_id FROM sandbar.workers ORDER BY 1")
            .fetch_all(&self.admin)
            .await
            .unwrap();
        let workers: Vec<WorkerId> = workers.into_iter().map(|(id,)| id).collect();
        differ("workers", &workers, &self.model.alive().into_iter().collect::<Vec<_>>())?;

        let leases: Vec<(LeaseId, i32)> =
            sqlx::query_as("SELECT lease_id, open FROM sandbar.leases ORDER BY 1")
                .fetch_all(&self.admin)
                .await
                .unwrap();
        let expected: Vec<(LeaseId, i32)> =
            self.model.held().into_iter().map(|(id, n)| (id, n as i32)).collect();
        differ("leases", &leases, &expected)?;

        let caps: Vec<(i16, uuid::Uuid, String, i64)> = sqlx::query_as(
            "SELECT scope, CASE scope WHEN 0 THEN tenant_id ELSE task_id END, key, running::bigint FROM sandbar.caps
             WHERE running <> 0 AND (scope = 2 OR cap IS NOT NULL)",
        )
        .fetch_all(&self.admin)
        .await
        .unwrap();
        differ("caps", &caps, &self.model.counted().into_iter().collect::<Vec<_>>())?;

        let unique: Vec<(TaskId, String, InvocationId)> =
            sqlx::query_as("SELECT task_id, key, invocation_id FROM sandbar.unique_keys")
                .fetch_all(&self.admin)
                .await
                .unwrap();
        differ("unique_keys", &unique, &self.model.holders().into_iter().collect::<Vec<_>>())?;

        let dependencies: Vec<(InvocationId, InvocationId)> =
            sqlx::query_as("SELECT on_id, invocation_id FROM sandbar.dependencies")
                .fetch_all(&self.admin)
                .await
                .unwrap();
        differ("dependencies", &dependencies, &self.model.dependencies.keys().copied().collect::<Vec<_>>())?;

        let (attempts, succeeded, late): (i64, i64, i64) = sqlx::query_as(
            "SELECT COALESCE(sum(attempts), 0)::bigint, COALESCE(sum(succeeded), 0)::bigint,
               (SELECT COALESCE(sum(items), 0)::bigint FROM sandbar.late_acks) FROM sandbar.usage",
        )
        .fetch_one(&self.admin)
        .await
        .unwrap();
        let expected = (self.model.ledger.0, self.model.ledger.1, self.model.late);
        same(&(attempts, succeeded, late), &expected).map_err(|why| format!("ledger, late acks: {why}"))?;
        self.model.over_cap().map_or(Ok(()), Err)
    }
}

/// A row as a request that the store takes; `at` turns virtual times into real ones.
fn as_asked(row: &Row, at: impl Fn(Time) -> chrono::DateTime<Utc>) -> NewInvocation {
    let key = |key: &str| Key::try_from(key.to_owned()).unwrap();
    NewInvocation {
        tenant: row.tenant,
        id: row.id,
        task: row.task,
        version: 1,
        priority: row.priority,
        input: b"1".to_vec(),
        spec: Spec {
            input: InputKind::Task,
            limits: Limits::default(),
            retry: RetryPolicy::default(),
            retry_of: None,
            scratch: None,
            determinism: None,
            family: None,
            sealed: None,
        },
        tags: BTreeMap::new(),
        run_at: row.run_at.map(&at),
        expires_at: row.expires_at.map(&at),
        idempotency: row.key.clone().map(|(key, print)| (key, [print; 32])),
        admission: Admission {
            unique: row.unique.as_ref().map(|(name, policy)| Unique { key: key(name), policy: *policy }),
            concurrency: row
                .together
                .as_ref()
                .map(|(name, limit)| Concurrency { key: key(name), limit: *limit as u32 }),
            depends_on: row
                .depends_on
                .iter()
                .map(|(id, condition)| Dependency { id: *id, condition: *condition })
                .collect(),
            run_unmet: !row.cancels,
        },
    }
}

fn describe(place: &Place) -> String {
    match place {
        Place::Scheduled { attempt, spent, .. } => format!("scheduled {attempt} {spent}"),
        Place::Queued { attempt, spent } => format!("queued {attempt} {spent}"),
        Place::Running { lease, attempt, spent } => format!("running {attempt} {spent} {lease}"),
        Place::Ended { state, reason } => format!("{state} {reason}"),
    }
}

fn same<T: PartialEq + std::fmt::Debug>(real: &T, model: &T) -> Result<(), Disagreement> {
    if real == model { Ok(()) } else { Err(format!("Postgres says {real:?}, the model {model:?}")) }
}

/// The first rows that only one of them has.
fn differ<T: PartialEq + Ord + std::fmt::Debug>(
    table: &str,
    real: &[T],
    model: &[T],
) -> Result<(), Disagreement> {
    let only = |a: &[T], b: &[T]| {
        a.iter().filter(|row| !b.contains(row)).take(3).map(|row| format!("{row:?}")).collect::<Vec<_>>()
    };
    if real.len() == model.len() && only(real, model).is_empty() {
        return Ok(());
    }
    Err(format!(
        "{table}: only in Postgres {:?}, only in the model {:?}",
        only(real, model),
        only(model, real)
    ))
}

fn fault() -> Termination {
    Termination::HostFault { message: "test".to_owned() }
}

fn finished(claimed: sandbar::store::queue::Claimed) -> Finished {
    Finished {
        claimed,
        verdict: Verdict::Succeeded,
        started_at: Utc::now(),
        outcome: Outcome {
            termination: Termination::Succeeded,
            receipt: Receipt { fuel_exact: true, ..Receipt::default() },
            output: b"1".to_vec(),
            content_type: "application/json".to_owned(),
            logs: Log::default(),
            backtrace: Vec::new(),
            artifacts: Vec::new(),
        },
        sealed_log: None,
    }
}

#[tokio::test]
async fn the_model_and_postgres_agree_on_every_answer_and_every_table() {
    let seed = super::number("SANDBAR_DIFFERENTIAL_SEED").unwrap_or_else(|| u64::from(rand::random::<u32>()));
    let mut both = Both::new(seed).await;
    if let Err(disagreement) = both.run(OPERATIONS).await {
        panic!("SANDBAR_DIFFERENTIAL_SEED={seed}: {disagreement}");
    }
    let ended = both.model.places().filter(|(_, p)| matches!(p, Place::Ended { .. })).count();
    assert!(ended > 20, "only {ended} invocations ended: the sequence proves little");
}

/// Changes the body of a function in this scratch database.
async fn alter(admin: &PgPool, function: &str, changes: &[(&str, &str)]) {
    let mut body: String = sqlx::query_scalar("SELECT pg_get_functiondef(to_regproc($1))")
        .bind(format!("sandbar.{function}"))
        .fetch_one(admin)
        .await
        .unwrap();
    for (from, to) in changes {
        assert!(body.contains(from), "no {from:?} in {function}");
        body = body.replace(from, to);
    }
    sqlx::raw_sql(&body).execute(admin).await.unwrap();
}

/// What is noticed first.
async fn noticed(function: &str, changes: &[(&str, &str)]) -> Option<String> {
    for seed in 0..8 {
        let mut both = Both::new(seed).await;
        alter(&both.admin, function, changes).await;
        if let Err(disagreement) = both.run(OPERATIONS).await {
            return Some(disagreement.chars().take(SHOWN).collect());
        }
    }
    None
}

#[tokio::test]
async fn an_ack_without_its_fences_is_noticed() {
    let fence = ("u.lease_id = ANY (held) AND a.attempt IS NULL", "a.attempt IS NULL");
    let what = noticed("ack", &[fence]).await.expect("an ack without fences goes unnoticed");
    eprintln!("ack without fences: {what}");
}

#[tokio::test]
async fn an_ack_that_ignores_the_epoch_is_noticed() {
    let what = noticed("ack", &[("x.epoch = p_epoch", "true")]).await;
    eprintln!("ack without epoch: {}", what.expect("an ack under another epoch goes unnoticed"));
}

#[tokio::test]
async fn a_claim_that_ignores_caps_is_noticed() {
    let tenants = ("GREATEST(LEAST(u.n, l.free), 0)", "u.n");
    let what = noticed("claim", &[tenants]).await.expect("a claim beyond a tenant's cap goes unnoticed");
    eprintln!("claim without tenants' caps: {what}");
    let what = noticed("pass_gates", &[("m.task_place > m.free", "false")]).await;
    eprintln!("claim without tasks' caps: {}", what.expect("a claim beyond a task's cap goes unnoticed"));
    let what = noticed("pass_gates", &[("x.running + m.key_place <= m.lim", "true")]).await;
    eprintln!("claim without keys' caps: {}", what.expect("a claim beyond a key's cap goes unnoticed"));
}

#[tokio::test]
async fn a_reaper_that_gives_back_no_slots_is_noticed() {
    let forget = ("PERFORM release_slots(o_t, o_i, o_f)", "NULL");
    let what = noticed("reap", &[forget]).await.expect("a reaper that leaks slots goes unnoticed");
    eprintln!("reaper that leaks slots: {what}");
}

#[tokio::test]
async fn a_reaper_that_records_too_few_lost_attempts_is_noticed() {
    let forget = ("FROM open o\n    ), verdict", "FROM open o LIMIT 1\n    ), verdict");
    let what = noticed("reap", &[forget]).await.expect("a reaper that loses attempts goes unnoticed");
    eprintln!("reaper that loses attempts: {what}");
}
