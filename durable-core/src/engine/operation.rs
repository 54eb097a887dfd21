//! What every durable operation is made of: taking its name, waiting without holding a waker, writing its record.

use chrono::{DateTime, Utc};
use std::future::{Future, Pending, pending, poll_fn};
use std::sync::Arc;
use std::task::Poll;
use tokio::sync::oneshot;

use super::held::Places;
use super::names::Usage;
use super::queue::Answer;
use super::replay::Position;
use super::run::{At, Delivery, Part, Run, State, WaitFor};
use crate::error::Cancelled;
use crate::limits;
#[cfg(durable_mutations)]
use crate::mutation::{Rule, is_broken};
use crate::name::Name;
use crate::payload::EncodeError;
use crate::storage::{Effect, Op, OpKind, Outcome, Record, RecordKey, RecordOp, RecordState, RunId};

/// A durable operation of one name: from its first poll until it returns or is dropped.
///
/// Dropped unfinished it gives its name back: the next use is a further attempt of the same operation.
pub(crate) struct Operation {
    pub(crate) run: Arc<Run>,
    pub(crate) key: RecordKey,
    /// It stands behind a point of no return.
    uncancellable: bool,
    op: OpKind,
    at: At,
    busy: bool,
    /// Its place among those that wait in a replay.
    turn: Option<Position>,
}

/// What a look at a name comes to.
enum Taken {
    Begun(Begun),
    /// In a replay it waits for its turn.
    Waits(Position),
    Cancelled,
}

/// Where an operation stands at its start.
pub(crate) enum Begun {
    /// It is recorded: this is what it returns.
    Recorded(Record),
    /// It has to happen. There may be a pending record.
    Open(Option<Record>),
}

impl Operation {
    /// An operation of this name. A name outside the limits makes the process stuck at the first poll.
    pub(crate) fn new(run: &Arc<Run>, part: Part, name: &Name, op: OpKind, at: At) -> Self {
        Self::with_key(run, part, name.name(), name.key(), op, at)
    }

    /// An operation whose key the engine has made.
    pub(crate) fn with_key(run: &Arc<Run>, part: Part, name: &str, key: &str, op: OpKind, at: At) -> Self {
        let Part { scope, uncancellable } = part;
        let key = RecordKey { scope, name: name.into(), key: key.into() };
        Self { run: run.clone(), key, uncancellable, op, at, busy: false, turn: None }
    }

    /// Which part of the process it belongs to.
    pub(crate) fn part(&self) -> Part {
        Part { scope: self.key.scope, uncancellable: self.uncancellable }
    }

    /// What it returns, if that is recorded.
    pub(crate) fn recorded(&self) -> Option<Record> {
        let state = self.run.state();
        state.names.get(&self.key).filter(|name| name.is_final()).and_then(|name| name.record.clone())
    }

    /// Where it stands in the code.
    pub(crate) fn at(&self) -> At {
        self.at
    }

    /// A stand-in for a member of a race: it waits and complains in the race's name, and takes no name itself.
    pub(crate) fn on_behalf(&self) -> Self {
        let (run, key, uncancellable) = (self.run.clone(), self.key.clone(), self.uncancellable);
        Self { run, key, uncancellable, op: self.op, at: self.at, busy: false, turn: None }
    }

    /// Goes on under an old name, if only that has a record.
    pub(crate) fn rename_from(&mut self, was: RecordKey) {
        let mut state = self.run.state();
        let recorded = |key: &RecordKey| state.names.get(key).is_some_and(|name| name.record.is_some());
        let renamed = recorded(&was) && !recorded(&self.key);
        if let Some(name) = state.names.get_mut(&was) {
            name.asked = true;
        }
        drop(state);
        if renamed {
            self.key = was;
        }
    }

    /// Whether it may go on at all: polled by its own run, its name within the limits.
    fn admitted(&self) -> bool {
        if !self.run.admits(format_args!("the {} {}", self.op, self.key), self.at) {
            return false;
        }
        if let Err(error) = limits::check_name(&self.key.name, &self.key.key) {
            self.run.fault(format_args!("the {} at {}: {error}", self.op, self.at));
            return false;
        }
        true
    }

    /// Takes the name. Never returns where the use of it is a mistake in the code: the process is stuck then.
    pub(crate) async fn begin(&mut self) -> Result<Begun, Cancelled> {
        if !self.admitted() {
            return pending().await;
        }
        let looked = {
            let mut state = self.run.state();
            if state.is_ending() { None } else { self.take_name(&mut state) }
        };
        let begun = match looked {
            Some(begun) => begun,
            // Rare, so on the heap: it is no part of what every operation takes.
            None => {
                let look = |state: &mut State, _| self.take_name(state);
                Box::pin(wait_until(&self.run, WaitFor::Engine, None, look)).await
            }
        };
        match begun {
            Ok(Taken::Begun(begun)) => {
                self.busy = self.op != OpKind::Value || matches!(begun, Begun::Open(_));
                Ok(begun)
            }
            Ok(Taken::Waits(turn)) => {
                self.busy = true;
                self.turn = Some(turn);
                Box::pin(self.await_turn()).await
            }
            Ok(Taken::Cancelled) => Err(Cancelled),
            Err(fault) => self.stuck(fault).await,
        }
    }

    /// Waits in a replay until it is this operation's turn to go on.
    async fn await_turn(&mut self) -> Result<Begun, Cancelled> {
        let turn = &self.turn;
        let begun = wait_until(&self.run, WaitFor::Engine, None, |state: &mut State, _| {
            let turn = turn.as_ref()?;
            let record = state.names.of(&self.key).record.clone();
            if let Some(record) = record.filter(|_| matches!(turn, Position::Recorded(..))) {
                return state.is_turn(turn).then_some(Ok(Begun::Recorded(record)));
            }
            if state.unwinds(self.part()) {
                return Some(Err(Cancelled));
            }
            if !state.is_turn(turn) {
                return None;
            }
            match state.cancelled(self.part())? {
                true => Some(Err(Cancelled)),
                false => Some(Ok(Begun::Open(state.names.of(&self.key).record.clone()))),
            }
        })
        .await;
        let mut state = self.run.state();
        if let Some(turn) = self.turn.take() {
            state.leave_queue(&turn);
        }
        if begun.is_err() {
            self.busy = false;
            state.names.of(&self.key).usage = Usage::Free;
        }
        begun
    }

    /// One look at the name. None: not yet. `Err`: a mistake in the code.
    fn take_name(&self, state: &mut State) -> Option<Result<Taken, String>> {
        if state.stopping {
            return None;
        }
        let (key, op, at) = (&self.key, self.op, self.at);
        let is_value = op == OpKind::Value;
        let kept = state.kept_value(key).filter(|_| is_value).map(Box::<str>::from);
        let name = state.names.of(key);
        name.asked = true;
        match name.usage {
            // Two at once: a value's second user waits for the first, anything else is a mistake.
            Usage::Busy(_) if is_value => return None,
            Usage::Busy(first) => return Some(Err(fault_twice(key, op, first, at))),
            Usage::Done(first) if !is_value => return Some(Err(fault_twice(key, op, first, at))),
            _ => {}
        }
        // An operation that was dropped while its record was on its way.
        if name.is_recording() {
            return None;
        }
        if let Some(record) = name.record.as_ref().filter(|record| record.op != op) {
            return Some(Err(format!(
                "{key} is used at {at} by a {op}, but its record was written by a {}; rename one of them",
                record.op
            )));
        }
        if let Some(payload) = kept {
            name.usage = Usage::Done(at);
            let (state, attempts, seq, claim) = (RecordState::Done, 0, 0, self.run.claim);
            return Some(Ok(Taken::Begun(Begun::Recorded(Record { op, state, payload, attempts, seq, claim }))));
        }
        let record = name.record.clone();
        let recorded = record.as_ref().filter(|record| record.state != RecordState::Pending).map(|record| record.seq);
        let waits = !is_value && (recorded.is_some() || !state.unwinds(self.part()));
        if let Some(turn) = waits.then(|| state.queue_up(key, op, at, recorded)).flatten() {
            state.names.of(key).usage = Usage::Busy(at);
            return Some(Ok(Taken::Waits(turn)));
        }
        // A value is no effect, and nothing that a process waits for: it is not cancelled.
        let cancelled = if is_value || recorded.is_some() { false } else { state.cancelled(self.part())? };
        if cancelled {
            return Some(Ok(Taken::Cancelled));
        }
        let usage = if is_value && recorded.is_some() { Usage::Done(at) } else { Usage::Busy(at) };
        state.names.of(key).usage = usage;
        Some(Ok(Taken::Begun(match (record, recorded) {
            (Some(record), Some(_)) => Begun::Recorded(record),
            (pending, _) => Begun::Open(pending),
        })))
    }

    /// Makes the process stuck; what it returns never does.
    pub(crate) fn stuck<T>(&self, reason: String) -> Pending<T> {
        self.run.fault(reason);
        pending()
    }

    /// A record that does not decode: another instance may have code that it fits, else the process is stuck.
    pub(crate) fn undecodable<T>(&self, why: &str) -> Pending<T> {
        self.run.unreadable(format!("the record of {} {} does not decode: {why}", self.op, self.key));
        pending()
    }

    /// A value that JSON cannot bring back makes the process stuck.
    pub(crate) fn unencodable<T>(&self, why: &EncodeError) -> Pending<T> {
        self.stuck(format!("the {} {} at {} cannot be recorded: {why}", self.op, self.key, self.at))
    }

    /// Waits until `check` has an answer, without holding a waker. Fails once the process is cancelled.
    pub(crate) fn wait<T>(
        &self,
        what: WaitFor,
        due: Option<DateTime<Utc>>,
        mut check: impl FnMut(&mut State, DateTime<Utc>) -> Option<T>,
    ) -> impl Future<Output = Result<T, Cancelled>> {
        let part = self.part();
        wait_until(&self.run, what, due, move |state, now| match state.cancelled(part) {
            Some(true) => Some(Err(Cancelled)),
            None => None,
            // An answer that came before the cancellation was recorded still counts.
            Some(false) => check(state, now).map(Ok),
        })
    }

    /// Writes the operation's record and returns once it is committed. Fails if the cancellation was recorded first.
    pub(crate) fn record(&self, write: Write) -> impl Future<Output = Result<Outcome, Cancelled>> {
        #[cfg(durable_mutations)]
        let plain = write.effect.is_none();
        // Before the first poll, so that the future of an operation that waits has no room for what is written.
        let sent = self.send(write);
        async move {
            match sent {
                #[cfg(durable_mutations)]
                Sent::Queued(..) if plain && is_broken(Rule::RecordAwaited) => Ok(Outcome::Recorded),
                Sent::Queued(answer, delivery) => {
                    let outcome = self.run.outcome(answer).await;
                    if let Some(delivery) = delivery {
                        delivery.taken().await;
                    }
                    Ok(outcome)
                }
                Sent::Cancelled => Box::pin(self.wait(WaitFor::Engine, None, |_, _| None)).await,
                Sent::Stuck => pending().await,
            }
        }
    }

    fn send(&self, write: Write) -> Sent<'_> {
        let takes_cancel = self.op != OpKind::Value && write.state != RecordState::Pending;
        if takes_cancel && self.run.state().cancelled(self.part()) != Some(false) {
            return Sent::Cancelled;
        }
        // What the engine wraps (a message, an output) was within the limit when it was given.
        let own = matches!(self.op, OpKind::Step | OpKind::Value | OpKind::Transaction)
            && write.state != RecordState::Pending;
        if own && !self.fits(&write.payload) {
            return Sent::Stuck;
        }
        let (op, places) = self.record_op(write);
        self.run.state().names.of(&self.key).recording += 1;
        // A replay returns a value whenever it is asked for.
        let delivery = (self.op != OpKind::Value).then(|| self.run.sending(op.seq));
        Sent::Queued(self.run.submit(Op::Record(op), places), delivery)
    }

    /// Its record, and the places that it takes.
    pub(crate) fn record_op(&self, write: Write) -> (RecordOp, Option<Places>) {
        let Write { state, payload, attempts, takes, effect, awaited, places } = write;
        let (replaces, seq) = {
            let mut state = self.run.state();
            (state.names.of(&self.key).record.is_some(), state.next_seq())
        };
        let op = RecordOp {
            run: self.run.run,
            claim: self.run.claim,
            key: self.key.clone(),
            op: self.op,
            state,
            replaces,
            payload,
            shielded: self.part().is_shielded(),
            attempts,
            seq,
            takes,
            effect,
            awaited,
        };
        (op, places)
    }

    /// Whether a result is within the limit; else the process is stuck.
    fn fits(&self, payload: &str) -> bool {
        let (given, allowed) = (payload.len(), self.run.core.settings.max_payload);
        if given > allowed {
            let error = limits::LimitError::Payload { what: "result", given, allowed };
            self.run.fault(format_args!("the {} {}: {error}", self.op, self.key));
        }
        given <= allowed
    }

    /// Keeps a value in memory during a replay. False if it must be recorded now.
    pub(crate) fn keep(&self, payload: &str) -> bool {
        self.run.state().is_replaying() && self.fits(payload) && self.run.state().keep_value(&self.key, payload)
    }

    /// The operation returns what is recorded.
    pub(crate) fn done(mut self) {
        self.busy = false;
        self.run.state().finish_record(&self.key, self.at);
        self.run.name_changed();
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        if !self.busy {
            return;
        }
        let mut state = self.run.state();
        if let Some(turn) = self.turn.take() {
            state.leave_queue(&turn);
        }
        let ending = state.is_ending() || state.stopping;
        if let Some(name) = state.names.get_mut(&self.key)
            && matches!(name.usage, Usage::Busy(_))
        {
            name.usage = Usage::Free;
            name.dropped = true;
        }
        drop(state);
        self.run.name_changed();
        if !ending && self.op != OpKind::Value && super::wake::Context::current().run == self.run.serial {
            tracing::debug!(id = %self.run.id, run = %self.run.run, "the {} {} at {} was dropped unfinished", self.op, self.key, self.at);
        }
    }
}

/// What became of a record that was to be written.
enum Sent<'r> {
    Queued(oneshot::Receiver<Answer>, Option<Delivery<'r>>),
    Cancelled,
    Stuck,
}

/// What an operation writes.
pub(crate) struct Write {
    pub(crate) state: RecordState,
    pub(crate) payload: Box<str>,
    pub(crate) attempts: i32,
    pub(crate) takes: Option<i64>,
    pub(crate) effect: Option<Effect>,
    pub(crate) awaited: Option<RunId>,
    pub(crate) places: Option<Places>,
}

impl Write {
    pub(crate) fn done(payload: impl Into<Box<str>>) -> Self {
        Self {
            state: RecordState::Done,
            payload: payload.into(),
            attempts: 0,
            takes: None,
            effect: None,
            awaited: None,
            places: None,
        }
    }
    pub(crate) fn failed(payload: impl Into<Box<str>>) -> Self {
        Self { state: RecordState::Failed, ..Self::done(payload) }
    }
}

fn fault_twice(key: &RecordKey, op: OpKind, first: At, second: At) -> String {
    if first == second {
        return format!(
            "{key} is used twice by the {op} at {first} in one run; in a loop give it a key: `({:?}, key)`",
            key.name
        );
    }
    format!("{key} is used twice in one run: at {first} and by the {op} at {second}; rename one of them")
}

/// A wait that has left a note in the run, taken back when dropped.
struct Noted<'r> {
    run: &'r Run,
    id: Option<u32>,
}

impl Drop for Noted<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            self.run.state().remove_wait(id);
        }
    }
}

/// Waits until `check`, which sees the run's state and the database's time, has an answer. It clones no waker of the
/// run's own: whoever changes the state notifies the run.
pub(crate) fn wait_until<T>(
    run: &Run,
    what: WaitFor,
    due: Option<DateTime<Utc>>,
    mut check: impl FnMut(&mut State, DateTime<Utc>) -> Option<T>,
) -> impl Future<Output = T> {
    let mut noted = Noted { run, id: None };
    let mut what = Some(what);
    poll_fn(move |cx| {
        // The whole of it moves in here, and is dropped with the future.
        let noted = &mut noted;
        if !run.polled_here() {
            return Poll::Pending;
        }
        let now = run.core.clock.now();
        let mut state = run.state();
        if !state.is_ending()
            && let Some(answer) = check(&mut state, now)
        {
            return Poll::Ready(answer);
        }
        state.note_foreign(cx, &run.root);
        match (what.take(), noted.id) {
            (Some(what), _) => noted.id = Some(state.add_wait(what, due)),
            (None, Some(id)) => state.still_waits(id),
            (None, None) => {}
        }
        Poll::Pending
    })
}
