use durable_postgres::Postgres;
use sqlx::postgres::{PgConnectOptions, PgConnection};
use sqlx::{AssertSqlSafe, ConnectOptions, Executor};
use std::future::Future;

use crate::{Backend, Sql};

/// A schema of its own in the PostgreSQL database that `DURABLE_POSTGRES_URL` names; dropped with it.
pub struct PostgresSchema {
    url: String,
    name: String,
}

impl PostgresSchema {
    /// The database's address, or why there is none here.
    pub fn address() -> Result<String, String> {
        const URL: &str = "DURABLE_POSTGRES_URL";
        std::env::var(URL).map_err(|_| format!("{URL} is not set"))
    }

    /// Runs a test if there is a database, else says so.
    pub fn run(test: impl Future<Output = ()>) {
        match Self::address() {
            Ok(_) => crate::run(test),
            Err(why) => crate::not_run("postgres", &why),
        }
    }

    /// One in another database.
    pub fn on(url: &str) -> Self {
        Self::named(url, format!("test_{}", durable_core::RunId::new().0.simple()))
    }

    /// The same in a copy of its database.
    pub fn moved_to(&self, url: &str) -> Self {
        Self::named(url, self.name.clone())
    }

    fn named(url: &str, name: String) -> Self {
        // So that the sessions of one test can be told from those of others.
        let and = if url.contains('?') { '&' } else { '?' };
        // And the service's own tables stand beside the storage's.
        Self { url: format!("{url}{and}application_name={name}&options[search_path]={name}"), name }
    }

    /// The database's address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The schema's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A connection of the test's own, by another name than the storage's.
    pub async fn connect(&self) -> PgConnection {
        let options: PgConnectOptions = self.url.parse().unwrap();
        options.application_name("test").connect().await.unwrap()
    }

    /// All rows that a batch may touch, as text.
    pub async fn everything(&self) -> Vec<String> {
        self.texts(
            "SELECT p::text FROM {s}.processes p UNION ALL SELECT s::text FROM {s}.steps s UNION ALL
                 SELECT e::text FROM {s}.events e UNION ALL SELECT w::text FROM {s}.waiters w ORDER BY 1",
        )
        .await
    }

    /// SQL with `{s}` for the schema.
    pub fn sql(&self, sql: &str) -> AssertSqlSafe<String> {
        AssertSqlSafe(sql.replace("{s}", &self.name))
    }
}

impl Backend for PostgresSchema {
    type Storage = Postgres;
    async fn new() -> Self {
        Self::on(&Self::address().unwrap())
    }
    async fn storage(&self) -> Postgres {
        Postgres::connect(&self.url).schema(&self.name).await.unwrap()
    }
}

impl Sql for PostgresSchema {
    const PROCESSES: &'static str = "processes";
    const STEPS: &'static str = "steps";
    const FALSE: &'static str = "false";
    const INBOX: bool = true;
    const HIDE: &'static [&'static str] = &[
        "CREATE TEMP TABLE IF NOT EXISTS steps (dummy text)",
        "CREATE OR REPLACE FUNCTION pg_temp.now() RETURNS timestamptz LANGUAGE sql AS 'SELECT NULL::timestamptz'",
        "SET search_path = pg_temp, pg_catalog",
        "SET ROLE pg_monitor",
    ];
    const LEAVE: &'static [&'static str] = &[
        "SELECT pg_advisory_lock(4711)",
        "SET idle_in_transaction_session_timeout = 0",
        "SET client_encoding = 'LATIN1'",
        "LISTEN something",
        "PREPARE it AS SELECT 1",
    ];
    const CANCELS: &'static str =
        "UPDATE processes SET cancel_requested_at = now(), signals = signals + 1, signalled = true";
    type Connection = PgConnection;
    const BEGIN: &'static str = "BEGIN";
    async fn connection(&self) -> PgConnection {
        self.connect().await
    }
    async fn execute(&self, sql: &str) {
        let sql = self.sql(sql);
        Sql::connection(self).await.execute(sqlx::raw_sql(sql)).await.unwrap();
    }
    async fn number(&self, sql: &str) -> i64 {
        let mut connection = Sql::connection(self).await;
        sqlx::query_scalar(self.sql(sql)).fetch_one(&mut connection).await.unwrap()
    }
    async fn texts(&self, sql: &str) -> Vec<String> {
        let mut connection = Sql::connection(self).await;
        sqlx::query_scalar(self.sql(sql)).fetch_all(&mut connection).await.unwrap()
    }
}

impl Drop for PostgresSchema {
    fn drop(&mut self) {
        let (url, sql) = (self.url.clone(), self.sql("DROP SCHEMA IF EXISTS {s} CASCADE"));
        // In a thread of its own: whoever drops it may be on a runtime. What still runs there is not waited for long.
        let dropping = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let options: PgConnectOptions = url.parse().unwrap();
                let mut connection = options.connect().await?;
                connection.execute("SET lock_timeout = 2000").await?;
                connection.execute(sql).await
            })
        });
        let _ = dropping.join();
    }
}
