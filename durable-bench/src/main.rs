//! Figures of durable processes beside the raw database, measured in one run, in turns, on the same file system with
//! the same settings and the engine's own tables.
//!
//! `cargo run --release -p durable-bench -- --storage sqlite --workload sequential,many,parked,latency,recovery`

mod figures;
mod processes;
mod raw;
mod workloads;

use clap::Parser;
use figures::Figures;
use std::path::PathBuf;
use workloads::Bench;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Measures durable processes beside the raw database.
#[derive(Parser)]
struct Args {
    /// Which database: `sqlite`, in a file of its own.
    #[arg(long, default_value = "sqlite")]
    storage: String,
    /// Which workloads, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "sequential,many,parked,latency,recovery")]
    workload: Vec<String>,
    /// One JSON object a line instead of a table.
    #[arg(long)]
    json: bool,
    /// How often the database and the engine take turns; figures are medians.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Divides the sizes of the workloads, for a quick look.
    #[arg(long, default_value_t = 1)]
    scale: usize,
    /// Where the database files go: on the disk that is to be measured.
    #[arg(long, default_value = ".")]
    folder: PathBuf,
    /// The worker that `recovery` kills; not for people.
    #[arg(long, hide = true)]
    recover: Option<String>,
}

fn main() -> Result<(), Error> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        if let Some(path) = args.recover {
            return workloads::recovery_worker(&path).await;
        }
        if args.storage != "sqlite" {
            return Err(format!("no storage {:?}; there is: sqlite", args.storage).into());
        }
        let bench = Bench { folder: args.folder, rounds: args.rounds.max(1), scale: args.scale.max(1) };
        let mut figures = Figures::new(args.json, args.storage);
        for workload in &args.workload {
            match workload.as_str() {
                "sequential" => bench.sequential(&mut figures).await?,
                "many" => bench.many(&mut figures).await?,
                "parked" => bench.parked(&mut figures).await?,
                "latency" => bench.latency(&mut figures).await?,
                "recovery" => bench.recovery(&mut figures).await?,
                other => {
                    let all = "sequential, many, parked, latency, recovery";
                    return Err(format!("no workload {other:?}; there are: {all}").into());
                }
            }
        }
        figures.end();
        Ok(())
    })
}
