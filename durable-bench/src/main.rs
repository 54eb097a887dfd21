//! Figures of durable processes beside the raw database, measured in one run, in turns, on the same file system or server
//! with the same settings and the engine's own tables.
//!
//! `cargo run --release -p durable-bench -- --storage sqlite --workload sequential,many,parked,latency,recovery`
//! `cargo run --release -p durable-bench -- --storage postgres://user:password@host/database --workload all`

use clap::Parser;
use durable_bench::Error;
use durable_bench::figures::{Figures, System};
use durable_bench::programs::{self, Role};
use durable_bench::site::{At, Place};
use durable_bench::workloads::{Bench, WORKLOADS};
use std::path::PathBuf;

/// Measures durable processes beside the raw database.
#[derive(Parser)]
struct Args {
    /// Which database: `sqlite`, in files of its own; or `postgres://user:password@host/database`, in schemas of its own.
    #[arg(long, default_value = "sqlite")]
    storage: String,
    /// Which workloads, separated by commas; or `all` that this database has.
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
    /// Where the files of SQLite's go: on the disk that is to be measured.
    #[arg(long, default_value = ".")]
    folder: PathBuf,
    /// This is a program that is measured; not for people.
    #[arg(long, hide = true, value_enum, requires = "at")]
    role: Option<Role>,
    #[arg(long, hide = true)]
    at: Option<String>,
    #[arg(long, hide = true)]
    schema: Option<String>,
    #[arg(long, hide = true, default_value_t = 0)]
    count: usize,
}

fn main() -> Result<(), Error> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    // In a task, as a service's code is, and not on a thread beside those of the runtime.
    runtime.block_on(runtime.spawn(run(args)))?
}

async fn run(args: Args) -> Result<(), Error> {
    if let (Some(role), Some(at)) = (args.role, args.at) {
        return programs::run(role, At::new(at, args.schema), args.count).await;
    }
    let place = Place::new(&args.storage, args.folder)?;
    let bench = Bench { place, rounds: args.rounds.max(1), scale: args.scale.max(1) };
    let on_sqlite = matches!(bench.place, Place::Sqlite { .. });
    let named = if args.workload == ["all"] {
        WORKLOADS.iter().filter(|name| !(on_sqlite && **name == "remote")).copied().collect()
    } else {
        bench.named(&args.workload)?
    };
    let (mut raw, site) = bench.place.raw().await?;
    let system = System::durable(bench.place.name(), &raw.settings().await?);
    let mut figures = Figures::new(args.json);
    drop((raw, site));
    for name in named {
        for measured in bench.measure(name).await? {
            figures.add(name, system.clone(), measured);
        }
    }
    figures.end();
    Ok(())
}
