//! Durable processes on SQLite.
//!
//! This crate re-exports `durable-core`: a service needs this one dependency.
//!
//! ```
//! use durable_sqlite::{Definition, Failure, Host, Process, Sqlite};
//!
//! const GREET: Definition<String, String> = Definition::new("greet");
//!
//! async fn greet(proc: Process, name: String) -> Result<String, Failure> {
//!     let at = proc.get("at", || 7).await?;
//!     Ok(format!("{at}: hello, {name}"))
//! }
//!
//! # tokio::runtime::Runtime::new().unwrap().block_on(async {
//! # let folder = std::env::temp_dir().join(format!("durable-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&folder)?;
//! # let path = folder.join("service.db");
//! # let path = path.to_str().unwrap();
//! let host = Host::builder(Sqlite::open(path).await?).register(GREET, greet).start().await?;
//! let greeting = host.spawn(GREET, "greet-ann", &"Ann".to_owned()).await?;
//! assert_eq!(greeting.output().await?, "7: hello, Ann");
//! host.shutdown(std::time::Duration::from_secs(5)).await;
//! # std::fs::remove_dir_all(&folder)?;
//! # Ok::<_, Box<dyn std::error::Error>>(()) }).unwrap();
//! ```
//!
//! # The service's own transactions in the same file
//! SQLite has one writer at a time. A transaction that reads first and writes later fails at once with `SQLITE_BUSY`
//! if somebody else wrote in between, whatever its `busy_timeout`: begin those that write with
//! `pool.begin_with("BEGIN IMMEDIATE")`, keep them short, and never let one wait for anything but the database.
//!
//! # Only SQLite may open the file
//! Do not open or copy the database file by other means in a program that also has it open through this crate: on
//! Unix, closing any descriptor of a file drops all of the process's locks on it, SQLite's among them. And as long as any
//! program runs, do not delete, move or replace it, nor its journal (`-wal`): nothing is recorded from then on, and whoever
//! asks is told.

mod batch;
mod breath;
mod cells;
mod connect;
mod errors;
mod fence;
mod files;
mod heart;
mod lend;
mod life;
mod migrate;
mod outbox;
#[cfg(test)]
mod plans;
mod reads;
mod rows;
mod script;
mod store;
mod transaction;

pub use connect::Open;
pub use durable_core::*;
pub use migrate::{MIGRATIONS, schema_sql};
pub use outbox::{InTransaction, Outbox};
pub use sqlx;
pub use transaction::{Transactions, Tx};

use chrono::{DateTime, SecondsFormat, Utc};
use std::sync::Arc;

/// A SQLite database file as a storage of processes. Clones are the same storage; several hosts and several programs
/// may share a file.
#[derive(Clone)]
pub struct Sqlite(Arc<store::Shared>);

impl Sqlite {
    /// Opens a database file, given as a path or as `sqlite://path`; creates it if need be, and brings its schema up to
    /// date. To be awaited, after further options: write-ahead journal and `synchronous = FULL` by default.
    ///
    /// # Errors
    /// No such folder, no right to write, a disk that is full: `Unavailable`. A file that is not a SQLite database, one
    /// from a newer version of the service, one that is gone or empty although its journal is there, or an address that
    /// is not SQLite's: `Schema`. Nothing is changed then.
    pub fn open(path_or_url: impl Into<String>) -> Open {
        Open::new(path_or_url.into())
    }
}

impl std::fmt::Debug for Sqlite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Sqlite").field(&self.0.options.get_filename()).finish()
    }
}

/// A time as it stands in every column of time: it sorts.
fn time_text(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Millis, true)
}
