//! What rows operations touch: which may share a batch, and which must not overtake one another.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hash};

use super::queue::{From, Job};
use crate::storage::{Effect, Op, Raise, Spawn};

/// Which rows a batch touches so far, as hashes: two that collide merely wait for the next batch.
#[derive(Default)]
pub(super) struct Rows {
    seen: HashSet<u64, foldhash::fast::RandomState>,
}

/// What kind of row a hash stands for.
#[derive(Hash)]
enum Row {
    Process,
    Id,
    Event,
    Record,
    Claim,
}

impl Rows {
    fn hash(&self, row: (Row, impl Hash)) -> u64 {
        self.seen.hasher().hash_one(row)
    }

    fn has(&self, row: (Row, impl Hash)) -> bool {
        self.seen.contains(&self.hash(row))
    }

    /// Whether the row is new to the batch.
    fn enter(&mut self, row: (Row, impl Hash)) -> bool {
        let row = self.hash(row);
        self.seen.insert(row)
    }

    /// Whether the operation may join the batch.
    pub(super) fn admit(&mut self, op: &Op) -> bool {
        match op {
            Op::Spawn(spawn) => self.spawn(spawn),
            Op::Raise(raise) => self.raise(raise),
            Op::Record(record) => {
                // Storages apply records before parks and finishes: one behind its run's park would overtake it.
                if self.has((Row::Process, record.run)) || !self.enter((Row::Record, (record.run, &record.key))) {
                    return false;
                }
                match &record.effect {
                    Some(Effect::Spawn(spawn)) => self.spawn(spawn),
                    Some(Effect::Raise(raise)) => self.raise(raise),
                    None => true,
                }
            }
            Op::Await { run, .. } => !self.has((Row::Process, *run)),
            Op::AcceptCancel { run, .. } | Op::Seen { run, .. } => self.enter((Row::Process, *run)),
            Op::Finish(finish) => self.enter((Row::Process, finish.run)),
            Op::Park(park) => self.enter((Row::Process, park.run)),
            Op::Order(order) => self.enter((Row::Id, &order.id)),
            Op::Claim { .. } => self.enter((Row::Claim, ())),
        }
    }

    fn spawn(&mut self, spawn: &Spawn) -> bool {
        self.enter((Row::Id, &spawn.id))
    }

    fn raise(&mut self, raise: &Raise) -> bool {
        self.enter((Row::Event, (&raise.id, &raise.event_id)))
    }
}

pub(super) fn size(op: &Op) -> usize {
    const ROW: usize = 200;
    let spawn = |s: &Spawn| s.input.len() + ROW;
    let raise = |r: &Raise| r.payload.len() + ROW;
    match op {
        Op::Spawn(s) => spawn(s),
        Op::Raise(r) => raise(r),
        Op::Record(r) => {
            let effect = match &r.effect {
                Some(Effect::Spawn(s)) => spawn(s),
                Some(Effect::Raise(r)) => raise(r),
                None => 0,
            };
            r.payload.len() + effect + ROW
        }
        Op::Finish(f) => f.output.as_deref().map_or(0, str::len) + ROW,
        _ => ROW,
    }
}

/// What an operation may not overtake another one at.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key(u64);

/// Keys of operations.
#[derive(Default)]
pub(super) struct Keys {
    held: HashSet<Key>,
    /// The same for all. Two that collide merely wait for each other.
    hasher: foldhash::fast::FixedState,
}

impl Keys {
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.held.clear();
    }

    /// The operation must stay behind one that is here.
    pub(super) fn touches(&self, job: &Job) -> bool {
        self.of(job).into_iter().flatten().any(|key| self.held.contains(&key))
    }

    pub(super) fn extend(&mut self, others: &Self) {
        self.held.extend(&others.held);
    }

    pub(super) fn add(&mut self, job: &Job) {
        let keys = self.of(job);
        self.held.extend(keys.into_iter().flatten());
    }

    /// A process by its id, for what others do to it; a run, for what it does itself; both, for what changes its own row.
    fn of(&self, job: &Job) -> [Option<Key>; 2] {
        let id = |id: &str| Some(Key(self.hasher.hash_one((Row::Id, id))));
        let run = |run| Some(Key(self.hasher.hash_one((Row::Process, run))));
        let own = match &job.from {
            From::Run(run) => id(&run.id),
            From::Host | From::Epoch(_) => None,
        };
        match &job.op {
            Op::Spawn(spawn) => [id(&spawn.id), None],
            Op::Raise(raise) => [id(&raise.id), None],
            Op::Record(record) => match &record.effect {
                Some(Effect::Spawn(spawn)) => [run(record.run), id(&spawn.id)],
                Some(Effect::Raise(raise)) => [run(record.run), id(&raise.id)],
                None => [run(record.run), None],
            },
            Op::Await { run: waiter, id: target, .. } => [run(*waiter), id(target)],
            Op::AcceptCancel { run: it, .. } | Op::Seen { run: it, .. } => [run(*it), own],
            Op::Finish(finish) => [run(finish.run), own],
            Op::Park(park) => [run(park.run), own],
            Op::Order(order) => [id(&order.id), None],
            Op::Claim { .. } => [None, None],
        }
    }
}
