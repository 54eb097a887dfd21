//! Steps whose SQL commits with their record: exactly once, whatever goes wrong.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod postgres_alone;
mod sqlite_alone;

/// The cases, once for each database.
macro_rules! on {
    ($database:ident, $backend:ty, $storage:ident, $run:expr, $driver:literal) => {
        mod $database {
            fn run_test(test: impl Future<Output = ()>) {
                $run(test);
            }
            use $storage::{Outbox, Transactions, Tx};
            type B = $backend;
            include!("cases.rs");
            include!($driver);
        }
    };
}

on!(sqlite, durable_tests::SqliteFile, durable_sqlite, durable_tests::run, "sqlx.rs");
on!(postgres, durable_tests::PostgresSchema, durable_postgres, durable_tests::PostgresSchema::run, "sqlx.rs");
on!(mssql, durable_tests::MssqlSchema, durable_mssql, durable_tests::MssqlSchema::run, "tiberius.rs");
