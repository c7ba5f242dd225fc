//! `sandbar usage`: the bill.

use chrono::{DateTime, Utc};

use super::client::{Client, Request, with_query};
use super::failure::{Exit, Outcome};
use super::output::{self, BOLD, Cell, Output};
use super::target::Remote;
use crate::wire::usage::Usage as Bill;

/// Pages of one command, which is more than a year by hours of a hundred tasks.
const MAX_PAGES: usize = 200;

/// Show what your tenant's attempts cost
#[derive(Debug, clap::Args)]
pub struct Usage {
    /// Begin, like 2026-01-01T00:00:00Z [default: 30 days before the end]
    #[arg(long, value_name = "TIME")]
    from: Option<DateTime<Utc>>,
    /// End, not included [default: now]
    #[arg(long, value_name = "TIME")]
    to: Option<DateTime<Utc>>,
    /// By hour, day, task, or both
    #[arg(long, value_name = "GROUP", default_value = "day",
          value_parser = ["none", "hour", "day", "task", "hour,task", "day,task"])]
    group: String,
    /// Print CSV
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    #[command(flatten)]
    remote: Remote,
}

impl Usage {
    /// Whether it answers in JSON.
    pub fn json(&self) -> bool {
        self.remote.json
    }

    /// Does it.
    pub async fn run(self) -> Outcome {
        let output = Output::new(self.remote.json);
        let client = Client::new(&self.remote.connection)?;
        let mut pairs = vec![("group", self.group.clone())];
        for (name, time) in [("from", self.from), ("to", self.to)] {
            pairs.extend(time.map(|time| (name, time.to_rfc3339())));
        }
        let mut path = with_query("/v1/usage", &pairs);
        let mut rows = vec![output::head(&[
            "AT", "TASK", "ATTEMPTS", "OK", "FUEL", "CPU", "IN", "OUT", "LOGS", "EGRESS",
        ])];
        for page in 0..MAX_PAGES {
            let mut request = Request::get(path.clone());
            if self.csv {
                request = request.header("accept", "text/csv")?;
            }
            let answer = client.send(request).await?;
            let next = if self.csv {
                let link = answer.header("link").map(str::to_owned);
                // The names of the columns once.
                let text = String::from_utf8_lossy(&answer.body).into_owned();
                let lines = text.split_inclusive('\n').skip(usize::from(page > 0));
                output.bytes(lines.collect::<String>().as_bytes())?;
                link.and_then(|link| Some(link.strip_prefix('<')?.split_once('>')?.0.to_owned()))
            } else {
                let bill: Bill = answer.json()?;
                for row in &bill.items {
                    if output.json {
                        output.document(row)?;
                        continue;
                    }
                    rows.push(vec![
                        row.at.map_or_else(|| "-".to_owned(), output::moment).into(),
                        Cell::styled(row.task.as_deref().unwrap_or("-"), BOLD),
                        output::count(row.attempts).into(),
                        output::count(row.succeeded).into(),
                        output::count(row.fuel).into(),
                        output::nanoseconds(row.cpu_ns).into(),
                        output::bytes(row.input_bytes).into(),
                        output::bytes(row.output_bytes).into(),
                        output::bytes(row.log_bytes).into(),
                        output::bytes(row.egress_bytes).into(),
                    ]);
                }
                bill.next
            };
            match next {
                Some(next) => path = next,
                None => break,
            }
        }
        if !self.csv && !output.json {
            if rows.len() == 1 {
                output.note("nothing was used in this time");
                return Ok(Exit::Done);
            }
            for line in output::table(output, &rows) {
                output.line(line)?;
            }
        }
        Ok(Exit::Done)
    }
}
