//! Where state lives: the [`Storage`] trait, what it is handed and what it answers.
//!
//! The engine does the batching, scheduling and recovering, once for every database. A storage only speaks its
//! database: it commits a [`Batch`] as one fenced transaction, reads what it is asked for, and tells errors apart by
//! what the caller may do next ([`StorageError`]). The cases that every storage must pass are in
//! `durable_core::conformance` (feature `conformance`).

mod batch;
pub mod chores;
mod error;
pub mod housekeeping;
pub mod inbox;
mod load;
pub mod migration;
mod rows;
mod sorted;
mod transaction;

pub(crate) use batch::SpawnRecord;
pub use batch::{
    Batch, Claimed, Effect, Fence, Finish, Forget, Op, Order, Outcome, Park, Prepared, Raise, Raised, RecordOp, Spawn,
    Spawned, What,
};
pub use error::StorageError;
pub use load::{Ended, EventRow, Fate, Load, Loaded, RunState, Scales, Target, Wanted};
pub use rows::{
    Counted, Filter, InstanceId, LockState, NewInstance, OpKind, Peer, Peers, Poll, Polled, ProcessRow, Record,
    RecordKey, RecordState, RunId, Scope, Status, millis,
};

pub use sorted::{Letter, Sorted, Start};
pub use transaction::{Committed, Ending, Open, OutboxWriter, RolledBack, Slot, Transactional, Tx, source};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use std::time::Duration;

/// What a storage's calls return.
pub type Result<T, E = StorageError> = std::result::Result<T, E>;

/// Divides a number of connections among batches, the engine's looks for work, and callers' reads, at least one each. Each
/// kind waits only for its own connections, so neither looks nor callers delay a record.
pub fn shares(connections: usize) -> [usize; 3] {
    let writing = connections / 4 + 1;
    let others = connections.saturating_sub(writing).max(2);
    [writing, others.div_ceil(2), others / 2]
}

/// A database that keeps processes.
///
/// Every method is called from tasks of the engine's own, never from user code, so a future that it returns is
/// dropped only when the whole host is dropped. Even then it must leave no transaction open.
///
/// The documentation of each method says what is **atomic**, what is **idempotent**, and what holds **after a crash**.
#[async_trait]
pub trait Storage: Send + Sync + 'static {
    /// The storage's name for logs and figures: `sqlite`, `postgres`.
    fn name(&self) -> &'static str;

    /// Whether the heartbeat runs on a thread and a connection of its own (`true` for every real database), so that
    /// user code which blocks every runtime thread does not cost the lease. The in-memory storage says `false`: it
    /// lives and dies with the runtime, whose clock may be a paused one.
    fn heartbeat_thread(&self) -> bool {
        true
    }

    /// Whether [`changed`](Self::changed) tells of every write and of every death of an instance at once, so that
    /// nothing need be looked at by time. Only a storage that lives within the program can say `true`; its heartbeats
    /// and looks are hours apart, so that a test in paused time does not step through a year second by second.
    fn announces_everything(&self) -> bool {
        false
    }

    /// The storage as a [`Transactional`] one, where it is: itself. A wrapper hands on what it wraps.
    fn transactional(&self) -> Option<&(dyn std::any::Any + Send + Sync)> {
        None
    }

    /// Makes an instance known: its row, its fence with generation 0, and its proof of life (a lock that the
    /// operating system or the server releases when the program dies), the lock **before** the row can be seen by
    /// others. Called on the runtime that will beat. Dropping the heart lets go of the proof of life.
    ///
    /// Atomic. Idempotent for one [`InstanceId`], whose former heart is dropped by then: one that is known stays as it
    /// is. After a crash the row stays until another instance has taken over. Returns the database's time as well.
    async fn enlist(&self, instance: &NewInstance) -> Result<(Box<dyn Heart>, DateTime<Utc>)>;

    /// Sets the instance's write generation to `generation` if it is lower, after every batch of a lower generation
    /// has either committed or can no longer commit.
    ///
    /// This is how an unknown outcome is made known: after it, what an earlier attempt wrote can be read, and nothing
    /// of it can still arrive. Idempotent. [`StorageError::Fenced`] if the instance was taken over.
    async fn refence(&self, instance: InstanceId, generation: i64) -> Result<()>;

    /// Does that part of a commit which needs no database, and leaves it in [`Batch::prepared`]. Called, for a full batch,
    /// while the database is busy with the one before it; not for every batch. Doing nothing is right, too.
    fn prepare(&self, _: &Batch) {}

    /// Commits a batch as **one transaction**, fenced: unless the instance's row has exactly the batch's generation
    /// and is not fenced, nothing is written and the answer is [`StorageError::Fenced`]. The fence is read by a
    /// statement that starts after its lock is granted.
    ///
    /// Atomic. Idempotent by the tokens in the operations: the same batch again changes nothing and answers the same,
    /// except that [`Op::Claim`] claims more, that a message which reached nobody is judged anew, and that an end wakes
    /// again those that still await it. An operation that
    /// the database refuses for good fails the whole batch with [`StorageError::Refused`]; the engine splits it until
    /// the culprit is found.
    ///
    /// Answers one [`Outcome`] for each operation, in order.
    async fn commit(&self, batch: &Batch) -> Result<Vec<Outcome>>;

    /// Reads what runs need in order to go on, one [`Loaded`] for each, in their order; none at all if it is more than
    /// [`Load::most`], which a storage notices while it reads: it holds no more in memory than that, and some.
    ///
    /// A consistent snapshot of each run: every message up to [`ProcessRow::signals`] is there. A run whose stored
    /// form cannot be understood comes back as [`Loaded::state`] `Err`, alone.
    async fn load(&self, load: &Load) -> Result<Option<Vec<Loaded>>>;

    /// How many bytes each of the runs comes to, as [`RunState::weight`] counts them, without reading them into memory. Those
    /// that do not exist may be left out.
    async fn weigh(&self, load: &Load) -> Result<Vec<(RunId, usize)>>;

    /// The runs that the instance owns, with their claim numbers, in order of their ids, after `after`.
    async fn owned(&self, instance: InstanceId, after: Option<RunId>, limit: usize) -> Result<Vec<(RunId, i64)>>;

    /// What there is to do for an instance, in one round trip, at a cost that does not grow with the number of
    /// waiting or finished processes.
    async fn poll(&self, poll: &Poll) -> Result<Polled>;

    /// Returns when something may have been written since the caller's last call with this cursor, which starts at 0
    /// and means nothing to the caller; or after `at_most`. A hint: it may come late, never, or for nothing.
    async fn changed(&self, cursor: &mut u64, at_most: Duration);

    /// All other instances of the namespace, those included that are fenced and still own processes.
    async fn peers(&self, namespace: &str, me: InstanceId) -> Result<Peers>;

    /// Takes the right to write from another instance, unless its heartbeat has changed since `seen` was read.
    /// When it returns `true`, no batch of that instance can commit any more. Idempotent.
    async fn fence(&self, seen: &Peer) -> Result<bool>;

    /// Hands up to `limit` processes of a **fenced** instance back to everybody and says how many; when it says 0,
    /// the instance's row and its proof of life are gone too.
    async fn release(&self, fenced: InstanceId, limit: usize) -> Result<usize>;

    /// Ends an instance in order: fences it, hands back what it may still own, removes its row and its proof of life.
    async fn retire(&self, instance: InstanceId) -> Result<()>;

    /// Clears up behind somebody who has deleted rows of instances: one that owns processes, or of which one row is left, is
    /// made known again, as a **fenced** one, so that whoever looks at the others hands back what it owns; a fence alone that
    /// guards nothing is removed. Says how many there were. At a cost that does not grow with what is owned. Idempotent.
    /// Nobody whose rows are there is touched.
    async fn reinstate(&self) -> Result<usize>;

    /// One process: the run given, or the current run of the id. Its input is not read: `null` stands for it.
    async fn find(&self, namespace: &str, id: &str, run: Option<RunId>) -> Result<Option<ProcessRow>>;

    /// One record of a run.
    async fn record(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>>;

    /// The processes of a namespace that pass the filter, in order of their runs, a page at a time. Neither their inputs nor
    /// their outputs are read, which may be large: `null` and none stand for them.
    async fn list(&self, namespace: &str, filter: &Filter) -> Result<Vec<ProcessRow>>;

    /// How many processes pass the filter, by kind and status. `served` tells whether a live instance registers the kind.
    async fn count(&self, namespace: &str, filter: &Filter) -> Result<Vec<Counted>>;
}

/// The heartbeat of one instance, on a connection of its own.
#[async_trait]
pub trait Heart: Send {
    /// Renews the instance's heartbeat by the database's clock, keeps or regains its proof of life, and returns the
    /// database's time. [`StorageError::Fenced`] if the instance was taken over; it writes nothing then.
    async fn beat(&mut self) -> Result<DateTime<Utc>>;
}
