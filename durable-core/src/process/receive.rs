use chrono::{DateTime, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::future::{Future, IntoFuture};
use std::marker::PhantomData;
use std::panic::Location;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use super::Process;
use super::delay::due_after;
use crate::definition::Event;
use crate::engine::operation::{Begun, Operation, Write};
use crate::engine::run::{At, Part, Run, State, WaitFor};
use crate::error::Cancelled;
use crate::payload;
use crate::storage::{EventRow, OpKind, RecordKey, RecordState, Scope};

/// A receive, to be awaited. See [`Process::event`].
#[must_use = "nothing happens before it is awaited"]
pub struct Receive<'p, T, O> {
    pub(super) run: Arc<Run>,
    part: Part,
    pub(super) name: &'static str,
    pub(super) at: At,
    timeout: Option<Duration>,
    finish: fn(Option<T>) -> Option<O>,
    types: PhantomData<&'p ()>,
}

/// What stands in the record.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Received {
    Message(Box<RawValue>),
    TimedOut(DateTime<Utc>),
}

#[derive(Serialize, Deserialize)]
struct Pending {
    deadline: DateTime<Utc>,
}

impl<'p, T> Receive<'p, T, T> {
    #[track_caller]
    pub(super) fn new(process: &'p Process, event: Event<T>) -> Self {
        Self {
            run: process.run.clone(),
            part: process.part(),
            name: event.name(),
            at: Location::caller(),
            timeout: None,
            finish: |message| message,
            types: PhantomData,
        }
    }

    /// Gives up after this time, by the database's clock, counted from the first poll: `None` then, which is a
    /// completed receive that took no message. The deadline is recorded, so a crash does not prolong it. A message that was put
    /// in by then is received, however late the process looks; a later one is not, and waits for the next receive. A message
    /// that the process finds before the deadline is in time in any case, even if the clock was set back since it was put in.
    pub fn timeout(self, after: Duration) -> Receive<'p, T, Option<T>> {
        let Self { run, part, name, at, .. } = self;
        Receive { run, part, name, at, timeout: Some(after), finish: Some, types: PhantomData }
    }
}

/// The place of a receive among those of its event: two at a time are refused.
pub(super) struct Place {
    run: Arc<Run>,
    name: &'static str,
    pub(super) k: u32,
}

/// The key of the k-th receive of an event.
fn numbered(k: u32) -> String {
    format!("#{k}")
}

/// The place of its record.
fn key(scope: Scope, name: &str, k: u32) -> RecordKey {
    RecordKey { scope, name: name.into(), key: numbered(k).into() }
}

/// A race has returned what the record of the k-th receive of an event holds.
pub(super) fn complete(race: &Operation, name: &str, k: u32) {
    let key = key(race.key.scope, name, k);
    let mut state = race.run.state();
    let receives = state.mail.receives.entry(name.into()).or_default();
    receives.completed = receives.completed.max(k);
    state.names.of(&key).asked = true;
}

impl Place {
    /// Takes it; none makes the process stuck.
    pub(super) fn take(run: &Arc<Run>, name: &'static str, at: At) -> Option<Self> {
        let (k, other) = {
            let mut state = run.state();
            let receives = state.mail.receives.entry(name.into()).or_default();
            let other = receives.busy;
            if other.is_none() {
                receives.busy = Some(at);
            }
            (receives.completed + 1, other)
        };
        if let Some(other) = other {
            run.fault(format_args!(
                "the event {name:?} is received twice at the same time: at {other} and at {at}; receive it in one place"
            ));
            return None;
        }
        Some(Self { run: run.clone(), name, k })
    }

    /// The message in this place's record, if a receive was dropped while that was on its way.
    pub(super) async fn left_over(&self, race: &Operation) -> Result<Option<Box<str>>, Cancelled> {
        let key = key(race.key.scope, self.name, self.k);
        let record = |state: &mut State, _| match state.names.get(&key) {
            Some(name) if name.is_recording() => None,
            Some(name) if name.is_final() => Some(name.record.clone()),
            _ => Some(None),
        };
        let Some(record) = race.wait(WaitFor::Engine, None, record).await? else { return Ok(None) };
        match payload::decode(&record.payload) {
            Ok(Received::Message(json)) => Ok(Some(Box::<str>::from(json))),
            // One that was dropped while it timed out: the next plain receive passes it over.
            Ok(Received::TimedOut(_)) => Ok(None),
            Err(why) => race.undecodable(&why).await,
        }
    }

    /// The receive has completed.
    pub(super) fn completed(self) {
        if let Some(receives) = self.run.state().mail.receives.get_mut(self.name) {
            receives.completed += 1;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(receives) = self.run.state().mail.receives.get_mut(self.name) {
            receives.busy = None;
        }
    }
}

/// The lowest message of an event that is not taken.
pub(super) fn lowest<'s>(state: &'s State, name: &str) -> Option<&'s EventRow> {
    state.mail.events.values().find(|event| *event.name == *name)
}

/// Takes a message that [`lowest`] has found out of the mailbox.
pub(super) fn take(state: &mut State, number: i64) -> Option<EventRow> {
    state.mail.events.remove(&number)
}

impl<'p, T, O> IntoFuture for Receive<'p, T, O>
where
    T: DeserializeOwned + Send + 'p,
    O: Send + 'p,
{
    type Output = Result<O, Cancelled>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'p>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let Self { run, part, name, at, timeout, finish, .. } = self;
            if !run.admits(format_args!("the receive of {name:?}"), at) {
                return std::future::pending().await;
            }
            loop {
                let Some(place) = Place::take(&run, name, at) else { return std::future::pending().await };
                let mut operation = Operation::with_key(&run, part, name, &numbered(place.k), OpKind::Event, at);
                let received = receive(&mut operation, name, timeout).await?;
                let message = match &received {
                    Received::Message(json) => match payload::decode::<T>(json.get()) {
                        Ok(message) => Some(message),
                        Err(why) => return operation.undecodable(&why).await,
                    },
                    Received::TimedOut(_) => None,
                };
                place.completed();
                operation.done();
                // Without a time-out now, the record is of one that was dropped while it timed out: it took nothing.
                if let Some(output) = finish(message) {
                    return Ok(output);
                }
            }
        })
    }
}

async fn receive(operation: &mut Operation, name: &str, timeout: Option<Duration>) -> Result<Received, Cancelled> {
    let pending = match operation.begin().await? {
        Begun::Recorded(record) => match payload::decode(&record.payload) {
            Ok(received) => return Ok(received),
            Err(why) => return operation.undecodable(&why).await,
        },
        Begun::Open(pending) => pending,
    };
    // The deadline of one that this execution has dropped is not this one's.
    let dropped = operation.run.state().names.get(&operation.key).is_some_and(|name| name.dropped);
    let deadline = match (pending.filter(|_| !dropped), timeout) {
        (_, None) => None,
        (Some(record), Some(_)) => match payload::decode::<Pending>(&record.payload) {
            Ok(pending) => Some(pending.deadline),
            Err(why) => return operation.undecodable(&why).await,
        },
        (None, Some(after)) => {
            // A message that is there already needs no deadline.
            let waiting = lowest(&operation.run.state(), name).is_some();
            if waiting {
                None
            } else {
                let deadline = due_after(operation.run.core.clock.now(), after);
                operation.record_value(RecordState::Pending, &Pending { deadline }).await?;
                Some(deadline)
            }
        }
    };
    let event = operation
        .wait(WaitFor::Event(name.into()), deadline, |state, now| {
            // One that is there before the deadline is in time, even if it was put in before the clock was set back.
            let in_time =
                |event: &&EventRow| deadline.is_none_or(|deadline| event.raised_at <= deadline || now < deadline);
            match lowest(state, name).filter(in_time).map(|event| event.number) {
                Some(number) => Some(Ok(take(state, number)?)),
                None => deadline.is_some_and(|deadline| now >= deadline).then_some(Err(now)),
            }
        })
        .await?;
    let (received, taken) = match event {
        Ok(event) => match RawValue::from_string(event.payload.clone().into()) {
            Ok(json) => (Received::Message(json), Some(event)),
            Err(why) => return operation.undecodable(&format!("its message is not JSON: {why}")).await,
        },
        Err(now) => (Received::TimedOut(now), None),
    };
    let payload = match payload::encode_record(&received) {
        Ok(payload) => payload,
        Err(error) => return operation.unencodable(&error).await,
    };
    let mut back = taken.map(|event| PutBack::new(&operation.run, &operation.key, event));
    let takes = back.as_ref().and_then(PutBack::number);
    operation.record(Write { takes, ..Write::done(payload) }).await?;
    if let Some(back) = &mut back {
        back.keep();
    }
    Ok(received)
}

/// Puts a message back whose record was not written. Once the record is on its way it is too late: the next receive
/// returns that record.
pub(super) struct PutBack {
    run: Arc<Run>,
    key: RecordKey,
    event: Option<EventRow>,
}

impl PutBack {
    pub(super) fn new(run: &Arc<Run>, key: &RecordKey, event: EventRow) -> Self {
        Self { run: run.clone(), key: key.clone(), event: Some(event) }
    }

    pub(super) fn number(&self) -> Option<i64> {
        self.event.as_ref().map(|event| event.number)
    }

    /// The record is written.
    pub(super) fn keep(&mut self) {
        self.event = None;
    }
}

impl Drop for PutBack {
    fn drop(&mut self) {
        let Some(event) = self.event.take() else { return };
        let mut state = self.run.state();
        let on_its_way = state.names.get(&self.key).is_some_and(|name| name.is_recording() || name.is_final());
        if !on_its_way {
            state.mail.events.insert(event.number, event);
        }
    }
}
