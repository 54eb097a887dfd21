use chrono::{DateTime, Utc};
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::panic::Location;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context as TaskContext, Poll, Waker};
use tokio::sync::oneshot;

use super::held::Places;
use super::names::{Names, Usage};
use super::queue::{Answer, From, Job};
use super::replay::Replay;
use super::room::Taken;
use super::sent::Sent;
use super::suspects::Suspect;
use super::wake::{Context, Inside, RootWake};
use super::{Core, lock};
#[cfg(durable_mutations)]
use crate::mutation::{Rule, is_broken};
use crate::storage::{
    EventRow, Fate, InstanceId, Op, OpKind, Outcome, ProcessRow, Record, RecordKey, RecordState, RunId, RunState,
    Scope, Target,
};

/// One execution of a process in this program: what the driver, the process's operations and the engine share.
///
/// It is behind a lock because the process's code, the writer and the reader of signals all touch it; the lock is
/// never held across user code or an await.
pub(crate) struct Run {
    /// Tells this execution from every other in this program.
    pub(crate) serial: u64,
    pub(crate) core: Arc<Core>,
    pub(crate) instance: InstanceId,
    pub(crate) id: Box<str>,
    pub(crate) run: RunId,
    /// Shared by all of its kind.
    pub(crate) kind: Arc<str>,
    pub(crate) claim: i64,
    pub(crate) wake: Arc<RootWake>,
    /// The waker that the process's future is polled with.
    pub(crate) root: Waker,
    state: Mutex<State>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) names: Names,
    /// None once the execution is live.
    pub(crate) replay: Option<Box<Replay>>,
    pub(super) sent: Sent,
    /// The number of the record that was sent last.
    seq: i32,
    /// The place of the cancellation among the records, if an earlier execution has recorded it.
    pub(super) cancelled_seq: Option<i32>,
    pub(crate) mail: Mail,
    pub(crate) cancel: Cancel,
    /// What the process's code has had the chance to see: the signals and the cancellation as they were when its future
    /// was last polled.
    pub(crate) polled: (i64, Cancel),
    /// It has been quiet for the quiet time since then.
    pub(crate) rested: bool,
    /// Why the future must be dropped.
    pub(crate) end: Option<End>,
    /// The row is another execution's, or knows less than this one, and may be this instance's all the same: it is looked for
    /// among what it owns once this one has left memory.
    pub(crate) read_again: bool,
    /// None of its code runs any more.
    pub(crate) code_over: bool,
    /// Its end is in the database.
    pub(crate) ended: bool,
    /// The host is stopping: no new operation starts.
    pub(crate) stopping: bool,
    /// The instance has no room: park without waiting for the quiet time.
    pub(crate) pressed: bool,
    /// Closures of steps that are under way.
    pub(crate) steps: u32,
    /// Operations whose outcome is awaited.
    pub(crate) commits: u32,
    pub(crate) waits: Vec<Wait>,
    next_wait: u32,
    /// It may be what programs have died of.
    _suspect: Option<Suspect>,
    /// Wakers of operations that are not polled by the process's future itself.
    foreign: Vec<Waker>,
    /// They have been asked, since the last time that something happened, whether they are still there.
    foreign_asked: bool,
}

/// What an execution keeps from others while it lasts.
#[derive(Default)]
pub(crate) struct Kept {
    /// Room for its records, until it is live.
    pub(crate) room: Option<Taken>,
    pub(crate) suspect: Option<Suspect>,
}

/// Which part of a process an operation belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) scope: Scope,
    /// It stands behind a point of no return.
    pub(crate) uncancellable: bool,
}

impl Part {
    /// Whether a cancellation does not reach it.
    pub(crate) fn is_shielded(self) -> bool {
        self.uncancellable || self.scope == Scope::Compensation
    }
}

/// A place in the user's code.
pub(crate) type At = &'static Location<'static>;

#[derive(Default)]
pub(crate) struct Mail {
    /// All signals up to this number have been read.
    pub(crate) seen: i64,
    /// Messages not taken.
    pub(crate) events: BTreeMap<i64, EventRow>,
    /// Awaited processes that had not ended when the execution began: they need not be awaited once more.
    pub(crate) awaits: Vec<(Box<str>, RunId)>,
    /// Awaited processes that have ended or are gone.
    pub(crate) targets: BTreeMap<RunId, Target>,
    /// For each event: how many receives have completed, and whether one is under way.
    pub(crate) receives: BTreeMap<Box<str>, Receives>,
}

#[derive(Clone, Copy, Default)]
pub(crate) struct Receives {
    pub(crate) completed: u32,
    pub(crate) busy: Option<At>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Cancel {
    #[default]
    No,
    /// Asked for; not recorded by the owner yet.
    Requested,
    /// The record is on its way: no success of an ordinary operation may follow it.
    Recording,
    /// Operations fail with `Cancelled`.
    Recorded,
}

/// Why a run leaves memory before its function has returned.
#[derive(Debug)]
pub(crate) enum End {
    /// A fault in the code: the process becomes stuck.
    Stuck(String),
    /// Give it back to whoever has room.
    Release,
    /// This instance's code does not fit what is stored; why.
    Unreadable(String),
    /// It is not ours any more: drop it and write nothing.
    Gone,
}

/// Something that a process waits for without holding a waker.
pub(crate) struct Wait {
    id: u32,
    pub(crate) due: Option<DateTime<Utc>>,
    /// It was woken when it came due, and has not been polled since.
    told: bool,
    pub(crate) what: WaitFor,
}

#[derive(Clone, Debug)]
pub(crate) enum WaitFor {
    Event(Box<str>),
    Timer(RecordKey),
    Retry(RecordKey),
    Output(Box<str>),
    /// An operation of this execution that will end by itself.
    Engine,
}

impl fmt::Display for WaitFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Event(name) => write!(f, "event {name:?}"),
            Self::Timer(key) => write!(f, "timer {key}"),
            Self::Retry(key) => write!(f, "retry of step {key}"),
            Self::Output(id) => write!(f, "output of process {id:?}"),
            Self::Engine => f.write_str("the engine"),
        }
    }
}

static SERIAL: AtomicU64 = AtomicU64::new(1);

impl Run {
    pub(crate) fn new(core: Arc<Core>, instance: InstanceId, claim: i64, loaded: RunState, kept: Kept) -> Self {
        let RunState { process, records, events, targets } = loaded;
        let ProcessRow { run, id, kind, signals, cancel_requested_at, cancelled_at, cancelled_seq, .. } = process;
        let seq = records.iter().map(|(_, record)| record.seq).chain(cancelled_seq).max().unwrap_or(0);
        let names = Names::recorded(records);
        let (awaits, ended): (Vec<_>, Vec<_>) = targets.into_iter().partition(|target| target.fate == Fate::Open);
        let state = State {
            replay: Replay::of(&names, kept.room),
            _suspect: kept.suspect,
            names,
            seq,
            cancelled_seq,
            mail: Mail {
                seen: signals,
                events: events.into_iter().map(|event| (event.number, event)).collect(),
                awaits: awaits.into_iter().map(|target| (target.id, target.run)).collect(),
                targets: ended.into_iter().map(|target| (target.run, target)).collect(),
                receives: BTreeMap::new(),
            },
            cancel: match (cancel_requested_at, cancelled_at) {
                (_, Some(_)) => Cancel::Recorded,
                (Some(_), None) => Cancel::Requested,
                (None, None) => Cancel::No,
            },
            ..State::default()
        };
        let kind = core.kinds.get_key_value(&*kind).map_or_else(|| kind.into(), |(known, _)| known.clone());
        let wake = Arc::new(RootWake::default());
        let root = Waker::from(wake.clone());
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        Self { serial, core, instance, id, run, kind, claim, wake, root, state: Mutex::new(state) }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Makes the process's future look again, and everything in it that is polled by another waker.
    pub(crate) fn notify(&self) {
        self.state().foreign_asked = false;
        self.wake_all();
    }

    fn wake_all(&self) {
        let foreign = std::mem::take(&mut self.state().foreign);
        for waker in foreign {
            waker.wake();
        }
        self.root.wake_by_ref();
    }

    /// Whether there are wakers that may belong to operations that are gone, which has not been asked yet.
    pub(crate) fn has_foreign_to_ask(&self) -> bool {
        let state = self.state();
        !state.foreign_asked && !state.foreign.is_empty() && state.steps == 0 && state.commits == 0
    }

    /// Lets go of all of them; those that live leave theirs again when they are polled.
    pub(crate) fn ask_foreign(&self) {
        self.state().foreign_asked = true;
        self.wake_all();
    }

    /// Whether only the engine can wake the process's future: `wake` and `root` hold the only references.
    pub(crate) fn only_we_can_wake(&self) -> bool {
        Arc::strong_count(&self.wake) == 2 && self.state().foreign.is_empty()
    }

    /// Ends this execution, unless it is ending already.
    pub(crate) fn end(&self, end: End) {
        {
            let mut state = self.state();
            // That it is not ours any more goes before anything that would be written.
            if state.end.is_none() || matches!(end, End::Gone) {
                state.end = Some(end);
            }
        }
        self.wake.nudge();
    }

    /// Makes the process stuck.
    pub(crate) fn fault(&self, reason: impl fmt::Display) {
        self.end(End::Stuck(reason.to_string()));
    }

    /// Ends this execution because this instance's code does not fit what is stored; another instance's code may. While a
    /// step is under way the process is stuck instead: each further execution would begin that step again.
    pub(crate) fn unreadable(&self, reason: String) {
        let effects = self.state().steps > 0;
        self.end(if effects { End::Stuck(reason) } else { End::Unreadable(reason) });
    }

    /// Whether code of this run's own future is what polls; what is not is refused.
    pub(crate) fn admits(&self, what: fmt::Arguments<'_>, at: At) -> bool {
        let here = Context::current();
        if here.run != self.serial {
            tracing::error!(id = %self.id, run = %self.run, "{what} at {at} is polled outside its process's run; it never returns");
            self.fault(format_args!(
                "{what} at {at} was polled outside its process's run (in another task, or after the run had ended); \
                 await durable operations in the process's own function"
            ));
            return false;
        }
        if here.inside != Inside::Function {
            self.fault(format_args!(
                "{what} at {at} is inside the closure of a step or of a transaction; use durable operations beside them, not within"
            ));
            return false;
        }
        true
    }

    /// Waits for the outcome of a queued operation. Never returns if this execution ends first, nor if the database
    /// refuses the operation for good: the process is stuck then.
    pub(crate) async fn outcome(&self, mut answer: oneshot::Receiver<Answer>) -> Outcome {
        let counted = Counted::new(self);
        let answer = std::future::poll_fn(|cx| match self.polled_here() {
            true => Pin::new(&mut answer).poll(cx),
            false => Poll::Pending,
        })
        .await;
        drop(counted);
        match answer {
            Ok(Ok(Outcome::Lost)) => self.end(End::Gone),
            Ok(Ok(Outcome::Unreadable(why))) => self.fault(format_args!("another process cannot be read: {why}")),
            Ok(Ok(outcome)) => return outcome,
            Ok(Err(refused)) => self.fault(format_args!("the database refuses a record: {refused}")),
            // The epoch is over: the driver knows.
            Err(_) => {}
        }
        std::future::pending().await
    }

    /// Queues an operation.
    pub(crate) fn submit(self: &Arc<Self>, op: Op, places: Option<Places>) -> oneshot::Receiver<Answer> {
        let (reply, answer) = oneshot::channel();
        self.core.queue.push(Job { places, ..Job::new(op, From::Run(self.clone()), Some(reply)) });
        answer
    }

    /// A record was committed.
    pub(crate) fn recorded(&self, key: &RecordKey, record: Record) {
        {
            let mut state = self.state();
            let name = state.names.of(key);
            name.recording = name.recording.saturating_sub(1);
            #[cfg(durable_mutations)]
            let record = match name.record.take() {
                Some(first) if first.op == OpKind::Value && is_broken(Rule::GetsLast) => first,
                _ => record,
            };
            name.record = Some(record);
        }
        self.name_changed();
    }

    /// What became of a record that was sent can be taken.
    pub(crate) fn answered(&self, seq: i32) {
        self.state().sent.answered(seq);
    }

    /// A record that was on its way was not written.
    pub(crate) fn not_recorded(&self, key: &RecordKey) {
        {
            let mut state = self.state();
            let name = state.names.of(key);
            name.recording = name.recording.saturating_sub(1);
        }
        self.name_changed();
    }

    /// Wakes operations that wait for a name: to be recorded, or to be free.
    pub(crate) fn name_changed(&self) {
        let waited_for = self.state().waits.iter().any(|wait| matches!(wait.what, WaitFor::Engine));
        if waited_for {
            self.notify();
        }
    }

    /// Whether code of this run's own future polls; code of another task is refused, wherever it began.
    pub(crate) fn polled_here(&self) -> bool {
        let here = Context::current().run == self.serial;
        if !here {
            self.fault("a durable operation that had begun was polled on in another task; await it where it began");
        }
        here
    }

    /// The database has less than this execution knows: it has lost commits. What it has is read again.
    pub(crate) fn behind(&self) {
        tracing::warn!(id = %self.id, run = %self.run, "the database has lost commits of it; it is read again");
        self.lost();
    }

    /// What this execution knows is not what the database has.
    pub(crate) fn lost(&self) {
        self.state().read_again = true;
        self.end(End::Gone);
    }

    /// A message was committed by this instance. False if the signals must be read: others before it are missing, or it
    /// has a number that was read already. Then it was put in before, or the database has lost commits.
    pub(crate) fn deliver(&self, event: EventRow) -> bool {
        {
            let mut state = self.state();
            let mail = &mut state.mail;
            if event.number != mail.seen + 1 {
                return false;
            }
            mail.seen = event.number;
            mail.events.insert(event.number, event);
        }
        self.notify();
        true
    }

    /// The signals were read. `known`: this execution had seen so many before; none if it began since, so that the row may
    /// have been read as it was before its claim.
    pub(crate) fn merge(&self, read: RunState, known: Option<i64>) {
        if let Some(known) = known {
            match (read.process.owner == Some(self.instance), read.process.claim == self.claim) {
                (true, true) if read.process.signals < known => return self.behind(),
                (true, true) => {}
                (true, false) => return self.lost(),
                // It was terminated, or another instance owns it.
                (false, _) => return self.end(End::Gone),
            }
        }
        {
            let mut state = self.state();
            let seen = state.mail.seen;
            for event in read.events {
                // Older ones are here or taken, though the record that takes them may still be on its way.
                if event.number > seen {
                    state.mail.events.insert(event.number, event);
                }
            }
            state.mail.seen = seen.max(read.process.signals);
            let ended = read.targets.into_iter().filter(|target| target.fate != Fate::Open);
            state.mail.targets.extend(ended.map(|target| (target.run, target)));
            if read.process.cancel_requested_at.is_some() && state.cancel == Cancel::No {
                state.cancel = Cancel::Requested;
            }
        }
        self.notify();
    }

    /// Numbers a record that is about to be sent, whose result the function takes in its turn.
    pub(crate) fn sending(&self, seq: i32) -> Delivery<'_> {
        self.state().sent.push(seq);
        Delivery { run: self, seq }
    }
}

/// A record on its way, until its result is taken, or dropped.
pub(crate) struct Delivery<'r> {
    run: &'r Run,
    seq: i32,
}

impl Delivery<'_> {
    /// Returns once those that were sent before have been taken.
    pub(crate) async fn taken(self) {
        if self.run.state().sent.is_next(self.seq) {
            return;
        }
        // Rare, so on the heap.
        let next = |state: &mut State, _| state.sent.is_next(self.seq).then_some(());
        Box::pin(super::operation::wait_until(self.run, WaitFor::Engine, None, next)).await;
    }
}

impl Drop for Delivery<'_> {
    fn drop(&mut self) {
        let others = self.run.state().sent.remove(self.seq);
        if others {
            self.run.notify();
        }
    }
}

impl State {
    /// The number of a new record.
    pub(crate) fn next_seq(&mut self) -> i32 {
        self.seq = self.seq.saturating_add(1);
        self.seq
    }

    /// Whether operations that stand there fail with `Cancelled`; none while that is being recorded.
    pub(crate) fn cancelled(&self, part: Part) -> Option<bool> {
        match (part.is_shielded(), self.cancel) {
            (true, _) | (_, Cancel::No) => Some(false),
            (_, Cancel::Recorded) => Some(true),
            #[cfg(durable_mutations)]
            _ if is_broken(Rule::CancelStands) => Some(false),
            _ => None,
        }
    }

    /// No operation goes on: the future is about to be dropped.
    pub(crate) fn is_ending(&self) -> bool {
        self.end.is_some()
    }

    pub(crate) fn add_wait(&mut self, what: WaitFor, due: Option<DateTime<Utc>>) -> u32 {
        let id = self.next_wait;
        self.next_wait = self.next_wait.wrapping_add(1);
        if self.waits.is_empty() {
            // Most processes wait for one thing.
            self.waits.reserve_exact(1);
        }
        self.waits.push(Wait { id, due, told: false, what });
        id
    }

    /// When the first wait comes due that has not been woken for it. One that nobody polls any more, behind a `select!`
    /// that goes on in another branch, is woken once.
    pub(crate) fn next_due(&self) -> Option<DateTime<Utc>> {
        self.waits.iter().filter(|wait| !wait.told).filter_map(|wait| wait.due).min()
    }

    /// All that are due by now are about to be woken.
    pub(crate) fn tell_due(&mut self, now: DateTime<Utc>) {
        for wait in &mut self.waits {
            wait.told |= wait.due.is_some_and(|due| due <= now);
        }
    }

    /// It was polled, and goes on waiting: the clock was set back.
    pub(crate) fn still_waits(&mut self, id: u32) {
        if let Some(wait) = self.waits.iter_mut().find(|wait| wait.id == id) {
            wait.told = false;
        }
    }

    pub(crate) fn remove_wait(&mut self, id: u32) {
        if let Some(at) = self.waits.iter().position(|wait| wait.id == id) {
            self.waits.swap_remove(at);
        }
    }

    /// Whoever polls is not the process's future itself: it must be woken as well.
    pub(crate) fn note_foreign(&mut self, cx: &TaskContext<'_>, root: &Waker) {
        if !cx.waker().will_wake(root) && !self.foreign.iter().any(|w| w.will_wake(cx.waker())) {
            self.foreign.push(cx.waker().clone());
        }
    }

    pub(crate) fn finish_record(&mut self, key: &RecordKey, at: At) {
        if let Some(name) = self.names.get_mut(key) {
            name.usage = Usage::Done(at);
            if let Some(record) = &mut name.record
                && record.op != OpKind::Value
                && record.state != RecordState::Pending
            {
                record.payload = "".into();
            }
        }
    }
}

/// Counts an operation whose outcome is awaited.
pub(crate) struct Counted<'r>(&'r Run);

impl<'r> Counted<'r> {
    pub(crate) fn new(run: &'r Run) -> Self {
        run.state().commits += 1;
        Self(run)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.state().commits -= 1;
    }
}
