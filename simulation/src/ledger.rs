//! The oracle of the storage: what the database has answered, followed beside it. What contradicts what was answered
//! before, or what no instance may be let do, is a violation.

use durable_core::storage::{
    Batch, Effect, Fence, InstanceId, Op, OpKind, Order, Outcome, Raised, RecordKey, RecordOp, RecordState, RunId,
    Spawn, Status, What,
};
use std::collections::{BTreeMap, BTreeSet};
use tokio::time::Instant;

use crate::mailbox::Message;
use crate::tally::Sight;

/// What is known.
#[derive(Default)]
pub struct Ledger {
    instances: BTreeMap<InstanceId, Instance>,
    pub rows: BTreeMap<RunId, Row>,
    pub ids: BTreeMap<String, RunId>,
    finals: BTreeMap<(RunId, RecordKey), Final>,
    /// What variables were, in the order in which it was recorded, and under which claim.
    pub values: BTreeMap<(RunId, RecordKey), Vec<(i64, String)>>,
    /// Failed attempts, by what is still open.
    pub failed: BTreeMap<(RunId, RecordKey), i32>,
    /// The newest record of what is open, and its claim.
    pending: BTreeMap<(RunId, RecordKey), (i64, Box<str>)>,
    pub messages: BTreeMap<RunId, BTreeMap<i64, Message>>,
    /// What was claimed under a claim that its instance has not been told of.
    pub untold: BTreeSet<(RunId, i64)>,
    /// What has been seen, and not been counted.
    pub seen: Vec<Sight>,
    /// The executions that have found records that the code did not ask for, and have not been judged.
    pub diverged: Vec<(RunId, i64)>,
    /// Who owned a run under which claim.
    claims: BTreeMap<(RunId, i64), InstanceId>,
}

struct Instance {
    generation: i64,
    fenced: bool,
}

/// A process.
pub struct Row {
    pub id: String,
    pub owner: Option<InstanceId>,
    pub claim: i64,
    pub status: Status,
    pub output: Option<String>,
    pub reason: Option<String>,
    /// When it was claimed last.
    pub claimed: Instant,
    /// When it ended.
    pub ended: Option<Instant>,
    /// When somebody asked it to cancel.
    pub asked: Option<Instant>,
    /// The newest claim under which it was parked.
    pub parked: i64,
    /// Its owner has recorded that.
    pub cancelled: bool,
}

/// An outcome that stands.
pub struct Final {
    pub op: OpKind,
    pub state: RecordState,
    pub payload: String,
    pub claim: i64,
}

impl Final {
    /// Whether it is this very record: a variable is set more than once under one claim.
    fn is(&self, record: &RecordOp) -> bool {
        let same = record.op != OpKind::Value || self.payload == *record.payload;
        same && self.claim == record.claim && self.state == record.state
    }
}

pub type Violations = Vec<String>;

impl Ledger {
    pub fn enlisted(&mut self, instance: InstanceId) {
        self.instances.entry(instance).or_insert(Instance { generation: 0, fenced: false });
    }

    pub fn refenced(&mut self, instance: InstanceId, generation: i64) {
        if let Some(instance) = self.instances.get_mut(&instance) {
            instance.generation = instance.generation.max(generation);
        }
    }

    pub fn generation(&self, instance: InstanceId) -> i64 {
        self.instances.get(&instance).map_or(0, |instance| instance.generation)
    }

    pub fn fenced(&mut self, instance: InstanceId) {
        if let Some(instance) = self.instances.get_mut(&instance) {
            instance.fenced = true;
        }
    }

    pub fn is_fenced(&self, instance: InstanceId) -> bool {
        self.instances.get(&instance).is_none_or(|instance| instance.fenced)
    }

    /// Whether somebody may write.
    pub fn stands(&self, fence: Fence) -> bool {
        !self.is_fenced(fence.instance) && self.generation(fence.instance) == fence.generation
    }

    /// All that a fenced instance owned is handed back.
    pub fn released(&mut self, instance: InstanceId) {
        for row in self.rows.values_mut().filter(|row| row.owner == Some(instance)) {
            row.owner = None;
            row.status = Status::Waiting;
        }
    }

    /// How a process is called, for people.
    pub fn id(&self, run: RunId) -> &str {
        self.rows.get(&run).map_or("?", |row| &row.id)
    }

    /// Who executes a run under this claim.
    pub fn executes(&self, run: RunId, claim: i64) -> Option<InstanceId> {
        self.claims.get(&(run, claim)).copied()
    }

    pub fn owns(&self, instance: InstanceId, run: RunId, claim: i64) -> bool {
        self.rows.get(&run).is_some_and(|row| row.owner == Some(instance) && row.claim == claim)
    }

    pub fn outcome(&self, run: RunId, key: &RecordKey) -> Option<&Final> {
        self.finals.get(&(run, key.clone()))
    }

    /// Whether anything is recorded under this key, be it attempts that have failed.
    pub fn stands_recorded(&self, run: RunId, key: &RecordKey) -> bool {
        let place = (run, key.clone());
        self.finals.contains_key(&place) || self.failed.contains_key(&place)
    }

    /// Whether anything is recorded under this name.
    pub fn knows(&self, run: RunId, name: &str) -> bool {
        let is = |(of, key): &(RunId, RecordKey)| *of == run && *key.name == *name;
        self.finals.keys().any(is) || self.failed.keys().any(is)
    }

    pub fn outcomes(&self, run: RunId) -> impl Iterator<Item = (&RecordKey, &Final)> {
        let of_run = self.finals.iter().filter(move |((of, _), _)| *of == run);
        of_run.map(|((_, key), outcome)| (key, outcome))
    }

    /// A batch was committed, with these outcomes.
    pub fn committed(&mut self, batch: &Batch, outcomes: &[Outcome]) -> Violations {
        let mut wrong = Vec::new();
        let Fence { instance, generation } = batch.fence;
        if !self.stands(batch.fence) {
            let known = self.generation(instance);
            let fenced = self.is_fenced(instance);
            wrong.push(format!(
                "a batch of generation {generation} of {instance} was accepted (fenced: {fenced}, generation: {known})"
            ));
        }
        let mut order: Vec<usize> = (0..batch.ops.len()).collect();
        order.sort_by_key(|at| rank(&batch.ops[*at]));
        for at in order {
            self.applied(instance, &batch.ops[at], &outcomes[at], &mut wrong);
        }
        wrong
    }

    fn applied(&mut self, me: InstanceId, op: &Op, outcome: &Outcome, wrong: &mut Violations) {
        match (op, outcome) {
            (Op::Spawn(spawn), Outcome::Spawned(spawned)) => {
                self.spawned(me, spawn, spawned.run, spawned.existed, wrong)
            }
            (Op::Raise(raise), Outcome::Raised(raised)) => {
                self.raised(&raise.name, &raise.event_id, &raise.payload, *raised, wrong);
            }
            (Op::Record(record), outcome) if *outcome != Outcome::Lost => self.recorded(me, record, outcome, wrong),
            (Op::AcceptCancel { run, claim, .. }, Outcome::Recorded) => {
                self.check_owner(me, *run, *claim, "a cancellation", wrong);
                if let Some(row) = self.rows.get_mut(run) {
                    if !row.cancelled {
                        self.seen.push(Sight::Accepted);
                    }
                    row.cancelled = true;
                    if row.asked.is_none() {
                        wrong.push(format!("{} was cancelled, and nobody had asked", row.id));
                    }
                }
            }
            (Op::Finish(finish), Outcome::Finished { .. }) => {
                let Some(row) = self.rows.get_mut(&finish.run) else { return };
                if row.owner.is_none() && row.status == finish.status && row.claim == finish.claim {
                    self.seen.push(Sight::OwnEnd);
                    return;
                }
                self.seen.extend(match finish.status {
                    Status::Completed => Some(Sight::Completed),
                    Status::Cancelled => Some(Sight::Cancelled),
                    Status::Failed => Some(Sight::Failed),
                    _ => None,
                });
                row.status = finish.status;
                row.ended = finish.status.is_finished().then(Instant::now);
                row.output = finish.output.as_deref().map(str::to_owned);
                row.reason = finish.reason.as_deref().map(str::to_owned);
                if finish.status == Status::Stuck {
                    let reason = row.reason.as_deref().unwrap_or_default();
                    // Whether they have is judged where the host is known.
                    if reason.contains("diverged") {
                        self.seen.push(Sight::Diverged);
                        self.diverged.push((finish.run, finish.claim));
                    } else {
                        wrong.push(format!("{} is stuck: {reason}", row.id));
                    }
                }
                if finish.status == Status::Cancelled && !row.cancelled {
                    wrong.push(format!("{} ended cancelled, and had not recorded it", row.id));
                }
                self.check_owner(me, finish.run, finish.claim, "an end", wrong);
                self.disown(finish.run);
            }
            (Op::Park(_), Outcome::Signalled(_)) => self.seen.push(Sight::NotParked),
            (Op::Park(park), Outcome::Recorded) => {
                if self.rows.get(&park.run).is_none_or(|row| row.owner.is_none() || row.claim > park.claim) {
                    // Again.
                    self.seen.push(Sight::OwnPark);
                    return;
                }
                self.check_owner(me, park.run, park.claim, "a park", wrong);
                let last = self.messages.get(&park.run).and_then(|messages| messages.keys().last().copied());
                if let (Some(seen), Some(last)) = (park.seen, last)
                    && seen < last
                {
                    wrong.push(format!(
                        "{} parked having seen {seen} signals, and has message {last}",
                        self.id(park.run)
                    ));
                }
                self.disown(park.run);
                if let Some(row) = self.rows.get_mut(&park.run) {
                    row.status = Status::Waiting;
                    row.parked = park.claim;
                }
            }
            (op, Outcome::Lost) if self.has_done(me, op) => {
                wrong.push(format!("{me} is said to have lost what it has done before: {op:?}"));
            }
            (Op::Order(Order { id, what: What::Cancel, .. }), Outcome::Asked { before: Some((run, status)), .. })
                if !status.is_finished() =>
            {
                if let Some(row) = self.rows.get_mut(run) {
                    row.asked.get_or_insert_with(Instant::now);
                    if row.claim == 0 && row.owner.is_none() {
                        self.seen.push(Sight::Unrun);
                        row.ended = Some(Instant::now());
                        row.status = Status::Cancelled;
                    }
                } else {
                    wrong.push(format!("{id} can be cancelled, and is not known"));
                }
            }
            (
                Op::Order(Order { what: What::Resume { .. }, .. }),
                Outcome::Asked { before: Some((run, Status::Stuck | Status::Failed)), .. },
            ) => {
                if let Some(row) = self.rows.get_mut(run) {
                    row.status = Status::Waiting;
                    row.ended = None;
                    row.reason = None;
                }
            }
            (Op::Claim { .. }, Outcome::Claimed(claimed)) => {
                for claimed in claimed {
                    let Some(row) = self.rows.get_mut(&claimed.run) else { continue };
                    if let Some(owner) = row.owner {
                        wrong.push(format!("{} was claimed by {me}, and is owned by {owner}", row.id));
                    }
                    if claimed.claim != row.claim + 1 {
                        wrong.push(format!("claim {} of {} follows on {}", claimed.claim, row.id, row.claim));
                    }
                    row.owner = Some(me);
                    row.claim = claimed.claim;
                    row.claimed = Instant::now();
                    row.status = Status::Running;
                    self.claims.insert((claimed.run, claimed.claim), me);
                    self.untold.insert((claimed.run, claimed.claim));
                }
            }
            _ => {}
        }
    }

    fn check_owner(&self, me: InstanceId, run: RunId, claim: i64, what: &str, wrong: &mut Violations) {
        let Some(row) = self.rows.get(&run) else {
            wrong.push(format!("{what} of a run that does not exist was accepted"));
            return;
        };
        if row.owner != Some(me) || row.claim != claim {
            let (id, owner, now) = (&row.id, row.owner, row.claim);
            wrong.push(format!(
                "{what} of {id} by {me} under claim {claim} was accepted; {owner:?} owns it under {now}"
            ));
        }
    }

    fn disown(&mut self, run: RunId) {
        if let Some(row) = self.rows.get_mut(&run) {
            row.owner = None;
        }
    }

    fn spawned(&mut self, me: InstanceId, spawn: &Spawn, run: RunId, existed: bool, wrong: &mut Violations) {
        if existed && run == spawn.run {
            wrong.push(format!("{} is said to have existed, and this very start has started it", spawn.id));
        }
        if !existed && self.rows.contains_key(&run) {
            self.seen.push(Sight::OwnStart);
        }
        if existed || self.rows.contains_key(&run) {
            if !self.rows.contains_key(&run) {
                wrong.push(format!("{} is said to exist, and was never started", spawn.id));
            }
            return;
        }
        if let Some(other) = self.ids.insert(spawn.id.to_string(), run) {
            wrong.push(format!("{} was started twice: {other} and {run}", spawn.id));
        }
        if spawn.take {
            self.claims.insert((run, 1), me);
        }
        let row = Row {
            id: spawn.id.to_string(),
            owner: spawn.take.then_some(me),
            claim: i64::from(spawn.take),
            status: if spawn.take { Status::Running } else { Status::Waiting },
            output: None,
            reason: None,
            claimed: Instant::now(),
            ended: None,
            asked: None,
            parked: 0,
            cancelled: false,
        };
        self.rows.insert(run, row);
    }

    fn recorded(&mut self, me: InstanceId, record: &RecordOp, outcome: &Outcome, wrong: &mut Violations) {
        if self.stood(me, record) {
            self.seen.push(Sight::OwnRecord);
        } else {
            self.check_owner(me, record.run, record.claim, "a record", wrong);
        }
        // A storage that was told so does not look for it, and has an error to show for it.
        let pending = self.failed.get(&(record.run, record.key.clone()));
        if !record.replaces
            && pending.is_some_and(|attempts| record.state != RecordState::Pending || *attempts != record.attempts)
        {
            wrong.push(format!("{} of {} was said to replace none", record.key, self.id(record.run)));
        }
        let payload = match (&record.effect, outcome) {
            (Some(Effect::Spawn(spawn)), Outcome::Spawned(spawned)) => {
                self.spawned(me, spawn, spawned.run, spawned.existed, wrong);
                spawned.to_json(&record.payload).into()
            }
            (Some(Effect::Raise(raise)), Outcome::Raised(raised)) => {
                self.raised(&raise.name, &raise.event_id, &raise.payload, *raised, wrong);
                raised.as_json().into()
            }
            _ => record.payload.to_string(),
        };
        self.noted(record, payload, wrong);
    }

    /// Whether an earlier attempt of this instance's has done the same.
    fn has_done(&self, me: InstanceId, op: &Op) -> bool {
        let mine = |run, claim| self.executes(run, claim) == Some(me);
        match op {
            Op::Finish(end) => self.rows.get(&end.run).is_some_and(|row| {
                row.owner.is_none() && row.claim == end.claim && row.status == end.status && mine(end.run, end.claim)
            }),
            Op::Park(park) => {
                self.rows.get(&park.run).is_some_and(|row| row.parked >= park.claim) && mine(park.run, park.claim)
            }
            Op::Record(record) => {
                let known = self.outcome(record.run, &record.key);
                known.is_some_and(|known| known.is(record)) && mine(record.run, record.claim)
            }
            _ => false,
        }
    }

    /// Whether an earlier attempt of this instance's has written the record already; in its batch the run may have been
    /// given up.
    fn stood(&self, me: InstanceId, record: &RecordOp) -> bool {
        let place = (record.run, record.key.clone());
        let stood = match self.finals.get(&place) {
            Some(known) => known.is(record),
            None => record.state == RecordState::Pending && self.pending.get(&place) == Some(&as_pending(record)),
        };
        stood && self.executes(record.run, record.claim) == Some(me)
    }

    /// A record stands, by whatever way it came.
    pub fn noted(&mut self, record: &RecordOp, payload: String, wrong: &mut Violations) {
        let id = self.id(record.run).to_owned();
        let place = (record.run, record.key.clone());
        if let Some(number) = record.takes {
            self.taken(record.run, number, &record.key, wrong);
        }
        if record.state == RecordState::Pending {
            self.failed.insert(place.clone(), record.attempts);
            self.pending.insert(place.clone(), as_pending(record));
        }
        match self.finals.get_mut(&place) {
            // Sent again, a message that nobody was there to take is judged anew; nobody has been told of it yet.
            Some(known)
                if record.op == OpKind::Raise
                    && known.claim == record.claim
                    && known.payload != Raised::Delivered { run: record.run, number: 0, mine: false }.as_json() =>
            {
                known.payload = payload;
                return;
            }
            // A variable without a key is overwritten.
            Some(known) if known.op != OpKind::Value || record.op != OpKind::Value || !record.key.key.is_empty() => {
                let same = known.claim == record.claim && known.payload == payload && known.state == record.state;
                if !same {
                    let key = &record.key;
                    wrong.push(format!("the record {key} of {id} was {}, and is {payload} now", known.payload));
                }
                return;
            }
            _ => {}
        }
        if record.state == RecordState::Pending {
            return;
        }
        if record.op == OpKind::Value {
            let values = self.values.entry(place.clone()).or_default();
            let value = (record.claim, payload.clone());
            if values.last() == Some(&value) {
                // Again.
                return;
            }
            values.push(value);
        }
        let cancelled = self.rows.get(&record.run).is_some_and(|row| row.cancelled);
        // A value is no effect.
        if cancelled && !record.shielded && record.op != OpKind::Value {
            wrong.push(format!("{} of {id} was recorded after the cancellation", record.key));
        }
        let outcome = Final { op: record.op, state: record.state, payload, claim: record.claim };
        self.finals.insert(place, outcome);
    }

    /// The processes that have not ended.
    pub fn unfinished(&self) -> BTreeSet<&str> {
        self.rows.values().filter(|row| !row.status.is_finished()).map(|row| row.id.as_str()).collect()
    }
}

fn as_pending(record: &RecordOp) -> (i64, Box<str>) {
    (record.claim, record.payload.clone())
}

/// The order in which kinds of operations take effect: that of the variants, effects with the starts and messages.
fn rank(op: &Op) -> u8 {
    match op {
        Op::Spawn(_) | Op::Record(RecordOp { effect: Some(Effect::Spawn(_)), .. }) => 0,
        Op::Raise(_) | Op::Record(RecordOp { effect: Some(Effect::Raise(_)), .. }) => 1,
        Op::Record(_) => 2,
        Op::Await { .. } => 3,
        Op::AcceptCancel { .. } => 4,
        Op::Seen { .. } => 5,
        Op::Finish(_) => 6,
        Op::Park(_) => 7,
        Op::Order(_) => 8,
        _ => 11,
    }
}
