//! The heartbeat: on a thread and a runtime of its own, so that code which blocks every other thread does not cost
//! the lease.

use chrono::{DateTime, Utc};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::Core;
use super::epoch::Epoch;
use super::pulse::Standstill;
use super::ratchet::Ratchet;
use crate::storage::{Heart, NewInstance, Result, StorageError};

/// Stops the heart when dropped; with the heart goes the instance's proof of life.
pub(super) struct HeartHandle {
    stop: Arc<Ratchet<bool>>,
    stopped: Option<oneshot::Receiver<()>>,
}

impl HeartHandle {
    /// Stops and waits until the proof of life is gone.
    pub(super) async fn stop(mut self) {
        self.stop.reach(true);
        if let Some(stopped) = self.stopped.take() {
            let _ = stopped.await;
        }
    }
}

impl Drop for HeartHandle {
    fn drop(&mut self) {
        self.stop.reach(true);
    }
}

/// Enlists an instance and starts its heart. Returns the database's time.
pub(super) async fn start(core: &Arc<Core>, epoch: &Arc<Epoch>) -> Result<HeartHandle> {
    let new = NewInstance {
        id: epoch.instance,
        namespace: core.namespace.clone(),
        label: core.settings.label.clone(),
        kinds: core.kind_names(),
        expiry: core.settings.expiry,
    };
    let (ready, enlisted) = oneshot::channel();
    let (stopped_tx, stopped) = oneshot::channel::<()>();
    let stop = Arc::new(Ratchet::new(false));
    let service = core.storage.heartbeat_thread().then(Handle::current);
    let beating = beat(core.clone(), epoch.clone(), new, ready, stop.clone(), service);
    if core.storage.heartbeat_thread() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| StorageError::unavailable(format!("no runtime for the heartbeat: {e}")))?;
        std::thread::Builder::new()
            .name("durable-heartbeat".into())
            .spawn(move || {
                runtime.block_on(beating);
                drop(stopped_tx);
            })
            .map_err(|e| StorageError::unavailable(format!("no thread for the heartbeat: {e}")))?;
    } else {
        tokio::spawn(async move {
            beating.await;
            drop(stopped_tx);
        });
    }
    let handle = HeartHandle { stop, stopped: Some(stopped) };
    let now = enlisted.await.map_err(|_| StorageError::unavailable("the heartbeat's thread ended"))??;
    core.clock.sync(now);
    Ok(handle)
}

async fn beat(
    core: Arc<Core>,
    epoch: Arc<Epoch>,
    new: NewInstance,
    ready: oneshot::Sender<Result<DateTime<Utc>>>,
    stop: Arc<Ratchet<bool>>,
    service: Option<Handle>,
) {
    let sent = core.live.sending();
    let enlisting = core.storage.enlist(&new);
    let mut heart: Box<dyn Heart> = tokio::select! {
        biased;
        () = stop.reached(true) => return,
        enlisted = enlisting => match enlisted {
            Ok((heart, now)) => {
                core.live.acknowledged(sent);
                let _ = ready.send(Ok(now));
                heart
            }
            Err(error) => {
                let _ = ready.send(Err(error));
                return;
            }
        },
    };
    let interval = core.settings.heartbeat;
    let mut pause = interval;
    let mut failing = false;
    let mut cursor = 0;
    let mut standstill = Standstill::new();
    loop {
        tokio::select! {
            biased;
            () = stop.reached(true) => return,
            () = tokio::time::sleep(pause) => {}
            () = core.storage.changed(&mut cursor, pause), if core.storage.announces_everything() => {}
        }
        if let Some(runtime) = &service {
            core.ask_for_tick(runtime);
            let stalled = standstill.look(&core.pulse, interval * 2);
            if stalled >= core.settings.stall_limit {
                tracing::error!(
                    instance = %epoch.instance,
                    "code has blocked the runtime's threads for {stalled:?}; another instance takes over"
                );
                // With the heart goes the proof of life.
                epoch.end();
                return;
            }
        }
        let sent = core.live.sending();
        let beat = tokio::select! {
            biased;
            // The heart is dropped, and with it the connection that the beat is on.
            () = stop.reached(true) => return,
            beat = heart.beat() => beat,
        };
        match beat {
            Ok(now) => {
                core.clock.sync(now);
                core.live.acknowledged(sent);
                if std::mem::take(&mut failing) {
                    tracing::info!("the heartbeat works again");
                }
                pause = interval;
            }
            Err(StorageError::Fenced) => {
                tracing::warn!(instance = %epoch.instance, "this instance was taken over; it goes on as a new one");
                epoch.end();
                return;
            }
            Err(error) => {
                core.note_trouble(&error.to_string());
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!("the heartbeat failed ({error}); trying again");
                }
                pause = (interval / 10).clamp(Duration::from_millis(20), Duration::from_millis(500));
            }
        }
    }
}
