use std::collections::HashMap;

use super::run::At;
use crate::storage::{Record, RecordKey, RecordState};

/// Up to so many names a search through the list is as fast as an index, and takes no memory: most processes have few
/// names, and there are many processes.
const LISTED: usize = 16;

/// What an execution knows of its names.
#[derive(Default)]
pub(crate) struct Names {
    list: Vec<(RecordKey, NameState)>,
    /// Where each one stands in the list, once that is long.
    index: Option<Box<Index>>,
}

type Index = HashMap<RecordKey, usize, foldhash::fast::RandomState>;

/// What this execution knows of a name.
#[derive(Default)]
pub(crate) struct NameState {
    /// What stands in the database; its payload is let go once it was returned.
    pub(crate) record: Option<Record>,
    pub(crate) usage: Usage,
    /// This execution has asked for it.
    pub(crate) asked: bool,
    /// How many records of it wait to be committed.
    pub(crate) recording: u32,
    /// This execution has begun it, and dropped it unfinished.
    pub(crate) dropped: bool,
}

impl NameState {
    pub(crate) fn is_recording(&self) -> bool {
        self.recording > 0
    }

    /// Whether its outcome is recorded.
    pub(crate) fn is_final(&self) -> bool {
        self.record.as_ref().is_some_and(|record| record.state != RecordState::Pending)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Usage {
    /// Nobody has asked for it.
    #[default]
    Free,
    /// An operation is under way.
    Busy(At),
    /// It was returned.
    Done(At),
}

impl Names {
    /// The names that have a record.
    pub(crate) fn recorded(records: Vec<(RecordKey, Record)>) -> Self {
        let mut names = Self { list: Vec::with_capacity(records.len()), index: None };
        for (key, record) in records {
            names.push(key, NameState { record: Some(record), ..NameState::default() });
        }
        names
    }

    fn push(&mut self, key: RecordKey, state: NameState) {
        let at = self.list.len();
        if at == 0 {
            self.list.reserve_exact(1);
        }
        if at >= LISTED {
            let listed = || self.list.iter().enumerate().map(|(at, (key, _))| (key.clone(), at)).collect();
            self.index.get_or_insert_with(|| Box::new(listed())).insert(key.clone(), at);
        }
        self.list.push((key, state));
    }

    fn position(&self, key: &RecordKey) -> Option<usize> {
        match &self.index {
            None => self.list.iter().position(|(known, _)| known == key),
            Some(index) => index.get(key).copied(),
        }
    }

    pub(crate) fn get(&self, key: &RecordKey) -> Option<&NameState> {
        self.position(key).map(|at| &self.list[at].1)
    }

    pub(crate) fn get_mut(&mut self, key: &RecordKey) -> Option<&mut NameState> {
        self.position(key).map(|at| &mut self.list[at].1)
    }

    /// What is known of the name; it is known from now on.
    pub(crate) fn of(&mut self, key: &RecordKey) -> &mut NameState {
        let at = self.position(key).unwrap_or_else(|| {
            self.push(key.clone(), NameState::default());
            self.list.len() - 1
        });
        &mut self.list[at].1
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&RecordKey, &NameState)> {
        self.list.iter().map(|(key, state)| (key, state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::Scope;

    #[test]
    fn names_are_found_however_many_there_are() {
        let mut names = Names::default();
        let key = |n: usize| RecordKey { scope: Scope::Process, name: "n".into(), key: n.to_string().into() };
        for n in 0..3 * LISTED {
            assert!(names.get(&key(n)).is_none());
            names.of(&key(n)).recording = n as u32;
            for before in 0..=n {
                assert_eq!(names.of(&key(before)).recording, before as u32);
            }
        }
        assert_eq!(names.iter().count(), 3 * LISTED);
    }
}
