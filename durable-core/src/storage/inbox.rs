//! What a service's transactions have put into a table of its own, and the engine moves on: what of it goes together, what
//! comes too late, and what becomes of rows that cannot be read. A storage brings the rows and its transactions.

use async_trait::async_trait;
use std::collections::HashSet;

use super::batch::{Op, Outcome, Raise, Raised, Spawn};
use super::rows::RunId;
use super::{Result, StorageError};

/// At most so many rows are moved on at once, and so many bytes, or one.
const ROWS: usize = 200;
const BYTES: usize = 4 << 20;

/// A start or a message that waits.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Waiting {
    /// `start` or `message`.
    pub what: Box<str>,
    /// The process's id.
    pub id: Box<str>,
    /// A start's kind, a message's event.
    pub name: Box<str>,
    /// A start's run, a message's id.
    pub token: Box<str>,
    /// JSON text.
    pub payload: Box<str>,
    /// Of a start: the digest of its input.
    pub digest: Box<str>,
    /// Of a start: a finished process makes way.
    pub restart: bool,
}

impl Waiting {
    /// A row, from its texts in the order of the fields.
    pub fn new([what, id, name, token, payload, digest]: [Box<str>; 6], restart: bool) -> Self {
        Self { what, id, name, token, payload, digest, restart }
    }

    fn op(self) -> Result<Op> {
        let Self { what, id, name, token, payload, digest, restart } = self;
        match &*what {
            "start" => Ok(Op::Spawn(Spawn {
                run: RunId(token.parse().map_err(StorageError::schema)?),
                id,
                kind: name,
                input: payload,
                digest,
                take: false,
                restart_finished: restart,
            })),
            "message" => Ok(Op::Raise(Raise { id, name, event_id: token, payload })),
            other => Err(StorageError::unknown_value("what", other, "start, message")),
        }
    }
}

/// The rows of an inbox, or some of them, which a storage moves on.
#[async_trait]
pub trait Inbox: Send {
    /// What waits there, committed and not refused, in the order of its numbers, at most `most` rows, none of them for the ids `except`. A
    /// row that cannot be read is an error of its own.
    async fn waiting(&mut self, most: usize, except: &[Box<str>]) -> Result<Vec<(i64, Result<Waiting>)>>;

    /// Takes these rows out and does what they say, in one transaction; none if one of them was not there any more, in which
    /// case nothing happened. It does not wait long for a lock.
    async fn take(&mut self, numbers: &[i64], ops: &[Op]) -> Result<Option<Vec<Outcome>>>;

    /// Leaves a row where it is, with the reason, until its process is deleted. It does not wait any more.
    async fn refuse(&mut self, number: i64, why: &str) -> Result<()>;
}

/// Moves on the first rows that wait, and says how many; none are left if it says 0. Who comes at the same time finds the rest:
/// the order must not depend on who is faster. What came too late (the process has ended, the id is another's) is dropped
/// with a warning: nobody is there to be told. What the database refuses, or this version cannot read, stays where it is, with
/// the reason, and the rows behind it go on.
///
/// # Errors
/// [`StorageError::Blocked`] if all that is left is for processes whose rows another session has locked. Else
/// those of the storage. A lost answer is no worse than none: what was moved on is not there any more.
pub async fn move_on(inbox: &mut dyn Inbox) -> Result<usize> {
    let mut most = ROWS;
    let mut held: Vec<Box<str>> = Vec::new();
    let mut why_held = None;
    loop {
        let Together { numbers, ops, unfit } = together(inbox.waiting(most, &held).await?);
        for (number, why) in &unfit {
            tracing::error!("it stays in the inbox as number {number}: {why}");
            inbox.refuse(*number, why).await?;
        }
        if ops.is_empty() {
            return why_held.map_or(Ok(unfit.len()), |why| Err(StorageError::Blocked(why)));
        }
        match inbox.take(&numbers, &ops).await {
            Ok(Some(outcomes)) => {
                for (op, outcome) in ops.iter().zip(&outcomes) {
                    if let Some((id, why)) = too_late(op, outcome) {
                        tracing::warn!(id = %id, "dropped from the inbox: {why}");
                    }
                }
                return Ok(ops.len() + unfit.len());
            }
            // Another one has been faster.
            Ok(None) => {}
            // One of them is what the database refuses; alone, it can be told.
            Err(StorageError::Refused(_)) if ops.len() > 1 => most = 1,
            Err(StorageError::Refused(why)) => {
                for number in numbers {
                    tracing::error!("it stays in the inbox as number {number}: the database refuses it: {why}");
                    inbox.refuse(number, &why.to_string()).await?;
                }
                return Ok(1 + unfit.len());
            }
            Err(StorageError::Blocked(_)) if ops.len() > 1 => most = 1,
            // Its process is held; those of others go on.
            Err(StorageError::Blocked(why)) => {
                held.extend(ops.into_iter().filter_map(|op| match op {
                    Op::Spawn(Spawn { id, .. }) | Op::Raise(Raise { id, .. }) => Some(id),
                    _ => None,
                }));
                why_held = Some(why);
                most = ROWS;
            }
            Err(error) => return Err(error),
        }
    }
}

/// What a batch comes to whose ids' rows were moved on: `swept` says whether all were. What is wrong with them is not the
/// batch's fault.
///
/// # Errors
/// [`StorageError::Blocked`] if some are left: the batch must wait behind them.
pub fn before_a_batch(swept: Result<bool>) -> Result<()> {
    match swept {
        Ok(true) => Ok(()),
        Ok(false) => Err(StorageError::blocked("too much waits in the inbox before it")),
        Err(StorageError::Blocked(why)) => Err(StorageError::Blocked(why)),
        Err(error) => Err(StorageError::unavailable(error.to_string())),
    }
}

#[derive(Default)]
struct Together {
    numbers: Vec<i64>,
    ops: Vec<Op>,
    unfit: Vec<(i64, String)>,
}

/// As many as go together.
fn together(rows: Vec<(i64, Result<Waiting>)>) -> Together {
    let mut found = Together::default();
    let mut bytes = 0;
    let mut starts: HashSet<Box<str>> = HashSet::new();
    for (number, row) in rows {
        let op = match row.and_then(Waiting::op) {
            Ok(op) => op,
            Err(why) => {
                found.unfit.push((number, why.to_string()));
                continue;
            }
        };
        // A start goes before the messages of its batch, and one of two waits for the next.
        let joins = match &op {
            Op::Spawn(spawn) => {
                bytes += spawn.input.len();
                let told = |op: &Op| matches!(op, Op::Raise(raise) if raise.id == spawn.id);
                !found.ops.iter().any(told) && starts.insert(spawn.id.clone())
            }
            Op::Raise(raise) => {
                bytes += raise.payload.len();
                true
            }
            _ => true,
        };
        if !joins || (bytes > BYTES && !found.ops.is_empty()) {
            break;
        }
        found.numbers.push(number);
        found.ops.push(op);
    }
    found
}

/// Whose it is and why it cannot be moved on.
fn too_late<'o>(op: &'o Op, outcome: &Outcome) -> Option<(&'o str, String)> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn row(what: &str, id: &str, token: &str) -> Result<Waiting> {
        let [what, id, name, token, payload, digest] = [what, id, "name", token, "1", ""].map(Box::from);
        Ok(Waiting::new([what, id, name, token, payload, digest], false))
    }

    #[test]
    fn what_goes_together() {
        let run = RunId::new().0.to_string();
        let rows = vec![
            row("start", "a", &run),
            row("message", "a", "1"),
            row("later", "a", "2"),
            row("start", "b", "no uuid"),
            Err(StorageError::schema("a null")),
            row("message", "b", "3"),
            // There is a start of it already; and there are messages before it.
            row("start", "a", &run),
            row("message", "c", "4"),
        ];
        let rows: Vec<_> = (1..).zip(rows).collect();
        let found = together(rows);
        assert_eq!(found.numbers, [1, 2, 6]);
        assert_eq!(found.unfit.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [3, 4, 5]);
        assert!(found.unfit[0].1.contains("what holds \"later\""), "{}", found.unfit[0].1);
    }
}
