//! The facts about one invocation's waiting, each read at a bounded cost. What follows from them is `domain::why`.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::Row;

use crate::domain::ids::InvocationId;
use crate::domain::invocation::{State, UnknownState};
use crate::domain::why::{Cap, Facts, Held};
use crate::store::invocation::{ONE, READY, RESULT, SCHEDULED, STATE};
use crate::store::{Error, Result, TenantConn};

/// Invocations ahead that are counted.
const MAX_AHEAD: i64 = 10_000;
/// Ends looked at for the rate, newest ids first.
const MAX_ENDED: i64 = 1_000;
/// Ends before this are no guide.
const RECENT: Duration = Duration::from_secs(60);

impl TenantConn {
    /// What is known about the waiting of an invocation. `None`: no such invocation.
    ///
    /// # Errors
    /// Postgres does not answer.
    pub async fn invocation_why(&mut self, id: InvocationId) -> Result<Option<Facts>> {
        let tenant = self.tenant();
        let row = sqlx::query(&format!(
            "SELECT {STATE}, s.due_at, COALESCE(s.spent, q.spent, 0::smallint) AS spent,
               EXISTS (SELECT 1 FROM cancels c WHERE c.tenant_id = i.tenant_id AND c.invocation_id = i.invocation_id) AS cancelling,
               (SELECT count(*) FROM dependencies d WHERE d.tenant_id = i.tenant_id AND d.invocation_id = i.invocation_id) AS dependencies,
               CASE WHEN o.paused THEN 'tenant' WHEN t.paused THEN 'task' ELSE
                 (SELECT 'tag ' || p.tag_key || ':' || p.tag_value FROM pauses p WHERE p.tenant_id = i.tenant_id AND p.kind = 'tag'
                    AND i.tags ->> p.tag_key = p.tag_value LIMIT 1) END AS paused,
               NOT t.active AS inactive,
               CASE WHEN o.held_until IS NOT NULL THEN 'tenant' WHEN t.held_until IS NOT NULL THEN 'task' END AS held,
               COALESCE(o.held_by, t.held_by) AS held_by, CASE WHEN o.held_until IS NULL THEN t.held_until ELSE o.held_until END AS held_until,
               o.state <> 'active' OR o.paused OR o.held_until IS NOT NULL AS tenant_shut,
               oc.memory_cap, oc.memory_used, declared_memory(i.spec) AS memory,
               i.concurrency_limit, kc.running AS key_running, oc.cap AS tenant_cap,
               oc.running AS tenant_running, t.max_concurrency AS task_cap, tc.running AS task_running,
               CASE WHEN q.invocation_id IS NOT NULL THEN (SELECT count(*) FROM (
                 SELECT 1 FROM ready a WHERE a.tenant_id = i.tenant_id AND (a.rank, a.invocation_id) < (q.rank, q.invocation_id)
                 LIMIT $3 + 1) before) ELSE 0 END AS ahead,
               f.workers, f.claiming, f.slots, f.running, f.room, f.share
             FROM {ONE} JOIN tenants o ON o.tenant_id = i.tenant_id
             JOIN tasks t ON t.tenant_id = i.tenant_id AND t.task_id = i.task_id
             LEFT JOIN {RESULT} LEFT JOIN {READY} LEFT JOIN {SCHEDULED}
             LEFT JOIN caps oc ON oc.tenant_id = i.tenant_id AND oc.scope = 0
             LEFT JOIN caps tc ON tc.tenant_id = i.tenant_id AND tc.scope = 1 AND tc.task_id = i.task_id
             LEFT JOIN caps kc ON kc.tenant_id = i.tenant_id AND kc.scope = 2 AND kc.task_id = i.task_id AND kc.key = i.concurrency_key
             CROSS JOIN fleet() f"
        ))
        .bind(tenant)
        .bind(id)
        .bind(MAX_AHEAD)
        .fetch_optional(&mut **self)
        .await?;
        let Some(row) = row else { return Ok(None) };
        let state: State = row
            .try_get::<&str, _>("state")?
            .parse()
            .map_err(|e: UnknownState| Error::Corrupt(e.to_string()))?;
        let ahead: i64 = row.try_get("ahead")?;
        let held = match (row.try_get("held")?, row.try_get("held_by")?, row.try_get("held_until")?) {
            (Some("tenant"), Some(quota), Some(until)) => Some(Held { of: "tenant", quota, until }),
            (Some(_), Some(quota), Some(until)) => Some(Held { of: "task", quota, until }),
            _ => None,
        };
        let wanted: i64 = row.try_get("memory")?;
        let no_memory = match (row.try_get::<Option<i64>, _>("memory_cap")?, row.try_get("memory_used")?) {
            (Some(limit), Some(used)) if used > 0 && wanted > limit - used => Some((limit, used)),
            _ => None,
        };
        let mut facts = Facts {
            state,
            due_at: row.try_get("due_at")?,
            spent: row.try_get("spent")?,
            cancelling: row.try_get("cancelling")?,
            dependencies: row.try_get("dependencies")?,
            paused: row.try_get("paused")?,
            inactive: row.try_get("inactive")?,
            held,
            no_memory,
            full: Vec::new(),
            ahead: ahead.min(MAX_AHEAD),
            ahead_is_bound: ahead > MAX_AHEAD,
            workers: row.try_get("workers")?,
            claiming: row.try_get("claiming")?,
            slots: row.try_get("slots")?,
            running: row.try_get("running")?,
            room: row.try_get("room")?,
            share: row.try_get("share")?,
            ended: 0,
            ended_within: RECENT,
        };
        // What shuts a tenant does so by a cap of 0, which says nothing more.
        let tenant_cap = if row.try_get("tenant_shut")? { None } else { row.try_get("tenant_cap")? };
        let caps: [(&'static str, Option<i32>, &str); 3] = [
            ("concurrency-key", row.try_get("concurrency_limit")?, "key_running"),
            ("task", row.try_get("task_cap")?, "task_running"),
            ("tenant", tenant_cap, "tenant_running"),
        ];
        for (of, limit, running) in caps {
            let running: Option<i32> = row.try_get(running)?;
            if let (Some(limit), Some(running)) = (limit, running)
                && running >= limit
            {
                facts.full.push(Cap { of, limit: limit.into(), running: running.into() });
            }
        }
        if state == State::Queued {
            (facts.ended, facts.ended_within) = self.ended_lately().await?;
        }
        Ok(Some(facts))
    }

    /// How many of this tenant's invocations ended lately, and within which time. By the newest ids, because ends have
    /// no index by time; an invocation that ran for long is not among them.
    async fn ended_lately(&mut self) -> Result<(i64, Duration)> {
        let tenant = self.tenant();
        let (ended, looked_at, since): (i64, i64, Option<DateTime<Utc>>) = sqlx::query_as(
            "SELECT count(*) FILTER (WHERE recent), count(*), min(finished_at) FILTER (WHERE recent) FROM (
               SELECT finished_at, finished_at > clock_timestamp() - make_interval(secs => $3) AS recent
               FROM results WHERE tenant_id = $1 ORDER BY invocation_id DESC LIMIT $2) newest",
        )
        .bind(tenant)
        .bind(MAX_ENDED)
        .bind(RECENT.as_secs_f64())
        .fetch_one(&mut **self)
        .await?;
        let within = match since {
            // All that were looked at are recent: there are more, so the time is that of these.
            Some(since) if ended == looked_at && looked_at == MAX_ENDED => {
                (Utc::now() - since).to_std().unwrap_or_default().max(Duration::from_millis(1))
            }
            _ => RECENT,
        };
        Ok((ended, within))
    }
}
