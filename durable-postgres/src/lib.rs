//! Durable processes on PostgreSQL.
//!
//! This crate re-exports `durable-core`: a service needs this one dependency.

mod batch;
mod connect;
mod errors;
mod fence;
mod heart;
mod lend;
mod listen;
mod migrate;
mod names;
#[cfg(test)]
mod plans;
mod read;
mod rows;
mod session;
mod sql;
mod store;

pub use connect::Connect;
pub use durable_core::*;
pub use migrate::{MIGRATIONS, schema_sql};

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
