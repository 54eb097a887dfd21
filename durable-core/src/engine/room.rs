//! A budget for what processes have recorded, in bytes: loads wait while the records that are being read and replayed take
//! all of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;

use super::lock;

/// All that is being read or replayed, or one process that alone is more.
const ALL: usize = 64 << 20;
/// What is read at once without being weighed.
pub(super) const AT_ONCE: usize = 16 << 20;

#[derive(Default)]
pub(crate) struct Room {
    taken: Mutex<usize>,
    freed: Notify,
    /// Loads wait for room one after the other.
    turn: tokio::sync::Mutex<()>,
    /// The poller was refused since a load last took room.
    refused: AtomicBool,
}

/// Room that is taken; given back when dropped.
pub(crate) struct Taken {
    room: Arc<Room>,
    bytes: usize,
}

impl Room {
    /// Waits until there is room for this many bytes. A replay gives its room back when it ends, which it does by itself unless
    /// its function awaits something that is not durable. So after five seconds without a return the load goes ahead.
    ///
    /// Dropped while it waits, it has taken nothing.
    pub(crate) async fn take(self: &Arc<Self>, bytes: usize) -> Taken {
        const PATIENCE: Duration = Duration::from_secs(5);
        let turn = self.turn.lock().await;
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            {
                let mut taken = lock(&self.taken);
                if *taken == 0 || *taken + bytes <= ALL {
                    *taken += bytes;
                    break;
                }
            }
            if tokio::time::timeout(PATIENCE, freed).await.is_err() {
                *lock(&self.taken) += bytes;
                break;
            }
        }
        drop(turn);
        Taken { room: self.clone(), bytes }
    }

    /// Whether a load waits for room, in which case nothing more should be claimed. The poller learns from
    /// [`refused`](Self::refused) when to ask again.
    pub(crate) fn is_wanted(&self) -> bool {
        // Before the look: a load that takes room between the two finds it.
        self.refused.store(true, Ordering::SeqCst);
        let wanted = self.turn.try_lock().is_err();
        if !wanted {
            self.refused.store(false, Ordering::SeqCst);
        }
        wanted
    }

    /// Whether the poller was refused, since the last call.
    pub(crate) fn refused(&self) -> bool {
        self.refused.swap(false, Ordering::SeqCst)
    }
}

impl Taken {
    /// A part of it, which is given back on its own.
    pub(crate) fn split(&mut self, bytes: usize) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self { room: self.room.clone(), bytes }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if self.bytes > 0 {
            *lock(&self.room.taken) -= self.bytes;
            self.room.freed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn room_is_waited_for() {
        let room = Arc::new(Room::default());
        let mut first = room.take(ALL - 10).await;
        assert!(!room.is_wanted() && !room.refused());
        let other = room.clone();
        let second = tokio::spawn(async move { other.take(20).await });
        tokio::task::yield_now().await;
        assert!(room.is_wanted() && !second.is_finished());
        assert!(room.refused());
        drop(first.split(10));
        let _second = second.await.unwrap();
        drop(first);
        // One that is larger than all of it is alone; and it does not wait for ever.
        let began = Instant::now();
        let _large = room.take(2 * ALL).await;
        assert_eq!(began.elapsed().as_secs(), 5);
    }
}
