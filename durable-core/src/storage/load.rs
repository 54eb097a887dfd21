//! What a run needs in order to go on, and how much of it is read at once.

use chrono::{DateTime, Utc};

use super::rows::{ProcessRow, Record, RecordKey, RunId, Status};

/// What a row counts for beside what it holds.
const ROW: usize = 200;

/// What is to be read.
#[derive(Clone, Debug)]
pub struct Load {
    /// Of these runs, none of them twice.
    pub runs: Vec<Wanted>,
    /// With their records, and with the processes that they await and that have not ended. Else only their rows, the messages
    /// and those of the awaited processes that have ended.
    pub records: bool,
    /// The most bytes that may be read, as [`RunState::weight`] counts them. If it is more, nothing of it is read.
    pub most: usize,
}

/// A run that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Which one.
    pub run: RunId,
    /// The messages after this number.
    pub seen: i64,
}

impl Load {
    /// All of these runs, with their records, however much that is.
    pub fn whole(runs: &[RunId]) -> Self {
        let runs = runs.iter().map(|run| Wanted { run: *run, seen: 0 }).collect();
        Self { runs, records: true, most: usize::MAX }
    }

    /// The same without their records.
    pub fn signals(runs: &[RunId]) -> Self {
        Self { records: false, ..Self::whole(runs) }
    }

    /// The runs alone, in their order.
    pub fn ids(&self) -> impl Iterator<Item = RunId> + '_ {
        self.runs.iter().map(|wanted| wanted.run)
    }
}

/// A message that waits in a process's mailbox.
#[derive(Clone, Debug, PartialEq)]
pub struct EventRow {
    /// Its place in the run's order.
    pub number: i64,
    /// The event's name.
    pub name: Box<str>,
    /// JSON text.
    pub payload: Box<str>,
    /// When it was put in, by the database's clock.
    pub raised_at: DateTime<Utc>,
}

/// How a run ended: completed, failed or cancelled; and its output or error, JSON text.
pub type Ended = (Status, Option<Box<str>>);

/// A process that another one awaits.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// The awaited run.
    pub run: RunId,
    /// The process's id; empty if it is gone.
    pub id: Box<str>,
    /// What became of it.
    pub fate: Fate,
}

/// What became of a process that is awaited.
#[derive(Clone, Debug, PartialEq)]
pub enum Fate {
    /// It has not ended.
    Open,
    /// It has ended, at this time of the database's clock.
    Ended(Ended, DateTime<Utc>),
    /// It was deleted.
    Gone,
}

/// Everything that a run needs in order to go on.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The run.
    pub run: RunId,
    /// Its state, or why what is stored cannot be understood. [`None`] if the run does not exist.
    pub state: std::result::Result<Option<RunState>, String>,
}

/// The state of one run.
#[derive(Clone, Debug)]
pub struct RunState {
    /// Its row.
    pub process: ProcessRow,
    /// Its records, if they were asked for.
    pub records: Vec<(RecordKey, Record)>,
    /// The messages that it has not taken, in their order.
    pub events: Vec<EventRow>,
    /// The awaited processes.
    pub targets: Vec<Target>,
}

impl RunState {
    /// Of its row alone.
    pub fn of(process: ProcessRow) -> Self {
        Self { process, records: Vec::new(), events: Vec::new(), targets: Vec::new() }
    }

    /// About how many bytes it is.
    pub fn weight(&self) -> usize {
        let ProcessRow { input, output, .. } = &self.process;
        let records = self.records.iter().map(|(_, record)| weight([Some(&*record.payload)]));
        let events = self.events.iter().map(|event| weight([Some(&*event.payload)]));
        let targets = self.targets.iter().map(|target| match &target.fate {
            Fate::Ended((_, output), _) => weight([output.as_deref()]),
            Fate::Open | Fate::Gone => weight([]),
        });
        weight([Some(&**input), output.as_deref()]) + records.chain(events).chain(targets).sum::<usize>()
    }
}

/// What a row counts for that holds these texts.
fn weight<const N: usize>(texts: [Option<&str>; N]) -> usize {
    ROW + texts.into_iter().flatten().map(|text| text.len()).sum::<usize>()
}

/// Counts the rows of an answer as they come.
#[derive(Debug)]
pub struct Scales {
    most: usize,
    bytes: usize,
}

impl Scales {
    /// For a load.
    pub fn of(load: &Load) -> Self {
        Self { most: load.most, bytes: 0 }
    }

    /// Adds a row that holds so many bytes. False if that is too much.
    pub fn add(&mut self, bytes: usize) -> bool {
        self.bytes = self.bytes.saturating_add(ROW).saturating_add(bytes);
        self.bytes <= self.most
    }

    /// What a storage adds, in SQL, to the bytes of what rows hold, for each of them.
    pub const ROW: usize = ROW;
}
