//! The oracle of variables: what is got is what was recorded last.

use durable_core::storage::{RecordKey, RunId};

use crate::world::World;

/// What the process's code was told of a variable.
#[derive(Clone, Copy, Debug)]
pub enum Valued {
    Got(u64),
    /// It was set to this, and the set has returned.
    Set(u64),
    /// It has none, and can get none any more.
    Cancelled,
}

impl World {
    /// An execution of a run, under this claim, was told this of a variable.
    ///
    /// It sees whatever was recorded under its own claim or an earlier one: those before it were loaded with it, and the
    /// uses of one variable come one after the other. What a later execution has recorded it need not know.
    pub fn valued(&self, run: RunId, claim: i64, key: &RecordKey, valued: Valued) {
        let wrong = {
            let inner = self.inner();
            let values = inner.ledger.values.get(&(run, key.clone()));
            let last = values.and_then(|values| values.iter().rev().find(|(by, _)| *by <= claim));
            let fits = match (valued, last) {
                (Valued::Got(got), Some((_, last))) => got.to_string() == *last,
                // Who waits for the set has not been told of anything else under this claim since; with a key, the first one
                // that was written stays.
                (Valued::Set(to), Some((by, last))) => !key.key.is_empty() || *by == claim && to.to_string() == *last,
                (Valued::Cancelled, last) => last.is_none(),
                (_, None) => false,
            };
            let id = inner.ledger.id(run);
            (!fits).then(|| {
                format!("{key} of {id} under claim {claim}: {valued:?}, and what was recorded last is {last:?}")
            })
        };
        self.say(|inner| format!("{key} of {}: {valued:?}", inner.ledger.id(run)));
        wrong.into_iter().for_each(|wrong| self.wrong(wrong));
    }
}
