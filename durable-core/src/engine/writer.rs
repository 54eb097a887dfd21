//! The one writer of an instance: commits whatever is queued as one batch, recognises its own earlier success after
//! a lost answer, finds the operation that the database refuses, and tells everybody what came of theirs.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::time::Instant;

use super::epoch::Epoch;
use super::held::Slot;
use super::queue::{From, Job};
use super::{Backoff, Core};
use crate::storage::{
    Batch, Effect, EventRow, Fence, Finish, InstanceId, Op, Outcome, Park, Raise, Raised, Record, RecordOp, RunId,
    Spawn, StorageError,
};

pub(super) struct Writer {
    core: Arc<Core>,
    epoch: Arc<Epoch>,
    generation: i64,
    /// When what this instance owns is compared with what it holds.
    compare_at: Instant,
    /// What is committed and not told yet: that happens while the next batch is on its way.
    untold: Vec<(Job, Outcome)>,
}

/// The epoch is over: the instance was fenced, or the host is gone.
pub(super) struct Over;

impl Writer {
    pub(super) fn new(core: Arc<Core>, epoch: Arc<Epoch>) -> Self {
        let compare_at = Instant::now() + core.settings.reconcile_every;
        Self { core, epoch, generation: 0, compare_at, untold: Vec::new() }
    }

    /// Writes until the epoch is over.
    pub(super) async fn write(mut self) {
        let core = self.core.clone();
        loop {
            let mut jobs = core.queue.take(core.settings.batch_ops, core.settings.batch_bytes);
            if jobs.is_empty() {
                self.tell();
                tokio::select! {
                    biased;
                    () = self.epoch.over() => return,
                    () = core.queue.filled() => {}
                    // What is queued goes before the end.
                    () = self.epoch.draining() => return,
                    () = tokio::time::sleep_until(self.compare_at) => {}
                }
                jobs = core.queue.take(core.settings.batch_ops, core.settings.batch_bytes);
            }
            let committed = self.commit(jobs).await;
            if committed.is_err() || self.epoch.is_over() {
                self.tell();
                self.epoch.end();
                return;
            }
            // However much is queued: what nobody holds must not wait for a quiet moment.
            if Instant::now() >= self.compare_at {
                self.tell();
                self.compare().await;
            }
        }
    }

    /// Commits these, all or in parts. When it fails, calls from outside are back in the queue.
    async fn commit(&mut self, jobs: Vec<Job>) -> Result<(), Over> {
        // Parts still to be written, the first one last.
        let mut parts = vec![jobs];
        while let Some(jobs) = parts.pop() {
            if jobs.is_empty() {
                continue;
            }
            let (ops, mut rest): (Vec<Op>, Vec<_>) =
                jobs.into_iter().map(|Job { op, from, reply, places }| (op, (from, reply, places))).unzip();
            let mut batch = Batch { fence: self.fence(), namespace: self.core.namespace.clone(), ops };
            let result = self.commit_known(&mut batch, &mut rest).await;
            let mut jobs =
                batch.ops.into_iter().zip(rest).map(|(op, (from, reply, places))| Job { op, from, reply, places });
            match result {
                Ok(outcomes) if outcomes.len() != batch_len(&jobs) => {
                    tracing::error!(
                        "the storage answered {} outcomes to {} operations",
                        outcomes.len(),
                        batch_len(&jobs)
                    );
                    return Err(Over);
                }
                Ok(outcomes) => {
                    self.tell();
                    self.untold = jobs.zip(outcomes).collect();
                    // Starts first, as the storage applies them: a message to one that is new is for a run that is here.
                    self.untold.sort_by_key(|(job, _)| !is_start(&job.op));
                }
                Err(StorageError::Refused(why)) if batch_len(&jobs) == 1 => {
                    if let Some(job) = jobs.next() {
                        self.refuse(job, &why.to_string());
                    }
                }
                Err(StorageError::Refused(_)) => {
                    let mut first: Vec<Job> = jobs.collect();
                    let second = first.split_off(first.len() / 2);
                    parts.push(second);
                    parts.push(first);
                }
                Err(error) => {
                    if !matches!(error, StorageError::Fenced) {
                        tracing::error!("the storage cannot be written: {error}");
                    }
                    let mut back: Vec<Job> = jobs.collect();
                    back.extend(parts.into_iter().rev().flatten());
                    back.retain(|job| matches!(job.from, From::Host));
                    self.core.queue.put_back(back);
                    return Err(Over);
                }
            }
        }
        Ok(())
    }

    fn fence(&self) -> Fence {
        Fence { instance: self.epoch.instance, generation: self.generation }
    }

    /// Commits a batch until its outcome is known. Claims drop out of a batch that is sent again: what the first
    /// attempt claimed is found by comparing.
    async fn commit_known<T>(&mut self, batch: &mut Batch, rest: &mut Vec<T>) -> Result<Vec<Outcome>, StorageError> {
        let mut backoff = Backoff::new();
        let mut again = false;
        loop {
            match self.send(batch).await {
                Ok(mut outcomes) if again => {
                    for outcome in &mut outcomes {
                        if let Outcome::Asked { again, .. } = outcome {
                            *again = true;
                        }
                    }
                    return Ok(outcomes);
                }
                Err(StorageError::Unavailable(why)) => {
                    self.core.note_trouble(&why.to_string());
                    backoff.pause(&self.epoch, "a batch", &why).await?;
                }
                Err(StorageError::Unknown(why)) => {
                    self.core.note_trouble(&why.to_string());
                    tracing::warn!("the answer to a batch of {} was lost ({why}); fencing it off", batch.ops.len());
                    if std::mem::replace(&mut again, true) {
                        backoff.pause(&self.epoch, "a batch", &why).await?;
                    }
                    self.refence().await?;
                    batch.fence = self.fence();
                    let claims: Vec<bool> = batch.ops.iter().map(|op| matches!(op, Op::Claim { .. })).collect();
                    if claims.contains(&true) {
                        self.compare_at = Instant::now();
                        let mut keep = claims.iter().map(|claim| !claim);
                        batch.ops.retain(|_| keep.next().unwrap_or(true));
                        let mut keep = claims.iter().map(|claim| !claim);
                        rest.retain(|_| keep.next().unwrap_or(true));
                        if batch.ops.is_empty() {
                            return Ok(Vec::new());
                        }
                    }
                }
                other => return other,
            }
        }
    }

    /// Commits a batch, and while the database is busy with it tells what came of the one before: of the two processors
    /// that a batch needs one after the other, neither waits for the other.
    async fn send(&mut self, batch: &Batch) -> Result<Vec<Outcome>, StorageError> {
        let storage = self.core.storage.clone();
        let mut commit = storage.commit(batch);
        // The first poll sends it.
        let sent = poll_fn(|cx| Poll::Ready(commit.as_mut().poll(cx))).await;
        self.tell();
        match sent {
            Poll::Ready(answer) => answer,
            Poll::Pending => commit.await,
        }
    }

    /// Makes sure that nothing of an earlier attempt can still arrive.
    async fn refence(&mut self) -> Result<(), StorageError> {
        let mut backoff = Backoff::new();
        loop {
            self.generation += 1;
            match self.core.storage.refence(self.epoch.instance, self.generation).await {
                Err(error) if error.is_transient() => backoff.pause(&self.epoch, "fencing off a batch", &error).await?,
                other => return other,
            }
        }
    }

    fn refuse(&self, job: Job, why: &str) {
        tracing::error!("the storage refuses an operation: {why}");
        job.answer(Err(why.into()));
    }

    /// Tells everybody what came of the batch before.
    fn tell(&mut self) {
        for (job, outcome) in std::mem::take(&mut self.untold) {
            self.resolve(job, outcome);
        }
    }

    /// What an outcome means for this instance, before whoever asked is told.
    fn resolve(&mut self, job: Job, outcome: Outcome) {
        let Job { op, from, reply, places } = job;
        match (op, &outcome) {
            (Op::Record(record), Outcome::Lost) => {
                tracing::warn!(run = %record.run, "the record {} was refused: the run is not owned under claim {}, or another claim wrote it", record.key, record.claim);
                self.compare_at = Instant::now();
            }
            (Op::Record(mut record), outcome) => {
                match (record.effect.take(), outcome) {
                    (Some(Effect::Spawn(spawn)), Outcome::Spawned(spawned)) => {
                        self.spawned(spawn, spawned.existed);
                        record.payload = spawned.to_json();
                    }
                    (Some(Effect::Raise(raise)), Outcome::Raised(raised)) => {
                        self.raised(raise, *raised);
                        record.payload = raised.as_json().into();
                    }
                    _ => {}
                }
                if let From::Run(run) = &from {
                    let RecordOp { op, state, payload, attempts, claim, .. } = record;
                    run.recorded(&record.key, Record { op, state, payload, attempts, claim });
                }
            }
            (Op::Spawn(spawn), Outcome::Spawned(spawned)) => self.spawned(spawn, spawned.existed),
            (Op::Raise(raise), Outcome::Raised(raised)) => self.raised(raise, *raised),
            (Op::Finish(Finish { run, status, output, .. }), Outcome::Finished { wakes }) => {
                // Before those who wait are told: who comes later sees that it is too late to wait.
                if let From::Run(live) = &from {
                    live.state().ended = true;
                }
                if status.is_finished() {
                    self.core.watch.ended(run, Some((status, output)));
                }
                self.wake(wakes);
            }
            (Op::Park(Park { wake_at: Some(wake_at), .. }), Outcome::Recorded) => self.core.poke_before(wake_at),
            (Op::Cancel { .. } | Op::Resume { .. } | Op::Delete { .. }, Outcome::Asked { before, wakes, .. }) => {
                self.wake(wakes);
                if let Some((run, _)) = before {
                    self.core.watch.ended(*run, None);
                }
                self.core.poke();
            }
            (Op::Claim { .. }, Outcome::Claimed(claimed)) => {
                let claimed: Vec<_> = claimed.iter().map(|c| (c.run, c.claim)).collect();
                self.core.load_and_start(&self.epoch, &claimed);
            }
            _ => {}
        }
        // Behind the entry of what was started: no place may be free in between.
        drop(places);
        if let Some(reply) = reply {
            let _ = reply.send(Ok(outcome));
        }
    }

    /// A new process is in the database; runs it here if this instance took it.
    fn spawned(&self, spawn: Spawn, existed: bool) {
        if existed {
            return;
        }
        if spawn.take {
            self.core.start_new(&self.epoch, spawn);
        } else {
            self.core.poke();
        }
    }

    fn raised(&self, raise: Raise, raised: Raised) {
        match raised {
            Raised::Delivered { run, number, mine: true } => {
                let event = EventRow { number, name: raise.name, payload: raise.payload };
                match self.core.held.get(run) {
                    Some(Slot::Live(live)) => {
                        if !live.deliver(event) {
                            self.core.post.fetch([run]);
                        }
                    }
                    // It may go live at this moment: whichever comes second sees to it that the message is read.
                    Some(Slot::Loading { .. }) | None => self.wake(&[run]),
                }
            }
            Raised::Delivered { mine: false, .. } => self.core.poke(),
            Raised::Finished | Raised::NotFound => {}
        }
    }

    fn wake(&self, runs: &[RunId]) {
        for run in runs {
            self.core.held.signalled_while_loading(*run);
        }
        self.core.post.fetch(runs.iter().copied());
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
            run.end(super::run::End::Gone);
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

fn is_start(op: &Op) -> bool {
    matches!(op, Op::Spawn(_) | Op::Record(RecordOp { effect: Some(Effect::Spawn(_)), .. }))
}

fn batch_len(jobs: &impl ExactSizeIterator) -> usize {
    jobs.len()
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
