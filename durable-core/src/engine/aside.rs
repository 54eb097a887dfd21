//! Operations that touch rows which another session has locked wait apart from the batches, together with later operations
//! that must not overtake them. A task of its own writes them: it splits a group that it cannot write, until each blocked
//! operation is alone, and retries those. The writer goes on with everything else.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

use super::committer::{Committer, Fate, Way};
use super::epoch::Epoch;
use super::queue::{From, Job};
use super::rows::{Keys, Rows};
use super::{Core, lock};
use crate::storage::{Batch, Effect, Op, Outcome, StorageError};

/// How long a group may wait for a lock while the blocked operation in it is being found.
const PATIENCE: Duration = Duration::from_millis(50);
/// Between two tries of one that is alone.
const LONGEST: Duration = Duration::from_secs(2);

/// The operations of an instance that are held up, in groups, and those behind them.
#[derive(Default)]
pub(super) struct Aside {
    groups: VecDeque<Group>,
    behind: VecDeque<Job>,
    /// Of all of them.
    keys: Keys,
    next: u64,
}

struct Group {
    number: u64,
    /// None while they are on their way.
    jobs: Vec<Job>,
    len: usize,
    keys: Keys,
    tries: u32,
    due: Instant,
}

/// What is to be tried.
pub(super) struct Attempt {
    number: u64,
    pub(super) jobs: Vec<Job>,
    /// As [`Batch::patience`](crate::storage::Batch::patience).
    pub(super) patience: Option<Duration>,
}

/// What there is to do.
pub(super) enum Next {
    Try(Attempt),
    /// Nothing before this time.
    Wait(Option<Instant>),
}

impl Aside {
    pub(super) fn is_empty(&self) -> bool {
        self.groups.is_empty() && self.behind.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.groups.iter().map(|group| group.len).sum::<usize>() + self.behind.len()
    }

    /// Whether an operation must wait behind those that are here; it does from then on.
    pub(super) fn keeps(&mut self, job: Job) -> Option<Job> {
        #[cfg(durable_mutations)]
        if crate::mutation::is_broken(crate::mutation::Rule::StaysBehind) {
            return Some(job);
        }
        if self.keys.is_empty() || !self.keys.touches(&job) {
            return Some(job);
        }
        self.keys.add(&job);
        self.behind.push_back(job);
        None
    }

    /// Sets operations aside.
    pub(super) fn add(&mut self, jobs: Vec<Job>) {
        if jobs.is_empty() {
            return;
        }
        let group = self.group(jobs, 0, Instant::now());
        self.groups.push_back(group);
        self.gather();
    }

    fn group(&mut self, mut jobs: Vec<Job>, tries: u32, due: Instant) -> Group {
        let mut keys = Keys::default();
        for job in &mut jobs {
            keys.add(job);
            take_nothing(job);
        }
        self.next += 1;
        Group { number: self.next, len: jobs.len(), jobs, keys, tries, due }
    }

    /// Finds the keys of all that are here.
    fn gather(&mut self) {
        self.keys.clear();
        for group in &self.groups {
            self.keys.extend(&group.keys);
        }
        for job in &self.behind {
            self.keys.add(job);
        }
    }

    /// The first that is due, is not on its way, and may not have to wait for one before it. Those that may be split go
    /// first: most of what is in them is not held up.
    pub(super) fn next(&mut self, now: Instant) -> Next {
        let mut before = Keys::default();
        let (mut split, mut alone, mut wait) = (None, None, None::<Instant>);
        for (at, group) in self.groups.iter().enumerate() {
            let free = !group.jobs.is_empty() && !group.jobs.iter().any(|job| before.touches(job));
            before.extend(&group.keys);
            let place = if group.jobs.len() > 1 { &mut split } else { &mut alone };
            if free && group.due <= now {
                place.get_or_insert(at);
            } else if free {
                wait = Some(wait.map_or(group.due, |wait| wait.min(group.due)));
            }
        }
        let Some(group) = split.or(alone).and_then(|at| self.groups.get_mut(at)) else { return Next::Wait(wait) };
        let patience = PATIENCE * (1 << group.tries.min(8));
        // One that is alone, and has been for long, may take what time the storage gives it.
        let patience = (group.tries < 4).then_some(patience);
        Next::Try(Attempt { number: group.number, jobs: std::mem::take(&mut group.jobs), patience })
    }

    /// An attempt is held up. Its operations come back if all that was here has been taken away meanwhile.
    fn held_up(&mut self, number: u64, mut jobs: Vec<Job>) -> Vec<Job> {
        let Some(at) = self.groups.iter().position(|group| group.number == number) else { return jobs };
        if jobs.len() > 1 {
            let second = jobs.split_off(jobs.len() / 2);
            let now = Instant::now();
            let (first, second) = (self.group(jobs, 0, now), self.group(second, 0, now));
            self.groups[at] = second;
            self.groups.insert(at, first);
        } else if let Some(group) = self.groups.get_mut(at) {
            group.jobs = jobs;
            group.tries += 1;
            let pause = Duration::from_millis(100 << group.tries.min(5)).min(LONGEST);
            group.due = Instant::now() + pause;
        }
        Vec::new()
    }

    /// An attempt is over. Operations that need not wait any longer go back into the queue, in their order.
    fn over(&mut self, number: u64, most: usize) -> VecDeque<Job> {
        let over = self.groups.iter().position(|group| group.number == number).and_then(|at| self.groups.remove(at));
        if over.is_some_and(|group| group.tries > 0) {
            self.join(most);
        }
        let mut free = VecDeque::new();
        let behind = std::mem::take(&mut self.behind);
        self.gather();
        for job in behind {
            free.extend(self.keeps(job));
        }
        free
    }

    /// One that was held up has been written: perhaps all may be now. They are tried together again.
    fn join(&mut self, most: usize) {
        let mut joined: Vec<Vec<Job>> = Vec::new();
        let mut rows = Rows::default();
        let jobs: Vec<Job> = std::mem::take(&mut self.groups).into_iter().flat_map(|group| group.jobs).collect();
        for job in jobs {
            match joined.last_mut() {
                Some(last) if last.len() < most && rows.admit(&job.op) => last.push(job),
                _ => {
                    rows = Rows::default();
                    rows.admit(&job.op);
                    joined.push(vec![job]);
                }
            }
        }
        for jobs in joined {
            let group = self.group(jobs, 0, Instant::now());
            self.groups.push_back(group);
        }
    }

    /// All that is here, in its order.
    pub(super) fn take(&mut self) -> impl Iterator<Item = Job> + use<> {
        let next = self.next;
        let Self { groups, behind, .. } = std::mem::replace(self, Self { next, ..Self::default() });
        groups.into_iter().flat_map(|group| group.jobs).chain(behind)
    }
}

/// A start that is written late leaves its process to any instance: the writer may compare what this instance owns with what
/// it holds before the start's outcome is told.
pub(super) fn take_nothing(job: &mut Job) {
    let spawn = match &mut job.op {
        Op::Spawn(spawn) => Some(spawn),
        Op::Record(record) => match &mut record.effect {
            Some(Effect::Spawn(spawn)) => Some(spawn),
            _ => None,
        },
        _ => None,
    };
    if let Some(spawn) = spawn {
        spawn.take = false;
        job.places = None;
    }
}

/// Writes what was set aside, until the epoch is over.
pub(super) async fn write(core: Arc<Core>, epoch: Arc<Epoch>, committer: Committer) {
    while !epoch.is_over() {
        let attempt = match core.queue.next_aside() {
            Next::Try(attempt) => attempt,
            Next::Wait(until) => {
                tokio::select! {
                    biased;
                    () = epoch.over() => break,
                    () = core.queue.aside_changed() => {}
                    () = tokio::time::sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => {}
                }
                continue;
            }
        };
        let Attempt { number, jobs, patience } = attempt;
        let mut ready = committer.ready(jobs);
        ready.batch.patience = patience;
        match committer.known(&mut ready, &mut Apart { core: &core, epoch: &epoch }).await {
            Fate::Written(outcomes) => {
                for (job, outcome) in ready.jobs().zip(outcomes) {
                    committer.resolve(job, outcome);
                }
                core.queue.aside_over(number, core.settings.batch_ops);
            }
            Fate::Refused(why) if ready.len() == 1 => {
                ready.jobs().for_each(|job| committer.refuse(job, &why));
                core.queue.aside_over(number, core.settings.batch_ops);
            }
            Fate::Refused(_) => core.queue.aside_held_up(number, ready.jobs().collect()),
            Fate::HeldUp(why) => {
                let jobs: Vec<Job> = ready.jobs().collect();
                if let ([job], Some(PATIENCE)) = (&jobs[..], patience) {
                    tracing::error!("{} waits alone until it can be written: {why}", job.words());
                }
                core.queue.aside_held_up(number, jobs);
            }
            Fate::Over => {
                epoch.end();
                core.queue.put_back(ready.jobs().filter(|job| matches!(job.from, From::Host)).collect());
                break;
            }
        }
    }
}

struct Apart<'w> {
    core: &'w Core,
    epoch: &'w Epoch,
}

impl Way for Apart<'_> {
    async fn send(&mut self, batch: &Batch) -> Result<Vec<Outcome>, StorageError> {
        tokio::select! {
            biased;
            answer = self.core.storage.commit(batch) => answer,
            () = self.epoch.over() => Err(StorageError::unknown("the instance has been fenced off")),
        }
    }
}

impl super::queue::Queue {
    /// Sets operations aside that are held up, unless there are too many already: they come back then.
    pub(super) fn set_aside(&self, jobs: Vec<Job>, most: usize) -> Result<(), Vec<Job>> {
        {
            let aside = &mut lock(&self.inner).aside;
            if aside.len() >= most {
                return Err(jobs);
            }
            aside.add(jobs);
        }
        self.aside.notify_one();
        Ok(())
    }

    /// How many are set aside, or wait behind such.
    pub(crate) fn aside_len(&self) -> usize {
        lock(&self.inner).aside.len()
    }

    fn next_aside(&self) -> Next {
        lock(&self.inner).aside.next(Instant::now())
    }

    async fn aside_changed(&self) {
        self.aside.notified().await;
    }

    fn aside_held_up(&self, number: u64, jobs: Vec<Job>) {
        let back = lock(&self.inner).aside.held_up(number, jobs);
        self.put_back(back.into_iter().filter(|job| matches!(job.from, From::Host)).collect());
    }

    fn aside_over(&self, number: u64, most: usize) {
        let mut dropped = Vec::new();
        {
            let mut inner = lock(&self.inner);
            let free = inner.aside.over(number, most);
            dropped.extend(free.into_iter().rev().filter_map(|job| inner.put_first(job)));
        }
        drop(dropped);
        self.nudge();
    }
}
