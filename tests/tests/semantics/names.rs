use durable_core::storage::{InstanceId, RunId};
use std::collections::BTreeMap;
use uuid::Uuid;

use crate::call::{INSTANCES, RUNS};

/// The ids of one play, new in each, and what they are called.
pub(crate) struct Names {
    pub(crate) namespace: String,
    pub(crate) runs: Vec<RunId>,
    pub(crate) instances: Vec<InstanceId>,
    epochs: usize,
    called: BTreeMap<String, String>,
}

impl Names {
    pub(crate) fn new() -> Self {
        let mut names = Self {
            namespace: format!("n {}", Uuid::now_v7().simple()),
            runs: (0..RUNS).map(|_| RunId::new()).collect(),
            instances: Vec::new(),
            epochs: 0,
            called: BTreeMap::new(),
        };
        for (nth, run) in names.runs.iter().enumerate() {
            names.called.insert(run.to_string(), format!("r{nth}"));
        }
        for of in 0..INSTANCES {
            names.instances.push(InstanceId::new());
            names.begins(of);
        }
        names
    }

    /// Another instance takes the place of one that is gone.
    pub(crate) fn begins(&mut self, of: usize) {
        self.instances[of] = InstanceId::new();
        self.epochs += 1;
        self.called.insert(self.instances[of].to_string(), format!("i{of}.{}", self.epochs));
    }

    /// A text with names for ids.
    pub(crate) fn name(&self, text: &str) -> String {
        self.called.iter().fold(text.to_owned(), |text, (id, name)| text.replace(id, name))
    }
}
