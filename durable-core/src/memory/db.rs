use chrono::{DateTime, Utc};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Weak};

#[cfg(durable_mutations)]
use crate::mutation::{Rule, is_broken};
use crate::storage::{
    Batch, Claimed, Counted, Effect, Ended, EventRow, Fate, Filter, Finish, Forget, InstanceId, LockState, NewInstance,
    Op, OpKind, Order, Outcome, Park, Peer, Poll, Polled, ProcessRow, Raise, Raised, Record, RecordKey, RecordOp,
    RecordState, Result, RunId, RunState, Spawn, Spawned, Status, StorageError, Target, Wanted, What,
};

/// The tables.
#[derive(Default)]
pub(super) struct Db {
    instances: BTreeMap<InstanceId, Instance>,
    processes: BTreeMap<RunId, Process>,
    current: HashMap<(Box<str>, Box<str>), RunId>,
    records: BTreeMap<(RunId, RecordKey), Record>,
    events: BTreeMap<(RunId, i64), Event>,
    /// Who awaits whom: target, then waiter.
    waiters: BTreeSet<(RunId, RunId)>,
    audit: Vec<(RunId, Forget, Record)>,
}

struct Instance {
    namespace: Box<str>,
    kinds: Vec<Box<str>>,
    expiry: std::time::Duration,
    heartbeat_at: DateTime<Utc>,
    alive: Weak<()>,
    generation: i64,
    fenced: bool,
}

#[derive(Clone)]
struct Process {
    namespace: Box<str>,
    row: ProcessRow,
    digest: Box<str>,
    /// Signals came from another instance than the owner, which has not said that it has read them.
    signalled: bool,
}

struct Event {
    row: EventRow,
    id: Box<str>,
    taken: bool,
}

impl Db {
    pub(super) fn enlist(&mut self, new: &NewInstance, now: DateTime<Utc>) -> Arc<()> {
        let alive = Arc::new(());
        let instance = self.instances.entry(new.id).or_insert_with(|| Instance {
            namespace: new.namespace.clone(),
            kinds: new.kinds.clone(),
            expiry: new.expiry,
            heartbeat_at: now,
            alive: Weak::new(),
            generation: 0,
            fenced: false,
        });
        instance.alive = Arc::downgrade(&alive);
        alive
    }

    pub(super) fn beat(&mut self, instance: InstanceId, now: DateTime<Utc>) -> bool {
        let living = self.instances.get_mut(&instance).filter(|instance| !instance.fenced);
        living.map(|instance| instance.heartbeat_at = now).is_some()
    }

    pub(super) fn refence(&mut self, instance: InstanceId, generation: i64) -> Result<()> {
        let living = self.instances.get_mut(&instance).filter(|instance| !instance.fenced);
        let living = living.ok_or(StorageError::Fenced)?;
        living.generation = living.generation.max(generation);
        Ok(())
    }

    pub(super) fn commit(&mut self, batch: &Batch, now: DateTime<Utc>) -> Result<Vec<Outcome>> {
        let fence = batch.fence;
        let instance = self.instances.get(&fence.instance).filter(|i| !i.fenced && i.generation == fence.generation);
        let fenced = instance.is_none();
        #[cfg(durable_mutations)]
        let fenced = fenced && !is_broken(Rule::Fence) && !is_broken(Rule::FenceUnderLock);
        if fenced {
            return Err(StorageError::Fenced);
        }
        let mut order: Vec<usize> = (0..batch.ops.len()).collect();
        order.sort_by_key(|at| rank(&batch.ops[*at]));
        let mut outcomes: Vec<Outcome> = vec![Outcome::Lost; batch.ops.len()];
        for at in order {
            outcomes[at] = self.apply(fence.instance, &batch.namespace, &batch.ops[at], now);
        }
        Ok(outcomes)
    }

    fn apply(&mut self, me: InstanceId, namespace: &str, op: &Op, now: DateTime<Utc>) -> Outcome {
        match op {
            Op::Spawn(spawn) => Outcome::Spawned(self.spawn(me, namespace, spawn, now)),
            Op::Raise(raise) => Outcome::Raised(self.raise(me, namespace, raise, now)),
            Op::Record(op) => self.write(me, namespace, op, now),
            Op::Await { run, id, target } => Outcome::Awaits(self.wait(namespace, *run, id, *target)),
            Op::AcceptCancel { run, claim, seq } => self.own(me, *run, *claim, |process| {
                process.row.cancelled_at.get_or_insert(now);
                process.row.cancelled_seq.get_or_insert(*seq);
            }),
            Op::Seen { run, claim, signals } => self.own(me, *run, *claim, |process| {
                process.signalled &= process.row.signals != *signals;
            }),
            Op::Finish(finish) => self.finish(me, finish, now),
            Op::Park(park) => self.park(me, park, now),
            Op::Order(order) => self.order(me, namespace, order, now),
            Op::Claim { kind, limit } => Outcome::Claimed(self.claim(me, namespace, kind, *limit, now)),
        }
    }

    /// Changes a process that is the instance's under that claim.
    fn own(&mut self, me: InstanceId, run: RunId, claim: i64, change: impl FnOnce(&mut Process)) -> Outcome {
        match self.owned_process(me, run, claim) {
            Some(process) => {
                change(process);
                Outcome::Recorded
            }
            None => Outcome::Lost,
        }
    }

    fn owned_process(&mut self, me: InstanceId, run: RunId, claim: i64) -> Option<&mut Process> {
        self.processes.get_mut(&run).filter(|p| p.row.owner == Some(me) && p.row.claim == claim)
    }

    fn current_run(&self, namespace: &str, id: &str) -> Option<RunId> {
        self.current.get(&(namespace.into(), id.into())).copied()
    }

    /// What a start's id has: the run that was asked for, if it is there, else the current one.
    fn spawned(&self, namespace: &str, spawn: &Spawn) -> Option<Spawned> {
        let current = || self.processes.get(&self.current_run(namespace, &spawn.id)?);
        self.processes.get(&spawn.run).or_else(current).map(|process| Spawned {
            run: process.row.run,
            #[cfg(durable_mutations)]
            existed: process.row.run != spawn.run || is_broken(Rule::OwnStart),
            #[cfg(not(durable_mutations))]
            existed: process.row.run != spawn.run,
            kind: process.row.kind.clone(),
            digest: process.digest.clone(),
        })
    }

    fn spawn(&mut self, me: InstanceId, namespace: &str, spawn: &Spawn, now: DateTime<Utc>) -> Spawned {
        let makes_way = |there: &Spawned| {
            there.existed
                && spawn.restart_finished
                && there.kind == spawn.kind
                && self.processes.get(&there.run).is_some_and(|process| process.row.status.is_finished())
        };
        if let Some(there) = self.spawned(namespace, spawn)
            && !makes_way(&there)
        {
            return there;
        }
        let row = ProcessRow {
            run: spawn.run,
            id: spawn.id.clone(),
            kind: spawn.kind.clone(),
            status: if spawn.take { Status::Running } else { Status::Waiting },
            input: spawn.input.clone(),
            output: None,
            reason: None,
            owner: spawn.take.then_some(me),
            claim: i64::from(spawn.take),
            calm_claim: 0,
            wake_at: (!spawn.take).then_some(now),
            waiting_for: None,
            signals: 0,
            cancel_requested_at: None,
            cancelled_at: None,
            cancelled_seq: None,
            created_at: now,
            status_at: now,
            finished_at: None,
        };
        let process = Process { namespace: namespace.into(), row, digest: spawn.digest.clone(), signalled: false };
        self.processes.insert(spawn.run, process);
        self.current.insert((namespace.into(), spawn.id.clone()), spawn.run);
        Spawned { run: spawn.run, existed: false, kind: spawn.kind.clone(), digest: spawn.digest.clone() }
    }

    /// What became of a message.
    fn raised(&self, me: InstanceId, namespace: &str, raise: &Raise) -> Raised {
        let Some(run) = self.current_run(namespace, &raise.id) else { return Raised::NotFound };
        let mine = self.processes.get(&run).is_some_and(|process| process.row.owner == Some(me));
        let events = self.events.range((run, 0)..=(run, i64::MAX));
        #[cfg(durable_mutations)]
        let events = events.take(if is_broken(Rule::OwnMessage) { 0 } else { usize::MAX });
        match events.into_iter().find(|(_, event)| event.id == raise.event_id) {
            Some((&(_, number), _)) => Raised::Delivered { run, number, mine },
            None => Raised::Finished,
        }
    }

    fn raise(&mut self, me: InstanceId, namespace: &str, raise: &Raise, now: DateTime<Utc>) -> Raised {
        let raised = self.raised(me, namespace, raise);
        if raised != Raised::Finished {
            return raised;
        }
        let unfinished = |process: &&mut Process| !process.row.status.is_finished();
        let run = self.current_run(namespace, &raise.id);
        let Some(process) = run.and_then(|run| self.processes.get_mut(&run)).filter(unfinished) else { return raised };
        process.signal(me, now);
        let (run, number, mine) = (process.row.run, process.row.signals, process.row.owner == Some(me));
        let row = EventRow { number, name: raise.name.clone(), payload: raise.payload.clone(), raised_at: now };
        self.events.insert((run, number), Event { row, id: raise.event_id.clone(), taken: false });
        Raised::Delivered { run, number, mine }
    }

    fn write(&mut self, me: InstanceId, namespace: &str, op: &RecordOp, now: DateTime<Utc>) -> Outcome {
        let place = (op.run, op.key.clone());
        if self.owned_process(me, op.run, op.claim).is_none() {
            let as_sent = |there: &Record| there.claim == op.claim && there.seq == op.seq && there.state == op.state;
            return match (self.records.get(&place).is_some_and(as_sent), &op.effect) {
                (false, _) => Outcome::Lost,
                // An earlier attempt, in whose batch the run was given up or ended.
                (true, None) => Outcome::Recorded,
                (true, Some(Effect::Raise(raise))) => Outcome::Raised(self.raised(me, namespace, raise)),
                (true, Some(Effect::Spawn(spawn))) => {
                    self.spawned(namespace, spawn).map_or(Outcome::Lost, Outcome::Spawned)
                }
            };
        }
        if let Some(there) = self.records.get(&place)
            && there.state != RecordState::Pending
            && there.op != OpKind::Value
        {
            #[cfg(durable_mutations)]
            if is_broken(Rule::OwnRecord) {
                return Outcome::Lost;
            }
            // An earlier attempt of the same write, or somebody else's.
            if there.claim != op.claim || there.seq != op.seq {
                return Outcome::Lost;
            }
        }
        let (payload, outcome) = match &op.effect {
            None => (op.payload.clone(), Outcome::Recorded),
            Some(Effect::Raise(raise)) => {
                let raised = self.raise(me, namespace, raise, now);
                (raised.as_json().into(), Outcome::Raised(raised))
            }
            Some(Effect::Spawn(spawn)) => {
                let spawned = self.spawn(me, namespace, spawn, now);
                (spawned.to_json(&op.payload), Outcome::Spawned(spawned))
            }
        };
        #[cfg(durable_mutations)]
        if op.op == OpKind::Value && is_broken(Rule::SetOverwrites) && self.records.contains_key(&place) {
            return outcome;
        }
        let record =
            Record { op: op.op, state: op.state, payload, attempts: op.attempts, seq: op.seq, claim: op.claim };
        self.records.insert(place, record);
        if let Some(event) = op.takes.and_then(|number| self.events.get_mut(&(op.run, number))) {
            event.taken = true;
        }
        if let Some(target) = op.awaited {
            self.waiters.remove(&(target, op.run));
        }
        outcome
    }

    fn wait(&mut self, namespace: &str, run: RunId, id: &str, target: Option<RunId>) -> Option<(RunId, Option<Ended>)> {
        let target = target.or_else(|| self.current_run(namespace, id))?;
        let process = self.processes.get(&target)?;
        if process.row.status.is_finished() {
            return Some((target, Some((process.row.status, process.row.output.clone()))));
        }
        self.waiters.insert((target, run));
        Some((target, None))
    }

    /// Signals everybody who awaits the run, and says which of them are the instance's.
    fn wake_waiters(&mut self, me: InstanceId, target: RunId, now: DateTime<Utc>) -> Vec<RunId> {
        let waiters: Vec<RunId> =
            self.waiters.range((target, min())..=(target, max())).map(|(_, waiter)| *waiter).collect();
        let mut mine = Vec::new();
        for waiter in waiters {
            if let Some(process) = self.processes.get_mut(&waiter).filter(|p| !p.row.status.is_finished()) {
                process.signal(me, now);
                if process.row.owner == Some(me) {
                    mine.push(waiter);
                }
            }
        }
        mine
    }

    fn finish(&mut self, me: InstanceId, finish: &Finish, now: DateTime<Utc>) -> Outcome {
        let Some(process) = self.owned_process(me, finish.run, finish.claim) else {
            let mine_before = self.processes.get(&finish.run).is_some_and(|process| {
                process.row.owner.is_none() && process.row.claim == finish.claim && process.row.status == finish.status
            });
            #[cfg(durable_mutations)]
            let mine_before = mine_before && !is_broken(Rule::OwnEnd);
            return match mine_before {
                true if finish.status.is_finished() => {
                    Outcome::Finished { wakes: self.wake_waiters(me, finish.run, now) }
                }
                true => Outcome::Finished { wakes: Vec::new() },
                false => Outcome::Lost,
            };
        };
        let row = &mut process.row;
        row.status = finish.status;
        row.output = finish.output.clone();
        row.reason = finish.reason.clone();
        row.owner = None;
        row.wake_at = None;
        row.waiting_for = None;
        row.status_at = now;
        row.finished_at = finish.status.is_finished().then_some(now);
        process.signalled = false;
        let wakes = if finish.status.is_finished() {
            self.waiters.retain(|(_, waiter)| *waiter != finish.run);
            self.wake_waiters(me, finish.run, now)
        } else {
            Vec::new()
        };
        Outcome::Finished { wakes }
    }

    fn park(&mut self, me: InstanceId, park: &Park, now: DateTime<Utc>) -> Outcome {
        let Some(process) = self.owned_process(me, park.run, park.claim) else {
            let parked = |p: &Process| p.row.calm_claim >= park.claim - park.deaths;
            let parked_before = self.processes.get(&park.run).is_some_and(parked);
            #[cfg(durable_mutations)]
            let parked_before = parked_before && !is_broken(Rule::OwnPark);
            return if parked_before { Outcome::Recorded } else { Outcome::Lost };
        };
        if park.seen.is_some_and(|seen| seen != process.row.signals) {
            return Outcome::Signalled(process.row.signals);
        }
        let row = &mut process.row;
        row.status = Status::Waiting;
        row.owner = None;
        row.calm_claim = row.claim - park.deaths;
        row.wake_at = park.wake_at.map(|at| if park.seen.is_none() { at.min(now) } else { at });
        row.waiting_for = park.waiting_for.clone();
        row.status_at = now;
        process.signalled = false;
        Outcome::Recorded
    }

    fn order(&mut self, me: InstanceId, namespace: &str, order: &Order, now: DateTime<Utc>) -> Outcome {
        let current = self.current_run(namespace, &order.id);
        let meant = order.run.or(current);
        let is_its_own = |process: &&Process| *process.namespace == *namespace && process.row.id == order.id;
        let process = meant.and_then(|run| self.processes.get(&run)).filter(is_its_own);
        let before = process.map(|process| (process.row.run, process.row.status));
        let wakes = match (&order.what, before.filter(|(run, _)| Some(*run) == current)) {
            (What::Delete, None) => match before {
                // An earlier one, alone.
                Some((run, _)) => self.delete(me, [run], now),
                None => Vec::new(),
            },
            (_, None) => Vec::new(),
            (What::Cancel, Some((run, status))) if !status.is_finished() => self.cancel(me, run, now),
            (What::Terminate { reason }, Some((run, status))) if !status.is_finished() => {
                self.terminate(me, run, reason, now)
            }
            // An earlier attempt may have done it, whose answer was lost.
            (What::Cancel | What::Terminate { .. }, Some((run, Status::Cancelled))) => self.wake_waiters(me, run, now),
            (What::Resume { forget }, Some((run, Status::Stuck | Status::Failed))) => {
                self.resume(run, forget, now);
                Vec::new()
            }
            (What::Delete, Some((_, status))) if status.is_finished() || status == Status::Stuck => {
                self.current.remove(&(namespace.into(), order.id.clone()));
                let runs: Vec<RunId> =
                    self.processes.values().filter(is_its_own).map(|process| process.row.run).collect();
                self.delete(me, runs, now)
            }
            _ => Vec::new(),
        };
        Outcome::Asked { before, wakes, again: false, more: false }
    }

    fn cancel(&mut self, me: InstanceId, run: RunId, now: DateTime<Utc>) -> Vec<RunId> {
        let Some(process) = self.processes.get_mut(&run) else { return Vec::new() };
        process.row.cancel_requested_at.get_or_insert(now);
        if process.row.claim == 0 && process.row.owner.is_none() {
            process.row.status = Status::Cancelled;
            process.row.wake_at = None;
            process.row.status_at = now;
            process.row.finished_at = Some(now);
            return self.wake_waiters(me, run, now);
        }
        process.signal(me, now);
        if process.row.owner == Some(me) { vec![run] } else { Vec::new() }
    }

    fn terminate(&mut self, me: InstanceId, run: RunId, reason: &str, now: DateTime<Utc>) -> Vec<RunId> {
        if let Some(process) = self.processes.get_mut(&run) {
            process.signalled = false;
            let row = &mut process.row;
            row.status = Status::Cancelled;
            row.owner = None;
            row.calm_claim = row.claim;
            row.wake_at = None;
            row.waiting_for = None;
            row.output = None;
            row.reason = Some(reason.into());
            row.status_at = now;
            row.finished_at = Some(now);
            row.cancel_requested_at.get_or_insert(now);
        }
        self.waiters.retain(|(_, waiter)| *waiter != run);
        self.wake_waiters(me, run, now)
    }

    fn resume(&mut self, run: RunId, forget: &[Forget], now: DateTime<Utc>) {
        let Some(process) = self.processes.get_mut(&run) else { return };
        let row = &mut process.row;
        row.status = Status::Waiting;
        row.wake_at = Some(now);
        row.calm_claim = row.claim;
        row.output = None;
        row.reason = None;
        row.status_at = now;
        row.finished_at = None;
        for forget in forget {
            if let Some(record) = self.records.remove(&(run, forget.key.clone())) {
                self.audit.push((run, forget.clone(), record));
            }
        }
    }

    fn delete(&mut self, me: InstanceId, runs: impl IntoIterator<Item = RunId>, now: DateTime<Utc>) -> Vec<RunId> {
        let mut wakes = Vec::new();
        for run in runs {
            wakes.extend(self.wake_waiters(me, run, now));
            self.waiters.retain(|(_, waiter)| *waiter != run);
            self.processes.remove(&run);
            self.records.retain(|(of, _), _| *of != run);
            self.events.retain(|(of, _), _| *of != run);
            self.audit.retain(|(of, ..)| *of != run);
        }
        wakes
    }

    fn claim(&mut self, me: InstanceId, namespace: &str, kind: &str, limit: usize, now: DateTime<Utc>) -> Vec<Claimed> {
        let due = |process: &&mut Process| {
            let due = process.row.status == Status::Waiting && process.row.wake_at.is_some_and(|at| at <= now);
            #[cfg(durable_mutations)]
            let due = due || is_broken(Rule::ClaimChecksOwner) && process.row.owner.is_some_and(|owner| owner != me);
            due && *process.namespace == *namespace && *process.row.kind == *kind
        };
        let mut due: Vec<&mut Process> = self.processes.values_mut().filter(due).collect();
        due.sort_by_key(|process| process.row.wake_at);
        due.truncate(limit);
        let claim = |process: &mut Process| {
            let row = &mut process.row;
            row.owner = Some(me);
            row.claim += 1;
            row.status = Status::Running;
            row.wake_at = None;
            row.waiting_for = None;
            row.status_at = now;
            Claimed { run: row.run, claim: row.claim }
        };
        due.into_iter().map(claim).collect()
    }

    pub(super) fn load(&self, Wanted { run, seen }: Wanted, whole: bool) -> Option<RunState> {
        let process = self.processes.get(&run)?;
        let first = RecordKey { scope: crate::storage::Scope::Process, name: "".into(), key: "".into() };
        let records = if whole {
            let of_run = self.records.range((run, first)..).take_while(|((of, _), _)| *of == run);
            of_run.map(|((_, key), record)| (key.clone(), record.clone())).collect()
        } else {
            Vec::new()
        };
        let events = self.events.range((run, 0)..=(run, i64::MAX));
        let events = events.filter(|((_, number), event)| !event.taken && *number > seen);
        let target = |run: RunId| match self.processes.get(&run).map(|process| &process.row) {
            None => Target { run, id: "".into(), fate: Fate::Gone },
            Some(row) if row.status.is_finished() => {
                let at = row.finished_at.unwrap_or(row.status_at);
                Target { run, id: row.id.clone(), fate: Fate::Ended((row.status, row.output.clone()), at) }
            }
            Some(row) => Target { run, id: row.id.clone(), fate: Fate::Open },
        };
        let awaited = self.waiters.iter().filter(|(_, waiter)| *waiter == run).map(|(run, _)| target(*run));
        Some(RunState {
            process: process.row.clone(),
            records,
            events: events.map(|(_, event)| event.row.clone()).collect(),
            targets: awaited.filter(|target| whole || target.fate != Fate::Open).collect(),
        })
    }

    pub(super) fn owned(&self, instance: InstanceId, after: Option<RunId>, limit: usize) -> Vec<(RunId, i64)> {
        let after = after.unwrap_or(min());
        let owned = self
            .processes
            .range(after..)
            .filter(|(run, process)| **run != after && process.row.owner == Some(instance));
        owned.take(limit).map(|(run, process)| (*run, process.row.claim)).collect()
    }

    pub(super) fn poll(&self, poll: &Poll, now: DateTime<Utc>) -> Polled {
        let mut due: BTreeMap<Box<str>, DateTime<Utc>> = BTreeMap::new();
        let mut signalled = Vec::new();
        for process in self.processes.values() {
            let row = &process.row;
            if process.namespace == poll.namespace
                && row.status == Status::Waiting
                && poll.kinds.contains(&row.kind)
                && let Some(at) = row.wake_at
            {
                due.entry(row.kind.clone()).and_modify(|first| *first = at.min(*first)).or_insert(at);
            }
            if row.owner == Some(poll.instance) && process.signalled {
                signalled.push((row.run, row.signals));
            }
        }
        let ended = |run: &&RunId| self.processes.get(run).is_none_or(|process| process.row.status.is_finished());
        let ended = poll.watched.iter().filter(ended).copied().collect();
        Polled { now, due: due.into_iter().collect(), signalled, ended, more: false }
    }

    pub(super) fn peers(&self, namespace: &str, me: InstanceId) -> Vec<Peer> {
        let others = self.instances.iter().filter(|(id, instance)| **id != me && *instance.namespace == *namespace);
        let peer = |(id, instance): (&InstanceId, &Instance)| Peer {
            instance: *id,
            heartbeat_at: instance.heartbeat_at,
            lock: if instance.alive.strong_count() > 0 { LockState::Held } else { LockState::Free },
            fenced: instance.fenced,
            comeback: std::time::Duration::ZERO,
            expiry: instance.expiry,
            kinds: instance.kinds.clone(),
        };
        let mut peers: Vec<Peer> = others.map(peer).collect();
        peers.sort_by_key(|peer| peer.instance);
        peers
    }

    pub(super) fn fence(&mut self, seen: &Peer) -> bool {
        match self.instances.get_mut(&seen.instance) {
            Some(instance) if instance.fenced || instance.heartbeat_at == seen.heartbeat_at => {
                instance.fenced = true;
                true
            }
            _ => false,
        }
    }

    pub(super) fn release(&mut self, fenced: InstanceId, limit: usize, now: DateTime<Utc>) -> usize {
        if self.instances.get(&fenced).is_none_or(|instance| !instance.fenced) {
            return 0;
        }
        let owned = self.owned(fenced, None, limit);
        for (run, _) in &owned {
            if let Some(process) = self.processes.get_mut(run) {
                process.row.owner = None;
                process.row.status = Status::Waiting;
                process.row.wake_at = Some(now);
                process.row.status_at = now;
                process.signalled = false;
            }
        }
        if owned.is_empty() {
            self.instances.remove(&fenced);
        }
        owned.len()
    }

    pub(super) fn retire(&mut self, instance: InstanceId, now: DateTime<Utc>) {
        if let Some(instance) = self.instances.get_mut(&instance) {
            instance.fenced = true;
        }
        while self.release(instance, usize::MAX, now) > 0 {}
    }

    pub(super) fn find(&self, namespace: &str, id: &str, run: Option<RunId>) -> Option<ProcessRow> {
        let run = run.or_else(|| self.current_run(namespace, id))?;
        let process = self.processes.get(&run)?;
        (*process.namespace == *namespace && *process.row.id == *id)
            .then(|| ProcessRow { input: "null".into(), ..process.row.clone() })
    }

    pub(super) fn record(&self, run: RunId, key: &RecordKey) -> Option<Record> {
        self.records.get(&(run, key.clone())).cloned()
    }

    fn filtered(&self, namespace: &str, filter: &Filter) -> impl Iterator<Item = &Process> {
        let (namespace, filter) = (namespace.to_owned(), filter.clone());
        self.processes.values().filter(move |process| {
            let row = &process.row;
            *process.namespace == *namespace
                && filter.kind.as_ref().is_none_or(|kind| row.kind == *kind)
                && filter.status.is_none_or(|status| row.status == status)
                && filter.unchanged_since.is_none_or(|since| row.status_at <= since)
                && filter.after.is_none_or(|after| row.run > after)
        })
    }

    pub(super) fn list(&self, namespace: &str, filter: &Filter) -> Vec<ProcessRow> {
        let row = |process: &Process| ProcessRow { input: "null".into(), output: None, ..process.row.clone() };
        self.filtered(namespace, filter).take(filter.limit).map(row).collect()
    }

    pub(super) fn count(&self, namespace: &str, filter: &Filter) -> Vec<Counted> {
        let mut counts: BTreeMap<(Box<str>, Status), u64> = BTreeMap::new();
        for process in self.filtered(namespace, filter) {
            *counts.entry((process.row.kind.clone(), process.row.status)).or_default() += 1;
        }
        let served = |kind: &str| {
            let mut live = self.instances.values().filter(|i| !i.fenced && *i.namespace == *namespace);
            live.any(|instance| instance.kinds.iter().any(|registered| **registered == *kind))
        };
        let counted = |((kind, status), count): ((Box<str>, Status), u64)| {
            let served = served(&kind);
            Counted { kind, status, count, served }
        };
        counts.into_iter().map(counted).collect()
    }
}

impl Process {
    /// Counts a signal and makes the process due if it waits.
    fn signal(&mut self, me: InstanceId, now: DateTime<Utc>) {
        self.row.signals += 1;
        match self.row.owner {
            Some(owner) => self.signalled |= owner != me,
            None if self.row.status == Status::Waiting => {
                self.row.wake_at = Some(self.row.wake_at.map_or(now, |at| at.min(now)));
            }
            None => {}
        }
    }
}

/// The order in which kinds of operations take effect.
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
        Op::Claim { .. } => 9,
    }
}

const fn min() -> RunId {
    RunId(uuid::Uuid::nil())
}
const fn max() -> RunId {
    RunId(uuid::Uuid::max())
}
