//! What transactions of the service's have put into the inbox, moved on: starts become processes, messages go into
//! mailboxes, by the script of a batch, in the order in which they were put in.

use durable_core::storage::{Op, Outcome, Raise, Raised, Result, RunId, Sorted, Spawn, StorageError};
use std::collections::HashSet;
use tiberius::Row;
use uuid::Uuid;

use super::{Committed, Gate, INBOX, Of, run};
use crate::fence;
use crate::json::{Column, Table};
use crate::names::Schema;
use crate::rows::{get, text};
use crate::session::Client;
use crate::sql::{Commits, Sql};

/// At most so many at once, and so many bytes, or one.
const ROWS: i64 = 200;
const BYTES: usize = 4 << 20;

/// The lock of a namespace's inbox: alone for whoever moves something on, shared for whoever must know that nobody does.
pub(super) fn lock(of: &Of<'_>) -> String {
    of.schema.lock(format_args!("inbox/{}", of.namespace))
}

/// Takes these out, alone; [`INBOX`] if another has been faster.
pub(super) fn take(sql: &mut Sql, of: &Of<'_>, numbers: &[i64]) {
    let lock = sql.text(lock(of));
    sql.push(fence::take(&lock, "Exclusive"));
    let mut table = Table::new(&[("number", Column::Number)]);
    numbers.iter().for_each(|number| table.row([(*number).into()]));
    let (j, count) = (table.named(sql, "j"), sql.count(numbers.len()));
    sql.push(format!("IF @verdict = 0 DELETE i FROM {of}.inbox AS i JOIN {j} ON i.number = j.number"));
    sql.push(format!("IF @verdict = 0 AND @@ROWCOUNT < {count} SET @verdict = {INBOX}"));
}

/// The last one that waits now.
pub(crate) fn last(schema: &Schema, namespace: &str) -> Sql {
    let mut sql = Sql::default();
    let namespace = sql.text(namespace);
    sql.push(format!(
        "SELECT TOP (1) i.number FROM {schema}.inbox AS i WITH (READPAST, READCOMMITTEDLOCK, ROWLOCK)
         WHERE i.namespace = {namespace} AND i.refused IS NULL ORDER BY i.number DESC"
    ));
    sql
}

/// What waits, in order, up to this number.
pub(crate) fn waiting(schema: &Schema, namespace: &str, upto: i64) -> Sql {
    let mut sql = Sql::default();
    let (namespace, upto, rows) = (sql.text(namespace), sql.number(upto), sql.number(ROWS));
    sql.push(format!(
        "SELECT TOP ({rows}) i.number, i.what, i.id, i.name, i.token, i.payload, i.digest, i.restart
         FROM {schema}.inbox AS i WITH (READPAST, READCOMMITTEDLOCK, ROWLOCK)
         WHERE i.namespace = {namespace} AND i.refused IS NULL AND i.number <= {upto} ORDER BY i.number"
    ));
    sql
}

/// Moves on what is committed, up to this number, and says how many rows that were. Who comes at the same time waits, and
/// finds the rest: the order must not depend on who is faster.
pub(crate) async fn sweep(client: &mut Client, schema: &Schema, namespace: &str, upto: i64) -> Result<usize> {
    let mut most = usize::MAX;
    loop {
        let rows = waiting(schema, namespace, upto).run(client, Commits::No).await?.rows();
        let (numbers, ops) = batch(&rows, most)?;
        if ops.is_empty() {
            return Ok(0);
        }
        let gate = Gate::Moving(&numbers);
        let of = Of { schema, instance: Uuid::nil(), generation: 0, namespace, gate };
        match run(client, &of, &ops, &Sorted::new(&ops), None).await {
            Ok(Committed::Done(outcomes)) => {
                let refusals = ops.iter().zip(&outcomes).filter_map(|(op, outcome)| refused(op, outcome));
                refusals.for_each(|(id, why)| tracing::error!(id = %id, "taken out of the inbox, for nothing: {why}"));
                return Ok(ops.len());
            }
            Ok(Committed::Inbox) => {}
            // One of them is what the database refuses; alone, it can be told.
            Err(StorageError::Refused(_)) if ops.len() > 1 => most = 1,
            Err(StorageError::Refused(why)) => {
                let (number, why) = (numbers[0], why.to_string());
                tracing::error!("it stays in the inbox as number {number}: the database refuses it: {why}");
                let mut sql = Sql::default();
                let (number, why) = (sql.number(number), sql.text(why));
                sql.push(format!("UPDATE i SET refused = {why} FROM {schema}.inbox AS i WHERE i.number = {number}"));
                sql.run(client, Commits::No).await?;
                return Ok(1);
            }
            Err(error) => return Err(error),
        }
    }
}

/// As many as go together.
fn batch(rows: &[Row], most: usize) -> Result<(Vec<i64>, Vec<Op>)> {
    let (mut numbers, mut ops) = (Vec::new(), Vec::new());
    let mut bytes = 0;
    let mut starts: HashSet<Box<str>> = HashSet::new();
    for row in rows.iter().take(most) {
        let (number, op) = op(row)?;
        // A start goes before the messages of its batch, and one of two waits for the next.
        let joins = match &op {
            Op::Spawn(spawn) => {
                bytes += spawn.input.len();
                !ops.iter().any(|op| matches!(op, Op::Raise(raise) if raise.id == spawn.id))
                    && starts.insert(spawn.id.clone())
            }
            Op::Raise(raise) => {
                bytes += raise.payload.len();
                true
            }
            _ => true,
        };
        if !joins || (bytes > BYTES && !ops.is_empty()) {
            break;
        }
        numbers.push(number);
        ops.push(op);
    }
    Ok((numbers, ops))
}

fn op(row: &Row) -> Result<(i64, Op)> {
    let (id, name, token, payload) = (text(row, 2)?, text(row, 3)?, text(row, 4)?, text(row, 5)?);
    let op = match get::<&str>(row, 1)? {
        "start" => Op::Spawn(Spawn {
            run: RunId(token.parse().map_err(StorageError::schema)?),
            id,
            kind: name,
            input: payload,
            digest: text(row, 6)?,
            take: false,
            restart_finished: get(row, 7)?,
        }),
        "message" => Op::Raise(Raise { id, name, event_id: token, payload }),
        other => return Err(StorageError::schema(format!("{other:?} in the inbox is unknown to this version"))),
    };
    Ok((get(row, 0)?, op))
}

/// Why nothing came of it.
fn refused<'o>(op: &'o Op, outcome: &Outcome) -> Option<(&'o str, String)> {
    match (op, outcome) {
        (Op::Spawn(spawn), Outcome::Spawned(found)) if found.kind != spawn.kind => {
            let why = format!("a start of kind {:?}, but the id is in use by one of kind {:?}", spawn.kind, found.kind);
            Some((&spawn.id, why))
        }
        (Op::Spawn(spawn), Outcome::Spawned(found)) if found.digest != spawn.digest => {
            Some((&spawn.id, "a start with another input than the process of that id has".to_owned()))
        }
        (Op::Raise(raise), Outcome::Raised(Raised::Finished)) => {
            Some((&raise.id, format!("a message {:?}, but the process has ended", raise.name)))
        }
        (Op::Raise(raise), Outcome::Raised(Raised::NotFound)) => {
            Some((&raise.id, format!("a message {:?}, but there is no such process any more", raise.name)))
        }
        _ => None,
    }
}
