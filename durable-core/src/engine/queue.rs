use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, oneshot};

use super::aside::{Aside, take_nothing};
use super::held::Places;
use super::lock;
use super::rows::{Rows, size};
use super::run::Run;
use super::wake::Context;
use crate::storage::{InstanceId, Op, Outcome};

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

    /// What it is, for people.
    pub(super) fn words(&self) -> String {
        let (what, whose): (&str, &dyn fmt::Display) = match &self.op {
            Op::Spawn(spawn) => ("the start of", &spawn.id),
            Op::Raise(raise) => ("a message to", &raise.id),
            Op::Record(record) => return format!("the record {} of run {}", record.key, record.run),
            Op::Await { run, .. } => ("a wait of run", run),
            Op::AcceptCancel { run, .. } => ("the cancellation of run", run),
            Op::Seen { run, .. } => ("a note of run", run),
            Op::Finish(finish) => ("the end of run", &finish.run),
            Op::Park(park) => ("the park of run", &park.run),
            Op::Order(order) => (order.what.word(), &order.id),
            Op::Claim { kind, .. } => ("a claim of kind", kind),
        };
        format!("{what} {whose}")
    }

    pub(crate) fn answer(self, answer: Answer) {
        if let Some(reply) = self.reply {
            let _ = reply.send(answer);
        }
    }
}

/// The operations of all processes of an instance, in the order in which they came.
pub(crate) struct Queue {
    pub(super) inner: Mutex<Inner>,
    filled: Notify,
    /// Something was set aside.
    pub(super) aside: Notify,
    /// Something was queued of which the writer has not been told.
    unannounced: AtomicBool,
}

#[derive(Default)]
pub(super) struct Inner {
    jobs: VecDeque<Job>,
    /// What people order: written one by one, so there are few in a batch, and all else passes them.
    orders: VecDeque<Job>,
    pub(super) aside: Aside,
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

    fn lane(&mut self, job: &Job) -> &mut VecDeque<Job> {
        match job.op {
            Op::Order(_) => &mut self.orders,
            _ => &mut self.jobs,
        }
    }

    fn len(&self) -> usize {
        self.jobs.len() + self.orders.len()
    }

    /// All that is here, what was set aside before what came later.
    fn take_all(&mut self) -> Vec<Job> {
        let aside = self.aside.take();
        aside.chain(std::mem::take(&mut self.jobs)).chain(std::mem::take(&mut self.orders)).collect()
    }

    /// Puts a job back in front. Returns a job of an earlier instance, for the caller to drop outside the lock.
    pub(super) fn put_first(&mut self, job: Job) -> Option<Job> {
        if !self.admits(&job) {
            return Some(job);
        }
        self.lane(&job).push_front(job);
        None
    }

    /// Takes out what nobody waits for any more, whenever there is twice as much as the last time: while the database is
    /// away, what is queued stays in proportion to those who wait.
    fn abandoned(&mut self) -> VecDeque<Job> {
        const FEW: usize = 1000;
        if self.len() < self.look_at.max(FEW) {
            return VecDeque::new();
        }
        let mut abandoned = VecDeque::new();
        for lane in [&mut self.jobs, &mut self.orders] {
            let (go, stay): (VecDeque<Job>, _) = std::mem::take(lane).into_iter().partition(Job::is_abandoned);
            *lane = stay;
            abandoned.extend(go);
        }
        self.look_at = self.len() * 2;
        abandoned
    }

    /// Moves the first operations of one lane into a batch, in order, as far as its bounds and its rows allow. What must wait
    /// behind operations that are set aside goes there.
    fn fill(&mut self, batch: &mut Filling, lane: impl Fn(&mut Self) -> &mut VecDeque<Job>, most: usize) {
        let before = batch.taken.len();
        while let Some(job) = lane(self).front() {
            if job.is_abandoned() {
                batch.abandoned.extend(lane(self).pop_front());
                continue;
            }
            if !self.aside.is_empty() {
                let job = lane(self).pop_front().and_then(|job| self.aside.keeps(job));
                let Some(job) = job else { continue };
                lane(self).push_front(job);
            }
            let Some(job) = lane(self).front() else { break };
            let bytes = batch.bytes + size(&job.op);
            let full = batch.taken.len() - before == most || (bytes > batch.max_bytes && !batch.taken.is_empty());
            if full || !batch.rows.admit(&job.op) {
                break;
            }
            batch.bytes = bytes;
            batch.taken.extend(lane(self).pop_front());
        }
    }
}

/// A batch that is being put together.
#[derive(Default)]
struct Filling {
    taken: Vec<Job>,
    rows: Rows,
    bytes: usize,
    max_bytes: usize,
    /// Dropped when the lock is free again.
    abandoned: Vec<Job>,
}

impl Queue {
    pub(crate) fn new() -> Self {
        Self {
            inner: Mutex::default(),
            filled: Notify::new(),
            aside: Notify::new(),
            unannounced: AtomicBool::new(false),
        }
    }

    pub(crate) fn push(&self, job: Job) {
        let mut dropped = Vec::new();
        {
            let mut inner = lock(&self.inner);
            if inner.admits(&job) {
                inner.lane(&job).push_back(job);
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
        let mut dropped = Vec::new();
        {
            let mut inner = lock(&self.inner);
            inner.serving = instance;
            for job in inner.take_all() {
                if inner.admits(&job) {
                    inner.lane(&job).push_back(job);
                } else {
                    dropped.push(job);
                }
            }
        }
        drop(dropped);
    }

    /// Drops everything, and from now on whatever comes.
    pub(crate) fn close(&self) {
        let jobs = {
            let mut inner = lock(&self.inner);
            inner.closed = true;
            inner.take_all()
        };
        drop(jobs);
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.inner).len()
    }

    /// Something was written; `more` is on its way.
    pub(crate) fn moved(&self, more: bool) {
        let mut inner = lock(&self.inner);
        inner.stalled = (more || inner.len() > 0).then(Instant::now);
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

    /// The next batch: what is queued, in order, as far as the bounds and the rule of one operation for each row allow; and
    /// some of what people order.
    pub(crate) fn take(&self, max_ops: usize, max_bytes: usize) -> Vec<Job> {
        /// Each is written by itself, so many in a batch would hold up the rest.
        const ORDERS: usize = 30;
        let mut inner = lock(&self.inner);
        let orders = inner.orders.len().min(ORDERS).min(max_ops / 2 + 1);
        let mut batch =
            Filling { max_bytes, taken: Vec::with_capacity(inner.len().min(max_ops)), ..Filling::default() };
        inner.fill(&mut batch, |inner| &mut inner.jobs, max_ops.saturating_sub(orders).max(usize::from(orders == 0)));
        inner.fill(&mut batch, |inner| &mut inner.orders, orders);
        drop(inner);
        batch.taken
    }

    /// Puts calls from outside back in front, in their order, for the next instance. A start among them may have
    /// happened, and may be another instance's by then: it is not taken any more. An order that may have been carried out
    /// says so ([`Job::again`]).
    pub(crate) fn put_back(&self, back: Vec<Job>) {
        for mut job in back.into_iter().rev() {
            take_nothing(&mut job);
            self.put_first(job);
        }
        self.nudge();
    }

    /// Puts one that was taken back in front.
    pub(super) fn put_first(&self, job: Job) {
        let dropped = lock(&self.inner).put_first(job);
        drop(dropped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A call from outside, and who waits for it.
    fn call(n: usize) -> (Job, oneshot::Receiver<Answer>) {
        let (reply, answer) = oneshot::channel();
        (Job::new(Op::cancel(format!("{n}").into()), From::Host, Some(reply)), answer)
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
        queue.push(Job::new(Op::cancel("2".into()), From::Epoch(instance), Some(reply)));
        assert_eq!(queue.take(1000, usize::MAX).len(), 2);
    }
}
