//! The oracle of promptness: while nothing goes wrong, nobody waits for long for what is there. So a wake-up that is lost is
//! noticed although a look that comes every minute, or a process that is taken up for another reason, makes it good.

use chrono::{DateTime, Utc};
use durable_core::Status;
use durable_core::storage::{
    Batch, Filter, InstanceId, Op, OpKind, Outcome, ProcessRow, RecordOp, RecordState, RunId, Storage,
};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

use crate::interpret::MESSAGES;
use crate::program::Program;
use crate::tally::Sight;
use crate::world::{Inner, World, at_once};

/// How soon what is due must be taken, and what is known of that.
#[derive(Default)]
pub struct Lateness {
    /// None where hosts may have no room for it.
    bound: Option<Duration>,
    /// So long after the last trouble others may still be taking over from the dead.
    grace: Duration,
    /// Until when something went wrong.
    troubled: Option<Instant>,
    /// When the storage's clock went back last.
    pub went_back: Option<Instant>,
    waits: BTreeMap<u64, Wait>,
    serial: u64,
    /// Since when nobody was seen running what an instance owns.
    idle: BTreeMap<(RunId, i64), Instant>,
}

/// What an execution of a process does, or waits for, at this moment.
struct Wait {
    run: RunId,
    claim: i64,
    what: Awaited,
    since: Instant,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Awaited {
    /// Nothing: the function runs.
    Runs,
    /// A message of this event.
    Message(usize),
    /// The end of this process.
    End(usize),
}

/// Until it is dropped, it waits.
pub struct Waiting {
    world: Arc<World>,
    serial: u64,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.world.inner().lateness.waits.remove(&self.serial);
    }
}

impl Lateness {
    pub fn new(bound: Option<Duration>, grace: Duration) -> Self {
        Self { bound, grace, ..Self::default() }
    }

    /// Something goes wrong, until then.
    pub fn trouble(&mut self, until: Instant) {
        self.troubled = self.troubled.max(Some(until));
    }

    /// Whether anything can be late now.
    fn watches(&self) -> bool {
        self.bound.is_some() && self.troubled.is_none_or(|until| until + self.grace < Instant::now())
    }

    /// By how much more than it may what was there at that time has waited since.
    fn late(&self, there: Instant) -> Option<Duration> {
        let quiet = self.troubled.map_or(there, |until| there.max(until + self.grace));
        let waited = Instant::now().checked_duration_since(quiet)?;
        waited.checked_sub(self.bound?)
    }
}

/// When it was, on the runtime's clock, so many milliseconds ago by the storage's.
fn ago(now: DateTime<Utc>, at: DateTime<Utc>) -> Option<Instant> {
    Instant::now().checked_sub((now - at).to_std().ok()?)
}

impl Inner {
    /// Since when the first message of an event that a run has not taken is there.
    fn mail(&self, run: RunId, event: &str) -> Option<Instant> {
        let mut messages = self.ledger.messages.get(&run)?.values();
        messages.find(|message| message.event == event && message.taken.is_none()).map(|message| message.at)
    }

    /// Since when that for which something waits is there.
    fn there(&self, run: RunId, what: Awaited) -> Option<Instant> {
        match what {
            Awaited::Runs => None,
            Awaited::Message(event) => self.mail(run, MESSAGES[event].name()),
            Awaited::End(process) => {
                let run = self.ledger.ids.get(&format!("p{process}"))?;
                self.ledger.rows.get(run)?.ended
            }
        }
    }
}

impl World {
    /// Something goes wrong for so long.
    pub fn trouble(&self, time: Duration) {
        self.inner().lateness.trouble(Instant::now() + time);
    }

    /// An execution waits for this.
    pub fn waits(self: &Arc<Self>, run: RunId, claim: i64, what: Awaited) -> Waiting {
        let mut inner = self.inner();
        let lateness = &mut inner.lateness;
        lateness.serial += 1;
        let serial = lateness.serial;
        lateness.waits.insert(serial, Wait { run, claim, what, since: Instant::now() });
        Waiting { world: self.clone(), serial }
    }

    fn storage_now(&self) -> DateTime<Utc> {
        let peers = at_once(self.memory.peers("", InstanceId(uuid::Uuid::nil())));
        peers.map_or(DateTime::UNIX_EPOCH, |peers| peers.now)
    }

    /// Says what has waited for too long.
    pub fn prompt(&self) {
        let rows = {
            let mut inner = self.inner();
            let lateness = &mut inner.lateness;
            if !lateness.watches() {
                lateness.idle.clear();
                return;
            }
            inner.tally.saw(Sight::Quiet);
            at_once(self.memory.list("default", &Filter { limit: 1_000, ..Default::default() })).unwrap_or_default()
        };
        let now = self.storage_now();
        let mut wrong = Vec::new();
        let mut inner = self.inner();
        let running: BTreeSet<(RunId, i64)> = {
            let waits = inner.lateness.waits.values().filter(|wait| wait.what == Awaited::Runs);
            waits.map(|wait| (wait.run, wait.claim)).collect()
        };
        let owned = |row: &&ProcessRow| row.owner.is_some() && !running.contains(&(row.run, row.claim));
        let idle: Vec<(RunId, i64)> = rows.iter().filter(owned).map(|row| (row.run, row.claim)).collect();
        let before = std::mem::take(&mut inner.lateness.idle);
        inner.lateness.idle =
            idle.into_iter().map(|it| (it, before.get(&it).copied().unwrap_or_else(Instant::now))).collect();
        for row in rows.iter().filter(|row| !row.status.is_finished()) {
            wrong.extend(waits_too_long(&inner, row, now));
        }
        for wait in inner.lateness.waits.values() {
            let Wait { run, claim, what, since } = *wait;
            let owned = inner.ledger.rows.get(&run).is_some_and(|row| row.owner.is_some() && row.claim == claim);
            let there = inner.there(run, what).filter(|_| owned);
            if let Some(late) = there.and_then(|there| inner.lateness.late(there.max(since))) {
                wrong.push(format!(
                    "{} waits for {what:?}, which has been there, {late:?} too long",
                    inner.ledger.id(run)
                ));
            }
        }
        drop(inner);
        wrong.into_iter().for_each(|wrong| self.wrong(wrong));
    }

    /// Timers that a batch, which is about to be followed, records as over.
    pub fn timers(&self, batch: &Batch, outcomes: &[Outcome]) {
        let now = self.storage_now();
        let mut wrong = Vec::new();
        {
            let inner = self.inner();
            if !inner.lateness.watches() {
                return;
            }
            for (op, outcome) in batch.ops.iter().zip(outcomes) {
                let Op::Record(record) = op else { continue };
                let is_new = inner.ledger.outcome(record.run, &record.key).is_none();
                if is_new && record.state != RecordState::Pending && *outcome == Outcome::Recorded {
                    wrong.extend(self.timer(&inner, record, now));
                }
            }
        }
        wrong.into_iter().for_each(|wrong| self.wrong(wrong));
    }

    /// A timer that is late, or one by which something gave up that had a message.
    fn timer(&self, inner: &Inner, record: &RecordOp, now: DateTime<Utc>) -> Option<String> {
        if !matches!(record.op, OpKind::Delay | OpKind::Event | OpKind::Race) {
            return None;
        }
        let payload: serde_json::Value = serde_json::from_str(&record.payload).ok()?;
        let id = inner.ledger.id(record.run);
        let key = &record.key;
        let due = match record.op {
            OpKind::Race => &payload["result"]["due"],
            _ => &payload["due"],
        };
        let due = due.as_str().and_then(|due| due.parse().ok()).and_then(|due| ago(now, due));
        // Until it was claimed it was for its row to be due. A host that gives it back may not know yet that the storage's clock
        // has jumped backwards, and then it is due once that has caught up.
        let claimed = inner.ledger.rows.get(&record.run)?.claimed;
        if let Some(late) = due.and_then(|due| inner.lateness.late(due.max(claimed))) {
            return Some(format!("the timer {key} of {id} was taken {late:?} too late"));
        }
        let events = match record.op {
            OpKind::Event if payload.get("timed_out").is_some() => vec![&*key.name],
            // A timer that is over when the race begins may win although a message is there.
            OpKind::Race if due.is_some() => {
                let bound = inner.lateness.bound?.as_millis() as u64;
                self.program(inner, record.run)?.races(&key.name, bound)
            }
            _ => return None,
        };
        let passed_over = |event: &&str| inner.mail(record.run, event).and_then(|there| inner.lateness.late(there));
        let event = events.into_iter().find(|event| passed_over(event).is_some())?;
        Some(format!("{key} of {id} gave up, and a message of {event} had been there for long"))
    }

    fn program(&self, inner: &Inner, run: RunId) -> Option<&Program> {
        self.programs.get(inner.ledger.id(run).get(1..)?.parse::<usize>().ok()?)
    }
}

/// What is wrong with a process that stands so.
fn waits_too_long(inner: &Inner, row: &ProcessRow, now: DateTime<Utc>) -> Option<String> {
    let (id, lateness) = (&row.id, &inner.lateness);
    if row.status == Status::Stuck {
        return None;
    }
    if row.status == Status::Waiting {
        let due = row.wake_at.and_then(|at| ago(now, at));
        if let Some(late) = due.and_then(|due| lateness.late(due)) {
            return Some(format!("{id} is due, and was taken by nobody: {late:?} too long"));
        }
        let waits = row.waiting_for.as_deref().unwrap_or_default();
        let events =
            (0..MESSAGES.len()).filter(|event| waits.contains(&format!("event {:?}", MESSAGES[*event].name())));
        let ends = waits.split("output of process \"p").skip(1).filter_map(|rest| rest.split('"').next()?.parse().ok());
        let mut awaited = events.map(Awaited::Message).chain(ends.map(Awaited::End));
        // What made it due before the storage's clock went back does so once that time has come again.
        let again = lateness.went_back.filter(|_| row.wake_at.is_some());
        let late = awaited.find_map(|what| {
            let there = inner.there(row.run, what).filter(|there| again.is_none_or(|again| *there > again))?;
            lateness.late(there)
        });
        return late.map(|late| format!("{id} waits for {waits}, which has been there, {late:?} too long"));
    }
    let idle = lateness.idle.get(&(row.run, row.claim));
    if let Some(late) = idle.and_then(|since| lateness.late(*since)) {
        return Some(format!("{id} is owned by {:?}, which does not run it: {late:?} too long", row.owner));
    }
    let known = inner.ledger.rows.get(&row.run).filter(|row| !row.cancelled)?;
    let late = known.asked.and_then(|asked| lateness.late(asked.max(known.claimed)));
    late.map(|late| format!("{id} was asked to cancel, and has not accepted it: {late:?} too long"))
}
