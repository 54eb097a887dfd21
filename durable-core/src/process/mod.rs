//! What a process's function is handed: [`Process`], and the durable operations on it.

mod all;
mod child;
mod delay;
mod message;
mod race;
mod receive;
mod step;
mod transaction;
mod value;

pub use all::All;
pub use child::{AwaitOutput, Child, SpawnChild};
#[cfg(feature = "conformance")]
pub(crate) use delay::latest;
pub use delay::{Delay, Delayed};
pub use message::RaiseFrom;
pub use race::{Race, RaceMember};
pub use receive::Receive;
pub use step::{AsFailure, Attempt, Attempts, CancelToken, Step, StepOutput, Typed};
pub use transaction::{Statements, Transaction};
pub use value::{Get, Set};

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::borrow::Borrow;
use std::fmt;
use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

use crate::definition::{Definition, Event};
use crate::engine::run::{Part, Run};
use crate::error::IntoFailure;
use crate::name::Name;
use crate::storage::{RecordKey, RunId, Scope};

/// One durable process, in the hands of its function.
///
/// Every operation on it is found again by its **name** after a crash: what was recorded is returned, what was not
/// happens (again). The function itself runs from its start each time, so between the operations it must be
/// deterministic enough to ask for the same names; their order does not matter, and they may run concurrently
/// (`tokio::join!`, `FuturesUnordered`).
///
/// A resumed execution begins nothing before the function has asked for everything that was recorded. If it waits, or
/// ends, without having asked for a record (a step was renamed without [`was`](Step::was), or removed; an older program
/// runs a newer process), the process becomes *stuck* before anything happens. A cancellation arrives where the function
/// waits, so the same rollback runs in memory and after a crash.
///
/// Losing the database, the lease or the host never shows up as an error here: the function is dropped at an await
/// and runs again later. The exception is cancellation, which is asked for.
///
/// Mistakes that no code could handle (a name used twice in one run, an operation inside a step's closure or in
/// another task, a record of another type) never return: the process becomes *stuck*, keeps its records, and goes on
/// where it was when told to resume after the fix.
///
/// ```
/// # use durable_core::{Process, Failure, Event, Retry};
/// # use std::time::Duration;
/// # struct Users; impl Users {
/// #   async fn register(&self, _: &str) -> Result<u64, std::io::Error> { Ok(1) }
/// #   async fn activate(&self, _: u64) -> Result<(), std::io::Error> { Ok(()) } }
/// # struct Mail; impl Mail { async fn verify(&self, _: &str, _: u64) -> Result<(), std::io::Error> { Ok(()) } }
/// # struct App { users: Users, mail: Mail }
/// # const EMAIL_VERIFIED: Event<()> = Event::new("EmailVerified");
/// async fn register_user(app: std::sync::Arc<App>, proc: Process, email: String) -> Result<u64, Failure> {
///     let App { users, mail } = &*app;
///     let user_id = proc.step("RegisterUser", || users.register(&email)).await?;
///     let secret = proc.get("secret", || 4711).await?;
///     proc.step("VerifyEmail", || mail.verify(&email, secret))
///         
///         .retry(Retry::exponential(Duration::from_secs(1)).max_attempts(5))
///         .await?;
///     proc.event(EMAIL_VERIFIED).await?; // takes days; costs a row, not memory
///     proc.step("ActivateUser", || users.activate(user_id)).await?;
///     Ok(user_id)
/// }
/// ```
#[derive(Clone)]
pub struct Process {
    pub(crate) run: Arc<Run>,
    part: Part,
}

impl Process {
    pub(crate) fn new(run: Arc<Run>) -> Self {
        Self { run, part: Part { scope: Scope::Process, uncancellable: false } }
    }

    /// Its id, unique in its namespace.
    pub fn id(&self) -> &str {
        &self.run.id
    }

    /// Its run: restarting a finished process makes a new one of the same id.
    pub fn run(&self) -> RunId {
        self.run.run
    }

    /// Its kind.
    pub fn kind(&self) -> &str {
        &self.run.kind
    }

    /// The number of this execution: 1 at first, one more after each time that the process left memory.
    pub fn execution(&self) -> i64 {
        self.run.claim
    }

    /// The time now, by the database's clock as this instance knows it: by which delays and time-outs are counted on every
    /// instance, and which is virtual in tests. It is another one at each execution, so record what is decided by it.
    ///
    /// ```
    /// # use durable_core::*;
    /// # use durable_core::testing::run_process;
    /// # use std::time::Duration;
    /// # let result = run_process(|proc| async move {
    /// let check_at = proc.get("check at", || proc.now() + Duration::from_secs(3600)).await?;
    /// proc.delay_until("check", check_at).await?;
    /// assert!(proc.now() >= check_at);
    /// # Ok::<_, Failure>(())
    /// # });
    /// # result.unwrap();
    /// ```
    pub fn now(&self) -> DateTime<Utc> {
        self.run.core.clock.now()
    }

    /// Whether what the function does now it has done before: it is called from its start, and operations that are
    /// recorded return what they did. For what should happen once though it is not recorded, a line in a log say.
    pub fn is_replaying(&self) -> bool {
        self.run.state().is_replaying()
    }

    /// The host that runs it. What it does through the host is not recorded: prefer the process's own
    /// [`spawn`](Self::spawn), [`raise`](Self::raise) and [`output`](Self::output).
    pub fn host(&self) -> crate::Host {
        crate::Host::of(self.run.core.clone())
    }

    /// A side effect whose result is recorded: when the `await` returns, it is committed.
    ///
    /// `f` makes the attempt's future: `|| async { … }`, or `|attempt: Attempt| async move { … }` for the attempt's number, its
    /// idempotency key and its cancellation token ([`Attempt`]). It may borrow from its surroundings.
    ///
    /// # After a crash
    /// A recorded step is not run again; its result, or its error, is returned as it was. A step whose program died
    /// between the effect and the record runs again: at least once, each attempt with the same idempotency key.
    ///
    /// # Errors
    /// The closure's error comes back as [`StepError::Failed`](crate::StepError::Failed), after a resume as well: recorded as a
    /// [`Failure`](crate::Failure), whatever its type; or as it is, after [`typed`](Step::typed). A step that cannot fail returns
    /// nothing, or [`Failure::ok`](crate::Failure::ok).
    ///
    /// # Cancel safety
    /// Dropped unfinished, the step gives its name back: the next use is a further attempt, with the same key. If its
    /// record was on its way already, the next use returns it.
    ///
    /// ```
    /// # use durable_core::*;
    /// # use durable_core::testing::run_process;
    /// # #[derive(Debug, serde::Serialize, serde::Deserialize, thiserror::Error)] #[error("declined")] struct Declined;
    /// # async fn charge(_: u64, _key: uuid::Uuid) -> Result<String, Declined> { Ok("receipt 7".into()) }
    /// # let result = run_process(|proc| async move {
    /// for item in [1, 2] {
    ///     proc.step(("charge", item), |attempt: Attempt| charge(item, attempt.key())).await?;
    /// }
    /// # Ok::<_, Failure>(())
    /// # });
    /// # result.unwrap();
    /// ```
    #[track_caller]
    pub fn step<'p, F, M>(&'p self, name: impl Into<Name>, f: F) -> Step<'p, F, M, AsFailure>
    where
        F: Attempts<M, Err: IntoFailure> + 'p,
    {
        Step::new(self, name.into(), f)
    }

    /// A recorded value: `f` makes it at the first time; from then on, and after a crash, it is the last committed
    /// value of its name, be it one that [`set`](Self::set) wrote further down.
    ///
    /// Not a place for side effects: `f` may run again if the program dies before the value is committed. A value is
    /// nothing that a process waits for, so a cancellation does not reach it.
    ///
    /// ```
    /// # use durable_core::*;
    /// # use durable_core::testing::run_process;
    /// # let total = run_process(|proc| async move {
    /// let mut done = proc.get("done", || 0).await?; // after a crash: as far as it got
    /// while done < 3 {
    ///     proc.step(("work", done), || async { /* … */ }).await?;
    ///     done += 1;
    ///     proc.set("done", done).await?;
    /// }
    /// # Ok::<_, Failure>(proc.get("done", || 0).await?)
    /// # });
    /// # assert_eq!(total.unwrap(), 3);
    /// ```
    #[track_caller]
    pub fn get<'p, T, F>(&'p self, name: impl Into<Name>, f: F) -> Get<'p, T, F>
    where
        T: Serialize + DeserializeOwned + Send + 'p,
        F: FnOnce() -> T + Send + 'p,
    {
        Get::new(self, name.into(), f)
    }

    /// A durable variable: overwrites the value of its name and returns once that is committed.
    ///
    /// # After a crash
    /// Without a key it runs again, so a function that resumes passes through the values that it set before; what it set
    /// last is written if it differs from what is recorded, before anything else begins. With a key (`("progress", n)`) it
    /// is written once for each key, and a plain `get` does not see it. A cancellation does not reach it.
    #[track_caller]
    pub fn set<'p, T>(&'p self, name: impl Into<Name>, value: T) -> Set<'p, T>
    where
        T: Serialize + Send + 'p,
    {
        Set::new(self, name.into(), value)
    }

    /// A durable timer. It is due `duration` after its first poll, by the database's clock; a negative or overlong
    /// time is not possible. One that came due while no instance lived fires at the resume.
    ///
    /// ```
    /// # use durable_core::*;
    /// # use durable_core::testing::run_process;
    /// # use std::time::Duration;
    /// # let delayed = run_process(|proc| async move {
    /// let delayed = proc.delay("Wait1m", Duration::from_secs(30 * 24 * 3600)).await?;
    /// # Ok::<_, Failure>(delayed)
    /// # });
    /// # let delayed = delayed.unwrap();
    /// assert!(delayed.on_time() && delayed.woke >= delayed.due);
    /// ```
    #[track_caller]
    pub fn delay(&self, name: impl Into<Name>, duration: Duration) -> Delay<'_> {
        Delay::after(self, name.into(), duration)
    }

    /// A durable timer that is due at a given time, by the database's clock; at once if that has passed.
    #[track_caller]
    pub fn delay_until(&self, name: impl Into<Name>, due: DateTime<Utc>) -> Delay<'_> {
        Delay::at(self, name.into(), due)
    }

    /// Receives a message: the k-th completed receive of an event takes the lowest message not yet taken, so a loop
    /// just works. It does not matter when the message was raised: before the function ran, before it waited, while it
    /// was parked, while no instance lived.
    ///
    /// Two receives of one event at the same time are a mistake. A receive that is dropped unfinished, or loses a
    /// [`race`](Self::race), takes nothing and counts for nothing.
    ///
    /// ```
    /// # use durable_core::*;
    /// # use durable_core::testing::run_process_with;
    /// # use std::time::Duration;
    /// const PAID: Event<u64> = Event::new("Paid");
    /// # let sum = run_process_with(|proc| async move {
    /// let mut paid = 0;
    /// while paid < 100 {
    ///     match proc.event(PAID).timeout(Duration::from_secs(3600)).await? {
    ///         Some(cents) => paid += cents,
    ///         None => break,
    ///     }
    /// }
    /// # Ok::<_, Failure>(paid)
    /// # }, |handle| async move { for cents in [60, 50] { handle.raise(PAID, &cents).await.unwrap(); } });
    /// # assert_eq!(sum.unwrap(), 110);
    /// ```
    #[track_caller]
    pub fn event<T>(&self, event: Event<T>) -> Receive<'_, T, T>
    where
        T: DeserializeOwned + Send,
    {
        Receive::new(self, event)
    }

    /// The first of several durable operations, as one durable operation: winner, its result and what it consumes are
    /// one record. See [`Race`].
    #[track_caller]
    pub fn race<'p, T: Send + 'p>(&'p self, name: impl Into<Name>) -> Race<'p, T> {
        Race::new(self, name.into())
    }

    /// Starts another process, exactly once: its row is committed together with this operation's record.
    ///
    /// A process of that id, kind and input that exists already is handed back ([`Child::existed`]). Its record has
    /// the kind as its name and the id as its key, so children with different ids need no further names.
    ///
    /// ```
    /// # use durable_core::*;
    /// # use durable_core::testing::run_process;
    /// const SHIP: Definition<u64, String> = Definition::new("ship");
    /// # run_process(|proc| async move {
    /// let child = proc.spawn(SHIP, format!("{}/ship", proc.id()), &7).await?;
    /// # if false {
    /// let label = child.output(&proc).await?;
    /// # }
    /// # Ok::<_, Failure>(())
    /// # }).unwrap();
    /// ```
    #[track_caller]
    pub fn spawn<I, O, E, Q>(
        &self,
        definition: Definition<I, O, E>,
        id: impl Into<String>,
        input: &Q,
    ) -> SpawnChild<'_, O, E>
    where
        I: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        SpawnChild::new(self, definition.kind(), id.into(), crate::payload::encode(input))
    }

    /// Sends a message to another process, exactly once: it is in the mailbox when this operation's record is
    /// committed. Its record has the event's name and the id as its key; a second one of the same event to the same
    /// process needs a [key](RaiseFrom::key).
    #[track_caller]
    pub fn raise<T, Q>(&self, id: impl Into<String>, event: Event<T>, payload: &Q) -> RaiseFrom<'_>
    where
        T: Borrow<Q>,
        Q: Serialize + ?Sized,
    {
        RaiseFrom::new(self, id.into(), event.name(), crate::payload::encode(payload))
    }

    /// Awaits the output of another process, wherever it runs, and records it: the same after a crash, even if that
    /// process has been deleted meanwhile.
    #[track_caller]
    pub fn output<I, O, E>(&self, definition: Definition<I, O, E>, id: impl Into<String>) -> AwaitOutput<'_, O, E> {
        AwaitOutput::new(self, definition.kind(), id.into(), None)
    }

    /// Awaits all of several operations, in any number; their results in the order in which they were given. Unlike
    /// `FuturesUnordered` it lets the process leave memory while it waits.
    pub fn all<F: IntoFuture>(&self, operations: impl IntoIterator<Item = F>) -> All<F::IntoFuture> {
        All::new(operations)
    }

    /// The idempotency key of the step with this name: the one that its attempts are given ([`Attempt::key`]), before, while
    /// and after they are made.
    ///
    /// An attempt that was cut off, cancelled or timed out may have had its effect, although the step returned nothing that
    /// could name it. By its key it can be undone all the same. For a step that was [renamed](Step::was) it is the old name's.
    pub fn key(&self, name: impl Into<Name>) -> Uuid {
        let name = name.into();
        let key = RecordKey { scope: self.part.scope, name: name.name().into(), key: name.key().into() };
        key.idempotency(self.run.run)
    }

    /// The process behind a point of no return: its operations run although it was cancelled. Their records are the
    /// process's own, so they are found whether they were asked for here or not.
    ///
    /// A cancellation that comes meanwhile arrives at the first operation behind it that is not shielded, if there is one.
    ///
    /// ```
    /// # use durable_core::*;
    /// # use durable_core::testing::run_process;
    /// # async fn charge() -> Result<(), Failure> { Ok(()) }
    /// # async fn ship() -> Result<(), Failure> { Ok(()) }
    /// # let result = run_process(|proc| async move {
    /// proc.step("charge", charge).await?;
    /// // From here on only forward.
    /// proc.uncancellable().step("ship", ship).await?;
    /// # Ok::<_, Failure>(())
    /// # });
    /// # result.unwrap();
    /// ```
    pub fn uncancellable(&self) -> Self {
        Self { run: self.run.clone(), part: Part { uncancellable: true, ..self.part } }
    }

    /// The process's compensation: a scope of its own, in which operations run although the process was cancelled,
    /// and whose names may repeat those outside. It serves ordinary rollback as well.
    ///
    /// A step that fails, times out or is cancelled may have had its effect. So what is undone is everything that was
    /// attempted, by [its key](Self::key), and not only what has returned.
    ///
    /// ```
    /// # use durable_core::*;
    /// # use durable_core::testing::run_process;
    /// # async fn hold(_key: uuid::Uuid, _cents: u64) -> Result<(), Failure> { Ok(()) }
    /// # async fn ship() -> Result<(), Failure> { Err(Failure::new("out of stock")) }
    /// # async fn release(_key: uuid::Uuid) -> Result<(), Failure> { Ok(()) }
    /// # let result = run_process(|proc| async move {
    /// let done = async {
    ///     proc.step("hold", |attempt: Attempt| hold(attempt.key(), 100)).await?;
    ///     proc.step("ship", ship).await
    /// };
    /// if let Err(error) = done.await {
    ///     // Failed or cancelled, in either step: give the money back, if it was taken.
    ///     proc.compensation().step("release", || release(proc.key("hold"))).await?;
    ///     return Err(error.into());
    /// }
    /// # Ok::<_, Failure>(())
    /// # });
    /// # assert_eq!(result.unwrap_err().to_string(), "out of stock");
    /// ```
    pub fn compensation(&self) -> Self {
        Self { run: self.run.clone(), part: Part { scope: Scope::Compensation, uncancellable: true } }
    }

    pub(crate) fn part(&self) -> Part {
        self.part
    }
}

impl fmt::Debug for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Process").field("id", &self.run.id).field("run", &self.run.run).finish_non_exhaustive()
    }
}
