//! A batch as SQL. Most are one statement ([`single`]), which is one round trip and a transaction of its own; those that
//! reach into other processes are a transaction of several ([`whole`]).

mod chores;
mod inbox;
mod mail;
mod orders;
mod parts;
mod read;
mod single;
mod whole;

use durable_core::storage::{Batch, Outcome, Result, Sorted, StorageError};
use sqlx::postgres::PgConnection;
use std::fmt;
use uuid::Uuid;

use crate::lend::{unknown, within};
use crate::names::Schema;
use crate::session::Bounds;
pub(crate) use chores::All;
#[cfg(test)]
pub(crate) use chores::all as chores;
pub(crate) use inbox::Rows;
#[cfg(test)]
pub(crate) use inbox::{held, waiting};

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

fn of<'b>(schema: &'b Schema, batch: &'b Batch, sorted: &Sorted<'_>, swept: bool) -> Of<'b> {
    Of {
        schema,
        instance: batch.fence.instance.0,
        generation: batch.fence.generation,
        namespace: &batch.namespace,
        gate: if !swept && sorted.names_an_id() { Gate::Inbox } else { Gate::Fence },
    }
}

/// Makes a batch ready to be sent, if it is one statement.
pub(crate) fn prepare(schema: &Schema, batch: &Batch) {
    let sorted = Sorted::new(&batch.ops);
    if single::fits(&sorted) {
        batch.prepared.put(single::statement(&of(schema, batch, &sorted, false), &batch.ops, &sorted));
    }
}

/// Commits a batch. An error says that nothing was written, or, as `Unknown`, that it may have been.
/// `swept`: what waited in the inbox when the batch was handed over has been moved on.
pub(crate) async fn commit(
    connection: &mut PgConnection,
    schema: &Schema,
    batch: &Batch,
    swept: bool,
    bounds: Bounds,
) -> Result<Vec<Outcome>> {
    let sorted = Sorted::new(&batch.ops);
    let of = of(schema, batch, &sorted, swept);
    // Bounds of its own are a transaction's.
    let answer = if batch.patience.is_none() && single::fits(&sorted) {
        let commit = single::commit(connection, &of, &batch.ops, &sorted, &batch.prepared);
        within(bounds.answer(), unknown, commit).await?
    } else {
        single::Answer::Nothing
    };
    let bound = bounds.answers();
    match answer {
        single::Answer::Done(outcomes) => Ok(outcomes),
        single::Answer::Nothing => {
            within(bound, unknown, whole::commit(connection, &of, &batch.ops, &sorted, batch.patience)).await
        }
        single::Answer::Partly => {
            // What has come into the inbox since then is not before this batch.
            let of = Of { gate: Gate::Fence, ..of };
            let again = within(bound, unknown, whole::commit(connection, &of, &batch.ops, &sorted, None)).await;
            again.map_err(|error| StorageError::unknown(error.to_string()))
        }
    }
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
    let sorted = Sorted::new(&batch.ops);
    if single::fits(&sorted) {
        return vec![("a batch in one", single::statement(&of, &batch.ops, &sorted).sql)];
    }
    whole::statements(&of, &sorted)
}
