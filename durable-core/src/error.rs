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
///
/// It is found in whatever it is wrapped in, however deep, as long as each layer tells its
/// [source](Error::source): a `thiserror` enum with `#[from]`, `#[error(transparent)]` too, or `anyhow`'s `context`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Cancelled;

impl fmt::Display for Cancelled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the process was cancelled")
    }
}
impl Error for Cancelled {
    // A transparent wrapper shows the source of what it wraps, and not that itself.
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&OnRequest)
    }
}

/// The source of [`Cancelled`].
#[derive(Debug)]
struct OnRequest;

impl fmt::Display for OnRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("on request")
    }
}
impl Error for OnRequest {}

/// An error and its sources.
fn chain<'e>(error: &'e (dyn Error + 'static)) -> impl Iterator<Item = &'e (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'e (dyn Error + 'static)| (*error).source())
}

/// The failure that a step or another process has recorded, if that is what this is.
fn recorded<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e Failure> {
    match error.downcast_ref::<StepError<Failure>>() {
        Some(StepError::Failed(failure)) => return Some(failure),
        Some(_) => return None,
        None => {}
    }
    match error.downcast_ref::<OutputError<Failure>>() {
        Some(OutputError::Failed(failure)) => Some(failure),
        _ => None,
    }
}

fn is_cancellation(error: &(dyn Error + 'static)) -> bool {
    chain(error).any(|error| {
        error.is::<Cancelled>() || error.is::<OnRequest>() || recorded(error).is_some_and(|failure| failure.cancelled)
    })
}

/// Any error, in a form that can be recorded: its type's name, its message, its sources' messages, and a code if the program
/// gives it one.
///
/// Like `anyhow::Error` it is made by `?` from any error, and is itself no [`Error`]: also from `anyhow::Error`,
/// `Box<dyn Error + Send + Sync>`, and texts.
///
/// ```
/// # use durable_core::Failure;
/// fn parse(text: &str) -> Result<u32, Failure> {
///     if text.is_empty() {
///         return Err(Failure::new("there is nothing").with_code("empty"));
///     }
///     Ok(text.parse::<u32>()?)
/// }
/// assert_eq!(parse("x").unwrap_err().message(), "invalid digit found in string");
/// // What a program decides by is a name that it has given itself: it is the same in each version of the code.
/// assert_eq!(parse("").unwrap_err().code(), Some("empty"));
/// ```
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    code: Option<Box<str>>,
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
        let message = message.to_string().into();
        Self { code: None, type_name: "".into(), message, sources: Vec::new(), cancelled: false }
    }
    /// What a step returns that cannot fail but has a result: `async || Failure::ok(5)`.
    pub fn ok<T>(value: T) -> Result<T, Self> {
        Ok(value)
    }
    /// Gives it a name by which later code tells it from others.
    #[must_use]
    pub fn with_code(mut self, code: impl Into<Box<str>>) -> Self {
        self.code = Some(code.into());
        self
    }
    /// The name that the program has given it. It is found again in an error that has the step's error as its
    /// [source](Error::source), by `anyhow`'s `context` for example; a transparent wrapper hides it.
    pub fn code(&self) -> Option<&str> {
        self.code.as_deref()
    }
    /// The message of the error that it was made from.
    pub fn message(&self) -> &str {
        &self.message
    }
    /// The full name of the type that it was made from, for people: another version of the compiler may write it otherwise.
    /// Empty for what was made from a text.
    pub fn type_name(&self) -> &str {
        &self.type_name
    }
    /// The messages of the error's sources, outermost first.
    pub fn sources(&self) -> impl Iterator<Item = &str> {
        self.sources.iter().map(|s| &**s)
    }
    /// Whether it was made from this process's own cancellation.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled
    }
}

pub(crate) type BoxError = Box<dyn Error + Send + Sync>;

impl<E: Into<BoxError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Caught::new(error).into_failure()
    }
}

/// An error that can be recorded as a [`Failure`]: what is an [`Error`], `anyhow::Error`, `Box<dyn Error + Send + Sync>`, a
/// text, and a [`Failure`] itself.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be recorded as a `Failure`",
    note = "an error is recorded that is `std::error::Error + Send + Sync + 'static`, `anyhow::Error`, \
            `Box<dyn Error + Send + Sync>`, a text, or `Failure` itself",
    note = "chain `.typed()` before `.await` for an error that is `Serialize` and `Deserialize`, to get it back as it was"
)]
pub trait IntoFailure: Send {
    #[doc(hidden)]
    fn caught(self) -> Caught;
}
impl<E: Into<BoxError> + Send> IntoFailure for E {
    fn caught(self) -> Caught {
        Caught::new(self)
    }
}
impl IntoFailure for Failure {
    fn caught(self) -> Caught {
        Caught(Either::Failure(self))
    }
}

/// An error before it is recorded: it can still be asked for what it is made of.
#[doc(hidden)]
#[derive(Debug)]
pub struct Caught(Either);

#[derive(Debug)]
enum Either {
    Error(BoxError, &'static str),
    Failure(Failure),
}

impl Caught {
    fn new<E: Into<BoxError>>(error: E) -> Self {
        Self(Either::Error(error.into(), std::any::type_name::<E>()))
    }

    pub(crate) fn error(&self) -> Option<&(dyn Error + 'static)> {
        match &self.0 {
            Either::Error(error, _) => Some(&**error),
            Either::Failure(_) => None,
        }
    }

    pub(crate) fn into_failure(self) -> Failure {
        let (error, type_name) = match self.0 {
            Either::Error(error, type_name) => (error, type_name),
            Either::Failure(failure) => return failure,
        };
        // A step's error that is a failure already stays the failure that it was.
        if let Some(failure) = recorded(&*error) {
            return failure.clone();
        }
        let mut failure = Failure::new(&error);
        failure.cancelled = is_cancellation(&*error);
        for source in chain(&*error).skip(1).filter(|source| !source.is::<OnRequest>()) {
            failure.sources.push(source.to_string().into());
            if let Some(inner) = recorded(source) {
                failure.code = inner.code.clone();
                failure.sources.extend(inner.sources.iter().cloned());
            }
        }
        if !matches!(type_name, "&str" | "alloc::string::String") {
            failure.type_name = type_name.into();
        }
        failure
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

/// What a process's error is recorded as: a [`Failure`], or an [`Error`] of the program's own that is `Serialize` and
/// `Deserialize`.
///
/// A process whose error is its own [cancellation](Cancelled), or has it among its sources, has ended as `cancelled`, not as
/// `failed`.
///
/// ```
/// # use durable_core::{Cancelled, Definition, Failure, StepError};
/// #[derive(Debug, thiserror::Error, serde::Serialize, serde::Deserialize)]
/// enum TransferError {
///     #[error("account {0} is closed")]
///     Closed(u64),
///     #[error(transparent)]
///     Step(#[from] StepError<Failure>),
///     #[error(transparent)]
///     Cancelled(#[from] Cancelled),
/// }
/// const TRANSFER: Definition<u64, (), TransferError> = Definition::new("transfer");
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be a process's error",
    note = "it needs `std::error::Error`, `Serialize` and `Deserialize`; or let the definition's error be `Failure`, which is \
            made from any error, `anyhow::Error` too"
)]
pub trait ProcessError: Serialize + DeserializeOwned + fmt::Display + Send + 'static {
    /// Whether the process ended because it was cancelled.
    fn is_cancelled(&self) -> bool;
}

impl ProcessError for Failure {
    fn is_cancelled(&self) -> bool {
        self.cancelled
    }
}
impl<E: Error + Serialize + DeserializeOwned + Send + 'static> ProcessError for E {
    fn is_cancelled(&self) -> bool {
        is_cancellation(self)
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
