//! Commits one batch until its outcome is known, and tells what came of its operations.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use tokio::sync::{Mutex, oneshot};

use super::epoch::Epoch;
use super::held::{Places, Slot};
use super::queue::{Answer, From, Job};
use super::{Backoff, Core};
#[cfg(durable_mutations)]
use crate::mutation::{Rule, is_broken};
use crate::storage::{
    Batch, Effect, EventRow, Fence, Finish, Op, Outcome, Park, Prepared, Raise, Raised, Record, RecordOp, RunId, Spawn,
    StorageError,
};

/// What the writers of one epoch share.
#[derive(Clone)]
pub(super) struct Committer {
    core: Arc<Core>,
    epoch: Arc<Epoch>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    generation: AtomicI64,
    /// Held while the generation is raised.
    raises: Mutex<()>,
    /// A claim's answer was lost: what is owned is to be compared with what is held.
    claims_lost: AtomicBool,
}

/// How a batch gets to the storage, and its answer back.
pub(super) trait Way {
    fn send(&mut self, batch: &Batch) -> impl Future<Output = Result<Vec<Outcome>, StorageError>> + Send;
}

/// A batch, and the callers of its operations.
pub(super) struct Ready {
    pub(super) batch: Batch,
    rest: Vec<Rest>,
}

/// A [`Job`] without its operation.
struct Rest {
    from: From,
    reply: Option<oneshot::Sender<Answer>>,
    places: Option<Places>,
    again: bool,
}

/// What came of a batch.
pub(super) enum Fate {
    Written(Vec<Outcome>),
    /// The database refuses something in it for good.
    Refused(String),
    /// Nothing was written; something in it is held up.
    HeldUp(String),
    /// The epoch is over. It may have been written.
    Over,
}

impl Ready {
    pub(super) fn len(&self) -> usize {
        self.rest.len()
    }

    pub(super) fn jobs(self) -> impl ExactSizeIterator<Item = Job> {
        let Self { batch, rest } = self;
        let job = |(op, Rest { from, reply, places, again })| Job { op, from, reply, places, again };
        batch.ops.into_iter().zip(rest).map(job)
    }

    /// Claims drop out of a batch that is sent again, and their callers ask anew.
    fn drop_claims(&mut self) -> bool {
        let claims: Vec<bool> = self.batch.ops.iter().map(|op| matches!(op, Op::Claim { .. })).collect();
        let mut keep = claims.iter().map(|claim| !claim);
        self.batch.ops.retain(|_| keep.next().unwrap_or(true));
        let mut keep = claims.iter().map(|claim| !claim);
        self.rest.retain(|_| keep.next().unwrap_or(true));
        claims.contains(&true)
    }
}

impl Committer {
    pub(super) fn new(core: Arc<Core>, epoch: Arc<Epoch>) -> Self {
        Self { core, epoch, shared: Arc::default() }
    }

    fn fence(&self) -> Fence {
        Fence { instance: self.epoch.instance, generation: self.shared.generation.load(Ordering::Acquire) }
    }

    /// Whether the answer to a claim was lost since the last time.
    pub(super) fn takes_lost_claims(&self) -> bool {
        self.shared.claims_lost.swap(false, Ordering::AcqRel)
    }

    pub(super) fn ready(&self, jobs: Vec<Job>) -> Ready {
        let parts = |Job { op, from, reply, places, again }| (op, Rest { from, reply, places, again });
        let (ops, rest) = jobs.into_iter().map(parts).unzip();
        Ready { batch: Batch::new(self.fence(), self.core.namespace.clone(), ops), rest }
    }

    /// Commits a batch until its outcome is known. What the first attempt claimed is found by comparing.
    pub(super) async fn known(&self, ready: &mut Ready, way: &mut impl Way) -> Fate {
        /// So often the same is met before something in the batch is held up by it.
        const TRIES: u32 = 3;
        let mut backoff = Backoff::new();
        let (mut lost, mut wrong) = (0, 0);
        loop {
            let fence = self.fence();
            if ready.batch.fence != fence {
                ready.batch.fence = fence;
                ready.batch.prepared = Prepared::default();
            }
            let error = match way.send(&ready.batch).await {
                Ok(outcomes) if outcomes.len() != ready.len() => {
                    let (given, asked) = (outcomes.len(), ready.len());
                    tracing::error!("the storage answered {given} outcomes to {asked} operations");
                    return Fate::Over;
                }
                Ok(mut outcomes) => {
                    for (outcome, rest) in outcomes.iter_mut().zip(&ready.rest) {
                        if let Outcome::Asked { again, .. } = outcome {
                            *again = rest.again;
                        }
                    }
                    return Fate::Written(outcomes);
                }
                Err(error) => error,
            };
            match error {
                StorageError::Fenced => {
                    // Perhaps the generation was raised for another batch, whose writer waits for the answer to that.
                    let _raised = self.shared.raises.lock().await;
                    if fence != self.fence() && !self.epoch.is_over() {
                        continue;
                    }
                    return Fate::Over;
                }
                StorageError::Refused(why) => return Fate::Refused(why.to_string()),
                _ => self.core.note_trouble(&error.to_string()),
            }
            let is_damaged = matches!(error, StorageError::Damaged(_));
            match error {
                StorageError::Blocked(why) => {
                    ready.drop_claims();
                    return Fate::HeldUp(why.to_string());
                }
                // A right that was taken away, a table that somebody is changing: what is not written yet waits until that
                // is mended. Another instance, or another epoch, would meet the same, and begin steps again to do so.
                StorageError::Schema(why) | StorageError::Damaged(why) => {
                    if wrong == 0 {
                        tracing::error!("the storage cannot be written: {why}");
                    }
                    wrong += 1;
                    // Of a damaged database no part is written either: that may destroy what was still whole.
                    if wrong == TRIES && !is_damaged {
                        ready.drop_claims();
                        return Fate::HeldUp(why);
                    }
                    if backoff.pause(&self.epoch, "a batch", &why).await.is_err() {
                        return Fate::Over;
                    }
                }
                StorageError::Unknown(why) => {
                    tracing::warn!("the answer to a batch of {} was lost ({why}); fencing it off", ready.len());
                    ready.rest.iter_mut().for_each(|rest| rest.again = true);
                    if self.epoch.is_over() || lost > 0 && backoff.pause(&self.epoch, "a batch", &why).await.is_err() {
                        return Fate::Over;
                    }
                    if self.refence(ready.batch.fence).await.is_err() {
                        return Fate::Over;
                    }
                    if ready.drop_claims() {
                        self.shared.claims_lost.store(true, Ordering::Release);
                        if ready.len() == 0 {
                            return Fate::Written(Vec::new());
                        }
                    }
                    lost += 1;
                    if lost == TRIES {
                        return Fate::HeldUp(why.to_string());
                    }
                }
                error => {
                    if backoff.pause(&self.epoch, "a batch", &error).await.is_err() {
                        return Fate::Over;
                    }
                }
            }
        }
    }

    /// Makes sure that nothing of an attempt can still arrive.
    async fn refence(&self, attempt: Fence) -> Result<(), StorageError> {
        #[cfg(durable_mutations)]
        if is_broken(Rule::Refences) {
            return Ok(());
        }
        let _alone = self.shared.raises.lock().await;
        if attempt != self.fence() {
            // It was raised for another batch: after that one was sent, before this one's answer was found lost.
            return Ok(());
        }
        let mut backoff = Backoff::new();
        let mut generation = attempt.generation;
        loop {
            generation += 1;
            match self.core.storage.refence(self.epoch.instance, generation).await {
                Err(StorageError::Fenced) => return Err(StorageError::Fenced),
                Err(error) => backoff.pause(&self.epoch, "fencing off a batch", &error).await?,
                Ok(()) => {
                    self.shared.generation.store(generation, Ordering::Release);
                    return Ok(());
                }
            }
        }
    }

    pub(super) fn refuse(&self, job: Job, why: &str) {
        tracing::error!("the storage refuses an operation: {why}");
        if let (From::Run(run), Op::Record(record)) = (&job.from, &job.op) {
            // Whether anybody awaits it or not: its next use would wait for it.
            run.fault(format_args!("the database refuses the record of {} {}: {why}", record.op, record.key));
        }
        job.answer(Err(why.into()));
    }

    /// What an outcome means for this instance, before whoever asked is told.
    pub(super) fn resolve(&self, job: Job, outcome: Outcome) {
        let Job { op, from, reply, places, again } = job;
        let sent = match (&op, &from) {
            (Op::Record(record), From::Run(run)) => Some((run.clone(), record.seq)),
            _ => None,
        };
        match (op, &outcome) {
            (Op::Record(record), Outcome::Lost) => {
                tracing::warn!(run = %record.run, "the record {} was refused: the run is not owned under claim {}, or another claim wrote it", record.key, record.claim);
                if let From::Run(run) = &from {
                    run.lost();
                } else {
                    self.core.compare_soon();
                }
            }
            (Op::Record(mut record), outcome) => {
                match (record.effect.take(), outcome) {
                    (Some(Effect::Spawn(spawn)), Outcome::Spawned(spawned)) => {
                        self.spawned(spawn, spawned.existed, again);
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
            (Op::Spawn(spawn), Outcome::Spawned(spawned)) => self.spawned(spawn, spawned.existed, again),
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
            (Op::Order(_), Outcome::Asked { before, wakes, .. }) => {
                self.wake(wakes);
                // The order may have taken its row away.
                self.wake(before.as_ref().map(|(run, _)| *run).as_slice());
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
    fn spawned(&self, spawn: Spawn, existed: bool, again: bool) {
        if existed {
            return;
        }
        if spawn.take {
            self.core.start_new(&self.epoch, spawn);
        } else {
            self.core.poke();
            if again {
                // An earlier attempt may have taken it.
                self.core.compare_soon();
            }
        }
    }

    fn raised(&self, raise: Raise, raised: Raised) {
        match raised {
            Raised::Delivered { run, number, mine: true } => {
                #[cfg(durable_mutations)]
                if is_broken(Rule::WakeAfterCommit) {
                    return;
                }
                let raised_at = self.core.clock.now();
                let event = EventRow { number, name: raise.name, payload: raise.payload, raised_at };
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
}
