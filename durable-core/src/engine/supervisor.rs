//! The life of a host: one epoch after the other, each with a heart, a writer, a poller; and its end.

use std::sync::Arc;
use tokio::sync::oneshot;
use tokio::task::JoinSet;

use super::committer::Committer;
use super::epoch::Epoch;
use super::heart::HeartHandle;
use super::writer::Writer;
use super::{Backoff, Core, Phase, aside, heart, poller, post, takeover};
use crate::storage::StorageError;

/// Runs a host until it is shut down or dropped. `ready` hears how the first enlistment went.
pub(crate) async fn supervise(core: Arc<Core>, ready: oneshot::Sender<Result<(), StorageError>>) {
    let _dead = OnDrop(core.clone());
    let mut ready = Some(ready);
    let mut backoff = Backoff::new();
    let started = tokio::time::Instant::now();
    loop {
        let epoch = Arc::new(Epoch::new(core.new_instance()));
        let heart = tokio::select! {
            biased;
            () = reaches(&core, Phase::Stopping) => return,
            heart = heart::start(&core, &epoch) => heart,
        };
        let heart = match (heart, ready.take()) {
            (Ok(heart), ready) => {
                let _ = ready.map(|ready| ready.send(Ok(())));
                heart
            }
            (Err(error), Some(first)) if !error.is_transient() || started.elapsed() > core.settings.call_timeout => {
                let _ = first.send(Err(error));
                return;
            }
            (Err(error), still_first) => {
                ready = still_first;
                core.note_trouble(&error.to_string());
                let pause = backoff.next();
                tracing::warn!("the instance could not be enlisted ({error}); trying again");
                tokio::select! {
                    biased;
                    () = reaches(&core, Phase::Stopping) => return,
                    () = tokio::time::sleep(pause) => continue,
                }
            }
        };
        tracing::debug!(instance = %epoch.instance, "enlisted");
        let enlisted = tokio::time::Instant::now();
        if let Ended::Stop = live(&core, &epoch, heart).await {
            return;
        }
        // Epochs that end at once are not begun at once: each is a session, and rows for the others to clear away.
        if enlisted.elapsed() > core.settings.heartbeat {
            backoff = Backoff::new();
        } else {
            tokio::select! {
                biased;
                () = reaches(&core, Phase::Stopping) => return,
                () = tokio::time::sleep(backoff.next()) => {}
            }
        }
    }
}

enum Ended {
    Fenced,
    Stop,
}

async fn live(core: &Arc<Core>, epoch: &Arc<Epoch>, heart: HeartHandle) -> Ended {
    let mut tasks = JoinSet::new();
    core.queue.serve(Some(epoch.instance));
    let committer = Committer::new(core.clone(), epoch.clone());
    let mut writer = tokio::spawn(Writer::new(core.clone(), epoch.clone(), committer.clone()).write());
    tasks.spawn(aside::write(core.clone(), epoch.clone(), committer));
    tasks.spawn(poller::poll(core.clone(), epoch.clone()));
    tasks.spawn(takeover::watch_peers(core.clone(), epoch.clone()));
    tasks.spawn(post::deliver(core.clone(), epoch.clone()));
    let mut writes = true;
    // A task that ends with a panic must not leave an instance that only looks alive.
    let fenced = tokio::select! {
        biased;
        () = epoch.over() => true,
        ended = tasks.join_next() => {
            // In order, once the epoch is over: it may be seen here before it is above.
            if !epoch.is_over() || !matches!(ended, Some(Ok(()))) {
                tracing::error!("a part of the engine ended unexpectedly: {ended:?}");
            }
            true
        }
        ended = &mut writer => {
            writes = false;
            if let Err(error) = ended {
                tracing::error!("the writer ended unexpectedly: {error}");
            }
            true
        }
        () = stopped(core) => false,
    };
    if core.phase() == Phase::Dead {
        epoch.end();
        writer.abort();
        core.held.drop_all();
        return Ended::Stop;
    }
    if fenced {
        epoch.end();
        core.held.drop_all();
        // Nobody writes for this instance any more: who waits for it, or comes to, is told at once.
        core.queue.serve(None);
        // The writer may be waiting for the database; what it gets back into the queue must be there first.
        if writes {
            let _ = writer.await;
        }
        while tasks.join_next().await.is_some() {}
        core.held.vacate().await;
        heart.stop().await;
        return if core.phase() == Phase::Live { Ended::Fenced } else { Ended::Stop };
    }
    // All has been given back; what is queued still goes out, as long as anybody waits for that.
    epoch.drain();
    tokio::select! {
        _ = &mut writer => {}
        () = reaches(core, Phase::Dead) => writer.abort(),
    }
    epoch.end();
    core.queue.serve(None);
    while tasks.join_next().await.is_some() {}
    heart.stop().await;
    if let Err(error) = core.storage.retire(epoch.instance).await {
        tracing::warn!("the instance's row could not be removed ({error}); another instance will");
    }
    Ended::Stop
}

/// Returns when the host is dead, or is stopping and holds nothing any more.
async fn stopped(core: &Arc<Core>) {
    tokio::select! {
        biased;
        () = reaches(core, Phase::Dead) => {}
        () = async {
            reaches(core, Phase::Stopping).await;
            core.held.empty().await;
        } => {}
    }
}

pub(crate) async fn reaches(core: &Core, phase: Phase) {
    core.phase.reached(phase).await;
}

/// Whatever ends the supervisor, a dropped runtime too, ends the host.
struct OnDrop(Arc<Core>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.phase.reach(Phase::Dead);
        self.0.held.drop_all();
        self.0.queue.close();
        self.0.watch.wake_all();
    }
}
