//! `sandbar budget`: how much a tenant or a task means to use. `sandbar events`: what became of it, and whatever else a
//! tenant is told.

use serde_json::Value;

use super::client::{Client, Request, escape};
use super::failure::{Exit, Failure, Outcome};
use super::list::{Pages, parse};
use super::output::{self, BOLD, Cell, Output, printable};
use super::target::Remote;
use crate::wire::spending::{Budget as Shown, BudgetPeriod, BudgetRequest, Budgets, Event, Measure};

/// List, set and delete budgets: thresholds of usage that become events, and stop nothing
#[derive(Debug, clap::Args)]
pub struct Budget {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// List the budgets, and what is used of each
    List {
        #[command(flatten)]
        remote: Remote,
    },
    /// Set a budget, new or changed
    Set {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// What is counted
        #[arg(long, value_parser = ["fuel", "cpu_s", "attempts"])]
        measure: String,
        /// How much
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..))]
        amount: i64,
        /// Over which time, in UTC
        #[arg(long, value_parser = ["day", "month"], default_value = "month")]
        period: String,
        /// Of this task [default: all of the tenant's]
        #[arg(long, value_name = "TASK")]
        task: Option<String>,
        /// Percentage that becomes an event; may come again [default: 50, 80, 100]
        #[arg(long, value_name = "PERCENT")]
        threshold: Vec<i16>,
        #[command(flatten)]
        remote: Remote,
    },
    /// Delete a budget; its events stay
    Delete {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        #[command(flatten)]
        remote: Remote,
    },
}

impl Budget {
    fn remote(&self) -> &Remote {
        let (What::List { remote } | What::Set { remote, .. } | What::Delete { remote, .. }) = &self.what;
        remote
    }

    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote().json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.json());
        let client = Client::new(&self.remote().connection)?;
        match self.what {
            What::List { .. } => {
                let budgets: Budgets = client.fetch(Request::get("/v1/budgets")).await?;
                if output.json {
                    for budget in &budgets.items {
                        output.document(budget)?;
                    }
                } else if budgets.items.is_empty() {
                    output.note(
                        "no budgets yet; set one: sandbar budget set NAME --measure cpu_s --amount 3600",
                    );
                } else {
                    table(output, &budgets.items)?;
                }
            }
            What::Set { name, measure, amount, period, task, threshold, .. } => {
                let request = BudgetRequest {
                    task,
                    measure: match measure.as_str() {
                        "fuel" => Measure::Fuel,
                        "cpu_s" => Measure::CpuS,
                        _ => Measure::Attempts,
                    },
                    period: if period == "day" { BudgetPeriod::Day } else { BudgetPeriod::Month },
                    amount,
                    thresholds: (!threshold.is_empty()).then_some(threshold),
                };
                let path = format!("/v1/budgets/{}", escape(&name));
                let answer = client.send(Request::put(path).json(&request)?).await?;
                if output.json {
                    output.line(answer.text())?;
                } else {
                    table(output, &[answer.json::<Shown>()?])?;
                }
            }
            What::Delete { name, .. } => {
                client.send(Request::delete(format!("/v1/budgets/{}", escape(&name)))).await?;
                if output.json {
                    output.document(&serde_json::json!({ "deleted": name }))?;
                } else {
                    output.line(format!("{} is deleted", printable(&name)))?;
                }
            }
        }
        Ok(Exit::Done)
    }
}

fn table(output: Output, budgets: &[Shown]) -> Result<(), Failure> {
    let mut rows =
        vec![output::head(&["BUDGET", "TASK", "USED", "OF", "MEASURE", "PERIOD", "EVENTS AT", "ENDS"])];
    rows.extend(budgets.iter().map(|budget| {
        // For people: a percent more or less does not matter.
        #[allow(clippy::cast_precision_loss)]
        let share = budget.used as f64 / budget.amount.max(1) as f64 * 100.0;
        let at: Vec<String> = budget.thresholds.iter().map(|percent| format!("{percent}%")).collect();
        vec![
            Cell::styled(printable(&budget.name), BOLD),
            budget.task.as_deref().map_or_else(|| "all".to_owned(), printable).into(),
            format!("{} ({share:.0}%)", budget.used).into(),
            budget.amount.to_string().into(),
            match budget.measure {
                Measure::Fuel => "fuel",
                Measure::CpuS => "CPU seconds",
                Measure::Attempts => "attempts",
            }
            .into(),
            match budget.period {
                BudgetPeriod::Day => "day",
                BudgetPeriod::Month => "month",
            }
            .into(),
            at.join(", ").into(),
            output::moment(budget.ends_at).into(),
        ]
    }));
    for line in output::table(output, &rows) {
        output.line(line)?;
    }
    Ok(())
}

/// Show what happened to your tenant, newest first: thresholds of budgets that were reached
#[derive(Debug, clap::Args)]
pub struct Events {
    #[command(flatten)]
    pages: Pages,
    #[command(flatten)]
    remote: Remote,
}

impl Events {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote.json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.json());
        let client = Client::new(&self.remote.connection)?;
        let mut first = true;
        let show = |items: Vec<Box<serde_json::value::RawValue>>| {
            if output.json {
                for item in &items {
                    output.line(item.get())?;
                }
                return Ok(());
            }
            let events: Vec<Event> = parse(&items)?;
            let mut rows = vec![output::head(&["WHEN", "WHAT", "DETAILS"])];
            rows.extend(events.iter().map(|e| {
                vec![output::moment(e.at).into(), printable(&e.kind).into(), details(&e.data).into()]
            }));
            for line in output::table(output, &rows).into_iter().skip(usize::from(!first)) {
                output.line(line)?;
            }
            first = false;
            Ok(())
        };
        self.pages.walk(&client, output, "/v1/events", &[], show).await?;
        Ok(Exit::Done)
    }
}

fn details(data: &Value) -> String {
    let text = |name: &str| match &data[name] {
        Value::String(text) => printable(text),
        other => other.to_string(),
    };
    format!(
        "{} at {}%: {} of {} {}",
        text("budget"),
        text("threshold"),
        text("used"),
        text("amount"),
        text("measure")
    )
}
