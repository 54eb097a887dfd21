use chrono::{DateTime, Utc};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::borrow::Borrow;
use std::fmt;
use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;

use super::check_message;
use crate::definition::{Definition, Event};
use crate::engine::Core;
use crate::engine::held::Slot;
use crate::engine::wake::Context;
use crate::error::{Failure, HandleError, OutputError, RaiseError, Unavailable};
use crate::limits::{self, LimitError};
use crate::name::Name;
use crate::payload::{self, EncodeError};
use crate::storage::{
    Forget, InstanceId, Load, Op, OpKind, Order, Outcome, ProcessRow, Raise, Raised, Record, RecordKey, RecordState,
    RunId, Scope, Status, What,
};

/// Any JSON: the output of a process whose definition is not at hand.
pub type Json = serde_json::Value;

/// One process in the database, wherever it runs, seen from outside.
///
/// A handle from [`Host::spawn`](super::Host::spawn) is bound to its run; one from [`Host::get`](super::Host::get)
/// follows the id to its current run at each call. It costs nothing to keep.
pub struct Handle<O = Json, E = Json> {
    core: Arc<Core>,
    id: Box<str>,
    run: Option<RunId>,
    kind: Option<&'static str>,
    types: PhantomData<fn() -> Result<O, E>>,
}

impl<O, E> Clone for Handle<O, E> {
    fn clone(&self) -> Self {
        Self { core: self.core.clone(), id: self.id.clone(), run: self.run, kind: self.kind, types: PhantomData }
    }
}
impl<O, E> fmt::Debug for Handle<O, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("id", &self.id).field("run", &self.run).finish_non_exhaustive()
    }
}

/// What a process is doing. As JSON its times are in RFC 3339, its status as in the database.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Info {
    /// Its id.
    pub id: Box<str>,
    /// Its run.
    pub run: RunId,
    /// Its kind.
    pub kind: Box<str>,
    /// Where it stands.
    pub status: Status,
    /// Why it failed or is stuck, in words.
    pub reason: Option<Box<str>>,
    /// The instance that runs it.
    pub owner: Option<InstanceId>,
    /// The number of its current or last execution: how often it was taken into memory.
    pub execution: i64,
    /// When it wakes by time.
    pub next_wake: Option<DateTime<Utc>>,
    /// What it waits for, in words.
    pub waiting_for: Option<Box<str>>,
    /// When cancellation was asked for.
    pub cancel_requested_at: Option<DateTime<Utc>>,
    /// When it was started.
    pub created_at: DateTime<Utc>,
    /// Since when its status is what it is.
    pub status_at: DateTime<Utc>,
}

impl Info {
    pub(super) fn from_row(row: ProcessRow) -> Self {
        Self {
            id: row.id,
            run: row.run,
            kind: row.kind,
            status: row.status,
            reason: row.reason,
            owner: row.owner,
            execution: row.claim,
            next_wake: row.wake_at,
            waiting_for: row.waiting_for,
            cancel_requested_at: row.cancel_requested_at,
            created_at: row.created_at,
            status_at: row.status_at,
        }
    }
}

impl<O, E> Handle<O, E> {
    pub(super) fn new(core: Arc<Core>, id: Box<str>, run: Option<RunId>, kind: Option<&'static str>) -> Self {
        Self { core, id, run, kind, types: PhantomData }
    }

    /// The process's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The run that the handle is bound to; none if it follows the id.
    pub fn run(&self) -> Option<RunId> {
        self.run
    }

    /// The same process with the types of its definition.
    pub fn of<I, O2, E2>(&self, definition: Definition<I, O2, E2>) -> Handle<O2, E2> {
        Handle::new(self.core.clone(), self.id.clone(), self.run, Some(definition.kind()))
    }

    async fn row(&self) -> Result<Option<ProcessRow>, Unavailable> {
        // An id that no storage could hold is no process's id; some databases would not even take the question.
        if limits::check("process id", &self.id, limits::MAX_ID).is_err() {
            return Ok(None);
        }
        let core = &self.core;
        core.read(|| core.storage.find(&core.namespace, &self.id, self.run)).await
    }

    fn not_found(&self) -> HandleError {
        HandleError::NotFound { id: self.id.clone() }
    }

    /// What the process is doing.
    ///
    /// # Errors
    /// It does not exist, or there was no answer.
    pub async fn status(&self) -> Result<Info, HandleError> {
        self.row().await?.map(Info::from_row).ok_or_else(|| self.not_found())
    }

    /// Waits until the process has ended, wherever it runs, and returns its output. A stuck process is waited for
    /// further: it may be resumed. For a bound, wrap it in `tokio::time::timeout`.
    ///
    /// Any number of these share one watcher. In a process prefer [`Process::output`](crate::Process::output), which
    /// is recorded and lets the process leave memory.
    ///
    /// # Errors
    /// The process's own error; that it was cancelled, is not there, or left an output of another type; or the host
    /// stopped.
    pub async fn output(&self) -> Result<O, OutputError<E>>
    where
        O: DeserializeOwned,
        E: DeserializeOwned,
    {
        let mut bound = self.run;
        loop {
            // First the entry, then the look: an end between the two is not missed.
            let entry = bound.map(|run| (run, self.core.watch.watch(run)));
            let ended = match entry {
                Some((run, entry)) if self.runs_here(run)? => entry.await,
                entry => {
                    let handle = Self { run: bound, ..self.clone() };
                    let row = handle.row().await.map_err(OutputError::Unavailable)?;
                    let row = row.ok_or_else(|| OutputError::NotFound(self.id.clone()))?;
                    self.check_kind(&row.kind)?;
                    // From here on it is this run's output, even if the id gets another one.
                    bound = Some(row.run);
                    match entry {
                        _ if row.status.is_finished() => Ok(Some((row.status, row.output))),
                        Some((_, entry)) => entry.await,
                        None => continue,
                    }
                }
            };
            match ended {
                Ok(Some((status, output))) => return self.decode(status, output.as_deref()),
                // It has ended somewhere else, or was deleted.
                Ok(None) => {}
                // A process that waits here goes on elsewhere; it sees no error of its host's.
                Err(_) if Context::current().run != 0 => std::future::pending().await,
                Err(_) => return Err(OutputError::Unavailable(Unavailable::Stopped)),
            }
        }
    }

    /// Whether this host runs it and has not ended it: its end will be told here.
    fn runs_here(&self, run: RunId) -> Result<bool, OutputError<E>> {
        match self.core.held.get(run) {
            Some(Slot::Live(live)) => {
                self.check_kind(&live.kind)?;
                Ok(!live.state().ended)
            }
            _ => Ok(false),
        }
    }

    fn check_kind(&self, found: &str) -> Result<(), OutputError<E>> {
        match self.kind {
            Some(kind) if *found != *kind => {
                Err(OutputError::Decode(format!("process {:?} is of kind {found:?}, not {kind:?}", self.id).into()))
            }
            _ => Ok(()),
        }
    }

    fn decode(&self, status: Status, output: Option<&str>) -> Result<O, OutputError<E>>
    where
        O: DeserializeOwned,
        E: DeserializeOwned,
    {
        let error = |what: &str, why: String| {
            OutputError::Decode(format!("the {what} of process {:?} does not decode: {why}", self.id).into())
        };
        let output = output.unwrap_or("null");
        match status {
            Status::Completed => payload::decode(output).map_err(|why| error("output", why)),
            Status::Failed => Err(payload::decode(output).map_or_else(|why| error("error", why), OutputError::Failed)),
            _ => Err(OutputError::WasCancelled),
        }
    }

    /// Puts a message into the process's mailbox and wakes it. Returns once it is committed.
    ///
    /// # Errors
    /// The process does not exist or has ended; a limit; or no answer: then call again with the same
    /// [id](Send::id), and it is put in once.
    pub fn raise<T: Borrow<Q>, Q: Serialize + ?Sized>(&self, event: Event<T>, payload: &Q) -> Send {
        Send {
            core: self.core.clone(),
            process: self.id.clone(),
            event: event.name(),
            id: None,
            payload: payload::encode(payload),
        }
    }

    /// Asks the process to cancel. Returns once that is committed; the process sees it, compensates, and ends. One that
    /// has never run ends at once; one that is stuck sees it when it is resumed.
    ///
    /// # Errors
    /// It does not exist, has ended already, or there was no answer.
    pub async fn cancel(&self) -> Result<(), HandleError> {
        let allowed = "only a process that has not ended can be cancelled";
        self.order(What::Cancel, allowed, |before, again| match before {
            Status::Cancelled => again,
            status => !status.is_finished(),
        })
        .await
    }

    /// Ends the process at once, as cancelled, for this reason. Its code sees nothing of it, and nothing is compensated:
    /// for one whose code is gone, hangs, or does not heed a [cancellation](Self::cancel). Code of it that runs in this host is
    /// dropped at its next await; in another one when it writes its next record, or is
    /// [looked for](crate::HostBuilder::reconcile_every). Processes and callers that await it get `WasCancelled`.
    ///
    /// # Errors
    /// It does not exist, has ended already, or there was no answer.
    pub async fn terminate(&self, reason: impl Into<String>) -> Result<(), HandleError> {
        let reason = reason.into();
        limits::check("reason", &reason, limits::MAX_ID)?;
        let allowed = "only a process that has not ended can be terminated";
        self.order(What::Terminate { reason: reason.into() }, allowed, |before, again| match before {
            Status::Cancelled => again,
            status => !status.is_finished(),
        })
        .await
    }

    /// Lets a stuck or failed process go on where it was: what it recorded stays, unless it is told to
    /// [forget](Resume::forget) it. Of one that failed the step that failed last happens again, and those that failed at the
    /// same time: their records are kept in the audit table.
    ///
    /// # Errors
    /// It does not exist, is neither stuck nor failed, or there was no answer. It failed, and its compensation has run.
    pub fn resume(&self) -> Resume {
        Resume { handle: Handle::new(self.core.clone(), self.id.clone(), self.run, self.kind), forget: Vec::new() }
    }

    /// Deletes the process with all its runs, records and messages. The handle of an earlier run deletes that run alone.
    /// Processes and callers that await the process get a not-found error.
    ///
    /// # Errors
    /// It does not exist, has neither ended nor is stuck, or there was no answer.
    pub async fn delete(&self) -> Result<(), HandleError> {
        let allowed = "only a process that has ended or is stuck can be deleted; cancel or terminate it first";
        self.order(What::Delete, allowed, |before, _| before.is_finished() || before == Status::Stuck).await
    }

    /// The last committed value that the process wrote with [`get`](crate::Process::get) or
    /// [`set`](crate::Process::set) under this name; none if there is none. For progress, say.
    ///
    /// # Errors
    /// The process does not exist, the value is of another type, or there was no answer.
    pub async fn value<T: DeserializeOwned>(&self, name: impl Into<Name>) -> Result<Option<T>, HandleError> {
        let name = name.into();
        limits::check_name(name.name(), name.key())?;
        let row = self.row().await?.ok_or_else(|| self.not_found())?;
        let key = RecordKey { scope: Scope::Process, name: name.name().into(), key: name.key().into() };
        let core = &self.core;
        let record = core.read(|| core.storage.record(row.run, &key)).await?;
        let Some(record) = record.filter(|record| record.op == OpKind::Value) else { return Ok(None) };
        payload::decode(&record.payload).map(Some).map_err(|why| {
            HandleError::Decode(format!("the value {key} of process {:?} does not decode: {why}", self.id).into())
        })
    }

    /// Has an order carried out. `done` judges by where the process stood before, and by whether an earlier attempt,
    /// whose answer was lost, may have brought it there.
    async fn order(
        &self,
        what: What,
        allowed: &'static str,
        done: impl Fn(Status, bool) -> bool,
    ) -> Result<(), HandleError> {
        if limits::check("process id", &self.id, limits::MAX_ID).is_err() {
            return Err(self.not_found());
        }
        let deletes = matches!(what, What::Delete);
        let order = Order { id: self.id.clone(), run: self.run, what };
        let mut outcome = self.core.ask(Op::Order(order.clone()), None).await?;
        while let Outcome::Asked { before: Some((_, status)), more: true, again, .. } = &outcome
            && done(*status, *again)
        {
            outcome = self.core.ask(Op::Order(order.clone()), None).await?;
        }
        match outcome {
            Outcome::Asked { before: Some((_, status)), again, .. } if done(status, again) => Ok(()),
            Outcome::Asked { before: Some((_, status)), .. } => {
                Err(HandleError::Status { id: self.id.clone(), status, allowed })
            }
            Outcome::Asked { before: None, again: true, .. } if deletes => Ok(()),
            Outcome::Asked { before: None, .. } => Err(self.not_found()),
            _ => Err(HandleError::Unavailable(self.core.strange_answer())),
        }
    }
}

/// A message to a process, to be awaited. See [`Handle::raise`].
#[must_use = "nothing happens before it is awaited"]
pub struct Send {
    core: Arc<Core>,
    process: Box<str>,
    event: &'static str,
    id: Option<String>,
    payload: Result<Box<str>, EncodeError>,
}

impl Send {
    /// The message's id: one that the run was sent before is not put in twice, even if it has ended since.
    pub fn id(mut self, id: impl fmt::Display) -> Self {
        self.id = Some(id.to_string());
        self
    }
}

impl Send {
    /// What is to be written, once it has been checked.
    pub(super) fn prepare(self) -> Result<(Arc<Core>, Raise), LimitError> {
        let Self { core, process, event, id, payload } = self;
        let event_id = id.unwrap_or_else(|| core.surroundings.id().simple().to_string());
        let payload = check_message(&core, &process, event, &event_id, payload)?;
        Ok((core, Raise { id: process, name: event.into(), event_id: event_id.into(), payload }))
    }
}

impl IntoFuture for Send {
    type Output = Result<(), RaiseError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + std::marker::Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let (core, raise) = self.prepare()?;
            let process = raise.id.clone();
            match core.ask(Op::Raise(raise), None).await? {
                Outcome::Raised(Raised::Delivered { .. }) => Ok(()),
                Outcome::Raised(Raised::Finished) => Err(RaiseError::Finished { id: process }),
                Outcome::Raised(Raised::NotFound) => Err(RaiseError::NotFound { id: process }),
                _ => Err(RaiseError::Unavailable(core.strange_answer())),
            }
        })
    }
}

/// A resume, to be awaited. See [`Handle::resume`].
#[must_use = "nothing happens before it is awaited"]
pub struct Resume {
    handle: Handle<Json, Failure>,
    forget: Vec<Name>,
}

impl Resume {
    /// Erases the record of this name first, so that the operation happens again. What it said is kept in the audit
    /// table.
    pub fn forget(mut self, name: impl Into<Name>) -> Self {
        self.forget.push(name.into());
        self
    }
}

impl IntoFuture for Resume {
    type Output = Result<(), HandleError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + std::marker::Send>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { handle, forget } = self;
        Box::pin(async move {
            let mut keys = Vec::new();
            for name in forget {
                limits::check_name(name.name(), name.key())?;
                for scope in [Scope::Process, Scope::Compensation] {
                    let key = RecordKey { scope, name: name.name().into(), key: name.key().into() };
                    keys.push(Forget { key, audit: handle.core.surroundings.id() });
                }
            }
            if let Some(row) = handle.row().await?.filter(|row| row.status == Status::Failed) {
                let core = &handle.core;
                for key in failed(core, row.run).await?.ok_or(HandleError::Compensated { id: row.id })? {
                    if !keys.iter().any(|forget| forget.key == key) {
                        keys.push(Forget { key, audit: core.surroundings.id() });
                    }
                }
            }
            let allowed = "only a stuck or failed process can be resumed";
            handle
                .order(What::Resume { forget: keys }, allowed, |before, again| match before {
                    Status::Stuck | Status::Failed => true,
                    _ => again,
                })
                .await
        })
    }
}

/// Which records of a failed run say what it failed of: the last failure, and those behind which nothing else was recorded.
/// None if its compensation has run.
async fn failed(core: &Core, run: RunId) -> Result<Option<Vec<RecordKey>>, HandleError> {
    let unreadable = |why: String| HandleError::Unavailable(Unavailable::Refused(why.into()));
    let load = Load::whole(&[run]);
    let loaded = core.read(|| core.storage.load(&load)).await?;
    let Some(state) = loaded.into_iter().flatten().next() else { return Ok(Some(Vec::new())) };
    let records = state.state.map_err(unreadable)?.map(|state| state.records).unwrap_or_default();
    if records.iter().any(|(key, _)| key.scope == Scope::Compensation) {
        return Ok(None);
    }
    let newest = |failed: bool| {
        let is_such = |record: &Record| record.op != OpKind::Value && (record.state == RecordState::Failed) == failed;
        records.iter().filter(|(_, record)| is_such(record)).map(|(_, record)| record.seq).max()
    };
    let (last, other) = (newest(true), newest(false));
    let again =
        |record: &Record| record.state == RecordState::Failed && (Some(record.seq) == last || Some(record.seq) > other);
    Ok(Some(records.into_iter().filter(|(_, record)| again(record)).map(|(key, _)| key).collect()))
}

impl Core {
    pub(super) fn strange_answer(&self) -> Unavailable {
        Unavailable::Refused("the storage gave an answer to another question; this is a bug in the storage".into())
    }
}
