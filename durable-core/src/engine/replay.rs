//! An execution that resumes is first in *replay*, then *live*.
//!
//! In replay recorded operations return what they recorded, in the order in which that was recorded, so that whatever
//! chooses among them (`select!`, `FuturesUnordered`) chooses as it did before; one that has no record takes its name and
//! waits. Once the function waits for such operations alone it is *quiescent*: everything that was recorded has been asked
//! for, on every path that durable operations lead to. What has not been shows that code and records have diverged: the
//! process becomes stuck, before anything happens. Then a cancellation that was asked for arrives, and the function replays
//! into its compensation, up to the next quiescence. Then what waits begins, in the order in which it came to wait.
//!
//! All of it is behind the lock of the run's state; the driver asks after each poll what comes next.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::time::Instant;

use super::names::{NameState, Names};
use super::room::Taken;
use super::run::{At, Cancel, Part, State};
#[cfg(durable_mutations)]
use crate::mutation::{Rule, is_broken};
use crate::storage::{OpKind, Record, RecordKey, Scope};

/// How long a function that also awaits something that is not durable is given, without progress, before records that it
/// has not asked for count against it.
const MOMENT: Duration = Duration::from_secs(1);

/// An execution that is not live yet.
pub(crate) struct Replay {
    /// What its records take.
    _room: Option<Taken>,
    stage: Stage,
    /// Operations in the order in which they go on, those that were there at the last poll.
    waiting: BTreeSet<Position>,
    /// Those that came in the last poll.
    asked: BTreeSet<Position>,
    /// Those that nobody polled when it was their turn: the function holds their futures and polls others. They go on
    /// whenever they are polled.
    passed_over: BTreeSet<Position>,
    /// What waits to begin.
    open: BTreeMap<u32, Waiting>,
    next_open: u32,
    /// The function was polled since the driver last asked what comes next.
    polled: bool,
    /// An operation came or went on since then.
    moved: bool,
    moved_at: Instant,
    /// What the function has set and got, which is written when it goes live.
    values: BTreeMap<RecordKey, Box<str>>,
}

/// How far a replay is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// The records of the process are asked for; those of its compensation may be, too.
    Process,
    /// The cancellation has arrived.
    Compensation,
    /// The values that it has set are being written.
    Settling,
    /// What waits begins.
    Beginning,
}

/// When an operation goes on: recorded ones by the order of their records, then the others as they came.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Position {
    Recorded(i32, RecordKey),
    Open(u32),
}

/// An operation that waits to begin.
struct Waiting {
    key: RecordKey,
    op: OpKind,
    at: At,
}

/// What the driver has to do next for an execution that nobody wakes.
pub(crate) enum Next {
    /// It is live, or waits for something else.
    Rest,
    /// Poll it again.
    Poll,
    /// Ask again then, unless something happens before.
    Wait(Instant),
    /// Have the cancellation recorded.
    AcceptCancel,
    /// Write these values, then say that they are [`State::settled`].
    Settle(Vec<(RecordKey, Box<str>)>),
    /// Code and records have diverged.
    Diverged(String),
}

impl Replay {
    /// The replay of an execution with these records; none if there is nothing to replay.
    pub(crate) fn of(names: &Names, room: Option<Taken>) -> Option<Box<Self>> {
        names.iter().next()?;
        Some(Box::new(Self {
            _room: room,
            stage: Stage::Process,
            waiting: BTreeSet::new(),
            asked: BTreeSet::new(),
            passed_over: BTreeSet::new(),
            open: BTreeMap::new(),
            next_open: 0,
            polled: false,
            moved: false,
            moved_at: Instant::now(),
            values: BTreeMap::new(),
        }))
    }

    fn moved(&mut self) {
        self.moved = true;
        self.moved_at = Instant::now();
    }

    fn may_begin(&self) -> bool {
        #[cfg(durable_mutations)]
        if is_broken(Rule::ReplayBeginsNothing) {
            return true;
        }
        self.stage == Stage::Beginning
    }

    /// Whether the first that waits may go on.
    fn has_next(&self) -> bool {
        self.waiting.first().is_some_and(|turn| matches!(turn, Position::Recorded(..)) || self.may_begin())
    }

    fn remove(&mut self, turn: &Position) {
        self.waiting.remove(turn);
        self.asked.remove(turn);
        self.passed_over.remove(turn);
        if let Position::Open(n) = turn {
            self.open.remove(n);
        }
        self.moved();
    }

    /// Whether the function should be polled again because somebody's turn has come.
    fn turns(&mut self) -> bool {
        let (polled, moved) = (std::mem::take(&mut self.polled), std::mem::take(&mut self.moved));
        self.waiting.append(&mut self.asked);
        if polled
            && !moved
            && self.has_next()
            && let Some(held) = self.waiting.pop_first()
        {
            self.passed_over.insert(held);
        }
        self.has_next()
    }
}

impl State {
    /// Whether what the code does now it has done before.
    pub(crate) fn is_replaying(&self) -> bool {
        self.replay.as_ref().is_some_and(|replay| replay.stage < Stage::Settling)
    }

    /// Whether a cancellation that is asked for is recorded as soon as it is seen.
    pub(crate) fn accepts_cancel(&self) -> bool {
        #[cfg(durable_mutations)]
        if is_broken(Rule::ReplaySeesNoCancel) {
            return true;
        }
        !self.is_replaying()
    }

    /// The function is about to be polled.
    pub(crate) fn polling(&mut self) {
        if let Some(replay) = &mut self.replay {
            replay.polled = true;
        }
    }

    /// Takes a place among those that wait for their turn; none if nobody has to. `seq` is that of its record.
    pub(crate) fn queue_up(&mut self, key: &RecordKey, op: OpKind, at: At, seq: Option<i32>) -> Option<Position> {
        let replay = self.replay.as_mut()?;
        let turn = match seq {
            Some(seq) => Position::Recorded(seq, key.clone()),
            None if replay.may_begin() => return None,
            None => {
                let n = replay.next_open;
                replay.next_open += 1;
                replay.open.insert(n, Waiting { key: key.clone(), op, at });
                Position::Open(n)
            }
        };
        replay.asked.insert(turn.clone());
        replay.moved();
        Some(turn)
    }

    /// Whether it is this one's turn.
    pub(crate) fn is_turn(&self, turn: &Position) -> bool {
        let Some(replay) = &self.replay else { return true };
        if matches!(turn, Position::Open(_)) && !replay.may_begin() {
            return false;
        }
        // One that has just come may be before those that wait: what follows on what went on in the same poll.
        let first = replay.waiting.first() == Some(turn) && replay.asked.first().is_none_or(|asked| turn < asked);
        first || replay.passed_over.contains(turn)
    }

    /// It goes on, or nobody awaits it any more.
    pub(crate) fn leave_queue(&mut self, turn: &Position) {
        if let Some(replay) = &mut self.replay {
            replay.remove(turn);
        }
    }

    /// Whether operations that stand there and are not recorded fail with `Cancelled`, although nothing begins yet.
    pub(crate) fn unwinds(&self, part: Part) -> bool {
        let unwinding = self.replay.as_ref().is_some_and(|replay| replay.stage >= Stage::Compensation);
        #[cfg(durable_mutations)]
        let unwinding = unwinding || is_broken(Rule::ReplaySeesNoCancel);
        unwinding && !part.is_shielded() && self.cancel == Cancel::Recorded
    }

    /// Keeps a value until the execution is live. False if it is: the value is written as it comes.
    pub(crate) fn keep_value(&mut self, key: &RecordKey, payload: &str) -> bool {
        let replaying = self.is_replaying();
        let replay = self.replay.as_mut().filter(|_| replaying);
        replay.map(|replay| replay.values.insert(key.clone(), payload.into())).is_some()
    }

    /// What is kept under this key.
    pub(crate) fn kept_value(&self, key: &RecordKey) -> Option<&str> {
        self.replay.as_ref()?.values.get(key).map(|payload| &**payload)
    }

    /// Takes the values that differ from what is recorded.
    pub(crate) fn unwritten_values(&mut self) -> Vec<(RecordKey, Box<str>)> {
        let Some(replay) = &mut self.replay else { return Vec::new() };
        let values = std::mem::take(&mut replay.values);
        let recorded = |key: &RecordKey| Some(&*self.names.get(key)?.record.as_ref()?.payload);
        values.into_iter().filter(|(key, payload)| recorded(key) != Some(payload)).collect()
    }

    /// The values are written: what waits may begin.
    pub(crate) fn settled(&mut self) {
        if let Some(replay) = &mut self.replay {
            replay.stage = Stage::Beginning;
            replay.moved();
        }
    }

    /// What comes next for an execution that nobody wakes; `alone`: nothing but the engine can wake it.
    pub(crate) fn next(&mut self, alone: bool) -> Next {
        let Some(replay) = &mut self.replay else { return Next::Rest };
        if replay.turns() {
            return Next::Poll;
        }
        match replay.stage {
            Stage::Settling => Next::Rest,
            Stage::Beginning => {
                self.replay = None;
                Next::Rest
            }
            // It has asked for nothing yet, or goes on by what is not durable.
            _ if replay.waiting.is_empty() || self.commits > 0 => Next::Rest,
            stage => self.quiescent(stage, alone),
        }
    }

    fn quiescent(&mut self, stage: Stage, alone: bool) -> Next {
        // What was recorded in answer to the cancellation is asked for once it arrives.
        let arrives = stage == Stage::Process && self.cancel != Cancel::No;
        let answers = self.cancelled_seq.unwrap_or(i32::MAX);
        let unvisited = self.unvisited(|key, record| !arrives || key.scope == Scope::Process && record.seq < answers);
        let Some(replay) = &mut self.replay else { return Next::Rest };
        if !unvisited.is_empty() {
            let until = replay.moved_at + MOMENT;
            if !alone && Instant::now() < until {
                return Next::Wait(until);
            }
            let begins = replay.open.values().map(|w| format!("the {} {} at {}", w.op, w.key, w.at));
            return Next::Diverged(diverged(&unvisited, &listed(begins.collect())));
        }
        match (stage, self.cancel) {
            (Stage::Process, Cancel::Requested) => {
                replay.stage = Stage::Compensation;
                self.cancel = Cancel::Recording;
                Next::AcceptCancel
            }
            (Stage::Process, Cancel::Recorded) => {
                replay.stage = Stage::Compensation;
                replay.moved();
                Next::Poll
            }
            (_, Cancel::Recording) => Next::Rest,
            _ => {
                let values = self.unwritten_values();
                if let Some(replay) = &mut self.replay {
                    replay.stage = if values.is_empty() { Stage::Beginning } else { Stage::Settling };
                    replay.moved();
                }
                if values.is_empty() { Next::Poll } else { Next::Settle(values) }
            }
        }
    }

    /// Why a function that has returned may not end: none if it has asked for everything.
    pub(crate) fn diverged_at_end(&self) -> Option<String> {
        self.replay.as_ref()?;
        let unvisited = self.unvisited(|_, _| true);
        (!unvisited.is_empty()).then(|| diverged(&unvisited, "its end"))
    }

    /// The records that this execution has not asked for, in words.
    fn unvisited(&self, counts: impl Fn(&RecordKey, &Record) -> bool) -> Vec<String> {
        #[cfg(durable_mutations)]
        if is_broken(Rule::JudgesUnvisited) {
            return Vec::new();
        }
        let word = |(key, name): (&RecordKey, &NameState)| {
            let record = name.record.as_ref().filter(|record| !name.asked && counts(key, record))?;
            Some(format!("the {} {key}", record.op))
        };
        let mut words: Vec<String> = self.names.iter().filter_map(word).collect();
        words.sort();
        words
    }
}

/// So many at most.
fn listed(mut words: Vec<String>) -> String {
    const MOST: usize = 20;
    let more = words.len().saturating_sub(MOST);
    words.truncate(MOST);
    if more > 0 {
        words.push(format!("{more} more"));
    }
    words.join(", ")
}

fn diverged(unvisited: &[String], begins: &str) -> String {
    let unvisited = listed(unvisited.to_vec());
    format!(
        "its code and its records have diverged: {unvisited} stands recorded, and the code has not asked for it; next would \
         be {begins}. Nothing has been begun. If an operation was renamed, say `.was(\"old name\")`; if the code is older \
         than the records, deploy the newer one; if a record is not wanted any more, `resume().forget(\"name\")`"
    )
}
