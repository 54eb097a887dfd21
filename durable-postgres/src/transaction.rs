use async_trait::async_trait;
use durable_core::storage::{
    Committed, Ending, InstanceId, Open, Record, RecordKey, RecordOp, RecordState, Result, RolledBack, RunId, Slot,
    StorageError, Transactional, source,
};
use durable_core::{AsFailure, IntoFailure, Name, Process, Transaction};
use futures_util::TryStreamExt;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Either, Executor};
use std::error::Error;
use std::future::Future;
use std::time::Duration;

use crate::Postgres;
use crate::errors::{code, passes, reading, sort};
use crate::lend::{Home, unavailable, unknown, within};
use crate::names::Schema;
use crate::read;
use crate::rows::get;
use crate::session::{self, Bounds, Whose};
use crate::sql::{Commits, Sql, literal, uuid};

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
    ///         .await?;
    ///     Ok(left)
    /// }
    /// ```
    #[track_caller]
    fn transaction<F, Fut, T, E>(
        &self,
        name: impl Into<Name>,
        statements: F,
    ) -> Transaction<'_, Postgres, F, AsFailure>
    where
        F: FnMut(Tx) -> Fut + Send,
        Fut: Future<Output = Result<T, E>> + Send,
        T: Send,
        E: IntoFailure;
}

impl Transactions for Process {
    #[track_caller]
    fn transaction<F, Fut, T, E>(&self, name: impl Into<Name>, statements: F) -> Transaction<'_, Postgres, F, AsFailure>
    where
        F: FnMut(Tx) -> Fut + Send,
        Fut: Future<Output = Result<T, E>> + Send,
        T: Send,
        E: IntoFailure,
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
        let (schema, bounds) = (self.0.schema.clone(), self.0.transactions.bounds());
        let begins = lent.connection.execute(sqlx::raw_sql(AssertSqlSafe(begin)));
        let begun = within(bounds.answer(), unavailable, async { begins.await.map_err(reading) }).await;
        if let Err(error) = begun {
            return lent.done(Err(error));
        }
        let (tx, slot) = Tx::new(lent.connection);
        let prepared = self.0.transactions.options().prepares.is_some();
        Ok(Open { tx, ending: Box::new(PgEnding { slot, home: lent.home, schema, bounds, prepared }) })
    }

    async fn settled(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>> {
        // A commit that is on its way holds the process's row.
        let mut sql = Sql::default();
        let (schema, run_arg) = (&self.0.schema, sql.bind(run.0));
        sql.text = format!("SELECT 1 FROM {schema}.processes WHERE run = {run_arg} FOR NO KEY UPDATE");
        self.run(sql).await?;
        read::recorded(&self.run(read::record_statement(schema, run, key)).await?)
    }
}

struct PgEnding {
    slot: Slot<PgConnection>,
    home: Home,
    schema: Schema,
    bounds: Bounds,
    /// The session has the statement that writes the record.
    prepared: bool,
}

/// Fails if the transaction is not there, or aborted.
const FOUND: &str = "RELEASE SAVEPOINT durable_transaction";
const NO_SUCH_SAVEPOINT: &str = "3B001";
const NO_TRANSACTION: &str = "25P01";
const ABORTED: &str = "25P02";
const NO_SUCH_STATEMENT: &str = "26000";
/// A division by zero.
const NOTHING_WRITTEN: &str = "22012";
/// Undoes a record that failed.
const BACK: &str = "ROLLBACK TO SAVEPOINT durable_record";

#[async_trait]
impl Ending for PgEnding {
    async fn commit(self: Box<Self>, instance: InstanceId, record: &RecordOp) -> Result<Committed> {
        within(self.bounds.answer(), unknown, self.write(instance, record)).await
    }

    async fn rollback(self: Box<Self>) -> Result<RolledBack> {
        within(self.bounds.answer(), unavailable, self.undo()).await
    }

    fn is_transient(&self, error: &(dyn Error + 'static)) -> Option<bool> {
        source(error).map(passes)
    }
}

impl PgEnding {
    async fn write(self, instance: InstanceId, record: &RecordOp) -> Result<Committed> {
        let Self { slot, home, schema, bounds, prepared } = self;
        let Some(mut connection) = slot.take() else { return Ok(Committed::Escaped) };
        let mut statements = vec![FOUND.to_owned()];
        statements.extend(regained(bounds));
        statements.push("SAVEPOINT durable_record".to_owned());
        let mut executes = prepared;
        loop {
            let inserts = statements.len();
            statements.push(if executes {
                execute(&schema, instance, record)
            } else {
                insert(&schema, instance, record)
            });
            let commits = statements.len();
            statements.push("COMMIT".to_owned());
            statements.extend(cleared(bounds));
            let Err((done, error)) = run_all(&mut connection, statements).await else {
                if executes == prepared {
                    home.keep(connection);
                }
                return Ok(Committed::Recorded);
            };
            return match code(&error).as_deref() {
                // The connection is not as the next one needs it, and goes.
                _ if done > commits => Ok(Committed::Recorded),
                Some(NO_SUCH_SAVEPOINT | NO_TRANSACTION) if done == 0 => Ok(Committed::Escaped),
                Some(ABORTED) if done == 0 => Ok(Committed::Aborted),
                Some(NO_SUCH_STATEMENT) if executes && done == inserts => {
                    // The closure has thrown it away.
                    executes = false;
                    statements = vec![BACK.to_owned()];
                    continue;
                }
                Some(NOTHING_WRITTEN) if done == inserts => {
                    let why = why(&mut connection, &schema, instance, record).await?;
                    if run_all(&mut connection, ending(["ROLLBACK"], bounds)).await.is_ok() {
                        home.keep(connection);
                    }
                    Ok(why)
                }
                Some(_) if done < commits => Err(reading(error)),
                // If it is the connection that is lost, the server may yet come to the commit.
                _ => match sort(error, true) {
                    StorageError::Refused(why) => Ok(Committed::Refused(why.to_string())),
                    error => Err(error),
                },
            };
        }
    }

    async fn undo(self) -> Result<RolledBack> {
        let Self { slot, home, bounds, .. } = self;
        let Some(mut connection) = slot.take() else { return Ok(RolledBack::Escaped) };
        // Whether it is aborted, and whether it is there at all, must be known before it is ended.
        match run_all(&mut connection, ending([FOUND, "ROLLBACK"], bounds)).await {
            Ok(()) => {
                home.keep(connection);
                Ok(RolledBack::Open)
            }
            Err((2.., _)) => Ok(RolledBack::Open),
            Err((1, error)) => Err(reading(error)),
            Err((_, error)) => match code(&error).as_deref() {
                Some(NO_SUCH_SAVEPOINT | NO_TRANSACTION) => Ok(RolledBack::Escaped),
                Some(_) => {
                    connection.execute("ROLLBACK").await.map_err(reading)?;
                    // The connection goes. It may be its fault: a plan that it keeps and that no longer fits, say.
                    Ok(RolledBack::Aborted)
                }
                None => Err(reading(error)),
            },
        }
    }
}

/// Runs statements in one round trip, none after one that fails. Of an error, says how many went before it.
async fn run_all(
    connection: &mut PgConnection,
    statements: Vec<String>,
) -> std::result::Result<(), (usize, sqlx::Error)> {
    // Put together from constants of this crate, the schema's checked name, and literals.
    let mut answers = connection.fetch_many(sqlx::raw_sql(AssertSqlSafe(statements.join("; "))));
    let mut done = 0;
    loop {
        match answers.try_next().await {
            Ok(Some(Either::Left(_))) => done += 1,
            Ok(Some(Either::Right(_))) => {}
            Ok(None) => return Ok(()),
            Err(error) => return Err((done, error)),
        }
    }
}

/// What the closure has set must not decide where the record goes, and who writes it. Nor may it take the bounds off what
/// is locked from here on, nor lessen what a commit promises.
fn regained(bounds: Bounds) -> [String; 10] {
    let ms = |time: Duration| time.as_millis().max(1);
    [
        "RESET SESSION AUTHORIZATION".to_owned(),
        "RESET ROLE".to_owned(),
        "SET LOCAL search_path = pg_catalog, pg_temp".to_owned(),
        "SET LOCAL client_encoding = 'UTF8'".to_owned(),
        "SET LOCAL synchronous_commit TO DEFAULT".to_owned(),
        format!("SET LOCAL idle_in_transaction_session_timeout = {}", ms(bounds.idle_in_transaction)),
        format!("SET LOCAL lock_timeout = {}", ms(bounds.lock)),
        format!("SET LOCAL statement_timeout = {}", ms(bounds.statement)),
        // As in the engine's own sessions.
        "SET LOCAL plan_cache_mode = force_generic_plan".to_owned(),
        "SET LOCAL enable_seqscan = off".to_owned(),
    ]
}

/// What the closure, or a trigger at its commit, has left in the session must not meet the next one. Not `DISCARD ALL`,
/// which would take the statements that the driver keeps.
fn cleared(bounds: Bounds) -> Vec<String> {
    if bounds.lent {
        return Vec::new();
    }
    vec![
        "RESET SESSION AUTHORIZATION".to_owned(),
        "RESET ROLE".to_owned(),
        "RESET ALL".to_owned(),
        "CLOSE ALL".to_owned(),
        "UNLISTEN *".to_owned(),
        "DISCARD TEMP".to_owned(),
        "SELECT pg_catalog.pg_advisory_unlock_all()".to_owned(),
        session::settings(bounds, Whose::Service),
    ]
}

/// Statements that end a transaction, and what clears the session after them.
fn ending<const N: usize>(statements: [&str; N], bounds: Bounds) -> Vec<String> {
    statements.into_iter().map(str::to_owned).chain(cleared(bounds)).collect()
}

/// Makes a session ready to [`execute`]: planning the statement takes longer than all else that the engine does there. Under
/// the `search_path` that it is run with, as another one would have it planned anew.
pub(crate) fn prepare(schema: &Schema) -> String {
    let types = "uuid, uuid, bigint, smallint, text, text, text, text, json, integer, integer, boolean";
    let writes = writes(schema, &std::array::from_fn(|nth| format!("${}", nth + 1)));
    let tag = schema.tag();
    format!("SET search_path = pg_catalog, pg_temp; PREPARE \"{tag}\" ({types}) AS {writes}; RESET search_path")
}

fn execute(schema: &Schema, instance: InstanceId, record: &RecordOp) -> String {
    format!("EXECUTE \"{}\" ({})", schema.tag(), values(instance, record).join(", "))
}

pub(crate) fn insert(schema: &Schema, instance: InstanceId, record: &RecordOp) -> String {
    writes(schema, &values(instance, record))
}

fn values(instance: InstanceId, record: &RecordOp) -> [String; 12] {
    let RecordOp { run, claim, key, op, state, payload, attempts, seq, shielded, .. } = record;
    [
        uuid(instance.0),
        uuid(run.0),
        claim.to_string(),
        (key.scope as i16).to_string(),
        literal(&key.name),
        literal(&key.key),
        literal(op.as_str()),
        literal(state.as_str()),
        format!("{}::pg_catalog.json", literal(payload)),
        attempts.to_string(),
        seq.to_string(),
        shielded.to_string(),
    ]
}

/// Writes the record, or fails with [`NOTHING_WRITTEN`].
///
/// Its locks are held until the commit: on the fence, against a take-over; on the process's row, against the cancellation
/// being recorded, and for whoever must know whether this commit is still on its way.
fn writes(schema: &Schema, values: &[String; 12]) -> String {
    let [me, run, claim, scope, name, key, op, state, payload, attempts, seq, shielded] = values;
    format!(
        "WITH fence AS MATERIALIZED (SELECT 1 FROM {schema}.fences WHERE instance = {me} AND fenced_at IS NULL FOR SHARE),
         owned AS MATERIALIZED (SELECT p.run, p.claim FROM {schema}.processes p
             WHERE p.run = {run} AND p.owner IS NOT DISTINCT FROM {me} AND p.claim = {claim}
                 AND ({shielded} OR p.cancelled_at IS NULL) AND EXISTS (SELECT 1 FROM fence) FOR SHARE),
         written AS (INSERT INTO {schema}.steps AS s (run, scope, name, key, op, state, payload, attempts, seq, claim,
                 recorded_at)
             SELECT o.run, {scope}, {name}, {key}, {op}, {state}, {payload}, {attempts}, {seq}, o.claim, now() FROM owned o
             ON CONFLICT (run, scope, name, key) DO UPDATE SET op = excluded.op, state = excluded.state,
                 payload = excluded.payload, attempts = excluded.attempts, seq = excluded.seq,
                 claim = excluded.claim, recorded_at = excluded.recorded_at
             WHERE s.state = 'pending'
             RETURNING 1)
         SELECT 1 / count(*) FROM written"
    )
}

/// Why nothing was written, within the transaction that has tried to.
async fn why(
    connection: &mut PgConnection,
    schema: &Schema,
    instance: InstanceId,
    record: &RecordOp,
) -> Result<Committed> {
    connection.execute(BACK).await.map_err(reading)?;
    let rows = reason(schema, instance, record).run(connection, Commits::No).await?;
    let row = rows.first().ok_or_else(|| StorageError::schema("no answer"))?;
    let (state, alive, owned) = (get::<Option<String>>(row, 0)?, get::<bool>(row, 1)?, get::<bool>(row, 2)?);
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
