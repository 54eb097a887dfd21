use std::pin::pin;
use std::sync::Mutex;
use tokio::sync::Notify;

use super::lock;

/// A value that only rises, and can be waited for. Whoever waits is woken in the order in which they came, unlike with a
/// `watch` channel of tokio's, which wakes them in a random one.
#[derive(Debug)]
pub(crate) struct Ratchet<T> {
    level: Mutex<T>,
    risen: Notify,
}

impl<T: Copy + Ord> Ratchet<T> {
    pub(crate) fn new(level: T) -> Self {
        Self { level: Mutex::new(level), risen: Notify::new() }
    }

    pub(crate) fn now(&self) -> T {
        *lock(&self.level)
    }

    /// Raises it to this level, unless it is there already.
    pub(crate) fn reach(&self, level: T) {
        let rises = {
            let mut now = lock(&self.level);
            let rises = *now < level;
            *now = level.max(*now);
            rises
        };
        if rises {
            self.risen.notify_waiters();
        }
    }

    /// Returns once it is at this level or beyond.
    pub(crate) async fn reached(&self, level: T) {
        loop {
            let mut risen = pin!(self.risen.notified());
            // Before the look, so that a rise in between is not missed.
            risen.as_mut().enable();
            if self.now() >= level {
                return;
            }
            risen.await;
        }
    }
}
