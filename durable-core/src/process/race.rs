use chrono::{DateTime, SubsecRound, Utc};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::future::{Future, IntoFuture, poll_fn};
use std::panic::Location;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::Poll;

use super::Process;
use super::child::{AwaitOutput, End};
use super::delay::{Delay, Delayed, Due};
use super::receive::{self, Place, PutBack, Receive};
use super::step::{Attempts, Recording, Step};
use crate::engine::lock;
use crate::engine::operation::{Begun, Operation, Write};
use crate::engine::run::{Run, State, WaitFor};
use crate::error::{Cancelled, OutputError, StepError};
use crate::name::Name;
use crate::payload::{self, EncodeError};
use crate::storage::{Fate, OpKind, RecordState, RunId};

/// The first of several durable operations, as one durable operation, to be awaited. See [`Process::race`].
///
/// Winner, its result and what it consumes are one record; the members write none. Losers consume nothing; a step that
/// had begun and loses is signalled, dropped and not recorded, so it may have had its effect. After a crash an
/// unfinished race goes on with the deadlines that it had; a finished one returns the same branch.
///
/// If several are ready, after an outage perhaps, the one that was ready first wins, by the database's clock: a message by when
/// it was put in, a timer by when it was due, another process by when it ended, a step now. If they were ready at the same time
/// it is the one that was added first. A step in a race is attempted until its
/// retry is exhausted; how many have failed stands in the race's record, so after a crash, or a year, they go on from there.
///
/// ```
/// # use durable_core::*;
/// # use durable_core::testing::run_process;
/// # use std::time::Duration;
/// # #[derive(Debug, PartialEq)]
/// enum First { Paid(u64), Late }
/// const PAID: Event<u64> = Event::new("Paid");
/// # let late = run_process(|proc| async move {
/// let first = proc
///     .race("paid or late")
///     .on(proc.event(PAID), First::Paid)
///     .on(proc.delay("late", Duration::from_secs(14 * 24 * 3600)), |_| First::Late)
///     .await?;
/// # Ok::<_, Failure>(first == First::Late)
/// # });
/// # assert!(late.unwrap());
/// ```
#[must_use = "nothing happens before it is awaited"]
pub struct Race<'p, T> {
    operation: Operation,
    members: Vec<Member<'p, T>>,
}

/// One branch of a race.
struct Member<'p, T> {
    label: Label,
    due: Option<Due>,
    ready: Ready,
    contend: Contend<'p>,
    finish: Box<dyn FnOnce(&str) -> Result<T, String> + Send + 'p>,
}

/// What tells since when a member is ready.
#[doc(hidden)]
#[derive(Clone, Debug)]
pub enum Ready {
    /// Its deadline.
    Due,
    /// A message of this event.
    Message(&'static str),
    /// The end of the process of this id, or of this run.
    End(Box<str>, Option<RunId>),
    /// Nothing does.
    Unknown,
}

impl Ready {
    /// Since when it is; none if it is not, or cannot be told.
    fn since(&self, state: &State, due: Option<DateTime<Utc>>, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self {
            Self::Due => due.filter(|due| *due <= now),
            Self::Message(name) => receive::lowest(state, name).map(|event| event.raised_at),
            Self::End(id, run) => state.mail.targets.values().find_map(|target| match &target.fate {
                Fate::Ended(_, at) if run.map_or(target.id == *id, |run| target.run == run) => Some(*at),
                _ => None,
            }),
            Self::Unknown => None,
        }
    }
}

/// Takes part, on behalf of the race.
type Contend<'p> = Box<dyn FnOnce(Contender) -> Contest<'p> + Send + 'p>;
type Contest<'p> = Pin<Box<dyn Future<Output = Result<Won, Cancelled>> + Send + 'p>>;

/// What a winner leaves for the race's record.
struct Won {
    payload: Result<Box<str>, EncodeError>,
    takes: Option<PutBack>,
    awaited: Option<RunId>,
    /// The receive, by its number among those of the event, whose record holds the message: it was dropped while that
    /// was on its way.
    receive: Option<u32>,
}

/// How a member is called in the record.
#[doc(hidden)]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Label {
    name: Box<str>,
    #[serde(default, skip_serializing_if = "str::is_empty")]
    key: Box<str>,
}

impl Label {
    fn new(name: &str, key: &str) -> Self {
        Self { name: name.into(), key: key.into() }
    }
}

#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
struct Pending {
    deadlines: Vec<(Label, DateTime<Utc>)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    tries: Vec<Tried>,
}

/// The attempts of a step that have failed, and when the next one is due.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
struct Tried {
    step: Label,
    failed: u32,
    next_at: DateTime<Utc>,
}

/// A member that takes part.
pub(super) struct Contender {
    pub(super) race: Operation,
    label: Label,
    /// What is recorded of the race, or on its way.
    pending: Arc<Mutex<Pending>>,
}

impl Contender {
    /// The deadline that is recorded for it.
    fn due(&self) -> Option<DateTime<Utc>> {
        let pending = lock(&self.pending);
        pending.deadlines.iter().find(|(of, _)| *of == self.label).map(|(_, due)| *due)
    }

    /// How many of its attempts have failed, and when the next one is due.
    pub(super) fn tried(&self) -> Option<(u32, DateTime<Utc>)> {
        let pending = lock(&self.pending);
        let tried = pending.tries.iter().find(|tried| tried.step == self.label);
        tried.map(|tried| (tried.failed, tried.next_at))
    }

    /// Records that one more has.
    pub(super) async fn failed(&self, failed: u32, next_at: DateTime<Utc>) -> Result<(), Cancelled> {
        let pending = {
            let mut pending = lock(&self.pending);
            pending.tries.retain(|tried| tried.step != self.label);
            pending.tries.push(Tried { step: self.label.clone(), failed, next_at });
            pending.clone()
        };
        self.race.record_value(RecordState::Pending, &pending).await
    }
}

#[derive(Serialize, Deserialize)]
struct Finished {
    winner: Label,
    result: Box<RawValue>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    message: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    receive: Option<u32>,
}

impl<'p, T: Send + 'p> Race<'p, T> {
    #[track_caller]
    pub(super) fn new(process: &'p Process, name: Name) -> Self {
        let operation = Operation::new(&process.run, process.part(), &name, OpKind::Race, Location::caller());
        Self { operation, members: Vec::new() }
    }

    /// Adds an operation, and what its result becomes if it wins. Each member needs another name.
    pub fn on<M: RaceMember<'p>>(mut self, member: M, then: impl FnOnce(M::Output) -> T + Send + 'p) -> Self {
        let (label, due, ready, contend) = member.join();
        let finish = Box::new(|payload: &str| M::decode(payload).map(then));
        self.members.push(Member { label, due, ready, contend, finish });
        self
    }
}

impl<'p, T: Send + 'p> IntoFuture for Race<'p, T> {
    type Output = Result<T, Cancelled>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send + 'p>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(run(self.operation, self.members))
    }
}

async fn run<'p, T: Send + 'p>(mut operation: Operation, members: Vec<Member<'p, T>>) -> Result<T, Cancelled> {
    if let Some(record) = operation.recorded()
        && let Ok(Finished { winner, receive: Some(receive), .. }) = payload::decode(&record.payload)
    {
        // Before it waits for its turn: another receive of the event is the next one.
        receive::complete(&operation, &winner.name, receive);
    }
    let pending = match operation.begin().await? {
        Begun::Recorded(record) => {
            let finished: Finished = match payload::decode(&record.payload) {
                Ok(finished) => finished,
                Err(why) => return operation.undecodable(&why).await,
            };
            let Some(member) = members.into_iter().find(|member| member.label == finished.winner) else {
                let why = format!("its winner {:?} is not among the members now", finished.winner);
                return operation.undecodable(&why).await;
            };
            return match (member.finish)(finished.result.get()) {
                Ok(output) => {
                    operation.done();
                    Ok(output)
                }
                Err(why) => operation.undecodable(&why).await,
            };
        }
        Begun::Open(pending) => pending,
    };
    if let Some(label) = twice(&members) {
        return operation.stuck(format!("the race {} has two members {label:?}; rename one", operation.key)).await;
    }
    let known: Pending = match pending {
        Some(record) => match payload::decode(&record.payload) {
            Ok(pending) => pending,
            Err(why) => return operation.undecodable(&why).await,
        },
        None => Pending::default(),
    };
    let now = operation.run.core.clock.now();
    let mut pending = known.clone();
    for member in &members {
        if let Some(due) = member.due
            && !pending.deadlines.iter().any(|(label, _)| *label == member.label)
        {
            pending.deadlines.push((member.label.clone(), due.from(now)));
        }
    }
    if pending != known {
        operation.record_value(RecordState::Pending, &pending).await?;
    }
    let (winner, won, finish) = contest(&operation, members, pending).await?;
    let Won { payload, takes: mut back, awaited, receive } = won;
    if let Some(receive) = receive {
        // Before anything is waited for: another receive of the event is the next one.
        receive::complete(&operation, &winner.name, receive);
    }
    let payload = match payload {
        Ok(payload) => payload,
        Err(error) => return operation.unencodable(&error).await,
    };
    let takes = back.as_ref().and_then(PutBack::number);
    let finished = RawValue::from_string(payload.clone().into()).map_err(|e| e.to_string()).and_then(|result| {
        payload::encode_record(&Finished { winner: winner.clone(), result, message: takes, receive })
            .map_err(|e| e.to_string())
    });
    let finished = match finished {
        Ok(finished) => finished,
        Err(why) => return operation.stuck(format!("the race {}: {why}", operation.key)).await,
    };
    operation.record(Write { takes, awaited, ..Write::done(finished) }).await?;
    if let Some(back) = &mut back {
        back.keep();
    }
    match finish(&payload) {
        Ok(output) => {
            operation.done();
            Ok(output)
        }
        Err(why) => operation.undecodable(&why).await,
    }
}

fn twice<'m, T>(members: &'m [Member<'_, T>]) -> Option<&'m Label> {
    let repeated = |(at, member): (usize, &'m Member<'_, T>)| {
        members[..at].iter().any(|other| other.label == member.label).then_some(&member.label)
    };
    members.iter().enumerate().find_map(repeated)
}

type Finish<'p, T> = Box<dyn FnOnce(&str) -> Result<T, String> + Send + 'p>;

/// Polls all members until one has won; the others are dropped before this returns.
async fn contest<'p, T: Send + 'p>(
    operation: &Operation,
    members: Vec<Member<'p, T>>,
    pending: Pending,
) -> Result<(Label, Won, Finish<'p, T>), Cancelled> {
    let pending = Arc::new(Mutex::new(pending));
    let mut contests: Vec<Contestant<'p, T>> = members
        .into_iter()
        .map(|Member { label, contend, finish, ready, .. }| {
            let (race, pending) = (operation.on_behalf(), pending.clone());
            let contender = Contender { race, label: label.clone(), pending };
            let due = contender.due();
            Contestant { label, ready, due, contest: contend(contender), finish }
        })
        .collect();
    let run = operation.run.clone();
    poll_fn(move |cx| {
        for (since, at) in in_turn(&run, &contests) {
            if let Poll::Ready(won) = contests[at].contest.as_mut().poll(cx) {
                let Contestant { label, finish, .. } = contests.swap_remove(at);
                contests.clear();
                return Poll::Ready(won.map(|won| (label, won, finish)));
            }
            if since.is_some() {
                // It is about to win.
                return Poll::Pending;
            }
        }
        Poll::Pending
    })
    .await
}

struct Contestant<'p, T> {
    label: Label,
    ready: Ready,
    due: Option<DateTime<Utc>>,
    contest: Contest<'p>,
    finish: Finish<'p, T>,
}

/// Those that are ready since earlier first, then the others as they were added.
fn in_turn<T>(run: &Run, contests: &[Contestant<'_, T>]) -> Vec<(Option<DateTime<Utc>>, usize)> {
    let now = run.core.clock.now();
    let state = run.state();
    let since = |one: &Contestant<'_, T>| one.ready.since(&state, one.due, now);
    let mut turns: Vec<_> = contests.iter().enumerate().map(|(at, one)| (since(one), at)).collect();
    turns.sort_by_key(|(since, at)| (since.is_none(), *since, *at));
    turns
}

/// An operation that can take part in a race: a step, a timer, a receive without a time-out, the output of another
/// process.
pub trait RaceMember<'p>: sealed::Sealed + Send + Sized {
    /// What the operation returns.
    type Output: Send;
    #[doc(hidden)]
    #[allow(private_interfaces)]
    fn join(self) -> (Label, Option<Due>, Ready, Contend<'p>);
    /// What its recorded result is. `Err` says why it does not decode.
    #[doc(hidden)]
    fn decode(payload: &str) -> Result<Self::Output, String>;
}

mod sealed {
    pub trait Sealed {}
}

fn won(payload: Result<Box<str>, EncodeError>) -> Won {
    Won { payload, takes: None, awaited: None, receive: None }
}

impl sealed::Sealed for Delay<'_> {}
impl<'p> RaceMember<'p> for Delay<'p> {
    type Output = Delayed;

    #[allow(private_interfaces)]
    fn join(self) -> (Label, Option<Due>, Ready, Contend<'p>) {
        let key = self.operation.key.clone();
        let label = Label::new(&key.name, &key.key);
        let contend: Contend<'p> = Box::new(move |contender| {
            Box::pin(async move {
                let (due, race) = (contender.due().unwrap_or(DateTime::<Utc>::MAX_UTC), contender.race);
                let woke = race.wait(WaitFor::Timer(key), Some(due), |_, now| (now >= due).then_some(now)).await?;
                Ok(won(payload::encode_record(&Delayed { due, woke: woke.trunc_subsecs(3).max(due) })))
            })
        });
        (label, Some(self.due), Ready::Due, contend)
    }

    fn decode(payload: &str) -> Result<Delayed, String> {
        payload::decode(payload)
    }
}

impl<T> sealed::Sealed for Receive<'_, T, T> {}
impl<'p, T: DeserializeOwned + Send + 'p> RaceMember<'p> for Receive<'p, T, T> {
    type Output = T;

    #[allow(private_interfaces)]
    fn join(self) -> (Label, Option<Due>, Ready, Contend<'p>) {
        let (name, at) = (self.name, self.at);
        let contend: Contend<'p> = Box::new(move |Contender { race, .. }| {
            Box::pin(async move {
                let Some(place) = Place::take(&race.run, name, at) else { return std::future::pending().await };
                if let Some(message) = place.left_over(&race).await? {
                    return Ok(Won { receive: Some(place.k), ..won(Ok(message)) });
                }
                let taken = |state: &mut State, _| {
                    let number = receive::lowest(state, name)?.number;
                    receive::take(state, number)
                };
                let event = race.wait(WaitFor::Event(name.into()), None, taken).await?;
                let payload = event.payload.clone();
                Ok(Won { takes: Some(PutBack::new(&race.run, &race.key, event)), ..won(Ok(payload)) })
            })
        });
        (Label::new(name, ""), None, Ready::Message(name), contend)
    }

    fn decode(payload: &str) -> Result<T, String> {
        payload::decode(payload)
    }
}

impl<O, E> sealed::Sealed for AwaitOutput<'_, O, E> {}
impl<'p, O, E> RaceMember<'p> for AwaitOutput<'p, O, E>
where
    O: DeserializeOwned + Send + 'p,
    E: DeserializeOwned + Send + 'p,
{
    type Output = Result<O, OutputError<E>>;

    #[allow(private_interfaces)]
    fn join(self) -> (Label, Option<Due>, Ready, Contend<'p>) {
        let label = Label::new(self.kind, &self.key());
        let ready = Ready::End(self.id.as_str().into(), self.target);
        let contend: Contend<'p> = Box::new(move |Contender { race, .. }| {
            Box::pin(async move {
                let (end, awaited) = self.ended(&race).await?;
                let id = self.id.into_boxed_str();
                Ok(Won { awaited, ..won(payload::encode_record(&EndOf { id, end })) })
            })
        });
        (label, None, ready, contend)
    }

    fn decode(payload: &str) -> Result<Self::Output, String> {
        let EndOf { id, end } = payload::decode(payload)?;
        end.decode(&id)
    }
}

#[derive(Serialize, Deserialize)]
struct EndOf {
    id: Box<str>,
    end: End,
}

impl<F: Attempts<M>, M, R> sealed::Sealed for Step<'_, F, M, R> {}
impl<'p, F, M, R> RaceMember<'p> for Step<'p, F, M, R>
where
    F: Attempts<M> + 'p,
    F::Ok: Serialize + DeserializeOwned,
    R: Recording<F::Err> + 'p,
    M: 'p,
{
    type Output = Result<F::Ok, StepError<R::Error>>;

    #[allow(private_interfaces)]
    fn join(self) -> (Label, Option<Due>, Ready, Contend<'p>) {
        let key = self.operation.key.clone();
        let label = Label::new(&key.name, &key.key);
        let contend: Contend<'p> = Box::new(move |contender| {
            Box::pin(async move {
                let returned = match self.contend(&contender).await? {
                    Ok(value) => payload::encode_raw(&value).map(Returned::Ok),
                    Err(error) => payload::encode_raw(&error).map(Returned::Err),
                };
                Ok(won(returned.and_then(|returned| payload::encode_record(&returned))))
            })
        });
        (label, None, Ready::Unknown, contend)
    }

    fn decode(payload: &str) -> Result<Self::Output, String> {
        match payload::decode(payload)? {
            Returned::Ok(value) => payload::decode(value.get()).map(Ok),
            Returned::Err(error) => payload::decode(error.get()).map(Err),
        }
    }
}

/// What a step in a race returned, as it stands in the race's record: as text, which may be as deep as any.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Returned {
    Ok(Box<RawValue>),
    Err(Box<RawValue>),
}
