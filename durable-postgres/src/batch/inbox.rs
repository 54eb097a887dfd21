//! What transactions of the service's have put into the inbox, moved on: starts become processes, messages go into
//! mailboxes, by the statements of a batch, in the order in which they were put in.

use durable_core::storage::{Op, Outcome, Raise, Raised, Result, RunId, Sorted, Spawn, StorageError};
use sqlx::Executor;
use sqlx::postgres::{PgConnection, PgRow};
use std::collections::HashSet;
use uuid::Uuid;

use super::{Gate, Of, whole};
use crate::errors::{self, reading};
use crate::names::Schema;
use crate::rows::{boxed, get};
use crate::sql::{Commits, Sql};

/// At most so many at once, and so many bytes, or one.
const ROWS: i64 = 200;
const BYTES: usize = 4 << 20;

/// The last one that waits now.
pub(crate) fn last(schema: &Schema, namespace: &str) -> Sql {
    let mut sql = Sql::default();
    let namespace = sql.bind(namespace);
    sql.text = format!(
        "SELECT number FROM {schema}.inbox WHERE namespace = {namespace} AND refused IS NULL ORDER BY number DESC LIMIT 1"
    );
    sql
}

/// Moves on what is committed, up to this number, and says how many rows that were. Who comes at the same time waits, and
/// finds the rest: the order must not depend on who is faster. What came too late (the process has ended, the id is
/// another's) is dropped with a warning: nobody is there to be told. What the database refuses, or this version does not
/// know, stays where it is, with the reason, until its process is deleted, and holds up nobody.
pub(crate) async fn sweep(connection: &mut PgConnection, schema: &Schema, namespace: &str, upto: i64) -> Result<usize> {
    match transaction(connection, schema, namespace, upto, ROWS).await {
        Err(StorageError::Refused(_)) => {}
        result => return result,
    }
    match transaction(connection, schema, namespace, upto, 1).await {
        Err(StorageError::Refused(why)) => {
            let mut sql = Sql::default();
            let (namespace, why) = (sql.bind(namespace), sql.bind(why.to_string()));
            sql.text = format!(
                "UPDATE {schema}.inbox SET refused = {why} WHERE number = (SELECT number FROM {schema}.inbox
                     WHERE namespace = {namespace} AND refused IS NULL ORDER BY number LIMIT 1)
                 RETURNING number, id"
            );
            for row in sql.run(connection, Commits::No).await? {
                let (number, id) = (get::<i64>(&row, 0)?, get::<String>(&row, 1)?);
                tracing::error!(id = %id, "it stays in the inbox as number {number}: the database refuses it");
            }
            Ok(1)
        }
        result => result,
    }
}

async fn transaction(
    connection: &mut PgConnection,
    schema: &Schema,
    namespace: &str,
    upto: i64,
    rows: i64,
) -> Result<usize> {
    connection.execute("BEGIN").await.map_err(reading)?;
    match move_on(connection, schema, namespace, upto, rows).await {
        Ok((moved, dropped)) => {
            let committed = connection.execute("COMMIT").await.map_err(|error| errors::sort(error, true));
            if matches!(committed, Ok(_) | Err(StorageError::Unknown(_))) {
                for (id, why) in dropped {
                    tracing::warn!(id = %id, "dropped from the inbox: {why}");
                }
            }
            committed.map(|_| moved)
        }
        Err(error) => {
            connection.execute("ROLLBACK").await.map_err(reading)?;
            Err(error)
        }
    }
}

/// How many rows that were, and what was dropped: whose, and why.
async fn move_on(
    connection: &mut PgConnection,
    schema: &Schema,
    namespace: &str,
    upto: i64,
    rows: i64,
) -> Result<(usize, Vec<(Box<str>, String)>)> {
    let rows = waiting(schema, namespace, upto, rows).run(connection, Commits::No).await?;
    let mut numbers = Vec::new();
    let mut ops = Vec::new();
    let mut bytes = 0;
    let mut starts: HashSet<Box<str>> = HashSet::new();
    for row in &rows {
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
    if ops.is_empty() {
        return Ok((0, Vec::new()));
    }
    let of = Of { schema, instance: Uuid::nil(), generation: 0, namespace, gate: Gate::Open };
    let outcomes = whole::write(connection, &of, &ops, &Sorted::new(&ops)).await?;
    let dropped = ops.iter().zip(&outcomes).filter_map(|(op, outcome)| too_late(op, outcome)).collect();
    let mut sql = Sql::default();
    let numbers = sql.bind(numbers);
    sql.text = format!("DELETE FROM {schema}.inbox WHERE number = ANY ({numbers})");
    sql.run(connection, Commits::No).await?;
    Ok((ops.len(), dropped))
}

/// What waits, locked.
pub(crate) fn waiting(schema: &Schema, namespace: &str, upto: i64, rows: i64) -> Sql {
    let mut sql = Sql::default();
    let (namespace, upto, rows) = (sql.bind(namespace), sql.bind(upto), sql.bind(rows));
    sql.text = format!(
        "SELECT number, what, id, name, token, payload::text, digest, restart FROM {schema}.inbox
         WHERE namespace = {namespace} AND refused IS NULL AND number <= {upto} ORDER BY number LIMIT {rows} FOR UPDATE"
    );
    sql
}

fn op(row: &PgRow) -> Result<(i64, Op)> {
    let text = |column| get::<&str>(row, column).map(boxed);
    let (id, name, token, payload) = (text(2)?, text(3)?, text(4)?, text(5)?);
    let op = match get::<&str>(row, 1)? {
        "start" => Op::Spawn(Spawn {
            run: RunId(token.parse().map_err(StorageError::refused)?),
            id,
            kind: name,
            input: payload,
            digest: text(6)?,
            take: false,
            restart_finished: get(row, 7)?,
        }),
        "message" => Op::Raise(Raise { id, name, event_id: token, payload }),
        other => return Err(StorageError::refused(format!("{other:?} is unknown to this version"))),
    };
    Ok((get(row, 0)?, op))
}

/// Whose it is and why it cannot be moved on.
fn too_late(op: &Op, outcome: &Outcome) -> Option<(Box<str>, String)> {
    match (op, outcome) {
        (Op::Spawn(spawn), Outcome::Spawned(found)) if found.kind != spawn.kind => {
            let why = format!("a start of kind {:?}, but the id is in use by one of kind {:?}", spawn.kind, found.kind);
            Some((spawn.id.clone(), why))
        }
        (Op::Spawn(spawn), Outcome::Spawned(found)) if found.digest != spawn.digest => {
            Some((spawn.id.clone(), "a start with another input than the process of that id has".to_owned()))
        }
        (Op::Raise(raise), Outcome::Raised(Raised::Finished)) => {
            Some((raise.id.clone(), format!("a message {:?}, but the process has ended", raise.name)))
        }
        (Op::Raise(raise), Outcome::Raised(Raised::NotFound)) => {
            Some((raise.id.clone(), format!("a message {:?}, but there is no such process any more", raise.name)))
        }
        _ => None,
    }
}
