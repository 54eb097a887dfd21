//! The database without the engine: the same tables, the same settings, the best way we know to write the same rows.

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{ConnectOptions, Executor};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::Error;

const NOW: &str = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')";

pub(crate) struct Raw {
    connection: SqliteConnection,
    rows: u64,
}

impl Raw {
    pub(crate) async fn open(path: &Path) -> Result<Self, Error> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full);
        let mut connection = options.connect().await?;
        connection.execute(sqlx::AssertSqlSafe(durable_sqlite::schema_sql())).await?;
        Ok(Self { connection, rows: 0 })
    }

    fn run(&mut self) -> String {
        self.rows += 1;
        format!("01990000-0000-7000-8000-{:012x}", self.rows)
    }

    /// One row, one commit. How long each took.
    pub(crate) async fn single(&mut self, commits: usize) -> Result<Vec<Duration>, Error> {
        let sql = format!(
            "INSERT INTO durable_steps (run, scope, name, key, op, state, payload, attempts, claim, recorded_at)
             VALUES (?, 0, 'step', ?, 'step', 'done', '12345', 0, 1, {NOW})"
        );
        let run = self.run();
        let mut times = Vec::with_capacity(commits);
        for n in 0..commits {
            let started = Instant::now();
            let query = sqlx::query(sqlx::AssertSqlSafe(sql.as_str())).bind(&run).bind(n.to_string());
            query.execute(&mut self.connection).await?;
            times.push(started.elapsed());
        }
        Ok(times)
    }

    /// What `many` writes: rows of processes, of their steps, and the processes' ends, so many rows a commit.
    pub(crate) async fn batches(&mut self, processes: usize, steps: usize, rows: usize) -> Result<Duration, Error> {
        let sql = format!(
            "BEGIN IMMEDIATE;
             INSERT INTO durable_processes (run, namespace, id, current, kind, status, owner, claim, calm_claim, wake_at,
                 signals, signalled, input, input_digest, created_at, status_at)
             SELECT value->>0, 'default', value->>1, 1, 'steps', 'running', 'me', 1, 0, NULL, 0, 0, '5', 'digest',
                 {NOW}, {NOW} FROM json_each(?);
             INSERT INTO durable_steps (run, scope, name, key, op, state, payload, attempts, claim, recorded_at)
             SELECT value->>0, 0, 'step', value->>1, 'step', 'done', value->>2, 0, 1, {NOW} FROM json_each(?);
             UPDATE durable_processes SET status = 'completed', output = '5', owner = NULL, status_at = {NOW},
                 finished_at = {NOW} WHERE run IN (SELECT value->>0 FROM json_each(?));
             COMMIT"
        );
        let started = Instant::now();
        let at_once = (rows / (steps + 2)).max(1);
        let mut left = processes;
        while left > 0 {
            let now = left.min(at_once);
            left -= now;
            let runs: Vec<String> = (0..now).map(|_| self.run()).collect();
            let starts: Vec<_> = runs.iter().map(|run| (run, format!("many-{run}"))).collect();
            let records: Vec<_> =
                runs.iter().flat_map(|run| (0..steps).map(move |n| (run, n.to_string(), "12345"))).collect();
            let ends: Vec<_> = runs.iter().map(|run| (run,)).collect();
            let query = sqlx::query(sqlx::AssertSqlSafe(sql.as_str()))
                .bind(serde_json::to_string(&starts)?)
                .bind(serde_json::to_string(&records)?)
                .bind(serde_json::to_string(&ends)?);
            query.execute(&mut self.connection).await?;
        }
        Ok(started.elapsed())
    }
}
