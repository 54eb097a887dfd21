//! Durable processes on SQL Server 2019 and later, and Azure SQL.
//!
//! This crate re-exports `durable-core`: a service needs this one dependency.
//!
//! ```no_run
//! use durable_mssql::{Definition, Failure, Host, Mssql, Process};
//!
//! const GREET: Definition<String, String> = Definition::new("greet");
//!
//! async fn greet(proc: Process, name: String) -> Result<String, Failure> {
//!     let at = proc.get("at", || 7).await?;
//!     Ok(format!("{at}: hello, {name}"))
//! }
//!
//! # async fn service() -> Result<(), Box<dyn std::error::Error>> {
//! let storage = Mssql::connect("server=tcp:db.example.com,1433;database=orders;user=service;password=secret").await?;
//! let host = Host::builder(storage).register(GREET, greet).start().await?;
//! let greeting = host.spawn(GREET, "greet-ann", &"Ann".to_owned()).await?;
//! assert_eq!(greeting.output().await?, "7: hello, Ann");
//! # Ok(()) }
//! ```
//!
//! # The schema, and rights
//! Everything is in one schema, `durable` unless [`Connect::schema`] says otherwise; every statement names it. Connecting
//! creates it and brings it up to date, under a lock, so that several programs can start together. A user who may not
//! create anything is enough to run once another one has applied [`schema_sql`]:
//!
//! ```sql
//! GRANT SELECT, INSERT, UPDATE, DELETE ON SCHEMA::durable TO service;
//! ```
//!
//! Row versioning (`READ_COMMITTED_SNAPSHOT`, which Azure turns on) may be on or off. On is better for whoever reads beside
//! the engine.
//!
//! # What is kept after a crash
//! A commit is as durable as the database makes it. With `DELAYED_DURABILITY = FORCED`, or when a secondary takes over that
//! is not synchronous, recorded steps may run again, and what others were told is undone.
//!
//! # Who is dead
//! Each instance has a session of its own, which beats and holds an application lock. The server releases the lock when
//! the program dies, and another instance takes over at once; a session that ends while its program lives is begun anew
//! before anybody has looked twice. A machine that vanishes from the network is noticed by the heartbeat's expiry. The
//! server has no time-out for a transaction that waits for its client: a program that is paused within a transactional
//! step holds that step's locks until it goes on, or until the server finds its connection dead.
//!
//! # Log-in and TLS
//! A user and a password in the connection string, or a Microsoft Entra (Azure AD) token ([`Connect::token`]). Connections
//! are encrypted, and the server's certificate is verified by the operating system's authorities and those of
//! [`Connect::trust_ca`]. A server with a certificate of its own making is trusted only by
//! [`Connect::trust_server_certificate`], or `TrustServerCertificate=true`.

mod batch;
mod connect;
mod errors;
#[cfg(test)]
mod fake;
mod fence;
mod heart;
mod json;
mod migrate;
mod names;
mod outbox;
mod read;
mod rows;
mod session;
mod sql;
#[cfg(test)]
mod statements;
mod store;
mod transaction;

pub use connect::{Address, Connect};
pub use durable_core::*;
pub use migrate::{MIGRATIONS, schema_sql};
pub use outbox::{InTransaction, Outbox};
pub use session::{Client, Lent};
pub use tiberius;
pub use transaction::{Transactions, Tx};

use std::sync::Arc;

/// A schema in a SQL Server database as a storage of processes. Clones are the same storage; several hosts and several
/// programs may share a schema.
#[derive(Clone)]
pub struct Mssql(Arc<store::Shared>);

impl Mssql {
    /// Connects to a database, given as an ADO.NET connection string,
    /// `server=tcp:host,1433;database=…;user=…;password=…`, or as the driver's [`Config`](tiberius::Config), and brings its
    /// schema up to date. To be awaited, after further options.
    ///
    /// # Errors
    /// No server there, no such database, a wrong password, a certificate that cannot be verified: `Unavailable`. Tables
    /// from a newer version of the service, no right to create them, a string that is none: `Schema`. Nothing is changed
    /// then.
    pub fn connect(address: impl Into<Address>) -> Connect {
        Connect::new(address.into())
    }
}

impl std::fmt::Debug for Mssql {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Mssql").field(&self.0.schema.name()).finish()
    }
}
