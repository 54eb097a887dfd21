use super::load::Ended;
use super::rows::{InstanceId, OpKind, RecordKey, RecordState, RunId, Status};
use chrono::{DateTime, Utc};
use std::any::Any;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use uuid::Uuid;

/// Who writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence {
    /// The instance.
    pub instance: InstanceId,
    /// Its write generation.
    pub generation: i64,
}

/// What one instance commits at once. The engine never puts two operations on one row into one batch, except
/// messages to one process, which keep their order.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Batch {
    /// Who writes.
    pub fence: Fence,
    /// The namespace of every process named by its id.
    pub namespace: Box<str>,
    /// What is written. They take effect kind by kind in the order of the variants of [`Op`], and in this order
    /// within a kind; the effects of records with the starts and messages. None is about a run that another one starts.
    pub ops: Vec<Op>,
    /// How long it may wait for a lock, if that is less than the storage's own bound. The engine sets it while it finds the
    /// operation that is blocked.
    pub patience: Option<Duration>,
    /// What the storage has made of it beforehand.
    pub prepared: Prepared,
}

impl Batch {
    /// A batch that waits for as long as the storage's own bounds let it.
    pub fn new(fence: Fence, namespace: impl Into<Box<str>>, ops: Vec<Op>) -> Self {
        Self { fence, namespace: namespace.into(), ops, patience: None, prepared: Prepared::default() }
    }
}

/// What [`Storage::prepare`](super::Storage::prepare) has made of a batch. Whoever changes the batch empties it; a clone is
/// empty.
#[derive(Default)]
pub struct Prepared(Mutex<Option<Box<dyn Any + Send>>>);

impl Prepared {
    /// Keeps something.
    pub fn put<T: Any + Send>(&self, made: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(made));
    }

    /// Takes what is kept, if it is a `T`.
    pub fn take<T: Any>(&self) -> Option<T> {
        let made = self.0.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        made.downcast().ok().map(|made| *made)
    }
}

impl Clone for Prepared {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Prepared")
    }
}

/// One operation of a batch.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Op {
    /// Starts a process, unless its id exists → [`Outcome::Spawned`].
    Spawn(Spawn),
    /// Puts a message into a process's mailbox and wakes it → [`Outcome::Raised`].
    Raise(Raise),
    /// Writes a record of a run that the instance owns under this claim → [`Outcome::Recorded`],
    /// [`Outcome::Spawned`] or [`Outcome::Raised`] by its effect, or [`Outcome::Lost`]. The engine has read the run's
    /// records: it sends none with an effect, or that takes a message, for a key where one is final, except the same again.
    Record(RecordOp),
    /// Registers that `run`, which is the instance's, awaits `target`, or tells how that ended → [`Outcome::Awaits`].
    Await {
        /// The run that waits.
        run: RunId,
        /// The id of the process that it waits for.
        id: Box<str>,
        /// The run of that id; the current one if none.
        target: Option<RunId>,
    },
    /// The owner records that the run is cancelled → [`Outcome::Recorded`] or [`Outcome::Lost`].
    AcceptCancel {
        /// The run.
        run: RunId,
        /// Its claim.
        claim: i64,
        /// The place of this among its records.
        seq: i32,
    },
    /// The owner has read all signals up to this number → [`Outcome::Recorded`].
    Seen {
        /// The run.
        run: RunId,
        /// Its claim.
        claim: i64,
        /// The number.
        signals: i64,
    },
    /// Ends a run, or marks it stuck, and wakes those that await it → [`Outcome::Finished`] or [`Outcome::Lost`].
    Finish(Finish),
    /// Gives a run back → [`Outcome::Recorded`], [`Outcome::Signalled`] or [`Outcome::Lost`].
    Park(Park),
    /// What people order of a process → [`Outcome::Asked`].
    Order(Order),
    /// Claims due processes of a kind → [`Outcome::Claimed`]. What becomes due by the same batch may be left to a later
    /// claim.
    Claim {
        /// The kind.
        kind: Box<str>,
        /// At most so many.
        limit: usize,
    },
}

impl Op {
    /// Asks the current run of an id to cancel.
    pub fn cancel(id: Box<str>) -> Self {
        Self::Order(Order { id, run: None, what: What::Cancel })
    }
    /// Lets the current run of an id go on, if it is stuck or has failed.
    pub fn resume(id: Box<str>, forget: Vec<Forget>) -> Self {
        Self::Order(Order { id, run: None, what: What::Resume { forget } })
    }
    /// Deletes all runs of an id.
    pub fn delete(id: Box<str>) -> Self {
        Self::Order(Order { id, run: None, what: What::Delete })
    }
}

/// See [`Op::Order`].
#[derive(Clone, Debug)]
pub struct Order {
    /// The process.
    pub id: Box<str>,
    /// Only this run of it; the current one if none.
    pub run: Option<RunId>,
    /// What is ordered.
    pub what: What,
}

/// What people order. Nothing but a deletion touches a run that is not the current one of its id any more.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum What {
    /// Asks it to cancel. One that never ran ends cancelled at once.
    Cancel,
    /// Ends it as cancelled, unless it has ended already. Its owner loses the row; processes that await it are woken.
    Terminate {
        /// Why, in words.
        reason: Box<str>,
    },
    /// Lets it go on, if it is stuck or has failed.
    Resume {
        /// Records to erase first, each kept as an audit row.
        forget: Vec<Forget>,
    },
    /// Deletes it, if it has ended or is stuck, with all runs of its id; a run that is given and is not the current one any
    /// more, alone. Those that await what is deleted are woken.
    Delete,
}

impl What {
    pub(crate) const fn word(&self) -> &'static str {
        match self {
            Self::Cancel => "a request to cancel",
            Self::Terminate { .. } => "the termination of",
            Self::Resume { .. } => "a request to resume",
            Self::Delete => "the deletion of",
        }
    }
}

/// See [`Op::Spawn`].
#[derive(Clone, Debug)]
pub struct Spawn {
    /// The start token: if the id exists with this run, this operation has already happened.
    pub run: RunId,
    /// The process's id.
    pub id: Box<str>,
    /// Its kind.
    pub kind: Box<str>,
    /// Its input, JSON text.
    pub input: Box<str>,
    /// A digest of the canonical form of the input.
    pub digest: Box<str>,
    /// The instance takes it at once, with claim 1.
    pub take: bool,
    /// If the id exists and is finished, a new run replaces it.
    pub restart_finished: bool,
}

/// See [`Op::Raise`].
#[derive(Clone, Debug)]
pub struct Raise {
    /// The process's id.
    pub id: Box<str>,
    /// The event's name.
    pub name: Box<str>,
    /// The message's id: one that the run was sent before is not put in twice.
    pub event_id: Box<str>,
    /// JSON text.
    pub payload: Box<str>,
}

/// See [`Op::Record`].
#[derive(Clone, Debug)]
pub struct RecordOp {
    /// The run.
    pub run: RunId,
    /// The claim under which it is written.
    pub claim: i64,
    /// Where.
    pub key: RecordKey,
    /// The operation.
    pub op: OpKind,
    /// How far.
    pub state: RecordState,
    /// The engine knows of a record under this key, which this one replaces: a pending one, or a value. Where it does not,
    /// all that can stand there is an earlier attempt of this very write, so a storage need not look before it inserts.
    pub replaces: bool,
    /// JSON text. A record with an effect gets its payload from the effect's outcome instead: that of a message is
    /// [`Raised::as_json`], that of a start is [`Spawned::to_json`] of what is given here.
    pub payload: Box<str>,
    /// The run's cancellation does not reach the operation: in a compensation, or behind a point of no return.
    pub shielded: bool,
    /// Attempts that failed so far.
    pub attempts: i32,
    /// Its place among all records that the run has sent: with the claim it names this very write.
    pub seq: i32,
    /// The message that this record consumes.
    pub takes: Option<i64>,
    /// What else happens, in the same transaction.
    pub effect: Option<Effect>,
    /// The awaited run whose end this record holds; its waiter row is removed.
    pub awaited: Option<RunId>,
}

/// What a durable operation does to another process, together with its record.
#[derive(Clone, Debug)]
pub enum Effect {
    /// A message. The record's payload is [`Raised::as_json`] of its outcome.
    Raise(Raise),
    /// A start. The record's payload is [`Spawned::to_json`] of its outcome, given the record's payload.
    Spawn(Spawn),
}

/// See [`Op::Finish`].
#[derive(Clone, Debug)]
pub struct Finish {
    /// The run.
    pub run: RunId,
    /// The claim under which it ran.
    pub claim: i64,
    /// Completed, failed, cancelled or stuck.
    pub status: Status,
    /// The result or the error, JSON text.
    pub output: Option<Box<str>>,
    /// Why it failed or is stuck, in words.
    pub reason: Option<Box<str>>,
}

/// See [`Op::Park`].
#[derive(Clone, Debug)]
pub struct Park {
    /// The run.
    pub run: RunId,
    /// The claim under which it ran.
    pub claim: i64,
    /// When it is due; none if only a signal wakes it.
    pub wake_at: Option<DateTime<Utc>>,
    /// Parks only if no signal came after this number; none gives it back in any case, and if it has a due time, it is due
    /// by the storage's own clock at once: the engine's may be ahead of one that was set back.
    pub seen: Option<i64>,
    /// What it waits for, in words.
    pub waiting_for: Option<Box<str>>,
    /// How many executions before this one, which did nothing, ended in a death without a new record: they go on counting.
    pub deaths: i64,
}

/// A record to erase at a resume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forget {
    /// Which one.
    pub key: RecordKey,
    /// The key of its audit row.
    pub audit: Uuid,
}

/// What came of one operation.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Outcome {
    /// It stands in the database.
    Recorded,
    /// See [`Op::Spawn`].
    Spawned(Spawned),
    /// See [`Op::Raise`].
    Raised(Raised),
    /// The awaited process: its run, and how it ended if it has. None if there is none of that id.
    Awaits(Option<(RunId, Option<Ended>)>),
    /// The run ended; these runs of the same instance awaited it.
    Finished {
        /// Own runs to wake.
        wakes: Vec<RunId>,
    },
    /// Not parked: signals came in the meantime, the last with this number.
    Signalled(i64),
    /// The run is not owned under that claim, or its record was written by another claim: nothing was written for it.
    Lost,
    /// See [`Op::Order`].
    Asked {
        /// The run that was meant and its status before; none if there is none.
        before: Option<(RunId, Status)>,
        /// Own runs to wake.
        wakes: Vec<RunId>,
        /// Always false from a storage. The engine sets it where an earlier attempt, whose answer was lost, may have
        /// done it already: `before` may be its doing then.
        again: bool,
        /// A deletion has taken a part of its former runs, and is to be ordered again.
        more: bool,
    },
    /// What the operation needs to know of another process is not in a form that this version understands: why. Nothing
    /// was done for it; the neighbours were.
    Unreadable(String),
    /// The processes that are the instance's from now on.
    Claimed(Vec<Claimed>),
}

/// A process that was claimed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// Its run.
    pub run: RunId,
    /// The number of this claim.
    pub claim: i64,
}

/// What came of a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spawned {
    /// The run that the id has now.
    pub run: RunId,
    /// It was there already.
    pub existed: bool,
    /// Its kind.
    pub kind: Box<str>,
    /// The digest of its input.
    pub digest: Box<str>,
}

impl Spawned {
    /// As it stands in a record, which says once and for all whether the process has the input that was asked for: its
    /// digest, or empty if any input will do.
    pub fn to_json(&self, asked: &str) -> Box<str> {
        let other_input = !asked.is_empty() && *self.digest != *asked;
        let record = SpawnRecord { run: self.run, existed: self.existed, kind: self.kind.clone(), other_input };
        // A struct of strings and bools always serialises.
        serde_json::to_string(&record).unwrap_or_default().into()
    }
}

/// What stands in the record of a start.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct SpawnRecord {
    pub(crate) run: RunId,
    pub(crate) existed: bool,
    pub(crate) kind: Box<str>,
    pub(crate) other_input: bool,
}

/// What came of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Raised {
    /// It is in the mailbox.
    Delivered {
        /// The process's run.
        run: RunId,
        /// The message's number.
        number: i64,
        /// The writing instance owns the process.
        mine: bool,
    },
    /// The process has ended.
    Finished,
    /// There is no process of that id.
    NotFound,
}

impl Raised {
    /// As it stands in a record.
    pub const fn as_json(&self) -> &'static str {
        match self {
            Self::Delivered { .. } => r#""delivered""#,
            Self::Finished => r#""finished""#,
            Self::NotFound => r#""not found""#,
        }
    }
}
