use std::collections::HashMap;
use std::sync::Mutex;
use tokio::sync::oneshot;

use super::lock;
use crate::storage::{Ended, RunId};

/// Everybody in this program who awaits the end of a process, here or on another instance: one poller for all.
#[derive(Default)]
pub(crate) struct Watch(Mutex<Watched>);

type Watched = HashMap<RunId, Vec<oneshot::Sender<Option<Ended>>>, foldhash::fast::FixedState>;

impl Watch {
    /// Resolves when the run has ended: with how, if this instance ended it; else it, or that it was deleted, has to be
    /// looked up.
    pub(crate) fn watch(&self, run: RunId) -> oneshot::Receiver<Option<Ended>> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.0).entry(run).or_default().push(sender);
        receiver
    }

    pub(crate) fn ended(&self, run: RunId, ended: Option<Ended>) {
        let waiting = lock(&self.0).remove(&run);
        for sender in waiting.into_iter().flatten() {
            let _ = sender.send(ended.clone());
        }
    }

    /// Up to `limit` of the watched runs, others at each turn. Those that nobody awaits any more are forgotten.
    pub(crate) fn some(&self, limit: usize, turn: usize) -> Vec<RunId> {
        let mut watched = lock(&self.0);
        watched.retain(|_, senders| {
            senders.retain(|sender| !sender.is_closed());
            !senders.is_empty()
        });
        let skip = if watched.len() > limit { (turn * limit) % watched.len() } else { 0 };
        watched.keys().copied().cycle().skip(skip).take(limit.min(watched.len())).collect()
    }

    pub(crate) fn wake_all(&self) {
        lock(&self.0).clear();
    }
}
