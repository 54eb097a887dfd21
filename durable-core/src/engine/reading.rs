//! Reads runs, many at a time. A read that fails is split in halves, until the run that cannot be read is alone and all
//! others have been read; one that is too much is weighed, and read in parts.

use std::time::Duration;

use super::epoch::Epoch;
use super::room::{AT_ONCE, Taken};
use super::{Backoff, Core};
use crate::storage::{Load, Loaded, RunId, StorageError, Wanted};

/// The runs that are still to be read.
pub(super) struct Reading {
    /// The next part is the last one.
    parts: Vec<Part>,
    records: bool,
    /// How often the next part has failed since anything was read.
    failures: u32,
    backoff: Backoff,
}

/// Runs that are read together.
struct Part {
    runs: Vec<Wanted>,
    /// How many bytes they are, if they were weighed.
    weight: Option<usize>,
}

/// What came of one read.
pub(super) enum Read {
    /// With the room that they take, if they were read with their records.
    Some(Vec<Loaded>, Option<Taken>),
    /// This run cannot be read, though others can: why.
    Not(RunId, String),
    /// This run could not be read, and the database may be the reason: it is to be read later, on its own.
    Later(RunId),
    /// The epoch is over.
    Over,
}

impl Reading {
    /// With records, or the messages and what is awaited alone.
    pub(super) fn new(runs: Vec<Wanted>, records: bool) -> Self {
        Self { parts: vec![Part { runs, weight: None }], records, failures: 0, backoff: Backoff::new() }
    }

    /// What has not been read yet.
    pub(super) fn rest(self) -> impl Iterator<Item = RunId> {
        self.parts.into_iter().flat_map(|part| part.runs).map(|wanted| wanted.run)
    }

    /// Reads some of them, at least one. None when all have been.
    pub(super) async fn next(&mut self, core: &Core, epoch: &Epoch) -> Option<Read> {
        /// So often a part is tried as it is, where the database itself may be away; and so often a run that is alone.
        const TRIES: u32 = 3;
        loop {
            let part = match self.parts.last() {
                None => return None,
                Some(part) if part.runs.is_empty() => {
                    self.parts.pop();
                    continue;
                }
                Some(part) => part,
            };
            let limit = core.settings.max_loaded;
            if let Some(weight) = part.weight.filter(|weight| *weight > limit && part.runs.len() == 1) {
                let run = self.parts.pop()?.runs.first()?.run;
                let what = if self.records {
                    "its records and messages are"
                } else {
                    "the messages that it has not taken are"
                };
                return Some(Read::Not(
                    run,
                    format!(
                        "{what} {weight} bytes, and this host loads {limit} of one process at most; see HostBuilder::max_loaded"
                    ),
                ));
            }
            let bytes = part.weight.unwrap_or(AT_ONCE.min(limit));
            let room = match self.records {
                false => None,
                true => tokio::select! {
                    biased;
                    () = epoch.over() => return Some(Read::Over),
                    room = core.room.take(bytes) => Some(room),
                },
            };
            if core.room.refused() {
                core.poke();
            }
            let load = Load { runs: part.runs.clone(), records: self.records, most: bytes };
            let error = match core.storage.load(&load).await {
                Ok(Some(loaded)) => {
                    self.read(&loaded);
                    return Some(Read::Some(loaded, room));
                }
                Ok(None) => match core.storage.weigh(&load).await {
                    Ok(weights) => {
                        self.part(weights, limit);
                        continue;
                    }
                    Err(error) => error,
                },
                Err(error) => error,
            };
            drop(room);
            core.note_trouble(&error.to_string());
            self.failures += 1;
            let many = load.runs.len() > 1;
            let too_slow = many && matches!(error, StorageError::Blocked(_));
            // Where it is damaged, what can be read may be what is left of more; and as long as the database answers nothing
            // else, the fault is not in what is read.
            let apart = self.failures > TRIES && !matches!(error, StorageError::Damaged(_));
            if too_slow || apart && self.others_are_read(core, epoch).await {
                if many {
                    self.halve();
                } else {
                    let run = self.parts.pop()?.runs.first()?.run;
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

    /// These were read. What failed is tried together again: it may have been the database.
    fn read(&mut self, loaded: &[Loaded]) {
        if let Some(part) = self.parts.last_mut() {
            part.runs.retain(|wanted| !loaded.iter().any(|loaded| loaded.run == wanted.run));
        }
        if self.failures > 0 {
            self.failures = 0;
            self.backoff = Backoff::new();
            let (weighed, rest): (Vec<Part>, Vec<Part>) =
                std::mem::take(&mut self.parts).into_iter().partition(|part| part.weight.is_some());
            self.parts = weighed;
            let runs = rest.into_iter().rev().flat_map(|part| part.runs).collect();
            self.parts.push(Part { runs, weight: None });
        }
    }

    /// The next part is too much for one read.
    fn part(&mut self, weights: Vec<(RunId, usize)>, limit: usize) {
        /// What may have come since it was weighed.
        const MORE: usize = 64 << 10;
        let Some(part) = self.parts.pop() else { return };
        // It was weighed before, and more has come.
        let grows = part.weight.is_some();
        let least = part.weight.filter(|_| part.runs.len() == 1).map_or(0, |before| before * 2);
        let mut parts: Vec<Part> = Vec::new();
        for wanted in part.runs {
            let weight = weights.iter().find(|(run, _)| *run == wanted.run).map_or(0, |(_, weight)| *weight);
            let weight = (weight + MORE).max(least);
            let most = AT_ONCE.min(limit);
            match parts.last_mut() {
                Some(Part { runs, weight: Some(sum) }) if *sum + weight <= most && !grows => {
                    runs.push(wanted);
                    *sum += weight;
                }
                _ => parts.push(Part { runs: vec![wanted], weight: Some(weight) }),
            }
        }
        self.parts.extend(parts.into_iter().rev());
    }

    fn halve(&mut self) {
        if let Some(Part { runs: mut first, weight }) = self.parts.pop() {
            let second = first.split_off(first.len() / 2);
            self.parts.extend([second, first].map(|runs| Part { runs, weight }));
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
