use async_trait::async_trait;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, Row};
use std::time::{Duration, Instant};
use uuid::Uuid;

use super::Raw;
use crate::Error;

/// The engine's tables.
pub(crate) async fn lay_out(url: &str, schema: &str) -> Result<(), Error> {
    let mut connection = connect(url).await?;
    connection.execute(AssertSqlSafe(durable_postgres::schema_sql(schema)?)).await?;
    Ok(connection.close().await?)
}

async fn connect(url: &str) -> Result<PgConnection, Error> {
    let mut connection: PgConnection = url.parse::<PgConnectOptions>()?.connect().await?;
    // As in the engine's sessions: plans for large tables, made once.
    let settings = "SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off; SET enable_hashjoin = off;
        SET enable_mergejoin = off; SET jit = off";
    connection.execute(settings).await?;
    Ok(connection)
}

pub(crate) struct Postgres {
    connection: PgConnection,
    schema: String,
    rows: u64,
}

impl Postgres {
    pub(crate) async fn open(url: &str, schema: &str) -> Result<Self, Error> {
        Ok(Self { connection: connect(url).await?, schema: schema.to_owned(), rows: 0 })
    }

    fn run(&mut self) -> Result<Uuid, Error> {
        self.rows += 1;
        Ok(super::run(self.rows).parse()?)
    }

    fn processes(&self) -> String {
        format!(
            "INSERT INTO {}.processes (run, namespace, id, current, kind, status, owner, claim, calm_claim, wake_at, signals,
                 signalled, awaited, input, input_digest, created_at, status_at",
            self.schema
        )
    }

    fn steps(&self) -> String {
        format!(
            "INSERT INTO {}.steps (run, scope, name, key, op, state, payload, attempts, seq, claim, recorded_at)",
            self.schema
        )
    }
}

#[async_trait]
impl Raw for Postgres {
    fn writer(&mut self, nth: usize) {
        self.rows = (nth as u64) << 32;
    }

    async fn single(&mut self, commits: usize) -> Result<Vec<Duration>, Error> {
        let sql =
            format!("{} VALUES ($1, 0, 'step', $2, 'step', 'done', '12345', 0, 1, 1, clock_timestamp())", self.steps());
        let run = self.run()?;
        let mut times = Vec::with_capacity(commits);
        for n in 0..commits {
            let started = Instant::now();
            let query = sqlx::query(AssertSqlSafe(sql.as_str())).bind(run).bind(n.to_string());
            query.execute(&mut self.connection).await?;
            times.push(started.elapsed());
        }
        Ok(times)
    }

    /// In one statement a batch, which starts processes and records their steps; it ends those of the batch before, since
    /// no statement sees rows of its own.
    async fn batches(&mut self, processes: usize, steps: usize, rows: usize) -> Result<Duration, Error> {
        let (insert, record, schema) = (self.processes(), self.steps(), &self.schema);
        let sql = format!(
            "WITH started AS (
                 {insert})
                 SELECT run, 'default', id, true, 'steps', 'running', $1, 1, 0, NULL, 0, false, false, '5', 'digest',
                     clock_timestamp(), clock_timestamp() FROM unnest($2::uuid[], $3::text[]) AS s (run, id)),
             recorded AS (
                 {record}
                 SELECT run, 0, 'step', key, 'step', 'done', payload::json, 0, 1, 1, clock_timestamp()
                 FROM unnest($4::uuid[], $5::text[], $6::text[]) AS r (run, key, payload))
             UPDATE {schema}.processes SET status = 'completed', output = '5', owner = NULL,
                 status_at = clock_timestamp(), finished_at = clock_timestamp() WHERE run = ANY ($7::uuid[])"
        );
        let started = Instant::now();
        let at_once = (rows / (steps + 2)).max(1);
        let owner = Uuid::nil();
        let mut left = processes;
        let mut before: Vec<Uuid> = Vec::new();
        while left > 0 || !before.is_empty() {
            let now = left.min(at_once);
            left -= now;
            let runs = (0..now).map(|_| self.run()).collect::<Result<Vec<Uuid>, Error>>()?;
            let ids: Vec<String> = runs.iter().map(|run| format!("many-{run}")).collect();
            let records: Vec<(Uuid, String)> =
                runs.iter().flat_map(|run| (0..steps).map(move |n| (*run, n.to_string()))).collect();
            let (of, keys): (Vec<Uuid>, Vec<String>) = records.into_iter().unzip();
            let payloads = vec!["12345"; keys.len()];
            let query = sqlx::query(AssertSqlSafe(sql.as_str())).bind(owner).bind(&runs).bind(ids);
            let query = query.bind(of).bind(keys).bind(payloads).bind(before);
            query.execute(&mut self.connection).await?;
            before = runs;
        }
        Ok(started.elapsed())
    }

    async fn accounts(&mut self, accounts: usize) -> Result<(), Error> {
        let schema = &self.schema;
        let sql = format!(
            "CREATE TABLE {schema}.accounts (account bigint PRIMARY KEY, cents bigint NOT NULL) WITH (fillfactor = 10);
             INSERT INTO {schema}.accounts SELECT n, 0 FROM generate_series(0, {accounts} - 1) AS n"
        );
        self.connection.execute(AssertSqlSafe(sql)).await?;
        Ok(())
    }

    async fn transactions(&mut self, account: usize, transactions: usize) -> Result<Duration, Error> {
        let update = format!("UPDATE {}.accounts SET cents = cents - 1 WHERE account = $1", self.schema);
        let insert = format!(
            "{} VALUES ($1, 0, 'step', $2, 'transaction', 'done', '12345', 0, 1, 1, clock_timestamp())",
            self.steps()
        );
        let (run, account) = (self.run()?, i64::try_from(account)?);
        let started = Instant::now();
        for n in 0..transactions {
            let mut tx = self.connection.begin().await?;
            sqlx::query(AssertSqlSafe(update.as_str())).bind(account).execute(&mut *tx).await?;
            let insert = sqlx::query(AssertSqlSafe(insert.as_str())).bind(run).bind(n.to_string());
            insert.execute(&mut *tx).await?;
            tx.commit().await?;
        }
        Ok(started.elapsed())
    }

    async fn grow(&mut self, processes: usize) -> Result<(), Error> {
        let (insert, record, schema) = (self.processes(), self.steps(), &self.schema);
        let series = format!(
            "SELECT ('01890000-0000-7000-8000-' || lpad(to_hex(n), 12, '0'))::uuid AS run, n
             FROM generate_series(1, {processes}) AS n"
        );
        let sql = format!(
            "{insert}, finished_at, output)
             SELECT run, 'default', 'old-' || n, true, 'steps', 'completed', NULL, 1, 0, NULL, 0, false, false, '5',
                 'digest', now(), now(), now(), '5' FROM ({series}) AS s;
             {record} SELECT run, 0, 'step', '0', 'step', 'done', '12345', 0, 1, 1, now() FROM ({series}) AS s"
        );
        self.connection.execute(AssertSqlSafe(sql)).await?;
        let vacuum = format!("VACUUM ANALYZE {schema}.processes, {schema}.steps");
        self.connection.execute(AssertSqlSafe(vacuum)).await?;
        Ok(())
    }

    async fn ended_and_owned(&mut self, label: &str) -> Result<(usize, usize), Error> {
        let schema = &self.schema;
        let sql = format!(
            "SELECT (SELECT count(*) FROM {schema}.processes WHERE finished_at IS NOT NULL),
                 (SELECT count(*) FROM {schema}.processes WHERE owner IN
                     (SELECT instance FROM {schema}.instances WHERE label = $1))"
        );
        let row = sqlx::query(AssertSqlSafe(sql)).bind(label).fetch_one(&mut self.connection).await?;
        Ok((usize::try_from(row.get::<i64, _>(0))?, usize::try_from(row.get::<i64, _>(1))?))
    }

    async fn settings(&mut self) -> Result<String, Error> {
        let names = ["server_version", "fsync", "synchronous_commit", "full_page_writes"];
        let mut words = String::from("PostgreSQL");
        for (at, name) in names.into_iter().enumerate() {
            let setting = sqlx::query_scalar("SELECT current_setting($1)").bind(name);
            let setting: String = setting.fetch_one(&mut self.connection).await?;
            words.push_str(&if at == 0 { format!(" {setting}") } else { format!(", {name} {setting}") });
        }
        Ok(words)
    }
}
