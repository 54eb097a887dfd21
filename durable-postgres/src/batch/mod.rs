//! A batch as SQL. Most are one statement ([`single`]), which is one round trip and a transaction of its own; those that
//! reach into other processes are a transaction of several ([`whole`]).

mod inbox;
mod mail;
mod orders;
mod parts;
mod read;
mod single;
mod whole;

use durable_core::storage::{Batch, Effect, Op, Outcome, RecordOp, Result, StorageError};
use sqlx::postgres::PgConnection;
use std::fmt;
use uuid::Uuid;

use crate::names::Schema;
#[cfg(test)]
pub(crate) use inbox::waiting;
pub(crate) use inbox::{last, sweep};
use parts::{Sorted, Start};

pub(crate) const UNFINISHED: &str = "('running', 'waiting', 'stuck')";
/// Both lists are used positively: a status that this version does not know is neither.
pub(crate) const FINISHED: &str = "('completed', 'failed', 'cancelled')";

/// Whose batch it is, and where it goes: displayed as the schema.
struct Of<'b> {
    schema: &'b Schema,
    instance: Uuid,
    generation: i64,
    namespace: &'b str,
    gate: Gate,
}

/// What has to hold for anything to be written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gate {
    /// The fence.
    Fence,
    /// The fence; and nothing waits in the inbox, which goes before whatever names a process by its id.
    Inbox,
    /// Nothing: what is written is no instance's.
    Open,
}

impl fmt::Display for Of<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.schema.fmt(f)
    }
}

fn of<'b>(schema: &'b Schema, batch: &'b Batch, swept: bool) -> Of<'b> {
    Of {
        schema,
        instance: batch.fence.instance.0,
        generation: batch.fence.generation,
        namespace: &batch.namespace,
        gate: if !swept && batch.ops.iter().any(names_an_id) { Gate::Inbox } else { Gate::Fence },
    }
}

/// Makes a batch ready to be sent, if it is one statement.
pub(crate) fn prepare(schema: &Schema, batch: &Batch) {
    let sorted = sort(&batch.ops);
    if single::fits(&sorted) {
        batch.prepared.put(single::statement(&of(schema, batch, false), &sorted));
    }
}

/// Commits a batch. An error says that nothing was written, or, as `Unknown`, that it may have been.
/// `swept`: what waited in the inbox when the batch was handed over has been moved on.
pub(crate) async fn commit(
    connection: &mut PgConnection,
    schema: &Schema,
    batch: &Batch,
    swept: bool,
) -> Result<Vec<Outcome>> {
    let of = of(schema, batch, swept);
    let sorted = sort(&batch.ops);
    let answer = if single::fits(&sorted) {
        single::commit(connection, &of, &batch.ops, &sorted, &batch.prepared).await?
    } else {
        single::Answer::Nothing
    };
    match answer {
        single::Answer::Done(outcomes) => Ok(outcomes),
        single::Answer::Nothing => whole::commit(connection, &of, &batch.ops, &sorted).await,
        single::Answer::Partly => {
            // What has come into the inbox since then is not before this batch.
            let of = Of { gate: Gate::Fence, ..of };
            let again = whole::commit(connection, &of, &batch.ops, &sorted).await;
            again.map_err(|error| StorageError::unknown(error.to_string()))
        }
    }
}

/// Whether it is about a process by its id: one that is about to be put there must be there first.
pub(crate) fn names_an_id(op: &Op) -> bool {
    match op {
        Op::Record(record) => record.effect.is_some(),
        Op::Spawn(_) | Op::Raise(_) | Op::Await { .. } | Op::Cancel { .. } | Op::Resume { .. } | Op::Delete { .. } => {
            true
        }
        _ => false,
    }
}

fn sort(ops: &[Op]) -> Sorted<'_> {
    let mut sorted = Sorted {
        spawns: Vec::new(),
        raises: Vec::new(),
        records: Vec::new(),
        all_records: Vec::new(),
        awaits: Vec::new(),
        accepts: Vec::new(),
        seen: Vec::new(),
        finishes: Vec::new(),
        parks: Vec::new(),
        orders: Vec::new(),
        claims: Vec::new(),
    };
    for (at, op) in ops.iter().enumerate() {
        match op {
            Op::Spawn(spawn) => sorted.spawns.push((at, Start { spawn, from: None })),
            Op::Raise(raise) => sorted.raises.push((at, mail::Letter { raise, from: None })),
            Op::Record(record) => {
                let from = Some((record.run.0, record.claim));
                match &record.effect {
                    Some(Effect::Spawn(spawn)) => sorted.spawns.push((at, Start { spawn, from })),
                    Some(Effect::Raise(raise)) => sorted.raises.push((at, mail::Letter { raise, from })),
                    None => sorted.records.push((at, record)),
                }
                sorted.all_records.push((at, record));
            }
            Op::Await { run, id, target } => sorted.awaits.push((at, (*run, id, *target))),
            Op::AcceptCancel { run, claim } => sorted.accepts.push((at, (*run, *claim))),
            Op::Seen { run, claim, signals } => sorted.seen.push((at, (*run, *claim, *signals))),
            Op::Finish(finish) => sorted.finishes.push((at, finish)),
            Op::Park(park) => sorted.parks.push((at, park)),
            Op::Cancel { .. } | Op::Resume { .. } | Op::Delete { .. } => sorted.orders.push((at, op)),
            Op::Claim { kind, limit } => sorted.claims.push((at, (kind, *limit))),
            // One that this version does not know stays without an outcome.
            _ => {}
        }
    }
    sorted.spawns.sort_by_key(|(_, start)| &start.spawn.id);
    sorted
}

/// Records with an effect of one kind.
fn with_effect<'b>(sorted: &Sorted<'b>, of_kind: impl Fn(&Effect) -> bool) -> Vec<(usize, &'b RecordOp)> {
    let has = |(_, record): &&(usize, &RecordOp)| record.effect.as_ref().is_some_and(&of_kind);
    sorted.all_records.iter().filter(has).copied().collect()
}

/// Every statement that a batch is made of.
#[cfg(test)]
pub(crate) fn statements(schema: &Schema, batch: &Batch) -> Vec<(&'static str, crate::sql::Sql)> {
    let of = Of {
        schema,
        instance: batch.fence.instance.0,
        generation: batch.fence.generation,
        namespace: &batch.namespace,
        gate: Gate::Inbox,
    };
    let sorted = sort(&batch.ops);
    if single::fits(&sorted) {
        return vec![("a batch in one", single::statement(&of, &sorted).sql)];
    }
    whole::statements(&of, &batch.ops, &sorted)
}
