use async_trait::async_trait;
use durable_core::storage::{
    Committed, Ending, InstanceId, Open, Record, RecordKey, RecordOp, RecordState, Result, RolledBack, RunId, Slot,
    Storage, StorageError, Transactional, source,
};
use durable_core::{Name, Process, Transaction, Typed};
use sqlx::Executor;
use sqlx::postgres::PgConnection;
use std::error::Error;
use std::future::Future;
use std::time::Duration;

use crate::Postgres;
use crate::errors::{code, passes, reading, sort};
use crate::lend::Home;
use crate::names::Schema;
use crate::rows::get;
use crate::session::{self, Bounds, Whose};
use crate::sql::{Commits, Sql};

/// `proc.transaction(…)`: steps whose SQL commits with their record.
pub trait Transactions {
    /// A step whose SQL and whose record are one transaction: **exactly once**. See [`Transaction`].
    ///
    /// `tx` is an open transaction on a connection of the storage's own, in the database that it was given; statements
    /// run on `&mut *tx`. What the statements set (`search_path`, the role) is undone at its end. The server ends a
    /// transaction that waits for this program beyond its deadline.
    ///
    /// ```
    /// use durable_postgres::{Failure, Process, Transactions};
    ///
    /// async fn debit(proc: &Process, account: i64, cents: i64) -> Result<i64, Failure> {
    ///     let left = proc
    ///         .transaction("debit", async |mut tx| {
    ///             sqlx::query("UPDATE accounts SET cents = cents - $1 WHERE id = $2")
    ///                 .bind(cents)
    ///                 .bind(account)
    ///                 .execute(&mut *tx)
    ///                 .await?;
    ///             sqlx::query_scalar("SELECT cents FROM accounts WHERE id = $1").bind(account).fetch_one(&mut *tx).await
    ///         })
    ///         .failure()
    ///         .await?;
    ///     Ok(left)
    /// }
    /// ```
    #[track_caller]
    fn transaction<F, Fut, T, E>(&self, name: impl Into<Name>, statements: F) -> Transaction<'_, Postgres, F, Typed>
    where
        F: FnMut(Tx) -> Fut + Send,
        Fut: Future<Output = Result<T, E>> + Send,
        T: Send,
        E: Send;
}

impl Transactions for Process {
    #[track_caller]
    fn transaction<F, Fut, T, E>(&self, name: impl Into<Name>, statements: F) -> Transaction<'_, Postgres, F, Typed>
    where
        F: FnMut(Tx) -> Fut + Send,
        Fut: Future<Output = Result<T, E>> + Send,
        T: Send,
        E: Send,
    {
        Transaction::new(self, name, statements)
    }
}

/// An open transaction of PostgreSQL's, in the hands of a step's closure.
pub type Tx = durable_core::storage::Tx<PgConnection>;

#[async_trait]
impl Transactional for Postgres {
    type Tx = Tx;

    async fn begin(&self, idle: Duration) -> Result<Open<Tx>> {
        let mut lent = self.0.transactions.lend().await?;
        // The savepoint is there as long as the transaction is.
        let begin = format!(
            "BEGIN; SET LOCAL idle_in_transaction_session_timeout = {}; SAVEPOINT durable_transaction",
            idle.as_millis().max(1)
        );
        let begun = lent.connection.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(begin))).await;
        if let Err(error) = begun {
            return lent.done(Err(reading(error)));
        }
        let (tx, slot) = Tx::new(lent.connection);
        let (schema, bounds) = (self.0.schema.clone(), self.0.transactions.options().bounds);
        Ok(Open { tx, ending: Box::new(PgEnding { slot, home: lent.home, schema, bounds }) })
    }

    async fn settled(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>> {
        // A commit that is on its way holds the process's row.
        let mut sql = Sql::default();
        let (schema, run_arg) = (&self.0.schema, sql.bind(run.0));
        sql.text = format!("SELECT 1 FROM {schema}.processes WHERE run = {run_arg} FOR NO KEY UPDATE");
        self.run(sql).await?;
        self.record(run, key).await
    }
}

struct PgEnding {
    slot: Slot<PgConnection>,
    home: Home,
    schema: Schema,
    bounds: Bounds,
}

#[async_trait]
impl Ending for PgEnding {
    async fn commit(self: Box<Self>, instance: InstanceId, record: &RecordOp) -> Result<Committed> {
        const NO_SUCH_SAVEPOINT: &str = "3B001";
        const NO_TRANSACTION: &str = "25P01";
        const ABORTED: &str = "25P02";
        let Some(mut connection) = self.slot.take() else { return Ok(Committed::Escaped) };
        // What the closure has set must not decide where the record goes, and who writes it.
        // Nor may it take the bounds off what is locked from here on, nor lessen what a commit promises.
        let regain = format!(
            "RELEASE SAVEPOINT durable_transaction; RESET SESSION AUTHORIZATION; RESET ROLE;
             SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL client_encoding = 'UTF8';
             SET LOCAL synchronous_commit TO DEFAULT; SET LOCAL idle_in_transaction_session_timeout = {};
             SET LOCAL lock_timeout = {}; SET LOCAL statement_timeout = {}",
            self.bounds.idle_in_transaction.as_millis().max(1),
            self.bounds.lock.as_millis().max(1),
            self.bounds.statement.as_millis().max(1)
        );
        if let Err(error) = connection.execute(sqlx::raw_sql(sqlx::AssertSqlSafe(regain))).await {
            return match code(&error).as_deref() {
                Some(NO_SUCH_SAVEPOINT | NO_TRANSACTION) => Ok(Committed::Escaped),
                Some(ABORTED) => Ok(Committed::Aborted),
                _ => Err(reading(error)),
            };
        }
        let committed = commit(&mut connection, &self.schema, instance, record).await;
        if committed.is_ok() {
            give_back(self.home, connection, self.bounds);
        }
        committed
    }

    async fn rollback(self: Box<Self>) -> Result<RolledBack> {
        const NO_SUCH_SAVEPOINT: &str = "3B001";
        const NO_TRANSACTION: &str = "25P01";
        let Some(mut connection) = self.slot.take() else { return Ok(RolledBack::Escaped) };
        // Whether it is aborted, and whether it is there at all, must be known before it is ended.
        let aborted = match connection.execute(sqlx::raw_sql("RELEASE SAVEPOINT durable_transaction")).await {
            Ok(_) => false,
            Err(error) => match code(&error).as_deref() {
                Some(NO_SUCH_SAVEPOINT | NO_TRANSACTION) => return Ok(RolledBack::Escaped),
                Some(_) => true,
                None => return Err(reading(error)),
            },
        };
        connection.execute(sqlx::raw_sql("ROLLBACK")).await.map_err(reading)?;
        if aborted {
            // It may be the connection's fault: a plan that it keeps and that no longer fits, say.
            return Ok(RolledBack::Aborted);
        }
        give_back(self.home, connection, self.bounds);
        Ok(RolledBack::Open)
    }

    fn is_transient(&self, error: &(dyn Error + 'static)) -> Option<bool> {
        source(error).map(passes)
    }
}

/// Undoes what the closure has set for the session, behind the back of whoever waits, and keeps the connection if that
/// works.
fn give_back(home: Home, mut connection: PgConnection, bounds: Bounds) {
    tokio::spawn(async move {
        // Not `DISCARD ALL`, which would take the statements that the driver keeps.
        let reset = "RESET SESSION AUTHORIZATION; RESET ROLE; RESET ALL; CLOSE ALL; UNLISTEN *; DISCARD TEMP;
            SELECT pg_catalog.pg_advisory_unlock_all()";
        let reset = connection.execute(sqlx::raw_sql(reset)).await;
        if reset.is_ok() && session::set(&mut connection, bounds, Whose::Service).await.is_ok() {
            home.keep(connection);
        }
    });
}

/// Writes the record and commits, or finds out why not and rolls back.
///
/// The locks are held until the commit: on the fence, against a take-over; on the process's row, against the cancellation
/// being recorded, and for whoever must know whether this commit is still on its way.
async fn commit(
    connection: &mut PgConnection,
    schema: &Schema,
    instance: InstanceId,
    record: &RecordOp,
) -> Result<Committed> {
    let rows = insert(schema, instance, record).run(connection, Commits::No).await?;
    if !rows.is_empty() {
        return match connection.execute(sqlx::raw_sql("COMMIT")).await {
            Ok(_) => Ok(Committed::Recorded),
            Err(error) => match sort(error, true) {
                StorageError::Refused(why) => Ok(Committed::Refused(why.to_string())),
                error => Err(error),
            },
        };
    }
    let rows = reason(schema, instance, record).run(connection, Commits::No).await?;
    let row = rows.first().ok_or_else(|| StorageError::schema("no answer"))?;
    let (state, alive, owned) = (get::<Option<String>>(row, 0)?, get::<bool>(row, 1)?, get::<bool>(row, 2)?);
    connection.execute(sqlx::raw_sql("ROLLBACK")).await.map_err(reading)?;
    if !alive {
        Err(StorageError::Fenced)
    } else if state.is_some_and(|state| state != RecordState::Pending.as_str()) {
        Ok(Committed::Exists)
    } else if owned {
        Ok(Committed::Cancelled)
    } else {
        Ok(Committed::Lost)
    }
}

pub(crate) fn insert(schema: &Schema, instance: InstanceId, record: &RecordOp) -> Sql {
    let RecordOp { run, claim, key, op, state, payload, attempts, .. } = record;
    let mut sql = Sql::default();
    let (me, run, claim) = (sql.bind(instance.0), sql.bind(run.0), sql.bind(*claim));
    let (scope, name, key) = (sql.bind(key.scope as i16), sql.bind(&*key.name), sql.bind(&*key.key));
    let (op, state, payload) = (sql.bind(op.as_str()), sql.bind(state.as_str()), sql.bind(&**payload));
    let attempts = sql.bind(*attempts);
    sql.text = format!(
        "WITH fence AS MATERIALIZED (SELECT 1 FROM {schema}.fences WHERE instance = {me} AND fenced_at IS NULL FOR SHARE),
         owned AS MATERIALIZED (SELECT p.run, p.claim FROM {schema}.processes p
             WHERE p.run = {run} AND p.owner IS NOT DISTINCT FROM {me} AND p.claim = {claim}
                 AND ({scope} = 1 OR p.cancelled_at IS NULL) AND EXISTS (SELECT 1 FROM fence) FOR SHARE)
         INSERT INTO {schema}.steps AS s (run, scope, name, key, op, state, payload, attempts, claim, recorded_at)
         SELECT o.run, {scope}, {name}, {key}, {op}, {state}, {payload}::json, {attempts}, o.claim, now() FROM owned o
         ON CONFLICT (run, scope, name, key) DO UPDATE SET op = excluded.op, state = excluded.state,
             payload = excluded.payload, attempts = excluded.attempts, claim = excluded.claim,
             recorded_at = excluded.recorded_at
         WHERE s.state = 'pending'
         RETURNING 1"
    );
    sql
}

/// Why nothing was written.
pub(crate) fn reason(schema: &Schema, instance: InstanceId, record: &RecordOp) -> Sql {
    let RecordOp { run, claim, key, .. } = record;
    let mut sql = Sql::default();
    let (me, run, claim) = (sql.bind(instance.0), sql.bind(run.0), sql.bind(*claim));
    let (scope, name, key) = (sql.bind(key.scope as i16), sql.bind(&*key.name), sql.bind(&*key.key));
    sql.text = format!(
        "SELECT (SELECT s.state FROM {schema}.steps s WHERE s.run = {run} AND s.scope = {scope} AND s.name = {name}
                 AND s.key = {key}),
             EXISTS (SELECT 1 FROM {schema}.fences WHERE instance = {me} AND fenced_at IS NULL),
             EXISTS (SELECT 1 FROM {schema}.processes p WHERE p.run = {run} AND p.owner IS NOT DISTINCT FROM {me}
                 AND p.claim = {claim})"
    );
    sql
}
