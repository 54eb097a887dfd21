//! What was measured, and how it is shown.

use futures_util::{Stream, StreamExt};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::pin::pin;

use crate::Error;
use crate::counts::Each;

/// What a workload has measured.
pub struct Measured {
    /// The figure.
    pub value: f64,
    /// What it is in.
    pub unit: &'static str,
    /// What it is measured by, in the same unit: the database's own figure, unless the note says otherwise.
    pub raw: Option<f64>,
    /// What was done, and what `raw` is.
    pub note: String,
    /// What a step cost the database.
    pub each: Each,
}

/// Who was measured, and on what.
#[derive(Clone, Serialize)]
pub struct System {
    /// Name and version.
    pub system: String,
    /// `sqlite` or `postgres`.
    pub storage: &'static str,
    /// Name and version.
    pub database: String,
    /// What makes it durable.
    pub durability: String,
}

impl System {
    /// On a database that says so about itself.
    pub fn new(system: String, storage: &'static str, settings: &str) -> Self {
        let (database, durability) = settings.split_once(", ").unwrap_or((settings, ""));
        Self { system, storage, database: database.to_owned(), durability: durability.to_owned() }
    }

    /// This library.
    pub fn durable(storage: &'static str, settings: &str) -> Self {
        Self::new(format!("durable {}", env!("CARGO_PKG_VERSION")), storage, settings)
    }
}

/// What was measured, shown as it comes.
pub struct Figures {
    json: bool,
    processors: usize,
    rows: Vec<Figure>,
}

#[derive(Serialize)]
struct Figure {
    workload: &'static str,
    #[serde(flatten)]
    system: System,
    value: f64,
    unit: &'static str,
    raw: Option<f64>,
    ratio: Option<f64>,
    rows: Option<f64>,
    statements: Option<f64>,
    commits: Option<f64>,
    /// Of the program, in microseconds a step.
    processor: Option<f64>,
    /// How many at once, or how many altogether, where figures are a curve over that.
    size: Option<usize>,
    note: String,
    processors: usize,
}

impl Figures {
    /// None yet; as lines of JSON or as a table.
    pub fn new(json: bool) -> Self {
        let processors = std::thread::available_parallelism().map_or(0, usize::from);
        Self { json, processors, rows: Vec::new() }
    }

    /// One more.
    pub fn add(&mut self, workload: &'static str, system: System, measured: Measured) {
        self.add_at(None, workload, system, measured);
    }

    /// One more, of a curve.
    pub fn add_at(&mut self, size: Option<usize>, workload: &'static str, system: System, measured: Measured) {
        let Measured { value, unit, raw, note, each } = measured;
        let Each { rows, statements, commits, processor } = each;
        let (ratio, processors) = (raw.map(|raw| value / raw), self.processors);
        let figure = Figure {
            workload,
            system,
            value,
            unit,
            raw,
            ratio,
            rows,
            statements,
            commits,
            processor,
            size,
            note,
            processors,
        };
        if self.json {
            println!("{}", serde_json::to_string(&figure).unwrap_or_default());
        }
        self.rows.push(figure);
    }

    /// The table.
    pub fn end(&self) {
        if self.json {
            return;
        }
        let on = |row: &Figure| format!("{}: {}, {}", row.system.system, row.system.database, row.system.durability);
        let mut all: Vec<String> = self.rows.iter().map(on).collect();
        all.sort();
        all.dedup();
        println!("{}\n{} processors\n", all.join("\n"), self.processors);
        let optional = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
        let width = self.rows.iter().map(|row| row.system.system.len()).max().unwrap_or_default().max(6);
        println!(
            "{:<12} {:<8} {:<width$} {:>12} {:>12} {:>7}  {:<14} note",
            "workload", "storage", "system", "value", "raw", "ratio", "unit"
        );
        for row in &self.rows {
            let Figure { rows, statements, commits, processor, .. } = *row;
            println!(
                "{:<12} {:<8} {:<width$} {:>12} {:>12} {:>7}  {:<14} {}{}",
                row.workload,
                row.system.storage,
                row.system.system,
                number(row.value),
                optional(row.raw),
                row.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}")),
                row.unit,
                row.note,
                Each { rows, statements, commits, processor }
            );
        }
    }
}

fn number(value: f64) -> String {
    if value.abs() >= 100.0 {
        let digits = format!("{value:.0}");
        let mut text = String::new();
        for (at, digit) in digits.chars().enumerate() {
            if at > 0 && (digits.len() - at).is_multiple_of(3) {
                text.push(',');
            }
            text.push(digit);
        }
        text
    } else {
        format!("{value:.3}")
    }
}

/// A bar that shows how far it is.
pub fn bar(what: &str, length: usize) -> ProgressBar {
    let bar = ProgressBar::new(length as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg:>24} {wide_bar} {pos}/{len}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar
}

/// Awaits them all, and shows how far they are.
pub(crate) async fn all(what: &str, count: usize, calls: impl Stream<Item = Result<(), Error>>) -> Result<(), Error> {
    let (bar, mut calls) = (bar(what, count), pin!(calls));
    let mut done = 0;
    while let Some(result) = calls.next().await {
        result?;
        done += 1;
        if done % 500 == 0 {
            bar.set_position(done);
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// The middle one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The value below which this share of them is.
pub fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = ((values.len() as f64 - 1.0) * share).round() as usize;
    values.get(at).copied().unwrap_or(f64::NAN)
}
