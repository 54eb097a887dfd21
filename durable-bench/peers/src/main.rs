//! This library and its peers, measured in one run, in turns, on the same disk or server at the same durability.
//!
//! `cargo run --release --manifest-path durable-bench/peers/Cargo.toml -- --workload many,sequential,latency`

mod ground;
mod here;
mod measure;
mod plot;
mod system;

use clap::Parser;
use durable_bench::Error;
use durable_bench::figures::Figures;
use durable_bench::site::Place;
use measure::{Bench, WORKLOADS};
use peer::Called;
use std::path::PathBuf;

/// Measures this library and its peers side by side.
#[derive(Parser)]
struct Args {
    /// Which database: `sqlite`, in files of its own; or `postgres://user:password@host/database`, in databases of its own
    /// beside that one, which the user must be allowed to create.
    #[arg(long, default_value = "sqlite")]
    storage: String,
    /// Which workloads, separated by commas: many, sequential, latency, concurrency, parked.
    #[arg(long, value_delimiter = ',', default_value = "many,sequential,latency")]
    workload: Vec<String>,
    /// Which peers, separated by commas: dbos, durare, duroxide, duroxide-pg; all if none is named.
    #[arg(long, value_delimiter = ',')]
    peer: Vec<String>,
    /// One JSON object a line instead of a table.
    #[arg(long)]
    json: bool,
    /// How often they take turns; figures are medians.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Divides the sizes of the workloads, for a quick look.
    #[arg(long, default_value_t = 1)]
    scale: usize,
    /// For how many seconds a system starts processes at most, in one measurement: a slower one does fewer.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// How many processes wait at most in `parked`.
    #[arg(long, default_value_t = 100_000)]
    parked: usize,
    /// Where the files of SQLite's go: on the disk that is to be measured.
    #[arg(long, default_value = ".")]
    folder: PathBuf,
    /// Measures nothing: draws the curves of `concurrency` and `parked`, from lines of JSON on the standard input, as SVG
    /// into this folder.
    #[arg(long, value_name = "FOLDER")]
    plot: Option<PathBuf>,
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    if let Some(called) = Called::new() {
        return here::run(&called).await;
    }
    let args = Args::parse();
    if let Some(folder) = &args.plot {
        return plot::draw(folder);
    }
    let known = |name: &String| {
        let known = WORKLOADS.into_iter().find(|known| known == name);
        known.ok_or_else(|| format!("no workload {name:?}; there are: {}", WORKLOADS.join(", ")))
    };
    let workloads = args.workload.iter().map(known).collect::<Result<Vec<_>, _>>()?;
    let place = Place::new(&args.storage, args.folder)?;
    let systems = system::systems(&place, &args.peer)?;
    let (mut raw, site) = place.raw().await?;
    let settings = raw.settings().await?;
    drop((raw, site));
    let (rounds, scale) = (args.rounds.max(1), args.scale.max(1));
    let bench = Bench { place, systems, rounds, scale, seconds: args.seconds, parked: args.parked, settings };
    let mut figures = Figures::new(args.json);
    let mut compared = Vec::new();
    for workload in workloads {
        compared.extend(bench.measure(workload, &mut figures).await?);
    }
    figures.end();
    if !args.json {
        println!("\n{}", compared.join("\n"));
    }
    Ok(())
}
