//! `/v1/invocations/{id}/why`: the reasons of `domain::why` in words.

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, TimeDelta, Utc};

use crate::api::extract::{Caller, InvocationPath};
use crate::api::problem::Problem;
use crate::api::{Api, shape};
use crate::domain::ids::InvocationId;
use crate::domain::why::{Facts, Reason, explain};
use crate::wire::problem as problem_wire;
use crate::wire::why as wire;

fn reason(reason: &Reason) -> wire::WhyReason {
    let plain = |kind: &str, detail: String| wire::WhyReason {
        kind: kind.to_owned(),
        detail,
        until: None,
        ahead: None,
        share: None,
        of: None,
        limit: None,
        current: None,
    };
    match reason {
        Reason::Finished => plain("finished", "it has ended".to_owned()),
        Reason::Running => plain("running", "a worker has it".to_owned()),
        Reason::Cancelling => {
            plain("cancelling", "it runs, and its worker has been told to stop it".to_owned())
        }
        Reason::Delay { until, backoff } => wire::WhyReason {
            until: Some(*until),
            ..plain(
                "delay",
                if *backoff {
                    format!("the pause after a failed attempt ends at {until}")
                } else {
                    format!("it is not to run before {until}")
                },
            )
        },
        Reason::Dependency { left } => {
            plain("dependency", format!("{left} invocations that it depends on have not ended as it wants"))
        }
        Reason::Paused { what } => plain("paused", format!("paused: {what}")),
        Reason::Inactive => plain("task-inactive", "its task is not active".to_owned()),
        Reason::Cap(cap) => wire::WhyReason {
            of: Some(cap.of.to_owned()),
            limit: Some(cap.limit),
            current: Some(cap.running),
            ..plain("cap", format!("{} of its {} run, and {} may", cap.running, cap.of, cap.limit))
        },
        Reason::Quota(held) => wire::WhyReason {
            of: Some(held.of.to_owned()),
            until: Some(held.until),
            ..plain(
                "quota",
                format!("the quota {} of its {} is used up until {}", held.quota, held.of, held.until),
            )
        },
        Reason::Memory { limit, used } => wire::WhyReason {
            of: Some("tenant".to_owned()),
            limit: Some(*limit),
            current: Some(*used),
            ..plain(
                "memory-quota",
                format!(
                    "attempts of its tenant that run declare {used} bytes of memory, and {limit} may be declared"
                ),
            )
        },
        Reason::NoWorker { idle: 0 } => plain("no-worker", "no worker runs".to_owned()),
        Reason::NoWorker { idle } => {
            plain("no-worker", format!("{idle} workers run, and each is cordoned or draining"))
        }
        Reason::Queue { ahead, is_bound } => wire::WhyReason {
            ahead: Some(*ahead),
            ..plain(
                "queue",
                format!(
                    "{}{ahead} invocations of this tenant have a higher priority or are older",
                    if *is_bound { "at least " } else { "" }
                ),
            )
        },
        Reason::Share { share, slots } => wire::WhyReason {
            share: Some(*share),
            ..plain(
                "weight-share",
                format!(
                    "all {slots} slots are taken; {:.1} % of those that come free are this tenant's",
                    share * 100.0
                ),
            )
        },
        Reason::NoMemory => {
            plain("no-memory", "slots are free, but the memory of every worker is taken".to_owned())
        }
        Reason::Next => plain("next", "nothing is in the way: the next claim takes it".to_owned()),
    }
}

fn why(id: InvocationId, facts: &Facts, now: DateTime<Utc>) -> wire::Why {
    let (reasons, estimate) = explain(facts, now);
    wire::Why {
        id: id.0,
        state: shape::state(facts.state),
        reasons: reasons.iter().map(reason).collect(),
        estimate: estimate.map(|estimate| wire::WhyEstimate {
            starts_in_ms: u64::try_from(estimate.starts_in.as_millis()).unwrap_or(u64::MAX),
            starts_at: now + TimeDelta::from_std(estimate.starts_in).unwrap_or_default(),
            basis: estimate.basis,
        }),
    }
}

/// Why an invocation is where it is: what it waits for, and an estimate of its start with what that is based on.
#[utoipa::path(
    get, path = "/v1/invocations/{id}/why", tag = "invocations",
    params(("id" = uuid::Uuid, Path, description = "Id of the invocation")),
    responses(
        (status = 200, description = "Reasons and estimate", body = wire::Why),
        (status = 401, description = "unauthenticated", body = problem_wire::Problem, content_type = "application/problem+json"),
        (status = 404, description = "invocation-not-found", body = problem_wire::Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn get(
    State(api): State<Api>,
    Caller(tenant): Caller,
    InvocationPath(id): InvocationPath,
) -> Result<Json<wire::Why>, Problem> {
    let facts = api.app.why(tenant, id).await?;
    Ok(Json(why(id, &facts, Utc::now())))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::domain::invocation::State as Stand;
    use crate::domain::why::Cap;
    use std::time::Duration;

    #[test]
    fn shape_of_a_why() {
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        let facts = Facts {
            state: Stand::Queued,
            due_at: None,
            spent: 0,
            cancelling: false,
            dependencies: 0,
            paused: None,
            held: None,
            no_memory: None,
            inactive: false,
            full: vec![Cap { of: "task", limit: 2, running: 2 }],
            room: None,
            ahead: 10_000,
            ahead_is_bound: true,
            workers: 2,
            claiming: 1,
            slots: 8,
            running: 8,
            share: 0.25,
            ended: 500,
            ended_within: Duration::from_secs(60),
        };
        insta::assert_json_snapshot!(why(InvocationId(uuid::Uuid::from_u128(1)), &facts, now));
    }
}
