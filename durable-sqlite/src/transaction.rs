use async_trait::async_trait;
use durable_core::storage::{
    Committed, Ending, InstanceId, Open, Record, RecordKey, RecordOp, RecordState, Result, RolledBack, RunId, Slot,
    Storage, StorageError, Transactional, source,
};
use durable_core::{AsFailure, IntoFailure, Name, Process, Transaction};
use sqlx::Connection;
use sqlx::sqlite::SqliteConnection;
use std::error::Error;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::Sqlite;
use crate::errors::{is_busy, passes, reading};
use crate::files::Files;
use crate::lend::Turn;
use crate::rows::get;
use crate::script::{NOW, Script};
use crate::store::{all, patiently};

/// `proc.transaction(…)`: steps whose SQL commits with their record.
pub trait Transactions {
    /// A step whose SQL and whose record are one transaction: **exactly once**. See [`Transaction`].
    ///
    /// `tx` is an open transaction of SQLite's, begun as `IMMEDIATE`; statements run on `&mut *tx`. Keep it in the closure:
    /// given to another task, it keeps everybody from writing until it is dropped there, and what was done with it is undone.
    ///
    /// ```
    /// use durable_sqlite::{Failure, Process, Transactions};
    ///
    /// async fn debit(proc: &Process, account: i64, cents: i64) -> Result<i64, Failure> {
    ///     let left = proc
    ///         .transaction("debit", async |mut tx| {
    ///             sqlx::query("UPDATE accounts SET cents = cents - ? WHERE id = ?")
    ///                 .bind(cents)
    ///                 .bind(account)
    ///                 .execute(&mut *tx)
    ///                 .await?;
    ///             sqlx::query_scalar("SELECT cents FROM accounts WHERE id = ?").bind(account).fetch_one(&mut *tx).await
    ///         })
    ///         .await?;
    ///     Ok(left)
    /// }
    /// ```
    #[track_caller]
    fn transaction<F, Fut, T, E>(&self, name: impl Into<Name>, statements: F) -> Transaction<'_, Sqlite, F, AsFailure>
    where
        F: FnMut(Tx) -> Fut + Send,
        Fut: Future<Output = Result<T, E>> + Send,
        T: Send,
        E: IntoFailure;
}

impl Transactions for Process {
    #[track_caller]
    fn transaction<F, Fut, T, E>(&self, name: impl Into<Name>, statements: F) -> Transaction<'_, Sqlite, F, AsFailure>
    where
        F: FnMut(Tx) -> Fut + Send,
        Fut: Future<Output = Result<T, E>> + Send,
        T: Send,
        E: IntoFailure,
    {
        Transaction::new(self, name, statements)
    }
}

/// An open transaction of SQLite's, in the hands of a step's closure.
pub type Tx = durable_core::storage::Tx<SqliteConnection>;

#[async_trait]
impl Transactional for Sqlite {
    type Tx = Tx;

    async fn begin(&self, _: Duration) -> Result<Open<Tx>> {
        // In the order of all who write in this program, so that neither batches nor transactions starve.
        let turn = self.0.writer.turn().await;
        self.0.let_hearts_pass().await;
        let mut lent = self.0.transactor.lend(&self.0.options.clone().foreign_keys(true), &self.0.files).await?;
        if lent.fresh {
            // For the driver it is within a transaction from now on, so that one which the service begins within the
            // engine's is a savepoint, and its commit not the engine's.
            std::mem::forget(lent.connection.begin().await.map_err(reading)?);
            script("ROLLBACK").run(&mut lent.connection).await?;
        }
        let begin = || {
            let mut script = Script::default();
            script.add("BEGIN IMMEDIATE", []);
            // It is there as long as the transaction is.
            script.add("SAVEPOINT durable_transaction", []);
            script
        };
        let begun = patiently(begin, &mut lent.connection).await;
        match begun {
            Ok(_) => {}
            Err(StorageError::Unavailable(why)) if is_busy(&*why) => {
                return lent.done(Err(StorageError::Unavailable(why)));
            }
            // It may be what an earlier closure has left on the connection, which goes.
            Err(error) => return Err(self.0.named(error)),
        }
        let gone = Arc::new(AtomicBool::new(false));
        // A statement that still runs when the transaction is given up would keep everybody from writing.
        let goes_on = {
            let gone = gone.clone();
            move || !gone.load(Ordering::Relaxed)
        };
        let mut handle = lent.connection.lock_handle().await.map_err(reading)?;
        handle.set_progress_handler(10_000, goes_on);
        // Nothing is kept before the record is there: the closure's own COMMIT is a roll-back, and so is that of a
        // statement which comes after a roll-back.
        handle.set_commit_hook(|| false);
        drop(handle);
        let (home, connection) = lent.part();
        let (tx, slot) = Tx::new(connection);
        Ok(Open { tx, ending: Box::new(SqliteEnding { slot, gone, home, files: self.0.files.clone(), _turn: turn }) })
    }

    async fn settled(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>> {
        // A commit that failed was rolled back before its turn was over.
        let _turn = self.0.writer.turn().await;
        self.record(run, key).await
    }
}

struct SqliteEnding {
    slot: Slot<SqliteConnection>,
    /// Nobody wants the transaction any more.
    gone: Arc<AtomicBool>,
    home: Turn,
    files: Arc<Files>,
    _turn: Turn,
}

impl Drop for SqliteEnding {
    fn drop(&mut self) {
        self.gone.store(true, Ordering::Relaxed);
    }
}

/// How the closure has left its transaction.
enum Left {
    Open,
    /// The same, but what SQLite complained of last is nobody's fault, and may pass.
    Troubled(StorageError),
    /// Its SQL has ended the transaction itself.
    Ended,
}

/// Ends the closure's part. Unavailable: SQLite itself has rolled back, with a full disk, say.
async fn regain(connection: &mut SqliteConnection) -> Result<Left> {
    let mut handle = connection.lock_handle().await.map_err(reading)?;
    let trouble = handle.last_error().map(sqlx::Error::from).filter(passes).map(StorageError::unavailable);
    handle.remove_progress_handler();
    handle.remove_commit_hook();
    drop(handle);
    let mut release = script("PRAGMA query_only = OFF");
    release.add("RELEASE durable_transaction", []);
    match (release.run(connection).await, trouble) {
        (Ok(_), None) => Ok(Left::Open),
        (Ok(_), Some(trouble)) => Ok(Left::Troubled(trouble)),
        (Err(error), trouble) if error.to_string().contains("no such savepoint") => {
            trouble.map_or(Ok(Left::Ended), Err)
        }
        (Err(error), _) => Err(error),
    }
}

/// Whether the closure has left nothing on the connection that the next one would meet.
async fn is_clean(connection: &mut SqliteConnection) -> bool {
    let left = script("SELECT 1 FROM temp.sqlite_master LIMIT 1").run(connection).await;
    left.is_ok_and(|answers| all(&answers).next().is_none())
}

fn script(sql: &str) -> Script {
    let mut script = Script::default();
    script.add(sql, []);
    script
}

#[async_trait]
impl Ending for SqliteEnding {
    async fn commit(mut self: Box<Self>, instance: InstanceId, record: &RecordOp) -> Result<Committed> {
        let Some(mut connection) = self.slot.take() else { return Ok(Committed::Escaped) };
        if let Left::Ended = regain(&mut connection).await? {
            return Ok(Committed::Escaped);
        }
        let committed = commit(&mut connection, instance, record).await;
        if committed.is_ok() && is_clean(&mut connection).await {
            *self.home = Some(connection);
        }
        // It may be in a file that is gone: the closure had time enough for that.
        committed.and_then(|done| self.files.check().map(|()| done).map_err(StorageError::unknown))
    }

    async fn rollback(mut self: Box<Self>) -> Result<RolledBack> {
        let Some(mut connection) = self.slot.take() else { return Ok(RolledBack::Escaped) };
        let left = regain(&mut connection).await?;
        if let Left::Ended = left {
            return Ok(RolledBack::Escaped);
        }
        script("ROLLBACK").run(&mut connection).await?;
        if let Left::Troubled(trouble) = left {
            return Err(trouble);
        }
        if is_clean(&mut connection).await {
            *self.home = Some(connection);
        }
        Ok(RolledBack::Open)
    }

    fn is_transient(&self, error: &(dyn Error + 'static)) -> Option<bool> {
        source(error).map(passes)
    }
}

/// Writes the record and commits, or finds out why not and rolls back. The tables are named with their database: the
/// closure may have made temporary ones of the same names.
async fn commit(connection: &mut SqliteConnection, instance: InstanceId, record: &RecordOp) -> Result<Committed> {
    let RecordOp { run, claim, key, op, state, payload, attempts, seq, shielded, .. } = record;
    let (run, instance, scope) = (run.to_string(), instance.to_string(), key.scope as i64);
    let mut insert = Script::default();
    insert.add(
        &format!(
            "INSERT INTO main.durable_steps (run, scope, name, key, op, state, payload, attempts, seq, claim, recorded_at)
             SELECT p.run, ?, ?, ?, ?, ?, ?, ?, ?, p.claim, {NOW} FROM main.durable_processes p
             WHERE p.run = ? AND +p.owner IS ? AND p.claim = ? AND (? OR p.cancelled_at IS NULL)
                 AND EXISTS (SELECT 1 FROM main.durable_fences WHERE instance = ? AND fenced_at IS NULL)
             ON CONFLICT (run, scope, name, key) DO UPDATE SET op = excluded.op, state = excluded.state,
                 payload = excluded.payload, attempts = excluded.attempts, seq = excluded.seq,
                 claim = excluded.claim, recorded_at = excluded.recorded_at
             WHERE durable_steps.state = 'pending'"
        ),
        [
            scope.into(),
            (&*key.name).into(),
            (&*key.key).into(),
            op.as_str().into(),
            state.as_str().into(),
            (&**payload).into(),
            i64::from(*attempts).into(),
            i64::from(*seq).into(),
            run.as_str().into(),
            instance.as_str().into(),
            (*claim).into(),
            i64::from(*shielded).into(),
            instance.as_str().into(),
        ],
    );
    let written = insert.run(connection).await?.iter().map(|answer| answer.changes).sum::<u64>();
    if written == 1 {
        return match script("COMMIT").run(connection).await {
            Ok(_) => Ok(Committed::Recorded),
            // Rolled back by now.
            Err(StorageError::Refused(why)) => Ok(Committed::Refused(why.to_string())),
            Err(error) => Err(error),
        };
    }
    let mut why = Script::default();
    why.add(
        "SELECT (SELECT state FROM main.durable_steps WHERE run = ? AND scope = ? AND name = ? AND key = ?),
             EXISTS (SELECT 1 FROM main.durable_fences WHERE instance = ? AND fenced_at IS NULL),
             EXISTS (SELECT 1 FROM main.durable_processes WHERE run = ? AND owner = ? AND claim = ?)",
        [
            run.as_str().into(),
            scope.into(),
            (&*key.name).into(),
            (&*key.key).into(),
            instance.as_str().into(),
            run.as_str().into(),
            instance.as_str().into(),
            (*claim).into(),
        ],
    );
    why.add("ROLLBACK", []);
    let answers = why.run(connection).await?;
    let row = all(&answers).next().ok_or_else(|| StorageError::schema("no answer"))?;
    let state = get::<Option<&str>>(row, 0)?;
    if !get::<bool>(row, 1)? {
        Err(StorageError::Fenced)
    } else if state.is_some_and(|state| state != RecordState::Pending.as_str()) {
        Ok(Committed::Exists)
    } else if get::<bool>(row, 2)? {
        Ok(Committed::Cancelled)
    } else {
        Ok(Committed::Lost)
    }
}
