use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize, Serializer};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

use super::StorageError;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);
        impl $name {
            /// A new one, that sorts after those made before it.
            #[allow(clippy::new_without_default)]
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

id! {
    /// One run of a process: restarting a finished process makes a new run of the same id. Records belong to the run.
    RunId
}
id! {
    /// One engine in one program from its start until it stops or is fenced. Owning a process is a reference to it.
    InstanceId
}

macro_rules! text_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum $name { $($(#[$vdoc])* $variant,)* }
        impl $name {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
            /// As it stands in the database.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
            /// The one that stands in the database as `text`.
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$variant),)* _ => None }
            }
            /// The one that stands in the database's column `column` as `text`.
            pub fn read(column: &str, text: &str) -> super::Result<Self> {
                Self::parse(text).ok_or_else(|| StorageError::unknown_value(column, text, &[$($text),*].join(", ")))
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
    };
}

text_enum! {
    /// Where a process stands.
    Status {
        /// An instance owns it.
        Running = "running",
        /// It waits: for its time, for an event, for another process, or for an instance with room that knows its kind.
        Waiting = "waiting",
        /// Its function returned `Ok`.
        Completed = "completed",
        /// Its function returned an error.
        Failed = "failed",
        /// It ended because it was cancelled.
        Cancelled = "cancelled",
        /// A fault in the code stopped it; it keeps its records and goes on when told to resume.
        Stuck = "stuck",
    }
}

impl Status {
    /// Completed, failed or cancelled.
    pub fn is_finished(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

text_enum! {
    /// Which operation wrote a record. A record of another kind than asked for makes the process stuck.
    OpKind {
        /// `proc.step`
        Step = "step",
        /// `proc.get` and `proc.set`
        Value = "value",
        /// `proc.delay`
        Delay = "delay",
        /// `proc.event`
        Event = "event",
        /// `proc.race`
        Race = "race",
        /// `proc.raise`
        Raise = "raise",
        /// `proc.spawn`
        Spawn = "spawn",
        /// `proc.output`
        Output = "output",
        /// `proc.transaction`
        Transaction = "transaction",
    }
}

text_enum! {
    /// How far a record is.
    RecordState {
        /// It will be overwritten by its outcome: a retry's failed attempts, a timer's due time.
        Pending = "pending",
        /// The outcome, a success.
        Done = "done",
        /// The outcome, an error.
        Failed = "failed",
    }
}

/// The part of a process that a record belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
#[repr(i16)]
pub enum Scope {
    /// The process itself.
    #[default]
    Process = 0,
    /// Its compensation.
    Compensation = 1,
}

impl Scope {
    /// The one with this number, as it stands in the database's column `scope`.
    pub fn read(number: i64) -> super::Result<Self> {
        match number {
            0 => Ok(Self::Process),
            1 => Ok(Self::Compensation),
            _ => Err(StorageError::unknown_value("scope", &number.to_string(), "0, 1")),
        }
    }
}

/// What a record is found by, within its run.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordKey {
    /// The process itself or its compensation.
    pub scope: Scope,
    /// The name that the code gave.
    pub name: Arc<str>,
    /// The key beside the name; empty if none.
    pub key: Arc<str>,
}

impl RecordKey {
    /// The idempotency key of this operation in this run.
    pub(crate) fn idempotency(&self, run: RunId) -> Uuid {
        let mut bytes = Vec::with_capacity(self.name.len() + self.key.len() + 8);
        bytes.push(self.scope as u8);
        // The length in front: ("ab", "c") and ("a", "bc") differ.
        bytes.extend((self.name.len() as u32).to_le_bytes());
        bytes.extend(self.name.as_bytes());
        bytes.extend(self.key.as_bytes());
        Uuid::new_v5(&run.0, &bytes)
    }
}

impl fmt::Display for RecordKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.name)?;
        if !self.key.is_empty() {
            write!(f, " key {:?}", self.key)?;
        }
        if self.scope == Scope::Compensation {
            write!(f, " (compensation)")?;
        }
        Ok(())
    }
}

/// What an operation left behind.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The operation.
    pub op: OpKind,
    /// How far it is.
    pub state: RecordState,
    /// JSON text, byte for byte as it was written.
    pub payload: Box<str>,
    /// Attempts that failed so far.
    pub attempts: i32,
    /// Its place in the order in which the run's records were sent to be written.
    pub seq: i32,
    /// The claim number of the execution that wrote it.
    pub claim: i64,
}

/// One process as it stands in the database.
#[derive(Clone, Debug, PartialEq)]
pub struct ProcessRow {
    /// Its run.
    pub run: RunId,
    /// Its user-chosen id.
    pub id: Box<str>,
    /// Its kind.
    pub kind: Box<str>,
    /// Where it stands.
    pub status: Status,
    /// The input, JSON text.
    pub input: Box<str>,
    /// The result or the error, JSON text; set when it completed or failed.
    pub output: Option<Box<str>>,
    /// Why it failed or is stuck, in words.
    pub reason: Option<Box<str>>,
    /// The instance that runs it.
    pub owner: Option<InstanceId>,
    /// How often it was claimed: the number of its current or last execution.
    pub claim: i64,
    /// The last execution that ended in order: parked, released, resumed after a fix.
    pub calm_claim: i64,
    /// When it is due; none if only a message wakes it.
    pub wake_at: Option<DateTime<Utc>>,
    /// What it waits for, in words.
    pub waiting_for: Option<Box<str>>,
    /// How many signals it was sent: messages, a cancellation, awaited processes that ended. The number of its last
    /// message or of a later signal.
    pub signals: i64,
    /// When cancellation was asked for.
    pub cancel_requested_at: Option<DateTime<Utc>>,
    /// When its owner recorded that the run is cancelled.
    pub cancelled_at: Option<DateTime<Utc>>,
    /// The place of that among the run's records.
    pub cancelled_seq: Option<i32>,
    /// When it was started.
    pub created_at: DateTime<Utc>,
    /// When its status last changed.
    pub status_at: DateTime<Utc>,
    /// When it ended.
    pub finished_at: Option<DateTime<Utc>>,
}

/// What makes an instance known to the others.
#[derive(Clone, Debug)]
pub struct NewInstance {
    /// Its id.
    pub id: InstanceId,
    /// The namespace that it serves.
    pub namespace: Box<str>,
    /// For people: program and process id.
    pub label: Box<str>,
    /// The kinds that it has registered.
    pub kinds: Vec<Box<str>>,
    /// After which silence it counts as dead.
    pub expiry: Duration,
}

impl NewInstance {
    /// The expiry in milliseconds, as it stands in a row.
    pub fn expiry_ms(&self) -> i64 {
        i64::try_from(self.expiry.as_millis()).unwrap_or(i64::MAX)
    }
}

/// Whether an instance's proof of life is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockState {
    /// Held: the program lives.
    Held,
    /// Free, and the last heartbeat says that it was held: the program died.
    Free,
    /// Can't be told.
    Unknown,
}

/// Another instance, as seen at one look.
#[derive(Clone, Debug, PartialEq)]
pub struct Peer {
    /// Its id.
    pub instance: InstanceId,
    /// Its last heartbeat, by the database's clock.
    pub heartbeat_at: DateTime<Utc>,
    /// Its proof of life.
    pub lock: LockState,
    /// It was fenced, and what it owned is not all handed back yet.
    pub fenced: bool,
    /// How long its proof of life took to come back when it was lost, or to be had at first: it may be gone for as long, and
    /// longer, of an instance that lives.
    pub comeback: Duration,
    /// The kinds that it has registered; none if they cannot be read.
    pub kinds: Vec<Box<str>>,
    /// After which silence it wants to count as dead. An observer that is more patient waits longer.
    pub expiry: Duration,
}

/// A time that stands in a row in milliseconds; zero for a negative one.
pub fn millis(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

/// One look at the other instances.
#[derive(Clone, Debug)]
pub struct Peers {
    /// The database's time of the look.
    pub now: DateTime<Utc>,
    /// The others.
    pub peers: Vec<Peer>,
}

/// What an instance asks when it looks for work.
#[derive(Clone, Debug)]
pub struct Poll {
    /// The instance.
    pub instance: InstanceId,
    /// Its namespace.
    pub namespace: Box<str>,
    /// The kinds that it could run.
    pub kinds: Vec<Box<str>>,
    /// Runs whose end somebody here awaits.
    pub watched: Vec<RunId>,
}

/// What there is to do.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Polled {
    /// The database's time.
    pub now: DateTime<Utc>,
    /// For each kind that has a waiting process with a due time: the earliest.
    pub due: Vec<(Box<str>, DateTime<Utc>)>,
    /// Own runs that another instance has signalled, with their signal counts.
    pub signalled: Vec<(RunId, i64)>,
    /// Those of the watched runs that have ended or are gone.
    pub ended: Vec<RunId>,
    /// There was more to do for the storage itself than it does at once: the next look is due now.
    pub more: bool,
}

/// Which processes to list or count.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only this kind.
    pub kind: Option<Box<str>>,
    /// Only this status.
    pub status: Option<Status>,
    /// Only those whose status has not changed since.
    pub unchanged_since: Option<DateTime<Utc>>,
    /// Only runs after this one: the next page.
    pub after: Option<RunId>,
    /// At most so many.
    pub limit: usize,
}

/// A row of a count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Counted {
    /// The kind.
    pub kind: Box<str>,
    /// The status.
    pub status: Status,
    /// How many.
    pub count: u64,
    /// Whether a live instance registers the kind.
    pub served: bool,
}
