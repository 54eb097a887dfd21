//! A batch as SQL: a constant number of statements for each kind of operation that is in it, whose rows travel as one
//! JSON array; and what their answers say.

mod answers;
mod chores;
mod messages;
mod orders;
mod owned;
mod records;
mod sets;
mod starts;

use durable_core::storage::{Batch, Op, Outcome, RecordOp, Result, StorageError};
use sqlx::sqlite::SqliteConnection;

use self::answers::Part;
pub(crate) use self::chores::All;
use crate::script::{Arg, NOW, Script};

/// True while the batch's instance and generation may write. Evaluated inside the batch's own write transaction, which
/// excludes every other writer, so it cannot be stale.
const FENCED: &str =
    "EXISTS (SELECT 1 FROM durable_fences WHERE instance = ? AND generation = ? AND fenced_at IS NULL)";
/// Whether anybody awaits anything: evaluated once for a statement, so that where nobody does nobody is looked for.
const ANYBODY: &str = "EXISTS (SELECT 1 FROM durable_waiters)";
// `+owner IS ?` in the statements keeps SQLite from going through all that the instance owns: rows are found by their run.
// Not `=`, which tells it that the owner is not null: reason enough to go through the index of all that are owned.
pub(crate) const UNFINISHED: &str = "('running', 'waiting', 'stuck')";
/// Both lists are used positively: a status that this version does not know is neither.
pub(crate) const FINISHED: &str = "('completed', 'failed', 'cancelled')";

/// A batch on its way.
pub(crate) struct Plan<'b> {
    batch: &'b Batch,
    script: Script,
    instance: Arg,
    generation: Arg,
    namespace: Arg,
    /// Where each kind's answer is.
    fence: usize,
    parts: Vec<Part>,
}

/// A batch as it is sent.
enum Made {
    /// Records alone, of one head: one statement, which is a transaction of its own.
    Records(Script),
    Whole(Whole),
}

struct Whole {
    script: Script,
    fence: usize,
    parts: Vec<Part>,
}

impl Made {
    fn of(batch: &Batch) -> Self {
        let plain = |op: &Op| matches!(op, Op::Record(RecordOp { effect: None, takes: None, awaited: None, .. }));
        if !batch.ops.is_empty() && batch.ops.iter().all(plain) {
            let mut plan = Plan::empty(batch);
            plan.records();
            if plan.parts.len() == 1 {
                return Self::Records(plan.script);
            }
        }
        Self::Whole(Whole::of(batch))
    }
}

impl Whole {
    fn of(batch: &Batch) -> Self {
        let Plan { script, fence, parts, .. } = Plan::new(batch);
        Self { script, fence, parts }
    }
}

/// Makes a batch ready to be sent.
pub(crate) fn prepare(batch: &Batch) {
    batch.prepared.put(Made::of(batch));
}

/// Commits a batch. An error says that nothing was written, or, as [`StorageError::Unknown`], that it may have been.
pub(crate) async fn commit(connection: &mut SqliteConnection, batch: &Batch) -> Result<Vec<Outcome>> {
    let Whole { script, fence, parts } = match batch.prepared.take().unwrap_or_else(|| Made::of(batch)) {
        Made::Records(script) => {
            let written = script.run(connection).await?.iter().map(|answer| answer.changes).sum::<u64>();
            if written == batch.ops.len() as u64 {
                return Ok(vec![Outcome::Recorded; batch.ops.len()]);
            }
            // The long way finds out why, and writes the same again.
            Whole::of(batch)
        }
        Made::Whole(whole) => whole,
    };
    let mut answers = script.run(connection).await?;
    if answers.get(fence).is_none_or(|answer| answer.rows.is_empty()) {
        return Err(StorageError::Fenced);
    }
    // From here on it is committed; whatever goes wrong with the answers does not undo it.
    answers::read(connection, batch, parts, &mut answers)
        .await
        .map_err(|error| StorageError::unknown(error.to_string()))
}

impl<'b> Plan<'b> {
    fn empty(batch: &'b Batch) -> Self {
        Self {
            batch,
            script: Script::default(),
            instance: batch.fence.instance.to_string().into(),
            generation: batch.fence.generation.into(),
            namespace: (&*batch.namespace).into(),
            fence: 0,
            parts: Vec::new(),
        }
    }

    fn new(batch: &'b Batch) -> Self {
        let mut plan = Self::empty(batch);
        plan.script.add("BEGIN IMMEDIATE", []);
        let fence = plan.fence_args();
        plan.fence = plan.script.add(&format!("SELECT 1 WHERE {FENCED}"), fence);
        plan.spawns();
        plan.raises();
        plan.records();
        plan.awaits();
        plan.owned();
        plan.finishes();
        plan.parks();
        plan.orders();
        plan.script.add("COMMIT", []);
        plan
    }

    fn fence_args(&self) -> [Arg; 2] {
        [self.instance.clone(), self.generation.clone()]
    }

    fn ops(&self) -> impl Iterator<Item = (usize, &'b Op)> + use<'b> {
        self.batch.ops.iter().enumerate()
    }
}

/// What a signal does besides counting: tells an owner that is another instance, makes a waiting process due. One `?`:
/// the writing instance.
pub(crate) fn wake() -> String {
    format!(
        "signalled = CASE WHEN owner IS NOT NULL AND owner <> ? THEN 1 ELSE signalled END,
         wake_at = CASE WHEN status = 'waiting' THEN min(coalesce(wake_at, {NOW}), {NOW}) ELSE wake_at END"
    )
}
