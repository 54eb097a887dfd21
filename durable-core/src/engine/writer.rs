//! The one writer of an instance: commits whatever is queued as one batch, finds the operation that the database refuses,
//! and tells everybody what came of theirs. What is held up it sets aside.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::time::Instant;

use super::committer::{Committer, Fate, Ready, Way};
use super::epoch::Epoch;
use super::queue::{From, Job};
use super::run::End;
use super::{Backoff, Core, Phase};
#[cfg(durable_mutations)]
use crate::mutation::{Rule, is_broken};
use crate::storage::{Batch, Effect, InstanceId, Op, Outcome, RecordOp, RunId, StorageError};

pub(super) struct Writer {
    core: Arc<Core>,
    epoch: Arc<Epoch>,
    committer: Committer,
    /// When what this instance owns is compared with what it holds.
    compare_at: Instant,
    /// What is committed and not told yet: that happens while the next batch is on its way.
    untold: Vec<(Job, Outcome)>,
    /// A full batch that was made ready while the one before it was on its way.
    next: Option<Ready>,
}

/// The epoch is over: the instance was fenced, or the host is gone. What was not written.
struct Over(Vec<Job>);

impl Writer {
    pub(super) fn new(core: Arc<Core>, epoch: Arc<Epoch>, committer: Committer) -> Self {
        let compare_at = Instant::now() + core.settings.reconcile_every;
        Self { core, epoch, committer, compare_at, untold: Vec::new(), next: None }
    }

    /// Writes until the epoch is over.
    pub(super) async fn write(mut self) {
        let core = self.core.clone();
        loop {
            let ready = match self.next.take() {
                Some(ready) => ready,
                None => self.take(),
            };
            let ready = if ready.len() == 0 {
                self.tell();
                tokio::select! {
                    biased;
                    () = self.epoch.over() => return,
                    () = core.queue.filled() => {}
                    // What is queued goes before the end, and what was set aside.
                    () = self.epoch.draining(), if core.queue.aside_len() == 0 => return,
                    () = tokio::time::sleep_until(self.compare_at) => {}
                }
                self.take()
            } else {
                ready
            };
            let back = match self.commit(ready).await {
                Ok(()) if !self.epoch.is_over() => Vec::new(),
                Ok(()) => self.give_up(Vec::new()),
                Err(Over(jobs)) => self.give_up(jobs),
            };
            if self.epoch.is_over() {
                core.queue.put_back(back);
                return;
            }
            core.queue.moved(self.next.is_some());
            if self.committer.takes_lost_claims() {
                #[cfg(durable_mutations)]
                let found = !is_broken(Rule::OwnClaim);
                #[cfg(not(durable_mutations))]
                let found = true;
                if found {
                    self.compare_at = Instant::now();
                }
            }
            if core.phase() == Phase::Dead {
                return;
            }
            // However much is queued: what nobody holds must not wait for a quiet moment.
            if core.takes_comparison() || Instant::now() >= self.compare_at {
                self.tell();
                self.compare().await;
            }
        }
    }

    /// What is queued, as a batch.
    fn take(&self) -> Ready {
        let settings = &self.core.settings;
        self.committer.ready(self.core.queue.take(settings.batch_ops, settings.batch_bytes))
    }

    /// Ends the epoch: what was not written, those calls from outside that the next one writes.
    fn give_up(&mut self, mut jobs: Vec<Job>) -> Vec<Job> {
        self.tell();
        self.epoch.end();
        jobs.extend(self.next.take().into_iter().flat_map(Ready::jobs));
        jobs.retain(|job| matches!(job.from, From::Host));
        jobs
    }

    /// Commits a batch, all at once or in parts.
    async fn commit(&mut self, ready: Ready) -> Result<(), Over> {
        // Parts still to be written, the first one last.
        let mut parts = vec![ready];
        let mut backoff = Backoff::new();
        while let Some(mut ready) = parts.pop() {
            if ready.len() == 0 {
                continue;
            }
            let committer = self.committer.clone();
            let fate = committer.known(&mut ready, self).await;
            let mut jobs = ready.jobs();
            let over = match fate {
                Fate::Written(outcomes) => {
                    self.tell();
                    self.untold = jobs.zip(outcomes).collect();
                    // Starts first, as the storage applies them: a message to one that is new is for a run that is here.
                    self.untold.sort_by_key(|(job, _)| !is_start(&job.op));
                    continue;
                }
                Fate::Refused(why) if jobs.len() == 1 => {
                    if let Some(job) = jobs.next() {
                        committer.refuse(job, &why);
                    }
                    continue;
                }
                Fate::Refused(_) => {
                    let mut first: Vec<Job> = jobs.collect();
                    let second = first.split_off(first.len() / 2);
                    parts.push(committer.ready(second));
                    parts.push(committer.ready(first));
                    continue;
                }
                Fate::HeldUp(why) => {
                    let most = self.core.settings.batch_ops.saturating_mul(4);
                    let jobs: Vec<Job> = jobs.collect();
                    match self.core.queue.set_aside(jobs, most) {
                        Ok(()) => {
                            tracing::warn!("something in a batch is held up ({why}); it is looked for");
                            // What was taken behind it may have to wait for it.
                            let taken = parts.drain(..).rev().chain(self.next.take());
                            let taken: Vec<Job> = taken.flat_map(Ready::jobs).collect();
                            taken.into_iter().rev().for_each(|job| self.core.queue.put_first(job));
                            continue;
                        }
                        // With this many blocked operations the database itself is the cause.
                        Err(jobs) => match backoff.pause(&self.epoch, "a batch", &why).await {
                            Ok(()) => {
                                parts.push(committer.ready(jobs));
                                continue;
                            }
                            Err(_) => jobs,
                        },
                    }
                }
                Fate::Over => jobs.collect(),
            };
            let rest = parts.into_iter().rev().flat_map(Ready::jobs);
            return Err(Over(over.into_iter().chain(rest).collect()));
        }
        Ok(())
    }

    /// Tells everybody what came of the batch before.
    fn tell(&mut self) {
        for (job, outcome) in std::mem::take(&mut self.untold) {
            self.committer.resolve(job, outcome);
        }
    }

    /// Compares what the instance owns with what it holds: adopts what no run holds, drops what it does not own.
    /// Between two batches, so nothing is on its way.
    async fn compare(&mut self) {
        let Some(owned) = self.owned(self.epoch.instance).await else {
            self.compare_at = Instant::now() + Duration::from_secs(1);
            return;
        };
        self.compare_at = Instant::now() + self.core.settings.reconcile_every;
        let (strays, lost) = self.core.held.compare(&owned);
        for run in lost {
            tracing::warn!(id = %run.id, run = %run.run, "held here but not owned by this instance; dropped");
            run.end(End::Gone);
        }
        if !strays.is_empty() {
            tracing::warn!(
                "{} processes are owned by this instance but were not running; taking them up",
                strays.len()
            );
            self.core.load_and_start(&self.epoch, &strays);
        }
    }

    async fn owned(&self, instance: InstanceId) -> Option<Vec<(RunId, i64)>> {
        const PAGE: usize = 10_000;
        let mut owned: Vec<(RunId, i64)> = Vec::new();
        loop {
            let page = self.core.storage.owned(instance, owned.last().map(|(run, _)| *run), PAGE).await.ok()?;
            let full = page.len() == PAGE;
            owned.extend(page);
            if !full {
                return Some(owned);
            }
        }
    }
}

impl Way for Writer {
    /// Commits a batch, and while the database is busy with it tells what came of the one before: of the two processors
    /// that a batch needs one after the other, neither waits for the other.
    async fn send(&mut self, batch: &Batch) -> Result<Vec<Outcome>, StorageError> {
        #[cfg(durable_mutations)]
        if is_broken(Rule::WakeAfterCommit) {
            self.core.post.fetch(self.core.held.runs().iter().map(|run| run.run));
        }
        let storage = self.core.storage.clone();
        let mut commit = storage.commit(batch);
        // The first poll sends it.
        let sent = poll_fn(|cx| Poll::Ready(commit.as_mut().poll(cx))).await;
        self.tell();
        match sent {
            Poll::Ready(answer) => answer,
            Poll::Pending => {
                if self.next.is_none() && self.core.queue.len() >= self.core.settings.batch_ops {
                    let next = self.take();
                    self.core.storage.prepare(&next.batch);
                    self.next = Some(next);
                }
                tokio::select! {
                    biased;
                    answer = commit => answer,
                    // Fenced, it need not hear what came of it: a server that is gone without a word would keep it waiting.
                    () = self.epoch.over() => Err(StorageError::unknown("the instance has been fenced off")),
                }
            }
        }
    }
}

fn is_start(op: &Op) -> bool {
    matches!(op, Op::Spawn(_) | Op::Record(RecordOp { effect: Some(Effect::Spawn(_)), .. }))
}

impl Backoff {
    /// Waits before the next try; fails when the epoch is over.
    pub(super) async fn pause(
        &mut self,
        epoch: &Epoch,
        what: &str,
        why: &(dyn std::fmt::Display + Sync + '_),
    ) -> Result<(), StorageError> {
        let pause: Duration = self.next();
        if self.tries() == 1 {
            tracing::warn!("{what} failed ({why}); trying again until it works");
        }
        tokio::select! {
            biased;
            () = epoch.over() => Err(StorageError::Fenced),
            () = tokio::time::sleep(pause) => Ok(()),
        }
    }
}
