//! `/v1/workers` and `/v1/duties`: for operators of the platform.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use crate::api::Api;
use crate::api::extract::{self, DutyPath, Operator, WorkerPath};
use crate::api::problem::Problem;
use crate::domain::worker::Wanted;
use crate::store::duty::{DutyChange, DutyRow};
use crate::store::worker::WorkerRow;
use crate::wire::Page;
use crate::wire::operate as wire;
use crate::wire::problem as problem_wire;

fn worker(row: &WorkerRow) -> wire::Worker {
    let load = row.live.map(|(_, load)| load);
    wire::Worker {
        id: row.worker.0,
        host: row.host.clone(),
        version: row.version.clone(),
        state: match row.live {
            None => wire::WorkerState::Gone,
            Some((Wanted::Active, _)) => wire::WorkerState::Active,
            Some((Wanted::Cordoned, _)) => wire::WorkerState::Cordoned,
            Some((Wanted::Draining, _)) => wire::WorkerState::Draining,
        },
        slots: row.slots,
        running: load.map(|load| load.running),
        memory: load.and_then(|load| {
            let (worker_bytes, cells_bytes) = (load.worker_bytes?, load.cells_bytes?);
            Some(wire::WorkerMemory {
                worker_bytes,
                cells_bytes,
                total_bytes: worker_bytes.saturating_add(cells_bytes),
                host_bytes: load.host_bytes?,
            })
        }),
        walls: row.walls.map(|walls| wire::WorkerWalls {
            no_new_privileges: walls.no_new_privileges,
            seccomp: walls.seccomp,
            landlock: walls.landlock,
            pagemap_scan: walls.pagemap_scan,
        }),
        started_at: row.started_at,
        last_seen_at: row.seen_at,
        gone_at: row.gone_at,
    }
}

/// What a duty does, in words. A duty without them shows its name alone.
fn description(name: &str) -> &'static str {
    match name {
        "promote" => "Moves what is due from scheduled to the queue",
        "settle" => "Tells those who wait for an end that came",
        "unpark" => "Brings parked invocations back whose cap has room",
        "reap" => "Declares silent workers dead and hands their work on",
        "expire" => "Ends what waits past its expiry",
        "erase" => "Deletes tenants whose grace time is over, with everything of them",
        "tidy" => "Forgets old idempotency keys, spent cancellations and workers long gone",
        "bulk" => "Does bulk operations, a page at a time",
        "usage" => "Adds usage up, and lets who has used up a quota of a period wait until it ends",
        "budgets" => "Says which thresholds of budgets are reached",
        "classify" => "Finds out which kind of failure new dead letters are",
        "retention" => "Exports, if asked for, and deletes what ended longer ago than is kept",
        _ => "",
    }
}

fn duty(row: DutyRow) -> wire::Duty {
    wire::Duty {
        description: description(&row.name).to_owned(),
        state: match (row.paused, row.running, row.holder) {
            (_, true, _) => wire::DutyState::Running,
            (true, false, _) => wire::DutyState::Paused,
            (false, false, Some(_)) => wire::DutyState::Idle,
            (false, false, None) => wire::DutyState::Vacant,
        },
        name: row.name,
        paused: row.paused,
        run_requested: row.run_requested,
        holder: row.holder.map(|(holder, _)| holder.0),
        held_since: row.holder.map(|(_, since)| since),
        interval_ms: row.interval_ms.unwrap_or(row.default_interval_ms),
        default_interval_ms: row.default_interval_ms,
        runs: row.runs,
        failures: row.failures,
        rows_handled: row.rows_handled,
        last_run: row.last_run_at.map(|started_at| wire::DutyRun {
            started_at,
            duration_ms: row.last_duration_ms,
            rows: row.last_rows,
            error: row.last_error,
        }),
    }
}

/// Every worker that runs, oldest first, then those that are gone, for a day. At most 1,000 in all.
#[utoipa::path(
    get, path = "/v1/workers", tag = "platform",
    responses(
        (status = 200, description = "Workers", body = Page<wire::Worker>),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden: the key is not the platform's", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn workers(
    State(api): State<Api>,
    _: Operator,
) -> Result<Json<Page<wire::Worker>>, Problem> {
    let rows = api.app.workers().await?;
    Ok(Json(Page { items: rows.iter().map(worker).collect(), next: None }))
}

async fn want(api: &Api, WorkerPath(id): WorkerPath, wanted: Wanted) -> Result<Json<wire::Worker>, Problem> {
    Ok(Json(worker(&api.app.worker_want(id, wanted).await?)))
}

/// Claim nothing more; what runs goes on. The worker hears it with its next heartbeat.
#[utoipa::path(
    post, path = "/v1/workers/{id}/cordon", tag = "platform",
    params(("id" = uuid::Uuid, Path, description = "Id of the worker")),
    responses(
        (status = 200, description = "The worker", body = wire::Worker),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "worker-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn cordon(
    State(api): State<Api>,
    _: Operator,
    id: WorkerPath,
) -> Result<Json<wire::Worker>, Problem> {
    want(&api, id, Wanted::Cordoned).await
}

/// Claim again, after a cordon or during a drain.
#[utoipa::path(
    post, path = "/v1/workers/{id}/uncordon", tag = "platform",
    params(("id" = uuid::Uuid, Path, description = "Id of the worker")),
    responses(
        (status = 200, description = "The worker", body = wire::Worker),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "worker-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn uncordon(
    State(api): State<Api>,
    _: Operator,
    id: WorkerPath,
) -> Result<Json<wire::Worker>, Problem> {
    want(&api, id, Wanted::Active).await
}

/// Claim nothing more, finish what runs however long it may take, and leave: `sandbar worker` exits with 0. A worker
/// that shares its process with a server (`sandbar dev`) stays, idle, until it is uncordoned.
#[utoipa::path(
    post, path = "/v1/workers/{id}/drain", tag = "platform",
    params(("id" = uuid::Uuid, Path, description = "Id of the worker")),
    responses(
        (status = 200, description = "The worker", body = wire::Worker),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "worker-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn drain(
    State(api): State<Api>,
    _: Operator,
    id: WorkerPath,
) -> Result<Json<wire::Worker>, Problem> {
    want(&api, id, Wanted::Draining).await
}

/// Every background duty: who holds it, when it ran, what it did.
#[utoipa::path(
    get, path = "/v1/duties", tag = "platform",
    responses(
        (status = 200, description = "Duties, by name", body = Page<wire::Duty>),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden: the key is not the platform's", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn duties(State(api): State<Api>, _: Operator) -> Result<Json<Page<wire::Duty>>, Problem> {
    let rows = api.app.duties().await?;
    Ok(Json(Page { items: rows.into_iter().map(duty).collect(), next: None }))
}

async fn change(
    api: &Api,
    DutyPath(name): DutyPath,
    change: DutyChange,
) -> Result<Json<wire::Duty>, Problem> {
    Ok(Json(duty(api.app.duty_change(&name, change).await?)))
}

/// Let a duty run only when asked to, until it is resumed. A run under way goes on to its end.
#[utoipa::path(
    post, path = "/v1/duties/{name}/pause", tag = "platform",
    params(("name" = String, Path, description = "Name of the duty")),
    responses(
        (status = 200, description = "The duty", body = wire::Duty),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "duty-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn pause(
    State(api): State<Api>,
    _: Operator,
    name: DutyPath,
) -> Result<Json<wire::Duty>, Problem> {
    change(&api, name, DutyChange { paused: Some(true), ..DutyChange::default() }).await
}

/// Let a paused duty run again.
#[utoipa::path(
    post, path = "/v1/duties/{name}/resume", tag = "platform",
    params(("name" = String, Path, description = "Name of the duty")),
    responses(
        (status = 200, description = "The duty", body = wire::Duty),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "duty-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn resume(
    State(api): State<Api>,
    _: Operator,
    name: DutyPath,
) -> Result<Json<wire::Duty>, Problem> {
    change(&api, name, DutyChange { paused: Some(false), ..DutyChange::default() }).await
}

/// Ask for one run now, also of a paused duty. Its holder begins within a second or so.
#[utoipa::path(
    post, path = "/v1/duties/{name}/run", tag = "platform",
    params(("name" = String, Path, description = "Name of the duty")),
    responses(
        (status = 202, description = "It will run", body = wire::Duty),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "duty-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn run(
    State(api): State<Api>,
    _: Operator,
    name: DutyPath,
) -> Result<(StatusCode, Json<wire::Duty>), Problem> {
    let asked = change(&api, name, DutyChange { run: true, ..DutyChange::default() }).await?;
    Ok((StatusCode::ACCEPTED, asked))
}

/// Set the time between runs of a duty; all servers go by it within a second or so, without a restart.
#[utoipa::path(
    patch, path = "/v1/duties/{name}", tag = "platform",
    params(("name" = String, Path, description = "Name of the duty")),
    request_body(content = wire::DutyPatch, content_type = "application/json"),
    responses(
        (status = 200, description = "The duty", body = wire::Duty),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 403, description = "forbidden", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "duty-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 422, description = "invalid-body", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn set(
    State(api): State<Api>,
    _: Operator,
    name: DutyPath,
    body: extract::Json<wire::DutyPatch>,
) -> Result<Json<wire::Duty>, Problem> {
    let (patch, _) = body.into_parts();
    change(&api, name, DutyChange { interval_ms: patch.interval_ms, ..DutyChange::default() }).await
}
