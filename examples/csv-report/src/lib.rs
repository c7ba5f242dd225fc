//! A table in, a report out: what each column holds, and the totals of one column by the values of
//! another. Reads the table once, row by row.

use std::collections::{BTreeMap, HashSet};

use csv::{ReaderBuilder, StringRecord};
use sandbar_guest::{Context, Schema, TaskError, log, task};
use serde::{Deserialize, Serialize};

/// Columns of a table at most; each keeps a set of its values.
const MAX_COLUMNS: usize = 200;
/// Values of a column that are told apart; beyond them `distinct` is absent.
const MAX_DISTINCT: usize = 10_000;
/// Groups of a report at most.
const MAX_GROUPS: usize = 10_000;
/// Rows between two reports of progress.
const PROGRESS_ROWS: u64 = 10_000;

/// A table, and by what to group it.
#[derive(Deserialize, Schema)]
#[serde(deny_unknown_fields)]
struct Input {
    /// The table as CSV (RFC 4180), with the names of its columns in the first row.
    csv: String,
    /// What is between two fields, one ASCII character; a comma if absent.
    delimiter: Option<String>,
    /// Totals of one column by the values of another.
    group: Option<Grouping>,
}

/// Totals of one column by the values of another.
#[derive(Deserialize, Schema)]
#[serde(deny_unknown_fields)]
struct Grouping {
    /// The column whose values make the groups.
    by: String,
    /// The column of numbers that is summed.
    sum: String,
}

/// What the table holds.
#[derive(Serialize, Schema, Debug)]
struct Report {
    /// Rows, the header not counted.
    rows: u64,
    /// The columns, in their order.
    columns: Vec<Column>,
    /// The groups by their names, if asked for.
    groups: BTreeMap<String, Group>,
}

/// What a column holds.
#[derive(Serialize, Schema, Debug)]
struct Column {
    /// Its name.
    name: String,
    /// The narrowest kind that all its values are of.
    kind: Kind,
    /// Fields with nothing in them.
    empty: u64,
    /// Different values, empty ones not counted; absent if there are more than 10,000.
    distinct: Option<u64>,
    /// The numbers in it, if it has only numbers.
    numbers: Option<Numbers>,
}

/// What all values of a column are.
#[derive(Serialize, Schema, Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
enum Kind {
    /// There are no values.
    Empty,
    /// Whole numbers of at most 64 bits.
    Integer,
    /// Numbers.
    Number,
    /// Anything else.
    Text,
}

/// A column of numbers.
#[derive(Serialize, Schema, Debug)]
struct Numbers {
    /// The least.
    min: f64,
    /// The greatest.
    max: f64,
    /// Their sum.
    sum: f64,
    /// Their mean.
    mean: f64,
}

/// A group of rows.
#[derive(Serialize, Schema, Debug, Default)]
struct Group {
    /// Its rows.
    rows: u64,
    /// The sum over them.
    sum: f64,
}

/// Reports what the columns of a CSV hold, and sums one of them by the values of another.
#[task(limits(memory = "256MiB", timeout = "60s", output = "4MiB"), retry(max_attempts = 1))]
fn csv_report(ctx: &Context, input: Input) -> Result<Report, TaskError> {
    let delimiter = match input.delimiter.as_deref().map(str::as_bytes) {
        None => b',',
        Some([byte]) => *byte,
        Some(_) => return Err(TaskError::fatal("the delimiter is one ASCII character")),
    };
    let mut reader = ReaderBuilder::new().delimiter(delimiter).from_reader(input.csv.as_bytes());
    // What is wrong with a table stays wrong: fatal, where `?` alone would have it tried again.
    let header = reader.headers().map_err(TaskError::fatal)?.clone();
    if header.len() > MAX_COLUMNS {
        return Err(TaskError::fatal(format!("{} columns are more than {MAX_COLUMNS}", header.len())));
    }
    let place = |name: &str| {
        header
            .iter()
            .position(|column| column == name)
            .ok_or_else(|| TaskError::fatal(format!("there is no column {name:?}")))
    };
    let grouping = match &input.group {
        Some(group) => Some((place(&group.by)?, place(&group.sum)?)),
        None => None,
    };

    let mut columns: Vec<Tally> = header.iter().map(|_| Tally::default()).collect();
    let mut groups: BTreeMap<String, (u64, Sum)> = BTreeMap::new();
    let (mut rows, mut row) = (0, StringRecord::new());
    while reader.read_record(&mut row).map_err(TaskError::fatal)? {
        rows += 1;
        for (tally, value) in columns.iter_mut().zip(&row) {
            tally.add(value);
        }
        if let Some((by, sum)) = grouping {
            let (name, value) = (&row[by], &row[sum]);
            let value = if value.is_empty() { 0.0 } else { number(value, rows)? };
            if !groups.contains_key(name) {
                if groups.len() == MAX_GROUPS {
                    return Err(TaskError::fatal(format!("more than {MAX_GROUPS} groups")));
                }
                groups.insert(name.to_owned(), Default::default());
            }
            if let Some(group) = groups.get_mut(name) {
                group.0 += 1;
                group.1.add(value);
            }
        }
        if rows % PROGRESS_ROWS == 0 {
            ctx.progress(reader.position().byte(), input.csv.len() as u64, format!("{rows} rows"));
        }
    }
    log::info!(rows, columns = columns.len(), groups = groups.len(); "read {} bytes", input.csv.len());
    Ok(Report {
        rows,
        columns: header.iter().zip(columns).map(|(name, tally)| tally.column(name)).collect(),
        groups: groups
            .into_iter()
            .map(|(name, (rows, sum))| (name, Group { rows, sum: sum.total() }))
            .collect(),
    })
}

fn number(value: &str, row: u64) -> Result<f64, TaskError> {
    value.parse().map_err(|_| TaskError::fatal(format!("row {row}: {value:?} is not a number")))
}

/// A column while it is read.
#[derive(Default)]
struct Tally {
    empty: u64,
    values: u64,
    text: bool,
    fractions: bool,
    distinct: HashSet<String>,
    many: bool,
    min: Option<f64>,
    max: Option<f64>,
    sum: Sum,
}

impl Tally {
    fn add(&mut self, value: &str) {
        if value.is_empty() {
            self.empty += 1;
            return;
        }
        self.values += 1;
        if !self.many && !self.distinct.contains(value) {
            if self.distinct.len() == MAX_DISTINCT {
                self.many = true;
                self.distinct = HashSet::new();
            } else {
                self.distinct.insert(value.to_owned());
            }
        }
        if self.text {
            return;
        }
        self.fractions |= value.parse::<i64>().is_err();
        // `nan` and `inf` are words in a table.
        match value.parse::<f64>().ok().filter(|number| number.is_finite()) {
            Some(number) => {
                self.min = Some(self.min.map_or(number, |least| least.min(number)));
                self.max = Some(self.max.map_or(number, |most| most.max(number)));
                self.sum.add(number);
            }
            None => self.text = true,
        }
    }

    fn column(self, name: &str) -> Column {
        let kind = match (self.values, self.text, self.fractions) {
            (0, ..) => Kind::Empty,
            (_, true, _) => Kind::Text,
            (_, false, true) => Kind::Number,
            (_, false, false) => Kind::Integer,
        };
        let numbers = match (kind, self.min, self.max) {
            (Kind::Integer | Kind::Number, Some(min), Some(max)) => {
                let sum = self.sum.total();
                Some(Numbers { min, max, sum, mean: sum / self.values as f64 })
            }
            _ => None,
        };
        let distinct = (!self.many).then_some(self.distinct.len() as u64);
        Column { name: name.to_owned(), kind, empty: self.empty, distinct, numbers }
    }
}

/// A sum that carries what rounding took from it (Neumaier): the order of a million rows must not show
/// in the cents.
#[derive(Default, Clone, Copy)]
struct Sum {
    sum: f64,
    lost: f64,
}

impl Sum {
    fn add(&mut self, value: f64) {
        let next = self.sum + value;
        self.lost +=
            if self.sum.abs() >= value.abs() { (self.sum - next) + value } else { (value - next) + self.sum };
        self.sum = next;
    }

    fn total(self) -> f64 {
        self.sum + self.lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(csv: &str, group: Option<(&str, &str)>) -> Result<Report, TaskError> {
        let group = group.map(|(by, sum)| Grouping { by: by.to_owned(), sum: sum.to_owned() });
        csv_report(&Context::test().build(), Input { csv: csv.to_owned(), delimiter: None, group })
    }

    #[test]
    fn kinds_are_the_narrowest_that_fit_and_empty_fields_do_not_matter() {
        let report = report("a,b,c,d\n1,1.5,x,\n,2,3,\n-2,nan,\"4,5\",\n", None).unwrap();
        let kinds: Vec<Kind> = report.columns.iter().map(|column| column.kind).collect();
        assert_eq!(kinds, [Kind::Integer, Kind::Text, Kind::Text, Kind::Empty]);
        let a = &report.columns[0];
        let numbers = a.numbers.as_ref().unwrap();
        assert_eq!(
            (a.empty, a.distinct, numbers.min, numbers.max, numbers.mean),
            (1, Some(2), -2.0, 1.0, -0.5)
        );
    }

    #[test]
    fn groups_are_summed_to_the_cent() {
        let rows: String = (0..100_000).map(|n| format!("{},0.1\n", ["x", "y"][n % 2])).collect();
        let report = report(&format!("g,v\n{rows}"), Some(("g", "v"))).unwrap();
        assert_eq!((report.groups["x"].rows, report.groups["x"].sum), (50_000, 5_000.0));
    }

    #[test]
    fn a_ragged_row_a_missing_column_and_a_word_among_numbers_are_fatal_and_say_where() {
        for (csv, group, says) in [
            ("a,b\n1,2\n3\n", None, "line: 3"),
            ("a,b\n1,2\n", Some(("z", "b")), "\"z\""),
            ("a,b\n1,2\n1,two\n", Some(("a", "b")), "row 2: \"two\""),
        ] {
            let error = report(csv, group).unwrap_err();
            assert!(!error.is_retryable() && error.message().contains(says), "{error:?}");
        }
    }
}
