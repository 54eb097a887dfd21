//! One of the storages that are compared: its own clock, its hearts, and what it answers as a text that can be compared.

use chrono::{DateTime, SubsecRound, TimeDelta, Utc};
use durable_core::storage::{Batch, Heart, InstanceId, Outcome, Peer, Storage, StorageError};
use std::collections::HashMap;
use std::fmt::Debug;

use crate::call::DUE;
use crate::names::Names;

pub(crate) struct Side {
    pub(crate) storage: Box<dyn Storage>,
    pub(crate) hearts: HashMap<usize, Box<dyn Heart>>,
    /// Others, as they were seen.
    pub(crate) seen: HashMap<usize, Peer>,
    pub(crate) last: HashMap<usize, Batch>,
    /// When each call began, by its clock: later than all that was written before.
    stamps: Vec<DateTime<Utc>>,
}

impl Side {
    pub(crate) fn new(storage: Box<dyn Storage>) -> Self {
        Self { storage, hearts: HashMap::new(), seen: HashMap::new(), last: HashMap::new(), stamps: Vec::new() }
    }

    /// Its time.
    async fn now(&self) -> DateTime<Utc> {
        let nobody = InstanceId(uuid::Uuid::nil());
        self.storage.peers("nowhere", nobody).await.unwrap().now.trunc_subsecs(3)
    }

    /// A call begins, in a millisecond of its own.
    pub(crate) async fn begin(&mut self) {
        let before = self.now().await;
        let mut now = before;
        while now <= before {
            now = self.now().await;
        }
        self.stamps.push(now);
    }

    /// The number of the last call that writes.
    pub(crate) fn calls(&self) -> usize {
        self.stamps.len().saturating_sub(1)
    }

    /// When the call began.
    pub(crate) fn began(&self) -> DateTime<Utc> {
        self.stamps.last().copied().unwrap_or_default()
    }

    /// Before the call that many before it began, and after all others.
    pub(crate) fn ago(&self, calls: usize) -> DateTime<Utc> {
        self.stamps[self.calls().saturating_sub(calls)] - TimeDelta::milliseconds(1)
    }

    /// What it answered, in names instead of ids, and in calls instead of times.
    pub(crate) fn answer(&self, names: &Names, result: Result<impl Debug, StorageError>) -> String {
        let text = match result {
            Ok(answer) => format!("{answer:?}"),
            // Words are each storage's own.
            Err(error) => format!("{error:?}").split('(').next().unwrap_or_default().to_owned(),
        };
        self.in_calls(&names.name(&text))
    }

    /// Replaces each time by the call that it was written in.
    fn in_calls(&self, text: &str) -> String {
        let mut named = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(at) = rest.find("T").filter(|_| rest.contains('Z')) {
            let begins = at.checked_sub(10).filter(|begins| rest.is_char_boundary(*begins));
            let ends = rest[at..].find('Z').map(|ends| at + ends + 1);
            let time =
                begins.zip(ends).and_then(|(begins, ends)| Some((begins, ends, rest[begins..ends].parse().ok()?)));
            match time {
                Some((begins, ends, time)) => {
                    named.push_str(&rest[..begins]);
                    named.push_str(&self.label(time));
                    rest = &rest[ends..];
                }
                None => {
                    named.push_str(&rest[..=at]);
                    rest = &rest[at + 1..];
                }
            }
        }
        named + rest
    }

    fn label(&self, time: DateTime<Utc>) -> String {
        let time = time.trunc_subsecs(3);
        for minutes in std::iter::once(0).chain(DUE) {
            let since = time - TimeDelta::minutes(minutes);
            let calls = self.stamps.partition_point(|stamp| *stamp <= since);
            if calls > 0 && since < self.began() + TimeDelta::minutes(1) {
                return if minutes == 0 { format!("@{}", calls - 1) } else { format!("@{}{minutes:+}m", calls - 1) };
            }
        }
        format!("{time:?}")
    }
}

/// What is told in an order of a storage's own, in one order; and whom a batch wakes with the whole batch: which of its
/// ends woke whom is not said.
pub(crate) fn in_order(mut outcomes: Vec<Outcome>) -> impl Debug {
    let mut woken = Vec::new();
    for outcome in &mut outcomes {
        match outcome {
            Outcome::Claimed(claimed) => claimed.sort_by_key(|claimed| claimed.run),
            Outcome::Finished { wakes } | Outcome::Asked { wakes, .. } => woken.append(wakes),
            _ => {}
        }
    }
    woken.sort();
    woken.dedup();
    (outcomes, woken)
}
