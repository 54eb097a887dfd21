//! A batch as one request: a script that the server runs from its first statement to its commit without the client.
//!
//! Every statement has a view of its own of what is committed, and those that decide something run when the rows that
//! they go by are locked: by [`locks`] beforehand, or by an update of the statement's own. What is told is gathered in a
//! table and sent when all is committed.

mod answers;
mod chores;
mod inbox;
mod locks;
mod mail;
mod orders;
mod owned;
mod records;
mod starts;

use durable_core::storage::{Batch, Op, Outcome, Result, Sorted, StorageError};
use std::fmt;
use std::time::Duration;
use uuid::Uuid;

use crate::errors::{passes_at_once, sort};
use crate::fence::{self, BUSY};
use crate::names::Schema;
use crate::session::Client;
use crate::sql::{Commits, Sql};
pub(crate) use chores::All;
#[cfg(test)]
pub(crate) use chores::{part, put_off};
pub(crate) use inbox::Rows;
#[cfg(test)]
pub(crate) use inbox::waiting;

pub(crate) const UNFINISHED: &str = "(N'running', N'waiting', N'stuck')";
/// Both lists are used positively: a status that this version does not know is neither.
pub(crate) const FINISHED: &str = "(N'completed', N'failed', N'cancelled')";

/// Whose batch it is, and where it goes: displayed as the schema.
struct Of<'b> {
    schema: &'b Schema,
    instance: Uuid,
    generation: i64,
    namespace: &'b str,
    gate: Gate<'b>,
}

/// What has to hold for anything to be written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gate<'b> {
    /// The fence.
    Fence,
    /// The fence, and nothing waits in the inbox.
    Inbox,
    /// These are there to be taken out of the inbox.
    Moving(&'b [i64]),
}

impl fmt::Display for Of<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.schema.fmt(f)
    }
}

/// Why nothing was written, as `@verdict` says; [`BUSY`] besides.
const COMMITTED: i32 = 0;
const FENCED: i32 = 1;
const INBOX: i32 = 2;

/// What came of a batch.
pub(crate) enum Committed {
    Done(Vec<Outcome>),
    /// Something waits in the inbox, which goes first.
    Inbox,
}

/// Commits it. `swept`: what waits in the inbox now came after it.
pub(crate) async fn commit(client: &mut Client, schema: &Schema, batch: &Batch, swept: bool) -> Result<Committed> {
    let sorted = Sorted::new(&batch.ops);
    let gate = if !swept && sorted.names_an_id() { Gate::Inbox } else { Gate::Fence };
    let (instance, generation) = (batch.fence.instance.0, batch.fence.generation);
    let of = Of { schema, instance, generation, namespace: &batch.namespace, gate };
    run(client, &of, &batch.ops, &sorted, batch.patience).await
}

/// Runs the script; again, if the server has rolled it back for the sake of another transaction.
async fn run(
    client: &mut Client,
    of: &Of<'_>,
    ops: &[Op],
    sorted: &Sorted<'_>,
    patience: Option<Duration>,
) -> Result<Committed> {
    const TRIES: usize = 5;
    let mut tries = 0;
    loop {
        tries += 1;
        match script(of, sorted, patience).fetch(client).await {
            Ok(parts) => return answers::committed(&parts, of.instance, ops, sorted),
            Err(error) if tries < TRIES && passes_at_once(&error) => {
                tracing::debug!("a batch gave way to another: {error}");
            }
            Err(error) => return Err(sort(error, Commits::Yes)),
        }
    }
}

fn script(of: &Of<'_>, sorted: &Sorted<'_>, patience: Option<Duration>) -> Sql {
    let mut sql = Sql::default();
    if let Some(patience) = patience {
        // The session keeps it: it is not used again.
        sql.push(format!("SET LOCK_TIMEOUT {}", patience.as_millis().max(1)));
    }
    let (me, generation, namespace) = (sql.id(of.instance), sql.number(of.generation), sql.text(of.namespace));
    sql.push(format!(
        "DECLARE @verdict INT = {COMMITTED}, @me BINARY(16) = {me}, @generation BIGINT = {generation}, \
         @namespace NVARCHAR(64) = {namespace}, @now DATETIME2(6) = SYSUTCDATETIME(), @patience INT = @@LOCK_TIMEOUT, \
         @count INT = 0"
    ));
    sql.declare(answers::TABLE);
    sql.push("BEGIN TRANSACTION");
    gate(&mut sql, of);
    sql.push("IF @verdict = 0 BEGIN SET @now = SYSUTCDATETIME()");
    write(&mut sql, of, sorted);
    sql.push("COMMIT TRANSACTION; END ELSE ROLLBACK TRANSACTION");
    sql.push("SELECT @verdict, @@TRANCOUNT");
    sql.push(answers::SELECT);
    sql
}

/// Sets `@verdict` unless all may be written. Locks of applications come before those of rows.
fn gate(sql: &mut Sql, of: &Of<'_>) {
    if let Gate::Moving(numbers) = of.gate {
        return inbox::take(sql, of, numbers);
    }
    let lock = sql.text(fence::lock(of.schema, of.instance));
    sql.push(fence::take(&lock, "Shared"));
    if of.gate == Gate::Inbox {
        // Whoever moves something on holds it alone: what is on its way counts as waiting.
        let lock = sql.text(inbox::lock(of));
        sql.push(fence::take(&lock, "Shared"));
        sql.push(format!(
            "IF @verdict = 0 AND EXISTS (SELECT 1 FROM {of}.inbox AS i WITH (READPAST, READCOMMITTEDLOCK, ROWLOCK)
             WHERE i.namespace = @namespace AND i.refused IS NULL) SET @verdict = {INBOX}"
        ));
    }
    sql.push(format!(
        "IF @verdict = 0 AND NOT EXISTS (SELECT 1 FROM {of}.fences AS f
         WHERE f.instance = @me AND f.generation = @generation AND f.fenced_at IS NULL) SET @verdict = {FENCED}"
    ));
}

/// In the order of the variants of `Op`.
fn write(sql: &mut Sql, of: &Of<'_>, sorted: &Sorted<'_>) {
    locks::take(sql, of, sorted);
    starts::write(sql, of, sorted);
    mail::deliver(sql, of, sorted);
    records::write(sql, of, sorted);
    mail::wait(sql, of, sorted);
    owned::write(sql, of, sorted);
    orders::write(sql, of, sorted);
    for (_, (kind, limit)) in &sorted.claims {
        owned::claim(sql, of, kind, *limit);
    }
}

/// Whether a row `j` is nobody's operation, or that of a run which the instance owns.
fn starter_owns(of: &Of<'_>) -> String {
    format!(
        "(j.from_run IS NULL OR EXISTS (SELECT 1 FROM {of}.processes AS o
             WHERE o.run = j.from_run AND o.owner = @me AND o.claim = j.from_claim))"
    )
}

/// The current run of an id, as a value.
fn current(of: &Of<'_>, id: &str) -> String {
    format!(
        "(SELECT q.run FROM {of}.processes AS q WHERE q.namespace = @namespace AND q.id = {id} AND q.[current] = 1)"
    )
}

/// What a signal does besides counting: tells an owner that is another instance, makes a waiting process due.
const WAKE: &str = "signalled = CASE WHEN p.owner IS NOT NULL AND p.owner <> @me THEN 1 ELSE p.signalled END,
    wake_at = CASE WHEN p.status = N'waiting' AND (p.wake_at IS NULL OR p.wake_at > @now) THEN @now ELSE p.wake_at END";

/// A verdict that is not about the batch's content.
fn judge(verdict: i32) -> StorageError {
    match verdict {
        FENCED => StorageError::Fenced,
        BUSY => StorageError::unavailable("the instance's lock did not come free in time"),
        other => StorageError::unknown(format!("a batch ended with {other}")),
    }
}

/// The script of a batch.
#[cfg(test)]
pub(crate) fn scripts(schema: &Schema, batch: &Batch) -> Sql {
    let sorted = Sorted::new(&batch.ops);
    let gate = if sorted.names_an_id() { Gate::Inbox } else { Gate::Fence };
    let (instance, generation) = (batch.fence.instance.0, batch.fence.generation);
    script(&Of { schema, instance, generation, namespace: &batch.namespace, gate }, &sorted, None)
}
