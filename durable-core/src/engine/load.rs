//! Brings claimed processes into memory.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

use super::epoch::Epoch;
use super::queue::{From, Job};
use super::reading::{Read, Reading};
use super::run::{Kept, Run};
use super::suspects::Admitted;
use super::{Core, Phase, drive};
use crate::storage::{Op, Outcome, Park, ProcessRow, RunId, RunState, Spawn, Status, Wanted};

impl Core {
    /// Starts a process that this instance has just put into the database, under claim 1: there is nothing to read.
    pub(super) fn start_new(self: &Arc<Self>, epoch: &Arc<Epoch>, spawn: Spawn) {
        let now = self.clock.now();
        let process = ProcessRow {
            run: spawn.run,
            id: spawn.id,
            kind: spawn.kind,
            status: Status::Running,
            input: "".into(),
            output: None,
            reason: None,
            owner: Some(epoch.instance),
            claim: 1,
            calm_claim: 0,
            wake_at: None,
            waiting_for: None,
            signals: 0,
            cancel_requested_at: None,
            cancelled_at: None,
            cancelled_seq: None,
            created_at: now,
            status_at: now,
            finished_at: None,
        };
        self.start(epoch, 1, RunState::of(process), spawn.input, Kept::default());
    }

    fn start(self: &Arc<Self>, epoch: &Arc<Epoch>, claim: i64, state: RunState, input: Box<str>, kept: Kept) {
        let run = Arc::new(Run::new(self.clone(), epoch.instance, claim, state, kept));
        if self.is_stopping() {
            run.state().stopping = true;
        }
        match self.held.live(run.clone()) {
            // A newer claim has taken its place, or its epoch is over.
            None => return,
            Some(signalled) => {
                if signalled {
                    self.post.fetch([run.run]);
                }
            }
        }
        if epoch.is_over() || self.phase() == Phase::Dead {
            run.end(super::run::End::Gone);
        }
        tokio::spawn(drive::drive(run, input));
    }

    /// Reads claimed processes and runs them.
    pub(super) fn load_and_start(self: &Arc<Self>, epoch: &Arc<Epoch>, claimed: &[(RunId, i64)]) {
        let claims: BTreeMap<RunId, i64> =
            claimed.iter().copied().filter(|(run, claim)| self.held.begin_loading(*run, *claim)).collect();
        if !claims.is_empty() {
            tokio::spawn(load(self.clone(), epoch.clone(), claims));
        }
    }
}

async fn load(core: Arc<Core>, epoch: Arc<Epoch>, mut claims: BTreeMap<RunId, i64>) {
    let mut reading = Reading::new(claims.keys().map(|run| Wanted { run: *run, seen: 0 }).collect(), true);
    while let Some(read) = reading.next(&core, &epoch).await {
        if epoch.is_over() {
            break;
        }
        let (loaded, mut room) = match read {
            Read::Over => break,
            Read::Some(loaded, room) => (loaded, room),
            Read::Later(run) => {
                if let Some(claim) = claims.remove(&run) {
                    let (core, epoch) = (core.clone(), epoch.clone());
                    tokio::spawn(async move {
                        if core.later(&epoch).await {
                            again(core, epoch, BTreeMap::from([(run, claim)])).await;
                        } else {
                            core.held.remove(run, claim);
                        }
                    });
                }
                continue;
            }
            Read::Not(run, why) => {
                if let Some(claim) = claims.remove(&run) {
                    stuck(&core, &epoch, run, claim, format!("what is stored cannot be read: {why}"));
                }
                continue;
            }
        };
        let mut given_back = 0;
        for loaded in loaded {
            let Some(claim) = claims.remove(&loaded.run) else { continue };
            match loaded.state {
                // Another has claimed it since: its records are of an execution that goes on elsewhere.
                Ok(Some(state)) if state.process.owner != Some(epoch.instance) || state.process.claim != claim => {
                    core.held.remove(loaded.run, claim);
                }
                Ok(Some(mut state)) => {
                    let (deaths, most) = (crashes(&state, claim), core.settings.max_crashes);
                    if deaths >= most {
                        let reason = format!(
                            "the program died {deaths} times in a row while it ran this process, without a new record; \
                             it may be this process's fault or a neighbour's"
                        );
                        stuck(&core, &epoch, loaded.run, claim, reason);
                        continue;
                    }
                    let Admitted::Yes(suspect) = core.suspects.admit(deaths, most) else {
                        give_back(&core, &epoch, &state.process, claim, deaths);
                        given_back += 1;
                        continue;
                    };
                    let room = room.as_mut().map(|room| room.split(state.weight()));
                    let input = std::mem::take(&mut state.process.input);
                    core.start(&epoch, claim, state, input, Kept { room, suspect });
                }
                Ok(None) => core.held.remove(loaded.run, claim),
                Err(why) => stuck(&core, &epoch, loaded.run, claim, format!("what is stored cannot be read: {why}")),
            }
        }
        if given_back > 0 {
            tracing::warn!(
                "{given_back} processes wait their turn: programs have died while they ran, and fewer of them run together now"
            );
        }
    }
    // Other instances own them by now.
    for (run, claim) in claims {
        core.held.remove(run, claim);
    }
}

/// [`load`], as it calls itself.
fn again(core: Arc<Core>, epoch: Arc<Epoch>, claims: BTreeMap<RunId, i64>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(load(core, epoch, claims))
}

/// How many executions in a row, up to this claim, ended in a death without a new record. Every record carries the
/// claim that wrote it, and an execution that ended in order leaves `calm_claim`, so nothing is counted while it runs.
fn crashes(state: &RunState, claim: i64) -> i64 {
    let newest = state.records.iter().map(|(_, record)| record.claim).max().unwrap_or(0);
    claim - 1 - newest.max(state.process.calm_claim)
}

/// Parks a process for a moment without executing it: its deaths go on counting.
fn give_back(core: &Arc<Core>, epoch: &Arc<Epoch>, process: &ProcessRow, claim: i64, deaths: i64) {
    const PAUSE: Duration = Duration::from_secs(1);
    let (core, instance, run, mut seen) = (core.clone(), epoch.instance, process.run, process.signals);
    tracing::debug!(id = %process.id, run = %run, deaths, "given back unexecuted");
    tokio::spawn(async move {
        loop {
            let wake_at = Some(core.clock.now() + PAUSE);
            let waiting_for = Some("its turn: programs have died while it ran among others".into());
            let park = Park { run, claim, wake_at, seen: Some(seen), waiting_for, deaths };
            let (reply, answer) = oneshot::channel();
            core.queue.push(Job::new(Op::Park(park), From::Epoch(instance), Some(reply)));
            match answer.await {
                Ok(Ok(Outcome::Signalled(signals))) => seen = signals,
                _ => break,
            }
        }
        core.held.remove(run, claim);
    });
}

/// In a task of its own: its row may be locked, and those that were read with it go on.
fn stuck(core: &Arc<Core>, epoch: &Arc<Epoch>, run: RunId, claim: i64, reason: String) {
    tracing::error!(run = %run, "stuck: {reason}");
    let (core, instance) = (core.clone(), epoch.instance);
    tokio::spawn(async move {
        core.mark_stuck(run, claim, || From::Epoch(instance), &reason).await;
        core.held.remove(run, claim);
    });
}
