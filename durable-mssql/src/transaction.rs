use async_trait::async_trait;
use durable_core::storage::{
    Committed, Ending, InstanceId, Open, Record, RecordKey, RecordOp, Result, RolledBack, RunId, Slot, StorageError,
    Transactional, source,
};
use durable_core::{AsFailure, IntoFailure, Name, Process, Transaction};
use std::error::Error;
use std::future::Future;
use std::time::Duration;
use uuid::Uuid;

use crate::Mssql;
use crate::errors::{passes, reading, sort};
use crate::fence::{self, BUSY};
use crate::names::Schema;
use crate::read;
use crate::rows::get;
use crate::session::{Bounds, Lent, SETTINGS, Socket};
use crate::sql::{Commits, Sql, hex};

/// `proc.transaction(…)`: steps whose SQL commits with their record.
pub trait Transactions {
    /// A step whose SQL and whose record are one transaction: **exactly once**. See [`Transaction`].
    ///
    /// `tx` is an open transaction on a connection of the storage's own, in the database that it was given: the driver's
    /// [`Client`](crate::Client), by way of `Deref`. `XACT_ABORT` is on: a statement that fails undoes all of it.
    /// Temporary tables that the statements leave are there for the next transaction on that connection: drop them.
    ///
    /// ```
    /// use durable_mssql::{Failure, Process, Transactions};
    ///
    /// async fn debit(proc: &Process, account: i64, cents: i64) -> Result<i64, Failure> {
    ///     let left = proc
    ///         .transaction("debit", async |mut tx| {
    ///             let debit = "UPDATE dbo.accounts SET cents = cents - @P1 OUTPUT inserted.cents WHERE id = @P2";
    ///             let row = tx.query(debit, &[&cents, &account]).await?.into_row().await?;
    ///             let left = row.and_then(|row| row.get::<i64, _>(0)).unwrap_or_default();
    ///             Ok::<_, durable_mssql::tiberius::error::Error>(left)
    ///         })
    ///         .await?;
    ///     Ok(left)
    /// }
    /// ```
    #[track_caller]
    fn transaction<F, Fut, T, E>(&self, name: impl Into<Name>, statements: F) -> Transaction<'_, Mssql, F, AsFailure>
    where
        F: FnMut(Tx) -> Fut + Send,
        Fut: Future<Output = Result<T, E>> + Send,
        T: Send,
        E: IntoFailure;
}

impl Transactions for Process {
    #[track_caller]
    fn transaction<F, Fut, T, E>(&self, name: impl Into<Name>, statements: F) -> Transaction<'_, Mssql, F, AsFailure>
    where
        F: FnMut(Tx) -> Fut + Send,
        Fut: Future<Output = Result<T, E>> + Send,
        T: Send,
        E: IntoFailure,
    {
        Transaction::new(self, name, statements)
    }
}

/// An open transaction of SQL Server's, in the hands of a step's closure.
pub type Tx = durable_core::storage::Tx<Lent>;

#[async_trait]
impl Transactional for Mssql {
    type Tx = Tx;

    /// A lock of the transaction's own tells whether it is still the same at its end, and a row of a temporary table
    /// whether one that is gone was committed or rolled back. What follows after the transaction is gone begins another
    /// one, which is never committed, instead of committing statement by statement.
    async fn begin(&self, _: Duration) -> Result<Open<Tx>> {
        let mut lent = self.0.transactions.lend().await?;
        let lock = self.0.schema.lock(format_args!("transaction/{}", hex(Uuid::now_v7())));
        let begin = format!(
            "{SETTINGS} SET IMPLICIT_TRANSACTIONS OFF; SET NOCOUNT OFF; SET ROWCOUNT 0; SET LOCK_TIMEOUT -1;
             UPDATE #durable_kept SET kept = 0;
             BEGIN TRANSACTION;
             EXECUTE sp_getapplock N'{lock}', N'Exclusive', N'Transaction', 0;
             UPDATE #durable_kept SET kept = 1;
             SET IMPLICIT_TRANSACTIONS ON;"
        );
        let begun = async { lent.simple_query(begin).await?.into_results().await };
        if let Err(error) = begun.await {
            return lent.done(Err(reading(error)));
        }
        let socket = Cut(Some(lent.socket()));
        let (tx, slot) = Tx::new(lent);
        let (schema, bounds) = (self.0.schema.clone(), self.0.bounds);
        Ok(Open { tx, ending: Box::new(MssqlEnding { slot, socket, schema, bounds, lock }) })
    }

    async fn settled(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>> {
        // A commit that is on its way holds the process's row.
        let mut sql = Sql::default();
        let (schema, run_arg) = (&self.0.schema, sql.id(run.0));
        sql.push(format!("UPDATE p SET signals = p.signals FROM {schema}.processes AS p WHERE p.run = {run_arg}"));
        self.run(sql).await?;
        read::recorded(&self.run(read::record_script(&self.0.schema, run, key)).await?.rows())
    }
}

/// Dropped before its time, it ends the session, whoever still holds it.
struct Cut(Option<Socket>);

impl Cut {
    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        if let Some(socket) = &self.0 {
            socket.shut();
        }
    }
}

struct MssqlEnding {
    slot: Slot<Lent>,
    socket: Cut,
    schema: Schema,
    bounds: Bounds,
    lock: String,
}

const RECORDED: i32 = 0;
const FENCED: i32 = 1;
const EXISTS: i32 = 4;
const CANCELLED: i32 = 5;
const LOST: i32 = 6;
const ABORTED: i32 = 7;

/// For a script's own statements alone: they begin no transaction, and are not cut short.
const ALONE: &str = "SET NOCOUNT ON; SET IMPLICIT_TRANSACTIONS OFF; SET ROWCOUNT 0";

/// What became of a transaction that is not there any more: an error on the session, without its having been committed, has
/// undone it; otherwise its own SQL has ended it.
const GONE: &str = "CASE WHEN (SELECT MAX(k.kept) FROM #durable_kept AS k) = 0 AND (SELECT MAX(s.prev_error)
    FROM sys.dm_exec_sessions AS s WHERE s.session_id = @@SPID) <> 0 THEN 7 ELSE 8 END";

#[async_trait]
impl Ending for MssqlEnding {
    async fn commit(mut self: Box<Self>, instance: InstanceId, record: &RecordOp) -> Result<Committed> {
        let Some(mut lent) = self.slot.take() else { return Ok(Committed::Escaped) };
        let script = write(&self.schema, self.bounds, &self.lock, instance, record);
        let rows = script.run(&mut lent, Commits::No).await?.rows();
        let verdict = rows.first().map(|row| get::<i32>(row, 0)).transpose()?;
        if verdict == Some(RECORDED) {
            let commit = "SET IMPLICIT_TRANSACTIONS OFF; WHILE @@TRANCOUNT > 0 BEGIN COMMIT TRANSACTION; END;";
            let committed = lent.is_as_new(commit).await.map_err(|error| sort(error, Commits::Yes));
            let clean = committed?;
            self.finish(lent, clean);
            return Ok(Committed::Recorded);
        }
        let rolled_back = lent.is_as_new(ROLLBACK).await;
        let outcome = match verdict {
            Some(FENCED) => Err(StorageError::Fenced),
            Some(BUSY) => Err(StorageError::unavailable("the instance's lock did not come free in time")),
            Some(EXISTS) => Ok(Committed::Exists),
            Some(CANCELLED) => Ok(Committed::Cancelled),
            Some(LOST) => Ok(Committed::Lost),
            Some(ABORTED) => Ok(Committed::Aborted),
            // 8, as [`GONE`] says; or its statements have seen to it that no script of the engine's is run.
            _ => Ok(Committed::Escaped),
        };
        if outcome.is_err() || matches!(outcome, Ok(Committed::Aborted | Committed::Escaped)) {
            return outcome;
        }
        // Only what is known to be undone is told.
        let clean = rolled_back.map_err(reading)?;
        self.finish(lent, clean);
        outcome
    }

    async fn rollback(mut self: Box<Self>) -> Result<RolledBack> {
        let Some(mut lent) = self.slot.take() else { return Ok(RolledBack::Escaped) };
        let mut sql = Sql::default();
        let lock = sql.text(&self.lock);
        sql.push(ALONE);
        sql.push(format!("USE [{}]", self.schema.database()));
        sql.push(format!("SELECT CASE WHEN {} THEN {RECORDED} ELSE {GONE} END", held(&lock)));
        let rows = sql.run(&mut lent, Commits::No).await?.rows();
        let found = rows.first().map(|row| get::<i32>(row, 0)).transpose()?;
        let clean = lent.is_as_new(ROLLBACK).await.map_err(reading)?;
        Ok(match found {
            Some(RECORDED) => {
                self.finish(lent, clean);
                RolledBack::Open
            }
            Some(ABORTED) => RolledBack::Aborted,
            _ => RolledBack::Escaped,
        })
    }

    fn is_transient(&self, error: &(dyn Error + 'static)) -> Option<bool> {
        source(error).map(passes)
    }
}

impl MssqlEnding {
    fn finish(&mut self, mut lent: Lent, clean: bool) {
        self.socket.disarm();
        if clean {
            lent.trust();
        }
    }
}

const ROLLBACK: &str = "SET IMPLICIT_TRANSACTIONS OFF; IF @@TRANCOUNT > 0 ROLLBACK TRANSACTION;";

/// Whether the transaction is the one that was begun.
fn held(lock: &str) -> String {
    format!("@@TRANCOUNT > 0 AND XACT_STATE() = 1 AND APPLOCK_MODE(N'public', {lock}, N'Transaction') = N'Exclusive'")
}

/// Writes the record, or finds out why not.
///
/// The locks are held until the commit: on the fence, against a take-over; on the process's row, against the cancellation
/// being recorded, and for whoever must know whether this commit is still on its way.
pub(crate) fn write(schema: &Schema, bounds: Bounds, lock: &str, instance: InstanceId, record: &RecordOp) -> Sql {
    let RecordOp { run, claim, key, op, state, payload, attempts, seq, shielded, .. } = record;
    let mut sql = Sql::default();
    let (me, run, claim) = (sql.id(instance.0), sql.id(run.0), sql.number(*claim));
    let (scope, name, key) = (sql.number(key.scope as i64), sql.text(&*key.name), sql.text(&*key.key));
    let (op, state, payload) = (sql.text(op.as_str()), sql.text(state.as_str()), sql.text(&**payload));
    let shielded = sql.number(i64::from(*shielded));
    let (attempts, seq) = (sql.number(i64::from(*attempts)), sql.number(i64::from(*seq)));
    let (own, fence) = (sql.text(lock), sql.text(fence::lock(schema, instance.0)));
    sql.push(ALONE);
    sql.push(format!("SET LOCK_TIMEOUT {}", bounds.lock_ms()));
    // Locks of applications belong to a database.
    sql.push(format!("USE [{}]", schema.database()));
    sql.push(format!(
        "DECLARE @verdict INT = {RECORDED}, @me BINARY(16) = {me}, @run BINARY(16) = {run}, @claim BIGINT = {claim}, \
         @patience INT = @@LOCK_TIMEOUT"
    ));
    sql.push(format!("IF NOT ({}) SET @verdict = {GONE}", held(&own)));
    sql.push(format!("IF @verdict = 0 BEGIN {} END", fence::take(&fence, "Shared") + ";"));
    sql.push(format!(
        "IF @verdict = 0 AND NOT EXISTS (SELECT 1 FROM {schema}.fences AS f
             WHERE f.instance = @me AND f.fenced_at IS NULL) SET @verdict = {FENCED}"
    ));
    let owned = "p.run = @run AND p.owner = @me AND p.claim = @claim";
    sql.push(format!(
        "IF @verdict = 0
         BEGIN
             UPDATE p SET signals = p.signals FROM {schema}.processes AS p
                 WHERE {owned} AND ({shielded} = 1 OR p.cancelled_at IS NULL);
             IF @@ROWCOUNT = 0
                 SET @verdict = CASE WHEN EXISTS (SELECT 1 FROM {schema}.processes AS p WHERE {owned}) THEN {CANCELLED}
                     ELSE {LOST} END;
         END"
    ));
    let place = format!("s.run = @run AND s.scope = {scope} AND s.name = {name} AND s.[key] = {key}");
    sql.push(format!(
        "IF @verdict IN (0, {CANCELLED}, {LOST}) AND EXISTS (SELECT 1 FROM {schema}.steps AS s
             WHERE {place} AND s.state <> N'pending') SET @verdict = {EXISTS}"
    ));
    sql.push(format!(
        "IF @verdict = 0
         BEGIN
             UPDATE s SET op = {op}, state = {state}, payload = {payload}, attempts = {attempts}, seq = {seq},
                     claim = @claim, recorded_at = SYSUTCDATETIME()
                 FROM {schema}.steps AS s WHERE {place} AND s.state = N'pending';
             IF @@ROWCOUNT = 0
                 INSERT INTO {schema}.steps (run, scope, name, [key], op, state, payload, attempts, seq, claim,
                         recorded_at)
                     VALUES (@run, {scope}, {name}, {key}, {op}, {state}, {payload}, {attempts}, {seq}, @claim,
                         SYSUTCDATETIME());
         END"
    ));
    sql.push("SELECT @verdict");
    sql
}
