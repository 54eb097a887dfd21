//! Looks for work: due processes, signals from other instances, the end of processes that somebody here awaits.

use chrono::{DateTime, Utc};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

use super::epoch::Epoch;
use super::held::Slot;
use super::queue::{From, Job};
use super::{Backoff, Core};
use crate::storage::{Op, Outcome, Poll, Polled};

const SHORTEST: Duration = Duration::from_millis(20);
/// How many awaited processes one look asks about.
const WATCHED: usize = 1000;

pub(super) async fn poll(core: Arc<Core>, epoch: Arc<Epoch>) {
    let mut interval = SHORTEST;
    let mut backoff = Backoff::new();
    // Where the next look goes on among the kinds and among the watched runs.
    let mut turn = 0;
    let mut cursor = 0;
    while !epoch.is_over() {
        if !core.live.is_fresh() {
            // What is claimed now could not start.
            tokio::select! { biased; () = epoch.over() => return, () = core.live.fresh() => {} }
        }
        let stopping = core.is_stopping();
        let question = Poll {
            instance: epoch.instance,
            namespace: core.namespace.clone(),
            kinds: if stopping { Vec::new() } else { core.kind_names() },
            watched: core.watch.some(WATCHED, turn),
        };
        turn += 1;
        let mut polled = match core.storage.poll(&question).await {
            Ok(polled) => polled,
            Err(error) => {
                core.note_trouble(&error.to_string());
                if backoff.pause(&epoch, "looking for work", &error).await.is_err() {
                    return;
                }
                continue;
            }
        };
        backoff = Backoff::new();
        core.pulse.looked.set();
        core.clock.sync(polled.now);
        for (kind, at) in &mut polled.due {
            let head_start = core.foreign.head_start(kind, core.settings.unreadable_patience);
            *at = at.checked_add_signed(head_start).unwrap_or(*at);
        }
        let worked = act(&core, &epoch, &polled, turn).await;
        if polled.more {
            tokio::task::yield_now().await;
            continue;
        }
        interval = if worked { SHORTEST } else { (interval * 2).min(core.settings.poll) };
        sleep(&core, &epoch, &mut cursor, interval, &polled, worked).await;
    }
}

/// Waits until the next due time, the interval's end, or a hint.
async fn sleep(core: &Core, epoch: &Epoch, cursor: &mut u64, interval: Duration, polled: &Polled, worked: bool) {
    let next = polled.due.iter().map(|(_, at)| *at).filter(|at| *at > polled.now).min();
    let next = next.and_then(|at| (at - polled.now).to_std().ok()).map_or(interval, |until| until.min(interval));
    core.set_next_look(next);
    // Other programs' writes come in bursts: one look answers for all of the next moment.
    let at_least = if worked { Duration::ZERO } else { SHORTEST };
    tokio::select! {
        biased;
        () = epoch.over() => {}
        () = core.poked.notified() => {}
        () = async {
            tokio::time::sleep(at_least.min(next)).await;
            core.storage.changed(cursor, next - at_least.min(next)).await;
        } => {}
    }
}

/// Says whether there was anything to do.
async fn act(core: &Arc<Core>, epoch: &Arc<Epoch>, polled: &Polled, turn: usize) -> bool {
    let mut worked = false;
    for run in &polled.ended {
        worked = true;
        core.watch.ended(*run, None);
    }
    for (run, signals) in &polled.signalled {
        match core.held.get(*run) {
            Some(Slot::Live(live)) if live.state().mail.seen == *signals => {
                // Read already; say so, or every look would find it again.
                let op = Op::Seen { run: *run, claim: live.claim, signals: *signals };
                core.queue.push(Job::new(op, From::Epoch(epoch.instance), None));
            }
            Some(_) => {
                worked = true;
                core.held.signalled_while_loading(*run);
                core.post.fetch([*run]);
            }
            None => {}
        }
    }
    let mut due: Vec<_> = polled.due.iter().filter(|(_, at)| *at <= polled.now).collect();
    if due.is_empty() || core.is_stopping() {
        return worked;
    }
    // Each kind is first in turn, or a busy one would starve the others.
    let first = turn % due.len();
    due.rotate_left(first);
    for (kind, _) in due {
        // What is claimed while there is no room for it would be kept from other instances.
        if core.is_stopping() || epoch.is_over() || core.room.is_wanted() {
            break;
        }
        let Some(places) = core.held.reserve(core.settings.claim, core.settings.max_processes) else {
            core.press();
            break;
        };
        let room = places.count;
        let span = tracing::info_span!("claim", kind = %kind, limit = room);
        let (reply, answer) = oneshot::channel();
        let op = Op::Claim { kind: kind.clone(), limit: room };
        core.queue.push(Job { places: Some(places), ..Job::new(op, From::Epoch(epoch.instance), Some(reply)) });
        if let Ok(Ok(Outcome::Claimed(claimed))) = answer.await {
            span.in_scope(|| tracing::debug!(count = claimed.len(), "claimed"));
            worked |= !claimed.is_empty();
        }
    }
    worked
}

impl Core {
    /// Makes the next look happen now.
    pub(crate) fn poke(&self) {
        self.poked.notify_one();
    }

    /// Makes the next look happen now, if it would come after this time otherwise.
    pub(super) fn poke_before(&self, at: DateTime<Utc>) {
        if self.clock.instant(at) < *super::lock(&self.next_look) {
            self.poke();
        }
    }

    fn set_next_look(&self, after: Duration) {
        *super::lock(&self.next_look) = tokio::time::Instant::now() + after;
    }

    /// There is due work and no room: whatever waits quietly parks now.
    fn press(&self) {
        for run in self.held.runs() {
            if run.only_we_can_wake() && !run.state().waits.is_empty() {
                run.state().pressed = true;
                run.wake.nudge();
            }
        }
    }
}
