//! The one writer of an instance: commits whatever is queued as one batch, recognises its own earlier success after
//! a lost answer, finds the operation that the database refuses, and tells everybody what came of theirs.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::epoch::Epoch;
use super::held::{Places, Slot};
use super::queue::{Answer, From, Job};
use super::run::End;
use super::{Backoff, Core, Phase};
#[cfg(durable_mutations)]
use crate::mutation::{Rule, is_broken};
use crate::storage::{
    Batch, Effect, EventRow, Fence, Finish, InstanceId, Op, Outcome, Park, Prepared, Raise, Raised, Record, RecordOp,
    RunId, Spawn, StorageError,
};

pub(super) struct Writer {
    core: Arc<Core>,
    epoch: Arc<Epoch>,
    generation: i64,
    /// When what this instance owns is compared with what it holds.
    compare_at: Instant,
    /// What is committed and not told yet: that happens while the next batch is on its way.
    untold: Vec<(Job, Outcome)>,
    /// A full batch that was made ready while the one before it was on its way.
    next: Option<Ready>,
}

/// A batch, and who is told of its operations.
struct Ready {
    batch: Batch,
    rest: Vec<Rest>,
}

/// A [`Job`] without its operation.
struct Rest {
    from: From,
    reply: Option<oneshot::Sender<Answer>>,
    places: Option<Places>,
    again: bool,
}

impl Ready {
    fn jobs(self) -> impl ExactSizeIterator<Item = Job> {
        let Self { batch, rest } = self;
        let job = |(op, Rest { from, reply, places, again })| Job { op, from, reply, places, again };
        batch.ops.into_iter().zip(rest).map(job)
    }
}

/// The epoch is over: the instance was fenced, or the host is gone. What was not written.
struct Over(Vec<Job>);

impl Writer {
    pub(super) fn new(core: Arc<Core>, epoch: Arc<Epoch>) -> Self {
        let compare_at = Instant::now() + core.settings.reconcile_every;
        Self { core, epoch, generation: 0, compare_at, untold: Vec::new(), next: None }
    }

    /// Writes until the epoch is over.
    pub(super) async fn write(mut self) {
        let core = self.core.clone();
        loop {
            let ready = match self.next.take() {
                Some(ready) => ready,
                None => self.take(),
            };
            let ready = if ready.rest.is_empty() {
                self.tell();
                tokio::select! {
                    biased;
                    () = self.epoch.over() => return,
                    () = core.queue.filled() => {}
                    // What is queued goes before the end.
                    () = self.epoch.draining() => return,
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
            // However much is queued: what nobody holds must not wait for a quiet moment.
            if core.phase() < Phase::Dead && (core.takes_comparison() || Instant::now() >= self.compare_at) {
                self.tell();
                self.compare().await;
            }
        }
    }

    /// What is queued, as a batch.
    fn take(&self) -> Ready {
        let settings = &self.core.settings;
        self.ready(self.core.queue.take(settings.batch_ops, settings.batch_bytes))
    }

    fn ready(&self, jobs: Vec<Job>) -> Ready {
        let parts = |Job { op, from, reply, places, again }| (op, Rest { from, reply, places, again });
        let (ops, rest) = jobs.into_iter().map(parts).unzip();
        let batch =
            Batch { fence: self.fence(), namespace: self.core.namespace.clone(), ops, prepared: Prepared::default() };
        Ready { batch, rest }
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
        while let Some(mut ready) = parts.pop() {
            if ready.rest.is_empty() {
                continue;
            }
            let result = self.commit_known(&mut ready).await;
            let mut jobs = ready.jobs();
            match result {
                Ok(outcomes) if outcomes.len() != batch_len(&jobs) => {
                    tracing::error!(
                        "the storage answered {} outcomes to {} operations",
                        outcomes.len(),
                        batch_len(&jobs)
                    );
                    return Err(Over(Vec::new()));
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
                    parts.push(self.ready(second));
                    parts.push(self.ready(first));
                }
                Err(error) => {
                    if !matches!(error, StorageError::Fenced) {
                        tracing::error!("the storage cannot be written: {error}");
                    }
                    let rest = parts.into_iter().rev().flat_map(Ready::jobs);
                    return Err(Over(jobs.chain(rest).collect()));
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
    async fn commit_known(&mut self, Ready { batch, rest }: &mut Ready) -> Result<Vec<Outcome>, StorageError> {
        let mut backoff = Backoff::new();
        let mut lost = false;
        if batch.fence != self.fence() {
            batch.fence = self.fence();
            batch.prepared = Prepared::default();
        }
        loop {
            match self.send(batch).await {
                Ok(mut outcomes) => {
                    for (outcome, rest) in outcomes.iter_mut().zip(&*rest) {
                        if let Outcome::Asked { again, .. } = outcome {
                            *again = rest.again;
                        }
                    }
                    return Ok(outcomes);
                }
                Err(StorageError::Unavailable(why)) => {
                    self.core.note_trouble(&why.to_string());
                    backoff.pause(&self.epoch, "a batch", &why).await?;
                }
                // A right that was taken away, a table that somebody is changing: what is not written yet waits here until
                // that is mended. Another instance, or another epoch, would meet the same, and begin steps again to do so.
                Err(StorageError::Schema(why)) => {
                    self.core.note_trouble(&why);
                    if backoff.tries() == 0 {
                        tracing::error!("the storage cannot be written: {why}");
                    }
                    backoff.pause(&self.epoch, "a batch", &why).await?;
                }
                Err(StorageError::Unknown(why)) => {
                    self.core.note_trouble(&why.to_string());
                    tracing::warn!("the answer to a batch of {} was lost ({why}); fencing it off", batch.ops.len());
                    rest.iter_mut().for_each(|rest| rest.again = true);
                    if self.epoch.is_over() {
                        return Err(StorageError::Fenced);
                    }
                    if std::mem::replace(&mut lost, true) {
                        backoff.pause(&self.epoch, "a batch", &why).await?;
                    }
                    self.refence().await?;
                    batch.fence = self.fence();
                    batch.prepared = Prepared::default();
                    let claims: Vec<bool> = batch.ops.iter().map(|op| matches!(op, Op::Claim { .. })).collect();
                    if claims.contains(&true) {
                        #[cfg(durable_mutations)]
                        let at = if is_broken(Rule::OwnClaim) { self.compare_at } else { Instant::now() };
                        #[cfg(not(durable_mutations))]
                        let at = Instant::now();
                        self.compare_at = at;
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

    /// Makes sure that nothing of an earlier attempt can still arrive.
    async fn refence(&mut self) -> Result<(), StorageError> {
        #[cfg(durable_mutations)]
        if is_broken(Rule::Refences) {
            return Ok(());
        }
        let mut backoff = Backoff::new();
        loop {
            self.generation += 1;
            match self.core.storage.refence(self.epoch.instance, self.generation).await {
                Err(StorageError::Fenced) => return Err(StorageError::Fenced),
                Err(error) => backoff.pause(&self.epoch, "fencing off a batch", &error).await?,
                Ok(()) => return Ok(()),
            }
        }
    }

    fn refuse(&self, job: Job, why: &str) {
        tracing::error!("the storage refuses an operation: {why}");
        if let (From::Run(run), Op::Record(record)) = (&job.from, &job.op) {
            // Whether anybody awaits it or not: its next use would wait for it.
            run.fault(format_args!("the database refuses the record of {} {}: {why}", record.op, record.key));
        }
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
        let Job { op, from, reply, places, again: _ } = job;
        let sent = match (&op, &from) {
            (Op::Record(record), From::Run(run)) => Some((run.clone(), record.seq)),
            _ => None,
        };
        match (op, &outcome) {
            (Op::Record(record), Outcome::Lost) => {
                tracing::warn!(run = %record.run, "the record {} was refused: the run is not owned under claim {}, or another claim wrote it", record.key, record.claim);
                if let From::Run(run) = &from {
                    run.end(End::Gone);
                } else {
                    self.core.compare_soon();
                }
            }
            (Op::Record(mut record), outcome) => {
                match (record.effect.take(), outcome) {
                    (Some(Effect::Spawn(spawn)), Outcome::Spawned(spawned)) => {
                        self.spawned(spawn, spawned.existed);
                        record.payload = spawned.to_json(&record.payload);
                    }
                    (Some(Effect::Raise(raise)), Outcome::Raised(raised)) => {
                        self.raised(raise, *raised);
                        record.payload = raised.as_json().into();
                    }
                    _ => {}
                }
                if let From::Run(run) = &from {
                    let RecordOp { op, state, payload, attempts, seq, claim, .. } = record;
                    run.recorded(&record.key, Record { op, state, payload, attempts, seq, claim });
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
        if let Some((run, seq)) = sent {
            run.answered(seq);
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
                #[cfg(durable_mutations)]
                if is_broken(Rule::WakeAfterCommit) {
                    return;
                }
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
        #[cfg(durable_mutations)]
        if is_broken(Rule::WakeAfterCommit) {
            return;
        }
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
