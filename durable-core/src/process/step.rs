use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::future::{Future, IntoFuture, poll_fn};
use std::marker::PhantomData;
use std::panic::Location;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;
use tokio::sync::Notify;
use tracing::Instrument;
use uuid::Uuid;

use super::Process;
use super::delay::due_after;
use super::race::Contender;
use crate::engine::operation::{Begun, Operation, Write};
use crate::engine::run::WaitFor;
use crate::engine::wake::{Context, Inside};
use crate::error::{Cancelled, Failure, IntoFailure, StepError};
use crate::name::Name;
use crate::payload;
use crate::retry::Retry;
use crate::storage::{OpKind, Record, RecordKey, RecordState, RunId};

/// One attempt of a step, as its closure sees it.
#[derive(Clone, Debug)]
pub struct Attempt {
    number: u32,
    run: RunId,
    identity: RecordKey,
    cancel: CancelToken,
}

impl Attempt {
    /// 1 for the first, one more for each attempt that failed. An attempt that a crash cut off does not count.
    pub fn number(&self) -> u32 {
        self.number
    }
    /// The idempotency key: the same for every attempt of this step in this run, before and after a crash; another one
    /// for every other step and run. Hand it to the system that is called, so that it can tell a repetition.
    pub fn key(&self) -> Uuid {
        self.identity.idempotency(self.run)
    }
    /// Signalled when the attempt is given up: the process was cancelled, its time-out has passed, or it lost a race.
    /// The attempt's future is dropped right after; a clone of the token reaches what it started elsewhere.
    pub fn cancel(&self) -> CancelToken {
        self.cancel.clone()
    }
}

/// Tells that an attempt was given up.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<Signal>);

#[derive(Debug, Default)]
struct Signal {
    given_up: AtomicBool,
    told: Notify,
}

impl CancelToken {
    /// Whether the attempt was given up.
    pub fn is_cancelled(&self) -> bool {
        self.0.given_up.load(Ordering::Acquire)
    }
    /// Returns once the attempt was given up; never if it ended by itself.
    pub async fn cancelled(&self) {
        loop {
            let mut told = pin!(self.0.told.notified());
            // Before the look, so that a signal in between is not missed.
            told.as_mut().enable();
            if self.is_cancelled() {
                return;
            }
            told.await;
        }
    }
}

/// What an attempt of a step returns: a `Result`, or nothing if it cannot fail.
#[diagnostic::on_unimplemented(
    message = "a step cannot return `{Self}`",
    note = "a step returns a `Result`, or nothing; `Failure::ok(value)` is the result of one that cannot fail"
)]
pub trait StepOutput: Send {
    /// What the step returns.
    type Ok: Send;
    /// Its own error.
    type Err: Send;
    /// As a result.
    fn into_result(self) -> Result<Self::Ok, Self::Err>;
}
impl<T: Send, E: Send> StepOutput for Result<T, E> {
    type Ok = T;
    type Err = E;
    fn into_result(self) -> Self {
        self
    }
}
impl StepOutput for () {
    type Ok = ();
    type Err = Failure;
    fn into_result(self) -> Result<(), Failure> {
        Ok(())
    }
}

/// What makes the attempts of a step: `FnMut() -> Future` or `FnMut(Attempt) -> Future`, of a `Result` or of nothing.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not make attempts of a step",
    note = "a step takes `|| async {{ … }}` or `|attempt: Attempt| async move {{ … }}`, whose future is `Send` and returns a \
            `Result` or nothing"
)]
pub trait Attempts<Marker>: Send {
    /// What the step returns.
    type Ok: Send;
    /// The closure's own error.
    type Err: Send;
    /// One attempt.
    type Future: Future<Output: StepOutput<Ok = Self::Ok, Err = Self::Err>> + Send;
    /// Begins an attempt.
    fn begin(&mut self, attempt: Attempt) -> Self::Future;
}

impl<F, Fut> Attempts<()> for F
where
    F: FnMut() -> Fut + Send,
    Fut: Future<Output: StepOutput> + Send,
{
    type Ok = <Fut::Output as StepOutput>::Ok;
    type Err = <Fut::Output as StepOutput>::Err;
    type Future = Fut;
    fn begin(&mut self, _: Attempt) -> Fut {
        self()
    }
}

impl<F, Fut> Attempts<(Attempt,)> for F
where
    F: FnMut(Attempt) -> Fut + Send,
    Fut: Future<Output: StepOutput> + Send,
{
    type Ok = <Fut::Output as StepOutput>::Ok;
    type Err = <Fut::Output as StepOutput>::Err;
    type Future = Fut;
    fn begin(&mut self, attempt: Attempt) -> Fut {
        self(attempt)
    }
}

/// The step's error is recorded as it is.
#[derive(Debug)]
pub enum Typed {}
/// The step's error is recorded as a [`Failure`].
#[derive(Debug)]
pub enum AsFailure {}

/// How a step's error is recorded.
pub trait Recording<E>: Send {
    /// What comes back.
    type Error: RecordableError;
    /// From what the closure returned, which is shown before if it can be asked for its sources.
    fn convert(error: E, show: &mut dyn FnMut(&(dyn std::error::Error + 'static))) -> Self::Error;
}

impl<E: RecordableError> Recording<E> for Typed {
    type Error = E;
    fn convert(error: E, _: &mut dyn FnMut(&(dyn std::error::Error + 'static))) -> E {
        error
    }
}
impl<E: IntoFailure> Recording<E> for AsFailure {
    type Error = Failure;
    fn convert(error: E, show: &mut dyn FnMut(&(dyn std::error::Error + 'static))) -> Failure {
        let caught = error.caught();
        if let Some(error) = caught.error() {
            show(error);
        }
        caught.into_failure()
    }
}

/// An error that can be recorded as it is: `Serialize`, `DeserializeOwned`, and `Display` for the log.
#[diagnostic::on_unimplemented(
    message = "the step's error `{Self}` cannot be recorded as it is",
    note = "derive `Serialize` and `Deserialize` for `{Self}`, or leave `.typed()` out: it is recorded as a `Failure` then, its \
            message and its sources' messages"
)]
pub trait RecordableError: Serialize + DeserializeOwned + fmt::Display + Send {}
impl<E: Serialize + DeserializeOwned + fmt::Display + Send> RecordableError for E {}

pub(super) type RetryIf<'p, E> = Box<dyn Fn(&E) -> bool + Send + 'p>;

/// A step, to be awaited. See [`Process::step`].
#[must_use = "nothing happens before it is awaited"]
pub struct Step<'p, F: Attempts<M>, M, R> {
    pub(super) operation: Operation,
    attempts: F,
    options: Options<'p, F::Err>,
    types: PhantomData<fn() -> (M, R)>,
}

pub(super) struct Options<'p, E> {
    pub(super) retry: Retry,
    pub(super) retry_if: Option<RetryIf<'p, E>>,
    pub(super) timeout: Option<Duration>,
    /// Under which name the step was recorded before it was renamed.
    pub(super) was: Option<Name>,
    _process: PhantomData<&'p ()>,
}

impl<'p, F: Attempts<M>, M> Step<'p, F, M, AsFailure> {
    #[track_caller]
    pub(super) fn new(process: &'p Process, name: Name, attempts: F) -> Self {
        let operation = Operation::new(&process.run, process.part(), &name, OpKind::Step, Location::caller());
        Self { operation, attempts, options: Options::new(), types: PhantomData }
    }

    /// Records the closure's error as it is, not as a [`Failure`], so that its variants and fields come back, after a crash
    /// too. It needs `Serialize` and `Deserialize`, and what is recorded must be readable for later versions of the code.
    pub fn typed(self) -> Step<'p, F, M, Typed>
    where
        F::Err: RecordableError,
    {
        let Self { operation, attempts, options, .. } = self;
        Step { operation, attempts, options, types: PhantomData }
    }
}

impl<'p, F: Attempts<M>, M, R> Step<'p, F, M, R> {
    /// Tries again after a failure, a time-out included. Without it the first failure is the step's error.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.options.retry = retry;
        self
    }

    /// Which of the closure's errors are worth a retry; the others are the step's error at once. All are, by default.
    pub fn retry_if(mut self, worth: impl Fn(&F::Err) -> bool + Send + 'p) -> Self {
        self.options.retry_if = Some(Box::new(worth));
        self
    }

    /// Gives an attempt up after this time: its token is signalled, its future dropped.
    pub fn timeout(mut self, after: Duration) -> Self {
        self.options.timeout = Some(after);
        self
    }

    /// What the step was called in an earlier version of the code: its record is used, so its effect is not repeated,
    /// and attempts go on with the old name's idempotency key.
    pub fn was(mut self, name: impl Into<Name>) -> Self {
        self.options.was = Some(name.into());
        self
    }
}

impl<'p, F, M, R> Step<'p, F, M, R>
where
    F: Attempts<M> + 'p,
    R: Recording<F::Err>,
{
    /// Attempts as a member of a race, in whose record those are counted that have failed.
    pub(super) async fn contend(self, as_one: &Contender) -> Result<Result<F::Ok, StepError<R::Error>>, Cancelled> {
        let Self { operation, mut attempts, options, .. } = self;
        let (run, key, race) = (&operation.run, &operation.key, &as_one.race);
        let mut failed = 0;
        loop {
            if let Some((so_far, next_at)) = as_one.tried() {
                failed = so_far;
                let what = WaitFor::Retry(key.clone());
                race.wait(what, Some(next_at), |_, now| (now >= next_at).then_some(())).await?;
            }
            let (error, worth) = match attempt(race, key, key, failed + 1, options.timeout, &mut attempts).await? {
                Attempted::Ok(value) => return Ok(Ok(value)),
                Attempted::Err(error) => options.judge::<R>(error, |_| {}),
                Attempted::TimedOut(after) => (StepError::TimedOut(after), true),
            };
            failed += 1;
            let delay = options.retry.delay_after(failed, key.idempotency(run.run)).filter(|_| worth);
            let next_at = delay.map(|delay| due_after(run.core.clock.now(), delay));
            tell(&operation, failed, &error, next_at);
            let Some(next_at) = next_at else { return Ok(Err(error)) };
            as_one.failed(failed, next_at).await?;
        }
    }
}

impl<E> Options<'_, E> {
    pub(super) fn new() -> Self {
        let retry = Retry::fixed(Duration::ZERO).max_attempts(1);
        Self { retry, retry_if: None, timeout: None, was: None, _process: PhantomData }
    }

    /// The error as it is recorded, and whether it is worth another attempt. It is shown before, if that is possible.
    pub(super) fn judge<R: Recording<E>>(
        &self,
        error: E,
        mut show: impl FnMut(&(dyn std::error::Error + 'static)),
    ) -> (StepError<R::Error>, bool) {
        let worth = self.retry_if.as_ref().is_none_or(|worth| worth(&error));
        (StepError::Failed(R::convert(error, &mut show)), worth)
    }
}

impl<'p, F, M, R> IntoFuture for Step<'p, F, M, R>
where
    F: Attempts<M> + 'p,
    F::Ok: Serialize + DeserializeOwned,
    R: Recording<F::Err> + 'p,
    M: 'p,
{
    type Output = Result<F::Ok, StepError<R::Error>>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'p>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { operation, attempts, options, .. } = self;
        Box::pin(run::<F, M, R>(operation, attempts, options))
    }
}

/// The pending record between two attempts.
#[derive(Serialize, Deserialize)]
struct Pending {
    error: Box<str>,
    next_at: DateTime<Utc>,
}

/// Runs a step to its record.
async fn run<F, M, R>(
    mut operation: Operation,
    mut attempts: F,
    options: Options<'_, F::Err>,
) -> Result<F::Ok, StepError<R::Error>>
where
    F: Attempts<M>,
    F::Ok: Serialize + DeserializeOwned,
    R: Recording<F::Err>,
{
    let identity = identity(&mut operation, options.was.as_ref());
    let mut failed = match begin(&mut operation).await? {
        Start::Returned(returned) => {
            operation.done();
            return returned;
        }
        Start::After(failed) => failed,
    };
    loop {
        let number = failed + 1;
        let made = attempt(&operation, &operation.key, &identity, number, options.timeout, &mut attempts);
        let (error, worth) = match made.await? {
            Attempted::Ok(value) => {
                let (payload, value) = match payload::encode_back(value) {
                    Ok(encoded) => encoded,
                    Err(error) => return operation.unencodable(&error).await,
                };
                let attempts = i32::try_from(failed).unwrap_or(i32::MAX);
                operation.record(Write { attempts, ..Write::done(payload) }).await?;
                operation.done();
                return Ok(value);
            }
            Attempted::Err(error) => options.judge::<R>(error, |_| {}),
            Attempted::TimedOut(after) => (StepError::TimedOut(after), true),
        };
        failed += 1;
        if let Some(error) = note_failure(&operation, &identity, &options.retry, failed, (error, worth)).await? {
            operation.done();
            return Err(error);
        }
    }
}

/// What the attempts' key is made of: the old name, if there is one, so that a renamed step goes on with its key. Goes on
/// under that name if only that has a record.
pub(super) fn identity(operation: &mut Operation, was: Option<&Name>) -> RecordKey {
    let Some(was) = was else { return operation.key.clone() };
    let was = RecordKey { scope: operation.key.scope, name: was.name().into(), key: was.key().into() };
    operation.rename_from(was.clone());
    was
}

/// How a step begins.
pub(super) enum Start<T, E> {
    /// It is recorded: this is what it returns.
    Returned(Result<T, StepError<E>>),
    /// So many attempts have failed.
    After(u32),
}

/// Takes the name; waits for the end of the pause before a further attempt.
pub(super) async fn begin<T, E>(operation: &mut Operation) -> Result<Start<T, E>, Cancelled>
where
    T: DeserializeOwned,
    E: DeserializeOwned,
{
    match operation.begin().await? {
        Begun::Recorded(record) => match decode(&record) {
            Ok(returned) => Ok(Start::Returned(returned)),
            Err(why) => operation.undecodable(&why).await,
        },
        Begun::Open(Some(Record { payload, attempts, .. })) => match payload::decode::<Pending>(&payload) {
            Ok(pending) => {
                wait_for_retry(operation, pending.next_at).await?;
                Ok(Start::After(attempts.max(0).unsigned_abs()))
            }
            Err(why) => operation.undecodable(&why).await,
        },
        Begun::Open(None) => Ok(Start::After(0)),
    }
}

/// An attempt that has failed.
pub(super) struct FailedAttempt<E> {
    pub(super) error: StepError<E>,
    /// When the next one is due; never if the error is the step's.
    next_at: Option<DateTime<Utc>>,
    /// Its record.
    pub(super) write: Write,
}

/// Tells the log of an attempt that has failed.
fn tell(operation: &Operation, failed: u32, error: &impl fmt::Display, next_at: Option<DateTime<Utc>>) {
    const MOST: usize = 1000;
    let run = &operation.run;
    let error: String = error.to_string().chars().take(MOST).collect();
    let next = next_at.map_or_else(|| "no more are made".to_owned(), |at| format!("the next one is due at {at}"));
    tracing::warn!(id = %run.id, kind = %run.kind, run = %run.run, attempt = failed, error, "an attempt of {} failed; {next}", operation.key);
}

impl<E: RecordableError> FailedAttempt<E> {
    pub(super) fn new(
        operation: &Operation,
        identity: &RecordKey,
        retry: &Retry,
        failed: u32,
        (error, worth): (StepError<E>, bool),
        at: DateTime<Utc>,
    ) -> Result<Self, payload::EncodeError> {
        let attempts = i32::try_from(failed).unwrap_or(i32::MAX);
        let seed = identity.idempotency(operation.run.run);
        let delay = if worth { retry.delay_after(failed, seed) } else { None };
        let (payload, error) = payload::encode_back(error)?;
        let Some(delay) = delay else {
            return Ok(Self { error, next_at: None, write: Write { attempts, ..Write::failed(payload) } });
        };
        let next_at = due_after(at, delay);
        let pending = payload::encode_record(&Pending { error: payload, next_at })?;
        let write = Write { attempts, state: RecordState::Pending, ..Write::done(pending) };
        Ok(Self { error, next_at: Some(next_at), write })
    }
}

/// Records that an attempt has failed. The error if that is the step's; none once the pause before the next attempt is
/// over.
pub(super) async fn note_failure<E: RecordableError>(
    operation: &Operation,
    identity: &RecordKey,
    retry: &Retry,
    failed: u32,
    error: (StepError<E>, bool),
) -> Result<Option<StepError<E>>, Cancelled> {
    let now = operation.run.core.clock.now();
    let FailedAttempt { error, next_at, write } =
        match FailedAttempt::new(operation, identity, retry, failed, error, now) {
            Ok(attempt) => attempt,
            Err(error) => return operation.unencodable(&error).await,
        };
    tell(operation, failed, &error, next_at);
    let Some(next_at) = next_at else {
        operation.record(write).await?;
        return Ok(Some(error));
    };
    operation.record(write).await?;
    wait_for_retry(operation, next_at).await?;
    Ok(None)
}

async fn wait_for_retry(operation: &Operation, next_at: DateTime<Utc>) -> Result<(), Cancelled> {
    let what = WaitFor::Retry(operation.key.clone());
    operation.wait(what, Some(next_at), |_, now| (now >= next_at).then_some(())).await
}

/// What a record of a step says that the step returns.
pub(super) fn decode<T: DeserializeOwned, E: DeserializeOwned>(
    record: &Record,
) -> Result<Result<T, StepError<E>>, String> {
    match record.state {
        RecordState::Failed => payload::decode(&record.payload).map(Err),
        _ => payload::decode(&record.payload).map(Ok),
    }
}

/// How one attempt ended.
pub(super) enum Attempted<T, E> {
    Ok(T),
    Err(E),
    TimedOut(Duration),
}

/// Makes one attempt. Fails when the process is cancelled meanwhile; the attempt is dropped then.
pub(super) async fn attempt<F, M>(
    operation: &Operation,
    key: &RecordKey,
    identity: &RecordKey,
    number: u32,
    timeout: Option<Duration>,
    attempts: &mut F,
) -> Result<Attempted<F::Ok, F::Err>, Cancelled>
where
    F: Attempts<M>,
{
    let underway = Underway::begin(operation).await?;
    attempt_within(underway, Inside::Step, key, identity, number, timeout, attempts).await
}

/// Makes an attempt that has been let through.
pub(super) async fn attempt_within<F, M>(
    mut underway: Underway<'_>,
    inside: Inside,
    key: &RecordKey,
    identity: &RecordKey,
    number: u32,
    timeout: Option<Duration>,
    attempts: &mut F,
) -> Result<Attempted<F::Ok, F::Err>, Cancelled>
where
    F: Attempts<M>,
{
    let run = &underway.operation.run;
    let part = underway.operation.part();
    let span = tracing::debug_span!("step", id = %run.id, kind = %run.kind, run = %run.run, name = %key.name, key = %key.key, attempt = number);
    let attempt = Attempt { number, run: run.run, identity: identity.clone(), cancel: underway.cancel.clone() };
    let user = {
        let _context = Context { run: run.serial, inside }.enter();
        attempts.begin(attempt)
    };
    let mut user = pin!(Some(user.instrument(span)));
    let mut limit = pin!(async {
        match timeout {
            Some(after) => {
                tokio::time::sleep(after).await;
                after
            }
            None => std::future::pending().await,
        }
    });
    let ended = poll_fn(|cx| {
        if !run.polled_here() {
            // Whoever polls goes on doing so; what the attempt holds must not stay with them.
            user.set(None);
            return Poll::Pending;
        }
        {
            let mut state = run.state();
            if state.is_ending() {
                return Poll::Pending;
            }
            match state.cancelled(part) {
                Some(true) => return Poll::Ready(Err(Cancelled)),
                // The cancellation's record may have to wait for the database, and that for the transaction.
                None if inside == Inside::Transaction => return Poll::Ready(Err(Cancelled)),
                // No success may follow the cancellation that is being recorded.
                None => {
                    state.note_foreign(cx, &run.root);
                    return Poll::Pending;
                }
                Some(false) => state.note_foreign(cx, &run.root),
            }
        }
        let polled = {
            // Durable operations are refused in there.
            let _context = Context { run: run.serial, inside }.enter();
            match user.as_mut().as_pin_mut() {
                Some(user) => user.poll(cx),
                None => Poll::Pending,
            }
        };
        if let Poll::Ready(result) = polled {
            return Poll::Ready(Ok(match result.into_result() {
                Ok(value) => Attempted::Ok(value),
                Err(error) => Attempted::Err(error),
            }));
        }
        limit.as_mut().poll(cx).map(|after| Ok(Attempted::TimedOut(after)))
    })
    .await;
    if !matches!(ended, Ok(Attempted::TimedOut(_)) | Err(_)) {
        underway.ended = true;
    }
    ended
}

/// An attempt that is under way: counted, so that a stopping host lets it end; its token is signalled when it is given
/// up.
pub(super) struct Underway<'r> {
    operation: &'r Operation,
    cancel: CancelToken,
    ended: bool,
}

impl<'r> Underway<'r> {
    /// Waits until an attempt may begin.
    pub(super) async fn begin(operation: &'r Operation) -> Result<Self, Cancelled> {
        let (run, part) = (&operation.run, operation.part());
        // Another instance may be taking over: what begins now might run twice.
        run.core.live.fresh().await;
        crate::engine::operation::wait_until(run, WaitFor::Engine, None, |state, _| {
            if state.stopping {
                return None;
            }
            match state.cancelled(part)? {
                true => Some(Err(Cancelled)),
                false => {
                    state.steps += 1;
                    Some(Ok(()))
                }
            }
        })
        .await?;
        Ok(Self { operation, cancel: CancelToken::default(), ended: false })
    }
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.cancel.0.given_up.store(true, Ordering::Release);
            self.cancel.0.told.notify_waiters();
        }
        self.operation.run.state().steps -= 1;
    }
}
