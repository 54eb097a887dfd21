//! The engine of one host: batches, schedules and recovers, over any storage. See `ARCHITECTURE.md`.

mod aside;
pub(crate) mod clock;
mod committer;
mod drive;
pub(crate) mod epoch;
mod foreign;
mod heart;
pub(crate) mod held;
mod load;
mod names;
pub(crate) mod operation;
mod poller;
mod post;
pub(crate) mod pulse;
pub(crate) mod queue;
mod ratchet;
mod reading;
pub(crate) mod registry;
pub(crate) mod replay;
pub(crate) mod room;
mod rows;
pub(crate) mod run;
mod sent;
mod stuck;
mod supervisor;
pub(crate) mod surroundings;
pub(crate) mod suspects;
mod takeover;
pub(crate) mod wake;
mod watch;
mod writer;

pub(crate) use supervisor::{reaches, supervise};

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::storage::{InstanceId, RunId, Storage};
use ratchet::Ratchet;
use surroundings::Surroundings;

/// What a host is set to.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) label: Box<str>,
    pub(crate) heartbeat: Duration,
    pub(crate) expiry: Duration,
    pub(crate) quiet_time: Duration,
    pub(crate) poll: Duration,
    pub(crate) max_processes: usize,
    pub(crate) max_payload: usize,
    pub(crate) max_crashes: i64,
    pub(crate) call_timeout: Duration,
    pub(crate) batch_ops: usize,
    pub(crate) batch_bytes: usize,
    pub(crate) claim: usize,
    pub(crate) reconcile_every: Duration,
    pub(crate) stall_limit: Duration,
    pub(crate) max_loaded: usize,
    pub(crate) unreadable_patience: Duration,
}

/// How far a host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Live,
    /// No new work; what runs is brought to its next record.
    Stopping,
    /// Everything is dropped.
    Dead,
}

/// What all parts of a host share.
pub(crate) struct Core {
    pub(crate) storage: Arc<dyn Storage>,
    pub(crate) surroundings: Arc<dyn Surroundings>,
    pub(crate) namespace: Box<str>,
    pub(crate) settings: Settings,
    pub(crate) kinds: HashMap<Arc<str>, Arc<dyn registry::Entry>>,
    pub(crate) clock: clock::DbClock,
    pub(crate) live: clock::Liveness,
    pub(crate) pulse: pulse::Pulse,
    pub(crate) queue: queue::Queue,
    pub(crate) held: Arc<held::Held>,
    pub(crate) room: Arc<room::Room>,
    pub(crate) suspects: Arc<suspects::Suspects>,
    pub(crate) foreign: foreign::Foreign,
    pub(crate) post: post::Post,
    pub(crate) watch: watch::Watch,
    pub(crate) phase: Ratchet<Phase>,
    pub(crate) said_kept_in_memory: Once,
    poked: Notify,
    /// What is owned may not be what is held.
    compares: AtomicBool,
    next_look: Mutex<Instant>,
    /// What the storage complained of last, for the errors of calls that time out.
    trouble: Mutex<Option<Box<str>>>,
}

impl Core {
    pub(crate) fn new(
        storage: Arc<dyn Storage>,
        surroundings: Arc<dyn Surroundings>,
        namespace: Box<str>,
        settings: Settings,
        kinds: HashMap<Arc<str>, Arc<dyn registry::Entry>>,
    ) -> Self {
        Self {
            storage,
            namespace,
            live: clock::Liveness::new(settings.expiry, surroundings.clone()),
            settings,
            kinds,
            clock: clock::DbClock::new(surroundings.now()),
            pulse: pulse::Pulse::new(),
            surroundings,
            queue: queue::Queue::new(),
            held: Arc::default(),
            room: Arc::default(),
            suspects: Arc::default(),
            foreign: foreign::Foreign::new(),
            post: post::Post::default(),
            watch: watch::Watch::default(),
            phase: Ratchet::new(Phase::Live),
            said_kept_in_memory: Once::default(),
            poked: Notify::new(),
            compares: AtomicBool::new(false),
            next_look: Mutex::new(Instant::now()),
            trouble: Mutex::new(None),
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.phase.now()
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.phase() >= Phase::Stopping
    }

    pub(crate) fn new_run(&self) -> RunId {
        RunId(self.surroundings.id())
    }

    pub(crate) fn new_instance(&self) -> InstanceId {
        InstanceId(self.surroundings.id())
    }

    pub(crate) fn kind_names(&self) -> Vec<Box<str>> {
        let mut kinds: Vec<Box<str>> = self.kinds.keys().map(|kind| Box::from(&**kind)).collect();
        kinds.sort();
        kinds
    }

    pub(crate) fn note_trouble(&self, what: &str) {
        *lock(&self.trouble) = Some(what.into());
    }

    pub(crate) fn trouble(&self) -> Option<Box<str>> {
        lock(&self.trouble).clone()
    }

    /// Has what is owned compared with what is held, before the next batch.
    pub(crate) fn compare_soon(&self) {
        self.compares.store(true, Ordering::Release);
        self.queue.nudge();
    }

    /// Whether that was asked for since the last time.
    fn takes_comparison(&self) -> bool {
        self.compares.swap(false, Ordering::AcqRel)
    }

    /// A run has left memory; there is room.
    pub(crate) fn left_memory(&self, run: &run::Run) {
        let was_full = self.held.len() >= self.settings.max_processes;
        self.held.remove(run.run, run.claim);
        if was_full {
            self.poke();
        }
    }
}

/// Remembers what was said, so that it is said once.
#[derive(Default)]
pub(crate) struct Once(Mutex<HashSet<Box<str>>>);

impl Once {
    /// Whether this is the first time.
    pub(crate) fn insert(&self, what: &str) -> bool {
        let mut said = lock(&self.0);
        !said.contains(what) && said.insert(what.into())
    }
}

/// Locks a mutex that no code holds while it could panic halfway through a change, so a poisoned one is whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits that double, from 10 ms to 2 s.
pub(crate) struct Backoff {
    tries: u32,
}

impl Backoff {
    pub(crate) fn new() -> Self {
        Self { tries: 0 }
    }

    pub(crate) fn next(&mut self) -> Duration {
        let pause = Duration::from_millis(10 << self.tries.min(8)).min(Duration::from_secs(2));
        self.tries += 1;
        pause
    }

    pub(crate) fn tries(&self) -> u32 {
        self.tries
    }
}
