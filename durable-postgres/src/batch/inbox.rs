//! What transactions of the service's have put into the inbox, moved on: starts become processes, messages go into
//! mailboxes, by the statements of a batch, in the order in which they were put in.

use durable_core::storage::{Op, Outcome, Raise, Raised, Result, RunId, Spawn};
use sqlx::Executor;
use sqlx::postgres::{PgConnection, PgRow};
use std::collections::HashSet;
use uuid::Uuid;

use super::{Gate, Of, sort, whole};
use crate::errors::{self, reading};
use crate::names::Schema;
use crate::rows::{boxed, get};
use crate::sql::{Commits, Sql};

/// At most so many at once.
const ROWS: i64 = 1000;

/// Moves on what is committed, and says how many rows that were. Who comes at the same time waits, and finds the rest: the
/// order must not depend on who is faster.
pub(crate) async fn sweep(connection: &mut PgConnection, schema: &Schema, namespace: &str) -> Result<usize> {
    connection.execute("BEGIN").await.map_err(reading)?;
    match move_on(connection, schema, namespace).await {
        Ok(moved) => {
            connection.execute("COMMIT").await.map_err(|error| errors::sort(error, true))?;
            Ok(moved)
        }
        Err(error) => {
            connection.execute("ROLLBACK").await.map_err(reading)?;
            Err(error)
        }
    }
}

async fn move_on(connection: &mut PgConnection, schema: &Schema, namespace: &str) -> Result<usize> {
    let rows = waiting(schema, namespace).run(connection, Commits::No).await?;
    let mut numbers = Vec::new();
    let mut ops = Vec::new();
    let mut starts: HashSet<Box<str>> = HashSet::new();
    for row in &rows {
        let (number, op) = op(row)?;
        // A start goes before the messages of its batch, and one of two waits for the next.
        let joins = match &op {
            Op::Spawn(spawn) => {
                !ops.iter().any(|op| matches!(op, Op::Raise(raise) if raise.id == spawn.id))
                    && starts.insert(spawn.id.clone())
            }
            _ => true,
        };
        if !joins {
            break;
        }
        numbers.push(number);
        ops.push(op);
    }
    if ops.is_empty() {
        return Ok(0);
    }
    let of = Of { schema, instance: Uuid::nil(), generation: 0, namespace, gate: Gate::Open };
    let outcomes = whole::write(connection, &of, &ops, &sort(&ops)).await?;
    let mut moved = Vec::new();
    for ((number, op), outcome) in numbers.iter().zip(&ops).zip(outcomes) {
        match refused(op, &outcome) {
            None => moved.push(*number),
            Some((id, why)) => {
                tracing::error!(id = %id, "it stays in the inbox as number {number}: {why}");
                let mut sql = Sql::default();
                let (number, why) = (sql.bind(*number), sql.bind(why));
                sql.text = format!("UPDATE {schema}.inbox SET refused = {why} WHERE number = {number}");
                sql.run(connection, Commits::No).await?;
            }
        }
    }
    let mut sql = Sql::default();
    let moved = sql.bind(moved);
    sql.text = format!("DELETE FROM {schema}.inbox WHERE number = ANY ({moved})");
    sql.run(connection, Commits::No).await?;
    Ok(ops.len())
}

/// What waits, locked.
pub(crate) fn waiting(schema: &Schema, namespace: &str) -> Sql {
    let mut sql = Sql::default();
    let (namespace, rows) = (sql.bind(namespace), sql.bind(ROWS));
    sql.text = format!(
        "SELECT number, what, id, name, token, payload::text, digest, restart FROM {schema}.inbox
         WHERE namespace = {namespace} AND refused IS NULL ORDER BY number LIMIT {rows} FOR UPDATE"
    );
    sql
}

fn op(row: &PgRow) -> Result<(i64, Op)> {
    let text = |column| get::<&str>(row, column).map(boxed);
    let (id, name, token, payload) = (text(2)?, text(3)?, text(4)?, text(5)?);
    let op = match get::<&str>(row, 1)? {
        "start" => Op::Spawn(Spawn {
            run: RunId(token.parse().map_err(durable_core::storage::StorageError::schema)?),
            id,
            kind: name,
            input: payload,
            digest: text(6)?,
            take: false,
            restart_finished: get(row, 7)?,
        }),
        _ => Op::Raise(Raise { id, name, event_id: token, payload }),
    };
    Ok((get(row, 0)?, op))
}

/// Why it cannot be moved on.
fn refused<'o>(op: &'o Op, outcome: &Outcome) -> Option<(&'o str, String)> {
    match (op, outcome) {
        (Op::Spawn(spawn), Outcome::Spawned(found)) if found.kind != spawn.kind => {
            let why = format!("a start of kind {:?}, but the id is in use by one of kind {:?}", spawn.kind, found.kind);
            Some((&spawn.id, why))
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
