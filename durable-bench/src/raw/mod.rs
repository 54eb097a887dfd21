//! The database without the engine: the same tables, the same settings, the best way we know to write the same rows.

pub(crate) mod postgres;
pub(crate) mod sqlite;

use async_trait::async_trait;
use std::time::Duration;

use crate::Error;

/// The n-th run that is written without the engine.
fn run(n: u64) -> String {
    format!("01990000-0000-7000-8000-{n:012x}")
}

/// A connection.
#[async_trait]
pub trait Raw: Send {
    /// From now on this is the writer with this number: each has runs of its own.
    fn writer(&mut self, nth: usize);

    /// One row, one commit. How long each took.
    async fn single(&mut self, commits: usize) -> Result<Vec<Duration>, Error>;

    /// What `many` writes: rows of processes, of their steps, and the processes' ends, so many rows a commit.
    async fn batches(&mut self, processes: usize, steps: usize, rows: usize) -> Result<Duration, Error>;

    /// A table of accounts, beside the engine's.
    async fn accounts(&mut self, accounts: usize) -> Result<(), Error>;

    /// Transactions that change an account and record it.
    async fn transactions(&mut self, account: usize, transactions: usize) -> Result<Duration, Error>;

    /// Adds processes that ended long ago, with a step each.
    async fn grow(&mut self, processes: usize) -> Result<(), Error>;

    /// How many processes have ended, and how many the program with this label owns.
    async fn ended_and_owned(&mut self, label: &str) -> Result<(usize, usize), Error>;

    /// The server and what makes it durable.
    async fn settings(&mut self) -> Result<String, Error>;
}
