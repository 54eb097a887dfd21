use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;

use super::lock;
use super::run::{End, Run};
use crate::storage::RunId;

/// The processes that this instance has in memory, and those whose place is reserved.
#[derive(Default)]
pub(crate) struct Held {
    inner: Mutex<Inner>,
    /// Somebody left.
    pub(crate) left: Notify,
}

#[derive(Default)]
struct Inner {
    /// Their order is the same each time; nobody outside has a say in what a run is called.
    slots: HashMap<RunId, Slot, foldhash::fast::FixedState>,
    reserved: usize,
}

/// Places for processes that an operation may bring into memory; given back when dropped.
pub(crate) struct Places {
    held: Arc<Held>,
    pub(crate) count: usize,
}

impl Drop for Places {
    fn drop(&mut self) {
        let mut inner = lock(&self.held.inner);
        inner.reserved = inner.reserved.saturating_sub(self.count);
    }
}

#[derive(Clone)]
pub(crate) enum Slot {
    /// Claimed; its records are being read.
    Loading {
        claim: i64,
        signalled: bool,
    },
    Live(Arc<Run>),
}

impl Slot {
    fn claim(&self) -> i64 {
        match self {
            Self::Loading { claim, .. } => *claim,
            Self::Live(run) => run.claim,
        }
    }
}

impl Held {
    /// Reserves up to `wanted` places below `max`; none if there is none.
    pub(crate) fn reserve(self: &Arc<Self>, wanted: usize, max: usize) -> Option<Places> {
        let mut inner = lock(&self.inner);
        let count = max.saturating_sub(inner.slots.len() + inner.reserved).min(wanted);
        inner.reserved += count;
        (count > 0).then(|| Places { held: self.clone(), count })
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.inner).slots.len()
    }

    pub(crate) fn get(&self, run: RunId) -> Option<Slot> {
        lock(&self.inner).slots.get(&run).cloned()
    }

    /// Makes the entry of a claim, in place of that of an earlier one, whose driver may not have left yet although it has
    /// been given back. False if the claim is here already.
    pub(crate) fn begin_loading(&self, run: RunId, claim: i64) -> bool {
        let before = {
            let mut inner = lock(&self.inner);
            if inner.slots.get(&run).is_some_and(|slot| slot.claim() >= claim) {
                return false;
            }
            inner.slots.insert(run, Slot::Loading { claim, signalled: false })
        };
        if let Some(Slot::Live(stale)) = before {
            stale.end(End::Gone);
        }
        true
    }

    /// Puts a run into the place that its claim has, or that a new process finds empty, and says whether it was signalled
    /// while it was loading. None if the place is another claim's: the run must not run.
    pub(crate) fn live(&self, run: Arc<Run>) -> Option<bool> {
        let mut inner = lock(&self.inner);
        let signalled = match inner.slots.get(&run.run) {
            None if run.claim == 1 => false,
            Some(Slot::Loading { claim, signalled }) if *claim == run.claim => *signalled,
            _ => return None,
        };
        inner.slots.insert(run.run, Slot::Live(run));
        Some(signalled)
    }

    pub(crate) fn signalled_while_loading(&self, run: RunId) {
        if let Some(Slot::Loading { signalled, .. }) = lock(&self.inner).slots.get_mut(&run) {
            *signalled = true;
        }
    }

    /// Removes it, if it is still this claim's.
    pub(crate) fn remove(&self, run: RunId, claim: i64) {
        let removed = {
            let mut inner = lock(&self.inner);
            match inner.slots.get(&run) {
                Some(slot) if slot.claim() == claim => inner.slots.remove(&run),
                _ => None,
            }
        };
        drop(removed);
        self.left.notify_waiters();
    }

    pub(crate) fn runs(&self) -> Vec<Arc<Run>> {
        let live = |slot: &Slot| match slot {
            Slot::Live(run) => Some(run.clone()),
            Slot::Loading { .. } => None,
        };
        lock(&self.inner).slots.values().filter_map(live).collect()
    }

    /// Ends everything without writing anything.
    pub(crate) fn drop_all(&self) {
        for run in self.runs() {
            run.end(End::Gone);
        }
        lock(&self.inner).slots.retain(|_, slot| matches!(slot, Slot::Live(_)));
    }

    /// Against what the database says this instance owns: what nobody holds under its claim, and what is held without
    /// being owned.
    pub(crate) fn compare(&self, owned: &[(RunId, i64)]) -> (Vec<(RunId, i64)>, Vec<Arc<Run>>) {
        let inner = lock(&self.inner);
        let held = |run: &RunId, claim: i64| inner.slots.get(run).is_some_and(|slot| slot.claim() == claim);
        let strays = owned.iter().filter(|(run, claim)| !held(run, *claim)).copied().collect();
        let owned: HashMap<RunId, i64> = owned.iter().copied().collect();
        let lost = |(run, slot): (&RunId, &Slot)| match slot {
            Slot::Live(live) if owned.get(run) != Some(&live.claim) => Some(live.clone()),
            _ => None,
        };
        let lost = inner.slots.iter().filter_map(lost).collect();
        (strays, lost)
    }

    /// Waits until nothing is held but what does not leave: code that blocks its thread after it was told to end. That is let
    /// go: nothing that it does counts any more.
    pub(crate) async fn vacate(&self) {
        /// No await, and so no end, for so long.
        const BLOCKED: Duration = Duration::from_secs(1);
        if tokio::time::timeout(BLOCKED, self.empty()).await.is_err() {
            let left = |slot: &mut Slot| match slot {
                Slot::Live(run) if !run.state().code_over => Some(run.clone()),
                _ => None,
            };
            let blocked: Vec<Arc<Run>> = lock(&self.inner).slots.values_mut().filter_map(left).collect();
            for run in blocked {
                tracing::error!(id = %run.id, run = %run.run, "its code blocks a thread and does not end; it is left behind");
                self.remove(run.run, run.claim);
            }
            self.empty().await;
        }
    }

    /// Waits until nothing is held.
    pub(crate) async fn empty(&self) {
        loop {
            let mut left = std::pin::pin!(self.left.notified());
            left.as_mut().enable();
            if self.len() == 0 {
                return;
            }
            left.await;
        }
    }
}
