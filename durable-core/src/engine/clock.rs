use chrono::{DateTime, TimeDelta, Utc};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::Duration;
use tokio::time::Instant;

use super::lock;
use super::surroundings::Surroundings;

/// The database's time, carried on by this program's monotonic clock between two answers of the database. Due times
/// come from it, so instances whose own clocks are apart agree.
#[derive(Debug)]
pub(crate) struct DbClock(Mutex<(DateTime<Utc>, Instant)>);

impl DbClock {
    /// Until the database has answered, the machine's own time.
    pub(crate) fn new(now: DateTime<Utc>) -> Self {
        Self(Mutex::new((now, Instant::now())))
    }

    pub(crate) fn sync(&self, now: DateTime<Utc>) {
        *lock(&self.0) = (now, Instant::now());
    }

    pub(crate) fn now(&self) -> DateTime<Utc> {
        let (at, instant) = *lock(&self.0);
        let elapsed = TimeDelta::from_std(instant.elapsed()).unwrap_or(TimeDelta::MAX);
        at.checked_add_signed(elapsed).unwrap_or(at)
    }

    /// When it is `due` on the runtime's clock, at most an hour ahead: whoever waits looks again then.
    pub(crate) fn instant(&self, due: DateTime<Utc>) -> Instant {
        let left = (due - self.now()).to_std().unwrap_or(Duration::ZERO);
        Instant::now() + left.min(Duration::from_secs(3600))
    }
}

/// How old this instance's last acknowledged heartbeat is. While it is older than half the expiry, another instance
/// may be about to take over: no attempt of a step starts.
#[derive(Debug)]
pub(crate) struct Liveness {
    surroundings: Arc<dyn Surroundings>,
    boot: Duration,
    start: Instant,
    /// Milliseconds after `start` at which the last acknowledged heartbeat was *sent*.
    acked: AtomicU64,
    limit: Duration,
    gate: Mutex<Vec<Waker>>,
}

/// When a heartbeat was sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SentAt(u64);

impl Liveness {
    pub(crate) fn new(expiry: Duration, surroundings: Arc<dyn Surroundings>) -> Self {
        Self {
            boot: surroundings.since_boot(),
            surroundings,
            start: Instant::now(),
            acked: AtomicU64::new(0),
            limit: expiry / 2,
            gate: Mutex::default(),
        }
    }

    fn elapsed_ms(&self) -> u64 {
        // The runtime's clock runs ahead where a test has paused it; the other one does where the machine slept.
        let elapsed = self.start.elapsed().max(self.surroundings.since_boot().saturating_sub(self.boot));
        elapsed.as_millis().try_into().unwrap_or(u64::MAX)
    }

    pub(crate) fn sending(&self) -> SentAt {
        SentAt(self.elapsed_ms())
    }

    pub(crate) fn acknowledged(&self, sent: SentAt) {
        self.acked.fetch_max(sent.0, Ordering::AcqRel);
        if self.is_fresh() {
            for waker in std::mem::take(&mut *lock(&self.gate)) {
                waker.wake();
            }
        }
    }

    pub(crate) fn age(&self) -> Duration {
        Duration::from_millis(self.elapsed_ms().saturating_sub(self.acked.load(Ordering::Acquire)))
    }

    pub(crate) fn is_fresh(&self) -> bool {
        #[cfg(durable_mutations)]
        if crate::mutation::is_broken(crate::mutation::Rule::Gate) {
            return true;
        }
        self.age() < self.limit
    }

    /// Returns once the heartbeat is fresh.
    pub(crate) async fn fresh(&self) {
        std::future::poll_fn(|cx| {
            if self.is_fresh() {
                return std::task::Poll::Ready(());
            }
            let mut gate = lock(&self.gate);
            if !gate.iter().any(|w| w.will_wake(cx.waker())) {
                gate.push(cx.waker().clone());
            }
            // The acknowledgement may have come between the look and the entry.
            if self.is_fresh() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }
}
