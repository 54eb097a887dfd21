use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, Hash};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, oneshot};

use super::held::Places;
use super::lock;
use super::run::Run;
use super::wake::Context;
use crate::storage::{Effect, InstanceId, Op, Outcome, Raise, Spawn};

/// What an operation's outcome is: or why the database refuses the operation for good.
pub(crate) type Answer = Result<Outcome, Box<str>>;

/// An operation that waits to be committed.
pub(crate) struct Job {
    pub(crate) op: Op,
    /// Who asks.
    pub(crate) from: From,
    /// Who is told. What a process has asked for happens whether it is still there or not.
    pub(crate) reply: Option<oneshot::Sender<Answer>>,
    /// Room for what it may bring into memory.
    pub(crate) places: Option<Places>,
    /// It was sent before, and nobody knows what came of it.
    pub(crate) again: bool,
}

pub(crate) enum From {
    /// A call from outside; it outlives the epoch.
    Host,
    /// The engine itself, in one epoch.
    Epoch(InstanceId),
    /// A run.
    Run(Arc<Run>),
}

impl From {
    fn instance(&self) -> Option<InstanceId> {
        match self {
            Self::Host => None,
            Self::Epoch(instance) => Some(*instance),
            Self::Run(run) => Some(run.instance),
        }
    }
}

impl Job {
    pub(crate) fn new(op: Op, from: From, reply: Option<oneshot::Sender<Answer>>) -> Self {
        Self { op, from, reply, places: None, again: false }
    }

    /// A call from outside that has given up waiting before it was ever sent: it may as well not happen, and the database,
    /// when it comes back, has enough to do for those that still wait.
    fn is_abandoned(&self) -> bool {
        matches!(self.from, From::Host) && !self.again && self.reply.as_ref().is_some_and(oneshot::Sender::is_closed)
    }

    pub(crate) fn answer(self, answer: Answer) {
        if let Some(reply) = self.reply {
            let _ = reply.send(answer);
        }
    }
}

/// The operations of all processes of an instance, in the order in which they came.
pub(crate) struct Queue {
    inner: Mutex<Inner>,
    filled: Notify,
    /// Something was queued of which the writer has not been told.
    unannounced: AtomicBool,
}

#[derive(Default)]
struct Inner {
    jobs: VecDeque<Job>,
    /// The instance that is written for: what belongs to another one is dropped, which tells whoever waits.
    serving: Option<InstanceId>,
    /// The host is dead.
    closed: bool,
    /// How many jobs there may be before those are looked for that nobody waits for any more.
    look_at: usize,
    /// Since when something waits, and nothing has been written.
    stalled: Option<Instant>,
}

impl Inner {
    fn admits(&self, job: &Job) -> bool {
        !self.closed && job.from.instance().is_none_or(|instance| Some(instance) == self.serving)
    }

    /// Takes out what nobody waits for any more, whenever there is twice as much as the last time: while the database is
    /// away, what is queued stays in proportion to those who wait.
    fn abandoned(&mut self) -> VecDeque<Job> {
        const FEW: usize = 1000;
        if self.jobs.len() < self.look_at.max(FEW) {
            return VecDeque::new();
        }
        let (abandoned, stay) = std::mem::take(&mut self.jobs).into_iter().partition(Job::is_abandoned);
        self.jobs = stay;
        self.look_at = self.jobs.len() * 2;
        abandoned
    }
}

impl Queue {
    pub(crate) fn new() -> Self {
        Self { inner: Mutex::default(), filled: Notify::new(), unannounced: AtomicBool::new(false) }
    }

    pub(crate) fn push(&self, job: Job) {
        let mut dropped = Vec::new();
        {
            let mut inner = lock(&self.inner);
            if inner.admits(&job) {
                inner.jobs.push_back(job);
                inner.stalled.get_or_insert_with(Instant::now);
                dropped.extend(inner.abandoned());
            } else {
                dropped.push(job);
            }
        }
        // Outside the lock: its end wakes whoever waits for it.
        drop(dropped);
        if Context::current().run == 0 {
            self.filled.notify_one();
        } else {
            self.unannounced.store(true, Ordering::Release);
        }
    }

    /// Tells the writer what code of a process has queued. Not while it runs: the runtime would keep the writer for its
    /// thread, to be polled next, and that code may block the thread.
    pub(crate) fn announce(&self) {
        if self.unannounced.swap(false, Ordering::AcqRel) {
            self.filled.notify_one();
        }
    }

    /// From now on only this instance's operations are taken, and calls from outside, which wait for one. What an
    /// earlier instance left is dropped, and so is whatever of it comes later.
    pub(crate) fn serve(&self, instance: Option<InstanceId>) {
        let mut dropped = VecDeque::new();
        {
            let mut inner = lock(&self.inner);
            inner.serving = instance;
            let (stay, go) = std::mem::take(&mut inner.jobs).into_iter().partition(|job| inner.admits(job));
            inner.jobs = stay;
            dropped.extend::<VecDeque<Job>>(go);
        }
        drop(dropped);
    }

    /// Drops everything, and from now on whatever comes.
    pub(crate) fn close(&self) {
        let jobs = {
            let mut inner = lock(&self.inner);
            inner.closed = true;
            std::mem::take(&mut inner.jobs)
        };
        drop(jobs);
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.inner).jobs.len()
    }

    /// Something was written; `more` is on its way.
    pub(crate) fn moved(&self, more: bool) {
        let mut inner = lock(&self.inner);
        inner.stalled = (more || !inner.jobs.is_empty()).then(Instant::now);
    }

    /// For how long nothing of what waits has been written.
    pub(crate) fn stalled(&self) -> Duration {
        lock(&self.inner).stalled.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Waits until there is something, or somebody nudges.
    pub(crate) async fn filled(&self) {
        if self.len() == 0 {
            self.filled.notified().await;
        }
    }

    /// Has the writer look, although there may be nothing to write.
    pub(crate) fn nudge(&self) {
        self.filled.notify_one();
    }

    /// The next batch: what is queued, in order, as far as the bounds and the rule of one operation for each row allow.
    pub(crate) fn take(&self, max_ops: usize, max_bytes: usize) -> Vec<Job> {
        // Dropped when the lock is free again.
        let mut abandoned = Vec::new();
        let jobs = &mut lock(&self.inner).jobs;
        let mut taken = Vec::with_capacity(jobs.len().min(max_ops));
        let mut rows = Rows::default();
        let mut bytes = 0;
        while let Some(job) = jobs.front() {
            if job.is_abandoned() {
                abandoned.extend(jobs.pop_front());
                continue;
            }
            bytes += size(&job.op);
            let full = taken.len() == max_ops || (bytes > max_bytes && !taken.is_empty());
            if full || !rows.admit(&job.op) {
                break;
            }
            taken.extend(jobs.pop_front());
        }
        taken
    }

    /// Puts calls from outside back in front, in their order, for the next instance. A start among them may have
    /// happened, and may be another instance's by then: it is not taken any more. An order that may have been carried out
    /// says so ([`Job::again`]).
    pub(crate) fn put_back(&self, back: Vec<Job>) {
        for mut job in back.into_iter().rev() {
            if let Op::Spawn(spawn) = &mut job.op {
                spawn.take = false;
                job.places = None;
            }
            let mut inner = lock(&self.inner);
            if inner.admits(&job) {
                inner.jobs.push_front(job);
            }
        }
        self.filled.notify_one();
    }
}

/// Which rows a batch touches so far, as hashes: two that collide merely wait for the next batch.
#[derive(Default)]
struct Rows {
    seen: HashSet<u64, foldhash::fast::RandomState>,
    /// What people order: written one by one, so there are few in a batch.
    orders: usize,
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
    fn admit(&mut self, op: &Op) -> bool {
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
            Op::Cancel { id } | Op::Resume { id, .. } | Op::Delete { id } => {
                const MOST: usize = 30;
                self.orders += 1;
                self.orders <= MOST && self.enter((Row::Id, id))
            }
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

fn size(op: &Op) -> usize {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A call from outside, and who waits for it.
    fn call(n: usize) -> (Job, oneshot::Receiver<Answer>) {
        let (reply, answer) = oneshot::channel();
        (Job::new(Op::Cancel { id: format!("{n}").into() }, From::Host, Some(reply)), answer)
    }

    #[test]
    fn calls_that_nobody_waits_for_do_not_pile_up() {
        let queue = Queue::new();
        let (first, waits) = call(0);
        queue.push(first);
        for n in 1..100_000 {
            queue.push(call(n).0);
            assert!(queue.len() <= 1000);
        }
        let taken = queue.take(1000, usize::MAX);
        assert_eq!(taken.len(), 1, "only what is waited for is written");
        assert_eq!(queue.len(), 0);
        drop(waits);
    }

    #[test]
    fn what_may_have_happened_is_asked_again_whoever_waits() {
        let queue = Queue::new();
        let instance = InstanceId::new();
        queue.serve(Some(instance));
        let (mut sent, _) = call(1);
        sent.again = true;
        queue.push(sent);
        let (reply, _) = oneshot::channel();
        queue.push(Job::new(Op::Cancel { id: "2".into() }, From::Epoch(instance), Some(reply)));
        assert_eq!(queue.take(1000, usize::MAX).len(), 2);
    }
}
