//! Databases that several programs share, and what a crash test wants to know of them.

use durable_core::storage::{RunId, Storage};
use durable_postgres::Postgres;
use std::time::Duration;

use super::check::{Ended, Recorded};
use crate::proxy::{Proxied, Proxy};
use crate::{PostgresSchema, Sql, SqliteFile};

/// A database that several programs share.
pub trait Shared: Sql<Storage: Storage> {
    /// The present, in SQL.
    const NOW: &'static str;
    /// SQL after which `taken_over` gets a row for each instance that is fenced: how many processes it owns, and for how
    /// many milliseconds it has been silent.
    const COUNT_TAKEOVERS: &'static str;
    /// How many processes were taken over from an instance that was fenced while it owned them.
    fn taken_over(&self) -> impl Future<Output = i64> + Send {
        async { self.number("SELECT CAST(coalesce(sum(processes), 0) AS BIGINT) FROM taken_over").await }
    }
    /// Its address, for a worker.
    fn worker_address(&self) -> String;
    /// Whether somebody holds on to a transaction for longer than any takes.
    fn is_held(&self) -> impl Future<Output = bool> + Send;
}

impl Shared for SqliteFile {
    const NOW: &'static str = "strftime('%Y-%m-%dT%H:%M:%fZ', 'now')";
    const COUNT_TAKEOVERS: &'static str = "
        CREATE TABLE taken_over (processes INTEGER, silent INTEGER);
        CREATE TRIGGER count_takeovers AFTER UPDATE OF fenced_at ON durable_fences
            WHEN OLD.fenced_at IS NULL AND NEW.fenced_at IS NOT NULL
        BEGIN
            INSERT INTO taken_over SELECT count(*), (SELECT (julianday('now') - julianday(heartbeat_at)) * 86400000
                FROM durable_instances WHERE instance = NEW.instance)
            FROM durable_processes WHERE owner = NEW.instance;
        END";
    fn worker_address(&self) -> String {
        self.path()
    }
    async fn is_held(&self) -> bool {
        use sqlx::{ConnectOptions, Connection, Executor};
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(self.path());
        let mut connection = options.busy_timeout(Duration::from_millis(500)).connect().await.unwrap();
        let locked = connection.execute("BEGIN IMMEDIATE").await.is_err();
        connection.close().await.unwrap();
        locked
    }
}

impl Shared for PostgresSchema {
    const NOW: &'static str = "now()";
    const COUNT_TAKEOVERS: &'static str = "
        CREATE TABLE {s}.taken_over (processes bigint, silent bigint);
        CREATE FUNCTION {s}.count_takeovers() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO {s}.taken_over SELECT count(*), (SELECT extract(epoch FROM clock_timestamp() - heartbeat_at) * 1000
                FROM {s}.instances WHERE instance = NEW.instance)
            FROM {s}.processes WHERE owner = NEW.instance;
            RETURN NULL;
        END $$;
        CREATE TRIGGER count_takeovers AFTER UPDATE OF fenced_at ON {s}.fences FOR EACH ROW
            WHEN (OLD.fenced_at IS NULL AND NEW.fenced_at IS NOT NULL) EXECUTE FUNCTION {s}.count_takeovers()";
    /// With the schema as its fragment.
    fn worker_address(&self) -> String {
        format!("{}#{}", self.url(), self.name())
    }
    async fn is_held(&self) -> bool {
        let held = async || {
            self.texts(&format!(
                "SELECT concat_ws(' ', pid, state_change) FROM pg_stat_activity
                 WHERE application_name = '{}' AND state = 'idle in transaction'",
                self.name()
            ))
            .await
        };
        let first = held().await;
        if first.is_empty() {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        held().await.iter().any(|session| first.contains(session))
    }
}

impl Proxied for PostgresSchema {
    const STRIDE: usize = 1;
    fn literal(run: RunId) -> String {
        format!("'{run}'")
    }
    async fn proxy(&self) -> Proxy {
        Proxy::before(self.url()).await
    }
    async fn through(&self, proxy: &Proxy) -> Postgres {
        Self::storage_at(&format!("{}#{}", proxy.url, self.name()), false).await
    }
    async fn alone_through(&self, proxy: &Proxy) -> Postgres {
        Postgres::connect(&proxy.url).schema(self.name()).listen(false).await.unwrap()
    }
}

impl PostgresSchema {
    /// The storage at the address of a worker.
    pub async fn storage_at(address: &str, defaults: bool) -> Postgres {
        let (url, schema) = address.rsplit_once('#').expect("url#schema");
        let connect = Postgres::connect(url).schema(schema);
        // Below half of the tests' expiry, as is the default below half of the hosts'.
        let connect = if defaults { connect } else { connect.idle_in_transaction_timeout(Duration::from_millis(800)) };
        connect.await.unwrap()
    }
}

/// What the checker needs of a database.
pub async fn read<B: Sql>(backend: &B) -> (Vec<Recorded>, Vec<Ended>) {
    let (processes, steps) = (B::PROCESSES, B::STEPS);
    // Neither a name nor an id has a line feed in it.
    let records = format!(
        "SELECT concat(p.id, '\n', s.name, '\n', s.claim, '\n', s.attempts) FROM {steps} s JOIN {processes} p
             ON p.run = s.run
         WHERE s.op = 'step' AND s.state = 'done' ORDER BY p.id, s.name"
    );
    let record = |line: String| {
        let parts: Vec<&str> = line.split('\n').collect();
        let (claim, attempts) = (parts[2].parse().unwrap(), parts[3].parse().unwrap());
        Recorded { id: parts[0].into(), step: parts[1].into(), claim, attempts }
    };
    let ended = format!("SELECT concat(id, '\n', status, '\n', claim) FROM {processes} ORDER BY id");
    let process = |line: String| {
        let parts: Vec<&str> = line.split('\n').collect();
        Ended { id: parts[0].into(), status: parts[1].into(), claims: parts[2].parse().unwrap() }
    };
    let records = backend.texts(&records).await.into_iter().map(record).collect();
    (records, backend.texts(&ended).await.into_iter().map(process).collect())
}
