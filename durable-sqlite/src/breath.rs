//! A program that writes batch after batch leaves the hearts of others hardly a moment: now and then it takes a breath.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// When this program last let the file be for a moment.
pub(crate) struct Breath {
    /// Others were there at the last look.
    company: AtomicBool,
    times: Mutex<Times>,
}

struct Times {
    paused: Instant,
    written: Instant,
}

impl Breath {
    pub(crate) fn new(now: Instant) -> Self {
        Self { company: AtomicBool::new(false), times: Mutex::new(Times { paused: now, written: now }) }
    }

    pub(crate) fn has_company(&self, company: bool) {
        self.company.store(company, Ordering::Relaxed);
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For how long the next batch should wait: hearts of other programs ask for the write lock some hundred times a second, and
    /// one that writes batch after batch leaves them hardly a moment.
    pub(crate) fn pause(&self, now: Instant) -> Option<Duration> {
        const EVERY: Duration = Duration::from_millis(250);
        const FOR: Duration = Duration::from_millis(15);
        let mut times = self.times();
        let idle = now - times.written >= FOR;
        let due = self.company.load(Ordering::Relaxed) && now - times.paused >= EVERY;
        if idle || due {
            times.paused = now;
        }
        (due && !idle).then_some(FOR)
    }

    pub(crate) fn wrote(&self, now: Instant) {
        self.times().written = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many breaths are taken in two seconds of batches, with so much time in between.
    fn breaths(company: bool, between: Duration) -> usize {
        let mut now = Instant::now();
        let end = now + Duration::from_secs(2);
        let breath = Breath::new(now);
        breath.has_company(company);
        let mut taken = 0;
        while now < end {
            if let Some(pause) = breath.pause(now) {
                taken += 1;
                now += pause;
            }
            now += Duration::from_millis(4);
            breath.wrote(now);
            now += between;
        }
        taken
    }

    #[test]
    fn only_where_others_have_no_chance() {
        assert_eq!(breaths(true, Duration::ZERO), 7);
        assert_eq!(breaths(false, Duration::ZERO), 0);
        assert_eq!(breaths(true, Duration::from_millis(20)), 0);
    }
}
