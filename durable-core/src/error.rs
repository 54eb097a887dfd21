//! What processes and their callers see when something does not work. What the caller can do about it decides the
//! variant.

use crate::limits::LimitError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::error::Error;
use std::fmt;
use std::time::Duration;

/// The process was asked to cancel: every operation that is not recorded yet fails with this, until the process
/// enters its [compensation](crate::Process::compensation).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("the process was cancelled")]
#[non_exhaustive]
pub struct Cancelled;

/// Any error, in a form that can be recorded: its type's name, its message and its sources' messages.
///
/// Like `anyhow::Error` it is made from any error by `?`, and is itself no [`Error`].
///
/// ```
/// # use durable_core::Failure;
/// fn parse(text: &str) -> Result<u32, Failure> {
///     Ok(text.parse::<u32>()?)
/// }
/// let failure = parse("x").unwrap_err();
/// assert!(failure.is::<std::num::ParseIntError>());
/// assert_eq!(failure.message(), "invalid digit found in string");
/// ```
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    #[serde(rename = "type")]
    type_name: Box<str>,
    message: Box<str>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    sources: Vec<Box<str>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    cancelled: bool,
}

impl Failure {
    /// A failure of the program's own, with this message.
    pub fn new(message: impl fmt::Display) -> Self {
        Self { type_name: "".into(), message: message.to_string().into(), sources: Vec::new(), cancelled: false }
    }
    /// The message of the error that it was made from.
    pub fn message(&self) -> &str {
        &self.message
    }
    /// The full name of the type that it was made from; empty for [`Failure::new`].
    pub fn type_name(&self) -> &str {
        &self.type_name
    }
    /// The messages of the error's sources, outermost first.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().map(|s| &**s)
    }
    /// Whether it was made from a `T`. Compared by name: a type that a later version of the program moved to another
    /// module is another type.
    pub fn is<T: ?Sized>(&self) -> bool {
        *self.type_name == *std::any::type_name::<T>()
    }
    /// Whether it was made from this process's own cancellation.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled
    }
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let dynamic: &(dyn Error + 'static) = &error;
        // A step's error that is a failure already stays the failure that it was.
        if let Some(StepError::Failed(inner)) = dynamic.downcast_ref::<StepError<Failure>>() {
            return inner.clone();
        }
        if let Some(OutputError::Failed(inner)) = dynamic.downcast_ref::<OutputError<Failure>>() {
            return inner.clone();
        }
        let mut cancelled = dynamic.is::<Cancelled>();
        let mut sources = Vec::new();
        let mut next = error.source();
        while let Some(source) = next {
            cancelled |= source.is::<Cancelled>();
            sources.push(source.to_string().into());
            next = source.source();
        }
        Self { type_name: std::any::type_name::<E>().into(), message: error.to_string().into(), sources, cancelled }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if f.alternate() {
            for source in &self.sources {
                write!(f, ": {source}")?;
            }
        }
        Ok(())
    }
}
impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Failure({}: {self:#})", self.type_name)
    }
}

/// What a process's function may return as its error: a type that can be recorded, shown to a person, and asked
/// whether it stands for the process's own cancellation.
///
/// ```
/// # use durable_core::{Cancelled, ProcessError, StepError};
/// #[derive(Debug, thiserror::Error, serde::Serialize, serde::Deserialize)]
/// enum TransferError {
///     #[error("account {0} is closed")]
///     Closed(u64),
///     #[error(transparent)]
///     Cancelled(#[from] Cancelled),
/// }
/// impl ProcessError for TransferError {
///     fn is_cancelled(&self) -> bool {
///         matches!(self, Self::Cancelled(_))
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be a process's error",
    note = "implement `ProcessError` for it (it needs `Serialize`, `Deserialize` and `Display`), or return `Failure`, \
            which `?` makes from any error"
)]
pub trait ProcessError: Serialize + DeserializeOwned + fmt::Display + Send + 'static {
    /// Whether the process ended because it was cancelled: it is `cancelled` then, not `failed`.
    fn is_cancelled(&self) -> bool {
        false
    }
}

impl ProcessError for Failure {
    fn is_cancelled(&self) -> bool {
        self.cancelled
    }
}
impl ProcessError for Cancelled {
    fn is_cancelled(&self) -> bool {
        true
    }
}
impl<E: ProcessError> ProcessError for StepError<E> {
    fn is_cancelled(&self) -> bool {
        match self {
            Self::Failed(error) => error.is_cancelled(),
            Self::TimedOut(_) | Self::Refused(_) => false,
            Self::Cancelled(_) => true,
        }
    }
}

/// Why a step has no result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepError<E> {
    /// Its own error: what the closure returned at the last attempt. Recorded: after a crash it is the same.
    Failed(E),
    /// The last attempt took longer than its [time-out](crate::Step::timeout). Recorded.
    TimedOut(Duration),
    /// The database refused a [transaction](crate::Transaction) at its commit: a deferred constraint. Recorded; nothing of
    /// the transaction was kept.
    Refused(Box<str>),
    /// The process was cancelled before the step was recorded. It may have had its effect.
    Cancelled(Cancelled),
}

impl<E> StepError<E> {
    /// The step's own error, if it is one.
    pub fn failed(&self) -> Option<&E> {
        match self {
            Self::Failed(error) => Some(error),
            _ => None,
        }
    }
}

impl<E: fmt::Display> fmt::Display for StepError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(error) => error.fmt(f),
            Self::TimedOut(after) => write!(f, "the step timed out after {after:?}"),
            Self::Refused(why) => write!(f, "the database refused the transaction at its commit: {why}"),
            Self::Cancelled(cancelled) => cancelled.fmt(f),
        }
    }
}
impl<E: fmt::Display + fmt::Debug> Error for StepError<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Cancelled(cancelled) => Some(cancelled),
            _ => None,
        }
    }
}
impl<E> From<Cancelled> for StepError<E> {
    fn from(cancelled: Cancelled) -> Self {
        Self::Cancelled(cancelled)
    }
}

/// Why a process has no output.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutputError<E> {
    /// It failed with this error.
    Failed(E),
    /// It was cancelled.
    WasCancelled,
    /// There is no such process, or no longer.
    NotFound(Box<str>),
    /// What it left is not of the expected type: the message says which process, which type, and what was found.
    Decode(Box<str>),
    /// Only for calls from outside a process: the storage could not be read in time, or the host has stopped.
    Unavailable(Unavailable),
    /// Only inside a process: it was cancelled itself while it waited.
    Cancelled(Cancelled),
}

impl<E: fmt::Display> fmt::Display for OutputError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Failed(error) => error.fmt(f),
            Self::WasCancelled => f.write_str("the awaited process was cancelled"),
            Self::NotFound(id) => write!(f, "there is no process {id:?}"),
            Self::Decode(message) => f.write_str(message),
            Self::Unavailable(unavailable) => unavailable.fmt(f),
            Self::Cancelled(cancelled) => cancelled.fmt(f),
        }
    }
}
impl<E: fmt::Display + fmt::Debug> Error for OutputError<E> {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Cancelled(cancelled) => Some(cancelled),
            _ => None,
        }
    }
}
impl<E> From<Cancelled> for OutputError<E> {
    fn from(cancelled: Cancelled) -> Self {
        Self::Cancelled(cancelled)
    }
}

/// A call from outside a process got no answer. **It may have happened**; the same call again is safe: spawning is
/// idempotent by its id, raising by the message's id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// The storage did not answer in time (`HostBuilder::call_timeout`).
    #[error("the storage has not answered within {after:?}; the call may have happened, and may be made again{}", last.as_deref().map(|l| format!(" (last error: {l})")).unwrap_or_default())]
    Storage {
        /// How long was waited.
        after: Duration,
        /// What the storage said last.
        last: Option<Box<str>>,
    },
    /// The host has been shut down or dropped.
    #[error("the host has stopped")]
    Stopped,
    /// The storage refuses the call's content for good, or what it holds cannot be understood.
    #[error("the storage refuses this: {0}")]
    Refused(Box<str>),
}

/// Why a process was not started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// The id, the kind or the input is outside the limits.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// The id is in use by a process of another kind.
    #[error("process {id:?} is of kind {found:?}, not {asked:?}; choose another id")]
    OtherKind {
        /// The id.
        id: Box<str>,
        /// The kind that was asked for.
        asked: Box<str>,
        /// The kind that the process has.
        found: Box<str>,
    },
    /// The id is in use by a process of this kind with another input.
    #[error("process {id:?} exists with another input; choose another id, or chain `.existing_ok()`")]
    OtherInput {
        /// The id.
        id: Box<str>,
    },
    /// Only inside a process: it was cancelled itself.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// Only for calls from outside a process: no answer.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

/// Why a message was not delivered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RaiseError {
    /// The process id, the event's name, the message's id or its payload is outside the limits.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// There is no process of that id.
    #[error("there is no process {id:?}")]
    NotFound {
        /// The id.
        id: Box<str>,
    },
    /// The process has ended, and had not accepted the message before.
    #[error("process {id:?} has ended")]
    Finished {
        /// The id.
        id: Box<str>,
    },
    /// Only inside a process: it was cancelled itself.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// Only for calls from outside a process: no answer.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

/// Why a handle's question or order was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandleError {
    /// There is no process of that id, or no longer.
    #[error("there is no process {id:?}")]
    NotFound {
        /// The id.
        id: Box<str>,
    },
    /// The process is not in a state in which this can be done.
    #[error("process {id:?} is {status}; {allowed}")]
    Status {
        /// The id.
        id: Box<str>,
        /// Where it stands.
        status: crate::Status,
        /// What is needed.
        allowed: &'static str,
    },
    /// The process failed, and its compensation has run: to go on from there would keep what was undone.
    #[error(
        "process {id:?} failed, and its compensation has undone what it did; start it anew, with `.restart_finished()`"
    )]
    Compensated {
        /// The id.
        id: Box<str>,
    },
    /// A value is not of the type that was asked for.
    #[error("{0}")]
    Decode(Box<str>),
    /// The name is outside the limits.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// No answer.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
}

/// Why a host did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The namespace, the label or a kind is outside the limits.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// A kind was registered twice.
    #[error("the kind {0:?} is registered twice")]
    Twice(&'static str),
    /// A setting makes no sense beside another.
    #[error("{0}")]
    Setting(Box<str>),
    /// The storage could not be used.
    #[error(transparent)]
    Storage(#[from] crate::storage::StorageError),
}
