//! The oracle of the code: bodies of steps, what operations have returned, what clients were told.

use durable_core::Status;
use durable_core::storage::{OpKind, RecordKey, RunId, Scope};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

use crate::program::first_name;
use crate::world::World;

/// What a receive returns that gave up.
pub const TIMED_OUT: &str = "timed out";

/// What has happened.
#[derive(Default)]
pub struct Effects {
    /// Bodies that run at this moment.
    bodies: Vec<Body>,
    serial: u64,
    /// How often the body of a step began.
    pub begun: BTreeMap<(RunId, RecordKey), u32>,
    keys: BTreeMap<Uuid, (RunId, RecordKey)>,
    identities: BTreeMap<(RunId, RecordKey), Uuid>,
    /// What an operation has returned.
    pub returned: BTreeMap<(RunId, RecordKey), String>,
    /// What the receives of an event have returned, in order.
    received: BTreeMap<(RunId, &'static str), Vec<String>>,
    /// What clients wanted to send.
    pub sent: BTreeMap<String, Sent>,
    /// What an execution has set and got in its replay.
    pub kept: BTreeMap<(RunId, i64), BTreeMap<RecordKey, u64>>,
    /// What an execution was told by its operations.
    told: BTreeMap<(RunId, i64), BTreeSet<RecordKey>>,
}

/// What became of a message, as its sender knows it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sent {
    /// It may be there, or not.
    Unknown,
    Accepted,
    Refused,
}

struct Body {
    serial: u64,
    host: usize,
    run: RunId,
    key: RecordKey,
    claim: i64,
}

/// One execution of the body of a step.
pub struct Attempted {
    pub host: usize,
    pub run: RunId,
    pub key: RecordKey,
    pub claim: i64,
    pub number: u32,
    pub idempotency: Uuid,
    /// The name that its record would have had.
    pub first: RecordKey,
    /// In a race, whose members have no records.
    pub racing: bool,
}

/// Until it is dropped, the body runs.
pub struct Running {
    world: Arc<World>,
    serial: u64,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.world.inner().effects.bodies.retain(|body| body.serial != self.serial);
    }
}

impl Effects {
    /// The host's program runs no more.
    pub fn host_gone(&mut self, host: usize) {
        self.bodies.retain(|body| body.host != host);
    }
}

impl World {
    /// The body of a step begins.
    pub fn begins(self: &Arc<Self>, attempted: Attempted) -> Running {
        let Attempted { host, run, key, claim, number, idempotency, first, racing } = attempted;
        let mut wrong: Vec<String> = self.not_replayed(run, claim, &key, "the body of");
        let (serial, name) = {
            let mut inner = self.inner();
            let inner = &mut *inner;
            let ledger = &inner.ledger;
            let name =
                format!("the body of {key} of {} (attempt {number}, claim {claim}, host {host})", ledger.id(run));
            let owner = ledger.executes(run, claim).is_some_and(|instance| ledger.owns(instance, run, claim));
            let fenced = ledger.executes(run, claim).is_none_or(|instance| ledger.is_fenced(instance));
            if !owner && !fenced {
                wrong.push(format!("{name} begins on an instance that does not own the process"));
            }
            let machine = &inner.hosts[host];
            let age = machine.acknowledged.map_or(Duration::MAX, |sent| sent.elapsed());
            if age > inner.odds.expiry / 2 + Duration::from_millis(2) {
                wrong.push(format!("{name} begins with a heartbeat of {age:?} ago"));
            }
            if key != first && ledger.stands_recorded(run, &first) {
                wrong.push(format!("{name} begins, and {first} stands recorded"));
            }
            if owner && !racing {
                if let Some(outcome) = ledger.outcome(run, &key) {
                    wrong.push(format!("{name} begins, and {} is recorded", outcome.payload));
                }
                let failed = ledger.failed.get(&(run, key.clone())).copied().unwrap_or(0);
                if i64::from(number) != i64::from(failed) + 1 {
                    wrong.push(format!("{name} begins, and {failed} attempts have failed"));
                }
            }
            let place = (run, first);
            if let Some(other) = inner.effects.keys.insert(idempotency, place.clone())
                && other != place
            {
                wrong.push(format!("{name} has the idempotency key of {} of {}", other.1, other.0));
            }
            if let Some(other) = inner.effects.identities.insert(place.clone(), idempotency)
                && other != idempotency
            {
                wrong.push(format!("{name} has another idempotency key than before"));
            }
            for body in inner.effects.bodies.iter().filter(|body| body.run == run && body.key == key) {
                let instance = ledger.executes(run, body.claim);
                let theirs = instance.is_some_and(|instance| ledger.owns(instance, run, body.claim));
                if body.host == host
                    || (theirs && owner)
                    || !instance.is_none_or(|instance| ledger.is_fenced(instance)) && !fenced
                {
                    let (there, claim) = (body.host, body.claim);
                    wrong.push(format!("{name} begins, and runs on host {there} under claim {claim}"));
                }
            }
            let effects = &mut inner.effects;
            *effects.begun.entry(place).or_default() += 1;
            effects.serial += 1;
            effects.bodies.push(Body { serial: effects.serial, host, run, key, claim });
            (effects.serial, name)
        };
        self.say(|_| format!("{name} begins"));
        wrong.into_iter().for_each(|wrong| self.wrong(wrong));
        Running { world: self.clone(), serial }
    }

    /// An operation has returned this to the process's code: it is recorded, and is what it was before.
    pub fn returned(&self, run: RunId, claim: i64, key: RecordKey, op: OpKind, text: String) {
        let wrong = {
            let mut inner = self.inner();
            let id = inner.ledger.id(run).to_owned();
            let recorded = inner.ledger.outcome(run, &key).map(|outcome| outcome.op);
            inner.effects.told.entry((run, claim)).or_default().insert(key.clone());
            let first = RecordKey { name: first_name(&key.name).into(), ..key.clone() };
            let before = inner.effects.returned.entry((run, first)).or_insert_with(|| text.clone()).clone();
            if recorded != Some(op) {
                Some(format!("{op} {key} of {id} returned {text}, and its record is {recorded:?}"))
            } else if before != text {
                Some(format!("{op} {key} of {id} returned {before}, and now {text}"))
            } else {
                None
            }
        };
        self.say(|inner| format!("{key} of {} returned {text}", inner.ledger.id(run)));
        wrong.into_iter().for_each(|wrong| self.wrong(wrong));
    }

    /// A receive, the one with this number among those of its event, has returned this: the lowest message that those
    /// before it have not taken, or none.
    pub fn received(&self, run: RunId, event: &'static str, number: usize, text: String) {
        let wrong = {
            let mut inner = self.inner();
            let inner = &mut *inner;
            let id = inner.ledger.id(run);
            let received = inner.effects.received.entry((run, event)).or_default();
            let messages = inner.ledger.messages.get(&run).into_iter().flat_map(BTreeMap::values);
            let mut messages = messages.filter(|message| message.event == event);
            let taken = received.iter().take(number).filter(|text| *text != TIMED_OUT).count();
            let next = messages.nth(taken).map(|message| &message.payload);
            let wrong = if text != TIMED_OUT && next != serde_json::to_string(&text).ok().as_ref() {
                Some(format!("receive {number} of {event} of {id} returned {text}, and {next:?} comes next"))
            } else if received.get(number).is_some_and(|before| *before != text) {
                Some(format!("receive {number} of {event} of {id} returned {:?}, and now {text}", received.get(number)))
            } else {
                None
            };
            if received.len() == number {
                received.push(text.clone());
            }
            wrong
        };
        self.say(|inner| format!("receive {number} of {event} of {} returned {text}", inner.ledger.id(run)));
        wrong.into_iter().for_each(|wrong| self.wrong(wrong));
    }

    /// What earlier executions have recorded, and this one was not told of before it does this: the same function was told of
    /// all of it.
    fn not_replayed(&self, run: RunId, claim: i64, by: &RecordKey, what: &str) -> Vec<String> {
        let inner = self.inner();
        let told = inner.effects.told.get(&(run, claim));
        let left = |(key, outcome): &(&RecordKey, &crate::ledger::Final)| {
            // Which receive it was is told by its number, and values say for themselves what they are.
            let counts = !matches!(outcome.op, OpKind::Event | OpKind::Value);
            counts && outcome.claim < claim && key.scope <= by.scope && !told.is_some_and(|told| told.contains(key))
        };
        let id = inner.ledger.id(run);
        let left = inner.ledger.outcomes(run).filter(left);
        left.map(|(key, _)| format!("{what} {by} of {id} under claim {claim} begins before {key} was asked for"))
            .collect()
    }

    /// An execution is live: nothing is left of what others recorded, and what it has set stands recorded.
    pub fn begins_something(&self, run: RunId, claim: i64, key: &RecordKey) {
        let mut wrong = self.not_replayed(run, claim, key, "the effect of");
        let mut inner = self.inner();
        for (key, kept) in inner.effects.kept.remove(&(run, claim)).into_iter().flatten() {
            let values = inner.ledger.values.get(&(run, key.clone())).map_or(&[][..], |values| values);
            let newest = values.iter().rfind(|(by, _)| *by <= claim).map(|(_, value)| value.as_str());
            // It stood when the execution went live: recorded by it, or by one before it. It may have set another one since.
            let before = values.iter().rposition(|(by, _)| *by < claim).unwrap_or(0);
            let stood = values[before..].iter().any(|(by, value)| *by <= claim && *value == kept.to_string());
            if !stood {
                let id = inner.ledger.id(run);
                wrong.push(format!("{key} of {id} was set to {kept}, and is {newest:?} when something begins"));
            }
        }
        drop(inner);
        wrong.into_iter().for_each(|wrong| self.wrong(wrong));
    }

    /// The code of a run was told that it is cancelled.
    pub fn is_cancelled(&self, run: RunId, claim: i64) {
        let none = RecordKey { scope: Scope::Process, name: "cancellation".into(), key: "".into() };
        let early = self.not_replayed(run, claim, &none, "the");
        early.into_iter().for_each(|wrong| self.wrong(wrong));
        let inner = self.inner();
        let row = inner.ledger.rows.get(&run).filter(|row| !row.cancelled);
        let wrong = row.map(|row| format!("{} was told of a cancellation that is not recorded", row.id));
        drop(inner);
        wrong.into_iter().for_each(|wrong| self.wrong(wrong));
    }

    /// Somebody was told that a process has ended so.
    pub fn ended_as(&self, id: &str, text: &str) {
        let wrong = {
            let inner = self.inner();
            let row = inner.ledger.ids.get(id).and_then(|run| inner.ledger.rows.get(run));
            let known = row.map(|row| match row.status {
                Status::Completed => row.output.clone().unwrap_or_default(),
                Status::Cancelled => "the awaited process was cancelled".into(),
                Status::Failed => row.reason.clone().unwrap_or_default(),
                status => format!("{status}"),
            });
            // That there was none may have been true.
            let there_was_none = text.starts_with("there is no process");
            (known.as_deref() != Some(text) && !there_was_none)
                .then(|| format!("{id} is said to have ended as {text}, and is {known:?}"))
        };
        wrong.into_iter().for_each(|wrong| self.wrong(wrong));
    }

    /// What operations of a run have returned, by any of its executions.
    pub fn results(&self, run: RunId) -> BTreeMap<String, String> {
        let inner = self.inner();
        let returned = inner.effects.returned.iter().filter(|((of, _), _)| *of == run);
        let returned = returned.map(|((_, key), text)| (key.to_string(), text.clone()));
        let received = inner.effects.received.iter().filter(|((of, _), _)| *of == run);
        let received = received.flat_map(|((_, event), texts)| {
            texts.iter().enumerate().map(move |(number, text)| (format!("{event}/{number}"), text.clone()))
        });
        returned.chain(received).collect()
    }
}
