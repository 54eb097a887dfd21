//! Durable processes on PostgreSQL 14 and later.
//!
//! This crate re-exports `durable-core`: a service needs this one dependency.
//!
//! ```no_run
//! use durable_postgres::{Definition, Failure, Host, Postgres, Process};
//!
//! const GREET: Definition<String, String> = Definition::new("greet");
//!
//! async fn greet(proc: Process, name: String) -> Result<String, Failure> {
//!     let at = proc.get("at", || 7).await?;
//!     Ok(format!("{at}: hello, {name}"))
//! }
//!
//! # async fn service() -> Result<(), Box<dyn std::error::Error>> {
//! let storage = Postgres::connect("postgres://service:secret@localhost/service").await?;
//! let host = Host::builder(storage).register(GREET, greet).start().await?;
//! let greeting = host.spawn(GREET, "greet-ann", &"Ann".to_owned()).await?;
//! assert_eq!(greeting.output().await?, "7: hello, Ann");
//! # Ok(()) }
//! ```
//!
//! # The schema, and rights
//! Everything is in one schema, `durable` unless [`Connect::schema`] says otherwise; every statement names it. Connecting
//! creates it and brings it up to date, under a lock, so that several programs can start together. A role that may not
//! create anything is enough to run once another one has applied [`schema_sql`]:
//!
//! ```sql
//! GRANT USAGE ON SCHEMA durable TO service;
//! GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA durable TO service;
//! ```
//!
//! # What is kept after a crash
//! A commit is as durable as the server's `synchronous_commit` makes it, which is left alone. With `off`, or with a
//! standby that takes over without the last commits, recorded steps may run again, and what others were told is undone.
//!
//! # Who is dead
//! Each instance has a session of its own, which beats and holds an advisory lock. The server releases the lock when the
//! program dies, and another instance takes over at once; a session that ends while its program lives is begun anew
//! before anybody has looked twice, and locks that are gone with a server that was restarted prove nothing. A machine
//! that vanishes from the network is noticed by the heartbeat's expiry, and its locks on rows are let go of by the
//! server: its sessions ask for TCP keepalives, and may not stay within a transaction for more than 4 s
//! ([`Connect::idle_in_transaction_timeout`]).
//!
//! # Poolers
//! Let this crate connect to the server directly: a host uses few connections. It also works through a pooler that lends
//! sessions by the transaction (PgBouncer's `pool_mode = transaction`), on two conditions, which [`Connect`] checks:
//!
//! - The engine has a role of its own, with its settings by `ALTER ROLE … SET`. It sets nothing in a session that is lent to
//!   other clients next. The error names each statement that is missing.
//! - The pooler handles prepared statements. PgBouncer does from 1.21 on, with `max_prepared_statements`.
//!
//! Behind such a pooler the engine uses neither session locks nor notifications. So another instance takes over from a dead
//! one after the expiry of its heartbeat, and instances hear of each other's work by polling.
//!
//! # Databases that speak PostgreSQL
//! The statements keep to what the distributed ones have: `unnest`, `ON CONFLICT`, `FOR SHARE`, `FOR NO KEY UPDATE`, `SKIP
//! LOCKED`, partial indexes, savepoints; neither triggers nor functions. Settings that a server does not know are left
//! out. Locks and notifications are tried out when connecting, and done without where they do not work. Checked, in every
//! test run: PostgreSQL itself. Not checked: Citus and Aurora, which have both; CockroachDB and YugabyteDB, which lack
//! one or the other; and those of them whose reported version is below 14 are refused.
//!
//! # TLS
//! With one of the features `tls-rustls-aws-lc-rs` (certificate authorities of the Mozilla project) and
//! `tls-rustls-ring-native-roots` (those of the operating system), a server that is not on this machine must show a
//! certificate for its name, unless the address says otherwise (`?sslmode=require`, `&sslrootcert=…`). Without them,
//! nothing is encrypted.

mod batch;
mod connect;
mod errors;
mod fence;
mod heart;
mod lend;
mod listen;
mod migrate;
mod names;
mod outbox;
#[cfg(test)]
mod plans;
mod pooler;
mod read;
mod rows;
mod session;
mod sql;
mod store;
mod transaction;

pub use connect::Connect;
pub use durable_core::*;
pub use migrate::{MIGRATIONS, schema_sql};
pub use outbox::{InTransaction, Outbox};
pub use sqlx;
pub use transaction::{Transactions, Tx};

use std::sync::Arc;

/// A schema in a PostgreSQL database as a storage of processes. Clones are the same storage; several hosts and several
/// programs may share a schema.
#[derive(Clone)]
pub struct Postgres(Arc<store::Shared>);

impl Postgres {
    /// Connects to a database, given as `postgres://user:password@host:5432/database`, and brings its schema up to date.
    /// To be awaited, after further options.
    ///
    /// # Errors
    /// No server there, no such database, a wrong password: `Unavailable`. Tables from a newer version of the service,
    /// no right to create them, an address that is not PostgreSQL's: `Schema`. Nothing is changed then.
    pub fn connect(url: impl Into<String>) -> Connect {
        Connect::new(url.into())
    }
}

impl std::fmt::Debug for Postgres {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Postgres").field(&self.0.schema.name()).finish()
    }
}
