//! Notices that another instance has died, takes its right to write, and hands its processes back.

use chrono::{DateTime, Utc};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

use super::Core;
use super::epoch::Epoch;
use crate::storage::{InstanceId, LockState, Peer, Peers};

/// Between the two looks that must agree before a free lock counts, at least; and this many times as long as it takes the
/// instance to have its lock again, on a slow network say, but no longer than half the expiry.
const SECOND_LOOK: Duration = Duration::from_millis(200);
const COMEBACKS: u32 = 3;
/// How many processes are handed back at a time.
const CHUNK: usize = 1000;
/// How many expiries are between two looks for owners that nobody knows: only other hands make them.
const STRANGERS: u32 = 6;

/// What this instance knows of another one.
#[derive(Debug)]
struct Known {
    heartbeat_at: DateTime<Utc>,
    /// For how long, in time in which this instance could write itself, the heartbeat has not changed.
    silent: Duration,
    /// Since when its lock has been seen free without interruption.
    free_since: Option<Instant>,
}

/// Decides who is dead. It has no clock of its own but what it is told.
#[derive(Debug, Default)]
pub(crate) struct Observer {
    known: HashMap<InstanceId, Known>,
    last: Option<(DateTime<Utc>, Instant)>,
}

impl Observer {
    /// Takes a look into account. `fresh`: this instance's own heartbeat is recent; otherwise the time since the last
    /// look proves nothing about others.
    pub(crate) fn look(&mut self, seen: &Peers, at: Instant, fresh: bool, expiry: Duration) -> Vec<Peer> {
        let passed = match self.last {
            Some((then, instant)) if fresh => {
                let by_database = (seen.now - then).to_std().unwrap_or(Duration::ZERO);
                // Either clock may have jumped; neither may make anybody older than both say.
                // Nor does a pause in which both stood still count as the peer's silence: hence the bound for one look.
                by_database.min(at.saturating_duration_since(instant)).min(expiry / 3)
            }
            _ => Duration::ZERO,
        };
        self.last = Some((seen.now, at));
        self.known.retain(|instance, _| seen.peers.iter().any(|peer| peer.instance == *instance));
        let mut dead = Vec::new();
        for peer in &seen.peers {
            if peer.fenced {
                dead.push(peer.clone());
                continue;
            }
            let known = self.known.entry(peer.instance).or_insert_with(|| Known {
                heartbeat_at: peer.heartbeat_at,
                silent: Duration::ZERO,
                free_since: None,
            });
            if known.heartbeat_at == peer.heartbeat_at {
                known.silent += passed;
            } else {
                known.heartbeat_at = peer.heartbeat_at;
                known.silent = Duration::ZERO;
                known.free_since = None;
            }
            // Where they do not agree, the more patient one is right.
            let expiry = expiry.max(peer.expiry);
            let second_look = peer.comeback.saturating_mul(COMEBACKS).min(expiry / 2).max(SECOND_LOOK);
            let free_for = match (peer.lock, known.free_since) {
                (LockState::Free, Some(since)) => at.duration_since(since),
                (LockState::Free, None) => {
                    known.free_since = fresh.then_some(at);
                    Duration::ZERO
                }
                _ => {
                    known.free_since = None;
                    Duration::ZERO
                }
            };
            if free_for >= second_look || known.silent >= expiry {
                dead.push(peer.clone());
            }
        }
        dead
    }

    /// Whether somebody's lock was seen free for the first time.
    fn suspects(&self) -> bool {
        self.known.values().any(|known| known.free_since.is_some())
    }
}

pub(super) async fn watch_peers(core: Arc<Core>, epoch: Arc<Epoch>) {
    let mut observer = Observer::default();
    let mut cursor = 0;
    let mut looked: Option<Instant> = None;
    while !epoch.is_over() {
        let mut pause = core.settings.heartbeat;
        if looked.is_none_or(|at| at.elapsed() >= core.settings.expiry.saturating_mul(STRANGERS)) {
            match core.storage.reinstate().await {
                Ok(strangers) => {
                    looked = Some(Instant::now());
                    if strangers > 0 {
                        tracing::warn!("{strangers} instances lack a row; what they own is handed back");
                    }
                }
                Err(error) => tracing::debug!("looking for owners that nobody knows failed: {error}"),
            }
        }
        match core.storage.peers(&core.namespace, epoch.instance).await {
            Ok(peers) => {
                core.foreign.looked(&peers);
                let fresh = core.live.age() < core.settings.heartbeat * 2;
                for dead in observer.look(&peers, Instant::now(), fresh, core.settings.expiry) {
                    if let Err(error) = take_over(&core, &epoch, &dead).await {
                        tracing::warn!(instance = %dead.instance, "taking over failed ({error}); trying again");
                        pause = SECOND_LOOK;
                    }
                }
                if observer.suspects() {
                    pause = SECOND_LOOK;
                }
            }
            Err(error) => {
                core.note_trouble(&error.to_string());
                tracing::debug!("looking at the other instances failed: {error}");
                observer.last = None;
            }
        }
        tokio::select! {
            biased;
            () = epoch.over() => {}
            () = tokio::time::sleep(pause) => {}
            () = core.storage.changed(&mut cursor, pause), if pause > SECOND_LOOK && core.storage.announces_everything() => {}
        }
    }
}

async fn take_over(core: &Core, epoch: &Epoch, dead: &Peer) -> crate::storage::Result<()> {
    if !dead.fenced && !core.storage.fence(dead).await? {
        return Ok(());
    }
    tracing::warn!(instance = %dead.instance, lock = ?dead.lock, last_heartbeat = %dead.heartbeat_at, "took over from an instance that has died");
    while !epoch.is_over() {
        let released = core.storage.release(dead.instance, CHUNK).await?;
        core.poke();
        if released == 0 {
            break;
        }
        tracing::info!(instance = %dead.instance, processes = released, "handed back");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::TimeDelta;

    const EXPIRY: Duration = Duration::from_secs(10);

    struct Scene {
        observer: Observer,
        peer: Peer,
        now: DateTime<Utc>,
        at: Instant,
    }

    impl Scene {
        fn new(lock: LockState) -> Self {
            let now = DateTime::UNIX_EPOCH;
            let peer = Peer {
                instance: InstanceId::new(),
                heartbeat_at: now,
                lock,
                fenced: false,
                comeback: Duration::ZERO,
                expiry: EXPIRY,
                kinds: vec![],
            };
            Self { observer: Observer::default(), peer, now, at: Instant::now() }
        }
        fn look(&mut self, database: Duration, own: Duration, fresh: bool) -> bool {
            self.now += TimeDelta::from_std(database).unwrap();
            self.at += own;
            let peers = Peers { now: self.now, peers: vec![self.peer.clone()] };
            !self.observer.look(&peers, self.at, fresh, EXPIRY).is_empty()
        }
        fn after(&mut self, seconds: u64) -> bool {
            self.look(Duration::from_secs(seconds), Duration::from_secs(seconds), true)
        }
    }

    #[test]
    fn a_silent_peer_is_dead_after_the_expiry() {
        let mut scene = Scene::new(LockState::Unknown);
        let looks: Vec<bool> = (0..7).map(|_| scene.after(2)).collect();
        assert_eq!(looks, [false, false, false, false, false, true, true]);
        scene.peer.heartbeat_at += TimeDelta::seconds(1);
        assert!(!scene.after(2), "a heartbeat starts the count anew");
    }

    #[test]
    fn time_in_which_the_observer_could_not_write_proves_nothing() {
        let mut scene = Scene::new(LockState::Unknown);
        assert!(!scene.after(2));
        assert!(!scene.look(Duration::from_secs(600), Duration::from_secs(600), false));
        assert!(!scene.after(2));
    }

    /// Their containers, say: whoever goes on first sees the other as it was.
    #[test]
    fn both_were_frozen() {
        let mut scene = Scene::new(LockState::Unknown);
        assert!(!scene.after(2));
        assert!(!scene.after(60));
        assert!(!scene.after(2));
    }

    /// One of them was set otherwise, while the service is being changed.
    #[test]
    fn the_more_patient_expiry_counts() {
        let mut scene = Scene::new(LockState::Unknown);
        scene.peer.expiry = EXPIRY * 3;
        let looks: Vec<bool> = (0..18).map(|_| scene.after(2)).collect();
        assert_eq!(looks.iter().position(|dead| *dead), Some(15));
    }

    #[test]
    fn a_clock_that_jumps_kills_nobody() {
        let mut scene = Scene::new(LockState::Unknown);
        assert!(!scene.after(1));
        assert!(!scene.look(Duration::from_secs(3600), Duration::from_secs(2), true), "the database's clock");
        assert!(!scene.look(Duration::from_secs(2), Duration::from_secs(3600), true), "this instance's clock");
    }

    #[test]
    fn a_free_lock_counts_at_the_second_look() {
        let mut scene = Scene::new(LockState::Free);
        let ms = Duration::from_millis;
        assert!(!scene.look(ms(0), ms(0), true));
        assert!(!scene.look(ms(50), ms(50), true), "too soon");
        assert!(scene.look(ms(200), ms(200), true));
    }

    #[test]
    fn a_slow_network_is_given_time() {
        let mut scene = Scene::new(LockState::Free);
        let ms = Duration::from_millis;
        scene.peer.comeback = ms(1500);
        let looks: Vec<bool> = (0..24).map(|_| scene.look(ms(200), ms(200), true)).collect();
        assert_eq!(looks.iter().position(|dead| *dead), Some(23), "4.5 s");
        // Not for as long as a heartbeat may be late.
        let mut scene = Scene::new(LockState::Free);
        scene.peer.comeback = ms(60_000);
        let looks: Vec<bool> = (0..30).map(|_| scene.look(ms(200), ms(200), true)).collect();
        assert_eq!(looks.iter().position(|dead| *dead), Some(25), "5 s");
    }

    #[test]
    fn a_lock_that_was_held_in_between_counts_anew() {
        let mut scene = Scene::new(LockState::Free);
        assert!(!scene.after(1));
        scene.peer.lock = LockState::Held;
        assert!(!scene.after(1));
        scene.peer.lock = LockState::Free;
        assert!(!scene.after(1));
        scene.peer.heartbeat_at += TimeDelta::seconds(1);
        assert!(!scene.after(1), "a heartbeat since");
        assert!(scene.after(1));
    }

    #[test]
    fn a_held_lock_does_not_save_a_silent_peer() {
        let mut scene = Scene::new(LockState::Held);
        for _ in 0..5 {
            assert!(!scene.after(2));
        }
        assert!(scene.after(2), "a program that hangs is taken over too");
    }
}
