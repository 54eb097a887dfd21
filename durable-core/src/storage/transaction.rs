use async_trait::async_trait;
use std::any::Any;
use std::error::Error;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{InstanceId, Raise, Raised, Record, RecordKey, RecordOp, Result, RunId, Spawn, Spawned};

/// A storage on whose connections a service's own SQL runs, in one transaction with a step's record.
///
/// The engine calls every method from tasks of its own, which user code cannot drop.
#[async_trait]
pub trait Transactional: Any + Send + Sync {
    /// What the step's closure is handed: an open transaction that it owns. Dropped, it gives the connection back to
    /// its [`Open`]. Dropped both, the connection is closed, and the transaction rolled back with it.
    type Tx: Send + 'static;

    /// Begins a transaction, which the database itself ends should it be idle for longer than this, where it can.
    async fn begin(&self, idle: Duration) -> Result<Open<Self::Tx>>;

    /// Waits until nothing of an earlier transaction of this run can be committed any more, then reads the record.
    async fn settled(&self, run: RunId, key: &RecordKey) -> Result<Option<Record>>;
}

/// An open transaction.
pub struct Open<Tx> {
    /// For the closure.
    pub tx: Tx,
    /// For the engine.
    pub ending: Box<dyn Ending>,
}

/// A handle on an open transaction, for a step's closure: statements run on the connection that it lends, `&mut *tx`.
/// Begin and commit are the engine's.
#[derive(Debug)]
pub struct Tx<C> {
    /// There until it is dropped.
    connection: Option<C>,
    slot: Slot<C>,
}

/// Where the connection of a [`Tx`] waits for the transaction's end, once the handle was dropped.
#[derive(Debug)]
pub struct Slot<C>(Arc<Mutex<Option<C>>>);

impl<C> Tx<C> {
    /// A handle on a connection, and where that will be found.
    pub fn new(connection: C) -> (Self, Slot<C>) {
        let slot = Arc::new(Mutex::new(None));
        (Self { connection: Some(connection), slot: Slot(slot.clone()) }, Slot(slot))
    }
}

impl<C> Slot<C> {
    /// The connection, if the handle was dropped.
    pub fn take(&self) -> Option<C> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<C> Deref for Tx<C> {
    type Target = C;
    fn deref(&self) -> &C {
        #[allow(clippy::expect_used)]
        // Taken by the drop alone.
        self.connection.as_ref().expect("it is there until the drop")
    }
}

impl<C> DerefMut for Tx<C> {
    fn deref_mut(&mut self) -> &mut C {
        #[allow(clippy::expect_used)]
        // Taken by the drop alone.
        self.connection.as_mut().expect("it is there until the drop")
    }
}

impl<C> Drop for Tx<C> {
    fn drop(&mut self) {
        *self.slot.0.lock().unwrap_or_else(PoisonError::into_inner) = self.connection.take();
    }
}

/// The first `T` among an error and its sources.
pub fn source<'e, T: Error + 'static>(error: &'e (dyn Error + 'static)) -> Option<&'e T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// How a transaction ends. Dropped, its connection is closed.
#[async_trait]
pub trait Ending: Send + Sync {
    /// Writes the record and commits, as one with what the closure did, **if** the instance is not fenced, owns the run
    /// under the record's claim, and, unless the record is [shielded](RecordOp::shielded), the run is not cancelled; all of
    /// that is checked under locks that the commit lets go of.
    ///
    /// After [`StorageError::Unknown`](super::StorageError::Unknown) ask [`Transactional::settled`]. Whatever the
    /// answer, a record that stands already is never written over: of two transactions of one step one is committed.
    async fn commit(self: Box<Self>, instance: InstanceId, record: &RecordOp) -> Result<Committed>;

    /// Rolls back. An error says that the connection was gone: what the closure returned may be due to that.
    async fn rollback(self: Box<Self>) -> Result<RolledBack>;

    /// Whether an error of the closure's, or one of its sources, is the driver's for something that another try may not
    /// meet: a lost connection, a deadlock, a serialisation failure. None if none of them is the driver's.
    fn is_transient(&self, error: &(dyn Error + 'static)) -> Option<bool>;
}

/// Writes starts and messages into a transaction of the service's own. What it wrote is undone with that transaction.
#[async_trait]
pub trait OutboxWriter: Send {
    /// The driver's error.
    type Error: Send;

    /// Puts a start in, unless the id exists; says what the id has then, as this transaction sees it.
    async fn spawn(self, namespace: &str, spawn: &Spawn) -> Result<Spawned, Self::Error>;

    /// Puts a message in.
    async fn raise(self, namespace: &str, raise: &Raise) -> Result<Raised, Self::Error>;
}

/// What became of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Committed {
    /// It is committed, with its record.
    Recorded,
    /// The record stood there already; nothing of this transaction was kept.
    Exists,
    /// The run is cancelled; nothing was kept.
    Cancelled,
    /// The run is not owned under that claim; nothing was kept.
    Lost,
    /// The database refused it at the commit, by a deferred constraint: why. Nothing was kept.
    Refused(String),
    /// A statement had failed, after which the database keeps nothing, though the closure returned a success.
    Aborted,
    /// The closure's SQL had ended the transaction itself, or its handle is still in use somewhere: whether anything
    /// was kept is not known.
    Escaped,
}

/// How a transaction was found at its roll-back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RolledBack {
    /// In order.
    Open,
    /// A statement had failed, after which the database accepts no other.
    Aborted,
    /// The closure's SQL had ended the transaction itself.
    Escaped,
}
