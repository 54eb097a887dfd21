//! Processes whose input or records this instance's code cannot read. While a service is being deployed, older and newer code
//! run side by side: so the instance leaves such a process to the others for a while before it marks it as stuck.

use chrono::TimeDelta;
use std::collections::{HashMap, HashSet};
use std::sync::Mutex;
use std::time::Duration;
use tokio::time::Instant;

use super::lock;
use crate::storage::{Peers, RunId};

/// How many processes are remembered. Beyond that all are forgotten, so their patience begins anew.
const MOST: usize = 10_000;

pub(crate) struct Foreign {
    /// The kinds that other instances had registered at the last look; before the first one it may be any.
    others: Mutex<Option<HashSet<Box<str>>>>,
    met: Mutex<HashMap<RunId, Met>>,
    /// When this instance last left a process of this kind to the others.
    left: Mutex<HashMap<Box<str>, Instant>>,
}

struct Met {
    since: Instant,
    /// The execution that had recorded something last.
    newest: i64,
}

impl Foreign {
    pub(crate) fn new() -> Self {
        Self { others: Mutex::new(None), met: Mutex::default(), left: Mutex::default() }
    }

    /// Notes which kinds the other instances have registered.
    pub(crate) fn looked(&self, peers: &Peers) {
        let living = peers.peers.iter().filter(|peer| !peer.fenced);
        *lock(&self.others) = Some(living.flat_map(|peer| peer.kinds.iter().cloned()).collect());
    }

    /// Whether no other instance had registered this kind at the last look.
    pub(crate) fn is_alone_with(&self, kind: &str) -> bool {
        lock(&self.others).as_ref().is_some_and(|kinds| !kinds.contains(kind))
    }

    /// How much later than the others this instance claims due processes of a kind, if it has left one of that kind to them.
    /// Without that it would claim the same process again: no other instance knows as early when it is due.
    pub(crate) fn head_start(&self, kind: &str, patience: Duration) -> TimeDelta {
        const HEAD_START: TimeDelta = TimeDelta::milliseconds(1200);
        let left = lock(&self.left).get(kind).is_some_and(|left| left.elapsed() < patience);
        if left { HEAD_START } else { TimeDelta::zero() }
    }

    /// How long to leave a run to the others after an execution could not read it: half of the time since it was first met,
    /// from one to ten seconds. [`None`] once the patience is over, or if no other instance runs the kind: then it is stuck.
    ///
    /// `newest` is the execution that recorded something last. If another one has since, the patience begins anew.
    pub(crate) fn leave(&self, kind: &str, run: RunId, newest: i64, patience: Duration) -> Option<Duration> {
        const SHORTEST: Duration = Duration::from_secs(1);
        const LONGEST: Duration = Duration::from_secs(10);
        if self.is_alone_with(kind) {
            return None;
        }
        let now = Instant::now();
        let mut met = lock(&self.met);
        met.retain(|_, met| now - met.since <= patience.saturating_mul(2));
        if met.len() >= MOST {
            met.clear();
        }
        let this = met.entry(run).or_insert(Met { since: now, newest });
        if newest != this.newest {
            *this = Met { since: now, newest };
        }
        let passed = now - this.since;
        if passed < patience {
            lock(&self.left).insert(kind.into(), now);
        }
        (passed < patience).then(|| (passed / 2).clamp(SHORTEST, LONGEST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{InstanceId, LockState, Peer};

    #[tokio::test(start_paused = true)]
    async fn not_for_ever_and_not_alone() {
        const PATIENCE: Duration = Duration::from_secs(60);
        let foreign = Foreign::new();
        let run = RunId::new();
        let run_by = |kind: &str| {
            let now = chrono::DateTime::UNIX_EPOCH;
            let (zero, kinds) = (Duration::ZERO, vec![kind.into()]);
            let lock = LockState::Held;
            let instance = InstanceId::new();
            let peer = Peer { instance, heartbeat_at: now, lock, fenced: false, comeback: zero, kinds, expiry: zero };
            foreign.looked(&Peers { now, peers: vec![peer] });
        };
        run_by("other");
        assert_eq!(foreign.leave("kind", run, 1, PATIENCE), None);
        run_by("kind");
        let mut left = Duration::ZERO;
        while let Some(pause) = foreign.leave("kind", run, 1, PATIENCE) {
            tokio::time::advance(pause).await;
            left += pause;
        }
        assert!((60..70).contains(&left.as_secs()), "{left:?}");
        assert!(foreign.head_start("kind", PATIENCE) > TimeDelta::zero());
        assert_eq!(foreign.head_start("other", PATIENCE), TimeDelta::zero());
        assert!(foreign.leave("kind", run, 3, PATIENCE).is_some(), "another one has gone on with it since");
    }
}
