//! What was really hit.

use std::collections::BTreeMap;
use std::fmt;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// The call fails before it happens.
    Before,
    /// It happens, and the answer is lost.
    Lost,
    /// It does not happen, and nobody is told.
    Vanished,
    /// The answer is lost, and it happens later.
    Late,
    Delayed,
    /// A caller goes away in the middle.
    Dropped,
    Killed,
    Paused,
    /// One host does not reach the storage.
    Cut,
    /// No host does.
    Away,
    /// For more than two minutes.
    AwayLong,
    /// A host's clock is apart from the storage's.
    Clock,
    /// An orderly end.
    Shutdown,
}

impl Fault {
    pub const ALL: [Self; 13] = [
        Self::Before,
        Self::Lost,
        Self::Vanished,
        Self::Late,
        Self::Delayed,
        Self::Dropped,
        Self::Killed,
        Self::Paused,
        Self::Cut,
        Self::Away,
        Self::AwayLong,
        Self::Clock,
        Self::Shutdown,
    ];

    fn text(self) -> &'static str {
        match self {
            Self::Before => "error before",
            Self::Lost => "answer lost",
            Self::Vanished => "lost with its answer",
            Self::Late => "arrived late",
            Self::Delayed => "delayed",
            Self::Dropped => "call dropped",
            Self::Killed => "host killed",
            Self::Paused => "host paused",
            Self::Cut => "host cut off",
            Self::Away => "storage away",
            Self::AwayLong => "storage away for minutes",
            Self::Clock => "clock apart",
            Self::Shutdown => "shutdown",
        }
    }
}

/// Where it goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    BeforeEffect,
    AfterEffect,
    BeforeRecord,
    AfterRecord,
    Starting,
    Raising,
    Parking,
    Completing,
    Cancelling,
    Claiming,
    Loading,
    Polling,
    Beating,
    Enlisting,
    Refencing,
    TakingOver,
    Retiring,
    BeforeCommit,
    AfterCommit,
}

impl Place {
    pub const ALL: [Self; 19] = [
        Self::BeforeEffect,
        Self::AfterEffect,
        Self::BeforeRecord,
        Self::AfterRecord,
        Self::Starting,
        Self::Raising,
        Self::Parking,
        Self::Completing,
        Self::Cancelling,
        Self::Claiming,
        Self::Loading,
        Self::Polling,
        Self::Beating,
        Self::Enlisting,
        Self::Refencing,
        Self::TakingOver,
        Self::Retiring,
        Self::BeforeCommit,
        Self::AfterCommit,
    ];

    fn text(self) -> &'static str {
        match self {
            Self::BeforeEffect => "before an effect",
            Self::AfterEffect => "between effect and record",
            Self::BeforeRecord => "before a record",
            Self::AfterRecord => "after a record",
            Self::Starting => "starting",
            Self::Raising => "raising",
            Self::Parking => "parking",
            Self::Completing => "completing",
            Self::Cancelling => "cancelling",
            Self::Claiming => "claiming",
            Self::Loading => "between claim and load",
            Self::Polling => "looking for work",
            Self::Beating => "at a heartbeat",
            Self::Enlisting => "enlisting",
            Self::Refencing => "fencing off a batch",
            Self::TakingOver => "taking over",
            Self::Retiring => "retiring",
            Self::BeforeCommit => "before a transaction's commit",
            Self::AfterCommit => "after a transaction's commit",
        }
    }
}

/// How often.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tally {
    faults: BTreeMap<Fault, u64>,
    places: BTreeMap<Place, u64>,
}

impl Tally {
    /// Something went wrong, here.
    pub fn hit(&mut self, fault: Fault, places: &[Place]) {
        *self.faults.entry(fault).or_default() += 1;
        for place in places {
            *self.places.entry(*place).or_default() += 1;
        }
    }

    pub fn add(&mut self, other: &Self) {
        for (fault, count) in &other.faults {
            *self.faults.entry(*fault).or_default() += count;
        }
        for (place, count) in &other.places {
            *self.places.entry(*place).or_default() += count;
        }
    }

    /// What was hit less often than this, if anything.
    pub fn below(&self, least: u64) -> Vec<&'static str> {
        let faults = Fault::ALL.iter().filter(|fault| self.faults.get(fault).is_none_or(|count| *count < least));
        let places = Place::ALL.iter().filter(|place| self.places.get(place).is_none_or(|count| *count < least));
        faults.map(|fault| fault.text()).chain(places.map(|place| place.text())).collect()
    }

    /// Where things went wrong, in a line.
    pub fn places(&self) -> String {
        let text = |place: &Place| format!("{} {}", self.places.get(place).unwrap_or(&0), place.text());
        Place::ALL.iter().map(text).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |fault: &Fault| format!("{} {}", self.faults.get(fault).unwrap_or(&0), fault.text());
        f.write_str(&Fault::ALL.iter().map(text).collect::<Vec<_>>().join(", "))
    }
}
