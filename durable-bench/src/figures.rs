use serde::Serialize;

/// What was measured, shown as it comes.
pub(crate) struct Figures {
    json: bool,
    storage: String,
    rows: Vec<Figure>,
}

#[derive(Serialize)]
struct Figure {
    workload: &'static str,
    storage: String,
    system: &'static str,
    value: f64,
    unit: &'static str,
    raw: Option<f64>,
    ratio: Option<f64>,
    note: String,
}

impl Figures {
    pub(crate) fn new(json: bool, storage: String) -> Self {
        Self { json, storage, rows: Vec::new() }
    }

    /// A figure; `raw` is the database's own in the same unit.
    pub(crate) fn add(
        &mut self,
        workload: &'static str,
        value: f64,
        unit: &'static str,
        raw: Option<f64>,
        note: String,
    ) {
        let ratio = raw.map(|raw| value / raw);
        let figure =
            Figure { workload, storage: self.storage.clone(), system: "durable", value, unit, raw, ratio, note };
        if self.json {
            println!("{}", serde_json::to_string(&figure).unwrap_or_default());
        }
        self.rows.push(figure);
    }

    pub(crate) fn end(&self) {
        if self.json {
            return;
        }
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
