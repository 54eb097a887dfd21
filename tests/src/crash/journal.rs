//! What workers write about what they do: one line for each thing, appended in one call, so that the lines of all
//! programs are in the order in which they happened.

use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

/// A line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// The program.
    pub program: u32,
    /// The process's id.
    pub id: String,
    /// Its execution.
    pub execution: i64,
    /// What happened.
    pub what: What,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum What {
    /// An attempt of a step began.
    Begin {
        /// The step.
        step: String,
        /// Its idempotency key.
        key: String,
    },
    /// The step had its effect.
    Effect {
        /// The step.
        step: String,
    },
    /// The step's await returned: it is recorded.
    Returned {
        /// The step.
        step: String,
    },
    /// The process returned.
    End,
}

/// Where lines go.
#[derive(Clone)]
pub struct Journal {
    file: Arc<File>,
    program: u32,
}

impl Journal {
    /// Opens a file of lines, of the program with this number.
    pub fn open(path: &Path, program: u32) -> std::io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        Ok(Self { file: Arc::new(file), program })
    }

    /// Writes a line.
    pub fn write(&self, process: &durable_core::Process, what: What) {
        let line = Line { program: self.program, id: process.id().to_owned(), execution: process.execution(), what };
        let mut text = serde_json::to_string(&line).unwrap();
        text.push('\n');
        // One call: lines of several programs do not mix.
        (&*self.file).write_all(text.as_bytes()).unwrap();
    }
}

/// All lines of a file. Somebody may be writing the last one at this moment: then it is not there yet.
pub fn read(path: &Path) -> Vec<Line> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    lines.map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line:?}: {e}"))).collect()
}
