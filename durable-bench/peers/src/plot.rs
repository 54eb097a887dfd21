//! Curves as SVG, by hand: both axes are logarithmic.

use durable_bench::Error;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

#[derive(Deserialize)]
struct Line {
    workload: String,
    storage: String,
    system: String,
    durability: String,
    size: Option<usize>,
    value: f64,
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
/// Left, right, above, below.
const MARGINS: [f64; 4] = [80.0, 230.0, 40.0, 55.0];
/// Told apart without red and green too.
const COLOURS: [&str; 6] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"];

/// `throughput-<storage>.svg` and `memory-<storage>.svg`, as far as there are lines for them.
pub(crate) fn draw(folder: &Path) -> Result<(), Error> {
    let mut curves: BTreeMap<(String, String), BTreeMap<String, Vec<(f64, f64)>>> = BTreeMap::new();
    for line in std::io::stdin().lines() {
        let line: Line = serde_json::from_str(&line?)?;
        let Some(size) = line.size else { continue };
        let less = line.durability.split_once("synchronous NORMAL").is_some();
        let name = if less { format!("{}, NORMAL", line.system) } else { line.system };
        let plot = curves.entry((line.workload, line.storage)).or_default();
        plot.entry(name).or_default().push((size as f64, line.value));
    }
    if curves.is_empty() {
        return Err("no line is of a curve: measure `--workload concurrency,parked --json`".into());
    }
    std::fs::create_dir_all(folder)?;
    for ((workload, storage), curves) in curves {
        let on = if storage == "sqlite" { "SQLite" } else { "PostgreSQL" };
        let (file, title, x, y) = match workload.as_str() {
            "concurrency" => {
                ("throughput", format!("Steps per second on {on}"), "processes at once", "steps per second")
            }
            _ => ("memory", format!("Memory on {on}"), "waiting processes", "MiB resident"),
        };
        let path = folder.join(format!("{file}-{storage}.svg"));
        std::fs::write(&path, svg(&title, x, y, &curves)?)?;
        eprintln!("{}", path.display());
    }
    Ok(())
}

fn svg(title: &str, x: &str, y: &str, curves: &BTreeMap<String, Vec<(f64, f64)>>) -> Result<String, Error> {
    let [left, right, above, below] = MARGINS;
    let points = || curves.values().flatten();
    let (across, up) = (Axis::new(points().map(|p| p.0)), Axis::new(points().map(|p| p.1)));
    let (bottom, end) = (HEIGHT - below, WIDTH - right);
    let at_x = |value: f64| left + across.share(value) * (end - left);
    let at_y = |value: f64| bottom - up.share(value) * (bottom - above);
    let mut text = String::new();
    writeln!(
        text,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">
<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>
<text x="{left}" y="22" font-size="15" font-weight="bold">{title}</text>"##
    )?;
    for value in across.ticks() {
        let at = at_x(value);
        writeln!(text, r##"<path d="M{at:.1} {above}V{bottom}" stroke="#ddd"/>"##)?;
        writeln!(text, r##"<text x="{at:.1}" y="{:.1}" text-anchor="middle">{}</text>"##, bottom + 18.0, short(value))?;
    }
    for value in up.ticks() {
        let at = at_y(value);
        writeln!(text, r##"<path d="M{left} {at:.1}H{end}" stroke="#ddd"/>"##)?;
        writeln!(
            text,
            r##"<text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"##,
            left - 8.0,
            at + 4.0,
            short(value)
        )?;
    }
    let (middle, centre) = ((left + end) / 2.0, (above + bottom) / 2.0);
    writeln!(text, r##"<text x="{middle}" y="{}" text-anchor="middle">{x}</text>"##, HEIGHT - 12.0)?;
    writeln!(text, r##"<text transform="translate(18 {centre}) rotate(-90)" text-anchor="middle">{y}</text>"##)?;
    let mut labels = Vec::new();
    for ((name, points), colour) in curves.iter().zip(COLOURS.into_iter().cycle()) {
        let mut points = points.clone();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{:.1} {:.1}", at_x(*x), at_y(*y))).collect();
        writeln!(text, r##"<path d="M{}" fill="none" stroke="{colour}" stroke-width="2"/>"##, path.join("L"))?;
        for (x, y) in &points {
            writeln!(text, r##"<circle cx="{:.1}" cy="{:.1}" r="3" fill="{colour}"/>"##, at_x(*x), at_y(*y))?;
        }
        if let Some((_, last)) = points.last() {
            labels.push((at_y(*last), name, colour));
        }
    }
    // Beside where a curve ends, but for those that would lie on another one.
    labels.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut free = above;
    for (at, name, colour) in labels {
        let at = at.max(free);
        free = at + 16.0;
        writeln!(text, r##"<text x="{:.1}" y="{:.1}" fill="{colour}">{name}</text>"##, end + 12.0, at + 4.0)?;
    }
    text.push_str("</svg>\n");
    Ok(text)
}

/// From a power of ten to another one.
struct Axis {
    from: f64,
    to: f64,
}

impl Axis {
    fn new(values: impl Iterator<Item = f64> + Clone) -> Self {
        let least = values.clone().fold(f64::INFINITY, f64::min).max(1e-3);
        let most = values.fold(f64::NEG_INFINITY, f64::max).max(least);
        let from = least.log10().floor();
        Self { from, to: most.log10().ceil().max(from + 1.0) }
    }

    fn share(&self, value: f64) -> f64 {
        ((value.max(1e-3).log10() - self.from) / (self.to - self.from)).clamp(0.0, 1.0)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let (from, to) = (self.from as i32, self.to as i32);
        (from..=to).map(|power| 10_f64.powi(power))
    }
}

fn short(value: f64) -> String {
    match value {
        1e6.. => format!("{}M", value / 1e6),
        1e3.. => format!("{}k", value / 1e3),
        _ => format!("{value}"),
    }
}
