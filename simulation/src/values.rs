//! The oracle of variables: what is got is what was recorded last.

use durable_core::storage::{RecordKey, RunId, Scope};

use crate::world::{Inner, World};

/// What the process's code was told of a variable.
#[derive(Clone, Copy, Debug)]
pub enum Valued {
    Got(u64),
    /// It was set to this, and the set has returned.
    Set(u64),
}

impl World {
    /// An execution of a run, under this claim, was told this of a variable.
    ///
    /// It has seen whatever was recorded under its own claim or an earlier one, since the uses of one variable come one after
    /// the other. It may have seen more, if it was taken from its host before that had read its records.
    ///
    /// In a replay nothing is recorded: what is set is got until the execution is live, and stands recorded then.
    pub fn valued(&self, run: RunId, claim: i64, key: &RecordKey, valued: Valued, replaying: bool) {
        let wrong = {
            let mut inner = self.inner();
            let inner = &mut *inner;
            let kept = inner.effects.kept.entry((run, claim)).or_default();
            // A zombie's replay knows nothing of what later executions have recorded.
            let values = inner.ledger.values.get(&(run, key.clone()));
            let recorded = values.is_some_and(|values| values.iter().any(|(by, _)| *by <= claim));
            let keeps = match valued {
                Valued::Set(to) if replaying && key.key.is_empty() => {
                    kept.insert(key.clone(), to);
                    true
                }
                // With a key, the first one that was written stays.
                Valued::Set(to) if replaying && !recorded => {
                    kept.entry(key.clone()).or_insert(to);
                    true
                }
                Valued::Set(_) => {
                    kept.remove(key);
                    false
                }
                Valued::Got(got) if replaying => match kept.get(key) {
                    Some(kept) => *kept == got,
                    None if !recorded => kept.insert(key.clone(), got).is_none(),
                    None => false,
                },
                _ => false,
            };
            if keeps {
                return;
            }
            let values = inner.ledger.values.get(&(run, key.clone())).map_or(&[][..], |values| values);
            let seen = values.iter().rposition(|(by, _)| *by <= claim);
            let newest = &values[seen.unwrap_or(0)..];
            let fits = match valued {
                Valued::Got(got) => newest.iter().any(|(_, value)| *value == got.to_string()),
                // With a key, the first one that was written stays.
                Valued::Set(_) if !key.key.is_empty() => !newest.is_empty(),
                Valued::Set(to) => newest.first().is_some_and(|(by, value)| *by == claim && *value == to.to_string()),
            };
            let id = inner.ledger.id(run);
            (!fits).then(|| {
                format!("{key} of {id} under claim {claim}: {valued:?}, and what was recorded last is {newest:?}")
            })
        };
        self.say(|inner| format!("{key} of {}: {valued:?}", inner.ledger.id(run)));
        wrong.into_iter().for_each(|wrong| self.wrong(wrong));
    }

    /// How often a variable of a process has been recorded.
    pub fn recorded(&self, id: &str, name: &str) -> usize {
        let inner = self.inner();
        inner.history(id, name).len()
    }

    /// A client was shown this of a variable: no older than what was recorded when it asked.
    pub fn shown(&self, id: &str, name: &str, before: usize, value: Option<u64>) {
        let wrong = {
            let inner = self.inner();
            let newest = &inner.history(id, name)[before.saturating_sub(1)..];
            let fits = match value {
                Some(value) => newest.iter().any(|(_, recorded)| *recorded == value.to_string()),
                None => before == 0,
            };
            (!fits).then(|| format!("{name} of {id} is shown as {value:?}, and was {newest:?}"))
        };
        wrong.into_iter().for_each(|wrong| self.wrong(wrong));
    }
}

impl Inner {
    fn history(&self, id: &str, name: &str) -> &[(i64, String)] {
        let key = RecordKey { scope: Scope::Process, name: name.into(), key: "".into() };
        let run = self.ledger.ids.get(id).copied();
        run.and_then(|run| self.ledger.values.get(&(run, key))).map_or(&[], |values| values)
    }
}
