use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::panic::Location;
use std::pin::Pin;
use std::time::Duration;

use super::Process;
use crate::engine::operation::{Begun, Operation, Write};
use crate::engine::run::WaitFor;
use crate::error::Cancelled;
use crate::name::Name;
use crate::payload;
use crate::storage::{OpKind, RecordState};

/// How a timer went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Delayed {
    /// When it was due, by the database's clock.
    pub due: DateTime<Utc>,
    /// When it woke the process.
    pub woke: DateTime<Utc>,
}

impl Delayed {
    /// Within this time of being due a timer counts as on time: a busy or restarting service is not late.
    pub const TOLERANCE: TimeDelta = TimeDelta::seconds(30);

    /// How long after it was due it woke the process.
    pub fn late_by(&self) -> TimeDelta {
        self.woke - self.due
    }

    /// Whether it woke the process within [`TOLERANCE`](Self::TOLERANCE); false means that no instance with room was
    /// alive when it came due.
    pub fn on_time(&self) -> bool {
        self.late_by() <= Self::TOLERANCE
    }
}

/// The last moment that every storage can hold.
pub(crate) fn latest() -> DateTime<Utc> {
    const YEAR_9999_DEC_31: i64 = 253_402_300_799;
    DateTime::from_timestamp(YEAR_9999_DEC_31, 0).unwrap_or(DateTime::<Utc>::MAX_UTC)
}

/// `after` from now, to the millisecond that every storage keeps, at most at the end of the year 9999.
pub(crate) fn due_after(now: DateTime<Utc>, after: Duration) -> DateTime<Utc> {
    let due = TimeDelta::from_std(after).ok().and_then(|after| now.checked_add_signed(after));
    clamp(due.unwrap_or_else(latest))
}

/// What every storage can hold of it.
pub(crate) fn clamp(due: DateTime<Utc>) -> DateTime<Utc> {
    due.clamp(DateTime::UNIX_EPOCH, latest()).trunc_subsecs(3)
}

/// When a timer is due.
#[derive(Clone, Copy, Debug)]
pub(super) enum Due {
    After(Duration),
    At(DateTime<Utc>),
}

impl Due {
    pub(super) fn from(self, now: DateTime<Utc>) -> DateTime<Utc> {
        match self {
            Self::After(duration) => due_after(now, duration),
            Self::At(at) => clamp(at),
        }
    }
}

/// A durable timer, to be awaited. See [`Process::delay`].
///
/// Its due time is recorded at the first poll, and when it woke the process afterwards.
#[must_use = "nothing happens before it is awaited"]
pub struct Delay<'p> {
    pub(super) operation: Operation,
    pub(super) due: Due,
    process: PhantomData<&'p ()>,
}

#[derive(Serialize, Deserialize)]
struct Pending {
    due: DateTime<Utc>,
}

impl<'p> Delay<'p> {
    #[track_caller]
    pub(super) fn after(process: &'p Process, name: Name, duration: Duration) -> Self {
        Self::new(process, &name, Due::After(duration))
    }

    #[track_caller]
    pub(super) fn at(process: &'p Process, name: Name, due: DateTime<Utc>) -> Self {
        Self::new(process, &name, Due::At(due))
    }

    #[track_caller]
    fn new(process: &'p Process, name: &Name, due: Due) -> Self {
        let operation = Operation::new(&process.run, process.part(), name, OpKind::Delay, Location::caller());
        Self { operation, due, process: PhantomData }
    }
}

impl<'p> IntoFuture for Delay<'p> {
    type Output = Result<Delayed, Cancelled>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'p>>;

    fn into_future(self) -> Self::IntoFuture {
        let Self { mut operation, due, .. } = self;
        Box::pin(async move {
            let pending = match operation.begin().await? {
                Begun::Recorded(record) => match payload::decode(&record.payload) {
                    Ok(delayed) => {
                        operation.done();
                        return Ok(delayed);
                    }
                    Err(why) => return operation.undecodable(&why).await,
                },
                Begun::Open(pending) => pending,
            };
            let due = match pending {
                Some(record) => match payload::decode::<Pending>(&record.payload) {
                    Ok(pending) => pending.due,
                    Err(why) => return operation.undecodable(&why).await,
                },
                None => {
                    let due = due.from(operation.run.core.clock.now());
                    operation.record_value(RecordState::Pending, &Pending { due }).await?;
                    due
                }
            };
            let what = WaitFor::Timer(operation.key.clone());
            let woke = operation.wait(what, Some(due), |_, now| (now >= due).then_some(now)).await?;
            let delayed = Delayed { due, woke: woke.trunc_subsecs(3).max(due) };
            operation.record_value(RecordState::Done, &delayed).await?;
            operation.done();
            Ok(delayed)
        })
    }
}

impl Operation {
    /// Records one of the engine's own values.
    pub(super) async fn record_value(&self, state: RecordState, value: &impl Serialize) -> Result<(), Cancelled> {
        let payload = match payload::encode_record(value) {
            Ok(payload) => payload,
            Err(error) => return self.unencodable(&error).await,
        };
        self.record(Write { state, ..Write::done(payload) }).await.map(|_| ())
    }
}
