use std::collections::{HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex};
use tokio::sync::{Notify, oneshot};

use super::held::Places;
use super::lock;
use super::run::Run;
use crate::storage::{Effect, InstanceId, Op, Outcome, Raise, Spawn};

/// What an operation's outcome is: or why the database refuses the operation for good.
pub(crate) type Answer = Result<Outcome, Box<str>>;

/// An operation that waits to be committed.
pub(crate) struct Job {
    pub(crate) op: Op,
    /// Who asks.
    pub(crate) from: From,
    /// Who is told. A caller that has gone away changes nothing: the operation happens all the same.
    pub(crate) reply: Option<oneshot::Sender<Answer>>,
    /// Room for what it may bring into memory.
    pub(crate) places: Option<Places>,
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
    pub(crate) fn answer(self, answer: Answer) {
        if let Some(reply) = self.reply {
            let _ = reply.send(answer);
        }
    }
}

/// The operations of all processes of an instance, in the order in which they came.
pub(crate) struct Queue {
    /// None once the host is dead.
    jobs: Mutex<Option<VecDeque<Job>>>,
    filled: Notify,
}

impl Queue {
    pub(crate) fn new() -> Self {
        Self { jobs: Mutex::new(Some(VecDeque::new())), filled: Notify::new() }
    }

    pub(crate) fn push(&self, job: Job) {
        // Of a dead host: dropped, outside the lock, which tells whoever waits.
        let _refused = match &mut *lock(&self.jobs) {
            Some(jobs) => {
                jobs.push_back(job);
                None
            }
            None => Some(job),
        };
        self.filled.notify_one();
    }

    /// Drops everything, and from now on whatever comes.
    pub(crate) fn close(&self) {
        let jobs = lock(&self.jobs).take();
        drop(jobs);
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.jobs).as_ref().map_or(0, VecDeque::len)
    }

    /// Waits until there is something.
    pub(crate) async fn filled(&self) {
        while self.len() == 0 {
            self.filled.notified().await;
        }
    }

    /// The next batch of an instance: what is queued, in order, as far as the bounds and the rule of one operation for
    /// each row allow. What an earlier instance left is dropped.
    pub(crate) fn take(&self, instance: InstanceId, max_ops: usize, max_bytes: usize) -> Vec<Job> {
        let mut stale = Vec::new();
        let mut taken = Vec::new();
        if let Some(jobs) = &mut *lock(&self.jobs) {
            taken.reserve(jobs.len().min(max_ops));
            let mut rows = Rows::default();
            let mut bytes = 0;
            while let Some(job) = jobs.front() {
                if job.from.instance().is_some_and(|other| other != instance) {
                    stale.extend(jobs.pop_front());
                    continue;
                }
                bytes += size(&job.op);
                let full = taken.len() == max_ops || (bytes > max_bytes && !taken.is_empty());
                if full || !rows.admit(&job.op) {
                    break;
                }
                taken.extend(jobs.pop_front());
            }
        }
        drop(stale);
        taken
    }

    /// Puts jobs back in front, in their order.
    pub(crate) fn put_back(&self, back: Vec<Job>) {
        if let Some(jobs) = &mut *lock(&self.jobs) {
            for job in back.into_iter().rev() {
                jobs.push_front(job);
            }
        }
        self.filled.notify_one();
    }

    /// Drops everything that belongs to an epoch that is over; the calls from outside stay.
    pub(crate) fn forget_epoch(&self) {
        let mut dropped = VecDeque::new();
        if let Some(jobs) = &mut *lock(&self.jobs) {
            let (stay, go) = std::mem::take(jobs).into_iter().partition(|job| job.from.instance().is_none());
            *jobs = stay;
            dropped = go;
        }
        // Their senders wake whoever waits: outside the lock.
        drop(dropped);
    }
}

/// Which rows a batch touches so far, as hashes: two that collide merely wait for the next batch.
#[derive(Default)]
struct Rows(HashSet<u64>);

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
    fn hash(row: (Row, impl Hash)) -> u64 {
        let mut hasher = DefaultHasher::new();
        row.hash(&mut hasher);
        hasher.finish()
    }

    /// Whether the operation may join the batch.
    fn admit(&mut self, op: &Op) -> bool {
        match op {
            Op::Spawn(spawn) => self.spawn(spawn),
            Op::Raise(raise) => self.raise(raise),
            Op::Record(record) => {
                // Storages apply records before parks and finishes: one behind its run's park would overtake it.
                if self.0.contains(&Self::hash((Row::Process, record.run)))
                    || !self.0.insert(Self::hash((Row::Record, (record.run, &record.key))))
                {
                    return false;
                }
                match &record.effect {
                    Some(Effect::Spawn(spawn)) => self.spawn(spawn),
                    Some(Effect::Raise(raise)) => self.raise(raise),
                    None => true,
                }
            }
            Op::Await { run, .. } => !self.0.contains(&Self::hash((Row::Process, run))),
            Op::AcceptCancel { run, .. } | Op::Seen { run, .. } => self.0.insert(Self::hash((Row::Process, run))),
            Op::Finish(finish) => self.0.insert(Self::hash((Row::Process, finish.run))),
            Op::Park(park) => self.0.insert(Self::hash((Row::Process, park.run))),
            Op::Cancel { id } | Op::Resume { id, .. } | Op::Delete { id } => self.0.insert(Self::hash((Row::Id, id))),
            Op::Claim { .. } => self.0.insert(Self::hash((Row::Claim, ()))),
        }
    }

    fn spawn(&mut self, spawn: &Spawn) -> bool {
        self.0.insert(Self::hash((Row::Id, &spawn.id)))
    }

    fn raise(&mut self, raise: &Raise) -> bool {
        self.0.insert(Self::hash((Row::Event, (&raise.id, &raise.event_id))))
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
