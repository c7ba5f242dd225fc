//! `sandbar quota`: what a tenant may use, what it uses, plans, and shares of tasks and keys.

use serde_json::{Map, Value};
use uuid::Uuid;

use super::client::{Client, Request};
use super::failure::{Exit, Failure, Outcome};
use super::output::{self, BOLD, Cell, Output};
use super::target::Remote;
use super::value;
use crate::domain::names::TaskName;
use crate::domain::quota::{Amount, Quota as Name};
use crate::wire::key::Key;
use crate::wire::quota::{Plans, Quotas, TaskQuotas};

/// What takes a quota back to what is inherited.
const DEFAULT: &str = "default";

/// Show and change what a tenant may use
#[derive(Debug, clap::Args)]
pub struct Quota {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    remote: Remote,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Show what a tenant may use, and what it uses
    Show {
        /// Another tenant than your own, by name or id (operators of the platform)
        #[arg(long, value_name = "TENANT", conflicts_with = "task")]
        tenant: Option<String>,
        /// The shares of a task
        #[arg(long, value_name = "TASK", value_parser = value::task_name)]
        task: Option<TaskName>,
        /// The limits of a key, and what is used of them
        #[arg(long, value_name = "ID", conflicts_with_all = ["tenant", "task"])]
        key: Option<Uuid>,
        #[command(flatten)]
        remote: Remote,
    },
    /// Change quotas of a tenant (operators of the platform) or give a task or a key shares of your tenant's
    Set {
        /// Quotas, like invocations_per_day=10000; `default` inherits again, `unlimited` lifts the bound
        #[arg(value_name = "QUOTA=AMOUNT", value_parser = assignment)]
        quotas: Vec<(Name, Option<Amount>)>,
        /// The tenant, by name or id
        #[arg(long, value_name = "TENANT", conflicts_with = "task")]
        tenant: Option<String>,
        /// The task
        #[arg(long, value_name = "TASK", value_parser = value::task_name)]
        task: Option<TaskName>,
        /// The key
        #[arg(long, value_name = "ID", conflicts_with_all = ["tenant", "task"])]
        key: Option<Uuid>,
        /// The tenant's plan; `none` for none
        #[arg(long, value_name = "PLAN", requires = "tenant")]
        plan: Option<String>,
        #[command(flatten)]
        remote: Remote,
    },
    /// List the plans of the platform
    Plans {
        #[command(flatten)]
        remote: Remote,
    },
    /// Make a plan, or let one say exactly this (operators of the platform)
    Plan {
        /// Its name
        #[arg(value_name = "PLAN", value_parser = value::task_name)]
        name: TaskName,
        /// Quotas, like invocations_per_day=10000 or modules=unlimited
        #[arg(value_name = "QUOTA=AMOUNT", value_parser = assignment)]
        quotas: Vec<(Name, Option<Amount>)>,
        #[command(flatten)]
        remote: Remote,
    },
}

/// `QUOTA=AMOUNT`.
pub fn assignment(text: &str) -> Result<(Name, Option<Amount>), String> {
    let (name, amount) = text.split_once('=').ok_or("write QUOTA=AMOUNT")?;
    let name = name.parse::<Name>().map_err(|error| {
        let known: Vec<&str> = Name::ALL.iter().map(|quota| quota.as_str()).collect();
        format!("{error}; there are {}", known.join(", "))
    })?;
    if amount == DEFAULT {
        return Ok((name, None));
    }
    let bytes = name.as_str().contains("bytes").then(|| value::size(amount).ok()).flatten();
    let amount = match bytes {
        Some(bytes) => Amount::At(bytes),
        None => amount.replace('_', "").parse()?,
    };
    Ok((name, Some(amount)))
}

impl Quota {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote().json
    }

    fn remote(&self) -> &Remote {
        match &self.what {
            None => &self.remote,
            Some(
                What::Show { remote, .. }
                | What::Set { remote, .. }
                | What::Plans { remote }
                | What::Plan { remote, .. },
            ) => remote,
        }
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.json());
        let client = Client::new(&self.remote().connection)?;
        match self.what {
            None => show(output, &client, Request::get("/v1/quotas")).await,
            Some(What::Show { tenant: None, task: None, key: None, .. }) => {
                show(output, &client, Request::get("/v1/quotas")).await
            }
            Some(What::Show { tenant: Some(tenant), .. }) => {
                show(output, &client, Request::get(of_tenant(&tenant))).await
            }
            Some(What::Show { task: Some(task), .. }) => {
                show_task(output, &client, Request::get(of_task(&task))).await
            }
            Some(What::Show { key: Some(key), .. }) => {
                show_key(output, &client, Request::get(of_key(key))).await
            }
            Some(What::Set { quotas, tenant, task, key, plan, .. }) => {
                if quotas.is_empty() && plan.is_none() {
                    return Err(Failure::usage("nothing to change is named")
                        .hint("for example: sandbar quota set --tenant acme invocations_per_day=10000"));
                }
                let mut patch = Map::new();
                patch.insert("quotas".to_owned(), body(&quotas));
                if let Some(plan) = plan {
                    let plan = if plan == "none" { Value::Null } else { plan.into() };
                    patch.insert("plan".to_owned(), plan);
                }
                match (tenant, task, key) {
                    (Some(tenant), ..) => {
                        show(output, &client, Request::patch(of_tenant(&tenant)).json(&patch)?).await
                    }
                    (None, Some(task), _) => {
                        show_task(output, &client, Request::patch(of_task(&task)).json(&patch)?).await
                    }
                    (None, None, Some(key)) => {
                        show_key(output, &client, Request::patch(of_key(key)).json(&patch)?).await
                    }
                    (None, None, None) => {
                        Err(Failure::usage("name whose quotas: --tenant TENANT, --task TASK or --key ID"))
                    }
                }
            }
            Some(What::Plans { .. }) => plans(output, &client).await,
            Some(What::Plan { name, quotas, .. }) => {
                let said: Vec<_> = quotas.into_iter().filter(|(_, amount)| amount.is_some()).collect();
                let plan = serde_json::json!({ "quotas": body(&said) });
                let request = Request::put(format!("/v1/plans/{name}")).json(&plan)?;
                client.send(request).await?;
                if output.json {
                    output.document(&serde_json::json!({ "plan": name }))?;
                } else {
                    output.line(format!("plan {name} says so"))?;
                }
                Ok(Exit::Done)
            }
        }
    }
}

fn of_tenant(name: &str) -> String {
    format!("/v1/tenants/{}/quotas", super::client::escape(name))
}

fn of_key(id: Uuid) -> String {
    format!("/v1/keys/{id}")
}

fn of_task(name: &TaskName) -> String {
    format!("/v1/tasks/{name}/quotas")
}

/// As the API takes them.
pub fn body(quotas: &[(Name, Option<Amount>)]) -> Value {
    let pairs = quotas.iter().map(|(name, amount)| {
        let value = serde_json::to_value(amount).unwrap_or_default();
        (name.as_str().to_owned(), value)
    });
    Value::Object(pairs.collect())
}

fn text(name: &str, amount: Amount) -> String {
    match amount {
        Amount::At(n) if name.contains("bytes") => output::bytes(n),
        Amount::At(n) => output::count(n),
        Amount::Unlimited => amount.to_string(),
    }
}

async fn show(output: Output, client: &Client, request: Request) -> Outcome {
    let answer = client.send(request).await?;
    if output.json {
        output.line(answer.text())?;
        return Ok(Exit::Done);
    }
    let quotas: Quotas = answer.json()?;
    if let Some(plan) = &quotas.plan {
        output.line(format!("plan {}", output.paint(BOLD, output::printable(plan))))?;
    }
    let mut rows = vec![output::head(&["QUOTA", "LIMIT", "USED", "FROM", "WHEN HIT", "RESETS"])];
    rows.extend(quotas.quotas.iter().map(|quota| {
        let used = quota.used.map_or_else(|| "-".to_owned(), |used| text(&quota.name, Amount::At(used)));
        let resets = quota.resets_at.map_or_else(|| "-".to_owned(), output::moment);
        vec![
            Cell::styled(&quota.name, BOLD),
            text(&quota.name, quota.limit).into(),
            used.into(),
            quota.source.clone().into(),
            quota.effect.clone().into(),
            resets.into(),
        ]
    }));
    for line in output::table(output, &rows) {
        output.line(line)?;
    }
    Ok(Exit::Done)
}

async fn show_task(output: Output, client: &Client, request: Request) -> Outcome {
    let answer = client.send(request).await?;
    if output.json {
        output.line(answer.text())?;
        return Ok(Exit::Done);
    }
    let shares: TaskQuotas = answer.json()?;
    let mut rows = vec![output::head(&["QUOTA", "SHARE"])];
    let shared = shares.quotas.iter().filter_map(|(name, amount)| Some((name, (*amount)?)));
    rows.extend(shared.map(|(name, amount)| vec![Cell::styled(name, BOLD), text(name, amount).into()]));
    if rows.len() == 1 {
        output.note("it has no shares of its own: its tenant's quotas hold");
        return Ok(Exit::Done);
    }
    for line in output::table(output, &rows) {
        output.line(line)?;
    }
    Ok(Exit::Done)
}

async fn show_key(output: Output, client: &Client, request: Request) -> Outcome {
    let answer = client.send(request).await?;
    if output.json {
        output.line(answer.text())?;
        return Ok(Exit::Done);
    }
    let key: Key = answer.json()?;
    if key.quotas.is_empty() {
        output.note("it has no limits of its own: its tenant's quotas hold");
        return Ok(Exit::Done);
    }
    let mut rows = vec![output::head(&["QUOTA", "LIMIT", "USED", "RESETS"])];
    rows.extend(key.quotas.iter().map(|quota| {
        let resets = quota.resets_at.map_or_else(|| "-".to_owned(), output::moment);
        vec![
            Cell::styled(output::printable(&quota.name), BOLD),
            text(&quota.name, quota.limit).into(),
            output::count(quota.used).into(),
            resets.into(),
        ]
    }));
    for line in output::table(output, &rows) {
        output.line(line)?;
    }
    Ok(Exit::Done)
}

async fn plans(output: Output, client: &Client) -> Outcome {
    let answer = client.send(Request::get("/v1/plans")).await?;
    let plans: Plans = answer.json()?;
    if output.json {
        for plan in &plans.items {
            output.document(plan)?;
        }
        return Ok(Exit::Done);
    }
    let mut rows = vec![output::head(&["PLAN", "QUOTAS"])];
    rows.extend(plans.items.iter().map(|plan| {
        let quotas: Vec<String> =
            plan.quotas.iter().map(|(name, amount)| format!("{name}={}", text(name, *amount))).collect();
        vec![Cell::styled(&plan.name, BOLD), quotas.join(" ").into()]
    }));
    for line in output::table(output, &rows) {
        output.line(line)?;
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn a_quota_is_named_with_a_number_a_size_unlimited_or_default() {
        assert_eq!(assignment("modules=5"), Ok((Name::Modules, Some(Amount::At(5)))));
        assert_eq!(
            assignment("invocations_per_day=10_000"),
            Ok((Name::InvocationsPerDay, Some(Amount::At(10_000))))
        );
        assert_eq!(assignment("module_bytes=1GiB"), Ok((Name::ModuleBytes, Some(Amount::At(1 << 30)))));
        assert_eq!(assignment("weight=default"), Ok((Name::Weight, None)));
        assert_eq!(assignment("modules=unlimited"), Ok((Name::Modules, Some(Amount::Unlimited))));
        for bad in ["modules", "modules=", "modules=-1", "many=1", "modules=lots"] {
            assert!(assignment(bad).is_err(), "{bad}");
        }
        let change = body(&[(Name::Modules, None), (Name::Weight, Some(Amount::At(7)))]);
        assert_eq!(change, serde_json::json!({"modules": null, "weight": 7}));
    }
}
