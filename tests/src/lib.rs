//! What the tests share: storages to run on, and waiting for what can be awaited.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod crash;
pub mod disk;
pub mod faulty;
pub mod heavy;
pub mod ops;
pub mod orphans;
pub mod proxy;
pub mod rights;

use durable_core::storage::Storage;
use durable_core::{Handle, Host, HostBuilder, Info, Status};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

pub use durable_core::memory::Memory;
pub use durable_mssql::Mssql;
pub use durable_postgres::Postgres;
pub use durable_sqlite::Sqlite;

mod mssql;
mod postgres;
mod server;
pub use mssql::MssqlSchema;
pub use postgres::PostgresSchema;
pub use server::Server;

/// A storage under test, and what keeps it there.
pub trait Backend: Send + Sync + Sized + 'static {
    /// The storage's type.
    type Storage: Storage + Clone;
    /// A new, empty one.
    fn new() -> impl Future<Output = Self> + Send;
    /// Another connection to the same.
    fn storage(&self) -> impl Future<Output = Self::Storage> + Send;
}

/// A backend whose database the tests also write to by hand.
pub trait Sql: Backend {
    /// The table of processes.
    const PROCESSES: &'static str;
    /// The table of records.
    const STEPS: &'static str;
    /// What is not so, in SQL.
    const FALSE: &'static str;
    /// Whether what the service's transactions put in waits in a table of its own.
    const INBOX: bool;
    /// SQL that gives the engine's names another meaning for whoever does not name the place as well.
    const HIDE: &'static [&'static str];
    /// What a careless closure leaves on its connection.
    const LEAVE: &'static [&'static str];
    /// Asks every process to cancel, as the engine does.
    const CANCELS: &'static str;
    /// A connection of the service's own.
    type Connection: Send;
    /// Begins a transaction that writes.
    const BEGIN: &'static str;
    /// A connection of the service's own.
    fn connection(&self) -> impl Future<Output = Self::Connection> + Send;
    /// Runs a statement on a connection of its own.
    fn execute(&self, sql: &str) -> impl Future<Output = ()> + Send;
    /// The one number that a query answers with.
    fn number(&self, sql: &str) -> impl Future<Output = i64> + Send;
    /// The texts that a query of one column answers with.
    fn texts(&self, sql: &str) -> impl Future<Output = Vec<String>> + Send;
}

/// In memory.
pub struct InMemory(Memory);

impl Backend for InMemory {
    type Storage = Memory;
    async fn new() -> Self {
        Self(Memory::new())
    }
    async fn storage(&self) -> Memory {
        self.0.clone()
    }
}

/// A SQLite file, in a folder of its own unless it is told which.
pub struct SqliteFile {
    folder: PathBuf,
    _own: Option<tempfile::TempDir>,
}

impl SqliteFile {
    /// The one in this folder.
    pub fn within(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), _own: None }
    }

    /// Waits until nobody has it open, and it has everything itself.
    pub async fn closed(&self) {
        until("the file is closed", async || {
            // Of two that close it at the same time neither may be the last one.
            self.execute("PRAGMA wal_checkpoint").await;
            !Path::new(&(self.path() + "-wal")).exists()
        })
        .await;
    }

    /// The file.
    pub fn path(&self) -> String {
        self.folder.join("test.db").to_str().unwrap().to_owned()
    }
}

impl Backend for SqliteFile {
    type Storage = Sqlite;
    async fn new() -> Self {
        let own = tempfile::tempdir().unwrap();
        Self { folder: own.path().to_owned(), _own: Some(own) }
    }
    async fn storage(&self) -> Sqlite {
        Sqlite::open(self.path()).await.unwrap()
    }
}

impl Sql for SqliteFile {
    const PROCESSES: &'static str = "durable_processes";
    const STEPS: &'static str = "durable_steps";
    const FALSE: &'static str = "0";
    const INBOX: bool = false;
    const HIDE: &'static [&'static str] = &[
        "CREATE TEMP TABLE IF NOT EXISTS durable_steps (dummy TEXT)",
        "CREATE TEMP TABLE IF NOT EXISTS durable_processes (dummy TEXT)",
        "CREATE TEMP TABLE IF NOT EXISTS durable_fences (dummy TEXT)",
    ];
    const LEAVE: &'static [&'static str] = &["PRAGMA query_only = ON"];
    const CANCELS: &'static str =
        "UPDATE durable_processes SET cancel_requested_at = strftime('%Y-%m-%dT%H:%M:%fZ', 'now'),
        signals = signals + 1, signalled = 1";
    type Connection = sqlx::SqliteConnection;
    const BEGIN: &'static str = "BEGIN IMMEDIATE";
    async fn connection(&self) -> sqlx::SqliteConnection {
        use sqlx::Connection;
        sqlx::SqliteConnection::connect(&format!("sqlite://{}", self.path())).await.unwrap()
    }
    async fn execute(&self, sql: &str) {
        let mut connection = self.connection().await;
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(&mut connection).await.unwrap();
    }
    async fn number(&self, sql: &str) -> i64 {
        let mut connection = self.connection().await;
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql.to_owned())).fetch_one(&mut connection).await.unwrap()
    }
    async fn texts(&self, sql: &str) -> Vec<String> {
        let mut connection = self.connection().await;
        sqlx::query_scalar(sqlx::AssertSqlSafe(sql.to_owned())).fetch_all(&mut connection).await.unwrap()
    }
}

/// One named test of each case for each database that programs share.
#[macro_export]
macro_rules! on_each_database {
    ($($case:ident),* $(,)?) => {
        $(mod $case {
            #[test]
            fn sqlite() {
                $crate::run(super::$case::<$crate::SqliteFile>());
            }
            #[test]
            fn postgres() {
                $crate::PostgresSchema::run(super::$case::<$crate::PostgresSchema>());
            }
            #[test]
            fn mssql() {
                $crate::MssqlSchema::run(super::$case::<$crate::MssqlSchema>());
            }
        })*
    };
}

/// One named test of each case for each backend: `#[test] fn case::backend`.
#[macro_export]
macro_rules! on_each_backend {
    ($($case:ident),* $(,)?) => {
        $(mod $case {
            #[test]
            fn memory() {
                $crate::run(super::$case::<$crate::InMemory>());
            }
            #[test]
            fn sqlite() {
                $crate::run(super::$case::<$crate::SqliteFile>());
            }
            #[test]
            fn postgres() {
                $crate::PostgresSchema::run(super::$case::<$crate::PostgresSchema>());
            }
            #[test]
            fn mssql() {
                $crate::MssqlSchema::run(super::$case::<$crate::MssqlSchema>());
            }
        })*
    };
}

/// Runs a test, with the log that `RUST_LOG` asks for, and not for ever.
pub fn run(test: impl Future<Output = ()>) {
    run_within(Duration::from_secs(if long() { 900 } else { 60 }), test);
}

fn run_within(patience: Duration, test: impl Future<Output = ()>) {
    log();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(patience, test).await.expect("the test hangs");
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
}

/// Says what was not run, and why, to `scripts/test` as well.
///
/// # Panics
/// If `DURABLE_REQUIRE` names it.
pub fn not_run(what: &str, why: &str) {
    let required = std::env::var("DURABLE_REQUIRE").unwrap_or_default();
    assert!(!required.split(',').any(|name| name.trim() == what), "{what} is required, and {why}");
    println!("not run: {what} ({why})");
    if let Some(file) = std::env::var_os("DURABLE_NOT_RUN") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(file).unwrap();
        std::io::Write::write_all(&mut file, format!("{what} ({why})\n").as_bytes()).unwrap();
    }
}

/// Whether to run what takes long.
pub fn long() -> bool {
    std::env::var_os("DURABLE_LONG").is_some()
}

/// The log that `RUST_LOG` asks for. What a service sees by default is kept as well.
pub fn log() {
    let asked = tracing_subscriber::EnvFilter::from_default_env();
    let shown = tracing_subscriber::fmt::layer().with_test_writer().with_filter(asked);
    let kept = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(|| Kept).with_filter(LevelFilter::INFO);
    let _ = tracing_subscriber::registry().with(shown).with(kept).try_init();
}

static KEPT: Mutex<String> = Mutex::new(String::new());

struct Kept;

impl std::io::Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        KEPT.lock().unwrap().push_str(&String::from_utf8_lossy(bytes));
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Whether a line with all of these in it was logged in this program, at INFO or above.
pub fn logged(parts: &[&str]) -> bool {
    KEPT.lock().unwrap().lines().any(|line| parts.iter().all(|part| line.contains(part)))
}

/// A builder with short times, so that tests need not wait for long.
pub async fn quick(backend: &impl Backend) -> HostBuilder {
    Host::builder(backend.storage().await)
        .heartbeat(Duration::from_millis(500), Duration::from_secs(4))
        .quiet_time(Duration::from_millis(50))
        .poll(Duration::from_millis(200))
}

/// Waits until the condition holds, for as long as it takes.
pub async fn until_ever(mut condition: impl AsyncFnMut() -> bool) {
    while !condition().await {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until the condition holds.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let since = Instant::now();
    while !condition().await {
        assert!(since.elapsed() < Duration::from_secs(30), "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until the process has this status.
pub async fn until_status<O, E>(handle: &Handle<O, E>, status: Status) -> Info {
    let since = Instant::now();
    loop {
        let info = handle.status().await.unwrap();
        if info.status == status {
            return info;
        }
        assert!(since.elapsed() < Duration::from_secs(30), "not {status} but {info:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Counts what happened, by name.
#[derive(Clone, Default)]
pub struct Effects(Arc<Mutex<Vec<String>>>);

impl Effects {
    /// It happened.
    pub fn add(&self, effect: impl Into<String>) {
        self.0.lock().unwrap().push(effect.into());
    }
    /// Everything, in order.
    pub fn all(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
    /// How often.
    pub fn count(&self, effect: &str) -> usize {
        self.0.lock().unwrap().iter().filter(|e| **e == *effect).count()
    }
}
