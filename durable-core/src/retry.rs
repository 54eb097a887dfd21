use std::time::Duration;
use uuid::Uuid;

/// When a step that failed is tried again.
///
/// Each failed attempt is recorded before the next one waits, so the count and the back-off survive a crash: a long
/// back-off parks the process. Attempts that a crash cut off do not count.
///
/// ```
/// # use durable_core::Retry;
/// # use std::time::Duration;
/// // After 1 s, 2 s, 4 s, … at most a minute, with jitter; the fifth failure is the step's error.
/// let retry = Retry::exponential(Duration::from_secs(1)).max_delay(Duration::from_secs(60)).max_attempts(5);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    first: Duration,
    factor: f64,
    max_delay: Duration,
    max_attempts: Option<u32>,
    jitter: bool,
}

impl Retry {
    /// Waits `first` after the first failure and twice as long after each further one, at most an hour, with jitter,
    /// for as many attempts as it takes.
    pub fn exponential(first: Duration) -> Self {
        Self { first, factor: 2.0, max_delay: Duration::from_secs(3600), max_attempts: None, jitter: true }
    }

    /// Waits the same time after each failure, for as many attempts as it takes.
    pub fn fixed(delay: Duration) -> Self {
        Self { first: delay, factor: 1.0, max_delay: delay, max_attempts: None, jitter: false }
    }

    /// At most so many attempts in all; 1 means no retry, as does 0.
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = Some(attempts.max(1));
        self
    }

    /// At most so long between two attempts.
    pub fn max_delay(mut self, delay: Duration) -> Self {
        self.max_delay = delay;
        self
    }

    /// By which factor the wait grows.
    pub fn factor(mut self, factor: f64) -> Self {
        self.factor = factor.max(1.0);
        self
    }

    /// With jitter a wait is shortened by up to a half, so that processes that failed together do not come back
    /// together.
    pub fn jitter(mut self, jitter: bool) -> Self {
        self.jitter = jitter;
        self
    }

    /// How long to wait after so many failures; none if there is no further attempt. The jitter comes from the step's
    /// idempotency key, so that a run is the same whenever it is looked at.
    pub(crate) fn delay_after(&self, failures: u32, key: Uuid) -> Option<Duration> {
        if self.max_attempts.is_some_and(|most| failures >= most) {
            return None;
        }
        let growth = self.factor.powi(failures.saturating_sub(1).min(1000) as i32);
        let mut seconds = (self.first.as_secs_f64() * growth).min(self.max_delay.as_secs_f64());
        if self.jitter {
            let hash = Uuid::new_v5(&key, &failures.to_le_bytes()).as_u128() as u32;
            seconds *= 1.0 - 0.5 * f64::from(hash) / f64::from(u32::MAX);
        }
        Some(Duration::try_from_secs_f64(seconds).unwrap_or(self.max_delay))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_end() {
        let key = Uuid::from_u128(7);
        let retry = Retry::exponential(Duration::from_secs(1)).max_delay(Duration::from_secs(5)).max_attempts(5);
        let plain = retry.clone().jitter(false);
        let waits: Vec<_> = (1..=5).map(|n| plain.delay_after(n, key).map(|d| d.as_secs())).collect();
        assert_eq!(waits, [Some(1), Some(2), Some(4), Some(5), None]);
        for n in 1..5 {
            let (with, without) = (retry.delay_after(n, key).unwrap(), plain.delay_after(n, key).unwrap());
            assert!(with <= without && with >= without / 2);
            assert_eq!(Some(with), retry.delay_after(n, key));
        }
        assert_eq!(Retry::fixed(Duration::MAX).delay_after(u32::MAX, key), Some(Duration::MAX));
    }
}
