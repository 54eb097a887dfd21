//! Money moves between accounts, by a saga that takes it back when something fails, while the workers that run it are
//! killed with `kill -9` again and again. At the end everything is checked.
//!
//! `cargo run -p durable-examples --example money_transfer`: one worker, processes in a SQLite file, accounts in a bank elsewhere.
//! `--features postgres -- --storage postgres://user:password@host/database`: three workers share a PostgreSQL database; one of them is also
//! stopped for longer than its heartbeat may be silent. `--accounts database`: the accounts are tables beside the
//! processes, and the steps are transactions.

#![allow(unreachable_pub)] // A program of several files.

mod bank;
mod check;
mod demo;
mod files;
mod journal;
mod ledger;
mod place;
mod saga;
mod worker;

use clap::{Parser, ValueEnum};
use durable_core::storage::Storage;
use place::Place;
use std::fmt;
use std::path::PathBuf;

type Error = Box<dyn std::error::Error + Send + Sync>;

#[derive(Parser)]
struct Args {
    /// Where the processes are kept: a SQLite file, or `postgres://user:password@host/database`. A new file in `--folder`
    /// by default.
    #[arg(long)]
    storage: Option<String>,
    /// The schema on PostgreSQL: the demo's own, made anew.
    #[arg(long, default_value = "money_transfer")]
    schema: String,
    /// Where the accounts are.
    #[arg(long, value_enum, default_value_t = Accounts::Bank)]
    accounts: Accounts,
    /// Where the demo's own files are: the bank's database, a journal of attempts.
    #[arg(long, default_value = "money_transfer.data")]
    folder: PathBuf,
    /// How many transfers.
    #[arg(long, default_value_t = 200)]
    transfers: u32,
    /// How many worker programs: 1 on SQLite, 3 on PostgreSQL by default.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16))]
    workers: Option<u32>,
    /// How often a worker is killed.
    #[arg(long, default_value_t = 5)]
    kills: u32,
    /// Within how many seconds the others must have taken over from one that was killed.
    #[arg(long, default_value_t = 5.0)]
    within: f64,
    /// This is a worker, with room for so many processes.
    #[arg(long, hide = true)]
    worker: Option<usize>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Accounts {
    /// In another system, which is called with idempotency keys: at least once.
    Bank,
    /// Tables in the same database as the processes: exactly once.
    Database,
}

impl fmt::Display for Accounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Bank { "bank" } else { "database" })
    }
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let args = Args::parse();
    let storage = args.storage.clone().unwrap_or_else(|| args.folder.join("processes.db").display().to_string());
    let place = Place::new(storage.clone(), args.schema.clone())?;
    if let Some(room) = args.worker {
        return worker::run(&args, place, room).await;
    }
    std::fs::create_dir_all(&args.folder)?;
    for file in std::fs::read_dir(&args.folder)? {
        let path = file?.path();
        if path.is_file() {
            std::fs::remove_file(path)?;
        }
    }
    #[cfg(feature = "postgres")]
    place.clear().await?;
    match &place {
        Place::Sqlite(path) => {
            let opened = durable_sqlite::Sqlite::open(path.display().to_string()).await?;
            run(&args, &storage, &place, opened).await
        }
        #[cfg(feature = "postgres")]
        Place::Postgres { url, schema } => {
            let opened = durable_postgres::Postgres::connect(url).schema(schema).await?;
            run(&args, &storage, &place, opened).await
        }
    }
}

async fn run(args: &Args, address: &str, place: &Place, storage: impl Storage + Clone) -> Result<(), Error> {
    let mut books = check::Books::create(args, place).await?;
    let blows = demo::run(args, address, place, storage.clone()).await?;
    check::check(args, &storage, &mut books, &blows).await?;
    println!("\nlook at it: {}", place.look());
    Ok(())
}
