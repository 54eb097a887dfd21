use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::{Core, lock};

/// Whether the service's runtime runs the engine's tasks, seen from threads that are not its own.
#[derive(Debug)]
pub(crate) struct Pulse {
    ticks: AtomicU64,
    ticked: Moment,
    /// The runtime has been asked for a tick.
    asked: AtomicBool,
    pub(crate) looked: Moment,
}

/// When something happened last.
#[derive(Debug)]
pub(crate) struct Moment(Mutex<Instant>);

impl Moment {
    fn new() -> Self {
        Self(Mutex::new(Instant::now()))
    }

    pub(crate) fn set(&self) {
        *lock(&self.0) = Instant::now();
    }

    pub(crate) fn age(&self) -> Duration {
        lock(&self.0).elapsed()
    }
}

impl Pulse {
    pub(crate) fn new() -> Self {
        Self { ticks: AtomicU64::new(0), ticked: Moment::new(), asked: AtomicBool::new(false), looked: Moment::new() }
    }

    fn tick(&self) {
        self.ticks.fetch_add(1, Ordering::Relaxed);
        self.ticked.set();
        self.asked.store(false, Ordering::Release);
    }
}

impl Core {
    /// How long the service's runtime is overdue with its tick. Always zero if the heart runs on that runtime itself.
    pub(crate) fn blocked(&self) -> Duration {
        let age = if self.storage.heartbeat_thread() { self.pulse.ticked.age() } else { Duration::ZERO };
        age.saturating_sub(self.settings.heartbeat)
    }

    /// Has the service's runtime tick. That also wakes a thread of it which sleeps: the one that waits for sockets and timers
    /// may be blocked by now, and the others would not know.
    pub(super) fn ask_for_tick(self: &Arc<Self>, runtime: &Handle) {
        if !self.pulse.asked.swap(true, Ordering::AcqRel) {
            let core = self.clone();
            drop(runtime.spawn(async move { core.pulse.tick() }));
        }
    }
}

/// Counts for how long the pulse has stood still, in time in which the observer itself was running: a machine that slept
/// proves nothing.
pub(crate) struct Standstill {
    ticks: u64,
    lasts: Duration,
    looked: Instant,
}

impl Standstill {
    pub(crate) fn new() -> Self {
        Self { ticks: 0, lasts: Duration::ZERO, looked: Instant::now() }
    }

    /// For how long it stands still; between two looks at most `most` counts.
    pub(crate) fn look(&mut self, pulse: &Pulse, most: Duration) -> Duration {
        let now = Instant::now();
        let passed = now.duration_since(std::mem::replace(&mut self.looked, now)).min(most);
        let ticks = pulse.ticks.load(Ordering::Relaxed);
        self.lasts =
            if std::mem::replace(&mut self.ticks, ticks) == ticks { self.lasts + passed } else { Duration::ZERO };
        self.lasts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_slept_proves_nothing() {
        let pulse = Pulse::new();
        let mut standstill = Standstill::new();
        let second = Duration::from_secs(1);
        standstill.looked -= Duration::from_secs(3600);
        assert_eq!(standstill.look(&pulse, second), second);
        standstill.looked -= Duration::from_secs(3600);
        assert_eq!(standstill.look(&pulse, second), 2 * second);
        pulse.tick();
        standstill.looked -= Duration::from_secs(3600);
        assert_eq!(standstill.look(&pulse, second), Duration::ZERO);
    }
}
