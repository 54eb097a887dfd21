use serde::Serialize;
use std::borrow::Borrow;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::pin::Pin;

use super::handle::Send as SendMessage;
use super::{Handle, Host, SpawnProcess};
use crate::definition::{Definition, Event};
use crate::error::{RaiseError, SpawnError};
use crate::storage::{OutboxWriter, Raised};

/// A start inside the service's own transaction, to be awaited. Backends make it: `host.spawn_in(&mut *tx, …)`.
///
/// Nothing happens if the transaction rolls back. If it commits, the process is there, and begins within the time in
/// which an instance looks for work.
#[must_use = "nothing happens before it is awaited"]
pub struct SpawnIn<'w, W, O, E> {
    spawn: SpawnProcess<O, E>,
    outbox: W,
    transaction: PhantomData<&'w ()>,
}

impl<'w, W: 'w, O, E> SpawnIn<'w, W, O, E> {
    /// For the extension traits of backends.
    pub fn new<I: Borrow<Q>, Q: Serialize + ?Sized>(
        host: &Host,
        outbox: W,
        definition: Definition<I, O, E>,
        id: impl Into<String>,
        input: &Q,
    ) -> Self {
        Self { spawn: host.spawn(definition, id, input), outbox, transaction: PhantomData }
    }

    /// A process of that id and kind will do, whatever its input.
    pub fn existing_ok(mut self) -> Self {
        self.spawn = self.spawn.existing_ok();
        self
    }

    /// If the process has ended, it gets a new run with this input.
    pub fn restart_finished(mut self) -> Self {
        self.spawn = self.spawn.restart_finished();
        self
    }
}

impl<'w, W, O, E> IntoFuture for SpawnIn<'w, W, O, E>
where
    W: OutboxWriter + 'w,
    O: 'static,
    E: 'static,
{
    type Output = Result<Handle<O, E>, OutboxError<SpawnError, W::Error>>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'w>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { mut spawn, outbox, .. } = self;
        Box::pin(async move {
            let prepared = spawn.prepare().map_err(|limit| OutboxError::Process(limit.into()))?;
            let spawned = outbox.spawn(spawn.namespace(), &prepared).await.map_err(OutboxError::Database)?;
            spawn.judge_coming(&prepared.digest, &spawned).map_err(OutboxError::Process)
        })
    }
}

/// A message inside the service's own transaction, to be awaited. Backends make it: `host.raise_in(&mut *tx, …)`.
///
/// Nothing happens if the transaction rolls back. If it commits, the message is in the mailbox, and the process is
/// woken within the time in which an instance looks for work.
#[must_use = "nothing happens before it is awaited"]
pub struct RaiseIn<'w, W> {
    send: SendMessage,
    outbox: W,
    transaction: PhantomData<&'w ()>,
}

impl<'w, W: 'w> RaiseIn<'w, W> {
    /// For the extension traits of backends.
    pub fn new<T, Q>(host: &Host, outbox: W, id: impl Into<String>, event: Event<T>, payload: &Q) -> Self
    where
        T: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        Self { send: host.get(id).raise(event, payload), outbox, transaction: PhantomData }
    }

    /// The message's id: one that the run was sent before is not put in twice.
    pub fn id(mut self, id: impl fmt::Display) -> Self {
        self.send = self.send.id(id);
        self
    }
}

impl<'w, W: OutboxWriter + 'w> IntoFuture for RaiseIn<'w, W> {
    type Output = Result<(), OutboxError<RaiseError, W::Error>>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'w>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { send, outbox, .. } = self;
        Box::pin(async move {
            let (core, raise) = send.prepare().map_err(|limit| OutboxError::Process(limit.into()))?;
            let raised = outbox.raise(&core.namespace, &raise).await.map_err(OutboxError::Database)?;
            match raised {
                Raised::Delivered { .. } => Ok(()),
                Raised::Finished => Err(OutboxError::Process(RaiseError::Finished { id: raise.id })),
                Raised::NotFound => Err(OutboxError::Process(RaiseError::NotFound { id: raise.id })),
            }
        })
    }
}

/// Why a start or a message was not put into a transaction.
#[derive(Debug)]
pub enum OutboxError<P, D> {
    /// It cannot be: a limit, an id in use, no such process. The transaction may go on.
    Process(P),
    /// The database's own error, as from any other statement of the transaction.
    Database(D),
}

impl<P: fmt::Display, D: fmt::Display> fmt::Display for OutboxError<P, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(error) => error.fmt(f),
            Self::Database(error) => error.fmt(f),
        }
    }
}

impl<P, D> std::error::Error for OutboxError<P, D>
where
    P: std::error::Error + 'static,
    D: std::error::Error + 'static,
{
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Process(error) => Some(error),
            Self::Database(error) => Some(error),
        }
    }
}
