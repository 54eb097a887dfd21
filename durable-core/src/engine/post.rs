//! Reads the signals that came for runs in memory, many at a time.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use tokio::sync::Notify;

use super::epoch::Epoch;
use super::held::Slot;
use super::reading::{Read, Reading};
use super::run::End;
use super::{Core, lock};
use crate::storage::{Loaded, RunId, Wanted};

const AT_ONCE: usize = 500;

#[derive(Default)]
pub(crate) struct Post {
    runs: Mutex<BTreeSet<RunId>>,
    filled: Notify,
}

impl Post {
    /// Has the signals of these runs read.
    pub(crate) fn fetch(&self, runs: impl IntoIterator<Item = RunId>) {
        lock(&self.runs).extend(runs);
        self.filled.notify_one();
    }

    fn take(&self) -> Vec<RunId> {
        let mut runs = lock(&self.runs);
        let rest = runs.iter().nth(AT_ONCE).copied().map(|first| runs.split_off(&first)).unwrap_or_default();
        std::mem::replace(&mut *runs, rest).into_iter().collect()
    }
}

pub(super) async fn deliver(core: Arc<Core>, epoch: Arc<Epoch>) {
    while !epoch.is_over() {
        // With what each has seen before they are read.
        let mut known = HashMap::new();
        let mut runs = core.post.take();
        runs.retain(|run| match core.held.get(*run) {
            Some(Slot::Live(live)) => {
                known.insert(*run, (live.serial, live.state().mail.seen));
                true
            }
            _ => false,
        });
        if runs.is_empty() {
            tokio::select! { biased; () = epoch.over() => return, () = core.post.filled.notified() => continue }
        }
        let seen = |run: &RunId| known.get(run).map_or(0, |(_, seen)| *seen);
        let wanted = runs.iter().map(|run| Wanted { run: *run, seen: seen(run) });
        let mut reading = Reading::new(wanted.collect(), false);
        while let Some(read) = reading.next(&core, &epoch).await {
            match read {
                Read::Over => {
                    core.post.fetch(reading.rest());
                    return;
                }
                Read::Some(loaded, _) => loaded.into_iter().for_each(|loaded| hand_over(&core, &known, loaded)),
                Read::Later(run) => {
                    let (core, epoch) = (core.clone(), epoch.clone());
                    tokio::spawn(async move {
                        if core.later(&epoch).await {
                            core.post.fetch([run]);
                        }
                    });
                }
                Read::Not(run, why) => {
                    if let Some(Slot::Live(run)) = core.held.get(run) {
                        run.fault(format_args!("its messages cannot be read: {why}"));
                    }
                }
            }
        }
    }
}

fn hand_over(core: &Core, known: &HashMap<RunId, (u64, i64)>, loaded: Loaded) {
    let Some(Slot::Live(run)) = core.held.get(loaded.run) else { return };
    match loaded.state {
        Ok(Some(state)) => {
            let known = known.get(&loaded.run).filter(|(serial, _)| *serial == run.serial);
            run.merge(state, known.map(|(_, seen)| *seen));
        }
        Ok(None) => run.end(End::Gone),
        Err(why) => run.fault(format_args!("its messages cannot be read: {why}")),
    }
}
