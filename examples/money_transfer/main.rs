//! Money moves between accounts of a bank, by a saga that takes it back when something fails, while the worker that runs
//! it is killed with `kill -9` again and again. At the end everything is checked.
//!
//! `cargo run --release --example money_transfer`

#![allow(unreachable_pub)] // A program of several files.

mod bank;
mod check;
mod saga;
mod worker;

use bank::Bank;
use clap::Parser;
use durable_sqlite::storage::Storage;
use durable_sqlite::{Host, Sqlite, Status};
use indicatif::{ProgressBar, ProgressStyle};
use saga::{TRANSFER, Transfer};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use worker::Worker;

type Error = Box<dyn std::error::Error + Send + Sync>;

#[derive(Parser)]
struct Args {
    /// Where the processes are kept: a SQLite file. A new one in `--folder` by default.
    #[arg(long)]
    storage: Option<String>,
    /// Where the bank's own database is.
    #[arg(long, default_value = "money_transfer.data")]
    folder: PathBuf,
    /// How many transfers.
    #[arg(long, default_value_t = 200)]
    transfers: u32,
    /// How often the worker is killed.
    #[arg(long, default_value_t = 5)]
    kills: u32,
    /// This is the worker.
    #[arg(long, hide = true)]
    worker: bool,
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let args = Args::parse();
    let bank_path = args.folder.join("bank.db");
    let storage_path = args.storage.clone().unwrap_or_else(|| args.folder.join("processes.db").display().to_string());
    if args.worker {
        let bank = Bank::open(&bank_path).await?;
        return worker::run(Sqlite::open(&*storage_path).await?, bank).await;
    }
    std::fs::create_dir_all(&args.folder)?;
    for file in std::fs::read_dir(&args.folder)? {
        let path = file?.path();
        if path.is_file() {
            std::fs::remove_file(path)?;
        }
    }
    let bank = Bank::create(&bank_path, saga::accounts()).await?;
    let storage = Sqlite::open(&*storage_path).await?;
    demo(&args, &storage_path, storage, bank).await
}

/// Starts all transfers, kills workers while they run them, and checks what is left.
async fn demo(args: &Args, storage_path: &str, storage: impl Storage + Clone, bank: Bank) -> Result<(), Error> {
    println!(
        "{} transfers between {} accounts; the worker is killed {} times\n",
        args.transfers,
        saga::ACCOUNTS,
        args.kills
    );
    let started = Instant::now();
    // This program starts and watches; it registers no function, so it runs none of them.
    let host = Host::builder(storage.clone()).label("money_transfer").start().await?;
    for n in 0..args.transfers {
        host.spawn(TRANSFER, saga::id(n), &Transfer::number(n)).await?;
    }
    let start = || Worker::start(storage_path, &args.folder);
    let mut worker = start()?;
    let bar = bar(args.transfers);
    let mut killed = 0;
    loop {
        let ended = ended(&host).await?;
        bar.set_position(u64::from(ended));
        if ended == args.transfers {
            break;
        }
        // Spread over the run, and only while the bank is in the middle of something.
        let due = args.transfers * (killed + 1) / (args.kills + 1);
        if killed < args.kills && ended >= due && bank.under_way(worker.id()).await? > 0 {
            worker.kill()?;
            killed += 1;
            let steps = bank.under_way(worker.id()).await?;
            let line = format!("  kill -9 {}: {steps} steps were under way, {ended} transfers had ended", worker.id());
            bar.suspend(|| println!("{line}"));
            worker = start()?;
        } else if worker.has_ended()? {
            return Err("the worker ended by itself".into());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bar.finish_and_clear();
    worker.kill()?;
    host.shutdown(Duration::from_secs(5)).await;
    println!("  all have ended after {:.1} s\n", started.elapsed().as_secs_f64());
    check::check(&storage, &bank, args.transfers, killed).await?;
    println!(
        "\nlook at it: sqlite3 {} \"SELECT id, status, claim, reason FROM durable_processes\"",
        Path::new(storage_path).display()
    );
    Ok(())
}

/// How many transfers have ended.
async fn ended(host: &Host) -> Result<u32, Error> {
    let counts = host.processes().kind(TRANSFER).count().await?;
    if let Some(stuck) = counts.iter().find(|count| count.status == Status::Stuck) {
        return Err(format!("{} transfers are stuck", stuck.count).into());
    }
    Ok(u32::try_from(counts.iter().filter(|count| count.status.is_finished()).map(|count| count.count).sum::<u64>())?)
}

fn bar(length: u32) -> ProgressBar {
    let bar = ProgressBar::new(u64::from(length));
    if let Ok(style) = ProgressStyle::with_template("  {wide_bar} {pos}/{len} transfers") {
        bar.set_style(style);
    }
    bar
}
