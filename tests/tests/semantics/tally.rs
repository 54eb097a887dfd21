use std::collections::BTreeMap;
use std::fmt;

/// How often each kind of call, and of operation, has done what was asked, and how often it has not.
#[derive(Default)]
pub(crate) struct Tally(BTreeMap<String, [usize; 2]>);

/// What nothing can be wrong with.
const NEVER_REFUSED: [&str; 4] = ["Enlist", "Retire", "Peers", "park (owner)"];
const NEVER_WORKS: [&str; 1] = ["park (owner)"];

impl Tally {
    pub(crate) fn add(&mut self, kind: String, worked: bool) {
        self.0.entry(kind).or_default()[usize::from(!worked)] += 1;
    }

    /// # Panics
    /// If a kind has not come to both often enough.
    pub(crate) fn check(&self, least: usize) {
        let rare = |(kind, [worked, refused]): (&String, &[usize; 2])| {
            let works = *worked >= least || NEVER_WORKS.contains(&&**kind);
            let refuses = *refused >= least || NEVER_REFUSED.contains(&&**kind);
            !(works && refuses)
        };
        let rare: Vec<&String> =
            self.0.iter().filter(|(kind, counts)| rare((kind, counts))).map(|(kind, _)| kind).collect();
        assert!(rare.is_empty(), "not tried {least} times either way: {rare:?}\n{self}");
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
