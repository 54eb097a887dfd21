//! Reads runs, many at a time. A read that fails is split in halves, until the run that cannot be read is alone and all
//! others have been read.

use std::time::Duration;

use super::epoch::Epoch;
use super::{Backoff, Core};
use crate::storage::{Loaded, RunId, StorageError};

/// The runs that are still to be read.
pub(super) struct Reading {
    /// The next part is the last one.
    parts: Vec<Vec<RunId>>,
    records: bool,
    /// How often the next part has failed since anything was read.
    failures: u32,
    backoff: Backoff,
}

/// What came of one read.
pub(super) enum Read {
    Some(Vec<Loaded>),
    /// This run cannot be read, though others can: why.
    Not(RunId, String),
    /// This run could not be read, and the database may be the reason: it is to be read later, on its own.
    Later(RunId),
    /// The epoch is over.
    Over,
}

impl Reading {
    /// With records, or the messages and what is awaited alone.
    pub(super) fn new(runs: Vec<RunId>, records: bool) -> Self {
        Self { parts: vec![runs], records, failures: 0, backoff: Backoff::new() }
    }

    /// What has not been read yet.
    pub(super) fn rest(self) -> impl Iterator<Item = RunId> {
        self.parts.into_iter().flatten()
    }

    /// Reads some of them, at least one. None when all have been.
    pub(super) async fn next(&mut self, core: &Core, epoch: &Epoch) -> Option<Read> {
        /// So often a part is tried as it is, where the database itself may be away; and so often a run that is alone.
        const TRIES: u32 = 3;
        loop {
            let part = match self.parts.last() {
                None => return None,
                Some(part) if part.is_empty() => {
                    self.parts.pop();
                    continue;
                }
                Some(part) => part,
            };
            let error = match core.storage.load(part, self.records).await {
                Ok(loaded) => {
                    self.read(&loaded);
                    return Some(Read::Some(loaded));
                }
                Err(error) => error,
            };
            core.note_trouble(&error.to_string());
            self.failures += 1;
            let many = part.len() > 1;
            let too_slow = many && matches!(error, StorageError::Blocked(_));
            // As long as the database answers nothing else, the fault is not in what is read.
            if too_slow || self.failures > TRIES && self.others_are_read(core, epoch).await {
                if many {
                    self.halve();
                } else {
                    let run = self.parts.pop().into_iter().flatten().next()?;
                    self.failures = 0;
                    // A connection that was lost says nothing about the run.
                    if matches!(error, StorageError::Unavailable(_) | StorageError::Unknown(_)) {
                        tracing::warn!(run = %run, "it cannot be read now ({error}); it is tried again");
                        return Some(Read::Later(run));
                    }
                    return Some(Read::Not(run, error.to_string()));
                }
            }
            if self.backoff.pause(epoch, "reading processes", &error).await.is_err() {
                return Some(Read::Over);
            }
        }
    }

    /// These were read. The rest is tried together again: it may have been the database.
    fn read(&mut self, loaded: &[Loaded]) {
        if let Some(part) = self.parts.last_mut() {
            part.retain(|run| !loaded.iter().any(|loaded| loaded.run == *run));
        }
        if self.failures > 0 {
            self.failures = 0;
            self.backoff = Backoff::new();
            let rest = std::mem::take(&mut self.parts).into_iter().rev().flatten().collect();
            self.parts.push(rest);
        }
    }

    fn halve(&mut self) {
        if let Some(mut first) = self.parts.pop() {
            let second = first.split_off(first.len() / 2);
            self.parts.extend([second, first]);
            self.failures = 0;
            self.backoff = Backoff::new();
        }
    }

    /// Whether the database answers other questions.
    async fn others_are_read(&self, core: &Core, epoch: &Epoch) -> bool {
        core.storage.owned(epoch.instance, None, 1).await.is_ok()
    }
}

impl Core {
    /// Waits before a run that could not be read is tried again. False if the epoch is over by then.
    pub(super) async fn later(&self, epoch: &Epoch) -> bool {
        const PAUSE: Duration = Duration::from_secs(1);
        tokio::select! { biased; () = epoch.over() => false, () = tokio::time::sleep(PAUSE) => true }
    }
}
