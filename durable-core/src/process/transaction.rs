use serde::Serialize;
use serde::de::DeserializeOwned;
use std::future::{Future, IntoFuture, Pending, pending};
use std::marker::PhantomData;
use std::panic::Location;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::Process;
use super::delay::due_after;
use super::step::{
    self, AsFailure, Attempt, Attempted, Attempts, FailedAttempt, Options, RecordableError, Recording, Start, Typed,
    Underway,
};
use crate::engine::Backoff;
use crate::engine::operation::{Operation, Write};
use crate::engine::run::{Counted, End, Run, WaitFor};
use crate::engine::wake::Inside;
use crate::error::{Cancelled, IntoFailure, StepError};
use crate::limits::LimitError;
use crate::name::Name;
use crate::payload;
use crate::retry::Retry;
use crate::storage::{
    Committed, Ending, Op, OpKind, Open, Record, RecordKey, RecordOp, RecordState, RolledBack, StorageError,
    Transactional,
};

/// How long a transaction may be open, unless told otherwise or half the expiry is less.
const DEADLINE: Duration = Duration::from_secs(4);
/// So long after its deadline a transaction whose future nobody polls is ended together with the execution.
const GRACE: Duration = Duration::from_millis(300);
/// So often a transaction is made again that the database has aborted without it being known why.
const ABORTED: u32 = 3;

/// What makes the statements of a transaction: `FnMut(Tx) -> Future` of a `Result`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` does not make a transaction",
    note = "a transaction takes `async |mut tx| {{ … }}`, whose future is `Send` and returns a `Result`"
)]
pub trait Statements<Tx>: Send {
    /// What the transaction returns.
    type Ok: Send;
    /// The closure's own error.
    type Err: Send;
    /// One attempt.
    type Future: Future<Output = Result<Self::Ok, Self::Err>> + Send;
    /// Begins an attempt.
    fn begin(&mut self, tx: Tx) -> Self::Future;
}

impl<F, Tx, Fut, T: Send, E: Send> Statements<Tx> for F
where
    F: FnMut(Tx) -> Fut + Send,
    Fut: Future<Output = Result<T, E>> + Send,
{
    type Ok = T;
    type Err = E;
    type Future = Fut;
    fn begin(&mut self, tx: Tx) -> Fut {
        self(tx)
    }
}

/// A step whose SQL and whose record are one transaction in the storage's own database, to be awaited: **exactly once**.
/// Backends make it: `proc.transaction(name, async |mut tx| { … })` by their extension trait.
///
/// Begin and commit are the engine's. When its `await` returns, what the closure did is committed with the record of
/// its result, by the owner alone; when it fails, nothing of it is kept. After a crash, or when the answer to the commit
/// is lost, the record tells whether it happened. What is not SQL in this transaction happens at least once, as in a
/// step.
///
/// An `Err` of the closure rolls back, and is the transaction's error, tried again and recorded like a step's. A lost
/// connection, a deadlock or a serialisation failure is none of the process's business: the closure is called again.
/// Where its error does not say what the database complained of, it is called again up to three times if the database
/// had aborted the transaction.
///
/// It has a deadline: 4 s, or less than half the [expiry](crate::HostBuilder::heartbeat) if that is less. Then it is
/// rolled back, and has failed as [`TimedOut`](StepError::TimedOut), even if nobody polls its future any more: the whole
/// execution is ended in that case, and the process resumed from its records. On SQLite an open transaction keeps everybody else from writing, so let it wait for nothing
/// but the database.
///
/// Durable operations, `Host` and `Handle` are refused within (they could wait for what the transaction holds): the
/// process becomes stuck.
///
/// # Cancel safety
/// Dropped while the closure runs, it is rolled back, its connection closed. Dropped during the commit, the commit goes
/// on, and the next use of the name returns what was recorded.
#[must_use = "nothing happens before it is awaited"]
pub struct Transaction<'p, S: Transactional, F: Statements<S::Tx>, R> {
    operation: Operation,
    statements: F,
    options: Options<'p, F::Err>,
    types: PhantomData<fn() -> (S, R)>,
}

impl<'p, S: Transactional, F: Statements<S::Tx, Err: IntoFailure>> Transaction<'p, S, F, AsFailure> {
    /// For the extension traits of backends.
    #[track_caller]
    pub fn new(process: &'p Process, name: impl Into<Name>, statements: F) -> Self {
        let name = name.into();
        let at = Location::caller();
        let operation = Operation::new(&process.run, process.part(), &name, OpKind::Transaction, at);
        Self { operation, statements, options: Options::new(), types: PhantomData }
    }

    /// Records the closure's error as it is, not as a [`Failure`](crate::Failure): it needs `Serialize` and `Deserialize`.
    pub fn typed(self) -> Transaction<'p, S, F, Typed>
    where
        F::Err: RecordableError,
    {
        let Self { operation, statements, options, .. } = self;
        Transaction { operation, statements, options, types: PhantomData }
    }
}

impl<'p, S: Transactional, F: Statements<S::Tx>, R> Transaction<'p, S, F, R> {
    /// Tries again after a failure of the closure's own, a time-out included. Without it the first is the
    /// transaction's error.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.options.retry = retry;
        self
    }

    /// Which of the closure's errors are worth a retry. All are, by default.
    pub fn retry_if(mut self, worth: impl Fn(&F::Err) -> bool + Send + 'p) -> Self {
        self.options.retry_if = Some(Box::new(worth));
        self
    }

    /// What the transaction was called in an earlier version of the code: its record is used.
    pub fn was(mut self, name: impl Into<Name>) -> Self {
        self.options.was = Some(name.into());
        self
    }

    /// How long it may be open: less than half the host's expiry.
    pub fn timeout(mut self, deadline: Duration) -> Self {
        self.options.timeout = Some(deadline);
        self
    }
}

impl<'p, S, F, R> IntoFuture for Transaction<'p, S, F, R>
where
    S: Transactional,
    F: Statements<S::Tx> + 'p,
    F::Ok: Serialize + DeserializeOwned,
    F::Err: 'p,
    R: Recording<F::Err> + 'p,
{
    type Output = Result<F::Ok, StepError<R::Error>>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'p>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { operation, statements, options, .. } = self;
        Box::pin(run::<S, F, R>(operation, statements, options))
    }
}

async fn run<S, F, R>(
    mut operation: Operation,
    mut statements: F,
    mut options: Options<'_, F::Err>,
) -> Result<F::Ok, StepError<R::Error>>
where
    S: Transactional,
    F: Statements<S::Tx>,
    F::Ok: Serialize + DeserializeOwned,
    R: Recording<F::Err>,
{
    let identity = step::identity(&mut operation, options.was.as_ref());
    let mut failed = match step::begin(&mut operation).await? {
        Start::Returned(returned) => {
            operation.done();
            return returned;
        }
        Start::After(failed) => failed,
    };
    let half = operation.run.core.settings.expiry / 2;
    let deadline = match options.timeout {
        None => DEADLINE.min(half * 4 / 5),
        Some(given) if given < half => given,
        Some(given) => {
            let (key, at) = (&operation.key, operation.at());
            let why = format!(
                "the transaction {key} at {at} may be open for {given:?}; less than {half:?}, half of the host's expiry, \
                 is allowed"
            );
            return operation.stuck(why).await;
        }
    };
    let mut backoff = Backoff::new();
    let mut aborted = 0;
    loop {
        let tried =
            once::<S, F, R>(&operation, &identity, &mut statements, &mut options, failed, deadline, aborted < ABORTED)
                .await?;
        let (error, worth) = match tried {
            Tried::Done(value) => {
                operation.done();
                return Ok(value);
            }
            Tried::Recorded(record) => match step::decode(&record) {
                Ok(returned) => {
                    operation.done();
                    return returned;
                }
                Err(why) => return operation.undecodable(&why).await,
            },
            Tried::Again { why, aborts } => {
                aborted += u32::from(aborts);
                operation.run.core.note_trouble(&why);
                if backoff.tries() == 5 {
                    tracing::warn!(id = %operation.run.id, run = %operation.run.run, "the transaction {} fails again and again: {why}", operation.key);
                }
                tracing::debug!(id = %operation.run.id, run = %operation.run.run, "the transaction {} is made again: {why}", operation.key);
                tokio::time::sleep(backoff.next()).await;
                continue;
            }
            Tried::Failed(error, worth) => (error, worth),
        };
        failed += 1;
        if let Some(error) = step::note_failure(&operation, &identity, &options.retry, failed, (error, worth)).await? {
            operation.done();
            return Err(error);
        }
    }
}

/// What came of one attempt.
enum Tried<T, E> {
    Done(T),
    /// It had happened before.
    Recorded(Record),
    /// Nothing of it was kept, for no fault of the closure's.
    Again {
        why: String,
        /// The database had aborted it for a reason that is not known.
        aborts: bool,
    },
    Failed(StepError<E>, bool),
}

impl<T, E> Tried<T, E> {
    fn again(why: impl std::fmt::Display) -> Self {
        Self::Again { why: why.to_string(), aborts: false }
    }
}

/// Makes the one attempt out of a transaction that is open.
struct Given<'f, F, Tx> {
    statements: &'f mut F,
    tx: Option<Tx>,
}

impl<F: Statements<Tx>, Tx: Send> Attempts<Tx> for Given<'_, F, Tx> {
    type Ok = F::Ok;
    type Err = F::Err;
    type Future = F::Future;
    fn begin(&mut self, _: Attempt) -> F::Future {
        #[allow(clippy::expect_used)]
        // It is asked for one attempt.
        self.statements.begin(self.tx.take().expect("one attempt"))
    }
}

async fn once<S, F, R>(
    operation: &Operation,
    identity: &RecordKey,
    statements: &mut F,
    options: &mut Options<'_, F::Err>,
    failed: u32,
    deadline: Duration,
    forgiving: bool,
) -> Result<Tried<F::Ok, R::Error>, Cancelled>
where
    S: Transactional,
    F: Statements<S::Tx>,
    F::Ok: Serialize + DeserializeOwned,
    R: Recording<F::Err>,
{
    let (run, key) = (&operation.run, &operation.key);
    let underway = Underway::begin(operation).await?;
    // A host that stops lets it come to its commit.
    let _counted = Counted::new(run);
    let Open { tx, ending } = match open::<S>(run, deadline).await {
        Ok(open) => open,
        Err(StorageError::Schema(why)) => return operation.stuck(format!("the transaction {key}: {why}")).await,
        Err(error) => return Ok(Tried::again(error)),
    };
    let watchdog = match Watchdog::set::<R::Error>(operation, identity, &options.retry, failed + 1, deadline) {
        Ok(watchdog) => watchdog,
        Err(error) => return operation.unencodable(&error).await,
    };
    let mut given = Given { statements, tx: Some(tx) };
    let inside = Inside::Transaction;
    let made = step::attempt_within(underway, inside, key, key, failed + 1, Some(deadline), &mut given).await;
    drop(given);
    drop(watchdog);
    match made {
        Err(Cancelled) => {
            // The connection goes with its ending, before anything is waited for.
            drop(ending);
            operation.wait(WaitFor::Engine, None, |_, _| None).await
        }
        Ok(Attempted::TimedOut(after)) => Ok(Tried::Failed(StepError::TimedOut(after), true)),
        Ok(Attempted::Err(error)) => {
            let mut transient = None;
            let (error, worth) = options.judge::<R>(error, |error| transient = ending.is_transient(error));
            match engine(tokio::spawn(ending.rollback())).await {
                Err(gone) => Ok(Tried::again(gone)),
                Ok(_) if transient == Some(true) => Ok(Tried::again("the database asks for another try")),
                Ok(RolledBack::Escaped) => escaped(operation).await,
                Ok(RolledBack::Aborted) if forgiving && transient.is_none() => {
                    Ok(Tried::Again { why: "the database had aborted it".into(), aborts: true })
                }
                Ok(_) => Ok(Tried::Failed(error, worth)),
            }
        }
        Ok(Attempted::Ok(value)) => {
            let (payload, value) = match payload::encode_back(value) {
                Ok(encoded) => encoded,
                Err(error) => return operation.unencodable(&error).await,
            };
            let allowed = run.core.settings.max_payload;
            if payload.len() > allowed {
                let error = LimitError::Payload { what: "result", given: payload.len(), allowed };
                return operation.stuck(format!("the transaction {key}: {error}")).await;
            }
            commit::<S, _, _>(operation, ending, payload, value, failed, forgiving).await
        }
    }
}

async fn commit<S: Transactional, T, E>(
    operation: &Operation,
    ending: Box<dyn Ending>,
    payload: Box<str>,
    value: T,
    failed: u32,
    forgiving: bool,
) -> Result<Tried<T, E>, Cancelled> {
    let (run, key) = (&operation.run, &operation.key);
    let attempts = i32::try_from(failed).unwrap_or(i32::MAX);
    let (record, _) = operation.record_op(Write { attempts, ..Write::done(payload) });
    let given_up = {
        let mut state = run.state();
        let cancelled = state.cancelled(operation.part()) != Some(false);
        let name = state.names.of(key);
        // Or its watchdog has just given it up, and records that.
        let given_up = cancelled || name.is_recording();
        name.recording += u32::from(!given_up);
        given_up
    };
    if given_up {
        // What it holds goes before the wait: the cancellation's record may be waiting for it.
        drop(ending);
        return operation.wait(WaitFor::Engine, None, |_, _| None).await;
    }
    // In a task of the engine's own: whoever asked may go away, the outcome must become known.
    let (seq, delivery) = (record.seq, run.sending(record.seq));
    let (tell, told) = oneshot::channel();
    let committing = tokio::spawn({
        let run = run.clone();
        async move {
            let _ = tell.send(committed::<S>(run.clone(), ending, record).await);
            run.answered(seq);
            Ok(())
        }
    });
    let Ok(settled) = told.await else {
        // It has panicked, or the runtime goes down.
        let _ = engine(committing).await;
        return pending().await;
    };
    match settled {
        Ok(Settled::Recorded | Settled::Exists(_)) => delivery.taken().await,
        // Nothing of it was kept, and nobody waits for it.
        _ => drop(delivery),
    }
    match settled {
        Ok(Settled::Recorded) => Ok(Tried::Done(value)),
        Ok(Settled::Exists(record)) => Ok(Tried::Recorded(record)),
        Ok(Settled::Refused(why)) => Ok(Tried::Failed(StepError::Refused(why.into()), false)),
        Ok(Settled::Again(why)) => Ok(Tried::again(why)),
        Ok(Settled::Aborted) if forgiving => {
            Ok(Tried::Again { why: "the database had aborted it".into(), aborts: true })
        }
        Ok(Settled::Aborted) => {
            let why = "one of its statements had failed, after which the database keeps nothing; return the error, or \
                       guard the statement with a savepoint";
            Ok(Tried::Failed(StepError::Refused(why.into()), false))
        }
        Ok(Settled::Cancelled) => operation.wait(WaitFor::Engine, None, |_, _| None).await,
        Ok(Settled::Lost) => {
            run.end(End::Gone);
            pending().await
        }
        Ok(Settled::Escaped) => escaped(operation).await,
        Err(error) => operation.stuck(format!("the transaction {key}: {error}")).await,
    }
}

/// Makes the process stuck.
fn escaped<T>(operation: &Operation) -> Pending<T> {
    let (key, at) = (&operation.key, operation.at());
    operation.stuck(format!(
        "the transaction {key} at {at} was ended by its own SQL (a COMMIT or ROLLBACK), or its handle outlives its closure; \
         begin and commit are the engine's: leave them out, and keep `tx` in the closure"
    ))
}

/// What is known of a commit in the end.
enum Settled {
    Recorded,
    Exists(Record),
    Refused(String),
    Again(String),
    Aborted,
    Cancelled,
    Lost,
    Escaped,
}

/// Commits, finds out what came of it, and notes it in the run.
async fn committed<S: Transactional>(
    run: Arc<Run>,
    ending: Box<dyn Ending>,
    record: RecordOp,
) -> Result<Settled, StorageError> {
    let mut settled = match ending.commit(run.instance, &record).await {
        Ok(Committed::Recorded) => Ok(Settled::Recorded),
        Ok(Committed::Exists) | Err(StorageError::Unknown(_)) => settle::<S>(&run, &record.key).await,
        Ok(Committed::Cancelled) => Ok(Settled::Cancelled),
        Ok(Committed::Lost) | Err(StorageError::Fenced) => Ok(Settled::Lost),
        Ok(Committed::Refused(why)) => Ok(Settled::Refused(why)),
        Ok(Committed::Aborted) => Ok(Settled::Aborted),
        Ok(Committed::Escaped) => Ok(Settled::Escaped),
        Err(error) if error.is_transient() => Ok(Settled::Again(error.to_string())),
        Err(error) => Err(error),
    };
    let RecordOp { key, op, state, payload, attempts, seq, claim, .. } = record;
    match &mut settled {
        Ok(Settled::Recorded) => run.recorded(&key, Record { op, state, payload, attempts, seq, claim }),
        Ok(Settled::Exists(record)) => run.recorded(&key, record.clone()),
        _ => run.not_recorded(&key),
    }
    settled
}

/// What is recorded, once nothing of an earlier attempt is under way.
async fn settle<S: Transactional>(run: &Run, key: &RecordKey) -> Result<Settled, StorageError> {
    let mut backoff = Backoff::new();
    loop {
        match of::<S>(run)?.settled(run.run, key).await {
            Ok(Some(record)) if record.state != RecordState::Pending => return Ok(Settled::Exists(record)),
            Ok(_) => return Ok(Settled::Again("its commit has not happened".into())),
            Err(error) if error.is_transient() => tokio::time::sleep(backoff.next()).await,
            Err(error) => return Err(error),
        }
    }
}

/// The host's storage, if it is the one that the transaction is for.
fn of<S: Transactional>(run: &Run) -> Result<&S, StorageError> {
    run.core.transactional().ok_or_else(|| {
        let (wanted, name) = (std::any::type_name::<S>(), run.core.storage.name());
        StorageError::schema(format!("it is for the storage {wanted}, but this host's is {name:?}"))
    })
}

/// Opens a transaction, in a task of the engine's own: a future of the driver's that is dropped halfway could leave one
/// open.
async fn open<S: Transactional>(run: &Arc<Run>, idle: Duration) -> Result<Open<S::Tx>, StorageError> {
    let run = run.clone();
    engine(tokio::spawn(async move { of::<S>(&run)?.begin(idle).await })).await
}

/// Waits for a task of the engine's.
async fn engine<T>(task: JoinHandle<Result<T, StorageError>>) -> Result<T, StorageError> {
    match task.await {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime is going down; so is the process.
        Err(_) => pending().await,
    }
}

/// Ends the execution if a transaction is still open at its deadline: nobody polls its future. That is a failed attempt like
/// any other that takes too long, so that it does not go on for ever.
struct Watchdog(JoinHandle<()>);

impl Watchdog {
    fn set<E: RecordableError>(
        operation: &Operation,
        identity: &RecordKey,
        retry: &Retry,
        failed: u32,
        deadline: Duration,
    ) -> Result<Self, payload::EncodeError> {
        let (run, after) = (operation.run.clone(), deadline + GRACE);
        let error = (StepError::<E>::TimedOut(deadline), true);
        let at = due_after(run.core.clock.now(), after);
        let attempt = FailedAttempt::new(operation, identity, retry, failed, error, at)?;
        let part = operation.part();
        let (record, places) = operation.record_op(attempt.write);
        Ok(Self(tokio::spawn(async move {
            tokio::time::sleep(after).await;
            let key = &record.key;
            let cancelled = {
                let mut state = run.state();
                // Its future has come to an end in the last moment.
                if state.is_ending() || state.names.of(key).is_recording() {
                    return;
                }
                // From now on its commit does not begin.
                state.names.of(key).recording += 1;
                state.cancelled(part) != Some(false)
            };
            tracing::warn!(id = %run.id, run = %run.run, "the transaction {key} is open beyond its deadline and its future is not polled; that is a failed attempt, and the process is resumed from its records");
            if !cancelled {
                // Before the execution ends, after which it could record nothing.
                drop(run.submit(Op::Record(record), places));
            }
            run.end(End::Release);
        })))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.abort();
    }
}
