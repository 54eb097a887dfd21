use async_trait::async_trait;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, Row};
use std::path::Path;
use std::time::{Duration, Instant};

use super::Raw;
use crate::Error;

const NOW: &str = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')";

/// The engine's tables.
pub(crate) async fn lay_out(path: &Path) -> Result<(), Error> {
    let mut connection = options(path).connect().await?;
    connection.execute(AssertSqlSafe(durable_sqlite::schema_sql())).await?;
    Ok(connection.close().await?)
}

fn options(path: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(30))
}

pub(crate) struct Sqlite {
    connection: SqliteConnection,
    rows: u64,
}

impl Sqlite {
    pub(crate) async fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self { connection: options(path).connect().await?, rows: 0 })
    }

    fn run(&mut self) -> String {
        self.rows += 1;
        super::run(self.rows)
    }
}

const PROCESSES: &str =
    "INSERT INTO durable_processes (run, namespace, id, current, kind, status, owner, claim, calm_claim,
     wake_at, signals, signalled, input, input_digest, created_at, status_at";
const STEPS: &str =
    "INSERT INTO durable_steps (run, scope, name, key, op, state, payload, attempts, seq, claim, recorded_at)";

#[async_trait]
impl Raw for Sqlite {
    fn writer(&mut self, nth: usize) {
        self.rows = (nth as u64) << 32;
    }

    async fn single(&mut self, commits: usize) -> Result<Vec<Duration>, Error> {
        let sql = format!(
            "{STEPS}
             VALUES (?, 0, 'step', ?, 'step', 'done', '12345', 0, 1, 1, {NOW})"
        );
        let run = self.run();
        let mut times = Vec::with_capacity(commits);
        for n in 0..commits {
            let started = Instant::now();
            let query = sqlx::query(AssertSqlSafe(sql.as_str())).bind(&run).bind(n.to_string());
            query.execute(&mut self.connection).await?;
            times.push(started.elapsed());
        }
        Ok(times)
    }

    async fn batches(&mut self, processes: usize, steps: usize, rows: usize) -> Result<Duration, Error> {
        let sql = format!(
            "BEGIN IMMEDIATE;
             {PROCESSES})
             SELECT value->>0, 'default', value->>1, 1, 'steps', 'running', 'me', 1, 0, NULL, 0, 0, '5', 'digest',
                 {NOW}, {NOW} FROM json_each(?);
             {STEPS}
             SELECT value->>0, 0, 'step', value->>1, 'step', 'done', value->>2, 0, 1, 1, {NOW} FROM json_each(?);
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
            let query = sqlx::query(AssertSqlSafe(sql.as_str()))
                .bind(serde_json::to_string(&starts)?)
                .bind(serde_json::to_string(&records)?)
                .bind(serde_json::to_string(&ends)?);
            query.execute(&mut self.connection).await?;
        }
        Ok(started.elapsed())
    }

    async fn accounts(&mut self, accounts: usize) -> Result<(), Error> {
        let sql = format!(
            "CREATE TABLE accounts (account INTEGER PRIMARY KEY, cents INTEGER NOT NULL);
             INSERT INTO accounts WITH RECURSIVE s (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM s WHERE n + 1 < {accounts})
             SELECT n, 0 FROM s"
        );
        self.connection.execute(AssertSqlSafe(sql)).await?;
        Ok(())
    }

    async fn transactions(&mut self, account: usize, transactions: usize) -> Result<Duration, Error> {
        let sql = format!("{STEPS} VALUES (?, 0, 'step', ?, 'transaction', 'done', '12345', 0, 1, 1, {NOW})");
        let run = self.run();
        let started = Instant::now();
        for n in 0..transactions {
            let mut tx = self.connection.begin_with("BEGIN IMMEDIATE").await?;
            let update = sqlx::query("UPDATE accounts SET cents = cents - 1 WHERE account = ?");
            update.bind(i64::try_from(account)?).execute(&mut *tx).await?;
            let insert = sqlx::query(AssertSqlSafe(sql.as_str())).bind(&run).bind(n.to_string());
            insert.execute(&mut *tx).await?;
            tx.commit().await?;
        }
        Ok(started.elapsed())
    }

    async fn grow(&mut self, processes: usize) -> Result<(), Error> {
        let series = format!(
            "WITH RECURSIVE s (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM s WHERE n < {processes}),
             r (run, n) AS (SELECT '01890000-0000-7000-8000-' || printf('%012x', n), n FROM s)"
        );
        let sql = format!(
            "BEGIN IMMEDIATE;
             {PROCESSES}, finished_at, output) {series}
             SELECT run, 'default', 'old-' || n, 1, 'steps', 'completed', NULL, 1, 0, NULL, 0, 0, '5', 'digest',
                 {NOW}, {NOW}, {NOW}, '5' FROM r;
             {STEPS} {series} SELECT run, 0, 'step', '0', 'step', 'done', '12345', 0, 1, 1, {NOW} FROM r;
             COMMIT; ANALYZE; PRAGMA wal_checkpoint(TRUNCATE)"
        );
        self.connection.execute(AssertSqlSafe(sql)).await?;
        Ok(())
    }

    async fn ended_and_owned(&mut self, label: &str) -> Result<(usize, usize), Error> {
        let sql = "SELECT (SELECT count(*) FROM durable_processes WHERE finished_at IS NOT NULL),
             (SELECT count(*) FROM durable_processes WHERE owner IN
                 (SELECT instance FROM durable_instances WHERE label = ?))";
        let row = sqlx::query(sql).bind(label).fetch_one(&mut self.connection).await?;
        Ok((usize::try_from(row.get::<i64, _>(0))?, usize::try_from(row.get::<i64, _>(1))?))
    }

    async fn settings(&mut self) -> Result<String, Error> {
        let version: String = sqlx::query_scalar("SELECT sqlite_version()").fetch_one(&mut self.connection).await?;
        let number: i64 = sqlx::query_scalar("PRAGMA synchronous").fetch_one(&mut self.connection).await?;
        let mode: String = sqlx::query_scalar("PRAGMA journal_mode").fetch_one(&mut self.connection).await?;
        let synchronous = ["OFF", "NORMAL", "FULL", "EXTRA"];
        let synchronous = usize::try_from(number).ok().and_then(|at| synchronous.get(at)).unwrap_or(&"?");
        Ok(format!("SQLite {version}, journal_mode {mode}, synchronous {synchronous}"))
    }
}
