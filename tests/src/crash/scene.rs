//! A crash test's stage.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::check::check;
use super::deadly::Boundary;
use super::journal::{self, What};
use super::worker::{Orders, Worker};
use super::workload::STEPS;
use crate::{Backend, SqliteFile, read_sqlite};

/// Longer than anything may take.
pub const LONG: Duration = Duration::from_secs(50);

/// Workers on one database, their journal, and the check of both.
pub struct Scene {
    worker: &'static str,
    file: SqliteFile,
    folder: tempfile::TempDir,
    processes: u32,
    pace: Duration,
    /// See [`Deadly::forgets`](super::deadly::Deadly::forgets).
    pub forgets: Option<u32>,
}

impl Scene {
    /// With this worker program, so many processes, and so much time for each step.
    pub async fn new(worker: &'static str, processes: u32, pace: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { worker, file: SqliteFile::new().await, folder, processes, pace, forgets: None }
    }

    /// The database.
    pub fn database(&self) -> String {
        self.file.path()
    }

    fn journal(&self) -> PathBuf {
        self.folder.path().join("journal")
    }

    /// Starts a worker.
    pub fn start(&self, die: Option<Boundary>) -> Worker {
        let orders = Orders {
            storage: self.file.path(),
            journal: self.journal(),
            processes: self.processes,
            die,
            pace: self.pace,
            forgets: self.forgets,
        };
        orders.start(Path::new(self.worker))
    }

    /// What is wrong with what the workers left.
    pub async fn wrong(&self) -> Vec<String> {
        let lines = journal::read(&self.journal());
        let (records, processes) = read_sqlite(&self.database()).await;
        let mut wrong = check(&lines, &records, &processes, &STEPS);
        if processes.len() != self.processes as usize {
            wrong.push(format!("{} processes instead of {}", processes.len(), self.processes));
        }
        wrong
    }

    /// Fails if anything is wrong.
    pub async fn check(&self) {
        let wrong = self.wrong().await;
        assert!(wrong.is_empty(), "{} things are wrong:\n{}", wrong.len(), wrong.join("\n"));
    }

    /// Waits until so many attempts have begun.
    pub async fn until_begun(&self, attempts: usize) {
        let begun = || {
            let lines = journal::read(&self.journal());
            lines.iter().filter(|line| matches!(line.what, What::Begin { .. })).count()
        };
        crate::until("attempts", async || begun() >= attempts).await;
    }

    /// Whether somebody holds the write lock for longer than any transaction takes.
    pub async fn is_write_locked(&self) -> bool {
        use sqlx::{ConnectOptions, Connection, Executor};
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(self.database());
        let mut connection = options.busy_timeout(Duration::from_millis(500)).connect().await.unwrap();
        let locked = connection.execute("BEGIN IMMEDIATE").await.is_err();
        connection.close().await.unwrap();
        locked
    }

    /// From now on, whoever is fenced while it owns processes is counted.
    pub async fn count_takeovers(&self) {
        self.sql(
            "CREATE TABLE taken_over (instance TEXT, processes INTEGER);
             CREATE TRIGGER count_takeovers AFTER UPDATE OF fenced_at ON durable_fences
                 WHEN OLD.fenced_at IS NULL AND NEW.fenced_at IS NOT NULL
             BEGIN
                 INSERT INTO taken_over SELECT NEW.instance, count(*) FROM durable_processes WHERE owner = NEW.instance;
             END",
        )
        .await;
    }

    /// How many processes were taken over from an instance that was fenced while it owned them.
    pub async fn taken_over(&self) -> i64 {
        use sqlx::{Connection, Row};
        let mut connection = sqlx::SqliteConnection::connect(&format!("sqlite://{}", self.database())).await.unwrap();
        let row = sqlx::query("SELECT coalesce(sum(processes), 0) FROM taken_over").fetch_one(&mut connection).await;
        row.unwrap().get(0)
    }

    /// Runs statements on the database.
    pub async fn sql(&self, sql: &'static str) {
        use sqlx::{Connection, Executor};
        let mut connection = sqlx::SqliteConnection::connect(&format!("sqlite://{}", self.database())).await.unwrap();
        connection.execute(sql).await.unwrap();
    }
}
