use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// What a workload has measured.
pub(crate) struct Measured {
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// What it is measured by, in the same unit: the database's own figure, unless the note says otherwise.
    pub(crate) raw: Option<f64>,
    pub(crate) note: String,
}

/// What was measured, shown as it comes.
pub(crate) struct Figures {
    json: bool,
    storage: &'static str,
    /// What makes it durable.
    durability: String,
    processors: usize,
    rows: Vec<Figure>,
}

#[derive(Serialize)]
struct Figure {
    workload: &'static str,
    storage: &'static str,
    system: &'static str,
    value: f64,
    unit: &'static str,
    raw: Option<f64>,
    ratio: Option<f64>,
    note: String,
    durability: String,
    processors: usize,
}

impl Figures {
    pub(crate) fn new(json: bool, storage: &'static str, durability: String) -> Self {
        let processors = std::thread::available_parallelism().map_or(0, usize::from);
        Self { json, storage, durability, processors, rows: Vec::new() }
    }

    pub(crate) fn add(&mut self, workload: &'static str, measured: Measured) {
        let Measured { value, unit, raw, note } = measured;
        let ratio = raw.map(|raw| value / raw);
        let (storage, durability, processors) = (self.storage, self.durability.clone(), self.processors);
        let figure =
            Figure { workload, storage, system: "durable", value, unit, raw, ratio, note, durability, processors };
        if self.json {
            println!("{}", serde_json::to_string(&figure).unwrap_or_default());
        }
        self.rows.push(figure);
    }

    pub(crate) fn end(&self) {
        if self.json {
            return;
        }
        println!("{}; {} processors\n", self.durability, self.processors);
        let raw = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), number);
        println!(
            "{:<12} {:<8} {:>12} {:>12} {:>7}  {:<14} note",
            "workload", "storage", "durable", "raw", "ratio", "unit"
        );
        for row in &self.rows {
            let ratio = row.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"));
            println!(
                "{:<12} {:<8} {:>12} {:>12} {:>7}  {:<14} {}",
                row.workload,
                row.storage,
                number(row.value),
                raw(row.raw),
                ratio,
                row.unit,
                row.note
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

pub(crate) fn bar(what: &str, length: usize) -> ProgressBar {
    let bar = ProgressBar::new(length as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg:>24} {wide_bar} {pos}/{len}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_owned());
    bar
}

/// The middle one.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The value below which this share of them is.
pub(crate) fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let at = ((values.len() as f64 - 1.0) * share).round() as usize;
    values.get(at).copied().unwrap_or(f64::NAN)
}
