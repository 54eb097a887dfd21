use std::collections::BTreeMap;
use std::fmt;

/// How often each kind of call, and of operation, has done what was asked, and how often it has not.
pub(crate) struct Tally(BTreeMap<&'static str, [usize; 2]>);

/// All that there are.
const KINDS: [&str; 38] = [
    "Again",
    "Beat",
    "Commit",
    "Count",
    "Enlist",
    "Fence",
    "Find",
    "List",
    "Load",
    "Owned",
    "Peers",
    "Poll",
    "Record",
    "Refence",
    "Release",
    "Retire",
    "accept cancel",
    "await",
    "cancel",
    "claim",
    "delete",
    "end",
    "park",
    "park (signals)",
    "raise",
    "record",
    "record (awaited)",
    "record (raise)",
    "record (replaces)",
    "record (start)",
    "record (takes)",
    "resume",
    "resume (forget)",
    "seen",
    "start",
    "start (restart)",
    "start (take)",
    "terminate",
];

/// What nothing can be wrong with.
const NEVER_REFUSED: [&str; 2] = ["Enlist", "Retire"];

impl Tally {
    pub(crate) fn new() -> Self {
        Self(KINDS.into_iter().map(|kind| (kind, [0, 0])).collect())
    }

    /// # Panics
    /// If there is no such kind.
    pub(crate) fn add(&mut self, kind: &str, worked: bool) {
        let counts = self.0.get_mut(kind).unwrap_or_else(|| panic!("{kind:?} is not among the kinds"));
        counts[usize::from(!worked)] += 1;
    }

    /// The kinds that have not come to both that often.
    pub(crate) fn rare(&self, least: usize) -> Vec<&'static str> {
        let rare = |(kind, [worked, refused]): (&&'static str, &[usize; 2])| {
            *worked < least || (*refused < least && !NEVER_REFUSED.contains(kind))
        };
        self.0.iter().filter(|(kind, counts)| rare((kind, counts))).map(|(kind, _)| *kind).collect()
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:20} {:>9} {:>9}", "", "succeeded", "refused")?;
        for (kind, [worked, refused]) in &self.0 {
            writeln!(f, "{kind:20} {worked:>9} {refused:>9}")?;
        }
        Ok(())
    }
}
